/** What 03 refuses, each in one line on stderr with status 1. */
import { assertRefused, attempt, earlierResult, inFolder, ROOT } from "./process.ts";

Deno.test("03 refuses data that it would have to guess at, and rows that teach nothing", () =>
  inFolder(async (dir) => {
    Deno.symlinkSync(`${ROOT}fixtures/tiny/tokenizer`, `${dir}/tokenizer`);
    const assertKept = earlierResult(dir, "03_dataset");
    const refused = async (line: string, message: RegExp) => {
      assertRefused(await attempt(dir, "03_dataset", `--tokenizer tokenizer ${line}`), message);
      assertKept();
    };
    await refused("--source nowhere", /^Cannot read "nowhere": no such file or folder$/m);
    await refused(
      "--source qa --tokenizer qa",
      /^Cannot read "qa": it has no tokenizer.json: a tokenizer folder is wanted: run "deno task 01" first$/m,
    );
    await refused("--source qa --template mine.jinja", /^Cannot read "mine.jinja": no such file or folder$/m);
    Deno.writeTextFileSync(`${dir}/open.jinja`, "{% if messages %}");
    await refused("--source qa --template open.jinja", /^Cannot parse the chat template: /);
    await refused("--source qa --packing dense", /"dense" is not one of bfd, bfd_split, wrapped, none$/m);
    await refused(
      "--source qa --max-seq-length ten",
      /^Cannot read flag "--max-seq-length": "ten" is not a finite number$/m,
    );
    await refused(
      "--source qa --max-seq-length 0",
      /^Cannot use --max-seq-length 0: a whole number of at least 2 is wanted$/m,
    );
    await refused("--source qa --limit -3", /^Cannot use --limit -3: a whole number of at least 0 is wanted$/m);
    const masked =
      /^Cannot learn from the row of train that begins with "[^"]+", line 1, nor from 11 more: all labels are masked, .* --max-seq-length/;
    await refused("--source qa --max-seq-length 32 --loss completion", masked);

    const data = async (text: string, message: RegExp) => {
      Deno.writeTextFileSync(`${dir}/data.jsonl`, text);
      await refused("--source data.jsonl", message);
    };
    await data('{"text":"a"}\n{"text":\n', /^Cannot read "data.jsonl", line 2: /);
    await data('{"ask":"a","say":"b"}\n', /^Cannot read "data.jsonl", line 1: it has the columns "ask", "say"/);
    await data("", /^Cannot train on "data.jsonl": it has no records$/m);
  }));

Deno.test("03 refuses rows that are longer than the model's positions", () =>
  inFolder(async (dir) => {
    for (const name of ["tokenizer.json", "tokenizer_config.json"]) {
      Deno.mkdirSync(`${dir}/model`, { recursive: true });
      Deno.copyFileSync(`${ROOT}fixtures/tiny/tokenizer/${name}`, `${dir}/model/${name}`);
    }
    const config = JSON.parse(Deno.readTextFileSync(`${ROOT}fixtures/golden/tiny/model_hf/config.json`));
    Deno.writeTextFileSync(`${dir}/model/config.json`, JSON.stringify({ ...config, max_position_embeddings: 128 }));
    const line = "--source qa --tokenizer model";
    const long =
      /^Cannot make rows of 256 tokens: the model of "model" has 128 positions: use a smaller --max-seq-length$/m;
    assertRefused(await attempt(dir, "03_dataset", line), long);
    const ids = { bos_token_id: 0, eos_token_id: 0, pad_token_id: 0 };
    Deno.writeTextFileSync(`${dir}/model/config.json`, JSON.stringify({ ...config, vocab_size: 64, ...ids }));
    const small = /^Cannot use the tokenizer of "model": it has 1024 tokens, the model 64$/m;
    assertRefused(await attempt(dir, "03_dataset", `${line} --max-seq-length 32`), small);
  }));
