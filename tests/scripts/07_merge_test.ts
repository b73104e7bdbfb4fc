/** 07 as a process: what it writes, how it proves it, and what it refuses. The golden model and PEFT's adapter are merged. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { readConfig } from "../../lib/model/config.ts";
import { goldenPath, temporaryFolder } from "../check.ts";
import { NO_GPU } from "../on_gpu.ts";
import { assertRefused, attempt, readJson, stage } from "./process.ts";

const MODEL = goldenPath("tiny/model_hf"), MODEL_4BIT = goldenPath("tiny/model_4bit");
const ADAPTER = goldenPath("tiny/train/adamw_torch/final_adapter");
const LINE = `--model base --quantized ${MODEL_4BIT} --adapter ${ADAPTER} --dataset data --out out`;

Deno.test("07 writes both folders, proves them by their logits, and says where there is nothing to merge", {
  ignore: NO_GPU,
}, async () => {
  const files = [...Deno.readDirSync(MODEL)].map(({ name }) => [`base/${name}`, Deno.readFileSync(`${MODEL}/${name}`)]);
  using folder = temporaryFolder({
    ...Object.fromEntries(files),
    "base/tokenizer.json": "{}",
    "data/template.json": '{"template":"{{ messages }}"}',
    "trained/model/config.json": "{}",
  });
  const dir = folder.path;

  const { numbers, writes } = await stage(dir, "07_merge", LINE);
  assert(Number(numbers.max_logit_difference_relative) <= 1e-5, `${numbers.max_logit_difference_relative}`);
  assert(Number(numbers.adapter_effect) > 0.1, `${numbers.adapter_effect}`);
  assertEquals(new Set(numbers.input_ids as number[]).size, 32);
  const both = ["adapter_config.json", "adapter_model.safetensors", "template.json", "tokenizer.json"];
  assertEquals(writes.map(({ path }) => path), [
    ...both.map((name) => `lora_adapters/${name}`),
    ...["config.json", "generation_config.json", "model.safetensors", "template.json", "tokenizer.json"]
      .map((name) => `merged_model/${name}`),
  ]);
  for (const name of both.slice(0, 2)) {
    assertEquals(Deno.readFileSync(folder.at(`out/lora_adapters/${name}`)), Deno.readFileSync(`${ADAPTER}/${name}`));
  }
  assertStringIncludes((await attempt(dir, "07_merge", LINE)).out, "07_merge is up to date");

  // What is refused leaves the result as it was.
  const before = readJson(folder.at("out/manifest.json"));
  assertRefused(
    await attempt(dir, "07_merge", `${LINE} --model ${MODEL_4BIT}`),
    /^Cannot merge onto "[^"]*model_4bit": its weights are in 4 bit/,
  );
  assertEquals(readJson(folder.at("out/manifest.json")), before);

  const half = await stage(dir, "07_merge", `${LINE} --base nf4 --dtype bfloat16`);
  assertStringIncludes(half.printed, "merged against 4-bit base + adapter");
  const { max_logit_difference: difference, max_logit_difference_relative: relative, bound } = half.numbers;
  assert(Number(difference) > 1e-3 && Number(relative) < Number(bound), `${difference} ${relative} ${bound}`);
  assertEquals(readConfig(folder.at("out/merged_model")).dtype, "bfloat16");

  // A folder called model is one that stage 05 trained only where its manifest says so.
  const elsewhere = await attempt(dir, "07_merge", `${LINE} --adapter trained/adapter`);
  assertRefused(elsewhere, /^Cannot read "trained\/adapter": no such file or folder\n$/);
  const rest = { flags: {}, seconds: 1, device: null, reads: [], writes: [], numbers: { mode: "full" } };
  Deno.writeTextFileSync(folder.at("trained/manifest.json"), JSON.stringify({ script: "05_train", ...rest }));
  const full = await stage(dir, "07_merge", `${LINE} --adapter trained/adapter`);
  assertMatch(
    full.printed,
    /There is nothing to merge: all weights were trained, and the model is in "trained\/model"/,
  );
  assertEquals([...Deno.readDirSync(folder.at("out"))].map(({ name }) => name), ["manifest.json"]);
});
