/**
 * What must hold whatever the numbers are: how rows are divided into micro-batches, an adapter that has learnt nothing, a run
 * that is resumed, and a run that is repeated. Micro-batches and adapters are those of the golden runs.
 */
import { assertEquals, assertGreater } from "@std/assert";
import { downloadBytes } from "../../lib/gpu/tensor.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { Llama, type MicroBatch } from "../../lib/model/llama.ts";
import { readSlots } from "../../lib/model/lora.ts";
import { type Trainer, type UpdateResult } from "../../lib/model/trainer.ts";
import { goldenPath, maxRelative } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";
import { rebuilt } from "./rebuild.ts";
import { argumentsOf, goldenBatches, openTrainer, ratesOf } from "./run.ts";
import { close, same } from "./table.ts";

/** The documents of micro-batches one by one: one begins where positions do. */
function documentsOf(batches: readonly MicroBatch[]): MicroBatch[] {
  return batches.flatMap(({ inputIds, positionIds, targets }) => {
    const starts = Array.from(positionIds).flatMap((position, t) => position === 0 ? [t] : []);
    return starts.map((from, d): MicroBatch => {
      const cut = (values: ArrayLike<number>) => Array.from(values).slice(from, starts[d + 1]);
      return { inputIds: cut(inputIds), positionIds: cut(positionIds), targets: cut(targets) };
    });
  });
}

/** The first `count` tokens of a document. */
function head({ inputIds, positionIds, targets }: MicroBatch, count: number): MicroBatch {
  const cut = (values: ArrayLike<number>) => Array.from(values).slice(0, count);
  return { inputIds: cut(inputIds), positionIds: cut(positionIds), targets: cut(targets) };
}

/** Documents side by side. */
function join(parts: readonly MicroBatch[]): MicroBatch {
  const all = (key: keyof MicroBatch) => parts.flatMap((part) => Array.from(part[key]));
  return { inputIds: all("inputIds"), positionIds: all("positionIds"), targets: all("targets") };
}

/** One update at learning rate 0: loss, norm and gradients, before clipping. */
async function gradientsOf(trainer: Trainer, batches: readonly MicroBatch[]) {
  trainer.update(batches, { step: 1, learningRate: 0 });
  const [{ loss, gradNorm }] = await trainer.read() as [UpdateResult];
  const { gpu, groups } = trainer.llama;
  return { loss, gradNorm, all: await readSlots(gpu, groups.map(({ grad, slots }) => ({ tensor: grad, slots }))) };
}

Deno.test(
  "eight documents give the gradients of their mean token loss, as 1 x 8, 2 x 4, 4 x 2 or 8 x 1",
  { ignore },
  async () => {
    const run = argumentsOf("tiny", "adamw_torch");
    const trainer = await openTrainer("tiny", run, { adapter: goldenPath("tiny/lora_adapter") });
    const documents = documentsOf(goldenBatches("tiny", "bfd").updates[0]!)
      .filter(({ inputIds }) => inputIds.length >= 26).slice(0, 8).map((document, i) => head(document, 12 + 2 * i));
    assertEquals(documents.length, 8);
    const divided = (size: number) =>
      Array.from({ length: 8 / size }, (_, i) => join(documents.slice(i * size, (i + 1) * size)));
    const one = await gradientsOf(trainer, divided(1));
    for (const size of [2, 4, 8]) {
      const other = await gradientsOf(trainer, divided(size)), row = "accumulation divided otherwise";
      close(`${row}: loss`, { actual: [other.loss], expected: [one.loss], bound: 1e-6 });
      close(`${row}: grad_norm`, { actual: [other.gradNorm], expected: [one.gradNorm], bound: 2e-6 });
      for (const [part, expected] of one.all) {
        // Sums over the same rows in another order: rounding, and no more.
        close(`${row}: gradients`, { actual: other.all.get(part)!, expected, bound: 1e-5, part });
      }
    }
    // The control: a mean of the micro-batches' means is another number, since documents have different lengths.
    let means = 0;
    for (const document of documents) means += (await gradientsOf(trainer, [document])).loss / 8;
    assertGreater(maxRelative([means], [one.loss]), 1e-4);
    trainer.destroy();
  },
);

Deno.test("an adapter that has learnt nothing leaves every logit and every loss of the base as it is, bit for bit", {
  ignore,
}, async () => {
  for (const [size, name] of [["tiny", "r8"], ["tiny", "r64"], ["odd", "r43"]] as const) {
    const model = goldenPath(`${size}/model_hf`), batch = goldenBatches(size, "bfd").evaluation.batches[0]!;
    const found: { logits: Float32Array[]; loss: number }[] = [];
    for (const adapter of [undefined, readAdapter(await rebuilt(`${size}/train/initial_adapter_${name}`))]) {
      const llama = await Llama.open({ model, adapter, tokens: batch.inputIds.length });
      llama.evaluate(batch);
      const loss = (await llama.losses())[0]!;
      found.push({ logits: await llama.logits(batch, Array.from({ length: 32 }, (_, i) => i * 7)), loss });
      llama.destroy();
    }
    same("fresh adapter against base: logits and loss", { actual: found[1], expected: found[0] });
  }
});

/** Everything that a Trainer has learnt and remembers, as bytes. */
async function snapshot(trainer: Trainer) {
  const { gpu, groups } = trainer.llama,
    parameters = new Map<string, Uint8Array>(),
    state = new Map<string, Uint8Array>();
  for (const { name, param } of groups) parameters.set(name, await downloadBytes(gpu, param));
  for (const [name, tensor] of trainer.optimizer.state) state.set(name, await downloadBytes(gpu, tensor));
  return { parameters, state };
}

for (const name of ["adamw_torch", "adamw_8bit_large_r"] as const) {
  Deno.test(`a resumed run and a repeated run have every bit of the first: ${name}`, { ignore }, async () => {
    const run = argumentsOf("tiny", name), { updates } = goldenBatches("tiny", "bfd"), rate = ratesOf(run, 30);
    const steps = async (trainer: Trainer, from: number, to: number) => {
      for (let step = from; step <= to; step++) {
        trainer.update(updates[step - 1]!, { step, learningRate: rate(step) });
      }
      return await trainer.read();
    };

    const first = await openTrainer("tiny", run);
    const begun = await steps(first, 1, 2), kept = await snapshot(first);
    const log = [...begun, ...await steps(first, 3, 4)], end = await snapshot(first);
    first.destroy();
    assertGreater([...end.parameters].filter(([key, bytes]) => differ(bytes, kept.parameters.get(key)!)).length, 0);

    const resumed = await openTrainer("tiny", run);
    await steps(resumed, 3, 3); // what it did before is forgotten
    await resumed.restore(kept);
    const losses = await steps(resumed, 3, 4);
    const actual = { losses, ...await snapshot(resumed) }, expected = { losses: log.slice(2), ...end };
    same("resumed against uninterrupted: losses, parameters, moments", { actual, expected });
    resumed.destroy();

    const again = await openTrainer("tiny", run);
    const repeated = { losses: await steps(again, 1, 4), ...await snapshot(again) };
    same("repeated run: losses, parameters, moments", { actual: repeated, expected: { losses: log, ...end } });
    again.destroy();
  });
}

function differ(a: Uint8Array, b: Uint8Array): boolean {
  return a.length !== b.length || a.some((byte, i) => byte !== b[i]);
}
