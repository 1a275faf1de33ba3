"""Evaluation: perplexity against cases computed by hand, usage against counts, the command."""

import json
import math

import numpy as np
import pytest
import torch

from conftest import call
from data import Split
from eval import count_usage, evaluate, sum_nll, usage
from model import GPT, GPTConfig, save_checkpoint
from test_model import CONFIG, wake


class Bigram(torch.nn.Module):
    """Knows the previous token alone, so its perplexity can be computed by hand."""

    def __init__(self, logits, block_size):
        super().__init__()
        self.wte = torch.nn.Embedding.from_pretrained(logits)
        self.config = GPTConfig(1, 1, 2, block_size, len(logits))

    def forward(self, tokens):
        return self.wte(tokens)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 100, 101, 203])
def test_every_token_after_the_first_is_scored_once_whatever_the_stride(length):
    logits = torch.randn(7, 7)
    tokens = np.random.default_rng(0).integers(0, 7, length).astype(np.uint16)
    logprob = logits.double().log_softmax(-1)
    by_hand = -sum(logprob[a, b].item() for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist()))
    for stride in range(1, 9):
        nll, count = sum_nll(Bigram(logits, 8), tokens, stride)
        assert count == length - 1 and nll == pytest.approx(by_hand, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    nll, count = sum_nll(Bigram(torch.zeros(50, 50), 16), np.arange(40, dtype=np.uint16))
    assert math.exp(nll / count) == pytest.approx(50)


def test_overlap_by_hand():
    """Window 4, stride 2, 8 tokens: which tokens each target may see."""
    seen = {}

    class Watching(Bigram):
        def forward(self, tokens):
            for row in tokens.tolist():
                for t, token in enumerate(row):
                    seen[token + 1] = max(seen.get(token + 1, 0), t + 1)
            return super().forward(tokens)

    sum_nll(Watching(torch.zeros(10, 10), 4), np.arange(8, dtype=np.uint16), stride=2)
    assert seen == {
        1: 1,
        2: 2,
        3: 3,
        4: 4,
        5: 3,
        6: 4,
        7: 4,
    }  # target: the longest context it was given


def test_windows_are_scored_as_in_a_plain_loop():
    torch.manual_seed(0)
    model, tokens = (
        wake(GPT(CONFIG)),
        np.random.default_rng(0).integers(0, 50, 70).astype(np.uint16),
    )
    for stride in (12, 5):
        total, done, start = 0.0, 0, 0
        while done < 69:
            piece = torch.from_numpy(tokens[start : start + 13].astype(np.int64))[None]
            logprob = model(piece[:, :-1]).log_softmax(-1)[0].gather(-1, piece[0, 1:, None])
            new = start + piece.size(1) - 1 - done
            total -= logprob[-new:].double().sum().item()
            done, start = (
                done + new,
                min(start + stride, 69 - 12),
            )  # the last window ends with the text
        assert sum_nll(model, tokens, stride)[0] == pytest.approx(total, rel=1e-6)


def test_how_many_windows_go_at_once_changes_nothing_but_rounding():
    torch.manual_seed(0)
    model, tokens = (
        wake(GPT(CONFIG)),
        np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16),
    )
    one = sum_nll(model, tokens, 5, at_once=1)[0]
    for windows in (2, 7, 100):
        assert sum_nll(model, tokens, 5, at_once=windows)[0] == pytest.approx(one, rel=1e-6)


def test_refusals():
    model = Bigram(torch.zeros(5, 5), 8)
    for stride in (0, 9):
        with pytest.raises(ValueError, match="stride must lie between 1 and the window, 8"):
            sum_nll(model, np.zeros(20, dtype=np.uint16), stride)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        sum_nll(model, np.zeros(1, dtype=np.uint16))


def test_usage_against_plain_counts():
    torch.manual_seed(0)
    model = wake(GPT(CONFIG))
    tokens = torch.randint(0, 50, (2, 12))
    reads = []
    handle = model.h[4].memory.product_keys.register_forward_hook(
        lambda module, inputs, out: reads.append(out)
    )
    with count_usage(model) as counts, torch.no_grad():
        model(tokens)
    handle.remove()
    assert set(counts) == {1, 4}
    weights, slots = reads[0]
    for head in range(2):
        used = slots[:, :, head].unique()
        assert (counts[4]["topk"][head] > 0).nonzero().flatten().tolist() == used.tolist()
        assert (
            counts[4]["topk"][head].sum() == 2 * 12 * 3 and counts[4]["top1"][head].sum() == 2 * 12
        )
        total = sum(
            weights[b, t, head, j].item()
            for b in range(2)
            for t in range(12)
            for j in range(3)
            if slots[b, t, head, j] == used[0]
        )
        assert counts[4]["weight"][head, used[0]].item() == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        model(tokens)  # the hooks are gone
    assert counts[4]["top1"].sum() == 2 * 2 * 12


def test_usage_figures_of_extreme_cases():
    one, every = torch.zeros(2, 16), torch.ones(2, 16)
    one[:, 3] = 5
    figures = usage({"top1": one, "topk": one, "weight": one.double()})
    assert figures == {"top1": 1 / 16, "topk": 1 / 16, "kl": pytest.approx(math.log(16))}
    assert usage({"top1": one, "topk": every, "weight": every.double()}) == {
        "top1": 1 / 16,
        "topk": 1.0,
        "kl": pytest.approx(0, abs=1e-12),
    }


def test_perplexities_follow_from_one_nll():
    model = Bigram(torch.zeros(4, 4), 8)
    model.config = GPTConfig(1, 1, 2, 8, 4)
    report = evaluate(model, Split(np.zeros(33, dtype=np.uint16), words=16, bytes=64, identity=""))
    assert report["token_perplexity"] == pytest.approx(4)  # 32 tokens at ln 4 each
    assert report["word_perplexity"] == pytest.approx(4**2)
    assert report["bits_per_byte"] == pytest.approx(1.0)


def test_the_command(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    shape = dict(n_keys=6, top_k=3, d_latent=4, new=(1,))
    model = wake(GPT(GPTConfig(3, 2, 16, 32, 257, "TMT", **shape)))
    (tmp_path / "text").mkdir()
    text = " \n = One = \n \n Some words . \n" * 20
    (tmp_path / "text" / "wiki.test.tokens").write_text(text)
    about = dict(tokenizer="bytes", dataset="wikitext2", data_dir=str(tmp_path / "text"))
    save_checkpoint(str(tmp_path / "a.pt"), model, **about)

    def run(*flags):
        return call(monkeypatch, "eval.py", "a.pt", *flags), capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    status, out = run("--json", "figures.json")
    assert status == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, key in (("token-level", "token_perplexity"), ("word-level", "word_perplexity")):
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert line.split()[2] == f"{figures[key]:.3f}"
    assert "memory in block 2, of 36 slots:" in out and figures["usage"]["2"]["topk"] > 0
    assert figures["tokens"] == len(text) - 1 and figures["words"] == 20 * (6 + 4)
    status, out = run("--stride", "4")
    assert status == 0 and "stride 4" in out
    status, out = run("--prompt", "One", "--max_new_tokens", "5", "--temperature", "0")
    assert status == 0 and "One" in out
    for line in (
        "--stride 33",
        "--temperature -1",
        "--json no/where.json",
        "--json a.pt",
        "--dataset x",
        "--seed 1e30",
    ):
        assert run(*line.split())[0] == 2


def test_samples_of_odd_models_and_temperatures(tmp_path, monkeypatch, capsys):
    """A vocabulary larger than the tokenizer's; a temperature that no half type holds; NaN."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(1, 1, 8, 32, 600))
    with torch.no_grad():
        model.wte.weight[257:] = 10 * model.wte.weight[257:]  # likely, and unknown to the tokenizer
    save_checkpoint("large.pt", model, tokenizer="bytes")
    for temperature in ("0", "1e-30", "1", "1e39"):
        flags = ("--prompt", "One", "--max_new_tokens", "40", "--temperature", temperature)
        assert call(monkeypatch, "eval.py", "large.pt", *flags) == 0
        assert "One" in capsys.readouterr().out

    with torch.no_grad():
        model.wte.weight.fill_(math.nan)
    save_checkpoint("nan.pt", model, tokenizer="bytes")
    assert call(monkeypatch, "eval.py", "nan.pt", "--prompt", "One") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_checkpoint_that_does_not_name_its_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("plain.pt", GPT(GPTConfig(1, 1, 8, 32, 257)))
    for script in ("eval.py", "experiments/analyze.py"):
        assert call(monkeypatch, script, "plain.pt") == 2
        assert "does not say its tokenizer" in capsys.readouterr().err


def test_a_data_folder_that_cannot_be(tmp_path, monkeypatch, capsys):
    """Named by a flag, or by a checkpoint that comes from another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    about = dict(tokenizer="bytes", dataset="pydocs", data_dir=str(tmp_path / "file" / "data"))
    save_checkpoint("a.pt", GPT(GPTConfig(1, 1, 8, 32, 257)), **about)
    for script, *flags in (
        ("eval.py", "a.pt"),
        ("eval.py", "a.pt", "--data_dir", "file"),
        ("train.py", "--upscale", "none", "--data_dir", "file"),
        ("experiments/compare.py", "--base", "a.pt", "--methods", "none"),
    ):
        assert call(monkeypatch, script, *flags) == 2
        assert "name another with --data_dir" in capsys.readouterr().err
