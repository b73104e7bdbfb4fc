/** Binding of cross_entropy.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import { groupsOf, widen } from "../gpu/wide.ts";
import source from "../../kernels/cross_entropy.wgsl" with { type: "text" };

/** Token loss over `vocab` columns of logits whose rows are `stride` apart. */
export function createCrossEntropy(gpu: Gpu, { vocab, stride }: { vocab: number; stride: number }) {
  const kernel = new Kernel(gpu, "cross_entropy", widen(gpu, source, stride));
  const constants = { VOCAB: vocab, STRIDE: stride };
  return {
    /** Writes `nll[rows.first + r]` of the chunk's rows. */
    loss: (t: { rows: Rows; labels: Tensor; logits: Tensor; nll: Tensor }): Dispatch =>
      kernel.record("loss", {
        constants,
        bind: { rows: t.rows.buffer, labels: t.labels, logits: t.logits, nll: t.nll },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** The same, and turns `logits` into their gradient times `scale.x`. */
    backward: (t: { rows: Rows; scale: GPUBuffer; labels: Tensor; logits: Tensor; nll: Tensor }): Dispatch =>
      kernel.record("backward", {
        constants,
        bind: { rows: t.rows.buffer, scale: t.scale, labels: t.labels, logits: t.logits, nll: t.nll },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** Adds all of `nll[0 .. rows]` to `sums[scale.y]`. */
    total: (t: { rows: Rows; scale: GPUBuffer; nll: Tensor; sums: Tensor }): Dispatch =>
      kernel.record("total", {
        bind: { rows: t.rows.buffer, scale: t.scale, nll: t.nll, sums: t.sums },
        grid: [1, 1, 1],
      }),
  };
}
