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
// 256 threads load blocks of 4 by 4 numbers into registers while the tile before is multiplied (the latency of device memory
// hides behind that), then widen them to f32 and write them to workgroup memory, inner step by inner step and a vec4f at
// a time: a write to one component may be one to all of them where the shading language is not SPIR-V. A tile is cut into
// slabs of 64 rows by 8 inner steps: naga clamps every index of workgroup memory that is not a literal, and in
// [slab][step][quad] only indices that no loop changes remain.

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

/// What a thread loads of each tile of x or w: 4 inner steps from the `k`-th on of a quad of rows or columns.
struct Block {
  busy: bool, // false where there are fewer blocks than threads
  of_x: bool,
  quad: u32,
  k: u32,
  first: u32, // where the quad begins in x or w, in elements
  lora: u32, // and in lora_x or lora_w
}

/// Whether there is a block `p`: first come those of x, then those of w. The threads of a warp load of one of them.
fn is_block(p: u32) -> bool {
  return (BM + BN) * BK % 4096u == 0u || p < (BM + BN) * BK / 16u;
}

/// The `p`-th block of the rows from `row0` on, `first` and `lora` in rows: 8 neighbours write neighbours, 32 read whole sectors.
/// Rows past `end` are read as what lies there, which WGSL makes safe, and never written: a clamp per row would cost registers.
fn block_of_rows(p: u32, row0: u32, end: u32) -> Block {
  let quad = (p & 7u) + p / (2u * BK) * 8u;
  let row = min(row0 + quad * 4u, end - 1u);
  return Block(true, true, quad, (p >> 3u) % (BK / 4u) * 4u, row, row);
}

/// The `p`-th block of x.
fn block_of_x(p: u32, row0: u32, lora: u32) -> Block {
  var block = block_of_rows(p, row0, rows.x);
  block.first = dims.x_offset + block.first * dims.x_stride;
  block.lora = lora + block.lora * dims.lora_x_stride;
  return block;
}

/// Inner steps `k` .. `k` + 3 of 4 rows of x, or of w (nt), continued by those of the adapter up to `inner`, then zero.
fn load_rows(block: Block, of_x: bool, k: u32, inner: u32) -> array<vec4u, 4> {
  var raw = array<vec4u, 4>();
  if (k < dims.k && block.busy) {
    if (of_x) {
      let at = (block.first + k) >> 2u;
      // unroll
      for (var i = 0u; i < 4u; i++) {
        raw[i] = bitcast<vec4u>(x[at + i * (dims.x_stride >> 2u)]);
      }
    } else {
      // unroll
      for (var i = 0u; i < 4u; i++) {
        raw[i] = raw4(block.first + k + i * dims.w_stride);
      }
    }
  } else if (k < inner && block.busy) {
    if (of_x) {
      // unroll
      for (var i = 0u; i < 4u; i++) {
        raw[i] = bitcast<vec4u>(lora_x[(block.lora + i * dims.lora_x_stride + k - dims.k) >> 2u]);
      }
    } else {
      // unroll
      for (var i = 0u; i < 4u; i++) {
        raw[i] = bitcast<vec4u>(lora_w[(block.lora + i * dims.lora_w_stride + k - dims.k) >> 2u]);
      }
    }
  }
  return raw;
}

/// Four columns of w at inner steps `k` .. `k` + 3 (nn), likewise.
fn load_columns(block: Block, k: u32, inner: u32) -> array<vec4u, 4> {
  var raw = array<vec4u, 4>();
  if (k < dims.k && block.busy) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      raw[i] = raw4(block.first + (k + i) * dims.w_stride);
    }
  } else if (k < inner && block.busy) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      raw[i] = bitcast<vec4u>(lora_w[(block.lora + (k + i - dims.k) * dims.lora_w_stride) >> 2u]);
    }
  }
  return raw;
}

/// Writes a block of rows to its tile; of w `stored` where it has the type of w.
fn keep_rows(block: Block, of_x: bool, raw: array<vec4u, 4>, stored: bool) {
  var a: array<vec4f, 4>;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    a[i] = widen4(raw[i], stored && !of_x);
  }
  // unroll
  for (var s = 0u; s < 4u; s++) {
    let four = vec4f(a[0][s], a[1][s], a[2][s], a[3][s]);
    if (of_x) {
      x_tile[block.k / 8u * (BM / 64u) + block.quad / 16u][(block.k & 4u) + s][block.quad & 15u] = four;
    } else if (block.busy) {
      w_tile[block.k / 8u * (BN / 64u) + block.quad / 16u][(block.k & 4u) + s][block.quad & 15u] = four;
    }
  }
}

/// Writes a block of columns of w, likewise.
fn keep_columns(block: Block, raw: array<vec4u, 4>, stored: bool) {
  // unroll
  for (var i = 0u; i < 4u; i++) {
    if (block.busy) {
      w_tile[block.k / 8u * (BN / 64u) + block.quad / 16u][(block.k & 4u) + i][block.quad & 15u] = widen4(raw[i], stored);
    }
  }
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
  let quad = quads(thread);
  var c: array<vec4f, 32>;
  var blocks: array<Block, 2>;
  var next: array<array<vec4u, 4>, 2>;
  // unroll
  for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
    let p = thread + u * 256u;
    if (p < BM * BK / 16u) {
      blocks[u] = block_of_x(p, row0, tile.lora_x);
    } else {
      blocks[u] = block_of_rows(p - BM * BK / 16u, tile.column, tile.end);
      blocks[u].busy = is_block(p);
      blocks[u].of_x = false;
      blocks[u].first = dims.w_offset + blocks[u].first * dims.w_stride;
      blocks[u].lora = tile.lora_w + (blocks[u].lora - tile.start) * dims.lora_w_stride;
    }
    next[u] = load_rows(blocks[u], blocks[u].of_x, blocks[u].k, inner);
  }
  for (var step = 0u; step < inner; step += BK) {
    // unroll
    for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
      keep_rows(blocks[u], blocks[u].of_x, next[u], step + blocks[u].k < dims.k);
    }
    workgroupBarrier();
    // unroll
    for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
      next[u] = load_rows(blocks[u], blocks[u].of_x, step + BK + blocks[u].k, inner);
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
  let quad = quads(thread);
  var c: array<vec4f, 32>;
  var blocks: array<Block, 2>;
  var next: array<array<vec4u, 4>, 2>;
  // unroll
  for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
    let p = thread + u * 256u;
    if (p < BM * BK / 16u) {
      blocks[u] = block_of_x(p, row0, dims.lora_x0);
    } else {
      // Neighbours read one inner step of w.
      let of_w = p - BM * BK / 16u;
      let columns = of_w % (BN / 4u);
      let column = min(column0 + columns * 4u, dims.n - 4u);
      let k = of_w / (BN / 4u) * 4u;
      blocks[u] = Block(is_block(p), false, columns, k, dims.w_offset + column, dims.lora_w0 + column);
    }
    if (blocks[u].of_x) {
      next[u] = load_rows(blocks[u], true, blocks[u].k, inner);
    } else {
      next[u] = load_columns(blocks[u], blocks[u].k, inner);
    }
  }
  for (var step = 0u; step < inner; step += BK) {
    // unroll
    for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
      if (blocks[u].of_x) {
        keep_rows(blocks[u], true, next[u], true);
      } else {
        keep_columns(blocks[u], next[u], step + blocks[u].k < dims.k);
      }
    }
    workgroupBarrier();
    // unroll
    for (var u = 0u; u < ((BM + BN) * BK + 4095u) / 4096u; u++) {
      if (blocks[u].of_x) {
        next[u] = load_rows(blocks[u], true, step + BK + blocks[u].k, inner);
      } else {
        next[u] = load_columns(blocks[u], step + BK + blocks[u].k, inner);
      }
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
