/**
 * matvec.wgsl against the CPU reference: each type of weights, segments with adapters of their own, offsets and strides,
 * numbers of rows and columns that no block divides. The largest error found (NMSE) is 2e-14; the bound is 50 times that.
 */
import { assertEquals, assertThrows } from "@std/assert";
import { createMatvec, rowBlock } from "../../lib/ops/matvec.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest, stored } from "../on_gpu.ts";
import { matmulNT } from "../reference.ts";

const BOUND = 1e-12;

/** A product with three segments (the second without an adapter), every operand with an offset or a stride to spare. */
async function prepare(
  { input, rows }: Bench,
  M: number,
  { N, K, dtype }: { N: number; K: number; dtype: "f32" | "f16" | "bf16" },
) {
  const r = 24, scale = 1.5, ends = [N - 24, N - 8, N], parts = [0, undefined, 1];
  const x = wave(M * (K + 8)), w = stored(wave(8 + N * (K + 16), 1), dtype);
  const u = wave(M * 2 * r, 2), b = wave((N - 16) * r, 3), add = wave(M * N, 4);
  const take = (
    from: Float32Array,
    { count, offset, stride, length }: Record<"count" | "offset" | "stride" | "length", number>,
  ) =>
    Float32Array.from(
      { length: count * length },
      (_, i) => from[offset + Math.floor(i / length) * stride + i % length]!,
    );
  const xs = take(x, { count: M, offset: 8, stride: K + 8, length: K });
  // The offset of x reaches into the next row: the last row needs 8 more.
  const padded = new Float32Array(x.length + 8);
  padded.set(x);
  for (let m = 0; m < M; m++) for (let k = 0; k < K; k++) xs[m * K + k] = padded[8 + m * (K + 8) + k]!;
  const expected = matmulNT(xs, take(w.values, { count: N, offset: 8, stride: K + 16, length: K }), { M, N, K });
  for (let m = 0; m < M; m++) {
    for (let n = 0, first = 0, at = 0; n < N; n++) {
      const segment = ends.findIndex((end) => n < end), part = parts[segment];
      if (n === ends[segment - 1]) [first, at] = [n, part === undefined ? at : (N - 24) * r];
      if (part !== undefined) {
        for (let i = 0; i < r; i++) expected[m * N + n]! += u[m * 2 * r + part * r + i]! * b[at + (n - first) * r + i]!;
      }
      expected[m * N + n] = scale * expected[m * N + n]! + add[m * N + n]!;
    }
  }
  const segments = [
    { columns: N - 24, r, x: 0, w: 0 },
    { columns: 16, r: 0, x: 0, w: 0 },
    { columns: 8, r, x: r, w: (N - 24) * r },
  ];
  return {
    expected,
    product: {
      rows: rows(M),
      x: { tensor: await input("x", padded), offset: 8, stride: K + 8 },
      w: { tensor: await input("w", w.bytes, { dtype }), offset: 8, stride: K + 16 },
      n: N,
      k: K,
      scale,
      lora: { x: { tensor: await input("u", u), stride: 2 * r }, w: await input("b", b), segments },
      plus: await input("add", add),
    },
  };
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  gpuTest(`matvec.nt gives scale · (x · wᵀ + the adapter's) + add in ${dtype}`, async (bench) => {
    for (const M of dtype === "f32" ? [1, 2, 3, 4, 8, 9, 17] : [1, 3]) {
      const block = rowBlock(bench.gpu, M), op = createMatvec(bench.gpu, { block });
      for (const [N, K] of M === 3 ? [[32, 8], [200, 264], [1032, 96]] : [[200, 264]]) {
        const { product, expected } = await prepare(bench, M, { N: N!, K: K!, dtype });
        const out = bench.output("out", { shape: [M, N!] });
        const [found] = await bench.compute([op.nt({ ...product, out: { tensor: out } })], [out]);
        assertClose(found!, expected, { nmse: BOUND, name: `[${M}, ${N}, ${K}]` });
      }
    }
  });
}

gpuTest("matvec.nt gives a row the same bits in any block, and adds to out", async (bench) => {
  const { product } = await prepare(bench, 9, { N: 64, K: 200, dtype: "f32" });
  const start = wave(9 * 72, 5), bits: Uint32Array[] = [];
  for (const block of [1, 2, 4, 8]) {
    const out = bench.output("out", { shape: [9, 72], start });
    const op = createMatvec(bench.gpu, { block });
    const at = { tensor: out, offset: 8, stride: 72 };
    const plain = bench.output("plain", { shape: [9, 64] });
    const commands = [
      op.nt({ ...product, plus: undefined, out: { tensor: plain } }),
      op.nt({ ...product, plus: "out", out: at, rows: bench.rows(8) }),
    ];
    const [alone, added] = await bench.compute(commands, [plain, out]);
    bits.push(new Uint32Array(alone!.buffer));
    for (let i = 0; i < 9 * 72; i++) {
      const [row, column] = [Math.floor((i - 8) / 72), (i - 8 + 72) % 72];
      const inside = i >= 8 && row < 8 && column < 64;
      const expected = inside ? Math.fround(alone![row * 64 + column]! + start[i]!) : start[i]!;
      assertEquals(added![i], expected, `element ${i}`);
    }
  }
  for (const other of bits) assertEquals(other, bits[0]);
});

gpuTest("matvec.nt refuses sizes and types that it cannot read", async ({ gpu, input, output, rows }) => {
  const x = { tensor: await input("x", wave(16), { shape: [1, 16] }) },
    out = { tensor: output("out", { shape: [1, 8] }) };
  const op = createMatvec(gpu, { block: 1 });
  const w = { tensor: await input("w", wave(8 * 16), { shape: [8, 16] }) };
  assertThrows(
    () => op.nt({ rows: rows(1), x, w, out, n: 6, k: 16 }),
    RangeError,
    'Cannot multiply "out" = nt("x", "w")',
  );
  assertThrows(() => op.nt({ rows: rows(1), x, w, out, n: 8, k: 12 }), RangeError, "k 12 of 8");
  const codes = { tensor: await input("codes", new Uint8Array(64), { dtype: "u8" }) };
  assertThrows(() => op.nt({ rows: rows(1), x, w: codes, out, n: 8, k: 16 }), TypeError, "weights are u8");
});
