/** Uploads against the loopback hub: each fault ends in a verified repository or in one sentence with no half-made commit. */
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { createHash } from "node:crypto";
import { checkRepoId, type HubAccess, hubBase } from "../../lib/hub/retry.ts";
import { accountName, likelyMode, listLocal, uploadFolder, type UploadOptions } from "../../lib/hub/upload.ts";
import { type Fault, NO_HUB, startHub } from "./stand_in.ts";
import { temporaryFolder } from "../check.ts";

const TOKEN = "hf_" + "a".repeat(34);
const ID = "you/medslm";
const KEY = "models/you/medslm";
type Hub = Awaited<ReturnType<typeof startHub>>;

const random = (bytes: number, seed: number) =>
  Uint8Array.from({ length: bytes }, (_, i) => Math.imul(i + seed, 2654435761) >>> 24);
const sha256 = (data: Uint8Array) => createHash("sha256").update(data).digest("hex");

/** A folder like 07's: a large file, small ones, an empty one, one in a folder, and names that must stay out. */
const FILES = {
  "model.safetensors": random(900_001, 1),
  "config.json": '{\n  "vocab_size": 50257\n}\n',
  "tokenizer/merges.txt": "é ü\n",
  "empty.txt": "",
  "manifest.json": "{}",
  ".DS_Store": "x",
};

interface Trial {
  readonly hub: Hub;
  readonly dir: string;
  readonly waits: number[];
  readonly notes: string[];
  readonly upload: (options?: Partial<UploadOptions> & { token?: string }) => ReturnType<typeof uploadFolder>;
}

/** Runs `body` with a fresh hub and folder, and checks that the token went to the hub's own port and nowhere else. */
async function trial(
  { chunk, idleMs = 20_000 }: { chunk?: number; idleMs?: number },
  body: (trial: Trial) => Promise<void>,
) {
  const hub = await startHub({ token: TOKEN, ...(chunk ? { chunk } : {}) });
  using folder = temporaryFolder(FILES);
  const dir = folder.path;
  const waits: number[] = [];
  const notes: string[] = [];
  const access: HubAccess = {
    hubUrl: hub.url,
    token: TOKEN,
    idleMs,
    onRetry: (line) => void notes.push(line),
    wait: (ms) => Promise.resolve(void waits.push(ms)),
  };
  try {
    const upload: Trial["upload"] = async ({ token = TOKEN, ...options } = {}) =>
      uploadFolder(await listLocal(dir), {
        repo: ID,
        access: { ...access, token },
        isPrivate: false,
        title: "Upload",
        ...options,
      });
    await body({ hub, dir, waits, notes, upload });
    for (const { port, authorization } of hub.seen) {
      if (port === "storage") assertEquals(authorization, undefined, "the storage saw the token");
    }
    assert(!notes.join().includes(TOKEN));
  } finally {
    await hub.close();
  }
}

async function assertSame(hub: Hub, dir: string): Promise<void> {
  const files = await listLocal(dir);
  const remote = hub.files(KEY)!;
  assertEquals([...remote.keys()].sort(), [".gitattributes", ...files.map(({ path }) => path)].sort());
  for (const { path, sha256: local } of files) assertEquals(sha256(remote.get(path)!.bytes), local, path);
}

async function refused(run: () => Promise<unknown>, message: RegExp): Promise<void> {
  const error = await assertRejects(run, Error);
  assertMatch(error.message, message);
  assertMatch(error.message, /^Cannot [^\n]*[^.\n]$/);
  assert(!error.message.includes(TOKEN) && !error.message.includes("sig="), error.message);
}

Deno.test("uploadFolder() makes the repository, sends every file once and verifies them", () =>
  trial({}, async ({ hub, dir, upload }) => {
    const steps: number[] = [];
    const result = await upload({ isPrivate: true, onProgress: ({ done }) => void steps.push(done) });
    await assertSame(hub, dir);
    assertEquals(result.created, true);
    assertEquals(hub.isPrivate(KEY), true);
    assertEquals(result.files.map(({ path, mode, state }) => `${path} ${mode} ${state}`), [
      "config.json regular sent",
      "empty.txt regular sent",
      "model.safetensors lfs sent",
      "tokenizer/merges.txt regular sent",
    ]);
    assertEquals(steps.at(-1), 900_001);
    assertEquals(hub.seen.filter(({ line }) => line.includes("/commit/")).length, 1);
  }));

Deno.test("uploadFolder() sends nothing when the repository has the same bytes, and keeps files it does not know", () =>
  trial({}, async ({ hub, dir, upload }) => {
    const first = await upload();
    hub.seed(KEY, { "theirs.md": "kept" });
    hub.seen.length = 0;
    const second = await upload();
    assertEquals(second.created, false);
    assertEquals(second.files.every(({ state }) => state === "present"), true);
    assertEquals(second.others, ["theirs.md"]);
    assertEquals(hub.seen.some(({ line }) => /PUT|preupload|commit\/|batch/.test(line)), false);
    await Deno.writeTextFile(`${dir}/config.json`, "{}");
    const third = await upload();
    assertEquals(third.files.filter(({ state }) => state === "sent").map(({ path }) => path), ["config.json"]);
    assert(third.commit !== first.commit);
    assertEquals(hub.files(KEY)!.get("theirs.md")!.bytes.toString(), "kept");
  }));

Deno.test("uploadFolder() sends a large file in parts, each of them again when its connection breaks", () =>
  trial({ chunk: 100_000 }, async ({ hub, dir, upload, notes }) => {
    hub.fail(/^PUT \/part\/.*\/4$/, "drop", 2);
    hub.fail(/^PUT \/part\/.*\/10$/, { status: 500 });
    const steps: number[] = [];
    await upload({ onProgress: ({ done }) => void steps.push(done) });
    await assertSame(hub, dir);
    assertEquals(steps.at(-1), 900_001);
    assertEquals(notes.length, 3);
    assertEquals(hub.seen.filter(({ line }) => line.startsWith("PUT /part/")).length, 10 + 3);
  }));

Deno.test("an upload that was cut off continues: bytes that are stored are committed without being sent again", () =>
  trial({}, async ({ hub, dir, upload }) => {
    hub.fail(/commit\/main$/, { status: 400, json: { error: "switched off" } });
    await refused(() => upload(), /answered 400 to POST .*: switched off$/);
    assertEquals(hub.commits(KEY), 1);
    hub.seen.length = 0;
    const result = await upload();
    assertEquals(result.files.find(({ mode }) => mode === "lfs")!.state, "stored");
    assertEquals(hub.seen.some(({ line }) => line.startsWith("PUT")), false);
    await assertSame(hub, dir);
  }));

Deno.test("a connection that breaks while a file goes up is tried again", () =>
  trial({}, async ({ hub, dir, upload, waits }) => {
    hub.fail(/^PUT/, "drop");
    await upload();
    await assertSame(hub, dir);
    assertEquals(waits, [1000]);
  }));

Deno.test("a hub that falls silent is asked again", () =>
  trial({ idleMs: 200 }, async ({ hub, dir, upload, notes }) => {
    hub.fail(/^GET .*tree/, "silent");
    hub.fail(/^PUT/, "silent");
    await upload();
    await assertSame(hub, dir);
    assertEquals(notes.length, 2);
    assertMatch(notes.join(), /silent for 0.2 s/);
  }));

Deno.test("503 twice, then success: waits of 1 and 2 s", () =>
  trial({}, async ({ hub, dir, upload, waits }) => {
    hub.fail(/preupload/, { status: 503 }, 2);
    await upload();
    await assertSame(hub, dir);
    assertEquals(waits, [1000, 2000]);
  }));

Deno.test("429 waits as long as Retry-After or RateLimit say, and a second more, for commits too", () =>
  trial({}, async ({ hub, dir, upload, waits }) => {
    hub.fail(/create/, { status: 429, headers: { "Retry-After": "7" } });
    hub.fail(/preupload/, { status: 429, headers: { RateLimit: '"api";r=0;t=55' } });
    hub.fail(/commit\/main/, { status: 429, headers: { "Retry-After": new Date(Date.now() + 5000).toUTCString() } });
    await upload();
    await assertSame(hub, dir);
    assertEquals(waits.slice(0, 2), [8000, 56_000]);
    assert(waits[2]! >= 4000 && waits[2]! <= 7000, `${waits}`);
    hub.fail(/create/, { status: 429, headers: { "Retry-After": "86400" } });
    await refused(() => upload(), /answered 429 to POST .* asks to wait 86401 s: try again later$/);
  }));

Deno.test("a server that stays down ends after six tries in one sentence", () =>
  trial({}, async ({ hub, upload, waits }) => {
    hub.fail(/batch$/, { status: 503, json: { error: "down for maintenance" } }, 100);
    await refused(
      () => upload(),
      /^Cannot upload to "you\/medslm": the hub answered 503 to .*, 6 times: down for maintenance$/,
    );
    assertEquals(waits, [1000, 2000, 4000, 8000, 8000]);
    assertEquals(hub.commits(KEY), 1);
  }));

Deno.test("an answer lost after the commit landed does not make a second commit", () =>
  trial({}, async ({ hub, dir, upload, notes }) => {
    hub.fail(/commit\/main$/, "drop the answer");
    const result = await upload();
    await assertSame(hub, dir);
    assertEquals(hub.commits(KEY), 2); // the empty repository's, and ours
    assertEquals(result.files.filter(({ state }) => state === "present"), []);
    assertEquals(notes.length, 1);
  }));

Deno.test("a commit that fails with 500 is made again only after a look at the repository", () =>
  trial({}, async ({ hub, dir, upload }) => {
    hub.fail(/commit\/main$/, { status: 500 });
    await upload();
    await assertSame(hub, dir);
    const after = hub.seen.slice(hub.seen.findIndex(({ status }) => status === 500) + 1).map(({ line }) => line);
    assertMatch(after[0]!, /^GET .*\/revision\/main$/);
    assertMatch(after[1]!, /^GET .*\/tree\//);
    assertEquals(hub.commits(KEY), 2);
  }));

Deno.test("412: a commit on a stale parent is made again on the new one, keeping the other's file", () =>
  trial({}, async ({ hub, upload }) => {
    hub.fail(/commit\/main$/, "someone else commits");
    const result = await upload();
    assertEquals(result.others, ["theirs.txt"]);
    assertEquals(hub.files(KEY)!.has("model.safetensors"), true);
    assertEquals(result.files.every(({ state }) => state === "sent"), true);
  }));

Deno.test("412 again and again ends in one sentence and leaves the others' commits alone", () =>
  trial({}, async ({ hub, upload, waits }) => {
    hub.fail(/commit\/main$/, "someone else commits", 100);
    await refused(() => upload(), /answered 412 to POST .*A commit has happened since/);
    assertEquals(waits, [1000, 2000, 4000]);
    assertEquals(hub.files(KEY)!.has("model.safetensors"), false);
  }));

Deno.test("refusals of the hub are one sentence each, and nothing is committed", async (t) => {
  const cases: [name: string, on: RegExp, fault: Fault, message: RegExp, chunk?: number][] = [
    [
      "401",
      /create/,
      { status: 401, json: { error: "Invalid" } },
      /the hub does not accept the token \(401 to POST .*: Invalid\): set HF_TOKEN/,
    ],
    [
      "403",
      /preupload/,
      { status: 403, json: { error: "read-only token" } },
      /the token lacks permission \(403 .*: read-only token\)/,
    ],
    ["missing ETag", /PUT .*\/3$/, "no etag", /^Cannot upload ".*model.safetensors" .*without an ETag$/, 100_000],
    [
      "wrong part count",
      /batch/,
      "wrong part count",
      /gives 11 addresses for 900001 bytes in parts of 100000$/,
      100_000,
    ],
    [
      "batch object error",
      /batch/,
      "object error",
      /^Cannot upload "model.safetensors" .*too large for this account \(422\)$/,
    ],
    ["token echoed", /preupload/, { status: 400, json: { error: `no: ${TOKEN}` } }, /answered 400 .*: no: hf_\*\*\*$/],
    ["storage refuses", /^PUT/, { status: 413 }, /the storage answered 413 to PUT/],
  ];
  for (const [name, on, fault, message, chunk] of cases) {
    await t.step(name, () =>
      trial(chunk ? { chunk } : {}, async ({ hub, upload }) => {
        hub.fail(on, fault);
        await refused(() => upload(), message);
        assert(hub.commits(KEY) <= 1);
      }));
  }
});

Deno.test("an address where no hub answers is told as such, whatever is asked, and the token is not blamed", () =>
  trial({}, async ({ hub, upload, waits }) => {
    const access = { hubUrl: hub.url, token: TOKEN, wait: (ms: number) => Promise.resolve(void waits.push(ms)) };
    for (const [fault, message] of NO_HUB) {
      for (const on of ["whoami", "create", "revision", "tree", "preupload", "batch", "commit/main"]) {
        hub.fail(new RegExp(on), fault);
        const run = () => on === "whoami" ? accountName(access) : upload();
        await refused(run, message);
      }
    }
    assertEquals(hub.commits(KEY), 1);
    assertEquals(waits, []);
    await hub.close();
    const gone =
      /^Cannot upload: no answer from 127\.0\.0\.1:\d+ to GET \/api\/whoami-v2 \(.*\) after 6 tries: check the hub's address/;
    await refused(() => accountName(access), gone);
  }));

Deno.test("a small file whose download breaks off while it is verified is asked for again", () =>
  trial({}, async ({ hub, upload, notes }) => {
    hub.fail(/^GET .*config.json$/, "half");
    await upload();
    assertEquals(notes.length, 1);
  }));

Deno.test("an address to upload to that is none is told", () =>
  trial({}, async ({ hub, upload }) => {
    const oid = sha256(random(900_001, 1));
    const upload_to = { oid, size: 900_001, actions: { upload: { href: "not an address" } } };
    hub.fail(/batch/, { status: 200, json: { transfer: "basic", objects: [upload_to] } });
    await refused(() => upload(), /the hub names an address that is none/);
  }));

Deno.test("an object error beside a good object does not leave the upload waiting", () =>
  trial({}, async ({ hub, dir, upload }) => {
    await Deno.writeFile(`${dir}/zz.safetensors`, random(1000, 5));
    hub.fail(/batch/, "object error");
    await refused(() => upload(), /^Cannot upload "zz.safetensors" .*too large/);
  }));

Deno.test("an upload address that ran out is asked for again", () =>
  trial({}, async ({ hub, dir, upload }) => {
    hub.fail(/^PUT/, { status: 403, json: { error: "Request has expired" } });
    await upload();
    await assertSame(hub, dir);
  }));

Deno.test("bytes that arrive changed are noticed: by the tree for LFS files, by download for the others", () =>
  trial({}, async ({ hub, upload }) => {
    await upload();
    hub.fail(/^GET .*config.json$/, "wrong bytes", 9);
    await refused(
      () => upload(),
      /^Cannot verify "config.json" in "you\/medslm": the hub returns sha256 [0-9a-f]{64}, the file here has/,
    );
    hub.seed(KEY, { "model.safetensors": random(900_001, 2) });
    hub.fail(/commit\/main$/, { status: 200, json: { commitOid: "main", commitUrl: "" } });
    await refused(
      () => upload(),
      /^Cannot verify "model.safetensors" in .*: after the commit the hub lists 900001 bytes with hash/,
    );
  }));

Deno.test("a public repository is not filled when --private was asked", () =>
  trial({}, async ({ hub, upload }) => {
    hub.seed(KEY, { "a.txt": "a" });
    await refused(() => upload({ isPrivate: true }), /it exists and is public/);
    assertEquals(hub.commits(KEY), 1);
  }));

Deno.test("tokens: a wrong one, one of another owner, none", () =>
  trial({}, async ({ hub, upload }) => {
    assertEquals(await accountName({ hubUrl: hub.url, token: TOKEN }), "you");
    const wrong = "hf_" + "b".repeat(34);
    await refused(
      () => accountName({ hubUrl: hub.url, token: wrong }),
      /^Cannot upload: the hub does not accept the token \(401 /,
    );
    await refused(() => upload({ repo: "they/medslm" }), /403 .*No rights in the namespace "they"/);
    const before = hub.seen.length;
    await refused(() => upload({ token: "" }), /^Cannot upload: HF_TOKEN is not set: /);
    assertEquals(hub.seen.length, before);
  }));

Deno.test("a repository id that breaks a rule is refused before any request", () =>
  trial({}, async ({ hub, upload }) => {
    const long = "a".repeat(97);
    const bad = ["", "name", "a/b/c", "a//b", "-a/b", "a/b-", "a/.b", "a/b.", "a/b--c", "a/b..c", "a/b.git", "ä/b"];
    for (const id of [...bad, "a b/c", `a/${long}`, `${long}/b`]) {
      await refused(() => upload({ repo: id }), /^Cannot upload to ".*": /);
    }
    for (const id of ["a/b", "Saminx22/MedSLM-SFT-LoRA", "a_b/c.d", `${"a".repeat(96)}/b`]) {
      assertEquals(checkRepoId(id), id);
    }
    assertEquals(checkRepoId("gpt2", { bare: true }), "gpt2");
    assertEquals(hub.seen.length, 0);
  }));

Deno.test("the token is not sent over http to another machine", () => {
  assertThrows(() => hubBase({ hubUrl: "http://example.org", token: TOKEN }), RangeError, "use https");
  assertThrows(() => hubBase({ hubUrl: "example.org" }), RangeError, "https://");
  assertEquals(hubBase({ hubUrl: "https://example.org/" }), "https://example.org");
  assertEquals(hubBase({}), "https://huggingface.co");
});

Deno.test("likelyMode() says LFS for weights and above 10 MB, never for an empty file", () => {
  assertEquals(likelyMode({ path: "a.safetensors", bytes: 8 }), "lfs");
  assertEquals(likelyMode({ path: "a.safetensors", bytes: 0 }), "regular");
  assertEquals(likelyMode({ path: "a.json", bytes: 10_000_001 }), "lfs");
  assertEquals(likelyMode({ path: "a.json", bytes: 10_000_000 }), "regular");
});
