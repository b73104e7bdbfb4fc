/**
 * A stage at work in a folder: it is locked, what an earlier run left is set aside and put back where the new run fails, and
 * the manifest comes last, so that a folder without one is unfinished. It never touches a folder that no stage made.
 */
import { sep as SEPARATOR } from "node:path";
import { exists, filesUnder, removeIfThere, removePartial } from "../data/files.ts";
import {
  addUpstream,
  agrees,
  type FileRecord,
  MANIFEST,
  parents,
  readManifest,
  recipeOf,
  records,
  staleness,
  writeManifest,
} from "./manifest.ts";

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

const LOCK = ".lock";
/** Where the earlier result waits until the new one is whole. */
const BEFORE = ".before";
const CHECKPOINTS = "checkpoints";
/** What lies in a stage's folder and is not its result. */
const NO_RESULT = [MANIFEST, LOCK, BEFORE];
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
  const files = inputs.flatMap((path) => filesUnder(path, { skip: NO_RESULT, except: out }));
  const reads = await records(files.map((file) => [file, file] as const), known);
  const flags = recorded(opt);
  if (!opt.force && before !== undefined && await agrees(before, { flags, reads, out })) {
    forgetBefore(out);
    console.log(`${name} is up to date (${out})`);
    Deno.exit(0);
  }
  const lock = takeFolder(out, { name, owned: before !== undefined });
  const leave = () => leaveFolder(out, lock);
  if (exists(`${out}/${MANIFEST}`)) await removeIfThere(`${out}/${BEFORE}`); // killed when all but that was done
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
      removePartial(out);
      if (!keep) setAside(out);
      else if (exists(`${out}/${MANIFEST}`)) Deno.removeSync(`${out}/${MANIFEST}`);
    },
    async done({ numbers, device }) {
      const files = filesUnder(out, { skip: [...NO_RESULT, CHECKPOINTS] });
      const writes = await records(files.map((path) => [path, path.slice(out.length + 1)] as const), new Map());
      const seconds = Number(((performance.now() - began) / 1000).toFixed(3));
      const manifest = { script: name, flags, seconds, device: device ?? null, reads, writes, numbers };
      await writeManifest(out, manifest);
      await removeIfThere(`${out}/${BEFORE}`);
      globalThis.removeEventListener("unload", leave);
      leave();
      console.log(JSON.stringify(manifest));
    },
  };
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

function recorded(opt: StageFlags): Record<string, unknown> {
  const empty = (value: unknown) => Array.isArray(value) && value.length === 0;
  return Object.fromEntries(
    Object.entries(opt).filter(([key, value]) => !NOT_RECORDED.includes(key) && !(key === "_" && empty(value))),
  );
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
  const file = tryLock(lock);
  if (file === undefined) {
    throw new Error(`Cannot write "${out}": another process is at work there (${left.trim()}): wait for it or end it`);
  }
  // Written over, then cut: a process that dies in between still leaves the name that tells whose folder this is.
  file.truncateSync(file.writeSync(new TextEncoder().encode(`${stage.name} pid ${Deno.pid}\n`)));
  return file;
}

/** The lock file, locked; the kernel frees it when its process ends, however it ends: a dead process never blocks the folder. */
function tryLock(lock: string): Deno.FsFile | undefined {
  const file = Deno.openSync(lock, { read: true, write: true, create: true });
  if (file.tryLockSync(true) && exists(lock)) return file;
  file.close();
}

/** A run that was killed between its manifest and its end left the earlier result, which nobody wants any more. */
function forgetBefore(out: string): void {
  if (!exists(`${out}/${BEFORE}`)) return;
  const lock = tryLock(`${out}/${LOCK}`);
  if (lock === undefined) return; // it is not dead, but at that
  if (exists(`${out}/${BEFORE}`)) Deno.removeSync(`${out}/${BEFORE}`, { recursive: true });
  leaveFolder(out, lock);
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
