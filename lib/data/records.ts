/**
 * Question-answer data as it lies on disk, JSON Lines or Parquet, to records of three kinds. Refuses what it would have
 * to guess: unknown columns, lines of another shape, values that are not text.
 */
import { TextLineStream } from "@std/streams";
import { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } from "hyparquet";
import { compressors } from "hyparquet-compressors";
import { createHash } from "node:crypto";
import type { Message } from "./template.ts";

/** One example; `promptTurns` of the messages are the prompt, where the data tells. */
export type SftRecord =
  | { readonly text: string }
  | { readonly prompt: string; readonly completion: string }
  | { readonly messages: readonly Message[]; readonly promptTurns?: number };

/** Records of one shape: the columns they were read from and those left unread. */
export interface Records {
  readonly records: readonly SftRecord[];
  readonly columns: readonly string[];
  readonly unread: readonly string[];
}

/** The three parts of a dataset. */
export const splits = ["train", "validation", "test"] as const;
/** One of {@link splits}. */
export type Split = (typeof splits)[number];

type Row = Readonly<Record<string, unknown>>;

const places = new WeakMap<SftRecord, string>();

/** The file and the line or row that a record was read from. */
export function placeOf(record: SftRecord): string {
  return places.get(record)!;
}

/** The five shapes, first match first, with what they become. The names of the columns are those that TRL reads. */
const SHAPES: readonly { columns: readonly string[]; optional?: string; read: (row: Row) => SftRecord }[] = [
  { columns: ["text"], read: (row) => ({ text: string(row, "text") }) },
  { columns: ["prompt", "completion"], read: promptCompletion },
  { columns: ["messages"], read: (row) => ({ messages: messages(row, "messages") }) },
  { columns: ["conversations"], read: (row) => ({ messages: messages(row, "conversations") }) },
  { columns: ["question", "answer"], read: (row) => dialogue(string(row, "question"), string(row, "answer")) },
  { columns: ["instruction", "output"], optional: "input", read: instruction },
];

/**
 * Reads the files of one split in order, at most `limit` records. Throws an error with the file and the line or row when
 * one does not parse, the columns are none of the known shapes, or records differ in shape.
 */
export async function readRecords(
  paths: readonly string[],
  { limit = Infinity }: { readonly limit?: number } = {},
): Promise<Records> {
  const records: SftRecord[] = [];
  const seen = new Set<string>();
  let shape: (typeof SHAPES)[number] | undefined;
  let first = "";
  for (const path of paths) {
    const rows = path.endsWith(".parquet") ? parquetRows(path, limit - records.length) : jsonRows(path);
    for await (const { row, place } of rows) {
      if (records.length >= limit) break;
      try {
        if (shape === undefined) [shape, first] = [shapeOf(row), `"${path}", ${place}`];
        if (!shape.columns.every((name) => name in row)) {
          const wanted = shape.columns.map(quoted).join(", ");
          throw new TypeError(`it has ${columnsOf(row)} where ${first} has ${wanted}: all records need one shape`);
        }
        const record = shape.read(row);
        places.set(record, `"${path}", ${place}`);
        records.push(record);
      } catch (error) {
        if (!(error instanceof TypeError)) throw error;
        throw new TypeError(`Cannot read "${path}", ${place}: ${error.message}`);
      }
      for (const name in row) seen.add(name);
    }
  }
  const columns = shape === undefined
    ? []
    : [...shape.columns, ...(shape.optional === undefined ? [] : [shape.optional])];
  return {
    records,
    columns: columns.filter((name) => seen.has(name)),
    unread: [...seen].filter((name) => !columns.includes(name)),
  };
}

/** All splits, the files that each came from, and what a reader of the log should know. */
export interface Splits {
  readonly records: Readonly<Record<Split, readonly SftRecord[]>>;
  readonly files: Readonly<Record<Split, readonly string[]>>;
  readonly notes: readonly string[];
}

/**
 * Reads the splits of a folder or file, `validation` and `test` from files of their own where given; what is missing then
 * is carved out of train. `limit` holds for each split that is read. Throws when there is nothing to train on.
 */
export async function readSplits(
  source: string,
  { validation = "", test = "", limit = Infinity }: {
    readonly validation?: string;
    readonly test?: string;
    readonly limit?: number;
  } = {},
): Promise<Splits> {
  const given = {
    ...(validation === "" ? {} : { validation: [validation] }),
    ...(test === "" ? {} : { test: [test] }),
  };
  const found: Partial<Record<Split, string[]>> = { ...findSplits(source), ...given };
  const records: Partial<Record<Split, readonly SftRecord[]>> = {};
  const notes: string[] = [];
  for (const split of splits) {
    if (found[split] === undefined) continue;
    const read = await readRecords(found[split], { limit });
    const from = found[split].length === 1 ? quoted(found[split][0]!) : `${found[split].length} files`;
    const unread = read.unread.length === 0 ? "" : `; not read: ${read.unread.join(", ")}`;
    notes.push(`${split}: ${read.records.length} records of ${from}, columns ${read.columns.join(", ")}${unread}`);
    records[split] = read.records;
  }
  const missing = splits.filter((split) => records[split] === undefined);
  const carved = { ...records, ...carveSplits(records.train!, missing) } as Record<Split, readonly SftRecord[]>;
  if (missing.length > 0) {
    const sizes = splits.map((split) => `${split} ${carved[split].length}`).join(", ");
    notes.push(
      `Without a file of its own, ${missing.join(" and ")} came out of train by the SHA-256 of each record: ${sizes}`,
    );
  }
  if (carved.train.length === 0) throw new RangeError(`Cannot train on "${source}": it has no records`);
  const files = { train: found.train!, validation: found.validation ?? found.train!, test: found.test ?? found.train! };
  return { records: carved, files, notes };
}

/**
 * Finds the files of each split by name in a folder (or its subfolders when it has no data files itself); a file is the
 * train split. Throws when there is no train split, names do not tell, or shards of a set are missing.
 */
export function findSplits(source: string): Partial<Record<Split, string[]>> {
  let info: Deno.FileInfo;
  try {
    info = Deno.statSync(source);
  } catch {
    throw new Error(`Cannot read "${source}": no such file or folder`);
  }
  if (info.isFile) return { train: [source] };
  let files = dataFiles(source, "");
  if (files.length === 0) {
    const folders = [...Deno.readDirSync(source)].filter((entry) => !entry.isFile && !entry.name.startsWith("."));
    files = folders.flatMap((folder) => dataFiles(`${source}/${folder.name}`, `${folder.name}/`));
  }
  if (files.length === 1 && splitOf(files[0]!) === undefined) return { train: [`${source}/${files[0]}`] };
  const found: Partial<Record<Split, string[]>> = {};
  for (const file of files.sort()) {
    const split = splitOf(file);
    if (split !== undefined) (found[split] ??= []).push(`${source}/${file}`);
  }
  if (found.train === undefined) {
    const there = files.length === 0 ? "no .jsonl, .json or .parquet file" : files.map(quoted).join(", ");
    throw new Error(
      `Cannot find the train split in "${source}": it holds ${there}: a name like "train.jsonl" is wanted`,
    );
  }
  for (const paths of Object.values(found)) checkShards(paths);
  return found;
}

/**
 * Takes what is missing of validation and test out of train, each about one record in twenty: by the SHA-256 of the
 * record, so equal records stay together and a longer dataset keeps the place of every record. A part that came out
 * empty gets the train record with the highest hash, and what equals it, unless that is all there is.
 */
export function carveSplits(
  train: readonly SftRecord[],
  missing: readonly Split[],
): Partial<Record<Split, readonly SftRecord[]>> {
  const placed = train.map((record) => ({ record, at: fraction(record) }));
  const parts = new Map<Split, typeof placed>([["train", placed]]);
  for (const [index, split] of missing.entries()) {
    const rest = parts.get("train")!;
    const inside = (at: number) =>
      at >= 1 - 0.05 * (missing.length - index) && at < 1 - 0.05 * (missing.length - index - 1);
    let part = rest.filter(({ at }) => inside(at));
    const highest = rest.reduce((most, { at }) => Math.max(most, at), 0);
    if (part.length === 0 && rest.some(({ at }) => at < highest)) part = rest.filter(({ at }) => at === highest);
    const taken = new Set(part);
    parts.set(split, part);
    parts.set("train", rest.filter((entry) => !taken.has(entry)));
  }
  return Object.fromEntries([...parts].map(([split, entries]) => [split, entries.map(({ record }) => record)]));
}

/** A record's place in [0, 1), from its content alone. */
function fraction(record: SftRecord): number {
  return createHash("sha256").update(JSON.stringify(record)).digest().readUIntBE(0, 6) / 2 ** 48;
}

async function* jsonRows(path: string): AsyncGenerator<{ row: Row; place: string }> {
  const file = await Deno.open(path);
  const utf8 = new TextDecoderStream("utf-8", { fatal: true });
  const lines = file.readable.pipeThrough(utf8).pipeThrough(new TextLineStream());
  let number = 0, begun = false;
  try {
    for await (const line of lines) {
      number++;
      if (line.trim() === "") continue;
      if (!begun && line.trimStart().startsWith("[")) {
        yield* arrayRows(path); // one JSON array over many lines
        return;
      }
      begun = true;
      const row = parse(line, `${path}", line ${number}`);
      if (!isRow(row)) {
        throw new SyntaxError(`Cannot read "${path}", line ${number}: a JSON object is wanted on each line`);
      }
      yield { row, place: `line ${number}` };
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new SyntaxError(`Cannot read "${path}", line ${lineOfBadText(path)}: it is not UTF-8 text`);
  }
}

/** The first line of the file that is not UTF-8: a decoder of pieces does not tell. */
function lineOfBadText(path: string): number {
  const bytes = Deno.readFileSync(path), utf8 = new TextDecoder("utf-8", { fatal: true });
  for (let line = 1, from = 0; from < bytes.length; line++) {
    const end = bytes.indexOf(10, from), to = end < 0 ? bytes.length : end;
    try {
      utf8.decode(bytes.subarray(from, to));
    } catch {
      return line;
    }
    from = to + 1;
  }
  return 1;
}

function* arrayRows(path: string): Generator<{ row: Row; place: string }> {
  // The decoder throws at what is not UTF-8, and drops a byte-order mark, which is no part of JSON.
  const text = new TextDecoder("utf-8", { fatal: true }).decode(Deno.readFileSync(path));
  const rows = parse(text, `${path}"`) as unknown[];
  for (const [index, row] of rows.entries()) {
    if (!isRow(row)) throw new SyntaxError(`Cannot read "${path}", record ${index + 1}: a JSON object is wanted`);
    yield { row, place: `record ${index + 1}` };
  }
}

async function* parquetRows(path: string, limit: number): AsyncGenerator<{ row: Row; place: string }> {
  const file = await asyncBufferFromFile(path);
  const end = new TextDecoder("latin1").decode(await file.slice(Math.max(0, file.byteLength - 4)));
  if (file.byteLength < 12 || end !== "PAR1") {
    const size = file.byteLength;
    const state = size === 0
      ? "it is empty"
      : size < 12
      ? `it has only ${size} bytes`
      : `its ${size} bytes do not end with "PAR1"`;
    throw new SyntaxError(`Cannot read "${path}": ${state}: a whole Parquet file is wanted`);
  }
  let rows: Row[];
  try {
    const metadata = await parquetMetadataAsync(file);
    const rowEnd = Math.min(limit, Number(metadata.num_rows));
    const names = parquetSchema(metadata).children.map((column) => column.element.name);
    const shape = SHAPES.find(({ columns }) => columns.every((name) => names.includes(name)));
    const columns = names.filter((name) => shape?.columns.includes(name) || shape?.optional === name);
    const unread = Object.fromEntries(names.map((name) => [name, undefined])); // named, but not decoded
    const read = shape && await parquetReadObjects({ file, metadata, columns, rowEnd, compressors });
    rows = read?.map((row) => ({ ...unread, ...row })) ?? [unread];
  } catch (error) {
    throw new SyntaxError(`Cannot read "${path}": ${(error as Error).message}`);
  }
  for (const [index, row] of rows.entries()) yield { row, place: `row ${index}` };
}

function parse(text: string, place: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SyntaxError(`Cannot read "${place}: ${(error as Error).message}`);
  }
}

function shapeOf(row: Row): (typeof SHAPES)[number] {
  const shape = SHAPES.find(({ columns }) => columns.every((name) => name in row));
  if (shape !== undefined) return shape;
  const known = SHAPES.map(({ columns, optional }) => [...columns, ...(optional ? [`[${optional}]`] : [])].join("/"));
  throw new TypeError(`it has ${columnsOf(row)}: the known shapes are ${known.join(", ")}`);
}

function promptCompletion(row: Row): SftRecord {
  if (typeof row.prompt === "string") return { prompt: row.prompt, completion: string(row, "completion") };
  const prompt = messages(row, "prompt");
  return { messages: [...prompt, ...messages(row, "completion")], promptTurns: prompt.length };
}

function instruction(row: Row): SftRecord {
  const input = row.input === undefined || row.input === null ? "" : string(row, "input");
  const task = string(row, "instruction");
  return dialogue(input === "" ? task : `${task}\n\n${input}`, string(row, "output"));
}

function dialogue(user: string, assistant: string): SftRecord {
  return { messages: [{ role: "user", content: user }, { role: "assistant", content: assistant }], promptTurns: 1 };
}

/** Turns as `{ role, content }` or `{ from, value }`; ShareGPT's "human" and "gpt" get the names that templates know. */
function messages(row: Row, column: string): Message[] {
  const list = row[column];
  if (!Array.isArray(list) || list.length === 0) {
    throw new TypeError(`"${column}" is ${kindOf(list)}, not a list of turns`);
  }
  return list.map((turn, index) => {
    if (!isRow(turn)) throw new TypeError(`turn ${index} of "${column}" is ${kindOf(turn)}, not an object`);
    const role = string(turn, "role" in turn ? "role" : "from");
    const content = string(turn, "content" in turn ? "content" : "value");
    return { role: { human: "user", gpt: "assistant" }[role] ?? role, content };
  });
}

function string(row: Row, column: string): string {
  const value = row[column];
  if (typeof value !== "string") throw new TypeError(`"${column}" is ${kindOf(value)}, not text`);
  return value;
}

function kindOf(value: unknown): string {
  if (value === null || value === undefined) return "missing";
  return Array.isArray(value) ? `a list of ${value.length}` : `a ${typeof value}`;
}

function isRow(value: unknown): value is Row {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function columnsOf(row: Row): string {
  const names = Object.keys(row);
  return names.length === 0 ? "no columns" : `the columns ${names.map(quoted).join(", ")}`;
}

function quoted(name: string): string {
  return `"${name}"`;
}

function dataFiles(folder: string, prefix: string): string[] {
  const files = [...Deno.readDirSync(folder)].filter((entry) => !entry.isDirectory);
  return files.map((entry) => prefix + entry.name).filter((name) => /\.(jsonl|json|parquet)$/.test(name));
}

/** The split that a path names: the file's own name decides, then its folder's. */
function splitOf(path: string): Split | undefined {
  const names = /(?:^|[._-])(train|training|validation|valid|val|dev|eval|test)(?=[._0-9-]|$)/;
  const word = path.split("/").reverse().map((part) => names.exec(part)?.[1]).find((found) => found !== undefined);
  if (word === undefined) return undefined;
  return word.startsWith("train") ? "train" : word === "test" ? "test" : "validation";
}

function checkShards(paths: readonly string[]): void {
  const kinds = new Set(paths.map((path) => /\.[a-z]+$/.exec(path)![0]));
  if (kinds.size > 1) {
    throw new Error(`Cannot choose between ${paths.map(quoted).join(", ")}: one split needs one file format`);
  }
  const whole = Number(/-of-(\d+)\.[a-z]+$/.exec(paths[0]!)?.[1] ?? paths.length);
  if (whole !== paths.length) {
    throw new Error(`Cannot read "${paths[0]}": ${paths.length} of ${whole} shards are there`);
  }
}
