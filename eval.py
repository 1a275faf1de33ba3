"""
What checkpoints are worth: one table, a row for each model.

    python eval.py data/base-*.pt ckpt.pt     on test splits of what they learned and what they knew
    python eval.py gpt2 --stride 512          published GPT-2 on WikiText-103, overlapping windows
    python eval.py ckpt.pt --prompt "def "    samples instead

A model is asked to predict every token of a text from those before it. NLL, the negative
log-likelihood, is the sum of its surprise in nats. What it is divided by gives it a name:

    token perplexity   exp(NLL / tokens)     depends on the tokenizer
    word perplexity    exp(NLL / words)      does not
    bits per byte      NLL / ln 2 / bytes    does not

In order: perplexity, use of the memory, the table, samples, the command. Shape names: see hml.py.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from data import SPLITS, load_dataset, load_tokenizer
from model import GPT, count_parameters, open_model


# ---- Perplexity ----------------------------------------------------------------------------------
@torch.no_grad()
def sum_nll(
    model: GPT, tokens: np.ndarray, stride: int | None = None, desc: str = "evaluating"
) -> tuple[float, int]:
    """Summed negative log-likelihood of every token after the first, and how many those are.

    In nats, added up in float64. Windows of block_size tokens start `stride` apart (default:
    block_size, no overlap); the last is moved back to end with the text. A window scores what no
    earlier one has, so each token counts exactly once, with at least block_size - stride tokens
    before it once the text is that far in. Raises ValueError for a stride that cannot be, or fewer
    than two tokens.
    """
    block_size = model.config.block_size
    device = model.wte.weight.device
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"--stride must lie between 1 and the window, {block_size}; got {stride}")
    if len(tokens) < 2:
        raise ValueError("the split has fewer than two tokens; there is nothing to predict")

    # Where windows start. The last one ends with the text.
    last_start = max(0, len(tokens) - 1 - block_size)
    starts = [*range(0, last_start, stride), last_start]

    # How many windows at a time: as many as a CPU's caches like, or a GPU needs to be busy, but no
    # more than 1 GiB of logits.
    at_once = 32 if device.type == "cuda" else 512 // block_size
    at_once = max(1, min(at_once, 2**28 // (block_size * model.config.vocab_size)))

    # Nothing is dropped, nothing counts twice.
    total = 0.0
    scored = 0  # targets so far
    bar = tqdm(total=len(starts), desc=desc, unit="window", disable=None, leave=False)
    for first in range(0, len(starts), at_once):
        group = starts[first : first + at_once]
        rows = [tokens[start : start + block_size + 1] for start in group]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, T + 1)
        logits = model(batch[:, :-1]).float()  # (B, T, vocab)
        targets = batch[:, 1:]  # (B, T)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view(targets.shape).cpu().double()  # (B, T)

        # The first targets of a window were scored by the windows before it.
        for start, window in zip(group, nll):
            total += window[scored - start :].sum().item()
            scored = start + len(window)
        bar.update(len(group))
    bar.close()
    return total, len(tokens) - 1


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count). Raises FloatingPointError if the model has gone wrong: NaN or infinite."""
    if not nll / count < 700:  # no float holds more; NaN is not less either
        raise FloatingPointError(
            "the perplexity is infinite or NaN: the model's weights are spoilt"
        )
    return math.exp(nll / count)


def count_words(text: str) -> int:
    """Words, with one end-of-line for each line, as WikiText counts them."""
    last_line_is_open = not text.endswith("\n")
    return len(text.split()) + text.count("\n") + last_line_is_open


# ---- Use of the memory ---------------------------------------------------------------------------
@contextmanager
def watch_reads(model: GPT, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While it is open, every read of a memory is shown: see(block, weights, slots).

    block: its index in the stack, from 0; weights, slots: (B, T, H, k), as HIVE is given them.
    """
    hooks = []
    for i, block in enumerate(model.h):
        if hasattr(block, "memory"):

            def hook(hive, inputs, block=i):
                see(block, *inputs)

            hooks.append(block.memory.hive.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def count_usage(model: GPT) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Counts what every memory block reads while the context is open; yields {block: counts}.

    counts, each (H, N): top1, how often a slot was a head's best; topk, how often it was read at
    all (twice, where windows overlap); weight, its summed weights. See usage() for what follows.
    """
    counts = {}
    for i, block in enumerate(model.h):
        if hasattr(block, "memory"):
            zero = torch.zeros(
                model.config.n_head, len(block.memory.hive.bank), dtype=torch.float64
            )
            counts[i] = {"top1": zero.clone(), "topk": zero.clone(), "weight": zero.clone()}

    def see(block: int, weights: Tensor, slots: Tensor) -> None:
        # One number for head and slot, so that one call counts for all heads.
        H, N = counts[block]["top1"].shape
        places = slots.cpu() + N * torch.arange(H)[:, None]  # (B, T, H, k)
        best = places[..., 0].flatten()  # (B * T * H,)
        read = places.flatten()  # (B * T * H * k,)
        weight = weights.cpu().flatten().double()
        counts[block]["top1"] += torch.bincount(best, minlength=H * N).view(H, N)
        counts[block]["topk"] += torch.bincount(read, minlength=H * N).view(H, N)
        counts[block]["weight"] += torch.bincount(read, weight, H * N).view(H, N)

    with watch_reads(model, see):
        yield counts


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


# ---- The table -----------------------------------------------------------------------------------
def evaluate(
    label: str,
    model: GPT,
    texts: dict[str, np.ndarray],
    tokenizer_name: str,
    stride: int | None = None,
) -> dict:
    """A row of the table, as plain types: a model's sizes, and its figures on each of the texts.

    texts: tokens by name. The use of each memory block, by its number from 1, is of the first text.
    """
    row = {
        "model": label,
        "parameters": sum(count_parameters(model).values()),
        "added": sum(count_parameters(model, model.config.new).values()),
        "texts": {},
        "usage": {},
    }
    tokenizer = load_tokenizer(tokenizer_name)
    for name, tokens in texts.items():
        with count_usage(model) as counts:
            nll, count = sum_nll(model, tokens, stride, f"{label} on {name}")
        row["usage"] = row["usage"] or {i + 1: usage(reads) for i, reads in counts.items()}

        # What was read says what to divide by: the first token is not predicted, so not counted.
        read = tokenizer.decode_bytes(tokens.tolist())
        first = tokenizer.decode_single_token_bytes(int(tokens[0]))
        figures = {
            "token_perplexity": perplexity(nll, count),
            "bits_per_byte": nll / math.log(2) / (len(read) - len(first)),
        }
        # Where tokens are bytes, a word is so many of them that its perplexity says nothing.
        if tokenizer_name != "bytes":
            words = count_words(read.decode(errors="replace"))
            figures["word_perplexity"] = perplexity(nll, words)
        row["texts"][name] = figures
    return row


COLUMNS = {  # of each text
    "token_perplexity": "per token",
    "word_perplexity": "per word",
    "bits_per_byte": "bits/byte",
}


def print_table(rows: list[dict], change: bool = False) -> None:
    """One row a model; change: and a last one, from the first row to the last."""
    # A text has the columns that some model has a figure for.
    names = dict.fromkeys(name for row in rows for name in row["texts"])
    columns = []
    for name in names:
        for kind in COLUMNS:
            if any(kind in row["texts"].get(name, {}) for row in rows):
                columns.append((name, kind))

    # Everything as words first; then columns get the width that they need.
    kinds = [COLUMNS[kind] for _, kind in columns]
    lines = [
        ["", "", "", *(name for name, _ in columns), ""],
        ["model", "parameters", "added", *kinds, "slots in use"],
    ]
    for row in rows:
        cells = []
        for name, kind in columns:
            figure = row["texts"].get(name, {}).get(kind)
            cells.append("" if figure is None else f"{figure:.4f}")
        used = " ".join(f"{figures['top1']:.0%}" for figures in row["usage"].values())
        sizes = [f"{row['parameters']:,}", f"{row['added']:,}"]
        lines.append([row["model"], *sizes, *cells, used])
    if change:
        first, last = rows[0], rows[-1]
        cells = []
        for name, kind in columns:
            cells.append(f"{last['texts'][name][kind] / first['texts'][name][kind] - 1:+.0%}")
        more = f"{last['parameters'] - first['parameters']:+,}"
        lines.append(["change", more, "", *cells, ""])

    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        padded = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:])]
        print("  ".join([f"{line[0]:{widths[0]}}", *padded]).rstrip())


# ---- Samples -------------------------------------------------------------------------------------
def continue_text(
    model: GPT,
    tokenizer_name: str,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The prompt, and what the model writes after it. Draws none of torch's own random numbers."""
    tokenizer = load_tokenizer(tokenizer_name)

    # Without a prompt, a text begins where another one ends.
    start = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    tokens = torch.tensor([start], device=model.wte.weight.device)  # (1, T)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = model.generate(tokens, max_new_tokens, temperature, top_k)
    return tokenizer.decode(tokens[0].tolist())


# ---- The command ---------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("What checkpoints are worth; or samples of them.")
    add = parser.add_argument
    add("models", nargs="+", help="checkpoints, .bin files of GPT-2's layout, gpt2, ...")

    # What is evaluated.
    add("--split", choices=SPLITS, default="test", help="(default test)")
    add("--dataset", help="this text alone (default: the new and the old one of each model)")
    add("--data_dir", default="data", help="of downloads and caches (default ./data)")
    add("--stride", type=common.whole_number, help="tokens between windows (default: no overlap)")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--json", type=common.new_file(".json"), help="also write the rows to this file")

    # What is sampled.
    add("--prompt", help="continue this text instead of evaluating; may be empty")
    whole = common.whole_number
    add("--max_new_tokens", type=whole, default=200, help="(default 200)")
    real = common.real_number
    add("--temperature", type=real, default=0.8, help="0: the likeliest (default 0.8)")
    add("--sample_top_k", type=whole, default=50, help="choose from these (default 50)")
    add("--seed", type=int, default=0, help="of the samples (default 0)")
    return parser.parse_args()


def load_texts(args: argparse.Namespace, label: str, info: dict) -> dict[str, np.ndarray]:
    """The tokens of each text that a model is measured on: what it learned, and what it knew.

    Says so if a text is not the one that the model was trained on.
    """
    names = [info.get("dataset", "wikitext103"), info.get("old_dataset")]
    if args.dataset is not None:
        names = [args.dataset]
    texts = {}
    for name in filter(None, names):
        split = load_dataset(name, info["tokenizer"], args.data_dir)[args.split]
        texts[name] = split.tokens
        known = info.get("fingerprints", {}).get(name)
        if known and known[args.split] != split.fingerprint:
            print(f"{label} was trained beside another {name}: this one has changed since")
    return texts


def main() -> None:
    args = parse_arguments()
    device = common.pick_device(args.device)
    opened = {}
    for name in args.models:
        opened[name] = open_model(name, args.data_dir)
    widest = max(model.config.n_embd for model, _ in opened.values())
    if device.type == "cpu":
        torch.set_num_threads(common.threads_for(widest))

    # What they say,
    if args.prompt is not None:
        sizes = (args.max_new_tokens, args.temperature, args.sample_top_k, args.seed)
        for name, (model, info) in opened.items():
            print(f"{name}:")
            print(continue_text(model.to(device), info["tokenizer"], args.prompt, *sizes))
        return

    # or what they are worth.
    stride = f"stride {args.stride}" if args.stride else "no overlap"
    print(f"the whole {args.split} splits, in float32 on {device}; windows with {stride}")
    rows = []
    for name, (model, info) in opened.items():
        texts = load_texts(args, name, info)
        rows.append(evaluate(name, model.to(device), texts, info["tokenizer"], args.stride))
    print_table(rows)
    if args.json:
        with common.written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump(rows, file, indent=2)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    common.run_command(main)
