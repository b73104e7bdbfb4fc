// swiglu — the gated activation of the MLP and its gradient (arXiv:2002.05202).
//
//   forward    out = silu(gate) · up,   silu(g) = g / (1 + exp(−g))
//   backward   gate ← dout · up · σ(g) · (1 + g · (1 − σ(g))),   up ← dout · silu(g):   in place, nobody needs them again
//
//   gate_up     f32 [rows, 2 · DIM]   gate columns first, then up
//   out, dout   f32 [rows, DIM]
//   grid        one workgroup per row, folded

override LANES: u32;
override DIM: u32;

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read_write> gate_up: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(3) var<storage, read> dout: array<vec4f>;

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    let gate = gate_up[row * (DIM / 2u) + c];
    let up = gate_up[row * (DIM / 2u) + DIM / 4u + c];
    out[row * (DIM / 4u) + c] = gate / (1.0 + exp(-gate)) * up;
  }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    let at = row * (DIM / 2u) + c;
    let gate = gate_up[at];
    let up = gate_up[at + DIM / 4u];
    let d = dout[row * (DIM / 4u) + c];
    let sigmoid = 1.0 / (1.0 + exp(-gate));
    gate_up[at] = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
    gate_up[at + DIM / 4u] = d * gate * sigmoid;
  }
}
