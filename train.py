"""
One run: from a base GPT to an up-scaled, further trained checkpoint.

    python train.py --upscale midus                          a tiny base is trained first; needs no download
    python train.py --upscale midus --dataset wikitext103    GPT-2 124M on WikiText-103, one GPU
    python train.py --resume                                 go on with ckpt.pt after an interrupt

The base is the model before the new blocks: GPT-2 by name, one of your checkpoints, or `scratch`. A base from scratch
is a run of this very script with --upscale none, kept under the data folder and found again by its settings.
In order: settings and their defaults, the optimizer, the training loop, one run, the command. Shape names: see hml.py.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DATASETS, Split, get_batch, kept, load_dataset, vocab_size
from eval import perplexity, print_table, row, step_seconds, sum_nll
from model import GPT, PRETRAINED, GPTConfig, has_bf16, load_checkpoint, open_model, pick_device
from model import run_command, save_checkpoint
from upscale import MEMORY, METHODS, PLACEMENT, add_arguments, amount, natural, new_file, set_trainable, summary
from upscale import upscale

# ---- Settings: what flags leave open is filled in from the size of the model, and printed ----------------------------
SHAPE = ("n_layer", "n_head", "n_embd")
DIVERGED = "the loss or a gradient became NaN or infinite; try a lower --lr or --memory_lr"
PRESETS = {  # base_*: the run that trains a base from scratch; tokens None: one epoch
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=16, grad_accum=1, base_lr=3e-3, lr=2e-3,
                 memory_lr=1e-2, base_tokens=1_600_000, tokens=800_000, n_keys=32, top_k=8, d_latent=32),
    "small": dict(n_layer=6, n_head=4, n_embd=256, block_size=256, batch_size=16, grad_accum=1, base_lr=2e-3, lr=1e-3,
                  memory_lr=1e-2, base_tokens=1_200_000, tokens=600_000, n_keys=64, top_k=8, d_latent=64),
    "gpt2": dict(block_size=1024, batch_size=32, grad_accum=8, lr=2e-4, memory_lr=1e-3, tokens=None,
                 n_keys=128, top_k=16, d_latent=64),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a GPT, or up-scale one and go on training it.")
    group = parser.add_argument_group("what")
    group.add_argument("--upscale", choices=("none", *METHODS), help="how the base becomes deeper (default none)")
    group.add_argument("--dataset", choices=DATASETS, help="(default: the base's own, or pydocs)")
    group.add_argument("--data_dir", type=os.path.abspath, help="for data, caches, the tiny base (default ./data)")
    group.add_argument("--tokenizer", help="gpt2, gpt2:N or bytes (default: the base's; for scratch: by dataset)")
    group.add_argument("--base", help="scratch, a checkpoint, a .bin file, gpt2, ... (pydocs: scratch, else gpt2)")
    group.add_argument("--train", help="what learns: new (midus, llama-pro), all (else), or blocks, from 1: 2,4,6")
    add_arguments(parser)
    group = parser.add_argument_group("a base from scratch")
    group.add_argument("--n_layer", type=natural, help="transformer blocks")
    group.add_argument("--n_head", type=natural, help="attention heads")
    group.add_argument("--n_embd", type=natural, help="width; a multiple of n_head")
    group.add_argument("--base_tokens", type=natural, help="training tokens of the base, before it is up-scaled")
    group = parser.add_argument_group("training")
    group.add_argument("--block_size", type=natural, help="tokens in a sequence")
    group.add_argument("--tokens", type=natural, help="training tokens of the up-scaled phase, or of the only one")
    group.add_argument("--batch_size", type=natural, help="sequences per optimizer step")
    group.add_argument("--grad_accum", type=natural, help="parts a step's batch is cut in, to save memory")
    group.add_argument("--lr", type=amount, help="peak learning rate")
    group.add_argument("--memory_lr", type=amount, help="peak learning rate of the memory banks")
    group.add_argument("--weight_decay", type=amount, help="of matrices; never of banks (default 0.1)")
    group.add_argument("--warmup", type=amount, help="steps of rising learning rate (default 5%% of the steps)")
    group.add_argument("--eval_every", type=natural, help="steps between validations (default 10%% of the steps)")
    group.add_argument("--save_every", type=natural, help="steps between checkpoints (default 10%% of the steps)")
    group.add_argument("--seed", type=lambda t: natural(t, 0), help="of new weights and the data's order (default 0)")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: bfloat16 where fast)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default no)")
    group = parser.add_argument_group("files")
    group.add_argument("--out", type=new_file, default="ckpt.pt", help="checkpoint, losses beside it (default ckpt.pt)")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with --out, with the settings it was begun with")
    group.add_argument("--overwrite", action="store_true", help="start anew although --out exists; it becomes OUT.old")
    return parser.parse_args()


def settle(args: argparse.Namespace, device: torch.device) -> tuple[dict, GPT | None]:
    """Every setting of the run, as plain types, and the base if it was a file. Nothing long happens here, and whatever
    can be refused is refused here: ValueError, one sentence."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    method = given.get("upscale", "none")
    name = given.get("base", "scratch" if given.get("dataset", "pydocs") == "pydocs" else "gpt2")
    named = {"scratch": {}} | dict.fromkeys(PRETRAINED, {"tokenizer": "gpt2"})
    base, info = (None, named[name]) if name in named else open_model(name)
    dataset = given.get("dataset", info.get("dataset", "pydocs"))
    fixed = base.config if base else PRETRAINED.get(name)
    width = fixed.n_embd if fixed else given.get("n_embd", 128 if dataset == "pydocs" else 256)
    preset = "tiny" if width <= 128 else "small" if width <= 512 or name == "scratch" else "gpt2"

    for names, fits, sentence in (
        ((*SHAPE, "base_tokens"), name == "scratch", f"this run has --base {name}, not scratch"),
        (("base_tokens",), method != "none", "only with --upscale; for a base alone say --tokens"),
        (PLACEMENT, method != "none", "only with --upscale; this run inserts no blocks"),
        (MEMORY, method == "midus", f"only with --upscale midus; {method} inserts no memory blocks"),
        (("memory_lr",), method == "midus" or fixed and "M" in fixed.blocks, "there are no memory blocks"),
    ):
        if not fits and any(n in given for n in names):
            raise ValueError(f"{', '.join(f'--{n}' for n in names if n in given)}: {sentence}")
    settings = PRESETS[preset] | ({"block_size": fixed.block_size} if fixed else {}) | {
        "upscale": method, "dataset": dataset, "base": name, "weight_decay": 0.1, "seed": 0, "compile": False,
        "tokenizer": info.get("tokenizer", "bytes" if dataset == "pydocs" else "gpt2"),
        "train": "new" if method in ("midus", "llama-pro") else "all",
        "dtype": "bfloat16" if has_bf16(device) else "float32",
        **{n: value for n, value in given.items() if n not in ("out", "resume", "overwrite", "device")},
        "data_dir": os.path.abspath(given.get("data_dir", info.get("data_dir", "data"))),
    }  # fmt: skip
    if name == "scratch" and method == "none":
        settings |= {new: given.get(new, settings[f"base_{new}"]) for new in ("lr", "tokens")}
    unused = (() if method == "midus" else MEMORY) + (() if name == "scratch" else (*SHAPE, "base_tokens", "base_lr"))
    settings = {n: value for n, value in settings.items() if n not in unused}

    if settings["tokenizer"] != info.get("tokenizer", settings["tokenizer"]):
        raise ValueError(f"--tokenizer {settings['tokenizer']}: the base was trained with {info['tokenizer']}")
    config = fixed or scratch_config(settings)
    if settings["block_size"] > config.block_size:
        raise ValueError(f"--block_size {settings['block_size']} is more than the base's {config.block_size} positions")
    if vocab_size(settings["tokenizer"]) > config.vocab_size:
        raise ValueError(f"--tokenizer {settings['tokenizer']} has more tokens than the base, {config.vocab_size}")
    with torch.device("meta"):  # shapes without memory: everything that upscale and the blocks would refuse
        model = GPT(config)
        set_trainable(model if method == "none" else deepen(model, settings), settings["train"])
    return settings, base


def scratch_config(s: dict) -> GPTConfig:
    return GPTConfig(s["n_layer"], s["n_head"], s["n_embd"], s["block_size"], vocab_size(s["tokenizer"]))


def deepen(base: GPT, s: dict) -> GPT:
    return upscale(base, s["upscale"], **{name: s[name] for name in (*PLACEMENT, *MEMORY) if name in s})


# ---- Optimizer -------------------------------------------------------------------------------------------------------
def make_optimizer(model: GPT, lr: float, memory_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, each in one group: matrices, vectors (biases, norms), banks.

    Banks get no weight decay, since AdamW would shrink entries nobody read, and a learning rate of their own: an entry
    is read seldom, so it has few steps to learn in [Lample et al. 2019 and later memory layers: 1e-3].
    """
    kinds = (("matrices", lr, weight_decay), ("vectors", lr, 0.0), ("banks", memory_lr, 0.0))
    groups = {kind: {"params": [], "name": kind, "lr": rate, "peak_lr": rate, "weight_decay": decay}
              for kind, rate, decay in kinds}  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "banks" if name.endswith("hive.bank") else "matrices" if parameter.dim() >= 2 else "vectors"
            groups[kind]["params"].append(parameter)
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups.values() if g["params"]], betas=(0.9, 0.95), fused=fused)


def schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step, from 0: linear rise, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- Several processes (torchrun): each trains on its part of a batch; rank 0 evaluates, prints, writes --------------
def join_ranks(device: torch.device) -> tuple[torch.device, int, int]:
    """This process's device, rank and the number of processes, as torchrun's environment variables say."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        patient = timedelta(hours=3)  # the others wait while rank 0 tokenizes or validates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patient)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, ranks


def rank_of_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The mean of each value over all processes; waits for all of them."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()


# ---- Training --------------------------------------------------------------------------------------------------------
@contextmanager
def graceful_stop() -> Iterator[list]:
    """Yields a list that Ctrl-C or SIGTERM puts an entry in, so that the step can end; Ctrl-C again stops at once."""
    stop = []

    def handler(signum, frame):
        if not stop:
            tqdm.write("stopping after this step; Ctrl-C now stops at once, without saving")
        elif signum == signal.SIGINT:  # not a second SIGTERM: torchrun adds its own to one that every process got
            raise KeyboardInterrupt
        stop.append(signum)

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def train_step(model: GPT, optimizer: torch.optim.AdamW, batch: list, dtype: torch.dtype, grad_accum: int) -> float:
    """One optimizer step of the model, wrapped or not, on inputs and targets (B, T), cut in grad_accum parts. Returns
    the mean loss before it, in nats. Raises FloatingPointError if something is NaN."""
    total, parts = 0.0, list(zip(*(half.chunk(grad_accum) for half in batch)))
    for x, y in parts:
        wait = hasattr(model, "no_sync") and x is not parts[-1][0]  # ranks meet in the last part
        with model.no_sync() if wait else nullcontext():
            with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(x, y)[1] / grad_accum
            loss.backward()
        total += loss.detach()
    kinds = {True: [], False: []}  # banks are clipped apart: neither kind's gradients shall scale the other's down
    for group in optimizer.param_groups:
        kinds[group["name"] == "banks"] += group["params"]
    norms = [torch.nn.utils.clip_grad_norm_(parameters, 1.0) for parameters in kinds.values() if parameters]
    if not math.isfinite((total + sum(norms)).item()):
        raise FloatingPointError(DIVERGED)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def fit(model: GPT, data: dict[str, Split], s: dict, state: dict, out: str, device: torch.device) -> None:
    """Trains model in place from state["step"] to the end; keeps out, and a log of losses beside it, up to date.

    state: step, history (a dict per step), rows (of the closing table), seconds spent in training; once saved, also
    the optimizer. No random numbers are drawn here and batch i depends on i and the seed alone, so this is all that
    a bit-equal resume needs. Raises KeyboardInterrupt if interrupted, FloatingPointError for a loss that is NaN.
    """
    optimizer = make_optimizer(model, s["lr"], s["memory_lr"], s["weight_decay"])
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    state |= {name: s[name] for name in ("tokenizer", "dataset", "data_dir")} | {"settings": s, "method": s["upscale"]}
    dtype, step_tokens = getattr(torch, s["dtype"]), s["batch_size"] * s["block_size"]
    train, some = data["train"].tokens, data["valid"].tokens[: 64 * s["block_size"] + 1]
    rank, ranks = rank_of_ranks()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    wrapped = torch.compile(wrapped) if s["compile"] else wrapped
    log_file = os.devnull if rank else f"{out.removesuffix('.pt')}.jsonl"
    bar = tqdm(total=s["steps"], initial=state["step"], unit="step", disable=None if rank == 0 else True)
    with open(log_file, "w") as log, graceful_stop() as stop, bar:
        log.writelines(json.dumps(entry) + "\n" for entry in state["history"])
        while state["step"] < s["steps"]:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(state["step"], s["warmup"], s["steps"])
            batch = get_batch(train, state["step"], s["batch_size"], s["block_size"], s["seed"])
            batch = [half.chunk(ranks)[rank].to(device) for half in batch]
            loss = train_step(wrapped, optimizer, batch, dtype, s["grad_accum"])
            loss, stopping = mean_over_ranks([loss, bool(stop)], device)
            state["step"] += 1
            state["seconds"] += time.perf_counter() - start
            entry = {"step": state["step"], "loss": loss}
            if rank == 0 and state["step"] % s["eval_every"] == 0:
                nll, tokens = sum_nll(model, some)
                entry["valid_loss"] = nll / tokens
                rate = state["step"] * step_tokens / state["seconds"]
                tqdm.write(f"step {state['step']}/{s['steps']}  loss {loss:.3f}  validation perplexity "
                           f"{perplexity(nll, tokens):.2f} on {tokens:,} tokens  {rate:,.0f} tokens/s")  # fmt: skip
            state["history"].append(entry)
            log.write(json.dumps(entry) + "\n")
            bar.update()
            if rank == 0 and (stopping or state["step"] % s["save_every"] == 0 or state["step"] == s["steps"]):
                if not math.isfinite(sum_nll(model, some[: s["block_size"] + 1])[0]):  # a good loss, then a bad update
                    raise FloatingPointError(DIVERGED)
                state["optimizer"] = optimizer.state_dict()
                save_checkpoint(out, model, **state)
                log.flush()
            if stopping:
                raise KeyboardInterrupt(f"interrupted; {out} is saved at step {state['step']} of {s['steps']}; "
                                        "go on with the same command, with --resume if it asks for that")


# ---- One run ---------------------------------------------------------------------------------------------------------
def scratch_base(s: dict, data: dict[str, Split], device: torch.device) -> GPT:
    """The base trained from scratch: a run of its own, kept under the data folder by a hash of all that shapes it."""
    names = ("dataset", "tokenizer", "text", "block_size", "batch_size", "grad_accum", "weight_decay", "seed", "dtype")
    own = {name: s[name] for name in (*names, *SHAPE)} | {"upscale": "none", "base": "scratch", "train": "all"}
    own |= {"tokens": s["base_tokens"], "lr": s["base_lr"], "memory_lr": 0.0}  # it has no banks
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
    path = kept(s["data_dir"], f"base-{key}.pt")
    if os.path.exists(path):
        model, state = load_checkpoint(path)
        own = state.pop("settings")
        if state["step"] == own["steps"]:
            print(f"base: {path}, trained earlier")
            return model.to(device)
        print(f"base: going on with {path}")
    else:
        print(f"base: none yet; training one, kept as {path}")
        own |= {"data_dir": s["data_dir"], "compile": s["compile"]}
        model, state = begin(own, data, device)
    run(own, path, data, device, model, state)
    return model


def begin(s: dict, data: dict[str, Split], device: torch.device, base: GPT | None = None) -> tuple[GPT, dict]:
    """The model a new run starts with, and the state that fit() carries on. Completes the settings s in place."""
    s["tokens"] = s["tokens"] or len(data["train"].tokens)
    s["steps"] = max(1, s["tokens"] // (s["batch_size"] * s["block_size"]))
    for name, parts in (("warmup", 20), ("eval_every", 10), ("save_every", 10)):
        s.setdefault(name, max(1, s["steps"] // parts))
    if s["base"] == "scratch" and s["upscale"] != "none":
        base = scratch_base(s, data, device)
    torch.manual_seed(s["seed"])
    state, model = {"step": 0, "history": [], "rows": [], "seconds": 0.0}, base or GPT(scratch_config(s))
    if s["upscale"] != "none":
        base.to(device).requires_grad_(False)
        if rank_of_ranks()[0] == 0:
            state["rows"].append(row("base", base, data["valid"]))
        model = deepen(base, s)
        print(summary(base, model))
    return model, state


def run(s: dict, out: str, data: dict[str, Split], device: torch.device, model: GPT, state: dict) -> None:
    """Trains model from state to the end of the run, and prints what it does before and the table after."""
    label = "training" if s["upscale"] == "none" else s["upscale"]
    set_trainable(model.to(device), s["train"])
    rank, ranks = rank_of_ranks()
    if rank == 0 and state["step"] == 0:
        state["rows"].append(row(f"{label}, start", model, data["valid"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trained:,} parameters on {device}, {s['dtype']}: {s['tokens']:,} tokens of {s['dataset']} "
          f"({s['tokenizer']}), steps {state['step']} to {s['steps']}, writing {out}")  # fmt: skip
    minutes = (s["steps"] - state["step"]) * step_seconds(model, data["train"], s, ranks) / 60
    print(f"this will take about {minutes:,.1f} min, validation not counted")
    fit(model, data, s, state, out, device)
    if rank == 0:
        print_table([*state["rows"], row(f"{label}, end", model, data["valid"], state, s)], data["valid"])


def main() -> None:
    args = parse_arguments()
    device, rank, ranks = join_ranks(pick_device(args.device))
    if args.resume:
        base, (model, state) = None, load_checkpoint(args.out)
        s = state.pop("settings", {})
        if "step" not in state:
            raise ValueError(f"{args.out} was not written by train.py; name it as --base to train it")
        for name, value in vars(args).items():
            if name in ("data_dir", "dtype", "compile", "grad_accum") and value is not None:  # another machine's
                s[name] = value
            elif name not in ("device", "out", "resume", "overwrite") and value not in (None, s.get(name)):
                raise ValueError(f"--{name} contradicts {args.out}, begun with {s.get(name, 'none')}; drop the flag")
    else:
        if os.path.exists(args.out) and not args.overwrite:
            raise ValueError(f"{args.out} exists; add --resume to go on with it, --overwrite to replace it, or --out")
        s, base = settle(args, device)
    if s["batch_size"] % (s["grad_accum"] * ranks):
        raise ValueError(f"--grad_accum times {ranks} processes must divide the batch of {s['batch_size']}")
    if s["dtype"] == "bfloat16" and device.type != "cpu" and not has_bf16(device):
        raise ValueError(f"--dtype bfloat16: {device} does not have it; use --dtype float32")
    if s["compile"]:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=device))
        except Exception as error:  # each backend raises a kind of its own
            raise ValueError(f"--compile does not work here; say --no-compile: {str(error).splitlines()[0]}") from None
    print("settings:", ", ".join(f"{name} {value}" for name, value in s.items()))
    for first in (True, False):  # rank 0 downloads and tokenizes in the first turn, the others find it in the second
        if (rank == 0) == first:
            data = load_dataset(s["dataset"], s["tokenizer"], s["data_dir"], ("train", "valid"))
            if s["base"] in PRETRAINED and not args.resume:
                base = GPT.from_pretrained(s["base"], s["data_dir"])
        mean_over_ranks([0.0], device)  # the others wait here for rank 0
    get_batch(data["train"].tokens, 0, s["batch_size"], s["block_size"], 0)  # refuses a split that is too short
    text = os.path.basename(data["train"].tokens.filename)  # holds a hash of text and tokenizer; a resume compares it
    if s.setdefault("text", text) != text:
        raise ValueError(f"{s['dataset']} in {s['data_dir']} is not the text {args.out} was begun with; see --data_dir")
    if args.overwrite and rank == 0 and os.path.exists(args.out):
        os.replace(args.out, f"{args.out}.old")
    if not args.resume:
        model, state = begin(s, data, device, base)
    del base  # up-scaling copied it
    run(s, args.out, data, device, model, state)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
