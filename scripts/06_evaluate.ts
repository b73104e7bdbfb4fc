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
import { type Answer, generateAll } from "../lib/model/generate.ts";
import { Llama } from "../lib/model/llama.ts";
import { bootstrapDifference, measurePerplexity, type Perplexity } from "../lib/model/perplexity.ts";
import { tileRows } from "../lib/model/tiles.ts";
import { checkSampling } from "../lib/model/sample.ts";
import { openCache } from "../lib/run/cache.ts";
import { byRecipe, checkNumbers, flags, givenFlags, unset } from "../lib/run/flags.ts";
import { count, percent, progress, table } from "../lib/run/print.ts";
import { barChart, histogram, writeReport } from "../lib/run/report.ts";
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
const WARNING = "This is a research model. It states falsehoods in fluent sentences: it is not for clinical use.";

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
let written = 0, writingMs = 0;
const base = await examine("base", { model: opt.model }, askedIds);
const tuned = await examine("tuned", tunedParts, [...askedIds, ...drawn.map(({ ids }) => ids)]);
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
const lengths: Readonly<Record<string, readonly number[]>> = {
  words: samples.map(({ words }) => words),
  tokens: samples.map(({ ids }) => ids.length),
  "words of references": samples.map(({ reference }) => countWords(reference)),
};
const some = samples.length > 0;
const [length, lengthInTokens, lengthOfReferences] = Object.values(lengths).map((list) => some ? spread(list) : null);
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
  length,
  length_in_tokens: lengthInTokens,
  length_of_references: lengthOfReferences,
  ended_share: some ? samples.filter(({ finished }) => finished).length / samples.length : null,
};
const perDocument = {
  tokens: base.documents.map(({ tokens }) => tokens),
  base_nll: base.documents.map(({ nll }) => nll),
  tuned_nll: tuned.documents.map(({ nll }) => nll),
};
stage.clear();
await writeAtomic(
  `${opt.out}/evaluation.json`,
  json({ ...results, seed: opt.seed, sampling, questions: pairs, samples, documents: perDocument }),
);

// 6. The proof: base and tuned side by side, and how sure the difference is.
const scores = [
  ["", "base", "tuned"],
  ["perplexity", base.perplexity, tuned.perplexity],
  ["loss per token (nats)", base.nllSum / base.tokens, tuned.nllSum / tuned.tokens],
  ["eval_loss (rows weighted)", base.evalLoss, tuned.evalLoss],
  ["labelled tokens", base.tokens, tuned.tokens],
];
const n = `n = ${count(base.documents.length)} ${
  test.metadata.packing === "wrapped" ? "rows" : "documents"
} of the test split`;
const verdict = `Perplexity of the tuned model minus the base's: ${signed(tuned.perplexity - base.perplexity)} (${
  interval === undefined
    ? `${n}: too few for an interval`
    : `${100 * CONFIDENCE} % interval ${signed(interval.low)} to ${signed(interval.high)}, ${n}, drawn again ${
      count(opt.resamples)
    } times`
}).`;
const spreads = [
  [`${samples.length} answers`, "mean", "median", "min", "max"],
  ...Object.entries(lengths).map(([name, list]) => [name, ...some ? Object.values(spread(list)) : []]),
];
const ended = `${percent(results.ended_share ?? 0)} of them ended by themselves.`;
console.log(`\n${table(scores, { header: true })}\n\n${wrap(verdict)}`);
if (some) console.log(`\n${table(spreads, { header: true, align: "lrrrr" })}\n${ended}`);
for (const pair of pairs.slice(0, 3)) {
  console.log(`\n${wrap(`Q: ${pair.question}`)}`);
  console.log(`${wrap(`base: ${pair.base.text}`)}\n${wrap(`tuned: ${pair.tuned.text}`)}`);
}
console.log(`\n${WARNING} See ${opt.out}/report.html`);

// 7. The same as a page.
const bars = [{ name: "base", value: base.perplexity }, { name: "tuned", value: tuned.perplexity }];
await writeReport(`${opt.out}/report.html`, {
  title: "Evaluation",
  sections: [
    {
      heading: "Perplexity on the test split",
      paragraphs: [WARNING, verdict, "Lower is better. eval_loss is what the Hugging Face Trainer reports."],
      charts: [await barChart({ title: "Perplexity", x: "perplexity", y: "", bars })],
      tables: [scores],
    },
    {
      heading: "The same questions, side by side",
      paragraphs: [
        `Sampled with ${Object.entries({ seed: opt.seed, ...sampling }).map((pair) => pair.join(" ")).join(", ")}.`,
      ],
      tables: [[["question", "base", "tuned"], ...pairs.map((p) => [p.question, p.base.text, p.tuned.text])]],
    },
    {
      heading: "Answers to prompts of the test split",
      paragraphs: some ? [ended] : ["No test document has a prompt that fits."],
      charts: some ? [await lengthChart()] : [],
      tables: some
        ? [spreads, [
          ["question", "tuned", "reference", "words"],
          ...samples.map((s) => [questionOf(s.prompt, template), s.text, s.reference, s.words]),
        ]]
        : [],
    },
  ],
});
await stage.done({
  numbers: {
    ...results,
    samples: samples.length,
    generated_tokens_per_second: 1000 * written / writingMs,
  },
  device: base.device,
});

/** Opens a model, measures it on the test rows, lets it answer, and frees the GPU for the next. */
async function examine(
  name: string,
  { model, adapter }: { readonly model: string; readonly adapter?: string },
  prompts: readonly (readonly number[])[],
) {
  const tiles = openCache("tiles");
  const llama = await Llama.open({ model, adapter, tokens, resident: true, tiles });
  await tiles.save();
  if (opt.verbose) console.log(`\n${table(tileRows(llama.tiles), { header: true })}\n`);
  const reading = progress(`${name}: micro-batches of test rows`, batches.length);
  const losses = await measurePerplexity(llama, { batches, rows, onBatch: reading.tick });
  reading.end();

  const bar = progress(`${name}: answers`, prompts.length);
  const began = performance.now();
  const shares = prompts.map(() => 0); // of the most that an answer may have; a short one counts as whole when it ends
  let made = 0;
  const onToken = (prompt: number, id: number) => {
    made++;
    shares[prompt] = id === tokenizer.eosId ? 1 : shares[prompt]! + 1 / opt.maxNewTokens;
    const rate = `${(1000 * made / (performance.now() - began)).toFixed(1)} tokens/s`;
    bar.tick(Math.floor(10 * shares.reduce((sum, share) => sum + share, 0)) / 10, rate);
  };
  const context = Math.min(positions, Math.max(...prompts.map(({ length }) => length)) + opt.maxNewTokens);
  const { sequences: batch, maxNewTokens, greedy, temperature, topP, topK, repetitionPenalty, seed } = opt;
  const answers = await generateAll({
    model: llama,
    batch,
    context,
    eosIds: [tokenizer.eosId],
    onToken,
    maxNewTokens,
    greedy,
    temperature,
    topP,
    topK,
    repetitionPenalty,
    seed,
  }, prompts);
  bar.end();
  written += made;
  writingMs += performance.now() - began;
  llama.destroy();
  return { ...losses, answers: answers.map(decoded), device: llama.gpu.name };
}

/** `ids` are the new tokens, the one that ended the answer included; the text is without it. */
function decoded({ ids, finished }: Answer) {
  const text = tokenizer.decode(ids, { skipSpecialTokens: true });
  return { ids, text, words: countWords(text), finished };
}

function record({ nllSum, tokens, perplexity, evalLoss }: Perplexity) {
  return { nll_sum: nllSum, tokens, perplexity, eval_loss: evalLoss };
}

function lengthChart(): Promise<string> {
  const series = ["words", "words of references"].map((name) => ({ name, values: lengths[name]! }));
  return histogram({ title: "Length of the answers", x: "words", y: "answers", series });
}

/** JSON with lists of numbers on one line. */
function json(value: unknown): string {
  const spaced = JSON.stringify(value, null, 2);
  return spaced.replace(/\[\n[-+\d.e,\s]+\]/g, (list) => list.replace(/\s+/g, " ")) + "\n";
}

function signed(x: number): string {
  return `${x > 0 ? "+" : ""}${x.toFixed(3)}`;
}

/** Lines of at most about 100 columns, cut between words. */
function wrap(text: string): string {
  return text.trim().split("\n").map((line) => line.replace(/(.{1,98})(\s+|$)/g, "$1\n").trimEnd()).join("\n");
}
