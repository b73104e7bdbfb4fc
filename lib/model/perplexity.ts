/**
 * Evaluation of a model over packed rows: its loss as a training run wants it, its perplexity document by document, and how
 * sure the difference of two models is. It compares only what was measured on the same tokens.
 */
import { IGNORED } from "../data/dataset.ts";
import { TorchGenerator } from "../data/random.ts";
import { download } from "../gpu/tensor.ts";
import { type Llama, type MicroBatch, RING } from "./llama.ts";

/** One document: `nll` in nats, summed over its `tokens` labelled tokens. */
export interface DocumentLoss {
  readonly nll: number;
  readonly tokens: number;
}

/** One batch: `nll` in nats, summed over its `tokens` labelled tokens, and the dataset rows that it holds. */
export interface BatchLoss extends DocumentLoss {
  readonly rows: number;
}

/** Losses over the whole of a split, in nats. */
export interface EvaluationResult {
  /** As the Hugging Face Trainer reports it: means of batches, weighted by their rows and not by their tokens. */
  readonly evalLoss: number;
  /** Total over all labelled tokens, and their number. */
  readonly nllSum: number;
  readonly tokens: number;
}

/** The same with `perplexity`, which is `exp(nllSum / tokens)`. */
export interface Perplexity extends EvaluationResult {
  readonly perplexity: number;
}

/** What {@link measurePerplexity} found: the split, and every document that has a labelled token. */
export interface Measured extends Perplexity {
  readonly documents: readonly DocumentLoss[];
}

/** What to evaluate on: batch i holds `rows[i]` dataset rows. */
export interface EvaluationRows {
  readonly batches: readonly MicroBatch[];
  readonly rows: readonly number[];
}

/** A percentile interval. */
export interface Interval {
  readonly low: number;
  readonly high: number;
}

/** The loss of `batches`, summed on the GPU, which is waited for once in `RING` batches. What is not finite stays so. */
export async function evaluate(llama: Llama, { batches, rows }: EvaluationRows): Promise<EvaluationResult> {
  const losses: BatchLoss[] = [];
  for (let first = 0; first < batches.length; first += RING) {
    const counts = batches.slice(first, first + RING).map((batch, slot) => llama.evaluate(batch, slot));
    const sums = await llama.losses();
    counts.forEach((tokens, slot) => losses.push({ nll: sums[slot]!, tokens, rows: rows[first + slot]! }));
  }
  const nllSum = losses.reduce((sum, { nll }) => sum + nll, 0);
  const tokens = losses.reduce((sum, { tokens }) => sum + tokens, 0);
  return { evalLoss: meanByRows(losses), nllSum, tokens };
}

/**
 * The same losses token by token, so that they can be summed by document; waits for the GPU after each batch. Throws an
 * error where nothing is labelled or a loss is not finite.
 */
export async function measurePerplexity(
  llama: Llama,
  { batches, rows, onBatch }: EvaluationRows & { readonly onBatch?: (done: number) => void },
): Promise<Measured> {
  const documents: DocumentLoss[] = [], losses: BatchLoss[] = [];
  for (const [i, batch] of batches.entries()) {
    const tokens = llama.evaluate(batch);
    const found = sumByDocument(
      batch,
      tokens === 0 ? new Float32Array() : await download(llama.gpu, llama.plan.batch.nll),
    );
    documents.push(...found);
    losses.push({ nll: found.reduce((sum, { nll }) => sum + nll, 0), tokens, rows: rows[i]! });
    onBatch?.(i + 1);
  }
  await llama.losses(); // clears the sums, which are not wanted here
  return { ...perplexity(documents), evalLoss: meanByRows(losses), documents };
}

/** The eval_loss of batches: their means, weighted by rows. One without a labelled token has no mean: only its rows count. */
export function meanByRows(batches: readonly BatchLoss[]): number {
  let weighted = 0, allRows = 0;
  for (const { nll, tokens, rows } of batches) {
    if (tokens > 0) weighted += nll / tokens * rows;
    allRows += rows;
  }
  return weighted / allRows;
}

/** Sums `nll`, one value per labelled token in order, over the documents of a batch; those without a label are left out. */
export function sumByDocument(
  { positionIds, targets }: Pick<MicroBatch, "positionIds" | "targets">,
  nll: ArrayLike<number>,
): DocumentLoss[] {
  const documents: { nll: number; tokens: number }[] = [];
  for (let t = 0, labelled = 0; t < targets.length; t++) {
    if (positionIds[t] === 0) documents.push({ nll: 0, tokens: 0 });
    if (targets[t] === IGNORED) continue;
    documents.at(-1)!.nll += nll[labelled++]!;
    documents.at(-1)!.tokens++;
  }
  return documents.filter(({ tokens }) => tokens > 0);
}

/** Perplexity of the documents together; throws when there are none, or when it is no finite number. */
export function perplexity(documents: readonly DocumentLoss[]): Omit<Perplexity, "evalLoss"> {
  let nllSum = 0, tokens = 0;
  for (const document of documents) {
    nllSum += document.nll;
    tokens += document.tokens;
  }
  const value = Math.exp(nllSum / tokens);
  if (!Number.isFinite(value)) {
    throw new RangeError(`Cannot give a perplexity: the losses of ${tokens} tokens sum up to ${nllSum}`);
  }
  return { nllSum, tokens, perplexity: value };
}

/**
 * The interval that holds `confidence` of the differences `tuned - base` in perplexity when the documents are drawn again
 * with replacement, both models on the same draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3).
 * Undefined for fewer than two documents; throws when the two were not measured on the same tokens.
 */
export function bootstrapDifference(
  { base, tuned }: { readonly base: readonly DocumentLoss[]; readonly tuned: readonly DocumentLoss[] },
  { seed, resamples, confidence }: {
    readonly seed: number;
    readonly resamples: number;
    readonly confidence: number;
  },
): Interval | undefined {
  const n = base.length;
  if (tuned.length !== n || base.some(({ tokens }, d) => tokens !== tuned[d]!.tokens)) {
    throw new RangeError(`Cannot compare ${n} documents with ${tuned.length}: both models must read the same tokens`);
  }
  if (n < 2) return undefined;
  const random = new TorchGenerator(seed);
  const differences = new Float64Array(resamples);
  for (let r = 0; r < resamples; r++) {
    let tokens = 0, before = 0, after = 0;
    for (let i = 0; i < n; i++) {
      const d = random.next32() % n;
      tokens += base[d]!.tokens;
      before += base[d]!.nll;
      after += tuned[d]!.nll;
    }
    differences[r] = Math.exp(after / tokens) - Math.exp(before / tokens);
  }
  differences.sort();
  const tail = (1 - confidence) / 2;
  return { low: quantile(differences, tail), high: quantile(differences, 1 - tail) };
}

/** Linear between the neighbours, as numpy's default. */
function quantile(sorted: Float64Array, share: number): number {
  const at = share * (sorted.length - 1), below = Math.floor(at);
  const low = sorted[below]!, high = sorted[Math.min(below + 1, sorted.length - 1)]!;
  return low + (at - below) * (high - low);
}
