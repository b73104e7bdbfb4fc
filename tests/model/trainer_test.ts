/** What ends a run that goes wrong, and what it says; how a run goes right is told by tests/golden. */
import { assertThrows } from "@std/assert";
import { checkEvaluation, checkUpdate } from "../../lib/model/trainer.ts";

Deno.test("checkUpdate() lets numbers pass and gives advice that fits the update and the clipping", () => {
  const rows = [7, 3], good = { step: 2, loss: 1.5, gradNorm: 0.5 };
  checkUpdate(good, { rows, maxGradNorm: 1 });
  const refuses = (given: Partial<typeof good>, maxGradNorm: number, message: string) =>
    assertThrows(() => checkUpdate({ ...good, ...given }, { rows, maxGradNorm }), Error, message);
  refuses(
    { loss: NaN },
    1,
    "Cannot go on: the loss of update 2 is NaN and its gradient norm 0.5: lower --learning-rate, or look at its rows, 7, 3",
  );
  refuses({ gradNorm: Infinity }, 0, "gradient norm Infinity: lower --learning-rate, clip with --max-grad-norm 1, or");
  refuses({ step: 1, loss: NaN }, 1, "nothing was learnt yet: look at the weights of the model and of the adapter, or");
});

Deno.test("checkEvaluation() tells a model that came without a loss from one that lost it", () => {
  checkEvaluation(2.5, { step: 0, model: "m" });
  const refuses = (step: number, message: string) =>
    assertThrows(() => checkEvaluation(NaN, { step, model: "m" }), Error, message);
  refuses(0, 'Cannot train "m": its validation loss before the first update is NaN: look at its weights');
  refuses(3, "Cannot go on: the validation loss after update 3 is NaN: lower --learning-rate");
});
