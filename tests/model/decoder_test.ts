/**
 * The cached forward pass against the whole one, and against itself in other batches. The two sum in different orders: the
 * largest difference found is 7e-7 of the largest logit without and 6e-6 with the adapters, which amplify roundings (the
 * whole pass is 5e-6, the cached one 3e-6 away from the reference in 64 bits). The bounds are three times that.
 */
import { assertEquals } from "@std/assert";
import { readAdapter } from "../../lib/model/adapter.ts";
import { readConfig } from "../../lib/model/config.ts";
import { Decoder } from "../../lib/model/decoder.ts";
import { Llama } from "../../lib/model/llama.ts";
import { createLora } from "../../lib/model/lora.ts";
import { createOps } from "../../lib/model/ops.ts";
import { planWeights } from "../../lib/model/weights.ts";
import { assertClose, goldenPath } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";

/** Documents of different lengths, one of a single token, more than a tile of rows in all. */
function documents(count: number, vocab: number): number[][] {
  const ids = (from: number, length: number) => Array.from({ length }, (_, i) => (from * 131 + i * 7919 + 11) % vocab);
  return Array.from({ length: count }, (_, d) => ids(d, [9, 1, 40, 33, 2][d % 5]! + 12));
}

for (const [config, adapter] of [["tiny", false], ["tiny", true], ["odd", true]] as const) {
  gpuTest(`Decoder gives the logits of the whole forward pass: ${config}, adapter ${adapter}`, async ({ gpu }) => {
    const dir = goldenPath(`${config}/model_hf`), settings = readConfig(dir);
    const read = adapter ? readAdapter(goldenPath(`${config}/generate_adapter`), settings) : undefined;
    const lora = read && await createLora(gpu, { config: settings, ...read });
    const ops = await createOps(gpu, settings), { weights, fill } = planWeights(gpu, { dir, config: settings });
    await fill();
    const decoder = new Decoder({ gpu, config: settings, ops, weights, lora }, { batch: 5, context: 64 });
    const llama = await Llama.open({ model: dir, adapter: read, tokens: 64 });
    const texts = documents(5, settings.vocab_size);
    // Slots in another order than the prompts; the sequences leave the batch one by one.
    const fresh = texts.map((ids, slot) => ({ ids: ids.slice(0, -12), slot: 4 - slot }));
    const found = (await decoder.prefill(fresh)).map((row) => [row]);
    for (let i = 0; i < 12; i++) {
      const live = texts.map((_, t) => t).filter((t) => i < 12 - t);
      const rows = await decoder.step(live.map((t) => {
        const position = texts[t]!.length - 12 + i;
        return { id: texts[t]![position]!, position, slot: 4 - t };
      }));
      live.forEach((t, r) => found[t]!.push(rows[r]!));
    }
    for (const [t, ids] of texts.entries()) {
      const whole = await llama.logits({ inputIds: ids, positionIds: ids.map((_, i) => i) });
      assertEquals(found[t]!.length, 13 - t);
      found[t]!.forEach((row, i) => {
        const name = `text ${t}, ${i} steps after its prompt`;
        assertClose(row, whole[ids.length - 13 + i]!, { max: adapter ? 2e-5 : 2e-6, name });
      });
    }
    await decoder.settle();
    decoder.destroy();
    llama.destroy();
  });
}

gpuTest("Decoder gives a sequence the same bits in any batch", async ({ gpu }) => {
  const model = goldenPath("tiny/model_hf"), adapter = goldenPath("tiny/generate_adapter");
  const llama = await Llama.open({ gpu, model, adapter, tokens: 32 });
  const texts = documents(19, llama.config.vocab_size).map((ids) => ids.slice(0, 30));
  const rowsOf = async (batch: number): Promise<Float32Array[][]> => {
    const decoder = new Decoder(llama, { batch, context: 64 }), found: Float32Array[][] = [];
    for (let first = 0; first < texts.length; first += batch) {
      const fresh = texts.slice(first, first + batch).map((ids, slot) => ({ ids, slot }));
      const rows = [await decoder.prefill(fresh)];
      for (let i = 0; i < 3; i++) {
        rows.push(await decoder.step(fresh.map(({ ids, slot }) => ({ id: i + 5, position: ids.length + i, slot }))));
      }
      fresh.forEach((_, r) => found.push(rows.map((row) => row[r]!)));
    }
    await decoder.settle();
    decoder.destroy();
    return found;
  };
  const alone = await rowsOf(1);
  for (const batch of [2, 3, 7, 19]) {
    const found = await rowsOf(batch);
    const differing = found.findIndex((rows, t) =>
      rows.some((row, i) => row.some((x, v) => !Object.is(x, alone[t]![i]![v])))
    );
    assertEquals(differing, -1, `batch ${batch}`);
  }
  llama.destroy();
});
