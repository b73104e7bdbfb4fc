/** Binding of attention.wgsl: names, shapes and grids; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import source from "../../kernels/attention.wgsl" with { type: "text" };
import partsSource from "../../kernels/attention_parts.wgsl" with { type: "text" };

/** Lanes of a workgroup on a GPU: two warps share a tile. */
const GPU_LANES = 64;

/** Causal grouped-query attention inside documents (arXiv:2205.14135). `headDim` is a multiple of 8, at most 128. */
export function createAttention(gpu: Gpu, shape: { heads: number; kvHeads: number; headDim: number }) {
  const { heads, kvHeads, headDim } = shape;
  if (headDim % 8 || headDim > 128) {
    throw new RangeError(`Cannot attend with heads of ${headDim} columns: a multiple of 8 up to 128 is wanted`);
  }
  const kernel = new Kernel(gpu, "attention", `${source}\n${partsSource}`);
  const subgroup = gpu.lanes === "subgroup", lanes = subgroup ? gpu.subgroup : GPU_LANES, columns = headDim / 4;
  /** Constants of an entry point and the rows of its workgroups. */
  const formOf = (entry: Entry) => {
    const shape = subgroup ? cpuShape(lanes, columns, entry) : gpuShape(gpu, columns, entry);
    const { ROWS, PARTS } = shape;
    return {
      constants: { LANES: lanes, HEADS: heads, KV_HEADS: kvHeads, D4: columns, ...shape },
      rows: ROWS * lanes / PARTS,
    };
  };
  return {
    /** qkv `[rows, (H+2·KV)·D]` after rope, spans `[rows, 2]` u32; writes out `[rows, H·D]` and lse `[rows, H]`. */
    forward: (t: { rows: Rows; qkv: Tensor; spans: Tensor; out: Tensor; lse: Tensor }): Dispatch => {
      const { constants, rows } = formOf("forward");
      return kernel.record("forward", {
        constants,
        bind: { rows: t.rows.buffer, qkv: t.qkv, spans: t.spans, out: t.out, lse: t.lse },
        grid: () => [Math.ceil(t.rows.count / rows), heads, 1],
      });
    },
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
      const record = (entry: "backward_q" | "backward_kv", more: Record<string, Tensor>) => {
        const form = formOf(entry);
        return kernel.record(entry, {
          constants: form.constants,
          bind: { ...common, ...more },
          grid: () => [Math.ceil(rows.count / form.rows), entry === "backward_q" ? heads : kvHeads, 1],
        });
      };
      return [
        record("backward_q", { given_out: out, delta }),
        record("backward_kv", { given_delta: delta }),
      ];
    },
  };
}

type Entry = "forward" | "backward_q" | "backward_kv";

/** How the kernel is cut: see its overrides. */
interface Shape extends Record<string, number> {
  readonly ROWS: number;
  readonly PARTS: number;
  readonly SHARE: number;
  readonly SOME: number;
}

/** A CPU driver is fastest with the most rows and keys for which the code of a loop fits its instruction cache. */
function cpuShape(lanes: number, columns: number, entry: Entry): Shape {
  const keys = columns <= (entry === "forward" ? 16 : 8) ? 4 : 2;
  let share = lanes / keys;
  while (columns % share) share /= 2;
  return { ROWS: columns <= 16 ? 2 : 1, PARTS: 1, SHARE: share, SOME: Math.min(lanes / share, 8) };
}

/**
 * On a GPU two rows per lane read workgroup memory half as often as one; their columns go to so many lanes that what a lane
 * sums and multiplies takes 128 registers, and that the tile fits into workgroup memory.
 */
function gpuShape(gpu: Gpu, columns: number, entry: Entry): Shape & { readonly LANE_SLOTS: number } {
  const held = entry === "forward" ? 2 : 4, most = gpu.limits.maxComputeWorkgroupStorageSize;
  const shapes = [[2, 1], [2, 2], [2, 4], [1, 1], [1, 2], [1, 4], [2, 8], [1, 8]] as const;
  for (const [rows, parts] of shapes) {
    const some = entry === "forward" ? 16 / rows : 8 / rows;
    const share = parts === 1 ? 2 : parts;
    const sums = parts === 1 ? 0 : (entry === "forward" ? 1 : 2) * rows * some / 4;
    const slots = 2 * columns / share + (entry === "backward_kv" ? 1 : 0) + sums;
    const fits = columns % parts === 0 && held * rows * columns / parts <= 32 && slots * GPU_LANES * 16 <= most;
    if (fits) return { ROWS: rows, PARTS: parts, SHARE: share, SOME: some, LANE_SLOTS: slots };
  }
  const width = 4 * columns;
  throw new RangeError(
    `Cannot attend with heads of ${width} columns on this GPU: no share of them fits a lane's registers and ${most} bytes of ` +
      "workgroup memory",
  );
}
