// rmsnorm — root-mean-square normalization and its gradients (arXiv:1910.07467).
//
//   forward          rstd[r] = 1 / sqrt(mean_c(x[r,c]²) + EPS)
//                    out[r,c] = x[r,c] · rstd[r] · weight[c]
//   backward         dx[r,c] (+)= rstd[r] · (g[c] − x[r,c]·rstd[r]² · mean_c(g·x)),   g = dout[r]·weight
//   backward_weight  dweight[c] += Σ_r dout[r,c] · x[r,c] · rstd[r]
//
//   x, out, dout, dx   f32 [rows, DIM]
//   weight, dweight    f32 [DIM]
//   rstd               f32 [rows]       kept by forward for backward
//   grid               forward, backward: one workgroup per row, folded; backward_weight: [DIM / (4 · LANES)]
//   shared             lanes_*

override LANES: u32;
override DIM: u32;
override EPS: f32;
override ADD: u32 = 1u; // 0: backward overwrites dx

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
@group(0) @binding(2) var<storage, read> weight: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> rstd: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(5) var<storage, read> dout: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> dx: array<vec4f>;
@group(0) @binding(7) var<storage, read_write> dweight: array<vec4f>;

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  let first = row * (DIM / 4u);
  var squares = 0.0;
  if (row < rows.x) {
    for (var c = lane; c < DIM / 4u; c += LANES) {
      let value = x[first + c];
      squares += dot(value, value);
    }
  }
  let scale = 1.0 / sqrt(lanes_sum(squares, lane) / f32(DIM) + EPS);
  if (row < rows.x) {
    for (var c = lane; c < DIM / 4u; c += LANES) {
      out[first + c] = x[first + c] * scale * weight[c];
    }
    if (lane == 0u) {
      rstd[row] = scale;
    }
  }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  let first = row * (DIM / 4u);
  var products = 0.0;
  if (row < rows.x) {
    for (var c = lane; c < DIM / 4u; c += LANES) {
      products += dot(dout[first + c] * weight[c], x[first + c]);
    }
  }
  let mean = lanes_sum(products, lane) / f32(DIM);
  if (row < rows.x) {
    let scale = rstd[row];
    for (var c = lane; c < DIM / 4u; c += LANES) {
      let d = scale * (dout[first + c] * weight[c] - x[first + c] * (scale * scale * mean));
      dx[first + c] = select(d, dx[first + c] + d, ADD == 1u);
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_weight(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let column = group.x * LANES + lane;
  if (column >= DIM / 4u) {
    return;
  }
  var sum = vec4f(0.0);
  for (var row = 0u; row < rows.x; row++) {
    let at = row * (DIM / 4u) + column;
    sum += dout[at] * x[at] * rstd[row];
  }
  dweight[column] += sum;
}
