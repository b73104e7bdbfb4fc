/** The golden files that are not stored: every one can be made again, or is met by digest where the writer itself is tested. */
import { assertEquals } from "@std/assert";
import { readJson, rebuilt } from "./rebuild.ts";

Deno.test("golden files that are not stored are made again, byte for byte", async () => {
  const taken: Record<string, { rebuilt?: true }> = readJson("taken.json");
  const models = Object.keys(taken).filter((path) => taken[path]!.rebuilt).map((path) => path.replace(/\/[^/]*$/, ""));
  const adapters = Object.keys(readJson("initial_adapters.json"));
  assertEquals([models.length, adapters.length], [4, 4]);
  for (const path of [...models, ...adapters]) await rebuilt(path);
});
