// nf4 — 4-bit NormalFloat weights back to numbers, as bitsandbytes does (QLoRA, arXiv:2305.14314).
//
//   dequantize   out[i] = code[nibble(i)] · absmax[i / BLOCK], rounded to the type of out
//                The high nibble of a byte is the earlier element. absmax is already free of its own quantization.
//
//   codes    u8, two elements each [COUNT / 2]   bound as words of 8 elements
//   absmax   f32 [COUNT / BLOCK]
//   code     f32 [16]                            the NF4 table, four vec4
//   out      f32, f16 or bf16 (TYPE) [COUNT]
//   grid     one invocation per 8 elements, 64 to a workgroup, folded

const F32 = 0u;
const BF16 = 2u;

override TYPE: u32 = 0u;
override COUNT: u32;
override BLOCK_SHIFT: u32 = 6u; // log2 of the block size

@group(0) @binding(0) var<uniform> code: array<vec4f, 4>;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> absmax: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4u>;

fn value(nibble: u32) -> f32 {
  return code[(nibble >> 2u) & 3u][nibble & 3u];
}

/// Two numbers as one word of 16-bit numbers, rounded to nearest even.
fn pack(v: vec2f) -> u32 {
  if (TYPE == BF16) {
    let bits = bitcast<vec2u>(v);
    let rounded = (bits + 0x7fffu + ((bits >> vec2u(16u)) & vec2u(1u))) >> vec2u(16u);
    return rounded.x | (rounded.y << 16u);
  }
  return pack2x16float(v);
}

@compute @workgroup_size(64)
fn dequantize(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * 32768u) * 64u + lane;
  if (at >= COUNT / 8u) {
    return;
  }
  let word = codes[at];
  let scale = absmax[(at * 8u) >> BLOCK_SHIFT];
  let a = scale * vec4f(value(word >> 4u), value(word), value(word >> 12u), value(word >> 8u));
  let b = scale * vec4f(value(word >> 20u), value(word >> 16u), value(word >> 28u), value(word >> 24u));
  if (TYPE == F32) {
    out[at * 2u] = bitcast<vec4u>(a);
    out[at * 2u + 1u] = bitcast<vec4u>(b);
  } else {
    out[at] = vec4u(pack(a.xy), pack(a.zw), pack(b.xy), pack(b.zw));
  }
}
