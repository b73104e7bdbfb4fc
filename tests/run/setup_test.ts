/**
 * Tests of scripts/setup.sh and .ci/run on machines that lack something: a folder of stand-ins for npm, apt-get, deno,
 * sudo and id is all that is on PATH. They note their calls and install by writing a file; nothing real is installed.
 */
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { fileURLToPath } from "node:url";
import { temporaryFolder } from "../check.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const TOOLS = ["sh", "dirname", "head", "cat", "cp", "mkdir", "chmod", "touch", "uname"];

/** What the machine has; `prefix` is npm's global folder, relative to the machine's own. */
interface Machine {
  readonly deno?: string;
  readonly npm?: "works" | "fails";
  readonly prefix?: string;
  /** A GPU or a CPU driver through Vulkan, or only through OpenGL. */
  readonly adapter?: boolean | "opengl";
  readonly apt?: "works" | "fails" | "helps not";
  /** sudo asks for a password, or it does not. */
  readonly sudo?: "asks" | "works";
  readonly root?: boolean;
  readonly path?: readonly string[];
}

const DENO = (version: string, dir: string) =>
  `#!/bin/sh
[ -n "${version}" ] || exit 127
case "$1" in
  --version) echo "deno ${version} (stable, release, test)" ;;
  eval)
    if [ -e "${dir}/adapter" ]; then echo "a test adapter"
    elif [ -e "${dir}/opengl" ] && [ "$DENO_WEBGPU_BACKEND" != vulkan ]; then echo "an OpenGL adapter"
    fi ;;
  install) echo "deno install" >> "${dir}/calls"; [ ! -e "${dir}/offline" ] ;;
  task) echo "deno $* (REQUIRE_GPU=$REQUIRE_GPU)" >> "${dir}/calls" ;;
esac
`;
const NPM = (dir: string, { npm, prefix = "usr" }: Machine) =>
  `#!/bin/sh
if [ "$1" = prefix ]; then echo "${dir}/${prefix}"; exit; fi
echo "npm $*" >> "${dir}/calls"
[ ${npm} = works ] || { echo "npm error code E500" >&2; exit 1; }
echo "npm notice a new version of npm is there" >&2
to="${dir}/${prefix}"
while [ $# -gt 0 ]; do [ "$1" != --prefix ] || to="$2"; shift; done
mkdir -p "$to/bin"
cp "${dir}/deno" "$to/bin/deno"
`;
const APT = (dir: string, { apt }: Machine) =>
  `#!/bin/sh
echo "apt-get $*" >> "${dir}/calls"
[ "${apt}" != fails ] || exit 100
[ "$1" = install ] || exit 100 # a source that is out of reach
[ "${apt}" != works ] || touch "${dir}/adapter"
`;
const SUDO = (dir: string, { sudo }: Machine) =>
  `#!/bin/sh
[ ${sudo} = works ] || { echo "sudo: a password is required" >&2; exit 1; }
[ "$1" = -n ] && exit
echo "sudo $1" >> "${dir}/calls"
"$@"
`;

/** Makes the machine, and runs setup.sh there as often as asked. */
async function onMachine(
  machine: Machine,
  body: (
    setup: (line?: string) => Promise<{ code: number; out: string; err: string; calls: string[] }>,
    dir: string,
  ) => Promise<void>,
): Promise<void> {
  using temporary = temporaryFolder();
  const dir = temporary.path;
  const write = (name: string, text: string) => Deno.writeTextFileSync(`${dir}/${name}`, text, { mode: 0o755 });
  for (const folder of ["bin", "usr/bin", "home"]) Deno.mkdirSync(`${dir}/${folder}`, { recursive: true });
  for (const folder of machine.path ?? []) Deno.mkdirSync(`${dir}/${folder}`, { recursive: true });
  for (const tool of TOOLS) {
    const found = ["/usr/bin", "/bin"].map((folder) => `${folder}/${tool}`).find((path) => isFile(path));
    Deno.symlinkSync(found!, `${dir}/bin/${tool}`);
  }
  write("calls", "");
  write("deno", DENO("2.9.6", dir));
  write("bin/id", `#!/bin/sh\necho ${machine.root ? 0 : 1000}\n`);
  if (machine.deno !== undefined) write("bin/deno", DENO(machine.deno, dir));
  if (machine.npm !== undefined) write("bin/npm", NPM(dir, machine));
  if (machine.apt !== undefined) write("bin/apt-get", APT(dir, machine));
  if (machine.sudo !== undefined) write("bin/sudo", SUDO(dir, machine));
  if (machine.adapter) write(machine.adapter === "opengl" ? "opengl" : "adapter", "");
  const setup = async (line = "sh scripts/setup.sh") => {
    Deno.writeTextFileSync(`${dir}/calls`, "");
    const path = ["bin", "usr/bin", ...(machine.path ?? [])].map((folder) => `${dir}/${folder}`).join(":");
    const { code, stdout, stderr } = await new Deno.Command(`${dir}/bin/sh`, {
      args: ["-c", line],
      cwd: ROOT,
      clearEnv: true,
      env: { PATH: path, HOME: `${dir}/home` },
    }).output();
    const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes).replaceAll(dir, "@"));
    const calls = Deno.readTextFileSync(`${dir}/calls`).replaceAll(dir, "@").split("\n").filter((line) => line !== "");
    return { code, out: out!, err: err!, calls };
  };
  await body(setup, dir);
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

const INSTALL = "npm install -g --no-fund --no-audit --ignore-scripts=false --allow-scripts=deno";
const MESA = "apt-get update; apt-get install -y mesa-vulkan-drivers libvulkan1";

Deno.test("setup.sh installs nothing where Deno and an adapter are there", () =>
  onMachine({ deno: "2.9.6", adapter: true, npm: "works", apt: "works" }, async (setup) => {
    const { code, out, err, calls } = await setup();
    assertEquals([code, err, calls], [0, "", ["deno install"]]);
    assertStringIncludes(out, "Deno is there: deno 2.9.6");
    assertStringIncludes(out, "WebGPU adapter: a test adapter");
    assertMatch(out, /ready\n$/);
  }));

Deno.test("setup.sh installs Deno into npm's global folder and Mesa as root, and the second run does neither", () =>
  onMachine({ npm: "works", apt: "works", root: true }, async (setup, dir) => {
    const first = await setup();
    assertEquals([first.code, first.err], [0, ""]);
    assertEquals(first.calls, [
      `${INSTALL} deno@2.9.6`,
      "apt-get update",
      "apt-get install -y mesa-vulkan-drivers libvulkan1",
      "deno install",
    ]);
    assertEquals(isFile(`${dir}/usr/bin/deno`), true);
    assertEquals((await setup()).calls, ["deno install"]);
  }));

Deno.test("setup.sh installs Mesa's Vulkan where there is only OpenGL", () =>
  onMachine({ deno: "2.9.6", adapter: "opengl", apt: "works", root: true }, async (setup) => {
    const { code, out, err, calls } = await setup();
    assertEquals([code, err], [0, ""]);
    assertEquals(calls, ["apt-get update", "apt-get install -y mesa-vulkan-drivers libvulkan1", "deno install"]);
    assertStringIncludes(out, "WebGPU adapter: a test adapter");
  }));

Deno.test("setup.sh goes through sudo where it asks for no password", () =>
  onMachine(
    { npm: "works", prefix: "missing", apt: "works", sudo: "works", path: ["missing/bin"] },
    async (setup, dir) => {
      Deno.removeSync(`${dir}/missing`, { recursive: true });
      const { code, err, calls } = await setup("sh scripts/setup.sh && deno task train");
      assertEquals([code, err], [0, ""]);
      assertEquals(calls.filter((call) => call.startsWith("sudo")), ["sudo true", "sudo npm", "sudo true", "sudo sh"]);
      assertEquals(calls.at(-1), "deno task train (REQUIRE_GPU=)");
    },
  ));

Deno.test("setup.sh without root puts Deno into a folder of the user's own that is on PATH", () =>
  onMachine({ npm: "works", prefix: "missing", adapter: true, path: ["home/.local/bin"] }, async (setup) => {
    const { code, err, calls } = await setup();
    assertEquals([code, err], [0, ""]);
    assertEquals(calls[0], `npm --prefix @/home/.local ${INSTALL.slice(4)} deno@2.9.6`);
  }));

Deno.test("setup.sh says which PATH is wanted when Deno could only go where the shell does not look", () =>
  onMachine({ npm: "works", prefix: "missing", adapter: true, sudo: "asks" }, async (setup, dir) => {
    const message = /^Cannot set up: [^\n]*"export PATH=@\/home\/\.local\/bin:\$PATH"[^\n]*\n$/;
    const first = await setup("sh scripts/setup.sh && deno task train");
    assertEquals([first.code, first.calls.length], [1, 2]);
    assertMatch(first.err, message);
    const second = await setup();
    assertEquals([second.code, second.calls], [1, ["deno install"]], "nothing is installed twice");
    assertMatch(second.err, message);
    const third = await setup(`export PATH=${dir}/home/.local/bin:$PATH; sh scripts/setup.sh && deno task train`);
    assertEquals([third.code, third.err, third.calls.at(-1)], [0, "", "deno task train (REQUIRE_GPU=)"]);
  }));

Deno.test("setup.sh goes on where the packages cannot be fetched now", () =>
  onMachine({ deno: "2.9.6", adapter: true }, async (setup, dir) => {
    Deno.writeTextFileSync(`${dir}/offline`, "");
    const { code, out, err } = await setup();
    assertEquals([code, err], [0, ""]);
    assertStringIncludes(out, "packages could not be cached now");
  }));

Deno.test(".ci/run sets up and tests with the GPU required, and tests nothing where the set-up fails", async () => {
  const test = "deno task test (REQUIRE_GPU=1)";
  await onMachine({ npm: "works", apt: "works", root: true }, async (setup) => {
    const { code, err, calls } = await setup("sh .ci/run");
    assertEquals([code, err, calls.at(-1)], [0, "", test]);
  });
  await onMachine({ npm: "works", prefix: "missing", adapter: true }, async (setup) => {
    const { code, err, calls } = await setup("sh .ci/run");
    assertEquals([code, err, calls.at(-1)], [0, "", test], "although Deno is where the caller does not look");
  });
  await onMachine({ deno: "2.9.6", adapter: true }, async (setup) => {
    const { code, calls } = await setup("sh .ci/run");
    assertEquals([code, calls.at(-1)], [0, test], "although there is no npm");
  });
  await onMachine({ deno: "2.9.6", apt: "fails", root: true }, async (setup) => {
    const { code, calls } = await setup("sh .ci/run");
    assert(code === 1 && !calls.includes(test));
  });
});

Deno.test("setup.sh ends with one line where it has no means to go on", async (t) => {
  const cases: readonly (readonly [string, Machine, RegExp])[] = [
    ["no Deno and no npm", {}, /neither Deno nor npm: install Node\.js 20.*"sh scripts\/setup\.sh"/],
    ["npm fails", { npm: "fails", root: true }, /: run "npm install -g deno@2\.9\.6"/],
    [
      "npm fails for a user",
      { npm: "fails", prefix: "missing" },
      /: run "npm --prefix @\/home\/\.local install -g deno@2\.9\.6"/,
    ],
    ["a Deno that does not run", { deno: "", adapter: true }, /does not run: run "npm install -g deno@2\.9\.6"/],
    ["an old Deno", { deno: "2.8.3", adapter: true }, /Deno 2\.8\.3 is too old.*"deno upgrade 2\.9\.6"/],
    ["a Deno of the first generation", { deno: "1.46.3", adapter: true }, /Deno 1\.46\.3 is too old/],
    ["no adapter and no root", { deno: "2.9.6", apt: "works", sudo: "asks" }, new RegExp(`"sudo sh -c '${MESA}'"`)],
    ["no adapter and no apt-get", { deno: "2.9.6", root: true }, /install a Vulkan driver/],
    ["apt-get fails", { deno: "2.9.6", apt: "fails", root: true }, new RegExp(`run "sh -c '${MESA}'" to see why`)],
    ["apt-get fails by sudo", { deno: "2.9.6", apt: "fails", sudo: "works" }, new RegExp(`run "sudo sh -c '${MESA}'"`)],
    ["Mesa is no help", { deno: "2.9.6", apt: "helps not", root: true }, /still no Vulkan adapter: run "vulkaninfo/],
  ];
  for (const [name, machine, message] of cases) {
    await t.step(name, () =>
      onMachine(machine, async (setup) => {
        const { code, err, calls } = await setup();
        assertEquals(code, 1);
        assertMatch(err, /^Cannot set up: [^\n]+[^.\n]\n$/);
        assertMatch(err, message);
        assertEquals(calls.includes("deno install"), false);
      }));
  }
});

Deno.test("setup.sh takes a newer Deno as it is", () =>
  onMachine({ deno: "3.0.0", adapter: true }, async (setup) => assertEquals((await setup()).code, 0)));
