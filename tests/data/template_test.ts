/** Tests of the chat template against prompts that the reference tokenizer was given. Golden cases: fixtures/golden. */
import { assertEquals, assertThrows } from "@std/assert";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate, readTemplate } from "../../lib/data/template.ts";
import { loadTokenizer } from "../../lib/data/tokenizer.ts";
import { goldenPath, temporaryFolder } from "../check.ts";

const EOS = "<|endoftext|>";
const blog = chatTemplate({ template: BLOG_TEMPLATE, system: BLOG_SYSTEM, eos_token: EOS });

interface Case {
  readonly system: string;
  readonly user: string;
  readonly assistant: string;
  readonly prompt_text: string;
  readonly full_text: string;
  readonly prompt_ids: readonly number[];
  readonly full_ids: readonly number[];
}

for (const config of ["tiny", "odd"]) {
  Deno.test(`the blog's template gives the golden ${config} prompts and texts, character for character`, () => {
    const tokenizer = loadTokenizer(goldenPath(`${config}/tokenizer`));
    const cases: Case[] = JSON.parse(Deno.readTextFileSync(goldenPath(`${config}/tokenizer_cases.json`))).template;
    assertEquals(cases.length, 6);
    for (const { system, user, assistant, prompt_text, full_text, prompt_ids, full_ids } of cases) {
      const { renderPrompt, render } = chatTemplate({ ...blog.source, system });
      const full = render([{ role: "user", content: user }, { role: "assistant", content: assistant }]);
      assertEquals(renderPrompt(user), prompt_text);
      assertEquals(full + EOS, full_text);
      assertEquals(tokenizer.encode(renderPrompt(user)), prompt_ids);
      assertEquals(tokenizer.encode(full + EOS), full_ids);
    }
  });
}

Deno.test("renderPrompt() is the blog's prompt to the letter", () => {
  assertEquals(
    blog.renderPrompt("What is a stent?"),
    "### System:\nYou are a medical AI assistant. Provide accurate, evidence-based answers to medical questions.\n\n" +
      "### User:\nWhat is a stent?\n\n### Assistant:\n",
  );
});

Deno.test("render() puts no system prompt before messages that bring one, or when it is empty", () => {
  const user = { role: "user", content: "a" };
  assertEquals(blog.render([{ role: "system", content: "s" }, user]), "### System:\ns\n\n### User:\na\n\n");
  assertEquals(chatTemplate({ ...blog.source, system: "" }).render([user]), "### User:\na\n\n");
});

Deno.test("the blog's template ends every answer but the last with the eos token", () => {
  const turns = ["user", "assistant", "user", "assistant"].map((role, i) => ({ role, content: `${i}` }));
  assertEquals(
    chatTemplate({ ...blog.source, system: "" }).render(turns),
    `### User:\n0\n\n### Assistant:\n1${EOS}\n\n### User:\n2\n\n### Assistant:\n3`,
  );
});

Deno.test("chatTemplate() renders a ChatML template with the special tokens it names", () => {
  const template = "{{ bos_token }}{% for message in messages %}" +
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}{% endfor %}" +
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  const chat = chatTemplate({ template, system: "", eos_token: "<|im_end|>", bos_token: "<s>" });
  assertEquals(chat.renderPrompt(" Hi "), "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
});

Deno.test("chatTemplate() throws a SyntaxError for Jinja that does not parse, or roles that the template refuses", () => {
  const wrong = { template: "{% for %}", system: "", eos_token: EOS };
  assertThrows(() => chatTemplate(wrong), SyntaxError, "Cannot parse the chat template");
  assertThrows(() => blog.render([{ role: "tool", content: "" }]), SyntaxError, 'the role "tool" is not');
});

Deno.test("readTemplate() reads what stage 03 writes and names the field that is missing", () => {
  using folder = temporaryFolder();
  const path = folder.at("template.json");
  Deno.writeTextFileSync(path, JSON.stringify({ ...blog.source, eos_token_id: 7 }));
  assertEquals(readTemplate(path).renderPrompt("q"), blog.renderPrompt("q"));
  Deno.writeTextFileSync(path, JSON.stringify({ template: "" }));
  assertThrows(() => readTemplate(path), TypeError, 'it has no text "system"');
  Deno.removeSync(path);
  assertThrows(() => readTemplate(path), Error, 'run "deno task 03" first');
});
