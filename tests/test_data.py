"""Data: downloads from a local server, tokenizers, caches, batches."""

import hashlib
import http.server
import os
import threading
import zipfile

import numpy as np
import pytest
import tiktoken
import torch

import data
from data import detokenize, download, encode, get_batch, load_dataset, load_pieces, load_tokenizer, vocab_size

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server on this machine: /good, /short (connection ends early), /wrong, /picky (403 to Python's agent), 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").split("?")[0]
            if name == "picky" and "Python" in self.headers["User-Agent"]:
                return self.send_error(403)
            body = {"good": CONTENT, "short": CONTENT[:1000], "wrong": b"x" * len(CONTENT), "picky": CONTENT}.get(name)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_download(server, tmp_path):
    for name in ("good", "picky"):
        path = tmp_path / "new" / name
        download([server + name], str(path), len(CONTENT), SHA256)
        assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [name]
        path.unlink()


@pytest.mark.parametrize(
    "name, size, sentence",
    [
        ("short", len(CONTENT), "ended after 1000 of 768000 bytes"),
        ("wrong", None, f"its sha256 is [0-9a-f]{{64}}, expected {SHA256}"),
        ("good", 5, "768000 bytes instead of 5"),
        ("missing", None, "404"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(server, tmp_path, name, size, sentence):
    with pytest.raises(OSError, match="Do this instead.*" + sentence):
        download([server + name], str(tmp_path / "file"), size, SHA256, "Do this instead.")
    assert os.listdir(tmp_path) == []


def test_the_next_address_is_tried_and_an_interrupted_try_starts_cleanly(server, tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"left over")
    (tmp_path / "file").write_bytes(b"damaged")
    download([server + "missing", server + "short", server + "good"], str(tmp_path / "file"), len(CONTENT), SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]


def test_a_good_file_is_not_fetched_again(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    download(["http://127.0.0.1:9/closed"], str(tmp_path / "file"), len(CONTENT), SHA256)


def test_wikitext_from_a_zip(server, tmp_path, monkeypatch):
    """The whole way of a download: addresses in order, size and sha256, members by name, tokens."""
    monkeypatch.chdir(tmp_path)
    text = {split: f" \n = {split} = \n \n Some words here . \n" for split in data.SPLITS}
    with zipfile.ZipFile("made.zip", "w") as archive:
        for split in data.SPLITS:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text[split])
    made = (tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr("test_data.CONTENT", made)
    entry = ("wikitext-2", "tokens", [server + "missing", server + "good"], len(made), hashlib.sha256(made).hexdigest())
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
    monkeypatch.setattr("test_data.CONTENT", made)
    monkeypatch.setattr(model, "GPT2_URL", server + "good?{}")
    with pytest.raises(OSError, match="A file of your own .* can be named.*its sha256 is .*, expected 7c5d3f4b"):
        model.GPT.from_pretrained("gpt2", str(tmp_path / "data"))
    monkeypatch.setitem(model.GPT2_SHA256, "gpt2", hashlib.sha256(made).hexdigest())
    loaded = model.GPT.from_pretrained("gpt2", str(tmp_path / "data"))
    tokens = torch.randint(0, 10, (1, 4))
    assert torch.equal(loaded(tokens)[0], original(tokens)[0])


def test_without_network_and_files_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    folder, ending, _, size, sha256 = data.WIKITEXT["wikitext103"]
    monkeypatch.setitem(data.WIKITEXT, "wikitext103", (folder, ending, ["http://127.0.0.1:9/x.zip"], size, sha256))
    with pytest.raises(OSError, match="put wiki.train.raw, .* into .*--dataset pydocs, which needs no download"):
        load_dataset("wikitext103", "bytes", str(tmp_path))


# Tokenizers


def test_vocabulary_sizes():
    assert [vocab_size(name) for name in ("bytes", "gpt2", "gpt2:4096", "gpt2:256")] == [257, 50257, 4097, 257]
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
    text = "Depth up-scaling inserts memory blocks; it's not the same as stacking. 数据 <|endoftext|>"
    assert whole.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    ids = small.encode_ordinary(text)
    assert max(ids) < 4096 and small.decode(ids) == text and len(ids) > len(whole.encode_ordinary(text))
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


def test_the_real_wikitext2(wikitext2, gpt2_vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = load_dataset("wikitext2", "gpt2:4096", str(wikitext2), ("valid", "test"))
    assert (splits["valid"].words, splits["test"].words) == (217_646, 245_569)
    text = (wikitext2 / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert splits["valid"].tokens.tolist() == load_tokenizer("gpt2:4096").encode_ordinary(text)
    assert len(load_dataset("wikitext2", "gpt2", str(wikitext2), ("test",))["test"].tokens) == 295_877
    assert not [name for name in os.listdir(wikitext2) if name.endswith(".bin")]  # read-only: caches go to ./data


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


@pytest.mark.parametrize("spaced, plain", [
    ("the dogs ' house", "the dogs' house"), ("a well @-@ known man", "a well-known man"),
    ("1 @,@ 000 people", "1,000 people"), ("3 @.@ 5 km", "3.5 km"), ("two : three ; four", "two: three; four"),
    ("Yes . No ! Why ? So , then", "Yes. No! Why? So, then"), ("a ( b c ) d", "a (b c) d"), ("[ x ] { y }", "[x] {y}"),
    ('he said " no way " twice', 'he said "no way" twice'), ("a ' quoted ' word", "a 'quoted' word"),
    ("= = Head = =", "== Head =="), ("= = = Lower = = =", "=== Lower ==="), ("= = = = Deep = = = =", "==== Deep ===="),
    ("20 ° C", "20°C"), ("one \n two", "one\ntwo"), ("N N of N times", "N 1 of 1 times"), ("the man 's", "the man's"),
])  # fmt: skip
def test_each_rule_of_detokenization(spaced, plain):
    assert detokenize(spaced) == plain


def test_conventions_by_hand(tmp_path):
    text = " \n = One = \n \n It is , he said , 3 @.@ 5 . \n = = Part = = \n More . \n = Two = \n End . \n"
    (tmp_path / "wiki.test.raw").write_text(text)

    def load(convention):
        pieces, words, size = load_pieces("wikitext2-raw", "test", "bytes", str(tmp_path), convention)
        return [bytes(t for t in piece if t < 256).decode() for piece in pieces], words, size

    assert load("tokens") == ([text], len(text.split()) + 8, len(text))
    rows = ["", " = One = \n", "", " It is , he said , 3 @.@ 5 . \n", " = = Part = = \n", " More . \n", " = Two = \n"]
    rows.append(" End . \n")
    assert load("hf") == (["\n\n".join(rows)], len(text.split()) + 8, len(text))
    pages, words, size = load("lm-eval")
    assert pages == [" = One =\n\nIt is, he said, 3.5.\n== Part ==\nMore. ", " = Two =\nEnd.\n"]
    first, second = text[2 : text.index(" = Two") - 1], text[text.index(" = Two") :]
    assert size == len(first) + len(second)
    assert words == len(first.split()) + 2 + len(second.split()) + 2  # and an empty word at both ends
    (tmp_path / "wiki.test.raw").write_text("no heading\n")
    with pytest.raises(ValueError, match="cuts WikiText at its headings"):
        load("lm-eval")


def test_conventions_on_the_real_text(wikitext2, gpt2_vocabulary):
    """62 articles in the test split, 60 in the validation split, as lm-eval's data set has them."""
    for split, articles in (("test", 62), ("valid", 60)):
        pieces, words, size = load_pieces("wikitext2", split, "gpt2:4096", str(wikitext2), "lm-eval")
        assert len(pieces) == articles and all(piece[0] == 4096 for piece in pieces)


def test_detokenization_is_that_of_the_harness(wikitext2):
    task = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    text = (wikitext2 / "wiki.test.tokens").read_text(encoding="utf-8")
    assert detokenize(text) == task.wikitext_detokenizer({"page": text})


def test_files_in_a_read_only_folder_are_found_and_new_ones_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "old").write_text("")
    (tmp_path / "theirs").chmod(0o555)
    assert data.kept("theirs", "old") == os.path.join("theirs", "old")
    assert data.kept("theirs", "new") == os.path.join("data", "new") and os.path.isdir("data")
    assert data.kept("mine", "new") == os.path.join("mine", "new") and os.path.isdir("mine")


def test_pydocs(pydocs, tmp_path):
    first = load_dataset("pydocs", "bytes", str(pydocs))
    assert 1_500_000 < len(first["train"].tokens) and all(len(first[s].tokens) > 40_000 for s in ("valid", "test"))
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
    both = get_batch(tokens, 0, 8, 10, seed=1)[0], torch.cat([get_batch(tokens, i, 4, 10, seed=1)[0] for i in (0, 1)])
    assert torch.equal(*both)
    windows = 1000 // 10 - 1
    for epoch in range(2):
        starts = {get_batch(tokens, epoch * windows + i, 1, 10, 0)[0][0, 0].item() for i in range(windows)}
        assert len(starts) == windows and len({start % 10 for start in starts}) == 1


def test_a_split_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="20 tokens are too few for 1 \\+ 1 sequences of 10"):
        get_batch(np.zeros(20, dtype=np.uint16), 0, 1, 10, 0)
    get_batch(np.zeros(21, dtype=np.uint16), 0, 1, 10, 0)
