/**
 * Matrix products of the model. One kernel file per kind of device: register tiles with workgroup memory for GPUs,
 * subgroup shuffles for CPU drivers. Which products belong to a linear layer is not known here.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel, type Rows } from "../gpu/kernel.ts";
import { createTensor, type Storage, type Tensor } from "../gpu/tensor.ts";
import subgroupSource from "../../kernels/matmul_subgroup.wgsl" with { type: "text" };

/** Columns `[offset, offset + …)` of rows that are `stride` elements apart; both default to the whole tensor. */
export interface Operand {
  readonly tensor: Tensor;
  readonly offset?: number;
  readonly stride?: number;
}

/** One run of columns of the result with its own low-rank term: `lora_x[:, x .. x + r] · lora_w[w ..]`. */
export interface LoraSegment {
  /** Columns of the result in this segment. */
  readonly columns: number;
  /** Rank, padded to a multiple of 8; 0 where the module has no adapter. */
  readonly r: number;
  /** First column in `x`, and first element in `w`. */
  readonly x: number;
  readonly w: number;
}

/** The low-rank operands that ride along as extra inner columns. */
export interface LoraOperands {
  readonly x: Operand;
  readonly w: Tensor;
  readonly segments: readonly LoraSegment[];
}

/** A product's operands and sizes; `rows` is the number of rows of `x`. */
export interface Product {
  readonly rows: Rows;
  readonly x: Operand;
  readonly w: Operand;
  readonly out: Operand;
  /** Columns of the result. */
  readonly n: number;
  /** Inner length (`nt`, `nn`). */
  readonly k?: number;
  /** Columns of `x` (`tn`). */
  readonly m?: number;
  readonly scale?: number;
  readonly lora?: LoraOperands | undefined;
  /** A tensor of `out`'s layout that is added, or `"out"` to add to what `out` holds. */
  readonly plus?: Tensor | "out" | undefined;
}

/** Records the three kinds of product. */
export interface Matmul {
  /** `out[rows, n] = scale · x[rows, k] · w[n, k]ᵀ`, with low-rank segments. */
  nt(product: Product): Dispatch;
  /** `out[rows, n] = scale · x[rows, k] · w[k, n]`, with one low-rank segment. */
  nn(product: Product): Dispatch;
  /** `out[m, n] = scale · x[rows, m]ᵀ · w[rows, n]`: the inner axis is the rows. */
  tn(product: Product): Dispatch;
}

const W_TYPE: Partial<Record<Storage, number>> = { f32: 0, f16: 1, bf16: 2 };

/** Makes the products for this device. */
export function createMatmul(gpu: Gpu): Matmul {
  const kernel = new Kernel(gpu, "matmul_subgroup", subgroupSource);
  const wide = 4 * gpu.subgroup, high = 32;
  const nothing = createTensor(gpu, { name: "matmul.nothing", shape: [4] });

  const record = (entry: "nt" | "nn" | "tn", p: Product): Dispatch => {
    const { n, k = 0, m = 0, lora } = p;
    const segments = lora?.segments ?? [];
    check(entry, p);
    const end0 = segments[0]?.columns ?? n, end1 = end0 + (segments[1]?.columns ?? n - end0);
    const stride = (o: Operand) => o.stride ?? o.tensor.shape.at(-1)!;
    const lane = (i: number) => segments[i] ?? { r: 0, x: 0, w: 0 };
    const columns = entry === "nt"
      ? tiles(end0, wide) + tiles(end1 - end0, wide) + tiles(n - end1, wide)
      : tiles(n, wide);
    return kernel.record(entry, {
      constants: { LANES: gpu.subgroup, W_TYPE: W_TYPE[p.w.tensor.dtype]! },
      bind: {
        rows: p.rows.buffer,
        x: p.x.tensor,
        w: p.w.tensor,
        ...(entry === "nt" ? {} : { w_half: p.w.tensor }),
        ...(entry === "tn" ? {} : { lora_x: lora?.x.tensor ?? nothing, lora_w: lora?.w ?? nothing }),
        add: p.plus && p.plus !== "out" ? p.plus : nothing,
        out: p.out.tensor,
      },
      dims: {
        m,
        n,
        k,
        x_offset: p.x.offset ?? 0,
        x_stride: stride(p.x),
        w_offset: p.w.offset ?? 0,
        w_stride: stride(p.w),
        out_offset: p.out.offset ?? 0,
        out_stride: stride(p.out),
        lora_x_stride: lora ? stride(lora.x) : 0,
        lora_w_stride: entry === "nt" ? lane(0).r || lane(1).r || lane(2).r : n,
        end0,
        end1,
        lora_x0: lane(0).x,
        lora_x1: lane(1).x,
        lora_x2: lane(2).x,
        lora_w0: lane(0).w,
        lora_w1: lane(1).w,
        lora_w2: lane(2).w,
        r0: lane(0).r,
        r1: lane(1).r,
        r2: lane(2).r,
        scale: p.scale ?? 1,
        plus: p.plus === "out" ? 2 : p.plus ? 1 : 0,
      },
      grid: () => entry === "tn" ? [columns, tiles(m, high), 1] : [columns, tiles(p.rows.count, high), 1],
    });
  };
  return { nt: (p) => record("nt", p), nn: (p) => record("nn", p), tn: (p) => record("tn", p) };
}
const tiles = (size: number, tile: number) => Math.ceil(size / tile);

function check(entry: string, { x, w, out, n, k = 0, m = 0 }: Product): void {
  const name = `"${out.tensor.name}" = ${entry}("${x.tensor.name}", "${w.tensor.name}")`;
  if (n % 4 || m % 4 || k % 8) throw new RangeError(`Cannot multiply ${name}: n ${n} and m ${m} must be multiples of 4, k ${k} of 8`);
  if (W_TYPE[w.tensor.dtype] === undefined) throw new TypeError(`Cannot multiply ${name}: weights are ${w.tensor.dtype}`);
}
