/**
 * 07 · Merge: the trained adapter folded into the base, and the adapter alone, each in a folder that is complete.
 * Blog section "Merging & Export"; the formula is W + alpha / r · B·A, LoRA, arXiv:2106.09685.
 *
 *   deno task 07                    onto the weights that stage 01 wrote
 *   deno task 07 --base nf4         onto the 4-bit weights that the adapter was trained on, dequantized
 *   deno task 07 --dtype bfloat16   half the size
 *
 * reads   artifacts/01_convert (02_load for nf4)  artifacts/05_train/adapter  template.json of the adapter or of 03_dataset
 * writes  artifacts/07_merge/lora_adapters/  merged_model/  manifest.json
 */
import { exists } from "../lib/data/files.ts";
import { openModel, openSafetensors } from "../lib/data/safetensors.ts";
import { tokenizerFiles } from "../lib/data/tokenizer.ts";
import { openGpu } from "../lib/gpu/device.ts";
import { readAdapter } from "../lib/model/adapter.ts";
import { parameterShapes, readConfig } from "../lib/model/config.ts";
import { logitsOf } from "../lib/model/llama.ts";
import { checkLogits, largestDifference, mergeModel } from "../lib/model/merge.ts";
import { isQuantized } from "../lib/model/quantized.ts";
import { choice, flags } from "../lib/run/flags.ts";
import { bytes, progress, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";
import { checkNotMerged, trainedAt } from "../lib/run/trained.ts";

const opt = flags(import.meta, {
  model: "artifacts/01_convert", // the 16- or 32-bit base
  quantized: "artifacts/02_load", // the 4-bit base, for --base nf4
  adapter: "artifacts/05_train/adapter", // the trained adapter
  base: choice(["original", "nf4"]), // the weights that the adapter is added to
  dtype: choice(["float32", "float16", "bfloat16"]), // of the merged weights; float32 is the blog's 1.32 GB
  dataset: "artifacts/03_dataset", // where template.json is, if not with the adapter
});

// 1. What there is to merge: when stage 05 trained all weights, it left a whole model.
const trained = trainedAt(opt.adapter);
if (trained.kind === "model") {
  const stage = await beginStage("07_merge", opt, { reads: [trained.path] });
  stage.clear(); // what an earlier merge left is not of this model
  console.log(`There is nothing to merge: all weights were trained, and the model is in "${trained.path}"`);
  await stage.done({ numbers: { nothing_to_merge: true, model: trained.path } });
  Deno.exit(0);
}
const base = opt.base === "nf4" ? opt.quantized : opt.model;
const template = [opt.adapter, opt.dataset].map((dir) => `${dir}/template.json`).find(exists);
const stage = await beginStage("07_merge", opt, { reads: [base, opt.adapter, template ?? ""] });
checkBase();
checkNotMerged(base, opt.adapter);
const config = readConfig(base), { lora } = readAdapter(opt.adapter, config);
stage.clear();

// 2. The weights: each adapted one becomes W + scaling · B·A, the others change their type alone.
const [adapterOut, mergedOut] = [`${stage.out}/lora_adapters`, `${stage.out}/merged_model`];
const bar = progress("merge", parameterShapes(config).length);
const merged = await mergeModel({
  model: base,
  adapter: opt.adapter,
  out: mergedOut,
  dtype: opt.dtype,
  onTensor: bar.tick,
});
bar.end();

// 3. The adapter as it is, and what belongs to both folders.
await Deno.mkdir(adapterOut, { recursive: true });
for (const name of ["adapter_config.json", "adapter_model.safetensors"]) {
  await Deno.copyFile(`${opt.adapter}/${name}`, `${adapterOut}/${name}`);
}
for (const path of [...tokenizerFiles(base), ...(template === undefined ? [] : [template])]) {
  for (const dir of [adapterOut, mergedOut]) await Deno.copyFile(path, `${dir}/${path.split("/").at(-1)}`);
}
if (template === undefined) console.log("note: there is no template.json, so nothing tells how a prompt must look");

// 4. What was written.
const adapterFile = weights("lora_adapters/adapter_model.safetensors");
const mergedFile = weights("merged_model/model.safetensors");
console.log(table([
  ["file", "tensors", "parameters", "size", "at 16 bit", "in float32"],
  ...[adapterFile, mergedFile].map((
    { path, tensors, parameters, size },
  ) => [path, tensors, parameters, bytes(size), bytes(2 * parameters), bytes(4 * parameters)]),
], { header: true }));
if (opt.recipe === "blog") {
  console.log("The blog has 17.8 MB for the adapter, its tokenizer files counted, and 1.32 GB for the merged model.");
}
console.log(
  `${merged.adapted} of ${merged.tensors} tensors got an update of rank ${lora.r}; ` +
    `the adapter calls its base "${lora.base_model_name_or_path}"`,
);

// 5. The proof: both folders read back and compared, on tokens from all over the vocabulary.
const length = Math.min(32, config.max_position_embeddings);
// Multiples of the golden ratio spread evenly, whatever the size of the vocabulary.
const inputIds = Array.from({ length }, (_, i) => Math.floor(config.vocab_size * ((0.5 + 0.618034 * i) % 1)));
const adapted = await logitsOf({ model: base, adapter: adapterOut }, inputIds);
const effect = largestDifference(adapted, await logitsOf({ model: base }, inputIds));
const { difference, largest, bound } = checkLogits(adapted, await logitsOf({ model: mergedOut }, inputIds), opt.dtype);
console.log(
  `Logits of ${length} fixed tokens, merged against ${opt.base === "nf4" ? "4-bit base" : "base"} + adapter: ` +
    `largest difference ${show(difference)}, ${show(difference / largest)} of the largest logit ` +
    `(allowed in ${opt.dtype}: ${bound}); the adapter itself moves them by up to ${show(effect)}`,
);
if (difference > effect / 2) {
  console.log(`note: rounding to ${opt.dtype} costs much of what the adapter does: --dtype float32 keeps it`);
}
await stage.done({
  numbers: {
    max_logit_difference: difference,
    max_logit_difference_relative: difference / largest,
    bound,
    largest_logit: largest,
    adapter_effect: effect, // largest difference between base and base + adapter
    input_ids: inputIds,
    ...merged,
    adapter_tensors: adapterFile.tensors,
    adapter_parameters: adapterFile.parameters,
    adapter_bytes: adapterFile.size,
  },
  device: (await openGpu()).name,
});

/** Merging onto 4-bit weights must be asked for: they are not the model that was converted. */
function checkBase(): void {
  using source = openModel(base);
  if (isQuantized(source) === (opt.base === "nf4")) return;
  throw new Error(
    opt.base === "nf4"
      ? `Cannot merge onto "${base}": its weights are not in 4 bit: merge with --base original`
      : `Cannot merge onto "${base}": its weights are in 4 bit: name the 16-bit model, or merge with --base nf4 --quantized ${base}`,
  );
}

/** What a safetensors file under the output holds. */
function weights(path: string): { path: string; tensors: number; parameters: number; size: number } {
  const file = `${stage.out}/${path}`;
  using source = openSafetensors(file);
  const infos = [...source.tensors.values()];
  const parameters = infos.reduce((sum, { shape }) => sum + shape.reduce((product, axis) => product * axis, 1), 0);
  return { path, tensors: infos.length, parameters, size: Deno.statSync(file).size };
}

function show(x: number): string {
  return x.toPrecision(3);
}
