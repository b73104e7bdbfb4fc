/** What 02 refuses, each in one line on stderr with status 1. */
import { NO_GPU } from "../on_gpu.ts";
import { assertRefused, attempt, earlierResult, inFolder, ROOT } from "./process.ts";

Deno.test(
  "02 refuses a model that is missing, unfinished, not converted or in 4 bit already",
  { ignore: NO_GPU },
  () =>
    inFolder(async (dir) => {
      const assertKept = earlierResult(dir, "02_load");
      const refused = async (line: string, message: RegExp) => {
        assertRefused(await attempt(dir, "02_load", line), message);
        assertKept();
      };
      await refused("", /^Cannot read "artifacts\/01_convert": run "deno task 01" first$/m);
      Deno.mkdirSync(`${dir}/artifacts/01_convert`, { recursive: true });
      await refused(
        "",
        /"artifacts\/01_convert" has no manifest.json, so it is unfinished: run "deno task 01" first$/m,
      );
      await refused("--model elsewhere", /^Cannot read "elsewhere": no such file or folder$/m);
      await refused(
        "--model tiny",
        /^Cannot read "tiny\/config.json": model_type is missing: a converted model is wanted: run "deno task 01 --source tiny" /,
      );
      await refused(
        "--model qa",
        /^Cannot read "qa": it has no config.json: a model folder is wanted: run "deno task 01" first$/m,
      );
      await refused("--mode lora4", /^Cannot read flag "--mode": "lora4" is not one of qlora, lora, full$/m);
      await refused("--double-quant=yes", /^Cannot read flag "--double-quant": "yes" is not true or false$/m);

      for (const mode of ["lora", "full"]) {
        await refused(
          `--mode ${mode} --dtype bfloat16`,
          new RegExp(
            `^Cannot use --dtype with --mode ${mode}: the weights stay as stage 01 stored them: leave it out, or `,
          ),
        );
        await refused(
          `--mode ${mode} --double-quant true`,
          new RegExp(`^Cannot use --double-quant with --mode ${mode}: nothing is quantized: leave it out$`, "m"),
        );
      }

      // Layers that config.json does not know must not be left out without a word.
      Deno.mkdirSync(`${dir}/deep`);
      const golden = `${ROOT}fixtures/golden/tiny/model_hf`;
      Deno.copyFileSync(`${golden}/model.safetensors`, `${dir}/deep/model.safetensors`);
      const config = JSON.parse(Deno.readTextFileSync(`${golden}/config.json`));
      Deno.writeTextFileSync(`${dir}/deep/config.json`, JSON.stringify({ ...config, num_hidden_layers: 1 }));
      for (const mode of ["qlora", "lora", "full"]) {
        await refused(
          `--model deep --mode ${mode}`,
          /^Cannot load "deep": config.json has no place for its tensor "model.layers.1\..+": make them agree$/m,
        );
      }

      Deno.symlinkSync(`${ROOT}fixtures/golden/tiny/model_4bit`, `${dir}/nf4`);
      await refused("--model nf4", /^Cannot load "nf4": it is in 4 bit already: name the 16-bit model$/m);
    }),
);
