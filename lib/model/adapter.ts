/**
 * LoRA adapters (arXiv:2106.09685) as PEFT makes and stores them: initial values bit for bit, file names, both files.
 * It refuses what this project does not compute, such as DoRA, biases or a rank of its own for some module.
 */
import { fromFloat32, STORED, toFloat32 } from "../data/dtype.ts";
import { TorchGenerator } from "../data/random.ts";
import { openSafetensors, writeSafetensors } from "../data/safetensors.ts";
import { checkHolds, readJsonObject } from "../data/files.ts";
import { type LinearModule, linearModules, linearShape, type ModelConfig, moduleName } from "./config.ts";

/** The fields of adapter_config.json that the computation depends on, under PEFT's names. */
export interface LoraConfig {
  readonly r: number;
  readonly lora_alpha: number;
  readonly lora_dropout: number;
  readonly target_modules: readonly string[];
  readonly use_rslora: boolean;
  readonly base_model_name_or_path: string | null;
}

/** One matrix of an adapter: A is `[r, in]`, B is `[out, r]`; `name` is its key in adapter_model.safetensors. */
export interface AdapterTensor {
  readonly name: string;
  readonly module: LinearModule;
  readonly layer: number;
  readonly kind: "A" | "B";
  readonly shape: readonly [number, number];
}

/** An adapter read from a folder: `tensors` holds float32 values by name, in creation order. */
export interface Adapter {
  readonly lora: LoraConfig;
  readonly tensors: Map<string, Float32Array>;
}

/** The factor of B·A·x: alpha / r, or alpha / sqrt(r) with rank stabilization (rsLoRA, arXiv:2312.03732). */
export function scaling(lora: LoraConfig): number {
  return lora.lora_alpha / (lora.use_rslora ? Math.sqrt(lora.r) : lora.r);
}

/**
 * Every matrix in the order in which PEFT creates them: layer by layer, q, k, v, o, gate, up, down, A before B; only
 * target modules. Throws a RangeError for a rank below 1, a dropout outside [0, 1), no target or one that is none
 * of the seven.
 */
export function adapterTensors(config: ModelConfig, lora: LoraConfig): AdapterTensor[] {
  const { r } = lora;
  return slots(config.num_hidden_layers, lora).map((slot) => {
    const [rows, columns] = linearShape(config, slot.module);
    return { ...slot, shape: slot.kind === "A" ? [r, columns] : [rows, r] };
  });
}

/** The matrices of an adapter without their shapes, which need the model. */
function slots(layers: number, lora: LoraConfig): Omit<AdapterTensor, "shape">[] {
  const { r, target_modules: targets } = lora;
  if (!(Number.isInteger(r) && r >= 1)) {
    throw new RangeError(`Cannot make an adapter of rank ${r}: the rank must be a whole number above 0`);
  }
  if (!(lora.lora_dropout >= 0 && lora.lora_dropout < 1)) {
    throw new RangeError(`Cannot make an adapter with dropout ${lora.lora_dropout}: it must be from 0 to below 1`);
  }
  const known: readonly string[] = linearModules;
  const unknown = targets.find((target) => !known.includes(target));
  if (unknown !== undefined || targets.length === 0) {
    throw new RangeError(
      `Cannot adapt ${unknown === undefined ? "no module at all" : `"${unknown}"`}: ` +
        `the modules are ${linearModules.join(", ")}`,
    );
  }
  const adapted = linearModules.filter((module) => targets.includes(module));
  return Array.from(
    { length: layers },
    (_, layer) =>
      adapted.flatMap((module) =>
        (["A", "B"] as const).map((kind) => ({ name: tensorName({ layer, module, kind }), module, layer, kind }))
      ),
  ).flat();
}

function tensorName({ layer, module, kind }: Pick<AdapterTensor, "layer" | "module" | "kind">): string {
  return `base_model.model.${moduleName(layer, module)}.lora_${kind}.weight`;
}

/**
 * A fresh adapter: A uniform within 1/sqrt(in) (`kaiming_uniform_` with a = sqrt(5)), B zero: it changes nothing.
 * The values are those of PEFT after `torch.manual_seed(seed)`.
 */
export function initAdapter(config: ModelConfig, lora: LoraConfig, seed: number): Map<string, Float32Array> {
  const generator = new TorchGenerator(seed);
  const tensors = new Map<string, Float32Array>();
  const all = adapterTensors(config, lora);
  for (let i = 0; i < all.length; i += 2) {
    const [a, b] = [all[i]!, all[i + 1]!];
    const [rank, width] = a.shape;
    const bound = Math.sqrt(3) * (Math.sqrt(1 / 3) / Math.sqrt(width)); // in torch's order of operations
    // Both torch.nn.Linear constructors fill their weight before PEFT fills A again and clears B.
    for (let draw = 0; draw < rank * width + rank * b.shape[0]; draw++) generator.next32();
    tensors.set(a.name, generator.uniform(rank * width, -bound, bound));
    tensors.set(b.name, new Float32Array(b.shape[0] * rank));
  }
  return tensors;
}

/**
 * The text of adapter_config.json: the keys that every PEFT release reads, sorted, without a newline at the end, as
 * PEFT writes it. Newer keys are left out because older releases refuse a file that has keys unknown to them.
 */
export function adapterConfigJson(lora: LoraConfig): string {
  const text = JSON.stringify(
    {
      alpha_pattern: {},
      auto_mapping: null,
      base_model_name_or_path: lora.base_model_name_or_path,
      bias: "none",
      fan_in_fan_out: false,
      inference_mode: true, // PEFT's own files always say so; training from them sets it again
      init_lora_weights: true,
      layers_pattern: null,
      layers_to_transform: null,
      lora_alpha: lora.lora_alpha,
      lora_dropout: lora.lora_dropout,
      modules_to_save: null,
      peft_type: "LORA",
      r: lora.r,
      rank_pattern: {},
      revision: null,
      target_modules: lora.target_modules,
      task_type: "CAUSAL_LM",
      use_dora: false,
      use_rslora: lora.use_rslora,
    },
    null,
    2,
  );
  return text.replace(/("lora_dropout": \d+)(?=,)/, "$1.0"); // a float to Python, also when it is whole
}

/**
 * Writes `dir/adapter_model.safetensors` in `dtype` and `dir/adapter_config.json`. Throws a RangeError when `tensors`
 * are not whole layers of the target modules with rank `r`.
 */
export async function saveAdapter(
  dir: string,
  lora: LoraConfig,
  tensors: ReadonlyMap<string, Float32Array>,
  dtype: keyof typeof STORED = "float32",
): Promise<void> {
  const path = `${dir}/adapter_model.safetensors`;
  const wanted = slots(layerCount(tensors.keys()), lora);
  if (wanted.length !== tensors.size || wanted.length === 0) {
    throw new RangeError(`Cannot write "${path}": there are ${tensors.size} tensors, ${wanted.length} wanted`);
  }
  const sinks = wanted.map(({ name, kind }) => {
    const values = tensors.get(name);
    if (values === undefined || values.length === 0 || values.length % lora.r !== 0) {
      throw new RangeError(
        `Cannot write "${path}": tensor "${name}" has ${
          values?.length ?? "no"
        } values: a multiple of r = ${lora.r} is wanted`,
      );
    }
    const other = values.length / lora.r;
    const shape = kind === "A" ? [lora.r, other] : [other, lora.r];
    return { name, dtype: STORED[dtype], shape, data: () => fromFloat32(values, STORED[dtype]) };
  });
  await Deno.mkdir(dir, { recursive: true });
  await writeSafetensors(path, sinks);
  await Deno.writeTextFile(`${dir}/adapter_config.json`, adapterConfigJson(lora));
}

/**
 * Reads an adapter folder in F32, F16 or BF16. Every key must belong to a target module of some layer, and none may be
 * missing; with the `config` of the model every shape must fit it too. Throws an error that names the key.
 */
export function readAdapter(dir: string, config?: ModelConfig): Adapter {
  checkHolds(dir, { name: "adapter_config.json", wanted: "a trained adapter", run: "deno task 05" });
  const lora = readLoraConfig(`${dir}/adapter_config.json`);
  const path = `${dir}/adapter_model.safetensors`;
  using source = openSafetensors(path);
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": ${problem}`);
  };
  const fits = new Map(config ? adapterTensors(config, lora).map(({ name, shape }) => [name, shape]) : []);
  const wanted = slots(config?.num_hidden_layers ?? layerCount(source.tensors.keys()), lora);
  const names = new Set(wanted.map(({ name }) => name));
  for (const name of source.tensors.keys()) {
    if (!names.has(name)) refuse(`tensor "${name}" belongs to none of the model's target modules`);
  }
  if (wanted.length === 0) refuse("it has no tensors");
  const tensors = new Map<string, Float32Array>();
  for (const { name, kind } of wanted) {
    const info = source.tensors.get(name) ?? refuse(`tensor "${name}" is missing`);
    const shape = fits.get(name) ?? (kind === "A" ? [lora.r, info.shape[1] ?? 0] : [info.shape[0] ?? 0, lora.r]);
    if (info.shape.join() !== shape.join()) {
      refuse(`tensor "${name}" is [${info.shape.join(", ")}] but must be [${shape.join(", ")}]`);
    }
    tensors.set(name, toFloat32(source.read(name), info.dtype));
  }
  return { lora, tensors };
}

/** One more than the highest layer among the names. */
function layerCount(names: Iterable<string>): number {
  return Math.max(0, ...Array.from(names, (name) => 1 + Number(/\.layers\.(\d+)\./.exec(name)?.[1] ?? -1)));
}

/** What each other field must hold, where it is there at all: anything else would change the computation. */
const FIXED: Readonly<Record<string, unknown>> = {
  peft_type: "LORA",
  bias: "none",
  use_dora: false,
  fan_in_fan_out: false,
  lora_bias: false,
  use_qalora: false,
  alpha_pattern: {},
  rank_pattern: {},
  layers_to_transform: null,
  layer_replication: null,
  modules_to_save: null,
  target_parameters: null,
  trainable_token_indices: null,
};

function readLoraConfig(path: string): LoraConfig {
  const json = readJsonObject(path);
  for (const [key, wanted] of Object.entries(FIXED)) {
    if (json[key] !== undefined && JSON.stringify(json[key]) !== JSON.stringify(wanted)) {
      throw new RangeError(
        `Cannot read "${path}": ${key} is ${JSON.stringify(json[key])}: only ${JSON.stringify(wanted)} is supported`,
      );
    }
  }
  const number = (key: string, byDefault?: number): number => {
    const value = json[key] ?? byDefault;
    if (typeof value === "number") return value;
    throw new TypeError(`Cannot read "${path}": ${key} is ${JSON.stringify(value)}: it must be a number`);
  };
  const targets = json.target_modules;
  if (!Array.isArray(targets) || !targets.every((target) => typeof target === "string")) {
    throw new TypeError(
      `Cannot read "${path}": target_modules is ${JSON.stringify(targets)}: it must be a list of module names`,
    );
  }
  return {
    r: number("r"),
    lora_alpha: number("lora_alpha"),
    lora_dropout: number("lora_dropout", 0),
    target_modules: targets,
    use_rslora: json.use_rslora === true,
    base_model_name_or_path: (json.base_model_name_or_path as string | null | undefined) ?? null,
  };
}
