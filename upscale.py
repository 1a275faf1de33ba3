"""
Depth up-scaling: a pre-trained GPT in, a deeper GPT out, ready for continual pre-training.

    midus      memory blocks between its blocks; starts as exactly the base   arXiv 2512.13751
    hybrid     copies with a memory for their MLP; starts as exactly the base
    ngram      memories that the last tokens look up; starts as exactly the base
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
from torch import nn

import common
from model import GPT, count_parameters, open_model, save_checkpoint


def memory_sizes(n_embd: int) -> dict[str, int]:
    """Sizes of a memory for a base of this width, where nobody says: n_keys, top_k, d_latent."""
    # Small ones were tried; the last one's cost was measured, and no more.
    if n_embd <= 128:
        return {"n_keys": 32, "top_k": 8, "d_latent": 32}
    if n_embd <= 640:
        return {"n_keys": 64, "top_k": 8, "d_latent": 64}
    return {"n_keys": 128, "top_k": 16, "d_latent": 64}


# ---- Where the new blocks go ---------------------------------------------------------------------
def check_count(n_new: int, n_layer: int) -> None:
    """Raises ValueError unless so many new blocks fit a base of n_layer blocks."""
    if not 1 <= n_new <= n_layer:
        range_ = f"between 1 and {n_layer}, the number of blocks"
        raise ValueError(f"n_new must lie {range_}; got {n_new}")


def place(
    n_layer: int,
    in_the_middle: bool,
    positions: list[int] | None = None,
    n_new: int | None = None,
) -> list[int]:
    """Positions (1..n_layer, ascending) for new blocks.

    They are given as such, or as a number of blocks to be spread evenly, by default half as many as
    the base has. The stack is cut into that many groups, equal where that can be, and each gets one
    new block: in its middle (MIDUS: T M T) or at its end (LLaMA Pro: T T C). Raises ValueError for
    what cannot be.

    >>> place(6, True), place(6, False), place(12, True, n_new=5)
    ([1, 3, 5], [2, 4, 6], [1, 3, 6, 8, 11])
    """
    # New blocks are never stacked on each other [report], so no position comes twice.
    if positions is not None:
        inside = all(1 <= p <= n_layer for p in positions)
        if n_new is not None or not inside or len(set(positions)) < len(positions):
            wanted = (
                f"different numbers between 1 and {n_layer}, the number of blocks, without n_new"
            )
            raise ValueError(f"positions must be {wanted}; got {positions}")
        return sorted(positions)

    # A group is the blocks from bottom to top, as a slice has them: from 0, without the last. So
    # top is also the position after its last block, and half of it, rounded up, comes before M.
    n_new = max(1, n_layer // 2) if n_new is None else n_new
    check_count(n_new, n_layer)
    edges = [group * n_layer // n_new for group in range(n_new + 1)]
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
    check_count(n_new, n_layer)
    m1 = (n_layer - n_new) // 2
    m2 = n_layer - n_new - m1
    seam = n_layer - m1
    sources = [*range(seam), *range(m2, n_layer)]
    return sources, list(range(seam, seam + n_new))


@torch.no_grad()
def assemble(base: GPT, sources: list[int], new: list[int], kind: str = "T", **sizes) -> GPT:
    """A stack whose block i starts as a copy of the base's block sources[i].

    The blocks listed in new are of this kind, a letter of BLOCKS; sizes: fields of the config that
    it wants. The result is on the base's device, in its dtype; base is left as it is. Raises
    ValueError if the base is not all T.
    """
    if set(base.config.blocks) != {"T"}:
        raise ValueError("the base was up-scaled before; name the base that it was made of")

    # The new shape. Weights are drawn on the CPU, so that a seed gives the same ones everywhere.
    kinds = [kind if i in new else "T" for i in range(len(sources))]
    config = dataclasses.replace(
        base.config, n_layer=len(sources), blocks="".join(kinds), new=tuple(new), **sizes
    )
    model = type(base)(config)

    # What is not a block is as it was.
    for name in ("wte", "wpe", "ln_f"):
        getattr(model, name).load_state_dict(getattr(base, name).state_dict())

    # Every block takes from its source what it has a place for: a copy takes all, a memory block LN
    # and Q, K, V (and W_O, with query="token"). Its own parts stay as they were drawn.
    for block, source in zip(model.h, sources):
        weights = base.h[source].state_dict()
        for name, parameter in block.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model.to(base.wte.weight)


def silence(block: nn.Module) -> None:
    """Zeroes a block's output projections: what it has copied adds nothing to the stream."""
    for name, parameter in block.named_parameters():
        if "c_proj" in name:  # GPT-2 has biases: the weight alone would not do
            nn.init.zeros_(parameter)


# ---- The methods ---------------------------------------------------------------------------------
# Each is a choice of sources and of what the new blocks are at the start.
def midus(base: GPT, positions: list[int] | None = None, n_new: int | None = None, **memory) -> GPT:
    """A memory block inside each group of blocks. memory: fields of the config, see MEMORY.

    That a memory block is made from the block before it is a [choice].
    """
    positions = place(base.config.n_layer, True, positions, n_new)
    sources, new = interleave(base.config.n_layer, positions)

    # Sizes that are not given go by the width of the base.
    sizes = memory_sizes(base.config.n_embd)
    sizes.update(memory)
    model = assemble(base, sources, new, kind="M", **sizes)
    if model.config.residual:
        for i in new:
            silence(model.h[i])
    return model


def hybrid(base: GPT, **options) -> GPT:
    """A copied block whose MLP is a memory, inside each group of blocks; options as midus's.

    So the paper's abstract can be read: "replaces the duplicated FFN branches with memory layers".
    """
    return midus(base, query="token", residual=True, key_scale=3.0, **options)


def ngram(base: GPT, positions: list[int] | None = None, n_new: int | None = None, **memory) -> GPT:
    """A memory that the last few tokens look up, inside each group of blocks; see NgramBlock."""
    positions = place(base.config.n_layer, True, positions, n_new)
    sources, new = interleave(base.config.n_layer, positions)
    sizes = memory_sizes(base.config.n_embd)
    sizes.update(memory)
    return assemble(base, sources, new, kind="N", **sizes)


def llama_pro(base: GPT, positions: list[int] | None = None, n_new: int | None = None) -> GPT:
    """A copy at the end of each group of blocks, silent at first."""
    positions = place(base.config.n_layer, False, positions, n_new)
    sources, new = interleave(base.config.n_layer, positions)
    model = assemble(base, sources, new)
    for i in new:
        silence(model.h[i])
    return model


def solar(base: GPT, n_new: int | None = None) -> GPT:
    """Two overlapping copies of the stack; by default half as many blocks again, as published."""
    return assemble(base, *overlap(base.config.n_layer, n_new))


# An option of a method, and its flag: how to read it, and what it says. Here and nowhere else.
Option = namedtuple("Option", ("name", "type", "help"))


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither yes nor no")
    return text == "yes"


def orders(text: str) -> tuple[int, ...]:
    return tuple(common.whole_numbers(text))


whole = common.whole_number
N_NEW = Option("n_new", whole, "so many new blocks, spread evenly (default: half as many again)")
PLACEMENT = (
    N_NEW,
    Option("positions", common.whole_numbers, "new blocks right after these: 1,3,5"),
)
SIZES = (
    Option("n_keys", whole, "n, for n * n slots (default 32, 64 or 128, by width)"),
    Option("top_k", whole, "slots read per token and head (default 8 or 16, by width)"),
    Option("d_latent", whole, "width of an entry of the bank (default 32 or 64, by width)"),
)
MEMORY = (
    *SIZES,
    Option("query", str, "what a head asks with: head (default), token or recent, see model.py"),
    Option("residual", yes_or_no, "yes: attention is added to the stream, too (default no)"),
    Option("key_scale", common.real_number, "keys start so many times larger (default 1)"),
)

NGRAM = (
    SIZES[0],
    SIZES[2],
    Option("orders", orders, "how many last tokens the heads hash, in turn (default 2,3,4,5)"),
)

# A method: the function that builds the deeper model, the options it takes, and what trains unless
# somebody says otherwise: "new" or "all". A row that is added here can be trained, sampled and
# compared at once, if its model is made of blocks in BLOCKS.
Method = namedtuple("Method", ("build", "options", "train"))

METHODS = {
    "midus": Method(midus, PLACEMENT + MEMORY, "new"),
    "hybrid": Method(hybrid, PLACEMENT + SIZES, "new"),
    "ngram": Method(ngram, PLACEMENT + NGRAM, "new"),
    "llama-pro": Method(llama_pro, PLACEMENT, "new"),
    "solar": Method(solar, (N_NEW,), "all"),
}


def upscale(base: GPT, method: str, **options) -> GPT:
    """A deeper copy of base, on its device; base is left untouched.

    method: a row of METHODS. options: of those in its row; placement is explained at place().
    Raises ValueError, one sentence, for what cannot be.
    """
    known = [option.name for option in METHODS[method].options]
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
def identity_gap(base: GPT, deeper: GPT) -> float:
    """The largest absolute difference of the logits of two models, on random tokens, in fp32."""
    length = min(256, base.config.block_size)
    tokens = torch.randint(base.config.vocab_size, (1, length)).to(base.wte.weight.device)
    return (base(tokens) - deeper(tokens)).abs().max().item()


def summary(base: GPT, deeper: GPT) -> str:
    """The new stack as a line, and the parameters: before, added, and of which parts."""
    # What was there, what is new, and what the new parts consist of.
    config = deeper.config
    before = sum(count_parameters(base).values())
    added = count_parameters(deeper, config.new)
    parts = ", ".join(f"{part} {count:,}" for part, count in added.items())
    sizes = {"M": MEMORY, "N": NGRAM}
    for option in sizes.get(config.blocks[config.new[0]], ()):
        parts += f"; {option.name} {getattr(config, option.name)}"

    # T M T T M T, with a mark under every new block.
    marks = ["^" if i in config.new else " " for i in range(config.n_layer)]
    lines = (
        f"stack   {' '.join(config.blocks)}",
        f"new     {' '.join(marks).rstrip()}",
        f"base    {before:,} parameters",
        f"added   {sum(added.values()):,} ({parts})",
    )
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every option in METHODS, here and in train.py; one that is not given is None."""
    add = parser.add_argument_group("new blocks").add_argument
    options = {option.name: option for row in METHODS.values() for option in row.options}
    for option in options.values():
        add(f"--{option.name}", type=option.type, help=option.help)


def given_options(args: argparse.Namespace) -> dict:
    """The options that were given as flags."""
    names = {option.name for row in METHODS.values() for option in row.options}
    return {
        name: value for name, value in vars(args).items() if name in names and value is not None
    }


def main() -> None:
    parser = common.Parser("Up-scale a model without training it.")
    add = parser.add_argument
    add("base", help="a checkpoint, a .bin file of GPT-2's layout, gpt2, gpt2-medium, ...")
    add("--method", choices=METHODS, default="midus", help="(default midus)")
    add("--out", type=common.new_file(".pt"), default="deeper.pt", help="(default deeper.pt)")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--data_dir", default="data", help="of GPT-2's weights (default ./data)")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="of what starts at random (default 0)")
    add_flags(parser)
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.overwrite:
        raise ValueError(f"{args.out} exists; choose another --out, or add --overwrite")
    if os.path.exists(args.out) and os.path.realpath(args.out) == os.path.realpath(args.base):
        raise ValueError(f"--out {args.out} is the base's own file; choose another --out")

    # Up-scale. Shown, not enforced: solar does not start as the base, the others do.
    device = common.pick_device(args.device)
    base, info = open_model(args.base, args.data_dir)
    base = base.to(device)
    torch.manual_seed(args.seed)
    deeper = upscale(base, args.method, **given_options(args))
    print(f"{args.method} on {args.base}, device {device}")
    print(summary(base, deeper))
    print(f"largest difference of its logits to the base's: {identity_gap(base, deeper):g}")

    # The new model goes by its base's tokenizer and text.
    known = ("tokenizer", "dataset", "fingerprints")
    about = {name: info[name] for name in known if name in info}
    save_checkpoint(args.out, deeper, **about)
    way = f"python train.py --base {args.out} --train new"
    print(f"wrote {args.out}; train what is new in it: {way}")


if __name__ == "__main__":
    common.run_command(main)
