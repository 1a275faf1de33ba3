"""Up-scaling: placement, identity to the last bit, freezing, recipes."""

import copy
import doctest

import pytest
import torch

import upscale as module
from conftest import call
from model import GPT, GPTConfig, MemoryBlock, load_checkpoint, save_checkpoint
from upscale import METHODS, identity_gap, overlap, place, set_trainable, summary, upscale

SMALL = dict(n_keys=6, top_k=3, d_latent=4)


def make_base(n_layer=6):
    """A base whose biases and norms are not at their start, as a trained model's are not."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(n_layer, 2, 16, block_size=12, vocab_size=50))
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return base


@pytest.fixture
def base():
    return make_base()


def options(method):
    return SMALL if method == "midus" else {}


@pytest.mark.parametrize("method", ["midus", "llama-pro"])
@pytest.mark.parametrize("placement", [{}, {"every": 3}, {"n_new": 4}, {"positions": [6, 1]}])
def test_identity_is_bitwise_in_fp32_and_bf16(base, method, placement):
    before = copy.deepcopy(base.state_dict())
    deeper = upscale(base, method, **placement, **options(method))
    tokens = torch.randint(0, 50, (4, 12))
    with torch.no_grad():
        assert torch.equal(base(tokens), deeper(tokens))
        assert identity_gap(base, deeper, tokens, torch.float32) == 0
        assert identity_gap(base, deeper, tokens, torch.bfloat16) == 0  # by autocast
        half = copy.deepcopy(base).bfloat16()  # and with bf16 weights
        assert torch.equal(
            half(tokens), upscale(half, method, **placement, **options(method))(tokens)
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("query_norm", [False, True])
def test_both_readings_of_the_block(base, query_norm):
    """B asks with x + attention, projection and all, and starts as the base too."""
    tokens = torch.randint(0, 50, (4, 12))
    deeper = upscale(base, "midus", positions=[2], query="block", query_norm=query_norm, **SMALL)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            assert identity_gap(base, deeper, tokens, dtype) == 0
    block, source = deeper.h[2], base.h[1]
    assert torch.equal(block.attn.c_proj.weight, source.attn.c_proj.weight)
    torch.nn.init.normal_(block.memory.hive.bank)
    x = torch.randn(2, 7, 16)
    a = x + source.attn(source.ln_1(x))
    torch.testing.assert_close(block(x), x + block.memory(a.view(2, 7, 2, 8)))
    prompt = torch.randint(0, 50, (1, 3))
    longer = deeper.generate(prompt, 5, temperature=0)
    assert longer[0, 7] == deeper(longer[:, :7])[0, -1].argmax()  # with the cache and without


def test_solar_is_no_identity_and_follows_its_recipe(base):
    deeper = upscale(base, "solar", n_new=2)
    assert identity_gap(base, deeper, torch.randint(0, 50, (4, 12)), torch.float32) > 0
    sources = [0, 1, 2, 3, 2, 3, 4, 5]  # m1 = m2 = 2 of 6 blocks cut at the seam
    for block, source in zip(deeper.h, sources, strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(block.state_dict().values(), base.h[source].state_dict().values())
        )
    assert deeper.config.new == (4, 5)
    assert overlap(32, 16) == (
        [*range(24), *range(8, 32)],
        list(range(24, 40)),
    )  # as published: 32 -> 48
    assert overlap(6, 3)[0] == [0, 1, 2, 3, 4, 2, 3, 4, 5]  # m1 = 1, m2 = 2
    assert overlap(4, 4) == ([0, 1, 2, 3, 0, 1, 2, 3], [4, 5, 6, 7])


def test_midus_copies_norm_and_qkv_of_the_block_before(base):
    deeper = upscale(base, "midus", **SMALL)
    assert (
        deeper.config.blocks == "TMTTMTTMT"
        and deeper.config.new == (1, 4, 7)
        and deeper.config.n_layer == 9
    )
    for i in deeper.config.new:
        assert isinstance(deeper.h[i], MemoryBlock)
        for part in ("ln_1", "attn.c_attn"):
            mine, source = deeper.h[i].get_submodule(part), deeper.h[i - 1].get_submodule(part)
            assert torch.equal(mine.weight, source.weight) and torch.equal(mine.bias, source.bias)
            assert mine.weight.data_ptr() != source.weight.data_ptr()


def test_every_new_part_gets_a_gradient_from_step_one(base):
    deeper = upscale(base, "midus", positions=[2], **SMALL)
    set_trainable(deeper, "new")
    tokens = torch.randint(0, 50, (8, 12))
    optimizer = torch.optim.SGD([p for p in deeper.parameters() if p.requires_grad], 0.5)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        deeper(tokens, tokens).backward()
        moved.append(
            {
                n
                for n, p in deeper.named_parameters()
                if p.grad is not None and p.grad.abs().sum() > 0
            }
        )
        optimizer.step()
    assert moved[0] == {"h.2.memory.hive.bank"}
    assert moved[1] == {name for name, _ in deeper.named_parameters() if name.startswith("h.2.")}


def test_place_for_any_depth():
    for n_layer in range(1, 14):
        for middle in (True, False):
            for n_new in range(1, n_layer + 1):
                positions = place(n_layer, middle, n_new=n_new)
                assert len(positions) == n_new == len(set(positions)) and positions == sorted(
                    positions
                )
                assert all(1 <= p <= n_layer for p in positions)
            for every in range(1, n_layer + 1):
                assert len(place(n_layer, middle, every=every)) == n_layer // every
    assert place(32, False, every=4) == list(range(4, 33, 4))  # LLaMA Pro as published
    assert place(16, True) == list(range(1, 16, 2))  # MIDUS on Llama-3.2-1B: 8 memory blocks


@pytest.mark.parametrize(
    "method, arguments, sentence",
    [
        ("midus", {"positions": [0]}, "between 1 and 6"),
        ("midus", {"positions": [7]}, "between 1 and 6"),
        ("midus", {"positions": []}, "between 1 and 6"),
        ("llama-pro", {"positions": [2, 2]}, "positions repeat"),
        ("midus", {"positions": [1], "n_new": 1}, "not several"),
        ("midus", {"every": 2, "n_new": 3}, "not several"),
        ("midus", {"n_new": 7}, "n_new must lie between 1 and 6"),
        ("midus", {"every": 7}, "every must lie between 1 and 6"),
        ("solar", {"n_new": 0}, "n_new must lie between 1 and 6"),
        ("solar", {"positions": [3]}, "solar has one seam"),
        ("solar", {"every": 3}, "solar has one seam"),
        ("solar", {"n_keys": 4}, "takes no n_keys"),
        ("midus", {"n_keys": 4, "top_k": 5}, "top_k must lie between 2 and n_keys, 4"),
        ("copy", {}, "method must be one of midus, llama-pro, solar"),
    ],
)
def test_upscale_refuses(base, method, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        upscale(base, method, **arguments)


def test_a_model_with_memory_is_refused(base):
    with pytest.raises(ValueError, match="already has memory blocks"):
        upscale(upscale(base, "midus", **SMALL), "midus")


def test_freezing(base):
    deeper = upscale(base, "llama-pro")
    set_trainable(deeper, "new")
    assert {
        i for i, block in enumerate(deeper.h) if all(p.requires_grad for p in block.parameters())
    } == {2, 5, 8}
    assert not any(
        p.requires_grad
        for n, p in deeper.named_parameters()
        if not n.startswith(("h.2.", "h.5.", "h.8."))
    )
    set_trainable(deeper, "all")
    assert all(p.requires_grad for p in deeper.parameters())
    with pytest.raises(ValueError, match="needs inserted blocks"):
        set_trainable(base, "new")
    set_trainable(base, "1,3")
    assert [all(p.requires_grad for p in block.parameters()) for block in base.h] == [
        i in (0, 2) for i in range(6)
    ]
    assert not base.wte.weight.requires_grad
    for wrong in ("0", "7", "1,,2", "some"):
        with pytest.raises(ValueError, match="blocks from 1 to 6"):
            set_trainable(base, wrong)


def test_the_command(base, tmp_path, monkeypatch, capsys):
    config = base.config
    from dataclasses import replace

    torch.manual_seed(0)
    base = GPT(replace(config, vocab_size=257))
    save_checkpoint(str(tmp_path / "base.pt"), base, tokenizer="bytes", dataset="pydocs")
    monkeypatch.chdir(tmp_path)
    for method in METHODS:
        assert (
            call(monkeypatch, "upscale.py", "base.pt", "--method", method, "--out", f"{method}.pt")
            == 0
        )
        gaps = [
            line.split()[-1]
            for line in capsys.readouterr().out.splitlines()
            if "largest difference" in line
        ]
        assert len(gaps) == 2 and (gaps == ["0", "0"]) == (method != "solar")
        deeper, info = load_checkpoint(str(tmp_path / f"{method}.pt"))
        assert info["method"] == method and info["tokenizer"] == "bytes" and deeper.config.new
    assert "stack  T M T T M T T M T" in summary(base, upscale(base, "midus", **SMALL))
    assert call(monkeypatch, "upscale.py", "base.pt", "--out", "midus.pt") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: midus.pt exists") and len(error) < 200


def test_docstring_examples():
    assert doctest.testmod(module).failed == 0
