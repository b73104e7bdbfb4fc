// matmul_narrow — matrix products with one short side for GPUs: LoRA ranks, single rows, gradients of adapters.
//
//   nt   out[i,j] = scale · (Σ_k x[i,k] · w[j,k] + Σ_r lora_x[i,r] · lora_w[j,r])  (+ add | + out)
//   nn   out[i,j] = scale · (Σ_k x[i,k] · w[k,j] + Σ_r lora_x[i,r] · lora_w[r,j])  (+ add | + out)
//   tn   out[i,j] = scale · Σ_t x[t,i] · w[t,j]  (+ out)
//
//   operands   see matmul_operands.wgsl, which is appended
//   grid       as matmul_tiled.wgsl, with tiles of 16 rows by 16 columns
//
// Such a product has too few results to fill a GPU with tiles, but many inner steps. Here 16 parts of a workgroup share
// them, 8 at a time in turn: a part is 16 threads of 4 × 4 results, which read their operands straight from device
// memory. The parts' sums are added in a fixed order, so that every run gives the same bits.

var<workgroup> board: array<array<vec4f, 64>, 16>;

/// c[i] += Σ_q a(i, q) · b[q] over 8 inner steps; a[i] holds them for row i.
fn multiply8(c: ptr<function, array<vec4f, 4>>, a: ptr<function, array<mat2x4f, 4>>, b: ptr<function, array<vec4f, 8>>) {
  // unroll
  for (var q = 0u; q < 8u; q++) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      (*c)[i] = fma(vec4f((*a)[i][q / 4u][q % 4u]), (*b)[q], (*c)[i]);
    }
  }
}

/// Turns 8 inner steps of 4 rows of w into 4 columns at each of 8 steps.
fn across(rows4: ptr<function, array<mat2x4f, 4>>) -> array<vec4f, 8> {
  var b: array<vec4f, 8>;
  // unroll
  for (var q = 0u; q < 8u; q++) {
    b[q] = vec4f(
      (*rows4)[0][q / 4u][q % 4u],
      (*rows4)[1][q / 4u][q % 4u],
      (*rows4)[2][q / 4u][q % 4u],
      (*rows4)[3][q / 4u][q % 4u],
    );
  }
  return b;
}

/// Adds the parts up and writes what of the tile at (row0, column0) lies inside `high` rows and `wide` columns.
fn finish(c: ptr<function, array<vec4f, 4>>, thread: u32, row0: u32, column0: u32, high: u32, wide: u32) {
  // unroll
  for (var i = 0u; i < 4u; i++) {
    board[thread >> 4u][i * 16u + (thread & 15u)] = (*c)[i];
  }
  workgroupBarrier();
  let row = row0 + (thread & 12u) + (thread >> 4u);
  let column = column0 + (thread & 3u) * 4u;
  if (thread < 64u && row < high && column < wide) {
    var sum = vec4f();
    // unroll
    for (var part = 0u; part < 16u; part++) {
      sum += board[part][thread];
    }
    put(row, column, sum);
  }
}

@compute @workgroup_size(256)
fn nt(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let tile = tile_of(group.x, 16u);
  let row0 = group.y * 16u;
  let part = thread >> 4u;
  // Past the end the last row and column again: they are computed and not written.
  var x_row: array<u32, 4>;
  var x_lora: array<u32, 4>;
  var w_row: array<u32, 4>;
  var w_lora: array<u32, 4>;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    let row = min(row0 + (thread & 12u) + i, rows.x - 1u);
    x_row[i] = (dims.x_offset + row * dims.x_stride) >> 2u;
    x_lora[i] = (tile.lora_x + row * dims.lora_x_stride) >> 2u;
    let column = min(tile.column + (thread & 3u) * 4u + i, tile.end - 1u);
    w_row[i] = dims.w_offset + column * dims.w_stride;
    w_lora[i] = (tile.lora_w + (column - tile.start) * dims.lora_w_stride) >> 2u;
  }
  var c: array<vec4f, 4>;
  var a: array<mat2x4f, 4>;
  var rows4: array<mat2x4f, 4>;
  var b: array<vec4f, 8>;
  for (var step = part * 8u; step < dims.k; step += 128u) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      a[i] = mat2x4f(x[x_row[i] + (step >> 2u)], x[x_row[i] + (step >> 2u) + 1u]);
      rows4[i] = widen8(raw8(w_row[i] + step), true);
    }
    b = across(&rows4);
    multiply8(&c, &a, &b);
  }
  for (var step = part * 8u; step < tile.r; step += 128u) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      a[i] = mat2x4f(lora_x[x_lora[i] + (step >> 2u)], lora_x[x_lora[i] + (step >> 2u) + 1u]);
      rows4[i] = mat2x4f(lora_w[w_lora[i] + (step >> 2u)], lora_w[w_lora[i] + (step >> 2u) + 1u]);
    }
    b = across(&rows4);
    multiply8(&c, &a, &b);
  }
  finish(&c, thread, row0, tile.column, rows.x, tile.end);
}

@compute @workgroup_size(256)
fn nn(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row0 = group.y * 16u;
  let column0 = group.x * 16u;
  let part = thread >> 4u;
  let column = min(column0 + (thread & 3u) * 4u, dims.n - 4u);
  let w_column = dims.w_offset + column;
  let w_lora = (dims.lora_w0 + column) >> 2u;
  let stride = dims.lora_w_stride >> 2u;
  var x_row: array<u32, 4>;
  var x_lora: array<u32, 4>;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    let row = min(row0 + (thread & 12u) + i, rows.x - 1u);
    x_row[i] = (dims.x_offset + row * dims.x_stride) >> 2u;
    x_lora[i] = (dims.lora_x0 + row * dims.lora_x_stride) >> 2u;
  }
  var c: array<vec4f, 4>;
  var a: array<mat2x4f, 4>;
  var b: array<vec4f, 8>;
  for (var step = part * 8u; step < dims.k; step += 128u) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      a[i] = mat2x4f(x[x_row[i] + (step >> 2u)], x[x_row[i] + (step >> 2u) + 1u]);
    }
    // unroll
    for (var q = 0u; q < 8u; q++) {
      b[q] = widen4(raw4(w_column + (step + q) * dims.w_stride), true);
    }
    multiply8(&c, &a, &b);
  }
  for (var step = part * 8u; step < dims.r0; step += 128u) {
    // unroll
    for (var i = 0u; i < 4u; i++) {
      a[i] = mat2x4f(lora_x[x_lora[i] + (step >> 2u)], lora_x[x_lora[i] + (step >> 2u) + 1u]);
    }
    // unroll
    for (var q = 0u; q < 8u; q++) {
      b[q] = lora_w[w_lora + (step + q) * stride];
    }
    multiply8(&c, &a, &b);
  }
  finish(&c, thread, row0, column0, rows.x, dims.n);
}

@compute @workgroup_size(256)
fn tn(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row0 = group.y * 16u;
  let column0 = group.x * 16u;
  let part = thread >> 4u;
  let x_column = (dims.x_offset + min(row0 + (thread & 12u), dims.m - 4u)) >> 2u;
  let w_column = dims.w_offset + min(column0 + (thread & 3u) * 4u, dims.n - 4u);
  let stride = dims.x_stride >> 2u;
  let count = rows.x;
  var c: array<vec4f, 4>;
  var a: array<vec4f, 8>;
  var b: array<vec4f, 8>;
  for (var step = part * 8u; step < count; step += 128u) {
    // Rows past the end count as zero.
    // unroll
    for (var q = 0u; q < 8u; q++) {
      let row = min(step + q, count - 1u);
      a[q] = select(vec4f(), x[x_column + row * stride], step + q < count);
      b[q] = widen4(raw4(w_column + row * dims.w_stride), true);
    }
    // unroll
    for (var q = 0u; q < 8u; q++) {
      // unroll
      for (var i = 0u; i < 4u; i++) {
        c[i] = fma(vec4f(a[q][i]), b[q], c[i]);
      }
    }
  }
  finish(&c, thread, row0, column0, dims.m, dims.n);
}
