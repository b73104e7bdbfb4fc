/**
 * The stages as processes, one after the other, on the bundled fixture: what their manifests say against what this process
 * computes from the files, in every mode, and when a stage runs again.
 */
import { assert, assertAlmostEquals, assertEquals, assertGreater, assertLess, assertStringIncludes } from "@std/assert";
import { batchOf, evaluationBatches, mostTokens } from "../../lib/data/batches.ts";
import { epochOrder, nextTokenTargets, readRows } from "../../lib/data/dataset.ts";
import { exists } from "../../lib/data/files.ts";
import { openModel, openSafetensors } from "../../lib/data/safetensors.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { linearModules, readConfig } from "../../lib/model/config.ts";
import { Llama, logitsOf } from "../../lib/model/llama.ts";
import { largestDifference } from "../../lib/model/merge.ts";
import { learningRate } from "../../lib/model/schedule.ts";
import { evaluate } from "../../lib/model/perplexity.ts";
import { labelledTokens } from "../../lib/model/trainer.ts";
import type { Manifest } from "../../lib/run/manifest.ts";
import { NO_GPU } from "../on_gpu.ts";
import {
  assertNothingPartial,
  assertRefused,
  attempt,
  contentOf,
  inFolder,
  readJson,
  ROOT,
  stage,
  walk,
} from "./process.ts";

type Numbers = Record<string, number>;
/** A line of log.jsonl. */
interface Line {
  readonly step: number;
  readonly [field: string]: unknown;
}

const product = (shape: readonly number[]) => shape.reduce((all, axis) => all * axis, 1);
const numbersOf = ({ numbers }: Manifest) => numbers as Numbers;

/** Elements of every tensor of a model folder or file, by name. */
function elements(path: string): Map<string, number> {
  using source = path.endsWith(".safetensors") ? openSafetensors(path) : openModel(path);
  return new Map([...source.tensors.values()].map(({ name, shape }) => [name, product(shape)]));
}

const sum = (values: Iterable<number>) => [...values].reduce((total, value) => total + value, 0);

function logOf(dir: string): { updates: Line[]; evaluations: Line[] } {
  const lines = Deno.readTextFileSync(`${dir}/log.jsonl`).trim().split("\n").map((line) => JSON.parse(line) as Line);
  return { updates: lines.filter((line) => "loss" in line), evaluations: lines.filter((line) => "eval_loss" in line) };
}

/** Losses of a model over all validation rows, and over the rows of one logged update. */
async function losses(
  { model, adapter, dataset }: { model: string; adapter?: string; dataset: string },
  rows: readonly number[],
) {
  const [train, validation] = ["train", "validation"].map((split) => readRows(`${dataset}/${split}.safetensors`));
  const tokens = Math.max(mostTokens(train!, rows.length), mostTokens(validation!, 2));
  const llama = await Llama.open({ model, adapter, tokens });
  const all = evaluationBatches(validation!, 2);
  const evaluation = await evaluate(llama, { batches: all.batches, rows: all.rows });
  const update = await evaluate(llama, { batches: [batchOf(train!, rows)], rows: [rows.length] });
  llama.destroy();
  return { evaluation, update };
}

/** What every run of 05 must have written, whatever it trained: its log, its state, its page. */
function assertTrained(dir: string, { numbers }: Manifest, run: { steps: number; rate: number; rows: number }): void {
  const { updates, evaluations } = logOf(dir);
  assertEquals(updates.map(({ step }) => step), Array.from({ length: run.steps }, (_, i) => i + 1));
  const rates = updates.map(({ step }) =>
    learningRate({ scheduler: "cosine", step, totalSteps: run.steps, warmupSteps: 1, peak: run.rate })
  );
  assertEquals(updates.map((line) => line.learning_rate), rates);
  for (const line of updates) {
    const fields = ["step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "rows", "ms"];
    assertEquals(Object.keys(line), fields);
    assert((line.grad_norm as number) > 0 && (line.ms as number) > 0);
  }
  assertEquals([numbers.first_loss, numbers.last_loss], [updates[0]!.loss, updates.at(-1)!.loss]);
  assertEquals([numbers.first_eval_loss, numbers.last_eval_loss], [
    evaluations[0]!.eval_loss,
    evaluations.at(-1)!.eval_loss,
  ]);
  assertLess(numbers.last_eval_loss as number, numbers.first_eval_loss as number);
  assertEquals(numbers.best_eval_loss, Math.min(...evaluations.map((line) => line.eval_loss as number)));
  const state = readJson<Record<string, unknown>>(`${dir}/trainer_state.json`);
  assertEquals([state.global_step, state.max_steps, state.best_metric, state.best_global_step], [
    run.steps,
    run.steps,
    numbers.best_eval_loss,
    numbers.best_step,
  ]);
  assertEquals((state.log_history as Line[]).length, updates.length + evaluations.length);
  const page = Deno.readTextFileSync(`${dir}/report.html`);
  assertStringIncludes(page, "<svg");
  assert(!/https?:\/\/(?!www\.w3\.org)/.test(page), "the page loads something");
  assertEquals(numbers.rows, run.rows);
}

Deno.test(
  "01 to 08 write what their manifests say: QLoRA, packed, 8-bit AdamW",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      const at = (path: string) => `${dir}/artifacts/${path}`;

      const converted = numbersOf(await stage(dir, "01_convert", "--source tiny"));
      const original = elements(`${dir}/tiny`);
      assertEquals([converted.tensors, converted.parameters, converted.skipped], [
        original.size,
        sum(original.values()),
        0,
      ]);
      const ids = converted.input_ids as unknown as number[];
      const logits = (await logitsOf({ model: at("01_convert") }, ids)).flatMap((row) => [...row]);
      assertEquals([converted.logits_min, converted.logits_max], [
        logits.reduce((a, b) => Math.min(a, b)),
        logits.reduce((a, b) => Math.max(a, b)),
      ]);

      const loaded = numbersOf(await stage(dir, "02_load"));
      const linear = (name: string) => linearModules.some((module) => name.endsWith(`.${module}.weight`));
      const weights = [...elements(at("01_convert"))];
      const halved = sum(weights.map(([name, count]) => linear(name) ? count / 2 : count));
      assertEquals([loaded.parameters, loaded.stored_elements], [converted.parameters, halved]);
      assertLess(Math.abs(loaded.quantization_error! - 0.0728), 0.004);
      assert([...elements(at("02_load")).keys()].some((name) => name.endsWith(".nested_absmax")));

      const rows = await stage(dir, "03_dataset", "--source qa");
      const train = readRows(at("03_dataset/train.safetensors"));
      const counted = (rows.numbers as Record<string, Numbers>).train!;
      assertEquals([counted.examples, counted.rows, counted.tokens], [
        12,
        train.rowOffsets.length - 1,
        train.inputIds.length,
      ]);
      assertEquals(counted.learnt_tokens, nextTokenTargets(train).filter((id) => id >= 0).length);
      assertStringIncludes(rows.printed, "### User:\nWhat causes eczema?");

      const lora = numbersOf(await stage(dir, "04_lora"));
      const fresh = elements(at("04_lora/adapter_model.safetensors"));
      assertEquals([lora.tensors, lora.trainable], [fresh.size, sum(fresh.values())]);
      assertEquals(lora.trainable_share, lora.trainable! / (lora.trainable! + converted.parameters!));
      assertEquals(
        lora.trainable_share_as_the_blog_counts,
        lora.trainable! / (lora.trainable! + loaded.stored_elements!),
      );

      const trained = await stage(dir, "05_train", "--max-steps 6 --batch-size 2 --eval-steps 3 --save-steps 4");
      assertTrained(at("05_train"), trained, { steps: 6, rate: 4e-3, rows: counted.rows! });
      assertEquals(numbersOf(trained).trainable, lora.trainable);
      const { updates, evaluations } = logOf(at("05_train"));
      const order = [...epochOrder(counted.rows!, 42, 0)];
      assertEquals(updates.slice(0, 3).flatMap((line) => (line.rows as number[][]).flat()), order.slice(0, 6));
      const tokensOf = (which: number[]) => labelledTokens([batchOf(train, which)]);
      assertEquals(updates.map((line) => line.tokens), updates.map((line) => tokensOf((line.rows as number[][])[0]!)));
      // The fresh adapter changes nothing, so update 1 must see the loss of the 4-bit base.
      const first = (updates[0]!.rows as number[][])[0]!;
      const folders = { model: at("02_load"), dataset: at("03_dataset") };
      const base = await losses(folders, first);
      assertAlmostEquals(updates[0]!.loss as number, base.update.nllSum / base.update.tokens, 1e-5);
      assertAlmostEquals(evaluations[0]!.eval_loss as number, base.evaluation.evalLoss, 1e-5);
      const perplexity = Math.exp(base.evaluation.nllSum / base.evaluation.tokens);
      assertAlmostEquals(evaluations[0]!.eval_perplexity as number, perplexity, 1e-5 * perplexity);
      // What lies in adapter/ is what the lowest validation loss was measured on.
      const adapter = at("05_train/adapter");
      assertEquals(readAdapter(adapter, readConfig(at("02_load"))).tensors.size, fresh.size);
      const tuned = await losses({ ...folders, adapter }, first);
      assertAlmostEquals(tuned.evaluation.evalLoss, trained.numbers.best_eval_loss as number, 1e-5);

      await stage(dir, "06_evaluate", "--samples 1 --max-new-tokens 4");
      const { base: untuned, tuned: better } = readJson<Record<"base" | "tuned", Numbers>>(
        at("06_evaluate/evaluation.json"),
      );
      assertEquals(
        untuned.tokens,
        labelledTokens([batchOf(readRows(at("03_dataset/test.safetensors")), [0, 1, 2, 3])]),
      );
      assertAlmostEquals(untuned.perplexity!, Math.exp(untuned.nll_sum! / untuned.tokens!), 1e-9);
      assertLess(better.perplexity!, untuned.perplexity!);

      const merged = numbersOf(await stage(dir, "07_merge"));
      const input = merged.input_ids as unknown as number[];
      const apart = await logitsOf({ model: at("01_convert"), adapter: at("07_merge/lora_adapters") }, input);
      const together = await logitsOf({ model: at("07_merge/merged_model") }, input);
      assertEquals(merged.max_logit_difference, largestDifference(apart, together));
      assertLess(merged.max_logit_difference!, 1e-4 * merged.largest_logit!);
      assertGreater(merged.adapter_effect!, 0.1);

      // A folder that is no adapter is not taken for a model that was trained as a whole: the merge stays.
      const wrong = await attempt(dir, "07_merge", "--adapter artifacts/02_load");
      assertRefused(
        wrong,
        /^Cannot read "artifacts\/02_load": it has no adapter_config.json: a trained adapter is wanted: run "deno task 05" first$/m,
      );
      assert(exists(at("07_merge/merged_model/model.safetensors")) && exists(at("07_merge/manifest.json")));

      // What is merged is not added once more.
      const twice = "--model artifacts/07_merge/merged_model --out again";
      for (const script of ["06_evaluate", "07_merge"]) {
        const state =
          /^Cannot add an adapter to "artifacts\/07_merge\/merged_model": stage 07 merged ".*adapter" into it /m;
        assertRefused(await attempt(dir, script, twice), state);
      }

      const answer = await attempt(dir, "ask", "Why? --greedy --max-new-tokens 4");
      assertEquals([answer.code, answer.err], [0, ""], answer.out);
      assertStringIncludes(answer.out, "4 tokens, the first after ");

      const upload = await stage(dir, "08_upload", "--dry-run");
      assertEquals([upload.numbers.dry_run, upload.numbers.sent_bytes], [true, 0]);
      assertStringIncludes(upload.printed, "adapter_model.safetensors");

      // Again: what is up to date stays; another flag, another input or --force runs the stage.
      for (const script of ["01_convert --source tiny", "04_lora", "07_merge"]) {
        const [name, ...words] = script.split(" ");
        assertEquals(await attempt(dir, name!, words.join(" ")), {
          code: 0,
          out: `${name} is up to date (artifacts/${name})\n`,
          err: "",
        });
      }
      const single = numbersOf(await stage(dir, "02_load", "--double-quant false"));
      assertGreater(single.bytes!, loaded.bytes!);
      assert(![...elements(at("02_load")).keys()].some((name) => name.endsWith(".nested_absmax")));
      assertEquals(numbersOf(await stage(dir, "02_load", "--double-quant false --force")), single);
      Deno.writeTextFileSync(`${dir}/qa/train.jsonl`, '{"question":"Why?","answer":"Because."}\n', { append: true });
      const more = await stage(dir, "03_dataset", "--source qa");
      assertEquals((more.numbers as Record<string, Numbers>).train!.examples, 13);
      assertNothingPartial(dir);
      assertEquals(walk(at("")).filter((path) => path.endsWith("/.lock")), []);
    }),
);

Deno.test(
  "all weights, and LoRA on 32-bit weights, train on rows of every packing",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      const at = (path: string) => `${dir}/artifacts/${path}`;
      await stage(dir, "01_convert", "--source tiny");
      const packed = (packing: string, rest = "") =>
        stage(dir, "03_dataset", `--source qa --packing ${packing} --max-seq-length 160 ${rest}`);
      const lengths = () => {
        const { rowOffsets } = readRows(at("03_dataset/train.safetensors"));
        return rowOffsets.slice(1).map((end, r) => end - rowOffsets[r]!);
      };

      const none = (await packed("none")).numbers as Record<string, Numbers>;
      assertEquals(lengths().length, 12);
      await packed("wrapped");
      const full = lengths();
      assertEquals([...new Set(full.slice(0, -1)), sum(full)], [160, none.train!.tokens]);

      // Full training needs no stage 04, and starts from the weights that 01 wrote.
      await stage(dir, "02_load", "--mode full");
      const whole = "--max-steps 3 --batch-size 2 --learning-rate 1e-3 --checkpointing block --optimizer adamw";
      const fullRun = await stage(dir, "05_train", `${whole} --gradient-accumulation 2 --eval-steps 0`);
      assertTrained(at("05_train"), fullRun, { steps: 3, rate: 1e-3, rows: full.length });
      assertEquals(fullRun.numbers.trainable, sum(elements(at("01_convert")).values()));
      const firstRows = logOf(at("05_train")).updates[0]!.rows as number[][];
      assertEquals(firstRows.map((rows) => rows.length), [2, 2]);
      const again = await losses({ model: at("05_train/model"), dataset: at("03_dataset") }, firstRows[0]!);
      assertAlmostEquals(again.evaluation.evalLoss, fullRun.numbers.best_eval_loss as number, 1e-5);
      const nothing = await stage(dir, "07_merge");
      assertEquals(nothing.numbers, { nothing_to_merge: true, model: "artifacts/05_train/model" });

      // Another run in the same folder, after the finished one: it begins anew and leaves no trace of the other.
      const split = (await packed("bfd_split", "--loss completion")).numbers as Record<string, Numbers>;
      assertEquals(split.train!.tokens, none.train!.tokens);
      assertLess(split.train!.learnt_tokens!, none.train!.learnt_tokens!);
      await stage(dir, "02_load", "--mode lora");
      await stage(dir, "04_lora", "--r 4 --alpha 8 --target-modules q_proj,v_proj --rslora");
      const few = "--max-steps 3 --batch-size 2 --learning-rate 1e-2 --optimizer adamw --load-best false";
      const loraRun = await stage(dir, "05_train", `${few} --eval-steps 0 --save-steps 0`);
      assertTrained(at("05_train"), loraRun, { steps: 3, rate: 1e-2, rows: split.train!.rows! });
      assertEquals(loraRun.numbers.mode, "lora");
      const fresh = elements(at("04_lora/adapter_model.safetensors"));
      assertEquals(elements(at("05_train/adapter/adapter_model.safetensors")), fresh);
      assert(!exists(at("05_train/model")), "the model of the run before is still there");
      assertNothingPartial(dir);

      // ask answers from the merge as long as it is of the adapter that is there, and says so.
      const answers = async (name: string) => {
        const { code, out, err } = await attempt(dir, "ask", "Why? --max-new-tokens 2");
        assertEquals([code, err], [0, ""]);
        assertStringIncludes(out, `\n${name} answers.\n`);
      };
      await stage(dir, "07_merge");
      await answers("artifacts/07_merge/merged_model");
      const before = contentOf(at("07_merge"));
      assertRefused(
        await attempt(dir, "07_merge", "--base nf4"),
        /its weights are not in 4 bit: merge with --base orig/,
      );
      assertEquals(contentOf(at("07_merge")), before);
      const short = "--max-steps 1 --batch-size 2 --eval-steps 0 --save-steps 0";
      await stage(dir, "05_train", `${short} --seed 1`);
      await answers("artifacts/01_convert with artifacts/05_train/adapter");

      // All weights after LoRA: the adapter is gone, and whoever would use it says what there is instead.
      for (const name of ["chat_template.jinja", "added_tokens.json"]) {
        Deno.writeTextFileSync(at(`01_convert/${name}`), "{}");
      }
      await stage(dir, "02_load", "--mode full");
      const after = await stage(dir, "05_train", `${short} --batch-size 4 --gradient-accumulation 2`);
      // Two of the three batches of an epoch, although this update is one of its two.
      assertEquals(logOf(at("05_train")).updates[0]!.epoch, 2 / 3);
      assertEquals(readJson(at("05_train/trainer_state.json")).epoch, 2 / 3);
      assert(!exists(at("05_train/adapter")), "the adapter of the run before is still there");
      const files = after.writes.map(({ path }) => path);
      for (const name of ["tokenizer.json", "chat_template.jinja", "added_tokens.json"]) {
        assert(files.includes(`model/${name}`), name);
      }
      await answers("artifacts/05_train/model");
      assertEquals((await stage(dir, "07_merge")).numbers.nothing_to_merge, true);
      assertEquals(walk(at("07_merge")), [at("07_merge/manifest.json")]);
      assertRefused(
        await attempt(dir, "08_upload", "--dry-run false --adapter-repo a/b --merged-repo a/c"),
        /^Cannot upload: all weights were trained, .*: the trained model is the folder "artifacts\/05_train\/model", which/,
      );
    }),
);

/** The lines that a task of deno.json runs, those of the tasks that it calls in their place. */
function linesOf(task: string): string[] {
  const { tasks } = readJson<{ tasks: Record<string, string> }>(`${ROOT}deno.json`);
  return tasks[task]!.split(" && ").flatMap((line) => {
    const [, name, rest] = /^deno task (\w+)(.*)$/.exec(line)!;
    return /^\d/.test(name!) ? [`${/scripts\/(\w+)\.ts/.exec(tasks[name!]!)![1]}${rest}`] : linesOf(name!);
  });
}

Deno.test(
  "the task of all stages goes through after 02 --mode full, and comes back to an adapter with the mode",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      const at = (path: string) => `${dir}/artifacts/${path}`;
      const all = linesOf("all").map((line) => line.split(" "));
      assertEquals(all.map(([script]) => script!.slice(0, 2)), ["01", "02", "03", "04", "05", "06", "07", "08"]);
      /** Runs the task; says which stages were at work. */
      const runAll = async () => {
        const worked: string[] = [];
        for (const [script, ...words] of all) {
          const { code, out, err } = await attempt(dir, script!, words.join(" "));
          assertEquals([code, err], [0, ""], `${script}\n${out}${err}`);
          if (!out.includes(" is up to date (")) worked.push(script!.slice(0, 2));
        }
        return worked.join(" ");
      };
      await stage(dir, "01_convert", "--source tiny");
      await stage(dir, "02_load", "--mode full");
      await stage(dir, "03_dataset", "--source qa");
      await stage(dir, "05_train", "--max-steps 2 --batch-size 2 --learning-rate 1e-3 --eval-steps 0 --save-steps 0");
      await stage(dir, "06_evaluate", "--samples 1 --max-new-tokens 4");

      assertEquals(await runAll(), "04 07 08");
      const files = (stage: string) => walk(at(stage)).map((path) => path.slice(at(stage).length + 1)).sort();
      const numbers = (stage: string) => readJson<Manifest>(at(`${stage}/manifest.json`)).numbers;
      const model = "artifacts/05_train/model";
      assertEquals([files("04_lora"), numbers("04_lora")], [["manifest.json"], { nothing_to_adapt: true }]);
      assertEquals([files("07_merge"), numbers("07_merge")], [["manifest.json"], { nothing_to_merge: true, model }]);
      const listed = numbers("08_upload").listed as { path: string }[];
      assertEquals(
        listed.map(({ path }) => `model/${path}`),
        files("05_train").filter((path) => /^model\//.test(path)),
      );
      const evaluated = readJson<Manifest>(at("06_evaluate/manifest.json")).reads.map(({ path }) => path);
      assert(evaluated.includes(`${model}/model.safetensors`) && !evaluated.some((path) => path.includes("adapter")));
      assertEquals(await runAll(), "");

      // Another mode: everything behind it is made again, and each stage finds what is there now.
      await stage(dir, "02_load", "--mode qlora");
      assertEquals(await runAll(), "04 05 06 07 08");
      assert(files("04_lora").includes("adapter_model.safetensors"));
      assert(files("05_train").includes("adapter/adapter_model.safetensors") && !exists(at("05_train/model")));
      assert(files("07_merge").includes("merged_model/model.safetensors"));
      assertEquals([numbers("05_train").mode, numbers("08_upload").files], ["qlora", files("07_merge").length + 1]);
    }),
);
