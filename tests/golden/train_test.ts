/**
 * Training against real runs of TRL's SFTTrainer: each update's loss, gradient norm and learning rate, the evaluations and the
 * final adapter. The 8-bit runs of the reference used bitsandbytes' CPU code and ours follows its CUDA kernels; by the
 * reference's own measurement that is 3e-6 in losses and 4e-7 in the mean of the final adapter.
 */
import { assertEquals, assertGreater } from "@std/assert";
import { evaluationBatches, trainingBatches } from "../../lib/data/batches.ts";
import { assembleRows, encodeRecord } from "../../lib/data/dataset.ts";
import { packRows } from "../../lib/data/packing.ts";
import { BLOG_TEMPLATE, chatTemplate } from "../../lib/data/template.ts";
import { loadTokenizer } from "../../lib/data/tokenizer.ts";
import { golden, goldenPath } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";
import { readJson } from "./rebuild.ts";
import {
  argumentsOf,
  goldenBatches,
  openTrainer,
  type RunArguments,
  type RunBatches,
  type RunResult,
  type Size,
  train,
} from "./run.ts";
import { apart, BOUND, close, difference, same, within } from "./table.ts";

interface Steps {
  readonly loss: number[];
  readonly grad_norm: number[];
  readonly learning_rate: number[];
  readonly num_items: number[];
  readonly eval_loss: Readonly<Record<string, number>>;
}

const RUNS: readonly (readonly [Size, string])[] = [
  ["tiny", "adamw_torch"],
  ["tiny", "adamw_8bit"],
  ["tiny", "adamw_8bit_large_r"],
  ["tiny", "adamw_torch_clip"],
  ["tiny", "adamw_torch_wrapped"],
  ["odd", "adamw_torch"],
  ["odd", "adamw_8bit"],
  ["odd", "adamw_8bit_large_r"],
];

/** Packed rows of a split's texts, by our tokenizer and packing. */
function rowsOf(size: Size, run: RunArguments, split: "train" | "eval") {
  const tokenizer = loadTokenizer(goldenPath(`${size}/tokenizer`));
  const template = chatTemplate({ template: BLOG_TEMPLATE, system: "", eos_token: tokenizer.eosToken });
  const texts: string[] = readJson(`${size}/train/dataset_bfd.json`)[`${split}_documents`];
  const examples = texts.map((text) => encodeRecord({ text }, { tokenizer, template, loss: "all" }));
  const packing = run.packing_strategy;
  const slices = packRows(examples.map(({ ids }) => ids.length), { packing, maxLength: run.max_length });
  return assembleRows(examples, slices, { packing });
}

/** The micro-batches of a run, made from texts alone. */
function batchesFromTexts(size: Size, run: RunArguments): RunBatches & { readonly rows: number } {
  const rows = rowsOf(size, run, "train"), count = rows.rowOffsets.length - 1;
  const of = trainingBatches(rows, { batchSize: run.batch, accumulation: run.accum, seed: run.seed });
  const perEpoch = Math.ceil(Math.ceil(count / run.batch) / run.accum);
  const updates = Array.from({ length: run.epochs * perEpoch }, (_, i) => of(i + 1).batches);
  return { updates, evaluation: evaluationBatches(rowsOf(size, run, "eval"), run.batch), rows: count };
}

/** Mean and largest difference of the entries that are stored of a final adapter. */
function adapterDifference({ adapter }: RunResult, { size, name }: { size: Size; name: string }) {
  const expected = golden(`${size}/train/${name}/final_adapter/adapter_model.safetensors`).floats();
  assertGreater(expected.size, 0);
  const actual = [...expected.keys()].flatMap((tensor) => [...adapter.get(tensor)!]);
  return difference(actual, [...expected.values()].flatMap((values) => [...values]));
}

/** A golden run in full, by the micro-batches given. */
async function follow(size: Size, run: RunArguments, batches: RunBatches, optimizer?: "adamw"): Promise<RunResult> {
  const rows = (readJson(`${size}/train/dataset_${run.packing_strategy}.json`).train_packed_rows as unknown[]).length;
  const trainer = await openTrainer(size, run, optimizer ? { optimizer } : {});
  const result = await train(trainer, { run, batches, rows });
  trainer.destroy();
  return result;
}

/** Results of the runs below, to be met bit for bit by the same run from texts. */
const finished = new Map<string, RunResult>();

for (const [size, name] of RUNS) {
  Deno.test(`Trainer follows the Hugging Face run ${size} ${name}`, { ignore }, async () => {
    const run = argumentsOf(size, name), steps: Steps = readJson(`${size}/train/${name}/steps.json`);
    const result = await follow(size, run, goldenBatches(size, run.packing_strategy));
    finished.set(`${size} ${name}`, result);
    const row = `run ${size} ${name}`, { updates, evaluations } = result;
    assertEquals(updates.map(({ tokens }) => tokens), steps.num_items);
    updates.forEach(({ loss, gradNorm, learningRate }, i) => {
      const part = `update ${i + 1}`;
      close(`${row}: loss`, { actual: [loss], expected: [steps.loss[i]!], bound: BOUND.run, part });
      close(`${row}: grad_norm`, { actual: [gradNorm], expected: [steps.grad_norm[i]!], bound: BOUND.gradient, part });
      within(`${row}: learning rate`, { error: Math.abs(learningRate - steps.learning_rate[i]!), bound: BOUND.rate });
    });
    assertEquals([...evaluations.keys()].map(String), Object.keys(steps.eval_loss));
    for (const [step, { evalLoss }] of evaluations) {
      close(`${row}: eval_loss`, {
        actual: [evalLoss],
        expected: [steps.eval_loss[step]!],
        bound: BOUND.run,
        part: `${step}`,
      });
    }
    const { mean, max } = adapterDifference(result, { size, name });
    if (name === "adamw_8bit_large_r") {
      within(`${row}: final adapter, mean`, { error: mean, bound: BOUND.mean8 });
    } else {
      within(`${row}: final adapter, mean`, { error: mean, bound: BOUND.mean32 });
      within(`${row}: final adapter, largest`, { error: max, bound: BOUND.max32 });
    }
  });
}

Deno.test(
  "32-bit state where the run had 8-bit state is told apart by the mean of the final adapter",
  { ignore },
  async () => {
    const name = "adamw_8bit_large_r", run = argumentsOf("tiny", name);
    const { mean } = adapterDifference(await follow("tiny", run, goldenBatches("tiny", "bfd"), "adamw"), {
      size: "tiny",
      name,
    });
    // The reference found 5e-5 to 7e-5 between its own runs with either state.
    apart("run tiny adamw_8bit_large_r with 32-bit state: final adapter, mean", {
      error: mean,
      least: 4 * BOUND.mean8,
    });
  },
);

for (
  const [size, name] of [["tiny", "adamw_torch"], ["tiny", "adamw_torch_wrapped"], ["odd", "adamw_torch"]] as const
) {
  Deno.test(`from texts alone come the micro-batches of the Hugging Face run ${size} ${name}`, () => {
    const run = argumentsOf(size, name);
    const { updates, evaluation } = batchesFromTexts(size, run), expected = goldenBatches(size, run.packing_strategy);
    const plain = (batches: RunBatches["updates"][number]) =>
      batches.map(({ inputIds, positionIds, targets }) => ({ inputIds, positionIds, targets }));
    const all = (run: RunBatches) => [...run.updates, run.evaluation.batches].map(plain);
    const actual = all({ updates, evaluation });
    same(`run ${size} ${name} from texts: micro-batches`, { actual, expected: all(expected) });
    assertEquals(evaluation.rows, expected.evaluation.rows);
  });
}

Deno.test("from texts alone, a run has the bits of the run on golden micro-batches", { ignore }, async () => {
  const run = argumentsOf("tiny", "adamw_torch");
  const [ours, theirs] = [batchesFromTexts("tiny", run), goldenBatches("tiny", "bfd")];
  const result = await follow("tiny", run, ours);
  const expected = finished.get("tiny adamw_torch") ?? await follow("tiny", run, theirs);
  same("run tiny adamw_torch from texts: losses, norms, evaluations, adapter", { actual: result, expected });
});
