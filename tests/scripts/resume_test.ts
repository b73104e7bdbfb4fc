/**
 * Training killed with SIGKILL, at moments that matter and at random ones, and started again with the same command: it must
 * end with the very bits of a run that nobody killed. Then what may stand against going on: other settings, a damaged file.
 */
import { assert, assertEquals, assertGreater, assertMatch, assertStringIncludes } from "@std/assert";
import { exists } from "../../lib/data/files.ts";
import { openSafetensors } from "../../lib/data/safetensors.ts";
import { listCheckpoints } from "../../lib/model/checkpoint.ts";
import { NO_GPU } from "../on_gpu.ts";
import {
  assertNothingPartial,
  assertRefused,
  attempt,
  command,
  contentOf,
  inFolder,
  readJson,
  stage,
} from "./process.ts";

/** When to kill: as soon as this is true of the run's folder. */
type Moment = (out: string) => boolean;

function lines(path: string): number {
  return exists(path) ? Deno.readTextFileSync(path).split("\n").length - 1 : 0;
}

const beforeTheFirstCheckpoint: Moment = (out) =>
  lines(`${out}/log.jsonl`) > 0 && listCheckpoints(`${out}/checkpoints`).length === 0;

/** While the checkpoint of update `step` or of a later one is written, after `bytes` of its largest file. */
const whileWriting = (step: number, bytes: number): Moment => (out) =>
  exists(`${out}/checkpoints`) &&
  [...Deno.readDirSync(`${out}/checkpoints`)].some(({ name }) => {
    const [, number] = /^step-(\d+)\.\d+\.partial$/.exec(name) ?? [];
    if (number === undefined || Number(number) < step) return false;
    const file = `${out}/checkpoints/${name}/state.safetensors`, partial = `${file}.${name.split(".")[1]}.partial`;
    return bytes === 0 || (exists(partial) && Deno.statSync(partial).size >= bytes);
  });

/** At a time that nobody chose, after at least `count` more lines of the log, which is cut when the run goes on. */
function somewhenAfter(count: number): Moment {
  let least = Infinity, due = Infinity;
  return (out) => {
    const now = lines(`${out}/log.jsonl`);
    least = Math.min(least, now);
    if (due === Infinity && now >= least + count) due = performance.now() + 150 * Math.random();
    return performance.now() >= due;
  };
}

/** Starts the run and kills it at the moment; says how far it had come. Throws when it ended before. */
async function kill(dir: string, line: string, moment: Moment): Promise<string> {
  const out = `${dir}/${/--out (\S+)/.exec(line)![1]}`;
  const child = command(dir, "05_train", line).spawn();
  const output = child.output();
  let over = false;
  output.then(() => over = true);
  // Wakes up a thousand times a second: a checkpoint is written in a few milliseconds.
  while (!over && !moment(out)) await new Promise((wake) => setTimeout(wake, 1));
  if (!over) child.kill("SIGKILL");
  const { signal, stdout, stderr } = await output;
  const text = new TextDecoder().decode(stdout);
  assertEquals(signal, "SIGKILL", `it ended before it could be killed\n${text}${new TextDecoder().decode(stderr)}`);
  return text;
}

/** The log without the times. */
function logOf(out: string): unknown[] {
  return Deno.readTextFileSync(`${out}/log.jsonl`).trim().split("\n").map((line) => {
    const { ms: _ms, ...rest } = JSON.parse(line);
    return rest;
  });
}

/** Every tensor of a file, by name. */
function tensorsOf(path: string): Map<string, Uint8Array> {
  using source = openSafetensors(path);
  return new Map([...source.tensors.keys()].map((name) => [name, source.read(name)]));
}

/** Asserts that two finished runs have learnt the same, remember the same and say the same. */
function assertSame(dir: string, [a, b]: [string, string], result: string): void {
  const [one, other] = [`${dir}/${a}`, `${dir}/${b}`];
  assertEquals(Deno.readFileSync(`${one}/${result}`), Deno.readFileSync(`${other}/${result}`));
  assertEquals(logOf(one), logOf(other));
  const [last, same] = [one, other].map((out) => listCheckpoints(`${out}/checkpoints`).at(-1)!);
  assertEquals(last!.step, same!.step);
  assertEquals(tensorsOf(`${last!.path}/state.safetensors`), tensorsOf(`${same!.path}/state.safetensors`));
  const numbersOf = (out: string) => {
    const { tokens_per_second: _speed, ...rest } = readJson<{ numbers: Record<string, unknown> }>(
      `${out}/manifest.json`,
    ).numbers;
    return rest;
  };
  assertEquals(numbersOf(one), numbersOf(other));
  const stateOf = (out: string) => {
    const { log_history: _log, ...rest } = readJson(`${out}/trainer_state.json`);
    return rest;
  };
  assertEquals(stateOf(one), stateOf(other));
  assertNothingPartial(other);
}

Deno.test(
  "a QLoRA run that is killed five times ends with the bits of one that is not",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      await stage(dir, "01_convert", "--source tiny");
      await stage(dir, "02_load");
      await stage(dir, "03_dataset", "--source qa");
      await stage(dir, "04_lora");
      const run = "--max-steps 14 --batch-size 2 --save-steps 2 --eval-steps 4 --save-total-limit 3";
      await stage(dir, "05_train", `${run} --out whole`);

      const line = `${run} --out killed`, out = `${dir}/killed`;
      await kill(dir, line, beforeTheFirstCheckpoint);
      assertEquals(listCheckpoints(`${out}/checkpoints`), []);
      assert(!exists(`${out}/manifest.json`));
      await kill(dir, line, whileWriting(4, 0));
      await kill(dir, line, somewhenAfter(2));
      await kill(dir, line, whileWriting(8, 100_000));
      const before = listCheckpoints(`${out}/checkpoints`);
      assertGreater(before.length, 1);

      // Other settings: a sentence, and nothing is touched.
      const untouched = contentOf(out);
      const refused = await attempt(dir, "05_train", `${line} --learning-rate 1e-3`);
      assertRefused(
        refused,
        /^Cannot resume from "killed\/checkpoints\/step-\d+": it was made with --learning-rate 0.004, /,
      );
      assertMatch(refused.err, /not 0.001: go on as the run began, or start over with --no-resume\n$/);
      assertEquals(contentOf(out), untouched);

      // A line of the log that is damaged: the sentence names it, and nothing is touched but what the killed runs left half
      // written.
      const log = `${out}/log.jsonl`, logged = Deno.readTextFileSync(log);
      Deno.writeTextFileSync(log, logged.replace('"step":1,', '"step"?1,'));
      const unread = await attempt(dir, "05_train", line);
      assertRefused(
        unread,
        /^Cannot go on with "killed\/log.jsonl": its line 2 is damaged: .* start over with --no-resume$/m,
      );
      Deno.writeTextFileSync(log, logged);
      const whole = [...untouched].filter(([path]) => !/\.partial(\/|$)/.test(path));
      assertEquals(contentOf(out), new Map(whole));

      // One bit of the newest checkpoint is flipped: the sentence names the file, and without that folder the run goes on
      // from the one before.
      const { path: newest } = before.at(-1)!, { path: older } = before.at(-2)!;
      const file = `${newest}/state.safetensors`, bytes = Deno.readFileSync(file);
      Deno.writeFileSync(file, bytes.with(100_000, bytes[100_000]! ^ 1));
      const damaged = await attempt(dir, "05_train", line);
      const relative = (path: string) => path.slice(dir.length + 1);
      const where = `Cannot resume from "${relative(newest)}": cannot read "${relative(file)}": it is damaged`;
      assertRefused(damaged, new RegExp(`^${where}: .*: remove that folder to go on from "${relative(older)}"$`, "m"));
      Deno.removeSync(newest, { recursive: true });

      const printed = await kill(dir, line, somewhenAfter(3));
      assertStringIncludes(printed, `Going on after update ${before.at(-2)!.step} (${relative(older)}).`);
      await stage(dir, "05_train", line);
      assertSame(dir, ["whole", "killed"], "adapter/adapter_model.safetensors");

      // Another model under the same name is another run, and --no-resume begins it.
      await kill(dir, `${run} --out again`, whileWriting(4, 0));
      await stage(dir, "04_lora", "--seed 7");
      const changed = await attempt(dir, "05_train", `${run} --out again`);
      assertRefused(changed, /"artifacts\/04_lora\/adapter_model.safetensors" is not the file that it was made with/);
      const anew = await stage(dir, "05_train", `${run} --out again --no-resume`);
      assert(!anew.printed.includes("Going on"));
      assertEquals(anew.numbers.steps, 14);
      assertEquals(logOf(`${dir}/again`).length, logOf(`${dir}/whole`).length);
    }),
);

Deno.test(
  "a run of all weights that is killed twice ends with the same bits: 32-bit AdamW, accumulation, block checkpointing",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      await stage(dir, "01_convert", "--source tiny");
      await stage(dir, "02_load", "--mode full");
      await stage(dir, "03_dataset", "--source qa");
      const how = "--optimizer adamw --gradient-accumulation 2 --checkpointing block --learning-rate 1e-3";
      const run = `${how} --max-steps 6 --batch-size 2 --save-steps 2 --eval-steps 3`;
      await stage(dir, "05_train", `${run} --out whole`);
      await kill(dir, `${run} --out killed`, whileWriting(4, 1_000_000));
      await kill(dir, `${run} --out killed`, somewhenAfter(1));
      await stage(dir, "05_train", `${run} --out killed`);
      assertSame(dir, ["whole", "killed"], "model/model.safetensors");
    }),
);
