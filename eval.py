"""
What a checkpoint is worth: perplexities, cost, and how much of its memory it uses.

    python eval.py ckpt.pt                      test split of the data it was trained on
    python eval.py gpt2 --stride 512            published GPT-2 on WikiText-103's test split, overlapping windows
    python eval.py ckpt.pt --prompt "Once"      samples instead

Perplexity has several names; they differ in what they divide by. With NLL the summed negative log-likelihood of the
split, in nats:  token-level exp(NLL / tokens), which depends on the tokenizer;  word-level exp(NLL / words), which
does not;  bits per byte NLL / ln 2 / bytes. Shape names: see hml.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import CONVENTIONS, DATASETS, SPLITS, Split, get_batch, load_pieces, load_tokenizer, written_whole
from model import GPT, count_parameters, open_model, pick_device, run_command
from upscale import amount, natural, new_file


@torch.no_grad()
def sum_nll(
    model: GPT, tokens: np.ndarray, stride: int | None = None, desc: str = "evaluating", at_once: int | None = None
) -> tuple[float, int]:
    """Summed negative log-likelihood, in nats and float64, of every token after the first; and how many those are.

    Windows of block_size tokens start `stride` apart (default: block_size, no overlap); the last is moved back to end
    with the text. A window scores what no earlier one has, so each token counts exactly once, with at least block_size
    - stride tokens before it once the text is that far in. at_once windows make a batch (default: 32; on a CPU 512
    tokens), 2^28 logits at most. Raises ValueError for a bad stride or fewer than two tokens.
    """
    size, device = model.config.block_size, model.wte.weight.device
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"stride must lie between 1 and the window, {size}; got {stride}")
    if len(tokens) < 2:
        raise ValueError("the split has fewer than two tokens; there is nothing to predict")
    final = max(0, len(tokens) - 1 - size)  # where the last window starts
    starts = [*range(0, final, stride), final]
    at_once = at_once or (512 // size if device.type == "cpu" else 32)  # as large as a CPU's caches like
    rows = max(1, min(at_once, 2**28 // (size * model.config.vocab_size)))
    total, done = 0.0, 0
    for first in tqdm(range(0, len(starts), rows), desc=desc, unit="batch", disable=None, leave=False):
        group = starts[first : first + rows]
        batch = np.stack([tokens[start : start + size + 1] for start in group]).astype(np.int64)
        batch = torch.from_numpy(batch).to(device)  # (B, T + 1)
        logits = model(batch[:, :-1])[0].float()  # (B, T, vocab)
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(group), -1)
        for start, row in zip(group, nll.cpu().double()):  # row (T,); MPS has no float64
            total += row[done - start :].sum().item()  # the windows before have scored up to here
            done = start + len(row)
    return total, len(tokens) - 1


def perplexity(nll: float, tokens: int) -> float:
    """exp(nll / tokens), or infinity where no float is large enough."""
    return math.inf if nll / tokens > 700 else math.exp(nll / tokens)


@contextmanager
def count_usage(model: GPT) -> Iterator[dict]:
    """Counts what every memory block reads while the context is open; yields {block index: counts}.

    counts: top1 and topk (H, N), how often a slot was a head's best, or was read at all (twice, where windows overlap);
    weight (H, N), the summed weights. The figures of Lample et al. 2019, section 4, follow: see usage().
    """
    config, counts, hooks = model.config, {}, []

    def hook(block: int):
        def add(module, inputs, reads: tuple[Tensor, Tensor]) -> None:
            weights, slots = (part.detach().flatten(0, 1).transpose(0, 1).cpu() for part in reads)  # (H, B*T, k)
            for head in range(config.n_head):
                n, w, s = config.n_keys**2, weights[head], slots[head]  # w, s (B*T, k), best first
                counts[block]["top1"][head] += torch.bincount(s[:, 0], minlength=n)
                counts[block]["topk"][head] += torch.bincount(s.flatten(), minlength=n)
                counts[block]["weight"][head] += torch.bincount(s.flatten(), w.flatten().double(), minlength=n)

        return add

    for i, kind in enumerate(config.blocks):
        if kind == "M":
            zero = torch.zeros(config.n_head, config.n_keys**2, dtype=torch.float64)
            counts[i] = {name: zero.clone() for name in ("top1", "topk", "weight")}
            hooks.append(model.h[i].memory.product_keys.register_forward_hook(hook(i)))
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()


def usage(counts: dict[str, Tensor]) -> dict[str, float]:
    """Means over heads: share of slots ever best (top1) or read (topk); KL of the summed weights to uniform, in nats.

    KL = log N + sum z log z is 0 if all slots are used alike and log N if one slot takes all.
    """
    z = counts["weight"] / counts["weight"].sum(dim=1, keepdim=True)  # (H, N)
    kl = math.log(z.size(1)) + torch.special.xlogy(z, z).sum(dim=1).mean().item()
    return {"top1": (counts["top1"] > 0).double().mean().item(),
            "topk": (counts["topk"] > 0).double().mean().item(), "kl": kl}  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, elsewhere the most the whole process took; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def evaluate(model: GPT, pieces: list[np.ndarray], words: int, size: int, stride: int | None) -> dict:
    """All figures of a text of so many words and bytes: perplexities, tokens per second, usage of each memory block."""
    start = time.perf_counter()
    with count_usage(model) as counts:
        sums = [sum_nll(model, piece, stride) for piece in tqdm(pieces, unit="piece", disable=None)]
    seconds = time.perf_counter() - start
    nll, tokens = (sum(column) for column in zip(*sums))
    return {
        "tokens": tokens, "words": words, "bytes": size, "nll": nll,
        "token_perplexity": perplexity(nll, tokens), "word_perplexity": perplexity(nll, words),
        "bits_per_byte": nll / math.log(2) / size, "tokens_per_second": tokens / seconds,
        "peak_memory": peak_memory(model.wte.weight.device),
        "usage": {block: usage(c) for block, c in counts.items()},
    }  # fmt: skip


def print_report(report: dict) -> None:
    print(f"token-level perplexity  {report['token_perplexity']:.3f}   exp(NLL / {report['tokens']:,} tokens)")
    print(f"word-level perplexity   {report['word_perplexity']:.3f}   exp(NLL / {report['words']:,} words)")
    print(f"bits per byte           {report['bits_per_byte']:.4f}   NLL / ln 2 / {report['bytes']:,} bytes")
    print(f"tokens/s                {report['tokens_per_second']:,.0f}   counting of memory reads included")
    print(f"peak memory             {report['peak_memory'] / 2**20:,.0f} MiB")
    for block, use in report["usage"].items():
        print(f"memory in block {block + 1}: {use['top1']:.1%} of slots ever best, {use['topk']:.1%} ever read, "
              f"KL to uniform {use['kl']:.2f} nats (means over heads)")  # fmt: skip


def step_seconds(model: GPT, train: Split, s: dict, ranks: int) -> float:
    """Seconds one optimizer step will take, roughly, from a trial of the part of its batch that goes at once."""
    device, part = model.wte.weight.device, s["batch_size"] // (s["grad_accum"] * ranks)
    for _ in range(2):  # a first call is slow; but if it takes long, what was slow about it does not matter
        start = time.perf_counter()
        x, y = get_batch(train.tokens, 0, part, s["block_size"], s["seed"])
        with torch.autocast(device.type, dtype=getattr(torch, s["dtype"]), enabled=s["dtype"] != "float32"):
            loss = model(x.to(device), y.to(device))[1]
        loss.backward()
        loss.item()  # waits for a GPU
        if (seconds := time.perf_counter() - start) > 5:
            break
    model.zero_grad()
    return seconds * s["grad_accum"]


def row(label: str, model: GPT, valid: Split, state: dict | None = None, s: dict | None = None) -> dict:
    """A row of the closing table; with state and settings also what the training cost."""
    size = {name: sum(p.numel() for p in params) for name, params in (
        ("parameters", model.parameters()),
        ("added", (p for i in model.config.new for p in model.h[i].parameters())),
        ("trained", (p for p in model.parameters() if p.requires_grad)),
    )}  # fmt: skip
    nll, tokens = sum_nll(model, valid.tokens, desc=f"validating {label}")
    done = {"label": label, **size, "perplexity": perplexity(nll, tokens)}
    if state:
        done["rate"] = state["step"] * s["batch_size"] * s["block_size"] / state["seconds"]
        done["memory"] = peak_memory(model.wte.weight.device)
    return done


def print_table(rows: list[dict], valid: Split) -> None:
    print(f"\nperplexity: token-level, validation split, {len(valid.tokens) - 1:,} tokens")
    line = "{:20}{:>14}{:>12}{:>14}{:>12}{:>10}{:>13}".format
    print(line("", "parameters", "added", "trained", "perplexity", "tokens/s", "peak memory"))
    for r in rows:
        cost = (f"{r['rate']:,.0f}", f"{r['memory'] / 2**20:,.0f} MiB") if "rate" in r else ("-", "-")
        counts = (f"{r[name]:,}" for name in ("parameters", "added", "trained"))
        print(line(r["label"], *counts, f"{r['perplexity']:.4f}", *cost))


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexities, cost and memory use of a checkpoint; or samples.")
    parser.add_argument("checkpoint", help="checkpoint, GPT-2 .bin file, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default test)")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: the checkpoint's own)")
    parser.add_argument("--data_dir", help="folder of the data (default: the checkpoint's own, or ./data)")
    parser.add_argument("--convention", choices=CONVENTIONS, default="tokens", help="how text is read (default tokens)")
    parser.add_argument("--stride", type=natural, help="tokens between windows (default: the window, no overlap)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--json", type=new_file, help="also write the figures to this file")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", help="continue this text instead of evaluating; may be empty")
    sampling.add_argument("--max_new_tokens", type=natural, default=200, help="tokens to sample (default 200)")
    sampling.add_argument("--temperature", type=amount, default=0.8, help="0 takes the likeliest token (default 0.8)")
    sampling.add_argument("--sample_top_k", type=natural, default=50, help="sample among so many tokens (default 50)")
    sampling.add_argument("--seed", type=lambda t: natural(t, 0), default=0, help="(default 0)")
    args = parser.parse_args()
    if args.stride is not None and args.convention == "lm-eval":
        raise ValueError("--convention lm-eval reads windows without overlap; drop --stride")
    device = pick_device(args.device)
    model, info = open_model(args.checkpoint, args.data_dir or "data")
    if args.stride is not None and args.stride > model.config.block_size:
        raise ValueError(f"--stride {args.stride} is more than the window, {model.config.block_size}")
    model = model.to(device).eval()
    parts = count_parameters(model)
    print(f"{args.checkpoint}: {' '.join(model.config.blocks)}, device {device}, float32")
    print(f"{sum(parts.values()):,} parameters ({', '.join(f'{part} {n:,}' for part, n in parts.items())})")

    if args.prompt is not None:
        tokenizer = load_tokenizer(info["tokenizer"])
        tokens = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
        torch.manual_seed(args.seed)
        out = model.generate(
            torch.tensor([tokens], device=device), args.max_new_tokens, args.temperature, args.sample_top_k
        )
        return print(tokenizer.decode(out[0].tolist()))

    name = args.dataset or info.get("dataset", "wikitext103")
    data_dir = args.data_dir or info.get("data_dir", "data")
    stride = args.stride or min(model.config.block_size, 512 if args.convention == "hf" else model.config.block_size)
    pieces, words, size = load_pieces(name, args.split, info["tokenizer"], data_dir, args.convention)
    print(f"{name} {args.split} as convention {args.convention}, tokenizer {info['tokenizer']}, window "
          f"{model.config.block_size}, stride {stride}")  # fmt: skip
    report = evaluate(model, pieces, words, size, stride)
    print_report(report)
    if args.json:
        about = {"checkpoint": args.checkpoint, "dataset": name, "split": args.split, "stride": stride,
                 "convention": args.convention, "tokenizer": info["tokenizer"], "window": model.config.block_size,
                 "parameters": parts}  # fmt: skip
        with written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump(about | report, file, indent=2)


if __name__ == "__main__":
    run_command(main)
