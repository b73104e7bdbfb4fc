/**
 * Files and folders as every part of the project asks for them: whether one is there, one removed, one copied whole. A
 * path that is not there is an answer; any other failure of the file system is an error.
 */

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
