/**
 * 06 · Evaluate: the base and the tuned model on the same test rows, and what they answer.
 * Blog section "Evaluation": perplexity, sampled answers, lengths of the answers.
 *
 *   deno task 06
 *   deno task 06 --samples 200 --temperature 1 --top-p 1
 *
 * reads   artifacts/02_load  artifacts/03_dataset  artifacts/05_train/adapter (after 02 --mode full: 05_train/model)
 * writes  artifacts/06_evaluate/evaluation.json  report.html  manifest.json
 */
import { evaluationBatches, readSplit } from "../lib/data/batches.ts";
import { writeAtomic } from "../lib/data/files.ts";
import { readTemplate } from "../lib/data/template.ts";
import { loadTokenizer } from "../lib/data/tokenizer.ts";
import { readAdapter } from "../lib/model/adapter.ts";
import { countWords, drawPrompts, fixedQuestions, questionOf, splitDocuments, spread } from "../lib/model/answers.ts";
import { readConfig } from "../lib/model/config.ts";
import { examine } from "../lib/model/examine.ts";
import { Llama } from "../lib/model/llama.ts";
import { bootstrapDifference, type Perplexity } from "../lib/model/perplexity.ts";
import { tileRows } from "../lib/model/tiles.ts";
import { checkSampling } from "../lib/model/sample.ts";
import { openCache } from "../lib/run/cache.ts";
import { type Comparison, comparisonText, denseJson, writeComparison } from "../lib/run/comparison.ts";
import { byRecipe, checkNumbers, flags, givenFlags, unset } from "../lib/run/flags.ts";
import { count, type Progress, progress, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";
import { checkNotMerged, type Trained, trainedAt } from "../lib/run/trained.ts";

const opt = flags(import.meta, {
  model: "artifacts/02_load", // the base
  adapter: "artifacts/05_train/adapter",
  tuned: unset, // a whole model instead of the adapter; where 05 trained all weights, its model is found without
  dataset: "artifacts/03_dataset",
  batchSize: 4, // rows per micro-batch; eval_loss depends on it, perplexity does not
  resamples: 2000, // of the bootstrap
  samples: byRecipe({ tiny: 8, blog: 50 }), // prompts from the test split
  sequences: byRecipe({ tiny: 8, blog: 16 }), // answers written at once
  maxNewTokens: byRecipe({ tiny: 96, blog: 300 }), // of an answer
  greedy: false, // the most likely token always; temperature, top-p and top-k do not count then
  temperature: 0.7,
  topP: 0.9,
  topK: 0, // 0 = all; transformers takes 50 where nobody asks
  repetitionPenalty: 1.1,
  seed: 42, // of the prompts drawn, the answers and the bootstrap
});
const CONFIDENCE = 0.95;

checkNumbers(opt, { whole: { batchSize: 1, resamples: 1, samples: 0, sequences: 1, maxNewTokens: 1, seed: 0 } });
checkSampling(opt);

// 1. What is compared: one base, with and without the adapter, or two whole models.
if (opt.tuned !== unset && givenFlags(opt).includes("--adapter")) {
  throw new Error(`Cannot compare with --tuned "${opt.tuned}" and --adapter "${opt.adapter}": one of them is wanted`);
}
const trained: Trained = opt.tuned === unset ? trainedAt(opt.adapter) : { kind: "model", path: opt.tuned };
const tunedParts = trained.kind === "adapter" ? { model: opt.model, adapter: trained.path } : { model: trained.path };
const stage = await beginStage("06_evaluate", opt, { reads: [opt.model, opt.dataset, trained.path] });
if (trained.kind === "adapter") checkNotMerged(opt.model, trained.path);
const config = readConfig(opt.model), { max_position_embeddings: positions, vocab_size: vocabulary } = config;
if (trained.kind === "adapter") readAdapter(trained.path, config); // what does not fit is refused before anything is run
else readConfig(trained.path);
if (opt.maxNewTokens >= positions) {
  const state = `the model of "${opt.model}" has ${positions} positions for a prompt and its answer`;
  throw new RangeError(`Cannot use --max-new-tokens ${opt.maxNewTokens}: ${state}: a smaller number is wanted`);
}
const digest = stage.reads.find(({ path }) => path === `${opt.model}/tokenizer.json`)?.sha256;
const test = readSplit("test", { ...opt, tokenizer: digest, vocabulary, positions });
const tokenizer = loadTokenizer(opt.model);
const template = readTemplate(`${opt.dataset}/template.json`);

// 2. The test rows as micro-batches, the same for both.
const { batches, rows, tokens } = evaluationBatches(test, opt.batchSize);

// 3. The prompts: fixed questions for both models, and prompts of the test split for the tuned one.
const documents = splitDocuments(test, tokenizer.eosId);
const longest = positions - opt.maxNewTokens;
const drawn = drawPrompts(documents, { ...opt, tokenizer, template, count: opt.samples, longest });
const questions = fixedQuestions[opt.recipe];
const asked = questions.map((question) => template.renderPrompt(question));
const askedIds = asked.map((prompt) => tokenizer.encode(prompt));
if (drawn.length < opt.samples) {
  const state = `${drawn.length} of ${
    count(documents.length)
  } test documents have a prompt of at most ${longest} tokens`;
  console.log(`${state}: there will be ${drawn.length} answers to describe, not ${opt.samples}.`);
}

// 4. Losses and answers of one model after the other.
const base = await examineModel("base", { model: opt.model }, askedIds);
const tuned = await examineModel("tuned", tunedParts, [...askedIds, ...drawn.map(({ ids }) => ids)]);
const interval = bootstrapDifference({ base: base.documents, tuned: tuned.documents }, {
  ...opt,
  confidence: CONFIDENCE,
});
const pairs = questions.map((question, i) => {
  return { question, prompt: asked[i]!, base: base.answers[i]!, tuned: tuned.answers[i]! };
});
const samples = drawn.map(({ document, text: prompt, reference }, i) => {
  return { document, prompt, ...tuned.answers[questions.length + i]!, reference };
});

// 5. Lengths: words as the blog counts them, tokens with the one that ends the answer.
const described = (values: readonly number[]) => ({ values, spread: spread(values) });
const lengths = samples.length === 0 ? undefined : {
  words: described(samples.map(({ words }) => words)),
  tokens: described(samples.map(({ ids }) => ids.length)),
  "words of references": described(samples.map(({ reference }) => countWords(reference))),
};
const sampling = {
  greedy: opt.greedy,
  temperature: opt.temperature,
  top_p: opt.topP,
  top_k: opt.topK,
  repetition_penalty: opt.repetitionPenalty,
  max_new_tokens: opt.maxNewTokens,
};
const results = {
  base: record(base),
  tuned: record(tuned),
  difference: {
    perplexity: tuned.perplexity - base.perplexity,
    low: interval?.low ?? null,
    high: interval?.high ?? null,
    confidence: CONFIDENCE,
    documents: base.documents.length,
    resamples: opt.resamples,
  },
  length: lengths?.words.spread ?? null,
  length_in_tokens: lengths?.tokens.spread ?? null,
  length_of_references: lengths?.["words of references"].spread ?? null,
  ended_share: lengths ? samples.filter(({ finished }) => finished).length / samples.length : null,
};
const perDocument = {
  tokens: base.documents.map(({ tokens }) => tokens),
  base_nll: base.documents.map(({ nll }) => nll),
  tuned_nll: tuned.documents.map(({ nll }) => nll),
};
stage.clear();
await writeAtomic(
  `${opt.out}/evaluation.json`,
  denseJson({ ...results, seed: opt.seed, sampling, questions: pairs, samples, documents: perDocument }),
);

// 6. The proof: base and tuned side by side, and how sure the difference is; the same as a page.
const comparison: Comparison = {
  base,
  tuned,
  difference: results.difference,
  unit: test.metadata.packing === "wrapped" ? "rows" : "documents",
  pairs: pairs.map(({ question, base, tuned }) => ({ question, base: base.text, tuned: tuned.text })),
  samples: samples.map(({ prompt, text: answer, reference, words }) => {
    return { question: questionOf(prompt, template), answer, reference, words };
  }),
  lengths: lengths ?? {},
  ended: results.ended_share,
  sampling: { seed: opt.seed, ...sampling },
};
console.log(comparisonText(comparison, `${opt.out}/report.html`));
await writeComparison(`${opt.out}/report.html`, comparison);
const written = [base.written, tuned.written];
const rate = written.reduce((sum, { tokens }) => sum + tokens, 0) / written.reduce((sum, { ms }) => sum + ms, 0);
await stage.done({
  numbers: { ...results, samples: samples.length, generated_tokens_per_second: 1000 * rate },
  device: base.device,
});

/** Opens a model and shows how far its examination has come. */
async function examineModel(
  name: string,
  parts: { model: string; adapter?: string },
  prompts: readonly (readonly number[])[],
) {
  const tiles = openCache("tiles");
  const llama = await Llama.open({ ...parts, tokens, resident: true, tiles });
  await tiles.save();
  if (opt.verbose) console.log(`\n${table(tileRows(llama.tiles), { header: true })}\n`);
  const reading = progress(`${name}: micro-batches of test rows`, batches.length);
  let answering: Progress | undefined, began = 0;
  const { maxNewTokens, greedy, temperature, topP, topK, repetitionPenalty, seed } = opt;
  const examined = await examine(llama, prompts, {
    batches,
    rows,
    tokenizer,
    generate: { batch: opt.sequences, maxNewTokens, greedy, temperature, topP, topK, repetitionPenalty, seed },
    onBatch(done) {
      reading.tick(done);
      if (done < batches.length) return;
      reading.end();
      [answering, began] = [progress(`${name}: answers`, prompts.length), performance.now()];
    },
    onToken(answers, made) {
      answering?.tick(answers, `${(1000 * made / (performance.now() - began)).toFixed(1)} tokens/s`);
    },
  });
  answering?.end();
  return examined;
}

function record({ nllSum, tokens, perplexity, evalLoss }: Perplexity) {
  return { nll_sum: nllSum, tokens, perplexity, eval_loss: evalLoss };
}
