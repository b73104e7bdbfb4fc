/** Timed programs do what untimed ones do, and their times become a table and a trace. */
import { assert, assertEquals, assertGreater } from "@std/assert";
import { openGpu } from "../../lib/gpu/device.ts";
import { createRows } from "../../lib/gpu/kernel.ts";
import { profile, run, timePasses } from "../../lib/gpu/program.ts";
import { createTensor, download, upload } from "../../lib/gpu/tensor.ts";
import { byLabel, chromeTrace } from "../../lib/gpu/trace.ts";
import { Trainer } from "../../lib/model/trainer.ts";
import { createSwiglu } from "../../lib/ops/swiglu.ts";
import { randomBatch, SMALL, writeRandomModel } from "../bench/problem.ts";
import { temporaryFolder, wave } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";

const ROWS = 300, DIM = 512;

/** Two dispatches with a copy and a clear between them, a third with no rows, and where the results are. */
async function program() {
  const gpu = await openGpu(), op = createSwiglu(gpu, { dim: DIM });
  const tensor = (name: string, columns: number) => createTensor(gpu, { name, shape: [ROWS, columns] });
  const x = tensor("x", 2 * DIM), y = tensor("y", DIM), copied = tensor("copied", DIM);
  await upload(gpu, x, wave(ROWS * 2 * DIM));
  const rows = createRows(gpu, "rows"), zero = createRows(gpu, "zero");
  rows.set(ROWS);
  const first = op.forward({ rows, gateUp: x, out: y });
  const commands = [
    first,
    { copy: { from: y, to: copied, bytes: y.bytes } },
    op.forward({ rows: zero, gateUp: x, out: y }),
    { clear: y },
    op.backward({ rows, gateUp: x, dout: copied }),
  ];
  const results = async () => [await download(gpu, x), await download(gpu, y), await download(gpu, copied)];
  const destroy = () => [x, y, copied].forEach(({ buffer }) => buffer.destroy());
  return { gpu, first, commands, results, destroy };
}

Deno.test("profile() computes what run() does and times every dispatch that has work", { ignore }, async () => {
  const plain = await program();
  run(plain.gpu, plain.commands);
  const expected = await plain.results();
  plain.destroy();
  for (const timestamps of [true, false]) {
    const { gpu, commands, results, destroy } = await program();
    if (timestamps && !gpu.timestamps) continue;
    const timings = await profile({ ...gpu, timestamps }, commands);
    assertEquals(await results(), expected);
    destroy();
    assertEquals(timings.map(({ label }) => label), ["swiglu.forward", "swiglu.backward"]);
    for (const { ms } of timings) assertGreater(ms, 0);
    assertGreater(timings[1]!.start, timings[0]!.ms * 0.99);
  }
});

Deno.test("timePasses() times more passes than one set of queries holds", { ignore }, async () => {
  const { gpu, first, destroy } = await program();
  const spans = await timePasses(gpu, Array.from({ length: 2100 }, () => [first]));
  destroy();
  assertEquals(spans.length, 2100);
  assert(spans.every(({ start }, i) => i === 0 || start >= spans[i - 1]!.start));
});

Deno.test("byLabel() adds up and sorts, chromeTrace() is the JSON that trace viewers read", () => {
  const timings = [
    { label: "a.x", start: 0, ms: 1 },
    { label: "b.y", start: 1, ms: 6 },
    { label: "a.x", start: 7, ms: 1 },
  ];
  assertEquals(byLabel(timings), [
    { label: "b.y", ms: 6, count: 1, share: 0.75 },
    { label: "a.x", ms: 2, count: 2, share: 0.25 },
  ]);
  assertEquals(byLabel([]), []);
  const { traceEvents } = JSON.parse(chromeTrace(timings, "step 3"));
  assertEquals(traceEvents.length, 4);
  assertEquals(traceEvents[2], { pid: 1, tid: 1, ph: "X", name: "b.y", cat: "b", ts: 1000, dur: 6000 });
});

Deno.test("Trainer.profile() learns the same bits as update()", { ignore }, async () => {
  using folder = temporaryFolder();
  const config = { ...SMALL, num_hidden_layers: 1, vocab_size: 64 };
  const { model, adapter } = await writeRandomModel(folder.path, { config, quantized: true });
  const batches = [1, 2].map((seed) => randomBatch({ rows: 1, length: 24, vocab: 64, seed }));
  const hyper = { optimizer: "adamw", weightDecay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, maxGradNorm: 1 } as const;
  const learnt = [];
  for (const profiled of [0, 2]) {
    const trainer = await Trainer.open({ model, adapter, train: "lora", tokens: 24, hyper });
    for (let step = 1; step <= 3; step++) {
      const at = { step, learningRate: 1e-2 };
      if (step === profiled) {
        const timings = await trainer.profile(batches, at);
        assert(timings.every(({ start, ms }, i) => i === 0 || start + ms >= timings[i - 1]!.start));
        assertEquals(timings.at(-1)!.label, "adamw.step32");
      } else trainer.update(batches, at);
    }
    learnt.push({ results: await trainer.read(), parameters: await trainer.llama.parameters() });
    trainer.destroy();
  }
  assertEquals(learnt[1], learnt[0]);
});
