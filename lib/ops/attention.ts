/** Binding of attention.wgsl, and what it is told of documents that share a row. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, type Grid, Kernel, type Rows } from "../gpu/kernel.ts";
import type { Tensor } from "../gpu/tensor.ts";
import source from "../../kernels/attention.wgsl" with { type: "text" };
import partsSource from "../../kernels/attention_parts.wgsl" with { type: "text" };

/** Lanes of a workgroup on a GPU: two warps share a tile. */
const GPU_LANES = 64;

/** Rows that are sorted together, a multiple of those of any workgroup. */
const BLOCK = 128;

/** Which rows see each other: what {@linkcode documentsOf} says of them. */
export interface Documents {
  /** u32 `[rows, 2]` */
  readonly spans: Tensor;
  /** u32 `[blocks, 2]` */
  readonly order: Tensor;
}

/** Blocks of `rows` rows that have a place in `order`. */
export function blocksOf(rows: number): number {
  return Math.ceil(rows / BLOCK);
}

/**
 * What attention is told of rows at these positions in their documents. `spans` `[rows, 2]`: the first row of each row's document,
 * and the one after its last; `order` `[blocks, 2]`: where there is most to do first, as queries and as keys.
 */
export function documentsOf(positions: Uint32Array): Record<keyof Documents, Uint32Array<ArrayBuffer>> {
  const count = positions.length, spans = new Uint32Array(2 * count), blocks = blocksOf(count);
  const keys = new Float64Array(blocks), queries = new Float64Array(blocks);
  for (let start = 0, end = 1; end <= count; end++) {
    if (end < count && positions[end] === positions[end - 1]! + 1) continue;
    for (let row = start; row < end; row++) {
      spans[2 * row] = start;
      spans[2 * row + 1] = end;
      keys[Math.floor(row / BLOCK)]! += row + 1 - start;
      queries[Math.floor(row / BLOCK)]! += end - row;
    }
    start = end;
  }
  const most = (work: Float64Array) => Array.from(work.keys()).sort((a, b) => work[b]! - work[a]!);
  const first = most(keys), second = most(queries);
  return { spans, order: Uint32Array.from({ length: 2 * blocks }, (_, i) => (i % 2 ? second : first)[i >> 1]!) };
}

/** Causal grouped-query attention inside documents (arXiv:2205.14135). `headDim` is a multiple of 8, at most 128. */
export function createAttention(gpu: Gpu, shape: { heads: number; kvHeads: number; headDim: number }) {
  const { heads, kvHeads, headDim } = shape;
  if (headDim % 8 || headDim > 128) {
    throw new RangeError(`Cannot attend with heads of ${headDim} columns: a multiple of 8 up to 128 is wanted`);
  }
  const kernel = new Kernel(gpu, "attention", `${source}\n${partsSource}`);
  const subgroup = gpu.lanes === "subgroup", lanes = subgroup ? gpu.subgroup : GPU_LANES, columns = headDim / 4;
  /** Constants of an entry point, and its grid. A CPU driver gives each of its threads as many heads as the others. */
  const formOf = (entry: Entry, rows: Rows) => {
    const shape = subgroup ? cpuShape(lanes, columns, entry) : gpuShape(gpu, columns, entry);
    const high = shape.ROWS * lanes / shape.PARTS, wide = entry === "backward_kv" ? kvHeads : heads;
    const grid = (): Grid =>
      subgroup ? [Math.ceil(rows.count / high), wide, 1] : [wide, Math.ceil(rows.count / BLOCK) * (BLOCK / high), 1];
    const constants = { LANES: lanes, HEADS: heads, KV_HEADS: kvHeads, D4: columns, ...shape };
    return { constants: { ...constants, LONGEST_FIRST: subgroup ? 0 : 1 }, grid };
  };
  return {
    /** qkv `[rows, (H+2·KV)·D]` after rope; writes out `[rows, H·D]` and lse `[rows, H]`. */
    forward: (t: { rows: Rows; documents: Documents; qkv: Tensor; out: Tensor; lse: Tensor }): Dispatch =>
      kernel.record("forward", {
        bind: { rows: t.rows.buffer, ...t.documents, qkv: t.qkv, out: t.out, lse: t.lse },
        ...formOf("forward", t.rows),
      }),
    /** Writes dqkv `[rows, (H+2·KV)·D]` in two dispatches; delta `[rows, H]` is scratch. */
    backward: (
      t: {
        rows: Rows;
        documents: Documents;
        qkv: Tensor;
        out: Tensor;
        lse: Tensor;
        dout: Tensor;
        delta: Tensor;
        dqkv: Tensor;
      },
    ): Dispatch[] => {
      const { rows, documents, qkv, out, lse, dout, delta, dqkv } = t;
      const bind = { rows: rows.buffer, ...documents, qkv, given_lse: lse, dout, dqkv };
      return [
        kernel.record("backward_q", { bind: { ...bind, given_out: out, delta }, ...formOf("backward_q", rows) }),
        kernel.record("backward_kv", { bind: { ...bind, given_delta: delta }, ...formOf("backward_kv", rows) }),
      ];
    },
  };
}

type Entry = "forward" | "backward_q" | "backward_kv";

/** How the kernel is cut: see its overrides. */
interface Shape extends Record<string, number> {
  readonly ROWS: number;
  readonly PARTS: number;
  readonly SHARE: number;
  readonly SOME: number;
}

/** A CPU driver is fastest with the most rows and keys for which the code of a loop fits its instruction cache. */
function cpuShape(lanes: number, columns: number, entry: Entry): Shape {
  const keys = columns <= (entry === "forward" ? 16 : 8) ? 4 : 2;
  let share = lanes / keys;
  while (columns % share) share /= 2;
  return { ROWS: columns <= 16 ? 2 : 1, PARTS: 1, SHARE: share, SOME: Math.min(lanes / share, 8) };
}

/**
 * On a GPU two rows per lane read workgroup memory half as often as one; their columns go to so many lanes that what a lane
 * sums and multiplies takes 128 registers, and that the tile fits into workgroup memory.
 */
function gpuShape(gpu: Gpu, columns: number, entry: Entry): Shape & { readonly LANE_SLOTS: number } {
  const held = entry === "forward" ? 2 : 4, most = gpu.limits.maxComputeWorkgroupStorageSize;
  const shapes = [[2, 1], [2, 2], [2, 4], [1, 1], [1, 2], [1, 4], [2, 8], [1, 8]] as const;
  for (const [rows, parts] of shapes) {
    const some = entry === "forward" ? 16 / rows : 8 / rows;
    const share = parts === 1 ? 2 : parts;
    const sums = parts === 1 ? 0 : (entry === "forward" ? 1 : 2) * rows * some / 4;
    const slots = 2 * columns / share + (entry === "backward_kv" ? 1 : 0) + sums;
    const fits = columns % parts === 0 && held * rows * columns / parts <= 32 && slots * GPU_LANES * 16 <= most;
    if (fits) return { ROWS: rows, PARTS: parts, SHARE: share, SOME: some, LANE_SLOTS: slots };
  }
  const width = 4 * columns;
  throw new RangeError(
    `Cannot attend with heads of ${width} columns on this GPU: no share of them fits a lane's registers and ${most} bytes of ` +
      "workgroup memory",
  );
}
