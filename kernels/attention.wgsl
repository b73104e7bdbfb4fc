// attention — causal grouped-query attention inside documents, without a score matrix (arXiv:2205.14135, 2305.13245).
//
//   forward       out[i] = Σ_j p[i,j] · v[j],  p = softmax_j(q[i]·k[j] / sqrt(D)) over spans[i].x ≤ j ≤ i
//                 lse[i] = log Σ_j exp(q[i]·k[j] / sqrt(D))
//   make_delta    delta[i] = Σ_d dout[i,d] · out[i,d]
//   backward_q    dq[i] = Σ_j ds[i,j] · k[j] / sqrt(D),  ds = p · (dout[i]·v[j] − delta[i])
//   backward_kv   dk[j] = Σ_i ds[i,j] · q[i] / sqrt(D),  dv[j] = Σ_i p[i,j] · dout[i], over the query heads of a key head
//
//   qkv, dqkv     f32 [rows, (HEADS + 2 · KV_HEADS) · D]
//   out, dout     f32 [rows, HEADS · D]
//   lse, delta    f32 [rows, HEADS]
//   spans         u32 [rows, 2]: first token of the row's document, and the one after its last
//   grid          forward, backward_q: [row tiles, HEADS]; backward_kv: [row tiles, KV_HEADS]; a tile is LANES rows
//                 make_delta: [rows · HEADS / LANES], folded
//   shared        lanes_*
//
// A lane owns one row. Tiles of LANES other rows are loaded by the lanes together and read by all of them, one after the
// other; tiles outside the document are never visited. Sums run in a fixed order: the same bits every time.
// A lane takes some rows of a tile at a time: their scores stay in registers, and a sum over them is read and written once.

override LANES: u32;
override HEADS: u32;
override KV_HEADS: u32;
override D4: u32; // D / 4
override KEYS: u32 = 8u; // of a tile, that forward takes at a time: a divisor of LANES, at most 8
override SOME: u32 = 4u; // rows of a tile that backward takes at a time: a divisor of LANES, at most 4

@group(0) @binding(0) var<uniform> rows: vec4u;
// image
@group(0) @binding(1) var<storage, read> qkv: array<vec4f>;
@group(0) @binding(2) var<storage, read> spans: array<vec2u>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
// image
@group(0) @binding(5) var<storage, read> dout: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dqkv: array<vec4f>;

const LOWEST = -1e30;

/// Sum of the four parts, in a fixed order.
fn total(v: vec4f) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let head = group.y;
  let key0 = (HEADS + head / (HEADS / KV_HEADS)) * D4;
  let row0 = group.x * LANES;
  let row = row0 + lane;
  let safe = min(row, count - 1u);
  let start = spans[safe].x;
  let scale = inverseSqrt(f32(D4 * 4u));
  var q: array<vec4f, 32>;
  var o: array<vec4f, 32>;
  // unroll
  for (var d = 0u; d < D4; d++) {
    q[d] = qkv[safe * stride + head * D4 + d] * scale;
  }
  var top = LOWEST;
  var sum = 0.0;
  let stop = min(row0 + LANES, count);
  for (var j0 = spans[row0].x / LANES * LANES; j0 < stop; j0 += LANES) {
    let key = min(j0 + lane, count - 1u) * stride + key0;
    lanes_begin();
    // unroll
    for (var d = 0u; d < D4; d++) {
      lanes_keep(d, qkv[key + d], lane);
      lanes_keep(D4 + d, qkv[key + KV_HEADS * D4 + d], lane);
    }
    lanes_end();
    // unroll up to 2: a few keys at a time, so that their scores stay in registers
    for (var some = 0u; some < LANES / KEYS; some++) {
      var s: array<f32, 8>;
      var best = top;
      // unroll
      for (var j = 0u; j < KEYS; j++) {
        var products = vec4f(0.0);
        // unroll
        for (var d = 0u; d < D4; d++) {
          products = fma(q[d], lanes_fetch(d, some * KEYS + j), products);
        }
        let at = j0 + some * KEYS + j;
        s[j] = select(LOWEST, total(products), start <= at && at <= row);
        best = max(best, s[j]);
      }
      let keep = exp(top - best);
      sum *= keep;
      // unroll
      for (var j = 0u; j < KEYS; j++) {
        s[j] = select(0.0, exp(s[j] - best), s[j] > LOWEST);
        sum += s[j];
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        var values = o[d] * keep;
        // unroll
        for (var j = 0u; j < KEYS; j++) {
          values = fma(vec4f(s[j]), lanes_fetch(D4 + d, some * KEYS + j), values);
        }
        o[d] = values;
      }
      top = best;
    }
  }
  if (row < count) {
    // unroll
    for (var d = 0u; d < D4; d++) {
      out[(row * HEADS + head) * D4 + d] = o[d] / sum;
    }
    lse[row * HEADS + head] = top + log(sum);
  }
}

@compute @workgroup_size(LANES)
fn make_delta(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * 32768u) * LANES + lane;
  if (at >= rows.x * HEADS) {
    return;
  }
  var products = vec4f(0.0);
  for (var d = 0u; d < D4; d++) {
    products = fma(dout[at * D4 + d], out[at * D4 + d], products);
  }
  delta[at] = total(products);
}

@compute @workgroup_size(LANES)
fn backward_q(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let head = group.y;
  let key0 = (HEADS + head / (HEADS / KV_HEADS)) * D4;
  let row0 = group.x * LANES;
  let row = row0 + lane;
  let safe = min(row, count - 1u);
  let start = spans[safe].x;
  let scale = inverseSqrt(f32(D4 * 4u));
  let my_lse = lse[safe * HEADS + head];
  let my_delta = delta[safe * HEADS + head];
  var q: array<vec4f, 32>;
  var g: array<vec4f, 32>;
  var dq: array<vec4f, 32>;
  // unroll
  for (var d = 0u; d < D4; d++) {
    q[d] = qkv[safe * stride + head * D4 + d] * scale;
    g[d] = dout[(safe * HEADS + head) * D4 + d];
  }
  let stop = min(row0 + LANES, count);
  for (var j0 = spans[row0].x / LANES * LANES; j0 < stop; j0 += LANES) {
    let key = min(j0 + lane, count - 1u) * stride + key0;
    lanes_begin();
    // unroll
    for (var d = 0u; d < D4; d++) {
      lanes_keep(d, qkv[key + d], lane);
      lanes_keep(D4 + d, qkv[key + KV_HEADS * D4 + d], lane);
    }
    lanes_end();
    // unroll up to 2
    for (var some = 0u; some < LANES / SOME; some++) {
      var scores: array<vec4f, 4>;
      var dp: array<vec4f, 4>;
      // unroll: said outright, because naga clears a variable once and not in every round of a loop
      for (var j = 0u; j < SOME; j++) {
        scores[j] = vec4f();
        dp[j] = vec4f();
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        // unroll
        for (var j = 0u; j < SOME; j++) {
          scores[j] = fma(q[d], lanes_fetch(d, some * SOME + j), scores[j]);
        }
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        // unroll
        for (var j = 0u; j < SOME; j++) {
          dp[j] = fma(g[d], lanes_fetch(D4 + d, some * SOME + j), dp[j]);
        }
      }
      var ds: array<f32, 4>;
      // unroll
      for (var j = 0u; j < SOME; j++) {
        let at = j0 + some * SOME + j;
        ds[j] = select(0.0, exp(total(scores[j]) - my_lse), start <= at && at <= row) * (total(dp[j]) - my_delta);
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        var sum = dq[d];
        // unroll
        for (var j = 0u; j < SOME; j++) {
          sum = fma(vec4f(ds[j]), lanes_fetch(d, some * SOME + j), sum);
        }
        dq[d] = sum;
      }
    }
  }
  if (row < count) {
    // unroll
    for (var d = 0u; d < D4; d++) {
      dqkv[row * stride + head * D4 + d] = dq[d] * scale;
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_kv(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let kv = group.y;
  let row0 = group.x * LANES;
  let row = row0 + lane;
  let safe = min(row, count - 1u);
  let scale = inverseSqrt(f32(D4 * 4u));
  var k: array<vec4f, 32>;
  var v: array<vec4f, 32>;
  var dk: array<vec4f, 32>;
  var dv: array<vec4f, 32>;
  // unroll
  for (var d = 0u; d < D4; d++) {
    k[d] = qkv[safe * stride + (HEADS + kv) * D4 + d];
    v[d] = qkv[safe * stride + (HEADS + KV_HEADS + kv) * D4 + d];
  }
  let mine = spans[safe].y;
  let stop = spans[min(row0 + LANES, count) - 1u].y;
  for (var h = 0u; h < HEADS / KV_HEADS; h++) {
    let head = kv * (HEADS / KV_HEADS) + h;
    for (var i0 = row0; i0 < stop; i0 += LANES) {
      let query = min(i0 + lane, count - 1u);
      lanes_begin();
      // unroll
      for (var d = 0u; d < D4; d++) {
        lanes_keep(d, qkv[query * stride + head * D4 + d] * scale, lane);
        lanes_keep(D4 + d, dout[(query * HEADS + head) * D4 + d], lane);
      }
      lanes_keep(2u * D4, vec4f(lse[query * HEADS + head], delta[query * HEADS + head], 0.0, 0.0), lane);
      lanes_end();
      // unroll up to 2
      for (var some = 0u; some < LANES / SOME; some++) {
        var scores: array<vec4f, 4>;
        var dp: array<vec4f, 4>;
        // unroll: said outright, because naga clears a variable once and not in every round of a loop
        for (var i = 0u; i < SOME; i++) {
          scores[i] = vec4f();
          dp[i] = vec4f();
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          // unroll
          for (var i = 0u; i < SOME; i++) {
            scores[i] = fma(k[d], lanes_fetch(d, some * SOME + i), scores[i]);
          }
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          // unroll
          for (var i = 0u; i < SOME; i++) {
            dp[i] = fma(v[d], lanes_fetch(D4 + d, some * SOME + i), dp[i]);
          }
        }
        var p: array<f32, 4>;
        var ds: array<f32, 4>;
        // unroll
        for (var i = 0u; i < SOME; i++) {
          let at = i0 + some * SOME + i;
          let known = lanes_fetch(2u * D4, some * SOME + i);
          p[i] = select(0.0, exp(total(scores[i]) - known.x), row <= at && at < mine);
          ds[i] = p[i] * (total(dp[i]) - known.y);
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          var sum_k = dk[d];
          var sum_v = dv[d];
          // unroll
          for (var i = 0u; i < SOME; i++) {
            sum_k = fma(vec4f(ds[i]), lanes_fetch(d, some * SOME + i), sum_k);
            sum_v = fma(vec4f(p[i]), lanes_fetch(D4 + d, some * SOME + i), sum_v);
          }
          dk[d] = sum_k;
          dv[d] = sum_v;
        }
      }
    }
  }
  if (row < count) {
    // unroll
    for (var d = 0u; d < D4; d++) {
      dqkv[row * stride + (HEADS + kv) * D4 + d] = dk[d];
      dqkv[row * stride + (HEADS + KV_HEADS + kv) * D4 + d] = dv[d];
    }
  }
}
