/**
 * The merge against PEFT's (golden data made with merge_and_unload), and against the plain formula where PEFT left none.
 * Bounds: 1e-6 for float32 weights, 1e-5 for logits; bfloat16 has to agree bit for bit.
 */
import { assert, assertAlmostEquals, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { fromFloat32, toFloat32 } from "../../lib/data/dtype.ts";
import { openModel, writeSafetensors } from "../../lib/data/safetensors.ts";
import { adapterTensors, type LoraConfig, readAdapter, saveAdapter } from "../../lib/model/adapter.ts";
import {
  configJson,
  linearModules,
  type ModelConfig,
  moduleName,
  parameterShapes,
  readConfig,
} from "../../lib/model/config.ts";
import { addLowRank, checkLogits, mergeModel } from "../../lib/model/merge.ts";
import { dequantizeWeight, isQuantized, quantizedWeights, readQuantState } from "../../lib/model/quantized.ts";
import { assertClose, golden, goldenPath, wave, withFolder } from "../check.ts";
import { llamaForward } from "../reference_llama.ts";

const MODEL = goldenPath("tiny/model_hf"), MODEL_4BIT = goldenPath("tiny/model_4bit");
const ADAPTER = goldenPath("tiny/train/adamw_torch/final_adapter");
const config = readConfig(MODEL);

/** Every tensor of a dense model folder in float32. */
function weightsOf(dir: string): Map<string, Float32Array> {
  using source = openModel(dir);
  return new Map([...source.tensors.values()].map(({ name, dtype }) => [name, toFloat32(source.read(name), dtype)]));
}

/** Writes a model folder in F32 or BF16. */
async function writeModel(
  dir: string,
  { weights, of, dtype = "F32" }: {
    weights: ReadonlyMap<string, Float32Array>;
    of: ModelConfig;
    dtype?: "F32" | "BF16";
  },
): Promise<void> {
  await Deno.mkdir(dir, { recursive: true });
  const shapes = new Map(
    parameterShapes({ ...of, tie_word_embeddings: false }).map(({ name, shape }) => [name, shape]),
  );
  await writeSafetensors(
    `${dir}/model.safetensors`,
    [...weights].map(([name, values]) => (
      { name, dtype, shape: shapes.get(name)!, data: () => fromFloat32(values, dtype) }
    )),
  );
  await Deno.writeTextFile(`${dir}/config.json`, configJson(of));
}

/** An adapter with values everywhere, B too. */
function waves(lora: LoraConfig): Map<string, Float32Array> {
  return new Map(
    adapterTensors(config, lora).map((
      { name, shape },
      i,
    ) => [name, wave(shape[0] * shape[1], i, { mean: 0.01, scale: 0.1 })]),
  );
}

/** W + scale · B·A in the order of the textbook, in float64. */
function plainUpdate(
  weight: Float32Array,
  { a, b, r, scale }: { a: Float32Array; b: Float32Array; r: number; scale: number },
): Float64Array {
  const columns = a.length / r;
  return Float64Array.from(weight, (w, i) => {
    let sum = 0;
    for (let k = 0; k < r; k++) sum += b[Math.floor(i / columns) * r + k]! * a[k * columns + i % columns]!;
    return w + scale * sum;
  });
}

const lora: LoraConfig = {
  r: 8,
  lora_alpha: 16,
  lora_dropout: 0,
  target_modules: linearModules,
  use_rslora: false,
  base_model_name_or_path: "base",
};

Deno.test("mergeModel() gives PEFT's merged weights and its logits", () =>
  withFolder(async (out) => {
    const told: number[] = [];
    const result = await mergeModel({
      model: MODEL,
      adapter: ADAPTER,
      out,
      dtype: "float32",
      onTensor: (n) => told.push(n),
    });
    const [base, merged] = [weightsOf(MODEL), weightsOf(out)];
    assertEquals([...merged.keys()].sort(), parameterShapes(config).map(({ name }) => name).sort());
    assertEquals(readConfig(out), config);
    assertEquals(result, { tensors: 20, adapted: 14, parameters: 117_056, bytes: 468_224 });
    assertEquals(told, Array.from({ length: 20 }, (_, i) => i + 1));
    const expected = golden("tiny/merge/layer0.safetensors");
    for (const name of expected.names) assertClose(merged.get(name)!, expected.f32(name), { max: 1e-6, name });
    const linear = quantizedWeights(config);
    for (const [name, values] of base) if (!linear.has(name)) assertEquals(merged.get(name), values, name);

    const logits = golden("tiny/merge/logits.safetensors"), inputIds = logits.i32("input_ids");
    const tokens = { inputIds, positionIds: inputIds.map((_, t) => t), labels: inputIds };
    const state = llamaForward(config, { weights: merged, tokens });
    assertClose(state.logits, logits.f32("merged_logits"), { max: 1e-5, name: "merged_logits" });
  }));

Deno.test("mergeModel() into a bfloat16 base rounds once, to PEFT's bits", () =>
  withFolder(async (dir) => {
    await writeModel(`${dir}/base`, { weights: weightsOf(MODEL), of: { ...config, dtype: "bfloat16" }, dtype: "BF16" });
    await mergeModel({ model: `${dir}/base`, adapter: ADAPTER, out: `${dir}/out`, dtype: "bfloat16" });
    const merged = weightsOf(`${dir}/out`), expected = golden("tiny/merge/bf16_layer0.safetensors");
    assertEquals(expected.names.length, 2);
    for (const name of expected.names) assertEquals(merged.get(name), expected.f32(name), name);
    assertEquals(readConfig(`${dir}/out`).dtype, "bfloat16");
  }));

Deno.test("mergeModel() onto 4-bit weights adds to their dequantized values and writes a dense model", () =>
  withFolder(async (out) => {
    await mergeModel({ model: MODEL_4BIT, adapter: ADAPTER, out, dtype: "float32" });
    const merged = weightsOf(out), { tensors } = readAdapter(ADAPTER, config);
    using source = openModel(MODEL_4BIT);
    using written = openModel(out);
    assert(!isQuantized(written));
    assertEquals(JSON.parse(Deno.readTextFileSync(`${out}/config.json`)).quantization_config, undefined);
    for (let layer = 0; layer < config.num_hidden_layers; layer++) {
      for (const module of linearModules.map((word) => moduleName(layer, word))) {
        const of = (kind: string) => tensors.get(`base_model.model.${module}.lora_${kind}.weight`)!;
        const expected = plainUpdate(dequantizeWeight(readQuantState(source, module)), {
          a: of("A"),
          b: of("B"),
          r: 8,
          scale: 2,
        });
        assertClose(merged.get(`${module}.weight`)!, expected, { max: 1e-7, name: module });
      }
    }
    assertEquals(merged.get("model.embed_tokens.weight"), weightsOf(MODEL).get("model.embed_tokens.weight"));
  }));

Deno.test("mergeModel() scales by alpha / sqrt(r) for rsLoRA, at rank 43, and leaves modules alone that are no target", () =>
  withFolder(async (dir) => {
    const some: LoraConfig = {
      ...lora,
      r: 43,
      lora_alpha: 20,
      use_rslora: true,
      target_modules: ["v_proj", "down_proj"],
    };
    const tensors = waves(some);
    await saveAdapter(`${dir}/adapter`, some, tensors);
    await mergeModel({ model: MODEL, adapter: `${dir}/adapter`, out: `${dir}/out`, dtype: "float32" });
    const merged = weightsOf(`${dir}/out`);
    for (const [name, values] of weightsOf(MODEL)) {
      if (!/(v|down)_proj/.test(name)) {
        assertEquals(merged.get(name), values, name);
        continue;
      }
      const of = (kind: string) => tensors.get(`base_model.model.${name.replace(".weight", `.lora_${kind}.weight`)}`)!;
      const expected = plainUpdate(values, { a: of("A"), b: of("B"), r: 43, scale: 20 / Math.sqrt(43) });
      assertClose(merged.get(name)!, expected, { max: 1e-7, name });
    }
  }));

Deno.test("addLowRank() adds scale · B·A in place and refuses an update of another size", () => {
  const [a, b] = [wave(8 * 12), wave(5 * 8)];
  const weight = wave(60);
  const expected = plainUpdate(weight, { a, b, r: 8, scale: 0.5 });
  addLowRank(weight, { a, b, r: 8, scale: 0.5 });
  assertClose(weight, expected, { max: 1e-7, name: "5 x 12" });
  assertThrows(() => addLowRank(wave(59), { a, b, r: 8, scale: 1 }), RangeError, "[5, 12] to 59 weights");
});

Deno.test("mergeModel() keeps a tied head tied, whatever the file holds, and an untied one apart", () =>
  withFolder(async (dir) => {
    const head = wave(config.vocab_size * config.hidden_size);
    const weights = weightsOf(MODEL).set("lm_head.weight", head);
    for (const tied of [true, false]) {
      await writeModel(`${dir}/base`, { weights, of: { ...config, tie_word_embeddings: tied } });
      await mergeModel({ model: `${dir}/base`, adapter: ADAPTER, out: `${dir}/out`, dtype: "float32" });
      assertEquals(weightsOf(`${dir}/out`).get("lm_head.weight"), tied ? undefined : head);
      assertEquals(readConfig(`${dir}/out`).tie_word_embeddings, tied);
    }
  }));

Deno.test("mergeModel() names the tensor of a value that the dtype cannot hold, and leaves no file", () =>
  withFolder(async (dir) => {
    const tensors = waves(lora), name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight";
    tensors.get(name)![8 * 3 + 2] = NaN;
    await saveAdapter(`${dir}/adapter`, lora, tensors);
    const merge = (dtype: ModelConfig["dtype"], model = MODEL) =>
      mergeModel({ model, adapter: `${dir}/adapter`, out: `${dir}/out`, dtype });
    const k = "model.layers.1.self_attn.k_proj.weight";
    await assertRejects(() => merge("float32"), RangeError, `"${k}": the value at [3, 0] is NaN`);
    assertEquals([...Deno.readDirSync(`${dir}/out`)].length, 0);

    tensors.get(name)![8 * 3 + 2] = 0;
    await saveAdapter(`${dir}/adapter`, lora, tensors);
    const weights = weightsOf(MODEL), norm = weights.get("model.norm.weight")!;
    norm[7] = 65_519;
    await writeModel(`${dir}/base`, { weights, of: config });
    await merge("float16", `${dir}/base`);
    assertEquals(weightsOf(`${dir}/out`).get("model.norm.weight")![7], 65_504);
    norm[7] = -65_520;
    await writeModel(`${dir}/base`, { weights, of: config });
    await merge("bfloat16", `${dir}/base`);
    await assertRejects(
      () => merge("float16", `${dir}/base`),
      RangeError,
      '"model.norm.weight": the value at [7] is -65520: a number that float16 can hold',
    );
  }));

Deno.test("mergeModel() refuses an adapter or a base that does not fit, by the tensor", () =>
  withFolder(async (dir) => {
    const tensors = waves(lora), a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
    tensors.set(a, wave(8 * 63));
    await saveAdapter(`${dir}/adapter`, lora, tensors);
    const merge = (model: string, adapter: string) =>
      mergeModel({ model, adapter, out: `${dir}/out`, dtype: "float32" });
    await assertRejects(
      () => merge(MODEL, `${dir}/adapter`),
      RangeError,
      `tensor "${a}" is [8, 63] but must be [8, 64]`,
    );

    const weights = weightsOf(MODEL);
    weights.delete("model.layers.1.mlp.gate_proj.weight");
    await writeModel(`${dir}/base`, { weights, of: config });
    await assertRejects(
      () => merge(`${dir}/base`, ADAPTER),
      RangeError,
      'tensor "model.layers.1.mlp.gate_proj.weight" is missing: the config wants [176, 64]',
    );
  }));

Deno.test("checkLogits() accepts rounding and refuses more, NaN and missing rows", () => {
  const rows = [Float32Array.of(1, -20, 3), Float32Array.of(0.5, 2, -1)];
  const moved = (by: number) => [rows[0]!, rows[1]!.map((x, i) => i === 1 ? x + by : x)];
  assertEquals(checkLogits(rows, rows, "float32"), { difference: 0, largest: 20, bound: 1e-4 });
  const { difference } = checkLogits(rows, moved(0.0015), "float32");
  assertAlmostEquals(difference, 0.0015, 1e-6);
  for (const bad of [moved(0.0025), moved(NaN), rows.slice(1)]) {
    assertThrows(() => checkLogits(rows, bad, "float32"), Error, "Cannot accept the merge");
  }
  assertThrows(() => checkLogits(moved(NaN), rows, "float32"), Error, "Cannot accept the merge");
  checkLogits(rows, moved(2.4), "bfloat16");
  assertThrows(() => checkLogits(rows, moved(2.6), "bfloat16"), Error, "try --dtype float32");
  assertThrows(() => checkLogits(rows, moved(0.4), "float16"), Error, "rounding to float16");
});
