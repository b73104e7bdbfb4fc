// embedding — rows of a table by index, and back.
//
//   gather           out[r] = table[ids[r]]        for ids in [FIRST, FIRST + COUNT), other rows are left alone
//   scatter          out[ids[r]] = x[r]            ids are distinct
//   backward         dtable[ids[g] − FIRST] += Σ_{i in [starts[g], starts[g+1])} x[order[i]],   one g per distinct id
//                    The host sorts the tokens by id, so that the sum has a fixed order and needs no atomics.
//
//   table            f32, f16 or bf16 (TYPE) [COUNT, DIM]   a slice of the vocabulary; or any f32 rows
//   out, x, dtable   f32 [·, DIM]
//   ids, order, starts   u32
//   grid             gather, scatter: one workgroup per row, folded
//                    backward: the same per distinct id, and in z one per 4 · LANES columns: a lane has one vec4 of columns,
//                    because lavapipe ends an invocation's loops after 65,535 iterations in all

const F32 = 0u;
const BF16 = 2u;

override LANES: u32;
override DIM: u32;
override TYPE: u32 = 0u;
override FIRST: u32 = 0u;
override COUNT: u32 = 0xffffffffu;

@group(0) @binding(0) var<uniform> rows: vec4u;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<vec2u>;
@group(0) @binding(3) var<storage, read> x: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(5) var<storage, read> order: array<u32>;
@group(0) @binding(6) var<storage, read> starts: array<u32>;
@group(0) @binding(7) var<storage, read_write> dtable: array<vec4f>;

fn halves(word: u32) -> vec2f {
  if (TYPE == BF16) {
    return vec2f(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
  }
  return unpack2x16float(word);
}

@compute @workgroup_size(LANES)
fn gather(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  let id = ids[rows.y + row];
  if (id < FIRST || id - FIRST >= COUNT) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    let at = (id - FIRST) * (DIM / 4u) + c;
    if (TYPE == F32) {
      out[row * (DIM / 4u) + c] = vec4f(bitcast<vec2f>(table[at * 2u]), bitcast<vec2f>(table[at * 2u + 1u]));
    } else {
      out[row * (DIM / 4u) + c] = vec4f(halves(table[at].x), halves(table[at].y));
    }
  }
}

@compute @workgroup_size(LANES)
fn scatter(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * 32768u;
  if (row >= rows.x) {
    return;
  }
  for (var c = lane; c < DIM / 4u; c += LANES) {
    out[ids[rows.y + row] * (DIM / 4u) + c] = x[row * (DIM / 4u) + c];
  }
}

@compute @workgroup_size(LANES)
fn backward(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let slot = group.x + group.y * 32768u;
  if (slot >= rows.x) {
    return;
  }
  let id = ids[slot];
  if (id < FIRST || id - FIRST >= COUNT) {
    return;
  }
  let c = group.z * LANES + lane;
  if (c >= DIM / 4u) {
    return;
  }
  var sum = vec4f(0.0);
  for (var i = starts[slot]; i < starts[slot + 1u]; i++) {
    sum += x[order[i] * (DIM / 4u) + c];
  }
  dtable[(id - FIRST) * (DIM / 4u) + c] += sum;
}
