// matmul_tiled — matrix products for GPUs: tiles in workgroup memory, register tiles of 4 × 4 to 16 × 8 per thread.
//
//   nt   out[i,j] = scale · (Σ_k x[i,k] · w[j,k] + Σ_r lora_x[i,r] · lora_w[j,r])  (+ add | + out)
//   nn   out[i,j] = scale · (Σ_k x[i,k] · w[k,j] + Σ_r lora_x[i,r] · lora_w[r,j])  (+ add | + out)
//   tn   out[i,j] = scale · Σ_t x[t,i] · w[t,j]  (+ out)
//
//   operands   see matmul_operands.wgsl, which is appended
//   tile       BM rows (64, 128 or 256) by BN columns (64 or 128), and BK inner steps at a time: 16 or 32 with BM · BK and
//              BN · BK multiples of 2048, at most 4096; (BM + BN) · BK · 4 bytes of workgroup memory
//   grid       nt, nn: [column tiles, row tiles]; tn: [column tiles of w, column tiles of x]; nt counts the tiles of each
//              segment apart
//
// 256 threads load 8 inner steps of a row, or 4 columns of one inner step, per thread and round, into registers while
// the tile before is multiplied (the latency of device memory hides behind that), then widen them to f32 and write them
// to workgroup memory, inner step by inner step. A tile is cut into slabs of 64 rows by 8 inner steps: naga clamps every
// index of workgroup memory that is not a literal, and in [slab][step][quad] only indices that no loop changes remain.

override BM: u32 = 128u;
override BN: u32 = 128u;
override BK: u32 = 16u;
override BAND: u32 = 8u; // row tiles that run before the next column of tiles
// Named, because naga 29 panics on an array size that is an expression.
override X_SLABS: u32 = BM * BK / 512u;
override W_SLABS: u32 = BN * BK / 512u;

var<workgroup> x_tile: array<array<array<vec4f, 16>, 8>, X_SLABS>;
var<workgroup> w_tile: array<array<array<vec4f, 16>, 8>, W_SLABS>;

/// Column and row of the workgroup's tile. Tiles run down a band of rows before the next column, so that those in flight
/// share w in the cache as well as x.
fn place(group: vec3u, groups: vec3u) -> vec2u {
  let index = group.y * groups.x + group.x;
  let band = index / (BAND * groups.x);
  let rest = index - band * BAND * groups.x;
  let high = min(BAND, groups.y - band * BAND);
  return vec2u(rest / high, band * BAND + rest % high);
}

/// Quads of columns and rows that a thread sums. 32 neighbours cover 8 by 4 quads: few addresses per read of a tile. Pairs of
/// them read the same quad of w, and every other one the same of x: NVIDIA then reads for 16 threads at once, else for 8.
fn quads(thread: u32) -> vec2u {
  let part = thread >> 5u;
  let lane = thread & 31u;
  return vec2u((part & 1u) * 8u + ((lane >> 1u) & 7u), (part >> 1u) * 4u + (lane & 1u) + (lane >> 4u) * 2u);
}

/// Writes 8 inner steps of one row of x, or of w, into the slab.
fn keep_x8(slab: u32, row: u32, value: mat2x4f) {
  // unroll
  for (var q = 0u; q < 8u; q++) {
    x_tile[slab][q][row >> 2u][row & 3u] = value[q / 4u][q % 4u];
  }
}

fn keep_w8(slab: u32, row: u32, value: mat2x4f) {
  // unroll
  for (var q = 0u; q < 8u; q++) {
    w_tile[slab][q][row >> 2u][row & 3u] = value[q / 4u][q % 4u];
  }
}

/// c += the x tile · the w tile; c[2 i + j] holds columns 64 j + 4 quad .. of row i, rows 64 (i / 4) + 4 quad + i % 4.
fn multiply(c: ptr<function, array<vec4f, 32>>, quad: vec2u) {
  let tx = quad.x;
  let ty = quad.y;
  // unroll: literal slabs, steps and registers
  for (var k = 0u; k < BK; k++) {
    var a: array<vec4f, 4>;
    // unroll
    for (var s = 0u; s < BM / 64u; s++) {
      a[s] = x_tile[k / 8u * (BM / 64u) + s][k % 8u][ty];
    }
    let b = mat2x4f(
      w_tile[k / 8u * (BN / 64u)][k % 8u][tx],
      w_tile[k / 8u * (BN / 64u) + BN / 64u - 1u][k % 8u][tx],
    );
    // unroll
    for (var i = 0u; i < BM / 16u; i++) {
      // unroll
      for (var j = 0u; j < BN / 64u; j++) {
        (*c)[i * 2u + j] = fma(vec4f(a[i / 4u][i % 4u]), b[j], (*c)[i * 2u + j]);
      }
    }
  }
}

/// Writes what of the tile at (row, column) lies inside `high` rows and `wide` columns.
fn finish(c: ptr<function, array<vec4f, 32>>, row: u32, column: u32, high: u32, wide: u32) {
  // unroll
  for (var i = 0u; i < BM / 16u; i++) {
    // unroll
    for (var j = 0u; j < BN / 64u; j++) {
      if (row + i / 4u * 64u + i % 4u < high && column + j * 64u < wide) {
        put(row + i / 4u * 64u + i % 4u, column + j * 64u, (*c)[i * 2u + j]);
      }
    }
  }
}

/// Inner steps `k` .. `k` + 7 of a row of x, continued by lora_x up to `inner`, zero from there on.
fn load_x(row: u32, lora_row: u32, k: u32, inner: u32) -> mat2x4f {
  if (k < dims.k) {
    let at = row + (k >> 2u);
    return mat2x4f(x[at], x[at + 1u]);
  }
  if (k < inner) {
    let at = lora_row + ((k - dims.k) >> 2u);
    return mat2x4f(lora_x[at], lora_x[at + 1u]);
  }
  return mat2x4f();
}

/// The same of a row of w (nt).
fn load_w8(row: u32, lora_row: u32, k: u32, inner: u32) -> Raw8 {
  if (k < dims.k) {
    return raw8(row + k);
  }
  if (k < inner) {
    let at = lora_row + ((k - dims.k) >> 2u);
    return Raw8(bitcast<vec4u>(lora_w[at]), bitcast<vec4u>(lora_w[at + 1u]));
  }
  return Raw8();
}

/// Four columns at inner step `k` (nn), likewise.
fn load_w4(column: u32, lora_column: u32, k: u32, inner: u32) -> vec4u {
  if (k < dims.k) {
    return raw4(column + k * dims.w_stride);
  }
  if (k < inner) {
    return bitcast<vec4u>(lora_w[lora_column + (k - dims.k) * (dims.lora_w_stride >> 2u)]);
  }
  return vec4u();
}

@compute @workgroup_size(256)
fn nt(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) thread: u32,
) {
  let at = place(group, groups);
  let tile = tile_of(at.x, BN);
  let row0 = at.y * BM;
  let inner = dims.k + tile.r;
  let slab = thread >> 6u;
  let line = thread & 63u;
  // Past the end the last row and column again: they are computed and not written.
  let row = min(row0 + thread % BM, rows.x - 1u);
  let x_row = (dims.x_offset + row * dims.x_stride) >> 2u;
  let x_lora = (tile.lora_x + row * dims.lora_x_stride) >> 2u;
  let x_k = thread / BM * 8u;
  let column = min(tile.column + thread % BN, tile.end - 1u);
  let w_row = dims.w_offset + column * dims.w_stride;
  let w_lora = (tile.lora_w + (column - tile.start) * dims.lora_w_stride) >> 2u;
  let w_k = thread / BN * 8u;
  let quad = quads(thread);
  var c: array<vec4f, 32>;
  var x_next: array<mat2x4f, 2>;
  var w_next: array<Raw8, 2>;
  // unroll
  for (var u = 0u; u < BM * BK / 2048u; u++) {
    x_next[u] = load_x(x_row, x_lora, x_k + u * (2048u / BM), inner);
  }
  // unroll
  for (var u = 0u; u < BN * BK / 2048u; u++) {
    w_next[u] = load_w8(w_row, w_lora, w_k + u * (2048u / BN), inner);
  }
  for (var step = 0u; step < inner; step += BK) {
    // unroll
    for (var u = 0u; u < BM * BK / 2048u; u++) {
      keep_x8(slab + u * 4u, line, x_next[u]);
    }
    // unroll
    for (var u = 0u; u < BN * BK / 2048u; u++) {
      keep_w8(slab + u * 4u, line, widen8(w_next[u], step + w_k + u * (2048u / BN) < dims.k));
    }
    workgroupBarrier();
    let next = step + BK;
    // unroll
    for (var u = 0u; u < BM * BK / 2048u; u++) {
      x_next[u] = load_x(x_row, x_lora, next + x_k + u * (2048u / BM), inner);
    }
    // unroll
    for (var u = 0u; u < BN * BK / 2048u; u++) {
      w_next[u] = load_w8(w_row, w_lora, next + w_k + u * (2048u / BN), inner);
    }
    multiply(&c, quad);
    workgroupBarrier();
  }
  finish(&c, row0 + quad.y * 4u, tile.column + quad.x * 4u, rows.x, tile.end);
}

@compute @workgroup_size(256)
fn nn(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) thread: u32,
) {
  let at = place(group, groups);
  let row0 = at.y * BM;
  let column0 = at.x * BN;
  let inner = dims.k + dims.r0;
  let slab = thread >> 6u;
  let line = thread & 63u;
  let row = min(row0 + thread % BM, rows.x - 1u);
  let x_row = (dims.x_offset + row * dims.x_stride) >> 2u;
  let x_lora = (dims.lora_x0 + row * dims.lora_x_stride) >> 2u;
  let x_k = thread / BM * 8u;
  // Of w a thread loads one quad of columns at several inner steps.
  let w_quad = thread % (BN / 4u);
  let w_k = thread / (BN / 4u);
  let w_slab = w_k / 8u * (BN / 64u) + w_quad / 16u;
  let column = min(column0 + w_quad * 4u, dims.n - 4u);
  let w_column = dims.w_offset + column;
  let w_lora = (dims.lora_w0 + column) >> 2u;
  let quad = quads(thread);
  var c: array<vec4f, 32>;
  var x_next: array<mat2x4f, 2>;
  var w_next: array<vec4u, 4>;
  // unroll
  for (var u = 0u; u < BM * BK / 2048u; u++) {
    x_next[u] = load_x(x_row, x_lora, x_k + u * (2048u / BM), inner);
  }
  // unroll
  for (var u = 0u; u < BN * BK / 1024u; u++) {
    w_next[u] = load_w4(w_column, w_lora, w_k + u * (1024u / BN), inner);
  }
  for (var step = 0u; step < inner; step += BK) {
    // unroll
    for (var u = 0u; u < BM * BK / 2048u; u++) {
      keep_x8(slab + u * 4u, line, x_next[u]);
    }
    // unroll
    for (var u = 0u; u < BN * BK / 1024u; u++) {
      let value = widen4(w_next[u], step + w_k + u * (1024u / BN) < dims.k);
      w_tile[w_slab + u * 2u][w_k & 7u][w_quad & 15u] = value;
    }
    workgroupBarrier();
    let next = step + BK;
    // unroll
    for (var u = 0u; u < BM * BK / 2048u; u++) {
      x_next[u] = load_x(x_row, x_lora, next + x_k + u * (2048u / BM), inner);
    }
    // unroll
    for (var u = 0u; u < BN * BK / 1024u; u++) {
      w_next[u] = load_w4(w_column, w_lora, next + w_k + u * (1024u / BN), inner);
    }
    multiply(&c, quad);
    workgroupBarrier();
  }
  finish(&c, row0 + quad.y * 4u, column0 + quad.x * 4u, rows.x, dims.n);
}

/// Four columns of row `t` of x (tn), zero past the last row.
fn load_x_column(column: u32, t: u32) -> vec4f {
  if (t < rows.x) {
    return x[column + t * (dims.x_stride >> 2u)];
  }
  return vec4f();
}

/// The same of w.
fn load_w_column(column: u32, t: u32) -> vec4u {
  if (t < rows.x) {
    return raw4(column + t * dims.w_stride);
  }
  return vec4u();
}

@compute @workgroup_size(256)
fn tn(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) thread: u32,
) {
  let at = place(group, groups);
  let row0 = at.y * BM;
  let column0 = at.x * BN;
  let x_quad = thread % (BM / 4u);
  let x_k = thread / (BM / 4u);
  let x_slab = x_k / 8u * (BM / 64u) + x_quad / 16u;
  let x_column = (dims.x_offset + min(row0 + x_quad * 4u, dims.m - 4u)) >> 2u;
  let w_quad = thread % (BN / 4u);
  let w_k = thread / (BN / 4u);
  let w_slab = w_k / 8u * (BN / 64u) + w_quad / 16u;
  let w_column = dims.w_offset + min(column0 + w_quad * 4u, dims.n - 4u);
  let quad = quads(thread);
  var c: array<vec4f, 32>;
  var x_next: array<vec4f, 4>;
  var w_next: array<vec4u, 4>;
  // unroll
  for (var u = 0u; u < BM * BK / 1024u; u++) {
    x_next[u] = load_x_column(x_column, x_k + u * (1024u / BM));
  }
  // unroll
  for (var u = 0u; u < BN * BK / 1024u; u++) {
    w_next[u] = load_w_column(w_column, w_k + u * (1024u / BN));
  }
  for (var step = 0u; step < rows.x; step += BK) {
    // unroll
    for (var u = 0u; u < BM * BK / 1024u; u++) {
      x_tile[x_slab + u * (1024u / BM) / 8u * (BM / 64u)][(x_k + u * (1024u / BM)) & 7u][x_quad & 15u] = x_next[u];
    }
    // unroll
    for (var u = 0u; u < BN * BK / 1024u; u++) {
      w_tile[w_slab + u * 2u][w_k & 7u][w_quad & 15u] = widen4(w_next[u], true);
    }
    workgroupBarrier();
    let next = step + BK;
    // unroll
    for (var u = 0u; u < BM * BK / 1024u; u++) {
      x_next[u] = load_x_column(x_column, next + x_k + u * (1024u / BM));
    }
    // unroll
    for (var u = 0u; u < BN * BK / 1024u; u++) {
      w_next[u] = load_w_column(w_column, next + w_k + u * (1024u / BN));
    }
    multiply(&c, quad);
    workgroupBarrier();
  }
  finish(&c, row0 + quad.y * 4u, column0 + quad.x * 4u, dims.m, dims.n);
}
