// attention_parts — how the lanes of a row share its columns, and a tile of other rows. Appended to attention.wgsl, whose
// constants it uses.
//
//   shared        lanes_*
//   grid          as there

/// Which of a workgroup's rows a lane owns, and which of its parts. Lanes of a row stand two apart, so that pairs of neighbours
/// read the same of a tile: NVIDIA then reads workgroup memory for 16 lanes at once, else for 8.
fn row_of(lane: u32) -> u32 {
  return lane / (2u * PARTS) * 2u + lane % 2u;
}

fn part_of(lane: u32) -> u32 {
  return lane / 2u % PARTS;
}

/// Of row `j` of the tile that is kept from `slot` on, the `d`-th four columns that a lane owns which is number `part` of its
/// row.
fn tile_fetch(slot: u32, d: u32, j: u32, part: u32) -> vec4f {
  if (PARTS > 1u) {
    return lanes_fetch(slot + d, j * PARTS + part);
  }
  return lanes_fetch(slot + d / SHARE, j * SHARE + d % SHARE);
}

/// Keeps a lane's share of ROWS · SOME sums from `slot` on.
fn keep_shares(sums: ptr<function, array<f32, 16>>, slot: u32, lane: u32) {
  // unroll
  for (var i = 0u; i < ROWS * SOME; i += 4u) {
    lanes_keep(slot + i / 4u, vec4f((*sums)[i], (*sums)[i + 1u], (*sums)[i + 2u], (*sums)[i + 3u]), lane);
  }
}

/// Replaces the shares by the sums, in the same order in all lanes of a row.
fn fetch_sums(sums: ptr<function, array<f32, 16>>, slot: u32, lane: u32) {
  let first = lane - 2u * part_of(lane);
  // unroll
  for (var i = 0u; i < ROWS * SOME; i += 4u) {
    var four = lanes_fetch(slot + i / 4u, first);
    // unroll
    for (var p = 1u; p < PARTS; p++) {
      four += lanes_fetch(slot + i / 4u, first + 2u * p);
    }
    // unroll
    for (var j = 0u; j < 4u; j++) {
      (*sums)[i + j] = four[j];
    }
  }
}

/// Replaces a lane's share of ROWS · SOME sums by the sums; slots from `slot` on are taken.
fn join(sums: ptr<function, array<f32, 16>>, slot: u32, lane: u32) {
  if (PARTS == 1u) {
    return;
  }
  lanes_begin();
  keep_shares(sums, slot, lane);
  lanes_end();
  fetch_sums(sums, slot, lane);
}

/// The same of two arrays at once, which takes twice the slots.
fn join_both(s: ptr<function, array<f32, 16>>, t: ptr<function, array<f32, 16>>, slot: u32, lane: u32) {
  if (PARTS == 1u) {
    return;
  }
  lanes_begin();
  keep_shares(s, slot, lane);
  keep_shares(t, slot + ROWS * SOME / 4u, lane);
  lanes_end();
  fetch_sums(s, slot, lane);
  fetch_sums(t, slot + ROWS * SOME / 4u, lane);
}
