/**
 * 07 · Merge: the trained adapter folded into the base, and the adapter alone, each in a folder that is complete.
 * Blog section "Merging & Export"; the formula is W + alpha / r · B·A, LoRA, arXiv:2106.09685.
 *
 *   deno task 07                    onto the weights that stage 01 wrote
 *   deno task 07 --base nf4         onto the 4-bit weights that the adapter was trained on, dequantized
 *   deno task 07 --dtype bfloat16   half the size
 *
 * reads   artifacts/01_convert (or 02_load)  artifacts/05_train/adapter  template.json of the adapter or artifacts/03_dataset
 * writes  artifacts/07_merge/lora_adapters/  merged_model/  manifest.json
 */
import { openSafetensors } from "../lib/data/safetensors.ts";
import { describeAdapter } from "../lib/gpu/device.ts";
import { readAdapter } from "../lib/model/adapter.ts";
import { readConfig } from "../lib/model/config.ts";
import { logitsOf } from "../lib/model/llama.ts";
import { tokenizerFiles } from "../lib/model/medslm.ts";
import { checkLogits, largestDifference, mergeModel } from "../lib/model/merge.ts";
import { isQuantized } from "../lib/model/quantized.ts";
import { choice, flags } from "../lib/run/flags.ts";
import { beginStage } from "../lib/run/manifest.ts";
import { bytes, count, percent, progress, table } from "../lib/run/print.ts";

const opt = flags(import.meta, {
  model: "artifacts/01_convert", // the 16- or 32-bit base
  quantized: "artifacts/02_load", // the 4-bit base, for --base nf4
  adapter: "artifacts/05_train/adapter", // the trained adapter
  base: choice(["original", "nf4"]), // which weights the adapter is added to
  dtype: choice(["float32", "float16", "bfloat16"]), // of the merged weights; float32 is the blog's 1.32 GB
  dataset: "artifacts/03_dataset", // has the template.json, if the adapter's folder has none
});

// 1. What there is: stage 05 leaves a whole model instead of an adapter when it trained all weights.
const whole = [opt.adapter, `${opt.adapter}/../model`].map(clean).find((dir) => exists(`${dir}/config.json`));
if (whole !== undefined && !exists(`${opt.adapter}/adapter_config.json`)) {
  const stage = await beginStage("07_merge", opt, { reads: [whole] });
  console.log(`There is nothing to merge: all weights were trained, and the model is "${whole}"`);
  await stage.done({ numbers: { nothing_to_merge: true, model: whole } });
  Deno.exit(0);
}
const base = opt.base === "nf4" ? opt.quantized : opt.model;
const template = [opt.adapter, opt.dataset].map((dir) => `${dir}/template.json`).find(exists);
const stage = await beginStage("07_merge", opt, { reads: [base, opt.adapter, template ?? ""] });
const [adapterOut, mergedOut] = [`${stage.out}/lora_adapters`, `${stage.out}/merged_model`];
checkBase();

// 2. The weights: every adapted one becomes W + scaling · B·A, the others only change their type.
const bar = progress("merge", 1);
const merged = await mergeModel({
  model: base,
  adapter: opt.adapter,
  out: mergedOut,
  dtype: opt.dtype,
  onTensor: (done, total) => bar.tick(done / total),
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
if (template === undefined) console.log("note: there is no template.json, so neither folder says how to ask");

// 4. What was written. The blog names 17.8 MB for the adapter's folder and 1.32 GB for the merged model.
const { lora } = readAdapter(adapterOut);
console.log(table([
  ["file", "tensors", "parameters", "size", "at 16 bit", "in float32"],
  weights("lora_adapters/adapter_model.safetensors"),
  weights("merged_model/model.safetensors"),
], { header: true }));
console.log(
  `${merged.adapted} of ${merged.tensors} tensors have an update of rank ${lora.r}; ` +
    `the adapter names its base "${lora.base_model_name_or_path}"`,
);

// 5. The proof: the folders just written, read back, against each other. Ids are spread over the vocabulary.
const config = readConfig(mergedOut);
const length = Math.min(32, config.max_position_embeddings);
const inputIds = Array.from({ length }, (_, i) => Math.floor(config.vocab_size * ((0.5 + i * GOLDEN_RATIO) % 1)));
