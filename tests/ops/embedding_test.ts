/**
 * embedding.wgsl against the CPU reference: moving rows is exact; adding up a few of them is off by 2e-15 (NMSE), 2,100 of them
 * by 4e-13; the bounds are 100 times that.
 */
import { assertEquals } from "@std/assert";
import { createEmbedding } from "../../lib/ops/embedding.ts";
import { assertClose, wave } from "../check.ts";
import { gpuTest, stored } from "../on_gpu.ts";
import { addTo, embedding, embeddingBackward } from "../reference.ts";

const SUM = 2e-13, LONG_SUM = 4e-11;
const DIMS = [8, 64, 200], ROWS = [1, 3, 5, 257], VOCAB = 101;
const someIds = (count: number, phase = 0) =>
  Uint32Array.from({ length: count }, (_, i) => (i * i * 7 + i + phase) % VOCAB);

gpuTest("embedding.gather takes rows of f32, f16 and bf16 tables", async ({ gpu, input, output, rows, compute }) => {
  for (const dtype of ["f32", "f16", "bf16"] as const) {
    for (const dim of DIMS) {
      const op = createEmbedding(gpu, { dim });
      const { bytes, values } = stored(wave(VOCAB * dim), dtype);
      const table = await input("table", bytes, { shape: [VOCAB, dim], dtype });
      for (const count of ROWS) {
        const ids = someIds(count + 4), out = output("out", { shape: [count, dim] });
        const t = { rows: rows(count, 4), ids: await input("ids", ids), table, out };
        const [found] = await compute([op.gather(t)], [out]);
        assertEquals(found, Float32Array.from(embedding(values, ids.subarray(4), dim)), `${dtype} [${count}, ${dim}]`);
      }
    }
  }
});

gpuTest("embedding.gather of each slice of a table fills the rows of its ids", async (bench) => {
  const { gpu, input, output, rows, compute } = bench;
  const dim = 64, count = 257, ids = someIds(count), values = wave(VOCAB * dim), start = wave(count * dim, 5);
  const op = createEmbedding(gpu, { dim });
  const slice = async (first: number, end: number) => ({
    first,
    table: await input(`table.${first}`, values.subarray(first * dim, end * dim), { shape: [end - first, dim] }),
  });
  const t = { rows: rows(count), ids: await input("ids", ids) };
  const out = output("out", { shape: [count, dim], start });
  const first = await slice(0, 33), second = await slice(33, 70), third = await slice(70, VOCAB);
  const [one] = await compute([op.gather({ ...t, ...second, out })], [out]);
  const expected = embedding(values, ids, dim).map((x, i) => {
    const id = ids[Math.floor(i / dim)]!;
    return id >= 33 && id < 70 ? x : start[i]!;
  });
  assertEquals(one, Float32Array.from(expected));
  const [all] = await compute([first, second, third].map((part) => op.gather({ ...t, ...part, out })), [out]);
  assertEquals(all, Float32Array.from(embedding(values, ids, dim)));
});

gpuTest("embedding.scatter puts rows in their places and leaves the others", async (bench) => {
  const { gpu, input, output, rows, compute } = bench;
  for (const dim of DIMS) {
    const op = createEmbedding(gpu, { dim });
    const x = wave(37 * dim), start = wave(VOCAB * dim, 5), expected = start.slice();
    const ids = Uint32Array.from({ length: 39 }, (_, i) => (i * 5 + 3) % VOCAB);
    ids.subarray(2).forEach((id, r) => expected.set(x.subarray(r * dim, (r + 1) * dim), id * dim));
    const out = output("out", { shape: [VOCAB, dim], start });
    const t = { rows: rows(37, 2), ids: await input("ids", ids), x: await input("x", x), out };
    const [found] = await compute([op.scatter(t)], [out]);
    assertEquals(found, expected, `[37, ${dim}]`);
  }
});

gpuTest("embedding.backward adds up the rows of each id, also in slices", async (bench) => {
  const { gpu, input, output, rows, compute } = bench;
  for (const dim of DIMS) {
    const op = createEmbedding(gpu, { dim });
    for (const count of ROWS) {
      const tokens = someIds(count), dout = wave(count * dim), start = wave(VOCAB * dim, 5);
      const order = Uint32Array.from(tokens.keys()).sort((a, b) => tokens[a]! - tokens[b]! || a - b);
      const sorted = order.map((t) => tokens[t]!), ids = [...new Set(sorted)];
      const starts = Uint32Array.from([...ids.map((id) => sorted.indexOf(id)), count]);
      const t = {
        rows: rows(ids.length),
        ids: await input("ids", Uint32Array.from(ids)),
        order: await input("order", order),
        starts: await input("starts", starts),
        x: await input("dout", dout),
      };
      const head = output("head", { shape: [33, dim], start: start.slice(0, 33 * dim) });
      const tail = output("tail", { shape: [VOCAB - 33, dim], start: start.slice(33 * dim) });
      const commands = [op.backward({ ...t, dtable: head }), op.backward({ ...t, dtable: tail, first: 33 })];
      const [a, b] = await compute(commands, [head, tail]);
      const expected = addTo(embeddingBackward(dout, tokens, { V: VOCAB, C: dim }), start);
      assertClose([...a!, ...b!], expected, { nmse: SUM, name: `dtable [${count}, ${dim}]` });
    }
  }
});

gpuTest("embedding.backward adds up thousands of rows of one id", async ({ gpu, input, output, rows, compute }) => {
  // A driver that counts loop iterations (lavapipe stops at 65,535 per invocation) must not cut the sum short.
  const dim = 1024, count = 2100, op = createEmbedding(gpu, { dim });
  const dout = wave(count * dim, 0, { mean: 1, scale: 0.5 });
  const dtable = output("dtable", { shape: [1, dim], start: wave(dim) });
  const t = {
    rows: rows(1),
    ids: await input("ids", Uint32Array.of(0)),
    order: await input("order", Uint32Array.from({ length: count }, (_, i) => i)),
    starts: await input("starts", Uint32Array.of(0, count)),
    x: await input("dout", dout),
    dtable,
  };
  const [found] = await compute([op.backward(t)], [dtable]);
  const expected = addTo(embeddingBackward(dout, new Uint32Array(count), { V: 1, C: dim }), wave(dim));
  assertClose(found!, expected, { nmse: LONG_SUM, name: "dtable" });
});
