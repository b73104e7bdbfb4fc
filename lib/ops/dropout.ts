/** Binding of dropout.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import source from "../../kernels/dropout.wgsl" with { type: "text" };

/** Dropout with probability `p` (arXiv:1207.0580); `draw` is the uniform that names the micro-batch. */
export function createDropout(gpu: Gpu, { p, draw }: { p: number; draw: GPUBuffer }) {
  const kernel = new Kernel(gpu, "dropout", source);
  const record = (entry: string, t: { rows: Rows; x: Tensor; out: Tensor; dim: number; salt: number }): Dispatch =>
    kernel.record(entry, {
      constants: { DIM: t.dim, P: p, SALT: t.salt },
      bind: { rows: t.rows.buffer, draw, x: t.x, out: t.out },
      grid: () => fold(t.rows.count),
    });
  return {
    /** `out = dropout(x)`, both `[rows, dim]`; `salt` tells the places of the model apart. */
    apply: (t: { rows: Rows; x: Tensor; out: Tensor; dim: number; salt: number }) => record("apply", t),
    /** `dx += ` the gradient that reaches the input of `apply` when `y` is that of its output. */
    add: ({ y, dx, ...t }: { rows: Rows; y: Tensor; dx: Tensor; dim: number; salt: number }) =>
      record("add", { ...t, x: y, out: dx }),
  };
}

/** What `createDropout` makes. */
export type Dropout = ReturnType<typeof createDropout>;
