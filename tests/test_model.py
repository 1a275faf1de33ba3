"""GPT: its blocks, published weights, generation, checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import model as module
from conftest import same_weights
from model import GPT, GPTConfig, count_parameters, load_checkpoint, open_model, save_checkpoint

MEMORY = dict(n_keys=6, top_k=3, d_latent=4)
CONFIG = GPTConfig(6, 2, 16, 12, 50, "TMTTMT", new=(1, 4), **MEMORY)


def wake(model):
    """Gives every memory something to say."""
    for name, parameter in model.named_parameters():
        if name.endswith("hive.bank"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture(params=["head", "token", "residual"])
def model(request):
    """One of each kind of memory block."""
    torch.manual_seed(0)
    query = "head" if request.param == "head" else "token"
    return wake(GPT(replace(CONFIG, query=query, residual=request.param == "residual")))


# ---- Blocks --------------------------------------------------------------------------------------
def test_the_loss_is_the_mean_surprise_in_nats():
    model = GPT(CONFIG)
    tokens, targets = torch.randint(0, 50, (2, 3, 12))
    picked = model(tokens).log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(model(tokens, targets), -picked.mean())


def test_logits_depend_on_the_tokens_up_to_theirs_and_on_nothing_later(model):
    """By gradient."""
    x = model.wte(torch.randint(0, 50, (1, 12))).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: x)
    for t in (0, 5, 11):
        logits = model(torch.zeros(1, 12, dtype=torch.long))[0, t]
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        touched = gradient[0].any(-1)
        assert touched[: t + 1].all() and not touched[t + 1 :].any()


@torch.no_grad()
def test_what_a_memory_block_asks_with_and_adds(model):
    block = model.h[1]
    x = torch.randn(2, 7, 16)
    tokens = torch.zeros(2, 7, dtype=torch.long)
    attended = block.attn(block.ln_1(x))
    if block.query == "head":
        wanted = x + block.memory(attended)
    else:
        read = block.memory((x + attended).view(2, 7, 2, 8))
        wanted = x + attended + read if block.residual else x + read
    torch.testing.assert_close(block(x, tokens), wanted)


def test_weights_start_in_proportion_to_the_width_and_smaller_where_they_write_to_the_stream():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 4, 192, 16, 500))
    std = 0.04  # GPT-2's 0.02, at a quarter of its width
    block = model.h[3]
    for part in (model.wte, block.attn.c_attn, block.mlp.c_fc):
        assert part.weight.std().item() == pytest.approx(std, rel=0.03)
    for part in (block.attn.c_proj, block.mlp.c_proj):  # 8 blocks write twice each
        assert part.weight.std().item() == pytest.approx(std / 4, rel=0.03)
        assert not part.bias.any()


class TokenBias(nn.Module):
    """A block of one's own: it adds a vector of its own for every token."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, x, tokens):
        return x + self.table(tokens)


def test_a_block_of_ones_own_gets_the_tokens_and_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(module.BLOCKS, "B", TokenBias)
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 16, 12, 50, "TB", new=(1,)))
    assert count_parameters(model, (1,)) == {"other": 50 * 16}
    tokens = torch.randint(0, 50, (2, 12))
    (gradient,) = torch.autograd.grad(model(tokens, tokens), model.h[1].table.weight)
    assert torch.equal(gradient.any(1).nonzero().flatten(), tokens.unique())
    path = str(tmp_path / "own.pt")
    save_checkpoint(path, model)
    assert torch.equal(load_checkpoint(path)[0](tokens), model(tokens))


def test_parameters_of_gpt2_and_of_its_memory_blocks():
    with torch.device("meta"):
        model = GPT(replace(module.PRETRAINED["gpt2"], blocks="TM" + 10 * "T", new=(1,)))
        gpt2 = GPT(module.PRETRAINED["gpt2"])
    parts = {"attention": 1_773_312, "keys": 98_304, "bank": 1_048_576, "projections": 49_152}
    assert count_parameters(model, (1,)) == parts
    assert sum(count_parameters(model, (0,)).values()) == 7_087_872
    assert sum(count_parameters(gpt2).values()) == 124_439_808


def test_a_shared_parameter_counts_once_and_cannot_be_saved(tmp_path):
    model = GPT(CONFIG)
    apart = count_parameters(model)["bank"]
    model.h[4].memory.hive.bank = model.h[1].memory.hive.bank
    assert count_parameters(model)["bank"] == apart / 2
    with pytest.raises(ValueError, match="h.4.memory.hive.bank.*may share a parameter"):
        save_checkpoint(str(tmp_path / "a.pt"), model)

    # Nor can a parameter that the config does not lead to.
    model = GPT(CONFIG)
    model.h[0].gate = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="h.0.gate.*a letter in BLOCKS"):
        save_checkpoint(str(tmp_path / "a.pt"), model)
    assert not list(tmp_path.iterdir())


def test_a_config_that_contradicts_itself_is_refused():
    for change, sentence in (
        ({"n_embd": 0}, "n_embd must be at least 1"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"blocks": "TMTTMX"}, "blocks must be 6 letters of T, M"),
        ({"query": "tokens"}, "query must be head, token or recent"),
        ({"residual": True}, "residual needs query token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            replace(CONFIG, **change)


# ---- GPT-2's weights -----------------------------------------------------------------------------
def openai_layout(model):
    """The state dict of a plain GPT, as OpenAI's files hold it."""
    state = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = tensor.T.contiguous() if linear else tensor
    for i in range(model.config.n_layer):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # a mask
    return state


@pytest.mark.parametrize("is_zip", [False, True])
def test_gpt2_is_read_in_the_older_format_of_torch_too(tmp_path, is_zip):
    torch.manual_seed(0)
    original = GPT(GPTConfig(2, 2, 128, 8, 40))
    file = str(tmp_path / "pytorch_model.bin")
    torch.save(openai_layout(original), file, _use_new_zipfile_serialization=is_zip)
    loaded, info = open_model(file)
    assert loaded.config == original.config and same_weights(loaded, original)
    assert info == {"tokenizer": "gpt2"}


def test_gpt2_gives_the_logits_of_the_transformers_library(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=16, vocab_size=40)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    ours, _ = open_model(str(tmp_path / "theirs.bin"))
    tokens = torch.randint(0, 40, (2, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at gpt3"):
        open_model("gpt3")
    other = str(tmp_path / "other.bin")
    torch.save({"layer.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="does not hold GPT-2 weights"):
        open_model(other)
    torch.save(openai_layout(GPT(GPTConfig(1, 2, 96, 8, 40))), other)
    with pytest.raises(ValueError, match="no multiple of GPT-2's head width, 64"):
        open_model(other)


# ---- Generation ----------------------------------------------------------------------------------
@torch.no_grad()
def test_generation_reads_as_much_of_the_end_as_it_can(model):
    tokens = torch.randint(0, 50, (4, 10))
    longer = model.generate(tokens, 6, temperature=0)
    for t in range(10, 16):
        logits = model(longer[:, max(0, t - 12) : t])[:, -1]
        assert torch.equal(longer[:, t], logits.argmax(-1))
    with pytest.raises(ValueError, match="16 tokens is longer than the model's 12"):
        model(longer)


def test_sampling_draws_from_the_top_k(model):
    prompt = torch.randint(0, 50, (1, 3))
    allowed = model(prompt)[0, -1].topk(2).indices.tolist()
    picked = {model.generate(prompt, 1, top_k=2)[0, -1].item() for _ in range(30)}
    assert picked == set(allowed)


# ---- Checkpoints ---------------------------------------------------------------------------------
def test_a_checkpoint_keeps_every_bit_and_plain_torch_reads_it(model, tmp_path):
    path = str(tmp_path / "a.pt")
    about = {"tokenizer": "bytes", "progress": {"losses": [2.5]}}
    save_checkpoint(path, model, **about)
    loaded, info = load_checkpoint(path)
    assert loaded.config == model.config and same_weights(loaded, model) and info == about
    assert torch.load(path, weights_only=True)["tokenizer"] == "bytes"
