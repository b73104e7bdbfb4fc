// adamw — the optimizer: gradient norm, clipping, and AdamW with 32- or 8-bit state (arXiv:1711.05101, 2110.02861).
//
//   sum_squares   partial[part + g] = Σ grad² over the elements of workgroup g
//   clip          norm.x = sqrt(Σ partial),  norm.y = min(1, max_norm / (norm.x + 1e-6)) (1 where max_norm is 0);
//                 norms[slot] = norm.x
//   step32        m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  p ← p − lr · (m / c1) / (sqrt(v) / c2 + eps)
//                 with c1 = 1 − β1ᵗ, c2 = sqrt(1 − β2ᵗ); weight decay p ← p · (1 − lr·wd) before (torch.optim.AdamW) or
//                 after the step (bitsandbytes' CUDA kernels), by DECAY_AFTER
//   step8         the same with m and v kept as 8-bit codes in blocks of 256 (bitsandbytes kOptimizerStatic8bit2StateBlockwise):
//                 nearest code of the dynamic maps, ties to the even code, sign of m kept, non-finite gradients skipped
//   *_each        the same on param_each, grad_each, state1_each, state2_each, which begin anywhere; others at multiples of 8
//
//   param, grad        f32   one buffer for all tensors of a group
//   blocks             u32 [·, 4]: offset of the tensor in param, first element of the block in the tensor, elements of the
//                      block, columns | stride << 16 (rows of the tensor lie `stride` apart in param; 0 = contiguous)
//   state1, state2     f32 as param (step32)
//   codes1, codes2     u8, 256 per block, bound as words; absmax f32 [blocks, 2] are their scales (step8)
//   maps               f32 [256, 2]    signed and unsigned dynamic map, ascending; bound as two codes at once
//   step               the fields of Step; rest1 = 1 − β1 and rest2 = 1 − β2 as the followed library rounds them
//   grid               sum_squares: one workgroup per 4,096 elements; clip: [1]; steps: at most one per block, folded
//   shared             lanes_*

override LANES: u32;
override DECAY_AFTER: u32 = 0u;
const WIDE = 1u; // vec4f that are loaded and stored at once

struct Step {
  lr: f32,
  beta1: f32,
  beta2: f32,
  eps: f32,
  weight_decay: f32,
  c1: f32,
  c2: f32,
  max_norm: f32,
  slot: f32,
  rest1: f32,
  rest2: f32,
}

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> grad: array<array<vec4f, WIDE>>;
@group(0) @binding(2) var<storage, read_write> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> norm: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> norms: array<f32>;
@group(0) @binding(5) var<storage, read> blocks: array<vec4u>;
@group(0) @binding(6) var<storage, read_write> param: array<array<vec4f, WIDE>>;
@group(0) @binding(7) var<storage, read_write> state1: array<array<vec4f, WIDE>>;
@group(0) @binding(8) var<storage, read_write> state2: array<array<vec4f, WIDE>>;
@group(0) @binding(9) var<storage, read_write> codes1: array<array<u32, WIDE>>;
@group(0) @binding(10) var<storage, read_write> codes2: array<array<u32, WIDE>>;
@group(0) @binding(11) var<storage, read_write> absmax: array<vec2f>;
// image
@group(0) @binding(12) var<storage, read> maps: array<vec4f>;
@group(0) @binding(13) var<storage, read> grad_each: array<f32>;
@group(0) @binding(14) var<storage, read_write> param_each: array<f32>;
@group(0) @binding(15) var<storage, read_write> state1_each: array<f32>;
@group(0) @binding(16) var<storage, read_write> state2_each: array<f32>;

struct Dims {
  part: u32, // sum_squares: where its sums begin in partial
  count: u32, // elements of grad; clip: of partial
}
@group(0) @binding(17) var<uniform> dims: Dims;

const INDICES = vec4u(0u, 1u, 2u, 3u);

@compute @workgroup_size(LANES)
fn sum_squares(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let part = group.x + group.y * 32768u;
  let count = dims.count;
  var sum = vec4f(0.0);
  for (var i = lane; i < 1024u / WIDE; i += LANES) {
    let at = part * (1024u / WIDE) + i;
    if (at * 4u * WIDE < count) {
      var g = grad[at];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let counted = vec4u((at * WIDE + h) * 4u) + INDICES < vec4u(count);
        sum += select(vec4f(0.0), g[h] * g[h], counted);
      }
    }
  }
  let all = lanes_sum((sum.x + sum.y) + (sum.z + sum.w), lane);
  // A folded grid has workgroups past the end.
  if (lane == 0u && part * 4096u < count) {
    partial[dims.part + part] = all;
  }
}

@compute @workgroup_size(LANES)
fn clip(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var i = lane; i < dims.count; i += LANES) {
    sum += partial[i];
  }
  let total = sqrt(lanes_sum(sum, lane));
  if (lane == 0u) {
    // Not min: a norm that is NaN stays one, as in torch.nn.utils.clip_grad_norm_.
    let coefficient = step.max_norm / (total + 1e-6);
    norm[0] = vec4f(total, select(coefficient, 1.0, coefficient > 1.0 || step.max_norm == 0.0), 0.0, 0.0);
    norms[u32(step.slot)] = total;
  }
}

/// Where element `i` of the block lies in param and grad.
fn place(block: vec4u, i: u32) -> u32 {
  let stride = block.w >> 16u;
  if (stride == 0u) {
    return block.x + block.y + i;
  }
  let columns = block.w & 0xffffu;
  return block.x + (block.y + i) / columns * stride + (block.y + i) % columns;
}

/// Which of the elements `first` .. `first` + 3 of a block are in it.
fn inside(block: vec4u, first: u32) -> vec4<bool> {
  return vec4u(first) + INDICES < vec4u(block.z);
}

/// The parameters after the step, `update` = m̂ / (sqrt(v̂) + eps) times lr.
fn stepped(p: vec4f, update: vec4f) -> vec4f {
  let decay = 1.0 - step.lr * step.weight_decay;
  if (DECAY_AFTER == 1u) {
    return (p - update) * decay;
  }
  return p * decay - update;
}

/// Moments and parameters of four elements.
struct Four {
  m: vec4f,
  v: vec4f,
  p: vec4f,
}

/// Four elements after a step with 32-bit moments.
fn next32(old: Four, g: vec4f) -> Four {
  let m = step.beta1 * old.m + step.rest1 * g;
  let v = step.beta2 * old.v + step.rest2 * g * g;
  return Four(m, v, stepped(old.p, step.lr / step.c1 * m / (sqrt(v) / step.c2 + step.eps)));
}

@compute @workgroup_size(LANES)
fn step32(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let coefficient = norm[0].y;
  for (var index = group.x + group.y * 32768u; index < arrayLength(&blocks); index += groups.x * groups.y) {
    let block = blocks[index];
    for (var i = lane; i * 4u * WIDE < block.z; i += LANES) {
      let at = place(block, i * 4u * WIDE) / (4u * WIDE);
      var g = grad[at];
      var m = state1[at];
      var v = state2[at];
      var p = param[at];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let next = next32(Four(m[h], v[h], p[h]), g[h] * coefficient);
        let some = inside(block, (i * WIDE + h) * 4u);
        m[h] = select(m[h], next.m, some);
        v[h] = select(v[h], next.v, some);
        p[h] = select(p[h], next.p, some);
      }
      state1[at] = m;
      state2[at] = v;
      param[at] = p;
    }
  }
}

@compute @workgroup_size(LANES)
fn step32_each(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let coefficient = norm[0].y;
  for (var index = group.x + group.y * 32768u; index < arrayLength(&blocks); index += groups.x * groups.y) {
    let block = blocks[index];
    for (var i = lane; i < block.z; i += LANES) {
      let at = place(block, i);
      let old = Four(vec4f(state1_each[at]), vec4f(state2_each[at]), vec4f(param_each[at]));
      let next = next32(old, vec4f(grad_each[at] * coefficient));
      state1_each[at] = next.m.x;
      state2_each[at] = next.v.x;
      param_each[at] = next.p.x;
    }
  }
}

/// Entries of the signed (0) or unsigned (1) map.
fn entries(codes: vec4u, which: u32) -> vec4f {
  var found: vec4f;
  // unroll
  for (var b = 0u; b < 4u; b++) {
    let two = maps[codes[b] >> 1u];
    found[b] = select(two[which], two[2u + which], (codes[b] & 1u) == 1u);
  }
  return found;
}

fn unpack(word: u32) -> vec4u {
  return (vec4u(word) >> vec4u(0u, 8u, 16u, 24u)) & vec4u(255u);
}

fn pack(codes: vec4u) -> u32 {
  return codes.x | (codes.y << 8u) | (codes.z << 16u) | (codes.w << 24u);
}

/// Sizes in steps of the signed map: its entry n > 0 is the middle of [n, n + 1). Decade d, from 10^(d-7) on, has 2^d
/// equal steps, which is a line for each decade, and the lowest line counts.
fn position(sizes: vec4f) -> vec4f {
  var lowest = vec4f(128.0);
  var slope = 1e6 / 0.9;
  var start = 8.0 / 9.0;
  // unroll
  for (var decade = 0u; decade < 7u; decade++) {
    lowest = min(lowest, sizes * slope + start);
    slope *= 0.2;
    start *= 2.0;
  }
  return lowest;
}

/// Of the codes `low` and `low` + 1 the one whose entry is nearer; an exact midpoint goes to the even code; NaN to 0.
fn nearer(values: vec4f, low: vec4u, which: u32) -> vec4u {
  let middle = (entries(low, which) + entries(low + 1u, which)) * 0.5;
  let up = (values > middle) | ((values == middle) & ((low & vec4u(1u)) == vec4u(1u)));
  return select(low + select(vec4u(0u), vec4u(1u), up), vec4u(0u), values != values);
}

/// Nearest codes of the signed map: -1 < entries of 0 … 126 < 0 = entry of 127 < entries of 128 … 255 = 1. Midpoints of
/// neighbours lie at whole positions, or a quarter beside where decades meet, so that rounding changes no candidate.
fn nearest_signed(values: vec4f) -> vec4u {
  let below = vec4u(clamp(position(abs(values)) - 0.5, vec4f(0.0), vec4f(127.0)));
  return nearer(values, select(127u + below, 126u - min(below, vec4u(126u)), values < vec4f(0.0)), 0u);
}

/// Nearest codes of the unsigned map, whose decades have twice as many steps: 0 = entry of 0 < … < entry of 255 = 1.
fn nearest_unsigned(values: vec4f) -> vec4u {
  return nearer(values, vec4u(clamp(2.0 * position(values) - 1.5, vec4f(0.0), vec4f(254.0))), 1u);
}

/// Which of four clipped gradients are neither NaN nor infinite.
fn finite(g: vec4f) -> vec4<bool> {
  return abs(g) <= vec4f(3.4028234e38);
}

// Moments of a lane's elements, first and second, and their clipped gradients, four by four.
var<private> moments: array<mat2x4f, 16>;
var<private> gradients: array<vec4f, 16>;

/// The step of moments `slot` from words of four codes; the larger of `top` and their sizes.
fn learn(slot: u32, words: vec2u, old: vec2f, g: vec4f, some: vec4<bool>, top: mat2x4f) -> mat2x4f {
  let m = step.beta1 * (entries(unpack(words.x), 0u) * old.x) + step.rest1 * g;
  let v = step.beta2 * (entries(unpack(words.y), 1u) * old.y) + step.rest2 * g * g;
  let taken = finite(g) & some;
  let next = mat2x4f(select(vec4f(0.0), m, taken), select(vec4f(0.0), v, taken));
  moments[slot] = next;
  gradients[slot] = g;
  return mat2x4f(max(top[0], abs(next[0])), max(top[1], abs(next[1])));
}

/// The parameters after the step of moments `slot`, which are not rounded to codes yet.
fn next8(slot: u32, p: vec4f) -> vec4f {
  let update = step.lr * step.c2 / step.c1 * (moments[slot][0] / (sqrt(moments[slot][1]) + step.c2 * step.eps));
  return select(p, stepped(p, update), finite(gradients[slot]));
}

/// Moments `slot` as words of four codes each; `top` are the largest of the block.
fn words_of(slot: u32, top: vec2f, some: vec4<bool>) -> vec2u {
  let m = moments[slot][0];
  var first = vec4u(0u);
  var second = vec4u(0u);
  if (top.x > 0.0) {
    first = nearest_signed(m / top.x);
  }
  if (top.y > 0.0) {
    second = nearest_unsigned(moments[slot][1] / top.y);
  }
  // The code of a small moment keeps its sign.
  let wrong = (first < vec4u(127u)) != (bitcast<vec4u>(m) >= vec4u(0x80000000u));
  first = select(first, select(first - 1u, first + 1u, m > vec4f(0.0)) & vec4u(255u), wrong);
  return vec2u(pack(select(vec4u(0u), first, some)), pack(select(vec4u(0u), second, some)));
}

/// The largest moments of a block.
fn largest(top: mat2x4f, lane: u32) -> vec2f {
  let four = transpose(top);
  let two = max(max(four[0], four[1]), max(four[2], four[3]));
  return vec2f(lanes_max(two.x, lane), lanes_max(two.y, lane));
}

@compute @workgroup_size(LANES)
fn step8(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let coefficient = norm[0].y;
  for (var index = group.x + group.y * 32768u; index < arrayLength(&blocks); index += groups.x * groups.y) {
    let block = blocks[index];
    let old = absmax[index];
    var top = mat2x4f();
    // unroll up to 8: a lane owns every LANES-th load of codes
    for (var w = 0u; w < 64u / (LANES * WIDE); w++) {
      let i = w * LANES + lane;
      var words1 = codes1[index * (64u / WIDE) + i];
      var words2 = codes2[index * (64u / WIDE) + i];
      if (i * 4u * WIDE < block.z) {
        var g = grad[place(block, i * 4u * WIDE) / (4u * WIDE)];
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          let some = inside(block, (i * WIDE + h) * 4u);
          top = learn(w * WIDE + h, vec2u(words1[h], words2[h]), old, g[h] * coefficient, some, top);
        }
      }
    }
    let now = largest(top, lane);
    // unroll up to 8
    for (var w = 0u; w < 64u / (LANES * WIDE); w++) {
      let i = w * LANES + lane;
      var words1 = array<u32, WIDE>();
      var words2 = array<u32, WIDE>();
      if (i * 4u * WIDE < block.z) {
        let at = place(block, i * 4u * WIDE) / (4u * WIDE);
        var p = param[at];
        // unroll
        for (var h = 0u; h < WIDE; h++) {
          let some = inside(block, (i * WIDE + h) * 4u);
          let words = words_of(w * WIDE + h, now, some);
          words1[h] = words.x;
          words2[h] = words.y;
          p[h] = select(p[h], next8(w * WIDE + h, p[h]), some);
        }
        param[at] = p;
      }
      codes1[index * (64u / WIDE) + i] = words1;
      codes2[index * (64u / WIDE) + i] = words2;
    }
    if (lane == 0u) {
      absmax[index] = now;
    }
  }
}

@compute @workgroup_size(LANES)
fn step8_each(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let coefficient = norm[0].y;
  for (var index = group.x + group.y * 32768u; index < arrayLength(&blocks); index += groups.x * groups.y) {
    let block = blocks[index];
    let old = absmax[index];
    var top = mat2x4f();
    for (var w = 0u; w < 64u / (LANES * WIDE); w++) {
      let i = w * LANES + lane;
      var words1 = codes1[index * (64u / WIDE) + i];
      var words2 = codes2[index * (64u / WIDE) + i];
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let some = inside(block, (i * WIDE + h) * 4u);
        var g: vec4f;
        for (var b = 0u; b < 4u; b++) {
          g[b] = grad_each[place(block, (i * WIDE + h) * 4u + b)];
        }
        top = learn(w * WIDE + h, vec2u(words1[h], words2[h]), old, g * coefficient, some, top);
      }
    }
    let now = largest(top, lane);
    for (var w = 0u; w < 64u / (LANES * WIDE); w++) {
      let i = w * LANES + lane;
      var words1 = array<u32, WIDE>();
      var words2 = array<u32, WIDE>();
      // unroll
      for (var h = 0u; h < WIDE; h++) {
        let some = inside(block, (i * WIDE + h) * 4u);
        let words = words_of(w * WIDE + h, now, some);
        words1[h] = words.x;
        words2[h] = words.y;
        for (var b = 0u; b < 4u; b++) {
          let at = place(block, (i * WIDE + h) * 4u + b);
          if (some[b]) {
            param_each[at] = next8(w * WIDE + h, vec4f(param_each[at]))[b];
          }
        }
      }
      codes1[index * (64u / WIDE) + i] = words1;
      codes2[index * (64u / WIDE) + i] = words2;
    }
    if (lane == 0u) {
      absmax[index] = now;
    }
  }
}
