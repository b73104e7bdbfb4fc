/**
 * The low-rank adapter on the GPU (LoRA, arXiv:2106.09685): per layer one buffer of parameters and one of gradients, laid
 * out so that projections which share an input share their A product, and the linear layer with the adapter inside it.
 */
import type { Gpu } from "../gpu/device.ts";
import type { Command, Rows } from "../gpu/kernel.ts";
import { createTensor, downloadBytes, type Tensor, upload } from "../gpu/tensor.ts";
import type { ParameterSlot } from "../ops/adamw.ts";
import type { Dropout } from "../ops/dropout.ts";
import type { LoraOperands } from "../ops/matmul_operands.ts";
import { adapterTensors, type LoraConfig, scaling } from "./adapter.ts";
import { type LinearModule, linearModules, linearShape, type ModelConfig } from "./config.ts";
import type { Ops } from "./ops.ts";
import { FUSED, type FusedName, type Linear } from "./weights.ts";

/** Where the adapter of one projection lies: offsets in elements of the layer's buffer. */
interface Part {
  readonly a: number;
  readonly b: number;
  /** First of its columns in the shared product `u`. */
  readonly u: number;
}

/** The adapter of one fused projection. */
export interface LoraLinear {
  /** One entry per projection, null where it has no adapter. */
  readonly parts: readonly (Part | null)[];
  /** Rank, and rank rounded up to whole vec4 pairs; the padding is zero and stays zero. */
  readonly r: number;
  readonly padded: number;
  /** Offset of the stacked A matrices `[columns, k]`. */
  readonly a: number;
  /** Columns of `u`: padded rank times adapted projections. */
  readonly columns: number;
  readonly scale: number;
  readonly params: Tensor;
  readonly grads: Tensor;
}

/** One layer's adapter; a fused projection without any adapted part is null. */
export interface LayerLora extends Record<FusedName, LoraLinear | null> {
  readonly params: Tensor;
  readonly grads: Tensor;
  readonly slots: readonly ParameterSlot[];
}

/** Makes the adapter's buffers and fills them from `tensors` (PEFT names, as in adapter_model.safetensors). */
export async function createLora(
  gpu: Gpu,
  { config, lora, tensors }: { config: ModelConfig; lora: LoraConfig; tensors: ReadonlyMap<string, Float32Array> },
): Promise<LayerLora[]> {
  const padded = Math.ceil(lora.r / 8) * 8, scale = scaling(lora);
  const names = new Map(adapterTensors(config, lora).map((t) => [`${t.layer} ${t.module} ${t.kind}`, t.name]));
  const layers: LayerLora[] = [];
  for (let l = 0; l < config.num_hidden_layers; l++) {
    let end = 0;
    const slots: ParameterSlot[] = [];
    const claim = (
      name: string,
      { rows, columns, stride }: { rows: number; columns: number; stride: number },
      real: number,
    ) => {
      slots.push({ name, offset: end, elements: real * columns, columns, stride });
      const offset = end;
      end += rows * stride;
      return offset;
    };
    const layout = (fused: FusedName) => {
      const modules: readonly LinearModule[] = FUSED[fused];
      const adapted = modules.map((module) => names.get(`${l} ${module} A`) !== undefined);
      const first = end;
      const a = modules.map((module, i) => {
        const k = linearShape(config, module)[1];
        return adapted[i] ? claim(names.get(`${l} ${module} A`)!, { rows: padded, columns: k, stride: k }, lora.r) : 0;
      });
      const b = modules.map((module, i) => {
        const n = linearShape(config, module)[0];
        return adapted[i] ? claim(names.get(`${l} ${module} B`)!, { rows: n, columns: lora.r, stride: padded }, n) : 0;
      });
      let u = 0;
      const parts = modules.map((_, i) => adapted[i] ? { a: a[i]!, b: b[i]!, u: u++ * padded } : null);
      return { parts, a: first, columns: u * padded };
    };
    const fused = Object.fromEntries((Object.keys(FUSED) as FusedName[]).map((name) => [name, layout(name)]));
    const params = createTensor(gpu, { name: `layers.${l}.lora`, shape: [Math.max(end, 4)] });
    const grads = createTensor(gpu, { name: `layers.${l}.lora.grad`, shape: [Math.max(end, 4)] });
    const values = new Float32Array(end);
    for (const slot of slots) scatter(slot, need(tensors, slot.name), values);
    await upload(gpu, params, values);
    const linear = (name: FusedName): LoraLinear | null =>
      fused[name]!.columns === 0 ? null : { ...fused[name]!, r: lora.r, padded, scale, params, grads };
    layers.push({
      qkv: linear("qkv"),
      o: linear("o"),
      gateUp: linear("gateUp"),
      down: linear("down"),
      params,
      grads,
      slots,
    });
  }
  return layers;
}

function need(tensors: ReadonlyMap<string, Float32Array>, name: string): Float32Array {
  const found = tensors.get(name);
  if (!found) throw new Error(`Cannot load the adapter: it has no tensor "${name}"`);
  return found;
}

/** Copies a tensor's rows to where they lie in a parameter buffer. */
export function scatter(slot: ParameterSlot, tensor: Float32Array, buffer: Float32Array): void {
  if (tensor.length !== slot.elements) {
    throw new RangeError(`Cannot load "${slot.name}": it has ${tensor.length} elements: ${slot.elements} are wanted`);
  }
  const { offset, columns, stride } = slot;
  for (let row = 0; row * columns < slot.elements; row++) {
    buffer.set(tensor.subarray(row * columns, (row + 1) * columns), offset + row * stride);
  }
}

/** The reverse of `scatter`. */
export function gather(slot: ParameterSlot, buffer: Float32Array): Float32Array<ArrayBuffer> {
  const tensor = new Float32Array(slot.elements);
  const { offset, columns, stride } = slot;
  for (let row = 0; row * columns < slot.elements; row++) {
    tensor.set(buffer.subarray(offset + row * stride, offset + row * stride + columns), row * columns);
  }
  return tensor;
}

/** Reads parameters (or anything of their layout) back by tensor name. */
export async function readSlots(
  gpu: Gpu,
  groups: readonly { readonly tensor: Tensor; readonly slots: readonly ParameterSlot[] }[],
): Promise<Map<string, Float32Array<ArrayBuffer>>> {
  const out = new Map<string, Float32Array<ArrayBuffer>>();
  for (const { tensor, slots } of groups) {
    const buffer = new Float32Array((await downloadBytes(gpu, tensor)).buffer);
    for (const slot of slots) out.set(slot.name, gather(slot, buffer));
  }
  return out;
}

/** Dropout of what the adapter reads, while it trains: each projection draws its own, as in PEFT. */
export interface LoraDropout {
  readonly op: Dropout;
  /** `[rows, k]` for the widest k. */
  readonly scratch: Tensor;
  readonly layer: number;
}

/** Tells the projections of a model apart. */
function salt({ layer }: LoraDropout, module: LinearModule): number {
  return layer * linearModules.length + linearModules.indexOf(module);
}

/** Tensors of one linear layer's forward pass; `u` `[rows, lora.columns]` is kept for backward. */
export interface LinearForward {
  readonly ops: Ops;
  readonly rows: Rows;
  readonly linear: Linear;
  readonly lora: LoraLinear | null;
  readonly x: Tensor;
  readonly u: Tensor | undefined;
  readonly out: Tensor;
  /** Added to the result: the residual. */
  readonly plus?: Tensor;
  readonly dropout?: LoraDropout | undefined;
}

/** `out = x · Wᵀ + scale · (x · Aᵀ) · Bᵀ (+ plus)`: the adapter rides in the base product as extra inner columns. */
export function linearForward(t: LinearForward): Command[] {
  const { ops, rows, linear, lora } = t;
  const commands = lowRankInput(t);
  const product = {
    rows,
    x: { tensor: t.x },
    w: { tensor: linear.weight },
    out: { tensor: t.out },
    n: linear.n,
    k: linear.k,
  };
  commands.push(ops.matmul.nt({ ...product, lora: lora ? segments(linear, lora, t.u!) : undefined, plus: t.plus }));
  return commands;
}

/** `u = scale · x · Aᵀ` for the stacked A of all adapted projections: all that backward needs of this layer's forward. */
export function lowRankInput(t: Omit<LinearForward, "out" | "plus">): Command[] {
  const { ops, rows, linear, lora, x, u, dropout } = t;
  if (!lora) return [];
  const k = linear.k, product = { rows, k, scale: lora.scale };
  if (!dropout) {
    const w = { tensor: lora.params, offset: lora.a, stride: k };
    return [ops.matmul.nt({ ...product, x: { tensor: x }, w, out: { tensor: u! }, n: lora.columns })];
  }
  return linear.parts.flatMap(({ module }, i) => {
    const part = lora.parts[i];
    if (!part) return [];
    const out = { tensor: u!, offset: part.u, stride: lora.columns };
    const w = { tensor: lora.params, offset: part.a, stride: k };
    return [
      dropout.op.apply({ rows, x, out: dropout.scratch, dim: k, salt: salt(dropout, module) }),
      ops.matmul.nt({ ...product, x: { tensor: dropout.scratch, stride: k }, w, out, n: lora.padded }),
    ];
  });
}

function segments(linear: Linear, lora: LoraLinear, u: Tensor): LoraOperands {
  return {
    x: { tensor: u, stride: lora.columns },
    w: lora.params,
    segments: linear.parts.map(({ columns }, i) => {
      const part = lora.parts[i];
      return part ? { columns, r: lora.padded, x: part.u, w: part.b } : { columns, r: 0, x: 0, w: 0 };
    }),
  };
}

/** Tensors of one linear layer's backward pass; `v` is scratch like `u`. */
export interface LinearBackward {
  readonly ops: Ops;
  readonly rows: Rows;
  readonly linear: Linear;
  readonly lora: LoraLinear | null;
  readonly x: Tensor;
  readonly u: Tensor | undefined;
  readonly v: Tensor | undefined;
  readonly dout: Tensor;
  /** Gradient of `x`, overwritten; left out where nobody needs it. */
  readonly dx?: Tensor | undefined;
  /** Gradient of the base weight `[n, k]`, added to, in full training. */
  readonly dweight?: Tensor | undefined;
  readonly dropout?: LoraDropout | undefined;
}

/** `dB += doutᵀ · u`, `v = scale · dout · B`, `dA += vᵀ · x`, `dx = dout · W + v · A`; in full training `dW += doutᵀ · x`. */
export function linearBackward(t: LinearBackward): Command[] {
  const { ops: { matmul }, rows, linear, lora, dropout } = t;
  const commands: Command[] = [];
  if (lora) {
    let column = 0;
    linear.parts.forEach(({ module, columns }, i) => {
      const part = lora.parts[i];
      if (part) {
        const dout = { tensor: t.dout, offset: column, stride: linear.n };
        const b = { offset: part.b, stride: lora.padded };
        commands.push(
          matmul.tn({
            rows,
            x: dout,
            w: { tensor: t.u!, offset: part.u, stride: lora.columns },
            out: { tensor: lora.grads, ...b },
            m: columns,
            n: lora.padded,
            plus: "out",
          }),
          matmul.nn({
            rows,
            x: dout,
            w: { tensor: lora.params, ...b },
            out: { tensor: t.v!, offset: part.u, stride: lora.columns },
            n: lora.padded,
            k: columns,
            scale: lora.scale,
          }),
        );
        if (dropout) {
          commands.push(
            dropout.op.apply({ rows, x: t.x, out: dropout.scratch, dim: linear.k, salt: salt(dropout, module) }),
            matmul.tn({
              rows,
              x: { tensor: t.v!, offset: part.u, stride: lora.columns },
              w: { tensor: dropout.scratch, stride: linear.k },
              out: { tensor: lora.grads, offset: part.a, stride: linear.k },
              m: lora.padded,
              n: linear.k,
              plus: "out",
            }),
          );
        }
      }
      column += columns;
    });
    if (!dropout) {
      commands.push(matmul.tn({
        rows,
        x: { tensor: t.v!, stride: lora.columns },
        w: { tensor: t.x },
        out: { tensor: lora.grads, offset: lora.a, stride: linear.k },
        m: lora.columns,
        n: linear.k,
        plus: "out",
      }));
    }
  }
  if (t.dweight) {
    const operands = { x: { tensor: t.dout }, w: { tensor: t.x }, out: { tensor: t.dweight } };
    commands.push(matmul.tn({ rows, ...operands, m: linear.n, n: linear.k, plus: "out" }));
  }
  if (t.dx) {
    const a = lora && !dropout && {
      x: { tensor: t.v!, stride: lora.columns },
      w: lora.params,
      segments: [{ columns: linear.k, r: lora.columns, x: 0, w: lora.a }],
    };
    const operands = { x: { tensor: t.dout }, w: { tensor: linear.weight }, out: { tensor: t.dx } };
    commands.push(matmul.nn({ rows, ...operands, n: linear.k, k: linear.n, lora: a || undefined }));
    if (lora && dropout) commands.push(...throughDropout({ ...t, lora, dropout, dx: t.dx }));
  }
  return commands;
}

/** Adds to `dx` what comes back through the adapter, projection by projection: `dropout(v · A)`. */
function throughDropout(t: LinearBackward & { lora: LoraLinear; dropout: LoraDropout; dx: Tensor }): Command[] {
  const { ops, rows, linear, lora, dropout, dx } = t, k = linear.k, y = dropout.scratch;
  return linear.parts.flatMap(({ module }, i) => {
    const part = lora.parts[i];
    if (!part) return [];
    const x = { tensor: t.v!, offset: part.u, stride: lora.columns };
    const w = { tensor: lora.params, offset: part.a, stride: k };
    return [
      ops.matmul.nn({ rows, x, w, out: { tensor: y, stride: k }, n: k, k: lora.padded }),
      dropout.op.add({ rows, y, dx, dim: k, salt: salt(dropout, module) }),
    ];
  });
}
