// matvec — a few rows times a matrix, for decoding token by token: the time goes into reading each weight once.
//
//   nt   out[i,j] = scale · (Σ_k x[i,k] · w[j,k] + Σ_r lora_x[i,r] · lora_w[j,r])  (+ add | + out)
//
//   operands   see matmul_operands.wgsl, which is appended
//   ROWS       rows that share a weight once it is read, at most 16
//   COLUMNS    columns that share an x once it is read, 4 or 8; n and the segments are multiples of it
//   GROUP      lanes that share them: each takes 8 of every 8 · GROUP inner steps
//   grid       [blocks of ROWS rows, blocks of COLUMNS · LANES / GROUP columns]
//   shared     lanes_*, with ROWS · COLUMNS / 4 slots
//
// A row's sum runs in the same order whatever ROWS is and whichever rows stand beside it, so that an answer does not
// depend on the batch that it was written in.

override LANES: u32;
override GROUP: u32 = 8u;
override ROWS: u32 = 1u;
override COLUMNS: u32 = 4u;

/// 8 inner steps of a row, low and high, with as many of each of 4 columns.
fn products(b0: mat2x4f, b1: mat2x4f, b2: mat2x4f, b3: mat2x4f, low: vec4f, high: vec4f) -> vec4f {
  return vec4f(
    dot(b0[0], low) + dot(b0[1], high),
    dot(b1[0], low) + dot(b1[1], high),
    dot(b2[0], low) + dot(b2[1], high),
    dot(b3[0], low) + dot(b3[1], high),
  );
}

@compute @workgroup_size(LANES)
fn nt(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let member = lane % GROUP;
  let row0 = group.x * ROWS;
  let count = rows.x;
  let block = group.y * (LANES / GROUP) + lane / GROUP;
  // Lanes past the end compute the last columns again and write nothing.
  let tile = tile_of(min(block, dims.n / COLUMNS - 1u), COLUMNS);
  let inner = dims.k;
  let stride = dims.w_stride;
  let w0 = dims.w_offset + tile.column * stride;
  let next = dims.lora_w_stride >> 2u;
  let lora_w0 = (tile.lora_w + (tile.column - tile.start) * dims.lora_w_stride) >> 2u;
  var x_row: array<u32, 16>;
  var lora_row: array<u32, 16>;
  // unroll
  for (var i = 0u; i < ROWS; i++) {
    let row = min(row0 + i, count - 1u);
    x_row[i] = (dims.x_offset + row * dims.x_stride) >> 2u;
    lora_row[i] = (tile.lora_x + row * dims.lora_x_stride) >> 2u;
  }
  var sums: array<vec4f, 32>;
  var b: array<mat2x4f, 8>;
  for (var k = member * 8u; k < inner; k += GROUP * 8u) {
    // unroll
    for (var c = 0u; c < COLUMNS; c++) {
      b[c] = widen8(raw8(w0 + c * stride + k), true);
    }
    // unroll
    for (var i = 0u; i < ROWS; i++) {
      let at = x_row[i] + (k >> 2u);
      let low = x[at];
      let high = x[at + 1u];
      // unroll
      for (var g = 0u; g < COLUMNS / 4u; g++) {
        sums[i * (COLUMNS / 4u) + g] += products(b[g * 4u], b[g * 4u + 1u], b[g * 4u + 2u], b[g * 4u + 3u], low, high);
      }
    }
  }
  for (var r = member * 8u; r < tile.r; r += GROUP * 8u) {
    // unroll
    for (var c = 0u; c < COLUMNS; c++) {
      let at = lora_w0 + c * next + (r >> 2u);
      b[c] = mat2x4f(lora_w[at], lora_w[at + 1u]);
    }
    // unroll
    for (var i = 0u; i < ROWS; i++) {
      let at = lora_row[i] + (r >> 2u);
      let low = lora_x[at];
      let high = lora_x[at + 1u];
      // unroll
      for (var g = 0u; g < COLUMNS / 4u; g++) {
        sums[i * (COLUMNS / 4u) + g] += products(b[g * 4u], b[g * 4u + 1u], b[g * 4u + 2u], b[g * 4u + 3u], low, high);
      }
    }
  }
  lanes_begin();
  // unroll
  for (var i = 0u; i < ROWS * COLUMNS / 4u; i++) {
    lanes_keep(i, sums[i], lane);
    sums[i] = vec4f();
  }
  lanes_end();
  // Of one group the first lane is known when a driver compiles.
  let first = select(lane - member, 0u, GROUP == LANES);
  // unroll up to 16
  for (var other = 0u; other < GROUP; other++) {
    // unroll
    for (var i = 0u; i < ROWS * COLUMNS / 4u; i++) {
      sums[i] += lanes_fetch(i, first + other);
    }
  }
  // unroll
  for (var i = 0u; i < ROWS * COLUMNS / 4u; i++) {
    let row = row0 + i / (COLUMNS / 4u);
    if (member == i % GROUP && row < count && block * COLUMNS < dims.n) {
      put(row, tile.column + i % (COLUMNS / 4u) * 4u, sums[i]);
    }
  }
}
