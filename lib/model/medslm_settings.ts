/**
 * The settings of a MedSLM checkpoint under whatever words its model class used, checked against the shapes of its tensors.
 * Refuses two values for one setting, and never fills in a default: what neither a file nor a shape says is an error.
 */
import type { ModelConfig } from "./config.ts";

/** The words under which model classes store each setting; the first is Hugging Face's. */
const SYNONYMS = {
  vocab_size: ["vocab_size", "n_vocab"],
  hidden_size: ["hidden_size", "d_model", "dim", "n_embd", "embed_dim"],
  intermediate_size: ["intermediate_size", "d_ff", "ffn_hidden", "ffn_hidden_size", "hidden_dim", "ffn_dim"],
  num_hidden_layers: ["num_hidden_layers", "n_layers", "n_layer", "num_layers"],
  num_attention_heads: ["num_attention_heads", "n_heads", "n_head", "num_heads"],
  num_key_value_heads: ["num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads"],
  head_dim: ["head_dim", "d_head"],
  max_position_embeddings: [
    "max_position_embeddings",
    "max_seq_len",
    "max_seq_length",
    "block_size",
    "context_length",
    "seq_len",
  ],
  rms_norm_eps: ["rms_norm_eps", "norm_eps", "eps"],
  rope_theta: ["rope_theta", "rope_base"],
  tie_word_embeddings: ["tie_word_embeddings", "tie_embeddings", "weight_tying", "tied_embeddings"],
  bos_token_id: ["bos_token_id"],
  eos_token_id: ["eos_token_id"],
  pad_token_id: ["pad_token_id"],
} as const;
type Setting = keyof typeof SYNONYMS;
/** Every word that is read, those that {@link flatten} takes apart included. */
const WORDS: readonly string[] = [
  ...Object.values(SYNONYMS).flat(),
  "rope_parameters",
  "rope_scaling",
  "hidden_act",
];

/** Throws where no setting has this name. */
export function checkSetting(name: string): void {
  if (WORDS.includes(name)) return;
  throw new SyntaxError(
    `Cannot read flag "--set": there is no setting "${name}": those of a Llama model are ${
      Object.keys(SYNONYMS).join(", ")
    }`,
  );
}

/** What the shapes say: `layers` blocks, and the shape of a tensor under its Hugging Face name. */
export interface Shapes {
  readonly path: string;
  readonly layers: number;
  readonly shapeOf: (name: string) => readonly number[] | undefined;
}

/** The configuration without the dtype; `tied` is undefined when no setting says whether the head is the embedding. */
export type Settings = Omit<ModelConfig, "dtype" | "tie_word_embeddings"> & { readonly tied: boolean | undefined };

/**
 * Reads the settings of `sources` (config.json, then what the user gave) under all their synonyms. Where a shape decides, the shape
 * decides and a setting must agree; throws an error that names both values, or the setting that is missing.
 */
export function readSettings(
  sources: readonly Readonly<Record<string, unknown>>[],
  { path, layers, shapeOf }: Shapes,
): Settings {
  const refuse = (problem: string): never => {
    throw new Error(`Cannot convert "${path}": ${problem}`);
  };
  const all = sources.flatMap((source) => Object.entries(flatten(source, refuse)));
  const given = (key: Setting): { word: string; value: unknown } | undefined => {
    const words: readonly string[] = SYNONYMS[key];
    const hits = all.filter(([word, value]) => words.includes(word) && value !== null && value !== undefined);
    const [first, ...others] = hits;
    const other = others.find(([, value]) => value !== first![1]);
    if (other) refuse(`its settings say ${first![0]} ${show(first![1])} and ${other[0]} ${show(other[1])}`);
    return first && { word: first[0], value: first[1] };
  };
  const number = (key: Setting): number | undefined => {
    const hit = given(key);
    if (hit && typeof hit.value !== "number") refuse(`${hit.word} is ${show(hit.value)}: it must be a number`);
    return hit?.value as number | undefined;
  };
  const required = (key: Setting): number => {
    const also = SYNONYMS[key].slice(1).join(", ");
    return number(key) ??
      refuse(`the setting ${key} (also called ${also}) is missing: give it with --set ${key}=VALUE`);
  };
  const agreed = (key: Setting, value: number, why: string): number => {
    const hit = given(key);
    if (hit && hit.value !== value) refuse(`${hit.word} is ${show(hit.value)} but ${why} ${value}`);
    return value;
  };
  const axis = (name: string, index: number): number =>
    shapeOf(name)?.[index] ?? refuse(`no tensor becomes "${name}", whose shape decides the model's`);
  const divide = (total: number, parts: number, what: string): number =>
    total % parts === 0 ? total / parts : refuse(`${total} ${what} do not divide by ${parts}`);

  const embedding = "model.embed_tokens.weight";
  const attention = "model.layers.0.self_attn";
  const queryRows = axis(`${attention}.q_proj.weight`, 0);
  const keyRows = axis(`${attention}.k_proj.weight`, 0);
  const width = number("head_dim");
  const heads = number("num_attention_heads") ??
    (width === undefined ? required("num_attention_heads") : divide(queryRows, width, "query rows"));
  const headDim = agreed(
    "head_dim",
    divide(queryRows, heads, "query rows"),
    `${queryRows} query rows of ${heads} heads make it`,
  );
  const keyHeads = divide(keyRows, headDim, "key rows");
  const tied = given("tie_word_embeddings");
  if (tied && typeof tied.value !== "boolean") refuse(`${tied.word} is ${show(tied.value)}: it must be true or false`);
  return {
    vocab_size: agreed("vocab_size", axis(embedding, 0), "the embedding's rows are"),
    hidden_size: agreed("hidden_size", axis(embedding, 1), "the embedding's width is"),
    intermediate_size: agreed(
      "intermediate_size",
      axis("model.layers.0.mlp.gate_proj.weight", 0),
      "the rows of the gate projection are",
    ),
    num_hidden_layers: agreed("num_hidden_layers", layers, "the number of blocks is"),
    num_attention_heads: heads,
    num_key_value_heads: agreed("num_key_value_heads", keyHeads, `${keyRows} key rows of heads of ${headDim} make it`),
    head_dim: headDim,
    max_position_embeddings: required("max_position_embeddings"),
    rms_norm_eps: required("rms_norm_eps"),
    rope_theta: required("rope_theta"),
    bos_token_id: number("bos_token_id") ?? null,
    eos_token_id: number("eos_token_id") ?? null,
    pad_token_id: number("pad_token_id") ?? null,
    tied: tied?.value as boolean | undefined,
  };
}

/** Takes theta out of transformers 5's `rope_parameters`; refuses a scaled RoPE and another activation. */
function flatten(
  source: Readonly<Record<string, unknown>>,
  refuse: (problem: string) => never,
): Readonly<Record<string, unknown>> {
  const out: Record<string, unknown> = { ...source };
  for (const key of ["rope_parameters", "rope_scaling"]) {
    const inner = source[key];
    if (typeof inner !== "object" || inner === null) continue;
    const { rope_theta, rope_type, type } = inner as Readonly<Record<string, unknown>>;
    for (const word of [rope_type, type]) {
      if (word !== undefined && word !== "default") {
        refuse(`its RoPE is of type ${show(word)}: only "default" is supported`);
      }
    }
    if (rope_theta === undefined) continue;
    if (source.rope_theta !== undefined && source.rope_theta !== rope_theta) {
      refuse(`its settings say rope_theta ${show(source.rope_theta)} and ${key}.rope_theta ${show(rope_theta)}`);
    }
    out.rope_theta = rope_theta;
  }
  const activation = source.hidden_act ?? "silu";
  if (activation !== "silu" && activation !== "swiglu") {
    refuse(`hidden_act is ${show(activation)}: only "silu" is supported`);
  }
  return out;
}

function show(value: unknown): string {
  return typeof value === "object" && value !== null ? "an object" : JSON.stringify(value);
}
