/** Tests of words and numbers for people; what a terminal shows is read from a terminal that `script` makes. */
import { assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { bytes, count, duration, percent, table } from "../../lib/run/print.ts";
import { temporaryFolder } from "../check.ts";
import { command, ended, ROOT } from "../scripts/process.ts";

const PRINT = new URL("../../lib/run/print.ts", import.meta.url).href;
const FLAGS = new URL("../../lib/run/flags.ts", import.meta.url).href;

Deno.test("table() aligns words to the left and numbers to the right, and underlines a header", () => {
  const rows = [["module", "elements", "share"], ["q_proj", 25_165_824, "7.63 %"], ["norm", 1024, "0.00 %"]];
  assertEquals(
    table(rows, { header: true }),
    [
      "module    elements   share",
      "------  ----------  ------",
      "q_proj  25,165,824  7.63 %",
      "norm         1,024  0.00 %",
    ].join("\n"),
  );
});

Deno.test("table() keeps a column of words and numbers to the left unless it is told otherwise", () => {
  assertEquals(table([["a", "12"], ["b", "none"]]), "a  12\nb  none");
  assertEquals(table([["a", "12"], ["b", "none"]], { align: "rr" }), "a    12\nb  none");
  assertEquals(table([[1, 2], [10, 20]], { align: "l" }), "1    2\n10  20");
});

Deno.test("table() takes rows of unequal length, empty cells, letters of two halves and ANSI codes", () => {
  assertEquals(table([]), "");
  assertEquals(table([["a"], ["b", 1, "c"]]), "a\nb  1  c");
  assertEquals(table([["x", ""], ["y", 5], ["z", 10]]), "x\ny   5\nz  10");
  assertEquals(table([["𝜎", "|"], ["ab", "|"]]), "𝜎   |\nab  |");
  assertEquals(table([["\x1b[2mab\x1b[0m", "|"], ["abc", "|"]]), "\x1b[2mab\x1b[0m   |\nabc  |");
});

Deno.test("table() writes numbers with as many digits as say something", () => {
  const line = (n: number) => table([[n]]);
  const shown = [0, -7, 0.5, 1.23456789, 12345.678, 1e-7, 0.000196, -0.25, NaN].map(line);
  assertEquals(shown, ["0", "-7", "0.5", "1.235", "12,346", "1.00e-7", "1.96e-4", "-0.25", "NaN"]);
});

Deno.test("bytes() has three digits in decimal units, also where rounding reaches the next unit", () => {
  const shown = [0, 512, 999, 1000, 9994, 9996, 14_204_928, 659_820_544, 999_499_999, 999_500_000, 1.32e9, 5e15];
  assertEquals(shown.map(bytes), [
    ...["0 B", "512 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "14.2 MB", "660 MB", "999 MB", "1.00 GB", "1.32 GB"],
    "5000 TB",
  ]);
});

Deno.test("duration() has the two units that matter, also where rounding reaches the next unit", () => {
  const shown = [0, 3.14, 812.4, 999.4, 999.6, 12_345, 59_940, 59_960, 125_000, 3_599_400, 3_599_600, 3_720_000, 1e8];
  assertEquals(shown.map(duration), [
    ...["0.0 ms", "3.1 ms", "812 ms", "999 ms", "1.0 s", "12.3 s", "59.9 s", "1 min 00 s", "2 min 05 s", "59 min 59 s"],
    ...["1 h 00 min", "1 h 02 min", "27 h 47 min"],
  ]);
});

Deno.test("count() and percent() write the blog's numbers", () => {
  assertEquals(count(329_910_272), "329,910,272");
  assertEquals(percent(7_102_464 / 197_814_272), "3.59 %");
  assertEquals(percent(7_102_464 / 337_012_736), "2.11 %");
});

/** Runs code that prints, with `print.ts` imported as `p`. */
async function run(
  code: string,
  options: { terminal: boolean; env?: Record<string, string>; status?: number },
): Promise<[string, string]> {
  using folder = temporaryFolder({ "print.ts": `import * as p from "${PRINT}";\n${code}` });
  const env = { NO_COLOR: "", ...options.env };
  const args = ["run", "-A", "--quiet", "--config", `${ROOT}deno.json`, folder.at("print.ts")];
  const line = [Deno.execPath(), ...args].map((word) => `'${word}'`).join(" ");
  const { code: status, out, err } = await ended(
    options.terminal
      ? new Deno.Command("script", { args: ["-qec", line, "/dev/null"], env })
      : command(folder.path, "print.ts", "", { env }),
  );
  assertEquals(status, options.status ?? 0, out + err);
  return [out, err];
}

const noTerminal = await new Deno.Command("sh", { args: ["-c", "command -v script"], stdout: "null" }).output()
  .then(({ success }) => !success);
const DRAW = `
const bar = p.progress("reading", 40);
for (let i = 1; i <= 40; i++) { bar.tick(i, "layer " + i); await new Promise((done) => setTimeout(done, 15)); }
bar.end();
console.log(p.dim("dim"));`;

Deno.test({
  name: "on a terminal progress() draws a bar with rate and time left, and text can be faint",
  ignore: noTerminal,
  async fn() {
    const [out] = await run(DRAW, { terminal: true });
    assertMatch(out, /reading █+░+ \d+\/40 [\d.]+\/s \| [\d.]+ (ms|s) left \| layer \d+/);
    assertMatch(out, /reading █{24} 40\/40 [\d.]+\/s \| layer 40/);
    assertStringIncludes(out, "\x1b[2mdim\x1b[0m");
    const [plain] = await run(DRAW, { terminal: true, env: { NO_COLOR: "1" } });
    assertMatch(plain, /\ndim\r?\n/);
  },
});

/** What a program switched off on the terminal and left so: the cursor, the wrapping of lines. */
const left = (out: string) =>
  ["\x1b[?25", "\x1b[?7"].filter((what) => out.lastIndexOf(`${what}l`) > out.lastIndexOf(`${what}h`));
const BREAK = {
  "an error": 'throw new Error("Cannot go on: so");',
  "a rejection": 'await Promise.reject(new Error("Cannot go on: so"));',
  "an exit": "Deno.exit(1);",
  "a kill": 'Deno.kill(Deno.pid, "SIGTERM"); await new Promise(() => {});',
};

Deno.test({
  name:
    "a bar that is on the screen when work breaks off leaves a terminal with a cursor, and the error on a line of its own",
  ignore: noTerminal,
  async fn() {
    for (const [how, code] of Object.entries(BREAK)) {
      const bars = `p.progress("reading", 40).tick(3); p.progress("more", 4).tick(1);
await new Promise((done) => setTimeout(done, 150));`;
      const setUp = `import { installErrorHandler } from "${FLAGS}"; installErrorHandler();`;
      const [out] = await run(`${setUp}\n${bars}\n${code}`, { terminal: true, status: how === "a kill" ? 143 : 1 });
      assertMatch(out, /more █+░+ 1\/4/, how);
      assertEquals(left(out), [], how);
      if (how === "an error" || how === "a rejection") assertMatch(out, /\r?\nCannot go on: so\r?\n$/, how);
    }
  },
});

Deno.test("off a terminal progress() is silent for ten seconds, on stderr, and text has no ANSI codes", async () => {
  const clock = `let now = 0; performance.now = () => now;
const bar = p.progress("reading", 4000);
for (let i = 1; i <= 30; i++) { now += 1000; bar.tick(100 * i, "layer " + i); }
bar.end();
console.log(p.dim("dim"));`;
  const [out, err] = await run(clock, { terminal: false });
  assertEquals(out, "dim\n");
  assertEquals(
    err,
    [
      "reading 1,000/4,000 | 100/s | 30.0 s left | layer 10\n",
      "reading 2,000/4,000 | 100/s | 20.0 s left | layer 20\n",
      "reading 3,000/4,000 | 100/s | 10.0 s left | layer 30\n",
    ].join(""),
  );
});
