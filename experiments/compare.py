"""
When does looking up beat copying? Every method on one base, with the same batches in one order.

    python experiments/compare.py                       the main table (two hours on two cores)
    python experiments/compare.py size parts longer     other tables, by name (up to an hour each)
    python experiments/compare.py --methods llama-pro midus:query=token:n_keys=64

The base is train.py's own: a tiny GPT that has read Python's documentation (the old text). It goes
on with the code of Python's library (the new text). Perplexity is measured on both: what is learned
of the new one, and what is forgotten of the old one. Another base and other texts: --base,
--dataset and so on, as in train.py.

A method is a row of upscale.py's METHODS or of methods.py's, or `none`: nothing is inserted, and
the blocks that llama-pro would copy train. Its options follow after colons; those that belong to
the run, and not to the model, are train (new, which is the default, or all), tokens, lr, memory_lr.

Rates that are not given are found for each method: on seed 0, by the first 100,000 tokens of the
new text's validation split. First lr, then the rate of banks; each search starts in the middle of a
grid and goes on while a neighbour is better. What counts are seeds 1, 2, ... on the whole test
splits of both texts, which nothing else reads.

Finished runs are lines of --results, and are not made again. A run is named by all that shapes it,
with a hash of the code of the layer, the model, the method, the optimizer, the schedule and the
step. Shape names: see hml.py.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
from collections import Counter, namedtuple
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
import methods  # noqa: F401 (its rows)
import plot
import train
from data import load_dataset
from eval import count_usage, perplexity, sum_nll, usage
from model import GPT
from upscale import METHODS, place, set_trainable, upscale

LRS = (5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
MEMORY_LRS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
OF_THE_RUN = ("train", "tokens", "lr", "memory_lr")
TRIAL_TOKENS = 100_000  # of each validation split, in trials of rates
USAGE_TOKENS = 100_000  # of the new text, over which slots in use are counted

# ---- The tables ----------------------------------------------------------------------------------
# A row: what it is in words, and the method. Rows of one group are points of one line in a picture.
Row = namedtuple("Row", ("group", "words", "method"))

# A copied block with a memory for its FFN, one bank for all, keys that start three times larger.
HYBRID = "variant:query=token:residual=True:shared=True:key_scale=3.0"
TOKEN = "midus:query=token"
RATES = ":lr=3e-3:memory_lr=0.1"  # train.py's own
TABLES = {
    "main": [
        Row("none", "no new block: blocks 2 and 4 train", "none"),
        Row("copies", "llama-pro: two copies, silent at first", "llama-pro"),
        Row("copies", "solar", "solar:n_new=2"),
        Row("copies", "stack", "stack:n_new=2"),
        Row("copies", "opt-deus", "opt-deus:n_new=2"),
        Row("copies", "lesa", "lesa:n_new=2"),
        Row("parts", "attention alone", "attention"),
        Row("parts", "feed-forward alone", "feed-forward"),
        Row("memory", "memory alone, 4,096 slots", "memory-alone:n_keys=64"),
        Row("memory", "product-key memory for the FFN, 784 slots", "pkm:n_keys=28"),
        Row("memory", "midus, head query, 1,024 slots", "midus"),
        Row("memory", "midus, token query, 1,024 slots", "midus:query=token"),
        Row("memory", "midus, token query, 3,721 slots", "midus:query=token:n_keys=61"),
        Row("memory", "midus, token query, 16,384 slots", "midus:query=token:n_keys=128"),
        Row("memory", "hybrid, 7,225 slots", f"{HYBRID}:n_keys=85"),
        Row("all", "solar, everything trained", "solar:n_new=2:train=all"),
        Row("all", "stack, everything trained", "stack:n_new=2:train=all"),
        Row("all", "lesa, everything trained", "lesa:n_new=2:train=all"),
    ],
    "size": [
        *(
            Row("copies", f"copied blocks: {n}", f"llama-pro:n_new={n}:lr=6e-3")
            for n in (1, 2, 3, 4)
        ),
        *(
            Row("two memory blocks", f"two memory blocks, n={n}", f"{TOKEN}:n_keys={n}{RATES}")
            for n in (16, 32, 64, 128, 256)
        ),
        *(
            Row(
                "four memory blocks",
                f"four memory blocks, n={n}",
                f"{TOKEN}:n_new=4:n_keys={n}{RATES}",
            )
            for n in (16, 32, 64, 128)
        ),
    ],
    "widths": [
        *(
            Row("memory", f"n=64, k={k}", f"{TOKEN}:n_keys=64:top_k={k}{RATES}")
            for k in (2, 4, 8, 16, 32)
        ),
        *(
            Row("memory", f"n={n}, d_v={d}", f"{TOKEN}:n_keys={n}:d_latent={d}{RATES}")
            for n in (64, 128)
            for d in (8, 16, 32, 64)
        ),
    ],
    "parts": [
        Row("copies", "llama-pro", "llama-pro:lr=6e-3"),
        Row("add", "token query, n=61", f"variant:query=token:n_keys=61{RATES}"),
        Row("add", "attention kept", f"variant:query=token:residual=True:n_keys=61{RATES}"),
        Row("add", "one bank, n=85", f"variant:query=token:shared=True:n_keys=85{RATES}"),
        Row("add", "larger keys", f"variant:query=token:key_scale=3.0:n_keys=61{RATES}"),
        Row("add", "one W", f"variant:query=token:values=one-w:n_keys=62{RATES}"),
        Row("add", "head tables", f"variant:query=token:values=head-tables:n_keys=31{RATES}"),
        Row("add", "d_v=16, n=88", f"variant:query=token:d_latent=16:n_keys=88{RATES}"),
        Row("leave", "all three, n=85", f"{HYBRID}:n_keys=85{RATES}"),
        Row(
            "leave",
            "attention not kept",
            f"variant:query=token:shared=True:key_scale=3.0:n_keys=85{RATES}",
        ),
        Row(
            "leave",
            "a bank for each",
            f"variant:query=token:residual=True:key_scale=3.0:n_keys=61{RATES}",
        ),
        Row(
            "leave",
            "keys as they were",
            f"variant:query=token:residual=True:shared=True:n_keys=85{RATES}",
        ),
    ],
    "query": [  # why the head query's slots fall out of use, and what its memory lacks
        Row("parts", "attention alone", "attention:lr=3e-3"),
        Row("memory", "head query", f"midus{RATES}"),
        Row("memory", "head query, normalised", f"midus:query_norm=True{RATES}"),
        Row("memory", "head query, keys six times larger", f"variant:key_scale=6.0{RATES}"),
        Row("memory", "head query, attention kept", f"variant:residual=True{RATES}"),
        Row("memory", "token query", f"{TOKEN}{RATES}"),
        Row("memory", "token query, attention kept", f"variant:query=token:residual=True{RATES}"),
        Row("memory", "query of its own", f"variant:query=own{RATES}"),
        Row("memory", "query of its own, no attention", f"memory-alone{RATES}"),
    ],
    "pair": [  # for any two texts: the rate of two copies is found, others have one each
        Row("none", "no new block: blocks 2 and 4 train", "none:lr=6e-3"),
        Row("all", "solar, everything trained", "solar:n_new=2:train=all:lr=1e-3"),
        Row("copies", "llama-pro: two copies, silent at first", "llama-pro"),
        Row("copies", "four copied blocks", "llama-pro:n_new=4:lr=6e-3"),
        Row("parts", "attention alone", "attention:lr=6e-3"),
        Row("memory", "midus, head query, 1,024 slots", f"midus{RATES}"),
        Row("memory", "midus, token query, 1,024 slots", f"{TOKEN}{RATES}"),
        Row("memory", "midus, token query, 3,721 slots", f"{TOKEN}:n_keys=61{RATES}"),
        Row("memory", "midus, token query, 16,384 slots", f"{TOKEN}:n_keys=128{RATES}"),
        Row(
            "memory",
            "token query, one bank, larger keys, 7,225 slots",
            f"variant:query=token:shared=True:key_scale=3.0:n_keys=85{RATES}",
        ),
        Row("memory", "hybrid, 7,225 slots", f"{HYBRID}:n_keys=85{RATES}"),
    ],
    "longer": [
        Row("copies", "llama-pro", "llama-pro:lr=6e-3:tokens=2400000"),
        Row("memory", "head query, n=32", f"midus{RATES}:tokens=2400000"),
        Row("memory", "token query, n=64", f"{TOKEN}:n_keys=64{RATES}:tokens=2400000"),
        Row("memory", "token query, n=128", f"{TOKEN}:n_keys=128{RATES}:tokens=2400000"),
    ],
}


# ---- Methods -------------------------------------------------------------------------------------
def read_method(text: str) -> tuple[str, dict]:
    """ "midus:n_keys=64" -> its name and its options. Raises ValueError if it cannot be read."""
    name, *parts = text.split(":")
    known = OF_THE_RUN + (("n_new", "positions") if name == "none" else ())
    if name in METHODS:
        known += METHODS[name].options
    elif name != "none":
        raise ValueError(f"--methods: {name} is none of none, {', '.join(METHODS)}")
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if option not in known or not equals:
            raise ValueError(f"--methods: cannot read {part!r}; {name} takes {', '.join(known)}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            options[option] = value
        if option == "positions":
            options[option] = common.whole_numbers(value)
        if option == "train" and value not in ("new", "all"):
            raise ValueError(f"--methods: train is new or all; not {value}")
    return name, options


def build(base: GPT, name: str, options: dict) -> tuple[GPT, str]:
    """The deeper model, and what of it trains when only new blocks do."""
    shaping = {option: options[option] for option in options if option not in OF_THE_RUN}
    if name == "none":
        blocks = place(base.config.n_layer, False, **shaping)
        return base, ",".join(str(block) for block in blocks)
    return upscale(base, name, **shaping), "new"


def has_bank(model: GPT) -> bool:
    return any(name.endswith("hive.bank") for name, _ in model.named_parameters())


def multiplications(model: GPT) -> int:
    """Per token, in the new blocks. Attention's own products and the search are left out.

    Every number of a matrix is multiplied once, those of the scores' keys too; of a bank only the
    entries that are read.
    """
    total = 0
    for i in model.config.new:
        for name, parameter in model.h[i].named_parameters():
            if name.endswith("hive.bank"):
                reads = model.config.n_head * model.config.top_k
                total += reads * parameter.size(1)
            elif name.endswith("hive.proj"):  # one for all heads is used by each
                total += parameter.numel() * model.config.n_head // max(1, parameter.size(0))
            elif parameter.dim() >= 2:
                total += parameter.numel()
    return total


# ---- What names a run ----------------------------------------------------------------------------
def without_docstrings(node: ast.AST) -> str:
    """The code of a node as text; comments and layout are gone with the docstrings."""
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and len(body) > 1 and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                del body[0]
    return ast.unparse(node)


def code_of(files: list[str], wanted: set[str] | None) -> str:
    """The code of these names, and of all names in these files that they use, as text.

    wanted: None for all there is.
    """
    nodes = {}
    for file in files:
        with open(os.path.join(ROOT, file), encoding="utf-8") as source:
            for node in ast.parse(source.read()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    nodes[node.name] = node
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    nodes[node.targets[0].id] = node
    found = set()
    waiting = set(nodes if wanted is None else wanted) & nodes.keys()
    while waiting:
        name = waiting.pop()
        found.add(name)
        used = {inner.id for inner in ast.walk(nodes[name]) if isinstance(inner, ast.Name)}
        waiting |= (used & nodes.keys()) - found - {"METHODS"}
    return "\n".join(without_docstrings(nodes[name]) for name in sorted(found))


def hash_of_code(name: str) -> str:
    """Of all code that decides what a method's run gives."""
    function = METHODS[name].build if name in METHODS else place
    files = ["upscale.py", "experiments/methods.py", inspect.getsourcefile(function)]
    parts = [
        code_of(["hml.py", "model.py"], None),
        code_of(files, {function.__name__, "set_trainable"}),
        code_of(["train.py"], {"make_optimizer", "schedule", "train_step"}),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def hash_of_model(model: GPT) -> str:
    digest = hashlib.sha256(repr(model.config).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


NAMING = (
    *("base", "texts", "method", "options", "train", "tokens", "batch_size", "lr", "memory_lr"),
    *("weight_decay", "split", "seed", "dtype", "device", "code"),
)


# ---- One run -------------------------------------------------------------------------------------
def start_of(words: list[str]) -> tuple[GPT, argparse.Namespace, torch.device]:
    """The base and the settings of runs, as train.py's flags `words` ask for them."""
    args = train.parse_arguments(words)
    device = common.pick_device(args.device)
    name, base, config, info = train.find_base(args)
    settings = train.choose_settings(args, name, config, info, device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # runs go side by side
    if base is None:
        base = train.get_base(settings, device)
    return base.to(device), settings, device


def read_texts(settings: argparse.Namespace) -> tuple[dict, dict]:
    """The new and the old text, by split; the old one is {} where there is none."""
    new = load_dataset(settings.dataset, settings.tokenizer, settings.data_dir)
    old = {}
    if settings.old_dataset is not None:
        source = (settings.old_dataset, settings.tokenizer, settings.old_data_dir)
        old = load_dataset(*source, ("valid", "test"))
    return new, old


def measure(model: GPT, new: dict, old: dict, split: str) -> dict:
    """Perplexity on the new and on the old text: of "valid" its first part, of "test" all."""
    limit = TRIAL_TOKENS if split == "valid" else None
    figures = {}
    for kind, text in (("new", new), ("old", old)):
        if text:
            nll, count = sum_nll(model, text[split].tokens[:limit])
            figures[kind] = perplexity(nll, count)
    return figures


def slots_in_use(model: GPT, new: dict) -> list[float]:
    """The share of slots that are a head's best for some token, by block, a mean over heads."""
    with count_usage(model) as counts:
        if counts:
            sum_nll(model, new["valid"].tokens[:USAGE_TOKENS])
    return [usage(reads)["top1"] for reads in counts.values()]


def make(run: dict, words: list[str]) -> dict:
    """Trains one model. Returns the run with its figures, as plain types."""
    with contextlib.redirect_stdout(None):  # what train.py says of the base was said before
        base, settings, device = start_of(words)
    new, old = read_texts(settings)
    torch.manual_seed(run["seed"])
    model, which = build(base, run["method"], run["options"])
    set_trainable(model, which if run["train"] == "new" else "all")

    settings.upscale = run["method"]
    for name in ("tokens", "lr", "seed"):
        setattr(settings, name, run[name])
    settings.memory_lr = run["memory_lr"] or 0.0
    result = dict(run)
    added = {p for i in model.config.new for p in model.h[i].parameters()}  # a shared one once
    result["added"] = sum(p.numel() for p in added)
    result["multiplications"] = multiplications(model)
    look_inside = run["split"] == "test" and run["seed"] == 1
    if look_inside:
        result["used_at_start"] = slots_in_use(model, new)
    progress = train.new_progress({})
    try:
        train.train(model, settings, progress, new)
        result["end"] = measure(model, new, old, run["split"])
    except FloatingPointError:
        result["end"] = None  # diverged
    if look_inside:
        result["used"] = slots_in_use(model, new)
    result["losses"] = [round(loss, 4) for loss in progress["losses"][::16]]
    result["tokens_per_second"] = train.tokens_per_second(progress, settings)
    result["torch"] = torch.__version__
    result["python"] = platform.python_version()
    return result


# ---- Many runs -----------------------------------------------------------------------------------
class Results:
    """Finished runs, those of the file and those made now."""

    def __init__(self, path: str, stale: bool):
        self.path = path
        self.names = [name for name in NAMING if name != "code" or not stale]
        self.runs = []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines = file.read().split("\n")
            # The last line may be cut by a crash; a run that is lost is made again.
            for number, line in enumerate(lines):
                try:
                    run = json.loads(line)
                    assert set(NAMING) <= run.keys()
                    self.runs.append(run)
                except (ValueError, AssertionError, AttributeError):
                    if number < len(lines) - 1:
                        sentence = "is not a results file of this program; name another"
                        raise ValueError(f"{path} {sentence} with --results") from None

            # A cut line goes, so that the next run begins a line of its own.
            if lines[-1]:
                with common.written_whole(path) as temporary, open(temporary, "w") as file:
                    file.writelines(json.dumps(run) + "\n" for run in self.runs)

    def find(self, run: dict) -> dict | None:
        """The finished run of this name; of several, one that today's code has made."""
        same = [d for d in self.runs if all(d[name] == run[name] for name in self.names)]
        return min(same, key=lambda d: d["code"] != run["code"], default=None)

    def differs_in_code_alone(self, run: dict) -> bool:
        rest = [name for name in NAMING if name != "code"]
        return any(all(done[name] == run[name] for name in rest) for done in self.runs)

    def add(self, run: dict) -> None:
        self.runs.append(run)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def describe(run: dict) -> str:
    """A line about a finished run, which needs no key."""
    options = "".join(f", {name} {value}" for name, value in run["options"].items())
    rates = f"lr {run['lr']:g}"
    if run["memory_lr"] is not None:
        rates += f", banks {run['memory_lr']:g}"
    what = f"{run['method']}{options}; {run['train']} trained; {rates}; seed {run['seed']}"
    if run["end"] is None:
        return f"{what}: diverged"
    figures = [
        f"{kind} text {run['end'][kind]:.3f}" for kind in ("new", "old") if kind in run["end"]
    ]
    return f"{what}: {run['split']} perplexity, {', '.join(figures)}"


def make_all(runs: list[dict], results: Results, pool: ProcessPoolExecutor, words: list) -> None:
    """Makes the runs that are not there, and keeps each when it ends."""
    missing = []
    for run in runs:
        if results.find(run) is None and run not in missing:
            missing.append(run)
    if not missing:
        return
    stale = sum(results.differs_in_code_alone(run) for run in missing)
    read = len(runs) - len(missing)
    print(f"{read} runs read, {len(missing)} to make", flush=True)
    if stale:
        print(f"{stale} of them are there, made by other code; --stale would read them")

    # One that fails does not take the others with it.
    failure = None
    futures = [pool.submit(make, run, words) for run in missing]
    for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=None):
        try:
            results.add(future.result())
            tqdm.write(describe(results.runs[-1]))
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


# ---- Rates ---------------------------------------------------------------------------------------
def end_of(run: dict | None) -> float:
    """Perplexity on the new text at the end; infinite if it diverged."""
    return math.inf if run is None or run["end"] is None else run["end"]["new"]


def search(
    trials: dict[str, dict[float, dict]], results: Results, make_them: Callable[[list], None]
) -> dict[str, float]:
    """The best rate of each method. trials: by method, a run for each rate.

    Each method starts in the middle of its rates and goes on while a neighbour is better. So a wide
    grid costs no more than a narrow one, and the best seldom lies at its edge.
    """
    best = {}
    while True:
        missing = []
        for method, runs in trials.items():
            rates = sorted(runs)
            done = [i for i, rate in enumerate(rates) if results.find(runs[rate]) is not None]
            centre = len(rates) // 2
            if done:
                centre = min(done, key=lambda i: end_of(results.find(runs[rates[i]])))
            best[method] = rates[centre]
            for rate in rates[max(0, centre - 1) : centre + 2]:
                if results.find(runs[rate]) is None:
                    missing.append(runs[rate])
        if not missing:
            return best
        make_them(missing)


def choose_rates(
    first: dict[str, dict], results: Results, make_them: Callable[[list], None]
) -> dict[str, tuple[float, float | None]]:
    """lr and the banks' rate that are best for each method. first: a run of each."""

    def vary(method: str, lr: float, memory_lr: float | None) -> dict:
        run = dict(first[method], split="valid", seed=0, lr=lr)
        run["memory_lr"] = memory_lr
        return run

    # First lr, with the bank's rate in the middle: all pairs would be too many.
    given = {method: run["lr"] for method, run in first.items()}
    banks = {method: run["memory_lr"] for method, run in first.items()}
    middle = {
        method: MEMORY_LRS[len(MEMORY_LRS) // 2] if bank == 0 else bank
        for method, bank in banks.items()
    }
    trials = {
        method: {lr: vary(method, lr, middle[method]) for lr in LRS}
        for method in first
        if given[method] == 0
    }
    lrs = given | search(trials, results, make_them)
    for method in trials:
        if lrs[method] in (LRS[0], LRS[-1]):
            print(f"{method}: the best lr lies at the edge of those tried")

    # Then the bank's, with that lr.
    trials = {
        method: {bank: vary(method, lrs[method], bank) for bank in MEMORY_LRS}
        for method in first
        if banks[method] == 0
    }
    memory_lrs = banks | search(trials, results, make_them)
    for method in trials:
        if memory_lrs[method] in (MEMORY_LRS[0], MEMORY_LRS[-1]):
            print(f"{method}: the best rate of banks lies at the edge of those tried")
    return {method: (lrs[method], memory_lrs[method]) for method in first}


# ---- Table ---------------------------------------------------------------------------------------
def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """Mean, and half the range where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
    return text


def print_table(rows: list[Row], finals: dict[str, list[dict]], at_start: dict) -> None:
    """A row per method; the share of what two copies of llama-pro gain is in nats."""

    def gain(method: str) -> float:
        ends = [math.log(end_of(run)) for run in finals[method]]
        return math.log(at_start["new"]) - statistics.mean(ends)

    copies = [m for m in finals if m.startswith("llama-pro") and "n_new" not in m]
    whole = gain(copies[0]) if copies else math.nan

    header = ["new blocks", "parameters added", "multiplications per token added", "tokens/s"]
    header += ["lr, banks", "new text", "old text", "share of llama-pro's gain", "slots ever best"]
    print("| " + " | ".join(header) + " |")
    print("| --- " * len(header) + "|")
    old = f"{at_start['old']:.3f}" if "old" in at_start else ""
    print(f"| the base | | | | | {at_start['new']:.3f} | {old} | | |")
    for row in rows:
        runs = finals[row.method]
        one = runs[0]
        cells = [row.words, f"{one['added']:,}", f"{one['multiplications']:,}"]
        cells.append(f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}")
        bank = "" if one["memory_lr"] is None else f", {one['memory_lr']:g}"
        cells.append(f"{one['lr']:g}{bank}")
        ended = [run["end"] for run in runs if run["end"] is not None]
        if len(ended) < len(runs):
            cells.append(f"{len(runs) - len(ended)} of {len(runs)} diverged")
            print("| " + " | ".join(cells) + " |")
            continue
        for kind in ("new", "old"):
            known = [end[kind] for end in ended if kind in end]
            cells.append(mean_and_spread(known) if known else "")
        cells.append(f"{gain(row.method) / whole:.0%}" if math.isfinite(whole) else "")
        cells.append(" / ".join(f"{used:.0%}" for used in one.get("used", [])))
        print("| " + " | ".join(cells) + " |")


def trials_of(run: dict, results: Results) -> list[dict]:
    """The finished trials of rates that belong to a run, from the lowest lr to the highest."""
    same = [name for name in results.names if name not in ("lr", "memory_lr", "split", "seed")]
    found = []
    for done in results.runs:
        alike = all(done[name] == run[name] for name in same)
        if alike and done["split"] == "valid" and done["seed"] == 0 and done["end"] is not None:
            found.append(done)
    return sorted(found, key=lambda done: (done["lr"], done["memory_lr"] or 0))


def print_trials(words: str, trials: list[dict]) -> None:
    """What a method learns, and what that costs, over the rates that were tried."""
    for run in trials:
        bank = "" if run["memory_lr"] is None else f"{run['memory_lr']:g}"
        figures = [f"{run['end'].get(kind, math.nan):.3f}" for kind in ("new", "old")]
        print("| " + " | ".join([words, f"{run['lr']:g}", bank, *figures]) + " |")


# ---- Picture -------------------------------------------------------------------------------------
LINES = ("-o", "--s", ":^", "-.D", "-v")  # dashes and marks that tell lines of a colour apart


def front(runs: list[dict]) -> list[dict]:
    """Those that no other run of the same method beats on both texts, from the least forgotten."""
    kept = []
    for run in sorted(runs, key=lambda run: run["end"]["old"]):
        if not kept or run["end"]["new"] < kept[-1]["end"]["new"]:
            kept.append(run)
    return kept


def colour_of(row: Row) -> str:
    kind = "memory" if "memory" in row.group else row.group
    return plot.COLOURS.get(kind, plot.COLOURS["control"])


def draw(rows: list[Row], trials: dict[str, list[dict]], path: str) -> None:
    """What each method can have of both texts, by the rates that were tried; down left is best."""
    figure, (axis,) = plot.new_figure(8.5, 5)
    ends = []
    drawn = Counter()  # lines of each colour so far
    for row in rows:
        if not trials[row.method]:
            continue
        runs = front(trials[row.method])
        old = [run["end"]["old"] for run in runs]
        new = [run["end"]["new"] for run in runs]
        colour = colour_of(row)
        axis.plot(old, new, LINES[drawn[colour] % len(LINES)], color=colour, markersize=5)
        drawn[colour] += 1
        ends.append((old[-1], new[-1], row.words, colour))
    axis.set_xlabel("perplexity on the old text (lower: less is forgotten)", color=plot.INK)
    axis.set_ylabel("perplexity on the new text (lower: more is learned)", color=plot.INK)
    axis.annotate(
        "better",
        xy=(0.02, 0.03),
        xycoords="axes fraction",
        xytext=(0.1, 0.13),
        textcoords="axes fraction",
        color=plot.INK,
        arrowprops={"arrowstyle": "->", "color": plot.INK},
    )
    plot.name_ends(axis, ends)
    plot.write_picture(figure, path)


def draw_sizes(rows: list[Row], finals: dict[str, list[dict]], path: str) -> None:
    """Both texts, one below the other, against what blocks of growing size add; means of seeds."""
    costs = {"parameters added": "added", "multiplications per token added": "multiplications"}
    figure, axes = plot.new_figure(10, 7, columns=2, rows=2)
    places = [(kind, words) for kind in ("new", "old") for words in costs]
    for axis, (kind, words) in zip(axes, places):
        ends = []
        for number, group in enumerate(dict.fromkeys(row.group for row in rows)):
            of_group = [row for row in rows if row.group == group]
            x = [finals[row.method][0][costs[words]] for row in of_group]
            y = [
                statistics.mean(run["end"][kind] for run in finals[row.method]) for row in of_group
            ]
            axis.plot(x, y, LINES[number % len(LINES)], color=colour_of(of_group[0]), markersize=5)
            ends.append((x[-1], y[-1], group, colour_of(of_group[0])))
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        ticks = [tick for tick in (1e5, 2e5, 5e5, 1e6, 2e6, 5e6) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick / 1e6:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(f"{words}, millions", color=plot.INK)
        axis.set_ylabel(f"perplexity on the {kind} text", color=plot.INK)
        if axis in axes[1::2]:  # on the right
            plot.name_ends(axis, ends)
    plot.write_picture(figure, path)


# ---- The command ---------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("Compare ways to deepen a model; goes on where it was stopped.")
    add = parser.add_argument
    add("tables", nargs="*", default=["main"], help=f"of {', '.join(TABLES)} (default main)")
    add("--methods", nargs="+", help="instead of a table: midus:query=token:n_keys=64 ...")
    add("--seeds", type=common.whole_number, default=3, help="runs per method (default 3)")
    add("--tokens", type=common.whole_number, help="of each run (default: as train.py)")
    add("--split", choices=("valid", "test"), default="test", help="of the table (default test)")
    add("--jobs", type=common.whole_number, help="runs at a time (default: a CPU's cores, else 1)")
    path = os.path.join(ROOT, "experiments", "results", "study.jsonl")
    add("--results", type=common.new_file(".jsonl"), default=path, help="finished runs")
    add("--stale", action="store_true", help="read runs that were made by other code, too")
    add(
        "--plot", type=common.new_file(*plot.ENDINGS), help="draw new against old text to this file"
    )
    for name in ("base", "dataset", "data_dir", "old_dataset", "old_data_dir", "device", "dtype"):
        add(f"--{name}", help="as in train.py")
    args = parser.parse_args()
    for table in args.tables:
        if table not in TABLES:
            raise ValueError(f"there is no table {table}; choose from {', '.join(TABLES)}")
    return args


def main() -> None:
    args = parse_arguments()
    rows = [row for table in args.tables for row in TABLES[table]]
    if args.methods:
        known = {row.method: row for table in TABLES.values() for row in table}
        rows = [known.get(text, Row("", text, text)) for text in args.methods]
    if args.plot:
        plot.check_picture(args.plot)
    methods_of = {row.method: read_method(row.method) for row in rows}

    # The base, and what every method makes of it: what cannot be is refused here.
    words = ["--upscale", "midus"]
    for name in ("base", "dataset", "data_dir", "old_dataset", "old_data_dir", "device", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    base, settings, device = start_of(words)
    new, old = read_texts(settings)
    if args.plot and not old:
        raise ValueError("--plot draws new against old text; name the old one with --old_dataset")
    texts = [split.identity for text in (new, old) for split in text.values()]
    tokens = args.tokens or settings.tokens or len(new["train"].tokens)  # one epoch
    named = hash_of_model(base)
    first = {}
    for method, (name, options) in methods_of.items():
        model, _ = build(base, name, options)
        shaping = {option: options[option] for option in options if option not in OF_THE_RUN}
        first[method] = {
            "base": named,
            "texts": texts,
            "method": name,
            "options": shaping,
            "train": options.get("train", "new"),
            "tokens": options.get("tokens", tokens),
            "batch_size": settings.batch_size,
            "lr": options.get("lr", 0),  # 0: to be found
            "memory_lr": options.get("memory_lr", 0) if has_bank(model) else None,
            "weight_decay": settings.weight_decay,
            "split": args.split,
            "seed": 1,
            "dtype": settings.dtype,
            "device": device.type,
            "code": hash_of_code(name),
        }

    jobs = args.jobs or (os.cpu_count() if device.type == "cpu" else 1)
    results = Results(args.results, args.stale)
    print(f"{len(first)} methods on {settings.base}, {jobs} runs at a time, kept in {args.results}")

    # Another machine trains a base that differs a little, and so do all runs on it.
    if results.runs and not any(run["base"] == named for run in results.runs):
        print(f"the {len(results.runs)} runs in it are on other bases than yours; none is read")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

        def make_them(runs: list[dict]) -> None:
            make_all(runs, results, pool, words)

        try:
            rates = choose_rates(first, results, make_them)
            finals = {}
            for method, run in first.items():
                lr, memory_lr = rates[method]
                chosen = dict(run, lr=lr, memory_lr=memory_lr)
                finals[method] = [dict(chosen, seed=seed + 1) for seed in range(args.seeds)]
            make_them([run for runs in finals.values() for run in runs])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise

    # What it comes to, beside the base.
    print(f"\ntoken-level perplexity, {args.split} splits; means over seeds, ± half their range\n")
    done = {method: [results.find(run) for run in runs] for method, runs in finals.items()}
    print_table(rows, done, measure(base, new, old, args.split))

    # The trials of rates say at which cost on the old text the new one is learned.
    trials = {method: trials_of(run, results) for method, run in first.items()}
    print(f"\ntrials of rates: seed 0, the first {TRIAL_TOKENS:,} tokens of validation splits\n")
    print("| new blocks | lr | banks | new text | old text |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print_trials(row.words, trials[row.method])
    if args.plot and args.tables == ["size"]:
        draw_sizes(rows, done, args.plot)
    elif args.plot:
        draw(rows, trials, args.plot)


if __name__ == "__main__":
    common.run_command(main)
