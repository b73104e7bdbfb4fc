/**
 * What a stage read, wrote and measured: one `manifest.json` per folder, written last, so that a folder without one is
 * unfinished. What an earlier run left is set aside until then, and put back where the new run fails. It never renders,
 * aggregates or compares numbers, and it never touches a folder that no stage made.
 */
import { sep as SEPARATOR } from "node:path";
import { exists, sha256File } from "../data/files.ts";

/** What a record says of the content of a file. */
export { sha256File };

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

/** A stage at work in the folder `out`. */
export interface Stage {
  readonly out: string;
  /** Every file that the stage reads, as it was when the stage began. */
  readonly reads: readonly FileRecord[];
  /**
   * Sets aside what an earlier run left; `keep` goes on with it and removes its manifest alone. To be called before the
   * first file is written. An error from here on puts it back, unless there is a checkpoint of this run to go on from.
   */
  clear(options?: { readonly keep?: boolean }): void;
  /** Hashes what lies under `out`, writes the manifest, and prints it as the last line of stdout. */
  done(result: { readonly numbers: Readonly<Record<string, unknown>>; readonly device?: string }): Promise<void>;
}

type StageFlags = { readonly out: string; readonly force: boolean; readonly recipe: string } & Record<string, unknown>;

const MANIFEST = "manifest.json";
const LOCK = ".lock";
/** Where the earlier result waits until the new one is whole. */
const BEFORE = ".before";
const CHECKPOINTS = "checkpoints";
/** Flags that change how a stage runs but not what it writes. */
const NOT_RECORDED = ["asMade", "force", "verbose", "help"];

/**
 * Begins the stage `name` in `opt.out`. If the manifest there agrees with the flags and with every file under `reads`,
 * and all that it wrote is there unchanged, prints that it is up to date and exits 0 (unless `opt.force`). Otherwise
 * locks the folder and returns the stage; what an earlier run left stays until `clear`. Empty names and `hf:` names in
 * `reads` are not files and are left to the flags. Throws when an input is missing or unfinished, when another process
 * is at work in the folder, or when the folder has files that no run of this stage made. Notes on stderr when an input
 * was made with the other recipe.
 */
export async function beginStage(
  name: string,
  opt: StageFlags,
  options: { readonly reads: readonly string[] },
): Promise<Stage> {
  const began = performance.now();
  const { out } = opt;
  const inputs = options.reads.filter((path) => path !== "" && !path.startsWith("hf:"));
  for (const path of inputs) checkInput(path, { out });
  const found = readManifest(out);
  const before = found?.script === name ? found : undefined;
  const known = new Map(before?.reads.map((record) => [record.path, record]));
  for (const path of inputs) addUpstream(path, known);
  const other = inputs.find((path) => (recipeOf(path) ?? opt.recipe) !== opt.recipe);
  const reads = await records(inputs.flatMap((path) => filesUnder(path).map((file) => [file, file] as const)), known);
  const flags = recorded(opt);
  if (!opt.force && before !== undefined && await agrees(before, { flags, reads, out })) {
    console.log(`${name} is up to date (${out})`);
    Deno.exit(0);
  }
  const lock = takeFolder(out, { name, owned: before !== undefined });
  const leave = () => leaveFolder(out, lock);
  globalThis.addEventListener("unload", leave);
  for (const path of inputs) {
    if (!within(path, out)) continue;
    throw new Error(
      `Cannot read "${path}" and write "${out}": what is there makes way for the result: name another folder with --out`,
    );
  }
  if (other !== undefined) {
    const state = `"${other}" was made with --recipe ${recipeOf(other)}, ${name} runs with --recipe ${opt.recipe}`;
    console.error(`Note: ${state}: RECIPE=blog deno task train gives every stage the same`);
  }
  for (const line of staleness(inputs)) console.error(`Note: ${line}`);
  return {
    out,
    reads,
    clear: ({ keep = false } = {}) => {
      if (!keep) return setAside(out);
      if (exists(`${out}/${MANIFEST}`)) Deno.removeSync(`${out}/${MANIFEST}`);
      for (const path of filesUnder(out)) if (path.endsWith(".tmp")) Deno.removeSync(path);
    },
    async done({ numbers, device }) {
      checkFinite("numbers", numbers);
      const writes = await records(
        filesUnder(out, [CHECKPOINTS]).map((path) => [path, path.slice(out.length + 1)] as const),
        new Map(),
      );
      const seconds = Number(((performance.now() - began) / 1000).toFixed(3));
      const manifest: Manifest = { script: name, flags, seconds, device: device ?? null, reads, writes, numbers };
      await writeJson(`${out}/${MANIFEST}`, manifest);
      if (exists(`${out}/${BEFORE}`)) await Deno.remove(`${out}/${BEFORE}`, { recursive: true });
      globalThis.removeEventListener("unload", leave);
      leave();
      console.log(JSON.stringify(manifest));
    },
  };
}

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

/** Writes `path` so that a reader sees all of it or none: a temporary file beside it, fsync, rename. */
export async function writeAtomic(path: string, data: Uint8Array | string): Promise<void> {
  const temporary = `${path}.${Deno.pid}.tmp`;
  const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
  try {
    using file = await Deno.open(temporary, { write: true, create: true, truncate: true });
    for (let done = 0; done < bytes.length;) done += await file.write(bytes.subarray(done));
    await file.sync();
    await Deno.rename(temporary, path);
  } catch (error) {
    if (exists(temporary)) await Deno.remove(temporary);
    throw error;
  }
}

/** Writes `value` as JSON with two spaces and a last newline, by {@link writeAtomic}. */
export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeAtomic(path, JSON.stringify(value, null, 2) + "\n");
}

const STAGES = "01_convert|02_load|03_dataset|04_lora|05_train|06_evaluate|07_merge|08_upload";

/**
 * Throws when `path` is missing, or lies in the folder of a stage that is at work or was ended, other than `out`: one
 * without a manifest, with a stage's lock or by its name.
 */
export function checkInput(path: string, { out }: { readonly out?: string } = {}): void {
  const [, named, stage] = new RegExp(`^((?:.*/)?(${STAGES}))(?:/|$)`).exec(path) ?? [];
  const run = (stage: string) => `run "deno task ${stage.slice(0, 2)}" first`;
  if (!exists(path)) {
    const made = stage === undefined || exists(`${named}/${MANIFEST}`);
    throw new Error(`Cannot read "${path}": ${made ? "no such file or folder" : run(stage!)}`);
  }
  if (path.includes(`/${CHECKPOINTS}/`)) return;
  const locked = parents(path).find((dir) => lockedBy(dir) !== undefined), folder = locked ?? named;
  if (folder === undefined || folder === out || exists(`${folder}/${MANIFEST}`)) return;
  throw new Error(
    `Cannot read "${path}": "${folder}" has no ${MANIFEST}, so it is unfinished: ${run(lockedBy(folder) ?? stage!)}`,
  );
}

/** `path` and the folders that it lies in, as far as it names them. */
function parents(path: string): string[] {
  const all: string[] = [];
  for (let dir = path; dir !== ""; dir = dir.slice(0, Math.max(0, dir.lastIndexOf("/")))) all.push(dir);
  return all;
}

/** The stage whose lock lies in `dir`. */
function lockedBy(dir: string): string | undefined {
  const lock = `${dir}/${LOCK}`;
  return exists(lock) ? /^(\d\d_\w+) pid /.exec(Deno.readTextFileSync(lock))?.[1] : undefined;
}

/** Whether `path` is the folder `dir` or lies in it; both are there. */
function within(path: string, dir: string): boolean {
  const [inner, outer] = [path, dir].map((name) => Deno.realPathSync(name) + SEPARATOR);
  return inner!.startsWith(outer!);
}

/** The folder of the stage that wrote `path`, if one did. */
function stageFolder(path: string): string | undefined {
  return parents(path).find((dir) => readManifest(dir) !== undefined);
}

/** A stage that wrote `path` has hashed it: its records serve as long as size and time of change agree. */
function addUpstream(path: string, known: Map<string, FileRecord>): void {
  const dir = stageFolder(path);
  if (dir === undefined) return;
  for (const record of readManifest(dir)?.writes ?? []) known.set(`${dir}/${record.path}`, record);
}

/** One line for each stage behind `paths` that read another file than an earlier stage has written since. */
function staleness(paths: readonly string[]): string[] {
  const lines: string[] = [], seen = new Set<string>();
  const visit = (path: string) => {
    const dir = stageFolder(path);
    if (dir === undefined || seen.has(dir)) return;
    seen.add(dir);
    const { script, reads } = readManifest(dir)!;
    const changed = reads.find((read) => {
      const from = stageFolder(read.path);
      const now = from && readManifest(from)!.writes.find((write) => `${from}/${write.path}` === read.path);
      return now && now.sha256 !== read.sha256;
    });
    const remedy = `run "deno task ${script.slice(0, 2)}" to make it again`;
    if (changed) lines.push(`"${dir}" was made from another "${changed.path}" than there is now: ${remedy}`);
    for (const read of reads) visit(read.path);
  };
  for (const path of paths) visit(path);
  return lines;
}

/** The recipe that `path` was made with, if a stage made it. */
function recipeOf(path: string): unknown {
  const dir = stageFolder(path);
  return dir === undefined ? undefined : readManifest(dir)?.flags.recipe;
}

async function records(
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

async function agrees(
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

function recorded(opt: StageFlags): Record<string, unknown> {
  const empty = (value: unknown) => Array.isArray(value) && value.length === 0;
  return Object.fromEntries(
    Object.entries(opt).filter(([key, value]) => !NOT_RECORDED.includes(key) && !(key === "_" && empty(value))),
  );
}

function fingerprint(flags: Readonly<Record<string, unknown>>): string {
  return JSON.stringify(Object.entries(flags).filter(([key]) => key !== "out").sort());
}

/** Locks `out` for this process, until the lock is closed. */
function takeFolder(out: string, stage: { name: string; owned: boolean }): Deno.FsFile {
  Deno.mkdirSync(out, { recursive: true });
  const lock = `${out}/${LOCK}`;
  const others = contentOf(out);
  const left = exists(lock) ? Deno.readTextFileSync(lock) : "";
  const owned = stage.owned || left.startsWith(`${stage.name} `);
  if (others.length > 0 && !owned) {
    throw new Error(
      `Cannot write "${out}": it has files that ${stage.name} did not make ("${others[0]}"): ` +
        "name another folder with --out, or remove this one",
    );
  }
  // The kernel frees the lock when its process ends, however it ends: a dead process never blocks the folder.
  const file = Deno.openSync(lock, { read: true, write: true, create: true });
  if (!file.tryLockSync(true) || !exists(lock)) {
    file.close();
    throw new Error(`Cannot write "${out}": another process is at work there (${left.trim()}): wait for it or end it`);
  }
  // Written over, then cut: a process that dies in between still leaves the name that tells whose folder this is.
  file.truncateSync(file.writeSync(new TextEncoder().encode(`${stage.name} pid ${Deno.pid}\n`)));
  return file;
}

/**
 * Moves what is in `out` aside. Where something is there already, a run was killed since: that is the last whole result,
 * and what lies beside it is half of one.
 */
function setAside(out: string): void {
  const half = exists(`${out}/${BEFORE}`), there = contentOf(out);
  if (there.length === 0) return;
  if (!half) Deno.mkdirSync(`${out}/${BEFORE}`);
  // Without a manifest checkpoints are those of an interrupted run: they go before it, and it before all else.
  const first = [CHECKPOINTS, MANIFEST];
  const order = [...first.filter((name) => there.includes(name)), ...there.filter((name) => !first.includes(name))];
  for (const name of order) {
    if (half) Deno.removeSync(`${out}/${name}`, { recursive: true });
    else Deno.renameSync(`${out}/${name}`, `${out}/${BEFORE}/${name}`);
  }
}

/** The earlier result comes back where there is no new one and no checkpoint, and the lock goes. */
function leaveFolder(out: string, lock: Deno.FsFile): void {
  const before = `${out}/${BEFORE}`;
  if (exists(before) && !exists(`${out}/${MANIFEST}`) && !exists(`${out}/${CHECKPOINTS}`)) {
    for (const name of contentOf(out)) Deno.removeSync(`${out}/${name}`, { recursive: true });
    for (const { name } of [...Deno.readDirSync(before)]) Deno.renameSync(`${before}/${name}`, `${out}/${name}`);
    Deno.removeSync(before);
  }
  const empty = contentOf(out).length === 0;
  // In a folder that is still unfinished the lock stays: it tells whose that is.
  if (empty || exists(`${out}/${MANIFEST}`)) Deno.removeSync(`${out}/${LOCK}`);
  if (empty) Deno.removeSync(out);
  lock.close();
}

function contentOf(out: string): string[] {
  return [...Deno.readDirSync(out)].map((entry) => entry.name).filter((name) => name !== LOCK && name !== BEFORE);
}

/** All files under `path` in a fixed order, without manifests, locks and what was set aside, nor folders named in `skip`. */
function filesUnder(path: string, skip: readonly string[] = []): string[] {
  if (!Deno.statSync(path).isDirectory) return [path];
  const names = [...Deno.readDirSync(path)].map((entry) => entry.name).sort();
  return names.filter((name) => ![MANIFEST, LOCK, BEFORE, ...skip].includes(name))
    .flatMap((name) => filesUnder(`${path}/${name}`, skip));
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
