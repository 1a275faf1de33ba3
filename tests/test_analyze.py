"""The analyses, each on a case whose answer is known by construction."""

import numpy as np
import pytest
import torch
from torch import nn

import analyze
from conftest import call
from model import GPT, GPTConfig, save_checkpoint

TOKENS = np.random.default_rng(0).integers(0, 50, 12 * 20 + 5).astype(np.uint16)


def make_model(**other):
    """T M T T M T, 2 heads, N = 36 slots, 50 tokens, windows of 12, nothing at zero."""
    torch.manual_seed(0)
    shape = {"n_layer": 6, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 50}
    memory = {"n_keys": 6, "top_k": 3, "d_latent": 4, "new": (1, 4)}
    model = GPT(GPTConfig(**shape | memory | {"blocks": "TMTTMT"} | other))
    for i in model.config.new:
        nn.init.normal_(model.h[i].memory.hive.bank)
    return model.eval()


@pytest.fixture
def model():
    return make_model()


def loss_of(model):
    x, y = (torch.cat(part) for part in zip(*analyze.windows(model, TOKENS)))
    with torch.no_grad():
        return model(x, y).item()


# ---- Use of slots --------------------------------------------------------------------------------
def test_use_of_a_memory_that_always_reads_the_same(model):
    for i in model.config.new:
        nn.init.zeros_(model.h[i].attn.c_attn.weight)
        nn.init.zeros_(model.h[i].attn.c_attn.bias)  # every query is zero, so all scores tie
    reads = analyze.record_reads(model, analyze.windows(model, TOKENS))
    rows = analyze.use_of_slots(model, TOKENS, reads)
    assert [(row["block"], row["head"]) for row in rows] == [(2, 0), (2, 1), (5, 0), (5, 1)]
    most = np.bincount(TOKENS[:240]).max() / 240
    for row in rows:
        assert row["ever first choice"] == 1 and row["ever read"] == 3
        assert row["favourite token"] == f"{most:.0%}"


def test_the_favourite_token_of_a_slot():
    tokens = np.array([3, 3, 4, 5], dtype=np.uint16)
    weights = torch.tensor([[0.5, 0.5]] * 4).double()  # (tokens, k)
    own = torch.tensor([[6, 7], [6, 7], [8, 9], [10, 11]])  # each token has slots of its own
    assert analyze.favourite(weights, own, tokens) == pytest.approx(1)
    assert analyze.favourite(weights, own * 0, tokens) == pytest.approx(0.5)  # token 3 is half
    mixed = torch.tensor([[6, 7], [6, 8], [6, 8], [6, 7]])  # 6: 2 of 4 are token 3; 7, 8: 1 of 2
    assert analyze.favourite(weights, mixed, tokens) == pytest.approx(0.5)


def test_the_reads_of_a_head(model):
    batches = analyze.windows(model, TOKENS)
    assert sum(len(x) for x, _ in batches) == 20  # the rest is dropped
    reads = analyze.record_reads(model, batches)
    weights, slots = analyze.reads_of_head(reads, block=4, head=1)
    assert weights.shape == slots.shape == (240, 3)
    assert torch.equal(slots[12 * 8 : 12 * 9], reads[4][1][1][0, :, 1])  # window 8: batch 1, row 0
    assert len(model.h[4].memory.product_keys._forward_hooks) == 0


# ---- What slots answer ---------------------------------------------------------------------------
def test_a_slot_that_answers_one_token():
    """Token t reads slot t alone, and token 7 is most frequent."""
    tokens = np.array([7, 1, 7, 2, 7, 3, 7, 1, 7, 5, 7, 1] * 4 + [0], dtype=np.uint16)
    slots = torch.tensor(tokens[:48].astype(np.int64))[:, None].repeat(1, 3)  # (tokens, k)
    weights = torch.tensor([1.0, 0, 0]).expand(48, 3).double()
    first, second = analyze.busiest_slots(weights, slots, tokens, count=2)
    assert (first["slot"], first["share"]) == (7, 0.5)
    assert first["tokens"] == [(7, pytest.approx(1))]
    assert (second["slot"], second["share"]) == (1, 0.25)
    assert all(tokens[place] == 7 for place in first["places"])


# ---- Heads ---------------------------------------------------------------------------------------
def test_only_heads_that_write_matter(model):
    batches = analyze.windows(model, TOKENS)
    with torch.no_grad():
        model.h[1].memory.hive.proj[0] = 0  # in block 2 only head 1 writes
    rise = analyze.importance(model, batches, 1)
    assert rise[0] == 0 and rise[1] != 0

    # To silence a head is to take away what it writes.
    before = loss_of(model)
    rise = analyze.importance(model, batches, 4)
    with torch.no_grad():
        model.h[4].memory.hive.proj[1] = 0
    assert rise[1] == pytest.approx(loss_of(model) - before, abs=1e-5)


# ---- Fixed retrieval -----------------------------------------------------------------------------
def test_fixed_retrieval_with_equal_projections(model):
    """Where all heads have the same W, every way to share it is the same; no memory is not."""
    with torch.no_grad():
        for i in model.config.new:
            model.h[i].memory.hive.proj[1] = model.h[i].memory.hive.proj[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = analyze.windows(model, TOKENS)
    rows = analyze.fixed_retrieval(model, batches, analyze.record_reads(model, batches))
    *same, off = [float(row["loss, nats"]) for row in rows]
    assert same == pytest.approx([loss_of(model)] * 4, abs=6e-4) and abs(off - same[0]) > 2e-3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_reads_stay_where_queries_have_changed(model):
    """The second memory reads what it read, though the first writes nothing now."""
    batches = analyze.windows(model, TOKENS)
    reads = analyze.record_reads(model, batches)
    off = float(analyze.fixed_retrieval(model, batches, reads)[-1]["loss, nats"])
    with torch.no_grad():
        for i in model.config.new:
            model.h[i].memory.hive.proj.zero_()
    assert off == pytest.approx(loss_of(model), abs=6e-4)


def test_least_squares_is_the_nearest_to_all_heads():
    torch.manual_seed(0)
    proj, z = torch.randn(3, 4, 5), torch.randn(3, 100, 4)  # (H, d_v, d_h), (H, B*T, d_v)
    ways = analyze.projections(proj, z.transpose(1, 2) @ z)
    stacked = torch.linalg.lstsq(z.flatten(0, 1), (z @ proj).flatten(0, 1)).solution
    torch.testing.assert_close(ways["one W for all, least squares"][2], stacked)
    assert torch.equal(ways["W of the next head"][0], proj[1])


# ---- The command ---------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model of each query, and one without memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "valid.txt").write_text("Some words | bars .\n" * 40)
    about = {"tokenizer": "bytes", "dataset": "text", "data_dir": str(tmp_path)}
    models = {
        "a.pt": make_model(vocab_size=257),
        "b.pt": make_model(vocab_size=257, query="token"),
        "c.pt": make_model(vocab_size=257, blocks="TTTTTT", new=()),
    }
    for name, model in models.items():
        save_checkpoint(name, model, **about)
    return tmp_path


def test_the_tables(here, monkeypatch, capsys):
    assert call(monkeypatch, "analyze.py", "a.pt", "--tokens", "320") == 0
    out = capsys.readouterr().out
    assert out.count("\n### ") == 4 and "Use of the 36 slots of each head, k=3" in out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert "|" in "".join(rows) and all(row.endswith("|") for row in rows)
    assert any(r"\|" in row for row in rows)  # a bar of the text does not end a cell


@pytest.mark.parametrize(
    "flags, says",
    [
        (("c.pt",), "no memory blocks"),
        (("none.pt",), "no checkpoint"),
        (("a.pt", "--tokens", "5"), "at least a window, 12"),
        (("a.pt", "--slots", "a.pt"), "must end in"),
    ],
)
def test_what_it_refuses(flags, says, here, monkeypatch, capsys):
    assert call(monkeypatch, "analyze.py", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_the_head_in_the_picture_is_the_one_that_uses_most(model):
    reads = analyze.record_reads(model, analyze.windows(model, TOKENS))
    counts = analyze.widest(model, reads, 1)
    used = [len(analyze.reads_of_head(reads, 1, head)[1][:, 0].unique()) for head in (0, 1)]
    assert counts.shape == (6, 6) and counts.sum() == 240
    assert (counts > 0).sum() == max(used)


def test_squares_have_one_scale(here, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    figures = []
    write = analyze.write_picture
    monkeypatch.setattr(
        analyze, "write_picture", lambda figure, path: (figures.append(figure), write(figure, path))
    )
    assert call(monkeypatch, "analyze.py", "a.pt", "b.pt", "--slots", "slots.svg") == 0
    squares = [axis for axis in figures[0].axes if axis.images]
    scales = [axis.images[0].get_clim() for axis in squares]
    most = max(axis.images[0].get_array().max() for axis in squares)
    assert scales == [(1, most)] * 2 and most > 10
    titles = [axis.get_title() for axis in squares]
    assert titles[0].startswith("head query") and titles[1].startswith("token query")

    # Again: the picture is not replaced.
    before = (here / "slots.svg").read_bytes()
    assert call(monkeypatch, "analyze.py", "a.pt", "--slots", "slots.svg") == 2
    assert (here / "slots.svg").read_bytes() == before


def test_a_square_of_one_slot_is_no_storm(tmp_path):
    """The scale does not blow up single choices: it goes to ten at least."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    counts = torch.zeros(6, 6, dtype=torch.long)
    counts[2, 3] = 1
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "write_picture", lambda figure, path: figures.append(figure))
        analyze.draw_slots({"title": counts}, str(tmp_path / "a.svg"))
    (image,) = figures[0].axes[0].images
    assert image.get_clim() == (1, 10) and image.get_array().mask.sum() == 35
