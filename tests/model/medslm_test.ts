/** MedSLM checkpoints against the Hugging Face files of the same weights, and every way in which one can be wrong. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { toFloat32 } from "../../lib/data/dtype.ts";
import {
  openModel,
  openSafetensors,
  type TensorSink,
  type TensorSource,
  writeSafetensors,
} from "../../lib/data/safetensors.ts";
import {
  type Checkpoint,
  checkpointInputs,
  convertTensor,
  halfSplitRows,
  openCheckpoint,
  planConversion,
} from "../../lib/model/medslm.ts";
import { readConfig } from "../../lib/model/config.ts";
import { tokenizerFiles } from "../../lib/data/tokenizer.ts";
import { rebuilt } from "../golden/rebuild.ts";
import { temporaryFolder } from "../check.ts";

const fixtures = new URL("../../fixtures/", import.meta.url).pathname;
const golden = `${fixtures}golden/`;
const half = { interleaved: false, dtype: "float32" } as const;

for (
  const [from, to, interleaved] of [
    ["tiny/model_medslm", "tiny/model_hf", false],
    ["tiny/model_medslm_interleaved", "tiny/model_hf", true],
    ["odd/model_medslm_interleaved", "odd/model_hf", true],
  ] as const
) {
  Deno.test(`${from} converts to the tensors of ${to} bit for bit`, async () => {
    const checkpoint = openCheckpoint(await rebuilt(from));
    using source = checkpoint.source;
    using want = openModel(`${golden}${to}`);
    const { config, mappings, skipped } = planConversion(checkpoint, { interleaved, dtype: "float32" });
    assertEquals(mappings.map(({ name }) => name).sort(), [...want.tensors.keys()].sort());
    for (const mapping of mappings) {
      assertEquals(mapping.shape, want.tensors.get(mapping.name)!.shape);
      assertEquals(convertTensor(source, mapping, "F32"), want.read(mapping.name), mapping.name);
    }
    assertEquals(skipped, []);
    const ids = { bos_token_id: null, eos_token_id: null, pad_token_id: null };
    assertEquals(config, { ...readConfig(`${golden}${to}`), ...ids });
  });
}

Deno.test("read as half-split, an interleaved checkpoint gives other q and k and nothing else", async () => {
  const checkpoint = openCheckpoint(await rebuilt("tiny/model_medslm_interleaved"));
  using source = checkpoint.source;
  using want = openModel(`${golden}tiny/model_hf`);
  const differ = planConversion(checkpoint, half).mappings.filter((mapping) => {
    const expected = want.read(mapping.name);
    return convertTensor(source, mapping, "F32").some((byte, i) => byte !== expected[i]);
  }).map(({ name }) => name.split(".").at(-2));
  assertEquals([...new Set(differ)].sort(), ["k_proj", "q_proj"]);
  assertEquals(differ.length, 4);
});

Deno.test("halfSplitRows() takes rows 0,2,4,6,1,3,5,7 of each head", () => {
  assertEquals([...halfSplitRows(Uint8Array.from({ length: 16 }, (_, i) => i), { rows: 16, headDim: 8 })], [
    ...[0, 2, 4, 6, 1, 3, 5, 7],
    ...[8, 10, 12, 14, 9, 11, 13, 15],
  ]);
});

Deno.test("a Hugging Face folder passes through unchanged, theta of rope_parameters included", () => {
  const checkpoint = openCheckpoint(`${golden}tiny/model_hf`);
  using _source = checkpoint.source;
  const { config, mappings } = planConversion(checkpoint, half);
  assert(mappings.every(({ from, name, how }) => from === name && how === "already its name"));
  assertEquals(config, readConfig(`${golden}tiny/model_hf`));
});

Deno.test("a PyTorch file converts with its own settings; its buffers are skipped and its tied head is dropped", () => {
  const checkpoint = openCheckpoint(`${fixtures}torch/medslm.pt`);
  using source = checkpoint.source;
  const { config, mappings, skipped, notes } = planConversion(checkpoint, half);
  assertEquals([config.hidden_size, config.head_dim, config.num_key_value_heads, config.rms_norm_eps], [
    16,
    4,
    2,
    1e-5,
  ]);
  assertEquals(config.tie_word_embeddings, true);
  assertEquals(mappings.length, 20);
  assertEquals(skipped, ["freqs_cos", "blocks.0.attn.causal_mask", "blocks.1.attn.causal_mask"]);
  assert(notes.includes('"lm_head.weight" equals the embedding: dropped, the head is tied'));
  const up = mappings.find(({ name }) => name === "model.layers.1.mlp.up_proj.weight")!; // stored as bfloat16
  assertEquals(toFloat32(convertTensor(source, up, "F32"), "F32"), toFloat32(source.read(up.from), "BF16"));
  assertEquals(checkpointInputs(`${fixtures}torch/medslm.pt`), [`${fixtures}torch/medslm.pt`]);
  assertEquals(tokenizerFiles(`${fixtures}torch`), []);
});

const medslm = await rebuilt("tiny/model_medslm");

/** tiny/model_medslm in memory, its tensors renamed, replaced (shape and value) or, with null, left out. */
function variant(
  change: Readonly<Record<string, string | null | { shape: number[]; fill: number }>>,
  settings: Readonly<Record<string, unknown>> = {},
): Checkpoint {
  const real = openCheckpoint(medslm);
  const tensors = new Map(real.source.tensors);
  const data = new Map([...tensors.keys()].map((name) => [name, real.source.read(name)]));
  real.source.close();
  const before = new Map([...tensors].map(([name, info]) => [name, { info, bytes: data.get(name)! }]));
  for (const name of Object.keys(change)) [tensors, data].forEach((map) => map.delete(name));
  for (const [name, to] of Object.entries(change)) {
    if (typeof to === "string") {
      tensors.set(to, { ...before.get(name)!.info, name: to });
      data.set(to, before.get(name)!.bytes);
    } else if (to !== null) {
      const values = new Float32Array(to.shape.reduce((a, b) => a * b, 1)).fill(to.fill);
      tensors.set(name, { name, dtype: "F32", shape: to.shape, begin: 0, bytes: values.byteLength });
      data.set(name, new Uint8Array(values.buffer));
    }
  }
  const source: TensorSource = {
    path: "variant",
    tensors,
    metadata: {},
    read: (name) => data.get(name)!,
    readRange: (name, offset, length) => data.get(name)!.slice(offset, offset + length),
    close() {},
    [Symbol.dispose]() {},
  };
  return { folder: ".", source, notes: [], settings: { ...real.settings, ...settings } };
}

/** What becomes of the two norms of block 0 when they are called `a` and `b`. */
function normsOf(a: string, b: string): [string, string, string] {
  const { mappings } = planConversion(
    variant({ "blocks.0.norm1.weight": `blocks.0.${a}.weight`, "blocks.0.norm2.weight": `blocks.0.${b}.weight` }),
    half,
  );
  const of = (name: string) => mappings.find((mapping) => mapping.name === `model.layers.0.${name}.weight`)!;
  const [first, second] = [of("input_layernorm"), of("post_attention_layernorm")];
  return [first.from.split(".").slice(2, -1).join("."), second.from.split(".").slice(2, -1).join("."), first.how];
}

Deno.test("the two norms of a block are told apart by their names, else by their order", () => {
  const inBlock = "shape and position in the block";
  for (
    const [a, b] of [["attn_norm", "ffn_norm"], ["norm1", "norm2"], ["ln_1", "ln_2"], [
      "input_norm",
      "post_attention_norm",
    ]]
  ) {
    assertEquals(normsOf(a!, b!), [a!, b!, inBlock]);
    assertEquals(normsOf(b!, a!), [a!, b!, inBlock]);
  }
  assertEquals(normsOf("pre_ffn_norm", "pre_attn_norm"), ["pre_attn_norm", "pre_ffn_norm", inBlock]);
  assertEquals(normsOf("ffn.norm", "attn.norm"), ["attn.norm", "ffn.norm", inBlock]);
  assertEquals(normsOf("norm", "norm2"), ["norm", "norm2", inBlock]);
  assertEquals(normsOf("alpha", "beta"), ["alpha", "beta", "shape and position in the file"]);
});

Deno.test("a head that differs from the embedding is kept under any name of its shape", () => {
  const plan = planConversion(variant({ "out.weight": { shape: [384, 64], fill: 0.5 } }, { weight_tying: true }), half);
  assertEquals(plan.config.tie_word_embeddings, false);
  assertEquals(plan.mappings.at(-1)!.from, "out.weight");
  assertEquals(plan.mappings.at(-1)!.name, "lm_head.weight");
  assert(plan.notes[0]!.includes("differs from the embedding: kept, untied"));
});

Deno.test("settings are read under their synonyms, and missing ones can be given", () => {
  const bare = variant({});
  const settings = {
    n_embd: 64,
    n_layer: 2,
    n_head: 4,
    num_kv_heads: 2,
    hidden_dim: 176,
    block_size: 256,
    rope_base: 10000,
    eps: 1e-6,
    eos_token_id: 7,
  };
  const { config } = planConversion({ ...bare, settings }, half);
  assertEquals([config.max_position_embeddings, config.rms_norm_eps, config.eos_token_id, config.vocab_size], [
    256,
    1e-6,
    7,
    384,
  ]);
  const { eps: _eps, n_head: _heads, ...less } = settings;
  assertThrows(
    () => planConversion({ ...bare, settings: less }, half),
    Error,
    "give it with --set num_attention_heads=VALUE",
  );
  const given = { norm_eps: 1e-5, head_dim: 16 };
  const full = planConversion({ ...bare, settings: less }, { ...half, given });
  assertEquals([full.config.rms_norm_eps, full.config.num_attention_heads], [1e-5, 4]);
});

Deno.test("what is unknown, missing or contradictory is an error that names it", () => {
  const q = "blocks.0.attn.wq.weight";
  const refused: [Checkpoint, string][] = [
    [
      variant({ "blocks.0.attn.wz.weight": { shape: [64, 64], fill: 1 } }),
      'the tensor "blocks.0.attn.wz.weight" F32 [64, 64] is not part',
    ],
    [variant({ "blocks.0.attn.wq.bias": { shape: [64], fill: 1 } }), '"blocks.0.attn.wq.bias" F32 [64] is not part'],
    [variant({ "pos_emb.weight": { shape: [256, 64], fill: 1 } }), '"pos_emb.weight"'],
    [variant({ "blocks.1.ffn.w_up.weight": null }), 'no tensor becomes "model.layers.1.mlp.up_proj.weight" [176, 64]'],
    [variant({ "norm_f.weight": null }), 'no tensor becomes "model.norm.weight"'],
    [variant({ "tok_emb.weight": null }), 'no tensor becomes "model.embed_tokens.weight"'],
    [variant({ "blocks.1.norm2.weight": null }), "block 1 has"],
    [variant({ "blocks.1.norm3.weight": { shape: [64], fill: 1 } }), "two norms of [64] are wanted"],
    [variant({ [q]: "model.layers.0.self_attn.k_proj.weight" }), "would both become"],
    [variant({ "blocks.1.attn.wo.weight": { shape: [64, 32], fill: 1 } }), '"blocks.1.attn.wo.weight" is [64, 32] but'],
    [variant({}, { d_model: 65 }), "d_model is 65 but the embedding's width is 64"],
    [variant({}, { hidden_size: 128 }), "d_model 64 and hidden_size 128"],
    [variant({}, { n_layers: 3 }), "n_layers is 3 but the number of blocks is 2"],
    [variant({}, { n_kv_heads: 4 }), "n_kv_heads is 4 but 32 key rows of heads of 16 make it 2"],
    [variant({}, { head_dim: 8 }), "head_dim is 8 but"],
    [variant({}, { d_ff: 175 }), "d_ff is 175 but"],
    [variant({}, { vocab_size: 385 }), "vocab_size is 385 but"],
    [variant({}, { n_heads: "4" }), 'n_heads is "4": it must be a number'],
    [variant({}, { rope_theta: null }), "the setting rope_theta (also called rope_base) is missing"],
    [variant({}, { rope_scaling: { type: "yarn" } }), 'its RoPE is of type "yarn"'],
    [variant({}, { tie_embeddings: false }), "but it has no head"],
  ];
  for (const [checkpoint, words] of refused) assertThrows(() => planConversion(checkpoint, half), Error, words);
});

Deno.test("convertTensor() rounds to 16 bits and refuses what does not fit", () => {
  const plan = (fill: number) => {
    const checkpoint = variant({ "norm_f.weight": { shape: [64], fill } });
    const mapping = planConversion(checkpoint, half).mappings.find(({ name }) => name === "model.norm.weight")!;
    return (dtype: "F32" | "F16" | "BF16") => toFloat32(convertTensor(checkpoint.source, mapping, dtype), dtype)[0]!;
  };
  assertEquals(plan(65504)("F16"), 65504);
  assertEquals(plan(1 + 2 ** -7 + 2 ** -9)("BF16"), 1 + 2 ** -7);
  assertThrows(() => plan(65520)("F16"), RangeError, 'Cannot convert "norm_f.weight" of "variant": value 0 is 65520');
  assertThrows(() => plan(NaN)("F32"), RangeError, "value 0 is NaN");
  assertThrows(() => plan(3.4e38)("BF16"), RangeError, "value 0 is");
  assertEquals(plan(3.4e38)("F32"), Math.fround(3.4e38));
});

Deno.test("openCheckpoint() finds the one checkpoint of a folder and says when there is none or more", async () => {
  using folder = temporaryFolder();
  const dir = folder.path;
  assertThrows(() => openCheckpoint(dir), Error, "no checkpoint");
  assertThrows(() => openCheckpoint(`${dir}/gone`), Error, "no such file or folder");
  await Deno.copyFile(`${fixtures}torch/medslm.pt`, `${dir}/final.pt`);
  await Deno.writeTextFile(`${dir}/config.json`, `{"max_seq_len": 8, "note": "beside the file"}`);
  const checkpoint = openCheckpoint(dir);
  checkpoint.source.close();
  assertEquals(checkpoint.settings.note, "beside the file");
  await Deno.copyFile(`${fixtures}torch/medslm.pt`, `${dir}/step.pt`);
  assertThrows(() => openCheckpoint(dir), Error, "it holds final.pt, step.pt: name one checkpoint file");
  const sink: TensorSink = { name: "a", dtype: "U8", shape: [1], data: () => Uint8Array.of(1) };
  await writeSafetensors(`${dir}/weights.safetensors`, [sink]);
  await Deno.mkdir(`${dir}/tokenizer`);
  for (const name of ["tokenizer.json", "config.json", "merges.txt"]) {
    await Deno.writeTextFile(`${dir}/tokenizer/${name}`, "{}");
  }
  assertEquals(checkpointInputs(`${dir}/weights.safetensors`), [
    `${dir}/weights.safetensors`,
    `${dir}/config.json`,
    `${dir}/tokenizer/merges.txt`,
    `${dir}/tokenizer/tokenizer.json`,
  ]);
  using source = openCheckpoint(dir).source;
  using same = openSafetensors(`${dir}/weights.safetensors`);
  assertEquals([...source.tensors.keys()], [...same.tensors.keys()]);
});
