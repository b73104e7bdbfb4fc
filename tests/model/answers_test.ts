/** Tests of prompts cut out of packed documents, and of lengths. Tokenizer: fixtures/golden/tiny. */
import { assert, assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import { assembleRows, encodeRecord } from "../../lib/data/dataset.ts";
import { type Packing, packRows } from "../../lib/data/packing.ts";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate } from "../../lib/data/template.ts";
import { loadTokenizer, type Tokenizer } from "../../lib/data/tokenizer.ts";
import {
  countWords,
  drawPrompts,
  fixedQuestions,
  questionOf,
  splitDocuments,
  spread,
} from "../../lib/model/answers.ts";
import { goldenPath } from "../check.ts";

const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"));
const template = chatTemplate({ template: BLOG_TEMPLATE, system: "Be brief.", eos_token: tokenizer.eosToken });
const pairs = [
  ["What is gout?", "A disease of the joints."],
  ["What is a β-blocker?", "A medicine that slows the heart.\n\nIt is taken by mouth."],
  ["What is fever?", "A temperature above 38 °C."],
] as const;
const messages = ([question, answer]: readonly [string, string]) => [
  { role: "user", content: question },
  { role: "assistant", content: answer },
];
const settings = { tokenizer, template, count: 10, longest: 500, seed: 1 };

function packed(packing: Packing, maxLength: number) {
  const examples = pairs.map((pair) =>
    encodeRecord({ messages: messages(pair) }, { tokenizer, template, loss: "all" })
  );
  const slices = packRows(examples.map(({ ids }) => ids.length), { packing, maxLength });
  return { examples, rows: assembleRows(examples, slices, { packing, metadata: { packing } }) };
}

for (const [packing, maxLength] of [["bfd", 200], ["none", 200], ["wrapped", 50]] as const) {
  Deno.test(`documents packed by ${packing} come apart whole, and their prompts are those of the template`, () => {
    const { examples, rows } = packed(packing, maxLength);
    const documents = splitDocuments(rows, tokenizer.eosId);
    const texts = (list: readonly Int32Array[]) => list.map((ids) => tokenizer.decode(ids)).sort();
    assertEquals(texts(documents), texts(examples.map(({ ids }) => ids)));
    const prompts = drawPrompts(documents, settings);
    const found = prompts.map(({ text, reference }) => [text, reference]).sort();
    assertEquals(found, pairs.map(([question, answer]) => [template.renderPrompt(question), answer]).sort());
    for (const { ids, text, document } of prompts) {
      assertEquals(ids, tokenizer.encode(text));
      assertEquals(ids, [...documents[document]!.subarray(0, ids.length)]);
    }
  });
}

Deno.test("drawPrompts() draws in an order of its seed, as many as are wanted, and none that is too long", () => {
  const documents = splitDocuments(packed("bfd", 200).rows, tokenizer.eosId);
  const drawn = (some: Partial<typeof settings>) =>
    drawPrompts(documents, { ...settings, ...some }).map(({ document }) => document);
  assertEquals(drawn({}), drawn({}));
  assertEquals(drawn({ count: 2 }), drawn({}).slice(0, 2));
  assertEquals(new Set([1, 2, 3, 4, 5, 6].map((seed) => drawn({ seed }).join())).size > 1, true);
  const lengths = drawPrompts(documents, settings).map(({ ids }) => ids.length);
  assertEquals(drawn({ longest: Math.max(...lengths) - 1 }).length, 2);
  assertEquals(drawn({ longest: 0 }), []);
  const plain = Int32Array.from(tokenizer.encode("No question was asked."));
  assertEquals(drawPrompts([plain], settings), []);
});

Deno.test("where question and answer share a token, the prompt has its own ids", () => {
  const merging: Tokenizer = {
    ...tokenizer,
    encode: (text) => (text.match(/\n\n|[^]/gu) ?? []).map((part) => part === "\n\n" ? 0 : part.codePointAt(0)!),
    decode: (ids) => Array.from(ids, (id) => id === 0 ? "\n\n" : String.fromCodePoint(id)).join(""),
  };
  const text = template.render(messages(["Why?", "\nBecause."]));
  const document = Int32Array.from(merging.encode(text));
  const [prompt] = drawPrompts([document], { ...settings, tokenizer: merging });
  const wanted = template.renderPrompt("Why?");
  assertEquals([prompt!.text, prompt!.reference], [wanted, "\nBecause."]);
  assertEquals(prompt!.ids, merging.encode(wanted));
  assertNotEquals(prompt!.ids, [...document.subarray(0, prompt!.ids.length)]);
});

Deno.test("drawPrompts() refuses a template that does not set answers apart", () => {
  const bare = chatTemplate({
    template: "{% for m in messages %}{{ m.content }}{% endfor %}",
    system: "",
    eos_token: tokenizer.eosToken,
  });
  assertThrows(() => drawPrompts([], { ...settings, template: bare }), Error, "Cannot cut prompts");
});

Deno.test("questionOf() finds the question in a prompt, and leaves other texts alone", () => {
  assertEquals(questionOf(template.renderPrompt("How?"), template), "How?");
  const other = chatTemplate({ template: BLOG_TEMPLATE, system: BLOG_SYSTEM, eos_token: "" });
  const prompt = other.renderPrompt("How?");
  assertEquals(questionOf(prompt, template), prompt);
});

Deno.test("both recipes begin with the blog's two questions and repeat none", () => {
  for (const questions of Object.values(fixedQuestions)) {
    assertEquals(questions.slice(0, 2), [
      "How is hypertension diagnosed and treated?",
      "What causes acute myocardial infarction?",
    ]);
    assert(new Set(questions).size === questions.length && questions.length >= 7);
  }
});

Deno.test("words are what white space separates, whatever it is", () => {
  assertEquals(countWords(" One two-three,\n\nfour.\tfive\u00a0six "), 5);
  assertEquals([countWords(""), countWords(" \n ")], [0, 0]);
});

Deno.test("spread() gives mean, median, least and most, without changing its input", () => {
  const values = [9, 1, 10, 2];
  assertEquals(spread(values), { mean: 5.5, median: 5.5, min: 1, max: 10 });
  assertEquals(values, [9, 1, 10, 2]);
  assertEquals(spread([10, 9, 200]), { mean: 73, median: 10, min: 9, max: 200 });
  assertThrows(() => spread([]), RangeError, "there are no answers");
});
