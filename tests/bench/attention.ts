/**
 * Attention and the kernels of decoding at the blog's sizes, checked against the reference on whole documents of one group
 * of heads. Floating-point operations are those of the visible pairs of tokens: 4 per pair and column forward, 10 backward.
 */
import type { Gpu } from "../../lib/gpu/device.ts";
import { run } from "../../lib/gpu/program.ts";
import type { Tensor } from "../../lib/gpu/tensor.ts";
import { createAttention, documentsOf } from "../../lib/ops/attention.ts";
import { createAttentionDecode } from "../../lib/ops/attention_decode.ts";
import { createMatvec } from "../../lib/ops/matvec.ts";
import { attention, attentionBackward, matmulNT } from "../reference.ts";
import { agree, type Case, type Random, readFloats, type Scope } from "./measure.ts";

const H = 16, KV = 8, D = 64, WIDTH = (H + 2 * KV) * D, GROUP = H / KV;
const SHAPE = { heads: H, kvHeads: KV, headDim: D };

/** Attention over rows made of documents of `length` tokens. */
export function attentionCases(gpu: Gpu, { tokens, length }: { tokens: number; length: number }): Case[] {
  const op = createAttention(gpu, SHAPE);
  const count = Math.floor(tokens / length), T = count * length;
  const pairs = count * length * (length + 1) / 2 * H;
  const prepare = async ({ random, input, output, rows }: Scope) => {
    const { spans, order } = documentsOf(new Uint32Array(T).map((_, i) => i % length));
    const documents = { spans: await input("spans", spans, "u32"), order: await input("order", order, "u32") };
    const qkv = await random("qkv", [T, WIDTH]);
    const common = { rows: rows(T), documents, qkv: qkv.tensor };
    return { qkv, common, out: output("out", [T, H * D]), lse: output("lse", [T, H]) };
  };
  const last = { first: T - length, length };
  const of = { H: GROUP, KV: 1, D, start: new Int32Array(length) };
  const inputs = (qkv: Random) => ({
    q: block((i) => qkv.at(i), { ...last, width: WIDTH, column: (H - GROUP) * D, columns: GROUP * D }),
    k: block((i) => qkv.at(i), { ...last, width: WIDTH, column: (H + KV - 1) * D, columns: D }),
    v: block((i) => qkv.at(i), { ...last, width: WIDTH, column: (H + 2 * KV - 1) * D, columns: D }),
  });
  const read = async (tensor: Tensor, width: number, at: { column: number; columns: number }) => {
    const rows = await readFloats(gpu, tensor, [last.first * width, T * width]);
    return block((i) => rows[i]!, { first: 0, length, width, ...at });
  };
  const described = { shape: `${count} x ${length} tokens`, dtype: "f32" };
  const heads = { column: (H - GROUP) * D, columns: GROUP * D };
  return [
    {
      name: "attention.forward",
      ...described,
      work: { flop: 4 * D * pairs },
      async prepare(scope) {
        const { qkv, common, out, lse } = await prepare(scope);
        const check = async () => {
          const expected = attention(inputs(qkv), of);
          agree("attention.forward", await read(out, H * D, heads), expected.out);
          agree("attention lse", await read(lse, H, { column: H - GROUP, columns: GROUP }), expected.lse);
        };
        return { commands: [op.forward({ ...common, out, lse })], check };
      },
    },
    {
      name: "attention.backward",
      ...described,
      work: { flop: 10 * D * pairs },
      async prepare(scope) {
        const { qkv, common, out, lse } = await prepare(scope);
        run(gpu, [op.forward({ ...common, out, lse })]);
        const dout = await scope.random("dout", [T, H * D], { seed: 2 });
        const delta = scope.output("delta", [T, H]), dqkv = scope.output("dqkv", [T, WIDTH]);
        const check = async () => {
          const given = inputs(qkv), forward = attention(given, of);
          const d = block((i) => dout.at(i), { ...last, width: H * D, ...heads });
          const expected = attentionBackward({ ...given, ...forward, dout: d }, of);
          agree("attention dq", await read(dqkv, WIDTH, heads), expected.dq);
          agree("attention dk", await read(dqkv, WIDTH, { column: (H + KV - 1) * D, columns: D }), expected.dk);
          agree("attention dv", await read(dqkv, WIDTH, { column: (H + 2 * KV - 1) * D, columns: D }), expected.dv);
        };
        const commands = op.backward({ ...common, out, lse, dout: dout.tensor, delta, dqkv });
        return { commands, check };
      },
    },
  ];
}

/** Products of one and of eight rows with f16 weights, and attention to a cache of `context` positions. */
export function decodingCases(gpu: Gpu, { context, sequences }: { context: number; sequences: number }): Case[] {
  const sizes = [["gate_up", 1, 5504, 1024], ["gate_up", sequences, 5504, 1024], ["head", 1, 50_304, 1024]] as const;
  return [
    ...sizes.map(([name, M, N, K]) => matvecCase(gpu, { name, M, N, K })),
    decodeCase(gpu, { context, sequences }),
  ];
}

function matvecCase(gpu: Gpu, { name, M, N, K }: { name: string; M: number; N: number; K: number }): Case {
  return {
    name: `matvec.nt ${name}`,
    shape: `${M} x ${N} x ${K}`,
    dtype: "f32 x f16",
    work: { bytes: 2 * N * K + 4 * M * (N + K) },
    async prepare({ random, output, rows }) {
      const x = await random("x", [M, K]), w = await random("w", [N, K], { dtype: "f16", seed: 2 });
      const out = output("out", [M, N]), op = createMatvec(gpu, { block: M });
      const check = async () => {
        const row = M - 1, values = await readFloats(gpu, out, [row * N, M * N]);
        const columns = [0, 1, N >> 1, N - 2, N - 1];
        const expected = columns.map((n) =>
          matmulNT(x.slice(row * K, M * K), w.slice(n * K, (n + 1) * K), { M: 1, N: 1, K })[0]!
        );
        agree(`matvec.nt ${name}`, columns.map((n) => values[n]!), expected);
      };
      return { commands: [op.nt({ rows: rows(M), x, w, out: { tensor: out }, n: N, k: K })], check };
    },
  };
}

function decodeCase(gpu: Gpu, { context, sequences }: { context: number; sequences: number }): Case {
  const op = createAttentionDecode(gpu, { ...SHAPE, context });
  return {
    name: "attention_decode.forward",
    shape: `${sequences} x ${context} positions`,
    dtype: "f32",
    work: { bytes: 8 * sequences * KV * D * context },
    async prepare({ random, input, output, rows }) {
      // Keys and values lie as [slot, head, column / 4, position, column % 4].
      const shape = [sequences, KV, D / 4, context, 4];
      const keys = await random("keys", shape, { seed: 2 }), values = await random("values", shape, { seed: 3 });
      const qkv = await random("qkv", [sequences, WIDTH]), out = output("out", [sequences, H * D]);
      const place = (value: (i: number) => number) => Uint32Array.from({ length: sequences }, (_, i) => value(i));
      const slots = await input("slots", place((i) => i), "u32");
      const positions = await input("positions", place(() => context - 1), "u32");
      const check = async () => {
        const s = sequences - 1, row = s * WIDTH;
        const cached = (of: Random, column: number) =>
          Float32Array.from({ length: context * D }, (_, i) => {
            const position = Math.floor(i / D), d = i % D;
            if (position === context - 1) return qkv.at(row + column + d);
            return of.at((((s * KV + KV - 1) * D / 4 + (d >> 2)) * context + position) * 4 + d % 4);
          });
        // Only the last position asks: the other rows of q count for nothing.
        const q = new Float32Array(context * GROUP * D);
        q.set(qkv.slice(row + (H - GROUP) * D, row + H * D), (context - 1) * GROUP * D);
        const k = cached(keys, (H + KV - 1) * D), v = cached(values, (H + 2 * KV - 1) * D);
        const start = new Int32Array(context).map((_, t) => t === context - 1 ? 0 : t);
        const expected = attention({ q, k, v }, { H: GROUP, KV: 1, D, start }).out.slice(-GROUP * D);
        const end = (s + 1) * H * D;
        agree("attention_decode.forward", await readFloats(gpu, out, [end - GROUP * D, end]), expected);
      };
      const cache = { keys: keys.tensor, values: values.tensor };
      const commands = [op.forward({ rows: rows(sequences), qkv: qkv.tensor, slots, positions, out, ...cache })];
      return { commands, check };
    },
  };
}

/** Columns of some rows of a matrix, copied together. */
function block(
  at: (index: number) => number,
  { first, length, width, column, columns }: Record<"first" | "length" | "width" | "column" | "columns", number>,
): Float32Array {
  return Float32Array.from({ length: length * columns }, (_, i) => {
    const row = Math.floor(i / columns);
    return at((first + row) * width + column + i - row * columns);
  });
}
