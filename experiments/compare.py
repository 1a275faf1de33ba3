r"""
Which way to deepen a model is worth most? Every method on one base, with the same batches in the
same order.

    python experiments/compare.py --base base.pt --methods none,llama-pro,midus --seeds 3
    python experiments/compare.py --base base.pt --methods midus:n_keys=64,one-w,pkm --lrs 2e-3
    python experiments/compare.py --base base.pt --methods none,llama-pro,midus --train all
    python experiments/compare.py --base smollm2 --dataset wikitext2 --data_dir new \
        --old_dataset text --old_data_dir novels --methods none,llama-pro,midus --n_new 5

A method is `none`, one of upscale.py (midus, llama-pro, solar), of baselines.py (stack, stack-top,
average, opt-deus, lesa), or of ablations.py (residual, proj-copied, pkm, ...); after a colon
options of its own, joined by commas in a shell's quotes and told apart by `=`:
midus:n_keys=64,top_k=16,positions=1,3,memory_lr=3e-2,tokens=1e6 (or n_new=2). `none` inserts
nothing and trains the blocks that llama-pro would have copied. solar, stack and lesa were published
with every block trained: see --train all.

The learning rate of each method is chosen among --lrs on seed 0 by the validation split; figures
are of the seeds from 1 on, whose test split is read once, at the end. A run that is in the results
file (same base, text, configuration and seed) is not run again; what the code does is not part of
that, so after changing some, delete its lines. Runs go --jobs at a time, each in a process with its
share of the threads. Shape names: see hml.py.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import baselines
from ablations import VARIANTS, stacked
from analyze import need_matplotlib
from bench import Bench
from common import has_bf16, new_file, pick_device, real_number, run_command, whole_number
from data import DATASETS, check_vocabulary, get_batch, load_dataset
from eval import count_usage, perplexity, sum_nll, usage
from model import GPT, open_model
from train import make_optimizer, schedule, train_step
from upscale import place, set_trainable, upscale

COPIES = {
    "stack": baselines.stack,
    "stack-top": lambda base, n_new: baselines.stack(base, n_new, on_top=True),
    "average": baselines.average,
    "opt-deus": baselines.opt_deus,
    "lesa": baselines.lesa,
}
SHAPE = ("n_keys", "top_k", "d_latent", "query_norm")  # options of memory blocks
METHODS = ("none", "llama-pro", "solar", *COPIES, "midus", "stacked", *VARIANTS)
HAVE_MEMORY = ("midus", "stacked", *VARIANTS)
PLACED = ("none", "llama-pro", "midus", *VARIANTS)  # take positions


# ---- A method, from its name ---------------------------------------------------------------------
def parse(text: str) -> list[tuple[str, dict]]:
    """ "midus:n_keys=64,top_k=8,solar" -> [("midus", {"n_keys": 64, "top_k": 8}), ("solar", {})].

    Raises ValueError if it cannot be read.
    """
    methods = []
    for part in text.split(","):
        method, colon, option = part.partition(":")
        if colon or ("=" not in part and not part.isdecimal()):
            if method not in METHODS:
                raise ValueError(f"--methods: {method} is none of {', '.join(METHODS)}")
            methods.append((method, {}))
        else:
            option = part  # one more of the method before
        if option:
            read_option(option, *(methods[-1] if methods else ("", {})))
    return methods


def read_option(option: str, method: str, options: dict) -> None:
    """Puts "n_keys=64" into options; a bare number goes on with the list of positions."""
    takes = ["n_new", "tokens"]
    takes += ["positions"] if method in PLACED else []
    takes += [*SHAPE, "memory_lr"] if method in HAVE_MEMORY else []
    name, equals, value = option.partition("=")
    goes_on = not equals and bool(options) and list(options)[-1] == "positions"
    if goes_on:
        name, value = "positions", option
    if not method or name not in takes:
        known = ", ".join(takes)
        raise ValueError(f"--methods: cannot read {option!r}; {method or 'a method'} takes {known}")
    try:
        number = (real_number if name == "memory_lr" else whole_number)(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--methods: {option!r}: {error}") from None
    if name == "positions":
        options.setdefault(name, []).append(number)
    else:
        options[name] = number


def build(base: GPT, method: str, options: dict, n_new: int, memory: dict) -> tuple[GPT, str]:
    """The deeper model, and what of it trains when only new blocks do. n_new and memory: what
    options leave open. Raises ValueError for what cannot be.
    """
    where = {name: options[name] for name in ("positions", "n_new") if name in options} or {
        "n_new": n_new
    }
    n_new, memory = (
        options.get("n_new", n_new),
        {name: options.get(name, memory.get(name)) for name in SHAPE},
    )
    memory = {name: value for name, value in memory.items() if value is not None}
    if method == "none":
        return base, ",".join(str(p) for p in place(base.config.n_layer, False, **where))
    if method in ("llama-pro", "solar"):
        return upscale(base, method, **where), "new"
    if method in COPIES:
        return COPIES[method](base, n_new), "new"
    if method == "stacked":
        return stacked(base, n_new, **memory), "new"
    if method not in HAVE_MEMORY:
        raise ValueError(f"{method} is none of {', '.join(METHODS)}")
    model = upscale(base, "midus", **where, **memory)
    if method in VARIANTS:
        VARIANTS[method](model)
    return model, "new"


# ---- One run -------------------------------------------------------------------------------------
def look(model: GPT, batch: list, dtype: torch.dtype) -> dict:
    """Inside the memory on one batch, as training sees it: gradient norms by kind of parameter,
    entropy of the weights (nats), slots in use. Changes nothing.
    """
    entropies, hooks = [], []

    def hook(module, inputs, reads):
        entropies.append(
            torch.special.entr(reads[0].detach()).sum(dim=-1).mean().item()
        )  # weights (B, T, H, k)

    for i in model.config.new:
        hooks.append(model.h[i].memory.product_keys.register_forward_hook(hook))
    model.eval()
    with (
        count_usage(model) as counts,
        torch.autocast(batch[0].device.type, dtype, enabled=dtype != torch.float32),
    ):
        loss = model(*batch)
    loss.backward()
    model.train()
    for handle in hooks:
        handle.remove()
    kinds = {
        "bank": "hive.bank",
        "W": "hive.proj",
        "keys": "product_keys.keys",
        "QKV": "attn.c_attn",
    }
    named = [
        (name, p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None and is_new(name, model.config.new)
    ]
    norms = {
        kind: math.sqrt(sum(g.square().sum().item() for name, g in named if part in name))
        for kind, part in kinds.items()
    }
    model.zero_grad()
    used = [usage(c) for c in counts.values()]
    means = {name: statistics.mean(u[name] for u in used) for name in used[0]}
    return {"gradients": norms, "entropy": statistics.mean(entropies), **means}


def run(job: dict) -> dict:
    """Trains one model and returns job's configuration with its figures.

    Draws the same batches for every method.
    """
    config, threads, show = job["config"], job["threads"], job["show"]
    device = pick_device(job["device"])
    torch.set_num_threads(threads)
    base, info = open_model(job["base"], job["data_dir"])
    splits = ("train", "valid", "test") if config["test"] else ("train", "valid")
    data = load_dataset(config["dataset"], info["tokenizer"], job["data_dir"], splits)
    some = data["valid"].tokens[: config["valid_tokens"] + 1]
    torch.manual_seed(config["seed"])
    options = config["options"]
    model, what = build(
        base.to(device), config["method"], options, config["n_new"], config["memory"]
    )
    model = model.to(device)
    set_trainable(model, what if config["train"] == "new" else "all")
    new = sum(p.numel() for name, p in model.named_parameters() if is_new(name, model.config.new))
    batch_size, T = config["batch_size"], base.config.block_size
    steps = max(1, int(options.get("tokens", config["tokens"])) // (batch_size * T))
    memory_lr = options.get("memory_lr", config["memory_lr"])
    optimizer = make_optimizer(model, config["lr"], memory_lr, config["weight_decay"])
    dtype = getattr(torch, config["dtype"])
    has_memory = all(hasattr(model.h[i], "memory") for i in model.config.new) and model.config.new
    losses, looks, clock = (
        [],
        {},
        time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter,
    )
    result = {
        "added": new,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    result["start"] = perplexity(*sum_nll(model, some))
    old = old_text(config, info["tokenizer"], job.get("old_data_dir"))

    def batch_of(step: int) -> list:
        return [
            half.to(device)
            for half in get_batch(data["train"].tokens, step, batch_size, T, config["seed"])
        ]

    def loop() -> None:
        for step in tqdm(
            range(steps), desc=config["name"], unit="step", disable=None if show else True
        ):
            if (
                config["seed"] == 1
                and has_memory
                and step in (0, steps // 10, steps // 2, steps - 1)
            ):
                part = (
                    batch_size // config["grad_accum"]
                )  # so that it takes no more memory than a step
                looks[step] = look(model, [half[:part] for half in batch_of(step)], dtype)
            start = clock()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps // 20, steps)
            losses.append(train_step(model, optimizer, batch_of(step), dtype, config["grad_accum"]))
            result["seconds"] += clock() - start

    result |= {
        "seconds": 0.0,
        "valid": None,
        "test_perplexity": None,
        "old_perplexity": None,
    }  # as they stay if it diverges
    try:
        result["memory_mib"] = Bench(device, torch.float32, threads, 1).peak(loop)
        result["rate"] = len(losses) * batch_size * T / result["seconds"]
        valid = perplexity(*sum_nll(model, some))
        result["valid"] = valid if math.isfinite(valid) else None
        if config["test"]:
            result["test_perplexity"] = perplexity(*sum_nll(model, data["test"].tokens))
        if old is not None:
            result["old_perplexity"] = perplexity(*sum_nll(model, old))
    except FloatingPointError:
        pass
    edges = [i * steps // 20 for i in range(21)] if steps >= 20 else range(steps + 1)
    result["losses"] = [
        round(statistics.mean(losses[a:b]), 4) for a, b in zip(edges, edges[1:]) if losses[a:b]
    ]
    versions = {"threads": threads, "python": sys.version.split()[0], "torch": torch.__version__}
    return {**config, **result, "looks": looks, **versions}


def old_text(config: dict, tokenizer: str, data_dir: str) -> np.ndarray | None:
    """Text of the base's own kind, valid_tokens of its validation split: what may be forgotten."""
    if config.get("old_dataset") is None:
        return None
    split = load_dataset(config["old_dataset"], tokenizer, data_dir, ("valid",))["valid"]
    return split.tokens[: config["valid_tokens"] + 1]


def is_new(name: str, new: tuple) -> bool:
    """Whether a parameter of this name belongs to a block listed in config.new."""
    return name.startswith("h.") and int(name.split(".")[1]) in new


# ---- Many runs -----------------------------------------------------------------------------------
def read_results(path: str) -> list[dict]:
    """The finished runs. What a fault left of a last line is cut off, so that the next can be
    appended. Raises ValueError, and changes nothing, if the file is something else.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        text = file.read()
        end = text.rfind(b"\n") + 1
        try:
            done = [json.loads(line) for line in text[:end].splitlines()]
            assert text[:1] in (b"", b"{") and all(
                {"name", "lr", "seed", "valid"} <= run.keys() for run in done
            )
        except (ValueError, AttributeError, AssertionError):
            raise ValueError(
                f"{path} is not a results file of this script; name another with --results"
            ) from None
        file.truncate(end)
    return done


def find(config: dict, done: list[dict]) -> dict | None:
    """The finished run of this configuration."""
    return next(
        (r for r in done if all(r.get(name) == value for name, value in config.items())), None
    )


def run_apart(job: dict) -> dict:
    """run() in a fresh process, so that none inherits another's memory or random numbers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(run, job).result()
        except BrokenProcessPool:
            raise MemoryError(
                f"a run of {job['config']['name']} was killed; if memory ran out, --jobs 1"
            ) from None


def run_all(configs: list[dict], args: argparse.Namespace, done: list[dict]) -> None:
    """Runs what is not in done, appends each result to done and, as it comes, to the results file.
    If a run fails, the others are still made; its error is raised at the end.
    """
    todo = [c for c in configs if not find(c, done)]
    if not todo:
        return
    shared = {name: getattr(args, name) for name in ("base", "data_dir", "old_data_dir", "device")}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    jobs = [{"config": c, "threads": threads, "show": args.jobs == 1, **shared} for c in todo]
    failed = None
    with (
        tqdm(total=len(jobs), unit="run", disable=None) as bar,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        try:
            for future in as_completed([pool.submit(run_apart, job) for job in jobs]):
                failed = failed or future.exception()
                if not future.exception():
                    done.append(result := future.result())
                    with open(args.results, "a") as file:
                        file.write(json.dumps(result) + "\n")
                    valid = "diverged" if result["valid"] is None else f"{result['valid']:.2f}"
                    tqdm.write(
                        f"{result['name']}  {result['train']}  lr {result['lr']:g}  "
                        f"seed {result['seed']}  validation {valid}"
                    )
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise failed


def best_lr(config: dict, lrs: list[float], done: list[dict]) -> float | None:
    """The rate of the lowest validation perplexity on seed 0; None if every one diverged."""
    tried = {}
    for lr in lrs:
        grid = {**config, "lr": lr, "seed": 0, "test": False}
        tried[lr] = find(grid, done)["valid"]
    finite = {lr: valid for lr, valid in tried.items() if valid is not None}
    best = min(finite, key=finite.get, default=None)
    if best is None:
        print(f"{config['name']} diverged at every learning rate")
    elif best in (min(lrs), max(lrs)):
        print(f"{config['name']}: the best learning rate, {best:g}, is at the edge of those tried")
    return best


# ---- What to measure by: the base, and a model of three tokens -----------------------------------
def trigram_perplexity(train: np.ndarray, test: np.ndarray, discount: float = 0.75) -> float:
    """Token-level perplexity of an interpolated Kneser-Ney trigram model [Kneser and Ney 1995] with
    one discount: p(w|uv) = (c(uvw) - D)+ / c(uv) + D distinct(uv.) / c(uv) p(w|v), below with
    counts of distinct contexts.
    """
    V = int(max(train.max(), test.max())) + 1
    t, s = train.astype(np.int64), test.astype(np.int64)

    def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    trigrams, counts = np.unique((t[:-2] * V + t[1:-1]) * V + t[2:], return_counts=True)
    bigrams, contexts = np.unique(
        trigrams % (V * V), return_counts=True
    )  # vw, and how many different u precede it
    words, word_contexts = np.unique(bigrams % V, return_counts=True)
    p = (lookup(words, word_contexts, s[2:]) + 0.5) / (
        len(bigrams) + 0.5 * V
    )  # half a count for unseen tokens
    for grams, values, wanted, context in (
        (bigrams, contexts, s[1:-1] * V + s[2:], s[1:-1]),
        (trigrams, counts, (s[:-2] * V + s[1:-1]) * V + s[2:], s[:-2] * V + s[1:-1]),
    ):
        heads, first, distinct = np.unique(grams // V, return_index=True, return_counts=True)
        sums = np.add.reduceat(values, first)
        total, kinds = lookup(heads, sums, context), lookup(heads, distinct, context)
        seen = np.maximum(lookup(grams, values, wanted) - discount, 0)
        p = np.where(total > 0, (seen + discount * kinds * p) / np.maximum(total, 1), p)
    return math.exp(-np.log(p).mean())


def summarise(runs: list[dict]) -> dict:
    """One row of the table from the runs of one method.

    Means, and half the range of validation and test.
    """
    row = {name: runs[0][name] for name in ("name", "train", "lr", "added", "trained")} | {
        "runs": len(runs)
    }
    ended = [r for r in runs if r["valid"]]
    figures = (
        "start",
        "valid",
        "test_perplexity",
        "old_perplexity",
        "rate",
        "memory_mib",
        "seconds",
    )
    for figure in figures:
        values = [r[figure] for r in ended if r.get(figure) is not None]
        row[figure] = statistics.mean(values) if values else math.nan
        row[f"{figure}_spread"] = (max(values) - min(values)) / 2 if values else math.nan
    return row | {"diverged": len(runs) - len(ended)}


def print_rows(rows: list[dict], base: dict) -> None:
    """The table; base.

    The base's perplexities by split, valid and (unless screening) test_perplexity.
    """
    split = "test_perplexity" if "test_perplexity" in base else "valid"
    print(
        "| method | trained | lr | added M | trained M | start (validation) | validation | test "
        "| old text | tokens/s | MiB | gained per M |"
    )
    print("| --- " * 12 + "|")
    for r in rows:
        cells = [
            r["name"],
            r["train"],
            f"{r['lr']:g}",
            f"{r['added'] / 1e6:.2f}",
            f"{r['trained'] / 1e6:.2f}",
        ]
        cells.append(f"{r['start']:.2f}")
        for figure in ("valid", "test_perplexity", "old_perplexity"):
            cells.append(
                f"{r[figure]:.2f}" + (f" ± {r[f'{figure}_spread']:.2f}" if r["runs"] > 1 else "")
            )
        cells += [f"{r['rate']:,.0f}", f"{r['memory_mib']:.0f}"]
        alone = r["added"] and r["train"] == "new"  # else more than the added parameters won it
        cells.append(f"{(base[split] - r[split]) / r['added'] * 1e6:.2f}" if alone else "-")
        if r["diverged"]:
            cells[0] += f" ({r['diverged']} of {r['runs']} diverged)"
        print("| " + " | ".join(cells).replace("nan ± nan", "-").replace("nan", "-") + " |")
    print("\n±: half the range over seeds; MiB: what training takes beside the weights")
    which = "validation" if split == "valid" else "test"
    print(f"gained per M: fall of {which} perplexity per million added")


def plot(rows: list[dict], base: dict, path: str) -> None:
    """Perplexity (test, or validation when screening) against added parameters and against training
    time.
    """
    from matplotlib import pyplot

    split = "test_perplexity" if "test_perplexity" in base else "valid"
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    panels = ("added", 1e-6, "added parameters, millions"), ("seconds", 1 / 60, "training, minutes")
    for axis, (x_name, scale, label) in zip(axes, panels):
        axis.axhline(base[split], color="grey", linestyle=":", label="base")
        for r in rows:
            x = r[x_name] * scale
            axis.errorbar(x, r[split], r[f"{split}_spread"], marker="o")
            axis.annotate(
                r["name"], (x, r[split]), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        axis.set_xlabel(label)
    axes[0].set_ylabel("perplexity, token-level")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def identity(model: GPT) -> str:
    """sha256 of configuration and weights.

    The same for a base that was trained again, bit for bit, elsewhere.
    """
    digest = hashlib.sha256(repr(asdict(model.config)).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def rates(text: str) -> list[float]:
    return sorted({real_number(part) for part in text.split(",")})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to deepen a model; resumable.")
    parser.add_argument(
        "--base", required=True, help="checkpoint of train.py, of transformer blocks"
    )
    parser.add_argument(
        "--methods", required=True, help="joined by commas; see the head of this file"
    )
    parser.add_argument(
        "--seeds", type=whole_number, default=1, help="runs per method, seeds 1, 2, ... (default 1)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number,
        default=600_000,
        help="training tokens of each run (default 6e5)",
    )
    parser.add_argument(
        "--lrs",
        type=rates,
        default="1e-3,2e-3,4e-3",
        help="rates to choose from; one alone is just taken",
    )
    parser.add_argument(
        "--memory_lr", type=real_number, default=1e-2, help="of memory banks (default 1e-2)"
    )
    parser.add_argument("--weight_decay", type=real_number, default=0.1, help="(default 0.1)")
    parser.add_argument(
        "--train", choices=("new", "all"), default="new", help="what trains (default new)"
    )
    parser.add_argument(
        "--n_new", type=whole_number, help="new blocks (default: half as many as the base has)"
    )
    parser.add_argument("--n_keys", type=whole_number, default=32, help="(default 32)")
    parser.add_argument("--top_k", type=whole_number, default=8, help="(default 8)")
    parser.add_argument("--d_latent", type=whole_number, default=64, help="(default 64)")
    parser.add_argument(
        "--batch_size", type=whole_number, default=16, help="sequences per step (default 16)"
    )
    parser.add_argument(
        "--grad_accum",
        type=whole_number,
        default=1,
        help="parts a step's batch is cut in (default 1)",
    )
    parser.add_argument(
        "--screen",
        action="store_true",
        help="do without the test split; the table ends at validation",
    )
    parser.add_argument(
        "--valid_tokens",
        type=whole_number,
        default=100_000,
        help="of the validation split (default 1e5)",
    )
    parser.add_argument("--old_dataset", choices=DATASETS, help="what the base knows: is it kept?")
    parser.add_argument("--old_data_dir", help="folder of that text (default: --data_dir)")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: the base's own)")
    parser.add_argument("--data_dir", help="folder of the data (default: the base's own)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--jobs", type=whole_number, help="runs at a time (default: a CPU's cores, else 1)"
    )
    parser.add_argument(
        "--results",
        type=new_file(".jsonl"),
        default="results.jsonl",
        help="finished runs (results.jsonl)",
    )
    parser.add_argument(
        "--plot",
        type=new_file(".svg", ".png", ".pdf"),
        help="draw the table to this file (.svg, .png); needs matplotlib",
    )
    return parser.parse_args()


def make_configs(args: argparse.Namespace, base: GPT) -> list[dict]:
    """What defines a run, for each of --methods, but for its learning rate and seed.

    ValueError for what cannot be.
    """
    device, names = (
        pick_device(args.device),
        (
            "tokens",
            "memory_lr",
            "weight_decay",
            "train",
            "n_new",
            "batch_size",
            "grad_accum",
            "valid_tokens",
            "old_dataset",
        ),
    )
    common = {"base": identity(base), "dataset": args.dataset, "device": device.type}
    common["dtype"] = "bfloat16" if has_bf16(device) else "float32"
    common |= {name: getattr(args, name) for name in names}
    memory, configs = {name: getattr(args, name) for name in ("n_keys", "top_k", "d_latent")}, []
    for method, options in parse(args.methods):
        own = memory if method in HAVE_MEMORY else {}
        with torch.device("meta"):  # refuses what cannot be, before anything is trained
            trial = {"lesa": "average", "opt-deus": "average"}.get(
                method, method
            )  # these two compute with weights
            set_trainable(*build(type(base)(base.config), trial, options, args.n_new, own))
        if method == "lesa":
            baselines.check_triples(base)
        values = (
            ",".join(map(str, v)) if isinstance(v, list) else str(v) for v in options.values()
        )
        name = method + (
            ":" + ",".join(f"{o}={v}" for o, v in zip(options, values)) if options else ""
        )
        config = {**common, "name": name, "method": method, "options": options, "memory": own}
        configs += [config] if config not in configs else []
    return configs


def open_base(args: argparse.Namespace) -> tuple[GPT, str]:
    """The base and its tokenizer. Fills in of args what the base says. Raises ValueError."""
    base, info = open_model(args.base, args.data_dir or "data")
    check_vocabulary(info["tokenizer"], base.config.vocab_size)
    if base.config.new:
        raise ValueError(f"{args.base} is up-scaled already; name the base that it was made of")
    args.dataset = args.dataset or info.get("dataset")
    if args.dataset is None:
        raise ValueError(f"{args.base} does not say what it was trained on; give --dataset")
    args.data_dir = os.path.abspath(args.data_dir or info.get("data_dir", "data"))
    args.old_data_dir = os.path.abspath(args.old_data_dir or args.data_dir)
    args.n_new = args.n_new or max(1, base.config.n_layer // 2)
    return base, info["tokenizer"]


def measure_base(base: GPT, tokenizer: str, data: dict, args: argparse.Namespace) -> dict:
    """The base's own perplexities, printed: what every method is measured by."""
    valid = data["valid"].tokens[: args.valid_tokens + 1]
    figures = {"valid": perplexity(*sum_nll(base, valid))}
    line = f"validation ({len(valid) - 1:,} tokens) {figures['valid']:.2f}"
    if not args.screen:
        figures["test_perplexity"] = perplexity(*sum_nll(base, data["test"].tokens))
        line += f", test {figures['test_perplexity']:.2f}"
        if len(data["train"].tokens) < 2e7:  # larger ones would take gigabytes
            trigram = trigram_perplexity(data["train"].tokens, data["test"].tokens)
            line += f"; a trigram model, test {trigram:.2f}"
    old = old_text(vars(args), tokenizer, args.old_data_dir)
    if old is not None:
        line += f"; old text {perplexity(*sum_nll(base, old)):.2f}"
    print(f"\ntoken-level perplexity; base {args.base}: {line}\n")
    return figures


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    args.jobs = args.jobs or (os.cpu_count() or 1 if device.type == "cpu" else 1)
    if args.plot:
        need_matplotlib()
    if args.batch_size % args.grad_accum:
        raise ValueError("--grad_accum must divide --batch_size")
    base, tokenizer = open_base(args)
    configs = make_configs(args, base)
    done = read_results(args.results)
    size = sum(p.numel() for p in base.parameters())
    print(
        f"{len(configs)} methods on {args.base} ({size:,} parameters, {args.dataset}, "
        f"{tokenizer}), {args.tokens:,} tokens each, on {device}, {configs[0]['dtype']}, "
        f"{args.jobs} at a time"
    )

    # Text is tokenized once, before the workers.
    data = load_dataset(args.dataset, tokenizer, args.data_dir)
    for c in configs:
        c["text"] = data["train"].identity

    # The learning rates on seed 0, then the runs that count.
    lrs = args.lrs
    if len(lrs) > 1:
        grid = [{**c, "lr": lr, "seed": 0, "test": False} for c in configs for lr in lrs]
        run_all(grid, args, done)
    finals = []
    for c in configs:
        lr = best_lr(c, lrs, done) if len(lrs) > 1 else lrs[0]
        seeds = range(1, args.seeds + 1) if lr is not None else ()
        finals += [{**c, "lr": lr, "seed": seed, "test": not args.screen} for seed in seeds]
    run_all(finals, args, done)

    rows = []
    for c in configs:
        runs = [find(f, done) for f in finals if f["name"] == c["name"]]
        rows += [summarise(runs)] if runs else []
    figures = measure_base(base.to(device), tokenizer, data, args)
    print_rows(rows, figures)
    if args.plot:
        plot(rows, figures, args.plot)


if __name__ == "__main__":
    run_command(main)
