// embedding — rows of a table by index, and back.
//
//   gather           out[r] = table[ids[r]]        for ids in [FIRST, FIRST + COUNT), other rows are left alone
//   scatter          out[ids[r]] = x[r]            ids are distinct
//   backward         dtable[ids[g] − FIRST] += Σ_{i in [starts[g], starts[g+1])} x[order[i]],   one g per distinct id
//                    The host sorts the tokens by id, so that the sum has a fixed order and needs no atomics.
//
//   table            f32, f16 or bf16 (TYPE) [COUNT, DIM]   a slice of the vocabulary; or any f32 rows; 16-bit ones are bound
//                    as half_table
//   out, x, dtable   f32 [·, DIM]
//   ids, order, starts   u32
//   grid             gather, scatter: at most one workgroup per row, folded
//                    backward: one per distinct id, folded, and in z one per 4 · WIDE · LANES columns: a lane has one load of
//                    columns, because lavapipe ends an invocation's loops after 65,535 iterations in all

const F32 = 0u;
const BF16 = 2u;

override LANES: u32;
override DIM: u32;
override TYPE: u32 = 0u;
override FIRST: u32 = 0u;
override COUNT: u32 = 0xffffffffu;
const WIDE = 1u; // vec4f that are loaded and stored at once

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<array<vec4f, WIDE>>;
@group(0) @binding(3) var<storage, read> half_table: array<array<vec2u, WIDE>>;
@group(0) @binding(4) var<storage, read> x: array<array<vec4f, WIDE>>;
@group(0) @binding(5) var<storage, read_write> out: array<array<vec4f, WIDE>>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
@group(0) @binding(7) var<storage, read> starts: array<u32>;
@group(0) @binding(8) var<storage, read_write> dtable: array<array<vec4f, WIDE>>;

fn halves(word: u32) -> vec2f {
  if (TYPE == BF16) {
    return vec2f(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
  }
  return unpack2x16float(word);
}

@compute @workgroup_size(LANES)
fn gather(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let width = DIM / (4u * WIDE);
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let id = ids[rows.y + row];
    if (id >= FIRST && id - FIRST < COUNT) {
      for (var c = lane; c < width; c += LANES) {
        let at = (id - FIRST) * width + c;
        if (TYPE == F32) {
          out[row * width + c] = table[at];
        } else {
          var words = half_table[at];
          var value = array<vec4f, WIDE>();
          // unroll
          for (var h = 0u; h < WIDE; h++) {
            value[h] = vec4f(halves(words[h].x), halves(words[h].y));
          }
          out[row * width + c] = value;
        }
      }
    }
  }
}

@compute @workgroup_size(LANES)
fn scatter(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let width = DIM / (4u * WIDE);
  for (var row = group.x + group.y * 32768u; row < rows.x; row += groups.x * groups.y) {
    let id = ids[rows.y + row];
    for (var c = lane; c < width; c += LANES) {
      out[id * width + c] = x[row * width + c];
    }
  }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let width = DIM / (4u * WIDE);
  let slot = group.x + group.y * 32768u;
  if (slot >= rows.x) {
    return;
  }
  let id = ids[slot];
  if (id < FIRST || id - FIRST >= COUNT) {
    return;
  }
  let c = group.z * LANES + lane;
  if (c >= width) {
    return;
  }
  let end = starts[slot + 1u];
  var sum = array<vec4f, WIDE>();
  for (var i = starts[slot]; i < end; i++) {
    var more = x[order[i] * width + c];
    // unroll
    for (var h = 0u; h < WIDE; h++) {
      sum[h] += more[h];
    }
  }
  var value = dtable[(id - FIRST) * width + c];
  // unroll
  for (var h = 0u; h < WIDE; h++) {
    value[h] += sum[h];
  }
  dtable[(id - FIRST) * width + c] = value;
}
