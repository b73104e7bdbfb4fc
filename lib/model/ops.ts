/** The operations of one model, made once for its sizes. */
import type { Gpu } from "../gpu/device.ts";
import { createAttention } from "../ops/attention.ts";
import { createCrossEntropy } from "../ops/cross_entropy.ts";
import { createEmbedding } from "../ops/embedding.ts";
import { createMatmul } from "../ops/matmul.ts";
import { createRmsnorm } from "../ops/rmsnorm.ts";
import { createRope } from "../ops/rope.ts";
import { createSwiglu } from "../ops/swiglu.ts";
import type { ModelConfig } from "./config.ts";

/** Rows of the embedding in memory: the vocabulary rounded up, the rest zero, so that products need no edge case. */
export function paddedVocab(config: ModelConfig): number {
  return Math.ceil(config.vocab_size / 64) * 64;
}

/** Every op with the model's dimensions filled in. */
export async function createOps(gpu: Gpu, config: ModelConfig) {
  const heads = config.num_attention_heads, kvHeads = config.num_key_value_heads, headDim = config.head_dim;
  const dim = config.hidden_size;
  const sizes = { hidden_size: dim, intermediate_size: config.intermediate_size, head_dim: headDim };
  for (const [name, size] of Object.entries(sizes)) {
    if (size % 8) throw new RangeError(`Cannot run this model: ${name} is ${size}: a multiple of 8 is wanted`);
  }
  return {
    matmul: createMatmul(gpu),
    norm: createRmsnorm(gpu, { dim, eps: config.rms_norm_eps }),
    rope: await createRope(gpu, {
      heads,
      kvHeads,
      headDim,
      theta: config.rope_theta,
      positions: config.max_position_embeddings,
    }),
    attention: createAttention(gpu, { heads, kvHeads, headDim }),
    swiglu: createSwiglu(gpu, { dim: config.intermediate_size }),
    embedding: createEmbedding(gpu, { dim }),
    loss: createCrossEntropy(gpu, { vocab: config.vocab_size, stride: paddedVocab(config) }),
  };
}

/** What `createOps` makes. */
export type Ops = Awaited<ReturnType<typeof createOps>>;
