/** The device, its errors, tensors of odd sizes, and programs of commands. */
import { assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { openGpu } from "../../lib/gpu/device.ts";
import { laneCount } from "../../lib/gpu/kernel.ts";
import { run } from "../../lib/gpu/program.ts";
import { createTensor, download, downloadBytes, tensorBytes, upload } from "../../lib/gpu/tensor.ts";
import { goldenPath } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";
import { inChild } from "./child.ts";

gpuTest("openGpu() opens one device and says what it offers", async () => {
  const gpu = await openGpu();
  assertEquals(await openGpu(), gpu);
  assertEquals(gpu.name === "", false);
  // Kernels that work row by row halve the lanes again and again.
  assertEquals(Number.isInteger(Math.log2(laneCount(gpu))), true);
  if (gpu.lanes === "subgroup") assertEquals(gpu.subgroup >= 8, true);
  assertEquals(laneCount({ ...gpu, lanes: "shared" }), 64);
}, { models: false });

gpuTest("a GPU error ends the process with status 1 and one line", async () => {
  const errors = {
    "the wrong usage":
      `gpu.device.createBuffer({ size: 16, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.STORAGE });`,
    "a write that is not aligned": `
      const x = createTensor(gpu, { name: "x", shape: [4] });
      await upload(gpu, x, new Uint8Array(4), 2);`,
  };
  for (const [name, code] of Object.entries(errors)) {
    const { code: status, stdout, stderr } = await inChild(code);
    assertEquals(status, 1, name);
    assertEquals(stdout, "", name);
    assertMatch(stderr, /^Cannot [^\n]+\n$/, name);
  }
  assertEquals(await inChild(""), { code: 0, stdout: "went on\n", stderr: "" });
}, { models: false });

gpuTest("a process that ends while the driver compiles and computes ends as if it were idle", async () => {
  const file = (name: string) => JSON.stringify(goldenPath(`tiny/${name}`));
  const work = `
    const { Trainer } = await import(${JSON.stringify(new URL("../../lib/model/trainer.ts", import.meta.url).href)});
    const hyper = { optimizer: "adamw_8bit", weightDecay: 0, beta1: 0.9, beta2: 0.999, eps: 1e-8, maxGradNorm: 1 };
    const model = ${file("model_hf")}, adapter = ${file("lora_adapter")};
    await Trainer.open({ model, adapter, train: "lora", tokens: 300, hyper });`;
  const ends = [
    ["return of the main module", "", 0, ""],
    ["Deno.exit", "Deno.exit(3);", 3, ""],
    ["an error", `throw new Error("Cannot go on: wanted");`, 1, "Cannot go on: wanted\n"],
  ] as const;
  // Several at once, so that the driver's threads fall behind.
  const all = [0, 1, 2].flatMap(() => ends);
  await Promise.all(all.map(async ([name, last, code, stderr]) => {
    const stopped = await inChild(`${work} ${last}`, { waits: false });
    assertEquals(stopped, { code, stdout: "", stderr }, name);
  }));
}, { models: false });

gpuTest("a CPU driver is refused where only OpenGL leads to it", async () => {
  const found = await inChild("if (gpu.cpu) throw new Error(gpu.name);", { env: { DENO_WEBGPU_BACKEND: "gl" } });
  // There may be no OpenGL, or one of a GPU's own, which is taken as it is.
  const refused = /^Cannot (open a GPU: no WebGPU adapter was found|compute with "[^"]+" through OpenGL, [^\n:]+)/;
  if (found.code === 0) return assertEquals(found, { code: 0, stdout: "went on\n", stderr: "" });
  assertMatch(found.stderr, new RegExp(`${refused.source}: run "sh scripts/setup.sh"\n$`));
  assertEquals([found.code, found.stdout], [1, ""]);
}, { models: false });

const WIDTH = "LP_NATIVE_VECTOR_WIDTH";

gpuTest("Mesa's CPU driver computes in vectors as wide as the processor's, or as the user says", async ({ gpu }) => {
  if (!gpu.name.startsWith("llvmpipe")) return;
  const flags = await Deno.readTextFile("/proc/cpuinfo").catch(() => "");
  const lanes = async (width: string) => {
    const found = await inChild("console.log(gpu.subgroup, gpu.lanes);", { env: { [WIDTH]: width } });
    assertEquals([found.code, found.stderr], [0, ""]);
    return found.stdout;
  };
  if (flags.includes(" avx512vl ")) assertEquals(await lanes(""), "16 subgroup\nwent on\n");
  assertEquals(await lanes("256"), "8 subgroup\nwent on\n");
  assertEquals(await lanes("128"), "4 shared\nwent on\n");
}, { models: false });

gpuTest("kernels agree with the references in vectors of the other width too", async ({ gpu }) => {
  if (!gpu.name.startsWith("llvmpipe")) return;
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", "--parallel", "--filter", "(subgroups)", "tests/ops"],
    cwd: new URL("../..", import.meta.url),
    env: { NO_COLOR: "1", [WIDTH]: gpu.subgroup === 8 ? "512" : "256" },
  }).output();
  const text = new TextDecoder().decode(stdout);
  assertEquals(code, 0, text + new TextDecoder().decode(stderr));
  assertMatch(text, /\nok \| [1-9]\d+ passed/);
}, { models: ["subgroup"] });

gpuTest("tensors take whole vec4 words and come back without their padding", async ({ gpu }) => {
  assertEquals([1, 4, 5].map((n) => tensorBytes([n], "f32")), [16, 16, 32]);
  assertEquals([tensorBytes([3, 3], "f16"), tensorBytes([17], "u8"), tensorBytes([9], "bf16")], [32, 32, 32]);
  for (const n of [1, 3, 5, 257]) {
    const values = Float32Array.from({ length: n }, (_, i) => i + 0.5);
    const tensor = createTensor(gpu, { name: "x", shape: [n] });
    assertEquals(await download(gpu, tensor), new Float32Array(n), "a new tensor is zero");
    await upload(gpu, tensor, values);
    assertEquals(await download(gpu, tensor), values);
    tensor.buffer.destroy();
  }
}, { models: false });

gpuTest("upload() and downloadBytes() move any number of bytes", async ({ gpu }) => {
  const bytes = Uint8Array.from({ length: 21 }, (_, i) => i + 1);
  const tensor = createTensor(gpu, { name: "codes", shape: [21], dtype: "u8" });
  await upload(gpu, tensor, bytes);
  assertEquals(await downloadBytes(gpu, tensor), new Uint8Array([...bytes, ...new Uint8Array(11)]));
  assertEquals(await downloadBytes(gpu, tensor, { bytes: 21 }), bytes);
  assertEquals(await downloadBytes(gpu, tensor, { offset: 8, bytes: 7 }), bytes.slice(8, 15));
  // A view into a larger array, to a place of its own.
  await upload(gpu, tensor, new Uint16Array([1, 0x6261, 0x6463, 0x65, 5]).subarray(1, 4), 4);
  assertEquals([...await downloadBytes(gpu, tensor, { bytes: 12 })], [1, 2, 3, 4, 97, 98, 99, 100, 101, 0, 0, 0]);
  tensor.buffer.destroy();
}, { models: false });

gpuTest("upload() writes more than its pieces of 32 MiB", async ({ gpu }) => {
  const words = new Uint32Array((33 << 20) / 4 + 5).map((_, i) => i * 2654435761);
  const tensor = createTensor(gpu, { name: "large", shape: [words.length], dtype: "u32" });
  await upload(gpu, tensor, words);
  const found = new Uint32Array((await downloadBytes(gpu, tensor)).buffer, 0, words.length);
  assertEquals(found.findIndex((word, i) => word !== words[i]), -1);
  tensor.buffer.destroy();
}, { models: false });

gpuTest("tensors that cannot be are refused by name", async ({ gpu }) => {
  const most = Math.min(gpu.limits.maxStorageBufferBindingSize, gpu.limits.maxBufferSize);
  assertThrows(
    () => createTensor(gpu, { name: "embed_tokens", shape: [most, 2], dtype: "f16" }),
    RangeError,
    `Cannot allocate "embed_tokens" [${most},2] f16: ${most * 4} bytes are more than the ${most} that`,
  );
  const tensor = createTensor(gpu, { name: "x", shape: [4] });
  await assertRejects(
    () => upload(gpu, tensor, new Float32Array(4), 4),
    RangeError,
    'Cannot write "x": 16 bytes from 4 on do not fit into 16',
  );
  const half = { ...tensor, dtype: "f16" as const };
  await assertRejects(() => download(gpu, half), TypeError, 'Cannot read "x" as f32: it is f16');
  tensor.buffer.destroy();
}, { models: false });

gpuTest("run() clears and copies in the order of the commands", async ({ gpu, input, output, compute }) => {
  const from = await input("from", Float32Array.of(1, 2, 3, 4));
  const a = output("a", { shape: [4], start: Float32Array.of(5, 6, 7, 8) });
  const b = output("b", { shape: [4], start: Float32Array.of(9, 9, 9, 9) });
  const commands = [{ copy: { from: a, to: b, bytes: 8 } }, { copy: { from, to: a, bytes: 16 } }];
  assertEquals((await compute(commands, [a, b])).map((x) => [...x]), [[1, 2, 3, 4], [5, 6, 9, 9]]);
  run(gpu, [{ clear: b }, { copy: { from, to: b, bytes: 4 } }]);
  assertEquals([...(await download(gpu, b))], [1, 0, 0, 0]);
}, { models: false });
