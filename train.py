"""
One run: from a base GPT to an up-scaled, further trained checkpoint.

    python train.py --upscale midus                          trains a tiny base first; no download
    python train.py --upscale midus --dataset wikitext103    GPT-2 124M on WikiText-103, one GPU
    python train.py --upscale none --out base.pt             the tiny base alone

The base is the model before the new blocks: GPT-2 by name, one of your checkpoints, or `scratch`: a
small model of our own, which is trained first, in a run like any other, and kept in the data
folder. A run knows two texts. It trains on the *new* one. The *old* one, which its base was trained
on, is only measured: what is forgotten of it belongs to the price.

One rule for every run: to go on with it, repeat its command. If --out is there, what is asked is
compared with what that file was begun with. If it is the same, the run goes on where it was, or
prints its table again if it is finished. If not, you are told what differs, and nothing happens.

In order: settings, optimizer and schedule, one step, the loop, what continues, and the story (run
and main). Shape names: see hml.py.
"""

import hashlib
import math
import os
import time
from argparse import BooleanOptionalAction, Namespace
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from data import DATASETS, WIKITEXT, Split, get_batch, load_dataset, load_tokenizer, vocab_size
from eval import continue_text, evaluate, print_table, sum_nll
from model import (
    GPT,
    PRETRAINED,
    GPTConfig,
    load_checkpoint,
    open_model,
    save_checkpoint,
    weights_sha256,
)
from upscale import METHODS, add_flags, given_options, set_trainable, summary, upscale

# ---- Settings ------------------------------------------------------------------------------------
# Defaults by the width of the base: gpt2 above 512. Those of gpt2 were never tried.
PRESETS = {
    "tiny": {
        "n_layer": 4,  # these six are of a base from scratch
        "n_head": 4,
        "n_embd": 128,
        "tokenizer": "bytes",
        "base_tokens": 1_600_000,
        "base_lr": 3e-3,
        "block_size": 64,
        "batch_size": 16,
        "grad_accum": 1,
        "tokens": 800_000,
        "lr": 3e-3,
        "memory_lr": 1e-1,
    },
    "gpt2": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "tokenizer": "gpt2",
        "base_tokens": 200_000_000,
        "base_lr": 6e-4,
        "block_size": 1024,
        "batch_size": 32,
        "grad_accum": 8,
        "tokens": None,  # one epoch
        "lr": 2e-4,
        "memory_lr": 1e-2,
    },
}

# What is known of a base before anything is downloaded or trained: its model and config, or None,
# and what its file says besides.
Base = namedtuple("Base", ("name", "model", "config", "info"))


def find_base(name: str) -> Base:
    if name == "scratch":
        return Base(name, None, None, {"dataset": "pydocs"})
    if name in PRETRAINED:
        return Base(name, None, PRETRAINED[name], {"tokenizer": "gpt2"})
    model, info = open_model(name)
    return Base(name, model, model.config, info)


def parse_arguments(words: list[str] | None = None) -> tuple[Namespace, Base]:
    """The settings of a run, and its base. words: None reads those of the command line.

    What is None depends on more than the flags: run() and for_this_machine() fill it in.
    """
    whole = common.whole_number
    real = common.real_number

    # The base decides which preset the defaults come from, so it is looked at first.
    first = common.Parser(add_help=False)
    for name in ("--base", "--dataset", "--tokens", "--lr"):
        first.add_argument(name)
    first.add_argument("--upscale", default="none")
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--n_embd", type=whole, default=128)
    known, _ = first.parse_known_args(words)
    base = find_base(known.base or ("gpt2" if known.dataset in WIKITEXT else "scratch"))
    if base.name == "scratch" and known.upscale == "none":
        if known.dataset or known.tokens or known.lr:
            flags = "--old_dataset, --base_tokens and --base_lr"
            raise ValueError(f"--upscale none from scratch makes a base: its flags are {flags}")
    width = base.config.n_embd if base.config else known.n_embd
    defaults = dict(PRESETS[known.preset or ("gpt2" if width > 512 else "tiny")])

    # What a base has is a default, too. Published weights do not say what they have read.
    if base.config:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            defaults[name] = getattr(base.config, name)
        defaults["tokenizer"] = base.info["tokenizer"]
    defaults["old_dataset"] = base.info.get("dataset")
    defaults["dataset"] = "pycode" if defaults["old_dataset"] else "wikitext103"

    # What is trained, and on what.
    parser = common.Parser("Train a GPT, or up-scale one and train it on. Repeat it to go on.")
    parser.set_defaults(**defaults)
    default = "(default %(default)s)"
    add = parser.add_argument_group("what").add_argument
    methods = ("none", *METHODS)
    add("--upscale", choices=methods, default="none", help=f"how it becomes deeper {default}")
    add("--base", help="scratch (default), gpt2 (default for wikitext), gpt2-medium, ..., a file")
    texts = f"{', '.join(DATASETS)}, or a folder with train.txt, valid.txt and test.txt"
    add("--dataset", help=f"the new text, to train on {default}: {texts}")
    add("--old_dataset", help=f"the text that the base knows {default}")
    add("--tokenizer", help=f"bytes, gpt2, or gpt2:N, its first N merges {default}")
    add("--train", help="new blocks, all, or blocks from 1: 2,4 (default: as the method's authors)")
    add("--preset", choices=PRESETS, help="sizes and rates (default: by the base's width)")

    # The shape of a base from scratch, its own training, and what is put between its blocks.
    add = parser.add_argument_group("a base from scratch").add_argument
    add("--n_layer", type=whole, help=f"transformer blocks {default}")
    add("--n_head", type=whole, help=f"attention heads {default}")
    add("--n_embd", type=whole, help=f"width; a multiple of n_head {default}")
    add("--base_tokens", type=whole, help=f"training tokens of the base {default}")
    add("--base_lr", type=real, help=f"peak learning rate of the base {default}")
    add_flags(parser)

    # How it is trained. The rate rises for `warmup` steps, then falls to a tenth.
    add = parser.add_argument_group("training").add_argument
    add("--tokens", type=whole, help=f"training tokens {default}; None: one epoch")
    add("--block_size", type=whole, help=f"tokens in a sequence {default}")
    add("--batch_size", type=whole, help=f"sequences in an optimizer step {default}")
    add("--lr", type=real, help=f"peak learning rate {default}")
    add("--memory_lr", type=real, help=f"peak learning rate of memory banks {default}")
    decay = "of matrices, never of banks"
    add("--weight_decay", type=real, default=0.1, help=f"{decay} {default}")
    add("--warmup", type=int, help="steps of rising rate (default 5%% of all)")
    add("--eval_every", type=whole, help="steps between validations (default 10%% of all)")
    add("--save_every", type=whole, help="steps between checkpoints (default 10%% of all)")
    seed = "of new weights and of the data's order"
    add("--seed", type=int, default=0, help=f"{seed} {default}")

    # What changes only rounding: a repeated command may say other things here.
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="of autocast (default: bfloat16 where that is fast)")
    add(
        "--compile", action=BooleanOptionalAction, help="the model (default: on a GPU, with Triton)"
    )
    add("--threads", type=whole, help="of the CPU (default: 1 up to a width of 128)")
    parts = "parts of a step's batch, shared among processes; more need less memory"
    add("--grad_accum", type=whole, help=f"{parts} {default}")
    add("--data_dir", default="data", help=f"of downloads, caches and bases {default}")

    add = parser.add_argument_group("files").add_argument
    out = common.new_file(".pt")
    add("--out", type=out, default="ckpt.pt", help=f"the checkpoint {default}")
    add("--overwrite", action="store_true", help="replace --out if it is of other settings")
    settings = parser.parse_args(words)
    settings.options = given_options(settings)
    if settings.train is None:
        method = METHODS.get(settings.upscale)
        settings.train = method.train if method else "all"
    return settings, base


def makes_a_base(settings: Namespace, base: Base) -> bool:
    return base.name == "scratch" and settings.upscale == "none"


def for_this_machine(settings: Namespace, device: torch.device) -> None:
    """Fills in what the device and the number of processes decide."""
    if settings.dtype is None:
        settings.dtype = "bfloat16" if common.has_bf16(device) else "float32"
    if settings.compile is None:
        settings.compile = device.type == "cuda" and find_spec("triton") is not None
    if settings.threads is None:
        settings.threads = common.threads_for(settings.n_embd)
    settings.grad_accum = max(1, settings.grad_accum // common.world_size())
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)


def scratch_config(settings: Namespace) -> GPTConfig:
    shape = (settings.n_layer, settings.n_head, settings.n_embd, settings.block_size)
    return GPTConfig(*shape, vocab_size(settings.tokenizer))


def rehearse(settings: Namespace, base: Base) -> GPTConfig:
    """The config of the model that will be trained. Raises ValueError for what cannot be."""
    # What a base is cannot be chosen; it can read less at once than it has positions for.
    config = base.config or scratch_config(settings)
    theirs = asdict(config) | {"tokenizer": base.info.get("tokenizer", settings.tokenizer)}
    for name in ("n_layer", "n_head", "n_embd", "tokenizer"):
        if getattr(settings, name) != theirs[name]:
            raise ValueError(f"--{name} {getattr(settings, name)}: the base has {theirs[name]}")
    if settings.block_size > config.block_size:
        positions = f"the base's {config.block_size} positions"
        raise ValueError(f"--block_size {settings.block_size} is more than {positions}")
    parts = settings.grad_accum * common.world_size()
    if settings.batch_size % parts:
        raise ValueError(f"a batch of {settings.batch_size} cannot be cut in {parts} equal parts")
    if settings.upscale == "none" and settings.options:
        raise ValueError(f"--{', --'.join(settings.options)}: say how with --upscale")

    # On the meta device tensors have no numbers, so a trial costs nothing. It refuses all that
    # up-scaling and blocks refuse.
    with torch.device("meta"):
        model = GPT(config)
        if settings.upscale != "none":
            model = upscale(model, settings.upscale, **settings.options)
        set_trainable(model, settings.train)
    return model.config


# ---- Optimizer and schedule ----------------------------------------------------------------------
def make_optimizer(
    model: GPT, lr: float, memory_lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, each in one group: matrices, vectors, banks."""
    matrices = []
    vectors = []  # biases and norms
    banks = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("hive.bank"):
            banks.append(parameter)
        elif parameter.dim() >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)

    # An entry of a bank is read seldom, so it has few steps to learn in: banks have a rate of their
    # own [Lample et al. 2019]. No weight decay either: it would shrink entries nobody has read.
    groups = [
        {"name": "matrices", "params": matrices, "peak_lr": lr, "weight_decay": weight_decay},
        {"name": "vectors", "params": vectors, "peak_lr": lr, "weight_decay": 0.0},
        {"name": "banks", "params": banks, "peak_lr": memory_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["lr"] = group["peak_lr"]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)


def schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the peak rate: a linear rise, then half a cosine to a tenth. Steps count from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


# ---- One step ------------------------------------------------------------------------------------
DIVERGED = "the loss or a gradient became NaN or infinite; try a lower --lr or --memory_lr"


def train_step(
    model: GPT,
    optimizer: torch.optim.AdamW,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    grad_accum: int,
) -> float:
    """One optimizer step on a batch of inputs and targets, both (B, T), cut in grad_accum parts.

    model may be wrapped for several processes, or compiled. Returns the mean loss before the step,
    in nats. Raises FloatingPointError, and changes no weight, if something is NaN or infinite.
    """
    inputs, targets = batch
    parts = list(zip(inputs.chunk(grad_accum), targets.chunk(grad_accum)))
    mean_loss = torch.zeros((), device=inputs.device)

    # Forward and backward, part by part: gradients add up. Parts are equally large, so the mean of
    # their means is the batch's. Several processes exchange gradients once, in the last part.
    for number, (x, y) in enumerate(parts, start=1):
        waits = number < len(parts) and hasattr(model, "no_sync")
        with model.no_sync() if waits else nullcontext():
            with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(x, y) / len(parts)
            loss.backward()
        mean_loss += loss.detach()

    # Banks are clipped apart, so that a large norm of one kind does not shrink the other's.
    banks = []
    others = []
    for group in optimizer.param_groups:
        kind = banks if group["name"] == "banks" else others
        kind.extend(group["params"])
    norm_of_banks = torch.nn.utils.clip_grad_norm_(banks, 1.0)
    norm_of_others = torch.nn.utils.clip_grad_norm_(others, 1.0)
    if not torch.isfinite(mean_loss + norm_of_banks + norm_of_others):
        raise FloatingPointError(DIVERGED)

    optimizer.step()
    optimizer.zero_grad()
    return mean_loss.item()


# ---- The loop ------------------------------------------------------------------------------------
def hashes_of_code() -> dict[str, str]:
    """The sha256 of the files that decide what a run comes to."""
    folder = os.path.dirname(os.path.abspath(__file__))
    names = ("hml.py", "model.py", "data.py", "upscale.py", "train.py")
    return {name: common.file_sha256(os.path.join(folder, name)) for name in names}


def new_progress() -> dict:
    """How far a run is: with the model all that it needs to go on.

    Training draws no random numbers, and batch i depends on i and the seed alone. So on a CPU, with
    dtype, threads and parts of a batch as before, weights and losses of a run that was stopped and
    repeated are bit for bit those of one that was not.
    """
    return {
        "code": hashes_of_code(),  # that the run was begun by
        "step": 0,
        "seconds": 0.0,  # spent in training steps
        "losses": [],  # of each batch, before its step
        "valid": [],  # pairs: after so many steps, the loss on text that it does not train on
        "rows": [],  # of the closing table, so far
        "optimizer": None,
    }


def steps_of(settings: Namespace) -> int:
    """Optimizer steps of a run; what does not fill a batch at the end is left out."""
    return max(1, settings.tokens // (settings.batch_size * settings.block_size))


def tokens_per_second(progress: dict, settings: Namespace) -> float:
    tokens = progress["step"] * settings.batch_size * settings.block_size
    return tokens / max(progress["seconds"], 1e-9)


def train(
    model: GPT,
    settings: Namespace,
    progress: dict,
    data: dict[str, Split],
    save: Callable[[], None] | None = None,
) -> None:
    """Trains what of model requires gradients, from progress to the end of the run, in place.

    data: splits "train" and "valid". save: keeps model and progress in a file; without it, as in
    experiments/compare.py, nothing is validated, saved or printed. Raises KeyboardInterrupt after
    Ctrl-C or SIGTERM, with everything saved, and FloatingPointError if the loss becomes NaN, with
    the last good checkpoint in place.
    """
    # A run that goes on has AdamW's running averages from before.
    device = model.wte.weight.device
    optimizer = make_optimizer(model, settings.lr, settings.memory_lr, settings.weight_decay)
    if progress["optimizer"] is not None:
        optimizer.load_state_dict(progress["optimizer"])

    # Several processes share the work; a compiled model does it in fewer, larger kernels.
    wrapped = model
    if common.world_size() > 1:
        wrapped = DistributedDataParallel(model)
    if settings.compile:
        wrapped = torch.compile(wrapped)

    # A validation on the way reads some windows only, else it would take longer than the training
    # it looks at.
    steps = steps_of(settings)
    windows = max(1, min(64, 8192 // settings.block_size))
    sample = data["valid"].tokens[: windows * settings.block_size + 1]

    # The order is validate, save, train, as in nanoGPT: so a run has a point at step 0, and a
    # checkpoint before anything has been learned. Rank 0 validates and saves for all.
    dtype = getattr(torch, settings.dtype)
    writes = save is not None and common.is_main()
    disable = None if writes else True  # tqdm shows None on a terminal only
    bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=disable, leave=False)
    with common.stop_signal() as stop, bar:
        while True:
            step = progress["step"]
            stopping = common.mean_over_processes(float(stop.is_set()), device) > 0

            # Now and then, and at both ends: the loss on text that it does not train on.
            validates = step % settings.eval_every == 0 or step == steps
            if validates and writes and step not in dict(progress["valid"]):  # else it has it
                nll, count = sum_nll(model, sample)
                progress["valid"].append((step, nll / count))
                line = f"step {step}/{steps}  validation loss {nll / count:.3f} nats"
                if step:
                    line += f"  training loss {progress['losses'][-1]:.3f}"
                    line += f"  {tokens_per_second(progress, settings):,.0f} tokens/s"
                tqdm.write(line)

            # Now and then, at both ends, and when it is told to stop: all that is needed to go on.
            # One window is scored first, since the last update may have spoilt the weights.
            saves = step % settings.save_every == 0 or step == steps or stopping
            if saves and writes:
                nll, _ = sum_nll(model, sample[: settings.block_size + 1])
                if not math.isfinite(nll):
                    raise FloatingPointError(DIVERGED)
                progress["optimizer"] = optimizer.state_dict()
                save()
            if step == steps:
                break
            if stopping:
                saved = (
                    f"step {step} of {steps} is saved in {settings.out}" if save else "not saved"
                )
                raise KeyboardInterrupt(f"interrupted; {saved}; repeat the command to go on")

            # The learning rate of this step, for each group a share of its own peak.
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, settings.warmup, steps)

            # The batch of this step; with several processes, the part of this one. It depends on
            # step and seed alone: that is why nothing of a data loader has to be kept.
            sizes = (settings.batch_size, settings.block_size)
            x, y = get_batch(data["train"].tokens, step, *sizes, settings.seed)  # both (B, T)
            x = x.chunk(common.world_size())[common.rank()].to(device)
            y = y.chunk(common.world_size())[common.rank()].to(device)

            # Forward, backward, update. To read the loss waits for the device, so the time is real.
            loss = train_step(wrapped, optimizer, (x, y), dtype, settings.grad_accum)
            progress["losses"].append(common.mean_over_processes(loss, device))
            progress["seconds"] += time.perf_counter() - started
            progress["step"] += 1
            bar.update()


# ---- What continues ------------------------------------------------------------------------------
# Of settings what decides the numbers, apart from the base, the shape of the model and the texts.
COMPARED = """upscale train tokenizer tokens block_size batch_size lr memory_lr weight_decay warmup
    eval_every seed""".split()


def what_is_asked(settings: Namespace, base: Base, config: GPTConfig, texts: dict) -> dict:
    """All that decides what a run comes to, as plain types. Neither paths nor the machine do.

    config: of the model that is trained; texts: see load_texts().
    """
    asked = asdict(config)
    for name in COMPARED:
        asked[name] = getattr(settings, name)

    # What a method of your own takes and the config does not hold.
    for name, value in settings.options.items():
        if name not in ("n_new", "positions"):  # config.new tells
            asked.setdefault(name, value)

    # A base in a file is its weights, published ones are a name.
    asked["base"] = weights_sha256(base.model) if base.model else base.name
    if base.name == "scratch":
        asked["base"] = f"scratch, {settings.base_tokens} tokens, lr {settings.base_lr}"

    # A text is its words, in whatever folder.
    for kind, name in (("dataset", settings.dataset), ("old_dataset", settings.old_dataset)):
        if name is not None:
            prints = "".join(split.fingerprint for split in texts[name].values())
            label = name if name in DATASETS else "a text"
            asked[kind] = f"{label} {hashlib.sha256(prints.encode()).hexdigest()[:8]}"
    return asked


def find_run(settings: Namespace, asked: dict) -> tuple[GPT, dict] | None:
    """Model and progress in settings.out, if it was begun with what is asked.

    None if it was not and may be overwritten; ValueError, which says what differs, if it may not.
    """
    out = settings.out
    model, info = load_checkpoint(out)
    begun = info.get("asked", {})
    differing = []
    for name in asked | begun:
        if begun.get(name) != asked.get(name):
            differing.append(f"{name} {begun.get(name)}, now {asked.get(name)}")
    if differing and settings.overwrite:
        return None
    if differing:
        what = "; ".join(differing) if begun else "another program"
        raise ValueError(f"{out} was begun with {what}: name another --out, or --overwrite")

    # Other code may give other numbers. You know what you changed; a changed comment does no harm.
    progress = info["progress"]
    now = hashes_of_code()
    changed = ", ".join(name for name in now if progress["code"][name] != now[name])
    if changed:
        print(f"{out} was begun by other code ({changed} differs); delete it to begin anew")
    return model, progress


# ---- The story -----------------------------------------------------------------------------------
TABLE_TOKENS = 100_000  # of each validation split, that the closing table looks at
Texts = dict[str, dict[str, Split]]  # by name, then by split


def load_texts(settings: Namespace) -> Texts:
    """The new text, and the old one if there is one."""
    names = [settings.dataset]
    if settings.old_dataset is not None:
        names.append(settings.old_dataset)
    return {name: load_dataset(name, settings.tokenizer, settings.data_dir) for name in names}


def add_row(rows: list[dict], label: str, model: GPT, settings: Namespace, texts: Texts) -> None:
    """What a model is worth, as a row of the closing table, with a sample of what it writes."""
    measured = {name: splits["valid"].tokens[:TABLE_TOKENS] for name, splits in texts.items()}
    row = evaluate(label, model, measured, settings.tokenizer)

    # All samples begin alike, with words of the new text.
    words = measured[settings.dataset][:32].tolist()
    prompt = load_tokenizer(settings.tokenizer).decode(words)
    row["sample"] = continue_text(model, settings.tokenizer, prompt, max_new_tokens=120)
    rows.append(row)


def base_settings(settings: Namespace) -> Namespace:
    """Those of the run that makes a base from scratch: it reads the old text, at its own rate."""
    own = Namespace(**vars(settings))
    own.upscale = "none"
    own.options = {}
    own.train = "all"
    own.dataset = settings.old_dataset
    own.old_dataset = None
    own.tokens = settings.base_tokens
    own.lr = settings.base_lr
    own.memory_lr = 0.0  # it has no bank
    return own


def get_base(settings: Namespace, base: Base, device: torch.device) -> GPT:
    """The model that a run begins with."""
    if base.model is not None:
        return base.model

    # Published weights are downloaded, once.
    if base.name in PRETRAINED:
        name, data_dir = base.name, settings.data_dir
        model, _ = common.main_process_first(lambda: open_model(name, data_dir))
        return model

    # From scratch. Weights are drawn on the CPU, so that a seed gives the same ones everywhere.
    if makes_a_base(settings, base):
        torch.manual_seed(settings.seed)
        return GPT(scratch_config(settings))

    # The base of an up-scaled model is a run of its own, which may have been made before.
    own = base_settings(settings)
    own.warmup = None
    own.eval_every = None
    own.save_every = None
    own.out = None
    own.overwrite = False
    print("\nfirst the base:")
    model, _, _ = run(own, base, device)
    if os.path.realpath(own.out) == os.path.realpath(settings.out):
        raise ValueError(f"--out {settings.out} is the base's own file; name another")
    return model


def begin(settings: Namespace, base: Base, device: torch.device, texts: Texts) -> tuple[GPT, dict]:
    """The model that is to be trained, and the progress of its run, with the first rows."""
    progress = new_progress()
    model = get_base(settings, base, device).to(device)
    if common.is_main() and not makes_a_base(settings, base):
        add_row(progress["rows"], "base", model, settings, texts)
    if settings.upscale == "none":
        return model, progress

    # Deeper, and at the start exactly the same (solar is not): the table shows it.
    torch.manual_seed(settings.seed)
    deeper = upscale(model, settings.upscale, **settings.options)
    print(f"\n{summary(model, deeper)}")
    if common.is_main():
        add_row(progress["rows"], f"{settings.upscale}, start", deeper, settings, texts)
    return deeper, progress


def run(settings: Namespace, base: Base, device: torch.device) -> tuple[GPT, dict, Texts]:
    """One run, from its base to its last step. Returns the model, its progress, and its texts.

    settings.out None: get_base() wants a base. That is kept in the data folder, under a name that
    tells what was asked.
    """
    # Whatever can be refused is refused here, before anything long begins. A first batch refuses a
    # text that is too short.
    config = rehearse(settings, base)
    texts = common.main_process_first(lambda: load_texts(settings))
    data = texts[settings.dataset]
    tokens = data["train"].tokens
    get_batch(tokens, 0, settings.batch_size, settings.block_size, settings.seed)

    # What depends on the length of the text, or of the run.
    settings.tokens = settings.tokens or len(tokens)
    steps = steps_of(settings)
    if settings.warmup is None:
        settings.warmup = max(1, steps // 20)
    settings.eval_every = settings.eval_every or max(1, steps // 10)
    settings.save_every = settings.save_every or max(1, steps // 10)

    # Where the run is kept. A base must not be replaced by what is made of it.
    asked = what_is_asked(settings, base, config, texts)
    if settings.out is None:
        sizes = f"{config.n_layer}x{config.n_embd}x{config.block_size}"
        words = asked["dataset"].replace(" ", "-")
        everything = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:8]
        settings.out = os.path.join(settings.data_dir, f"base-{sizes}-{words}-{everything}.pt")
    out = settings.out
    if os.path.realpath(out) == os.path.realpath(base.name):
        raise ValueError(f"--out {out} is the base's own file; name another")

    # What it is going to do.
    banks = f", banks {settings.memory_lr:g}" if set(config.blocks) != {"T"} else ""
    old = f"; old text {settings.old_dataset}" if settings.old_dataset else ""
    print(f"run     {settings.upscale} on {base.name}, {settings.train} trained, kept in {out}")
    print(f"text    {settings.dataset}{old}; tokens of {settings.tokenizer}")
    print(f"train   {settings.tokens:,} tokens in {steps:,} steps, lr {settings.lr:g}{banks}")
    print(f"machine {device}, {settings.dtype}, {settings.threads} threads, seed {settings.seed}")

    # It goes on where it was, or begins.
    is_there = os.path.exists(out)
    found = find_run(settings, asked) if is_there else None
    if found:
        model, progress = found
        model = model.to(device)
        for row in progress["rows"]:  # a text's folder may have another name now
            row["texts"] = dict(zip(texts, row["texts"].values()))
        print(f"{out} is there: {progress['step']:,} of its {steps:,} steps are done")
    else:
        model, progress = begin(settings, base, device, texts)

    # What a file of it says beside the weights.
    fingerprints = {
        name: {split: text.fingerprint for split, text in splits.items()}
        for name, splits in texts.items()
    }
    about = {
        "tokenizer": settings.tokenizer,
        "dataset": settings.dataset,
        "old_dataset": settings.old_dataset,
        "fingerprints": fingerprints,
        "asked": asked,
    }

    def save() -> None:
        # Two runs that were begun at the same time would write to one file by turns.
        if progress["step"] == 0 and not is_there and os.path.exists(out):
            raise ValueError(f"another run has begun to write {out}; name another --out")
        save_checkpoint(out, model, progress=progress, **about)

    # Continual pre-training. A base that is not up-scaled is itself what is trained.
    set_trainable(model, settings.train)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if progress["step"] < steps:
        print(f"training {trained:,} parameters\n")
        train(model, settings, progress, data, save)
    return model, progress, texts


def main() -> None:
    settings, base = parse_arguments()
    device = common.join_processes(common.pick_device(settings.device))
    for_this_machine(settings, device)
    if makes_a_base(settings, base):
        settings = base_settings(settings)
    model, progress, texts = run(settings, base, device)

    # What it came to, in a table, and in what the first and the last model write.
    if common.is_main():
        rows = progress["rows"]
        label = "end" if settings.upscale == "none" else f"{settings.upscale}, end"
        add_row(rows, label, model, settings, texts)
        print(f"\nthe first {TABLE_TOKENS:,} tokens of each validation split")
        print_table(rows, change=len(rows) > 1)
        for row in rows if len(rows) == 1 else (rows[0], rows[-1]):
            sample = row["sample"].replace("\n", "\n    ")  # indented, so that line ends are seen
            print(f"\n{row['model']} goes on with the first words of {settings.dataset}:")
            print(f"    {sample}")
        print(f"\ntraining: {tokens_per_second(progress, settings):,.0f} tokens/s")
        print(f"next: python eval.py {settings.out}")
    common.leave_processes()


if __name__ == "__main__":
    common.run_command(main)
