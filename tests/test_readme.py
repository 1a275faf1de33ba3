"""The README holds what it promises.

Its commands run, its files exist, its lengths and figures are true.
"""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

import bench
import compare
import data
import model
import train
from conftest import call

PAGES = ("README.md", "experiments/questions.md", "experiments/speed.md", "experiments/inside.md")


@pytest.fixture(scope="session")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def commands(text):
    """The commands of a page's sh blocks, in order, each as a list of words."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("  #")[0].split("&&"):
                if part.strip():
                    found.append(shlex.split(part))
    return found


@pytest.fixture
def here(pydocs, tmp_path, monkeypatch):
    """A working folder where every data set and GPT-2 are there already, all of them small."""
    monkeypatch.chdir(tmp_path)
    for text in pydocs.glob("pydocs-*/wiki.*.txt"):
        some = text.read_bytes()[: 60_000 if "train" in text.name else 2_500]
        short = tmp_path / "data" / text.relative_to(pydocs)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_bytes(some)
        for ending in (".raw", ".tokens"):
            own = (tmp_path / "data" / text.name).with_suffix(ending)
            own.write_bytes(b" = Heading = \n" + some)
    config = model.GPTConfig(2, 1, 16, 1024, 50257)
    for module in (model, train):
        monkeypatch.setitem(module.PRETRAINED, "gpt2", config)
    monkeypatch.setattr(model, "load_gpt2", lambda path: model.GPT(config))
    for module in (model, data):
        monkeypatch.setattr(module, "download", lambda *args, **more: None)  # all is there
    return tmp_path


SHORTER = {  # what each script's commands get on top; None: another test has them
    "train.py": "--tokens 256 --block_size 32 --batch_size 4 --overwrite",
    "compare.py": "--tokens 256 --seeds 1 --lrs 1e-3 --memory_lrs 1e-2 --jobs 1 --eval_tokens 256",
    "analyze.py": "--tokens 256",
    "eval.py": "--device cpu",
    "upscale.py": "--overwrite",
    "bench.py": "--quick --lengths 16 --tables tricks,blocks",
    "conventions.py": "--device cpu",
    "hml.py": None,
    "harness.py": None,
}


def flags_on_top(script, words):
    """The flags that make a command short enough for a test."""
    if "--resume" in words or "--prompt" in words or words[-1] == "--help":
        return []
    flags = SHORTER[script].split()
    from_scratch = "--upscale" in words and not {"none", "--base", "wikitext103"} & {*words}
    if script == "train.py" and from_scratch:
        flags += ["--base_tokens", "256"]
    return flags


def test_commands_run(root, here, gpt2_vocabulary, monkeypatch, capsys):
    """Every command of the pages but those that install or test, in order.

    Shorter, and with a small GPT-2.
    """
    monkeypatch.setattr(compare, "make_apart", compare.make)
    monkeypatch.setattr(bench, "SIZES", bench.SIZES[:1])
    other = ("pip", "git", "cd", "source", "bash")
    tried = []
    for page in PAGES:
        for program, *words in commands((root / page).read_text(encoding="utf-8")):
            if program in other or "pytest" in words or "venv" in words:
                continue
            if program == "torchrun":  # the same with several processes: see test_train.py
                words = words[2:]
            script = words[0].split("/")[-1]
            assert program in ("python", "torchrun") and script in SHORTER, words
            no_picture = "--plot" in words and not importlib.util.find_spec("matplotlib")
            no_llama = "smollm2" in words and not importlib.util.find_spec("gguf")
            if SHORTER[script] is None or no_picture or no_llama:
                continue
            status = call(monkeypatch, *words, *flags_on_top(script, words))
            assert status == 0, (words, capsys.readouterr().err)
            capsys.readouterr()
            tried.append(words)
    assert ["train.py", "--upscale", "midus"] in tried and len(tried) > 12


def test_files_it_names_exist(root):
    for page in PAGES:
        folder = (root / page).parent
        text = (root / page).read_text(encoding="utf-8")
        for name in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / name).exists(), (page, name)
        for name in re.findall(r"`((?:[\w.]+/)*[\w-]+\.py)`", text):
            assert (root / name).exists() or (root / "experiments" / name).exists(), (page, name)


def test_flags_it_names_exist(root):
    scripts = [*root.glob("*.py"), *root.glob("experiments/*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts)
    settings = {field.name for field in dataclasses.fields(train.Settings)}
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        for name in {*re.findall(r"`--([\w-]+)", text)} - {"long"}:
            name = name.removeprefix("no-")
            assert name in settings or f'"--{name}"' in sources, (page, name)


def test_the_quality_figures_are_those_of_the_results(readme, root):
    table = (root / "experiments" / "results" / "main.md").read_text(encoding="utf-8")
    for figure in ("110.66", "159.11", "139.76", "137.21", "108.63"):
        assert figure in readme and figure in table


def test_python_example_runs(readme, root):
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    run = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
