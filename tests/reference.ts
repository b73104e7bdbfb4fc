/**
 * The meaning of every kernel: each operation of the model, forward and backward, in plain loops over 64-bit floats.
 * Slow on purpose; it knows nothing of WebGPU, and rounds to 32 bits only where the rounding is part of the definition
 * (RoPE's angles, NF4's products). The whole model is in reference_llama.ts, optimizers and sampling in reference_step.ts.
 */

/** Inputs may be 32- or 64-bit; every result is 64-bit unless it says otherwise. */
export type Vector = Float32Array | Float64Array;

const f64 = (x: Vector): Float64Array => x instanceof Float64Array ? x : new Float64Array(x);
const f = Math.fround;

/** `x · wᵀ`: x `[M, K]`, w `[N, K]`, out `[M, N]`. */
export function matmulNT(x: Vector, w: Vector, { M, N, K }: { M: number; N: number; K: number }): Float64Array {
  const a = f64(x), b = f64(w), out = new Float64Array(M * N);
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < N; n++) {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += a[m * K + k]! * b[n * K + k]!;
      out[m * N + n] = sum;
    }
  }
  return out;
}

/** `x · w`: x `[M, K]`, w `[K, N]`, out `[M, N]`. */
export function matmulNN(x: Vector, w: Vector, { M, N, K }: { M: number; N: number; K: number }): Float64Array {
  const a = f64(x), b = f64(w), out = new Float64Array(M * N);
  for (let m = 0; m < M; m++) {
    for (let k = 0; k < K; k++) {
      const value = a[m * K + k]!;
      for (let n = 0; n < N; n++) out[m * N + n]! += value * b[k * N + n]!;
    }
  }
  return out;
}

/** `xᵀ · y`: x `[T, M]`, y `[T, N]`, out `[M, N]`; a weight gradient `[out, in]` is `matmulTN(dout, x)`. */
export function matmulTN(x: Vector, y: Vector, { T, M, N }: { T: number; M: number; N: number }): Float64Array {
  const a = f64(x), b = f64(y), out = new Float64Array(M * N);
  for (let t = 0; t < T; t++) {
    for (let m = 0; m < M; m++) {
      const value = a[t * M + m]!;
      for (let n = 0; n < N; n++) out[m * N + n]! += value * b[t * N + n]!;
    }
  }
  return out;
}

/** A low-rank adapter of one linear map (LoRA, arXiv:2106.09685): A `[R, K]`, B `[N, R]`; mask `[M, K]` multiplies x. */
export interface Lora {
  readonly A: Vector;
  readonly B: Vector;
  readonly scaling: number;
  readonly mask?: Vector | undefined;
}

const times = (x: Float64Array, factor: Vector | number | undefined): Float64Array =>
  factor === undefined ? x : x.map((v, i) => v * (typeof factor === "number" ? factor : factor[i]!));

/** Adds `y` to `x` in place and returns `x`. */
export function addTo(x: Float64Array, y: Vector): Float64Array {
  for (let i = 0; i < x.length; i++) x[i]! += y[i]!;
  return x;
}

/** `x · wᵀ + scaling · ((mask · x) · Aᵀ) · Bᵀ`: x `[M, K]`, w `[N, K]`, out `[M, N]`; without `lora` the first term only. */
export function linear(
  x: Vector,
  w: Vector,
  { M, N, K, lora }: { M: number; N: number; K: number; lora?: Lora | undefined },
): Float64Array {
  const out = matmulNT(x, w, { M, N, K });
  if (lora === undefined) return out;
  const R = lora.A.length / K;
  const low = matmulNT(times(f64(x), lora.mask), lora.A, { M, N: R, K });
  return addTo(out, times(matmulNT(low, lora.B, { M, N, K: R }), lora.scaling));
}

/** Gradients of {@linkcode linear} for dout `[M, N]`: dx `[M, K]`, dA `[R, K]`, dB `[N, R]` (both empty without `lora`). */
export function linearBackward(
  { x, w, dout }: { x: Vector; w: Vector; dout: Vector },
  { M, N, K, lora }: { M: number; N: number; K: number; lora?: Lora | undefined },
): { dx: Float64Array; dA: Float64Array; dB: Float64Array } {
  const dx = matmulNN(dout, w, { M, N: K, K: N });
  if (lora === undefined) return { dx, dA: new Float64Array(0), dB: new Float64Array(0) };
  const R = lora.A.length / K;
  const masked = times(f64(x), lora.mask);
  const low = matmulNT(masked, lora.A, { M, N: R, K });
  const scaled = times(f64(dout), lora.scaling);
  const dlow = matmulNN(scaled, lora.B, { M, N: R, K: N });
  addTo(dx, times(matmulNN(dlow, lora.A, { M, N: K, K: R }), lora.mask));
  return { dx, dA: matmulTN(dlow, masked, { T: M, M: R, N: K }), dB: matmulTN(scaled, low, { T: M, M: N, N: R }) };
}

/** RMSNorm (arXiv:1910.07467): `out = x · rstd · weight`, `rstd = 1 / sqrt(mean(x²) + eps)`; x `[rows, C]`, rstd `[rows]`. */
export function rmsnorm(
  x: Vector,
  weight: Vector,
  { eps }: { eps: number },
): { out: Float64Array; rstd: Float64Array } {
  const C = weight.length, out = new Float64Array(x.length), rstd = new Float64Array(x.length / C);
  for (let r = 0; r < rstd.length; r++) {
    let squares = 0;
    for (let c = 0; c < C; c++) squares += x[r * C + c]! ** 2;
    rstd[r] = 1 / Math.sqrt(squares / C + eps);
    for (let c = 0; c < C; c++) out[r * C + c] = x[r * C + c]! * rstd[r]! * weight[c]!;
  }
  return { out, rstd };
}

/** Gradients of {@linkcode rmsnorm}: dx `[rows, C]`, dweight `[C]`. */
export function rmsnormBackward(
  { x, weight, rstd, dout }: { x: Vector; weight: Vector; rstd: Vector; dout: Vector },
): { dx: Float64Array; dweight: Float64Array } {
  const C = weight.length, dx = new Float64Array(x.length), dweight = new Float64Array(C);
  for (let r = 0; r < rstd.length; r++) {
    let dot = 0;
    for (let c = 0; c < C; c++) {
      const i = r * C + c;
      dot += dout[i]! * weight[c]! * x[i]!;
      dweight[c]! += dout[i]! * x[i]! * rstd[r]!;
    }
    for (let c = 0; c < C; c++) {
      const i = r * C + c;
      dx[i] = rstd[r]! * (dout[i]! * weight[c]! - x[i]! * rstd[r]! ** 2 * dot / C);
    }
  }
  return { dx, dweight };
}

/**
 * Rotary positions (arXiv:2104.09864) over pairs (j, j + D/2) of each head: x `[T, heads · D]`. Frequencies and angles are
 * rounded to 32 bits as transformers does, which matters at long positions. `inverse` turns back: it is the backward.
 */
export function rope(
  x: Vector,
  positions: ArrayLike<number>,
  { heads, D, theta, inverse = false }: { heads: number; D: number; theta: number; inverse?: boolean },
): Float64Array {
  const out = new Float64Array(x.length), half = D / 2;
  for (let t = 0; t < positions.length; t++) {
    for (let j = 0; j < half; j++) {
      const angle = f(positions[t]! * f(1 / f(theta ** (2 * j / D))));
      const cos = Math.cos(angle), sin = inverse ? -Math.sin(angle) : Math.sin(angle);
      for (let h = 0; h < heads; h++) {
        const i = (t * heads + h) * D + j;
        out[i] = x[i]! * cos - x[i + half]! * sin;
        out[i + half] = x[i + half]! * cos + x[i]! * sin;
      }
    }
  }
  return out;
}

/** Gradient of {@linkcode rope}: the rotation with the sign of the sine flipped. */
export function ropeBackward(
  dout: Vector,
  positions: ArrayLike<number>,
  shape: { heads: number; D: number; theta: number },
): Float64Array {
  return rope(dout, positions, { ...shape, inverse: true });
}

/** For each token the index of the first token of its document; position 0 starts a document. */
export function documentStarts(positions: ArrayLike<number>): Int32Array {
  const start = new Int32Array(positions.length);
  for (let t = 1; t < start.length; t++) start[t] = positions[t] === 0 ? t : start[t - 1]!;
  return start;
}

/** Sizes of attention; `start[t]` is the first token that token t may see, the last is t itself. */
export interface AttentionShape {
  readonly H: number;
  readonly KV: number;
  readonly D: number;
  readonly start: ArrayLike<number>;
}

/** `scale · q[i, h] · k[j, h']` for one pair of rows. */
function score(q: Vector, k: Vector, { i, j, D }: { i: number; j: number; D: number }): number {
  let sum = 0;
  for (let d = 0; d < D; d++) sum += q[i + d]! * k[j + d]!;
  return sum / Math.sqrt(D);
}

/**
 * Causal grouped-query attention (arXiv:2305.13245) inside documents: q, out `[T, H · D]`, k, v `[T, KV · D]`, and lse
 * `[T, H]`, the logarithm of the sum of the exponentials of the scaled scores. Query head h reads head floor(h · KV / H).
 */
export function attention(
  { q, k, v }: { q: Vector; k: Vector; v: Vector },
  { H, KV, D, start }: AttentionShape,
): { out: Float64Array; lse: Float64Array } {
  const T = start.length, out = new Float64Array(T * H * D), lse = new Float64Array(T * H);
  for (let t = 0; t < T; t++) {
    for (let h = 0; h < H; h++) {
      const i = (t * H + h) * D, kv = Math.floor(h * KV / H);
      const scores: number[] = [];
      for (let s = start[t]!; s <= t; s++) scores.push(score(q, k, { i, j: (s * KV + kv) * D, D }));
      const max = Math.max(...scores);
      lse[t * H + h] = max + Math.log(scores.reduce((sum, x) => sum + Math.exp(x - max), 0));
      for (let s = start[t]!; s <= t; s++) {
        const p = Math.exp(scores[s - start[t]!]! - lse[t * H + h]!);
        for (let d = 0; d < D; d++) out[i + d]! += p * v[(s * KV + kv) * D + d]!;
      }
    }
  }
  return { out, lse };
}

/** Gradients of {@linkcode attention} for dout `[T, H · D]`: dq `[T, H · D]`, dk and dv `[T, KV · D]`. */
export function attentionBackward(
  { q, k, v, lse, dout }: { q: Vector; k: Vector; v: Vector; lse: Vector; dout: Vector },
  { H, KV, D, start }: AttentionShape,
): { dq: Float64Array; dk: Float64Array; dv: Float64Array } {
  const T = start.length;
  const dq = new Float64Array(q.length), dk = new Float64Array(k.length), dv = new Float64Array(v.length);
  for (let t = 0; t < T; t++) {
    for (let h = 0; h < H; h++) {
      const i = (t * H + h) * D, kv = Math.floor(h * KV / H);
      const p: number[] = [], dp: number[] = [];
      let delta = 0;
      for (let s = start[t]!; s <= t; s++) {
        const j = (s * KV + kv) * D;
        let sum = 0;
        for (let d = 0; d < D; d++) sum += dout[i + d]! * v[j + d]!;
        p.push(Math.exp(score(q, k, { i, j, D }) - lse[t * H + h]!));
        dp.push(sum);
        delta += p.at(-1)! * sum;
      }
      for (let s = start[t]!; s <= t; s++) {
        const j = (s * KV + kv) * D, n = s - start[t]!;
        const ds = p[n]! * (dp[n]! - delta) / Math.sqrt(D);
        for (let d = 0; d < D; d++) {
          dq[i + d]! += ds * k[j + d]!;
          dk[j + d]! += ds * q[i + d]!;
          dv[j + d]! += p[n]! * dout[i + d]!;
        }
      }
    }
  }
  return { dq, dk, dv };
}

/** SwiGLU (arXiv:2002.05202): `silu(gate) · up`; gateUp `[T, 2F]` with the gate first in each row, out `[T, F]`. */
export function swiglu(gateUp: Vector, F: number): Float64Array {
  const out = new Float64Array(gateUp.length / 2);
  for (let i = 0; i < out.length; i++) {
    const at = Math.floor(i / F) * 2 * F + i % F, gate = gateUp[at]!;
    out[i] = gate / (1 + Math.exp(-gate)) * gateUp[at + F]!;
  }
  return out;
}

/** Gradient of {@linkcode swiglu} with respect to gateUp `[T, 2F]`, for dout `[T, F]`. */
export function swigluBackward({ gateUp, dout }: { gateUp: Vector; dout: Vector }, F: number): Float64Array {
  const dgateUp = new Float64Array(gateUp.length);
  for (let i = 0; i < dout.length; i++) {
    const at = Math.floor(i / F) * 2 * F + i % F, gate = gateUp[at]!;
    const sigmoid = 1 / (1 + Math.exp(-gate));
    dgateUp[at] = dout[i]! * gateUp[at + F]! * sigmoid * (1 + gate * (1 - sigmoid));
    dgateUp[at + F] = dout[i]! * gate * sigmoid;
  }
  return dgateUp;
}

/** Rows of the table: table `[V, C]`, out `[T, C]`. */
export function embedding(table: Vector, ids: ArrayLike<number>, C: number): Float64Array {
  const out = new Float64Array(ids.length * C);
  for (let t = 0; t < ids.length; t++) for (let c = 0; c < C; c++) out[t * C + c] = table[ids[t]! * C + c]!;
  return out;
}

/**
 * Gradient of {@linkcode embedding}: the rows of dout `[T, C]` added up by id, `[V, C]`. The padding id gets none, as in
 * torch's Embedding, which transformers builds with `padding_idx = pad_token_id`.
 */
export function embeddingBackward(
  dout: Vector,
  ids: ArrayLike<number>,
  { V, C, paddingId = null }: { V: number; C: number; paddingId?: number | null },
): Float64Array {
  const dtable = new Float64Array(V * C);
  for (let t = 0; t < ids.length; t++) {
    if (ids[t] === paddingId) continue;
    for (let c = 0; c < C; c++) dtable[ids[t]! * C + c]! += dout[t * C + c]!;
  }
  return dtable;
}

/**
 * Cross-entropy in nats: logits `[rows, V]`, one label per row (-100 = no loss: 0 and no gradient). Returns nll `[rows]` and
 * dlogits = scale · (softmax − one-hot) `[rows, V]`.
 */
export function crossEntropy(
  logits: Vector,
  labels: ArrayLike<number>,
  { V, scale }: { V: number; scale: number },
): { nll: Float64Array; dlogits: Float64Array } {
  const nll = new Float64Array(labels.length), dlogits = new Float64Array(logits.length);
  for (let r = 0; r < labels.length; r++) {
    const label = labels[r]!;
    if (label === -100) continue;
    const row = logits.subarray(r * V, (r + 1) * V);
    let max = -Infinity, sum = 0;
    for (const x of row) max = Math.max(max, x);
    for (const x of row) sum += Math.exp(x - max);
    nll[r] = max + Math.log(sum) - row[label]!;
    for (let c = 0; c < V; c++) dlogits[r * V + c] = scale * (Math.exp(row[c]! - max) / sum - (c === label ? 1 : 0));
  }
  return { nll, dlogits };
}

/** NF4 (arXiv:2305.14314) to floats as bitsandbytes does, rounded once to 32 bits: first element in the high four bits. */
export function nf4Dequantize(
  packed: Uint8Array,
  absmax: Float32Array,
  { code, count, blocksize = 64 }: { code: Float32Array; count: number; blocksize?: number },
): Float32Array {
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const byte = packed[i >> 1]!;
    out[i] = code[i % 2 === 0 ? byte >> 4 : byte & 15]! * absmax[Math.floor(i / blocksize)]!;
  }
  return out;
}
