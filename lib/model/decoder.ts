/**
 * The model with a cache of keys and values: prompts are read as one packed batch by the same layer as in training, then
 * each step is that layer again with one row per sequence and other products under it. It chooses no tokens.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Command, createRows, type Rows } from "../gpu/kernel.ts";
import { compile, run } from "../gpu/program.ts";
import { createBuffer, createTensor, destroyOwned, own, type Tensor } from "../gpu/tensor.ts";
import { documentsOf } from "../ops/attention.ts";
import { type Cache, createAttentionDecode, NO_SLOT } from "../ops/attention_decode.ts";
import { createMatvec, rowBlock } from "../ops/matvec.ts";
import { dequantize, forward } from "./layer.ts";
import { type Ops, paddedVocab } from "./ops.ts";
import type { ModelParts } from "./parts.ts";
import { createPlan, type Plan } from "./plan.ts";

/** A token to run, its place in its sequence, and the sequence's slot in the cache. */
export interface Step {
  readonly id: number;
  readonly position: number;
  readonly slot: number;
}

/** Commands of a step, and of the final norm and the head alone. */
interface Program {
  readonly step: readonly Command[];
  readonly head: readonly Command[];
}

/** Prompts begin at multiples of this in a packed batch, so that no tile spans two and no answer knows its neighbours. */
const ALIGNMENT = 32;
/** Tokens that are read at once where prompts are many. */
const PREFILL = 1024;
/** Reads of logits before Deno's event loop gets a turn, which also brings errors of the GPU to light. */
const PATIENCE = 64;

/** The cache and the recorded commands for up to `batch` sequences of up to `context` tokens. */
export class Decoder {
  readonly parts: ModelParts;
  readonly batch: number;
  readonly context: number;
  readonly #gpu: Gpu;
  /** Buffers for reading prompts, and for one row per sequence. */
  readonly #reading: Plan;
  readonly #writing: Plan;
  readonly #attention: ReturnType<typeof createAttentionDecode>;
  readonly #caches: readonly Cache[];
  readonly #slots: { readonly reading: Tensor; readonly writing: Tensor };
  readonly #rows: { readonly reading: Rows; readonly writing: Rows };
  readonly #read: readonly Command[];
  /** By how many rows share a weight. */
  readonly #programs = new Map<number, Program>();
  readonly #staging: Tensor;
  #pending: Promise<void>[] = [];

  /** Allocates the cache and records the reading of prompts. */
  constructor(parts: ModelParts, { batch, context }: { batch: number; context: number }) {
    const { config, ops, weights, lora } = parts, gpu = own(parts.gpu);
    this.parts = parts;
    this.batch = batch;
    this.context = context;
    this.#gpu = gpu;
    const tokens = Math.max(context, Math.min(batch * context, PREFILL));
    const plan = {
      config,
      checkpointing: "none",
      training: false,
      lora: lora?.[0],
      remedy: "lower --max-new-tokens",
    } as const;
    this.#reading = createPlan(gpu, { ...plan, tokens, chunk: 1 });
    this.#writing = createPlan(gpu, { ...plan, tokens: batch, chunk: batch });
    const { num_attention_heads: heads, num_key_value_heads: kvHeads, head_dim: headDim } = config;
    this.#attention = createAttentionDecode(gpu, { heads, kvHeads, headDim, context });
    this.#caches = weights.layers.map((_, l) => this.#attention.cache(`layers.${l}`, batch));
    this.#slots = {
      reading: createTensor(gpu, { name: "slots.reading", shape: [tokens], dtype: "u32" }),
      writing: createTensor(gpu, { name: "slots", shape: [batch], dtype: "u32" }),
    };
    this.#rows = { reading: createRows(gpu, "prompt tokens"), writing: createRows(gpu, "sequences") };
    this.#staging = createStaging(gpu, batch * paddedVocab(config) * 4);
    const rows = this.#rows.reading, { batch: { positions, labelRows }, x } = this.#reading;
    const slots = this.#slots.reading, last = this.#writing.x.at(-1)!;
    this.#read = [
      ...this.#layers(
        this.#reading,
        rows,
        () => ops,
        (l, qkv) => [this.#attention.store({ rows, qkv, slots, positions, ...this.#caches[l]! })],
      ),
      ops.embedding.gather({ rows: this.#rows.writing, ids: labelRows, table: x.at(-1)!, out: last }),
    ];
  }

  /** Lets a CPU driver compile what reads prompts and what writes to all sequences; see `compile` in program.ts. */
  compile(): void {
    this.#rows.reading.set(this.#slots.reading.shape[0]!);
    this.#rows.writing.set(this.batch);
    const { step, head } = this.#program(this.batch);
    compile(this.#gpu, [...this.#read, ...step, ...head]);
  }

  /** Embedding and layers over the rows of a plan; `after` adds to each layer what needs its q, k and v. */
  #layers(
    plan: Plan,
    rows: Rows,
    opsOf: (layer: number) => Ops,
    after: (layer: number, qkv: Tensor) => Command[] = () => [],
  ): Command[] {
    const { ops, weights, lora } = this.parts, { batch, x } = plan;
    return [
      ...weights.embed.map(({ first, tensor }) =>
        ops.embedding.gather({ rows, ids: batch.ids, table: tensor, out: x[0]!, first })
      ),
      ...weights.layers.flatMap((layer, l) => {
        const a = plan.activations[l]!;
        const step = { ops: opsOf(l), rows, batch, weights: layer, lora: lora?.[l], a, x: x[l]!, y: x[l + 1]! };
        return [...dequantize(layer), ...forward(step), ...after(l, a.qkv)];
      }),
    ];
  }

  /** A step of `count` rows: the same layers over products for few rows and attention to the cache. */
  #program(count: number): Program {
    const block = rowBlock(this.#gpu, count), known = this.#programs.get(block);
    if (known) return known;
    const { ops, weights, config } = this.parts, { batch: { positions }, head, x } = this.#writing;
    const rows = this.#rows.writing, slots = this.#slots.writing;
    const matmul = { ...ops.matmul, nt: createMatvec(this.#gpu, { block }).nt };
    const attention = (l: number): Ops["attention"] => ({
      ...ops.attention,
      forward: ({ qkv, out }) => this.#attention.forward({ rows, qkv, out, slots, positions, ...this.#caches[l]! }),
    });
    const program = {
      step: this.#layers(this.#writing, rows, (l) => ({ ...ops, matmul, attention: attention(l) })),
      head: [
        ops.norm.forward({ rows, x: x.at(-1)!, weight: weights.norm, out: head.h, rstd: head.rstd }),
        ...weights.head.map(({ first, tensor }) => {
          const [n, k] = [tensor.shape[0]!, config.hidden_size];
          const out = { tensor: head.logits, offset: first };
          return matmul.nt({ rows, x: { tensor: head.h }, w: { tensor }, out, n, k });
        }),
      ],
    };
    this.#programs.set(block, program);
    return program;
  }

  /** How many of `prompts`, from the first on, can be read at once. */
  fits(prompts: readonly ArrayLike<number>[]): number {
    const room = this.#reading.batch.ids.shape[0]!;
    let count = 0;
    for (let end = 0; count < Math.min(prompts.length, this.batch); count++) {
      end = aligned(end) + prompts[count]!.length;
      if (end > room) break;
    }
    return count;
  }

  /** Reads prompts into the cache, each into its slot, and returns the logits `[vocab_size]` after the last of each. */
  prefill(prompts: readonly { readonly ids: readonly number[]; readonly slot: number }[]): Promise<Float32Array[]> {
    const ids: number[] = [], positions: number[] = [], slots: number[] = [], last: number[] = [];
    for (const prompt of prompts) {
      // The gap up to the prompt is a document of its own that nobody keeps.
      for (let i = 0, gap = aligned(ids.length) - ids.length; i < gap; i++) {
        ids.push(0);
        positions.push(i);
        slots.push(NO_SLOT);
      }
      prompt.ids.forEach((id, i) => {
        ids.push(id);
        positions.push(i);
        slots.push(prompt.slot);
      });
      last.push(ids.length - 1);
    }
    const { batch } = this.#reading;
    this.#write(batch.ids, ids);
    this.#write(batch.positions, positions);
    const { spans, order } = documentsOf(Uint32Array.from(positions));
    this.#write(batch.documents.spans, spans);
    this.#write(batch.documents.order, order);
    this.#write(batch.labelRows, last);
    this.#write(this.#slots.reading, slots);
    this.#rows.reading.set(ids.length);
    this.#rows.writing.set(prompts.length);
    return this.#logits([...this.#read, ...this.#program(prompts.length).head], prompts.length);
  }

  /** Runs one token of each of some sequences, keeps its key and value, and returns the logits `[vocab_size]` after it. */
  step(tokens: readonly Step[]): Promise<Float32Array[]> {
    const { batch } = this.#writing, { step, head } = this.#program(tokens.length);
    this.#write(batch.ids, tokens.map(({ id }) => id));
    this.#write(batch.positions, tokens.map(({ position }) => position));
    this.#write(this.#slots.writing, tokens.map(({ slot }) => slot));
    this.#rows.writing.set(tokens.length);
    return this.#logits([...step, ...head], tokens.length);
  }

  #write(tensor: Tensor, values: ArrayLike<number>): void {
    this.#gpu.queue.writeBuffer(tensor.buffer, 0, Uint32Array.from(values));
  }

  async #logits(commands: readonly Command[], count: number): Promise<Float32Array[]> {
    const { logits } = this.#writing.head, stride = logits.shape[1]!, bytes = count * stride * 4;
    const { buffer } = this.#staging;
    run(this.#gpu, [...commands, { copy: { from: logits, to: this.#staging, bytes } }]);
    const mapped = buffer.mapAsync(GPUMapMode.READ, 0, bytes);
    if (READABLE_AT_ONCE) this.#pending.push(mapped);
    else await mapped;
    const values = new Float32Array(buffer.getMappedRange(0, bytes).slice(0));
    buffer.unmap();
    if (this.#pending.length >= PATIENCE) await this.settle();
    return Array.from(
      { length: count },
      (_, i) => values.subarray(i * stride, i * stride + this.parts.config.vocab_size),
    );
  }

  /** Waits until nothing is under way. */
  async settle(): Promise<void> {
    const pending = this.#pending;
    this.#pending = [];
    await Promise.all(pending);
  }

  /** Frees the cache and the buffers, not the model. */
  destroy(): void {
    destroyOwned(this.#gpu);
  }
}

function aligned(tokens: number): number {
  return Math.ceil(tokens / ALIGNMENT) * ALIGNMENT;
}

/**
 * `mapAsync` waits for the GPU inside the call, and its promise is kept 10 ms later: longer than a step takes. Where Deno
 * is known to let a buffer be read before that (one that was mapped at creation), it is.
 */
const READABLE_AT_ONCE = Deno.version.deno === "2.9.6";

function createStaging(gpu: Gpu, bytes: number): Tensor {
  const usage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
  const buffer = createBuffer(gpu, { label: "logits.read", size: bytes, usage, mappedAtCreation: true });
  buffer.unmap();
  return { name: "logits.read", shape: [bytes / 4], dtype: "f32", buffer, bytes };
}
