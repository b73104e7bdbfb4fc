/**
 * What the kernel tests share: one device in each lane model, tensors with guard bytes behind them, and running commands
 * twice. Refuses a result that differs between two runs or writes past its end; without an adapter its tests are ignored.
 */
import { assertEquals } from "@std/assert";
import { fromFloat32, toFloat32 } from "../lib/data/dtype.ts";
import { type Gpu, type LaneModel, openGpu } from "../lib/gpu/device.ts";
import { type Command, createRows, type Rows } from "../lib/gpu/kernel.ts";
import { run } from "../lib/gpu/program.ts";
import {
  BYTES,
  createBuffer,
  createTensor,
  destroyOwned,
  downloadBytes,
  own,
  type Storage,
  type Tensor,
  upload,
} from "../lib/gpu/tensor.ts";

const device = await openGpu().catch((error: Error) => {
  if (error.message.includes("no WebGPU adapter")) return undefined;
  throw error;
});
/** Whether tests that need a device are to be ignored: there is none, and REQUIRE_GPU=1 does not ask for one. */
export const NO_GPU = device === undefined && Deno.env.get("REQUIRE_GPU") !== "1";
const GUARD = 0xa5, GUARD_BYTES = 4096;

/** A tensor that a kernel writes, the bytes that it starts from, and behind them the guard. */
export interface Output extends Tensor {
  readonly start: Uint8Array<ArrayBuffer>;
}

/** What a test of kernels works with; everything that it makes is destroyed when the test ends. */
export interface Bench {
  readonly gpu: Gpu;
  /** A tensor of these values: raw bytes where they are not the elements themselves (16-bit floats). */
  input(name: string, values: ArrayBufferView, at?: { shape?: readonly number[]; dtype?: Storage }): Promise<Tensor>;
  /** A tensor to be written: NaN all over, or `start`. */
  output(name: string, at: { shape: readonly number[]; dtype?: Storage; start?: ArrayBufferView }): Output;
  rows(count: number, first?: number): Rows;
  /** A uniform buffer. */
  uniform(values: Float32Array<ArrayBuffer>): GPUBuffer;
  /** Runs the commands twice, each time from the starting bytes, and returns the outputs, as floats over their bytes. */
  compute(commands: readonly Command[], outputs: readonly Output[]): Promise<Float32Array<ArrayBuffer>[]>;
}

function createBench(gpu: Gpu): Bench {
  const allocate = (
    name: string,
    start: Uint8Array,
    { shape, dtype }: { shape: readonly number[]; dtype: Storage },
  ) => {
    const tensor = createTensor(gpu, { name, shape: [start.length + GUARD_BYTES], dtype: "u8" });
    return { ...tensor, shape, dtype };
  };
  const guarded = (start: Uint8Array) => {
    const bytes = new Uint8Array(start.length + GUARD_BYTES).fill(GUARD);
    bytes.set(start);
    return bytes;
  };
  const read = async (output: Output) => {
    const bytes = await downloadBytes(gpu, output);
    const end = output.start.length;
    const broken = bytes.subarray(end, end + GUARD_BYTES).findIndex((byte) => byte !== GUARD);
    assertEquals(broken, -1, `"${output.name}" is written ${broken} bytes past its end`);
    return new Float32Array(bytes.slice(0, end).buffer);
  };
  return {
    gpu,
    async input(name, values, { shape, dtype = values instanceof Uint32Array ? "u32" : "f32" } = {}) {
      const start = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
      const tensor = allocate(name, start, { shape: shape ?? [values.byteLength / BYTES[dtype]], dtype });
      await upload(gpu, tensor, guarded(start));
      return tensor;
    },
    output(name, { shape, dtype = "f32", start }) {
      const bytes = shape.reduce((product, n) => product * n, 1) * BYTES[dtype];
      const from = start ?? new Float32Array(Math.ceil(bytes / 4)).fill(NaN);
      const copy = new Uint8Array(from.buffer, from.byteOffset, bytes).slice();
      return { ...allocate(name, copy, { shape, dtype }), start: copy };
    },
    rows(count, first = 0) {
      const rows = createRows(gpu, "rows");
      rows.set(count, first);
      return rows;
    },
    uniform(values) {
      const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
      const buffer = createBuffer(gpu, { size: values.byteLength, usage });
      gpu.queue.writeBuffer(buffer, 0, values);
      return buffer;
    },
    async compute(commands, outputs) {
      // Reading is waited for once, after both runs: a wait costs 10 ms.
      const once = async () => {
        for (const output of outputs) await upload(gpu, output, guarded(output.start));
        run(gpu, commands);
        return { results: Promise.all(outputs.map(read)) };
      };
      const runs = [await once(), await once()];
      const [first, second] = await Promise.all(runs.map(({ results }) => results));
      outputs.forEach(({ name }, i) => {
        const a = new Uint32Array(first![i]!.buffer), b = new Uint32Array(second![i]!.buffer);
        assertEquals(a.findIndex((word, at) => word !== b[at]), -1, `two runs give different bits in "${name}"`);
      });
      return first!;
    },
  };
}

/** What a float tensor of `dtype` holds when it is given `values`: its bytes, and the rounded values that they stand for. */
export function stored(values: Float32Array, dtype: "f32" | "f16" | "bf16") {
  const name = dtype.toUpperCase() as "F32" | "F16" | "BF16";
  const bytes = fromFloat32(values, name);
  return { bytes, values: toFloat32(bytes, name) };
}

const SPOKEN: Record<LaneModel, string> = { subgroup: "subgroups", shared: "workgroup memory" };
const BOTH: readonly LaneModel[] = ["subgroup", "shared"];

/**
 * Registers a test once per lane model; `models: false` once in all, for kernels whose lanes share nothing. It is ignored where
 * the device has no subgroups of one size, or where there is no adapter; with REQUIRE_GPU=1 that is a failure.
 */
export function gpuTest(
  name: string,
  body: (bench: Bench) => Promise<void>,
  { models = BOTH }: { models?: readonly LaneModel[] | false } = {},
): void {
  for (const lanes of models || ["shared"] as const) {
    Deno.test({
      name: models ? `${name} (${SPOKEN[lanes]})` : name,
      ignore: device ? lanes === "subgroup" && device.lanes !== "subgroup" : Deno.env.get("REQUIRE_GPU") !== "1",
      async fn() {
        const gpu = own({ ...await openGpu(), lanes });
        await body(createBench(gpu));
        destroyOwned(gpu);
      },
    });
  }
}
