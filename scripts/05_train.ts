/**
 * 05 · Train: supervised fine-tuning of the adapter (or, after `02 --mode full`, of every weight) on packed rows.
 * Blog section "Step 4: Training Configuration"; QLoRA, arXiv:2305.14314. An interrupted run goes on where its last
 * checkpoint left it and ends with the same bits as one that was never interrupted.
 *
 *   deno task train                     05 and whatever stage before it is missing
 *   deno task 05 --max-steps 20
 *   deno task 05 --no-resume            start over
 *
 * reads   artifacts/02_load  artifacts/03_dataset  artifacts/04_lora
 * writes  artifacts/05_train/adapter (or model)  checkpoints/  log.jsonl  trainer_state.json  report.html  manifest.json
 */
import {
  epochOrder,
  gatherRows,
  microBatches,
  nextTokenTargets,
  type PackedRows,
  readRows,
} from "../lib/data/dataset.ts";
import { type Adapter, readAdapter } from "../lib/model/adapter.ts";
import { listCheckpoints, loadCheckpoint, pruneCheckpoints, saveCheckpoint } from "../lib/model/checkpoint.ts";
import { readJsonObject } from "../lib/model/config.ts";
import type { MicroBatch } from "../lib/model/llama.ts";
import { planBytes } from "../lib/model/plan.ts";
import { copyFolder, saveTrained } from "../lib/model/save.ts";
import { learningRate, plannedSteps, warmupSteps } from "../lib/model/schedule.ts";
import { type EvaluationResult, Trainer } from "../lib/model/trainer.ts";
import { byRecipe, choice, flags } from "../lib/run/flags.ts";
import { beginStage, sha256File } from "../lib/run/manifest.ts";
import { bytes, count, duration, percent, table } from "../lib/run/print.ts";
import { openRunLog } from "../lib/run/run_log.ts";

const opt = flags(import.meta, {
  model: "artifacts/02_load",
  dataset: "artifacts/03_dataset",
  adapter: "artifacts/04_lora", // not read in full mode
  epochs: 3,
  maxSteps: 0, // updates; 0 = as many as the epochs have
  batchSize: 4, // rows per micro-batch
  evalBatchSize: 0, // rows per micro-batch of an evaluation; 0 = the batch size
  gradientAccumulation: byRecipe({ tiny: 1, blog: 8 }), // micro-batches per update
  learningRate: byRecipe({ tiny: 4e-3, blog: 2e-4 }), // at the peak; a tiny model wants a larger one
  scheduler: choice(["cosine", "linear", "constant"]),
  warmupRatio: 0.05,
  weightDecay: 0.01,
  beta1: 0.9,
  beta2: 0.999,
  eps: 1e-8,
  maxGradNorm: 1, // 0 = no clipping
  optimizer: choice(["adamw", "adamw_8bit"], "adamw_8bit"),
  checkpointing: choice(["none", "block"], { tiny: "none", blog: "block" }), // block: keep each layer's input, compute the rest again
  resident: false, // decode 4-bit weights once and keep them: faster, more memory
  evalSteps: byRecipe({ tiny: 20, blog: 250 }),
  saveSteps: byRecipe({ tiny: 40, blog: 500 }),
  saveTotalLimit: 2, // checkpoints kept; 0 = all
  loadBest: true, // end with the parameters of the lowest eval_loss
  loggingSteps: byRecipe({ tiny: 5, blog: 10 }), // updates between lines on the screen; the log has every update
  seed: byRecipe({ tiny: 42, blog: 3407 }), // of the order of rows; 3407 is Unsloth's default
  resume: true, // go on from the last checkpoint of an unfinished run
}, {
  renamed: {
    gradientAccumulationSteps: "gradientAccumulation",
    perDeviceTrainBatchSize: "batchSize",
    numTrainEpochs: "epochs",
  },
});

// 1. What is trained on what.
const { mode } = readJsonObject(`${opt.model}/load.json`) as { mode: "qlora" | "lora" | "full" };
const reads = [opt.model, opt.dataset, ...(mode === "full" ? [] : [opt.adapter])];
const stage = await beginStage("05_train", opt, { reads, reuse: true });
const train = readRows(`${opt.dataset}/train.safetensors`);
const validation = readRows(`${opt.dataset}/validation.safetensors`);
const rows = train.rowOffsets.length - 1;
const { batchesPerEpoch, stepsPerEpoch, totalSteps } = plannedSteps({
  rows,
  ...opt,
  accumulation: opt.gradientAccumulation,
});
const warmup = warmupSteps(opt.warmupRatio, totalSteps);
const evalBatchSize = opt.evalBatchSize > 0 ? opt.evalBatchSize : opt.batchSize;
const tokens = Math.max(
  ...[[train, opt.batchSize], [validation, evalBatchSize]].map(([r, n]) => mostTokens(r as PackedRows, n as number)),
);

// 2. The model on the GPU, its memory as a table.
const adapter: Adapter | undefined = mode === "full" ? undefined : readAdapter(opt.adapter);
const began = performance.now();
const trainer = await Trainer.open({ ...opt, adapter, tokens, train: mode === "full" ? "full" : "lora", hyper: opt });
const { gpu, plan, weights, groups } = trainer.llama;
const learnt = groups.flatMap(({ slots }) => slots).reduce((sum, { elements }) => sum + elements, 0);
const size = (tensors: Iterable<{ bytes: number }>) => [...tensors].reduce((sum, t) => sum + t.bytes, 0);
const memory = {
  weights: size(weights.tensors),
  "parameters and gradients": mode === "full"
    ? size(groups.map(({ grad }) => grad))
    : 2 * size(groups.map(({ grad }) => grad)),
  "optimizer state": size(trainer.optimizer.state.values()),
  "kept activations": planBytes(plan).kept,
  "scratch and batch": planBytes(plan).scratch + planBytes(plan).batch,
};
const total = Object.values(memory).reduce((sum, n) => sum + n, 0);
console.log(`${gpu.name}\n`);
console.log(table([
  ["Mode", `${mode}, ${count(learnt)} parameters learn`],
  [
    "Rows",
    `${count(rows)} of at most ${count(mostTokens(train, 1))} tokens, ${
      count(validation.rowOffsets.length - 1)
    } to validate`,
  ],
  [
    "Update",
    `${opt.batchSize} rows x ${opt.gradientAccumulation}, ${count(totalSteps)} updates, ${warmup} of them warm-up`,
  ],
  ...Object.entries(memory).map(([name, n]) => [`GPU: ${name}`, bytes(n)]),
  ["GPU: in all", bytes(total)],
]));

// 3. Where an interrupted run left it.
const checkpoints = `${opt.out}/checkpoints`;
const settings = JSON.stringify({
  ...Object.fromEntries(
    Object.entries(opt).filter(([name]) =>
      !["out", "force", "verbose", "help", "resume", "loggingSteps"].includes(name)
    ),
  ),
  rows: sha256File(`${opt.dataset}/train.safetensors`),
});
if (opt.force || !opt.resume) await Deno.remove(checkpoints, { recursive: true }).catch(() => {});
const last = listCheckpoints(checkpoints).at(-1);
let { step, logBytes, best } = last
  ? await loadCheckpoint(last.path, { trainer, settings })
  : { step: 0, logBytes: 0, best: null };
const log = await openRunLog(`${opt.out}/log.jsonl`, logBytes);
if (step > 0) console.log(`\nGoing on after update ${step} (${last!.path}).`);

// 4. The loop: micro-batches of an update, the update, and now and then a look at the validation rows.
const evaluation = evaluationBatches(validation);
let shown = performance.now(), readAt = performance.now(), firstLoss: number | undefined, epochOf = -1;
let updates: number[][][] = [];
let baseLoss: number | undefined;
console.log();
if (step === 0) {
  const first = updateBatches(1);
  const { nllSum, tokens } = await trainer.evaluate(first.batches, first.rows.map((r) => r.length));
  baseLoss = nllSum / tokens;
  await evaluate();
}
const pending = new Map<number, { rows: number[][]; epoch: number; rate: number; all: number }>();
let timed = { updates: 0, tokens: 0, ms: 0 };
while (step < totalSteps) {
  const { batches, rows: which, epoch } = updateBatches(++step);
  const rate = learningRate({
    scheduler: opt.scheduler,
    step,
    totalSteps,
    warmupSteps: warmup,
    peak: opt.learningRate,
  });
  trainer.update(batches, { step, learningRate: rate });
  pending.set(step, { rows: which, epoch, rate, all: batches.reduce((sum, { inputIds }) => sum + inputIds.length, 0) });
  const due = (every: number) => every > 0 && step % every === 0 || step === totalSteps;
  if (trainer.pending >= 16 || performance.now() - readAt > 1000 || due(opt.evalSteps) || due(opt.saveSteps)) {
    await readResults();
  }
  if (due(opt.evalSteps)) await evaluate();
  if (due(opt.saveSteps)) await save();
}

// 5. The result: the best adapter of the run, or the last.
const kept = opt.loadBest && best && best.step < totalSteps ? `${checkpoints}/best` : undefined;
const target = `${opt.out}/${mode === "full" ? "model" : "adapter"}`;
await Deno.remove(target, { recursive: true }).catch(() => {});
if (kept) await copyFolder(kept, target);
else await saveTrained(trainer.llama, { dir: target, model: opt.model, lora: adapter?.lora });
await log.writeReport(opt.out, {
  title: "Training",
  device: gpu.name,
  state: {
    best_metric: best?.evalLoss ?? null,
    best_global_step: best?.step ?? null,
    global_step: totalSteps,
    max_steps: totalSteps,
    num_train_epochs: Math.ceil(totalSteps / stepsPerEpoch),
    epoch: totalSteps / stepsPerEpoch,
    eval_steps: opt.evalSteps,
    save_steps: opt.saveSteps,
    logging_steps: 1,
    train_batch_size: opt.batchSize,
  },
});

// 6. The proof: the first loss is the loss of the model as it came, and the log shows what became of it.
const losses = log.losses();
const rateOf = timed.ms > 0 ? 1000 * timed.tokens / timed.ms : 0;
if (baseLoss !== undefined && Math.abs(firstLoss! - baseLoss) > 1e-5 * baseLoss) {
  throw new Error(
    `Cannot accept this run: update 1 had loss ${firstLoss}, but evaluated without learning it is ${baseLoss}`,
  );
}
console.log(
  `\nLoss ${losses.train.at(0)?.toFixed(4)} → ${losses.train.at(-1)?.toFixed(4)}, validation ` +
    `${losses.eval.at(0)?.toFixed(4)} → ${losses.eval.at(-1)?.toFixed(4)}; ${
      kept ? `best at update ${best!.step}; ` : ""
    }` +
    `${count(rateOf)} tokens/s, ${duration(performance.now() - began)}. See ${opt.out}/report.html`,
);
await stage.done({
  device: gpu.name,
  numbers: {
    mode,
    trainable: learnt,
    rows,
    batches_per_epoch: batchesPerEpoch,
    steps: totalSteps,
    warmup_steps: warmup,
    memory,
    gpu_bytes: total,
    first_loss: losses.train.at(0),
    last_loss: losses.train.at(-1),
    first_eval_loss: losses.eval.at(0),
    last_eval_loss: losses.eval.at(-1),
    best_step: best?.step ?? null,
    tokens_per_second: rateOf,
  },
});

/** Tokens of the largest micro-batch of `n` rows that there can be. */
function mostTokens({ rowOffsets }: PackedRows, n: number): number {
  const lengths = rowOffsets.slice(1).map((end, i) => end - rowOffsets[i]!).sort((a, b) => b - a);
  return lengths.slice(0, n).reduce((sum, length) => sum + length, 0);
}

function micro(rows: PackedRows, which: readonly number[]): MicroBatch {
  const gathered = gatherRows(rows, which);
  return { ...gathered, targets: nextTokenTargets(gathered) };
}

/** The micro-batches of update `number`, from the order of its epoch. */
function updateBatches(number: number): { batches: MicroBatch[]; rows: number[][]; epoch: number } {
  const epoch = Math.floor((number - 1) / stepsPerEpoch), within = (number - 1) % stepsPerEpoch;
  if (epochOf !== epoch) {
    updates = microBatches(epochOrder(rows, opt.seed, epoch), {
      batchSize: opt.batchSize,
      accumulation: opt.gradientAccumulation,
    });
    epochOf = epoch;
  }
  const which = updates[within]!;
  const done = within * opt.gradientAccumulation + which.length;
  return { batches: which.map((r) => micro(train, r)), rows: which, epoch: epoch + done / batchesPerEpoch };
}

function evaluationBatches(all: PackedRows): { batches: MicroBatch[]; rows: number[] } {
  const order = Array.from({ length: all.rowOffsets.length - 1 }, (_, r) => r);
  const which = microBatches(order, { batchSize: evalBatchSize, accumulation: 1 }).map(([r]) => r!);
  return { batches: which.map((r) => micro(all, r)), rows: which.map((r) => r.length) };
}

/** Reads the losses of the updates since the last time, logs each, and shows one now and then. */
async function readResults(): Promise<void> {
  const results = await trainer.read();
  const now = performance.now(), ms = (now - readAt) / Math.max(1, results.length);
  readAt = now;
  for (const { step: number, loss, gradNorm, tokens } of results) {
    const { rows, epoch, rate, all } = pending.get(number)!;
    pending.delete(number);
    firstLoss ??= loss;
    log.append({ step: number, epoch, loss, grad_norm: gradNorm, learning_rate: rate, tokens, rows, ms });
    // The first read has the compilation of pipelines in it.
    if (number > 1) timed = { updates: timed.updates + 1, tokens: timed.tokens + all, ms: timed.ms + ms };
    const due = number === 1 || number === totalSteps || number % opt.loggingSteps === 0 || now - shown > 10_000;
    if (!due) continue;
    shown = now;
    console.log([
      `step ${String(number).padStart(String(totalSteps).length)}/${totalSteps}`,
      `loss ${loss.toFixed(4)}`,
      `norm ${gradNorm.toFixed(3)}`,
      `lr ${rate.toExponential(2)}`,
      duration(ms).padStart(7),
      `${count(1000 * all / ms).padStart(7)} tok/s`,
      `${duration(ms * (totalSteps - number))} left`,
    ].join(" | "));
  }
}

async function evaluate(): Promise<void> {
  const result: EvaluationResult = await trainer.evaluate(evaluation.batches, evaluation.rows);
  const { evalLoss, nllSum, tokens } = result;
  log.append({ step, eval_loss: evalLoss, eval_perplexity: Math.exp(nllSum / tokens) });
  const improved = best === null || evalLoss < best.evalLoss;
  console.log(
    `step ${String(step).padStart(String(totalSteps).length)}/${totalSteps} | eval_loss ${evalLoss.toFixed(4)} | ` +
      `perplexity ${Math.exp(nllSum / tokens).toFixed(2)}${improved && step > 0 ? " | best so far" : ""}`,
  );
  readAt = shown = performance.now();
  if (!improved) return;
  best = { step, evalLoss };
  if (opt.loadBest && step > 0) {
    const partial = `${checkpoints}/best.partial`;
    await saveTrained(trainer.llama, { dir: partial, model: opt.model, lora: adapter?.lora });
    await Deno.remove(`${checkpoints}/best`, { recursive: true }).catch(() => {});
    await Deno.rename(partial, `${checkpoints}/best`);
  }
}

async function save(): Promise<void> {
  const run = { step, logBytes: log.bytes(), best, settings };
  const also = (dir: string) =>
    saveTrained(trainer.llama, { dir: `${dir}/adapter`, model: opt.model, lora: adapter?.lora });
  await saveCheckpoint(`${checkpoints}/step-${step}`, {
    trainer,
    run,
    also: mode === "full" ? () => Promise.resolve() : also,
  });
  await pruneCheckpoints(checkpoints, { limit: opt.saveTotalLimit });
  readAt = performance.now();
}
