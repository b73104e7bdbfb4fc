/**
 * Words and numbers for people: aligned tables, sizes, times, progress. It decides no layout of a stage's report and
 * writes no colour where nobody looks (stdout is not a terminal, or NO_COLOR is set).
 */
import { SingleBar } from "cli-progress";

/** A running task: `tick(done)` as often as one likes, `end()` once. */
export interface Progress {
  tick(done: number, extra?: string): void;
  end(): void;
}

/** How {@link table} is drawn: `header` underlines the first row, `align` has one letter per column ("l" or "r"). */
export interface TableOptions {
  readonly header?: boolean;
  readonly align?: string;
}

/** The bars on the screen. */
const shown = new Set<SingleBar>();
/** Off a terminal a line of progress comes at most this often, in ms. */
const QUIET_MS = 10_000;
const UNITS = ["B", "kB", "MB", "GB", "TB"];
const ANSI = new RegExp(String.fromCharCode(27) + "\\[[0-9;]*m", "g");

/** Rows as aligned text without a last newline: columns of numbers to the right, all else to the left. */
export function table(rows: readonly (readonly (string | number)[])[], options: TableOptions = {}): string {
  const texts = rows.map((row) => row.map((cell) => typeof cell === "number" ? number(cell) : cell));
  const columns = Math.max(0, ...texts.map((row) => row.length));
  const body = options.header === true ? texts.slice(1) : texts;
  const layout = Array.from({ length: columns }, (_, column) => ({
    width: Math.max(0, ...texts.map((row) => visible(row[column] ?? ""))),
    right: options.align?.[column] === "r" ||
      (options.align?.[column] === undefined && body.some((row) => looksNumeric(row[column])) &&
        body.every((row) => (row[column] ?? "") === "" || looksNumeric(row[column]))),
  }));
  const line = (row: readonly string[]) =>
    layout.map(({ width, right }, column) => {
      const text = row[column] ?? "";
      const fill = " ".repeat(width - visible(text));
      return right ? fill + text : text + fill;
    }).join("  ").trimEnd();
  const lines = texts.map(line);
  if (options.header === true) lines.splice(1, 0, layout.map(({ width }) => "-".repeat(width)).join("  "));
  return lines.join("\n");
}

/** A size in decimal units with three digits: `14.2 MB`, `512 B`. */
export function bytes(n: number): string {
  let [value, unit] = [n, 0];
  // 999.5 would round to 1000: the next unit is due from there on
  while (Math.abs(value) >= 999.5 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit === 0 ? value : value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${UNITS[unit]}`;
}

/** A time given in ms, in the two units that matter: `812 ms`, `12.3 s`, `2 min 05 s`, `1 h 02 min`. */
export function duration(ms: number): string {
  if (ms < 999.5) return `${ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  if (ms < 59_950) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  const two = (n: number) => String(n).padStart(2, "0");
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${two(seconds % 60)} s`;
  const minutes = Math.round(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
}

/** A whole number with its thousands: `329,910,272`. */
export function count(n: number): string {
  return Math.round(n).toLocaleString("en-US");
}

/** A share as a percentage with two decimals: 0.0359 is `3.59 %`. */
export function percent(x: number): string {
  return `${(100 * x).toFixed(2)} %`;
}

/** Faint text on a terminal. */
export function dim(text: string): string {
  return Deno.stdout.isTerminal() && !Deno.noColor ? `\x1b[2m${text}\x1b[0m` : text;
}

/** Text of a file or a model for a terminal, which would obey the control characters in it; as it is for a pipe. */
export function printable(text: string): string {
  // deno-lint-ignore no-control-regex -- they are what is looked for
  return Deno.stdout.isTerminal() ? text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "\ufffd") : text;
}

/** Bars of files that arrive in their time, for the `onProgress` of a download: one for each path. */
export function fileBars(): (file: { readonly path: string; readonly done: number; readonly total: number }) => void {
  const bars = new Map<string, Progress>();
  return ({ path, done, total }) => {
    if (!bars.has(path)) bars.set(path, progress(path, total));
    bars.get(path)!.tick(done);
    if (done === total) bars.get(path)!.end();
  };
}

/**
 * Progress of `total` units on stderr, so that stdout keeps the results alone: a bar with rate and time left (drawn by
 * cli-progress) on a terminal, elsewhere a plain line at most every 10 s.
 */
export function progress(label: string, total: number): Progress {
  const began = performance.now();
  const state = (done: number, extra: string) => {
    const passed = performance.now() - began;
    const rate = done > 0 ? `${significant(1000 * done / Math.max(passed, 1))}/s` : "";
    const left = done > 0 && done < total ? `${duration(passed * (total - done) / done)} left` : "";
    return [rate, left, extra].filter((part) => part !== "").join(" | ");
  };
  if (Deno.stderr.isTerminal()) return bar(label, total, state);
  let last = began;
  return {
    tick(done, extra = "") {
      if (performance.now() - last < QUIET_MS) return;
      last = performance.now();
      console.error(`${label} ${count(done)}/${count(total)} | ${state(done, extra)}`);
    },
    end() {},
  };
}

/** Leaves the bars that are on the screen as they are, each on a line of its own: for what is printed when work breaks off. */
export function endProgress(): void {
  for (const drawn of shown) drawn.stop();
  shown.clear();
}

function bar(label: string, total: number, state: (done: number, extra: string) => string): Progress {
  const drawn = new SingleBar({
    format: `${label} {bar} {value}/{total} {state}`,
    barsize: 24,
    barCompleteChar: "█",
    barIncompleteChar: "░",
    linewrap: true, // it cuts the line itself: a process that is killed leaves a terminal that wraps lines and has a cursor
  });
  if (shown.size === 0) globalThis.addEventListener("unload", endProgress);
  shown.add(drawn);
  drawn.start(total, 0, { state: "" });
  return {
    tick: (done, extra = "") => drawn.update(done, { state: state(done, extra) }),
    end() {
      drawn.stop();
      shown.delete(drawn);
    },
  };
}

function number(n: number): string {
  return Number.isInteger(n) ? count(n) : significant(n);
}

/** Four digits that say something: `12,345`, `1.834`, `1.96e-4`. */
function significant(n: number): string {
  if (n === 0) return "0";
  if (Math.abs(n) >= 1000) return count(n);
  return Math.abs(n) < 1e-3 ? n.toExponential(2) : String(Number(n.toPrecision(4)));
}

/** A number as this file and scripts print them, with thousands, a sign, an exponent, perhaps a unit. */
function looksNumeric(text: string | undefined): boolean {
  return text !== undefined &&
    /^[-+−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?(%|B|kB|MB|GB|TB|ms|s|tok\/s))?$/.test(plain(text));
}

function plain(text: string): string {
  return text.replace(ANSI, "");
}

/** Characters that take a place on the screen: no ANSI codes, a surrogate pair once. */
function visible(text: string): number {
  return [...plain(text)].length;
}
