/** Tests of files and folders: what is not there is an answer, what cannot be asked or removed is an error. */
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import { copyFolder, exists, removeIfThere } from "../../lib/data/files.ts";
import { withFolder } from "../check.ts";

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

Deno.test("copyFolder() copies the files of a folder over what a killed process left of it", () =>
  withFolder(async (dir) => {
    for (const name of ["from", "to.partial"]) Deno.mkdirSync(`${dir}/${name}`);
    Deno.writeTextFileSync(`${dir}/from/a`, "first");
    Deno.writeTextFileSync(`${dir}/to.partial/b`, "half");
    await copyFolder(`${dir}/from`, `${dir}/to`);
    assertEquals([...Deno.readDirSync(`${dir}/to`)].map(({ name }) => name), ["a"]);
    assertEquals([...Deno.readDirSync(dir)].map(({ name }) => name).sort(), ["from", "to"]);
  }));
