/**
 * What this machine measured and need not measure again: words by key, in one JSON file per kind in the user's cache folder.
 * Losing it costs time alone, so a file that cannot be read counts as empty and a folder that cannot be written is let be.
 */
import { writeJson } from "../data/files.ts";

/** Words by key; `save` keeps them for later processes. */
export interface Cache {
  /** The file; undefined where the system names no folder for it. */
  readonly path: string | undefined;
  get(key: string): string | undefined;
  set(key: string, value: string): void;
  save(): Promise<void>;
}

/** Opens the cache `kind` in the user's cache folder. */
export function openCache(kind: string, folder: string | undefined = cacheFolder(Deno.env)): Cache {
  const path = folder ? `${folder}/medslm-sft/${kind}.json` : undefined;
  const known = read(path), added = new Map<string, string>();
  return {
    path,
    get: (key) => added.get(key) ?? known.get(key),
    set: (key, value) => {
      added.set(key, value);
    },
    async save() {
      if (!path || added.size === 0) return;
      try {
        await Deno.mkdir(`${folder}/medslm-sft`, { recursive: true });
        // Read again: another process may have saved meanwhile.
        await writeJson(path, Object.fromEntries([...read(path), ...added].toSorted()));
      } catch {
        // No room, no right, no such disk: it will be measured again.
      }
    },
  };
}

/** Where the system keeps caches; undefined where it names no folder for them. */
export function cacheFolder(env: Pick<Deno.Env, "get">): string | undefined {
  const home = env.get("HOME");
  return env.get("XDG_CACHE_HOME") || (home ? `${home}/.cache` : env.get("LOCALAPPDATA"));
}

function read(path: string | undefined): Map<string, string> {
  try {
    const entries = Object.entries(JSON.parse(Deno.readTextFileSync(path!)) as Record<string, unknown>);
    return new Map(entries.filter((entry): entry is [string, string] => typeof entry[1] === "string"));
  } catch {
    return new Map();
  }
}
