// lanes_subgroup — snippet: the lanes of a workgroup share values by subgroup operations.
// Appended to kernels that call lanes_*; a workgroup must be exactly one subgroup. Twin of lanes_shared.wgsl.
//
//   needs   override LANES
//   grid    none of its own

/// Sum of `value` over the lanes, the same bits in every lane and every run.
fn lanes_sum(value: f32, lane: u32) -> f32 {
  return subgroupAdd(value);
}

/// Maximum of `value` over the lanes.
fn lanes_max(value: f32, lane: u32) -> f32 {
  return subgroupMax(value);
}

var<private> lanes_kept: array<vec4f, 80>;

/// Begins a round of lanes_keep.
fn lanes_begin() {}

/// Keeps a value of this lane under `slot` for lanes_fetch of the others.
fn lanes_keep(slot: u32, value: vec4f, lane: u32) {
  lanes_kept[slot] = value;
}

/// Ends a round of lanes_keep: now every lane may fetch.
fn lanes_end() {}

/// The value that lane `owner` keeps under `slot`.
fn lanes_fetch(slot: u32, owner: u32) -> vec4f {
  return subgroupShuffle(lanes_kept[slot], owner);
}

/// Entries of a table of 16 for the low four bits of `codes`: lane l holds entries l mod 8 and 8 + l mod 8, its `mine`, for the
/// others. `table` is for the twin.
fn lanes_entries(table: array<vec4f, 4>, mine: vec2f, codes: vec4u) -> vec4f {
  let place = codes & vec4u(7u);
  var low: vec4f;
  var high: vec4f;
  // unroll
  for (var i = 0u; i < 4u; i++) {
    low[i] = subgroupShuffle(mine.x, place[i]);
    high[i] = subgroupShuffle(mine.y, place[i]);
  }
  return select(low, high, (codes & vec4u(8u)) == vec4u(8u));
}
