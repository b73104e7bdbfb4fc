/** Tests of reports and charts: what they show is read back from the SVG and the HTML that come out. */
import { assert, assertEquals, assertMatch, assertNotMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { barChart, escapeHtml, histogram, lineChart, writeReport } from "../../lib/run/report.ts";

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

Deno.test("lineChart() gives small numbers an exponent", async () => {
  const points = [[0, 1e-3], [1, 1e-4], [2, 0]] as const;
  const svg = await lineChart({ ...text, series: [{ name: "rate", points }] });
  for (const label of ["1e-4", "2e-4"]) assertStringIncludes(svg, `>${label}</text>`);
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
  const svg = await histogram({ title: "Lengths", x: "words", y: "answers", series, bins: 10 });
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

Deno.test("writeReport() escapes all text, keeps charts and html, and fetches nothing", async () => {
  const path = Deno.makeTempFileSync({ suffix: ".html" });
  const evil = `<script>alert("x & 'y'")</script>`;
  await writeReport(path, {
    title: evil,
    sections: [
      { heading: evil, paragraphs: [evil], tables: [[["name", "value"], [evil, 12345.678], ["b", 0.5]]] },
      { heading: "Markup", charts: ["<svg></svg>"], html: "<pre>kept</pre>" },
    ],
  });
  const html = Deno.readTextFileSync(path);
  Deno.removeSync(path);
  assertNotMatch(html, /<script|<link|https?:|@import|url\(/);
  assertEquals(html.split(escapeHtml(evil)).length - 1, 5, "title twice, heading, paragraph, cell");
  assertStringIncludes(html, "<figure><svg></svg></figure>\n<pre>kept</pre>");
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
