/** The reader against the reference library's verdicts, the writer against files that the library wrote, shards and big files. */
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { openModel, openSafetensors, type TensorSink, writeSafetensors } from "../../lib/data/safetensors.ts";
import { temporaryFolder } from "../check.ts";

const golden = new URL("../../fixtures/golden/", import.meta.url).pathname;
const hex = (bytes: Uint8Array) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

interface Verdict {
  readonly deserialize: "accept" | "reject";
  readonly message?: string;
  readonly tensors?: readonly { name: string; dtype: string; shape: number[]; hex: string }[];
  readonly metadata?: Record<string, string> | null;
}

/** The README of the format forbids a name given twice; the library lets the last one win. */
const STRICTER = ["12_duplicate_tensor_name", "13_duplicate_tensor_name_different"];

Deno.test("openSafetensors() gives the reference library's verdict on every hostile and odd file", () => {
  const verdicts = JSON.parse(Deno.readTextFileSync(`${golden}safetensors_bad/verdicts.json`));
  const names = Object.keys(verdicts).filter((name) => name !== "library");
  assertEquals(names.length, 76);
  for (const name of names) {
    const verdict = verdicts[name] as Verdict;
    const path = `${golden}safetensors_bad/${name}.safetensors`;
    if (verdict.deserialize === "reject" || STRICTER.includes(name)) {
      const error = assertThrows(() => openSafetensors(path), Error, `Cannot read "${path}": `);
      assert(error instanceof RangeError || error instanceof SyntaxError, `${name}: ${error}`);
      continue;
    }
    using source = openSafetensors(path);
    assertEquals(source.tensors.size, verdict.tensors!.length, name);
    for (const want of verdict.tensors!) {
      const info = source.tensors.get(want.name)!;
      assertEquals({ dtype: info.dtype as string, shape: info.shape }, { dtype: want.dtype, shape: want.shape });
      assertEquals(hex(source.read(want.name)), want.hex, `${name} ${want.name}`);
    }
    assertEquals(source.metadata, verdict.metadata ?? {}, name);
  }
});

Deno.test("a refusal names the file, the tensor and the value", () => {
  const told: [string, string][] = [
    ["07_header_length_over_100MB", "a header of 100000001 bytes"],
    ["17_hole_between_tensors", 'tensor "b" has data_offsets [8, 12]: it must begin at 4'],
    ["21_negative_offset", 'tensor "a" has -8 in data_offsets'],
    ["22_shape_does_not_match_bytes", 'tensor "a" is F32 of shape [3], 12 bytes, but data_offsets [0, 8] hold 8'],
    ["24_unknown_dtype", 'tensor "a" has the unknown dtype "F33"'],
    ["29_shape_product_overflow", "its size does not fit 64 bits"],
    ["38_offset_float", 'tensor "a" has 8.0 in data_offsets'],
    ["39_metadata_number", '"__metadata__" has 1 for "k"'],
    ["46_lone_surrogate_name", "a lone surrogate"],
  ];
  for (const [name, words] of told) {
    assertThrows(() => openSafetensors(`${golden}safetensors_bad/${name}.safetensors`), Error, words);
  }
  assertThrows(() => openSafetensors("nowhere.safetensors"), Error, 'Cannot read "nowhere.safetensors": no such file');
});

/** A file with this header and so many data bytes, opened: the error's message, or the names of its tensors. */
function verdictOn(header: string, dataBytes = 8): string {
  const json = new TextEncoder().encode(header);
  const file = new Uint8Array(8 + json.length + dataBytes);
  new DataView(file.buffer).setBigUint64(0, BigInt(json.length), true);
  file.set(json, 8);
  using folder = temporaryFolder({ "x.safetensors": file });
  const path = folder.at("x.safetensors");
  try {
    using source = openSafetensors(path);
    return [...source.tensors.keys()].join();
  } catch (error) {
    return (error as Error).message.replace(`Cannot read "${path}": `, "");
  }
}

Deno.test("the header scanner holds where the verdict files have no case", () => {
  const entry = `{"dtype":"F32","shape":[2],"data_offsets":[0,8]}`;
  const extra = (value: string) => verdictOn(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":${value}}}`);
  assertEquals(verdictOn(`{"\\u0061":${entry}}`), "a");
  assertEquals(verdictOn(`{"a":${entry},"\\u0061":${entry}}`), 'the tensor name "a" is there twice');
  assertEquals(verdictOn(`{"a":${entry}} \n\t\r`), "a");
  assertEquals(extra(`-0.5e+3`), "a");
  for (const number of ["01", "1.", ".5", "+1", "1e", "NaN", "0x1", "-"]) {
    assert(extra(number).includes("not JSON"), number);
  }
  assert(extra("1e999").includes("too large"));
  assert(extra(`"\\x41"`).includes("wrong escape"));
  assert(extra(`"\u0001"`).includes("control character"));
  assertEquals(extra("[".repeat(125) + "]".repeat(125)), "a");
  assert(extra("[".repeat(126) + "]".repeat(126)).includes("nested levels"));
  assert(extra("[".repeat(100_000)).includes("nested levels"));
  assert(verdictOn(`{"a":["F32",[2],[0,8]]}`).includes("must be an object"));
  assert(verdictOn(`{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}`, 1).includes("not whole bytes"));
  assert(verdictOn(`{"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,8]}}`).includes("below 2^64"));
});

const libraryFiles = ["tiny/model_hf", "tiny/model_4bit", "odd/model_hf"];
for (const name of libraryFiles) {
  Deno.test(`writeSafetensors() writes ${name} byte for byte as the library did`, async () => {
    const path = `${golden}${name}/model.safetensors`;
    using folder = temporaryFolder();
    const out = folder.at("out");
    using source = openSafetensors(path);
    const sinks: TensorSink[] = [...source.tensors.values()].reverse().map((info) => ({
      name: info.name,
      dtype: info.dtype,
      shape: info.shape,
      data: () => Promise.resolve(source.read(info.name)),
    }));
    await writeSafetensors(out, sinks, source.metadata);
    assert(hex(await Deno.readFile(out)) === hex(await Deno.readFile(path)));
  });
}

Deno.test("writeSafetensors() orders by dtype rank and UTF-8 bytes, pads the header and calls data() in file order", async () => {
  using folder = temporaryFolder();
  const out = folder.at("out");
  const called: string[] = [];
  const sink = (name: string, dtype: TensorSink["dtype"], bytes: number): TensorSink => ({
    name,
    dtype,
    shape: [bytes / (dtype === "F32" ? 4 : dtype === "BF16" ? 2 : 1)],
    data: () => {
      called.push(name);
      return new Uint8Array(bytes).fill(name.length);
    },
  });
  // U+FFFD comes after U+1F600 in UTF-16 order and before it in UTF-8 order
  const order = ["layers.10", "layers.2", "\ufffd", "\u{1f600}", 'q"\\\u0007', "b", "__proto__", "u"];
  await writeSafetensors(
    out,
    [
      sink("u", "U8", 3),
      sink("__proto__", "U8", 1),
      sink("b", "BF16", 2),
      sink('q"\\\u0007', "BF16", 4),
      sink("\u{1f600}", "F32", 4),
      sink("\ufffd", "F32", 4),
      sink("layers.2", "F32", 8),
      sink("layers.10", "F32", 4),
    ].map((each) => each),
    {},
  );
  using source = openSafetensors(out);
  const want = ["layers.10", "layers.2", "\ufffd", "\u{1f600}", "b", 'q"\\\u0007', "__proto__", "u"];
  assertEquals([...order].sort(), [...want].sort());
  assertEquals(called, want);
  assertEquals([...source.tensors.keys()], want);
  assertEquals(source.tensors.get("layers.10")!.begin % 8, 0);
  assertEquals(source.metadata, {});
  assertEquals([...source.read("b")], [1, 1]);
  assertEquals([...source.readRange("layers.2", 6, 2)], [8, 8]);
  assertThrows(() => source.readRange("layers.2", 6, 3), RangeError, "bytes 6 to 9");
  assertThrows(() => source.read("c"), Error, 'it has no tensor "c"');
});

Deno.test("writeSafetensors() leaves no file behind when a tensor is wrong", async () => {
  using folder = temporaryFolder();
  const dir = folder.path;
  const path = `${dir}/x.safetensors`;
  const bad: TensorSink = { name: "a", dtype: "F32", shape: [2], data: () => new Uint8Array(7) };
  await assertRejects(
    () => writeSafetensors(path, [bad]),
    RangeError,
    'tensor "a" gave 7 bytes: F32 of shape [2] has 8',
  );
  await assertRejects(() => writeSafetensors(path, [bad, bad]), RangeError, 'the tensor name "a" is given twice');
  assertEquals([...Deno.readDirSync(dir)], []);
});

Deno.test("openModel() reads shards as one model and refuses an index that does not hold", async () => {
  using folder = temporaryFolder();
  const dir = folder.path;
  const sink = (name: string, value: number): TensorSink => ({
    name,
    dtype: "F32",
    shape: [],
    data: () => new Uint8Array(Float32Array.of(value).buffer),
  });
  assertThrows(
    () => openModel(dir),
    Error,
    'no model.safetensors.index.json: a model folder is wanted: run "deno task 01"',
  );
  const [first, second] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
  await writeSafetensors(`${dir}/${first}`, [sink("a", 1), sink("b", 2)]);
  await writeSafetensors(`${dir}/${second}`, [sink("c", 3)]);
  const index = (map: Record<string, unknown>) =>
    Deno.writeTextFileSync(`${dir}/model.safetensors.index.json`, JSON.stringify({ metadata: {}, weight_map: map }));
  index({ a: first, b: first, c: second });
  {
    using source = openModel(dir);
    assertEquals(["a", "b", "c"].map((name) => new Float32Array(source.read(name).buffer)[0]), [1, 2, 3]);
    assertEquals(source.metadata, { format: "pt" });
  }
  const refused: [Record<string, unknown>, string][] = [
    [
      { a: "../x.safetensors" },
      'tensor "a" is in "../x.safetensors": a shard must be a .safetensors file of the same folder',
    ],
    [{ a: "/etc/x.safetensors" }, "of the same folder"],
    [{ a: "sub\\x.safetensors" }, "of the same folder"],
    [{ a: 7 }, 'tensor "a" is in 7'],
    [{ a: "gone.safetensors" }, 'gone.safetensors": no such file'],
    [{ a: first, b: first, c: second, d: second }, `tensor "d" is not in ${second}`],
    [{ a: first, c: second }, `${first} holds the tensor "b", which the index does not put there`],
  ];
  for (const [map, words] of refused) {
    index(map);
    assertThrows(() => openModel(dir), Error, words);
  }
  Deno.writeTextFileSync(`${dir}/model.safetensors.index.json`, "[]");
  assertThrows(() => openModel(dir), SyntaxError, 'it has no object "weight_map"');
});

Deno.test("a tensor that lies beyond 4 GiB is read at its place", async () => {
  using folder = temporaryFolder();
  const path = folder.at("far");
  const far = 5 * 2 ** 30;
  const json = new TextEncoder().encode(
    `{"far":{"dtype":"U8","shape":[4],"data_offsets":[${far},${far + 4}]},` +
      `"hole":{"dtype":"U8","shape":[${far}],"data_offsets":[0,${far}]}}`,
  );
  const file = await Deno.open(path, { write: true, create: true });
  const head = new Uint8Array(8 + json.length);
  new DataView(head.buffer).setBigUint64(0, BigInt(json.length), true);
  head.set(json, 8);
  await file.write(head);
  await file.seek(head.length + far, Deno.SeekMode.Start); // a sparse file: the hole takes no disk space
  await file.write(Uint8Array.of(1, 2, 3, 4));
  file.close();
  {
    using source = openSafetensors(path);
    assertEquals([...source.read("far")], [1, 2, 3, 4]);
    assertEquals([...source.readRange("hole", far - 2, 2)], [0, 0]);
  }
});
