/**
 * reference.ts against central differences, every entry of every input; the update and sampling formulas against torch,
 * bitsandbytes' CUDA formula and transformers; and assertClose() against what it must refuse.
 */
import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { assertClose, golden, goldenPath, nmse, wave } from "./check.ts";
import * as reference from "./reference.ts";
import { adamw, adamw8, adamwCuda, clip, samplingProbabilities } from "./reference_step.ts";

type Inputs = Record<string, Float64Array>;

const inputs = (n: number, phase: number): Float64Array => Float64Array.from(wave(n, phase));

/** Compares `backward` with (L(x + h) − L(x − h)) / 2h for every entry of every input, where L = Σ out · dout. */
function checkBackward<T extends Inputs>(
  name: string,
  { given, forward, backward }: {
    given: T;
    forward: (x: T) => Float64Array;
    backward: (x: T, dout: Float64Array) => Inputs;
  },
): void {
  const dout = inputs(forward(given).length, 3);
  const loss = () => forward(given).reduce((sum, y, i) => sum + y * dout[i]!, 0);
  const analytic = backward(given, dout);
  assertEquals(Object.keys(analytic), Object.keys(given));
  for (const [key, x] of Object.entries(given)) {
    const numeric = x.map((value, i) => {
      const h = 1e-5;
      x[i] = value + h;
      const above = loss();
      x[i] = value - h;
      const below = loss();
      x[i] = value;
      return (above - below) / (2 * h);
    });
    // Found: up to 3e-9 (attention), mostly 1e-10: what central differences in 64 bits give.
    assertClose(analytic[key]!, numeric, { max: 1e-7, name: `${name}: d${key}` });
  }
}

Deno.test("matmulNT, NN and TN agree with a product by hand and with each other", () => {
  const [M, N, K] = [3, 5, 7];
  const x = inputs(M * K, 0), w = inputs(N * K, 1);
  const turn = (a: Float64Array, columns: number) =>
    a.map((_, i) => a[(i % (a.length / columns)) * columns + Math.floor(i / (a.length / columns))]!);
  const [a, b] = [Float64Array.of(1, 2, 3, 4), Float64Array.of(5, 6, 7, 8)];
  assertEquals([...reference.matmulNT(a, b, { M: 2, N: 2, K: 2 })], [17, 23, 39, 53]);
  const out = reference.matmulNT(x, w, { M, N, K });
  assertClose(reference.matmulNN(x, turn(w, K), { M, N, K }), out, { max: 1e-15, name: "NN" });
  assertClose(reference.matmulTN(turn(x, K), turn(w, K), { T: K, M, N }), out, { max: 1e-15, name: "TN" });
});

Deno.test("linear() agrees with finite differences, plain, with an adapter and with dropout", () => {
  const [M, N, K, R] = [5, 4, 7, 3];
  const x = inputs(M * K, 0), w = inputs(N * K, 1), A = inputs(R * K, 2), B = inputs(N * R, 4);
  checkBackward("linear", {
    given: { x },
    forward: ({ x }) => reference.linear(x, w, { M, N, K }),
    backward: ({ x }, dout) => ({ x: reference.linearBackward({ x, w, dout }, { M, N, K }).dx }),
  });
  for (const mask of [undefined, x.map((_, i) => i % 3 === 0 ? 0 : 1.5)]) {
    const shape = (A: Float64Array, B: Float64Array) => ({ M, N, K, lora: { A, B, scaling: 0.7, mask } });
    checkBackward("linear with an adapter", {
      given: { x, A, B },
      forward: ({ x, A, B }) => reference.linear(x, w, shape(A, B)),
      backward: ({ x, A, B }, dout) => {
        const { dx, dA, dB } = reference.linearBackward({ x, w, dout }, shape(A, B));
        return { x: dx, A: dA, B: dB };
      },
    });
  }
});

Deno.test("rmsnorm() agrees with finite differences", () => {
  for (const [rows, C] of [[1, 1], [3, 5], [2, 17]] as const) {
    checkBackward(`rmsnorm [${rows}, ${C}]`, {
      given: { x: inputs(rows * C, 0), weight: inputs(C, 1) },
      forward: ({ x, weight }) => reference.rmsnorm(x, weight, { eps: 0.1 }).out,
      backward: ({ x, weight }, dout) => {
        const { rstd } = reference.rmsnorm(x, weight, { eps: 0.1 });
        const { dx, dweight } = reference.rmsnormBackward({ x, weight, rstd, dout });
        return { x: dx, weight: dweight };
      },
    });
  }
});

Deno.test("rope() agrees with finite differences, keeps lengths, and its inverse turns back", () => {
  const positions = [0, 1, 700, 0, 3], shape = { heads: 3, D: 6, theta: 10000 };
  const x = inputs(5 * 18, 0);
  checkBackward("rope", {
    given: { x },
    forward: ({ x }) => reference.rope(x, positions, shape),
    backward: (_, dout) => ({ x: reference.ropeBackward(dout, positions, shape) }),
  });
  const turned = reference.rope(x, positions, shape);
  assertEquals([...turned.subarray(0, 18)], [...x.subarray(0, 18)]);
  assertClose(reference.ropeBackward(turned, positions, shape), x, { max: 1e-15, name: "turned back" });
});

Deno.test("attention() agrees with finite differences, grouped, causal and packed", () => {
  const D = 3;
  for (const [H, KV] of [[1, 1], [4, 2], [3, 1]] as const) {
    for (const positions of [[0], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 0, 1, 2]]) {
      const start = reference.documentStarts(positions), T = positions.length, shape = { H, KV, D, start };
      checkBackward(`attention ${H}/${KV} heads, ${T} tokens`, {
        given: { q: inputs(T * H * D, 0), k: inputs(T * KV * D, 1), v: inputs(T * KV * D, 2) },
        forward: ({ q, k, v }) => reference.attention({ q, k, v }, shape).out,
        backward: ({ q, k, v }, dout) => {
          const { lse } = reference.attention({ q, k, v }, shape);
          const { dq, dk, dv } = reference.attentionBackward({ q, k, v, lse, dout }, shape);
          return { q: dq, k: dk, v: dv };
        },
      });
    }
  }
});

Deno.test("attention() of one document does not depend on its neighbours", () => {
  const positions = [0, 1, 2, 0, 1, 2, 3, 0, 1], start = reference.documentStarts(positions);
  assertEquals([...start], [0, 0, 0, 3, 3, 3, 3, 7, 7]);
  const [H, KV, D] = [2, 1, 4], T = positions.length;
  const all = { q: inputs(T * H * D, 0), k: inputs(T * KV * D, 1), v: inputs(T * KV * D, 2) };
  const alone = { q: all.q.subarray(3 * 8, 7 * 8), k: all.k.subarray(3 * 4, 7 * 4), v: all.v.subarray(3 * 4, 7 * 4) };
  const packed = reference.attention(all, { H, KV, D, start });
  const single = reference.attention(alone, { H, KV, D, start: [0, 0, 0, 0] });
  assertEquals(packed.out.subarray(3 * 8, 7 * 8), single.out);
  assertEquals(packed.lse.subarray(3 * 2, 7 * 2), single.lse);
  // A first token sees itself alone: its output is v and its log-sum-exp the scaled score.
  assertClose(single.out.subarray(0, 4), alone.v.subarray(0, 4), { max: 1e-15, name: "first token" });
  const own = [0, 1, 2, 3].reduce((sum, d) => sum + alone.q[d]! * alone.k[d]!, 0) / 2;
  assertAlmostEquals(single.lse[0]!, own, 1e-14);
});

Deno.test("swiglu() agrees with finite differences", () => {
  for (const [T, F] of [[1, 1], [3, 5]] as const) {
    checkBackward(`swiglu [${T}, ${F}]`, {
      given: { gateUp: inputs(T * 2 * F, 0) },
      forward: ({ gateUp }) => reference.swiglu(gateUp, F),
      backward: ({ gateUp }, dout) => ({ gateUp: reference.swigluBackward({ gateUp, dout }, F) }),
    });
  }
});

Deno.test("embedding() agrees with finite differences, repeated ids add up, the padding id gets nothing", () => {
  const ids = [4, 0, 4, 2, 4], V = 6, C = 3, table = inputs(V * C, 0);
  checkBackward("embedding", {
    given: { table },
    forward: ({ table }) => reference.embedding(table, ids, C),
    backward: (_, dout) => ({ table: reference.embeddingBackward(dout, ids, { V, C }) }),
  });
  const padded = reference.embeddingBackward(inputs(ids.length * C, 1), ids, { V, C, paddingId: 4 });
  assertEquals([...padded.subarray(4 * C, 5 * C)], [0, 0, 0]);
});

Deno.test("crossEntropy() agrees with finite differences and skips the label -100", () => {
  const labels = [2, -100, 0, 6], V = 7, scale = 0.3;
  checkBackward("crossEntropy", {
    given: { logits: inputs(labels.length * V, 0) },
    forward: ({ logits }) => reference.crossEntropy(logits, labels, { V, scale }).nll,
    backward: ({ logits }, dout) => {
      const { dlogits } = reference.crossEntropy(logits, labels, { V, scale });
      return { logits: dlogits.map((d, i) => d / scale * dout[Math.floor(i / V)]!) };
    },
  });
  const { nll, dlogits } = reference.crossEntropy(new Float64Array(28), labels, { V, scale });
  assertClose(nll, [Math.log(7), 0, Math.log(7), Math.log(7)], { max: 1e-15, name: "uniform" });
  assertEquals([...dlogits.subarray(7, 14)], [0, 0, 0, 0, 0, 0, 0]);
  const shifted = reference.crossEntropy(Float64Array.of(1000, 1000, -1000), [1], { V: 3, scale: 1 });
  assertAlmostEquals(shifted.nll[0]!, Math.log(2), 1e-12); // no overflow
});

Deno.test("clip() multiplies by min(1, maxNorm / (norm + 1e-6))", () => {
  const gradients = [Float64Array.of(3, 0), Float64Array.of(-4)];
  assertEquals(clip(gradients, 1), { norm: 5, coefficient: 1 / 5.000001 });
  assertEquals(clip(gradients, 6).coefficient, 1);
});

/** The twelve steps of the golden optimizer run: `update` gets each step's settings and gradients, `check` the saved ones. */
function replay(
  tensor: string,
  at: { update: (g: Float32Array, o: { step: number; lr: number }) => void; check: (step: number) => void },
): void {
  const file = golden("tiny/adamw.safetensors");
  const run: { lr: number[]; steps_saved: number[]; gradient_of_step: number[] } = JSON.parse(
    Deno.readTextFileSync(goldenPath("tiny/adamw.json")),
  );
  run.lr.forEach((lr, i) => {
    at.update(file.f32(`grad.${run.gradient_of_step[i]}.${tensor}`), { step: i + 1, lr });
    if (run.steps_saved.includes(i + 1)) at.check(i + 1);
  });
}

Deno.test("adamw() gives torch's parameters and moments after twelve steps", () => {
  const file = golden("tiny/adamw.safetensors");
  for (const tensor of ["p10000", "p300"]) {
    const p = Float64Array.from(file.f32(`init.${tensor}`));
    const m = new Float64Array(p.length), v = new Float64Array(p.length);
    // Only step 12: what the full file calls torch.1 and torch.2 are the values of step 12 as well, and left out here.
    replay(tensor, { update: (g, settings) => adamw({ p, g, m, v }, settings), check: () => {} });
    // Found: 4e-7, of torch's rounding to 32 bits.
    for (const [name, actual] of Object.entries({ param: p, exp_avg: m, exp_avg_sq: v })) {
      assertClose(actual, file.f32(`torch.12.${tensor}.${name}`), { max: 2e-6, name: `${tensor} ${name}` });
    }
  }
});

Deno.test("adamwCuda() gives every bit of bitsandbytes' CUDA formula with 32-bit state", () => {
  const file = golden("tiny/adamw.safetensors");
  const p = file.f32("init.p300"), m = new Float32Array(p.length), v = new Float32Array(p.length);
  replay("p300", {
    update: (g, settings) => adamwCuda({ p, g, m, v }, settings),
    check: (step) => {
      assertEquals(p, file.f32(`cuda_formula.${step}.p300.param`));
      assertEquals(m, file.f32(`cuda_formula.${step}.p300.state1`));
      assertEquals(v, file.f32(`cuda_formula.${step}.p300.state2`));
    },
  });
});

/** A parameter with empty 8-bit state and the golden file's maps. */
function begin8(p: Float32Array) {
  const file = golden("tiny/adamw.safetensors"), blocks = Math.ceil(p.length / 256);
  const maps = { signed: file.f32("qmap.signed"), unsigned: file.f32("qmap.unsigned") };
  const state = {
    codes1: new Uint8Array(p.length),
    codes2: new Uint8Array(p.length),
    absmax1: new Float32Array(blocks),
    absmax2: new Float32Array(blocks),
  };
  return { p, state, maps };
}

Deno.test("adamw8() gives every bit of bitsandbytes' CUDA formula with 8-bit state", () => {
  const file = golden("tiny/adamw.safetensors");
  for (const tensor of ["p4096", "p10000"]) { // p10000 ends in a short block and has blocks of zeros and outliers
    const { p, state, maps } = begin8(file.f32(`init.${tensor}`));
    replay(tensor, {
      update: (g, settings) => adamw8({ p, g, state, maps }, settings),
      check: (step) => {
        const name = `cuda_formula.${step}.${tensor}`;
        assertEquals(state.codes1, file.u8(`${name}.codes1`));
        assertEquals(state.codes2, file.u8(`${name}.codes2`));
        assertEquals(state.absmax1, file.f32(`${name}.absmax1`));
        assertEquals(state.absmax2, file.f32(`${name}.absmax2`));
        assertEquals(p, file.f32(`${name}.param`));
      },
    });
  }
});

Deno.test("adamw8() leaves out elements whose gradient is not finite", () => {
  const clean = begin8(wave(300)), spoilt = begin8(wave(300));
  const g = wave(300, 1, { mean: 0.01, scale: 0.02 }), bad = new Float32Array(g);
  bad[7] = NaN;
  bad[299] = -Infinity;
  adamw8({ ...clean, g }, { step: 1, lr: 1e-3 });
  adamw8({ ...spoilt, g: bad }, { step: 1, lr: 1e-3 });
  for (let i = 0; i < 300; i++) {
    assertEquals(spoilt.p[i], i === 7 || i === 299 ? wave(300)[i] : clean.p[i]);
  }
  assertEquals([spoilt.state.codes1[7], spoilt.state.codes2[7]], [127, 0]); // zero in both maps
});

Deno.test("samplingProbabilities() gives transformers' distributions", () => {
  const file = golden("tiny/generate_processors.safetensors");
  const { processor_cases: cases }: { processor_cases: { previous_ids: number[]; kept: number }[] } = JSON.parse(
    Deno.readTextFileSync(goldenPath("tiny/generate.json")),
  );
  cases.forEach(({ previous_ids: seen }, i) => {
    for (const [topK, name] of [[0, "topp"], [50, "topk50_topp"]] as const) {
      const settings = { seen, repetitionPenalty: 1.1, temperature: 0.7, topK, topP: 0.9 };
      const actual = samplingProbabilities(file.f32(`${i}.logits`), settings);
      const expected = file.f32(`${i}.probs_penalty_temperature_${name}`);
      assertEquals(actual.map((p) => p > 0 ? 1 : 0), expected.map((p) => p > 0 ? 1 : 0)); // the same tokens
      assertClose(actual, expected, { max: 1e-6, name: `case ${i} ${name}` });
    }
  });
});

Deno.test("nmse() and assertClose() refuse NaN, stray infinities, other lengths and errors above the bound", () => {
  assertEquals(nmse([0, 0], [0, 0]), 0);
  assertEquals(nmse([0, 1], [0, 0]), Infinity);
  assertEquals(nmse([3, 4], [3, 5]), 1 / 34);
  const bound = { nmse: 1, max: 0.5, name: "x" };
  assertClose([1, -Infinity, 3], [1, -Infinity, 3.5], bound);
  const refused: [number[], number[], string][] = [
    [[1, NaN], [1, 1], "x: NaN at 1"],
    [[1, 1], [1, NaN], "x: the reference is NaN at 1"],
    [[1, Infinity], [1, -Infinity], "x: infinities differ at 1"],
    [[1, 5], [1, Infinity], "x: infinities differ at 1"],
    [[1], [1, 1], "x: 1 values, expected 2"],
    [[1, 2, 9], [1, 2, 3], "x: nmse 2.57e+0 is above 1, worst at 2 of 3"],
    [[1, 2, 1], [1, 2, 3], "x: max 6.67e-1 is above 0.5, worst at 2 of 3"],
    [[1e-30], [0], "x: nmse Infinity is above 1"],
  ];
  for (const [actual, expected, message] of refused) {
    assertThrows(() => assertClose(actual, expected, bound), Error, message);
  }
  assertThrows(() => assertClose([1], [1], { name: "x" }), TypeError, "x: no bound is given");
});
