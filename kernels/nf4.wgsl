// nf4 — 4-bit NormalFloat weights back to numbers, as bitsandbytes does (QLoRA, arXiv:2305.14314).
//
//   dequantize   out[i] = code[nibble(i)] · absmax[i / BLOCK], rounded to the type of out
//                The high nibble of a byte is the earlier element. absmax is already free of its own quantization.
//
//   codes    u8, two elements each [count / 2]   bound as words of 8 elements
//   absmax   f32 [count / BLOCK]                 bound as vec4
//   code     f32 [16]                            the NF4 table, four vec4
//   out      f32, f16 or bf16 (TYPE) [count]
//   sizes    BLOCK is at least 8 · WIDE
//   shared   lanes_entries
//   grid     one invocation per 8 · WIDE elements, LANES to a workgroup, folded

const F32 = 0u;
const BF16 = 2u;

override LANES: u32;
override TYPE: u32 = 0u;
override BLOCK_SHIFT: u32 = 6u; // log2 of the block size
const WIDE = 1u; // words that are loaded at once, and vec4f that are stored at once

struct Dims {
  count: u32,
}

@group(0) @binding(0) var<uniform> code: array<vec4f, 4>;
@group(0) @binding(1) var<storage, read> codes: array<array<u32, WIDE>>;
// image
@group(0) @binding(2) var<storage, read> absmax: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> out: array<array<vec4f, WIDE>>;
@group(0) @binding(4) var<uniform> dims: Dims;

/// Two numbers as one word of 16-bit numbers, rounded to nearest even.
fn pack(v: vec2f) -> u32 {
  if (TYPE == BF16) {
    let bits = bitcast<vec2u>(v);
    let rounded = (bits + 0x7fffu + ((bits >> vec2u(16u)) & vec2u(1u))) >> vec2u(16u);
    return rounded.x | (rounded.y << 16u);
  }
  // Not pack2x16float: how that rounds is left to the driver, and a CPU driver takes twice as long for it. Adding 1/2 rounds
  // what is too small for a full exponent; finite numbers that are too large become infinite.
  let bits = bitcast<vec2u>(v);
  let size = bits & vec2u(0x7fffffffu);
  let full = min((size + 0xc8000fffu + ((size >> vec2u(13u)) & vec2u(1u))) >> vec2u(13u), vec2u(0x7c00u));
  let small = bitcast<vec2u>(bitcast<vec2f>(size) + 0.5) - 0x3f000000u;
  let half = select(full, small, size < vec2u(0x38800000u)) | ((bits ^ size) >> vec2u(16u));
  return half.x | (half.y << 16u);
}

@compute @workgroup_size(LANES)
fn dequantize(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  // Read before any branch: a CPU driver then reads it once for all lanes.
  let table = code;
  let mine = vec2f(code[(lane & 4u) >> 2u][lane & 3u], code[2u + ((lane & 4u) >> 2u)][lane & 3u]);
  let at = (group.x + group.y * 32768u) * LANES + lane;
  let safe = min(at, dims.count / (8u * WIDE) - 1u);
  var words = codes[safe];
  let block = (safe * 8u * WIDE) >> BLOCK_SHIFT;
  let four = absmax[block >> 2u];
  let two = select(four.xy, four.zw, (block & 2u) == 2u);
  let scale = select(two.x, two.y, (block & 1u) == 1u);
  var numbers: array<vec4f, 2 * WIDE>;
  // unroll
  for (var h = 0u; h < WIDE; h++) {
    numbers[h * 2u] = scale * lanes_entries(table, mine, vec4u(words[h]) >> vec4u(4u, 0u, 12u, 8u));
    numbers[h * 2u + 1u] = scale * lanes_entries(table, mine, vec4u(words[h]) >> vec4u(20u, 16u, 28u, 24u));
  }
  if (at != safe) {
    return;
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
