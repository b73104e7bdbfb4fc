/** PyTorch's generator against its own numbers, and the counter hash against its definition. */
import { createHash } from "node:crypto";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { hash32, TorchGenerator } from "../../lib/data/random.ts";
import { goldenPath } from "../check.ts";

interface Permutation {
  readonly n: number;
  readonly seed: number;
  readonly first: readonly number[];
  readonly sha256_of_int32_le: string;
}

Deno.test("permutation() gives torch.randperm's golden orders", () => {
  const cases: Permutation[] = JSON.parse(Deno.readTextFileSync(goldenPath("tiny/randperm.json")));
  assertEquals(cases.length, 10);
  for (const { n, seed, first, sha256_of_int32_le } of cases) {
    const order = new TorchGenerator(seed).permutation(n);
    assertEquals([...order.slice(0, first.length)], first);
    assertEquals(createHash("sha256").update(new Uint8Array(order.buffer)).digest("hex"), sha256_of_int32_le);
  }
});

Deno.test("uniform() gives the values of torch's uniform_ bit for bit", () => {
  assertEquals([...new TorchGenerator(42).uniform(5, -0.5, 0.5)], [
    0.3822692632675171,
    0.4150039553642273,
    -0.11713624000549316,
    0.45930564403533936,
    -0.10955178737640381,
  ]);
  const bound = Math.sqrt(3) * (Math.sqrt(1 / 3) / Math.sqrt(64)); // kaiming_uniform_(a = sqrt(5)), 64 inputs
  assertEquals([...new TorchGenerator(42).uniform(4, -bound, bound)], [
    0.09556731581687927,
    0.10375098884105682,
    -0.02928406000137329,
    0.11482641100883484,
  ]);
});

Deno.test("next32() is the Mersenne Twister: draw 10,000 of seed 5489 is 4123659995", () => {
  const generator = new TorchGenerator(5489); // the check of the C++ standard, [rand.predef]
  for (let i = 1; i < 10_000; i++) generator.next32();
  assertEquals(generator.next32(), 4123659995);
});

Deno.test("TorchGenerator keeps the low 32 bits of a seed, as torch does, and refuses what is no seed", () => {
  assertEquals(new TorchGenerator(2 ** 32 + 42).next32(), new TorchGenerator(42).next32());
  for (const seed of [-1, 0.5, NaN]) {
    assertThrows(() => new TorchGenerator(seed), RangeError, `Cannot seed with ${seed}`);
  }
  assertThrows(() => new TorchGenerator(1).permutation(214_748_364), RangeError, "Cannot permute 214748364 rows");
});

Deno.test("hash32() follows its definition in exact integers", () => {
  const mix = (x: bigint) => {
    x = BigInt.asUintN(32, x + 0x9e3779b9n);
    x = BigInt.asUintN(32, (x ^ (x >> 16n)) * 0x85ebca6bn);
    x = BigInt.asUintN(32, (x ^ (x >> 13n)) * 0xc2b2ae35n);
    return x ^ (x >> 16n);
  };
  for (const [seed, a, b] of [[0, 0, 0], [42, 1, 2], [3407, 46175, 1023], [2 ** 32 - 1, 2 ** 31, 7]] as const) {
    assertEquals(hash32(seed, a, b), Number(mix(BigInt(b) ^ mix(BigInt(a) ^ mix(BigInt(seed))))));
  }
});

Deno.test("hash32() spreads neighbouring counters evenly and tells its arguments apart", () => {
  const buckets = new Uint32Array(256);
  const seen = new Set<number>();
  for (let a = 0; a < 256; a++) {
    for (let b = 0; b < 256; b++) {
      const hash = hash32(42, a, b);
      buckets[hash >>> 24]!++;
      seen.add(hash);
    }
  }
  const chi = buckets.reduce((sum, n) => sum + (n - 256) ** 2 / 256, 0); // 255 degrees of freedom: 255 ± 22.6
  assert(chi > 160 && chi < 360, `chi square ${chi}`);
  assert(seen.size > 65536 - 10, `${seen.size}`); // 0.5 collisions are expected
  let flipped = 0;
  for (let i = 0; i < 1000; i++) {
    let x = hash32(i, 5, 9) ^ hash32(i, 5, 9 ^ (1 << (i % 32)));
    for (; x !== 0; x &= x - 1) flipped++;
  }
  assert(Math.abs(flipped / 1000 - 16) < 0.5, `${flipped / 1000} of 32 bits flip`);
  assert(hash32(1, 2, 3) !== hash32(1, 3, 2) && hash32(1, 2, 3) !== hash32(2, 1, 3));
});
