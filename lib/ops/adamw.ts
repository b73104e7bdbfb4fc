/** Binding of adamw.wgsl: the gradient's norm and clipping, and AdamW with 32- or 8-bit state. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel } from "../gpu/kernel.ts";
import { createTensor, type Tensor, upload } from "../gpu/tensor.ts";
import { groupsOf, widen } from "../gpu/wide.ts";
import source from "../../kernels/adamw.wgsl" with { type: "text" };

/** Elements per optimizer block, as in bitsandbytes since 0.44. */
export const BLOCK = 256;

/** One tensor inside a parameter buffer. */
export interface ParameterSlot {
  readonly name: string;
  /** First element in the buffer. */
  readonly offset: number;
  readonly elements: number;
  /** Rows of `columns` elements lie `stride` apart; equal when contiguous. */
  readonly columns: number;
  readonly stride: number;
}

/** Per-update numbers. */
export interface StepValues {
  readonly learningRate: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  /** Updates done, this one included: t of the bias correction. */
  readonly step: number;
  /** 0 leaves gradients alone. */
  readonly maxGradNorm: number;
  /** Where the norm goes in `norms`. */
  readonly slot: number;
}

/** Which library's arithmetic is followed. */
export type Convention = "torch" | "bitsandbytes";

/** Packs a step's numbers as adamw.wgsl's `Step`, rounded where the followed library rounds. */
export function packStep(v: StepValues, convention: Convention): Float32Array<ArrayBuffer> {
  // torch computes these in 64 bits, bitsandbytes' CUDA code step by step in 32.
  const rounded = convention === "torch" ? (x: number) => x : Math.fround;
  const b1 = rounded(v.beta1), b2 = rounded(v.beta2);
  const c1 = 1 - rounded(b1 ** v.step), c2 = Math.sqrt(rounded(1 - rounded(b2 ** v.step)));
  return new Float32Array([
    v.learningRate,
    v.beta1,
    v.beta2,
    v.eps,
    v.weightDecay,
    c1,
    c2,
    v.maxGradNorm,
    v.slot,
    1 - b1,
    1 - b2,
    0,
  ]);
}

/** The block table of some tensors of a parameter buffer: u32 `[blocks, 4]`. Throws where a row is too long for it. */
export function blockTable(slots: readonly ParameterSlot[]): Uint32Array<ArrayBuffer> {
  const rows: number[] = [];
  for (const { name, offset, elements, columns, stride } of slots) {
    const padded = stride !== columns;
    if (padded && Math.max(columns, stride) > 0xffff) {
      throw new RangeError(`Cannot optimize "${name}": padded rows of ${stride} columns are longer than 65535`);
    }
    for (let first = 0; first < elements; first += BLOCK) {
      rows.push(offset, first, Math.min(BLOCK, elements - first), padded ? columns + stride * 65536 : 0);
    }
  }
  return new Uint32Array(rows);
}

/** A block table on the GPU. */
export interface Blocks extends Tensor {
  /** Whether all rows, or tensors where they have no gaps, begin at multiples of 8 elements and share no 8 of them. */
  readonly aligned: boolean;
}

/** Uploads a block table under `name`; null when there is nothing in it. */
export async function createBlocks(
  gpu: Gpu,
  { name, slots }: { name: string; slots: readonly ParameterSlot[] },
): Promise<Blocks | null> {
  const table = blockTable(slots);
  if (table.length === 0) return null;
  const tensor = createTensor(gpu, { name, shape: [table.length / 4, 4], dtype: "u32" });
  await upload(gpu, tensor, table);
  const aligned = slots.every(({ offset, columns, stride }) =>
    offset % 8 === 0 && (columns === stride || columns % 8 === 0 && stride % 8 === 0)
  );
  return { ...tensor, aligned };
}

/** What both kinds of update work on: `grad` has `param`'s layout. */
interface Shared {
  readonly step: GPUBuffer;
  readonly norm: Tensor;
  readonly blocks: Blocks;
  readonly grad: Tensor;
  readonly param: Tensor;
}

/** AdamW over parameter buffers, in the arithmetic of `convention`. */
export function createAdamw(gpu: Gpu, convention: Convention) {
  const narrow = new Kernel(gpu, "adamw", source), wide = new Kernel(gpu, "adamw", widen(gpu, source, 8));
  const kernelFor = (t: Tensor) => t.bytes % 32 === 0 ? wide : narrow;
  const after = { DECAY_AFTER: convention === "torch" ? 0 : 1 };
  const count = (t: Tensor) => t.shape.reduce((product, n) => product * n, 1);
  return {
    /** Workgroups, and so partial sums, that `sumSquares` makes of `grad`. */
    parts: (grad: Tensor): number => Math.ceil(count(grad) / 4096),
    /** `partial[part …] =` sums of squares of `grad`. */
    sumSquares: (t: { grad: Tensor; partial: Tensor; part: number }): Dispatch =>
      kernelFor(t.grad).record("sum_squares", {
        bind: { grad: t.grad, partial: t.partial },
        dims: { part: t.part, count: count(t.grad) },
        grid: fold(Math.ceil(count(t.grad) / 4096)),
      }),
    /** Norm and clipping coefficient from `parts` partial sums into `norm` `[4]`, and the norm into `norms[slot]`. */
    clip: (t: { step: GPUBuffer; partial: Tensor; parts: number; norm: Tensor; norms: Tensor }): Dispatch =>
      narrow.record("clip", {
        bind: { step: t.step, partial: t.partial, norm: t.norm, norms: t.norms },
        dims: { part: 0, count: t.parts },
        grid: [1, 1, 1],
      }),
    /** One update of the tensors of `blocks`, moments in f32 buffers of `param`'s layout. */
    step32: (
      { step, norm, blocks, grad, param, state1, state2 }: Shared & { state1: Tensor; state2: Tensor },
    ): Dispatch => {
      const each = blocks.aligned ? "" : "_each";
      return kernelFor(param).record(`step32${each}`, {
        constants: after,
        bind: {
          step,
          norm,
          blocks,
          [`grad${each}`]: grad,
          [`param${each}`]: param,
          [`state1${each}`]: state1,
          [`state2${each}`]: state2,
        },
        grid: fold(groupsOf(gpu, blocks.shape[0]!)),
      });
    },
    /** One update with 8-bit moments; codes u8 `[blocks, 256]`, absmax f32 `[blocks, 2]`, maps f32 `[256, 2]`. */
    step8: (
      { blocks, grad, param, ...rest }: Shared & { codes1: Tensor; codes2: Tensor; absmax: Tensor; maps: Tensor },
    ): Dispatch => {
      const each = blocks.aligned ? "" : "_each";
      return kernelFor(param).record(`step8${each}`, {
        constants: after,
        bind: { ...rest, blocks, [`grad${each}`]: grad, [`param${each}`]: param },
        grid: fold(groupsOf(gpu, blocks.shape[0]!)),
      });
    },
  };
}
