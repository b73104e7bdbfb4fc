/** Writes what was trained: a PEFT adapter folder, or a whole model folder after full training. */
import { fromFloat32 } from "../data/dtype.ts";
import { openModel, writeSafetensors } from "../data/safetensors.ts";
import { type LoraConfig, saveAdapter } from "./adapter.ts";
import { parameterShapes } from "./config.ts";
import type { Llama } from "./llama.ts";

/** Files of a model folder that are not its weights and go along with it. */
const COMPANIONS =
  /^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|template)\.json$|^merges\.txt$/;

/**
 * Saves the trained parameters of `llama` into `dir`: with `lora` as a PEFT adapter in float32, else as a model in the
 * type of the folder `model`, whose config and tokenizer are copied.
 */
export async function saveTrained(
  llama: Llama,
  { dir, model, lora }: { dir: string; model: string; lora: LoraConfig | undefined },
): Promise<void> {
  await Deno.mkdir(dir, { recursive: true });
  const trained = await llama.parameters();
  if (lora) return await saveAdapter(dir, lora, trained, "float32");
  using source = openModel(model);
  const tensors = parameterShapes(llama.config).map(({ name, shape }) => {
    const dtype = source.tensors.get(name)!.dtype as "F32" | "F16" | "BF16";
    return { name, shape, dtype, data: () => fromFloat32(whole(trained, name), dtype) };
  });
  await writeSafetensors(`${dir}/model.safetensors`, tensors);
  for (const { name } of Deno.readDirSync(model)) {
    if (COMPANIONS.test(name)) await Deno.copyFile(`${model}/${name}`, `${dir}/${name}`);
  }
}

/** A tensor, put together again where it was held in slices. */
function whole(trained: ReadonlyMap<string, Float32Array>, name: string): Float32Array {
  const found = trained.get(name);
  if (found) return found;
  const parts = [...trained].filter(([key]) => key.startsWith(`${name}[`)).map(([, values]) => values);
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** Copies a folder of files (no subfolders) to a new name, whole or not at all. */
export async function copyFolder(from: string, to: string): Promise<void> {
  const partial = `${to}.partial`;
  await Deno.remove(partial, { recursive: true }).catch(() => {});
  await Deno.mkdir(partial, { recursive: true });
  for (const { name, isFile } of Deno.readDirSync(from)) {
    if (isFile) await Deno.copyFile(`${from}/${name}`, `${partial}/${name}`);
  }
  await Deno.rename(partial, to);
}
