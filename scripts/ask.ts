/**
 * Ask: one question to the fine-tuned model, its answer as it is written.
 * The blog's sampling; the prompt is made as the training data were.
 *
 *   deno task ask "What are the symptoms of anemia?"
 *   deno task ask "..." --greedy                                  the most likely token each time
 *   deno task ask "..." --model artifacts/01_convert              before fine-tuning
 *   deno task ask "Anemia is" --raw                               go on from the text as it is
 *
 * reads   artifacts/07_merge/merged_model where it is of the present adapter, else artifacts/01_convert with
 *         artifacts/05_train/adapter (after 02 --mode full: 05_train/model); template.json beside them or in 03_dataset
 * writes  nothing
 */
import { exists } from "../lib/data/files.ts";
import { BLOG_SYSTEM, BLOG_TEMPLATE, type ChatTemplate, chatTemplate, readTemplate } from "../lib/data/template.ts";
import { loadTokenizer, streamDecoder } from "../lib/data/tokenizer.ts";
import { readConfig } from "../lib/model/config.ts";
import { checkPrompt, createGenerator } from "../lib/model/generate.ts";
import { checkSampling } from "../lib/model/sample.ts";
import { byRecipe, checkNumbers, flags, unset } from "../lib/run/flags.ts";
import { count, dim, duration, printable } from "../lib/run/print.ts";
import { checkNotMerged, isMergeOf, trainedBy } from "../lib/run/trained.ts";

const opt = flags(import.meta, {
  model: unset, // model folder; by default what the stages have left, as above
  adapter: unset, // adapter folder; by default the trained one, where the model is the converted one by default
  greedy: false, // take the most likely token instead of drawing one
  raw: false, // no template: the question is the prompt
  temperature: 0.7, // below 1 sharpens, above 1 flattens
  topK: 0, // only the k most likely tokens; 0 for all. Transformers takes 50 unless it is told otherwise
  topP: 0.9, // only the likeliest tokens that make up this probability
  repetitionPenalty: 1.1, // of tokens that have been there, in the prompt too; 1 for none
  maxNewTokens: 300, // length of the answer at most
  seed: byRecipe({ tiny: 42, blog: 3407 }), // of the draws
}, { positional: true, stage: false });
checkNumbers(opt, { whole: { maxNewTokens: 1, seed: 0 } });
checkSampling(opt);
const question = opt._.join(" ");
if (question.trim() === "") {
  throw new Error(
    'Cannot answer: there is no question: ask one, as in deno task ask "What are the symptoms of anemia?"',
  );
}

// 1. The prompt, in the words that the model was trained on.
const { model, adapter } = chooseModel();
if (adapter !== undefined) checkNotMerged(model, adapter);
const config = readConfig(model), tokenizer = loadTokenizer(model);
const prompt = tokenizer.encode(opt.raw ? question : findTemplate().renderPrompt(question));

// 2. The answer. The cache is no larger than it can become.
const context = Math.min(config.max_position_embeddings, prompt.length + Math.max(1, Math.ceil(opt.maxNewTokens)));
checkPrompt(prompt, { vocab: config.vocab_size, context });
const generator = await createGenerator({ model, adapter, batch: 1, context });
console.log(dim("A research model: it errs, and it is not for clinical use."));
console.log(dim(`${adapter === undefined ? model : `${model} with ${adapter}`} answers.`) + "\n");
const text = streamDecoder(tokenizer, { skipSpecialTokens: true });
const asked = performance.now();
let began = asked;
const [answer] = await generator.generate([prompt], {
  ...opt,
  eosIds: [...new Set([tokenizer.eosId, config.eos_token_id ?? tokenizer.eosId])],
  onToken(_, id) {
    if (began === asked) began = performance.now();
    write(text.push(id));
  },
});
write(text.end());

// 3. How long it is and how fast it came; the first token belongs to the reading of the prompt.
const { ids, finished } = answer!, ended = performance.now();
const rate = ids.length > 1 ? `, then ${count((ids.length - 1) / (ended - began) * 1000)} tokens/s` : "";
const cut = ids.length < opt.maxNewTokens ? `the model's ${count(context)} positions` : "--max-new-tokens";
const end = finished ? "" : `, cut off by ${cut}`;
console.log("\n\n" + dim(`${count(ids.length)} tokens, the first after ${duration(began - asked)}${rate}${end}`));
generator.destroy();

/** What is asked for, or what the stages have left. */
function chooseModel(): { model: string; adapter: string | undefined } {
  const converted = "artifacts/01_convert", merged = "artifacts/07_merge/merged_model", run = "artifacts/05_train";
  if (opt.model !== unset) return { model: opt.model, adapter: opt.adapter === unset ? undefined : opt.adapter };
  if (opt.adapter !== unset) return { model: converted, adapter: opt.adapter };
  const trained = trainedBy(run);
  if (trained?.kind === "model") return { model: trained.path, adapter: undefined };
  if (trained !== undefined && !isMergeOf(merged, trained.path)) return { model: converted, adapter: trained.path };
  if (exists(`${merged}/config.json`)) return { model: merged, adapter: undefined };
  throw new Error(
    `Cannot answer: there is neither a finished run in "${run}" nor "${merged}": run "deno task train" first`,
  );
}

/** The template of the training data; the blog's where nothing is known about them. */
function findTemplate(): ChatTemplate {
  const dirs = [...(adapter === undefined ? [] : [adapter]), model, `${model}/..`, "artifacts/03_dataset"];
  const found = dirs.map((dir) => `${dir}/template.json`).find(exists);
  if (found !== undefined) return readTemplate(found);
  return chatTemplate({ template: BLOG_TEMPLATE, system: BLOG_SYSTEM, eos_token: tokenizer.eosToken });
}

/** Writes at once, without a line break. */
function write(piece: string): void {
  const bytes = new TextEncoder().encode(printable(piece));
  for (let at = 0; at < bytes.length;) at += Deno.stdout.writeSync(bytes.subarray(at));
}
