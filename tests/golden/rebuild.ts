/**
 * Golden files that are not stored because stored ones determine them: made again in a temporary folder. Refuses what it made
 * unless its SHA-256 is that of the file in the full set, so a rebuilt file is the golden file, byte for byte.
 */
import { createHash } from "node:crypto";
import { openModel, type TensorSource, writeSafetensors } from "../../lib/data/safetensors.ts";
import { initAdapter, type LoraConfig, saveAdapter } from "../../lib/model/adapter.ts";
import { readConfig } from "../../lib/model/config.ts";
import { writeQuantizedModel } from "../../lib/model/quantized.ts";
import { goldenPath } from "../check.ts";

const taken: Record<string, { sha256: string }> = readJson("taken.json");
const initial: Record<string, Omit<LoraConfig, "lora_dropout" | "use_rslora"> & Initial> = readJson(
  "initial_adapters.json",
);
const made = new Map<string, string>();
globalThis.addEventListener("unload", () => made.forEach((dir) => Deno.removeSync(dir, { recursive: true })));

interface Initial {
  readonly seed: number;
  readonly sha256_of_adapter_model: string;
}

/** A JSON file of the golden set. */
// deno-lint-ignore no-explicit-any -- the caller knows the file's shape
export function readJson(path: string): any {
  return JSON.parse(Deno.readTextFileSync(goldenPath(path)));
}

/** SHA-256 of a file of the full golden set, stored or not. Throws where taken.json does not name it. */
export function goldenDigest(path: string): string {
  const entry = taken[path];
  if (!entry) throw new Error(`Cannot find the digest of "${path}": taken.json has no such file`);
  return entry.sha256;
}

/** SHA-256 of a file on disk. */
export function digestOf(path: string): string {
  return createHash("sha256").update(Deno.readFileSync(path)).digest("hex");
}

/** The folder of a golden model or initial adapter that is not stored, e.g. `odd/model_4bit`; made once per process. */
export async function rebuilt(path: string): Promise<string> {
  const known = made.get(path);
  if (known) return known;
  const dir = await Deno.makeTempDir({ prefix: "golden" });
  made.set(path, dir);
  const [size, name] = path.split("/") as [string, string];
  if (initial[path]) {
    const { seed, sha256_of_adapter_model, ...settings } = initial[path];
    const lora = { ...settings, lora_dropout: 0, use_rslora: false, base_model_name_or_path: "model_hf" };
    await saveAdapter(dir, lora, initAdapter(readConfig(goldenPath(`${size}/model_hf`)), lora, seed));
    same(`${dir}/adapter_model.safetensors`, { path, sha256: sha256_of_adapter_model });
    return dir;
  }
  const model = goldenPath(`${size}/model_hf`);
  using source = openModel(model);
  if (name === "model_4bit") {
    await writeQuantizedModel({ source, config: readConfig(model), out: dir, doubleQuant: true });
  } else {
    await writeMedslm(source, { path: `${dir}/model.safetensors`, interleaved: name.endsWith("interleaved"), model });
    await Deno.copyFile(goldenPath(`${path}/config.json`), `${dir}/config.json`);
  }
  same(`${dir}/model.safetensors`, { path, sha256: goldenDigest(`${path}/model.safetensors`) });
  return dir;
}

function same(file: string, { path, sha256 }: { path: string; sha256: string }): void {
  if (digestOf(file) !== sha256) {
    throw new Error(`Cannot rebuild "${path}": its bytes are not those of the golden file`);
  }
}

const MEDSLM: readonly (readonly [RegExp, string])[] = [
  [/^model\.embed_tokens/, "tok_emb"],
  [/^model\.norm/, "norm_f"],
  [/^model\.layers/, "blocks"],
  [/input_layernorm/, "norm1"],
  [/post_attention_layernorm/, "norm2"],
  [/self_attn\.(.)_proj/, "attn.w$1"],
  [/mlp\.(gate|up|down)_proj/, "ffn.w_$1"],
];

/** The weights under MedSLM's names; interleaved, rows 2j and 2j+1 of a head of q and k are rows j and D/2+j of the model. */
async function writeMedslm(
  source: TensorSource,
  { path, interleaved, model }: { path: string; interleaved: boolean; model: string },
): Promise<void> {
  const D = readConfig(model).head_dim;
  const stored = (row: number) => row - row % D + Math.floor(row % D / 2) + row % 2 * D / 2;
  await writeSafetensors(
    path,
    [...source.tensors.values()].map(({ name, dtype, shape }) => ({
      name: MEDSLM.reduce((text, [from, to]) => text.replace(from, to), name),
      dtype,
      shape,
      data: () => {
        const bytes = source.read(name), row = bytes.length / shape[0]!;
        if (!interleaved || !/[qk]_proj/.test(name)) return bytes;
        const out = new Uint8Array(bytes.length);
        for (let r = 0; r < shape[0]!; r++) {
          out.set(bytes.subarray(stored(r) * row, (stored(r) + 1) * row), r * row);
        }
        return out;
      },
    })),
  );
}
