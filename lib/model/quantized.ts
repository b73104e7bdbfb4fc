/**
 * Models with 4-bit weights in the files that transformers and bitsandbytes write and open: NF4 for the seven
 * projections, everything else as it was. It refuses fp4, int8 and files whose tables differ from the known ones.
 */
import { type Dtype, firstUnfit, fromFloat32, rounded, STORED, toFloat32 } from "../data/dtype.ts";
import {
  blockAbsmax,
  dequantizeNf4,
  doubleQuantize,
  type DoubleQuantized,
  NESTED_MAP,
  NF4_BLOCKSIZE,
  NF4_CODE,
  quantizeNf4,
  undoubleQuantize,
} from "../data/nf4.ts";
import { BLOCKWISE_SIZE } from "../data/blockwise8.ts";
import { type TensorSink, type TensorSource, writeSafetensors } from "../data/safetensors.ts";
import { configJson, linearModules, type ModelConfig, moduleName, parameterShapes, pythonFloat } from "./config.ts";

/** A 4-bit weight as stored, its scales back in float32: `packed` `[ceil(n / 2)]`, `absmax` `[ceil(n / blocksize)]`. */
export interface QuantState {
  readonly packed: Uint8Array;
  readonly absmax: Float32Array;
  readonly shape: readonly [number, number];
  /** The dtype of the weight before quantization, to which a dequantized weight is rounded. */
  readonly dtype: ModelConfig["dtype"];
  readonly blocksize: number;
}

const WORDS = Object.keys(STORED) as ModelConfig["dtype"][];
const STATE = ".quant_state.bitsandbytes__";

/** Whether the model holds 4-bit weights of bitsandbytes. */
export function isQuantized(source: Pick<TensorSource, "tensors">): boolean {
  return [...source.tensors.keys()].some((name) => name.includes(STATE));
}

/** The names of the weights that are stored in 4 bit. */
export function quantizedWeights(config: ModelConfig): Set<string> {
  const layers = Array.from({ length: config.num_hidden_layers }, (_, layer) => layer);
  return new Set(layers.flatMap((layer) => linearModules.map((module) => `${moduleName(layer, module)}.weight`)));
}

/**
 * Writes `out/model.safetensors` and `out/config.json` from the 16- or 32-bit `source`, all of it first rounded to `dtype`
 * where one is given, as transformers does when it is to load a model in 4 bit and in a dtype. Each weight is read twice, for
 * its scales and for its codes, so that memory holds one tensor and the scales of all: 1/64 of the weights in number.
 * Throws when `source` lacks a parameter of `config` or a shape differs.
 */
export async function writeQuantizedModel(
  { source, config: given, dtype, out, doubleQuant }: {
    readonly source: TensorSource;
    readonly config: ModelConfig;
    readonly dtype?: ModelConfig["dtype"] | undefined;
    readonly out: string;
    readonly doubleQuant: boolean;
  },
): Promise<void> {
  const config = dtype === undefined ? given : { ...given, dtype };
  const linear = quantizedWeights(config);
  const sinks: TensorSink[] = [];
  for (const { name, shape } of parameterShapes(config)) {
    const info = source.tensors.get(name);
    if (info === undefined || info.shape.join() !== shape.join()) {
      throw new RangeError(
        `Cannot quantize "${source.path}": tensor "${name}" is ${info ? `[${info.shape.join(", ")}]` : "missing"}: ` +
          `the config wants [${shape.join(", ")}]`,
      );
    }
    if (linear.has(name)) sinks.push(...weightSinks({ source, name, dtype, doubleQuant }));
    else if (dtype === undefined) sinks.push({ name, dtype: info.dtype, shape, data: () => source.read(name) });
    else {sinks.push({
        name,
        dtype: STORED[dtype],
        shape,
        data: () => fromFloat32(valuesOf(source, name, dtype), STORED[dtype]),
      });}
  }
  await writeSafetensors(`${out}/model.safetensors`, sinks);
  // bitsandbytes' config class refuses a threshold that is not a float, so the text must say 6.0.
  const text = configJson(config, { quantization_config: quantizationConfig(config, doubleQuant) })
    .replace(/("llm_int8_threshold": 6)(?=,)/, "$1.0");
  await Deno.writeTextFile(`${out}/config.json`, text);
}

/** `quantization_config` of config.json, as transformers saves it for NF4; the compute dtype is the model's. */
function quantizationConfig(config: ModelConfig, doubleQuant: boolean) {
  return {
    _load_in_4bit: true,
    _load_in_8bit: false,
    bnb_4bit_compute_dtype: config.dtype,
    bnb_4bit_quant_storage: "uint8",
    bnb_4bit_quant_type: "nf4",
    bnb_4bit_use_double_quant: doubleQuant,
    llm_int8_enable_fp32_cpu_offload: false,
    llm_int8_has_fp16_weight: false,
    llm_int8_skip_modules: null,
    llm_int8_threshold: 6,
    load_in_4bit: true,
    load_in_8bit: false,
    quant_method: "bitsandbytes",
  };
}

/** A tensor's values, rounded to `dtype` where one is given. Throws where one does not fit there. */
function valuesOf(source: TensorSource, name: string, dtype: ModelConfig["dtype"] | undefined): Float32Array {
  const values = toFloat32(source.read(name), source.tensors.get(name)!.dtype);
  if (dtype === undefined) return values;
  const unfit = firstUnfit(values, STORED[dtype]);
  if (unfit < 0) return rounded(values, STORED[dtype]);
  throw new RangeError(
    `Cannot quantize "${source.path}": element ${unfit} of "${name}" is ${values[unfit]}, which ${dtype} cannot hold`,
  );
}

/** The tensors that stand for one weight (bitsandbytes functional.py, QuantState.as_dict). */
function weightSinks(
  { source, name, dtype, doubleQuant }: {
    readonly source: TensorSource;
    readonly name: string;
    readonly dtype: ModelConfig["dtype"] | undefined;
    readonly doubleQuant: boolean;
  },
): TensorSink[] {
  const { dtype: stored, shape } = source.tensors.get(name)!;
  const word = dtype ?? WORDS.find((name) => STORED[name] === stored);
  if (word === undefined) {
    throw new TypeError(`Cannot quantize "${name}": it is ${stored}: it must be F32, F16 or BF16`);
  }
  const values = () => valuesOf(source, name, dtype);
  let absmax: Float32Array;
  try {
    absmax = blockAbsmax(values());
  } catch (error) {
    throw new RangeError(`${(error as Error).message} (tensor "${name}" of "${source.path}")`);
  }
  const nested = doubleQuant ? doubleQuantize(absmax) : undefined;
  const state = new TextEncoder().encode(stateJson({ dtype: word, shape, nested }));
  const count = shape.reduce((product, size) => product * size, 1);
  const u8 = (key: string, bytes: Uint8Array): TensorSink => (
    { name: name + key, dtype: "U8", shape: [bytes.length], data: () => bytes }
  );
  const f32 = (key: string, numbers: Float32Array): TensorSink => ({
    name: name + key,
    dtype: "F32",
    shape: [numbers.length],
    data: () => new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength),
  });
  return [
    { name, dtype: "U8", shape: [Math.ceil(count / 2), 1], data: () => quantizeNf4(values()).packed },
    f32(".quant_map", NF4_CODE),
    u8(`${STATE}nf4`, state),
    ...(nested
      ? [
        u8(".absmax", nested.codes),
        f32(".nested_absmax", nested.nestedAbsmax),
        f32(".nested_quant_map", NESTED_MAP),
      ]
      : [f32(".absmax", absmax)]),
  ];
}

/** The quantization state as Python's `json.dumps` writes it: the file then equals bitsandbytes' byte for byte. */
function stateJson(
  { dtype, shape, nested }: {
    readonly dtype: string;
    readonly shape: readonly number[];
    readonly nested: DoubleQuantized | undefined;
  },
): string {
  const plain = `"quant_type": "nf4", "blocksize": ${NF4_BLOCKSIZE}, "dtype": "${dtype}", "shape": [${
    shape.join(", ")
  }]`;
  if (nested === undefined) return `{${plain}}`;
  const offset = pythonFloat(nested.offset);
  return `{${plain}, "nested_blocksize": ${BLOCKWISE_SIZE}, "nested_dtype": "float32", "nested_offset": ${offset}}`;
}

/** What a 4-bit weight says of itself. */
type QuantKind = Pick<QuantState, "shape" | "dtype" | "blocksize"> & {
  readonly state: Readonly<Record<string, unknown>>;
};

/** Reads tensors of one 4-bit weight; all errors name it. */
function partsOf(source: TensorSource, module: string) {
  const weight = `${module}.weight`;
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${source.path}": the 4-bit weight "${weight}" ${problem}`);
  };
  const part = (key: string, dtype: Dtype): Uint8Array<ArrayBuffer> => {
    const info = source.tensors.get(weight + key) ?? refuse(`has no tensor "${weight + key}"`);
    if (info.dtype !== dtype) refuse(`has "${key}" as ${info.dtype}: it must be ${dtype}`);
    return source.read(weight + key);
  };
  return { refuse, part, floats: (key: string) => new Float32Array(part(key, "F32").buffer) };
}

/** Reads of what kind the 4-bit weight of `module` is, without the weight. Throws an error that names it where it is another. */
export function readQuantKind(source: TensorSource, module: string): QuantKind {
  const { refuse, part } = partsOf(source, module);
  const text = new TextDecoder().decode(part(`${STATE}nf4`, "U8"));
  let state: Readonly<Record<string, unknown>>;
  try {
    state = JSON.parse(text) ?? {};
  } catch {
    return refuse(`has the state ${JSON.stringify(text)}, which is not JSON`);
  }
  const { blocksize, shape } = state;
  const dtype = WORDS.find((word) => word === state.dtype);
  if (
    state.quant_type !== "nf4" || dtype === undefined || typeof blocksize !== "number" || !(blocksize >= 2) ||
    !Array.isArray(shape) || shape.length !== 2 || !shape.every((size) => Number.isInteger(size) && size > 0)
  ) return refuse(`has the state ${JSON.stringify(state)}, which is not a matrix in nf4`);
  return { shape: [shape[0], shape[1]], dtype, blocksize, state };
}

/**
 * Reads the 4-bit weight of `module` (`model.layers.0.self_attn.q_proj`) and undoes the double quantization of its
 * scales. Throws an error that names the tensor when a part is missing, has a wrong size or is of another kind.
 */
export function readQuantState(source: TensorSource, module: string): QuantState {
  const { refuse, part, floats } = partsOf(source, module);
  const { shape, dtype, blocksize, state } = readQuantKind(source, module);
  const same = (a: Float32Array, b: Float32Array) => a.length === b.length && a.every((value, i) => value === b[i]);
  if (!same(floats(".quant_map"), NF4_CODE)) refuse('has a "quant_map" that is not the table of nf4');

  const packed = part("", "U8");
  const count = shape[0] * shape[1];
  const blocks = Math.ceil(count / blocksize);
  if (packed.length !== Math.ceil(count / 2)) {
    refuse(`has ${packed.length} bytes: [${shape.join(", ")}] wants ${count / 2}`);
  }
  let absmax: Float32Array;
  if (state.nested_offset === undefined) absmax = floats(".absmax");
  else {
    if (typeof state.nested_offset !== "number" || state.nested_blocksize !== BLOCKWISE_SIZE) {
      refuse(`has nested blocks of ${state.nested_blocksize}: they must be of ${BLOCKWISE_SIZE}`);
    }
    if (!same(floats(".nested_quant_map"), NESTED_MAP)) {
      refuse('has a "nested_quant_map" that is not the signed dynamic map');
    }
    const codes = part(".absmax", "U8");
    const nestedAbsmax = floats(".nested_absmax");
    if (nestedAbsmax.length !== Math.ceil(blocks / BLOCKWISE_SIZE)) refuse(`has ${nestedAbsmax.length} nested scales`);
    absmax = undoubleQuantize({ codes, nestedAbsmax, offset: state.nested_offset as number });
  }
  if (absmax.length !== blocks) refuse(`has ${absmax.length} scales: ${count} weights want ${blocks}`);
  return { packed, absmax, shape, dtype, blocksize };
}

/** The weight `[out · in]` that `state` stands for, rounded to the dtype that it had before, as bitsandbytes does. */
export function dequantizeWeight(state: QuantState): Float32Array {
  const values = dequantizeNf4({ ...state, count: state.shape[0] * state.shape[1] });
  return state.dtype === "float32" ? values : rounded(values, STORED[state.dtype]);
}

/**
 * How large a model is: `parameters`, as the architecture has them; `storedElements`, where a 4-bit weight counts half
 * because two share a byte (so Unsloth counted until July 2025, and so does the blog); `bytes` with all the scales.
 */
export function countElements(
  source: Pick<TensorSource, "tensors">,
  config: ModelConfig,
): { parameters: number; storedElements: number; bytes: number } {
  const product = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);
  let parameters = 0;
  let storedElements = 0;
  for (const { name, shape } of parameterShapes(config)) {
    parameters += product(shape);
    storedElements += product(source.tensors.get(name)?.shape ?? []);
  }
  const bytes = [...source.tensors.values()].reduce((sum, info) => sum + info.bytes, 0);
  return { parameters, storedElements, bytes };
}
