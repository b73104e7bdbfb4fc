/**
 * The matrix products at the blog's sizes (hidden 1,024, 16 and 8 heads of 64, MLP 2,752, vocabulary 50,257), each with
 * sampled entries of its result checked first. Sizes are written rows x columns x inner length.
 */
import type { Gpu } from "../../lib/gpu/device.ts";
import { createMatmul, type Matmul, type Tile, tileName } from "../../lib/ops/matmul.ts";
import type { LoraOperands, Product } from "../../lib/ops/matmul_operands.ts";
import { matmulNT } from "../reference.ts";
import { agree, type Case, type Random, readFloats } from "./measure.ts";

/** One product; `rank` adds a low-rank term of that many inner columns per segment of the result. */
export interface ProductCase {
  readonly op: "nt" | "nn" | "tn";
  readonly name: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly w?: "f32" | "f16" | "bf16";
  readonly rank?: number;
  /** Segments of the result with a low-rank term each, in columns. */
  readonly segments?: readonly number[];
}

const C = 1024, QKV = 2048, F = 2752, V = 50_304, R = 16;

/** The products of one layer and the head for `tokens` rows, `chunk` of them at a time in the head. */
export function products({ tokens: T, chunk }: { tokens: number; chunk: number }): ProductCase[] {
  const frozen = "f16";
  return [
    { op: "nt", name: "qkv", M: T, N: QKV, K: C, w: frozen },
    { op: "nt", name: "qkv + LoRA", M: T, N: QKV, K: C, w: frozen, rank: R, segments: [C, C / 2, C / 2] },
    { op: "nt", name: "o", M: T, N: C, K: C, w: frozen },
    { op: "nt", name: "gate_up", M: T, N: 2 * F, K: C, w: frozen },
    { op: "nt", name: "gate_up f32", M: T, N: 2 * F, K: C },
    { op: "nt", name: "gate_up + LoRA", M: T, N: 2 * F, K: C, w: frozen, rank: R, segments: [F, F] },
    { op: "nt", name: "down", M: T, N: C, K: F, w: frozen },
    { op: "nn", name: "dx of qkv", M: T, N: C, K: QKV, w: frozen },
    { op: "nn", name: "dx of gate_up", M: T, N: C, K: 2 * F, w: frozen },
    { op: "nn", name: "dx of gate_up + LoRA", M: T, N: C, K: 2 * F, w: frozen, rank: 2 * R, segments: [C] },
    { op: "nn", name: "dx of down", M: T, N: F, K: C, w: frozen },
    { op: "nn", name: "dx of down f32", M: T, N: F, K: C },
    { op: "tn", name: "dW of qkv", M: QKV, N: C, K: T },
    { op: "tn", name: "dW of gate_up", M: 2 * F, N: C, K: T },
    { op: "nt", name: "LoRA u = x A'", M: T, N: 3 * R, K: C },
    { op: "nn", name: "LoRA v = dy B", M: T, N: R, K: F },
    { op: "tn", name: "LoRA dA", M: 2 * R, N: C, K: T },
    { op: "tn", name: "LoRA dB", M: F, N: R, K: T },
    { op: "nt", name: "head", M: chunk, N: V, K: C, w: frozen },
    { op: "nn", name: "dx of head", M: chunk, N: C, K: V, w: frozen },
  ];
}

/** The size that CPU drivers are compared by, in each type of weights. */
export const CPU_TARGET: readonly ProductCase[] = (["f32", "f16", "bf16"] as const).flatMap((w) =>
  (["nt", "nn"] as const).map((op) => ({ op, name: `target ${w}`, M: 512, N: 1024, K: 1024, w }))
);

/** Makes cases of products; a `tile` is used instead of the device's own choice. */
export function productCases(gpu: Gpu): (of: ProductCase, tile?: Tile) => Case {
  const known = new Map<string, Matmul>();
  return (of, tile) => {
    const key = tile === undefined ? "" : tileName(tile);
    const matmul = known.get(key) ?? createMatmul(gpu, ...(tile === undefined ? [] : [() => tile]));
    known.set(key, matmul);
    return productCase(matmul, of, tile);
  };
}

function productCase(matmul: Matmul, of: ProductCase, tile: Tile | undefined): Case {
  const { op, name, M, N, K, w: dtype = "f32", rank = 0, segments = [] } = of;
  return {
    name: `matmul.${op} ${name}`,
    shape: `${M} x ${N} x ${K}`,
    dtype: `f32 x ${dtype}`,
    ...(tile === undefined ? {} : { tile: tileName(tile) }),
    work: { flop: 2 * M * N * (K + rank) },
    async prepare({ gpu, random, output, rows }) {
      const x = await random("x", op === "tn" ? [K, M] : [M, K]);
      const w = await random("w", op === "nt" ? [N, K] : [K, N], { dtype, spread: 0.05, mean: 0.01, seed: 2 });
      const out = output("out", [M, N]);
      const u = rank ? await random("lora_x", [M, rank * segments.length], { seed: 3 }) : undefined;
      const b = rank
        ? await random("lora_w", op === "nt" ? [N, rank] : [rank, N], { spread: 0.05, seed: 4 })
        : undefined;
      const product: Product = {
        rows: rows(op === "tn" ? K : M),
        x,
        w,
        out: { tensor: out },
        n: N,
        ...(op === "tn" ? { m: M } : { k: K }),
        lora: u && b && lora({ u, b, rank, segments }),
      };
      const check = async () => {
        const found: number[] = [], expected: number[] = [];
        for (const row of [0, M >> 1, M - 1]) {
          const values = await readFloats(gpu, out, [row * N, (row + 1) * N]);
          for (let column = row % 7; column < N; column += Math.max(1, Math.floor(N / 13))) {
            found.push(values[column]!);
            expected.push(
              entry({ op, x, w, M, N, K }, row, column) + lowRank({ op, u, b, rank, segments, N }, row, column),
            );
          }
        }
        agree(`matmul.${op} ${name} ${tile ? tileName(tile) : ""}`, found, expected);
      };
      return { commands: [matmul[op](product)], check };
    },
  };
}

function lora(
  { u, b, rank, segments }: { u: Random; b: Random; rank: number; segments: readonly number[] },
): LoraOperands {
  let first = 0;
  return {
    x: u,
    w: b.tensor,
    segments: segments.map((columns, i) => {
      const segment = { columns, r: rank, x: i * rank, w: first * rank };
      first += columns;
      return segment;
    }),
  };
}

/** One entry of the product, by the reference. */
function entry(
  { op, x, w, M, N, K }: { op: string; x: Random; w: Random; M: number; N: number; K: number },
  row: number,
  column: number,
): number {
  const a = Float64Array.from({ length: K }, (_, k) => x.at(op === "tn" ? k * M + row : row * K + k));
  const b = Float64Array.from({ length: K }, (_, k) => w.at(op === "nt" ? column * K + k : k * N + column));
  return matmulNT(a, b, { M: 1, N: 1, K })[0]!;
}

function lowRank(
  { op, u, b, rank, segments, N }: {
    op: string;
    u: Random | undefined;
    b: Random | undefined;
    rank: number;
    segments: readonly number[];
    N: number;
  },
  row: number,
  column: number,
): number {
  if (!u || !b) return 0;
  let segment = 0;
  for (let end = segments[0]!; column >= end; end += segments[segment]!) segment++;
  const a = Float64Array.from({ length: rank }, (_, r) => u.at((row * segments.length + segment) * rank + r));
  const c = Float64Array.from({ length: rank }, (_, r) => b.at(op === "nt" ? column * rank + r : r * N + column));
  return matmulNT(a, c, { M: 1, N: 1, K: rank })[0]!;
}
