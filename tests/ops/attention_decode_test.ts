/**
 * attention_decode.wgsl against the CPU reference: sequences of different lengths written one position at a time or stored
 * at once, in slots of any order. The largest error found (NMSE) is 3e-14; the bound is 30 times that.
 */
import { assertEquals, assertThrows } from "@std/assert";
import { createAttentionDecode, NO_SLOT } from "../../lib/ops/attention_decode.ts";
import { assertClose, wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { attention } from "../reference.ts";

const BOUND = 1e-12;
const SHAPES = [
  { heads: 2, kvHeads: 2, headDim: 8, context: 20 },
  { heads: 4, kvHeads: 2, headDim: 16, context: 100 },
  { heads: 3, kvHeads: 1, headDim: 64, context: 260 },
  { heads: 1, kvHeads: 1, headDim: 128, context: 33 },
];

gpuTest("attention_decode.forward attends to what was stored and to its own row", async (bench) => {
  for (const shape of SHAPES) {
    const { heads: H, kvHeads: KV, headDim: D, context } = shape, width = (H + 2 * KV) * D;
    const op = createAttentionDecode(bench.gpu, shape);
    // The last position of each sequence is the row that is written; slot 1 belongs to nobody.
    const lengths = [1, 2, 9, context, context - 3], slots = [5, 0, 3, 2, 4];
    const texts = lengths.map((T, i) =>
      wave(T * width, i).map((x, at) => at % width < (H + KV) * D ? x / D ** 0.25 : x)
    );
    const stored = texts.map((text) => text.subarray(0, text.length - width));
    const before = stored.flatMap((rows) => [...rows, ...wave(width, 9)]); // a row between the texts that is not kept
    const place = stored.flatMap((rows, i) => [
      ...Array.from({ length: rows.length / width }, (_, position) => [slots[i]!, position]),
      [NO_SLOT, 0],
    ]);
    const size = 6 * KV * context * D;
    const keys = bench.output("keys", { shape: [size], start: wave(size, 7) });
    const values = bench.output("values", { shape: [size], start: wave(size, 8) });
    const out = bench.output("out", { shape: [5, H * D] });
    const commands = [
      op.store({
        rows: bench.rows(place.length),
        qkv: await bench.input("before", Float32Array.from(before)),
        slots: await bench.input("slots.before", Uint32Array.from(place, ([slot]) => slot!)),
        positions: await bench.input("positions.before", Uint32Array.from(place, ([, position]) => position!)),
        keys,
        values,
      }),
      op.forward({
        rows: bench.rows(5),
        qkv: await bench.input("qkv", Float32Array.from(texts.flatMap((text) => [...text.subarray(-width)]))),
        slots: await bench.input("slots", Uint32Array.from(slots)),
        positions: await bench.input("positions", Uint32Array.from(lengths, (T) => T - 1)),
        keys,
        values,
        out,
      }),
    ];
    const [found, k, v] = await bench.compute(commands, [out, keys, values]);
    const expected = texts.map((text) => {
      const T = text.length / width,
        part = (from: number, count: number) =>
          Float32Array.from(
            { length: T * count * D },
            (_, i) => text[Math.floor(i / count / D) * width + from * D + i % (count * D)]!,
          );
      const all = attention({ q: part(0, H), k: part(H, KV), v: part(H + KV, KV) }, {
        H,
        KV,
        D,
        start: new Int32Array(T),
      });
      return all.out.slice(-H * D);
    });
    const name = `${H}/${KV} heads of ${D}`;
    expected.forEach((row, i) =>
      assertClose(found!.subarray(i * H * D, (i + 1) * H * D), row, {
        nmse: BOUND,
        name: `${name}, ${lengths[i]} positions`,
      })
    );
    // Every position of every text lies in the cache, the rest is as it was.
    const cached = [wave(size, 7), wave(size, 8)];
    texts.forEach((text, i) => {
      for (let at = 0; at < text.length; at++) {
        const column = at % width - H * D, position = Math.floor(at / width);
        if (column < 0) continue;
        const [which, d] = [column < KV * D ? 0 : 1, column % (KV * D)];
        const vec = slots[i]! * KV * D / 4 + Math.floor(d / 4);
        cached[which]![(vec * context + position) * 4 + d % 4] = text[at]!;
      }
    });
    assertEquals([k, v].map((tensor, i) => tensor!.findIndex((x, at) => x !== cached[i]![at])), [-1, -1], name);
  }
});

gpuTest("attention_decode has columns and rows for its cache, and refuses heads that it cannot hold", ({ gpu }) => {
  const shape = { heads: 4, kvHeads: 2, headDim: 16, context: 10 };
  const { keys, values } = createAttentionDecode(gpu, shape).cache("layers.0", 3);
  assertEquals([keys.name, keys.shape, values.shape], ["layers.0.keys", [3, 2, 4, 10, 4], [3, 2, 4, 10, 4]]);
  for (const { buffer } of [keys, values]) buffer.destroy();
  for (const headDim of [6, 132]) {
    const message = `Cannot attend with heads of ${headDim} columns: a multiple of 4 up to 128 is wanted`;
    assertThrows(() => createAttentionDecode(gpu, { ...shape, headDim }), RangeError, message);
  }
  return Promise.resolve();
});
