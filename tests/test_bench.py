"""The benchmark's tables are made in their short form, what they count is right; plot.py draws."""

import pytest
import torch

import bench
from conftest import call
from hml import HeadwiseMemory
from model import GPT, GPTConfig, save_checkpoint
from upscale import set_trainable, upscale

QUICK = ("--device", "cpu", "--quick")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(bench, "C", 96)


def test_every_table(monkeypatch, capsys):
    assert call(monkeypatch, "bench.py", *QUICK) == 0
    out = capsys.readouterr().out
    assert out.count("\n### ") == len(bench.TABLES) and "failed" not in out


def test_a_table_that_fails_leaves_the_others(monkeypatch, capsys):
    def no_memory(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench.TABLES, "blocks", no_memory)
    assert call(monkeypatch, "bench.py", *QUICK, "--tables", "blocks", "parts") == 1
    out = capsys.readouterr().out
    assert "blocks failed: CUDA out of memory" in out and "### Where" in out


def test_ratios_are_of_one_turn():
    """The medians of the times would give 1."""
    assert bench.cell(bench.ratios([1.0, 2.0, 6.0], [2.0, 1.0, 2.0])) == "2.00 [0.50, 3.00]"


def test_the_textbook_form_computes_the_same():
    args = bench.Namespace(device=torch.device("cpu"))
    kinds = (HeadwiseMemory, bench.Textbook)
    ours, textbook = (bench.make_memory(args, 16, 4, kind) for kind in kinds)
    heads = bench.make_heads(args, 6)
    torch.testing.assert_close(textbook(heads), ours(heads))


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
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("Some words. " * 20)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = upscale(GPT(GPTConfig(2, 2, 16, 32, 257)), "midus", n_keys=16, top_k=4)
    (i,) = model.config.new
    keys = model.h[i].memory.product_keys.keys
    far = torch.zeros_like(keys)
    far[..., 0] = 1.1 ** torch.arange(16)  # all on one line, in steps of a tenth
    near = 1 + 1e-4 * torch.randn_like(keys)
    shares = []
    for start in (far, near):
        keys.data = start
        save_checkpoint("a.pt", model, tokenizer="bytes", dataset="text")
        assert call(monkeypatch, "bench.py", "--device", "cpu", "--checkpoint", "a.pt") == 0
        row = capsys.readouterr().out.splitlines()[-1]
        shares.append(float(row.split("|")[3].strip().rstrip("%")))
    assert shares[0] < 20 and shares[1] > 80


def test_losses_are_drawn_and_no_picture_is_replaced(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.chdir(tmp_path)
    losses = {"losses": [3.0, 2.0, 1.0], "valid": [(0, 3.5), (3, 2.5)]}
    save_checkpoint("a.pt", GPT(GPTConfig(1, 2, 16, 8, 50)), progress=losses)
    assert call(monkeypatch, "plot.py", "a.pt", "--plot", "a.svg") == 0
    before = open("a.svg").read()
    assert "no new blocks" in before
    assert call(monkeypatch, "plot.py", "a.pt", "--plot", "a.svg") == 2
    assert "a.svg exists" in capsys.readouterr().err and open("a.svg").read() == before
