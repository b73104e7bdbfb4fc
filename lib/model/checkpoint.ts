/**
 * Checkpoints: a folder per saved update with all that an uninterrupted run would have had, bit for bit. A checkpoint is
 * written under a temporary name and renamed, so one that has its name is whole; its `checkpoint.json`, written last, has
 * the digests of all its files, so one that was damaged since is not gone on from.
 */
import type { Dtype } from "../data/dtype.ts";
import { exists, filesUnder, readJsonObject, sha256File, writeWhole } from "../data/files.ts";
import { openSafetensors, writeSafetensors } from "../data/safetensors.ts";
import { downloadBytes, type Storage } from "../gpu/tensor.ts";
import type { Trainer } from "./trainer.ts";

/** What a run remembers besides tensors. */
export interface RunState {
  /** Updates done. */
  readonly step: number;
  /** Bytes of log.jsonl that belong to these updates. */
  readonly logBytes: number;
  readonly best: { readonly step: number; readonly evalLoss: number } | null;
  /** What must not change in between, as JSON: `{ flags, files }`. */
  readonly settings: string;
}

const DTYPE: Partial<Record<Storage, Dtype>> = { f32: "F32", u8: "U8" };
const STATE = "state.safetensors", DIGESTS = "checkpoint.json";

/**
 * Writes `dir` (…/step-N): raw parameters and moments in `state.safetensors`, whatever `also` writes into the folder, and the
 * SHA-256 of every file in `checkpoint.json`.
 */
export async function saveCheckpoint(
  dir: string,
  { trainer, run, also }: { trainer: Trainer; run: RunState; also: (dir: string) => Promise<void> },
): Promise<void> {
  const { gpu, groups } = trainer.llama;
  const entries = [
    ...groups.map(({ name, param }) => ({ name: `param.${name}`, tensor: param })),
    ...[...trainer.optimizer.state].map(([name, tensor]) => ({ name: `state.${name}`, tensor })),
  ];
  const tensors = entries.map(({ name, tensor }) => ({
    name,
    dtype: DTYPE[tensor.dtype]!,
    // The buffer as it is, its padding included.
    shape: [tensor.dtype === "f32" ? tensor.bytes / 4 : tensor.bytes],
    data: () => downloadBytes(gpu, tensor),
  }));
  await writeWhole(dir, async (partial) => {
    await Deno.mkdir(partial, { recursive: true });
    await writeSafetensors(`${partial}/${STATE}`, tensors, { format: "pt", run: JSON.stringify(run) });
    await also(partial);
    const digests = filesUnder(partial).map((path) => [path.slice(partial.length + 1), sha256File(path)]);
    const text = JSON.stringify({ sha256: Object.fromEntries(digests) }, null, 2);
    await Deno.writeTextFile(`${partial}/${DIGESTS}`, text + "\n");
  });
}

/** Reads a checkpoint's run state. Throws where a file is missing, is not as it was written, or is not of a run. */
export function readRunState(dir: string): RunState {
  const digests = readJsonObject(`${dir}/${DIGESTS}`).sha256 as Readonly<Record<string, unknown>> | undefined;
  for (const path of new Set([STATE, ...Object.keys(digests ?? {})])) {
    const file = `${dir}/${path}`, refuse = (state: string) => new Error(`Cannot read "${file}": ${state}`);
    if (!exists(file)) throw refuse("no such file");
    if (sha256File(file) !== digests?.[path]) throw refuse(`it is damaged: ${DIGESTS} has the digest of other bytes`);
  }
  using source = openSafetensors(`${dir}/${STATE}`);
  const { run } = source.metadata;
  if (run === undefined) throw new SyntaxError(`Cannot read "${source.path}": its metadata tells of no run`);
  return JSON.parse(run) as RunState;
}

/**
 * The state of the run that goes on from checkpoint `dir`. Throws where its settings differ from `settings`, and where one of
 * its files is damaged: the run then goes on from the checkpoint before it as soon as this one is removed.
 */
export function resumeState(dir: string, settings: string): RunState {
  let run: RunState;
  try {
    run = readRunState(dir);
  } catch (error) {
    const before = listCheckpoints(dir.slice(0, dir.lastIndexOf("/"))).at(-2)?.path;
    const remedy = before === undefined
      ? "start over with --no-resume"
      : `remove that folder to go on from "${before}"`;
    const reason = (error as Error).message.replace(/^C/, "c");
    throw new Error(`Cannot resume from "${dir}": ${reason}: ${remedy}`, { cause: error });
  }
  if (run.settings !== settings) {
    const state = difference(JSON.parse(run.settings), JSON.parse(settings));
    throw new Error(`Cannot resume from "${dir}": ${state}: go on as the run began, or start over with --no-resume`);
  }
  return run;
}

/** Gives the trainer the parameters and moments of a checkpoint that {@linkcode resumeState} has let pass. */
export async function restoreCheckpoint(dir: string, trainer: Trainer): Promise<void> {
  using source = openSafetensors(`${dir}/${STATE}`);
  const part = (prefix: string) =>
    new Map(
      [...source.tensors.keys()].filter((name) => name.startsWith(prefix)).map((name) => [
        name.slice(prefix.length),
        source.read(name),
      ]),
    );
  await trainer.restore({ parameters: part("param."), state: part("state.") });
}

/** What a run depends on: flags by their names, and digests of the files it reads by their paths. */
interface Settings {
  readonly flags: Readonly<Record<string, unknown>>;
  readonly files: Readonly<Record<string, string>>;
}

/** The first thing that is not as it was. */
function difference(was: Settings, is: Settings): string {
  const changed = (kind: keyof Settings) =>
    Object.keys({ ...was[kind], ...is[kind] }).find((key) =>
      JSON.stringify(was[kind][key]) !== JSON.stringify(is[kind][key])
    );
  const flag = changed("flags");
  if (flag !== undefined) {
    const name = flag.replace(/[A-Z]/g, (letter) => "-" + letter.toLowerCase());
    return `it was made with --${name} ${was.flags[flag]}, not ${is.flags[flag]}`;
  }
  return `"${changed("files")}" is not the file that it was made with`;
}

/** Whole checkpoints under `dir`, oldest first. */
export function listCheckpoints(dir: string): { path: string; step: number }[] {
  try {
    return [...Deno.readDirSync(dir)]
      .map(({ name }) => ({ path: `${dir}/${name}`, step: Number(/^step-(\d+)$/.exec(name)?.[1] ?? NaN) }))
      .filter(({ step }) => Number.isFinite(step))
      .sort((a, b) => a.step - b.step);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
}

/** Removes the oldest checkpoints until `limit` are left; 0 keeps all. */
export async function pruneCheckpoints(dir: string, { limit }: { limit: number }): Promise<void> {
  if (limit <= 0) return;
  for (const { path } of listCheckpoints(dir).slice(0, -limit)) await Deno.remove(path, { recursive: true });
}
