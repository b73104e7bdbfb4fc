/** Tests of what later stages are told of 02, 05 and 07: by manifests and digests, never by what a folder is called alone. */
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import { sha256File, writeJson } from "../../lib/data/files.ts";
import { checkNotMerged, isMergeOf, readLoad, type Trained, trainedAt, trainedBy } from "../../lib/run/trained.ts";
import { withFolder } from "../check.ts";

const rest = { flags: {}, seconds: 1, device: null, reads: [], writes: [], numbers: {} };

Deno.test("readLoad() gives mode and base, and refuses a folder that stage 02 did not make", () =>
  withFolder(async (dir) => {
    assertThrows(
      () => readLoad(dir),
      Error,
      `Cannot read "${dir}": it has no load.json: a loaded model is wanted: run`,
    );
    const load = async (value: unknown) => {
      await writeJson(`${dir}/load.json`, value);
      return readLoad(dir);
    };
    assertEquals(await load({ mode: "lora", base: "b", other: 1 }), { mode: "lora", base: "b" });
    for (const wrong of [{ mode: "4bit", base: "b" }, { mode: "full" }, {}]) {
      await assertRejects(() => load(wrong), Error, `Cannot read "${dir}/load.json": its mode is `);
    }
  }));

Deno.test("trainedBy() and trainedAt() go by the manifest of stage 05, and by that of no other", () =>
  withFolder(async (dir) => {
    const adapter = `${dir}/adapter`, model = `${dir}/model`;
    for (const path of [adapter, model]) Deno.mkdirSync(path);
    const run = (script: string, mode: string) =>
      writeJson(`${dir}/manifest.json`, { ...rest, script, numbers: { mode } });
    const all = () => [trainedBy(dir), trainedAt(adapter), trainedAt(model), trainedAt(`${dir}/none`)];
    const named = (path: string): Trained => ({ kind: "adapter", path });
    assertEquals(all(), [undefined, named(adapter), named(model), named(`${dir}/none`)]);
    await run("02_load", "full");
    assertEquals(trainedBy(dir), undefined);
    await run("05_train", "qlora");
    assertEquals(all(), [named(adapter), named(adapter), named(model), named(`${dir}/none`)]);
    await run("05_train", "full");
    const whole: Trained = { kind: "model", path: model };
    assertEquals(all(), [whole, named(adapter), whole, whole]); // an adapter that lies there is one
  }));

Deno.test("isMergeOf() knows the adapter by its bytes, wherever it lies", () =>
  withFolder(async (dir) => {
    const names = ["adapter_config.json", "adapter_model.safetensors"];
    for (const folder of ["one", "other", "merge/merged_model"]) {
      Deno.mkdirSync(`${dir}/${folder}`, { recursive: true });
      for (const name of names) Deno.writeTextFileSync(`${dir}/${folder}/${name}`, folder === "other" ? "b" : "a");
    }
    const model = `${dir}/merge/merged_model`;
    assertEquals(isMergeOf(model, `${dir}/one`), false);
    const reads = names.map((name) => ({
      path: `away/${name}`,
      bytes: 1,
      sha256: sha256File(`${dir}/one/${name}`),
      mtime: 0,
    }));
    await writeJson(`${dir}/merge/manifest.json`, { ...rest, script: "07_merge", reads });
    assertEquals(["one", "other", "none"].map((name) => isMergeOf(model, `${dir}/${name}`)), [true, false, false]);
    checkNotMerged(model, `${dir}/other`);
    assertThrows(
      () => checkNotMerged(model, `${dir}/one`),
      Error,
      "leave --adapter out, or name the base with --model",
    );
  }));
