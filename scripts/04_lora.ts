/**
 * 04 · LoRA: a fresh adapter on the projections of the loaded model, in PEFT's files.
 * Blog section "Step 3: LoRA Adapter Configuration"; LoRA, arXiv:2106.09685.
 *
 *   deno task 04
 *   deno task 04 --r 32 --alpha 64 --target-modules q_proj,v_proj
 *
 * After 02 --mode full there is nothing to adapt: it says so, and writes the manifest alone.
 *
 * reads   artifacts/02_load
 * writes  artifacts/04_lora/adapter_config.json  adapter_model.safetensors  manifest.json
 */
import { openModel } from "../lib/data/safetensors.ts";
import { openGpu } from "../lib/gpu/device.ts";
import {
  adapterTensors,
  initAdapter,
  type LoraConfig,
  readAdapter,
  saveAdapter,
  scaling,
} from "../lib/model/adapter.ts";
import { rounded, STORED } from "../lib/data/dtype.ts";
import { linearModules, readConfig } from "../lib/model/config.ts";
import { adapterIsNoop } from "../lib/model/llama.ts";
import { countElements } from "../lib/model/quantized.ts";
import { byRecipe, checkNumbers, choice, flags, givenFlags, unset } from "../lib/run/flags.ts";
import { bytes, count, percent, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";
import { readLoad } from "../lib/run/trained.ts";

const opt = flags(import.meta, {
  model: "artifacts/02_load", // the loaded model
  r: 16, // rank
  alpha: 32, // the product B·A is scaled by alpha / r
  dropout: 0, // of the adapter's input while it trains
  targetModules: linearModules, // the projections that get an adapter
  rslora: false, // scale by alpha / sqrt(r) instead
  seed: byRecipe({ tiny: 42, blog: 3407 }), // 3407 is Unsloth's default
  dtype: choice(["float32", "bfloat16"]), // of the adapter file; it trains in float32
  baseModel: unset, // where the 16-bit base will be found, if not where stage 02 read it
});
checkNumbers(opt, { whole: { r: 1, seed: 0 }, real: { alpha: 0, dropout: 0 } });
const stage = await beginStage("04_lora", opt, { reads: [opt.model] });

// 1. What the adapter is for: PEFT must find the 16-bit base, not the 4-bit copy of it.
const load = readLoad(opt.model);
if (load.mode === "full") {
  const asked = givenFlags(opt).filter((flag) => flag !== "--model"), state = "it was loaded with --mode full";
  if (asked.length > 0) {
    throw new Error(
      `Cannot make an adapter for "${opt.model}" with ${asked.join(", ")}: ${state}, which trains all weights: ` +
        'run "deno task 02 --mode qlora" first',
    );
  }
  stage.clear(); // an earlier adapter is not of this model
  console.log(`There is nothing to adapt in "${opt.model}": ${state}, so stage 05 trains all weights.`);
  await stage.done({ numbers: { nothing_to_adapt: true } });
  Deno.exit(0);
}
const config = readConfig(opt.model);
const lora: LoraConfig = {
  r: opt.r,
  lora_alpha: opt.alpha,
  lora_dropout: opt.dropout,
  target_modules: opt.targetModules,
  use_rslora: opt.rslora,
  base_model_name_or_path: opt.baseModel === unset ? load.base : opt.baseModel,
};

// 2. A is random, B is zero. PEFT draws in float32, then moves the layer to its base's dtype, which a 4-bit one has not.
const drawn = initAdapter(config, lora, opt.seed), base16 = load.mode === "lora" && config.dtype !== "float32";
const tensors = base16
  ? new Map([...drawn].map(([name, values]) => [name, rounded(values, STORED[config.dtype])]))
  : drawn;
stage.clear();
await saveAdapter(opt.out, lora, tensors, opt.dtype);

// 3. How much there is to train.
using source = openModel(opt.model);
const base = countElements(source, config);
const trainable = adapterTensors(config, lora).reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
const asBlog = base.storedElements + trainable;
const truly = base.parameters + trainable;
const { size } = await Deno.stat(`${opt.out}/adapter_model.safetensors`);
console.log(table([
  ["Rank, alpha, scaling", `${opt.r}, ${opt.alpha}, ${scaling(lora)}`],
  ["Target modules", opt.targetModules.join(" ")],
  ["Trainable (LoRA)", count(trainable)],
  [
    "of stored elements",
    `${count(asBlog)}: ${percent(trainable / asBlog)} (as the blog counts: a 4-bit weight is half)`,
  ],
  ["of all parameters", `${count(truly)}: ${percent(trainable / truly)}`],
  ["Frozen (base)", count(base.parameters)],
  ["Adapter file", `${bytes(size)}, ${opt.dtype}`],
]));

// 4. The proof: read back, the adapter fits the model, and it changes no bit of the logits, because B is zero.
const written = readAdapter(opt.out, config);
const noop = await adapterIsNoop(opt.model, opt.out); // ← a forward pass with and without the adapter
if (!noop) throw new Error(`Cannot accept "${opt.out}": the fresh adapter changes the logits: B must be zero`);
console.log(`Logits with the fresh adapter of ${written.tensors.size} tensors equal the base's, bit for bit.`);
await stage.done({
  numbers: {
    tensors: written.tensors.size,
    trainable,
    total_as_the_blog_counts: asBlog,
    trainable_share_as_the_blog_counts: trainable / asBlog,
    total: truly,
    trainable_share: trainable / truly,
    scaling: scaling(lora),
    fresh_adapter_is_noop: noop,
  },
  device: (await openGpu()).name,
});
