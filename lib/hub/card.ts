/**
 * Model cards (README.md) for the two repositories: front matter that the hub indexes, what the model is, how it was trained and measured, how
 * to load it. They tell only what they are given: a number that no manifest holds is not in the card, and no path of this machine is.
 */

/** A stage's manifest, as far as a card tells it. */
export interface StageFacts {
  readonly flags: Readonly<Record<string, unknown>>;
  readonly numbers: Readonly<Record<string, unknown>>;
  readonly device?: string | null;
  readonly seconds?: number;
}

/** What both cards are made from. */
export interface CardFacts {
  /** `owner/name` of the merged model, "" when it is not uploaded. */
  readonly modelRepo: string;
  /** `owner/name` of the adapter, "" when it is not uploaded. */
  readonly adapterRepo: string;
  /** `owner/name` of the 16-bit base, "" when it is not on the hub. */
  readonly base: string;
  /** The hub's identifier, such as "apache-2.0"; "" leaves it out. */
  readonly license: string;
  /** The prompt to the letter, with `{question}` where the question goes. */
  readonly prompt: string;
  readonly parameters: number;
  /** Of the merged weights. */
  readonly dtype: string;
  readonly lora: {
    readonly r: number;
    readonly lora_alpha: number;
    readonly use_rslora?: boolean;
    readonly target_modules: readonly string[];
  };
  readonly dataset?: StageFacts | undefined;
  readonly training?: StageFacts | undefined;
  readonly evaluation?: StageFacts | undefined;
}

const NOT_CLINICAL = [
  "**This is a research model, not for clinical use.** It is small, it states falsehoods fluently, and nobody has checked its answers: do not use it",
  "for diagnosis, treatment, triage or any other decision about a person's health.",
].join("\n");

/** `name` when others can find a 16-bit base by it, "" when it looks like a path here or is the name of a 4-bit copy. */
export function hubName(name: string): string {
  return /^[A-Za-z0-9][\w.-]*\/[\w.-]+$/.test(name) && !/^artifacts\/|-bnb-4bit$/.test(name) ? name : "";
}

/**
 * Returns `id` when it can be one of the hub's license identifiers; throws a RangeError otherwise. The hub's list grows, so that it is not
 * repeated here.
 */
export function checkLicense(id: string): string {
  if (!/^[a-z0-9][a-z0-9.+-]*$/.test(id)) {
    throw new RangeError(
      `Cannot use license "${id}": one of the hub's identifiers is wanted, in lower case, such as apache-2.0, cc-by-nc-4.0 or other`,
    );
  }
  return id;
}

/** The card of the merged model, as Markdown. */
export function modelCard(facts: CardFacts): string {
  const { modelRepo, adapterRepo, base, lora } = facts;
  const of = base === "" ? "a pretrained base" : `[${base}](https://huggingface.co/${base})`;
  return document([
    frontMatter(facts, {
      library: "transformers",
      extra: base === "" ? [] : ["base_model_relation: finetune"],
      tags: ["llama", "medical", "question-answering", "sft", "lora"],
    }),
    `# ${modelRepo.split("/").at(-1)}`,
    `A Llama-architecture language model with ${
      number(facts.parameters)
    } parameters that answers medical questions in English: ${of}, fine-tuned with\n` +
    `LoRA (r = ${lora.r}, alpha = ${lora.lora_alpha}) and merged, W + (alpha / ${
      lora.use_rslora ? "√r" : "r"
    }) · B · A summed in float64 and stored as ${facts.dtype}.` +
    (adapterRepo === "" ? "" : `\nThe adapter alone is in [${adapterRepo}](https://huggingface.co/${adapterRepo}).`),
    NOT_CLINICAL,
    promptSection(facts.prompt),
    "## Loading",
    python(facts.prompt, [
      "from transformers import AutoModelForCausalLM, AutoTokenizer",
      "",
      `tokenizer = AutoTokenizer.from_pretrained(${text(modelRepo)})`,
      `model = AutoModelForCausalLM.from_pretrained(${text(modelRepo)}, torch_dtype="auto")`,
    ]),
    `In the project that made it (TypeScript on Deno and WebGPU), with this repository's files in a folder \`medslm/\`:`,
    fence("sh", 'deno task ask "How is hypertension diagnosed?" --model medslm'),
    ...measured(facts),
  ]);
}

/** The card of the adapter, as Markdown. */
export function adapterCard(facts: CardFacts): string {
  const { modelRepo, adapterRepo, base, lora } = facts;
  return document([
    frontMatter(facts, {
      library: "peft",
      extra: [],
      tags: [...(base === "" ? [] : [`base_model:adapter:${base}`]), "lora", "sft", "transformers", "medical"],
    }),
    `# ${adapterRepo.split("/").at(-1)}`,
    `A LoRA adapter (r = ${lora.r}, alpha = ${lora.lora_alpha}, on ${
      lora.target_modules.join(", ")
    }) for a Llama-architecture language model with\n` +
    `${number(facts.parameters)} parameters${
      base === "" ? "" : `, [${base}](https://huggingface.co/${base})`
    }. It makes a text completer answer medical questions in English.` +
    (modelRepo === ""
      ? ""
      : `\nMerged, it is [${modelRepo}](https://huggingface.co/${modelRepo}), which needs no base and no PEFT.`),
    NOT_CLINICAL,
    promptSection(facts.prompt),
    "## Loading",
    base === ""
      ? "The base is not on the hub: `BASE` is the folder `artifacts/01_convert` that the project's first step writes."
      : "Where the base repository holds the original MedSLM tensors (`tok_emb.weight`, …), which transformers does not read, convert them with the\n" +
        "project's first step and use its folder `artifacts/01_convert` as `BASE`.",
    python(facts.prompt, [
      "from peft import PeftModel",
      "from transformers import AutoModelForCausalLM, AutoTokenizer",
      "",
      `BASE = ${text(base === "" ? "artifacts/01_convert" : base)}`,
      `tokenizer = AutoTokenizer.from_pretrained(${text(adapterRepo)})`,
      `model = AutoModelForCausalLM.from_pretrained(BASE, torch_dtype="auto")`,
      `model = PeftModel.from_pretrained(model, ${text(adapterRepo)})`,
    ]),
    `In the project that made it (TypeScript on Deno and WebGPU), with this repository's files in a folder \`adapter/\`:`,
    fence("sh", 'deno task ask "How is hypertension diagnosed?" --model artifacts/01_convert --adapter adapter'),
    ...measured(facts),
  ]);
}

function frontMatter(
  { base, license, dataset }: CardFacts,
  { library, extra, tags }: { library: string; extra: readonly string[]; tags: readonly string[] },
): string {
  const source = /^hf:(?:datasets\/)?([^@/]+\/[^@]+)/.exec(String(dataset?.flags.source ?? ""))?.[1];
  return [
    "---",
    ...(base === "" ? [] : [`base_model: ${yaml(base)}`]),
    ...extra,
    `library_name: ${library}`,
    "pipeline_tag: text-generation",
    "language: en",
    ...(license === "" ? [] : [`license: ${yaml(license)}`]),
    ...(source === undefined ? [] : ["datasets:", `- ${yaml(source)}`]),
    "tags:",
    ...tags.map((tag) => `- ${yaml(tag)}`),
    "---",
  ].join("\n");
}

function promptSection(prompt: string): string {
  return [
    "## Prompt",
    "",
    "The model knows this template and no other; `{question}` stands for the question, and the answer begins right after the last line, which ends",
    `with ${prompt.endsWith("\n") ? "a line break" : "no line break"}:`,
    "",
    fence("text", prompt.replace(/\n$/, "")),
  ].join("\n");
}

function python(prompt: string, loading: readonly string[]): string {
  return fence(
    "python",
    [
      ...loading,
      "",
      `prompt = ${text(prompt)}.replace("{question}", "How is hypertension diagnosed?")`,
      'inputs = tokenizer(prompt, return_tensors="pt")',
      "ids = model.generate(**inputs, max_new_tokens=300, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)",
      'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ].join("\n"),
  );
}

/** Training, data and evaluation as far as the manifests tell; a stage that is not given is said to be missing. */
function measured({ dataset, training, evaluation }: CardFacts): string[] {
  return [
    "## Training",
    ...(training === undefined
      ? ["No record of the training run was at hand when this card was written."]
      : trained(training)),
    ...(dataset === undefined ? [] : ["### Data", ...data(dataset)]),
    "## Evaluation",
    ...(evaluation === undefined ? ["No evaluation was at hand when this card was written."] : evaluated(evaluation)),
  ].filter((block) => block !== "");
}

function trained({ flags, numbers, device, seconds }: StageFacts): string[] {
  const [of, is] = [reader(flags), reader(numbers)];
  const [steps, batches, accumulation] = [numbers.steps, numbers.batches_per_epoch, flags.gradientAccumulation].map(
    Number,
  );
  const epochs = Number((steps! / Math.ceil(batches! / accumulation!)).toPrecision(3));
  return [
    `Fine-tuned on ${device ?? "an unnamed device"}${seconds === undefined ? "" : ` in ${time(seconds)}`}.`,
    grid(["Setting", "Value"], [
      ["Method", words(METHODS, numbers.mode)],
      [
        "Updates",
        told`${is("steps")}${Number.isFinite(epochs) ? ` (${epochs} ${epochs === 1 ? "epoch" : "epochs"})` : ""}`,
      ],
      [
        "Rows in an update",
        told`${of("batchSize")} x ${of("gradientAccumulation")} (batch size x gradient accumulation)`,
      ],
      ["Peak learning rate", of("learningRate")],
      ["Schedule", told`${of("scheduler")}, ${is("warmup_steps")} updates of warm-up`],
      ["Optimizer", told`${words(OPTIMIZERS, flags.optimizer)}, β₁ ${of("beta1")}, β₂ ${of("beta2")}, ε ${of("eps")}`],
      ["Weight decay", of("weightDecay")],
      ["Largest gradient norm", flags.maxGradNorm === 0 ? "not limited" : of("maxGradNorm")],
      ["Seed", of("seed")],
    ]),
    grid(["Result", "Value"], [
      ["Trained parameters", is("trainable")],
      ["Training loss", told`${is("first_loss")} at the first update, ${is("last_loss")} at the last`],
      ["Validation loss", told`${is("first_eval_loss")} before training, ${is("last_eval_loss")} after it`],
      ["Lowest validation loss", told`${is("best_eval_loss")}, at update ${is("best_step")}`],
      ["Speed", told`${is("tokens_per_second", 0)} tokens/s`],
    ]),
  ];
}

function data({ flags, numbers }: StageFacts): string[] {
  const source = String(flags.source ?? "");
  const of = reader(flags);
  const told_of = [words(PACKINGS, flags.packing), words(LOSSES, flags.loss)].filter((part) => part !== undefined);
  const rows = told`Rows have at most ${of("maxSeqLength")} tokens${told_of.map((part) => `, ${part}`).join("")}.`;
  const splits = ["train", "validation", "test"].map((split) => {
    const is = reader(numbers[split]);
    return [split, is("examples"), is("tokens"), is("median_length"), is("longest"), is("truncated")];
  });
  return [
    [source.startsWith("hf:") ? `From \`${source}\`.` : "From files that are not on the hub.", rows ?? ""].join(" ")
      .trim(),
    grid(["Split", "Examples", "Tokens", "Median length", "Longest", "Cut short"], splits),
  ];
}

function evaluated({ flags, numbers }: StageFacts): string[] {
  const [base, tuned, difference] = [numbers.base, numbers.tuned, numbers.difference].map(reader) as [Read, Read, Read];
  const [is, of, answers, references] = [numbers, flags, numbers.length, numbers.length_of_references].map(reader) as [
    Read,
    Read,
    Read,
    Read,
  ];
  const confidence = Number((numbers.difference as Record<string, unknown> | undefined)?.confidence);
  const interval = told`The perplexity differs by ${difference("perplexity")}, with ${
    Number.isNaN(confidence) ? undefined : String(100 * confidence)
  } % confidence by ${difference("low")} to ${difference("high")} (${difference("resamples")} resamples of ${
    difference("documents")
  } documents).`;
  const sampling = flags.greedy === true
    ? "greedily"
    : told`with temperature ${of("temperature")}, top-p ${of("topP")} and repetition penalty ${
      of("repetitionPenalty")
    }`;
  const lengths = told`${is("samples")} answers generated ${sampling} have ${answers("mean")} words on average (${
    answers("min")
  } to ${answers("max")})${references("mean") === undefined ? "" : `, their references ${references("mean")}`}.`;
  return [
    told`Measured by the project on ${tuned("tokens")} held-out tokens, base and fine-tuned model alike:` ??
      "Measured by the project on held-out rows, base and fine-tuned model alike:",
    grid(["Measure", "Base", "Fine-tuned"], [
      ["Loss (nats per token)", base("eval_loss"), tuned("eval_loss")],
      ["Perplexity", base("perplexity"), tuned("perplexity")],
    ]),
    interval ?? "",
    lengths ?? "",
  ];
}

const METHODS = {
  qlora: "QLoRA: the base in 4 bits (NF4), the adapter in float32",
  lora: "LoRA, the adapter in float32",
};
const OPTIMIZERS = { adamw: "AdamW", adamw_8bit: "AdamW with 8-bit states" };
const PACKINGS = {
  bfd: "examples packed into them by best fit",
  bfd_split: "examples packed into them by best fit, long ones split",
  wrapped: "one stream of all examples cut into pieces",
  none: "one example in each",
};
const LOSSES = { all: "and every token of them is learnt", completion: "and only the answers are learnt" };

type Read = (name: string, digits?: number) => string | undefined;

/** Reads a number or a word of a manifest as people write it; undefined where it holds none. */
function reader(values: unknown): Read {
  const known = (typeof values === "object" && values !== null ? values : {}) as Readonly<Record<string, unknown>>;
  return (name, digits) => {
    const value = known[name];
    if (typeof value === "number") return digits === undefined ? number(value) : number(Number(value.toFixed(digits)));
    return typeof value === "string" && value !== "" ? value : undefined;
  };
}

function words(names: Readonly<Record<string, string>>, value: unknown): string | undefined {
  return names[String(value)] ?? (typeof value === "string" ? value : undefined);
}

/** The text, or undefined when one of its values is not known: what no manifest holds is not in the card. */
function told(parts: TemplateStringsArray, ...values: (string | undefined)[]): string | undefined {
  if (values.includes(undefined)) return undefined;
  return parts.map((part, i) => part + (values[i] ?? "")).join("");
}

/** A Markdown table; rows of which nothing is known stay out, and so does a table without rows. */
function grid(head: readonly string[], rows: readonly (readonly (string | undefined)[])[]): string {
  const known = rows.filter(([, ...values]) => values.some((value) => value !== undefined));
  if (known.length === 0) return "";
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  const rule = head.map((_, i) => i > 0 && head.length > 2 ? "---:" : "---");
  return [line(head), line(rule), ...known.map((row) => line(row.map((value) => cell(value ?? ""))))].join("\n");
}

function cell(words: string): string {
  return words.replace(/\s+/g, " ").replaceAll("|", "\\|").replaceAll("<", "&lt;");
}

/** Thousands for whole numbers, four digits for others, a true minus. */
function number(value: number): string {
  const whole = Number.isInteger(value) || Math.abs(value) >= 1000;
  return (whole ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)))).replace(/^-/, "−");
}

function time(seconds: number): string {
  const minutes = Math.round(seconds / 60);
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A string as Python and JSON read it. */
function text(value: string): string {
  return JSON.stringify(value);
}

/** A string as YAML reads it: bare where that is a string too. */
function yaml(value: string): string {
  return /^[A-Za-z][\w./+-]*$/.test(value) && !/^(true|false|null|yes|no|on|off|y|n)$/i.test(value)
    ? value
    : text(value);
}

/** A fence longer than any run of backticks inside it. */
function fence(language: string, content: string): string {
  const longest = Math.max(2, ...[...content.matchAll(/`+/g)].map(([run]) => run.length));
  const ticks = "`".repeat(longest + 1);
  return `${ticks}${language}\n${content}\n${ticks}`;
}

function document(blocks: readonly string[]): string {
  return blocks.join("\n\n") + "\n";
}
