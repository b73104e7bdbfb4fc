/** What becomes of the operands of a product, and which are refused; tensors are described alone. */
import { assertEquals, assertThrows } from "@std/assert";
import { FLOAT_TYPE, type Storage, type Tensor } from "../../lib/gpu/tensor.ts";
import { type LoraOperands, type Product, productDims } from "../../lib/ops/matmul_operands.ts";

function tensor(name: string, dtype: Storage = "f32"): Tensor {
  const buffer = {} as GPUBuffer;
  return { name, shape: [8, 8], dtype, buffer, bytes: 256 };
}

const x = { tensor: tensor("x") }, half = { tensor: tensor("w", "f16") }, out = { tensor: tensor("y") };
const rows = { count: 8, set: () => {}, buffer: {} as GPUBuffer };
const product: Product = { rows, x, w: x, out, n: 8, k: 8 };
const part = { columns: 8, r: 8, x: 0, w: 0 };
const lora = (segments: LoraOperands["segments"]): LoraOperands => ({ x, w: x.tensor, segments });

Deno.test("productDims() takes strides from shapes and fills segments that are not given", () => {
  const plain = productDims("nt", product, 8);
  assertEquals([plain.x_stride, plain.w_stride, plain.out_stride, plain.scale], [8, 8, 8, 1]);
  assertEquals([plain.end0, plain.end1, plain.r0, plain.r1, plain.r2, plain.lora_w_stride], [8, 8, 0, 0, 0, 0]);

  const segments = [{ ...part, r: 0 }, { ...part, x: 8, w: 64 }, { columns: 16, r: 8, x: 16, w: 128 }];
  const wide = { ...product, n: 32, x: { ...x, offset: 4, stride: 24 }, scale: 0.5, lora: lora(segments) };
  const dims = productDims("nt", wide, 8);
  assertEquals([dims.end0, dims.end1, dims.x_offset, dims.x_stride, dims.scale], [8, 16, 4, 24, 0.5]);
  assertEquals([dims.r0, dims.r1, dims.r2], [0, 8, 8]);
  assertEquals([dims.lora_x0, dims.lora_x1, dims.lora_x2, dims.lora_w1, dims.lora_w2], [0, 8, 16, 64, 128]);
  assertEquals(dims.lora_w_stride, 8, "rank, whichever segment has it");
  assertEquals(productDims("nn", { ...product, lora: lora([part]) }, 8).lora_w_stride, 8, "columns");
});

Deno.test("productDims() refuses what kernels cannot load", () => {
  const refused = (given: Partial<Product>, message: string, entry: "nt" | "nn" | "tn" = "nt") =>
    assertThrows(() => productDims(entry, { ...product, ...given }, 8), Error, message);
  refused({ n: 6 }, 'Cannot multiply "y" = nt("x", "x"): n 6 and m 0 must be multiples of 8, k 8 of 8');
  refused({ m: 4 }, "m 4 must be multiples of 8", "tn");
  refused({ k: 4 }, "k 4 of 8");
  refused({ w: { tensor: tensor("w", "u8") } }, "weights are u8");
  refused({ x: { ...x, offset: 2 } }, 'offset and stride of "x" must be multiples of 4');
  refused({ out: { ...out, offset: 4 } }, 'offset and stride of "y" must be multiples of 8');
  refused({ w: { ...half, offset: 4 } }, 'offset and stride of "w" must be multiples of 8');
  refused({ lora: lora([{ ...part, columns: 4 }]) }, "at most 3 low-rank segments must cover the 8 columns");
  refused({ lora: lora([part, part]) }, "at most 1 low-rank segments must cover", "nn");
  refused({ n: 32, lora: lora([part, part, part, part]) }, "at most 3 low-rank segments must cover the 32 columns");
  refused({ n: 16, lora: lora([part, { ...part, r: 16 }]) }, "segments have ranks 8,16: one is wanted");
  refused({ lora: lora([{ ...part, r: 4 }]) }, "with ranks in eights");
  assertEquals(productDims("nt", { ...product, n: 4 }, 4).n, 4);
});

Deno.test("productDims().plus and FLOAT_TYPE speak the kernels' numbers", () => {
  const plus = [undefined, x.tensor, "out"] as const;
  assertEquals(plus.map((plus) => productDims("nt", { ...product, plus }, 8).plus), [0, 1, 2]);
  const source = Deno.readTextFileSync(new URL("../../kernels/matmul_sizes.wgsl", import.meta.url));
  const names = Object.entries({ ...FLOAT_TYPE, none: 0, add: 1, out: 2 });
  for (const [name, value] of names) {
    assertEquals(new RegExp(`^const ${name.toUpperCase()} = (\\d)u;`, "m").exec(source)?.[1], `${value}`);
  }
});
