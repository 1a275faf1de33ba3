"""The comparison: what names a run, how rates are found, and one small study from end to end."""

import json
import os
import shutil
from concurrent.futures import Future

import pytest
import torch

import compare
from conftest import call
from hml import HeadwiseMemory
from model import GPT, GPTConfig, save_checkpoint
from upscale import METHODS, upscale

FLAGS = "--base base.pt --old_dataset text --device cpu --tokens 512 --seeds 2 --jobs 1".split()
FLAGS += (
    "--dtype float32 --results results.jsonl --methods llama-pro midus:n_keys=8:top_k=4".split()
)
# One method, with its rate: two runs, and no trials.
SHORT = [*FLAGS[:-2], "llama-pro:lr=1e-2"]


class HereAndNow:
    """A pool that makes runs in this process: a new one takes seconds to import torch."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with a tiny base and two texts."""
    text = " = Title = \n the cat sat on the mat , and the dog sat on the cat . \n" * 60
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
        (tmp_path / f"{split}.txt").write_text("quite another text, " * 60)
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    about = {"tokenizer": "bytes", "dataset": "wikitext2", "data_dir": str(tmp_path)}
    save_checkpoint(str(tmp_path / "base.pt"), base, **about)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(compare, "LRS", (1e-3, 1e-2, 1e-1))
    monkeypatch.setattr(compare, "MEMORY_LRS", (1e-2, 1e-1, 1.0))
    return tmp_path


def lines():
    with open("results.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_study_is_made_once_and_read_again(study, monkeypatch, capsys):
    assert call(monkeypatch, "compare.py", *FLAGS) == 0
    first = capsys.readouterr().out
    assert "| llama-pro: two copies" in first and "| the base |" in first

    # Trials on seed 0 and validation text, finals on seeds 1 and 2 and the test splits.
    runs = lines()
    finals = [run for run in runs if run["split"] == "test"]
    assert sorted((run["method"], run["seed"]) for run in finals) == [
        ("llama-pro", 1),
        ("llama-pro", 2),
        ("midus", 1),
        ("midus", 2),
    ]
    assert all(run["seed"] == 0 for run in runs if run["split"] == "valid")
    assert {*finals[0]["end"]} == {"new", "old"}

    # The rates of the finals are those of the best trials.
    for method in ("llama-pro", "midus"):
        trials = [run for run in runs if run["split"] == "valid" and run["method"] == method]
        best = min(trials, key=lambda run: run["end"]["new"])
        (lr,) = {run["lr"] for run in finals if run["method"] == method}
        assert lr == best["lr"]

    # Nothing is made again, even if a crash has cut the last line.
    with open("results.jsonl", "a") as file:
        file.write('{"base": "cut')
    assert call(monkeypatch, "compare.py", *FLAGS) == 0
    again = capsys.readouterr().out
    assert len(lines()) == len(runs)  # the cut line is gone
    assert "to make" not in again and again.split("token-level")[1] == first.split("token-level")[1]


def test_a_changed_method_is_made_anew_or_read_as_stale(study, monkeypatch, capsys):
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    count = len(lines())
    monkeypatch.setattr(compare, "hash_of_code", lambda name: "other")
    assert call(monkeypatch, "compare.py", *SHORT, "--stale") == 0
    assert len(lines()) == count
    capsys.readouterr()
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    assert "made by other code; --stale would read them" in capsys.readouterr().out
    assert len(lines()) > count


def test_runs_on_another_base_are_not_read(study, monkeypatch, capsys):
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    others = [dict(run, base="of another machine") for run in lines()]
    with open("results.jsonl", "w") as file:
        file.writelines(json.dumps(run) + "\n" for run in others)
    capsys.readouterr()
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    assert f"the {len(others)} runs in it are on other bases" in capsys.readouterr().out
    assert len(lines()) == 2 * len(others)


def test_a_changed_text_is_another_run(study, monkeypatch):
    """Whichever split has changed: test.txt of the old text too."""
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    count = len(lines())
    (study / "test.txt").write_text("not what it was, " * 60)
    assert call(monkeypatch, "compare.py", *SHORT) == 0
    assert len(lines()) == 2 * count


def test_the_hash_sees_code_and_no_prose(tmp_path, monkeypatch):
    root = compare.ROOT
    for file in ("hml.py", "model.py", "upscale.py", "train.py"):
        shutil.copyfile(os.path.join(root, file), tmp_path / file)
    (tmp_path / "experiments").mkdir()
    shutil.copyfile(
        os.path.join(root, "experiments/methods.py"), tmp_path / "experiments/methods.py"
    )
    names = ("llama-pro", "pkm", "lesa")
    monkeypatch.setattr(compare.inspect, "getsourcefile", lambda function: "upscale.py")
    monkeypatch.setattr(compare, "ROOT", str(tmp_path))
    before = {name: compare.hash_of_code(name) for name in names}

    def changed(file, old, new):
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))
        after = {name: compare.hash_of_code(name) for name in names}
        (tmp_path / file).write_text(text)
        return [name for name in names if after[name] != before[name]]

    assert changed("hml.py", "The k largest of", "Of all the k largest of") == []
    assert changed("hml.py", "# (..., n), worst first", "# worst first") == []
    assert changed("train.py", "0.1 + 0.45", "0.2 + 0.4") == [*names]
    assert changed("upscale.py", "    silence(model.h[i])", "    pass") == ["llama-pro"]
    assert changed("experiments/methods.py", 'values="plain"', 'values="hive"') == ["pkm"]
    assert changed("experiments/methods.py", "lr=1e-3", "lr=2e-3") == ["lesa"]


@pytest.mark.parametrize("best, made", [(2, [1, 2, 3]), (3, [1, 2, 3, 4]), (4, [1, 2, 3, 4])])
def test_a_search_for_a_rate_stops_between_two_worse_ones(best, made):
    class Found:
        runs = {}

        def find(self, run):
            return self.runs.get(run["lr"])

    results = Found()
    results.runs = {}

    def make(missing):
        for run in missing:
            results.runs[run["lr"]] = {"end": {"new": abs(run["lr"] - best)}}

    trials = {"method": {lr: {"lr": lr} for lr in (0, 1, 2, 3, 4)}}
    assert compare.search(trials, results, make) == {"method": best}
    assert sorted(results.runs) == made


def test_multiplications_are_counted():
    """Against the layer's own sizes: every matrix once, of the bank what is read."""
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    model = upscale(base, "midus", n_new=1, n_keys=8, top_k=4, d_latent=6, query="token")
    attention = 16 * 3 * 16 + 16 * 16
    scores = 2 * 2 * 8 * 4
    pooling_and_projection = 2 * 4 * 6 + 2 * 6 * 8
    assert compare.multiplications(model) == attention + scores + pooling_and_projection
    assert compare.multiplications(upscale(base, "llama-pro", n_new=1)) == 12 * 16 * 16
    memory = HeadwiseMemory(2, 8, 8, 4, 6)
    assert memory.product_keys.keys.numel() == scores


def test_methods_are_read_from_words():
    name, options = compare.read_method("midus:query=token:n_keys=64:positions=1,3:lr=3e-3")
    assert name == "midus"
    assert options == {"query": "token", "n_keys": 64, "positions": [1, 3], "lr": 0.003}
    assert compare.read_method("solar:n_new=2:train=all")[1] == {"n_new": 2, "train": "all"}
    for words in ("magic", "solar:every=2", "midus:n_keys", "none:n_keys=3"):
        with pytest.raises(ValueError, match="--methods"):
            compare.read_method(words)


def test_every_row_of_every_table_can_be_built():
    base = GPT(GPTConfig(4, 4, 128, 16, 257))
    for table in compare.TABLES.values():
        for row in table:
            name, options = compare.read_method(row.method)
            if name not in ("lesa", "opt-deus"):  # these compute for seconds
                model, what = compare.build(base, name, options)
                assert what == "new" or name == "none"
                assert options.get("lr", 0) == 0 or options["lr"] < 1


def test_a_row_added_to_the_table_is_compared(study, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "mine", METHODS["llama-pro"])
    assert call(monkeypatch, "compare.py", *FLAGS[:-2], "mine:lr=1e-2") == 0
    assert "| mine:lr=1e-2 |" in capsys.readouterr().out


def test_what_cannot_be_is_refused(study, monkeypatch, capsys):
    assert call(monkeypatch, "compare.py", "elsewhere") == 2
    assert "there is no table elsewhere" in capsys.readouterr().err
    for words, sentence in (
        (["--methods", "midus:top_k=1"], "top_k must lie between 2"),
        (["--methods", "magic"], "magic is none of"),
        (["--base", "none.pt"], "there is no checkpoint"),
        (["--results", "base.pt"], "must end in .jsonl"),
    ):
        assert call(monkeypatch, "compare.py", *FLAGS, *words) == 2
        assert sentence in capsys.readouterr().err
    (study / "results.jsonl").write_text('{"a": 1}\nno\n')
    assert call(monkeypatch, "compare.py", *FLAGS) == 2
    assert "is not a results file" in capsys.readouterr().err
