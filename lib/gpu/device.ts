/** Opens the one GPU device of a process and turns every GPU error into the end of the process. */

/**
 * How lanes of a workgroup exchange values, and with it which kernels run: "subgroup", by shuffles, those for CPU drivers with
 * wide vectors, which also read images and access two vec4f at once; "shared", through workgroup memory, those for GPUs.
 */
export type LaneModel = "subgroup" | "shared";

/** An open device and the facts that kernels are chosen by. */
export interface Gpu {
  readonly device: GPUDevice;
  readonly queue: GPUQueue;
  /** What the driver calls itself, for logs and manifests. */
  readonly name: string;
  /** True for a software driver such as lavapipe, which wants kernels of its own. */
  readonly cpu: boolean;
  /** Lanes per subgroup where it is the same for every pipeline, else 0. */
  readonly subgroup: number;
  readonly lanes: LaneModel;
  readonly timestamps: boolean;
  readonly limits: GPUSupportedLimits;
  /** The buffers that were made through this handle and are still there, where somebody owns them: see `own` in tensor.ts. */
  readonly owned?: Set<GPUBuffer>;
}

/** The limits that a training step may need above WebGPU's defaults; all are asked for at the adapter's own value. */
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxTextureDimension2D",
] as const;

let opened: Promise<Gpu> | undefined;

/**
 * Opens the fastest adapter (a discrete GPU before an integrated one before a CPU driver), once per process.
 * Throws when there is none, or only a CPU driver that is reached through OpenGL.
 */
export function openGpu(): Promise<Gpu> {
  return opened ??= open();
}

async function open(): Promise<Gpu> {
  await prepareDrivers();
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new Error('Cannot open a GPU: no WebGPU adapter was found: run "sh scripts/setup.sh"');
  const { info } = adapter;
  const name = info.description || info.vendor || "unnamed adapter";
  const requiredLimits = Object.fromEntries(LIMITS.map((limit) => [limit, adapter.limits[limit]]));
  const timestamps = adapter.features.has("timestamp-query");
  const cpu = /llvmpipe|swiftshader|software/i.test(name);
  const always = timestamps ? ["timestamp-query"] : [];
  const request = (features: string[]) =>
    adapter.requestDevice({ requiredLimits, requiredFeatures: [...always, ...features] as GPUFeatureName[] });
  // Deno hides these from adapter.features although the device grants them, so ask and see. CPU kernels load 64-bit words.
  let subgroups = true;
  const device = await request(cpu ? ["subgroups", "wgpu-shader-int64"] : ["subgroups"]).catch(() => {
    subgroups = false;
    return request([]);
  });
  if (cpu && !subgroups) {
    device.destroy();
    throw new Error(
      `Cannot compute with "${name}" through OpenGL, which is many times slower than Vulkan: run "sh scripts/setup.sh"`,
    );
  }
  failOnErrors(device);
  // The process must not end under the driver: Mesa's threads crash where they compile meanwhile, and Deno panics. Deno waits
  // inside this call.
  globalThis.addEventListener("unload", () => void device.queue.onSubmittedWorkDone());
  const fixed = subgroups && info.subgroupMinSize > 0 && info.subgroupMinSize === info.subgroupMaxSize;
  return {
    device,
    queue: device.queue,
    name,
    cpu,
    subgroup: fixed ? info.subgroupMinSize : 0,
    // Kernels for subgroups keep as much per lane as eight or more lanes share; CPUs without wide vectors have four.
    lanes: fixed && cpu && info.subgroupMinSize >= 8 ? "subgroup" : "shared",
    timestamps,
    limits: device.limits,
  };
}

/** Sets what drivers on Linux read when they are first asked for an adapter; variables that the user has set stay. */
async function prepareDrivers(): Promise<void> {
  if (Deno.build.os !== "linux") return;
  const set = (name: string, value: string) => {
    if (!Deno.env.get(name)) Deno.env.set(name, value);
  };
  // Mesa warns on stderr without it; any folder will do, nothing is written there.
  set("XDG_RUNTIME_DIR", "/tmp");
  // With OpenGL comes libEGL, which frees memory at the end of the process that other threads are freeing too.
  set("DENO_WEBGPU_BACKEND", "vulkan");
  // Mesa's CPU driver takes vectors of 256 bits, also where the processor has 512. Imported, because Deno reads files below
  // /proc only where everything is allowed.
  const file = "file:///proc/cpuinfo";
  const text = await import(file, { with: { type: "text" } }).then((module) => module.default as string, () => "");
  if (/^flags.*\bavx512vl\b/m.test(text)) set("LP_NATIVE_VECTOR_WIDTH", "512");
}

/** What `make` makes on the device, or nothing where the device has not the memory for it. */
export async function withinMemory<T>({ device }: Gpu, make: () => T): Promise<T | undefined> {
  let made: T | undefined, failed: GPUError | null;
  device.pushErrorScope("out-of-memory");
  try {
    made = make();
  } finally {
    failed = await device.popErrorScope();
  }
  return failed ? undefined : made;
}

/** Deno drops GPU errors silently; a script that goes on after one would write wrong numbers. */
function failOnErrors(device: GPUDevice): void {
  device.addEventListener("uncapturederror", (event) => {
    event.preventDefault();
    Promise.reject(
      new Error(`Cannot go on after a GPU error: ${(event as GPUUncapturedErrorEvent).error.message.trim()}`),
    );
  });
  device.lost.then((lost) => {
    if (lost.reason !== "destroyed") throw new Error(`Cannot go on: the GPU device was lost: ${lost.message}`);
  });
}
