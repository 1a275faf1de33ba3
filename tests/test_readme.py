"""The pages hold what they promise.

Their commands can be parsed, those of the set-up run, the files and flags that they name exist, and
figures are those of the results.
"""

import hashlib
import importlib
import json
import re
import shlex
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import common
import data
import model
import upscale
from conftest import ROOT, call, same_weights
from test_model import openai_layout
from upscale import METHODS

PAGES = ["README.md", *(f"experiments/{page.name}" for page in ROOT.glob("experiments/*.md"))]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """The commands of a page's sh blocks that run a script of ours, in order, as lists of words."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text_of(page), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split("  #|&&|;", line.split("  #")[0]):
                words = shlex.split(part.split(">")[0])
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts and words[0] in ("python", "torchrun"):
                    found.append(words[scripts[0] :])
    return found


class Parsed(Exception):
    pass


def parse(monkeypatch, script, words):
    """Gives the words to the script's own parser; raises SystemExit if it refuses them."""
    parse_args = common.Parser.parse_args

    def parse_only(self, *args):
        parse_args(self, *args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            importlib.import_module(Path(script).stem).main()


@pytest.fixture
def examples():
    """The README's examples in Python have been run; one adds a row to METHODS, for the while."""
    before = dict(METHODS)
    for block in re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S):
        exec(block, dict(vars(upscale)))
    yield set(METHODS) - set(before)
    METHODS.clear()
    METHODS.update(before)


def test_the_python_examples_run(examples, capsys):
    """A method that they add is silent at first, so its model starts as the base."""
    base = model.GPT(model.GPTConfig(4, 2, 32, 16, 50))
    tokens = torch.randint(50, (2, 16))
    for method in examples:
        deeper = upscale.upscale(base, method)
        assert deeper.config.new and torch.equal(deeper(tokens), base(tokens))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_parsed(page, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    lacking = set()
    for script, *words in commands(page):
        assert (ROOT / script).exists(), script
        if script.endswith("hub.py") and not find_spec("accelerate"):
            lacking.add("hub.py's commands need transformers and accelerate")
        elif "--help" not in words and "Parser(" in text_of(script):
            parse(monkeypatch, script, words)
        else:
            assert not words or "--help" in words
    if lacking:
        pytest.skip(f"all others can; {', '.join(lacking)}")


def test_the_set_up_runs_as_written(here, monkeypatch, capsys):
    """Shorter, and on little text."""
    train_words = ["train.py", "--upscale", "midus"]
    eval_words = ["eval.py", "ckpt.pt"]
    first = [words for words in commands("README.md") if words[0] in ("train.py", "eval.py")][:2]
    assert first == [train_words, eval_words]
    assert call(monkeypatch, *train_words, "--base_tokens", "3e3", "--tokens", "3e3") == 0
    out = capsys.readouterr().out
    assert "stack  T M T T M T" in out and "next: python eval.py ckpt.pt" in out
    assert call(monkeypatch, *eval_words) == 0
    assert "its base" in capsys.readouterr().out


def test_the_command_for_a_gpu_runs_as_written(gpt2_vocabulary, server, here, monkeypatch):
    """With a small GPT-2 and a small archive, both from this machine.

    --preset, which goes by the width, is added: a batch of 32 in 8 parts, one epoch.
    """
    torch.manual_seed(0)
    original = model.GPT(model.GPTConfig(2, 1, 64, block_size=16, vocab_size=50257))
    torch.save(openai_layout(original), "gpt2.bin")
    text = "\n".join(data.topics[name] for name in sorted(data.topics))
    parts = {"train": text[:8_000], "valid": text[8_000:9_000], "test": text[9_000:10_000]}
    with zipfile.ZipFile("made.zip", "w") as archive:
        for split, part in parts.items():
            archive.writestr(f"wikitext-103-raw/wiki.{split}.raw", part)
    sha256 = {}
    for name in ("gpt2.bin", "made.zip"):
        server.pages[name] = Path(name).read_bytes()
        sha256[name] = hashlib.sha256(server.pages[name]).hexdigest()
    monkeypatch.setattr(model, "GPT2_URL", server.url + "{}.bin")
    monkeypatch.setitem(model.GPT2_SHA256, "gpt2", sha256["gpt2.bin"])
    monkeypatch.setitem(model.PRETRAINED, "gpt2", original.config)
    entry = data.WIKITEXT["wikitext103"]
    entry = entry._replace(urls=[server.url + "made.zip"], sha256=sha256["made.zip"])
    monkeypatch.setitem(data.WIKITEXT, "wikitext103", entry)

    words = "train.py --upscale midus --dataset wikitext103".split()
    assert words in commands("README.md")
    assert call(monkeypatch, *words, "--preset", "gpt2") == 0
    deeper, info = model.load_checkpoint("ckpt.pt")
    settings, progress = info["settings"], info["progress"]
    assert deeper.config.blocks == "TMT" and "old_dataset" not in info
    assert (settings["base"], settings["grad_accum"], settings["batch_size"]) == ("gpt2", 8, 32)
    assert progress["step"] == settings["tokens"] // (32 * 16) >= 2  # one epoch
    assert same_weights(deeper.h[0], original.h[0]) and same_weights(deeper.h[2], original.h[1])

    assert call(monkeypatch, "eval.py", "ckpt.pt", "--stride", "8", "--json", "figures.json") == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["dataset"] == "wikitext103" and figures["bytes"] == len(parts["test"].encode())
    assert figures["base"]["nll"] > figures["nll"]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = text_of(page)
    folder = (ROOT / page).parent
    for name in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (folder / name).exists(), name
    for name in re.findall(r"`((?:[\w.]+/)*[\w-]+\.py)`", text):
        assert any((ROOT / place / name).exists() for place in ("", "experiments", "tests")), name


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), ROOT / "tests" / "conftest.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts)
    for name in re.findall(r"`--([\w-]+)", text_of(page)):
        assert f'"--{name.removeprefix("no-")}"' in sources, name


def test_figures_of_the_output_are_those_of_the_table():
    """Of the first run, as the README shows it and as it is compared with others."""
    text = text_of("README.md")
    table = "".join(line for line in text.splitlines() if line.startswith("| "))
    (output,) = re.findall(r"```\n(perplexity: .*?)```", text, re.S)
    figures = re.findall(r"\d+\.\d{4}", output)
    assert len(figures) == 6
    for figure in figures:
        assert f"| {float(figure):.2f} |" in table, figure
