"""
How did training go? The losses that checkpoints hold, drawn over their steps.

    python experiments/plot.py ckpt.pt copied.pt --plot losses.png     (needs matplotlib)

Thin lines are training losses, smoothed; dots are losses on validation text. Both begin at step 0.
The first functions here draw for the other programs too.
"""

import math
import os
import statistics
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from model import GPTConfig, load_checkpoint

# The background is left clear, and these are as far from white as from black.
COLOURS = {"memory": "#d9731a", "copies": "#3d85c6", "control": "#808080"}
INK = "#767676"
ENDINGS = (".png", ".svg")


# ---- For every program that draws ----------------------------------------------------------------
def check_picture(path: str) -> None:
    """Raises ValueError if a picture cannot be drawn here, before anything long begins."""
    if os.path.exists(path):
        raise ValueError(f"{path} exists; name another file for the picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple:
    """A figure without background, and its axes, a list, in grey; row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(INK)
        axis.tick_params(which="both", colors=INK)
    return figure, list(axes)


def name_ends(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes the names of lines right of the axis, none over another, each tied to its line.

    ends: of each line the x and y of its end, its name, its colour. Call it when everything is
    drawn.
    """
    bottom, top = axis.get_ylim()
    place = -1.0  # of the name below, in heights of the axis
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        place = max((y - bottom) / (top - bottom), place + 0.06)
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "linewidth": 0.6},
        )


def write_picture(figure, path: str) -> None:
    ending = path.rsplit(".", 1)[1]
    with common.written_whole(path) as temporary:
        figure.savefig(temporary, format=ending, dpi=150)
    print(f"wrote {path}")


# ---- For compare.py ------------------------------------------------------------------------------
# Rows are its Rows: a group, which decides the colour, and words. Runs are its lines, by method.
LINES = ("-o", "--s", ":^", "-.D", "-v")  # dashes and marks that tell lines of a colour apart


def colour_of(group: str) -> str:
    kind = "memory" if "memory" in group else group
    return COLOURS.get(kind, COLOURS["control"])


def front(runs: list[dict]) -> list[dict]:
    """Those that no other run of the same method beats on both texts, from the least forgotten."""
    kept = []
    for run in sorted(runs, key=lambda run: run["end"]["old"]):
        if not kept or run["end"]["new"] < kept[-1]["end"]["new"]:
            kept.append(run)
    return kept


def draw_over_rates(rows: list, trials: dict[str, list[dict]], path: str) -> None:
    """What each method can have of both texts, by the rates that were tried; down left is best."""
    figure, (axis,) = new_figure(8.5, 5)
    ends = []
    drawn = Counter()  # lines of each colour so far
    for row in rows:
        if not trials[row.method]:
            continue
        runs = front(trials[row.method])
        old = [run["end"]["old"] for run in runs]
        new = [run["end"]["new"] for run in runs]
        colour = colour_of(row.group)
        axis.plot(old, new, LINES[drawn[colour] % len(LINES)], color=colour, markersize=5)
        drawn[colour] += 1
        ends.append((old[-1], new[-1], row.words, colour))
    axis.set_xlabel("perplexity on the old text (lower: less is forgotten)", color=INK)
    axis.set_ylabel("perplexity on the new text (lower: more is learned)", color=INK)
    axis.annotate(
        "better",
        xy=(0.02, 0.03),
        xycoords="axes fraction",
        xytext=(0.1, 0.13),
        textcoords="axes fraction",
        color=INK,
        arrowprops={"arrowstyle": "->", "color": INK},
    )
    name_ends(axis, ends)
    write_picture(figure, path)


def draw_sizes(rows: list, finals: dict[str, list[dict]], path: str) -> None:
    """Both texts, one below the other, against what blocks of growing size add; means of seeds."""
    costs = {"parameters added": "added", "multiplications per token added": "multiplications"}
    figure, axes = new_figure(10, 7, columns=2, rows=2)
    places = [(kind, words) for kind in ("new", "old") for words in costs]
    for axis, (kind, words) in zip(axes, places):
        ends = []
        for number, group in enumerate(dict.fromkeys(row.group for row in rows)):
            methods = [row.method for row in rows if row.group == group]
            x = [finals[method][0][costs[words]] for method in methods]
            y = [statistics.mean(run["end"][kind] for run in finals[method]) for method in methods]
            axis.plot(x, y, LINES[number % len(LINES)], color=colour_of(group), markersize=5)
            ends.append((x[-1], y[-1], group, colour_of(group)))
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        ticks = [tick for tick in (1e5, 2e5, 5e5, 1e6, 2e6, 5e6) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick / 1e6:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(f"{words}, millions", color=INK)
        axis.set_ylabel(f"perplexity on the {kind} text", color=INK)
        if axis in axes[1::2]:  # on the right
            name_ends(axis, ends)
    write_picture(figure, path)


def draw_gains(rows: list, of_pairs: list[dict[str, list[dict]]], path: str) -> None:
    """What is learned, as a share of what two copies learn: a row a method, a dot a pair of texts.

    of_pairs: the runs of each method, for the first pair of texts (full dots) and the second (open
    ones). At the right what that costs: parameters added, and nats forgotten on both pairs.
    """

    def nats(runs: list[dict], kind: str) -> float:
        return statistics.mean(math.log(run["end"][kind] / run["before"][kind]) for run in runs)

    figure, (axis,) = new_figure(9.5, 0.42 * len(rows) + 1.2)
    for height, row in enumerate(reversed(rows)):
        gains = []
        forgotten = []
        for finals in of_pairs:
            copies = nats(finals["llama-pro"], "new")
            gains.append(100 * nats(finals[row.method], "new") / copies)
            forgotten.append(f"{nats(finals[row.method], 'old'):.2f}")
        colour = colour_of(row.group)
        axis.plot(gains, [height, height], color=colour, linewidth=1)
        axis.plot(gains[0], height, "o", color=colour)
        axis.plot(gains[1], height, "o", color=colour, fillstyle="none")
        added = of_pairs[0][row.method][0]["added"]
        cost = f"{added / 1e6:.2f}M      {', '.join(forgotten)}"
        axis.annotate(
            cost, (1.03, height), xycoords=("axes fraction", "data"), color=INK, va="center"
        )
    heads = "added   forgotten"
    axis.annotate(
        heads, (1.03, len(rows)), xycoords=("axes fraction", "data"), color=INK, va="center"
    )
    axis.axvline(100, color=INK, linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.6, len(rows) + 0.4)
    axis.set_yticks(range(len(rows)), [row.words for row in reversed(rows)])
    axis.set_xlabel(
        "learned, in percent of what two copied blocks learn (full: code, open: WikiText-2)"
    )
    axis.xaxis.label.set_color(INK)
    write_picture(figure, path)


# ---- Losses --------------------------------------------------------------------------------------
def kind_and_name(config: GPTConfig) -> tuple[str, str]:
    """What sort of model it is, a key of COLOURS; and its name in words."""
    if "M" in config.blocks:
        return "memory", f"memory blocks, {config.query} query"
    if config.new:
        return "copies", "copied blocks"
    return "control", "no new blocks"


def smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    """Steps, and the mean loss around each: of a twentieth of the run."""
    span = max(1, len(losses) // 20)
    steps = list(range(0, len(losses), span))
    means = []
    for step in steps:
        around = losses[max(0, step - span // 2) : step + span // 2 + 1]
        means.append(sum(around) / len(around))
    return steps, means


def main() -> None:
    parser = common.Parser("Draws the losses that checkpoints hold.")
    parser.add_argument("checkpoints", nargs="+", help="written by train.py")
    words = "the picture, a new file (default losses.png)"
    parser.add_argument("--plot", type=common.new_file(*ENDINGS), default="losses.png", help=words)
    args = parser.parse_args()
    check_picture(args.plot)

    figure, (axis,) = new_figure(8, 4)
    ends = []
    drawn = Counter()  # of each kind: the second gets other dashes
    for path in args.checkpoints:
        model, info = load_checkpoint(path)
        progress = info.get("progress", {})
        if not progress.get("losses") or not progress.get("valid"):
            raise ValueError(f"{path} holds no losses; checkpoints of train.py do")
        kind, name = kind_and_name(model.config)
        dashes = ("-", "--", ":", "-.")[drawn[kind] % 4]
        drawn[kind] += 1

        # Two runs of one name are told apart by their files.
        if any(name == other for _, _, other, _ in ends):
            name += f" ({os.path.basename(path)})"
        axis.plot(*smooth(progress["losses"]), dashes, color=COLOURS[kind], linewidth=1, alpha=0.5)
        at, losses = zip(*progress["valid"])
        axis.plot(at, losses, f"o{dashes}", color=COLOURS[kind], markersize=4, clip_on=False)
        ends.append((at[-1], losses[-1], name, COLOURS[kind]))

    axis.set_xlim(left=0)
    axis.set_xlabel("training steps", color=INK)
    axis.set_ylabel("loss, nats per token\n(thin: training, dots: validation)", color=INK)
    name_ends(axis, ends)
    write_picture(figure, args.plot)


if __name__ == "__main__":
    common.run_command(main)
