/** Binding of swiglu.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import { groupsOf, widen } from "../gpu/wide.ts";
import source from "../../kernels/swiglu.wgsl" with { type: "text" };

/** SiLU-gated product over fused `[gate up]` rows of `2 · dim` columns (arXiv:2002.05202). */
export function createSwiglu(gpu: Gpu, { dim }: { dim: number }) {
  const kernel = new Kernel(gpu, "swiglu", widen(gpu, source, dim));
  return {
    /** `out = silu(gate) · up`; gateUp `[rows, 2·dim]`, out `[rows, dim]`. */
    forward: (t: { rows: Rows; gateUp: Tensor; out: Tensor }): Dispatch =>
      kernel.record("forward", {
        constants: { DIM: dim },
        bind: { rows: t.rows.buffer, gate_up: t.gateUp, out: t.out },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
    /** Turns `gateUp` `[rows, 2·dim]` into its own gradient, in place. */
    backward: (t: { rows: Rows; gateUp: Tensor; dout: Tensor }): Dispatch =>
      kernel.record("backward", {
        constants: { DIM: dim },
        bind: { rows: t.rows.buffer, gate_up: t.gateUp, dout: t.dout },
        grid: () => fold(groupsOf(gpu, t.rows.count)),
      }),
  };
}
