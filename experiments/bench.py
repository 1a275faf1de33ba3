"""
What does a memory block cost, beside a copied block and beside other memory layers?

    python experiments/bench.py                              on a CPU, one or two minutes
    python experiments/bench.py --device cuda > report.md    on a GPU: is all right, and how fast?
    python experiments/bench.py --checkpoint ckpt.pt         what bf16 would change in its searches

Machines are noisy, so what counts are ratios: the contestants run in turn, each turn gives one
ratio, and the median stands with the smallest and the largest in brackets. On a CPU everything runs
on one thread, and time is the process's own; else it is the clock's. No download: weights and
tokens are random, sizes those of GPT-2 124M. Shape names: see hml.py.
"""

import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import hml
import train
from data import load_dataset
from eval import sum_nll
from hml import HeadwiseMemory
from model import GPT, GPTConfig, MemoryBlock, TransformerBlock, open_model
from upscale import set_trainable, upscale

SIZES = ((64, 8), (128, 16), (128, 32))  # n_keys and top_k
C = 768  # GPT-2 124M's width,
H = 12  # its heads,
D_V = 64  # and the width of an entry of its memory
SEQUENCES = 4  # that a GPU has at once: train.py cuts GPT-2's batch of 32 in 8 parts


# ---- Measuring -----------------------------------------------------------------------------------
def turns(functions: dict[str, Callable], args: Namespace) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, after two calls to warm up."""
    # The process's own clock does not mind what else the machine does.
    clock = time.process_time if args.device.type == "cpu" else time.perf_counter
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
        rows.append(row)
    return rows


def autocast(args: Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)


def step(module: nn.Module, args: Namespace, *inputs) -> Callable[[], None]:
    """A training step's forward and backward through a module; the first input has a gradient."""
    leaves = [inputs[0], *module.parameters()]

    def call() -> None:
        with autocast(args):
            out = module(*inputs)
        torch.autograd.grad(out.float().square().mean(), leaves)

    return call


@torch.no_grad()
def infer(module: nn.Module, args: Namespace, *inputs) -> None:
    with autocast(args):
        module(*inputs)


def make_heads(args: Namespace, T: int) -> Tensor:
    """What a memory layer is asked with: (1, T, H, d_h)."""
    return torch.randn(1, T, H, C // H, device=args.device, requires_grad=True)


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
def blocks(args: Namespace) -> None:
    """A memory block beside a copied block: training step and inference."""
    B = SEQUENCES if args.device.type == "cuda" else 1
    rows = []
    for n, k in args.sizes:
        torch.manual_seed(0)
        config = GPTConfig(2, H, C, 8192, 256, "TM", n_keys=n, top_k=k, d_latent=D_V)
        copied = TransformerBlock(config).to(args.device)
        memory = MemoryBlock(config).to(args.device)
        fill_banks(memory)
        shared = nn.Sequential(memory.ln_1, memory.attn)  # what both have
        for T in args.lengths:
            # A block is given the tokens too, which these two do not look at.
            x = torch.randn(B, T, C, device=args.device, requires_grad=True)
            functions = {
                "copied": step(copied, args, x, None),
                "memory": step(memory, args, x, None),
                "attention": step(shared, args, x),
                "copied, inference": partial(infer, copied, args, x, None),
                "memory, inference": partial(infer, memory, args, x, None),
            }
            if args.compile:
                torch.compiler.reset()
                functions["copied, compiled"] = step(torch.compile(copied), args, x, None)
                functions["memory, compiled"] = step(torch.compile(memory), args, x, None)
            times = turns(functions, args)
            row = {
                "n, k": f"{n}, {k}",
                "T": T,
                "ms copied": ms(times["copied"]),
                "ms memory": ms(times["memory"]),
                "training step": ratios(times["memory"], times["copied"]),
                "attention alone": ratios(times["attention"], times["copied"]),
                "inference": ratios(times["memory, inference"], times["copied, inference"]),
            }
            if args.compile:
                pair = (times["memory, compiled"], times["copied, compiled"])
                row["training step, compiled"] = ratios(*pair)
            rows.append(row)
    print_table(f"A memory block's time / a copied block's, C={C}, {B} sequences", rows)


# ---- The layer: beside others, and its parts -----------------------------------------------------
class Textbook(HeadwiseMemory):
    """The same layer as usually written: all k * k sums, a table of slots, gather and einsum."""

    def forward(self, heads: Tensor) -> Tensor:
        k = self.product_keys.top_k
        halves = heads.unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
        scores = torch.einsum("bthsd,shnd->sbthn", halves, self.product_keys.keys)
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
        ours = make_memory(args, n, k)
        textbook = make_memory(args, n, k, Textbook)
        heads = make_heads(args, T)
        functions = {"ours": step(ours, args, heads), "textbook": step(textbook, args, heads)}
        if PKM is not None:
            half_key = C // H // 2  # which it calls dim_head
            theirs = PKM(C, heads=H, num_keys=n, topk=k, dim_head=half_key).to(args.device)
            x = torch.randn(1, T, C, device=args.device, requires_grad=True)
            functions["product-key-memory"] = step(theirs, args, x)
        rows += contest(functions, args, size=f"{n}, {k}")

        # Both forms compute the same, in fp32 to about 1e-6 of it.
        wanted = textbook(heads)
        gap = (ours(heads) - wanted).norm() / wanted.norm()
        print(f"\nn={n}, k={k}: ours differs from the textbook form by {gap:.1e} of its length")
    print_table(f"The layer beside others, forward + backward, T={T}", rows)


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
        score = partial(torch.einsum, "bthsd,shnd->sbthn", halves, keys)
        scores = score()  # (2, B, T, H, n)
        weights, slots = memory.read(heads)  # both (B, T, H, k)
        z = hml.pool(weights, slots, memory.hive.bank)  # (B, T, H, d_v)

        # The search begins with the top-k of both halves.
        functions = {
            "forward": partial(memory, heads),
            "scores": score,
            "search": partial(hml.product_key_topk, *scores, k),
            "its first top-k": partial(hml.topk, scores, k),
            "reading the bank": partial(hml.pool, weights, slots, memory.hive.bank),
            "projection": partial(torch.einsum, "bthv,hvd->bthd", z, memory.hive.proj),
        }
        rows += contest(functions, args, size=f"{n}, {k}")
    print_table(f"Where the layer's forward pass goes, T={T}", rows)


# ---- Steps of train.py ---------------------------------------------------------------------------
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


def steps(args: Namespace) -> None:
    """What train.py does in a step with memory blocks, and with copies; on random tokens."""
    # The sizes are train.py's: GPT-2's on a GPU, else those of the tiny preset.
    preset = "gpt2" if args.device.type == "cuda" else "tiny"
    settings, _ = train.parse_arguments(["--base", "scratch", "--preset", preset])
    train.for_this_machine(settings, args.device)
    dtype = getattr(torch, settings.dtype)
    config = train.scratch_config(settings)
    shape = (2, settings.batch_size, settings.block_size)
    batch = torch.randint(config.vocab_size, shape, device=args.device)  # inputs and targets
    tokens = batch[0].numel()

    # What the machine does in a large product: a step's share of that is its MFU.
    side = 8192 if preset == "gpt2" else 1024
    a = torch.randn(side, side, device=args.device, dtype=dtype)
    flops = 2 * side**3 / (ms(turns({"product": lambda: a @ a}, args)["product"]) / 1e3)
    rows = []
    for method in ("midus", "llama-pro"):
        torch.manual_seed(0)
        model = upscale(GPT(config).to(args.device), method)
        fill_banks(model)
        set_trainable(model, "new")
        rates = (settings.lr, settings.memory_lr, settings.weight_decay)
        optimizer = train.make_optimizer(model, *rates)
        torch.compiler.reset()
        wrapped = torch.compile(model) if settings.compile else model
        work = (optimizer, tuple(batch), dtype, settings.grad_accum)

        # One at a time: each has the memory to itself.
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = turns({method: partial(train.train_step, wrapped, *work)}, args)
        seconds = ms(times[method]) / 1e3
        row = {"--upscale": method, "ms": seconds * 1e3, "tokens/s": tokens / seconds}
        row["MFU"] = f"{operations_of_a_step(model, tokens) / seconds / flops:.0%}"
        if args.device.type == "cuda":
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        rows.append(row)
    sizes = f"{settings.batch_size} x {settings.block_size} tokens, {settings.dtype}"
    speed = f"of {flops / 1e12:.3g} TFLOP/s"
    print_table(f"A step of train.py, preset {preset}, {sizes}; MFU: share {speed}", rows)


# ---- What bf16 would change ----------------------------------------------------------------------
def bf16(args: Namespace) -> None:
    """Of the searches on validation text, those that scores in bf16 would end otherwise."""
    model, info = open_model(args.checkpoint)
    searches = {i: b.memory.product_keys for i, b in enumerate(model.h) if hasattr(b, "memory")}
    if not searches:
        raise ValueError(f"{args.checkpoint} has no memory blocks")
    name = info.get("dataset", "pycode")
    tokens = load_dataset(name, info["tokenizer"])["valid"].tokens[:32769]
    changed = {keys: [] for keys in searches.values()}

    def compare(keys: hml.ProductKeys, inputs: tuple[Tensor], reads: tuple[Tensor]) -> None:
        halves = inputs[0].bfloat16().unflatten(-1, (2, -1))  # (B, T, H, 2, d_h/2)
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
TABLES = {"blocks": blocks, "layers": layers, "parts": parts, "steps": steps}


def parse_arguments() -> Namespace:
    parser = common.Parser("What does a memory block cost?")
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    words = "T of the table blocks; others take the first (default 512, on CUDA 1024)"
    add("--lengths", type=common.whole_numbers, help=words)
    add("--checkpoint", help="a trained model: what would bf16 change in its searches?")
    add("--quick", action="store_true", help="small cases, to see that it runs")
    args = parser.parse_args()

    # What hangs on the device.
    args.device = common.pick_device(args.device)
    on_gpu = args.device.type == "cuda"
    args.dtype = torch.bfloat16 if on_gpu and common.has_bf16(args.device) else torch.float32
    args.compile = on_gpu
    args.sizes = SIZES[:1] if args.quick else SIZES
    args.repeats = 2 if args.quick else 9
    args.lengths = args.lengths or [32 if args.quick else 1024 if on_gpu else 512]
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.checkpoint:
        bf16(args)
        return

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}"
    if args.device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name()}), CUDA {torch.version.cuda}"
    print("## What a memory block costs\n")
    print(f"{machine}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"1 thread, {args.dtype}, {args.repeats} repetitions: median [min, max]")

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
