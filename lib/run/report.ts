/**
 * Reports as single HTML files and charts as SVG (vega-lite and vega, no browser): both readable on a phone, on a light
 * and on a dark screen. It fetches nothing, runs no script in the reader's browser, and computes no statistics.
 */
import type { TopLevelSpec } from "vega-lite";
import { writeAtomic } from "../data/files.ts";
import { table as tableText } from "./print.ts";

/** One part of a page; only `charts` are markup, all else is text. */
export interface Section {
  readonly heading: string;
  readonly paragraphs?: readonly string[];
  /** SVG of {@link lineChart}, {@link barChart} or {@link histogram}. */
  readonly charts?: readonly string[];
  /** Rows of cells; the first row of each table is its header. */
  readonly tables?: readonly (readonly (readonly (string | number)[])[])[];
}

/** What every chart says: its title and the names of its axes, with units. */
export interface ChartText {
  readonly title: string;
  readonly x: string;
  readonly y: string;
}

/** A named line through `points` of [x, y]. */
export interface Series {
  readonly name: string;
  readonly points: readonly (readonly [number, number])[];
  readonly dashed?: boolean;
}

/** Colours that keep their contrast on white and on near-black, told apart by colour-blind readers. */
const COLOURS = ["#2f7ed8", "#e07b39", "#3a9d6e", "#a66bbf", "#c9a227", "#7f8c8d"];
const WIDTH = 640;
const HEIGHT = 300;
/** A line of at most so many points has a mark on each: what has one point or two is seen, and where it was measured. */
const FEW_POINTS = 30;
/** A vega expression: numbers with an exponent. */
const EXPONENT_LABEL = "datum.value == 0 ? '0' : format(datum.value, '~e')";
/** An axis of whole numbers: no tick between them. */
const WHOLE = { tickMinStep: 1, format: ",d" };
/** The chart takes the text colour of the page, or its own when it stands alone. */
const CHART_STYLE = ".chart{color:#24292f;max-width:100%;height:auto;background:transparent}" +
  "@media(prefers-color-scheme:dark){.chart{color:#e6edf3}}";
const PAGE_STYLE = `
:root { color-scheme: light dark; --text: #24292f; --faint: #59636e; --line: #d1d9e0; --soft: #f6f8fa; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --faint: #9198a1; --line: #3d444d; --soft: #151b23; --page: #0d1117; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 46rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
p { margin: 0.75rem 0; white-space: pre-line; }
figure { margin: 1.25rem 0; overflow-x: auto; }
figure svg { min-width: 27rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td { min-width: 5rem; white-space: pre-line; overflow-wrap: break-word; }
pre, code { font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); padding: 0.75rem; overflow-x: auto; border-radius: 6px; white-space: pre-wrap; }
.faint { color: var(--faint); }
`;

/** Writes a page to `path`, whole or not at all; headings, paragraphs and cells are escaped, `charts` are not. */
export async function writeReport(
  path: string,
  page: { readonly title: string; readonly sections: readonly Section[] },
): Promise<void> {
  const parts = page.sections.map((section) =>
    [
      `<section>\n<h2>${escapeHtml(section.heading)}</h2>`,
      ...(section.paragraphs ?? []).map((text) => `<p>${escapeHtml(text)}</p>`),
      ...(section.charts ?? []).map((svg) => `<figure>${svg}</figure>`),
      ...(section.tables ?? []).map(tableHtml),
      "</section>",
    ].filter((part) => part !== "").join("\n")
  );
  const title = escapeHtml(page.title);
  await writeAtomic(
    path,
    `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title}</title>
<style>${PAGE_STYLE}</style>
</head>
<body>
<h1>${title}</h1>
${parts.join("\n")}
</body>
</html>
`,
  );
}

/** Lines over a continuous x, with marks on the points where these are few. Throws when no series has a point. */
export function lineChart(chart: ChartText & { readonly series: readonly Series[] }): Promise<string> {
  const valuesOf = ({ name, points }: Series) => points.map(([x, y]) => ({ series: name, x, y }));
  const values = chart.series.flatMap(valuesOf);
  const names = chart.series.map(({ name }) => name);
  const [xs, ys] = [values.map(({ x }) => x), values.map(({ y }) => y)];
  const isSmall = ys.every((y) => Math.abs(y) < 0.01) && ys.some((y) => y !== 0);
  return draw(chart, {
    data: { values },
    encoding: {
      x: {
        field: "x",
        type: "quantitative",
        title: chart.x,
        scale: { zero: false, nice: false, ...roomAround(xs, 1) },
        axis: { grid: false, tickCount: 8, ...xs.every(Number.isInteger) ? WHOLE : {} },
      },
      y: {
        field: "y",
        type: "quantitative",
        title: chart.y,
        scale: { zero: false, ...roomAround(ys, Math.abs(ys[0] ?? 0) / 2 || 1) },
        axis: isSmall ? { labelExpr: EXPONENT_LABEL } : {},
      },
    },
    layer: [
      {
        mark: { type: "line", strokeWidth: 2, strokeJoin: "round" },
        encoding: {
          color: colour("series", names),
          strokeDash: {
            field: "series",
            type: "nominal",
            scale: { domain: names, range: chart.series.map(({ dashed }) => dashed === true ? [5, 4] : [1, 0]) },
            legend: names.length > 1 ? { title: null } : null,
          },
        },
      },
      ...chart.series.flatMap((series, i) => {
        if (series.points.length > FEW_POINTS) return [];
        const mark = { type: "point", fill: COLOURS[i % COLOURS.length]!, strokeWidth: 0, size: 36, opacity: 1 };
        return [{ data: { values: valuesOf(series) }, mark }];
      }),
    ],
  }, values.length);
}

/** The scale of numbers that are all the same: without it vega gives the axis one tick with six decimals. */
function roomAround(numbers: readonly number[], room: number): { domain?: [number, number] } {
  const first = numbers[0] ?? 0;
  return numbers.some((n) => n !== first) ? {} : { domain: [first === 0 ? 0 : first - room, first + room] };
}

/** One horizontal bar per entry in the order given, its value beside it. Throws when there are no bars. */
export function barChart(
  chart: ChartText & { readonly bars: readonly { readonly name: string; readonly value: number }[] },
): Promise<string> {
  const values = chart.bars.map(({ name, value }) => ({ name, value, label: tableText([[value]]) }));
  return draw(chart, {
    data: { values },
    height: 30 * values.length, // a step would make vega-lite warn that it cannot fit it
    encoding: {
      y: {
        field: "name",
        type: "nominal",
        sort: null,
        title: chart.y,
        axis: { ticks: false, domain: false, labelLimit: 240 },
      },
      x: { field: "value", type: "quantitative", title: chart.x, axis: { tickCount: 8 } },
    },
    layer: [
      { mark: { type: "bar", color: COLOURS[0]! } },
      {
        mark: { type: "text", align: "left", dx: 5, color: "currentColor", fontSize: 12 },
        encoding: { text: { field: "label", type: "nominal" } },
      },
    ],
  }, values.length);
}

/** How often values fall into at most 30 equal intervals, in one colour per series. Throws when there are no values. */
export function histogram(
  chart: ChartText & {
    readonly series: readonly { readonly name: string; readonly values: readonly number[] }[];
  },
): Promise<string> {
  const values = chart.series.flatMap((series) => series.values.map((x) => ({ series: series.name, x })));
  const names = chart.series.map(({ name }) => name);
  const isWhole = values.every(({ x }) => Number.isInteger(x));
  return draw(chart, {
    data: { values },
    mark: { type: "bar", opacity: names.length > 1 ? 0.6 : 0.9, binSpacing: 1 },
    encoding: {
      x: {
        field: "x",
        type: "quantitative",
        title: chart.x,
        bin: { maxbins: 30, ...isWhole ? { minstep: 1 } : {} },
        axis: isWhole ? WHOLE : {},
      },
      y: { aggregate: "count", type: "quantitative", title: chart.y, stack: null, axis: WHOLE },
      color: colour("series", names),
    },
  }, values.length);
}

/** Text for use inside HTML, in elements and in attributes. */
export function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

function colour(field: string, names: readonly string[]) {
  return {
    field,
    type: "nominal",
    scale: { domain: [...names], range: names.map((_, i) => COLOURS[i % COLOURS.length]!) },
    legend: names.length > 1 ? { title: null } : null,
  } as const;
}

/** Compiles and renders; the two libraries load here, because most runs draw nothing and loading takes a second. */
async function draw(chart: ChartText, spec: object, marks: number): Promise<string> {
  if (marks === 0) throw new RangeError(`Cannot draw "${chart.title}": it has no values`);
  const [{ compile }, vega] = await Promise.all([import("vega-lite"), import("vega")]);
  const grey = { domainColor: "currentColor", tickColor: "currentColor", domainOpacity: 0.4, tickOpacity: 0.4 };
  const text = { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12, titleFontSize: 12 };
  const full = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: WIDTH,
    height: HEIGHT,
    padding: 8,
    autosize: { type: "fit-x", contains: "padding" },
    background: null,
    title: { text: chart.title, anchor: "start", color: "currentColor", fontSize: 15, offset: 14 },
    config: {
      font: "system-ui, -apple-system, Segoe UI, Helvetica Neue, Arial, sans-serif",
      view: { stroke: null },
      axis: {
        ...grey,
        ...text,
        gridColor: "currentColor",
        gridOpacity: 0.12,
        titleFontWeight: "normal",
        titlePadding: 8,
      },
      legend: { ...text, orient: "top", labelLimit: 0, symbolStrokeWidth: 3, symbolSize: 160, padding: 0, offset: 6 },
    },
    ...spec,
  };
  const view = new vega.View(vega.parse(compile(full as unknown as TopLevelSpec).spec), { renderer: "none" });
  const svg = await view.toSVG();
  view.finalize();
  const label = escapeHtml(`${chart.title}: ${chart.y} against ${chart.x}`);
  return svg.replace(
    /<svg[^>]*viewBox="([^"]*)"[^>]*>/,
    (_, box: string) =>
      `<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="${box}" width="${box.split(" ")[2]}" ` +
      `role="img" aria-label="${label}"><style>${CHART_STYLE}</style>`,
  );
}

function tableHtml(rows: readonly (readonly (string | number)[])[]): string {
  const [head = [], ...body] = rows;
  const columns = head.map((_, column) => body.map((row) => row[column]).filter((cell) => typeof cell === "number"));
  const line = (row: readonly (string | number)[], tag: "th" | "td") =>
    row.map((cell, column) => {
      const text = typeof cell === "number" ? likeOthers(cell, columns[column] ?? []) : cell;
      return `<${tag}${columns[column]?.length ? ' class="n"' : ""}>${escapeHtml(text)}</${tag}>`;
    }).join("");
  return [
    '<div class="table"><table>',
    `<thead><tr>${line(head, "th")}</tr></thead>`,
    "<tbody>",
    ...body.map((row) => `<tr>${line(row, "td")}</tr>`),
    "</tbody></table></div>",
  ].join("\n");
}

/** A number with as many decimals as the others of its column need; from a thousand on with none, as everywhere. */
function likeOthers(cell: number, column: readonly number[]): string {
  const texts = column.map((other) => tableText([[other]]));
  if (Math.abs(cell) >= 1000 || texts.some((text) => text.includes("e"))) return tableText([[cell]]);
  return cell.toFixed(Math.max(0, ...texts.map((text) => text.split(".")[1]?.length ?? 0)));
}
