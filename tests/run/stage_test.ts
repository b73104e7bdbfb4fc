/**
 * Tests of stages as processes: when they run, when they are up to date, what they write down, and what a second process,
 * a killed one or a foreign folder does to them. The stage copies its input in capitals.
 */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { createHash } from "node:crypto";
import { type Manifest, readManifest } from "../../lib/run/manifest.ts";
import { checkInput } from "../../lib/run/stage.ts";
import { temporaryFolder } from "../check.ts";
import { command, ended, walk } from "../scripts/process.ts";

const LIB = new URL("../../lib/run/", import.meta.url).href;
const SCRIPT = `/** A stage. */
import { flags } from "${LIB}flags.ts";
import { beginStage } from "${LIB}stage.ts";
const opt = flags(import.meta, { source: "in", factor: 2, wait: false, bad: false, reuse: false, refuse: false, saves: true, name: "09_copy" });
const stage = await beginStage(opt.name, opt, { reads: [opt.source, "", "hf:owner/name"] });
if (opt.refuse) throw new RangeError("Cannot use this input: it is bad");
stage.clear({ keep: opt.reuse });
console.log("working");
for (const { name } of [...Deno.readDirSync(opt.source)].filter((entry) => entry.name.endsWith(".txt"))) {
  Deno.writeTextFileSync(stage.out + "/" + name, Deno.readTextFileSync(opt.source + "/" + name).toUpperCase());
}
Deno.mkdirSync(stage.out + "/deep/er", { recursive: true });
Deno.writeTextFileSync(stage.out + "/deep/er/last", "x");
if (opt.saves) {
  Deno.mkdirSync(stage.out + "/checkpoints", { recursive: true });
  Deno.writeTextFileSync(stage.out + "/checkpoints/step", "not recorded");
}
if (opt.wait) await new Promise((resolve) => setTimeout(resolve, 60_000));
await stage.done({ numbers: { factor: opt.factor, list: [1, opt.bad ? NaN : 2] }, device: "a device" });
`;

interface Bench {
  readonly dir: string;
  /** Starts the stage with `line` as its arguments. */
  start(line?: string): Deno.ChildProcess;
  /** Runs it to its end. */
  run(line?: string): Promise<{ code: number; out: string; err: string }>;
  write(path: string, text: string): void;
  files(folder?: string): string[];
}

async function onBench(body: (bench: Bench) => Promise<void>): Promise<void> {
  using folder = temporaryFolder({ "09_copy.ts": SCRIPT });
  const dir = folder.path;
  const start = (line = "") => command(dir, "09_copy.ts", line, { env: { RECIPE: "", DEBUG: "" } }).spawn();
  const bench: Bench = {
    dir,
    start,
    run: (line) => ended(start(line)),
    write(path, text) {
      Deno.mkdirSync(`${dir}/${path}`.replace(/\/[^/]*$/, ""), { recursive: true });
      Deno.writeTextFileSync(`${dir}/${path}`, text);
    },
    files: (folder = "artifacts/09_copy") => walk(`${dir}/${folder}`).map((path) => path.slice(dir.length + 1)).sort(),
  };
  bench.write("in/a.txt", "first");
  bench.write("in/sub/b.txt", "second");
  bench.write("in/manifest.json", "{}");
  await body(bench);
}

/** Waits until the stage says that it works, and leaves it at work. */
async function working(child: Deno.ChildProcess): Promise<void> {
  const reader = child.stdout.getReader();
  assertEquals(new TextDecoder().decode((await reader.read()).value), "working\n");
  reader.releaseLock();
}

const OUT = "artifacts/09_copy";
const UP_TO_DATE = `09_copy is up to date (${OUT})\n`;
const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

Deno.test("a stage writes down what it read, wrote and measured, and prints it as its last line", () =>
  onBench(async ({ dir, run, files }) => {
    const { code, out, err } = await run("--factor 3 --verbose");
    assertEquals([code, err], [0, ""]);
    const manifest = readManifest(`${dir}/${OUT}`)!;
    assertEquals(JSON.parse(out.trimEnd().split("\n").at(-1)!), manifest);
    const { script, device, numbers, flags } = manifest;
    assertEquals({ script, device, numbers }, {
      script: "09_copy",
      device: "a device",
      numbers: { factor: 3, list: [1, 2] },
    });
    const asked = {
      source: "in",
      factor: 3,
      wait: false,
      bad: false,
      reuse: false,
      refuse: false,
      saves: true,
      name: "09_copy",
    };
    assertEquals(flags, { ...asked, recipe: "tiny", out: OUT });
    const short = (list: Manifest["reads"]) => list.map(({ path, bytes, sha256 }) => [path, bytes, sha256]);
    assertEquals(short(manifest.reads), [["in/a.txt", 5, sha256("first")], ["in/sub/b.txt", 6, sha256("second")]]);
    assertEquals(short(manifest.writes), [["a.txt", 5, sha256("FIRST")], ["deep/er/last", 1, sha256("x")]]);
    assertEquals(manifest.reads[0]!.mtime, Deno.statSync(`${dir}/in/a.txt`).mtime!.getTime());
    assert(manifest.seconds > 0 && manifest.seconds < 60);
    const written = ["a.txt", "checkpoints/step", "deep/er/last", "manifest.json"].map((name) => `${OUT}/${name}`);
    assertEquals(files(), written, "nothing else is left, no lock and no temporary file");
  }));

Deno.test("a stage runs again when a flag, an input or a result has changed, and only then", async (t) => {
  await onBench(async ({ dir, run, write }) => {
    assertEquals((await run()).code, 0);
    const same = (name: string, line = "", act = () => {}) =>
      t.step(name, async () => {
        act();
        assertEquals(await run(line), { code: 0, out: UP_TO_DATE, err: "" });
      });
    const again = (name: string, line = "", act = () => {}) =>
      t.step(name, async () => {
        act();
        const { code, out, err } = await run(line);
        assertEquals([code, err], [0, ""]);
        assertStringIncludes(out, "working\n");
      });
    await same("nothing has changed");
    await same("a flag that changes no result", "--verbose");
    await same("an input has a new date and the old text", "", () => Deno.utimeSync(`${dir}/in/a.txt`, 1, 1));
    await same("a result has a new date and the old text", "", () => Deno.utimeSync(`${dir}/${OUT}/a.txt`, 1, 1));
    await again("--force", "--force");
    await again("another flag", "--factor 5");
    await again("the flag back again");
    await again("an input has another text of the same length", "", () => write("in/a.txt", "FIRST"));
    await again("a new input", "", () => write("in/sub/c.txt", ""));
    await again("an input less", "", () => Deno.removeSync(`${dir}/in/sub/c.txt`));
    await again("a result is missing", "", () => Deno.removeSync(`${dir}/${OUT}/deep/er/last`));
    await again("a result has another text of the same length", "", () => write(`${OUT}/a.txt`, "fIRST"));
    await again("the manifest is missing and the lock of the dead run is there", "", () => {
      Deno.renameSync(`${dir}/${OUT}/manifest.json`, `${dir}/${OUT}/.lock`);
      write(`${OUT}/.lock`, "09_copy pid 1\n");
    });
    await same("and then all is well again");
    await again("another flag", "--factor 5");
    await same("no flag, but as it was made", "--as-made");
    await again("no flag, but as it was made, and an input has changed", "--as-made", () => write("in/a.txt", "other"));
    assertEquals(readManifest(`${dir}/${OUT}`)!.flags.factor, 5);
    await again("as it was made, but for a flag", "--as-made --factor 6");
    await again("of another recipe nothing is taken over", "--as-made --recipe blog");
    assertEquals(readManifest(`${dir}/${OUT}`)!.flags.factor, 2);
  });
});

Deno.test("a stage empties its folder of an earlier run, unless it goes on with it", () =>
  onBench(async ({ dir, run, write, files }) => {
    await run();
    write(`${OUT}/old.txt`, "of an earlier version");
    const leave = () => {
      write(`${OUT}/half.safetensors.12.partial`, "of a process that was killed");
      write(`${OUT}/checkpoints/step-1.12.partial/half.safetensors.12.partial`, "and of another");
    };
    leave();
    assertEquals((await run("--force --reuse")).code, 0);
    assert(files().includes(`${OUT}/old.txt`));
    assertEquals(files().filter((path) => path.includes(".partial")), []);
    assertEquals(readManifest(`${dir}/${OUT}`)!.writes.map(({ path }) => path), ["a.txt", "deep/er/last", "old.txt"]);
    leave();
    assertEquals((await run("--force")).code, 0);
    assertEquals(files().filter((path) => /old|partial/.test(path)), []);
  }));

Deno.test("a stage that refuses its input leaves the earlier result as it was", () =>
  onBench(async ({ dir, run, files }) => {
    await run();
    const before = files().map((path) => [path, Deno.readTextFileSync(`${dir}/${path}`)]);
    for (const line of ["--refuse", "--refuse --force", "--refuse --factor 3 --reuse"]) {
      assertEquals(await run(line), { code: 1, out: "", err: "Cannot use this input: it is bad\n" });
      assertEquals(files().map((path) => [path, Deno.readTextFileSync(`${dir}/${path}`)]), before);
    }
    assertEquals(await run(), { code: 0, out: UP_TO_DATE, err: "" });
    assertEquals((await run("--refuse --out artifacts/new")).code, 1);
    assertEquals([...Deno.readDirSync(`${dir}/artifacts`)].map(({ name }) => name), ["09_copy"]);
  }));

Deno.test("a stage that fails at work puts the earlier result back, also after a run that was killed", () =>
  onBench(async ({ dir, run, start, write, files }) => {
    await run();
    const before = files().map((path) => [path, Deno.readTextFileSync(`${dir}/${path}`)]);
    write("in/c.txt", "a third");
    const failed = await run("--bad --saves=false");
    assertEquals([failed.code, failed.err.startsWith("Cannot write manifest.json: numbers.list.1")], [1, true]);
    assertEquals(files().map((path) => [path, Deno.readTextFileSync(`${dir}/${path}`)]), before);
    const child = start("--wait --saves=false");
    await working(child);
    child.kill("SIGKILL");
    await Promise.all([child.status, child.stdout.cancel(), child.stderr.cancel()]);
    assertEquals(files().filter((path) => /^[^.]*\/manifest/.test(path)), [], "half of a result is none");
    assertEquals((await run("--bad --saves=false")).code, 1);
    assertEquals(files().map((path) => [path, Deno.readTextFileSync(`${dir}/${path}`)]), before);
    assertEquals((await run("--saves=false")).code, 0);
    const written = ["a.txt", "c.txt", "deep/er/last", "manifest.json"].map((name) => `${OUT}/${name}`);
    assertEquals(files(), written, "what was set aside is gone");
  }));

Deno.test("a run that was killed after its manifest is whole: the result before it is not wanted any more", () =>
  onBench(async ({ dir, run, write, files }) => {
    await run();
    const before = files();
    const leave = () => {
      write(`${OUT}/.before/a.txt`, "of the result before");
      write(`${OUT}/.before/manifest.json`, "{}");
      write(`${OUT}/.lock`, "09_copy pid 1\n");
    };
    leave();
    assertEquals(await run(), { code: 0, out: UP_TO_DATE, err: "" });
    assertEquals(files(), before);
    leave();
    assertEquals((await run("--factor 5 --bad --saves=false")).code, 1);
    assertEquals([files(), Deno.readTextFileSync(`${dir}/${OUT}/a.txt`)], [before, "FIRST"]);
  }));

Deno.test("a stage that writes into a folder that it reads is up to date all the same", () =>
  onBench(async ({ run, write }) => {
    for (const line of ["--out in/new", "--out=./in/../in/new"]) {
      assertEquals((await run(line)).code, 0, line);
      const { code, out, err } = await run(line);
      assertEquals([code, out.includes("is up to date ("), err], [0, true, ""], line);
    }
    write("in/a.txt", "changed");
    assertStringIncludes((await run("--out in/new")).out, "working\n");
  }));

Deno.test("a stage refuses an input that its own result would replace", () =>
  onBench(async ({ dir, run, files }) => {
    await run();
    const before = files();
    const { code, err } = await run(`--source ${OUT}/deep`);
    const said =
      `Cannot read "${OUT}/deep" and write "${OUT}": what is there makes way for the result: name another folder`;
    assertEquals([code, err.startsWith(said)], [1, true]);
    assertEquals([files(), Deno.readTextFileSync(`${dir}/${OUT}/deep/er/last`)], [before, "x"]);
  }));

Deno.test("a stage says in one line that an input was made with another recipe", () =>
  onBench(async ({ run }) => {
    await run("--out artifacts/01_first --name 01_first");
    const read = "--source artifacts/01_first/deep";
    assertEquals((await run(read)).err, "");
    const { code, err } = await run(`${read} --recipe blog`);
    const said = 'Note: "artifacts/01_first/deep" was made with --recipe tiny, 09_copy runs with --recipe blog: ' +
      "RECIPE=blog deno task train gives every stage the same\n";
    assertEquals([code, err], [0, said]);
  }));

Deno.test("a stage says in one line which of the stages behind its input is no longer of what is there", () =>
  onBench(async ({ dir, run, write }) => {
    const first = "--out artifacts/01_first --name 01_first";
    const second = "--source artifacts/01_first --out artifacts/02_second --name 02_second";
    for (const line of [first, second, "--source artifacts/02_second"]) assertEquals((await run(line)).err, "", line);
    write("in/a.txt", "changed");
    assertEquals((await run(first)).err, "");
    const { code, err } = await run("--source artifacts/02_second --force");
    const stale = '"artifacts/02_second" was made from another "artifacts/01_first/a.txt" than there is now';
    assertEquals([code, err], [0, `Note: ${stale}: run "deno task 02" to make it again\n`]);
    for (const line of [second, "--source artifacts/02_second"]) assertEquals((await run(line)).err, "", line);
    Deno.renameSync(`${dir}/in/a.txt`, `${dir}/in/z.txt`);
    assertEquals((await run(first)).err, "");
    const gone = '"artifacts/02_second" was made from "artifacts/01_first/a.txt", which is gone';
    assertEquals(
      (await run("--source artifacts/02_second --force")).err,
      `Note: ${gone}: run "deno task 02" to make it again\n`,
    );
  }));

Deno.test("a stage that fails after a checkpoint or is killed leaves no manifest, and the next run does all of it", () =>
  onBench(async ({ dir, start, run, files }) => {
    assertEquals((await run()).code, 0);
    const failed = await run("--bad");
    assertEquals(failed.code, 1);
    assertEquals(failed.err, "Cannot write manifest.json: numbers.list.1 is NaN: a finite number is wanted\n");
    assertEquals(files().includes(`${OUT}/manifest.json`), false);
    const child = start("--wait");
    await working(child);
    child.kill("SIGKILL");
    await Promise.all([child.status, child.stdout.cancel(), child.stderr.cancel()]);
    assertEquals(files().includes(`${OUT}/manifest.json`), false);
    assertMatch(Deno.readTextFileSync(`${dir}/${OUT}/.lock`), /^09_copy pid \d+\n$/);
    const next = await run();
    assertEquals([next.code, next.err], [0, ""]);
    assertEquals(files().includes(`${OUT}/.lock`), false);
  }));

Deno.test("two processes do not work in one folder: the second names the first", () =>
  onBench(async ({ start, run }) => {
    const child = start("--wait");
    await working(child);
    const second = await run();
    assertEquals([second.code, second.out], [1, ""]);
    assertStringIncludes(
      second.err,
      `Cannot write "${OUT}": another process is at work there (09_copy pid ${child.pid})`,
    );
    child.kill("SIGKILL");
    await Promise.all([child.status, child.stdout.cancel(), child.stderr.cancel()]);
    assertEquals((await run()).code, 0);
  }));

Deno.test("a stage never touches a folder that it did not make", () =>
  onBench(async ({ dir, run, write, files }) => {
    write("mine/thesis.txt", "ten years of work");
    write("mine/manifest.json", '{"script":"08_other"}');
    for (const line of ["--out mine", "--out mine --force", "--out mine --reuse", "--out in"]) {
      const { code, err } = await run(line);
      assertEquals(code, 1, line);
      assertMatch(
        err,
        /^Cannot write "(mine|in)": it has files that 09_copy did not make \("[^"]+"\): name another folder/,
      );
    }
    assertEquals(files("mine"), ["mine/manifest.json", "mine/thesis.txt"]);
    assertEquals(Deno.readTextFileSync(`${dir}/in/a.txt`), "first");
    assertEquals((await run("--out empty/er")).code, 0);
    const other = await run("--out empty/er --name 08_other");
    assertEquals([other.code, other.out], [1, ""]);
    assertStringIncludes(other.err, "it has files that 08_other did not make");
  }));

Deno.test("a stage that reads another's folder takes over its sums as long as the files are as it left them", () =>
  onBench(async ({ dir, run, write }) => {
    await run("--out artifacts/01_first --name 01_first");
    const path = "artifacts/01_first/a.txt";
    const manifest = readManifest(`${dir}/artifacts/01_first`)!;
    const marked = manifest.writes.map((record) => ({ ...record, sha256: "taken over" }));
    write("artifacts/01_first/manifest.json", JSON.stringify({ ...manifest, writes: marked }));
    const sum = async () => {
      await run("--source artifacts/01_first --force");
      return readManifest(`${dir}/${OUT}`)!.reads.find((record) => record.path === path)!.sha256;
    };
    assertEquals(await sum(), "taken over");
    Deno.utimeSync(`${dir}/${path}`, 1, 1);
    assertEquals(await sum(), sha256("FIRST"));
  }));

Deno.test("a missing or unfinished input says what makes it", () =>
  onBench(async ({ dir, run, write }) => {
    const refused = async (source: string, message: string) => {
      const { code, out, err } = await run(`--source ${source}`);
      assertEquals([code, out, err], [1, "", `Cannot read ${message}\n`]);
    };
    await refused("nowhere", '"nowhere": no such file or folder');
    await refused("artifacts/02_load", '"artifacts/02_load": run "deno task 02" first');
    await refused("artifacts/05_train/adapter", '"artifacts/05_train/adapter": run "deno task 05" first');
    write("artifacts/05_train/manifest.json", "{}");
    await refused("artifacts/05_train/adapter", '"artifacts/05_train/adapter": no such file or folder');
    Deno.removeSync(`${dir}/artifacts/05_train`, { recursive: true });
    write("artifacts/02_load/model.safetensors", "half of it");
    const unfinished = '"artifacts/02_load" has no manifest.json, so it is unfinished: run "deno task 02" first';
    await refused("artifacts/02_load", `"artifacts/02_load": ${unfinished}`);
    write("elsewhere/half.txt", "half of it");
    write("elsewhere/.lock", "02_load pid 1\n");
    await refused("elsewhere", `"elsewhere": ${unfinished.replace("artifacts/02_load", "elsewhere")}`);
    write("01_mine/a.txt", "not a stage's folder");
    assertEquals((await run("--source 01_mine --out of_mine")).code, 0);
    write("artifacts/05_train/checkpoints/step-10/adapter", "whole");
    checkInput(`${dir}/artifacts/05_train/checkpoints/step-10`);
    checkInput(`${dir}/artifacts/02_load`, { out: `${dir}/artifacts/02_load` });
    write("artifacts/02_load/manifest.json", "{");
    const { err } = await run("--source artifacts/02_load --out artifacts/02_load");
    assertMatch(
      err,
      /^Cannot read "artifacts\/02_load\/manifest\.json": .*: name another folder, or remove this one\n$/,
    );
    write("artifacts/02_load/manifest.json", '{"script":"09_copy"}');
    const partial = await run("--source in --out artifacts/02_load");
    assertStringIncludes(partial.err, "it has files that 09_copy did not make");
  }));
