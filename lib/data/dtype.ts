/**
 * The element types of safetensors files and their exact conversion to and from float32.
 * Refuses integers and 8-bit floats: those are read as bytes by whoever knows what they mean.
 */

/** Every dtype of the format with its bits, in the rank order by which the reference writer sorts (lowest first). */
const BITS = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
} as const;

/** The name of an element type, as safetensors headers spell it. */
export type Dtype = keyof typeof BITS;

/** The types that weights are stored in, as configurations and flags call them, with the dtype of each. */
export const STORED = { float32: "F32", float16: "F16", bfloat16: "BF16" } as const;

/** All dtypes, lowest rank first: the reference writer stores high ranks first. */
export const dtypes: readonly Dtype[] = Object.keys(BITS) as Dtype[];

/** Whether a word is the name of a dtype. */
export function isDtype(word: string): word is Dtype {
  return Object.hasOwn(BITS, word);
}

/** Size of one element in bits: 4 and 6 exist, so a tensor may not be a whole number of bytes. */
export function bitsPerElement(dtype: Dtype): number {
  return BITS[dtype];
}

/** Size in bytes of a tensor of this shape; throws a RangeError when it is not a whole number of bytes. */
export function byteLength(dtype: Dtype, shape: readonly number[]): number {
  const bits = shape.reduce((product, size) => product * size, 1) * BITS[dtype];
  if (!Number.isSafeInteger(bits) || bits % 8 !== 0) {
    throw new RangeError(
      `Cannot size a ${dtype} tensor of shape [${shape.join(", ")}]: ${bits} bits are not whole bytes`,
    );
  }
  return bits / 8;
}

/** The bfloat16 (upper half of a float32) nearest to `bits`, ties to even; a NaN stays a NaN of the same sign. */
function bf16FromBits(bits: number): number {
  if ((bits & 0x7fffffff) > 0x7f800000) return ((bits >>> 16) & 0x8000) | 0x7fc0;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** The IEEE half nearest to the float32 with these bits, ties to even; a NaN stays a NaN of the same sign. */
function f16FromBits(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and above round to infinity
  if (magnitude >= 0x38800000) { // normal: rebias the exponent by 127 - 15, drop 13 bits
    const rebased = magnitude - 0x38000000;
    return sign | ((rebased + 0xfff + ((rebased >>> 13) & 1)) >>> 13);
  }
  if (magnitude <= 0x33000000) return sign; // 2^-25 and below: half of the smallest subnormal, ties to zero
  const shift = 126 - (magnitude >>> 23); // 14..24
  const mantissa = (magnitude & 0x7fffff) | 0x800000;
  const half = mantissa >>> shift;
  const rest = mantissa & ((1 << shift) - 1);
  const middle = 1 << (shift - 1);
  return sign | (rest > middle || (rest === middle && (half & 1) === 1) ? half + 1 : half);
}

/** The float32 bits of an IEEE half: exact. */
function bitsFromF16(half: number): number {
  const sign = (half & 0x8000) << 16;
  const exponent = (half >>> 10) & 0x1f;
  const mantissa = half & 0x3ff;
  if (exponent === 0x1f) return (sign | 0x7f800000 | (mantissa << 13)) >>> 0;
  if (exponent !== 0) return (sign | ((exponent + 112) << 23) | (mantissa << 13)) >>> 0;
  if (mantissa === 0) return sign >>> 0;
  const lead = 31 - Math.clz32(mantissa); // subnormal: value = mantissa · 2^-24
  return (sign | ((lead + 103) << 23) | ((mantissa << (23 - lead)) & 0x7fffff)) >>> 0;
}

let halfTable: Uint32Array | undefined; // 256 KiB: every half as float32 bits

/** The bytes at an address that typed arrays accept: a view where it is aligned, a copy where it is not. */
function aligned(bytes: Uint8Array, size: number): Uint8Array {
  return bytes.byteOffset % size === 0 ? bytes : bytes.slice();
}

/**
 * The values of little-endian `bytes` as float32, in a buffer of their own: exact for F32, F16 and BF16, rounded once for F64.
 * Throws a TypeError for any other dtype and a RangeError when the bytes are not whole elements.
 */
export function toFloat32(bytes: Uint8Array, dtype: Dtype): Float32Array<ArrayBuffer> {
  if (dtype !== "F32" && dtype !== "F16" && dtype !== "BF16" && dtype !== "F64") {
    throw new TypeError(`Cannot read ${dtype} values as float32: only F32, F16, BF16 and F64 have such values`);
  }
  const size = BITS[dtype] / 8;
  if (bytes.length % size !== 0) {
    throw new RangeError(`Cannot read ${bytes.length} bytes as ${dtype}: an element has ${size} bytes`);
  }
  const count = bytes.length / size;
  const out = new Float32Array(count);
  if (dtype === "F32") {
    new Uint8Array(out.buffer).set(bytes);
    return out;
  }
  const { buffer, byteOffset } = aligned(bytes, size);
  if (dtype === "F64") {
    out.set(new Float64Array(buffer, byteOffset, count));
    return out;
  }
  const source = new Uint16Array(buffer, byteOffset, count);
  const bits = new Uint32Array(out.buffer);
  if (dtype === "BF16") {
    for (let i = 0; i < count; i++) bits[i] = source[i]! << 16;
    return out;
  }
  const table = halfTable ??= Uint32Array.from({ length: 65536 }, (_, half) => bitsFromF16(half));
  for (let i = 0; i < count; i++) bits[i] = table[source[i]!]!;
  return out;
}

/** The float32 values as little-endian bytes of `dtype`, rounded to the nearest, ties to even; NaN stays NaN. */
export function fromFloat32(values: Float32Array, dtype: "F32" | "F16" | "BF16"): Uint8Array<ArrayBuffer> {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  if (dtype === "F32") return new Uint8Array(bits.slice().buffer);
  const out = new Uint16Array(values.length);
  if (dtype === "BF16") { for (let i = 0; i < out.length; i++) out[i] = bf16FromBits(bits[i]!); }
  else for (let i = 0; i < out.length; i++) out[i] = f16FromBits(bits[i]!);
  return new Uint8Array(out.buffer);
}

/** The float32 bits of the smallest magnitude that is not finite in the dtype: 2^128, 65520, 2^128 - 2^119. */
const LIMIT = { F32: 0x7f800000, F16: 0x477ff000, BF16: 0x7f7f8000 } as const;

/** Index of the first value that is not a number in `dtype`, or would round to infinity there; -1 where all fit. */
export function firstUnfit(values: Float32Array, dtype: "F32" | "F16" | "BF16"): number {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length), limit = LIMIT[dtype];
  for (let i = 0; i < bits.length; i++) if ((bits[i]! & 0x7fffffff) >= limit) return i;
  return -1;
}

/** The values after a stay in `dtype`: rounded to the nearest, ties to even. */
export function rounded(values: Float32Array, dtype: "F32" | "F16" | "BF16"): Float32Array<ArrayBuffer> {
  return toFloat32(fromFloat32(values, dtype), dtype);
}
