import { assertEquals } from "@std/assert";
import { Llama, type MicroBatch } from "../../lib/model/llama.ts";
import { readAdapter } from "../../lib/model/adapter.ts";
import { nextTokenTargets } from "../../lib/data/dataset.ts";
import { readSlots } from "../../lib/model/lora.ts";
import { download } from "../../lib/gpu/tensor.ts";
import { assertClose, golden, goldenPath } from "../check.ts";

/** A golden batch: rows lie one after the other, position 0 starts each. */
function batchOf(file: ReturnType<typeof golden>, name: string): MicroBatch {
  const prefix = name ? `${name}.` : "";
  const inputIds = file.i32(`${prefix}input_ids`);
  const positionIds = file.names.includes(`${prefix}position_ids`)
    ? file.i32(`${prefix}position_ids`)
    : Int32Array.from(inputIds, (_, i) => i % 48);
  const labels = file.names.includes(`${prefix}labels`) ? file.i32(`${prefix}labels`) : inputIds;
  return { inputIds, positionIds, targets: nextTokenTargets({ positionIds, labels }) };
}
const items = (batch: MicroBatch) => Array.from(batch.targets).filter((t) => t >= 0).length;

for (const [file, model] of [["lora", "model_hf"], ["qlora", "model_4bit"]] as const) {
  for (const config of ["tiny", "odd"]) {
    for (const checkpointing of ["none", "block"] as const) {
      Deno.test(`Llama gives PEFT's loss and gradients: ${config} ${file}, checkpointing ${checkpointing}`, async () => {
        let expected: ReturnType<typeof golden>;
        try {
          expected = golden(`${config}/${file}.safetensors`);
        } catch { return; }
        const llama = await Llama.open({
          model: goldenPath(`${config}/${model}`),
          adapter: readAdapter(goldenPath(`${config}/lora_adapter`)),
          train: "lora",
          tokens: 96,
          checkpointing,
        });
        for (const name of ["plain", "packed"]) {
          const batch = batchOf(expected, name), count = items(batch);
          llama.zeroGradients();
          llama.accumulate(batch, { items: count, slot: 0 });
          const loss = (await llama.losses())[0]! / count;
          console.log(name, loss, expected.f32(`${name}.loss`)[0]);
          const grads = await readSlots(llama.gpu, llama.groups.map(({ grad, slots }) => ({ tensor: grad, slots })));
          for (const [tensor, values] of grads) assertClose(values, expected.f32(`${name}.grad.${tensor}`), { max: 2e-5, name: tensor });
        }
      });
    }
  }
}
