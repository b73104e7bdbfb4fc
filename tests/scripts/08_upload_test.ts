/** 08 as a process against the loopback hub: dry run, upload, continuation, refusals; the token shows up nowhere. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { createHash } from "node:crypto";
import { temporaryFolder } from "../check.ts";
import { startHub } from "../hub/stand_in.ts";
import { command, ended, walk } from "./process.ts";

const TOKEN = "hf_" + "e".repeat(34);
const NAMES = ["--adapter-repo", "you/med-lora", "--merged-repo", "you/med", "--base-model", "you/base"];
type Hub = Awaited<ReturnType<typeof startHub>>;

interface Trial {
  readonly hub: Hub;
  readonly dir: string;
  /** Starts 08 in `dir`; with `--hub-url`, and with the token unless told otherwise. */
  readonly start: (args: string[], token?: string) => Deno.ChildProcess;
  /** The same to its end. */
  readonly run: (args: string[], token?: string) => Promise<{ code: number; out: string; err: string; last: string }>;
}

const settings = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  vocab_size: 64,
  hidden_size: 8,
  intermediate_size: 16,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  head_dim: 4,
  max_position_embeddings: 32,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  tie_word_embeddings: true,
  hidden_act: "silu",
  attention_bias: false,
  mlp_bias: false,
  bos_token_id: 0,
  eos_token_id: 0,
  pad_token_id: null,
  torch_dtype: "float32",
  dtype: "float32",
};
const lora = {
  base_model_name_or_path: "artifacts/01_convert",
  peft_type: "LORA",
  task_type: "CAUSAL_LM",
  r: 4,
  lora_alpha: 8,
  target_modules: ["q_proj", "v_proj"],
};

function write(path: string, content: unknown): { path: string; bytes: number; sha256: string; mtime: number } {
  Deno.mkdirSync(path.replace(/\/[^/]*$/, ""), { recursive: true });
  const data = content instanceof Uint8Array ? content : new TextEncoder().encode(JSON.stringify(content));
  Deno.writeFileSync(path, data);
  return { path, bytes: data.length, sha256: createHash("sha256").update(data).digest("hex"), mtime: 0 };
}

/** The folders of 03, 05, 06 and 07 in small, in a directory of their own. */
async function trial(body: (trial: Trial) => Promise<void>, options: { chunk?: number } = {}) {
  const hub = await startHub({ token: TOKEN, ...options });
  using folder = temporaryFolder();
  const dir = folder.path;
  const at = (path: string) => `${dir}/artifacts/${path}`;
  const manifest = { flags: {}, seconds: 1, device: null, reads: [], writes: [], numbers: {} };
  write(at("03_dataset/template.json"), {
    template: "Q {{ messages[-1].content }}\nA ",
    system: "",
    eos_token: "<|endoftext|>",
  });
  write(at("03_dataset/manifest.json"), { ...manifest, script: "03_dataset" });
  const trained = write(at("05_train/adapter/adapter_model.safetensors"), new Uint8Array(5000).fill(3));
  const record = { ...trained, path: "adapter/adapter_model.safetensors" };
  write(at("05_train/manifest.json"), {
    ...manifest,
    script: "05_train",
    writes: [record],
    numbers: { first_loss: 3.5, last_loss: 1.25 },
  });
  const other = { ...record, path: "artifacts/05_train/adapter/adapter_model.safetensors" };
  write(at("06_evaluate/manifest.json"), {
    ...manifest,
    script: "06_evaluate",
    reads: [{ ...other, sha256: "0" }],
    numbers: { perplexity: 77.5 },
  });
  write(at("07_merge/manifest.json"), { ...manifest, script: "07_merge", reads: [other] });
  write(at("07_merge/lora_adapters/adapter_config.json"), lora);
  write(at("07_merge/lora_adapters/adapter_model.safetensors"), new Uint8Array(5000).fill(3));
  write(at("07_merge/merged_model/config.json"), settings);
  write(at("07_merge/merged_model/tokenizer.json"), { version: "1.0" });
  write(at("07_merge/merged_model/model.safetensors"), Uint8Array.from({ length: 300_000 }, (_, i) => (i * i) >> 3));
  const start = (args: string[], token = TOKEN) =>
    command(dir, "08_upload", ["--hub-url", hub.url, ...args], { env: { HF_TOKEN: token } }).spawn();
  const run: Trial["run"] = async (args, token) => {
    const result = await ended(start(args, token));
    return { ...result, last: result.out.trimEnd().split("\n").at(-1)! };
  };
  const secret = new RegExp("hf_[a-f]{34}");
  try {
    await body({
      hub,
      dir,
      start,
      run: async (...call) => {
        const result = await run(...call);
        assert(!secret.test(result.out + result.err), "the token was printed");
        return result;
      },
    });
    for (const path of walk(dir)) assert(!secret.test(Deno.readTextFileSync(path)), `the token is in ${path}`);
    for (const { port, authorization } of hub.seen) if (port === "storage") assertEquals(authorization, undefined);
  } finally {
    await hub.close();
  }
}

function refused({ code, out, err: all }: { code: number; out: string; err: string }, message: RegExp): void {
  // The evaluation of this folder is of another adapter, which is told beforehand.
  const err = all.replace(/^Note: "artifacts\/06_evaluate" was made from another [^\n]+\n/, "");
  assertEquals(code, 1, out + err);
  assertMatch(err, message);
  assertMatch(err, /^Cannot [^\n]*[^.\n]\n$/);
}

Deno.test("without a flag 08 is a dry run on tiny: it lists the files, needs no token, asks nobody, and is up to date the second time", () =>
  trial(async ({ hub, dir, run }) => {
    const first = await run([], "");
    assertEquals(first.code, 0, first.err);
    assertMatch(first.out, /model\.safetensors +300 kB +[0-9a-f]{12} +lfs/);
    assertMatch(first.out, /tokenizer\.json +17 B +[0-9a-f]{12} +regular/);
    assertMatch(first.out, /a real upload needs --base-model/);
    const { numbers } = JSON.parse(first.last);
    assertEquals(numbers.dry_run, true);
    assertEquals(numbers.files, 7); // 2 and 3, and a card each
    assertEquals(JSON.parse(Deno.readTextFileSync(`${dir}/artifacts/08_upload/manifest.json`)), JSON.parse(first.last));
    assertEquals((await run([], "")).out, "08_upload is up to date (artifacts/08_upload)\n");
    assertEquals(hub.seen.length, 0);
  }));

Deno.test("08 uploads both repositories, verifies them, and sends nothing the second time", () =>
  trial(async ({ hub, dir, run }) => {
    const first = await run([...NAMES, "--dry-run", "false", "--private"]);
    assertEquals(first.code, 0, first.err);
    assertMatch(first.out, /Uploading as you\n/);
    assertEquals(first.out.match(/verified: size and sha256 of (\d) of \1 files/g)?.length, 2);
    assertEquals(hub.isPrivate("models/you/med"), true);
    const { numbers } = JSON.parse(first.last);
    for (const { repo, kind, files } of numbers.repositories) {
      const remote = hub.files(`models/${repo}`)!;
      assertEquals(files.length + 1, remote.size); // and .gitattributes
      for (const { path, bytes, sha256 } of files) {
        const there = remote.get(path)!.bytes;
        assertEquals([there.length, createHash("sha256").update(there).digest("hex")], [bytes, sha256], path);
      }
      const original = Deno.readFileSync(
        `${dir}/artifacts/07_merge/${kind}/${kind === "merged_model" ? "model" : "adapter_model"}.safetensors`,
      );
      const stored = remote.get(kind === "merged_model" ? "model.safetensors" : "adapter_model.safetensors")!.bytes;
      assertEquals(new Uint8Array(stored), original);
    }
    const adapter = hub.files("models/you/med-lora")!;
    assertEquals(JSON.parse(adapter.get("adapter_config.json")!.bytes.toString()), {
      ...lora,
      base_model_name_or_path: "you/base",
    });
    const card = hub.files("models/you/med")!.get("README.md")!.bytes.toString();
    assertStringIncludes(card, "| Training loss | 3.5 at the first update, 1.25 at the last |");
    assertStringIncludes(card, "Q {question}\nA ");
    assert(!card.includes("77.5"), "the evaluation of another adapter is in the card");
    assertStringIncludes(first.out, 'Left out of the cards: "artifacts/06_evaluate"');

    const commits = hub.commits("models/you/med");
    const second = await run([...NAMES, "--dry-run", "false", "--private"]);
    assertMatch(second.out, /0 files sent \(0 B\), 0 already stored and now committed, 4 already there/);
    assertEquals(JSON.parse(second.last).numbers.sent_bytes, 0);
    assertEquals(hub.commits("models/you/med"), commits);
  }));

Deno.test("08 cut off between the two repositories continues with what is missing", () =>
  trial(async ({ hub, dir, run }) => {
    hub.fail(/you\/med\/commit/, { status: 400, json: { error: "quota" } });
    refused(
      await run([...NAMES, "--dry-run", "false"]),
      /^Cannot upload to "you\/med": the hub answered 400 .*: quota\n/,
    );
    assert(!walk(dir).includes(`${dir}/artifacts/08_upload/manifest.json`), "an unfinished stage has a manifest");
    assertEquals(hub.commits("models/you/med"), 1);
    hub.seen.length = 0;
    const { code, out, err } = await run([...NAMES, "--dry-run", "false"]);
    assertEquals(code, 0, err);
    assertMatch(out, /0 files sent \(0 B\), 0 already stored and now committed, 3 already there/);
    assertMatch(out, /3 files sent \([^)]*\), 1 already stored and now committed, 0 already there/);
    assertEquals(hub.seen.some(({ line }) => line.startsWith("PUT")), false);
  }));

Deno.test("08 that fails or is killed keeps the earlier manifest, and the next start sends only what is missing", () =>
  trial(async ({ hub, dir, run, start }) => {
    const out = `${dir}/artifacts/08_upload`;
    const kept = () =>
      walk(out).filter((path) => !path.endsWith(".lock")).map((path) => [path, Deno.readTextFileSync(path)]);
    const real = [...NAMES, "--dry-run", "false"];
    assertEquals((await run([...NAMES, "--license", "mit"], "")).code, 0);
    const before = kept();
    hub.fail(/you\/med\/commit/, { status: 400, json: { error: "quota" } });
    refused(await run(real), /: quota\n/);
    assertEquals(kept(), before, "after an error what was there is there again");
    assertEquals(kept().length, 3 + 1); // two cards, the adapter's settings with the base's name, the manifest

    write(`${dir}/artifacts/07_merge/merged_model/more.safetensors`, new Uint8Array(70_000).fill(7));
    for (const [signal, on] of [["SIGKILL", /^PUT/], ["SIGTERM", /you\/med\/preupload/]] as const) {
      const stopped = Promise.withResolvers<void>();
      hub.fail(on, "silent", 1, stopped.resolve);
      const process = start(real);
      const ended = process.output();
      await Promise.race([
        stopped.promise,
        ended.then(({ stderr }) => assert(false, new TextDecoder().decode(stderr))),
      ]);
      process.kill(signal);
      await ended;
      assertEquals(JSON.parse(Deno.readTextFileSync(`${out}/.before/manifest.json`)).numbers.dry_run, true, signal);
    }
    const { code, err } = await run(real);
    assertEquals(code, 0, err);
    assertEquals(JSON.parse(Deno.readTextFileSync(`${out}/manifest.json`)).numbers.verified_files, 8);
    assert(!kept().some(([path]) => path!.includes(".before")), "what was set aside is gone");
    const puts = hub.seen.filter(({ line }) => line.startsWith("PUT")).map(({ line }) => line);
    assertEquals([puts.length, new Set(puts).size], [3, 3], "adapter, model and the later file once each");
    assertEquals([hub.commits("models/you/med-lora"), hub.commits("models/you/med")], [2, 2]);
  }));

Deno.test("08 in parts with a broken connection and a 503 says that it tries again, and succeeds", () =>
  trial(async ({ hub, run }) => {
    hub.fail(/^PUT \/part\/.*\/2$/, "drop");
    hub.fail(/batch/, { status: 503, headers: { "Retry-After": "0" } });
    const { code, out, err } = await run([...NAMES, "--dry-run", "false"]);
    assertEquals(code, 0, err);
    assertEquals(out.match(/trying again in 1 s \(1 of 5\)/g)?.length, 2);
    assertEquals(hub.files("models/you/med")!.get("model.safetensors")!.bytes.length, 300_000);
  }, { chunk: 100_000 }));

Deno.test("08 takes a folder of this machine for no name on the hub, whatever it looks like", () =>
  trial(async ({ dir, run }) => {
    const config = `${dir}/artifacts/07_merge/lora_adapters/adapter_config.json`;
    write(config, { ...lora, base_model_name_or_path: "mine/01_convert" });
    assert(!(await run(["--force"], "")).out.includes("which nobody else has"), "nothing tells it from a name");
    Deno.mkdirSync(`${dir}/mine/01_convert`, { recursive: true });
    assertMatch(
      (await run(["--force"], "")).out,
      /base is "mine\/01_convert", which nobody else has: a real upload needs/,
    );
    const card = Deno.readTextFileSync(`${dir}/artifacts/08_upload/lora_adapters/README.md`);
    assert(!card.includes("mine/01_convert"), card);
  }));

Deno.test("what 08 refuses is one sentence, and nothing is asked or written before", () =>
  trial(async ({ hub, dir, run }) => {
    const real = [...NAMES, "--dry-run", "false"];
    refused(await run(real, ""), /HF_TOKEN is not set/);
    refused(await run(real, "not a token"), /^Cannot use HF_TOKEN: its value is no access token/);
    refused(await run([...real, "--merged-repo", "you/a--b"]), /^Cannot upload to "you\/a--b": it must not hold/);
    refused(await run([...real, "--merged-repo", "med"]), /it must be owner\/name/);
    refused(await run([...real, "--merged-repo", "You/Med-LoRA"]), /need a repository each/);
    refused(await run([...real, "--license", "Apache 2.0"]), /^Cannot use license "Apache 2.0": one of the hub's/);
    refused(await run(["--dry-run", "false"]), /"you\/medslm-tiny-lora": it is only an example/);
    refused(await run([...real, "--hub-url", "http://example.org"]), /http is not encrypted/);
    refused(await run([...real, "--merge", "artifacts/nothing"]), /^Cannot read "artifacts\/nothing/);
    await run([], "");
    const dry = Deno.readTextFileSync(`${dir}/artifacts/08_upload/manifest.json`);
    refused(await run([...real, "--base-model", ""]), /its base is "artifacts\/01_convert", which nobody else has/);
    assertEquals(Deno.readTextFileSync(`${dir}/artifacts/08_upload/manifest.json`), dry, "a mistake costs the dry run");
    Deno.removeSync(`${dir}/artifacts/08_upload`, { recursive: true });
    const asked = hub.seen.filter(({ line }) => line !== "GET /api/whoami-v2");
    assertEquals(asked.length, 0);
    refused(await run(real, "hf_" + "f".repeat(34)), /^Cannot upload: the hub does not accept the token \(401/);
    refused(
      await run([...real, "--merged-repo", "they/med", "--adapter-repo", ""]),
      /lacks permission \(403 .*No rights in the namespace "they"/,
    );
    hub.fail(/whoami/, { status: 200, headers: { "Content-Type": "text/html" }, text: "<html>" });
    refused(
      await run(real),
      /^Cannot upload: http:\S+ answered GET \/api\/whoami-v2 with text\/html that is no JSON: check/,
    );
    assertEquals(hub.files("models/you/med"), undefined);
    assertEquals(walk(dir).filter((path) => path.endsWith("08_upload/manifest.json")), []);
  }));
