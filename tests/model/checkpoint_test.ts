/** Tests of checkpoints: a trainer goes on from one with the same bits, and a checkpoint of another run is refused. */
import { assertEquals, assertNotEquals, assertRejects, assertThrows } from "@std/assert";
import { nextTokenTargets } from "../../lib/data/dataset.ts";
import { openSafetensors } from "../../lib/data/safetensors.ts";
import {
  listCheckpoints,
  pruneCheckpoints,
  readRunState,
  restoreCheckpoint,
  resumeState,
  saveCheckpoint,
} from "../../lib/model/checkpoint.ts";
import type { OptimizerKind } from "../../lib/model/optimizer.ts";
import { Trainer } from "../../lib/model/trainer.ts";
import { goldenPath, withFolder } from "../check.ts";
import { NO_GPU } from "../on_gpu.ts";

const inputIds = Int32Array.from({ length: 24 }, (_, i) => (37 * i) % 300);
const positionIds = Int32Array.from(inputIds, (_, i) => i % 12);
const batch = { inputIds, positionIds, targets: nextTokenTargets({ positionIds, labels: inputIds }) };
const settings = JSON.stringify({ flags: { learningRate: 0.01, maxSteps: 4 }, files: { "rows.safetensors": "abc" } });
const nothing = () => Promise.resolve();

async function open(optimizer: OptimizerKind, train: "lora" | "full"): Promise<Trainer> {
  const hyper = { optimizer, weightDecay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, maxGradNorm: 1 };
  const adapter = train === "lora" ? goldenPath("tiny/lora_adapter") : undefined;
  return await Trainer.open({ model: goldenPath("tiny/model_hf"), adapter, train, tokens: 24, hyper });
}

/** Takes updates `from` to `to` and gives their losses. */
async function learn(trainer: Trainer, [from, to]: readonly [number, number]): Promise<number[]> {
  for (let step = from; step <= to; step++) trainer.update([batch], { step, learningRate: 0.01 });
  return (await trainer.read()).map(({ loss }) => loss);
}

/** All tensors of a checkpoint, as bytes. */
function tensorsOf(dir: string): Map<string, Uint8Array> {
  using source = openSafetensors(`${dir}/state.safetensors`);
  return new Map([...source.tensors.keys()].map((name) => [name, source.read(name)]));
}

for (const [optimizer, train] of [["adamw_8bit", "lora"], ["adamw", "full"]] as const) {
  Deno.test(
    `a trainer that loads a checkpoint goes on with the same bits: ${train}, ${optimizer}`,
    { ignore: NO_GPU },
    () =>
      withFolder(async (dir) => {
        const save = (trainer: Trainer, step: number, name = `step-${step}`) =>
          saveCheckpoint(`${dir}/${name}`, {
            trainer,
            run: { step, logBytes: 7, best: null, settings },
            also: nothing,
          });
        const whole = await open(optimizer, train);
        await learn(whole, [1, 2]);
        await save(whole, 2);
        const losses = await learn(whole, [3, 4]);
        await save(whole, 4);
        whole.destroy();

        const resumed = await open(optimizer, train);
        await learn(resumed, [1, 1]); // whatever it holds is overwritten
        await restoreCheckpoint(`${dir}/step-2`, resumed);
        assertEquals(resumeState(`${dir}/step-2`, settings), { step: 2, logBytes: 7, best: null, settings });
        assertEquals(await learn(resumed, [3, 4]), losses);
        await save(resumed, 4, "again");
        assertEquals(tensorsOf(`${dir}/again`), tensorsOf(`${dir}/step-4`));
        assertNotEquals(tensorsOf(`${dir}/again`), tensorsOf(`${dir}/step-2`));
        resumed.destroy();
      }),
  );
}

Deno.test("a run goes on from no checkpoint of other settings, other files, another kind of run, or that is damaged", {
  ignore: NO_GPU,
}, () =>
  withFolder(async (dir) => {
    const trainer = await open("adamw_8bit", "lora");
    const at = (step: number) => `${dir}/step-${step}`;
    const run = { step: 2, logBytes: 0, best: { step: 1, evalLoss: 1 }, settings };
    for (const step of [2, 4]) await saveCheckpoint(at(step), { trainer, run, also: nothing });
    const refuses = (is: { flags?: object; files?: object }, message: string) =>
      assertThrows(
        () => resumeState(at(4), JSON.stringify({ ...JSON.parse(settings), ...is })),
        Error,
        `Cannot resume from "${at(4)}": ${message}: go on as the run began, or start over with --no-resume`,
      );
    refuses({ flags: { learningRate: 0.02, maxSteps: 4 } }, "it was made with --learning-rate 0.01, not 0.02");
    refuses({ flags: { learningRate: 0.01, maxSteps: 5 } }, "it was made with --max-steps 4, not 5");
    refuses({ files: { "rows.safetensors": "abd" } }, '"rows.safetensors" is not the file that it was made with');
    trainer.destroy();

    const other = await open("adamw", "full");
    await assertRejects(
      () => restoreCheckpoint(at(4), other),
      Error,
      "Cannot resume: the checkpoint holds no bytes of",
    );
    Deno.truncateSync(`${at(4)}/state.safetensors`, 5000);
    const state = `cannot read "${
      at(4)
    }/state.safetensors": it is damaged: checkpoint.json has the digest of other bytes`;
    assertThrows(
      () => resumeState(at(4), settings),
      Error,
      `Cannot resume from "${at(4)}": ${state}: remove that folder to go on from "${at(2)}"`,
    );
    Deno.removeSync(at(2), { recursive: true });
    assertThrows(
      () => resumeState(at(4), settings),
      Error,
      "start over with --no-resume",
    );
    other.destroy();
  }));

Deno.test("listCheckpoints() counts whole ones alone, by number; pruneCheckpoints() keeps the newest", () =>
  withFolder(async (dir) => {
    assertEquals(listCheckpoints(`${dir}/nowhere`), []);
    for (const name of ["step-9", "step-100", "step-20", "step-120.partial", "best"]) Deno.mkdirSync(`${dir}/${name}`);
    const steps = () => listCheckpoints(dir).map(({ step }) => step);
    assertEquals(steps(), [9, 20, 100]);
    await pruneCheckpoints(dir, { limit: 0 });
    assertEquals(steps(), [9, 20, 100]);
    await pruneCheckpoints(dir, { limit: 2 });
    assertEquals(steps(), [20, 100]);
    await pruneCheckpoints(dir, { limit: 5 });
    assertEquals(steps(), [20, 100]);
    assertEquals([...Deno.readDirSync(dir)].map(({ name }) => name).sort(), [
      "best",
      "step-100",
      "step-120.partial",
      "step-20",
    ]);
  }));

Deno.test("readRunState() refuses a checkpoint with one bit flipped in any of its files, or without one of them", {
  ignore: NO_GPU,
}, () =>
  withFolder(async (root) => {
    const dir = `${root}/step-3`, run = { step: 3, logBytes: 123, best: { step: 2, evalLoss: 1.5 }, settings };
    const trainer = await open("adamw_8bit", "lora");
    const also = async (dir: string) => {
      await Deno.mkdir(`${dir}/adapter`);
      await Deno.writeTextFile(`${dir}/adapter/adapter_config.json`, "{}");
    };
    await saveCheckpoint(dir, { trainer, run, also });
    trainer.destroy();
    assertEquals(readRunState(dir), run);

    const [state, config] = ["state.safetensors", "adapter/adapter_config.json"].map((name) => `${dir}/${name}`);
    const { size } = Deno.statSync(state!);
    for (const [path, at] of [[state!, size - 1], [state!, size >> 1], [state!, 20], [config!, 1]] as const) {
      const bytes = Deno.readFileSync(path);
      Deno.writeFileSync(path, bytes.with(at, bytes[at]! ^ 1));
      assertThrows(() => readRunState(dir), Error, `Cannot read "${path}": it is damaged: `);
      Deno.writeFileSync(path, bytes);
      assertEquals(readRunState(dir), run);
    }
    const digests = `${dir}/checkpoint.json`, text = Deno.readTextFileSync(digests);
    Deno.writeTextFileSync(digests, text.replace("state.safetensors", "state.safetensorr"));
    assertThrows(() => readRunState(dir), Error, `Cannot read "${state}": it is damaged: `);
    Deno.removeSync(digests);
    assertThrows(() => readRunState(dir), Error, `Cannot read "${digests}": no such file`);
    Deno.writeTextFileSync(digests, text);
    Deno.removeSync(config!);
    assertThrows(() => readRunState(dir), Error, `Cannot read "${config}": no such file`);
  }));
