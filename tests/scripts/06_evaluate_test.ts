/** What 06 refuses, each in one line on stderr with status 1, and nothing of an earlier evaluation is lost. */
import { readRows, writeRows } from "../../lib/data/dataset.ts";
import { assertRefused, attempt, earlierResult, inFolder, ROOT, stage } from "./process.ts";

Deno.test("06 refuses numbers that have no meaning, and rows that are not for this model", () =>
  inFolder(async (dir) => {
    const assertKept = earlierResult(dir, "06_evaluate");
    const refused = async (line: string, message: RegExp) => {
      assertRefused(await attempt(dir, "06_evaluate", line), message);
      assertKept();
    };
    for (const flag of ["batch-size", "resamples", "sequences", "max-new-tokens"]) {
      const wanted = new RegExp(`^Cannot use --${flag} 0: a whole number of at least 1 is wanted$`, "m");
      await refused(`--${flag} 0`, wanted);
    }
    for (const samples of [-1, 2.5]) {
      await refused(
        `--samples ${samples}`,
        new RegExp(`^Cannot use --samples ${samples}: a whole number of at least 0`),
      );
    }
    await refused("--top-p 2", /^Cannot use --top-p 2: a number above 0 and at most 1 is wanted$/m);

    Deno.mkdirSync(`${dir}/model`);
    for (const file of ["golden/tiny/model_hf/config.json", "tiny/tokenizer/tokenizer.json"]) {
      Deno.copyFileSync(`${ROOT}fixtures/${file}`, `${dir}/model/${file.split("/").at(-1)}`);
    }
    Deno.symlinkSync(`${ROOT}fixtures/tiny/tokenizer`, `${dir}/tokenizer`);
    await stage(dir, "03_dataset", "--source qa --tokenizer tokenizer");
    const rows = readRows(`${dir}/artifacts/03_dataset/test.safetensors`);
    await refused("--model model --tuned nowhere", /^Cannot read "nowhere": no such file or folder/m);
    const adapter = `--model model --adapter ${ROOT}fixtures/golden/tiny/generate_adapter`;
    await refused(
      `${adapter} --max-new-tokens 256`,
      /^Cannot use --max-new-tokens 256: the model of "model" has 256 positions for a prompt and its answer: a smaller /,
    );
    await refused(
      `${adapter} --tuned model`,
      /^Cannot compare with --tuned "model" and --adapter ".*": one of them is /,
    );
    for (const wrong of ["--adapter qa", "--dataset qa", "--model qa", "--tuned qa"]) {
      const given = wrong.startsWith("--tuned") ? "--model model" : adapter;
      await refused(
        `${given} ${wrong}`,
        /^Cannot read "qa": it has no \S+: a .* is wanted: run "deno task 0[135]" first$/m,
      );
    }
    Deno.mkdirSync(`${dir}/data`);
    const line = `${adapter} --dataset data`;
    await writeRows(`${dir}/data/test.safetensors`, { ...rows, metadata: { tokenizer_sha256: "0" } });
    await refused(
      line,
      /^Cannot use "data\/test.safetensors": its tokens are not of the tokenizer in "model": run "deno task 03" with /,
    );
    const none = new Int32Array();
    const empty = { inputIds: none, positionIds: none, labels: none, rowOffsets: [0], metadata: {} };
    await writeRows(`${dir}/data/test.safetensors`, empty);
    await refused(line, /^Cannot use "data\/test.safetensors": it has no rows: give stage 03 more records$/m);
  }));
