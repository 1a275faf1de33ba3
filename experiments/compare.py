"""
When does looking up beat copying? Every method on one base, with the same batches in one order.

    python experiments/compare.py                       the main table (two hours on two cores)
    python experiments/compare.py --stored              the same from our own runs, at once
    python experiments/compare.py size parts longer     other tables, by name (up to an hour each)
    python experiments/compare.py --methods llama-pro midus:query=token:n_keys=64

The base is train.py's own: a tiny GPT that has read Python's documentation (the old text). It goes
on with the code of Python's library (the new text). Another base and other texts: --base, --dataset
and so on, as in train.py.

A method is a row of METHODS, in upscale.py or methods.py, or `none`: nothing is inserted, and the
blocks that llama-pro would copy train. After colons follow its options, and those of the run: train
(new, which is the default, all, or blocks: 2,4), tokens, lr, memory_lr.

Rates that are not given are found for each method: on seed 0, by the first 100,000 tokens of the
new text's validation split. First lr, then the rate of banks; each search starts in the middle of a
grid and goes on while a neighbour is better. What counts are seeds 1, 2, ... on the whole test
splits of both texts, which nothing else reads.

How to read the table: texts have perplexities per token, means over seeds ± half their range.

    multiplications      for each token, without attention's own products and the search
    learned, forgotten   nats per token: how far the logarithm of the perplexity fell on the new
                         text, and how far it rose on the old one
    gain                 what is learned, as a share of what llama-pro's copies learn
    slots in use         by memory block: those that are a head's best for some token

A finished run is a line of results.jsonl: what was asked, what came out, and a hash of the code. It
is not made again while the code is the same, so make a study at one commit. Our own runs are lines
of experiments/results/study.jsonl. Shape names: see hml.py.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
import methods  # noqa: F401 (its rows)
import plot
import train
from eval import count_usage, perplexity, sum_nll, usage
from model import GPT, count_parameters, weights_sha256
from upscale import METHODS, place, set_trainable, upscale

GRIDS = {
    "lr": (5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2),
    "memory_lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
SOME_TOKENS = 100_000  # of a validation split: for trials of rates, and to count slots in use
STUDY = os.path.join(ROOT, "experiments", "results", "study.jsonl")

# ---- The tables ----------------------------------------------------------------------------------
# A row: what it is in words, and the method. Rows of one group are points of one line in a picture.
Row = namedtuple("Row", ("group", "words", "method"))

OWN = ":lr=3e-3:memory_lr=0.1"  # rates of train.py
TOKEN = "midus:query=token"
VARIANT = "variant:query=token"
TABLES = {
    "main": [
        Row("none", "no new block: some old ones train", "none"),
        Row("copies", "llama-pro: copies, silent at first", "llama-pro"),
        Row("copies", "solar", "solar:n_new=2"),
        Row("copies", "stack", "stack:n_new=2"),
        Row("copies", "opt-deus", "opt-deus:n_new=2"),
        Row("copies", "lesa", "lesa:n_new=2"),
        Row("parts", "attention alone", "attention"),
        Row("parts", "feed-forward alone", "feed-forward"),
        Row("memory", "memory alone, 4,096 slots", "memory-alone:n_keys=64"),
        Row("memory", "product-key memory for the FFN, 784 slots", "pkm:n_keys=28"),
        Row("memory", "midus, head query", "midus"),
        Row("memory", "midus, token query", TOKEN),
        Row("memory", "midus, token query, 3,721 slots", f"{TOKEN}:n_keys=61"),
        Row("memory", "midus, token query, 16,384 slots", f"{TOKEN}:n_keys=128"),
        Row("memory", "hybrid, one bank, 7,225 slots", "hybrid-one-bank:n_keys=85"),
        Row("all", "solar, everything trained", "solar:n_new=2:train=all"),
        Row("all", "stack, everything trained", "stack:n_new=2:train=all"),
        Row("all", "lesa, everything trained", "lesa:n_new=2:train=all"),
    ],
    "size": [
        Row("copies", "copied blocks: 1", "llama-pro:n_new=1:lr=6e-3"),
        Row("copies", "copied blocks: 2", "llama-pro:n_new=2:lr=6e-3"),
        Row("copies", "copied blocks: 3", "llama-pro:n_new=3:lr=6e-3"),
        Row("copies", "copied blocks: 4", "llama-pro:n_new=4:lr=6e-3"),
        *(
            Row("two memory blocks", f"two memory blocks, n={n}", f"{TOKEN}:n_keys={n}{OWN}")
            for n in (16, 32, 64, 128, 256)
        ),
        *(
            Row("four memory blocks", f"four, n={n}", f"{TOKEN}:n_new=4:n_keys={n}{OWN}")
            for n in (16, 32, 64, 128)
        ),
    ],
    "widths": [
        *(
            Row("memory", f"n=64, k={k}", f"{TOKEN}:n_keys=64:top_k={k}{OWN}")
            for k in (2, 4, 8, 16, 32)
        ),
        *(
            Row("memory", f"n={n}, d_v={d}", f"{TOKEN}:n_keys={n}:d_latent={d}{OWN}")
            for n in (64, 128)
            for d in (8, 16, 32, 64)
        ),
    ],
    "parts": [
        Row("copies", "llama-pro", "llama-pro:lr=6e-3"),
        Row("add", "token query, n=61", f"{VARIANT}:n_keys=61{OWN}"),
        Row("add", "attention kept", f"{VARIANT}:residual=yes:n_keys=61{OWN}"),
        Row("add", "one bank, n=85", f"{VARIANT}:shared=yes:n_keys=85{OWN}"),
        Row("add", "larger keys", f"{VARIANT}:key_scale=3:n_keys=61{OWN}"),
        Row("add", "one W", f"{VARIANT}:values=one-w:n_keys=62{OWN}"),
        Row("add", "head tables", f"{VARIANT}:values=head-tables:n_keys=31{OWN}"),
        Row("add", "d_v=16, n=88", f"{VARIANT}:d_latent=16:n_keys=88{OWN}"),
        Row("leave", "all three, n=85", f"hybrid-one-bank:n_keys=85{OWN}"),
        Row("leave", "attention not kept", f"{VARIANT}:shared=yes:key_scale=3:n_keys=85{OWN}"),
        Row("leave", "a bank for each", f"{VARIANT}:residual=yes:key_scale=3:n_keys=61{OWN}"),
        Row("leave", "keys as they were", f"{VARIANT}:residual=yes:shared=yes:n_keys=85{OWN}"),
    ],
    "query": [  # why the head query's slots fall out of use, and what its memory lacks
        Row("parts", "attention alone", "attention:lr=3e-3"),
        Row("memory", "head query", f"midus{OWN}"),
        Row("memory", "head query, normalised", f"variant:query_norm=yes{OWN}"),
        Row("memory", "head query, keys six times larger", f"variant:key_scale=6{OWN}"),
        Row("memory", "head query, attention kept", f"variant:residual=yes{OWN}"),
        Row("memory", "token query", f"{TOKEN}{OWN}"),
        Row("memory", "token query, attention kept", f"{VARIANT}:residual=yes{OWN}"),
        Row("memory", "query of its own", f"variant:query=own{OWN}"),
        Row("memory", "query of its own, no attention", f"memory-alone{OWN}"),
    ],
    "pair": [  # for any two texts: the rate of two copies is found, others have one each
        Row("none", "no new block: some old ones train", "none:lr=6e-3"),
        Row("all", "solar, everything trained", "solar:n_new=2:train=all:lr=1e-3"),
        Row("copies", "llama-pro: copies, silent at first", "llama-pro"),
        Row("copies", "four copied blocks", "llama-pro:n_new=4:lr=6e-3"),
        Row("parts", "attention alone", "attention:lr=6e-3"),
        Row("memory", "midus, head query", f"midus{OWN}"),
        Row("memory", "midus, token query", f"{TOKEN}{OWN}"),
        Row("memory", "midus, token query, 3,721 slots", f"{TOKEN}:n_keys=61{OWN}"),
        Row("memory", "midus, token query, 16,384 slots", f"{TOKEN}:n_keys=128{OWN}"),
        Row(
            "memory",
            "token query, one bank, larger keys, 7,225 slots",
            f"{VARIANT}:shared=yes:key_scale=3:n_keys=85{OWN}",
        ),
        Row("memory", "hybrid, one bank, 7,225 slots", f"hybrid-one-bank:n_keys=85{OWN}"),
    ],
    "ask": [  # what a memory is asked with; competitors; one rate each
        Row("copies", "two copied blocks", "llama-pro:lr=6e-3"),
        Row("none", "no new block: blocks 2 and 4 train", "none:lr=6e-3"),
        Row("none", "no new block: all is trained", "none:train=all:lr=1e-3"),
        Row("none", "LoRA on all matrices, rank 48", "lora:lr=3e-3"),
        Row("memory", "asked with attention's output, 1,024 slots", f"midus{OWN}"),
        Row("memory", "asked with the token, 3,721 slots", f"{TOKEN}:n_keys=61{OWN}"),
        Row("memory", "hybrid, 3,721 slots", f"hybrid:n_keys=61{OWN}"),
        Row(
            "memory",
            "asked with a learned mix of the last four, 4,900 slots",
            f"midus:query=recent:n_keys=70:key_scale=3{OWN}",
        ),
        Row("memory", "slots named by the last 2 to 5, 5,929 slots", f"ngram:n_keys=77{OWN}"),
        Row("memory", "slots named by the last 2 to 5, 16,384 slots", f"ngram:n_keys=128{OWN}"),
    ],
    "longer": [
        Row("copies", "llama-pro", "llama-pro:lr=6e-3:tokens=2.4e6"),
        Row("memory", "head query, n=32", f"midus{OWN}:tokens=2.4e6"),
        Row("memory", "token query, n=64", f"{TOKEN}:n_keys=64{OWN}:tokens=2.4e6"),
        Row("memory", "token query, n=128", f"{TOKEN}:n_keys=128{OWN}:tokens=2.4e6"),
    ],
}


# ---- What is asked -------------------------------------------------------------------------------
OF_THE_RUN = ("train", "tokens", "lr", "memory_lr")
CODE = """common.py data.py eval.py hml.py model.py train.py upscale.py
    experiments/methods.py""".split()


def hash_of_code() -> str:
    """Of the bytes of all files that decide what a run comes to; 16 hexadecimal digits."""
    content = b"".join(Path(ROOT, name).read_bytes() for name in CODE)
    return hashlib.sha256(content).hexdigest()[:16]


def read_method(text: str, words: tuple[str, ...]) -> dict:
    """What "midus:n_keys=64:lr=3e-3" asks for; a rate that it does not give is missing.

    train.py reads the options, as flags after its flags `words`, so that it refuses what is none.
    Raises ValueError for an option of neither the method nor the run.
    """
    name, *parts = text.split(":")
    known = [option.name for option in METHODS[name].options] if name in METHODS else []
    known += OF_THE_RUN

    # Of what is given twice train.py takes the last.
    flags = [*words, "--train", "new"]
    if name != "none":
        flags += ["--upscale", name]
    given = []
    for part in parts:
        option, _, value = part.partition("=")
        if option not in known:
            raise ValueError(f"--methods {text}: {name} takes {', '.join(known)}; not {option!r}")
        flags.append(f"--{option}={value}")
        given.append(option)
    settings, _ = train.parse_arguments(flags)

    # A rate always has a default in train.py; here it is to be found.
    asked = {"method": name, "options": settings.options}
    for option in OF_THE_RUN:
        if option in given or option not in GRIDS:
            asked[option] = getattr(settings, option)
    return asked


def matches(run: dict, asked: dict) -> bool:
    return all(run[name] == value for name, value in asked.items())


# ---- One run -------------------------------------------------------------------------------------
@lru_cache  # once for all runs that a process makes
def open_study(words: tuple[str, ...]) -> tuple[GPT, argparse.Namespace, dict]:
    """Base, settings and texts that flags of train.py ask for.

    Texts are splits by "new" and "old"; the old one is missing if there is none.
    """
    settings, found = train.parse_arguments(list(words))
    device = common.pick_device(settings.device)
    train.for_this_machine(settings, device)
    loaded = train.load_texts(settings)
    texts = {"new": loaded[settings.dataset]}
    if settings.old_dataset is not None:
        texts["old"] = loaded[settings.old_dataset]
    base = train.get_base(settings, found, device)
    return base.to(device), settings, texts


def build(base: GPT, method: str, options: dict, which: str) -> GPT:
    """The extended model. Of it trains what `which` says, as in train.py's --train."""
    if method == "none":
        model = copy.deepcopy(base)
        if which == "new":
            which = ",".join(str(block) for block in place(base.config.n_layer, False))
    else:
        model = upscale(base, method, **options)

    # LoRA has no new block. It has frozen the rest itself.
    if method != "lora" or which != "new":
        set_trainable(model, which)
    return model


def multiplications(model: GPT) -> int:
    """Per token, in all blocks. Attention's own products and the search are left out.

    Every number of a matrix is multiplied once, those of the scores' keys too; of a bank only the
    entries that are read.
    """
    total = 0
    for name, parameter in model.h.named_parameters(remove_duplicate=False):
        if name.endswith("hive.bank"):
            block = model.config.blocks[int(name.split(".")[0])]
            reads = model.config.n_head * (1 if block == "N" else model.config.top_k)
            total += reads * parameter.size(1)
        elif name.endswith("hive.proj"):  # one for all heads is used by each
            total += parameter.numel() * model.config.n_head // max(1, parameter.size(0))
        elif parameter.dim() >= 2:
            total += parameter.numel()
    return total


def measure(model: GPT, texts: dict, split: str) -> dict[str, float]:
    """Perplexity on each text: of "valid" its first part, of "test" all."""
    limit = SOME_TOKENS if split == "valid" else None
    figures = {}
    for kind, text in texts.items():
        nll, count = sum_nll(model, text[split].tokens[:limit])
        figures[kind] = perplexity(nll, count)
    return figures


@lru_cache
def measure_base(words: tuple[str, ...], split: str) -> dict[str, float]:
    base, _, texts = open_study(words)
    return measure(base, texts, split)


def slots_in_use(model: GPT, texts: dict) -> list[float]:
    """The share of slots that are a head's best for some token, by block, a mean over heads."""
    with count_usage(model) as counts:
        if counts:
            sum_nll(model, texts["new"]["valid"].tokens[:SOME_TOKENS])
    return [usage(reads)["top1"] for reads in counts.values()]


def make(asked: dict, words: tuple[str, ...]) -> dict:
    """Trains one model. Returns what was asked and what came out, as plain types."""
    with redirect_stdout(io.StringIO()):  # what is said of the base was said before
        base, settings, texts = open_study(words)
    torch.manual_seed(asked["seed"])
    model = build(base, asked["method"], asked["options"], asked["train"])
    before, after = (sum(count_parameters(m).values()) for m in (base, model))
    run = asked | {
        "before": measure_base(words, asked["split"]),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "added": after - before,
        "multiplications": multiplications(model) - multiplications(base),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

    # The settings of this run, the rest as train.py's run() has it. Nothing is validated or saved
    # on the way.
    settings = argparse.Namespace(**vars(settings))
    settings.tokens = asked["tokens"]
    settings.lr = asked["lr"]
    settings.memory_lr = asked["memory_lr"] or 0.0  # None: there is no bank
    settings.seed = asked["seed"]
    steps = train.steps_of(settings)
    settings.warmup = max(1, steps // 20)
    settings.eval_every = steps
    settings.save_every = steps

    # To count slots takes as long as some hundred steps, so one seed has to do.
    look_inside = asked["split"] == "test" and asked["seed"] == 1
    if look_inside:
        run["used_at_start"] = slots_in_use(model, texts)
    progress = train.new_progress()
    try:
        train.train(model, settings, progress, texts["new"])
        run["end"] = measure(model, texts, asked["split"])
    except FloatingPointError:
        run["end"] = None  # diverged
    if look_inside:
        run["used"] = slots_in_use(model, texts)
    run["tokens_per_second"] = train.tokens_per_second(progress, settings)
    return run


def end_of(run: dict) -> float:
    """Perplexity on the new text at the end; infinite if it diverged."""
    return math.inf if run["end"] is None else run["end"]["new"]


def rates_of(run: dict) -> str:
    bank = "" if run["memory_lr"] is None else f", {run['memory_lr']:g}"
    return f"{run['lr']:g}{bank}"


# ---- Many runs -----------------------------------------------------------------------------------
def read_runs(path: str) -> list[dict]:
    """The runs in a file of results. Raises ValueError if it holds something else."""
    runs = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                run = json.loads(line)
            except json.JSONDecodeError:
                if line.startswith("{"):  # cut by a crash; this run is made again
                    continue
                run = None
            if not isinstance(run, dict) or "code" not in run:
                raise ValueError(f"{path} is no file of results; name another with --results")
            runs.append(run)
    return runs


def append_run(path: str, run: dict) -> None:
    with open(path, "ab+") as file:
        # After a line that was cut a new one begins.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(run).encode() + b"\n")


class Study:
    """Finished runs, and processes that make more. words: flags of train.py that all share."""

    def __init__(self, words: tuple[str, ...], path: str, jobs: int):
        self.words = words
        self.path = path
        self.runs = []
        for file in {os.path.realpath(STUDY), os.path.realpath(path)}:
            if os.path.exists(file):
                self.runs += read_runs(file)
        self.pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def find(self, asked: dict) -> dict | None:
        return next((run for run in self.runs if matches(run, asked)), None)

    def make_all(self, wanted: list[dict]) -> None:
        """Makes the runs that are not there, and keeps each when it ends."""
        missing = []
        for asked in wanted:
            if self.find(asked) is None and asked not in missing:
                missing.append(asked)
        print(f"{len(missing)} runs to make, {len(wanted) - len(missing)} are there", flush=True)

        # One that fails does not take the others with it.
        failure = None
        futures = [self.pool.submit(make, asked, self.words) for asked in missing]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=None):
            try:
                run = future.result()
            except Exception as error:
                failure = error
                continue
            self.runs.append(run)
            append_run(self.path, run)
            what = f"{run['method']} {run['options']}, {run['train']} trained, {rates_of(run)}"
            tqdm.write(f"{what}, seed {run['seed']}: {end_of(run):.3f}")
        if failure is not None:
            raise failure


# ---- Rates ---------------------------------------------------------------------------------------
def next_trials(asked: dict, study: Study) -> list[dict]:
    """The trials that a method needs next. When it needs none, its rates are in `asked`.

    A search starts in the middle of the grid and goes on while a neighbour is better. So a wide
    grid costs no more than a narrow one, and the best seldom lies at its edge.
    """
    # First lr, with the bank's rate in the middle: all pairs would be too many.
    banks = GRIDS["memory_lr"]
    trial = {"memory_lr": banks[len(banks) // 2]} | asked | {"split": "valid", "seed": 0}
    for name, rates in GRIDS.items():
        if name in asked:
            continue
        trials = [trial | {name: rate} for rate in rates]
        found = [study.find(one) for one in trials]

        # The best so far, and its neighbours.
        done = [i for i, run in enumerate(found) if run is not None]
        centre = min(done, key=lambda i: end_of(found[i])) if done else len(rates) // 2
        near = range(max(0, centre - 1), min(centre + 2, len(rates)))
        missing = [trials[i] for i in near if found[i] is None]
        if missing:
            return missing
        asked[name] = rates[centre]
        trial[name] = rates[centre]
        if centre in (0, len(rates) - 1):
            print(f"{asked['method']}: the best {name} lies at the edge of those tried")
    return []


# ---- The table -----------------------------------------------------------------------------------
def pick(asked: dict, runs: list[dict], split: str) -> tuple[list[dict], list[dict]]:
    """Of the runs those that answer what is asked, one for each seed; and the trials of rates."""
    rest = {name: value for name, value in asked.items() if name not in GRIDS}
    same = [run for run in runs if matches(run, rest)]
    trials = [run for run in same if run["split"] == "valid" and run["seed"] == 0 and run["end"]]
    trials.sort(key=lambda run: (run["lr"], run["memory_lr"] or 0))

    # A rate that is not asked for is that of the best trial.
    rates = {name: asked[name] for name in GRIDS if name in asked}
    if trials:
        best = min(trials, key=end_of)
        rates = {name: best[name] for name in GRIDS} | rates
    if "lr" not in rates:
        return [], trials
    finals = {}  # the last of a seed counts
    for run in same:
        if run["split"] == split and run["seed"] > 0 and matches(run, rates):
            finals[run["seed"]] = run
    return [finals[seed] for seed in sorted(finals)], trials


def mean_and_spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.3f}"
    return text


def rise(runs: list[dict], kind: str) -> float:
    """By how many nats the logarithm of a text's perplexity rose, a mean over runs."""
    return statistics.mean(math.log(run["end"][kind] / run["before"][kind]) for run in runs)


def cells_of(row: Row, runs: list[dict], copies: float) -> dict[str, str]:
    """The cells of a method by column. copies: the nats that llama-pro's learn, 0 if unknown."""
    first = runs[0]
    texts = dict.fromkeys(("new text", "old text", "learned", "forgotten", "gain"), "")
    diverged = sum(run["end"] is None for run in runs)
    if diverged:
        texts["new text"] = f"{diverged} of {len(runs)} diverged"
    else:
        learned = -rise(runs, "new")
        texts["learned"] = f"{learned:.3f}"
        texts["gain"] = f"{learned / copies:.0%}" if copies > 0 else ""
        for kind in first["before"]:
            texts[f"{kind} text"] = mean_and_spread([run["end"][kind] for run in runs])
        if "old" in first["before"]:
            texts["forgotten"] = f"{rise(runs, 'old'):.3f}"
    speed = statistics.median(run["tokens_per_second"] for run in runs)
    return {
        "new blocks": row.words,
        "parameters trained": f"{first['trained']:,}" if "trained" in first else "",
        "parameters added": f"{first['added']:,}",
        "multiplications added": f"{first['multiplications']:,}",
        "tokens/s": f"{speed:,.0f}",
        "lr, banks": rates_of(first),
        **texts,
        "slots in use": " / ".join(f"{used:.0%}" for used in first.get("used", [])),
    }


def print_table(rows: list[Row], finals: dict[str, list[dict]]) -> None:
    """A table in Markdown: the base, and a row a method."""
    # What copies learn, by the number of tokens that they learn from.
    copies = {}
    for runs in finals.values():
        name = [runs[0][field] for field in ("method", "options", "train")]
        if name == ["llama-pro", {}, "new"] and all(run["end"] for run in runs):
            copies[runs[0]["tokens"]] = -rise(runs, "new")

    before = finals[rows[0].method][0]["before"]
    base = {f"{kind} text": f"{value:.3f}" for kind, value in before.items()}
    table = [{"new blocks": "the base"} | base]
    for row in rows:
        runs = finals[row.method]
        table.append(cells_of(row, runs, copies.get(runs[0]["tokens"], 0.0)))
    columns = list(table[-1])
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for cells in table:
        print("| " + " | ".join(cells.get(column, "") for column in columns) + " |")


def show(
    rows: list[Row], asked: dict[str, dict], runs: list[dict], split: str
) -> tuple[list[Row], dict[str, list[dict]], dict[str, list[dict]]]:
    """Prints the table and the trials of what there is among the runs.

    Returns the rows that are there, and by method the runs that count and the trials of rates.
    """
    finals = {}
    trials = {}
    for row in rows:
        found, trials[row.method] = pick(asked[row.method], runs, split)
        if found:
            finals[row.method] = found
    there = [row for row in rows if row.method in finals]
    print(f"\n{len(there)} of {len(rows)} rows are there, on {split} splits")
    if 2 * len(there) < len(rows):  # these runs were made for other tables
        return [], {}, {}
    today = hash_of_code()
    codes = [run["code"] for found in finals.values() for run in found]
    others = sum(code != today for code in codes)
    print(f"{others} of {len(codes)} runs were made by other code than today's\n")
    print_table(there, finals)

    # Trials say at which cost on the old text the new one is learned.
    if any(trials.values()):
        print(f"\ntrials of rates: seed 0, the first {SOME_TOKENS:,} tokens of validation splits\n")
        print("| new blocks | lr, banks | new text | old text |\n| --- | --- | --- | --- |")
    for row in there:
        for run in trials[row.method]:
            ends = " | ".join(f"{value:.3f}" for value in run["end"].values())
            print(f"| {row.words} | {rates_of(run)} | {ends} |")
    return there, finals, trials


def draw(shown: list[tuple], args: argparse.Namespace) -> None:
    """The picture of a table. shown: what show() returned, for each base."""
    rows, finals, trials = shown[0]
    if args.tables == ["size"]:
        plot.draw_sizes(rows, finals, args.plot)
    elif args.tables == ["pair"] and len(shown) > 1:
        plot.draw_gains(rows, [finals for _, finals, _ in shown], args.plot)
    else:
        plot.draw_over_rates(rows, trials, args.plot)


# ---- Stored runs ---------------------------------------------------------------------------------
# What runs of older code do not say: the perplexities of their bases.
OLD_BASES = {
    "12ef8454ea0754d1": {"new": 6.018, "old": 5.109},  # Python's documentation, then its code
    "1ffc8588bcc4a32d": {"new": 15.490, "old": 5.493},  # novels, then WikiText-2
}
OLD_HYBRID = {"query": "token", "residual": True, "shared": True, "key_scale": 3.0}


def as_today(run: dict) -> dict:
    """A run of older code, which called two methods by other names."""
    run.setdefault("before", OLD_BASES.get(run["base"]))
    options = run["options"]
    if run["method"] == "variant" and options.items() >= OLD_HYBRID.items():
        run["method"] = "hybrid-one-bank"
        run["options"] = {name: options[name] for name in options if name not in OLD_HYBRID}
    if "query_norm" in options:
        run["method"] = "variant"
    return run


def show_stored(rows: list[Row], asked: dict[str, dict], args: argparse.Namespace) -> list[tuple]:
    """A table for each base and its texts, whatever code made the runs."""
    by_base = {}
    for run in read_runs(args.results or STUDY):
        by_base.setdefault((run["base"], *run["texts"]), []).append(as_today(run))
    shown = []
    for (base, *_), runs in by_base.items():
        print(f"\nbase {base}", end="")
        there = show(rows, asked, runs, args.split)
        if there[0]:
            shown.append(there)
    return shown


# ---- The command ---------------------------------------------------------------------------------
OF_TRAIN = ("base", "dataset", "old_dataset", "data_dir", "device", "dtype", "tokens")


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("Compare ways to extend a model. Repeat the command to go on.")
    add = parser.add_argument
    add("tables", nargs="*", default=["main"], help=f"of {', '.join(TABLES)} (default main)")
    add("--methods", nargs="+", help="instead of a table: midus:query=token:n_keys=64 ...")
    add("--stored", action="store_true", help="show our own runs, or those of --results")
    add("--seeds", type=common.whole_number, default=3, help="runs per method (default 3)")
    add("--split", choices=("valid", "test"), default="test", help="of the table (default test)")
    add("--jobs", type=common.whole_number, help="runs at a time (default: a CPU's cores, else 1)")
    add("--results", type=common.new_file(".jsonl"), help="of runs (default results.jsonl)")
    picture = common.new_file(*plot.ENDINGS)
    add("--plot", type=picture, help="draw new against old text to this new file")
    for name in OF_TRAIN:
        add(f"--{name}", help="as in train.py")
    args = parser.parse_args()
    for table in args.tables:
        if table not in TABLES:
            raise ValueError(f"there is no table {table}; choose from {', '.join(TABLES)}")
    if args.plot:
        plot.check_picture(args.plot)
    return args


def make_study(
    asked: dict[str, dict], words: tuple[str, ...], args: argparse.Namespace
) -> list[dict]:
    """Completes what is asked, and makes the runs that are missing. Returns all runs."""
    # What cannot be built is refused before a base is trained: all is tried on one that is like it.
    settings, found = train.parse_arguments(list(words))
    like_it = GPT(found.config or train.scratch_config(settings))
    for of_method in asked.values():
        model = build(like_it, of_method["method"], of_method["options"], of_method["train"])
        if not any(name.endswith("hive.bank") for name, _ in model.named_parameters()):
            of_method["memory_lr"] = None
    if args.plot and settings.old_dataset is None:
        raise ValueError("--plot draws new against old text; name the old one with --old_dataset")
    on_cpu = common.pick_device(settings.device).type == "cpu"
    jobs = args.jobs or (os.cpu_count() if on_cpu else 1)
    study = Study(words, args.results or "results.jsonl", jobs)

    # All else that a run's name says.
    base, settings, texts = open_study(words)
    in_common = {
        "base": weights_sha256(base),
        "texts": [split.fingerprint for text in texts.values() for split in text.values()],
        "batch_size": settings.batch_size,
        "weight_decay": settings.weight_decay,
        "dtype": settings.dtype,
        "device": base.wte.weight.device.type,
        "code": hash_of_code(),
    }
    for method, of_method in asked.items():
        of_method["tokens"] = of_method["tokens"] or len(texts["new"]["train"].tokens)  # an epoch
        asked[method] = in_common | of_method

    usable = sum(matches(run, in_common) for run in study.runs)
    print(f"{usable} of {len(study.runs)} stored runs are on this base and by today's code")
    try:
        # Round by round the trials that show which rates are best; then what counts.
        while trials := [trial for one in asked.values() for trial in next_trials(one, study)]:
            study.make_all(trials)
        counts = [{"split": args.split, "seed": seed + 1} for seed in range(args.seeds)]
        study.make_all([one | count for one in asked.values() for count in counts])
    except KeyboardInterrupt:
        # Nothing that is under way can be kept.
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        study.pool.shutdown(cancel_futures=True)
    return study.runs


def main() -> None:
    args = parse_arguments()
    rows = [row for table in args.tables for row in TABLES[table]]
    if args.methods:
        known = {row.method: row for table in TABLES.values() for row in table}
        rows = [known.get(text, Row("", text, text)) for text in args.methods]

    # Runs go side by side, with one thread each. From scratch a base is made for an --upscale.
    words = ["--threads", "1", "--upscale", "midus"]
    for name in OF_TRAIN:
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    words = tuple(words)
    asked = {row.method: read_method(row.method, words) for row in rows}
    if args.stored:
        shown = show_stored(rows, asked, args)
    else:
        shown = [show(rows, asked, make_study(asked, words, args), args.split)]
    if args.plot and shown:
        draw(shown, args)


if __name__ == "__main__":
    common.run_command(main)
