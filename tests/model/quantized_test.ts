/** The 4-bit folder against the one that transformers and bitsandbytes saved: every tensor, every byte. */
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { fromFloat32, rounded, toFloat32 } from "../../lib/data/dtype.ts";
import { dequantizeNf4, quantizeNf4 } from "../../lib/data/nf4.ts";
import { openModel, openSafetensors, type TensorSource, writeSafetensors } from "../../lib/data/safetensors.ts";
import { type ModelConfig, parameterShapes, readConfig } from "../../lib/model/config.ts";
import {
  countElements,
  dequantizeWeight,
  isQuantized,
  quantizedWeights,
  readQuantState,
  writeQuantizedModel,
} from "../../lib/model/quantized.ts";
import { golden, goldenPath, withFolder } from "../check.ts";
import { digestOf, goldenDigest } from "../golden/rebuild.ts";

const MODEL = goldenPath("tiny/model_hf");
const QUERY = "model.layers.0.self_attn.q_proj";

/** Asserts that `dir/model.safetensors` has the bytes of the golden file, header included. */
function assertSameFile(dir: string, name: string): void {
  assertEquals(digestOf(`${dir}/model.safetensors`), goldenDigest(`${name}/model.safetensors`));
}

Deno.test("writeQuantizedModel() writes the file that transformers and bitsandbytes saved, byte for byte", async () => {
  for (const size of ["tiny", "odd"]) { // odd: rows of 96 and 200 weights, which blocks of 64 straddle
    await withFolder(async (out) => {
      const model = goldenPath(`${size}/model_hf`);
      using source = openModel(model);
      await writeQuantizedModel({ source, config: readConfig(model), out, doubleQuant: true });
      assertSameFile(out, `${size}/model_4bit`);
      assertEquals(readConfig(out), readConfig(model));
    });
  }
});

Deno.test("a bfloat16 model gives transformers' file byte for byte too", async () => {
  await withFolder(async (out) => {
    await writeBf16(`${out}/model.safetensors`);
    const config: ModelConfig = { ...readConfig(MODEL), dtype: "bfloat16" };
    const from = openSafetensors(`${out}/model.safetensors`);
    await writeQuantizedModel({ source: from, config, out, doubleQuant: true });
    from.close();
    assertSameFile(out, "tiny/model_4bit_bf16");
    // And so does a float32 model that is to be loaded in bfloat16.
    using exact = openModel(MODEL);
    Deno.mkdirSync(`${out}/loaded`);
    await writeQuantizedModel({
      source: exact,
      config: readConfig(MODEL),
      dtype: "bfloat16",
      out: `${out}/loaded`,
      doubleQuant: true,
    });
    assertSameFile(`${out}/loaded`, "tiny/model_4bit_bf16");
    assertEquals(readConfig(`${out}/loaded`), readConfig(out));
    // The weights that a bfloat16 model computes with are rounded to bfloat16.
    using source = openModel(out);
    const weight = dequantizeWeight(readQuantState(source, QUERY));
    assertEquals(weight, rounded(weight, "BF16"));
  });
});

async function writeBf16(path: string): Promise<void> {
  using exact = openModel(MODEL);
  const data = (name: string) => fromFloat32(toFloat32(exact.read(name), "F32"), "BF16");
  await writeSafetensors(
    path,
    [...exact.tensors.values()].map(({ name, shape }) => ({ name, dtype: "BF16", shape, data: () => data(name) })),
  );
}

Deno.test("config.json has transformers' quantization_config to the letter", async () => {
  for (const [name, dtype] of [["tiny/model_4bit", "float32"], ["tiny/model_4bit_bf16", "bfloat16"]] as const) {
    await withFolder(async (out) => {
      using source = openModel(MODEL);
      await writeQuantizedModel({ source, config: { ...readConfig(MODEL), dtype }, out, doubleQuant: true });
      const block = (dir: string) =>
        /^ {2}"quantization_config": \{[^}]*\}/m.exec(Deno.readTextFileSync(`${dir}/config.json`))?.[0];
      assert(block(out)?.includes('"llm_int8_threshold": 6.0,')); // bitsandbytes refuses the integer 6
      assertEquals(block(out), block(goldenPath(name)));
    });
  }
});

Deno.test("without double quantization the scales stay float32 and the state has no nested keys", async () => {
  await withFolder(async (out) => {
    using from = openModel(MODEL);
    await writeQuantizedModel({ source: from, config: readConfig(MODEL), out, doubleQuant: false });
    using source = openModel(out);
    const exact = toFloat32(from.read(`${QUERY}.weight`), "F32");
    const state = readQuantState(source, QUERY);
    assertEquals(state, { ...quantizeNf4(exact), shape: [64, 64], dtype: "float32", blocksize: 64 });
    assertEquals([...source.tensors.keys()].filter((name) => name.includes("nested")), []);
    const text = new TextDecoder().decode(source.read(`${QUERY}.weight.quant_state.bitsandbytes__nf4`));
    assertEquals(text, '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}');
  });
});

Deno.test("readQuantState() gives the weights that bitsandbytes dequantizes from its own file", async () => {
  // odd: rows of 96 and 200 weights, which blocks of 64 straddle
  const file = golden("odd/nf4.safetensors");
  const model = goldenPath("odd/model_hf");
  await withFolder(async (out) => {
    using from = openModel(model);
    await writeQuantizedModel({ source: from, config: readConfig(model), out, doubleQuant: true });
    using source = openModel(out);
    for (const module of [QUERY, "model.layers.0.mlp.down_proj"]) {
      const state = readQuantState(source, module);
      assertEquals(state.absmax, file.f32(`${module}.weight.dq.absmax`));
      assertEquals(dequantizeWeight(state), file.f32(`${module}.weight.dq.dequant`));
      assertEquals(dequantizeNf4({ ...state, count: state.shape[0] * state.shape[1] }), dequantizeWeight(state));
    }
  });
});

Deno.test("a small offset is printed as Python prints it", async () => {
  await withFolder(async (out) => {
    using exact = openModel(MODEL);
    const data = (name: string) => fromFloat32(toFloat32(exact.read(name), "F32").map((w) => w * 1e-4), "F32");
    await writeSafetensors(
      `${out}/model.safetensors`,
      [...exact.tensors.values()].map(({ name, dtype, shape }) => ({ name, dtype, shape, data: () => data(name) })),
    );
    const from = openSafetensors(`${out}/model.safetensors`);
    await writeQuantizedModel({ source: from, config: readConfig(MODEL), out, doubleQuant: true });
    from.close();
    using source = openModel(out);
    const text = new TextDecoder().decode(source.read(`${QUERY}.weight.quant_state.bitsandbytes__nf4`));
    assert(/"nested_offset": \d\.\d+e-0[56]\}$/.test(text), text); // JavaScript would print 0.0000118…
  });
});

Deno.test("isQuantized() tells the two kinds of folder apart", () => {
  using plain = openModel(MODEL);
  using quantized = openModel(goldenPath("tiny/model_4bit"));
  assertEquals([isQuantized(plain), isQuantized(quantized)], [false, true]);
});

Deno.test("MedSLM in 4 bit has 190,711,808 stored elements of 329,910,272 parameters, as the blog counts", () => {
  const config: ModelConfig = {
    ...readConfig(MODEL),
    vocab_size: 50257,
    hidden_size: 1024,
    intermediate_size: 2752,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 64,
  };
  const linear = quantizedWeights(config);
  const entry = (name: string, shape: readonly number[]) => {
    const count = shape.reduce((a, b) => a * b, 1);
    const quantized = linear.has(name);
    const info = {
      name,
      dtype: quantized ? "U8" : "BF16",
      begin: 0,
      bytes: quantized ? count / 2 : count * 2,
    } as const;
    return [name, { ...info, shape: quantized ? [count / 2, 1] : shape }] as const;
  };
  const tensors = new Map(parameterShapes(config).map(({ name, shape }) => entry(name, shape)));
  assertEquals(countElements({ tensors }, config), {
    parameters: 329_910_272,
    storedElements: 190_711_808,
    bytes: 139_198_464 + 2 * (51_463_168 + 50_176),
  });
});

Deno.test("a parameter that is missing, has another shape or an integer type is refused by name", async () => {
  using source = openModel(MODEL);
  const config = readConfig(MODEL);
  const run = (from: TensorSource, own: ModelConfig) =>
    writeQuantizedModel({ source: from, config: own, out: "unused", doubleQuant: true });
  const untied = { ...config, tie_word_embeddings: false };
  await assertRejects(() => run(source, untied), RangeError, 'tensor "lm_head.weight" is missing');
  await assertRejects(() => run(source, { ...config, head_dim: 8 }), RangeError, "the config wants [32, 64]");
  const name = `${QUERY}.weight`;
  const info = { ...source.tensors.get(name)!, dtype: "I32" as const };
  const integers = { ...source, tensors: new Map([...source.tensors, [name, info]]) };
  await assertRejects(() => run(integers, config), TypeError, `Cannot quantize "${name}": it is I32`);
});

Deno.test("a weight that is not finite is refused with its place and the name of its tensor", async () => {
  using source = openModel(MODEL);
  const name = "model.layers.1.mlp.up_proj.weight";
  const values = toFloat32(source.read(name), "F32");
  values[77] = NaN;
  const damaged = {
    ...source,
    read: (key: string) => key === name ? fromFloat32(values, "F32") : source.read(key),
  };
  const run = () =>
    writeQuantizedModel({ source: damaged, config: readConfig(MODEL), out: "unused", doubleQuant: true });
  const error = await assertRejects(run, RangeError, "Cannot quantize weight 77: it is NaN");
  values[77] = 1e6;
  await withFolder(async (out) => {
    const half = () =>
      writeQuantizedModel({ source: damaged, config: readConfig(MODEL), dtype: "float16", out, doubleQuant: true });
    await assertRejects(half, RangeError, `element 77 of "${name}" is 1000000, which float16 cannot hold`);
  });
  assert(error.message.includes(`(tensor "${name}"`));
});

Deno.test("readQuantState() refuses a damaged weight and names it", () => {
  using source = openModel(goldenPath("tiny/model_4bit"));
  const weight = `${QUERY}.weight`;
  const stateName = `${weight}.quant_state.bitsandbytes__nf4`;
  const damaged = (name: string, bytes: Uint8Array<ArrayBuffer>): TensorSource => (
    { ...source, read: (key) => key === name ? bytes : source.read(key) }
  );
  const without = (name: string): TensorSource => (
    { ...source, tensors: new Map([...source.tensors].filter(([key]) => key !== name)) }
  );
  const text = new TextDecoder().decode(source.read(stateName));
  const state = (change: (text: string) => string) => damaged(stateName, new TextEncoder().encode(change(text)));
  const table = source.read(`${weight}.quant_map`);
  table[0]! ^= 1;
  const wrong: [TensorSource, string][] = [
    [without(`${weight}.absmax`), `has no tensor "${weight}.absmax"`],
    [without(stateName), `has no tensor "${stateName}"`],
    [damaged(`${weight}.quant_map`, table), "not the table of nf4"],
    [damaged(weight, new Uint8Array(10)), "has 10 bytes"],
    [damaged(`${weight}.absmax`, new Uint8Array(3)), "has 3 scales"],
    [state((json) => json.replace("nf4", "fp4")), "not a matrix in nf4"],
    [state((json) => json.slice(1)), "which is not JSON"],
    [state((json) => json.replace('"nested_blocksize": 256', '"nested_blocksize": 128')), "nested blocks of 128"],
  ];
  for (const [from, message] of wrong) {
    const error = assertThrows(() => readQuantState(from, QUERY), RangeError, message);
    assert(error.message.includes(`the 4-bit weight "${weight}"`));
  }
});
