/**
 * The shape of a Llama model: Hugging Face's config.json in its v4 and v5 forms, and the parameter names that follow from it.
 * Refuses other architectures, biases, other activations and scaled RoPE: a field is never guessed from a family default.
 *
 * Dimension letters used everywhere: `B` batch, `T` tokens, `C` model width, `H` query heads, `KV` key/value heads,
 * `D` head width, `F` MLP width, `V` vocabulary, `L` layers, `R` LoRA rank.
 */
import { checkHolds, readJsonObject } from "../data/files.ts";

/** The fields of config.json that the computation depends on, under Hugging Face's names. */
export interface ModelConfig {
  readonly vocab_size: number; // V
  readonly hidden_size: number; // C
  readonly intermediate_size: number; // F
  readonly num_hidden_layers: number; // L
  readonly num_attention_heads: number; // H
  readonly num_key_value_heads: number; // KV
  readonly head_dim: number; // D
  readonly max_position_embeddings: number;
  readonly rms_norm_eps: number;
  readonly rope_theta: number;
  readonly tie_word_embeddings: boolean;
  readonly bos_token_id: number | null;
  readonly eos_token_id: number | null;
  readonly pad_token_id: number | null;
  readonly dtype: "float32" | "float16" | "bfloat16";
}

/** The release of transformers whose file formats are followed. */
const FORMAT_VERSION = "5.18.0";

const ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"] as const;

/** The seven linear projections of a layer, in the order in which they are created. */
export const linearModules = [...ATTENTION, "gate_proj", "up_proj", "down_proj"] as const;

/** One of the seven projections. */
export type LinearModule = (typeof linearModules)[number];

/** The module's full name, e.g. `model.layers.0.self_attn.q_proj`. */
export function moduleName(layer: number, module: LinearModule): string {
  const group = (ATTENTION as readonly string[]).includes(module) ? "self_attn" : "mlp";
  return `model.layers.${layer}.${group}.${module}`;
}

/** The weight shape `[out, in]` of a projection. */
export function linearShape(config: ModelConfig, module: LinearModule): readonly [number, number] {
  const width = config.hidden_size;
  const queries = config.num_attention_heads * config.head_dim;
  const keys = config.num_key_value_heads * config.head_dim;
  switch (module) {
    case "q_proj":
      return [queries, width];
    case "k_proj":
    case "v_proj":
      return [keys, width];
    case "o_proj":
      return [width, queries];
    case "gate_proj":
    case "up_proj":
      return [config.intermediate_size, width];
    case "down_proj":
      return [width, config.intermediate_size];
  }
}

/** Every tensor of the model with its shape, in model order: embedding, layers, final norm, and the head when it is untied. */
export function parameterShapes(config: ModelConfig): { name: string; shape: readonly number[] }[] {
  const width = config.hidden_size;
  const out: { name: string; shape: readonly number[] }[] = [
    { name: "model.embed_tokens.weight", shape: [config.vocab_size, width] },
  ];
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    for (const module of linearModules) {
      out.push({ name: `${moduleName(layer, module)}.weight`, shape: linearShape(config, module) });
    }
    for (const norm of ["input_layernorm", "post_attention_layernorm"]) {
      out.push({ name: `model.layers.${layer}.${norm}.weight`, shape: [width] });
    }
  }
  out.push({ name: "model.norm.weight", shape: [width] });
  if (!config.tie_word_embeddings) out.push({ name: "lm_head.weight", shape: [config.vocab_size, width] });
  return out;
}

/** Throws a RangeError, opening with `Cannot read "where"`, when the numbers do not make a model. */
export function checkConfig(config: ModelConfig, where: string): ModelConfig {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${where}": ${problem}`);
  };
  const counts = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
  ] as const;
  for (const key of counts) {
    const value = config[key];
    if (!Number.isSafeInteger(value) || value < 1) refuse(`${key} is ${value}: it must be a whole number above 0`);
  }
  for (const key of ["rms_norm_eps", "rope_theta"] as const) {
    if (!(Number.isFinite(config[key]) && config[key] > 0)) refuse(`${key} is ${config[key]}: it must be above 0`);
  }
  const { num_attention_heads: heads, num_key_value_heads: kvHeads, head_dim: width } = config;
  if (heads % kvHeads !== 0) refuse(`${heads} query heads cannot share ${kvHeads} key/value heads: they must divide`);
  if (width % 2 !== 0) refuse(`head_dim is ${width}: RoPE rotates pairs, so it must be even`);
  for (const key of ["bos_token_id", "eos_token_id", "pad_token_id"] as const) {
    const id = config[key];
    if (id !== null && !(Number.isSafeInteger(id) && id >= 0 && id < config.vocab_size)) {
      refuse(`${key} is ${id}: it must be a token below vocab_size ${config.vocab_size}`);
    }
  }
  return config;
}

/** Reads `dir/config.json`; throws when it is not a Llama, a field is missing, or a value is one this engine does not compute. */
export function readConfig(dir: string): ModelConfig {
  checkHolds(dir, { name: "config.json", wanted: "a model folder", run: "deno task 01" });
  const path = `${dir}/config.json`;
  const json = readJsonObject(path);
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": ${problem}`);
  };
  if (json.model_type === undefined) {
    refuse(`model_type is missing: a converted model is wanted: run "deno task 01 --source ${dir}" first`);
  }
  if (json.model_type !== "llama") {
    refuse(`model_type is ${JSON.stringify(json.model_type)}: only "llama" is supported`);
  }
  const fixed = { hidden_act: "silu", attention_bias: false, mlp_bias: false } as const;
  for (const [key, want] of Object.entries(fixed)) {
    if (json[key] !== undefined && json[key] !== want) {
      refuse(`${key} is ${JSON.stringify(json[key])}: only ${JSON.stringify(want)} is supported`);
    }
  }
  const number = (key: string, value: unknown): number => {
    if (value === undefined || value === null) refuse(`the field "${key}" is missing`);
    return typeof value === "number" ? value : refuse(`${key} is ${JSON.stringify(value)}: it must be a number`);
  };
  const token = (key: string): number | null => (json[key] ?? null) === null ? null : number(key, json[key]);
  const heads = number("num_attention_heads", json.num_attention_heads);
  const hidden = number("hidden_size", json.hidden_size);
  const tied = json.tie_word_embeddings ?? false; // absent means untied: the library's default for Llama
  if (typeof tied !== "boolean") refuse(`tie_word_embeddings is ${JSON.stringify(tied)}: it must be true or false`);
  const dtype = json.dtype ?? json.torch_dtype ?? "float32"; // absent means float32, as in the library
  if (dtype !== "float32" && dtype !== "float16" && dtype !== "bfloat16") {
    return refuse(`dtype is ${JSON.stringify(dtype)}: it must be "float32", "float16" or "bfloat16"`);
  }
  return checkConfig({
    vocab_size: number("vocab_size", json.vocab_size),
    hidden_size: hidden,
    intermediate_size: number("intermediate_size", json.intermediate_size),
    num_hidden_layers: number("num_hidden_layers", json.num_hidden_layers),
    num_attention_heads: heads,
    num_key_value_heads: number("num_key_value_heads", json.num_key_value_heads ?? heads),
    head_dim: number("head_dim", json.head_dim ?? hidden / heads),
    max_position_embeddings: number("max_position_embeddings", json.max_position_embeddings),
    rms_norm_eps: number("rms_norm_eps", json.rms_norm_eps),
    rope_theta: ropeTheta(json, path),
    tie_word_embeddings: tied as boolean,
    bos_token_id: token("bos_token_id"),
    eos_token_id: token("eos_token_id"),
    pad_token_id: token("pad_token_id"),
    dtype,
  }, path);
}

/** Theta from `rope_parameters` (v5) or the top level (v4); a file that has both must agree with itself. */
function ropeTheta(json: Readonly<Record<string, unknown>>, path: string): number {
  const parameters = (json.rope_parameters ?? {}) as Readonly<Record<string, unknown>>;
  const scaling = (json.rope_scaling ?? {}) as Readonly<Record<string, unknown>>;
  for (const type of [parameters.rope_type, scaling.rope_type, scaling.type]) {
    if (type !== undefined && type !== "default") {
      throw new RangeError(`Cannot read "${path}": rope_type is ${JSON.stringify(type)}: only "default" is supported`);
    }
  }
  const given = [parameters.rope_theta, json.rope_theta].filter((theta) => theta !== undefined && theta !== null);
  const theta = given[0];
  if (typeof theta !== "number") throw new RangeError(`Cannot read "${path}": the number "rope_theta" is missing`);
  if (given.length === 2 && given[1] !== theta) {
    throw new RangeError(
      `Cannot read "${path}": rope_parameters has rope_theta ${theta} but the top level has ${given[1]}`,
    );
  }
  return theta;
}

const FLOATS: ReadonlySet<string> = new Set(["attention_dropout", "initializer_range", "rms_norm_eps", "rope_theta"]);

/** A float as Python writes it (`10000.0`, `1e-06`), because strict readers tell floats from integers. */
export function pythonFloat(x: number): string {
  const magnitude = Math.abs(x);
  if (magnitude !== 0 && (magnitude < 1e-4 || magnitude >= 1e16)) {
    return x.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
  }
  return Number.isInteger(x) ? `${x}.0` : String(x);
}

/** JSON as Python's `json.dumps(value, indent=2, sort_keys=True)` lays it out, with a newline at the end. */
function pythonJson(value: unknown): string {
  const order = (node: unknown): unknown =>
    typeof node !== "object" || node === null || Array.isArray(node) ? node : Object.fromEntries(
      Object.entries(node).sort(([a], [b]) => a < b ? -1 : 1).map(([key, inner]) => [key, order(inner)]),
    );
  const text = JSON.stringify(order(value), null, 2);
  return text.replace(
    /^( *)"(\w+)": (-?[\d.e+-]+)(,?)$/gm,
    (line, indent, key, number, comma) =>
      FLOATS.has(key) ? `${indent}"${key}": ${pythonFloat(Number(number))}${comma}` : line,
  ) + "\n";
}

/** The text of config.json that transformers 4 and 5 both read alike; `extra` adds or replaces top-level fields. */
export function configJson(config: ModelConfig, extra: Readonly<Record<string, unknown>> = {}): string {
  return pythonJson({
    ...config,
    architectures: ["LlamaForCausalLM"],
    attention_bias: false,
    attention_dropout: 0,
    hidden_act: "silu",
    initializer_range: 0.02,
    mlp_bias: false,
    model_type: "llama",
    pretraining_tp: 1,
    rope_parameters: { rope_theta: config.rope_theta, rope_type: "default" },
    torch_dtype: config.dtype,
    transformers_version: FORMAT_VERSION,
    use_cache: true,
    ...extra,
  });
}

/** The text of generation_config.json: the token ids alone, no sampling settings, so that it loads without warnings. */
export function generationConfigJson(config: ModelConfig): string {
  const { bos_token_id, eos_token_id, pad_token_id } = config;
  return pythonJson({ bos_token_id, eos_token_id, pad_token_id, transformers_version: FORMAT_VERSION });
}
