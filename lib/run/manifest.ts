/**
 * What a stage read, wrote and measured: one `manifest.json` per folder, read, written and compared with what is there now. It
 * never renders, aggregates or compares numbers.
 */
import { exists, sha256File, writeJson } from "../data/files.ts";

/** One file: `path`, size in bytes, SHA-256 in hex, time of the last change in ms since 1970. */
export interface FileRecord {
  readonly path: string;
  readonly bytes: number;
  readonly sha256: string;
  readonly mtime: number;
}

/** What `manifest.json` holds: `reads` as they were named, `writes` relative to the stage's folder. */
export interface Manifest {
  readonly script: string;
  readonly flags: Readonly<Record<string, unknown>>;
  readonly seconds: number;
  readonly device: string | null;
  readonly reads: readonly FileRecord[];
  readonly writes: readonly FileRecord[];
  readonly numbers: Readonly<Record<string, unknown>>;
}

/** The name of the file. */
export const MANIFEST = "manifest.json";

/** Reads `<dir>/manifest.json`, or nothing when the folder is unfinished or missing, or no stage made it. */
export function readManifest(dir: string): Manifest | undefined {
  const path = `${dir}/${MANIFEST}`;
  if (!exists(path)) return undefined;
  let manifest: Manifest;
  try {
    manifest = JSON.parse(Deno.readTextFileSync(path));
  } catch (error) {
    throw new SyntaxError(
      `Cannot read "${path}": ${(error as Error).message}: name another folder, or remove this one`,
    );
  }
  // Other programs have manifests too.
  const ours = typeof manifest?.script === "string" && [manifest.reads, manifest.writes].every(Array.isArray) &&
    [manifest.flags, manifest.numbers].every((value) => typeof value === "object" && value !== null);
  return ours ? manifest : undefined;
}

/** Writes `<dir>/manifest.json`; throws a RangeError where a number is none. */
export async function writeManifest(dir: string, manifest: Manifest): Promise<void> {
  checkFinite("numbers", manifest.numbers);
  await writeJson(`${dir}/${MANIFEST}`, manifest);
}

/** `path` and the folders that it lies in, as far as it names them. */
export function parents(path: string): string[] {
  const all: string[] = [];
  for (let dir = path; dir !== ""; dir = dir.slice(0, Math.max(0, dir.lastIndexOf("/")))) all.push(dir);
  return all;
}

/** The folder of the stage that wrote `path`, if one did. */
function stageFolder(path: string): string | undefined {
  return parents(path).find((dir) => readManifest(dir) !== undefined);
}

/** Adds to `known` what the stage that wrote `path` has hashed: that serves as long as size and time of change agree. */
export function addUpstream(path: string, known: Map<string, FileRecord>): void {
  const dir = stageFolder(path);
  if (dir === undefined) return;
  for (const record of readManifest(dir)?.writes ?? []) known.set(`${dir}/${record.path}`, record);
}

/** One line for each stage behind `paths` that read a file which an earlier stage has written anew or taken away since. */
export function staleness(paths: readonly string[]): string[] {
  const lines: string[] = [], seen = new Set<string>();
  const visit = (path: string) => {
    const dir = stageFolder(path);
    if (dir === undefined || seen.has(dir)) return;
    seen.add(dir);
    const { script, reads } = readManifest(dir)!;
    const changed = reads.find((read) => {
      const from = stageFolder(read.path);
      const now = from && readManifest(from)!.writes.find((write) => `${from}/${write.path}` === read.path);
      return now ? now.sha256 !== read.sha256 : from && !exists(read.path);
    });
    const state = changed && exists(changed.path)
      ? `another "${changed.path}" than there is now`
      : `"${changed?.path}", which is gone`;
    const remedy = `run "deno task ${script.slice(0, 2)}" to make it again`;
    if (changed) lines.push(`"${dir}" was made from ${state}: ${remedy}`);
    for (const read of reads) visit(read.path);
  };
  for (const path of paths) visit(path);
  return lines;
}

/** The recipe that `path` was made with, if a stage made it. */
export function recipeOf(path: string): unknown {
  const dir = stageFolder(path);
  return dir === undefined ? undefined : readManifest(dir)?.flags.recipe;
}

/** Size, digest and time of each file, under the name given with it; digests of `known` files that look the same are taken over. */
export async function records(
  files: readonly (readonly [file: string, name: string])[],
  known: ReadonlyMap<string, FileRecord>,
): Promise<FileRecord[]> {
  const result: FileRecord[] = [];
  for (const [file, path] of files) {
    const { size, mtime } = await Deno.stat(file);
    const [bytes, changed] = [size, mtime?.getTime() ?? 0];
    const same = known.get(file);
    const sha256 = same?.bytes === bytes && same.mtime === changed ? same.sha256 : sha256File(file);
    result.push({ path, bytes, sha256, mtime: changed });
  }
  return result;
}

/** Whether a stage with these flags and inputs would write what is in `out` already, and all of that is there unchanged. */
export async function agrees(
  before: Manifest,
  now: { flags: Readonly<Record<string, unknown>>; reads: readonly FileRecord[]; out: string },
): Promise<boolean> {
  const content = (list: readonly FileRecord[]) => list.map(({ path, bytes, sha256 }) => [path, bytes, sha256]);
  if (fingerprint(before.flags) !== fingerprint(now.flags)) return false;
  if (JSON.stringify(content(before.reads)) !== JSON.stringify(content(now.reads))) return false;
  if (!before.writes.every(({ path }) => exists(`${now.out}/${path}`))) return false;
  const known = new Map(before.writes.map((record) => [`${now.out}/${record.path}`, record]));
  const there = await records(before.writes.map(({ path }) => [`${now.out}/${path}`, path] as const), known);
  return JSON.stringify(content(before.writes)) === JSON.stringify(content(there));
}

function fingerprint(flags: Readonly<Record<string, unknown>>): string {
  return JSON.stringify(Object.entries(flags).filter(([key]) => key !== "out").sort());
}

/** JSON has no NaN: it would be written as null and nobody would see it. */
function checkFinite(name: string, value: unknown): void {
  if (typeof value === "number" && !Number.isFinite(value)) {
    throw new RangeError(`Cannot write ${MANIFEST}: ${name} is ${value}: a finite number is wanted`);
  }
  if (typeof value === "object" && value !== null) {
    for (const [key, inner] of Object.entries(value)) checkFinite(`${name}.${key}`, inner);
  }
}
