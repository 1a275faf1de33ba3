"""Up-scaling: placement, identity to the last bit, freezing, the three methods."""

import copy
import doctest

import pytest
import torch

import upscale as module
from conftest import call, same_weights
from model import GPT, GPTConfig, MemoryBlock, load_checkpoint, save_checkpoint
from upscale import identity_gap, place, set_trainable, summary, upscale

SMALL = dict(n_keys=6, top_k=3, d_latent=4)


def make_base(vocab_size=50, n_layer=6):
    """A base whose biases and norms are not at their start, as a trained model's are not."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(n_layer, 2, 16, 12, vocab_size))
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return base


@pytest.fixture
def base():
    return make_base()


# ---- The start -----------------------------------------------------------------------------------
@pytest.mark.parametrize("placement", [{}, {"every": 3}, {"n_new": 4}, {"positions": [6, 1]}])
@pytest.mark.parametrize(
    "method, options",
    [
        ("midus", SMALL),
        ("midus", SMALL | {"query": "token"}),
        ("midus", SMALL | {"query_norm": True}),
        ("llama-pro", {}),
    ],
)
def test_the_deeper_model_starts_as_the_base_to_the_last_bit(base, method, options, placement):
    """In fp32, under autocast to bf16, and with bf16 weights."""
    before = copy.deepcopy(base)
    deeper = upscale(base, method, **placement, **options)
    tokens = torch.randint(0, 50, (4, 12))
    with torch.no_grad():
        assert torch.equal(base(tokens), deeper(tokens))
        assert identity_gap(base, deeper, tokens, torch.float32) == 0
        assert identity_gap(base, deeper, tokens, torch.bfloat16) == 0
        half = copy.deepcopy(base).bfloat16()
        assert torch.equal(half(tokens), upscale(half, method, **placement, **options)(tokens))
    assert same_weights(base, before)


def test_a_query_of_the_token_is_its_slice_of_x_plus_attention(base):
    deeper = upscale(base, "midus", positions=[2], query="token", **SMALL)
    block, source = deeper.h[2], base.h[1]
    assert torch.equal(block.attn.c_proj.weight, source.attn.c_proj.weight)
    torch.nn.init.normal_(block.memory.hive.bank)
    x = torch.randn(2, 7, 16)
    a = x + source.attn(source.ln_1(x))
    torch.testing.assert_close(block(x), x + block.memory(a.view(2, 7, 2, 8)))


def test_midus_copies_norm_and_qkv_of_the_block_before(base):
    deeper = upscale(base, "midus", **SMALL)
    assert deeper.config.blocks == "TMTTMTTMT" and deeper.config.new == (1, 4, 7)
    for i in deeper.config.new:
        assert isinstance(deeper.h[i], MemoryBlock)
        for part in ("ln_1", "attn.c_attn"):
            mine, source = deeper.h[i].get_submodule(part), deeper.h[i - 1].get_submodule(part)
            assert same_weights(mine, source)
            assert mine.weight.data_ptr() != source.weight.data_ptr()


@pytest.mark.parametrize(
    "n_layer, n_new, sources, new",
    [
        (6, 2, [0, 1, 2, 3, 2, 3, 4, 5], (4, 5)),  # m1 = m2 = 2 of 6 blocks cut at the seam
        (6, 3, [0, 1, 2, 3, 4, 2, 3, 4, 5], (5, 6, 7)),  # m1 = 1, m2 = 2
        (4, 4, [0, 1, 2, 3, 0, 1, 2, 3], (4, 5, 6, 7)),
        (32, 16, [*range(24), *range(8, 32)], tuple(range(24, 40))),  # as published: 32 -> 48
    ],
)
def test_solar_is_two_overlapping_copies_and_no_identity(n_layer, n_new, sources, new):
    base = make_base(n_layer=n_layer)
    deeper = upscale(base, "solar", n_new=n_new)
    assert deeper.config.new == new
    for block, source in zip(deeper.h, sources, strict=True):
        assert same_weights(block, base.h[source])
    tokens = torch.randint(0, 50, (4, 12))
    assert identity_gap(base, deeper, tokens, torch.float32) > 0


def test_at_step_0_only_the_bank_has_a_gradient_and_from_step_1_every_new_part(base):
    deeper = upscale(base, "midus", positions=[2], **SMALL)
    set_trainable(deeper, "new")
    learning = {name: p for name, p in deeper.named_parameters() if p.requires_grad}
    tokens = torch.randint(0, 50, (8, 12))
    moved = []
    for _ in range(2):
        gradients = torch.autograd.grad(deeper(tokens, tokens), learning.values())
        moved.append({name for name, g in zip(learning, gradients) if g.abs().sum() > 0})
        for parameter, gradient in zip(learning.values(), gradients):
            parameter.data -= 0.5 * gradient
    assert moved[0] == {"h.2.memory.hive.bank"}
    assert moved[1] == {name for name, _ in deeper.named_parameters() if name.startswith("h.2.")}


# ---- Where ---------------------------------------------------------------------------------------
def test_places_for_any_depth():
    for n_layer in range(1, 14):
        for middle in (True, False):
            for n_new in range(1, n_layer + 1):
                places = place(n_layer, middle, n_new=n_new)
                assert len(places) == n_new and places == sorted(set(places))
                assert all(1 <= p <= n_layer for p in places)
            for every in range(1, n_layer + 1):
                assert len(place(n_layer, middle, every=every)) == n_layer // every
    assert place(32, False, every=4) == list(range(4, 33, 4))  # LLaMA Pro as published
    assert place(16, True) == list(range(1, 16, 2))  # MIDUS on Llama-3.2-1B: 8 memory blocks


@pytest.mark.parametrize(
    "method, options, sentence",
    [
        ("midus", {"positions": [0]}, "between 1 and 6"),
        ("midus", {"positions": [7]}, "between 1 and 6"),
        ("midus", {"positions": []}, "between 1 and 6"),
        ("llama-pro", {"positions": [2, 2]}, "different numbers"),
        ("midus", {"positions": [1], "n_new": 1}, "not several"),
        ("midus", {"every": 2, "n_new": 3}, "not several"),
        ("midus", {"n_new": 7}, "n_new must lie between 1 and 6"),
        ("midus", {"every": 7}, "every must lie between 1 and 6"),
        ("solar", {"n_new": 0}, "n_new must lie between 1 and 6"),
        ("solar", {"positions": [3]}, "solar takes no positions; it takes n_new"),
        ("llama-pro", {"n_keys": 4}, "llama-pro takes no n_keys"),
        ("midus", {"n_keys": 4, "top_k": 5}, "top_k must lie between 2 and n_keys, 4"),
        ("copy", {}, "method must be one of midus, llama-pro, solar"),
    ],
)
def test_what_cannot_be_is_refused(base, method, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        upscale(base, method, **options)


def test_a_model_with_memory_is_refused_as_a_base(base):
    with pytest.raises(ValueError, match="already has memory blocks"):
        upscale(upscale(base, "midus", **SMALL), "midus")


# ---- What trains ---------------------------------------------------------------------------------
def learning_blocks(model):
    """Indices of the blocks that train; nothing else may."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {int(name.split(".")[1]) for name in learning if name.startswith("h.")}
    whole = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(tuple(f"h.{i}." for i in blocks))
    }
    assert learning == whole
    return blocks


def test_only_what_is_named_trains(base):
    deeper = upscale(base, "llama-pro")
    set_trainable(deeper, "new")
    assert learning_blocks(deeper) == {2, 5, 8}
    set_trainable(base, "1,3")
    assert learning_blocks(base) == {0, 2}
    set_trainable(deeper, "all")
    assert all(p.requires_grad for p in deeper.parameters())


@pytest.mark.parametrize(
    "which, sentence",
    [
        ("new", "no inserted blocks"),
        *[(which, "blocks from 1 to 6") for which in ("0", "7", "1,,2", "some", "")],
    ],
)
def test_training_nothing_is_refused(base, which, sentence):
    with pytest.raises(ValueError, match=sentence):
        set_trainable(base, which)


# ---- The command ---------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["midus", "llama-pro", "solar"])
def test_the_command_writes_a_deeper_model_and_shows_the_difference(
    tmp_path, monkeypatch, capsys, method
):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("base.pt", make_base(257), tokenizer="bytes", dataset="pydocs")
    command = ("upscale.py", "base.pt", "--method", method)
    assert call(monkeypatch, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    gaps = [line.split()[-1] for line in lines if "largest difference" in line]
    assert len(gaps) == 2 and (gaps == ["0", "0"]) == (method != "solar")
    deeper, info = load_checkpoint("deeper.pt")
    assert info == {"tokenizer": "bytes", "dataset": "pydocs"} and deeper.config.new

    # It is not replaced unasked.
    assert call(monkeypatch, *command) == 2
    assert capsys.readouterr().err.startswith("error: deeper.pt exists")
    assert call(monkeypatch, *command, "--overwrite") == 0


def test_the_summary_shows_the_stack_and_what_was_added(base):
    lines = summary(base, upscale(base, "midus", **SMALL)).splitlines()
    assert lines[0] == "stack  T M T T M T T M T" and lines[1] == "new      ^     ^     ^"
    assert "n_keys 6" in lines[-1] and "bank 432" in lines[-1]


def test_docstring_examples():
    assert doctest.testmod(module).failed == 0
