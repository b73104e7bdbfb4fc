/** dropout.wgsl against hash32 of lib/data/random.ts: the draws are integers, so the results are exact. */
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { hash32 } from "../../lib/data/random.ts";
import { createDropout } from "../../lib/ops/dropout.ts";
import { wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";

const P = 0.25, DRAW = 77, SALT = 5;

/** The share of x that is let through at element `i`. */
function kept(i: number): number {
  return (hash32(DRAW, SALT, i) >>> 8) * 2 ** -24 >= P ? Math.fround(1 / (1 - P)) : 0;
}

gpuTest(
  "dropout.apply and dropout.add draw as hash32 does, once per element",
  async ({ gpu, input, output, rows, compute }) => {
    const draw = gpu.device.createBuffer({ size: 16, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
    gpu.queue.writeBuffer(draw, 0, new Uint32Array([DRAW, 0, 0, 0]));
    const op = createDropout(gpu, { p: P, draw });
    for (const [count, dim] of [[1, 8], [5, 64], [257, 200]] as const) {
      const x = wave(count * dim), before = wave(count * dim, 1);
      const out = output("out", { shape: [count, dim] }), dx = output("dx", { shape: [count, dim], start: before });
      const place = { rows: rows(count), dim, salt: SALT };
      const [applied, added] = await compute([
        op.apply({ ...place, x: await input("x", x), out }),
        op.add({ ...place, y: await input("y", x), dx }),
      ], [out, dx]);
      const expected = Float32Array.from(x, (value, i) => value * kept(i));
      assertEquals(applied, expected);
      assertEquals(added, Float32Array.from(before, (value, i) => Math.fround(value + expected[i]!)));
      assert(count < 5 || expected.some((value) => value === 0));
    }
    const share = Array.from({ length: 51_400 }, (_, i) => kept(i)).filter((k) => k > 0).length / 51_400;
    assertAlmostEquals(share, 1 - P, 0.01);
  },
);
