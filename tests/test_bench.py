"""The benchmark's tables are made in their short form, and its counts and other ways are right."""

import importlib.util
import sys
from argparse import Namespace

import pytest
import torch

import bench
import common
import compare
import hml
import plot
import train
from conftest import call
from hml import HeadwiseMemory
from model import GPT, GPTConfig, save_checkpoint
from upscale import set_trainable, upscale

CPU = Namespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("table", [name for name in bench.TABLES if name != "bf16"])
def test_every_table(table, monkeypatch, capsys):
    """With torch.compile's place taken: to compile takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # to import it takes seconds
    monkeypatch.setattr(bench, "C", 96)
    monkeypatch.setattr(train, "main", lambda: train.parse_arguments())  # its flags are flags
    flags = ("--device", "cpu", "--quick", "--compile", "--tables", table)
    assert call(monkeypatch, "bench.py", *flags) == 0
    out = capsys.readouterr().out
    assert "\n### " in out and "failed" not in out


def test_ratios_are_of_one_turn():
    """The medians of the times would give 1."""
    assert bench.cell(bench.ratios([1.0, 2.0, 6.0], [2.0, 1.0, 2.0])) == "2.00 [0.50, 3.00]"


def test_every_contestant_has_its_turns():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    args = Namespace(device=torch.device("cpu"), threads=1, repeats=3)
    times = bench.turns(functions, args)
    assert called == ["a", "b"] * 5 and all(len(spent) == 3 for spent in times.values())


@pytest.mark.parametrize("B, T, n, k", [(2, 3, 16, 5), (1, 1, 4, 4)])
def test_topk_by_rounds(B, T, n, k):
    torch.manual_seed(0)
    scores = torch.randn(B, T, 2, n, requires_grad=True)
    scores.data[0, 0, 0, :2] = 9.0  # a tie
    for ours, wanted in zip(bench.topk_by_rounds(scores, k), bench.plain_topk(scores, k)):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, wanted)
            (gradient,) = torch.autograd.grad(ours.sum(), scores)
            assert gradient.sum() == B * T * 2 * k
        else:
            assert all(len(set(places)) == k for places in ours.flatten(0, 2).tolist())


@pytest.mark.parametrize(
    "ways", [{"pool": bench.plain_pool}, {"pool": bench.bag_pool}, {"topk": bench.plain_topk}]
)
def test_other_ways_compute_the_same(ways):
    memory = bench.make_memory(CPU, 16, 4)
    heads = bench.make_heads(CPU, 6)
    wanted = bench.run_layer(memory, memory, heads, CPU)
    found = bench.run_layer(memory, bench.patched(memory, **ways), heads, CPU)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs)


def test_a_way_is_taken_back():
    before = hml.topk
    with pytest.raises(TypeError):
        bench.patched(HeadwiseMemory, topk=None)()
    assert hml.topk is before


def test_the_textbook_form_computes_the_same():
    ours, textbook = (
        bench.make_memory(CPU, 16, 4, kind) for kind in (HeadwiseMemory, bench.Textbook)
    )
    heads = bench.make_heads(CPU, 6)
    torch.testing.assert_close(textbook(heads), ours(heads))


def test_other_losses_are_the_loss():
    torch.manual_seed(0)
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(50, 4)
    targets = torch.randint(50, (8,))
    wanted = bench.plain_loss(x, weight, targets)
    for form in (bench.aligned_loss, bench.chunked_loss):
        found = form(x, weight, targets)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(loss, x, retain_graph=True) for loss in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_operations_by_hand():
    """One transformer block of width 16 that trains, or does not, below one that does."""
    model = GPT(GPTConfig(2, 2, 16, 8, 50))
    block = sum(p.numel() for p in model.h[0].parameters())
    set_trainable(model, "2")
    once = block + 8 * 16 + 2 * 50 * 16  # the first block forward, and the head without its weight
    assert bench.operations_of_a_step(model, 1) == 2 * (once + 3 * (block + 8 * 16))
    set_trainable(model, "all")
    assert bench.operations_of_a_step(model, 1) == 2 * 3 * (2 * (block + 8 * 16) + 50 * 16)


def test_what_bf16_changes(tmp_path, monkeypatch, capsys):
    """Nothing, where scores are far apart; nearly all, where bf16 cannot tell them apart."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("Some words. " * 20)
    about = {"tokenizer": "bytes", "dataset": "text", "data_dir": str(tmp_path)}
    torch.manual_seed(0)
    model = upscale(GPT(GPTConfig(2, 2, 16, 32, 257)), "midus", n_keys=16, top_k=4)
    (i,) = model.config.new
    keys = model.h[i].memory.product_keys.keys
    shares = []
    for near in (False, True):
        with torch.no_grad():
            keys.normal_()
            if near:
                keys.copy_(1 + keys * 1e-4)
            else:
                keys[..., 1:] = 0  # all on one line, in steps of a tenth
                keys[..., 0] = 1.1 ** torch.arange(16)
        save_checkpoint(str(tmp_path / "a.pt"), model, **about)
        flags = ("--device", "cpu", "--checkpoint", str(tmp_path / "a.pt"))
        assert call(monkeypatch, "bench.py", *flags) == 0
        row = capsys.readouterr().out.splitlines()[-1]
        shares.append(float(row.split("|")[3].strip().rstrip("%")))
    assert shares[0] < 20 and shares[1] > 80


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--tables", "blocks,nothing"), "nothing is none of blocks"),
        (("--tables", "bf16"), "--checkpoint"),
        (("--tables", "parts", "--plot", "a.svg"), "the table blocks"),
        (("--plot", "there.svg"), "there.svg exists"),
        (("--plot", "a.pt"), "must end in"),
        (("--lengths", "0"), "not a whole number"),
    ],
)
def test_what_it_refuses(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.svg").write_text("mine")
    assert call(monkeypatch, "bench.py", "--device", "cpu", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert (tmp_path / "there.svg").read_text() == "mine"


def test_a_table_that_fails_leaves_the_others(monkeypatch, capsys):
    def no_memory(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench.TABLES, "parts", no_memory)
    flags = ("--device", "cpu", "--quick", "--tables", "parts,search")
    assert call(monkeypatch, "bench.py", *flags) == 1
    out = capsys.readouterr().out
    assert "parts failed: CUDA out of memory" in out and "### The k best" in out


# ---- plot.py -------------------------------------------------------------------------------------
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


@needs_matplotlib
def test_the_plot_over_lengths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "C", 96)
    flags = ("--device", "cpu", "--quick", "--tables", "blocks", "--lengths", "8,16")
    assert call(monkeypatch, "bench.py", *flags, "--plot", "a.svg") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def save_run(path, blocks, **progress):
    new = (1,) if len(blocks) > 1 else ()
    config = GPTConfig(len(blocks), 2, 16, 8, 50, blocks, n_keys=4, top_k=2, d_latent=4, new=new)
    save_checkpoint(str(path), GPT(config), progress=progress)


@needs_matplotlib
def test_losses_are_drawn(tmp_path, monkeypatch, capsys):
    """Names stand in words at the ends of lines; two of one name are told apart."""
    monkeypatch.chdir(tmp_path)
    valid = [(0, 3.5), (60, 2.5)]
    names = {"a.pt": "TMT", "b.pt": "TMT", "c.pt": "TTT", "d.pt": "T"}
    for name, blocks in names.items():
        save_run(name, blocks, losses=[3.0 - step / 60 for step in range(60)], valid=valid)
    written = []
    name_ends = plot.name_ends
    monkeypatch.setattr(
        plot, "name_ends", lambda axis, ends: written.append((axis, ends)) or name_ends(axis, ends)
    )
    assert call(monkeypatch, "plot.py", *names, "--plot", "a.png") == 0
    axis, ends = written[0]
    assert [name for _, _, name, _ in ends] == [
        "memory blocks, head query",
        "memory blocks, head query (b.pt)",
        "copied blocks",
        "no new blocks",
    ]
    assert axis.get_xlim()[0] == 0 and all(line.get_xdata()[0] == 0 for line in axis.lines)
    heights = sorted(text.get_position()[1] for text in axis.texts)
    assert min(b - a for a, b in zip(heights, heights[1:])) > 0.05
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a.png"}  # no half file

    # Again: it is not replaced.
    before = (tmp_path / "a.png").read_bytes()
    capsys.readouterr()
    assert call(monkeypatch, "plot.py", "a.pt", "--plot", "a.png") == 2
    assert "a.png exists" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before


@needs_matplotlib
def test_a_checkpoint_without_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run("a.pt", "T")
    assert call(monkeypatch, "plot.py", "a.pt", "--plot", "a.svg") == 2
    assert "holds no losses" in capsys.readouterr().err and not (tmp_path / "a.svg").exists()


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (("plot.py", "a.pt"), ("bench.py", "--tables", "blocks", "--plot", "a.svg")):
        assert call(monkeypatch, *command) == 2
        assert "pip install matplotlib" in capsys.readouterr().err


def test_smoothed_losses_begin_at_the_first_step():
    steps, means = plot.smooth([float(step) for step in range(101)])  # means over 5
    assert steps[:3] == [0, 5, 10] and means[:3] == [1.0, 5.0, 10.0]
    assert plot.smooth([7.0]) == ([0], [7.0])


def test_an_error_about_a_memory_block_is_none_about_memory(capsys):
    def main():
        raise ValueError("a.pt has no memory blocks")

    with pytest.raises(SystemExit):
        common.run_command(main)
    assert capsys.readouterr().err == "error: a.pt has no memory blocks\n"


@needs_matplotlib
def test_sizes_are_drawn(monkeypatch):
    """Two texts against two costs, a line per group through the means of seeds."""
    rows = [compare.Row("copies", "one", "a"), compare.Row("copies", "two", "b")]
    rows.append(compare.Row("two memory blocks", "n=16", "c"))
    finals = {}
    for size, row in enumerate(rows, start=1):
        run = {"added": size * 100_000, "multiplications": size * 50_000}
        ends = [{"new": 4.0 + size, "old": 6.0}, {"new": 5.0 + size, "old": 6.0}]
        finals[row.method] = [{**run, "end": end} for end in ends]
    figures = []
    monkeypatch.setattr(plot, "write_picture", lambda figure, path: figures.append(figure))
    compare.draw_sizes(rows, finals, "sizes.svg")
    axes = figures[0].axes
    assert [axis.get_ylabel()[-8:] for axis in axes] == ["new text"] * 2 + ["old text"] * 2
    copies, memory = axes[0].lines
    assert copies.get_xdata().tolist() == [100_000, 200_000]
    assert copies.get_ydata().tolist() == [5.5, 6.5] and memory.get_ydata().tolist() == [7.5]
    assert [text.get_text() for text in axes[1].texts] == ["copies", "two memory blocks"]
