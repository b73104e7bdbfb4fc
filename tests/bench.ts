/**
 * The bench: peaks of the device, every kernel at the blog's sizes, training updates and generation. Kernels are checked
 * against the slow reference before they are timed, updates by their losses, answers by the logits of the model that trains.
 * Sizes follow the device. A measurement that fails is told, the others are made all the same, and the status is 1.
 *
 *   deno task bench                          all of it: some minutes on a CPU driver
 *   deno task bench --only step --quick
 *   deno task bench:gpu                      for a rented GPU: within 9 minutes, tiles compared
 *
 * writes   <out>/bench.json, after every measurement
 */
import { openGpu } from "../lib/gpu/device.ts";
import { headChunk } from "../lib/model/plan.ts";
import { tilesOf } from "../lib/ops/matmul.ts";
import { checkNumbers, choice, flags } from "../lib/run/flags.ts";
import { writeJson } from "../lib/data/files.ts";
import { bytes, count, duration, percent, table } from "../lib/run/print.ts";
import { attentionCases, decodingCases } from "./bench/attention.ts";
import { benchGenerate, generateCases, type GenerateResult } from "./bench/generate.ts";
import { driverVersion } from "./bench/host.ts";
import { memoryCases } from "./bench/kernels.ts";
import { CPU_TARGET, productCases, products } from "./bench/matmul.ts";
import { benchCase, type Case, type KernelResult } from "./bench/measure.ts";
import { measurePeaks } from "./bench/peaks.ts";
import { blogConfig } from "./bench/problem.ts";
import { runStep, stepCases, type StepResult } from "./bench/step.ts";

const opt = flags(import.meta, {
  only: choice(["all", "matmul", "kernels", "step", "generate"]),
  quick: false, // fewer runs, smaller sizes: to see that it works
  sweep: false, // matmul: every tile that the device can hold
  budget: 0, // seconds after which no measurement is begun; 0 = no limit
  lanes: choice(["device", "shared"]), // shared: the kernels for GPUs on a CPU driver too
});
checkNumbers(opt, { real: { budget: 0 } });
const began = performance.now();
const more = () => opt.budget === 0 || performance.now() - began < opt.budget * 1e3;
const wanted = (part: string) => opt.only === "all" || opt.only === part;

// 1. The device and its peaks.
const opened = await openGpu();
const gpu = opt.lanes === "shared" ? { ...opened, lanes: "shared" as const } : opened;
const peaks = await measurePeaks(gpu, opt);
console.log(table([
  ["Device", gpu.name],
  ["Times", gpu.timestamps ? "timestamp queries" : "wall clock"],
  ["FP32 peak", `${figure(peaks.gflops)} GFLOP/s on registers${perCpuS("gflops", "GFLOP")}`],
  ["Copy", `${figure(peaks.gbps)} GB/s read and written${perCpuS("gbps", "GB")}`],
]));
const kernels: KernelResult[] = [], steps: StepResult[] = [], generated: GenerateResult[] = [];
const skipped: string[] = [], failed: { name: string; error: string }[] = [];
await save();

// 2. Kernels.
const tokens = gpu.cpu ? (opt.quick ? 128 : 512) : 4096;
const rows = headChunk(gpu, { config: blogConfig(), tokens, checkpointing: "none" });
const chunk = gpu.cpu && opt.quick ? 32 : rows;
const product = productCases(gpu);
if (wanted("matmul")) {
  const all = products({ tokens, chunk });
  await benchAll("Products", [...(gpu.cpu ? CPU_TARGET : []), ...all].map((of) => product(of)));
}
if (wanted("kernels")) {
  await benchAll("Attention and decoding", [
    ...attentionCases(gpu, { tokens, length: gpu.cpu ? 128 : 1024 }),
    ...(gpu.cpu ? [] : attentionCases(gpu, { tokens, length: 180 })),
    ...decodingCases(gpu, { context: gpu.cpu ? 256 : 1024, sequences: 8 }),
  ]);
  const parameters = 295_936 * (gpu.cpu ? 4 : 24); // the adapter of that many layers
  await benchAll("Memory", await memoryCases(gpu, { tokens, chunk, parameters }));
}

// 3. Training updates and generation, from models written for the occasion.
const dir = await Deno.makeTempDir({ prefix: "bench_" });
globalThis.addEventListener("unload", () => Deno.removeSync(dir, { recursive: true }));
if (wanted("step")) {
  const shared = gpu !== opened, { quick } = opt, { gflops: peakGflops } = peaks;
  for (const { name } of stepCases(gpu, { dir, quick })) {
    // A step that began in time may end a little late: kernels hang on drivers that were never tried.
    const seconds = opt.budget === 0 ? undefined : opt.budget + 40 - (performance.now() - began) / 1e3;
    await attempt(`step ${name}`, async () => {
      steps.push(await runStep({ name, dir, quick, shared, peakGflops }, seconds));
      showStep(steps.at(-1)!);
    });
  }
}
if (wanted("generate")) {
  for (const of of generateCases(gpu)) {
    const how = { dir, quick: opt.quick, copyGbps: peaks.gbps };
    await attempt(`generate ${of.name} ${of.sequences}`, async () => {
      generated.push(await benchGenerate(of, how));
    });
  }
  if (generated.length > 0) {
    console.log(
      "\n" + table([
        ["Generation", "sequences", "tokens/s", "first token ms", "GB/s", "of copy"],
        ...generated.map((g) => [
          g.name,
          g.sequences,
          figure(g.tokens_per_s),
          figure(g.first_token_ms),
          figure(g.gbps),
          percent(g.share),
        ]),
      ], { header: true }),
    );
  }
}

// 4. Tiles, last because they are many.
if (opt.sweep && wanted("matmul") && gpu.lanes === "shared") {
  const large = products({ tokens, chunk }).filter(({ M, N }) => M > 64 && N > 64);
  await benchAll("Tiles", large.flatMap((of) => tilesOf(gpu).map((tile) => product(of, tile))));
}
await save();
if (skipped.length > 0) {
  console.log(`\nNot begun within ${opt.budget} s: ${skipped.length} measurements, ${skipped[0]} the first`);
}
if (failed.length > 0) console.error(`\nFailed: ${failed.map(({ name }) => name).join(", ")}`);
const others = [...kernels, ...steps].map(({ others_share }) => others_share ?? 0).sort((a, b) => a - b);
if (gpu.cpu && others.length > 0) {
  const [least, most] = [others[0]!, others.at(-1)!].map(percent);
  console.log(
    `\nOther programs used ${least} to ${most} of the processors meanwhile: the times are only as good as that.`,
  );
}
console.log(`${opt.out}/bench.json`);
Deno.exit(failed.length > 0 ? 1 : 0);

/** Measures something if there is time. What fails is told and kept, and the rest is measured all the same. */
async function attempt(name: string, measured: () => Promise<void>): Promise<void> {
  if (!more()) {
    skipped.push(name);
    return;
  }
  try {
    await measured();
  } catch (error) {
    failed.push({ name, error: error instanceof Error ? error.message : String(error) });
    console.error(`\n${name}: ${failed.at(-1)!.error}`);
  }
  await save();
}

/** Measures cases and prints them as one table. */
async function benchAll(title: string, cases: readonly Case[]): Promise<void> {
  const results: KernelResult[] = [];
  for (const of of cases) {
    await attempt(`${of.name} ${of.tile ?? ""}`.trim(), async () => {
      results.push(await benchCase(gpu, of, { peaks, quick: opt.quick }));
      kernels.push(results.at(-1)!);
    });
  }
  if (results.length === 0) return;
  const rows = results.map((r) => [
    r.name,
    r.shape,
    r.dtype,
    ...(results.some(({ tile }) => tile) ? [r.tile ?? ""] : []),
    r.ms.toFixed(3),
    `${r.min_ms.toFixed(3)} to ${r.max_ms.toFixed(3)}`,
    r.gflops === undefined ? `${figure(r.gbps!)} GB/s` : `${figure(r.gflops)} GFLOP/s`,
    percent(r.share),
    ...(r.per_cpu_s === null ? [] : [figure(r.per_cpu_s)]),
  ]);
  const tile = results.some((r) => r.tile) ? ["tile"] : [], cpu = gpu.cpu ? ["per CPU s"] : [];
  const head = [title, "shape", "types", ...tile, "ms", "least to most", "speed", "of peak", ...cpu];
  console.log("\n" + table([head, ...rows], { header: true }));
}

function showStep(s: StepResult): void {
  console.log(
    "\n" + table([
      [
        `Step ${s.name}`,
        `${figure(s.tokens_per_s)} tokens/s, ${figure(s.ms)} ms (${figure(s.min_ms)} to ${figure(s.max_ms)})`,
      ],
      ["Share of FP32 peak", percent(s.share)],
      ["From the files", `${duration(s.open_ms)} until it is open, ${duration(s.first_ms)} for the first update`],
      ...(s.tokens_per_cpu_s === null ? [] : [["Per processor second", `${figure(s.tokens_per_cpu_s)} tokens`]]),
      [
        "JavaScript",
        `${figure(s.javascript_ms_per_1000_dispatches)} ms per 1,000 dispatches of ${count(s.dispatches)}, ` +
        `${figure(s.host_ms_per_1000_dispatches)} ms with WebGPU's own recording`,
      ],
      [
        "Memory",
        `${bytes(s.plan_bytes)} planned, the driver's ${s.driver_bytes === null ? "unknown" : bytes(s.driver_bytes)}`,
      ],
      ["Losses", s.losses.map((loss) => loss.toFixed(4)).join(" ")],
    ]),
  );
  const rows = s.breakdown.filter(({ share }) => share >= 0.01);
  console.log(table([
    ["  kernel", "ms", "dispatches", "share"],
    ...rows.map(({ label, ms, count, share }) => [`  ${label}`, figure(ms), count, percent(share)]),
  ], { header: true }));
}

/** The peak per second of processor time, which does not fall when other programs run. */
function perCpuS(key: "gflops" | "gbps", unit: string): string {
  return peaks.perCpuS === null ? "" : `, ${figure(peaks.perCpuS[key])} ${unit} per processor second`;
}

/** Three digits. */
function figure(x: number): string {
  return x >= 100 ? count(x) : x.toPrecision(3);
}

async function save(): Promise<void> {
  await Deno.mkdir(opt.out, { recursive: true });
  await writeJson(`${opt.out}/bench.json`, {
    device: gpu.name,
    driver: await driverVersion(gpu),
    deno: Deno.version.deno,
    date: new Date().toISOString(),
    seconds: (performance.now() - began) / 1e3,
    clock: gpu.timestamps ? "timestamp queries" : "wall clock",
    peak_gflops: peaks.gflops,
    copy_gbps: peaks.gbps,
    peaks_per_cpu_s: peaks.perCpuS,
    kernels,
    steps,
    generate: generated,
    skipped,
    failed,
  });
}
