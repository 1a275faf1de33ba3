"""Evaluation: perplexity against cases computed by hand, usage against counts, the command."""

import json
import math
import os

import numpy as np
import pytest
import torch

import eval as module
from conftest import call, same_weights
from eval import base_of, continue_text, count_usage, evaluate, perplexity, sum_nll, usage
from model import GPT, GPTConfig, save_checkpoint
from test_model import CONFIG, MEMORY, wake
from upscale import upscale


class Bigram(torch.nn.Module):
    """Knows the previous token alone, so its perplexity can be computed by hand."""

    def __init__(self, logits, block_size):
        super().__init__()
        self.wte = torch.nn.Embedding.from_pretrained(logits)
        self.h = []
        self.config = GPTConfig(1, 1, 2, block_size, len(logits))

    def forward(self, tokens):
        return self.wte(tokens)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wake(GPT(CONFIG))


def some_tokens(length, vocab_size=50):
    return np.random.default_rng(0).integers(0, vocab_size, length).astype(np.uint16)


# ---- Perplexity ----------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 100, 101, 203])
def test_every_token_after_the_first_counts_once_whatever_the_stride(length):
    logits = torch.randn(7, 7)
    tokens = some_tokens(length, 7)
    logprob = logits.double().log_softmax(-1)
    by_hand = -sum(logprob[a, b].item() for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist()))
    for stride in range(1, 9):
        nll, count = sum_nll(Bigram(logits, 8), tokens, stride)
        assert count == length - 1 and nll == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("stride", [12, 5])
def test_windows_are_scored_as_in_a_plain_loop(model, stride):
    """However many go at once."""
    tokens = some_tokens(70)
    total, done, start = 0.0, 0, 0
    while done < 69:
        piece = torch.from_numpy(tokens[start : start + 13].astype(np.int64))[None]
        logprob = model(piece[:, :-1]).log_softmax(-1)[0].gather(-1, piece[0, 1:, None])
        new = start + piece.size(1) - 1 - done
        total -= logprob[-new:].double().sum().item()
        done += new
        start = min(start + stride, 69 - 12)  # the last window ends with the text
    for at_once in (None, 1, 2, 7, 100):
        assert sum_nll(model, tokens, stride, at_once=at_once)[0] == pytest.approx(total, rel=1e-6)


def test_what_cannot_be_scored_is_refused():
    model = Bigram(torch.zeros(5, 5), 8)
    for stride in (0, 9):
        with pytest.raises(ValueError, match="stride must lie between 1 and the window, 8"):
            sum_nll(model, np.zeros(20, dtype=np.uint16), stride)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        sum_nll(model, np.zeros(1, dtype=np.uint16))
    for nll in (math.nan, math.inf, 1e5):
        with pytest.raises(FloatingPointError, match="infinite or NaN"):
            perplexity(nll, 100)


def test_all_perplexities_follow_from_one_nll():
    model = Bigram(torch.zeros(4, 4), 8)
    text = "four by 4 words\n" * 4
    report = evaluate(model, np.zeros(33, dtype=np.uint16), text, None, "")
    assert (report["tokens"], report["words"], report["bytes"]) == (32, 20, 64)
    assert report["token_perplexity"] == pytest.approx(4)  # 32 tokens at ln 4 each
    assert report["word_perplexity"] == pytest.approx(4 ** (32 / 20))
    assert report["bits_per_byte"] == pytest.approx(1.0)


# ---- Use of the memory ---------------------------------------------------------------------------
def test_usage_is_counted_as_by_hand(model):
    tokens = torch.randint(0, 50, (2, 12))
    reads = []
    keys = model.h[4].memory.product_keys
    handle = keys.register_forward_hook(lambda module, inputs, out: reads.append(out))
    with count_usage(model) as counts, torch.no_grad():
        model(tokens)
    handle.remove()
    assert set(counts) == {1, 4}
    weights, slots = reads[0]
    for head in range(2):
        of_head = {name: count[head] for name, count in counts[4].items()}
        used = slots[:, :, head].unique().tolist()
        assert of_head["topk"].nonzero().flatten().tolist() == used
        assert of_head["topk"].sum() == 2 * 12 * 3 and of_head["top1"].sum() == 2 * 12
        first = slots[:, :, head, 0].flatten().bincount(minlength=36)
        assert torch.equal(of_head["top1"], first.double())
        total = weights[:, :, head][slots[:, :, head] == used[0]].sum().item()
        assert of_head["weight"][used[0]].item() == pytest.approx(total, rel=1e-5)

    # The hooks are gone.
    with torch.no_grad():
        model(tokens)
    assert counts[4]["top1"].sum() == 2 * 2 * 12


def test_usage_figures_of_extreme_cases():
    one, every = torch.zeros(2, 16), torch.ones(2, 16)
    one[:, 3] = 5
    figures = usage({"top1": one, "topk": one, "weight": one.double()})
    assert figures == {"top1": 1 / 16, "topk": 1 / 16, "kl": pytest.approx(math.log(16))}
    figures = usage({"top1": one, "topk": every, "weight": every.double()})
    assert figures == {"top1": 1 / 16, "topk": 1.0, "kl": pytest.approx(0, abs=1e-12)}


# ---- Its base, its words -------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["midus", "llama-pro"])
def test_without_its_new_blocks_a_model_is_its_base(method):
    torch.manual_seed(0)
    base = GPT(GPTConfig(4, 2, 16, 12, 50))
    deeper = upscale(base, method, **(MEMORY if method == "midus" else {}))
    for i in deeper.config.new:
        for parameter in deeper.h[i].parameters():
            torch.nn.init.normal_(parameter)
    assert same_weights(base_of(deeper), base)
    assert base_of(deeper).wte is deeper.wte  # nothing is copied
    tokens = torch.randint(0, 50, (2, 12))
    assert torch.equal(base_of(deeper)(tokens), base(tokens))


def test_samples_are_the_same_each_time_and_draw_no_random_numbers():
    model = GPT(GPTConfig(1, 1, 8, 32, 600))  # more tokens than the tokenizer has
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    for temperature in (0, 1e-30, 1, 1e39):
        text = continue_text(model, "bytes", "One", 40, temperature)
        assert text.startswith("One")
        assert text == continue_text(model, "bytes", "One", 40, temperature)
    continue_text(model, "bytes", "", 5)
    assert torch.equal(torch.rand(1), wanted)


def test_the_verdict_says_what_was_learned_forgotten_and_added():
    def row(new, old, added):
        return {"new": new, "old": old, "added": added}

    names = {"new": "pycode", "old": "pydocs"}
    base = row(6.0, 4.0, 0)
    text = module.verdict([base, row(6.0, 4.0, 9), row(4.5, 5.0, 1234)], names)
    assert "Learned" in text and "-25%" in text and "Forgotten" in text and "+25%" in text
    assert "1,234 parameters more" in text and "exactly the base" in text
    text = module.verdict([base, row(7.0, 4.1, 9), row(6.6, 3.9, 1234)], names)
    assert "Nothing was learned" in text and "+10%" in text and "--lr" in text
    assert "Nothing was forgotten" in text and "exactly the base" not in text and "7.00" in text
    text = module.verdict([base, row(5.0, 4.0, 0)], {"new": "pydocs"})
    assert "orgotten" not in text and "more" not in text


# ---- The command ---------------------------------------------------------------------------------
@pytest.fixture
def ckpt(here):
    """A checkpoint whose new block alone was trained; it learned pycode and knew pydocs."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 32, 257))
    model = wake(upscale(base, "midus", **MEMORY))
    folder = str(here / "data")
    about = dict(tokenizer="bytes", settings={"train": "new"})
    texts = dict(dataset="pycode", data_dir=folder, old_dataset="pydocs", old_data_dir=folder)
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="pycode", data_dir=folder)
    save_checkpoint("ckpt.pt", model, **about, **texts)
    return model, about | texts


def figures_of(monkeypatch, *flags):
    if os.path.exists("figures.json"):
        os.remove("figures.json")
    assert call(monkeypatch, "eval.py", *flags, "--json", "figures.json") == 0
    with open("figures.json") as file:
        return json.load(file)


def test_both_texts_are_read_and_the_base_stands_beside(ckpt, monkeypatch, capsys):
    figures = figures_of(monkeypatch, "ckpt.pt")
    out = capsys.readouterr().out
    of_base = figures_of(monkeypatch, "base.pt")
    assert figures["dataset"] == "pycode" and figures["old"]["dataset"] == "pydocs"
    assert figures["base"]["nll"] == of_base["nll"] and of_base["base"] is None
    assert figures["base"]["nll"] != figures["nll"] != figures["old"]["nll"]
    line = next(line for line in out.splitlines() if line.startswith("token-level"))
    columns = [f"{part['token_perplexity']:.3f}" for part in (figures, figures["base"])]
    assert line.split()[2:4] == columns
    assert f"memory in block 2: {figures['usage']['2']['top1'] * 36:.0f} of its 36 slots" in out
    assert "new text: pycode test" in out and "old text: pydocs test" in out and "its base" in out

    # The keys of the file, and what else can be asked for.
    figures = figures_of(monkeypatch, "ckpt.pt", "--stride", "4", "--split", "valid")
    about = ("checkpoint", "dataset", "split", "tokenizer", "window", "stride", "parameters")
    assert [figures[name] for name in about[:6]] == ["ckpt.pt", "pycode", "valid", "bytes", 32, 4]
    report = ("tokens", "words", "bytes", "nll", "token_perplexity", "word_perplexity", "usage")
    report += ("bits_per_byte", "tokens_per_second", "slots", "base")
    assert set(figures) == {*about, *report, "old"}
    assert set(figures["old"]) == {*report, "dataset"}

    # Where all was trained, there is no base to show.
    model, about = ckpt
    save_checkpoint("all.pt", model, **about | {"settings": {"train": "all"}})
    assert figures_of(monkeypatch, "all.pt")["base"] is None


def test_a_dataset_that_is_named_is_read_alone_and_a_prompt_is_continued(ckpt, monkeypatch, capsys):
    figures = figures_of(monkeypatch, "ckpt.pt", "--dataset", "pydocs")
    assert figures["dataset"] == "pydocs" and figures["old"] is None
    assert "old text" not in capsys.readouterr().out
    assert (
        call(monkeypatch, "eval.py", "ckpt.pt", "--prompt", "def é", "--max_new_tokens", "5") == 0
    )
    assert "def é" in capsys.readouterr().out


def test_an_old_text_that_would_be_downloaded_is_left_out(ckpt, monkeypatch, capsys):
    model, about = ckpt
    save_checkpoint("a.pt", model, **about | {"old_dataset": "wikitext103"})
    assert figures_of(monkeypatch, "a.pt")["old"] is None
    assert "wikitext103, the old text, is left out" in capsys.readouterr().out


def test_a_folder_of_another_machine_is_not_made_here(ckpt, here, monkeypatch, capsys):
    """./data is read instead, or what --data_dir says."""
    model, about = ckpt
    elsewhere = str(here / "elsewhere" / "data")
    about |= {"data_dir": elsewhere, "old_data_dir": elsewhere}
    save_checkpoint("a.pt", model, **about)
    assert figures_of(monkeypatch, "a.pt")["nll"] == figures_of(monkeypatch, "ckpt.pt")["nll"]
    assert not os.path.exists(elsewhere)
    (here / "file").write_text("no folder")
    assert call(monkeypatch, "eval.py", "a.pt", "--data_dir", "file") == 2
    assert "name another with --data_dir" in capsys.readouterr().err


def test_json_never_replaces_a_file(ckpt, here, monkeypatch, capsys):
    (here / "mine.json").write_text("mine")
    assert call(monkeypatch, "eval.py", "ckpt.pt", "--json", "mine.json") == 2
    assert "mine.json exists" in capsys.readouterr().err
    assert (here / "mine.json").read_text() == "mine"


def test_weights_that_are_nan_end_in_a_sentence_and_write_no_json(ckpt, monkeypatch, capsys):
    model, about = ckpt
    with torch.no_grad():
        model.wte.weight.fill_(math.nan)
    save_checkpoint("nan.pt", model, **about)
    assert call(monkeypatch, "eval.py", "nan.pt", "--json", "figures.json") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "NaN" in error and not os.path.exists("figures.json")
    assert call(monkeypatch, "eval.py", "nan.pt", "--prompt", "One") == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "flags",
    [
        "ckpt.pt --stride 33",
        "ckpt.pt --stride 0",
        "ckpt.pt --temperature -1",
        "ckpt.pt --json no/where.json",
        "ckpt.pt --json ckpt.pt",
        "ckpt.pt --dataset x",
        "ckpt.pt --dataset text",
        "ckpt.pt --seed 1e30",
        "none.pt",
        "plain.pt",
    ],
)
def test_bad_input_gets_one_line_and_status_2(ckpt, monkeypatch, capsys, flags):
    save_checkpoint("plain.pt", GPT(GPTConfig(1, 1, 8, 32, 257)))  # names no tokenizer
    assert call(monkeypatch, "eval.py", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
