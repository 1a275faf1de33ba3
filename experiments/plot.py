"""
How did training go? The losses that checkpoints hold, drawn over their steps.

    python experiments/plot.py ckpt.pt copied.pt --plot losses.png     (needs matplotlib)

Thin lines are training losses, smoothed; dots are losses on validation text. Both begin at step 0.
The first functions here draw for the other programs too.
"""

import os
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
