/**
 * What the tests share: inputs, error measures, one assertion, golden files, folders that go away. Refuses to call two tensors
 * close when a NaN or a stray infinity is among them, whatever the bound.
 */
import { fileURLToPath } from "node:url";
import { toFloat32 } from "../lib/data/dtype.ts";
import { openSafetensors } from "../lib/data/safetensors.ts";

/**
 * `n` reproducible inputs with a mean and a scale, because zero-mean unit-scale inputs hide wrong powers of a norm:
 * `mean + scale · sin(1.7 i + 0.013 i² + phase)`. The square keeps a matrix of them from having rank three.
 */
export function wave(n: number, phase = 0, { mean = 0.3, scale = 2 } = {}): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: n }, (_, i) => mean + scale * Math.sin(1.7 * i + 0.013 * i * i + phase));
}

/** Σ (actual − expected)² / Σ expected²; 0 when both are all zero, Infinity when only `expected` is. */
export function nmse(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let error = 0, power = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (actual[i]! - expected[i]!) ** 2;
    power += expected[i]! ** 2;
  }
  return error === 0 ? 0 : error / power;
}

/** max |actual − expected| / max |expected|; 0 when both are all zero, Infinity when only `expected` is. */
export function maxRelative(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let error = 0, most = 0;
  for (let i = 0; i < expected.length; i++) {
    // Not Math.max alone: a NaN must reach the result, not be lost to the next comparison.
    const off = Math.abs(actual[i]! - expected[i]!);
    if (!(off <= error)) error = off;
    if (!(Math.abs(expected[i]!) <= most)) most = Math.abs(expected[i]!);
    if (Number.isNaN(off)) return NaN;
  }
  return error === 0 ? 0 : error / most;
}

/** The bound of {@linkcode assertClose}: on {@linkcode nmse}, on {@linkcode maxRelative}, or both. */
export interface Bound {
  readonly name: string;
  readonly nmse?: number;
  readonly max?: number;
}

/**
 * Throws unless `actual` has the length of `expected`, no NaN, the same infinities in the same places, and the rest within the
 * bound; the message has the worst index and a few reference/actual pairs around it.
 */
export function assertClose(actual: ArrayLike<number>, expected: ArrayLike<number>, bound: Bound): void {
  const { name } = bound;
  if (bound.nmse === undefined && bound.max === undefined) throw new TypeError(`${name}: no bound is given`);
  if (actual.length !== expected.length) {
    throw new Error(`${name}: ${actual.length} values, expected ${expected.length}`);
  }
  const finite: number[] = [];
  let worst = 0;
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i]!, e = expected[i]!;
    if (Number.isNaN(e)) throw new Error(`${name}: the reference is NaN at ${i}`);
    if (Number.isNaN(a)) throw new Error(`${name}: NaN at ${i}${pairs(actual, expected, i)}`);
    if (Number.isFinite(e) && Number.isFinite(a)) {
      finite.push(i);
      if (!(Math.abs(a - e) <= Math.abs(actual[worst]! - expected[worst]!))) worst = i;
    } else if (a !== e) throw new Error(`${name}: infinities differ at ${i}${pairs(actual, expected, i)}`);
  }
  const all = finite.length === expected.length;
  const [a, e] = all ? [actual, expected] : [finite.map((i) => actual[i]!), finite.map((i) => expected[i]!)];
  for (const [measure, limit] of [["nmse", bound.nmse], ["max", bound.max]] as const) {
    if (limit === undefined) continue;
    const found = measure === "nmse" ? nmse(a, e) : maxRelative(a, e);
    if (found <= limit) continue;
    const what = `${measure} ${found.toExponential(2)} is above ${limit}, worst at ${worst} of ${expected.length}`;
    throw new Error(`${name}: ${what}${pairs(actual, expected, worst)}`);
  }
}

/** The pairs at and around an index, one a line. */
function pairs(actual: ArrayLike<number>, expected: ArrayLike<number>, at: number): string {
  const lines = ["", "      index  reference  actual"];
  for (let i = Math.max(0, at - 2); i < Math.min(expected.length, at + 3); i++) {
    lines.push(`  ${i === at ? ">" : " "} ${i}  ${expected[i]}  ${actual[i]}`);
  }
  return lines.join("\n");
}

/** A golden file, read whole; the accessors throw when a tensor is missing or of another kind. */
export interface Golden {
  readonly names: readonly string[];
  /** F32, F16 or BF16. */
  f32(name: string): Float32Array<ArrayBuffer>;
  i32(name: string): Int32Array<ArrayBuffer>;
  u8(name: string): Uint8Array<ArrayBuffer>;
  /** All floating-point tensors whose name starts with `prefix`, by the rest of their names. */
  floats(prefix?: string): Map<string, Float32Array<ArrayBuffer>>;
}

/** The file's path under fixtures/golden as the file system knows it. */
export function goldenPath(path: string): string {
  return fileURLToPath(new URL(`../fixtures/golden/${path}`, import.meta.url));
}

/** Reads a safetensors file under fixtures/golden, e.g. `golden("tiny/lora.safetensors").f32("plain.loss")[0]`. */
export function golden(path: string): Golden {
  return readTensors(goldenPath(path));
}

/** The same for any safetensors file. */
export function readTensors(path: string): Golden {
  using source = openSafetensors(path);
  const kinds = { F32: "float", F16: "float", BF16: "float", I32: "I32", U8: "U8" } as Record<string, string>;
  const bytes = new Map<string, Uint8Array<ArrayBuffer>>();
  const infos = new Map(source.tensors);
  for (const name of infos.keys()) bytes.set(name, source.read(name));
  const get = (name: string, kind: string) => {
    const dtype = infos.get(name)?.dtype;
    if (dtype === undefined) throw new Error(`Cannot read "${path}": it has no tensor "${name}"`);
    if (kinds[dtype] !== kind) throw new TypeError(`Cannot read "${path}": tensor "${name}" is ${dtype}, not ${kind}`);
    return { data: bytes.get(name)!, dtype };
  };
  const f32 = (name: string) => {
    const { data, dtype } = get(name, "float");
    return toFloat32(data, dtype);
  };
  const floats = (prefix = "") => {
    const isFloat = ([name, info]: readonly [string, { dtype: string }]) =>
      name.startsWith(prefix) && kinds[info.dtype] === "float";
    return new Map([...infos].filter(isFloat).map(([name]) => [name.slice(prefix.length), f32(name)]));
  };
  const i32 = (name: string) => new Int32Array(get(name, "I32").data.buffer);
  return { names: [...infos.keys()], f32, i32, u8: (name) => get(name, "U8").data, floats };
}

/** A folder on the disk; `at` is the path of a name in it. */
export interface Folder extends Disposable {
  readonly path: string;
  readonly at: (name: string) => string;
}

/** A folder with these files, removed with all that came into it at the end of the scope: `using folder = temporaryFolder()`. */
export function temporaryFolder(files: Readonly<Record<string, string | Uint8Array>> = {}): Folder {
  const path = Deno.makeTempDirSync();
  const at = (name: string) => `${path}/${name}`;
  for (const [name, content] of Object.entries(files)) {
    Deno.mkdirSync(at(name).replace(/\/[^/]*$/, ""), { recursive: true });
    if (typeof content === "string") Deno.writeTextFileSync(at(name), content);
    else Deno.writeFileSync(at(name), content);
  }
  return { path, at, [Symbol.dispose]: () => Deno.removeSync(path, { recursive: true }) };
}

/** Runs `body` with the path of an empty {@linkcode temporaryFolder}. */
export async function withFolder(body: (dir: string) => Promise<void> | void): Promise<void> {
  using folder = temporaryFolder();
  await body(folder.path);
}
