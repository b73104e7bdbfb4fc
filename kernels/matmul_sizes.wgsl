// matmul_sizes — snippet: sizes of matrix products, and how their columns are tiled. Appended to every kernel of products.
//
//   dims.end0, end1   nt: columns [0, end0), [end0, end1), [end1, n) are segments with LoRA operands of their own
//   rows.x            rows of x and out (nt, nn), or of x and w (tn)
//   grid              none of its own

const F32 = 0u;
const F16 = 1u;
const BF16 = 2u;
const NONE = 0u; // out is overwritten
const ADD = 1u; // out = product + add
const OUT = 2u; // out += product

struct Dims {
  m: u32,
  n: u32,
  k: u32,
  x_offset: u32,
  x_stride: u32,
  w_offset: u32,
  w_stride: u32,
  out_offset: u32,
  out_stride: u32,
  lora_x_stride: u32,
  lora_w_stride: u32,
  end0: u32,
  end1: u32,
  lora_x0: u32,
  lora_x1: u32,
  lora_x2: u32,
  lora_w0: u32,
  lora_w1: u32,
  lora_w2: u32,
  r0: u32,
  r1: u32,
  r2: u32,
  scale: f32,
  plus: u32,
}

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<uniform> dims: Dims;

/// A column tile of a segment, and the segment's LoRA operands.
struct Tile {
  column: u32,
  start: u32,
  end: u32,
  lora_x: u32,
  lora_w: u32,
  r: u32,
}

/// Tile `index` of `wide` columns (nt): segments are tiled apart, so that no tile crosses from one into the next.
fn tile_of(index: u32, wide: u32) -> Tile {
  let tiles0 = (dims.end0 + wide - 1u) / wide;
  let tiles1 = (dims.end1 - dims.end0 + wide - 1u) / wide;
  if (index < tiles0) {
    return Tile(index * wide, 0u, dims.end0, dims.lora_x0, dims.lora_w0, dims.r0);
  }
  if (index < tiles0 + tiles1) {
    return Tile(dims.end0 + (index - tiles0) * wide, dims.end0, dims.end1, dims.lora_x1, dims.lora_w1, dims.r1);
  }
  let column = dims.end1 + (index - tiles0 - tiles1) * wide;
  return Tile(column, dims.end1, dims.n, dims.lora_x2, dims.lora_w2, dims.r2);
}
