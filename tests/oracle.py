"""
Lets transformers, PEFT, TRL and PyTorch judge a folder of artifacts, on the CPU in float32: it opens what the stages wrote,
computes the same things again and prints one JSON object a line. Which difference is small enough is for oracle.ts to say.

    python oracle.py versions
    python oracle.py judge FOLDER
"""
import contextlib, itertools, json, logging, math, sys, warnings
from importlib.metadata import version
from pathlib import Path

import datasets, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

LIBRARIES = ["torch", "transformers", "peft", "trl", "datasets", "tokenizers", "safetensors"]


def say(**line):
    print(json.dumps(line), flush=True)


def check(name, measured, bound, of=""):
    say(check=name, of=of, measured=float(measured) if math.isfinite(measured) else None, bound=bound)


def off(ours, theirs):
    """Largest difference of two tensors, in parts of the largest value."""
    if ours.shape != theirs.shape:
        return math.inf
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()


@contextlib.contextmanager
def complaints():
    """A list of all that the libraries warn of meanwhile."""
    heard, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: heard.append(str(message))
        for name in LIBRARIES:
            logging.getLogger(name).addHandler(handler)
        yield heard
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(handler)


def read(path):
    return json.loads(Path(path).read_text())


def opens(what, heard):
    """Passes when nothing was heard; what was heard goes to stderr."""
    for line in heard:
        print(f"{what}: {line}", file=sys.stderr)
    check(what, len(heard), 0, "warnings, missing and unexpected keys")


def base_model(folder, what=None):
    with complaints() as heard:
        model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    if what:
        opens(what, heard + [f"{kind}: {key}" for kind, keys in info.items() for key in keys])
    return model.eval()


def with_adapter(base, folder, what=None, trainable=False):
    with complaints() as heard:
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    loaded, stored = get_peft_model_state_dict(model), load_file(folder / "adapter_model.safetensors")
    differ = [k for k in {*loaded, *stored} if k not in loaded or k not in stored or not loaded[k].equal(stored[k])]
    if what:
        opens(what, heard + [f"tensor {key} is not in the model as in the file" for key in differ])
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0]


def dequantize(tensors, name):
    """The weight `name` by bitsandbytes' formula (functional.py, dequantize_4bit), and a list of what its files would refuse."""
    part = lambda key: tensors.get(f"{name}{key}", torch.empty(0))
    text = bytes(part(".quant_state.bitsandbytes__nf4").tolist()).decode()
    state, packed = json.loads(text), part("").flatten()
    count, blocks = math.prod(state["shape"]), math.ceil(math.prod(state["shape"]) / state["blocksize"])
    wanted = {"": (torch.uint8, [math.ceil(count / 2), 1]), ".absmax": (torch.uint8, [blocks]), ".quant_map": (torch.float32, [16]),
              ".nested_absmax": (torch.float32, [math.ceil(blocks / 256)]), ".nested_quant_map": (torch.float32, [256])}
    wrong = [f"{name}{k}" for k, (dtype, shape) in wanted.items() if (part(k).dtype, list(part(k).shape)) != (dtype, shape)]
    keys = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    if list(state) != keys or text != json.dumps(state) or state["quant_type"] != "nf4" or state["nested_dtype"] != "float32":
        wrong.append(f"{name}: {text}")
    scales = part(".nested_absmax").repeat_interleave(state["nested_blocksize"])[:blocks]
    scales = part(".nested_quant_map")[part(".absmax").int()] * scales + state["nested_offset"]
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    values = part(".quant_map")[codes] * scales.repeat_interleave(state["blocksize"])[: len(codes)]
    return values[:count].view(state["shape"]).to(getattr(torch, state["dtype"])), wrong


def quantized_model(folder, base):
    """The 4-bit model of `folder` as a dense one, after a look at its files."""
    tensors, dense = load_file(folder / "model.safetensors"), {**load_file(base / "model.safetensors")}
    wrong, known = [], set()
    for name, weight in dense.items():
        if name.endswith("_proj.weight"):
            dense[name], refused = dequantize(tensors, name)
            wrong += refused + ([] if dense[name].shape == weight.shape else [name])
        elif not weight.equal(tensors[name]):
            wrong.append(name)
        known |= {key for key in tensors if key == name or key.startswith(f"{name}.")}
    config = LlamaConfig.from_pretrained(folder)
    if config.quantization_config["bnb_4bit_quant_type"] != "nf4" or config.quantization_config["quant_method"] != "bitsandbytes":
        wrong.append("quantization_config")
    for line in wrong := wrong + [*set(tensors) - known]:
        print(f"02 in 4 bit: {line}", file=sys.stderr)
    check("02 in 4 bit: keys, dtypes, shapes, states", len(wrong), 0, f"{len(tensors)} tensors that differ from bitsandbytes'")
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(dense, strict=False)
    return model.eval()


class Adam8bit(torch.optim.Optimizer):
    """bitsandbytes' CUDA kernel in float32: moments of tensors from 4,096 elements on as 8-bit codes, decay after the step."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)
        self.maps, self.t = [self.dynamic_map(signed) for signed in (True, False)], 0

    @staticmethod
    def dynamic_map(signed):
        values = [torch.tensor([0.0, 1.0])]
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1)
            means = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
            values += [means, -means] if signed else [means]
        return torch.cat(values).sort().values

    def stored(self, moment, table):
        """A moment as it comes back from its codes: nearest entry, ties to the even code, the sign kept."""
        if moment.numel() < 4096:
            return moment
        blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % 256)).view(-1, 256)
        top = blocks.abs().amax(1, keepdim=True)
        x = (blocks / top).nan_to_num(0)
        middles = (table[1:] + table[:-1]) * 0.5
        codes = torch.bucketize(x, middles)
        codes += (codes % 2 == 1) & (x == middles[codes.clamp(max=254)])
        flipped = table[codes].signbit() != blocks.signbit()
        codes = (codes + flipped * torch.where(blocks > 0, 1, -1)) % 256
        return (table[codes] * top).flatten()[: moment.numel()].view(moment.shape)

    @torch.no_grad()
    def step(self):
        self.t += 1
        for group in self.param_groups:
            (b1, b2), lr = torch.tensor(group["betas"]), group["lr"]
            c1, c2 = 1 - b1.item() ** self.t, math.sqrt(1 - b2.item() ** self.t)
            for p in group["params"]:
                m, v = self.state[p].get("moments", (0, 0))
                m, v = m * b1 + (1 - b1) * p.grad, v * b2 + (1 - b2) * p.grad * p.grad
                p -= lr * c2 / c1 * (m / (v.sqrt() + c2 * group["eps"]))
                p *= 1 - lr * group["weight_decay"]
                self.state[p]["moments"] = [self.stored(x, table) for x, table in zip((m, v), self.maps)]


def micro_batch(rows, which):
    """Dataset rows side by side: what TRL's collator makes of them."""
    cuts = [slice(*rows["row_offsets"][r : r + 2].tolist()) for r in which]
    return {key: torch.cat([rows[key][cut] for cut in cuts])[None].long() for key in ("input_ids", "position_ids", "labels")}


def loss(model, batch, items=None):
    """Mean loss over `items` labelled tokens. Without a cache transformers keeps the documents apart by their positions."""
    items = {} if items is None else {"num_items_in_batch": items}
    return model(**batch, **items, use_cache=False).loss


def labelled(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def replay(name, work, model):
    """The run again: rows and learning rates from its log, all else computed here."""
    folder, flags = work / name, read(work / name / "manifest.json")["flags"]
    train, validation = (load_file(work / f"03_dataset/{split}.safetensors") for split in ("train", "validation"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    updates, size, rows = [line for line in log if "loss" in line], flags["batchSize"], len(train["row_offsets"]) - 1
    learn = [p for p in model.parameters() if p.requires_grad]
    decay = {True: flags["weightDecay"], False: 0.0}  # not of norms
    groups = [{"params": [p for p in learn if (p.ndim > 1) == d], "weight_decay": decay[d]} for d in decay]
    kind = {"adamw": torch.optim.AdamW, "adamw_8bit": Adam8bit}[flags["optimizer"]]
    optimizer = kind(groups, lr=flags["learningRate"], betas=(flags["beta1"], flags["beta2"]), eps=flags["eps"], weight_decay=0.0)
    warmup = math.ceil(flags["warmupRatio"] * len(updates))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(updates))

    def order():
        for epoch in itertools.count():
            shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(flags["seed"] + epoch)).tolist()
            batches = [shuffled[i : i + size] for i in range(0, rows, size)]
            yield from (batches[i : i + flags["gradientAccumulation"]] for i in range(0, len(batches), flags["gradientAccumulation"]))

    expected, evals, table, wrong, rate_off = order(), [], [], 0, 0.0
    for line in log:
        if "eval_loss" in line:
            held = [range(i, min(i + size, len(validation["row_offsets"]) - 1)) for i in range(0, len(validation["row_offsets"]) - 1, size)]
            with torch.no_grad():
                total = sum(loss(model, micro_batch(validation, which)).item() * len(which) for which in held)
            evals.append(abs(line["eval_loss"] * sum(map(len, held)) / total - 1))
            continue
        batches = [micro_batch(train, which) for which in line["rows"]]
        items = sum(map(labelled, batches))
        wrong += line["rows"] != next(expected) or line["tokens"] != items
        losses = [loss(model, batch, items) for batch in batches]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(learn, flags["maxGradNorm"] or math.inf).item()
        rate_off = max(rate_off, abs(optimizer.param_groups[0]["lr"] - line["learning_rate"]))
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        table.append([line["step"], line["loss"], sum(losses).item(), line["grad_norm"], norm])
    parts = lambda column: max(abs(row[column] / row[column + 1] - 1) for row in table)
    say(replay=name, rows=[row for row in table if row[0] in (1, len(table)) or row[0] % 10 == 0 or len(table) < 10])
    of = f"{len(updates)} updates"
    check(f"{name}: rows and labelled tokens of each update", wrong, 0, of)
    check(f"{name}: learning rates, absolute", rate_off, 1e-12, of)
    check(f"{name}: losses", parts(1), 2e-5, of)
    check(f"{name}: gradient norms", parts(3), 2e-5, of)
    check(f"{name}: eval_loss", max(evals), 2e-5, f"{len(evals)} evaluations")
    full = flags_mode = None
