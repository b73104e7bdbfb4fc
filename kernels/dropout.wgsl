// dropout — what a low-rank product reads while it trains (arXiv:1207.0580), and the way back of its gradient.
//
//   apply   out[r,c] = keep(r,c) · x[r,c] / (1 − P)
//   add     dx[r,c] += keep(r,c) · y[r,c] / (1 − P)
//           keep(r,c) is drawn by a hash of (draw.x, SALT, r · DIM + c): the same in forward, in a recomputed forward and in
//           backward, whatever ran in between
//
//   x, y, out, dx   f32 [rows, DIM]
//   draw            u32: x = a number of its own for each micro-batch of the run
//   grid            one workgroup per row, folded

override LANES: u32;
override DIM: u32;
override P: f32;
override SALT: u32;

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<uniform> draw: vec4u;
@group(0) @binding(2) var<storage, read> x: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;

/// MurmurHash3's finalizer over a golden-ratio step, as hash32 of lib/data/random.ts.
fn mix(value: vec4u) -> vec4u {
  var h = value + 0x9e3779b9u;
  h = (h ^ (h >> vec4u(16u))) * 0x85ebca6bu;
  h = (h ^ (h >> vec4u(13u))) * 0xc2b2ae35u;
  return h ^ (h >> vec4u(16u));
}

/// 1 / (1 − P) where the element is kept, else 0.
fn keep(at: u32) -> vec4f {
  let index = vec4u(at * 4u) + vec4u(0u, 1u, 2u, 3u);
  let drawn = mix(index ^ mix(vec4u(SALT) ^ mix(vec4u(draw.x))));
  return select(vec4f(0.0), vec4f(1.0 / (1.0 - P)), vec4f(drawn >> vec4u(8u)) * 5.9604645e-8 >= vec4f(P));
}

@compute @workgroup_size(LANES)
fn apply(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    let at = row * (DIM / 4u) + c;
    out[at] = keep(at) * x[at];
  }
}

@compute @workgroup_size(LANES)
fn add(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    let at = row * (DIM / 4u) + c;
    out[at] += keep(at) * x[at];
  }
}
