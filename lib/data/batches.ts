/**
 * Micro-batches of a run: which rows form each update, in the Hugging Face Trainer's order, and rows gathered side by side
 * with the token that each position predicts. Nothing is padded and nothing is remembered: update n is a function of n.
 */
import {
  epochOrder,
  gatherRows,
  IGNORED,
  microBatches,
  nextTokenTargets,
  type PackedRows,
  readRows,
  unlearntRows,
} from "./dataset.ts";
import { checkHolds } from "./files.ts";
import type { Split } from "./records.ts";

/** Rows side by side; `targets[i]` is the token that token i has to predict, or −100. */
export interface Batch {
  readonly inputIds: Int32Array;
  readonly positionIds: Int32Array;
  readonly targets: Int32Array;
}

/** The micro-batches of one update. */
export interface UpdateBatches {
  readonly batches: readonly Batch[];
  /** Dataset rows of each micro-batch, in order. */
  readonly rows: readonly (readonly number[])[];
  /** Epochs done after this update. */
  readonly epoch: number;
  /** Tokens of all micro-batches, learnt or not. */
  readonly tokens: number;
}

/**
 * The rows of a split of the folder `dataset`, for the model in the folder `model`: checked by {@link checkRows}. Throws
 * too where another tokenizer made them than the one with the SHA-256 `tokenizer`; undefined leaves that unchecked.
 */
export function readSplit(
  split: Split,
  { dataset, model, tokenizer, vocabulary, positions }: {
    readonly dataset: string;
    readonly model: string;
    readonly tokenizer: string | undefined;
    readonly vocabulary: number;
    readonly positions: number;
  },
): PackedRows {
  checkHolds(dataset, { name: `${split}.safetensors`, wanted: "a dataset folder", run: "deno task 03" });
  const path = `${dataset}/${split}.safetensors`;
  const rows = readRows(path), made = rows.metadata.tokenizer_sha256;
  if (tokenizer !== undefined && made !== undefined && made !== tokenizer) {
    const state = `its tokens are not of the tokenizer in "${model}"`;
    throw new Error(`Cannot use "${path}": ${state}: run "deno task 03" with the --tokenizer of this model`);
  }
  checkRows(rows, { path, vocabulary, positions });
  return rows;
}

/**
 * Throws a RangeError unless a model with this vocabulary and this many positions can read every row of the file `path`
 * and learn something from each.
 */
export function checkRows(
  rows: PackedRows,
  { path, vocabulary, positions }: { readonly path: string; readonly vocabulary: number; readonly positions: number },
): void {
  const refuse = (state: string, remedy: string) => {
    throw new RangeError(`Cannot use "${path}": ${state}: ${remedy}`);
  };
  if (rows.rowOffsets.length < 2) refuse("it has no rows", "give stage 03 more records");
  const longest = 1 + rows.positionIds.reduce((most, position) => Math.max(most, position), 0);
  if (longest > positions) {
    refuse(`it has documents of ${longest} tokens, the model ${positions} positions`, "lower 03's --max-seq-length");
  }
  const strange = (id: number) => id < 0 || id >= vocabulary;
  const id = rows.inputIds.find(strange) ?? rows.labels.find((label) => label !== IGNORED && strange(label));
  if (id !== undefined) {
    refuse(`it has token ${id}, the model a vocabulary of ${vocabulary}`, "give 03 the --tokenizer of this model");
  }
  const [unlearnt] = unlearntRows(rows);
  if (unlearnt !== undefined) refuse(`all labels of row ${unlearnt} are masked`, "leave out rows that teach nothing");
}

/** Rows `which`, side by side. */
export function batchOf(rows: PackedRows, which: readonly number[]): Batch {
  const gathered = gatherRows(rows, which), { inputIds, positionIds } = gathered;
  return { inputIds, positionIds, targets: nextTokenTargets(gathered) };
}

/** Gives the micro-batches of update `number`, from 1 on. */
export function trainingBatches(
  rows: PackedRows,
  { batchSize, accumulation, seed }: { batchSize: number; accumulation: number; seed: number },
): (number: number) => UpdateBatches {
  const count = rows.rowOffsets.length - 1;
  const batchesPerEpoch = Math.ceil(count / batchSize), perEpoch = Math.ceil(batchesPerEpoch / accumulation);
  let ordered = -1, updates: number[][][] = [];
  return (number) => {
    const epoch = Math.floor((number - 1) / perEpoch), within = (number - 1) % perEpoch;
    if (ordered !== epoch) {
      updates = microBatches(epochOrder(count, seed, epoch), { batchSize, accumulation });
      ordered = epoch;
    }
    const which = updates[within]!;
    const batches = which.map((r) => batchOf(rows, r));
    const done = within * accumulation + which.length;
    const tokens = batches.reduce((sum, { inputIds }) => sum + inputIds.length, 0);
    return { batches, rows: which, epoch: epoch + done / batchesPerEpoch, tokens };
  };
}

/** All rows in order, `batchSize` at a time; `rows[i]` is how many batch i holds, `tokens` what the largest has. */
export function evaluationBatches(
  rows: PackedRows,
  batchSize: number,
): { batches: Batch[]; rows: number[]; tokens: number } {
  const order = Array.from({ length: rows.rowOffsets.length - 1 }, (_, r) => r);
  const which = microBatches(order, { batchSize, accumulation: 1 }).map(([r]) => r!);
  const batches = which.map((r) => batchOf(rows, r));
  const tokens = batches.reduce((most, { inputIds }) => Math.max(most, inputIds.length), 0);
  return { batches, rows: which.map((r) => r.length), tokens };
}

/** Tokens of the largest micro-batch of `batchSize` rows that there can be. */
export function mostTokens({ rowOffsets }: PackedRows, batchSize: number): number {
  const lengths = rowOffsets.slice(1).map((end, i) => end - rowOffsets[i]!).sort((a, b) => b - a);
  return lengths.slice(0, batchSize).reduce((sum, length) => sum + length, 0);
}
