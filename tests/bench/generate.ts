/** Writing answers: tokens per second with one sequence and with several, and the share of the copy bandwidth. */
import type { Gpu } from "../../lib/gpu/device.ts";
import type { Adapter } from "../../lib/model/adapter.ts";
import type { ModelConfig } from "../../lib/model/config.ts";
import { createGenerator } from "../../lib/model/generate.ts";
import { logitsOf } from "../../lib/model/llama.ts";
import { blogConfig, randomBatch, SMALL, writeRandomModel } from "./problem.ts";
import { TINY } from "./step.ts";

/** One line of `generate` in bench.json. */
export interface GenerateResult {
  readonly name: string;
  readonly sequences: number;
  readonly prompt_tokens: number;
  readonly new_tokens: number;
  /** All sequences together, without the time to the first token. */
  readonly tokens_per_s: number;
  /** Reading the prompts and writing the first token of each. */
  readonly first_token_ms: number;
  /** Weights read per second, and their share of the copy bandwidth. */
  readonly gbps: number;
  readonly share: number;
}

/** Throws where a token is not the likeliest by the logits of the model that trains, which has no cache; ties may go either way. */
async function checkGreedy(
  { name, model, adapter, prompt, ids }: {
    name: string;
    model: string;
    adapter: Adapter;
    prompt: readonly number[];
    ids: readonly number[];
  },
): Promise<void> {
  const rows = (await logitsOf({ model, adapter }, [...prompt, ...ids.slice(0, -1)])).slice(prompt.length - 1);
  rows.forEach((row, i) => {
    const size = row.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const best = row.reduce((most, value) => Math.max(most, value), -Infinity), got = row[ids[i]!]!;
    if (!(best - got <= 1e-4 * size)) {
      throw new Error(`Cannot time ${name}: token ${i + 1} of the answer has a logit of ${got}, another one ${best}`);
    }
  });
}

/** The models and numbers of sequences that fit the device. */
export function generateCases(gpu: Gpu): { name: string; config: ModelConfig; sequences: number }[] {
  const both = (name: string, config: ModelConfig) => [1, 8].map((sequences) => ({ name, config, sequences }));
  return [...both("tiny", TINY), ...(gpu.cpu ? both("small", SMALL) : both("blog", blogConfig()))];
}

/** Writes greedily with an adapter, never ending early; the second time is timed. Models are kept in `dir`. */
export async function benchGenerate(
  { name, config, sequences }: { name: string; config: ModelConfig; sequences: number },
  { dir, quick, copyGbps }: { dir: string; quick: boolean; copyGbps: number },
): Promise<GenerateResult> {
  const length = 64, count = quick ? 16 : 48;
  const { model, adapter } = await writeRandomModel(dir, { config, quantized: true });
  const { inputIds } = randomBatch({ rows: sequences, length, vocab: config.vocab_size, seed: 2 });
  const prompts = Array.from({ length: sequences }, (_, i) => Array.from(inputIds).slice(i * length, (i + 1) * length));
  const generator = await createGenerator({ model, adapter, batch: sequences, context: length + count });
  let first = 0;
  const write = async () => {
    const began = performance.now();
    let tokens = 0;
    const onToken = () => {
      if (++tokens === sequences) first = performance.now() - began;
    };
    const how = { maxNewTokens: count, greedy: true, eosIds: [], onToken };
    const answers = await generator.generate(prompts, how);
    if (answers.some(({ ids }) => ids.length !== count)) throw new Error(`Cannot time ${name}: an answer ended early`);
    return [answers[0]!.ids, performance.now() - began - first] as const;
  };
  const [ids] = await write(); // compiles
  await checkGreedy({ name, model, adapter, prompt: prompts[0]!, ids });
  const [, ms] = await write();
  const { layers, head } = generator.parts.weights;
  const linears = layers.flatMap(({ qkv, o, gateUp, down }) => [qkv, o, gateUp, down]);
  const read = [...linears.map(({ weight }) => weight), ...head.map(({ tensor }) => tensor)];
  const gbps = read.reduce((sum, { bytes }) => sum + bytes, 0) * (count - 1) / ms / 1e6;
  generator.destroy();
  return {
    name,
    sequences,
    prompt_tokens: length,
    new_tokens: count,
    tokens_per_s: 1e3 * sequences * (count - 1) / ms,
    first_token_ms: first,
    gbps,
    share: gbps / copyGbps,
  };
}
