/**
 * Dropout of the adapter's input in the whole model, against the slow reference with the same masks. Bound: that of the
 * gradients without dropout (2e-5 of the largest); the largest error found is named beside it.
 */
import { assertEquals, assertNotEquals } from "@std/assert";
import { hash32 } from "../../lib/data/random.ts";
import { nextTokenTargets } from "../../lib/data/dataset.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { linearModules, linearShape, moduleName } from "../../lib/model/config.ts";
import { Llama, type MicroBatch } from "../../lib/model/llama.ts";
import { readSlots } from "../../lib/model/lora.ts";
import { Trainer } from "../../lib/model/trainer.ts";
import { assertClose, golden, goldenPath } from "../check.ts";
import { NO_GPU } from "../on_gpu.ts";
import { llamaBackward, llamaForward } from "../reference_llama.ts";

const P = 0.25, DRAW = 1234;

const file = golden("tiny/lora.safetensors");
const inputIds = file.i32("packed.input_ids"), positionIds = file.i32("packed.position_ids");
const labels = file.i32("packed.labels");
const batch: MicroBatch = { inputIds, positionIds, targets: nextTokenTargets({ positionIds, labels }) };
const items = Array.from(batch.targets).filter((id) => id >= 0).length;
const { lora, tensors } = readAdapter(goldenPath("tiny/lora_adapter"));

async function gradients(checkpointing: "none" | "block") {
  const adapter = { lora: { ...lora, lora_dropout: P }, tensors };
  const llama = await Llama.open({
    model: goldenPath("tiny/model_hf"),
    adapter,
    train: "lora",
    tokens: 48,
    checkpointing,
  });
  llama.evaluate(batch);
  const evaluated = (await llama.losses())[0]! / items;
  llama.accumulate(batch, { items, slot: 0, draw: DRAW });
  const loss = (await llama.losses())[0]! / items;
  const grads = await readSlots(llama.gpu, llama.groups.map(({ grad, slots }) => ({ tensor: grad, slots })));
  const { config } = llama;
  llama.destroy();
  return { config, evaluated, loss, grads };
}

Deno.test(
  "Llama drops what each projection's adapter reads in training, and nothing in evaluation",
  { ignore: NO_GPU },
  async () => {
    const { config, evaluated, loss, grads } = await gradients("none");
    const masks = new Map<string, Float64Array>();
    for (let layer = 0; layer < config.num_hidden_layers; layer++) {
      for (const [m, module] of linearModules.entries()) {
        const salt = layer * linearModules.length + m, count = 48 * linearShape(config, module)[1];
        const mask = Float64Array.from(
          { length: count },
          (_, i) => (hash32(DRAW, salt, i) >>> 8) * 2 ** -24 >= P ? 1 / (1 - P) : 0,
        );
        masks.set(moduleName(layer, module), mask);
      }
    }
    const weights = golden("tiny/model_hf/model.safetensors").floats();
    const tokens = { inputIds, positionIds, labels };
    const state = llamaForward(config, { weights, tokens, adapter: tensors, scaling: lora.lora_alpha / lora.r, masks });
    assertClose([loss], [state.loss], { max: 1e-5, name: "loss" });
    assertClose([evaluated], file.f32("packed.loss"), { max: 1e-5, name: "loss without dropout" });
    const expected = llamaBackward(state).gradients;
    for (const [name, values] of grads) assertClose(values, expected.get(name)!, { max: 2e-5, name });
  },
);

Deno.test(
  "dropout draws the same again when block checkpointing computes a layer twice",
  { ignore: NO_GPU },
  async () => {
    const [none, block] = [await gradients("none"), await gradients("block")];
    assertEquals(block.grads, none.grads);
  },
);

Deno.test(
  "Trainer draws anew for every micro-batch and update, by seed, update and micro-batch",
  { ignore: NO_GPU },
  async () => {
    const options = {
      model: goldenPath("tiny/model_hf"),
      adapter: { lora: { ...lora, lora_dropout: P }, tensors },
      train: "lora" as const,
      tokens: 48,
    };
    const hyper = {
      optimizer: "adamw" as const,
      weightDecay: 0,
      beta1: 0.9,
      beta2: 0.999,
      eps: 1e-8,
      maxGradNorm: 0,
      seed: 7,
    };
    const trainer = await Trainer.open({ ...options, hyper });
    for (const step of [1, 2]) trainer.update([batch, batch], { step, learningRate: 0 });
    const found = (await trainer.read()).map(({ loss }) => loss);
    trainer.destroy();
    const llama = await Llama.open(options);
    for (const step of [1, 2]) {
      for (const i of [0, 1]) llama.accumulate(batch, { items: 2 * items, slot: step, draw: hash32(7, step, i) });
    }
    const sums = await llama.losses();
    llama.destroy();
    assertEquals(found, [1, 2].map((step) => sums[step]! / (2 * items)));
    assertNotEquals(found[0], found[1]);
  },
);
