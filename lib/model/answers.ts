/**
 * What a model is asked in an evaluation and how long its answers are: fixed questions, prompts cut out of a split's
 * documents, lengths. It generates nothing, and it does not judge whether an answer is true.
 */
import type { PackedRows } from "../data/dataset.ts";
import { TorchGenerator } from "../data/random.ts";
import type { ChatTemplate } from "../data/template.ts";
import { streamDecoder, type Tokenizer } from "../data/tokenizer.ts";

/** The blog's two questions come first; the rest suits what the recipe's model has read. */
export const fixedQuestions: Readonly<Record<"tiny" | "blog", readonly string[]>> = {
  tiny: [
    "How is hypertension diagnosed and treated?",
    "What causes acute myocardial infarction?",
    "What is osteoporosis?",
    "What causes gallstones?",
    "How is gout diagnosed?",
    "How is asthma treated?",
    "How can tuberculosis be prevented?",
  ],
  blog: [
    "How is hypertension diagnosed and treated?",
    "What causes acute myocardial infarction?",
    "What are the symptoms of type 2 diabetes?",
    "How does asthma affect the lungs?",
    "What are the side effects of statins?",
    "Which factors raise the risk of a stroke?",
    "When are antibiotics of no use?",
  ],
};

/** A document of a split up to where its first answer begins, and as `reference` the rest of it. */
export interface Prompt {
  /** Number of the document in the split, from 0. */
  readonly document: number;
  readonly ids: readonly number[];
  readonly text: string;
  readonly reference: string;
}

/** Mean, median (of an even number the mean of the middle two), least and most. */
export interface Spread {
  readonly mean: number;
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** The token ids of each document, whole where the packing kept it whole: rows of `wrapped` are one stream cut at `eosId`. */
export function splitDocuments({ inputIds, positionIds, metadata }: PackedRows, eosId: number): Int32Array[] {
  const begins = metadata.packing === "wrapped"
    ? (t: number) => inputIds[t - 1] === eosId
    : (t: number) => positionIds[t] === 0;
  const documents: Int32Array[] = [];
  for (let start = 0, t = 1; t <= inputIds.length; t++) {
    if (t < inputIds.length && !begins(t)) continue;
    documents.push(inputIds.subarray(start, t));
    start = t;
  }
  return documents;
}

/**
 * Up to `count` prompts of at most `longest` tokens, from documents drawn in an order that `seed` decides. A prompt ends
 * with the text that the template puts between a question and its answer; a document without that text gives none.
 */
export function drawPrompts(
  documents: readonly Int32Array[],
  { tokenizer, template, count, longest, seed }: {
    readonly tokenizer: Tokenizer;
    readonly template: ChatTemplate;
    readonly count: number;
    readonly longest: number;
    readonly seed: number;
  },
): Prompt[] {
  const { tail } = promptFrame(template);
  if (tail === "") throw new Error("Cannot cut prompts: the template puts nothing between a question and its answer");
  const prompts: Prompt[] = [];
  for (const document of new TorchGenerator(seed).permutation(documents.length)) {
    if (prompts.length === count) break;
    const prompt = cutPrompt(documents[document]!, { tokenizer, tail });
    if (prompt !== undefined && prompt.ids.length <= longest) prompts.push({ document, ...prompt });
  }
  return prompts;
}

/** The question in a prompt: what stands between the parts that every prompt has, or all of it where they are missing. */
export function questionOf(text: string, template: ChatTemplate): string {
  const { head, tail } = promptFrame(template);
  return text.startsWith(head) && text.endsWith(tail) ? text.slice(head.length, text.length - tail.length) : text;
}

/** Words are what white space separates. */
export function countWords(text: string): number {
  return text.split(/\s+/).filter((word) => word !== "").length;
}

/** Throws a RangeError when there are no values. */
export function spread(values: readonly number[]): Spread {
  if (values.length === 0) throw new RangeError("Cannot describe lengths: there are no answers");
  const sorted = values.toSorted((a, b) => a - b), n = sorted.length;
  return {
    mean: sorted.reduce((sum, value) => sum + value, 0) / n,
    median: (sorted[(n - 1) >> 1]! + sorted[n >> 1]!) / 2,
    min: sorted[0]!,
    max: sorted[n - 1]!,
  };
}

/** The ids are those of the document, or, where question and answer share a token, those of the prompt alone. */
function cutPrompt(
  all: Int32Array,
  { tokenizer, tail }: { readonly tokenizer: Tokenizer; readonly tail: string },
): Omit<Prompt, "document"> | undefined {
  const decoder = streamDecoder(tokenizer);
  let seen = "", end = -1, t = 0;
  for (; t < all.length && end < 0; t++) {
    seen += decoder.push(all[t]!);
    end = seen.indexOf(tail);
  }
  if (end < 0) return undefined;
  const text = seen.slice(0, end + tail.length);
  return {
    ids: text === seen ? Array.from(all.subarray(0, t)) : tokenizer.encode(text),
    text,
    reference: seen.slice(text.length) + tokenizer.decode(all.subarray(t), { skipSpecialTokens: true }),
  };
}

/** What stands before and behind the question in every prompt. */
function promptFrame(template: ChatTemplate): { head: string; tail: string } {
  const mark = "{question}";
  const text = template.renderPrompt(mark), at = text.indexOf(mark);
  if (at < 0) throw new Error("Cannot cut prompts: the template does not show the question");
  return { head: text.slice(0, at), tail: text.slice(at + mark.length) };
}
