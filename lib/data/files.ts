/**
 * Files and folders as every part of the project asks for them: whether one is there, its digest, one removed, one copied
 * whole. A path that is not there is an answer; any other failure of the file system is an error.
 */
import { createHash } from "node:crypto";

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

/** Copies a folder of files (no subfolders) to a new name, whole or not at all. */
export async function copyFolder(from: string, to: string): Promise<void> {
  const partial = `${to}.partial`;
  await removeIfThere(partial);
  await Deno.mkdir(partial, { recursive: true });
  for (const { name, isFile } of Deno.readDirSync(from)) {
    if (isFile) await Deno.copyFile(`${from}/${name}`, `${partial}/${name}`);
  }
  await Deno.rename(partial, to);
}

/** Large enough that a read call costs nothing beside the hashing, small enough to stay in the cache. */
const READ_BYTES = 1 << 20;

/** SHA-256 of a file in hex, read in pieces of 1 MiB: the file is never in memory as a whole. */
export function sha256File(path: string): string {
  const hash = createHash("sha256");
  const piece = new Uint8Array(READ_BYTES);
  using file = Deno.openSync(path);
  for (let n = file.readSync(piece); n !== null; n = file.readSync(piece)) hash.update(piece.subarray(0, n));
  return hash.digest("hex");
}
