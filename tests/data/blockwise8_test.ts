/** 8-bit blockwise quantization against bitsandbytes' golden codes and against its CUDA search, restated. */
import { createHash } from "node:crypto";
import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  dequantizeBlockwise,
  dynamicMap,
  midpoints,
  nearestCode,
  quantizeBlockwise,
} from "../../lib/data/blockwise8.ts";
import { TorchGenerator } from "../../lib/data/random.ts";
import { golden } from "../check.ts";

const MAPS = { signed: dynamicMap(true), unsigned: dynamicMap(false) };

/** The places where two lists differ. */
function differences(a: ArrayLike<number>, b: ArrayLike<number>): number[] {
  assertEquals(a.length, b.length);
  return Array.from({ length: a.length }, (_, i) => i).filter((i) => a[i] !== b[i]);
}

Deno.test("dynamicMap() gives both maps of bitsandbytes bit for bit", () => {
  const sha256 = (map: Float32Array) => createHash("sha256").update(new Uint8Array(map.buffer)).digest("hex");
  assertEquals(sha256(MAPS.signed), "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
  assertEquals(sha256(MAPS.unsigned), "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398");
  assertEquals([MAPS.signed[127], MAPS.unsigned[0]], [0, 0]);
});

Deno.test("quantizeBlockwise() gives bitsandbytes' codes on the golden vectors", () => {
  const file = golden("tiny/blockwise8.safetensors");
  for (const [name, map] of Object.entries(MAPS)) {
    for (const vector of ["above_midpoints", "entries", "random_700", "size_1", "wide_512", "zero_block"]) {
      const key = `${name}.${vector}`;
      const found = quantizeBlockwise(file.f32(`${key}.input`), map);
      const codes = differences(found.codes, file.u8(`${key}.codes`));
      // 0 · 1/0 is NaN on CUDA, which falls through its search to code 0; the golden PyTorch path looks 0 up instead.
      const inZeroBlock = vector === "zero_block" && name === "signed";
      assertEquals(codes, inZeroBlock ? Array.from({ length: 256 }, (_, i) => i) : [], `${key}.codes`);
      assertEquals(differences(found.absmax, file.f32(`${key}.absmax`)), [], `${key}.absmax`);
      assertEquals(differences(dequantizeBlockwise(found, map), file.f32(`${key}.dequant`)), [], `${key}.dequant`);
    }
  }
});

Deno.test("a tie goes to the even code, as on CUDA, where the golden PyTorch path takes the lower", () => {
  const file = golden("tiny/blockwise8.safetensors");
  for (const [name, map] of Object.entries(MAPS)) {
    const { codes } = quantizeBlockwise(file.f32(`${name}.midpoints.input`), map); // 255 midpoints and 1
    const lower = file.u8(`${name}.midpoints.codes`);
    const odd = Array.from({ length: 127 }, (_, i) => 2 * i + 1);
    assertEquals(differences(codes, lower), odd);
    assert(odd.every((i) => lower[i] === i && codes[i] === i + 1));
  }
});

Deno.test("nearestCode() agrees with the search of the CUDA kernel", () => {
  const generator = new TorchGenerator(7);
  for (const map of Object.values(MAPS)) {
    const middle = midpoints(map);
    const ulp = 2 ** -30;
    const near = [...middle, ...map].flatMap((x) => [x, x + ulp, x - ulp, x * (1 + 2 ** -23), x * (1 - 2 ** -23)]);
    const values = Float32Array.from([...near, ...generator.uniform(50_000, -1, 1), NaN, 0, -0, 1, -1]);
    const wrong = values.filter((x) => nearestCode(x, middle) !== cudaSearch(x, map));
    assertEquals(wrong.length, 0, `first at ${wrong[0]}`);
  }
});

/** bitsandbytes csrc/kernels.cu, dQuantize: halve the step around entry 127, then look at one midpoint. */
function cudaSearch(x: number, map: Float32Array): number {
  let [pivot, below, above] = [127, 0, 255];
  for (let step = 64; step > 0; step >>= 1) {
    if (x > map[pivot]!) [below, pivot] = [pivot, pivot + step];
    else [above, pivot] = [pivot, pivot - step];
  }
  const middle = (a: number, b: number) => Math.fround(map[a]! + map[b]!) * 0.5;
  if (x > map[pivot]!) return x > middle(above, pivot) ? above : pivot;
  return x < middle(below, pivot) ? below : pivot;
}

Deno.test("quantizeBlockwise() uses one absmax per block, also for a short last block", () => {
  const values = Float32Array.of(1, -2, 0.5, 8, -4, 0.25, 3);
  const { codes, absmax } = quantizeBlockwise(values, MAPS.signed, 3);
  assertEquals([...absmax], [2, 8, 3]);
  assertEquals([codes[3], codes[6]], [255, 255]);
});

Deno.test("quantizeBlockwise() refuses a value that is not finite and says where it is", () => {
  const values = new Float32Array(600).fill(1);
  values[513] = NaN;
  assertThrows(() => quantizeBlockwise(values, MAPS.signed), RangeError, "Cannot quantize value 513: it is NaN");
});
