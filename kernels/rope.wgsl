// rope — rotary position embedding on the q and k columns of a fused [q k v] row, in place (arXiv:2104.09864).
//
//   rotate   (a, b) ← (a·cos − b·sin·SIGN, b·cos + a·sin·SIGN)   for a = column j, b = column j + D/2 of each head
//            The halves of a head are rotated against each other, as Hugging Face's Llama does. SIGN = −1 is the gradient.
//
//   qkv            f32 [rows, WIDTH]             the first HEADS heads are rotated (all of q and k), v is left alone
//   positions      u32 [rows]
//   cosine, sine   f32 [max positions, D / 2]    tables
//   grid           at most one workgroup per row, folded

override LANES: u32;
override WIDTH: u32; // columns of a row of qkv
override HEADS: u32; // heads to rotate, q and k together
override HALF: u32; // D / 2, a multiple of 4
override SIGN: f32;
const WIDE = 1u; // vec4f of qkv that are loaded and stored at once

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> positions: array<u32>;
// image
@group(0) @binding(2) var<storage, read> cosine: array<vec4f>;
// image
@group(0) @binding(3) var<storage, read> sine: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> qkv: array<array<vec4f, WIDE>>;

@compute @workgroup_size(LANES)
fn rotate(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let half = HALF / (4u * WIDE);
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let angles = positions[row] * half;
    for (var pair = lane; pair < HEADS * half; pair += LANES) {
      let head = pair / half;
      let j = pair - head * half;
      let at = row * (WIDTH / (4u * WIDE)) + head * 2u * half + j;
      var a = qkv[at];
      var b = qkv[at + half];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let c = cosine[(angles + j) * WIDE + h];
        let s = sine[(angles + j) * WIDE + h] * SIGN;
        let old = a[h];
        a[h] = old * c - b[h] * s;
        b[h] = b[h] * c + old * s;
      }
      qkv[at] = a;
      qkv[at + half] = b;
    }
  }
}
