/** Tests of micro-batches: every row once an epoch, targets within documents, and what a model cannot read. */
import { assertEquals, assertThrows } from "@std/assert";
import { batchOf, checkRows, evaluationBatches, mostTokens, trainingBatches } from "../../lib/data/batches.ts";
import { epochOrder, type PackedRows } from "../../lib/data/dataset.ts";

/** Rows of these documents' lengths: token n is number n of the file, and everything is learnt. */
function rowsOf(documents: readonly (readonly number[])[]): PackedRows {
  const lengths = documents.flat(), total = lengths.reduce((sum, n) => sum + n, 0);
  const rowOffsets = [0];
  for (const row of documents) rowOffsets.push(rowOffsets.at(-1)! + row.reduce((sum, n) => sum + n, 0));
  return {
    inputIds: Int32Array.from({ length: total }, (_, i) => i),
    positionIds: Int32Array.from(lengths.flatMap((n) => Array.from({ length: n }, (_, i) => i))),
    labels: Int32Array.from({ length: total }, (_, i) => i),
    rowOffsets,
    metadata: {},
  };
}

Deno.test("batchOf() lays rows side by side and has each token predict the next of its document", () => {
  const rows = rowsOf([[3], [2, 2], [1, 2]]);
  assertEquals(batchOf(rows, [2, 0]), {
    inputIds: Int32Array.of(7, 8, 9, 0, 1, 2),
    positionIds: Int32Array.of(0, 0, 1, 0, 1, 2),
    targets: Int32Array.of(-100, 9, -100, 1, 2, -100),
  });
});

Deno.test("trainingBatches() takes every row once an epoch, in the order of that epoch, the last update what is left", () => {
  const rows = rowsOf(Array.from({ length: 11 }, (_, i) => [i + 2]));
  const updates = trainingBatches(rows, { batchSize: 2, accumulation: 4, seed: 5 });
  for (const epoch of [0, 1, 2]) {
    const [first, second] = [updates(2 * epoch + 1), updates(2 * epoch + 2)];
    assertEquals(first.rows.map((which) => which.length), [2, 2, 2, 2]);
    assertEquals(second.rows.map((which) => which.length), [2, 1]);
    assertEquals([...first.rows, ...second.rows].flat(), [...epochOrder(11, 5, epoch)]);
    assertEquals([first.epoch, second.epoch], [epoch + 4 / 6, epoch + 1]);
    assertEquals(first.tokens + second.tokens, rows.inputIds.length);
    assertEquals(first.batches, first.rows.map((which) => batchOf(rows, which)));
  }
});

Deno.test("trainingBatches() gives an update by its number alone, whatever was asked before", () => {
  const rows = rowsOf(Array.from({ length: 7 }, () => [4]));
  const options = { batchSize: 2, accumulation: 2, seed: 42 };
  const forwards = trainingBatches(rows, options), anywhere = trainingBatches(rows, options);
  const expected = Array.from({ length: 8 }, (_, i) => forwards(i + 1));
  for (const number of [8, 3, 7, 1, 4, 2, 6, 5]) assertEquals(anywhere(number), expected[number - 1]);
});

Deno.test("evaluationBatches() keeps the order of the rows and counts them", () => {
  const rows = rowsOf([[2], [3], [4], [5], [6]]);
  const { batches, rows: counts, tokens } = evaluationBatches(rows, 2);
  assertEquals([counts, tokens], [[2, 2, 1], 9]);
  assertEquals(batches.flatMap(({ inputIds }) => [...inputIds]), [...rows.inputIds]);
});

Deno.test("evaluationBatches() takes more batches than a call can have arguments", () => {
  assertEquals(evaluationBatches(rowsOf(Array.from({ length: 150_000 }, () => [1])), 1).tokens, 1);
});

Deno.test("mostTokens() is the sum of the longest rows", () => {
  const rows = rowsOf([[2], [9], [4], [5, 2], [6]]);
  assertEquals([1, 2, 3, 99].map((size) => mostTokens(rows, size)), [9, 16, 22, 28]);
});

Deno.test("checkRows() names the file and what the model cannot read or learn from", () => {
  const rows = rowsOf([[4], [3, 5]]);
  const model = { path: "train.safetensors", vocabulary: 12, positions: 5 };
  checkRows(rows, model);
  const refuses = (changed: PackedRows, message: string, at = model) =>
    assertThrows(() => checkRows(changed, at), RangeError, `Cannot use "train.safetensors": ${message}`);
  refuses(rows, "it has documents of 5 tokens, the model 4 positions", { ...model, positions: 4 });
  refuses(rows, "it has token 11, the model a vocabulary of 11", { ...model, vocabulary: 11 });
  refuses({ ...rows, inputIds: rows.inputIds.with(3, -1) }, "it has token -1,");
  refuses({ ...rows, labels: rows.labels.with(3, 99) }, "it has token 99,");
  refuses({ ...rows, labels: rows.labels.with(3, -1) }, "it has token -1,");
  refuses({ ...rows, labels: rows.labels.map((label, i) => i < 4 ? -100 : label) }, "all labels of row 0 are masked");
  refuses(rowsOf([]), "it has no rows");
});
