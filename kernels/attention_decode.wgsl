// attention_decode — one new token per sequence against its cached keys and values (grouped queries, arXiv:2305.13245).
//
//   store     keys[slots[r], ·, ·, positions[r]] = k[r], and values likewise; rows whose slot is 0xffffffff are left out
//   forward   out[r] = Σ_j p[r,j] · v[j],  p = softmax_j(q[r]·k[j] / sqrt(D)) over the positions before the row's own, which
//             are read from the cache, and its own, which is read from qkv and stored
//
//   qkv                f32 [rows, (HEADS + 2 · KV_HEADS) · D]              after rope
//   slots, positions   u32 [rows]                                         place in the cache, and in the sequence
//   keys, values       f32 [slots, KV_HEADS, D / 4, CONTEXT, 4]           neighbouring lanes read neighbouring positions
//   out                f32 [rows, HEADS · D]
//   grid               store: one workgroup per row, folded; forward: [rows, HEADS]
//   shared             lanes_*, with KEPT slots
//
// Each lane keeps a softmax of its own over every LANES-th position (arXiv:2205.14135); they are joined at the end in a
// fixed order.

override LANES: u32;
override HEADS: u32;
override KV_HEADS: u32;
override D4: u32; // D / 4
override CONTEXT: u32;
override KEPT: u32 = 1u; // of D4 what the lanes keep at a time for the sum over them: a divisor of it

@group(0) @binding(0) var<uniform> rows: vec4u;
// image
@group(0) @binding(1) var<storage, read> qkv: array<vec4f>;
@group(0) @binding(2) var<storage, read> slots: array<u32>;
@group(0) @binding(3) var<storage, read> positions: array<u32>;
@group(0) @binding(4) var<storage, read_write> keys: array<vec4f>;
@group(0) @binding(5) var<storage, read_write> values: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4f>;

const LOWEST = -1e30;
const NOWHERE = 0xffffffffu;

/// Sum of the four parts, in a fixed order.
fn total(v: vec4f) -> f32 {
  return (v.x + v.y) + (v.z + v.w);
}

@compute @workgroup_size(LANES)
fn store(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x || slots[row] == NOWHERE) {
    return;
  }
  let source = (row * (HEADS + 2u * KV_HEADS) + HEADS) * D4;
  let place = slots[row] * KV_HEADS * D4 * CONTEXT + positions[row];
  for (var d = lane; d < KV_HEADS * D4; d += LANES) {
    keys[place + d * CONTEXT] = qkv[source + d];
    values[place + d * CONTEXT] = qkv[source + KV_HEADS * D4 + d];
  }
}

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x;
  let head = group.y;
  let kv = head / (HEADS / KV_HEADS);
  let position = positions[row];
  let cache = (slots[row] * KV_HEADS + kv) * D4 * CONTEXT;
  let base = row * (HEADS + 2u * KV_HEADS) * D4;
  let own_key = base + (HEADS + kv) * D4;
  let own_value = own_key + KV_HEADS * D4;
  let scale = inverseSqrt(f32(D4 * 4u));
  // The first query head of each key head stores; nobody else reads that position in this dispatch.
  if (head % (HEADS / KV_HEADS) == 0u) {
    for (var d = lane; d < D4; d += LANES) {
      keys[cache + d * CONTEXT + position] = qkv[own_key + d];
      values[cache + d * CONTEXT + position] = qkv[own_value + d];
    }
  }
  // Lane 0 begins with the row's own position, the others with nothing.
  let mine = select(0.0, 1.0, lane == 0u);
  var q: array<vec4f, 32>;
  var o: array<vec4f, 32>;
  var own = vec4f();
  // unroll
  for (var d = 0u; d < D4; d++) {
    q[d] = qkv[base + head * D4 + d] * scale;
    own = fma(q[d], qkv[own_key + d], own);
    o[d] = mine * qkv[own_value + d];
  }
  var top = select(LOWEST, total(own), lane == 0u);
  var sum = mine;
  for (var j = lane; j < position; j += LANES) {
    let at = cache + j;
    var score = vec4f();
    // unroll
    for (var d = 0u; d < D4; d++) {
      score = fma(q[d], keys[at + d * CONTEXT], score);
    }
    let s = total(score);
    let best = max(top, s);
    let keep = exp(top - best);
    let p = exp(s - best);
    sum = fma(sum, keep, p);
    // unroll
    for (var d = 0u; d < D4; d++) {
      o[d] = fma(vec4f(p), values[at + d * CONTEXT], o[d] * keep);
    }
    top = best;
  }
  let keep = exp(top - lanes_max(top, lane));
  let all = lanes_sum(sum * keep, lane);
  // unroll
  for (var first = 0u; first < D4; first += KEPT) {
    lanes_begin();
    // unroll
    for (var d = 0u; d < KEPT; d++) {
      lanes_keep(d, o[first + d] * keep, lane);
      o[first + d] = vec4f();
    }
    lanes_end();
    // unroll up to 16
    for (var other = 0u; other < LANES; other++) {
      // unroll
      for (var d = 0u; d < KEPT; d++) {
        o[first + d] += lanes_fetch(d, other);
      }
    }
  }
  // unroll
  for (var d = 0u; d < D4; d++) {
    if (lane == d % LANES) {
      out[(row * HEADS + head) * D4 + d] = o[d] / all;
    }
  }
}
