/**
 * Text to token ids and back, over @huggingface/tokenizers, with the ids of the reference `tokenizers` library.
 * Refuses a folder without an end-of-text token: a model that never learns to stop is of no use.
 */
import { ByteLevelPreTokenizer, SequencePreTokenizer, Tokenizer as Library } from "@huggingface/tokenizers";
import { checkHolds, exists, readJsonObject } from "./files.ts";

/** A loaded tokenizer; `vocabSize` is the largest id plus one. */
export interface Tokenizer {
  /** Ids of `text`; adds what the tokenizer's own post-processor adds, which for GPT-2 is nothing. */
  encode(text: string): number[];
  /** Text of `ids`; bytes that are not UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, options?: DecodeOptions): string;
  /** `text` changed so that `encode` reads special tokens in it as plain text; needs `escapes`. */
  escape(text: string): string;
  readonly vocabSize: number;
  readonly eosId: number;
  readonly eosToken: string;
  readonly bosToken?: string;
  readonly chatTemplate?: string;
}

/** Whether `decode` leaves special tokens such as the end of text out; by default it keeps them. */
export interface DecodeOptions {
  readonly skipSpecialTokens?: boolean;
}

/** The files that a tokenizer may consist of. */
const FILES = [
  "added_tokens.json",
  "chat_template.jinja",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
];

/**
 * GPT-2's pre-tokenizer pattern with the white space of Unicode. JavaScript's `\s`, which the library uses, lacks
 * U+0085 and has U+FEFF; the reference (Rust) has it the other way round.
 */
const GPT2_PATTERN =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/** Breaks a special token in two; a Unicode noncharacter, so no text that is meant for interchange holds it. */
const BREAK = "\uFDD0";

/** Throws unless the folder has the two files that every tokenizer needs. */
export function checkTokenizer(dir: string): void {
  for (const name of ["tokenizer.json", "tokenizer_config.json"]) {
    checkHolds(dir, { name, wanted: "a tokenizer folder", run: "deno task 01" });
  }
}

/**
 * Loads tokenizer.json and tokenizer_config.json (and special_tokens_map.json, chat_template.jinja) of a folder. With
 * `escapes`, `escape` works and U+FDD0 is dropped from every text. Throws when a file is missing or no eos token is named.
 */
export function loadTokenizer(dir: string, { escapes = false }: { readonly escapes?: boolean } = {}): Tokenizer {
  checkTokenizer(dir);
  const json = readJsonObject(`${dir}/tokenizer.json`);
  const config = {
    ...readOptional(`${dir}/special_tokens_map.json`),
    ...readJsonObject(`${dir}/tokenizer_config.json`),
  };
  const added = (json.added_tokens ?? []) as readonly { id: number; content: string; special: boolean }[];
  if (escapes) {
    if (json.normalizer !== null && json.normalizer !== undefined) {
      throw new TypeError(`Cannot escape special tokens with "${dir}": its tokenizer has a normalizer of its own`);
    }
    // Special tokens are looked for first, then the normalizer takes the break out again.
    json.normalizer = { type: "Replace", pattern: { String: BREAK }, content: "" };
    json.added_tokens = added.map((token) => ({ ...token, normalized: false }));
  }
  const library = new Library(json, config);
  useUnicodeWhiteSpace(library.pre_tokenizer);

  const eosToken = tokenText(config.eos_token);
  const eosId = eosToken === undefined ? undefined : library.token_to_id(eosToken);
  if (eosToken === undefined || eosId === undefined) {
    const state = eosToken === undefined ? "it names no eos_token" : `its vocabulary lacks "${eosToken}"`;
    throw new Error(`Cannot read "${dir}/tokenizer_config.json": ${state}: without one no answer would end`);
  }
  const bosToken = tokenText(config.bos_token);
  const chatTemplate = readChatTemplate(dir, config.chat_template);
  const special = added.filter((token) => token.special).map((token) => token.content);
  let vocabSize = 0;
  for (const id of library.get_vocab().values()) vocabSize = Math.max(vocabSize, id + 1);

  return {
    encode: (text) => library.encode(text).ids,
    decode(ids, options = {}) {
      if (ids.length === 0) return ""; // the library throws
      return library.decode(Array.from(ids), {
        skip_special_tokens: options.skipSpecialTokens ?? false,
        clean_up_tokenization_spaces: false, // it would change the text: " ." to "."
      });
    },
    escape(text) {
      if (!escapes) throw new Error(`Cannot escape special tokens with "${dir}": it was loaded without \`escapes\``);
      let escaped = text;
      for (const token of special) escaped = escaped.replaceAll(token, token[0] + BREAK + token.slice(1));
      return escaped;
    },
    vocabSize,
    eosId,
    eosToken,
    ...(bosToken === undefined ? {} : { bosToken }),
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
  };
}

/** The tokenizer's files: those of `folder/tokenizer`, else those of `folder`, else none. */
export function tokenizerFiles(folder: string): string[] {
  for (const dir of [`${folder}/tokenizer`, folder]) {
    const files = FILES.map((name) => `${dir}/${name}`).filter(exists);
    if (files.some((file) => /\/(tokenizer|vocab)\.json$/.test(file))) return files;
  }
  return [];
}

/** Text as ids arrive: `push` gives what is new, `end` the rest. */
export interface StreamDecoder {
  push(id: number): string;
  end(): string;
}

/**
 * A decoder for streaming that holds a token back until its last character is whole; all pieces together are the text
 * that `decode` gives. The previous piece is decoded along with the next, as some decoders look at what stands before.
 */
export function streamDecoder(tokenizer: Pick<Tokenizer, "decode">, options: DecodeOptions = {}): StreamDecoder {
  let ids: number[] = []; // the previous piece and what is held back
  let shown = 0; // how many of them are the previous piece
  const rest = (force: boolean): string => {
    const before = tokenizer.decode(ids.slice(0, shown), options);
    const text = tokenizer.decode(ids, options);
    if (!force && text.endsWith("\uFFFD")) return "";
    ids = ids.slice(shown);
    shown = ids.length;
    return text.slice(before.length);
  };
  return {
    push(id) {
      ids.push(id);
      return rest(false);
    },
    end: () => rest(true),
  };
}

function useUnicodeWhiteSpace(preTokenizer: unknown): void {
  if (preTokenizer instanceof ByteLevelPreTokenizer) preTokenizer.pattern = GPT2_PATTERN;
  else if (preTokenizer instanceof SequencePreTokenizer) preTokenizer.tokenizers.forEach(useUnicodeWhiteSpace);
}

/** A token is written as its text or as `{ content }`. */
function tokenText(token: unknown): string | undefined {
  if (typeof token === "string") return token;
  const content = (token as { content?: unknown } | null | undefined)?.content;
  return typeof content === "string" ? content : undefined;
}

/** The text of a template, the one called "default" of several, or the file that transformers 4.51 and later write. */
function readChatTemplate(dir: string, template: unknown): string | undefined {
  const named = Array.isArray(template) ? template.find((entry) => entry?.name === "default")?.template : template;
  if (typeof named === "string") return named;
  const path = `${dir}/chat_template.jinja`;
  return exists(path) ? Deno.readTextFileSync(path) : undefined;
}

function readOptional(path: string): Record<string, unknown> {
  return exists(path) ? readJsonObject(path) : {};
}
