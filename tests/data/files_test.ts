/** Tests of files and folders: what is not there is an answer, what cannot be asked or removed is an error. */
import { assertEquals, assertNotEquals, assertRejects, assertThrows } from "@std/assert";
import { createHash } from "node:crypto";
import {
  checkHolds,
  copyFolder,
  exists,
  filesUnder,
  removeIfThere,
  removePartial,
  sha256File,
  writeAtomic,
  writeJson,
  writeWhole,
} from "../../lib/data/files.ts";
import { temporaryFolder, withFolder } from "../check.ts";

Deno.test("exists() tells of files and folders, also below a file, and throws where nobody can tell", () =>
  withFolder((dir) => {
    Deno.writeTextFileSync(`${dir}/file`, "");
    assertEquals([dir, `${dir}/file`, `${dir}/none`, `${dir}/file/below`].map(exists), [true, true, false, false]);
    assertThrows(() => exists("a".repeat(300)));
  }));

Deno.test("removeIfThere() removes a file or a whole folder, and passes over nothing but their absence", () =>
  withFolder(async (dir) => {
    Deno.mkdirSync(`${dir}/folder/sub`, { recursive: true });
    Deno.writeTextFileSync(`${dir}/folder/sub/file`, "");
    for (let i = 0; i < 2; i++) await removeIfThere(`${dir}/folder`);
    assertEquals(exists(`${dir}/folder`), false);
    await assertRejects(() => removeIfThere("a".repeat(300)));
  }));

Deno.test("copyFolder() copies the files of a folder, in the place of another", () =>
  withFolder(async (dir) => {
    for (const name of ["from", "to"]) Deno.mkdirSync(`${dir}/${name}`);
    Deno.writeTextFileSync(`${dir}/from/a`, "first");
    Deno.writeTextFileSync(`${dir}/to/b`, "of another");
    await copyFolder(`${dir}/from`, `${dir}/to`);
    assertEquals([...Deno.readDirSync(`${dir}/to`)].map(({ name }) => name), ["a"]);
    assertEquals([...Deno.readDirSync(dir)].map(({ name }) => name).sort(), ["from", "to"]);
  }));

Deno.test("writeWhole() leaves nothing where it fails, and removePartial() what a killed process left", () =>
  withFolder(async (dir) => {
    const names = () => filesUnder(dir).map((path) => path.slice(dir.length + 1));
    Deno.mkdirSync(`${dir}/folder`);
    Deno.writeTextFileSync(`${dir}/folder/old`, "");
    let beside = "";
    const half = async (partial: string) => {
      beside = partial;
      await Deno.mkdir(partial);
      await writeAtomic(`${partial}/new`, "");
      throw new RangeError("Cannot go on: half of it is there");
    };
    await assertRejects(() => writeWhole(`${dir}/folder`, half), RangeError, "half of it");
    assertEquals(names(), ["folder/old"]);
    Deno.mkdirSync(`${beside}/sub`, { recursive: true });
    Deno.writeTextFileSync(`${beside}/sub/new`, "");
    Deno.writeTextFileSync(`${dir}/folder/a.json.1.partial`, "");
    removePartial(dir);
    assertEquals(names(), ["folder/old"]);
  }));

Deno.test("filesUnder() follows links, but not in a circle, and says which leads nowhere", () =>
  withFolder((dir) => {
    for (const path of ["a/b", "c/out"]) Deno.mkdirSync(`${dir}/${path}`, { recursive: true });
    for (const path of ["a/1", "a/b/2", "c/3", "c/out/4", "c/skip"]) Deno.writeTextFileSync(`${dir}/${path}`, "");
    Deno.symlinkSync("..", `${dir}/a/b/up`);
    Deno.symlinkSync(".", `${dir}/a/b/here`);
    Deno.symlinkSync("../c", `${dir}/a/c`);
    const found = filesUnder(`${dir}/a`, { skip: ["skip"], except: `${dir}/c/../c/out` });
    assertEquals(found.map((path) => path.slice(dir.length + 1)), ["a/1", "a/b/2", "a/c/3"]);
    Deno.symlinkSync("none", `${dir}/a/link`);
    assertThrows(() => filesUnder(`${dir}/a`), Error, `Cannot read "${dir}/a/link": it is a link to nothing`);
    Deno.removeSync(`${dir}/a/link`);
    Deno.symlinkSync("link", `${dir}/a/link`);
    assertThrows(() => filesUnder(`${dir}/a`), Error, `Cannot read "${dir}/a/link": it is a link to nothing`);
    return Promise.resolve();
  }));

Deno.test("checkHolds() says what is wanted of a folder, and what makes one", () =>
  withFolder((dir) => {
    const check = (path: string) => checkHolds(path, { name: "a.json", wanted: "a thing", run: "deno task 00" });
    const rest = 'a thing is wanted: run "deno task 00" first';
    assertThrows(() => check(dir), Error, `Cannot read "${dir}": it has no a.json: ${rest}`);
    assertThrows(() => check(`${dir}/none`), Error, `Cannot read "${dir}/none": no such folder: ${rest}`);
    Deno.writeTextFileSync(`${dir}/a.json`, "");
    check(dir);
    return Promise.resolve();
  }));

Deno.test("writeAtomic() replaces a file as a whole and leaves nothing beside it when it fails", () =>
  withFolder(async (dir) => {
    await writeJson(`${dir}/a.json`, { b: [1, "ü"] });
    assertEquals(Deno.readTextFileSync(`${dir}/a.json`), '{\n  "b": [\n    1,\n    "ü"\n  ]\n}\n');
    const inode = Deno.statSync(`${dir}/a.json`).ino;
    await writeAtomic(`${dir}/a.json`, new Uint8Array([1, 2, 3]));
    assertEquals(Deno.readFileSync(`${dir}/a.json`), new Uint8Array([1, 2, 3]));
    assertNotEquals(Deno.statSync(`${dir}/a.json`).ino, inode);
    Deno.mkdirSync(`${dir}/folder/full`, { recursive: true });
    await assertRejects(() => writeAtomic(`${dir}/folder`, "a file cannot take the place of a folder"));
    assertEquals([...Deno.readDirSync(dir)].map(({ name }) => name).sort(), ["a.json", "folder"]);
  }));

Deno.test("sha256File() agrees with a hash of the whole, for sizes around its pieces", () => {
  using folder = temporaryFolder();
  const path = folder.at("file");
  for (const size of [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000]) {
    const bytes = Uint8Array.from({ length: size }, (_, i) => (i * 31 + size) & 255);
    Deno.writeFileSync(path, bytes);
    assertEquals(sha256File(path), createHash("sha256").update(bytes).digest("hex"));
  }
});
