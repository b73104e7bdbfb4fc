/**
 * Matrix products of the model. Kernel families by kind of device: tiles in workgroup memory and a narrow form for GPUs,
 * subgroup shuffles for CPU drivers. Which products belong to a linear layer is not known here.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel } from "../gpu/kernel.ts";
import { createTensor, FLOAT_TYPE } from "../gpu/tensor.ts";
import { operandsSource, type Product, productDims, sizesSource } from "./matmul_operands.ts";
import narrowSource from "../../kernels/matmul_narrow.wgsl" with { type: "text" };
import subgroupSource from "../../kernels/matmul_subgroup.wgsl" with { type: "text" };
import tiledSource from "../../kernels/matmul_tiled.wgsl" with { type: "text" };

/** A recorded product whose tile may be changed: the bits of the result do not depend on it. */
export interface ProductChoice {
  /** `nt 4096 x 2048 x 1024, f16 weights, ranks 16 16 16`: most rows, columns and inner length. */
  readonly shape: string;
  /** The same product with another tile. */
  with(tile: Tile): Dispatch;
  /** Changes the recorded product itself. */
  use(tile: Tile): void;
}

/** Records the three kinds of product. */
export interface Matmul {
  /** `out[rows, n] = scale · x[rows, k] · w[n, k]ᵀ`, with low-rank segments. */
  nt(product: Product): Dispatch;
  /** `out[rows, n] = scale · x[rows, k] · w[k, n]`, with one low-rank segment. */
  nn(product: Product): Dispatch;
  /** `out[m, n] = scale · x[rows, m]ᵀ · w[rows, n]`: the inner axis is the rows. */
  tn(product: Product): Dispatch;
  /** The products recorded up to here that have a choice of tiles: on GPUs all that are not narrow. */
  readonly choices: readonly ProductChoice[];
  /** The kernels that tiles are of. */
  readonly source: string;
}

/**
 * One way to compute a product: a kernel file, its constants, the rows and columns that a workgroup writes, and whether
 * workgroups follow each other down the result.
 */
interface Form {
  readonly kernel: Kernel;
  readonly constants: Readonly<Record<string, number>>;
  readonly high: number;
  readonly wide: number;
  readonly down: boolean;
}

/** Chooses a form for a result of at most `[rows, columns]` and sums of `inner` products; on GPUs it follows `tile`. */
type ChooseForm = (entry: "nt" | "nn" | "tn", rows: number, columns: number, tile: Tile, inner: number) => Form;

/**
 * Tile of the GPU kernels: the narrow form's 16 by 16, or `BM` rows by `BN` columns and `BK` inner steps at a time, run in
 * bands of `BAND` rows of tiles (8 where it is left out).
 */
export type Tile = "narrow" | { readonly BM: number; readonly BN: number; readonly BK: number; readonly BAND?: number };

/** Tiles of 128 by 128 that fill a large GPU; fewer leave processors idle. */
const ENOUGH = 128;

/**
 * The tile for a result of at most `[rows, columns]` on a GPU where none was measured. Weights alone decide whether it is
 * narrow, never how many tokens there can be: the narrow form adds in another order.
 */
export function chooseTile(entry: "nt" | "nn" | "tn", rows: number, columns: number): Tile {
  if (columns <= 64 || (entry === "tn" && rows <= 64)) return "narrow";
  if (tiles(rows, 128) * tiles(columns, 128) < ENOUGH) return { BM: 64, BN: 64, BK: 32 };
  return { BM: 128, BN: 128, BK: 16 };
}

/** Tiles to compare on a GPU: all that the kernel and `gpu` can hold. */
export function tilesOf(gpu: Gpu): readonly Exclude<Tile, "narrow">[] {
  const tiles = [
    { BM: 128, BN: 128, BK: 16 },
    { BM: 128, BN: 128, BK: 16, BAND: 2 },
    { BM: 128, BN: 128, BK: 16, BAND: 32 },
    { BM: 128, BN: 128, BK: 32 },
    { BM: 256, BN: 128, BK: 16 },
    { BM: 128, BN: 64, BK: 32 },
    { BM: 64, BN: 128, BK: 32 },
    { BM: 64, BN: 64, BK: 32 },
  ];
  return tiles.filter(({ BM, BN, BK }) => (BM + BN) * BK * 4 <= gpu.limits.maxComputeWorkgroupStorageSize);
}

/** A tile in words. */
export function tileName(tile: Tile): string {
  return tile === "narrow" ? tile : `${tile.BM}x${tile.BN}x${tile.BK}${tile.BAND ? ` band ${tile.BAND}` : ""}`;
}

/** The forms for this device. */
function formsOf(gpu: Gpu): ChooseForm {
  if (gpu.lanes === "subgroup") {
    const kernel = new Kernel(gpu, "matmul_subgroup", `${subgroupSource}\n${sizesSource}`), lanes = gpu.subgroup;
    return (entry, rows, columns, _tile, inner) => {
      // Up to half a tile more than full ones: narrower tiles waste less than they cost. So do half as high ones in tn.
      const rest = (size: number, tile: number) => size <= 80 && size % tile <= tile / 2 ? size % tile : 0;
      const more = rows > 32 ? rest(columns, 4 * lanes) : 0;
      const part = more === 0 ? lanes : columns === 8 ? 2 : more <= 16 ? 4 : 8;
      const high = entry === "tn" && part === lanes && rest(rows, 32) ? 16 : 32;
      // Rows of w lie far apart where they are inner steps: with many of them, tiles that share them follow each other.
      const down = entry !== "nt" && inner > 256;
      const constants = {
        LANES: lanes,
        PART: part,
        DOWN: down ? 1 : 0,
        ...(entry === "tn" ? { STEP: Math.min(8, part), SHARE: Math.max(1, part / 8), HIGH: high } : {}),
      };
      return { kernel, constants, high: high * lanes / part, wide: 4 * part, down };
    };
  }
  const narrow = new Kernel(gpu, "matmul_narrow", `${narrowSource}\n${operandsSource}`);
  const tiled = new Kernel(gpu, "matmul_tiled", `${tiledSource}\n${operandsSource}`);
  return (_entry, _rows, _columns, tile) => {
    if (tile === "narrow") return { kernel: narrow, constants: {}, high: 16, wide: 16, down: false };
    return { kernel: tiled, constants: { ...tile }, high: tile.BM, wide: tile.BN, down: false };
  };
}

/** Makes the products for this device; `choose` is asked for the first tile where it is a GPU. */
export function createMatmul(gpu: Gpu, choose = chooseTile): Matmul {
  const formOf = formsOf(gpu), choices: ProductChoice[] = [];
  const nothing = createTensor(gpu, { name: "matmul.nothing", shape: [8] });
  // CPU kernels write eight numbers at a time.
  const unit = gpu.lanes === "subgroup" ? 8 : 4;

  const record = (entry: "nt" | "nn" | "tn", p: Product): Dispatch => {
    // Rows may change from run to run, but never beyond what the result's tensor holds.
    const rows = entry === "tn" ? p.m! : p.out.tensor.shape[0]!, tile = choose(entry, rows, p.n);
    const dispatch = recordTile(entry, p, tile), ranks = p.lora?.segments.map(({ r }) => r) ?? [];
    if (gpu.lanes === "subgroup" || tile === "narrow") return dispatch;
    choices.push({
      shape: `${entry} ${rows} x ${p.n} x ${entry === "tn" ? p.x.tensor.shape[0] : p.k}, ${p.w.tensor.dtype} weights` +
        (ranks.length > 0 ? `, ranks ${ranks.join(" ")}` : ""),
      with: (tile) => recordTile(entry, p, tile),
      use: (tile) => {
        Object.assign(dispatch, recordTile(entry, p, tile));
      },
    });
    return dispatch;
  };
  const recordTile = (entry: "nt" | "nn" | "tn", p: Product, tile: Tile): Dispatch => {
    const { n, m = 0, lora } = p, dims = productDims(entry, p, unit), { k, end0, end1 } = dims;
    const most = p.out.tensor.shape[0]!, inner = entry === "tn" ? p.x.tensor.shape[0]! : k;
    const { kernel, constants, high, wide, down } = formOf(entry, entry === "tn" ? m : most, n, tile, inner);
    const columns = entry === "nt"
      ? tiles(end0, wide) + tiles(end1 - end0, wide) + tiles(n - end1, wide)
      : tiles(n, wide);
    return kernel.record(entry, {
      constants: {
        ...constants,
        W_TYPE: FLOAT_TYPE[p.w.tensor.dtype]!,
        // Base weights of 16 bits mostly have an adapter: then the head needs no kernel of its own, a second of compiling.
        ...(gpu.lanes === "subgroup" ? { PLUS: dims.plus, LORA: lora || p.w.tensor.dtype !== "f32" ? 1 : 0 } : {}),
      },
      bind: {
        rows: p.rows.buffer,
        x: p.x.tensor,
        w: p.w.tensor,
        ...(gpu.lanes === "subgroup" || (entry === "nt" && tile === "narrow") ? {} : { w_half: p.w.tensor }),
        ...(entry === "tn" ? {} : { lora_x: lora?.x.tensor ?? nothing, lora_w: lora?.w ?? nothing }),
        add: p.plus && p.plus !== "out" ? p.plus : nothing,
        out: p.out.tensor,
      },
      dims,
      grid: () => {
        const rows = tiles(entry === "tn" ? m : p.rows.count, high);
        return down ? [rows, columns, 1] : [columns, rows, 1];
      },
    });
  };
  return {
    nt: (p) => record("nt", p),
    nn: (p) => record("nn", p),
    tn: (p) => record("tn", p),
    choices,
    source: tiledSource + operandsSource,
  };
}
const tiles = (size: number, tile: number) => Math.ceil(size / tile);
