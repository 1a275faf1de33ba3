"""
A look inside the memory of a trained model.

    python experiments/analyze.py ckpt.pt                   all five analyses, as tables
    python experiments/analyze.py ckpt.pt --plot plots      and as pictures (needs matplotlib)

    usage    slots that each head uses, and how evenly         Lample et al. 2019, section 4
    heads    rise in loss when one head is silenced            Michel et al. 2019
    fixed    the same reads, values made in other ways         named by MIDUS, defined here
    slots    which tokens read the busiest slots
    cost     parameters stored, and parameters read per token

All but the last read --tokens of a split, in windows without overlap. Shape names: see hml.py.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import (
    Parser,
    need_matplotlib,
    pick_device,
    print_table,
    run_command,
    whole_number,
)
from data import DATASETS, SPLITS, check_vocabulary, load_dataset, load_tokenizer
from eval import count_usage, usage
from hml import pool
from model import GPT, count_parameters, open_model


def memory_blocks(model: GPT) -> list[int]:
    """The indices, from 0, of the model's memory blocks.

    Tables count blocks from 1, as --positions and --train do.
    """
    return [i for i, kind in enumerate(model.config.blocks) if kind == "M"]


def windows(model: GPT, tokens: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """tokens as batches of inputs and targets (B, T), block_size long.

    What is left over at the end is dropped.
    """
    T, device = model.config.block_size, model.wte.weight.device
    rows = torch.from_numpy(tokens[: (len(tokens) - 1) // T * T + 1].astype(np.int64)).to(device)
    return list(zip(rows[:-1].view(-1, T).split(8), rows[1:].view(-1, T).split(8)))


@contextmanager
def hooked(hooks: list) -> Iterator[None]:
    """Takes the hooks away when the context ends."""
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


# ---- 1. Usage ------------------------------------------------------------------------------------
def slots_holding(weight: Tensor, share: float) -> int:
    """How many slots, the busiest first, hold this share of the summed weight (N,)."""
    held = weight.sort(descending=True).values.cumsum(0) / weight.sum()
    return min(int((held < share - 1e-12).sum()) + 1, len(weight))


def usage_table(model: GPT, tokens: np.ndarray) -> list[dict]:
    """A row per memory block and head: shares of slots ever best and ever read, KL to uniform
    (nats), how many slots hold 50, 90 and 99% of the weight, and the mean entropy (nats) of a
    read's k weights: log k if they are equal.
    """
    entropies, hooks = {}, []
    for i in memory_blocks(model):

        def add(module, inputs, reads, i=i):
            entropies.setdefault(i, []).append(
                torch.special.entr(reads[0]).sum(dim=-1).flatten(0, 1)
            )  # (B*T, H)

        hooks.append(model.h[i].memory.product_keys.register_forward_hook(add))
    with torch.no_grad(), hooked(hooks), count_usage(model) as counts:
        for x, _ in tqdm(windows(model, tokens), desc="usage", disable=None):
            model(x)
    rows = []
    for i, c in counts.items():
        entropy = torch.cat(entropies[i]).mean(dim=0)  # (H,)
        for head in range(model.config.n_head):
            figures = usage({name: part[head : head + 1] for name, part in c.items()})
            held = {
                f"{share:.0%}": slots_holding(c["weight"][head], share)
                for share in (0.5, 0.9, 0.99)
            }
            rows.append(
                {"block": i + 1, "head": head, **figures, **held, "entropy": entropy[head].item()}
            )
    return rows


# ---- 2. Heads ------------------------------------------------------------------------------------
def head_outputs(
    model: GPT, block: int, gate: Callable[[], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Multiplies the head outputs of a block, (B, T, H, d_h), by gate(), (B or 1, H): those of the
    memory in a memory block, those of attention, before c_proj, in a transformer block.
    """

    def scale(heads: Tensor) -> Tensor:
        return heads * gate()[:, None, :, None]  # (B, T, H, d_h)

    if model.config.blocks[block] == "M":
        return model.h[block].memory.hive.register_forward_hook(
            lambda module, inputs, out: scale(out)
        )
    H = model.config.n_head

    def before(module, inputs):
        return scale(inputs[0].unflatten(-1, (H, -1))).flatten(
            2
        )  # (B, T, C) -> (B, T, H, d_h) -> (B, T, C)

    return model.h[block].attn.c_proj.register_forward_pre_hook(before)


def head_importance(model: GPT, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two measures for every head of every block, both (blocks, H), in nats per token.

    silenced: by how much the mean loss rises when the head's output is zero. gradient: the mean
    over sequences of |d loss / d gate| with a gate of 1 on the head [Michel et al. 2019, section
    4.1; without their normalisation by layer]. It has no sign: it tells how much a head is used,
    not whether for the better.
    """
    L, H, batches = model.config.n_layer, model.config.n_head, windows(model, tokens)
    device = model.wte.weight.device
    gates = [None] * L

    def loss_with(block: int, gate: Tensor) -> float:
        with torch.no_grad(), hooked([head_outputs(model, block, lambda: gate)]):
            losses = [model(x, y).item() * len(x) for x, y in batches]
        return sum(losses) / sum(len(x) for x, _ in batches)

    whole = loss_with(0, torch.ones(1, H, device=device))
    silenced, gradient = torch.zeros(L, H), torch.zeros(L, H)
    for block, head in tqdm(
        [(b, h) for b in range(L) for h in range(H)], desc="silencing heads", disable=None
    ):
        gate = torch.ones(1, H, device=device)
        gate[0, head] = 0
        silenced[block, head] = loss_with(block, gate) - whole
    sequences = sum(len(x) for x, _ in batches)
    with hooked(
        [head_outputs(model, block, lambda block=block: gates[block]) for block in range(L)]
    ):
        for x, y in tqdm(batches, desc="gradients", disable=None):
            gates[:] = [torch.ones(len(x), H, device=device, requires_grad=True) for _ in range(L)]
            loss = model(x, y) * len(
                x
            )  # so that a sequence's gradient is that of its own mean loss
            for block, grad in enumerate(torch.autograd.grad(loss, gates)):  # each (B, H)
                gradient[block] += grad.abs().sum(dim=0).cpu() / sequences
    return silenced, gradient


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs.

    Nan where all values of one are equal.
    """
    ranks = []
    for x in (a, b):
        _, which, counts = x.flatten().unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts + 1) / 2)[which].double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


# ---- 3. Fixed retrieval --------------------------------------------------------------------------
def realisations(proj: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """Ways to turn what heads read into values, each (H, d_v, d_h). proj: the trained W_h. gram (H,
    d_v, d_v): the sum of z_h^T z_h over tokens, by which one least-squares W for all heads comes
    nearest to all of their values.
    """
    H = proj.size(0)
    gram = gram.cpu().double()  # MPS has no float64
    best = torch.linalg.pinv(gram.sum(0), hermitian=True) @ (gram @ proj.cpu().double()).sum(
        0
    )  # (d_v, d_h)
    best = best.to(proj)
    return {
        "own W_h": proj,
        "mean W": proj.mean(0).expand(H, -1, -1),
        "W of the next head": proj.roll(-1, 0),
        "one W, least squares": best.expand(H, -1, -1),
        "none (memory off)": torch.zeros_like(proj),
    }


def effective_rank(gram: Tensor) -> int:
    """How many directions hold 99% of the squared sum of the vectors whose m^T m this is.

    Gram (C, C).
    """
    s = torch.linalg.eigvalsh(gram.cpu().double()).flip(0).clamp(min=0)
    return int((s.cumsum(0) < 0.99 * s.sum()).sum()) + 1 if s.sum() > 0 else 0


def gram_of_reads(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """For each memory block the sum over all tokens of z_h^T z_h, (H, d_v, d_v)."""
    gram = {}

    def watch(i: int) -> torch.utils.hooks.RemovableHandle:
        def add(module, inputs, reads):
            z = pool(*reads, model.h[i].memory.hive.bank)  # (B, T, H, d_v)
            z = z.flatten(0, 1).transpose(0, 1)  # (H, B*T, d_v)
            gram[i] = gram.get(i, 0) + z.transpose(1, 2) @ z  # (H, d_v, d_v)

        return model.h[i].memory.product_keys.register_forward_hook(add)

    with hooked([watch(i) for i in memory_blocks(model)]):
        for x, _ in tqdm(batches, desc="recording", disable=None):
            model(x)
    return gram


def replaying(model: GPT, i: int, reads: dict, replay: list) -> torch.utils.hooks.RemovableHandle:
    """A hook by which block i keeps its reads in reads[i]; or, if replay[0], does those again."""

    def hook(module, inputs, out):
        if replay[0]:
            return reads[i]
        reads[i] = out

    return model.h[i].memory.product_keys.register_forward_hook(hook)


def spread_of(model: GPT, i: int, spread: dict, key: tuple) -> torch.utils.hooks.RemovableHandle:
    """A hook that adds m^T m of block i's values m (B*T, C) to spread[key]."""

    def add(module, inputs, m):
        m = m.flatten(0, 1).cpu().double()  # (B, T, C) -> (B*T, C)
        spread[key] = spread.get(key, 0) + m.T @ m

    return model.h[i].memory.register_forward_hook(add)


@torch.no_grad()
def fixed_retrieval(model: GPT, tokens: np.ndarray) -> list[dict]:
    """Slots and weights stay as the trained model chooses them; only the values change.

    A row for each of realisations(): mean loss (nats), and the effective rank of the values
    m (tokens, C), a mean over blocks.
    """
    blocks = memory_blocks(model)
    batches = windows(model, tokens)
    trained = {i: model.h[i].memory.hive.proj.detach().clone() for i in blocks}
    gram = gram_of_reads(model, batches)
    ways = {i: realisations(trained[i], gram[i]) for i in blocks}

    reads = {}
    replay = [False]
    spread = {}
    losses = Counter()
    with hooked([replaying(model, i, reads, replay) for i in blocks]):
        for x, y in tqdm(batches, desc="fixed retrieval", disable=None):
            replay[0] = False
            model(x)
            replay[0] = True
            for way in ways[blocks[0]]:
                for i in blocks:
                    model.h[i].memory.hive.proj.copy_(ways[i][way])
                with hooked([spread_of(model, i, spread, (way, i)) for i in blocks]):
                    losses[way] += model(x, y).item() * len(x)
            for i in blocks:
                model.h[i].memory.hive.proj.copy_(trained[i])

    total = sum(len(x) for x, _ in batches)
    rows = []
    for way in ways[blocks[0]]:
        ranks = [effective_rank(spread[way, i]) for i in blocks]
        rows.append({"values": way, "loss": losses[way] / total, "rank": sum(ranks) / len(blocks)})
    return rows


# ---- 4. What a slot holds ------------------------------------------------------------------------
@torch.no_grad()
def busiest_slots(
    model: GPT, tokens: np.ndarray, block: int, head: int, slots: int = 4, examples: int = 4
) -> list[dict]:
    """The slots of one head with the most summed weight, each with its share of all weight, the
    tokens that gave it most weight (ids, and their part of the slot's weight), and the places (in
    tokens) of its strongest reads.
    """
    reads = []

    def hook(module, inputs, out):
        reads.append(tuple(part[:, :, head].flatten(0, 1).cpu() for part in out))  # each (B*T, k)

    with hooked([model.h[block].memory.product_keys.register_forward_hook(hook)]):
        for x, _ in windows(model, tokens):
            model(x)
    weights, chosen = (torch.cat(part).double() for part in zip(*reads))  # (tokens, k)
    chosen = chosen.long()  # double held them exactly
    total = torch.bincount(
        chosen.flatten(), weights.flatten(), minlength=model.config.n_keys**2
    )  # (N,)
    rows = []
    for slot in total.argsort(descending=True)[:slots].tolist():
        by_place = (weights * (chosen == slot)).sum(dim=1)  # (tokens,)
        by_token = Counter()
        for place in by_place.nonzero().flatten().tolist():
            by_token[int(tokens[place])] += by_place[place].item()
        common = [
            (token, weight / total[slot].item()) for token, weight in by_token.most_common(examples)
        ]
        rows.append(
            {
                "slot": slot,
                "share": (total[slot] / total.sum()).item(),
                "tokens": common,
                "places": by_place.argsort(descending=True)[
                    : min(examples, int((by_place > 0).sum()))
                ].tolist(),
            }
        )
    return rows


# ---- 5. Cost -------------------------------------------------------------------------------------
def cost(model: GPT) -> list[dict]:
    """For each kind of block: parameters stored, and parameters read to compute one token. A
    transformer block reads all it has; a memory block reads k entries of the bank per head (heads
    may share some, which is not counted), and everything else.
    """
    rows, config = [], model.config
    for kind in sorted(set(config.blocks)):
        i = config.blocks.index(kind)
        stored = sum(count_parameters(model, (i,)).values())
        read = stored
        if kind == "M":
            bank = model.h[i].memory.hive.bank
            read += min(config.n_head * config.top_k, len(bank)) * bank.size(1) - bank.numel()
        rows.append(
            {"block": {"T": "transformer", "M": "memory"}[kind], "stored": stored, "read": read}
        )
    return rows


# ---- The command ---------------------------------------------------------------------------------
def show_table(title: str, rows: list[dict]) -> None:
    """Prints rows, whose keys are the columns; numbers to four digits."""
    lines = []
    for row in rows:
        line = []
        for value in row.values():
            if isinstance(value, float):
                value = f"{value:.4g}"
            elif isinstance(value, int):
                value = f"{value:,}"
            line.append(value)
        lines.append(line)
    print(f"\n### {title}\n")
    print_table(list(rows[0]), lines)


def heat_map(values: Tensor, labels: list[str], title: str, path: str) -> None:
    """Draws values (rows, heads) to a file."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(1.5 + 0.5 * values.size(1), 1 + 0.35 * values.size(0)))
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xticks(range(values.size(1)))
    axis.set_xlabel("head")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def readable(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Tokens as text that a Markdown table can hold."""
    return repr(tokenizer.decode(list(map(int, ids))))[1:-1].replace("|", "\\|")


def draw(
    folder: str, rows: list[dict], silenced: Tensor, labels: list[str], blocks: list[int]
) -> None:
    """All pictures, into folder."""
    for kind, chosen in (
        ("memory", blocks),
        ("attention", [i for i in range(len(labels)) if i not in blocks]),
    ):
        title = f"rise in loss when a head of {kind} is silenced (nats)"
        heat_map(
            silenced[chosen],
            [labels[i] for i in chosen],
            title,
            os.path.join(folder, f"{kind}.png"),
        )
    for figure, title in (
        ("top1", "share of slots ever best"),
        ("entropy", "entropy of a read's weights (nats)"),
    ):
        values = torch.tensor([[r[figure] for r in rows if r["block"] == i + 1] for i in blocks])
        heat_map(
            values,
            [f"{i + 1} M" for i in blocks],
            title,
            os.path.join(folder, f"{figure}.png"),
        )
    print(f"\nwrote memory.png, attention.png, top1.png and entropy.png to {folder}")


def held_by_slots(
    model: GPT,
    tokens: np.ndarray,
    blocks: list[int],
    silenced: Tensor,
    tokenizer: tiktoken.Encoding,
) -> list[dict]:
    """busiest_slots() of the most important head of each memory block, as text."""
    held = []
    for i in blocks:
        head = int(silenced[i].argmax())
        for row in busiest_slots(model, tokens, i, head):
            readers = ", ".join(
                f"`{readable(tokenizer, [t])}` {share:.0%}" for t, share in row["tokens"]
            )
            places = (readable(tokenizer, tokens[max(0, p - 6) : p + 1]) for p in row["places"][:2])
            held.append(
                {
                    "block": i + 1,
                    "head": head,
                    "slot": row["slot"],
                    "share": row["share"],
                    "tokens": readers,
                    "strongest reads end": "; ".join(f"`{place}`" for place in places),
                }
            )
    return held


def main() -> None:
    parser = Parser("What the memory of a checkpoint does.")
    parser.add_argument("checkpoint", help="checkpoint with memory blocks")
    parser.add_argument("--plot", help="folder for pictures; needs matplotlib")
    parser.add_argument(
        "--tokens",
        type=whole_number,
        default=32768,
        help="how much of the split is read (default 32768)",
    )
    parser.add_argument("--split", choices=SPLITS, default="valid", help="(default valid)")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: the checkpoint's own)")
    parser.add_argument("--data_dir", help="folder of the data (default: the checkpoint's own)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.plot:
        need_matplotlib()
        os.makedirs(args.plot, exist_ok=True)
    device = pick_device(args.device)
    model, info = open_model(args.checkpoint)
    check_vocabulary(info["tokenizer"], model.config.vocab_size)
    blocks = memory_blocks(model)
    if not blocks:
        raise ValueError(f"{args.checkpoint} has no memory blocks to look into")
    model = model.to(device).eval()
    name, data_dir = (
        args.dataset or info.get("dataset", "pydocs"),
        args.data_dir or info.get("data_dir", "data"),
    )
    tokens = load_dataset(name, info["tokenizer"], data_dir, (args.split,))[args.split].tokens[
        : args.tokens + 1
    ]
    if len(tokens) <= model.config.block_size:
        raise ValueError(
            f"--tokens, and the split, must be at least a window, {model.config.block_size} tokens"
        )
    stack = " ".join(model.config.blocks)
    read = (len(tokens) - 1) // model.config.block_size * model.config.block_size
    print(f"{args.checkpoint}: {stack}, {name} {args.split}, {read:,} tokens, on {device}")

    rows = usage_table(model, tokens)
    show_table(f"Usage of {model.config.n_keys**2:,} slots, k={model.config.top_k}", rows)
    silenced, gradient = head_importance(model, tokens)
    labels = [f"{i} {kind}" for i, kind in enumerate(model.config.blocks, 1)]
    for title, values in (
        ("Rise in loss when a head is silenced, nats", silenced),
        ("Gradient form, nats", gradient),
    ):
        show_table(
            title,
            [
                {"block": label, **{str(h): v.item() for h, v in enumerate(row)}}
                for label, row in zip(labels, values)
            ],
        )
    for kind, chosen in (
        ("memory", blocks),
        ("attention", [i for i in range(len(labels)) if i not in blocks]),
    ):
        correlation = rank_correlation(silenced[chosen], gradient[chosen])
        print(f"\nrank correlation of the two over {kind} heads: {correlation:.2f}")
    show_table("Fixed retrieval: the same reads, other values", fixed_retrieval(model, tokens))
    held = held_by_slots(model, tokens, blocks, silenced, load_tokenizer(info["tokenizer"]))
    show_table("The busiest slots of each block's most important head, and who reads them", held)
    show_table("Parameters of a block, stored and read per token", cost(model))
    if args.plot:
        draw(args.plot, rows, silenced, labels, blocks)


if __name__ == "__main__":
    run_command(main)
