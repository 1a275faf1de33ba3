"""The analyses, each on a case whose answer is known by construction."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import nn

import analyze
from conftest import call
from model import GPT, GPTConfig, save_checkpoint
from test_model import CONFIG, wake

TOKENS = np.random.default_rng(0).integers(0, 50, 12 * 20 + 5).astype(np.uint16)


@pytest.fixture
def model():
    """T M T T M T, 2 heads, N = 36 slots, 50 tokens, windows of 12, nothing at zero."""
    torch.manual_seed(0)
    return wake(GPT(CONFIG)).eval()


def test_slots_holding_a_share():
    weight = torch.tensor([1.0, 6, 1, 0, 2])
    held = [analyze.slots_holding(weight, share) for share in (0.5, 0.6, 0.8, 0.81, 0.99)]
    assert held == [1, 1, 2, 3, 4]
    assert analyze.slots_holding(torch.ones(10), 0.9) == 9


def test_usage_of_a_memory_that_always_reads_the_same(model):
    for i in (1, 4):
        nn.init.zeros_(model.h[i].attn.c_attn.weight)
        nn.init.zeros_(model.h[i].attn.c_attn.bias)  # every query is zero, so all scores tie
    rows = analyze.usage_table(model, TOKENS)
    assert [(r["block"], r["head"]) for r in rows] == [(2, 0), (2, 1), (5, 0), (5, 1)]
    for row in rows:
        assert row["top1"] == pytest.approx(1 / 36) and row["topk"] == pytest.approx(3 / 36)
        assert row["entropy"] == pytest.approx(math.log(3), abs=1e-5)
        assert (
            row["50%"] == 2
            and row["99%"] == 3
            and row["kl"] == pytest.approx(math.log(12), abs=1e-5)
        )


def test_only_heads_that_write_matter(model):
    d_h = CONFIG.n_embd // CONFIG.n_head
    with torch.no_grad():
        model.h[1].memory.hive.proj[0] = 0  # in memory block 1 only head 1 writes, in block 4 none
        model.h[4].memory.hive.proj.zero_()
        model.h[2].attn.c_proj.weight[:, d_h:] = 0  # in transformer block 2 only head 0 writes
    silenced, gradient = analyze.head_importance(model, TOKENS)
    assert silenced.shape == gradient.shape == (6, 2)
    for values in (silenced, gradient):
        assert values[1, 0] == 0 and values[1, 1] != 0
        assert values[4].tolist() == [0, 0]
        assert values[2, 0] != 0 and values[2, 1] == 0
    assert (gradient >= 0).all()


def test_silencing_is_the_loss_without_the_head(model):
    silenced, _ = analyze.head_importance(model, TOKENS)
    x, y = (torch.cat(part) for part in zip(*analyze.windows(model, TOKENS)))
    with torch.no_grad():
        whole = model(x, y).item()
        model.h[4].memory.hive.proj[1] = 0
        assert silenced[4, 1].item() == pytest.approx(model(x, y).item() - whole, abs=1e-5)


def test_gradient_form_by_finite_difference(model):
    """In the last memory block.

    A change below it could make it read other slots, where there is no gradient.
    """
    _, gradient = analyze.head_importance(model, TOKENS)
    x, y = (torch.cat(part) for part in zip(*analyze.windows(model, TOKENS)))
    proj, slopes = model.h[4].memory.hive.proj, []
    for i in range(len(x)):
        losses = []
        for factor in (0.99, 1.01):
            with torch.no_grad():
                kept = proj[0].clone()
                proj[0] *= factor
                losses.append(model(x[i : i + 1], y[i : i + 1]).double().item())
                proj[0] = kept
        slopes.append(abs(losses[1] - losses[0]) / 0.02)
    assert gradient[4, 0].item() == pytest.approx(np.mean(slopes), rel=0.02)


def test_rank_correlation():
    a = torch.tensor([3.0, 1, 2, 5])
    assert analyze.rank_correlation(a, a**3) == pytest.approx(1)
    assert analyze.rank_correlation(a, -a) == pytest.approx(-1)
    tied = torch.tensor([1.0, 1, 2, 3])  # ranks 0.5, 0.5, 2, 3 against 2, 0, 1, 3
    assert analyze.rank_correlation(tied, a) == pytest.approx(
        np.corrcoef([0.5, 0.5, 2, 3], [2, 0, 1, 3])[0, 1]
    )
    assert math.isnan(analyze.rank_correlation(torch.zeros(4), a))


def test_fixed_retrieval_with_equal_projections(model):
    """Where all heads have the same W, every way to share it is the same.

    Turning the memory off is not.
    """
    with torch.no_grad():
        for i in (1, 4):
            model.h[i].memory.hive.proj[1] = model.h[i].memory.hive.proj[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = {row["values"]: row for row in analyze.fixed_retrieval(model, TOKENS)}
    x, y = (torch.cat(part) for part in zip(*analyze.windows(model, TOKENS)))
    with torch.no_grad():
        assert rows["own W_h"]["loss"] == pytest.approx(model(x, y).item(), abs=1e-5)
    for way in ("mean W", "W of the next head", "one W, least squares"):
        assert rows[way]["loss"] == pytest.approx(rows["own W_h"]["loss"], abs=1e-4)
    assert abs(rows["none (memory off)"]["loss"] - rows["own W_h"]["loss"]) > 1e-3
    assert rows["none (memory off)"]["rank"] == 0 < rows["own W_h"]["rank"]
    assert all(
        torch.equal(p, before[name]) for name, p in model.named_parameters()
    )  # left as it was


def test_least_squares_is_the_nearest_to_all_heads():
    torch.manual_seed(0)
    proj, z = torch.randn(3, 4, 5), torch.randn(3, 100, 4)  # (H, d_v, d_h), (H, B*T, d_v)
    ways = analyze.realisations(proj, z.transpose(1, 2) @ z)
    stacked = torch.linalg.lstsq(z.flatten(0, 1), (z @ proj).flatten(0, 1)).solution
    torch.testing.assert_close(ways["one W, least squares"][0], stacked, rtol=1e-4, atol=1e-4)
    assert torch.equal(ways["W of the next head"][0], proj[1])


def test_effective_rank():
    vector = torch.randn(8, 1)
    assert analyze.effective_rank(vector @ vector.T) == 1
    assert analyze.effective_rank(torch.eye(5)) == 5
    assert analyze.effective_rank(torch.zeros(3, 3)) == 0


def test_a_slot_that_answers_one_token(model):
    """Keys are replaced by a look-up: token t reads slot t alone, and token 7 is most frequent."""
    tokens = np.array([7, 1, 7, 2, 7, 3, 7, 1, 7, 5, 7, 1] * 4 + [0], dtype=np.uint16)
    seen = []

    class Lookup(nn.Module):
        def forward(self, heads):
            slots = seen[-1][:, :, None, None].expand(-1, -1, 2, 3) % 36
            return torch.tensor([1.0, 0, 0]).expand(slots.shape), slots

    model.wte.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.h[1].memory.product_keys = Lookup()
    first, second = analyze.busiest_slots(model, tokens, block=1, head=1, slots=2)
    assert (
        first["slot"] == 7
        and first["share"] == pytest.approx(0.5)
        and first["tokens"] == [(7, pytest.approx(1))]
    )
    assert second["slot"] == 1 and second["share"] == pytest.approx(0.25)
    assert all(tokens[place] == 7 for place in first["places"])


def test_the_favourite_token_of_a_slot():
    tokens = np.array([3, 3, 4, 5], dtype=np.uint16)
    weights = torch.tensor([[0.5, 0.5]] * 4).double()  # (tokens, k)
    own = torch.tensor([[6, 7], [6, 7], [8, 9], [10, 11]])  # each token has slots of its own
    assert analyze.favourite(weights, own, tokens) == pytest.approx(1)
    assert analyze.favourite(weights, own * 0, tokens) == pytest.approx(0.5)  # token 3 is half
    mixed = torch.tensor([[6, 7], [6, 8], [6, 8], [6, 7]])  # 6: 2 of 4 are token 3; 7, 8: 1 of 2
    assert analyze.favourite(weights, mixed, tokens) == pytest.approx(0.5)


def test_cost_by_hand(model):
    memory, transformer = analyze.cost(model)
    C, H, n, k, d_v = 16, 2, 6, 3, CONFIG.d_latent
    assert (
        C == CONFIG.n_embd and transformer["stored"] == transformer["read"] == 12 * C * C + 13 * C
    )
    small = 2 * C + 3 * C * C + 3 * C + C * n + C * d_v  # norm, QKV, keys, projections
    assert memory == {"block": "memory", "stored": small + n * n * d_v, "read": small + H * k * d_v}


def test_the_command(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    shape = dict(n_keys=6, top_k=3, d_latent=4, new=(1,))
    (tmp_path / "wiki.valid.tokens").write_text(" = One = \n Some words | bars . \n" * 40)
    about = dict(tokenizer="bytes", dataset="wikitext2", data_dir=str(tmp_path))
    save_checkpoint(
        str(tmp_path / "a.pt"), wake(GPT(GPTConfig(3, 2, 16, 32, 257, "TMT", **shape))), **about
    )
    save_checkpoint(str(tmp_path / "b.pt"), GPT(GPTConfig(1, 2, 16, 32, 257)), **about)
    monkeypatch.chdir(tmp_path)
    plot = ["--plot", "plots"] if importlib.util.find_spec("matplotlib") else []
    assert call(monkeypatch, "analyze.py", "a.pt", "--tokens", "320", *plot) == 0
    out = capsys.readouterr().out
    assert out.count("\n### ") == 6 and "rank correlation of the two over attention heads" in out
    if plot:
        drawn = {path.name for path in (tmp_path / "plots").iterdir()}
        assert drawn == {"memory.png", "attention.png", "top1.png", "entropy.png"}
    assert (
        call(monkeypatch, "analyze.py", "b.pt") == 2
        and "no memory blocks" in capsys.readouterr().err
    )
