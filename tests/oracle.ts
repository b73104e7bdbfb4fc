/**
 * Lets the Hugging Face stack judge what the stages write: runs them on the fixture into a folder of their own, adds our
 * logits and answers, and shows every difference that oracle.py measures beside its bound. It installs nothing.
 *
 *   deno task oracle --python PATH              a Python with torch, transformers, peft and trl
 *   deno task oracle --python PATH --work DIR   keeps the artifacts in DIR: a second run makes only what has changed
 */
import { TextLineStream } from "@std/streams";
import { readRows } from "../lib/data/dataset.ts";
import { writeSafetensors } from "../lib/data/safetensors.ts";
import { readTemplate } from "../lib/data/template.ts";
import { loadTokenizer } from "../lib/data/tokenizer.ts";
import { generateAll } from "../lib/model/generate.ts";
import { logitsOf } from "../lib/model/llama.ts";
import { flags, unset } from "../lib/run/flags.ts";
import { writeJson } from "../lib/data/files.ts";
import { duration, table } from "../lib/run/print.ts";

const opt = flags(import.meta, {
  python: unset, // a Python that has the libraries
  work: unset, // folder for the artifacts; a temporary one unless given
  keep: false, // leave the temporary folder
  force: false, // run the stages again that --work has
  out: unset, // FILE for the checks as JSON
}, { stage: false });

/** One measurement, passed at `bound` or below; without a bound it is told and not judged. */
interface Check {
  readonly subject: string;
  readonly check: string;
  /** Null where it is not a finite number. */
  readonly measured: number | null;
  readonly bound: number | null;
  readonly of?: string;
}

/** What our generator wrote, and what `generate` does with, at each token, the lead of the likeliest over the next. */
interface Answers {
  readonly asked: Asked;
  readonly theirs: readonly { readonly ids: readonly number[]; readonly margins: readonly number[] }[];
}

interface Asked {
  readonly subject: string;
  readonly model: string;
  readonly penalty: number;
  readonly max_new_tokens: number;
  readonly prompts: readonly (readonly number[])[];
  readonly answers: readonly (readonly number[])[];
}

/** A line of a run's log and what PyTorch makes of it. */
interface Pair {
  readonly run: string;
  readonly ours: Readonly<Record<string, unknown>>;
  readonly theirs: Readonly<Record<string, unknown>>;
}

const LIBRARIES = ["torch", "transformers", "peft", "trl", "datasets", "tokenizers", "safetensors"];
const PINNED = "torch==2.13.0 transformers==5.18.0 peft==0.21.0 trl==1.13.0";
const SPLITS = ["train", "validation", "test"];
const TOKENS = 48; // of an answer at most
const root = new URL("..", import.meta.url).pathname;

// 1. The judges.
if (opt.python === unset) {
  throw new Error(
    "Cannot run the oracle without --python: make a Python that has the libraries with " +
      `"python3 -m venv hf && hf/bin/pip install ${PINNED}" and pass --python hf/bin/python`,
  );
}
const versions = new Map<string, string>();
await python(
  ["-c", "import importlib.metadata as m; [print(d.name.lower(), d.version) for d in m.distributions()]"],
  (line) => versions.set(line.split(" ")[0]!, line.split(" ")[1]!),
);
const missing = LIBRARIES.filter((name) => !versions.has(name));
if (missing.length > 0) {
  const remedy = `"${opt.python} -m pip install ${PINNED}"`;
  throw new Error(`Cannot run the oracle with "${opt.python}": it has no ${missing.join(", no ")}: run ${remedy}`);
}
console.log(
  table([LIBRARIES, LIBRARIES.map((name) => versions.get(name)!)], {
    header: true,
    align: "l".repeat(LIBRARIES.length),
  }) + "\n",
);

// 2. The stages, each into its own folder.
if (opt.work !== unset) await Deno.mkdir(opt.work, { recursive: true });
const work = await Deno.realPath(opt.work === unset ? await Deno.makeTempDir() : opt.work);
const at = (folder: string) => `${work}/${folder}`;
const dataset = at("03_dataset"), adapter = at("05_lora/adapter"), model = at("01_convert");
const train = { dataset, adapter: at("04_lora"), loadBest: false, saveSteps: 0 };
await stage("01_convert", "01_convert", { source: `${root}fixtures/tiny` });
for (const mode of ["lora", "qlora", "full"]) await stage("02_load", `02_${mode}`, { model, mode });
await stage("03_dataset", "03_dataset", { source: `${root}fixtures/qa`, tokenizer: model });
await stage("04_lora", "04_lora", { model: at("02_lora") });
// 48 updates are an epoch, the last of them with one micro-batch instead of two: the run goes beyond it.
const long = { ...train, maxSteps: 52, evalSteps: 26, gradientAccumulation: 2 };
const short = { ...train, maxSteps: 6, evalSteps: 3 };
await stage("05_train", "05_lora", { ...long, model: at("02_lora"), optimizer: "adamw" });
await stage("05_train", "05_qlora", { ...short, model: at("02_qlora"), optimizer: "adamw_8bit" });
await stage("05_train", "05_full", { ...short, model: at("02_full"), optimizer: "adamw", learningRate: 1e-3 });
const greedy = { greedy: true, repetitionPenalty: 1.1, maxNewTokens: TOKENS, samples: 5 };
await stage("06_evaluate", "06_evaluate", { ...greedy, dataset, adapter, model: at("02_lora") });
await stage("07_merge", "07_merge", { dataset, adapter, model });

// 3. Our own logits and answers.
const records = (split: string): { question: string; answer: string }[] =>
  Deno.readTextFileSync(`${root}fixtures/qa/${split}.jsonl`).trim().split("\n").map((line) => JSON.parse(line));
const tokenizer = loadTokenizer(model), template = readTemplate(`${dataset}/template.json`);
const test = readRows(`${dataset}/test.safetensors`);
const ids = [...test.inputIds.subarray(0, test.rowOffsets[1])];
const merged = "07_merge/merged_model";
const models = [
  "01_convert",
  "01_convert+04_lora",
  "01_convert+05_lora/adapter",
  "01_convert+07_merge/lora_adapters",
  merged,
  "02_qlora",
  "02_qlora+05_qlora/adapter",
  "05_full/model",
];
const logits = new Map<string, Float32Array<ArrayBuffer>>();
for (const key of models) {
  const [folder, adapter] = key.split("+").map(at);
  const rows = await logitsOf({ model: folder!, adapter }, ids);
  logits.set(key, Float32Array.from(rows.flatMap((row) => [...row])));
}
await writeSafetensors(
  at("logits.safetensors"),
  [...logits].map(([name, values]) => ({
    name,
    dtype: "F32",
    shape: [ids.length, values.length / ids.length],
    data: () => new Uint8Array(values.buffer),
  })),
);
const system = { role: "system", content: template.source.system };
await writeJson(at("told.json"), {
  ids,
  models,
  max_seq_length: Number(test.metadata.max_seq_length),
  messages: Object.fromEntries(SPLITS.map((split) => [
    split,
    records(split).map(({ question, answer }) => [
      system,
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]),
  ])),
  answers: [await answersOf(merged, 1), await answersOf(merged, 1.1), ...evaluated()],
  runs: { "05_lora": "01_convert+04_lora", "05_qlora": "02_qlora+04_lora", "05_full": "01_convert" },
});

// 4. What the judges say.
const checks: Check[] = [], pairs: Pair[] = [];
await timed("oracle.py", () =>
  python([new URL("oracle.py", import.meta.url).pathname, work], (line) => {
    const said = JSON.parse(line) as Check | Answers | Pair;
    if ("run" in said) pairs.push(said);
    else if ("asked" in said) judgeAnswers(said);
    else checks.push(said);
  }));
for (const run of new Set(pairs.map(({ run }) => run))) judgeRun(run, pairs.filter((pair) => pair.run === run));

checks.sort((a, b) => a.subject < b.subject ? -1 : a.subject > b.subject ? 1 : 0);
const passed = ({ measured, bound }: Check) => bound === null || (measured !== null && measured <= bound);
const failed = checks.filter((check) => !passed(check));
console.log(
  "\n" + table(
    [
      ["artifact", "check", "compared", "measured", "bound", ""],
      ...checks.map((check, i) => [
        check.subject === checks[i - 1]?.subject ? "" : check.subject,
        check.check,
        check.of ?? "",
        check.measured === null ? "not a number" : show(check.measured),
        check.bound === null ? "none" : show(check.bound),
        check.bound === null ? "told" : passed(check) ? "ok" : "FAILED",
      ]),
    ],
    { header: true, align: "lllrrl" },
  ),
);
console.log(
  "\nFiles in 4 bit and the 8-bit optimizer are judged by bitsandbytes' formulas in PyTorch, not by bitsandbytes, whose\n" +
    "kernels for the CPU differ from those for CUDA. All else is what the libraries named above made of the files.",
);
if (opt.out !== unset) await writeJson(opt.out, checks);
if (failed.length > 0) {
  throw new Error(
    `Cannot accept what the stages wrote: ${failed.length} of ${checks.length} checks failed, ` +
      `first "${failed[0]!.subject}: ${failed[0]!.check}": see ${work}`,
  );
}
console.log(`\nAll ${checks.filter(({ bound }) => bound !== null).length} checks passed.`);
if (opt.work === unset && !opt.keep) await Deno.remove(work, { recursive: true });
else console.log(`The artifacts are in ${work}`);

/** The table of a replayed run, every tenth update of a long one, and its checks. */
function judgeRun(run: string, all: readonly Pair[]): void {
  const updates = all.filter(({ ours }) => "loss" in ours), evaluations = all.filter(({ ours }) => "eval_loss" in ours);
  const number = (value: unknown) => value as number;
  const apart = (pairs: readonly Pair[], name: string) =>
    pairs.map(({ ours, theirs }) => Math.abs(number(ours[name]) / number(theirs[name]) - 1));
  const [losses, norms] = [apart(updates, "loss"), apart(updates, "grad_norm")];
  const shown = updates.map(({ ours, theirs }, i) => [
    String(ours.step),
    show(number(ours.learning_rate)),
    number(ours.loss).toFixed(6),
    number(theirs.loss).toFixed(6),
    show(losses[i]!),
    number(ours.grad_norm).toFixed(6),
    number(theirs.grad_norm).toFixed(6),
    show(norms[i]!),
  ]);
  const some = shown.filter((_, i) => shown.length < 10 || i === 0 || (i + 1) % 10 === 0 || i + 1 === shown.length);
  console.log(`\n${run} again in PyTorch; differences in parts of PyTorch's number`);
  const header = ["update", "learning rate", "loss", "PyTorch", "apart", "gradient norm", "PyTorch", "apart"];
  console.log(table([header, ...some], { header: true, align: "r".repeat(header.length) }));

  const same = ({ ours, theirs }: Pair) => ours.tokens === theirs.tokens && `${ours.rows}` === `${theirs.rows}`;
  const rates = updates.map(({ ours, theirs }) => Math.abs(number(ours.learning_rate) - number(theirs.learning_rate)));
  const { mean, largest, values } = all.at(-1)!.ours;
  const is8 = run === "05_qlora", of = `${updates.length} updates`;
  const parameters = `${number(values).toLocaleString("en-US")} values`;
  const add = (check: string, measured: number, bound: number | null, of: string) =>
    checks.push({ subject: run, check, measured, bound, of });
  add("dataset rows and labelled tokens", updates.filter((pair) => !same(pair)).length, 0, of);
  add("learning rates, absolute", Math.max(...rates), 1e-12, of);
  add("losses", Math.max(...losses), 2e-5, of);
  // clip_grad_norm_ adds up large tensors in float32: on 857,216 gradients it is 4e-6 below its own sum in float64, ours is not.
  add("gradient norms", Math.max(...norms), 2e-5, of);
  add("eval_loss", Math.max(...apart(evaluations, "eval_loss")), 2e-5, `${evaluations.length} evaluations`);
  add("final parameters, mean", number(mean), is8 ? 5e-6 : 1e-6, parameters);
  // Where a moment falls on the border of two 8-bit codes, rounding decides, and one code moves one entry by up to the rate.
  add("final parameters, largest", number(largest), is8 ? null : 1e-4, parameters);
}

/** Greedy ids must be the same; where two tokens are within 1e-4 of each other rounding may choose, and the answer ends there. */
function judgeAnswers({ asked, theirs }: Answers): void {
  let wrong = 0, ties = 0, tokens = 0;
  asked.answers.forEach((ours, i) => {
    const { ids, margins } = theirs[i]!;
    const first = Array.from({ length: Math.max(ours.length, ids.length) }, (_, t) => t).find((t) =>
      ours[t] !== ids[t]
    );
    tokens += first ?? ours.length;
    if (first === undefined) return;
    if ((margins[first] ?? Infinity) < 1e-4) ties++;
    else wrong++;
  });
  checks.push({
    subject: asked.subject,
    check: `greedy ids, repetition penalty ${asked.penalty}`,
    measured: wrong,
    bound: 0,
    of: `${asked.answers.length} answers, ${tokens} tokens, ${ties} near-ties`,
  });
}

/** What our generator writes after the first questions of the test split. */
async function answersOf(model: string, penalty: number): Promise<Asked> {
  const prompts = records("test").slice(0, 5).map(({ question }) => tokenizer.encode(template.renderPrompt(question)));
  const how = { greedy: true, repetitionPenalty: penalty, maxNewTokens: TOKENS };
  const answers = (await generateAll({ model: at(model), ...how }, prompts)).map(({ ids }) => ids);
  return { subject: model, model, penalty, max_new_tokens: TOKENS, prompts, answers };
}

/** What stage 06 wrote, base and tuned. */
function evaluated(): Asked[] {
  type Written = { readonly prompt: string; readonly ids: readonly number[] };
  type Question = { readonly prompt: string } & Record<"base" | "tuned", { readonly ids: readonly number[] }>;
  const { questions, samples } = JSON.parse(Deno.readTextFileSync(at("06_evaluate/evaluation.json"))) as {
    questions: Question[];
    samples: Written[];
  };
  const group = (model: string, asked: readonly Written[]): Asked => ({
    subject: "06_evaluate",
    model,
    penalty: greedy.repetitionPenalty,
    max_new_tokens: TOKENS,
    prompts: asked.map(({ prompt }) => tokenizer.encode(prompt)),
    answers: asked.map(({ ids }) => ids),
  });
  return [
    group("01_convert", questions.map(({ prompt, base }) => ({ prompt, ids: base.ids }))),
    group("01_convert+05_lora/adapter", [
      ...questions.map(({ prompt, tuned }) => ({ prompt, ids: tuned.ids })),
      ...samples,
    ]),
  ];
}

/** Runs a stage and shows its output only where it fails. */
async function stage(script: string, folder: string, args: Record<string, string | number | boolean>): Promise<void> {
  const options = Object.entries(args).map(([key, value]) =>
    `--${key.replace(/[A-Z]/g, (letter) => "-" + letter.toLowerCase())}=${value}`
  );
  await timed(folder, async () => {
    const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: [
        "run",
        "-A",
        `scripts/${script}.ts`,
        "--recipe=tiny",
        `--force=${opt.force}`,
        `--out=${at(folder)}`,
        ...options,
      ],
      cwd: root,
    }).output();
    if (success) return;
    for (const output of [stdout, stderr]) console.error(new TextDecoder().decode(output));
    throw new Error(`Cannot go on: scripts/${script}.ts failed, its output is above`);
  });
}

async function timed(name: string, work: () => Promise<void>): Promise<void> {
  const began = performance.now();
  await work();
  console.log(`${name.padEnd(12)}  ${duration(performance.now() - began)}`);
}

/** Runs Python with these arguments; every line that it prints goes to `onLine`. */
async function python(args: readonly string[], onLine: (line: string) => void): Promise<void> {
  // One thread: the models are small, and the sums are the same on every machine.
  const env = {
    HF_HUB_OFFLINE: "1",
    TOKENIZERS_PARALLELISM: "false",
    OMP_NUM_THREADS: "1",
    PYTHONDONTWRITEBYTECODE: "1",
  };
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(opt.python, { args: [...args], env, stdout: "piped" }).spawn();
  } catch (error) {
    throw new Error(`Cannot run "${opt.python}": ${(error as Error).message}`);
  }
  const lines = child.stdout.pipeThrough(new TextDecoderStream()).pipeThrough(new TextLineStream());
  for await (const line of lines) if (line !== "") onLine(line);
  const { code } = await child.status;
  if (code !== 0) throw new Error(`Cannot go on: "${opt.python}" ended with ${code}: what it said is above`);
}

function show(x: number): string {
  return Number.isInteger(x) ? String(x) : x >= 0.01 ? x.toPrecision(2) : x.toExponential(1);
}
