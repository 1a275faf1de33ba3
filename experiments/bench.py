"""
What does a memory block cost, beside a copied block and beside other memory layers?

    python experiments/bench.py                              on a CPU, about six minutes
    python experiments/bench.py --device cuda > report.md    on a GPU: is all right, and how fast?
    python experiments/bench.py --checkpoint ckpt.pt         what bf16 would change in its searches

Machines are noisy, so what counts are ratios: the contestants run in turn, each turn gives one
ratio, and the median stands with the smallest and the largest in brackets. On a CPU with one thread
time is the process's own, else the clock's. No download: weights and tokens are random, sizes those
of GPT-2 124M. Shape names: see hml.py.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import hml
import train
from data import load_dataset
from eval import sum_nll
from hml import HeadwiseMemory
from model import GPT, PRETRAINED, GPTConfig, MemoryBlock, TransformerBlock, open_model
from plot import COLOURS, ENDINGS, INK, check_picture, name_ends, new_figure, write_picture
from upscale import set_trainable, upscale

SIZES = ((64, 8), (128, 16), (128, 32))  # n_keys and top_k
C = 768  # GPT-2 124M's width,
H = 12  # its heads,
D_V = 64  # and the width of an entry of its memory
SEQUENCES = 4  # that a GPU has at once: train.py cuts GPT-2's batch of 32 in 8 parts


# ---- Measuring -----------------------------------------------------------------------------------
def turns(functions: dict[str, Callable], args: Namespace) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, after two calls to warm up."""
    # The process's clock does not mind what else the machine does; it adds threads up, though.
    alone = args.device.type == "cpu" and args.threads == 1
    clock = time.process_time if alone else time.perf_counter
    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    times = {name: [] for name in functions}
    for turn in range(args.repeats + 2):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            if turn >= 2:
                times[name].append(clock() - start)
    return times


def ms(times: list[float]) -> float:
    return statistics.median(times) * 1e3


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b)]


def contest(functions: dict[str, Callable], args: Namespace, **about) -> list[dict]:
    """A row for each function, which begins with `about`: its time, also beside the first's."""
    times = turns(functions, args)
    first = list(times)[0]
    rows = []
    for name, spent in times.items():
        row = {**about, "what": name, "ms": ms(spent)}
        row[f"time / {first}"] = ratios(spent, times[first])
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            functions[name]()
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30  # with all that is held
        rows.append(row)
    return rows


def autocast(args: Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)


def step(module: Callable, inputs: Tensor, args: Namespace) -> Callable[[], None]:
    """A training step's forward and backward through a module, or a function of inputs alone."""
    leaves = [inputs]
    if isinstance(module, nn.Module):
        leaves += module.parameters()

    def call() -> None:
        with autocast(args):
            out = module(inputs)
        torch.autograd.grad(out.float().square().mean(), leaves)

    return call


@torch.no_grad()
def infer(module: nn.Module, args: Namespace, *inputs) -> None:
    """A forward pass without gradients."""
    with autocast(args):
        module(*inputs)


def patched(function: Callable, **ways: Callable) -> Callable:
    """The function, while names in hml.py stand for other ways to do the same."""

    def call(*inputs):
        with patch.multiple(hml, **ways):
            return function(*inputs)

    return call


def make_heads(args: Namespace, T: int, n_head: int = H) -> Tensor:
    """What a memory layer is asked with: (1, T, H, d_h)."""
    return torch.randn(1, T, n_head, C // H, device=args.device, requires_grad=True)


def fill_banks(model: nn.Module) -> None:
    """Something in every bank, as after some training."""
    for module in model.modules():
        if isinstance(module, hml.HIVE):
            nn.init.normal_(module.bank, std=0.02)


def make_memory(args: Namespace, n: int, k: int, kind: type = HeadwiseMemory) -> HeadwiseMemory:
    torch.manual_seed(0)
    memory = kind(H, C // H, n, k, D_V).to(args.device)
    fill_banks(memory)
    return memory


# ---- Tables --------------------------------------------------------------------------------------
def cell(value: object) -> str:
    """A list of ratios as median and range, a number to three digits, or text."""
    if isinstance(value, list):
        return f"{statistics.median(value):.2f} [{min(value):.2f}, {max(value):.2f}]"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(title: str, rows: list[dict]) -> None:
    """A table in Markdown, which can be read as text too. The keys of rows are its columns."""
    lines = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n### {title}\n")
    for line in lines:
        print("| " + " | ".join(word.ljust(width) for word, width in zip(line, widths)) + " |")


# ---- Block against block -------------------------------------------------------------------------
def topk_by_rounds(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """hml.topk, for finite scores, as k rounds of a search for the largest that is left.

    torch.compile can make one kernel of all rounds, which reads a row once; topk on CUDA takes a
    thread block for a row.
    """
    n = scores.size(-1)
    every_place = torch.arange(n, device=scores.device)  # (n,)
    left = scores.detach()  # (..., n)
    places = []
    for _ in range(k):
        # The first place that has the largest; then it is out.
        largest = left.amax(dim=-1, keepdim=True)  # (..., 1)
        place = every_place.where(left == largest, n).amin(dim=-1, keepdim=True)  # (..., 1)
        left = left.masked_fill(every_place == place, -torch.inf)
        places.append(place)
    places = torch.cat(places, dim=-1)  # (..., k), best first
    return scores.gather(-1, places), places


def make_blocks(args: Namespace, n: int, k: int) -> tuple[nn.Module, nn.Module]:
    """A copied block and a memory block of GPT-2's width."""
    torch.manual_seed(0)
    config = GPTConfig(2, H, C, 8192, 256, "TM", n_keys=n, top_k=k, d_latent=D_V)
    copied = TransformerBlock(config).to(args.device)
    memory = MemoryBlock(config).to(args.device)
    fill_banks(memory)
    return copied, memory


def blocks(args: Namespace) -> None:
    """A memory block beside a copied block: training step, inference, one token more."""
    B = SEQUENCES if args.device.type == "cuda" else 1
    rows = []
    for n, k in args.sizes:
        copied, memory = make_blocks(args, n, k)
        shared = nn.Sequential(memory.ln_1, memory.attn)  # what both have
        for T in args.lengths:
            x = torch.randn(B, T, C, device=args.device, requires_grad=True)
            trained = {
                "copied": step(copied, x, args),
                "memory": step(memory, x, args),
                "attention": step(shared, x, args),
            }
            if args.compile:
                torch.compiler.reset()
                compiled = step(torch.compile(memory), x, args)
                trained["copied, compiled"] = step(torch.compile(copied), x, args)
                trained["memory, compiled"] = compiled
                trained["by rounds"] = patched(compiled, topk=topk_by_rounds)
            trained = turns(trained, args)
            inferred = {
                "copied": partial(infer, copied, args, x),
                "memory": partial(infer, memory, args, x),
            }
            inferred = turns(inferred, args)

            # One token more, after T that are in the cache.
            one = torch.randn(B, 1, C, device=args.device)
            past = torch.randn(B, H, T, C // H, device=args.device)
            decoded = {
                "copied": lambda: infer(copied, args, one, {"k": past, "v": past}),
                "memory": lambda: infer(memory, args, one, {"k": past, "v": past}),
            }
            decoded = turns(decoded, args)
            row = {
                "n, k": f"{n}, {k}",
                "T": T,
                "ms copied": ms(trained["copied"]),
                "ms memory": ms(trained["memory"]),
                "training step": ratios(trained["memory"], trained["copied"]),
                "attention alone": ratios(trained["attention"], trained["copied"]),
                "inference": ratios(inferred["memory"], inferred["copied"]),
                "one token more": ratios(decoded["memory"], decoded["copied"]),
            }
            if args.compile:
                for name in ("memory, compiled", "by rounds"):
                    row[name] = ratios(trained[name], trained["copied, compiled"])
            rows.append(row)
    print_table(f"A memory block's time / a copied block's, C={C}, {B} sequences", rows)
    if args.plot:
        draw_lengths(rows, args)


def draw_lengths(rows: list[dict], args: Namespace) -> None:
    """The ratios of `blocks` over T, for the sizes that a model of this width gets by itself."""
    n, k = args.sizes[-2:][0]
    rows = [row for row in rows if row["n, k"] == f"{n}, {k}"]
    lengths = [row["T"] for row in rows]
    figure, (axis,) = new_figure(8, 4)
    ends = [(lengths[-1], 1.0, "a copied block", COLOURS["copies"])]
    axis.axhline(1, color=COLOURS["copies"])
    lines = {"training step": "-", "inference": "--", "one token more": ":"}
    for name, dashes in lines.items():
        medians = [statistics.median(row[name]) for row in rows]
        axis.plot(lengths, medians, dashes, marker="o", color=COLOURS["memory"])
        ends.append((lengths[-1], medians[-1], f"memory block, {name}", COLOURS["memory"]))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens in a sequence", color=INK)
    axis.set_ylabel(f"time / a copied block's\n(n={n}, k={k})", color=INK)
    name_ends(axis, ends)
    write_picture(figure, args.plot)


# ---- The layer: its parts, beside others, as it grows --------------------------------------------
def parts(args: Namespace) -> None:
    """Where the time of the layer goes. Parts are timed one by one and need not add up."""
    T = args.lengths[0]
    rows = []
    for n, k in args.sizes:
        # What each part starts from.
        memory = make_memory(args, n, k).requires_grad_(False)
        keys = memory.product_keys.keys  # (2, H, n, d_h/2)
        heads = make_heads(args, T).detach()
        halves = heads.unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys)  # (2, B, T, H, n)
        weights, slots = memory.read(heads)  # both (B, T, H, k)
        z = hml.pool(weights, slots, memory.hive.bank)  # (B, T, H, d_v)

        # The search begins with the top-k of both halves.
        functions = {
            "forward": partial(memory, heads),
            "scores": partial(torch.einsum, "bthsd,shnd->sbthn", halves, keys),
            "search": partial(hml.product_key_topk, *scores, k),
            "its first top-k": partial(hml.topk, scores, k),
            "reading the bank": partial(hml.pool, weights, slots, memory.hive.bank),
            "projection": partial(torch.einsum, "bthv,hvd->bthd", z, memory.hive.proj),
        }
        rows += contest(functions, args, size=f"{n}, {k}")
    print_table(f"Where the layer's forward pass goes, T={T}", rows)


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


def layers(args: Namespace) -> None:
    """HML, its textbook form, and product-key-memory from PyPI: forward and backward."""
    try:
        from product_key_memory import PKM
    except ImportError:
        PKM = None
        print("\nproduct-key-memory is left out: pip install product-key-memory")
    T = args.lengths[0]
    rows = []
    for n, k in args.sizes:
        heads = make_heads(args, T)
        functions = {
            "ours": step(make_memory(args, n, k), heads, args),
            "textbook": step(make_memory(args, n, k, Textbook), heads, args),
        }
        if PKM is not None:
            half_key = C // H // 2  # which it calls dim_head
            theirs = PKM(C, heads=H, num_keys=n, topk=k, dim_head=half_key).to(args.device)
            x = torch.randn(1, T, C, device=args.device, requires_grad=True)
            functions["product-key-memory"] = step(theirs, x, args)
        rows += contest(functions, args, size=f"{n}, {k}")
    print_table(f"The layer beside others, forward + backward, T={T}", rows)


def growth(args: Namespace) -> None:
    """A training step of the layer as one of n, k, T, H grows and the rest stays."""
    grids = {
        "n": (32, 64, 128, 256, 512, 1024),
        "k": (4, 8, 16, 32, 64),
        "T": (128, 256, 512, 1024, 2048),
        "H": (3, 6, 12, 24),
    }
    rows = []
    for grows, values in grids.items():
        row = {"what grows": grows, "values": "", "ms": ""}
        for value in values[:2] if args.quick else values:
            shape = {"n": 128, "k": 16, "T": 512, "H": 12}
            shape[grows] = value
            sizes = (shape["H"], C // H, shape["n"], shape["k"], D_V)
            memory = HeadwiseMemory(*sizes).to(args.device)
            heads = make_heads(args, shape["T"], shape["H"])
            times = turns({"train": step(memory, heads, args)}, args)
            row["values"] += f" {value}"
            row["ms"] += f" {ms(times['train']):.0f}"
        rows.append(row)
    print_table("The layer's training step as it grows; else n=128, k=16, T=512, H=12", rows)


# ---- What hml.py's fast ways are worth -----------------------------------------------------------
def plain_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores.topk(k, dim=-1)


def plain_pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * F.embedding(slots, bank)).sum(-2)  # (B, T, H, d_v)


def bag_pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    """embedding_bag with the backward it comes with."""
    flat_weights = weights.flatten(0, 2)  # (R, k)
    z = F.embedding_bag(slots.flatten(0, 2), bank, per_sample_weights=flat_weights, mode="sum")
    return z.view(*slots.shape[:3], -1)  # (R, d_v) -> (B, T, H, d_v)


def tricks(args: Namespace) -> None:
    """Training steps without one of them: of the layer alone, and of the README's tiny model."""
    ways = {
        "as it is": {"topk": hml.topk},
        "topk by its definition": {"topk": plain_topk},
        "pool with embedding_bag's backward": {"pool": bag_pool},
        "pool by its definition": {"pool": plain_pool},
    }
    T = args.lengths[0]
    layer = step(make_memory(args, 128, 16), make_heads(args, T), args)
    model = upscale(GPT(GPTConfig(4, 4, 128, 64, 257)).to(args.device), "midus")
    set_trainable(model, "new")
    optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
    x = torch.randint(257, (2 if args.quick else 16, 64), device=args.device)  # (B, T)
    tiny = partial(train.train_step, model, optimizer, (x, x), args.dtype, 1)

    rows = []
    for name, function in {"layer 128, 16": layer, "tiny model": tiny}.items():
        functions = {way: patched(function, **names) for way, names in ways.items()}
        rows += contest(functions, args, trained=name)
    print_table(f"Training steps with other ways; the layer's T={T}", rows)


# ---- On a GPU: is it right? ----------------------------------------------------------------------
def difference(ours: Tensor, wanted: Tensor) -> float:
    """The length of the difference, relative to the length of what is wanted."""
    ours, wanted = ours.detach().double().cpu(), wanted.detach().double().cpu()
    return ((ours - wanted).norm() / wanted.norm()).item()


def run_layer(memory: HeadwiseMemory, way: Callable, heads: Tensor, args: Namespace) -> list:
    """Output, and the gradients of heads and of all weights."""
    heads = heads.detach().to(args.device).requires_grad_()
    with autocast(args):
        out = way(heads)
    leaves = [heads, *memory.parameters()]
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def with_compiled(functions: dict[str, Callable], args: Namespace) -> dict[str, Callable]:
    """The same functions, and with --compile their compiled forms too."""
    if not args.compile:
        return functions
    torch.compiler.reset()
    return functions | {f"{name}, compiled": torch.compile(f) for name, f in functions.items()}


def agreement(args: Namespace) -> None:
    """The layer on this device, in every way, against its definition in fp32 on a CPU."""
    rows = []
    on_cpu = Namespace(device=torch.device("cpu"), dtype=torch.float32)
    for n, k in args.sizes:
        reference = make_memory(on_cpu, n, k)
        heads = make_heads(on_cpu, args.lengths[0])
        definition = patched(reference, topk=plain_topk, pool=plain_pool)
        wanted = run_layer(reference, definition, heads, on_cpu)
        slots = reference.read(heads)[1].sort(dim=-1).values  # (B, T, H, k)

        memory = copy.deepcopy(reference).to(args.device)
        found = memory.read(heads.to(args.device))[1].sort(dim=-1).values.cpu()
        print(f"\nn={n}, k={k}: {(found != slots).any(-1).float().mean():.2%} of sets differ")
        ways = with_compiled({"as it is": memory}, args)
        for name, way in list(ways.items()):
            ways[f"{name}, by rounds"] = patched(way, topk=topk_by_rounds)
        for dtype in (torch.float32, torch.bfloat16):
            for name, way in ways.items():
                row = {"n, k": f"{n}, {k}", "dtype": str(dtype)[6:], "way": name}
                got = run_layer(memory, way, heads, Namespace(device=args.device, dtype=dtype))
                columns = ("output", "of heads", "of keys", "of bank", "of W")
                row.update(zip(columns, map(difference, got, wanted)))
                rows.append(row)
    print_table("Differences, relative: of the output, and of gradients", rows)


# ---- On a GPU: how fast? -------------------------------------------------------------------------
def search(args: Namespace) -> None:
    """torch's topk beside rounds of a search for the largest, for the scores of one half."""
    shape = (1, 32, H) if args.quick else (SEQUENCES, 1024, H)
    rows = []
    for n, k in args.sizes:
        scores = torch.randn(*shape, n, device=args.device)
        functions = {"topk": plain_topk, "rounds": topk_by_rounds}
        functions = with_compiled(functions, args)
        functions = {name: partial(form, scores, k) for name, form in functions.items()}
        rows += contest(functions, args, size=f"{n}, {k}")
    print_table(f"The k best of n scores, for {shape} tokens and heads, fp32", rows)


def gpt2(args: Namespace) -> GPTConfig:
    return GPTConfig(4, 4, 64, 64, 257) if args.quick else PRETRAINED["gpt2"]


def operations_of_a_step(model: GPT, tokens: int) -> float:
    """Floating-point operations that a training step needs; banks and the search left out.

    Each product once forward, once for its input's gradient if anything below trains, and once for
    its weight's gradient if that trains.
    """
    trains = [next(block.parameters()).requires_grad for block in model.h]
    lowest = trains.index(True)
    products = 0
    for i, block in enumerate(model.h):
        weights = sum(p.numel() for name, p in block.named_parameters() if "bank" not in name)
        attending = model.config.block_size * model.config.n_embd  # half of all pairs, twice
        products += weights * (1 + (i >= lowest) + trains[i])
        products += attending * (3 if i >= lowest else 1)
    products += model.wte.weight.numel() * (2 + model.wte.weight.requires_grad)
    return 2 * products * tokens


def whole(args: Namespace) -> None:
    """A training step of GPT-2 124M, up-scaled by six blocks; and of the base, trained whole."""
    # What the card does in a large product, of which a step's share is told.
    side = 256 if args.quick else 8192
    a = torch.randn(side, side, device=args.device, dtype=args.dtype)
    flops = 2 * side**3 / (ms(turns({"product": lambda: a @ a}, args)["product"]) / 1e3)
    print(f"\nlarge product: {flops / 1e12:.3g} TFLOP/s in {args.dtype}")

    rows = []
    config = gpt2(args)
    batch = torch.randint(config.vocab_size, (2, SEQUENCES, config.block_size), device=args.device)
    models = {"memory blocks": "midus", "copied blocks": "llama-pro", "base, all trained": None}
    for name, method in models.items():
        torch.manual_seed(0)
        model = GPT(config).to(args.device)
        if method:
            model = upscale(model, method)
            fill_banks(model)
        set_trainable(model, "new" if method else "all")
        optimizer = train.make_optimizer(model, 1e-4, 1e-3, 0.1)
        torch.compiler.reset()
        wrapped = torch.compile(model) if args.compile else model
        call = partial(train.train_step, wrapped, optimizer, tuple(batch), args.dtype, 1)

        # One at a time: each has the memory to itself.
        (row,) = contest({name: call}, args)
        tokens = batch[0].numel()
        spent = row["ms"] / 1e3
        row["tokens/s"] = tokens / spent
        row["MFU"] = f"{operations_of_a_step(model, tokens) / spent / flops:.0%}"
        del row[f"time / {name}"]
        rows.append(row)
    shape = f"{SEQUENCES} x {config.block_size} tokens"
    print_table(f"A training step, {shape}; MFU: share of the large product's speed", rows)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As in model.py: x (R, C), weight (vocab, C), targets (R,) -> the mean loss."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def aligned_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Tensor cores want multiples of 64: the vocabulary grows to 50,304, and the rest is cut."""
    vocab = len(weight)
    longer = F.pad(weight, (0, 0, 0, -vocab % 64))
    return F.cross_entropy(F.linear(x, longer)[:, :vocab].float(), targets)


def chunked_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A quarter of the logits at a time, which are made again for the backward pass."""
    losses = []
    for rows, wanted in zip(x.chunk(4), targets.chunk(4)):
        losses.append(checkpoint(plain_loss, rows, weight, wanted, use_reentrant=False))
    return torch.stack(losses).mean()


def loss(args: Namespace) -> None:
    """Two candidates for the head and the loss, forward and backward, the embedding frozen."""
    config = gpt2(args)
    R = SEQUENCES * config.block_size
    x = torch.randn(R, config.n_embd, device=args.device, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.n_embd, device=args.device)
    targets = torch.randint(config.vocab_size, (R,), device=args.device)
    forms = {"as it is": plain_loss, "aligned head": aligned_loss, "loss in chunks": chunked_loss}
    functions = {}
    for name, form in with_compiled(forms, args).items():
        functions[name] = step(partial(form, weight=weight, targets=targets), x, args)
    title = f"Head and loss of {R:,} tokens, vocabulary {config.vocab_size:,}"
    print_table(title, contest(functions, args))


def first_steps(args: Namespace) -> None:
    """The README's first command, on two hundred steps of each kind, as train.py prints it."""
    print("\n### The first steps of python train.py --upscale midus\n\n```")
    with tempfile.TemporaryDirectory() as folder:
        words = ["--upscale", "midus", "--device", str(args.device), "--out", f"{folder}/ckpt.pt"]
        words += ["--data_dir", folder, "--base_tokens", "204800", "--tokens", "204800"]
        with patch.object(sys, "argv", ["train.py", *words]):
            train.main()
    print("```")


# ---- What bf16 would change ----------------------------------------------------------------------
def bf16(args: Namespace) -> None:
    """Of the searches on validation text, those that scores in bf16 would end otherwise."""
    model, info = open_model(args.checkpoint)
    searches = {i: b.memory.product_keys for i, b in enumerate(model.h) if hasattr(b, "memory")}
    if not searches:
        raise ValueError(f"{args.checkpoint} has no memory blocks")
    name = info.get("dataset", "pycode")
    theirs = info.get("data_dir") or ""  # which may have been on another machine
    source = (name, info["tokenizer"], theirs if os.path.isdir(theirs) else "data", ("valid",))
    tokens = load_dataset(*source)["valid"].tokens[:32769]

    changed = {keys: [] for keys in searches.values()}

    def compare(keys: hml.ProductKeys, inputs: tuple[Tensor], reads: tuple[Tensor]) -> None:
        query = inputs[0].float()  # (B, T, H, d_h)
        if keys.query_norm:
            query = F.layer_norm(query, query.shape[-1:])
        halves = query.bfloat16().unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, keys.keys.bfloat16())  # (2, B, T, H, n)
        _, slots = hml.product_key_topk(*scores, keys.top_k)  # (B, T, H, k)
        differs = slots.sort(dim=-1).values != reads[1].sort(dim=-1).values  # (B, T, H, k)
        changed[keys].append(differs.any(dim=-1).flatten())

    for keys in searches.values():
        keys.register_forward_hook(compare)
    sum_nll(model.to(args.device), tokens)
    rows = []
    for i, keys in searches.items():
        sets = torch.cat(changed[keys])
        share = sets.float().mean().item()
        rows.append({"block": i + 1, "sets": len(sets), "changed by bf16": f"{share:.1%}"})
    print_table(f"Sets of k={model.config.top_k} slots, validation text of {name}", rows)


# ---- The command ---------------------------------------------------------------------------------
ON_A_CPU = {"blocks": blocks, "parts": parts, "layers": layers, "growth": growth, "tricks": tricks}
ON_A_GPU = {
    "agreement": agreement,
    "blocks": blocks,
    "search": search,
    "whole": whole,
    "loss": loss,
    "first_steps": first_steps,
}
TABLES = ON_A_CPU | ON_A_GPU | {"bf16": bf16}


def parse_arguments() -> Namespace:
    parser = common.Parser("What does a memory block cost?")
    add = parser.add_argument
    add("--tables", help=f"of {', '.join(TABLES)}; a,b (default: those of the device)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: bfloat16 on CUDA)")
    words = "torch.compile too (default: on CUDA)"
    add("--compile", action=argparse.BooleanOptionalAction, help=words)
    add("--threads", type=common.whole_number, default=1, help="CPU threads (default 1)")
    add("--repeats", type=common.whole_number, default=9, help="of each measurement (default 9)")
    words = "T of the table blocks; others take the first (default 512, on CUDA 1024)"
    add("--lengths", type=common.whole_numbers, help=words)
    words = "draw the table blocks over --lengths"
    add("--plot", type=common.new_file(*ENDINGS), help=words)
    add("--checkpoint", help="of the table bf16: a model with memory blocks")
    add("--quick", action="store_true", help="small cases, to see that it runs")
    args = parser.parse_args()

    # What hangs on the device.
    args.device = common.pick_device(args.device)
    on_gpu = args.device.type == "cuda"
    if args.tables:
        names = args.tables.split(",")
    elif args.checkpoint:
        names = ["bf16"]
    else:
        names = ON_A_GPU if on_gpu else ON_A_CPU
    args.tables = list(names)
    if args.dtype is None:
        args.dtype = "bfloat16" if on_gpu and common.has_bf16(args.device) else "float32"
    args.dtype = getattr(torch, args.dtype)
    if args.compile is None:
        args.compile = on_gpu
    args.sizes = SIZES[:1] if args.quick else SIZES
    args.repeats = 2 if args.quick else args.repeats
    args.lengths = args.lengths or [32 if args.quick else 1024 if on_gpu else 512]

    # What cannot be.
    for name in args.tables:
        if name not in TABLES:
            raise ValueError(f"--tables: {name} is none of {', '.join(TABLES)}")
    if args.plot and "blocks" not in args.tables:
        raise ValueError("--plot draws the table blocks; name it in --tables")
    if args.plot:
        check_picture(args.plot)
    if "bf16" in args.tables and args.checkpoint is None:
        raise ValueError("the table bf16 reads a model: --checkpoint ckpt.pt")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}"
    if args.device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name()}), CUDA {torch.version.cuda}"
    print("## What a memory block costs\n")
    print(f"{machine}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{args.threads} thread(s), {args.dtype}, {args.repeats} repetitions: median [min, max]")

    # A compiler, or too little memory, may spoil one table; the others still count.
    failed = []
    for name in args.tables:
        try:
            TABLES[name](args)
        except RuntimeError as error:
            failed.append(name)
            print(f"\n{name} failed: {common.one_line(error)}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    common.run_command(main)
