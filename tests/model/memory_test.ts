/**
 * What an update makes on the host is given back, however long a run is. A buffer that is not destroyed waits for V8 to
 * collect all garbage, which a run of few JavaScript objects seldom does: buffers are counted, the rest is weighed. And the
 * table of a run has every byte that is on the GPU.
 */
import { assert, assertEquals, assertLess, assertRejects, assertThrows } from "@std/assert";
import { openGpu } from "../../lib/gpu/device.ts";
import { Decoder } from "../../lib/model/decoder.ts";
import { createGenerator } from "../../lib/model/generate.ts";
import { Llama, type LlamaOptions } from "../../lib/model/llama.ts";
import type { OptimizerKind } from "../../lib/model/optimizer.ts";
import { Trainer } from "../../lib/model/trainer.ts";
import { randomBatch, writeRandomModel } from "../bench/problem.ts";
import { NO_GPU as ignore } from "../on_gpu.ts";
import { temporaryFolder } from "../check.ts";
import { CONFIG, HYPER, training } from "./small_training.ts";

/** How a model can be trained, as far as it changes which buffers there are. */
interface Way extends Pick<LlamaOptions, "train" | "checkpointing" | "resident"> {
  readonly name: string;
  readonly quantized: boolean;
  readonly dropout?: number;
  readonly optimizer?: OptimizerKind;
}

const WAYS: readonly Way[] = [
  { name: "qlora", quantized: true },
  { name: "qlora, dropout, block checkpointing", quantized: true, dropout: 0.1, checkpointing: "block" },
  { name: "qlora, resident", quantized: true, resident: true, optimizer: "adamw" },
  { name: "lora", quantized: false },
  { name: "full", quantized: false, train: "full" },
];

/** Buffers and textures that were made and not destroyed while `body` ran: label and bytes of each. */
async function leftBy(body: (left: () => number) => Promise<void>): Promise<string[]> {
  const alive = new Map<object, { label: string; bytes: number }>();
  const { createBuffer, createTexture } = GPUDevice.prototype;
  const destroyed = [GPUBuffer.prototype, GPUTexture.prototype].map(({ destroy }) => destroy);
  GPUDevice.prototype.createBuffer = function (what) {
    const buffer = createBuffer.call(this, what);
    alive.set(buffer, { label: buffer.label, bytes: what.size });
    return buffer;
  };
  GPUDevice.prototype.createTexture = function (what) {
    const texture = createTexture.call(this, what);
    alive.set(texture, { label: `image of ${texture.label}`, bytes: texture.width * texture.height * 16 });
    return texture;
  };
  [GPUBuffer.prototype, GPUTexture.prototype].forEach((of, i) => {
    of.destroy = function () {
      alive.delete(this);
      destroyed[i]!.call(this as GPUBuffer & GPUTexture);
    };
  });
  try {
    await body(() => [...alive.values()].reduce((sum, { bytes }) => sum + bytes, 0));
  } finally {
    Object.assign(GPUDevice.prototype, { createBuffer, createTexture });
    [GPUBuffer.prototype, GPUTexture.prototype].forEach((of, i) => of.destroy = destroyed[i]!);
  }
  return [...alive.values()].map(({ label, bytes }) => `${label}: ${bytes}`);
}

for (const { name, quantized, dropout = 0, optimizer = "adamw_8bit", train = "lora", ...options } of WAYS) {
  Deno.test(
    `Trainer.memory() counts every byte that is allocated, and destroy() frees it: ${name}`,
    { ignore },
    async () => {
      using folder = temporaryFolder();
      const dir = folder.path;
      const { model, adapter } = await writeRandomModel(dir, { config: CONFIG, quantized });
      const lora = { ...adapter.lora, lora_dropout: dropout };
      const left = await leftBy(async (bytes) => {
        const hyper = { ...HYPER, optimizer };
        const trainer = await Trainer.open({
          model,
          adapter: train === "full" ? undefined : { ...adapter, lora },
          train,
          tokens: 16,
          hyper,
          ...options,
        });
        const memory = trainer.memory(), total = Object.values(memory).reduce((sum, n) => sum + n, 0);
        assertEquals(total, bytes());
        for (const [row, n] of Object.entries(memory)) {
          assert(n > 0 || row === "adapter" && train === "full", `${row}: ${n}`);
        }
        trainer.update([randomBatch({ rows: 1, length: 16, vocab: CONFIG.vocab_size, seed: 1 })], {
          step: 1,
          learningRate: 1e-3,
        });
        await trainer.read();
        assertEquals(bytes(), total, "an update made something");
        trainer.destroy();
      });
      assertEquals(left, []);
    },
  );
}

Deno.test(
  "A micro-batch that is too large for the device is refused with the flags that make it smaller",
  { ignore },
  async () => {
    using folder = temporaryFolder();
    const dir = folder.path, gpu = await openGpu();
    const { model, adapter } = await writeRandomModel(dir, { config: CONFIG, quantized: true });
    const limits = new Proxy(gpu.limits, {
      get: (of, key) => key === "maxStorageBufferBindingSize" ? 1 << 16 : of[key as keyof GPUSupportedLimits],
    });
    const small = { ...gpu, limits };
    const remedy = "lower --batch-size, give --checkpointing block, or lower 03's --max-seq-length";
    const options = { model, adapter, train: "lora", tokens: 1024 } as const;
    const refused = `Cannot allocate "x.0" [1024,32] f32: 131072 bytes are more than the 65536 that ${gpu.name} binds`;
    await assertRejects(() => Llama.open({ ...options, gpu: small }), RangeError, `${refused}: ${remedy}`);
    await assertRejects(
      () => Llama.open({ ...options, train: "none", gpu: small }),
      RangeError,
      `${refused}: lower --batch-size or lower 03's --max-seq-length`,
    );
    const llama = await Llama.open({ model, tokens: 16 });
    const { config, ops, weights, lora } = llama;
    assertThrows(
      () => new Decoder({ gpu: small, config, ops, weights, lora }, { batch: 1, context: 1024 }),
      RangeError,
      `${refused}: lower --max-new-tokens`,
    );
    llama.destroy();

    // A CPU driver promises any amount of memory, so one that has none is played.
    const { pushErrorScope, popErrorScope } = GPUDevice.prototype, scopes: GPUErrorFilter[] = [];
    GPUDevice.prototype.pushErrorScope = function (filter) {
      scopes.push(filter);
      return pushErrorScope.call(this, filter);
    };
    GPUDevice.prototype.popErrorScope = async function () {
      const filter = scopes.pop(), error = await popErrorScope.call(this);
      return filter === "out-of-memory" ? new GPUOutOfMemoryError("not enough memory left") : error;
    };
    const open = Llama.open({ ...options, checkpointing: "block", tokens: 16 }).finally(() =>
      Object.assign(GPUDevice.prototype, { pushErrorScope, popErrorScope })
    );
    const state = `micro-batches of 16 tokens do not fit into the memory of "${gpu.name}" beside the weights`;
    await assertRejects(
      () => open,
      Error,
      `Cannot open "${model}": ${state}: lower --batch-size or lower 03's --max-seq-length`,
    );
  },
);

Deno.test("A generator frees all that it made", { ignore }, async () => {
  using folder = temporaryFolder();
  const dir = folder.path;
  const { model, adapter } = await writeRandomModel(dir, { config: CONFIG, quantized: true });
  const left = await leftBy(async () => {
    const generator = await createGenerator({ model, adapter, batch: 2 });
    await generator.generate([[1, 2, 3], [4]], { maxNewTokens: 3, greedy: true });
    generator.destroy();
  });
  assertEquals(left, []);
});

Deno.test("An update records nothing anew, and every buffer of a reading is destroyed", { ignore }, async () => {
  const made: Record<string, number> = {};
  const count = (of: object, name: string) => {
    const methods = of as Record<string, (...given: unknown[]) => unknown>, method = methods[name]!;
    methods[name] = function (...given) {
      made[name] = (made[name] ?? 0) + 1;
      return method.apply(this, given);
    };
    return () => methods[name] = method;
  };
  await training(async (update) => {
    await update(2);
    const create = ["createBuffer", "createBindGroup", "createComputePipeline", "createShaderModule", "createQuerySet"];
    const restore = [...create, "createCommandEncoder"].map((name) => count(GPUDevice.prototype, name));
    restore.push(count(GPUBuffer.prototype, "destroy"), count(GPUQueue.prototype, "submit"));
    await update(32);
    for (const undo of restore) undo();
  });
  // Three readings, of losses and of norms; a submit for each update and each reading, and one to clear the losses.
  assertEquals(made, { createBuffer: 6, destroy: 6, createCommandEncoder: 41, submit: 41 });
});

Deno.test("A thousand updates leave the memory of the process as it was", { ignore }, async () => {
  // A process of its own: whatever else this one does at the same time would be weighed too.
  const run = ["run", "--quiet", "-A", "--v8-flags=--expose-gc", new URL("thousand_updates.ts", import.meta.url).href];
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), { args: run }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  assertEquals([code, text(stderr)], [0, ""]);
  const sizes = JSON.parse(text(stdout)) as { process: number; javascript: number }[];
  assertEquals(sizes.length, 6);
  // What each update keeps is kept in all five stretches; V8 compiling or moving something shows in some. So the second
  // least counts. Found: up to 41 kB of the process and 1 kB of JavaScript; a small buffer kept per update is 200 kB.
  for (const [part, most] of [["process", 150e3], ["javascript", 60e3]] as const) {
    const growth = sizes.slice(1).map((size, i) => size[part] - sizes[i]![part]);
    const second = growth.toSorted((a, b) => a - b)[1]!;
    assertLess(second, most, `memory of ${part} after each 200 updates: +${growth} bytes`);
  }
});
