/**
 * rope.wgsl against the CPU reference: angles of positions up to 1,023, documents that restart, v left alone to the bit. The
 * error found (NMSE) is 2.4e-15, most of it the rounding of the cosine and sine to 32 bits; the bound is 100 times that.
 */
import { assertEquals } from "@std/assert";
import { createRope } from "../../lib/ops/rope.ts";
import { assertClose, wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { rope } from "../reference.ts";

const BOUND = 2.4e-13;
const SHAPES = [
  { heads: 1, kvHeads: 1, headDim: 8 },
  { heads: 2, kvHeads: 1, headDim: 16 },
  { heads: 3, kvHeads: 1, headDim: 64 },
  { heads: 4, kvHeads: 2, headDim: 128 },
];
const theta = 10_000;

for (const direction of ["forward", "backward"] as const) {
  gpuTest(`rope.${direction} rotates q and k by position and leaves v`, async (bench) => {
    const { gpu, input, output, rows, compute } = bench;
    for (const { heads, kvHeads, headDim } of SHAPES) {
      const op = await createRope(gpu, { heads, kvHeads, headDim, theta, positions: 1024 });
      const rotated = (heads + kvHeads) * headDim, width = rotated + kvHeads * headDim;
      for (const count of [1, 3, 5, 257]) {
        const positions = Uint32Array.from({ length: count }, (_, t) => count === 1 ? 1023 : (t * 17) % 1024);
        const start = wave(count * width);
        const split = (x: Float32Array, begin: number, end: number) =>
          Float32Array.from({ length: count * (end - begin) }, (_, i) => {
            const row = Math.floor(i / (end - begin));
            return x[row * width + begin + i - row * (end - begin)]!;
          });
        const qkv = output("qkv", { shape: [count, width], start });
        const t = { rows: rows(count), positions: await input("positions", positions), qkv };
        const [found] = await compute([op[direction](t)], [qkv]);
        const expected = rope(split(start, 0, rotated), positions, {
          heads: heads + kvHeads,
          D: headDim,
          theta,
          inverse: direction === "backward",
        });
        const name = `${direction} [${count}, ${heads} + ${kvHeads}, ${headDim}]`;
        assertClose(split(found!, 0, rotated), expected, { nmse: BOUND, name });
        assertEquals(split(found!, rotated, width), split(start, rotated, width), `v ${name}`);
      }
    }
  });
}
