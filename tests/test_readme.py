"""The README holds what it promises.

Its commands run, its files exist, its lengths and figures are true.
"""

import importlib.util
import re
import shlex
import subprocess
import sys

import bench
import compare
import pytest
from conftest import call

import data
import model
import train


@pytest.fixture(scope="session")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def commands(text):
    """The commands of a page's sh blocks, in order, each as a list of words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [
        line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip()]


@pytest.fixture
def here(pydocs, tmp_path, monkeypatch):
    """A working folder where every data set and GPT-2 are there already, all of them small."""
    monkeypatch.chdir(tmp_path)
    for text in pydocs.glob("pydocs-*/wiki.*.txt"):
        some = text.read_bytes()[: 60_000 if "train" in text.name else 2_500]
        short = tmp_path / "data" / text.relative_to(pydocs)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_bytes(some)
        for ending in ("raw", "tokens"):
            (tmp_path / "data" / text.name).with_suffix(f".{ending}").write_bytes(
                b" = Heading = \n" + some
            )
    config = model.GPTConfig(2, 1, 16, 1024, 50257)
    for module in (model, train):
        monkeypatch.setitem(module.PRETRAINED, "gpt2", config)
    monkeypatch.setattr(model.GPT, "from_pretrained", lambda *args: model.GPT(config))
    monkeypatch.setattr(data, "download", None)  # nothing needs it
    return tmp_path


def test_commands_run(readme, here, gpt2_vocabulary, monkeypatch, capsys):
    """Every command of the page but those that install or test, in order.

    Shorter, and with a small GPT-2.
    """
    found = [
        words
        for words in commands(readme)
        if words[0] not in ("pip", "git", "cd") and "pytest" not in words
    ]
    assert ["python", "train.py", "--upscale", "midus"] in found
    assert ["python", "train.py", "--upscale", "midus", "--dataset", "wikitext103"] in found
    monkeypatch.setattr(compare, "run_apart", compare.run)
    monkeypatch.setattr(bench, "SIZES", bench.SIZES[:1])
    shorter = {
        "train.py": "--tokens 256 --block_size 32 --batch_size 4 --overwrite",
        "compare.py": "--tokens 256 --seeds 1 --lrs 1e-3 --jobs 1 --valid_tokens 256",
        "analyze.py": "--tokens 256",
        "eval.py": "--device cpu",
        "upscale.py": "--overwrite",
        "bench.py": "--quick --lengths 16",
        "hml.py": None,
        "harness.py": None,
    }
    for program, *words in found:
        if program == "torchrun":  # the same with several processes: see test_train.py
            words = words[2:]
        assert (
            program in ("python", "torchrun") and (script := words[0].split("/")[-1]) in shorter
        ), words
        if (
            shorter[script] is None
        ):  # see test_hml.py, and test_harness.py: its tasks would be downloaded
            continue
        if "--plot" in words and not importlib.util.find_spec("matplotlib"):
            continue
        flags = [] if "--resume" in words or words[-1] == "--help" else shorter[script].split()
        from_scratch = (
            "--upscale" in words
            and not {"none", "--base", "wikitext103"} & {*words}
            or "scratch" in words
        )
        flags += ["--base_tokens", "256"] if script == "train.py" and from_scratch else []
        flags = [] if script == "eval.py" and "--prompt" in words else flags
        assert call(monkeypatch, *words, *flags) == 0, (words, capsys.readouterr().err)
        capsys.readouterr()


def test_files_it_names_exist(readme, root):
    names = re.findall(r"[`(]((?:[\w.]+/)*[\w.-]+\.(?:py|txt|md|svg|png|jsonl))[`)#]", readme)
    assert len(names) > 10
    assert not [
        n for n in names if not (root / n).exists() and not (root / "experiments" / n).exists()
    ]


def test_flags_it_names_exist(readme, root):
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in [*root.glob("*.py"), *root.glob("experiments/*.py")]
    )
    flags = {*re.findall(r"`(--\w+)", readme)} - {"--long"}
    assert len(flags) > 10 and all(f'"{flag}"' in sources for flag in flags), flags


@pytest.mark.parametrize(
    "name, lines",
    [
        ("hml.py", 250),
        ("model.py", 350),
        ("upscale.py", 250),
        ("data.py", 350),
        ("train.py", 400),
        ("eval.py", 250),
    ],
)
def test_files_keep_to_their_length(root, readme, name, lines):
    assert len((root / name).read_text(encoding="utf-8").splitlines()) <= lines
    assert re.search(rf"\[{name}\].*\b{lines} lines\b", readme)


def rows(text):
    """The cells of every row of the tables in a page, by the first cell."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0]: {cell.strip() for cell in line.split(" | ")} for line in lines}


def test_figures_of_the_comparison_are_those_of_the_results(readme, root):
    quoted = rows(readme.split("## Results: quality")[1].split("\n## ")[0])
    measured = rows((root / "experiments" / "results" / "main.md").read_text(encoding="utf-8"))
    assert len(quoted) > 8 and all(
        cells <= measured[method] for method, cells in quoted.items() if method != "base"
    )


def test_python_example_runs(readme, root):
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    run = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
