"""The other methods: what new blocks are at the start, and that each learns."""

import copy

import pytest
import torch

import methods
from train import make_optimizer, train_step
from upscale import METHODS, set_trainable, upscale

SIZES = {"n_new": 2, "n_keys": 8, "top_k": 4, "d_latent": 8}
VARIANTS = [
    {"query": query, "residual": residual, "values": values}
    for query in ("head", "token", "own")
    for residual in (False, True)
    for values in ("hive", "plain", "head-tables", "one-w")
]


def options_for(name):
    return {option: SIZES[option] for option in SIZES if option in METHODS[name].options}


def added(base, name, **options):
    model = upscale(base, name, **options_for(name), **options)
    new = {p for i in model.config.new for p in model.h[i].parameters()}  # a shared one once
    return sum(p.numel() for p in new)


# ---- Variants of the memory block ----------------------------------------------------------------
def starts_as_the_base_and_learns(base, tokens, name, **options):
    model = upscale(base, name, **options_for(name), **options)
    assert torch.equal(model(tokens), base(tokens))
    set_trainable(model, "new")
    optimizer = make_optimizer(model, 1e-2, 1e-1, 0.0)
    losses = [train_step(model, optimizer, (tokens, tokens), torch.float32, 1) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["pkm", "memory-alone", "attention", "feed-forward"])
def test_parts_start_as_the_base_and_learn(base, tokens, name):
    starts_as_the_base_and_learns(base, tokens, name)


@pytest.mark.parametrize("choice", VARIANTS, ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_variant_starts_as_the_base_and_learns(base, tokens, choice):
    starts_as_the_base_and_learns(base, tokens, "variant", **choice)


@pytest.mark.parametrize("query", ["head", "token"])
def test_the_variants_without_a_choice_are_midus(base, tokens, query):
    midus = upscale(base, "midus", query=query, **SIZES)
    variant = upscale(base, "variant", query=query, **SIZES)
    for i in midus.config.new:
        mine = midus.h[i].memory
        torch.nn.init.normal_(mine.hive.bank)
        variant.h[i].memory.load_state_dict(mine.state_dict())
    torch.testing.assert_close(variant(tokens), midus(tokens))


def test_keys_start_larger_where_asked(base):
    models = []
    for scale in (1.0, 4.0):
        torch.manual_seed(1)
        models.append(upscale(base, "variant", key_scale=scale, **SIZES))
    plain, larger = (model.h[model.config.new[0]].memory.product_keys.keys for model in models)
    torch.testing.assert_close(larger, 4 * plain)


def test_parameters_are_counted(base):
    C, H, N, d_v, d_h = 32, 2, 64, 8, 16
    midus = added(base, "midus")
    assert added(base, "variant") == midus
    assert midus - added(base, "variant", shared=True) == N * d_v
    assert midus - added(base, "variant", values="one-w") == 2 * d_v * d_h
    tables = added(base, "variant", values="head-tables")
    assert tables - midus == 2 * (H * N * d_h - N * d_v - H * d_v * d_h)
    plain = added(base, "variant", values="plain")
    assert plain - midus == 2 * (N * C - N * d_v - H * d_v * d_h)
    assert added(base, "variant", query="token") == added(base, "midus", query="token")
    halves = added(base, "attention") + added(base, "feed-forward")
    assert halves == added(base, "llama-pro")


def test_the_product_key_memory_by_hand(base):
    """One token's read, slot by slot, of values as wide as the model."""
    model = upscale(base, "pkm", n_new=2, n_keys=8, top_k=4)
    block = model.h[model.config.new[0]]
    torch.nn.init.normal_(block.memory.hive.bank)
    x = torch.randn(1, 1, 32)
    query = block.own_query(block.ln_2(x)).view(1, 1, 2, 16)
    weights, slots = block.memory.product_keys(query)
    want = x[0, 0].clone()
    for h in range(2):
        for j in range(4):
            want += weights[0, 0, h, j] * block.memory.hive.bank[slots[0, 0, h, j]]
    torch.testing.assert_close(block(x)[0, 0], want)  # its attention is silent at the start


def test_an_unknown_choice_is_refused(base):
    with pytest.raises(ValueError, match="variant takes query head, token or own"):
        upscale(base, "variant", query="heads")


# ---- Copies --------------------------------------------------------------------------------------
@pytest.mark.parametrize("L", range(2, 14))
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
    deeper = upscale(base, method, n_new=2)
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
    x = torch.randn(2, 5, C)
    torch.testing.assert_close(other(x), block(x), rtol=1e-4, atol=1e-4)
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
