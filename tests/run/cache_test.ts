/** The cache of measurements: kept between processes, and of no consequence when it is lost. */
import { assertEquals } from "@std/assert";
import { cacheFolder, openCache } from "../../lib/run/cache.ts";
import { temporaryFolder } from "../check.ts";

Deno.test("the cache lies where the system keeps caches", () => {
  const folder = (env: Record<string, string>) => cacheFolder(new Map(Object.entries(env)));
  assertEquals(folder({ XDG_CACHE_HOME: "/cache", HOME: "/home/ann" }), "/cache");
  assertEquals(folder({ XDG_CACHE_HOME: "", HOME: "/home/ann" }), "/home/ann/.cache");
  assertEquals(folder({ LOCALAPPDATA: "C:\\Local" }), "C:\\Local");
  assertEquals(folder({}), undefined);
  assertEquals(openCache("tiles").path, openCache("tiles", cacheFolder(Deno.env)).path);
});

Deno.test("what was saved is there for the next process, beside what others saved meanwhile", async () => {
  using folder = temporaryFolder();
  const open = (kind: string) => openCache(kind, folder.path);
  const cache = open("tiles"), other = open("tiles");
  assertEquals([cache.path, cache.get("a")], [`${folder.path}/medslm-sft/tiles.json`, undefined]);
  await cache.save();
  assertEquals([...Deno.readDirSync(folder.path)], [], "nothing to save, nothing made");
  cache.set("a", "64x64x32");
  assertEquals(cache.get("a"), "64x64x32");
  other.set("b", "128x128x16");
  await cache.save();
  await other.save();
  const next = open("tiles");
  assertEquals(["a", "b"].map(next.get), ["64x64x32", "128x128x16"]);
  assertEquals(open("others").get("a"), undefined);
});

Deno.test("a damaged file counts as empty, and a folder that cannot be written stops nothing", async () => {
  using folder = temporaryFolder();
  await Deno.mkdir(`${folder.path}/medslm-sft`);
  for (const text of ["", "{", "null", '{"a": 1}', "[]"]) {
    await Deno.writeTextFile(`${folder.path}/medslm-sft/tiles.json`, text);
    assertEquals(openCache("tiles", folder.path).get("a"), undefined, text);
  }
  await Deno.writeTextFile(`${folder.path}/file`, "");
  const cache = openCache("tiles", `${folder.path}/file`);
  cache.set("a", "64x64x32");
  await cache.save();
  assertEquals(cache.get("a"), "64x64x32");
});
