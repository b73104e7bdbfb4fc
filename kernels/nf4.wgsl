// nf4 — 4-bit NormalFloat weights back to numbers, as bitsandbytes does (QLoRA, arXiv:2305.14314).
//
//   dequantize   out[i] = code[nibble(i)] · absmax[i / BLOCK], rounded to the type of out
//                The high nibble of a byte is the earlier element. absmax is already free of its own quantization.
//
//   codes    u8, two elements each [COUNT / 2]   bound as words of 8 elements
//   absmax   f32 [COUNT / BLOCK]                 bound as vec4
//   code     f32 [16]                            the NF4 table, four vec4
//   out      f32, f16 or bf16 (TYPE) [COUNT]
//   sizes    BLOCK is at least 8 · WIDE
//   grid     one invocation per 8 · WIDE elements, 64 to a workgroup, folded

const F32 = 0u;
const BF16 = 2u;

override TYPE: u32 = 0u;
override COUNT: u32;
override BLOCK_SHIFT: u32 = 6u; // log2 of the block size
const WIDE = 1u; // words that are loaded at once, and vec4f that are stored at once

@group(0) @binding(0) var<uniform> code: array<vec4f, 4>;
@group(0) @binding(1) var<storage, read> codes: array<array<u32, WIDE>>;
// image
@group(0) @binding(2) var<storage, read> absmax: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> out: array<array<vec4f, WIDE>>;

/// Entries of the table, by their bits: a driver looks up what differs from lane to lane one after the other.
fn entries(table: array<vec4f, 4>, nibbles: vec4u) -> vec4f {
  let bit0 = (nibbles & vec4u(1u)) == vec4u(1u);
  let bit1 = (nibbles & vec4u(2u)) == vec4u(2u);
  let bit2 = (nibbles & vec4u(4u)) == vec4u(4u);
  let bit3 = (nibbles & vec4u(8u)) == vec4u(8u);
  var found: array<vec4f, 4>;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    let four = table[i];
    found[i] = select(select(vec4f(four.x), vec4f(four.y), bit0), select(vec4f(four.z), vec4f(four.w), bit0), bit1);
  }
  return select(select(found[0], found[1], bit2), select(found[2], found[3], bit2), bit3);
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
  // Read before any branch: a CPU driver then reads it once for all lanes.
  let table = code;
  let at = (group.x + group.y * 32768u) * 64u + lane;
  if (at >= COUNT / (8u * WIDE)) {
    return;
  }
  var words = codes[at];
  let block = (at * 8u * WIDE) >> BLOCK_SHIFT;
  let four = absmax[block >> 2u];
  let two = select(four.xy, four.zw, (block & 2u) == 2u);
  let scale = select(two.x, two.y, (block & 1u) == 1u);
  var numbers: array<vec4f, 2 * WIDE>;
  // unroll
  for (var h = 0u; h < WIDE; h++) {
    numbers[h * 2u] = scale * entries(table, vec4u(words[h]) >> vec4u(4u, 0u, 12u, 8u));
    numbers[h * 2u + 1u] = scale * entries(table, vec4u(words[h]) >> vec4u(20u, 16u, 28u, 24u));
  }
  var stored: array<vec4f, WIDE>;
  if (TYPE == F32) {
    // unroll
    for (var i = 0u; i < 2u; i++) {
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        stored[h] = numbers[i * WIDE + h];
      }
      out[at * 2u + i] = stored;
    }
  } else {
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      let a = numbers[h * 2u];
      let b = numbers[h * 2u + 1u];
      stored[h] = bitcast<vec4f>(vec4u(pack(a.xy), pack(a.zw), pack(b.xy), pack(b.zw)));
    }
    out[at] = stored;
  }
}
