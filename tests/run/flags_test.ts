/** Tests of the command line: what is read, what its type is, what is refused, and what a script prints when it is. */
import { assert, assertEquals, assertMatch, assertStringIncludes, assertThrows } from "@std/assert";
import { byRecipe, checkNumbers, choice, givenFlags, helpText, parseFlags, unset } from "../../lib/run/flags.ts";
import { temporaryFolder } from "../check.ts";
import { attempt } from "../scripts/process.ts";

const FLAGS = new URL("../../lib/run/flags.ts", import.meta.url).href;
const defaults = {
  model: "artifacts/02_load",
  lr: 2e-4,
  maxSteps: byRecipe({ tiny: 60, blog: 0 }),
  mode: choice(["qlora", "lora"]),
  packing: choice(["bfd", "none"], { tiny: "bfd", blog: "none" }),
  doubleQuant: true,
  private: false,
  adapter: unset,
  targets: ["q_proj", "v_proj"],
  stop: byRecipe<readonly string[]>({ tiny: [], blog: ["a"] }),
};
const parse = (line: string, options = {}) =>
  parseFlags(line.split(" ").filter(Boolean), defaults, { script: "05_train", ...options });

Deno.test("flags() gives the defaults of the recipe, from --recipe or else from the environment", () => {
  const common = { out: "artifacts/05_train", asMade: false, force: false, verbose: false, help: false, _: [] };
  const fixed = { model: "artifacts/02_load", lr: 2e-4, mode: "qlora", doubleQuant: true, private: false, adapter: "" };
  const targets = ["q_proj", "v_proj"];
  const tiny = { ...fixed, ...common, targets, maxSteps: 60, packing: "bfd", stop: [], recipe: "tiny" };
  const blog = { ...fixed, ...common, targets, maxSteps: 0, packing: "none", stop: ["a"], recipe: "blog" };
  assertEquals<Record<string, unknown>>(parse(""), tiny);
  assertEquals<Record<string, unknown>>(parse("", { recipe: "" }), tiny);
  assertEquals<Record<string, unknown>>(parse("", { recipe: "blog" }), blog);
  assertEquals<Record<string, unknown>>(parse("--recipe blog"), blog);
  assertEquals<Record<string, unknown>>(parse("--recipe tiny", { recipe: "blog" }), tiny);
});

Deno.test("flags() gives each flag the type of its default, wider than the literal", () => {
  const opt = parse("");
  const [number, recipe, text, truth, list]: [number, number, string, boolean, string[]] = [
    opt.lr,
    opt.maxSteps,
    opt.adapter,
    opt.private,
    opt.targets,
  ];
  const mode: "qlora" | "lora" = opt.mode;
  // @ts-expect-error -- a number is wider than the literal of its default
  const literal: 2e-4 = opt.lr;
  // @ts-expect-error -- a choice is narrower than a string
  const wrong: "full" = opt.mode;
  // @ts-expect-error -- a flag that was not declared
  opt.learningRate;
  list.push("k_proj"); // a list of one's own: the default does not change
  assertEquals(parse("").targets, ["q_proj", "v_proj"]);
  assert(![number, recipe, text, truth, mode, literal, wrong].includes(undefined as never));
});

Deno.test("flags() reads numbers, words, lists, empty values and negative ones", () => {
  assertEquals(parse("--lr 2e-5").lr, 2e-5);
  assertEquals(parse("--lr=-3").lr, -3);
  assertEquals(parse("--lr -0.5").lr, -0.5);
  assertEquals(parse("--lr 1 --lr 2").lr, 2);
  assertEquals(parse("--max-steps 0").maxSteps, 0);
  assertEquals(parse("--mode lora --packing none").mode, "lora");
  assertEquals(parse("--targets a,b,,c").targets, ["a", "b", "c"]);
  assertEquals(parse("--model 0123").model, "0123");
  assertEquals(parse("--model a=b=c").model, "a=b=c");
  assertEquals(parse("--model=--odd").model, "--odd");
  assertEquals(parseFlags(["--adapter", ""], defaults, { script: "x" }).adapter, "");
  assertEquals(parseFlags(["--model", "two words"], defaults, { script: "x" }).model, "two words");
  assertEquals(parse("--out elsewhere").out, "elsewhere");
});

Deno.test("flags() takes a list in one piece or in several, and of other flags the last", () => {
  assertEquals(parse("--targets q_proj,v_proj --targets o_proj").targets, ["q_proj", "v_proj", "o_proj"]);
  assertEquals(parse("--stop b --recipe blog --stop=c").stop, ["b", "c"]);
  assertEquals(parse("--lr 3 --lr 4").lr, 4);
});

Deno.test("--as-made gives what is not given the values of the run before, where they fit", () => {
  const before = { lr: 3, maxSteps: "7", mode: "qlora", packing: "wrapped", targets: ["o_proj"], other: 1, out: "x" };
  const asked: unknown[] = [];
  const made = (out: string, recipe: string) => (asked.push([out, recipe]), before);
  const found = parse("--as-made --double-quant=false --targets k_proj", { made });
  assertEquals(asked, [["artifacts/05_train", "tiny"]]);
  const plain = parse("--double-quant=false --targets k_proj", { made });
  assertEquals<Record<string, unknown>>(found, { ...plain, lr: 3, asMade: true });
  assertEquals([plain.lr, asked.length], [2e-4, 1]);
});

Deno.test("givenFlags() names what stood on the command line, and not what a default or the run before decided", () => {
  const made = () => ({ lr: 3 });
  assertEquals(givenFlags(parse("--as-made", { made })), []);
  const found = parse("--as-made --out x --steps 7 --no-private --targets a", { made, aliases: { steps: "maxSteps" } });
  assertEquals(givenFlags(found), ["--max-steps", "--private", "--targets"]);
});

Deno.test("flags() of what is no stage has none about a folder", () => {
  assertEquals(Object.keys(parse("", { stage: false })).filter((key) => ["out", "force", "asMade"].includes(key)), []);
  assertThrows(() => parse("--out x", { stage: false }), SyntaxError, 'flag "--out"');
});

Deno.test("flags() takes the slash from the end of a folder's name, and from no sentence", () => {
  assertEquals(parse("--model artifacts/02_load/ --out=a//"), { ...parse("--model artifacts/02_load --out a") });
  assertEquals(parse("--model /").model, "/");
  assertEquals(parseFlags(["--model", "yes and/"], defaults, { script: "x" }).model, "yes and/");
});

Deno.test("flags() reads a truth value alone, negated, or spelt out", () => {
  assertEquals(parse("--private").private, true);
  assertEquals(parse("--private false").private, false);
  assertEquals(parse("--private=true --no-private").private, false);
  assertEquals(parse("--no-double-quant").doubleQuant, false);
  assertEquals(parse("--double-quant false --private").doubleQuant, false);
  assertEquals(parse("--force --verbose -h").help, true);
});

Deno.test("flags() collects words without a flag where the script takes them", () => {
  const ask = (...args: string[]) => parseFlags(args, { greedy: false, topK: 50 }, { script: "ask", positional: true });
  assertEquals(ask("--greedy", "What is anaemia?", "--top-k", "3", "42")._, ["What is anaemia?", "42"]);
  assertEquals(ask("--", "--greedy")._, ["--greedy"]);
  assertEquals(ask("--", "--greedy").greedy, false);
});

Deno.test("flags() takes another name of a flag, and says what it is called here", () => {
  const said: unknown[] = [];
  const { error } = console;
  console.error = (text) => said.push(text);
  try {
    assertEquals(parse("--steps 7", { aliases: { steps: "maxSteps" } }).maxSteps, 7);
  } finally {
    console.error = error;
  }
  assertEquals(said, ["Note: --steps is called --max-steps here"]);
});

Deno.test("flags() refuses what it does not understand and names it", () => {
  const cases: readonly (readonly [string, string])[] = [
    ["--lrr 3", 'flag "--lrr": this script has --model --lr --max-steps --mode'],
    ["--lrr=3", 'flag "--lrr"'],
    ["-x", 'flag "-x"'],
    ["--no-lr", 'flag "--no-lr"'],
    ["--a.b 1", 'flag "--a.b"'],
    ["--lr", 'flag "--lr": a value must follow it'],
    ["--lr --private", 'flag "--lr": a value must follow it'],
    ["--lr=", 'flag "--lr": "" is not a finite number'],
    ["--lr 3x", 'flag "--lr": "3x" is not a finite number'],
    ["--lr NaN", '"NaN" is not a finite number'],
    ["--max-steps Infinity", '"Infinity" is not a finite number'],
    ["--mode full", 'flag "--mode": "full" is not one of qlora, lora'],
    ["--private=maybe", '"maybe" is not true or false'],
    ["--out=", 'flag "--out": "" is not a folder\'s name'],
    ["--private maybe", '"maybe": this script takes no words without a flag'],
    ["--recipe large", 'recipe "large": the recipes are tiny, blog'],
  ];
  for (const [line, message] of cases) assertThrows(() => parse(line), SyntaxError, message, line);
});

Deno.test("checkNumbers() refuses numbers below their least and halves where whole ones are wanted", () => {
  const opt = { batchSize: 4, epochs: 0.5, seed: 0 };
  checkNumbers(opt, { whole: { batchSize: 1, seed: 0 }, real: { epochs: 0 } });
  assertThrows(
    () => checkNumbers(opt, { whole: { batchSize: 5 } }),
    RangeError,
    "--batch-size 4: a whole number of at",
  );
  assertThrows(() => checkNumbers(opt, { whole: { epochs: 0 } }), RangeError, "--epochs 0.5: a whole number");
  assertThrows(() => checkNumbers({ seed: 1e20 }, { whole: { seed: 0 } }), RangeError, "is wanted, and less than 2^53");
  assertThrows(() => checkNumbers(opt, { real: { epochs: 1 } }), RangeError, "--epochs 0.5: a number of at least 1");
  checkNumbers(opt, { below: { epochs: 1 } });
  assertThrows(() => checkNumbers(opt, { below: { epochs: 0.5 } }), RangeError, "--epochs 0.5: a number below 0.5 is");
});

Deno.test("--help is the header of the script, and each flag with its default and the comment beside it", () => {
  const source = `/**
 * 05 · Train.
 *
 *   deno task 05     all of it
 */
const opt = flags(import.meta, {
  lr: 2e-4, // peak
  url: "https://host", // where
  mode: choice(["qlora", "lora"]), // what is trained
});
/** another comment */`;
  const standard = { lr: 2e-4, url: "https://host", mode: choice(["qlora", "lora"]) };
  const lines = helpText(source, standard, parseFlags(["-h", "--lr", "9"], standard, { script: "05_train" })).split(
    "\n",
  );
  assertEquals(lines.slice(0, 5), ["05 · Train.", "", "  deno task 05     all of it", "", "flags (recipe tiny)"]);
  assertMatch(lines[5]!, /^ {2}--lr +0\.0002 +peak$/);
  assertMatch(lines[6]!, /^ {2}--url +https:\/\/host +where$/);
  assertMatch(lines[7]!, /^ {2}--mode +qlora +qlora \| lora; what is trained$/);
  assertEquals(lines.slice(8).map((line) => line.trim().split(/ +/)[0]), [
    "--recipe",
    "--out",
    "--as-made",
    "--force",
    "--verbose",
    "--help",
  ]);
});

Deno.test("a script that uses flags() prints one line for a mistake, a stack for a defect, and exits 1", async (t) => {
  using folder = temporaryFolder();
  const script = folder.at("09_script.ts");
  Deno.writeTextFileSync(
    script,
    `/** A script. */
import { flags } from "${FLAGS}";
const opt = flags(import.meta, { late: false, wait: false, defect: false, rejected: false, os: false });
if (opt.wait) await new Promise((resolve) => setTimeout(resolve, 1));
if (opt.late) setTimeout(() => { throw new Error("Cannot go on: late"); }, 1);
else if (opt.rejected) Promise.reject(new RangeError("Cannot count: rejected"));
else if (opt.os) Deno.readTextFileSync("/no/such/file");
else if (opt.defect) (undefined as unknown as string[]).length;
else throw new Error("Cannot go on: at once");
await new Promise((resolve) => setTimeout(resolve, 2000));
console.log("went on");
`,
  );
  const run = (args: string[], env: Record<string, string> = {}) =>
    attempt(folder.path, script, args, { env: { RECIPE: "", ...env } });
  const ends: readonly (readonly [string, string[], RegExp])[] = [
    ["an error thrown at once", [], /^Cannot go on: at once\n$/],
    ["an error after an await", ["--wait"], /^Cannot go on: at once\n$/],
    ["an error in a callback", ["--late"], /^Cannot go on: late\n$/],
    ["a rejection nobody handles", ["--rejected"], /^Cannot count: rejected\n$/],
    ["what the operating system refuses", ["--os"], /^Cannot go on: [^\n]*\/no\/such\/file[^\n]*\n$/],
    ["an unknown flag", ["--latest"], /^Cannot read flag "--latest": this script has --late [^\n]*\n$/],
    ["a defect", ["--defect"], /TypeError: [^]*at file:.*09_script\.ts/],
  ];
  for (const [name, args, message] of ends) {
    await t.step(name, async () => {
      const { code, out, err } = await run(args);
      assertEquals([code, out], [1, ""]);
      assertMatch(err, message);
    });
  }
  await t.step("DEBUG=1 adds the stack", async () => {
    const { code, err } = await run([], { DEBUG: "1" });
    assertEquals(code, 1);
    assertMatch(err, /Error: Cannot go on: at once\n\s+at file:.*09_script\.ts/);
  });
  await t.step("--help", async () => {
    const { code, out, err } = await run(["--help"]);
    assertEquals([code, err], [0, ""]);
    assertStringIncludes(out, "A script.\n\nflags (recipe tiny)");
    assertMatch(out, /--out +artifacts\/09_script +where to write/);
  });
  await t.step("RECIPE=blog", async () => {
    assertStringIncludes((await run(["--help"], { RECIPE: "blog" })).out, "flags (recipe blog)");
    const { code, err } = await run([], { RECIPE: "large" });
    assertEquals([code, err], [1, 'Cannot read recipe "large": the recipes are tiny, blog\n']);
  });
});
