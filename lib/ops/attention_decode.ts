/** Binding of attention_decode.wgsl: names, shapes and grids of the attention over cached keys and values; no arithmetic. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, laneCount, type Rows } from "../gpu/kernel.ts";
import { createTensor, type Tensor } from "../gpu/tensor.ts";
import source from "../../kernels/attention_decode.wgsl" with { type: "text" };

/** Sizes of the attention and of its cache. */
export interface AttentionDecodeShape {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Positions that the cache has for each sequence. */
  readonly context: number;
}

/** Keys and values of one layer, `[slots, KV, D / 4, context, 4]` each. */
export interface Cache {
  readonly keys: Tensor;
  readonly values: Tensor;
}

/** The slot of rows that are not stored. */
export const NO_SLOT = 0xffffffff;

/** Attention of one new token per sequence (arXiv:2305.13245). `headDim` is a multiple of 4, at most 128. */
export function createAttentionDecode(gpu: Gpu, { heads, kvHeads, headDim, context }: AttentionDecodeShape) {
  if (headDim % 4 || headDim > 128) {
    throw new RangeError(`Cannot attend with heads of ${headDim} columns: a multiple of 4 up to 128 is wanted`);
  }
  const kernel = new Kernel(gpu, "attention_decode", source);
  const shared = gpu.lanes === "shared";
  const constants = { LANES: laneCount(gpu), HEADS: heads, KV_HEADS: kvHeads, D4: headDim / 4, CONTEXT: context };
  // Workgroup memory for 8 vec4f of each lane; registers have room for all.
  const kept = shared ? [8, 7, 6, 5, 4, 3, 2, 1].find((n) => headDim / 4 % n === 0)! : headDim / 4;
  return {
    /** Allocates the cache of one layer for `slots` sequences. */
    cache(name: string, slots: number): Cache {
      const shape = [slots, kvHeads, headDim / 4, context, 4];
      return {
        keys: createTensor(gpu, { name: `${name}.keys`, shape }),
        values: createTensor(gpu, { name: `${name}.values`, shape }),
      };
    },
    /** Stores k and v of qkv `[rows, (H+2·KV)·D]` at slots and positions `[rows]` u32. */
    store: (t: { rows: Rows; qkv: Tensor; slots: Tensor; positions: Tensor } & Cache): Dispatch =>
      kernel.record("store", {
        constants,
        bind: {
          rows: t.rows.buffer,
          qkv: t.qkv,
          slots: t.slots,
          positions: t.positions,
          keys: t.keys,
          values: t.values,
        },
        grid: () => fold(t.rows.count),
      }),
    /** Stores likewise, one row per sequence, and writes out `[rows, H·D]`. */
    forward: (t: { rows: Rows; qkv: Tensor; slots: Tensor; positions: Tensor; out: Tensor } & Cache): Dispatch =>
      kernel.record("forward", {
        constants: { ...constants, KEPT: kept, ...(shared ? { LANE_SLOTS: kept } : {}) },
        bind: {
          qkv: t.qkv,
          slots: t.slots,
          positions: t.positions,
          keys: t.keys,
          values: t.values,
          out: t.out,
        },
        grid: () => [t.rows.count, heads, 1],
      }),
  };
}
