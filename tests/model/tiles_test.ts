/** Tiles chosen by measuring: once per device and shape, kept, and without effect on any bit. */
import { assert, assertEquals } from "@std/assert";
import { run } from "../../lib/gpu/program.ts";
import { chooseTiles, tileRows } from "../../lib/model/tiles.ts";
import { createMatmul, type Tile, tileName } from "../../lib/ops/matmul.ts";
import { wave } from "../check.ts";
import { gpuTest } from "../on_gpu.ts";

// A CPU driver takes seconds to compile each of these.
const TILES: readonly Tile[] = [{ BM: 64, BN: 64, BK: 32 }, { BM: 128, BN: 128, BK: 16, BAND: 2 }];

gpuTest("chooseTiles() measures each shape once and changes no bit", async (bench) => {
  const { gpu, input, output } = bench, known = new Map<string, string>(), [M, N, K] = [130, 136, 40];
  const x = { tensor: await input("x", wave(M * K), { shape: [M, K] }) };
  const w = { tensor: await input("w", wave(N * K, 1), { shape: [N, K] }) };
  const open = () => {
    const matmul = createMatmul(gpu), rows = bench.rows(M);
    const outs = [0, 1].map((i) => output(`y${i}`, { shape: [M, N] }));
    const commands = outs.map((tensor) => matmul.nt({ rows, x, w, out: { tensor }, n: N, k: K }));
    return { matmul, outs, commands };
  };
  const { matmul, outs, commands } = open();
  const before = await bench.compute(commands, outs);
  const seen: number[][] = [];
  const [chosen, ...more] = await chooseTiles(gpu, matmul, {
    cache: known,
    tiles: TILES,
    onShape: (done, total) => seen.push([done, total]),
  });
  assertEquals([more, seen], [[], [[0, 1]]], "two products of one shape are measured once");
  assertEquals(chosen!.shape, "nt 130 x 136 x 40, f32 weights");
  assertEquals([...chosen!.ms.keys()], TILES.map(tileName));
  const times = [...chosen!.ms.values()];
  assert(times.every((ms) => ms > 0));
  assertEquals(chosen!.ms.get(chosen!.tile), Math.min(...times));
  assertEquals([...known.values()], [chosen!.tile]);
  assertEquals(await bench.compute(commands, outs), before, "the tile chosen");

  for (const tile of TILES) {
    for (const key of known.keys()) known.set(key, tileName(tile));
    const again = open();
    const [found] = await chooseTiles(gpu, again.matmul, { cache: known, tiles: TILES });
    assertEquals([found!.tile, found!.ms.size], [tileName(tile), 0], "nothing is measured twice");
    assertEquals(await bench.compute(again.commands, again.outs), before, tileName(tile));
    assertEquals(tileRows([found!])[1], [found!.shape, found!.tile, "", "measured before"]);
  }
  for (const key of known.keys()) known.set(key, "no tile");
  const last = open();
  const [found] = await chooseTiles(gpu, last.matmul, { cache: known, tiles: TILES });
  assertEquals(found!.ms.size, 2, "what the device cannot hold is measured anew");
  assertEquals(tileRows([found!])[1]!.length, 4);
  run(gpu, last.commands);
}, { models: ["shared"] });

gpuTest("products for CPU drivers and narrow ones have nothing to choose", async (bench) => {
  const { gpu, input, output } = bench, matmul = createMatmul(gpu);
  const x = { tensor: await input("x", wave(128 * 16), { shape: [128, 16] }) };
  const out = { tensor: output("y", { shape: [128, 16] }) };
  matmul.nt({ rows: bench.rows(128), x, w: x, out, n: 16, k: 16 });
  assertEquals(matmul.choices, []);
  assertEquals(tileRows([]), [["product", "tile"], ["all", "this device has one form"]]);
});
