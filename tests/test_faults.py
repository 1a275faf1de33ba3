"""Faults are injected, and each must end as promised: nothing lost but the work since the last
checkpoint, nothing half-written, nothing loaded unchecked, one sentence. `pytest --long` tries more
often.
"""

import glob
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from conftest import MIDUS, TINY, call, full_disk, leftovers, same_weights
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from test_train import PLAIN, RUN, interrupt, progress_of, send

SMALL = GPTConfig(3, 2, 8, 8, 20, "TMT", n_keys=4, top_k=2, d_latent=3, new=(1,))


# ---- Killed --------------------------------------------------------------------------------------
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_happened(here, monkeypatch, root, long):
    """By SIGKILL: once while the base is trained, once in the run; with --long at any moment."""
    run = [*RUN, "--tokens", "4e3", "--save_every", "3"]
    assert call(monkeypatch, *run, "--out", "whole.pt") == 0
    for path in (*glob.glob("data/base-*"), *glob.glob("data/*.npy")):
        os.remove(path)

    rng = random.Random(0)
    killed = 0
    while killed < (20 if long else 2):
        flags = ["--resume"] if os.path.exists("ckpt.pt") else run[1:]
        command = [sys.executable, str(root / "train.py"), "--device", "cpu", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        awaited = "data/base-*.pt" if killed == 0 else "ckpt.pt"
        while process.poll() is None and not glob.glob(awaited):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 6 if long else 0.05))
        process.kill()
        error = process.communicate()[1]
        if process.returncode == 0:  # it was faster
            os.remove("ckpt.pt")
            continue
        assert process.returncode == -signal.SIGKILL, error
        killed += 1
        for path in (*glob.glob("*.pt"), *glob.glob("data/*.pt")):
            load_checkpoint(path)  # whole, whatever the moment

    assert os.path.exists("ckpt.pt") and call(monkeypatch, "train.py", "--resume") == 0
    (whole, a), (cut, b) = progress_of("whole.pt"), progress_of("ckpt.pt")
    assert a["losses"] == b["losses"] and len(a["losses"]) == 62 and same_weights(cut, whole)


# ---- Disk ----------------------------------------------------------------------------------------
def test_a_full_disk_keeps_the_old_checkpoint(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 3, send(signal.SIGTERM))
        assert call(monkeypatch, *PLAIN, "--tokens", "640") == 130
    with open("ckpt.pt", "rb") as file:
        old = file.read()
    capsys.readouterr()
    with full_disk(len(old) // 2):
        assert call(monkeypatch, "train.py", "--resume") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: could not write ckpt.pt") and len(error.splitlines()) == 1
    with open("ckpt.pt", "rb") as file:
        assert file.read() == old
    assert not leftovers(".")
    assert call(monkeypatch, "train.py", "--resume") == 0  # once there is room


# ---- Checkpoints ---------------------------------------------------------------------------------
def refused_or_the_same(path, model):
    """Whether the file was refused; if not, it must hold just what model is."""
    try:
        loaded, info = load_checkpoint(path)
    except ValueError as error:
        assert "damaged or is no nanoMIDUS" in str(error) or "does not hold" in str(error)
        return True
    assert loaded.config == model.config and info == {} and same_weights(loaded, model)
    return False


def test_a_damaged_checkpoint_is_refused_or_does_no_harm(tmp_path, long):
    """Cut anywhere, or one bit flipped anywhere. A flip in what nobody reads may go unnoticed."""
    path = tmp_path / "a.pt"
    model = GPT(SMALL)
    save_checkpoint(str(path), model)
    whole, rng = path.read_bytes(), random.Random(0)
    tries = 10_000 if long else 250
    harmless = 0
    for case in range(tries):
        at = rng.randrange(len(whole))
        cut = case % 2 == 1
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(whole[:at] if cut else whole[:at] + flipped + whole[at + 1 :])
        refused = refused_or_the_same(str(path), model)
        assert refused or not cut
        harmless += not refused
    assert harmless < tries / 10


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_foreign_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("a.pt", "wb") as file:
        pickle.dump(Bomb(), file)
    torch.save({"config": Bomb(), "model": {}}, "b.pt")
    for path in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="does not hold a nanoMIDUS model|is no nanoMIDUS"):
            load_checkpoint(path)
    assert not os.path.exists("exploded")


@pytest.mark.parametrize("content", [b"", b"just some text\n" * 100])
def test_what_is_no_torch_file_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or is no nanoMIDUS checkpoint"):
        load_checkpoint(str(tmp_path / "a.pt"))


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path):
    path = str(tmp_path / "a.pt")
    save_checkpoint(path, GPT(SMALL))
    good = torch.load(path, weights_only=True)
    config, weights = good["config"], good["model"]
    fewer = {name: tensor for name, tensor in weights.items() if name != "h.1.memory.hive.bank"}
    for content, reason in (
        ({"layers.0.weight": torch.zeros(3)}, "config"),
        ([1, 2], ""),
        ({"config": config}, "model"),
        ({"config": config, "model": fewer}, "h.1.memory.hive.bank"),
        ({"config": config, "model": weights | {"h.9.x": torch.zeros(1)}}, "h.9.x"),
        (good | {"config": config | {"n_embd": 16}}, "size mismatch"),
        (good | {"config": config | {"n_head": 3}}, "n_embd must be a multiple"),
        (good | {"config": config | {"depth": 3}}, "depth"),
        (good | {"config": config | {"vocab_size": 10**12}}, "size mismatch"),
        (good | {"config": config | {"n_keys": 10**7}}, "size mismatch"),
        (good | {"config": config | {"n_layer": 10**9, "blocks": ""}}, "at most 1000"),
        (good | {"config": config | {"n_layer": "three"}}, ""),
        (good | {"config": config | {"new": 1}}, ""),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"does not hold a nanoMIDUS model.*{reason}"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "about, reason",
    [
        ({}, "does not say its tokenizer"),
        ({"tokenizer": 3}, "tokenizer is 3"),
        ({"tokenizer": "words"}, "tokenizer must be gpt2"),
        ({"tokenizer": "bytes"}, "fewer tokens than its tokenizer: bytes"),
    ],
)
@pytest.mark.parametrize("script, flag", [("eval.py", ""), ("train.py", "--base")])
def test_a_model_whose_tokenizer_cannot_be_is_refused(
    here, monkeypatch, capsys, about, reason, script, flag
):
    save_checkpoint("a.pt", GPT(SMALL), **about)
    assert call(monkeypatch, script, *flag.split(), "a.pt") == 2
    assert reason in capsys.readouterr().err


# ---- Flags and numbers ---------------------------------------------------------------------------
CHOICES = {  # values that make sense, then values that don't or only do with others
    "--n_layer": ["2", "1", "3", "0", "-1", "x", "1e9"],
    "--n_head": ["2", "1", "3", "0"],
    "--n_embd": ["8", "16", "6", "0", "7", "nan"],
    "--block_size": ["8", "16", "1", "0", "1e6", "-5"],
    "--batch_size": ["4", "2", "1", "0", "1e9"],
    "--grad_accum": ["1", "2", "3", "0"],
    "--tokens": ["64", "1", "0", "-1", "inf", "1.5"],
    "--base_tokens": ["64", "1", "0", "nan"],
    "--lr": ["1e-3", "0", "-1", "nan", "inf", "100", "1e30", ""],
    "--memory_lr": ["1e-2", "0", "-1", "nan", "1e30"],
    "--weight_decay": ["0.1", "0", "-1", "1e9"],
    "--warmup": ["0", "2", "1e9", "-1", "nan"],
    "--eval_every": ["1", "1e9", "0"],
    "--save_every": ["1", "1e9", "0"],
    "--seed": ["0", "7", "-1", "x", "1e30"],
    "--preset": ["tiny", "small", "large"],
    "--upscale": ["midus", "none", "llama-pro", "solar", "magic"],
    "--train": ["new", "all", "1", "2,9", "no"],
    "--every": ["1", "2", "3", "0"],
    "--positions": ["1", "2", "9", "0"],
    "--n_new": ["1", "2", "9", "0"],
    "--n_keys": ["4", "2", "1", "0", "1e7", "1e12"],
    "--top_k": ["2", "3", "1", "9", "0"],
    "--d_latent": ["4", "1", "0", "1e12", "1e18"],
    "--query": ["head", "token", "block"],
    "--query_norm": [None],
    "--tokenizer": ["bytes", "gpt2:9", "words"],
    "--dtype": ["float32", "bfloat16", "int8"],
    "--resume": [None],
    "--device": ["cpu", "mps", "tpu"],
    "--base": ["scratch", "none.pt", "gpt5", "."],
    "--data_dir": ["data", "nowhere", "a.pt"],
    "--dataset": ["pycode", "pydocs", "wikitext2", "text", "imagenet"],
    "--old_dataset": ["pydocs", "pycode", "wikitext2", "text"],
    "--out": ["a.pt", "no/a.pt", "."],
}
USUAL = "--n_layer 2 --n_head 2 --n_embd 8 --block_size 8 --batch_size 4 --tokens 64".split()
USUAL += "--base_tokens 64 --upscale midus --n_keys 4 --top_k 2 --d_latent 4 --device cpu".split()


def test_any_flags_train_a_step_or_are_refused_with_a_sentence(here, monkeypatch, capsys, long):
    """Seeded random command lines around one that works: no traceback, and bad input is found
    before anything is trained.
    """

    def no_download(*args):
        raise OSError("could not get it")

    monkeypatch.setattr(data, "download", no_download)
    monkeypatch.setattr(data, "build_library", no_download)  # of a folder that has none: too long
    steps, original = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or original(*args))
    rng = random.Random(0)
    trained, refused = 0, set()
    for _ in range(600 if long else 30):
        flags = dict(zip(USUAL[::2], USUAL[1::2]))
        for name in rng.sample(sorted(CHOICES), rng.randint(0, 3)):
            flags[name] = rng.choice(CHOICES[name])
        if flags["--upscale"] != "midus":
            for name in ("--n_keys", "--top_k", "--d_latent"):
                del flags[name]
        line = [part for pair in flags.items() for part in pair if part is not None]
        line += ["--overwrite"] * ("--resume" not in flags)
        steps.clear()
        status = call(monkeypatch, "train.py", *line)
        error = capsys.readouterr().err.strip()
        if status == 0:
            assert steps or "--resume" in flags, line  # which may find nothing left to do
            trained += 1
            continue
        sentence = error.splitlines()[-1]
        assert status in (1, 2) and "Traceback" not in error, (line, error)
        assert sentence.startswith("error: ") and len(sentence) < 500, (line, error)
        assert status == 1 or not steps, (line, sentence)
        refused.add(sentence)
    assert trained > 10 and len(refused) > 10


@pytest.mark.parametrize("lr", ["100", "1e10"])
def test_an_absurd_learning_rate_ends_in_a_sentence(here, monkeypatch, capsys, lr):
    """It may survive, by luck. If not, what was saved before is whole."""
    status = call(monkeypatch, *PLAIN, "--tokens", "2e3", "--lr", lr, "--save_every", "1")
    error = capsys.readouterr().err
    assert status in (0, 1) and "Traceback" not in error
    if status == 1:
        assert "NaN or infinite" in error or "infinite or NaN" in error
    model = load_checkpoint("ckpt.pt")[0]
    assert model(torch.arange(16)[None]).isfinite().all()


def test_a_soak(here, monkeypatch, long):
    """Thousands of steps: no growth of memory, no drift in speed."""
    if not long:
        pytest.skip("only with --long")
    times, sizes, original = [], [], train.train_step

    def timed(*args):
        start = time.perf_counter()
        loss = original(*args)
        times.append(time.perf_counter() - start)
        if len(times) % 500 == 0:
            with open("/proc/self/statm") as file:
                sizes.append(int(file.read().split()[1]) * 4096 / 2**20)
        return loss

    monkeypatch.setattr(train, "train_step", timed)
    assert call(monkeypatch, "train.py", *TINY, *MIDUS, "--tokens", "320000") == 0
    early, late = np.median(times[500:1500]), np.median(times[-1000:])
    print(f"{len(times)} steps: {early:.5f} s early, {late:.5f} s late; resident MiB {sizes}")
    assert late < 1.25 * early and sizes[-1] < sizes[1] + 20
