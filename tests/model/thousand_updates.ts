/**
 * The memory of a process that makes 250 updates and then five times 200 more, weighed after each stretch: a line of JSON,
 * bytes of the process and of JavaScript's heap. It needs V8's --expose-gc.
 */
import { training } from "./small_training.ts";

const { gc } = globalThis as typeof globalThis & { gc: () => void };
await training(async (update) => {
  const memoryAfter = async (updates: number) => {
    await update(updates);
    // Twice: what the first pass finds is freed on a later turn of the event loop.
    for (let pass = 0; pass < 2; pass++) {
      gc();
      await new Promise((done) => setTimeout(done, 20));
    }
    const { rss, heapUsed, external } = Deno.memoryUsage();
    return { process: rss, javascript: heapUsed + external };
  };
  const sizes = [await memoryAfter(250)];
  for (let i = 0; i < 5; i++) sizes.push(await memoryAfter(200));
  console.log(JSON.stringify(sizes));
});
