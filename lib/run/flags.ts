/**
 * The one configuration idea: an object of defaults, each of them a flag of the same name and type. It reads no file but,
 * with --as-made, the manifest of the last run, no environment but RECIPE and DEBUG, and it refuses a flag or a value that
 * it does not understand.
 */
import { parseArgs } from "@std/cli";
import { readManifest } from "./manifest.ts";
import { endProgress } from "./print.ts";

/** The two sets of defaults: `tiny` is the bundled fixture, `blog` the blog post's configuration. */
export type Recipe = "tiny" | "blog";

/** A default that depends on the recipe; made by {@link byRecipe}. */
export interface ByRecipe<T> {
  readonly kind: "byRecipe";
  readonly values: Readonly<Record<Recipe, T>>;
}

/** A flag that takes one of the listed words; made by {@link choice}. */
export interface Choice<T extends string> {
  readonly kind: "choice";
  readonly words: readonly T[];
  readonly byDefault: Readonly<Record<Recipe, T>>;
}

type Value<T> = T extends ByRecipe<infer V> ? Value<V>
  : T extends Choice<infer W> ? W
  : T extends number ? number
  : T extends string ? string
  : T extends boolean ? boolean
  : T extends readonly string[] ? string[]
  : never;

/** What {@link flags} returns: every default's key with a value of its type, and the flags that every script has. */
export type Flags<T> =
  & { -readonly [K in keyof T]: Value<T[K]> }
  & { recipe: Recipe; out: string; asMade: boolean; force: boolean; verbose: boolean; help: boolean; _: string[] };

/** How {@link flags} reads words that are not flags and flags that are known by another name. */
export interface FlagOptions {
  /** Words without a flag land in `_` instead of being an error. */
  readonly positional?: boolean;
  /** False for what is no stage: it has no folder to write, and none of the flags about that. */
  readonly stage?: boolean;
  /** Another camelCase name, such as that of another tool, to the name here: it works too and prints a note. */
  readonly aliases?: Readonly<Record<string, string>>;
}

type Bound<T> = { readonly [K in keyof T]?: T[K] extends number ? number : never };

/** A string default that means "not given". */
export const unset: string = "";

const RECIPES: readonly Recipe[] = ["tiny", "blog"];
const COMMON: Readonly<Record<string, string>> = {
  recipe: "tiny | blog: which defaults (also RECIPE=)",
  out: "where to write",
  asMade: "for flags that are not given: the values of the last run, not the defaults",
  force: "run although everything is up to date",
  verbose: "print more",
  help: "print this",
};

/** The flags of each result that stood on the command line. */
const typed = new WeakMap<object, readonly string[]>();

/** A default that depends on the recipe: `byRecipe({ tiny: 4, blog: 16 })`. */
export function byRecipe<T>(values: { readonly tiny: T; readonly blog: T }): ByRecipe<T> {
  return { kind: "byRecipe", values };
}

/** A flag that takes one of `words`; the first is the default unless one is given, by recipe or for both. */
export function choice<T extends string>(
  words: readonly T[],
  byDefault?: NoInfer<T> | { readonly tiny: NoInfer<T>; readonly blog: NoInfer<T> },
): Choice<T> {
  const chosen = byDefault ?? words[0]!;
  return { kind: "choice", words, byDefault: typeof chosen === "string" ? { tiny: chosen, blog: chosen } : chosen };
}

/**
 * Reads the command line of the script `meta`: each key of `defaults` is a flag (`maxSteps` is `--max-steps`), typed by
 * its default; `--help` prints the script's header comment and the flags, and exits 0. Also installs the handler that
 * prints an uncaught error of the form "Cannot x: y" as that one line on stderr and exits 1 (DEBUG=1 adds the stack).
 * Throws a SyntaxError for an unknown flag or a value of the wrong type.
 *
 * @example
 * ```ts
 * import { byRecipe, choice, flags } from "./flags.ts";
 * const opt = flags(import.meta, { lr: 2e-4, maxSteps: byRecipe({ tiny: 60, blog: 0 }), mode: choice(["qlora", "lora"]) });
 * opt.lr.toFixed(6); // a number
 * ```
 */
export function flags<const T extends Readonly<Record<string, unknown>>>(
  meta: ImportMeta,
  defaults: T,
  options: FlagOptions = {},
): Flags<T> {
  installErrorHandler();
  const path = meta.filename ?? "";
  const script = scriptName(path),
    made = (out: string, recipe: Recipe) => {
      const before = readManifest(out);
      return before?.script === script && before.flags.recipe === recipe ? before.flags : undefined;
    };
  const opt = parseFlags(Deno.args, defaults, { ...options, script, made, recipe: Deno.env.get("RECIPE") });
  if (opt.help) {
    console.log(helpText(Deno.readTextFileSync(path), defaults, opt));
    Deno.exit(0);
  }
  return opt;
}

/**
 * {@link flags} without its side effects: `script` names the default `out`, `recipe` is the environment's, `made` the flags
 * that the result in a folder was made with.
 */
export function parseFlags<const T extends Readonly<Record<string, unknown>>>(
  args: readonly string[],
  defaults: T,
  options: FlagOptions & {
    readonly script: string;
    readonly recipe?: string | undefined;
    readonly made?: (out: string, recipe: Recipe) => Readonly<Record<string, unknown>> | undefined;
  },
): Flags<T> {
  const all: Readonly<Record<string, unknown>> = {
    ...defaults,
    recipe: "",
    ...(options.stage === false
      ? {}
      : { out: defaults.out ?? `artifacts/${options.script}`, asMade: false, force: false }),
    verbose: false,
    help: false,
  };
  const keys = new Map(Object.keys(all).map((key) => [kebab(key), key]));
  for (const [alias, key] of Object.entries(options.aliases ?? {})) keys.set(kebab(alias), key);
  const isBoolean = (name: string) => typeof resolve(all[keys.get(name)!], "tiny") === "boolean";
  const isList = (name: string) => Array.isArray(resolve(all[keys.get(name)!], "tiny"));
  const names = [...keys.keys()];

  const given = parseArgs(joinValues(args, keys, isBoolean), {
    string: [...names.filter((name) => !isBoolean(name)), "_"],
    collect: names.filter((name) => isBoolean(name) || isList(name)), // so that "not given" is [] and not false
    boolean: names.filter(isBoolean),
    negatable: names.filter(isBoolean),
    alias: { h: "help" },
    unknown: (argument, key) => {
      if (key !== undefined) {
        const shown = Object.keys(all).map((key) => "--" + kebab(key)).join(" ");
        throw new SyntaxError(`Cannot read flag "${argument.split("=")[0]}": this script has ${shown}`);
      }
      if (!options.positional) {
        throw new SyntaxError(`Cannot read "${argument}": this script takes no words without a flag`);
      }
    },
  });

  const texts = new Map<string, string | boolean>();
  for (const [name, key] of keys) {
    const values = [given[name] ?? []].flat(),
      value = isList(name) && values.length > 0 ? values.join() : values.at(-1);
    if (value === undefined) continue;
    texts.set(key, value as string | boolean);
    if (name !== kebab(key)) console.error(`Note: --${name} is called --${kebab(key)} here`);
  }
  const recipe = (texts.get("recipe") ?? (options.recipe === "" ? undefined : options.recipe) ?? RECIPES[0]) as Recipe;
  if (!RECIPES.includes(recipe)) {
    throw new SyntaxError(`Cannot read recipe "${recipe}": the recipes are ${RECIPES.join(", ")}`);
  }
  const result: Record<string, unknown> = {};
  for (const [key, standard] of Object.entries(all)) {
    result[key] = key === "recipe" ? recipe : convert(kebab(key), texts.get(key), standard, recipe);
  }
  if (texts.get("out") === "") throw ill("out", "", "a folder's name");
  const made = result.asMade ? options.made?.(result.out as string, recipe) ?? {} : {};
  for (const key of Object.keys(defaults)) {
    const words = choiceWords(defaults[key], recipe), value = made[key];
    if (texts.has(key) || typeof value !== typeof result[key] || words?.includes(value as string) === false) continue;
    result[key] = value;
  }
  const opt = { ...result, _: given._.map(String) } as Flags<T>;
  typed.set(opt, Object.keys(defaults).filter((key) => texts.has(key)).map((key) => `--${kebab(key)}`));
  return opt;
}

/**
 * The script's own flags that stood on the command line, as `--max-steps`; not those that the recipe or the last run decided.
 */
export function givenFlags(opt: Flags<unknown>): readonly string[] {
  return typed.get(opt) ?? [];
}

/**
 * Throws a RangeError that names the flag where a number is less than `whole` or `real` say, or in `whole` and not a whole
 * number, or not less than `below` says.
 */
export function checkNumbers<T extends Readonly<Record<string, unknown>>>(
  opt: T,
  { whole = {}, real = {}, below = {} }: {
    readonly whole?: Bound<T>;
    readonly real?: Bound<T>;
    readonly below?: Bound<T>;
  },
): void {
  for (const [key, least] of Object.entries({ ...whole, ...real })) {
    const value = opt[key] as number;
    if (value >= least && (key in real || Number.isSafeInteger(value))) continue;
    const wanted = key in real ? "a number" : "a whole number", most = value > least && Number.isInteger(value);
    throw new RangeError(
      `Cannot use --${kebab(key)} ${value}: ${wanted} of at least ${least} is wanted${
        most ? ", and less than 2^53" : ""
      }`,
    );
  }
  for (const [key, bound] of Object.entries(below)) {
    if ((opt[key] as number) < (bound as number)) continue;
    throw new RangeError(`Cannot use --${kebab(key)} ${opt[key]}: a number below ${bound} is wanted`);
  }
}

/** The script's header comment and one line per flag: its default and the comment that stands beside it in `source`. */
export function helpText(source: string, defaults: Readonly<Record<string, unknown>>, opt: Flags<unknown>): string {
  const header = /\/\*\*([\s\S]*?)\*\//.exec(source)?.[1] ?? "";
  const lines = header.split("\n").map((line) => line.replace(/^\s*\* ?/, "").trimEnd());
  const values = opt as unknown as Readonly<Record<string, unknown>>;
  const common = Object.keys(COMMON).filter((key) => key in values);
  const rows = [...new Set([...Object.keys(defaults), ...common])].map((key) => {
    const beside = new RegExp(`^\\s+${key}:.*,\\s*//\\s*(.+)$`, "m").exec(source)?.[1];
    const standard = defaults[key] ?? (typeof values[key] === "boolean" ? false : values[key]);
    const words = isChoice(standard) ? standard.words.join(" | ") : "";
    const about = beside ?? (words === "" ? COMMON[key] ?? "" : "");
    return [
      `--${kebab(key)}`,
      show(resolve(standard, opt.recipe)),
      [words, about].filter(Boolean).join("; "),
    ];
  });
  const width = (column: number) => Math.min(32, Math.max(...rows.map((row) => row[column]!.length)));
  const [first, second] = [width(0), width(1)];
  const table = rows.map(([flag, value, about]) =>
    `  ${flag!.padEnd(first)}  ${value!.padEnd(second)}  ${about}`.trimEnd()
  );
  return [lines.join("\n").trim(), "", `flags (recipe ${opt.recipe})`, ...table].join("\n");
}

/**
 * From here on an uncaught error or rejection prints one line on stderr where it is for the user: a message of the form
 * "Cannot x: y", or what the operating system refused, such as a full disk. Any other prints its stack. All exit 1.
 */
export function installErrorHandler(): void {
  const report = (event: Event, error: unknown) => {
    event.preventDefault();
    const message = error instanceof Error ? error.message : "";
    const refused = /^(?!Cannot ).*\(os error \d+\)/.test(message) || error instanceof Deno.errors.NotCapable;
    const line = refused ? `Cannot go on: ${message.charAt(0).toLowerCase()}${message.slice(1)}` : message;
    endProgress();
    // V8 too says "Cannot read properties of undefined", but without the colon that tells what is wanted
    console.error(/^Cannot [^]*: /.test(line) && Deno.env.get("DEBUG") !== "1" ? line : error);
    Deno.exit(1);
  };
  globalThis.addEventListener("unhandledrejection", (event) => report(event, event.reason));
  globalThis.addEventListener("error", (event) => report(event, event.error));
}

/** Ties each value to its flag, so that "-1" and "" can be values and a flag without one is an error. */
function joinValues(args: readonly string[], keys: ReadonlyMap<string, string>, isBoolean: (name: string) => boolean) {
  const joined: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const [, name, value] = /^--([^=]+)(=[^]*)?$/.exec(args[i]!) ?? [];
    if (args[i] === "--") return [...joined, ...args.slice(i)];
    if (name !== undefined && keys.has(name) && isBoolean(name) && value !== undefined) {
      if (!/^=(true|false)$/.test(value)) throw ill(name, value.slice(1), "true or false");
    } else if (name !== undefined && keys.has(name) && !isBoolean(name) && value === undefined) {
      const next = args[i + 1];
      if (next === undefined || next.startsWith("--")) {
        throw new SyntaxError(`Cannot read flag "--${name}": a value must follow it`);
      }
      joined.push(`--${name}=${next}`);
      i++;
      continue;
    }
    joined.push(args[i]!);
  }
  return joined;
}

function convert(name: string, text: string | boolean | undefined, standard: unknown, recipe: Recipe): unknown {
  const byDefault = resolve(standard, recipe);
  if (text === undefined) return Array.isArray(byDefault) ? [...byDefault] : byDefault;
  if (typeof byDefault === "boolean") return text;
  const value = String(text);
  const words = choiceWords(standard, recipe);
  if (words !== undefined) {
    if (!words.includes(value)) throw ill(name, value, `one of ${words.join(", ")}`);
    return value;
  }
  if (Array.isArray(byDefault)) return value.split(",").map((word) => word.trim()).filter((word) => word !== "");
  // A folder has one name, with a slash at its end and without.
  if (typeof byDefault === "string") return /^\S*[^\s/]\/+$/.test(value) ? value.replace(/\/+$/, "") : value;
  if (value.trim() === "" || !Number.isFinite(Number(value))) throw ill(name, value, "a finite number");
  return Number(value);
}

function ill(name: string, value: string, wanted: string): SyntaxError {
  return new SyntaxError(`Cannot read flag "--${name}": "${value}" is not ${wanted}`);
}

function resolve(standard: unknown, recipe: Recipe): unknown {
  if (isChoice(standard)) return standard.byDefault[recipe];
  return isKind(standard, "byRecipe") ? resolve((standard as ByRecipe<unknown>).values[recipe], recipe) : standard;
}

function choiceWords(standard: unknown, recipe: Recipe): readonly string[] | undefined {
  if (isKind(standard, "byRecipe")) return choiceWords((standard as ByRecipe<unknown>).values[recipe], recipe);
  return isChoice(standard) ? standard.words : undefined;
}

function isChoice(value: unknown): value is Choice<string> {
  return isKind(value, "choice");
}

function isKind(value: unknown, kind: string): boolean {
  return typeof value === "object" && value !== null && (value as { kind?: unknown }).kind === kind;
}

function show(value: unknown): string {
  if (Array.isArray(value)) return value.join(",");
  return value === "" ? "(none)" : String(value);
}

function kebab(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => "-" + letter.toLowerCase());
}

function scriptName(path: string): string {
  return path.replace(/^.*[\\/]/, "").replace(/\.[a-z]+$/, "");
}
