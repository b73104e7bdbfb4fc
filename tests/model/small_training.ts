/** A model so small that a thousand updates take seconds. */
import type { ModelConfig } from "../../lib/model/config.ts";
import { Trainer } from "../../lib/model/trainer.ts";
import { blogConfig, randomBatch, writeRandomModel } from "../bench/problem.ts";
import { temporaryFolder } from "../check.ts";

export const CONFIG: ModelConfig = blogConfig({
  vocab_size: 64,
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  head_dim: 16,
  max_position_embeddings: 16,
  dtype: "float32",
});
export const HYPER = { weightDecay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, maxGradNorm: 1 };

/** Opens a very small model, hands over a function that makes some updates, and frees it. */
export async function training(body: (update: (count: number) => Promise<void>) => Promise<void>): Promise<void> {
  using folder = temporaryFolder();
  const { model, adapter } = await writeRandomModel(folder.path, { config: CONFIG, quantized: true });
  const hyper = { ...HYPER, optimizer: "adamw_8bit" } as const;
  const trainer = await Trainer.open({ model, adapter, train: "lora", tokens: 16, hyper });
  const batch = randomBatch({ rows: 1, length: 16, vocab: CONFIG.vocab_size, seed: 1 });
  let step = 0;
  await body(async (count) => {
    for (let i = 0; i < count; i++) {
      trainer.update([batch], { step: ++step, learningRate: 1e-3 });
      if (i % 16 === 15) await trainer.read();
    }
    await trainer.read();
  });
  trainer.destroy();
}
