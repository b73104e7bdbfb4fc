/**
 * Unrolls the loops of a WGSL file that are marked for it, because naga guards every loop with a 64-bit counter and
 * clamps every index that is not a literal. The file stays valid WGSL: without this transform it computes the same,
 * only slower.
 *
 * A marked loop stands under a line `// unroll`, or `// unroll up to N` where it is to stay a loop if it has more than N
 * iterations, and has the form
 *
 *     for (var i = START; i < END; i += STEP) {      or  i++
 *
 * where START, END and STEP are made of integers, names in `constants`, `const NAME = 8u;` lines and + - * / %.
 */

type Known = Readonly<Record<string, number>>;

/**
 * Replaces each marked loop by its iterations, the counter and every index that follows from it written as literals. Throws
 * `SyntaxError` where a bound is not made of known constants, or a loop has no closing brace.
 */
export function unroll(source: string, constants: Known): string {
  const known = { ...declaredConstants(source), ...constants };
  // Numbers of other types are none of its business: they would be spelled as u32.
  for (const [, name] of source.matchAll(/^(?:const|override) (\w+): *(?!u32)\w+/gm)) delete known[name!];
  return expand(source, known);
}

/**
 * Lets the loops that are left test at their end. A CPU driver sends all lanes through a loop until none goes on, and looks at
 * its end alone: a loop that tests at its head runs once more, every lane masked. The file computes the same without this.
 */
export function testAtEnd(source: string): string {
  const head = /for \(var ([^;\n]+); ([^;\n]+); ([^;\n]+)\) \{/.exec(source);
  if (!head) return source;
  const [matched, start, test, step] = head, open = head.index + matched.length, close = matchingBrace(source, open);
  const body = source.slice(open, close);
  if (/\bcontinue\b/.test(body)) throw new SyntaxError(`Cannot move the test of a loop over "${start}": it continues`);
  const loop = `loop {${testAtEnd(body)}  ${step}; if (!(${test})) { break; } }`;
  return `${source.slice(0, head.index)}{ var ${start}; if (${test}) { ${loop} } }${
    testAtEnd(source.slice(close + 1))
  }`;
}

/** Indices and last arguments made of integers alone become one integer: drivers keep such arrays in registers. */
function fold(body: string, known: Known): string {
  const literal = (text: string) => /\du\b/.test(text) && /^(?:\b\d+u?\b|[\s+*/%()-])+$/.test(text);
  const spelled = body.replace(/\b[A-Z][A-Z_0-9]*\b/g, (name) => Object.hasOwn(known, name) ? `${known[name]}u` : name);
  return spelled
    .replace(/\[([^[\]]+)\]/g, (whole, index) => literal(index) ? `[${evaluate(index, known)}u]` : whole)
    .replace(/, ([^(),]+)\)/g, (whole, argument) => literal(argument) ? `, ${evaluate(argument, known)}u)` : whole);
}

const HEAD =
  /^([ \t]*)\/\/ unroll\b(?: up to (\d+))?[^\n]*\n[ \t]*for \(var (\w+) = ([^;]+); \3 < ([^;]+); (?:\3\+\+|\3 \+= ([^)]+))\) \{/m;

function expand(source: string, known: Known): string {
  let done = "", rest = source;
  for (let head = HEAD.exec(rest); head; head = HEAD.exec(rest)) {
    const [matched, indent, most, name, start, end, step] = head;
    const open = head.index + matched.length;
    const first = evaluate(start!, known),
      last = evaluate(end!, known),
      by = step === undefined ? 1 : evaluate(step, known);
    if (!(by > 0)) throw new SyntaxError(`Cannot unroll a loop: its step "${step}" is ${by}`);
    if (most !== undefined && (last - first) / by > Number(most)) {
      done += rest.slice(0, open);
      rest = rest.slice(open);
      continue;
    }
    const close = matchingBrace(rest, open);
    const body = rest.slice(open, close);
    // Not what follows a dot: a member of that name.
    const use = new RegExp(`(?<!\\.)\\b${name}\\b`, "g");
    let copies = "";
    for (let value = first; value < last; value += by) {
      copies += `${indent}{${fold(expand(body.replace(use, `${value}u`), known), known)}}\n`;
    }
    done += rest.slice(0, head.index) + copies;
    rest = rest.slice(close + 1);
  }
  return done + rest;
}

/** `const NAME = 8u;` and defaulted overrides of the file. */
function declaredConstants(source: string): Record<string, number> {
  const found: Record<string, number> = {};
  for (const [, name, value] of source.matchAll(/^(?:const|override) (\w+)(?:: *u32)? = (\d+)u?;/gm)) {
    found[name!] = Number(value);
  }
  return found;
}

function matchingBrace(source: string, from: number): number {
  let depth = 1;
  for (let at = from; at < source.length; at++) {
    if (source[at] === "{") depth++;
    else if (source[at] === "}" && --depth === 0) return at;
  }
  throw new SyntaxError("Cannot read a loop: its closing brace is missing");
}

/** Integer arithmetic with the usual precedence, left to right, division rounding down. */
function evaluate(expression: string, known: Known): number {
  const tokens = expression.match(/\w+|[^\w\s]/g) ?? [];
  let at = 0;
  const fail = (token: string | undefined): never => {
    throw new SyntaxError(`Cannot unroll a loop: "${token ?? "the end"}" in "${expression}" is not a known constant`);
  };
  const atom = (): number => {
    const token = tokens[at++] ?? "";
    if (token === "(") {
      const value = sum();
      return tokens[at++] === ")" ? value : fail(tokens[at - 1]);
    }
    if (/^\d+u?$/.test(token)) return parseInt(token);
    return Object.hasOwn(known, token) ? known[token]! : fail(tokens[at - 1]);
  };
  const product = (): number => {
    let value = atom();
    while (tokens[at] === "*" || tokens[at] === "/" || tokens[at] === "%") {
      const operator = tokens[at++], right = atom();
      value = operator === "*" ? value * right : operator === "/" ? Math.floor(value / right) : value % right;
    }
    return value;
  };
  const sum = (): number => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") {
      value = tokens[at++] === "+" ? value + product() : value - product();
    }
    return value;
  };
  const value = sum();
  return at === tokens.length ? value : fail(tokens[at]);
}
