/**
 * cross_entropy.wgsl against the CPU reference, with padding columns that hold huge numbers. The errors found (NMSE)
 * are 6e-14 in nll (logits around 300), 8e-14 in the gradient (around -200), 6e-15 in the sum; the bounds are 100 times that.
 */
import { assertEquals } from "@std/assert";
import { createCrossEntropy } from "../../lib/ops/cross_entropy.ts";
import { assertClose, wave } from "../check.ts";
import { type Bench, gpuTest } from "../on_gpu.ts";
import { crossEntropy } from "../reference.ts";

const NLL = 6e-12, GRADIENT = 8e-12, TOTAL = 6e-13;
const FIRST = 3;
const CASES = [
  { vocab: 8, stride: 8, rows: 3, logits: { mean: 0.3, scale: 2 } },
  { vocab: 1003, stride: 1024, rows: 1, logits: { mean: 0.3, scale: 2 } },
  { vocab: 1003, stride: 1024, rows: 257, logits: { mean: 0.3, scale: 2 } },
  { vocab: 1003, stride: 1024, rows: 5, logits: { mean: -200, scale: 40 } },
  { vocab: 50_257, stride: 50_304, rows: 3, logits: { mean: 0.3, scale: 2 } },
  { vocab: 50_257, stride: 50_304, rows: 2, logits: { mean: 300, scale: 30 } },
];
type Case = typeof CASES[number];

/** Logits with padding that must not count, and labels that include the first and the last column. */
async function prepare({ input, rows }: Bench, { vocab, stride, rows: count, logits: at }: Case) {
  const values = wave(count * vocab, 0, at), padded = new Float32Array(count * stride).fill(1e6);
  for (let r = 0; r < count; r++) padded.set(values.subarray(r * vocab, (r + 1) * vocab), r * stride);
  const some = [vocab - 1, 0, 5];
  const labels = Uint32Array.from({ length: count }, (_, r) => some[r] ?? (r * 131) % vocab);
  const all = Uint32Array.from([1, 2, 3, ...labels]); // the chunk begins at row FIRST
  const t = { rows: rows(count, FIRST), labels: await input("labels", all) };
  return { t, values, padded, labels, name: `[${count}, ${vocab}] around ${at.mean}` };
}

gpuTest("cross_entropy.loss gives the loss of each row of a chunk", async (bench) => {
  for (const of of CASES) {
    const { t, values, padded, labels, name } = await prepare(bench, of);
    const op = createCrossEntropy(bench.gpu, of);
    const nll = bench.output("nll", { shape: [FIRST + of.rows], start: new Float32Array(FIRST + of.rows).fill(7) });
    const [found] = await bench.compute([op.loss({ ...t, logits: await bench.input("logits", padded), nll })], [nll]);
    const expected = crossEntropy(values, labels, { V: of.vocab, scale: 1 }).nll;
    assertEquals(found!.subarray(0, FIRST), Float32Array.of(7, 7, 7));
    assertClose(found!.subarray(FIRST), expected, { nmse: NLL, name: `nll ${name}` });
  }
});

gpuTest("cross_entropy.backward turns logits into their gradient, padding into 0", async (bench) => {
  for (const of of CASES) {
    const { t, values, padded, labels, name } = await prepare(bench, of);
    const op = createCrossEntropy(bench.gpu, of), scale = Math.fround(1 / 37);
    const nll = bench.output("nll", { shape: [FIRST + of.rows], start: new Float32Array(FIRST + of.rows).fill(7) });
    const logits = bench.output("logits", { shape: [of.rows, of.stride], start: padded });
    const uniform = bench.uniform(Float32Array.of(scale, 0, 0, 0));
    const [losses, gradient] = await bench.compute([op.backward({ ...t, scale: uniform, logits, nll })], [nll, logits]);
    const expected = crossEntropy(values, labels, { V: of.vocab, scale });
    const found = new Float32Array(values.length);
    for (let r = 0; r < of.rows; r++) {
      const row = gradient!.subarray(r * of.stride, (r + 1) * of.stride);
      found.set(row.subarray(0, of.vocab), r * of.vocab);
      assertEquals(row.subarray(of.vocab), new Float32Array(of.stride - of.vocab), `padding of row ${r} ${name}`);
    }
    assertEquals(losses!.subarray(0, FIRST), Float32Array.of(7, 7, 7));
    assertClose(losses!.subarray(FIRST), expected.nll, { nmse: NLL, name: `nll ${name}` });
    assertClose(found, expected.dlogits, { nmse: GRADIENT, name: `dlogits ${name}` });
  }
});

gpuTest("cross_entropy.total adds the losses to one slot", async ({ gpu, input, output, uniform, rows, compute }) => {
  const op = createCrossEntropy(gpu, { vocab: 8, stride: 8 });
  for (const count of [1, 3, 257, 4096]) {
    const nll = wave(count + 5, 0, { mean: 3, scale: 1 });
    const sums = output("sums", { shape: [4], start: Float32Array.of(1, 2, 3, 4) });
    const t = { rows: rows(count), scale: uniform(Float32Array.of(0.5, 2, 0, 0)), nll: await input("nll", nll), sums };
    const [found] = await compute([op.total(t)], [sums]);
    const sum = nll.subarray(0, count).reduce((a, b) => a + b, 0);
    assertEquals([found![0], found![1], found![3]], [1, 2, 4]);
    assertClose([found![2]!], [3 + sum], { nmse: TOTAL, name: `sum of ${count}` });
  }
});
