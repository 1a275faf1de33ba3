"""What is inside a memory: four tables, and a picture."""

import pytest
import torch

from conftest import call
from model import GPT, GPTConfig, save_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model that has memory, one that has none, and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("Some words | bars .\n" * 40)
    torch.manual_seed(0)
    shape = (3, 2, 16, 12, 257)
    model = GPT(GPTConfig(*shape, blocks="TMT", n_keys=6, top_k=3, d_latent=4, new=(1,)))
    torch.nn.init.normal_(model.h[1].memory.hive.bank)
    save_checkpoint("memory.pt", model, tokenizer="bytes", dataset="text")
    save_checkpoint("plain.pt", GPT(GPTConfig(*shape)), tokenizer="bytes", dataset="text")
    return tmp_path


def test_the_tables(folder, monkeypatch, capsys):
    assert call(monkeypatch, "analyze.py", "memory.pt", "--tokens", "320") == 0
    out = capsys.readouterr().out
    assert out.count("\n### ") == 4 and "Use of the 36 slots of each head, k=3" in out
    assert call(monkeypatch, "analyze.py", "plain.pt") == 2
    assert "no memory blocks" in capsys.readouterr().err


def test_the_picture(folder, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert call(monkeypatch, "analyze.py", "memory.pt", "--slots", "slots.svg") == 0
    assert (folder / "slots.svg").read_text().endswith("</svg>\n")
