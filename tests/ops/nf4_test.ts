/** nf4.wgsl gives what lib/data/nf4.ts gives, bit for bit, in each type of weights. */
import { assertEquals, assertThrows } from "@std/assert";
import { dequantizeNf4, NF4_CODE, quantizeNf4 } from "../../lib/data/nf4.ts";
import { wideOf } from "../../lib/gpu/wide.ts";
import { createNf4 } from "../../lib/ops/nf4.ts";
import { wave } from "../check.ts";
import { gpuTest, stored } from "../on_gpu.ts";

/** Every code in both halves of a byte, with scales over so many powers of two that some are too small or large for 16 bits. */
function quantized(count: number, blocksize: number) {
  const size = (i: number) => 0.02 * 2 ** (i % 47 - 23);
  const values = wave(count).map((x, i) => x * size(Math.floor(i / blocksize)));
  return { ...quantizeNf4(values, { blocksize }), count, blocksize };
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  gpuTest(`nf4.dequantize gives the bits of dequantizeNf4() in ${dtype}`, async ({ gpu, input, output, compute }) => {
    const op = createNf4(gpu, new Float32Array(NF4_CODE));
    for (
      const [count, blocksize] of [[64, 64], [3 * 64, 64], [257 * 64, 64], [1003 * 32, 32], [5 * 16, 16], [
        5 * 4096,
        4096,
      ]] as const
    ) {
      const of = quantized(count, blocksize);
      const t = {
        codes: await input("codes", of.packed, { dtype: "u8" }),
        absmax: await input("absmax", of.absmax),
        out: output("out", { shape: [count], dtype }),
        count,
        blocksize,
      };
      const [found] = await compute([op.dequantize(t)], [t.out]);
      const expected = stored(dequantizeNf4(of), dtype).bytes;
      assertEquals(new Uint8Array(found!.buffer), expected, `${count} in blocks of ${blocksize}`);
    }
  });
}

gpuTest("nf4.dequantize folds a grid of more than 32,768 workgroups", async ({ gpu, input, output, compute }) => {
  const count = 32_776 * 512, codes = new Uint8Array(count / 2).map((_, i) => i * 37 + (i >> 8));
  const absmax = new Float32Array(count / 4096).map((_, i) => 1 + i / 7);
  const out = output("out", { shape: [count], dtype: "bf16", start: new Uint8Array(2 * count) });
  const t = { codes: await input("codes", codes, { dtype: "u8" }), absmax: await input("absmax", absmax), out };
  const op = createNf4(gpu, new Float32Array(NF4_CODE));
  const [found] = await compute([op.dequantize({ ...t, count, blocksize: 4096 })], [out]);
  const expected = stored(dequantizeNf4({ packed: codes, absmax, count, blocksize: 4096 }), "bf16").bytes;
  assertEquals(new Uint8Array(found!.buffer).findIndex((byte, i) => byte !== expected[i]), -1);
}, { models: false });

gpuTest("nf4.dequantize refuses a last block that is not whole", async ({ gpu, input, output }) => {
  const op = createNf4(gpu, new Float32Array(NF4_CODE));
  const codes = await input("codes", new Uint8Array(48), { dtype: "u8" }),
    absmax = await input("absmax", new Float32Array(2));
  const out = output("out", { shape: [96] });
  assertThrows(
    () => op.dequantize({ codes, absmax, out, count: 96, blocksize: 64 }),
    RangeError,
    'Cannot dequantize "codes": 96 elements are not whole blocks of 64',
  );
}, { models: false });

gpuTest(
  "nf4.dequantize refuses blocks that are no power of two or smaller than what a lane writes",
  async ({ gpu, input, output }) => {
    const op = createNf4(gpu, new Float32Array(NF4_CODE)), least = 8 * wideOf(gpu, 8);
    const codes = await input("codes", new Uint8Array(48), { dtype: "u8" });
    const absmax = await input("absmax", new Float32Array(48)), out = output("out", { shape: [96] });
    for (const blocksize of [2, least / 2, 48]) {
      assertThrows(
        () => op.dequantize({ codes, absmax, out, count: 96, blocksize }),
        RangeError,
        `Cannot dequantize "codes": it is in blocks of ${blocksize}: a power of two of at least ${least} is wanted on this device`,
      );
    }
  },
);
