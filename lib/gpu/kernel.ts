/**
 * Kernels: a WGSL file, compiled per set of constants, and the recording of its dispatches. Bindings are written once,
 * in the WGSL, and found here by name.
 */
import type { Gpu } from "./device.ts";
import { type Image, imageConstants, imageOf, readImages } from "./image.ts";
import { createBuffer, type Tensor } from "./tensor.ts";
import { testAtEnd, unroll } from "./unroll.ts";
import subgroupLanes from "../../kernels/lanes_subgroup.wgsl" with { type: "text" };
import sharedLanes from "../../kernels/lanes_shared.wgsl" with { type: "text" };

/** Workgroups in x, y, z; null leaves the dispatch out. */
export type Grid = readonly [number, number, number] | null;

/** One recorded dispatch: everything is fixed but the grid, which may follow a `Rows`. */
export interface Dispatch {
  readonly label: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  readonly grid: () => Grid;
  /** What it reads as images, and the buffers that it writes. */
  readonly images: readonly Image[];
  readonly writes: readonly GPUBuffer[];
}

/** A command that is no dispatch: zero a tensor, or copy one into another. */
export type Command = Dispatch | { readonly clear: Tensor } | {
  readonly copy: { from: Tensor; to: Tensor; bytes: number };
};

/** A number of rows that changes from run to run: tokens of a micro-batch, labelled tokens of a chunk. */
export interface Rows {
  /** Rows of the next run; kernels read the same number as `rows.count`. */
  readonly count: number;
  /** Sets the rows of the next run; `first` is the position of the first one where a kernel works on a part. */
  set(count: number, first?: number): void;
  readonly buffer: GPUBuffer;
}

/** Makes a row counter, 0 rows at first. */
export function createRows(gpu: Gpu, name: string): Rows {
  const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
  const buffer = createBuffer(gpu, { label: name, size: 16, usage });
  let rows = 0, start = 0;
  return {
    buffer,
    get count() {
      return rows;
    },
    set(count, first = 0) {
      if (count === rows && first === start) return;
      [rows, start] = [count, first];
      gpu.queue.writeBuffer(buffer, 0, new Uint32Array([count, first, 0, 0]));
    },
  };
}

/** What one recording of an entry point is made of. */
export interface Recording {
  /** Tensors, or raw buffers, by the name of their binding. */
  readonly bind: Readonly<Record<string, Tensor | GPUBuffer>>;
  /** Values of `override` constants. */
  readonly constants?: Readonly<Record<string, number>>;
  /** Values of the fields of the file's `struct Dims`, bound as `dims`. */
  readonly dims?: Readonly<Record<string, number>>;
  readonly grid: Grid | (() => Grid);
}

interface Binding {
  readonly index: number;
  readonly image: boolean;
  readonly written: boolean;
}

/** One WGSL file. Recording is where names and constants are checked. */
export class Kernel {
  readonly name: string;
  readonly #gpu: Gpu;
  readonly #source: string;
  readonly #bindings = new Map<string, Binding>();
  readonly #dims: readonly { name: string; type: string }[];
  readonly #modules = new Map<string, GPUShaderModule>();
  readonly #pipelines = new Map<string, GPUComputePipeline>();

  /** `source` is the text of `kernels/<name>.wgsl`; the snippet of the device's lane model is appended when it is used. */
  constructor(gpu: Gpu, name: string, source: string) {
    this.#gpu = gpu;
    this.name = name;
    const lanes = gpu.lanes === "subgroup" ? subgroupLanes : sharedLanes;
    const whole = /\blanes_\w+\(/.test(source) ? `${source}\n${lanes}` : source;
    this.#source = gpu.lanes === "subgroup" ? readImages(whole) : whole;
    const declaration = /@group\(0\) @binding\((\d+)\) var(<[^>]*>)? (\w+): ([^;]+);/g;
    for (const [, index, space, binding, type] of this.#source.matchAll(declaration)) {
      this.#bindings.set(binding!, {
        index: Number(index),
        image: type!.startsWith("texture_storage_2d"),
        written: space?.includes("read_write") ?? false,
      });
    }
    const struct = /struct Dims \{([^}]*)\}/.exec(source)?.[1] ?? "";
    this.#dims = [...struct.matchAll(/(\w+): (u32|f32)/g)].map(([, field, type]) => ({ name: field!, type: type! }));
  }

  /** Records a dispatch of `entry`. Throws `TypeError` for an unknown binding, constant or dimension. */
  record(entry: string, { bind, constants = {}, dims, grid }: Recording): Dispatch {
    const label = `${this.name}.${entry}`, all = { ...constants };
    const entries: GPUBindGroupEntry[] = [], images: Image[] = [], writes: GPUBuffer[] = [];
    for (const [name, resource] of Object.entries(bind)) {
      const binding = this.#bindings.get(name);
      if (!binding) {
        throw new TypeError(`Cannot record ${label}: "${name}" is not one of ${[...this.#bindings.keys()].join(", ")}`);
      }
      const buffer = "buffer" in resource ? resource.buffer as GPUBuffer : resource;
      const image = binding.image ? imageOf(this.#gpu, buffer) : undefined;
      if (image) {
        images.push(image);
        Object.assign(all, imageConstants(name, image));
      }
      if (binding.written) writes.push(buffer);
      entries.push({ binding: binding.index, resource: image ? image.view : { buffer } });
    }
    if (dims && !this.#bindings.has("dims")) {
      throw new TypeError(`Cannot record ${label}: ${this.name}.wgsl has no dims`);
    }
    if (dims) {
      entries.push({ binding: this.#bindings.get("dims")!.index, resource: { buffer: this.#dimsBuffer(label, dims) } });
    }
    const pipeline = this.#pipeline(entry, all);
    const bindGroup = this.#checked(
      `record ${label}`,
      () => this.#gpu.device.createBindGroup({ label, layout: pipeline.getBindGroupLayout(0), entries }),
    );
    const limit = this.#gpu.limits.maxComputeWorkgroupsPerDimension;
    const checked = (size: Grid): Grid => {
      if (size?.some((n) => n > limit)) {
        throw new RangeError(`Cannot dispatch ${label}: grid [${size}] exceeds ${limit}`);
      }
      return size;
    };
    return {
      label,
      pipeline,
      bindGroup,
      grid: typeof grid === "function" ? () => checked(grid()) : () => checked(grid),
      images,
      writes,
    };
  }

  #pipeline(entry: string, constants: Readonly<Record<string, number>>): GPUComputePipeline {
    const key = `${entry} ${JSON.stringify(constants)}`;
    const cached = this.#pipelines.get(key);
    if (cached) return cached;
    // The lane count is the device's unless a kernel asks for its own.
    const lanes = this.#source.includes("override LANES") ? { LANES: laneCount(this.#gpu) } : {};
    const all = { ...lanes, ...constants };
    const unrolled = unroll(this.#source, all), text = this.#gpu.lanes === "subgroup" ? testAtEnd(unrolled) : unrolled;
    const declared = Object.fromEntries(
      Object.entries(all).filter(([name]) => new RegExp(`\\boverride ${name}\\b`).test(text)),
    );
    if (Object.keys(declared).length < Object.keys(all).length) {
      const unknown = Object.keys(all).find((name) => !(name in declared));
      throw new TypeError(`Cannot compile ${this.name}.wgsl: it has no override constant "${unknown}"`);
    }
    const label = `${this.name}.${entry}`;
    const pipeline = this.#checked(`compile ${label}`, () => {
      const module = this.#module(text);
      return this.#gpu.device.createComputePipeline({
        label,
        layout: "auto",
        compute: { module, entryPoint: entry, constants: declared },
      });
    });
    this.#pipelines.set(key, pipeline);
    return pipeline;
  }

  #module(text: string): GPUShaderModule {
    const known = this.#modules.get(text);
    if (known) return known;
    const module = this.#gpu.device.createShaderModule({ label: `${this.name}.wgsl`, code: text });
    this.#modules.set(text, module);
    return module;
  }

  /** Runs `make` inside a validation scope, so that a bad kernel fails here, with naga's own message and caret. */
  #checked<T>(what: string, make: () => T): T {
    this.#gpu.device.pushErrorScope("validation");
    const made = make();
    this.#gpu.device.popErrorScope().then((error) => {
      if (error) throw new Error(`Cannot ${what}: ${error.message.trim()}`);
    });
    return made;
  }

  #dimsBuffer(label: string, dims: Readonly<Record<string, number>>): GPUBuffer {
    const missing = this.#dims.find(({ name }) => dims[name] === undefined);
    const unknown = Object.keys(dims).find((name) => !this.#dims.some((field) => field.name === name));
    if (missing || unknown) {
      throw new TypeError(
        `Cannot record ${label}: dims ${missing ? `lack "${missing.name}"` : `have no "${unknown}"`}`,
      );
    }
    const size = Math.ceil(this.#dims.length / 4) * 16;
    const buffer = createBuffer(this.#gpu, {
      label: `${label}.dims`,
      size,
      usage: GPUBufferUsage.UNIFORM,
      mappedAtCreation: true,
    });
    const view = new DataView(new ArrayBuffer(size));
    this.#dims.forEach(({ name, type }, i) =>
      type === "f32" ? view.setFloat32(i * 4, dims[name]!, true) : view.setUint32(i * 4, dims[name]!, true)
    );
    new Uint8Array(buffer.getMappedRange()).set(new Uint8Array(view.buffer));
    buffer.unmap();
    return buffer;
  }
}

/** Lanes per workgroup of the kernels that work row by row. */
export function laneCount(gpu: Gpu): number {
  return gpu.lanes === "subgroup" ? gpu.subgroup : 64;
}

/** Folds a long one-dimensional grid into two dimensions; kernels rebuild the index as `group.x + group.y * 32768u`. */
export function fold(groups: number): Grid {
  return groups === 0 ? null : [Math.min(groups, 32768), Math.ceil(groups / 32768), 1];
}
