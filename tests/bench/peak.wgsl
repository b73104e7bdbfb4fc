// peak — what a device can do at most: multiply-adds on registers alone, and a copy from memory to memory.
//
//   fma_f32    12 independent chains of REPEAT · STEPS multiply-adds per lane, nothing read, one number written
//   copy       out[i] = x[i]
//
//   x, out     f32 as vec4, 4 · LANES · PER_LANE numbers per workgroup of copy
//   grid       fma_f32: any, folded, one number of sums per lane; copy: vec4s / (LANES · PER_LANE), folded

override LANES: u32;
override STEPS: u32 = 500u;
override REPEAT: u32 = 20u;
override PER_LANE: u32 = 8u;

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(LANES)
fn fma_f32(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * 32768u) * LANES + lane;
  // A factor below 1 keeps the sums finite; that it depends on the lane keeps the compiler from summing the series.
  let factor = 0.5 + f32(at) * 1e-9;
  let term = factor + 0.5;
  var chain: array<f32, 12>;
  // unroll
  for (var i = 0u; i < 12u; i++) {
    chain[i] = f32(lane + i);
  }
  for (var step = 0u; step < STEPS; step++) {
    // unroll
    for (var r = 0u; r < REPEAT; r++) {
      // unroll
      for (var i = 0u; i < 12u; i++) {
        chain[i] = fma(chain[i], factor, term);
      }
    }
  }
  var sum = 0.0;
  // unroll
  for (var i = 0u; i < 12u; i++) {
    sum += chain[i];
  }
  sums[at] = sum;
}

@compute @workgroup_size(LANES)
fn copy(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let first = (group.x + group.y * 32768u) * LANES * PER_LANE + lane;
  // unroll
  for (var i = 0u; i < PER_LANE; i++) {
    out[first + i * LANES] = x[first + i * LANES];
  }
}
