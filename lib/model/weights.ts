/**
 * The base model on the GPU: fused projections, norms and the embedding in slices that the device can bind. Dense weights
 * keep the type they are stored in; NF4 weights stay packed and are dequantized into scratch, or once for good.
 */
import { type Dtype, toFloat32 } from "../data/dtype.ts";
import { NF4_CODE } from "../data/nf4.ts";
import { openModel, type TensorSource } from "../data/safetensors.ts";
import type { Gpu } from "../gpu/device.ts";
import type { Dispatch } from "../gpu/kernel.ts";
import { run } from "../gpu/program.ts";
import { createTensor, type Storage, type Tensor, tensorBytes, upload } from "../gpu/tensor.ts";
import { createNf4 } from "../ops/nf4.ts";
import { type LinearModule, linearShape, type ModelConfig, moduleName } from "./config.ts";
import { paddedVocab } from "./ops.ts";
import { isQuantized, readQuantKind, readQuantState } from "./quantized.ts";

/** The four products of a layer, each of one to three projections that read the same input. */
export const FUSED = {
  qkv: ["q_proj", "k_proj", "v_proj"],
  o: ["o_proj"],
  gateUp: ["gate_proj", "up_proj"],
  down: ["down_proj"],
} as const satisfies Record<string, readonly LinearModule[]>;

/** Name of a fused product. */
export type FusedName = keyof typeof FUSED;

/** One fused projection `[n, k]`, its projections stacked by rows. */
export interface Linear {
  readonly n: number;
  readonly k: number;
  readonly parts: readonly { readonly module: LinearModule; readonly columns: number }[];
  readonly weight: Tensor;
  /** What must run before `weight` may be read: empty for dense weights and for those dequantized once. */
  readonly dequantize: readonly Dispatch[];
}

/** Weights of one decoder layer. */
export interface LayerWeights extends Record<FusedName, Linear> {
  readonly inputNorm: Tensor;
  readonly postAttentionNorm: Tensor;
}

/** Consecutive rows of the embedding or the head. */
export interface VocabSlice {
  readonly first: number;
  readonly tensor: Tensor;
}

/** All base weights. `head` is `embed` itself when they are tied. */
export interface Weights {
  readonly embed: readonly VocabSlice[];
  readonly head: readonly VocabSlice[];
  readonly norm: Tensor;
  readonly layers: readonly LayerWeights[];
  /** All of these tensors, and the scratch of 4-bit ones: for the memory table. */
  readonly tensors: readonly Tensor[];
}

/** How to hold the weights. */
export interface WeightOptions {
  /** Full training: every weight in f32. */
  readonly trainable?: boolean;
  /** Dequantize NF4 weights once and keep them, instead of layer by layer into shared scratch. */
  readonly resident?: boolean;
}

const STORAGE: Partial<Record<Dtype, Storage>> = { F32: "f32", F16: "f16", BF16: "bf16" };

/** The parts of a fused projection and its sizes. */
function fusedShape(config: ModelConfig, name: FusedName) {
  const parts = FUSED[name].map((module) => ({ module, columns: linearShape(config, module)[0] }));
  return { parts, n: parts.reduce((sum, part) => sum + part.columns, 0), k: linearShape(config, FUSED[name][0])[1] };
}

/** Base weights that are allocated; `fill` reads them from the files, tensor by tensor. */
export interface PlannedWeights {
  readonly weights: Weights;
  fill(): Promise<void>;
}

/** Allocates the weights of the model folder `dir`, dense or 4-bit, so that what reads them can be recorded before they are read. */
export function planWeights(
  gpu: Gpu,
  { dir, config, trainable = false, resident = false }: { dir: string; config: ModelConfig } & WeightOptions,
): PlannedWeights {
  using source = openModel(dir);
  const tensors: Tensor[] = [], fills: ((files: TensorSource) => Promise<void> | void)[] = [];
  const make = (name: string, shape: readonly number[], dtype: Storage) => {
    const tensor = createTensor(gpu, { name, shape, dtype });
    tensors.push(tensor);
    return tensor;
  };
  const vector = (name: string) => {
    const tensor = make(name, [config.hidden_size], "f32"), { dtype } = info(source, name);
    fills.push((files) => upload(gpu, tensor, toFloat32(files.read(name), dtype)));
    return tensor;
  };

  const sliced = (name: string): VocabSlice[] => {
    const width = config.hidden_size, rows = paddedVocab(config), stored = info(source, name).dtype;
    const dtype = trainable ? "f32" : storage(name, stored);
    const limit = gpu.limits.maxStorageBufferBindingSize;
    const most = Math.min(rows, Math.floor(limit / tensorBytes([1, width], dtype) / 64) * 64);
    const slices: VocabSlice[] = [];
    for (let first = 0; first < rows; first += most) {
      const count = Math.min(most, rows - first), real = Math.min(count, config.vocab_size - first);
      const tensor = make(rows === most ? name : `${name}[${first}…]`, [count, width], dtype);
      fills.push((files) => {
        const bytes = files.readRange(name, first * width * size(stored), real * width * size(stored));
        return upload(gpu, tensor, trainable ? toFloat32(bytes, stored) : bytes);
      });
      slices.push({ first, tensor });
    }
    return slices;
  };

  const quantized = isQuantized(source);
  const scratch = new Map<string, Tensor>();
  const nf4 = createNf4(gpu, NF4_CODE as Float32Array<ArrayBuffer>);

  const linear = (layer: number, fused: FusedName): Linear => {
    const { parts, n, k } = fusedShape(config, fused);
    const name = `layers.${layer}.${fused}`;
    if (quantized && !trainable) return packed(name, fused, layer);
    const kinds = parts.map(({ module }) => `${moduleName(layer, module)}.weight`)
      .map((tensor) => storage(tensor, info(source, tensor).dtype));
    // Projections of different types are widened, which loses nothing.
    const dtype = trainable || new Set(kinds).size > 1 ? "f32" : kinds[0]!;
    const weight = make(name, [n, k], dtype);
    let row = 0;
    for (const { module, columns } of parts) {
      const tensor = `${moduleName(layer, module)}.weight`, offset = row * k * (dtype === "f32" ? 4 : 2);
      fills.push((files) => {
        const bytes = files.read(tensor), stored = info(files, tensor).dtype;
        return upload(gpu, weight, STORAGE[stored] === dtype ? bytes : toFloat32(bytes, stored), offset);
      });
      row += columns;
    }
    return { n, k, parts, weight, dequantize: [] };
  };

  const packed = (name: string, fused: FusedName, layer: number): Linear => {
    const { parts, n, k } = fusedShape(config, fused);
    const kinds = parts.map(({ module }) => readQuantKind(source, moduleName(layer, module)));
    const { dtype: quantDtype, blocksize } = kinds[0]!;
    const dtype = ({ float32: "f32", float16: "f16", bfloat16: "bf16" } as const)[quantDtype];
    kinds.forEach((kind, i) => {
      const { module, columns } = parts[i]!;
      const refuse = (state: string) => new RangeError(`Cannot load "${moduleName(layer, module)}.weight": ${state}`);
      if (kind.shape.join() !== [columns, k].join()) {
        throw refuse(`it is [${kind.shape.join(", ")}] but the config wants [${columns}, ${k}]`);
      }
      if (kind.dtype !== quantDtype || kind.blocksize !== blocksize) {
        const first = `${quantDtype} in blocks of ${blocksize} as "${parts[0]!.module}"`;
        throw refuse(
          `it is ${kind.dtype} in blocks of ${kind.blocksize}: ${first} is wanted, with which it shares a product`,
        );
      }
      // Projections lie one behind the other, and so do their scales: none may end within a block.
      if (columns * k % blocksize) {
        throw refuse(`its ${columns * k} elements are not whole blocks of ${blocksize}: stage 02 makes blocks of 64`);
      }
    });
    const codes = make(`${name}.codes`, [n, k / 2], "u8");
    const absmax = make(`${name}.absmax`, [n * k / blocksize], "f32");
    let element = 0;
    for (const { module, columns } of parts) {
      const first = element;
      fills.push(async (files) => {
        const state = readQuantState(files, moduleName(layer, module));
        await upload(gpu, codes, state.packed, first / 2);
        await upload(gpu, absmax, state.absmax, first / blocksize * 4);
      });
      element += columns * k;
    }
    const shared = resident ? undefined : scratch.get(fused);
    const weight = shared ?? make(resident ? name : `scratch.${fused}`, [n, k], dtype);
    if (!resident) scratch.set(fused, weight);
    const dequantize = [nf4.dequantize({ codes, absmax, out: weight, count: n * k, blocksize })];
    if (resident) fills.push(() => run(gpu, dequantize));
    return { n, k, parts, weight, dequantize: resident ? [] : dequantize };
  };

  const embed = sliced("model.embed_tokens.weight");
  const head = config.tie_word_embeddings ? embed : sliced("lm_head.weight");
  const layers = Array.from({ length: config.num_hidden_layers }, (_, l): LayerWeights => ({
    inputNorm: vector(`model.layers.${l}.input_layernorm.weight`),
    postAttentionNorm: vector(`model.layers.${l}.post_attention_layernorm.weight`),
    qkv: linear(l, "qkv"),
    o: linear(l, "o"),
    gateUp: linear(l, "gateUp"),
    down: linear(l, "down"),
  }));
  const norm = vector("model.norm.weight");
  return {
    weights: { embed, head, norm, layers, tensors },
    async fill() {
      using files = openModel(dir);
      for (const fill of fills) await fill(files);
    },
  };
}

function info(source: TensorSource, name: string) {
  const found = source.tensors.get(name);
  if (!found) throw new Error(`Cannot load "${source.path}": it has no tensor "${name}"`);
  return found;
}

function size(dtype: Dtype): number {
  return dtype === "F32" ? 4 : 2;
}

function storage(name: string, dtype: Dtype): Storage {
  const found = STORAGE[dtype];
  if (!found) throw new TypeError(`Cannot load "${name}": it is ${dtype}: F32, F16 or BF16 is wanted`);
  return found;
}
