/** What 04 refuses, each in one line on stderr with status 1. */
import { assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import { rounded } from "../../lib/data/dtype.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { NO_GPU } from "../on_gpu.ts";
import { assertRefused, attempt, earlierResult, inFolder, ROOT, stage } from "./process.ts";

Deno.test(
  "04 refuses a model that was not loaded for an adapter, and adapters that cannot be",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      const assertKept = earlierResult(dir, "04_lora");
      const refused = async (line: string, message: RegExp) => {
        assertRefused(await attempt(dir, "04_lora", line), message);
        assertKept();
      };
      await refused("", /^Cannot read "artifacts\/02_load": run "deno task 02" first$/m);
      await refused(
        "--model qa",
        /^Cannot read "qa": it has no load.json: a loaded model is wanted: run "deno task 02" first$/m,
      );

      Deno.mkdirSync(`${dir}/model`);
      for (const name of ["config.json", "model.safetensors"]) {
        Deno.copyFileSync(`${ROOT}fixtures/golden/tiny/model_hf/${name}`, `${dir}/model/${name}`);
      }
      const load = (mode: string) =>
        Deno.writeTextFileSync(`${dir}/model/load.json`, JSON.stringify({ mode, base: "b" }));
      load("lora");
      await refused("--model model --r 0", /^Cannot use --r 0: a whole number of at least 1 is wanted$/m);
      await refused("--model model --r 2.5", /^Cannot use --r 2.5: a whole number of at least 1 is wanted$/m);
      await refused("--model model --seed -1", /^Cannot use --seed -1: a whole number of at least 0 is wanted$/m);
      await refused(
        "--model model --dropout 1",
        /^Cannot make an adapter with dropout 1: it must be from 0 to below 1$/m,
      );
      await refused(
        "--model model --target-modules q_proj,lm_head",
        /^Cannot adapt "lm_head": the modules are q_proj, /,
      );
      load("full");
      await refused(
        "--model model --r 4",
        /^Cannot make an adapter for "model" with --r: it was loaded with --mode full, .*: run "deno task 02 --mode qlora/,
      );
      load("half");
      await refused(
        "--model model",
        /^Cannot read "model\/load.json": its mode is "half" and its base "b": .* are wanted: run "deno task 02 --force/,
      );
      load("full");
      const { numbers, printed } = await stage(dir, "04_lora", "--model model");
      assertEquals(numbers, { nothing_to_adapt: true });
      assertMatch(printed, /^There is nothing to adapt in "model": it was loaded with --mode full, so [^\n]*\n$/);
    }),
);

Deno.test(
  "04 rounds a fresh adapter to the 16 bits of its base, as PEFT does, and not to 4",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      await stage(dir, "01_convert", "--source tiny --dtype bfloat16");
      const fresh = async (mode: string) => {
        await stage(dir, "02_load", `--mode ${mode}`);
        await stage(dir, "04_lora", "--r 4");
        return readAdapter(`${dir}/artifacts/04_lora`).tensors;
      };
      const [drawn, moved] = [await fresh("qlora"), await fresh("lora")];
      assertEquals([...moved.keys()], [...drawn.keys()]);
      for (const [name, values] of drawn) assertEquals(moved.get(name), rounded(values, "BF16"), name);
      assertNotEquals(moved, drawn);
    }),
);
