/**
 * What 05 refuses: each mistake is one line on stderr with status 1, said before anything is trained, and it leaves neither a
 * result nor half of one.
 */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { type PackedRows, readRows, writeRows } from "../../lib/data/dataset.ts";
import { NO_GPU } from "../on_gpu.ts";
import {
  assertNothingPartial,
  assertRefused,
  attempt,
  command,
  contentOf,
  inFolder,
  readJson,
  ROOT,
  stage,
  walk,
} from "./process.ts";

Deno.test("05 refuses what does not fit together, and says which", { ignore: NO_GPU }, () =>
  inFolder(async (dir) => {
    const refused = async (line: string, message: RegExp) => {
      assertRefused(await attempt(dir, "05_train", `--max-steps 2 ${line}`), message);
      const left = walk(dir).filter((path) => path.includes("/05_train/") && !path.endsWith("/.lock"));
      assertEquals(left, []);
      assertNothingPartial(dir);
    };
    await refused("", /^Cannot read "artifacts\/02_load": run "deno task 02" first$/m);
    await stage(dir, "01_convert", "--source tiny");
    await stage(dir, "02_load");
    await refused("", /^Cannot read "artifacts\/03_dataset": run "deno task 03" first$/m);
    await stage(dir, "03_dataset", "--source qa");
    await refused("", /^Cannot read "artifacts\/04_lora": run "deno task 04" first$/m);
    await stage(dir, "04_lora");

    // Flags.
    await refused("--lr 1", /^Cannot read flag "--lr": this script has --model --dataset --adapter --epochs /);
    await refused("--learning-rate NaN", /^Cannot read flag "--learning-rate": "NaN" is not a finite number$/m);
    await refused("--learning-rate fast", /^Cannot read flag "--learning-rate": "fast" is not a finite number$/m);
    await refused("--learning-rate -1", /^Cannot use --learning-rate -1: a number of at least 0 is wanted$/m);
    await refused("--batch-size 0", /^Cannot use --batch-size 0: a whole number of at least 1 is wanted$/m);
    await refused(
      "--gradient-accumulation 1.5",
      /^Cannot use --gradient-accumulation 1.5: a whole number of at least 1/,
    );
    await refused("--max-steps 0 --epochs 0", /^Cannot plan a run of 0 epochs and at most 0 steps: /);
    await refused("--warmup-ratio 2", /^Cannot warm up for 2 of the run: the ratio must lie between 0 and 1$/m);
    await refused("--beta1 1", /^Cannot use --beta1 1: a number below 1 is wanted$/m);
    await refused("--beta2 1.5", /^Cannot use --beta2 1.5: a number below 1 is wanted$/m);
    await refused("--optimizer sgd", /^Cannot read flag "--optimizer": "sgd" is not one of adamw, adamw_8bit$/m);

    // An adapter of another model, and one that asks for what is not computed.
    const golden = `${ROOT}fixtures/golden/tiny/lora_adapter`;
    await refused(
      `--adapter ${golden}`,
      /^Cannot read ".*adapter_model.safetensors": tensor ".*" is \[8, 64\] but must be /,
    );

    const kinds = { model: "loaded model", dataset: "dataset folder", adapter: "adapter" };
    for (const [flag, kind] of Object.entries(kinds)) {
      await refused(
        `--${flag} qa`,
        new RegExp(`^Cannot read "qa": it has no \\S+: an? ${kind} is wanted: run "deno task 0[234]" first$`, "m"),
      );
    }

    // Rows.
    const original = `${dir}/artifacts/03_dataset`;
    const rows = readRows(`${original}/train.safetensors`);
    const data = copy(original, `${dir}/data`);
    const train = async (changed: Partial<PackedRows>, message: RegExp) => {
      await writeRows(`${data}/train.safetensors`, { ...rows, ...changed });
      await refused("--dataset data", message);
    };
    const all = rows.inputIds.length;
    await train(
      { inputIds: rows.inputIds.with(5, 1024) },
      /^Cannot use "data\/train.*": it has token 1024, the model a vocabulary of 1024: /,
    );
    await train({ labels: rows.labels.with(5, 5000) }, /^Cannot use "data\/train.safetensors": it has token 5000, /);
    const one = { positionIds: Int32Array.from({ length: all }, (_, i) => i), rowOffsets: [0, all] };
    await train(
      one,
      new RegExp(`: it has documents of ${all} tokens, the model 256 positions: lower 03's --max-seq-length$`, "m"),
    );
    const masked = rows.labels.map((label, i) => i < rows.rowOffsets[2]! && i >= rows.rowOffsets[1]! ? -100 : label);
    await train({ labels: masked }, /^Cannot use "data\/train.safetensors": all labels of row 1 are masked: /);
    await train(
      { metadata: { tokenizer_sha256: "0" } },
      /: its tokens are not of the tokenizer in "artifacts\/02_load": run/,
    );
    await refused("--dataset data --model artifacts/02_load/", /: its tokens are not of the tokenizer in /);
    Deno.writeFileSync(
      `${data}/train.safetensors`,
      Deno.readFileSync(`${original}/train.safetensors`).subarray(0, 999),
    );
    await refused(
      "--dataset data",
      /^Cannot read "data\/train.safetensors": its tensors end at byte \d+ but the file ends /,
    );
    Deno.removeSync(`${data}/train.safetensors`);
    await refused(
      "--dataset data",
      /^Cannot read "data": it has no train.safetensors: a dataset folder is wanted: run "deno task 03" first$/m,
    );
    copy(original, data);
    const none = {
      inputIds: new Int32Array(),
      positionIds: new Int32Array(),
      labels: new Int32Array(),
      rowOffsets: [0],
    };
    await writeRows(`${data}/validation.safetensors`, { ...none, metadata: {} });
    await refused("--dataset data", /^Cannot use "data\/validation.safetensors": it has no rows: /);

    // A foreign folder, and one where another process is at work.
    assertRefused(
      await attempt(dir, "05_train", "--out qa"),
      /^Cannot write "qa": it has files that 05_train did not make/,
    );
    const busy = command(dir, "05_train", "--out busy --epochs 1000").spawn();
    let over = false;
    busy.status.then(() => over = true);
    for (const until = performance.now() + 60_000; !over && !log(`${dir}/busy`) && performance.now() < until;) {
      await new Promise((wake) => setTimeout(wake, 20));
    }
    const second = await attempt(dir, "05_train", "--out busy --epochs 1000");
    if (!over) busy.kill("SIGKILL");
    await busy.output();
    assertRefused(
      second,
      /^Cannot write "busy": another process is at work there \(05_train pid \d+\): wait for it or end it$/m,
    );

    // A loss that is no number ends the run and names the rows; what came before stays in the log.
    const wild = "--out wild --batch-size 2 --learning-rate 1e30 --max-grad-norm 0 --warmup-ratio 0 --max-steps 4";
    const astray = await attempt(dir, "05_train", wild);
    assertRefused(
      astray,
      /^Cannot go on: the loss of update 2 is NaN .*: lower --learning-rate, clip with --max-grad-norm 1, or look at its rows, \d+, \d+$/m,
    );
    assertStringIncludes(log(`${dir}/wild`), '"step":1,');
    assert(!log(`${dir}/wild`).includes("null"));
  }));

Deno.test("05 saves the best of its updates, goes on with an adapter, and begins anew after a finished run", {
  ignore: NO_GPU,
}, () =>
  inFolder(async (dir) => {
    const at = (path: string) => `${dir}/artifacts/05_train/${path}`;
    await stage(dir, "01_convert", "--source tiny");
    await stage(dir, "02_load");
    await stage(dir, "03_dataset", "--source qa");
    await stage(dir, "04_lora");

    // A rate that only harms: the model as it came is no candidate, so the least bad update is saved, and it says so.
    const harm = "--max-steps 3 --batch-size 2 --eval-steps 1 --learning-rate 3 --warmup-ratio 0 --max-grad-norm 0";
    const worse = await stage(dir, "05_train", `${harm} --save-steps 1 --profile 2`);
    const { best_step, best_eval_loss, first_eval_loss } = worse.numbers as Record<string, number>;
    assert(best_step! >= 1 && best_eval_loss! > first_eval_loss!, `${best_step}: ${best_eval_loss}`);
    assertStringIncludes(worse.printed, "Validation was no better after any update than before training.\n");
    const [saved, best] = ["adapter", "checkpoints/best"].map((name) => at(`${name}/adapter_model.safetensors`));
    assertEquals(Deno.readFileSync(saved!), Deno.readFileSync(best!));

    // A mistake leaves the finished run as it was; another run does not take its checkpoints for its own.
    const before = contentOf(at(""));
    for (const mistake of ["--warmup-ratio 2", "--epochs 0", `--adapter ${ROOT}fixtures/golden/tiny/lora_adapter`]) {
      assertRefused(await attempt(dir, "05_train", mistake), /^Cannot /);
      assertEquals(contentOf(at("")), before);
    }
    const few = "--max-steps 2 --batch-size 2 --learning-rate 1e-2 --warmup-ratio 0";
    const run = await stage(dir, "05_train", few);
    assert(!run.printed.includes("Going on"), run.printed);
    assertEquals(run.writes.filter(({ path }) => path === "trace.json"), []);

    // An adapter that is trained further with dropout sees another model in its first update than the evaluation does.
    const config = readJson(at("adapter/adapter_config.json"));
    copy(at("adapter"), `${dir}/more`);
    Deno.writeTextFileSync(`${dir}/more/adapter_config.json`, JSON.stringify({ ...config, lora_dropout: 0.5 }));
    await stage(dir, "05_train", `${few} --adapter more --out further`);
  }));

function copy(from: string, to: string): string {
  Deno.mkdirSync(to, { recursive: true });
  for (const { name } of Deno.readDirSync(from)) {
    if (name !== "manifest.json") Deno.copyFileSync(`${from}/${name}`, `${to}/${name}`);
  }
  return to;
}

function log(dir: string): string {
  try {
    return Deno.readTextFileSync(`${dir}/log.jsonl`);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "";
    throw error;
  }
}
