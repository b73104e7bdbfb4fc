/** Tests of labels, rows and their order against TRL's own runs. Golden files: fixtures/golden/<config>/train. */
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  assembleRows,
  documentParts,
  encodeRecord,
  type Encoding,
  epochOrder,
  gatherRows,
  IGNORED,
  microBatches,
  nextTokenTargets,
  type PackedRows,
  readRows,
  statistics,
  unlearntRows,
  writeRows,
} from "../../lib/data/dataset.ts";
import { type Packing, packRows } from "../../lib/data/packing.ts";
import type { SftRecord } from "../../lib/data/records.ts";
import { openSafetensors, type TensorSource, writeSafetensors } from "../../lib/data/safetensors.ts";
import { BLOG_TEMPLATE, chatTemplate } from "../../lib/data/template.ts";
import { loadTokenizer } from "../../lib/data/tokenizer.ts";
import { goldenPath, temporaryFolder } from "../check.ts";

const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"));
const template = chatTemplate({ template: BLOG_TEMPLATE, system: "", eos_token: tokenizer.eosToken });
const all: Encoding = { tokenizer, template, loss: "all" };
const completion: Encoding = { tokenizer, template, loss: "completion" };

interface Batches {
  readonly updates: readonly { micro: number[]; num_items: number; packed_rows: number[][] }[];
  readonly eval_batches: readonly { key: string; rows: number }[];
}

// The settings of the golden runs: 128 tokens a row, batches of 2, 4 micro-batches an update, 3 epochs, seed 42.
for (const [config, packing] of [["tiny", "bfd"], ["odd", "bfd"], ["tiny", "wrapped"]] as const) {
  const read = (path: string) => JSON.parse(Deno.readTextFileSync(goldenPath(`${config}/train/${path}`)));
  const documents = read("dataset_bfd.json");
  const golden = read(`dataset_${packing}.json`);
  const batches: Batches = read(`micro_batches_${packing}.json`);
  const [train, held] = (["train", "eval"] as const).map((split) => {
    const tokens = loadTokenizer(goldenPath(`${config}/tokenizer`));
    const texts: string[] = documents[`${split}_documents`];
    const examples = texts.map((text) => encodeRecord({ text }, { ...all, tokenizer: tokens }));
    return { examples, rows: packed(examples, packing, 128) };
  }) as [{ examples: ReturnType<typeof encodeRecord>[]; rows: PackedRows }, { examples: []; rows: PackedRows }];

  Deno.test(`encodeRecord() gives TRL's ids of the ${config} documents (${packing})`, () => {
    assertEquals(train.examples.map(({ ids }) => [...ids]), documents.train_ids);
  });

  Deno.test(`assembleRows() gives TRL's rows of the ${config} documents by ${packing}`, () => {
    assertEquals(split(train.rows), golden.train_packed_rows);
    assertEquals(split(held.rows), golden.eval_packed_rows);
    if (packing !== "bfd") return;
    const lengths = [...train.rows.positionIds, 0].flatMap((at, t) => at === 0 ? [t] : []);
    assertEquals(lengths.slice(1).map((end, i) => end - lengths[i]!), golden.train_seq_lengths.flat());
  });

  Deno.test(`microBatches() of epochOrder() gives the Trainer's updates of the ${config} run by ${packing}`, () => {
    const updates = [0, 1, 2].flatMap((epoch) =>
      microBatches(epochOrder(train.rows.rowOffsets.length - 1, 42, epoch), { batchSize: 2, accumulation: 4 })
    );
    assertEquals(updates, batches.updates.map((update) => update.packed_rows));
    const items = updates.map((update) => update.map((which) => learnt(gatherRows(train.rows, which))).reduce(sum));
    assertEquals(items, batches.updates.map((update) => update.num_items));
  });

  Deno.test(`gatherRows() gives the ids, labels and positions that TRL's collator gave the ${config} model by ${packing}`, () => {
    using file = openSafetensors(goldenPath(`${config}/train/micro_batches_${packing}.safetensors`));
    const check = (rows: PackedRows, which: readonly number[], key: string) => {
      const batch = gatherRows(rows, which);
      const valid = file.tensors.has(`${key}.attention_mask`) ? int32(file, `${key}.attention_mask`) : undefined; // 0 where padded
      const keep = (name: string) =>
        int32(file, `${key}.${name}`).filter((_, i) => valid === undefined || valid[i] === 1);
      assertEquals(batch.inputIds, keep("input_ids"));
      assertEquals(batch.labels, keep("labels"));
      if (packing === "bfd") assertEquals(batch.positionIds, keep("position_ids"));
    };
    for (const { micro, packed_rows } of batches.updates) {
      micro.forEach((number, i) => check(train.rows, packed_rows[i]!, `micro.${String(number).padStart(3, "0")}`));
    }
    let first = 0;
    for (const { key, rows } of batches.eval_batches) {
      check(held.rows, Array.from({ length: rows }, (_, i) => first + i), key);
      first += rows;
    }
    assertEquals(first, held.rows.rowOffsets.length - 1);
  });
}

Deno.test("the number of updates of the blog's run comes out of microBatches()", () => {
  const updates = (rows: number) => microBatches({ length: rows }, { batchSize: 4, accumulation: 8 }).length;
  assertEquals([379, 46_144, 46_145, 46_176, 46_177].map(updates), [12, 1442, 1443, 1443, 1444]);
});

Deno.test("encodeRecord() appends the eos id once, to text and to turns", () => {
  const ends = (record: SftRecord) => [...encodeRecord(record, all).ids].filter((id) => id === tokenizer.eosId).length;
  assertEquals([ends({ text: "a" }), ends({ text: "a<|endoftext|>" }), ends({ text: "" })], [1, 1, 1]);
  assertEquals(ends({ text: "a<|endoftext|> b" }), 2);
  assertEquals(ends({ prompt: "a", completion: "b<|endoftext|>" }), 1);
  assertEquals(ends(dialogue("q", "a")), 1);
  const chatMl = "{% for message in messages %}{{ message.content + eos_token + '\\n' }}{% endfor %}";
  const own = chatTemplate({ template: chatMl, system: "", eos_token: tokenizer.eosToken });
  const { ids } = encodeRecord(dialogue("q", "a"), { ...all, template: own });
  assertEquals([...ids], tokenizer.encode("q<|endoftext|>\na<|endoftext|>\n")); // it ends its turns itself
});

Deno.test("encodeRecord() learns the completion alone, eos included, by the golden prompts", () => {
  const cases = JSON.parse(Deno.readTextFileSync(goldenPath("tiny/tokenizer_cases.json"))).template;
  for (const { system, user, assistant, full_ids, labels_prompt_masked } of cases) {
    const withSystem = chatTemplate({ ...template.source, system });
    const turns = encodeRecord(dialogue(user, assistant), { ...completion, template: withSystem });
    assertEquals([...turns.ids], full_ids);
    assertEquals([...turns.labels], labels_prompt_masked);
    const record = { prompt: withSystem.renderPrompt(user), completion: assistant };
    const strings = encodeRecord(record, completion);
    assertEquals([strings.ids, strings.labels], [turns.ids, turns.labels]);
    assertEquals([strings.aligned, turns.aligned], [true, true]);
  }
});

Deno.test("encodeRecord() learns every assistant turn of a conversation and nothing else", () => {
  const messages = ["Why?", "So.", "And then?", "No."].map((content, i) => ({
    role: i % 2 ? "assistant" : "user",
    content,
  }));
  const { ids, labels } = encodeRecord({ messages }, completion);
  const parts = documentParts(packed([{ ids, labels, aligned: true }], "none", 256), tokenizer);
  assertEquals(
    parts.map(({ learnt, text }) => learnt ? `[${text}]` : text).join(""),
    "### User:\nWhy?\n\n### Assistant:\n[So.<|endoftext|>]\n\n" +
      "### User:\nAnd then?\n\n### Assistant:\n[No.<|endoftext|>]",
  );
});

Deno.test("encodeRecord() reports a prompt whose ids change when the completion follows", () => {
  const aligned = (prompt: string, rest: string) => encodeRecord({ prompt, completion: rest }, completion).aligned;
  assertEquals(aligned("p", "atient"), true); // "patient" is the tokens "p" and "atient"
  assertEquals(aligned("pa", "tient"), false);
  assertThrows(() => encodeRecord({ text: "a" }, completion), TypeError, "use --loss all");
});

Deno.test("encodeRecord() takes special tokens in the data as plain text when asked", () => {
  const escaping = { ...all, tokenizer: loadTokenizer(goldenPath("tiny/tokenizer"), { escapes: true }), escape: true };
  const { ids } = encodeRecord(dialogue("q<|endoftext|>", "a<|endoftext|>"), escaping);
  assertEquals(ids.indexOf(tokenizer.eosId), ids.length - 1);
  assertEquals(tokenizer.decode(ids), "### User:\nq<|endoftext|>\n\n### Assistant:\na<|endoftext|><|endoftext|>");
});

Deno.test("nextTokenTargets() never crosses from one document or row to the next", () => {
  const examples = [[1, 2, 3], [4, 5], [6]].map(example);
  const kept = packed(examples, "bfd", 6);
  assertEquals([...kept.labels], [IGNORED, 2, 3, IGNORED, 5, IGNORED]);
  assertEquals([...nextTokenTargets(kept)], [2, 3, IGNORED, 5, IGNORED, IGNORED]);
  const wrapped = packed(examples, "wrapped", 4);
  assertEquals([...wrapped.positionIds], [0, 1, 2, 3, 0, 1]);
  assertEquals([...wrapped.labels], [1, 2, 3, 4, 5, 6]);
  assertEquals([...nextTokenTargets(wrapped)], [2, 3, 4, IGNORED, 6, IGNORED]);
});

Deno.test("unlearntRows() finds rows whose labels are all masked, as by truncation", () => {
  const long = encodeRecord({ prompt: "a ".repeat(40), completion: "b" }, completion);
  const short = encodeRecord({ prompt: "a", completion: "b" }, completion);
  assertEquals(unlearntRows(packed([short, long, short], "none", 16)), [1]);
  assertEquals(unlearntRows(packed([long, short], "none", 128)), []);
  assertEquals(unlearntRows(packed([example([9])], "bfd", 16)), [0]); // its only token starts the document
});

Deno.test("statistics() counts what truncation and packing did", () => {
  const eosId = tokenizer.eosId;
  const examples = [[1, 2, 3, 4, eosId], [5, eosId], [6, 7, eosId]].map(example);
  const made = (packing: Packing) =>
    statistics(examples, packed(examples, packing, 4), { packing, maxLength: 4, eosId });
  const bfd = made("bfd");
  assertEquals([bfd.examples, bfd.tokens, bfd.median_length, bfd.longest, bfd.truncated], [3, 10, 3, 5, 1]);
  assertEquals([bfd.rows, bfd.packing_efficiency, bfd.learnt_tokens, bfd.learnt_share], [3, 9 / 12, 6, 6 / 9]);
  assertEquals(bfd.share_of_examples_ending_in_a_learnt_eos, 2 / 3);
  assertEquals(bfd.share_of_rows_whose_last_label_is_eos, 2 / 3);
  assertEquals([made("wrapped").truncated, made("wrapped").share_of_rows_whose_last_label_is_eos], [0, 1 / 3]);
});

Deno.test("writeRows() and readRows() are each other's inverse, also for no rows", async () => {
  using folder = temporaryFolder();
  const path = folder.at("rows.safetensors");
  const examples = [[1, 2, 3], [4, 5]].map(example);
  for (const list of [examples, []]) {
    const rows = { ...packed(list, "bfd", 4), metadata: { packing: "bfd", max_seq_length: "4" } };
    await writeRows(path, rows);
    assertEquals(readRows(path), rows);
  }
});

Deno.test("readRows() throws when the tensors do not fit each other", async () => {
  using folder = temporaryFolder();
  const path = folder.at("rows.safetensors");
  const i32 = (...values: number[]) => ({ dtype: "I32" as const, values: new Int32Array(values) });
  const i64 = (...values: number[]) => ({ dtype: "I64" as const, values: BigInt64Array.from(values, BigInt) });
  const right = {
    input_ids: i32(5, 6, 7),
    position_ids: i32(0, 1, 0),
    labels: i32(-100, 6, -100),
    row_offsets: i64(0, 2, 3),
  };
  const cases: [change: Record<string, ReturnType<typeof i32 | typeof i64>>, message: string][] = [
    [{ labels: i32(1) }, '"input_ids", "position_ids" and "labels" have 3, 3 and 1 values'],
    [{ row_offsets: i64(0, 2) }, '"row_offsets" does not cut 3 tokens into rows'],
    [{ row_offsets: i64(0, 2, 2, 3) }, '"row_offsets" does not cut 3 tokens into rows'],
    [{ position_ids: i32(0, 1, 2) }, "row 1 does not begin with position 0"],
    [{ labels: i64(1, 2, 3) }, 'it has no list "labels" of type I32'],
  ];
  const write = (tensors: Record<string, ReturnType<typeof i32 | typeof i64>>) =>
    writeSafetensors(
      path,
      Object.entries(tensors).map(([name, { dtype, values }]) => (
        { name, dtype, shape: [values.length], data: () => new Uint8Array(values.buffer) }
      )),
    );
  await write(right);
  assertEquals(readRows(path).rowOffsets, [0, 2, 3]);
  for (const [change, message] of cases) {
    await write({ ...right, ...change });
    assertThrows(() => readRows(path), TypeError, message);
  }
  await Deno.remove(path);
  await assertRejects(() => Promise.resolve().then(() => readRows(path)), Error, "Cannot read");
});

function packed(examples: readonly ReturnType<typeof encodeRecord>[], packing: Packing, maxLength: number): PackedRows {
  const slices = packRows(examples.map(({ ids }) => ids.length), { packing, maxLength });
  return assembleRows(examples, slices, { packing });
}

function example(ids: readonly number[]) {
  return { ids: Int32Array.from(ids), labels: Int32Array.from(ids), aligned: true };
}

function dialogue(user: string, assistant: string): SftRecord {
  return { messages: [{ role: "user", content: user }, { role: "assistant", content: assistant }], promptTurns: 1 };
}

function split(rows: PackedRows): number[][] {
  return rows.rowOffsets.slice(1).map((end, r) => [...rows.inputIds.subarray(rows.rowOffsets[r], end)]);
}

function learnt(batch: PackedRows): number {
  return nextTokenTargets(batch).filter((id) => id !== IGNORED).length;
}

function sum(a: number, b: number): number {
  return a + b;
}

function int32(file: TensorSource, name: string): Int32Array {
  return new Int32Array(file.read(name).buffer as ArrayBuffer);
}
