/**
 * What the tests of scripts share: a script as a process of its own in some folder, its manifest, and its refusals.
 * It knows nothing of what a stage does.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { fileURLToPath } from "node:url";
import type { Manifest } from "../../lib/run/manifest.ts";
import { temporaryFolder } from "../check.ts";

/** The project's folder. */
export const ROOT: string = fileURLToPath(new URL("../..", import.meta.url));

/** How a process ended. */
export interface Result {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/**
 * A script at work in the folder `dir`: one of the project's by its name, or a file of that folder. `line` is its arguments,
 * those of a text cut at spaces; `env` is added to the environment; it can write files of `limit` KiB at most.
 */
export function command(
  dir: string,
  script: string,
  line: string | readonly string[] = "",
  { env = {}, limit = 0 }: { readonly env?: Readonly<Record<string, string>>; readonly limit?: number } = {},
): Deno.Command {
  const words = typeof line === "string" ? line.split(" ").filter((word) => word !== "") : line;
  const path = script.endsWith(".ts") ? script : `${ROOT}scripts/${script}.ts`;
  const args = ["run", "-A", "--quiet", "--config", `${ROOT}deno.json`, path, ...words];
  // Without the trap the signal would end the process; with it the write fails, as it does on a full disk.
  const limited = ["-c", `trap "" XFSZ; ulimit -f ${2 * limit}; exec "$0" "$@"`, Deno.execPath(), ...args];
  return new Deno.Command(limit > 0 ? "sh" : Deno.execPath(), {
    args: limit > 0 ? limited : args,
    cwd: dir,
    env: { NO_COLOR: "1", RECIPE: "tiny", ...env },
    stdout: "piped",
    stderr: "piped",
  });
}

/** Waits for the end of a process. */
export async function ended(process: Deno.Command | Deno.ChildProcess): Promise<Result> {
  const { code, stdout, stderr } = await process.output();
  const text = new TextDecoder();
  return { code, out: text.decode(stdout), err: text.decode(stderr) };
}

/** Runs a script to its end, however it ends; the arguments are those of {@linkcode command}. */
export function attempt(...how: Parameters<typeof command>): Promise<Result> {
  return ended(command(...how));
}

/** Runs a stage that must succeed and say nothing on stderr; its manifest, which is also its last line. */
export async function stage(dir: string, script: string, line = ""): Promise<Manifest & { readonly printed: string }> {
  const { code, out, err } = await attempt(dir, script, line);
  assertEquals([code, err], [0, ""], `${script} ${line}\n${out}${err}`);
  const last = JSON.parse(out.trimEnd().split("\n").at(-1)!) as Manifest;
  const folder = last.flags.out as string;
  assertEquals(last, readJson(`${dir}/${folder}/manifest.json`));
  return { ...last, printed: out.slice(0, out.trimEnd().lastIndexOf("\n") + 1) };
}

/** Asserts that a script ends with status 1 and one line on stderr: a sentence that begins with "Cannot", no stack. */
export function assertRefused({ code, out, err }: Result, message: RegExp): void {
  assertEquals(code, 1, out + err);
  assertMatch(err, /^Cannot [^\n]*[^.\n]\n$/);
  assertMatch(err, message);
}

/** What lies under a folder, locks aside, by path. */
export function contentOf(dir: string): Map<string, Uint8Array> {
  return new Map(walk(dir).filter((path) => !path.endsWith("/.lock")).map((path) => [path, Deno.readFileSync(path)]));
}

/** Puts an earlier result of a stage into its folder; gives what asserts that it is still there. */
export function earlierResult(dir: string, script: string): () => void {
  const out = `${dir}/artifacts/${script}`;
  Deno.mkdirSync(out, { recursive: true });
  Deno.writeTextFileSync(`${out}/result`, "of an earlier run");
  const manifest = { script, flags: {}, seconds: 1, device: null, reads: [], writes: [], numbers: {} };
  Deno.writeTextFileSync(`${out}/manifest.json`, JSON.stringify(manifest));
  const before = contentOf(out);
  return () => assertEquals(contentOf(out), before);
}

/** All files under a folder, and none of what a process leaves while it writes. */
export function assertNothingPartial(dir: string): void {
  const left = walk(dir).filter((path) => /\.partial(\/|$)/.test(path));
  assert(left.length === 0, `left over: ${left.join(", ")}`);
}

/** All files under a folder. */
export function walk(dir: string): string[] {
  return [...Deno.readDirSync(dir)].flatMap(({ name, isDirectory }) =>
    isDirectory ? walk(`${dir}/${name}`) : [`${dir}/${name}`]
  );
}

export function readJson<T = Record<string, unknown>>(path: string): T {
  return JSON.parse(Deno.readTextFileSync(path)) as T;
}

/** Runs `body` in a temporary folder with the bundled checkpoint, `tiny`, and a few of the bundled questions, `qa`. */
export async function inFolder(body: (dir: string) => Promise<void>): Promise<void> {
  using folder = temporaryFolder();
  const dir = folder.path;
  Deno.symlinkSync(`${ROOT}fixtures/tiny`, `${dir}/tiny`);
  Deno.mkdirSync(`${dir}/qa`);
  for (const [split, count] of [["train", 12], ["validation", 4], ["test", 4]] as const) {
    const lines = Deno.readTextFileSync(`${ROOT}fixtures/qa/${split}.jsonl`).split("\n").slice(0, count);
    Deno.writeTextFileSync(`${dir}/qa/${split}.jsonl`, lines.join("\n") + "\n");
  }
  await body(dir);
}
