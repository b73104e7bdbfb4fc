/**
 * A hub on the loopback interface for tests: the routes that @huggingface/hub uses to create, list, upload, commit and download, with
 * blobs kept by sha256 on a second port, and faults on demand. It refuses what the real hub refuses and keeps nothing on disk.
 */
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** What goes wrong: an answer instead of the real one (`text` as it is), or a named accident. */
export type Fault =
  | { status: number; headers?: Record<string, string>; json?: unknown; text?: string }
  | "drop" // the connection breaks while the request body arrives
  | "drop the answer" // the work is done, the client never hears of it
  | "silent" // nothing is answered, the connection stays open
  | "half" // the connection breaks half way through the answer's body
  | "stall" // the answer stops half way, the connection stays open
  | "no etag"
  | "wrong part count"
  | "object error"
  | "someone else commits" // right before this commit, so that its parent is stale
  | "ignore range"
  | "wrong bytes"; // the answer's body has one bit flipped

/** What a server that is no hub says to any request, and how that is called. */
export const NO_HUB: readonly (readonly [Fault, RegExp])[] = [
  [
    { status: 200, headers: { "Content-Type": "text/html; charset=utf-8" }, text: "<!doctype html>" },
    /text\/html that is/,
  ],
  [{ status: 200, text: "" }, /answered \w+ [^ ]+ with nothing: /],
  [{ status: 200, json: { ok: true } }, /other JSON than a hub's: /],
  [{ status: 200, json: [7] }, /other JSON than a hub's: /],
  [{ status: 200, json: null }, /other JSON than a hub's: /],
  [{ status: 404, headers: { "Content-Type": "text/html" }, text: "<p>Not Found" }, /http:\S+ answered 404 to /],
];

interface Entry {
  readonly bytes: Buffer;
  readonly lfs: boolean;
}
interface Repo {
  readonly isPrivate: boolean;
  readonly commits: { oid: string; tree: ReadonlyMap<string, Entry> }[];
}
export interface Seen {
  /** "POST /api/repos/create" without the query. */
  readonly line: string;
  readonly port: "hub" | "storage";
  /** The Authorization header as it came. */
  readonly authorization: string | undefined;
  readonly range: string | undefined;
  readonly status: number;
}

const sha = (kind: "sha1" | "sha256" | "md5", ...parts: (Buffer | string)[]) => {
  const hash = createHash(kind);
  for (const part of parts) hash.update(part);
  return hash.digest("hex");
};

/** Starts the stand-in; `token` is the only one it accepts, `owners` the namespaces that it may write to, `chunk` the multipart size in bytes. */
export async function startHub({ token, owners = ["you"], chunk = 1 << 30, lfsAbove = 10_000_000 }: {
  token: string;
  owners?: string[];
  chunk?: number;
  lfsAbove?: number;
}) {
  const repos = new Map<string, Repo>(); // "models/you/x"
  const blobs = new Map<string, Buffer>();
  const parts = new Map<string, Map<number, Buffer>>();
  const seen: Seen[] = [];
  const faults: { on: RegExp; fault: Fault; left: number; then?: (() => void) | undefined }[] = [];
  const signature = randomBytes(8).toString("hex");
  let stored = ""; // address of the second port

  const commit = (repo: Repo, change: (tree: Map<string, Entry>) => void): string => {
    const tree = new Map(repo.commits.at(-1)?.tree ?? []);
    change(tree);
    const oid = sha("sha1", String(repo.commits.length), randomBytes(8));
    repo.commits.push({ oid, tree });
    return oid;
  };
  const isLfs = (path: string, size: number) =>
    size > 0 && (/\.(safetensors|bin|pt|parquet)$/.test(path) || size > lfsAbove);

  async function answer(request: IncomingMessage, { port, fault }: { port: string; fault: Fault | undefined }) {
    const url = new URL(request.url ?? "/", "http://stand-in");
    const path = decodeURIComponent(url.pathname);
    const isRead = request.method === "GET" || request.method === "HEAD";
    const body = await read(request, fault);
    if (typeof fault === "object") {
      const { status, json, text, headers } = fault;
      const answer = reply(status, json === undefined ? { error: "made to fail" } : json, headers);
      return text === undefined ? answer : { ...answer, body: Buffer.from(text) };
    }
    if (port === "storage") {
      if (url.searchParams.get("sig") !== signature) return reply(403, { error: "bad signature" });
      return store({ path, body, fault, range: isRead ? request.headers.range : undefined, isRead });
    }
    const authorized = request.headers.authorization === `Bearer ${token}`;
    if (request.headers.authorization && !authorized) return reply(401, { error: "Invalid user token." });
    if (!isRead && !authorized) return reply(401, { error: "Access denied." });
    const json = () => JSON.parse(body.toString());
    if (path === "/api/whoami-v2") {
      return authorized
        ? reply(200, { type: "user", id: "1", name: owners[0], orgs: [], auth: { type: "access_token" } })
        : reply(401, { error: "Access denied." });
    }
    if (path === "/api/repos/create") {
      const { name, organization, type, visibility } = json();
      const id = `${organization}/${name}`;
      if (!owners.includes(organization)) return reply(403, { error: `No rights in the namespace "${organization}"` });
      if (repos.has(`${type}s/${id}`)) return reply(409, { error: "You already created this model repo" });
      const repo: Repo = { isPrivate: visibility === "private", commits: [] };
      commit(
        repo,
        (tree) => tree.set(".gitattributes", { bytes: Buffer.from("*.safetensors filter=lfs\n"), lfs: false }),
      );
      repos.set(`${type}s/${id}`, repo);
      return reply(200, { url: `${here}/${id}`, id, name: id });
    }
    const api = /^\/api\/(models|datasets)\/([^/]+\/[^/]+)(?:\/(revision|tree|preupload|commit)\/(.+))?$/.exec(path);
    const file = /^\/(datasets\/)?([^/]+\/[^/]+)\/resolve\/([^/]+)\/(.+)$/.exec(path);
    const lfs = /^\/(datasets\/)?([^/]+\/[^/]+)\.git\/info\/lfs\/objects\/batch$/.exec(path);
    const id = api
      ? `${api[1]}/${api[2]}`
      : file
      ? `${file[1] ?? "models/"}${file[2]}`
      : `${lfs?.[1] ?? "models/"}${lfs?.[2]}`;
    const repo = repos.get(id);
    if (repo === undefined || (repo.isPrivate && !authorized)) {
      return reply(authorized ? 404 : 401, { error: "Repository not found" }, { "X-Error-Code": "RepoNotFound" });
    }
    if (lfs) return batch(json(), fault);
    const wanted = api ? api[4] ?? "main" : file![3]!;
    const at = wanted === "main" || wanted === "HEAD"
      ? repo.commits.at(-1)
      : repo.commits.find((c) => c.oid === wanted);
    if (at === undefined) {
      return reply(404, { error: `Invalid rev id: ${wanted}` }, { "X-Error-Code": "RevisionNotFound" });
    }
    if (file) {
      const entry = at.tree.get(file[4]!);
      if (entry === undefined) return reply(404, { error: "Entry not found" }, { "X-Error-Code": "EntryNotFound" });
      const headers = { "X-Repo-Commit": at.oid, "Accept-Ranges": "bytes" };
      if (!entry.lfs) {
        return ranged(entry.bytes, {
          range: request.headers.range,
          fault,
          headers: { ...headers, ETag: `"${gitOid(entry)}"` },
        });
      }
      const oid = sha("sha256", entry.bytes);
      blobs.set(oid, entry.bytes);
      const linked = { "X-Linked-Etag": `"${oid}"`, "X-Linked-Size": `${entry.bytes.length}` };
      return reply(302, {}, { ...headers, ...linked, Location: `${stored}/blob/${oid}?sig=${signature}` });
    }
    if (api![3] === "preupload") {
      const files = (json().files as { path: string; size: number }[])
        .map((f) => ({ path: f.path, uploadMode: isLfs(f.path, f.size) ? "lfs" : "regular", shouldIgnore: false }));
      return reply(200, { files });
    }
    if (api![3] === "tree") {
      const files = [...at.tree].map(([path, entry]) => ({
        type: "file",
        path,
        oid: gitOid(entry),
        size: entry.bytes.length,
        ...(entry.lfs ? { lfs: { oid: sha("sha256", entry.bytes), size: entry.bytes.length, pointerSize: 130 } } : {}),
      }));
      return reply(200, [{ type: "directory", path: "a_folder", oid: "0", size: 0 }, ...files]);
    }
    if (api![3] === "commit") return take({ repo, id, lines: body.toString().split("\n"), fault });
    return reply(200, { _id: "1", id: api![2], sha: at.oid, private: repo.isPrivate, siblings: [] });
  }

  function batch({ objects }: { objects: { oid: string; size: number }[] }, fault: Fault | undefined) {
    const link = (path: string) => `${stored}${path}?sig=${signature}`;
    const answers = objects.map(({ oid, size }, i) => {
      if (fault === "object error" && i === objects.length - 1) {
        return { oid, size, error: { code: 422, message: "Object is too large for this account" } };
      }
      if (blobs.has(oid)) return { oid, size };
      if (size <= chunk) return { oid, size, actions: { upload: { href: link(`/blob/${oid}`) } } };
      const count = Math.ceil(size / chunk) + (fault === "wrong part count" ? 1 : 0);
      const urls = Array.from(
        { length: count },
        (_, k) => [String(k + 1).padStart(5, "0"), link(`/part/${oid}/${k + 1}`)],
      );
      parts.set(oid, new Map());
      const header = { chunk_size: String(chunk), ...Object.fromEntries(urls) };
      return { oid, size, actions: { upload: { href: link(`/complete/${oid}`), header } } };
    });
    return reply(200, { transfer: "basic", objects: answers }, { "Content-Type": "application/vnd.git-lfs+json" });
  }

  /** The second port: whole blobs, parts of blobs, and blobs to read. */
  function store(
    { path, body, fault, range, isRead }: {
      path: string;
      body: Buffer;
      fault: Fault | undefined;
      range: string | undefined;
      isRead: boolean;
    },
  ) {
    const [, kind, oid = "", number] = path.split("/");
    if (isRead) return ranged(blobs.get(oid)!, { range, fault, headers: { ETag: `"${oid}"` } });
    if (kind === "part") {
      parts.get(oid)!.set(Number(number), body);
      return reply(200, {}, fault === "no etag" ? {} : { ETag: `"${sha("md5", body)}"` });
    }
    let whole = body;
    if (kind === "complete") {
      const listed = (JSON.parse(body.toString()).parts as { partNumber: number; etag: string }[])
        .sort((a, b) => a.partNumber - b.partNumber);
      const kept = parts.get(oid)!;
      const wrong = listed.find((p) => p.etag !== `"${sha("md5", kept.get(p.partNumber) ?? "")}"`);
      if (wrong || listed.length !== kept.size) {
        return reply(400, { error: "a part is missing or not the one that was sent" });
      }
      whole = Buffer.concat(listed.map((p) => kept.get(p.partNumber)!));
    }
    if (sha("sha256", whole) !== oid) return reply(400, { error: "the bytes do not have the announced sha256" });
    blobs.set(oid, whole);
    return reply(200, {});
  }

  function take({ repo, id, lines, fault }: { repo: Repo; id: string; lines: string[]; fault: Fault | undefined }) {
    if (fault === "someone else commits") {
      commit(repo, (tree) => tree.set("theirs.txt", { bytes: Buffer.from(repo.commits.at(-1)!.oid), lfs: false }));
    }
    const items = lines.map((line) => JSON.parse(line) as { key: string; value: Record<string, string> });
    const parent = items[0]!.value.parentCommit;
    if (parent !== undefined && parent !== repo.commits.at(-1)!.oid) {
      return reply(412, { error: "A commit has happened since. Please refresh and try again." });
    }
    for (const { key, value } of items) {
      if (key === "lfsFile" && blobs.get(value.oid!)?.length !== Number(value.size)) {
        return reply(400, { error: `The object of ${value.path} was never uploaded` });
      }
    }
    const oid = commit(repo, (tree) => {
      for (const { key, value } of items) {
        if (key === "file") tree.set(value.path!, { bytes: Buffer.from(value.content!, "base64"), lfs: false });
        if (key === "lfsFile") tree.set(value.path!, { bytes: blobs.get(value.oid!)!, lfs: true });
      }
    });
    return reply(200, {
      commitOid: oid,
      commitUrl: `${here}/${id.replace("models/", "")}/commit/${oid}`,
      hookOutput: "",
    });
  }

  const handler = (port: "hub" | "storage") => async (request: IncomingMessage, response: ServerResponse) => {
    const line = `${request.method} ${decodeURIComponent(new URL(request.url ?? "/", "http://x").pathname)}`;
    const hit = faults.find((f) => f.left > 0 && f.on.test(line));
    if (hit) hit.left--;
    const note = (status: number) =>
      void seen.push({
        line,
        port,
        status,
        authorization: request.headers.authorization,
        range: request.headers.range,
      });
    try {
      const { status, headers, body } = await answer(request, { port, fault: hit?.fault });
      hit?.then?.();
      if (hit?.fault === "silent") return note(0);
      if (hit?.fault === "stall") {
        note(status);
        response.writeHead(status, { ...headers, "Content-Length": String(body.length) });
        return void response.write(body.subarray(0, body.length >> 1));
      }
      if (hit?.fault === "drop the answer") throw new Error("dropped");
      note(status);
      response.writeHead(status, { ...headers, "Content-Length": String(body.length) });
      if (request.method === "HEAD") return void response.end();
      if (hit?.fault !== "half") return void response.end(body);
      response.write(body.subarray(0, body.length >> 1), () => setTimeout(() => request.socket.destroy(), 20));
    } catch (error) {
      if (!(error instanceof Error && error.message === "dropped")) console.error("stand-in:", line, error);
      note(0);
      request.socket.destroy();
    }
  };
  const servers = [createServer(handler("hub")), createServer(handler("storage"))] as const;
  const here = await listen(servers[0]);
  stored = await listen(servers[1]);

  return {
    url: here,
    seen,
    blobs,
    /** The next `times` requests whose "METHOD /path" matches go wrong; `then` is called when their work is done. */
    fail: (on: RegExp, fault: Fault, times = 1, then?: () => void) =>
      void faults.push({ on, fault, left: times, then }),
    /** Makes a repository ("models/you/x" or "datasets/you/x") with these files; returns the commit. */
    seed(id: string, files: Record<string, string | Uint8Array>, { isPrivate = false } = {}): string {
      const repo = repos.get(id) ?? { isPrivate, commits: [] };
      repos.set(id, repo);
      return commit(repo, (tree) => {
        for (const [path, content] of Object.entries(files)) {
          tree.set(path, { bytes: Buffer.from(content as Uint8Array), lfs: isLfs(path, content.length) });
        }
      });
    },
    /** Files of the newest commit, undefined when there is no such repository. */
    files: (id: string) => repos.get(id)?.commits.at(-1)?.tree,
    commits: (id: string) => repos.get(id)?.commits.length ?? 0,
    isPrivate: (id: string) => repos.get(id)?.isPrivate,
    async close() {
      for (const server of servers) {
        server.closeAllConnections();
        await new Promise((resolve) => server.close(resolve));
      }
    },
  };
}

function gitOid({ bytes, lfs }: Entry): string {
  const pointer = `version https://git-lfs.github.com/spec/v1\noid sha256:${
    sha("sha256", bytes)
  }\nsize ${bytes.length}\n`;
  const content = lfs ? Buffer.from(pointer) : bytes;
  return sha("sha1", `blob ${content.length}\0`, content);
}

function reply(status: number, json: unknown, headers: Record<string, string> = {}) {
  return {
    status,
    headers: { "Content-Type": "application/json", ...headers },
    body: Buffer.from(JSON.stringify(json)),
  };
}

function ranged(
  bytes: Buffer,
  { range, fault, headers }: { range: string | undefined; fault: Fault | undefined; headers: Record<string, string> },
) {
  const asked = fault === "ignore range" ? null : /^bytes=(\d+)-(\d*)$/.exec(range ?? "");
  const from = asked ? Number(asked[1]) : 0;
  if (asked && from >= bytes.length) {
    return reply(416, { error: "range" }, { "Content-Range": `bytes */${bytes.length}` });
  }
  const end = asked?.[2] ? Math.min(bytes.length, Number(asked[2]) + 1) : bytes.length;
  let body = bytes.subarray(from, end);
  if (fault === "wrong bytes") {
    body = Buffer.from(body);
    body[body.length - 1]! ^= 1;
  }
  const span = asked ? { "Content-Range": `bytes ${from}-${end - 1}/${bytes.length}` } : {};
  return {
    status: asked ? 206 : 200,
    headers: { "Content-Type": "application/octet-stream", ...headers, ...span },
    body,
  };
}

/** The request's body; with the fault "drop" the connection goes away at its first bytes. */
function read(request: IncomingMessage, fault: Fault | undefined): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const blocks: Buffer[] = [];
    request.on("data", (block: Buffer) => fault === "drop" ? reject(new Error("dropped")) : blocks.push(block));
    request.on("end", () => fault === "drop" ? reject(new Error("dropped")) : resolve(Buffer.concat(blocks)));
    request.on("error", () => reject(new Error("dropped")));
  });
}

async function listen(server: Server): Promise<string> {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}
