/**
 * Matrix products against the CPU reference, of the kernels for CPU drivers (matmul_subgroup) and of those for GPUs (matmul_tiled,
 * matmul_narrow): ends of tiles, weights of 16 bits, operands inside larger tensors, low-rank segments, sums with what is there.
 * The errors found (NMSE) are beside the bounds.
 *
 * No invocation comes near the 65,535 iterations after which lavapipe ends all loops of an invocation without a word: an iteration
 * takes 8 inner steps, so that would need an inner length of 524,280, and the longest is the padded vocabulary (50,304 in nn).
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { chooseTile, createMatmul, type Matmul, type Tile, tilesOf } from "../../lib/ops/matmul.ts";
import type { LoraOperands, Product } from "../../lib/ops/matmul_operands.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest, stored } from "../on_gpu.ts";
import { addTo, matmulNN, matmulNT, matmulTN } from "../reference.ts";

/** 8e-14 where up to 272 products are one sum, 9e-13 where 2,752 are. */
const bound = (K: number) => K > 1000 ? 9e-11 : 8e-12;
/** 1.0e-12, where 2,752 products are one sum. */
const TILED_BOUND = 1e-11;
const SMALL = { BM: 64, BN: 64, BK: 32 }, LARGE = { BM: 128, BN: 128, BK: 16 };

type Dtype = "f32" | "f16" | "bf16";
type Entry = "nt" | "nn" | "tn";

interface Case {
  /** Rows and columns of the result, and the length of the sums. */
  readonly size: readonly [number, number, number];
  readonly w?: Dtype;
  readonly plus?: "tensor" | "out";
  readonly scale?: number;
  /** Elements before each operand, and after each of its rows. */
  readonly gap?: readonly [number, number];
  /** Ranks of the segments, and their columns. */
  readonly ranks?: readonly number[];
  readonly columns?: readonly number[];
}

/** Where a matrix lies in a buffer of other numbers, and how it is put there. */
function placeOf(rows: number, columns: number, [before, after]: readonly [number, number]) {
  const offset = before, stride = columns + after;
  const put = (values: ArrayLike<number>, into: Float32Array<ArrayBuffer>) => {
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) into[offset + r * stride + c] = values[r * columns + c]!;
    }
    return into;
  };
  return { offset, stride, length: offset + rows * stride, put };
}

/** Low-rank operands with columns of x and a row of w that belong to nobody, and what they add to the product. */
async function lowRank({ input }: Bench, entry: Entry, { size: [M, N], ranks = [], columns = [N] }: Case) {
  const wide = ranks.reduce((a, b) => a + b, 8), sum = new Float64Array(M * N);
  const lx = wave(M * wide, 6), parts: Float32Array[] = [wave(8, 9)], segments: LoraOperands["segments"][number][] = [];
  let start = 0, x = 8, w = 8;
  ranks.forEach((r, i) => {
    const n = columns[i]!, part = wave(n * r, 7 + i);
    const mine = Float32Array.from({ length: M * r }, (_, at) => lx[Math.floor(at / r) * wide + x + at % r]!);
    const product = (entry === "nt" ? matmulNT : matmulNN)(mine, part, { M, N: n, K: r });
    product.forEach((value, at) => sum[Math.floor(at / n) * N + start + at % n] = value);
    segments.push({ columns: n, r, x, w });
    parts.push(part);
    start += n;
    x += r;
    w += n * r;
  });
  const all = new Float32Array(w);
  parts.reduce((at, part) => (all.set(part, at), at + part.length), 0);
  const operands = {
    x: { tensor: await input("lora_x", lx, { shape: [M, wide] }) },
    w: await input("lora_w", all),
    segments,
  };
  return { operands, sum };
}

/** Runs one product and compares its result, and what lies around it in the same tensor. */
async function check(
  bench: Bench,
  { matmul, entry, of, nmse = bound(of.size[2]), tile }: {
    matmul: Matmul;
    entry: Entry;
    of: Case;
    nmse?: number;
    tile?: unknown;
  },
): Promise<void> {
  const { size: [M, N, K], w: dtype = "f32", plus, scale = 1, gap = [0, 0], ranks } = of;
  const name = `${entry} ${JSON.stringify(of)}${tile === undefined ? "" : ` by ${JSON.stringify(tile)}`}`;
  const place = { x: entry === "tn" ? placeOf(K, M, gap) : placeOf(M, K, gap), out: placeOf(M, N, gap) };
  const wPlace = entry === "nt" ? placeOf(N, K, gap) : placeOf(K, N, gap);
  const x = wave(M * K), w = stored(wave(N * K, 1), dtype).values;
  const operand = async (
    as: string,
    { at, values, dtype }: { at: ReturnType<typeof placeOf>; values: Float32Array; dtype: Dtype },
  ) => ({
    tensor: await bench.input(as, stored(at.put(values, wave(at.length, 5)), dtype).bytes, { dtype }),
    offset: at.offset,
    stride: at.stride,
  });
  const products = { nt: matmulNT, nn: matmulNN, tn: matmulTN };
  const sums = products[entry](x, w, { M, N, K, T: K });
  const lora = ranks && await lowRank(bench, entry, of);
  if (lora) addTo(sums, lora.sum);

  const start = wave(place.out.length, 3), addend = wave(place.out.length, 4);
  const out = bench.output("out", { shape: [place.out.length], start });
  const product: Product = {
    rows: bench.rows(entry === "tn" ? K : M),
    x: await operand("x", { at: place.x, values: x, dtype: "f32" }),
    w: await operand("w", { at: wPlace, values: w, dtype }),
    out: { tensor: out, offset: place.out.offset, stride: place.out.stride },
    n: N,
    ...(entry === "tn" ? { m: M } : { k: K }),
    scale,
    lora: lora?.operands,
    plus: plus === "tensor" ? await bench.input("add", addend) : plus,
  };
  const [found] = await bench.compute([matmul[entry](product)], [out]);
  const old = plus === "out" ? start : plus === "tensor" ? addend : new Float32Array(start.length);
  const expected = Float64Array.from({ length: M * N }, (_, i) => {
    const at = place.out.offset + Math.floor(i / N) * place.out.stride + i % N;
    return Math.fround(scale) * sums[i]! + old[at]!;
  });
  const result = expected.map((_, i) => found![place.out.offset + Math.floor(i / N) * place.out.stride + i % N]!);
  assertClose(result, expected, { nmse, name });
  const zeros = new Float32Array(M * N);
  assertEquals(place.out.put(zeros, found!), place.out.put(zeros, start.slice()), `${name} writes around its result`);
}

const ROWS = [1, 31, 32, 33, 257];
const DTYPES: readonly Dtype[] = ["f32", "f16", "bf16"];
const GAP = [8, 16] as const;

const CASES: Record<Entry, readonly Case[]> = {
  nt: [
    ...ROWS.flatMap((M) => DTYPES.map((w): Case => ({ size: [M, 40, 72], w }))),
    ...DTYPES.map((w): Case => ({ size: [33, 64, 2752], w })),
    ...DTYPES.map((w): Case => ({ size: [33, 40, 24], w, gap: GAP, plus: "out", scale: 0.37 })),
    { size: [1, 8, 8] },
    { size: [40, 136, 64], plus: "tensor", gap: GAP },
    { size: [33, 40, 8], ranks: [8], columns: [40], gap: GAP },
    { size: [129, 48, 40], plus: "out" },
    { size: [64, 16, 72], w: "bf16" },
    { size: [31, 72, 64], ranks: [16, 16], columns: [40, 32], w: "f16" },
    { size: [70, 72, 64], ranks: [16, 16], columns: [40, 32], w: "bf16", plus: "out", gap: GAP },
    { size: [97, 80, 24], ranks: [0, 8, 8], columns: [40, 16, 24], plus: "tensor" },
    { size: [129, 8, 40], ranks: [8], columns: [8], w: "f16", plus: "out", gap: GAP },
    { size: [65, 104, 64], ranks: [0, 8, 8], columns: [40, 40, 24], w: "bf16", scale: 2, plus: "out" },
    { size: [32, 104, 64], ranks: [16, 0, 16], columns: [40, 40, 24], w: "f16", scale: -0.5, plus: "tensor" },
    { size: [5, 104, 16], ranks: [8, 8, 0], columns: [40, 24, 40] },
  ],
  nn: [
    ...ROWS.flatMap((M) => DTYPES.map((w): Case => ({ size: [M, 40, 72], w }))),
    ...DTYPES.map((w): Case => ({ size: [33, 64, 2752], w })),
    ...DTYPES.map((w): Case => ({ size: [33, 40, 24], w, gap: GAP, plus: "out", scale: 0.37 })),
    { size: [1, 8, 8] },
    { size: [40, 136, 64], plus: "tensor", gap: GAP },
    { size: [33, 40, 8], ranks: [8], columns: [40], gap: GAP },
    { size: [129, 48, 40], plus: "out" },
    { size: [64, 16, 72], w: "bf16" },
    { size: [65, 72, 64], ranks: [48], columns: [72], w: "f16", scale: 2, plus: "out" },
    { size: [129, 8, 40], ranks: [8], columns: [8], w: "f16", plus: "out", gap: GAP },
    { size: [31, 136, 64], ranks: [16], columns: [136], w: "bf16", plus: "tensor" },
    { size: [70, 136, 264], ranks: [8], columns: [136], plus: "out", gap: GAP },
    { size: [200, 16, 264], w: "f16" },
  ],
  tn: [
    ...ROWS.flatMap((K) => DTYPES.slice(0, 2).map((w): Case => ({ size: [40, 40, K], w }))),
    ...DTYPES.slice(0, 2).map((w): Case => ({ size: [40, 8, 33], w, gap: GAP, plus: "out", scale: 0.37 })),
    { size: [8, 8, 1] },
    { size: [200, 136, 2752], plus: "out" },
    { size: [48, 64, 33], gap: GAP },
    { size: [16, 136, 70], plus: "out", w: "f16" },
    { size: [136, 16, 65] },
    { size: [136, 8, 65], plus: "out", gap: GAP },
    { size: [64, 96, 5], plus: "tensor" },
  ],
};

for (const entry of ["nt", "nn", "tn"] as const) {
  gpuTest(`matmul_subgroup.${entry} agrees with the reference`, async (bench) => {
    const matmul = createMatmul(bench.gpu);
    for (const of of CASES[entry]) await check(bench, { matmul, entry, of });
  }, { models: ["subgroup"] });
}

const TILED_CASES: Record<Entry, readonly Case[]> = {
  nt: [
    { size: [1, 48, 8] },
    { size: [33, 16, 2752], w: "bf16" },
    { size: [257, 8, 72], plus: "out" },
    {
      size: [130, 272, 104],
      w: "f16",
      ranks: [16, 0, 16],
      columns: [136, 68, 68],
      plus: "tensor",
      scale: 0.37,
      gap: GAP,
    },
    { size: [65, 1008, 24], w: "f16", ranks: [8], columns: [1008], gap: GAP },
  ],
  nn: [
    { size: [1, 48, 8] },
    { size: [33, 16, 2752] },
    { size: [257, 148, 136], w: "f16", ranks: [48], columns: [148], plus: "out", scale: 2, gap: GAP },
  ],
  tn: [
    { size: [8, 48, 1] },
    { size: [16, 1008, 257], scale: 0.5 },
    { size: [276, 140, 33], plus: "out", gap: GAP },
  ],
};

/** Runs one product by the kernel of a given tile. */
function checkTile(bench: Bench, tile: Tile, { entry, of }: { entry: Entry; of: Case }): Promise<void> {
  return check(bench, { matmul: createMatmul(bench.gpu, () => tile), entry, of, nmse: TILED_BOUND, tile });
}

for (const entry of ["nt", "nn", "tn"] as const) {
  gpuTest(`matmul_narrow.${entry} and matmul_tiled.${entry} agree with the reference`, async (bench) => {
    for (const tile of ["narrow", SMALL, LARGE] as const) {
      for (const of of TILED_CASES[entry]) await checkTile(bench, tile, { entry, of });
    }
  }, { models: false });
}

gpuTest("createMatmul() refuses what its kernels cannot load", async ({ gpu, input, output, rows }) => {
  const matmul = createMatmul(gpu);
  const x = { tensor: await input("x", wave(64), { shape: [8, 8] }) };
  const out = { tensor: output("y", { shape: [8, 8] }) }, product = { rows: rows(8), x, w: x, out, n: 8, k: 8, m: 8 };
  for (const entry of ["nt", "nn", "tn"] as const) {
    assertThrows(
      () => matmul[entry]({ ...product, n: 6 }),
      RangeError,
      `Cannot multiply "y" = ${entry}("x", "x"): n 6 and m 8 must be multiples of 8`,
    );
  }
}, { models: ["subgroup"] });

gpuTest(
  "matmul_tiled computes the same with every size of tilesOf(), in bands of rows, and from bf16 in every form",
  async (bench) => {
    await checkTile(bench, { ...SMALL, BAND: 3 }, { entry: "nt", of: { size: [460, 136, 8] } });
    const of: Case = { size: [300, 136, 56], w: "bf16" };
    for (const tile of tilesOf(bench.gpu).filter(({ BAND }) => BAND === undefined)) {
      for (const entry of ["nt", "nn", "tn"] as const) await checkTile(bench, tile, { entry, of });
    }
  },
  { models: false },
);

Deno.test("chooseTile() keeps to tiles that matmul_tiled.wgsl can load and that WebGPU's 16 KB hold", () => {
  for (const rows of [1, 16, 64, 65, 257, 1024, 4096, 32_768]) {
    for (const columns of [8, 16, 48, 64, 132, 1008, 1024, 2048, 5504, 50_304]) {
      assertEquals(chooseTile("tn", rows, columns) === "narrow", Math.min(rows, columns) <= 64);
      const tile = chooseTile("nt", rows, columns);
      assertEquals(chooseTile("nn", rows, columns), tile);
      // The number of tokens never decides, so that their bits do not depend on it.
      assertEquals(tile === "narrow", columns <= 64);
      if (tile === "narrow") continue;
      const { BM, BN, BK } = tile;
      assertEquals([BM * BK % 2048, BN * BK % 2048], [0, 0], `[${rows}, ${columns}] gives ${JSON.stringify(tile)}`);
      assert((BM + BN) * BK * 4 <= 16_384, `[${rows}, ${columns}] gives ${JSON.stringify(tile)}`);
    }
  }
});
