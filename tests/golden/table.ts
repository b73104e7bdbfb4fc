/**
 * Comparisons with their bounds, collected into a table that GOLDEN_TABLE=1 prints when a test file ends. A row is the worst of
 * its comparisons; it refuses an error above the bound on the spot.
 */
import { assert, assertEquals } from "@std/assert";
import { table } from "../../lib/run/print.ts";
import { assertClose, maxRelative } from "../check.ts";

/** What golden/README.md of the reference data finds honest, in parts of the largest value unless said otherwise. */
export const BOUND = {
  forward: 1e-5,
  gradient: 2e-5,
  /** Losses of a run, relative. */
  run: 2e-5,
  /** Learning rates, absolute. */
  rate: 1e-12,
  /** Mean difference of a final adapter's entries with 32-bit state, and their largest. */
  mean32: 1e-6,
  max32: 1e-4,
  /** Mean difference with 8-bit state. */
  mean8: 5e-6,
} as const;

interface Row {
  error: number;
  readonly bound: number | "equal" | "at least";
  count: number;
}

const rows = new Map<string, Row>();

/** Asserts that `error` is at most `bound` and remembers it as one comparison of the row `name`. */
export function within(name: string, { error, bound }: { error: number; bound: number }): void {
  remember(name, { error, bound });
  assert(error <= bound, `${name}: ${error} is above ${bound}`);
}

/** Asserts that `error` is at least `least`: two things that a test must be able to tell apart. */
export function apart(name: string, { error, least }: { error: number; least: number }): void {
  remember(`${name}, at least ${least}`, { error, bound: "at least" });
  assert(error >= least, `${name}: ${error} is below ${least}`);
}

/** Asserts that two values are equal, to the last bit of every number in them, and remembers it. */
export function same<T>(name: string, { actual, expected }: { actual: T; expected: T }): void {
  assertEquals(actual, expected, name);
  remember(name, { error: 0, bound: "equal" });
}

function remember(name: string, { error, bound }: Omit<Row, "count">): void {
  const row = rows.get(name) ?? { error: 0, bound, count: 0 };
  rows.set(name, row);
  row.count++;
  if (!(error <= row.error)) row.error = error;
}

/** Asserts that two tensors differ by at most `bound` of the largest value, and remembers it; `part` names the tensor. */
export function close(
  name: string,
  { actual, expected, bound, part = "" }: {
    actual: ArrayLike<number>;
    expected: ArrayLike<number>;
    bound: number;
    part?: string;
  },
): void {
  assertClose(actual, expected, { name: `${name} ${part}`, max: bound });
  within(name, { error: maxRelative(actual, expected), bound });
}

/** Mean and largest of |actual − expected|. */
export function difference(actual: ArrayLike<number>, expected: ArrayLike<number>): { mean: number; max: number } {
  let sum = 0, max = 0;
  for (let i = 0; i < expected.length; i++) {
    const off = Math.abs(actual[i]! - expected[i]!);
    sum += off;
    if (!(off <= max)) max = off;
  }
  return { mean: sum / expected.length, max };
}

if (Deno.env.get("GOLDEN_TABLE") === "1") {
  globalThis.addEventListener("unload", () => {
    const lines = [...rows].map(([name, { error, bound, count }]) => [
      name,
      count,
      error === 0 ? "equal" : error.toExponential(1),
      typeof bound === "string" ? bound : bound === 0 ? "equal" : bound.toExponential(0),
    ]);
    console.log(table([["comparison", "of", "worst error", "bound"], ...lines], { header: true }));
  });
}
