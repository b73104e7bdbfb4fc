/**
 * The meaning of what follows the model: clipping and the optimizers after the gradients, the sampling distribution after
 * the logits. The CUDA optimizer and sampling round every operation to 32 bits, because a rounding there decides a code or
 * a token; nothing here draws random numbers.
 */
import type { Vector } from "./reference.ts";

const f = Math.fround;

/** The norm of all gradients together and the factor that every gradient is multiplied by: `min(1, maxNorm / (norm + 1e-6))`. */
export function clip(gradients: Iterable<Vector>, maxNorm: number): { norm: number; coefficient: number } {
  let squares = 0;
  for (const gradient of gradients) for (const g of gradient) squares += g * g;
  const norm = Math.sqrt(squares);
  return { norm, coefficient: Math.min(1, maxNorm / (norm + 1e-6)) };
}

/** What an AdamW update (arXiv:1711.05101) depends on besides the tensors; `step` counts from 1. */
export interface AdamW {
  readonly step: number;
  readonly lr: number;
  readonly beta1?: number;
  readonly beta2?: number;
  readonly eps?: number;
  readonly weightDecay?: number;
}

/** torch.optim.AdamW, in place on p, m and v `[n]`: decay first, then the step. */
export function adamw(
  { p, g, m, v }: { p: Float64Array; g: Vector; m: Float64Array; v: Float64Array },
  { step, lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0.01 }: AdamW,
): void {
  for (let i = 0; i < p.length; i++) {
    m[i] = beta1 * m[i]! + (1 - beta1) * g[i]!;
    v[i] = beta2 * v[i]! + (1 - beta2) * g[i]! ** 2;
    const mean = m[i]! / (1 - beta1 ** step), square = v[i]! / (1 - beta2 ** step);
    p[i] = p[i]! * (1 - lr * weightDecay) - lr * mean / (Math.sqrt(square) + eps);
  }
}

/** bitsandbytes' CUDA constants, formed in 32 bits: 1 - 0.999 then is 1.3e-5 (relative) smaller than in 64. */
function cudaConstants({ step, lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0.01 }: AdamW) {
  const b1 = f(beta1), b2 = f(beta2);
  const correction1 = f(1 - f(b1 ** step)), correction2 = f(Math.sqrt(f(1 - f(b2 ** step))));
  return {
    b1,
    b2,
    rest1: f(1 - b1),
    rest2: f(1 - b2),
    stepSize: f(f(-f(lr) * correction2) / correction1),
    eps: f(correction2 * f(eps)),
    keep: f(1 - f(f(lr) * f(weightDecay))),
  };
}

/** One element of bitsandbytes' CUDA AdamW: decay after the step, eps scaled by the second correction. */
function cudaElement(
  { p, g, m, v }: { p: number; g: number; m: number; v: number },
  c: ReturnType<typeof cudaConstants>,
): { p: number; m: number; v: number } {
  const m1 = f(f(m * c.b1) + f(c.rest1 * g));
  const v1 = f(f(v * c.b2) + f(f(c.rest2 * g) * g));
  const p1 = f(p + f(c.stepSize * f(m1 / f(f(Math.sqrt(v1)) + c.eps))));
  return { p: f(p1 * c.keep), m: m1, v: v1 };
}

/** bitsandbytes' CUDA AdamW with 32-bit state (tensors below 4,096 elements), in place on p, m and v `[n]`. */
export function adamwCuda(
  { p, g, m, v }: { p: Float32Array; g: Float32Array; m: Float32Array; v: Float32Array },
  settings: AdamW,
): void {
  const c = cudaConstants(settings);
  for (let i = 0; i < p.length; i++) {
    const next = cudaElement({ p: p[i]!, g: g[i]!, m: m[i]!, v: v[i]! }, c);
    p[i] = next.p;
    m[i] = next.m;
    v[i] = next.v;
  }
}

/** 8-bit optimizer state: codes `[n]` and one absmax per block of 256, first (signed map) and second moment (unsigned). */
export interface State8 {
  readonly codes1: Uint8Array;
  readonly codes2: Uint8Array;
  readonly absmax1: Float32Array;
  readonly absmax2: Float32Array;
}

/** The index of the nearest entry of an ascending map of 256; a tie goes to the even index, NaN to 0. */
export function nearestCode(x: number, map: Float32Array): number {
  let code = 0;
  while (code < 255) {
    const middle = f((map[code]! + map[code + 1]!) * 0.5);
    if (!(x > middle || (x === middle && code % 2 === 1))) break;
    code++;
  }
  return code;
}

/**
 * bitsandbytes' CUDA AdamW with 8-bit state (arXiv:2110.02861), in place on p `[n]` and the state. An element whose gradient
 * is not finite keeps its parameter and gets zero moments; the parameter sees the moments before they are quantized.
 */
export function adamw8(
  { p, g, state, maps }: {
    p: Float32Array;
    g: Float32Array;
    state: State8;
    maps: { readonly signed: Float32Array; readonly unsigned: Float32Array };
  },
  settings: AdamW,
): void {
  const c = cudaConstants(settings);
  const { codes1, codes2, absmax1, absmax2 } = state;
  const negative = (x: number) => x < 0 || Object.is(x, -0);
  for (let block = 0; block < absmax1.length; block++) {
    const begin = block * 256, end = Math.min(begin + 256, p.length);
    const m = new Float32Array(end - begin), v = new Float32Array(end - begin);
    for (let i = begin; i < end; i++) {
      if (!Number.isFinite(g[i]!)) continue;
      const next = cudaElement({
        p: p[i]!,
        g: g[i]!,
        m: f(maps.signed[codes1[i]!]! * absmax1[block]!),
        v: f(maps.unsigned[codes2[i]!]! * absmax2[block]!),
      }, c);
      p[i] = next.p;
      m[i - begin] = next.m;
      v[i - begin] = next.v;
    }
    absmax1[block] = m.reduce((max, x) => Math.max(max, Math.abs(x)), 0);
    absmax2[block] = v.reduce((max, x) => Math.max(max, x), 0);
    for (let i = begin; i < end; i++) {
      const value = m[i - begin]!;
      const code = nearestCode(f(value / absmax1[block]!), maps.signed);
      const wrong = negative(maps.signed[code]!) !== negative(value);
      codes1[i] = wrong ? code + (value > 0 ? 1 : -1) : code; // wraps at 8 bits: an all-zero block gets 255
      codes2[i] = nearestCode(f(v[i - begin]! / absmax2[block]!), maps.unsigned);
    }
  }
}

/** How transformers' `generate` reshapes the logits; 0 switches top-k off, 1 switches the others off. */
export interface Sampling {
  readonly seen: Iterable<number>;
  readonly repetitionPenalty: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
}

/** The distribution that the next token is drawn from: penalty, temperature, top-k, top-p, softmax, in this order. */
export function samplingProbabilities(
  logits: Float32Array,
  { seen, repetitionPenalty, temperature, topK, topP }: Sampling,
): Float32Array {
  const scores = new Float32Array(logits);
  for (const id of new Set(seen)) {
    scores[id] = scores[id]! < 0 ? scores[id]! * f(repetitionPenalty) : scores[id]! / f(repetitionPenalty);
  }
  for (let i = 0; i < scores.length; i++) scores[i]! /= f(temperature);
  if (topK > 0 && topK < scores.length) {
    const kth = scores.toSorted()[scores.length - topK]!;
    for (let i = 0; i < scores.length; i++) if (scores[i]! < kth) scores[i] = -Infinity;
  }
  if (topP < 1) {
    const ascending = Array.from(scores.keys()).sort((a, b) => scores[a]! - scores[b]! || a - b);
    const p = softmax(scores);
    let mass = 0;
    for (const id of ascending.slice(0, -1)) {
      mass += p[id]!;
      if (f(mass) > f(1 - topP)) break;
      scores[id] = -Infinity;
    }
  }
  return softmax(scores);
}

function softmax(scores: Float32Array): Float32Array {
  const max = scores.reduce((a, b) => Math.max(a, b));
  const e = scores.map((x) => Math.exp(x - max));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((x) => x / sum);
}
