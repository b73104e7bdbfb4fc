/**
 * One model's part in an evaluation: its losses over the rows, its answers to prompts, and then the GPU is free for the next. It
 * compares nothing.
 */
import type { Tokenizer } from "../data/tokenizer.ts";
import { countWords } from "./answers.ts";
import { generateAll, type GenerateOptions, type GeneratorOptions } from "./generate.ts";
import type { Llama, MicroBatch } from "./llama.ts";
import { type Measured, measurePerplexity } from "./perplexity.ts";

/** What a model is examined with. */
export interface ExamOptions {
  /** Micro-batches of the split, and how many of its rows each holds. */
  readonly batches: readonly MicroBatch[];
  readonly rows: readonly number[];
  readonly tokenizer: Tokenizer;
  readonly generate: GenerateOptions & Pick<GeneratorOptions, "batch">;
  /** Called with the number of micro-batches that are done. */
  readonly onBatch: (done: number) => void;
  /** Called for every new token: answers so far, each by its share of the most that it may have, and the tokens of them all. */
  readonly onToken: (answers: number, tokens: number) => void;
}

/** One answer: `ids` are its tokens with the one that ended it, if one did; `text` is without. */
export interface Reply {
  readonly ids: readonly number[];
  readonly text: string;
  readonly words: number;
  readonly finished: boolean;
}

/** What a model did: its losses, its answers in the order of the prompts, and the speed of these. */
export interface Examined extends Measured {
  readonly answers: readonly Reply[];
  readonly device: string;
  readonly written: { readonly tokens: number; readonly ms: number };
}

/** Measures the model and lets it answer; frees it. */
export async function examine(
  llama: Llama,
  prompts: readonly (readonly number[])[],
  { batches, rows, tokenizer, generate, onBatch, onToken }: ExamOptions,
): Promise<Examined> {
  const losses = await measurePerplexity(llama, { batches, rows, onBatch });
  const began = performance.now(), { maxNewTokens } = generate;
  const shares = prompts.map(() => 0); // a short answer is whole when it ends
  let tokens = 0;
  const answers = await generateAll({
    ...generate,
    model: llama,
    context: Math.min(llama.config.max_position_embeddings, Math.max(...prompts.map((p) => p.length)) + maxNewTokens),
    eosIds: [tokenizer.eosId],
    onToken(prompt, id) {
      tokens++;
      shares[prompt] = id === tokenizer.eosId ? 1 : shares[prompt]! + 1 / maxNewTokens;
      onToken(Math.floor(10 * shares.reduce((sum, share) => sum + share, 0)) / 10, tokens);
    },
  }, prompts);
  const ms = performance.now() - began;
  llama.destroy();
  const replies = answers.map(({ ids, finished }) => {
    const text = tokenizer.decode(ids, { skipSpecialTokens: true });
    return { ids, text, words: countWords(text), finished };
  });
  return { ...losses, answers: replies, device: llama.gpu.name, written: { tokens, ms } };
}
