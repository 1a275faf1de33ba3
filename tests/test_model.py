"""GPT: causality, published weights, generation, checkpoints."""

import hashlib
import os
from dataclasses import replace

import pytest
import torch

import model as module
from conftest import same_weights
from model import (
    GPT,
    GPTConfig,
    MemoryBlock,
    count_parameters,
    load_checkpoint,
    load_gpt2,
    open_model,
    save_checkpoint,
)

MEMORY = dict(n_keys=6, top_k=3, d_latent=4)
CONFIG = GPTConfig(6, 2, 16, 12, 50, "TMTTMT", new=(1, 4), **MEMORY)


def wake(model):
    """Gives the banks something to say."""
    for block in model.h:
        if isinstance(block, MemoryBlock):
            torch.nn.init.normal_(block.memory.hive.bank)
    return model


@pytest.fixture(params=["head", "token"])
def model(request):
    torch.manual_seed(0)
    return wake(GPT(replace(CONFIG, query=request.param)))


def test_forward_gives_logits_or_the_loss(model):
    tokens, targets = torch.randint(0, 50, (2, 3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 12, 50)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(model(tokens, targets), -picked.mean())


def test_logits_depend_on_the_tokens_up_to_theirs_and_on_nothing_later(model):
    """By gradient."""
    x = model.wte(torch.randint(0, 50, (1, 12))).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: x)
    for t in (0, 5, 11):
        logits = model(torch.zeros(1, 12, dtype=torch.long))[0, t]
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        touched = gradient[0].abs().sum(-1) > 0
        assert touched[: t + 1].all() and not touched[t + 1 :].any()


def test_a_memory_block_is_x_plus_the_memory_of_its_heads():
    torch.manual_seed(0)
    block, x = wake(GPT(CONFIG)).h[1], torch.randn(2, 7, 16)
    assert torch.equal(block(x), x + block.memory(block.attn(block.ln_1(x))))
    names = {name for name, _ in block.named_parameters()}
    assert not any("c_proj" in name or "mlp" in name or "ln_2" in name for name in names)


def test_parameters_of_gpt2_and_of_its_memory_blocks():
    """A memory block adds LN + QKV 1.773M, keys C * n, bank n * n * d_v, projections C * d_v."""
    with torch.device("meta"):
        for n, d_v, total in ((64, 64, 2.13), (128, 64, 2.97), (128, 128, 4.07)):
            shape = dict(n_keys=n, d_latent=d_v, new=(1,))
            model = GPT(GPTConfig(2, 12, 768, 1024, 50257, "TM", **shape))
            parts = {
                "attention": 2 * 768 + 768 * 3 * 768 + 3 * 768,
                "keys": 768 * n,
                "bank": n * n * d_v,
                "projections": 768 * d_v,
            }
            assert count_parameters(model, (1,)) == parts
            assert round(sum(parts.values()) / 1e6, 2) == total
        assert sum(count_parameters(model, (0,)).values()) == 7_087_872
        gpt2 = GPT(module.PRETRAINED["gpt2"])
        assert sum(count_parameters(gpt2).values()) == 124_439_808


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"n_head": 3}, "multiple of n_head"),
        ({"blocks": "TMT"}, "blocks must be 6 letters"),
        ({"blocks": "TMTTMX"}, "blocks must be 6 letters"),
        ({"n_embd": 0}, "n_embd must be at least 1"),
        ({"new": (6,)}, "indices from 0 to 5"),
        ({"query": "tokens"}, "query must be head or token"),
        ({"top_k": 7}, "top_k must lie between"),
        ({"n_embd": 6}, "head width must be even"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPT(replace(CONFIG, **change))


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="13 tokens is longer than the model's 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


# ---- GPT-2's weights -----------------------------------------------------------------------------
def openai_layout(model, transformers_style=False):
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
def test_gpt2_is_read_in_both_layouts(tmp_path, transformers_style):
    torch.manual_seed(0)
    original = GPT(GPTConfig(2, 2, 128, block_size=8, vocab_size=40))
    file = str(tmp_path / "pytorch_model.bin")
    torch.save(openai_layout(original, transformers_style), file)
    loaded, info = open_model(file)
    assert loaded.config == original.config and same_weights(loaded, original)
    assert info == {"tokenizer": "gpt2"}


def test_gpt2_by_name_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    torch.manual_seed(0)
    original = GPT(GPTConfig(1, 1, 64, block_size=4, vocab_size=10))
    torch.save(openai_layout(original), tmp_path / "made.bin")
    server.pages["gpt2.bin"] = (tmp_path / "made.bin").read_bytes()
    monkeypatch.setattr(module, "GPT2_URL", server.url + "{}.bin")
    sentence = "A file of your own .* can be named.*its sha256 is .*, expected 7c5d3f4b"
    with pytest.raises(OSError, match=sentence):
        open_model("gpt2", str(tmp_path / "data"))
    sha256 = hashlib.sha256(server.pages["gpt2.bin"]).hexdigest()
    monkeypatch.setitem(module.GPT2_SHA256, "gpt2", sha256)
    assert same_weights(open_model("gpt2", str(tmp_path / "data"))[0], original)


def test_gpt2_gives_the_logits_of_the_transformers_library():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=16, vocab_size=40)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT(GPTConfig(2, 2, 128, 16, 40))
    state = {}
    for name, tensor in theirs.transformer.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = tensor.T if transposed else tensor
    ours.load_state_dict(state)
    tokens = torch.randint(0, 40, (2, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_what_is_no_gpt2_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at gpt3"):
        open_model("gpt3")
    other = tmp_path / "other.bin"
    other.write_bytes(b"not a torch file")
    with pytest.raises(ValueError, match="does not hold GPT-2 weights"):
        load_gpt2(str(other))
    torch.save({"layer.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="does not hold GPT-2 weights"):
        load_gpt2(str(other))
    torch.save(openai_layout(GPT(GPTConfig(1, 2, 96, 8, 40))), other)
    with pytest.raises(ValueError, match="no multiple of GPT-2's head width, 64"):
        load_gpt2(str(other))


# ---- Generation ----------------------------------------------------------------------------------
def uncached(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


@torch.no_grad()
def test_generation_with_the_cache_gives_the_tokens_of_generation_without(model):
    prompt = torch.randint(0, 50, (4, 3))
    longer = model.generate(prompt, 10, temperature=0)
    assert torch.equal(longer[:, :12], uncached(model, prompt, 9))


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


def test_sampling_draws_from_the_top_k(model):
    prompt = torch.randint(0, 50, (1, 3))
    allowed = model(prompt)[0, -1].topk(2).indices.tolist()
    torch.manual_seed(0)
    picked = {model.generate(prompt, 1, top_k=2)[0, -1].item() for _ in range(30)}
    assert picked == set(allowed)


# ---- Checkpoints ---------------------------------------------------------------------------------
def test_a_checkpoint_keeps_every_bit_and_plain_torch_reads_it(model, tmp_path):
    path = str(tmp_path / "a.pt")
    about = {"tokenizer": "bytes", "progress": {"losses": [2.5]}}
    save_checkpoint(path, model, **about)
    loaded, info = load_checkpoint(path)
    assert loaded.config == model.config and same_weights(loaded, model) and info == about
    assert os.listdir(tmp_path) == ["a.pt"]
    assert torch.load(path, weights_only=True)["tokenizer"] == "bytes"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(model, tmp_path, dtype):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, model.to(dtype))
    loaded, _ = load_checkpoint(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same_weights(loaded, model.float())
    tokens = torch.randint(0, 50, (2, 12))
    loaded(tokens, tokens).backward()


@pytest.mark.parametrize("name", ["tokenizer", "dataset", "data_dir", "settings", "progress"])
def test_a_wrong_type_in_a_checkpoint_is_refused_where_it_is_read(tmp_path, name):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, GPT(CONFIG), **{name: 3})
    with pytest.raises(ValueError, match=f"does not hold a nanoMIDUS model: {name} is 3"):
        load_checkpoint(path)


def test_a_missing_checkpoint_or_tokenizer_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at none.pt"):
        load_checkpoint("none.pt")
    save_checkpoint(str(tmp_path / "a.pt"), GPT(CONFIG))
    with pytest.raises(ValueError, match="does not say its tokenizer"):
        open_model(str(tmp_path / "a.pt"))
