/**
 * Requests to a hub that speaks Hugging Face's protocol: retries with the waits of huggingface_hub's `http_backoff`, redirects followed
 * by hand, failures told in one sentence. It refuses to show the token to any host but the hub, and never repeats a commit on its own.
 */
import { HUB_URL, HubApiError } from "@huggingface/hub";

/** Where the hub is and who asks. */
export interface HubAccess {
  /** Address of the hub; the public hub when left out. */
  readonly hubUrl?: string;
  /** Access token ("hf_…"); none when empty or left out. */
  readonly token?: string;
  /** Called before each wait with one line for people: what failed, how long the wait is. */
  readonly onRetry?: (line: string) => void;
  /** Pause in ms; tests replace it to look at the waits. */
  readonly wait?: (ms: number) => Promise<void>;
  /** Milliseconds without a byte moving after which a connection counts as lost; 120,000 when left out. */
  readonly idleMs?: number;
}

/** Seconds before the second, third, … try; as huggingface_hub's `http_backoff` waits. */
const WAITS = [1, 2, 4, 8, 8];
const RETRIED = new Set([408, 429, 500, 502, 503, 504]);
/** What the hub's API answers, as far as it is read, by the path asked for: anything else comes from another server. */
const ANSWERS: readonly (readonly [path: RegExp, fits: (answer: Answer) => boolean])[] = [
  [/\/api\/whoami-v2$/, ({ name, auth }) => typeof name === "string" && isRecord(auth)],
  [/\/api\/repos\/create$/, ({ url }) => typeof url === "string"],
  [/\/api\/(?:models|datasets)\/.+\/revision\/[^/]+$/, ({ sha }) => typeof sha === "string"],
  [/\/api\/(?:models|datasets)\/.+\/tree\/[^/]+$/, (tree) => isListOf(tree, ["type", "path"])],
  [/\/api\/models\/.+\/preupload\/[^/]+$/, ({ files }) => isListOf(files, ["path", "uploadMode"])],
  [/\.git\/info\/lfs\/objects\/batch$/, ({ objects }) => isListOf(objects, ["oid"])],
  [/\/api\/models\/.+\/commit\/[^/]+$/, ({ commitOid }) => typeof commitOid === "string"],
];
type Answer = Readonly<Record<string, unknown>>;
/** The public hub counts requests in windows of 300 s; a server that asks for more than two of them is not waited for. */
const LONGEST_WAIT = 600;

/** The hub's address without a slash at its end; throws a RangeError when it is no web address, or would carry the token in clear text. */
export function hubBase({ hubUrl, token }: HubAccess): string {
  const text = hubUrl ?? HUB_URL;
  const url = URL.parse(text);
  if (url === null || !/^https?:$/.test(url.protocol)) {
    throw new RangeError(`Cannot use hub address "${text}": it must start with https:// or http://`);
  }
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(url.hostname);
  if (token && url.protocol === "http:" && !local) {
    throw new RangeError(`Cannot send the token to "${text}": http is not encrypted: use https`);
  }
  return text.replace(/\/+$/, "");
}

/** The token in `HF_TOKEN`, trimmed, or "" when there is none; throws a RangeError (without the token) when it is not of the form "hf_…". */
export function environmentToken(): string {
  const token = (Deno.env.get("HF_TOKEN") ?? "").trim();
  if (token !== "" && !/^hf_[A-Za-z0-9_-]+$/.test(token)) {
    throw new RangeError(
      'Cannot use HF_TOKEN: its value is no access token: one starts with "hf_" and has no spaces in it',
    );
  }
  return token;
}

/** Returns `id` when it follows the hub's rules for `owner/name` (`name` alone passes with `bare`); throws a RangeError that names the broken rule. */
export function checkRepoId(id: string, { bare = false, action = "use repository" } = {}): string {
  const parts = id.split("/");
  const rule = parts.length > 2 || (parts.length === 1 && !bare)
    ? "it must be owner/name"
    : parts.some((part) => part === "")
    ? "owner and name must not be empty"
    : parts.some((part) => part.length > 96)
    ? "owner and name have at most 96 characters"
    : parts.some((part) => !/^[A-Za-z0-9._-]+$/.test(part))
    ? "only ASCII letters, digits, dots, underscores and hyphens are allowed"
    : parts.some((part) => /^[-.]|[-.]$/.test(part))
    ? "owner and name must not start or end with a hyphen or a dot"
    : /--|\.\./.test(id)
    ? 'it must not hold "--" or ".."'
    : id.endsWith(".git")
    ? 'it must not end with ".git"'
    : "";
  if (rule !== "") throw new RangeError(`Cannot ${action} "${id}": ${rule}`);
  return id;
}

/**
 * A `fetch` for @huggingface/hub that retries network errors, 408, 429 (honouring RateLimit and Retry-After), 500, 502, 503 and 504.
 * An answer that stays bad, or is none of the hub's, throws a `HubApiError` whose message is "Cannot <action>: …"; a commit is only retried
 * after 429, which the server sends before it does anything. Answers are read whole here, so that a connection lost in the middle of one is
 * retried; with `streamed` those that are files are left to the caller.
 */
export function hubFetch(action: string, access: HubAccess, { streamed = false } = {}): typeof fetch {
  const base = new URL(hubBase(access));
  const pause = access.wait ?? ((ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms)));
  return async (input, init = {}) => {
    const url = URL.parse(input instanceof Request ? input.url : String(input));
    if (url === null) {
      throw failed(`Cannot ${action}: the hub names an address that is none: check the hub's address`, 0);
    }
    const method = init.method ?? "GET";
    const what = `${method} ${url.pathname}`;
    const isCommit = method === "POST" && /\/commit\/[^/]+$/.test(url.pathname);
    for (let attempt = 0;; attempt++) {
      const last = attempt >= WAITS.length;
      let failure: string;
      let seconds = WAITS[attempt] ?? 0;
      try {
        const { response, from } = await follow(url, { init, base, streamed, idleMs: access.idleMs ?? 120_000 });
        if (response.ok) return await understood(response, { action, what, base, path: url.pathname });
        const retried = isCommit ? response.status === 429 : RETRIED.has(response.status);
        if (!retried || last) {
          throw await refusal(response, {
            action,
            what,
            access,
            tries: attempt + 1,
            from,
            stored: from !== base.origin,
          });
        }
        await response.body?.cancel();
        seconds = askedWait(response.headers) ?? seconds;
        failure = `${new URL(from).host} answered ${response.status} to ${what}`;
        if (seconds > LONGEST_WAIT) {
          throw failed(
            `Cannot ${action}: ${failure} and asks to wait ${Math.ceil(seconds)} s: try again later`,
            response.status,
          );
        }
      } catch (error) {
        if (error instanceof HubApiError || init.signal?.aborted) throw error;
        failure = `no answer from ${url.host} to ${what} (${reason(error)})`;
        if (isCommit || last) {
          const tries = attempt === 0 ? "" : ` after ${attempt + 1} tries`;
          throw failed(
            `Cannot ${action}: ${failure}${tries}: check the hub's address and the network and run again, what has arrived is kept`,
            0,
          );
        }
      }
      access.onRetry?.(`${failure}: trying again in ${seconds} s (${attempt + 1} of ${WAITS.length})`);
      await pause(seconds * 1000);
    }
  };
}

/** The HTTP status of an error thrown by `hubFetch`: 0 when no answer came, -1 for any other error. */
export function statusOf(error: unknown): number {
  return error instanceof HubApiError ? error.statusCode : -1;
}

/** One request with its redirects. The token goes to the hub's own origin only. */
async function follow(
  url: URL,
  { init, base, streamed, idleMs }: { init: RequestInit; base: URL; streamed: boolean; idleMs: number },
): Promise<{ response: Response; from: string }> {
  const idle = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const restart = () => {
    clearTimeout(timer);
    timer = setTimeout(() => idle.abort(new Error(`silent for ${idleMs / 1000} s`)), idleMs);
  };
  restart();
  try {
    const signal = init.signal ? AbortSignal.any([init.signal, idle.signal]) : idle.signal;
    let method = init.method ?? "GET";
    for (let hops = 0; hops <= 5; hops++) {
      const headers = new Headers(init.headers);
      if (url.origin !== base.origin) headers.delete("Authorization");
      const body = init.body instanceof DiskBlob ? init.body.watched(restart) : init.body ?? null;
      const response = await fetch(url, { ...init, method, headers, body, signal, redirect: "manual" });
      const next = response.headers.get("Location");
      if (response.status < 300 || response.status > 399 || next === null) {
        const isFile = response.ok && !/^\/api\/|\.git\/info\/lfs\//.test(url.pathname);
        return { response: isFile && streamed ? response : await settled(response), from: url.origin };
      }
      await response.body?.cancel();
      // 301, 302 and 303 turn anything into GET (Fetch standard); a request with a body must not lose it that way.
      if (response.status < 307 && method !== "GET" && method !== "HEAD") {
        throw new Error(`moved to ${new URL(next, url).host} with status ${response.status}`);
      }
      method = response.status === 303 ? "GET" : method;
      url = new URL(next, url);
    }
    throw new Error("more than 5 redirects");
  } finally {
    clearTimeout(timer);
  }
}

/** The same answer with its body in memory. */
async function settled(response: Response): Promise<Response> {
  const { status, statusText, headers } = response;
  const body = await response.arrayBuffer();
  return new Response([204, 205, 304].includes(status) ? null : body, { status, statusText, headers });
}

/** `response` again, unless it answers a request of the hub's API and is not what the hub says there. */
async function understood(
  response: Response,
  { action, what, base, path }: { action: string; what: string; base: URL; path: string },
): Promise<Response> {
  const fits = ANSWERS.find(([asked]) => asked.test(path))?.[1];
  if (fits === undefined) return response;
  const text = await response.clone().text();
  let got = "other JSON than a hub's";
  try {
    const answer: unknown = JSON.parse(text);
    if ((isRecord(answer) || Array.isArray(answer)) && fits(answer as Answer)) return response;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    const type = response.headers.get("Content-Type")?.replace(/;.*/, "").trim() || "text";
    got = text.trim() === "" ? "nothing" : `${type.slice(0, 60)} that is no JSON`;
  }
  throw failed(
    `Cannot ${action}: ${base.origin} answered ${what} with ${got}: check the hub's address`,
    response.status,
  );
}

function isRecord(value: unknown): value is Answer {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether `value` is a list of objects that each have text under `names`. */
function isListOf(value: unknown, names: readonly string[]): boolean {
  return Array.isArray(value) &&
    value.every((item) => isRecord(item) && names.every((name) => typeof item[name] === "string"));
}

/** Seconds the server asks for, or undefined: `RateLimit: "api";r=0;t=55` or `Retry-After: 55` or a date, plus 1 s as huggingface_hub adds. */
function askedWait(headers: Headers): number | undefined {
  const window = /r=0;\s*t=(\d+)/.exec(headers.get("RateLimit") ?? "")?.[1];
  if (window !== undefined) return Number(window) + 1;
  const after = headers.get("Retry-After");
  if (after === null) return undefined;
  const seconds = /^\d+$/.test(after.trim()) ? Number(after) : (Date.parse(after) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) + 1 : undefined;
}

/** The error for an answer that is not going to get better. */
async function refusal(
  response: Response,
  { action, what, access, tries, from, stored }: {
    action: string;
    what: string;
    access: HubAccess;
    tries: number;
    from: string;
    stored: boolean;
  },
): Promise<HubApiError> {
  const { status, headers } = response;
  const said = saying(await response.text(), { headers, access });
  const code = headers.get("X-Error-Code");
  const to = `${status} to ${what}${tries > 1 ? `, ${tries} times` : ""}${said}`;
  const why = stored
    ? `the storage answered ${to}`
    : code === "GatedRepo"
    ? `the repository is gated (${to}): accept its terms on its page and set HF_TOKEN`
    : status === 401 && !access.token
    ? `the repository does not exist or is private (${to}): check the name or set HF_TOKEN`
    : status === 401
    ? `the hub does not accept the token (${to}): set HF_TOKEN to a valid one`
    : status === 403 && !access.token
    ? `the hub refuses access (${to}): set HF_TOKEN to a token that may do this`
    : status === 403
    ? `the token lacks permission (${to}): use a token that may do this, or a repository of your own`
    : code === "RevisionNotFound"
    ? `there is no such revision (${to})`
    : code === "RepoNotFound"
    ? `there is no such repository, or the token may not see it (${to})`
    : status === 404 && code === null
    ? `${from} answered ${to}: check the hub's address and the name of the repository`
    : `the hub answered ${to}`;
  return failed(`Cannot ${action}: ${why}`, status);
}

/** The server's own words, shortened to one line, with the token struck out should it echo it. */
function saying(text: string, { headers, access }: { headers: Headers; access: HubAccess }): string {
  let words = headers.get("X-Error-Message") ?? "";
  if (words === "" && headers.get("Content-Type")?.includes("json")) {
    try {
      const { error, message } = JSON.parse(text) as { error?: unknown; message?: unknown };
      words = String(error ?? message ?? "");
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
    }
  }
  if (access.token) words = words.replaceAll(access.token, "hf_***");
  words = words.replace(/\s+/g, " ").trim().slice(0, 300).replace(/\.$/, "");
  return words === "" ? "" : `: ${words}`;
}

function failed(message: string, status: number): HubApiError {
  return new HubApiError("", status, undefined, message);
}

/** Deno hides the useful half in `cause`; addresses are cut out because presigned ones carry a signature. */
function reason(error: unknown): string {
  const cause = error instanceof Error && error.cause instanceof Error ? error.cause : error;
  const text = cause instanceof Error ? cause.message : String(cause);
  return text.replace(/\s*(for url )?\(?https?:\/\/\S+/g, "").replace(/\s+/g, " ").trim();
}

/**
 * A file, or a part of one, as a Blob that is read when it is sent, so that a model of any size goes through in constant memory. It extends
 * Blob because the hub client and `fetch` ask for one.
 */
export class DiskBlob extends Blob {
  readonly path: string;
  readonly start: number;
  readonly isPart: boolean;
  readonly #end: number;
  readonly #onRead: ((done: number) => void) | undefined;

  constructor(
    path: string,
    { start, end, isPart = false, onRead }: {
      start: number;
      end: number;
      isPart?: boolean;
      onRead?: ((done: number) => void) | undefined;
    },
  ) {
    super([]);
    this.path = path;
    this.start = start;
    this.isPart = isPart;
    this.#end = end;
    this.#onRead = onRead;
  }

  override get size(): number {
    return this.#end - this.start;
  }

  /** Offsets count from the start of this part and must not be negative. */
  override slice(start = 0, end = this.size): DiskBlob {
    const at = (offset: number) => this.start + Math.min(this.size, offset);
    return new DiskBlob(this.path, { start: at(start), end: at(end), isPart: true });
  }

  /** The same bytes; `onRead` hears how many have been read so far, from 0 again in every stream. */
  watched(onRead: (done: number) => void): DiskBlob {
    const both = (done: number) => {
      this.#onRead?.(done);
      onRead(done);
    };
    return new DiskBlob(this.path, { start: this.start, end: this.#end, isPart: this.isPart, onRead: both });
  }

  override stream(): ReadableStream<Uint8Array<ArrayBuffer>> {
    let file: Deno.FsFile | undefined;
    let done = 0;
    return new ReadableStream({
      pull: async (controller) => {
        if (done === this.size) {
          file?.close();
          return controller.close();
        }
        if (file === undefined) {
          file = await Deno.open(this.path);
          await file.seek(this.start, Deno.SeekMode.Start);
        }
        const block = new Uint8Array(Math.min(this.size - done, 1 << 18));
        const read = await file.read(block);
        if (read === null) {
          file.close();
          return controller.error(new Error(`Cannot read "${this.path}": it became shorter while it was read`));
        }
        done += read;
        this.#onRead?.(done);
        controller.enqueue(block.subarray(0, read));
      },
      cancel: () => file?.close(),
    }, { highWaterMark: 0 });
  }

  override async arrayBuffer(): Promise<ArrayBuffer> {
    return await new Response(this.stream()).arrayBuffer();
  }
}
