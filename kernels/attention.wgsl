// attention — causal grouped-query attention inside documents, without a score matrix (arXiv:2205.14135, 2305.13245).
//
//   forward       out[i] = Σ_j p[i,j] · v[j],  p = softmax_j(q[i]·k[j] / sqrt(D)) over spans[i].x ≤ j ≤ i
//                 lse[i] = log Σ_j exp(q[i]·k[j] / sqrt(D))
//   backward_q    dq[i] = Σ_j ds[i,j] · k[j] / sqrt(D),  ds = p · (dout[i]·v[j] − delta[i])
//                 delta[i] = Σ_d dout[i,d] · out[i,d]
//   backward_kv   dk[j] = Σ_i ds[i,j] · q[i] / sqrt(D),  dv[j] = Σ_i p[i,j] · dout[i], over the query heads of a key head
//
//   qkv, dqkv     f32 [rows, (HEADS + 2 · KV_HEADS) · D]
//   out, dout     f32 [rows, HEADS · D]
//   lse, delta    f32 [rows, HEADS]
//   spans         u32 [rows, 2]: first token of the row's document, and the one after its last
//   given_*       what an earlier dispatch wrote, four elements at a time
//   grid          [blocks of ROWS · LANES rows, HEADS], for backward_kv [blocks, KV_HEADS]
//   shared        lanes_*
//
// A lane owns ROWS rows. Tiles of LANES / SHARE other rows are loaded by the lanes together and read by all of them, one
// after the other; tiles outside the document are never visited. Sums run in a fixed order: the same bits every time.
// Of a tile, SOME rows are taken at a time: their scores stay in registers, and a sum over them is read and written once.

override LANES: u32;
override HEADS: u32;
override KV_HEADS: u32;
override D4: u32; // D / 4
override ROWS: u32 = 1u; // 1 or 2; ROWS · D4 is at most 32
override SHARE: u32 = 1u; // lanes that keep a row of a tile together: a divisor of LANES and D4
override SOME: u32 = 1u; // a divisor of LANES / SHARE, at most 8

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
// image
@group(0) @binding(8) var<storage, read> given_out: array<vec4f>;
// image
@group(0) @binding(9) var<storage, read> given_lse: array<vec4f>;
// image
@group(0) @binding(10) var<storage, read> given_delta: array<vec4f>;

const LOWEST = -1e30;

/// Sum of the four parts, in a fixed order.
fn total(v: vec4f) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

/// Columns 4 · `d` to 4 · `d` + 3 of row `j` of the tile that is kept from `slot` on.
fn tile_fetch(slot: u32, d: u32, j: u32) -> vec4f {
  return lanes_fetch(slot + d / SHARE, j * SHARE + d % SHARE);
}

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let head = group.y;
  let key0 = (HEADS + head / (HEADS / KV_HEADS)) * D4;
  let row0 = group.x * (ROWS * LANES);
  let scale = inverseSqrt(f32(D4 * 4u));
  var start: array<u32, 2>;
  var top: array<f32, 2>;
  var sum: array<f32, 2>;
  var q: array<vec4f, 32>;
  var o: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * LANES + lane, count - 1u);
    start[r] = spans[safe].x;
    top[r] = LOWEST;
    // unroll
    for (var d = 0u; d < D4; d++) {
      q[r * D4 + d] = qkv[safe * stride + head * D4 + d] * scale;
    }
  }
  let tile = LANES / SHARE;
  let stop = min(row0 + ROWS * LANES, count);
  for (var j0 = spans[row0].x / tile * tile; j0 < stop; j0 += tile) {
    let key = min(j0 + lane / SHARE, count - 1u) * stride + key0 + lane % SHARE;
    lanes_begin();
    // unroll
    for (var d = 0u; d < D4 / SHARE; d++) {
      lanes_keep(d, qkv[key + d * SHARE], lane);
      lanes_keep(D4 / SHARE + d, qkv[key + KV_HEADS * D4 + d * SHARE], lane);
    }
    lanes_end();
    // unroll up to 2
    for (var some = 0u; some < LANES / SHARE / SOME; some++) {
      var s: array<f32, 16>;
      // unroll
      for (var j = 0u; j < SOME; j++) {
        let at = j0 + some * SOME + j;
        var products: array<vec4f, 2>;
        // unroll: said outright, because naga clears a variable once and not in every round of a loop
        for (var r = 0u; r < ROWS; r++) {
          products[r] = vec4f();
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          let k = tile_fetch(0u, d, some * SOME + j);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            products[r] = fma(q[r * D4 + d], k, products[r]);
          }
        }
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          let seen = start[r] <= at && at <= row0 + r * LANES + lane;
          s[r * SOME + j] = select(LOWEST, total(products[r]), seen);
        }
      }
      var keep: array<f32, 2>;
      // unroll
      for (var r = 0u; r < ROWS; r++) {
        var best = top[r];
        // unroll
        for (var j = 0u; j < SOME; j++) {
          best = max(best, s[r * SOME + j]);
        }
        keep[r] = exp(top[r] - best);
        sum[r] *= keep[r];
        // unroll
        for (var j = 0u; j < SOME; j++) {
          s[r * SOME + j] = select(0.0, exp(s[r * SOME + j] - best), s[r * SOME + j] > LOWEST);
          sum[r] += s[r * SOME + j];
        }
        top[r] = best;
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        var values: array<vec4f, 2>;
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          values[r] = o[r * D4 + d] * keep[r];
        }
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let v = tile_fetch(D4 / SHARE, d, some * SOME + j);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            values[r] = fma(vec4f(s[r * SOME + j]), v, values[r]);
          }
        }
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          o[r * D4 + d] = values[r];
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * LANES + lane;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4; d++) {
        out[(row * HEADS + head) * D4 + d] = o[r * D4 + d] / sum[r];
      }
      lse[row * HEADS + head] = top[r] + log(sum[r]);
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_q(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let head = group.y;
  let key0 = (HEADS + head / (HEADS / KV_HEADS)) * D4;
  let row0 = group.x * (ROWS * LANES);
  let scale = inverseSqrt(f32(D4 * 4u));
  var start: array<u32, 2>;
  var my_lse: array<f32, 2>;
  var my_delta: array<f32, 2>;
  var q: array<vec4f, 32>;
  var g: array<vec4f, 32>;
  var dq: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * LANES + lane, count - 1u);
    let at = safe * HEADS + head;
    start[r] = spans[safe].x;
    my_lse[r] = given_lse[at / 4u][at % 4u];
    var products = vec4f();
    // unroll
    for (var d = 0u; d < D4; d++) {
      q[r * D4 + d] = qkv[safe * stride + head * D4 + d] * scale;
      g[r * D4 + d] = dout[at * D4 + d];
      products = fma(g[r * D4 + d], given_out[at * D4 + d], products);
    }
    my_delta[r] = total(products);
  }
  let tile = LANES / SHARE;
  let stop = min(row0 + ROWS * LANES, count);
  for (var j0 = spans[row0].x / tile * tile; j0 < stop; j0 += tile) {
    let key = min(j0 + lane / SHARE, count - 1u) * stride + key0 + lane % SHARE;
    lanes_begin();
    // unroll
    for (var d = 0u; d < D4 / SHARE; d++) {
      lanes_keep(d, qkv[key + d * SHARE], lane);
      lanes_keep(D4 / SHARE + d, qkv[key + KV_HEADS * D4 + d * SHARE], lane);
    }
    lanes_end();
    // unroll up to 2
    for (var some = 0u; some < LANES / SHARE / SOME; some++) {
      var ds: array<f32, 16>;
      // unroll
      for (var j = 0u; j < SOME; j++) {
        let at = j0 + some * SOME + j;
        var scores: array<vec4f, 2>;
        var dp: array<vec4f, 2>;
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          scores[r] = vec4f();
          dp[r] = vec4f();
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          let k = tile_fetch(0u, d, some * SOME + j);
          let v = tile_fetch(D4 / SHARE, d, some * SOME + j);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            scores[r] = fma(q[r * D4 + d], k, scores[r]);
            dp[r] = fma(g[r * D4 + d], v, dp[r]);
          }
        }
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          let seen = start[r] <= at && at <= row0 + r * LANES + lane;
          let p = select(0.0, exp(total(scores[r]) - my_lse[r]), seen);
          ds[r * SOME + j] = p * (total(dp[r]) - my_delta[r]);
        }
      }
      // unroll
      for (var d = 0u; d < D4; d++) {
        var sums: array<vec4f, 2>;
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          sums[r] = dq[r * D4 + d];
        }
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let k = tile_fetch(0u, d, some * SOME + j);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            sums[r] = fma(vec4f(ds[r * SOME + j]), k, sums[r]);
          }
        }
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          dq[r * D4 + d] = sums[r];
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * LANES + lane;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4; d++) {
        dqkv[row * stride + head * D4 + d] = dq[r * D4 + d] * scale;
      }
      delta[row * HEADS + head] = my_delta[r];
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_kv(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let kv = group.y;
  let row0 = group.x * (ROWS * LANES);
  let scale = inverseSqrt(f32(D4 * 4u));
  var end: array<u32, 2>;
  var k: array<vec4f, 32>;
  var v: array<vec4f, 32>;
  var dk: array<vec4f, 32>;
  var dv: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * LANES + lane, count - 1u);
    end[r] = spans[safe].y;
    // unroll
    for (var d = 0u; d < D4; d++) {
      k[r * D4 + d] = qkv[safe * stride + (HEADS + kv) * D4 + d] * scale;
      v[r * D4 + d] = qkv[safe * stride + (HEADS + KV_HEADS + kv) * D4 + d];
    }
  }
  let tile = LANES / SHARE;
  let stop = spans[min(row0 + ROWS * LANES, count) - 1u].y;
  for (var h = 0u; h < HEADS / KV_HEADS; h++) {
    let head = kv * (HEADS / KV_HEADS) + h;
    for (var i0 = row0; i0 < stop; i0 += tile) {
      let query = min(i0 + lane / SHARE, count - 1u);
      let at = query * HEADS + head;
      lanes_begin();
      // unroll
      for (var d = 0u; d < D4 / SHARE; d++) {
        lanes_keep(d, qkv[query * stride + head * D4 + lane % SHARE + d * SHARE], lane);
        lanes_keep(D4 / SHARE + d, dout[at * D4 + lane % SHARE + d * SHARE], lane);
      }
      lanes_keep(2u * D4 / SHARE, vec4f(given_lse[at / 4u][at % 4u], given_delta[at / 4u][at % 4u], 0.0, 0.0), lane);
      lanes_end();
      // unroll up to 2
      for (var some = 0u; some < LANES / SHARE / SOME; some++) {
        var p: array<f32, 16>;
        var ds: array<f32, 16>;
        // unroll
        for (var i = 0u; i < SOME; i++) {
          let known = tile_fetch(2u * D4 / SHARE, 0u, some * SOME + i);
          var scores: array<vec4f, 2>;
          var dp: array<vec4f, 2>;
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            scores[r] = vec4f();
            dp[r] = vec4f();
          }
          // unroll
          for (var d = 0u; d < D4; d++) {
            let q = tile_fetch(0u, d, some * SOME + i);
            let g = tile_fetch(D4 / SHARE, d, some * SOME + i);
            // unroll
            for (var r = 0u; r < ROWS; r++) {
              scores[r] = fma(k[r * D4 + d], q, scores[r]);
              dp[r] = fma(v[r * D4 + d], g, dp[r]);
            }
          }
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            let seen = row0 + r * LANES + lane <= i0 + some * SOME + i && i0 + some * SOME + i < end[r];
            p[r * SOME + i] = select(0.0, exp(total(scores[r]) - known.x), seen);
            ds[r * SOME + i] = p[r * SOME + i] * (total(dp[r]) - known.y);
          }
        }
        // unroll
        for (var d = 0u; d < D4; d++) {
          var sums_k: array<vec4f, 2>;
          var sums_v: array<vec4f, 2>;
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            sums_k[r] = dk[r * D4 + d];
            sums_v[r] = dv[r * D4 + d];
          }
          // unroll
          for (var i = 0u; i < SOME; i++) {
            let q = tile_fetch(0u, d, some * SOME + i);
            let g = tile_fetch(D4 / SHARE, d, some * SOME + i);
            // unroll
            for (var r = 0u; r < ROWS; r++) {
              sums_k[r] = fma(vec4f(ds[r * SOME + i]), q, sums_k[r]);
              sums_v[r] = fma(vec4f(p[r * SOME + i]), g, sums_v[r]);
            }
          }
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            dk[r * D4 + d] = sums_k[r];
            dv[r * D4 + d] = sums_v[r];
          }
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * LANES + lane;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4; d++) {
        dqkv[row * stride + (HEADS + kv) * D4 + d] = dk[r * D4 + d] * scale;
        dqkv[row * stride + (HEADS + KV_HEADS + kv) * D4 + d] = dv[r * D4 + d];
      }
    }
  }
}
