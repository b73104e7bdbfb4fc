/** Sampling against transformers' processors and the plain reference, and the draws against the probabilities. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { checkSampling, distribution, NEUTRAL, nextToken, type Sampling } from "../../lib/model/sample.ts";
import { assertClose, golden, goldenPath } from "../check.ts";
import { samplingProbabilities } from "../reference_step.ts";

/** The probabilities of all tokens. */
function spread(
  logits: Float32Array,
  { seen, sampling }: { seen: Iterable<number>; sampling: Sampling },
): Float32Array {
  const { ids, probabilities } = distribution(logits, { seen: new Set(seen), sampling });
  const all = new Float32Array(logits.length);
  ids.forEach((id, i) => all[id] = probabilities[i]!);
  return all;
}

/** Logits in the manner of a language model: few high ones in a long slope, and many ties. */
function logitsOf(count: number, phase: number): Float32Array {
  return Float32Array.from({ length: count }, (_, i) => {
    const noise = Math.sin(12.9898 * i + phase) * 43758.5453 % 1;
    return Math.round((8 * Math.abs(noise) ** 3 - 3) * 64) / 64;
  });
}

for (const config of ["tiny", "odd"]) {
  Deno.test(`distribution() gives transformers' probabilities: ${config}`, () => {
    const file = golden(`${config}/generate_processors.safetensors`);
    const { processor_cases: cases }: {
      processor_cases: { previous_ids: number[]; kept: number; kept_with_topk50: number }[];
    } = JSON.parse(Deno.readTextFileSync(goldenPath(`${config}/generate.json`)));
    assertEquals(cases.length, 6);
    cases.forEach(({ previous_ids: seen, kept, kept_with_topk50 }, i) => {
      for (const [topK, name, count] of [[0, "topp", kept], [50, "topk50_topp", kept_with_topk50]] as const) {
        const sampling = { ...NEUTRAL, repetitionPenalty: 1.1, temperature: 0.7, topK, topP: 0.9 };
        const actual = spread(file.f32(`${i}.logits`), { seen, sampling });
        const expected = file.f32(`${i}.probs_penalty_temperature_${name}`);
        assertEquals(actual.map((p) => p > 0 ? 1 : 0), expected.map((p) => p > 0 ? 1 : 0)); // the same tokens
        assertEquals(actual.filter((p) => p > 0).length, count);
        assertClose(actual, expected, { max: 1e-6, name: `case ${i} ${name}` });
      }
    });
  });
}

Deno.test("distribution() gives the reference's over a large vocabulary, whatever has to be sorted", () => {
  const seen = [5, 9, 9, 40_000];
  for (const [phase, shift, temperature] of [[0, 0, 1], [1, -40, 0.3], [2, 500, 5]] as const) {
    const logits = logitsOf(50_257, phase).map((x) => x + shift);
    for (
      const [topK, topP] of [[0, 1], [0, 0.05], [0, 0.9], [0, 0.9999], [50, 0.9], [50, 1], [20_000, 0.5], [60_000, 1]]
    ) {
      const sampling = { ...NEUTRAL, repetitionPenalty: 1.2, temperature, topK: topK!, topP: topP! };
      const actual = spread(logits, { seen, sampling }),
        expected = samplingProbabilities(logits, { ...sampling, seen });
      const name = `top-k ${topK}, top-p ${topP}, temperature ${temperature}, shift ${shift}`;
      assertEquals(actual.findIndex((p, i) => (p > 0) !== (expected[i]! > 0)), -1, name);
      assertClose(actual, expected, { max: 1e-6, name });
    }
  }
});

Deno.test("top-p keeps the token that crosses and compares in 32 bits; the repetition penalty counts a token once", () => {
  const logits = Float32Array.from([0.4, 0.3, 0.2, 0.1], Math.log);
  const kept = (topP: number) =>
    Array.from(distribution(logits, { seen: new Set(), sampling: { ...NEUTRAL, topP } }).ids);
  assertEquals([kept(0.9), kept(0.5), kept(1e-9), kept(1)], [[0, 1, 2], [0, 1], [0], [0, 1, 2, 3]]);
  const equal = { seen: new Set<number>(), sampling: { ...NEUTRAL, topP: 0.5 } };
  assertEquals(distribution(new Float32Array(5), equal).ids, Uint32Array.of(2, 3, 4)); // what torch was seen to keep
  const sampling = { ...NEUTRAL, repetitionPenalty: 2 };
  const p = spread(Float32Array.from([1, -1, 1, -1]), { seen: [0, 0, 1], sampling });
  assertClose(p.map((x) => Math.log(x / p[2]!)), [-0.5, -3, 0, -2], { max: 1e-6, name: "penalized" });
});

Deno.test("nextToken() draws in proportion, by seed and counters alone", () => {
  const logits = Float32Array.from([0.5, 0.3, 0.15, 0.05], Math.log), counts = [0, 0, 0, 0];
  const draw = (seed: number, sequence: number, step: number) =>
    nextToken(logits, { seen: new Set(), sampling: NEUTRAL, seed, sequence, step });
  const draws = Array.from({ length: 40_000 }, (_, i) => draw(3, i >> 8, i & 255));
  for (const id of draws) counts[id]!++;
  // Five standard deviations.
  [0.5, 0.3, 0.15, 0.05].forEach((p, id) =>
    assert(Math.abs(counts[id]! / 40_000 - p) < 5 * Math.sqrt(p * (1 - p) / 40_000))
  );
  assertEquals(
    draws.slice(1000, 1100),
    Array.from({ length: 100 }, (_, i) => draw(3, (1000 + i) >> 8, (1000 + i) & 255)),
  );
  const differ = (other: number[]) => other.filter((id, i) => id !== draws[i]).length;
  assert(differ(Array.from({ length: 256 }, (_, i) => draw(4, 0, i))) > 100);
  assert(differ(Array.from({ length: 256 }, (_, i) => draw(3, 1, i))) > 100);
});

Deno.test("nextToken() takes the highest score when greedy, the first of several, after the penalty", () => {
  const how = { seed: 0, sequence: 0, step: 0, sampling: { ...NEUTRAL, greedy: true, repetitionPenalty: 1.5 } };
  const logits = Float32Array.from([1, 3, 2.5, 2.5]);
  assertEquals(nextToken(logits, { ...how, seen: new Set() }), 1);
  assertEquals(nextToken(logits, { ...how, seen: new Set([1]) }), 2);
  assertThrows(
    () => nextToken(Float32Array.from([1, NaN, 2]), { ...how, seen: new Set() }),
    RangeError,
    "Cannot choose a token: a logit is not a number",
  );
});

Deno.test("checkSampling() refuses settings without a meaning", () => {
  checkSampling(NEUTRAL);
  checkSampling({ ...NEUTRAL, greedy: true, temperature: 0 });
  const refused: [Partial<Sampling>, string][] = [
    [{ temperature: 0 }, "Cannot use --temperature 0: a number above 0, or --greedy, is wanted"],
    [{ topP: 0 }, "Cannot use --top-p 0: a number above 0 and at most 1 is wanted"],
    [{ topP: 1.1 }, "Cannot use --top-p 1.1: a number above 0 and at most 1 is wanted"],
    [{ topK: -1 }, "Cannot use --top-k -1: a whole number, 0 for all, is wanted"],
    [{ repetitionPenalty: 0 }, "Cannot use --repetition-penalty 0: a number above 0 is wanted"],
  ];
  for (const [change, message] of refused) {
    assertThrows(() => checkSampling({ ...NEUTRAL, ...change }), RangeError, message);
  }
});
