/**
 * adamw.wgsl: the norm against the CPU reference, AdamW in both conventions against what they follow, and 8-bit AdamW against
 * bitsandbytes' arithmetic. The errors found are beside the bounds, which are about 100 times larger.
 */
import { assert, assertEquals, assertLessOrEqual, assertThrows } from "@std/assert";
import { dynamicMap } from "../../lib/data/blockwise8.ts";
import { BLOCK, blockTable, createAdamw, createBlocks, packStep, type StepValues } from "../../lib/ops/adamw.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest } from "../on_gpu.ts";
import { adamw, adamw8, adamwCuda, clip, type State8 } from "../reference_step.ts";

// NMSE 9e-15 and 4e-15.
const NORM = 1e-12, UPDATE = 4e-13;
// 8-bit steps agree to the bit where nothing is fused; a GPU may fuse a product with a sum, which moves a code near a midpoint.
const ROUNDING = 1e-6;

/** Parameters of the size of a step, so that its rounding does not drown in theirs. */
const SMALL = { mean: 0.003, scale: 0.02 };

const step = (values: Partial<StepValues>): StepValues => ({
  learningRate: 0.01,
  beta1: 0.9,
  beta2: 0.999,
  eps: 1e-3, // large, so that its place shows
  weightDecay: 0.3,
  step: 1,
  maxGradNorm: 0,
  slot: 0,
  ...values,
});
const settings = ({ step, learningRate: lr, beta1, beta2, eps, weightDecay }: StepValues) => ({
  step,
  lr,
  beta1,
  beta2,
  eps,
  weightDecay,
});

async function gradientNorm(bench: Bench, gradients: readonly Float32Array[], maxGradNorm: number) {
  const { gpu, input, output, uniform, compute } = bench, op = createAdamw(gpu, "torch");
  const grads = await Promise.all(gradients.map((g, i) => input(`grad${i}`, g)));
  const parts = grads.map(op.parts), total = parts.reduce((a, b) => a + b);
  const partial = output("partial", { shape: [total] }), norm = output("norm", { shape: [4] });
  const norms = output("norms", { shape: [8], start: new Float32Array(8).fill(7) });
  const commands = grads.map((grad, i) =>
    op.sumSquares({ grad, partial, part: parts.slice(0, i).reduce((a, b) => a + b, 0) })
  );
  const uniforms = uniform(packStep(step({ maxGradNorm, slot: 5 }), "torch"));
  const last = op.clip({ step: uniforms, partial, parts: total, norm, norms });
  const [found, slots] = await compute([...commands, last], [norm, norms]);
  assertEquals([...slots!], [7, 7, 7, 7, 7, found![0]!, 7, 7]);
  return { norm: found![0]!, coefficient: found![1]! };
}

gpuTest("adamw.clip gives the norm of all gradients together and the factor that bounds it", async (bench) => {
  const sizes = [[1], [4096], [4097, 3, 20_000], [300_001, 64]];
  for (const group of sizes) {
    const gradients = group.map((n, i) => wave(n, i));
    for (const maxNorm of [0.5, 1e9]) {
      const expected = clip(gradients, maxNorm), found = await gradientNorm(bench, gradients, maxNorm);
      assertClose([found.norm], [expected.norm], { nmse: NORM, name: `norm of ${group}` });
      assertClose([found.coefficient], [expected.coefficient], { nmse: NORM, name: `factor of ${group}` });
    }
  }
  assertEquals((await gradientNorm(bench, [wave(5000)], 0)).coefficient, 1, "0 leaves gradients alone");
  assertEquals(await gradientNorm(bench, [new Float32Array(5)], 0.5), { norm: 0, coefficient: 1 });
  assertEquals(await gradientNorm(bench, [wave(5), Float32Array.of(Infinity)], 0.5), {
    norm: Infinity,
    coefficient: 0,
  });
  // As in torch.nn.utils.clip_grad_norm_: the run has failed, and says so.
  assertEquals(await gradientNorm(bench, [wave(5), Float32Array.of(NaN)], 0.5), { norm: NaN, coefficient: NaN });
});

/** Two contiguous tensors around one whose rows of 24 lie 32 apart, in a buffer with gaps; `places` are their elements. */
const LAYOUT = [
  { name: "a", offset: 8, elements: 300, columns: 300, stride: 300 },
  { name: "b", offset: 320, elements: 24 * 43, columns: 24, stride: 32 },
  { name: "c", offset: 1728, elements: 1, columns: 1, stride: 1 },
];
const SIZE = 1736;
const places = LAYOUT.map(({ offset, elements, columns, stride }) =>
  Array.from({ length: elements }, (_, i) => offset + Math.floor(i / columns) * stride + i % columns)
);

/** The buffer `start` with the elements of each tensor replaced by `values`. */
function replaced(start: Float32Array, values: readonly ArrayLike<number>[]): Float32Array<ArrayBuffer> {
  const out = Float32Array.from(start);
  places.forEach((at, i) => at.forEach((place, j) => out[place] = values[i]![j]!));
  return out;
}

const REFERENCES = {
  torch(t: Record<"p" | "g" | "m" | "v", Float32Array>, of: StepValues) {
    const wide = { p: new Float64Array(t.p), g: t.g, m: new Float64Array(t.m), v: new Float64Array(t.v) };
    adamw(wide, settings(of));
    return wide;
  },
  bitsandbytes(t: Record<"p" | "g" | "m" | "v", Float32Array>, of: StepValues) {
    const copy = { p: t.p.slice(), g: t.g, m: t.m.slice(), v: t.v.slice() };
    adamwCuda(copy, settings(of));
    return copy;
  },
};

for (const convention of ["torch", "bitsandbytes"] as const) {
  gpuTest(`adamw.step32 updates as ${convention} does, and nothing between the tensors`, async (bench) => {
    const { gpu, input, output, uniform, compute } = bench, op = createAdamw(gpu, convention);
    const blocks = await createBlocks(gpu, { name: "blocks", slots: LAYOUT });
    const start = {
      p: wave(SIZE, 1, SMALL),
      g: wave(SIZE, 2),
      m: wave(SIZE, 3),
      v: wave(SIZE, 4, { mean: 3, scale: 2.9 }),
    };
    const coefficient = 0.37;
    for (const [t, weightDecay] of [[1, 0.3], [2, 0], [1000, 0.3]] as const) {
      const of = step({ step: t, weightDecay });
      const tensors = {
        param: output("param", { shape: [SIZE], start: start.p }),
        state1: output("state1", { shape: [SIZE], start: start.m }),
        state2: output("state2", { shape: [SIZE], start: start.v }),
      };
      const command = op.step32({
        step: uniform(packStep(of, convention)),
        norm: await input("norm", Float32Array.of(9, coefficient, 0, 0)),
        grad: await input("grad", start.g),
        blocks: blocks!,
        ...tensors,
      });
      const [param, state1, state2] = await compute([command], [tensors.param, tensors.state1, tensors.state2]);
      const results = places.map((at) => {
        const pick = (x: Float32Array) => Float32Array.from(at, (place) => x[place]!);
        const g = pick(start.g).map((x) => x * Math.fround(coefficient));
        return REFERENCES[convention]({ p: pick(start.p), g, m: pick(start.m), v: pick(start.v) }, of);
      });
      const compare = (name: string, found: Float32Array, key: "p" | "m" | "v") => {
        const expected = replaced(start[key], results.map((r) => r[key]));
        const between = (x: Float32Array) => replaced(x, places.map((at) => at.map(() => 0)));
        assertEquals(between(found), between(start[key]), `${name} between the tensors, step ${t}`);
        assertClose(found, expected, { nmse: UPDATE, name: `${name}, step ${t}` });
      };
      compare("param", param!, "p");
      compare("state1", state1!, "m");
      compare("state2", state2!, "v");
    }
  });
}

gpuTest("adamw.step32 updates each of 33,001 tensors once", async ({ gpu, input, output, uniform, compute }) => {
  // More blocks than the grid is long, so that it is folded and has workgroups past the end.
  const n = 33_001, op = createAdamw(gpu, "torch");
  const slots = Array.from({ length: n }, (_, i) => ({ name: `${i}`, offset: i, elements: 1, columns: 1, stride: 1 }));
  const param = output("param", { shape: [n], start: wave(n, 1) });
  const state1 = output("state1", { shape: [n], start: new Float32Array(n) });
  const state2 = output("state2", { shape: [n], start: new Float32Array(n) });
  const command = op.step32({
    step: uniform(packStep(step({}), "torch")),
    norm: await input("norm", Float32Array.of(0, 1, 0, 0)),
    grad: await input("grad", wave(n, 2)),
    blocks: (await createBlocks(gpu, { name: "blocks", slots }))!,
    param,
    state1,
    state2,
  });
  const [found] = await compute([command], [param, state1, state2]);
  const zero = () => new Float64Array(n), expected = new Float64Array(wave(n, 1));
  adamw({ p: expected, g: wave(n, 2), m: zero(), v: zero() }, settings(step({})));
  assertClose(found!, expected, { nmse: UPDATE, name: "param" });
});

const MAPS = { signed: dynamicMap(true), unsigned: dynamicMap(false) };
const INTERLEAVED = Float32Array.from({ length: 512 }, (_, i) => (i % 2 ? MAPS.unsigned : MAPS.signed)[i >> 1]!);

/** Gradients of the layout at step `t`: many sizes; one block of zeros; numbers that are not finite from the second step on. */
function gradient(t: number): Float32Array<ArrayBuffer> {
  const g = wave(SIZE, t, { mean: 0.1, scale: 1 }).map((x, i) => x * 10 ** -(i % 7));
  places[0]!.slice(0, BLOCK).forEach((place) => g[place] = t < 3 ? 0 : g[place]!);
  if (t > 1) [NaN, Infinity, -Infinity].forEach((x, i) => g[places[1]![40 * i + t]!] = x);
  return g;
}

gpuTest("adamw.step8 updates and quantizes as bitsandbytes does", async (bench) => {
  const { gpu, input, output, uniform, compute } = bench, op = createAdamw(gpu, "bitsandbytes");
  const table = blockTable(LAYOUT), count = table.length / 4;
  const blocks = await createBlocks(gpu, { name: "blocks", slots: LAYOUT });
  const maps = await input("maps", INTERLEAVED, { shape: [256, 2] });
  const coefficient = Math.fround(0.37), start = wave(SIZE, 1, SMALL);
  // The reference of each tensor, and what the GPU carries from step to step.
  const reference = places.map((at) => {
    const n = at.length, size = Math.ceil(n / BLOCK);
    const state: State8 = {
      codes1: new Uint8Array(n),
      codes2: new Uint8Array(n),
      absmax1: new Float32Array(size),
      absmax2: new Float32Array(size),
    };
    return { p: Float32Array.from(at, (place) => start[place]!), state };
  });
  let carried = {
    param: start as Float32Array<ArrayBuffer>,
    codes1: new Uint8Array(count * BLOCK),
    codes2: new Uint8Array(count * BLOCK),
    absmax: new Float32Array(count * 2),
  };
  for (let t = 1; t <= 5; t++) {
    const of = step({ step: t, eps: 1e-8 }), grad = gradient(t);
    const tensors = {
      param: output("param", { shape: [SIZE], start: carried.param }),
      codes1: output("codes1", { shape: [count, BLOCK], dtype: "u8", start: carried.codes1 }),
      codes2: output("codes2", { shape: [count, BLOCK], dtype: "u8", start: carried.codes2 }),
      absmax: output("absmax", { shape: [count, 2], start: carried.absmax }),
    };
    const command = op.step8({
      step: uniform(packStep(of, "bitsandbytes")),
      norm: await input("norm", Float32Array.of(9, coefficient, 0, 0)),
      grad: await input("grad", grad),
      blocks: blocks!,
      maps,
      ...tensors,
    });
    const { param, codes1, codes2, absmax } = tensors;
    const [p, c1, c2, top] = await compute([command], [param, codes1, codes2, absmax]);
    carried = { param: p!, codes1: new Uint8Array(c1!.buffer), codes2: new Uint8Array(c2!.buffer), absmax: top! };
    let block = 0, moved = 0;
    reference.forEach(({ p, state }, i) => {
      const g = Float32Array.from(places[i]!, (place) => grad[place]! * coefficient);
      adamw8({ p, g, state, maps: MAPS }, settings(of));
      for (let b = 0; b < state.absmax1.length; b++, block++) {
        const name = `block ${b} of ${LAYOUT[i]!.name}, step ${t}`;
        const absmax = carried.absmax.subarray(2 * block, 2 * block + 2);
        assertClose(absmax, [state.absmax1[b]!, state.absmax2[b]!], { max: ROUNDING, name: `absmax of ${name}` });
        for (let j = 0; j < Math.min(BLOCK, p.length - b * BLOCK); j++) {
          for (const [found, wanted] of [[carried.codes1, state.codes1], [carried.codes2, state.codes2]] as const) {
            const off = Math.abs(found[block * BLOCK + j]! - wanted[b * BLOCK + j]!);
            assertLessOrEqual(off, 1, `code ${j} of ${name}`);
            moved += off;
          }
        }
      }
    });
    assertLessOrEqual(moved, gpu.cpu ? 0 : 3, `codes that differ at step ${t}`);
    const expected = replaced(start, reference.map(({ p }) => p));
    assertClose(carried.param, expected, { max: ROUNDING, name: `param, step ${t}` });
  }
});

gpuTest("adamw.step8 leaves parameters alone where the clipped gradient is not finite", async (bench) => {
  const { gpu, input, output, uniform, compute } = bench, op = createAdamw(gpu, "bitsandbytes");
  const slots = [{ name: "a", offset: 0, elements: 300, columns: 300, stride: 300 }];
  const param = output("param", { shape: [300], start: wave(300, 1) });
  const codes1 = output("codes1", { shape: [2, BLOCK], dtype: "u8", start: new Uint8Array(512).fill(200) });
  const codes2 = output("codes2", { shape: [2, BLOCK], dtype: "u8", start: new Uint8Array(512).fill(100) });
  const absmax = output("absmax", { shape: [2, 2], start: new Float32Array(4).fill(1) });
  const command = op.step8({
    step: uniform(packStep(step({}), "bitsandbytes")),
    norm: await input("norm", Float32Array.of(NaN, NaN, 0, 0)),
    grad: await input("grad", wave(300, 2)),
    blocks: (await createBlocks(gpu, { name: "blocks", slots }))!,
    maps: await input("maps", INTERLEAVED, { shape: [256, 2] }),
    param,
    codes1,
    codes2,
    absmax,
  });
  const [p, top] = await compute([command], [param, absmax, codes1, codes2]);
  assertEquals(p, wave(300, 1));
  assertEquals([...top!], [0, 0, 0, 0]);
});

gpuTest("adamw steps give the same wherever tensors and their rows begin", async (bench) => {
  const { gpu, input, output, uniform, compute } = bench;
  // Beside the multiples of 8 of LAYOUT: a path of its own in the kernels.
  const ragged = LAYOUT.map((slot, i) => ({ ...slot, offset: slot.offset + 7 * i + 3, stride: slot.stride + i % 2 }));
  const size = SIZE + 100, coefficient = Math.fround(0.37), elements = places.flat();
  const count = blockTable(LAYOUT).length / 4;
  const maps = await input("maps", INTERLEAVED, { shape: [256, 2] });
  const update = async (slots: typeof LAYOUT, kind: "step32" | "step8") => {
    const at = slots.flatMap(({ offset, elements, columns, stride }) =>
      Array.from({ length: elements }, (_, i) => offset + Math.floor(i / columns) * stride + i % columns)
    );
    const spread = (values: Float32Array) => {
      const out = new Float32Array(size).fill(7);
      elements.forEach((from, i) => out[at[i]!] = values[from]!);
      return out;
    };
    const op = createAdamw(gpu, kind === "step32" ? "torch" : "bitsandbytes");
    const given = {
      step: uniform(packStep(step({ step: 3 }), kind === "step32" ? "torch" : "bitsandbytes")),
      norm: await input("norm", Float32Array.of(9, coefficient, 0, 0)),
      grad: await input("grad", spread(gradient(3))),
      blocks: (await createBlocks(gpu, { name: "blocks", slots }))!,
    };
    const floats = (name: string, values: Float32Array) => output(name, { shape: [size], start: spread(values) });
    const codes = (name: string) =>
      output(name, { shape: [count, BLOCK], dtype: "u8", start: new Uint8Array(count * BLOCK).map((_, i) => i * 37) });
    const param = floats("param", wave(SIZE, 1, SMALL));
    const own = new Set(at);
    const pick = (values: Float32Array) => {
      assert(values.every((x, place) => own.has(place) || x === 7), `${kind} writes between the tensors`);
      return at.map((place) => values[place]!);
    };
    if (kind === "step32") {
      const state1 = floats("state1", wave(SIZE, 3)), state2 = floats("state2", wave(SIZE, 4, { mean: 3, scale: 2.9 }));
      const found = await compute([op.step32({ ...given, param, state1, state2 })], [param, state1, state2]);
      return { floats: found.flatMap(pick), codes: [] };
    }
    const absmax = output("absmax", { shape: [count, 2], start: wave(count * 2, 5, { mean: 0.3, scale: 0.2 }) });
    const state = { codes1: codes("codes1"), codes2: codes("codes2"), absmax, maps };
    const [p, c1, c2, top] = await compute([op.step8({ ...given, param, ...state })], [
      param,
      state.codes1,
      state.codes2,
      absmax,
    ]);
    const bytes = [c1!, c2!].flatMap(({ buffer }) => [...new Uint8Array(buffer)]);
    return { floats: [...pick(p!), ...top!], codes: bytes };
  };
  for (const kind of ["step32", "step8"] as const) {
    const expected = await update(LAYOUT, kind), found = await update(ragged, kind);
    const finite = (x: number) => Number.isFinite(x) ? x : 0;
    assertClose(found.floats.map(finite), expected.floats.map(finite), { max: ROUNDING, name: kind });
    const moved = found.codes.filter((code, i) => code !== expected.codes[i]).length;
    assertLessOrEqual(moved, gpu.cpu ? 0 : 3, "codes that differ");
  }
});

Deno.test("blockTable() refuses padded rows that do not fit into 16 bits", () => {
  const slot = { name: "b", offset: 0, elements: 70_000, columns: 65_000, stride: 70_000 };
  assertThrows(() => blockTable([slot]), RangeError, 'Cannot optimize "b": padded rows of 70000 columns');
  assert(blockTable([{ ...slot, columns: 70_000 }]).length > 0);
});
