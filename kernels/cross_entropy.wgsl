// cross_entropy — token loss over the vocabulary; the logits are overwritten by their gradient.
//
//   loss       nll[first + r] = log Σ_v exp(logits[r,v]) − logits[r, labels[first + r]]
//   backward   the same, and logits[r,v] ← (softmax(logits[r])[v] − [v = label]) · scale.x
//   total      sums[scale.y] += Σ_r nll[r]
//
//   logits      f32 [rows, STRIDE]    columns VOCAB and up are padding: no part of the sum, gradient 0
//   labels      u32 [all rows]        rows.y is the position of this chunk's first row
//   nll         f32 [all rows]
//   scale       f32: x = 1 / (labelled tokens of the update), y = the update's place in sums
//   grid        loss, backward: at most one workgroup per row, folded; total: [1]
//   shared      lanes_*

override LANES: u32;
override VOCAB: u32;
override STRIDE: u32;
const WIDE = 1u; // vec4f of logits that are loaded and stored at once

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<uniform> scale: vec4f;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> logits: array<array<vec4f, WIDE>>;
@group(0) @binding(4) var<storage, read_write> nll: array<f32>;
@group(0) @binding(5) var<storage, read_write> sums: array<f32>;

const LOWEST = -1e30;

/// Four logits of a row from column 4 · `quad` on, padding as the lowest number.
fn valid(values: vec4f, quad: u32) -> vec4f {
  if (VOCAB == STRIDE || quad * 4u + 4u <= VOCAB) {
    return values;
  }
  return select(vec4f(LOWEST), values, vec4u(quad * 4u) + vec4u(0u, 1u, 2u, 3u) < vec4u(VOCAB));
}

/// Log-sum-exp of a row, in one pass: the sum is scaled down whenever a lane's maximum grows.
fn log_sum_exp(first: u32, lane: u32) -> f32 {
  var best = LOWEST;
  var sum = 0.0;
  for (var c = lane; c < STRIDE / (4u * WIDE); c += LANES) {
    var v = logits[first + c];
    var most = vec4f(best);
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      v[h] = valid(v[h], c * WIDE + h);
      most = max(most, v[h]);
    }
    let top = max(max(most.x, most.y), max(most.z, most.w));
    sum *= exp(best - top);
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      sum += dot(exp(v[h] - top), vec4f(1.0));
    }
    best = top;
  }
  let top = lanes_max(best, lane);
  return top + log(lanes_sum(sum * exp(best - top), lane));
}

/// The logit of a row's label.
fn target_of(first: u32, label: u32) -> f32 {
  var v = logits[first + label / (4u * WIDE)];
  return v[label / 4u % WIDE][label % 4u];
}

@compute @workgroup_size(LANES)
fn loss(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let first = row * (STRIDE / (4u * WIDE));
    let lse = log_sum_exp(first, lane);
    if (lane == 0u) {
      nll[rows.y + row] = lse - target_of(first, labels[rows.y + row]);
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
    let first = row * (STRIDE / (4u * WIDE));
    let label = labels[rows.y + row];
    let lse = log_sum_exp(first, lane);
    // The lane that will overwrite the label's logit: no other could read it safely.
    if (lane == label / (4u * WIDE) % LANES) {
      nll[rows.y + row] = lse - target_of(first, label);
    }
    for (var c = lane; c < STRIDE / (4u * WIDE); c += LANES) {
      var v = logits[first + c];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let quad = c * WIDE + h;
        let hit = vec4u(quad * 4u) + vec4u(0u, 1u, 2u, 3u) == vec4u(label);
        v[h] = (exp(valid(v[h], quad) - lse) - select(vec4f(0.0), vec4f(1.0), hit)) * scale.x;
      }
      logits[first + c] = v;
    }
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
