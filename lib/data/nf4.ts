/**
 * NF4, the 4-bit storage of QLoRA (arXiv:2305.14314, section 3), byte for byte as bitsandbytes' CUDA kernels write it,
 * with double quantization of the block scales. It knows only nf4: not fp4, and not int8.
 */
import { dequantizeBlockwise, dynamicMap, quantizeBlockwise } from "./blockwise8.ts";

/** Weights that share one absmax: bitsandbytes' default. */
export const NF4_BLOCKSIZE = 64;

/** The 16 values of the data type, by code: quantiles of the normal distribution scaled to [-1, 1]. */
export const NF4_CODE: Float32Array = Float32Array.of(
  -1,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1,
);

/** Mean of |w - nf4(w)| / sigma for normal weights in blocks of 64 (bitsandbytes tests/test_functional.py). */
export const NF4_NORMAL_ERROR = 0.0728;

/** A float32 midpoint between neighbouring codes: a value must be strictly greater to take the upper one. */
const BOUNDARIES = Float32Array.from({ length: 15 }, (_, i) => (NF4_CODE[i]! + NF4_CODE[i + 1]!) / 2);

// [-1, 1] is cut into 32 cells of 1/16. Boundaries are at least 0.083 apart, so a cell holds at most one of them:
// a code is the cell's lowest code plus one comparison, with no branch. A cell without a boundary compares with 2.
const CELLS = 32;
const CELL_CODE = new Uint8Array(CELLS + 1);
const CELL_BOUNDARY = new Float32Array(CELLS + 1).fill(2);
for (let cell = 0; cell <= CELLS; cell++) {
  const edge = (c: number) => c / (CELLS / 2) - 1;
  CELL_CODE[cell] = BOUNDARIES.filter((b) => b < edge(cell)).length;
  const inside = BOUNDARIES.find((b) => b >= edge(cell) && b < edge(cell + 1));
  if (inside !== undefined) CELL_BOUNDARY[cell] = inside;
}

/** NF4 weights: `packed` `[ceil(n / 2)]`, the earlier weight in the high half; `absmax` `[ceil(n / blocksize)]`. */
export interface Nf4 {
  readonly packed: Uint8Array;
  readonly absmax: Float32Array;
}

/** The largest magnitude of each block of `values` `[n]`. Throws a RangeError for a value that is not finite. */
export function blockAbsmax(values: Float32Array, blocksize: number = NF4_BLOCKSIZE): Float32Array {
  const absmax = new Float32Array(Math.ceil(values.length / blocksize));
  const absmaxBits = new Int32Array(absmax.buffer);
  // Without the sign bit, float32 bit patterns are ordered as the numbers are, with infinity and NaN on top.
  const bits = new Int32Array(values.buffer, values.byteOffset, values.length);
  for (let block = 0; block < absmax.length; block++) {
    const begin = block * blocksize;
    const end = Math.min(begin + blocksize, values.length);
    let largest = 0;
    for (let i = begin; i < end; i++) largest = Math.max(largest, bits[i]! & 0x7fffffff);
    if (largest >= 0x7f800000) {
      const at = begin + values.subarray(begin, end).findIndex((value) => !Number.isFinite(value));
      throw new RangeError(`Cannot quantize weight ${at}: it is ${values[at]}: it must be finite`);
    }
    absmaxBits[block] = largest;
  }
  return absmax;
}

/**
 * Quantizes `values` `[n]`, flattened row by row, in blocks of 64. A value on the midpoint of two codes takes the lower
 * one; a block of zeros is all code 0, as on CUDA. Throws a RangeError for a value that is not finite.
 */
export function quantizeNf4(values: Float32Array, options: { readonly blocksize?: number } = {}): Nf4 {
  const blocksize = options.blocksize ?? NF4_BLOCKSIZE;
  if (!(blocksize >= 2 && blocksize % 2 === 0)) {
    throw new RangeError(`Cannot quantize in blocks of ${blocksize}: the block size must be an even number`);
  }
  const absmax = blockAbsmax(values, blocksize);
  const packed = new Uint8Array(Math.ceil(values.length / 2));
  for (let block = 0; block < absmax.length; block++) {
    const largest = absmax[block]!;
    if (largest === 0) continue; // bytes 0x00
    // bitsandbytes multiplies by the float32 reciprocal. Below 1e-38 that would overflow, so it is held there.
    const inverse = Math.fround(1 / Math.max(largest, SMALLEST));
    const begin = block * blocksize;
    const end = Math.min(begin + blocksize, values.length);
    const even = end - (end & 1);
    for (let i = begin; i < even; i += 2) {
      packed[i >> 1] = (nf4Code(values[i]!, inverse) << 4) | nf4Code(values[i + 1]!, inverse);
    }
    if (even !== end) packed[even >> 1] = (nf4Code(values[even]!, inverse) << 4) | 7; // padded with the code of 0
  }
  return { packed, absmax };
}

const SMALLEST = Math.fround(1e-38);

/** The code of `value` when `inverse` is one over the absmax of its block, so that their product is in [-1, 1]. */
function nf4Code(value: number, inverse: number): number {
  // The largest value times a reciprocal that was rounded up can exceed 1 by an ulp; cell 32 is still its cell.
  const scaled = Math.fround(value * inverse);
  const cell = ((scaled + 1) * (CELLS / 2)) | 0;
  return CELL_CODE[cell]! + +(scaled > CELL_BOUNDARY[cell]!);
}

/** The float32 weights `[count]`: code value times absmax, rounded once. Throws a RangeError when a part does not fit. */
export function dequantizeNf4(
  quantized: Nf4 & { readonly count: number; readonly blocksize?: number },
): Float32Array {
  const { packed, absmax, count, blocksize = NF4_BLOCKSIZE } = quantized;
  if (packed.length !== Math.ceil(count / 2) || absmax.length !== Math.ceil(count / blocksize)) {
    throw new RangeError(
      `Cannot dequantize ${count} weights: there are ${packed.length} bytes and ${absmax.length} absmax: ` +
        `wanted ${Math.ceil(count / 2)} and ${Math.ceil(count / blocksize)}`,
    );
  }
  const values = new Float32Array(count);
  for (let block = 0; block < absmax.length; block++) {
    const scale = absmax[block]!;
    const end = Math.min((block + 1) * blocksize, count);
    for (let i = block * blocksize; i < end; i++) {
      values[i] = NF4_CODE[(packed[i >> 1]! >> (i & 1 ? 0 : 4)) & 15]! * scale;
    }
  }
  return values;
}

/** Double-quantized scales: `codes` `[n]` in the signed dynamic map, `nestedAbsmax` `[ceil(n / 256)]`, one `offset`. */
export interface DoubleQuantized {
  readonly codes: Uint8Array;
  readonly nestedAbsmax: Float32Array;
  readonly offset: number;
}

/** The map of the double-quantized scales, `nested_quant_map` `[256]` in a saved model. */
export const NESTED_MAP: Float32Array = dynamicMap(true);

/** Quantizes the scales themselves to 8 bits: their mean is taken off, the rest goes in blocks of 256. */
export function doubleQuantize(absmax: Float32Array): DoubleQuantized {
  const offset = torchMean(absmax);
  const { codes, absmax: nestedAbsmax } = quantizeBlockwise(absmax.map((a) => a - offset), NESTED_MAP);
  return { codes, nestedAbsmax, offset };
}

/** The float32 scales `[n]` that `quantized` stands for: the product is rounded, then the sum. */
export function undoubleQuantize(quantized: DoubleQuantized): Float32Array {
  const { codes, nestedAbsmax, offset } = quantized;
  return dequantizeBlockwise({ codes, absmax: nestedAbsmax }, NESTED_MAP).map((a) => a + offset);
}

/**
 * The float32 mean as PyTorch's CPU sum gives it on one thread with 8-wide vectors (ATen SumKernel.cpp, cascade_sum):
 * 32 running sums, flushed level by level every 16 rows or more, then the levels, the four vectors and the eight
 * lanes in this order. A sum in another order can differ in the last bit, and so then does `nested_offset`.
 */
function torchMean(values: Float32Array): number {
  const WIDTH = 8, LANES = 4 * WIDTH, LEVELS = 4;
  const vectors = Math.floor(values.length / WIDTH);
  const rows = Math.floor(vectors / 4);
  const power = Math.max(4, Math.floor(Math.ceil(Math.log2(Math.max(rows, 1))) / LEVELS));
  const sums = Array.from({ length: LEVELS }, () => new Float32Array(LANES));
  const addRow = (row: number) => {
    for (let lane = 0; lane < LANES; lane++) sums[0]![lane]! += values[row * LANES + lane]!;
  };
  let row = 0;
  while (row + 2 ** power <= rows) {
    for (let i = 0; i < 2 ** power; i++) addRow(row++);
    for (let level = 1; level < LEVELS; level++) {
      for (let lane = 0; lane < LANES; lane++) sums[level]![lane]! += sums[level - 1]![lane]!;
      sums[level - 1]!.fill(0);
      if ((row & ((2 ** power - 1) << (level * power))) !== 0) break;
    }
  }
  while (row < rows) addRow(row++);
  const total = sums[0]!;
  for (let level = 1; level < LEVELS; level++) {
    for (let lane = 0; lane < LANES; lane++) total[lane]! += sums[level]![lane]!;
  }
  for (let vector = rows * 4; vector < vectors; vector++) {
    for (let lane = 0; lane < WIDTH; lane++) total[lane]! += values[vector * WIDTH + lane]!;
  }
  for (let lane = WIDTH; lane < LANES; lane++) total[lane % WIDTH]! += total[lane]!;
  let sum = 0;
  for (let i = vectors * WIDTH; i < values.length; i++) sum = Math.fround(sum + values[i]!);
  for (let lane = 0; lane < WIDTH; lane++) sum = Math.fround(sum + total[lane]!);
  return Math.fround(sum / values.length);
}
