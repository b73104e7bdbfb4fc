/**
 * An adapter folded into its base: W + scaling · B·A (LoRA, arXiv:2106.09685), summed in float64 and rounded. It never
 * quantizes the result again, which would lose most of what was learnt, and it writes no NaN and no infinity.
 */
import { byteLength, firstUnfit, fromFloat32, STORED, toFloat32 } from "../data/dtype.ts";
import { openModel, type TensorSource, writeSafetensors } from "../data/safetensors.ts";
import { adapterTensors, type LoraConfig, readAdapter, scaling } from "./adapter.ts";
import {
  configJson,
  generationConfigJson,
  type ModelConfig,
  moduleName,
  parameterShapes,
  readConfig,
} from "./config.ts";
import { dequantizeWeight, isQuantized, quantizedWeights, readQuantState } from "./quantized.ts";

/** What to merge, and where to. */
export interface MergeOptions {
  /** Folder of the base, dense or in 4 bit: the latter is dequantized. */
  readonly model: string;
  /** Folder of the adapter. */
  readonly adapter: string;
  readonly out: string;
  /** Of every tensor that is written. */
  readonly dtype: ModelConfig["dtype"];
  /** Called after each tensor with how many are done. */
  readonly onTensor?: (done: number) => void;
}

/** What was written: `adapted` of the `tensors` are changed by the adapter, `bytes` is the size of them all. */
export interface Merged {
  readonly tensors: number;
  readonly adapted: number;
  readonly parameters: number;
  readonly bytes: number;
}

/**
 * How far a logit of the merged model may be from base + adapter, in parts of the largest logit. In float32 both add the
 * same terms in another order: 1e-6 is usual, 2e-5 was the most. At 16 bit it is the rounding of every weight, by up to
 * 2^-8 of itself in bfloat16 and 2^-11 in float16, that travels through the layers. The bound is 32 times that: weights
 * drawn at random at full size, twice as large as one initializes them, gave 13 times, others of 24 layers 1 to 3.
 */
const LOGIT_BOUND = { float32: 1e-4, float16: 2 ** -6, bfloat16: 2 ** -3 } as const;

/**
 * Writes `out/model.safetensors`, `config.json` and `generation_config.json`: a dense model, its head tied if the base's
 * is. One tensor after the other: memory holds the adapter and a few times the largest tensor. Throws when a tensor of
 * the base or the adapter is missing or of another shape, and when a value is none that `dtype` can hold.
 */
export async function mergeModel({ model, adapter, out, dtype, onTensor }: MergeOptions): Promise<Merged> {
  const config = readConfig(model);
  const { lora, tensors } = readAdapter(adapter, config);
  const updates = lowRankUpdates(config, lora);
  const parameters = parameterShapes(config);
  using source = openModel(model);
  const read = weightReader(source, config);
  await Deno.mkdir(out, { recursive: true });
  let done = 0;
  await writeSafetensors(
    `${out}/model.safetensors`,
    parameters.map(({ name, shape }) => ({
      name,
      dtype: STORED[dtype],
      shape,
      data() {
        const weight = read(name, shape);
        const update = updates.get(name);
        if (update) {
          const [a, b] = [tensors.get(update.a)!, tensors.get(update.b)!];
          addLowRank(weight, { a, b, r: lora.r, scale: scaling(lora) });
        }
        checkValues(weight, { name, shape, dtype });
        const { buffer, byteOffset, byteLength } = weight;
        const bytes = dtype === "float32"
          ? new Uint8Array(buffer, byteOffset, byteLength)
          : fromFloat32(weight, STORED[dtype]);
        onTensor?.(++done);
        return bytes;
      },
    })),
  );
  const merged = { ...config, dtype };
  await Deno.writeTextFile(`${out}/config.json`, configJson(merged));
  await Deno.writeTextFile(`${out}/generation_config.json`, generationConfigJson(merged));
  const count = parameters.reduce((sum, { shape }) => sum + elements(shape), 0);
  return {
    tensors: parameters.length,
    adapted: updates.size,
    parameters: count,
    bytes: byteLength(STORED[dtype], [count]),
  };
}

/**
 * Adds `scale · B·A` to `weight` `[out, in]` in place, for `a` `[r, in]` and `b` `[out, r]`. Products of float32 values are
 * exact in float64; their sum, four terms at a time from the first rank to the last, is scaled, added to the weight
 * and rounded to float32 once.
 */
export function addLowRank(
  weight: Float32Array,
  { a, b, r, scale }: {
    readonly a: Float32Array;
    readonly b: Float32Array;
    readonly r: number;
    readonly scale: number;
  },
): void {
  const columns = a.length / r, rows = b.length / r;
  if (weight.length !== rows * columns) {
    throw new RangeError(
      `Cannot add an update of [${rows}, ${columns}] to ${weight.length} weights: the sizes must agree`,
    );
  }
  const wide = new Float64Array(a); // a conversion less in the inner loop
  const sum = new Float64Array(columns);
  for (let row = 0; row < rows; row++) {
    sum.fill(0);
    let k = 0;
    for (; k + 4 <= r; k += 4) {
      const b0 = b[row * r + k]!, b1 = b[row * r + k + 1]!, b2 = b[row * r + k + 2]!, b3 = b[row * r + k + 3]!;
      const at0 = k * columns, at1 = at0 + columns, at2 = at1 + columns, at3 = at2 + columns;
      for (let j = 0; j < columns; j++) {
        sum[j]! += b0 * wide[at0 + j]! + b1 * wide[at1 + j]! + b2 * wide[at2 + j]! + b3 * wide[at3 + j]!;
      }
    }
    for (; k < r; k++) {
      const bk = b[row * r + k]!, at = k * columns;
      for (let j = 0; j < columns; j++) sum[j]! += bk * wide[at + j]!;
    }
    const first = row * columns;
    for (let j = 0; j < columns; j++) weight[first + j]! += scale * sum[j]!;
  }
}

/**
 * Compares logits `[tokens][V]` of base + adapter with those of the merged model: `difference` is the largest between two,
 * `largest` the largest magnitude of the former, `bound` what `dtype` allows in parts of it. Throws beyond that.
 */
export function checkLogits(
  expected: readonly Float32Array[],
  merged: readonly Float32Array[],
  dtype: ModelConfig["dtype"],
): { difference: number; largest: number; bound: number } {
  const bound = LOGIT_BOUND[dtype];
  const [difference, largest] = [largestDifference(expected, merged), largestDifference(expected)];
  if (!(difference <= bound * largest)) { // also where one of them is NaN
    const [off, most] = [difference.toPrecision(3), largest.toPrecision(3)];
    throw new Error(
      `Cannot accept the merge: its logits are up to ${off} off those of base + adapter, the largest of which is ${most}: ` +
        `rounding to ${dtype} explains at most ${bound} of that${dtype === "float32" ? "" : ": try --dtype float32"}`,
    );
  }
  return { difference, largest, bound };
}

/** The largest magnitude of `a - b`, or of `a` alone; NaN where any value is none, Infinity where rows are missing. */
export function largestDifference(a: readonly Float32Array[], b?: readonly Float32Array[]): number {
  if (b && (b.length !== a.length || a.some((row, t) => row.length !== b[t]!.length))) return Infinity;
  let most = 0;
  for (const [t, row] of a.entries()) {
    for (let v = 0; v < row.length; v++) {
      const off = Math.abs(b ? row[v]! - b[t]![v]! : row[v]!);
      if (!(off <= most)) most = off;
      if (Number.isNaN(off)) return NaN;
    }
  }
  return most;
}

/** The names of A and B by the weight that they change. */
function lowRankUpdates(config: ModelConfig, lora: LoraConfig): Map<string, { a: string; b: string }> {
  const all = adapterTensors(config, lora);
  const name = (layer: number, module: (typeof all)[number]["module"]) => `${moduleName(layer, module)}.weight`;
  // A and B of a module follow each other.
  return new Map(
    all.flatMap(({ kind, layer, module, name: a }, i) =>
      kind === "A" ? [[name(layer, module), { a, b: all[i + 1]!.name }]] : []
    ),
  );
}

/** Reads weights in float32, each in a buffer of its own, after checking what the file holds. */
function weightReader(
  source: TensorSource,
  config: ModelConfig,
): (name: string, shape: readonly number[]) => Float32Array {
  const packed = isQuantized(source) ? quantizedWeights(config) : new Set<string>();
  const check = (
    name: string,
    { found, shape }: { found: readonly number[] | undefined; shape: readonly number[] },
  ) => {
    if (found?.join() === shape.join()) return;
    throw new RangeError(
      `Cannot merge into "${source.path}": tensor "${name}" is ${found ? `[${found.join(", ")}]` : "missing"}: ` +
        `the config wants [${shape.join(", ")}]`,
    );
  };
  // Before the first byte is written; the shape of a 4-bit weight shows when it is read.
  for (const { name, shape } of parameterShapes(config)) {
    const found = source.tensors.get(name)?.shape;
    if (found === undefined || !packed.has(name)) check(name, { found, shape });
  }
  return (name, shape) => {
    if (!packed.has(name)) {
      const bytes = source.read(name), { dtype } = source.tensors.get(name)!;
      return dtype === "F32" ? new Float32Array(bytes.buffer) : toFloat32(bytes, dtype);
    }
    const state = readQuantState(source, name.slice(0, -".weight".length));
    check(name, { found: state.shape, shape });
    return dequantizeWeight(state);
  };
}

/** Throws for the first value that is not finite in `dtype`, by the tensor and the place. */
function checkValues(
  values: Float32Array,
  { name, shape, dtype }: {
    readonly name: string;
    readonly shape: readonly number[];
    readonly dtype: ModelConfig["dtype"];
  },
): void {
  const i = firstUnfit(values, STORED[dtype]);
  if (i < 0) return;
  const width = shape.at(-1)!, place = shape.length === 1 ? `${i}` : `${Math.floor(i / width)}, ${i % width}`;
  throw new RangeError(
    `Cannot merge "${name}": the value at [${place}] is ${values[i]}: a number that ${dtype} can hold is wanted`,
  );
}

function elements(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}
