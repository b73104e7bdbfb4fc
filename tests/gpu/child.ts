/** Runs code in a process of its own, for errors that end the process. */

const path = (file: string) => JSON.stringify(new URL(`../../${file}`, import.meta.url).href);

/**
 * What a script says and how it ends: `code` runs with `gpu`, `Kernel` and `createTensor` at hand; unless `waits` is false it
 * then waits for the device and says "went on".
 */
export async function inChild(
  code: string,
  { env = {}, waits = true }: { readonly env?: Readonly<Record<string, string>>; readonly waits?: boolean } = {},
): Promise<{ code: number; stdout: string; stderr: string }> {
  const script = `
    import { installErrorHandler } from ${path("lib/run/flags.ts")};
    import { openGpu } from ${path("lib/gpu/device.ts")};
    import { Kernel } from ${path("lib/gpu/kernel.ts")};
    import { createTensor, upload } from ${path("lib/gpu/tensor.ts")};
    installErrorHandler();
    const gpu = await openGpu();
    ${code}
    ${waits ? `await gpu.queue.onSubmittedWorkDone(); console.log("went on");` : ""}`;
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "--quiet", "--allow-all", "--unstable-webgpu", "--ext=ts", "-"],
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
    env: { NO_COLOR: "1", ...env },
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(script));
  await writer.close();
  const { code: status, stdout, stderr } = await child.output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code: status, stdout: text(stdout), stderr: text(stderr) };
}
