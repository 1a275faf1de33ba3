"""
Which way to deepen a model is worth most? Every method on one base, with the same batches in the
same order. Measured on the new text, which it learns, and on the old text, which it may forget.

    python experiments/compare.py --methods none llama-pro midus --tokens 4e5 --plot plot.png
    python experiments/compare.py --base base.pt --dataset wikitext2 --data_dir wikitext-2 \\
        --old_dataset text --old_data_dir novels --methods none llama-pro midus --seeds 3

The first line is for a laptop: train.py's tiny base, on Python's documentation.

A method is `none`, one of upscale.py (midus, llama-pro, solar), of baselines.py (stack, stack-top,
average, opt-deus, lesa), or of ablations.py (pkm, ladder, ...). Its options follow after colons:
midus:query=block:n_keys=64:positions=1,3. `none` inserts nothing and trains the blocks that
llama-pro would have copied. solar, stack and lesa were published with every block trained: see
--train.

Rates are chosen for each method on seed 0 by the validation split of the new text, in runs of
--rate_tokens: first --lrs, with the bank's rate in the middle of --memory_lrs, then --memory_lrs
with the best lr. Each search starts in the middle and stops where both neighbours are worse. The
figures are of seeds 1, 2, ... and of the test splits, which nothing else reads. Every run is
measured at five points on its way, so that a curve of new against old can be drawn.

Finished runs are lines of the file --results; a run that is there is not made again. What the code
does is not part of a run's name: after changing some, delete its lines. Shape names: see hml.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import baselines
import common
import train
from ablations import VARIANTS, WITHOUT_MEMORY
from common import real_number, whole_number, whole_numbers
from data import DATASETS, check_vocabulary, get_batch, load_dataset, load_tokenizer
from eval import count_usage, usage
from facts import read_questions, recall
from model import GPT, open_model
from train import make_optimizer, schedule, train_step
from upscale import place, set_trainable, upscale

EVAL_SEED = 0  # of which windows of a text are measured


# ---- Methods -------------------------------------------------------------------------------------
COPIES = {
    "stack": baselines.stack,
    "stack-top": lambda base, n_new: baselines.stack(base, n_new, on_top=True),
    "average": baselines.average,
    "opt-deus": baselines.opt_deus,
    "lesa": baselines.lesa,
}
WITH_MEMORY = ("midus", *(name for name in VARIANTS if name not in WITHOUT_MEMORY))
PLACED = ("none", "llama-pro", *WITHOUT_MEMORY, *WITH_MEMORY)
METHODS = (*PLACED, "solar", *COPIES)


def yes_or_no(text: str) -> bool:
    """1 or 0, as a boolean."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text} is neither 1 nor 0")
    return text == "1"


# How the text of each option is read.
FOR_ALL = {"n_new": whole_number, "tokens": whole_number, "lr": real_number}
FOR_PLACED = {"positions": whole_numbers}
FOR_MEMORY = {
    "memory_lr": real_number,
    "n_keys": whole_number,
    "top_k": whole_number,
    "d_latent": whole_number,
    "query_norm": yes_or_no,
}
FOR_MIDUS = {"query": str}
FOR_LADDER = {
    "query": str,
    "residual": yes_or_no,
    "write": str,
    "centred": yes_or_no,
    "key_scale": real_number,
    "value_scale": real_number,
    "shared": yes_or_no,
}


def known_options(method: str) -> dict[str, Callable]:
    """The options that a method takes, each with the function that reads it."""
    known = dict(FOR_ALL)
    if method in PLACED:
        known.update(FOR_PLACED)
    if method in WITH_MEMORY:
        known.update(FOR_MEMORY)
    if method == "midus":
        known.update(FOR_MIDUS)
    if method == "ladder":
        known.update(FOR_LADDER)
    return known


@dataclasses.dataclass
class Method:
    label: str  # as it was typed
    name: str
    options: dict


def read_method(label: str) -> Method:
    """ "midus:n_keys=64" -> its name and its options. Raises ValueError if it cannot be read."""
    name, *parts = label.split(":")
    if name not in METHODS:
        raise ValueError(f"--methods: {name} is none of {', '.join(METHODS)}")
    known = known_options(name)
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if option not in known or not equals:
            raise ValueError(f"--methods: cannot read {part!r}; {name} takes {', '.join(known)}")
        try:
            options[option] = known[option](value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--methods: {part!r}: {error}") from None
    return Method(label, name, options)


def chosen(options: dict, names: tuple) -> dict:
    """Those of the options that have one of these names."""
    return {name: value for name, value in options.items() if name in names}


def build(base: GPT, method: str, options: dict) -> tuple[GPT, str]:
    """The deeper model, and what of it trains when only new blocks do.

    Raises ValueError for what cannot be.
    """
    where = chosen(options, ("positions", "n_new"))
    if method == "none":
        blocks = place(base.config.n_layer, False, **where)
        return base, ",".join(str(block) for block in blocks)
    if method in COPIES:
        return COPIES[method](base, options["n_new"]), "new"
    if method in ("llama-pro", "solar"):
        return upscale(base, method, **where), "new"

    # A memory block, and what a variant makes of it.
    sizes = chosen(options, ("n_keys", "top_k", "d_latent", "query_norm"))
    if method == "midus":
        return upscale(base, "midus", **where, **sizes, **chosen(options, tuple(FOR_MIDUS))), "new"
    model = upscale(base, "midus", **where, **sizes)
    if method == "ladder":
        VARIANTS["ladder"](model, **chosen(options, tuple(FOR_LADDER)))
    else:
        VARIANTS[method](model)
    return model, "new"


# ---- One run -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides what a run gives. Two runs that are equal here are the same run."""

    base: str  # sha256 of its configuration and weights
    new_text: str  # identities of the texts
    old_text: str | None
    questions: str | None
    method: str
    options: dict
    train: str  # "new" or "all"
    tokens: int
    batch_size: int
    grad_accum: int
    lr: float
    memory_lr: float | None  # None: there are no banks
    weight_decay: float
    eval_tokens: int
    n_points: int  # how often it is measured, at equal distances
    split: str  # that it is measured on
    seed: int
    device: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are on this machine, and how much of it a run may take."""

    base: str
    dataset: str
    data_dir: str
    old_dataset: str | None
    old_data_dir: str
    facts: str | None
    threads: int
    show: bool  # a bar for the steps


def some_windows(dataset: str, tokenizer: str, folder: str, split: str, run: Run, T: int) -> Tensor:
    """Windows from all over a split, (W, T + 1): the same for every method."""
    tokens = load_dataset(dataset, tokenizer, folder, (split,))[split].tokens
    wanted = run.eval_tokens // T
    there = (len(tokens) - 1) // T - 1
    x, y = get_batch(tokens, 0, max(1, min(wanted, there)), T, EVAL_SEED)  # both (W, T)
    return torch.cat((x, y[:, -1:]), dim=1)


@torch.no_grad()
def perplexity_on(model: GPT, windows: Tensor) -> float:
    """Token-level perplexity on windows (W, T + 1)."""
    device = model.wte.weight.device
    at_once = max(1, 1024 // windows.size(1))
    total = 0.0
    for part in windows.to(device).split(at_once):
        total += model(part[:, :-1], part[:, 1:]).item() * len(part)
    mean = total / len(windows)
    return math.exp(min(mean, 700))


@dataclasses.dataclass
class Yardstick:
    """What a model is measured by."""

    new: Tensor  # windows (W, T + 1)
    old: Tensor | None
    questions: list[dict] | None
    tokenizer: str

    def measure(self, model: GPT) -> dict:
        """Perplexity on the new and on the old text; facts known; slots ever best, by block."""
        model.eval()
        figures = {}
        if has_memory(model):
            with count_usage(model) as counts:
                figures["new"] = perplexity_on(model, self.new)
            figures["used"] = [usage(reads)["top1"] for reads in counts.values()]
        else:
            figures["new"] = perplexity_on(model, self.new)
        if self.old is not None:
            figures["old"] = perplexity_on(model, self.old)
        if self.questions is not None:
            figures["recall"] = recall(model, load_tokenizer(self.tokenizer), self.questions)
        model.train()
        return figures


def make_yardstick(run: Run, places: Places, tokenizer: str, block_size: int) -> Yardstick:
    new = some_windows(places.dataset, tokenizer, places.data_dir, run.split, run, block_size)
    old = None
    if places.old_dataset is not None:
        where = (places.old_dataset, tokenizer, places.old_data_dir)
        old = some_windows(*where, run.split, run, block_size)
    questions = None
    if places.facts is not None:
        questions = read_questions(places.facts, run.split)
    return Yardstick(new, old, questions, tokenizer)


def has_memory(model: GPT) -> bool:
    return any(hasattr(model.h[i], "memory") for i in model.config.new)


def look(model: GPT, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict:
    """Inside the memory on one batch: entropy of a read's weights in nats, gradient norms by kind.

    Changes nothing.
    """
    # A hook after the search sees the weights of every read.
    entropies = []

    def watch(module, inputs, reads: tuple[Tensor, Tensor]) -> None:
        weights = reads[0].detach()  # (B, T, H, k)
        entropies.append(torch.special.entr(weights).sum(dim=-1).mean().item())

    hooks = [model.h[i].memory.product_keys.register_forward_hook(watch) for i in model.config.new]
    model.eval()  # a running mean of queries stays as it is
    with torch.autocast(batch[0].device.type, dtype, enabled=dtype != torch.float32):
        loss = model(*batch)
    loss.backward()
    model.train()
    for hook in hooks:
        hook.remove()

    # Over all memory blocks together.
    norms = {}
    for kind in ("hive.bank", "hive.proj", "product_keys.keys", "attn.c_attn"):
        squares = 0.0
        for i in model.config.new:
            for name, parameter in model.h[i].named_parameters():
                if kind in name and parameter.grad is not None:
                    squares += parameter.grad.square().sum().item()
        norms[kind] = math.sqrt(squares)
    model.zero_grad()
    return {"entropy": statistics.mean(entropies), "gradients": norms}


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def make(run: Run, places: Places) -> dict:
    """Trains one model. Returns the run's fields and its figures, as plain types."""
    torch.set_num_threads(places.threads)
    device = torch.device(run.device)
    base, info = open_model(places.base, places.data_dir)
    base = limit_window(base).to(device)
    T = base.config.block_size
    tokenizer = info["tokenizer"]
    text = load_dataset(places.dataset, tokenizer, places.data_dir, ("train",))["train"].tokens
    yardstick = make_yardstick(run, places, tokenizer, T)

    # The model.
    torch.manual_seed(run.seed)
    model, new = build(base, run.method, run.options)
    model = model.to(device)
    set_trainable(model, new if run.train == "new" else "all")
    optimizer = make_optimizer(model, run.lr, run.memory_lr, run.weight_decay)
    dtype = getattr(torch, run.dtype)
    inside = run.seed == 1 and has_memory(model)  # one seed is looked into
    result = dataclasses.asdict(run)
    added = {p for i in model.config.new for p in model.h[i].parameters()}  # a shared one once
    result["added"] = count(added)
    result["trained"] = count(p for p in model.parameters() if p.requires_grad)

    # The same loop for every method. A thread of its own on a CPU is timed by the processor's
    # clock, which does not mind what else runs.
    steps = max(1, run.tokens // (run.batch_size * T))
    measured_after = {steps * i // run.n_points for i in range(run.n_points + 1)}
    alone = device.type == "cpu" and places.threads == 1
    clock = time.process_time if alone else time.perf_counter
    seconds = 0.0
    losses = []
    points = []
    try:
        hidden = None if places.show else True
        for step in tqdm(range(steps + 1), unit="step", disable=hidden, leave=False):
            batch = get_batch(text, step, run.batch_size, T, run.seed)
            batch = (batch[0].to(device), batch[1].to(device))  # both (B, T)
            if step in measured_after:
                points.append({"step": step, **yardstick.measure(model)})
                if inside:
                    part = run.batch_size // run.grad_accum  # no more memory than a step takes
                    points[-1].update(look(model, (batch[0][:part], batch[1][:part]), dtype))
            if step == steps:
                break
            start = clock()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, max(1, steps // 20), steps)
            losses.append(train_step(model, optimizer, batch, dtype, run.grad_accum))
            seconds += clock() - start
        result["diverged"] = not math.isfinite(points[-1]["new"])
    except FloatingPointError:
        result["diverged"] = True
    result["points"] = points
    result["losses"] = [round(loss, 4) for loss in losses[:: max(1, steps // 50)]]
    result["seconds"] = seconds
    result["rate"] = len(losses) * run.batch_size * T / max(seconds, 1e-9)
    result["threads"] = places.threads
    result["torch"] = torch.__version__
    return result


def limit_window(base: GPT) -> GPT:
    """A Llama reads windows of any length; here they are short."""
    if hasattr(base.config, "rope_base"):
        base.config.block_size = min(base.config.block_size, 256)
    return base


# ---- Many runs -----------------------------------------------------------------------------------
FIELDS = [field.name for field in dataclasses.fields(Run)]


def read_results(path: str) -> list[dict]:
    """The finished runs; what a fault left of a last line is dropped.

    Raises ValueError, and changes nothing, if the file is something else.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        *lines, last = file.read().split("\n")
    refusal = f"{path} is not a results file of this script; name another with --results"
    try:
        done = [json.loads(line) for line in lines]
    except ValueError:
        raise ValueError(refusal) from None

    # The last line may lack its end, or no more than that.
    if last:
        try:
            done.append(json.loads(last))
        except ValueError:
            if not lines and not last.startswith('{"base": "'[: len(last)]):
                raise ValueError(refusal) from None
    for run in done:
        if not isinstance(run, dict) or not {*FIELDS, "points"} <= run.keys():
            raise ValueError(refusal)
    if last:
        with common.written_whole(path) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(run) + "\n" for run in done)
    return done


def find(run: Run, done: list[dict]) -> dict | None:
    """The finished run that is equal to this one."""
    wanted = dataclasses.asdict(run)
    for result in done:
        if all(result[name] == wanted[name] for name in FIELDS):
            return result
    return None


def make_apart(run: Run, places: Places) -> dict:
    """make() in a fresh process, so that none inherits another's memory or random numbers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(make, run, places).result()
        except BrokenProcessPool:
            # What kills a process is nearly always a lack of memory.
            raise MemoryError(f"{run.method}: a run was killed; try fewer --jobs") from None


def make_all(runs: list[Run], places: Places, jobs: int, path: str, done: list[dict]) -> None:
    """Makes the runs that are not done, and adds each to done and to the file when it ends."""
    missing = []
    for run in runs:
        if find(run, done) is None and run not in missing:
            missing.append(run)
    if not missing:
        return
    print(f"{len(missing)} runs to make", flush=True)

    # One that fails does not take the others with it.
    failure = None
    bar = tqdm(total=len(missing), unit="run", disable=None, leave=False)
    with bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(make_apart, run, places) for run in missing]
        try:
            for future in as_completed(futures):
                bar.update()
                if future.exception() is not None:
                    failure = future.exception()
                    continue
                result = future.result()
                done.append(result)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                tqdm.write(describe(result))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failure is not None:
        raise failure


def describe(result: dict) -> str:
    """A line about a finished run."""
    options = " ".join(f"{name}={value}" for name, value in result["options"].items())
    banks = "" if result["memory_lr"] is None else f"banks {result['memory_lr']:g}, "
    rates = f"lr {result['lr']:g}, {banks}seed {result['seed']}"
    line = f"{result['method']} {options}; {result['train']}; {rates}:"
    if result["diverged"]:
        return f"{line} diverged"
    end = result["points"][-1]
    figures = [f"{name} {end[name]:.4g}" for name in ("new", "old", "recall") if name in end]
    return f"{line} {result['split']}, {', '.join(figures)}"


# ---- Rates ---------------------------------------------------------------------------------------
def at_the_end(result: dict) -> float:
    """Perplexity on the new text at the end of a run; infinite if it diverged."""
    return math.inf if result["diverged"] else result["points"][-1]["new"]


def best(runs: dict[float, Run], done: list[dict], label: str, what: str) -> float:
    """The rate of the best of these runs; says so when it lies at the edge of those tried."""
    results = {rate: find(run, done) for rate, run in runs.items()}
    ends = {rate: at_the_end(result) for rate, result in results.items() if result is not None}
    rate = min(ends, key=ends.get)
    tried = ", ".join(f"{tried:g}: {end:.4g}" for tried, end in sorted(ends.items()))
    note = ""
    if rate in (min(ends), max(ends)):
        note = "; at the edge of those tried"
    print(f"{label}: {what} {rate:g} ({tried}{note})")
    return rate


@dataclasses.dataclass
class Choice:
    """The rates of a method, and the runs that chose them."""

    lr: float
    memory_lr: float | None
    trials: list[Run]


def choose_rates(
    methods: list[Method],
    first: dict[str, Run],
    args: argparse.Namespace,
    done: list[dict],
    make_them: Callable[[list[Run]], None],
) -> dict[str, Choice]:
    """What is best for each method, by label. first: a run of each, to be varied."""
    # Trials have a seed and a split of their own, and may be shorter.
    trials = {}
    for label, run in first.items():
        tokens = args.rate_tokens or run.tokens
        trial = dataclasses.replace(run, tokens=tokens, n_points=1, split="valid", seed=0)
        trials[label] = trial

    # First lr, with the bank's rate in the middle: all pairs would be too many.
    middle = args.memory_lrs[len(args.memory_lrs) // 2]
    first_bank = {}
    of_lr = {}
    for method in methods:
        lrs = [method.options["lr"]] if "lr" in method.options else args.lrs
        bank = method.options.get("memory_lr", middle) if method.name in WITH_MEMORY else None
        first_bank[method.label] = bank
        of_lr[method.label] = {lr: vary(trials[method.label], lr, bank) for lr in lrs}
    lr_of = search(of_lr, "lr", done, make_them)

    # Then the bank's, with that lr.
    of_bank = {}
    for method in methods:
        banks = [first_bank[method.label]]
        if method.name in WITH_MEMORY and "memory_lr" not in method.options:
            banks = args.memory_lrs
        trial = trials[method.label]
        of_bank[method.label] = {bank: vary(trial, lr_of[method.label], bank) for bank in banks}
    bank_of = search(of_bank, "banks", done, make_them)

    choices = {}
    for label in first:
        runs = [*of_lr[label].values(), *of_bank[label].values()]
        made = [run for run in runs if find(run, done) is not None]
        choices[label] = Choice(lr_of[label], bank_of[label], made)
    return choices


def search(
    trials: dict[str, dict[float, Run]],
    what: str,
    done: list[dict],
    make_them: Callable[[list[Run]], None],
) -> dict[str, float]:
    """The best rate of each method; trials: by label, a run for each rate. One alone is taken.

    Each method starts in the middle of its rates and goes on while a neighbour is better. So a wide
    grid costs no more than a narrow one, and the best seldom lies at its edge.
    """
    several = {label: runs for label, runs in trials.items() if len(runs) > 1}
    while True:
        missing = []
        for runs in several.values():
            missing += [run for run in around_the_best(runs, done) if find(run, done) is None]
        if not missing:
            break
        make_them(missing)

    chosen_rates = {}
    for label, runs in trials.items():
        if label in several:
            chosen_rates[label] = best(runs, done, label, what)
        else:
            (chosen_rates[label],) = runs
    return chosen_rates


def around_the_best(runs: dict[float, Run], done: list[dict]) -> list[Run]:
    """The best run so far, or the one in the middle, and its two neighbours."""
    rates = sorted(runs)
    ends = {}
    for i, rate in enumerate(rates):
        result = find(runs[rate], done)
        if result is not None:
            ends[i] = at_the_end(result)
    centre = min(ends, key=ends.get) if ends else len(rates) // 2
    return [runs[rate] for rate in rates[max(0, centre - 1) : centre + 2]]


def vary(run: Run, lr: float, memory_lr: float | None) -> Run:
    return dataclasses.replace(run, lr=lr, memory_lr=memory_lr)


# ---- Table and picture ---------------------------------------------------------------------------
def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """Mean, and half the range where there are several."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
    return text


def curve_of(runs: list[dict]) -> list[dict]:
    """The points of a method: at each, the means over seeds."""
    ended = [run["points"] for run in runs if not run["diverged"]]
    curve = []
    for same in zip(*ended):
        point = {}
        for name in ("step", "new", "old", "recall"):
            if name in same[0]:
                point[name] = statistics.mean(p[name] for p in same)
        curve.append(point)
    return curve


def old_at(curve: list[dict], level: float) -> float | None:
    """Perplexity on the old text where that on the new one falls to level; None if it does not.

    Between two points, on a straight line of logarithms.
    """
    for before, after in zip(curve, curve[1:]):
        if before["new"] > level >= after["new"]:
            whole = math.log(before["new"] / after["new"])
            share = math.log(before["new"] / level) / whole
            return before["old"] * (after["old"] / before["old"]) ** share
    return None


def front(points: list[dict]) -> list[dict]:
    """Those that no other beats on both texts, from the least learned to the most."""
    kept = []
    for point in sorted(points, key=lambda point: point["new"]):
        if not kept or point["old"] < kept[-1]["old"]:
            kept.append(point)
    return kept[::-1]


def print_costs(choices: dict[str, Choice], done: list[dict], levels: list[int]) -> None:
    """What the new text costs: a column for each level, over the rates that were tried."""
    lines = []
    for label, choice in choices.items():
        trials = [find(run, done) for run in choice.trials]
        ends = front([trial["points"][-1] for trial in trials if not trial["diverged"]])
        costs = [old_at(ends, level) for level in levels]
        line = [label, *("-" if cost is None else f"{cost:.1f}" for cost in costs)]
        lines.append(line)
    print("\nWhat the new text costs: perplexity on the old one where the new has come down to")
    print("this, between the ends of runs with several rates (seed 0, validation splits)\n")
    common.print_table(["new blocks", *map(str, levels)], lines)


def print_rows(base: dict, rows: dict[str, list[dict]]) -> None:
    """The table: the base, then each method by its label, with its runs."""
    more = [name for name in ("old", "recall") if name in base]
    header = ["new blocks", "added M", "trained M", "lr", "banks", "start", "new text"]
    header += ["old text" if name == "old" else "facts known" for name in more]
    header += ["slots ever best", "tokens/s"]
    first = ["(base)", "", "", "", "", "", f"{base['new']:.2f}"]
    first += [f"{base[name]:.2f}" for name in more]
    lines = [first + [""] * (len(header) - len(first))]

    for label, runs in rows.items():
        ended = [run for run in runs if not run["diverged"]]
        diverged = len(runs) - len(ended)
        one = runs[0]
        line = [label + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")]
        line += [f"{one['added'] / 1e6:.2f}", f"{one['trained'] / 1e6:.2f}", f"{one['lr']:g}"]
        line.append("" if one["memory_lr"] is None else f"{one['memory_lr']:g}")
        line.append(f"{one['points'][0]['new']:.2f}")
        for name in ("new", *more):
            line.append(mean_and_spread([run["points"][-1][name] for run in ended]))
        used = ended[0]["points"][-1].get("used", []) if ended else []
        line.append(" / ".join(f"{100 * share:.0f}" for share in used) + (" %" if used else ""))
        line.append(f"{statistics.mean(run['rate'] for run in runs):,.0f}")
        lines.append(line)
    common.print_table(header, lines)
    print("\n±: half the range over seeds. start: the new text before training.")


def print_inside(rows: dict[str, list[dict]]) -> None:
    """How the memories were on the way: a table per method, of the seed that was looked into."""
    for label, runs in rows.items():
        points = [point for run in runs for point in run["points"] if "entropy" in point]
        if not points:
            continue
        print(f"\nInside {label}\n")
        lines = []
        for point in points:
            used = " / ".join(f"{100 * share:.1f}" for share in point["used"])
            norms = [f"{norm:.3f}" for norm in point["gradients"].values()]
            lines.append([str(point["step"]), f"{used} %", f"{point['entropy']:.3f}", *norms])
        kinds = [f"gradient of {kind}" for kind in points[0]["gradients"]]
        common.print_table(["step", "slots ever best, by block", "entropy", *kinds], lines)
    print("\nentropy: of a read's weights, in nats; gradients: norms over all memory blocks")


def plot(base: dict, rows: dict[str, list[dict]], path: str) -> None:
    """New against old text, or over steps where there is no old; a curve per method, with its name.

    The start is left out: there all stand at the base, far off.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for label, runs in rows.items():
        curve = curve_of(runs)[1:]
        if not curve:
            continue
        news = [point["new"] for point in curve]
        if "old" in base:
            xs = news
            ys = [point["old"] for point in curve]
            how = {"xytext": (-4, 2), "ha": "right", "va": "bottom"}
        else:
            xs = [point["step"] for point in curve]
            ys = news
            how = {"xytext": (6, 0), "ha": "left", "va": "center"}
        (line,) = axis.plot(xs, ys, marker="o", markersize=3)
        name = label.split(":lr=")[0]
        axis.annotate(
            name,
            (xs[-1], ys[-1]),
            color=line.get_color(),
            textcoords="offset points",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            **how,
        )

    # Room for the names, on the side where the curves end.
    if "old" in base:
        axis.set_xscale("log")
        axis.set_yscale("log")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
            one.set_major_formatter("{x:.4g}")
            one.set_minor_locator(NullLocator())
        left, right = axis.get_xlim()
        axis.set_xlim(left / (right / left) ** 0.25, right)
        axis.set_xlabel("perplexity on the new text (better to the left)")
        axis.set_ylabel("perplexity on the old text (better below)")
        axis.axhline(base["old"], color="grey", linestyle=":", linewidth=1)
        axis.text(1, base["old"], " base", transform=axis.get_yaxis_transform(), va="center")
    else:
        axis.axhline(base["new"], color="grey", linestyle=":", linewidth=1)
        axis.text(0, base["new"], "base", va="bottom")
        _, right = axis.get_xlim()
        axis.set_xlim(0, 1.2 * right)
        axis.set_xlabel("steps")
        axis.set_ylabel("perplexity on the new text")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


# ---- The command ---------------------------------------------------------------------------------
def rates(text: str) -> list[float]:
    return sorted({real_number(part) for part in text.split(",")})


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("Compare ways to deepen a model; resumable.")
    add = parser.add_argument
    add("--base", default="scratch", help="of transformer blocks alone (default: train.py's own)")
    words = f"of {', '.join(METHODS)}; options after colons: midus:query=block"
    add("--methods", required=True, nargs="+", help=words)
    add("--train", choices=("new", "all"), default="new", help="what trains (default new)")
    add("--seeds", type=whole_number, default=1, help="runs per method (default 1)")

    # Texts.
    add("--dataset", choices=DATASETS, help="the new text (default: the base's own)")
    add("--data_dir", help="its folder (default: the base's own)")
    add("--old_dataset", choices=DATASETS, help="the text that the base knows: is it kept?")
    add("--old_data_dir", help="its folder (default: --data_dir)")
    add("--facts", help="a folder of facts.py: count the facts that are known")
    add("--eval_tokens", type=whole_number, default=60_000, help="of each text (default 6e4)")
    add("--split", choices=("valid", "test"), default="test", help="of the table (default test)")

    # Sizes and training.
    add("--n_new", type=whole_number, help="new blocks (default: half as many as there are)")
    add("--n_keys", type=whole_number, default=32, help="(default 32)")
    add("--top_k", type=whole_number, default=8, help="(default 8)")
    add("--d_latent", type=whole_number, default=32, help="(default 32)")
    add("--tokens", type=whole_number, default=1_600_000, help="of each run (default 1.6e6)")
    add("--batch_size", type=whole_number, default=8, help="sequences per step (default 8)")
    add("--grad_accum", type=whole_number, default=1, help="parts of a step's batch (default 1)")
    add("--lrs", type=rates, default="3e-4,1e-3,3e-3,1e-2,3e-2", help="to choose from; or one")
    add("--memory_lrs", type=rates, default="1e-2,3e-2,1e-1,3e-1", help="of banks: the same")
    add("--rate_tokens", type=whole_number, help="of a run that chooses (default: --tokens)")
    add("--weight_decay", type=real_number, default=0.1, help="(default 0.1)")

    # The machine, and what is written.
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--jobs", type=whole_number, help="runs at a time (default: a CPU's cores, else 1)")
    add("--results", type=common.new_file(".jsonl"), default="results.jsonl", help="finished runs")
    add("--levels", type=whole_numbers, default=[], help="of the new text, to compare the old at")
    add("--inside", action="store_true", help="how slots and gradients were on the way")
    add("--plot", type=common.new_file(".svg", ".png"), help="draw new against old to this file")
    return parser.parse_args()


def train_base(args: argparse.Namespace, device: torch.device) -> str:
    """The path of the base that train.py makes of nothing. It is trained if it is not there."""
    nothing = train.Base("scratch", config=None, info={}, model=None)
    given = {"upscale": "midus", "dataset": args.dataset or "pydocs"}
    given["data_dir"] = os.path.abspath(args.data_dir or "data")
    settings = train.choose_settings(given, nothing, device)
    settings.grad_accum = 1
    torch.set_num_threads(settings.threads)
    source = (settings.dataset, settings.tokenizer, settings.data_dir, ("train", "valid"))
    data = load_dataset(*source)
    train.get_base(nothing, settings, data, device)
    own = train.settings_of_scratch_base(settings)
    return train.path_of_scratch_base(own, data["train"])


def open_base(args: argparse.Namespace, device: torch.device) -> tuple[GPT, dict]:
    """The base, and what its file says of it. Raises ValueError if it is none."""
    if args.base == "scratch":
        args.base = train_base(args, device)
    base, info = open_model(args.base, args.data_dir or "data")
    check_vocabulary(info["tokenizer"], base.config.vocab_size)
    if base.config.new:
        raise ValueError(f"{args.base} is up-scaled already; name the base that it was made of")
    return limit_window(base), info


def complete(method: Method, args: argparse.Namespace, n_layer: int) -> None:
    """Adds to a method's options what the command says for all methods."""
    if "positions" not in method.options:
        method.options.setdefault("n_new", args.n_new or max(1, n_layer // 2))
    if method.name in WITH_MEMORY:
        for name in ("n_keys", "top_k", "d_latent"):
            method.options.setdefault(name, getattr(args, name))


def refuse_impossible(base: GPT, method: Method) -> None:
    """Raises ValueError for a method that cannot be, before anything is trained."""
    if method.name == "lesa":
        baselines.check_triples(base)

    # Two methods compute with weights, which there are none of here; a third places blocks alike.
    name = "average" if method.name in ("lesa", "opt-deus") else method.name
    with torch.device("meta"):
        model, new = build(type(base)(base.config), name, method.options)
        set_trainable(model, new)


def find_texts(args: argparse.Namespace, info: dict, threads: int, show: bool) -> Places:
    """Where the texts are. Raises ValueError if nothing says what to train on."""
    dataset = args.dataset or info.get("dataset")
    if dataset is None:
        raise ValueError(f"{args.base} does not say what it was trained on; give --dataset")
    data_dir = os.path.abspath(args.data_dir or info.get("data_dir", "data"))
    return Places(
        base=args.base,
        dataset=dataset,
        data_dir=data_dir,
        old_dataset=args.old_dataset,
        old_data_dir=os.path.abspath(args.old_data_dir or data_dir),
        facts=args.facts,
        threads=threads,
        show=show,
    )


def identify(base: GPT, tokenizer: str, places: Places) -> dict[str, str | None]:
    """What names the base and the texts in a Run, whatever they are called on this machine.

    Texts are tokenized here, once for all runs.
    """
    digest = hashlib.sha256(repr(dataclasses.asdict(base.config)).encode())
    for tensor in base.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    names = {"base": digest.hexdigest(), "old_text": None, "questions": None}
    new = load_dataset(places.dataset, tokenizer, places.data_dir)
    names["new_text"] = new["train"].identity
    if places.old_dataset is not None:
        old = load_dataset(places.old_dataset, tokenizer, places.old_data_dir, ("valid", "test"))
        names["old_text"] = old["valid"].identity
    if places.facts is not None:
        names["questions"] = common.file_sha256(os.path.join(places.facts, "questions.jsonl"))
    return names


def first_run(method: Method, args: argparse.Namespace, names: dict, device: torch.device) -> Run:
    """A run of this method, which has no rates yet."""
    of_the_run = ("tokens", "lr", "memory_lr")  # these options do not shape the model
    options = {name: o for name, o in method.options.items() if name not in of_the_run}
    return Run(
        **names,
        method=method.name,
        options=options,
        train=args.train,
        tokens=method.options.get("tokens", args.tokens),
        batch_size=args.batch_size,
        grad_accum=args.grad_accum,
        lr=0.0,
        memory_lr=None,
        weight_decay=args.weight_decay,
        eval_tokens=args.eval_tokens,
        n_points=5,
        split=args.split,
        seed=1,
        device=device.type,
        dtype="bfloat16" if common.has_bf16(device) else "float32",
    )


def refuse_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if args.plot:
        common.need_matplotlib()
    if args.levels and args.old_dataset is None:
        raise ValueError("--levels compares by the old text; give --old_dataset")
    if args.batch_size % args.grad_accum:
        raise ValueError("--grad_accum must divide --batch_size")


def main() -> None:
    args = parse_arguments()
    refuse_flags(args)
    device = common.pick_device(args.device)
    cores = os.cpu_count() or 1 if device.type == "cpu" else 1
    jobs = args.jobs or cores

    # The base, and what is to be made of it.
    base, info = open_base(args, device)
    methods = [read_method(label) for label in args.methods]
    for method in methods:
        complete(method, args, base.config.n_layer)
        refuse_impossible(base, method)
    done = read_results(args.results)
    places = find_texts(args, info, threads=max(1, cores // jobs), show=jobs == 1)
    names = identify(base, info["tokenizer"], places)
    first = {method.label: first_run(method, args, names, device) for method in methods}

    size = count(base.parameters())
    dtype = next(iter(first.values())).dtype
    print(f"{len(methods)} methods on {args.base}: {size:,} parameters, {device}, {dtype},")
    print(f"{args.tokens:,} tokens of {places.dataset} each, {jobs} runs at a time")

    # The rates, on a seed and a split of their own.
    def make_them(runs: list[Run]) -> None:
        make_all(runs, places, jobs, args.results, done)

    choices = choose_rates(methods, first, args, done, make_them)

    # The runs that count.
    finals = {}
    for label, run in first.items():
        run = vary(run, choices[label].lr, choices[label].memory_lr)
        finals[label] = [dataclasses.replace(run, seed=seed + 1) for seed in range(args.seeds)]
    make_them([run for runs in finals.values() for run in runs])
    rows = {label: [find(run, done) for run in runs] for label, runs in finals.items()}

    # What it comes to, beside the base.
    any_run = next(iter(first.values()))
    yardstick = make_yardstick(any_run, places, info["tokenizer"], base.config.block_size)
    at_start = yardstick.measure(base.to(device))
    print(f"\ntoken-level perplexity, {args.split} splits, {args.eval_tokens:,} tokens of each\n")
    print_rows(at_start, rows)
    if args.levels:
        print_costs(choices, done, args.levels)
    if args.inside:
        print_inside(rows)
    if args.plot:
        plot(at_start, rows, args.plot)


if __name__ == "__main__":
    common.run_command(main)
