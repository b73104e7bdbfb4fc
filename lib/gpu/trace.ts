/**
 * What a profile says: time by label, and a trace for `chrome://tracing` or ui.perfetto.dev. It measures nothing.
 */
import type { Timing } from "./program.ts";

/** Time of all dispatches with one label. */
export interface LabelTime {
  readonly label: string;
  readonly ms: number;
  readonly count: number;
  /** Of the time of all labels, 0 to 1. */
  readonly share: number;
}

/** Times added up by label, the longest first. */
export function byLabel(timings: readonly Timing[]): LabelTime[] {
  const sums = new Map<string, { ms: number; count: number }>();
  for (const { label, ms } of timings) {
    const sum = sums.get(label) ?? { ms: 0, count: 0 };
    sums.set(label, { ms: sum.ms + ms, count: sum.count + 1 });
  }
  const all = timings.reduce((total, { ms }) => total + ms, 0);
  return [...sums]
    .map(([label, { ms, count }]) => ({ label, ms, count, share: all > 0 ? ms / all : 0 }))
    .sort((a, b) => b.ms - a.ms);
}

/** The text of a trace file (Trace Event Format): one event per dispatch, its kernel file as the category. */
export function chromeTrace(timings: readonly Timing[], name: string): string {
  const thread = { pid: 1, tid: 1 };
  const named = { ...thread, ph: "M", name: "process_name", args: { name } };
  const events = timings.map(({ label, start, ms }) => ({
    ...thread,
    ph: "X",
    name: label,
    cat: label.split(".")[0],
    ts: start * 1e3,
    dur: ms * 1e3,
  }));
  const lines = [named, ...events].map((event) => JSON.stringify(event));
  return `{"displayTimeUnit": "ms", "traceEvents": [\n${lines.join(",\n")}\n]}\n`;
}
