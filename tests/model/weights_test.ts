/** Weights as they come to lie on the GPU, where the files hold them in other ways than the fixtures do. */
import { assertEquals, assertNotEquals } from "@std/assert";
import { fromFloat32, rounded } from "../../lib/data/dtype.ts";
import { openModel, writeSafetensors } from "../../lib/data/safetensors.ts";
import { logitsOf } from "../../lib/model/llama.ts";
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
