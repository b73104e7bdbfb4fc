/**
 * Writing answers token by token, several at once: which prompt has which place in the cache, which token comes next, when
 * an answer ends. A place that becomes free goes to the next prompt. An answer does not depend on what is written beside it.
 */
import type { Adapter } from "./adapter.ts";
import { Decoder } from "./decoder.ts";
import { destroyParts, type ModelParts, openParts } from "./parts.ts";
import { checkSampling, NEUTRAL, nextToken, type Sampling } from "./sample.ts";

/** What writes: a model folder with or without an adapter, or a model that is open already. */
export interface GeneratorOptions {
  readonly model: string | ModelParts;
  /** An adapter folder, or one already read, for a model folder. */
  readonly adapter?: string | Adapter | undefined;
  /** Most answers at once. */
  readonly batch?: number;
  /** Most tokens of a prompt and its answer together; by default, and at most, the model's positions. */
  readonly context?: number;
}

/** How to write. Sampling settings that are left out are neutral. */
export interface GenerateOptions extends Partial<Sampling> {
  readonly maxNewTokens: number;
  /** Tokens that end an answer; by default the model's own. */
  readonly eosIds?: readonly number[];
  readonly seed?: number;
  /** Called with the index of the prompt for every token as it is written. */
  readonly onToken?: (prompt: number, id: number) => void;
}

/** One answer: its tokens without the prompt but with the one that ended it, if one did. */
export interface Answer {
  readonly ids: readonly number[];
  /** False where the answer was cut off, by `maxNewTokens` or by the context. */
  readonly finished: boolean;
}

/** A model that writes answers. */
export interface Generator {
  readonly parts: ModelParts;
  readonly context: number;
  /** Answers in the order of the prompts. Throws `RangeError` where a prompt is empty or leaves no room for an answer. */
  generate(prompts: readonly (readonly number[])[], options: GenerateOptions): Promise<Answer[]>;
  /** Frees the buffers, and the model where it was opened here. */
  destroy(): void;
}

/** An answer in the making. */
interface Sequence {
  readonly prompt: number;
  readonly slot: number;
  /** The prompt and what was written. */
  readonly ids: number[];
  readonly seen: Set<number>;
}

/** Opens what `options` name and makes the buffers. */
export async function createGenerator(options: GeneratorOptions): Promise<Generator> {
  const { model, adapter, batch = 8 } = options;
  if (!(Number.isInteger(batch) && batch > 0)) throw new RangeError(`Cannot write ${batch} answers at once`);
  if (typeof model !== "string" && adapter) {
    throw new TypeError("Cannot add an adapter to a model that is open already");
  }
  const { parts, fill } = typeof model === "string"
    ? await openParts({ model, adapter, resident: true })
    : { parts: model, fill: () => Promise.resolve() };
  const most = parts.config.max_position_embeddings, context = options.context ?? most;
  if (!(Number.isInteger(context) && context > 1 && context <= most)) {
    throw new RangeError(`Cannot generate with a context of ${context} tokens: the model has ${most} positions`);
  }
  const decoder = new Decoder(parts, { batch, context });
  decoder.compile();
  await fill();
  return {
    parts,
    context,
    generate: (prompts, how) => generate(decoder, prompts, how),
    destroy() {
      decoder.destroy();
      if (typeof model === "string") destroyParts(parts);
    },
  };
}

/** Writes an answer to every prompt and frees what that took. */
export async function generateAll(
  options: GeneratorOptions & GenerateOptions,
  prompts: readonly (readonly number[])[],
): Promise<Answer[]> {
  if (prompts.length === 0) return [];
  const generator = await createGenerator({ ...options, batch: Math.min(options.batch ?? 8, prompts.length) });
  const answers = await generator.generate(prompts, options);
  generator.destroy();
  return answers;
}

async function generate(
  decoder: Decoder,
  prompts: readonly (readonly number[])[],
  options: GenerateOptions,
): Promise<Answer[]> {
  const { config } = decoder.parts, { maxNewTokens, seed = 0, onToken } = options;
  const sampling: Sampling = { ...NEUTRAL, ...options };
  const eos = new Set(options.eosIds ?? (config.eos_token_id === null ? [] : [config.eos_token_id]));
  checkSampling(sampling);
  if (!(Number.isInteger(maxNewTokens) && maxNewTokens > 0)) {
    throw new RangeError(`Cannot generate ${maxNewTokens} tokens: a whole number above 0 is wanted`);
  }
  for (const prompt of prompts) checkPrompt(prompt, { vocab: config.vocab_size, context: decoder.context });

  const answers: Answer[] = [];
  const free = Array.from({ length: decoder.batch }, (_, slot) => slot);
  let live: Sequence[] = [], next = 0;
  /** Writes each sequence's next token and returns those that go on; the others give their slot back. */
  const extend = (sequences: readonly Sequence[], logits: readonly Float32Array[]): Sequence[] =>
    sequences.filter(({ prompt, slot, ids, seen }, i) => {
      const start = prompts[prompt]!.length, step = ids.length - start;
      const id = nextToken(logits[i]!, { seen, sampling, seed, sequence: prompt, step });
      ids.push(id);
      seen.add(id);
      onToken?.(prompt, id);
      const finished = eos.has(id);
      if (!finished && step + 1 < maxNewTokens && ids.length < decoder.context) return true;
      answers[prompt] = { ids: ids.slice(start), finished };
      free.push(slot);
      return false;
    });

  while (next < prompts.length || live.length > 0) {
    const count = decoder.fits(prompts.slice(next, next + free.length));
    if (count > 0) {
      const fresh = prompts.slice(next, next + count).map((ids, i) => ({
        prompt: next + i,
        slot: free.pop()!,
        ids: [...ids],
        seen: new Set(ids),
      }));
      next += count;
      live.push(...extend(fresh, await decoder.prefill(fresh)));
    }
    if (live.length === 0) continue;
    const newest = live.map(({ ids, slot }) => ({ id: ids.at(-1)!, position: ids.length - 1, slot }));
    live = extend(live, await decoder.step(newest));
  }
  await decoder.settle();
  return answers;
}

/** Throws `RangeError` where a prompt is empty, has a token that the model lacks, or leaves no room for an answer. */
export function checkPrompt(
  prompt: readonly number[],
  { vocab, context }: { readonly vocab: number; readonly context: number },
): void {
  if (prompt.length === 0) throw new RangeError("Cannot generate from an empty prompt: at least one token is wanted");
  if (prompt.length >= context) {
    const state = `the context has ${context} for it and the answer`;
    throw new RangeError(`Cannot generate from a prompt of ${prompt.length} tokens: ${state}`);
  }
  const alien = prompt.find((id) => !(Number.isInteger(id) && id >= 0 && id < vocab));
  if (alien !== undefined) throw new RangeError(`Cannot embed token ${alien}: the vocabulary has ${vocab}`);
}
