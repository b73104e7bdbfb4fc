/** The kernels that memory bounds, at the blog's sizes, each with sampled rows of its result checked first. */
import { dynamicMap } from "../../lib/data/blockwise8.ts";
import { rounded } from "../../lib/data/dtype.ts";
import { NF4_CODE } from "../../lib/data/nf4.ts";
import { hash32 } from "../../lib/data/random.ts";
import type { Gpu } from "../../lib/gpu/device.ts";
import { downloadBytes } from "../../lib/gpu/tensor.ts";
import { BLOCK, createAdamw, createBlocks, packStep } from "../../lib/ops/adamw.ts";
import { createCrossEntropy } from "../../lib/ops/cross_entropy.ts";
import { createDropout } from "../../lib/ops/dropout.ts";
import { createEmbedding } from "../../lib/ops/embedding.ts";
import { createNf4 } from "../../lib/ops/nf4.ts";
import { createRmsnorm } from "../../lib/ops/rmsnorm.ts";
import { createRope } from "../../lib/ops/rope.ts";
import { createSwiglu } from "../../lib/ops/swiglu.ts";
import { crossEntropy, nf4Dequantize, rmsnorm, rmsnormBackward, rope, swiglu, swigluBackward } from "../reference.ts";
import { adamw, adamw8 } from "../reference_step.ts";
import { agree, type Case, readFloats } from "./measure.ts";

const C = 1024, F = 2752, V = 50_257, STRIDE = 50_304, HEADS = { heads: 16, kvHeads: 8, headDim: 64 };
const WIDTH = 2048, ROTATED = 1536, EPS = 1e-5;

/** Rows of a result that are compared. */
const some = (rows: number) => [0, rows >> 1, rows - 1];

/** Cases for `tokens` rows, `chunk` rows of logits, and an optimizer of `parameters` numbers. */
export async function memoryCases(
  gpu: Gpu,
  { tokens: T, chunk, parameters }: { tokens: number; chunk: number; parameters: number },
): Promise<Case[]> {
  const rope = await createRope(gpu, { ...HEADS, theta: 10_000, positions: 1024 });
  return [
    ...normCases(gpu, T),
    ropeCase(rope, T),
    ...swigluCases(gpu, T),
    ...embeddingCases(gpu, T),
    dropoutCase(gpu, T),
    ...crossEntropyCases(gpu, chunk),
    nf4Case(gpu, "f32"),
    nf4Case(gpu, "f16"),
    ...adamwCases(gpu, parameters),
  ];
}

function normCases(gpu: Gpu, T: number): Case[] {
  const op = createRmsnorm(gpu, { dim: C, eps: EPS });
  const shape = `${T} x ${C}`, dtype = "f32";
  return [
    {
      name: "rmsnorm.forward",
      shape,
      dtype,
      work: { bytes: 8 * T * C },
      async prepare({ random, output, rows }) {
        const x = await random("x", [T, C]), weight = await random("weight", [C], { mean: 1, seed: 2 });
        const out = output("out", [T, C]), rstd = output("rstd", [T]);
        const commands = [op.forward({ rows: rows(T), x: x.tensor, weight: weight.tensor, out, rstd })];
        const check = async () => {
          for (const row of some(T)) {
            const expected = rmsnorm(x.slice(row * C, (row + 1) * C), weight.slice(0, C), { eps: EPS }).out;
            agree("rmsnorm.forward", await readFloats(gpu, out, [row * C, (row + 1) * C]), expected);
          }
        };
        return { commands, check };
      },
    },
    {
      name: "rmsnorm.backward",
      shape,
      dtype,
      work: { bytes: 16 * T * C },
      async prepare({ random, output, rows }) {
        const x = await random("x", [T, C]), weight = await random("weight", [C], { mean: 1, seed: 2 });
        const rstd = await random("rstd", [T], { mean: 1.7, spread: 0.1, seed: 3 });
        const dout = await random("dout", [T, C], { seed: 4 }), dx = output("dx", [T, C]);
        const given = { x: x.tensor, weight: weight.tensor, rstd: rstd.tensor, dout: dout.tensor };
        const check = async () => {
          for (const row of some(T)) {
            const part = (of: typeof x) => of.slice(row * C, (row + 1) * C);
            const one = { x: part(x), dout: part(dout), weight: weight.slice(0, C), rstd: rstd.slice(row, row + 1) };
            const { dx: expected } = rmsnormBackward(one);
            agree("rmsnorm.backward", await readFloats(gpu, dx, [row * C, (row + 1) * C]), expected);
          }
        };
        return { commands: [op.backward({ rows: rows(T), ...given, dx })], check };
      },
    },
    {
      name: "rmsnorm.backward_weight",
      shape,
      dtype,
      work: { bytes: 8 * T * C },
      async prepare({ random, output, rows }) {
        const x = await random("x", [T, C]), dout = await random("dout", [T, C], { seed: 4 });
        const rstd = await random("rstd", [T], { mean: 1.7, spread: 0.1, seed: 3 }), dweight = output("dweight", [C]);
        const given = { x: x.tensor, rstd: rstd.tensor, dout: dout.tensor, dweight };
        const check = async () => {
          const expected = new Float64Array(C);
          for (let t = 0; t < T; t++) {
            for (let c = 0; c < C; c += 97) expected[c]! += dout.at(t * C + c) * x.at(t * C + c) * rstd.at(t);
          }
          const found = await readFloats(gpu, dweight, [0, C]), probed = (_: number, c: number) => c % 97 === 0;
          agree("rmsnorm.backward_weight", found.filter(probed), expected.filter(probed));
        };
        return { commands: [op.backwardWeight({ rows: rows(T), ...given })], reset: [{ clear: dweight }], check };
      },
    },
  ];
}

function ropeCase(op: Awaited<ReturnType<typeof createRope>>, T: number): Case {
  return {
    name: "rope.rotate",
    shape: `${T} x ${ROTATED}`,
    dtype: "f32",
    work: { bytes: 8 * T * ROTATED },
    async prepare({ gpu, random, input, rows }) {
      const qkv = await random("qkv", [T, WIDTH]), at = Uint32Array.from({ length: T }, (_, t) => t % 1024);
      const positions = await input("positions", at, "u32");
      const check = async () => {
        for (const row of some(T)) {
          const first = row * WIDTH, x = qkv.slice(first, first + ROTATED);
          const expected = rope(x, [at[row]!], { heads: ROTATED / 64, D: 64, theta: 10_000 });
          agree("rope.rotate", await readFloats(gpu, qkv.tensor, [first, first + ROTATED]), expected);
        }
      };
      return { commands: [op.forward({ rows: rows(T), positions, qkv: qkv.tensor })], check };
    },
  };
}

function swigluCases(gpu: Gpu, T: number): Case[] {
  const op = createSwiglu(gpu, { dim: F });
  const shape = `${T} x ${F}`, dtype = "f32";
  return [
    {
      name: "swiglu.forward",
      shape,
      dtype,
      work: { bytes: 12 * T * F },
      async prepare({ random, output, rows }) {
        const gateUp = await random("gate_up", [T, 2 * F], { spread: 3 }), out = output("out", [T, F]);
        const check = async () => {
          for (const row of some(T)) {
            const expected = swiglu(gateUp.slice(row * 2 * F, (row + 1) * 2 * F), F);
            agree("swiglu.forward", await readFloats(gpu, out, [row * F, (row + 1) * F]), expected);
          }
        };
        return { commands: [op.forward({ rows: rows(T), gateUp: gateUp.tensor, out })], check };
      },
    },
    {
      name: "swiglu.backward",
      shape,
      dtype,
      work: { bytes: 20 * T * F },
      async prepare({ random, output, rows }) {
        const gateUp = await random("gate_up", [T, 2 * F], { spread: 3 }), { tensor } = gateUp;
        const gradient = output("dgate_up", [T, 2 * F]);
        const dout = await random("dout", [T, F], { seed: 2 });
        const check = async () => {
          for (const row of some(T)) {
            const range = [row * 2 * F, (row + 1) * 2 * F] as const;
            const one = { gateUp: gateUp.slice(...range), dout: dout.slice(row * F, (row + 1) * F) };
            agree("swiglu.backward", await readFloats(gpu, gradient, range), swigluBackward(one, F));
          }
        };
        const reset = [{ copy: { from: tensor, to: gradient, bytes: tensor.bytes } }];
        return { commands: [op.backward({ rows: rows(T), gateUp: gradient, dout: dout.tensor })], reset, check };
      },
    },
  ];
}

/** Tokens that learn: a power of two, so that each token of the case comes once, a row added to a row. */
const LEARNT = 16_384;

function embeddingCases(gpu: Gpu, T: number): Case[] {
  const op = createEmbedding(gpu, { dim: C });
  const list = Uint32Array.from({ length: T }, (_, t) => (t * 7919 + 3) % V);
  return [
    {
      name: "embedding.gather",
      shape: `${T} of ${STRIDE} x ${C}`,
      dtype: "f16",
      work: { bytes: 6 * T * C },
      async prepare({ random, input, output, rows }) {
        const table = await random("table", [STRIDE, C], { dtype: "f16" }), out = output("out", [T, C]);
        const ids = await input("ids", list, "u32");
        const check = async () => {
          for (const row of some(T)) {
            const first = list[row]! * C, expected = table.slice(first, first + C);
            agree("embedding.gather", await readFloats(gpu, out, [row * C, (row + 1) * C]), expected);
          }
        };
        return { commands: [op.gather({ rows: rows(T), ids, table: table.tensor, out })], check };
      },
    },
    {
      name: "embedding.scatter",
      shape: `${T} x ${C}`,
      dtype: "f32",
      work: { bytes: 8 * T * C },
      async prepare({ random, input, output, rows }) {
        const x = await random("x", [T, C]), out = output("out", [T, C]);
        const to = Uint32Array.from({ length: T }, (_, t) => T - 1 - t), ids = await input("ids", to, "u32");
        const check = async () => {
          for (const row of some(T)) {
            const expected = x.slice((T - 1 - row) * C, (T - row) * C);
            agree("embedding.scatter", await readFloats(gpu, out, [row * C, (row + 1) * C]), expected);
          }
        };
        return { commands: [op.scatter({ rows: rows(T), ids, x: x.tensor, out })], check };
      },
    },
    {
      name: "embedding.backward",
      shape: `${T} into ${LEARNT} x ${C}`,
      dtype: "f32",
      work: { bytes: 12 * T * C },
      async prepare({ random, input, output, rows }) {
        const tokens = Array.from({ length: T }, (_, t) => (t * 7919 + 3) % LEARNT);
        const x = await random("x", [T, C]), dtable = output("dtable", [LEARNT, C]);
        const order = Array.from(tokens.keys()).sort((a, b) => tokens[a]! - tokens[b]!);
        const sorted = await input("order", Uint32Array.from(order), "u32");
        const ids = await input("ids", Uint32Array.from(order, (t) => tokens[t]!), "u32");
        const starts = await input("starts", Uint32Array.from({ length: T + 1 }, (_, i) => i), "u32");
        const check = async () => {
          for (const row of some(T)) {
            const first = tokens[row]! * C, expected = x.slice(row * C, (row + 1) * C);
            agree("embedding.backward", await readFloats(gpu, dtable, [first, first + C]), expected);
          }
        };
        const commands = [op.backward({ rows: rows(T), ids, order: sorted, starts, x: x.tensor, dtable })];
        return { commands, reset: [{ clear: dtable }], check };
      },
    },
  ];
}

function dropoutCase(gpu: Gpu, T: number): Case {
  const p = 0.05, draw = 11, salt = 3;
  return {
    name: "dropout.apply",
    shape: `${T} x ${C}`,
    dtype: "f32",
    work: { bytes: 8 * T * C },
    async prepare({ random, output, rows, uniform }) {
      const op = createDropout(gpu, { p, draw: uniform(Uint32Array.of(draw, 0, 0, 0)) });
      const x = await random("x", [T, C]), out = output("out", [T, C]);
      const check = async () => {
        for (const row of some(T)) {
          const expected = x.slice(row * C, (row + 1) * C).map((value, c) =>
            (hash32(draw, salt, row * C + c) >>> 8) * 2 ** -24 >= p ? value * Math.fround(1 / (1 - p)) : 0
          );
          agree("dropout.apply", await readFloats(gpu, out, [row * C, (row + 1) * C]), expected);
        }
      };
      return { commands: [op.apply({ rows: rows(T), x: x.tensor, out, dim: C, salt })], check };
    },
  };
}

function crossEntropyCases(gpu: Gpu, R: number): Case[] {
  const op = createCrossEntropy(gpu, { vocab: V, stride: STRIDE }), scale = Math.fround(1 / 37);
  const list = Uint32Array.from({ length: R }, (_, r) => (r * 7919 + 3) % V);
  return [
    {
      name: "cross_entropy.loss",
      shape: `${R} x ${V}`,
      dtype: "f32",
      work: { bytes: 4 * R * V },
      async prepare({ random, input, output, rows }) {
        const logits = await random("logits", [R, STRIDE], { spread: 4 }), nll = output("nll", [R]);
        const labels = await input("labels", list, "u32");
        const check = async () => {
          for (const row of some(R)) {
            const x = logits.slice(row * STRIDE, row * STRIDE + V);
            const expected = crossEntropy(x, [list[row]!], { V, scale });
            agree("cross_entropy.loss", await readFloats(gpu, nll, [row, row + 1]), expected.nll);
          }
        };
        return { commands: [op.loss({ rows: rows(R), labels, logits: logits.tensor, nll })], check };
      },
    },
    {
      name: "cross_entropy.backward",
      shape: `${R} x ${V}`,
      dtype: "f32",
      work: { bytes: 8 * R * V },
      async prepare({ random, input, output, rows, uniform }) {
        const logits = await random("logits", [R, STRIDE], { spread: 4 }), nll = output("nll", [R]);
        const gradient = output("dlogits", [R, STRIDE]);
        const labels = await input("labels", list, "u32");
        const uniforms = { scale: uniform(Float32Array.of(scale, 0, 0, 0)) };
        const check = async () => {
          for (const row of some(R)) {
            const x = logits.slice(row * STRIDE, row * STRIDE + V);
            const expected = crossEntropy(x, [list[row]!], { V, scale });
            const found = await readFloats(gpu, gradient, [row * STRIDE, row * STRIDE + V]);
            agree("cross_entropy.backward", found, expected.dlogits);
            agree("cross_entropy loss", await readFloats(gpu, nll, [row, row + 1]), expected.nll);
          }
        };
        const reset = [{ copy: { from: logits.tensor, to: gradient, bytes: gradient.bytes } }];
        return { commands: [op.backward({ rows: rows(R), ...uniforms, labels, logits: gradient, nll })], reset, check };
      },
    },
  ];
}

function nf4Case(gpu: Gpu, to: "f32" | "f16"): Case {
  const count = 2 * F * C, size = to === "f32" ? 4 : 2, op = createNf4(gpu, new Float32Array(NF4_CODE));
  return {
    name: "nf4.dequantize",
    shape: `${2 * F} x ${C}`,
    dtype: `nf4 to ${to}`,
    work: { bytes: count / 2 + count / 16 + size * count },
    async prepare({ random, input, output }) {
      const codes = Uint8Array.from({ length: count / 2 }, (_, i) => i * 37 + (i >> 8));
      const absmax = await random("absmax", [count / 64], { mean: 1, spread: 0.5 }), out = output("out", [count], to);
      const packed = await input("codes", codes, "u8");
      const check = async () => {
        for (const first of [0, count / 2, count - 4096]) {
          const part = codes.subarray(first / 2, first / 2 + 2048), scales = absmax.slice(first / 64, first / 64 + 64);
          const expected = nf4Dequantize(part, scales, { code: NF4_CODE, count: 4096 });
          const found = await readFloats(gpu, out, [first, first + 4096]);
          agree("nf4.dequantize", found, to === "f32" ? expected : rounded(Float32Array.from(expected), "F16"));
        }
      };
      return { commands: [op.dequantize({ codes: packed, absmax: absmax.tensor, out, count, blocksize: 64 })], check };
    },
  };
}

function adamwCases(gpu: Gpu, count: number): Case[] {
  const values = { learningRate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0.01, step: 1 };
  const settings = { step: 1, lr: 1e-3, weightDecay: 0.01 };
  const slots = [{ name: "all", offset: 0, elements: count, columns: count, stride: count }];
  const shape = String(count), checked = 4 * BLOCK;
  const sums: Case = {
    name: "adamw.sum_squares",
    shape,
    dtype: "f32",
    work: { bytes: 4 * count },
    async prepare({ random, output }) {
      const grad = await random("grad", [count], { spread: 1e-2, seed: 2 }), parts = Math.ceil(count / 4096);
      const partial = output("partial", [parts]), op = createAdamw(gpu, "torch");
      const check = async () => {
        for (const part of some(parts)) {
          const values = grad.slice(part * 4096, Math.min(count, (part + 1) * 4096));
          const expected = values.reduce((sum, g) => sum + g * g, 0);
          agree("adamw.sum_squares", await readFloats(gpu, partial, [part, part + 1]), [expected]);
        }
      };
      return { commands: [op.sumSquares({ grad: grad.tensor, partial, part: 0 })], check };
    },
  };
  const names = { "step32": "adamw.step32", "step8": "adamw.step8" };
  const steps = (["step32", "step8"] as const).map((kind): Case => ({
    name: names[kind],
    shape,
    dtype: kind === "step32" ? "f32" : "f32, 8-bit state",
    work: { bytes: count * (kind === "step32" ? 28 : 16) },
    async prepare({ random, input, output, uniform }) {
      const convention = kind === "step32" ? "torch" : "bitsandbytes", op = createAdamw(gpu, convention);
      const step = uniform(packStep({ ...values, maxGradNorm: 0, slot: 0 }, convention));
      const param = await random("param", [count]), grad = await random("grad", [count], { spread: 1e-2, seed: 2 });
      const norm = await input("norm", Float32Array.of(1, 1, 0, 0), "f32");
      const blocks = (await createBlocks(gpu, { name: "blocks", slots }))!, rows = blocks.shape[0]!;
      const given = { step, norm, blocks, grad: grad.tensor, param: param.tensor };
      const p = param.slice(0, checked), g = grad.slice(0, checked);
      if (kind === "step32") {
        const [state1, state2] = [output("state1", [count]), output("state2", [count])];
        const check = async () => {
          const [p64, zero] = [Float64Array.from(p), new Float64Array(checked)];
          adamw({ p: p64, g, m: zero, v: zero.slice() }, settings);
          agree(names[kind], await readFloats(gpu, param.tensor, [0, checked]), p64);
        };
        return { commands: [op.step32({ ...given, state1, state2 })], check };
      }
      const signed = dynamicMap(true), unsigned = dynamicMap(false);
      const both = new Float32Array(512).map((_, i) => (i % 2 ? unsigned : signed)[i >> 1]!);
      const maps = await input("maps", both, "f32"), absmax = output("absmax", [rows, 2]);
      const codes1 = output("codes1", [rows, BLOCK], "u8"), codes2 = output("codes2", [rows, BLOCK], "u8");
      const check = async () => {
        const [zeros, none] = [() => new Uint8Array(checked), () => new Float32Array(4)];
        const state = { codes1: zeros(), codes2: zeros(), absmax1: none(), absmax2: none() };
        adamw8({ p, g, state, maps: { signed, unsigned } }, settings);
        agree(names[kind], await readFloats(gpu, param.tensor, [0, checked]), p);
        agree("codes of adamw.step8", await downloadBytes(gpu, codes1, { bytes: checked }), state.codes1);
      };
      return { commands: [op.step8({ ...given, codes1, codes2, absmax, maps })], check };
    },
  }));
  return [sums, ...steps];
}
