/**
 * From logits to the next token, on the CPU, in the order and the 32-bit comparisons of transformers' `generate`: repetition
 * penalty, temperature, top-k, top-p, softmax, draw. Draws depend on the seed and on counters, never on what ran before.
 */
import { hash32 } from "../data/random.ts";

/** How a token is chosen. The neutral values are 1, 1, 0 and 1. */
export interface Sampling {
  /** Take the most likely token; then only the repetition penalty counts. */
  readonly greedy: boolean;
  /** Divides the positive logits of the tokens so far, prompt included, and multiplies the negative ones. */
  readonly repetitionPenalty: number;
  readonly temperature: number;
  /** Only the k highest stay, and what ties with the k-th; 0 for all. */
  readonly topK: number;
  /** Only the smallest set of the highest stays whose probabilities reach p; 1 for all. */
  readonly topP: number;
}

/** The neutral settings: the model's own distribution. */
export const NEUTRAL: Sampling = { greedy: false, repetitionPenalty: 1, temperature: 1, topK: 0, topP: 1 };

/** The tokens that may come next, in ascending order, and their probabilities. */
export interface Distribution {
  readonly ids: readonly number[];
  readonly probabilities: Float32Array;
}

/** Throws `RangeError` where a setting has no meaning. */
export function checkSampling({ greedy, repetitionPenalty, temperature, topK, topP }: Sampling): void {
  const bad = (name: string, value: number, wanted: string) =>
    new RangeError(`Cannot sample with ${name} ${value}: ${wanted} is wanted`);
  if (!(repetitionPenalty > 0)) throw bad("repetition penalty", repetitionPenalty, "a number above 0");
  if (!greedy && !(temperature > 0)) throw bad("temperature", temperature, "a number above 0, or greedy choice");
  if (!Number.isInteger(topK) || topK < 0) throw bad("top-k", topK, "a whole number, 0 for all");
  if (!(topP > 0 && topP <= 1)) throw bad("top-p", topP, "a number above 0 and at most 1");
}

/** The next token after the tokens `seen`; `sequence` and `step` are the counters that the draw hangs on. */
export function nextToken(
  logits: Float32Array,
  { seen, sampling, seed, sequence, step }: {
    seen: ReadonlySet<number>;
    sampling: Sampling;
    seed: number;
    sequence: number;
    step: number;
  },
): number {
  if (sampling.greedy) {
    const scores = penalize(logits, seen, sampling.repetitionPenalty);
    return scores.indexOf(highest(scores));
  }
  const { ids, probabilities } = distribution(logits, { seen, sampling });
  const total = probabilities.reduce((sum, p) => sum + p, 0);
  const point = (hash32(seed, sequence, step) + 0.5) / 2 ** 32 * total;
  let sum = 0;
  const at = probabilities.findIndex((p) => (sum += p) > point);
  return ids.at(at)!;
}

/** The distribution that the next token is drawn from. */
export function distribution(
  logits: Float32Array,
  { seen, sampling }: { seen: ReadonlySet<number>; sampling: Sampling },
): Distribution {
  const { repetitionPenalty, temperature, topK, topP } = sampling;
  const scores = penalize(logits, seen, repetitionPenalty);
  if (temperature !== 1) {
    const divisor = Math.fround(temperature);
    for (let i = 0; i < scores.length; i++) scores[i] = scores[i]! / divisor;
  }
  const max = highest(scores);
  let ids = topK > 0 && topK < scores.length ? keepTopK(scores, { topK, max }) : undefined;
  if (topP < 1) ids = keepTopP(scores, { topP, max, ids });
  ids ??= Array.from(scores.keys());
  const powers = Float64Array.from(ids, (id) => Math.exp(scores[id]! - max));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return { ids, probabilities: Float32Array.from(powers, (power) => power / total) };
}

function penalize(logits: Float32Array, seen: ReadonlySet<number>, penalty: number): Float32Array {
  const scores = logits.slice(), factor = Math.fround(penalty);
  for (const id of seen) scores[id] = scores[id]! < 0 ? scores[id]! * factor : scores[id]! / factor;
  return scores;
}

function highest(scores: Float32Array): number {
  let max = -Infinity;
  for (let i = 0; i < scores.length; i++) {
    if (scores[i]! > max) max = scores[i]!;
    else if (Number.isNaN(scores[i])) throw new RangeError("Cannot choose a token: a logit is not a number");
  }
  if (!Number.isFinite(max)) throw new RangeError(`Cannot choose a token: the highest logit is ${max}`);
  return max;
}

/** Ids whose score is at least the k-th highest. */
function keepTopK(scores: Float32Array, { topK, max }: { topK: number; max: number }): number[] {
  for (let width = 4;; width *= 2) {
    const near = above(scores, max - width);
    if (near.length < topK) continue;
    const kth = Float32Array.from(near, (id) => scores[id]!).sort()[near.length - topK]!;
    return near.filter((id) => scores[id]! >= kth);
  }
}

/**
 * Ids in ascending order without those that, summed from the least likely up, make at most 1 − p. Only the ids near the
 * top are sorted: the mass of the others is summed as it comes, and it must be small enough that all of them go.
 */
function keepTopP(
  scores: Float32Array,
  { topP, max, ids }: { topP: number; max: number; ids: readonly number[] | undefined },
): number[] {
  const spare = Math.fround(1 - topP);
  let total = 0;
  const powers = new Float64Array(scores.length);
  for (let at = 0, count = ids?.length ?? scores.length; at < count; at++) {
    const id = ids ? ids[at]! : at;
    total += powers[id] = Math.exp(scores[id]! - max);
  }
  for (let width = 4;; width *= 2) {
    const bound = max - width, near: number[] = [];
    let mass = 0;
    for (let at = 0, count = ids?.length ?? scores.length; at < count; at++) {
      const id = ids ? ids[at]! : at;
      if (scores[id]! >= bound) near.push(id);
      else mass += powers[id]!;
    }
    if (Math.fround(mass / total) > spare) continue;
    // Among equals torch tends to keep the later ones; the most likely one always stays.
    const ascending = near.toSorted((a, b) => scores[a]! - scores[b]! || a - b);
    let first = 0;
    for (; first < ascending.length - 1; first++) {
      mass += powers[ascending[first]!]!;
      if (Math.fround(mass / total) > spare) break;
    }
    return ascending.slice(first).sort((a, b) => a - b);
  }
}

function above(scores: Float32Array, bound: number): number[] {
  const ids: number[] = [];
  for (let id = 0; id < scores.length; id++) if (scores[id]! >= bound) ids.push(id);
  return ids;
}
