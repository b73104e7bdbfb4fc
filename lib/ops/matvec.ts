/**
 * Binding of matvec.wgsl: the product of a few rows with a matrix, for decoding token by token. It has the operands of
 * matmul.ts and only its `nt`; where rows are many, that one is faster.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel, laneCount } from "../gpu/kernel.ts";
import { createTensor, type Storage } from "../gpu/tensor.ts";
import type { Operand, Product } from "./matmul.ts";
import operandsSource from "../../kernels/matmul_operands.wgsl" with { type: "text" };
import source from "../../kernels/matvec.wgsl" with { type: "text" };

const W_TYPE: Partial<Record<Storage, number>> = { f32: 0, f16: 1, bf16: 2 };

/** Rows that should share each weight where there are `count` of them: a power of two up to what the device holds. */
export function rowBlock(gpu: Gpu, count: number): number {
  return Math.min(gpu.lanes === "subgroup" ? 16 : 8, 2 ** Math.ceil(Math.log2(count)));
}

/** Makes the product; `block` rows (see `rowBlock`) share each weight that is read. */
export function createMatvec(gpu: Gpu, { block }: { block: number }) {
  const kernel = new Kernel(gpu, "matvec", `${source}\n${operandsSource}`);
  const nothing = createTensor(gpu, { name: "matvec.nothing", shape: [4] });
  const lanes = laneCount(gpu), group = Math.min(32, lanes);
  // A load costs a CPU driver as much as many multiplications; on a GPU fewer columns keep more threads busy.
  const columns = gpu.lanes === "subgroup" ? 8 : 4, wide = columns * lanes / group;
  const slots: Record<string, number> = gpu.lanes === "shared" ? { LANE_SLOTS: block * columns / 4 } : {};
  return {
    /** `out[rows, n] = scale · x[rows, k] · w[n, k]ᵀ`, with low-rank segments. */
    nt(p: Product): Dispatch {
      const { n, k = 0, lora } = p;
      check(p, columns);
      const segments = lora?.segments ?? [];
      const end0 = segments[0]?.columns ?? n, end1 = end0 + (segments[1]?.columns ?? n - end0);
      const stride = (o: Operand) => o.stride ?? o.tensor.shape.at(-1)!;
      const segment = (i: number) => segments[i] ?? { r: 0, x: 0, w: 0 };
      return kernel.record("nt", {
        constants: { GROUP: group, ROWS: block, COLUMNS: columns, W_TYPE: W_TYPE[p.w.tensor.dtype]!, ...slots },
        bind: {
          rows: p.rows.buffer,
          x: p.x.tensor,
          w: p.w.tensor,
          lora_x: lora?.x.tensor ?? nothing,
          lora_w: lora?.w ?? nothing,
          add: p.plus && p.plus !== "out" ? p.plus : nothing,
          out: p.out.tensor,
        },
        dims: {
          m: 0,
          n,
          k,
          x_offset: p.x.offset ?? 0,
          x_stride: stride(p.x),
          w_offset: p.w.offset ?? 0,
          w_stride: stride(p.w),
          out_offset: p.out.offset ?? 0,
          out_stride: stride(p.out),
          lora_x_stride: lora ? stride(lora.x) : 0,
          lora_w_stride: Math.max(segment(0).r, segment(1).r, segment(2).r),
          end0,
          end1,
          lora_x0: segment(0).x,
          lora_x1: segment(1).x,
          lora_x2: segment(2).x,
          lora_w0: segment(0).w,
          lora_w1: segment(1).w,
          lora_w2: segment(2).w,
          r0: segment(0).r,
          r1: segment(1).r,
          r2: segment(2).r,
          scale: p.scale ?? 1,
          plus: p.plus === "out" ? 2 : p.plus ? 1 : 0,
        },
        grid: () => [Math.ceil(p.rows.count / block), Math.ceil(n / wide), 1],
      });
    },
  };
}

function check({ x, w, out, n, k = 0, lora }: Product, columns: number): void {
  const name = `"${out.tensor.name}" = matvec("${x.tensor.name}", "${w.tensor.name}")`;
  if ([n, ...lora?.segments.map((s) => s.columns) ?? []].some((size) => size % columns) || k % 8) {
    throw new RangeError(
      `Cannot multiply ${name}: n ${n} and its segments must be multiples of ${columns}, k ${k} of 8`,
    );
  }
  if (W_TYPE[w.tensor.dtype] === undefined) {
    throw new TypeError(`Cannot multiply ${name}: weights are ${w.tensor.dtype}`);
  }
}
