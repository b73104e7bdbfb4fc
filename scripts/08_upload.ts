/**
 * 08 · Upload: adapter and merged model to two repositories on the hub, each with a card, every file verified there.
 * Blog section "Save & Upload to HuggingFace".
 *
 *   deno task 08                                   tiny: lists what would go, sends nothing
 *   HF_TOKEN=hf_… deno task 08 --recipe blog --adapter-repo you/x-lora --merged-repo you/x
 *
 * An interrupted upload continues when it is started again: bytes that the hub has are not sent twice.
 *
 * reads   artifacts/07_merge/{lora_adapters,merged_model}; for the cards artifacts/{03_dataset,05_train,06_evaluate}
 * writes  artifacts/08_upload/{lora_adapters,merged_model}/README.md  manifest.json, and the two repositories
 */
import { exists, readJsonObject, writeAtomic } from "../lib/data/files.ts";
import { BLOG_SYSTEM, BLOG_TEMPLATE, chatTemplate, readTemplate } from "../lib/data/template.ts";
import { adapterCard, type CardFacts, checkLicense, hubName, modelCard } from "../lib/hub/card.ts";
import { checkRepoId, environmentToken, type HubAccess, hubBase } from "../lib/hub/retry.ts";
import { accountName, likelyMode, listLocal, type LocalFile, uploadFolder } from "../lib/hub/upload.ts";
import { parameterShapes, readConfig } from "../lib/model/config.ts";
import { byRecipe, flags, unset } from "../lib/run/flags.ts";
import { type Manifest, readManifest } from "../lib/run/manifest.ts";
import { bytes, progress, table } from "../lib/run/print.ts";
import { beginStage } from "../lib/run/stage.ts";

const opt = flags(import.meta, {
  merge: "artifacts/07_merge", // holds lora_adapters/ and merged_model/
  adapterRepo: byRecipe({ tiny: "you/medslm-tiny-lora", blog: "Saminx22/MedSLM-SFT-LoRA" }), // "" leaves it out
  mergedRepo: byRecipe({ tiny: "you/medslm-tiny", blog: "Saminx22/MedSLM-SFT" }), // "" leaves it out
  baseModel: byRecipe({ tiny: unset, blog: "Saminx22/MedSLM" }), // the 16-bit base on the hub, for the adapter's settings
  license: unset, // such as apache-2.0
  private: false, // make repositories that only you see
  hubUrl: "https://huggingface.co", // another hub
  dryRun: byRecipe({ tiny: true, blog: false }), // only list
  dataset: "artifacts/03_dataset", // the prompt template and the counts in the cards
  train: "artifacts/05_train", // the training numbers in the cards
  evaluation: "artifacts/06_evaluate", // the measured numbers in the cards
});

// 1. Everything that can be refused without asking anyone.
const targets = [
  { kind: "lora_adapters", repo: opt.adapterRepo },
  { kind: "merged_model", repo: opt.mergedRepo },
].filter(({ repo }) => repo !== unset);
if (targets.length === 0) throw new Error("Cannot upload: both --adapter-repo and --merged-repo are empty");
for (const { repo } of targets) {
  checkRepoId(repo, { action: "upload to" });
  if (!opt.dryRun && repo.startsWith("you/medslm-tiny")) {
    throw new Error(
      `Cannot upload to "${repo}": it is only an example: give --adapter-repo and --merged-repo of your own`,
    );
  }
}
if (opt.adapterRepo.toLowerCase() === opt.mergedRepo.toLowerCase()) {
  throw new Error(`Cannot upload to "${opt.mergedRepo}": adapter and merged model need a repository each`);
}
if (opt.baseModel !== unset) checkRepoId(opt.baseModel, { action: "name the base" });
if (opt.license !== unset) checkLicense(opt.license);
const { nothing_to_merge, model: whole } = readManifest(opt.merge)?.numbers ?? {};
if (nothing_to_merge === true && opt.dryRun) {
  await listWhole(String(whole));
  Deno.exit(0);
}
if (nothing_to_merge === true) {
  const state = `all weights were trained, so "${opt.merge}" has no adapter and no merged model`;
  throw new Error(
    `Cannot upload: ${state}: the trained model is the folder "${whole}", which this stage does not send`,
  );
}
const access: HubAccess = {
  hubUrl: opt.hubUrl,
  token: opt.dryRun ? "" : environmentToken(),
  onRetry: (line) => console.log(line),
};
const site = hubBase(access);
if (!opt.dryRun) console.log(`Uploading as ${await accountName(access)}`);

// 2. A finished dry run is up to date until something changes; a real one always asks the hub what it has.
const told = [opt.merge, opt.dataset, opt.train, opt.evaluation].filter((dir) => readManifest(dir) !== undefined);
const stage = await beginStage("08_upload", { ...opt, force: opt.force || !opt.dryRun }, {
  reads: [...targets.map(({ kind }) => `${opt.merge}/${kind}`), ...told.map((dir) => `${dir}/manifest.json`)],
});

// 3. The cards, and the base's name where the adapter has a path of this machine.
const lora = readJsonObject(`${opt.merge}/lora_adapters/adapter_config.json`);
const named = String(lora.base_model_name_or_path);
const facts = gatherFacts();
if (facts.base === "" && !opt.dryRun && opt.adapterRepo !== unset) {
  throw new Error(
    `Cannot upload the adapter: its base is "${named}", which nobody else has: name the 16-bit base with --base-model owner/name`,
  );
}
stage.clear();
const lists = [];
for (const { kind, repo } of targets) {
  const dir = `${stage.out}/${kind}`;
  await Deno.mkdir(dir, { recursive: true });
  await writeAtomic(`${dir}/README.md`, kind === "merged_model" ? modelCard(facts) : adapterCard(facts));
  const replace: Record<string, string> = { "README.md": `${dir}/README.md` };
  if (kind === "lora_adapters") await nameBase(dir, replace);
  lists.push({ kind, repo, files: await listLocal(`${opt.merge}/${kind}`, { replace }) });
}

// 4. What goes where.
for (const { repo, files } of lists) {
  console.log(`\n${opt.dryRun ? "Would go" : "Goes"} to ${site}/${repo}`);
  showFiles(files);
}
if (opt.dryRun) {
  console.log(
    "\nDry run: nothing was sent. How each file is stored (lfs or regular) is what the hub is likely to choose.\n" +
      "To send them: --dry-run false, with an access token in HF_TOKEN",
  );
  const repositories = lists.map(({ kind, repo, files }) => ({
    kind,
    repo,
    commit: null,
    files: files.map((file) => ({ path: file.path, bytes: file.bytes, sha256: file.sha256, mode: likelyMode(file) })),
  }));
  await finish(repositories, { sent: 0, verified: 0 });
} else {
  // 5. Upload and verify, one repository after the other.
  const repositories = [];
  let sent = 0;
  for (const { kind, repo, files } of lists) {
    let bar: ReturnType<typeof progress> | undefined;
    const result = await uploadFolder(files, {
      repo,
      access,
      isPrivate: opt.private,
      title: `Upload ${kind === "merged_model" ? "merged model" : "LoRA adapter"}`,
      onProgress: ({ done, total }) => (bar ??= progress(repo, total)).tick(done, `${bytes(done)} of ${bytes(total)}`),
    });
    bar?.end();
    const went = result.files.filter(({ state }) => state === "sent");
    const stored = result.files.filter(({ state }) => state === "stored");
    const present = result.files.length - went.length - stored.length;
    console.log(`\n${site}/${repo}/tree/${result.commit}${result.created ? " (new repository)" : ""}`);
    console.log(
      `  ${went.length} files sent (${
        bytes(sum(went))
      }), ${stored.length} already stored and now committed, ${present} already there`,
    );
    if (result.others.length > 0) console.log(`  other files there, left as they are: ${result.others.join(", ")}`);
    console.log(`  verified: size and sha256 of ${result.files.length} of ${files.length} files equal the local ones`);
    sent += sum(went);
    repositories.push({ kind, repo, commit: result.commit, created: result.created, files: result.files });
  }
  await finish(repositories, { sent, verified: repositories.reduce((n, { files }) => n + files.length, 0) });
}

async function finish(
  repositories: readonly { files: readonly { bytes: number }[] }[],
  { sent, verified }: { sent: number; verified: number },
): Promise<void> {
  const files = repositories.flatMap((repository) => repository.files);
  await stage.done({
    numbers: {
      dry_run: opt.dryRun,
      files: files.length,
      bytes: sum(files),
      sent_bytes: sent,
      verified_files: verified,
      repositories,
    },
  });
}

/** The model of a run that trained all weights. This stage has no card for it and does not send it, so a dry run only lists it. */
async function listWhole(model: string): Promise<void> {
  const stage = await beginStage("08_upload", opt, { reads: [model] });
  const files = await listLocal(model);
  stage.clear();
  console.log(
    `\nAll weights were trained, so there is one folder, "${model}", which this stage lists and does not send:`,
  );
  showFiles(files);
  const listed = files.map(({ path, bytes, sha256 }) => ({ path, bytes, sha256 }));
  const numbers = { dry_run: true, files: files.length, bytes: sum(files), sent_bytes: 0, verified_files: 0 };
  await stage.done({ numbers: { ...numbers, repositories: [], model, listed } });
}

function showFiles(files: readonly LocalFile[]): void {
  console.log(table([
    ["file", "size", "sha256", "as"],
    ...files.map((file) => [file.path, bytes(file.bytes), file.sha256.slice(0, 12), likelyMode(file)]),
    ["total", bytes(sum(files)), "", ""],
  ], { header: true, align: "lrll" }));
}

function sum(files: readonly { bytes: number }[]): number {
  return files.reduce((total, file) => total + file.bytes, 0);
}

/** What the cards tell. Training and evaluation count only when they are of the very adapter that was merged. */
function gatherFacts(): CardFacts {
  const config = readConfig(`${opt.merge}/merged_model`);
  const training = readManifest(opt.train);
  const adapters = (list: Manifest["reads"] | undefined) =>
    (list ?? []).filter(({ path }) => path.endsWith("adapter_model.safetensors")).map(({ sha256 }) => sha256);
  const merged = adapters(readManifest(opt.merge)?.reads);
  const ofMerged = (dir: string, list: Manifest["reads"] | undefined) => {
    if (list === undefined) return false;
    const same = adapters(list).some((sha256) => merged.includes(sha256));
    if (!same) console.log(`Left out of the cards: "${dir}" is not about the adapter in "${opt.merge}"`);
    return same;
  };
  const evaluation = readManifest(opt.evaluation);
  const template = told.includes(opt.dataset)
    ? readTemplate(`${opt.dataset}/template.json`)
    : chatTemplate({ template: BLOG_TEMPLATE, system: BLOG_SYSTEM, eos_token: "" });
  return {
    modelRepo: opt.mergedRepo,
    adapterRepo: opt.adapterRepo,
    base: opt.baseModel !== unset ? opt.baseModel : exists(named) ? "" : hubName(named),
    license: opt.license,
    prompt: template.renderPrompt("{question}"),
    parameters: parameterShapes(config).reduce((n, { shape }) => n + shape.reduce((a, b) => a * b, 1), 0),
    dtype: config.dtype,
    lora: {
      r: Number(lora.r),
      lora_alpha: Number(lora.lora_alpha),
      use_rslora: lora.use_rslora === true,
      target_modules: (lora.target_modules as string[]).toSorted(),
    },
    dataset: readManifest(opt.dataset),
    training: ofMerged(opt.train, training?.writes) ? training : undefined,
    evaluation: ofMerged(opt.evaluation, evaluation?.reads) ? evaluation : undefined,
  };
}

/** PEFT finds the base by this name: a path of this machine, or a 4-bit copy, would make the adapter useless elsewhere. */
async function nameBase(dir: string, replace: Record<string, string>): Promise<void> {
  if (facts.base !== "" && named !== facts.base) {
    const renamed = { ...lora, base_model_name_or_path: facts.base };
    await writeAtomic(`${dir}/adapter_config.json`, JSON.stringify(renamed, null, 2)); // PEFT ends without a newline
    replace["adapter_config.json"] = `${dir}/adapter_config.json`;
    console.log(`The adapter's base is called "${facts.base}" there (here it is "${named}")`);
  } else if (facts.base === "") {
    console.log(`The adapter's base is "${named}", which nobody else has: a real upload needs --base-model owner/name`);
  }
}
