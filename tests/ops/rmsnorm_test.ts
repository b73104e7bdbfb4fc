import { createRmsnorm } from "../../lib/ops/rmsnorm.ts";
import { nmse, maxRelative, wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { rmsnorm, rmsnormBackward } from "../reference.ts";

const EPS = 0.5;
for (const dim of [8, 64, 96, 200, 1024]) {
gpuTest(`rmsnorm ${dim}`, async (b) => {
  const op = createRmsnorm(b.gpu, { dim, eps: EPS });
  for (const rows of [1, 3, 5, 257]) {
    const x = wave(rows * dim), weight = wave(dim, 1, {mean: 0.5, scale: 0.2}), dout = wave(rows * dim, 2);
    const expected = rmsnorm(x, weight, { eps: EPS });
    const t = { rows: b.rows(rows), x: await b.input("x", x), weight: await b.input("weight", weight) };
    const out = b.output("out", {shape: [rows, dim]}), rstd = b.output("rstd", {shape: [rows]});
    const [o, r] = await b.compute([op.forward({ ...t, out, rstd })], [out, rstd]);
    const start = wave(rows * dim, 3), ws = wave(dim, 4);
    const dx = b.output("dx", {shape: [rows, dim], start}), dweight = b.output("dweight", {shape: [dim], start: ws});
    const g = {...t, rstd, dout: await b.input("dout", dout)};
    const [gx, gw] = await b.compute([op.backward({ ...g, dx }), op.backwardWeight({...g, dweight})], [dx, dweight]);
    const e = rmsnormBackward({x, weight, rstd: expected.rstd, dout});
    const ex = e.dx.map((v, i) => v + start[i]!), ew = e.dweight.map((v, i) => v + ws[i]!);
    console.log(b.gpu.lanes, dim, rows, nmse(o!, expected.out), nmse(r!, expected.rstd), nmse(gx!, ex), nmse(gw!, ew));
  }
});
}
