/** Model cards: front matter that parses, the prompt to the letter, numbers from the manifests and nothing of this machine. */
import { assert, assertEquals, assertMatch, assertNotMatch, assertStringIncludes, assertThrows } from "@std/assert";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate } from "../../lib/data/template.ts";
import { adapterCard, type CardFacts, checkLicense, hubName, modelCard } from "../../lib/hub/card.ts";

const PROMPT = chatTemplate({ template: BLOG_TEMPLATE, system: BLOG_SYSTEM, eos_token: "<|endoftext|>" })
  .renderPrompt("{question}");
const FACTS: CardFacts = {
  modelRepo: "you/medslm-sft",
  adapterRepo: "you/medslm-sft-lora",
  base: "Saminx22/MedSLM",
  license: "apache-2.0",
  prompt: PROMPT,
  parameters: 329_910_272,
  dtype: "float16",
  lora: { r: 16, lora_alpha: 32, target_modules: ["k_proj", "q_proj"] },
  dataset: {
    flags: { source: "hf:you/medical-qa@abc", packing: "bfd", maxSeqLength: 1024, loss: "completion" },
    numbers: { train: { examples: 51_000, tokens: 9_180_000, median_length: 171.5, longest: 1024, truncated: 3 } },
  },
  training: {
    flags: {
      learningRate: 2e-4,
      batchSize: 4,
      gradientAccumulation: 8,
      optimizer: "adamw_8bit",
      model: "artifacts/02_load",
    },
    numbers: {
      ...{ mode: "qlora", steps: 4329, batches_per_epoch: 11_544, first_loss: 3.0001, last_loss: 2.19758 },
      ...{ losses: [3, 2], best_step: 4329, tokens_per_second: 25_123.6, note: "/home/someone/data" },
    },
    device: "NVIDIA H200",
    seconds: 2580.4,
  },
  evaluation: {
    flags: { samples: 50, greedy: true },
    numbers: {
      base: { perplexity: 19.3149, eval_loss: 2.96 },
      tuned: { perplexity: 9.12, eval_loss: 2.2105, tokens: 12_345 },
      difference: { perplexity: -10.1949, low: -10.5, high: -9.9, confidence: 0.95, resamples: 2000, documents: 40 },
      ...{ length: { mean: 80.25, min: 12, max: 190 }, samples: 50 },
    },
  },
};

/** The front matter as name → value or list; throws on anything but the plain form that the cards use. */
function frontMatter(card: string): Record<string, unknown> {
  const lines = /^---\n([^]*?)\n---\n/.exec(card)![1]!.split("\n");
  const result: Record<string, unknown> = {};
  const value = (text: string) => text.startsWith('"') ? JSON.parse(text) : text;
  let list: unknown[] = [];
  for (const line of lines) {
    const [, item] = /^- (.+)$/.exec(line) ?? [];
    const [, key, rest] = /^([a-z_]+):(?: (.+))?$/.exec(line) ?? [];
    if (item !== undefined) list.push(value(item));
    else if (key === undefined) throw new SyntaxError(line);
    else if (rest === undefined) result[key] = list = [];
    else result[key] = value(rest);
  }
  return result;
}

Deno.test("modelCard() has the front matter of a fine-tuned transformers model", () => {
  const { tags, ...rest } = frontMatter(modelCard(FACTS));
  assertEquals(rest, {
    base_model: "Saminx22/MedSLM",
    base_model_relation: "finetune",
    library_name: "transformers",
    pipeline_tag: "text-generation",
    language: "en",
    license: "apache-2.0",
    datasets: ["you/medical-qa"],
  });
  assert((tags as string[]).includes("medical"));
});

Deno.test("adapterCard() has the front matter by which the hub ties an adapter to its base", () => {
  const front = frontMatter(adapterCard(FACTS));
  assertEquals(front.library_name, "peft");
  assertEquals(front.base_model, "Saminx22/MedSLM");
  assertEquals(front.tags, ["base_model:adapter:Saminx22/MedSLM", "lora", "sft", "transformers", "medical"]);
  const bare = frontMatter(adapterCard({ ...FACTS, base: "", license: "", dataset: undefined }));
  assertEquals(["base_model", "license", "datasets"].filter((key) => key in bare), []);
});

Deno.test("both cards hold the prompt to the letter, as text and as a Python string", () => {
  for (const card of [modelCard(FACTS), adapterCard(FACTS)]) {
    assertStringIncludes(card, "```text\n" + PROMPT.replace(/\n$/, "") + "\n```");
    const literal = /^prompt = (".*")\.replace\("\{question\}"/m.exec(card)![1]!;
    assertEquals(JSON.parse(literal), PROMPT);
    assertStringIncludes(card, "the answer begins right after the last line, which ends\nwith a line break:");
  }
});

Deno.test("both cards say that the model is for research and not for clinical use, and how to load it", () => {
  const [model, adapter] = [modelCard(FACTS), adapterCard(FACTS)];
  for (const card of [model, adapter]) {
    assertStringIncludes(card, "research model, not for clinical use");
    assertStringIncludes(card, "deno task ask");
    assertEquals((card.match(/^```/gm) ?? []).length % 2, 0);
  }
  assertStringIncludes(model, 'AutoModelForCausalLM.from_pretrained("you/medslm-sft", torch_dtype="auto")');
  assertStringIncludes(adapter, 'PeftModel.from_pretrained(model, "you/medslm-sft-lora")');
  assertStringIncludes(adapter, "[you/medslm-sft](https://huggingface.co/you/medslm-sft)");
});

Deno.test("a card tells what the manifests hold in sentences and tables for people, and nothing that they do not hold", () => {
  const card = modelCard(FACTS);
  for (
    const part of [
      "329,910,272 parameters",
      "Fine-tuned on NVIDIA H200 in 43 min.",
      "| Method | QLoRA: the base in 4 bits (NF4), the adapter in float32 |",
      "| Updates | 4,329 (3 epochs) |",
      "| Rows in an update | 4 x 8 (batch size x gradient accumulation) |",
      "| Peak learning rate | 0.0002 |",
      "| Training loss | 3 at the first update, 2.198 at the last |",
      "| Speed | 25,124 tokens/s |",
      "From `hf:you/medical-qa@abc`. Rows have at most 1,024 tokens, examples packed into them by best fit, and only the answers are learnt.",
      "| train | 51,000 | 9,180,000 | 171.5 | 1,024 | 3 |",
      "on 12,345 held-out tokens",
      "| Perplexity | 19.31 | 9.12 |",
      "by −10.19, with 95 % confidence by −10.5 to −9.9 (2,000 resamples of 40 documents)",
      "50 answers generated greedily have 80.25 words on average (12 to 190).",
    ]
  ) assertStringIncludes(card, part);
  for (const name of ["Optimizer", "Schedule", "Validation loss", "Seed", "validation", "test"]) {
    assert(!card.includes(`| ${name} |`), `${name} is not known`);
  }
  assertNotMatch(card, /someone|02_load|losses|undefined|NaN/);
  const prose = card.slice(card.indexOf("## Training"));
  assertNotMatch(prose, /\w_\w|\b[a-z]+[A-Z]|\w\.[a-z]+ \|/, "names of a program's fields");
});

Deno.test("a card's tables are none when nothing is known of their rows", () => {
  const nothing = { flags: {}, numbers: {} };
  const card = modelCard({ ...FACTS, dataset: nothing, training: nothing, evaluation: nothing });
  assertStringIncludes(card, "Fine-tuned on an unnamed device.");
  assertNotMatch(card, /^\|/m);
  assertNotMatch(card, /undefined|NaN/);
});

Deno.test("checkLicense() takes the hub's identifiers, and the card has them as they are", () => {
  for (const id of ["apache-2.0", "cc-by-nc-4.0", "openrail++", "llama3.1", "other"]) {
    assertEquals(checkLicense(id), id);
    assertEquals(frontMatter(adapterCard({ ...FACTS, license: id })).license, id);
  }
  assertStringIncludes(modelCard(FACTS), "\nlicense: apache-2.0\n");
  for (const id of ["Apache-2.0", "Apache 2.0", "MIT", "apache-2.0\nbase_model: x", "-x", '"mit"']) {
    assertThrows(() => checkLicense(id), RangeError, `Cannot use license "${id}": `);
  }
});

Deno.test("a card without manifests says that there is no record, and states no number of its own", () => {
  const card = modelCard({ ...FACTS, dataset: undefined, training: undefined, evaluation: undefined });
  assertStringIncludes(card, "No record of the training run");
  assertStringIncludes(card, "No evaluation was at hand");
  assert(!/loss|perplexity/.test(card));
});

Deno.test("a prompt that holds a code fence does not break the card", () => {
  assertMatch(modelCard({ ...FACTS, prompt: "```\n{question}" }), /\n````text\n```\n\{question\}\n````\n/);
});

Deno.test("hubName() takes repository names and refuses paths and 4-bit copies", () => {
  assertEquals(hubName("Saminx22/MedSLM"), "Saminx22/MedSLM");
  for (const name of ["artifacts/01_convert", "./model", "/data/model", "unsloth/x-bnb-4bit", "model", "a/b/c"]) {
    assertEquals(hubName(name), "", name);
  }
});
