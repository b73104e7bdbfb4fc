/** Tests of reports and charts: what they show is read back from the SVG and the HTML that come out. */
import { assert, assertEquals, assertMatch, assertNotMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { barChart, escapeHtml, histogram, lineChart, writeReport } from "../../lib/run/report.ts";
import { temporaryFolder } from "../check.ts";

const text = { title: "Loss & <more>", x: "update", y: "loss (nats)" };
const falling = [[0, 4], [10, 2], [20, 1]] as const;
const marks = (svg: string, kind: string) => svg.match(new RegExp(`class="mark-${kind} role-mark[^]*?</g>`, "g")) ?? [];
const paths = (group: string) => [...group.matchAll(/<path[^>]* d="([^"]+)"/g)].map(([, d]) => d!);
const numbers = (d: string) => [...d.matchAll(/-?\d+(\.\d+)?/g)].map(([n]) => Number(n));

Deno.test("lineChart() draws each series through its points, dashed where it is asked to", async () => {
  const series = [{ name: "training", points: falling }, { name: "validation", points: falling, dashed: true }];
  const svg = await lineChart({ ...text, series });
  const lines = marks(svg, "line");
  assertEquals(lines.length, 2);
  for (const line of lines) {
    const [x0, y0, x1, y1, x2, y2] = numbers(paths(line)[0]!) as [number, number, number, number, number, number];
    assertEquals(Math.round(x1 - x0), Math.round(x2 - x1), "equal steps in x");
    assert(Math.abs((y1 - y0) - 2 * (y2 - y1)) < 0.01, "a fall of 2 is twice a fall of 1");
  }
  assertMatch(lines[1]!, /stroke-dasharray="5,4"/);
  assertNotMatch(lines[0]!, /stroke-dasharray="5,4"/);
  for (const label of ["training", "validation", "update", "loss (nats)", "Loss &amp; &lt;more&gt;"]) {
    assertStringIncludes(svg, `>${label}</text>`);
  }
});

Deno.test("lineChart() marks the points of a short line, so that one point alone is seen", async () => {
  const long = Array.from({ length: 50 }, (_, i) => [i, i % 7] as const);
  const series = [{ name: "training", points: long }, { name: "validation", points: [[49, 3]] as const, dashed: true }];
  const said: unknown[] = [];
  const { warn } = console;
  console.warn = (...words) => said.push(...words);
  const svg = await lineChart({ ...text, series }).finally(() => console.warn = warn);
  assertEquals(said, [], "vega-lite has nothing to drop");
  const [points, more] = marks(svg, "symbol").filter((group) => !group.includes("role-legend"));
  assertEquals([paths(points!).length, more], [1, undefined]);
  assertMatch(points!, /fill="#e07b39"/);
  assertEquals(marks(await lineChart({ ...text, series: series.slice(0, 1) }), "symbol"), []);
});

/** What stands along an axis, 0 for x and 1 for y. */
function axisLabels(svg: string, axis: 0 | 1): string[] {
  const group = [...svg.matchAll(/role-axis-label[^]*?<\/g>/g)][axis]![0];
  return [...group.matchAll(/>([^<>]+)<\/text>/g)].map(([, label]) => label!);
}

Deno.test("axes of whole numbers have no tick between them, however few updates or answers there are", async () => {
  for (const last of [1, 2, 5, 4329]) {
    const points = Array.from({ length: last }, (_, i) => [i + 1, 6 - i / last] as const);
    const labels = axisLabels(await lineChart({ ...text, series: [{ name: "a", points }] }), 0);
    assert(labels.length >= 2 && labels.every((label) => /^[\d,]+$/.test(label)), labels.join(" "));
    assertEquals(new Set(labels).size, labels.length);
  }
  const svg = await histogram({ ...text, series: [{ name: "a", values: [20, 35] }, { name: "b", values: [21] }] });
  for (const axis of [0, 1] as const) {
    const labels = axisLabels(svg, axis);
    assert(labels.every((label) => /^\d+$/.test(label)) && new Set(labels).size === labels.length, labels.join(" "));
  }
  const parts = await lineChart({ ...text, series: [{ name: "a", points: [[0, 1], [0.5, 2]] }] });
  assert(axisLabels(parts, 0).some((label) => label.includes(".")), "x that is no whole number keeps its parts");
});

Deno.test("lineChart() gives a line without height an axis with room around it", async () => {
  for (const y of [0, 1.2216901, -3]) {
    const svg = await lineChart({ ...text, series: [{ name: "a", points: [[1, y], [2, y]] }] });
    const labels = axisLabels(svg, 1);
    assert(labels.length > 2 && labels.every((label) => /^−?\d\.\d{1,2}$/.test(label)), labels.join(" "));
  }
});

Deno.test("a chart names its series in full", async () => {
  const series = [{ name: "words of references, all of them", values: [1] }, { name: "words", values: [2] }];
  assertStringIncludes(await histogram({ ...text, series }), ">words of references, all of them</text>");
});

Deno.test("lineChart() gives small numbers an exponent, all of an axis or none", async () => {
  const points = [[0, 1e-3], [1, 1e-4], [2, 0]] as const;
  const svg = await lineChart({ ...text, series: [{ name: "rate", points }] });
  for (const label of ["0", "1e-4", "2e-4", "1e-3"]) assertStringIncludes(svg, `>${label}</text>`);
  const rates = await lineChart({ ...text, series: [{ name: "rate", points: [[0, 4e-3], [1, 0]] }] });
  assertEquals(axisLabels(rates, 1).filter((label) => label !== "0" && !label.includes("e-")), []);
  const losses = await lineChart({ ...text, series: [{ name: "loss", points: [[0, 4], [1, 1e-4]] }] });
  assertEquals(axisLabels(losses, 1).filter((label) => label.includes("e-")), []);
  assertNotMatch(svg, />rate</, "one series needs no legend");
});

Deno.test("barChart() draws bars as long as their values, in the order given, with names and values", async () => {
  const bars = [{ name: "zero-shot base", value: 34.2 }, { name: "a tuned & merged model", value: 8.55 }];
  const said: unknown[] = [];
  const { warn } = console;
  console.warn = (...words) => said.push(...words);
  const svg = await barChart({ title: "Perplexity", x: "perplexity", y: "", bars }).finally(() => console.warn = warn);
  assertEquals(said, [], "vega-lite has nothing to drop");
  assertNotMatch(svg, /url\(/, "an id of one chart would be taken for the same id of another on the page");
  const [long, short] = paths(marks(svg, "rect")[0]!).map((d) => Math.max(...numbers(d)));
  assert(Math.abs(long! / short! - 4) < 0.05, `${long} and ${short}`);
  const texts = [...svg.matchAll(/>([^<>]+)<\/text>/g)].map(([, label]) => label);
  assert(texts.indexOf("zero-shot base") < texts.indexOf("a tuned &amp; merged model"));
  for (const label of ["34.2", "8.55"]) assert(texts.includes(label), label);
});

Deno.test("histogram() counts each series by itself", async () => {
  const series = [{ name: "base", values: [1, 1, 1, 1, 9] }, { name: "tuned", values: [9, 9] }];
  const svg = await histogram({ title: "Lengths", x: "words", y: "answers", series });
  const bars = marks(svg, "rect").flatMap((group) => [...group.matchAll(/aria-label="([^"]+)"/g)].map(([, s]) => s!));
  assertEquals(bars.map((label) => /answers: (\d+); series: (\w+)/.exec(label)?.slice(1)).sort(), [
    ["1", "base"],
    ["2", "tuned"],
    ["4", "base"],
  ]);
});

Deno.test("a chart without values is refused by name", async () => {
  const message = 'Cannot draw "Loss & <more>": it has no values';
  await assertRejects(() => lineChart({ ...text, series: [{ name: "a", points: [] }] }), RangeError, message);
  await assertRejects(() => barChart({ ...text, bars: [] }), RangeError, message);
  await assertRejects(() => histogram({ ...text, series: [] }), RangeError, message);
});

Deno.test("a chart carries its own colours for light and dark, a size that shrinks, and a name for screen readers", async () => {
  const svg = await lineChart({ ...text, series: [{ name: "a", points: falling }] });
  const head = svg.slice(0, svg.indexOf(">") + 1);
  assertMatch(head, /^<svg class="chart" xmlns="http:\/\/www\.w3\.org\/2000\/svg" viewBox="0 0 \d+ \d+" width="\d+"/);
  assertStringIncludes(head, 'aria-label="Loss &#38; &#60;more&#62;: loss (nats) against update"');
  assertStringIncludes(svg, "prefers-color-scheme:dark");
  assertMatch(svg, /<text[^>]*fill="currentColor"/);
  assertNotMatch(svg, /fill="(black|#000)"/);
  assertNotMatch(svg, /<script|href=|url\(/, "nothing is fetched or run");
});

Deno.test("writeReport() gives the numbers of a column the same decimals", async () => {
  using folder = temporaryFolder();
  const path = folder.at("report.html");
  const rows = [["after update", "loss", "tokens", "rate"], [20, 2.2244, 5537, 1e-5], [220, 1.5, 55.25, 0.5]];
  await writeReport(path, { title: "t", sections: [{ heading: "h", tables: [rows] }] });
  const html = Deno.readTextFileSync(path);
  const cells = [...html.matchAll(/<td class="n">([^<]*)<\/td>/g)].map(([, cell]) => cell);
  assertEquals(cells, ["20", "2.224", "5,537", "1.00e-5", "220", "1.500", "55.25", "0.5"]);
});

Deno.test("writeReport() escapes all text, keeps charts, and fetches nothing", async () => {
  using folder = temporaryFolder();
  const path = folder.at("report.html");
  const evil = `<script>alert("x & 'y'")</script>`;
  await writeReport(path, {
    title: evil,
    sections: [
      { heading: evil, paragraphs: [evil], tables: [[["name", "value"], [evil, 12345.678], ["b", 0.5]]] },
      { heading: "Markup", charts: ["<svg></svg>"] },
    ],
  });
  const html = Deno.readTextFileSync(path);
  assertNotMatch(html, /<script|<link|https?:|@import|url\(/);
  assertEquals(html.split(escapeHtml(evil)).length - 1, 5, "title twice, heading, paragraph, cell");
  assertStringIncludes(html, "<figure><svg></svg></figure>");
  assertStringIncludes(html, '<tr><td>b</td><td class="n">0.5</td></tr>');
  assertStringIncludes(html, '<th>name</th><th class="n">value</th>');
  assertStringIncludes(html, '<td class="n">12,346</td>');
  assertStringIncludes(html, '<meta name="viewport"');
  assertMatch(html, /^<!doctype html>\n<html lang="en">[^]*<\/html>\n$/);
  const open = [...html.matchAll(/<(section|figure|table|thead|tbody|tr|td|th|p|h1|h2|div|body|head)\b/g)].length;
  assertEquals(
    open,
    [...html.matchAll(/<\/(section|figure|table|thead|tbody|tr|td|th|p|h1|h2|div|body|head)>/g)].length,
  );
});
