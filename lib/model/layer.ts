/**
 * One decoder layer: forward, and under it backward, each tensor under the same name.
 *
 * Conventions: gradients of parameters and of the residual `dx` are added to, all other gradients overwrite. Forward never
 * writes what it reads, so running it again in the backward pass (block checkpointing) is harmless. Backward runs once.
 */
import type { Command, Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import { type LayerLora, linearBackward, linearForward, type LoraDropout, lowRankInput } from "./lora.ts";
import type { Ops } from "./ops.ts";
import type { Activations, BatchTensors, Gradients } from "./plan.ts";
import type { FusedName, LayerWeights } from "./weights.ts";

/** Gradients of a layer's base weights, in full training. */
export interface LayerWeightGradients extends Record<FusedName, Tensor> {
  readonly inputNorm: Tensor;
  readonly postAttentionNorm: Tensor;
}

/** What one layer computes on. */
export interface LayerStep {
  readonly ops: Ops;
  readonly rows: Rows;
  readonly batch: BatchTensors;
  readonly weights: LayerWeights;
  readonly lora: LayerLora | undefined;
  readonly a: Activations;
  /** The layer's input `[T, C]`. */
  readonly x: Tensor;
  /** Of what the adapter reads, in training with dropout. */
  readonly dropout?: LoraDropout | undefined;
}

/** Dequantizes 4-bit weights into scratch; nothing for dense ones. */
export function dequantize(weights: LayerWeights): Command[] {
  return [weights.qkv, weights.o, weights.gateUp, weights.down].flatMap((linear) => linear.dequantize);
}

/** `y = mid + down(silu(gate) · up)`, `mid = x + o(attention(x))`. Without `y` only what backward needs is computed. */
export function forward(
  { ops, rows, batch, weights, lora, a, x, y, dropout }: LayerStep & { y: Tensor | undefined },
): Command[] {
  const linear = (name: FusedName) => ({
    ops,
    rows,
    linear: weights[name],
    lora: lora?.[name] ?? null,
    u: a.u[name],
    dropout,
  });
  return [
    ops.norm.forward({ rows, x, weight: weights.inputNorm, out: a.h1, rstd: a.rstd1 }),
    ...linearForward({ ...linear("qkv"), x: a.h1, out: a.qkv }),
    ops.rope.forward({ rows, positions: batch.positions, qkv: a.qkv }),
    ops.attention.forward({ rows, documents: batch.documents, qkv: a.qkv, out: a.attention, lse: a.lse }),
    ...linearForward({ ...linear("o"), x: a.attention, out: a.mid, plus: x }),
    ops.norm.forward({ rows, x: a.mid, weight: weights.postAttentionNorm, out: a.h2, rstd: a.rstd2 }),
    ...linearForward({ ...linear("gateUp"), x: a.h2, out: a.gateUp }),
    ops.swiglu.forward({ rows, gateUp: a.gateUp, out: a.act }),
    ...(y
      ? linearForward({ ...linear("down"), x: a.act, out: y, plus: a.mid })
      : lowRankInput({ ...linear("down"), x: a.act })),
  ];
}

/**
 * The same list upside down. `g.dx` holds the gradient of `y` and becomes that of `x`. With `last` nothing below this layer
 * learns, so the gradient of `x` is not made.
 */
export function backward(
  { ops, rows, batch, weights, lora, a, x, g, d, last, dropout }: LayerStep & {
    g: Gradients;
    d: LayerWeightGradients | undefined;
    last: boolean;
  },
): Command[] {
  const linear = (name: FusedName) => ({
    ops,
    rows,
    linear: weights[name],
    lora: lora?.[name] ?? null,
    u: a.u[name],
    v: g.v[name],
    dweight: d?.[name],
    dropout,
  });
  const normWeight = (x: Tensor, rstd: Tensor, dweight: Tensor | undefined): Command[] =>
    dweight ? [ops.norm.backwardWeight({ rows, x, rstd, dout: g.dh, dweight })] : [];
  return [
    // From here on `act` and `gateUp` hold their own gradients.
    ...linearBackward({ ...linear("down"), x: a.act, dout: g.dx, dx: a.act }),
    ops.swiglu.backward({ rows, gateUp: a.gateUp, dout: a.act }),
    ...linearBackward({ ...linear("gateUp"), x: a.h2, dout: a.gateUp, dx: g.dh }),
    ...normWeight(a.mid, a.rstd2, d?.postAttentionNorm),
    ops.norm.backward({ rows, x: a.mid, weight: weights.postAttentionNorm, rstd: a.rstd2, dout: g.dh, dx: g.dx }),
    ...linearBackward({ ...linear("o"), x: a.attention, dout: g.dx, dx: g.dattention }),
    ...ops.attention.backward({
      rows,
      documents: batch.documents,
      qkv: a.qkv,
      out: a.attention,
      lse: a.lse,
      dout: g.dattention,
      delta: g.delta,
      dqkv: g.dqkv,
    }),
    ops.rope.backward({ rows, positions: batch.positions, qkv: g.dqkv }),
    ...linearBackward({ ...linear("qkv"), x: a.h1, dout: g.dqkv, dx: last ? undefined : g.dh }),
    ...normWeight(x, a.rstd1, last ? undefined : d?.inputNorm),
    ...(last ? [] : [ops.norm.backward({ rows, x, weight: weights.inputNorm, rstd: a.rstd1, dout: g.dh, dx: g.dx })]),
  ];
}
