/**
 * Files and folders as every part of the project asks for them: whether one is there, what is under one, one removed, written
 * or copied whole. A path that is not there is an answer; any other failure of the file system is an error.
 */
import { createHash } from "node:crypto";

/** The end of a name that something has while it is written, after the writer's process id. */
const PARTIAL = ".partial";
/** Large enough that a read call costs nothing beside the hashing, small enough to stay in the cache. */
const READ_BYTES = 1 << 20;

/** Whether there is a file or a folder at `path`. */
export function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return false;
    throw error;
  }
}

/**
 * Throws unless the folder `dir` has a file `name`, by which folders of its kind are told: with what is wanted there and the
 * command that makes one, as in `deno task 03`.
 */
export function checkHolds(
  dir: string,
  { name, wanted, run }: { readonly name: string; readonly wanted: string; readonly run: string },
): void {
  if (exists(`${dir}/${name}`)) return;
  const state = exists(dir) ? `it has no ${name}` : "no such folder";
  throw new Error(`Cannot read "${dir}": ${state}: ${wanted} is wanted: run "${run}" first`);
}

/** Parses a file that must hold one JSON object; throws a SyntaxError that names the file. */
export function readJsonObject(path: string): Record<string, unknown> {
  let text: string;
  try {
    text = Deno.readTextFileSync(path);
  } catch (error) {
    throw new Error(`Cannot read "${path}": ${error instanceof Deno.errors.NotFound ? "no such file" : error}`);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new SyntaxError(`Cannot read "${path}": ${(error as Error).message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new SyntaxError(`Cannot read "${path}": it must hold one JSON object`);
  }
  return value as Record<string, unknown>;
}

/** Removes a file, or a folder with all that is in it, where there is one. */
export async function removeIfThere(path: string): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/**
 * Gives `path` to the file or folder that `write` makes under another name beside it, so that a reader sees all of it or none;
 * a folder takes the place of the one before. What an error leaves is removed, what a kill leaves by {@link removePartial}.
 */
export async function writeWhole(path: string, write: (partial: string) => Promise<void>): Promise<void> {
  const partial = `${path}.${Deno.pid}${PARTIAL}`;
  await removeIfThere(partial);
  try {
    await write(partial);
    if (Deno.statSync(partial).isDirectory) await removeIfThere(path);
    await Deno.rename(partial, path);
  } catch (error) {
    await removeIfThere(partial);
    throw error;
  }
}

/** Removes what {@link writeWhole} left under `dir` in processes that were killed; nobody else may be writing there. */
export function removePartial(dir: string): void {
  for (const { name, isDirectory } of [...Deno.readDirSync(dir)]) {
    if (name.endsWith(PARTIAL)) Deno.removeSync(`${dir}/${name}`, { recursive: true });
    else if (isDirectory) removePartial(`${dir}/${name}`);
  }
}

/** Writes and syncs a file by {@link writeWhole}. */
export function writeAtomic(path: string, data: Uint8Array | string): Promise<void> {
  const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
  return writeWhole(path, async (partial) => {
    using file = await Deno.open(partial, { write: true, create: true, truncate: true });
    for (let done = 0; done < bytes.length;) done += await file.write(bytes.subarray(done));
    await file.sync();
  });
}

/** Writes `value` as JSON with two spaces and a last newline, by {@link writeAtomic}. */
export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeAtomic(path, JSON.stringify(value, null, 2) + "\n");
}

/** Copies a folder of files (no subfolders) to a new name, by {@link writeWhole}. */
export function copyFolder(from: string, to: string): Promise<void> {
  return writeWhole(to, async (partial) => {
    await Deno.mkdir(partial, { recursive: true });
    for (const { name, isFile } of Deno.readDirSync(from)) {
      if (isFile) await Deno.copyFile(`${from}/${name}`, `${partial}/${name}`);
    }
  });
}

/** SHA-256 of a file in hex, read in pieces of 1 MiB: the file is never in memory as a whole. */
export function sha256File(path: string): string {
  const hash = createHash("sha256");
  const piece = new Uint8Array(READ_BYTES);
  using file = Deno.openSync(path);
  for (let n = file.readSync(piece); n !== null; n = file.readSync(piece)) hash.update(piece.subarray(0, n));
  return hash.digest("hex");
}

/**
 * All files under `path` in a fixed order, links followed, without names in `skip` and without the folder `except`, whatever it is
 * called here. A link to a folder that it lies in adds nothing; throws at one that leads nowhere.
 */
export function filesUnder(
  path: string,
  { skip = [], except }: { readonly skip?: readonly string[]; readonly except?: string } = {},
): string[] {
  const left = except !== undefined && exists(except) ? [Deno.realPathSync(except)] : [];
  const walk = (path: string, above: readonly string[]): string[] => {
    const { isFile, isDirectory } = follow(path);
    if (!isDirectory) return isFile ? [path] : []; // neither is a pipe: reading it could wait for ever
    const real = Deno.realPathSync(path);
    if (above.includes(real)) return [];
    const names = [...Deno.readDirSync(path)].map((entry) => entry.name).filter((name) => !skip.includes(name)).sort();
    return names.flatMap((name) => walk(`${path}/${name}`, [...above, real]));
  };
  return walk(path, left);
}

/** What `path` is in the end; it was listed, so where nothing is there it is a link. */
function follow(path: string): Deno.FileInfo {
  try {
    return Deno.statSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound || error instanceof Deno.errors.FilesystemLoop)) throw error;
    throw new Error(`Cannot read "${path}": it is a link to nothing: remove it, or mend it`);
  }
}
