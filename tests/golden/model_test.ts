/**
 * The model on the GPU against transformers and PEFT: logits, every layer's output, losses and gradients of both golden
 * configurations, with float32 and NF4 weights, with and without block checkpointing.
 */
import { assertGreater } from "@std/assert";
import { nextTokenTargets } from "../../lib/data/dataset.ts";
import { openGpu } from "../../lib/gpu/device.ts";
import { download } from "../../lib/gpu/tensor.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { Llama, type LlamaOptions, type MicroBatch } from "../../lib/model/llama.ts";
import { readSlots } from "../../lib/model/lora.ts";
import { labelledTokens } from "../../lib/model/trainer.ts";
import { type Golden, golden, goldenPath, maxRelative } from "../check.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";
import { rebuilt } from "./rebuild.ts";
import { BOUND, close, same, within } from "./table.ts";

const SIZES = ["tiny", "odd"] as const;

/** The tokens of a golden case: rows of 48 one after the other, positions counted from each row's start unless given. */
function batchOf(file: Golden, prefix: string, labelsOf = prefix): MicroBatch {
  const inputIds = file.i32(`${prefix}input_ids`);
  const given = file.names.includes(`${prefix}position_ids`);
  const positionIds = given ? file.i32(`${prefix}position_ids`) : inputIds.map((_, t) => t % 48);
  const labels = file.names.includes(`${labelsOf}labels`) ? file.i32(`${labelsOf}labels`) : inputIds;
  return { inputIds, positionIds, targets: nextTokenTargets({ positionIds, labels }) };
}

/** Logits of tokens `from` to `to`, one after the other. */
async function logitsOf(llama: Llama, batch: MicroBatch, [from, to] = [0, batch.inputIds.length]) {
  const rows = await llama.logits(batch, Array.from({ length: to! - from! }, (_, i) => from! + i));
  const V = llama.config.vocab_size, out = new Float32Array(rows.length * V);
  rows.forEach((row, r) => out.set(row, r * V));
  return out;
}

/** Mean loss of a batch's labelled tokens. */
async function lossOf(llama: Llama, batch: MicroBatch): Promise<number> {
  const count = llama.evaluate(batch);
  return (await llama.losses())[0]! / count;
}

interface Gradients {
  readonly loss: number;
  readonly all: ReadonlyMap<string, Float32Array>;
  /** Gradient of the embedding's output. */
  readonly dx: Float32Array;
}

/** One training micro-batch. */
async function gradientsOf(llama: Llama, batch: MicroBatch): Promise<Gradients> {
  const items = labelledTokens([batch]);
  llama.zeroGradients();
  llama.accumulate(batch, { items, slot: 0 });
  const loss = (await llama.losses())[0]! / items;
  const all = await readSlots(llama.gpu, llama.groups.map(({ grad, slots }) => ({ tensor: grad, slots })));
  const dx = await download(llama.gpu, llama.plan.gradients!.dx);
  return { loss, all, dx: dx.subarray(0, batch.inputIds.length * llama.config.hidden_size) };
}

/** Opens a model for the duration of `use`. */
async function withLlama<T>(options: Omit<LlamaOptions, "tokens">, use: (llama: Llama) => Promise<T>): Promise<T> {
  const llama = await Llama.open({ ...options, tokens: 96 });
  try {
    return await use(llama);
  } finally {
    llama.destroy();
  }
}

/** How many differ in any bit. */
function otherBits(a: Gradients, b: Gradients): number {
  let count = a.loss === b.loss ? 0 : 1;
  for (const [name, values] of [...a.all, ["dx", a.dx] as const]) {
    const others = name === "dx" ? b.dx : b.all.get(name)!;
    const [left, right] = [values, others].map((v) => new Uint32Array(v.buffer, v.byteOffset, v.length));
    for (let i = 0; i < left!.length; i++) if (left![i] !== right![i]) count++;
  }
  return count;
}

/** All of forward.safetensors that is stored; of `odd` the last rows of hidden states and tokens 40 to 48 of logits. */
async function checkForward(llama: Llama, { size, row }: { size: string; row: string }): Promise<void> {
  const file = golden(`${size}/forward.safetensors`), C = llama.config.hidden_size, V = llama.config.vocab_size;
  const forward = (part: string, actual: ArrayLike<number>, expected: ArrayLike<number>, which = "logits") =>
    close(`forward ${row}: ${which}`, { actual, expected, bound: BOUND.forward, part });
  const loss = async (part: string, batch: MicroBatch, name = `${part}.loss`) =>
    forward(part, [await lossOf(llama, batch)], file.f32(name), "loss");
  const plain = batchOf(file, "plain."), packed = batchOf(file, "packed."), padded = batchOf(file, "padded.");

  await loss("plain", plain);
  const nll = (await download(llama.gpu, llama.plan.batch.nll)).subarray(0, 94);
  forward("plain", nll, file.f32("plain.token_nll"), "loss of each token");
  for (let l = 0; l < llama.config.num_hidden_layers; l++) {
    const expected = file.f32(`plain.hidden.layer${l}`);
    const y = (await download(llama.gpu, llama.plan.x[l + 1]!)).subarray(0, 96 * C);
    forward(`layer ${l}`, y.subarray(96 * C - expected.length), expected, "output of each layer");
  }
  const all = await logitsOf(llama, plain), wanted = file.f32("plain.logits");
  const norm = (await download(llama.gpu, llama.plan.head.h)).subarray(0, 96 * C),
    final = file.f32("plain.hidden.final_norm");
  forward("final norm", norm.subarray(96 * C - final.length), final, "output of each layer");
  const perRow = wanted.length / V / 2;
  for (const r of [0, 1]) {
    const actual = all.subarray((r * 48 + 48 - perRow) * V, (r * 48 + 48) * V);
    forward(`plain row ${r}`, actual, wanted.subarray(r * perRow * V, (r + 1) * perRow * V));
  }

  await loss("prompt_masked", batchOf(file, "plain.", "prompt_masked."));
  await loss("packed", packed);
  const packedLogits = file.f32("packed.logits");
  forward("packed", await logitsOf(llama, packed, [48 - packedLogits.length / V, 48]), packedLogits);
  const joined = packed.inputIds as Int32Array, positionIds = joined.map((_, t) => t);
  await loss("one document", { ...packed, positionIds }, "packed.loss_without_isolation");

  await loss("padded", padded);
  if (!file.names.includes("padded.logits")) return;
  const length = file.i32("padded.attention_mask").subarray(48).reduce((sum, m) => sum + m, 0);
  forward(
    "padded",
    await logitsOf(llama, padded, [48, 48 + length]),
    file.f32("padded.logits").subarray(0, length * V),
  );
}

/** Loss, gradients and, where stored, dx and the first logits of one case. */
function checkGradients(found: Gradients, { file, prefix, row }: { file: Golden; prefix: string; row: string }): void {
  close(`${row}: loss`, { actual: [found.loss], expected: file.f32(`${prefix}loss`), bound: BOUND.forward });
  if (file.names.includes(`${prefix}dx`)) {
    close(`${row}: dx`, { actual: found.dx, expected: file.f32(`${prefix}dx`), bound: BOUND.gradient });
  }
  const expected = file.floats(`${prefix}grad.`);
  assertGreater(expected.size, 0);
  for (const [part, values] of expected) {
    const actual = found.all.get(part)!;
    // Of some matrices the last rows are stored.
    const bound = BOUND.gradient;
    close(`${row}: gradients`, {
      actual: actual.subarray(actual.length - values.length),
      expected: values,
      bound,
      part,
    });
  }
}

for (const size of SIZES) {
  const model = goldenPath(`${size}/model_hf`);

  Deno.test(`Llama gives transformers' layers, logits and losses, and autograd's gradient of every weight: ${size}`, {
    ignore,
  }, async () => {
    const file = golden(`${size}/full_grads.safetensors`), cases = ["", "packed."];
    const [none, block] = [[], []] as Gradients[][];
    await withLlama({ model, train: "full" }, async (llama) => {
      await checkForward(llama, { size, row: size });
      for (const prefix of cases) none!.push(await gradientsOf(llama, batchOf(file, prefix)));
    });
    cases.forEach((prefix, i) =>
      checkGradients(none![i]!, { file, prefix, row: `full ${size} ${prefix === "" ? "plain" : "packed"}` })
    );
    await withLlama({ model, train: "full", checkpointing: "block" }, async (llama) => {
      for (const prefix of cases) block!.push(await gradientsOf(llama, batchOf(file, prefix)));
    });
    const error = none!.reduce((sum, found, i) => sum + otherBits(found, block![i]!), 0);
    within(`full ${size}: checkpointing block against none, bits`, { error, bound: 0 });
  });

  for (const [kind, folder] of [["lora", "model_hf"], ["qlora", "model_4bit"]] as const) {
    Deno.test(
      `Llama gives PEFT's gradients of A, B and the embedding's output: ${size} ${kind}`,
      { ignore },
      async () => {
        const file = golden(`${size}/${kind}.safetensors`), cases = ["plain.", "packed."];
        const from = folder === "model_hf"
          ? model
          : size === "tiny"
          ? goldenPath("tiny/model_4bit")
          : await rebuilt("odd/model_4bit");
        const adapter = readAdapter(goldenPath(`${size}/lora_adapter`));
        const runs: Gradients[][] = [];
        const options = { model: from, adapter, train: "lora", inputGradient: true } as const;
        const variants = [{}, { checkpointing: "block" }, ...(kind === "qlora" ? [{ resident: true }] : [])] as const;
        for (const variant of variants) {
          await withLlama({ ...options, ...variant }, async (llama) => {
            const found: Gradients[] = [];
            for (const prefix of cases) {
              const batch = batchOf(file, prefix), logits = `${prefix}logits_row0`;
              found.push(await gradientsOf(llama, batch));
              if (runs.length > 0 || !file.names.includes(logits)) continue;
              const expected = file.f32(logits), tokens = expected.length / llama.config.vocab_size;
              const actual = await logitsOf(llama, batch, [0, tokens]);
              close(`${kind} ${size}: logits`, { actual, expected, bound: BOUND.forward, part: prefix });
            }
            runs.push(found);
          });
        }
        cases.forEach((prefix, i) =>
          checkGradients(runs[0]![i]!, { file, prefix, row: `${kind} ${size} ${prefix.slice(0, -1)}` })
        );
        variants.slice(1).forEach((variant, v) => {
          const error = cases.reduce((sum, _, i) => sum + otherBits(runs[0]![i]!, runs[v + 1]![i]!), 0);
          within(`${kind} ${size}: ${Object.entries(variant)[0]!.join(" ")} against none, bits`, { error, bound: 0 });
        });
      },
    );
  }
}

Deno.test(
  "Llama gives the same on kernels that share workgroup memory, as GPUs run them: tiny",
  { ignore },
  async () => {
    const gpu = { ...await openGpu(), lanes: "shared", cpu: false } as const;
    const model = goldenPath("tiny/model_hf"), file = golden("tiny/lora.safetensors");
    await withLlama(
      { model, train: "full", gpu },
      (llama) => checkForward(llama, { size: "tiny", row: "tiny, shared" }),
    );
    const adapter = readAdapter(goldenPath("tiny/lora_adapter"));
    await withLlama({ model, adapter, train: "lora", inputGradient: true, gpu }, async (llama) => {
      const found = await gradientsOf(llama, batchOf(file, "packed."));
      checkGradients(found, { file, prefix: "packed.", row: "lora tiny packed, shared" });
    });
  },
);

Deno.test(
  "a document's logits do not depend on what is packed beside it, nor on padding behind it",
  { ignore },
  async () => {
    const file = golden("tiny/forward.safetensors"), model = goldenPath("tiny/model_hf");
    await withLlama({ model }, async (llama) => {
      const V = llama.config.vocab_size, packed = batchOf(file, "packed.");
      const together = await logitsOf(llama, packed);
      for (const [from, to] of [[0, 20], [20, 37], [37, 48]] as const) {
        const inputIds = Array.from(packed.inputIds).slice(from, to), positionIds = inputIds.map((_, t) => t);
        const alone = await logitsOf(llama, { inputIds, positionIds, targets: inputIds });
        const bound = BOUND.forward;
        close("packed against alone: logits", { actual: together.subarray(from * V, to * V), expected: alone, bound });
      }
      // Padding is behind the document and another token than in the golden case: nothing before it may change.
      const padded = batchOf(file, "padded."),
        length = Array.from(padded.targets).slice(48).findIndex((id) => id < 0) + 1;
      const other = { ...padded, inputIds: Array.from(padded.inputIds, (id, t) => t >= 48 + length ? 5 : id) };
      const [first, second] = [
        await logitsOf(llama, padded, [0, 48 + length]),
        await logitsOf(llama, other, [0, 48 + length]),
      ];
      same("another token as padding: logits", { actual: second, expected: first });
      const [loss, otherLoss] = [await lossOf(llama, padded), await lossOf(llama, other)];
      same("another token as padding: loss", { actual: otherLoss, expected: loss });
      // The control: a token inside the document changes what comes after it.
      const changed = { ...padded, inputIds: Array.from(padded.inputIds, (id, t) => t === 50 ? 5 : id) };
      assertGreater(maxRelative(await logitsOf(llama, changed, [51, 48 + length]), first.subarray(51 * V)), 1e-3);
    });
  },
);
