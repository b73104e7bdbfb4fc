/**
 * Safetensors files: read lazily, validated exactly as the reference library does, written byte for byte as it writes.
 * Refuses one thing more than the reference, a tensor name given twice; never loads a file whole.
 * Format: https://github.com/huggingface/safetensors
 */
import { bitsPerElement, byteLength, type Dtype, dtypes } from "./dtype.ts";
import { exists, writeWhole } from "./files.ts";
import { scanHeader } from "./safetensors_header.ts";

/** Where a tensor lies: `begin` is a byte offset from the start of its file, `bytes` its length. */
export interface TensorInfo {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly begin: number;
  readonly bytes: number;
}

/** Tensors of one file or of several shards, read on demand; open until `close`. */
export interface TensorSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: Readonly<Record<string, string>>;
  /** All bytes of a tensor in a buffer of their own; throws when there is no such tensor. */
  read(name: string): Uint8Array<ArrayBuffer>;
  /** `length` bytes from byte `offset` of a tensor, in a buffer of their own. */
  readRange(name: string, offset: number, length: number): Uint8Array<ArrayBuffer>;
  close(): void;
  [Symbol.dispose](): void;
}

/** A tensor to write: `data` is called once, in file order, and must give exactly the bytes of the shape. */
export interface TensorSink {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly data: () => Uint8Array | Promise<Uint8Array>;
}

const MAX_HEADER = 100_000_000; // bytes: the reference's own limit
const READ_CHUNK = 1 << 30; // bytes: one read call of the system gives at most 2 GiB

/** Opens one file and checks its header and size; throws an error that names the file, the tensor and the value. */
export function openSafetensors(path: string): TensorSource {
  const file = openFile(path);
  try {
    const { tensors, metadata } = readHeader(file, path);
    return fileSource({ path, file, tensors, metadata });
  } catch (error) {
    file.close();
    throw error;
  }
}

/** A source over one open file whose tensors lie at known places; closing the source closes the file. */
export function fileSource(
  { path, file, tensors, metadata }: Pick<TensorSource, "path" | "tensors" | "metadata"> & {
    readonly file: Deno.FsFile;
  },
): TensorSource {
  const readRange = (name: string, offset: number, length: number): Uint8Array<ArrayBuffer> => {
    const info = tensors.get(name);
    if (!info) throw new Error(`Cannot read "${path}": it has no tensor "${name}"`);
    if (!(offset >= 0 && length >= 0 && offset + length <= info.bytes)) {
      throw new RangeError(
        `Cannot read "${path}": bytes ${offset} to ${
          offset + length
        } of tensor "${name}" are not among its ${info.bytes}`,
      );
    }
    return readAt(file, path, { at: info.begin + offset, length });
  };
  let open = true;
  const close = () => {
    if (open) file.close();
    open = false;
  };
  const read = (name: string) => readRange(name, 0, tensors.get(name)?.bytes ?? 0);
  return { path, tensors, metadata, read, readRange, close, [Symbol.dispose]: close };
}

/**
 * Opens a model folder: model.safetensors, else every shard that model.safetensors.index.json lists as one source.
 * Throws when neither is there, a shard name leaves the folder, or index and shards disagree.
 */
export function openModel(dir: string): TensorSource {
  const single = `${dir}/model.safetensors`;
  if (exists(single)) return openSafetensors(single);
  const path = `${single}.index.json`;
  if (!exists(path)) {
    throw new Error(
      `Cannot read "${dir}": it has no model.safetensors and no model.safetensors.index.json: a model folder is wanted: run "deno task 01" first`,
    );
  }
  let index: { weight_map?: unknown } | null;
  try {
    index = JSON.parse(Deno.readTextFileSync(path));
  } catch (error) {
    throw new SyntaxError(`Cannot read "${path}": ${(error as Error).message}`);
  }
  const map = index?.weight_map;
  if (typeof map !== "object" || map === null || Array.isArray(map)) {
    throw new SyntaxError(`Cannot read "${path}": it has no object "weight_map"`);
  }
  const shards = new Map<string, TensorSource>();
  const owner = new Map<string, TensorSource>();
  const tensors = new Map<string, TensorInfo>();
  const close = () => shards.forEach((shard) => shard.close());
  try {
    for (const [name, shard] of Object.entries(map)) {
      if (typeof shard !== "string" || !/^[^/\\:\0]+\.safetensors$/.test(shard)) {
        throw new RangeError(
          `Cannot read "${path}": tensor "${name}" is in ${JSON.stringify(shard)}: ` +
            "a shard must be a .safetensors file of the same folder",
        );
      }
      if (!shards.has(shard)) shards.set(shard, openSafetensors(`${dir}/${shard}`));
      const info = shards.get(shard)!.tensors.get(name);
      if (!info) throw new Error(`Cannot read "${path}": tensor "${name}" is not in ${shard}, where the index puts it`);
      tensors.set(name, info);
      owner.set(name, shards.get(shard)!);
    }
    for (const [shard, source] of shards) {
      for (const name of source.tensors.keys()) {
        if (owner.get(name) === source) continue;
        throw new Error(
          `Cannot read "${path}": ${shard} holds the tensor "${name}", which the index does not put there`,
        );
      }
    }
  } catch (error) {
    close();
    throw error;
  }
  const source = (name: string): TensorSource => {
    const found = owner.get(name);
    if (!found) throw new Error(`Cannot read "${path}": it has no tensor "${name}"`);
    return found;
  };
  return {
    path,
    tensors,
    metadata: [...shards.values()][0]?.metadata ?? {},
    read: (name) => source(name).read(name),
    readRange: (name, offset, length) => source(name).readRange(name, offset, length),
    close,
    [Symbol.dispose]: close,
  };
}

/**
 * Writes a file as the reference writer does: dtypes of high rank first, then names by their UTF-8 bytes, no gaps, header padded
 * to 8 bytes. One tensor is in memory at a time; the file appears under its name only when complete and synced.
 */
export async function writeSafetensors(
  path: string,
  tensors: readonly TensorSink[],
  metadata: Readonly<Record<string, string>> = { format: "pt" },
): Promise<void> {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot write "${path}": ${problem}`);
  };
  const rank = (sink: TensorSink): number => dtypes.indexOf(sink.dtype);
  const sorted = tensors.map((sink) => ({ sink, key: new TextEncoder().encode(sink.name) }))
    .sort((a, b) => rank(b.sink) - rank(a.sink) || compareBytes(a.key, b.key)).map(({ sink }) => sink);
  const entries = Object.keys(metadata).length > 0 ? [`"__metadata__":${JSON.stringify(metadata)}`] : [];
  const seen = new Set(["__metadata__"]);
  let offset = 0;
  for (const { name, dtype, shape } of sorted) {
    if (seen.has(name)) refuse(`the tensor name "${name}" is ${name === "__metadata__" ? "reserved" : "given twice"}`);
    if (!name.isWellFormed()) refuse(`the tensor name ${JSON.stringify(name)} is not well-formed Unicode`);
    seen.add(name);
    const end = offset + byteLength(dtype, shape);
    entries.push(`${JSON.stringify(name)}:{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${offset},${end}]}`);
    offset = end;
  }
  const json = new TextEncoder().encode(`{${entries.join(",")}}`);
  const length = Math.ceil(json.length / 8) * 8;
  if (length > MAX_HEADER) refuse(`the header has ${length} bytes: readers accept at most ${MAX_HEADER}`);
  const head = new Uint8Array(8 + length).fill(0x20);
  new DataView(head.buffer).setBigUint64(0, BigInt(length), true);
  head.set(json, 8);

  await writeWhole(path, async (partial) => {
    using file = await Deno.open(partial, { write: true, create: true, truncate: true });
    writeAll(file, head);
    for (const { name, dtype, shape, data } of sorted) {
      const bytes = await data();
      const want = byteLength(dtype, shape);
      if (bytes.length !== want) {
        refuse(`tensor "${name}" gave ${bytes.length} bytes: ${dtype} of shape [${shape.join(", ")}] has ${want}`);
      }
      writeAll(file, bytes);
    }
    await file.sync();
  });
}

/** Opens a file for reading; throws one sentence that names it when it is not there. */
export function openFile(path: string): Deno.FsFile {
  try {
    return Deno.openSync(path);
  } catch (error) {
    throw new Error(`Cannot read "${path}": ${error instanceof Deno.errors.NotFound ? "no such file" : error}`);
  }
}

/** Reads exactly `length` bytes at byte `at` of an open file; throws when the file ends before. */
export function readAt(
  file: Deno.FsFile,
  path: string,
  { at, length }: { readonly at: number; readonly length: number },
): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(length);
  file.seekSync(at, Deno.SeekMode.Start);
  for (let done = 0; done < length;) {
    const count = file.readSync(out.subarray(done, Math.min(length, done + READ_CHUNK)));
    if (count === null) {
      throw new Error(`Cannot read "${path}": it ends at byte ${at + done}, ${length - done} too early`);
    }
    done += count;
  }
  return out;
}

function writeAll(file: Deno.FsFile, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.length;) done += file.writeSync(bytes.subarray(done, done + READ_CHUNK));
}

function compareBytes(a: Uint8Array, b: Uint8Array): number {
  for (let i = 0; i < a.length && i < b.length; i++) if (a[i] !== b[i]) return a[i]! - b[i]!;
  return a.length - b.length;
}

/** The checks of the reference reader, in its order. */
function readHeader(file: Deno.FsFile, path: string): Pick<TensorSource, "tensors" | "metadata"> {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": ${problem}`);
  };
  const size = file.statSync().size;
  if (size < 8) refuse(`it has ${size} bytes: the header length alone takes 8`);
  const length = new DataView(readAt(file, path, { at: 0, length: 8 }).buffer).getBigUint64(0, true);
  if (length > MAX_HEADER) refuse(`it announces a header of ${length} bytes: at most ${MAX_HEADER} are allowed`);
  const start = 8 + Number(length);
  if (start > size) refuse(`it announces a header of ${length} bytes but has ${size} bytes in all`);
  let text = "";
  try {
    const bytes = readAt(file, path, { at: 8, length: start - 8 });
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    refuse("its header is not UTF-8");
  }
  const { entries, metadata } = scanHeader(text, path);
  entries.sort((a, b) => Number(a.begin - b.begin) || Number(a.end - b.end));
  const tensors = new Map<string, TensorInfo>();
  let last = 0n;
  for (const { name, dtype, shape, begin, end } of entries) {
    if (begin !== last || end < begin) {
      refuse(
        `tensor "${name}" has data_offsets [${begin}, ${end}]: it must begin at ${last}, where the one before ends`,
      );
    }
    let bits = 1n;
    for (const factor of [...shape, BigInt(bitsPerElement(dtype))]) {
      bits *= factor;
      if (bits >= 1n << 64n) refuse(`tensor "${name}" has shape [${shape.join(", ")}]: its size does not fit 64 bits`);
    }
    if (bits % 8n !== 0n) {
      refuse(`tensor "${name}" is ${dtype} of shape [${shape.join(", ")}]: ${bits} bits are not whole bytes`);
    }
    if (end - begin !== bits / 8n) {
      refuse(
        `tensor "${name}" is ${dtype} of shape [${shape.join(", ")}], ${bits / 8n} bytes, ` +
          `but data_offsets [${begin}, ${end}] hold ${end - begin}`,
      );
    }
    const huge = shape.find((axis) => axis > Number.MAX_SAFE_INTEGER); // only an empty tensor gets as far as this
    if (huge !== undefined && bits === 0n) refuse(`tensor "${name}" has an axis of ${huge}: at most 2^53 can be held`);
    const axes = shape.map(Number);
    tensors.set(name, { name, dtype, shape: axes, begin: start + Number(begin), bytes: Number(end - begin) });
    last = end;
  }
  if (BigInt(start) + last !== BigInt(size)) {
    refuse(`its tensors end at byte ${BigInt(start) + last} but the file ends at byte ${size}`);
  }
  return { tensors, metadata };
}
