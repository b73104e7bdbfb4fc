/**
 * What stage 02 loaded, what stage 05 made of it and what stage 07 made of that: the one place where the later stages ask. It
 * reads `load.json` and manifests, and no weights.
 */
import { checkHolds, exists, readJsonObject, sha256File } from "../data/files.ts";
import { readManifest } from "./manifest.ts";

/** What stage 05 trains: an adapter on 4-bit weights, one on weights as stored, or all weights. */
export const modes = ["qlora", "lora", "full"] as const;
/** One of {@link modes}. */
export type Mode = (typeof modes)[number];

/** What `load.json` holds: how the model is to be trained, and the folder that stage 02 read. */
export interface Load {
  readonly mode: Mode;
  readonly base: string;
}

/** What a training run left: an adapter's folder or a whole model's. */
export interface Trained {
  readonly kind: "adapter" | "model";
  readonly path: string;
}

/** Reads the `load.json` of a model that stage 02 loaded; throws where there is none, or one that does not say both. */
export function readLoad(dir: string): Load {
  checkHolds(dir, { name: "load.json", wanted: "a loaded model", run: "deno task 02" });
  const path = `${dir}/load.json`;
  const { mode: word, base } = readJsonObject(path), mode = modes.find((mode) => mode === word);
  if (mode === undefined || typeof base !== "string") {
    const state = `its mode is ${JSON.stringify(word)} and its base ${JSON.stringify(base)}`;
    throw new Error(
      `Cannot read "${path}": ${state}: one of ${
        modes.join(", ")
      } and a folder are wanted: run "deno task 02 --force" first`,
    );
  }
  return { mode, base };
}

/** The name, in the folder of stage 05, of what training in this mode leaves. */
export function trainedKind(mode: Mode): Trained["kind"] {
  return mode === "full" ? "model" : "adapter";
}

/** What the finished run of stage 05 in `folder` left there; undefined where there is no such run. */
export function trainedBy(folder: string): Trained | undefined {
  const manifest = readManifest(folder);
  if (manifest?.script !== "05_train") return undefined;
  const kind = trainedKind(manifest.numbers.mode as Mode);
  return { kind, path: `${folder}/${kind}` };
}

/** What to use where the adapter `path` is asked for: the whole model instead, where stage 05 trained all weights there. */
export function trainedAt(path: string): Trained {
  const trained = trainedBy(path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : ".");
  return trained?.kind === "model" && (path === trained.path || !exists(path)) ? trained : { kind: "adapter", path };
}

/** Whether stage 07 made the folder `model` from this very adapter, wherever a copy of that lies. */
export function isMergeOf(model: string, adapter: string): boolean {
  const merge = readManifest(model.includes("/") ? model.slice(0, model.lastIndexOf("/")) : ".");
  if (merge?.script !== "07_merge") return false;
  return ["adapter_config.json", "adapter_model.safetensors"].every((name) => {
    const read = merge.reads.find(({ path }) => path.endsWith(`/${name}`)), path = `${adapter}/${name}`;
    return read !== undefined && exists(path) && read.sha256 === sha256File(path);
  });
}

/** Throws where `model` has this adapter in it already: it would count twice. */
export function checkNotMerged(model: string, adapter: string): void {
  if (!isMergeOf(model, adapter)) return;
  const state = `stage 07 merged "${adapter}" into it already`;
  throw new Error(`Cannot add an adapter to "${model}": ${state}: leave --adapter out, or name the base with --model`);
}
