/** The peaks that shares refer to: what the device computes and copies at most through WebGPU, not what a data sheet says. */
import type { Gpu } from "../../lib/gpu/device.ts";
import { fold, Kernel, laneCount } from "../../lib/gpu/kernel.ts";
import { run } from "../../lib/gpu/program.ts";
import { createTensor, type Tensor, upload } from "../../lib/gpu/tensor.ts";
import { agree, measure, type Measured, type Peaks, readFloats } from "./measure.ts";
import source from "./peak.wgsl" with { type: "text" };

/** Measures both peaks; each kernel's result is checked first. */
export async function measurePeaks(gpu: Gpu, { quick }: { quick: boolean }): Promise<Peaks> {
  const kernel = new Kernel(gpu, "peak", source);
  const LANES = gpu.lanes === "subgroup" ? laneCount(gpu) : 256, STEPS = gpu.cpu ? 200 : 500;
  const made: Tensor[] = [];
  const make = (name: string, shape: readonly number[]) => {
    const tensor = createTensor(gpu, { name, shape });
    made.push(tensor);
    return tensor;
  };

  // A compiler may take one chain after the other: then a processor sees several at once only where they are short.
  const groups = gpu.cpu ? 1024 : 8192, sums = make("sums", [groups * LANES]), lanes = [0, 1, LANES - 1];
  const multiplied: { flop: number; measured: Measured }[] = [];
  for (const REPEAT of [20, 4]) {
    const fma = kernel.record("fma_f32", { constants: { LANES, STEPS, REPEAT }, bind: { sums }, grid: fold(groups) });
    run(gpu, [fma]);
    const found = await readFloats(gpu, sums, [0, LANES]);
    agree("peak.fma_f32", lanes.map((lane) => found[lane]!), lanes.map((lane) => chains(lane, REPEAT * STEPS)));
    const flop = 2 * 12 * REPEAT * STEPS * groups * LANES;
    multiplied.push({ flop, measured: await measure(gpu, [fma], { quick }) });
  }

  // Larger than any cache, as far as one binding goes.
  const perGroup = LANES * 8 * 16;
  const most = Math.min(gpu.limits.maxStorageBufferBindingSize, gpu.cpu ? 96 << 20 : 1 << 30);
  const copied = Math.floor(most / perGroup) * perGroup;
  const x = make("x", [copied / 4]), out = make("out", [copied / 4]), probe = new Float32Array(1 << 20);
  for (let i = 0; i < probe.length; i++) probe[i] = i % 8191 - 4000;
  await upload(gpu, x, probe, copied - probe.byteLength);
  const copy = kernel.record("copy", { constants: { LANES }, bind: { x, out }, grid: fold(copied / perGroup) });
  run(gpu, [copy]);
  agree("peak.copy", await readFloats(gpu, out, [copied / 4 - probe.length, copied / 4]), probe);
  const moved = await measure(gpu, [copy], { quick });
  for (const { buffer } of made) buffer.destroy();
  const rate = (ms: (of: Measured) => number) => ({
    gflops: Math.max(...multiplied.map(({ flop, measured }) => flop / ms(measured))) / 1e6,
    gbps: 2 * copied / ms(moved) / 1e6,
  });
  return { ...rate((of) => of.min_ms), perCpuS: gpu.cpu ? rate((of) => of.cpu_ms!) : null };
}

/** What a lane of fma_f32 sums up, in 64 bits. */
function chains(lane: number, steps: number): number {
  const factor = Math.fround(0.5 + Math.fround(lane * 1e-9)), term = factor + 0.5;
  let sum = 0;
  for (let i = 0; i < 12; i++) {
    let value = lane + i;
    for (let s = 0; s < steps; s++) value = value * factor + term;
    sum += value;
  }
  return sum;
}
