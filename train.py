"""
One run: from a base GPT to an up-scaled, further trained checkpoint.

    python train.py --upscale midus                          trains a tiny base first; no download
    python train.py --upscale midus --dataset wikitext103    GPT-2 124M on WikiText-103, one GPU
    python train.py --resume                                 goes on with ckpt.pt after an interrupt

The base is the model before the new blocks: GPT-2 by name, one of your checkpoints, or `scratch`: a
small model of our own, which is trained first, in a run like any other, and kept in the data
folder. A run knows two texts. It trains on the *new* one. The *old* one, which its base was trained
on, is only measured: what is forgotten of it belongs to the price.

In order: settings, optimizer and schedule, one step, the loop, a run in files, models, and the
story (main). Shape names: see hml.py.
"""

import argparse
import glob
import math
import os
import shlex
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from data import (
    AT_HOME,
    DATASETS,
    WIKITEXT,
    Split,
    check_vocabulary,
    get_batch,
    is_at_hand,
    load_dataset,
    load_tokenizer,
    vocab_size,
)
from eval import closing_row, print_closing_table, sum_nll, verdict
from model import GPT, PRETRAINED, TEXTS, GPTConfig, load_checkpoint, open_model, save_checkpoint
from upscale import METHODS, add_flags, given_options, set_trainable, summary, upscale

# ---- Settings ------------------------------------------------------------------------------------
# What no flag says, by the width of the base. Nothing of gpt2 was tried, nor small's memory_lr.
# tokens None: one epoch.
# fmt: off
PRESETS = {
    "tiny": {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "base_tokens": 1_600_000, "base_lr": 3e-3,
        "block_size": 64, "batch_size": 16, "grad_accum": 1,
        "tokens": 800_000, "lr": 3e-3, "memory_lr": 1e-1,
    },
    "small": {
        "n_layer": 6, "n_head": 4, "n_embd": 256, "base_tokens": 1_200_000, "base_lr": 2e-3,
        "block_size": 256, "batch_size": 16, "grad_accum": 1,
        "tokens": 600_000, "lr": 1e-3, "memory_lr": 3e-2,
    },
    "gpt2": {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "base_tokens": 200_000_000, "base_lr": 6e-4,
        "block_size": 1024, "batch_size": 32, "grad_accum": 8,
        "tokens": None, "lr": 2e-4, "memory_lr": 1e-2,
    },
}
# fmt: on
TINY_SPEED = 18_000  # tokens per second of the tiny preset, measured on one core of a server
OF_THE_MACHINE = ("data_dir", "old_data_dir", "dtype", "compile", "threads", "grad_accum")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags. One that was not given is None: a preset, the base or a checkpoint decides.

    words: the arguments; None reads those of the command line.
    """
    parser = common.Parser("Train a GPT, or up-scale one and train it on.")
    whole = common.whole_number
    real = common.real_number
    folder = common.data_folder

    # What is trained, and on what.
    add = parser.add_argument_group("what").add_argument
    add("--upscale", choices=("none", *METHODS), help="how it becomes deeper (default none)")
    add("--base", help="scratch (default), gpt2 (default for wikitext), gpt2-medium, ..., a file")
    add("--dataset", choices=DATASETS, help="the new text, to train on (default: by the base)")
    add("--data_dir", type=folder, help="folder of data and caches (default ./data)")
    add("--old_dataset", choices=DATASETS, help="the text that the base knows (default: by base)")
    add("--old_data_dir", type=folder, help="its folder (default: --data_dir)")
    add("--tokenizer", help="gpt2, gpt2:N, bytes (default: the base's; from scratch by dataset)")
    add("--train", help="new blocks, all, or blocks from 1: 2,4 (default: as the method's authors)")
    add("--preset", choices=PRESETS, help="sizes and rates (default: by the base's width)")

    # The shape of a base from scratch, its own training, and what is put between its blocks.
    add = parser.add_argument_group("a base from scratch (default: by preset)").add_argument
    add("--n_layer", type=whole, help="transformer blocks")
    add("--n_head", type=whole, help="attention heads")
    add("--n_embd", type=whole, help="width; a multiple of n_head")
    add("--base_tokens", type=whole, help="training tokens of the base")
    add("--base_lr", type=real, help="peak learning rate of the base")
    add_flags(parser)

    # How it is trained. The rate rises for `warmup` steps, then falls to a tenth. grad_accum
    # changes the result by no more than rounding.
    add = parser.add_argument_group("training").add_argument
    add("--tokens", type=whole, help="training tokens (by preset; for gpt2 one epoch)")
    add("--block_size", type=whole, help="tokens in a sequence (by preset)")
    add("--batch_size", type=whole, help="sequences in an optimizer step (by preset)")
    add("--grad_accum", type=whole, help="parts of a step's batch: more need less memory")
    add("--lr", type=real, help="peak learning rate (by preset)")
    add("--memory_lr", type=real, help="peak learning rate of memory banks (by preset)")
    add("--weight_decay", type=real, help="of matrices, never of banks (default 0.1)")
    add("--warmup", type=common.seed_number, help="steps of rising rate (default: 5%% of all)")
    add("--eval_every", type=whole, help="steps between validations (default: 10%% of all)")
    add("--save_every", type=whole, help="steps between checkpoints (default: 10%% of all)")
    add("--seed", type=common.seed_number, help="of new weights and the data's order (default 0)")

    # What belongs to the machine and not to the run. OF_THE_MACHINE lists what a resume may change.
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="of autocast (default: bfloat16 where that is fast)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--compile", action=yes_or_no, help="the model (default: on CUDA, where Triton is)")
    add("--threads", type=whole, help="of the CPU (default: as many as the model is worth)")

    add = parser.add_argument_group("files").add_argument
    add("--out", type=common.new_file(".pt"), default="ckpt.pt", help="(default ckpt.pt)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with --out, with the settings it has")
    add("--overwrite", action="store_true", help="replace --out, at the new run's first checkpoint")
    return parser.parse_args(words)


def find_base(args: Namespace) -> tuple[str, GPT | None, GPTConfig | None, dict]:
    """The base's name, and model, config and info as far as they are known.

    Nothing is downloaded or trained yet: what can be refused comes first.
    """
    name = args.base or ("gpt2" if args.dataset in WIKITEXT else "scratch")
    if name == "scratch":
        return name, None, None, {}
    if name in PRETRAINED:
        return name, None, PRETRAINED[name], {"tokenizer": "gpt2"}
    model, info = open_model(name)
    return name, model, model.config, info


def choose_texts(args: Namespace, base: str, info: dict) -> tuple[str, str | None]:
    """Names of the new and of the old text. info: what the base's file says of it."""
    # A checkpoint says what it was last trained on; published weights do not.
    if base != "scratch":
        known = info.get("dataset")
        new = "pycode" if known == "pydocs" else known or "wikitext103"
        return args.dataset or new, args.old_dataset or known

    # From scratch: the base itself is the run, or it is trained on the old text first.
    if args.upscale in (None, "none"):
        return args.dataset or "pydocs", args.old_dataset
    new = args.dataset or "pycode"
    return new, args.old_dataset or ("pydocs" if new in AT_HOME else new)


def choose_settings(
    args: Namespace, base: str, config: GPTConfig | None, info: dict, device: torch.device
) -> Namespace:
    """The settings of a new run. Flags override the base's values, which override the preset's.

    config, info: what is known of the base; config is None if the base is yet to be trained.
    """
    # The preset, by width. What is None stays so, or is decided below.
    new, old = choose_texts(args, base, info)
    width = config.n_embd if config else args.n_embd or (128 if new in AT_HOME else 256)
    preset = args.preset or ("tiny" if width <= 128 else "small" if width <= 512 else "gpt2")
    settings = Namespace(
        base=base,
        preset=preset,
        upscale="none",
        train=None,
        dataset=new,
        old_dataset=old,
        data_dir=None,
        old_data_dir=None,
        weight_decay=0.1,
        warmup=None,
        eval_every=None,
        save_every=None,
        seed=0,
        **PRESETS[preset],
    )

    # What the base asks for: its window and its tokens.
    if config:
        settings.block_size = config.block_size
    settings.tokenizer = info.get("tokenizer", "bytes" if (old or new) in AT_HOME else "gpt2")

    # What the machine asks for. Several processes share the parts of a batch.
    settings.dtype = "bfloat16" if common.has_bf16(device) else "float32"
    settings.compile = device.type == "cuda" and find_spec("triton") is not None
    settings.threads = common.threads_for(width)
    settings.grad_accum = max(1, settings.grad_accum // common.process_count())

    # The flags.
    for name in vars(settings):
        if getattr(args, name) is not None:
            setattr(settings, name, getattr(args, name))
    settings.options = given_options(args)

    # What depends on them. A folder that a checkpoint names may have been on another machine.
    if settings.train is None:
        settings.train = "all" if settings.upscale == "none" else METHODS[settings.upscale].train
    theirs = info.get("data_dir")
    if theirs is None or not os.path.isdir(theirs):
        theirs = settings.data_dir or os.path.abspath("data")
    settings.data_dir = settings.data_dir or theirs
    settings.old_data_dir = settings.old_data_dir or theirs
    if base == "scratch" and settings.upscale == "none":  # the run is that of a base
        settings.lr = settings.base_lr if args.lr is None else args.lr
        settings.tokens = args.tokens or settings.base_tokens
    return settings


def refuse_contradictions(
    settings: Namespace, config: GPTConfig | None, info: dict, args: Namespace
) -> None:
    """Raises ValueError, one sentence, for settings that cannot be together."""
    # Flags of which nothing would come.
    of_scratch = ("n_layer", "n_head", "n_embd", "base_tokens", "base_lr")
    given = [f"--{name}" for name in of_scratch if getattr(args, name) is not None]
    if settings.base != "scratch" and given:
        raise ValueError(f"{', '.join(given)}: only for --base scratch, not for {settings.base}")
    if settings.upscale == "none" and settings.options:
        raise ValueError(f"--{', --'.join(settings.options)}: say how with --upscale")

    # A base reads the tokens that it was trained on, no more of them at once than it has positions.
    theirs = info.get("tokenizer", settings.tokenizer)
    if settings.tokenizer != theirs:
        raise ValueError(f"--tokenizer {settings.tokenizer}: the base was trained with {theirs}")
    config = config or scratch_config(settings)
    check_vocabulary(settings.tokenizer, config.vocab_size)
    if settings.block_size > config.block_size:
        positions = f"the base's {config.block_size} positions"
        raise ValueError(f"--block_size {settings.block_size} is more than {positions}")

    # A trial on the meta device, without numbers: it refuses all that up-scaling and blocks refuse.
    with torch.device("meta"):
        model = GPT(config)
        if settings.upscale != "none":
            model = upscale(model, settings.upscale, **settings.options)
        set_trainable(model, settings.train)


def refuse_uneven_parts(settings: Namespace) -> None:
    """Raises ValueError unless all processes, and all parts of a batch, get equally much."""
    parts = settings.grad_accum * common.process_count()
    if settings.batch_size % parts:
        raise ValueError(f"a batch of {settings.batch_size} cannot be cut in {parts} equal parts")


def steps_of(settings: Namespace) -> int:
    """Optimizer steps of a run; what does not fill a batch at the end is left out."""
    return max(1, settings.tokens // (settings.batch_size * settings.block_size))


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
        exchanges = number == len(parts) or not hasattr(model, "no_sync")
        with nullcontext() if exchanges else model.no_sync():
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
def new_progress(texts: dict[str, str]) -> dict:
    """How far a run is: with model and settings all that a resume needs. texts: identities.

    Training draws no random numbers, and batch i depends on i and the seed alone. So on a CPU, with
    dtype, threads and parts of a batch as before, weights and losses of a resumed run are bit for
    bit those of one that was not interrupted.
    """
    return {
        "texts": texts,
        "step": 0,
        "seconds": 0.0,  # spent in training steps
        "losses": [],  # of each batch, before its step
        "valid": [],  # pairs: after so many steps, the loss on text that it does not train on
        "rows": [],  # of the closing table, so far
        "optimizer": None,
    }


def train(
    model: GPT,
    settings: Namespace,
    progress: dict,
    data: dict[str, Split],
    out: str | None = None,
    go_on: str = "",
) -> None:
    """Trains what of model requires gradients, from progress to the end of the run, in place.

    data: splits "train" and "valid". out: the checkpoint that is kept up to date; go_on: the
    command that goes on with it. Without out nothing is validated, saved or printed. Raises
    KeyboardInterrupt after Ctrl-C or SIGTERM, with everything saved, and FloatingPointError if the
    loss becomes NaN, with the last good checkpoint in place.
    """
    # A resumed run goes on with AdamW's running averages; they come with the groups they belong to,
    # peak rates and all.
    device = model.wte.weight.device
    optimizer = make_optimizer(model, settings.lr, settings.memory_lr, settings.weight_decay)
    if progress["optimizer"] is not None:
        optimizer.load_state_dict(progress["optimizer"])

    # Several processes share the work; a compiled model does it in fewer, larger kernels.
    wrapped = model
    if common.process_count() > 1:
        wrapped = DistributedDataParallel(model)
    if settings.compile:
        wrapped = torch.compile(wrapped)

    # How many steps, and what happens when: by default everything ten times in a run. A validation
    # on the way reads some windows only, else it would take longer than the training it looks at.
    steps = steps_of(settings)
    warmup = max(1, steps // 20) if settings.warmup is None else settings.warmup
    eval_every = settings.eval_every or max(1, steps // 10)
    save_every = settings.save_every or max(1, steps // 10)
    windows = max(1, min(64, 8192 // settings.block_size))
    sample = data["valid"].tokens[: windows * settings.block_size + 1]

    # The order is validate, save, train, as in nanoGPT: so a run has a point at step 0, and a
    # checkpoint before anything has been learned. Rank 0 validates and saves for all.
    dtype = getattr(torch, settings.dtype)
    writes = out is not None and common.is_main()
    disable = None if writes else True  # tqdm shows None on a terminal only
    bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=disable, leave=False)
    with common.stop_signal() as stop, bar:
        while True:
            step = progress["step"]
            stopping = common.true_in_any_process(stop.is_set(), device)

            # Now and then, and at both ends: the loss on text that it does not train on.
            due = step % eval_every == 0 or step == steps
            if due and writes and step not in dict(progress["valid"]):
                nll, count = sum_nll(model, sample)
                progress["valid"].append((step, nll / count))
                tqdm.write(describe(progress, settings, count))

            # Now and then, at both ends, and when it is told to stop: all that a resume needs. One
            # window is scored first, since the last update may have spoilt the weights.
            due = step % save_every == 0 or step == steps or stopping
            if due and writes:
                nll, _ = sum_nll(model, sample[: settings.block_size + 1])
                if not math.isfinite(nll):
                    raise FloatingPointError(DIVERGED)
                progress["optimizer"] = optimizer.state_dict()
                save(out, model, settings, progress)
            if step == steps:
                break
            if stopping and out is None:
                raise KeyboardInterrupt
            if stopping:
                done = f"{out} is saved at step {step} of {steps}"
                raise KeyboardInterrupt(f"interrupted; {done}; go on with: {go_on}")

            # The learning rate of this step, for each group a share of its own peak.
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, warmup, steps)

            # The batch of this step; with several processes, the part of this one. It depends on
            # step and seed alone: that is why a resume needs no state of a data loader.
            sizes = (settings.batch_size, settings.block_size)
            x, y = get_batch(data["train"].tokens, step, *sizes, settings.seed)  # both (B, T)
            x = x.chunk(common.process_count())[common.process_rank()].to(device)
            y = y.chunk(common.process_count())[common.process_rank()].to(device)

            # Forward, backward, update. To read the loss waits for the device, so the time is real.
            loss = train_step(wrapped, optimizer, (x, y), dtype, settings.grad_accum)
            progress["losses"].append(common.mean_over_processes(loss, device))
            progress["seconds"] += time.perf_counter() - started
            progress["step"] += 1
            bar.update()


def tokens_per_second(progress: dict, settings: Namespace) -> float:
    tokens = progress["step"] * settings.batch_size * settings.block_size
    return tokens / max(progress["seconds"], 1e-9)


def describe(progress: dict, settings: Namespace, count: int) -> str:
    """A line on how far a run is; count: tokens of the validation."""
    step, loss = progress["valid"][-1]
    line = f"step {step}/{steps_of(settings)}  validation loss {loss:.3f} nats on {count:,} tokens"
    if step:
        line += f"  training loss {progress['losses'][-1]:.3f}"
        line += f"  {tokens_per_second(progress, settings):,.0f} tokens/s"
    return line


# ---- A run in files ------------------------------------------------------------------------------
def save(path: str, model: GPT, settings: Namespace, progress: dict) -> None:
    """Writes the checkpoint: model, settings, progress, and what others want to know of it."""
    # eval.py and upscale.py need not know what settings are.
    known = vars(settings)
    about = {name: known[name] for name in TEXTS if known[name] is not None}
    save_checkpoint(path, model, settings=known, progress=progress, **about)


def open_run(path: str) -> tuple[GPT, Namespace, dict]:
    """Model, settings and progress as save() wrote them. Raises ValueError for anything else."""
    model, info = load_checkpoint(path)
    progress = info.get("progress", {})
    saved = info.get("settings", {})

    # A checkpoint of another version, or a damaged value, shall not end in a traceback later on:
    # the preset's values say of which type each setting is.
    template = new_progress({})
    right = [type(progress.get(name)) is type(template[name]) for name in ("step", "losses")]
    right += [type(saved.get(name)) is type(value) for name, value in PRESETS["tiny"].items()]
    if not all(right) or progress.keys() != template.keys():
        way = "name it as --base to train it"
        raise ValueError(f"{path} was not written by this version of train.py; {way}")
    return model, Namespace(**saved), progress


def refuse_unfinished_base(args: Namespace) -> None:
    """Raises ValueError if the run was stopped while its base was being trained."""
    for path in glob.glob(os.path.join(args.data_dir or "data", "base-*.pt")):
        try:
            _, settings, progress = open_run(path)
        except ValueError:  # not a base of this version
            continue
        step, steps = progress["step"], steps_of(settings)
        if step < steps:
            where = f"a base, {path}, is at step {step} of {steps}"
            raise ValueError(f"{args.out} is not begun: {where}; repeat the command, no --resume")


def resume(args: Namespace) -> tuple[GPT, Namespace, dict]:
    """Model, settings and progress of the run in --out.

    Raises ValueError if there is none, or a flag contradicts it.
    """
    if not os.path.exists(args.out):
        refuse_unfinished_base(args)
    model, settings, progress = open_run(args.out)

    # A folder that has moved, or is on another machine, has moved for both texts.
    if args.data_dir and settings.old_data_dir == settings.data_dir:
        settings.old_data_dir = args.data_dir

    # A flag may repeat what the checkpoint says, and may change what belongs to the machine.
    known = dict.fromkeys(given_options(args)) | vars(model.config)
    known |= vars(settings) | settings.options
    for name, value in vars(args).items():
        begun_with = known.get(name, value)
        if value is not None and name in OF_THE_MACHINE:
            setattr(settings, name, value)
        elif value is not None and value != begun_with:
            was = f"{args.out}, begun with {begun_with}"
            raise ValueError(f"--{name} contradicts {was}; drop the flag")

    # What was frozen is frozen again; a file does not tell.
    set_trainable(model, settings.train)
    return model, settings, progress


# ---- Models --------------------------------------------------------------------------------------
def scratch_config(settings: Namespace) -> GPTConfig:
    shape = (settings.n_layer, settings.n_head, settings.n_embd, settings.block_size)
    return GPTConfig(*shape, vocab_size(settings.tokenizer))


def base_run(settings: Namespace) -> tuple[str, Namespace]:
    """Where this run's base from scratch is kept, and the settings of the run that makes it."""
    # The same run, but nothing is inserted, and the text is the old one.
    own = Namespace(**vars(settings))
    own.upscale = "none"
    own.train = "all"
    own.options = {}
    own.dataset = settings.old_dataset
    own.data_dir = settings.old_data_dir
    own.old_dataset = None
    own.tokens = settings.base_tokens
    own.lr = settings.base_lr

    # These are chosen anew, since it is of another length.
    own.warmup = None
    own.eval_every = None
    own.save_every = None

    # A name that can be read; what it does not say is compared when the file is found.
    tokenizer = own.tokenizer.replace(":", "-")
    sizes = f"{own.n_layer}x{own.n_embd}x{own.block_size}"
    name = f"base-{sizes}-{own.dataset}-{tokenizer}-{own.tokens}-seed{own.seed}.pt"
    return os.path.join(settings.data_dir, name), own


def get_base(settings: Namespace, device: torch.device) -> GPT:
    """A base not given as a file: GPT-2 by name, or one from scratch.

    That is trained here if it is to be up-scaled; else to train it is the run's own work.
    """
    # Published weights are downloaded, once.
    if settings.base != "scratch":
        model, _ = common.main_process_first(lambda: open_model(settings.base, settings.data_dir))
        return model

    # Weights are drawn on the CPU, so that a seed gives the same ones everywhere.
    torch.manual_seed(settings.seed)
    model = GPT(scratch_config(settings))
    if settings.upscale == "none":
        return model

    # Its run may have been made, or interrupted, before.
    path, own = base_run(settings)
    source = (own.dataset, own.tokenizer, own.data_dir, ("train", "valid"))
    data = common.main_process_first(lambda: load_dataset(*source))
    get_batch(data["train"].tokens, 0, own.batch_size, own.block_size, own.seed)  # long enough?
    texts = {"new": data["valid"].identity, "train": data["train"].identity}
    progress = new_progress(texts)
    if os.path.exists(path):
        model, theirs, progress = open_run(path)
        ways = "delete it, or name another --data_dir"
        if progress["texts"] != texts:
            raise ValueError(f"{path} was made of another text; {ways}")
        for name in ("n_head", "batch_size", "lr", "weight_decay", "dtype"):
            made_with = getattr(theirs, name)
            if made_with != getattr(own, name):
                raise ValueError(f"{path} was made with {name} {made_with}; {ways}")

    model = model.to(device)
    if progress["step"] == steps_of(own):
        print(f"base    {path}, trained already")
    else:
        print(f"base    {path}, to be trained first: {own.tokens:,} tokens of {own.dataset}")
        train(model, own, progress, data, path, go_on=f"python {shlex.join(sys.argv)}")
    return model


# ---- The story -----------------------------------------------------------------------------------
def load_texts(settings: Namespace) -> tuple[dict[str, Split], dict[str, Split]]:
    """What it trains on, by split, "train" and "valid"; what it is measured on, "new" and "old"."""
    source = (settings.dataset, settings.tokenizer, settings.data_dir, ("train", "valid"))
    data = common.main_process_first(lambda: load_dataset(*source))
    measured = {"new": data["valid"]}
    old = settings.old_dataset
    if old is None:
        return data, measured

    # The old text is downloaded only for a base that trains on it. Texts of one name may differ.
    is_read = settings.base == "scratch" and settings.upscale != "none"
    is_there = is_read or is_at_hand(old, settings.old_data_dir)
    source = (old, settings.tokenizer, settings.old_data_dir, ("valid",))
    known = common.main_process_first(lambda: load_dataset(*source) if is_there else None)
    if known is None:
        print(f"{old}, the old text, is left out: it is not there, or would have to be downloaded")
    elif known["valid"].identity != data["valid"].identity:
        measured["old"] = known["valid"]
    return data, measured


def print_settings(settings: Namespace, names: dict[str, str], device: torch.device) -> None:
    """What was chosen, in a few lines, and about how long it will take. names: of the texts."""
    # The two texts, and what each is for.
    steps = steps_of(settings)
    step = settings.batch_size * settings.block_size
    print(f"new     {settings.dataset} in tokens of {settings.tokenizer}: to train on")
    if "old" in names:
        print(f"old     {settings.old_dataset}: what the base knows; only measured")
    elif settings.old_dataset == settings.dataset:
        print("old     the same: nothing is new to this model")

    # The run, and the machine.
    rates = f"lr {settings.lr:g}, banks {settings.memory_lr:g}, seed {settings.seed}"
    print(f"run     {settings.tokens:,} tokens in {steps:,} steps of {step:,}, {rates}")
    print(f"machine {device}, {settings.dtype}, {settings.threads} threads")
    if settings.preset == "tiny" and device.type == "cpu":
        base_tokens = settings.base_tokens if settings.upscale != "none" else 0
        minutes = (settings.tokens + base_tokens) / TINY_SPEED / 60
        print(f"time    about {minutes + 1:.0f} minutes on one core, if the base is to be trained")


def tell(rows: list[dict], names: dict[str, str]) -> None:
    """What a run came to: a table, what the model writes before and after, and sentences."""
    print()
    print_closing_table(rows, names)

    # Indented, so that line ends of what the model writes are seen.
    for row in (rows[0], rows[-1]):
        print(f"\n{row['label']} goes on with the first words of {names['new']}:")
        print("    " + row["sample"].replace("\n", "\n    "))
    print(f"\n{verdict(rows, names)}")


def main() -> None:
    args = parse_arguments()
    device = common.join_processes(common.pick_device(args.device))
    out = args.out

    # Settings. Whatever can be refused is refused here, before anything long begins.
    if args.resume:
        model, settings, progress = resume(args)
    else:
        if os.path.exists(out) and not args.overwrite:
            ways = "--resume goes on with it, --overwrite replaces it, --out names another file"
            raise ValueError(f"{out} exists; {ways}")
        base, model, config, info = find_base(args)
        settings = choose_settings(args, base, config, info, device)
        refuse_contradictions(settings, config, info, args)
    refuse_uneven_parts(settings)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)

    # The texts. A first batch refuses a split that is too short.
    data, measured = load_texts(settings)
    if args.resume and "old" not in progress["texts"]:  # it was left out, and stays so
        measured = {"new": data["valid"]}
    get_batch(data["train"].tokens, 0, settings.batch_size, settings.block_size, settings.seed)
    settings.tokens = settings.tokens or len(data["train"].tokens)  # one epoch
    texts = {kind: split.identity for kind, split in measured.items()}
    texts["train"] = data["train"].identity
    names = {"new": settings.dataset}
    if "old" in measured:
        names["old"] = settings.old_dataset
    print_settings(settings, names, device)

    # The rows of the closing table. All samples in it begin alike, with words of the new text.
    prompt = load_tokenizer(settings.tokenizer).decode(data["valid"].tokens[:32].tolist())

    def add_row(label: str, model: GPT) -> None:
        if common.is_main():
            row = closing_row(label, model, measured, settings.tokenizer, prompt)
            progress["rows"].append(row)

    method = settings.upscale
    if args.resume:
        # The base and the start are in the table already.
        if progress["texts"] != texts:
            raise ValueError(f"the data is not the text {out} was begun with; see --data_dir")
        model = model.to(device)
        if progress["step"] == steps_of(settings):
            print(f"{out} is finished: all its {progress['step']:,} steps are done")
    else:
        # 1. The base.
        progress = new_progress(texts)
        if model is None:
            model = get_base(settings, device)
        model = model.to(device)
        add_row("base" if method != "none" else "start", model)

        # 2. Deeper, and at the start exactly the same (solar is not): the table shows it.
        if method != "none":
            torch.manual_seed(settings.seed)
            deeper = upscale(model, method, **settings.options)
            print(summary(model, deeper))
            model = deeper
            add_row(f"{method}, start", model)
        set_trainable(model, settings.train)

    # 3. Continual pre-training. A base that is not up-scaled is itself what is trained.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\ntraining {trained:,} parameters, writing {out}")
    train(model, settings, progress, data, out, go_on=f"python train.py --resume --out {out}")

    # 4. What it was worth. Rank 0 tells.
    add_row(f"{method}, end" if method != "none" else "end", model)
    if common.is_main():
        tell(progress["rows"], names)
        print(f"training: {tokens_per_second(progress, settings):,.0f} tokens/s")
        print(f"\nnext: python eval.py {out}")
    common.leave_processes()


if __name__ == "__main__":
    common.run_command(main)
