/**
 * Images: tensors read as texels of 16 bytes. A CPU driver loads from a buffer lane by lane with a branch for each, but gathers
 * texels in straight code, several times as fast. An image is a copy; `run` makes it anew after its tensor was written.
 */
import type { Gpu } from "./device.ts";

/**
 * Texel `i` of a tensor lies at `(i % TEXELS, i / TEXELS)` of its image, or of rows of WIDE texels where so many rows are not
 * allowed. Rows are a cache line longer than what they hold: without it the rows of a matrix with a power of two of columns
 * fall into the same few places of a cache.
 */
const TEXELS = 512, WIDE = 8192, LINE = 4, TEXEL_BYTES = 16;

/**
 * Turns bindings of a WGSL file that stand under a line `// image` into images, and what reads them into loads of texels. They
 * are arrays of vec4f or vec4u; the file stays valid WGSL and computes the same without this.
 */
export function readImages(source: string): string {
  const mark = /^\/\/ image\n(@group\(0\) @binding\(\d+\)) var<storage, read> (\w+): array<(vec4[fu])>;/gm;
  let text = source;
  for (const [declaration, place, name, type] of source.matchAll(mark)) {
    const row = `override ${rowOf(name!)}: u32 = ${TEXELS}u;`;
    text = text.replace(declaration, `${place} var ${name}: texture_storage_2d<rgba32uint, read>;\n${row}`);
    text = replaceReads(text, name!, type!);
  }
  return text;
}

function replaceReads(text: string, name: string, type: string): string {
  const head = new RegExp(`(?<![.\\w])${name}\\[`).exec(text);
  if (!head) return text;
  const open = head.index + head[0].length;
  let close = open;
  for (let depth = 1; depth > 0; close++) depth += text[close] === "[" ? 1 : text[close] === "]" ? -1 : 0;
  const index = text.slice(open, close - 1);
  const row = rowOf(name), texel = `textureLoad(${name}, vec2u((${index}) % ${row}, (${index}) / ${row}))`;
  const load = type === "vec4f" ? `bitcast<vec4f>(${texel})` : texel;
  return `${text.slice(0, head.index)}${load}${replaceReads(text.slice(close), name, type)}`;
}

/** Name of the constant that says how many texels a row of the image bound as `name` holds. */
function rowOf(name: string): string {
  return `texels_of_${name}`;
}

/** What a tensor's image is made of. */
export interface Image {
  readonly buffer: GPUBuffer;
  readonly texture: GPUTexture;
  readonly view: GPUTextureView;
  /** Texels of a row. */
  readonly row: number;
  /** False where the tensor was written since the last copy. */
  fresh: boolean;
}

const images = new WeakMap<GPUBuffer, Image>();

/** The image of a tensor's buffer, made on first use. Throws `RangeError` where the device's textures are too small. */
export function imageOf(gpu: Gpu, buffer: GPUBuffer): Image {
  const known = images.get(buffer);
  if (known) return known;
  const texels = buffer.size / TEXEL_BYTES, limit = gpu.limits.maxTextureDimension2D;
  const row = heightOf(texels, TEXELS) <= limit ? TEXELS : WIDE, height = heightOf(texels, row);
  if (height > limit) {
    throw new RangeError(
      `Cannot read "${buffer.label}" as an image: ${buffer.size} bytes take more than ${limit} rows of ${
        WIDE * TEXEL_BYTES
      }`,
    );
  }
  const texture = gpu.device.createTexture({
    label: buffer.label,
    size: [row === WIDE ? row : row + LINE, height],
    format: "rgba32uint",
    usage: GPUTextureUsage.STORAGE_BINDING | GPUTextureUsage.COPY_DST,
  });
  const image = { buffer, texture, view: texture.createView(), row, fresh: false };
  images.set(buffer, image);
  return image;
}

/**
 * Rows for so many texels, never a power of two: CPU drivers compile a kernel once for images whose sizes are and once for others,
 * in every combination of what it reads.
 */
function heightOf(texels: number, row: number): number {
  const height = Math.max(3, Math.ceil(texels / row));
  return Number.isInteger(Math.log2(height)) ? height + 1 : height;
}

/** Says that a buffer was written: its image, if it has one, is copied again before the next use. */
export function wrote(buffer: GPUBuffer): void {
  const image = images.get(buffer);
  if (image) image.fresh = false;
}

/** Constants of a pipeline that reads `image` as the binding `name`. */
export function imageConstants(name: string, { row }: Image): Record<string, number> {
  return row === TEXELS ? {} : { [rowOf(name)]: row };
}

/**
 * Encodes the copy of a tensor into its image: all full rows, and what is left. Deno reads an origin and a size of names in
 * three fifths of the time of arrays.
 */
export function refresh(encoder: GPUCommandEncoder, { buffer, texture, row }: Image): void {
  const texels = buffer.size / TEXEL_BYTES, full = Math.floor(texels / row), bytesPerRow = row * TEXEL_BYTES;
  const copy = (y: number, columns: number, rows: number) =>
    encoder.copyBufferToTexture(
      { buffer, offset: y * bytesPerRow, bytesPerRow },
      { texture, origin: { y } },
      { width: columns, height: rows },
    );
  if (full > 0) copy(0, row, full);
  if (texels > full * row) copy(full, texels - full * row, 1);
}

/** Bytes that the image of a buffer takes; 0 where it has none. */
export function imageBytes(buffer: GPUBuffer): number {
  const image = images.get(buffer);
  return image ? image.texture.width * image.texture.height * TEXEL_BYTES : 0;
}

/** Frees the image of a buffer, if it has one. */
export function destroyImage(buffer: GPUBuffer): void {
  images.get(buffer)?.texture.destroy();
  images.delete(buffer);
}
