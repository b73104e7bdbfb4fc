/** Tests of perplexity by document and of the bootstrap. Golden files: fixtures/golden/tiny/train, the Trainer's own eval_loss. */
import { assert, assertAlmostEquals, assertEquals, assertNotEquals, assertRejects, assertThrows } from "@std/assert";
import { IGNORED, nextTokenTargets } from "../../lib/data/dataset.ts";
import { TorchGenerator } from "../../lib/data/random.ts";
import { Llama, type MicroBatch } from "../../lib/model/llama.ts";
import {
  bootstrapDifference,
  evaluate,
  measurePerplexity,
  perplexity,
  sumByDocument,
} from "../../lib/model/perplexity.ts";
import { golden, goldenPath } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";

const run = goldenPath("tiny/train/adamw_torch");
const model = goldenPath("tiny/model_hf");

function evalBatches(): { batches: MicroBatch[]; rows: number[] } {
  const file = golden("tiny/train/micro_batches_bfd.safetensors");
  const about: { eval_batches: { key: string; rows: number }[] } = JSON.parse(
    Deno.readTextFileSync(goldenPath("tiny/train/micro_batches_bfd.json")),
  );
  const batches = about.eval_batches.map(({ key }) => {
    const positionIds = file.i32(`${key}.position_ids`), labels = file.i32(`${key}.labels`);
    return { inputIds: file.i32(`${key}.input_ids`), positionIds, targets: nextTokenTargets({ positionIds, labels }) };
  });
  return { batches, rows: about.eval_batches.map(({ rows }) => rows) };
}

Deno.test({
  name: "measurePerplexity() gives the Trainer's eval_loss of the trained golden adapter, and the loss of its batches",
  ignore,
  async fn() {
    const steps = JSON.parse(Deno.readTextFileSync(`${run}/steps.json`));
    const last = Math.max(...Object.keys(steps.eval_loss).map(Number));
    const { batches, rows } = evalBatches();
    const llama = await Llama.open({ model, adapter: `${run}/final_adapter`, tokens: 256 });
    const ticks: number[] = [];
    const measured = await measurePerplexity(llama, { batches, rows, onBatch: (done) => ticks.push(done) });
    const summed = await evaluate(llama, { batches, rows });
    llama.destroy();
    assertAlmostEquals(summed.evalLoss, measured.evalLoss, 1e-6 * measured.evalLoss);
    assertAlmostEquals(summed.nllSum, measured.nllSum, 1e-6 * measured.nllSum);
    assertEquals(summed.tokens, measured.tokens);
    assertAlmostEquals(measured.evalLoss, steps.eval_loss[last], 2e-5 * steps.eval_loss[last]);
    const counts = batches.map(({ targets }) => Array.from(targets).filter((id) => id !== IGNORED).length);
    const nll = counts.reduce((sum, count, i) => sum + count * steps.eval_batch_losses[last][i], 0);
    assertAlmostEquals(measured.nllSum, nll, 2e-5 * nll);
    assertEquals(measured.tokens, counts.reduce((sum, count) => sum + count, 0));
    assertAlmostEquals(measured.perplexity, Math.exp(nll / measured.tokens), 1e-3);
    assertEquals(ticks, [1, 2, 3, 4, 5]);
  },
});

Deno.test({
  name: "a document has the same loss in a packed batch as alone",
  ignore,
  async fn() {
    const packed = evalBatches().batches[4]!;
    const starts = Array.from(packed.positionIds).flatMap((position, t) => position === 0 ? [t] : []);
    const alone = starts.map((start, d) => {
      const cut = (values: ArrayLike<number>) => Array.from(values).slice(start, starts[d + 1] ?? values.length);
      return {
        inputIds: cut(packed.inputIds),
        positionIds: cut(packed.positionIds),
        targets: cut(packed.targets),
      };
    });
    assert(alone.length > 2);
    const llama = await Llama.open({ model, tokens: 256 });
    const together = await measurePerplexity(llama, { batches: [packed], rows: [2] });
    const apart = await measurePerplexity(llama, { batches: alone, rows: alone.map(() => 1) });
    llama.destroy();
    assertEquals(together.documents.map(({ tokens }) => tokens), apart.documents.map(({ tokens }) => tokens));
    together.documents.forEach(({ nll }, d) => {
      assertAlmostEquals(nll, apart.documents[d]!.nll, 1e-5 * nll);
    });
  },
});

Deno.test({
  name: "measurePerplexity() refuses rows without a labelled token",
  ignore,
  async fn() {
    const llama = await Llama.open({ model, tokens: 256 });
    const batches = [{ inputIds: [1, 2], positionIds: [0, 1], targets: [IGNORED, IGNORED] }];
    await assertRejects(() => measurePerplexity(llama, { batches, rows: [1] }), RangeError, "0 tokens");
    llama.destroy();
  },
});

Deno.test("sumByDocument() gives each value to the document of its token and leaves unlabelled documents out", () => {
  const batch = { positionIds: [0, 1, 2, 0, 1, 0, 1, 2], targets: [5, 6, IGNORED, IGNORED, IGNORED, IGNORED, 0, 8] };
  assertEquals(sumByDocument(batch, [1, 2, 4, 8, 99]), [{ nll: 3, tokens: 2 }, { nll: 12, tokens: 2 }]);
});

Deno.test("perplexity() weights tokens, not documents, and refuses what is no number", () => {
  const { nllSum, tokens, perplexity: value } = perplexity([{ nll: 3, tokens: 1 }, { nll: 3, tokens: 5 }]);
  assertEquals([nllSum, tokens], [6, 6]);
  assertAlmostEquals(value, Math.E, 1e-12);
  assertThrows(() => perplexity([]), RangeError, "Cannot give a perplexity");
  assertThrows(() => perplexity([{ nll: NaN, tokens: 1 }]), RangeError, "NaN");
});

/** Losses of documents of 10 to 19 tokens, and the same documents under a model that is better by `gain` nats a token. */
function twoModels(n: number, gain: number) {
  const noise = new TorchGenerator(7).uniform(3 * n, -1, 1);
  const base = Array.from({ length: n }, (_, d) => ({ tokens: 10 + d % 10, nll: (10 + d % 10) * (2 + noise[d]! / 2) }));
  const tuned = base.map(({ tokens, nll }, d) => ({ tokens, nll: nll - tokens * gain * (1 + noise[n + d]!) }));
  return { base, tuned };
}

Deno.test("the bootstrap's interval is that of the delta method where documents are many", () => {
  const n = 400, { base, tuned } = twoModels(n, 0.3);
  const [before, after] = [perplexity(base), perplexity(tuned)];
  const meanTokens = before.tokens / n;
  // The difference of two smooth functions of ratio means, linear in the documents; both models share the draw.
  const influence = base.map(({ tokens, nll }, d) => {
    const of = ({ nllSum, tokens: all, perplexity }: typeof before, own: number) =>
      perplexity * (own - tokens * nllSum / all) / meanTokens;
    return of(after, tuned[d]!.nll) - of(before, nll);
  });
  const error = Math.sqrt(influence.reduce((sum, x) => sum + x * x, 0)) / n;
  const difference = after.perplexity - before.perplexity;
  const { low, high } = bootstrapDifference({ base, tuned }, { seed: 1, resamples: 4000, confidence: 0.95 })!;
  // 4000 draws settle the ends to about 4 % of a standard error each.
  assertAlmostEquals(low, difference - 1.96 * error, 0.15 * error);
  assertAlmostEquals(high, difference + 1.96 * error, 0.15 * error);
});

Deno.test("the bootstrap repeats with its seed, draws both models alike and needs two documents", () => {
  const { base, tuned } = twoModels(20, 0.3);
  const draw = (seed: number, pair = { base, tuned }) =>
    bootstrapDifference(pair, { seed, resamples: 200, confidence: 0.9 });
  assertEquals(draw(3), draw(3));
  assertNotEquals(draw(3), draw(4));
  assertEquals(draw(3, { base, tuned: base }), { low: 0, high: 0 });
  assertEquals(draw(3, { base: base.slice(0, 1), tuned: tuned.slice(0, 1) }), undefined);
  assertThrows(() => draw(3, { base, tuned: tuned.slice(1) }), RangeError, "same tokens");
  const other = tuned.with(4, { ...tuned[4]!, tokens: 1 });
  assertThrows(() => draw(3, { base, tuned: other }), RangeError, "same tokens");
});
