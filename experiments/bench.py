"""
What a memory block costs: against a copied block, against other memory layers, in a whole model,
and as it grows.

    python experiments/bench.py                         all tables (about 12 minutes on a CPU)
    python experiments/bench.py --tables blocks,layers --threads 2 --dtype bfloat16
    python experiments/bench.py --quick --json out.json

Machines are noisy, so what counts are ratios: the contestants run in turn, each repetition gives
one ratio, and the median stands with the smallest and largest in brackets. On a CPU with one
thread, time is process time, else wall time. Memory is the growth of the process's peak (Linux), or
the peak that CUDA reports. Parameters, operations and bytes are counted, not measured. Shape names:
see hml.py.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import hml
import train
from common import new_file, pick_device, run_command, whole_number, whole_numbers, written_whole
from data import Split, get_batch
from hml import HeadwiseMemory, candidate_pairs, pool
from model import GPT, PRETRAINED, GPTConfig, MemoryBlock, TransformerBlock
from train import make_optimizer, train_step
from upscale import set_trainable, upscale

SIZES = ((64, 8), (128, 16), (128, 32))  # (n_keys, top_k)
C, H, D_V = 768, 12, 64  # GPT-2 124M's width and heads; the latent width of its memory


# ---- Measuring -----------------------------------------------------------------------------------
class Bench:
    """Where and how to measure: device, dtype (by autocast), threads, repetitions."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, threads: int, repeats: int, lengths=(512,)
    ):
        self.device, self.dtype, self.repeats, self.lengths = device, dtype, repeats, lengths
        self.clock = (
            time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
        )
        torch.set_num_threads(threads)

    def run(self, function) -> float:
        """Seconds of one call."""
        self.sync()
        start = self.clock()
        # Not even a disabled autocast around fp32: one inside it would keep its bf16 copies of the
        # weights.
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype) if narrow else nullcontext():
            function()
        self.sync()
        return self.clock() - start

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turns(self, functions: dict) -> dict[str, list[float]]:
        """Seconds of each function, called in turn `repeats` times after one warm-up."""
        for function in functions.values():
            self.run(function)
        times = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                times[name].append(self.run(function))
        return times

    def peak(self, function) -> float:
        """MiB by which one call raises the peak above what is held before.

        Nan where the system does not tell.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run(function)
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(
                0
            )  # hands freed memory back, so that its reuse is seen
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak
            before = status("VmRSS")
        except OSError:  # not Linux
            before = None
        self.run(function)
        return math.nan if before is None else (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """A field of this process's status, in KiB (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def ratio(a: list[float], b: list[float]) -> dict:
    """Of the paired ratios a / b: median, min, max."""
    ratios = [x / y for x, y in zip(a, b)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(value: object) -> str:
    """A cell of a table: a ratio with its range, a number to three digits, or text."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def table(title: str, rows: list[dict]) -> dict:
    """Prints rows as a Markdown table; returns them with their title."""
    print(f"\n### {title}\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(show(value) for value in row.values())} |")
    return {"title": title, "rows": rows}


def step(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A training step's forward and backward through module."""

    def call():
        module.zero_grad()
        x.grad = None
        module(x).float().square().mean().backward()

    return call


def infer(module: nn.Module, *inputs) -> Callable[[], None]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def call():
        module(*inputs)

    return call


# ---- 1. Block against block ----------------------------------------------------------------------
def block_costs(T: int, n: int, k: int) -> dict[str, dict[str, float]]:
    """Counted, per token, forward.

    Parameters, multiply-adds (mean over T), and bytes of parameters read (fp32).
    """
    attention = T / 2 * C * 2  # scores and weighted sum over the tokens so far
    copied, qkv = 12 * C * C + 13 * C, 3 * C * C + 5 * C
    memory = qkv + C * n + n * n * D_V + C * D_V
    read = qkv + C * n + C * D_V + H * k * D_V  # the bank is only read where it is looked up
    return {
        "copied": {"parameters": copied, "madds": 12 * C * C + attention, "bytes": 4 * copied},
        "memory": {
            "parameters": memory,
            "madds": 3 * C * C + attention + C * n + H * k * D_V + C * D_V,
            "bytes": 4 * read,
        },
    }


def make_blocks(b: Bench, n: int, k: int) -> tuple[nn.Module, nn.Module]:
    """A copied block and a memory block, side by side, with something in the bank."""
    torch.manual_seed(0)
    config = GPTConfig(2, H, C, 4096, 256, "TM", n_keys=n, top_k=k, d_latent=D_V)
    copied, memory = TransformerBlock(config).to(b.device), MemoryBlock(config).to(b.device)
    nn.init.normal_(memory.memory.hive.bank, std=0.02)  # as after some training
    return copied, memory


def blocks(b: Bench, quick: bool) -> list[dict]:
    """Copied transformer block, memory block, its FFN alone, HML alone.

    Training, inference, one-token decoding.
    """
    rows = []
    for n, k in SIZES[:1] if quick else SIZES:
        copied, memory = make_blocks(b, n, k)
        for T in tqdm((128,) if quick else b.lengths, desc=f"blocks {n}, {k}", disable=None):
            x = torch.randn(1, T, C, device=b.device, requires_grad=True)
            heads = torch.randn(1, T, H, C // H, device=b.device, requires_grad=True)
            parts = {
                "copied": (copied, x),
                "memory": (memory, x),
                "FFN": (copied.mlp, x),
                "HML": (memory.memory, heads),
                "attention": (nn.Sequential(memory.ln_1, memory.attn), x),  # what both blocks share
            }
            train = b.turns({name: step(*part) for name, part in parts.items()})
            test = b.turns({name: infer(*part) for name, part in parts.items()})
            kept = {
                "k": torch.randn(1, H, T, C // H, device=b.device),
                "v": torch.randn(1, H, T, C // H, device=b.device),
            }
            one = torch.randn(1, 1, C, device=b.device)
            decode = b.turns(
                {
                    name: lambda m=m: infer(m, one, dict(kept))()
                    for name, (m, _) in list(parts.items())[:2]
                }
            )
            costs = block_costs(T, n, k)
            rows.append(
                {
                    "n, k": f"{n}, {k}",
                    "T": T,
                    "train ms copied": statistics.median(train["copied"]) * 1e3,
                    "train ms memory": statistics.median(train["memory"]) * 1e3,
                    "train memory/copied": ratio(train["memory"], train["copied"]),
                    "infer memory/copied": ratio(test["memory"], test["copied"]),
                    "decode memory/copied": ratio(decode["memory"], decode["copied"]),
                    "train attention/copied": ratio(train["attention"], train["copied"]),
                    "infer attention/copied": ratio(test["attention"], test["copied"]),
                    "train HML/FFN": ratio(train["HML"], train["FFN"]),
                    "infer HML/FFN": ratio(test["HML"], test["FFN"]),
                    "MiB copied": b.peak(step(copied, x)),
                    "MiB memory": b.peak(step(memory, x)),
                    "operations": costs["memory"]["madds"] / costs["copied"]["madds"],
                    "bytes/token": costs["memory"]["bytes"] / costs["copied"]["bytes"],
                    "parameters": costs["memory"]["parameters"] / costs["copied"]["parameters"],
                }
            )
    return [table("Block against block (last three columns: memory / copied, counted)", rows)]


# ---- 2. HML against other memory layers ----------------------------------------------------------
class Textbook(HeadwiseMemory):
    """The same layer as usually written.

    All k * k sums, a table of their slots, gather and einsum.
    """

    def forward(self, heads):
        keys, k = self.product_keys, self.product_keys.top_k
        halves = heads.unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys.keys)  # (2, B, T, H, n)
        (row, col), (rows, cols) = scores.topk(k, dim=-1)  # each (B, T, H, k)
        sums = (row[..., :, None] + col[..., None, :]).flatten(-2)  # (B, T, H, k * k)
        slots = (rows[..., :, None] * scores.size(-1) + cols[..., None, :]).flatten(
            -2
        )  # (B, T, H, k * k), int64
        best, at = sums.topk(k, dim=-1)  # (B, T, H, k)
        entries = F.embedding(slots.gather(-1, at), self.hive.bank)  # (B, T, H, k, d_v)
        z = torch.einsum("bthk,bthkv->bthv", best.softmax(-1), entries)
        return torch.einsum("bthv,hvd->bthd", z, self.hive.proj).flatten(2)


def layers(b: Bench, quick: bool) -> list[dict]:
    """Forward and backward of HML, its textbook form, and product-key-memory from PyPI where it is
    installed.
    """
    rows, T = [], 128 if quick else 512
    for n, k in SIZES[:1] if quick else SIZES:
        torch.manual_seed(0)
        ours, textbook = (
            cls(H, C // H, n, k, D_V).to(b.device) for cls in (HeadwiseMemory, Textbook)
        )
        textbook.load_state_dict(ours.state_dict())
        heads = torch.randn(1, T, H, C // H, device=b.device, requires_grad=True)
        functions = {"ours": step(ours, heads), "textbook": step(textbook, heads)}
        try:
            from product_key_memory import PKM

            theirs = PKM(C, heads=H, num_keys=n, topk=k, dim_head=C // H // 2).to(
                b.device
            )  # of a half key
            x = torch.randn(1, T, C, device=b.device, requires_grad=True)
            functions["product-key-memory"] = step(theirs, x)
        except ImportError:
            print("product-key-memory is not installed: pip install product-key-memory")
        times = b.turns(functions)
        peaks = {name: b.peak(function) for name, function in functions.items()}
        for name in functions:
            rows.append(
                {
                    "n, k": f"{n}, {k}",
                    "layer": name,
                    "ms": statistics.median(times[name]) * 1e3,
                    "time / ours": ratio(times[name], times["ours"]),
                    "peak MiB": peaks[name],
                    "peak / ours": peaks[name] / peaks["ours"],
                }
            )
    return [
        table(
            f"HML against other memory layers, forward + backward, T={T} (product-key-memory "
            f"also projects its queries and reads values of width {C}; ours {D_V})",
            rows,
        )
    ]


# ---- 3. Whole model ------------------------------------------------------------------------------
def frozen_ceiling(model: GPT, T: int) -> float:
    """By how much freezing the base can speed training up, counting multiply-adds: all / new only.

    Trained whole, every product costs three times its forward: itself, its input's gradient, its
    weight's. With a frozen base, blocks below the first new one need no backward, old ones above it
    no weight gradient.
    """
    c, all_cost, new_cost = model.config, 0.0, 0.0
    for i, kind in enumerate(c.blocks):
        weights = sum(p.numel() for name, p in model.h[i].named_parameters() if "bank" not in name)
        attention = T * c.n_embd
        all_cost += 3 * (weights + attention)
        new_cost += weights * (3 if i in c.new else 2 if i > min(c.new) else 1)
        new_cost += attention * (3 if i >= min(c.new) else 1)
    head = c.n_embd * c.vocab_size
    return (all_cost + 3 * head) / (new_cost + 2 * head)


def whole(b: Bench, quick: bool) -> list[dict]:
    """Tokens per second of continual pre-training and of generation.

    What train.py's step spends besides.
    """
    T, B = (32, 2) if quick else (256, 8)
    torch.manual_seed(0)
    base = GPT(GPTConfig(6, 4, 256, 1024, 4097)).to(b.device)
    text = np.random.default_rng(0).integers(0, 4097, 100_000).astype(np.uint16)
    functions, models = {}, {}
    for method, which in (
        ("none", "all"),
        ("llama-pro", "new"),
        ("llama-pro", "all"),
        ("midus", "new"),
        ("midus", "all"),
    ):
        name, memory = f"{method}, {which}", {"n_keys": 64, "top_k": 8} if method == "midus" else {}
        model = models[name] = upscale(base, method, **memory) if method != "none" else base
        set_trainable(model, which)
        optimizer = make_optimizer(model, 1e-3, 1e-2, 0.1)
        batch = [half.to(b.device) for half in get_batch(text, 0, B, T, 0)]
        functions[name] = lambda m=model, o=optimizer, x=batch: train_step(m, o, x, b.dtype, 1)
    times = b.turns(functions)
    rows = []
    for name, t in times.items():
        whole_model = name.replace("new", "all")
        rows.append(
            {
                "method, trained": name,
                "tokens/s": B * T / statistics.median(t),
                "speed / the same trained whole": ratio(times[whole_model], t),
                "ceiling by counting": frozen_ceiling(models[name], T) if "new" in name else 1.0,
                "speed / none": ratio(times["none, all"], t),
            }
        )
    tables = [
        table(f"Continual pre-training: 6 layers, C=256, vocabulary 4,097, B={B}, T={T}", rows)
    ]

    tokens, new = torch.zeros(1, 1, dtype=torch.long, device=b.device), 32 if quick else 512

    @torch.no_grad()
    def uncached(model):
        out = tokens
        for _ in range(new):
            out = torch.cat((out, model(out)[:, -1:].argmax(-1)), 1)

    rows, twice = (
        [],
        Bench(b.device, b.dtype, torch.get_num_threads(), 2),
    )  # the slow one takes half a minute
    for name in ("none, all", "midus, new"):
        model = models[name]
        cached = lambda m=model: m.generate(tokens, new, temperature=0)  # noqa: E731
        t = twice.turns({"cached": cached, "uncached": lambda m=model: uncached(m)})
        rows.append(
            {
                "model": name.split(",")[0],
                "tokens/s cached": new / statistics.median(t["cached"]),
                "tokens/s uncached": new / statistics.median(t["uncached"]),
                "cached / uncached speed": ratio(t["uncached"], t["cached"]),
            }
        )
    tables.append(table(f"Generation of {new} tokens, greedy", rows))
    return tables


def overhead(b: Bench, quick: bool) -> list[dict]:
    """What share of a step of train.py's loop is spent outside forward, backward and optimizer."""
    rows = []
    sizes = ("tiny", (4, 4, 128), 64, 16, 3 if quick else 40), ("small", (6, 4, 256), 256, 16, 5)
    for label, shape, T, B, steps in sizes[:1] if quick else sizes:
        torch.manual_seed(0)
        model = upscale(GPT(GPTConfig(*shape, T, 4097)).to(b.device), "midus", n_keys=32, top_k=8)
        set_trainable(model, "new")
        optimizer = make_optimizer(model, 1e-3, 1e-2, 0.1)
        text = np.random.default_rng(0).integers(0, 4097, 100_000).astype(np.uint16)
        settings = train.Settings(
            lr=1e-3,
            memory_lr=1e-2,
            batch_size=B,
            block_size=T,
            grad_accum=1,
            dtype=str(b.dtype).split(".")[1],
            tokens=steps * B * T,
            warmup=1,
            tokenizer="bytes",
            dataset="nothing",
            eval_every=10**9,
            save_every=10**9,
        )
        x, y = get_batch(text, 0, B, T, 0)

        def core(model=model, optimizer=optimizer, x=x, y=y, steps=steps):
            for _ in range(steps):
                model(x.to(b.device), y.to(b.device)).backward()
                optimizer.step()
                optimizer.zero_grad()

        def loop(model=model, settings=settings):
            split = Split(text, 0, 0, "")
            saved = train.save
            train.save = lambda *args: None  # saving does not count
            try:
                data = {"train": split, "valid": split}
                train.train(model, settings, train.Progress(text=""), data, "none.pt", "")
            finally:
                train.save = saved

        t = Bench(b.device, b.dtype, torch.get_num_threads(), 2 if quick else 5).turns(
            {"core": core, "loop": loop}
        )
        rows.append(
            {"model": label, "loop / (forward + backward + optimizer)": ratio(t["loop"], t["core"])}
        )
    return [table("train.py's loop against its three necessary parts", rows)]


# ---- 4. Where the time goes ----------------------------------------------------------------------
def profile(b: Bench, quick: bool) -> list[dict]:
    """The parts of HML's forward, each beside the bound that memory or arithmetic sets on this
    machine.
    """
    a = torch.randn(512 if quick else 2048, 512 if quick else 2048, device=b.device)
    big, to = (
        torch.empty(1 << (20 if quick else 26), device=b.device),
        torch.empty(1 << (20 if quick else 26), device=b.device),
    )
    t = b.turns({"product": lambda: a @ a, "copy": lambda: to.copy_(big)})
    flops = 2 * a.size(0) ** 3 / statistics.median(t["product"])
    bandwidth = 2 * big.nbytes / statistics.median(t["copy"])
    print(
        f"\nlarge matrix product {flops / 1e9:,.0f} GFLOP/s, "
        f"large copy {bandwidth / 1e9:,.1f} GB/s (read + written)"
    )
    rows, T = [], 128 if quick else 512
    for n, k in SIZES[:1] if quick else SIZES:
        torch.manual_seed(0)
        memory = HeadwiseMemory(H, C // H, n, k, D_V).to(b.device)
        keys, hive, i_j = (
            memory.product_keys.keys.detach(),
            memory.hive,
            candidate_pairs(k, b.device),
        )
        halves = torch.randn(1, T, H, 2, C // H // 2, device=b.device)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys)
        best = [hml.topk(half, k)[1] for half in scores]
        weights, slots = memory.read(halves.flatten(-2))
        z = pool(weights, slots, hive.bank)
        P, reads = len(i_j[0]), T * H * k

        def pairs():
            sums = (
                scores[0].gather(-1, best[0])[..., i_j[0]]
                + scores[1].gather(-1, best[1])[..., i_j[1]]
            )
            winners = hml.topk(sums, k)[1]
            rows, cols = best[0].gather(-1, i_j[0][winners]), best[1].gather(-1, i_j[1][winners])
            return (scores[0].gather(-1, rows) + scores[1].gather(-1, cols)).softmax(
                -1
            ), rows * n + cols

        parts = {  # function, floating-point operations, bytes
            "scores": (
                lambda: torch.einsum("bthsd,shnd->sbthn", halves, keys),
                2 * T * C * n,
                4 * (T * C + C * n + 2 * T * H * n),
            ),
            "first top-k": (
                lambda: [hml.topk(half, k) for half in scores],
                0,
                4 * 2 * T * H * n + 8 * 2 * reads,
            ),
            "pairs": (pairs, T * H * P, 4 * T * H * P + 8 * 3 * reads),
            "bank read": (
                lambda: pool(weights, slots, hive.bank),
                2 * reads * D_V,
                4 * reads * D_V + 12 * reads,
            ),
            "projection": (
                lambda: torch.einsum("bthv,hvd->bthd", z, hive.proj),
                2 * T * C * D_V,
                4 * (T * H * D_V + C * D_V + T * C),
            ),
            "forward, whole": (lambda: memory(halves.flatten(-2)), 0, 0),
            "forward + backward": (step(memory, halves.flatten(-2).requires_grad_()), 0, 0),
        }
        with torch.no_grad():
            t = b.turns({name: part[0] for name, part in parts.items() if "backward" not in name})
        t |= b.turns({name: part[0] for name, part in parts.items() if "backward" in name})
        for name, (_, operations, touched) in parts.items():
            bound = max(operations / flops, touched / bandwidth) * 1e3
            rows.append(
                {
                    "n, k": f"{n}, {k}",
                    "part": name,
                    "ms": statistics.median(t[name]) * 1e3,
                    "share of forward": ratio(t[name], t["forward, whole"]),
                    "bound ms": bound if operations + touched else "-",
                }
            )
    return [table(f"Where HML's time goes, T={T}", rows)]


# ---- 5. How the cost grows -----------------------------------------------------------------------
def growth(b: Bench, quick: bool) -> list[dict]:
    """Time and memory of HML as one of n_keys, top_k, T, H grows and the rest stays."""
    standard, rows = {"n": 128, "k": 16, "T": 512, "H": 12}, []
    grid = {
        "n": (32, 64, 128, 256, 512, 1024),
        "k": (4, 8, 16, 32, 64),
        "T": (128, 256, 512, 1024, 2048),
        "H": (3, 6, 12, 24),
    }
    for name, values in grid.items():
        for value in values[:2] if quick else values:
            s = standard | {name: value}
            memory = HeadwiseMemory(s["H"], 64, s["n"], s["k"], D_V).to(b.device)
            heads = torch.randn(1, s["T"], s["H"], 64, device=b.device, requires_grad=True)
            t = b.turns({"infer": infer(memory, heads), "train": step(memory, heads)})
            rows.append(
                {
                    "grows": name,
                    "value": value,
                    "slots": s["n"] ** 2,
                    "infer ms": statistics.median(t["infer"]) * 1e3,
                    "train ms": statistics.median(t["train"]) * 1e3,
                    "peak MiB": b.peak(step(memory, heads)),
                    "parameters (MiB)": sum(p.numel() for p in memory.parameters()) * 4 / 2**20,
                }
            )
    return [table("Growth: others at n=128, k=16, T=512, H=12, d_h=64", rows)]


# ---- 6. What training GPT-2 124M holds in memory -------------------------------------------------
def saved(b: Bench, quick: bool) -> list[dict]:
    """Counted, not measured.

    Weights, gradients + Adam, and what autograd keeps for backward (bf16 autocast).
    """
    base = GPT(GPTConfig(2, 2, 128, 64, 257) if quick else PRETRAINED["gpt2"])
    T, rows = base.config.block_size, []
    for method, which in (
        ("midus", "new"),
        ("midus", "all"),
        ("llama-pro", "new"),
        ("llama-pro", "all"),
    ):
        model = upscale(base, method)
        set_trainable(model, which)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}
        for B in (1, 2):
            storages = {}

            def pack(tensor, storages=storages):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            x = torch.zeros(B, T, dtype=torch.long)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", torch.bfloat16):
                model(x, x)
            kept[B] = sum(storages.values()) / 2**30
        weights = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(
            {
                "method, trained": f"{method}, {which}",
                "GiB weights": weights * 4 / 2**30,
                "GiB gradients + Adam": trained * 12 / 2**30,
                "GiB kept, any batch": 2 * kept[1] - kept[2],
                f"GiB kept per sequence of {T}": kept[2] - kept[1],
            }
        )
    return [table("Memory to train an up-scaled GPT-2, counted", rows)]


# ---- 7. What hml.py's last section is worth ------------------------------------------------------
def bag_pool(weights: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """hml.pool with embedding_bag's own backward."""
    flat_weights = weights.flatten(0, 2)
    z = F.embedding_bag(slots.flatten(0, 2), bank, per_sample_weights=flat_weights, mode="sum")
    return z.view(*slots.shape[:3], -1)


def tricks(b: Bench, quick: bool) -> list[dict]:
    """A training step of the README's main command, without one part of that section at a time."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(4, 4, 128, 64, 257)).to(b.device)
    model = upscale(base, "midus", n_keys=32, top_k=8, d_latent=32)
    set_trainable(model, "new")
    optimizer = make_optimizer(model, 1e-3, 1e-2, 0.1)
    x = torch.randint(257, (16, 64), device=b.device)
    forms = {
        "as it is": (hml.topk, hml.pool),
        "plain_topk": (hml.plain_topk, hml.pool),
        "embedding_bag's own backward": (hml.topk, bag_pool),
        "plain_pool": (hml.topk, hml.plain_pool),
    }

    def step_with(topk, pool):
        def call():
            hml.topk, hml.pool = topk, pool
            train_step(model, optimizer, (x, x), b.dtype, 1)
            hml.topk, hml.pool = forms["as it is"]

        return call

    times = b.turns({name: step_with(*form) for name, form in forms.items()})
    rows = []
    for name, seconds in times.items():
        ms = statistics.median(seconds) * 1e3
        rows.append({"form": name, "ms": ms, "time / as it is": ratio(seconds, times["as it is"])})
    return [table("A training step of the tiny model with other forms of topk and pool", rows)]


TABLES = {
    "tricks": tricks,
    "saved": saved,
    "blocks": blocks,
    "layers": layers,
    "whole": whole,
    "overhead": overhead,
    "profile": profile,
    "growth": growth,
}


def table_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TABLES:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(TABLES)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="What a memory block costs.")
    parser.add_argument(
        "--tables", type=table_names, default=list(TABLES), help="a,b (default: all)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast"
    )
    parser.add_argument("--threads", type=whole_number, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--repeats",
        type=whole_number,
        default=9,
        help="repetitions of each measurement (default 9)",
    )
    parser.add_argument(
        "--lengths",
        type=whole_numbers,
        default=[128, 512, 2048, 4096],
        help="T of the table blocks",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small case of each table, to see that it runs"
    )
    parser.add_argument("--json", type=new_file(".json"), help="also write the tables to this file")
    args = parser.parse_args()
    device = pick_device(args.device)
    b = Bench(
        device,
        getattr(torch, args.dtype),
        args.threads,
        2 if args.quick else args.repeats,
        args.lengths,
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device}"
    if device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name()})"
    about = (
        f"{machine}; {args.threads} thread(s), {args.dtype}, {b.repeats} repetitions; Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    print(f"{about}\nC={C}, H={H}, d_v={D_V}, B=1; ratios: median [smallest, largest]")
    done = [made for name in args.tables for made in TABLES[name](b, args.quick)]
    if args.json:
        with written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump({"about": about, "tables": done}, file, indent=1)


if __name__ == "__main__":
    run_command(main)
