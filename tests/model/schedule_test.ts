/** Learning rates and run lengths against transformers' own. */
import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { learningRate, plannedSteps, type Scheduler, warmupSteps } from "../../lib/model/schedule.ts";
import { goldenPath } from "../check.ts";

interface Case {
  readonly total_steps: number;
  readonly warmup_ratio: number;
  readonly warmup_steps: number;
  readonly peak: number;
  readonly lr_of_update_1_to_total: readonly number[];
  readonly lr_after_the_last_update: number;
}

Deno.test("learningRate() gives transformers' cosine rate for every update of the golden runs", () => {
  const cases: Case[] = JSON.parse(Deno.readTextFileSync(goldenPath("tiny/schedule.json")));
  assertEquals(cases.map((run) => run.lr_of_update_1_to_total.length), [4329, 37, 78, 10, 1]);
  for (const run of cases) {
    const [totalSteps, peak] = [run.total_steps, run.peak];
    const warmup = warmupSteps({ scheduler: "cosine", ratio: run.warmup_ratio, total: totalSteps });
    assertEquals(warmup, run.warmup_steps);
    [...run.lr_of_update_1_to_total, run.lr_after_the_last_update].forEach((wanted, i) => {
      const rate = learningRate({ scheduler: "cosine", step: i + 1, totalSteps, warmupSteps: warmup, peak });
      assertAlmostEquals(rate, wanted, 1e-12 * peak);
    });
  }
});

Deno.test("the first update has rate 0, update W + 1 the peak, and the last is still above 0", () => {
  const rate = (step: number) =>
    learningRate({ scheduler: "cosine", step, totalSteps: 36, warmupSteps: 2, peak: 2e-4 });
  assertEquals([rate(1), rate(2), rate(3)], [0, 1e-4, 2e-4]);
  assertAlmostEquals(rate(4), 1.9957341762950344e-4, 1e-16);
  assertAlmostEquals(rate(36), 4.2658237049655323e-7, 1e-16);
});

Deno.test("the linear schedule falls straight to 0 and the constant one stays, without warm-up", () => {
  const run = { totalSteps: 10, warmupSteps: 2, peak: 1 };
  const linear = [1, 2, 3, 7, 11].map((step) => learningRate({ scheduler: "linear", step, ...run }));
  assertEquals(linear, [0, 0.5, 1, 0.5, 0]);
  assertEquals([1, 5, 10].map((step) => learningRate({ scheduler: "constant", step, ...run })), [1, 1, 1]);
});

Deno.test("plannedSteps() counts the blog's 4,329 updates and its 217 of warm-up", () => {
  const blog = { batchSize: 4, accumulation: 8, epochs: 3 };
  for (const rows of [46_145, 46_176]) { // every count of rows from the first to the last gives the same run
    assertEquals(plannedSteps({ rows, ...blog }).totalSteps, 4329);
  }
  assertEquals(plannedSteps({ rows: 46_144, ...blog }).totalSteps, 4326);
  assertEquals(plannedSteps({ rows: 46_177, ...blog }).totalSteps, 4332);
  const warmup = (scheduler: Scheduler) => warmupSteps({ scheduler, ratio: 0.05, total: 4329 });
  assertEquals((["cosine", "linear", "constant"] as const).map(warmup), [217, 217, 0]);
});

Deno.test("plannedSteps() keeps the last partial batch and update, and takes a part of an epoch or a step limit", () => {
  const run = { rows: 379, batchSize: 4, accumulation: 8 };
  assertEquals(plannedSteps({ ...run, epochs: 3 }), { batchesPerEpoch: 95, stepsPerEpoch: 12, totalSteps: 36 });
  assertEquals(plannedSteps({ ...run, epochs: 0.3 }).totalSteps, 4); // ceil(3.6)
  assertEquals(plannedSteps({ ...run, epochs: 3, maxSteps: 50 }).totalSteps, 50);
  assertEquals(plannedSteps({ ...run, epochs: 3, maxSteps: 0 }).totalSteps, 36);
});

Deno.test("a run without updates, an update 0 and a warm-up longer than the run are refused", () => {
  const run = { rows: 10, batchSize: 4, accumulation: 8, epochs: 1 };
  assertThrows(() => plannedSteps({ ...run, rows: 0 }), RangeError, "Cannot plan a run with rows 0");
  assertThrows(() => plannedSteps({ ...run, batchSize: 1.5 }), RangeError, "batchSize 1.5");
  assertThrows(() => plannedSteps({ ...run, epochs: 0 }), RangeError, "at least one update");
  assertThrows(
    () => warmupSteps({ scheduler: "constant", ratio: 1.2, total: 100 }),
    RangeError,
    "Cannot warm up for 1.2",
  );
  const step = { scheduler: "cosine", totalSteps: 3, warmupSteps: 0, peak: 1 } as const;
  assertThrows(() => learningRate({ ...step, step: 0 }), RangeError, "updates count from 1");
  assert(learningRate({ ...step, step: 1 }) === 1);
});
