/**
 * rmsnorm.wgsl against the CPU reference. The errors found (NMSE) are 8e-15 in out, rstd and dx, and 7e-14 in dweight, which
 * sums 257 rows one after the other; the bounds are 100 times that. The large eps shows where it is added.
 */
import { createRmsnorm } from "../../lib/ops/rmsnorm.ts";
import { assertClose, wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { addTo, rmsnorm, rmsnormBackward } from "../reference.ts";

const ROW = 1e-12, COLUMN = 1e-11;
const DIMS = [8, 64, 96, 200, 1024], ROWS = [1, 3, 5, 257];
const eps = 0.5;

function caseOf(rows: number, dim: number) {
  const x = wave(rows * dim), weight = wave(dim, 1, { mean: 0.5, scale: 0.4 }), dout = wave(rows * dim, 2);
  return { x, weight, dout, ...rmsnorm(x, weight, { eps }) };
}

gpuTest("rmsnorm.forward gives x · rstd · weight and keeps rstd", async ({ gpu, input, output, rows, compute }) => {
  for (const dim of DIMS) {
    const op = createRmsnorm(gpu, { dim, eps });
    // The last one folds the grid.
    for (const count of dim === 8 ? [...ROWS, 33_001] : ROWS) {
      const expected = caseOf(count, dim), name = `[${count}, ${dim}]`;
      const t = {
        rows: rows(count),
        x: await input("x", expected.x),
        weight: await input("weight", expected.weight),
        out: output("out", { shape: [count, dim] }),
        rstd: output("rstd", { shape: [count] }),
      };
      const [out, rstd] = await compute([op.forward(t)], [t.out, t.rstd]);
      assertClose(out!, expected.out, { nmse: ROW, name: `out ${name}` });
      assertClose(rstd!, expected.rstd, { nmse: ROW, name: `rstd ${name}` });
    }
  }
});

gpuTest("rmsnorm.backward adds to dx", async ({ gpu, input, output, rows, compute }) => {
  for (const dim of DIMS) {
    const op = createRmsnorm(gpu, { dim, eps });
    for (const count of ROWS) {
      const of = caseOf(count, dim), start = wave(count * dim, 3), name = `[${count}, ${dim}]`;
      const t = {
        rows: rows(count),
        x: await input("x", of.x),
        weight: await input("weight", of.weight),
        rstd: await input("rstd", Float32Array.from(of.rstd)),
        dout: await input("dout", of.dout),
      };
      const dx = output("dx", { shape: [count, dim], start }), [sum] = await compute([op.backward({ ...t, dx })], [dx]);
      assertClose(sum!, addTo(rmsnormBackward(of).dx, start), { nmse: ROW, name: `dx ${name}` });
    }
  }
});

gpuTest("rmsnorm.backward_weight adds the sum over the rows", async ({ gpu, input, output, rows, compute }) => {
  for (const dim of DIMS) {
    const op = createRmsnorm(gpu, { dim, eps });
    for (const count of ROWS) {
      const of = caseOf(count, dim), start = wave(dim, 4);
      const t = {
        rows: rows(count),
        x: await input("x", of.x),
        rstd: await input("rstd", Float32Array.from(of.rstd)),
        dout: await input("dout", of.dout),
        dweight: output("dweight", { shape: [dim], start }),
      };
      const [dweight] = await compute([op.backwardWeight(t)], [t.dweight]);
      const expected = addTo(rmsnormBackward(of).dweight, start);
      assertClose(dweight!, expected, { nmse: COLUMN, name: `dweight [${count}, ${dim}]` });
    }
  }
});
