/** What 01 refuses: each mistake is one line on stderr, status 1, and nothing that the next stage would take for a result. */
import { assert, assertEquals } from "@std/assert";
import { sha256File } from "../../lib/data/files.ts";
import { NO_GPU } from "../on_gpu.ts";
import { assertNothingPartial, assertRefused, attempt, command, inFolder, ROOT, stage, walk } from "./process.ts";

Deno.test("01 refuses a checkpoint that is missing, cut off, foreign or contradicts its settings", () =>
  inFolder(async (dir) => {
    const refused = async (line: string, message: RegExp) => {
      assertRefused(await attempt(dir, "01_convert", line), message);
      const left = walk(dir).filter((path) => /artifacts\/.*(manifest\.json|\.partial)$/.test(path));
      assert(left.length === 0, left.join(", "));
    };
    await refused("--source nowhere", /^Cannot read "nowhere": no such file or folder$/m);
    await refused("--source qa", /^Cannot read "qa": it holds no checkpoint/);
    Deno.mkdirSync(`${dir}/round/sub`, { recursive: true });
    for (const name of ["one", "two"]) Deno.symlinkSync("..", `${dir}/round/sub/${name}`);
    await refused("--source round", /^Cannot read "round": it holds no checkpoint .*: name one checkpoint file$/m);
    Deno.symlinkSync("itself", `${dir}/round/itself`);
    await refused("--source round", /^Cannot read "round\/itself": it is a link to nothing: remove it, or mend it$/m);
    await refused("--source tiny --sauce qa", /^Cannot read flag "--sauce": this script has --source --rope /);
    await refused("--source tiny --dtype float8", /"float8" is not one of float32, float16, bfloat16$/m);
    await refused("--source", /^Cannot read flag "--source": a value must follow it$/m);
    await refused("tiny", /^Cannot read "tiny": this script takes no words without a flag$/m);
    await refused("--source tiny --set theta", /^Cannot read flag "--set": "theta" is not of the form name=value$/m);
    await refused(
      "--source tiny --set d_model=7",
      /^Cannot convert ".*": its settings say d_model 128 and d_model 7$/m,
    );

    await refused(
      "--source tiny --set rope_thta=5",
      /^Cannot read flag "--set": there is no setting "rope_thta": those of a /m,
    );
    await refused("--source tiny --out=", /^Cannot read flag "--out": "" is not a folder's name$/m);

    Deno.mkdirSync(`${dir}/cut`);
    Deno.copyFileSync(`${ROOT}fixtures/tiny/config.json`, `${dir}/cut/config.json`);
    const whole = Deno.readFileSync(`${ROOT}fixtures/tiny/model.safetensors`);
    Deno.writeFileSync(`${dir}/cut/model.safetensors`, whole.subarray(0, 100_000));
    const ends =
      /^Cannot read "cut\/model.safetensors": its tensors end at byte \d+ but the file ends at byte 100000$/m;
    await refused("--source cut", ends);
    Deno.writeTextFileSync(`${dir}/cut/model.safetensors`, "not a checkpoint");
    await refused("--source cut", /^Cannot read "cut\/model.safetensors": /);
  }));

Deno.test("01 keeps the earlier result where a weight turns out to be bad, and where it would read what it writes", {
  ignore: NO_GPU,
}, () =>
  inFolder(async (dir) => {
    const out = `${dir}/artifacts/01_convert`;
    await stage(dir, "01_convert", "--source tiny");
    const files = () => walk(out).sort().map((path) => [path, sha256File(path)]);
    const before = files();
    Deno.mkdirSync(`${dir}/bad`);
    Deno.copyFileSync(`${ROOT}fixtures/tiny/config.json`, `${dir}/bad/config.json`);
    const bytes = Deno.readFileSync(`${ROOT}fixtures/tiny/model.safetensors`);
    bytes.fill(0xff, bytes.length - 4); // a NaN, in float32 as in 16 bit
    Deno.writeFileSync(`${dir}/bad/model.safetensors`, bytes);
    assertRefused(await attempt(dir, "01_convert", "--source bad"), /NaN/);
    assertEquals(files(), before);
    const own = await attempt(dir, "01_convert", "--source artifacts/01_convert --dtype bfloat16");
    assertRefused(own, /^Cannot read "artifacts\/01_convert" and write "artifacts\/01_convert": .*--out$/m);
    assertEquals(files(), before);
  }));

Deno.test("01 refuses to write where it cannot, or where something else lies", () =>
  inFolder(async (dir) => {
    // Folders without permission are no obstacle to root, so a file stands in the way here.
    Deno.writeTextFileSync(`${dir}/file`, "mine");
    const under = await attempt(dir, "01_convert", "--source tiny --out file/out");
    assertRefused(under, /^Cannot go on: not a directory \(os error 20\): mkdir 'file\/out'$/m);
    const foreign = await attempt(dir, "01_convert", "--source tiny --out qa");
    assertRefused(
      foreign,
      /^Cannot write "qa": it has files that 01_convert did not make \(".*\.jsonl"\): name another/,
    );
  }));

Deno.test("01 tells of a disk that is full in one line, and leaves no half file", {
  ignore: Deno.build.os === "windows",
}, () =>
  inFolder(async (dir) => {
    // A limit on the size of files stands for the full disk: the system refuses the write in the same way.
    const limited = command(dir, "01_convert", "--source tiny", { limit: 1000 });
    const { code, stdout, stderr } = await limited.output();
    const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
    assertRefused({ code, out: out!, err: err! }, /^Cannot go on: file too large \(os error 27\)$/m);
    assertNothingPartial(dir);
    assert(!walk(dir).some((path) => path.endsWith("/manifest.json")));
  }));
