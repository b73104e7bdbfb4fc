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
  readonly ids: Uint32Array;
  readonly probabilities: Float32Array;
}

/** Throws `RangeError` where a setting has no meaning, by the name of its flag. */
export function checkSampling({ greedy, repetitionPenalty, temperature, topK, topP }: Sampling): void {
  const bad = (flag: string, value: number, wanted: string) =>
    new RangeError(`Cannot use ${flag} ${value}: ${wanted} is wanted`);
  if (!(repetitionPenalty > 0)) throw bad("--repetition-penalty", repetitionPenalty, "a number above 0");
  if (!greedy && !(temperature > 0)) throw bad("--temperature", temperature, "a number above 0, or --greedy,");
  if (!Number.isInteger(topK) || topK < 0) throw bad("--top-k", topK, "a whole number, 0 for all,");
  if (!(topP > 0 && topP <= 1)) throw bad("--top-p", topP, "a number above 0 and at most 1");
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
  const point = (hash32(seed, sequence, step) + 0.5) / 2 ** 32;
  let at = 0;
  for (let sum = probabilities[0]!; at < ids.length - 1 && sum <= point; sum += probabilities[at]!) at++;
  return ids[at]!;
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
  let ids: Uint32Array = new Uint32Array(scores.length);
  for (let id = 0; id < ids.length; id++) ids[id] = id;
  if (topK > 0 && topK < ids.length) ids = keepTopK(scores, { topK, max, ids });
  const powers = new Float64Array(scores.length);
  if (topP < 1) ids = keepTopP(scores, { topP, max, ids, powers });
  else powersOf(scores, { max, ids, powers });
  let total = 0;
  for (const id of ids) total += powers[id]!;
  const probabilities = new Float32Array(ids.length);
  for (let i = 0; i < ids.length; i++) probabilities[i] = powers[ids[i]!]! / total;
  return { ids, probabilities };
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

/** The ids whose score is at least the k-th highest. */
function keepTopK(
  scores: Float32Array,
  { topK, max, ids }: { topK: number; max: number; ids: Uint32Array },
): Uint32Array {
  for (let width = 4;; width *= 2) {
    const near = above(scores, ids, max - width);
    if (near.length < topK) continue;
    const kth = scores[ascending(scores, near)[near.length - topK]!]!;
    return above(scores, near, kth);
  }
}

/**
 * The ids without those that, summed from the least likely up, make at most 1 − p. Only the ids near the top are sorted:
 * the others are summed as they come, and their mass must be small enough that all of them go.
 */
function keepTopP(
  scores: Float32Array,
  { topP, max, ids, powers }: { topP: number; max: number; ids: Uint32Array; powers: Float64Array },
): Uint32Array {
  const spare = Math.fround(1 - topP), total = powersOf(scores, { max, ids, powers });
  for (let width = 4;; width *= 2) {
    let mass = 0;
    for (const id of ids) if (scores[id]! < max - width) mass += powers[id]!;
    if (Math.fround(mass / total) > spare) continue;
    // Among equals torch tends to keep the later ones; the most likely one always stays.
    const order = ascending(scores, above(scores, ids, max - width));
    let first = 0;
    for (; first < order.length - 1; first++) {
      mass += powers[order[first]!]!;
      if (Math.fround(mass / total) > spare) break;
    }
    return order.slice(first).sort();
  }
}

/** The ids whose score is at least `bound`. */
function above(scores: Float32Array, ids: Uint32Array, bound: number): Uint32Array {
  const kept = new Uint32Array(ids.length);
  let count = 0;
  for (const id of ids) if (scores[id]! >= bound) kept[count++] = id;
  return kept.subarray(0, count);
}

/** Writes exp(score − max) of each id and returns their sum. */
function powersOf(
  scores: Float32Array,
  { max, ids, powers }: { max: number; ids: Uint32Array; powers: Float64Array },
): number {
  let total = 0;
  for (const id of ids) total += powers[id] = Math.exp(scores[id]! - max);
  return total;
}

/** Room for an id beside the 32 bits of its score in a number that is exact. */
const IDS = 2 ** 20;

/** The ids by ascending score, equals by ascending id: as one number each, because numbers sort without a comparison function. */
function ascending(scores: Float32Array, ids: Uint32Array): Uint32Array {
  const bits = new Uint32Array(scores.buffer, scores.byteOffset, scores.length);
  const keys = new Float64Array(ids.length);
  for (let i = 0; i < ids.length; i++) {
    const word = bits[ids[i]!]!;
    // As whole numbers the bits of floats ascend, those of negative ones descend.
    keys[i] = (word >= 2 ** 31 ? ~word >>> 0 : word + 2 ** 31) * IDS + ids[i]!;
  }
  return Uint32Array.from(keys.sort().map((key) => key % IDS));
}
