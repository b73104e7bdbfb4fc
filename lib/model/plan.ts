/**
 * The plan: every buffer of a step as a row of a table, allocated once before the first step. Checkpointing is a size in
 * it: the insides of a layer are kept for each layer, or once for all of them.
 */
import type { Gpu } from "../gpu/device.ts";
import { createTensor, type Storage, type Tensor } from "../gpu/tensor.ts";
import { blocksOf, type Documents } from "../ops/attention.ts";
import type { ModelConfig } from "./config.ts";
import type { LayerLora } from "./lora.ts";
import { paddedVocab } from "./ops.ts";

/** What the plan is made for. */
export interface PlanOptions {
  readonly config: ModelConfig;
  /** Most tokens of a micro-batch. */
  readonly tokens: number;
  /** `none` keeps every layer's activations, `block` only each layer's input and computes the rest again. */
  readonly checkpointing: "none" | "block";
  /** False leaves out everything that only backward needs. */
  readonly training: boolean;
  readonly lora: LayerLora | undefined;
  readonly dropout?: boolean;
  /** Labelled tokens whose logits are held at a time. */
  readonly chunk: number;
  /** What makes the buffers smaller, for the error where one is too large. */
  readonly remedy: string;
}

/** Insides of one layer's forward pass. */
export interface Activations {
  readonly h1: Tensor;
  readonly rstd1: Tensor;
  readonly qkv: Tensor;
  readonly attention: Tensor;
  readonly lse: Tensor;
  readonly mid: Tensor;
  readonly h2: Tensor;
  readonly rstd2: Tensor;
  readonly gateUp: Tensor;
  readonly act: Tensor;
  /** Low-rank products of the four linears; absent without an adapter. */
  readonly u: Readonly<Record<"qkv" | "o" | "gateUp" | "down", Tensor | undefined>>;
}

/**
 * Scratch of the backward pass, shared by all layers. `dx` is the residual's gradient on its way down. `dh` and `dattention`
 * take turns in one buffer; the gradients of `act` and `gateUp` overwrite them.
 */
export interface Gradients {
  readonly dx: Tensor;
  readonly dh: Tensor;
  readonly dattention: Tensor;
  readonly dqkv: Tensor;
  readonly delta: Tensor;
  readonly v: Activations["u"];
  /** Inputs of the adapter after dropout, and gradients on their way back; absent without dropout. */
  readonly dropped: Tensor | undefined;
}

/** What a micro-batch is described by, uploaded before each run. */
export interface BatchTensors {
  readonly ids: Tensor;
  readonly positions: Tensor;
  readonly documents: Documents;
  /** Positions of the labelled tokens, and the token each has to predict. */
  readonly labelRows: Tensor;
  readonly labels: Tensor;
  readonly nll: Tensor;
}

/** Buffers of the chunked head. */
export interface HeadTensors {
  readonly x: Tensor;
  readonly h: Tensor;
  readonly rstd: Tensor;
  readonly logits: Tensor;
  readonly dh: Tensor | undefined;
  readonly dx: Tensor | undefined;
}

/** All buffers of a step. `x[l]` is layer l's input, the last one the output of the last layer. */
export interface Plan {
  readonly batch: BatchTensors;
  readonly x: readonly Tensor[];
  readonly activations: readonly Activations[];
  readonly gradients: Gradients | undefined;
  readonly head: HeadTensors;
  /** The table: one row per buffer. */
  readonly rows: readonly { readonly tensor: Tensor; readonly kind: "batch" | "kept" | "scratch" }[];
}

/** Allocates every buffer. Throws `RangeError`, with the tensor and the remedy, where one does not fit into the device's limits. */
export function createPlan(gpu: Gpu, options: PlanOptions): Plan {
  const { config, tokens: T, training, lora, chunk } = options;
  const C = config.hidden_size, F = config.intermediate_size, L = config.num_hidden_layers;
  const H = config.num_attention_heads,
    Q = H * config.head_dim,
    W = Q + 2 * config.num_key_value_heads * config.head_dim;
  const rows: { tensor: Tensor; kind: "batch" | "kept" | "scratch" }[] = [];
  const make = (kind: "batch" | "kept" | "scratch", name: string, shape: readonly number[], dtype: Storage = "f32") => {
    try {
      const tensor = createTensor(gpu, { name, shape, dtype });
      rows.push({ tensor, kind });
      return tensor;
    } catch (error) {
      throw new RangeError(`${(error as Error).message}: ${options.remedy}`, { cause: error });
    }
  };

  const lowRank = (kind: "kept" | "scratch", prefix: string): Activations["u"] => {
    const of = (name: "qkv" | "o" | "gateUp" | "down") => {
      const columns = lora?.[name]?.columns;
      return columns ? make(kind, `${prefix}.${name}`, [T, columns]) : undefined;
    };
    return { qkv: of("qkv"), o: of("o"), gateUp: of("gateUp"), down: of("down") };
  };

  const insides = (kind: "kept" | "scratch", prefix: string): Activations => ({
    h1: make(kind, `${prefix}h1`, [T, C]),
    rstd1: make(kind, `${prefix}rstd1`, [T]),
    qkv: make(kind, `${prefix}qkv`, [T, W]),
    attention: make(kind, `${prefix}attention`, [T, Q]),
    lse: make(kind, `${prefix}lse`, [T, H]),
    mid: make(kind, `${prefix}mid`, [T, C]),
    h2: make(kind, `${prefix}h2`, [T, C]),
    rstd2: make(kind, `${prefix}rstd2`, [T]),
    gateUp: make(kind, `${prefix}gate_up`, [T, 2 * F]),
    act: make(kind, `${prefix}act`, [T, F]),
    u: lowRank(kind, `${prefix}u`),
  });

  const batch = {
    ids: make("batch", "input_ids", [T], "u32"),
    positions: make("batch", "position_ids", [T], "u32"),
    documents: {
      spans: make("batch", "spans", [T, 2], "u32"),
      order: make("batch", "order", [blocksOf(T), 2], "u32"),
    },
    labelRows: make("batch", "label_rows", [T], "u32"),
    labels: make("batch", "labels", [T], "u32"),
    nll: make("batch", "nll", [T]),
  };
  // Without backward two residual buffers take turns.
  const x: Tensor[] = [];
  for (let l = 0; l <= L; l++) {
    x.push(training || l < 2 ? make(training ? "kept" : "scratch", `x.${l}`, [T, C]) : x[l - 2]!);
  }
  const keep = training && options.checkpointing === "none";
  const activations: Activations[] = [];
  for (let l = 0; l < L; l++) {
    activations.push(keep ? insides("kept", `layers.${l}.`) : activations[0] ?? insides("scratch", "layer."));
  }
  let gradients: Gradients | undefined;
  if (training) {
    const dh = make("scratch", "dh", [T, Math.max(C, Q)]);
    gradients = {
      dx: make("scratch", "dx", [T, C]),
      dh: { ...dh, shape: [T, C] },
      dattention: { ...dh, name: "dattention", shape: [T, Q] },
      dqkv: make("scratch", "dqkv", [T, W]),
      delta: make("scratch", "delta", [T, H]),
      v: lowRank("scratch", "v"),
      dropped: options.dropout ? make("scratch", "dropped", [T, Math.max(C, Q, F)]) : undefined,
    };
  }
  const head = {
    x: make("scratch", "head.x", [chunk, C]),
    h: make("scratch", "head.h", [chunk, C]),
    rstd: make("scratch", "head.rstd", [chunk]),
    logits: make("scratch", "logits", [chunk, paddedVocab(config)]),
    dh: training ? make("scratch", "head.dh", [chunk, C]) : undefined,
    dx: training ? make("scratch", "head.dx", [chunk, C]) : undefined,
  };
  return { batch, x, activations, gradients, head, rows };
}

/** Bytes of the plan by kind. */
export function planBytes(plan: Plan): Record<"batch" | "kept" | "scratch", number> {
  const bytes = { batch: 0, kept: 0, scratch: 0 };
  for (const { tensor, kind } of plan.rows) bytes[kind] += tensor.bytes;
  return bytes;
}

/**
 * Rows of logits per chunk, a multiple of 32, at most `tokens`. A GPU without checkpointing takes 4,096 rows, enough to fill
 * it; with block checkpointing memory comes first, and on a CPU driver the cache.
 */
export function headChunk(
  gpu: Gpu,
  { config, tokens, checkpointing }: Pick<PlanOptions, "config" | "tokens" | "checkpointing">,
): number {
  const row = paddedVocab(config) * 4;
  const wanted = gpu.cpu ? 64 << 20 : checkpointing === "block" ? 100 << 20 : 4096 * row;
  const most = Math.min(gpu.limits.maxStorageBufferBindingSize, wanted);
  return Math.min(tokens, Math.max(32, Math.floor(most / row / 32) * 32));
}
