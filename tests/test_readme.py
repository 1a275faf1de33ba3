"""The README holds what it promises: its commands are accepted, its files exist, its example runs."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import call

import eval as evaluation
import train
import upscale

import analyze
import bench
import compare


@pytest.fixture(scope="session")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def commands(readme, script):
    """The README's commands that call `script`, each as a list of arguments."""
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.S)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith(f"python {script}")]


class Reached(Exception):
    """Everything that can be refused has been looked at."""


def test_train_commands_are_accepted(readme, tmp_path, monkeypatch):
    def reached(*args):
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_dataset", reached)
    from model import GPT, GPTConfig, save_checkpoint

    found = commands(readme, "train.py")
    assert ["train.py", "--upscale", "midus", "--dataset", "wikitext103"] in found and len(found) >= 5
    for arguments in found:
        if "--base" in arguments and arguments[arguments.index("--base") + 1].endswith(".pt"):
            base = GPT(GPTConfig(4, 4, 128, 64, 257, new=(1,)))  # as the command before would have left it
            save_checkpoint(arguments[arguments.index("--base") + 1], base, tokenizer="bytes", dataset="pydocs")
        if "--resume" not in arguments:
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(Reached):
                train.main()


def test_other_commands_name_flags_that_exist(readme, monkeypatch, capsys):
    experiments = [(f"experiments/{module.__name__}.py", module) for module in (analyze, bench, compare)]
    for script, module in (("eval.py", evaluation), ("upscale.py", upscale), ("train.py", train), *experiments):
        assert commands(readme, script) or script == "experiments/bench.py", script
        for arguments in commands(readme, script):
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit):
                module.main()
            help_text = capsys.readouterr().out
            assert all(word in help_text for word in arguments if word.startswith("--")), arguments


def test_the_main_command_and_its_evaluation(readme, pydocs, tmp_path, monkeypatch, capsys):
    """The first command as it stands, with fewer tokens to train on and to evaluate."""
    main = ["train.py", "--upscale", "midus"]
    assert main in commands(readme, "train.py")
    short = [*main, "--base_tokens", "2e4", "--tokens", "2e4"]
    for text in pydocs.glob("pydocs-*/wiki.*.txt"):
        short_text = tmp_path / "data" / text.relative_to(pydocs)
        short_text.parent.mkdir(parents=True, exist_ok=True)
        short_text.write_bytes(text.read_bytes()[: 10_000_000 if "train" in text.name else 10_000])
    monkeypatch.chdir(tmp_path)
    for arguments in (short, ["train.py", "--resume"], ["eval.py", "ckpt.pt"]):
        assert call(monkeypatch, *arguments) == 0
    assert "token-level perplexity" in capsys.readouterr().out


def test_files_it_names_exist(readme, root):
    for name in re.findall(r"[`(]((?:[\w.]+/)*[\w.]+\.(?:py|txt|md|svg|png|jsonl))[`)]", readme):
        assert (root / name).exists(), name


def test_methods_it_names_exist(readme):
    for arguments in commands(readme, "experiments/compare.py"):
        assert compare.parse(arguments[arguments.index("--methods") + 1])


@pytest.mark.parametrize("name, lines", [
    ("hml.py", 250), ("model.py", 350), ("upscale.py", 250), ("data.py", 350), ("train.py", 400), ("eval.py", 250),
])  # fmt: skip
def test_files_keep_to_their_length(root, name, lines):
    assert len((root / name).read_text(encoding="utf-8").splitlines()) <= lines


def test_python_example_runs(readme, root):
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    run = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
