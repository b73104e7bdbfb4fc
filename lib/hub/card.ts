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
  "This is a research model, not for clinical use. It is small, it states falsehoods fluently, and nobody has checked its answers: do not use it",
  "for diagnosis, treatment, triage or any other decision about a person's health.",
].join("\n");

/** `name` when others can find a 16-bit base by it, "" when it looks like a path here or is the name of a 4-bit copy. */
export function hubName(name: string): string {
  return /^[A-Za-z0-9][\w.-]*\/[\w.-]+$/.test(name) && !/^artifacts\/|-bnb-4bit$/.test(name) ? name : "";
}

/** The card of the merged model, as Markdown. */
export function modelCard(facts: CardFacts): string {
  const { modelRepo, adapterRepo, base, lora } = facts;
  const of = base === "" ? "its base model" : `[${base}](https://huggingface.co/${base})`;
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
    ...(base === "" ? [] : [`base_model: ${text(base)}`]),
    ...extra,
    `library_name: ${library}`,
    "pipeline_tag: text-generation",
    "language: en",
    ...(license === "" ? [] : [`license: ${text(license)}`]),
    ...(source === undefined ? [] : ["datasets:", `- ${text(source)}`]),
    "tags:",
    ...tags.map((tag) => `- ${text(tag)}`),
    "---",
  ].join("\n");
}

function promptSection(prompt: string): string {
  return [
    "## Prompt",
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

/** The manifests' settings and numbers; a stage that is not given is said to be missing. */
function measured({ dataset, training, evaluation }: CardFacts): string[] {
  const took = training?.seconds === undefined ? "" : `, ${number(Math.round(training.seconds))} s`;
  return [
    "## Training",
    training === undefined
      ? "No record of the training run was at hand when this card was written."
      : `Fine-tuned on ${
        training.device ?? "an unnamed device"
      }${took}. Settings and results as the run recorded them:`,
    ...(training === undefined ? [] : [grid("setting", training.flags), grid("result", training.numbers)]),
    ...(dataset === undefined
      ? []
      : ["### Data", sourceOf(dataset), grid("setting", dataset.flags), grid("count", dataset.numbers)]),
    "## Evaluation",
    evaluation === undefined
      ? "No evaluation was at hand when this card was written."
      : "Measured by the project on held-out rows, base and fine-tuned model alike:",
    ...(evaluation === undefined ? [] : [grid("setting", evaluation.flags), grid("result", evaluation.numbers)]),
  ].filter((block) => block !== "");
}

function sourceOf({ flags }: StageFacts): string {
  const source = String(flags.source ?? "");
  return source.startsWith("hf:") ? `From \`${source}\`.` : "From files that are not on the hub.";
}

/** A Markdown table of all scalars, nested names joined by dots; lists and paths stay out. */
function grid(heading: string, values: Readonly<Record<string, unknown>>): string {
  const rows: string[] = [];
  const add = (name: string, value: unknown) => {
    if (typeof value === "object" && value !== null && !Array.isArray(value)) {
      for (const [key, inner] of Object.entries(value)) add(name === "" ? key : `${name}.${key}`, inner);
      return;
    }
    const shown = typeof value === "number" ? number(value) : String(value);
    const isScalar = ["number", "string", "boolean"].includes(typeof value) && shown !== "";
    if (!isScalar || /[\\/]/.test(shown) || ["out", "recipe"].includes(name)) return;
    const words = name.replace(/[A-Z]/g, (letter) => " " + letter.toLowerCase()).replaceAll("_", " ");
    rows.push(`| ${cell(words)} | ${cell(shown)} |`);
  };
  add("", values);
  return rows.length === 0 ? "" : [`| ${heading} | value |`, "| --- | --- |", ...rows].join("\n");
}

function cell(words: string): string {
  return words.replace(/\s+/g, " ").replaceAll("|", "\\|").replaceAll("<", "&lt;");
}

function number(value: number): string {
  return Number.isInteger(value) ? value.toLocaleString("en-US") : String(Number(value.toPrecision(6)));
}

/** A string as YAML, Python and JSON all read it. */
function text(value: string): string {
  return JSON.stringify(value);
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
