/**
 * PyTorch checkpoints (`torch.save` since 1.6: a zip of one pickle and raw storages) read as tensors and plain values.
 * Refuses compressed and encrypted entries and views that leave their storage; the pickle is read by torch_pickle.ts, which executes nothing.
 * Formats: PKWARE APPNOTE 6.3 (zip, zip64), torch/serialization.py.
 */
import { byteLength } from "./dtype.ts";
import { fileSource, openFile, readAt, type TensorInfo, type TensorSource } from "./safetensors.ts";
import { type Dict, isView, type TensorView, unpickle, type Value } from "./torch_pickle.ts";

/** A checkpoint as a tensor source, with what was unwrapped or renamed on the way and the configuration stored beside the weights. */
export interface TorchCheckpoint extends TensorSource {
  readonly notes: readonly string[];
  readonly config: Readonly<Record<string, unknown>> | undefined;
}

const MAX_DIRECTORY = 64_000_000; // bytes of zip directory or pickle: a state dict of 100,000 tensors needs a third of it
const WEIGHTS = ["model", "state_dict", "model_state_dict", "model_state"];
const CONFIGS = ["config", "model_config", "model_args", "args", "hparams", "hyper_parameters"];

/** Opens a zip checkpoint; throws one sentence that names the file and what in it is not a plain state dict. */
export function openTorchCheckpoint(path: string): TorchCheckpoint {
  const file = openFile(path);
  try {
    return openArchive(file, path);
  } catch (error) {
    file.close();
    throw error;
  }
}

function openArchive(file: Deno.FsFile, path: string): TorchCheckpoint {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": ${problem}`);
  };
  const entries = zipEntries(file, path);
  const pickles = [...entries.keys()].filter((name) => /^[^/]+\/data\.pkl$/.test(name));
  if (pickles.length !== 1) refuse(`the zip has ${pickles.length} files "*/data.pkl": a checkpoint has one`);
  const folder = pickles[0]!.slice(0, -"data.pkl".length);
  const bytesOf = (name: string): Uint8Array | undefined => {
    const entry = entries.get(folder + name);
    if (entry && entry.bytes > MAX_DIRECTORY) {
      refuse(`${name} has ${entry.bytes} bytes: at most ${MAX_DIRECTORY} are read`);
    }
    return entry && readAt(file, path, { at: dataStart(file, path, entry), length: entry.bytes });
  };
  const order = new TextDecoder().decode(bytesOf("byteorder") ?? new TextEncoder().encode("little"));
  if (order.trim() !== "little") refuse(`its byteorder is ${JSON.stringify(order)}: only "little" is supported`);

  const top = unpickle(bytesOf("data.pkl")!, path);
  const { weights, notes } = findWeights(top, path);
  const tensors = new Map<string, TensorInfo>();
  const views = new Map<string, TensorView>();
  for (const [key, value] of weights) {
    if (!isView(value)) {
      notes.push(`"${String(key)}" is not a tensor: left out`);
      continue;
    }
    if (typeof key !== "string") return refuse(`a tensor has the name ${String(key)}: it must be a string`);
    const name = key.replace(/^(?:module\.|_orig_mod\.)+/, "");
    if (tensors.has(name)) refuse(`two tensors are called "${name}" once the prefixes module. and _orig_mod. are gone`);
    const { dtype, key: storage, count } = value.storage;
    const entry = entries.get(`${folder}data/${storage}`) ??
      refuse(`tensor "${key}" is in data/${storage}, which is not there`);
    const size = byteLength(dtype, []);
    if (entry.bytes !== count * size) {
      refuse(
        `data/${storage} of tensor "${key}" has ${entry.bytes} bytes: ${count} values of ${dtype} take ${count * size}`,
      );
    }
    const last = value.shape.reduce((sum, axis, i) => sum + (axis - 1) * value.stride[i]!, value.offset);
    const empty = value.shape.includes(0);
    if (!empty && last >= count) {
      refuse(`tensor "${key}" reaches value ${last} of data/${storage}, which has ${count}`);
    }
    const begin = dataStart(file, path, entry) + value.offset * size;
    tensors.set(name, { name, dtype, shape: value.shape, begin, bytes: byteLength(dtype, value.shape) });
    if (!empty && !isContiguous(value)) views.set(name, value);
  }
  const renamed =
    [...weights.keys()].filter((key) => typeof key === "string" && /^(module|_orig_mod)\./.test(key)).length;
  if (renamed > 0) notes.push(`the prefixes module. and _orig_mod. were taken off ${renamed} names`);

  const source = fileSource({ path, file, tensors, metadata: {} });
  const read = (name: string): Uint8Array<ArrayBuffer> => {
    const view = views.get(name);
    if (!view) return source.read(name);
    const size = byteLength(view.storage.dtype, []);
    const held = view.storage.count * size;
    if (tensors.get(name)!.bytes > held) refuse(`tensor "${name}" repeats its ${held} stored bytes: store it expanded`);
    const span = 1 + view.shape.reduce((sum, axis, i) => sum + (axis - 1) * view.stride[i]!, 0);
    return gather(readAt(file, path, { at: tensors.get(name)!.begin, length: span * size }), view);
  };
  const readRange = (name: string, offset: number, length: number): Uint8Array<ArrayBuffer> => {
    if (!views.has(name)) return source.readRange(name, offset, length);
    const all = read(name);
    if (offset >= 0 && length >= 0 && offset + length <= all.length) return all.slice(offset, offset + length);
    return refuse(`bytes ${offset} to ${offset + length} of tensor "${name}" are not among its ${all.length}`);
  };
  return { ...source, read, readRange, notes, config: findConfig(top) };
}

/** The dictionary of tensors: the whole file, or what lies under one of the usual names, at most three levels down. */
function findWeights(top: Value, path: string): { weights: Dict; notes: string[] } {
  const notes: string[] = [];
  let at = top;
  for (let depth = 0; depth < 4 && at instanceof Map; depth++) {
    const dict: Dict = at;
    if ([...dict.values()].some(isView)) return { weights: dict, notes };
    const key = WEIGHTS.find((word) => dict.get(word) instanceof Map);
    if (key === undefined) break;
    const others = [...dict.keys()].filter((other) => other !== key).map(String);
    notes.push(
      `the weights are under "${key}"${others.length > 0 ? `; beside it: ${others.join(", ")}` : ""}`,
    );
    at = dict.get(key)!;
  }
  throw new RangeError(
    `Cannot read "${path}": it has no dictionary of tensors at the top or under ${WEIGHTS.join(", ")}`,
  );
}

/** The settings that training scripts store beside the weights: the numbers, words and switches of a dictionary. */
function findConfig(top: Value): Readonly<Record<string, unknown>> | undefined {
  if (!(top instanceof Map)) return undefined;
  const found = CONFIGS.map((word) => top.get(word)).find((value) => value instanceof Map);
  if (!(found instanceof Map)) return undefined;
  return Object.fromEntries(
    [...found].filter(([key, value]) =>
      typeof key === "string" && (value === null || ["string", "number", "boolean"].includes(typeof value))
    ),
  );
}

function isContiguous({ shape, stride }: TensorView): boolean {
  let expected = 1;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    if (shape[axis] !== 1 && stride[axis] !== expected) return false;
    expected *= shape[axis]!;
  }
  return true;
}

/** The values of a strided view in row-major order; `span` starts at the view's first value. */
function gather(span: Uint8Array, view: TensorView): Uint8Array<ArrayBuffer> {
  const size = byteLength(view.storage.dtype, []);
  const out = new Uint8Array(byteLength(view.storage.dtype, view.shape));
  let to = 0;
  const walk = (axis: number, from: number) => {
    if (axis === view.shape.length) {
      for (let i = 0; i < size; i++) out[to++] = span[from * size + i]!;
      return;
    }
    for (let i = 0; i < view.shape[axis]!; i++) walk(axis + 1, from + i * view.stride[axis]!);
  };
  walk(0, 0);
  return out;
}

interface ZipEntry {
  readonly name: string;
  readonly bytes: number;
  readonly header: number;
}

/** The central directory of a zip or zip64 file; only stored entries, the only kind that torch writes, are accepted. */
function zipEntries(file: Deno.FsFile, path: string): Map<string, ZipEntry> {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": ${problem}`);
  };
  const size = file.statSync().size;
  const view = (at: number, length: number): DataView => {
    if (!(at >= 0 && at + length <= size)) {
      refuse(`the zip points at bytes ${at} to ${at + length} of a file of ${size}`);
    }
    return new DataView(readAt(file, path, { at, length }).buffer);
  };
  const long = (from: DataView, at: number): number => Number(from.getBigUint64(at, true));
  if (size < 22 || view(0, 4).getUint32(0) !== 0x504b0304) {
    refuse("it is not a zip file: torch.save of PyTorch 1.6 or later writes one, so load it there and save it again");
  }
  const tailStart = Math.max(0, size - 22 - 0xffff);
  const tail = view(tailStart, size - tailStart);
  let end = tail.byteLength - 22;
  const ends = (at: number) =>
    tail.getUint32(at, true) === 0x06054b50 && at + 22 + tail.getUint16(at + 20, true) === tail.byteLength;
  while (end >= 0 && !ends(end)) end--;
  if (end < 0) refuse("the zip has no directory at its end: the file is cut short");
  let [count, length, start] = [
    tail.getUint16(end + 10, true),
    tail.getUint32(end + 12, true),
    tail.getUint32(end + 16, true),
  ];
  if (count === 0xffff || length === 0xffffffff || start === 0xffffffff) {
    const locator = view(tailStart + end - 20, 20);
    if (locator.getUint32(0, true) !== 0x07064b50) refuse("the zip64 locator is missing");
    const record = view(long(locator, 8), 56);
    if (record.getUint32(0, true) !== 0x06064b50) refuse("the zip64 directory record is missing");
    [count, length, start] = [long(record, 32), long(record, 40), long(record, 48)];
  }
  if (length > MAX_DIRECTORY) refuse(`the zip directory has ${length} bytes: at most ${MAX_DIRECTORY} are read`);
  const directory = view(start, length);
  const entries = new Map<string, ZipEntry>();
  for (let i = 0, at = 0; i < count; i++) {
    if (at + 46 > length || directory.getUint32(at, true) !== 0x02014b50) {
      refuse(`entry ${i} of the zip directory is broken`);
    }
    const [nameLength, extraLength] = [directory.getUint16(at + 28, true), directory.getUint16(at + 30, true)];
    const next = at + 46 + nameLength + extraLength + directory.getUint16(at + 32, true);
    if (next > length) refuse(`entry ${i} of the zip directory is broken`);
    const name = new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, nameLength));
    let [stored, bytes, header] = [20, 24, 42].map((field) => directory.getUint32(at + field, true)) as [
      number,
      number,
      number,
    ];
    const extraEnd = at + 46 + nameLength + extraLength;
    for (let field = at + 46 + nameLength; field + 4 <= extraEnd;) { // zip64 sizes: only those that do not fit, in this order
      let value = field + 4;
      const fieldEnd = Math.min(extraEnd, value + directory.getUint16(field + 2, true));
      const wide = (narrow: number) =>
        narrow === 0xffffffff && (value += 8) <= fieldEnd ? long(directory, value - 8) : narrow;
      if (directory.getUint16(field, true) === 1) [bytes, stored, header] = [wide(bytes), wide(stored), wide(header)];
      field = fieldEnd;
    }
    const method = directory.getUint16(at + 10, true);
    if (method !== 0 || stored !== bytes) {
      refuse(`"${name}" is compressed (method ${method}): torch.save stores it plain`);
    }
    if ((directory.getUint16(at + 8, true) & 1) !== 0) refuse(`"${name}" is encrypted`);
    if (entries.has(name)) refuse(`the zip has "${name}" twice`);
    entries.set(name, { name, bytes, header });
    at = next;
  }
  return entries;
}

/** Where an entry's data begins: its own header has names and padding of its own length. */
function dataStart(file: Deno.FsFile, path: string, { name, bytes, header }: ZipEntry): number {
  const size = file.statSync().size;
  const local = header + 30 <= size ? new DataView(readAt(file, path, { at: header, length: 30 }).buffer) : undefined;
  const start = local ? header + 30 + local.getUint16(26, true) + local.getUint16(28, true) : size;
  if (local?.getUint32(0, true) !== 0x04034b50 || start + bytes > size) {
    throw new RangeError(
      `Cannot read "${path}": "${name}" of ${bytes} bytes is not at byte ${header} of a file of ${size}`,
    );
  }
  return start;
}
