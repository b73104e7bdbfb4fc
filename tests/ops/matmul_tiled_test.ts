/**
 * matmul_tiled.wgsl and matmul_narrow.wgsl, the products for GPUs, against the CPU reference: ends of tiles, weights of
 * 16 bits, low-rank segments, offsets and strides. The bound is ten times the worst error found (NMSE 1.0e-12, where 2,752
 * products are one sum).
 */
import { assert, assertEquals } from "@std/assert";
import type { Tensor } from "../../lib/gpu/tensor.ts";
import { chooseTile, createMatmul, type Tile, tilesOf } from "../../lib/ops/matmul.ts";
import type { LoraOperands } from "../../lib/ops/matmul_operands.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest, stored } from "../on_gpu.ts";
import { matmulNN, matmulNT, matmulTN } from "../reference.ts";

const BOUND = 1e-11;
const SMALL = { BM: 64, BN: 64, BK: 32 }, LARGE = { BM: 128, BN: 128, BK: 16 };

interface Case {
  /** Rows of the result, and its columns; the inner length. */
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly w?: "f16" | "bf16";
  /** Rank of each segment, 0 for none; segments take halves, or a half and two quarters, of the columns. */
  readonly ranks?: readonly number[];
  readonly plus?: "add" | "out";
  readonly scale?: number;
  /** Operands lie inside larger tensors. */
  readonly inside?: boolean;
}

/** The values of a matrix, put at `offset` into rows `stride` apart with other numbers around them. */
function placed(values: Float32Array, { rows, columns, inside }: { rows: number; columns: number; inside: boolean }) {
  const offset = inside ? 8 : 0, stride = columns + (inside ? 16 : 0);
  const all = wave(offset + rows * stride, 5);
  const each = (place: (at: number, from: number) => void) => {
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) place(offset + r * stride + c, r * columns + c);
  };
  each((at, from) => all[at] = values[from]!);
  return { offset, stride, all, each };
}

/** Runs one product and compares every number of the result's tensor, those around the result included. */
async function check(bench: Bench, op: "nt" | "nn" | "tn", { tile, of }: { tile: Tile; of: Case }): Promise<void> {
  const { M, N, K, w: dtype = "f32", ranks = [], plus, scale = 1, inside = false } = of;
  const name = `${op} [${M}, ${N}, ${K}] ${dtype} ${JSON.stringify(tile)}`;
  const operand = async (as: string, rows: number, { columns, phase, dtype = "f32" as "f32" | "f16" | "bf16" }: {
    columns: number;
    phase: number;
    dtype?: "f32" | "f16" | "bf16";
  }) => {
    const { values } = stored(wave(rows * columns, phase), dtype);
    const { all, offset, stride } = placed(values, { rows, columns, inside });
    const { bytes } = stored(all, dtype);
    return { values, tensor: await bench.input(as, bytes, { shape: [all.length], dtype }), offset, stride };
  };
  const x = await operand("x", op === "tn" ? K : M, { columns: op === "tn" ? M : K, phase: 0 });
  const w = await operand("w", op === "nt" ? N : K, { columns: op === "nt" ? K : N, phase: 1, dtype });
  const product = op === "nt" ? matmulNT : matmulNN;
  const shape = { M, N, K };
  const sums = op === "tn" ? matmulTN(x.values, w.values, { T: K, M, N }) : product(x.values, w.values, shape);
  const lora = ranks.length ? await addLora(bench, { op, shape, ranks, sums }) : undefined;

  const { all, offset, stride, each } = placed(wave(M * N, 3), { rows: M, columns: N, inside });
  const start = padded(all, stride);
  const out = bench.output("out", { shape: [start.length / stride, stride], start });
  const expected = Float64Array.from(start);
  const addend = placed(wave(M * N, 4), { rows: M, columns: N, inside }).all;
  each((at, from) => {
    const old = plus === "out" ? all[at]! : plus === "add" ? addend[at]! : 0;
    expected[at] = Math.fround(scale) * sums[from]! + old;
  });
  const add: Tensor | undefined = plus === "add" ? await bench.input("add", padded(addend, stride)) : undefined;
  const matmul = createMatmul(bench.gpu, () => tile);
  const command = matmul[op]({
    rows: bench.rows(op === "tn" ? K : M),
    x,
    w,
    out: { tensor: out, offset, stride },
    n: N,
    ...(op === "tn" ? { m: M } : { k: K }),
    scale,
    lora,
    plus: plus === "out" ? "out" : add,
  });
  const [found] = await bench.compute([command], [out]);
  const untouched = expected.slice(), before = Float64Array.from(found!);
  each((at) => untouched[at] = before[at] = 0);
  assertEquals(before, untouched, `${name} writes outside of the result`);
  assertClose(found!, expected, { nmse: BOUND, name });
}

/** Fills up to whole rows, so that the tensor has a shape. */
function padded(values: Float32Array<ArrayBuffer>, stride: number): Float32Array<ArrayBuffer> {
  const whole = new Float32Array(Math.ceil(values.length / stride) * stride);
  whole.set(values);
  return whole;
}

/** Makes the low-rank operands and adds their product to `sums`. */
async function addLora(
  bench: Bench,
  { op, shape: { M, N }, ranks, sums }: {
    op: string;
    shape: { M: number; N: number };
    ranks: readonly number[];
    sums: Float64Array;
  },
): Promise<LoraOperands> {
  const columns = ranks.map((_, i) => i > 0 && ranks.length === 3 ? N / 4 : N / Math.min(ranks.length, 2));
  const wide = ranks.reduce((a, b) => a + b) + 4; // columns of lora_x, four of which belong to nobody
  const segments = ranks.map((r, i) => ({
    columns: columns[i]!,
    r,
    x: ranks.slice(0, i).reduce((a, b) => a + b, 0),
    w: 8 + ranks.slice(0, i).reduce((a, b, j) => a + b * columns[j]!, 0),
  }));
  const { w: last, columns: lastColumns, r } = segments.at(-1)!;
  const x = wave(M * wide, 6), w = wave(last + lastColumns * r, 7);
  let start = 0;
  for (const segment of segments) {
    for (let i = 0; i < M; i++) {
      for (let j = 0; j < segment.columns; j++) {
        for (let q = 0; q < segment.r; q++) {
          const b = op === "nt" ? j * segment.r + q : q * N + j;
          sums[i * N + start + j]! += x[i * wide + segment.x + q]! * w[segment.w + b]!;
        }
      }
    }
    start += segment.columns;
  }
  const tensors = { x: await bench.input("lora_x", x, { shape: [M, wide] }), w: await bench.input("lora_w", w) };
  return { x: { tensor: tensors.x }, w: tensors.w, segments };
}

const NT: Case[] = [
  { M: 1, N: 48, K: 8 },
  { M: 33, N: 16, K: 2752, w: "bf16" },
  { M: 257, N: 8, K: 72, plus: "out" },
  { M: 130, N: 272, K: 104, w: "f16", ranks: [16, 0, 16], plus: "add", scale: 0.37, inside: true },
  { M: 65, N: 1008, K: 24, w: "f16", ranks: [8], inside: true },
];
const NN: Case[] = [
  { M: 1, N: 48, K: 8 },
  { M: 33, N: 16, K: 2752 },
  { M: 257, N: 148, K: 136, w: "f16", ranks: [48], plus: "out", scale: 2, inside: true },
];
const TN: Case[] = [
  { M: 8, N: 48, K: 1 },
  { M: 16, N: 1008, K: 257, scale: 0.5 },
  { M: 276, N: 140, K: 33, plus: "out", inside: true },
];

for (const [op, cases] of [["nt", NT], ["nn", NN], ["tn", TN]] as const) {
  gpuTest(`matmul_narrow.${op} and matmul_tiled.${op} agree with the reference`, async (bench) => {
    for (const tile of ["narrow", SMALL, LARGE] as const) for (const of of cases) await check(bench, op, { tile, of });
  }, { models: false });
}

gpuTest(
  "matmul_tiled computes the same with every size of tilesOf(), in bands of rows, and from bf16 in every form",
  async (bench) => {
    await check(bench, "nt", { tile: { ...SMALL, BAND: 3 }, of: { M: 460, N: 136, K: 8 } });
    const of: Case = { M: 300, N: 136, K: 56, w: "bf16" };
    for (const tile of tilesOf(bench.gpu).filter(({ BAND }) => BAND === undefined)) {
      for (const op of ["nt", "nn", "tn"] as const) await check(bench, op, { tile, of });
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
