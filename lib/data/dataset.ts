/**
 * Records to token ids and labels, packed rows on disk, and the order in which training visits them; after TRL's
 * SFTTrainer and the Trainer of transformers. Labels are unshifted as there. Refuses a file whose parts do not fit each other.
 */
import type { Packing, Slice } from "./packing.ts";
import { TorchGenerator } from "./random.ts";
import type { SftRecord } from "./records.ts";
import { openSafetensors, writeSafetensors } from "./safetensors.ts";
import type { ChatTemplate, Message } from "./template.ts";
import { streamDecoder, type Tokenizer } from "./tokenizer.ts";

/** The label of a token that is not learnt. */
export const IGNORED = -100;

/** One record as tokens; `aligned` is false when a prompt alone has other ids than at the head of the whole text. */
export interface Example {
  readonly ids: Int32Array;
  readonly labels: Int32Array;
  readonly aligned: boolean;
}

/** What `encodeRecord` needs: which tokens are learnt, and whether special tokens in the data are plain text. */
export interface Encoding {
  readonly tokenizer: Tokenizer;
  readonly template: ChatTemplate;
  readonly loss: "all" | "completion";
  readonly escape?: boolean;
}

/** Rows one after the other: row r has the tokens `rowOffsets[r]` to `rowOffsets[r + 1]`; position 0 starts a document. */
export interface PackedRows {
  readonly inputIds: Int32Array;
  readonly positionIds: Int32Array;
  readonly labels: Int32Array;
  readonly rowOffsets: readonly number[];
  readonly metadata: Readonly<Record<string, string>>;
}

/**
 * The ids of a record, with the eos id at the end if it is not there yet, and its labels. `completion` learns what comes
 * after the prompt, or every assistant turn with its eos where no prompt is told. Throws a TypeError for plain text then.
 */
export function encodeRecord(record: SftRecord, encoding: Encoding): Example {
  const { tokenizer, template, loss } = encoding;
  const clean = (text: string) => encoding.escape ? tokenizer.escape(text) : text;
  if ("text" in record) {
    if (loss === "completion") {
      throw new TypeError(
        'Cannot learn completions alone: a "text" column does not tell where they begin: use --loss all',
      );
    }
    return example(withEos(tokenizer.encode(clean(record.text)), tokenizer));
  }
  if ("prompt" in record) {
    const ids = withEos(tokenizer.encode(clean(record.prompt) + clean(record.completion)), tokenizer);
    if (loss === "all") return example(ids);
    const prompt = tokenizer.encode(clean(record.prompt));
    return example(ids, { spans: [[prompt.length, ids.length]], aligned: startsWith(ids, prompt) });
  }
  const messages = record.messages.map(({ role, content }) => ({ role, content: clean(content) }));
  const text = template.render(messages);
  const plain = tokenizer.encode(text);
  // A template that ends its turns itself may add a line break after the eos token.
  const ids = text.trimEnd().endsWith(tokenizer.eosToken) ? plain : withEos(plain, tokenizer);
  return loss === "all"
    ? example(ids)
    : assistantTurns(ids, messages, { ...encoding, promptTurns: record.promptTurns });
}

/**
 * The tokens of packed `slices`. With packings that keep documents apart, positions restart with each slice and its first
 * label is ignored, since no token of the document precedes it; `wrapped` rows count on and keep every label.
 */
export function assembleRows(
  examples: readonly Example[],
  slices: readonly (readonly Slice[])[],
  { packing, metadata = {} }: { readonly packing: Packing; readonly metadata?: Readonly<Record<string, string>> },
): PackedRows {
  const rowOffsets = [0];
  for (const row of slices) rowOffsets.push(rowOffsets.at(-1)! + row.reduce((sum, { count }) => sum + count, 0));
  const total = rowOffsets.at(-1)!;
  const [inputIds, positionIds, labels] = [new Int32Array(total), new Int32Array(total), new Int32Array(total)];
  for (const [r, row] of slices.entries()) {
    let at = rowOffsets[r]!;
    for (const { document, begin, count } of row) {
      inputIds.set(examples[document]!.ids.subarray(begin, begin + count), at);
      labels.set(examples[document]!.labels.subarray(begin, begin + count), at);
      const start = packing === "wrapped" ? rowOffsets[r]! : at;
      for (let t = 0; t < count; t++) positionIds[at + t] = at + t - start;
      if (packing !== "wrapped") labels[at] = IGNORED;
      at += count;
    }
  }
  return { inputIds, positionIds, labels, rowOffsets, metadata };
}

/**
 * The token that each position has to predict, or -100: the label one to the right, as long as it belongs to the same
 * document. A row's first label is thereby never learnt, whatever it is.
 */
export function nextTokenTargets({ positionIds, labels }: Pick<PackedRows, "positionIds" | "labels">): Int32Array {
  const targets = new Int32Array(labels.length).fill(IGNORED);
  for (let t = 1; t < labels.length; t++) if (positionIds[t] !== 0) targets[t - 1] = labels[t]!;
  return targets;
}

/** The numbers of the rows from which nothing would be learnt. */
export function unlearntRows(rows: PackedRows): number[] {
  const targets = nextTokenTargets(rows);
  const empty: number[] = [];
  for (let r = 0; r + 1 < rows.rowOffsets.length; r++) {
    if (targets.subarray(rows.rowOffsets[r], rows.rowOffsets[r + 1]).every((id) => id === IGNORED)) empty.push(r);
  }
  return empty;
}

/** The table of a split: lengths in tokens before packing, then what the rows hold; every `share` and the efficiency are in [0, 1]. */
export function statistics(
  examples: readonly Example[],
  rows: PackedRows,
  { packing, maxLength, eosId }: { readonly packing: Packing; readonly maxLength: number; readonly eosId: number },
): Record<string, number> {
  const lengths = examples.map(({ ids }) => ids.length).sort((a, b) => a - b);
  const tokens = lengths.reduce((sum, n) => sum + n, 0);
  const kept = packing === "bfd" || packing === "none" ? maxLength : Infinity; // the others lose nothing
  const ended = examples.filter(({ ids, labels }) => ids.length <= kept && labels.at(-1) === eosId);
  const ends = rows.rowOffsets.slice(1);
  const learnt = nextTokenTargets(rows).reduce((sum, id) => sum + (id === IGNORED ? 0 : 1), 0);
  const share = (part: number, whole: number) => part / Math.max(1, whole);
  return {
    examples: examples.length,
    tokens,
    mean_length: share(tokens, lengths.length),
    median_length: ((lengths[(lengths.length - 1) >> 1] ?? 0) + (lengths[lengths.length >> 1] ?? 0)) / 2,
    longest: lengths.at(-1) ?? 0,
    truncated: lengths.filter((n) => n > kept).length,
    share_of_examples_ending_in_a_learnt_eos: share(ended.length, examples.length),
    prompts_with_other_ids_alone: examples.filter(({ aligned }) => !aligned).length,
    rows: ends.length,
    packing_efficiency: share(rows.inputIds.length, ends.length * maxLength),
    share_of_rows_whose_last_label_is_eos: share(
      ends.filter((end) => rows.labels[end - 1] === eosId).length,
      ends.length,
    ),
    learnt_tokens: learnt,
    learnt_share: share(learnt, rows.inputIds.length),
  };
}

/** The text of the first document, at most 400 tokens of it, cut where learnt and unlearnt tokens meet. */
export function documentParts(
  { inputIds, positionIds, labels }: PackedRows,
  tokenizer: Tokenizer,
): { learnt: boolean; text: string }[] {
  const next = positionIds.indexOf(0, 1);
  const end = Math.min(next < 0 ? inputIds.length : next, 400);
  const decoder = streamDecoder(tokenizer);
  const parts: { learnt: boolean; text: string }[] = [];
  for (let t = 0; t < end; t++) {
    const learnt = t > 0 && labels[t] !== IGNORED;
    const text = decoder.push(inputIds[t]!) + (t + 1 === end ? decoder.end() : "");
    if (parts.at(-1)?.learnt === learnt) parts.at(-1)!.text += text;
    else parts.push({ learnt, text });
  }
  return parts;
}

/** Rows `which`, in this order, side by side in one row of tokens: the micro-batch without padding that TRL's collator makes. */
export function gatherRows(rows: PackedRows, which: readonly number[]): PackedRows {
  const rowOffsets = [0];
  for (const r of which) rowOffsets.push(rowOffsets.at(-1)! + rows.rowOffsets[r + 1]! - rows.rowOffsets[r]!);
  const gather = (values: Int32Array) => {
    const gathered = new Int32Array(rowOffsets.at(-1)!);
    for (const [i, r] of which.entries()) {
      gathered.set(values.subarray(rows.rowOffsets[r], rows.rowOffsets[r + 1]), rowOffsets[i]);
    }
    return gathered;
  };
  const [inputIds, positionIds, labels] = [gather(rows.inputIds), gather(rows.positionIds), gather(rows.labels)];
  return { inputIds, positionIds, labels, rowOffsets, metadata: rows.metadata };
}

/** The order of the rows in epoch number `epoch` (from 0): `torch.randperm` with the seed `seed + epoch`. */
export function epochOrder(rows: number, seed: number, epoch: number): Uint32Array {
  return new TorchGenerator(seed + epoch).permutation(rows);
}

/**
 * The rows of each micro-batch of each update of an epoch. The last micro-batch and the last update take what is left, so
 * an epoch has ceil(ceil(rows / batchSize) / accumulation) updates.
 */
export function microBatches(
  order: ArrayLike<number>,
  { batchSize, accumulation }: { readonly batchSize: number; readonly accumulation: number },
): number[][][] {
  return chunks(chunks(Array.from(order), batchSize), accumulation);
}

/** Writes rows as safetensors: `input_ids`, `position_ids`, `labels` I32 `[N]` and `row_offsets` I64 `[rows + 1]`. */
export async function writeRows(path: string, rows: PackedRows): Promise<void> {
  const tokens = { input_ids: rows.inputIds, position_ids: rows.positionIds, labels: rows.labels };
  const offsets = BigInt64Array.from(rows.rowOffsets, BigInt);
  await writeSafetensors(path, [
    ...Object.entries(tokens).map(([name, values]) => (
      { name, dtype: "I32" as const, shape: [values.length], data: () => bytesOf(values) }
    )),
    { name: "row_offsets", dtype: "I64", shape: [offsets.length], data: () => bytesOf(offsets) },
  ], rows.metadata);
}

/** Reads what {@link writeRows} wrote; throws an error with the tensor when the four do not fit each other. */
export function readRows(path: string): PackedRows {
  using file = openSafetensors(path);
  const fail = (problem: string) => new TypeError(`Cannot read "${path}": ${problem}: run "deno task 03" again`);
  const read = (name: string, dtype: string) => {
    const info = file.tensors.get(name);
    if (info?.dtype !== dtype || info.shape.length !== 1) throw fail(`it has no list "${name}" of type ${dtype}`);
    return file.read(name).buffer;
  };
  const inputIds = new Int32Array(read("input_ids", "I32"));
  const positionIds = new Int32Array(read("position_ids", "I32"));
  const labels = new Int32Array(read("labels", "I32"));
  const rowOffsets = Array.from(new BigInt64Array(read("row_offsets", "I64")), Number);
  const rising = rowOffsets.every((offset, r) => r === 0 ? offset === 0 : offset > rowOffsets[r - 1]!);
  if (!rising || rowOffsets.at(-1) !== inputIds.length) {
    throw fail(`"row_offsets" does not cut ${inputIds.length} tokens into rows`);
  }
  if (positionIds.length !== inputIds.length || labels.length !== inputIds.length) {
    const lengths = `${inputIds.length}, ${positionIds.length} and ${labels.length}`;
    throw fail(`"input_ids", "position_ids" and "labels" have ${lengths} values`);
  }
  const broken = rowOffsets.findIndex((offset) => offset < inputIds.length && positionIds[offset] !== 0);
  if (broken >= 0) throw fail(`row ${broken} does not begin with position 0`);
  return { inputIds, positionIds, labels, rowOffsets, metadata: file.metadata };
}

function assistantTurns(
  ids: readonly number[],
  messages: readonly Message[],
  { tokenizer, template, promptTurns }: Encoding & { readonly promptTurns: number | undefined },
): Example {
  const spans: [number, number][] = [];
  let aligned = true;
  const tokensOf = (turns: number, open: boolean) => {
    const head = tokenizer.encode(template.render(messages.slice(0, turns), { open }));
    aligned &&= startsWith(ids, head);
    return head.length;
  };
  if (promptTurns !== undefined) spans.push([tokensOf(promptTurns, true), ids.length]);
  else {
    for (const [i, { role }] of messages.entries()) {
      if (role !== "assistant") continue;
      const end = i + 1 === messages.length ? ids.length : tokensOf(i + 1, false);
      spans.push([tokensOf(i, true), ids[end] === tokenizer.eosId ? end + 1 : end]);
    }
  }
  return example(ids, { spans, aligned });
}

/** Labels for all ids, or for those in `spans` (begin, end) alone. */
function example(
  ids: readonly number[],
  { spans = [[0, ids.length]], aligned = true }: { spans?: readonly (readonly [number, number])[]; aligned?: boolean } =
    {},
): Example {
  const labels = new Int32Array(ids.length).fill(IGNORED);
  for (const [begin, end] of spans) for (let t = begin; t < end; t++) labels[t] = ids[t]!;
  return { ids: Int32Array.from(ids), labels, aligned };
}

/** The eos id is appended as an id and learnt as one, so that padding with the same id can never hide it. */
function withEos(ids: readonly number[], { eosId }: Tokenizer): readonly number[] {
  return ids.at(-1) === eosId ? ids : [...ids, eosId];
}

function startsWith(ids: readonly number[], head: readonly number[]): boolean {
  return head.every((id, t) => ids[t] === id);
}

function chunks<T>(list: readonly T[], size: number): T[][] {
  return Array.from({ length: Math.ceil(list.length / size) }, (_, i) => list.slice(i * size, (i + 1) * size));
}

function bytesOf(values: Int32Array | BigInt64Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}
