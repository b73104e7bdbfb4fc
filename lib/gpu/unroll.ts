/**
 * Unrolls the loops of a WGSL file that are marked for it, because naga guards every loop with a 64-bit counter and
 * clamps every index that is not a literal. The file stays valid WGSL: without this transform it computes the same,
 * only slower.
 *
 * A marked loop stands under a line `// unroll` and has the form
 *
 *     for (var i = START; i < END; i += STEP) {      or  i++
 *
 * where START, END and STEP are made of integers, names in `constants`, `const NAME = 8u;` lines and + - * / %.
 */

/** Replaces each marked loop by its iterations, the counter and every index that follows from it written as literals. */
export function unroll(source: string, constants: Readonly<Record<string, number>>): string {
  const known = { ...declaredConstants(source), ...constants };
  return expand(source, known);
}

/** Indices and last arguments made of integers alone become one integer: drivers keep such arrays in registers. */
function fold(body: string, known: Readonly<Record<string, number>>): string {
  const literal = (text: string) => /^[\s\w+*/%()-]+$/.test(text) && !/[a-z_]\w/.test(text) && /^[^A-Z]*$/.test(text);
  const spelled = body.replace(/\b[A-Z][A-Z_0-9]*\b/g, (name) => name in known ? `${known[name]}u` : name);
  return spelled
    .replace(/\[([^[\]]+)\]/g, (whole, index) => literal(index) ? `[${evaluate(index, known)}u]` : whole)
    .replace(/, ([^(),]+)\)/g, (whole, argument) => literal(argument) ? `, ${evaluate(argument, known)}u)` : whole);
}

const HEAD =
  /^([ \t]*)\/\/ unroll[^\n]*\n[ \t]*for \(var (\w+) = ([^;]+); \2 < ([^;]+); (?:\2\+\+|\2 \+= ([^)]+))\) \{/m;

function expand(source: string, known: Readonly<Record<string, number>>): string {
  let done = "", rest = source;
  for (let head = HEAD.exec(rest); head; head = HEAD.exec(rest)) {
    const [matched, indent, name, start, end, step] = head;
    const open = head.index + matched.length;
    const close = matchingBrace(rest, open);
    const body = rest.slice(open, close);
    const use = new RegExp(`\\b${name}\\b`, "g");
    const last = evaluate(end!, known), by = step === undefined ? 1 : evaluate(step, known);
    let copies = "";
    for (let value = evaluate(start!, known); value < last; value += by) {
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
  throw new SyntaxError("Cannot unroll a loop: its closing brace is missing");
}

/** Integer arithmetic with the usual precedence, left to right, division rounding down. */
function evaluate(expression: string, known: Readonly<Record<string, number>>): number {
  const tokens = expression.match(/\w+|[-+*/%()]/g) ?? [];
  let at = 0;
  const atom = (): number => {
    const token = tokens[at++];
    if (token === "(") {
      const value = sum();
      at++;
      return value;
    }
    const value = /^\d+u?$/.test(token ?? "") ? parseInt(token!) : known[token ?? ""];
    if (value === undefined) {
      throw new SyntaxError(`Cannot unroll a loop: "${token}" in "${expression}" is not a known constant`);
    }
    return value;
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
    while (tokens[at] === "+" || tokens[at] === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    return value;
  };
  return sum();
}
