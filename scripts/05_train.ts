/**
 * 05 · Train: supervised fine-tuning of the adapter (or, after `02 --mode full`, of every weight) on packed rows.
 * Blog section "Step 4: Training Configuration"; QLoRA, arXiv:2305.14314. An interrupted run goes on where its last
 * checkpoint left it and ends with the same bits as one that was never interrupted.
 *
 *   deno task train                     05 and before it whatever stage is missing or out of date
 *   deno task 05 --max-steps 20
 *   deno task 05 --no-resume            start over
 *
 * reads   artifacts/02_load  artifacts/03_dataset  artifacts/04_lora
 * writes  artifacts/05_train/adapter (or model)  checkpoints/  log.jsonl  trainer_state.json  report.html  manifest.json
 */
import { evaluationBatches, mostTokens, readSplit, trainingBatches, type UpdateBatches } from "../lib/data/batches.ts";
import { checkHolds, copyFolder, writeAtomic, writeWhole } from "../lib/data/files.ts";
import { byLabel, chromeTrace } from "../lib/gpu/trace.ts";
import { readAdapter } from "../lib/model/adapter.ts";
import {
  listCheckpoints,
  pruneCheckpoints,
  restoreCheckpoint,
  resumeState,
  saveCheckpoint,
} from "../lib/model/checkpoint.ts";
import { readConfig } from "../lib/model/config.ts";
import { saveTrained } from "../lib/model/save.ts";
import { learningRate, plannedSteps, warmupSteps } from "../lib/model/schedule.ts";
import { tileRows } from "../lib/model/tiles.ts";
import { checkEvaluation, checkUpdate, Trainer } from "../lib/model/trainer.ts";
import { openCache } from "../lib/run/cache.ts";
import { byRecipe, checkNumbers, choice, flags } from "../lib/run/flags.ts";
import { readManifest } from "../lib/run/manifest.ts";
import { bytes, count, duration, percent, type Progress, progress, table } from "../lib/run/print.ts";
import { openRunLog } from "../lib/run/run_log.ts";
import { beginStage, checkInput } from "../lib/run/stage.ts";
import { readLoad, trainedKind } from "../lib/run/trained.ts";

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
  warmupRatio: 0.05, // of the updates; constant has no warm-up
  weightDecay: 0.01,
  beta1: 0.9,
  beta2: 0.999,
  eps: 1e-8,
  maxGradNorm: 1, // 0 = no clipping
  optimizer: choice(["adamw", "adamw_8bit"], "adamw_8bit"),
  checkpointing: choice(["none", "block"], { tiny: "none", blog: "block" }), // block: keep each layer's input, compute the rest again
  resident: false, // dequantize 4-bit weights once and keep them: faster, more memory
  evalSteps: byRecipe({ tiny: 20, blog: 250 }),
  saveSteps: byRecipe({ tiny: 40, blog: 500 }),
  saveTotalLimit: 2, // checkpoints kept; 0 = all
  loadBest: true, // end with the parameters of the lowest eval_loss
  loggingSteps: byRecipe({ tiny: 5, blog: 10 }), // updates between lines on the screen; the log has every update
  seed: byRecipe({ tiny: 42, blog: 3407 }), // of the order of rows; 3407 is Unsloth's default
  resume: true, // go on from the last checkpoint of an unfinished run
  profile: 0, // update whose dispatches are timed, into trace.json and a table; 0 = none
}, {
  aliases: {
    gradientAccumulationSteps: "gradientAccumulation",
    perDeviceTrainBatchSize: "batchSize",
    numTrainEpochs: "epochs",
  },
});

checkNumbers(opt, { whole: { batchSize: 1, gradientAccumulation: 1, loggingSteps: 1, maxSteps: 0, evalBatchSize: 0 } });
checkNumbers(opt, {
  whole: { evalSteps: 0, saveSteps: 0, saveTotalLimit: 0, seed: 0, profile: 0 },
  real: { epochs: 0 },
});
checkNumbers(opt, {
  real: { learningRate: 0, warmupRatio: 0, weightDecay: 0, beta1: 0, beta2: 0, eps: 0, maxGradNorm: 0 },
  below: { beta1: 1, beta2: 1 },
});

// 1. What is trained on what.
checkInput(opt.model);
const { mode } = readLoad(opt.model);
const reads = [opt.model, opt.dataset, ...(mode === "full" ? [] : [opt.adapter])];
const finished = readManifest(opt.out) !== undefined; // its checkpoints are of a run that is over
const { resume, loggingSteps, profile, ...recorded } = opt; // these change nothing of what is learnt
// A run that is over is up to date, unless it is to be done once more.
const again = opt.force || !resume || profile > 0;
const stage = await beginStage("05_train", { ...recorded, force: again }, { reads });
const config = readConfig(opt.model);
const reader = {
  model: opt.model,
  dataset: opt.dataset,
  tokenizer: stage.reads.find(({ path }) => path === `${opt.model}/tokenizer.json`)?.sha256,
  vocabulary: config.vocab_size,
  positions: config.max_position_embeddings,
};
const train = readSplit("train", reader), validation = readSplit("validation", reader);
const rows = train.rowOffsets.length - 1;
const accumulation = opt.gradientAccumulation;
const { batchesPerEpoch, stepsPerEpoch, totalSteps } = plannedSteps({ rows, ...opt, accumulation });
const warmup = warmupSteps({ ...opt, ratio: opt.warmupRatio, total: totalSteps });
const updateBatches = trainingBatches(train, { ...opt, accumulation });
const evaluation = evaluationBatches(validation, opt.evalBatchSize > 0 ? opt.evalBatchSize : opt.batchSize);
const tokens = Math.max(mostTokens(train, opt.batchSize), evaluation.tokens);

// 2. Where an interrupted run left it.
const checkpoints = `${opt.out}/checkpoints`;
const free = ["out", "force", "verbose", "help", "saveSteps", "saveTotalLimit", "_"];
const settings = JSON.stringify({
  flags: Object.fromEntries(Object.entries(recorded).filter(([key]) => !free.includes(key))),
  files: Object.fromEntries(stage.reads.map(({ path, sha256 }) => [path, sha256])),
});
const last = opt.force || !resume || finished ? undefined : listCheckpoints(checkpoints).at(-1);
let { step, logBytes, best } = last ? resumeState(last.path, settings) : { step: 0, logBytes: 0, best: null };
const before = step; // updates of earlier processes

// 3. The model on the GPU, its memory as a table.
const began = performance.now();
if (mode !== "full") {
  checkHolds(opt.adapter, { name: "adapter_config.json", wanted: "an adapter", run: "deno task 04" });
}
const adapter = mode === "full" ? undefined : readAdapter(opt.adapter, config);
const tiles = openCache("tiles");
let choosing: Progress | undefined;
const trainer = await Trainer.open({
  model: opt.model,
  adapter,
  train: mode === "full" ? "full" : "lora",
  hyper: opt,
  tokens,
  checkpointing: opt.checkpointing,
  resident: opt.resident,
  tiles,
  onTile: (done, all) => (choosing ??= progress("tiles, chosen once per device", all)).tick(done),
});
choosing?.end();
await tiles.save();
const { gpu } = trainer.llama;
const trainable = trainer.trainable, memory = trainer.memory();
const gpuBytes = Object.values(memory).reduce((sum, n) => sum + n, 0);
console.log(`${gpu.name}\n`);
console.log(table([
  ["Mode", `${mode}, ${count(trainable)} parameters learn`],
  ["Rows", `${count(rows)} of at most ${count(mostTokens(train, 1))} tokens`],
  ["Updates", `${count(totalSteps)} of ${opt.batchSize} x ${accumulation} rows, ${warmup} of them warm-up`],
  ...Object.entries(memory).map(([name, n]) => [`GPU: ${name}`, bytes(n)]),
  ["GPU: in all", bytes(gpuBytes)],
]));
if (opt.verbose) console.log(`\n${table(tileRows(trainer.llama.tiles), { header: true })}`);
if (last) await restoreCheckpoint(last.path, trainer);
stage.clear({ keep: last !== undefined });
const log = await openRunLog(`${opt.out}/log.jsonl`, logBytes);
console.log(last ? `\nGoing on after update ${step} (${last.path}).\n` : "");

// 4. The loop. Before it, the model as it came: its loss on the validation rows, and on those of the first update, which
// must see the same. Dropout, once B is not zero, makes that another model.
const unread = new Map<number, UpdateBatches & { rate: number }>();
const speed = { tokens: 0, ms: 0 };
let shown = 0, readAt = performance.now();
let firstLoss: number | undefined;
if (step === 0) {
  const { batches, rows } = updateBatches(1);
  const { nllSum, tokens } = await trainer.evaluate({ batches, rows: rows.map((r) => r.length) });
  if ((adapter?.lora.lora_dropout ?? 0) === 0) firstLoss = nllSum / tokens;
  await evaluate();
}
while (step < totalSteps) {
  const update = updateBatches(++step);
  const rate = learningRate({ ...opt, step, totalSteps, warmupSteps: warmup, peak: opt.learningRate });
  if (step === profile) await profileUpdate(update.batches, rate);
  else trainer.update(update.batches, { step, learningRate: rate });
  unread.set(step, { ...update, rate });
  const due = (every: number) => (every > 0 && step % every === 0) || step === totalSteps;
  const read = unread.size >= 16 || performance.now() - readAt > 1000 || due(opt.evalSteps) || due(opt.saveSteps);
  if (read || step === before + 1) await readLosses(); // the first one alone: it waits for the driver to compile
  if (due(opt.evalSteps)) await evaluate();
  if (due(opt.saveSteps)) await save();
}

// 5. The result: the best parameters of the run, or the last.
const target = `${opt.out}/${trainedKind(mode)}`;
if (opt.loadBest && adapter) readAdapter(`${checkpoints}/best`, config); // throws where it is damaged
if (opt.loadBest) await copyFolder(`${checkpoints}/best`, target);
else await writeWhole(target, (dir) => saveTrained(trainer.llama, { dir, model: opt.model, lora: adapter?.lora }));
await log.writeReport(opt.out, {
  title: "Training",
  device: gpu.name,
  state: {
    best_metric: best?.evalLoss ?? null,
    best_global_step: best?.step ?? null,
    global_step: totalSteps,
    max_steps: totalSteps,
    epoch: updateBatches(totalSteps).epoch,
    num_train_epochs: Math.ceil(totalSteps / stepsPerEpoch),
    eval_steps: opt.evalSteps,
    save_steps: opt.saveSteps,
    logging_steps: 1,
    train_batch_size: opt.batchSize,
  },
});

// 6. The proof: the log shows what became of the model.
const { train: losses, eval: evalLosses } = log.losses();
const tokensPerSecond = speed.ms > 0 ? 1000 * speed.tokens / speed.ms : 0;
const change = (values: readonly number[]) => `${values[0]!.toFixed(4)} to ${values.at(-1)!.toFixed(4)}`;
console.log(`\nLoss ${change(losses)}, validation ${change(evalLosses)}, the best after update ${best!.step}.`);
if (best!.evalLoss >= evalLosses[0]!) console.log("Validation was no better after any update than before training.");
const speedShown = tokensPerSecond > 0 ? `${count(tokensPerSecond)} tokens/s, ` : "";
console.log(`${speedShown}${duration(performance.now() - began)} in all: see ${opt.out}/report.html`);
await stage.done({
  device: gpu.name,
  numbers: {
    mode,
    trainable,
    rows,
    batches_per_epoch: batchesPerEpoch,
    steps: totalSteps,
    warmup_steps: warmup,
    first_loss: losses[0],
    last_loss: losses.at(-1),
    first_eval_loss: evalLosses[0],
    last_eval_loss: evalLosses.at(-1),
    best_step: best!.step,
    best_eval_loss: best!.evalLoss,
    tokens_per_second: tokensPerSecond,
    gpu_bytes: gpuBytes,
    memory,
  },
});

/** An update with the times of its dispatches: all of them in trace.json, their sums by label on the screen. */
async function profileUpdate(batches: UpdateBatches["batches"], rate: number): Promise<void> {
  if (unread.size > 0) await readLosses();
  const timings = await trainer.profile(batches, { step, learningRate: rate });
  await writeAtomic(`${opt.out}/trace.json`, chromeTrace(timings, `update ${step}, ${gpu.name}`));
  const rows = byLabel(timings).map(({ label, ms, count, share }) => [label, ms.toFixed(2), count, percent(share)]);
  console.log(`\nUpdate ${step}: ${timings.length} dispatches, see ${opt.out}/trace.json`);
  console.log(table([["kernel", "ms", "dispatches", "share"], ...rows], { header: true }) + "\n");
}

/** Reads the losses of the updates since the last time, logs each of them, and shows one now and then. */
async function readLosses(): Promise<void> {
  const results = await trainer.read();
  const now = performance.now(), ms = (now - readAt) / Math.max(1, results.length);
  readAt = now;
  for (const { step: number, loss, gradNorm, tokens } of results) {
    const update = unread.get(number)!;
    unread.delete(number);
    const { rate, epoch, rows } = update;
    checkUpdate({ step: number, loss, gradNorm }, { ...opt, rows: rows.flat() });
    if (number === 1 && firstLoss !== undefined && !(Math.abs(loss - firstLoss) <= 1e-5 * firstLoss)) {
      throw new Error(`Cannot accept this run: update 1 has loss ${loss}, without learning it is ${firstLoss}`);
    }
    log.append({ step: number, epoch, loss, grad_norm: gradNorm, learning_rate: rate, tokens, rows, ms });
    if (number > before + 1) {
      speed.tokens += update.tokens;
      speed.ms += ms;
    }
    if (number > 1 && number < totalSteps && number % loggingSteps > 0 && now - shown < 10_000) continue;
    shown = now;
    show(number, [
      `loss ${loss.toFixed(4)}`,
      `norm ${gradNorm.toFixed(3)}`,
      `lr ${rate.toExponential(2)}`,
      duration(ms).padStart(7),
      `${count(1000 * update.tokens / ms).padStart(6)} tok/s`,
      number > 1 && number < totalSteps ? `${duration(ms * (totalSteps - number))} left` : "",
    ]);
  }
}

async function evaluate(): Promise<void> {
  const { evalLoss, nllSum, tokens } = await trainer.evaluate(evaluation);
  checkEvaluation(evalLoss, { step, model: opt.model });
  const perplexity = Math.exp(nllSum / tokens);
  log.append({ step, eval_loss: evalLoss, eval_perplexity: perplexity });
  // As in transformers, the model as it came is no candidate.
  const improved = step > 0 && (best === null || evalLoss < best.evalLoss);
  show(step, [
    `eval_loss ${evalLoss.toFixed(4)}`,
    `perplexity ${perplexity.toFixed(2)}`,
    step === 0
      ? "before training"
      : improved
      ? `the lowest ${evalLoss < log.losses().eval[0]! ? "so far" : "of an update"}`
      : "",
  ]);
  if (improved) best = { step, evalLoss };
  if (improved && opt.loadBest) {
    const save = (dir: string) => saveTrained(trainer.llama, { dir, model: opt.model, lora: adapter?.lora });
    await writeWhole(`${checkpoints}/best`, save);
  }
  readAt = performance.now();
}

async function save(): Promise<void> {
  const run = { step, logBytes: log.bytes(), best, settings };
  const also = async (dir: string) => {
    if (adapter) await saveTrained(trainer.llama, { dir: `${dir}/adapter`, model: opt.model, lora: adapter.lora });
  };
  await saveCheckpoint(`${checkpoints}/step-${step}`, { trainer, run, also });
  await pruneCheckpoints(checkpoints, { limit: opt.saveTotalLimit });
  readAt = performance.now();
}

function show(number: number, fields: readonly string[]): void {
  const at = `step ${String(number).padStart(String(totalSteps).length)}/${totalSteps}`;
  console.log([at, ...fields.filter((field) => field !== "")].join(" | "));
}
