/**
 * swiglu.wgsl against the CPU reference, with gates up to ±100, where exp(−gate) overflows to infinity. The errors found
 * (NMSE) are 5e-15 forward and 2e-14 backward; the bounds are 100 times that.
 */
import { createSwiglu } from "../../lib/ops/swiglu.ts";
import { assertClose, wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { swiglu, swigluBackward } from "../reference.ts";

const FORWARD = 5e-13, BACKWARD = 2e-12;
const DIMS = [8, 64, 96, 200], ROWS = [1, 3, 5, 257];
const SCALES = [2, 100];

gpuTest("swiglu.forward gives silu(gate) · up", async ({ gpu, input, output, rows, compute }) => {
  for (const dim of DIMS) {
    const op = createSwiglu(gpu, { dim });
    for (const count of ROWS) {
      for (const scale of SCALES) {
        const gateUp = wave(count * 2 * dim, 0, { scale });
        const out = output("out", { shape: [count, dim] });
        const t = { rows: rows(count), gateUp: await input("gate_up", gateUp), out };
        const [found] = await compute([op.forward(t)], [out]);
        assertClose(found!, swiglu(gateUp, dim), { nmse: FORWARD, name: `out [${count}, ${dim}] scale ${scale}` });
      }
    }
  }
});

gpuTest("swiglu.backward gives the gradients of gate and up", async ({ gpu, input, output, rows, compute }) => {
  for (const dim of DIMS) {
    const op = createSwiglu(gpu, { dim });
    for (const count of ROWS) {
      for (const scale of SCALES) {
        const gateUp = wave(count * 2 * dim, 0, { scale }), dout = wave(count * dim, 2);
        const inPlace = output("gate_up", { shape: [count, 2 * dim], start: gateUp });
        const t = { rows: rows(count), gateUp: inPlace, dout: await input("dout", dout) };
        const [found] = await compute([op.backward(t)], [inPlace]);
        const expected = swigluBackward({ gateUp, dout }, dim);
        assertClose(found!, expected, { nmse: BACKWARD, name: `dgate_up [${count}, ${dim}] scale ${scale}` });
      }
    }
  }
});
