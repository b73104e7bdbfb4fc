/**
 * The JSON header of a safetensors file, with the verdicts of the reference library's parser (serde_json).
 * Refuses what `JSON.parse` lets pass or loses: a tensor given twice, `8.0` for `8`, `-0`, digits past 2^53.
 */
import { type Dtype, isDtype } from "./dtype.ts";

const MAX_DEPTH = 127; // nested containers: the recursion limit of serde_json

/** JSON as the header scanner keeps it: numbers as their text, objects as all their entries, so that nothing is lost. */
type Json = string | boolean | null | { readonly number: string } | { readonly entries: [string, Json][] } | Json[];

/** What a header says of one tensor, not yet checked against the file: offsets count from the end of the header. */
export interface HeaderEntry {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly bigint[];
  readonly begin: bigint;
  readonly end: bigint;
}

/** Reads the header text of the file `path`; throws a SyntaxError that names the file, the tensor and the value. */
export function scanHeader(
  text: string,
  path: string,
): { entries: HeaderEntry[]; metadata: Readonly<Record<string, string>> } {
  const refuse = (problem: string): never => {
    throw new SyntaxError(`Cannot read "${path}": ${problem}`);
  };
  const header = parseStrictJson(text, refuse);
  if (!isObject(header)) return refuse("its header is not a JSON object");
  const entries = new Map<string, HeaderEntry>();
  let metadata: Readonly<Record<string, string>> | undefined;
  for (const [name, value] of header.entries) {
    if (name === "__metadata__") {
      if (metadata) refuse(`"__metadata__" is there twice`);
      if (value !== null && !isObject(value)) return refuse(`"__metadata__" is ${show(value)}: it must be an object`);
      const pairs = value?.entries ?? [];
      for (const [key, word] of pairs) {
        if (typeof word !== "string") refuse(`"__metadata__" has ${show(word)} for "${key}": it must be a string`);
      }
      metadata = Object.fromEntries(pairs) as Record<string, string>;
      continue;
    }
    if (entries.has(name)) refuse(`the tensor name "${name}" is there twice`);
    if (!isObject(value)) return refuse(`tensor "${name}" is ${show(value)}: it must be an object`);
    const fields = new Map<string, Json>();
    for (const [key, field] of value.entries) {
      const known = key === "dtype" || key === "shape" || key === "data_offsets";
      if (known && fields.has(key)) refuse(`tensor "${name}" has the field "${key}" twice`);
      fields.set(key, field);
    }
    const whole = (key: string): bigint[] => {
      const list = fields.get(key);
      if (list === undefined) return refuse(`tensor "${name}" has no "${key}"`);
      if (!Array.isArray(list)) {
        return refuse(`tensor "${name}" has ${key} ${show(list)}: it must be a list of whole numbers`);
      }
      return list.map((item) => {
        const digits = typeof item === "object" && item !== null && "number" in item ? item.number : "";
        if (/^\d+$/.test(digits) && digits.length <= 20 && BigInt(digits) < 1n << 64n) return BigInt(digits);
        return refuse(`tensor "${name}" has ${show(item)} in ${key}: it must be a whole number below 2^64`);
      });
    };
    const dtype = fields.get("dtype");
    if (dtype === undefined) return refuse(`tensor "${name}" has no "dtype"`);
    if (typeof dtype !== "string" || !isDtype(dtype)) {
      return refuse(`tensor "${name}" has the unknown dtype ${show(dtype)}`);
    }
    const shape = whole("shape");
    const offsets = whole("data_offsets");
    if (offsets.length !== 2) refuse(`tensor "${name}" has ${offsets.length} data_offsets: it must have 2`);
    entries.set(name, { name, dtype, shape, begin: offsets[0]!, end: offsets[1]! });
  }
  return { entries: [...entries.values()], metadata: metadata ?? {} };
}

function isObject(value: Json): value is { entries: [string, Json][] } {
  return typeof value === "object" && value !== null && "entries" in value && !Array.isArray(value);
}

function show(value: Json): string {
  if (Array.isArray(value)) return "a list";
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  return "number" in value ? value.number : "an object";
}

/** JSON of RFC 8259 and nothing beside it; `refuse` is told what is wrong and at which character. */
function parseStrictJson(text: string, refuse: (problem: string) => never): Json {
  let at = 0;
  const fail = (what: string): never => refuse(`its header is not JSON: ${what} at character ${at}`);
  const skipSpace = () => {
    while (at < text.length && " \t\n\r".includes(text[at]!)) at++;
  };
  const expect = (mark: string) => {
    skipSpace();
    if (text[at] !== mark) fail(at < text.length ? `${JSON.stringify(text[at])} instead of "${mark}"` : `no "${mark}"`);
    at++;
  };
  const string = (): string => {
    skipSpace();
    const from = at;
    expect('"');
    for (; text[at] !== '"'; at++) {
      if (at >= text.length) fail("a string without end");
      if (text.charCodeAt(at) < 0x20) fail("a control character in a string");
      if (text[at] === "\\") at++;
    }
    at++;
    let value = "";
    try {
      value = JSON.parse(text.slice(from, at));
    } catch {
      fail("a wrong escape in the string that ends");
    }
    return value.isWellFormed() ? value : fail("a lone surrogate in the string that ends");
  };
  const sequence = (close: string, item: () => void) => {
    at++;
    skipSpace();
    if (text[at] === close) {
      at++;
      return;
    }
    for (;;) {
      item();
      skipSpace();
      if (text[at] !== ",") return expect(close);
      at++;
    }
  };
  const scalar = /(true|false|null)|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
  const value = (depth: number): Json => {
    skipSpace();
    if (depth > MAX_DEPTH) fail(`more than ${MAX_DEPTH} nested levels`);
    if (text[at] === '"') return string();
    if (text[at] === "{") {
      const entries: [string, Json][] = [];
      sequence("}", () => {
        const key = string();
        expect(":");
        entries.push([key, value(depth + 1)]);
      });
      return { entries };
    }
    if (text[at] === "[") {
      const list: Json[] = [];
      sequence("]", () => list.push(value(depth + 1)));
      return list;
    }
    scalar.lastIndex = at;
    const match = scalar.exec(text);
    if (!match) return fail(at < text.length ? `unexpected ${JSON.stringify(text[at])}` : "the end");
    if (!match[1] && !Number.isFinite(Number(match[0]))) fail(`the number ${match[0]} is too large`);
    at += match[0].length;
    return match[1] ? JSON.parse(match[1]) as boolean | null : { number: match[0] };
  };
  const result = value(1);
  skipSpace();
  if (at < text.length) fail(`${JSON.stringify(text[at])} after the end`);
  return result;
}
