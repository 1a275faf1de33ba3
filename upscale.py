"""
Depth up-scaling: a pre-trained GPT in, a deeper GPT out, ready for continual pre-training.

    midus      memory blocks between its blocks; starts as exactly the base   arXiv 2512.13751
    llama-pro  copies that are silent at first; starts as exactly the base    arXiv 2401.02415
    solar      two overlapping copies of it; starts worse, then recovers      arXiv 2312.15166

As a command:  python upscale.py base.pt --method midus --out deeper.pt     (or gpt2 for base.pt)

Positions are counted as in the papers: p = right after transformer block p, from 1. In `config.new`
the inserted blocks are listed by index in the new stack, from 0. More methods: experiments/. Shape
names: see hml.py.
"""

import argparse
import dataclasses
import os
from collections import namedtuple

import torch
from torch import Tensor, nn

import common
from model import GPT, count_parameters, open_model, save_checkpoint

PLACEMENT = ("every", "positions", "n_new")
MEMORY = ("n_keys", "top_k", "d_latent", "query_norm", "query")


def memory_sizes(n_embd: int) -> dict[str, int]:
    """Sizes of a memory for a base of this width, where nobody says: n_keys, top_k, d_latent."""
    # Small ones were tried; the last one's cost was measured, and no more.
    if n_embd <= 128:
        return {"n_keys": 32, "top_k": 8, "d_latent": 32}
    if n_embd <= 640:
        return {"n_keys": 64, "top_k": 8, "d_latent": 64}
    return {"n_keys": 128, "top_k": 16, "d_latent": 64}


# ---- Where the new blocks go ---------------------------------------------------------------------
def check_count(name: str, count: int, n_layer: int) -> None:
    """Raises ValueError unless a count of blocks fits a base of n_layer blocks."""
    if not 1 <= count <= n_layer:
        range_ = f"between 1 and {n_layer}, the number of blocks"
        raise ValueError(f"{name} must lie {range_}; got {count}")


def place(
    n_layer: int,
    in_the_middle: bool,
    every: int | None = None,
    positions: list[int] | None = None,
    n_new: int | None = None,
) -> list[int]:
    """Positions (1..n_layer, ascending) for new blocks.

    They are given as such, or as a number of blocks to be spread evenly (n_new), or as one new
    block in `every` (default 2). The stack is cut into groups, equal where that can be, and each
    gets one new block: in its middle (MIDUS: T M T) or at its end (LLaMA Pro: T T C). With `every`,
    a last group that is not full gets none. Raises ValueError for what cannot be.

    >>> place(6, True, every=2), place(6, False, every=2), place(12, True, n_new=5)
    ([1, 3, 5], [2, 4, 6], [1, 3, 6, 8, 11])
    """
    # One way to say where, not several.
    ways = [way for way in (every, positions, n_new) if way is not None]
    if len(ways) > 1:
        raise ValueError("give one of every, positions and n_new, not several")

    # New blocks are never stacked on each other [report], so no position comes twice.
    if positions is not None:
        inside = all(1 <= p <= n_layer for p in positions)
        if not positions or not inside or len(set(positions)) < len(positions):
            wanted = f"different numbers between 1 and {n_layer}, the number of blocks"
            raise ValueError(f"positions must be {wanted}; got {positions}")
        return sorted(positions)

    # Groups of blocks, by their edges.
    if n_new is not None:
        check_count("n_new", n_new, n_layer)
        edges = [group * n_layer // n_new for group in range(n_new + 1)]
    else:
        every = min(2, n_layer) if every is None else every
        check_count("every", every, n_layer)
        edges = list(range(0, n_layer + 1, every))

    # A new block in each.
    places = []
    for bottom, top in zip(edges, edges[1:]):
        places.append((bottom + top + 1) // 2 if in_the_middle else top)
    return places


# ---- A new stack, made of parts of the base ------------------------------------------------------
def interleave(n_layer: int, positions: list[int]) -> tuple[list[int], list[int]]:
    """A stack with one new block after each block named in positions, made from that block.

    Returns sources, the block of the base that each block of the new stack is made from, and new,
    the indices of the new blocks in it; both from 0.
    """
    # Block by block up the base; a new one has the same source as the one below it.
    sources = []
    new = []
    for block in range(n_layer):
        sources.append(block)
        if block + 1 in positions:
            new.append(len(sources))
            sources.append(block)
    return sources, new


def overlap(n_layer: int, n_new: int | None = None) -> tuple[list[int], list[int]]:
    """SOLAR's stack of two copies of the base, as sources and new, see interleave().

    The base without its last m1 blocks, then the base without its first m2; m1 + m2 = n_layer -
    n_new, as equal as can be. The second copy's overlapping blocks count as the new ones.

    >>> overlap(6, 2)
    ([0, 1, 2, 3, 2, 3, 4, 5], [4, 5])
    """
    n_new = max(1, n_layer // 2) if n_new is None else n_new
    check_count("n_new", n_new, n_layer)
    m1 = (n_layer - n_new) // 2
    m2 = n_layer - n_new - m1
    seam = n_layer - m1
    sources = [*range(seam), *range(m2, n_layer)]
    return sources, list(range(seam, seam + n_new))


@torch.no_grad()
def assemble(base: GPT, sources: list[int], new: list[int], kind: str = "T", **memory) -> GPT:
    """A stack whose block i starts as a copy of the base's block sources[i].

    The blocks listed in new are of this kind: T, or M with the sizes in memory. The result is on
    the base's device, in its dtype; base is left as it is. Raises ValueError if the base has
    memory.
    """
    if "M" in base.config.blocks:
        raise ValueError("the base already has memory blocks; name the base that it was made of")

    # The new shape. Weights are drawn on the CPU, so that a seed gives the same ones everywhere.
    kinds = [kind if i in new else "T" for i in range(len(sources))]
    config = dataclasses.replace(
        base.config, n_layer=len(sources), blocks="".join(kinds), new=tuple(new), **memory
    )
    model = type(base)(config)

    # What is not a block is as it was; every block starts from its source.
    weights = base.state_dict()
    outside = {name: weights[name] for name in weights if not name.startswith("h.")}
    model.load_state_dict(outside, strict=False)
    for i, source in enumerate(sources):
        # A memory block takes LN and Q, K, V (and W_O, with query="token") from its source, and has
        # no place for the rest. That its source is the block before it is a [choice].
        is_copy = kinds[i] == "T"
        model.h[i].load_state_dict(base.h[source].state_dict(), strict=is_copy)
    return model.to(base.wte.weight)


def silence(block: nn.Module) -> None:
    """Zeroes both output projections of a transformer block: it passes its input on unchanged."""
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        for parameter in projection.parameters():  # GPT-2 has biases: the weight would not do
            nn.init.zeros_(parameter)


# ---- The methods ---------------------------------------------------------------------------------
# Each is a choice of sources and of what the new blocks are at the start.
def midus(
    base: GPT,
    every: int | None = None,
    positions: list[int] | None = None,
    n_new: int | None = None,
    **memory,
) -> GPT:
    """A memory block inside each group of blocks; memory: sizes and switches, see MEMORY."""
    positions = place(base.config.n_layer, True, every, positions, n_new)
    sources, new = interleave(base.config.n_layer, positions)

    # Sizes that are not given go by the width of the base.
    sizes = memory_sizes(base.config.n_embd)
    sizes.update(memory)
    return assemble(base, sources, new, kind="M", **sizes)


def llama_pro(
    base: GPT,
    every: int | None = None,
    positions: list[int] | None = None,
    n_new: int | None = None,
) -> GPT:
    """A copy at the end of each group of blocks, silent at first."""
    positions = place(base.config.n_layer, False, every, positions, n_new)
    sources, new = interleave(base.config.n_layer, positions)
    model = assemble(base, sources, new)
    for i in new:
        silence(model.h[i])
    return model


def solar(base: GPT, n_new: int | None = None) -> GPT:
    """Two overlapping copies of the stack; by default half as many blocks again, as published."""
    return assemble(base, *overlap(base.config.n_layer, n_new))


# A method: the function that builds the deeper model, the options it takes, and what trains unless
# somebody says otherwise: "new" or "all". A row that is added here can be trained, sampled and
# compared at once, if its model is made of T and M blocks.
Method = namedtuple("Method", ("build", "options", "train"))

METHODS = {
    "midus": Method(midus, PLACEMENT + MEMORY, "new"),
    "llama-pro": Method(llama_pro, PLACEMENT, "new"),
    "solar": Method(solar, ("n_new",), "all"),
}


def upscale(base: GPT, method: str, **options) -> GPT:
    """A deeper copy of base, on its device; base is left untouched.

    method: a row of METHODS. options: of those in its row; placement is explained at place().
    Raises ValueError, one sentence, for what cannot be.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; not {method!r}")
    known = METHODS[method].options
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{method} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    return METHODS[method].build(base, **options)


def set_trainable(model: GPT, which: str) -> None:
    """Freezes what does not train. which: "new" (inserted blocks), "all", or blocks from 1: "2,4".

    Raises ValueError if nothing would train, or a block is not there.
    """
    n_layer = model.config.n_layer
    if which == "all":
        model.requires_grad_(True)
        return

    # Indices of the blocks that learn.
    if which == "new":
        chosen = model.config.new
        if not chosen:
            raise ValueError("--train new: this model has no inserted blocks; use --train all")
    else:
        named = which.split(",")
        if not all(part.isdecimal() and 1 <= int(part) <= n_layer for part in named):
            wanted = f"new, all, or blocks from 1 to {n_layer} (2,4)"
            raise ValueError(f"--train is {wanted}; not {which}")
        chosen = [int(part) - 1 for part in named]

    # Embeddings and the last norm stay frozen too.
    model.requires_grad_(False)
    for i in chosen:
        model.h[i].requires_grad_(True)


# ---- The command ---------------------------------------------------------------------------------
@torch.no_grad()
def identity_gap(base: GPT, deeper: GPT, tokens: Tensor, dtype: torch.dtype) -> float:
    """The largest absolute difference of the logits on tokens (B, T), in autocast dtype."""
    device = base.wte.weight.device
    tokens = tokens.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        difference = base(tokens) - deeper(tokens)  # (B, T, vocab)
    return difference.abs().max().item()


def summary(base: GPT, deeper: GPT) -> str:
    """The new stack as a line, and the parameters: before, added, and of which parts."""
    # What was there, what is new, and what the new parts consist of.
    before = sum(count_parameters(base).values())
    added = count_parameters(deeper, deeper.config.new)
    parts = ", ".join(f"{part} {count:,}" for part, count in added.items())
    if "M" in deeper.config.blocks:
        parts += "".join(f"; {name} {getattr(deeper.config, name)}" for name in MEMORY)

    # T M T T M T, with a mark under every new block.
    marks = ["^" if i in deeper.config.new else " " for i in range(deeper.config.n_layer)]
    lines = (
        f"stack  {' '.join(deeper.config.blocks)}",
        f"new    {' '.join(marks).rstrip()}",
        f"base   {before:,} parameters",
        f"added  {sum(added.values()):,} ({parts})",
    )
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the options of METHODS, here and in train.py; one that is not given is None."""
    whole = common.whole_number
    add = parser.add_argument_group("new blocks").add_argument
    add("--every", type=whole, help="one new block per so many blocks (default 2)")
    add("--positions", type=common.whole_numbers, help="new blocks right after these: 1,3,5")
    add("--n_new", type=whole, help="so many new blocks, spread evenly")
    add("--n_keys", type=whole, help="n, for n * n slots (default 32, 64 or 128, by width)")
    add("--top_k", type=whole, help="slots read per token and head (default 8 or 16, by width)")
    add("--d_latent", type=whole, help="width of an entry of the bank (default 32 or 64, by width)")
    add("--query_norm", action="store_true", default=None, help="normalise queries (not published)")
    words = "what a head asks with: its output (default), or its slice of token + attention"
    add("--query", choices=("head", "token"), help=words)


def given_options(args: argparse.Namespace) -> dict:
    """The options that were given as flags."""
    values = {name: getattr(args, name) for name in PLACEMENT + MEMORY}
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    parser = common.Parser("Up-scale a model without training it.")
    add = parser.add_argument
    add("base", help="a checkpoint, a .bin file of GPT-2's layout, gpt2, gpt2-medium, ...")
    add("--method", choices=METHODS, default="midus", help="(default midus)")
    add("--out", type=common.new_file(".pt"), default="deeper.pt", help="(default deeper.pt)")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    folder = common.data_folder
    add("--data_dir", type=folder, default="data", help="of GPT-2's weights (default ./data)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--seed", type=common.seed_number, default=0, help="of what starts at random (default 0)")
    add_flags(parser)
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.overwrite:
        raise ValueError(f"{args.out} exists; choose another --out, or add --overwrite")

    # Up-scale.
    device = common.pick_device(args.device)
    base, info = open_model(args.base, args.data_dir)
    base = base.to(device)
    torch.manual_seed(args.seed)
    deeper = upscale(base, args.method, **given_options(args))
    print(f"{args.method} on {args.base}, device {device}")
    print(summary(base, deeper))

    # Shown, not enforced: midus and llama-pro print 0, solar does not.
    length = min(256, base.config.block_size)
    tokens = torch.randint(base.config.vocab_size, (1, length))
    for dtype in (torch.float32, torch.bfloat16):
        gap = identity_gap(base, deeper, tokens, dtype)
        print(f"largest difference of logits to the base, {dtype}: {gap:g}")

    # The new model goes by its base's tokenizer and data.
    about = {name: info[name] for name in ("tokenizer", "dataset", "data_dir") if name in info}
    save_checkpoint(args.out, deeper, **about)
    way = f"python train.py --base {args.out} --train new"
    print(f"wrote {args.out}; train what is new in it: {way}")


if __name__ == "__main__":
    common.run_command(main)
