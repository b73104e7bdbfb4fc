/**
 * Whole training updates: forward, backward, norm, clipping and AdamW, with the losses checked, the time by kernel, the
 * memory, and what JavaScript costs.
 */
import process from "node:process";
import { type Gpu, openGpu } from "../../lib/gpu/device.ts";
import { byLabel, type LabelTime } from "../../lib/gpu/trace.ts";
import type { Adapter } from "../../lib/model/adapter.ts";
import type { ModelConfig } from "../../lib/model/config.ts";
import type { MicroBatch } from "../../lib/model/llama.ts";
import type { TileCache } from "../../lib/model/tiles.ts";
import { type Hyperparameters, Trainer } from "../../lib/model/trainer.ts";
import { installErrorHandler } from "../../lib/run/flags.ts";
import { memoryInUse } from "./host.ts";
import { median, watchOthers } from "./measure.ts";
import { blogConfig, randomBatch, SMALL_LOSSES, writeRandomModel, writeSmallProblem } from "./problem.ts";

/** How a step is measured: `dir` is a folder for models, peaks are those of the device. */
export interface StepOptions {
  readonly name: string;
  readonly dir: string;
  readonly quick: boolean;
  readonly shared: boolean;
  readonly peakGflops: number;
}

/** What to train, and the losses that it must show before its first updates. */
export interface StepCase {
  readonly name: string;
  readonly model: string;
  readonly adapter?: Adapter;
  readonly batch: MicroBatch;
  readonly losses: readonly number[];
  /** Largest difference from `losses`, relative. */
  readonly within: number;
  readonly resident?: boolean;
  readonly checkpointing?: "none" | "block";
}

/** One line of `steps` in bench.json. */
export interface StepResult {
  readonly name: string;
  readonly tokens: number;
  readonly tokens_per_s: number;
  readonly ms: number;
  readonly min_ms: number;
  readonly max_ms: number;
  /** From the files to a model that is ready, on a GPU with the tiles chosen; then the first update, which compiles. */
  readonly open_ms: number;
  readonly first_ms: number;
  /** Where the device is the processor: does not fall when other programs run. */
  readonly tokens_per_cpu_s: number | null;
  /** Share of the processors that other programs used meanwhile; null off Linux. */
  readonly others_share: number | null;
  /** Arithmetic of the model, nothing that is computed twice, over what the peak would do in that time. */
  readonly share: number;
  readonly dispatches: number;
  /** This thread until all is submitted. */
  readonly host_ms_per_1000_dispatches: number;
  /** Of that all but what WebGPU does by itself where a command buffer is finished and submitted. */
  readonly javascript_ms_per_1000_dispatches: number;
  readonly losses: readonly number[];
  readonly breakdown: readonly LabelTime[];
  readonly plan_bytes: number;
  readonly driver_bytes: number | null;
  readonly tiles: readonly { readonly shape: string; readonly tile: string; readonly ms: Record<string, number> }[];
}

const HYPER: Hyperparameters = {
  optimizer: "adamw",
  weightDecay: 0.01,
  beta1: 0.9,
  beta2: 0.999,
  eps: 1e-8,
  maxGradNorm: 0,
};

/** The steps that fit the device, each made when it is its turn; `dir` is a folder for the models. */
export function stepCases(
  gpu: Gpu,
  { dir, quick }: { dir: string; quick: boolean },
): { name: string; make: () => Promise<StepCase> }[] {
  const small = async (mode: "lora" | "full"): Promise<StepCase> => {
    const model = `${dir}/small`;
    await Deno.mkdir(model, { recursive: true });
    const { adapter, batch } = await writeSmallProblem(model);
    // The full losses fall steeply, which makes rounding grow.
    const check = { losses: SMALL_LOSSES[mode], within: mode === "full" ? 2e-3 : 2e-4 };
    return { name: `peers_small_${mode}`, model, batch, ...check, ...(mode === "lora" ? { adapter } : {}) };
  };
  const random = async (
    name: string,
    { config, rows, length, ...how }: {
      config: ModelConfig;
      rows: number;
      length: number;
      resident?: boolean;
      checkpointing?: "none" | "block";
    },
  ): Promise<StepCase> => {
    const { model, adapter } = await writeRandomModel(dir, { config, quantized: true });
    const batch = randomBatch({ rows, length, vocab: config.vocab_size, seed: 1 });
    // Random weights know nothing: the loss is that of a uniform guess.
    return { name, model, adapter, batch, losses: [Math.log(config.vocab_size)], within: 0.1, ...how };
  };
  const blog = { config: blogConfig(), rows: 4, length: 1024 };
  const layer = blogConfig({ num_hidden_layers: 1, vocab_size: 1024 });
  return [
    { name: "tiny", make: () => random("tiny", { config: TINY, rows: 4, length: 256 }) },
    { name: "peers_small_lora", make: () => small("lora") },
    { name: "peers_small_full", make: () => small("full") },
    ...(gpu.cpu
      ? [
        { name: "blog_layer", make: () => random("blog_layer", { config: layer, rows: 2, length: 128 }) },
        ...(quick ? [] : [{ name: "blog_128", make: () => random("blog_128", { ...blog, rows: 1, length: 128 }) }]),
      ]
      : [
        { name: "blog", make: () => random("blog", { ...blog, resident: true }) },
        { name: "blog_block", make: () => random("blog_block", { ...blog, checkpointing: "block" }) },
      ]),
  ];
}

/** The bundled fixture's size. */
export const TINY = blogConfig({
  vocab_size: 1024,
  hidden_size: 128,
  intermediate_size: 344,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  max_position_embeddings: 256,
  dtype: "float32",
});

/**
 * Runs `benchStep` in a process of its own, so that its memory is its own. Throws where that fails, or has not ended after
 * `seconds`.
 */
export async function runStep(options: StepOptions, seconds?: number): Promise<StepResult> {
  const args = ["run", "-A", import.meta.filename!, JSON.stringify(options)];
  const child = new Deno.Command(Deno.execPath(), { args, stdout: "piped", stderr: "inherit" }).spawn();
  const timer = seconds === undefined ? undefined : setTimeout(() => child.kill("SIGKILL"), seconds * 1e3);
  const { success, code, signal, stdout } = await child.output();
  clearTimeout(timer);
  if (!success) {
    const how = signal === "SIGKILL"
      ? `was killed, ${seconds?.toFixed(0)} s after it began`
      : `ended with status ${code}`;
    throw new Error(`Cannot time ${options.name}: its process ${how}`);
  }
  return JSON.parse(new TextDecoder().decode(stdout));
}

if (import.meta.main) {
  installErrorHandler();
  const options: StepOptions = JSON.parse(Deno.args[0]!);
  const opened = await openGpu(), gpu = options.shared ? { ...opened, lanes: "shared" as const } : opened;
  const of = await stepCases(gpu, options).find(({ name }) => name === options.name)!.make();
  console.log(JSON.stringify(await benchStep(gpu, of, options)));
  Deno.exit(0);
}

/** Tiles that earlier steps measured, kept beside the models. */
function openTiles(dir: string): TileCache & { save(): void } {
  const path = `${dir}/tiles.json`, tiles = new Map<string, string>(Object.entries(readJson(path)));
  return {
    get: (key) => tiles.get(key),
    set: (key, tile) => tiles.set(key, tile),
    save: () => Deno.writeTextFileSync(path, JSON.stringify(Object.fromEntries(tiles))),
  };
}

function readJson(path: string): Record<string, string> {
  try {
    return JSON.parse(Deno.readTextFileSync(path));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return {};
    throw error;
  }
}

/** Trains `of` for some updates, checks the first losses and times the later updates. */
async function benchStep(
  gpu: Gpu,
  of: StepCase,
  { dir, quick, peakGflops }: StepOptions,
): Promise<StepResult> {
  const memoryBefore = await memoryInUse(gpu);
  const { model, adapter, batch, resident = false, checkpointing = "none" } = of, tokens = batch.inputIds.length;
  const train = adapter ? "lora" : "full";
  const opening = performance.now(), how = { resident, checkpointing, tokens, train, hyper: HYPER } as const;
  const tiles = openTiles(dir);
  const trainer = await Trainer.open({ gpu, model, adapter, ...how, tiles });
  const open_ms = performance.now() - opening;
  tiles.save();
  const losses: number[] = [];
  let step = 0;
  const update = () => trainer.update([batch], { step: ++step, learningRate: 1e-3 });
  const read = async () => losses.push(...(await trainer.read()).map(({ loss }) => loss));
  const began = performance.now();
  update();
  await read();
  const first = performance.now() - began;
  for (let i = 1; i < of.losses.length; i++) update();
  await read();
  of.losses.forEach((expected, i) => {
    if (!(Math.abs(losses[i]! - expected) <= of.within * expected)) {
      throw new Error(`Cannot time ${of.name}: the loss before update ${i + 1} is ${losses[i]}, not ${expected}`);
    }
  });

  // A GPU is fed some updates at a time, as in training.
  const together = gpu.cpu ? 1 : 4, times: number[] = [], host: HostTime[] = [];
  await gpu.queue.onSubmittedWorkDone();
  const before = process.cpuUsage(), others = watchOthers();
  const started = performance.now();
  const enough = (runs: number) => runs >= (quick ? 3 : 24) || performance.now() - started > (runs < 8 ? 30e3 : 6e3);
  for (let i = 0; i < 3 || !enough(i); i++) {
    const start = performance.now();
    host.push(timeHost(update));
    for (let j = 1; j < together; j++) update();
    // Deno waits for the device inside this call; its promise would take 10 ms more.
    gpu.queue.onSubmittedWorkDone();
    times.push((performance.now() - start) / together);
  }
  const cpu = process.cpuUsage(before), cpuS = (cpu.user + cpu.system) / 1e6, others_share = others();
  await read();
  const last = losses.at(-1)!;
  if (!(last < losses[0]!)) {
    throw new Error(`Cannot time ${of.name}: it learns nothing: the loss was ${losses[0]}, then ${last}`);
  }
  const memoryAfter = await memoryInUse(gpu);
  const timings = await trainer.profile([batch], { step: ++step, learningRate: 1e-3 });
  await read();
  const ms = median(times), flop = stepFlop(trainer, batch);
  const planned = Object.values(trainer.memory()).reduce((sum, n) => sum + n, 0);
  return {
    name: of.name,
    tokens,
    tokens_per_s: 1e3 * tokens / ms,
    ms,
    min_ms: Math.min(...times),
    max_ms: Math.max(...times),
    open_ms,
    first_ms: first,
    others_share,
    tokens_per_cpu_s: gpu.cpu ? tokens * times.length / cpuS : null,
    share: flop / ms / 1e6 / peakGflops,
    dispatches: timings.length,
    host_ms_per_1000_dispatches: 1e3 * median(host.map(({ ms }) => ms)) / timings.length,
    javascript_ms_per_1000_dispatches: 1e3 * median(host.map(({ javascript }) => javascript)) / timings.length,
    losses: losses.slice(0, of.losses.length),
    breakdown: byLabel(timings),
    plan_bytes: planned,
    driver_bytes: memoryBefore === null || memoryAfter === null ? null : memoryAfter - memoryBefore,
    tiles: trainer.llama.tiles.map(({ shape, tile, ms }) => ({ shape, tile, ms: Object.fromEntries(ms) })),
  };
}

/** How long a call kept this thread, and how long without what WebGPU does by itself. */
interface HostTime {
  readonly ms: number;
  readonly javascript: number;
}

/** Times `work`; meanwhile the methods in which WebGPU checks, records and submits are replaced by ones that time them. */
function timeHost(work: () => void): HostTime {
  let own = 0;
  const timed = <A extends unknown[], R>(method: (...args: A) => R) =>
    function (this: unknown, ...args: A): R {
      const start = performance.now();
      const result = method.apply(this, args);
      own += performance.now() - start;
      return result;
    };
  const { finish } = GPUCommandEncoder.prototype, { submit } = GPUQueue.prototype;
  GPUCommandEncoder.prototype.finish = timed(finish);
  GPUQueue.prototype.submit = timed(submit);
  const start = performance.now();
  try {
    work();
  } finally {
    GPUCommandEncoder.prototype.finish = finish;
    GPUQueue.prototype.submit = submit;
  }
  const ms = performance.now() - start;
  return { ms, javascript: ms - own };
}

/** Operations that the model itself needs for an update of one micro-batch; recomputation is not counted. */
function stepFlop({ llama, trainable }: Trainer, { positionIds, targets }: MicroBatch): number {
  const { config, lora } = llama, tokens = positionIds.length;
  const labelled = Array.from(targets).filter((target) => target >= 0).length;
  const queries = config.num_attention_heads * config.head_dim;
  const layer = llama.weights.layers[0]!;
  const linear = [layer.qkv, layer.o, layer.gateUp, layer.down].reduce((sum, { n, k }) => sum + n * k, 0);
  const pairs = Array.from(positionIds).reduce((sum, position) => sum + position + 1, 0);
  // A product costs 2 per weight forward, 2 for the gradient of its input, and 2 for its own where it learns.
  const products = lora ? 4 : 6;
  const layers = config.num_hidden_layers * (products * linear * tokens + 14 * queries * pairs);
  const head = products * config.vocab_size * config.hidden_size * labelled;
  return layers + head + (lora ? 6 * trainable * tokens : 0);
}
