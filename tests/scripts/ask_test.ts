/** ask as a process: what it answers with, which prompt it makes, and its refusals. */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { chatTemplate } from "../../lib/data/template.ts";
import { loadTokenizer } from "../../lib/data/tokenizer.ts";
import { generateAll } from "../../lib/model/generate.ts";
import { sha256File } from "../../lib/data/files.ts";
import { goldenPath, withFolder } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";
import { attempt } from "./process.ts";

const NOTICE = "A research model: it errs, and it is not for clinical use.";
const adapter = goldenPath("tiny/generate_adapter");
const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"));
const { greedy }: {
  greedy: { model: string; repetition_penalty: number; prompt_ids: number[]; new_ids: number[] }[];
} = JSON.parse(Deno.readTextFileSync(goldenPath("tiny/generate.json")));

const ask = (dir: string, args: readonly string[]) => attempt(dir, "ask", args);

/** The answer between the notices and the last line. */
function answerOf(out: string): string {
  const [, answer] =
    new RegExp(`^${NOTICE}\n[^\n]+ answers\\.\n\n([^]*)\n\n\\d+ tokens, the first after [^\n]+\n$`).exec(out) ?? [];
  assert(answer !== undefined, out);
  return answer;
}

function copy(from: string, to: string): void {
  Deno.mkdirSync(to, { recursive: true });
  for (const { name } of Deno.readDirSync(from)) Deno.copyFileSync(`${from}/${name}`, `${to}/${name}`);
}

Deno.test("ask --raw --greedy writes transformers' text: of the merged model where it is of the present adapter", {
  ignore,
}, () =>
  withFolder(async (dir) => {
    const how = ["--raw", "--greedy", "--max-new-tokens", "40", "--repetition-penalty"];
    const expected = async (model: string, penalty: number, name: string) => {
      const { prompt_ids, new_ids } = greedy.find((of) => of.model === model && of.repetition_penalty === penalty)!;
      const { code, out, err } = await ask(dir, [tokenizer.decode(prompt_ids), ...how, String(penalty)]);
      assertEquals([code, err], [0, ""]);
      assertEquals(answerOf(out), tokenizer.decode(new_ids, { skipSpecialTokens: true }));
      assertStringIncludes(out, `\n${name} answers.\n`);
      assertMatch(
        out,
        /\n40 tokens, the first after [\d.]+ m?s, then [\d,]+ tokens\/s, cut off by --max-new-tokens\n$/,
      );
    };
    copy(goldenPath("tiny/model_hf"), `${dir}/artifacts/01_convert`);
    copy(goldenPath("tiny/tokenizer"), `${dir}/artifacts/01_convert`);
    copy(adapter, `${dir}/artifacts/05_train/adapter`);
    const rest = { flags: {}, reads: [], writes: [], numbers: {} };
    const run = JSON.stringify({ ...rest, script: "05_train" });
    Deno.writeTextFileSync(`${dir}/artifacts/05_train/manifest.json`, run);
    const apart = "artifacts/01_convert with artifacts/05_train/adapter", merged = "artifacts/07_merge/merged_model";
    await expected("model_hf + generate_adapter", 1.1, apart);
    // What stands for the merge is the base: its answer shows who gave it.
    copy(`${dir}/artifacts/01_convert`, `${dir}/${merged}`);
    await expected("model_hf + generate_adapter", 1.1, apart);
    const reads = ["adapter_config.json", "adapter_model.safetensors"].map((name) => {
      const path = `artifacts/05_train/adapter/${name}`;
      return { path, sha256: sha256File(`${dir}/${path}`) };
    });
    const manifest = `${dir}/artifacts/07_merge/manifest.json`;
    const merge = (reads: unknown[]) =>
      Deno.writeTextFileSync(manifest, JSON.stringify({ ...rest, script: "07_merge", reads }));
    merge(reads);
    await expected("model_hf", 1, merged);
    // What is merged is not added once more, wherever the adapter lies.
    const twice = await ask(dir, ["why", "--model", merged, "--adapter", adapter]);
    const state = `stage 07 merged "${adapter}" into it already`;
    assertEquals([twice.code, twice.err], [
      1,
      `Cannot add an adapter to "${merged}": ${state}: leave --adapter out, or name the base with --model\n`,
    ]);
    merge([reads[0], { ...reads[1], sha256: "another" }]);
    await expected("model_hf + generate_adapter", 1.1, apart);
    Deno.removeSync(`${dir}/artifacts/05_train`, { recursive: true });
    await expected("model_hf", 1, merged);
  }));

Deno.test(
  "ask makes the prompt with the template beside the model or the adapter, and draws by the seed",
  { ignore },
  () =>
    withFolder(async (dir) => {
      copy(goldenPath("tiny/model_hf"), `${dir}/model`);
      copy(goldenPath("tiny/tokenizer"), `${dir}/model`);
      const source = {
        template: "{{ messages[0].content }} = {{ messages[1].content }}?",
        system: "so",
        eos_token: "",
      };
      Deno.writeTextFileSync(`${dir}/model/template.json`, JSON.stringify(source));
      const own = { ...source, system: "and" };
      copy(adapter, `${dir}/adapter`);
      Deno.writeTextFileSync(`${dir}/adapter/template.json`, JSON.stringify(own));
      const expected = async (seed: number, of = source) => {
        const prompt = tokenizer.encode(chatTemplate(of).renderPrompt("why not"));
        const sampling = { temperature: 0.7, topP: 0.9, topK: 5, repetitionPenalty: 1.1, maxNewTokens: 30, seed };
        const [answer] = await generateAll({ model: `${dir}/model`, adapter, ...sampling }, [prompt]);
        return tokenizer.decode(answer!.ids, { skipSpecialTokens: true });
      };
      const given = ["--model", "model", "--adapter", adapter, "--max-new-tokens", "30", "--top-k", "5"];
      assertEquals(answerOf((await ask(dir, ["why", "not", ...given])).out), await expected(42));
      assertEquals(answerOf((await ask(dir, ["why not", ...given, "--seed", "9"])).out), await expected(9));
      const beside = ["why not", ...given, "--adapter", "adapter"];
      assertEquals(answerOf((await ask(dir, beside)).out), await expected(42, own), "that of the adapter comes first");
    }),
);

Deno.test("ask refuses in one line what it cannot do", { ignore }, () =>
  withFolder(async (dir) => {
    copy(goldenPath("tiny/model_hf"), `${dir}/model`);
    copy(goldenPath("tiny/tokenizer"), `${dir}/model`);
    Deno.removeSync(`${dir}/model/model.safetensors`); // none of this is worth opening the weights
    const refused: [string[], string][] = [
      [[], 'Cannot answer: there is no question: ask one, as in deno task ask "What are the symptoms of anemia?"'],
      [
        ["why"],
        'Cannot answer: there is neither a finished run in "artifacts/05_train" nor "artifacts/07_merge/merged_model": ' +
        'run "deno task train" first',
      ],
      [
        ["why", "--model", "nowhere"],
        'Cannot read "nowhere": no such folder: a model folder is wanted: run "deno task 01" first',
      ],
      [
        ["why", "--model", "model", "--adapter", "model"],
        'Cannot read "model": it has no adapter_config.json: a trained adapter is wanted: run "deno task 05" first',
      ],
      [["why", "--temperature", "0"], "Cannot use --temperature 0: a number above 0, or --greedy, is wanted"],
      [["why", "--top-p", "1.5"], "Cannot use --top-p 1.5: a number above 0 and at most 1 is wanted"],
      [
        ["1 ".repeat(300), "--model", "model", "--raw"],
        "Cannot generate from a prompt of 301 tokens: the context has 256 for it and the answer",
      ],
    ];
    for (const [args, message] of refused) {
      const { code, err } = await ask(dir, args);
      assertEquals([code, err.trim()], [1, message]);
    }
  }));
