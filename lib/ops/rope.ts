/** Binding of rope.wgsl, and its tables of cosines and sines. */
import type { Gpu } from "../gpu/device.ts";
import { type Dispatch, fold, Kernel, type Rows } from "../gpu/kernel.ts";
import { createTensor, type Tensor, upload } from "../gpu/tensor.ts";
import { groupsOf, widen } from "../gpu/wide.ts";
import source from "../../kernels/rope.wgsl" with { type: "text" };

/** Sizes that rotary embedding needs. */
export interface RopeShape {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly theta: number;
  /** Positions 0 … positions − 1 have table rows. */
  readonly positions: number;
}

/** Angles as transformers computes them: `position · theta^(−2j/D)`, each step in float32. */
function ropeTables({ headDim, theta, positions }: Omit<RopeShape, "heads" | "kvHeads">) {
  const half = headDim / 2;
  const cosine = new Float32Array(positions * half), sine = new Float32Array(positions * half);
  for (let j = 0; j < half; j++) {
    const inverse = Math.fround(1 / Math.fround(theta ** Math.fround(2 * j / headDim)));
    for (let position = 0; position < positions; position++) {
      const angle = Math.fround(position * inverse);
      cosine[position * half + j] = Math.cos(angle);
      sine[position * half + j] = Math.sin(angle);
    }
  }
  return { cosine, sine };
}

/** Rotary position embedding of the q and k columns of fused `[q k v]` rows (arXiv:2104.09864). */
export async function createRope(gpu: Gpu, { heads, kvHeads, headDim, theta, positions }: RopeShape) {
  const kernel = new Kernel(gpu, "rope", widen(gpu, source, headDim / 2));
  const tables = ropeTables({ headDim, theta, positions });
  const cosine = createTensor(gpu, { name: "rope.cosine", shape: [positions, headDim / 2] });
  const sine = createTensor(gpu, { name: "rope.sine", shape: [positions, headDim / 2] });
  await upload(gpu, cosine, tables.cosine);
  await upload(gpu, sine, tables.sine);
  const rotate = (sign: number, t: { rows: Rows; positions: Tensor; qkv: Tensor }): Dispatch =>
    kernel.record("rotate", {
      constants: { WIDTH: (heads + 2 * kvHeads) * headDim, HEADS: heads + kvHeads, HALF: headDim / 2, SIGN: sign },
      bind: { rows: t.rows.buffer, positions: t.positions, cosine, sine, qkv: t.qkv },
      grid: () => fold(groupsOf(gpu, t.rows.count)),
    });
  return {
    /** Rotates `qkv` `[rows, (H + 2·KV)·D]` in place. */
    forward: (t: { rows: Rows; positions: Tensor; qkv: Tensor }) => rotate(1, t),
    /** Turns the gradient of the rotated `qkv` into that of the unrotated one, in place. */
    backward: (t: { rows: Rows; positions: Tensor; qkv: Tensor }) => rotate(-1, t),
  };
}
