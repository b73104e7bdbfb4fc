/** Binding of attention.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import source from "../../kernels/attention.wgsl" with { type: "text" };

/** Causal grouped-query attention inside documents (arXiv:2205.14135). `headDim` is a multiple of 8, at most 128. */
export function createAttention(gpu: Gpu, shape: { heads: number; kvHeads: number; headDim: number }) {
  const { heads, kvHeads, headDim } = shape;
  if (headDim % 8 || headDim > 128) {
    throw new RangeError(`Cannot attend with heads of ${headDim} columns: a multiple of 8 up to 128 is wanted`);
  }
  const kernel = new Kernel(gpu, "attention", source);
  // What a lane keeps for the others must fit into workgroup memory: with wide heads on small devices fewer lanes do.
  const fits = gpu.limits.maxComputeWorkgroupStorageSize / (16 * (headDim / 2 + 1) + 4);
  const subgroup = gpu.lanes === "subgroup";
  const lanes = subgroup ? gpu.subgroup : fits >= 32 ? 32 : 16;
  // A CPU driver is fastest with the most rows and keys for which the code of a loop fits its instruction cache; a GPU
  // wants the registers for more threads.
  const perLane = subgroup && headDim <= 64 ? 2 : 1;
  /** Constants for tiles of `rows` rows, or of more where so many lanes cannot share the columns of a row. */
  const tile = (rows: number): Record<string, number> => {
    let share = lanes / rows;
    while (headDim / 4 % share) share /= 2;
    return { ROWS: perLane, SHARE: share, SOME: Math.min(lanes / share, 8) };
  };
  const shared = (slots: number, some: number): Record<string, number> => ({ LANE_SLOTS: slots, SOME: some });
  const constants = { LANES: lanes, HEADS: heads, KV_HEADS: kvHeads, D4: headDim / 4 };
  const blocks = (rows: Rows) => Math.ceil(rows.count / (lanes * perLane));
  return {
    /** qkv `[rows, (H+2·KV)·D]` after rope, spans `[rows, 2]` u32; writes out `[rows, H·D]` and lse `[rows, H]`. */
    forward: (t: { rows: Rows; qkv: Tensor; spans: Tensor; out: Tensor; lse: Tensor }): Dispatch =>
      kernel.record("forward", {
        // A CPU driver takes minutes to compile many reads of workgroup memory.
        constants: { ...constants, ...(subgroup ? tile(headDim <= 64 ? 4 : 2) : shared(headDim / 2, gpu.cpu ? 2 : 8)) },
        bind: { rows: t.rows.buffer, qkv: t.qkv, spans: t.spans, out: t.out, lse: t.lse },
        grid: () => [blocks(t.rows), heads, 1],
      }),
    /** Writes dqkv `[rows, (H+2·KV)·D]` in two dispatches; delta `[rows, H]` is scratch. */
    backward: (
      t: {
        rows: Rows;
        qkv: Tensor;
        spans: Tensor;
        out: Tensor;
        lse: Tensor;
        dout: Tensor;
        delta: Tensor;
        dqkv: Tensor;
      },
    ): Dispatch[] => {
      const { rows, qkv, spans, out, lse, dout, delta, dqkv } = t;
      const common = { rows: rows.buffer, qkv, spans, given_lse: lse, dout, dqkv };
      const back = (slots: number) => ({
        ...constants,
        ...(subgroup ? tile(headDim <= 32 ? 4 : 2) : shared(slots, 1)),
      });
      return [
        kernel.record("backward_q", {
          constants: back(headDim / 2),
          bind: { ...common, given_out: out, delta },
          grid: () => [blocks(rows), heads, 1],
        }),
        kernel.record("backward_kv", {
          constants: back(headDim / 2 + 1),
          bind: { ...common, given_delta: delta },
          grid: () => [blocks(rows), kvHeads, 1],
        }),
      ];
    },
  };
}
