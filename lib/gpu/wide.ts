/**
 * What kernels that memory bounds do otherwise on CPU drivers. These load and store lane by lane, and 32 bytes cost
 * them hardly more than 16: kernels written for `const WIDE = 1u;` access two vec4f at once there, elsewhere one.
 */
import type { Gpu } from "./device.ts";

/** How two elements of a type lie in one word, and the functions that take it apart and put it together. */
const PAIRS: Readonly<Record<string, { type: string; from: string; to: string; functions: string }>> = {
  vec4f: {
    type: "vec4<u64>",
    from: "two_vec4f",
    to: "wide_vec4f",
    functions: `
fn two_vec4f(words: vec4<u64>) -> array<vec4f, 2> {
  let even = bitcast<vec4f>(vec4u(words));
  let odd = bitcast<vec4f>(vec4u(words >> vec4u(32u)));
  return array<vec4f, 2>(vec4f(even.x, odd.x, even.y, odd.y), vec4f(even.z, odd.z, even.w, odd.w));
}

fn wide_vec4f(two: array<vec4f, 2>) -> vec4<u64> {
  let even = vec4<u64>(bitcast<vec4u>(vec4f(two[0].xz, two[1].xz)));
  let odd = vec4<u64>(bitcast<vec4u>(vec4f(two[0].yw, two[1].yw)));
  return even | (odd << vec4u(32u));
}
`,
  },
  vec2u: {
    type: "vec4u",
    from: "two_vec2u",
    to: "wide_vec2u",
    functions: `
fn two_vec2u(words: vec4u) -> array<vec2u, 2> {
  return array<vec2u, 2>(words.xy, words.zw);
}

fn wide_vec2u(two: array<vec2u, 2>) -> vec4u {
  return vec4u(two[0], two[1]);
}
`,
  },
  u32: {
    type: "vec2u",
    from: "two_u32",
    to: "wide_u32",
    functions: `
fn two_u32(words: vec2u) -> array<u32, 2> {
  return array<u32, 2>(words.x, words.y);
}

fn wide_u32(two: array<u32, 2>) -> vec2u {
  return vec2u(two[0], two[1]);
}
`,
  },
};

/** How many vec4f a kernel of rows of `columns` elements, a multiple of 4, accesses at once. */
export function wideOf(gpu: Gpu, columns: number): 1 | 2 {
  return gpu.lanes === "subgroup" && columns % 8 === 0 ? 2 : 1;
}

/**
 * Turns `const WIDE = 1u;` of a WGSL file into 2, and its bindings of type `array<array<TYPE, WIDE>>` into arrays of
 * words twice as long, where the device is a CPU driver and rows of `columns` elements allow it. They are read as
 * `name[i]` and written as `name[i] = value;`. The file is valid WGSL and computes the same without this.
 */
export function widen(gpu: Gpu, source: string, columns: number): string {
  if (wideOf(gpu, columns) === 1) return source;
  const mark = /^(@group\(0\) @binding\(\d+\) var<storage, \w+> (\w+): )array<array<(\w+), WIDE>>;/gm;
  let text = source.replace("const WIDE = 1u;", "const WIDE = 2u;");
  const types = new Set<string>();
  for (const [declaration, head, name, type] of source.matchAll(mark)) {
    // Sixteen 64-bit words are two registers, and putting a word into one of them goes through memory.
    if (type === "vec4f" && gpu.subgroup > 8 && isRead(source, name!)) continue;
    types.add(type!);
    text = replaceAccesses(text.replace(declaration, `${head}array<${PAIRS[type!]!.type}>;`), name!, type!);
  }
  return text + [...types].map((type) => PAIRS[type]!.functions).join("");
}

/** Whether a line of code has a `name[…]` that it does not begin with, and so reads it. */
function isRead(source: string, name: string): boolean {
  const code = source.replace(/ *\/\/.*$/gm, "");
  return new RegExp(`^.*[^ \\n].*(?<![.\\w])${name}\\[`, "m").test(code);
}

function replaceAccesses(text: string, name: string, type: string): string {
  const head = new RegExp(`(?<![.\\w])${name}\\[`).exec(text);
  if (!head) return text;
  const before = text.slice(0, head.index), { from, to } = PAIRS[type]!;
  let close = head.index + head[0].length;
  for (let depth = 1; depth > 0; close++) depth += text[close] === "[" ? 1 : text[close] === "]" ? -1 : 0;
  const element = text.slice(head.index, close), rest = text.slice(close);
  const value = /^ = ([^;]*);/.exec(rest)?.[1];
  return value !== undefined && /\n *$/.test(before)
    ? `${before}${element} = ${to}(${replaceAccesses(value, name, type)});${
      replaceAccesses(rest.slice(value.length + 4), name, type)
    }`
    : `${before}${from}(${element})${replaceAccesses(rest, name, type)}`;
}

/** Workgroups for `rows` rows, each taking its share of them: beginning one costs a CPU driver as much as a short row. */
export function groupsOf(gpu: Gpu, rows: number): number {
  return gpu.lanes === "subgroup" ? Math.ceil(rows / 4) : rows;
}
