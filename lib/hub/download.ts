/**
 * Repositories from the hub to disk: "hf:owner/name[@revision]" becomes a folder of verified files, one folder per commit. A download that
 * was cut off goes on where it stopped; it refuses a file whose size or hash is not what the hub's tree says.
 */
import { datasetInfo, type ListFileEntry, listFiles, modelInfo } from "@huggingface/hub";
import { createHash } from "node:crypto";
import { dirname } from "node:path";
import { checkRepoId, environmentToken, type HubAccess, hubBase, hubFetch } from "./retry.ts";

/** A repository at a revision (branch, tag or commit). */
export interface RepoSpec {
  readonly type: "model" | "dataset";
  readonly name: string;
  readonly revision: string;
}

/** What `fetchRepo` left on disk. */
export interface FetchedRepo extends RepoSpec {
  /** Folder that holds the files under their repository paths. */
  readonly dir: string;
  /** The commit that `revision` stood for. */
  readonly commit: string;
  readonly files: readonly { readonly path: string; readonly bytes: number; readonly fetched: boolean }[];
}

/** How much of the file `path` is on disk, in bytes. */
export interface FileProgress {
  readonly path: string;
  readonly done: number;
  readonly total: number;
}

/** What of a repository is fetched, and into which folder. */
export interface FetchOptions extends HubAccess {
  /** What "hf:owner/name" means without "datasets/" before it; "model" when left out. */
  readonly type?: "model" | "dataset";
  /** Paths to fetch, where `*` stands for any characters but "/" and `**` for any; everything when left out. A path without `*` must exist. */
  readonly files?: readonly string[];
  /** Where commits are kept; "artifacts/hub" when left out. */
  readonly cacheDir?: string;
  readonly onProgress?: (progress: FileProgress) => void;
}

/** Reads "hf:owner/name", "hf:owner/name@rev" or "hf:datasets/owner/name@rev"; throws a RangeError when the id breaks the hub's rules. */
export function parseSpec(spec: string, { type = "model" }: { type?: "model" | "dataset" } = {}): RepoSpec {
  const [, kind, name, revision = "main"] = /^hf:(datasets\/|models\/)?([^@]*)(?:@(.*))?$/.exec(spec) ?? [];
  if (name === undefined) {
    throw new RangeError(`Cannot download "${spec}": it must look like hf:owner/name or hf:owner/name@revision`);
  }
  checkRepoId(name, { bare: true, action: "download" });
  if (!/^[\w][\w./-]*$/.test(revision) || revision.includes("..")) {
    throw new RangeError(`Cannot download "${spec}": "${revision}" is no branch, tag or commit`);
  }
  return { type: kind === "datasets/" ? "dataset" : kind === "models/" ? "model" : type, name, revision };
}

/**
 * Fetches the files of a repository, those that are already there only checked, and returns where they are; the token is `HF_TOKEN` unless
 * given. Throws a RangeError for a bad spec, an Error for a missing file or one whose bytes are wrong twice.
 */
export async function fetchRepo(spec: string, options: FetchOptions = {}): Promise<FetchedRepo> {
  const repo = parseSpec(spec, options.type ? { type: options.type } : {});
  const access: HubAccess = { ...options, token: options.token ?? environmentToken() };
  const fetch = hubFetch(`download "${spec}"`, access, { streamed: true });
  const hub = { hubUrl: hubBase(access), fetch, ...(access.token ? { accessToken: access.token } : {}) };

  const commit = await commitOf(repo, hub);
  const tree: ListFileEntry[] = [];
  for await (
    const entry of listFiles({ ...hub, repo: { type: repo.type, name: repo.name }, recursive: true, revision: commit })
  ) {
    if (entry.type === "file") tree.push(entry);
  }
  const chosen = choose(tree, { spec, patterns: options.files });
  const folder = `${repo.type}s--${repo.name.replace("/", "--")}`;
  const dir = `${options.cacheDir ?? "artifacts/hub"}/${folder}/${commit}`;
  const base = `${hub.hubUrl}/${repo.type === "dataset" ? "datasets/" : ""}${repo.name}/resolve/${commit}`;
  const files = [];
  for (const entry of chosen) {
    const url = `${base}/${entry.path.split("/").map(encodeURIComponent).join("/")}`;
    const fetched = await fetchFile(entry, { url, spec, target: `${dir}/${entry.path}`, fetch, access, options });
    files.push({ path: entry.path, bytes: entry.size, fetched });
  }
  return { ...repo, dir, commit, files };
}

async function commitOf(
  { type, name, revision }: RepoSpec,
  hub: { hubUrl: string; fetch: typeof fetch; accessToken?: string },
): Promise<string> {
  const ask = { ...hub, name, revision, additionalFields: ["sha" as const] };
  const { sha } = type === "model" ? await modelInfo(ask) : await datasetInfo(ask);
  if (!/^[0-9a-f]{40}$/.test(sha)) {
    throw new Error(`Cannot download "${name}": the hub names no commit for "${revision}"`);
  }
  return sha;
}

/** The entries that match `patterns`; refuses paths that would leave the folder. */
function choose(
  tree: readonly ListFileEntry[],
  { spec, patterns }: { spec: string; patterns: readonly string[] | undefined },
): ListFileEntry[] {
  const tests = patterns?.map((pattern) => {
    const source = pattern.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replace(
      /\*\*|\*/g,
      (stars) => stars === "**" ? ".*" : "[^/]*",
    );
    const test = new RegExp(`^${source}$`);
    if (!pattern.includes("*") && !tree.some(({ path }) => test.test(path))) {
      throw new Error(
        `Cannot download "${pattern}" of "${spec}": the repository has ${tree.map(({ path }) => path).join(", ")}`,
      );
    }
    return test;
  });
  const chosen = tree.filter(({ path }) => tests?.some((test) => test.test(path)) ?? true);
  for (const { path } of chosen) {
    if (path.split("/").some((part) => part === "" || part === "." || part === "..") || /[\\:\0]/.test(path)) {
      throw new Error(`Cannot download "${path}" of "${spec}": the path leaves its folder`);
    }
  }
  return chosen;
}

interface FileJob {
  readonly url: string;
  readonly spec: string;
  readonly target: string;
  readonly fetch: typeof fetch;
  readonly access: HubAccess;
  readonly options: FetchOptions;
}

/** Brings one file to `target` by way of `target.part`; returns false when it was there already. */
async function fetchFile(entry: ListFileEntry, job: FileJob): Promise<boolean> {
  const { path, size } = entry;
  const { target } = job;
  if (await sizeOf(target) === size && await hashOf(target, entry) === expected(entry)) {
    job.options.onProgress?.({ path, done: size, total: size });
    return false;
  }
  await Deno.mkdir(dirname(target), { recursive: true });
  const part = `${target}.part`;
  for (let attempt = 1;; attempt++) {
    await fill(part, { entry, job });
    const found = await hashOf(part, entry);
    if (found === expected(entry)) break;
    await Deno.remove(part);
    if (attempt === 2) {
      throw new Error(
        `Cannot download "${path}" of "${job.spec}": its bytes have the hash ${found} and the hub says ${
          expected(entry)
        }: nothing was kept`,
      );
    }
    job.access.onRetry?.(`"${path}" arrived with the wrong hash: fetching it again from its start`);
  }
  await Deno.rename(part, target);
  return true;
}

/** Appends to `part` until it has the file's size. Connections that break are taken up again as long as each brings some bytes. */
async function fill(part: string, { entry, job }: { entry: ListFileEntry; job: FileJob }): Promise<void> {
  const { path, size } = entry;
  using file = await Deno.open(part, { create: true, read: true, write: true });
  let done = (await file.stat()).size;
  if (done > size) {
    await file.truncate(0);
    done = 0;
  }
  for (let barren = 0; done < size;) {
    const start = done;
    try {
      const response = await job.fetch(job.url, {
        headers: {
          ...(job.access.token ? { Authorization: `Bearer ${job.access.token}` } : {}),
          ...(start > 0 ? { Range: `bytes=${start}-` } : {}),
        },
      });
      // A server that ignores Range sends the whole file with status 200.
      if (response.status !== 206) done = 0;
      await file.truncate(done);
      await file.seek(done, Deno.SeekMode.Start);
      for await (const block of steady(response, job.access.idleMs ?? 120_000)) {
        if (done + block.length > size) {
          throw new Error(
            `Cannot download "${path}" of "${job.spec}": more bytes arrive than the ${size} that the hub lists`,
          );
        }
        for (let at = 0; at < block.length;) at += await file.write(block.subarray(at));
        done += block.length;
        job.options.onProgress?.({ path, done, total: size });
      }
      if (done < size) throw new TypeError("the connection closed early");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a broken body is a TypeError, here as in fetch
      barren = done > start ? 0 : barren + 1;
      const text = error.message;
      if (barren > 4) {
        throw new Error(
          `Cannot download "${path}" of "${job.spec}": ${text}, 5 times without a new byte: run again to go on from byte ${done}`,
        );
      }
      job.access.onRetry?.(`"${path}" stopped at byte ${done} of ${size} (${text}): going on from there`);
    }
  }
  await file.sync();
}

/** The body's blocks; a connection that is silent for `idleMs` is given up. */
async function* steady(response: Response, idleMs: number): AsyncGenerator<Uint8Array> {
  const reader = response.body!.getReader();
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    while (true) {
      const silence = new Promise<never>((_, reject) => {
        timer = setTimeout(() => reject(new TypeError(`silent for ${idleMs / 1000} s`)), idleMs);
      });
      const { done, value } = await Promise.race([reader.read(), silence]);
      clearTimeout(timer);
      if (done) return;
      yield value;
    }
  } finally {
    clearTimeout(timer);
    await reader.cancel().catch(() => {}); // a broken body cannot be cancelled, and need not be
  }
}

/** Large files are named by their sha256, small ones by git's SHA-1 of "blob <size>\0" and the content. */
function expected(entry: ListFileEntry): string {
  return entry.lfs?.oid ?? entry.oid ?? "";
}

async function hashOf(path: string, entry: ListFileEntry): Promise<string> {
  const hash = createHash(entry.lfs ? "sha256" : "sha1");
  if (!entry.lfs) hash.update(`blob ${entry.size}\0`);
  using file = await Deno.open(path);
  const block = new Uint8Array(1 << 20);
  for (let read = await file.read(block); read !== null; read = await file.read(block)) {
    hash.update(block.subarray(0, read));
  }
  return hash.digest("hex");
}

async function sizeOf(path: string): Promise<number> {
  try {
    return (await Deno.stat(path)).size;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return -1;
    throw error;
  }
}
