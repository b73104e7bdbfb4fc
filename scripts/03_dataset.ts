/**
 * 03 · Dataset: question-answer records to token ids, labels and packed rows.
 * Blog section "Load SFT Dataset" and the packing of "Step 4: Training Configuration"; packing and labels as in TRL's SFTTrainer.
 *
 *   deno task 03                                     the bundled questions
 *   deno task 03 --source my.jsonl --loss completion a file of your own, split 90/5/5; only the answers are learnt
 *   deno task 03 --source hf:owner/name              a dataset of the Hugging Face hub
 *
 * reads   artifacts/01_convert (the tokenizer)  fixtures/qa
 * writes  artifacts/03_dataset/{train,validation,test}.safetensors  template.json  statistics.json  manifest.json
 */
import {
  assembleRows,
  documentParts,
  encodeRecord,
  type Example,
  type PackedRows,
  statistics,
  unlearntRows,
  writeRows,
} from "../lib/data/dataset.ts";
import { exists, sha256File, writeJson } from "../lib/data/files.ts";
import { packings, packRows, type Slice } from "../lib/data/packing.ts";
import { placeOf, readSplits, type SftRecord, type Split, splits } from "../lib/data/records.ts";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate } from "../lib/data/template.ts";
import { checkTokenizer, loadTokenizer, tokenizerFiles } from "../lib/data/tokenizer.ts";
import { fetchRepo } from "../lib/hub/download.ts";
import { readConfig } from "../lib/model/config.ts";
import { byRecipe, checkNumbers, choice, flags, unset } from "../lib/run/flags.ts";
import { count, dim, fileBars, percent, printable, progress, table } from "../lib/run/print.ts";
import { beginStage, checkInput } from "../lib/run/stage.ts";

const opt = flags(import.meta, {
  // The blog does not name its dataset: this is the name that goes with its model's, so check it before you rely on it.
  source: byRecipe({ tiny: "fixtures/qa", blog: "hf:Saminx22/MedSLM-SFT-dataset" }), // folder, file or hf:owner/name[@rev]
  validation: unset, // file for validation, if the source has none
  test: unset, // file for test, if the source has none
  tokenizer: "artifacts/01_convert", // folder with tokenizer.json
  maxSeqLength: byRecipe({ tiny: 256, blog: 1024 }), // tokens in a row
  packing: choice(packings), // how documents share rows
  loss: choice(["all", "completion"]), // which tokens are learnt
  template: unset, // FILE.jinja, or "tokenizer" for the tokenizer's own, instead of the blog's
  system: BLOG_SYSTEM, // system prompt; "" for none
  parseSpecial: true, // false: "<|endoftext|>" within a record is plain text
  dropUnlearnt: false, // leave rows without a learnt token out instead of stopping
  limit: 0, // records of each split; 0 for all
  hubUrl: unset, // another hub than huggingface.co, for hf: sources
}, { aliases: { maxLength: "maxSeqLength", packingStrategy: "packing" } });
checkNumbers(opt, { whole: { maxSeqLength: 2, limit: 0 } });
checkInput(opt.tokenizer);
checkTokenizer(opt.tokenizer);
const templateFile = [unset, "tokenizer"].includes(opt.template) ? "" : opt.template;
const needed = `${opt.tokenizer}/tokenizer.json`, modelFile = `${opt.tokenizer}/config.json`;
const others = [...tokenizerFiles(opt.tokenizer), modelFile].filter((path) => path !== needed && exists(path));
const stage = await beginStage("03_dataset", opt, {
  reads: [opt.source, opt.validation, opt.test, templateFile, needed, ...others],
});

// 1. The tokenizer and the template.
const tokenizer = loadTokenizer(opt.tokenizer, { escapes: !opt.parseSpecial });
if (exists(modelFile)) checkModel();
const template = chatTemplate({
  template: readTemplateText(),
  system: opt.system,
  eos_token: tokenizer.eosToken,
  bos_token: tokenizer.bosToken ?? "",
});

// 2. The records of the three splits; what the source lacks is taken out of train.
const hub = opt.source.startsWith("hf:")
  ? await fetchRepo(opt.source, {
    type: "dataset",
    files: ["**.jsonl", "**.json", "**.parquet"],
    onProgress: fileBars(),
    onRetry: console.error,
    ...(opt.hubUrl === unset ? {} : { hubUrl: opt.hubUrl }),
  })
  : undefined;
const { records, files, notes } = await readSplits(hub?.dir ?? opt.source, {
  validation: opt.validation,
  test: opt.test,
  limit: opt.limit > 0 ? opt.limit : Infinity,
});
for (const note of notes) console.log(note);
const inTrain = new Set(records.train.map((record) => JSON.stringify(record)));

// 3. Tokens and labels, then rows.
const numbers: Partial<Record<Split, Record<string, number>>> = {};
const { packing, maxSeqLength: maxLength } = opt;
const packed = new Map<Split, PackedRows>();
for (const split of splits) {
  const examples = encodeAll(split);
  let slices = packRows(examples.map(({ ids }) => ids.length), { packing, maxLength });
  let rows = assembleRows(examples, slices, { packing, metadata: metadata(split) });
  const unlearnt = new Set(unlearntRows(rows));
  if (unlearnt.size > 0) {
    slices = withoutRows(split, slices, unlearnt);
    rows = assembleRows(examples, slices, { packing, metadata: rows.metadata });
  }
  packed.set(split, rows);
  numbers[split] = {
    ...statistics(examples, rows, { packing, maxLength, eosId: tokenizer.eosId }),
    rows_dropped: unlearnt.size,
    examples_also_in_train: split === "train" ? 0 : records[split].filter((r) => inTrain.has(JSON.stringify(r))).length,
  };
}

// 4. The files. What 06 and ask need to make the same prompts is in template.json.
stage.clear();
for (const [split, rows] of packed) await writeRows(`${opt.out}/${split}.safetensors`, rows);
await writeJson(`${opt.out}/template.json`, { ...template.source, eos_token_id: tokenizer.eosId });
await writeJson(`${opt.out}/statistics.json`, numbers);

// 5. What came out, and one example as the model will read it.
const show = (key: string, value: number) => /share|efficiency/.test(key) ? percent(value) : count(value);
console.log(table([
  ["", ...splits],
  ...Object.keys(numbers.train!).map((key) => [
    key.replaceAll("_", " "),
    ...splits.map((split) => show(key, numbers[split]![key]!)),
  ]),
], { header: true, align: "lrrr" }));
const shown = documentParts(packed.get("train")!, tokenizer).map(mark).join("");
const faint = Deno.stdout.isTerminal() ? "faint" : "outside the guillemets";
console.log(`\nThe first document of the first row; what is ${faint} is read but not learnt:\n${shown}`);
await stage.done({ numbers: { ...numbers, ...(hub === undefined ? {} : { source_commit: hub.commit }) } });

function checkModel(): void {
  const config = readConfig(opt.tokenizer);
  if (opt.maxSeqLength > config.max_position_embeddings) {
    const state = `the model of "${opt.tokenizer}" has ${config.max_position_embeddings} positions`;
    throw new RangeError(`Cannot make rows of ${opt.maxSeqLength} tokens: ${state}: use a smaller --max-seq-length`);
  }
  if (tokenizer.vocabSize > config.vocab_size) {
    const state = `it has ${tokenizer.vocabSize} tokens, the model ${config.vocab_size}`;
    throw new RangeError(`Cannot use the tokenizer of "${opt.tokenizer}": ${state}`);
  }
}

function readTemplateText(): string {
  if (opt.template === unset) return BLOG_TEMPLATE;
  if (opt.template !== "tokenizer") return Deno.readTextFileSync(opt.template);
  if (tokenizer.chatTemplate !== undefined) return tokenizer.chatTemplate;
  throw new Error(`Cannot use --template tokenizer: "${opt.tokenizer}" has no chat_template: name a file`);
}

function encodeAll(split: Split): Example[] {
  const bar = progress(`Tokenize ${split}`, records[split].length);
  const encode = (record: SftRecord, i: number) => {
    bar.tick(i);
    try {
      return encodeRecord(record, { tokenizer, template, loss: opt.loss, escape: !opt.parseSpecial });
    } catch (error) {
      const { message } = error as Error;
      throw new Error(`Cannot tokenize ${placeOf(record)}: ${message.replace(/^C/, "c")}`, { cause: error });
    }
  };
  const examples = records[split].map(encode);
  bar.end();
  return examples;
}

function metadata(split: Split): Record<string, string> {
  return {
    packing,
    max_seq_length: String(maxLength),
    loss: opt.loss,
    eos_token_id: String(tokenizer.eosId),
    tokenizer_sha256: sha256File(`${opt.tokenizer}/tokenizer.json`),
    source_sha256: files[split].map(sha256File).join(" "),
  };
}

/** Rows from which nothing would be learnt are an error, or left out with --drop-unlearnt. */
function withoutRows(split: Split, slices: readonly Slice[][], unlearnt: ReadonlySet<number>): Slice[][] {
  const rest = slices.filter((_, r) => !unlearnt.has(r));
  if (opt.dropUnlearnt && (split !== "train" || rest.length > 0)) return rest;
  const first = slices[slices.findIndex((_, r) => unlearnt.has(r))]!, others = unlearnt.size - 1;
  const where = placeOf(records[split][first[0]!.document]!);
  throw new Error(
    `Cannot learn from the row of ${split} that begins with ${where}${
      others > 0 ? `, nor from ${others} more` : ""
    }: ` +
      "all labels are masked, as when a prompt alone fills the row: raise --max-seq-length, mend the record or pass " +
      "--drop-unlearnt",
  );
}

function mark({ learnt, text }: { readonly learnt: boolean; readonly text: string }): string {
  const harmless = printable(text);
  if (Deno.stdout.isTerminal()) return learnt ? harmless : dim(harmless);
  return learnt ? `«${harmless}»` : harmless;
}
