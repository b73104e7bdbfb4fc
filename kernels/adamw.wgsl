// adamw — the optimizer: gradient norm, clipping, and AdamW with 32- or 8-bit state (arXiv:1711.05101, 2110.02861).
//
//   sum_squares   partial[PART + g] = Σ grad² over the elements of workgroup g
//   clip          norm.x = sqrt(Σ partial),  norm.y = min(1, max_norm / (norm.x + 1e-6)) (1 where max_norm is 0);
//                 norms[slot] = norm.x
//   step32        m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  p ← p − lr · (m / c1) / (sqrt(v) / c2 + eps)
//                 with c1 = 1 − β1ᵗ, c2 = sqrt(1 − β2ᵗ); weight decay p ← p · (1 − lr·wd) before (torch.optim.AdamW) or
//                 after the step (bitsandbytes' CUDA kernels), by DECAY_AFTER
//   step8         the same with m and v kept as 8-bit codes in blocks of 256 (bitsandbytes kOptimizerStatic8bit2StateBlockwise):
//                 nearest code of the dynamic maps, ties to the even code, sign of m kept, non-finite gradients skipped
//
//   param, grad        f32   one buffer for all tensors of a group
//   blocks             u32 [·, 4]: offset of the tensor in param, first element of the block in the tensor, elements of the
//                      block, columns | stride << 16 (rows of the tensor lie `stride` apart in param; 0 = contiguous)
//   state1, state2     step32: f32 as param. step8: u8 codes, 256 per block, bound as words
//   absmax1, absmax2   f32 [blocks]
//   map1, map2         f32 [256]    signed and unsigned dynamic map, ascending
//   step               f32 [12]     the fields of Step; rest1 = 1 − β1 and rest2 = 1 − β2 as the followed library rounds them
//   grid               sum_squares: one workgroup per 4,096 elements; clip: [1]; step32, step8: one per block, folded
//   shared             lanes_*

override LANES: u32;
override PART: u32 = 0u;
override PARTS: u32 = 0u;
override COUNT: u32 = 0u; // elements of grad
override DECAY_AFTER: u32 = 0u;

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
@group(0) @binding(1) var<storage, read> grad: array<f32>;
@group(0) @binding(2) var<storage, read_write> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> norm: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> norms: array<f32>;
@group(0) @binding(5) var<storage, read> blocks: array<vec4u>;
@group(0) @binding(6) var<storage, read_write> param: array<f32>;
@group(0) @binding(7) var<storage, read_write> state1: array<f32>;
@group(0) @binding(8) var<storage, read_write> state2: array<f32>;
@group(0) @binding(9) var<storage, read_write> codes1: array<u32>;
@group(0) @binding(10) var<storage, read_write> codes2: array<u32>;
@group(0) @binding(11) var<storage, read_write> absmax: array<vec2f>;
@group(0) @binding(12) var<storage, read> maps: array<vec2f>;

@compute @workgroup_size(LANES)
fn sum_squares(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let part = group.x + group.y * 32768u;
  var sum = 0.0;
  for (var i = lane; i < 4096u; i += LANES) {
    let at = part * 4096u + i;
    if (at < COUNT) {
      sum = fma(grad[at], grad[at], sum);
    }
  }
  let all = lanes_sum(sum, lane);
  // A folded grid has workgroups past the end.
  if (lane == 0u && part * 4096u < COUNT) {
    partial[PART + part] = all;
  }
}

@compute @workgroup_size(LANES)
fn clip(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var i = lane; i < PARTS; i += LANES) {
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

/// Where element `i` of the block's tensor lies in param and grad.
fn place(block: vec4u, i: u32) -> u32 {
  let stride = block.w >> 16u;
  if (stride == 0u) {
    return block.x + i;
  }
  let columns = block.w & 0xffffu;
  return block.x + i / columns * stride + i % columns;
}

/// The parameter after the step, `update` = m̂ / (sqrt(v̂) + eps) times lr.
fn stepped(p: f32, update: f32) -> f32 {
  let decay = 1.0 - step.lr * step.weight_decay;
  if (DECAY_AFTER == 1u) {
    return (p - update) * decay;
  }
  return p * decay - update;
}

@compute @workgroup_size(LANES)
fn step32(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let index = group.x + group.y * 32768u;
  if (index >= arrayLength(&blocks)) {
    return;
  }
  let block = blocks[index];
  let coefficient = norm[0].y;
  for (var i = lane; i < block.z; i += LANES) {
    let at = place(block, block.y + i);
    let g = grad[at] * coefficient;
    let m = step.beta1 * state1[at] + step.rest1 * g;
    let v = step.beta2 * state2[at] + step.rest2 * g * g;
    state1[at] = m;
    state2[at] = v;
    param[at] = stepped(param[at], step.lr / step.c1 * m / (sqrt(v) / step.c2 + step.eps));
  }
}

/// Entry `code` of the signed (x) and unsigned (y) map.
fn entry(code: u32, which: u32) -> f32 {
  return maps[code][which];
}

/// Nearest code of a map; an exact midpoint goes to the even code; NaN to 0.
fn nearest(value: f32, which: u32) -> u32 {
  if (value != value) {
    return 0u;
  }
  var low = 0u;
  // Largest code whose entry is <= value, or 0.
  for (var half = 128u; half > 0u; half >>= 1u) {
    if (entry(low + half, which) <= value) {
      low += half;
    }
  }
  let high = min(low + 1u, 255u);
  let middle = (entry(low, which) + entry(high, which)) * 0.5;
  if (value > middle || (value == middle && low % 2u == 1u)) {
    return high;
  }
  return low;
}

fn negative(value: f32) -> bool {
  return (bitcast<u32>(value) >> 31u) == 1u;
}

@compute @workgroup_size(LANES)
fn step8(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let index = group.x + group.y * 32768u;
  if (index >= arrayLength(&blocks)) {
    return;
  }
  let block = blocks[index];
  let coefficient = norm[0].y;
  let old = absmax[index];
  var m: array<f32, 32>;
  var v: array<f32, 32>;
  var top1 = 0.0;
  var top2 = 0.0;
  // A lane owns words lane, lane + LANES, … of four codes each; copies of this much code would take seconds to compile.
  // unroll up to 1
  for (var w = 0u; w < 64u / LANES; w++) {
    let word1 = codes1[index * 64u + w * LANES + lane];
    let word2 = codes2[index * 64u + w * LANES + lane];
    // unroll
    for (var b = 0u; b < 4u; b++) {
      let i = (w * LANES + lane) * 4u + b;
      if (i < block.z) {
        let g = grad[place(block, block.y + i)] * coefficient;
        // Neither NaN nor infinite.
        if (abs(g) <= 3.4028234e38) {
          m[w * 4u + b] = step.beta1 * (entry((word1 >> (b * 8u)) & 255u, 0u) * old.x) + step.rest1 * g;
          v[w * 4u + b] = step.beta2 * (entry((word2 >> (b * 8u)) & 255u, 1u) * old.y) + step.rest2 * g * g;
        }
        top1 = max(top1, abs(m[w * 4u + b]));
        top2 = max(top2, abs(v[w * 4u + b]));
      }
    }
  }
  let now = vec2f(lanes_max(top1, lane), lanes_max(top2, lane));
  // unroll up to 1
  for (var w = 0u; w < 64u / LANES; w++) {
    var word1 = 0u;
    var word2 = 0u;
    // unroll
    for (var b = 0u; b < 4u; b++) {
      let i = (w * LANES + lane) * 4u + b;
      if (i < block.z) {
        let at = place(block, block.y + i);
        let m_now = m[w * 4u + b];
        let v_now = v[w * 4u + b];
        if (abs(grad[at] * coefficient) <= 3.4028234e38) {
          param[at] = stepped(param[at], step.lr * step.c2 / step.c1 * (m_now / (sqrt(v_now) + step.c2 * step.eps)));
        }
        var code = 0u;
        var code_v = 0u;
        if (now.x > 0.0) {
          code = nearest(m_now / now.x, 0u);
        }
        if (now.y > 0.0) {
          code_v = nearest(v_now / now.y, 1u);
        }
        if (negative(entry(code, 0u)) != negative(m_now)) {
          code = select((code - 1u) & 255u, (code + 1u) & 255u, m_now > 0.0);
        }
        word1 |= code << (b * 8u);
        word2 |= code_v << (b * 8u);
      }
    }
    codes1[index * 64u + w * LANES + lane] = word1;
    codes2[index * 64u + w * LANES + lane] = word2;
  }
  if (lane == 0u) {
    absmax[index] = now;
  }
}
