"""
A look inside the memory of a trained model.

    python experiments/analyze.py ckpt.pt                   all five analyses, as tables
    python experiments/analyze.py ckpt.pt --plot plots      and as pictures (needs matplotlib)

    usage    slots that each head uses, and how evenly         Lample et al. 2019, section 4
    heads    rise in loss when one head is silenced            Michel et al. 2019
    fixed    the same reads, values made in other ways         named by MIDUS, defined here
    slots    which tokens read the busiest slots
    cost     parameters stored, and parameters read per token

All but the last read --tokens of a split, in windows without overlap. Tables count blocks from 1,
as --positions and --train do. Shape names: see hml.py.
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
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from data import DATASETS, SPLITS, check_vocabulary, load_dataset, load_tokenizer
from eval import count_usage, usage
from hml import pool
from model import GPT, count_parameters, open_model


def memory_blocks(model: GPT) -> list[int]:
    """The indices, from 0, of the model's memory blocks."""
    return [i for i, kind in enumerate(model.config.blocks) if kind == "M"]


def windows(model: GPT, tokens: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """tokens as batches of inputs and targets (B, T), T being block_size; a rest is dropped."""
    T = model.config.block_size
    device = model.wte.weight.device
    whole = (len(tokens) - 1) // T * T
    row = torch.from_numpy(tokens[: whole + 1].astype(np.int64)).to(device)  # (W * T + 1,)
    inputs = row[:-1].view(-1, T)  # (W, T)
    targets = row[1:].view(-1, T)  # (W, T)
    return list(zip(inputs.split(8), targets.split(8)))


@contextmanager
def hooked(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks away when the context ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- 1. Usage ------------------------------------------------------------------------------------
@torch.no_grad()
def record_reads(model: GPT, tokens: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
    """Weights and slots of every read, both (tokens, H, k), by memory block."""
    reads = {i: [] for i in memory_blocks(model)}
    hooks = []
    for i in reads:

        def keep(module, inputs, out: tuple[Tensor, Tensor], i=i) -> None:
            weights, slots = (part.flatten(0, 1).cpu() for part in out)  # (B * T, H, k)
            reads[i].append((weights.double(), slots))

        hooks.append(model.h[i].memory.product_keys.register_forward_hook(keep))
    with hooked(hooks):
        for x, _ in tqdm(windows(model, tokens), desc="reads", disable=None):
            model(x)
    together = {}
    for i, parts in reads.items():
        weights, slots = zip(*parts)
        together[i] = (torch.cat(weights), torch.cat(slots))
    return together


def slots_holding(weight: Tensor, share: float) -> int:
    """How many slots, the busiest first, hold this share of the summed weight (N,)."""
    held = weight.sort(descending=True).values.cumsum(0) / weight.sum()
    return min(int((held < share - 1e-12).sum()) + 1, len(weight))


def favourite(weights: Tensor, slots: Tensor, tokens: np.ndarray) -> float:
    """Of a slot's weight the share that its most faithful token has; a mean over slots by weight.

    weights, slots: (tokens, k), of one head. 1: each slot answers one token. Where all answer all
    alike, it is the share of the text's most frequent token.
    """
    # Every pair of slot and token that occurs, with its summed weight.
    token = torch.from_numpy(tokens[: len(slots)].astype(np.int64))[:, None]  # (tokens, 1)
    pairs = slots * 2**32 + token  # (tokens, k)
    pairs, which = pairs.unique(return_inverse=True)
    held = torch.bincount(which.flatten(), weights.flatten())  # (pairs,)

    # Of each slot the token that has most.
    _, slot = (pairs // 2**32).unique(return_inverse=True)  # (pairs,)
    most = torch.zeros(int(slot.max()) + 1, dtype=held.dtype)
    most.scatter_reduce_(0, slot, held, "amax")
    return (most.sum() / held.sum()).item()


def usage_table(model: GPT, tokens: np.ndarray) -> list[dict]:
    """A row per memory block and head: shares of slots ever best and ever read, KL to uniform, how
    many slots hold 50, 90 and 99% of the weight, the entropy of a read's k weights, and favourite.

    KL and entropy in nats; the entropy is log k if the weights are equal.
    """
    with torch.no_grad(), count_usage(model) as counts:
        reads = record_reads(model, tokens)
    rows = []
    for i, of_block in counts.items():
        weights, slots = reads[i]  # (tokens, H, k)
        entropies = torch.special.entr(weights).sum(dim=-1).mean(dim=0)  # (H,)
        for head in range(model.config.n_head):
            of_head = {name: part[head : head + 1] for name, part in of_block.items()}
            row = {"block": i + 1, "head": head, **usage(of_head)}
            for share in (0.5, 0.9, 0.99):
                row[f"{share:.0%}"] = slots_holding(of_block["weight"][head], share)
            row["entropy"] = entropies[head].item()
            row["favourite"] = favourite(weights[:, head], slots[:, head], tokens)
            rows.append(row)
    return rows


# ---- 2. Heads ------------------------------------------------------------------------------------
def gate_heads(model: GPT, block: int, gate: Callable[[], Tensor]) -> RemovableHandle:
    """Multiplies the head outputs of a block, (B, T, H, d_h), by gate(), (B or 1, H).

    Those of the memory in a memory block; of attention, before c_proj, in a transformer block.
    """

    def after_memory(module, inputs, heads: Tensor) -> Tensor:
        return heads * gate()[:, None, :, None]  # (B, T, H, d_h)

    def before_projection(module, inputs) -> Tensor:
        heads = inputs[0].unflatten(-1, (model.config.n_head, -1))  # (B, T, C) -> (B, T, H, d_h)
        return (heads * gate()[:, None, :, None]).flatten(2)  # (B, T, C)

    if model.config.blocks[block] == "M":
        return model.h[block].memory.hive.register_forward_hook(after_memory)
    return model.h[block].attn.c_proj.register_forward_pre_hook(before_projection)


def silence(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """By how much the mean loss rises when a head's output is zero: (blocks, H), in nats."""
    blocks = range(model.config.n_layer)
    heads = range(model.config.n_head)
    device = model.wte.weight.device
    sequences = sum(len(x) for x, _ in batches)

    def loss_with(block: int, gate: Tensor) -> float:
        with torch.no_grad(), hooked([gate_heads(model, block, lambda: gate)]):
            losses = [model(x, y).item() * len(x) for x, y in batches]
        return sum(losses) / sequences

    whole = loss_with(0, torch.ones(1, len(heads), device=device))
    rise = torch.zeros(len(blocks), len(heads))
    pairs = [(block, head) for block in blocks for head in heads]
    for block, head in tqdm(pairs, desc="silencing heads", disable=None):
        gate = torch.ones(1, len(heads), device=device)
        gate[0, head] = 0
        rise[block, head] = loss_with(block, gate) - whole
    return rise


def gate_gradients(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over sequences of |d loss / d gate|, with a gate of 1 on a head: (blocks, H).

    [Michel et al. 2019, section 4.1; without their normalisation by layer.] It has no sign: it
    tells how much a head is used, not whether for the better.
    """
    blocks = range(model.config.n_layer)
    n_head = model.config.n_head
    sequences = sum(len(x) for x, _ in batches)
    gates = {}
    hooks = [gate_heads(model, block, lambda block=block: gates[block]) for block in blocks]
    total = torch.zeros(len(blocks), n_head)
    with hooked(hooks):
        for x, y in tqdm(batches, desc="gradients", disable=None):
            for block in blocks:
                gates[block] = torch.ones(len(x), n_head, device=x.device, requires_grad=True)
            loss = model(x, y) * len(x)  # so that a sequence's gradient is that of its own loss
            gradients = torch.autograd.grad(loss, list(gates.values()))  # each (B, H)
            for block, gradient in zip(blocks, gradients):
                total[block] += gradient.abs().sum(dim=0).cpu()
    return total / sequences


def head_importance(model: GPT, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """silence() and gate_gradients(): two measures for every head of every block."""
    batches = windows(model, tokens)
    return silence(model, batches), gate_gradients(model, batches)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, from 0; equal values share theirs."""
    _, which, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    shared = counts.cumsum(0) - (counts + 1) / 2
    return shared[which].double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks. NaN where all values of one are equal."""
    return torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1].item()


# ---- 3. Fixed retrieval --------------------------------------------------------------------------
def realisations(proj: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """Ways to turn what heads read into values, each (H, d_v, d_h).

    proj: the trained W_h. gram (H, d_v, d_v): the sum over tokens of z_h^T z_h, by which one
    least-squares W for all heads comes nearest to all of their values.
    """
    n_head = proj.size(0)
    gram = gram.cpu().double()  # mps has no float64
    wanted = (gram @ proj.cpu().double()).sum(0)  # (d_v, d_h)
    best = torch.linalg.pinv(gram.sum(0), hermitian=True) @ wanted  # (d_v, d_h)
    return {
        "own W_h": proj,
        "mean W": proj.mean(0).expand(n_head, -1, -1),
        "W of the next head": proj.roll(-1, 0),
        "one W, least squares": best.to(proj).expand(n_head, -1, -1),
        "none (memory off)": torch.zeros_like(proj),
    }


def effective_rank(gram: Tensor) -> int:
    """How many directions hold 99% of the squared sum of vectors m; gram: m^T m, (C, C)."""
    squares = torch.linalg.eigvalsh(gram.cpu().double()).flip(0).clamp(min=0)
    if squares.sum() == 0:
        return 0
    return int((squares.cumsum(0) < 0.99 * squares.sum()).sum()) + 1


def gram_of_reads(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """For each memory block the sum over all tokens of z_h^T z_h, (H, d_v, d_v)."""
    gram = {}

    def watch(i: int) -> RemovableHandle:
        def add(module, inputs, reads: tuple[Tensor, Tensor]) -> None:
            z = pool(*reads, model.h[i].memory.hive.bank)  # (B, T, H, d_v)
            z = z.flatten(0, 1).transpose(0, 1)  # (H, B * T, d_v)
            gram[i] = gram.get(i, 0) + z.transpose(1, 2) @ z  # (H, d_v, d_v)

        return model.h[i].memory.product_keys.register_forward_hook(add)

    with hooked([watch(i) for i in memory_blocks(model)]):
        for x, _ in tqdm(batches, desc="recording", disable=None):
            model(x)
    return gram


def replaying(model: GPT, i: int, reads: dict, replay: list[bool]) -> RemovableHandle:
    """A hook by which block i keeps its reads in reads[i]; or, if replay[0], does those again."""

    def hook(module, inputs, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        if replay[0]:
            return reads[i]
        reads[i] = out

    return model.h[i].memory.product_keys.register_forward_hook(hook)


def spread_of(model: GPT, i: int, spread: dict, key: tuple) -> RemovableHandle:
    """A hook that adds m^T m of block i's values m (B * T, C) to spread[key]."""

    def add(module, inputs, m: Tensor) -> None:
        m = m.flatten(0, 1).cpu().double()  # (B, T, C) -> (B * T, C)
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

    # A batch is read once; then the same reads serve every way.
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

    sequences = sum(len(x) for x, _ in batches)
    rows = []
    for way in ways[blocks[0]]:
        of_blocks = [effective_rank(spread[way, i]) for i in blocks]
        mean = sum(of_blocks) / len(blocks)
        rows.append({"values": way, "loss": losses[way] / sequences, "rank": mean})
    return rows


# ---- 4. What a slot holds ------------------------------------------------------------------------
def busiest_slots(
    model: GPT, tokens: np.ndarray, block: int, head: int, slots: int = 4, examples: int = 4
) -> list[dict]:
    """The slots of one head with the most summed weight, each with its share of all weight, the
    tokens that gave it most (ids, and their part of its weight), and where it was read most.
    """
    weights, chosen = record_reads(model, tokens)[block]
    weights = weights[:, head]  # (tokens, k)
    chosen = chosen[:, head]  # (tokens, k)
    n_slots = model.config.n_keys**2
    total = torch.bincount(chosen.flatten(), weights.flatten(), n_slots)  # (N,)
    rows = []
    for slot in total.argsort(descending=True)[:slots].tolist():
        by_place = (weights * (chosen == slot)).sum(dim=1)  # (tokens,)
        readers = by_place.nonzero().flatten().tolist()
        by_token = Counter()
        for place in readers:
            by_token[int(tokens[place])] += by_place[place].item()
        most = by_token.most_common(examples)
        strongest = by_place.argsort(descending=True)[: min(examples, len(readers))]
        row = {
            "slot": slot,
            "share": (total[slot] / total.sum()).item(),
            "tokens": [(token, weight / total[slot].item()) for token, weight in most],
            "places": strongest.tolist(),
        }
        rows.append(row)
    return rows


def readable(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Tokens as text that a Markdown table can hold."""
    text = tokenizer.decode([int(token) for token in ids])
    return repr(text)[1:-1].replace("|", "\\|")


def held_by_slots(
    model: GPT, tokens: np.ndarray, silenced: Tensor, tokenizer: tiktoken.Encoding
) -> list[dict]:
    """busiest_slots() of the most important head of each memory block, as text."""
    held = []
    for i in memory_blocks(model):
        head = int(silenced[i].argmax())
        for slot in busiest_slots(model, tokens, i, head):
            readers = []
            for token, share in slot["tokens"]:
                readers.append(f"`{readable(tokenizer, [token])}` {share:.0%}")
            ends = []
            for place in slot["places"][:2]:
                text = readable(tokenizer, tokens[max(0, place - 6) : place + 1])
                ends.append(f"`{text}`")
            row = {"block": i + 1, "head": head, "slot": slot["slot"], "share": slot["share"]}
            row["tokens"] = ", ".join(readers)
            row["strongest reads end"] = "; ".join(ends)
            held.append(row)
    return held


# ---- 5. Cost -------------------------------------------------------------------------------------
def cost(model: GPT) -> list[dict]:
    """For each kind of block: parameters stored, and parameters read to compute one token.

    A transformer block reads all it has; a memory block k entries of the bank per head (heads may
    share some, which is not counted), and everything else.
    """
    config = model.config
    names = {"T": "transformer", "M": "memory"}
    rows = []
    for kind in sorted(set(config.blocks)):
        i = config.blocks.index(kind)
        stored = sum(count_parameters(model, (i,)).values())
        read = stored
        if kind == "M":
            bank = model.h[i].memory.hive.bank
            entries = min(config.n_head * config.top_k, len(bank))
            read = stored - bank.numel() + entries * bank.size(1)
        rows.append({"block": names[kind], "stored": stored, "read": read})
    return rows


# ---- Tables and pictures -------------------------------------------------------------------------
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
    common.print_table(list(rows[0]), lines)


def rows_of(values: Tensor, labels: list[str]) -> list[dict]:
    """values (blocks, H) as rows of a table."""
    rows = []
    for label, of_heads in zip(labels, values.tolist()):
        row = {"block": label}
        for head, value in enumerate(of_heads):
            row[str(head)] = value
        rows.append(row)
    return rows


def heat_map(values: Tensor, labels: list[str], title: str, path: str) -> None:
    """Draws values (rows, heads) to a file."""
    from matplotlib import pyplot

    rows, heads = values.shape
    figure, axis = pyplot.subplots(figsize=(max(5, 1.5 + 0.5 * heads), 1.2 + 0.35 * rows))
    image = axis.imshow(values.numpy(), aspect="auto", cmap="viridis")
    axis.set_yticks(range(rows), labels)
    axis.set_xticks(range(heads))
    axis.set_xlabel("head")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def draw(folder: str, usages: list[dict], silenced: Tensor, labels: list[str]) -> None:
    """All pictures, into folder."""
    kinds = {"memory": "M", "attention": "T"}
    for name, kind in kinds.items():
        chosen = [i for i, label in enumerate(labels) if label.endswith(kind)]
        title = f"rise in loss when a head of {name} is silenced (nats)"
        path = os.path.join(folder, f"{name}.png")
        heat_map(silenced[chosen], [labels[i] for i in chosen], title, path)

    n_head = silenced.size(1)
    memory_labels = [label for label in labels if label.endswith("M")]
    titles = {"top1": "share of slots ever best", "entropy": "entropy of a read's weights (nats)"}
    for figure, title in titles.items():
        values = torch.tensor([row[figure] for row in usages]).view(-1, n_head)  # (blocks, H)
        heat_map(values, memory_labels, title, os.path.join(folder, f"{figure}.png"))
    print(f"\nwrote memory.png, attention.png, top1.png and entropy.png to {folder}")


# ---- The command ---------------------------------------------------------------------------------
def main() -> None:
    parser = common.Parser("What the memory of a checkpoint does.")
    add = parser.add_argument
    add("checkpoint", help="checkpoint with memory blocks")
    add("--plot", help="folder for pictures; needs matplotlib")
    add("--tokens", type=common.whole_number, default=32768, help="to read (default 32768)")
    add("--split", choices=SPLITS, default="valid", help="(default valid)")
    add("--dataset", choices=DATASETS, help="(default: the checkpoint's own)")
    add("--data_dir", help="folder of the data (default: the checkpoint's own)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.plot:
        common.need_matplotlib()
        os.makedirs(args.plot, exist_ok=True)
    device = common.pick_device(args.device)

    # The model.
    model, info = open_model(args.checkpoint)
    check_vocabulary(info["tokenizer"], model.config.vocab_size)
    blocks = memory_blocks(model)
    if not blocks:
        raise ValueError(f"{args.checkpoint} has no memory blocks to look into")
    model = model.to(device).eval()
    config = model.config

    # The text.
    name = args.dataset or info.get("dataset", "pydocs")
    data_dir = args.data_dir or info.get("data_dir", "data")
    split = load_dataset(name, info["tokenizer"], data_dir, (args.split,))[args.split]
    tokens = split.tokens[: args.tokens + 1]
    T = config.block_size
    if len(tokens) <= T:
        raise ValueError(f"--tokens, and the split, must be at least a window, {T} tokens")
    read = (len(tokens) - 1) // T * T
    stack = " ".join(config.blocks)
    print(f"{args.checkpoint}: {stack}, {name} {args.split}, {read:,} tokens, on {device}")

    # Usage.
    usages = usage_table(model, tokens)
    show_table(f"Usage of {config.n_keys**2:,} slots, k={config.top_k}", usages)
    print("\nkl, entropy: nats; 50%: slots that hold half of the weight; favourite: the share of a")
    print("slot's weight that one token has, a mean over slots by weight")

    # Heads.
    silenced, gradient = head_importance(model, tokens)
    labels = [f"{i} {kind}" for i, kind in enumerate(config.blocks, 1)]
    show_table("Rise in loss when a head is silenced, nats", rows_of(silenced, labels))
    show_table("Gradient form, nats", rows_of(gradient, labels))
    others = [i for i in range(config.n_layer) if i not in blocks]
    for kind, chosen in (("memory", blocks), ("attention", others)):
        correlation = rank_correlation(silenced[chosen], gradient[chosen])
        print(f"\nrank correlation of the two over {kind} heads: {correlation:.2f}")

    # Values, slots, cost.
    show_table("Fixed retrieval: the same reads, other values", fixed_retrieval(model, tokens))
    held = held_by_slots(model, tokens, silenced, load_tokenizer(info["tokenizer"]))
    show_table("The busiest slots of each block's most important head, and who reads them", held)
    show_table("Parameters of a block, stored and read per token", cost(model))
    if args.plot:
        draw(args.plot, usages, silenced, labels)


if __name__ == "__main__":
    common.run_command(main)
