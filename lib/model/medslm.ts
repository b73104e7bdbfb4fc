/**
 * A MedSLM checkpoint as a Hugging Face Llama: its settings, its tensor names, its row order, tensor by tensor.
 * Refuses to guess: an unknown, missing or misshapen tensor and a setting that the shapes contradict are errors that name it.
 */
import { firstUnfit, fromFloat32, toFloat32 } from "../data/dtype.ts";
import { exists, readJsonObject } from "../data/files.ts";
import { openModel, openSafetensors, type TensorInfo, type TensorSource } from "../data/safetensors.ts";
import { tokenizerFiles } from "../data/tokenizer.ts";
import { openTorchCheckpoint } from "../data/torch_zip.ts";
import { checkConfig, type LinearModule, type ModelConfig, moduleName, parameterShapes } from "./config.ts";
import { readSettings } from "./medslm_settings.ts";

/** An open checkpoint: its folder, its settings as found and what was noticed while opening it. */
export interface Checkpoint {
  readonly folder: string;
  readonly source: TensorSource;
  readonly settings: Readonly<Record<string, unknown>>;
  readonly notes: readonly string[];
}

/** One tensor to convert; `how` says what its new name rests on, `headDim` is 0 or the width of heads whose rows are reordered. */
export interface Mapping {
  readonly from: string;
  readonly name: string;
  readonly shape: readonly number[];
  readonly how: string;
  readonly headDim: number;
}

/** How a whole checkpoint converts: `mappings` in model order, `skipped` buffers, `notes` for the reader. */
export interface Conversion {
  readonly config: ModelConfig;
  readonly mappings: readonly Mapping[];
  readonly skipped: readonly string[];
  readonly notes: readonly string[];
}

/** The blog's table: inside `blocks.{i}.`, and at the top. */
const BLOCK_NAMES: Readonly<Record<string, LinearModule>> = {
  "attn.wq.weight": "q_proj",
  "attn.wk.weight": "k_proj",
  "attn.wv.weight": "v_proj",
  "attn.wo.weight": "o_proj",
  "ffn.w_gate.weight": "gate_proj",
  "ffn.w_up.weight": "up_proj",
  "ffn.w_down.weight": "down_proj",
};
const TOP_NAMES: ReadonlyMap<string, string> = new Map([
  ["tok_emb.weight", "model.embed_tokens.weight"],
  ["norm_f.weight", "model.norm.weight"],
]);
const HEAD = "lm_head.weight";
const EMBEDDING = "model.embed_tokens.weight";

/** Buffers that a module may save and that follow from the settings: rotation tables and causal masks. */
const BUFFERS: ReadonlySet<string> = new Set(
  ("inv_freq freqs_cis freqs_cos freqs_sin rope_cos rope_sin cos_cached sin_cached cos_cache sin_cache cos sin " +
    "causal_mask attn_mask mask tril").split(" "),
);

const SECOND_WORDS: ReadonlySet<string> = new Set(["ffn", "mlp", "ff", "feed", "post", "2"]);
const FIRST_WORDS: ReadonlySet<string> = new Set(["attn", "attention", "att", "input", "pre", "1"]);

/**
 * Opens a checkpoint: a folder with model.safetensors, shards, or one .safetensors, .pt, .pth, .ckpt or .bin file; or such a file.
 * The settings are those of config.json beside it, else those stored in the file. Throws when there is not exactly one checkpoint.
 */
export function openCheckpoint(path: string): Checkpoint {
  let folder = path;
  let file: string | undefined;
  if (!exists(path)) throw new Error(`Cannot read "${path}": no such file or folder`);
  if (isFile(path)) [folder, file] = [folderOf(path), path];
  else if (!exists(`${folder}/model.safetensors`) && !exists(`${folder}/model.safetensors.index.json`)) {
    const names = [...Deno.readDirSync(folder)].map((entry) => entry.name).sort();
    const safe = names.filter((name) => name.endsWith(".safetensors"));
    const found = safe.length > 0 ? safe : names.filter((name) => /\.(pt|pth|ckpt|bin)$/.test(name));
    if (found.length !== 1) {
      const state = found.length === 0 ? "no checkpoint (.safetensors, .pt, .pth, .ckpt, .bin)" : found.join(", ");
      throw new Error(`Cannot read "${path}": it holds ${state}: name one checkpoint file`);
    }
    file = `${folder}/${found[0]}`;
  }
  const beside = exists(`${folder}/config.json`) ? readJsonObject(`${folder}/config.json`) : undefined;
  if (file === undefined || file.endsWith(".safetensors")) {
    const source = file === undefined ? openModel(folder) : openSafetensors(file);
    return { folder, source, settings: beside ?? {}, notes: [] };
  }
  const source = openTorchCheckpoint(file);
  return { folder, source, settings: beside ?? source.config ?? {}, notes: source.notes };
}

/**
 * Decides every tensor's new name and the configuration. `interleaved` says that the checkpoint's RoPE rotates adjacent rows, which
 * no file records; `given` adds settings that the checkpoint lacks. Throws on anything unknown, missing or contradictory.
 */
export function planConversion(
  { source, settings, notes: before }: Checkpoint,
  { interleaved, dtype, given = {} }: {
    readonly interleaved: boolean;
    readonly dtype: ModelConfig["dtype"];
    readonly given?: Readonly<Record<string, unknown>>;
  },
): Conversion {
  const notes = [...before];
  const skipped: string[] = [];
  const found = new Map<string, { info: TensorInfo; how: string }>();
  const claim = (name: string, info: TensorInfo, how: string) => {
    const other = found.get(name);
    if (other) fail(source, `tensors "${other.info.name}" and "${info.name}" would both become "${name}"`);
    found.set(name, { info, how });
  };
  const rest: TensorInfo[] = [];
  const norms = new Map<number, TensorInfo[]>();
  for (const info of source.tensors.values()) {
    const block = /^blocks\.(0|[1-9]\d*)\.(.+)$/.exec(info.name);
    const module = block && Object.hasOwn(BLOCK_NAMES, block[2]!) ? BLOCK_NAMES[block[2]!] : undefined;
    if (TOP_NAMES.has(info.name)) claim(TOP_NAMES.get(info.name)!, info, "the blog's table");
    else if (module) claim(`${moduleName(Number(block![1]), module)}.weight`, info, "the blog's table");
    else if (isHuggingFace(info.name)) claim(info.name, info, "already its name");
    else if (BUFFERS.has(info.name.split(".").at(-1)!)) skipped.push(info.name);
    else if (block && info.shape.length === 1 && !info.name.endsWith(".bias")) {
      norms.set(Number(block[1]), [...(norms.get(Number(block[1])) ?? []), info]);
    } else rest.push(info);
  }

  const notPart = ({ name, dtype, shape }: TensorInfo): never =>
    fail(source, `the tensor "${name}" ${dtype} [${shape.join(", ")}] is not part of a Llama model`);
  // A checkpoint of another kind, or one whose names have a prefix, is told by a name rather than by what it lacks.
  if (rest[0] && found.size === 0) notPart(rest[0]);
  const { tied: said, ...sizes } = readSettings([settings, given], {
    path: source.path,
    shapeOf: (name) => found.get(name)?.info.shape,
    layers: 1 +
      Math.max(-1, ...[...found.keys()].map((name) => Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1))),
  });
  const config = { ...sizes, dtype, tie_word_embeddings: true };
  for (const [layer, infos] of norms) {
    if (infos.length !== 2 || infos.some((info) => info.shape[0] !== config.hidden_size)) {
      const listed = infos.map(({ name, shape }) => `"${name}" [${shape[0]}]`).join(", ");
      fail(source, `block ${layer} has ${listed}: two norms of [${config.hidden_size}] are wanted`);
    }
    const { ordered, how } = orderNorms(infos as [TensorInfo, TensorInfo]);
    claim(`model.layers.${layer}.input_layernorm.weight`, ordered[0], how);
    claim(`model.layers.${layer}.post_attention_layernorm.weight`, ordered[1], how);
  }
  const heads = rest.filter(({ name, shape }) =>
    !name.startsWith("blocks.") && same(shape, [config.vocab_size, config.hidden_size])
  );
  if (heads.length === 1 && !found.has(HEAD)) {
    claim(HEAD, heads[0]!, "its shape, the vocabulary's");
    rest.splice(rest.indexOf(heads[0]!), 1);
  }
  if (rest[0]) notPart(rest[0]);

  const head = found.get(HEAD);
  if (!head && said === false) {
    fail(source, "its settings say that the head is not tied to the embedding, but it has no head");
  }
  const equal = head !== undefined && sameBytes(source, head.info, found.get(EMBEDDING)!.info);
  if (equal) {
    notes.push(`"${head.info.name}" equals the embedding: dropped, the head is tied`);
    found.delete(HEAD);
  } else if (head && said === true) {
    notes.push(
      `its settings say that the head is tied, but "${head.info.name}" differs from the embedding: kept, untied`,
    );
  }
  const final: ModelConfig = { ...config, tie_word_embeddings: !head || equal };
  const mappings = parameterShapes(final).map(({ name, shape }): Mapping => {
    const { info, how } = found.get(name) ?? fail(source, `no tensor becomes "${name}" [${shape.join(", ")}]`);
    if (!same(info.shape, shape)) {
      fail(source, `"${info.name}" is [${info.shape.join(", ")}] but "${name}" must be [${shape.join(", ")}]`);
    }
    if (!["F32", "F16", "BF16", "F64"].includes(info.dtype)) {
      fail(source, `"${info.name}" is ${info.dtype}: weights must be F32, F16, BF16 or F64`);
    }
    const rotated = interleaved && /\.[qk]_proj\.weight$/.test(name);
    return { from: info.name, name, shape, how, headDim: rotated ? final.head_dim : 0 };
  });
  const used = new Set(mappings.map(({ name }) => name));
  for (const [name, { info }] of found) {
    if (!used.has(name)) fail(source, `"${info.name}" would become "${name}", which the model does not have`);
  }
  return { config: checkConfig(final, source.path), mappings, skipped, notes };
}

/** The bytes of one converted tensor in `dtype`; throws a RangeError at a value that is not finite or does not fit `dtype`. */
export function convertTensor(
  source: TensorSource,
  mapping: Mapping,
  dtype: "F32" | "F16" | "BF16",
): Uint8Array<ArrayBuffer> {
  const bytes = source.read(mapping.from);
  const from = source.tensors.get(mapping.from)!.dtype;
  const values = toFloat32(bytes, from);
  const unfit = firstUnfit(values, dtype);
  if (unfit >= 0) {
    throw new RangeError(
      `Cannot convert "${mapping.from}" of "${source.path}": value ${unfit} is ${
        values[unfit]
      }: a number that ${dtype} can hold is wanted`,
    );
  }
  const out = from === dtype ? bytes : fromFloat32(values, dtype);
  return mapping.headDim === 0 ? out : halfSplitRows(out, { rows: mapping.shape[0]!, headDim: mapping.headDim });
}

/**
 * Reorders the rows of each head from pairs (2j, 2j+1) to pairs (j, j + D/2), the order of Hugging Face's RoPE
 * (arXiv:2104.09864): new row j is old row 2j, new row D/2 + j is old row 2j + 1.
 */
export function halfSplitRows(
  bytes: Uint8Array,
  { rows, headDim }: { readonly rows: number; readonly headDim: number },
): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(bytes.length);
  const row = bytes.length / rows;
  for (let to = 0; to < rows; to++) {
    const [head, lane] = [Math.floor(to / headDim), to % headDim];
    const old = head * headDim + (lane < headDim / 2 ? 2 * lane : 2 * lane - headDim + 1);
    out.set(bytes.subarray(old * row, (old + 1) * row), to * row);
  }
  return out;
}

/** The names that a Llama has, the head included. */
function isHuggingFace(name: string): boolean {
  return name === HEAD || name === EMBEDDING || name === "model.norm.weight" ||
    /^model\.layers\.(0|[1-9]\d*)\.((self_attn\.[qkvo]|mlp\.(gate|up|down))_proj|(input|post_attention)_layernorm)\.weight$/
      .test(name);
}

/** Everything that decides a conversion of `path`: a folder, or a file with the settings and the tokenizer beside it. */
export function checkpointInputs(path: string): string[] {
  if (!isFile(path)) return [path];
  const folder = folderOf(path);
  return [path, ...[`${folder}/config.json`].filter(exists), ...tokenizerFiles(folder)];
}

function folderOf(file: string): string {
  return file.includes("/") ? file.replace(/\/[^/]*$/, "") : ".";
}

/** Which of a block's two norms comes first: by the words of their names, else by their position in the file. */
function orderNorms([a, b]: [TensorInfo, TensorInfo]): { ordered: [TensorInfo, TensorInfo]; how: string } {
  const rank = ({ name }: TensorInfo): number => {
    const words = name.split(".").slice(2).join(".").toLowerCase().split(/[._]|(?<=[a-z])(?=\d)/);
    return words.some((word) => SECOND_WORDS.has(word)) ? 2 : words.some((word) => FIRST_WORDS.has(word)) ? 1 : 1.5;
  };
  if (rank(a) === rank(b)) return { ordered: [a, b], how: "shape and position in the file" };
  return { ordered: rank(a) < rank(b) ? [a, b] : [b, a], how: "shape and position in the block" };
}

/** Whether two tensors hold the same bytes, compared in pieces so that neither is ever whole in memory. */
function sameBytes(source: TensorSource, a: TensorInfo, b: TensorInfo): boolean {
  if (a.dtype !== b.dtype || a.bytes !== b.bytes) return false;
  const piece = 1 << 24;
  for (let at = 0; at < a.bytes; at += piece) {
    const length = Math.min(piece, a.bytes - at);
    const [left, right] = [source.readRange(a.name, at, length), source.readRange(b.name, at, length)];
    for (let i = 0; i < length; i++) if (left[i] !== right[i]) return false;
  }
  return true;
}

function fail(source: TensorSource, problem: string): never {
  throw new Error(`Cannot convert "${source.path}": ${problem}`);
}

function same(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((axis, i) => axis === b[i]);
}

function isFile(path: string): boolean {
  return exists(path) && Deno.statSync(path).isFile;
}
