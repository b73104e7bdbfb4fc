"""
Lets transformers, PEFT, TRL and PyTorch judge the artifacts in a folder, on the CPU in float32: opens what the stages wrote,
computes the same things again and prints one JSON object a line. oracle.ts prepares the folder and shows what comes out.
"""
import json, logging, math, sys
from pathlib import Path

import datasets, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

heard, listener = [], logging.Handler(logging.WARNING)  # what the libraries complain of
listener.emit = lambda record: heard.append(record.getMessage())
logging.captureWarnings(True)
for library in ("py.warnings", "transformers", "peft", "trl"):
    logging.getLogger(library).addHandler(listener)
transformers.utils.logging.disable_progress_bar(), datasets.disable_progress_bars()
read = lambda path: json.loads(path.read_text())
say = lambda **line: print(json.dumps(line), flush=True)
logits = torch.no_grad()(lambda model, ids: model(input_ids=torch.tensor([ids])).logits[0])


def check(subject, what, measured, bound, of=""):
    say(subject=subject, check=what, measured=float(measured) if math.isfinite(measured) else None, bound=bound, of=of)


def off(ours, theirs):
    """Largest difference of two tensors, in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item() if ours.shape == theirs.shape else math.inf


def differ(ours, theirs):
    """Names of the tensors that are not the same in both."""
    return [key for key in {**ours, **theirs} if key not in ours or key not in theirs or not ours[key].equal(theirs[key])]


def dequantize(tensors, name):
    """Makes one of the tensors of a 4-bit weight, by bitsandbytes' formula; tells what its loader would not take."""
    part = {key.removeprefix(name): tensors.pop(key) for key in [*tensors] if key.startswith(name)}
    text = bytes(part.pop(".quant_state.bitsandbytes__nf4").tolist()).decode()
    state, blocks = json.loads(text), part[""].numel() // 32
    form = {"": ["uint8", 32 * blocks, 1], ".absmax": ["uint8", blocks], ".nested_absmax": ["float32", -(-blocks // 256)]}
    form |= {".quant_map": ["float32", 16], ".nested_quant_map": ["float32", 256]}
    fits = {key: [str(tensor.dtype)[6:], *tensor.shape] for key, tensor in part.items()} == form
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state["nested_offset"]}
    plain = {"quant_type": "nf4", "blocksize": 64, "dtype": state["dtype"], "shape": state["shape"]}
    scales = part[".nested_quant_map"][part[".absmax"].int()] * part[".nested_absmax"].repeat_interleave(256)[:blocks]
    codes = torch.stack([part[""] >> 4, part[""] & 15], 1).flatten().int()
    weight = part[".quant_map"][codes] * (scales + state["nested_offset"]).repeat_interleave(64)
    tensors[name] = weight.view(state["shape"]).to(getattr(torch, state["dtype"]))
    return [] if fits and text == json.dumps(plain | nested) else [f"{name} {text}"]


def open_model(work, key):
    """The model of a folder, dense where it is in 4 bit, with the adapter of the folder after the plus sign; complaints."""
    base, _, adapter = key.partition("+")
    heard.clear()
    if base == "02_qlora":
        tensors, config = load_file(work / base / "model.safetensors"), LlamaConfig.from_pretrained(work / base)
        about = config.quantization_config
        wrong = [] if (about["quant_method"], about["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4") else [about]
        wrong += sum([dequantize(tensors, name) for name in [*tensors] if name.endswith("_proj.weight")], [])
        del config.quantization_config
        model = LlamaForCausalLM(config)
        wrong += [key for keys in model.load_state_dict(tensors, strict=False) for key in keys if key != "lm_head.weight"]
    else:
        model, info = LlamaForCausalLM.from_pretrained(work / base, output_loading_info=True)
        wrong = [f"{kind}: {key}" for kind, keys in info.items() for key in keys]
    if adapter:
        model = PeftModel.from_pretrained(model, work / adapter, is_trainable=True)
        wrong += differ(get_peft_model_state_dict(model), load_file(work / adapter / "adapter_model.safetensors"))
    return model.eval(), heard + wrong


class Adam8bit(torch.optim.Optimizer):
    """bitsandbytes' CUDA kernel in float32: moments of 4,096 and more elements as 8-bit codes, decay after the step."""

    def table(self, signed):
        edges = [torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1) for i in range(7)]
        means = torch.cat([10 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(edges)])
        return torch.cat([means, -means if signed else means[:0], torch.tensor([0.0, 1.0])]).sort().values

    def coded(self, moment, table):
        """What its codes keep of a moment: the nearest entry, of two the one with the even code, never of another sign."""
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
            kept = (m, v) if p.numel() < 4096 else (self.coded(m, self.table(True)), self.coded(v, self.table(False)))
            self.state[p]["moments"] = t + 1, *kept


def batches_of(rows, size, order):
    """Rows side by side, `size` at a time, as TRL's collator lays them; without a cache transformers isolates documents."""
    for which in (order[i : i + size] for i in range(0, len(order), size)):
        cuts = [slice(*rows["row_offsets"][r : r + 2].tolist()) for r in which]
        batch = {key: torch.cat([rows[key][cut] for cut in cuts])[None].long() for key in rows if key != "row_offsets"}
        yield len(which), batch | {"use_cache": False}


def replay(work, name, model):
    """A training run again: rows and learning rates from its log, all else computed here. Gives pairs, ours first."""
    flags, log = read(work / name / "manifest.json")["flags"], (work / name / "log.jsonl").read_text().splitlines()
    train, held = (load_file(work / f"03_dataset/{split}.safetensors") for split in ("train", "validation"))
    size, order, steps = flags["batchSize"], [], flags["maxSteps"]
    learn = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learn if p.ndim == d], "weight_decay": flags["weightDecay"] * (d > 1)} for d in (1, 2)]
    options = {"lr": flags["learningRate"], "betas": (flags["beta1"], flags["beta2"]), "eps": flags["eps"]}
    optimizer = torch.optim.AdamW(groups, **options) if flags["optimizer"] == "adamw" else Adam8bit(groups, options)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(flags["warmupRatio"] * steps), steps)
    for line in map(json.loads, log):
        if "eval_loss" in line:
            every = range(len(held["row_offsets"]) - 1)
            total = sum(n * model(**batch).loss.item() for n, batch in batches_of(held, size, every))
            yield line, {"eval_loss": total / len(every)}  # means of batches, weighted by their rows
            continue
        if not order:  # of the epoch that begins
            generator = torch.Generator().manual_seed(flags["seed"] + int(line["epoch"]))
            order = torch.randperm(len(train["row_offsets"]) - 1, generator=generator).tolist()
        rows, cut, rate = sum(line["rows"], []), size * flags["gradientAccumulation"], optimizer.param_groups[0]["lr"]
        batches = [batch for _, batch in batches_of(train, size, rows)]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = sum(model(**batch, num_items_in_batch=tokens).loss for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learn, flags["maxGradNorm"]).item()
        theirs = {"loss": loss.item(), "grad_norm": norm, "learning_rate": rate, "tokens": tokens, "rows": order[:cut]}
        yield {**line, "rows": rows}, theirs
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        order = order[cut:]
    trained = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    saved = load_file(next((work / name).glob("[am]*/*model.safetensors")))
    apart = torch.cat([(trained[key] - tensor).abs().flatten() for key, tensor in saved.items()])
    yield {"mean": apart.mean().item(), "largest": apart.max().item(), "values": len(apart)}, {}


def answers(model, told):
    """Greedy ids for each prompt, and at each of them how far the likeliest token is above the next."""
    for prompt in told["prompts"]:
        options = {"max_new_tokens": told["max_new_tokens"], "repetition_penalty": told["penalty"], "do_sample": False}
        out = model.generate(torch.tensor([prompt]), **options, output_scores=True, return_dict_in_generate=True)
        margins = [-scores[0].topk(2).values.diff().item() for scores in out.scores]
        yield {"ids": out.sequences[0, len(prompt) :].tolist(), "margins": margins}


def judge(work):
    told, ours, seen = read(work / "told.json"), load_file(work / "logits.safetensors"), {}
    for key in told["models"]:
        model, complaints = open_model(work, key)
        seen[key] = logits(model, told["ids"])
        check(key, "opens: " + ("; ".join(map(str, complaints)) or "no warning, every key fits"), len(complaints), 0)
        check(key, "logits", off(ours[key], seen[key]), 1e-5, " x ".join(map(str, seen[key].shape)))
    tokenizer, chat = AutoTokenizer.from_pretrained(work / "01_convert"), read(work / "03_dataset/template.json")["template"]
    for split, messages in told["messages"].items():
        texts = tokenizer.apply_chat_template(messages, chat_template=chat, tokenize=False)
        ids = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
        packed = list(pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), told["max_seq_length"], "bfd"))
        theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packed)
        ends = torch.tensor([0] + [len(row["input_ids"]) for row in packed]).cumsum(0)
        theirs = {key: tensor[0].int() for key, tensor in theirs.items()} | {"row_offsets": ends}
        wrong, of = differ(load_file(work / f"03_dataset/{split}.safetensors"), theirs), f"{sum(map(len, ids)):,} tokens"
        check("03_dataset", f"{split} rows from the texts", len(wrong), 0, f"{len(ids)} texts, {of}")
    numbers, (base, _) = read(work / "01_convert/manifest.json")["numbers"], open_model(work, "01_convert")
    edges = torch.tensor([numbers["logits_min"], numbers["logits_max"]])
    apart = (torch.stack(logits(base, numbers["input_ids"]).aminmax()) - edges).abs().max()
    check("01_convert", "logits_min, logits_max of its manifest", apart, 1e-4, f"{len(numbers['input_ids'])} tokens")
    transformers.set_seed(read(work / "04_lora/manifest.json")["flags"]["seed"])
    fresh = get_peft_model_state_dict(get_peft_model(base, LoraConfig.from_pretrained(work / "04_lora")))
    wrong = differ(load_file(work / "04_lora/adapter_model.safetensors"), fresh)
    check("04_lora", "PEFT's adapter of that seed, bit for bit", len(wrong), 0, f"{len(fresh)} tensors")
    merged, adapted = "07_merge/merged_model", "01_convert+07_merge/lora_adapters"
    check(merged, "logits of base with adapter", off(seen[merged], seen[adapted]), 1e-5)
    theirs, (model, _) = open_model(work, adapted)[0].merge_and_unload().state_dict(), open_model(work, merged)
    apart = max(off(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    check(merged, "weights of merge_and_unload", apart, 1e-6, f"{len(theirs)} tensors")
    for group in told["answers"]:
        say(asked=group, theirs=list(answers(open_model(work, group["model"])[0], group)))
    for name, key in told["runs"].items():
        for ours, theirs in replay(work, name, open_model(work, key)[0]):
            say(run=name, ours=ours, theirs=theirs)


judge(Path(sys.argv[1]))
