"""
Depth up-scaling: a pre-trained GPT in, a deeper GPT out, ready for continual pre-training.

    midus      memory blocks between the transformer blocks; starts as exactly the base      arXiv 2512.13751
    llama-pro  copies of blocks with both output projections zeroed; starts as the base      arXiv 2401.02415
    solar      two overlapping copies of the stack; starts worse, then recovers              arXiv 2312.15166

As a command:  python upscale.py base.pt --method midus --out deeper.pt      (or gpt2 instead of base.pt)

Positions are counted as in the papers: p = right after transformer block p, from 1. In `config.new` the inserted
blocks are listed by index in the new stack, from 0. More methods: experiments/. Shape names: see hml.py.
"""

import argparse
import math
import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import GPT, count_parameters, open_model, pick_device, run_command, save_checkpoint

METHODS = ("midus", "llama-pro", "solar")
PLACEMENT = ("every", "positions", "n_new")
MEMORY = ("n_keys", "top_k", "d_latent", "query_norm")


# ---- Where the new blocks go -----------------------------------------------------------------------------------------
def place(
    n_layer: int, in_the_middle: bool, every: int | None = None, positions: list[int] | None = None,
    n_new: int | None = None,
) -> list[int]:  # fmt: skip
    """Positions (1..n_layer, ascending) for new blocks: explicit ones, n_new spread evenly, or one in `every` (2).

    The stack is cut into groups, equal where that can be, and each gets one new block: in its middle (MIDUS: T M T) or
    at its end (LLaMA Pro: T T C). With `every`, a last group that is not full gets none. Raises ValueError.

    >>> place(6, True, every=2), place(6, False, every=2), place(12, True, n_new=5)
    ([1, 3, 5], [2, 4, 6], [1, 3, 6, 8, 11])
    """
    if sum(given is not None for given in (every, positions, n_new)) > 1:
        raise ValueError("give one of every, positions and n_new, not several")
    if positions is not None:
        wrong = [p for p in positions if not 1 <= p <= n_layer]
        if wrong or not positions:
            raise ValueError(f"positions must lie between 1 and {n_layer}, the number of blocks; got {positions}")
        if len(set(positions)) < len(positions):
            raise ValueError(f"new blocks are never stacked on each other; positions repeat: {positions}")
        return sorted(positions)
    if n_new is not None:
        if not 1 <= n_new <= n_layer:
            raise ValueError(f"n_new must lie between 1 and {n_layer}, the number of blocks; got {n_new}")
        edges = [group * n_layer // n_new for group in range(n_new + 1)]
    else:
        every = 2 if every is None else every
        if not 1 <= every <= n_layer:
            raise ValueError(f"every must lie between 1 and {n_layer}, the number of blocks; got {every}")
        edges = list(range(0, n_layer + 1, every))
    return [(low + high + 1) // 2 if in_the_middle else high for low, high in zip(edges, edges[1:])]


# ---- The methods: each says which block of the base every block of the new stack starts from -------------------------
def interleave(n_layer: int, positions: list[int]) -> tuple[list[int], list[int]]:
    """Sources and new indices of a stack with, after each block named in positions, one new block made from it."""
    sources, new = [], []
    for block in range(n_layer):
        sources.append(block)
        if block + 1 in positions:
            new.append(len(sources))
            sources.append(block)
    return sources, new


def overlap(n_layer: int, n_new: int) -> tuple[list[int], list[int]]:
    """SOLAR: the stack without its last m1 blocks, then the stack without its first m2; m1 + m2 = n_layer - n_new.
    The second copy's overlapping blocks count as the new ones."""
    m1 = (n_layer - n_new) // 2
    m2 = n_layer - n_new - m1
    sources = [*range(n_layer - m1), *range(m2, n_layer)]
    return sources, list(range(n_layer - m1, n_layer - m1 + n_new))


@torch.no_grad()
def assemble(base: GPT, sources: list[int], new: list[int], kind: str = "T", **memory) -> GPT:
    """A stack whose block i starts as a copy of the base's block sources[i]; those listed in new are of this kind."""
    if "M" in base.config.blocks:
        raise ValueError("the base already has memory blocks; up-scale a model of transformer blocks only")
    blocks = "".join(kind if i in new else "T" for i in range(len(sources)))
    config = replace(base.config, n_layer=len(sources), blocks=blocks, new=tuple(new), **memory)
    with torch.device(base.wte.weight.device):
        model = GPT(config)
    for name in ("wte", "wpe", "ln_f"):
        getattr(model, name).load_state_dict(getattr(base, name).state_dict())
    for i, source in enumerate(sources):
        # A memory block takes LN and Q, K, V from its source and has no place for the rest [choice: the block before].
        model.h[i].load_state_dict(base.h[source].state_dict(), strict=blocks[i] == "T")
    return model.to(base.wte.weight.dtype)


def silence(block: nn.Module) -> None:
    """Zeroes both output projections of a transformer block, so that it passes its input on unchanged."""
    for proj in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(proj.weight)
        nn.init.zeros_(proj.bias)  # GPT-2 has biases: the weight alone would not make an identity


def upscale(
    base: GPT, method: str, every: int | None = None, positions: list[int] | None = None, n_new: int | None = None,
    **memory,
) -> GPT:  # fmt: skip
    """A deeper copy of base, on its device; base is left untouched.

    method: one of METHODS. Placement: see place(); solar has one seam and takes n_new only (default: half as many
    blocks again, as published). memory: n_keys, top_k, d_latent, query_norm of midus's memory blocks.
    Raises ValueError, one sentence, for a placement or memory that cannot be.
    """
    L = base.config.n_layer
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; not {method!r}")
    if method != "midus" and memory:
        raise ValueError(f"{method} inserts no memory blocks; it takes no {', '.join(memory)}")
    if method == "solar":
        if positions is not None or every is not None:
            raise ValueError("solar has one seam, in the middle: it takes n_new, not positions or every")
        n_new = max(1, L // 2) if n_new is None else n_new
        if not 1 <= n_new <= L:
            raise ValueError(f"n_new must lie between 1 and {L}, the number of blocks; got {n_new}")
        return assemble(base, *overlap(L, n_new))
    positions = place(L, method == "midus", every, positions, n_new)
    model = assemble(base, *interleave(L, positions), kind="M" if method == "midus" else "T", **memory)
    if method == "llama-pro":
        for i in model.config.new:
            silence(model.h[i])
    return model


def set_trainable(model: GPT, which: str) -> None:
    """Freezes parameters. which: "new" (only inserted blocks train), "all", or "2,4,6" (these blocks, from 1).

    Raises ValueError if nothing would train, or a block is not there.
    """
    if which in ("new", "all"):
        chosen = model.config.new if which == "new" else range(model.config.n_layer)
    else:
        if not all(p.isdecimal() and 1 <= int(p) <= model.config.n_layer for p in which.split(",")):
            raise ValueError(f"--train is new, all, or blocks from 1 to {model.config.n_layer} (2,4); not {which}")
        chosen = [int(p) - 1 for p in which.split(",")]
    if not chosen:
        raise ValueError("--train new needs inserted blocks, and this model has none; use --train all")
    model.requires_grad_(which == "all")
    for i in chosen:
        model.h[i].requires_grad_(True)


# ---- The command -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def identity_gap(base: GPT, deeper: GPT, tokens: Tensor, dtype: torch.dtype) -> float:
    """The largest absolute difference of the two models' logits on tokens (B, T), computed in dtype (by autocast)."""
    device = base.wte.weight.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return (base(tokens.to(device))[0] - deeper(tokens.to(device))[0]).abs().max().item()


def summary(base: GPT, deeper: GPT) -> str:
    """The new stack as a line, the parameters before and added, those by part, and the memory's sizes."""
    before, added = sum(count_parameters(base).values()), count_parameters(deeper, deeper.config.new)
    stack = " ".join(deeper.config.blocks)
    marks = " ".join("^" if i in deeper.config.new else " " for i in range(deeper.config.n_layer)).rstrip()
    parts = ", ".join(f"{part} {count:,}" for part, count in added.items())
    parts += "".join(f"; {n} {getattr(deeper.config, n)}" for n in MEMORY if "M" in deeper.config.blocks)
    return f"stack  {stack}\nnew    {marks}\nbase   {before:,} parameters\nadded  {sum(added.values()):,} ({parts})"


def natural(text: str, least: int = 1) -> int:
    """A whole number from least to 2^63 - 1, which may be written as 2e6."""
    try:
        value = int(text) if text.isdecimal() else float(text)
        if least <= value == int(value) < 2**63:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")


def amount(text: str) -> float:
    """A finite number that is not negative."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")


def new_file(text: str) -> str:
    """A path where a file can be written; to be refused before anything long has begun."""
    if os.access(os.path.dirname(text) or ".", os.W_OK) and not os.path.isdir(text):
        return text
    raise argparse.ArgumentTypeError(f"{text}: there is no such folder, or no file can be written there")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of placement and memory, shared with train.py; what is not given stays None."""
    group = parser.add_argument_group("new blocks")
    group.add_argument("--every", type=natural, help="one new block per so many blocks (default 2)")
    group.add_argument("--positions", type=natural, nargs="+", help="new blocks right after these: 1 3 5")
    group.add_argument("--n_new", type=natural, help="number of new blocks, spread evenly")
    group.add_argument("--n_keys", type=natural, help="sub-keys per half; n_keys squared slots")
    group.add_argument("--top_k", type=natural, help="slots read per token and head")
    group.add_argument("--d_latent", type=natural, help="width of a row of the shared bank")
    group.add_argument("--query_norm", action="store_true", default=None, help="normalise queries (not in the paper)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Up-scale a checkpoint (or a GPT-2 by name) without training it.")
    parser.add_argument("base", help="checkpoint, GPT-2 .bin file, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    parser.add_argument("--method", choices=METHODS, default="midus")
    parser.add_argument("--out", type=new_file, default="deeper.pt", help="the new checkpoint (default deeper.pt)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--data_dir", default="data", help="where GPT-2's weights are kept (default ./data)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--seed", type=lambda t: natural(t, 0), default=0, help="of what starts at random")
    add_arguments(parser)
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.overwrite:
        raise ValueError(f"{args.out} exists; choose another --out, or add --overwrite")
    options = {n: getattr(args, n) for n in (*PLACEMENT, *MEMORY) if getattr(args, n) is not None}
    device = pick_device(args.device)
    base, info = open_model(args.base, args.data_dir)
    base = base.to(device).eval()
    torch.manual_seed(args.seed)
    deeper = upscale(base, args.method, **options).eval()
    print(f"{args.method} on {args.base}, device {device}\n{summary(base, deeper)}")
    tokens = torch.randint(base.config.vocab_size, (1, min(256, base.config.block_size)))
    for dtype in (torch.float32, torch.bfloat16):
        print(f"largest difference of logits to the base, {dtype}: {identity_gap(base, deeper, tokens, dtype):g}")
    kept = {name: info[name] for name in ("tokenizer", "dataset", "data_dir") if name in info}
    save_checkpoint(args.out, deeper, method=args.method, history=[], **kept)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
