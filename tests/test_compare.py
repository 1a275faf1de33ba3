"""The comparison: what is asked, how rates are found, what is kept, and one small study."""

import json
from concurrent.futures import Future

import pytest
import torch

import compare
from conftest import call
from model import GPT, GPTConfig, save_checkpoint

FLAGS = "--base base.pt --dataset new --old_dataset old --tokens 512 --seeds 2 --dtype float32"
OF_TRAIN = ("--upscale", "midus")  # what compare.py has train.py read options after


class HereAndNow:
    """A pool that makes runs in this process: a new one takes seconds to import torch."""

    def __init__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A working folder with a tiny base and two texts; returns what runs compare.py there."""
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
        for split in ("train", "valid", "test"):
            text = f"The {folder} cat sat on the {split} mat, and the dog on the cat.\n" * 40
            (tmp_path / folder / f"{split}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="old")
    monkeypatch.setattr(compare, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setitem(compare.GRIDS, "lr", (1e-3, 1e-2, 1e-1))
    compare.open_study.cache_clear()
    compare.measure_base.cache_clear()
    return lambda *words: call(monkeypatch, "compare.py", *FLAGS.split(), *words)


def lines():
    with open("results.jsonl") as file:
        return [json.loads(line) for line in file]


# ---- A study -------------------------------------------------------------------------------------
def test_a_study_is_made_once_and_read_again(study, monkeypatch, capsys):
    methods = ("--methods", "llama-pro", "midus:n_keys=8:top_k=4:memory_lr=0.1")
    assert study(*methods) == 0
    first = capsys.readouterr().out

    # Trials on seed 0 and validation text; what counts on seeds 1 and 2, at the best rate.
    runs = lines()
    assert {run["seed"] for run in runs if run["split"] == "valid"} == {0}
    for method in ("llama-pro", "midus"):
        own = [run for run in runs if run["method"] == method]
        trials = [run for run in own if run["split"] == "valid"]
        finals = [run for run in own if run["split"] == "test"]
        best = min(trials, key=lambda run: run["end"]["new"])
        assert {(run["seed"], run["lr"]) for run in finals} == {(1, best["lr"]), (2, best["lr"])}
        assert {*finals[0]["before"]} == {*finals[0]["end"]} == {"new", "old"}

    # Nothing is made again, and the table is the same.
    assert study(*methods) == 0
    again = capsys.readouterr().out
    assert len(lines()) == len(runs) and "0 runs to make" in again
    assert again.split("are there, on")[1] == first.split("are there, on")[1]

    # Other code makes its own.
    monkeypatch.setattr(compare, "hash_of_code", lambda: "other")
    assert study(*methods) == 0
    assert len(lines()) == 2 * len(runs)


def test_a_run_that_fails_does_not_take_others_with_it(study, monkeypatch, capsys):
    train = compare.train.train

    def fail_at_seed_1(model, settings, *rest):
        if settings.seed == 1:
            raise OSError("a fault")
        train(model, settings, *rest)

    monkeypatch.setattr(compare.train, "train", fail_at_seed_1)
    assert study("--methods", "llama-pro:lr=1e-2") == 1
    assert "a fault" in capsys.readouterr().err
    assert [run["seed"] for run in lines()] == [2]


def test_what_trains(study):
    """LoRA trains what it adds; `none` the blocks that llama-pro would copy, or the base whole."""
    words = ("lora:rank=2:lr=1e-2", "none:lr=1e-2", "none:train=all:lr=1e-2")
    assert study("--methods", *words, "--seeds", "1") == 0
    block = 12 * 16 * 16 + 13 * 16
    whole = 2 * block + (257 + 16) * 16 + 2 * 16
    pairs = 2 * 2 * (64 + 32 + 80 + 80)  # two blocks, rank 2, inputs and outputs of four matrices
    found = {(run["method"], run["train"]): (run["trained"], run["added"]) for run in lines()}
    assert found == {
        ("lora", "new"): (pairs, pairs),
        ("none", "new"): (block, 0),
        ("none", "all"): (whole, 0),
    }


@pytest.mark.parametrize("best, made", [(2e-3, 4), (3e-3, 3), (2e-2, 5)])
def test_a_search_for_a_rate_stops_between_two_worse_ones(best, made):
    class Study:
        def __init__(self):
            self.runs = []

        def find(self, asked):
            return next((run for run in self.runs if compare.matches(run, asked)), None)

    study = Study()
    asked = {"method": "llama-pro", "memory_lr": None}
    while trials := compare.next_trials(asked, study):
        study.runs += [trial | {"end": {"new": abs(trial["lr"] - best)}} for trial in trials]
    assert asked["lr"] == best and len(study.runs) == made


# ---- Methods -------------------------------------------------------------------------------------
def test_options_are_read_as_flags_of_train():
    asked = compare.read_method("midus:query=token:residual=yes:positions=1,3:lr=3e-3", OF_TRAIN)
    assert asked["options"] == {"query": "token", "residual": True, "positions": [1, 3]}
    assert asked["lr"] == 3e-3 and "memory_lr" not in asked and asked["train"] == "new"


@pytest.mark.parametrize(
    "words, says",
    [
        ("magic", "invalid choice: 'magic'"),
        ("midus:n_keys=x", "--n_keys: invalid"),
        ("midus:lr=-1", "-1 is not a number of at least 0"),
        ("solar:query=token", "solar takes n_new"),
        ("midus:top_k=1", "top_k must lie between 2"),
    ],
)
def test_a_mistake_gets_one_sentence(words, says, study, capsys):
    assert study("--methods", words) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_rows_add_what_stored_runs_have_added():
    """Every row of every table can be built, and its sizes are those on the pages."""
    runs = [compare.as_today(run) for run in compare.read_runs(compare.STUDY)]
    with torch.device("meta"):
        base = GPT(GPTConfig(4, 4, 128, 64, 257))
        for row in (row for table in compare.TABLES.values() for row in table):
            asked = compare.read_method(row.method, OF_TRAIN)
            if asked["method"] in ("lesa", "opt-deus"):  # these need numbers
                continue
            model = compare.build(base, asked["method"], asked["options"], asked["train"])
            added = sum(p.numel() for p in model.parameters()) - 834_432
            more = compare.multiplications(model) - compare.multiplications(base)
            for run in compare.pick(asked, runs, "test")[0]:
                assert (run["added"], run["multiplications"]) == (added, more), row.words


# ---- Results -------------------------------------------------------------------------------------
def test_a_file_of_results_is_only_appended_to(study, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    compare.append_run(path, {"code": "a"})
    cut = path.read_text() + '{"code": "cu'
    path.write_text(cut)
    compare.append_run(path, {"code": "b"})
    assert compare.read_runs(path) == [{"code": "a"}, {"code": "b"}]
    assert path.read_text().startswith(cut + "\n")

    # A foreign file is refused.
    path.write_text("something else\n")
    assert study("--methods", "none:lr=1e-2", "--results", path) == 2
    assert "is no file of results" in capsys.readouterr().err
    assert path.read_text() == "something else\n"


def test_stored_runs_give_the_figures_of_the_pages(monkeypatch, capsys):
    assert call(monkeypatch, "compare.py", "--stored", "pair", "query") == 0
    out = capsys.readouterr().out
    assert "| 393,760 | 163,072 | 12,831 | 0.003, 0.1 | 5.301 ± 0.013 | 6.920 ± 0.058 |" in out
    assert "| 4.849 ± 0.008 | 5.808 ± 0.027 | 0.216 | 0.128 | 68% | 17% / 20% |" in out
    assert "54 of 54 runs were made by other code than today's" in out


def test_where_copies_learned_nothing_there_is_no_gain(capsys):
    run = {"method": "llama-pro", "options": {}, "train": "new", "tokens": 1, "added": 1}
    run |= {"multiplications": 1, "tokens_per_second": 1.0, "lr": 1.0, "memory_lr": None}
    run |= {"before": {"new": 4.0}, "end": {"new": 5.0}}
    compare.print_table([compare.Row("", "copies", "llama-pro")], {"llama-pro": [run]})
    assert "| 5.000 |  | -0.223 |  |  |  |" in capsys.readouterr().out


@pytest.mark.parametrize("table", ["main", "size"])
def test_pictures(table, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture = tmp_path / "picture.svg"
    assert call(monkeypatch, "compare.py", "--stored", table, "--plot", picture) == 0
    assert picture.read_text().endswith("</svg>\n")
