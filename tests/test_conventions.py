"""Other people's perplexities: how they read a text, and the command."""

import json
import math

import numpy as np
import pytest
import torch

from conftest import call
from conventions import detokenize, evaluate, load_pieces
from model import GPT, GPTConfig, save_checkpoint
from test_eval import Bigram


@pytest.mark.parametrize(
    "spaced, plain",
    [
        ("the dogs ' house", "the dogs' house"),
        ("a well @-@ known man", "a well-known man"),
        ("1 @,@ 000 people", "1,000 people"),
        ("3 @.@ 5 km", "3.5 km"),
        ("two : three ; four", "two: three; four"),
        ("Yes . No ! Why ? So , then", "Yes. No! Why? So, then"),
        ("a ( b c ) d", "a (b c) d"),
        ("[ x ] { y }", "[x] {y}"),
        ('he said " no way " twice', 'he said "no way" twice'),
        ("a ' quoted ' word", "a 'quoted' word"),
        ("= = Head = =", "== Head =="),
        ("= = = Lower = = =", "=== Lower ==="),
        ("= = = = Deep = = = =", "==== Deep ===="),
        ("20 ° C", "20°C"),
        ("one \n two", "one\ntwo"),
        ("N N of N times", "N 1 of 1 times"),
        ("the man 's", "the man's"),
    ],
)
def test_each_rule_of_detokenization(spaced, plain):
    assert detokenize(spaced) == plain


def test_conventions_by_hand(tmp_path):
    text = " \n = One = \n \n It is , he said , 3 @.@ 5 . \n"
    text += " = = Part = = \n More . \n = Two = \n End . \n"
    (tmp_path / "wiki.test.raw").write_text(text)

    def load(convention):
        pieces, words, size = load_pieces(
            "wikitext2-raw", "test", "bytes", str(tmp_path), convention
        )
        return [bytes(t for t in piece if t < 256).decode() for piece in pieces], words, size

    rows = [
        "",
        " = One = \n",
        "",
        " It is , he said , 3 @.@ 5 . \n",
        " = = Part = = \n",
        " More . \n",
        " = Two = \n",
    ]
    rows.append(" End . \n")
    assert load("hf") == (["\n\n".join(rows)], len(text.split()) + 8, len(text))
    pages, words, size = load("lm-eval")
    assert pages == [" = One =\n\nIt is, he said, 3.5.\n== Part ==\nMore. ", " = Two =\nEnd.\n"]
    first, second = text[2 : text.index(" = Two") - 1], text[text.index(" = Two") :]
    assert size == len(first) + len(second)
    assert (
        words == len(first.split()) + 2 + len(second.split()) + 2
    )  # and an empty word at both ends
    (tmp_path / "wiki.test.raw").write_text("no heading\n")
    with pytest.raises(ValueError, match="cuts WikiText at its headings"):
        load("lm-eval")


def test_conventions_on_the_real_text(wikitext2, gpt2_vocabulary):
    """62 articles in the test split, 60 in the validation split, as lm-eval's data set has them."""
    for split, articles in (("test", 62), ("valid", 60)):
        pieces, words, size = load_pieces(
            "wikitext2", split, "gpt2:4096", str(wikitext2), "lm-eval"
        )
        assert len(pieces) == articles and all(piece[0] == 4096 for piece in pieces)


def test_detokenization_is_that_of_the_harness(wikitext2):
    task = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    text = (wikitext2 / "wiki.test.tokens").read_text(encoding="utf-8")
    assert detokenize(text) == task.wikitext_detokenizer({"page": text})


def test_figures_of_several_pieces_add_up():
    pieces = [np.zeros(20, dtype=np.uint16), np.zeros(14, dtype=np.uint16)]
    report = evaluate(Bigram(torch.zeros(4, 4), 8), pieces, 16, 64, None)
    assert report["tokens"] == 32 and report["nll"] == pytest.approx(32 * math.log(4))
    assert report["token_perplexity"] == pytest.approx(4)
    assert report["word_perplexity"] == pytest.approx(4**2)
    assert report["bits_per_byte"] == pytest.approx(1.0)


def test_the_command(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 16, 32, 257))
    (tmp_path / "wiki.test.tokens").write_text(" \n = One = \n \n Some words . \n" * 20)
    about = dict(tokenizer="bytes", dataset="wikitext2", data_dir=str(tmp_path))
    save_checkpoint(str(tmp_path / "a.pt"), model, **about)
    monkeypatch.chdir(tmp_path)
    for convention in ("hf", "lm-eval"):
        flags = ("a.pt", "--convention", convention, "--json", f"{convention}.json")
        assert call(monkeypatch, "conventions.py", *flags) == 0
        figures = json.loads((tmp_path / f"{convention}.json").read_text())
        assert f"{figures['word_perplexity']:.4f}" in capsys.readouterr().out
    assert call(monkeypatch, "conventions.py", *flags, "--stride", "4") == 2
    assert "drop --stride" in capsys.readouterr().err
