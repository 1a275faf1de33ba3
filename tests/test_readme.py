"""The pages hold what they promise.

Their commands can be parsed, the first ones run, the files and flags that they name exist, and
figures are those of the output.
"""

import importlib
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import common
import model
import train
import upscale
from conftest import ROOT, call
from upscale import METHODS

PAGES = ["README.md", *(f"experiments/{page.name}" for page in ROOT.glob("experiments/*.md"))]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """The commands of a page's sh blocks that run a script of ours, in order, as lists of words."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text_of(page), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split("  #")[0].split(">")[0])
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

    def any_base(name):
        return train.Base(name, None, None, {"dataset": "pydocs"})

    with monkeypatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", parse_only)
        patch.setattr(train, "find_base", any_base)
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
    for script, *words in commands(page):
        assert (ROOT / script).exists(), script
        if script.endswith("hub.py") and not find_spec("accelerate"):
            continue
        if "--help" not in words and "Parser(" in text_of(script):
            parse(monkeypatch, script, words)


def test_the_first_commands_run_as_written(here, monkeypatch, capsys):
    """Shorter, and on little text."""
    train_words = ["train.py", "--upscale", "midus"]
    eval_words = ["eval.py", "ckpt.pt"]
    assert commands("README.md")[:2] == [train_words, eval_words]
    assert call(monkeypatch, *train_words, "--base_tokens", "3e3", "--tokens", "3e3") == 0
    out = capsys.readouterr().out
    assert "stack   T M T T M T" in out and "next: python eval.py ckpt.pt" in out
    assert call(monkeypatch, *eval_words) == 0
    assert "slots in use" in capsys.readouterr().out


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
    """Those of options stand in METHODS, all others in the source."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), ROOT / "tests" / "conftest.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts)
    options = {option.name for row in METHODS.values() for option in row.options}
    for name in re.findall(r"`--([\w-]+)", text_of(page)):
        assert name in options or f'"--{name}"' in sources, name


def test_figures_of_the_output_are_those_of_the_table():
    """Of the first run, as the README shows it and as it is compared with others."""
    text = text_of("README.md")
    table = "".join(line for line in text.splitlines() if line.startswith("| "))
    (output,) = re.findall(r"```\nthe first 100,000(.*?)```", text, re.S)
    (end,) = re.findall(r"^midus, end  .*", output, re.M)
    code, _, documentation, _ = re.findall(r"\d+\.\d{4}", end)
    assert f"| {float(code):.2f} | {float(documentation):.2f} |" in table
