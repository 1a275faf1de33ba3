"""
The minutes that tell: is everything right on a GPU, and how fast is it there?

    python experiments/gpu.py > report.md                  about eight minutes on a large card
    python experiments/gpu.py --device cpu --quick         the same code in a minute, to see it run

No download: GPT-2 124M's shape with random weights, a random bank, random tokens. Nothing here has
been measured by us yet. The report is Markdown; an issue with yours in it is the most useful thing
that you can send.

In order: what agrees with the CPU, what stalls the GPU, the parts of a step, whole steps, a memory
block against a copied block, two equal runs, and a run of train.py with an interrupt. Shape names:
see hml.py.
"""

import copy
import functools
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
import hml
from bench import Bench, infer, make_blocks, ms, ratio, step, table
from hml import HeadwiseMemory, product_key_topk
from model import GPT, PRETRAINED, GPTConfig, aligned_product
from train import make_optimizer, train_step
from upscale import set_trainable, upscale

SIZES = ((64, 8), (128, 16))  # n_keys and top_k


def base_config(quick: bool) -> GPTConfig:
    """GPT-2 124M, or something small of its kind."""
    return GPTConfig(4, 4, 64, 64, 257) if quick else PRETRAINED["gpt2"]


def fill_banks(model: nn.Module) -> None:
    """Something in every bank, as after some training, so that gradients reach everything."""
    for module in model.modules():
        if isinstance(module, hml.HIVE):
            nn.init.normal_(module.bank, std=0.02)


def try_compiled(
    b: Bench, functions: dict[str, Callable], name: str, function: Callable, **options
) -> None:
    """Adds the compiled form of a function without arguments to those to be timed, if it works.

    options: of inductor, which not every version of torch knows.
    """
    try:
        fast = torch.compile(function, options=options or None)
        b.seconds(fast)
        functions[name] = fast
    except Exception as error:  # whatever a compiler finds
        print(f"\n{name}: does not compile here: {common.one_line(error, 200)}")


# ---- 1. The machine ------------------------------------------------------------------------------
def about(b: Bench) -> str:
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"device {b.device}; bf16 {common.has_bf16(b.device)}; autocast {b.dtype}",
    ]
    if b.device.type == "cuda":
        card = torch.cuda.get_device_properties(b.device)
        lines.append(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        lines.append(f"TF32 in products: {torch.backends.cuda.matmul.allow_tf32}")
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        lines.append(f"driver {driver}")
    return "\n".join(f"- {line}" for line in lines)


# ---- 2. Is it right? -----------------------------------------------------------------------------
def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def agreement(b: Bench, quick: bool) -> None:
    """HML and a whole model against the CPU in fp32; the start against the base."""
    rows = []
    T = 32 if quick else 256
    for n, k in SIZES:
        torch.manual_seed(0)
        on_cpu = HeadwiseMemory(12, 64, n, k, 64)
        fill_banks(on_cpu)
        here = copy.deepcopy(on_cpu).to(b.device)
        heads = torch.randn(1, T, 12, 64, requires_grad=True)  # (B, T, H, d_h)
        heads_here = heads.detach().to(b.device).requires_grad_()
        out = on_cpu(heads)
        out_here = here(heads_here)
        out.square().sum().backward()
        out_here.square().sum().backward()
        slots = on_cpu.read(heads)[1].sort(dim=-1).values
        slots_here = here.read(heads_here)[1].sort(dim=-1).values.cpu()
        gradients = {name: p.grad for name, p in on_cpu.named_parameters()}
        worst = max(difference(p.grad, gradients[name]) for name, p in here.named_parameters())
        row = {
            "what": f"HML {n}, {k}",
            "outputs": difference(out_here, out),
            "other slot sets": f"{(slots != slots_here).any(dim=-1).float().mean().item():.2%}",
            "gradients of weights": worst,
            "gradients of heads": difference(heads_here.grad, heads.grad),
        }
        rows.append(row)

    # A whole model, with the same weights on both.
    torch.manual_seed(0)
    config = base_config(quick)
    base = GPT(config)
    model = upscale(base, "midus")
    fill_banks(model)
    tokens = torch.randint(config.vocab_size, (1, min(T, config.block_size)))  # (B, T)
    here = copy.deepcopy(model).to(b.device)
    model(tokens, tokens).backward()
    here(tokens.to(b.device), tokens.to(b.device)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    worst = max(difference(p.grad, gradients[name]) for name, p in here.named_parameters())
    with torch.no_grad():
        logits = difference(here(tokens.to(b.device)), model(tokens))
    row = {
        "what": "GPT with memory blocks",
        "outputs": logits,
        "other slot sets": "",
        "gradients of weights": worst,
        "gradients of heads": "",
    }
    rows.append(row)
    table("Against the CPU, fp32: largest differences, relative to the largest number", rows)

    # With an empty bank it is the base, to the last bit; a compiler may round elsewhere.
    base = base.to(b.device)
    deeper = upscale(base, "midus")
    tokens = tokens.to(b.device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        narrow = dtype != torch.float32
        with torch.no_grad(), torch.autocast(b.device.type, dtype, enabled=narrow):
            wanted = base(tokens)
            gap = (deeper(tokens) - wanted).abs().max().item()
            row = {"dtype": str(dtype), "eager": gap}
            if b.device.type == "cuda":
                row["compiled"] = (torch.compile(deeper)(tokens) - wanted).abs().max().item()
        rows.append(row)
    table("The start against the base: largest difference of logits (eager has to be 0)", rows)


# ---- 3. What stalls the GPU ----------------------------------------------------------------------
def stalls(b: Bench, quick: bool) -> None:
    """How often a training step makes the CPU wait for the GPU."""
    if b.device.type != "cuda":
        return
    model, call = make_step(b, quick, sequences=2)
    call()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    where = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{os.path.basename(warning.filename)}:{warning.lineno}"
            where[place] = where.get(place, 0) + 1
    rows = [{"where": place, "times a step": count} for place, count in where.items()]
    rows = rows or [{"where": "nowhere", "times a step": 0}]
    table(f"The CPU waits for the GPU ({model.config.n_layer} blocks)", rows)


# ---- 4. The parts of a step ----------------------------------------------------------------------
def topk_twice(rows: Tensor, cols: Tensor, k: int) -> tuple:
    return hml.plain_topk(rows, k), hml.plain_topk(cols, k)


def topk_at_once(rows: Tensor, cols: Tensor, k: int) -> tuple:
    return hml.plain_topk(torch.stack((rows, cols)), k)


def parts(b: Bench, quick: bool) -> None:
    """The search in several forms, the bag, the head, the loss."""
    T = 32 if quick else 1024
    B = 1 if quick else 4
    rows = []
    for n, k in SIZES:
        torch.manual_seed(0)
        scores = torch.randn(B, T, 12, n, device=b.device)  # of one half
        other = torch.randn(B, T, 12, n, device=b.device)
        functions = {
            "topk": lambda s=scores, k=k: hml.plain_topk(s, k),
            "sort": lambda s=scores, k=k: s.sort(dim=-1, descending=True).values[..., :k],
            "rounds": lambda s=scores, k=k: hml.topk_by_rounds(s, k),
            "topk of both halves": lambda r=scores, c=other, k=k: topk_twice(r, c, k),
            "the same in one call": lambda r=scores, c=other, k=k: topk_at_once(r, c, k),
            "whole search": lambda r=scores, c=other, k=k: product_key_topk(r, c, k),
        }
        sort = functions["sort"]
        rounds = functions["rounds"]
        search = functions["whole search"]
        if not quick:
            try_compiled(b, functions, "sort, compiled", sort, decompose_sort_ops=True)
            try_compiled(b, functions, "rounds, compiled", rounds)
            try_compiled(b, functions, "whole search, compiled", search)
        times = b.turns(functions)
        for name, seconds in times.items():
            row = {"n, k": f"{n}, {k}", "form": name, "ms": ms(seconds)}
            row["time / topk"] = ratio(seconds, times["topk"])
            rows.append(row)
    table(f"The search: {B} x {T} tokens, 12 heads, fp32", rows)

    # Pooling, with its backward.
    rows = []
    for n, k in SIZES:
        bank = torch.randn(n * n, 64, device=b.device, requires_grad=True)
        weights = torch.rand(B, T, 12, k, device=b.device, requires_grad=True)
        slots = torch.randint(n * n, (B, T, 12, k), device=b.device)

        def forward(bank=bank, weights=weights, slots=slots):
            return hml.pool(weights, slots, bank)

        def both(forward=forward):
            forward().square().sum().backward()

        times = b.turns({"forward": forward, "forward + backward": both})
        for name, seconds in times.items():
            rows.append({"n, k": f"{n}, {k}", "pool": name, "ms": ms(seconds)})
    table("Reading the bank", rows)

    # The head with and without alignment; the loss in one piece and in chunks.
    config = base_config(quick)
    weight = torch.randn(config.vocab_size, config.n_embd, device=b.device, requires_grad=True)
    x = torch.randn(B * T, config.n_embd, device=b.device, requires_grad=True)
    targets = torch.randint(config.vocab_size, (1, B * T), device=b.device)
    model = GPT(GPTConfig(1, 1, config.n_embd, T, config.vocab_size)).to(b.device)

    def loss(logits_at_once):
        model.loss(x.unsqueeze(0), targets, logits_at_once).backward()

    all_rows = B * T * config.vocab_size
    functions = {
        "head": lambda: F.linear(x, weight).sum().backward(),
        "head, aligned": lambda: aligned_product(x, weight).sum().backward(),
        "loss, whole": functools.partial(loss, all_rows),
        "loss, in chunks": functools.partial(loss, max(config.vocab_size, all_rows // 4)),
    }
    times = b.turns(functions)
    rows = []
    for name, seconds in times.items():
        rows.append({"part": name, "ms": ms(seconds), "peak MiB": b.peak(functions[name])})
    table(f"Head and loss, forward and backward, vocabulary {config.vocab_size:,}", rows)


# ---- 5. Whole steps ------------------------------------------------------------------------------
def make_step(b: Bench, quick: bool, sequences: int, compile: bool = False) -> tuple:
    """An up-scaled model with a frozen base, and one training step of it on so many sequences."""
    torch.manual_seed(0)
    config = base_config(quick)
    model = upscale(GPT(config), "midus").to(b.device)
    fill_banks(model)
    set_trainable(model, "new")
    optimizer = make_optimizer(model, 1e-4, 1e-3, 0.1)
    tokens = torch.randint(config.vocab_size, (sequences, config.block_size + 1), device=b.device)
    batch = (tokens[:, :-1], tokens[:, 1:])  # both (B, T)
    wrapped = torch.compile(model) if compile else model
    return model, functools.partial(train_step, wrapped, optimizer, batch, b.dtype, 1)


def operations_of_a_step(model: GPT, tokens: int) -> float:
    """Floating-point operations that training needs with a frozen base, the bank left out.

    Forward for all, input gradients above the lowest new block, weight gradients for new blocks.
    """
    T = model.config.block_size
    lowest = min(model.config.new)
    products = 0.0
    for i, block in enumerate(model.h):
        weights = sum(p.numel() for name, p in block.named_parameters() if "bank" not in name)
        attending = T * model.config.n_embd
        if i in model.config.new:
            products += 3 * weights
        else:
            products += weights * (2 if i > lowest else 1)
        products += attending * (3 if i >= lowest else 1)
    products += 2 * model.config.vocab_size * model.config.n_embd
    return 2 * products * tokens


def whole_steps(b: Bench, quick: bool) -> None:
    """A training step at several numbers of sequences at once, plain and compiled."""
    flops = matrix_product(b, quick)
    rows = []
    for compile in (False, True):
        if compile and b.device.type != "cuda":
            continue
        for sequences in (1, 2) if quick else (4, 8, 16, 32):
            try:
                model, call = make_step(b, quick, sequences, compile)
                call()  # compiles, and warms up
                few = Bench(b.device, torch.float32, b.threads, 3)  # the step has its autocast
                seconds = statistics.median(few.turns({"step": call})["step"])
                peak = common.peak_memory(b.device) / 2**20
            except torch.OutOfMemoryError:
                break
            except Exception as error:  # a compiler may fail in many ways, and others still count
                print(f"\ncompiled {compile}, {sequences}: {common.one_line(error, 200)}")
                break
            tokens = sequences * model.config.block_size
            share = operations_of_a_step(model, tokens) / seconds / flops
            row = {
                "compiled": "yes" if compile else "no",
                "sequences": sequences,
                "ms": seconds * 1e3,
                "tokens/s": tokens / seconds,
                "of a large product's speed": f"{share:.0%}",
                "peak MiB": peak,
            }
            rows.append(row)
            common.reset_peak_memory(b.device)
    table(f"A training step, {b.dtype}, base frozen", rows)

    # What it consists of.
    from torch.profiler import ProfilerActivity, profile

    model, call = make_step(b, quick, 1 if quick else 8)
    call()
    activities = [ProfilerActivity.CPU]
    if b.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        call()
    by = "self_cuda_time_total" if b.device.type == "cuda" else "self_cpu_time_total"
    attribute = "self_device_time_total" if b.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    rows = []
    for event in events[:15]:
        spent = getattr(event, attribute)
        row = {"name": event.key[:60], "calls": event.count, "ms": spent / 1e3}
        row["share"] = f"{spent / max(total, 1e-9):.1%}"
        rows.append(row)
    table(f"Where an eager step goes ({by})", rows)


def matrix_product(b: Bench, quick: bool) -> float:
    """Floating-point operations per second of a large product in the dtype of training."""
    side = 256 if quick else 8192
    a = torch.randn(side, side, device=b.device, dtype=b.dtype)
    seconds = statistics.median(b.turns({"product": lambda: a @ a})["product"])
    print(f"\nlarge product: {2 * side**3 / seconds / 1e12:.3g} TFLOP/s in {b.dtype}")
    return 2 * side**3 / seconds


# ---- 6. A memory block against a copied block ----------------------------------------------------
def block_against_block(b: Bench, quick: bool) -> None:
    """The ratio for the README."""
    T = 64 if quick else 1024
    rows = []
    for n, k in SIZES:
        copied, memory = make_blocks(b.device, n, k)
        for B in (1,) if quick else (4, 16):
            x = torch.randn(B, T, 768, device=b.device, requires_grad=True)
            training = {"copied": step(copied, x), "memory": step(memory, x)}
            inference = {"copied": infer(copied, x), "memory": infer(memory, x)}
            if b.device.type == "cuda":
                try_compiled(b, training, "copied, compiled", step(torch.compile(copied), x))
                try_compiled(b, training, "memory, compiled", step(torch.compile(memory), x))
            trained = b.turns(training)
            inferred = b.turns(inference)
            row = {
                "n, k": f"{n}, {k}",
                "B": B,
                "ms copied": ms(trained["copied"]),
                "ms memory": ms(trained["memory"]),
                "training": ratio(trained["memory"], trained["copied"]),
                "inference": ratio(inferred["memory"], inferred["copied"]),
            }
            if "memory, compiled" in trained and "copied, compiled" in trained:
                row["training, compiled"] = ratio(
                    trained["memory, compiled"], trained["copied, compiled"]
                )
            rows.append(row)
    table(f"A memory block / a copied block, C=768, T={T}, {b.dtype}", rows)


# ---- 7. Two equal runs ---------------------------------------------------------------------------
def twice(b: Bench, quick: bool) -> None:
    """The same five steps twice: the same bits, or by how much not."""
    ends = []
    for _ in range(2):
        model, call = make_step(b, quick, sequences=2)
        losses = [call() for _ in range(5)]
        weights = [p.detach().cpu() for p in model.parameters() if p.requires_grad]
        ends.append((losses, weights))
    (losses, weights), (other_losses, other_weights) = ends
    gap = max(difference(a, b) for a, b in zip(weights, other_weights))
    row = {
        "losses are equal": str(losses == other_losses),
        "largest difference of weights, relative": gap,
        "first loss": losses[0],
        "last loss": losses[-1],
    }
    table("Two equal runs of five steps", [row])


# ---- 8. A run ------------------------------------------------------------------------------------
def run_script(folder: str, words: list[str], stop_after_save: bool = False) -> dict:
    """Runs a script in this folder, to its end or to its next checkpoint; a row of the table."""
    out = os.path.join(folder, "ckpt.pt")
    before = os.stat(out).st_mtime_ns if os.path.exists(out) else None
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while stop_after_save and process.poll() is None:
        if os.path.exists(out) and os.stat(out).st_mtime_ns != before:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    lines = process.communicate()[0].splitlines()
    said = [line for line in lines if line.strip()][-1]
    command = " ".join(word.removeprefix(ROOT + os.sep) for word in words)
    return {"command": command, "status": process.returncode, "last line": said[:70]}


def a_run(b: Bench, quick: bool) -> None:
    """train.py on pydocs: interrupted, resumed on the CPU, interrupted, resumed; eval; a sample.

    quick: on a few lines of text instead.
    """
    train = os.path.join(ROOT, "train.py")
    evaluate = os.path.join(ROOT, "eval.py")
    tokens = "4e4" if quick else "4e5"
    here = ["--device", str(b.device)]
    lengths = ["--base_tokens", tokens, "--tokens", tokens, "--save_every", "5"]
    sample = ["--prompt", "The function", "--max_new_tokens", "20"]
    with tempfile.TemporaryDirectory() as folder:
        text = ["--dataset", "pydocs"]
        if quick:
            text = ["--dataset", "text", "--data_dir", folder]
            for split in ("train", "valid", "test"):
                with open(os.path.join(folder, f"{split}.txt"), "w") as file:
                    file.write("The function returns a number. " * 200)
        rows = [
            run_script(folder, [train, "--upscale", "midus", *text, *lengths, *here], True),
            run_script(folder, [train, "--resume", "--device", "cpu", "--no-compile"], True),
            run_script(folder, [train, "--resume", *here]),
            run_script(folder, [evaluate, "ckpt.pt", *here]),
            run_script(folder, [evaluate, "ckpt.pt", *sample, *here]),
        ]
    table("A run (130: interrupted, as it should be; else 0)", rows)


def main() -> None:
    parser = common.Parser("Is all right on a GPU, and how fast is it?")
    add = parser.add_argument
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    dtype = torch.bfloat16 if common.has_bf16(device) else torch.float32
    repeats = 2 if args.quick else 9
    b = Bench(device, dtype, threads=torch.get_num_threads(), repeats=repeats)

    print("## nanoMIDUS on a GPU\n")
    print(about(b))
    for part in (
        agreement,
        stalls,
        parts,
        whole_steps,
        block_against_block,
        twice,
        a_run,
    ):
        started = time.perf_counter()
        part(b, args.quick)
        print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    common.run_command(main)
