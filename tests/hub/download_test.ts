/** Downloads from the loopback hub: resumed, verified, cached by commit, and the token shown to nobody else. */
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { type FetchOptions, fetchRepo, parseSpec } from "../../lib/hub/download.ts";
import { NO_HUB, startHub } from "./stand_in.ts";
import { temporaryFolder } from "../check.ts";

const TOKEN = "hf_" + "c".repeat(34);
const KEY = "models/you/base";
const WEIGHTS = Uint8Array.from({ length: 700_003 }, (_, i) => Math.imul(i, 2654435761) >>> 24);
const FILES = {
  "config.json": '{"dim": 1024}\n',
  "model.safetensors": WEIGHTS,
  "tokenizer/vocab.json": "{}",
  "tokenizer/añ o.txt": "ä",
  "empty.txt": "",
};
type Hub = Awaited<ReturnType<typeof startHub>>;

interface Trial {
  readonly hub: Hub;
  readonly cacheDir: string;
  readonly commit: string;
  readonly notes: string[];
  readonly get: (spec?: string, options?: FetchOptions) => ReturnType<typeof fetchRepo>;
}

async function trial(body: (trial: Trial) => Promise<void>) {
  const hub = await startHub({ token: TOKEN });
  using folder = temporaryFolder();
  const cacheDir = folder.path;
  const commit = hub.seed(KEY, FILES, { isPrivate: true });
  const notes: string[] = [];
  const defaults: FetchOptions = {
    hubUrl: hub.url,
    cacheDir,
    token: TOKEN,
    idleMs: 300,
    wait: () => Promise.resolve(),
    onRetry: (line) => void notes.push(line),
  };
  try {
    await body({
      hub,
      cacheDir,
      commit,
      notes,
      get: (spec = "hf:you/base", o = {}) => fetchRepo(spec, { ...defaults, ...o }),
    });
    for (const { port, authorization, line } of hub.seen) {
      if (port === "storage") assertEquals(authorization, undefined, `${line} showed the token to the storage`);
    }
  } finally {
    await hub.close();
  }
}

/** Every file below `dir`, relative, sorted. */
function names(dir: string, prefix = ""): string[] {
  return [...Deno.readDirSync(dir)].flatMap(({ name, isDirectory }) =>
    isDirectory ? names(`${dir}/${name}`, `${prefix}${name}/`) : [prefix + name]
  ).sort();
}

const ranges = (hub: Hub) => hub.seen.filter(({ line }) => line.startsWith("GET /blob")).map(({ range }) => range);

Deno.test("parseSpec() reads models, datasets and revisions, and refuses what the hub would refuse", () => {
  assertEquals(parseSpec("hf:you/base"), { type: "model", name: "you/base", revision: "main" });
  assertEquals(parseSpec("hf:gpt2@v1.0"), { type: "model", name: "gpt2", revision: "v1.0" });
  assertEquals(parseSpec("hf:you/set", { type: "dataset" }), { type: "dataset", name: "you/set", revision: "main" });
  assertEquals(parseSpec("hf:datasets/you/set@refs/pr/1"), { type: "dataset", name: "you/set", revision: "refs/pr/1" });
  assertEquals(parseSpec("hf:models/you/x", { type: "dataset" }).type, "model");
  for (const spec of ["you/base", "hf:", "hf:a/b/c", "hf:a--b", "hf:a/b@", "hf:a/b@../c", "hf:a/b@x y", "hf:a/b@-x"]) {
    assertThrows(() => parseSpec(spec), RangeError, "Cannot download");
  }
});

Deno.test("fetchRepo() brings every file of a private repository, from the storage without the token", () =>
  trial(async ({ hub, get, cacheDir, commit }) => {
    const seen: number[] = [];
    const repo = await get("hf:you/base", {
      onProgress: ({ path, done }) => void (path.startsWith("model") && seen.push(done)),
    });
    assertEquals(repo.commit, commit);
    assertEquals(repo.dir, `${cacheDir}/models--you--base/${commit}`);
    assertEquals(names(repo.dir), Object.keys(FILES).sort());
    assertEquals(Deno.readFileSync(`${repo.dir}/model.safetensors`), WEIGHTS);
    assertEquals(Deno.readTextFileSync(`${repo.dir}/tokenizer/añ o.txt`), "ä");
    assertEquals(seen.at(-1), WEIGHTS.length);
    assertEquals(hub.seen.filter(({ port }) => port === "storage").length, 1);
    assert(
      hub.seen.filter(({ port }) => port === "hub").every(({ authorization }) => authorization === `Bearer ${TOKEN}`),
    );
  }));

Deno.test("fetchRepo() fetches nothing twice, and again what was altered on disk", () =>
  trial(async ({ hub, get }) => {
    const { dir } = await get();
    hub.seen.length = 0;
    assert((await get()).files.every(({ fetched }) => !fetched));
    assertEquals(hub.seen.some(({ line }) => line.includes("/resolve/")), false);
    const altered = WEIGHTS.slice();
    altered[5]! ^= 1;
    Deno.writeFileSync(`${dir}/model.safetensors`, altered);
    assertEquals((await get()).files.filter(({ fetched }) => fetched).map(({ path }) => path), ["model.safetensors"]);
    assertEquals(Deno.readFileSync(`${dir}/model.safetensors`), WEIGHTS);
  }));

Deno.test("a new commit gets a folder of its own, and the old one stays reachable by its name", () =>
  trial(async ({ hub, get, commit }) => {
    const before = await get();
    const next = hub.seed(KEY, { "config.json": "{}" });
    const after = await get();
    assertEquals(after.commit, next);
    assertEquals(Deno.readTextFileSync(`${after.dir}/config.json`), "{}");
    assertEquals(Deno.readTextFileSync(`${before.dir}/config.json`), FILES["config.json"]);
    assertEquals((await get(`hf:you/base@${commit}`)).dir, before.dir);
  }));

Deno.test("files chooses by name and by pattern; a name that is not there is an error that lists what is", () =>
  trial(async ({ get }) => {
    const { dir } = await get("hf:you/base", { files: ["config.json", "tokenizer/*", "*.bin"] });
    assertEquals(names(dir), ["config.json", "tokenizer/añ o.txt", "tokenizer/vocab.json"]);
    assertEquals((await get("hf:you/base", { files: ["**.json"] })).files.length, 2);
    assertEquals((await get("hf:you/base", { files: ["*.json"] })).files.length, 1);
    const error = await assertRejects(() => get("hf:you/base", { files: ["pytorch_model.bin"] }), Error);
    assertMatch(
      error.message,
      /^Cannot download "pytorch_model.bin" of "hf:you\/base": the repository has config.json, /,
    );
  }));

Deno.test("datasets have their own addresses", () =>
  trial(async ({ hub, get }) => {
    hub.seed("datasets/you/qa", { "data/train.parquet": "PAR1" });
    const repo = await get("hf:you/qa", { type: "dataset" });
    assertEquals(Deno.readTextFileSync(`${repo.dir}/data/train.parquet`), "PAR1");
    assertEquals((await get("hf:datasets/you/qa")).dir, repo.dir);
    assertMatch(repo.dir, /datasets--you--qa/);
  }));

Deno.test("a connection that breaks or falls silent half way is taken up where it stopped", async (t) => {
  for (const fault of ["half", "stall"] as const) {
    await t.step(fault, () =>
      trial(async ({ hub, get, notes }) => {
        hub.fail(/^GET \/blob/, fault, 2);
        const { dir } = await get();
        assertEquals(Deno.readFileSync(`${dir}/model.safetensors`), WEIGHTS);
        assertEquals(names(dir), Object.keys(FILES).sort());
        const starts = ranges(hub).map((range) => Number(/\d+/.exec(range ?? "bytes=0-")![0]));
        assertEquals(starts.length, 3);
        assert(starts[0] === 0 && starts[1]! > 0 && starts[2]! > starts[1]!, `${starts}`);
        assertEquals(notes.length, 2);
      }));
  }
});

Deno.test("a run that was killed leaves a part, and the next run continues it", () =>
  trial(async ({ hub, get, cacheDir, commit }) => {
    const dir = `${cacheDir}/models--you--base/${commit}`;
    Deno.mkdirSync(dir, { recursive: true });
    Deno.writeFileSync(`${dir}/model.safetensors.part`, WEIGHTS.subarray(0, 123_456));
    await get();
    assertEquals(ranges(hub), ["bytes=123456-"]);
    assertEquals(Deno.readFileSync(`${dir}/model.safetensors`), WEIGHTS);
  }));

Deno.test("a server without Range starts the file again and loses nothing", () =>
  trial(async ({ hub, get, cacheDir, commit }) => {
    const dir = `${cacheDir}/models--you--base/${commit}`;
    Deno.mkdirSync(dir, { recursive: true });
    Deno.writeFileSync(`${dir}/model.safetensors.part`, WEIGHTS.subarray(0, 123_456));
    hub.fail(/^GET \/blob/, "ignore range");
    await get();
    assertEquals(Deno.readFileSync(`${dir}/model.safetensors`), WEIGHTS);
  }));

Deno.test("a part with wrong bytes is thrown away and fetched from its start; twice wrong is an error with nothing kept", () =>
  trial(async ({ hub, get, cacheDir, commit, notes }) => {
    const dir = `${cacheDir}/models--you--base/${commit}`;
    Deno.mkdirSync(dir, { recursive: true });
    Deno.writeFileSync(`${dir}/model.safetensors.part`, new Uint8Array(1000));
    await get("hf:you/base", { files: ["model.safetensors"] });
    assertEquals(Deno.readFileSync(`${dir}/model.safetensors`), WEIGHTS);
    assertMatch(notes.join(), /wrong hash/);
    hub.fail(/^GET .*config.json/, "wrong bytes", 2);
    const error = await assertRejects(() => get("hf:you/base", { files: ["config.json"] }), Error);
    assertMatch(
      error.message,
      /^Cannot download "config.json" of "hf:you\/base": its bytes have the hash [0-9a-f]{40} and the hub says [0-9a-f]{40}: nothing was kept$/,
    );
    assertEquals(names(dir), ["model.safetensors"]);
  }));

Deno.test("503 twice and 429 are waited out", () =>
  trial(async ({ hub, get, notes }) => {
    hub.fail(/resolve.*model/, { status: 503 }, 2);
    hub.fail(/^GET \/blob/, { status: 429, headers: { "Retry-After": "1" } });
    hub.fail(/tree/, { status: 502 });
    await get();
    assertEquals(notes.length, 4);
  }));

Deno.test("what is not there or not allowed is one sentence", () =>
  trial(async ({ hub, get }) => {
    hub.seed("models/you/gated", { "a.txt": "a" });
    hub.fail(/gated/, {
      status: 403,
      headers: { "X-Error-Code": "GatedRepo" },
      json: { error: "Access is restricted" },
    });
    const cases: [string, FetchOptions, RegExp][] = [
      [
        "hf:you/nothing",
        {},
        /there is no such repository, or the token may not see it \(404 .*: Repository not found\)$/,
      ],
      ["hf:you/base@v9", {}, /there is no such revision \(404 /],
      ["hf:you/base", { token: "" }, /does not exist or is private \(401 .*\): check the name or set HF_TOKEN$/],
      ["hf:you/base", { token: "hf_" + "d".repeat(34) }, /does not accept the token \(401 /],
      ["hf:you/gated", {}, /the repository is gated \(403 .*: Access is restricted\): accept its terms/],
    ];
    for (const [spec, options, message] of cases) {
      const error = await assertRejects(() => get(spec, options), Error);
      assertMatch(error.message, message);
      assertMatch(error.message, /^Cannot download "hf:[^\n]*[^.\n]$/);
    }
  }));

Deno.test("an address where no hub answers is told as such", () =>
  trial(async ({ hub, get, cacheDir }) => {
    for (const [fault, message] of NO_HUB) {
      for (const on of [/revision/, /tree/]) {
        hub.fail(on, fault);
        const error = await assertRejects(() => get(), Error);
        assertMatch(error.message, message);
        assertMatch(error.message, /^Cannot download "hf:[^\n]*: check the hub's address( and [^\n]*)?$/);
      }
    }
    hub.fail(/revision/, { status: 403, text: "" });
    const error = await assertRejects(() => get("hf:you/base", { token: "" }), Error);
    assertMatch(error.message, /: the hub refuses access \(403 to [^\n]*\): set HF_TOKEN to a token that may do this$/);
    assertEquals(names(cacheDir), []);
  }));

Deno.test("a path that would leave the folder is refused before anything is written", () =>
  trial(async ({ hub, get, cacheDir }) => {
    for (const path of ["../evil", "a/../../evil", "/evil", "a\\..\\evil", "c:evil"]) {
      hub.seed("models/you/evil", { [path]: "x" });
      await assertRejects(() => get("hf:you/evil"), Error, "leaves its folder");
    }
    assertEquals(names(cacheDir), []);
  }));
