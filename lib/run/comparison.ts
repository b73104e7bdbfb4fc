/**
 * A base and a tuned model side by side, for the screen and as a page: perplexities and how sure their difference is, the same
 * questions to both, and how long the answers are. It measures nothing.
 */
import { count, percent, table } from "./print.ts";
import { barChart, histogram, writeReport } from "./report.ts";

/** Losses over the test rows: `nllSum` in nats over `tokens` labelled tokens. */
export interface Scores {
  readonly nllSum: number;
  readonly tokens: number;
  readonly perplexity: number;
  readonly evalLoss: number;
}

/** Mean, median, least and most. */
export type Spread = Readonly<Record<"mean" | "median" | "min" | "max", number>>;

/** What was measured. */
export interface Comparison {
  readonly base: Scores;
  readonly tuned: Scores;
  /** Of the difference of the perplexities; low and high are null where there is too little to tell. */
  readonly difference: {
    readonly perplexity: number;
    readonly low: number | null;
    readonly high: number | null;
    readonly confidence: number;
    readonly documents: number;
    readonly resamples: number;
  };
  /** What a document of the bootstrap is. */
  readonly unit: "rows" | "documents";
  readonly pairs: readonly { readonly question: string; readonly base: string; readonly tuned: string }[];
  /** Answers of the tuned model to prompts of the test split. */
  readonly samples: readonly {
    readonly question: string;
    readonly answer: string;
    readonly reference: string;
    readonly words: number;
  }[];
  /** Lengths of the answers, by what is counted; empty without samples. */
  readonly lengths: Readonly<Record<string, { readonly values: readonly number[]; readonly spread: Spread }>>;
  /** Share of the answers that ended by themselves. */
  readonly ended: number | null;
  /** The seed and the settings of sampling. */
  readonly sampling: Readonly<Record<string, unknown>>;
}

const WARNING = "This is a research model. It states falsehoods in fluent sentences: it is not for clinical use.";

/** What the screen shows: scores, the difference, lengths, three questions, and where `page` is. */
export function comparisonText(of: Comparison, page: string): string {
  const parts = [table(scoreRows(of), { header: true }), wrap(verdict(of))];
  if (of.samples.length > 0) {
    parts.push(`${table(lengthRows(of), { header: true, align: "lrrrr" })}\n${endedText(of)}`);
  }
  for (const { question, base, tuned } of of.pairs.slice(0, 3)) {
    parts.push([`Q: ${question}`, `base: ${base}`, `tuned: ${tuned}`].map(wrap).join("\n"));
  }
  return [...parts, `${WARNING} See ${page}`].map((part) => `\n${part}`).join("\n");
}

/** The same with charts and all answers, as a page at `path`. */
export async function writeComparison(path: string, of: Comparison): Promise<void> {
  const { base, tuned, pairs, samples } = of, some = samples.length > 0;
  const bars = [{ name: "base", value: base.perplexity }, { name: "tuned", value: tuned.perplexity }];
  await writeReport(path, {
    title: "Evaluation",
    sections: [
      {
        heading: "Perplexity on the test split",
        paragraphs: [WARNING, verdict(of), "Lower is better. eval_loss is what the Hugging Face Trainer reports."],
        charts: [await barChart({ title: "Perplexity", x: "perplexity", y: "", bars })],
        tables: [scoreRows(of)],
      },
      {
        heading: "The same questions, side by side",
        paragraphs: [`Sampled with ${Object.entries(of.sampling).map((pair) => pair.join(" ")).join(", ")}.`],
        tables: [[["question", "base", "tuned"], ...pairs.map((pair) => [pair.question, pair.base, pair.tuned])]],
      },
      {
        heading: "Answers to prompts of the test split",
        paragraphs: some ? [endedText(of)] : ["No test document has a prompt that fits."],
        charts: some ? [await lengthChart(of)] : [],
        tables: some
          ? [lengthRows(of), [
            ["question", "tuned", "reference", "words"],
            ...samples.map(({ question, answer, reference, words }) => [question, answer, reference, words]),
          ]]
          : [],
      },
    ],
  });
}

/** JSON with lists of numbers on one line. */
export function denseJson(value: unknown): string {
  const spaced = JSON.stringify(value, null, 2);
  return spaced.replace(/\[\n[-+\d.e,\s]+\]/g, (list) => list.replace(/\s+/g, " ")) + "\n";
}

function scoreRows({ base, tuned }: Comparison): (string | number)[][] {
  return [
    ["", "base", "tuned"],
    ["perplexity", base.perplexity, tuned.perplexity],
    ["loss per token (nats)", base.nllSum / base.tokens, tuned.nllSum / tuned.tokens],
    ["eval_loss (rows weighted)", base.evalLoss, tuned.evalLoss],
    ["labelled tokens", base.tokens, tuned.tokens],
  ];
}

function lengthRows({ samples, lengths }: Comparison): (string | number)[][] {
  return [
    [`${samples.length} answers`, "mean", "median", "min", "max"],
    ...Object.entries(lengths).map(([name, { spread: { mean, median, min, max } }]) => [name, mean, median, min, max]),
  ];
}

function verdict({ difference, unit }: Comparison): string {
  const { perplexity, low, high, confidence, documents, resamples } = difference;
  const n = `n = ${count(documents)} ${unit} of the test split`;
  const sure = low === null || high === null
    ? `${n}: too few for an interval`
    : `${100 * confidence} % interval ${signed(low)} to ${signed(high)}, ${n}, drawn again ${count(resamples)} times`;
  return `Perplexity of the tuned model minus the base's: ${signed(perplexity)} (${sure}).`;
}

function endedText({ ended }: Comparison): string {
  return `${percent(ended ?? 0)} of them ended by themselves.`;
}

function lengthChart({ lengths }: Comparison): Promise<string> {
  const series = ["words", "words of references"].map((name) => ({ name, values: lengths[name]!.values }));
  return histogram({ title: "Length of the answers", x: "words", y: "answers", series });
}

function signed(x: number): string {
  return `${x > 0 ? "+" : ""}${x.toFixed(3)}`;
}

/** Lines of at most about 100 columns, cut between words. */
function wrap(text: string): string {
  return text.trim().split("\n").map((line) => line.replace(/(.{1,98})(\s+|$)/g, "$1\n").trimEnd()).join("\n");
}
