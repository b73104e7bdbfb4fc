/** Wide accesses: what becomes of a WGSL file on a CPU driver, and that other devices get it as it is. */
import { assertEquals } from "@std/assert";
import type { Gpu } from "../../lib/gpu/device.ts";
import { groupsOf, widen, wideOf } from "../../lib/gpu/wide.ts";

const cpu = { lanes: "subgroup" } as Gpu, gpu = { lanes: "shared" } as Gpu;
const SOURCE = `const WIDE = 1u;
@group(0) @binding(0) var<storage, read> x: array<array<vec4f, WIDE>>;
@group(0) @binding(1) var<storage, read_write> out: array<array<vec4f, WIDE>>;
@group(0) @binding(2) var<storage, read_write> words: array<array<u32, WIDE>>;
@group(0) @binding(3) var<storage, read> more: array<vec4f>;
  var value = x[first[0] + c];
  let both = out[c][1] + more[x[c][0].x] + maxx[c] + of.x[c];
  out[first + c] = value;
  words[c] = words[c + 1u];
`;

Deno.test("widen() doubles what bindings hold, takes apart what is read and puts together what is written", () => {
  const found = widen(cpu, SOURCE, 8);
  assertEquals(
    found.slice(0, found.indexOf("\n\n")),
    `const WIDE = 2u;
@group(0) @binding(0) var<storage, read> x: array<vec4<u64>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read_write> words: array<vec2u>;
@group(0) @binding(3) var<storage, read> more: array<vec4f>;
  var value = two_vec4f(x[first[0] + c]);
  let both = two_vec4f(out[c])[1] + more[two_vec4f(x[c])[0].x] + maxx[c] + of.x[c];
  out[first + c] = wide_vec4f(value);
  words[c] = wide_u32(two_u32(words[c + 1u]));`,
  );
  assertEquals([...found.matchAll(/^fn (\w+)/gm)].map(([, name]) => name), [
    "two_vec4f",
    "wide_vec4f",
    "two_u32",
    "wide_u32",
  ]);
});

Deno.test("widen() lets vectors be that are read by sixteen lanes", () => {
  const found = widen({ ...cpu, subgroup: 16 }, SOURCE.replace("both = out[c][1] +", "both ="), 8);
  assertEquals(
    found.slice(0, found.indexOf("\n\n")),
    `const WIDE = 2u;
@group(0) @binding(0) var<storage, read> x: array<array<vec4f, WIDE>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read_write> words: array<vec2u>;
@group(0) @binding(3) var<storage, read> more: array<vec4f>;
  var value = x[first[0] + c];
  let both = more[x[c][0].x] + maxx[c] + of.x[c];
  out[first + c] = wide_vec4f(value);
  words[c] = wide_u32(two_u32(words[c + 1u]));`,
  );
  // The same text with `both` as it is above: `out` is read there.
  assertEquals(widen({ ...cpu, subgroup: 16 }, SOURCE, 8).includes("out: array<array<vec4f, WIDE>>;"), true);
});

Deno.test("widen() leaves a file alone on other devices, and where rows are no multiple of 8", () => {
  assertEquals(widen(gpu, SOURCE, 8), SOURCE);
  assertEquals(widen(cpu, SOURCE, 12), SOURCE);
  assertEquals([wideOf(cpu, 8), wideOf(cpu, 12), wideOf(gpu, 8)], [2, 1, 1]);
});

Deno.test("groupsOf() gives a CPU driver fewer workgroups", () => {
  assertEquals([groupsOf(cpu, 0), groupsOf(cpu, 1), groupsOf(cpu, 9), groupsOf(gpu, 9)], [0, 1, 3, 9]);
});
