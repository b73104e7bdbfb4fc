"""
Lets transformers, PEFT, TRL and PyTorch judge the artifacts in a folder, on the CPU in float32: it opens what the stages wrote,
computes the same things again and prints one JSON object a line. oracle.ts prepares the folder and shows what comes out.

    python oracle.py versions
    python oracle.py judge FOLDER
"""
import itertools, json, logging, math, sys, warnings
from importlib.metadata import version
from pathlib import Path

import datasets, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

LIBRARIES = ["torch", "transformers", "peft", "trl", "datasets", "tokenizers", "safetensors"]
heard, listener = [], logging.Handler(logging.WARNING)  # what the libraries complain of
listener.emit = lambda record: heard.append(record.getMessage())


def say(**line):
    print(json.dumps(line), flush=True)


def check(subject, what, measured, bound, of=""):
    say(subject=subject, check=what, of=of, measured=float(measured) if math.isfinite(measured) else None, bound=bound)


def opens(subject, wrong=()):
    """Counts what the libraries complained of since the last time and what else is wrong, and prints it on stderr."""
    for line in (lines := [*heard, *wrong]):
        print(f"{subject}: {line}", file=sys.stderr)
    heard.clear()
    check(subject, "opens", len(lines), 0, "warnings, wrong or missing keys")


def read(path):
    return json.loads(path.read_text())


def off(ours, theirs):
    """Largest difference of two tensors, in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item() if ours.shape == theirs.shape else math.inf


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0]


def dequantize(tensors, name):
    """The weight by bitsandbytes' formula (functional.py, dequantize_4bit), and what its loader would refuse."""
    part = {key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)}
    text = bytes(part.pop(".quant_state.bitsandbytes__nf4").tolist()).decode()
    state, count = json.loads(text), 2 * part[""].numel()
    wanted = {"": (torch.uint8, [count // 2, 1]), ".absmax": (torch.uint8, [count // 64]), ".quant_map": (torch.float32, [16]),
              ".nested_absmax": (torch.float32, [math.ceil(count / 64 / 256)]), ".nested_quant_map": (torch.float32, [256])}
    order = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    fits = {key: (t.dtype, list(t.shape)) for key, t in part.items()} == wanted and list(state) == order
    fits = fits and json.dumps(state) == text and (state["quant_type"], state["nested_dtype"]) == ("nf4", "float32")
    nested = part[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: count // 64]
    scales = part[".nested_quant_map"][part[".absmax"].int()] * nested + state["nested_offset"]
    codes = torch.stack([part[""] >> 4, part[""] & 15], 1).flatten().int()
    weight = part[".quant_map"][codes] * scales.repeat_interleave(state["blocksize"])
    return weight.view(state["shape"]).to(getattr(torch, state["dtype"])), [] if fits else [f"{name}: {wanted} {text}"]


def open_model(work, key):
    """The model of a folder, dense where the folder has it in 4 bit, with the adapter of the folder behind a plus sign."""
    base, _, adapter = key.partition("+")
    heard.clear()
    if base == "02_qlora":
        tensors, wrong, config = load_file(work / base / "model.safetensors"), [], LlamaConfig.from_pretrained(work / base)
        if (config.quantization_config["quant_method"], config.quantization_config["bnb_4bit_quant_type"]) != ("bitsandbytes", "nf4"):
            wrong.append(config.quantization_config)
        del config.quantization_config
        model = LlamaForCausalLM(config)
        for name in [key for key in tensors if key.endswith("_proj.weight")]:
            weight, refused = dequantize(tensors, name)
            wrong += refused
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)} | {name: weight}
        wrong += [key for keys in model.load_state_dict(tensors, strict=False) for key in keys if key != "lm_head.weight"]
    else:
        model, info = LlamaForCausalLM.from_pretrained(work / base, output_loading_info=True)
        wrong = [f"{kind}: {key}" for kind, keys in info.items() for key in keys]
    if adapter:
        model = PeftModel.from_pretrained(model, work / adapter, is_trainable=True)
        loaded, stored = get_peft_model_state_dict(model), load_file(work / adapter / "adapter_model.safetensors")
        wrong += [k for k in {*loaded, *stored} if k not in loaded or k not in stored or not loaded[k].equal(stored[k])]
    return model.eval(), wrong


class Adam8bit(torch.optim.Optimizer):
    """bitsandbytes' CUDA kernel in float32: moments of tensors from 4,096 elements on as 8-bit codes, decay after the step."""

    @staticmethod
    def table(signed):
        edges = [torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1) for i in range(7)]
        means = torch.cat([10 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(edges)])
        return torch.cat([means, -means if signed else means[:0], torch.tensor([0.0, 1.0])]).sort().values

    @staticmethod
    def coded(moment, table):
        """What is left of a moment in 8 bit: the nearest entry, of two the one with the even code, never with another sign."""
        if moment.numel() < 4096:
            return moment
        blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % 256)).view(-1, 256)
        top, middles = blocks.abs().amax(1, keepdim=True), (table[1:] + table[:-1]) * 0.5
        x = (blocks / top).nan_to_num(0)
        codes = torch.bucketize(x, middles)
        codes += (codes % 2 == 1) & (x == middles[codes.clamp(max=254)])
        codes += (table[codes].signbit() != blocks.signbit()) * torch.where(blocks > 0, 1, -1)
        return (table[codes % 256] * top).flatten()[: moment.numel()].view_as(moment)

    @torch.no_grad()
    def step(self):
        for group, p in [(group, p) for group in self.param_groups for p in group["params"]]:
            (b1, b2), lr, (t, m, v) = torch.tensor(group["betas"]), group["lr"], self.state[p].get("moments", (0, 0, 0))
            m, v = m * b1 + (1 - b1) * p.grad, v * b2 + (1 - b2) * p.grad * p.grad
            c1, c2 = 1 - b1.item() ** (t + 1), math.sqrt(1 - b2.item() ** (t + 1))
            p -= lr * c2 / c1 * (m / (v.sqrt() + c2 * group["eps"]))
            p *= 1 - lr * group["weight_decay"]
            self.state[p]["moments"] = t + 1, self.coded(m, self.table(True)), self.coded(v, self.table(False))


def micro_batch(rows, which):
    """Dataset rows side by side, as TRL's collator lays them; without a cache transformers keeps their documents apart."""
    cuts = [slice(*rows["row_offsets"][r : r + 2].tolist()) for r in which]
    batch = {key: torch.cat([rows[key][cut] for cut in cuts])[None].long() for key in ("input_ids", "position_ids", "labels")}
    return batch | {"use_cache": False}


def replay(work, name, model):
    """A training run again: rows and learning rates from its log, all else computed here."""
    flags, log = read(work / name / "manifest.json")["flags"], (work / name / "log.jsonl").read_text().splitlines()
    train, held = (load_file(work / f"03_dataset/{split}.safetensors") for split in ("train", "validation"))
    size, accumulation, total = flags["batchSize"], flags["gradientAccumulation"], flags["maxSteps"]
    learn = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learn if p.ndim > 1]}, {"params": [p for p in learn if p.ndim < 2], "weight_decay": 0.0}]
    options = {"lr": flags["learningRate"], "betas": (flags["beta1"], flags["beta2"]), "eps": flags["eps"]}
    kind = torch.optim.AdamW if flags["optimizer"] == "adamw" else Adam8bit
    optimizer = kind(groups, **options, weight_decay=flags["weightDecay"])
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(flags["warmupRatio"] * total), total)

    def batches_of(rows, order):
        return [order[i : i + size] for i in range(0, len(rows["row_offsets"]) - 1, size)]

    def order_of(epoch):
        generator = torch.Generator().manual_seed(flags["seed"] + epoch)
        batches = batches_of(train, torch.randperm(len(train["row_offsets"]) - 1, generator=generator).tolist())
        return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]

    expected, evaluations, updates, wrong, rates = itertools.chain.from_iterable(map(order_of, itertools.count())), [], [], 0, []
    for line in map(json.loads, log):
        if "eval_loss" in line:
            rows = batches_of(held, range(len(held["row_offsets"]) - 1))
            with torch.no_grad():
                theirs = sum(model(**micro_batch(held, r)).loss.item() * len(r) for r in rows) / sum(map(len, rows))
            evaluations.append(abs(line["eval_loss"] / theirs - 1))
            continue
        batches = [micro_batch(train, rows) for rows in line["rows"]]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        wrong += line["rows"] != next(expected) or line["tokens"] != tokens
        loss = sum(model(**batch, num_items_in_batch=tokens).loss for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learn, flags["maxGradNorm"])
        rates.append(abs(optimizer.param_groups[0]["lr"] - line["learning_rate"]))
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        updates.append([line["step"], line["loss"], loss.item(), line["grad_norm"], norm.item()])
    adapter = isinstance(model, PeftModel)
    trained, file = (get_peft_model_state_dict(model), "adapter/adapter_model") if adapter else (model.state_dict(), "model/model")
    saved = load_file(work / name / f"{file}.safetensors")
    differences = torch.cat([(trained[key] - tensor).abs().flatten() for key, tensor in saved.items()])
    say(replay=name, updates=updates)
    check(name, "rows, labelled tokens", wrong, 0, f"{total} updates")
    check(name, "learning rates, absolute", max(rates), 1e-12, f"{total} updates")
    check(name, "losses", max(abs(row[1] / row[2] - 1) for row in updates), 2e-5, f"{total} updates")
    check(name, "gradient norms", max(abs(row[3] / row[4] - 1) for row in updates), 2e-5, f"{total} updates")
    check(name, "eval_loss", max(evaluations), 2e-5, f"{len(evaluations)} evaluations")
    check(name, "final parameters, mean", differences.mean(), 1e-6 if kind != Adam8bit else 5e-6, f"{len(differences):,} values")
    check(name, "final parameters, largest", differences.max(), 1e-4 if kind != Adam8bit else None, f"{len(differences):,} values")


def judge_dataset(work, told):
    tokenizer, template = AutoTokenizer.from_pretrained(work / "01_convert"), read(work / "03_dataset/template.json")
    for split, records in told["records"].items():
        ids = []
        for record in records:
            turns = {"system": template["system"], "user": record["question"], "assistant": record["answer"]}
            turns = [{"role": role, "content": content} for role, content in turns.items()]
            text = tokenizer.apply_chat_template(turns, chat_template=template["template"], tokenize=False)
            ids.append(tokenizer(text + tokenizer.eos_token)["input_ids"])
        packed = list(pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), told["max_seq_length"], "bfd"))
        theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packed)
        ours = load_file(work / f"03_dataset/{split}.safetensors")
        differ = sum((ours[key] != theirs[key][0]).sum() for key in theirs) if len(ours["labels"]) == theirs["labels"].numel() else math.inf
        differ += ours["row_offsets"].diff().tolist() != [len(row["input_ids"]) for row in packed]
        check("03_dataset", f"{split}: ids, positions, labels, rows", differ, 0, f"{len(records)} texts, {sum(map(len, ids)):,} tokens")
