/**
 * Final norm, head and loss, over the labelled tokens only and in chunks, so that the logits of a whole batch never exist.
 * The token that a row predicts is its label; rows without one are skipped.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Command, createRows, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import type { Ops } from "./ops.ts";
import type { Plan } from "./plan.ts";
import type { VocabSlice, Weights } from "./weights.ts";
import { paddedVocab } from "./ops.ts";
import type { ModelConfig } from "./config.ts";

/** Gradients of the head's weights, in full training; `head` is the embedding's when tied. */
export interface HeadGradients {
  readonly norm: Tensor;
  readonly head: readonly VocabSlice[];
}

/** The head of one plan. */
export interface Head {
  /** Sets how many labelled tokens the next run has. */
  setLabelled(count: number): void;
  /** `nll` of every labelled token; `sums[scale.y]` grows by their sum. */
  readonly evaluate: readonly Command[];
  /** The same, and the gradient of the last layer's output into `dx`, which must be cleared before. */
  readonly train: readonly Command[];
  /** Logits of the first chunk's rows into `plan.head.logits`: for checks and for the first token of an answer. */
  readonly logits: readonly Command[];
}

/** Records the head for `plan`; `scale` is the uniform of cross_entropy.wgsl. */
export function createHead(
  gpu: Gpu,
  { ops, config, weights, plan, scale, sums, gradients }: {
    ops: Ops;
    config: ModelConfig;
    weights: Weights;
    plan: Plan;
    scale: GPUBuffer;
    sums: Tensor;
    gradients?: HeadGradients | undefined;
  },
): Head {
  const { batch, head } = plan;
  const chunk = head.x.shape[0]!, tokens = batch.ids.shape[0]!, C = config.hidden_size, V = paddedVocab(config);
  const out = plan.x.at(-1)!;
  const all = createRows(gpu, "labelled");
  const chunks: Rows[] = [];
  for (let first = 0; first < tokens; first += chunk) chunks.push(createRows(gpu, `labelled.${first}`));

  const logits = (rows: Rows): Command[] => [
    ops.embedding.gather({ rows, ids: batch.labelRows, table: out, out: head.x }),
    ops.norm.forward({ rows, x: head.x, weight: weights.norm, out: head.h, rstd: head.rstd }),
    ...weights.head.map(({ first, tensor }) =>
      ops.matmul.nt({
        rows,
        x: { tensor: head.h },
        w: { tensor },
        out: { tensor: head.logits, offset: first, stride: V },
        n: tensor.shape[0]!,
        k: C,
      })
    ),
  ];
  const backward = (rows: Rows): Command[] => {
    const commands: Command[] = [
      ops.loss.backward({ rows, scale, labels: batch.labels, logits: head.logits, nll: batch.nll }),
    ];
    weights.head.forEach(({ first, tensor }, i) => {
      const dlogits = { tensor: head.logits, offset: first, stride: V };
      const n = tensor.shape[0]!;
      commands.push(ops.matmul.nn({
        rows,
        x: dlogits,
        w: { tensor },
        out: { tensor: head.dh! },
        n: C,
        k: n,
        plus: i > 0 ? "out" : undefined,
      }));
      if (gradients) {
        const dhead = gradients.head[i]!.tensor;
        commands.push(
          ops.matmul.tn({ rows, x: dlogits, w: { tensor: head.h }, out: { tensor: dhead }, m: n, n: C, plus: "out" }),
        );
      }
    });
    if (gradients) {
      commands.push(
        ops.norm.backwardWeight({ rows, x: head.x, rstd: head.rstd, dout: head.dh!, dweight: gradients.norm }),
      );
    }
    const norm = { rows, x: head.x, weight: weights.norm, rstd: head.rstd, dout: head.dh!, dx: head.dx! };
    commands.push(
      { clear: head.dx! },
      ops.norm.backward(norm),
      ops.embedding.scatter({ rows, ids: batch.labelRows, x: head.dx!, out: plan.gradients!.dx }),
    );
    return commands;
  };
  const total = ops.loss.total({ rows: all, scale, nll: batch.nll, sums });
  return {
    setLabelled(count) {
      all.set(count);
      chunks.forEach((rows, i) => rows.set(Math.max(0, Math.min(chunk, count - i * chunk)), i * chunk));
    },
    evaluate: [
      ...chunks.flatMap((rows) => [
        ...logits(rows),
        ops.loss.loss({ rows, labels: batch.labels, logits: head.logits, nll: batch.nll }),
      ]),
      total,
    ],
    train: plan.gradients ? [...chunks.flatMap((rows) => [...logits(rows), ...backward(rows)]), total] : [],
    logits: logits(chunks[0]!),
  };
}
