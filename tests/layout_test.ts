/**
 * Tests of the house itself: who imports whom, how large it is, and that what belongs together has one name. It reads
 * sources as text and runs none of them.
 */
import { assert, assertEquals } from "@std/assert";

/**
 * Folder → the folders whose files it may import, beside npm packages. Nothing imports scripts or tests. An op knows no
 * other op; only types may be another's, and the operands that all matrix products take.
 */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  "scripts": ["lib/run", "lib/data", "lib/model", "lib/gpu", "lib/hub"],
  "lib/model": ["lib/model", "lib/ops", "lib/gpu", "lib/data"],
  "lib/ops": ["lib/gpu", "kernels", "lib/ops/matmul_operands.ts"],
  "lib/gpu": ["lib/gpu", "kernels"],
  "lib/data": ["lib/data"],
  "lib/run": ["lib/run", "lib/data"],
  "lib/hub": ["lib/hub"],
};
/** Budgets to notice growth, not goals: a house one can walk through, and files one can read at once. */
const MOST_FILES = 108;
const MOST_LINES = 400;
/** Written apart, so that this file passes its own test. */
const UNFINISHED = new RegExp(
  ["TO" + "DO", "FIX" + "ME", "X" + "XX", "\\bst" + "ub", "place" + "holder", "for " + "now\\b"].join("|"),
  "i",
);
/** What ties a file to the machine that it was written on, or to one registry. */
const OF_ONE_MACHINE = new RegExp(
  ["/wo" + "rk/", "/tm" + "p/\\w", "/ro" + "ot/", "npm" + "js\\.", "jsr" + "\\.io", "pyp" + "i\\.", "deb" + "\\.debian"]
    .join("|"),
);
const NAMES_OF_NOTHING = /\/(mod|utils?|types|common|helpers?|misc)\.ts$/;

const ROOT = new URL("..", import.meta.url);
const files = ["scripts", "lib", "kernels", "tests"].flatMap(walk).filter((path) => /\.(ts|wgsl|sh)$/.test(path))
  .sort();
const text = new Map(files.map((path) => [path, Deno.readTextFileSync(new URL(path, ROOT))]));
/** Texts beside the sources: what a reader opens and what a machine is set up by. */
const papers = ["README.md", "deno.json", "deno.lock", ".gitignore", ".ci/run", ...walk("fixtures"), ...walk("tests")]
  .filter((path) => /\.(md|py|lock)$|^deno\.json$|^\.|^fixtures\/[^/]+\.ts$/.test(path));
const sources = files.filter((path) => !path.startsWith("tests/"));

function read(path: string): string {
  return text.get(path) ?? Deno.readTextFileSync(new URL(path, ROOT));
}

function walk(folder: string): string[] {
  return [...Deno.readDirSync(new URL(folder, ROOT))].flatMap(({ name, isDirectory }) =>
    isDirectory ? walk(`${folder}/${name}`) : [`${folder}/${name}`]
  );
}

/** What a file imports, statically or not, types too: paths from the project's folder, or names of packages. */
function importsOf(path: string): string[] {
  return importsIn(path, text.get(path)!);
}

function importsIn(path: string, source: string): string[] {
  if (!path.endsWith(".ts")) return [];
  const found = source.matchAll(
    /^(?:import|export)\b[^;"'`]*?from\s+["']([^"']+)["']|^import\s+["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']/gm,
  );
  return [...found].map(([, a, b, c]) => (a ?? b ?? c)!).map((name) =>
    name.startsWith(".") ? new URL(name, new URL(path, ROOT)).href.slice(ROOT.href.length) : name
  );
}

const withoutTypes = (path: string) => text.get(path)!.replace(/^import type [^;]*;/gm, "");
const isOurs = (name: string) => /^(scripts|lib|kernels|tests|fixtures)\//.test(name);
const folderOf = (path: string) =>
  path.startsWith("lib/") ? path.split("/").slice(0, 2).join("/") : path.split("/")[0]!;

Deno.test("importsOf() sees imports of every form, so that the tests below have something to look at", () => {
  const imports = files.flatMap(importsOf);
  for (const name of ["lib/run/flags.ts", "@std/cli", "kernels/rmsnorm.wgsl", "vega", "node:crypto"]) {
    assert(imports.includes(name), name);
  }
  assert(imports.filter(isOurs).length > 200, `${imports.filter(isOurs).length} imports`);
});

Deno.test("imports go only the ways of the table", () => {
  const wrong = sources.flatMap((path) =>
    importsIn(path, folderOf(path) === "lib/ops" ? withoutTypes(path) : text.get(path)!).filter(isOurs)
      .filter((target) => ![folderOf(target), target].some((allowed) => MAY_IMPORT[folderOf(path)]?.includes(allowed)))
      .map((target) => `${path} -> ${target}`)
  );
  assertEquals(wrong, []);
});

Deno.test("every import of a file of this project names a file that is there", () => {
  const wrong = files.flatMap((path) => importsOf(path).filter(isOurs).filter((target) => !text.has(target)));
  assertEquals(wrong.filter((target) => !target.startsWith("fixtures/")), []);
});

Deno.test("packages are imported by the names of deno.json, or are Node's own modules", () => {
  const config = JSON.parse(Deno.readTextFileSync(new URL("deno.json", ROOT))) as { imports: Record<string, string> };
  const packages = files.flatMap(importsOf).filter((name) => !isOurs(name) && !/^node:|\$\{/.test(name));
  assertEquals([...new Set(packages)].filter((name) => !(name in config.imports)), []);
  const outside = sources.flatMap(importsOf).filter((name) => name === "@std/assert");
  assertEquals(outside, [], "assertions are for tests");
});

Deno.test("no file imports itself by way of others", () => {
  const state = new Map<string, "open" | "done">();
  const cycles: string[] = [];
  const visit = (path: string, way: readonly string[]) => {
    if (state.get(path) === "open") cycles.push([...way.slice(way.indexOf(path)), path].join(" -> "));
    if (state.has(path)) return;
    state.set(path, "open");
    for (const target of importsOf(path).filter((name) => text.has(name))) visit(target, [...way, path]);
    state.set(path, "done");
  };
  for (const path of files) visit(path, []);
  assertEquals(cycles, []);
});

Deno.test(`there are at most ${MOST_FILES} files in scripts, lib and kernels, and at most ${MOST_LINES} lines in any`, () => {
  const code = sources.filter((path) => !path.endsWith(".d.ts"));
  assert(
    code.length <= MOST_FILES,
    `${code.length} files: say in the same change why the house grows, or take one away`,
  );
  const long = files.map((path) => [path, text.get(path)!.trimEnd().split("\n").length] as const);
  assertEquals(long.filter(([, lines]) => lines > MOST_LINES), []);
});

Deno.test("an op, its kernel and its test share one name", () => {
  const ops = files.filter((path) => path.startsWith("lib/ops/")).map((path) => path.slice(8, -3));
  assert(ops.length >= 10);
  for (const op of ops) {
    assert(text.has(`tests/ops/${op}_test.ts`), `lib/ops/${op}.ts has no tests/ops/${op}_test.ts`);
    const bound = importsOf(`lib/ops/${op}.ts`).filter((target) => target.startsWith("kernels/"));
    const named = (target: string) => target === `kernels/${op}.wgsl` || target.startsWith(`kernels/${op}_`);
    assert(bound.some(named), `lib/ops/${op}.ts binds no kernels/${op}.wgsl`);
  }
});

Deno.test("every kernel is bound by some file, and its header says what it binds and what grid it runs on", () => {
  const bound = new Set(sources.flatMap(importsOf));
  const kernels = files.filter((path) => path.startsWith("kernels/"));
  assert(kernels.length >= 10);
  for (const path of kernels) {
    assert(bound.has(path), `nobody binds ${path}`);
    const header =
      /^(\/\/[^\n]*\n)+/.exec(text.get(path)!.replace(/^(enable|requires|diagnostic)[^\n]*\n+/gm, ""))?.[0] ?? "";
    const stem = path.slice("kernels/".length, -".wgsl".length);
    assert(header.startsWith(`// ${stem} — `), `${path} does not open with its name`);
    assert(/^\/\/ +grid /m.test(header), `the header of ${path} has no grid`);
    const named = [...text.get(path)!.matchAll(/@binding\(\d+\) var(?:<[^>]*>)? (\w+):/g)].map(([, name]) => name!);
    const missing = named.filter((name) => name !== "dims" && !new RegExp(`\\b${name}\\b`).test(header));
    assertEquals(missing, [], `the header of ${path} does not say what these bindings hold`);
  }
});

Deno.test("every TypeScript file opens by saying what it is, and every export says what it does", () => {
  const bare: string[] = [];
  for (const path of files.filter((path) => path.endsWith(".ts"))) {
    if (!text.get(path)!.startsWith("/**")) bare.push(path);
    if (path.startsWith("tests/") || path.endsWith(".d.ts")) continue;
    const lines = text.get(path)!.split("\n");
    for (const [i, line] of lines.entries()) {
      const name = /^export (?:async )?(?:abstract )?(?:function\*?|const|class|interface|type) (\w+)/.exec(line)?.[1];
      if (name !== undefined && !/\*\/$|^\/\/ deno-lint-ignore/.test(lines[i - 1] ?? "")) bare.push(`${path}: ${name}`);
    }
  }
  assertEquals(bare, []);
});

Deno.test("no file is unfinished, named after nothing, or a default export", () => {
  const found = [...files, ...papers.filter((path) => !path.endsWith(".lock"))].flatMap((path) => {
    const lines = read(path).split("\n");
    return lines.flatMap((line, i) =>
      UNFINISHED.test(line) || /^export default\b|^(export )?(const )?enum /.test(line)
        ? [`${path}:${i + 1}: ${line.trim()}`]
        : []
    );
  });
  assertEquals(found, []);
  assertEquals(files.filter((path) => NAMES_OF_NOTHING.test(path)), []);
});

Deno.test("no text names the machine that it was written on, or a registry's host", () => {
  for (const name of ["README.md", "deno.lock", ".ci/run", "fixtures/README.md"]) assert(papers.includes(name), name);
  const found = [...files, ...papers].flatMap((path) =>
    read(path).split("\n").flatMap((line, i) => OF_ONE_MACHINE.test(line) ? [`${path}:${i + 1}: ${line.trim()}`] : [])
  );
  assertEquals(found, []);
});
