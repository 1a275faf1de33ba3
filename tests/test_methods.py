"""The other methods: what new blocks are at the start, and that each learns."""

import copy
import doctest

import pytest
import torch

import methods
from hml import product_key_topk
from train import make_optimizer, train_step
from upscale import METHODS, set_trainable, upscale

SIZES = {"n_new": 2, "n_keys": 8, "top_k": 4, "d_latent": 8}


def build(base, name, **options):
    known = {option.name for option in METHODS[name].options}
    sizes = {size: SIZES[size] for size in SIZES if size in known}
    return upscale(base, name, **sizes, **options)


def added(base, name, **options):
    size = sum(p.numel() for p in build(base, name, **options).parameters())  # shared ones once
    return size - sum(p.numel() for p in base.parameters())


def test_examples():
    assert doctest.testmod(methods).attempted > 0


# ---- Parts and variants of the memory block ------------------------------------------------------
@pytest.mark.parametrize(
    "name, options",
    [
        ("attention", {}),
        ("feed-forward", {}),
        ("memory-alone", {}),
        ("pkm", {}),
        ("hybrid-one-bank", {}),
        ("lora", {"rank": 3}),
        ("variant", {"query": "own"}),
        ("variant", {"residual": True}),
        ("variant", {"query_norm": True}),
        ("variant", {"query": "token", "values": "head-tables"}),
        ("variant", {"query": "token", "values": "one-w"}),
    ],
)
def test_it_starts_as_the_base_and_learns(name, options, base, tokens):
    model = build(base, name, **options)
    assert torch.equal(model(tokens), base(tokens))
    if name != "lora":  # which has frozen the rest itself
        set_trainable(model, "new")
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    optimizer = make_optimizer(model, 1e-2, 1e-1, 0.0)
    losses = [train_step(model, optimizer, (tokens, tokens), torch.float32, 1) for _ in range(8)]
    assert losses[-1] < losses[0]
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(still, frozen))


def test_parameters_are_counted(base):
    C, H, N, d_v, d_h = 32, 2, 64, 8, 16
    midus = added(base, "midus")
    assert midus - added(base, "variant", shared=True) == N * d_v
    assert midus - added(base, "variant", values="one-w") == 2 * d_v * d_h
    tables = added(base, "variant", values="head-tables")
    assert tables - midus == 2 * (H * N * d_h - N * d_v - H * d_v * d_h)
    plain = added(base, "variant", values="plain")
    assert plain - midus == 2 * (N * C - N * d_v - H * d_v * d_h)
    halves = added(base, "attention") + added(base, "feed-forward")
    assert halves == added(base, "llama-pro")
    matrices = 4 * C + 2 * C + 5 * C + 5 * C  # inputs and outputs of a block's four
    assert added(base, "lora", rank=3) == 4 * 3 * matrices


def test_a_product_key_memory_by_hand(base):
    """One token's read, slot by slot, of values as wide as the model."""
    block = build(base, "pkm").h[1]
    torch.nn.init.normal_(block.memory.hive.bank)
    x = torch.randn(1, 1, 32)
    query = block.own_query(block.ln_2(x)).view(1, 1, 2, 16)
    weights, slots = block.memory.product_keys(query)
    want = x[0, 0].clone()
    for h in range(2):
        for j in range(4):
            want += weights[0, 0, h, j] * block.memory.hive.bank[slots[0, 0, h, j]]
    torch.testing.assert_close(block(x, None)[0, 0], want)  # its attention is silent at the start


def test_a_normalised_query_has_neither_mean_nor_length(base):
    keys = build(base, "variant", query_norm=True).h[1].memory.product_keys
    query = torch.randn(1, 3, 2, 16)
    for ours, same in zip(keys(query), keys(5 * query + 1)):
        torch.testing.assert_close(ours, same)
    normal = (query - query.mean(-1, keepdim=True)) / query.std(-1, correction=0, keepdim=True)
    q1, q2 = normal.chunk(2, dim=-1)
    scores = [torch.einsum("bthd,hnd->bthn", q, k) for q, k in zip((q1, q2), keys.keys)]
    assert torch.equal(keys(query)[1], product_key_topk(*scores, 4)[1])


# ---- Copies --------------------------------------------------------------------------------------
@pytest.mark.parametrize("L", [2, 5, 12])
def test_gaps_of_the_top_half(L):
    for n_new in range(1, L):
        gaps = methods.gaps_of_top_half(L, n_new)
        assert gaps == sorted(set(gaps)) and len(gaps) == n_new
        assert 1 <= gaps[0] and gaps[-1] <= L - 1
        assert gaps[0] >= L // 2 or gaps == list(range(L - n_new, L))
    with pytest.raises(ValueError, match="less than"):
        methods.gaps_of_top_half(L, L)


@pytest.mark.parametrize(
    "method, new, identity",
    [("stack", (2, 5), False), ("opt-deus", (2, 4), True), ("lesa", (2, 4), False)],
)
def test_the_base_is_kept_around_new_copies(base, tokens, monkeypatch, method, new, identity):
    # Learning takes seconds.
    monkeypatch.setattr(methods, "predict_between", lambda slices, gaps: slices[gaps] / 2)
    deeper = upscale(base, method)
    assert deeper.config.new == new and deeper.config.blocks == "TTTTTT"
    assert torch.equal(deeper(tokens), base(tokens)) == identity
    kept = [block for i, block in enumerate(deeper.h) if i not in new]
    for mine, theirs in zip(kept, base.h):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters()))
    assert all(torch.isfinite(p).all() for p in deeper.parameters())


def test_transport_brings_permuted_units_back(base):
    """A block whose units are permuted is the same function; aligned to the original it is it."""
    block = base.h[0]
    other = copy.deepcopy(block)
    C, H = 32, 2
    within = [torch.randperm(C // H) + h * (C // H) for h in range(H)]  # units stay in their head
    units = torch.cat(within)
    hidden = torch.randperm(4 * C)
    with torch.no_grad():
        rows = torch.cat([third * C + units for third in range(3)])
        other.attn.c_attn.weight.copy_(block.attn.c_attn.weight[rows])
        other.attn.c_attn.bias.copy_(block.attn.c_attn.bias[rows])
        other.attn.c_proj.weight.copy_(block.attn.c_proj.weight[:, units])
        other.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[hidden])
        other.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[hidden])
        other.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[:, hidden])
    aligned = methods.align(other, block)
    for (name, mine), original in zip(aligned.named_parameters(), block.parameters()):
        torch.testing.assert_close(mine, original, rtol=0, atol=1e-4, msg=name)


def test_a_transport_plan_is_doubly_stochastic():
    plan = methods.transport_plan(torch.randn(12, 5) * 0.1, torch.randn(12, 5) * 0.1)
    torch.testing.assert_close(plan.sum(1), torch.ones(12))
    torch.testing.assert_close(plan.sum(0), torch.ones(12), rtol=0.05, atol=0.05)


def test_lesa_learns_what_lies_between():
    """Blocks on a line through the space of matrices: the middle one is its neighbours' mean."""
    torch.manual_seed(0)
    first = 0.03 * torch.randn(8, 400)  # the scale of singular vectors
    step = 0.01 * torch.randn(8, 400)
    slices = torch.stack([first + i * step for i in range(6)])  # (L, r, in)
    out = methods.predict_between(slices, [3])[0]
    want = (slices[2] + slices[3]) / 2
    assert (out - want).norm() < 0.2 * want.norm()
