/** Weights as they come to lie on the GPU, where the files hold them in other ways than the fixtures do. */
import { assertEquals, assertNotEquals, assertRejects } from "@std/assert";
import { fromFloat32, rounded } from "../../lib/data/dtype.ts";
import { openModel, writeSafetensors } from "../../lib/data/safetensors.ts";
import { logitsOf } from "../../lib/model/llama.ts";
import { blogConfig, writeRandomModel } from "../bench/problem.ts";
import { goldenPath, temporaryFolder } from "../check.ts";
import { NO_GPU } from "../on_gpu.ts";

const model = goldenPath("tiny/model_hf"), tokens = [5, 17, 301, 42, 7];

/** Writes the tiny model with its query weights rounded to `to`, and stored as `as` into `dir`. */
async function writeQueries(
  dir: string,
  { to, as }: { to: "F16" | "BF16"; as: "F32" | "F16" | "BF16" },
): Promise<string> {
  using source = openModel(model);
  await Deno.copyFile(`${model}/config.json`, `${dir}/config.json`);
  await writeSafetensors(
    `${dir}/model.safetensors`,
    [...source.tensors.values()].map(({ name, shape }) => {
      const values = new Float32Array(source.read(name).slice().buffer);
      return name.includes("q_proj")
        ? { name, shape, dtype: as, data: () => fromFloat32(rounded(values, to), as) }
        : { name, shape, dtype: "F32" as const, data: () => fromFloat32(values, "F32") };
    }),
  );
  return dir;
}

Deno.test("planWeights() rounds nothing where the projections of a fused weight are stored in different types", {
  ignore: NO_GPU,
}, async () => {
  const untouched = await logitsOf({ model }, tokens);
  for (const to of ["F16", "BF16"] as const) {
    using one = temporaryFolder(), other = temporaryFolder();
    const mixed = await writeQueries(one.path, { to, as: to });
    const wide = await writeQueries(other.path, { to, as: "F32" });
    const expected = await logitsOf({ model: wide }, tokens);
    assertNotEquals(expected, untouched);
    assertEquals(await logitsOf({ model: mixed }, tokens), expected);
  }
});

Deno.test("planWeights() refuses 4-bit projections that cannot lie one behind the other, and names the first", {
  ignore: NO_GPU,
}, async () => {
  using folder = temporaryFolder();
  const dir = folder.path;
  // Query, key and value are [16, 24], [8, 24] and [8, 24]: 6, 3 and 3 blocks of 64.
  const config = blogConfig({
    vocab_size: 64,
    hidden_size: 24,
    intermediate_size: 64,
    num_hidden_layers: 1,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 8,
    max_position_embeddings: 16,
  });
  const { model: made } = await writeRandomModel(dir, { config, quantized: true }), changed = `${dir}/changed`;
  await logitsOf({ model: made }, [1, 2, 3]);
  await Deno.mkdir(changed);
  await Deno.copyFile(`${made}/config.json`, `${changed}/config.json`);
  /** Whether a model is refused whose weights of `module` (all of them by default) say something else of themselves. */
  const refuses = async (from: string, to: string, { module = "", message }: { module?: string; message: string }) => {
    using source = openModel(made);
    const text = new TextDecoder(), states = new TextEncoder();
    const sinks = [...source.tensors.values()].map((info) => {
      const bytes = source.read(info.name), state = info.name.includes("quant_state") && info.name.includes(module);
      const data = state ? states.encode(text.decode(bytes).replace(from, to)) : bytes;
      return { ...info, shape: state ? [data.length] : info.shape, data: () => data };
    });
    await writeSafetensors(`${changed}/model.safetensors`, sinks);
    await assertRejects(() => logitsOf({ model: changed }, [1]), RangeError, `Cannot load "model.layers.0.${message}`);
  };
  const blocks = '"blocksize": 64';
  await refuses(blocks, '"blocksize": 128', {
    message: 'self_attn.k_proj.weight": its 192 elements are not whole blocks of 128: stage 02 makes blocks of 64',
  });
  await refuses(blocks, '"blocksize": 32', {
    module: "up_proj",
    message: 'mlp.up_proj.weight": it is float16 in blocks of 32: float16 in blocks of 64 as "gate_proj" is wanted, ',
  });
  await refuses('"float16"', '"float32"', {
    module: "v_proj",
    message: 'self_attn.v_proj.weight": it is float32 in blocks of 64: float16 in blocks of 64 as "q_proj" is wanted, ',
  });
  await refuses("[24, 64]", "[64, 24]", {
    module: "down_proj",
    message: 'mlp.down_proj.weight": it is [64, 24] but the config wants [24, 64]',
  });
});
