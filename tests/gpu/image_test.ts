/** Images: tensors that CPU drivers read as texels, copied anew whenever the tensor was written. */
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { imageBytes, readImages } from "../../lib/gpu/image.ts";
import { type Dispatch, fold, Kernel } from "../../lib/gpu/kernel.ts";
import { profile, run, timePasses } from "../../lib/gpu/program.ts";
import { createTensor, destroyOwned, download, own, type Tensor, upload } from "../../lib/gpu/tensor.ts";
import { type Bench, gpuTest } from "../on_gpu.ts";

const SOURCE = `
struct Dims {
  count: u32,
  last: u32,
}
@group(0) @binding(0) var<uniform> dims: Dims;
// image
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
// image
@group(0) @binding(2) var<storage, read> order: array<vec4u>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;

@compute @workgroup_size(8)
fn add(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * 32768u) * 8u + lane;
  if (i < dims.count) {
    out[i] = x[order[dims.last - i][0]] + x[i].wzyx;
  }
}
`;

/** Records `out[i] = x[order[last - i].x] + x[i].wzyx` over texels, `order` counting up. */
async function adding(bench: Bench, texels: number) {
  const gpu = own(bench.gpu), kernel = new Kernel(gpu, "adding", SOURCE);
  const tensor = async (name: string, values?: Float32Array | Uint32Array) => {
    const dtype = values instanceof Uint32Array ? "u32" : "f32";
    const made = createTensor(gpu, { name, shape: [4 * texels], dtype });
    if (values) await upload(gpu, made, values);
    return made;
  };
  const order = await tensor("order", Uint32Array.from({ length: 4 * texels }, (_, i) => i % 4 ? 0xffff : i / 4));
  const add = (x: Tensor, out: Tensor) =>
    kernel.record("add", {
      bind: { x, order, out },
      dims: { count: texels, last: texels - 1 },
      grid: fold(Math.ceil(texels / 8)),
    });
  const expected = (x: Float32Array) =>
    x.map((_, i) => x[(texels - 1 - Math.floor(i / 4)) * 4 + i % 4]! + x[Math.floor(i / 4) * 4 + 3 - i % 4]!);
  return { tensor, add, expected, free: () => destroyOwned(gpu) };
}

const numbers = (n: number, from = 0) => Float32Array.from({ length: n }, (_, i) => (from + i) % 4093);

gpuTest("an image holds its tensor, in one row or in several with a part of the last", async (bench) => {
  for (const texels of [1, 7, 511, 512, 513, 3 * 512 + 5]) {
    const { tensor, add, expected, free } = await adding(bench, texels), values = numbers(4 * texels);
    const x = await tensor("x", values), out = await tensor("out");
    run(bench.gpu, [add(x, out)]);
    assertEquals(await download(bench.gpu, out), expected(values), `${texels} texels`);
    // Never a power of two, so that a driver compiles its readers once.
    const least = Math.max(3, Math.ceil(texels / 512)), height = [4, 8, 16].includes(least) ? least + 1 : least;
    assertEquals(imageBytes(x.buffer), bench.gpu.lanes === "subgroup" ? 16 * 516 * height : 0);
    free();
    assertEquals(imageBytes(x.buffer), 0);
  }
});

gpuTest(
  "a tensor that has more rows than a device allows is read in wide ones, and refused beyond those",
  async (bench) => {
    const limits = { maxTextureDimension2D: 3, maxComputeWorkgroupsPerDimension: 65535 } as GPUSupportedLimits;
    const small = { ...bench, gpu: { ...bench.gpu, limits } };
    for (const texels of [3 * 512, 3 * 512 + 1, 8192, 2 * 8192 + 7, 3 * 8192]) {
      const { tensor, add, expected, free } = await adding(small, texels), values = numbers(4 * texels);
      const x = await tensor("x", values), out = await tensor("out");
      run(bench.gpu, [add(x, out)]);
      assertEquals(await download(bench.gpu, out), expected(values), `${texels} texels`);
      free();
    }
    const { tensor, add, free } = await adding(small, 3 * 8192 + 1), x = await tensor("x"), out = await tensor("out");
    assertThrows(
      () => add(x, out),
      RangeError,
      'Cannot read "x" as an image: 393232 bytes take more than 3 rows of 131072',
    );
    free();
  },
  { models: ["subgroup"] }, // only these kernels read images
);

gpuTest("a tensor is read as it is, whoever wrote it last: a kernel, a copy, a clearing, an upload", async (bench) => {
  const { gpu } = bench, { tensor, add, expected, free } = await adding(bench, 9), values = numbers(36, 1);
  const x = await tensor("x", values), y = await tensor("y"), z = await tensor("z"), zero = new Float32Array(36);
  const read = (t: Tensor) => download(gpu, t);
  const twice = expected(expected(values));
  run(gpu, [add(x, y), add(y, z)]);
  assertEquals(await read(z), twice, "a kernel, in one run");
  run(gpu, [{ clear: y }, add(y, z)]);
  assertEquals(await read(z), zero, "a clearing");
  run(gpu, [{ copy: { from: x, to: y, bytes: 144 } }, add(y, z)]);
  assertEquals(await read(z), expected(values), "a copy");
  run(gpu, [add(z, y)]);
  run(gpu, [add(y, z)]);
  assertEquals(await read(z), expected(twice), "a kernel of another run");
  await upload(gpu, y, numbers(36, 500));
  run(gpu, [add(y, z)]);
  assertEquals(await read(z), expected(numbers(36, 500)), "an upload");
  free();
});

gpuTest("timed passes read the same, and the copies are in their times", async (bench) => {
  const { gpu } = bench, { tensor, add, expected, free } = await adding(bench, 9), values = numbers(36, 1);
  const x = await tensor("x", values), y = await tensor("y"), z = await tensor("z");
  const chain: Dispatch[] = [add(x, y), add(y, z), add(z, y)], thrice = expected(expected(expected(values)));
  for (const passes of [[chain], chain.map((dispatch) => [dispatch])]) {
    const spans = await timePasses(gpu, passes);
    assertEquals(spans.map(({ ms }) => ms > 0), passes.map(() => true));
    assertEquals(await download(gpu, y), thrice);
  }
  assertEquals((await profile(gpu, chain)).map(({ label }) => label), ["adding.add", "adding.add", "adding.add"]);
  assertEquals(await download(gpu, y), thrice);
  free();
});

Deno.test("readImages() turns marked bindings into textures and leaves the others alone", () => {
  const text = readImages(SOURCE);
  assertStringIncludes(text, "@group(0) @binding(1) var x: texture_storage_2d<rgba32uint, read>;");
  assertStringIncludes(
    text,
    "+ bitcast<vec4f>(textureLoad(x, vec2u((i) % texels_of_x, (i) / texels_of_x))).wzyx;",
  );
  assertStringIncludes(text, "@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;");
  const plain = SOURCE.replaceAll("// image\n", "");
  assertEquals(readImages(plain), plain);
});
