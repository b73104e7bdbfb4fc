/** Tests of the tokenizer against the reference library's ids, and of its streaming decoder. Golden cases: fixtures/golden. */
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { loadTokenizer, streamDecoder, type Tokenizer } from "../../lib/data/tokenizer.ts";
import { goldenPath } from "../check.ts";

const json = (path: string) => JSON.parse(Deno.readTextFileSync(goldenPath(path)));

interface Case {
  readonly text: string;
  readonly ids: readonly number[];
  readonly decoded: string;
}

for (const config of ["tiny", "odd"]) {
  const tokenizer = loadTokenizer(goldenPath(`${config}/tokenizer`));
  const { strings }: { strings: Case[] } = json(`${config}/tokenizer_cases.json`);

  Deno.test(`encode() gives the reference's ids on the ${config} strings`, () => {
    for (const { text, ids } of strings) assertEquals(tokenizer.encode(text), ids, JSON.stringify(text));
    assertEquals(strings.length, 60);
  });

  Deno.test(`decode() gives the reference's text on the ${config} strings`, () => {
    for (const { ids, decoded } of strings) assertEquals(tokenizer.decode(ids), decoded);
  });

  Deno.test(`streamDecoder() adds up to decode() on the ${config} strings`, () => {
    for (const { ids, decoded } of strings) assertEquals(stream(tokenizer, ids).join(""), decoded);
  });
}

Deno.test("loadTokenizer() finds the end-of-text token and the size of the vocabulary", () => {
  const { vocabSize, eosId, eosToken, bosToken } = loadTokenizer(goldenPath("tiny/tokenizer"));
  assertEquals([vocabSize, eosId, eosToken, bosToken], [384, 383, "<|endoftext|>", "<|endoftext|>"]);
});

Deno.test("loadTokenizer() throws when no eos token is named", () => {
  const dir = folder({ config: { eos_token: null } });
  assertThrows(() => loadTokenizer(dir), Error, "it names no eos_token");
  assertThrows(() => loadTokenizer(folder({ config: { eos_token: "</s>" } })), Error, 'its vocabulary lacks "</s>"');
  assertThrows(() => loadTokenizer(`${dir}/none`), Error, "no such folder: a tokenizer folder is wanted");
});

Deno.test("loadTokenizer() reads the chat template from the config, a list of them, or its file", () => {
  assertEquals(loadTokenizer(folder({})).chatTemplate, undefined);
  assertEquals(loadTokenizer(folder({ config: { chat_template: "a" } })).chatTemplate, "a");
  const several = [{ name: "tool_use", template: "b" }, { name: "default", template: "c" }];
  assertEquals(loadTokenizer(folder({ config: { chat_template: several } })).chatTemplate, "c");
  const dir = folder({});
  Deno.writeTextFileSync(`${dir}/chat_template.jinja`, "d");
  assertEquals(loadTokenizer(dir).chatTemplate, "d");
});

Deno.test("encode() takes U+0085 for white space and U+FEFF for none, as the reference does", () => {
  // With these two merges a space joins the next bytes only when both are in one pre-token.
  const tokenizer = loadTokenizer(folder({ merges: ["Ġ Â", "Ġ ï"] }));
  const pieces = (text: string) => tokenizer.encode(text).map((id) => tokenizer.decode([id]));
  const half = "\uFFFD"; // one byte of a character
  assertEquals(pieces(" \u00b5x"), [` ${half}`, half, "x"]); // one pre-token, so the first merge is made
  assertEquals(pieces(" \u0085x"), [" ", half, half, "x"]); // a space, then U+0085 as white space of its own
  assertEquals(pieces(" \ufeffx"), [` ${half}`, half, half, "x"]); // U+FEFF goes with the space before it
});

Deno.test("encode() reads a special token in the text as the token, unless the text is escaped", () => {
  const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"), { escapes: true });
  const text = "a<|endoftext|>b";
  assertEquals(tokenizer.encode(text)[1], tokenizer.eosId);
  const escaped = tokenizer.encode(tokenizer.escape(text));
  assertEquals(escaped.includes(tokenizer.eosId), false);
  assertEquals(tokenizer.decode(escaped), text);
  assertEquals(
    tokenizer.encode("\u0085 \ufeff é\n"),
    loadTokenizer(goldenPath("tiny/tokenizer")).encode("\u0085 \ufeff é\n"),
  );
  assertThrows(() => loadTokenizer(goldenPath("tiny/tokenizer")).escape(text), Error, "without `escapes`");
});

Deno.test("decode() can leave special tokens out", () => {
  const tokenizer = loadTokenizer(goldenPath("odd/tokenizer"));
  const ids = [...tokenizer.encode("Yes."), tokenizer.eosId];
  assertEquals(tokenizer.decode(ids), "Yes.<|endoftext|>");
  assertEquals(tokenizer.decode(ids, { skipSpecialTokens: true }), "Yes.");
  assertEquals(tokenizer.decode([], { skipSpecialTokens: true }), "");
});

Deno.test("streamDecoder() never gives half a character", () => {
  const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"));
  const text = "37 \u00b0C \u2265 3 \u00b5g \u{1F600} ok";
  const pieces = stream(tokenizer, tokenizer.encode(text));
  assertEquals(pieces.join(""), text);
  assertEquals(pieces.some((piece) => piece.includes("\uFFFD")), false);
  assertEquals(pieces.includes("\u{1F600}"), true); // four tokens, one piece
});

Deno.test("streamDecoder() gives at the end what never became a character", () => {
  const tokenizer = loadTokenizer(goldenPath("tiny/tokenizer"));
  const cut = tokenizer.encode("a\u{1F600}").slice(0, -1);
  const decoder = streamDecoder(tokenizer);
  assertEquals(cut.map((id) => decoder.push(id)).join(""), "a");
  assertStringIncludes(decoder.end(), "\uFFFD");
  assertEquals(decoder.end(), "");
});

function stream(tokenizer: Tokenizer, ids: readonly number[]): string[] {
  const decoder = streamDecoder(tokenizer);
  return [...ids.map((id) => decoder.push(id)), decoder.end()];
}

/** The tiny tokenizer with other merges (and the tokens they make) and other settings, in a folder of its own. */
function folder(change: { merges?: readonly string[]; config?: Readonly<Record<string, unknown>> }): string {
  const tokenizer = json("tiny/tokenizer/tokenizer.json");
  if (change.merges !== undefined) {
    tokenizer.model.merges = change.merges.map((merge) => merge.split(" "));
    change.merges.forEach((merge, i) => tokenizer.model.vocab[merge.replace(" ", "")] ??= 1000 + i);
  }
  const dir = Deno.makeTempDirSync();
  globalThis.addEventListener("unload", () => Deno.removeSync(dir, { recursive: true }));
  Deno.writeTextFileSync(`${dir}/tokenizer.json`, JSON.stringify(tokenizer));
  const config = { ...json("tiny/tokenizer/tokenizer_config.json"), ...change.config };
  Deno.writeTextFileSync(`${dir}/tokenizer_config.json`, JSON.stringify(config));
  return dir;
}
