"""
One run: from a base GPT to an up-scaled, further trained checkpoint.

    python train.py --upscale midus                          trains a tiny base first; no download
    python train.py --upscale midus --dataset wikitext103    GPT-2 124M on WikiText-103, one GPU
    python train.py --resume                                 goes on with ckpt.pt after an interrupt

The base is the model before the new blocks: GPT-2 by name, one of your checkpoints, or `scratch`. A
base from scratch is trained first and kept under the data folder, in a file whose name hashes what
shapes it. A later run finds it there, and goes on with it if its training was cut short.

In order: the settings, the optimizer, one step, a run in files, the loop, the closing table, how
flags become settings, models, and the story (main). Shape names: see hml.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import flag
from data import (
    DATASETS,
    Split,
    check_vocabulary,
    get_batch,
    load_dataset,
    load_tokenizer,
    vocab_size,
)
from eval import perplexity, sum_nll
from model import GPT, PRETRAINED, GPTConfig, load_checkpoint, open_model, save_checkpoint
from upscale import (
    MEMORY,
    METHODS,
    PLACEMENT,
    NewBlocks,
    memory_sizes,
    set_trainable,
    summary,
    upscale,
)

# ---- Settings ------------------------------------------------------------------------------------
DTYPES = ("float32", "bfloat16")
PRESET_NAMES = ("tiny", "small", "gpt2", "smollm2")


@dataclasses.dataclass
class Settings(NewBlocks):
    """All that defines a run. Every field is a flag, those of NewBlocks (in upscale.py) too.

    A flag that is not given takes its value from the preset below, or from choose_settings(). What
    a run has no use for stays None.
    """

    # What is trained, and on what. `scratch` is a small model of our own. A frozen base is what
    # this line of work compares by (train: new); SOLAR was published with everything trained.
    upscale: str = flag(
        "how the base becomes deeper", "none", group="what", choices=("none", *METHODS)
    )
    base: str = flag("scratch (for pydocs, text), gpt2 (else), ..., smollm2, or a file or folder")
    base_dtype: str = flag("of a frozen base's weights", "float32", choices=DTYPES)
    dataset: str = flag("text to train on (default: the base's own, or pydocs)", choices=DATASETS)
    data_dir: str = flag("folder of data and caches (default ./data)", type=common.data_folder)
    tokenizer: str = flag("gpt2, gpt2:N, bytes (default: the base's; from scratch by dataset)")
    train: str = flag(
        "what learns: new, the new blocks (default for midus, llama-pro); all (else); or blocks by "
        "their numbers from 1: 2,4"
    )
    preset: str = flag("sizes and rates (default: by the base's width)", choices=PRESET_NAMES)

    # The shape of a base from scratch, and its own training before it is up-scaled.
    n_layer: int = flag("transformer blocks (by preset)", group="a base from scratch")
    n_head: int = flag("attention heads (by preset)")
    n_embd: int = flag("width; a multiple of n_head (by preset)")
    base_tokens: int = flag("training tokens of the base (by preset)")
    base_lr: float = flag("peak learning rate of the base (by preset)")

    # How it is trained. The rate rises for `warmup` steps, then falls to a tenth. grad_accum
    # changes the result by no more than rounding. An entry of a bank is read seldom, so it has few
    # steps to learn in: banks have a rate of their own [Lample et al. 2019].
    tokens: int = flag("training tokens (by preset; for gpt2 one epoch)", group="training")
    block_size: int = flag("tokens in a sequence (by preset)")
    batch_size: int = flag("sequences in an optimizer step (by preset)")
    grad_accum: int = flag("parts of a step's batch (on a GPU: as few as its memory allows)")
    lr: float = flag("peak learning rate (by preset)")
    memory_lr: float = flag("peak learning rate of memory banks (by preset)")
    weight_decay: float = flag("of matrices, never of banks", 0.1)
    warmup: int = flag(
        "steps of rising learning rate (default: 5%% of all)", type=common.seed_number
    )
    eval_every: int = flag("steps between validations (default: 10%% of all)")
    save_every: int = flag("steps between checkpoints (default: 10%% of all)")
    seed: int = flag("of new weights and the data's order", 0, type=common.seed_number)

    # What belongs to the machine.
    dtype: str = flag(
        "of autocast (default: bfloat16 where that is fast)",
        group="machine",
        choices=DTYPES,
    )
    compile: bool = flag("torch.compile the model (default: on CUDA, where Triton is)")
    threads: int = flag("of the CPU (default: as many as the model is worth)")

    def steps(self) -> int:
        return max(1, self.tokens // (self.batch_size * self.block_size))


# What is not given, by the size of the base; for the memory's sizes see upscale.py. The memory_lr
# of small and gpt2, and all else of gpt2, were not tried. smollm2's are for a CPU: a short run.
# fmt: off
PRESETS = {
    #              tiny       small      gpt2         smollm2
    "n_layer":     (4,         6,         12,          12),
    "n_head":      (4,         4,         12,          12),
    "n_embd":      (128,       256,       768,         768),
    "base_tokens": (1_600_000, 1_200_000, 200_000_000, 200_000_000),
    "base_lr":     (3e-3,      2e-3,      6e-4,        6e-4),
    "tokens":      (800_000,   600_000,   None,        60_000),  # None: one epoch
    "block_size":  (64,        256,       1024,        256),
    "batch_size":  (16,        16,        32,          4),
    "grad_accum":  (1,         1,         8,           1),
    "lr":          (2e-3,      1e-3,      2e-4,        2e-3),
    "memory_lr":   (3e-2,      3e-2,      1e-2,        5e-2),
}
# fmt: on
OF_SCRATCH = ("n_layer", "n_head", "n_embd", "base_tokens", "base_lr")
OF_THE_MACHINE = ("data_dir", "dtype", "compile", "threads", "grad_accum")  # may change on resume


# ---- Optimizer -----------------------------------------------------------------------------------
def make_optimizer(
    model: GPT, lr: float, memory_lr: float | None, weight_decay: float
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

    # Banks have a rate of their own, and no weight decay: it would shrink entries nobody has read.
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
    """Share of the peak rate at a step, from 0: a linear rise, then half a cosine to a tenth."""
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

    # Banks are clipped apart: neither kind's gradients shall scale the other's down.
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


# ---- A run in files ------------------------------------------------------------------------------
@dataclasses.dataclass
class Progress:
    """How far a run is. It is saved with model and settings: all that a resume needs.

    Training draws no random numbers, and batch i depends on i and the seed alone, so on a CPU a
    resumed run is bit for bit the one that was not interrupted.
    """

    text: str  # identity of the text it trains on
    step: int = 0
    seconds: float = 0.0  # spent in training steps
    history: list[dict] = dataclasses.field(default_factory=list)  # an entry per step
    rows: list[dict] = dataclasses.field(default_factory=list)  # of the closing table, so far
    optimizer: dict | None = None


def stem(path: str) -> str:
    """The name of a file or folder without what follows its first dot."""
    return os.path.basename(os.path.normpath(path)).split(".")[0]


def log_name(path: str) -> str:
    return path.removesuffix(".pt") + ".jsonl"


def save(path: str, model: GPT, settings: Settings, progress: Progress) -> None:
    """Writes the checkpoint, and the losses as lines of JSON beside it."""
    about = {name: getattr(settings, name) for name in ("tokenizer", "dataset", "data_dir")}
    about["method"] = settings.upscale
    about["settings"] = dataclasses.asdict(settings)
    save_checkpoint(path, model, **about, **vars(progress))
    with common.written_whole(log_name(path)) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in progress.history)


def progress_on_resume(saved: dict, text: Split, path: str) -> Progress:
    """What save() wrote. Raises ValueError if the text is another than then."""
    names = [field.name for field in dataclasses.fields(Progress)]
    progress = Progress(**{name: saved[name] for name in names})
    if progress.text != text.identity:
        raise ValueError(f"the data is not the text {path} was begun with; see --data_dir")
    return progress


def refuse_existing_files(out: str, overwrite: bool) -> None:
    """Raises ValueError where a new run would write over something, unless that is wanted."""
    for path in (out, log_name(out)):
        if os.path.exists(path) and not overwrite:
            ways = "--overwrite moves it aside, --resume goes on with it, --out names another file"
            raise ValueError(f"{path} exists; {ways}")


def move_old_files_aside(out: str) -> None:
    """Else a run that is killed before its first checkpoint would be resumed as the one before."""
    for path in (out, log_name(out)):
        if os.path.exists(path) and common.is_main():
            os.replace(path, f"{path}.old")


# ---- The loop ------------------------------------------------------------------------------------
def train(
    model: GPT,
    settings: Settings,
    progress: Progress,
    data: dict[str, Split],
    out: str,
    go_on: str,
) -> None:
    """Trains what of model requires gradients, from progress to the end of the run.

    Works in place, and keeps out up to date. go_on: the command that goes on after an interrupt.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, with everything saved, and FloatingPointError
    if the loss becomes NaN, with the last good checkpoint in place.
    """
    # A resumed run goes on with AdamW's running averages; they come with the groups they belong to.
    device = model.wte.weight.device
    optimizer = make_optimizer(model, settings.lr, settings.memory_lr, settings.weight_decay)
    if progress.optimizer is not None:
        optimizer.load_state_dict(progress.optimizer)

    # Several processes share the work; a compiled model does it in fewer, larger kernels.
    wrapped = model
    if common.process_count() > 1:
        wrapped = DistributedDataParallel(model)
    if settings.compile:
        wrapped = torch.compile(wrapped)

    # How many steps, and what happens when.
    steps = settings.steps()
    tokens_per_step = settings.batch_size * settings.block_size
    warmup = max(1, steps // 20) if settings.warmup is None else settings.warmup
    eval_every = settings.eval_every or max(1, steps // 10)
    save_every = settings.save_every or max(1, steps // 10)

    # What it is going to do. What was allocated before does not count as the training's memory.
    common.reset_peak_memory(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokenizer = os.path.basename(settings.tokenizer)
    text = f"{settings.tokens:,} tokens of {settings.dataset} ({tokenizer})"
    print(f"\ntraining {trained:,} parameters on {device}, {settings.dtype}: {text},")
    print(f"steps {progress.step} to {steps}, {tokens_per_step:,} tokens each, writing {out}")

    # A validation while it trains reads some windows, not the whole split.
    windows = max(1, min(64, 8192 // settings.block_size))
    sample = data["valid"].tokens[: windows * settings.block_size + 1]
    reported_step = progress.step
    reported_seconds = progress.seconds
    dtype = getattr(torch, settings.dtype)
    hidden = None if common.is_main() else True  # None: shown on a terminal
    bar = tqdm(total=steps, initial=progress.step, unit="step", disable=hidden, leave=False)
    with common.stop_signal() as stop, bar:
        while progress.step < steps:
            started = time.perf_counter()

            # The learning rate of this step.
            share_of_peak = schedule(progress.step, warmup, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share_of_peak

            # The batch of this step; with several processes, the part of this one.
            sizes = (settings.batch_size, settings.block_size)
            x, y = get_batch(data["train"].tokens, progress.step, *sizes, settings.seed)  # (B, T)
            x = x.chunk(common.process_count())[common.process_rank()].to(device)
            y = y.chunk(common.process_count())[common.process_rank()].to(device)

            # Forward, backward, update. The loss has come from the device, so the time is real.
            loss = train_step(wrapped, optimizer, (x, y), dtype, settings.grad_accum)
            loss = common.mean_over_processes(loss, device)
            progress.step += 1
            progress.seconds += time.perf_counter() - started
            entry = {"step": progress.step, "loss": loss}
            progress.history.append(entry)
            bar.update()

            # Now and then: the loss on text that it does not train on.
            if common.is_main() and progress.step % eval_every == 0:
                nll, count = sum_nll(model, sample)
                entry["valid_loss"] = nll / count
                seconds = progress.seconds - reported_seconds
                rate = (progress.step - reported_step) * tokens_per_step / seconds
                reported_step = progress.step
                reported_seconds = progress.seconds
                tqdm.write(
                    f"step {progress.step}/{steps}  loss: training {loss:.3f}, validation "
                    f"{nll / count:.3f} on {count:,} tokens  {rate:,.0f} tokens/s"
                )

            # Now and then, and at the end: everything that a resume needs. The loss was measured
            # before the update, which may have spoilt the weights: one window is scored first.
            stopping = common.true_in_any_process(stop.is_set(), device)
            due = progress.step % save_every == 0 or progress.step == steps
            if common.is_main() and (due or stopping):
                nll, count = sum_nll(model, sample[: settings.block_size + 1])
                if not math.isfinite(nll):
                    raise FloatingPointError(DIVERGED)
                progress.optimizer = optimizer.state_dict()
                save(out, model, settings, progress)
            if stopping:
                done = f"{out} is saved at step {progress.step} of {steps}"
                raise KeyboardInterrupt(f"interrupted; {done}; go on with: {go_on}")


# ---- The closing table ---------------------------------------------------------------------------
def run_name(settings: Settings) -> str:
    """What a run is called in tables and pictures: its method, or the model that it trains on."""
    if settings.upscale != "none":
        return settings.upscale
    return "base" if settings.base == "scratch" else stem(settings.base)


def sample(model: GPT, tokenizer_name: str, split: Split) -> str:
    """Up to eighty letters with which the model continues the first words of a text."""
    tokenizer = load_tokenizer(tokenizer_name)
    start = torch.from_numpy(split.tokens[:16].astype("int64"))[None]  # (1, 16)
    longest = 80 if tokenizer_name == "bytes" else 30
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = model.generate(start.to(model.wte.weight.device), longest, 0.8, 50)  # (1, T)
    known = [token for token in tokens[0, 16:].tolist() if token < tokenizer.n_vocab]
    words = " ".join(tokenizer.decode(known).split())[:80]
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def add_row(
    progress: Progress, label: str, model: GPT, data: dict[str, Split], settings: Settings
) -> None:
    """Adds a row to the closing table: sizes, perplexity on all of validation, a sample."""
    if not common.is_main():
        return

    # All of the split, so that rows can be compared to the last digit.
    nll, count = sum_nll(model, data["valid"].tokens, desc=f"validating {label}")
    new = [p for i in model.config.new for p in model.h[i].parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    row = {"label": label, "perplexity": perplexity(nll, count)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["added"] = sum(p.numel() for p in new)
    row["trained"] = sum(p.numel() for p in trained)
    if not progress.rows or not label.endswith("start"):  # there it says what the base says
        row["sample"] = sample(model, settings.tokenizer, data["valid"])
    progress.rows.append(row)


def print_table(progress: Progress, settings: Settings, valid: Split, device: torch.device) -> None:
    print(f"\nperplexity: token-level, validation split, {len(valid.tokens) - 1:,} tokens")
    print(f"{'':20}{'parameters':>14}{'added':>12}{'trained':>14}{'perplexity':>12}")
    for row in progress.rows:
        sizes = f"{row['parameters']:14,}{row['added']:12,}{row['trained']:14,}"
        print(f"{row['label']:20}{sizes}{row['perplexity']:12.4f}")
    # Speed counts training alone. Memory: on a GPU of the training, with its validations; else of
    # everything that this process has done.
    tokens = settings.steps() * settings.batch_size * settings.block_size
    rate = tokens / progress.seconds
    memory = common.peak_memory(device) / 2**20
    print(f"training: {rate:,.0f} tokens/s, peak memory {memory:,.0f} MiB")


def print_verdict(progress: Progress, settings: Settings, out: str) -> None:
    """What it came to, in words; what the model says; what to do next."""
    first = progress.rows[0]
    last = progress.rows[-1]
    change = f"{last['perplexity'] / first['perplexity'] - 1:+.1%}"
    name = run_name(settings)
    sentence = f"{name} {first['perplexity']:.2f} -> {last['perplexity']:.2f} ({change})"
    if settings.upscale != "none":
        start = progress.rows[1]["perplexity"]
        as_base = "exactly as the base" if start == first["perplexity"] else f"at {start:.2f}"
        more = f"{last['added']:,} parameters more; it started {as_base}"
        sentence = f"base {first['perplexity']:.2f} -> {name} {last['perplexity']:.2f} ({change})"
        sentence += f", {more}"
    print(f"\n{sentence}\n\nHow each goes on where the validation text begins:")
    for row in (first, last):
        print(f"    {row['label']:18}{row['sample']}")
    print(f"\nnext: python eval.py {out}")


def read_history(path: str) -> list[dict]:
    """The losses of a run, from the file beside its checkpoint. Raises ValueError if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            history = [json.loads(line) for line in file]
        if history and all({"step", "loss"} <= entry.keys() for entry in history):
            return history
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(f"--plot: {path} does not hold the losses of a run")


def draw(progress: Progress, settings: Settings, others: list[str], out: str) -> None:
    """The losses of this run, and of others beside it, in a picture named like the checkpoint."""
    histories = {stem(path): read_history(path) for path in others}
    histories[run_name(settings)] = progress.history
    picture = out.removesuffix(".pt") + ".png"
    common.plot_losses(histories, picture)
    print(f"drew {picture}")


# ---- From flags to settings ----------------------------------------------------------------------
def parse_arguments() -> tuple[argparse.Namespace, dict]:
    """The flags of the command itself, and the settings that were given, by name."""
    parser = common.Parser("Train a GPT, or up-scale one and train it on.")
    common.add_flags(parser, Settings)
    add = parser.add_argument
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--out", type=common.new_file(".pt"), default="ckpt.pt", help="(default ckpt.pt)")
    add("--plot", nargs="*", help="draw the losses, beside those of other runs' .jsonl files")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with --out, with the settings it has")
    add("--overwrite", action="store_true", help="move an old --out to OUT.old, and start anew")
    arguments = parser.parse_args()

    # What cannot be drawn is refused here, not after the work.
    if arguments.plot is not None:
        common.need_matplotlib()
        for path in arguments.plot:
            read_history(path)

    # Which settings were given matters: the others may still be chosen, or come from a checkpoint.
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return arguments, given


@dataclasses.dataclass
class Base:
    """What a run starts from."""

    name: str
    config: GPTConfig | None  # None: from scratch, as the settings will say
    info: dict  # what its file says of tokenizer and data
    model: GPT | None  # None: to be trained, or to be downloaded


def find_base(given: dict) -> Base:
    """The base that the flags ask for, read if it is a file. Raises ValueError if it is none."""
    at_home = given.get("dataset", "pydocs") in ("pydocs", "text")  # nothing is downloaded
    name = given.get("base", "scratch" if at_home else "gpt2")
    # Nothing is downloaded or trained yet: what can be refused comes first.
    if name == "scratch":
        return Base(name, config=None, info={}, model=None)
    if name in PRETRAINED:
        return Base(name, config=PRETRAINED[name], info={"tokenizer": "gpt2"}, model=None)
    model, info = open_model(name, given.get("data_dir", "data"))
    if hasattr(model.config, "rope_base"):  # rotary positions know no end
        model.config.block_size = given.get("block_size", model.config.block_size)
    return Base(name, config=model.config, info=info, model=model)


def pick_preset(base: Base, at_home: bool, given: dict) -> str:
    """The preset for the base's width; tiny or small for a base from scratch."""
    # Small text goes with a small model.
    if base.config is None:
        width = given.get("n_embd", 128 if at_home else 256)
        return "tiny" if width <= 128 else "small"
    if base.name == "smollm2":
        return "smollm2"
    if base.config.n_embd <= 128:
        return "tiny"
    return "small" if base.config.n_embd <= 512 else "gpt2"


def choose_settings(given: dict, base: Base, device: torch.device) -> Settings:
    """The settings of a new run. Flags override the base's values, which override the preset's."""
    dataset = given.get("dataset", base.info.get("dataset", "pydocs"))
    at_home = dataset in ("pydocs", "text")
    settings = Settings(base=base.name, dataset=dataset)
    settings.preset = given.get("preset", pick_preset(base, at_home, given))
    for name, values in PRESETS.items():
        setattr(settings, name, values[PRESET_NAMES.index(settings.preset)])

    # What the base and the machine ask for.
    if base.config and settings.preset != "smollm2":
        settings.block_size = base.config.block_size
    settings.tokenizer = base.info.get("tokenizer", "bytes" if at_home else "gpt2")
    settings.data_dir = os.path.abspath(base.info.get("data_dir", "data"))
    settings.dtype = "bfloat16" if common.has_bf16(device) else "float32"
    width = given.get("n_embd", settings.n_embd) if base.config is None else base.config.n_embd
    for name, value in memory_sizes(width).items():
        setattr(settings, name, value)
    settings.threads = common.threads_for(width)
    choose_for_machine(settings, device)

    # The flags, and what hangs on them. A base that is not up-scaled is itself what is trained.
    for name, value in given.items():
        setattr(settings, name, value)
    if settings.train is None:
        settings.train = "new" if settings.upscale in ("midus", "llama-pro") else "all"
    if base.name == "scratch" and settings.upscale == "none":
        settings.lr = given.get("lr", settings.base_lr)
        settings.tokens = given.get("tokens", settings.base_tokens)
    return settings


def choose_for_machine(settings: Settings, device: torch.device) -> None:
    """What a GPU does otherwise than a CPU, where no flag says."""
    if device.type != "cpu":
        settings.grad_accum = None  # as few parts as fit: see parts_that_fit()
    settings.compile = device.type == "cuda" and find_spec("triton") is not None


def drop_useless_settings(settings: Settings, base: Base, given: dict) -> None:
    """Sets to None what this run has no use for. Raises ValueError if it was given as a flag."""
    # For each: the settings, and why they are of no use.
    useless = []
    if base.name != "scratch":
        useless.append((OF_SCRATCH, f"this run has --base {base.name}; add --base scratch"))
    if settings.upscale == "none":
        useless.append((("base_tokens", "base_lr"), "only with --upscale; say --tokens, --lr"))
        useless.append((PLACEMENT, "only with --upscale; this run inserts no blocks"))
    if settings.upscale != "midus":
        useless.append((MEMORY, "only with --upscale midus"))
        if base.config is None or "M" not in base.config.blocks:
            useless.append((("memory_lr",), "there are no memory blocks"))

    for names, why in useless:
        flags = [f"--{name}" for name in names if name in given]
        if flags:
            raise ValueError(f"{', '.join(flags)}: {why}")
        for name in names:
            setattr(settings, name, None)


def refuse_contradictions(settings: Settings, base: Base) -> GPT:
    """Raises ValueError for settings that cannot be together.

    Returns the model that they ask for, without memory for its weights.
    """
    # A base reads the tokens that it was trained on, no more of them at once than it has positions.
    theirs = base.info.get("tokenizer", settings.tokenizer)
    if settings.tokenizer != theirs:
        raise ValueError(f"--tokenizer {settings.tokenizer}: the base was trained with {theirs}")
    config = base.config or scratch_config(settings)
    check_vocabulary(settings.tokenizer, config.vocab_size)
    if settings.block_size > config.block_size:
        positions = f"the base's {config.block_size} positions"
        raise ValueError(f"--block_size {settings.block_size} is more than {positions}")

    if settings.base_dtype != "float32" and (settings.upscale == "none" or settings.train != "new"):
        raise ValueError("--base_dtype: only a frozen base can be kept so (--upscale, --train new)")

    # A trial without memory for weights: it refuses all that up-scaling and the blocks refuse.
    with torch.device("meta"):
        model = GPT(config) if base.model is None else type(base.model)(config)
        if settings.upscale != "none":
            model = deepen(model, settings)
        set_trainable(model, settings.train)
    return model


def parts_that_fit(model: GPT, settings: Settings, device: torch.device) -> int:
    """In how many parts a GPU has to take a step's batch; by a rough count, on the safe side."""
    if device.type == "mps":
        sequences = 8  # of more, logits were wrong in several versions (PyTorch issue 109457)
    else:
        # Weights, gradients and AdamW's two averages, all fp32; a GiB for CUDA and for logits.
        # Then, in bf16, what a block keeps for the backward pass: about 60 bytes per token and unit
        # of width (`bench.py --tables saved` counts it); in fp32 twice as much.
        free, _ = torch.cuda.mem_get_info(device)
        weights = 16 * sum(parameter.numel() for parameter in model.parameters())
        size = 60 if settings.dtype == "bfloat16" else 120
        one = size * settings.block_size * model.config.n_embd * model.config.n_layer
        sequences = max(1, int(0.8 * (free - weights - 2**30) / one))

    # The fewest equal parts of which none holds more.
    batch = settings.batch_size // common.process_count()
    for parts in range(1, batch + 1):
        if batch % parts == 0 and batch // parts <= sequences:
            return parts
    return max(1, batch)


def refuse_uneven_parts(settings: Settings) -> None:
    """Raises ValueError unless a batch can be cut evenly, for processes and into parts."""
    processes = common.process_count()
    if settings.batch_size % (settings.grad_accum * processes):
        factor = f"--grad_accum times {processes} processes"
        raise ValueError(f"{factor} must divide the batch of {settings.batch_size}")


def settings_on_resume(saved: dict, given: dict, out: str) -> Settings:
    """The settings that the run in out was begun with. Only the machine's may be others now."""
    names = {field.name for field in dataclasses.fields(Settings)}
    if "step" not in saved or names != set(saved.get("settings", ())):
        way = "name it as --base to train it"
        raise ValueError(f"{out} was not written by this version of train.py; {way}")

    # A flag may repeat what the checkpoint says; it may not say something else.
    settings = Settings(**saved["settings"])
    for name, value in given.items():
        begun_with = getattr(settings, name)
        if name not in OF_THE_MACHINE and value != begun_with:
            raise ValueError(f"--{name} contradicts {out}, begun with {begun_with}; drop the flag")
        setattr(settings, name, value)
    return settings


def print_settings(settings: Settings, device: torch.device) -> None:
    """A block per group of flags, three settings a line, without those that are of no use."""
    # The first field of a group names it.
    groups = {}
    for field in common.own_fields_first(Settings):
        if field.metadata["group"]:
            shown = groups[field.metadata["group"]] = []
        value = getattr(settings, field.name)
        if value is not None:
            shown.append(f"{field.name:12} {value!s:13}")
    for group, shown in groups.items():
        if shown:
            print(group)
        for first in range(0, len(shown), 3):
            print("   ", "  ".join(shown[first : first + 3]).rstrip())
    if device.type == "cuda" and not common.has_bf16(device):
        print("this card does not compute in bf16: it trains in fp32 (fp16 is not offered)")


# ---- From settings to models ---------------------------------------------------------------------
def scratch_config(settings: Settings) -> GPTConfig:
    shape = (settings.n_layer, settings.n_head, settings.n_embd, settings.block_size)
    return GPTConfig(*shape, vocab_size(settings.tokenizer))


def deepen(base: GPT, settings: Settings) -> GPT:
    """The base with new blocks in it; those are in fp32 even if the base is not."""
    options = {name: getattr(settings, name) for name in PLACEMENT + MEMORY}
    given = {name: value for name, value in options.items() if value is not None}
    model = upscale(base, settings.upscale, **given)
    for i in model.config.new:
        model.h[i].float()
    return model


def settings_of_scratch_base(settings: Settings) -> Settings:
    """The run that trains the base of this one: the same, but nothing is inserted."""
    # What shapes the deeper model must not be in the hash of its base.
    own = dataclasses.replace(settings, upscale="none", train="all", base_dtype="float32")
    own.tokens = settings.base_tokens
    own.lr = settings.base_lr
    for name in (*PLACEMENT, *MEMORY, "memory_lr", "base_tokens", "base_lr"):
        setattr(own, name, None)
    for name in ("warmup", "eval_every", "save_every"):  # by its own length
        setattr(own, name, None)
    return own


def path_of_scratch_base(settings: Settings, text: Split) -> str:
    """Where that base is kept. The name hashes the settings and the text that shape its weights."""
    shaping = dataclasses.asdict(settings)
    for name in ("data_dir", "compile", "threads", "preset"):
        del shaping[name]
    everything = json.dumps([shaping, text.identity], sort_keys=True)
    key = hashlib.sha256(everything.encode()).hexdigest()[:12]
    return os.path.join(settings.data_dir, f"base-{key}.pt")


# ---- The story -----------------------------------------------------------------------------------
def get_base(base: Base, settings: Settings, data: dict[str, Split], device: torch.device) -> GPT:
    """The base, on the device. One from scratch that is to be up-scaled is trained here first."""
    if base.name in PRETRAINED:
        model, _ = common.main_process_first(lambda: open_model(base.name, settings.data_dir))
        return model.to(device)
    if base.name != "scratch":
        return base.model.to(device)

    torch.manual_seed(settings.seed)
    model = GPT(scratch_config(settings))
    if settings.upscale == "none":
        return model.to(device)  # to train it is this run's own work

    # It is trained in a run of its own, which may have been done, or interrupted, before.
    settings = settings_of_scratch_base(settings)
    path = path_of_scratch_base(settings, data["train"])
    progress = Progress(data["train"].identity)
    if os.path.exists(path):
        model, saved = load_checkpoint(path)
        progress = progress_on_resume(saved, data["train"], path)
    model = model.to(device)
    if progress.step == settings.steps():
        print(f"\nbase: {path}, trained already")
        return model
    print(f"\nbase: {path}, step {progress.step} of {settings.steps()}")
    train(model, settings, progress, data, path, go_on="the same command")
    return model


def main() -> None:
    arguments, given = parse_arguments()
    device = common.join_processes(common.pick_device(arguments.device))
    out = arguments.out

    # Settings. Whatever can be refused is refused here, before anything long begins.
    if arguments.resume:
        model, saved = load_checkpoint(out)
        settings = settings_on_resume(saved, given, out)
    else:
        refuse_existing_files(out, arguments.overwrite)
        base = find_base(given)
        settings = choose_settings(given, base, device)
        drop_useless_settings(settings, base, given)
        model = refuse_contradictions(settings, base)
    if settings.grad_accum is None:
        settings.grad_accum = parts_that_fit(model, settings, device)
    refuse_uneven_parts(settings)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)

    # Text. A first batch refuses a split that is too short.
    source = (settings.dataset, settings.tokenizer, settings.data_dir, ("train", "valid"))
    data = common.main_process_first(lambda: load_dataset(*source))
    text = data["train"]
    get_batch(text.tokens, 0, settings.batch_size, settings.block_size, settings.seed)
    settings.tokens = settings.tokens or len(text.tokens)  # one epoch
    print_settings(settings, device)

    if arguments.resume:
        progress = progress_on_resume(saved, text, out)
        model = model.to(device)
        set_trainable(model, settings.train)
    else:
        # 1. The base.
        move_old_files_aside(out)
        progress = Progress(text.identity)
        model = get_base(base, settings, data, device)

        # 2. Deeper, and at the start exactly the same (but for solar).
        if settings.upscale != "none":
            base_model = model.to(getattr(torch, settings.base_dtype)).requires_grad_(False)
            torch.manual_seed(settings.seed)
            model = deepen(base_model, settings)
            print(summary(base_model, model))
            add_row(progress, "base", base_model, data, settings)
            del base_model
            base.model = None
        set_trainable(model, settings.train)
        add_row(progress, f"{run_name(settings)}, start", model, data, settings)

    # 3. Continual pre-training.
    train(model, settings, progress, data, out, go_on=f"python train.py --resume --out {out}")

    # 4. What it was worth. Rank 0 tells.
    if common.is_main():
        add_row(progress, f"{run_name(settings)}, end", model, data, settings)
        print_table(progress, settings, data["valid"], device)
        print_verdict(progress, settings, out)
        if arguments.plot is not None:
            draw(progress, settings, arguments.plot, out)
    common.leave_processes()


if __name__ == "__main__":
    common.run_command(main)
