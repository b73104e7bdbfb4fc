/**
 * Programs: lists of recorded commands, encoded into as few compute passes as they allow and submitted once, or one pass
 * each where their times are wanted. Results stay on the GPU.
 */
import type { Gpu } from "./device.ts";
import { type Image, refresh, wrote } from "./image.ts";
import type { Command, Dispatch, Grid } from "./kernel.ts";

/** Encodes and submits `commands` in order. WebGPU puts the barriers where one command reads what another wrote. */
export function run(gpu: Gpu, commands: readonly Command[]): void {
  gpu.queue.submit([encode(gpu, commands)]);
}

/**
 * Lets a CPU driver, which compiles a kernel when it is first started, begin with those of `commands`, and does not wait: they
 * are started without workgroups. GPU drivers have compiled by then.
 */
export function compile(gpu: Gpu, commands: readonly Command[]): void {
  if (!gpu.cpu) return;
  const encoder = gpu.device.createCommandEncoder(), pass = encoder.beginComputePass(), known = new Set();
  for (const command of commands) {
    if (!isDispatch(command) || known.has(command.pipeline)) continue;
    known.add(command.pipeline);
    pass.setPipeline(command.pipeline);
    pass.setBindGroup(0, command.bindGroup);
    pass.dispatchWorkgroups(0, 0, 0);
  }
  pass.end();
  gpu.queue.submit([encoder.finish()]);
}

function encode(gpu: Gpu, commands: readonly Command[]): GPUCommandBuffer {
  const encoder = gpu.device.createCommandEncoder();
  let together: Dispatch[] = [];
  const flush = () => {
    for (const { images, dispatches } of passesOf(together)) {
      for (const image of images) refresh(encoder, image);
      encodePass(encoder.beginComputePass(), dispatches);
    }
    together = [];
  };
  for (const command of commands) {
    if (isDispatch(command)) {
      together.push(command);
    } else {
      flush();
      encodeTransfer(encoder, command);
    }
  }
  flush();
  return encoder.finish();
}

/** Dispatches that share a compute pass, with their grids, and the images that are copied before it. */
interface Pass {
  readonly images: Image[];
  readonly dispatches: { readonly dispatch: Dispatch; readonly grid: NonNullable<Grid> }[];
}

/** Cuts a list where an image must be copied first, and leaves out what has nothing to do. */
function passesOf(list: readonly Dispatch[]): Pass[] {
  const passes: Pass[] = [];
  let pass: Pass | undefined;
  for (const dispatch of list) {
    const grid = gridOf(dispatch);
    if (!grid) continue;
    const stale = dispatch.images.filter(({ fresh }) => !fresh);
    if (!pass || stale.length > 0) passes.push(pass = { images: stale, dispatches: [] });
    for (const image of stale) image.fresh = true;
    for (const buffer of dispatch.writes) wrote(buffer);
    pass.dispatches.push({ dispatch, grid });
  }
  return passes;
}

/** Workgroups of a dispatch; null where there are none. */
function gridOf(dispatch: Dispatch): Grid {
  const grid = dispatch.grid();
  return grid && grid[0] * grid[1] * grid[2] > 0 ? grid : null;
}

function encodePass(pass: GPUComputePassEncoder, dispatches: Pass["dispatches"]): void {
  let pipeline: GPUComputePipeline | undefined;
  for (const { dispatch, grid } of dispatches) {
    if (pipeline !== dispatch.pipeline) pass.setPipeline(pipeline = dispatch.pipeline);
    pass.setBindGroup(0, dispatch.bindGroup);
    pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
  }
  pass.end();
}

/** When one recorded dispatch ran on the device: `start` in ms after the first one began. */
export interface Timing {
  readonly label: string;
  readonly start: number;
  readonly ms: number;
}

/**
 * Runs `commands` with one pass per dispatch and returns when each ran on the device, by timestamp queries, or by waiting
 * for each where the device has none. Same results as `run`, but slower: for measuring only.
 */
export async function profile(gpu: Gpu, commands: readonly Command[]): Promise<Timing[]> {
  const passes = commands.map((command) => isDispatch(command) ? [command] : command);
  const spans = await timePasses(gpu, passes);
  const labels = commands.filter(isDispatch).filter((command) => gridOf(command) !== null).map(({ label }) => label);
  return spans.map(({ start, ms }, i) => ({ label: labels[i]!, start, ms }));
}

/** When a pass ran: `start` in ms after the first pass of the call began. */
export type Span = Omit<Timing, "label">;

/** Passes per set of queries: WebGPU allows 4,096 of them, a pass takes two. */
const PASSES = 2048;

/**
 * Runs each list of dispatches in a compute pass of its own, other commands between them, and returns when each pass ran,
 * the empty ones left out. The wait for the device is not in the times.
 */
export async function timePasses(gpu: Gpu, passes: readonly (readonly Dispatch[] | Command)[]): Promise<Span[]> {
  const work = passes.filter((pass) => !isList(pass) || pass.some((dispatch) => gridOf(dispatch) !== null));
  if (!gpu.timestamps) return await timeByWaiting(gpu, work);
  await gpu.queue.onSubmittedWorkDone();
  const began = performance.now(), stamps: bigint[] = [];
  for (let first = 0; first < work.length; first += PASSES) {
    stamps.push(...await stampPasses(gpu, work.slice(first, first + PASSES)));
  }
  const zero = stamps[0] ?? 0n, ticks = stamps.map((stamp) => Number(stamp - zero));
  const tick = tickLength(Math.max(0, ...ticks), performance.now() - began);
  return Array.from({ length: ticks.length / 2 }, (_, i) => {
    const [start, end] = [ticks[2 * i]!, ticks[2 * i + 1]!];
    return { start: start * tick, ms: (end - start) * tick };
  });
}

/**
 * Milliseconds per tick of the device's clock. A tick is a nanosecond on most devices, and Deno does not tell where it is
 * not: there the wall clock, which is a wait too long, shows it.
 */
function tickLength(ticks: number, wallMs: number): number {
  const ratio = wallMs / (ticks * 1e-6);
  return ticks > 0 && wallMs > 100 && ratio > 4 ? wallMs / ticks : 1e-6;
}

async function stampPasses(gpu: Gpu, work: readonly (readonly Dispatch[] | Command)[]): Promise<BigUint64Array> {
  const { device, queue } = gpu, count = 2 * work.filter(isList).length;
  if (count === 0) {
    run(gpu, work as readonly Command[]);
    return new BigUint64Array(0);
  }
  const querySet = device.createQuerySet({ type: "timestamp", count }), size = 8 * count;
  const resolved = device.createBuffer({ size, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const encoder = device.createCommandEncoder();
  let query = 0;
  for (const entry of work) {
    if (!isList(entry)) {
      encodeTransfer(encoder, entry as Exclude<Command, Dispatch>);
      continue;
    }
    const passes = passesOf(entry), copied = passes.some(({ images }) => images.length > 0);
    const begin = { querySet, beginningOfPassWriteIndex: query }, end = { querySet, endOfPassWriteIndex: query + 1 };
    query += 2;
    // Copies are between passes: then the first stamp is in an empty one before them.
    if (copied) encoder.beginComputePass({ timestampWrites: begin }).end();
    passes.forEach(({ images, dispatches }, i) => {
      for (const image of images) refresh(encoder, image);
      const first = i === 0 && !copied, last = i === passes.length - 1;
      const timestampWrites = { ...(first ? begin : {}), ...(last ? end : {}) } as GPUComputePassTimestampWrites;
      encodePass(encoder.beginComputePass(first || last ? { timestampWrites } : {}), dispatches);
    });
  }
  encoder.resolveQuerySet(querySet, 0, count, resolved, 0);
  encoder.copyBufferToBuffer(resolved, 0, staging, 0, size);
  queue.submit([encoder.finish()]);
  await staging.mapAsync(GPUMapMode.READ);
  const stamps = new BigUint64Array(staging.getMappedRange().slice(0));
  querySet.destroy();
  for (const buffer of [resolved, staging]) buffer.destroy();
  return stamps;
}

async function timeByWaiting(gpu: Gpu, work: readonly (readonly Dispatch[] | Command)[]): Promise<Span[]> {
  const spans: Span[] = [];
  await gpu.queue.onSubmittedWorkDone();
  const zero = performance.now();
  for (const entry of work) {
    const began = performance.now();
    run(gpu, isList(entry) ? entry : [entry as Command]);
    // Deno waits for the device inside this call; its promise would take 10 ms more.
    gpu.queue.onSubmittedWorkDone();
    if (isList(entry)) spans.push({ start: began - zero, ms: performance.now() - began });
  }
  await gpu.queue.onSubmittedWorkDone();
  return spans;
}

function encodeTransfer(encoder: GPUCommandEncoder, command: Exclude<Command, Dispatch>): void {
  wrote("clear" in command ? command.clear.buffer : command.copy.to.buffer);
  if ("clear" in command) return encoder.clearBuffer(command.clear.buffer);
  const { from, to, bytes } = command.copy;
  encoder.copyBufferToBuffer(from.buffer, 0, to.buffer, 0, bytes);
}

function isDispatch(command: Command): command is Dispatch {
  return "pipeline" in command;
}

function isList(entry: readonly Dispatch[] | Command): entry is readonly Dispatch[] {
  return Array.isArray(entry);
}
