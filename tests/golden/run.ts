/**
 * The golden training runs: their micro-batches, and a Trainer taken through them. It compares nothing.
 */
import { nextTokenTargets } from "../../lib/data/dataset.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { readConfig } from "../../lib/model/config.ts";
import type { MicroBatch } from "../../lib/model/llama.ts";
import { plannedSteps, warmupSteps } from "../../lib/model/schedule.ts";
import { learningRate } from "../../lib/model/schedule.ts";
import type { EvaluationResult } from "../../lib/model/perplexity.ts";
import { type Hyperparameters, Trainer, type UpdateResult } from "../../lib/model/trainer.ts";
import { type Golden, golden, goldenPath } from "../check.ts";
import { readJson, rebuilt } from "./rebuild.ts";

export type Size = "tiny" | "odd";

/** Micro-batches of a run, by update, and of its evaluations. */
export interface RunBatches {
  readonly updates: readonly (readonly MicroBatch[])[];
  readonly evaluation: { readonly batches: readonly MicroBatch[]; readonly rows: readonly number[] };
}

/** What `arguments.json` says of a run, as far as it is used here. */
export interface RunArguments {
  readonly optim: "adamw_torch" | "adamw_8bit";
  readonly packing_strategy: "bfd" | "wrapped";
  readonly max_length: number;
  readonly batch: number;
  readonly accum: number;
  readonly epochs: number;
  readonly seed: number;
  readonly lr: number;
  readonly warmup: number;
  readonly wd: number;
  readonly betas: readonly [number, number];
  readonly adam_epsilon: number;
  readonly max_grad_norm: number;
  readonly eval_steps: number;
  readonly initial_adapter: string;
}

/** What a run came to. */
export interface RunResult {
  readonly updates: readonly (UpdateResult & { readonly learningRate: number })[];
  /** By the update that they came after. */
  readonly evaluations: ReadonlyMap<number, EvaluationResult>;
  readonly adapter: ReadonlyMap<string, Float32Array>;
}

/** The arguments of a golden run. */
export const argumentsOf = (size: Size, run: string): RunArguments => readJson(`${size}/train/${run}/arguments.json`);

/** One golden micro-batch, its padding left out: without positions it is plain rows of 128 tokens that count through. */
function microBatch(file: Golden, key: string): MicroBatch {
  const has = (name: string) => file.names.includes(`${key}.${name}`);
  const mask = has("attention_mask") ? file.i32(`${key}.attention_mask`) : undefined; // left out where it is all ones
  const bare = (values: Int32Array) => values.filter((_, t) => mask?.[t] !== 0);
  const inputIds = bare(file.i32(`${key}.input_ids`)), labels = bare(file.i32(`${key}.labels`));
  const positionIds = bare(
    has("position_ids") ? file.i32(`${key}.position_ids`) : file.i32(`${key}.input_ids`).map((_, t) => t % 128),
  );
  return { inputIds, positionIds, targets: nextTokenTargets({ positionIds, labels }) };
}

/** The micro-batches that the golden runs were given. */
export function goldenBatches(size: Size, packing: "bfd" | "wrapped"): RunBatches {
  const file = golden(`${size}/train/micro_batches_${packing}.safetensors`);
  const { updates, eval_batches }: {
    updates: { micro: number[] }[];
    eval_batches: { key: string; rows: number }[];
  } = readJson(`${size}/train/micro_batches_${packing}.json`);
  return {
    updates: updates.map(({ micro }) => micro.map((n) => microBatch(file, `micro.${String(n).padStart(3, "0")}`))),
    evaluation: {
      batches: eval_batches.map(({ key }) => microBatch(file, key)),
      rows: eval_batches.map(({ rows }) => rows),
    },
  };
}

/** A Trainer as a golden run was set up, with another optimizer if one is given. */
export async function openTrainer(
  size: Size,
  run: RunArguments,
  options: Partial<Hyperparameters> & { readonly adapter?: string } = {},
): Promise<Trainer> {
  const { adapter = await rebuilt(`${size}/${run.initial_adapter}`), ...hyper } = options;
  const model = goldenPath(`${size}/model_hf`);
  return await Trainer.open({
    model,
    adapter: readAdapter(adapter, readConfig(model)),
    train: "lora",
    tokens: run.batch * run.max_length,
    hyper: {
      optimizer: run.optim === "adamw_8bit" ? "adamw_8bit" : "adamw",
      weightDecay: run.wd,
      beta1: run.betas[0],
      beta2: run.betas[1],
      eps: run.adam_epsilon,
      maxGradNorm: run.max_grad_norm,
      ...hyper,
    },
  });
}

/** The learning rate of each update of a run over `rows` rows. */
export function ratesOf(run: RunArguments, rows: number): (step: number) => number {
  const { totalSteps } = plannedSteps({ rows, batchSize: run.batch, accumulation: run.accum, epochs: run.epochs });
  const warmup = warmupSteps({ scheduler: "cosine", ratio: run.warmup, total: totalSteps });
  return (step) => learningRate({ scheduler: "cosine", step, totalSteps, warmupSteps: warmup, peak: run.lr });
}

/** Takes a Trainer through all updates, evaluating when the golden run did. */
export async function train(
  trainer: Trainer,
  { run, batches, rows }: { run: RunArguments; batches: RunBatches; rows: number },
): Promise<RunResult> {
  const rate = ratesOf(run, rows), { updates, evaluation } = batches;
  const results: RunResult["updates"][number][] = [], evaluations = new Map<number, EvaluationResult>();
  for (const [i, update] of updates.entries()) {
    const step = i + 1;
    trainer.update(update, { step, learningRate: rate(step) });
    if (step % run.eval_steps !== 0 && step !== updates.length) continue;
    results.push(...(await trainer.read()).map((result) => ({ ...result, learningRate: rate(result.step) })));
    evaluations.set(step, await trainer.evaluate(evaluation));
  }
  return { updates: results, evaluations, adapter: await trainer.llama.parameters() };
}
