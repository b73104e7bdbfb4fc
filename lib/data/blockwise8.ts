/**
 * 8-bit blockwise quantization with bitsandbytes' dynamic maps, as its CUDA kernels do it.
 * It refuses values that are not finite, and it never rounds stochastically.
 */

/** Values that share one absmax in 8-bit blockwise quantization since bitsandbytes 0.44. */
export const BLOCKWISE_SIZE = 256;

/** Float32 values quantized in blocks: `codes` `[n]`, `absmax` `[ceil(n / blocksize)]`. */
export interface Blockwise {
  readonly codes: Uint8Array;
  readonly absmax: Float32Array;
}

const fround = Math.fround;

/**
 * The 256 ascending values of bitsandbytes' `create_dynamic_map`: 7 decades, each twice as fine as the one below,
 * with 0 and 1 added (8-bit optimizers, arXiv:2110.02861, section 2.1).
 */
export function dynamicMap(signed: boolean): Float32Array {
  const values = [0, 1];
  const low = fround(0.1);
  for (let decade = 0; decade < 7; decade++) {
    const intervals = signed ? 2 ** decade : 2 ** (decade + 1);
    const points = intervals + 1;
    const step = fround(fround(1 - low) / intervals);
    // torch.linspace counts up from the start in its first half and down from the end in its second; every point is
    // one fused multiply-add, which a float32 rounding of the double result reproduces.
    const edge = (k: number) =>
      k < Math.floor(points / 2) ? fround(low + step * k) : fround(1 - step * (intervals - k));
    const scale = fround(10 ** (decade - 6));
    for (let k = 0; k < intervals; k++) {
      const value = fround(scale * fround(fround(edge(k) + edge(k + 1)) / 2));
      values.push(value);
      if (signed) values.push(-value);
    }
  }
  return Float32Array.from(values).sort();
}

/** The 255 float32 midpoints between neighbours of an ascending `map` `[256]`. */
export function midpoints(map: Float32Array): Float32Array {
  return Float32Array.from({ length: map.length - 1 }, (_, i) => fround(map[i]! + map[i + 1]!) * 0.5);
}

/**
 * The code whose map value is nearest to `x`, given the `midpoints` of the map. A tie goes to the even code: the CUDA
 * search halves its step from 64 to 1 around 127, so its last pivot is always even, and it leaves the pivot only for
 * a value strictly past the midpoint. NaN gives code 0, as there.
 */
export function nearestCode(x: number, middle: Float32Array): number {
  let code = 0; // how many midpoints lie below x: found bit by bit, as 255 = 128 + 64 + … + 1
  for (let step = 128; step > 0; step >>= 1) if (x > middle[code + step - 1]!) code += step;
  return x === middle[code] ? code + (code & 1) : code;
}

/**
 * Quantizes `values` `[n]` in blocks of `blocksize` to the nearest entries of `map` `[256]`. A block of zeros gets
 * code 0 throughout, as on CUDA (0 · 1/0 is NaN there). Throws a RangeError for a value that is not finite.
 */
export function quantizeBlockwise(values: Float32Array, map: Float32Array, blocksize = BLOCKWISE_SIZE): Blockwise {
  const middle = midpoints(map);
  const codes = new Uint8Array(values.length);
  const absmax = new Float32Array(Math.ceil(values.length / blocksize));
  for (let block = 0; block < absmax.length; block++) {
    const begin = block * blocksize;
    const end = Math.min(begin + blocksize, values.length);
    let largest = 0;
    for (let i = begin; i < end; i++) {
      const size = Math.abs(values[i]!);
      if (!(size < Infinity)) throw new RangeError(`Cannot quantize value ${i}: it is ${values[i]}: it must be finite`);
      if (size > largest) largest = size;
    }
    absmax[block] = largest;
    const inverse = fround(1 / largest);
    for (let i = begin; i < end; i++) codes[i] = nearestCode(fround(values[i]! * inverse), middle);
  }
  return { codes, absmax };
}

/** The float32 values `[n]` that `quantized` stands for: map entry times the absmax of its block. */
export function dequantizeBlockwise(
  quantized: Blockwise,
  map: Float32Array,
  blocksize = BLOCKWISE_SIZE,
): Float32Array {
  const { codes, absmax } = quantized;
  const values = new Float32Array(codes.length);
  for (let i = 0; i < codes.length; i++) values[i] = map[codes[i]!]! * absmax[Math.floor(i / blocksize)]!;
  return values;
}
