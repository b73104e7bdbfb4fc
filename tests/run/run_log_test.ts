/** Tests of the training log: what is appended, what is cut off on resume, and what is drawn at the end. */
import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { openRunLog } from "../../lib/run/run_log.ts";
import { withFolder } from "../check.ts";

const update = (step: number, loss: number) => ({ step, loss, learning_rate: 1e-3, grad_norm: 0.5 });
const about = { title: "Training", device: "a <device>", state: { best_metric: 1.5, max_steps: 3 } };

Deno.test("openRunLog() appends one object per line and cuts off what a checkpoint did not have", () =>
  withFolder(async (dir) => {
    const path = `${dir}/log.jsonl`;
    const log = await openRunLog(path, 0);
    log.append({ step: 0, eval_loss: 3 });
    log.append(update(1, 2.5));
    const kept = log.bytes();
    assertEquals(kept, Deno.statSync(path).size);
    log.append(update(2, 2));
    Deno.writeTextFileSync(path, '{"step":3,"lo', { append: true }); // as a process leaves it that dies while it writes

    const resumed = await openRunLog(path, kept);
    assertEquals(resumed.losses(), { train: [2.5], eval: [3] });
    resumed.append(update(2, 1.75));
    assertEquals(resumed.losses(), { train: [2.5, 1.75], eval: [3] });
    const lines = Deno.readTextFileSync(path).split("\n");
    assertEquals(lines.pop(), "");
    assertEquals(lines.map((line) => JSON.parse(line)), [{ step: 0, eval_loss: 3 }, update(1, 2.5), update(2, 1.75)]);
    await log.writeReport(dir, about); // closes the files
    await resumed.writeReport(dir, about);
  }));

Deno.test("openRunLog() begins anew at 0 bytes and refuses a log that is shorter than its checkpoint says", () =>
  withFolder(async (dir) => {
    const path = `${dir}/log.jsonl`;
    Deno.writeTextFileSync(path, '{"step":9,"loss":1}\n');
    await assertRejects(() => openRunLog(path, 21), Error, "it has 20 bytes, and had 21 when the checkpoint was made");
    assertEquals(Deno.statSync(path).size, 20);
    const log = await openRunLog(path, 0);
    assertEquals([log.bytes(), Deno.statSync(path).size], [0, 0]);
    log.append(update(1, 2));
    await log.writeReport(dir, about);
  }));

Deno.test("openRunLog() refuses a log with a damaged line, names it and leaves the file as it is", () =>
  withFolder(async (dir) => {
    const path = `${dir}/log.jsonl`, whole = [update(1, 2.5), update(2, 2)].map((e) => JSON.stringify(e) + "\n");
    const bytes = whole.join("").length;
    const refuses = async (text: string, message: string) => {
      Deno.writeTextFileSync(path, text);
      const remedy = ": bring the file back, or start over with --no-resume";
      await assertRejects(() => openRunLog(path, bytes), Error, `Cannot go on with "${path}": ${message}${remedy}`);
      assertEquals(Deno.readTextFileSync(path), text);
    };
    const damaged = (text: string, line: number) =>
      refuses(text, `its line ${line} is damaged: ${JSON.stringify(text.split("\n")[line - 1]!.slice(0, 40))}`);
    await refuses(whole.join("").slice(0, -1) + " ", "its line 2 does not end where the checkpoint was made");
    await damaged(whole.join("").replace('"step":2', '"step"\x1a2') + '{"step":3,"lo', 2);
    await damaged("5".repeat(whole[0]!.length - 1) + "\n" + whole[1], 1);
    await damaged(whole.join("").replace('"step":1', '"stop":1'), 1);
  }));

Deno.test("writeReport() draws the losses and writes trainer_state.json with the whole log", () =>
  withFolder(async (dir) => {
    const log = await openRunLog(`${dir}/log.jsonl`, 0);
    const entries = [{ step: 0, eval_loss: 3 }, update(1, 2.5), update(2, 2), update(3, 1.75), {
      step: 3,
      eval_loss: 2,
      eval_perplexity: 7.25,
    }];
    for (const entry of entries) log.append(entry);
    await log.writeReport(dir, about);
    assertEquals(JSON.parse(Deno.readTextFileSync(`${dir}/trainer_state.json`)), {
      ...about.state,
      log_history: entries,
    });
    const page = Deno.readTextFileSync(`${dir}/report.html`);
    assertEquals(page.match(/<svg/g)?.length, 3);
    assertStringIncludes(page, "a &#60;device&#62;");
    assertStringIncludes(page, "7.25"); // the perplexity after the last update, which is not exp(loss)
    assert(Deno.readTextFileSync(`${dir}/loss.svg`).startsWith("<svg"));
  }));
