/**
 * Generation against transformers' ids, and against itself: whatever the batch, the same answers. The greedy cases have
 * margins of 5e-4 or more between the two highest scores; logits here agree to about 1e-5, so every id must be equal.
 */
import { assert, assertEquals, assertNotEquals, assertRejects } from "@std/assert";
import { readAdapter } from "../../lib/model/adapter.ts";
import { readConfig } from "../../lib/model/config.ts";
import { createGenerator, generateAll } from "../../lib/model/generate.ts";
import { Llama } from "../../lib/model/llama.ts";
import { goldenPath } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";

interface Case {
  readonly model: string;
  readonly repetition_penalty: number;
  readonly prompt_ids: number[];
  readonly new_ids: number[];
  readonly stopped_by_eos: boolean;
}
interface Golden {
  readonly greedy: readonly Case[];
  readonly stopping: {
    readonly eos_token_ids: number[];
    readonly pad_token_id: number;
    readonly single: { readonly prompt_ids: number[]; readonly new_ids: number[] };
    readonly left_padded_batch: {
      readonly prompt_ids: number[][];
      readonly new_ids_with_padding_after_the_end: number[][];
    };
  };
}

const read = (config: string): Golden => JSON.parse(Deno.readTextFileSync(goldenPath(`${config}/generate.json`)));
const model = (config: string) => goldenPath(`${config}/model_hf`);
const adapter = (config: string) => goldenPath(`${config}/generate_adapter`);
const tiny = read("tiny"), prompts = tiny.greedy.map((of) => of.prompt_ids);

for (const config of ["tiny", "odd"]) {
  const golden = read(config);
  for (const [spoken, path] of [["model_hf", undefined], ["model_hf + generate_adapter", adapter(config)]] as const) {
    for (const penalty of [1, 1.1]) {
      const cases = golden.greedy.filter((of) => of.model === spoken && of.repetition_penalty === penalty);
      const name = `${config} ${spoken}, repetition penalty ${penalty}`;
      Deno.test(`generateAll() writes transformers' greedy ids: ${name}`, { ignore }, async () => {
        assertEquals(cases.length, 3);
        const how = { greedy: true, repetitionPenalty: penalty, maxNewTokens: 40 };
        const answers = await generateAll(
          { model: model(config), adapter: path, ...how },
          cases.map((c) => c.prompt_ids),
        );
        assertEquals(answers.map(({ ids }) => ids), cases.map((of) => of.new_ids));
        assertEquals(answers.map(({ finished }) => finished), cases.map((of) => of.stopped_by_eos));
      });
    }
  }

  Deno.test(`generateAll() ends each answer of a batch where transformers does: ${config}`, { ignore }, async () => {
    const { eos_token_ids: eosIds, pad_token_id: pad, single, left_padded_batch: batch } = golden.stopping;
    const expected = batch.new_ids_with_padding_after_the_end;
    const how = { greedy: true, eosIds, maxNewTokens: expected[0]!.length };
    const base = { model: model(config), adapter: adapter(config) };
    const answers = await generateAll({ ...base, ...how }, batch.prompt_ids);
    answers.forEach(({ ids, finished }, i) => {
      const length = expected[i]!.length;
      assertEquals([...ids, ...Array.from({ length: length - ids.length }, () => pad)], expected[i]);
      assertEquals(finished, eosIds.includes(ids.at(-1)!));
      assert(finished || ids.length === length);
    });
    const [alone] = await generateAll({ ...base, ...how }, [single.prompt_ids]);
    assertEquals(alone, { ids: single.new_ids, finished: true });
  });
}

for (const [name, path] of [["without", undefined], ["with", adapter("tiny")]] as const) {
  Deno.test(`Each greedy token is the highest of the whole model's logits: ${name} adapter`, { ignore }, async () => {
    const parsed = path === undefined ? undefined : readAdapter(path, readConfig(model("tiny")));
    const llama = await Llama.open({ model: model("tiny"), adapter: parsed, tokens: 120 });
    const prompt = prompts[0]!;
    // The generator shares the open model.
    const [answer] = await generateAll({ model: llama, greedy: true, maxNewTokens: 60 }, [prompt]);
    const all = [...prompt, ...answer!.ids];
    const logits = await llama.logits({ inputIds: all, positionIds: all.map((_, i) => i) });
    assertEquals(answer!.ids.length, 60);
    answer!.ids.forEach((id, i) => {
      const row = logits[prompt.length - 1 + i]!;
      assertEquals(row.indexOf(row.reduce((a, b) => Math.max(a, b))), id, `token ${i}`);
    });
    llama.destroy();
  });
}

Deno.test("An answer does not depend on what is written beside it", { ignore }, async () => {
  const seen: [number, number][] = [];
  const how = { temperature: 1.3, topP: 0.95, repetitionPenalty: 1.1, maxNewTokens: 24, seed: 7 };
  const five = prompts.slice(0, 5), base = { model: model("tiny"), adapter: adapter("tiny") };
  const onToken = (prompt: number, id: number) => seen.push([prompt, id]);
  const together = await generateAll({ ...base, ...how, batch: 5, onToken }, five);
  // One after the other, and two at a time, with places in the cache that change hands.
  for (const batch of [1, 2]) assertEquals(await generateAll({ ...base, ...how, batch }, five), together);
  together.forEach(({ ids }, i) => assertEquals(seen.filter(([prompt]) => prompt === i).map(([, id]) => id), ids));
  assertNotEquals(await generateAll({ ...base, ...how, seed: 8 }, five), together);
});

Deno.test("4-bit weights give the same answer kept and decoded at each step", { ignore }, async () => {
  const dir = goldenPath("tiny/model_4bit"), how = { greedy: true, maxNewTokens: 20 };
  const kept = await generateAll({ model: dir, ...how }, prompts.slice(0, 2));
  const llama = await Llama.open({ model: dir, tokens: 32 });
  assertEquals(await generateAll({ model: llama, ...how }, prompts.slice(0, 2)), kept);
  llama.destroy();
});

Deno.test("generate() stops at the end of the context and refuses what cannot be written", { ignore }, async () => {
  const generator = await createGenerator({ model: model("tiny"), batch: 2, context: 32 });
  const prompt = prompts[0]!.slice(0, 20), how = { greedy: true, maxNewTokens: 100, eosIds: [] };
  const [answer] = await generator.generate([prompt], how);
  assertEquals([answer!.ids.length, answer!.finished], [12, false]);
  assertEquals(await generator.generate([], how), []);
  const refused = async (of: Promise<unknown>, message: string) => {
    assertEquals((await assertRejects(() => of, RangeError)).message, message);
  };
  await refused(
    generator.generate([prompts[0]!.slice(0, 32)], how),
    "Cannot generate from a prompt of 32 tokens: the context has 32 for it and the answer",
  );
  await refused(generator.generate([[]], how), "Cannot generate from an empty prompt: at least one token is wanted");
  await refused(generator.generate([[384]], how), "Cannot embed token 384: the vocabulary has 384");
  await refused(
    generator.generate([prompt], { ...how, maxNewTokens: 0 }),
    "Cannot generate 0 tokens: a whole number above 0 is wanted",
  );
  generator.destroy();
  await refused(
    createGenerator({ model: model("tiny"), context: 257 }),
    "Cannot generate with a context of 257 tokens: the model has 256 positions",
  );
});
