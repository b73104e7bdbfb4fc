// matmul_operands — snippet: operands of matrix products and the writing of results; sizes are in matmul_sizes.wgsl.
// Appended to matmul_tiled.wgsl, matmul_narrow.wgsl and matvec.wgsl.
//
//   x, lora_x, add, out   f32, `offset` and `stride` in elements, both multiples of 4
//   w                     f32, f16 or bf16 (W_TYPE), row-major with w_stride; bound twice, as 16- and (w_half) as 8-byte words
//   lora_w                f32; nt: of each segment [columns, r], nn: [r, columns]
//   sizes                 k, r multiples of 8; n, and in tn the m columns of x, multiples of 4; in nt also w_offset and
//                         w_stride of 16-bit weights multiples of 8
//   grid                  none of its own

override W_TYPE: u32 = 0u;

// image
@group(0) @binding(2) var<storage, read> x: array<vec4f>;
// image
@group(0) @binding(3) var<storage, read> w: array<vec4u>;
@group(0) @binding(4) var<storage, read> w_half: array<vec2u>;
@group(0) @binding(5) var<storage, read> lora_x: array<vec4f>;
// image
@group(0) @binding(6) var<storage, read> lora_w: array<vec4f>;
@group(0) @binding(7) var<storage, read> add: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> out: array<vec4f>;

/// Eight numbers as they lie in memory: two words of f32, or one of 16-bit numbers and one unused.
struct Raw8 {
  low: vec4u,
  high: vec4u,
}

/// Weights `at` .. `at` + 7 as stored; `at`, counted in elements, is a multiple of 8.
fn raw8(at: u32) -> Raw8 {
  if (W_TYPE == F32) {
    return Raw8(w[at >> 2u], w[(at >> 2u) + 1u]);
  }
  return Raw8(w[at >> 3u], vec4u());
}

/// Weights `at` .. `at` + 3 as stored, in .xy where they have 16 bits; `at` is a multiple of 4.
fn raw4(at: u32) -> vec4u {
  if (W_TYPE == F32) {
    return w[at >> 2u];
  }
  return vec4u(w_half[at >> 2u], 0u, 0u);
}

/// Four 16-bit numbers of two words.
fn halves(words: vec2u) -> vec4f {
  if (W_TYPE == BF16) {
    let even = bitcast<vec2f>(words << vec2u(16u));
    let odd = bitcast<vec2f>(words & vec2u(0xffff0000u));
    return vec4f(even.x, odd.x, even.y, odd.y);
  }
  return vec4f(unpack2x16float(words.x), unpack2x16float(words.y));
}

/// The numbers of a Raw8; `stored` where they have the type of w, else they are f32.
fn widen8(raw: Raw8, stored: bool) -> mat2x4f {
  if (W_TYPE != F32 && stored) {
    return mat2x4f(halves(raw.low.xy), halves(raw.low.zw));
  }
  return mat2x4f(bitcast<vec4f>(raw.low), bitcast<vec4f>(raw.high));
}

/// The numbers of a raw4, likewise.
fn widen4(raw: vec4u, stored: bool) -> vec4f {
  if (W_TYPE != F32 && stored) {
    return halves(raw.xy);
  }
  return bitcast<vec4f>(raw);
}

/// Writes 4 columns of one row.
fn put(row: u32, column: u32, sum: vec4f) {
  let at = (dims.out_offset + row * dims.out_stride + column) >> 2u;
  var value = dims.scale * sum;
  if (dims.plus == ADD) {
    value += add[at];
  }
  if (dims.plus == OUT) {
    value += out[at];
  }
  out[at] = value;
}
