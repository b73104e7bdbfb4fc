/**
 * Tensors: a name, a shape, an element type and one GPU buffer of their own. No strides, no views, no reference
 * counting: row-major, the last axis contiguous, destroyed by whoever owns the handle that they were made through.
 */
import type { Gpu } from "./device.ts";
import { destroyImage, imageBytes, wrote } from "./image.ts";

/** Element types as they lie in the buffer; two f16 or bf16 share a 32-bit word, four u8 do. */
export type Storage = "f32" | "u32" | "f16" | "bf16" | "u8";

/** A named array on the GPU. */
export interface Tensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: Storage;
  readonly buffer: GPUBuffer;
  readonly bytes: number;
}

/** Bytes of an element. */
export const BYTES: Readonly<Record<Storage, number>> = { f32: 4, u32: 4, f16: 2, bf16: 2, u8: 1 };

/** What kernels that read several float types call them: their constants F32, F16 and BF16. */
export const FLOAT_TYPE: Readonly<Partial<Record<Storage, number>>> = { f32: 0, f16: 1, bf16: 2 };

/** Bytes that a tensor takes in its buffer, rounded up to whole vec4 words so that kernels can load 16 bytes. */
export function tensorBytes(shape: readonly number[], dtype: Storage): number {
  const elements = shape.reduce((product, n) => product * n, 1);
  return Math.max(16, Math.ceil((elements * BYTES[dtype]) / 16) * 16);
}

/** The same device for an owner: what is made through this handle is counted by `ownedBytes` and freed by `destroyOwned`. */
export function own(gpu: Gpu): Gpu {
  return { ...gpu, owned: new Set() };
}

/** Makes a buffer that lives as long as the owner of `gpu`. */
export function createBuffer(gpu: Gpu, descriptor: GPUBufferDescriptor): GPUBuffer {
  const buffer = gpu.device.createBuffer(descriptor);
  gpu.owned?.add(buffer);
  return buffer;
}

/** Bytes of all that was made through a handle: its buffers, and the images of them. */
export function ownedBytes({ owned = new Set() }: Gpu): { buffers: number; images: number } {
  let buffers = 0, images = 0;
  for (const buffer of owned) {
    buffers += buffer.size;
    images += imageBytes(buffer);
  }
  return { buffers, images };
}

/** Frees all that was made through a handle. */
export function destroyOwned({ owned = new Set() }: Gpu): void {
  for (const buffer of owned) {
    destroyImage(buffer);
    buffer.destroy();
  }
  owned.clear();
}

/** Allocates a zeroed tensor. Throws `RangeError` where the device cannot bind so large a buffer. */
export function createTensor(
  gpu: Gpu,
  { name, shape, dtype = "f32" }: { name: string; shape: readonly number[]; dtype?: Storage },
): Tensor {
  const bytes = tensorBytes(shape, dtype);
  const limit = Math.min(gpu.limits.maxStorageBufferBindingSize, gpu.limits.maxBufferSize);
  if (bytes > limit) {
    throw new RangeError(
      `Cannot allocate "${name}" [${shape}] ${dtype}: ${bytes} bytes are more than the ${limit} that ${gpu.name} binds`,
    );
  }
  const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC;
  return { name, shape, dtype, bytes, buffer: createBuffer(gpu, { label: name, size: bytes, usage }) };
}

/** Upload pieces are at most this long. A staging copy of each lives until its submit is done: STAGED bytes of them at most. */
const CHUNK = 32 << 20, STAGED = 256 << 20;
const staged = new WeakMap<GPUDevice, number>();

/** Writes `data` into `tensor` from byte `offset` on, in bounded pieces. */
export async function upload(gpu: Gpu, tensor: Tensor, data: ArrayBufferView, offset = 0): Promise<void> {
  if (offset + data.byteLength > tensor.bytes) {
    throw new RangeError(
      `Cannot write "${tensor.name}": ${data.byteLength} bytes from ${offset} on do not fit into ${tensor.bytes}`,
    );
  }
  wrote(tensor.buffer);
  const bytes = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  for (let at = 0; at < bytes.length; at += CHUNK) {
    const piece = bytes.subarray(at, Math.min(at + CHUNK, bytes.length));
    const before = staged.get(gpu.device) ?? 0, full = before + piece.length > STAGED;
    if (full) {
      gpu.queue.submit([]);
      await gpu.queue.onSubmittedWorkDone();
    }
    staged.set(gpu.device, piece.length + (full ? 0 : before));
    writeBytes(gpu, tensor.buffer, offset + at, piece);
  }
}

/** WebGPU writes whole 32-bit words only: an odd tail is padded with zero bytes. */
function writeBytes(gpu: Gpu, buffer: GPUBuffer, offset: number, bytes: Uint8Array<ArrayBuffer>): void {
  const whole = bytes.length & ~3;
  if (whole > 0) gpu.queue.writeBuffer(buffer, offset, bytes, 0, whole);
  if (whole < bytes.length) {
    const tail = new Uint8Array(4);
    tail.set(bytes.subarray(whole));
    gpu.queue.writeBuffer(buffer, offset + whole, tail);
  }
}

/** Reads a tensor's raw bytes back, or the `bytes` of them from `offset` on. Waits for all submitted work. */
export async function downloadBytes(
  gpu: Gpu,
  tensor: Tensor,
  { offset = 0, bytes = tensor.bytes - offset }: { offset?: number; bytes?: number } = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const size = Math.ceil(bytes / 4) * 4;
  const staging = gpu.device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const encoder = gpu.device.createCommandEncoder();
  encoder.copyBufferToBuffer(tensor.buffer, offset, staging, 0, size);
  gpu.queue.submit([encoder.finish()]);
  await staging.mapAsync(GPUMapMode.READ);
  const copy = new Uint8Array(staging.getMappedRange()).slice(0, bytes);
  staging.destroy();
  return copy;
}

/** Reads an f32 tensor back, without the padding at its end. */
export async function download(gpu: Gpu, tensor: Tensor): Promise<Float32Array<ArrayBuffer>> {
  if (tensor.dtype !== "f32") throw new TypeError(`Cannot read "${tensor.name}" as f32: it is ${tensor.dtype}`);
  const elements = tensor.shape.reduce((product, n) => product * n, 1);
  return new Float32Array((await downloadBytes(gpu, tensor)).buffer, 0, elements);
}
