"""GPT: causality, published weights, generation, checkpoints."""

import os

import pytest
import torch

from data import check_vocabulary
from model import (
    GPT,
    GPTConfig,
    MemoryBlock,
    aligned_product,
    count_parameters,
    load_checkpoint,
    load_gpt2,
    open_model,
    save_checkpoint,
)

CONFIG = GPTConfig(
    6,
    2,
    16,
    block_size=12,
    vocab_size=50,
    blocks="TMTTMT",
    n_keys=6,
    top_k=3,
    d_latent=4,
    new=(1, 4),
)


def wake(model):
    """Gives the banks something to say."""
    for block in model.h:
        if isinstance(block, MemoryBlock):
            torch.nn.init.normal_(block.memory.hive.bank)
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wake(GPT(CONFIG))


def test_forward_gives_logits_or_the_loss(model):
    tokens = torch.randint(0, 50, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 12, 50)
    targets = torch.randint(0, 50, (3, 12))
    loss = model(tokens, targets)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -picked.mean())


@pytest.mark.parametrize("logits_at_once", [50, 170, 1700])  # 1, 3 and 34 of 36 rows
def test_the_loss_in_chunks_is_the_loss(model, logits_at_once):
    """And its gradients, to rounding."""
    x = torch.randn(3, 12, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 12))
    results = []
    for at_once in (10**9, logits_at_once):
        loss = model.loss(x, targets, at_once)
        gradients = torch.autograd.grad(loss, (x, model.wte.weight))
        results.append((loss, *gradients))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole)


def test_the_loss_in_chunks_keeps_less(model):
    """Of what autograd keeps, no tensor is as large as all logits."""
    x = torch.randn(3, 12, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 12))
    for at_once, kept_all in ((10**9, True), (170, False)):
        sizes = []
        pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(x, targets, at_once)
        assert (max(sizes) >= 36 * 50) == kept_all


@pytest.mark.parametrize("vocab", [50, 64, 129])
def test_the_aligned_head_is_the_head(vocab):
    x = torch.randn(2, 3, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    want = torch.nn.functional.linear(x, weight)
    got = aligned_product(x, weight)
    torch.testing.assert_close(got, want)
    push = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (x, weight), push)
    torch.testing.assert_close(torch.autograd.grad(got, (x, weight), push), wanted)


def test_causality_by_gradient(model):
    """The logits at t depend on the inputs up to t, and on nothing later."""
    x = model.wte(torch.randint(0, 50, (1, 12))).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: x)
    for t in (0, 5, 11):
        (gradient,) = torch.autograd.grad(
            model(torch.zeros(1, 12, dtype=torch.long))[0, t].sum(), x
        )
        touched = gradient[0].abs().sum(-1) > 0
        assert touched[: t + 1].all() and not touched[t + 1 :].any()


def test_memory_block_is_x_plus_memory_of_heads(model):
    block, x = model.h[1], torch.randn(2, 7, 16)
    assert torch.equal(block(x), x + block.memory(block.attn(block.ln_1(x))))
    names = {name for name, _ in block.named_parameters()}
    assert not any("c_proj" in name or "mlp" in name or "ln_2" in name for name in names)


def test_parameter_counts_against_the_formula():
    """GPT-2 124M.

    A memory block adds LN + QKV 1.773M, keys C * n, bank n * n * d_v, projections C * d_v.
    """
    with torch.device("meta"):
        for n, d_v, total in ((64, 64, 2.13), (128, 64, 2.97), (128, 128, 4.07)):
            shape = dict(n_keys=n, d_latent=d_v, new=(1,))
            model = GPT(GPTConfig(2, 12, 768, 1024, 50257, "TM", **shape))
            attention = 2 * 768 + 768 * 3 * 768 + 3 * 768
            parts = {
                "attention": attention,
                "keys": 768 * n,
                "bank": n * n * d_v,
                "projections": 768 * d_v,
            }
            assert count_parameters(model, (1,)) == parts
            assert round(sum(parts.values()) / 1e6, 2) == total
        assert sum(count_parameters(model, (0,)).values()) == 7_087_872
        assert (
            sum(count_parameters(GPT(GPTConfig(12, 12, 768, 1024, 50257))).values()) == 124_439_808
        )


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"n_head": 3}, "multiple of n_head"),
        ({"blocks": "TMT"}, "blocks must be 6 letters"),
        ({"blocks": "TMTTMX"}, "blocks must be 6 letters"),
        ({"n_embd": 0}, "n_embd must be at least 1"),
        ({"new": (6,)}, "indices from 0 to 5"),
        ({"query": "tokens"}, "query must be heads or block"),
        ({"top_k": 7}, "top_k must lie between"),
        ({"n_embd": 6}, "head width must be even"),
    ],
)
def test_config_refuses(change, sentence):
    from dataclasses import replace

    with pytest.raises(ValueError, match=sentence):
        GPT(replace(CONFIG, **change))


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="13 tokens is longer than the model's 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


# GPT-2's weights


def openai_layout(model, transformers_style):
    """The state dict of a plain GPT, as published files hold it."""
    state = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = tensor.T.contiguous() if linear else tensor
    if transformers_style:
        state = {f"transformer.{name}": tensor for name, tensor in state.items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
    else:
        for i in range(model.config.n_layer):
            state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    return state


@pytest.mark.parametrize("transformers_style", [False, True])
def test_gpt2_loading_in_both_layouts(tmp_path, transformers_style):
    torch.manual_seed(0)
    original = GPT(GPTConfig(2, 2, 128, block_size=8, vocab_size=40))
    file = str(tmp_path / "pytorch_model.bin")
    torch.save(openai_layout(original, transformers_style), file)
    loaded = load_gpt2(file)
    assert loaded.config == original.config
    tokens = torch.randint(0, 40, (2, 8))
    assert torch.equal(loaded(tokens), original(tokens))
    _, info = open_model(file)
    with pytest.raises(ValueError, match="fewer tokens than its tokenizer: gpt2 has 50257 tokens"):
        check_vocabulary(info["tokenizer"], loaded.config.vocab_size)


def test_gpt2_against_the_transformers_library():
    """The same random weights, the same logits; needs the transformers package, which we do not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=16, vocab_size=40)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT(GPTConfig(2, 2, 128, 16, 40))
    state = {
        name.removeprefix("transformer."): t
        for name, t in theirs.state_dict().items()
        if "lm_head" not in name
    }
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ours.load_state_dict(
        {name: t.T if name.endswith(transposed) else t for name, t in state.items()}
    )
    tokens = torch.randint(0, 40, (2, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_gpt2_refuses(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at gpt3"):
        open_model("gpt3")
    other = tmp_path / "other.bin"
    torch.save({"layer.weight": torch.zeros(3)}, other)
    for content in (None, b"not a torch file"):
        if content:
            other.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold GPT-2 weights"):
            load_gpt2(str(other))
    torch.save(openai_layout(GPT(GPTConfig(1, 2, 96, 8, 40)), False), other)
    with pytest.raises(ValueError, match="no multiple of GPT-2's head width, 64"):
        load_gpt2(str(other))


# Generation


def uncached(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


@torch.no_grad()
def test_generation_with_the_cache_gives_the_tokens_of_generation_without(model):
    prompt = torch.randint(0, 50, (4, 3))
    assert torch.equal(
        model.generate(prompt, 10, temperature=0)[:, :12], uncached(model, prompt, 9)
    )


@torch.no_grad()
def test_generation_starts_anew_from_half_a_window(model):
    prompt = torch.randint(0, 50, (1, 11))
    out = model.generate(prompt, 4, temperature=0)
    first = uncached(model, prompt, 2)  # reads 11 tokens, then 12: the window is full
    assert torch.equal(out[:, :13], first)
    assert torch.equal(out[:, 13:15], uncached(model, first[:, -6:], 2)[:, 6:])
    assert model.generate(torch.randint(0, 50, (1, 40)), 3).shape == (1, 43)


@torch.no_grad()
def test_a_begun_cache_takes_one_token_at_a_time(model):
    cache = [{} for _ in model.h]
    model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)


def test_sampling_respects_top_k(model):
    prompt = torch.randint(0, 50, (1, 3))
    allowed = model(prompt)[0, -1].topk(2).indices.tolist()
    torch.manual_seed(0)
    picked = {model.generate(prompt, 1, top_k=2)[0, -1].item() for _ in range(30)}
    assert picked == set(allowed)


# Checkpoints


def test_checkpoint_round_trip(model, tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, model, tokenizer="bytes", history=[{"step": 1, "loss": 2.5}])
    loaded, info = load_checkpoint(path)
    assert loaded.config == CONFIG and info == {
        "tokenizer": "bytes",
        "history": [{"step": 1, "loss": 2.5}],
    }
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values())
    )
    assert os.listdir(tmp_path) == ["a.pt"]
    assert torch.load(path, weights_only=True)["tokenizer"] == "bytes"  # plain torch reads it too


def test_damage_is_refused_or_does_no_harm(model, tmp_path):
    """Cut anywhere, or one bit flipped anywhere. A flip in what nobody reads may go unnoticed."""
    path = tmp_path / "a.pt"
    save_checkpoint(str(path), model)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        at = int(torch.randint(0, len(whole), (), generator=generator))
        cut = case % 2 == 1
        flipped = bytes([whole[at] ^ 1 << case % 8])
        path.write_bytes(whole[:at] if cut else whole[:at] + flipped + whole[at + 1 :])
        assert refused_or_the_same(str(path), model) or not cut
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        load_checkpoint(str(tmp_path / "none.pt"))


def refused_or_the_same(path, model):
    """Whether the file was refused; if not, it must hold just what model is."""
    try:
        loaded, info = load_checkpoint(path)
    except ValueError as error:
        assert "damaged or is no nanoMIDUS" in str(error) or "does not hold" in str(error)
        return True
    assert loaded.config == model.config and info == {}
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    return False


def test_a_failed_save_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, model, step=1)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="could not write .*a.pt: No space left"):
        save_checkpoint(path, model, step=2)
    assert load_checkpoint(path)[1]["step"] == 1 and os.listdir(tmp_path) == ["a.pt"]
