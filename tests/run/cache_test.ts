/** The cache of measurements: kept between processes, and of no consequence when it is lost. */
import { assertEquals } from "@std/assert";
import { openCache } from "../../lib/run/cache.ts";
import { temporaryFolder } from "../check.ts";

/** Runs `body` with the cache folder inside a folder of its own. */
async function inside(body: (folder: string) => Promise<void>): Promise<void> {
  using folder = temporaryFolder();
  const before = Deno.env.get("XDG_CACHE_HOME");
  Deno.env.set("XDG_CACHE_HOME", folder.path);
  try {
    await body(folder.path);
  } finally {
    if (before === undefined) Deno.env.delete("XDG_CACHE_HOME");
    else Deno.env.set("XDG_CACHE_HOME", before);
  }
}

Deno.test("what was saved is there for the next process, beside what others saved meanwhile", () =>
  inside(async (folder) => {
    const cache = openCache("tiles"), other = openCache("tiles");
    assertEquals([cache.path, cache.get("a")], [`${folder}/medslm-sft/tiles.json`, undefined]);
    await cache.save();
    assertEquals([...Deno.readDirSync(folder)], [], "nothing to save, nothing made");
    cache.set("a", "64x64x32");
    assertEquals(cache.get("a"), "64x64x32");
    other.set("b", "128x128x16");
    await cache.save();
    await other.save();
    const next = openCache("tiles");
    assertEquals(["a", "b"].map(next.get), ["64x64x32", "128x128x16"]);
    assertEquals(openCache("others").get("a"), undefined);
  }));

Deno.test("a damaged file counts as empty, and a folder that cannot be written stops nothing", () =>
  inside(async (folder) => {
    await Deno.mkdir(`${folder}/medslm-sft`);
    for (const text of ["", "{", "null", '{"a": 1}', "[]"]) {
      await Deno.writeTextFile(`${folder}/medslm-sft/tiles.json`, text);
      assertEquals(openCache("tiles").get("a"), undefined, text);
    }
    await Deno.writeTextFile(`${folder}/file`, "");
    Deno.env.set("XDG_CACHE_HOME", `${folder}/file`);
    const cache = openCache("tiles");
    cache.set("a", "64x64x32");
    await cache.save();
    assertEquals(cache.get("a"), "64x64x32");
  }));
