// matmul_subgroup — matrix products for CPU drivers: no workgroup memory, operands broadcast by subgroup shuffles.
//
//   nt   out[i,j] = scale · (Σ_k x[i,k] · w[j,k] + Σ_r lora_x[i,r] · lora_w[j,r])  (+ add | + out)
//   nn   out[i,j] = scale · (Σ_k x[i,k] · w[k,j] + Σ_r lora_x[i,r] · lora_w[r,j])  (+ add | + out)
//   tn   out[i,j] = scale · Σ_t x[t,i] · w[t,j]  (+ out)
//
//   x, lora_x             f32, `offset` and `stride` in elements, both multiples of 4
//   add, out              f32, `offset` and `stride` multiples of 8
//   w                     f32, f16 or bf16 (W_TYPE), row-major with w_stride
//   lora_w                f32; nt: of each segment [columns, r], nn: [r, columns]
//   sizes                 k, n, r multiples of 8; in tn the m columns of x too
//   PART                  lanes that stand beside each other in a row of the result; the other lanes have rows of their own
//   grid                  [column tiles, row tiles], or with DOWN [row tiles, column tiles]; a tile is one subgroup, 4 · PART
//                         columns by HIGH · LANES / PART rows
//
// A lane holds 4 columns of HIGH rows. It loads rows of x for the others of its part and hands them on by shuffles whose
// lanes the driver knows when it compiles. A round of the loop takes 8 inner steps, four at a time: so many weights stay in
// registers, and a loop that is any longer no longer fits the instruction cache.

override LANES: u32 = 8u;
override PART: u32 = 8u;
override STEP: u32 = 8u; // tn: lanes of a part that load different rows of x: 8, or PART where that is less
override SHARE: u32 = 1u; // tn: lanes of a part that load different columns of such a row: PART / STEP
override HIGH: u32 = 32u; // nt, nn: 32; tn: 32 or 16
override W_TYPE: u32 = 0u;
override LORA: u32 = 0u; // 1: the product has a low-rank term
override PLUS: u32 = 0u;
override DOWN: u32 = 0u; // 1: tiles are run down the columns of the result, not along its rows

// image
@group(0) @binding(2) var<storage, read> x: array<vec4f>;
// image
@group(0) @binding(3) var<storage, read> w: array<vec4u>;
// image
@group(0) @binding(4) var<storage, read> lora_x: array<vec4f>;
// image
@group(0) @binding(5) var<storage, read> lora_w: array<vec4f>;
@group(0) @binding(6) var<storage, read> add: array<vec4f>; // 64-bit words of sixteen lanes would be loaded by way of memory
@group(0) @binding(7) var<storage, read_write> out: array<vec4<u64>>;

/// Two 16-bit numbers of a word.
fn halves(word: u32) -> vec2f {
  if (W_TYPE == BF16) {
    return vec2f(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
  }
  return unpack2x16float(word);
}

/// What a lane loads at once of the weights from `i` on, where they are 16-bit: 8 of them; `i` is a multiple of 8.
fn words8(i: u32) -> vec4u {
  if (W_TYPE == F32) {
    return vec4u();
  }
  return w[i >> 3u];
}

/// Weights `i` + 4 `h` .. `i` + 4 `h` + 3, of which `words` are known.
fn weight_half(i: u32, h: u32, words: vec4u) -> vec4f {
  if (W_TYPE == F32) {
    return bitcast<vec4f>(w[(i >> 2u) + h]);
  }
  return vec4f(halves(words[2u * h]), halves(words[2u * h + 1u]));
}

/// Weights `i` .. `i` + 3; `i` is a multiple of 4.
fn weight4(i: u32) -> vec4f {
  if (W_TYPE == F32) {
    return bitcast<vec4f>(w[i >> 2u]);
  }
  let words = w[i >> 3u];
  let mine = select(words.xy, words.zw, (i & 4u) == 4u);
  return vec4f(halves(mine.x), halves(mine.y));
}

/// c[i] += Σ_k a(i, k) · b[k] over 4 k; lane l of the part that begins at `own` holds rows l, l + PART, ….
fn multiply(
  c: ptr<function, array<vec4f, 32>>,
  a: ptr<function, array<vec4f, 16>>,
  b: ptr<function, array<vec4f, 4>>,
  own: u32,
) {
  // unroll: literal lanes and registers
  for (var i = 0u; i < 32u; i++) {
    var sum = (*c)[i];
    // unroll
    for (var k = 0u; k < 4u; k++) {
      sum = fma(vec4f(subgroupShuffle((*a)[i / PART][k], own + i % PART)), (*b)[k], sum);
    }
    (*c)[i] = sum;
  }
}

/// Eight numbers as one value and back: a load or a store of 32 bytes costs a CPU driver no more than one of 16.
fn eight(low: vec4f, high: vec4f) -> vec4<u64> {
  let even = vec4<u64>(bitcast<vec4u>(vec4f(low.xz, high.xz)));
  let odd = vec4<u64>(bitcast<vec4u>(vec4f(low.yw, high.yw)));
  return even | (odd << vec4u(32u));
}

fn pair(words: vec4<u64>) -> mat2x4f {
  let even = bitcast<vec4f>(vec4u(words));
  let odd = bitcast<vec4f>(vec4u(words >> vec4u(32u)));
  return mat2x4f(vec4f(even.x, odd.x, even.y, odd.y), vec4f(even.z, odd.z, even.w, odd.w));
}

/// Writes two rows of the tile, 4 columns of each lane: two lanes exchange halves, so that each writes 8 columns of one row.
fn put(row: u32, high: u32, column: u32, end: u32, lane: u32, first: vec4f, second: vec4f) {
  let odd = (lane & 1u) == 1u;
  let other = subgroupShuffle(select(second, first, odd), lane ^ 1u);
  let mine = row + (lane & 1u);
  let low = column & ~7u;
  if (mine >= high || low >= end) {
    return;
  }
  let i = (dims.out_offset + mine * dims.out_stride + low) >> 3u;
  var left = dims.scale * select(first, other, odd);
  var right = dims.scale * select(other, second, odd);
  if (PLUS == ADD) {
    left += add[2u * i];
    right += add[2u * i + 1u];
  }
  if (PLUS == OUT) {
    let more = pair(out[i]);
    left += more[0];
    right += more[1];
  }
  out[i] = eight(left, right);
}

@compute @workgroup_size(LANES)
fn nt(@builtin(workgroup_id) group: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
  let place = select(group.xy, group.yx, DOWN == 1u);
  let tile = tile_of(place.x, 4u * PART);
  let own = lane / PART * PART;
  let row0 = place.y * (32u * LANES / PART) + lane / PART * 32u;
  let last = rows.x - 1u;
  // Lanes past the end of the segment compute its last columns again and write nothing.
  let column = tile.column + lane % PART * 4u;
  let safe = min(column, tile.end - 4u);
  // Uniforms are read before the loop: a CPU driver hoists nothing.
  let inner = dims.k;
  let stride = dims.w_stride;
  let w0 = dims.w_offset + safe * stride;
  let lora_w0 = (tile.lora_w + (safe - tile.start) * dims.lora_w_stride) >> 2u;
  let next = dims.lora_w_stride >> 2u;
  var x_row: array<u32, 16>;
  var lora_row: array<u32, 16>;
  // unroll
  for (var g = 0u; g < 32u / PART; g++) {
    let row = min(row0 + g * PART + lane % PART, last);
    x_row[g] = (dims.x_offset + row * dims.x_stride) >> 2u;
    lora_row[g] = (tile.lora_x + row * dims.lora_x_stride) >> 2u;
  }
  var c: array<vec4f, 32>;
  var a: array<vec4f, 16>;
  var b: array<vec4f, 4>;
  for (var k = 0u; k < inner; k += 8u) {
    let first = w0 + k;
    let words0 = words8(first);
    let words1 = words8(first + stride);
    let words2 = words8(first + 2u * stride);
    let words3 = words8(first + 3u * stride);
    // unroll
    for (var h = 0u; h < 2u; h++) {
      // unroll
      for (var g = 0u; g < 32u / PART; g++) {
        a[g] = x[x_row[g] + (k >> 2u) + h];
      }
      let b0 = weight_half(first, h, words0);
      let b1 = weight_half(first + stride, h, words1);
      let b2 = weight_half(first + 2u * stride, h, words2);
      let b3 = weight_half(first + 3u * stride, h, words3);
      // unroll
      for (var q = 0u; q < 4u; q++) {
        b[q] = vec4f(b0[q], b1[q], b2[q], b3[q]);
      }
      multiply(&c, &a, &b, own);
    }
  }
  // A loop of its own: a branch inside the loop above would cost a CPU driver a quarter of its speed.
  if (LORA == 1u) {
    for (var r = 0u; r < tile.r; r += 4u) {
      // unroll
      for (var g = 0u; g < 32u / PART; g++) {
        a[g] = lora_x[lora_row[g] + (r >> 2u)];
      }
      let first = lora_w0 + (r >> 2u);
      let b0 = lora_w[first];
      let b1 = lora_w[first + next];
      let b2 = lora_w[first + 2u * next];
      let b3 = lora_w[first + 3u * next];
      // unroll
      for (var q = 0u; q < 4u; q++) {
        b[q] = vec4f(b0[q], b1[q], b2[q], b3[q]);
      }
      multiply(&c, &a, &b, own);
    }
  }
  // unroll
  for (var i = 0u; i < 32u; i += 2u) {
    put(row0 + i, rows.x, column, tile.end, lane, c[i], c[i + 1u]);
  }
}

@compute @workgroup_size(LANES)
fn nn(@builtin(workgroup_id) group: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
  let own = lane / PART * PART;
  let place = select(group.xy, group.yx, DOWN == 1u);
  let row0 = place.y * (32u * LANES / PART) + lane / PART * 32u;
  let last = rows.x - 1u;
  let column = (place.x * PART + lane % PART) * 4u;
  let safe = min(column, dims.n - 4u);
  let inner = dims.k;
  let rank = dims.r0;
  let stride = dims.w_stride;
  let w0 = dims.w_offset + safe;
  let lora_stride = dims.lora_w_stride >> 2u;
  let lora_w0 = (dims.lora_w0 + safe) >> 2u;
  var x_row: array<u32, 16>;
  var lora_row: array<u32, 16>;
  // unroll
  for (var g = 0u; g < 32u / PART; g++) {
    let row = min(row0 + g * PART + lane % PART, last);
    x_row[g] = (dims.x_offset + row * dims.x_stride) >> 2u;
    lora_row[g] = (dims.lora_x0 + row * dims.lora_x_stride) >> 2u;
  }
  var c: array<vec4f, 32>;
  var a: array<vec4f, 16>;
  var b: array<vec4f, 4>;
  for (var k = 0u; k < inner; k += 8u) {
    // unroll
    for (var h = 0u; h < 2u; h++) {
      // unroll
      for (var g = 0u; g < 32u / PART; g++) {
        a[g] = x[x_row[g] + (k >> 2u) + h];
      }
      // unroll
      for (var q = 0u; q < 4u; q++) {
        b[q] = weight4(w0 + (k + h * 4u + q) * stride);
      }
      multiply(&c, &a, &b, own);
    }
  }
  if (LORA == 1u) {
    for (var r = 0u; r < rank; r += 4u) {
      // unroll
      for (var g = 0u; g < 32u / PART; g++) {
        a[g] = lora_x[lora_row[g] + (r >> 2u)];
      }
      // unroll
      for (var q = 0u; q < 4u; q++) {
        b[q] = lora_w[lora_w0 + (r + q) * lora_stride];
      }
      multiply(&c, &a, &b, own);
    }
  }
  // unroll
  for (var i = 0u; i < 32u; i += 2u) {
    put(row0 + i, rows.x, column, dims.n, lane, c[i], c[i + 1u]);
  }
}

@compute @workgroup_size(LANES)
fn tn(@builtin(workgroup_id) group: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
  let own = lane / PART * PART;
  let place = select(group.xy, group.yx, DOWN == 1u);
  let row0 = (place.y * (LANES / PART) + lane / PART) * HIGH;
  let column = (place.x * PART + lane % PART) * 4u;
  let safe = min(column, dims.n - 4u);
  let count = rows.x;
  let stride = dims.w_stride;
  let w0 = dims.w_offset + safe;
  let x_stride = dims.x_stride >> 2u;
  // The columns of x that this lane loads of what the tile covers, eight by eight; past the end the last ones again.
  let first = row0 + lane % PART / STEP * (HIGH / SHARE);
  var x_column: array<u32, 4>;
  // unroll
  for (var q = 0u; q < HIGH / SHARE / 8u; q++) {
    x_column[q] = (dims.x_offset + min(first + q * 8u, dims.m - 8u)) >> 2u;
  }
  var c: array<vec4f, 32>;
  var a: array<vec4f, 32>;
  var b: array<vec4f, 4>;
  for (var t = 0u; t < count; t += 8u) {
    // Here a lane holds rows of x, HIGH columns of them: t + lane, or more where fewer lanes share 8; past the end zeros.
    // unroll
    for (var s = 0u; s < 8u / STEP; s++) {
      let mine = t + s * STEP + lane % STEP;
      let inside = select(0.0, 1.0, mine < count);
      let source = min(mine, count - 1u) * x_stride;
      // unroll
      for (var q = 0u; q < HIGH / SHARE / 8u; q++) {
        a[s * (HIGH / SHARE / 4u) + q * 2u] = inside * x[source + x_column[q]];
        a[s * (HIGH / SHARE / 4u) + q * 2u + 1u] = inside * x[source + x_column[q] + 1u];
      }
    }
    // unroll
    for (var h = 0u; h < 8u; h += 4u) {
      // unroll
      for (var q = 0u; q < 4u; q++) {
        b[q] = weight4(w0 + min(t + h + q, count - 1u) * stride);
      }
      // unroll
      for (var i = 0u; i < HIGH; i++) {
        var sum = c[i];
        // unroll
        for (var q = 0u; q < 4u; q++) {
          let value = a[(h + q) / STEP * (HIGH / SHARE / 4u) + i % (HIGH / SHARE) / 4u][i % 4u];
          let holder = own + i / (HIGH / SHARE) * STEP + (h + q) % STEP;
          sum = fma(vec4f(subgroupShuffle(value, holder)), b[q], sum);
        }
        c[i] = sum;
      }
    }
  }
  // unroll
  for (var i = 0u; i < HIGH; i += 2u) {
    put(row0 + i, dims.m, column, dims.n, lane, c[i], c[i + 1u]);
  }
}
