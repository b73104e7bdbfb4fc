/** PyTorch checkpoints: one that torch wrote, one that tries to run a command, and hand-made archives with every kind of damage. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { toFloat32 } from "../../lib/data/dtype.ts";
import { openTorchCheckpoint } from "../../lib/data/torch_zip.ts";
import { temporaryFolder } from "../check.ts";

const fixtures = new URL("../../fixtures/torch/", import.meta.url).pathname;

/** Value `i` of the `k`-th tensor of the fixture, counted as the model creates them. */
const value = (i: number, k: number) => ((i * 31 + k * 17) % 101 - 50) / 64;
const order = [
  "norm_attn",
  "attn.wq",
  "attn.wk",
  "attn.wv",
  "attn.wo",
  "norm_ffn",
  "ffn.w_gate",
  "ffn.w_up",
  "ffn.w_down",
];

Deno.test("openTorchCheckpoint() reads every value of a file that torch.save wrote, transposed, bfloat16 and shared ones too", () => {
  using source = openTorchCheckpoint(`${fixtures}medslm.pt`);
  const numbered = new Map([["tok_emb.weight", 1], ["lm_head.weight", 1], ["norm_f.weight", 20]]);
  for (const block of [0, 1]) {
    order.forEach((name, i) => numbered.set(`blocks.${block}.${name}.weight`, 2 + 9 * block + i));
  }
  for (const [name, k] of numbered) {
    const info = source.tensors.get(name)!;
    const values = toFloat32(source.read(name), info.dtype);
    assertEquals(values.length, info.shape.reduce((product, axis) => product * axis, 1));
    values.forEach((read, i) => assertEquals(read, value(i, k), `${name}[${i}]`));
  }
  assertEquals(source.tensors.size, numbered.size + 3);
  assertEquals(source.tensors.get("blocks.1.ffn.w_up.weight")!.dtype, "BF16");
  assertEquals(source.tensors.get("blocks.1.attn.wq.weight")!.shape, [16, 16]);
  const mask = source.read("blocks.0.attn.causal_mask");
  assertEquals([...mask], Array.from({ length: 64 }, (_, i) => i % 8 <= Math.floor(i / 8) ? 1 : 0));
  assertEquals(source.readRange("blocks.1.attn.wq.weight", 8, 4), source.read("blocks.1.attn.wq.weight").slice(8, 12));
  assertThrows(() => source.readRange("blocks.1.attn.wq.weight", 1020, 8), RangeError, "are not among its 1024");
  assertEquals(source.config!.n_kv_heads, 2);
  assertEquals(source.notes, [
    'the weights are under "model"; beside it: config, step, loss, tokens, lrs',
    "the prefixes module. and _orig_mod. were taken off 24 names",
  ]);
});

Deno.test("a pickle that would run a command is refused by the name of what it calls, and nothing runs", () => {
  assertThrows(() => openTorchCheckpoint(`${fixtures}hostile.pt`), RangeError, "data.pkl refers to posix.system");
  assertThrows(() => Deno.statSync("executed"), Deno.errors.NotFound);
});

const latin1 = (text: string) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
const little = (size: number, n: number) => {
  const view = new DataView(new ArrayBuffer(16));
  view.setBigUint64(0, BigInt(n), true);
  return String.fromCharCode(...new Uint8Array(view.buffer, 0, size));
};
const word = (text: string) => "X" + little(4, text.length) + text;
const int = (n: number) => "J" + little(4, n);
const list = (items: readonly number[]) => "(" + items.map(int).join("") + "t";

interface View {
  readonly storage?: string;
  readonly count?: number;
  readonly offset?: number;
  readonly shape?: readonly number[];
  readonly stride?: readonly number[];
}

/** A tensor as torch pickles it. */
function tensor(
  { storage = "FloatStorage", count = 6, offset = 0, shape = [2, 3], stride = [3, 1] }: View = {},
): string {
  return "ctorch._utils\n_rebuild_tensor_v2\n((" + word("storage") + `ctorch\n${storage}\n` + word("0") + word("cpu") +
    int(count) + "tQ" + int(offset) + list(shape) + list(stride) + "\x89ccollections\nOrderedDict\n)RtR";
}
const dict = (...pairs: [string, string][]) => "}" + pairs.map(([key, item]) => word(key) + item + "s").join("");
const pickle = (body: string) => "\x80\x02" + body + ".";

interface ZipOptions {
  readonly zip64?: boolean;
  readonly method?: number;
  readonly byteorder?: string;
  readonly data?: Uint8Array;
}

/** A checkpoint file with this pickle and the storage `data/0`. */
function archive(pickled: string, { zip64 = false, method = 0, byteorder, data }: ZipOptions = {}): Uint8Array {
  const storage = data ?? new Uint8Array(Float32Array.of(1, 2, 3, 4, 5, 6).buffer);
  const files: [string, string][] = [["x/data.pkl", pickled], ["x/data/0", String.fromCharCode(...storage)]];
  if (byteorder !== undefined) files.push(["x/byteorder", byteorder]);
  let [body, directory] = ["", ""];
  for (const [name, content] of files) {
    const size = little(4, content.length);
    const fixed = little(2, method) + little(8, 0);
    const wide = little(4, 0xffffffff);
    const extra = little(2, 1) + little(2, 24) + little(8, content.length) + little(8, content.length) +
      little(8, body.length);
    directory += "PK\x01\x02" + little(6, 0) + fixed + (zip64 ? wide + wide : size + size) + little(2, name.length) +
      little(2, zip64 ? extra.length : 0) + little(10, 0) + (zip64 ? wide : little(4, body.length)) + name +
      (zip64 ? extra : "");
    body += "PK\x03\x04" + little(4, 0) + fixed + size + size + little(2, name.length) + little(2, 5) + name + "extra" +
      content;
  }
  const start = body.length;
  body += directory;
  if (zip64) {
    const record = body.length;
    body += "PK\x06\x06" + little(8, 44) + little(4, 0) + little(8, 0) + little(8, files.length) +
      little(8, files.length) +
      little(8, directory.length) + little(8, start);
    body += "PK\x06\x07" + little(4, 0) + little(8, record) + little(4, 1);
  }
  const count = little(2, zip64 ? 0xffff : files.length);
  body += "PK\x05\x06" + little(4, 0) + count + count +
    (zip64 ? little(4, 0xffffffff) + little(4, 0xffffffff) : little(4, directory.length) + little(4, start)) +
    little(2, 3) + "end";
  return latin1(body);
}

/** Opens the bytes as a file and gives what `use` makes of it. */
function withFile<T>(bytes: Uint8Array, use: (path: string) => T): T {
  using folder = temporaryFolder({ "file.pt": bytes });
  return use(folder.at("file.pt"));
}

function values(bytes: Uint8Array, name = "a"): number[] {
  return withFile(bytes, (path) => {
    using source = openTorchCheckpoint(path);
    return [...toFloat32(source.read(name), source.tensors.get(name)!.dtype)];
  });
}

Deno.test("views of a storage read in their own order, from zip and zip64 files", () => {
  for (const zip64 of [false, true]) {
    const read = (view: View) => values(archive(pickle(dict(["a", tensor(view)])), { zip64 }));
    assertEquals(read({}), [1, 2, 3, 4, 5, 6]);
    assertEquals(read({ shape: [3, 2], stride: [1, 3] }), [1, 4, 2, 5, 3, 6]);
    assertEquals(read({ offset: 1, shape: [2], stride: [3] }), [2, 5]);
    assertEquals(read({ offset: 4, shape: [2], stride: [1] }), [5, 6]);
    assertEquals(read({ offset: 5, shape: [], stride: [] }), [6]);
    assertEquals(read({ shape: [0, 3], stride: [3, 1] }), []);
    assertEquals(read({ offset: 2, shape: [2, 2], stride: [0, 1] }), [3, 4, 3, 4]);
  }
  const parameter = `ctorch._utils\n_rebuild_parameter\n(${tensor()}\x88ccollections\nOrderedDict\n)RtR`;
  assertEquals(values(archive(pickle(dict(["state_dict", dict(["module.a", parameter], ["epoch", "K\x05"])])))), [
    1,
    2,
    3,
    4,
    5,
    6,
  ]);
});

Deno.test("what is not a plain little-endian state dict is refused with its name", () => {
  const one = pickle(dict(["a", tensor()]));
  const refused: [Uint8Array, string][] = [
    [latin1("\x80\x02}q\x00." + " ".repeat(30)), "it is not a zip file"],
    [archive(pickle("cbuiltins\neval\n" + word("1") + "\x85R")), "data.pkl refers to builtins.eval"],
    [archive(pickle(dict(["a", "c__main__\nConfig\n)\x81}b"]))), "data.pkl refers to __main__.Config"],
    [archive(pickle(dict(["a", "cnumpy\nndarray\n"]))), "data.pkl refers to numpy.ndarray"],
    [archive(pickle("V1\n")), "uses the opcode 0x56 at byte 2"],
    [archive("\x80\x04}."), "pickle protocol 4"],
    [archive("\x80\x02h\x07."), "recalls the unknown value 7"],
    [archive("\x80\x02s."), "takes from an empty stack"],
    [archive("\x80\x02}("), "ends in the middle"],
    [archive(pickle(dict(["a", "K\x01"]))), "no dictionary of tensors"],
    [archive(pickle("]")), "no dictionary of tensors"],
    [archive(one, { method: 8 }), '"x/data.pkl" is compressed (method 8)'],
    [archive(one, { byteorder: "big" }), 'its byteorder is "big"'],
    [archive(one, { data: new Uint8Array(20) }), "has 20 bytes: 6 values of F32 take 24"],
    [archive(pickle(dict(["a", tensor({ offset: 1 })]))), 'tensor "a" reaches value 6 of data/0, which has 6'],
    [archive(pickle(dict(["a", tensor({ stride: [-1, 1] })]))), "not whole numbers"],
    [archive(pickle(dict(["a", tensor({ shape: [6] })]))), "something else than a storage"],
    [archive(pickle(dict(["a", tensor({ storage: "QInt8Storage" })]))), "data.pkl refers to torch.QInt8Storage"],
    [archive(pickle(dict(["a", tensor()], ["module.a", tensor()]))), 'two tensors are called "a"'],
  ];
  for (const [bytes, words] of refused) {
    withFile(bytes, (path) => assertThrows(() => openTorchCheckpoint(path), Error, words));
  }
  const expanded = archive(pickle(dict(["a", tensor({ shape: [1000, 3], stride: [0, 1] })])));
  assertThrows(() => values(expanded), RangeError, "repeats its 24 stored bytes");
});

Deno.test("a cut or damaged file ends in one sentence, never in a crash", () => {
  const whole = archive(pickle(dict(["b", "(lK\x01K\x02e"], ["a", tensor()])), { zip64: true, byteorder: "little" });
  const attempt = (bytes: Uint8Array): boolean => {
    try {
      values(bytes);
      return true;
    } catch (error) {
      assert(error instanceof Error && error.message.startsWith("Cannot "), String(error));
      return false;
    }
  };
  for (let length = 0; length < whole.length; length += 7) assert(!attempt(whole.slice(0, length)), `cut at ${length}`);
  let survived = 0;
  for (let at = 0; at < whole.length; at++) {
    const damaged = whole.slice();
    damaged[at] = damaged[at]! ^ (1 << (at % 8));
    if (attempt(damaged)) survived++;
  }
  assert(survived < whole.length / 2, `${survived} of ${whole.length}`);
});
