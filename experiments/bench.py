"""
What a memory block costs: against a copied block, against other memory layers, in a whole model,
and as it grows. For a GPU see gpu.py.

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
import dataclasses
import functools
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
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import hml
import train
from common import whole_number, whole_numbers
from data import Split, get_batch
from hml import HeadwiseMemory, candidate_pairs, pool
from model import GPT, PRETRAINED, GPTConfig, MemoryBlock, TransformerBlock
from train import make_optimizer, train_step
from upscale import set_trainable, upscale

SIZES = ((64, 8), (128, 16), (128, 32))  # n_keys and top_k
C = 768  # GPT-2 124M's width,
H = 12  # its heads,
D_V = 64  # and the width of a latent of its memory


# ---- Measuring -----------------------------------------------------------------------------------
@dataclasses.dataclass
class Bench:
    """Where and how to measure."""

    device: torch.device
    dtype: torch.dtype  # of autocast
    threads: int
    repeats: int
    lengths: tuple = (512,)  # T of the table blocks
    quick: bool = False  # one small case of each table

    def __post_init__(self):
        torch.set_num_threads(self.threads)

    def seconds(self, function: Callable) -> float:
        """Seconds of one call."""
        # The process's clock does not mind what else the machine does; it adds threads up, though.
        alone = self.device.type == "cpu" and self.threads == 1
        clock = time.process_time if alone else time.perf_counter
        self.wait()
        start = clock()
        # Not even a disabled autocast around fp32: one inside it would keep its bf16 copies of the
        # weights.
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype) if narrow else nullcontext():
            function()
        self.wait()
        return clock() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turns(self, functions: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each function, called in turn `repeats` times after one warm-up."""
        for function in functions.values():
            self.seconds(function)
        times = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                times[name].append(self.seconds(function))
        return times

    def peak(self, function: Callable) -> float:
        """MiB by which one call raises the peak above what is held before; NaN if nobody tells."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.seconds(function)
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

        # Linux: freed memory is handed back, so that its reuse is seen, and the peak begins anew.
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = process_status("VmRSS")
        except OSError:
            self.seconds(function)
            return math.nan
        self.seconds(function)
        return (process_status("VmHWM") - before) / 1024


def process_status(field: str) -> int:
    """A field of this process's status, in KiB (Linux)."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1])
    raise OSError(f"there is no {field}")


def ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Of the paired ratios a / b: median, min, max."""
    ratios = [x / y for x, y in zip(a, b)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def cell(value: object) -> str:
    """A ratio with its range, a number to three digits, or text."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def table(title: str, rows: list[dict]) -> dict:
    """Prints rows, whose keys are the columns; returns them with their title."""
    print(f"\n### {title}\n")
    common.print_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
    return {"title": title, "rows": rows}


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
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


def sizes(b: Bench) -> tuple:
    return SIZES[:1] if b.quick else SIZES


# ---- Block against block -------------------------------------------------------------------------
def block_costs(T: int, n: int, k: int) -> dict[str, dict[str, float]]:
    """Counted, forward: parameters; per token multiply-adds (mean over T) and bytes read (fp32)."""
    # Both attend: scores and weighted sums, over half of the tokens in the mean.
    attending = T / 2 * C * 2
    norm_and_qkv = 3 * C * C + 5 * C

    # A copied block has four matrices of C x C in attention and eight in its MLP, and reads all.
    copied = 12 * C * C + 13 * C

    # A memory block has keys, a bank and projections. Of the bank it reads k entries per head.
    keys = C * n
    bank = n * n * D_V
    projections = C * D_V
    read = H * k * D_V
    return {
        "copied": {
            "parameters": copied,
            "madds": 12 * C * C + attending,
            "bytes": 4 * copied,
        },
        "memory": {
            "parameters": norm_and_qkv + keys + bank + projections,
            "madds": 3 * C * C + attending + keys + read + projections,
            "bytes": 4 * (norm_and_qkv + keys + read + projections),
        },
    }


def make_blocks(device: torch.device, n: int, k: int) -> tuple[nn.Module, nn.Module]:
    """A copied block and a memory block, side by side, with something in the bank."""
    torch.manual_seed(0)
    config = GPTConfig(2, H, C, 4096, 256, "TM", n_keys=n, top_k=k, d_latent=D_V)
    copied = TransformerBlock(config).to(device)
    memory = MemoryBlock(config).to(device)
    nn.init.normal_(memory.memory.hive.bank, std=0.02)  # as after some training
    return copied, memory


def blocks(b: Bench) -> list[dict]:
    """Copied block, memory block, FFN alone, HML alone: training, inference, decoding."""
    rows = []
    for n, k in sizes(b):
        copied, memory = make_blocks(b.device, n, k)
        shared = nn.Sequential(memory.ln_1, memory.attn)  # what both blocks have
        for T in tqdm((128,) if b.quick else b.lengths, desc=f"blocks {n}, {k}", disable=None):
            x = torch.randn(1, T, C, device=b.device, requires_grad=True)
            heads = torch.randn(1, T, H, C // H, device=b.device, requires_grad=True)
            parts = {
                "copied": (copied, x),
                "memory": (memory, x),
                "FFN": (copied.mlp, x),
                "HML": (memory.memory, heads),
                "attention": (shared, x),
            }
            training = b.turns({name: step(*part) for name, part in parts.items()})
            inference = b.turns({name: infer(*part) for name, part in parts.items()})

            # One token more, after T in the cache.
            k_and_v = torch.randn(2, 1, H, T, C // H, device=b.device)
            one = torch.randn(1, 1, C, device=b.device)

            def decode(block, one=one, k_and_v=k_and_v):
                infer(block, one, {"k": k_and_v[0], "v": k_and_v[1]})()

            decoding = b.turns(
                {
                    "copied": functools.partial(decode, copied),
                    "memory": functools.partial(decode, memory),
                }
            )
            costs = block_costs(T, n, k)
            row = {
                "n, k": f"{n}, {k}",
                "T": T,
                "train ms copied": ms(training["copied"]),
                "train ms memory": ms(training["memory"]),
                "train memory/copied": ratio(training["memory"], training["copied"]),
                "infer memory/copied": ratio(inference["memory"], inference["copied"]),
                "decode memory/copied": ratio(decoding["memory"], decoding["copied"]),
                "train attention/copied": ratio(training["attention"], training["copied"]),
                "infer attention/copied": ratio(inference["attention"], inference["copied"]),
                "train HML/FFN": ratio(training["HML"], training["FFN"]),
                "infer HML/FFN": ratio(inference["HML"], inference["FFN"]),
                "MiB copied": b.peak(step(copied, x)),
                "MiB memory": b.peak(step(memory, x)),
            }
            for column, cost in (
                ("operations", "madds"),
                ("bytes/token", "bytes"),
                ("parameters", "parameters"),
            ):
                row[column] = costs["memory"][cost] / costs["copied"][cost]
            rows.append(row)
    return [table("Block against block (last three columns: memory / copied, counted)", rows)]


# ---- HML against other memory layers -------------------------------------------------------------
class Textbook(HeadwiseMemory):
    """The same layer as usually written: all k * k sums, a table of slots, gather and einsum."""

    def forward(self, heads: Tensor) -> Tensor:
        keys = self.product_keys
        k = keys.top_k
        halves = heads.unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys.keys)  # (2, B, T, H, n)
        n = scores.size(-1)
        (row_best, col_best), (rows, cols) = scores.topk(k, dim=-1)  # each (B, T, H, k)
        sums = row_best[..., :, None] + col_best[..., None, :]  # (B, T, H, k, k)
        slots = rows[..., :, None] * n + cols[..., None, :]  # (B, T, H, k, k)
        best, places = sums.flatten(-2).topk(k, dim=-1)  # (B, T, H, k)
        slots = slots.flatten(-2).gather(-1, places)  # (B, T, H, k)
        entries = F.embedding(slots, self.hive.bank)  # (B, T, H, k, d_v)
        z = torch.einsum("bthk,bthkv->bthv", best.softmax(-1), entries)
        return torch.einsum("bthv,hvd->bthd", z, self.hive.proj).flatten(2)  # (B, T, C)


def layers(b: Bench) -> list[dict]:
    """Forward and backward of HML, of its textbook form, and of product-key-memory from PyPI."""
    rows = []
    T = 128 if b.quick else 512
    try:
        from product_key_memory import PKM
    except ImportError:
        PKM = None
        print("product-key-memory is not installed: pip install product-key-memory")
    for n, k in sizes(b):
        torch.manual_seed(0)
        ours = HeadwiseMemory(H, C // H, n, k, D_V).to(b.device)
        textbook = Textbook(H, C // H, n, k, D_V).to(b.device)
        textbook.load_state_dict(ours.state_dict())
        heads = torch.randn(1, T, H, C // H, device=b.device, requires_grad=True)
        functions = {"ours": step(ours, heads), "textbook": step(textbook, heads)}
        if PKM is not None:
            half = C // H // 2  # its dim_head is the width of a half key
            theirs = PKM(C, heads=H, num_keys=n, topk=k, dim_head=half).to(b.device)
            x = torch.randn(1, T, C, device=b.device, requires_grad=True)
            functions["product-key-memory"] = step(theirs, x)

        times = b.turns(functions)
        peaks = {name: b.peak(function) for name, function in functions.items()}
        for name in functions:
            row = {
                "n, k": f"{n}, {k}",
                "layer": name,
                "ms": ms(times[name]),
                "time / ours": ratio(times[name], times["ours"]),
                "peak MiB": peaks[name],
                "peak / ours": peaks[name] / peaks["ours"],
            }
            rows.append(row)
    also = f"product-key-memory also projects its queries and reads values of width {C}; ours {D_V}"
    title = f"HML against other memory layers, forward + backward, T={T} ({also})"
    return [table(title, rows)]


# ---- A whole model -------------------------------------------------------------------------------
def frozen_ceiling(model: GPT, T: int) -> float:
    """By how much freezing the base can speed training up, counting multiply-adds: all / new only.

    Trained whole, every product costs three times its forward: itself, its input's gradient, its
    weight's. With a frozen base, blocks below the first new one need no backward, old ones above it
    no weight gradient.
    """
    config = model.config
    first = min(config.new)
    whole = 0.0
    frozen = 0.0
    for i, block in enumerate(model.h):
        weights = sum(p.numel() for name, p in block.named_parameters() if "bank" not in name)
        attending = T * config.n_embd
        whole += 3 * (weights + attending)
        if i in config.new:
            passes = 3
        else:
            passes = 2 if i > first else 1
        frozen += weights * passes + attending * (3 if i >= first else 1)
    head = config.n_embd * config.vocab_size
    return (whole + 3 * head) / (frozen + 2 * head)


def random_text(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4097, tokens).astype(np.uint16)


def whole(b: Bench) -> list[dict]:
    """Tokens per second of continual pre-training, and of generation."""
    T = 32 if b.quick else 256
    B = 2 if b.quick else 8
    torch.manual_seed(0)
    base = GPT(GPTConfig(6, 4, 256, 1024, 4097)).to(b.device)
    x, y = get_batch(random_text(100_000), 0, B, T, 0)
    batch = (x.to(b.device), y.to(b.device))  # both (B, T)

    # Each method, with its new blocks trained and whole.
    models = {"none, all": base}
    for which in ("new", "all"):
        models[f"llama-pro, {which}"] = upscale(base, "llama-pro")
        models[f"midus, {which}"] = upscale(base, "midus", n_keys=64, top_k=8)
    functions = {}
    for name, model in models.items():
        set_trainable(model, name.split(", ")[1])
        optimizer = make_optimizer(model, 1e-3, 1e-2, 0.1)
        functions[name] = functools.partial(train_step, model, optimizer, batch, b.dtype, 1)
    times = b.turns(functions)
    rows = []
    for name, seconds in times.items():
        trained_whole = name.replace("new", "all")
        row = {
            "method, trained": name,
            "tokens/s": B * T / statistics.median(seconds),
            "speed / the same trained whole": ratio(times[trained_whole], seconds),
            "ceiling by counting": frozen_ceiling(models[name], T) if "new" in name else 1.0,
            "speed / none": ratio(times["none, all"], seconds),
        }
        rows.append(row)
    title = f"Continual pre-training: 6 layers, C=256, vocabulary 4,097, B={B}, T={T}"
    tables = [table(title, rows)]

    # Generation, with the cache and without. Twice only: the slow one takes half a minute.
    new = 32 if b.quick else 512
    twice = dataclasses.replace(b, repeats=2)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=b.device)

    @torch.no_grad()
    def uncached(model):
        tokens = prompt
        for _ in range(new):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)

    rows = []
    for name in ("none, all", "midus, new"):
        model = models[name]
        functions = {
            "cached": functools.partial(model.generate, prompt, new, temperature=0),
            "uncached": functools.partial(uncached, model),
        }
        times = twice.turns(functions)
        row = {
            "model": name.split(",")[0],
            "tokens/s cached": new / statistics.median(times["cached"]),
            "tokens/s uncached": new / statistics.median(times["uncached"]),
            "cached / uncached speed": ratio(times["uncached"], times["cached"]),
        }
        rows.append(row)
    tables.append(table(f"Generation of {new} tokens, greedy", rows))
    return tables


def overhead(b: Bench) -> list[dict]:
    """What share of a step of train.py's loop is spent outside forward, backward and optimizer."""
    # Name, n_layer, n_head, n_embd, T, B, steps.
    cases = [("tiny", 4, 4, 128, 64, 16, 3 if b.quick else 40)]
    if not b.quick:
        cases.append(("small", 6, 4, 256, 256, 16, 5))
    rows = []
    for label, n_layer, n_head, n_embd, T, B, steps in cases:
        torch.manual_seed(0)
        base = GPT(GPTConfig(n_layer, n_head, n_embd, T, 4097)).to(b.device)
        model = upscale(base, "midus", n_keys=32, top_k=8)
        set_trainable(model, "new")
        optimizer = make_optimizer(model, 1e-3, 1e-2, 0.1)
        text = random_text(100_000)
        x, y = get_batch(text, 0, B, T, 0)
        settings = train.Settings(
            lr=1e-3,
            memory_lr=1e-2,
            batch_size=B,
            block_size=T,
            grad_accum=1,
            dtype=str(b.dtype).split(".")[1],
            compile=False,
            tokens=steps * B * T,
            warmup=1,
            tokenizer="bytes",
            dataset="nothing",
            eval_every=10**9,
            save_every=10**9,
        )

        def core(model=model, optimizer=optimizer, x=x, y=y, steps=steps):
            for _ in range(steps):
                model(x.to(b.device), y.to(b.device)).backward()
                optimizer.step()
                optimizer.zero_grad()

        def loop(model=model, settings=settings, text=text):
            split = Split(text, 0, 0, "")
            data = {"train": split, "valid": split}
            saved = train.save
            train.save = lambda *args: None  # saving does not count
            try:
                train.train(model, settings, train.Progress(text=""), data, "none.pt", "")
            finally:
                train.save = saved

        few = dataclasses.replace(b, repeats=min(b.repeats, 5))
        times = few.turns({"core": core, "loop": loop})
        spent = ratio(times["loop"], times["core"])
        rows.append({"model": label, "loop / (forward + backward + optimizer)": spent})
    return [table("train.py's loop against its three necessary parts", rows)]


# ---- Where the time goes -------------------------------------------------------------------------
def machine_limits(b: Bench) -> tuple[float, float]:
    """Floating-point operations and bytes per second of a large product and a large copy."""
    side = 512 if b.quick else 2048
    length = 1 << (20 if b.quick else 26)
    a = torch.randn(side, side, device=b.device)
    source = torch.empty(length, device=b.device)
    target = torch.empty(length, device=b.device)
    times = b.turns({"product": lambda: a @ a, "copy": lambda: target.copy_(source)})
    flops = 2 * side**3 / statistics.median(times["product"])
    bandwidth = 2 * source.nbytes / statistics.median(times["copy"])
    print(f"\nlarge matrix product {flops / 1e9:,.0f} GFLOP/s, ", end="")
    print(f"large copy {bandwidth / 1e9:,.1f} GB/s (read + written)")
    return flops, bandwidth


def profile(b: Bench) -> list[dict]:
    """The parts of HML's forward, each beside the bound that arithmetic or memory sets."""
    flops, bandwidth = machine_limits(b)
    rows = []
    T = 128 if b.quick else 512
    for n, k in sizes(b):
        torch.manual_seed(0)
        memory = HeadwiseMemory(H, C // H, n, k, D_V).to(b.device)
        keys = memory.product_keys.keys.detach()
        bank = memory.hive.bank
        proj = memory.hive.proj
        i, j = candidate_pairs(k, b.device)  # both (P,)
        P = len(i)
        reads = T * H * k

        # What each part starts from.
        heads = torch.randn(1, T, H, C // H, device=b.device, requires_grad=True)
        halves = heads.detach().unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys)  # (2, B, T, H, n)
        row_best, rows_ = hml.topk(scores[0], k)  # both (B, T, H, k)
        col_best, cols_ = hml.topk(scores[1], k)
        weights, slots = memory.read(heads.detach())
        z = pool(weights, slots, bank)  # (B, T, H, d_v)

        def pairs(row_best=row_best, rows_=rows_, col_best=col_best, cols_=cols_, i=i, j=j, n=n):
            sums = row_best[..., i] + col_best[..., j]  # (B, T, H, P)
            _, winners = hml.topk(sums, rows_.size(-1))  # (B, T, H, k)
            best = row_best.gather(-1, i[winners]) + col_best.gather(-1, j[winners])
            return best.softmax(-1), rows_.gather(-1, i[winners]) * n + cols_.gather(-1, j[winners])

        functions = {
            "scores": lambda h=halves, w=keys: torch.einsum("bthsd,shnd->sbthn", h, w),
            "first top-k": lambda s=scores, k=k: [hml.topk(half, k) for half in s],
            "pairs": pairs,
            "bank read": lambda w=weights, s=slots, v=bank: pool(w, s, v),
            "projection": lambda z=z, w=proj: torch.einsum("bthv,hvd->bthd", z, w),
            "forward, whole": infer(memory, heads.detach()),
        }
        with torch.no_grad():
            times = b.turns(functions)
        times.update(b.turns({"forward + backward": step(memory, heads)}))

        # Floating-point operations, and bytes that are read and written.
        scored = 2 * T * H * n
        work = {
            "scores": (2 * T * C * n, 4 * (T * C + C * n + scored)),
            "first top-k": (0, 4 * scored + 16 * reads),
            "pairs": (T * H * P, 4 * T * H * P + 24 * reads),
            "bank read": (2 * reads * D_V, 4 * reads * D_V + 12 * reads),
            "projection": (2 * T * C * D_V, 4 * (T * H * D_V + C * D_V + T * C)),
        }
        whole_forward = times["forward, whole"]
        for name, seconds in times.items():
            operations, touched = work.get(name, (0, 0))
            bound = max(operations / flops, touched / bandwidth) * 1e3
            row = {
                "n, k": f"{n}, {k}",
                "part": name,
                "ms": ms(seconds),
                "share of forward": ratio(seconds, whole_forward),
                "bound ms": bound if name in work else "-",
            }
            rows.append(row)
    return [table(f"Where HML's time goes, T={T}", rows)]


# ---- How the cost grows --------------------------------------------------------------------------
def growth(b: Bench) -> list[dict]:
    """Time and memory of HML as one of n_keys, top_k, T, H grows and the rest stays."""
    grids = {
        "n": (32, 64, 128, 256, 512, 1024),
        "k": (4, 8, 16, 32, 64),
        "T": (128, 256, 512, 1024, 2048),
        "H": (3, 6, 12, 24),
    }
    rows = []
    for grows, values in grids.items():
        for value in values[:2] if b.quick else values:
            shape = {"n": 128, "k": 16, "T": 512, "H": 12}
            shape[grows] = value
            memory = HeadwiseMemory(shape["H"], 64, shape["n"], shape["k"], D_V).to(b.device)
            size = (1, shape["T"], shape["H"], 64)
            heads = torch.randn(size, device=b.device, requires_grad=True)  # (B, T, H, d_h)
            times = b.turns({"infer": infer(memory, heads), "train": step(memory, heads)})
            parameters = sum(parameter.numel() for parameter in memory.parameters())
            row = {
                "grows": grows,
                "value": value,
                "slots": shape["n"] ** 2,
                "infer ms": ms(times["infer"]),
                "train ms": ms(times["train"]),
                "peak MiB": b.peak(step(memory, heads)),
                "parameters (MiB)": parameters * 4 / 2**20,
            }
            rows.append(row)
    return [table("Growth: others at n=128, k=16, T=512, H=12, d_h=64", rows)]


# ---- What training GPT-2 124M holds in memory ----------------------------------------------------
def kept_for_backward(model: GPT, B: int, T: int) -> float:
    """GiB that autograd keeps of a forward pass of B sequences under bf16 autocast, counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(B, T, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(x, x)
    return sum(storages.values()) / 2**30


def saved(b: Bench) -> list[dict]:
    """Counted, not measured: weights, gradients + Adam, and what autograd keeps (bf16 autocast)."""
    base = GPT(GPTConfig(2, 2, 128, 64, 257) if b.quick else PRETRAINED["gpt2"])
    T = base.config.block_size
    rows = []
    for method in ("midus", "llama-pro"):
        for which in ("new", "all"):
            model = upscale(base, method)
            set_trainable(model, which)
            two = kept_for_backward(model, 2, T)  # so many that their logits come in chunks
            four = kept_for_backward(model, 4, T)
            each = (four - two) / 2
            weights = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            unit = T * base.config.n_embd * model.config.n_layer
            row = {
                "method, trained": f"{method}, {which}",
                "GiB weights": weights * 4 / 2**30,
                "GiB gradients + Adam": trained * 12 / 2**30,
                "GiB kept, any batch": two - 2 * each,
                f"GiB kept per sequence of {T}": each,
                "bytes per token, unit and block": each * 2**30 / unit,
            }
            rows.append(row)
    return [table("Memory to train an up-scaled GPT-2, counted", rows)]


# ---- What hml.py's last section is worth ---------------------------------------------------------
def bag_pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    """hml.pool with embedding_bag's own backward."""
    flat_weights = weights.flatten(0, 2)  # (R, k)
    z = F.embedding_bag(slots.flatten(0, 2), bank, per_sample_weights=flat_weights, mode="sum")
    return z.view(*slots.shape[:3], -1)  # (R, d_v) -> (B, T, H, d_v)


def tricks(b: Bench) -> list[dict]:
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
        hml.topk = topk
        hml.pool = pool
        train_step(model, optimizer, (x, x), b.dtype, 1)
        hml.topk, hml.pool = forms["as it is"]

    times = b.turns({name: functools.partial(step_with, *form) for name, form in forms.items()})
    rows = []
    for name, seconds in times.items():
        as_long = ratio(seconds, times["as it is"])
        rows.append({"form": name, "ms": ms(seconds), "time / as it is": as_long})
    return [table("A training step of the tiny model with other forms of topk and pool", rows)]


# ---- The command ---------------------------------------------------------------------------------
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


def about(b: Bench) -> str:
    """The machine, and how it was measured."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {b.device}"
    if b.device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name()})"
    how = f"{b.threads} thread(s), {str(b.dtype).split('.')[1]}, {b.repeats} repetitions"
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    return f"{machine}; {how}; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = common.Parser("What a memory block costs.")
    add = parser.add_argument
    add("--tables", type=table_names, default=list(TABLES), help="a,b (default: all)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    add("--threads", type=whole_number, default=1, help="CPU threads (default 1)")
    add("--repeats", type=whole_number, default=9, help="of each measurement (default 9)")
    add("--lengths", type=whole_numbers, default=[128, 512, 2048, 4096], help="T of table blocks")
    add("--quick", action="store_true", help="one small case of each table, to see that it runs")
    add("--json", type=common.new_file(".json"), help="also write the tables to this file")
    args = parser.parse_args()

    b = Bench(
        device=common.pick_device(args.device),
        dtype=getattr(torch, args.dtype),
        threads=args.threads,
        repeats=2 if args.quick else args.repeats,
        lengths=tuple(args.lengths),
        quick=args.quick,
    )
    print(about(b))
    print(f"C={C}, H={H}, d_v={D_V}, B=1; ratios: median [smallest, largest]")
    made = []
    for name in args.tables:
        made += TABLES[name](b)
    if args.json:
        with common.written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump({"about": about(b), "tables": made}, file, indent=1)


if __name__ == "__main__":
    common.run_command(main)
