/**
 * Measuring on the device: inputs, repeated runs, medians, and how busy the machine was with other work. Refuses to time a
 * kernel whose result was not checked.
 */
import process from "node:process";
import { fromFloat32, toFloat32 } from "../../lib/data/dtype.ts";
import type { Gpu } from "../../lib/gpu/device.ts";
import { type Command, createRows, type Dispatch, type Rows } from "../../lib/gpu/kernel.ts";
import { run, timePasses } from "../../lib/gpu/program.ts";
import {
  createBuffer,
  createTensor,
  destroyOwned,
  downloadBytes,
  own,
  type Storage,
  type Tensor,
  upload,
} from "../../lib/gpu/tensor.ts";
import { assertClose } from "../check.ts";

/** Time of one run of some commands, in ms: the median of `runs`, each the mean of as many repetitions as fill it. */
export interface Measured {
  readonly ms: number;
  readonly min_ms: number;
  readonly max_ms: number;
  readonly runs: number;
  /** Processor time of all threads, where the device is the processor: what other programs take is not in it. */
  readonly cpu_ms: number | null;
  /** Share of the processors that other programs used meanwhile; null off Linux. */
  readonly others_share: number | null;
}

/** The peaks of the device; `perCpuS` the same per second of processor time, where the device is the processor. */
export interface Peaks {
  readonly gflops: number;
  readonly gbps: number;
  readonly perCpuS: { readonly gflops: number; readonly gbps: number } | null;
}

/** A kernel at one size: what it computes, how that is checked, and what counts as its work. */
export interface Case {
  readonly name: string;
  readonly shape: string;
  readonly dtype: string;
  readonly tile?: string;
  /** Floating-point operations, or bytes that must be read and written at least. */
  readonly work: { readonly flop: number } | { readonly bytes: number };
  /** Makes inputs and records; `check` compares the outputs after one run with the reference and throws. */
  prepare(scope: Scope): Promise<Prepared>;
}

/** A recorded case. What works in place has a `reset`, which runs untimed before each of its runs. */
export interface Prepared {
  readonly commands: readonly Dispatch[];
  readonly reset?: readonly Command[];
  readonly check: () => Promise<void>;
}

/** One line of `kernels` in bench.json; `share` is of the peak measured in the same run. */
export interface KernelResult extends Measured {
  readonly name: string;
  readonly shape: string;
  readonly dtype: string;
  readonly tile?: string;
  readonly gflops?: number;
  readonly gbps?: number;
  readonly share: number;
  /** GFLOP or GB per second of processor time, where the device is the processor. */
  readonly per_cpu_s: number | null;
}

/** Buffers of one case. */
export interface Scope {
  readonly gpu: Gpu;
  /** A tensor of pseudo-random numbers and the number that element i holds. */
  random(name: string, shape: readonly number[], options?: RandomOptions): Promise<Random>;
  /** A tensor of given values. */
  input(name: string, values: ArrayBufferView, dtype: Storage, shape?: readonly number[]): Promise<Tensor>;
  /** A tensor to be written. */
  output(name: string, shape: readonly number[], dtype?: Storage): Tensor;
  rows(count: number): Rows;
  uniform(values: Float32Array<ArrayBuffer> | Uint32Array<ArrayBuffer>): GPUBuffer;
}

/** How to draw: uniform numbers around `mean`, at most `spread` from it. */
export interface RandomOptions {
  readonly dtype?: "f32" | "f16" | "bf16";
  readonly mean?: number;
  readonly spread?: number;
  readonly seed?: number;
}

/** A random tensor and its values. */
export interface Random {
  readonly tensor: Tensor;
  at(index: number): number;
  slice(from: number, to: number): Float32Array<ArrayBuffer>;
}

/** Checks a case, then times it, then frees what it took. */
export async function benchCase(
  gpu: Gpu,
  of: Case,
  { peaks, quick }: { peaks: Peaks; quick: boolean },
): Promise<KernelResult> {
  const owner = own(gpu);
  let measured: Measured;
  try {
    const { commands, reset = [], check } = await of.prepare(createScope(owner));
    run(gpu, [...reset, ...commands]);
    await check();
    measured = await measure(gpu, commands, { quick, reset });
  } finally {
    destroyOwned(owner);
  }
  const work = ("flop" in of.work ? of.work.flop : of.work.bytes) / 1e6, rate = work / measured.ms;
  const per_cpu_s = measured.cpu_ms === null ? null : work / measured.cpu_ms;
  const figure = "flop" in of.work
    ? { gflops: rate, share: rate / peaks.gflops }
    : { gbps: rate, share: rate / peaks.gbps };
  const tile = of.tile === undefined ? {} : { tile: of.tile };
  return { name: of.name, shape: of.shape, dtype: of.dtype, ...tile, ...measured, ...figure, per_cpu_s };
}

/** Times `commands`, many times in a row where there is no `reset`. */
export async function measure(
  gpu: Gpu,
  commands: readonly Dispatch[],
  { quick = false, reset = [] }: { quick?: boolean; reset?: readonly Command[] } = {},
): Promise<Measured> {
  const timed = async (runs: number, repeat: number) => {
    const list = Array.from({ length: repeat }, () => commands).flat();
    const spans = await timePasses(gpu, Array.from({ length: runs }, () => [...reset, list]).flat(1));
    return spans.map(({ ms }) => ms / repeat);
  };
  await timed(1, 1); // compiles
  const estimate = Math.max(...await timed(1, 1), 1e-3);
  const fill = gpu.cpu ? 40 : 10; // ms of a run
  const repeat = reset.length > 0 ? 1 : Math.max(1, Math.min(1000, Math.ceil(fill / estimate)));
  const runs = Math.max(3, Math.min(quick ? 3 : 9, Math.round(1500 / (estimate * repeat))));
  const before = process.cpuUsage(), others = watchOthers();
  const times = await timed(runs, repeat);
  const cpu = process.cpuUsage(before);
  return {
    ms: median(times),
    min_ms: Math.min(...times),
    max_ms: Math.max(...times),
    runs,
    // What resets is in the processor time too, so it is not told there.
    cpu_ms: gpu.cpu && reset.length === 0 ? (cpu.user + cpu.system) / 1e3 / repeat / runs : null,
    others_share: others(),
  };
}

/** The middle of some numbers. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half]! : (sorted[half - 1]! + sorted[half]!) / 2;
}

/** Measures what share of the machine's processors other programs use from now to the call of the result; null off Linux. */
export function watchOthers(): () => number | null {
  const busy = () => {
    try {
      const lines = Deno.readTextFileSync("/proc/stat").split("\n");
      const [user, nice, system, , , irq, softirq, steal] = lines[0]!.trim().split(/\s+/).slice(1).map(Number);
      const cores = lines.filter((line) => /^cpu\d/.test(line)).length;
      return { seconds: (user! + nice! + system! + irq! + softirq! + steal!) / 100, cores };
    } catch {
      return null;
    }
  };
  const first = busy(), own = process.cpuUsage(), began = performance.now();
  return () => {
    const last = busy(), mine = process.cpuUsage(own);
    if (!first || !last) return null;
    const others = last.seconds - first.seconds - (mine.user + mine.system) / 1e6;
    return Math.max(0, others / ((performance.now() - began) / 1e3 * last.cores));
  };
}

/** Random blocks are of a prime length, so that no row of a matrix is like another. */
const PERIOD = 1_000_003;

function createScope(gpu: Gpu): Scope {
  const tensor = (name: string, shape: readonly number[], dtype: Storage) => createTensor(gpu, { name, shape, dtype });
  return {
    gpu,
    async random(name, shape, { dtype = "f32", mean = 0.1, spread = 1, seed = 1 } = {}) {
      const stored = dtype.toUpperCase() as "F32" | "F16" | "BF16";
      const block = fromFloat32(uniformNumbers(PERIOD, { mean, spread, seed }), stored);
      const values = toFloat32(block, stored), size = dtype === "f32" ? 4 : 2;
      const count = shape.reduce((product, n) => product * n, 1), t = tensor(name, shape, dtype);
      const bytes = new Uint8Array(Math.min(count, 8 * PERIOD) * size);
      for (let at = 0; at < bytes.length; at += block.length) bytes.set(block.subarray(0, bytes.length - at), at);
      for (let first = 0; first < count; first += 8 * PERIOD) {
        await upload(gpu, t, bytes.subarray(0, Math.min(bytes.length, (count - first) * size)), first * size);
      }
      const at = (index: number) => values[index % PERIOD]!;
      return { tensor: t, at, slice: (from, to) => Float32Array.from({ length: to - from }, (_, i) => at(from + i)) };
    },
    async input(
      name,
      values,
      dtype,
      shape = [values.byteLength / (dtype === "u8" ? 1 : dtype.endsWith("16") ? 2 : 4)],
    ) {
      const t = tensor(name, shape, dtype);
      await upload(gpu, t, values);
      return t;
    },
    output: (name, shape, dtype = "f32") => tensor(name, shape, dtype),
    rows(count) {
      const rows = createRows(gpu, "rows");
      rows.set(count);
      return rows;
    },
    uniform(values) {
      const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
      const buffer = createBuffer(gpu, { size: values.byteLength, usage });
      gpu.queue.writeBuffer(buffer, 0, values);
      return buffer;
    },
  };
}

/** Uniform numbers from a linear congruential generator: for inputs, where their quality does not matter. */
function uniformNumbers(count: number, { mean, spread, seed }: Required<Omit<RandomOptions, "dtype">>) {
  const out = new Float32Array(count);
  for (let i = 0, state = Math.imul(seed, 0x9e3779b9) >>> 0; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    out[i] = mean + spread * ((state >>> 8) / 0x800000 - 1);
  }
  return out;
}

/** Reads elements `[from, to)` of an f32 or f16 tensor back. */
export async function readFloats(gpu: Gpu, tensor: Tensor, [from, to]: readonly [number, number]) {
  const [size, dtype] = tensor.dtype === "f16" ? [2, "F16"] as const : [4, "F32"] as const;
  return toFloat32(await downloadBytes(gpu, tensor, { offset: from * size, bytes: (to - from) * size }), dtype);
}

/**
 * Throws unless sampled results agree with the reference in 64 bits. The bound is wide: a wrong index or a missing term is
 * off by far more, and the tests of each op hold the tight ones.
 */
export function agree(name: string, actual: ArrayLike<number>, expected: ArrayLike<number>): void {
  assertClose(actual, expected, { nmse: 1e-9, name });
}
