/** Tests of two models side by side, on the screen and as a page, where there is much to tell and where there is little. */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { type Comparison, comparisonText, denseJson, writeComparison } from "../../lib/run/comparison.ts";

const scores = { nllSum: 20, tokens: 10, perplexity: Math.exp(2), evalLoss: 2.1 };
const few: Comparison = {
  base: scores,
  tuned: { ...scores, perplexity: 5 },
  difference: { perplexity: -2.3891, low: null, high: null, confidence: 0.95, documents: 1, resamples: 2000 },
  unit: "rows",
  pairs: [1, 2, 3, 4].map((i) => ({ question: `Why ${i}?`, base: "?", tuned: "word ".repeat(30) })),
  samples: [],
  lengths: {},
  ended: null,
  sampling: { seed: 42, greedy: false },
};
const spread = { mean: 2, median: 2, min: 1, max: 3 };
const much: Comparison = {
  ...few,
  difference: { ...few.difference, low: -3, high: 0.5, documents: 1234 },
  unit: "documents",
  samples: [{ question: "How?", answer: "so & so", reference: "so", words: 3 }],
  lengths: Object.fromEntries(
    ["words", "tokens", "words of references"].map((name) => [name, { values: [1, 2, 3], spread }]),
  ),
  ended: 0.5,
};

Deno.test("comparisonText() gives the difference with its interval, three questions and the lengths, if there are any", () => {
  const text = comparisonText(few, "x/report.html");
  assertStringIncludes(
    text,
    "minus the base's: -2.389 (n = 1 rows of the test split: too few for\nan interval).",
  );
  assertStringIncludes(text, "\n\nQ: Why 1?\nbase: ?\ntuned: word word");
  assertEquals(text.includes("Why 4?"), false);
  assert(text.endsWith("it is not for clinical use. See x/report.html"));
  assert(text.split("\n").slice(0, -1).every((line) => line.length < 100), text);
  assert(!text.includes("ended by themselves"));
  const more = comparisonText(much, "x");
  assertStringIncludes(more.replaceAll("\n", " "), "95 % interval -3.000 to +0.500, n = 1,234 documents of the test");
  assertStringIncludes(more, "50.00 % of them ended by themselves.");
});

Deno.test("writeComparison() shows all questions, and charts of what there is", async () => {
  const path = Deno.makeTempFileSync({ suffix: ".html" });
  const page = async (of: Comparison) => {
    await writeComparison(path, of);
    return Deno.readTextFileSync(path);
  };
  const [little, all] = [await page(few), await page(much)];
  assertStringIncludes(little, "No test document has a prompt that fits.");
  assertStringIncludes(little, "Why 4?");
  assertStringIncludes(little, "Sampled with seed 42, greedy false.");
  assertStringIncludes(all, "so &#38; so");
  assertEquals([little, all].map((html) => html.split("<svg").length - 1), [1, 2]);
  Deno.removeSync(path);
});

Deno.test("denseJson() keeps lists of numbers on one line, and the value", () => {
  const value = { a: [1, -2.5, 3e-9], b: ["1", 2], c: [] };
  assertStringIncludes(denseJson(value), '"a": [ 1, -2.5, 3e-9 ]');
  assertEquals(JSON.parse(denseJson(value)), value);
});
