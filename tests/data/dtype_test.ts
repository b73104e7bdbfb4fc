/** Element conversions against values worked out from the formats' definitions, ties and special values included. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { bitsPerElement, byteLength, firstUnfit, fromFloat32, rounded, toFloat32 } from "../../lib/data/dtype.ts";

const halves = (...bits: number[]) => new Uint8Array(Uint16Array.from(bits).buffer);
const words = (...bits: number[]) => new Float32Array(Uint32Array.from(bits).buffer);

/** A half by its definition, in double arithmetic. */
function halfValue(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >>> 10) & 0x1f;
  const mantissa = half & 0x3ff;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return exponent === 0 ? sign * mantissa * 2 ** -24 : sign * (1024 + mantissa) * 2 ** (exponent - 25);
}

Deno.test("every half reads as its definition says and writes back as the same bits", () => {
  const all = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);
  const values = toFloat32(all, "F16");
  for (let half = 0; half < 65536; half++) {
    assert(Object.is(values[half], halfValue(half)), `half ${half}: ${values[half]}`);
  }
  const back = new Uint16Array(fromFloat32(values, "F16").buffer);
  for (let half = 0; half < 65536; half++) {
    const nan = (half & 0x7fff) > 0x7c00;
    assertEquals(back[half], nan ? (half & 0x8000) | 0x7e00 : half);
  }
});

const f16Round = (x: number) => rounded(Float32Array.of(x), "F16")[0]!;
const bf16Round = (x: number) => rounded(Float32Array.of(x), "BF16")[0]!;

Deno.test("every bfloat16 that is a number writes back as the same bits", () => {
  const all = Uint16Array.from({ length: 65536 }, (_, i) => i);
  const values = toFloat32(new Uint8Array(all.buffer), "BF16");
  const back = new Uint16Array(fromFloat32(values, "BF16").buffer);
  for (let bits = 0; bits < 65536; bits++) {
    const nan = (bits & 0x7fff) > 0x7f80;
    assertEquals(back[bits], nan ? (bits & 0x8000) | 0x7fc0 : bits);
  }
});

Deno.test("fromFloat32() takes the nearest half and at the middle between two the even one", () => {
  for (let half = 0; half < 0x7bff; half += 7) {
    const [low, high] = [halfValue(half), halfValue(half + 1)];
    const middle = (low + high) / 2; // exact in float32
    const [, below, above] = [middle, middle - (high - low) / 64, middle + (high - low) / 64];
    const even = half % 2 === 0 ? low : high;
    for (const sign of [1, -1]) {
      assertEquals(f16Round(sign * middle), sign * even);
      assertEquals(f16Round(sign * below), sign * low);
      assertEquals(f16Round(sign * above), sign * high);
    }
  }
  assertEquals(f16Round(65519.99), 65504);
  assertEquals(f16Round(65520), Infinity);
  assertEquals(f16Round(-1e30), -Infinity);
  assertEquals(f16Round(2 ** -25), 0);
  assertEquals(f16Round(2 ** -25 * 1.0001), 2 ** -24);
  assert(Object.is(f16Round(-1e-30), -0));
  assert(Number.isNaN(f16Round(NaN)));
});

Deno.test("fromFloat32() rounds bfloat16 to the nearest, ties to even, and keeps NaN and infinity", () => {
  const values = words(
    0x3f808000,
    0x3f818000,
    0x3f807fff,
    0x3f808001,
    0x7f7fffff,
    0x7f800000,
    0x7f800001,
    0xffffffff,
    0x80000001,
  );
  const bits = new Uint16Array(fromFloat32(values, "BF16").buffer);
  assertEquals([...bits], [0x3f80, 0x3f82, 0x3f80, 0x3f81, 0x7f80, 0x7f80, 0x7fc0, 0xffc0, 0x8000]);
  assertEquals(bf16Round(1 + 2 ** -8), 1);
  assertEquals(bf16Round(1 + 3 * 2 ** -8), 1 + 2 ** -6);
  assert(Number.isNaN(bf16Round(NaN)));
});

Deno.test("toFloat32() copies, reads at odd addresses and rounds float64 once", () => {
  const source = new Uint8Array(9);
  source.set(new Uint8Array(Float32Array.of(1.5, -2).buffer), 1);
  const values = toFloat32(source.subarray(1), "F32");
  assertEquals([...values], [1.5, -2]);
  source.fill(0);
  assertEquals([...values], [1.5, -2]);
  const odd = new Uint8Array(5);
  odd.set(halves(0x3c00, 0xc000), 1);
  assertEquals([...toFloat32(odd.subarray(1), "F16")], [1, -2]);
  assertEquals([...toFloat32(new Uint8Array(Float64Array.of(Math.PI, 1e-50).buffer), "F64")], [
    Math.fround(Math.PI),
    0,
  ]);
});

Deno.test("sizes are exact and what has no float value is refused", () => {
  assertEquals(byteLength("F32", [2, 3]), 24);
  assertEquals(byteLength("BF16", []), 2);
  assertEquals(byteLength("F4", [3, 2]), 3);
  assertEquals(bitsPerElement("F6_E2M3"), 6);
  assertThrows(() => byteLength("F4", [3]), RangeError, "12 bits");
  assertThrows(() => toFloat32(new Uint8Array(8), "I64"), TypeError, "Cannot read I64 values as float32");
  assertThrows(() => toFloat32(new Uint8Array(6), "F32"), RangeError, "Cannot read 6 bytes as F32");
});

Deno.test("firstUnfit() finds the first value that rounds to infinity or is no number, in each type", () => {
  const below = { F32: 3.4028234663852886e38, F16: 65519.99, BF16: 3.3961775292304957e38 - 2 ** 104 };
  for (const dtype of ["F32", "F16", "BF16"] as const) {
    const fits = Float32Array.of(0, below[dtype], -below[dtype], 1e-45);
    assertEquals(firstUnfit(fits, dtype), -1);
    assertEquals(rounded(fits, dtype).every(Number.isFinite), true);
    for (const bad of [NaN, Infinity, -Infinity, ...dtype === "F32" ? [] : [3.3961775292304957e38, -3.4e38]]) {
      assertEquals(firstUnfit(Float32Array.of(1, bad, NaN), dtype), 1, `${bad} in ${dtype}`);
    }
  }
  assertEquals(firstUnfit(Float32Array.of(65520), "F16"), 0);
});
