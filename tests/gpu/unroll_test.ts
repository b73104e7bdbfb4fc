/** unroll(): which loops it replaces, what it writes as literals, and what it leaves alone; testAtEnd(): what becomes of the others. */
import { assertEquals, assertThrows } from "@std/assert";
import { testAtEnd, unroll } from "../../lib/gpu/unroll.ts";

const lines = (...text: string[]) => text.join("\n");
/** Without indentation and line breaks, which do not matter. */
const words = (text: string) => text.split(/\s+/).filter((word) => word !== "").join(" ");

Deno.test("unroll() leaves text without marked loops as it is", () => {
  const source = lines(
    "// a comment about unrolling; unroll",
    "override DIM: u32;",
    "fn f() {",
    "  for (var i = 0u; i < DIM; i++) {",
    "    x[i * 2u + 1u] = max(DIM, 2u * 3u);",
    "  }",
    "}",
    "",
  );
  assertEquals(unroll(source, { DIM: 4 }), source);
});

Deno.test("unroll() writes the counter and every index that follows from it as literals", () => {
  const source = lines(
    "before();",
    "  // unroll: registers",
    "  for (var i = 0u; i < 2u; i++) {",
    "    let at = row + i;",
    "    a[i * 2u + 1u] = b[at] + c[row + i * 4u] + fetch(row, i + 3u);",
    "  }",
    "after();",
  );
  const body = (i: number) =>
    `{ let at = row + ${i}u; a[${2 * i + 1}u] = b[at] + c[row + ${i}u * 4u] + fetch(row, ${i + 3}u); }`;
  assertEquals(words(unroll(source, {})), `before(); ${body(0)} ${body(1)} after();`);
});

Deno.test("unroll() evaluates bounds of constants with the usual precedence", () => {
  const source = lines(
    "const FOUR = 4u;",
    "override LANES: u32;",
    "override WIDE: u32 = 6u;",
    "// unroll",
    "for (var i = LANES / 3u; i < (WIDE + FOUR) * 2u - LANES % 5u; i += FOUR + 1u) {",
    "use(i);",
    "}",
  );
  const values = (constants: Record<string, number>) =>
    [...unroll(source, constants).matchAll(/use\((\d+)u\)/g)].map(([, value]) => Number(value));
  assertEquals(values({ LANES: 8 }), [2, 7, 12]); // up to 20 - 3
  assertEquals(values({ LANES: 8, WIDE: 20 }), [2, 7, 12, 17, 22, 27, 32, 37, 42]); // a given value goes before the default
  assertEquals(values({ LANES: 300 }), []);
});

Deno.test("unroll() unrolls nested loops, also inside and around loops that stay", () => {
  const source = lines(
    "// unroll",
    "for (var i = 0u; i < 2u; i++) {",
    "  for (var k = 0u; k < n; k++) {",
    "    // unroll",
    "    for (var j = 0u; j < i + 1u; j++) {",
    "      a[i][j] += b[k];",
    "    }",
    "  }",
    "}",
  );
  const kept = (inside: string) => `{ for (var k = 0u; k < n; k++) { ${inside} } }`;
  const expected = `${kept("{ a[0u][0u] += b[k]; }")} ${kept("{ a[1u][0u] += b[k]; } { a[1u][1u] += b[k]; }")}`;
  assertEquals(words(unroll(source, {})), expected);
});

Deno.test("unroll() keeps a loop that has more iterations than its mark allows, and unrolls what is in it", () => {
  const source = lines(
    "// unroll up to 2: shuffles want literal lanes",
    "for (var i = 0u; i < N; i++) {",
    "  // unroll",
    "  for (var j = 0u; j < 2u; j++) {",
    "    a[i] += b[j];",
    "  }",
    "}",
  );
  const inside = (i: string) => `{ a[${i}] += b[0u]; } { a[${i}] += b[1u]; }`;
  assertEquals(words(unroll(source, { N: 2 })), `{ ${inside("0u")} } { ${inside("1u")} }`);
  const head = "// unroll up to 2: shuffles want literal lanes for (var i = 0u; i < N; i++) {";
  assertEquals(words(unroll(source, { N: 3 })), `${head} ${inside("i")} }`);
});

Deno.test("unroll() replaces the counter only where it stands for itself", () => {
  const source = lines(
    "// unroll",
    "for (var w = 0u; w < 1u; w++) {",
    "let word = block.w + w + wide[k] + v[row];",
    "}",
  );
  assertEquals(words(unroll(source, {})), "{ let word = block.w + 0u + wide[k] + v[row]; }");
});

Deno.test("unroll() spells unsigned constants in the copies, and no others", () => {
  const source = lines(
    "override LANES: u32;",
    "override EPS: f32;",
    "override SIGN: f32;",
    "const HALF = 0.5;",
    "// unroll",
    "for (var i = 0u; i < 1u; i++) {",
    "a[i * LANES + 1u] = EPS * SIGN + HALF + f(x, 1.0) + g(y, 2);",
    "}",
  );
  const copy = words(unroll(source, { LANES: 8, EPS: 1e-5, SIGN: 1 })).split("HALF = 0.5; ")[1];
  assertEquals(copy, "{ a[1u] = EPS * SIGN + HALF + f(x, 1.0) + g(y, 2); }");
});

Deno.test("unroll() refuses bounds that it does not know and loops that do not end", () => {
  const loop = (bounds: string, end = "}") => `// unroll\nfor (var i = 0u; ${bounds}) {\nuse(i);\n${end}`;
  const refused = (source: string, message: string) =>
    assertThrows(() => unroll(source, { N: 8 }), SyntaxError, message);
  refused(loop("i < COUNT; i++"), 'Cannot unroll a loop: "COUNT" in "COUNT" is not a known constant');
  refused(loop("i < N / x; i++"), '"x" in "N / x" is not a known constant');
  refused(loop("i < N >> 1u; i++"), '">" in "N >> 1u" is not a known constant');
  refused(loop("i < (N + 1u; i++"), '"the end" in "(N + 1u" is not a known constant');
  refused(loop("i < toString; i++"), '"toString"');
  refused(loop("i < N; i += N - 8u"), 'Cannot unroll a loop: its step "N - 8u" is 0');
  refused(loop("i < N; i++", "if (x) {"), "Cannot read a loop: its closing brace is missing");
});

Deno.test("testAtEnd() moves the test of every loop behind its body, loops within loops too", () => {
  const source = "a(); for (var i = lane; i < n; i += LANES) { b(); for (var j = 0u; j < 2u; j++) { c(); } } d();";
  const inner = "{ var j = 0u; if (j < 2u) { loop { c(); j++; if (!(j < 2u)) { break; } } } }";
  const outer = `{ var i = lane; if (i < n) { loop { b(); ${inner} i += LANES; if (!(i < n)) { break; } } } }`;
  assertEquals(words(testAtEnd(source)), `a(); ${outer} d();`);
  assertEquals(testAtEnd("loop { if (x) { break; } }"), "loop { if (x) { break; } }");
});

Deno.test("testAtEnd() refuses a loop that continues: it would skip the step", () => {
  const source = "for (var i = 0u; i < n; i++) { if (x) { continue; } }";
  assertThrows(() => testAtEnd(source), SyntaxError, 'Cannot move the test of a loop over "i = 0u": it continues');
});
