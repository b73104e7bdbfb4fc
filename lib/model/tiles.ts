/**
 * Tiles of the matrix products on a GPU, chosen by running each candidate once per device and shape. All tiles give the same
 * bits, so the choice changes nothing but the time. CPU drivers have one form and nothing to choose.
 */
import { createHash } from "node:crypto";
import type { Gpu } from "../gpu/device.ts";
import { run, timePasses } from "../gpu/program.ts";
import { type Matmul, type Tile, tileName, tilesOf } from "../ops/matmul.ts";

/** Where choices are kept, by device and shape. */
export interface TileCache {
  get(key: string): string | undefined;
  set(key: string, tile: string): void;
}

/** The tile of one shape; `ms` has the time of every candidate, and is empty where the cache knew the answer. */
export interface ChosenTile {
  readonly shape: string;
  readonly tile: string;
  readonly ms: ReadonlyMap<string, number>;
}

/** Timed runs per candidate, after one that is not. */
const RUNS = 3;

/**
 * Chooses the tiles of all products that `matmul` has recorded. Shapes that the cache does not know are measured on the
 * products' own tensors: rows must be set to their most, and what the products write is lost.
 */
export async function chooseTiles(
  gpu: Gpu,
  matmul: Matmul,
  { cache, tiles = tilesOf(gpu), onShape }: {
    cache: TileCache;
    tiles?: readonly Tile[];
    /** Called before a shape is measured. */
    onShape?: (done: number, total: number) => void;
  },
): Promise<ChosenTile[]> {
  const version = createHash("sha256").update(matmul.source).digest("hex").slice(0, 8);
  const shapes = [...Map.groupBy(matmul.choices, ({ shape }) => shape)], chosen: ChosenTile[] = [];
  for (const [done, [shape, products]] of shapes.entries()) {
    const key = `${gpu.name} | ${version} | ${shape}`, known = cache.get(key), ms = new Map<string, number>();
    let best = tiles.find((tile) => tileName(tile) === known);
    if (!best) {
      onShape?.(done, shapes.length);
      const dispatches = tiles.map((tile) => products[0]!.with(tile));
      run(gpu, dispatches);
      // Round by round: a device that was idle is slow at first, and no tile is to bear that alone.
      const spans = await timePasses(gpu, Array.from({ length: RUNS }, () => dispatches.map((one) => [one])).flat());
      tiles.forEach((tile, t) => {
        const times = spans.filter((_, i) => i % tiles.length === t).map((span) => span.ms);
        ms.set(tileName(tile), Math.min(...times));
      });
      best = tiles.reduce((a, b) => ms.get(tileName(b))! < ms.get(tileName(a))! ? b : a);
      cache.set(key, tileName(best));
    }
    for (const product of products) product.use(best);
    chosen.push({ shape, tile: tileName(best), ms });
  }
  return chosen;
}

/** A table of choices: shape, tile, its time and those of the others; one line where nothing was to choose. */
export function tileRows(chosen: readonly ChosenTile[]): string[][] {
  if (chosen.length === 0) return [["product", "tile"], ["all", "this device has one form"]];
  const rows = chosen.map(({ shape, tile, ms }) => {
    const time = (name: string) => ms.get(name)!.toFixed(3);
    const others = [...ms.keys()].filter((name) => name !== tile).map((name) => `${name} ${time(name)}`);
    return ms.size === 0 ? [shape, tile, "", "measured before"] : [shape, tile, time(tile), others.join(", ")];
  });
  return [["product", "tile", "ms", "others"], ...rows];
}
