/** Binding of attention.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, type Rows } from "../gpu/kernel.ts";
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
  const lanes = gpu.lanes === "subgroup" ? gpu.subgroup : fits >= 32 ? 32 : 16;
  // A CPU driver takes minutes to compile many reads of workgroup memory.
  const keys = gpu.lanes === "shared" && gpu.cpu ? 2 : 8;
  const slots = (n: number): Record<string, number> => gpu.lanes === "shared" ? { LANE_SLOTS: n } : {};
  // What was fastest on a CPU driver; a GPU wants the registers for more threads.
  const some = gpu.lanes === "shared" ? 1 : headDim > 32 ? 2 : 4;
  const constants = { LANES: lanes, HEADS: heads, KV_HEADS: kvHeads, D4: headDim / 4 };
  const tiles = (rows: Rows) => Math.ceil(rows.count / lanes);
  return {
    /** qkv `[rows, (H+2·KV)·D]` after rope, spans `[rows, 2]` u32; writes out `[rows, H·D]` and lse `[rows, H]`. */
    forward: (t: { rows: Rows; qkv: Tensor; spans: Tensor; out: Tensor; lse: Tensor }): Dispatch =>
      kernel.record("forward", {
        constants: { ...constants, ...slots(headDim / 2), KEYS: keys },
        bind: { rows: t.rows.buffer, qkv: t.qkv, spans: t.spans, out: t.out, lse: t.lse },
        grid: () => [tiles(t.rows), heads, 1],
      }),
    /** Writes dqkv `[rows, (H+2·KV)·D]` in three dispatches; delta `[rows, H]` is scratch. */
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
      const common = { rows: rows.buffer, qkv, spans, lse, dout, delta, dqkv };
      return [
        kernel.record("make_delta", {
          constants: { ...constants, ...slots(1) },
          bind: { rows: rows.buffer, dout, out, delta },
          grid: () => fold(Math.ceil(rows.count * heads / lanes)),
        }),
        kernel.record("backward_q", {
          constants: { ...constants, ...slots(headDim / 2), SOME: some },
          bind: common,
          grid: () => [tiles(rows), heads, 1],
        }),
        kernel.record("backward_kv", {
          constants: { ...constants, ...slots(headDim / 2 + 1), SOME: some },
          bind: common,
          grid: () => [tiles(rows), kvHeads, 1],
        }),
      ];
    },
  };
}
