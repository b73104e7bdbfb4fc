/**
 * attention.wgsl against the CPU reference: packed documents of odd lengths, grouped heads, widths from 8 to 128. The errors
 * found (NMSE) are 9e-14 in out, 4e-15 in lse, 3e-14 in delta and 2e-13 in the gradients, all of them in the longest document; the
 * bounds are 100 times that.
 */
import { assertEquals, assertThrows } from "@std/assert";
import { createAttention, documentsOf } from "../../lib/ops/attention.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest } from "../on_gpu.ts";
import { attention, attentionBackward } from "../reference.ts";

const OUT = 9e-12, LSE = 4e-13, DELTA = 3e-12, GRADIENT = 2e-11;

/** Documents of a row of tokens; the sums are no multiple of the tile. */
const PACKED = [1, 7, 33, 5, 64, 1, 1, 13];
const SHAPES = [
  { heads: 2, kvHeads: 2, headDim: 8, packings: [[1], [3], PACKED, [257]] },
  { heads: 4, kvHeads: 2, headDim: 16, packings: [[1, 1], PACKED] },
  { heads: 1, kvHeads: 1, headDim: 24, packings: [[33]] },
  { heads: 3, kvHeads: 1, headDim: 32, packings: [[5], PACKED] },
  { heads: 1, kvHeads: 1, headDim: 40, packings: [[33]] },
  { heads: 2, kvHeads: 1, headDim: 64, packings: [PACKED, [40, 130, 30]] },
  { heads: 1, kvHeads: 1, headDim: 128, packings: [PACKED] },
];
type Shape = typeof SHAPES[number];

/** Columns `[begin, end)` of each row. */
function columns(x: Float32Array, width: number, [begin, end]: readonly [number, number]): Float32Array {
  return Float32Array.from({ length: x.length / width * (end - begin) }, (_, i) => {
    const row = Math.floor(i / (end - begin));
    return x[row * width + begin + i - row * (end - begin)]!;
  });
}

async function prepare({ input, rows }: Bench, { heads, kvHeads, headDim }: Shape, documents: readonly number[]) {
  const T = documents.reduce((a, b) => a + b), width = (heads + 2 * kvHeads) * headDim;
  // q and k small enough that no row of the softmax is one-hot, v and dout with a mean.
  const q = [0, heads * headDim] as const, k = [q[1], q[1] + kvHeads * headDim] as const, v = [k[1], width] as const;
  const qkv = wave(T * width).map((x, i) => i % width < k[1] ? x * 1.5 / Math.sqrt(headDim) ** 0.5 : x);
  const dout = wave(T * heads * headDim, 2);
  const positions = documents.flatMap((length) => Array.from({ length }, (_, i) => i));
  const start = Int32Array.from(positions, (position, t) => t - position);
  const of = { H: heads, KV: kvHeads, D: headDim, start };
  const parts = { q: columns(qkv, width, q), k: columns(qkv, width, k), v: columns(qkv, width, v) };
  const forward = attention(parts, of);
  const { spans, order } = documentsOf(Uint32Array.from(positions));
  const told = { spans: await input("spans", spans), order: await input("order", order) };
  const t = { rows: rows(T), documents: told, qkv: await input("qkv", qkv) };
  const name = `[${documents}] ${heads}/${kvHeads} heads of ${headDim}`;
  return {
    T,
    width,
    t,
    dout,
    forward,
    gradients: attentionBackward({ ...parts, ...forward, dout }, of),
    name,
    q,
    k,
    v,
  };
}

gpuTest("attention.forward attends inside documents, causally", async (bench) => {
  for (const shape of SHAPES) {
    const { heads, headDim } = shape, op = createAttention(bench.gpu, shape);
    for (const documents of shape.packings) {
      const { t, T, forward, name } = await prepare(bench, shape, documents);
      const out = bench.output("out", { shape: [T, heads * headDim] });
      const lse = bench.output("lse", { shape: [T, heads] });
      const command = op.forward({ ...t, out, lse });
      const [o, l] = await bench.compute([command], [out, lse]);
      assertClose(o!, forward.out, { nmse: OUT, name: `out ${name}` });
      assertClose(l!, forward.lse, { nmse: LSE, name: `lse ${name}` });
    }
  }
});

gpuTest("attention.backward gives the gradients of q, k and v", async (bench) => {
  for (const shape of SHAPES) {
    const { heads, headDim } = shape, op = createAttention(bench.gpu, shape);
    for (const documents of shape.packings) {
      const { t, T, width, dout, forward, gradients, name, q, k, v } = await prepare(bench, shape, documents);
      const given = {
        out: await bench.input("out", Float32Array.from(forward.out)),
        lse: await bench.input("lse", Float32Array.from(forward.lse)),
        dout: await bench.input("dout", dout),
      };
      const delta = bench.output("delta", { shape: [T, heads] }), dqkv = bench.output("dqkv", { shape: [T, width] });
      const commands = op.backward({ ...t, ...given, delta, dqkv });
      const [d, g] = await bench.compute(commands, [delta, dqkv]);
      const expected = Float64Array.from({ length: T * heads }, (_, i) => {
        const at = i * headDim;
        return dout.subarray(at, at + headDim).reduce((sum, x, c) => sum + x * forward.out[at + c]!, 0);
      });
      assertClose(d!, expected, { nmse: DELTA, name: `delta ${name}` });
      assertClose(columns(g!, width, q), gradients.dq, { nmse: GRADIENT, name: `dq ${name}` });
      assertClose(columns(g!, width, k), gradients.dk, { nmse: GRADIENT, name: `dk ${name}` });
      assertClose(columns(g!, width, v), gradients.dv, { nmse: GRADIENT, name: `dv ${name}` });
    }
  }
});

Deno.test("documentsOf() finds documents by their positions, and the blocks where most is to be done", () => {
  const documents = (lengths: readonly number[]) =>
    documentsOf(Uint32Array.from(lengths.flatMap((length) => Array.from({ length }, (_, i) => i))));
  assertEquals(documents([2, 1, 1]), {
    spans: Uint32Array.of(0, 2, 0, 2, 2, 3, 3, 4),
    order: Uint32Array.of(0, 0),
  });
  // Of a long document the last rows have most keys before them, the first most queries behind; short ones come last.
  const pairs = ({ order }: { order: Uint32Array }) => [0, 1].map((side) => order.filter((_, i) => i % 2 === side));
  assertEquals(pairs(documents([384])), [Uint32Array.of(2, 1, 0), Uint32Array.of(0, 1, 2)]);
  assertEquals(pairs(documents([64, 64, 256, 128])), [Uint32Array.of(2, 1, 3, 0), Uint32Array.of(1, 2, 3, 0)]);
  // A row that is cut off goes on at its position.
  assertEquals(documentsOf(Uint32Array.of(5, 6, 0)).spans, Uint32Array.of(0, 2, 0, 2, 2, 3));
});

gpuTest("createAttention() refuses heads that its vectors do not fit", ({ gpu }) => {
  const make = (headDim: number) => () => createAttention(gpu, { heads: 2, kvHeads: 1, headDim });
  assertThrows(make(20), RangeError, "Cannot attend with heads of 20 columns: a multiple of 8 up to 128 is wanted");
  assertThrows(make(136), RangeError, "Cannot attend with heads of 136 columns");
  return Promise.resolve();
}, { models: false });
