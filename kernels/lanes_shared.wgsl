// lanes_shared — snippet: the lanes of a workgroup share values through workgroup memory.
// Appended to kernels that call lanes_*; works on every device. Twin of lanes_subgroup.wgsl.
//
//   needs   override LANES, a power of two, at most 64 where values are kept; override LANE_SLOTS there
//   grid    none of its own

var<workgroup> lanes_board: array<f32, LANES>;

/// Sum of `value` over the lanes by a tree of fixed order: the same bits in every lane and every run.
fn lanes_sum(value: f32, lane: u32) -> f32 {
  workgroupBarrier();
  lanes_board[lane] = value;
  workgroupBarrier();
  for (var half = LANES >> 1u; half > 0u; half >>= 1u) {
    if (lane < half) {
      lanes_board[lane] += lanes_board[lane + half];
    }
    workgroupBarrier();
  }
  return lanes_board[0];
}

/// Maximum of `value` over the lanes.
fn lanes_max(value: f32, lane: u32) -> f32 {
  workgroupBarrier();
  lanes_board[lane] = value;
  workgroupBarrier();
  for (var half = LANES >> 1u; half > 0u; half >>= 1u) {
    if (lane < half) {
      lanes_board[lane] = max(lanes_board[lane], lanes_board[lane + half]);
    }
    workgroupBarrier();
  }
  return lanes_board[0];
}

override LANE_SLOTS: u32 = 1u;
// By slot, then by lane: naga clamps each index that is no literal, so in rows of lanes it clamps once for all slots. Only the
// outermost size may be an override.
var<workgroup> lanes_kept: array<array<vec4f, 64>, LANE_SLOTS>;

/// Begins a round of lanes_keep: no lane may still be fetching the round before.
fn lanes_begin() {
  workgroupBarrier();
}

/// Keeps a value of this lane under `slot` for lanes_fetch of the others.
fn lanes_keep(slot: u32, value: vec4f, lane: u32) {
  lanes_kept[slot][lane] = value;
}

/// Ends a round of lanes_keep: now every lane may fetch.
fn lanes_end() {
  workgroupBarrier();
}

/// The value that lane `owner` keeps under `slot`.
fn lanes_fetch(slot: u32, owner: u32) -> vec4f {
  return lanes_kept[slot][owner];
}

/// Entries of a table of 16 for the low four bits of `codes`, by those bits: a driver looks up what differs from lane to lane
/// one after the other. `mine` is for the twin.
fn lanes_entries(table: array<vec4f, 4>, mine: vec2f, codes: vec4u) -> vec4f {
  let bit0 = (codes & vec4u(1u)) == vec4u(1u);
  let bit1 = (codes & vec4u(2u)) == vec4u(2u);
  let bit2 = (codes & vec4u(4u)) == vec4u(4u);
  let bit3 = (codes & vec4u(8u)) == vec4u(8u);
  var found: array<vec4f, 4>;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    let four = table[i];
    found[i] = select(select(vec4f(four.x), vec4f(four.y), bit0), select(vec4f(four.z), vec4f(four.w), bit0), bit1);
  }
  return select(select(found[0], found[1], bit2), select(found[2], found[3], bit2), bit3);
}
