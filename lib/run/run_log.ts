/**
 * The log of a training run: one JSON object per line, appended as it happens, cut back to a checkpoint on resume, and at
 * the end drawn as a page. It knows the names of the fields, not how they come about.
 */
import { exists, writeAtomic, writeJson } from "../data/files.ts";
import { lineChart, type Series, writeReport } from "./report.ts";

/** One line: an update (`loss`, `grad_norm`, …) or an evaluation (`eval_loss`, …) after update `step`. */
export type LogEntry = Readonly<Record<string, unknown>> & { readonly step: number };

/** An open log. */
export interface RunLog {
  append(entry: LogEntry): void;
  /** Size of the file, all of it on the disk: what a checkpoint remembers. */
  bytes(): number;
  /** Losses of the updates and of the evaluations, in order. */
  losses(): { train: number[]; eval: number[] };
  /** Writes `report.html`, `loss.svg` and `trainer_state.json` (Hugging Face's fields) into `dir`. */
  writeReport(
    dir: string,
    about: { title: string; device: string; state: Readonly<Record<string, unknown>> },
  ): Promise<void>;
}

/**
 * Opens the log at `path` after its first `bytes` bytes; what stood behind them was not part of the checkpoint. Throws, and
 * leaves the file as it is, where those bytes are not all there or are not lines of a log.
 */
export async function openRunLog(path: string, bytes: number): Promise<RunLog> {
  const entries = bytes > 0 ? readEntries(path, bytes) : [];
  const file = await Deno.open(path, { write: true, create: true });
  await file.truncate(bytes);
  file.close();
  const out = await Deno.open(path, { append: true });
  let written = bytes;
  const encoder = new TextEncoder();
  const column = (name: string) =>
    entries.filter((e) => typeof e[name] === "number").map((e) => [e.step, e[name] as number] as const);
  return {
    append(entry) {
      const line = encoder.encode(JSON.stringify(entry) + "\n");
      for (let done = 0; done < line.length;) done += out.writeSync(line.subarray(done));
      written += line.length;
      entries.push(entry);
    },
    bytes() {
      out.syncDataSync();
      return written;
    },
    losses: () => ({ train: column("loss").map(([, v]) => v), eval: column("eval_loss").map(([, v]) => v) }),
    async writeReport(dir, { title, device, state }) {
      const series: Series[] = [
        { name: "training", points: smooth(column("loss")) },
        { name: "validation", points: column("eval_loss"), dashed: true },
      ];
      const charts = [
        await lineChart({ title: "Loss", x: "update", y: "nats per token", series }),
        await lineChart({
          title: "Learning rate",
          x: "update",
          y: "",
          series: [{ name: "rate", points: column("learning_rate") }],
        }),
        await lineChart({
          title: "Gradient norm",
          x: "update",
          y: "",
          series: [{ name: "norm", points: column("grad_norm") }],
        }),
      ];
      await writeAtomic(`${dir}/loss.svg`, charts[0]!);
      const perplexities = new Map(column("eval_perplexity"));
      const evaluations = column("eval_loss").map(([step, loss]) => [step, loss, perplexities.get(step) ?? ""]);
      await writeReport(`${dir}/report.html`, {
        title,
        sections: [
          {
            heading: "Loss",
            paragraphs: [`Trained on ${device}. The training line is a running mean.`],
            charts: [charts[0]!],
          },
          { heading: "Validation", tables: [[["after update", "loss", "perplexity"], ...evaluations]] },
          { heading: "Schedule and gradients", charts: charts.slice(1) },
        ],
      });
      await writeJson(`${dir}/trainer_state.json`, { ...state, log_history: entries });
      out.close();
    },
  };
}

/** The entries in the first `bytes` bytes of a log. */
function readEntries(path: string, bytes: number): LogEntry[] {
  const refuse = (state: string): never => {
    throw new Error(`Cannot go on with "${path}": ${state}: bring the file back, or start over with --no-resume`);
  };
  const all = exists(path) ? Deno.readFileSync(path) : new Uint8Array();
  if (all.length < bytes) refuse(`it has ${all.length} bytes, and had ${bytes} when the checkpoint was made`);
  const lines = new TextDecoder().decode(all.subarray(0, bytes)).split("\n");
  if (lines.pop() !== "") refuse(`its line ${lines.length + 1} does not end where the checkpoint was made`);
  return lines.map((line, i) => {
    try {
      const entry = JSON.parse(line);
      if (typeof entry?.step === "number") return entry;
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
    }
    return refuse(`its line ${i + 1} is damaged: ${JSON.stringify(line.slice(0, 40))}`);
  });
}

/** Running mean over about a fiftieth of the run, so that the trend is seen. */
function smooth(points: readonly (readonly [number, number])[]): (readonly [number, number])[] {
  const width = Math.max(1, Math.floor(points.length / 50));
  return points.map(([x], i) => {
    const near = points.slice(Math.max(0, i - width + 1), i + 1);
    return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length] as const;
  });
}
