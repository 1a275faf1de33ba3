"""
What is inside a trained memory: which slots are used, for what, and does it matter?

    python experiments/analyze.py ckpt.pt                           four tables
    python experiments/analyze.py ckpt.pt --slots slots.svg         a picture of one head's slots
    python experiments/analyze.py ckpt.pt token.pt --slots slots.svg    two, on the same scale

In order: reads, use of slots, what slots answer, heads, fixed retrieval, the picture. Everything
reads the first --tokens of a split, in windows without overlap. Blocks count from 1, heads from 0.
Shape names: see hml.py.
"""

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from data import SPLITS, load_dataset, load_tokenizer
from hml import pool
from model import GPT, open_model
from plot import ENDINGS, INK, check_picture, new_figure, write_picture

Batches = list[tuple[Tensor, Tensor]]  # inputs and targets, both (B, T)
Reads = dict[int, list[tuple[Tensor, Tensor]]]  # by memory block and batch: weights, slots


# ---- Reads ---------------------------------------------------------------------------------------
def windows(model: GPT, tokens: np.ndarray) -> Batches:
    """tokens as batches of inputs and targets (B, T), T being block_size; a rest is dropped."""
    T = model.config.block_size
    whole = (len(tokens) - 1) // T * T
    row = torch.from_numpy(tokens[: whole + 1].astype(np.int64)).to(model.wte.weight.device)
    inputs = row[:-1].view(-1, T)  # (windows, T)
    targets = row[1:].view(-1, T)  # (windows, T)
    return list(zip(inputs.split(8), targets.split(8)))


@contextmanager
def hooked(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks away when the context ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def mean_loss(model: GPT, batches: Batches) -> float:
    losses = [model(x, y).item() * len(x) for x, y in batches]
    return sum(losses) / sum(len(x) for x, _ in batches)


@torch.no_grad()
def record_reads(model: GPT, batches: Batches) -> Reads:
    """Weights and slots of every read, both (B, T, H, k)."""
    reads = {i: [] for i, kind in enumerate(model.config.blocks) if kind == "M"}
    hooks = []
    for i, of_block in reads.items():

        def keep(module, inputs, out: tuple[Tensor, Tensor], of_block: list = of_block) -> None:
            of_block.append(out)

        hooks.append(model.h[i].memory.product_keys.register_forward_hook(keep))
    with hooked(hooks):
        for x, _ in tqdm(batches, desc="reading", disable=None):
            model(x)
    return reads


def reads_of_head(reads: Reads, block: int, head: int) -> tuple[Tensor, Tensor]:
    """Weights, fp64, and slots of one head, both (tokens, k), on the CPU."""
    weights = [weights[:, :, head].flatten(0, 1) for weights, _ in reads[block]]
    slots = [slots[:, :, head].flatten(0, 1) for _, slots in reads[block]]
    return torch.cat(weights).double().cpu(), torch.cat(slots).cpu()


# ---- Use of slots --------------------------------------------------------------------------------
def favourite(weights: Tensor, slots: Tensor, tokens: np.ndarray) -> float:
    """Of a slot's weight the share that its most faithful token has; a mean over slots by weight.

    weights, slots: (tokens, k), of one head. 1: each slot answers one token. Where all answer all
    alike, it is the share of the text's most frequent token.
    """
    # The summed weight of every pair of slot and token that occurs.
    token = torch.from_numpy(tokens[: len(slots)].astype(np.int64))[:, None]  # (tokens, 1)
    pairs, which = (slots * 2**32 + token).unique(return_inverse=True)  # (pairs,), (tokens, k)
    held = torch.bincount(which.flatten(), weights.flatten())  # (pairs,)

    # Of each slot the token that has most.
    _, slot = (pairs // 2**32).unique(return_inverse=True)  # (pairs,)
    most = torch.zeros(int(slot.max()) + 1, dtype=held.dtype)
    most.scatter_reduce_(0, slot, held, "amax")
    return (most.sum() / held.sum()).item()


def use_of_slots(model: GPT, tokens: np.ndarray, reads: Reads) -> list[dict]:
    """A row for every head of every memory block; slots are counted."""
    rows = []
    for block in reads:
        for head in range(model.config.n_head):
            weights, slots = reads_of_head(reads, block, head)  # both (tokens, k)
            row = {
                "block": block + 1,
                "head": head,
                "ever first choice": len(slots[:, 0].unique()),
                "ever read": len(slots.unique()),
                "favourite token": f"{favourite(weights, slots, tokens):.0%}",
            }
            rows.append(row)
    return rows


# ---- What slots answer ---------------------------------------------------------------------------
def busiest_slots(
    weights: Tensor, slots: Tensor, tokens: np.ndarray, count: int = 4, examples: int = 4
) -> list[dict]:
    """The slots with the most weight of one head: weights, slots (tokens, k).

    Each with its share of all weight, the tokens that gave it most (ids, and their part of its
    weight), and the places in the text where it was read most.
    """
    total = torch.bincount(slots.flatten(), weights.flatten())  # (slots,)
    rows = []
    for slot in total.argsort(descending=True)[:count].tolist():
        by_place = (weights * (slots == slot)).sum(dim=1)  # (tokens,)
        by_token = Counter()
        for place in by_place.nonzero().flatten().tolist():
            by_token[int(tokens[place])] += by_place[place].item() / total[slot].item()
        row = {
            "slot": slot,
            "share": (total[slot] / total.sum()).item(),
            "tokens": by_token.most_common(examples),
            "places": by_place.topk(min(examples, len(by_token))).indices.tolist(),
        }
        rows.append(row)
    return rows


def in_words(
    block: int, head: int, slots: list[dict], tokens: np.ndarray, tokenizer: tiktoken.Encoding
) -> list[dict]:
    """Rows of busiest_slots() as text that a table can hold."""

    def text(ids: list[int]) -> str:
        return "`" + repr(tokenizer.decode(ids))[1:-1].replace("|", "\\|") + "`"

    rows = []
    for slot in slots:
        readers = [f"{text([token])} {share:.0%}" for token, share in slot["tokens"]]
        ends = [text(tokens[max(0, p - 12) : p + 1].tolist()) for p in slot["places"][:2]]
        row = {
            "block": block + 1,
            "head": head,
            "slot": slot["slot"],
            "of the head's weight": f"{slot['share']:.1%}",
            "read by": ", ".join(readers),
            "read most at the end of": "; ".join(ends),
        }
        rows.append(row)
    return rows


# ---- Heads ---------------------------------------------------------------------------------------
def importance(model: GPT, batches: Batches, block: int) -> list[float]:
    """By how much the mean loss rises, in nats, when one head of a memory writes nothing."""
    whole = mean_loss(model, batches)
    rises = []
    for head in tqdm(range(model.config.n_head), desc="silencing heads", disable=None):
        gate = torch.ones(model.config.n_head, 1, device=model.wte.weight.device)
        gate[head] = 0

        def silence(module, inputs, values: Tensor, gate: Tensor = gate) -> Tensor:
            return values * gate  # (B, T, H, d_h)

        with hooked([model.h[block].memory.hive.register_forward_hook(silence)]):
            rises.append(mean_loss(model, batches) - whole)
    return rises


# ---- Fixed retrieval -----------------------------------------------------------------------------
def projections(proj: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """Ways to turn what heads read into values, each (H, d_v, d_h).

    proj: the trained W_h. gram (H, d_v, d_v): the sum over tokens of z_h^T z_h, by which one
    least-squares W for all heads comes nearest to all of their values.
    """
    gram = gram.cpu().double()  # mps has no float64
    wanted = (gram @ proj.cpu().double()).sum(0)  # (d_v, d_h)
    best = torch.linalg.pinv(gram.sum(0), hermitian=True) @ wanted  # (d_v, d_h)
    return {
        "own W of each head": proj,
        "one W for all, least squares": best.to(proj).expand_as(proj),
        "mean W": proj.mean(0).expand_as(proj),
        "W of the next head": proj.roll(-1, 0),
        "none: memory off": torch.zeros_like(proj),
    }


@torch.no_grad()
def fixed_retrieval(model: GPT, batches: Batches, reads: Reads) -> list[dict]:
    """The loss where slots and weights stay as the trained model chose them, and W changes."""
    ways = {}
    for i, of_block in reads.items():
        hive = model.h[i].memory.hive
        gram = 0
        for read in of_block:
            z = pool(*read, hive.bank).flatten(0, 1).transpose(0, 1)  # (H, B * T, d_v)
            gram = gram + z.transpose(1, 2) @ z  # (H, d_v, d_v)
        ways[i] = projections(hive.proj.clone(), gram)

    # The same reads again, batch by batch, whatever the queries have become.
    def replay(i: int) -> Callable:
        of_block = iter(reads[i])
        return lambda module, inputs, out: next(of_block)

    rows = []
    for name in ways[min(ways)]:
        hooks = []
        for i in reads:
            model.h[i].memory.hive.proj.copy_(ways[i][name])
            hooks.append(model.h[i].memory.product_keys.register_forward_hook(replay(i)))
        with hooked(hooks):
            rows.append({"values": name, "loss, nats": f"{mean_loss(model, batches):.3f}"})
    for i in reads:
        model.h[i].memory.hive.proj.copy_(ways[i]["own W of each head"])
    return rows


# ---- The picture ---------------------------------------------------------------------------------
def widest(model: GPT, reads: Reads, block: int) -> Tensor:
    """How often each slot was first choice, (n, n), of the head that has most slots in use."""
    n = model.config.n_keys
    counts = []
    for head in range(model.config.n_head):
        _, slots = reads_of_head(reads, block, head)
        counts.append(torch.bincount(slots[:, 0], minlength=n * n).view(n, n))
    return max(counts, key=lambda count: int((count > 0).sum()))


def draw_slots(squares: dict[str, Tensor], path: str) -> None:
    """squares: counts (n, n) by title, side by side. Slots never chosen are grey."""
    from matplotlib.colors import LogNorm

    # In powers of ten from 1 to the most of any: a single choice is pale in every square.
    most = max(int(counts.max()) for counts in squares.values())
    scale = LogNorm(1, max(10, most))
    figure, axes = new_figure(0.8 + 3.8 * len(squares), 4.2, len(squares))
    for axis, (title, counts) in zip(axes, squares.items()):
        chosen = np.ma.masked_equal(counts.numpy(), 0)
        image = axis.imshow(chosen, norm=scale, cmap="YlOrRd", interpolation="nearest")
        axis.set_facecolor("#e4e4e4")
        axis.set_title(title, color=INK, fontsize=10)
        axis.set_xlabel("column of the grid", color=INK)
        axis.set_ylabel("row of the grid", color=INK)
        axis.spines[:].set(visible=True, color=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("tokens whose first choice it was", color=INK)
    bar.ax.tick_params(which="both", colors=INK)
    write_picture(figure, path)


# ---- The command ---------------------------------------------------------------------------------
def open_with_text(path: str, args: Namespace) -> tuple[GPT, np.ndarray, tiktoken.Encoding]:
    """A model with memory, the tokens that it is to read, and its tokenizer."""
    model, info = open_model(path)
    if "M" not in model.config.blocks:
        raise ValueError(f"{path} has no memory blocks to look into")
    name = args.dataset or info.get("dataset", "pycode")
    split = load_dataset(name, info["tokenizer"], args.data_dir)[args.split]
    tokens = split.tokens[: args.tokens + 1]
    T = model.config.block_size
    if len(tokens) <= T:
        raise ValueError(f"--tokens, and the split, must be at least a window, {T} tokens")
    print(f"{path}: {' '.join(model.config.blocks)}, {len(tokens):,} tokens of {name} {args.split}")
    return model.to(args.device).eval(), tokens, load_tokenizer(info["tokenizer"])


def print_table(title: str, rows: list[dict]) -> None:
    """A table in Markdown. The keys of rows are its columns."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("| --- " * len(rows[0]) + "|")
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()]
        print("| " + " | ".join(cells) + " |")


def show_tables(model: GPT, tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> None:
    batches = windows(model, tokens)
    reads = record_reads(model, batches)
    title = f"Use of the {model.config.n_keys**2:,} slots of each head, k={model.config.top_k}"
    print_table(title, use_of_slots(model, tokens, reads))
    print("\nfavourite token: the share of a slot's weight that one token has, a mean over slots")

    heads = []
    rows = []
    for block in reads:
        rises = importance(model, batches, block)
        row = {"block": block + 1}
        for head, rise in enumerate(rises):
            row[f"head {head}"] = rise
        heads.append(row)
        most = int(np.argmax(rises))
        slots = busiest_slots(*reads_of_head(reads, block, most), tokens)
        rows += in_words(block, most, slots, tokens, tokenizer)
    print_table("Rise in loss when a head of a memory is silenced, nats", heads)
    print_table("The busiest slots of each memory's most important head", rows)
    print_table("The same reads, other values", fixed_retrieval(model, batches, reads))


def main() -> None:
    parser = common.Parser("What is inside the memory of a checkpoint?")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="with memory blocks")
    words = "only draw the slots of one head of each to this new file"
    add("--slots", type=common.new_file(*ENDINGS), help=words)
    add("--tokens", type=common.whole_number, default=32768, help="to read (default 32768)")
    add("--split", choices=SPLITS, default="valid", help="(default valid)")
    add("--dataset", help="(default: the one it was trained on)")
    add("--data_dir", default="data", help="of downloads and caches (default ./data)")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    args = parser.parse_args()
    args.device = common.pick_device(args.device)
    if args.slots:
        check_picture(args.slots)

    squares = {}
    for path in args.checkpoints:
        model, tokens, tokenizer = open_with_text(path, args)
        if args.device.type == "cpu":
            torch.set_num_threads(common.threads_for(model.config.n_embd))
        if not args.slots:
            show_tables(model, tokens, tokenizer)
            continue
        reads = record_reads(model, windows(model, tokens))
        counts = widest(model, reads, block=min(reads))
        used = int((counts > 0).sum())
        print(f"first choices: {used:,} of {counts.numel():,} slots")
        title = f"{model.config.query} query: {used:,} of {counts.numel():,} slots"
        squares[f"{title}\nare ever the first choice of this head"] = counts
    if args.slots:
        draw_slots(squares, args.slots)


if __name__ == "__main__":
    common.run_command(main)
