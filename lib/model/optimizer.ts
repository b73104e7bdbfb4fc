/**
 * The optimizer of a run: parameter groups, their moments, and the commands of one update. Which tensors keep 8-bit moments
 * follows bitsandbytes: those of at least 4,096 elements, never an embedding.
 */
import { dynamicMap } from "../data/blockwise8.ts";
import type { Gpu } from "../gpu/device.ts";
import type { Command } from "../gpu/kernel.ts";
import { createBuffer, createTensor, type Tensor, upload } from "../gpu/tensor.ts";
import {
  type Convention,
  createAdamw,
  createBlocks,
  packStep,
  type ParameterSlot,
  type StepValues,
} from "../ops/adamw.ts";

/** Tensors that lie in one buffer, and the buffer of their gradients. */
export interface ParameterGroup {
  readonly name: string;
  readonly param: Tensor;
  readonly grad: Tensor;
  readonly slots: readonly ParameterSlot[];
  /** False for norms: no weight decay. */
  readonly decay: boolean;
  /** Embeddings keep 32-bit moments. */
  readonly embedding?: boolean;
}

/** `adamw` follows torch.optim.AdamW, `adamw_8bit` bitsandbytes' CUDA kernels. */
export type OptimizerKind = "adamw" | "adamw_8bit";

/** Tensors below this size keep 32-bit moments (bitsandbytes `min_8bit_size`). */
const MIN_8BIT = 4096;

/** A recorded update. */
export interface Optimizer {
  /** Sets the numbers of the next update. */
  prepare(values: StepValues): void;
  /** Norm, clipping and AdamW over all groups. */
  readonly commands: readonly Command[];
  /** Moments as stored, by name: what a checkpoint has to hold. */
  readonly state: ReadonlyMap<string, Tensor>;
  /** Gradient norms of the last updates. */
  readonly norms: Tensor;
}

/** Allocates moments and records the update of `groups`; `ring` is how many norms are remembered. */
export async function createOptimizer(
  gpu: Gpu,
  { groups, kind, ring }: { groups: readonly ParameterGroup[]; kind: OptimizerKind; ring: number },
): Promise<Optimizer> {
  const convention: Convention = kind === "adamw" ? "torch" : "bitsandbytes";
  const adamw = createAdamw(gpu, convention);
  const state = new Map<string, Tensor>();
  const keep = (name: string, shape: readonly number[], dtype: "f32" | "u8" = "f32") => {
    const tensor = createTensor(gpu, { name, shape, dtype });
    state.set(name, tensor);
    return tensor;
  };
  const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
  const uniform = (label: string) => createBuffer(gpu, { label, size: 48, usage });
  const step = uniform("step"), stepWithoutDecay = uniform("step without decay");
  const norm = createTensor(gpu, { name: "grad_norm", shape: [4] });
  const norms = createTensor(gpu, { name: "grad_norms", shape: [ring] });
  const maps = createTensor(gpu, { name: "dynamic_maps", shape: [256, 2] });
  const signed = dynamicMap(true), unsigned = dynamicMap(false);
  await upload(gpu, maps, new Float32Array(512).map((_, i) => (i % 2 ? unsigned : signed)[i >> 1]!));

  const parts = groups.reduce((sum, { grad }) => sum + adamw.parts(grad), 0);
  const partial = createTensor(gpu, { name: "norm.partial", shape: [parts] });
  const commands: Command[] = [];
  let part = 0;
  for (const { grad } of groups) {
    commands.push(adamw.sumSquares({ grad, partial, part }));
    part += adamw.parts(grad);
  }
  commands.push(adamw.clip({ step, partial, parts, norm, norms }));
  for (const { name, param, grad, slots, decay, embedding = false } of groups) {
    const is8 = (slot: ParameterSlot) => kind === "adamw_8bit" && !embedding && slot.elements >= MIN_8BIT;
    const common = { step: decay ? step : stepWithoutDecay, norm, grad, param };
    const blocks32 = await createBlocks(gpu, { name: `${name}.blocks32`, slots: slots.filter((slot) => !is8(slot)) });
    if (blocks32) {
      const state1 = keep(`${name}.exp_avg`, param.shape), state2 = keep(`${name}.exp_avg_sq`, param.shape);
      commands.push(adamw.step32({ ...common, blocks: blocks32, state1, state2 }));
    }
    const blocks = await createBlocks(gpu, { name: `${name}.blocks8`, slots: slots.filter(is8) });
    if (blocks) {
      const count = blocks.shape[0]!;
      const codes1 = keep(`${name}.state1`, [count, 256], "u8"), codes2 = keep(`${name}.state2`, [count, 256], "u8");
      const absmax = keep(`${name}.absmax`, [count, 2]);
      commands.push(adamw.step8({ ...common, blocks, codes1, codes2, absmax, maps }));
    }
  }
  return {
    prepare(values) {
      gpu.queue.writeBuffer(step, 0, packStep(values, convention));
      gpu.queue.writeBuffer(stepWithoutDecay, 0, packStep({ ...values, weightDecay: 0 }, convention));
    },
    commands,
    state,
    norms,
  };
}

/** Puts moments back. Throws where a name or a size differs: the run was set up otherwise. */
export async function writeState(
  gpu: Gpu,
  { optimizer, state }: { optimizer: Optimizer; state: ReadonlyMap<string, Uint8Array> },
): Promise<void> {
  for (const [name, tensor] of optimizer.state) {
    const bytes = state.get(name);
    if (!bytes || bytes.length !== tensor.bytes) {
      throw new Error(
        `Cannot resume: the checkpoint holds ${
          bytes?.length ?? "no"
        } bytes of "${name}": ${tensor.bytes} are wanted: ` +
          `use the settings that the run was started with`,
      );
    }
    await upload(gpu, tensor, bytes);
  }
}
