/**
 * The models that steps are measured on: a small one with the same weights and tokens for every library that it was
 * measured with (hidden 256, 4 layers; see the losses), and models of the blog's sizes with random weights.
 */
import { fromFloat32 } from "../../lib/data/dtype.ts";
import { openModel, type TensorSink, writeSafetensors } from "../../lib/data/safetensors.ts";
import { type Adapter, adapterTensors, initAdapter, type LoraConfig } from "../../lib/model/adapter.ts";
import { configJson, linearModules, type ModelConfig, moduleName, parameterShapes } from "../../lib/model/config.ts";
import type { MicroBatch } from "../../lib/model/llama.ts";
import { writeQuantizedModel } from "../../lib/model/quantized.ts";

/** LoRA of rank 16 on all seven projections, scaled by 2. */
export const LORA: LoraConfig = {
  r: 16,
  lora_alpha: 32,
  lora_dropout: 0,
  target_modules: [...linearModules],
  use_rslora: false,
  base_model_name_or_path: null,
};

const SPECIAL = { bos_token_id: 0, eos_token_id: 0, pad_token_id: null };

/** The small problem's model. */
export const SMALL: ModelConfig = {
  vocab_size: 1024,
  hidden_size: 256,
  intermediate_size: 688,
  num_hidden_layers: 4,
  num_attention_heads: 8,
  num_key_value_heads: 4,
  head_dim: 32,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  rope_theta: 10_000,
  tie_word_embeddings: false,
  dtype: "float32",
  ...SPECIAL,
};

/** The blog's model, or fewer layers or tokens of vocabulary of it. */
export function blogConfig(change: Partial<ModelConfig> = {}): ModelConfig {
  return {
    vocab_size: 50_257,
    hidden_size: 1024,
    intermediate_size: 2752,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 64,
    max_position_embeddings: 1024,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000,
    tie_word_embeddings: true,
    dtype: "float16",
    ...SPECIAL,
    ...change,
  };
}

/** Losses of the small problem before updates 1 to 5, at a learning rate of 1e-3, as all libraries find them. */
export const SMALL_LOSSES = {
  full: [7.42619, 5.0515, 3.0972, 1.7253, 0.8878],
  lora: [7.42619, 7.1143, 6.7946, 6.4741, 6.1602],
} as const;

/** Uniform numbers in [0, 1): mulberry32, a public-domain generator of 32 bits of state. */
function mulberry32(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Normal numbers of deviation `std`, two at a time (Box and Muller), rounded to 32 bits. */
function normal(count: number, std: number, seed: number): Float32Array<ArrayBuffer> {
  const uniform = mulberry32(seed), out = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
    out[i] = radius * Math.cos(angle) * std;
    if (i + 1 < count) out[i + 1] = radius * Math.sin(angle) * std;
  }
  return out;
}

/** Turns `[rows, columns]` into `[columns, rows]`: the problem is stated with weights as `[in, out]`. */
function transpose(x: Float32Array, rows: number, columns: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: x.length }, (_, i) => x[(i % rows) * columns + Math.floor(i / rows)]!);
}

/** Writes the small problem's model to `dir` and returns its adapter and its batch of four rows. */
export async function writeSmallProblem(dir: string): Promise<{ adapter: Adapter; batch: MicroBatch }> {
  const { hidden_size: C, vocab_size: V } = SMALL, tensors = new Map<string, Float32Array<ArrayBuffer>>();
  const shapes = new Map(parameterShapes(SMALL).map(({ name, shape }) => [name, shape]));
  // Seeds count up in this order: embedding, the seven matrices of each layer, head.
  let seed = 100;
  tensors.set("model.embed_tokens.weight", normal(V * C, 0.5, seed++));
  const matrix = (name: string) => {
    const [out, from] = shapes.get(name) as [number, number];
    tensors.set(name, transpose(normal(out * from, 1 / Math.sqrt(from), seed++), from, out));
  };
  for (let layer = 0; layer < SMALL.num_hidden_layers; layer++) {
    for (const module of linearModules) matrix(`${moduleName(layer, module)}.weight`);
  }
  matrix("lm_head.weight");
  const sinks = parameterShapes(SMALL).map(({ name, shape }): TensorSink => {
    const values = tensors.get(name) ?? new Float32Array(shape[0]!).fill(1);
    return { name, shape, dtype: "F32", data: () => new Uint8Array(values.buffer) };
  });
  await writeModel(dir, SMALL, sinks);

  const adapter = new Map<string, Float32Array>();
  seed = 900;
  for (const { name, kind, shape: [rows, columns] } of adapterTensors(SMALL, LORA)) {
    const values = kind === "A" && transpose(normal(rows * columns, 1 / Math.sqrt(columns), seed++), columns, rows);
    adapter.set(name, values || new Float32Array(rows * columns));
  }
  return {
    adapter: { lora: LORA, tensors: adapter },
    batch: randomBatch({ rows: 4, length: 128, vocab: V, seed: 4242 }),
  };
}

/** Rows of uniformly drawn tokens, each to be predicted from those before it. */
export function randomBatch(
  { rows, length, vocab, seed }: { rows: number; length: number; vocab: number; seed: number },
): MicroBatch {
  const uniform = mulberry32(seed), inputIds: number[] = [], targets: number[] = [];
  for (let row = 0; row < rows; row++) {
    const ids = Array.from({ length: length + 1 }, () => Math.floor(uniform() * vocab));
    inputIds.push(...ids.slice(0, -1));
    targets.push(...ids.slice(1));
  }
  return { inputIds, targets, positionIds: inputIds.map((_, i) => i % length) };
}

/** Writes a model of `config` with normal weights of deviation 0.02 into `dir`, in NF4 where `quantized`, unless it is there. */
export async function writeRandomModel(
  dir: string,
  { config, quantized }: { config: ModelConfig; quantized: boolean },
): Promise<{ model: string; adapter: Adapter }> {
  const { hidden_size, num_hidden_layers, vocab_size, dtype } = config;
  const model = `${dir}/${hidden_size}_${num_hidden_layers}_${vocab_size}_${dtype}${quantized ? "_nf4" : ""}`;
  const adapter = { lora: LORA, tensors: initAdapter(config, LORA, 3407) };
  if (isFolder(model)) return { model, adapter };
  const stored = ({ float32: "F32", float16: "F16", bfloat16: "BF16" } as const)[config.dtype];
  // One run of numbers of a prime length serves all tensors, each from another place on.
  const period = 4_000_037, block = fromFloat32(normal(period, 0.02, 7), stored), size = stored === "F32" ? 4 : 2;
  const ones = (count: number) => fromFloat32(new Float32Array(count).fill(1), stored);
  const sinks = parameterShapes(config).map(({ name, shape }, t): TensorSink => {
    const count = shape.reduce((product, n) => product * n, 1);
    const data = () => {
      if (shape.length === 1) return ones(count);
      const bytes = new Uint8Array(count * size);
      let from = (t * 7919 % period) * size;
      for (let at = 0; at < bytes.length; from = 0) {
        const part = block.subarray(from, Math.min(block.length, from + bytes.length - at));
        bytes.set(part, at);
        at += part.length;
      }
      return bytes;
    };
    return { name, shape, dtype: stored, data };
  });
  const making = `${model}.making`, dense = quantized ? `${making}/dense` : making;
  await Deno.mkdir(dense, { recursive: true });
  await writeModel(dense, config, sinks);
  if (quantized) {
    using source = openModel(dense);
    await writeQuantizedModel({ source, config, out: making, doubleQuant: true });
  }
  await Deno.rename(making, model);
  return { model, adapter };
}

function isFolder(path: string): boolean {
  try {
    return Deno.statSync(path).isDirectory;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

async function writeModel(dir: string, config: ModelConfig, sinks: readonly TensorSink[]): Promise<void> {
  await writeSafetensors(`${dir}/model.safetensors`, sinks);
  await Deno.writeTextFile(`${dir}/config.json`, configJson(config));
}
