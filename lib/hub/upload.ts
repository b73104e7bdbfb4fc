/**
 * A folder to a model repository on the hub: plan, upload, commit, then compare every file with the hub's tree. It refuses to call an upload
 * done before size and sha256 of each file agree, never deletes a remote file, and sends nothing that is already there.
 */
import { createRepo, type ListFileEntry, listFiles, modelInfo, uploadFiles, whoAmI } from "@huggingface/hub";
import { createHash } from "node:crypto";
import { checkRepoId, DiskBlob, type HubAccess, hubBase, hubFetch, statusOf } from "./retry.ts";

/** A file to upload. */
export interface LocalFile {
  /** Path in the repository. */
  readonly path: string;
  /** Path on disk. */
  readonly source: string;
  readonly bytes: number;
  readonly sha256: string;
  /** Git's name for the content, by which the hub lists files that are not in LFS. */
  readonly gitOid: string;
}

/** A verified file: its bytes were "sent", were "stored" by an earlier run and only committed, or the file was "present" altogether. */
export interface RemoteFile {
  readonly path: string;
  readonly bytes: number;
  readonly sha256: string;
  readonly mode: "lfs" | "regular";
  readonly state: "sent" | "stored" | "present";
}

/** A repository whose files were all verified. */
export interface UploadResult {
  readonly id: string;
  /** False when the repository was there before. */
  readonly created: boolean;
  /** The commit whose tree was verified: the new one, or the newest when there was nothing to commit. */
  readonly commit: string;
  readonly files: readonly RemoteFile[];
  /** Files of the repository that are not among the uploaded ones; they stay. */
  readonly others: readonly string[];
}

/** What is uploaded, where to, and what the commit is called. */
export interface UploadOptions {
  /** `owner/name`. */
  readonly repo: string;
  readonly access: HubAccess;
  readonly isPrivate: boolean;
  /** First line of the commit. */
  readonly title: string;
  /** How many bytes of the large files have left, of how many that have to. */
  readonly onProgress?: (progress: { done: number; total: number }) => void;
}

/** Where the file goes as a rule: LFS above 10 MB and for weights; the hub decides when it is uploaded. */
export function likelyMode({ path, bytes }: { path: string; bytes: number }): "lfs" | "regular" {
  return bytes > 10_000_000 || (bytes > 0 && /\.(safetensors|bin|pt|pth|gguf|parquet)$/.test(path)) ? "lfs" : "regular";
}

/**
 * The files under `dir` with size and hashes, sorted by path; `replace` maps repository paths to files elsewhere, which take the place of the
 * folder's. Names that start with a dot, and manifest.json, stay out. Throws an Error when there is no file.
 */
export async function listLocal(
  dir: string,
  { replace = {} }: { replace?: Readonly<Record<string, string>> } = {},
): Promise<LocalFile[]> {
  const sources = new Map<string, string>();
  const walk = async (prefix: string) => {
    for await (const { name, isDirectory } of Deno.readDir(`${dir}/${prefix}`)) {
      if (name.startsWith(".") || prefix + name === "manifest.json") continue;
      if (isDirectory) await walk(`${prefix}${name}/`);
      else sources.set(prefix + name, `${dir}/${prefix}${name}`);
    }
  };
  await walk("");
  if (sources.size === 0) throw new Error(`Cannot upload "${dir}": there is no file in it`);
  for (const [path, source] of Object.entries(replace)) sources.set(path, source);
  const files = [];
  for (const path of [...sources.keys()].sort()) files.push(await describe(path, sources.get(path)!));
  return files;
}

async function describe(path: string, source: string): Promise<LocalFile> {
  const { size: bytes } = await Deno.stat(source);
  const sha256 = createHash("sha256");
  const git = createHash("sha1").update(`blob ${bytes}\0`);
  for await (const block of new DiskBlob(source, { start: 0, end: bytes }).stream()) {
    sha256.update(block);
    git.update(block);
  }
  return { path, source, bytes, sha256: sha256.digest("hex"), gitOid: git.digest("hex") };
}

/** The account of the token; throws when the hub does not accept it. */
export async function accountName(access: HubAccess): Promise<string> {
  const { name } = await whoAmI({ ...credentials(access), fetch: hubFetch("upload", access) });
  return name;
}

/**
 * Makes the repository unless it exists, uploads what differs in one commit, and verifies every file; run again, it goes on where a cut-off
 * run stopped. Throws one sentence when the hub refuses, and when a file differs in the end.
 */
export async function uploadFolder(files: readonly LocalFile[], options: UploadOptions): Promise<UploadResult> {
  const { repo: id, access } = options;
  checkRepoId(id, { action: "upload to" });
  const hub: Hub = {
    ...credentials(access),
    repo: { type: "model", name: id },
    fetch: hubFetch(`upload to "${id}"`, access),
  };
  const created = await create(hub, options.isPrivate);
  let { commit, isPrivate } = await head(hub);
  if (options.isPrivate && !isPrivate) {
    throw new Error(
      `Cannot upload to "${id}": it exists and is public: make it private in its settings or leave --private out`,
    );
  }
  const states = new Map<string, RemoteFile["state"]>();
  let made = "";
  for (let attempt = 1;; attempt++) {
    const tree = await listTree(hub, commit);
    const missing = files.filter((file) => !agrees(file, tree.get(file.path)));
    for (const file of files) if (!states.has(file.path) && !missing.includes(file)) states.set(file.path, "present");
    if (missing.length === 0) return { id, created, commit, ...await verify(files, { hub, commit, tree, states }) };
    if (made !== "") throw disagreement(id, { file: missing[0]!, remote: tree.get(missing[0]!.path) });
    made = await send(missing, { ...options, hub, parent: commit, states, attempt });
    commit = made !== "" ? made : (await head(hub)).commit;
  }
}

interface Hub {
  readonly hubUrl: string;
  readonly accessToken: string;
  readonly repo: { readonly type: "model"; readonly name: string };
  readonly fetch: typeof fetch;
}

function credentials(access: HubAccess): { hubUrl: string; accessToken: string } {
  const hubUrl = hubBase(access);
  if (!access.token) {
    throw new Error(
      `Cannot upload: HF_TOKEN is not set: make a token with write access at ${hubUrl}/settings/tokens and set HF_TOKEN to it`,
    );
  }
  return { hubUrl, accessToken: access.token };
}

async function create(hub: Hub, isPrivate: boolean): Promise<boolean> {
  try {
    await createRepo({ ...hub, visibility: isPrivate ? "private" : "public" });
    return true;
  } catch (error) {
    if (statusOf(error) === 409) return false; // it exists, which is as good
    throw error;
  }
}

async function head(hub: Hub): Promise<{ commit: string; isPrivate: boolean }> {
  const info = await modelInfo({ ...hub, name: hub.repo.name, revision: "main", additionalFields: ["sha"] });
  return { commit: info.sha, isPrivate: info.private };
}

async function listTree(hub: Hub, commit: string): Promise<Map<string, ListFileEntry>> {
  const tree = new Map<string, ListFileEntry>();
  for await (const entry of listFiles({ ...hub, recursive: true, revision: commit })) {
    if (entry.type === "file") tree.set(entry.path, entry);
  }
  return tree;
}

function agrees(file: LocalFile, remote: ListFileEntry | undefined): boolean {
  if (remote?.lfs) return remote.lfs.size === file.bytes && remote.lfs.oid === file.sha256;
  return remote?.size === file.bytes && remote.oid === file.gitOid;
}

interface Sending extends UploadOptions {
  readonly hub: Hub;
  readonly parent: string;
  readonly states: Map<string, RemoteFile["state"]>;
  readonly attempt: number;
}

interface Counter {
  /** Bytes that the hub asked for. */
  total: number;
  readonly watch: (body: DiskBlob) => DiskBlob;
}

/**
 * One upload and commit on top of `parent`; returns the commit, or "" when its answer was lost or its parent stale, or an upload address ran
 * out: the caller then looks at the tree again, so that no commit is made twice and none is forgotten.
 */
async function send(files: readonly LocalFile[], sending: Sending): Promise<string> {
  const { hub, states, access, attempt } = sending;
  for (const { path } of files) states.set(path, "sent");
  const progress = counter(sending);
  const stop = Promise.withResolvers<never>();
  stop.promise.catch(() => {}); // it is one side of a race
  let committing = false;
  let expired = false;
  const watched: typeof globalThis.fetch = async (input, init = {}) => {
    const address = String(input);
    committing ||= /\/commit\/[^/]+$/.test(address);
    try {
      const body = init.method === "PUT" && init.body instanceof DiskBlob
        ? progress.watch(init.body)
        : init.body ?? null;
      const response = await hub.fetch(input, { ...init, body });
      if (address.endsWith("/info/lfs/objects/batch")) {
        return await checkedBatch(response, { files, sending, progress });
      }
      if (body instanceof DiskBlob && body.isPart && !response.headers.has("ETag")) {
        throw new Error(
          `Cannot upload "${body.path}" to "${sending.repo}": the storage confirmed a part without an ETag`,
        );
      }
      return response;
    } catch (error) {
      expired ||= statusOf(error) === 403 && !address.startsWith(hub.hubUrl);
      stop.reject(error);
      throw error;
    }
  };
  const upload = uploadFiles({
    ...hub,
    files: files.map(({ path, source, bytes }) => ({ path, content: new DiskBlob(source, { start: 0, end: bytes }) })),
    commitTitle: sending.title,
    parentCommit: sending.parent,
    useXet: false, // plain LFS: every request can be repeated by itself, and sha256 is the name under which it is stored
    fetch: watched,
  });
  upload.catch(() => {});
  try {
    // The first failure is the one to tell: the client can report instead what followed from it, such as the requests that it aborted.
    const done = await Promise.race([upload, stop.promise]);
    return done?.commit.oid ?? "";
  } catch (error) {
    const status = statusOf(error);
    const unsure = expired || (committing && (status === 0 || status === 409 || status === 412 || status >= 500));
    if (!unsure || attempt === 4) throw error;
    access.onRetry?.(`${error instanceof Error ? error.message : error}: looking at what is there now`);
    await (access.wait ?? ((ms) => new Promise((resolve) => setTimeout(resolve, ms))))(1000 * 2 ** (attempt - 1));
    return "";
  }
}

/** Refuses a batch answer that the client would stumble over, and notes which bytes the storage has already. */
async function checkedBatch(
  response: Response,
  { files, sending: { states, repo, attempt }, progress }: {
    files: readonly LocalFile[];
    sending: Sending;
    progress: Counter;
  },
): Promise<Response> {
  const text = await response.text();
  const { objects } = JSON.parse(text) as {
    objects: {
      oid: string;
      error?: { code: number; message: string };
      actions?: { upload?: { header?: Record<string, string> } };
    }[];
  };
  for (const { oid, error, actions } of objects) {
    const same = files.filter(({ sha256 }) => sha256 === oid);
    const file = same[0];
    if (file === undefined) {
      throw new Error(`Cannot upload to "${repo}": the hub asks for object ${oid}, which was not offered`);
    }
    if (error) {
      throw new Error(
        `Cannot upload "${file.path}" to "${repo}": the storage refuses it: ${error.message} (${error.code})`,
      );
    }
    if (actions?.upload) progress.total += file.bytes;
    else if (attempt === 1) { for (const { path } of same) states.set(path, "stored"); }
    const { chunk_size: chunk, ...header } = actions?.upload?.header ?? {};
    const count = Object.keys(header).filter((key) => /^\d+$/.test(key)).length;
    if (chunk !== undefined && count !== Math.ceil(file.bytes / Number(chunk))) {
      throw new Error(
        `Cannot upload "${file.path}" to "${repo}": the hub gives ${count} addresses for ${file.bytes} bytes in parts of ${chunk}`,
      );
    }
  }
  return new Response(text, { status: response.status, headers: response.headers });
}

/** Adds up what has been read of all large files; a part that is tried again counts from 0 again. */
function counter({ onProgress }: UploadOptions): Counter {
  const parts = new Map<string, number>();
  let done = 0;
  const count: Counter = {
    total: 0,
    watch: (body) =>
      body.watched((read) => {
        const part = `${body.start} ${body.path}`;
        done += read - (parts.get(part) ?? 0);
        parts.set(part, read);
        onProgress?.({ done, total: count.total });
      }),
  };
  return count;
}

/** Downloads what is not in LFS and compares its sha256; of LFS files the tree itself has the sha256, which `agrees` compared. */
async function verify(
  files: readonly LocalFile[],
  { hub, commit, tree, states }: {
    hub: Hub;
    commit: string;
    tree: ReadonlyMap<string, ListFileEntry>;
    states: ReadonlyMap<string, RemoteFile["state"]>;
  },
): Promise<{ files: RemoteFile[]; others: string[] }> {
  const verified: RemoteFile[] = [];
  for (const { path, bytes, sha256 } of files) {
    const mode = tree.get(path)?.lfs ? "lfs" : "regular";
    if (mode === "regular" && bytes > 0) {
      const address = path.split("/").map(encodeURIComponent).join("/");
      const response = await hub.fetch(`${hub.hubUrl}/${hub.repo.name}/resolve/${commit}/${address}`, {
        headers: { Authorization: `Bearer ${hub.accessToken}` },
      });
      const found = createHash("sha256").update(new Uint8Array(await response.arrayBuffer())).digest("hex");
      if (found !== sha256) {
        throw new Error(
          `Cannot verify "${path}" in "${hub.repo.name}": the hub returns sha256 ${found}, the file here has ${sha256}`,
        );
      }
    }
    verified.push({ path, bytes, sha256, mode, state: states.get(path)! });
  }
  const known = new Set([".gitattributes", ...files.map(({ path }) => path)]);
  return { files: verified, others: [...tree.keys()].filter((path) => !known.has(path)).sort() };
}

function disagreement(id: string, { file, remote }: { file: LocalFile; remote: ListFileEntry | undefined }): Error {
  const there = remote === undefined
    ? "does not list it"
    : `lists ${remote.size} bytes with hash ${remote.lfs?.oid ?? remote.oid}`;
  return new Error(
    `Cannot verify "${file.path}" in "${id}": after the commit the hub ${there}, the file here has ${file.bytes} bytes and sha256 ${file.sha256}`,
  );
}
