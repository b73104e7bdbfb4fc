/** Binding of rmsnorm.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, laneCount, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import { groupsOf, widen, wideOf } from "../gpu/wide.ts";
import source from "../../kernels/rmsnorm.wgsl" with { type: "text" };

/** Root-mean-square normalization over rows of `dim` columns (arXiv:1910.07467). */
export function createRmsnorm(gpu: Gpu, { dim, eps }: { dim: number; eps: number }) {
  const kernel = new Kernel(gpu, "rmsnorm", widen(gpu, source, dim));
  const constants = { DIM: dim };
  // A GPU has more lanes than a row has columns.
  const split: { SPLIT: number; LANE_SLOTS?: number } = gpu.lanes === "shared"
    ? { SPLIT: 16, LANE_SLOTS: 1 }
    : { SPLIT: 1 };
  return {
    /** `out = x · rstd · weight`; x, out `[rows, dim]`, weight `[dim]`, rstd `[rows]` is kept for backward. */
    forward: (t: { rows: Rows; x: Tensor; weight: Tensor; out: Tensor; rstd: Tensor }): Dispatch =>
      kernel.record("forward", {
        constants: { ...constants, EPS: eps },
        bind: { rows: t.rows.buffer, x: t.x, weight: t.weight, out: t.out, rstd: t.rstd },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** Adds the gradient of `x` to `dx`. */
    backward: (t: { rows: Rows; x: Tensor; weight: Tensor; rstd: Tensor; dout: Tensor; dx: Tensor }): Dispatch =>
      kernel.record("backward", {
        constants,
        bind: { rows: t.rows.buffer, x: t.x, weight: t.weight, rstd: t.rstd, dout: t.dout, dx: t.dx },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** Adds the gradient of `weight` to `dweight` `[dim]`. */
    backwardWeight: (t: { rows: Rows; x: Tensor; rstd: Tensor; dout: Tensor; dweight: Tensor }): Dispatch =>
      kernel.record("backward_weight", {
        constants: { ...constants, ...split },
        bind: { rows: t.rows.buffer, x: t.x, rstd: t.rstd, dout: t.dout, dweight: t.dweight },
        grid: [Math.ceil(dim / (4 * wideOf(gpu, dim)) / (laneCount(gpu) / split.SPLIT)), 1, 1],
      }),
  };
}
