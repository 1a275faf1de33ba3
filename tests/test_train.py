"""Training: a run from its base to its table, what a repeated command does, faults, one step."""

import copy
import glob
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from conftest import ROOT, call, full_disk, same_weights
from data import SPLITS, load_dataset
from eval import perplexity, sum_nll
from model import BLOCKS, GPT, GPTConfig, load_checkpoint, save_checkpoint
from upscale import METHODS, N_NEW, Method, assemble, interleave, set_trainable, upscale

# Two runs of ten steps: on a base from scratch, which takes 8 steps before; and on one in a file.
SIZES = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4"
BASE = f"{SIZES} --base_tokens 512 --base_lr 2e-3"
STEPS = "--tokens 640 --eval_every 5 --save_every 5"
MIDUS = "--upscale midus --n_keys 6 --top_k 3 --d_latent 8"
SCRATCH = f"{BASE} {MIDUS} {STEPS}"
ON_FILE = f"--base base.pt --batch_size 4 {STEPS}"
RUN = f"{ON_FILE} {MIDUS}"


def write_base(seed=0):
    torch.manual_seed(seed)
    base = GPT(GPTConfig(2, 2, 32, 16, 257))
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="pydocs")


@pytest.fixture
def run(here, monkeypatch, capsys):
    """run(flags) is the whole command; returns its exit status and what it printed.

    run(flags, number, event): before training step `number`, from 1 and with those of the base,
    comes a signal, or event(model) is called.
    """

    def run(flags, number=0, event=None):
        original = train.train_step
        steps = []

        def train_step(model, *rest):
            steps.append(model)
            if len(steps) == number and callable(event):
                event(model)
            elif len(steps) == number:
                signal.raise_signal(event)
            return original(model, *rest)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", train_step)
            status = call(patch, "train.py", *flags.split())
        return status, "".join(capsys.readouterr())

    write_base()
    return run


def spoil(model):
    model.ln_f.bias.data[0] = math.nan


def kept(path="ckpt.pt"):
    """Model and progress in a file, without what depends on the clock."""
    model, info = load_checkpoint(path)
    progress = info["progress"]
    return model, {name: progress[name] for name in ("step", "losses", "valid", "rows")}


def same_run(path, other):
    (a, progress), (b, progress_of_other) = kept(path), kept(other)
    return same_weights(a, b) and progress == progress_of_other


# ---- The whole command ---------------------------------------------------------------------------
def test_a_run_from_scratch_ends_in_its_table(run, monkeypatch):
    tables = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_table", lambda rows, change: tables.append(rows))
        status, said = run(SCRATCH)
    assert status == 0 and said.count("goes on with the first words of pycode") == 2

    # It starts exactly where the base stands, and learns the new text.
    ((base, start, end),) = tables
    assert base["texts"] == start["texts"]
    figures = [row["texts"]["pycode"]["token_perplexity"] for row in (base, end)]
    assert figures[1] < figures[0]

    # The rows say what is in the file.
    model, _ = load_checkpoint("ckpt.pt")
    added = sum(parameter.numel() for parameter in model.h[1].parameters())
    assert [row["added"] for row in (base, start, end)] == [0, added, added]
    assert base["parameters"] + added == end["parameters"]
    tokens = load_dataset("pycode", "bytes")["valid"].tokens
    assert perplexity(*sum_nll(model, tokens)) == figures[1]

    # Repeated, it prints the same again and changes nothing.
    shutil.copy("ckpt.pt", "before.pt")
    first, second = (run(SCRATCH)[1].split("validation split")[1] for _ in range(2))
    assert first == second and f"+{added:,}" in first and same_run("ckpt.pt", "before.pt")

    # The base was trained in a run like any other, which can be had alone.
    (path,) = glob.glob("data/base-*.pt")
    info = load_checkpoint(path)[1]
    assert info["dataset"] == "pydocs" and info["asked"]["lr"] == 2e-3
    assert run(f"{BASE} --upscale none --out none.pt")[0] == 0
    assert kept("none.pt")[1]["losses"] == kept(path)[1]["losses"]


class MyBlock(nn.Module):
    """A student's own: what a token adds is looked up."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(config.vocab_size, config.n_embd))

    def forward(self, x, tokens):
        return x + self.table[tokens]


def my_method(base, n_new):
    sources, new = interleave(base.config.n_layer, list(range(1, n_new + 1)))
    return assemble(base, sources, new, kind="X")


@pytest.mark.parametrize("method", ["hybrid", "solar", "mine"])
def test_every_method_is_trained_goes_on_and_is_evaluated(run, monkeypatch, capsys, method):
    monkeypatch.setitem(BLOCKS, "X", MyBlock)
    monkeypatch.setitem(METHODS, "mine", Method(my_method, (N_NEW,), "new"))
    flags = f"{ON_FILE} --upscale {method} --n_new 1"
    assert run(f"{flags} --out whole.pt")[0] == 0
    assert run(flags, 6, signal.SIGINT)[0] == 130 and run(flags)[0] == 0
    assert same_run("ckpt.pt", "whole.pt")
    assert call(monkeypatch, "eval.py", "ckpt.pt") == 0
    assert re.search("^ckpt.pt +[0-9]", capsys.readouterr().out, re.MULTILINE)

    # Solar alone does not start as its base, and trains all.
    (base, _), (model, progress) = load_checkpoint("base.pt"), kept()
    first, second = progress["rows"]
    assert (first["texts"] == second["texts"]) == (method != "solar")
    assert same_weights(base.wte, model.wte) == (method != "solar")


def test_a_model_that_its_config_cannot_rebuild_is_refused_at_step_0(run, monkeypatch):
    def without_a_letter(base):
        deeper = METHODS["llama-pro"].build(base)
        deeper.h[-1] = MyBlock(base.config)
        return deeper

    monkeypatch.setitem(METHODS, "mine", Method(without_a_letter, (), "new"))
    status, said = run(f"{ON_FILE} --upscale mine")
    assert status == 2 and "a block of your own needs a letter in BLOCKS" in said
    assert not os.path.exists("ckpt.pt")


# ---- Stopped -------------------------------------------------------------------------------------
# train.py in a process of its own. Before a training step it gets a signal; of two processes their
# launcher gets it, which has a second to pass it on.
SIGNALLED = """
import os, signal, sys, time, common, train
number, signum = int(sys.argv.pop(1)), int(sys.argv.pop(1))
original, steps = train.train_step, []

def train_step(*args):
    steps.append(args)
    if len(steps) == number and common.is_main():
        os.kill(os.getpid() if common.world_size() == 1 else os.getppid(), signum)
        time.sleep(1)
    return original(*args)

train.train_step = train_step
common.run_command(train.main)
"""


def signalled(number, signum, flags, launcher=""):
    Path("signalled.py").write_text(SIGNALLED)
    words = f"{launcher} signalled.py {number} {int(signum)} {flags} --device cpu".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True)


def test_a_run_that_was_stopped_three_times_ends_as_one_that_was_not(run):
    assert run(f"{SCRATCH} --out whole.pt")[0] == 0
    (base,) = glob.glob("data/base-*.pt")
    os.rename(base, "whole_base.pt")

    # While its base is trained, which is saved after every step; then in the run itself.
    killed = signalled(4, signal.SIGKILL, SCRATCH)
    assert killed.returncode == -signal.SIGKILL and kept(base)[1]["step"] == 3, killed
    status, said = run(SCRATCH, 3, signal.SIGTERM)
    assert status == 130 and f"step 6 of 8 is saved in {base}; repeat the command" in said
    status, said = run(SCRATCH, 2 + 4, signal.SIGINT)
    assert status == 130 and "step 4 of 10 is saved in ckpt.pt; repeat the command" in said
    assert run(SCRATCH)[0] == 0
    assert same_run(base, "whole_base.pt") and same_run("ckpt.pt", "whole.pt")


def test_two_processes_train_like_one_and_stop_together(run):
    flags = f"{SCRATCH} --train all --dtype float32 --tokens 3200 --save_every 99"
    assert run(f"{flags} --out one.pt")[0] == 0
    os.remove(*glob.glob("data/base-*.pt"))
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2"
    stopped = signalled(8 + 20, signal.SIGTERM, flags, launcher)
    assert stopped.returncode != 0 and 20 <= kept()[1]["step"] < 50, stopped
    assert stopped.stdout.count(b"first the base") == 1  # only rank 0 prints

    # One process goes on. Rounding apart, all is as if it had been alone.
    assert run(flags)[0] == 0
    (one, a), (two, b) = kept("one.pt"), kept()
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)
    for (name, x), y in zip(one.named_parameters(), two.parameters(), strict=True):
        # A bias on K shifts all scores alike: its gradient is rounding, no more, and Adam makes
        # whole steps of it.
        if name.endswith("c_attn.bias"):
            x, y = (torch.cat((bias[:32], bias[64:])) for bias in (x, y))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


# ---- Repeated ------------------------------------------------------------------------------------
def test_what_is_other_is_refused_and_named(run, here):
    """Settings, the base's weights, the words of a text."""
    assert run(RUN)[0] == 0
    before = Path("ckpt.pt").read_bytes()
    for flags, differs in (
        ("--lr 1e-3", "lr 0.003, now 0.001"),
        ("--n_keys 7 --seed 1", "n_keys 6, now 7; seed 0, now 1"),
    ):
        status, said = run(f"{RUN} {flags}")
        sentence = f"error: ckpt.pt was begun with {differs}: name another --out, or --overwrite\n"
        assert status == 2 and said.endswith(sentence)
    write_base(seed=1)
    assert re.search("was begun with base [0-9a-f]+, now [0-9a-f]+: name", run(RUN)[1])
    write_base()
    (text,) = here.glob("data/pycode-*/train.txt")
    text.write_text("another text\n" * 100)
    assert re.search("was begun with dataset pycode .*, now pycode .*: name", run(RUN)[1])
    assert Path("ckpt.pt").read_bytes() == before


def test_what_is_the_same_goes_on(run):
    """Defaults that are typed, what belongs to the machine, and other paths to base and text."""
    shutil.copytree(*glob.glob("data/pycode-*"), "here")
    assert run(f"{RUN} --dataset ./here", 4, signal.SIGINT)[0] == 130
    for old, new in (("base.pt", "moved.pt"), ("here", "there"), ("data", "elsewhere")):
        os.rename(old, new)
    defaults = "--lr 3e-3 --warmup 1 --weight_decay 0.1 --query head --train new"
    machine = "--grad_accum 2 --dtype bfloat16 --no-compile --data_dir elsewhere"
    status, said = run(f"{RUN} {defaults} {machine} --base moved.pt --dataset ./there")
    assert status == 0 and "ckpt.pt is there: 4 of its 10 steps are done" in said
    assert "./there" in said and "./here" not in said


def test_overwrite_replaces_other_settings_at_the_first_save_and_never_a_base(run):
    flags = f"{SCRATCH} --overwrite"
    assert run(f"{ON_FILE} --upscale solar")[0] == 0
    before = Path("ckpt.pt").read_bytes()
    assert run(flags, 5, spoil)[0] == 1  # while its base is trained
    assert Path("ckpt.pt").read_bytes() == before
    assert run(flags, 4 + 3, spoil)[0] == 1
    model, progress = kept()
    assert model.config.blocks == "TMT" and progress["step"] == 0

    # One of the same settings goes on; the base's own file stays.
    assert "ckpt.pt is there: 0 of its 10 steps" in run(flags)[1]
    for flags, base in ((RUN, "base.pt"), (flags, *glob.glob("data/base-*.pt"))):
        before = Path(base).read_bytes()
        status, said = run(f"{flags} --overwrite --out {base}")
        assert status == 2 and f"{base} is the base's own file; name another" in said
        assert Path(base).read_bytes() == before


def test_other_code_is_told_and_goes_on(run, monkeypatch):
    assert run(SCRATCH, 8 + 4, signal.SIGINT)[0] == 130
    code = train.hashes_of_code()
    monkeypatch.setattr(train, "hashes_of_code", lambda: code | {"train.py": "another"})
    (base,) = glob.glob("data/base-*.pt")
    for out, path in (("ckpt.pt", "ckpt.pt"), ("ckpt.pt", "ckpt.pt"), ("b.pt", base)):
        status, said = run(f"{SCRATCH} --out {out}")
        line = f"\n{path} was begun by other code (train.py differs); delete it to begin anew\n"
        assert status == 0 and line in said


def test_a_file_that_appeared_meanwhile_is_not_replaced(run):
    another_run = Path("ckpt.pt")
    status, said = run(SCRATCH, 5, lambda model: another_run.write_text("of another run"))
    assert status == 2 and "another run has begun to write ckpt.pt; name another --out" in said
    assert another_run.read_text() == "of another run"


# ---- Faults --------------------------------------------------------------------------------------
def test_nan_ends_a_run_and_keeps_the_last_good_checkpoint(run, monkeypatch):
    status, said = run(RUN, 10, spoil)
    assert status == 1 and "error: the loss or a gradient became NaN" in said
    assert kept()[1]["step"] == 5 and kept()[0].ln_f.bias.isfinite().all()

    # After a good loss its update may make a model that has none.
    original = train.train_step

    def train_step(model, *rest):
        loss = original(model, *rest)
        model.wte.weight.data *= 1e30
        return loss

    monkeypatch.setattr(train, "train_step", train_step)
    status, said = run(f"{RUN} --tokens 64 --out b.pt")
    assert status == 1 and "error: the loss or a gradient became NaN" in said
    assert kept("b.pt")[1]["step"] == 0


def test_a_full_disk_keeps_the_old_checkpoint(run):
    assert run(RUN, 4, signal.SIGINT)[0] == 130
    before = Path("ckpt.pt").read_bytes()
    with full_disk(len(before) // 2):
        status, said = run(RUN)
    assert status == 1 and "error: could not write ckpt.pt" in said
    assert Path("ckpt.pt").read_bytes() == before and not glob.glob("*.tmp")


def test_a_damaged_checkpoint_is_refused(run):
    """A bit is wrong in its weights or its names; or half of it is missing."""
    whole = Path("base.pt").read_bytes()
    weights = load_checkpoint("base.pt")[0].wpe.weight.detach().numpy().tobytes()
    half = whole[: len(whole) // 2]
    flipped = [whole.replace(part, bytes([part[0] ^ 1]) + part[1:]) for part in (weights, b"wpe")]
    for damaged in (*flipped, half):
        Path("base.pt").write_bytes(damaged)
        status, said = run(RUN)
        assert status == 2 and "base.pt is damaged or is no nanoMIDUS checkpoint" in said


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_foreign_pickle_runs_no_code(run):
    torch.save({"config": Bomb(), "model": {}}, "a.pt")
    Path("b.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    assert run(f"{RUN} --base a.pt")[0] == run(f"{RUN} --base b.bin")[0] == 2
    assert not os.path.exists("exploded")


# ---- Settings ------------------------------------------------------------------------------------
def test_presets_go_by_the_width_and_flags_come_first(run):
    for flags, preset in (
        ("--base base.pt", "tiny"),
        ("--n_embd 512", "tiny"),
        ("--n_embd 513", "gpt2"),
        ("--dataset wikitext103", "gpt2"),
    ):
        settings, _ = train.parse_arguments(f"{flags} --upscale midus --lr 1".split())
        assert settings.memory_lr == train.PRESETS[preset]["memory_lr"] and settings.lr == 1

    # Published weights have read what nobody knows, and learn for one epoch.
    settings, _ = train.parse_arguments(["--base", "gpt2"])
    assert (settings.dataset, settings.old_dataset) == ("wikitext103", None)
    assert (settings.tokenizer, settings.block_size, settings.tokens) == ("gpt2", 1024, None)


def test_what_cannot_be_is_refused_before_the_base_is_trained(run):
    os.mkdir("short")
    for split in SPLITS:
        Path(f"short/{split}.txt").write_text("twenty bytes of text")
    for flags, sentence in (
        ("--lr 1", "--upscale none from scratch makes a base: its flags are --old_dataset"),
        ("--upscale midus --positions 9", "positions must be different numbers between 1 and 4"),
        ("--upscale midus --dataset short", "20 tokens are too few for a batch of 16"),
    ):
        status, said = run(flags)
        assert status == 2 and f"error: {sentence}" in said and not glob.glob("data/base-*")


# ---- Optimizer, schedule, step -------------------------------------------------------------------
@pytest.fixture
def model():
    torch.manual_seed(0)
    return upscale(GPT(GPTConfig(2, 2, 32, 16, 257)), "midus", n_keys=6, top_k=3, d_latent=8)


@pytest.mark.parametrize("which", ["all", "new"])
def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay(model, which):
    set_trainable(model, which)
    optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for p in group["params"]:
            bank = names[id(p)].endswith("hive.bank")
            assert group["lr"] == (1e-2 if bank else 1e-3)
            assert group["weight_decay"] == (0.1 if p.dim() > 1 and not bank else 0)


def test_the_rate_rises_and_falls_to_a_tenth():
    values = [train.schedule(step, 10, 100) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11) and max(values) == values[10] == 1.0
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert 0.1 <= values[-1] < 0.11


def descend(model, groups, parts=1):
    """A train_step that goes as far as the gradients say. groups: parameters by name."""
    x, y = torch.randint(257, (2, 8, 16), generator=torch.Generator().manual_seed(0))
    groups = [{"name": name, "params": parameters} for name, parameters in groups.items()]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return train.train_step(model, optimizer, (x, y), torch.float32, parts)


def test_a_batch_in_parts_is_the_batch(model):
    other = copy.deepcopy(model)
    loss = descend(model, {"all": [*model.parameters()]})
    assert descend(other, {"all": [*other.parameters()]}, parts=4) == pytest.approx(loss, abs=1e-6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_banks_are_clipped_apart_from_the_rest():
    """Each to a norm of 1."""
    bank, other = (nn.Parameter(torch.zeros(9)) for _ in range(2))
    descend(lambda x, y: 100 * bank.sum() + 10 * other.sum(), {"banks": [bank], "rest": [other]})
    assert bank.norm().item() == pytest.approx(1) and other.norm().item() == pytest.approx(1)
