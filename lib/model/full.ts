/**
 * Full training: gradients of every base weight, the tied embedding included, and the parameter groups made of them.
 * The padding token's embedding row gets no lookup gradient, as in transformers (`padding_idx`).
 */
import type { Gpu } from "../gpu/device.ts";
import { type Command, createRows } from "../gpu/kernel.ts";
import { createTensor, type Tensor } from "../gpu/tensor.ts";
import type { ParameterSlot } from "../ops/adamw.ts";
import { type ModelConfig, moduleName } from "./config.ts";
import type { HeadGradients } from "./head.ts";
import type { LayerWeightGradients } from "./layer.ts";
import type { Ops } from "./ops.ts";
import type { ParameterGroup } from "./optimizer.ts";
import { FUSED, type FusedName, type VocabSlice, type Weights } from "./weights.ts";

/** Gradients of the base weights. */
export interface FullGradients {
  readonly layers: readonly LayerWeightGradients[];
  readonly head: HeadGradients;
  readonly groups: readonly ParameterGroup[];
  /** Sorts the tokens of the next micro-batch by id, for the embedding's gradient. */
  setTokens(ids: Uint32Array): void;
  /** Adds the lookup part of the embedding's gradient from `dx` `[T, C]`. */
  embedding(t: { ops: Ops; dx: Tensor }): Command[];
}

/** Allocates gradients for micro-batches of up to `tokens` tokens. */
export function createFullGradients(
  gpu: Gpu,
  { config, weights, tokens }: { config: ModelConfig; weights: Weights; tokens: number },
): FullGradients {
  const groups: ParameterGroup[] = [];
  const like = (param: Tensor, slots: ParameterSlot[], options: { decay: boolean; embedding?: boolean }): Tensor => {
    const grad = createTensor(gpu, { name: `${param.name}.grad`, shape: param.shape });
    groups.push({ name: param.name, param, grad, slots, ...options });
    return grad;
  };
  const whole = (name: string, elements: number): ParameterSlot => ({
    name,
    offset: 0,
    elements,
    columns: elements,
    stride: elements,
  });
  const norm = (param: Tensor) => like(param, [whole(param.name, config.hidden_size)], { decay: false });
  const slices = (name: string, all: readonly VocabSlice[]): VocabSlice[] =>
    all.map(({ first, tensor }) => {
      const rows = Math.min(tensor.shape[0]!, config.vocab_size - first);
      const slot = whole(all.length === 1 ? name : `${name}[${first}…]`, rows * config.hidden_size);
      return { first, tensor: like(tensor, [slot], { decay: true, embedding: name.includes("embed") }) };
    });

  const embed = slices("model.embed_tokens.weight", weights.embed);
  const layers = weights.layers.map((layer, l): LayerWeightGradients => {
    const linear = (fused: FusedName) => {
      const { weight, parts, k } = layer[fused];
      let offset = 0;
      const slots = FUSED[fused].map((module, i) => {
        const slot = { ...whole(`${moduleName(l, module)}.weight`, parts[i]!.columns * k), offset };
        offset += slot.elements;
        return slot;
      });
      return like(weight, slots, { decay: true });
    };
    return {
      inputNorm: norm(layer.inputNorm),
      qkv: linear("qkv"),
      o: linear("o"),
      postAttentionNorm: norm(layer.postAttentionNorm),
      gateUp: linear("gateUp"),
      down: linear("down"),
    };
  });
  const head = weights.head === weights.embed ? embed : slices("lm_head.weight", weights.head);

  const distinct = createRows(gpu, "distinct ids");
  const index = (name: string, size: number) => createTensor(gpu, { name, shape: [size], dtype: "u32" });
  const ids = index("distinct_ids", tokens),
    order = index("token_order", tokens),
    starts = index("id_starts", tokens + 1);
  return {
    layers,
    head: { norm: norm(weights.norm), head },
    groups,
    setTokens(tokenIds) {
      const sorted = Array.from(tokenIds, (id, at) => ({ id, at }))
        .filter(({ id }) => id !== config.pad_token_id)
        .sort((a, b) => a.id - b.id || a.at - b.at);
      const firsts = sorted.flatMap(({ id }, i) => i === 0 || sorted[i - 1]!.id !== id ? [i] : []);
      distinct.set(firsts.length);
      if (firsts.length === 0) return;
      const write = (tensor: Tensor, data: number[]) => gpu.queue.writeBuffer(tensor.buffer, 0, Uint32Array.from(data));
      write(ids, firsts.map((i) => sorted[i]!.id));
      write(order, sorted.map(({ at }) => at));
      write(starts, [...firsts, sorted.length]);
    },
    embedding: ({ ops, dx }) =>
      embed.map(({ first, tensor }) =>
        ops.embedding.backward({ rows: distinct, ids, order, starts, x: dx, dtable: tensor, first })
      ),
  };
}
