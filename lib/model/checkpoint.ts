/**
 * Checkpoints: a folder per saved update with all that an uninterrupted run would have had, bit for bit. A checkpoint is
 * written under a temporary name and renamed, so one that has its name is whole.
 */
import { openSafetensors, writeSafetensors } from "../data/safetensors.ts";
import type { Dtype } from "../data/dtype.ts";
import { downloadBytes, type Storage } from "../gpu/tensor.ts";
import type { Trainer } from "./trainer.ts";

/** What a run remembers besides tensors. */
export interface RunState {
  /** Updates done. */
  readonly step: number;
  /** Bytes of log.jsonl that belong to these updates. */
  readonly logBytes: number;
  readonly best: { readonly step: number; readonly evalLoss: number } | null;
  /** Settings that must not change in between. */
  readonly settings: string;
}

const DTYPE: Partial<Record<Storage, Dtype>> = { f32: "F32", u8: "U8" };

/** Writes `dir` (…/step-N): raw parameters and moments in `state.safetensors`, and whatever `also` writes into the folder. */
export async function saveCheckpoint(
  dir: string,
  { trainer, run, also }: { trainer: Trainer; run: RunState; also: (dir: string) => Promise<void> },
): Promise<void> {
  const temporary = `${dir}.partial`;
  await Deno.remove(temporary, { recursive: true }).catch(() => {});
  await Deno.mkdir(temporary, { recursive: true });
  const { gpu, groups } = trainer.llama;
  const entries = [
    ...groups.map(({ name, param }) => ({ name: `param.${name}`, tensor: param })),
    ...[...trainer.optimizer.state].map(([name, tensor]) => ({ name: `state.${name}`, tensor })),
  ];
  await writeSafetensors(
    `${temporary}/state.safetensors`,
    entries.map(({ name, tensor }) => ({
      name,
      dtype: DTYPE[tensor.dtype]!,
      // The buffer as it is, its padding included.
      shape: [tensor.dtype === "f32" ? tensor.bytes / 4 : tensor.bytes],
      data: () => downloadBytes(gpu, tensor),
    })),
    { format: "pt", run: JSON.stringify(run) },
  );
  await also(temporary);
  await Deno.remove(dir, { recursive: true }).catch(() => {});
  await Deno.rename(temporary, dir);
}

/** Reads a checkpoint's run state. */
export function readRunState(dir: string): RunState {
  using source = openSafetensors(`${dir}/state.safetensors`);
  return JSON.parse(source.metadata.run!) as RunState;
}

/** Puts the trainer where the checkpoint left it. Throws where its settings differ from `settings`. */
export async function loadCheckpoint(
  dir: string,
  { trainer, settings }: { trainer: Trainer; settings: string },
): Promise<RunState> {
  const run = readRunState(dir);
  if (run.settings !== settings) {
    const [was, is] = differing(JSON.parse(run.settings), JSON.parse(settings));
    throw new Error(
      `Cannot resume from "${dir}": it was made with ${was}, not ${is}: use the same flags, or --force to start anew`,
    );
  }
  using source = openSafetensors(`${dir}/state.safetensors`);
  const part = (prefix: string) =>
    new Map(
      [...source.tensors.keys()].filter((name) => name.startsWith(prefix)).map((name) => [
        name.slice(prefix.length),
        source.read(name),
      ]),
    );
  await trainer.restore({ parameters: part("param."), state: part("state.") });
  return run;
}

function differing(was: Record<string, unknown>, is: Record<string, unknown>): [string, string] {
  const key = Object.keys({ ...was, ...is }).find((k) => JSON.stringify(was[k]) !== JSON.stringify(is[k])) ??
    "settings";
  return [`${key} ${JSON.stringify(was[key])}`, JSON.stringify(is[key])];
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

/** Removes the oldest checkpoints until `limit` are left; `keep` (the best) is never removed. 0 keeps all. */
export async function pruneCheckpoints(dir: string, { limit, keep }: { limit: number; keep?: number }): Promise<void> {
  if (limit <= 0) return;
  const all = listCheckpoints(dir);
  const removable = all.slice(0, -1).filter(({ step }) => step !== keep);
  for (const { path } of removable.slice(0, Math.max(0, all.length - limit))) {
    await Deno.remove(path, { recursive: true });
  }
}
