"""Text, tokenizers, caches, batches."""

import hashlib
import os
import platform
import threading
import zipfile

import numpy as np
import pytest
import tiktoken
import torch

import data
from conftest import full_disk
from data import SPLITS, encode, get_batch, load_dataset, load_tokenizer, vocab_size

TEST = ("test",)


def words_of(split):
    """The text that a split of bytes was made from."""
    return bytes(split.tokens.astype(np.uint8)).decode()


# ---- Downloads -----------------------------------------------------------------------------------
def test_wikitext_comes_from_a_zip(server, tmp_path, monkeypatch):
    """The whole way of a download: addresses in order, the sha256, members by name, tokens."""
    text = {split: f" \n = {split} = \n \n Some words here . \n" for split in SPLITS}
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for split in SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text[split])
    server.pages["made.zip"] = (tmp_path / "made.zip").read_bytes()
    sha256 = hashlib.sha256(server.pages["made.zip"]).hexdigest()
    urls = [server.url + "missing", server.url + "made.zip"]
    entry = data.WIKITEXT["wikitext2"]._replace(urls=urls, sha256=sha256)
    monkeypatch.setitem(data.WIKITEXT, "wikitext2", entry)
    splits = load_dataset("wikitext2", "bytes", str(tmp_path / "data"))
    assert {split: words_of(part) for split, part in splits.items()} == text


def test_without_network_and_files_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    entry = data.WIKITEXT["wikitext103"]._replace(urls=["http://127.0.0.1:9/x.zip"])
    monkeypatch.setitem(data.WIKITEXT, "wikitext103", entry)
    sentence = "put wiki.train.raw, .* into .*--dataset pycode, which needs no download"
    with pytest.raises(OSError, match=sentence):
        load_dataset("wikitext103", "bytes", str(tmp_path))


def test_what_is_at_hand_needs_no_download(tmp_path):
    folder = str(tmp_path)
    assert data.is_at_hand("pydocs", folder) and data.is_at_hand("pycode", folder)
    for name, file in (
        ("text", "valid.txt"),
        ("wikitext103", "wiki.valid.raw"),
        ("wikitext2", "wikitext-2-v1.zip"),
    ):
        assert not data.is_at_hand(name, folder)
        (tmp_path / file).write_bytes(b"")
        assert data.is_at_hand(name, folder)
    with pytest.raises(ValueError, match="dataset must be one of"):
        data.is_at_hand("mine", folder)


def test_form_feeds_end_no_line(tmp_path):
    """ast counts none, so what is cut as a docstring must not either."""
    file = tmp_path / "paged.py"
    file.write_text('\x0c\ndef f():\n    """Prose.\x0c\n    More."""\n    return 1\n')
    prose, code = data.split_prose_from_code(str(file))
    assert "Prose." in prose and code == "def f():\n    return 1"


# ---- Tokenizers ----------------------------------------------------------------------------------
def test_vocabulary_sizes_and_names():
    names = ("bytes", "gpt2", "gpt2:4096", "gpt2:256")
    assert [vocab_size(name) for name in names] == [257, 50257, 4097, 257]
    for name in ("gpt3", "gpt2:255", "gpt2:50257", "gpt2:", "gpt2:x", ""):
        with pytest.raises(ValueError, match="tokenizer must be"):
            vocab_size(name)


def test_a_tokenizer_must_fit_its_model():
    data.check_vocabulary("bytes", 257)
    with pytest.raises(ValueError, match="fewer tokens than its tokenizer: bytes has 257"):
        data.check_vocabulary("bytes", 256)


def test_bytes_are_tokens():
    tokenizer = load_tokenizer("bytes")
    text = "naïve \n\n tabs\t<|endoftext|>"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.eot_token == 256 and tokenizer.n_vocab == 257


def test_a_small_gpt2_vocabulary_reads_every_text(gpt2_vocabulary):
    whole, small = load_tokenizer("gpt2"), load_tokenizer("gpt2:4096")
    text = "Depth up-scaling; it's not stacking. 数据 <|endoftext|>"
    assert whole.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    ids = small.encode_ordinary(text)
    assert max(ids) < 4096 and small.decode(ids) == text
    assert len(ids) > len(whole.encode_ordinary(text))
    assert small.eot_token == 4096 and small.n_vocab == 4097 and whole.eot_token == 50256


def test_a_missing_vocabulary_names_the_variable(monkeypatch):
    def fail(name):
        raise ConnectionError("no route")

    load_tokenizer.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(OSError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def test_encoding_in_pieces_equals_encoding_at_once(gpt2_vocabulary):
    tokenizer = load_tokenizer("gpt2:4096")
    letters = [*"ab1.' \n\té中", " ", "  ", " \n", "'s", "word", " =", "..."]
    text = "".join(np.random.default_rng(0).choice(letters, size=400_000))
    assert encode(text, tokenizer, "").tolist() == tokenizer.encode_ordinary(text)


# ---- Python's own library ------------------------------------------------------------------------
@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of sixty small modules, and what is special in a real one."""
    folder = tmp_path / "library"
    files = {f"package/module{i}.py": f'"""Prose {i}."""\n# Comment {i}\n' for i in range(60)}
    files["nested.py"] = (
        '"""Prose of the module,\nover two lines."""\n\nclass A:\n    """Prose of A."""\n\n'
        '    def f(self):\n        """Prose of f."""\n        return "kept"  # why\n'
    )
    files["broken.py"] = "def {{ template }}"
    files["latin.py"] = b"# coding: latin-1\nname = '\xe9'\n"
    files["encodings/table.py"] = '"""Prose of a table."""\ntable = 1\n'
    files["pydoc_data/topics.py"] = "topics = 2\n"
    files["test/test_x.py"] = '"""Prose of a test."""\ntest = 3\n'
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr(data, "topics", {f"t{i}": f"Topic {i}." for i in range(60)})
    return folder


def built(folder):
    """The texts of both data sets, by name and split."""
    data.build_library(str(folder), "x")
    names = ("pydocs", "pycode")
    paths = {
        (name, split): folder / f"{name}-x" / f"wiki.{split}.txt"
        for name in names
        for split in SPLITS
    }
    return {key: path.read_text(encoding="utf-8") for key, path in paths.items()}


def test_docstrings_are_prose_and_all_else_is_code(library, tmp_path):
    texts = built(tmp_path)
    prose = "".join(texts["pydocs", split] for split in SPLITS)
    code = "".join(texts["pycode", split] for split in SPLITS)
    assert "Prose of the module,\nover two lines.\n\nProse of A.\n\nProse of f." in prose
    assert 'class A:\n\n    def f(self):\n        return "kept"  # why' in code
    assert "Prose" not in code and "Topic" not in code
    assert "Comment" not in prose and "kept" not in prose


def test_what_is_no_code_to_learn_from_is_left_out(library, tmp_path):
    """Tables of encodings, the reference itself, tests, templates that are no Python."""
    texts = built(tmp_path)
    everything = "".join(texts.values())
    for left_out in ("table = 1", "topics = 2", "test = 3", "Prose of a test", "template"):
        assert left_out not in everything
    assert "Prose of a table." in everything  # pydocs had it before


def test_prose_and_code_of_a_module_are_in_the_same_split(library, tmp_path):
    texts = built(tmp_path)
    for i in range(60):
        of_prose = [split for split in SPLITS if f"Prose {i}." in texts["pydocs", split]]
        of_code = [split for split in SPLITS if f"# Comment {i}\n" in texts["pycode", split]]
        assert of_prose == of_code and len(of_code) == 1
    assert all("Comment" in texts["pycode", split] for split in SPLITS)


def test_the_same_library_gives_the_same_texts(library, tmp_path, monkeypatch):
    """Whatever the order in which a folder lists its files."""
    first = built(tmp_path / "a")
    walk = os.walk

    def backwards(folder):
        for directory, names, files in walk(folder):
            names.reverse()
            yield directory, names, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert built(tmp_path / "b") == first


def test_two_that_begin_at_once_in_one_folder_both_work(library, tmp_path):
    """Both find nothing, both make everything, and neither stumbles over the other's files."""
    ready = threading.Barrier(2)
    lengths = []

    def begin():
        ready.wait()
        lengths.append(len(load_dataset("pycode", "bytes", str(tmp_path / "data"))["train"].tokens))

    both = [threading.Thread(target=begin) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(lengths) == 2 and lengths[0] == lengths[1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_real_library_is_large_enough(tmp_path, long):
    if not long:
        pytest.skip("takes ten seconds; needs --long")
    splits = load_dataset("pydocs", "bytes", str(tmp_path))
    assert len(splits["train"].tokens) > 1_500_000
    assert all(len(splits[split].tokens) > 40_000 for split in ("valid", "test"))
    code = tmp_path / f"pycode-{platform.python_version()}"
    assert (code / "wiki.train.txt").stat().st_size > 4_000_000
    assert all((code / f"wiki.{split}.txt").stat().st_size > 150_000 for split in ("valid", "test"))


# ---- Text and tokens -----------------------------------------------------------------------------
def test_the_real_wikitext2(wikitext2, gpt2_vocabulary):
    splits = load_dataset("wikitext2", "gpt2:4096", str(wikitext2), ("valid",))
    text = (wikitext2 / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert splits["valid"].tokens.tolist() == load_tokenizer("gpt2:4096").encode_ordinary(text)
    tokens = load_dataset("wikitext2", "gpt2", str(wikitext2), TEST)["test"].tokens
    assert len(tokens) == 295_877


@pytest.mark.parametrize(
    "content, text",
    [
        (b"one line\n", "one line\n"),
        (b"no end of line", "no end of line"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"\xef\xbb\xbfmarked\n", "marked\n"),
        ("naïve – Ω\n".encode(), "naïve – Ω\n"),
    ],
)
def test_text_in_odd_forms_is_read(tmp_path, content, text):
    (tmp_path / "wiki.test.tokens").write_bytes(content)
    assert words_of(load_dataset("wikitext2", "bytes", str(tmp_path), TEST)["test"]) == text


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe\x00", "as UTF-8"),
        (b"caf\xe9 con leche", "as UTF-8"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path, content, sentence):
    (tmp_path / "wiki.test.tokens").write_bytes(content)
    with pytest.raises(ValueError, match=f"wiki.test.tokens.*{sentence}"):
        load_dataset("wikitext2", "bytes", str(tmp_path), TEST)
    assert os.listdir(tmp_path) == ["wiki.test.tokens"]


@pytest.mark.parametrize("name, sentence", [("text", "there is no"), ("imagenet", "dataset must")])
def test_a_text_that_is_not_there_is_refused(tmp_path, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_dataset(name, "bytes", str(tmp_path))


def test_a_changed_text_or_tokenizer_never_meets_a_stale_cache(tmp_path):
    """Nor the same identity, which a resume compares."""
    identities = set()
    for text in ("one two\n", "one too\n"):
        (tmp_path / "test.txt").write_text(text)
        split = load_dataset("text", "bytes", str(tmp_path), TEST)["test"]
        identities.add(split.identity)
        assert words_of(split) == text
    assert len(identities) == len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("damage", ["shorter", "unknown token", "no array", "empty"])
def test_a_damaged_cache_is_refused(tmp_path, damage):
    (tmp_path / "test.txt").write_bytes(b"some words\n" * 20)
    load_dataset("text", "bytes", str(tmp_path), TEST)
    (cache,) = tmp_path.glob("*.npy")
    good = cache.read_bytes()
    bad = {"shorter": good[:-3], "unknown token": good[:-2] + b"\x01\x02", "no array": b"x" * 99}
    cache.write_bytes(bad.get(damage, b""))
    with pytest.raises(ValueError, match=f"{cache.name} is damaged; delete it"):
        load_dataset("text", "bytes", str(tmp_path), TEST)


def test_a_full_disk_while_text_is_tokenized(tmp_path):
    (tmp_path / "test.txt").write_bytes(b"some words\n" * 200)
    with full_disk(1000), pytest.raises(OSError, match="could not write .*text-test-bytes.*: "):
        load_dataset("text", "bytes", str(tmp_path), TEST)
    assert os.listdir(tmp_path) == ["test.txt"]
    assert len(load_dataset("text", "bytes", str(tmp_path), TEST)["test"].tokens) == 2200


# ---- Batches -------------------------------------------------------------------------------------
def test_a_batch_depends_on_its_index_and_the_seed_alone():
    tokens = np.arange(1001, dtype=np.uint16)
    x, y = get_batch(tokens, 3, 4, 10, seed=1)
    assert x.shape == y.shape == (4, 10) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, get_batch(tokens, 3, 4, 10, seed=1)[0])
    assert not torch.equal(x, get_batch(tokens, 3, 4, 10, seed=2)[0])
    halves = [get_batch(tokens, i, 4, 10, seed=1)[0] for i in (0, 1)]
    assert torch.equal(get_batch(tokens, 0, 8, 10, seed=1)[0], torch.cat(halves))


def test_an_epoch_reads_every_window_once():
    tokens = np.arange(1001, dtype=np.uint16)
    windows = 1000 // 10 - 1
    offsets = []
    for epoch in range(2):
        numbers = range(epoch * windows, (epoch + 1) * windows)
        starts = {get_batch(tokens, i, 1, 10, 0)[0][0, 0].item() for i in numbers}
        offset = {start % 10 for start in starts}
        assert len(starts) == windows and len(offset) == 1
        offsets += offset
    assert offsets[0] != offsets[1]  # each epoch cuts at other places


def test_a_split_that_is_too_short_is_refused():
    sentence = "20 tokens are too few for a batch of 1 sequences of 10, which needs 21"
    with pytest.raises(ValueError, match=sentence):
        get_batch(np.zeros(20, dtype=np.uint16), 0, 1, 10, 0)
    get_batch(np.zeros(21, dtype=np.uint16), 0, 1, 10, 0)
