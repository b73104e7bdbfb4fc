/** config.json in both forms of the library, and the names and shapes that follow from it, against files that the library wrote. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { openModel } from "../../lib/data/safetensors.ts";
import {
  configJson,
  generationConfigJson,
  linearShape,
  moduleName,
  parameterShapes,
  readConfig,
} from "../../lib/model/config.ts";
import { temporaryFolder } from "../check.ts";

const golden = new URL("../../fixtures/golden/", import.meta.url).pathname;

/** Reads a config made from tiny's by `change`. */
function changed(change: Record<string, unknown>): ReturnType<typeof readConfig> {
  const json = { ...JSON.parse(Deno.readTextFileSync(`${golden}tiny/model_hf/config.json`)), ...change };
  using folder = temporaryFolder({ "config.json": JSON.stringify(json) });
  return readConfig(folder.path);
}

for (const name of ["tiny", "odd"]) {
  Deno.test(`readConfig() and configJson() hold the library's config.json of ${name}`, () => {
    const text = Deno.readTextFileSync(`${golden}${name}/model_hf/config.json`);
    const config = readConfig(`${golden}${name}/model_hf`);
    assertEquals(config.rope_theta, 10000);
    assertEquals(config.tie_word_embeddings, true);
    // what is written beside the library's own lines is the older form of two fields
    const lines = configJson(config).split("\n");
    const older = ['  "rope_theta": 10000.0,', '  "torch_dtype": "float32",'];
    assertEquals(lines.filter((line) => !older.includes(line)).join("\n"), text);
    assert(older.every((line) => lines.includes(line)));
    assertEquals(
      generationConfigJson(config),
      Deno.readTextFileSync(`${golden}${name}/model_hf/generation_config.json`),
    );
  });

  Deno.test(`parameterShapes() names the tensors of ${name} with their shapes`, () => {
    const shapes = parameterShapes(readConfig(`${golden}${name}/model_hf`));
    using source = openModel(`${golden}${name}/model_hf`);
    assertEquals(
      Object.fromEntries(shapes.map(({ name, shape }) => [name, shape])),
      Object.fromEntries([...source.tensors.values()].map(({ name, shape }) => [name, shape])),
    );
  });
}

Deno.test("the blog's model has 218 tensors and 329,910,272 parameters", () => {
  const shapes = parameterShapes({
    ...readConfig(`${golden}tiny/model_hf`),
    vocab_size: 50257,
    hidden_size: 1024,
    intermediate_size: 2752,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 64,
  });
  assertEquals(shapes.length, 218);
  assertEquals(shapes.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0), 329_910_272);
});

Deno.test("modules have their names and shapes, the untied head comes last", () => {
  const config = readConfig(`${golden}odd/model_hf`);
  assertEquals(moduleName(2, "k_proj"), "model.layers.2.self_attn.k_proj");
  assertEquals(moduleName(0, "down_proj"), "model.layers.0.mlp.down_proj");
  assertEquals(linearShape(config, "k_proj"), [48, 96]);
  assertEquals(linearShape(config, "down_proj"), [96, 200]);
  const untied = parameterShapes({ ...config, tie_word_embeddings: false });
  assertEquals(untied.at(-1), { name: "lm_head.weight", shape: [1003, 96] });
});

Deno.test("readConfig() reads the v4 form and the fields that older files leave out", () => {
  const v4 = changed({
    rope_parameters: undefined,
    rope_theta: 500,
    rope_scaling: null,
    dtype: undefined,
    torch_dtype: "bfloat16",
    head_dim: undefined,
    num_key_value_heads: undefined,
    tie_word_embeddings: undefined,
    pad_token_id: undefined,
  });
  assertEquals([v4.rope_theta, v4.dtype, v4.head_dim, v4.num_key_value_heads], [500, "bfloat16", 16, 4]);
  assertEquals([v4.tie_word_embeddings, v4.pad_token_id, v4.eos_token_id], [false, null, 383]);
});

Deno.test("readConfig() refuses what this engine does not compute and what is missing", () => {
  const refused: [Record<string, unknown>, string][] = [
    [{ model_type: "mistral" }, 'model_type is "mistral"'],
    [{ hidden_act: "gelu" }, 'hidden_act is "gelu"'],
    [{ attention_bias: true }, "attention_bias is true"],
    [{ rope_parameters: { rope_type: "llama3", rope_theta: 1 } }, 'rope_type is "llama3"'],
    [{ rope_scaling: { type: "linear", factor: 2 } }, 'rope_type is "linear"'],
    [{ rope_theta: 5 }, "rope_parameters has rope_theta 10000 but the top level has 5"],
    [{ rope_parameters: undefined }, 'the number "rope_theta" is missing'],
    [{ vocab_size: undefined }, 'the field "vocab_size" is missing'],
    [{ rms_norm_eps: "1e-6" }, 'rms_norm_eps is "1e-6": it must be a number'],
    [{ num_key_value_heads: 3 }, "4 query heads cannot share 3 key/value heads"],
    [{ head_dim: 15 }, "head_dim is 15"],
    [{ hidden_size: 64.5 }, "hidden_size is 64.5"],
    [{ eos_token_id: 384 }, "eos_token_id is 384: it must be a token below vocab_size 384"],
    [{ dtype: "int8" }, 'dtype is "int8"'],
  ];
  for (const [change, words] of refused) assertThrows(() => changed(change), RangeError, words);
  assertThrows(
    () => readConfig("nowhere"),
    Error,
    'Cannot read "nowhere": no such folder: a model folder is wanted: run',
  );
});

Deno.test("configJson() writes floats as Python does and takes further fields", () => {
  const config = { ...readConfig(`${golden}tiny/model_hf`), rms_norm_eps: 1e-5, rope_theta: 1e6 };
  const text = configJson(config, { quantization_config: { load_in_4bit: true, rms_norm_eps: 2 }, bos_token_id: null });
  for (
    const line of [
      '  "rms_norm_eps": 1e-05,',
      '  "rope_theta": 1000000.0,',
      '    "rope_theta": 1000000.0,',
      '  "bos_token_id": null,',
    ]
  ) {
    assert(text.split("\n").includes(line), line);
  }
  const keys = Object.keys(JSON.parse(text));
  assertEquals(keys, [...keys].sort());
  assertEquals(JSON.parse(text).quantization_config.load_in_4bit, true);
});
