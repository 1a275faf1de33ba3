"""
Look inside a memory: one page that shows which slots are read under which letters, and what for.

    python experiments/look.py token.pt                  writes memory.html; open it in a browser
    python experiments/look.py ckpt.pt token.pt          two models in one page, at the same letter
    python experiments/look.py token.pt --text "def f(self):"
    python experiments/look.py token.pt --svg look.svg   a still of it, as in the README
    python experiments/look.py token.pt --tables         two tables, as in questions.md

It looks into every block that has memory.hive. What is read at a letter serves to guess the next
one. In order: a text with and without the memory, busy slots, the page, the still, tables, the
command. Blocks count from 1, heads too. The page's program is look.js. Shape names: see hml.py.
"""

import argparse
import base64
import codecs
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
from data import load_dataset, load_tokenizer
from eval import watch_reads
from hml import pool
from model import GPT, open_model


# ---- A text, with and without the memory ---------------------------------------------------------
@contextmanager
def hooked(hooks: list) -> Iterator[None]:
    """Takes the hooks away when the context ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def lay_out(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows as eval.sum_nll has them: without overlap, but the last one ends with the text.

    Returns places, (windows, size), and for each place of the text where it comes first in them.
    """
    size = min(size, length)
    starts = np.array([*range(0, length - size, size), length - size])
    places = starts[:, None] + np.arange(size)
    _, fresh = np.unique(places, return_index=True)
    return places, fresh


@torch.no_grad()
def look_up(model: GPT, tokens: np.ndarray) -> dict:
    """What a model makes of T tokens, and what its memories read there; all on the CPU.

    with, without (the new blocks): each has loss (T - 1,), of all tokens but the first, in nats;
    best and p (T, 5), the likeliest after each and how likely. reads: of each memory weights and
    slots (T, H, k), and of product keys rows and cols, their scores (T, H, n). seen (T,): how many
    tokens lie before the model, at each.
    """
    places, fresh = lay_out(len(tokens), model.config.block_size)
    batch = torch.from_numpy(tokens[places].astype(np.int64)).to(model.wte.weight.device)
    reads = {}
    hooks = []

    def keep(block: int, name: str, found: Tensor) -> None:  # found: (windows, size, ...)
        reads.setdefault(block, {})[name] = found.flatten(0, 1)[fresh].cpu()

    def see(block: int, weights: Tensor, slots: Tensor) -> None:
        keep(block, "weights", weights)
        keep(block, "slots", slots)

    # Only product keys score rows and columns: the halves of a query by the halves of keys.
    for i in memory_blocks(model):
        if hasattr(model.h[i].memory, "product_keys"):

            def see_query(module, inputs: tuple[Tensor], i: int = i) -> None:
                halves = inputs[0].float().chunk(2, dim=-1)  # each (windows, size, H, d_h/2)
                for name, half, keys in zip(("rows", "cols"), halves, module.keys.float()):
                    keep(i, name, torch.einsum("bthd,hnd->bthn", half, keys))

            hooks.append(model.h[i].memory.product_keys.register_forward_pre_hook(see_query))
    with watch_reads(model, see), hooked(hooks):
        logits = {"with": model(batch)}

    # A new block that passes the stream on is as good as none.
    hooks = []
    for i in model.config.new:
        hooks.append(model.h[i].register_forward_hook(lambda block, inputs, out: inputs[0]))
    with hooked(hooks):
        logits["without"] = model(batch)

    targets = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]  # (T - 1, 1)
    looked = {"reads": reads, "seen": (places - places[:, :1]).flatten()[fresh] + 1}
    for way, found in logits.items():
        log_p = found.flatten(0, 1)[fresh].float().log_softmax(-1).cpu()  # (T, vocab)
        p, best = log_p.exp().topk(5)
        looked[way] = {"loss": -log_p[:-1].gather(1, targets)[:, 0], "best": best, "p": p}
    return looked


# ---- Busy slots ----------------------------------------------------------------------------------
SPAN = 64  # tokens in a window of the longer stretch; with more, wide models would take long


@torch.no_grad()
def losses(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """The loss of every target, in nats: x, y (windows, size) -> (windows, size), on the CPU."""
    parts = []
    for inputs, targets in zip(x.split(8), y.split(8)):
        logits = model(inputs).float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
        parts.append(loss.view_as(targets).cpu())
    return torch.cat(parts)


def spread(places: Tensor, count: int) -> Tensor:
    """At most so many of the places, evenly spread."""
    return places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]


@torch.no_grad()
def busy_slots(model: GPT, x: Tensor, y: Tensor, tokenizer: tiktoken.Encoding) -> dict[int, list]:
    """Of each memory the 20 slots that its heads choose first most often: where they are read, and
    what breaks without their entry. x, y (windows, size): the longer stretch and its targets.
    """
    first = {i: [] for i in memory_blocks(model)}

    def see(block: int, weights: Tensor, slots: Tensor) -> None:
        first[block].append(slots[..., 0].cpu())  # (8, size, H)

    with watch_reads(model, see):
        loss = losses(model, x, y)
    text = [*x.flatten().tolist(), int(y[-1, -1])]
    numbers = torch.arange(x.numel()).view(x.shape)

    def around(place: int) -> list[str]:
        """The text before a place, what stands there, and the text after it."""
        parts = (text[max(0, place - 20) : place], [text[place]], text[place + 1 : place + 8])
        before, here, after = (tokenizer.decode(part) for part in parts)
        return [before[-24:], here, after[:8]]

    busy = {}
    for i, choices in first.items():
        choices = torch.cat(choices)  # (windows, size, H)
        bank = model.h[i].memory.hive.bank
        counts = choices.flatten().bincount()
        busiest = counts.argsort(descending=True)[:20]
        busy[i] = []
        for slot in tqdm(busiest[counts[busiest] > 0].tolist(), "zeroing slots", disable=None):
            here = (choices == slot).any(-1)  # (windows, size)
            places = numbers[here].tolist()
            letters = Counter(text[place] for place in places)
            ends = Counter(tokenizer.decode(text[max(0, p - 4) : p + 1])[-5:] for p in places)

            # The entry is zeroed for all heads; an 8th of the windows has to do.
            tried = spread(here.any(1).nonzero().flatten(), max(1, len(x) // 8))
            entry = bank[slot].clone()
            bank[slot] = 0
            after = losses(model, x[tried], y[tried])[here[tried]]  # (places tried,)
            bank[slot] = entry
            before = loss[tried][here[tried]]
            worst = int((before.neg().exp() - after.neg().exp()).argmax())
            place = int(numbers[tried][here[tried]][worst])
            row = {
                "slot": slot,
                "places": len(places),
                "letters": [[tokenizer.decode([token]), n] for token, n in letters.most_common(4)],
                "ends": ends.most_common(3),
                "examples": [around(p) for p in spread(numbers[here], 12).tolist()],
                "tried": len(before),
                "loss": [round(x.mean().item(), 3) for x in (before, after)],
                "worst": around(place),
                "next": tokenizer.decode([text[place + 1]]),
                "p": [round(math.exp(-x[worst]), 3) for x in (before, after)],
            }
            busy[i].append(row)
    return busy


# ---- The page ------------------------------------------------------------------------------------
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What a memory looks up</title><body>
<script type="application/json" id="data">{data}</script>
<script>{program}</script>
"""


def pack(numbers: Tensor | np.ndarray, kind: str) -> str:
    """Whole numbers as text: bytes ("u1") or pairs of bytes ("<u2"), in base64."""
    return base64.b64encode(np.asarray(numbers).astype(kind).tobytes()).decode()


def pack_shades(scores: Tensor, k: int) -> str:
    """Scores (T, H, n) in two bits each: 0 if not among the k best, else 1, 2 or 3, the best."""
    best = scores.topk(k).values
    top, last = best[..., :1], best[..., -1:]
    third = ((scores - last) / (top - last).clamp(min=1e-9) * 3).floor().clamp(0, 2)
    shades = torch.where(scores < last, 0, third + 1).flatten()
    fours = F.pad(shades, (0, -len(shades) % 4)).view(-1, 4)  # to a byte, the first one lowest
    return pack((fours * torch.tensor([1, 4, 16, 64])).sum(1), "u1")


def pack_model(name: str, model: GPT, looked: dict, busy: dict[int, list], tokenizer) -> dict:
    """A model's part of the page. Losses are in thousandths of a nat, weights and p of 255."""
    packed = {"name": name, "seen": pack(looked["seen"], "<u2"), "blocks": []}
    for way in ("with", "without"):
        found = looked[way]
        packed[way] = {
            "loss": pack((found["loss"] * 1000).round().clamp(max=65535), "<u2"),
            "best": [[tokenizer.decode([i]) for i in five] for five in found["best"].tolist()],
            "p": pack((found["p"] * 255).round(), "u1"),
        }
    for i, reads in looked["reads"].items():
        # What rounding leaves goes to the best.
        weights = (reads["weights"] * 255).round()  # (T, H, k)
        weights[..., 0] += 255 - weights.sum(-1)
        memory = model.h[i].memory
        block = {
            "number": i + 1,
            "heads": weights.size(1),
            "n": math.isqrt(len(memory.hive.bank)),
            "k": weights.size(2),
            "orders": getattr(memory, "orders", None),  # hashed slots: how many tokens name one
            "slots": pack(reads["slots"], "<u2"),
            "weights": pack(weights, "u1"),
            "busy": busy[i],
        }
        for half in ("rows", "cols"):
            if half in reads:
                block[half] = pack_shades(reads[half], block["k"])
        packed["blocks"].append(block)
    return packed


def length_that_fits(models: list[GPT]) -> int:
    """How many tokens a page shows: 2,000, or so many as make a megabyte, but at least 256."""
    size = 0  # characters for one token
    for model in models:
        config = model.config
        each = 4 * config.top_k + 0.7 * config.n_keys  # of a head: its reads, its scores
        size += 50 + len(memory_blocks(model)) * config.n_head * each
    return max(256, min(2000, int(900_000 / size)))


def write_page(page: dict, path: str) -> None:
    # What is in a text cannot end the script that holds it.
    data = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
    with open(os.path.join(ROOT, "experiments", "look.js"), encoding="utf-8") as file:
        program = file.read()
    with common.written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(PAGE.format(data=data, program=program))
    print(f"wrote {path}, {os.path.getsize(path) / 1e6:.2f} MB: open it in a browser")


# ---- The still -----------------------------------------------------------------------------------
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .code { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .quiet { fill: #59616b; } .help { fill: #46b270; } .harm { fill: #ec746c; }
  .lit { fill: #b35900; } .ring, .same, .board { fill: none; stroke-width: 2; }
  .ring { stroke: #0550ae; } .same { stroke: #b35900; } .board { stroke: #d9d6d0; }
  .dark { fill: #f1efeb; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .quiet { fill: #a0aab4; } .help { fill: #207440; }
    .harm { fill: #9e3434; } .lit { fill: #f0a33c; }
    .ring { stroke: #79b8ff; } .same { stroke: #f0a33c; } .board { stroke: #424a53; }
    .dark { fill: #222a33; }
  }
</style>"""


def visible(text: str) -> str:
    """Spaces and ends of lines, made visible."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5")


def draw_still(name: str, looked: dict, text: list[str], n: int, busy: list, path: str) -> None:
    """Ten lines of the text, what a head of the first memory, n by n slots, reads in them, and
    three of its busy slots.
    """
    # Where the letters stand, {place: (column, line)}, from the first def or class on.
    ends = np.cumsum([len(piece) for piece in text])
    match = re.search(r"^(def|class) ", "".join(text), re.MULTILINE)
    begin = match.start() if match else 0
    spots = {}
    column, line = 0, 0
    for place in np.flatnonzero(ends > begin).tolist():
        if column + len(text[place]) <= 58 and line < 10:
            spots[place] = (column, line)
        column += len(text[place])
        if text[place].endswith("\n"):
            column, line = 0, line + 1

    # The memory is shown at the place after which it helps most.
    gain = [0, *(looked["without"]["loss"] - looked["with"]["loss"]).tolist()]
    at = max(spots, key=lambda place: gain[place + 1] if place + 1 in spots else -math.inf)
    block, reads = min(looked["reads"].items())
    slots, weights = (reads[kind][:, 0].tolist() for kind in ("slots", "weights"))  # (T, k)
    drawn = []

    def rect(kind: str, x: float, y: float, width: float, height: float, strength=1.0) -> None:
        size = f'width="{width:.1f}" height="{height:.1f}" opacity="{strength:.2f}"'
        drawn.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>')

    def write(x: float, y: float, words: str, kind: str = "") -> None:
        drawn.append(f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(words)}</text>')

    # The lines, letter by letter, so that no font can shift them.
    write(14, 20, f"{name}: green letters were made likelier by the memory, red ones less likely")
    for place, (column, line) in spots.items():
        x, y, width = 14 + 7.2 * column, 32 + 20 * line, 7.2 * len(text[place])
        strength = min(1, abs(gain[place]) / 2)
        rect("help" if gain[place] > 0 else "harm", x, y, width, 18, strength)
        for i, letter in enumerate(text[place]):
            if not letter.isspace():
                write(x + 7.2 * i, y + 13, letter, "code")
        if slots[place][0] == slots[at][0]:
            rect("ring" if place == at else "same", x, y, width, 18)
    before = visible("".join(text[max(0, at - 12) : at + 1])[-13:])
    p, less = (math.exp(-looked[way]["loss"][at]) for way in ("with", "without"))
    sure = f"{p:.0%} sure, and without the memory {less:.0%}"
    write(14, 256, f"After {before} comes {visible(text[at + 1])}: the model is {sure}.")

    # The grid, and the slots that won.
    cell = 198 / n
    squares = f"M0 0h{cell}v{cell}h{-cell}zM{cell} {cell}h{cell}v{cell}h{-cell}z"
    size = f'x="470" y="32" width="{2 * cell}" height="{2 * cell}" patternUnits="userSpaceOnUse"'
    drawn.append(f'<pattern id="squares" {size}><path class="dark" d="{squares}"/></pattern>')
    drawn.append('<rect fill="url(#squares)" x="470" y="32" width="198" height="198"/>')
    rect("board", 470, 32, 198, 198)
    for slot, weight in zip(slots[at], weights[at]):
        x, y = 470 + slot % n * cell, 32 + slot // n * cell
        rect("lit", x, y, cell, cell, 0.25 + 0.75 * weight / weights[at][0])
    write(480, 284, f"Lit: what head 1 of block {block + 1}", "quiet")
    write(480, 306, f"read there, of {n} \u00d7 {n} slots.", "quiet")
    write(480, 328, "Framed: the same first choice.", "quiet")

    # Three busy slots, with different favourites if there are such.
    favourites = {}
    for row in busy:
        favourites.setdefault(row["letters"][0][0], row)
    for i, row in enumerate([*favourites.values(), *busy][:3]):
        letter, times = row["letters"][0]
        endings = "  ".join(visible(end) for end, _ in row["ends"])
        before, after = row["loss"]
        y = 284 + 22 * i
        write(14, y, f"slot {row['slot']}: {visible(letter)} {times / row['places']:.0%}")
        write(126, y, f"after {endings}", "code")
        write(306, y, f"loss {before:.2f}; zeroed, {after:.2f}", "quiet")

    size = 'viewBox="0 0 700 344" width="700" height="344"'
    label = 'role="img" aria-label="What a memory looks up in ten lines of text"'
    with common.written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>\n{STYLE}\n')
        file.write("\n".join([*drawn, "</svg>\n"]))
    print(f"wrote {path}")


# ---- Tables --------------------------------------------------------------------------------------
@torch.no_grad()
def print_heads(model: GPT, x: Tensor, y: Tensor) -> None:
    """By how much the loss rises, in nats, when one head of a memory writes nothing."""
    whole = losses(model, x, y).mean()
    H = model.config.n_head
    print("\n| silenced | " + " | ".join(f"head {head + 1}" for head in range(H)) + " |")
    print("| --- " * (H + 1) + "|")
    for i in memory_blocks(model):
        rises = []
        for head in tqdm(range(H), "silencing heads", disable=None):
            gate = torch.ones(H, 1, device=x.device)
            gate[head] = 0

            def silence(hive, inputs, values: Tensor, gate: Tensor = gate) -> Tensor:
                return values * gate  # (8, size, H, d_h)

            with hooked([model.h[i].memory.hive.register_forward_hook(silence)]):
                rises.append(f"{losses(model, x, y).mean() - whole:.3f}")
        print(f"| block {i + 1} | " + " | ".join(rises) + " |")


def ways_to_project(hive: torch.nn.Module, reads: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Matrices to put in the place of a memory's W, each (H, d_v, d_h)."""
    # By the sums of z^T z over all reads, one W comes nearest to all heads' values.
    proj = hive.proj.clone()
    gram = 0
    for weights, slots in reads:
        z = pool(weights, slots, hive.bank).flatten(0, 1).transpose(0, 1)  # (H, tokens, d_v)
        gram = gram + (z.transpose(1, 2) @ z).cpu().double()  # (H, d_v, d_v)
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
def print_fixed_retrieval(model: GPT, x: Tensor, y: Tensor) -> None:
    """The loss where slots and weights stay as the trained model chose them, and W changes."""
    reads = {i: [] for i in memory_blocks(model)}
    with watch_reads(model, lambda block, *read: reads[block].append(read)):
        losses(model, x, y)
    hives = {i: model.h[i].memory.hive for i in reads}
    ways = {i: ways_to_project(hive, reads[i]) for i, hive in hives.items()}

    print("\n| values | loss, nats |\n| --- | --- |")
    for way in ways[min(ways)]:
        hooks = []
        for i, hive in hives.items():
            hive.proj.copy_(ways[i][way])

            # The same reads again, whatever the queries have become.
            def replay(hive, inputs, again: Iterator = iter(reads[i])) -> tuple[Tensor, Tensor]:
                return next(again)

            hooks.append(hive.register_forward_pre_hook(replay))
        with hooked(hooks):
            print(f"| {way} | {losses(model, x, y).mean():.3f} |")


# ---- The command ---------------------------------------------------------------------------------
def memory_blocks(model: GPT) -> list[int]:
    """The indices of the blocks that one can look into."""
    return [i for i, block in enumerate(model.h) if hasattr(block, "memory")]


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser("Look inside the memory of a checkpoint: a page for a browser.")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="with memory blocks")
    add("--text", help="what is shown (default: the beginning of the validation split)")
    add("--file", help="a file with the text that is shown")
    add("--dataset", help="of the validation split (default: what the first one was trained on)")
    add("--data_dir", default="data", help="of downloads and caches (default ./data)")
    words = "of the split, for busy slots and tables (default 32768; of wide models 768)"
    add("--tokens", type=common.whole_number, help=words)
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--out", type=common.new_file(".html"), default="memory.html", help="(default memory.html)")
    add("--svg", type=common.new_file(".svg"), help="draw a still of the first model instead")
    add("--tables", action="store_true", help="print what heads and their W are worth instead")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = common.pick_device(args.device)
    models = {}
    names = set()
    for path in args.checkpoints:
        model, info = open_model(path)
        if not memory_blocks(model):
            raise ValueError(f"{path} has no memory to look into")
        if model.config.n_keys > 256:
            raise ValueError(f"{path} has more than 65,536 slots, which the page has no room for")
        models[path] = model.to(device).eval()
        names.add(info["tokenizer"])
        dataset = args.dataset or info.get("dataset", "pycode")
    if len(names) > 1:
        raise ValueError(f"these models have different tokenizers: {', '.join(sorted(names))}")
    tokenizer = load_tokenizer(info["tokenizer"])
    widest = max(model.config.n_embd for model in models.values())
    if device.type == "cpu":
        torch.set_num_threads(common.threads_for(widest))

    # The longer stretch, in windows.
    split = load_dataset(dataset, info["tokenizer"], args.data_dir)["valid"].tokens
    size = min(SPAN, *(model.config.block_size for model in models.values()))
    wanted = args.tokens or (32768 if widest <= 128 else 768)
    count = min(wanted, len(split) - 1) // size
    if not count:
        raise ValueError(f"--tokens, and the split, must have at least {size + 1} tokens")
    row = torch.from_numpy(split[: count * size + 1].astype(np.int64)).to(device)
    x, y = row[:-1].view(-1, size), row[1:].view(-1, size)
    if args.tables:
        for name, model in models.items():
            print(f"{name}, {x.numel():,} tokens of {dataset}; rises of the loss in nats")
            print_heads(model, x, y)
            print_fixed_retrieval(model, x, y)
        return

    # What is shown.
    tokens = split
    if args.file:
        with open(args.file, encoding="utf-8") as file:
            args.text = file.read()
    if args.text:
        tokens = np.array(tokenizer.encode_ordinary(args.text))
    if len(tokens) < 2:
        raise ValueError("the text must have at least two tokens")
    tokens = tokens[: length_that_fits(list(models.values()))]

    # A character of several tokens stands at the last of them.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [tokenizer.decode_single_token_bytes(token) for token in tokens.tolist()]
    text = [decoder.decode(piece) for piece in pieces]
    packed = []
    for path, model in models.items():
        name = os.path.basename(path)
        looked = look_up(model, tokens)
        busy = busy_slots(model, x, y, tokenizer)
        if args.svg:
            block = min(busy)
            n = math.isqrt(len(model.h[block].memory.hive.bank))
            draw_still(name, looked, text, n, busy[block], args.svg)
            return
        packed.append(pack_model(name, model, looked, busy, tokenizer))
    unit = "letter" if tokenizer.name == "bytes" else "token"
    page = {"unit": unit, "text": text, "stretch": x.numel(), "models": packed}
    write_page(page, args.out)


if __name__ == "__main__":
    common.run_command(main)
