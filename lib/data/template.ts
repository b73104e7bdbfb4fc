/**
 * The chat template: messages to the text that the model reads. The blog's template is the default; any other is Jinja
 * text, rendered by @huggingface/jinja. Refuses to guess: a template that does not parse or render is an error.
 */
import { Template } from "@huggingface/jinja";

/** One turn of a conversation; `role` is "system", "user", "assistant" or what else the template knows. */
export interface Message {
  readonly role: string;
  readonly content: string;
}

/** What makes a template: Jinja text, the system prompt ("" for none) and the texts of the special tokens. */
export interface TemplateSource {
  readonly template: string;
  readonly system: string;
  readonly eos_token: string;
  readonly bos_token?: string;
}

/** A template ready for use. */
export interface ChatTemplate {
  readonly source: TemplateSource;
  /** The text of `messages`, with the system prompt before them unless they bring their own; `open` begins an answer. */
  render(messages: readonly Message[], options?: { readonly open?: boolean }): string;
  /** The text up to where the answer to `question` begins. */
  renderPrompt(question: string): string;
}

/** The blog's system prompt. */
export const BLOG_SYSTEM =
  "You are a medical AI assistant. Provide accurate, evidence-based answers to medical questions.";

/** The blog's prompt as Jinja. The blog has one question and one answer; a turn that follows begins after the eos token. */
export const BLOG_TEMPLATE = `{% for message in messages %}
{% if message.role == 'system' %}
{{ '### System:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}
{{ '### User:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}
{{ '### Assistant:\\n' + message.content }}
{%- if not loop.last %}
{{ eos_token + '\\n\\n' }}
{%- endif %}
{% else %}
{{ raise_exception('the role "' + message.role + '" is not system, user or assistant') }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Assistant:\\n' }}
{%- endif %}`;

/** Parses a template; throws a SyntaxError when the Jinja text is wrong, and so does `render` when it does not fit. */
export function chatTemplate(source: TemplateSource): ChatTemplate {
  const { template, system, eos_token, bos_token = "" } = source;
  const jinja = attempt("parse", () => new Template(template));
  const render: ChatTemplate["render"] = (messages, { open = false } = {}) => {
    const own = system === "" || messages[0]?.role === "system";
    return attempt("render", () =>
      jinja.render({
        messages: own ? messages : [{ role: "system", content: system }, ...messages],
        add_generation_prompt: open,
        eos_token,
        bos_token,
      }));
  };
  return { source, render, renderPrompt: (question) => render([{ role: "user", content: question }], { open: true }) };
}

/** Reads the template.json that stage 03 writes; throws when it lacks a field. */
export function readTemplate(path: string): ChatTemplate {
  let source: Partial<TemplateSource>;
  try {
    source = JSON.parse(Deno.readTextFileSync(path));
  } catch (error) {
    const state = error instanceof Deno.errors.NotFound ? 'run "deno task 03" first' : (error as Error).message;
    throw new Error(`Cannot read "${path}": ${state}`);
  }
  for (const field of ["template", "system", "eos_token"] as const) {
    if (typeof source[field] !== "string") throw new TypeError(`Cannot read "${path}": it has no text "${field}"`);
  }
  return chatTemplate(source as TemplateSource);
}

function attempt<T>(action: string, run: () => T): T {
  try {
    return run();
  } catch (error) {
    throw new SyntaxError(`Cannot ${action} the chat template: ${(error as Error).message}`);
  }
}
