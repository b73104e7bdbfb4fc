// rope — rotary position embedding on the q and k columns of a fused [q k v] row, in place (arXiv:2104.09864).
//
//   rotate   (a, b) ← (a·cos − b·sin·SIGN, b·cos + a·sin·SIGN)   for a = column j, b = column j + D/2 of each head
//            The halves of a head are rotated against each other, as Hugging Face's Llama does. SIGN = −1 is the gradient.
//
//   qkv            f32 [rows, WIDTH]             the first HEADS heads are rotated (all of q and k), v is left alone
//   positions      u32 [rows]
//   cosine, sine   f32 [max positions, D / 2]    tables
//   grid           one workgroup per row, folded

override LANES: u32;
override WIDTH: u32; // columns of a row of qkv
override HEADS: u32; // heads to rotate, q and k together
override HALF: u32; // D / 2, a multiple of 4
override SIGN: f32;

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> positions: array<u32>;
@group(0) @binding(2) var<storage, read> cosine: array<vec4f>;
@group(0) @binding(3) var<storage, read> sine: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> qkv: array<vec4f>;

@compute @workgroup_size(LANES)
fn rotate(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  let half = HALF / 4u;
  let angles = positions[row] * half;
  for (var pair = lane; pair < HEADS * half; pair += LANES) {
    let head = pair / half;
    let j = pair - head * half;
    let at = row * (WIDTH / 4u) + head * 2u * half + j;
    let c = cosine[angles + j];
    let s = sine[angles + j] * SIGN;
    let a = qkv[at];
    let b = qkv[at + half];
    qkv[at] = a * c - b * s;
    qkv[at + half] = b * c + a * s;
  }
}
