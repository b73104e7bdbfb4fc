/**
 * Training as updates: micro-batches accumulated into one step of the optimizer, losses and norms read back some updates
 * later in one go. When to evaluate, save or stop is the script's business.
 */
import { hash32 } from "../data/random.ts";
import type { Gpu } from "../gpu/device.ts";
import type { Command } from "../gpu/kernel.ts";
import { profile, run, type Timing } from "../gpu/program.ts";
import { destroyOwned, download, own, ownedBytes, upload } from "../gpu/tensor.ts";
import { Llama, type LlamaOptions, type MicroBatch, RING } from "./llama.ts";
import { evaluate, type EvaluationResult, type EvaluationRows } from "./perplexity.ts";
import { planBytes } from "./plan.ts";
import { createOptimizer, type Optimizer, type OptimizerKind, writeState } from "./optimizer.ts";

/** What does not change from update to update. */
export interface Hyperparameters {
  readonly optimizer: OptimizerKind;
  readonly weightDecay: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  /** 0 leaves gradients alone. */
  readonly maxGradNorm: number;
  /** Of dropout; 0 unless given. */
  readonly seed?: number;
}

/** One update as it is logged; `loss` in nats per labelled token, `gradNorm` before clipping. */
export interface UpdateResult {
  readonly step: number;
  readonly loss: number;
  readonly gradNorm: number;
  /** Labelled tokens that the loss averages over. */
  readonly tokens: number;
}

/**
 * Throws where the loss or the norm of an update over `rows` of the dataset is no finite number, with what may help: the loss
 * of update 1 is that of the model as it came, which no rate has touched.
 */
export function checkUpdate(
  { step, loss, gradNorm }: Pick<UpdateResult, "step" | "loss" | "gradNorm">,
  { rows, maxGradNorm }: { readonly rows: readonly number[]; readonly maxGradNorm: number },
): void {
  if (Number.isFinite(loss) && Number.isFinite(gradNorm)) return;
  const state = `the loss of update ${step} is ${loss} and its gradient norm ${gradNorm}`;
  const calmer = maxGradNorm > 0 ? "lower --learning-rate" : "lower --learning-rate, clip with --max-grad-norm 1";
  const remedy = step === 1 ? "nothing was learnt yet: look at the weights of the model and of the adapter" : calmer;
  throw new Error(`Cannot go on: ${state}: ${remedy}, or look at its rows, ${rows.join(", ")}`);
}

/** Throws where the validation loss after update `step` is no finite number; 0 is the model as it came. */
export function checkEvaluation(evalLoss: number, { step, model }: { step: number; model: string }): void {
  if (Number.isFinite(evalLoss)) return;
  if (step > 0) {
    throw new Error(`Cannot go on: the validation loss after update ${step} is ${evalLoss}: lower --learning-rate`);
  }
  const state = `its validation loss before the first update is ${evalLoss}`;
  throw new Error(`Cannot train "${model}": ${state}: look at its weights, at those of the adapter, and at the rows`);
}

/** Labelled tokens of micro-batches. */
export function labelledTokens(batches: readonly MicroBatch[]): number {
  let count = 0;
  for (const { targets } of batches) for (let i = 0; i < targets.length; i++) if (targets[i]! >= 0) count++;
  return count;
}

/** A model in training. */
export class Trainer {
  readonly llama: Llama;
  readonly optimizer: Optimizer;
  /** Owns what the optimizer is made of. */
  readonly #gpu: Gpu;
  readonly #hyper: Hyperparameters;
  #pending: { step: number; tokens: number }[] = [];

  private constructor(
    llama: Llama,
    { gpu, optimizer, hyper }: { gpu: Gpu; optimizer: Optimizer; hyper: Hyperparameters },
  ) {
    this.llama = llama;
    this.optimizer = optimizer;
    this.#gpu = gpu;
    this.#hyper = hyper;
  }

  /** Opens the model for training and allocates the optimizer's state. */
  static async open(options: LlamaOptions & { readonly hyper: Hyperparameters }): Promise<Trainer> {
    const llama = await Llama.open(options);
    const gpu = own(llama.gpu), { hyper } = options;
    const optimizer = await createOptimizer(gpu, { groups: llama.groups, kind: hyper.optimizer, ring: RING });
    return new Trainer(llama, { gpu, optimizer, hyper });
  }

  /** Frees the model and all that was made to train it. */
  destroy(): void {
    destroyOwned(this.#gpu);
    this.llama.destroy();
  }

  /** Parameters that learn. */
  get trainable(): number {
    return this.llama.groups.flatMap(({ slots }) => slots).reduce((sum, { elements }) => sum + elements, 0);
  }

  /** Bytes on the GPU by what they are for: together all that was made for the model and for training it. */
  memory(): Record<string, number> {
    const { gpu, weights, lora, groups, plan } = this.llama;
    const size = (tensors: Iterable<{ readonly bytes: number }>) => [...tensors].reduce((sum, t) => sum + t.bytes, 0);
    const { kept, scratch, batch } = planBytes(plan);
    const named = {
      weights: size(weights.tensors),
      adapter: size((lora ?? []).map(({ params }) => params)),
      gradients: size(groups.map(({ grad }) => grad)),
      "optimizer state": size(this.optimizer.state.values()),
      "kept activations": kept,
      "scratch and batch": scratch + batch,
    };
    const [model, training] = [ownedBytes(gpu), ownedBytes(this.#gpu)], images = model.images + training.images;
    const rest = model.buffers + training.buffers - Object.values(named).reduce((sum, n) => sum + n, 0);
    // Rotation angles, blocks of the optimizer, 8-bit maps, token order, and the sizes that each dispatch is given.
    return { ...named, "tables and sizes": rest, ...(images > 0 ? { "images of these": images } : {}) };
  }

  /**
   * One update, number `step` from 1 on. Gradients are those of the mean loss over all labelled tokens of `batches`. Its
   * result waits for `read`, with those of at most `RING` updates.
   */
  update(batches: readonly MicroBatch[], at: { step: number; learningRate: number }): void {
    for (const commands of this.#programs(batches, at)) run(this.llama.gpu, commands);
  }

  /** The same update, to the same bits, and when each of its dispatches ran; slower. Waits for the GPU. */
  async profile(batches: readonly MicroBatch[], at: { step: number; learningRate: number }): Promise<Timing[]> {
    const timings: Timing[] = [];
    for (const commands of this.#programs(batches, at)) {
      const last = timings.at(-1), from = last ? last.start + last.ms : 0;
      const part = await profile(this.llama.gpu, commands);
      timings.push(...part.map((timing) => ({ ...timing, start: timing.start + from })));
    }
    return timings;
  }

  /** The programs of an update, one per micro-batch; what each reads is uploaded when it is asked for. */
  *#programs(
    batches: readonly MicroBatch[],
    { step, learningRate }: { step: number; learningRate: number },
  ): Generator<readonly Command[]> {
    if (this.#pending.length === RING) throw new Error("Cannot update: losses of earlier updates must be read first");
    const tokens = labelledTokens(batches), slot = this.#pending.length;
    if (tokens === 0) throw new Error(`Cannot learn from update ${step}: none of its tokens has a label`);
    this.optimizer.prepare({ ...this.#hyper, learningRate, step, slot });
    for (const [i, batch] of batches.entries()) {
      const draw = hash32(this.#hyper.seed ?? 0, step, i);
      const commands = this.llama.accumulation(batch, { items: tokens, slot, draw });
      const before = i === 0 ? this.llama.clearing : [], last = i === batches.length - 1;
      yield [...before, ...commands, ...(last ? this.optimizer.commands : [])];
    }
    this.#pending.push({ step, tokens });
  }

  /** Results of the updates since the last call; a run that went astray shows as NaN. Waits for the GPU. */
  async read(): Promise<UpdateResult[]> {
    // Both are asked for at once: a device that is waited for twice stands still in between.
    const [sums, norms] = await Promise.all([
      this.llama.losses(),
      download(this.llama.gpu, this.optimizer.norms),
    ]);
    const results = this.#pending.map(({ step, tokens }, slot) => ({
      step,
      tokens,
      loss: sums[slot]! / tokens,
      gradNorm: norms[slot]!,
    }));
    this.#pending = [];
    return results;
  }

  /** Loss over micro-batches without learning. */
  evaluate(on: EvaluationRows): Promise<EvaluationResult> {
    if (this.#pending.length > 0) throw new Error("Cannot evaluate: losses of earlier updates must be read first");
    return evaluate(this.llama, on);
  }

  /** Puts parameters and moments back, bit for bit. */
  async restore(
    { parameters, state }: {
      parameters: ReadonlyMap<string, Uint8Array>;
      state: ReadonlyMap<string, Uint8Array>;
    },
  ): Promise<void> {
    const { gpu, groups } = this.llama;
    for (const { name, param } of groups) {
      const bytes = parameters.get(name);
      if (bytes?.length !== param.bytes) {
        throw new Error(
          `Cannot resume: the checkpoint holds ${bytes?.length ?? "no"} bytes of "${name}": ${param.bytes} are wanted`,
        );
      }
      await upload(gpu, param, bytes);
    }
    await writeState(gpu, { optimizer: this.optimizer, state });
  }
}
