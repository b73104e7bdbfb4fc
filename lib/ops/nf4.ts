/** Binding of nf4.wgsl: 4-bit weights back to numbers. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel } from "../gpu/kernel.ts";
import { createBuffer, FLOAT_TYPE, type Tensor } from "../gpu/tensor.ts";
import { widen, wideOf } from "../gpu/wide.ts";
import source from "../../kernels/nf4.wgsl" with { type: "text" };

/** Lanes of a workgroup: of several subgroups, where a driver has them. */
const LANES = 64;

/** Dequantization with the 16 values of `code` (bitsandbytes' `quant_map`). */
export function createNf4(gpu: Gpu, code: Float32Array<ArrayBuffer>) {
  const kernel = new Kernel(gpu, "nf4", widen(gpu, source, 8)), wide = wideOf(gpu, 8);
  const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
  const table = createBuffer(gpu, { label: "nf4.code", size: 64, usage });
  gpu.queue.writeBuffer(table, 0, code);
  return {
    /**
     * codes u8 `[count / 2]`, absmax f32 `[count / blocksize]` → out `[count]` in out's own type. Throws `RangeError` for blocks
     * that the kernel cannot tell apart: it finds a block by a shift, and reads one scale for all that a lane writes.
     */
    dequantize: (t: { codes: Tensor; absmax: Tensor; out: Tensor; count: number; blocksize: number }): Dispatch => {
      const refuse = (state: string) => new RangeError(`Cannot dequantize "${t.codes.name}": ${state}`),
        least = 8 * wide;
      if (!Number.isInteger(Math.log2(t.blocksize)) || t.blocksize < least) {
        throw refuse(`it is in blocks of ${t.blocksize}: a power of two of at least ${least} is wanted on this device`);
      }
      if (t.count % t.blocksize) throw refuse(`${t.count} elements are not whole blocks of ${t.blocksize}`);
      return kernel.record("dequantize", {
        constants: {
          LANES,
          TYPE: FLOAT_TYPE[t.out.dtype]!,
          BLOCK_SHIFT: Math.log2(t.blocksize),
        },
        bind: { code: table, codes: t.codes, absmax: t.absmax, out: t.out },
        dims: { count: t.count },
        grid: fold(Math.ceil(t.count / (8 * wide) / LANES)),
      });
    },
  };
}
