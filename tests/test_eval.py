"""Evaluation: perplexity against plain loops, use of the memory against counts, the table."""

import json
import math

import numpy as np
import pytest
import torch

import eval as module
from conftest import call
from data import load_dataset, load_tokenizer
from eval import (
    continue_text,
    count_usage,
    evaluate,
    perplexity,
    print_table,
    sum_nll,
    usage,
    watch_reads,
)
from model import GPT, GPTConfig, save_checkpoint
from test_model import CONFIG, MEMORY, wake
from upscale import upscale


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wake(GPT(CONFIG))


# ---- Perplexity ----------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [2, 12, 13, 14, 100])
@pytest.mark.parametrize("stride", [12, 7, 1])
@torch.no_grad()
def test_every_token_after_the_first_counts_once_in_the_first_window_that_has_it(
    model, length, stride
):
    """Against a plain loop, one window of 12 after the other; the last ends with the text."""
    tokens = torch.randint(0, 50, (length,))
    surprise = {}  # of the token at a place
    last = max(0, length - 1 - 12)
    for start in [*range(0, last, stride), last]:
        window = tokens[start : start + 13]
        logprob = model(window[None, :-1])[0].log_softmax(-1)
        for i, target in enumerate(window[1:].tolist()):
            surprise.setdefault(start + i + 1, -logprob[i, target].item())
    assert sorted(surprise) == list(range(1, length))
    nll, count = sum_nll(model, tokens.numpy().astype(np.uint16), stride)
    assert count == length - 1 and nll == pytest.approx(sum(surprise.values()), rel=1e-6)


def test_a_row_divides_one_nll_by_tokens_words_and_bytes(monkeypatch):
    """All logits are alike: ln 257 for each of the 63 bytes after the first."""
    model = GPT(GPTConfig(1, 1, 2, 8, 257))
    torch.nn.init.zeros_(model.wte.weight)
    tokenizer = load_tokenizer("bytes")
    tokens = np.array(tokenizer.encode_ordinary("four by 4 words\n" * 4), dtype=np.uint16)
    row = evaluate("uniform", model, {"mine": tokens}, "bytes")
    wanted = {"token_perplexity": 257, "bits_per_byte": math.log2(257)}
    assert row["texts"]["mine"] == pytest.approx(wanted)

    # The same tokens by another name have words: 16, and 4 ends of line.
    monkeypatch.setattr(module, "load_tokenizer", lambda name: tokenizer)
    row = evaluate("uniform", model, {"mine": tokens}, "gpt2")
    wanted["word_perplexity"] = 257 ** (63 / 20)
    assert row["texts"]["mine"] == pytest.approx(wanted)


# ---- Use of the memory ---------------------------------------------------------------------------
def test_usage_is_counted_from_what_hive_gets(model):
    tokens = torch.randint(0, 50, (2, 12))
    got = []
    handle = model.h[4].memory.hive.register_forward_pre_hook(lambda _, inputs: got.extend(inputs))
    seen = {}
    with watch_reads(model, lambda block, *read: seen.update({block: read})):
        with count_usage(model) as counts:
            model(tokens)
    handle.remove()
    assert set(counts) == set(seen) == {1, 4}
    assert all(map(torch.equal, seen[4], got))

    # Read by read.
    weights, slots = got  # (B, T, H, k)
    wanted = {kind: torch.zeros(2, 36).double() for kind in ("top1", "topk", "weight")}
    for b, t, head, rank in np.ndindex(*slots.shape):
        slot = slots[b, t, head, rank]
        wanted["top1"][head, slot] += rank == 0
        wanted["topk"][head, slot] += 1
        wanted["weight"][head, slot] += weights[b, t, head, rank].item()
    torch.testing.assert_close(counts[4], wanted)

    # Nobody watches any longer.
    model(tokens)
    assert counts[4]["topk"].sum() == wanted["topk"].sum()


def test_usage_figures_by_hand():
    one = torch.tensor([[0.0, 5, 0, 0], [0, 0, 0, 2]])  # a slot takes all, for each of two heads
    two = torch.tensor([[1.0, 1, 0, 0], [3, 0, 3, 0]])
    for weight, kl in ((one, math.log(4)), (two, math.log(2)), (torch.ones(2, 4), 0)):
        figures = usage({"top1": one, "topk": two, "weight": weight})
        assert figures == {"top1": 1 / 4, "topk": 1 / 2, "kl": pytest.approx(kl, abs=1e-6)}


# ---- The table -----------------------------------------------------------------------------------
def test_the_table_has_the_columns_that_some_row_has_a_figure_for(capsys):
    of_bytes = {"token_perplexity": 4.0, "bits_per_byte": 2.0}
    of_words = {"token_perplexity": 8.0, "bits_per_byte": 1.0, "word_perplexity": 100.25}
    used = {2: {"top1": 0.5}, 4: {"top1": 0.25}}
    base = {"model": "base", "parameters": 2000, "added": 0, "usage": {}}
    deep = {"model": "deep", "parameters": 3000, "added": 1000, "usage": used}
    rows = [base | {"texts": {"a": of_bytes}}, deep | {"texts": {"a": of_bytes, "b": of_words}}]
    print_table(rows)
    titles, heads, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == ["a", "a", "b", "b", "b"]
    assert heads.endswith("per token  bits/byte  per token  per word  bits/byte  slots in use")
    assert lines[0].split() == ["base", "2,000", "0", "4.0000", "2.0000"]
    figures = ["4.0000", "2.0000", "8.0000", "100.2500", "1.0000"]
    assert lines[1].split() == ["deep", "3,000", "1,000", *figures, "50%", "25%"]

    # From the first row to the last.
    better = {"token_perplexity": 3.0, "bits_per_byte": 2.5}
    rows[1]["texts"] = {"a": better}
    print_table(rows, change=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["change", "+1,000", "-25%", "+25%"]


# ---- The command ---------------------------------------------------------------------------------
@pytest.fixture
def checkpoints(here):
    """A base that learned pydocs, and a deeper model that learned pycode after it."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 32, 257))
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="pydocs")
    fingerprints = {}
    for name in ("pycode", "pydocs"):
        splits = load_dataset(name, "bytes")
        fingerprints[name] = {split: text.fingerprint for split, text in splits.items()}
    about = dict(tokenizer="bytes", dataset="pycode", old_dataset="pydocs")
    deeper = wake(upscale(base, "midus", **MEMORY))
    save_checkpoint("ckpt.pt", deeper, fingerprints=fingerprints, **about)
    return deeper


def test_a_row_for_each_model_and_json_is_the_list_of_them(checkpoints, here, monkeypatch, capsys):
    words = ("base.pt", "ckpt.pt", "--json", "rows.json")
    assert call(monkeypatch, "eval.py", *words) == 0
    out = capsys.readouterr().out
    base, deeper = json.loads((here / "rows.json").read_text())
    assert list(base["texts"]) == ["pydocs"] and list(deeper["texts"]) == ["pycode", "pydocs"]
    assert deeper["added"] == deeper["parameters"] - base["parameters"] > 0
    tokens = load_dataset("pycode", "bytes")["test"].tokens
    wanted = perplexity(*sum_nll(checkpoints, tokens))
    assert deeper["texts"]["pycode"]["token_perplexity"] == wanted
    assert f"{wanted:.4f}" in out and "has changed since" not in out


def test_a_text_that_is_another_than_the_one_trained_on_is_told(
    checkpoints, here, monkeypatch, capsys
):
    (file,) = here.glob("data/pycode-*/test.txt")
    file.write_text("other = code\n" * 9)
    assert call(monkeypatch, "eval.py", "ckpt.pt") == 0
    out = capsys.readouterr().out
    assert out.count("has changed since") == 1
    assert "ckpt.pt was trained beside another pycode: this one has changed since\n" in out


def test_one_text_alone_and_samples(checkpoints, monkeypatch, capsys):
    words = "ckpt.pt --dataset pydocs --split valid --stride 4".split()
    assert call(monkeypatch, "eval.py", *words) == 0
    out = capsys.readouterr().out
    assert "the whole valid splits" in out and "stride 4" in out and "pycode" not in out
    assert call(monkeypatch, "eval.py", "ckpt.pt", "--prompt", "def é") == 0
    assert capsys.readouterr().out.startswith("ckpt.pt:\ndef é")


def test_what_is_wrong_ends_in_one_line_and_writes_no_json(checkpoints, here, monkeypatch, capsys):
    with torch.no_grad():
        checkpoints.wte.weight.fill_(math.nan)
    save_checkpoint("nan.pt", checkpoints, tokenizer="bytes", dataset="pycode")
    for words, status in (("nan.pt", 1), ("ckpt.pt --stride 33", 2), ("ckpt.pt --dataset x", 2)):
        assert call(monkeypatch, "eval.py", *words.split(), "--json", "rows.json") == status
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert not (here / "rows.json").exists()


def test_samples_are_the_same_each_time_and_draw_none_of_torchs_random_numbers():
    model = GPT(GPTConfig(1, 1, 8, 32, 257))
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    text = continue_text(model, "bytes", "One", 40)
    assert text.startswith("One") and text == continue_text(model, "bytes", "One", 40)
    assert continue_text(model, "bytes", "", 5, temperature=0)
    assert torch.equal(torch.rand(1), wanted)
