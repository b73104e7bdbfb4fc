/** Model cards: front matter that parses, the prompt to the letter, numbers from the manifests and nothing of this machine. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate } from "../../lib/data/template.ts";
import { adapterCard, type CardFacts, hubName, modelCard } from "../../lib/hub/card.ts";

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
  dataset: { flags: { source: "hf:you/medical-qa@abc", packing: "bfd" }, numbers: { train: { rows: 51_000 } } },
  training: {
    flags: { learningRate: 2e-4, epochs: 3, model: "artifacts/02_load", out: "x", source: "/home/someone/data" },
    numbers: { last_loss: 2.1976, losses: [3, 2], best: { step: 4329 }, note: "a|b" },
    device: "NVIDIA H200",
    seconds: 2580.4,
  },
  evaluation: { flags: { samples: 50 }, numbers: { base: { perplexity: 19.31 }, tuned: { perplexity: 9.12 } } },
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

Deno.test("numbers come from the manifests; lists, paths and output folders stay out", () => {
  const card = modelCard(FACTS);
  for (
    const row of [
      "| learning rate | 0.0002 |",
      "| last loss | 2.1976 |",
      "| best.step | 4,329 |",
      "| note | a\\|b |",
      "| base.perplexity | 19.31 |",
      "| tuned.perplexity | 9.12 |",
      "| train.rows | 51,000 |",
    ]
  ) {
    assertStringIncludes(card, row);
  }
  assertStringIncludes(card, "329,910,272 parameters");
  assertStringIncludes(card, "on NVIDIA H200, 2,580 s.");
  assert(!/someone|02_load|losses/.test(card), card);
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
