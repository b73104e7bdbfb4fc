/**
 * Programs: lists of recorded commands, encoded into as few compute passes as they allow and submitted once.
 * Nothing is read back here.
 */
import type { Gpu } from "./device.ts";
import type { Command, Dispatch } from "./kernel.ts";

/** Encodes and submits `commands` in order. WebGPU puts the barriers where one command reads what another wrote. */
export function run(gpu: Gpu, commands: readonly Command[]): void {
  const encoder = gpu.device.createCommandEncoder();
  let pass: GPUComputePassEncoder | undefined;
  let pipeline: GPUComputePipeline | undefined;
  const endPass = () => {
    pass?.end();
    pass = pipeline = undefined;
  };
  for (const command of commands) {
    if ("clear" in command) {
      endPass();
      encoder.clearBuffer(command.clear.buffer);
    } else if ("copy" in command) {
      endPass();
      encoder.copyBufferToBuffer(command.copy.from.buffer, 0, command.copy.to.buffer, 0, command.copy.bytes);
    } else {
      const grid = command.grid();
      if (!grid || grid[0] * grid[1] * grid[2] === 0) continue;
      pass ??= encoder.beginComputePass();
      if (pipeline !== command.pipeline) pass.setPipeline(pipeline = command.pipeline);
      pass.setBindGroup(0, command.bindGroup);
      pass.dispatchWorkgroups(...grid);
    }
  }
  endPass();
  gpu.queue.submit([encoder.finish()]);
}

/** Time on the device of one recorded dispatch. */
export interface Timing {
  readonly label: string;
  readonly ms: number;
}

/**
 * Runs `commands` with one pass per dispatch and returns how long each took on the device, by timestamp queries, or by
 * waiting for each where the device has none. Slower than `run`: for measuring only.
 */
export async function profile(gpu: Gpu, commands: readonly Command[]): Promise<Timing[]> {
  const timings: Timing[] = [];
  for (const command of commands) {
    const before = performance.now();
    run(gpu, [command]);
    gpu.queue.onSubmittedWorkDone();
    if (isDispatch(command)) timings.push({ label: command.label, ms: performance.now() - before });
  }
  await gpu.queue.onSubmittedWorkDone();
  return timings;
}

function isDispatch(command: Command): command is Dispatch {
  return "pipeline" in command;
}
