/** Tests of reading question-answer files: shapes, errors, splits. The Parquet file was written by pyarrow. */
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import { fileURLToPath } from "node:url";
import { carveSplits, findSplits, placeOf, readRecords, readSplits, type SftRecord } from "../../lib/data/records.ts";
import { temporaryFolder } from "../check.ts";

const PARQUET = fileURLToPath(new URL("../../fixtures/records/messages.parquet", import.meta.url));
const PAIR = [{ role: "user", content: "q" }, { role: "assistant", content: "a" }];

Deno.test("readRecords() reads the shapes of TRL", async () => {
  const cases: [row: unknown, record: SftRecord][] = [
    [{ text: "t" }, { text: "t" }],
    [{ prompt: "p", completion: "c" }, { prompt: "p", completion: "c" }],
    [{ prompt: [PAIR[0]], completion: [PAIR[1]] }, { messages: PAIR, promptTurns: 1 }],
    [{ messages: PAIR }, { messages: PAIR }],
    [{ conversations: [{ from: "human", value: "q" }, { from: "gpt", value: "a" }] }, { messages: PAIR }],
    [{ question: "q", answer: "a" }, { messages: PAIR, promptTurns: 1 }],
    [{ instruction: "q", output: "a" }, { messages: PAIR, promptTurns: 1 }],
    [{ instruction: "q", input: "", output: "a" }, { messages: PAIR, promptTurns: 1 }],
    [{ instruction: "q", input: "x", output: "a" }, {
      messages: [{ role: "user", content: "q\n\nx" }, PAIR[1]!],
      promptTurns: 1,
    }],
  ];
  for (const [row, record] of cases) {
    using dir = temporaryFolder({ "a.jsonl": JSON.stringify(row) });
    assertEquals((await readRecords([dir.at("a.jsonl")])).records, [record]);
  }
});

Deno.test("readRecords() takes the first shape that is complete and names the columns it leaves", async () => {
  using dir = temporaryFolder({ "a.jsonl": '{"id": 1, "text": "t", "question": "q", "answer": "a"}\n' });
  const { records, columns, unread } = await readRecords([dir.at("a.jsonl")]);
  assertEquals([records, columns, unread], [[{ text: "t" }], ["text"], ["id", "question", "answer"]]);
});

Deno.test("readRecords() reads lines that end in CRLF, a byte order mark, blank lines, and stops at the limit", async () => {
  using dir = temporaryFolder({
    "a.jsonl": '\ufeff{"text": "1"}\r\n\r\n{"text": "2\u2028"}\r\n{"text": "3"}\nnot JSON',
  });
  const { records } = await readRecords([dir.at("a.jsonl")], { limit: 2 });
  assertEquals(records, [{ text: "1" }, { text: "2\u2028" }]);
});

Deno.test("readRecords() reads a JSON array that spans lines, and several files in order", async () => {
  using dir = temporaryFolder({ "a.json": '[\n{"text": "1"},\n{"text": "2"}\n]', "b.json": '\ufeff[{"text": "3"}]' });
  const { records } = await readRecords([dir.at("a.json"), dir.at("b.json")]);
  assertEquals(records, [{ text: "1" }, { text: "2" }, { text: "3" }]);
});

Deno.test("readRecords() reads lists of messages from Parquet, over its row groups", async () => {
  const { records, columns, unread } = await readRecords([PARQUET]);
  assertEquals([columns, unread], [["messages"], ["id"]]);
  assertEquals(records.length, 3);
  assertEquals(records[1], {
    messages: [
      { role: "user", content: "Is 37 °C a fever?" },
      { role: "assistant", content: "No." },
      { role: "user", content: "And 39 °C?" },
      { role: "assistant", content: "Yes." },
    ],
  });
  assertEquals((await readRecords([PARQUET], { limit: 1 })).records, records.slice(0, 1));
});

Deno.test("readRecords() reads Parquet under every compression, and tells where a record was read", async () => {
  const { records } = await readRecords([PARQUET]);
  for (const compression of ["gzip", "zstd", "brotli", "lz4"]) {
    const path = PARQUET.replace(".parquet", `.${compression}.parquet`), found = await readRecords([path]);
    assertEquals(found.records, records, compression);
    assertEquals(found.records.map(placeOf), [0, 1, 2].map((row) => `"${path}", row ${row}`));
  }
  using dir = temporaryFolder({ "a.jsonl": '\n{"text": "a"}\n\n{"text": "a"}\n' });
  const lines = await readRecords([dir.at("a.jsonl")]);
  assertEquals(lines.records.map(placeOf), [2, 4].map((line) => `"${dir.at("a.jsonl")}", line ${line}`));
});

Deno.test("readRecords() names the line and what is wrong with it", async () => {
  const cases: [lines: string, message: string][] = [
    ['{"text": "a"}\n{"text": ', ", line 2: "],
    ['{"text": "a"}\n\n"b"', ", line 3: a JSON object is wanted on each line"],
    ['{"text": "a"}\n{"text": 7}', ', line 2: "text" is a number, not text'],
    ['{"text": "a"}\n{"text": null}', ', line 2: "text" is missing, not text'],
    [
      '{"body": "a", "url": "b"}',
      ', line 1: it has the columns "body", "url": the known shapes are text, prompt/completion',
    ],
    ['{"text": "a"}\n{"question": "q", "answer": "a"}', 'it has the columns "question", "answer" where'],
    ['{"messages": "hello"}', '"messages" is a string, not a list of turns'],
    ['{"messages": []}', '"messages" is a list of 0, not a list of turns'],
    ['{"messages": [{"role": "user"}]}', '"value" is missing, not text'],
  ];
  for (const [lines, message] of cases) {
    using dir = temporaryFolder({ "a.jsonl": lines });
    await assertRejects(() => readRecords([dir.at("a.jsonl")]), Error, message);
  }
  using dir = temporaryFolder({ "a.jsonl": new Uint8Array([123, 34, 0xff, 34, 125]) });
  await assertRejects(() => readRecords([dir.at("a.jsonl")]), SyntaxError, ", line 1: it is not UTF-8 text");
  const third = new TextEncoder().encode('{"text": "ü"}\n{"text": "b"}\n{"text": "c"}\n');
  third[third.lastIndexOf(99)] = 0xff;
  using late = temporaryFolder({ "a.jsonl": third });
  await assertRejects(() => readRecords([late.at("a.jsonl")]), SyntaxError, ", line 3: it is not UTF-8 text");
  const array = new TextEncoder().encode(`[\n{"text": "ü"},\n{"text": "${"b".repeat(300_000)}"},\n{"text": "c"}\n]`);
  array[array.lastIndexOf(99)] = 0xff;
  using list = temporaryFolder({ "a.json": array, "b.json": array.subarray(0, -1) });
  for (const name of ["a.json", "b.json"]) {
    await assertRejects(() => readRecords([list.at(name)]), SyntaxError, `${name}", line 4: it is not UTF-8 text`);
  }
});

Deno.test("readRecords() says of a file that is no Parquet file, or half of one, what is wrong with it", async () => {
  const whole = Deno.readFileSync(PARQUET);
  const cases: [content: Uint8Array | string, message: string][] = [
    ["", "it is empty: a whole Parquet file is wanted"],
    ["PAR1", "it has only 4 bytes: a whole Parquet file is wanted"],
    ["PAR1 but no more", 'its 16 bytes do not end with "PAR1": a whole Parquet file is wanted'],
    [whole.subarray(0, -9), `its ${whole.length - 9} bytes do not end with "PAR1"`],
  ];
  for (const [content, message] of cases) {
    using dir = temporaryFolder({ "a.parquet": content });
    await assertRejects(
      () => readRecords([dir.at("a.parquet")]),
      SyntaxError,
      `Cannot read "${dir.at("a.parquet")}": ${message}`,
    );
  }
});

Deno.test("findSplits() finds the splits of a folder by their names", () => {
  const cases: [names: string[], found: Record<string, string[]>][] = [
    [["train.jsonl", "validation.jsonl", "test.jsonl", "README.md"], {
      train: ["train.jsonl"],
      validation: ["validation.jsonl"],
      test: ["test.jsonl"],
    }],
    [["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], {
      train: ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
      test: ["data/test-00000-of-00001.parquet"],
    }],
    [["default/0.parquet", "train/0.parquet", "dev/0.parquet"], {
      train: ["train/0.parquet"],
      validation: ["dev/0.parquet"],
    }],
    [["medical_train.json", "medical_eval.json"], { train: ["medical_train.json"], validation: ["medical_eval.json"] }],
    [["constraints.jsonl"], { train: ["constraints.jsonl"] }],
  ];
  for (const [names, found] of cases) {
    using dir = temporaryFolder(Object.fromEntries(names.map((name) => [name, ""])));
    const paths = Object.entries(found).map(([split, files]) => [split, files.map(dir.at)]);
    assertEquals(findSplits(dir.path), Object.fromEntries(paths));
  }
});

Deno.test("findSplits() throws when it would have to guess", () => {
  const cases: [names: string[], message: string][] = [
    [[], "it holds no .jsonl, .json or .parquet file"],
    [["test.jsonl"], 'it holds "test.jsonl": a name like "train.jsonl" is wanted'],
    [["a.jsonl", "b.jsonl"], 'it holds "a.jsonl", "b.jsonl"'],
    [["train.jsonl", "train.parquet"], "one split needs one file format"],
    [["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "2 of 3 shards are there"],
  ];
  for (const [names, message] of cases) {
    using dir = temporaryFolder(Object.fromEntries(names.map((name) => [name, ""])));
    assertThrows(() => findSplits(dir.path), Error, message);
  }
  assertThrows(() => findSplits("none/such"), Error, "no such file or folder");
});

Deno.test("carveSplits() takes a twentieth for each missing split, by content and not by order", () => {
  const records = Array.from({ length: 2000 }, (_, i) => ({ text: `text ${i}` }));
  const { train, validation, test } = carveSplits([...records, records[7]!], ["validation", "test"]);
  const sizes = [train!.length, validation!.length, test!.length];
  assertEquals(sizes.map((n) => Math.round(n / 100)), [18, 1, 1]);
  assertEquals(sizes.reduce((a, b) => a + b), 2001);
  const places = [train, validation, test].filter((part) => part!.some((record) => record === records[7]));
  assertEquals(places.length, 1); // equal records stay together

  const sorted = (part: readonly SftRecord[]) => part.map((record) => JSON.stringify(record)).sort();
  const reversed = carveSplits(records.toReversed(), ["validation", "test"]);
  assertEquals(sorted(reversed.test!), sorted(test!.filter((record, i, all) => all.indexOf(record) === i)));
  assertEquals(carveSplits(records, []), { train: records });
});

Deno.test("carveSplits() leaves no split empty when there are three records", () => {
  const records = ["a", "b", "c"].map((text) => ({ text }));
  const parts = carveSplits(records, ["validation", "test"]);
  assertEquals([parts.train!.length, parts.validation!.length, parts.test!.length], [1, 1, 1]);
  // Equal records are one: they are never on both sides.
  const twice = carveSplits([...records, ...records], ["validation", "test"]);
  for (const part of [twice.train!, twice.validation!, twice.test!]) {
    assertEquals([part.length, part[0]], [2, part[1]]);
  }
  const same = carveSplits([records[0]!, records[0]!], ["test"]);
  assertEquals([same.train!.length, same.test!.length], [2, 0]);
});

Deno.test("readSplits() takes validation and test from files of their own and says what it carved", async () => {
  const lines = Array.from({ length: 100 }, (_, i) => `{"text": "${i}"}`).join("\n");
  using dir = temporaryFolder({ "all.jsonl": lines, "held_out.jsonl": '{"text": "v"}' });
  const { records, files, notes } = await readSplits(dir.at("all.jsonl"), { validation: dir.at("held_out.jsonl") });
  assertEquals(records.validation, [{ text: "v" }]);
  assertEquals(records.train.length + records.test.length, 100);
  assertEquals(files.test, [dir.at("all.jsonl")]);
  assertEquals(notes.at(-1)!.startsWith("Without a file of its own, test came out of train"), true);

  using empty = temporaryFolder({ "train.jsonl": "\n" });
  await assertRejects(() => readSplits(empty.path), RangeError, "it has no records");
});
