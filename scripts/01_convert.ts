/**
 * 01 · Convert: a MedSLM checkpoint becomes a folder that LlamaForCausalLM.from_pretrained opens.
 * Blog section "Step 1"; the names differ, the architecture does not. One tensor is in memory at a time.
 *
 *   deno task 01                                      the bundled checkpoint
 *   deno task 01 --recipe blog                        MedSLM from the Hub
 *   deno task 01 --source model.pt --rope interleaved any other, here one whose RoPE rotates adjacent rows
 *
 * reads   a folder or file: safetensors, shards or a PyTorch zip; config.json; tokenizer files
 * writes  artifacts/01_convert/model.safetensors  config.json  generation_config.json  tokenizer files  manifest.json
 */
import { createHash } from "node:crypto";
import { STORED } from "../lib/data/dtype.ts";
import { openModel, writeSafetensors } from "../lib/data/safetensors.ts";
import { loadTokenizer, tokenizerFiles } from "../lib/data/tokenizer.ts";
import { openGpu } from "../lib/gpu/device.ts";
import { fetchRepo } from "../lib/hub/download.ts";
import { checkConfig, configJson, generationConfigJson, type ModelConfig } from "../lib/model/config.ts";
import { logitsRange } from "../lib/model/llama.ts";
import { checkpointInputs, convertTensor, type Mapping, openCheckpoint, planConversion } from "../lib/model/medslm.ts";
import { checkSetting } from "../lib/model/medslm_settings.ts";
import { byRecipe, choice, flags, unset } from "../lib/run/flags.ts";
import { bytes, count, fileBars, progress, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";

const opt = flags(import.meta, {
  source: byRecipe({ tiny: "fixtures/tiny", blog: "hf:Saminx22/MedSLM" }), // folder, file or hf:owner/name[@revision]
  rope: choice(["half", "interleaved"]), // which rows the checkpoint's RoPE pairs: j and j + D/2, or 2j and 2j + 1
  dtype: choice(["float32", "float16", "bfloat16"]), // of the weights written
  hubUrl: unset, // another hub than huggingface.co
  set: [] as string[], // settings that the checkpoint's config.json lacks: rope_theta=10000,n_heads=16
});
const stage = await beginStage("01_convert", opt, { reads: checkpointInputs(opt.source) });

// 1. The checkpoint: what it holds, and what each tensor becomes.
let commit: string | null = null; // of a source on the hub
const path = opt.source.startsWith("hf:") ? await fetchCheckpoint(opt.source) : opt.source;
const checkpoint = openCheckpoint(path);
const { source, folder } = checkpoint;
const given = Object.fromEntries(opt.set.map(setting));
const interleaved = opt.rope === "interleaved";
const conversion = planConversion(checkpoint, { interleaved, dtype: opt.dtype, given });
const { mappings, skipped } = conversion;
const parameters = mappings.reduce((sum, { shape }) => sum + shape.reduce((product, axis) => product * axis, 1), 0);
const notes = [...conversion.notes];

console.log(`${opt.source}: ${count(source.tensors.size)} tensors`);
console.log(
  table([["checkpoint", "Hugging Face", "shape", "tensors", "name by"], ...grouped(mappings)], { header: true }),
);
if (interleaved) notes.push("the rows of q_proj and k_proj are reordered from adjacent pairs to half-split pairs");
notes.push(skipped.length > 0 ? `skipped buffers: ${skipped.join(", ")}` : "no tensor is skipped");

// 2. The tokenizer, and the token ids that belong in config.json.
const copied = tokenizerFiles(folder).map((file) => file.split("/").at(-1)!);
const tokenizerFolder = tokenizerFiles(folder)[0]?.replace(/\/[^/]*$/, "");
const config = withTokens(conversion.config);
stage.clear();
for (const name of copied) await Deno.copyFile(`${tokenizerFolder}/${name}`, `${stage.out}/${name}`);

// 3. The weights, streamed, then the two configuration files.
const digests = new Map<string, string>();
const bar = progress("convert", mappings.length);
await writeSafetensors(
  `${stage.out}/model.safetensors`,
  mappings.map((mapping) => ({
    name: mapping.name,
    dtype: STORED[opt.dtype],
    shape: mapping.shape,
    data: () => {
      const data = convertTensor(source, mapping, STORED[opt.dtype]);
      digests.set(mapping.name, sha256(data));
      bar.tick(digests.size);
      return data;
    },
  })),
);
bar.end();
source.close();
await Deno.writeTextFile(`${stage.out}/config.json`, configJson(config));
await Deno.writeTextFile(`${stage.out}/generation_config.json`, generationConfigJson(config));
for (const note of notes) console.log(`note: ${note}`);

// 4. The proof: every tensor read back is what was written, and the model runs.
const weightBytes = verify(stage.out);
console.log(
  `${count(mappings.length)} tensors, ${count(parameters)} parameters, ${skipped.length} skipped, ${
    bytes(weightBytes)
  }: ` +
    "every tensor reads back as it was written",
);
const length = Math.min(16, config.max_position_embeddings);
const inputIds = Array.from({ length }, (_, i) => (7919 * i + 11) % config.vocab_size);
const { min, max } = await logitsRange(opt.out, inputIds);
console.log(`logits of ${length} fixed tokens lie in [${min.toFixed(2)}, ${max.toFixed(2)}]`);
await stage.done({
  numbers: {
    tensors: mappings.length,
    parameters,
    skipped: skipped.length,
    skipped_tensors: skipped,
    bytes: weightBytes,
    source_commit: commit,
    input_ids: inputIds,
    logits_min: min,
    logits_max: max,
  },
  device: (await openGpu()).name,
});

/** Fetches safetensors, or PyTorch files where a repository has no other, with settings and tokenizer. */
async function fetchCheckpoint(spec: string): Promise<string> {
  const others = ["*.json", "*.jinja", "*merges.txt", "tokenizer/*"];
  const hub = {
    onProgress: fileBars(),
    onRetry: console.error,
    ...(opt.hubUrl === unset ? {} : { hubUrl: opt.hubUrl }),
  };
  const { dir, files, commit: found } = await fetchRepo(spec, { ...hub, files: ["*.safetensors", ...others] });
  commit = found;
  if (files.some(({ path }) => path.endsWith(".safetensors"))) return dir;
  await fetchRepo(spec, { ...hub, files: ["*.pt", "*.pth", "*.ckpt", "*.bin"] });
  return dir;
}

/** End, begin and padding ids: the tokenizer's end of text where there is one, else the checkpoint's own settings. */
function withTokens(base: ModelConfig): ModelConfig {
  if (!copied.includes("tokenizer.json") || !copied.includes("tokenizer_config.json")) {
    const state = copied.length === 0
      ? "no tokenizer, so the result has none"
      : "no tokenizer.json with a tokenizer_config.json";
    notes.push(`the checkpoint has ${state}; token ids are those of its settings: eos ${base.eos_token_id}`);
    return base;
  }
  const tokenizer = loadTokenizer(tokenizerFolder!);
  const eos = tokenizer.eosId;
  if (tokenizer.vocabSize > base.vocab_size) {
    throw new RangeError(
      `Cannot convert "${path}": its tokenizer has ${tokenizer.vocabSize} tokens but the embedding has ${base.vocab_size} rows`,
    );
  }
  if (base.eos_token_id !== null && base.eos_token_id !== eos) {
    notes.push(
      `eos_token_id is ${eos}, the tokenizer's ${tokenizer.eosToken}; the checkpoint's settings say ${base.eos_token_id}`,
    );
  }
  const tokens = { eos_token_id: eos, bos_token_id: base.bos_token_id ?? eos, pad_token_id: base.pad_token_id ?? eos };
  return checkConfig({ ...base, ...tokens }, source.path);
}

/** One row per kind of tensor: the layers of a kind share it. */
function grouped(all: readonly Mapping[]): (string | number)[][] {
  const rows = new Map<string, (string | number)[]>();
  for (const { from, name, shape, how } of all) {
    const row = [from.replace(/\.\d+\./, ".{i}."), name.replace(/\.\d+\./, ".{i}."), `[${shape.join(", ")}]`];
    const key = [...row, how].join("\t");
    rows.set(key, [...row, 1 + Number(rows.get(key)?.[3] ?? 0), how]);
  }
  return [...rows.values()];
}

/** Reads the written file anew and compares each tensor's digest; gives the bytes of all tensors. */
function verify(dir: string): number {
  using written = openModel(dir);
  let total = 0;
  for (const { name, bytes } of written.tensors.values()) {
    if (sha256(written.read(name)) !== digests.get(name)) {
      throw new Error(
        `Cannot verify "${written.path}": tensor "${name}" is not what was written: check the disk and run it again`,
      );
    }
    total += bytes;
  }
  if (written.tensors.size !== mappings.length) {
    throw new Error(`Cannot verify "${written.path}": it has ${written.tensors.size} tensors of ${mappings.length}`);
  }
  return total;
}

function setting(text: string): [string, unknown] {
  const [, key, value] = /^(\w+)=(.+)$/.exec(text) ?? [];
  if (key === undefined) throw new SyntaxError(`Cannot read flag "--set": "${text}" is not of the form name=value`);
  checkSetting(key);
  const word = value!.trim();
  return [
    key,
    word === "true" || word === "false" ? word === "true" : Number.isFinite(Number(word)) ? Number(word) : word,
  ];
}

function sha256(data: Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}
