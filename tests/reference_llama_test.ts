/**
 * reference_llama.ts against transformers and PEFT (golden files of fixtures/golden), and against its own finite differences.
 * Bounds are those of the golden data's README: 1e-5 of the largest value for logits and losses, 2e-5 for gradients; the
 * errors found are below 2e-6.
 */
import { assertEquals, assertGreater } from "@std/assert";
import { readConfig } from "../lib/model/config.ts";
import { assertClose, type Golden, golden, goldenPath, maxRelative, readTensors, wave } from "./check.ts";
import { rebuilt } from "./golden/rebuild.ts";
import { embeddingBackward, nf4Dequantize, rope } from "./reference.ts";
import { llamaBackward, llamaForward, type LlamaInput, type Tokens } from "./reference_llama.ts";

const LOGITS = 1e-5, GRADIENT = 2e-5;
const config = readConfig(goldenPath("tiny/model_hf"));
const weights = golden("tiny/model_hf/model.safetensors").floats();

/** The tokens of a golden case: rows of 48 laid one after the other, positions counted from each row's start unless given. */
function tokensOf(file: Golden, prefix: string, labels = `${prefix}labels`): Tokens {
  const inputIds = file.i32(`${prefix}input_ids`);
  const given = file.names.includes(`${prefix}position_ids`);
  const positionIds = given ? file.i32(`${prefix}position_ids`) : inputIds.map((_, t) => t % 48);
  return { inputIds, positionIds, labels: file.names.includes(labels) ? file.i32(labels) : inputIds };
}

function adapterOf(dir: string) {
  return golden(`${dir}/lora_adapter/adapter_model.safetensors`).floats();
}

/** The float32 weights that a 4-bit folder stands for, with the double quantization of absmax undone. */
function dequantizedModel(path: string): Map<string, Float32Array> {
  const file = readTensors(`${path}/model.safetensors`), marker = ".quant_state.bitsandbytes__nf4";
  const out = new Map<string, Float32Array>(file.floats());
  for (const key of file.names.filter((name) => name.endsWith(marker))) {
    const name = key.slice(0, -marker.length);
    const state: { shape: number[]; nested_offset: number } = JSON.parse(new TextDecoder().decode(file.u8(key)));
    const map = file.f32(`${name}.nested_quant_map`), nested = file.f32(`${name}.nested_absmax`);
    const absmax = Float32Array.from(
      file.u8(`${name}.absmax`),
      (code, i) => Math.fround(map[code]! * nested[i >> 8]!) + state.nested_offset,
    );
    const count = state.shape.reduce((a, b) => a * b, 1);
    out.set(name, nf4Dequantize(file.u8(name), absmax, { code: file.f32(`${name}.quant_map`), count }));
  }
  return out;
}

/** Loss, logits of the first rows, dx and every gradient of one case of a golden file. */
function compareCase(file: Golden, at: { config: typeof config; prefix: string; input: LlamaInput }): void {
  const { prefix } = at;
  const state = llamaForward(at.config, at.input);
  const { gradients, dx } = llamaBackward(state);
  assertClose([state.loss], file.f32(`${prefix}loss`), { max: LOGITS, name: `${prefix}loss` });
  if (file.names.includes(`${prefix}logits_row0`)) {
    const row0 = file.f32(`${prefix}logits_row0`);
    assertClose(state.logits.subarray(0, row0.length), row0, { max: LOGITS, name: `${prefix}logits_row0` });
  }
  if (file.names.includes(`${prefix}dx`)) {
    assertClose(dx, file.f32(`${prefix}dx`), { max: GRADIENT, name: `${prefix}dx` });
  }
  const expected = file.floats(`${prefix}grad.`);
  assertGreater(expected.size, 0);
  for (const [name, value] of expected) {
    assertClose(gradients.get(name) ?? [], value, { max: GRADIENT, name: `${prefix}grad.${name}` });
  }
}

Deno.test("llamaForward() gives transformers' hidden states, logits, token losses and loss", () => {
  const file = golden("tiny/forward.safetensors");
  const state = llamaForward(config, { weights, tokens: tokensOf(file, "plain.") });
  assertClose(state.embed, file.f32("plain.hidden.embed"), { max: 0, name: "embed" });
  state.layers.forEach(({ y }, layer) => {
    assertClose(y, file.f32(`plain.hidden.layer${layer}`), { max: LOGITS, name: `layer ${layer}` });
  });
  assertClose(state.norm, file.f32("plain.hidden.final_norm"), { max: LOGITS, name: "final norm" });
  assertClose(state.logits, file.f32("plain.logits"), { max: LOGITS, name: "logits" });
  const tokenNll = state.nll.filter((_, t) => t % 48 !== 47); // the last token of a row predicts nothing
  assertClose(tokenNll, file.f32("plain.token_nll"), { max: LOGITS, name: "token nll" });
  assertClose([state.loss], file.f32("plain.loss"), { max: LOGITS, name: "loss" });
});

Deno.test("llamaForward() gives the insides of transformers' first layer", () => {
  const file = golden("tiny/forward.safetensors");
  const { layers: [layer] } = llamaForward(config, { weights, tokens: tokensOf(file, "plain.") });
  const { h1, q, k, v, out, x, mid, h2, y, gateUp } = layer!;
  const F = config.intermediate_size, D = config.head_dim;
  const same = (name: string, actual: Float64Array, order = (i: number) => i) => {
    const expected = file.f32(`plain.row0.in_layer0.${name}`);
    assertClose(expected.map((_, i) => actual[order(i)]!), expected, { max: LOGITS, name });
  };
  // transformers keeps rotated heads as [H, T, D], this project as [T, H, D].
  const headsFirst = (H: number) => (i: number) => ((Math.floor(i / D) % 48) * H + Math.floor(i / D / 48)) * D + i % D;
  same("input_layernorm", h1);
  same("q_rotated", q, headsFirst(config.num_attention_heads));
  same("k_rotated", k, headsFirst(config.num_key_value_heads));
  same("v_proj", v);
  same("attention_before_o_proj", out);
  same("o_proj", mid.map((m, i) => m - x[i]!));
  same("post_attention_layernorm", h2);
  same("gate_proj", gateUp, (i) => Math.floor(i / F) * 2 * F + i % F);
  same("up_proj", gateUp, (i) => Math.floor(i / F) * 2 * F + F + i % F);
  same("down_proj", y.map((value, i) => value - mid[i]!));
});

Deno.test("rope() turns by transformers' cosine and sine tables", () => {
  const file = golden("tiny/forward.safetensors"), D = config.head_dim;
  const positions = Array.from({ length: 48 }, (_, t) => t);
  const unit = new Float64Array(48 * D).map((_, i) => i % D < D / 2 ? 1 : 0); // (1, 0) turns into (cos, sin)
  const turned = rope(unit, positions, { heads: 1, D, theta: config.rope_theta });
  const [cos, sin] = [file.f32("rope.cos"), file.f32("rope.sin")];
  const table = cos.map((_, i) => i % D < D / 2 ? cos[i]! : sin[i]!);
  assertClose(turned, table, { max: 1e-6, name: "cosines and sines" });
});

Deno.test("llamaForward() leaves out the loss of masked prompts and of padding", () => {
  const file = golden("tiny/forward.safetensors");
  const masked = llamaForward(config, { weights, tokens: tokensOf(file, "plain.", "prompt_masked.labels") });
  assertClose([masked.loss], file.f32("prompt_masked.loss"), { max: LOGITS, name: "prompt_masked" });
  const padded = llamaForward(config, { weights, tokens: tokensOf(file, "padded.") });
  assertEquals(padded.numItems, 77);
  assertClose([padded.loss], file.f32("padded.loss"), { max: LOGITS, name: "padded" });
  const mask = file.i32("padded.attention_mask"), V = config.vocab_size;
  const logits = padded.logits.map((x, i) => x * mask[Math.floor(i / V)]!).subarray(48 * V); // the padded row
  assertClose(logits, file.f32("padded.logits"), { max: LOGITS, name: "padded logits" });
});

Deno.test("llamaForward() keeps packed documents apart", () => {
  const file = golden("tiny/forward.safetensors");
  const tokens = tokensOf(file, "packed.");
  const packed = llamaForward(config, { weights, tokens });
  assertEquals(packed.numItems, 45);
  assertClose(packed.logits, file.f32("packed.logits"), { max: LOGITS, name: "logits" });
  assertClose([packed.loss], file.f32("packed.loss"), { max: LOGITS, name: "loss" });
  const oneDocument = { ...tokens, positionIds: Int32Array.from(tokens.inputIds, (_, t) => t) };
  const joined = llamaForward(config, { weights, tokens: oneDocument });
  assertClose([joined.loss], file.f32("packed.loss_without_isolation"), { max: LOGITS, name: "without isolation" });
  assertGreater(maxRelative([joined.loss], [packed.loss]), 1e-3);
});

Deno.test("llamaBackward() gives PEFT's LoRA gradients, plain and packed", () => {
  const file = golden("tiny/lora.safetensors"), adapter = adapterOf("tiny");
  for (const prefix of ["plain.", "packed."]) {
    const input = { weights, tokens: tokensOf(file, prefix), adapter, scaling: 2 };
    compareCase(file, { config, prefix, input });
  }
});

for (const size of ["tiny", "odd"]) {
  Deno.test(`llamaBackward() gives PEFT's gradients over bitsandbytes' NF4 weights, ${size}`, async () => {
    const file = golden(`${size}/qlora.safetensors`), adapter = adapterOf(size);
    const quantized = dequantizedModel(
      size === "tiny" ? goldenPath("tiny/model_4bit") : await rebuilt("odd/model_4bit"),
    );
    const at = readConfig(goldenPath(`${size}/model_hf`));
    for (const prefix of ["plain.", "packed."]) {
      const input = { weights: quantized, tokens: tokensOf(file, prefix), adapter, scaling: 2 };
      compareCase(file, { config: at, prefix, input });
    }
  });
}

Deno.test("llamaBackward() gives autograd's gradient of every weight, the tied embedding in two parts", () => {
  const file = golden("tiny/full_grads.safetensors");
  const tokens = tokensOf(file, "");
  compareCase(file, { config, prefix: "", input: { weights, tokens } });
  compareCase(file, { config, prefix: "packed.", input: { weights, tokens: tokensOf(file, "packed.") } });
  const { gradients, dx } = llamaBackward(llamaForward(config, { weights, tokens }));
  const { vocab_size: V, hidden_size: C, pad_token_id: paddingId } = config;
  assertEquals(Array.from(tokens.inputIds).includes(paddingId!), true); // its row has the head's part only
  const lookup = embeddingBackward(dx, tokens.inputIds, { V, C, paddingId });
  const head = gradients.get("model.embed_tokens.weight")!.map((g, i) => g - lookup[i]!);
  assertClose(head, file.f32("tied.head_part"), { max: GRADIENT, name: "tied.head_part" });
});

Deno.test("llamaBackward() agrees with finite differences over all parameters, with dropout and with an untied head", () => {
  const small = {
    ...config,
    vocab_size: 11,
    hidden_size: 6,
    intermediate_size: 5,
    pad_token_id: null,
    num_hidden_layers: 2,
    head_dim: 4,
  };
  const at = { ...small, num_attention_heads: 3, num_key_value_heads: 1 };
  const shapes: Record<string, number> = {
    q: 12 * 6,
    k: 4 * 6,
    v: 4 * 6,
    o: 6 * 12,
    gate: 5 * 6,
    up: 5 * 6,
    down: 6 * 5,
  };
  const inWidth: Record<string, number> = { o: 12, down: 5 };
  const base = new Map<string, Float64Array>(), adapter = new Map<string, Float64Array>();
  const masks = new Map<string, Float64Array>();
  const make = (n: number, mean = 0) => Float64Array.from(wave(n, base.size + adapter.size, { mean, scale: 0.6 }));
  base.set("model.embed_tokens.weight", make(66)).set("lm_head.weight", make(66)).set("model.norm.weight", make(6, 1));
  for (const layer of [0, 1]) {
    for (const norm of ["input", "post_attention"]) {
      base.set(`model.layers.${layer}.${norm}_layernorm.weight`, make(6, 1));
    }
    for (const [module, count] of Object.entries(shapes)) {
      const name = `model.layers.${layer}.${"qkvo".includes(module) ? "self_attn" : "mlp"}.${module}_proj`;
      const K = inWidth[module] ?? 6;
      base.set(`${name}.weight`, make(count));
      adapter.set(`base_model.model.${name}.lora_A.weight`, make(2 * K));
      adapter.set(`base_model.model.${name}.lora_B.weight`, make(2 * count / K));
      masks.set(name, new Float64Array(9 * K).map((_, i) => i % 5 === 2 ? 0 : 1.25));
    }
  }
  const tokens = {
    inputIds: [1, 7, 3, 10, 0, 7, 2, 7, 5],
    positionIds: [0, 1, 2, 3, 0, 1, 2, 3, 4],
    labels: [1, 7, -100, 10, -100, 7, 2, 7, 5],
  };
  for (const trained of [base, adapter]) {
    const input = {
      weights: base,
      tokens,
      masks,
      scaling: 1.5,
      numItems: 10,
      adapter: trained === base ? null : adapter,
    };
    const { gradients } = llamaBackward(llamaForward(at, input));
    assertEquals([...gradients.keys()].toSorted(), [...trained.keys()].toSorted());
    for (const [name, values] of trained) {
      const original = values.slice(), direction = wave(values.length, 5, { mean: 0.3, scale: 1 });
      const moved = (h: number) => {
        values.forEach((_, i) => values[i] = original[i]! + h * direction[i]!);
        const { loss } = llamaForward(at, input);
        values.set(original);
        return loss;
      };
      const h = 1e-5, numeric = (moved(h) - moved(-h)) / (2 * h);
      const analytic = gradients.get(name)!.reduce((sum, g, i) => sum + g * direction[i]!, 0);
      assertClose([analytic], [numeric], { max: 1e-7, name });
    }
  }
});
