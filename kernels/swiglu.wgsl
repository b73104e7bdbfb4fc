// swiglu — the gated activation of the MLP and its gradient (arXiv:2002.05202).
//
//   forward    out = silu(gate) · up,   silu(g) = g / (1 + exp(−g))
//   backward   gate ← dout · up · σ(g) · (1 + g · (1 − σ(g))),   up ← dout · silu(g):   in place, nobody needs them again
//
//   gate_up     f32 [rows, 2 · DIM]   gate columns first, then up
//   out, dout   f32 [rows, DIM]
//   grid        at most one workgroup per row, folded

override LANES: u32;
override DIM: u32;
const WIDE = 1u; // vec4f that are loaded and stored at once

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read_write> gate_up: array<array<vec4f, WIDE>>;
@group(0) @binding(2) var<storage, read_write> out: array<array<vec4f, WIDE>>;
@group(0) @binding(3) var<storage, read> dout: array<array<vec4f, WIDE>>;

@compute @workgroup_size(LANES)
fn forward(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let width = DIM / (4u * WIDE);
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    for (var c = lane; c < width; c += LANES) {
      var gate = gate_up[row * 2u * width + c];
      var up = gate_up[row * 2u * width + width + c];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        up[h] *= gate[h] / (1.0 + exp(-gate[h]));
      }
      out[row * width + c] = up;
    }
  }
}

@compute @workgroup_size(LANES)
fn backward(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let width = DIM / (4u * WIDE);
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    for (var c = lane; c < width; c += LANES) {
      let at = row * 2u * width + c;
      var gate = gate_up[at];
      var up = gate_up[at + width];
      var d = dout[row * width + c];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let sigmoid = 1.0 / (1.0 + exp(-gate[h]));
        let silu = gate[h] * sigmoid;
        gate[h] = d[h] * up[h] * sigmoid * (1.0 + gate[h] * (1.0 - sigmoid));
        up[h] = d[h] * silu;
      }
      gate_up[at] = gate;
      gate_up[at + width] = up;
    }
  }
}
