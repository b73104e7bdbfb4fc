/** LoRA adapters against PEFT's: initial values and files bit for bit, and what is refused on reading. */
import { createHash } from "node:crypto";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  adapterConfigJson,
  adapterTensors,
  initAdapter,
  type LoraConfig,
  readAdapter,
  saveAdapter,
  scaling,
} from "../../lib/model/adapter.ts";
import { linearModules, readConfig } from "../../lib/model/config.ts";
import { openSafetensors, writeSafetensors } from "../../lib/data/safetensors.ts";
import { rounded } from "../../lib/data/dtype.ts";
import { goldenPath, withFolder } from "../check.ts";

interface Initial {
  readonly seed: number;
  readonly r: number;
  readonly lora_alpha: number;
  readonly target_modules: readonly string[];
  readonly sha256_of_adapter_model: string;
}

const tiny = readConfig(goldenPath("tiny/model_hf"));
const lora: LoraConfig = {
  r: 8,
  lora_alpha: 16,
  lora_dropout: 0,
  target_modules: linearModules,
  use_rslora: false,
  base_model_name_or_path: "model_hf",
};

Deno.test("initAdapter() and saveAdapter() write PEFT's initial adapters byte for byte", async () => {
  const cases: Record<string, Initial> = JSON.parse(Deno.readTextFileSync(goldenPath("initial_adapters.json")));
  assertEquals(Object.keys(cases).length, 4); // all seven modules, and subsets that draw fewer random numbers
  for (const [path, { seed, r, lora_alpha, target_modules, sha256_of_adapter_model }] of Object.entries(cases)) {
    await withFolder(async (dir) => {
      const config = readConfig(goldenPath(`${path.split("/")[0]}/model_hf`));
      const own = { ...lora, r, lora_alpha, target_modules };
      await saveAdapter(dir, own, initAdapter(config, own, seed));
      const file = Deno.readFileSync(`${dir}/adapter_model.safetensors`);
      assertEquals(createHash("sha256").update(file).digest("hex"), sha256_of_adapter_model, path);
    });
  }
});

Deno.test("readAdapter() reads a folder that PEFT wrote", () => {
  const { lora: read, tensors } = readAdapter(goldenPath("tiny/train/initial_adapter_r8"), tiny);
  assertEquals({ ...read, target_modules: [...read.target_modules].sort() }, {
    ...lora,
    target_modules: [...linearModules].sort(),
  });
  assertEquals(tensors, initAdapter(tiny, read, 42));
});

Deno.test("adapterTensors() lists PEFT's names in creation order with A [r, in] and B [out, r]", () => {
  const all = adapterTensors(tiny, lora);
  assertEquals(all.length, 2 * 7 * 2);
  assertEquals(all[0], {
    name: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    module: "q_proj",
    layer: 0,
    kind: "A",
    shape: [8, 64],
  });
  assertEquals(
    all.slice(0, 14).map(({ module, kind }) => module + kind).join(" "),
    [
      "q_projA q_projB k_projA k_projB v_projA v_projB o_projA o_projB",
      "gate_projA gate_projB up_projA up_projB down_projA down_projB",
    ].join(" "),
  );
  assertEquals(all.at(-1)!.shape, [64, 8]);
  const reversed = adapterTensors(tiny, { ...lora, target_modules: ["down_proj", "q_proj"] });
  assertEquals(reversed.slice(0, 4).map(({ module }) => module), ["q_proj", "q_proj", "down_proj", "down_proj"]);
});

Deno.test("an adapter of rank 16 on MedSLM's shape has 7,102,464 parameters in 336 tensors", () => {
  const medslm = {
    ...tiny,
    hidden_size: 1024,
    intermediate_size: 2752,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 64,
    vocab_size: 50257,
  };
  const all = adapterTensors(medslm, { ...lora, r: 16 });
  assertEquals(all.length, 336);
  assertEquals(all.reduce((sum, { shape }) => sum + shape[0] * shape[1], 0), 7_102_464);
});

Deno.test("scaling() is alpha / r, or alpha / sqrt(r) with rsLoRA", () => {
  assertEquals(scaling({ ...lora, r: 16, lora_alpha: 32 }), 2);
  assertEquals(scaling({ ...lora, r: 16, lora_alpha: 32, use_rslora: true }), 8);
});

Deno.test("adapterConfigJson() agrees with PEFT's file in every key that it writes", () => {
  const written = adapterConfigJson(lora);
  const peft = Deno.readTextFileSync(goldenPath("tiny/train/initial_adapter_r8/adapter_config.json"));
  const [own, golden] = [JSON.parse(written), JSON.parse(peft)];
  assertEquals(Object.keys(own), Object.keys(golden).filter((key) => key in own)); // sorted, and none of our own making
  assertEquals(Object.keys(own).length, 20);
  for (const key of Object.keys(own).filter((key) => key !== "target_modules")) {
    assertEquals(own[key], golden[key], key);
  }
  const lines = (text: string) =>
    text.replace(/ *"target_modules": \[[^\]]*\],\n/, "").replaceAll(",\n", "\n").split("\n");
  const known = new Set(lines(peft));
  assertEquals(lines(written).filter((line) => !known.has(line)), []); // so that 0.0 stays a float
  assert(!written.endsWith("\n"));
});

Deno.test("an adapter comes back from bfloat16 rounded once, and from float32 unchanged", async () => {
  await withFolder(async (dir) => {
    const tensors = initAdapter(tiny, lora, 1);
    for (const dtype of ["float32", "bfloat16"] as const) {
      await saveAdapter(dir, lora, tensors, dtype);
      const wanted = dtype === "float32" ? tensors : new Map([...tensors].map(([n, t]) => [n, rounded(t, "BF16")]));
      assertEquals(readAdapter(dir, tiny).tensors, wanted);
    }
  });
});

Deno.test("readAdapter() refuses a missing key, a foreign key and a shape of another model, naming them", async () => {
  const folder = goldenPath("tiny/train/initial_adapter_r8");
  using source = openSafetensors(`${folder}/adapter_model.safetensors`);
  const sinks = [...source.tensors.values()].map(({ name, dtype, shape }) => (
    { name, dtype, shape, data: () => source.read(name) }
  ));
  const last = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
  await withFolder(async (dir) => {
    await Deno.copyFile(`${folder}/adapter_config.json`, `${dir}/adapter_config.json`);
    const path = `${dir}/adapter_model.safetensors`;
    await writeSafetensors(path, sinks.filter(({ name }) => name !== last));
    assertThrows(() => readAdapter(dir), RangeError, `tensor "${last}" is missing`);
    await writeSafetensors(path, [...sinks, { ...sinks[0]!, name: `x.${last}` }]);
    assertThrows(() => readAdapter(dir), RangeError, `tensor "x.${last}" belongs to none`);
    await writeSafetensors(path, []);
    assertThrows(() => readAdapter(dir), RangeError, "it has no tensors");
  });
  const odd = readConfig(goldenPath("odd/model_hf"));
  assertThrows(() => readAdapter(folder, odd), RangeError, "but must be [");
});

Deno.test("readAdapter() refuses a configuration that would compute something else", async () => {
  const folder = goldenPath("tiny/train/initial_adapter_r8");
  const config = JSON.parse(Deno.readTextFileSync(`${folder}/adapter_config.json`));
  await withFolder(async (dir) => {
    await Deno.copyFile(`${folder}/adapter_model.safetensors`, `${dir}/adapter_model.safetensors`);
    const wrong: [Record<string, unknown>, string][] = [
      [{ use_dora: true }, "use_dora is true"],
      [{ bias: "all" }, 'bias is "all"'],
      [{ rank_pattern: { q_proj: 4 } }, 'rank_pattern is {"q_proj":4}'],
      [{ modules_to_save: ["lm_head"] }, 'modules_to_save is ["lm_head"]'],
      [{ target_modules: ".*proj" }, "it must be a list of module names"],
      [{ target_modules: ["lm_head"] }, 'Cannot adapt "lm_head"'],
      [{ r: "8" }, 'r is "8"'],
      [{ r: 4 }, "but must be [4, 64]"],
    ];
    for (const [change, message] of wrong) {
      Deno.writeTextFileSync(`${dir}/adapter_config.json`, JSON.stringify({ ...config, ...change }));
      assertThrows(() => readAdapter(dir), Error, message);
    }
  });
});

Deno.test("a rank of 0, a dropout of 1, no target module and half an adapter are refused", async () => {
  assertThrows(() => adapterTensors(tiny, { ...lora, r: 0 }), RangeError, "Cannot make an adapter of rank 0");
  assertThrows(() => adapterTensors(tiny, { ...lora, lora_dropout: 1 }), RangeError, "with dropout 1");
  assertThrows(() => adapterTensors(tiny, { ...lora, target_modules: [] }), RangeError, "no module at all");
  assertThrows(() => adapterTensors(tiny, { ...lora, target_modules: ["q"] }), RangeError, 'Cannot adapt "q"');
  await withFolder(async (dir) => {
    const tensors = initAdapter(tiny, lora, 1);
    tensors.delete([...tensors.keys()][0]!);
    await assertRejects(() => saveAdapter(dir, lora, tensors), RangeError, "there are 27 tensors, 28 wanted");
  });
});
