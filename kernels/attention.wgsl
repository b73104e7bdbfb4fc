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
//   order         u32 [blocks of 128 rows, 2]: the blocks with the most keys to a query first, and those with the most
//                 queries to a key
//   given_out, given_lse, given_delta   what an earlier dispatch wrote, four elements at a time
//   grid          [blocks of ROWS · LANES / PARTS rows, HEADS], for backward_kv [blocks, KV_HEADS]; with LONGEST_FIRST
//                 [HEADS, blocks], where 128 rows are begun all or none
//   shared        lanes_*, attention_parts
//
// PARTS lanes, two apart, own ROWS rows, each of them every PARTS-th four columns: wide heads need more registers than
// a lane has. Tiles of LANES / SHARE other rows are loaded by the lanes together and read by all of them, one after the
// other; tiles outside the document are never visited. Sums run in a fixed order: the same bits every time. Of a tile, SOME
// rows are taken at a time: their scores stay in registers, and a sum over them is read and written once.

override LANES: u32;
override HEADS: u32;
override KV_HEADS: u32;
override D4: u32; // D / 4
override ROWS: u32 = 1u; // 1 or 2; ROWS · D4 / PARTS is at most 32
override PARTS: u32 = 1u; // a divisor of LANES / 2 and D4
override SHARE: u32 = 1u; // lanes that keep a row of a tile together: PARTS, or where that is 1 a divisor of LANES and D4
override LONGEST_FIRST: u32 = 0u; // 1: workgroups with the most to do begin first, else those of a head together
override SOME: u32 = 1u; // a divisor of LANES / SHARE, at most 8; where PARTS is over 1, ROWS · SOME is a multiple of 4

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
@group(0) @binding(11) var<storage, read> order: array<vec2u>;

const LOWEST = -1e30;

/// First row of a workgroup, and its head. While the last workgroups run, processors fall idle, so the last are the shortest.
/// Queries are `late`: the later in its document, the more keys a row sees; keys are seen by more queries the earlier they are.
fn place(group: vec3u, late: bool) -> vec2u {
  if (LONGEST_FIRST == 0u) {
    return vec2u(group.x * (ROWS * LANES / PARTS), group.y);
  }
  let per = 128u / (ROWS * LANES / PARTS);
  let block = order[group.y / per];
  let part = group.y % per;
  if (late) {
    return vec2u(block.x * 128u + (per - 1u - part) * (ROWS * LANES / PARTS), group.x);
  }
  return vec2u(block.y * 128u + part * (ROWS * LANES / PARTS), group.x);
}

/// Sum of the four parts, in a fixed order.
fn total(v: vec4f) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

/// A lane's share of the products of its rows a and b with SOME rows of the tile from `j0` on: s = a · the first of what is
/// kept for them, t = b · the second.
fn products(
  a: ptr<function, array<vec4f, 32>>,
  b: ptr<function, array<vec4f, 32>>,
  j0: u32,
  part: u32,
  s: ptr<function, array<f32, 16>>,
  t: ptr<function, array<f32, 16>>,
) {
  // unroll
  for (var j = 0u; j < SOME; j++) {
    // With a value, because naga clears a variable once and not in every round of a loop.
    var of_a = array<vec4f, 2>();
    var of_b = array<vec4f, 2>();
    // unroll
    for (var d = 0u; d < D4 / PARTS; d++) {
      let first = tile_fetch(0u, d, j0 + j, part);
      let second = tile_fetch(D4 / SHARE, d, j0 + j, part);
      // unroll
      for (var r = 0u; r < ROWS; r++) {
        of_a[r] = fma((*a)[r * (D4 / PARTS) + d], first, of_a[r]);
        of_b[r] = fma((*b)[r * (D4 / PARTS) + d], second, of_b[r]);
      }
    }
    // unroll
    for (var r = 0u; r < ROWS; r++) {
      (*s)[r * SOME + j] = total(of_a[r]);
      (*t)[r * SOME + j] = total(of_b[r]);
    }
  }
}

/// Keeps keys and values `j0` .. of head `kv`, a tile of them.
fn keep_keys(j0: u32, kv: u32, lane: u32) {
  let row = min(j0 + lane / SHARE, rows.x - 1u) * ((HEADS + 2u * KV_HEADS) * D4);
  let key = row + (HEADS + kv) * D4 + lane % SHARE;
  lanes_begin();
  // unroll
  for (var d = 0u; d < D4 / SHARE; d++) {
    lanes_keep(d, qkv[key + d * SHARE], lane);
    lanes_keep(D4 / SHARE + d, qkv[key + KV_HEADS * D4 + d * SHARE], lane);
  }
  lanes_end();
}

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let begin = place(group, true);
  let row0 = begin.x;
  let head = begin.y;
  if (LONGEST_FIRST == 1u && row0 >= count) {
    return;
  }
  let mine = row_of(lane);
  let part = part_of(lane);
  let scale = inverseSqrt(f32(D4 * 4u));
  var start: array<u32, 2>;
  var top: array<f32, 2>;
  var sum: array<f32, 2>;
  var q: array<vec4f, 32>;
  var o: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * (LANES / PARTS) + mine, count - 1u);
    start[r] = spans[safe].x;
    top[r] = LOWEST;
    // unroll
    for (var d = 0u; d < D4 / PARTS; d++) {
      q[r * (D4 / PARTS) + d] = qkv[safe * stride + head * D4 + d * PARTS + part] * scale;
    }
  }
  let tile = LANES / SHARE;
  let stop = min(row0 + ROWS * LANES / PARTS, count);
  for (var j0 = spans[row0].x / tile * tile; j0 < stop; j0 += tile) {
    keep_keys(j0, head / (HEADS / KV_HEADS), lane);
    // unroll up to 2
    for (var some = 0u; some < LANES / SHARE / SOME; some++) {
      var s: array<f32, 16>;
      // unroll
      for (var j = 0u; j < SOME; j++) {
        var scores = array<vec4f, 2>();
        // unroll
        for (var d = 0u; d < D4 / PARTS; d++) {
          let k = tile_fetch(0u, d, some * SOME + j, part);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            scores[r] = fma(q[r * (D4 / PARTS) + d], k, scores[r]);
          }
        }
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          s[r * SOME + j] = total(scores[r]);
        }
      }
      join(&s, 2u * D4 / SHARE, lane);
      var keep: array<f32, 2>;
      // unroll
      for (var r = 0u; r < ROWS; r++) {
        var best = top[r];
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let at = j0 + some * SOME + j;
          let seen = start[r] <= at && at <= row0 + r * (LANES / PARTS) + mine;
          s[r * SOME + j] = select(LOWEST, s[r * SOME + j], seen);
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
      for (var d = 0u; d < D4 / PARTS; d++) {
        // unroll
        for (var r = 0u; r < ROWS; r++) {
          o[r * (D4 / PARTS) + d] *= keep[r];
        }
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let v = tile_fetch(D4 / SHARE, d, some * SOME + j, part);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            o[r * (D4 / PARTS) + d] = fma(vec4f(s[r * SOME + j]), v, o[r * (D4 / PARTS) + d]);
          }
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * (LANES / PARTS) + mine;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4 / PARTS; d++) {
        out[(row * HEADS + head) * D4 + d * PARTS + part] = o[r * (D4 / PARTS) + d] / sum[r];
      }
      if (part == 0u) {
        lse[row * HEADS + head] = top[r] + log(sum[r]);
      }
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_q(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let begin = place(group, true);
  let row0 = begin.x;
  let head = begin.y;
  if (LONGEST_FIRST == 1u && row0 >= count) {
    return;
  }
  let mine = row_of(lane);
  let part = part_of(lane);
  let scale = inverseSqrt(f32(D4 * 4u));
  var start: array<u32, 2>;
  var my_lse: array<f32, 2>;
  var my_delta: array<f32, 16>;
  var q: array<vec4f, 32>;
  var g: array<vec4f, 32>;
  var dq: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * (LANES / PARTS) + mine, count - 1u);
    let at = safe * HEADS + head;
    start[r] = spans[safe].x;
    my_lse[r] = given_lse[at / 4u][at % 4u];
    var products = vec4f();
    // unroll
    for (var d = 0u; d < D4 / PARTS; d++) {
      q[r * (D4 / PARTS) + d] = qkv[safe * stride + head * D4 + d * PARTS + part] * scale;
      g[r * (D4 / PARTS) + d] = dout[at * D4 + d * PARTS + part];
      products = fma(g[r * (D4 / PARTS) + d], given_out[at * D4 + d * PARTS + part], products);
    }
    my_delta[r] = total(products);
  }
  join(&my_delta, 2u * D4 / SHARE, lane);
  let tile = LANES / SHARE;
  let stop = min(row0 + ROWS * LANES / PARTS, count);
  for (var j0 = spans[row0].x / tile * tile; j0 < stop; j0 += tile) {
    keep_keys(j0, head / (HEADS / KV_HEADS), lane);
    // unroll up to 2
    for (var some = 0u; some < LANES / SHARE / SOME; some++) {
      var s: array<f32, 16>;
      var ds: array<f32, 16>;
      products(&q, &g, some * SOME, part, &s, &ds);
      join_both(&s, &ds, 2u * D4 / SHARE, lane);
      // unroll
      for (var r = 0u; r < ROWS; r++) {
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let at = j0 + some * SOME + j;
          let seen = start[r] <= at && at <= row0 + r * (LANES / PARTS) + mine;
          let p = select(0.0, exp(s[r * SOME + j] - my_lse[r]), seen);
          ds[r * SOME + j] = p * (ds[r * SOME + j] - my_delta[r]);
        }
      }
      // unroll
      for (var d = 0u; d < D4 / PARTS; d++) {
        // unroll
        for (var j = 0u; j < SOME; j++) {
          let k = tile_fetch(0u, d, some * SOME + j, part);
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            dq[r * (D4 / PARTS) + d] = fma(vec4f(ds[r * SOME + j]), k, dq[r * (D4 / PARTS) + d]);
          }
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * (LANES / PARTS) + mine;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4 / PARTS; d++) {
        dqkv[row * stride + head * D4 + d * PARTS + part] = dq[r * (D4 / PARTS) + d] * scale;
      }
      if (part == 0u) {
        delta[row * HEADS + head] = my_delta[r];
      }
    }
  }
}

@compute @workgroup_size(LANES)
fn backward_kv(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let count = rows.x;
  let stride = (HEADS + 2u * KV_HEADS) * D4;
  let begin = place(group, false);
  let row0 = begin.x;
  let kv = begin.y;
  if (LONGEST_FIRST == 1u && row0 >= count) {
    return;
  }
  let mine = row_of(lane);
  let part = part_of(lane);
  let scale = inverseSqrt(f32(D4 * 4u));
  var end: array<u32, 2>;
  var k: array<vec4f, 32>;
  var v: array<vec4f, 32>;
  var dk: array<vec4f, 32>;
  var dv: array<vec4f, 32>;
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let safe = min(row0 + r * (LANES / PARTS) + mine, count - 1u);
    end[r] = spans[safe].y;
    // unroll
    for (var d = 0u; d < D4 / PARTS; d++) {
      k[r * (D4 / PARTS) + d] = qkv[safe * stride + (HEADS + kv) * D4 + d * PARTS + part] * scale;
      v[r * (D4 / PARTS) + d] = qkv[safe * stride + (HEADS + KV_HEADS + kv) * D4 + d * PARTS + part];
    }
  }
  let tile = LANES / SHARE;
  let stop = spans[min(row0 + ROWS * LANES / PARTS, count) - 1u].y;
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
        products(&k, &v, some * SOME, part, &p, &ds);
        join_both(&p, &ds, 2u * D4 / SHARE + 1u, lane);
        // unroll
        for (var i = 0u; i < SOME; i++) {
          let known = tile_fetch(2u * D4 / SHARE, 0u, some * SOME + i, part);
          let at = i0 + some * SOME + i;
          // unroll
          for (var r = 0u; r < ROWS; r++) {
            let seen = row0 + r * (LANES / PARTS) + mine <= at && at < end[r];
            p[r * SOME + i] = select(0.0, exp(p[r * SOME + i] - known.x), seen);
            ds[r * SOME + i] = p[r * SOME + i] * (ds[r * SOME + i] - known.y);
          }
        }
        // unroll
        for (var d = 0u; d < D4 / PARTS; d++) {
          // unroll
          for (var i = 0u; i < SOME; i++) {
            let q = tile_fetch(0u, d, some * SOME + i, part);
            let g = tile_fetch(D4 / SHARE, d, some * SOME + i, part);
            // unroll
            for (var r = 0u; r < ROWS; r++) {
              dk[r * (D4 / PARTS) + d] = fma(vec4f(ds[r * SOME + i]), q, dk[r * (D4 / PARTS) + d]);
              dv[r * (D4 / PARTS) + d] = fma(vec4f(p[r * SOME + i]), g, dv[r * (D4 / PARTS) + d]);
            }
          }
        }
      }
    }
  }
  // unroll
  for (var r = 0u; r < ROWS; r++) {
    let row = row0 + r * (LANES / PARTS) + mine;
    if (row < count) {
      // unroll
      for (var d = 0u; d < D4 / PARTS; d++) {
        dqkv[row * stride + (HEADS + kv) * D4 + d * PARTS + part] = dk[r * (D4 / PARTS) + d] * scale;
        dqkv[row * stride + (HEADS + KV_HEADS + kv) * D4 + d * PARTS + part] = dv[r * (D4 / PARTS) + d];
      }
    }
  }
}
