/** Writes what was trained: a PEFT adapter folder, or a whole model folder after full training. */
import { fromFloat32 } from "../data/dtype.ts";
import { exists } from "../data/files.ts";
import { openModel, writeSafetensors } from "../data/safetensors.ts";
import { tokenizerFiles } from "../data/tokenizer.ts";
import { type LoraConfig, saveAdapter } from "./adapter.ts";
import { parameterShapes } from "./config.ts";
import type { Llama } from "./llama.ts";

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
  const others = ["config.json", "generation_config.json", "template.json"].map((name) => `${model}/${name}`);
  for (const path of [...others.filter(exists), ...tokenizerFiles(model)]) {
    await Deno.copyFile(path, `${dir}/${path.split("/").at(-1)}`);
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
