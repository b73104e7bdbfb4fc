// rmsnorm — root-mean-square normalization and its gradients (arXiv:1910.07467).
//
//   forward          rstd[r] = 1 / sqrt(mean_c(x[r,c]²) + EPS)
//                    out[r,c] = x[r,c] · rstd[r] · weight[c]
//   backward         dx[r,c] += rstd[r] · (g[c] − x[r,c]·rstd[r]² · mean_c(g·x)),   g = dout[r]·weight
//   backward_weight  dweight[c] += Σ_r dout[r,c] · x[r,c] · rstd[r]
//
//   x, out, dout, dx   f32 [rows, DIM]
//   weight, dweight    f32 [DIM]
//   rstd               f32 [rows]       kept by forward for backward
//   grid               forward, backward: at most one workgroup per row, folded
//                      backward_weight: [DIM / (4 · WIDE · LANES / SPLIT)]
//   shared             lanes_*

override LANES: u32;
override DIM: u32;
override EPS: f32;
override SPLIT: u32 = 1u; // backward_weight: lanes that share the rows of a column, every SPLIT-th each
const WIDE = 1u; // vec4f that are loaded and stored at once
const KEPT = 16u; // loads of a row that a lane keeps for its second pass; longer rows are loaded twice

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> x: array<array<vec4f, WIDE>>;
// image
@group(0) @binding(2) var<storage, read> weight: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> rstd: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<array<vec4f, WIDE>>;
@group(0) @binding(5) var<storage, read> dout: array<array<vec4f, WIDE>>;
@group(0) @binding(6) var<storage, read_write> dx: array<array<vec4f, WIDE>>;
@group(0) @binding(7) var<storage, read_write> dweight: array<array<vec4f, WIDE>>;

/// Whether load `c` is one of a row's.
fn inside(c: u32) -> bool {
  return DIM % (4u * WIDE * LANES) == 0u || c < DIM / (4u * WIDE);
}

@compute @workgroup_size(LANES)
fn forward(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let first = row * (DIM / (4u * WIDE));
    var kept: array<array<vec4f, WIDE>, KEPT>;
    var squares = 0.0;
    // unroll up to 16
    for (var i = 0u; i < (DIM / 4u / WIDE + LANES - 1u) / LANES; i++) {
      let c = i * LANES + lane;
      if (inside(c)) {
        var value = x[first + c];
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          squares += dot(value[h], value[h]);
        }
        kept[i % KEPT] = value;
      }
    }
    let scale = 1.0 / sqrt(lanes_sum(squares, lane) / f32(DIM) + EPS);
    // unroll up to 16
    for (var i = 0u; i < (DIM / 4u / WIDE + LANES - 1u) / LANES; i++) {
      let c = i * LANES + lane;
      if (inside(c)) {
        var value = kept[i % KEPT];
        if (DIM > KEPT * 4u * WIDE * LANES) {
          value = x[first + c];
        }
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          value[h] *= scale * weight[c * WIDE + h];
        }
        out[first + c] = value;
      }
    }
    if (lane == 0u) {
      rstd[row] = scale;
    }
  }
}

@compute @workgroup_size(LANES)
fn backward(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let first = row * (DIM / (4u * WIDE));
    var kept_x: array<array<vec4f, WIDE>, KEPT>;
    var kept_g: array<array<vec4f, WIDE>, KEPT>;
    var products = 0.0;
    // unroll up to 16
    for (var i = 0u; i < (DIM / 4u / WIDE + LANES - 1u) / LANES; i++) {
      let c = i * LANES + lane;
      if (inside(c)) {
        var value = x[first + c];
        var g = dout[first + c];
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          g[h] *= weight[c * WIDE + h];
          products += dot(g[h], value[h]);
        }
        kept_x[i % KEPT] = value;
        kept_g[i % KEPT] = g;
      }
    }
    let scale = rstd[row];
    let mean = scale * scale * (lanes_sum(products, lane) / f32(DIM));
    // unroll up to 16
    for (var i = 0u; i < (DIM / 4u / WIDE + LANES - 1u) / LANES; i++) {
      let c = i * LANES + lane;
      if (inside(c)) {
        var value = kept_x[i % KEPT];
        var g = kept_g[i % KEPT];
        if (DIM > KEPT * 4u * WIDE * LANES) {
          value = x[first + c];
          g = dout[first + c];
          // unroll
          for (var h = 0u; h < WIDE; h++) {
            g[h] *= weight[c * WIDE + h];
          }
        }
        var sum = dx[first + c];
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          sum[h] += scale * (g[h] - value[h] * mean);
        }
        dx[first + c] = sum;
      }
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_weight(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let width = DIM / (4u * WIDE);
  let column = group.x * (LANES / SPLIT) + lane % (LANES / SPLIT);
  let safe = min(column, width - 1u);
  var sum: array<vec4f, WIDE>;
  for (var row = lane / (LANES / SPLIT); row < rows.x; row += SPLIT) {
    var value = x[row * width + safe];
    var g = dout[row * width + safe];
    let scale = rstd[row];
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      sum[h] += g[h] * value[h] * scale;
    }
  }
  // unroll
  for (var h = 0u; h < WIDE; h++) {
    lanes_keep(h, sum[h], lane);
  }
  lanes_end();
  // unroll
  for (var other = 1u; other < SPLIT; other++) {
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      sum[h] += lanes_fetch(h, lane % (LANES / SPLIT) + other * (LANES / SPLIT));
    }
  }
  if (lane < LANES / SPLIT && column < width) {
    var all = dweight[column];
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      all[h] += sum[h];
    }
    dweight[column] = all;
  }
}
