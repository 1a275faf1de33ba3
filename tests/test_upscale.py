"""Up-scaling: identity to the last bit, where new blocks go, what trains, the command."""

import copy
import doctest

import pytest
import torch

import common
import upscale as module
from conftest import call, same_weights
from model import load_checkpoint, save_checkpoint
from upscale import METHODS, Method, Option, identity_gap, overlap, place, set_trainable, upscale

SMALL = dict(n_keys=6, top_k=3, d_latent=4)


# ---- The start -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, options",
    [
        ("midus", SMALL),
        ("midus", {**SMALL, "query": "token", "n_new": 3}),
        ("midus", {**SMALL, "query": "recent"}),
        ("hybrid", {**SMALL, "positions": [4, 1]}),
        ("ngram", {"n_keys": 6, "d_latent": 4, "orders": (1, 3)}),
        ("llama-pro", {}),
    ],
)
@torch.no_grad()
def test_the_deeper_model_starts_as_the_base_to_the_last_bit(base, tokens, method, options):
    """In fp32, under autocast to bf16, and with bf16 weights."""
    before = copy.deepcopy(base)
    deeper = upscale(base, method, **options)
    assert torch.equal(base(tokens), deeper(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base(tokens), deeper(tokens))
    half = copy.deepcopy(base).bfloat16()
    assert torch.equal(half(tokens), upscale(half, method, **options)(tokens))
    assert same_weights(base, before)


@pytest.mark.parametrize(
    "method, options, first",
    [
        ("midus", SMALL, {"memory.hive.bank"}),
        ("midus", {**SMALL, "query": "token"}, {"memory.hive.bank"}),
        ("hybrid", SMALL, {"memory.hive.bank", "attn.c_proj.weight", "attn.c_proj.bias"}),
    ],
)
def test_what_has_a_gradient_at_step_0_and_all_else_from_step_1(
    base, tokens, method, options, first
):
    block = upscale(base, method, positions=[2], **options).h[2]
    x = base.wte(tokens)
    tensors = dict(block.named_parameters())
    moved = []
    for _ in range(2):
        gradients = torch.autograd.grad(block(x, tokens).square().sum(), tensors.values())
        moved.append({name for name, gradient in zip(tensors, gradients) if gradient.any()})
        for parameter, gradient in zip(tensors.values(), gradients):
            parameter.data -= 0.01 * gradient
    assert moved == [first, set(tensors)]


# ---- The methods ---------------------------------------------------------------------------------
def test_midus_copies_norm_and_qkv_of_the_block_before(base):
    deeper = upscale(base, "midus", **SMALL)
    assert deeper.config.blocks == "TMTTMT" and deeper.config.new == (1, 4)
    for i in deeper.config.new:
        for part in ("ln_1", "attn.c_attn"):
            mine = deeper.h[i].get_submodule(part)
            source = deeper.h[i - 1].get_submodule(part)
            assert same_weights(mine, source)
            assert mine.weight.data_ptr() != source.weight.data_ptr()
    names = {name for name, _ in deeper.h[1].named_parameters()}
    assert not any(part in name for name in names for part in ("c_proj", "mlp", "ln_2"))


def test_hybrid_is_a_copy_with_a_memory_of_its_own_for_its_mlp(base):
    deeper = upscale(base, "hybrid")
    assert (deeper.config.query, deeper.config.residual) == ("token", True)
    assert (deeper.config.n_keys, deeper.config.top_k, deeper.config.d_latent) == (32, 8, 32)
    banks = set()
    for i in deeper.config.new:
        block = deeper.h[i]
        assert same_weights(block.attn.c_attn, base.h[i // 2].attn.c_attn)
        assert not block.attn.c_proj.weight.any() and not block.attn.c_proj.bias.any()
        keys = block.memory.product_keys.keys
        assert keys.abs().max().item() == pytest.approx(3 * 8**-0.5, rel=0.01)  # half of 16 wide
        banks.add(block.memory.hive.bank.data_ptr())
    assert len(banks) == 2


def test_solar_is_two_overlapping_copies_and_no_identity(base):
    deeper = upscale(base, "solar")
    assert deeper.config.new == (3, 4)
    for block, source in zip(deeper.h, (0, 1, 2, 1, 2, 3), strict=True):
        assert same_weights(block, base.h[source])
    assert identity_gap(base, deeper) > 0
    assert overlap(6, 3) == ([0, 1, 2, 3, 4, 2, 3, 4, 5], [5, 6, 7])  # cut by one and by two
    as_published = [*range(24), *range(8, 32)]
    assert overlap(32) == (as_published, list(range(24, 40)))


def test_places_for_any_depth():
    """Groups as equal as can be; a new block at the end of each, or in its middle."""
    for n_layer in range(1, 14):
        for n_new in range(1, n_layer + 1):
            tops = place(n_layer, False, n_new=n_new)
            middles = place(n_layer, True, n_new=n_new)
            bottoms = [0, *tops[:-1]]
            sizes = [top - bottom for bottom, top in zip(bottoms, tops)]
            assert len(tops) == len(middles) == n_new and tops[-1] == n_layer
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
            for bottom, middle, top in zip(bottoms, middles, tops):
                assert (middle - bottom) - (top - middle) in (0, 1)
    assert place(32, False, n_new=8) == list(range(4, 33, 4))  # LLaMA Pro as published


def test_what_cannot_be_is_refused(base):
    for method, options, sentence in (
        ("midus", {"positions": [5]}, "positions must be different numbers between 1 and 4"),
        ("llama-pro", {"positions": [2, 2]}, "positions must be different numbers"),
        ("hybrid", {"positions": [1], "n_new": 1}, "without n_new"),
        ("solar", {"n_new": 5}, "n_new must lie between 1 and 4"),
        ("solar", {"positions": [3]}, "solar takes no positions; it takes n_new"),
        ("midus", {"residual": True}, "residual needs query token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            upscale(base, method, **options)
    with pytest.raises(ValueError, match="was up-scaled before; name the base"):
        upscale(upscale(base, "midus"), "hybrid")


def test_only_what_is_named_trains(base):
    deeper = upscale(base, "llama-pro")
    for model, which, prefixes in (
        (deeper, "new", ("h.2.", "h.5.")),
        (base, "1,3", ("h.0.", "h.2.")),
        (deeper, "all", ("",)),
    ):
        set_trainable(model, which)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == name.startswith(prefixes)
    for which, sentence in (("new", "no inserted blocks"), ("5", "blocks from 1 to 4")):
        with pytest.raises(ValueError, match=sentence):
            set_trainable(base, which)


# ---- The command ---------------------------------------------------------------------------------
def test_an_option_of_a_new_method_has_a_flag(monkeypatch):
    options = (Option("strength", float, "how loud"), Option("n_new", int, "how many"))
    monkeypatch.setitem(METHODS, "mine", Method(None, options, "new"))
    parser = common.Parser()
    module.add_flags(parser)
    words = "--strength 0.5 --positions 1,3 --residual yes".split()
    given = module.given_options(parser.parse_args(words))
    assert given == {"strength": 0.5, "positions": [1, 3], "residual": True}


@pytest.mark.parametrize("method", ["midus", "solar"])
def test_the_command_writes_a_deeper_model_and_shows_the_difference(
    base, here, monkeypatch, capsys, method
):
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="pydocs", asked={})
    command = ("upscale.py", "base.pt", "--method", method)
    assert call(monkeypatch, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    if method == "midus":
        assert "stack   T M T T M T" in lines and "new       ^     ^" in lines
    (gap,) = [line.split()[-1] for line in lines if line.startswith("largest difference")]
    assert (float(gap) == 0) == (method == "midus")
    deeper, info = load_checkpoint("deeper.pt")
    assert deeper.config.new and info == {"tokenizer": "bytes", "dataset": "pydocs"}

    # It is not replaced unasked, and the base never is.
    assert call(monkeypatch, *command) == 2
    assert capsys.readouterr().err.startswith("error: deeper.pt exists")
    assert call(monkeypatch, *command, "--overwrite") == 0
    assert call(monkeypatch, *command, "--out", "base.pt", "--overwrite") == 2
    assert "is the base's own file" in capsys.readouterr().err


def test_docstring_examples():
    assert doctest.testmod(module).failed == 0
