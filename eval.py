"""
What a checkpoint is worth: perplexities, cost, and how much of its memory it uses.

    python eval.py ckpt.pt                      test splits of what it learned and of what it knew
    python eval.py gpt2 --stride 512            published GPT-2 on WikiText-103, overlapping windows
    python eval.py ckpt.pt --prompt "def "      samples instead

Perplexity has several names. They differ in what NLL, the split's summed negative log-likelihood in
nats, is divided by:

    token-level   exp(NLL / tokens)     depends on the tokenizer
    word-level    exp(NLL / words)      does not
    bits per byte NLL / ln 2 / bytes    does not

In order: perplexity, use of the memory, the report, samples, the table that closes a training run,
the command. Shape names: see hml.py.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
from data import (
    DATASETS,
    SPLITS,
    Split,
    check_vocabulary,
    find_source,
    is_at_hand,
    load_dataset,
    load_tokenizer,
    read_text,
)
from model import GPT, count_parameters, open_model


# ---- Perplexity ----------------------------------------------------------------------------------
def windows_at_once(model: GPT) -> int:
    """How many windows make a batch: as many as a CPU's caches like (512 tokens); on a GPU 32."""
    block_size = model.config.block_size
    wanted = 512 // block_size if model.wte.weight.device.type == "cpu" else 32
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
    """exp(nll / count). Raises FloatingPointError if the model has gone wrong: NaN or infinite."""
    if not nll / count < 700:  # no float holds more; NaN is not less either
        raise FloatingPointError(
            "the model's perplexity is infinite or NaN: its weights are spoilt"
        )
    return math.exp(nll / count)


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

    blocks = [i for i, block in enumerate(model.h) if hasattr(block, "memory")]
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
def base_of(model: GPT) -> GPT:
    """The model without its new blocks, sharing all weights: its base, if only those trained."""
    # A stack of the old blocks alone.
    old = [i for i in range(model.config.n_layer) if i not in model.config.new]
    config = dataclasses.replace(model.config, n_layer=len(old), blocks="T" * len(old), new=())
    with torch.device("meta"):  # no memory for weights that are replaced at once
        base = GPT(config)
    base.wte = model.wte
    base.wpe = model.wpe
    base.ln_f = model.ln_f
    base.h = nn.ModuleList(model.h[i] for i in old)
    return base


def count_words(text: str) -> int:
    """Words, with one end-of-line for each line, as WikiText counts them."""
    last_line_is_open = not text.endswith("\n")
    return len(text.split()) + text.count("\n") + last_line_is_open


def evaluate(model: GPT, tokens: np.ndarray, text: str, stride: int | None, desc: str) -> dict:
    """All figures of one split: perplexities, tokens per second, use of each memory block."""
    # One pass gives everything.
    start = time.perf_counter()
    with count_usage(model) as counts:
        nll, count = sum_nll(model, tokens, stride, desc)
    seconds = time.perf_counter() - start

    # The text itself says what to divide by.
    words = count_words(text)
    size = len(text.encode())
    return {
        "tokens": count,
        "words": words,
        "bytes": size,
        "nll": nll,
        "token_perplexity": perplexity(nll, count),
        # A text without spaces is one word, for which no float is large enough.
        "word_perplexity": perplexity(nll, words) if nll < 700 * words else None,
        "bits_per_byte": nll / math.log(2) / size,
        "tokens_per_second": count / seconds,
        "slots": model.config.n_keys**2,  # in each memory block, if there are any
        "usage": {block + 1: usage(reads) for block, reads in counts.items()},  # counted from 1
    }


def print_report(report: dict, base: dict | None) -> None:
    """Each figure, beside it the base's if there is one, and what it was divided by."""
    tokens, words, size = report["tokens"], report["words"], report["bytes"]
    rows = [
        ("token-level perplexity", "token_perplexity", ".3f", f"exp(NLL / {tokens:,} tokens)"),
        ("word-level perplexity", "word_perplexity", ".3f", f"exp(NLL / {words:,} words)"),
        ("bits per byte", "bits_per_byte", ".4f", f"NLL / ln 2 / {size:,} bytes"),
        ("tokens/s", "tokens_per_second", ",.0f", "with the time to count reads"),
    ]
    # Where tokens are bytes, a word is so many of them that its perplexity says nothing.
    if tokens > 3 * words:
        del rows[1]

    # The model itself, and the base where there is one.
    columns = [report] if base is None else [report, base]
    titles = ["this model", "its base"]
    print(f"{'':24}" + "".join(f"{title:>14}" for title in titles[: len(columns)]))
    for name, key, form, meaning in rows:
        figures = "".join(f"{column[key]:14{form}}" for column in columns)
        print(f"{name:24}{figures}    {meaning}")


def print_usage(report: dict) -> None:
    """How many slots of each memory block are in use."""
    for block, figures in report["usage"].items():
        first = f"{figures['top1'] * report['slots']:,.0f} of its {report['slots']:,} slots"
        some = "were a head's first choice for some token"
        read = f"{figures['topk'] * report['slots']:,.0f} were read"
        print(f"memory in block {block}: {first} {some}, {read} (means over heads)")


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

    # A model may have more tokens than its tokenizer.
    known = [token for token in tokens[0].tolist() if token < tokenizer.n_vocab]
    return tokenizer.decode(known)


# ---- The table that closes a training run --------------------------------------------------------
SHARE = 100_000  # tokens of a validation split that the table looks at


def closing_row(
    label: str, model: GPT, splits: dict[str, Split], tokenizer: str, prompt: str
) -> dict:
    """Sizes, a sample, and the perplexity on each of splits ("new", "old")."""
    row = {
        "label": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "added": sum(p.numel() for i in model.config.new for p in model.h[i].parameters()),
        "sample": continue_text(model, tokenizer, prompt, max_new_tokens=120),
    }
    for name, split in splits.items():
        nll, count = sum_nll(model, split.tokens[:SHARE], desc=f"{label}: the {name} text")
        row[name] = perplexity(nll, count)
    return row


def print_closing_table(rows: list[dict], names: dict[str, str]) -> None:
    """names: of the texts, by column ("new", "old")."""
    print(f"perplexity: token-level, on the first {SHARE:,} tokens of each validation split")
    columns = "".join(f"{f'{kind}: {name}':>18}" for kind, name in names.items())
    print(f"{'':20}{'parameters':>12}{'added':>12}{columns}")
    for row in rows:
        sizes = f"{row['parameters']:12,}{row['added']:12,}"
        figures = "".join(f"{row[kind]:18.4f}" for kind in names)
        print(f"{row['label']:20}{sizes}{figures}")


def verdict(rows: list[dict], names: dict[str, str]) -> str:
    """What a run came to, in sentences. rows: the first is where it started from, the last its end.

    An up-scaled model has a row in between: how it started.
    """
    # What was learned. A run that ends where it began, or worse, shall not end in silence.
    first = rows[0]
    last = rows[-1]
    sentences = []
    change = last["new"] / first["new"] - 1
    figures = f"perplexity on {names['new']} {first['new']:.2f} -> {last['new']:.2f}"
    if change < 0:
        sentences.append(f"Learned: {figures} ({change:+.0%}).")
    else:
        sentences.append(f"Nothing was learned: {figures} ({change:+.0%}). Try a lower --lr.")

    # At what price: what was forgotten, and what was added.
    if "old" in names:
        change = last["old"] / first["old"] - 1
        word = "Forgotten" if change > 0 else "Nothing was forgotten"
        figures = f"perplexity on {names['old']} {first['old']:.2f} -> {last['old']:.2f}"
        sentences.append(f"{word}: {figures} ({change:+.0%}).")
    if len(rows) == 3:
        same = all(rows[1][kind] == first[kind] for kind in names)
        start = "as exactly the base" if same else f"at {rows[1]['new']:.2f}"
        sentences.append(f"The price: {last['added']:,} parameters more. It started {start}.")
    return "\n".join(sentences)


# ---- The command ---------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("What a checkpoint is worth; or samples of it.")
    parser.add_argument("checkpoint", help="a checkpoint, a .bin file of GPT-2's layout, gpt2, ...")

    # What is evaluated.
    add = parser.add_argument
    add("--split", choices=SPLITS, default="test", help="(default test)")
    add("--dataset", choices=DATASETS, help="this alone (default: the new and the old text)")
    folder = common.data_folder
    add("--data_dir", type=folder, help="of data and caches (default: as in training, or ./data)")
    add("--stride", type=common.whole_number, help="tokens between windows (default: no overlap)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--json", type=common.new_file(".json"), help="also write the figures to this new file")

    # What is sampled.
    add("--prompt", help="continue this text instead of evaluating; may be empty")
    whole = common.whole_number
    add("--max_new_tokens", type=whole, default=200, help="(default 200)")
    real = common.real_number
    add("--temperature", type=real, default=0.8, help="0: the likeliest (default 0.8)")
    add("--sample_top_k", type=whole, default=50, help="choose from these (default 50)")
    add("--seed", type=common.seed_number, default=0, help="of the samples (default 0)")
    return parser.parse_args()


def texts_to_read(args: argparse.Namespace, info: dict) -> dict[str, tuple[str, str]]:
    """Name and folder of each text: "new" what the model learned, "old" what it knew before."""

    # A folder that a checkpoint names may have been on another machine.
    def folder(name: str) -> str:
        theirs = info.get(name) or ""
        return args.data_dir or (theirs if os.path.isdir(theirs) else os.path.abspath("data"))

    # One text, if it is named.
    new = (info.get("dataset", "wikitext103"), folder("data_dir"))
    old = (info.get("old_dataset"), folder("old_data_dir"))
    if args.dataset is not None:
        theirs = {old[0]: old[1], new[0]: new[1]}
        return {"new": (args.dataset, theirs.get(args.dataset, folder("data_dir")))}

    # Else both. The old one may be another text of the same name, in another folder.
    texts = {"new": new}
    if old[0] is not None and old != new:
        if is_at_hand(*old):
            texts["old"] = old
        else:
            print(f"{old[0]}, the old text, is left out: it is not there, or not downloaded")
    return texts


def report_texts(model: GPT, info: dict, args: argparse.Namespace) -> None:
    """Evaluates the texts, prints the figures, and writes them to args.json if that is given."""
    # How the text is read.
    tokenizer = info["tokenizer"]
    window = model.config.block_size
    stride = args.stride or window
    if stride > window:
        raise ValueError(f"--stride {stride} is more than the window, {window}")

    # Where the new blocks alone were trained, the model without them is the base, to the last bit.
    only_new_trained = model.config.new and info.get("settings", {}).get("train") == "new"
    base = base_of(model) if only_new_trained else None

    # Text by text.
    figures = {}
    for kind, (dataset, data_dir) in texts_to_read(args, info).items():
        tokens = load_dataset(dataset, tokenizer, data_dir, (args.split,))[args.split].tokens
        text = read_text(*find_source(dataset, args.split, data_dir))
        print(
            f"\n{kind} text: {dataset} {args.split}, tokenizer {tokenizer}, window {window}, "
            f"stride {stride}"
        )
        report = evaluate(model, tokens, text, stride, "evaluating")
        of_base = None
        if base is not None:
            of_base = evaluate(base, tokens, text, stride, "evaluating its base")
        print_report(report, of_base)
        figures[kind] = {"dataset": dataset, **report, "base": of_base}
    print()
    print_usage(figures["new"])

    # The same for a program: the new text's figures at the top, as if it were the only one.
    if args.json:
        about = {
            "checkpoint": args.checkpoint,
            "split": args.split,
            "tokenizer": tokenizer,
            "window": window,
            "stride": stride,
            "parameters": count_parameters(model),
        }
        about.update(figures["new"])
        about["old"] = figures.get("old")
        with common.written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump(about, file, indent=2)


def main() -> None:
    args = parse_arguments()
    if args.json and os.path.exists(args.json):
        raise ValueError(f"{args.json} exists; name another file with --json")
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
    if args.prompt is None:
        report_texts(model, info, args)
    else:
        sizes = (args.max_new_tokens, args.temperature, args.sample_top_k)
        print(continue_text(model, info["tokenizer"], args.prompt, *sizes, args.seed))


if __name__ == "__main__":
    common.run_command(main)
