/**
 * 02 · Load: the converted model in 4 bit, or left as it is for plain LoRA and full fine-tuning.
 * Blog section "Step 2: Load with Unsloth"; NF4 and double quantization: QLoRA, arXiv:2305.14314.
 *
 *   deno task 02                    QLoRA: the projections become NF4
 *   deno task 02 --mode lora        weights stay as stored, an adapter is trained
 *   deno task 02 --mode full        weights stay as stored and are all trained
 *
 * reads   artifacts/01_convert
 * writes  artifacts/02_load/model.safetensors  config.json  tokenizer files  load.json  manifest.json
 */
import { toFloat32 } from "../lib/data/dtype.ts";
import { writeAtomic, writeJson } from "../lib/data/files.ts";
import { NF4_NORMAL_ERROR } from "../lib/data/nf4.ts";
import { openModel } from "../lib/data/safetensors.ts";
import { tokenizerFiles } from "../lib/data/tokenizer.ts";
import { openGpu } from "../lib/gpu/device.ts";
import { generationConfigJson, parameterShapes, readConfig } from "../lib/model/config.ts";
import {
  countElements,
  dequantizeWeight,
  isQuantized,
  quantizedWeights,
  readQuantState,
  writeQuantizedModel,
} from "../lib/model/quantized.ts";
import { choice, flags, givenFlags } from "../lib/run/flags.ts";
import { bytes, count, progress, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";
import { type Load, modes } from "../lib/run/trained.ts";

const opt = flags(import.meta, {
  model: "artifacts/01_convert", // the converted model
  mode: choice(modes), // what stage 05 trains
  dtype: choice(["stored", "float32", "float16", "bfloat16"], { tiny: "stored", blog: "bfloat16" }), // qlora: first round all weights
  doubleQuant: true, // qlora: quantize the scales of the blocks too
});
const idle = opt.mode === "qlora" ? [] : givenFlags(opt); // what is quantized or rounded with qlora alone
if (idle.includes("--dtype") && opt.dtype !== "stored") {
  const remedy = `leave it out, or run "deno task 01 --dtype ${opt.dtype}" first`;
  throw new Error(`Cannot use --dtype with --mode ${opt.mode}: the weights stay as stage 01 stored them: ${remedy}`);
}
if (idle.includes("--double-quant") && opt.doubleQuant) {
  throw new Error(`Cannot use --double-quant with --mode ${opt.mode}: nothing is quantized: leave it out`);
}
const stage = await beginStage("02_load", opt, { reads: [opt.model] });

// 1. The model as stage 01 left it.
const config = readConfig(opt.model);
using source = openModel(opt.model);
if (isQuantized(source)) throw new Error(`Cannot load "${opt.model}": it is in 4 bit already: name the 16-bit model`);
const places = new Set(["lm_head.weight", ...parameterShapes(config).map(({ name }) => name)]); // tied or not
const left = [...source.tensors.keys()].find((name) => !places.has(name) && !name.endsWith(".inv_freq"));
if (left !== undefined) {
  throw new Error(`Cannot load "${opt.model}": config.json has no place for its tensor "${left}": make them agree`);
}
const before = countElements(source, config);
const dtype = opt.dtype === "stored" ? undefined : opt.dtype;
stage.clear();

// 2. The weights: quantized, or the same file under another name.
if (opt.mode === "qlora") {
  await writeQuantizedModel({ source, config, dtype, out: opt.out, doubleQuant: opt.doubleQuant });
} else {
  for (const { name } of Deno.readDirSync(opt.model)) {
    if (/^model.*\.safetensors(\.index\.json)?$/.test(name)) await share(name);
  }
  await Deno.copyFile(`${opt.model}/config.json`, `${opt.out}/config.json`);
}

// 3. What belongs to a model besides its weights, and what stage 05 must know.
await writeAtomic(`${opt.out}/generation_config.json`, generationConfigJson(config));
for (const path of tokenizerFiles(opt.model)) await Deno.copyFile(path, `${opt.out}/${path.split("/").at(-1)}`);
const load: Load = { mode: opt.mode, base: opt.model };
await writeJson(`${opt.out}/load.json`, load);

// 4. The blog's table.
using loaded = openModel(opt.out);
const after = countElements(loaded, config);
const stored = opt.mode === "qlora" ? dtype ?? config.dtype : config.dtype;
const precision = opt.mode !== "qlora"
  ? stored
  : `nf4 in blocks of 64${opt.doubleQuant ? ", double quantized" : ""}; embedding and norms ${stored}`;
const device = (await openGpu()).name;
console.log(table([
  ["Parameters", count(after.parameters)],
  [opt.mode === "qlora" ? "Parameters (4-bit)" : "Stored elements", count(after.storedElements)],
  ["Vocab size", count(config.vocab_size)],
  ["Precision", precision],
  ["GPU", device],
  ["Size of the weights", `${bytes(after.bytes)} (before: ${bytes(before.bytes)})`],
]));
if (opt.mode === "qlora") console.log("A 4-bit parameter counts half above, as in the blog: two share a byte.");

// 5. The proof: what the file holds, dequantized, against the weights that it came from.
const numbers = {
  mode: opt.mode,
  parameters: after.parameters,
  stored_elements: after.storedElements,
  bytes: after.bytes,
  bytes_before: before.bytes,
  vocab_size: config.vocab_size,
  precision,
};
if (opt.mode === "qlora") {
  const errors = relativeErrors();
  const mean = errors.reduce((sum, { error }) => sum + error, 0) / errors.length;
  const worst = errors.reduce((a, b) => b.error > a.error ? b : a);
  console.log(
    `Mean |w - nf4(w)| / sigma over ${errors.length} weights: ${
      mean.toFixed(4)
    } (normal weights: ${NF4_NORMAL_ERROR}); ` +
      `worst ${worst.error.toFixed(4)}, ${worst.name}`,
  );
  await stage.done({
    numbers: {
      ...numbers,
      quantization_error: mean,
      worst_quantization_error: worst.error,
      worst_tensor: worst.name,
    },
    device,
  });
} else {
  if (after.bytes !== before.bytes || after.storedElements !== after.parameters) {
    throw new Error(`Cannot load "${opt.model}": ${after.storedElements} of ${after.parameters} elements are there`);
  }
  console.log(
    `All ${count(after.storedElements)} parameters are there, ${bytes(after.bytes)}, as stage 01 wrote them.`,
  );
  await stage.done({ numbers, device });
}

/** Mean |w - nf4(w)| of every 4-bit weight, in standard deviations of that weight. */
function relativeErrors(): { name: string; error: number }[] {
  const names = [...quantizedWeights(config)];
  const bar = progress("checking", names.length);
  const errors = names.map((name, i) => {
    const exact = toFloat32(source.read(name), source.tensors.get(name)!.dtype);
    const dequantized = dequantizeWeight(readQuantState(loaded, name.slice(0, -".weight".length)));
    let [sum, squares, difference] = [0, 0, 0];
    for (let k = 0; k < exact.length; k++) {
      const w = exact[k]!;
      sum += w;
      squares += w * w;
      difference += Math.abs(w - dequantized[k]!);
    }
    const mean = sum / exact.length;
    const sigma = Math.sqrt(Math.max(0, squares / exact.length - mean * mean));
    bar.tick(i + 1);
    // A matrix of zeros has no sigma and no error.
    return { name, error: difference === 0 ? 0 : difference / exact.length / sigma };
  });
  bar.end();
  return errors;
}

/** Gives the output folder a file of the input without a copy on disk, where the file system can. */
async function share(name: string): Promise<void> {
  const [from, to] = [`${opt.model}/${name}`, `${opt.out}/${name}`];
  await Deno.link(from, to).catch(() => Deno.copyFile(from, to));
}
