/**
 * The model as scripts see it: loaded onto the GPU with its buffers planned and its commands recorded, it evaluates and
 * trains on packed micro-batches. Explicit forward and backward, no tape: `layer.ts` and `head.ts` hold the mathematics.
 */
import { type Gpu, withinMemory } from "../gpu/device.ts";
import { type Command, createRows, type Rows } from "../gpu/kernel.ts";
import { compile, run } from "../gpu/program.ts";
import { createBuffer, createTensor, download, downloadBytes, type Tensor } from "../gpu/tensor.ts";
import { documentsOf } from "../ops/attention.ts";
import { createDropout } from "../ops/dropout.ts";
import { type ModelConfig, readConfig } from "./config.ts";
import { createFullGradients, type FullGradients } from "./full.ts";
import { createHead, type Head } from "./head.ts";
import { backward, dequantize, forward } from "./layer.ts";
import { type LayerLora, type LoraDropout, readSlots } from "./lora.ts";
import type { Ops } from "./ops.ts";
import type { ParameterGroup } from "./optimizer.ts";
import { destroyParts, type ModelParts, openParts, type PartsOptions } from "./parts.ts";
import { createPlan, headChunk, type Plan } from "./plan.ts";
import { chooseTiles, type ChosenTile, type TileCache } from "./tiles.ts";
import type { Weights } from "./weights.ts";

/** Packed documents: positions restart at 0 where one begins; `targets[i]` is the token that token i predicts, or −100. */
export interface MicroBatch {
  readonly inputIds: ArrayLike<number>;
  readonly positionIds: ArrayLike<number>;
  readonly targets: ArrayLike<number>;
}

/** How to open a model. */
export interface LlamaOptions extends Omit<PartsOptions, "trainable"> {
  /** `none` only evaluates; `lora` trains the adapter, `full` every weight. */
  readonly train?: "none" | "lora" | "full";
  /** Most tokens of a micro-batch. */
  readonly tokens: number;
  readonly checkpointing?: "none" | "block";
  /** Leave the gradient of the embedding's output in `plan.gradients.dx` although no adapter needs it: for checks. */
  readonly inputGradient?: boolean;
  /** Where measured tiles of the products are kept; without it they follow a rule. */
  readonly tiles?: TileCache;
  /** Called while tiles are measured. */
  readonly onTile?: (done: number, total: number) => void;
}

/** Sums of losses that are remembered on the GPU before they have to be read. */
export const RING = 64;

/** A loaded model. */
export class Llama implements ModelParts {
  readonly gpu: Gpu;
  readonly config: ModelConfig;
  readonly ops: Ops;
  readonly weights: Weights;
  readonly lora: readonly LayerLora[] | undefined;
  readonly plan: Plan;
  /** What learns, for the optimizer. */
  readonly groups: readonly ParameterGroup[];
  /** Tiles of the products that were chosen when the model was opened. */
  tiles: readonly ChosenTile[] = [];
  readonly #full: FullGradients | undefined;
  readonly #rows: Rows;
  readonly #head: Head;
  readonly #scale: GPUBuffer;
  /** Names the micro-batch to dropout. */
  readonly #draw: GPUBuffer;
  readonly #sums: Tensor;
  readonly #embed: readonly Command[];
  readonly #forward: readonly Command[];
  readonly #train: readonly Command[];

  private constructor(
    { gpu, config, ops, weights, lora, plan, full, dropout }: ModelParts & {
      plan: Plan;
      full: FullGradients | undefined;
      dropout: number;
    },
    { checkpointing, inputGradient }: { checkpointing: "none" | "block"; inputGradient: boolean },
  ) {
    this.gpu = gpu;
    this.config = config;
    this.ops = ops;
    this.weights = weights;
    this.lora = lora;
    this.plan = plan;
    this.#full = full;
    this.groups = full?.groups ?? (plan.gradients && lora ? loraGroups(lora) : []);
    this.#rows = createRows(gpu, "tokens");
    this.#sums = createTensor(gpu, { name: "nll_sums", shape: [RING] });
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    this.#scale = createBuffer(gpu, { label: "scale", size: 16, usage });
    this.#draw = createBuffer(gpu, { label: "dropout.draw", size: 16, usage });
    this.#head = createHead(gpu, {
      ops,
      config,
      weights,
      plan,
      scale: this.#scale,
      sums: this.#sums,
      gradients: full?.head,
    });
    const rows = this.#rows, { batch } = plan;
    const step = (l: number) => ({
      ops,
      rows,
      batch,
      weights: weights.layers[l]!,
      lora: lora?.[l],
      a: plan.activations[l]!,
      x: plan.x[l]!,
    });
    this.#embed = weights.embed.map(({ first, tensor }) =>
      ops.embedding.gather({ rows, ids: batch.ids, table: tensor, out: plan.x[0]!, first })
    );
    const up = (site: (layer: number) => LoraDropout | undefined): Command[] =>
      weights.layers.flatMap((layer, l) => [
        ...dequantize(layer),
        ...forward({ ...step(l), y: plan.x[l + 1]!, dropout: site(l) }),
      ]);
    this.#forward = up(() => undefined);
    const scratch = plan.gradients?.dropped;
    const op = createDropout(gpu, { p: dropout, draw: this.#draw });
    const site = (layer: number) => scratch && { op, scratch, layer };
    const down: Command[] = [];
    for (let l = config.num_hidden_layers - 1; plan.gradients && l >= 0; l--) {
      // The insides of the last layer are still there; those of the others are computed again under block checkpointing.
      const again = checkpointing === "block" && l < config.num_hidden_layers - 1;
      down.push(...(l < config.num_hidden_layers - 1 ? dequantize(weights.layers[l]!) : []));
      if (again) down.push(...forward({ ...step(l), y: undefined, dropout: site(l) }));
      down.push(
        ...backward({
          ...step(l),
          dropout: site(l),
          g: plan.gradients,
          d: full?.layers[l],
          last: l === 0 && !full && !inputGradient,
        }),
      );
    }
    if (full) down.push(...full.embedding({ ops, dx: plan.gradients!.dx }));
    const { gradients } = plan;
    this.#train = gradients
      ? [...this.#embed, ...(scratch ? up(site) : this.#forward), { clear: gradients.dx }, ...this.#head.train, ...down]
      : [];
  }

  /** Loads a model and plans its buffers. Throws where a file, a limit of the device or its memory stands against it. */
  static async open(options: LlamaOptions): Promise<Llama> {
    const { tokens, train = "none", checkpointing = "none", inputGradient = false } = options;
    const { parts, dropout, fill } = await openParts({ ...options, trainable: train === "full" });
    const { gpu, config, weights, lora } = parts;
    const less = train !== "none" && checkpointing === "none" ? ", give --checkpointing block," : "";
    const remedy = `lower --batch-size${less} or lower 03's --max-seq-length`;
    const llama = await withinMemory(gpu, () => {
      const plan = createPlan(gpu, {
        config,
        tokens,
        checkpointing,
        training: train !== "none",
        dropout: train === "lora" && dropout > 0,
        lora: lora?.[0], // scratch is shared: all layers are alike
        chunk: headChunk(gpu, { config, tokens, checkpointing }),
        remedy,
      });
      const full = train === "full" ? createFullGradients(gpu, { config, weights, tokens }) : undefined;
      return new Llama({ ...parts, plan, full, dropout }, { checkpointing, inputGradient });
    });
    if (!llama) {
      const state = `micro-batches of ${tokens} tokens do not fit into the memory of "${gpu.name}" beside the weights`;
      throw new Error(`Cannot open "${options.model}": ${state}: ${remedy}`);
    }
    llama.#compile();
    await fill();
    if (options.tiles && parts.ops.matmul.choices.length > 0) await llama.#chooseTiles(options.tiles, options.onTile);
    return llama;
  }

  /** Lets a CPU driver compile while the weights are read, for as many rows as there can be: without any it would do so again. */
  #compile(): void {
    const tokens = this.plan.batch.ids.shape[0]!;
    this.#rows.set(tokens);
    this.#head.setLabelled(tokens);
    compile(
      this.gpu,
      this.#train.length > 0 ? this.#train : [...this.#embed, ...this.#forward, ...this.#head.evaluate],
    );
  }

  /** Chooses tiles with as many rows as there can be. */
  async #chooseTiles(cache: TileCache, onShape: LlamaOptions["onTile"]): Promise<void> {
    const all = Array.from({ length: this.plan.batch.ids.shape[0]! }, (_, i) => i);
    const positionIds = all.map((i) => i % this.config.max_position_embeddings), zeros = all.map(() => 0);
    this.#set({ inputIds: zeros, positionIds, targets: zeros }, { items: 1, slot: 0 });
    this.tiles = await chooseTiles(this.gpu, this.ops.matmul, { cache, ...(onShape && { onShape }) });
    this.zeroGradients();
  }

  /** Uploads a micro-batch; `slot` is where its loss is summed, `items` the labelled tokens that the loss averages over. */
  #set({ inputIds, positionIds, targets }: MicroBatch, { items, slot }: { items: number; slot: number }): number {
    const { gpu, plan: { batch }, config } = this;
    const count = inputIds.length, most = batch.ids.shape[0]!;
    if (count === 0 || count > most) {
      throw new RangeError(`Cannot run a batch of ${count} tokens: 1 to ${most} are planned for`);
    }
    const ids = Uint32Array.from(inputIds), positions = Uint32Array.from(positionIds);
    const { spans, order } = documentsOf(positions);
    const rows: number[] = [], labels: number[] = [];
    for (let i = 0; i < count; i++) {
      if (ids[i]! >= config.vocab_size) {
        throw new RangeError(`Cannot embed token ${ids[i]}: the vocabulary has ${config.vocab_size}`);
      }
      if (positions[i]! >= config.max_position_embeddings) {
        throw new RangeError(`Cannot use position ${positions[i]}: the model has ${config.max_position_embeddings}`);
      }
      if (targets[i]! < 0) continue;
      if (targets[i]! >= config.vocab_size) {
        throw new RangeError(`Cannot learn token ${targets[i]}: the vocabulary has ${config.vocab_size}`);
      }
      rows.push(i);
      labels.push(targets[i]!);
    }
    const write = (tensor: Tensor, data: Uint32Array<ArrayBuffer>) => gpu.queue.writeBuffer(tensor.buffer, 0, data);
    write(batch.ids, ids);
    write(batch.positions, positions);
    write(batch.documents.spans, spans);
    write(batch.documents.order, order);
    if (rows.length > 0) {
      write(batch.labelRows, Uint32Array.from(rows));
      write(batch.labels, Uint32Array.from(labels));
    }
    gpu.queue.writeBuffer(this.#scale, 0, new Float32Array([1 / items, slot, 0, 0]));
    this.#rows.set(count);
    this.#head.setLabelled(rows.length);
    this.#full?.setTokens(ids);
    return rows.length;
  }

  /** Forward only: adds the summed loss of the batch's tokens to `slot` and returns how many tokens it counts. */
  evaluate(batch: MicroBatch, slot = 0): number {
    const labelled = this.#set(batch, { items: 1, slot });
    run(this.gpu, [...this.#embed, ...this.#forward, ...this.#head.evaluate]);
    return labelled;
  }

  /**
   * Forward and backward: adds the loss to `slot` and the gradients of the loss over `items` tokens to the groups'. Dropout
   * draws by `draw`.
   */
  accumulate(batch: MicroBatch, at: { items: number; slot: number; draw?: number }): void {
    run(this.gpu, this.accumulation(batch, at));
  }

  /** Uploads a micro-batch and returns the commands of `accumulate`: to be run before anything else is uploaded. */
  accumulation(batch: MicroBatch, at: { items: number; slot: number; draw?: number }): readonly Command[] {
    if (this.#train.length === 0) throw new Error("Cannot train: the model was opened for evaluation");
    this.#set(batch, at);
    if (this.plan.gradients?.dropped) {
      this.gpu.queue.writeBuffer(this.#draw, 0, new Uint32Array([at.draw ?? 0, 0, 0, 0]));
    }
    return this.#train;
  }

  /** Frees all that was made for the model; it cannot be used afterwards. */
  destroy(): void {
    destroyParts(this);
  }

  /** Zeroes all gradients, before the first micro-batch of an update. */
  zeroGradients(): void {
    run(this.gpu, this.clearing);
  }

  /** The commands of `zeroGradients`. */
  get clearing(): readonly Command[] {
    return this.groups.map(({ grad }) => ({ clear: grad }));
  }

  /** Reads and clears all loss sums `[RING]`. Waits for the GPU. */
  async losses(): Promise<Float32Array> {
    const sums = await download(this.gpu, this.#sums);
    run(this.gpu, [{ clear: this.#sums }]);
    return sums;
  }

  /** Reads what learns, by tensor name: the adapter under PEFT's names, or every base weight under Hugging Face's. */
  parameters(): Promise<Map<string, Float32Array<ArrayBuffer>>> {
    return readSlots(this.gpu, this.groups.map(({ param, slots }) => ({ tensor: param, slots })));
  }

  /** Logits `[rows, vocab_size]` of the tokens at `rows` (all of them by default) of one document or packed row. */
  async logits(batch: Omit<MicroBatch, "targets">, at?: readonly number[]): Promise<Float32Array[]> {
    const wanted = new Set(at ?? Array.from(batch.inputIds, (_, i) => i));
    const { logits } = this.plan.head, [chunk, stride] = logits.shape as [number, number];
    if (wanted.size > chunk) {
      throw new RangeError(`Cannot read logits of ${wanted.size} tokens at once: ${chunk} are planned for`);
    }
    this.#set({ ...batch, targets: Array.from(batch.inputIds, (_, i) => wanted.has(i) ? 0 : -100) }, {
      items: 1,
      slot: 0,
    });
    run(this.gpu, [...this.#embed, ...this.#forward, ...this.#head.logits]);
    const bytes = await downloadBytes(this.gpu, logits, { bytes: wanted.size * stride * 4 });
    const all = new Float32Array(bytes.buffer);
    return Array.from(wanted, (_, i) => all.slice(i * stride, i * stride + this.config.vocab_size));
  }
}

/** Lowest and highest logit of the model in `dir` after `inputIds`, over all positions: 01's proof that it runs. */
export async function logitsRange(dir: string, inputIds: readonly number[]): Promise<{ min: number; max: number }> {
  let min = Infinity, max = -Infinity;
  for (const row of await logitsOf({ model: dir }, inputIds)) {
    for (const value of row) {
      if (!Number.isFinite(value)) throw new Error(`Cannot accept "${dir}": its logits are not numbers`);
      min = Math.min(min, value);
      max = Math.max(max, value);
    }
  }
  if (min === max) throw new Error(`Cannot accept "${dir}": all of its logits are ${min}: the weights are of no use`);
  return { min, max };
}

/** Whether the adapter leaves every logit of the model as it is, bit for bit. Throws where the model has none to leave. */
export async function adapterIsNoop(model: string, adapter: string): Promise<boolean> {
  const { vocab_size, max_position_embeddings } = readConfig(model);
  const inputIds = Array.from(
    { length: Math.min(16, max_position_embeddings) },
    (_, i) => (i * 7919 + 11) % vocab_size,
  );
  const [base, adapted] = [await logitsOf({ model }, inputIds), await logitsOf({ model, adapter }, inputIds)];
  if (!base.every((row) => row.every(Number.isFinite))) {
    throw new Error(`Cannot accept "${model}": its logits are not numbers: look for a weight that is NaN or infinite`);
  }
  return base.every((row, r) => row.every((value, v) => Object.is(value, adapted[r]![v])));
}

/** Logits of one document, from a model opened for it alone. */
export async function logitsOf(
  { model, adapter }: Pick<LlamaOptions, "model" | "adapter">,
  inputIds: readonly number[],
): Promise<Float32Array[]> {
  const llama = await Llama.open({ model, adapter, tokens: inputIds.length });
  const rows = await llama.logits({ inputIds, positionIds: inputIds.map((_, i) => i) });
  llama.destroy();
  return rows;
}

function loraGroups(lora: readonly LayerLora[]): ParameterGroup[] {
  return lora.map(({ params, grads, slots }) => ({
    name: params.name,
    param: params,
    grad: grads,
    slots,
    decay: true,
  }));
}
