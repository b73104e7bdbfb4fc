/**
 * How many updates a run has and the learning rate of each, as transformers plans them (trainer.py, optimization.py).
 * It keeps no state: a rate depends on the number of the update alone, so a resumed run needs nothing from here.
 */

/** The schedules by their names in transformers; `constant` has no warm-up there either. */
export type Scheduler = "cosine" | "linear" | "constant";

/**
 * The learning rate of update `step`, counted from 1. The warm-up rises from 0, so update 1 has rate 0 and update
 * `warmupSteps` + 1 the peak; the last update is still above 0. Throws a RangeError for a step below 1.
 */
export function learningRate(
  { scheduler, step, totalSteps, warmupSteps, peak }: {
    readonly scheduler: Scheduler;
    readonly step: number;
    readonly totalSteps: number;
    readonly warmupSteps: number;
    readonly peak: number;
  },
): number {
  if (!(step >= 1)) throw new RangeError(`Cannot give the learning rate of update ${step}: updates count from 1`);
  if (scheduler === "constant") return peak;
  const done = step - 1;
  if (done < warmupSteps) return peak * (done / Math.max(1, warmupSteps));
  const progress = (done - warmupSteps) / Math.max(1, totalSteps - warmupSteps);
  if (scheduler === "linear") return peak * Math.max(0, 1 - progress);
  return peak * Math.max(0, 0.5 * (1 + Math.cos(Math.PI * progress)));
}

/**
 * The updates of warm-up: `ratio` of `total`, rounded up; none where the `scheduler` has no warm-up. Throws a RangeError
 * unless 0 <= ratio <= 1.
 */
export function warmupSteps(
  { scheduler, ratio, total }: { readonly scheduler: Scheduler; readonly ratio: number; readonly total: number },
): number {
  if (!(ratio >= 0 && ratio <= 1)) {
    throw new RangeError(`Cannot warm up for ${ratio} of the run: the ratio must lie between 0 and 1`);
  }
  return scheduler === "constant" ? 0 : Math.ceil(total * ratio);
}

/** What a run consists of; an epoch's last batch and last update may be smaller than the others. */
export interface Plan {
  readonly batchesPerEpoch: number;
  readonly stepsPerEpoch: number;
  readonly totalSteps: number;
}

/**
 * Plans a run over `rows` rows: micro-batches of `batchSize`, updates of `accumulation` micro-batches, for `epochs`
 * (may be a fraction) or, where `maxSteps` is above 0, for that many updates. Throws a RangeError for an empty run.
 */
export function plannedSteps(
  { rows, batchSize, accumulation, epochs, maxSteps = 0 }: {
    readonly rows: number;
    readonly batchSize: number;
    readonly accumulation: number;
    readonly epochs: number;
    readonly maxSteps?: number;
  },
): Plan {
  for (const [name, value] of Object.entries({ rows, batchSize, accumulation })) {
    if (!(Number.isInteger(value) && value >= 1)) {
      throw new RangeError(`Cannot plan a run with ${name} ${value}: it must be a whole number above 0`);
    }
  }
  const batchesPerEpoch = Math.ceil(rows / batchSize);
  const stepsPerEpoch = Math.ceil(batchesPerEpoch / accumulation);
  const totalSteps = maxSteps > 0 ? maxSteps : Math.ceil(epochs * stepsPerEpoch);
  if (!(Number.isInteger(totalSteps) && totalSteps >= 1)) {
    throw new RangeError(
      `Cannot plan a run of ${epochs} epochs and at most ${maxSteps} steps: it must have at least one update`,
    );
  }
  return { batchesPerEpoch, stepsPerEpoch, totalSteps };
}
