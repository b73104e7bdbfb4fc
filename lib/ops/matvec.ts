/**
 * Binding of matvec.wgsl: the product of a few rows with a matrix, for decoding token by token. It has the operands of
 * matmul.ts and only its `nt`; where rows are many, that one is faster.
 */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, Kernel, laneCount } from "../gpu/kernel.ts";
import { createTensor, FLOAT_TYPE } from "../gpu/tensor.ts";
import { operandsSource, type Product, productDims } from "./matmul_operands.ts";
import source from "../../kernels/matvec.wgsl" with { type: "text" };

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
      const { lora } = p, dims = productDims("nt", p, columns);
      return kernel.record("nt", {
        constants: { GROUP: group, ROWS: block, COLUMNS: columns, W_TYPE: FLOAT_TYPE[p.w.tensor.dtype]!, ...slots },
        bind: {
          rows: p.rows.buffer,
          x: p.x.tensor,
          w: p.w.tensor,
          lora_x: lora?.x.tensor ?? nothing,
          lora_w: lora?.w ?? nothing,
          add: p.plus && p.plus !== "out" ? p.plus : nothing,
          out: p.out.tensor,
        },
        dims,
        grid: () => [Math.ceil(p.rows.count / block), Math.ceil(p.n / wide), 1],
      });
    },
  };
}
