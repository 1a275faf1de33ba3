"""Data: downloads from a local server, tokenizers, caches, batches."""

import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tiktoken
import torch

import data
import test_common
from conftest import ROOT
from data import encode, get_batch, load_dataset, load_tokenizer, vocab_size
from test_common import server  # noqa: F401 (a fixture)


def test_wikitext_from_a_zip(server, tmp_path, monkeypatch):
    """The whole way of a download: addresses in order, size and sha256, members by name, tokens."""
    monkeypatch.chdir(tmp_path)
    text = {split: f" \n = {split} = \n \n Some words here . \n" for split in data.SPLITS}
    with zipfile.ZipFile("made.zip", "w") as archive:
        for split in data.SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text[split])
    made = (tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr(test_common, "CONTENT", made)
    entry = data.WIKITEXT["wikitext2"]._replace(
        urls=[server + "missing", server + "good"],
        size=len(made),
        sha256=hashlib.sha256(made).hexdigest(),
    )
    monkeypatch.setitem(data.WIKITEXT, "wikitext2", entry)
    splits = load_dataset("wikitext2", "bytes", "data")
    for split, part in splits.items():
        assert bytes(part.tokens.astype(np.uint8)).decode() == text[split]
        assert part.words == sum(len(line.split()) + 1 for line in text[split].split("\n")[:-1])
        assert part.bytes == len(text[split])


def test_gpt2_by_name(server, tmp_path, monkeypatch):
    """The whole way of GPT-2's weights, with a small file in their layout."""
    import model
    from test_model import openai_layout

    torch.manual_seed(0)
    original = model.GPT(model.GPTConfig(1, 1, 64, block_size=4, vocab_size=10))
    torch.save(openai_layout(original, False), tmp_path / "made.bin")
    made = (tmp_path / "made.bin").read_bytes()
    monkeypatch.setattr(test_common, "CONTENT", made)
    monkeypatch.setattr(model, "GPT2_URL", server + "good?{}")
    with pytest.raises(
        OSError, match="A file of your own .* can be named.*its sha256 is .*, expected 7c5d3f4b"
    ):
        model.open_model("gpt2", str(tmp_path / "data"))
    monkeypatch.setitem(model.GPT2_SHA256, "gpt2", hashlib.sha256(made).hexdigest())
    loaded, _ = model.open_model("gpt2", str(tmp_path / "data"))
    tokens = torch.randint(0, 10, (1, 4))
    assert torch.equal(loaded(tokens), original(tokens))


def test_without_network_and_files_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    entry = data.WIKITEXT["wikitext103"]._replace(urls=["http://127.0.0.1:9/x.zip"])
    monkeypatch.setitem(data.WIKITEXT, "wikitext103", entry)
    with pytest.raises(
        OSError, match="put wiki.train.raw, .* into .*--dataset pydocs, which needs no download"
    ):
        load_dataset("wikitext103", "bytes", str(tmp_path))


# Tokenizers


def test_vocabulary_sizes():
    assert [vocab_size(name) for name in ("bytes", "gpt2", "gpt2:4096", "gpt2:256")] == [
        257,
        50257,
        4097,
        257,
    ]
    for name in ("gpt3", "gpt2:255", "gpt2:50257", "gpt2:", "gpt2:x", ""):
        with pytest.raises(ValueError, match="tokenizer must be"):
            vocab_size(name)


def test_bytes_tokenizer():
    tokenizer = load_tokenizer("bytes")
    text = "naïve \n\n tabs\t<|endoftext|>"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.eot_token == 256 and tokenizer.n_vocab == 257


def test_small_gpt2_vocabularies(gpt2_vocabulary):
    whole, small = load_tokenizer("gpt2"), load_tokenizer("gpt2:4096")
    text = (
        "Depth up-scaling inserts memory blocks; it's not the same as stacking. 数据 <|endoftext|>"
    )
    assert whole.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    ids = small.encode_ordinary(text)
    assert (
        max(ids) < 4096
        and small.decode(ids) == text
        and len(ids) > len(whole.encode_ordinary(text))
    )
    assert small.eot_token == 4096 and small.n_vocab == 4097 and whole.eot_token == 50256


def test_missing_vocabulary_names_the_variable(monkeypatch):
    def fail(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(OSError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def test_encoding_in_pieces_equals_encoding_at_once(gpt2_vocabulary, monkeypatch):
    tokenizer = load_tokenizer("gpt2:4096")
    generator = np.random.default_rng(0)
    letters = list("ab1.' \n\té中") + [" ", "  ", " \n", "'s", "word", " =", "..."]
    text = "".join(generator.choice(letters, size=600_000))
    assert encode(text, tokenizer, "").tolist() == tokenizer.encode_ordinary(text)
    assert encode("", tokenizer, "").tolist() == []


# Data sets


def test_the_real_wikitext2(wikitext2, gpt2_vocabulary):
    splits = load_dataset("wikitext2", "gpt2:4096", str(wikitext2), ("valid", "test"))
    assert (splits["valid"].words, splits["test"].words) == (217_646, 245_569)
    text = (wikitext2 / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert splits["valid"].tokens.tolist() == load_tokenizer("gpt2:4096").encode_ordinary(text)
    assert (
        len(load_dataset("wikitext2", "gpt2", str(wikitext2), ("test",))["test"].tokens) == 295_877
    )


def test_a_changed_source_or_tokenizer_never_meets_a_stale_cache(tmp_path):
    file = tmp_path / "wiki.test.tokens"
    for text in ("one two\n", "one too\n"):
        file.write_text(text)
        tokens = load_dataset("wikitext2", "bytes", str(tmp_path), ("test",))["test"].tokens
        assert bytes(tokens.astype(np.uint8)).decode() == text
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".bin")]) == 2


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "wiki.test.tokens").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="wiki.test.tokens does not hold a split as UTF-8 text"):
        load_dataset("wikitext2", "bytes", str(tmp_path), ("test",))


def test_two_that_begin_at_once_in_one_folder_both_work(tmp_path):
    """Both find nothing, both make everything, and neither stumbles over the other's files."""
    code = "import data, sys; data.load_dataset('pydocs', 'bytes', sys.argv[1])"
    start = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_pydocs(pydocs, tmp_path):
    first = load_dataset("pydocs", "bytes", str(pydocs))
    assert 1_500_000 < len(first["train"].tokens) and all(
        len(first[s].tokens) > 40_000 for s in ("valid", "test")
    )
    data.build_pydocs(str(tmp_path))  # again, from nothing: the same text
    again = (tmp_path / "wiki.valid.txt").read_bytes()
    assert bytes(first["valid"].tokens.astype(np.uint8)) == again


# Batches


def test_batches_depend_on_index_and_seed_alone_and_an_epoch_reads_every_window_once():
    tokens = np.arange(1001, dtype=np.uint16)
    x, y = get_batch(tokens, 3, 4, 10, seed=1)
    assert x.shape == y.shape == (4, 10) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    again = get_batch(tokens, 3, 4, 10, seed=1)[0]
    assert torch.equal(x, again) and not torch.equal(x, get_batch(tokens, 3, 4, 10, seed=2)[0])
    both = (
        get_batch(tokens, 0, 8, 10, seed=1)[0],
        torch.cat([get_batch(tokens, i, 4, 10, seed=1)[0] for i in (0, 1)]),
    )
    assert torch.equal(*both)
    windows = 1000 // 10 - 1
    for epoch in range(2):
        starts = {
            get_batch(tokens, epoch * windows + i, 1, 10, 0)[0][0, 0].item() for i in range(windows)
        }
        assert len(starts) == windows and len({start % 10 for start in starts}) == 1


def test_a_split_that_is_too_short_is_refused():
    with pytest.raises(
        ValueError, match="20 tokens are too few for a batch of 1 sequences of 10, which needs 21"
    ):
        get_batch(np.zeros(20, dtype=np.uint16), 0, 1, 10, 0)
    get_batch(np.zeros(21, dtype=np.uint16), 0, 1, 10, 0)
