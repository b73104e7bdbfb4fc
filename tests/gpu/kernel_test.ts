/** Kernels: what recording checks, what a shader that does not compile says, and how long grids are folded. */
import { assertEquals, assertMatch, assertThrows } from "@std/assert";
import { createRows, fold, Kernel } from "../../lib/gpu/kernel.ts";
import { compile, run } from "../../lib/gpu/program.ts";
import { download, upload } from "../../lib/gpu/tensor.ts";
import { type Bench, gpuTest } from "../on_gpu.ts";
import { inChild } from "./child.ts";

const SOURCE = `
override WIDTH: u32;
override SHIFT: f32 = 0.5;
struct Dims {
  count: u32,
  factor: f32,
}
@group(0) @binding(0) var<uniform> dims: Dims;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(WIDTH)
fn scale(@builtin(global_invocation_id) id: vec3u) {
  if (id.x < dims.count) {
    out[id.x] = dims.factor * x[id.x] + SHIFT;
  }
}

@compute @workgroup_size(1)
fn copy_first() {
  out[0] = x[0];
}
`;

async function prepare({ gpu, input, output }: Bench) {
  const x = await input("x", Float32Array.of(1, 2, 3, 4, 5)),
    out = output("out", { shape: [5], start: new Float32Array(5) });
  const recording = {
    bind: { x, out },
    constants: { WIDTH: 4 },
    dims: { count: 5, factor: 10 },
    grid: [2, 1, 1],
  } as const;
  return { kernel: new Kernel(gpu, "scaling", SOURCE), x, out, recording };
}

gpuTest(
  "createRows() writes a number of rows, and where the first one is, only where one of them changed",
  ({ gpu }) => {
    const written: number[][] = [];
    const queue = {
      writeBuffer: (_buffer: GPUBuffer, _at: number, data: Uint32Array) => written.push([...data.slice(0, 2)]),
    } as unknown as GPUQueue;
    const rows = createRows({ ...gpu, queue }, "rows");
    for (const [count, first] of [[5, 0], [5, 0], [5, 2], [5, 2], [4, 2], [0, 0]] as const) rows.set(count, first);
    assertEquals(written, [[5, 0], [5, 2], [4, 2], [0, 0]]);
    assertEquals(rows.count, 0);
    return Promise.resolve();
  },
  { models: false },
);

gpuTest("Kernel.record() binds by name and sets constants and dims", async (bench) => {
  const { kernel, out, recording } = await prepare(bench);
  const [found] = await bench.compute([kernel.record("scale", recording)], [out]);
  assertEquals([...found!], [10.5, 20.5, 30.5, 40.5, 50.5]);
  const other = { ...recording, constants: { WIDTH: 8, SHIFT: -1 }, dims: { factor: 2, count: 3 } };
  const [second] = await bench.compute([kernel.record("scale", other)], [out]);
  assertEquals([...second!], [1, 3, 5, 0, 0]);
  const [third] = await bench.compute([kernel.record("copy_first", { bind: recording.bind, grid: [1, 1, 1] })], [out]);
  assertEquals([...third!], [1, 0, 0, 0, 0]);
}, { models: false });

gpuTest("Kernel.record() leaves out a dispatch whose grid is null or empty when it runs", async (bench) => {
  const { kernel, out, recording } = await prepare(bench);
  let grid: readonly [number, number, number] | null = null;
  const command = kernel.record("scale", { ...recording, grid: () => grid });
  assertEquals([...(await bench.compute([command], [out]))[0]!], [0, 0, 0, 0, 0]);
  grid = [0, 1, 1];
  assertEquals([...(await bench.compute([command], [out]))[0]!], [0, 0, 0, 0, 0]);
  grid = [1, 1, 1];
  assertEquals([...(await bench.compute([command], [out]))[0]!], [10.5, 20.5, 30.5, 40.5, 0]);
}, { models: false });

const LOOPS = `
override LANES: u32;
@group(0) @binding(0) var<storage, read_write> out: array<vec4u>;

@compute @workgroup_size(LANES)
fn rounds(@builtin(local_invocation_index) lane: u32) {
  var found = vec4u();
  for (var i = 0u; i < lane; i++) {
    found.x += 1u;
    for (var j = i; j < 3u; j += 2u) {
      found.y += 1u;
    }
    if (i == 4u) {
      break;
    }
  }
  for (var i = lane; i > 0u; i >>= 1u) {
    found.z += i;
  }
  out[lane] = found;
}
`;

gpuTest(
  "a loop goes as often as its test says, also never, and in each lane by itself",
  async ({ gpu, output, compute }) => {
    const lanes = 8, out = output("out", { shape: [lanes, 4], dtype: "u32" });
    const command = new Kernel(gpu, "loops", LOOPS).record("rounds", {
      constants: { LANES: lanes },
      bind: { out },
      grid: [1, 1, 1],
    });
    const [found] = await compute([command], [out]);
    const expected = Array.from({ length: lanes }, (_, lane) => {
      const once = Array.from({ length: Math.min(lane, 5) }, (_, i) => Math.max(0, Math.ceil((3 - i) / 2)));
      let z = 0;
      for (let i = lane; i > 0; i >>= 1) z += i;
      return [once.length, once.reduce((sum, n) => sum + n, 0), z, 0];
    });
    assertEquals([...new Uint32Array(found!.buffer)], expected.flat());
  },
);

gpuTest("compile() lets a driver compile and runs nothing", async (bench) => {
  const { kernel, out, recording } = await prepare(bench);
  await upload(bench.gpu, out, out.start);
  const command = kernel.record("scale", recording);
  compile(bench.gpu, [{ clear: out }, command, command]);
  assertEquals(await download(bench.gpu, { ...out, bytes: 20 }), new Float32Array(5));
  run(bench.gpu, [command]);
  assertEquals(await download(bench.gpu, { ...out, bytes: 20 }), Float32Array.of(10.5, 20.5, 30.5, 40.5, 50.5));
}, { models: false });

gpuTest("Kernel.record() refuses names that the file does not have", async (bench) => {
  const { kernel, x, recording } = await prepare(bench);
  const refused = (change: Record<string, unknown>, message: string) =>
    assertThrows(() => kernel.record("scale", { ...recording, ...change }), TypeError, message);
  refused({ bind: { ...recording.bind, outt: x } }, 'Cannot record scaling.scale: "outt" is not one of dims, x, out');
  refused({ constants: { WIDTH: 4, WIDHT: 4 } }, 'Cannot compile scaling.wgsl: it has no override constant "WIDHT"');
  refused({ constants: { WIDTH: 4, SHI: 4 } }, 'it has no override constant "SHI"');
  refused({ dims: { count: 5 } }, 'Cannot record scaling.scale: dims lack "factor"');
  refused({ dims: { count: 5, factor: 1, facto: 1 } }, 'Cannot record scaling.scale: dims have no "facto"');
  const without = new Kernel(bench.gpu, "plain", "@compute @workgroup_size(1) fn go() {}");
  assertThrows(
    () => without.record("go", { bind: {}, dims: { n: 1 }, grid: [1, 1, 1] }),
    TypeError,
    "Cannot record plain.go: plain.wgsl has no dims",
  );
}, { models: false });

gpuTest("a grid over the device's limit is refused when it is recorded or run, not dropped", async (bench) => {
  const { kernel, recording } = await prepare(bench);
  const most = bench.gpu.limits.maxComputeWorkgroupsPerDimension;
  const command = kernel.record("scale", { ...recording, grid: () => [1, most + 1, 1] });
  assertThrows(
    () => command.grid(),
    RangeError,
    `Cannot dispatch scaling.scale: grid [1,${most + 1},1] exceeds ${most}`,
  );
  assertEquals(kernel.record("scale", { ...recording, grid: [most, 1, 1] }).grid(), [most, 1, 1]);
}, { models: false });

Deno.test("fold() spreads a long grid over two dimensions that cover it", () => {
  assertEquals(fold(0), null);
  assertEquals(fold(1), [1, 1, 1]);
  assertEquals(fold(32_768), [32_768, 1, 1]);
  assertEquals(fold(32_769), [32_768, 2, 1]);
  assertEquals(fold(50_000_000), [32_768, 1526, 1]);
});

gpuTest("a kernel that does not compile ends the process with naga's message, line and caret", async () => {
  const compile = (body: string, entry = "go") => `
    const source = ${JSON.stringify(`@group(0) @binding(0) var<storage, read_write> x: array<f32>;\n${body}`)};
    const bind = { x: createTensor(gpu, { name: "x", shape: [4] }) };
    new Kernel(gpu, "bad", source).record("${entry}", { bind, grid: [1, 1, 1] });`;
  const wrong = await inChild(compile("@compute @workgroup_size(1) fn go() {\n  x[0] = 1u;\n}"));
  assertEquals(wrong.code, 1);
  assertMatch(wrong.stderr, /^Cannot compile bad\.go: \n?Shader 'bad\.wgsl' parsing error: .*u32.*f32/);
  assertMatch(wrong.stderr, /wgsl:3:3[^]*3 │\s+x\[0\] = 1u;[^]*\^/);
  const missing = await inChild(compile("override DIM: u32;\n@compute @workgroup_size(1) fn go() { x[DIM] = 1; }"));
  assertMatch(missing.stderr, /^Cannot compile bad\.go: .*Missing value for .*'DIM'/);
  const unknown = await inChild(compile("@compute @workgroup_size(1) fn go() { x[0] = 1; }", "stop"));
  assertMatch(unknown.stderr, /^Cannot compile bad\.stop: .*'stop'/);
  const unbound = await inChild(`
    const source = "@group(0) @binding(0) var<storage, read_write> x: array<f32>; @compute @workgroup_size(1) fn go() { x[0] = 1; }";
    new Kernel(gpu, "bad", source).record("go", { bind: {}, grid: [1, 1, 1] });`);
  assertMatch(unbound.stderr, /^Cannot record bad\.go: /);
  assertEquals([missing.code, unknown.code, unbound.code], [1, 1, 1]);
  assertEquals([wrong, missing, unknown, unbound].map(({ stdout }) => stdout), ["", "", "", ""]);
}, { models: false });
