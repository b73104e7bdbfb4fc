/** What a model is made of before buffers are planned for a use of it: training and evaluation, or writing answers. */
import { type Gpu, openGpu } from "../gpu/device.ts";
import { destroyOwned, own } from "../gpu/tensor.ts";
import { type Adapter, readAdapter } from "./adapter.ts";
import { type ModelConfig, readConfig } from "./config.ts";
import { createLora, type LayerLora } from "./lora.ts";
import { createOps, type Ops } from "./ops.ts";
import { planWeights, type WeightOptions, type Weights } from "./weights.ts";

/** A model on a device. */
export interface ModelParts {
  /** Owns the weights, the adapter, and whatever else is made through it: all of it is freed by `destroyParts`. */
  readonly gpu: Gpu;
  readonly config: ModelConfig;
  readonly ops: Ops;
  readonly weights: Weights;
  /** The adapter, layer by layer. */
  readonly lora: readonly LayerLora[] | undefined;
}

/** Where a model is, and how its weights are held. */
export interface PartsOptions extends WeightOptions {
  /** A model folder, dense or 4-bit. */
  readonly model: string;
  /** An adapter folder, or one already read. */
  readonly adapter?: string | Adapter | undefined;
  /** The device; the process's own by default. */
  readonly gpu?: Gpu | undefined;
}

/**
 * Opens a model; `fill` reads its weights, so that what works on them can be recorded before. `dropout` is the adapter's. Throws
 * where a file or a limit of the device stands against it.
 */
export async function openParts(
  options: PartsOptions,
): Promise<{ parts: ModelParts; dropout: number; fill: () => Promise<void> }> {
  const { model, trainable = false, resident = false } = options;
  const gpu = own(options.gpu ?? await openGpu()), config = readConfig(model);
  const adapter = typeof options.adapter === "string" ? readAdapter(options.adapter, config) : options.adapter;
  const ops = await createOps(gpu, config);
  const { weights, fill } = planWeights(gpu, { dir: model, config, trainable, resident });
  const lora = adapter && await createLora(gpu, { config, ...adapter });
  return { parts: { gpu, config, ops, weights, lora }, dropout: adapter?.lora.lora_dropout ?? 0, fill };
}

/** Frees weights, adapter, tables and what else was made for the model. */
export function destroyParts({ gpu }: ModelParts): void {
  destroyOwned(gpu);
}
