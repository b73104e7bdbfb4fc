/** NF4 and double quantization against bitsandbytes' golden bytes, scales and dequantized values. */
import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { rounded } from "../../lib/data/dtype.ts";
import {
  dequantizeNf4,
  doubleQuantize,
  NESTED_MAP,
  NF4_CODE,
  NF4_NORMAL_ERROR,
  quantizeNf4,
  undoubleQuantize,
} from "../../lib/data/nf4.ts";
import { TorchGenerator } from "../../lib/data/random.ts";
import { golden } from "../check.ts";

/** The code of every weight. */
function unpack(packed: Uint8Array): number[] {
  return Array.from(packed, (byte) => [byte >> 4, byte & 15]).flat();
}

/** How many entries differ; minus zero equals zero. */
function mismatches(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assertEquals(a.length, b.length);
  return Array.from({ length: a.length }, (_, i) => i).filter((i) => a[i] !== b[i]).length;
}

const BOUNDARIES = Float32Array.from({ length: 15 }, (_, i) => (NF4_CODE[i]! + NF4_CODE[i + 1]!) / 2);

Deno.test("NF4_CODE and NESTED_MAP are bitsandbytes' tables", () => {
  const file = golden("odd/nf4.safetensors");
  assertEquals(NF4_CODE, file.f32("code"));
  assertEquals(NESTED_MAP, file.f32("nested_code"));
});

Deno.test("quantizeNf4() and doubleQuantize() give bitsandbytes' bytes on every golden projection", () => {
  const file = golden("odd/nf4.safetensors");
  const weights = golden("odd/model_hf/model.safetensors");
  const names = file.names.filter((name) => name.endsWith(".packed")).map((name) => name.slice(0, -".packed".length));
  assertEquals(names.length, 7 + 2); // the projections of layer 0, and two of them from bfloat16
  for (const name of names) {
    const fromBf16 = name.startsWith("bf16.");
    const exact = weights.f32(name.replace("bf16.", ""));
    const values = fromBf16 ? rounded(exact, "BF16") : exact;
    const { packed, absmax } = quantizeNf4(values);
    assertEquals(mismatches(packed, file.u8(`${name}.packed`)), 0, name);
    assertEquals(mismatches(absmax, file.f32(`${name}.absmax`)), 0, name);

    // The offset is a mean: it agrees to the last bit because the sum runs in PyTorch's order.
    const nested = doubleQuantize(absmax);
    assertEquals(nested.offset, file.f32(`${name}.dq.offset`)[0], name);
    assertEquals(mismatches(nested.codes, file.u8(`${name}.dq.absmax_codes`)), 0, name);
    assertEquals(mismatches(nested.nestedAbsmax, file.f32(`${name}.dq.nested_absmax`)), 0, name);
    const scales = undoubleQuantize(nested);
    assertEquals(mismatches(scales, file.f32(`${name}.dq.absmax`)), 0, name);

    if (!file.names.includes(`${name}.dequant`)) continue;
    const decode = (absmax: Float32Array) =>
      rounded(dequantizeNf4({ packed, absmax, count: values.length }), fromBf16 ? "BF16" : "F32");
    assertEquals(mismatches(decode(absmax), file.f32(`${name}.dequant`)), 0, name);
    assertEquals(mismatches(decode(scales), file.f32(`${name}.dq.dequant`)), 0, name);
  }
});

Deno.test("the golden edge cases agree everywhere but in blocks of zeros, where CUDA differs from the golden path", () => {
  const file = golden("tiny/nf4_edge.safetensors");
  const cases = file.names.filter((name) => name.endsWith(".packed")).map((name) => name.slice(0, -".packed".length));
  assertEquals(cases.length, 15);
  // CUDA stores byte 0x00 for zeros, the golden path 0x77: 64 bytes are the two blocks of "zeros", 5 the ten zeros at the
  // end of "tail_zeros", where the golden path also keeps 1e-38 as the absmax. All of them dequantize to 0.
  const bytes: Record<string, number> = { zeros: 64, tail_zeros: 5 };
  const scales: Record<string, number> = { tail_zeros: 1 };
  // Scales that are all equal leave zeros after their mean is taken off: code 0 on CUDA, 127 (the entry 0) there.
  const nestedCodes: Record<string, number> = {
    "boundaries_absmax0.25": 3,
    boundaries_absmax1: 4,
    constant: 1,
    negative_zero: 1,
    size_1: 1,
    size_63: 1,
    subnormal: 1,
  };
  for (const name of cases) {
    const values = file.f32(`${name}.input`);
    const { packed, absmax } = quantizeNf4(values);
    assertEquals(mismatches(packed, file.u8(`${name}.packed`)), bytes[name] ?? 0, name);
    assertEquals(mismatches(absmax, file.f32(`${name}.absmax`)), scales[name] ?? 0, name);
    const decode = (absmax: Float32Array) => dequantizeNf4({ packed, absmax, count: values.length });
    if (file.names.includes(`${name}.dequant`)) {
      assertEquals(mismatches(decode(absmax), file.f32(`${name}.dequant`)), 0, name);
    }
    if (!file.names.includes(`${name}.dq.offset`)) continue;
    const nested = doubleQuantize(absmax);
    assertEquals(nested.offset, file.f32(`${name}.dq.offset`)[0], name);
    assertEquals(mismatches(nested.codes, file.u8(`${name}.dq.absmax_codes`)), nestedCodes[name] ?? 0, name);
    assertEquals(mismatches(decode(undoubleQuantize(nested)), file.f32(`${name}.dq.dequant`)), 0, name);
  }
});

Deno.test("a block of zeros gets the bytes of CUDA and dequantizes to zeros", () => {
  const { packed, absmax } = quantizeNf4(new Float32Array(64));
  assertEquals([...packed], Array(32).fill(0));
  assertEquals([...absmax], [0]);
  assert(dequantizeNf4({ packed, absmax, count: 64 }).every((x) => x === 0));
});

Deno.test("a value on a boundary takes the lower code and the next float32 the upper, at any power of two", () => {
  const next = BOUNDARIES.map((b) => {
    const bits = new Int32Array(Float32Array.of(b).buffer);
    bits[0]! += b > 0 ? 1 : -1; // towards plus infinity
    return new Float32Array(bits.buffer)[0]!;
  });
  for (const scale of [1, 0.25, 2 ** -20, 2 ** 30]) {
    for (const [values, first] of [[BOUNDARIES, 0], [next, 1]] as const) {
      const { packed } = quantizeNf4(Float32Array.of(...values, 1).map((x) => x * scale));
      assertEquals(unpack(packed), [...Array.from({ length: 15 }, (_, i) => i + first), 15]);
    }
  }
});

Deno.test("quantizeNf4() takes the code that counting the boundaries gives, for block sizes 32 to 4096", () => {
  const generator = new TorchGenerator(3);
  for (const blocksize of [32, 64, 128, 4096]) {
    const values = generator.uniform(20_001, -0.3, 0.5).map((x) => x ** 3);
    const { packed, absmax } = quantizeNf4(values, { blocksize });
    const wanted = Array.from(values, (x, i) => {
      const scaled = Math.fround(x * Math.fround(1 / absmax[Math.floor(i / blocksize)]!));
      return BOUNDARIES.filter((b) => scaled > b).length;
    });
    assertEquals(mismatches(unpack(packed), [...wanted, 7]), 0); // the half byte left over is padding, code 7
  }
});

Deno.test("normal weights lose 0.0728 standard deviations on average", () => {
  const generator = new TorchGenerator(1);
  const [a, b] = [generator.uniform(400_000, 0, 1), generator.uniform(400_000, 0, 1)];
  const values = a.map((u, i) => Math.sqrt(-2 * Math.log(1 - u)) * Math.cos(2 * Math.PI * b[i]!));
  const decoded = dequantizeNf4({ ...quantizeNf4(values), count: values.length });
  const error = values.reduce((sum, x, i) => sum + Math.abs(x - decoded[i]!), 0) / values.length;
  assertAlmostEquals(error, NF4_NORMAL_ERROR, 3e-4); // four standard errors of this sample and of sigma
});

Deno.test("doubleQuantize() takes every scale of a full-size weight into the mean", () => {
  const absmax = new TorchGenerator(5).uniform(44_032, 0.01, 0.09); // as many as a 2752 x 1024 weight has
  const exact = absmax.reduce((sum, x) => sum + x, 0) / absmax.length; // in float64
  const nested = doubleQuantize(absmax);
  assertAlmostEquals(nested.offset / exact, 1, 1e-7);
  assertEquals(nested.nestedAbsmax.length, 172);
  const largest = Math.max(...undoubleQuantize(nested).map((x, i) => Math.abs(x - absmax[i]!)));
  assert(largest < 0.04 * 0.0071, `${largest}`); // half of the map's widest gap, 0.9 / 64, times nested_absmax
});

Deno.test("quantizeNf4() refuses a weight that is not finite and says where it is", () => {
  for (const bad of [NaN, Infinity, -Infinity]) {
    const values = new Float32Array(200).fill(0.5);
    values[130] = bad;
    assertThrows(() => quantizeNf4(values), RangeError, `Cannot quantize weight 130: it is ${bad}`);
  }
  assertThrows(() => quantizeNf4(new Float32Array(9), { blocksize: 3 }), RangeError, "blocks of 3");
});

Deno.test("dequantizeNf4() refuses parts that do not fit the count", () => {
  const parts = quantizeNf4(new Float32Array(128).fill(1));
  assertThrows(() => dequantizeNf4({ ...parts, count: 130 }), RangeError, "Cannot dequantize 130 weights");
});
