/**
 * The whole Llama model in 64-bit loops, forward and backward, with or without a LoRA adapter: the meaning of
 * lib/model/layer.ts and model.ts. It keeps everything and knows no batches: rows and documents lie one after the other, and
 * position 0 starts the next one.
 */
import { type LinearModule, linearShape, type ModelConfig, moduleName } from "../lib/model/config.ts";
import {
  addTo,
  attention,
  attentionBackward,
  crossEntropy,
  documentStarts,
  embedding,
  embeddingBackward,
  linear,
  linearBackward,
  type Lora,
  matmulNN,
  matmulNT,
  matmulTN,
  rmsnorm,
  rmsnormBackward,
  rope,
  ropeBackward,
  swiglu,
  swigluBackward,
  type Vector,
} from "./reference.ts";

/** Tensors by name: Hugging Face's for weights, PEFT's for the adapter. */
export type Tensors = ReadonlyMap<string, Vector>;

/** `[T]` each; labels are unshifted, -100 is not learnt, and neither is a token at position 0, which nothing precedes. */
export interface Tokens {
  readonly inputIds: ArrayLike<number>;
  readonly positionIds: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
}

/** What the forward pass depends on; `numItems` is what the loss divides by, the labelled tokens unless given. */
export interface LlamaInput {
  readonly weights: Tensors;
  readonly tokens: Tokens;
  readonly adapter?: Tensors | null;
  readonly scaling?: number;
  readonly numItems?: number;
  /** Dropout multipliers `[T, in]` of the adapter's input, by module name. */
  readonly masks?: Tensors;
}

/** The activations of one layer; `x` `[T, C]` is its input, `y` its output, q and k are rotated. */
type LayerState = Record<
  "x" | "h1" | "rstd1" | "q" | "k" | "v" | "out" | "lse" | "mid" | "h2" | "rstd2" | "gateUp" | "act" | "y",
  Float64Array
>;

/** Everything that the forward pass computed; logits and dlogits are `[T, V]`, norm `[T, C]`, nll `[T]` of the next token. */
export interface LlamaState {
  readonly config: ModelConfig;
  readonly input: LlamaInput;
  readonly start: Int32Array;
  readonly embed: Float64Array;
  readonly layers: readonly LayerState[];
  readonly norm: Float64Array;
  readonly rstd: Float64Array;
  readonly logits: Float64Array;
  readonly dlogits: Float64Array;
  readonly nll: Float64Array;
  readonly loss: number;
  readonly numItems: number;
}

/** Gradients by the names of the tensors; `dx` `[T, C]` is that of the embedding's output (the layers' part only). */
export interface LlamaGradients {
  readonly gradients: Map<string, Float64Array>;
  readonly dx: Float64Array;
}

const EMBED = "model.embed_tokens.weight";

function weight(input: LlamaInput, name: string): Vector {
  const found = input.weights.get(name);
  if (found === undefined) throw new Error(`Cannot compute: weight "${name}" is not given`);
  return found;
}

const head = (input: LlamaInput) => input.weights.get("lm_head.weight") ?? weight(input, EMBED);

const loraName = (module: string, kind: "A" | "B") => `base_model.model.${module}.lora_${kind}.weight`;

/** Weight, shape and adapter of one projection for T tokens. */
function projection(
  { config, input }: Pick<LlamaState, "config" | "input">,
  at: { layer: number; module: LinearModule },
) {
  const name = moduleName(at.layer, at.module);
  const [N, K] = linearShape(config, at.module);
  const A = input.adapter?.get(loraName(name, "A")), B = input.adapter?.get(loraName(name, "B"));
  const lora: Lora | undefined = A && B && { A, B, scaling: input.scaling ?? 1, mask: input.masks?.get(name) };
  return { name, w: weight(input, `${name}.weight`), shape: { M: input.tokens.inputIds.length, N, K, lora } };
}

/** `[T, F]` twice into `[T, 2F]`, a and b side by side in each row. */
function sideBySide(a: Float64Array, b: Float64Array, F: number): Float64Array {
  const out = new Float64Array(a.length * 2);
  for (let t = 0; t * F < a.length; t++) {
    out.set(a.subarray(t * F, (t + 1) * F), 2 * t * F);
    out.set(b.subarray(t * F, (t + 1) * F), (2 * t + 1) * F);
  }
  return out;
}

/** Half 0 or 1 of every row: `[T, 2F]` to `[T, F]`. */
const half = (x: Float64Array, F: number, which: 0 | 1): Float64Array =>
  new Float64Array(x.length / 2).map((_, i) => x[Math.floor(i / F) * 2 * F + which * F + i % F]!);

function sizes(config: ModelConfig) {
  const D = config.head_dim, H = config.num_attention_heads, KV = config.num_key_value_heads;
  const turn = (heads: number) => ({ heads, D, theta: config.rope_theta });
  return { D, H, KV, F: config.intermediate_size, queries: turn(H), keys: turn(KV), eps: config.rms_norm_eps };
}

function layerForward(
  { config, input, start }: Pick<LlamaState, "config" | "input" | "start">,
  { layer, x }: { layer: number; x: Float64Array },
): LayerState {
  const { D, H, KV, F, queries, keys, eps } = sizes(config);
  const positions = input.tokens.positionIds;
  const project = (module: LinearModule, x: Float64Array) => {
    const { w, shape } = projection({ config, input }, { layer, module });
    return linear(x, w, shape);
  };
  const norm = (name: string, x: Float64Array) =>
    rmsnorm(x, weight(input, `model.layers.${layer}.${name}.weight`), { eps });

  const { out: h1, rstd: rstd1 } = norm("input_layernorm", x);
  const q = rope(project("q_proj", h1), positions, queries);
  const k = rope(project("k_proj", h1), positions, keys);
  const v = project("v_proj", h1);
  const { out, lse } = attention({ q, k, v }, { H, KV, D, start });
  const mid = addTo(project("o_proj", out), x);
  const { out: h2, rstd: rstd2 } = norm("post_attention_layernorm", mid);
  const gateUp = sideBySide(project("gate_proj", h2), project("up_proj", h2), F);
  const act = swiglu(gateUp, F);
  const y = addTo(project("down_proj", act), mid);
  return { x, h1, rstd1, q, k, v, out, lse, mid, h2, rstd2, gateUp, act, y };
}

/** The same list upside down: `dy` is the gradient of the layer's output, the result that of its input. */
function layerBackward(
  { config, input, start, layers }: LlamaState,
  { layer, dy, gradients }: { layer: number; dy: Float64Array; gradients: Map<string, Float64Array> },
): Float64Array {
  const { D, H, KV, F, queries, keys } = sizes(config);
  const positions = input.tokens.positionIds;
  const a = layers[layer]!;
  const project = (module: LinearModule, x: Float64Array, dout: Float64Array) => {
    const { name, w, shape } = projection({ config, input }, { layer, module });
    const { dx, dA, dB } = linearBackward({ x, w, dout }, shape);
    if (input.adapter == null) {
      gradients.set(`${name}.weight`, matmulTN(dout, x, { T: shape.M, M: shape.N, N: shape.K }));
    }
    if (shape.lora) gradients.set(loraName(name, "A"), dA).set(loraName(name, "B"), dB);
    return dx;
  };
  const norm = (name: string, x: Float64Array, rstd: Float64Array, dout: Float64Array) => {
    const full = `model.layers.${layer}.${name}.weight`;
    const { dx, dweight } = rmsnormBackward({ x, weight: weight(input, full), rstd, dout });
    if (input.adapter == null) gradients.set(full, dweight);
    return dx;
  };

  const dact = project("down_proj", a.act, dy);
  const dgateUp = swigluBackward({ gateUp: a.gateUp, dout: dact }, F);
  const dh2 = project("gate_proj", a.h2, half(dgateUp, F, 0));
  addTo(dh2, project("up_proj", a.h2, half(dgateUp, F, 1)));
  const dmid = addTo(norm("post_attention_layernorm", a.mid, a.rstd2, dh2), dy);
  const dout = project("o_proj", a.out, dmid);
  const { dq, dk, dv } = attentionBackward({ ...a, dout }, { H, KV, D, start });
  const dh1 = project("v_proj", a.h1, dv);
  addTo(dh1, project("k_proj", a.h1, ropeBackward(dk, positions, keys)));
  addTo(dh1, project("q_proj", a.h1, ropeBackward(dq, positions, queries)));
  return addTo(norm("input_layernorm", a.x, a.rstd1, dh1), dmid);
}

/** Runs the model: loss = Σ nll / numItems over the labelled tokens. Throws if a weight is missing. */
export function llamaForward(config: ModelConfig, input: LlamaInput): LlamaState {
  const { inputIds, positionIds, labels } = input.tokens;
  const T = inputIds.length, C = config.hidden_size, V = config.vocab_size;
  const start = documentStarts(positionIds);
  const embed = embedding(weight(input, EMBED), inputIds, C);
  const layers: LayerState[] = [];
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    layers.push(layerForward({ config, input, start }, { layer, x: layers.at(-1)?.y ?? embed }));
  }
  const { out: norm, rstd } = rmsnorm(layers.at(-1)!.y, weight(input, "model.norm.weight"), {
    eps: config.rms_norm_eps,
  });
  const logits = matmulNT(norm, head(input), { M: T, N: V, K: C });
  const next = Array.from({ length: T }, (_, t) => t + 1 < T && positionIds[t + 1] !== 0 ? labels[t + 1]! : -100);
  const numItems = input.numItems ?? next.filter((label) => label !== -100).length;
  const { nll, dlogits } = crossEntropy(logits, next, { V, scale: 1 / numItems });
  const loss = nll.reduce((a, b) => a + b, 0) / numItems;
  return { config, input, start, embed, layers, norm, rstd, logits, dlogits, nll, loss, numItems };
}

/** The loss's gradient by every adapter tensor, or by every base weight when there is no adapter (a tied head adds to the embedding). */
export function llamaBackward(state: LlamaState): LlamaGradients {
  const { config, input, layers, dlogits } = state;
  const T = input.tokens.inputIds.length, C = config.hidden_size, V = config.vocab_size;
  const gradients = new Map<string, Float64Array>();
  const dnorm = matmulNN(dlogits, head(input), { M: T, N: C, K: V });
  const { dx: dlast, dweight } = rmsnormBackward({
    x: layers.at(-1)!.y,
    weight: weight(input, "model.norm.weight"),
    rstd: state.rstd,
    dout: dnorm,
  });
  let dx = dlast;
  for (let layer = config.num_hidden_layers - 1; layer >= 0; layer--) {
    dx = layerBackward(state, { layer, dy: dx, gradients });
  }
  if (input.adapter == null) {
    const dhead = matmulTN(dlogits, state.norm, { T, M: V, N: C });
    const dtable = embeddingBackward(dx, input.tokens.inputIds, { V, C, paddingId: config.pad_token_id });
    gradients.set("model.norm.weight", dweight);
    if (input.weights.has("lm_head.weight")) gradients.set("lm_head.weight", dhead).set(EMBED, dtable);
    else gradients.set(EMBED, addTo(dtable, dhead));
  }
  return { gradients, dx };
}
