/** What the system says of the device: memory in use and the driver's version. It asks nvidia-smi where there is one. */
import type { Gpu } from "../../lib/gpu/device.ts";

/** Bytes in use by this process where the device is the processor, or on the GPU as a whole; null where nobody knows. */
export async function memoryInUse(gpu: Gpu): Promise<number | null> {
  if (gpu.cpu) return Deno.memoryUsage().rss;
  const megabytes = Number(await nvidia("memory.used") ?? NaN);
  return Number.isFinite(megabytes) ? megabytes * 2 ** 20 : null;
}

/** The driver's version; null where nobody knows. */
export async function driverVersion(gpu: Gpu): Promise<string | null> {
  return gpu.cpu ? gpu.name : await nvidia("driver_version");
}

async function nvidia(field: string): Promise<string | null> {
  try {
    const args = [`--query-gpu=${field}`, "--format=csv,noheader,nounits"];
    const { code, stdout } = await new Deno.Command("nvidia-smi", { args, stderr: "null" }).output();
    return code === 0 ? new TextDecoder().decode(stdout).trim().split("\n")[0]! : null;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}
