"""Text, tokenizers, caches, batches."""

import hashlib
import re
import zipfile

import numpy as np
import pytest
import tiktoken
import torch

import data
import model
from conftest import call
from data import SPLITS, encode, get_batch, load_dataset, load_tokenizer, read_text, vocab_size
from eval import count_words
from model import GPT, GPTConfig
from test_model import openai_layout


def words_of(split):
    """The text that a split of bytes was made from."""
    return bytes(split.tokens.astype(np.uint8)).decode()


def write_folder(folder, text):
    """A data set in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(text.format(split).encode())


# ---- Where the text is ---------------------------------------------------------------------------
@pytest.fixture
def archive(server, tmp_path, monkeypatch):
    """WikiText-103 as its server has it, but little of it; yields the text of every split."""
    lines = {"train": 60, "valid": 2, "test": 2}
    texts = {split: f" = {split} = \n \n Some words here . \n" * lines[split] for split in SPLITS}
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as file:
        for split, text in texts.items():
            file.writestr(f"wikitext-103-raw/wiki.{split}.raw", text)
    server.pages["wikitext-103-raw-v1.zip"] = (tmp_path / "made.zip").read_bytes()
    sha256 = hashlib.sha256(server.pages["wikitext-103-raw-v1.zip"]).hexdigest()
    server.pages["another"] = b"another file"
    urls = [server.url + "another", server.url + "wikitext-103-raw-v1.zip"]
    entry = data.WIKITEXT["wikitext103"]._replace(urls=urls, sha256=sha256)
    monkeypatch.setitem(data.WIKITEXT, "wikitext103", entry)
    return texts


def test_wikitext_comes_from_a_zip_or_from_its_own_files_put_there_by_hand(archive, tmp_path):
    splits = load_dataset("wikitext103", "bytes", str(tmp_path / "data"))
    assert {split: words_of(part) for split, part in splits.items()} == archive
    for split in SPLITS:
        (tmp_path / f"wiki.{split}.tokens").write_text(f"by hand, {split}\n")
    splits = load_dataset("wikitext2", "bytes", str(tmp_path))
    assert words_of(splits["test"]) == "by hand, test\n"


def test_dataset_wikitext103_alone_downloads_gpt2_and_the_text(
    archive, server, here, gpt2_vocabulary, monkeypatch, capsys
):
    """GPT-2 and the text are downloaded, the model becomes deeper and learns; then it is there."""
    torch.manual_seed(0)
    small = GPT(GPTConfig(2, 1, 64, 16, 50257))
    torch.save(openai_layout(small), "made.bin")
    server.pages["gpt2.bin"] = (here / "made.bin").read_bytes()
    monkeypatch.setattr(model, "GPT2_URL", server.url + "{}.bin")
    monkeypatch.setitem(model.PRETRAINED, "gpt2", small.config)

    # The preset is that of GPT-2's width; this one is narrower.
    words = "--upscale midus --dataset wikitext103 --preset gpt2".split()
    assert call(monkeypatch, "train.py", *words) == 1
    assert "could not get data/gpt2.bin" in capsys.readouterr().err  # its checksum is another

    # Now the checksum is that of the small one.
    sha256 = hashlib.sha256(server.pages["gpt2.bin"]).hexdigest()
    monkeypatch.setitem(model.GPT2_SHA256, "gpt2", sha256)
    assert call(monkeypatch, "train.py", *words) == 0
    out = capsys.readouterr().out
    assert "run     midus on gpt2, new trained" in out and "tokens of gpt2" in out
    assert "per word" in out and "midus, end" in out
    assert call(monkeypatch, "eval.py", "ckpt.pt", "gpt2") == 0
    assert "downloading" not in capsys.readouterr().out


def test_a_folder_is_a_data_set_and_a_name_in_the_table_comes_before_it(here):
    """A mark of byte order and Windows' line ends are no text."""
    for name in ("mine", "pycode"):
        write_folder(here / name, "\ufeff{} is naïve\r\n")
    for name in ("mine", "./pycode", str(here / "pycode")):
        for split, part in load_dataset(name, "bytes").items():
            assert words_of(part) == f"{split} is naïve\n"
    assert "import" in words_of(load_dataset("pycode", "bytes")["train"])

    # What is none is refused.
    with pytest.raises(ValueError, match="there is no none/train.txt; a data set is one of pydocs"):
        load_dataset("none", "bytes")
    write_folder(here / "mine", "\n \n")
    with pytest.raises(ValueError, match="mine/train.txt is empty"):
        load_dataset("mine", "bytes")


def test_a_changed_text_or_tokenizer_never_meets_a_stale_cache(tmp_path, monkeypatch):
    """A text that has only moved meets its own."""
    monkeypatch.setattr(data, "load_tokenizer", lambda name: load_tokenizer("bytes"))
    fingerprints = []
    for folder, text, tokenizer in (
        ("a", "{} one\n", "bytes"),
        ("a", "{} two\n", "bytes"),
        ("a", "{} two\n", "gpt2:256"),
        ("moved", "{} two\n", "gpt2:256"),
    ):
        write_folder(tmp_path / folder, text)
        split = load_dataset(str(tmp_path / folder), tokenizer, str(tmp_path))["test"]
        fingerprints.append(split.fingerprint)
        assert words_of(split) == text.format("test")
    assert fingerprints[2] == fingerprints[3] and len(set(fingerprints)) == 3
    assert len(list(tmp_path.glob("*.npy"))) == 3 * len(SPLITS)


def test_the_real_wikitext2_has_the_published_number_of_words(wikitext2, gpt2_vocabulary):
    text = read_text(wikitext2 / "wiki.test.tokens", None)
    assert count_words(text) == 245_569
    assert len(encode(text, load_tokenizer("gpt2"), "")) == 295_877


# ---- Python's own library ------------------------------------------------------------------------
def test_docstrings_are_prose_all_else_is_code_and_both_go_the_same_way(tmp_path, monkeypatch):
    """A library of sixty small modules, and what is special in a real one."""
    files = {f"package/module{i}.py": f'"""Prose {i}."""\n# Comment {i}\n' for i in range(60)}
    files["nested.py"] = (
        '"""Prose of the module,\nover two lines."""\n\nclass A:\n    """Prose of A."""\n\n'
        '    def f(self):\n        """Prose\x0c of f."""\n        return "kept"  # why\n'
    )
    files["broken.py"] = "def {{ template }}"
    files["encodings/table.py"] = '"""Prose of a table."""\ntable = 1\n'
    files["test/test_x.py"] = '"""Prose of a test."""\ntest = 3\n'
    for name, content in files.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})

    docs = [words_of(part) for part in load_dataset("pydocs", "bytes", str(tmp_path)).values()]
    code = [words_of(part) for part in load_dataset("pycode", "bytes", str(tmp_path)).values()]
    nested = "Prose of the module,\nover two lines.\n\nProse of A.\n\nProse\x0c of f."
    assert nested in "".join(docs) and "The standard type hierarchy" in "".join(docs)
    assert 'class A:\n\n    def f(self):\n        return "kept"  # why' in "".join(code)
    for left_out in ("Prose", "def {{", "table = 1", "test = 3"):
        assert left_out not in "".join(code)
    assert "Comment" not in "".join(docs) and "Prose of a test" not in "".join(docs)

    # Every split has some modules, with their prose in pydocs and their code in pycode.
    for prose, rest in zip(docs, code):
        of_prose = re.findall(r"Prose (\d+)\.", prose)
        assert of_prose and of_prose == re.findall(r"Comment (\d+)", rest)


# ---- Tokenizers ----------------------------------------------------------------------------------
def test_names_and_sizes_of_tokenizers():
    names = ("bytes", "gpt2", "gpt2:4096", "gpt2:256")
    assert [vocab_size(name) for name in names] == [257, 50257, 4097, 257]
    for name in ("gpt3", "gpt2:255", "gpt2:50257", "gpt2:"):
        with pytest.raises(ValueError, match="tokenizer must be"):
            vocab_size(name)


TEXT = "Depth up-scaling; it's not stacking.\n\n naïve 数据 <|endoftext|>"


def test_bytes_are_tokens():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode_ordinary(TEXT) == list(TEXT.encode())
    assert tokenizer.eot_token == 256 and tokenizer.n_vocab == 257


def test_a_small_gpt2_vocabulary_reads_every_text(gpt2_vocabulary):
    whole = load_tokenizer("gpt2")
    small = load_tokenizer("gpt2:4096")
    assert whole.encode_ordinary(TEXT) == tiktoken.get_encoding("gpt2").encode_ordinary(TEXT)
    ids = small.encode_ordinary(TEXT)
    assert max(ids) < 4096 and small.decode(ids) == TEXT
    assert small.eot_token == 4096 and small.n_vocab == 4097 and whole.eot_token == 50256


def test_a_missing_vocabulary_names_the_variable(monkeypatch):
    load_tokenizer.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)
    with pytest.raises(OSError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def test_encoding_in_pieces_equals_encoding_at_once(gpt2_vocabulary):
    tokenizer = load_tokenizer("gpt2:4096")
    letters = [*"ab1.' \n\té中", " ", "  ", " \n", "'s", "word", " =", "..."]
    text = "".join(np.random.default_rng(0).choice(letters, size=400_000))
    assert encode(text, tokenizer, "").tolist() == tokenizer.encode_ordinary(text)


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


def test_an_epoch_reads_every_window_once_and_the_next_one_cuts_at_other_places():
    tokens = np.arange(1001, dtype=np.uint16)
    windows = 1000 // 10 - 1
    offsets = []
    for epoch in range(2):
        numbers = range(epoch * windows, (epoch + 1) * windows)
        starts = {get_batch(tokens, i, 1, 10, 0)[0][0, 0].item() for i in numbers}
        offset = {start % 10 for start in starts}
        assert len(starts) == windows and len(offset) == 1
        offsets += offset
    assert offsets[0] != offsets[1]


def test_a_text_that_is_too_short_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="20 tokens are too few .*, which needs 21"):
        get_batch(np.zeros(20, dtype=np.uint16), 0, 1, 10, 0)
    get_batch(np.zeros(21, dtype=np.uint16), 0, 1, 10, 0)
