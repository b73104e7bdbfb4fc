/**
 * The operands of matrix products as matmul.ts and matvec.ts take them, and how they reach a kernel: the fields of `Dims` in
 * matmul_sizes.wgsl.
 */
import type { Rows } from "../gpu/kernel.ts";
import { FLOAT_TYPE, type Tensor } from "../gpu/tensor.ts";
import operandsSnippet from "../../kernels/matmul_operands.wgsl" with { type: "text" };
import sizesSource from "../../kernels/matmul_sizes.wgsl" with { type: "text" };

/** To be appended to a kernel of products that declares its own operands. */
export { sizesSource };

/** To be appended to the other kernels of products. */
export const operandsSource = `${operandsSnippet}\n${sizesSource}`;

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

type Entry = "nt" | "nn" | "tn";

/**
 * The fields of `Dims`. Throws `RangeError` and `TypeError` for sizes and types that a kernel cannot read, where it writes `unit`
 * columns at a time.
 */
export function productDims(entry: Entry, product: Product, unit: number) {
  check(entry, product, unit);
  const { x, w, out, n, k = 0, m = 0, scale = 1, lora, plus } = product, segments = lora?.segments ?? [];
  const end0 = segments[0]?.columns ?? n, end1 = end0 + (segments[1]?.columns ?? n - end0);
  const stride = (o: Operand) => o.stride ?? o.tensor.shape.at(-1)!;
  const [s0, s1, s2] = [0, 1, 2].map((i) => segments[i] ?? { r: 0, x: 0, w: 0 }) as [Lane, Lane, Lane];
  return {
    m,
    n,
    k,
    x_offset: x.offset ?? 0,
    x_stride: stride(x),
    w_offset: w.offset ?? 0,
    w_stride: stride(w),
    out_offset: out.offset ?? 0,
    out_stride: stride(out),
    lora_x_stride: lora ? stride(lora.x) : 0,
    lora_w_stride: entry === "nt" ? s0.r || s1.r || s2.r : n,
    end0,
    end1,
    lora_x0: s0.x,
    lora_x1: s1.x,
    lora_x2: s2.x,
    lora_w0: s0.w,
    lora_w1: s1.w,
    lora_w2: s2.w,
    r0: s0.r,
    r1: s1.r,
    r2: s2.r,
    scale,
    // What happens to what `out` held: nothing of it stays, `plus` is added to the product, or the product to it.
    plus: plus === "out" ? 2 : plus ? 1 : 0,
  };
}

type Lane = Omit<LoraSegment, "columns">;

/** Kernels load whole vec4s and take what does not fit for something else, so sizes are refused here. */
function check(entry: Entry, { x, w, out, n, k = 0, m = 0, lora }: Product, unit: number): void {
  const name = `"${out.tensor.name}" = ${entry}("${x.tensor.name}", "${w.tensor.name}")`;
  if (n % unit || m % unit || k % 8) {
    throw new RangeError(`Cannot multiply ${name}: n ${n} and m ${m} must be multiples of ${unit}, k ${k} of 8`);
  }
  if (FLOAT_TYPE[w.tensor.dtype] === undefined) {
    throw new TypeError(`Cannot multiply ${name}: weights are ${w.tensor.dtype}`);
  }
  const wide = entry === "nt" && w.tensor.dtype !== "f32";
  const steps = [[x, 4], [w, wide ? 8 : 4], [out, unit]] as const;
  const bad = steps.find(([{ offset = 0, stride = 0 }, step]) => offset % step || stride % step);
  if (bad) {
    throw new RangeError(
      `Cannot multiply ${name}: offset and stride of "${bad[0].tensor.name}" must be multiples of ${bad[1]}`,
    );
  }
  if (!lora) return;
  const { segments } = lora, ranks = new Set(segments.map(({ r }) => r).filter((r) => r > 0));
  const columns = segments.reduce((sum, segment) => sum + segment.columns, 0);
  const most = entry === "nt" ? 3 : 1;
  if (
    segments.length > most || columns !== n || segments.some((s) => s.columns % unit || s.r % 8 || s.x % 4 || s.w % 4)
  ) {
    throw new RangeError(
      `Cannot multiply ${name}: at most ${most} low-rank segments must cover the ${n} columns, in units of ${unit}, with ranks in eights`,
    );
  }
  if (ranks.size > 1) throw new RangeError(`Cannot multiply ${name}: segments have ranks ${[...ranks]}: one is wanted`);
}
