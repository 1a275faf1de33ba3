"""
What a checkpoint is worth: perplexities, cost, and how much of its memory it uses.

    python eval.py ckpt.pt                      test split of the data it was trained on
    python eval.py gpt2 --stride 512            published GPT-2 on WikiText-103, overlapping windows
    python eval.py ckpt.pt --prompt "Once"      samples instead

Perplexity has several names. They differ in what NLL, the split's summed negative log-likelihood in
nats, is divided by:

    token-level   exp(NLL / tokens)     depends on the tokenizer
    word-level    exp(NLL / words)      does not
    bits per byte NLL / ln 2 / bytes    does not

In order: perplexity, use of the memory, the report, samples. Shape names: see hml.py.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from data import DATASETS, SPLITS, Split, check_vocabulary, load_dataset, load_tokenizer
from model import GPT, count_parameters, open_model


# ---- Perplexity ----------------------------------------------------------------------------------
def windows_at_once(model: GPT) -> int:
    """How many windows make a batch: as many as a CPU's caches like (512 tokens); on a GPU 32."""
    block_size = model.config.block_size
    # On MPS logits of more than 8 sequences were wrong in several versions (PyTorch issue 109457).
    wanted = {"cpu": 512 // block_size, "mps": 8}.get(model.wte.weight.device.type, 32)
    largest = 2**28 // (block_size * model.config.vocab_size)  # 1 GiB of fp32 logits
    return max(1, min(wanted, largest))


@torch.no_grad()
def sum_nll(
    model: GPT,
    tokens: np.ndarray,
    stride: int | None = None,
    desc: str = "evaluating",
    at_once: int | None = None,
) -> tuple[float, int]:
    """Summed negative log-likelihood of every token after the first, and how many those are.

    In nats, added up in float64. Windows of block_size tokens start `stride` apart (default:
    block_size, no overlap); the last is moved back to end with the text. A window scores what no
    earlier one has, so each token counts exactly once, with at least block_size - stride tokens
    before it once the text is that far in. at_once: windows in a batch. Raises ValueError for a
    stride that cannot be, or fewer than two tokens.
    """
    block_size = model.config.block_size
    device = model.wte.weight.device
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must lie between 1 and the window, {block_size}; got {stride}")
    if len(tokens) < 2:
        raise ValueError("the split has fewer than two tokens; there is nothing to predict")

    # Where windows start. The last one ends with the text.
    last_start = max(0, len(tokens) - 1 - block_size)
    starts = [*range(0, last_start, stride), last_start]
    at_once = at_once or windows_at_once(model)

    # A batch of windows at a time; nothing is dropped, nothing counts twice.
    total = 0.0
    scored = 0  # targets so far
    for first in tqdm(
        range(0, len(starts), at_once), desc=desc, unit="batch", disable=None, leave=False
    ):
        group = starts[first : first + at_once]
        rows = [tokens[start : start + block_size + 1] for start in group]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, T + 1)
        logits = model(batch[:, :-1]).float()  # (B, T, vocab)
        targets = batch[:, 1:]  # (B, T)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view(targets.shape).cpu().double()  # (B, T); MPS has no float64

        # The first targets of a window were scored by the windows before it.
        for start, window in zip(group, nll):
            total += window[scored - start :].sum().item()
            scored = start + len(window)
    return total, len(tokens) - 1


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count), or infinity where no float is large enough: a model gone wrong."""
    return math.inf if nll / count > 700 else math.exp(nll / count)


# ---- Use of the memory ---------------------------------------------------------------------------
@contextmanager
def count_usage(model: GPT) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Counts what every memory block reads while the context is open; yields {block: counts}.

    counts, each (H, N): top1, how often a slot was a head's best; topk, how often it was read at
    all (twice, where windows overlap); weight, its summed weights. See usage() for what follows.
    """
    n_head = model.config.n_head
    n_slots = model.config.n_keys**2
    counts = {}

    # A hook after the search of every memory block sees weights and slots as they are used.
    def watch(block: int) -> torch.utils.hooks.RemovableHandle:
        zero = torch.zeros(n_head, n_slots, dtype=torch.float64)
        counts[block] = {"top1": zero.clone(), "topk": zero.clone(), "weight": zero.clone()}

        def add(module, inputs, reads: tuple[Tensor, Tensor]) -> None:
            weights, slots = (part.detach().cpu() for part in reads)  # (B, T, H, k)
            # One number for head and slot, so that one call counts for all heads.
            places = slots + n_slots * torch.arange(n_head)[:, None]  # (B, T, H, k)
            best = places[..., 0].flatten()  # (B * T * H,)
            read = places.flatten()  # (B * T * H * k,)
            weight = weights.flatten().double()
            size = n_head * n_slots
            counts[block]["top1"] += torch.bincount(best, minlength=size).view(n_head, -1)
            counts[block]["topk"] += torch.bincount(read, minlength=size).view(n_head, -1)
            counts[block]["weight"] += torch.bincount(read, weight, size).view(n_head, -1)

        return model.h[block].memory.product_keys.register_forward_hook(add)

    blocks = [block for block, kind in enumerate(model.config.blocks) if kind == "M"]
    hooks = [watch(block) for block in blocks]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def usage(counts: dict[str, Tensor]) -> dict[str, float]:
    """Figures of Lample et al. 2019, section 4: means over heads, from counts of one block.

    top1, topk: share of slots that were ever best, or read. kl: of the summed weights z to uniform,
    log N + sum z log z, in nats; 0 if all slots are used alike, log N if one slot takes all.
    """
    # Of every head on its own; heads that read other slots are not mixed.
    weight = counts["weight"]
    z = weight / weight.sum(dim=1, keepdim=True)  # (H, N)
    negative_entropy = torch.special.xlogy(z, z).sum(dim=1)  # (H,)
    return {
        "top1": (counts["top1"] > 0).double().mean().item(),
        "topk": (counts["topk"] > 0).double().mean().item(),
        "kl": math.log(z.size(1)) + negative_entropy.mean().item(),
    }


# ---- The report ----------------------------------------------------------------------------------
def evaluate(model: GPT, split: Split, stride: int | None = None) -> dict:
    """All figures of one split: perplexities, tokens per second, use of each memory block."""
    # One pass gives everything.
    start = time.perf_counter()
    with count_usage(model) as counts:
        nll, tokens = sum_nll(model, split.tokens, stride)
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "words": split.words,
        "bytes": split.bytes,
        "nll": nll,
        "token_perplexity": perplexity(nll, tokens),
        "word_perplexity": perplexity(nll, split.words),
        "bits_per_byte": nll / math.log(2) / split.bytes,
        "tokens_per_second": tokens / seconds,
        "peak_memory": common.peak_memory(model.wte.weight.device),
        "slots": model.config.n_keys**2,  # in each memory block, if there are any
        "usage": {block + 1: usage(reads) for block, reads in counts.items()},  # counted from 1
    }


def print_report(report: dict) -> None:
    # Each figure, and beside it what it was divided by.
    tokens = f"exp(NLL / {report['tokens']:,} tokens)"
    words = f"exp(NLL / {report['words']:,} words)"
    size = f"NLL / ln 2 / {report['bytes']:,} bytes"
    print(f"token-level perplexity  {report['token_perplexity']:.3f}   {tokens}")
    if report["tokens"] <= 3 * report["words"]:  # of a model of bytes it says nothing: 16,077
        print(f"word-level perplexity   {report['word_perplexity']:.3f}   {words}")
    print(f"bits per byte           {report['bits_per_byte']:.4f}   {size}")
    print(
        f"tokens/s                {report['tokens_per_second']:,.0f}   with the time to count reads"
    )
    print(f"peak memory             {report['peak_memory'] / 2**20:,.0f} MiB")
    for block, figures in report["usage"].items():
        # KL to uniform is log N - entropy; exp(entropy) is a number of slots in equal use.
        alike = report["slots"] * math.exp(-figures["kl"])
        print(
            f"memory in block {block}, of {report['slots']:,} slots: "
            f"{figures['top1']:.1%} ever best, {figures['topk']:.1%} ever read, "
            f"weight as if on {alike:,.0f} alike (KL to uniform {figures['kl']:.2f} nats)"
        )
    if report["usage"]:
        print("(means over heads)")


def report_split(model: GPT, info: dict, args: argparse.Namespace) -> None:
    """Evaluates one split, prints the figures, and writes them to args.json if that is given."""
    # What is not asked for is as in training.
    dataset = args.dataset or info.get("dataset", "wikitext103")
    data_dir = args.data_dir or info.get("data_dir", "data")
    tokenizer = info["tokenizer"]
    window = model.config.block_size
    stride = args.stride or window
    if stride > window:
        raise ValueError(f"--stride {stride} is more than the window, {window}")

    split = load_dataset(dataset, tokenizer, data_dir, (args.split,))[args.split]
    print(f"{dataset} {args.split}, tokenizer {tokenizer}, window {window}, stride {stride}")
    report = evaluate(model, split, stride)
    print_report(report)

    # The same for a program.
    if args.json:
        about = {
            "checkpoint": args.checkpoint,
            "dataset": dataset,
            "split": args.split,
            "tokenizer": tokenizer,
            "window": window,
            "stride": stride,
            "parameters": count_parameters(model),
        }
        with common.written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump({**about, **report}, file, indent=2)


# ---- Samples -------------------------------------------------------------------------------------
def print_sample(model: GPT, tokenizer_name: str, args: argparse.Namespace) -> None:
    """Continues args.prompt, or nothing but an end of text if that is empty."""
    tokenizer = load_tokenizer(tokenizer_name)

    # Without a prompt, a text begins where another one ends.
    prompt = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
    tokens = torch.tensor([prompt], device=model.wte.weight.device)  # (1, T)
    torch.manual_seed(args.seed)
    tokens = model.generate(tokens, args.max_new_tokens, args.temperature, args.sample_top_k)
    # A model may have more tokens than its tokenizer.
    known = [token for token in tokens[0].tolist() if token < tokenizer.n_vocab]
    print(tokenizer.decode(known))


# ---- The command ---------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("What a checkpoint is worth; or samples of it.")
    parser.add_argument(
        "checkpoint", help="a checkpoint, a file or folder of weights, gpt2, ..., smollm2"
    )

    # What is evaluated.
    add = parser.add_argument
    add("--split", choices=SPLITS, default="test", help="(default test)")
    add("--dataset", choices=DATASETS, help="(default: the checkpoint's own)")
    add(
        "--data_dir",
        type=common.data_folder,
        help="folder of data and caches (default: the checkpoint's own, or ./data)",
    )
    add("--stride", type=common.whole_number, help="tokens between windows (default: no overlap)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--json", type=common.new_file(".json"), help="also write the figures to this file")

    # What is sampled.
    add("--prompt", help="continue this text instead of evaluating; may be empty")
    add("--max_new_tokens", type=common.whole_number, default=200, help="(default 200)")
    add(
        "--temperature", type=common.real_number, default=0.8, help="0: the likeliest (default 0.8)"
    )
    add(
        "--sample_top_k",
        type=common.whole_number,
        default=50,
        help="choose from these (default 50)",
    )
    add("--seed", type=common.seed_number, default=0, help="of the samples (default 0)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = common.pick_device(args.device)
    model, info = open_model(args.checkpoint, args.data_dir or "data")
    check_vocabulary(info["tokenizer"], model.config.vocab_size)
    model = model.to(device).eval()
    if device.type == "cpu":
        torch.set_num_threads(common.threads_for(model.config.n_embd))

    # What it is.
    counts = count_parameters(model)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    print(f"{args.checkpoint}: {' '.join(model.config.blocks)}, device {device}, float32")
    print(f"{sum(counts.values()):,} parameters ({parts})")

    # What it says, or what it is worth.
    if args.prompt is not None:
        print_sample(model, info["tokenizer"], args)
    else:
        report_split(model, info, args)


if __name__ == "__main__":
    common.run_command(main)
