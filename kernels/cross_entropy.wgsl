// cross_entropy — token loss over the vocabulary; the logits are overwritten by their gradient.
//
//   loss       nll[first + r] = log Σ_v exp(logits[r,v]) − logits[r, labels[first + r]]
//   backward   the same, and logits[r,v] ← (softmax(logits[r])[v] − [v = label]) · scale.x
//   total      sums.[SLOT] += Σ_r nll[r]
//
//   logits      f32 [rows, STRIDE]    columns VOCAB and up are padding: no part of the sum, gradient 0
//   labels      u32 [all rows]        rows.y is the position of this chunk's first row
//   nll         f32 [all rows]
//   scale       f32: x = 1 / (labelled tokens of the update)
//   grid        loss, backward: one workgroup per row, folded; total: [1]
//   shared      lanes_*

override LANES: u32;
override VOCAB: u32;
override STRIDE: u32;

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<uniform> scale: vec4f;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> logits: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> nll: array<f32>;
@group(0) @binding(5) var<storage, read_write> sums: array<f32>;

const LOWEST = -1e30;

/// Four logits, padding as the lowest number.
fn valid(values: vec4f, column: u32) -> vec4f {
  if (column * 4u + 4u <= VOCAB) {
    return values;
  }
  return select(vec4f(LOWEST), values, vec4u(column * 4u) + vec4u(0u, 1u, 2u, 3u) < vec4u(VOCAB));
}

/// Maximum and log-sum-exp of a row.
fn log_sum_exp(first: u32, lane: u32) -> f32 {
  var best = LOWEST;
  for (var c = lane; c < STRIDE / 4u; c += LANES) {
    let v = valid(logits[first + c], c);
    best = max(best, max(max(v.x, v.y), max(v.z, v.w)));
  }
  let top = lanes_max(best, lane);
  var sum = 0.0;
  for (var c = lane; c < STRIDE / 4u; c += LANES) {
    sum += dot(exp(valid(logits[first + c], c) - top), vec4f(1.0));
  }
  return top + log(lanes_sum(sum, lane));
}

@compute @workgroup_size(LANES)
fn loss(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  let lse = log_sum_exp(row * (STRIDE / 4u), lane);
  if (row < rows.x && lane == 0u) {
    let label = labels[rows.y + row];
    nll[rows.y + row] = lse - logits[row * (STRIDE / 4u) + label / 4u][label % 4u];
  }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  let first = row * (STRIDE / 4u);
  let lse = log_sum_exp(first, lane);
  if (row >= rows.x) {
    return;
  }
  let label = labels[rows.y + row];
  for (var c = lane; c < STRIDE / 4u; c += LANES) {
    let values = logits[first + c];
    let columns = vec4u(c * 4u) + vec4u(0u, 1u, 2u, 3u);
    let hit = columns == vec4u(label);
    if (any(hit)) {
      nll[rows.y + row] = lse - dot(values, select(vec4f(0.0), vec4f(1.0), hit));
    }
    logits[first + c] = (exp(valid(values, c) - lse) - select(vec4f(0.0), vec4f(1.0), hit)) * scale.x;
  }
}

@compute @workgroup_size(LANES)
fn total(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var r = lane; r < rows.x; r += LANES) {
    sum += nll[r];
  }
  let all = lanes_sum(sum, lane);
  if (lane == 0u) {
    sums[u32(scale.y)] += all;
  }
}
