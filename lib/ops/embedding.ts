/** Binding of embedding.wgsl: rows of a table by index, and back. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, laneCount, type Rows } from "../gpu/kernel.ts";
import { FLOAT_TYPE, type Tensor } from "../gpu/tensor.ts";
import { groupsOf, widen, wideOf } from "../gpu/wide.ts";
import source from "../../kernels/embedding.wgsl" with { type: "text" };

/** Row lookup over `dim` columns. */
export function createEmbedding(gpu: Gpu, { dim }: { dim: number }) {
  const kernel = new Kernel(gpu, "embedding", widen(gpu, source, dim));
  return {
    /** `out[r] = table[ids[rows.first + r] − first]` for the ids that this slice of the table holds. */
    gather: (t: { rows: Rows; ids: Tensor; table: Tensor; out: Tensor; first?: number }): Dispatch =>
      kernel.record("gather", {
        constants: { DIM: dim, TYPE: FLOAT_TYPE[t.table.dtype]!, FIRST: t.first ?? 0, COUNT: t.table.shape[0]! },
        bind: { rows: t.rows.buffer, ids: t.ids, table: t.table, half_table: t.table, out: t.out },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** `out[ids[rows.first + r]] = x[r]`; the ids are distinct. */
    scatter: (t: { rows: Rows; ids: Tensor; x: Tensor; out: Tensor }): Dispatch =>
      kernel.record("scatter", {
        constants: { DIM: dim },
        bind: { rows: t.rows.buffer, ids: t.ids, x: t.x, out: t.out },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /**
     * Adds to `dtable` the rows of `x` whose token is each id. `ids` holds the distinct ids (`rows` of them), `order` the
     * token positions sorted by id, `starts` where each id's positions begin in it.
     */
    backward: (
      t: { rows: Rows; ids: Tensor; order: Tensor; starts: Tensor; x: Tensor; dtable: Tensor; first?: number },
    ): Dispatch =>
      kernel.record("backward", {
        constants: { DIM: dim, FIRST: t.first ?? 0, COUNT: t.dtable.shape[0]! },
        bind: { rows: t.rows.buffer, ids: t.ids, order: t.order, starts: t.starts, x: t.x, dtable: t.dtable },
        grid: () => {
          const [x, y] = fold(t.rows.count) ?? [0, 0];
          return [x, y, Math.ceil(dim / (4 * wideOf(gpu, dim)) / laneCount(gpu))];
        },
      }),
  };
}
