"""Training: the whole command, resume to the last bit, groups, schedule, what is refused."""

import glob
import math
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

import common
import eval
import train
from conftest import MIDUS, SIZES, TINY, call, same_weights
from data import load_dataset
from model import GPT, PRETRAINED, GPTConfig, load_checkpoint, save_checkpoint
from upscale import METHODS, Method, assemble, interleave, set_trainable, upscale

CPU = torch.device("cpu")
RUN = ["train.py", *TINY, *MIDUS]
PLAIN = ["train.py", *SIZES, "--upscale", "none"]  # without a base


def closing_table(out):
    """Of what a run printed: the perplexities of each label, and before them the parameters."""
    rows = {}
    for line in out.split("perplexity: token-level")[1].splitlines():
        match = re.fullmatch(r"(\S.*?) {2,}([\d,]+) +([\d., ]+)", line)
        if match:
            rows[match[1]] = [match[2], *(word for word in match[3].split() if "." in word)]
    return rows


def interrupt(patch, number, how):
    """Does something before training step `number` of a command."""
    original = train.train_step
    steps = []

    def interrupted(model, *rest):
        steps.append(1)
        if len(steps) == number:
            how(model)
        return original(model, *rest)

    patch.setattr(train, "train_step", interrupted)


def send(signum):
    return lambda model: os.kill(os.getpid(), signum)


def crash(model):
    raise KeyboardInterrupt


def progress_of(path):
    """Model and progress, without what depends on the clock."""
    model, info = load_checkpoint(path)
    del info["progress"]["seconds"]
    return model, info["progress"]


def small_base(here, **about):
    """A base of ours in a file, as its own training leaves it."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 32, 16, 257))
    about = dict(tokenizer="bytes", dataset="pydocs", data_dir=str(here / "data")) | about
    save_checkpoint("base.pt", base, **about)
    return base


# ---- The whole command ---------------------------------------------------------------------------
def test_from_scratch_to_the_table_of_two_texts(here, monkeypatch, capsys):
    assert call(monkeypatch, *RUN, "--tokens", "2e3") == 0
    out = capsys.readouterr().out
    table = closing_table(out)
    base, start, end = table["base"], table["midus, start"], table["midus, end"]
    assert base[1:] == start[1:]  # it starts exactly where the base stands
    assert float(end[1]) < float(start[1]) and start[0] == end[0] > base[0]
    assert "pycode" in out and "pydocs" in out and "Learned" in out and "orgotten" in out
    assert out.rstrip().endswith("next: python eval.py ckpt.pt")

    # The checkpoint is what the table says, on the whole of both splits.
    model, info = load_checkpoint("ckpt.pt")
    progress = info["progress"]
    assert model.config.blocks == "TMT" and progress["step"] == len(progress["losses"]) == 31
    assert (info["dataset"], info["old_dataset"]) == ("pycode", "pydocs")
    assert info["data_dir"] == info["old_data_dir"] == str(here / "data")
    for name, figure in zip(("pydocs", "pycode"), reversed(end[1:]), strict=True):
        tokens = load_dataset(name, "bytes", "data", ("valid",))["valid"].tokens
        assert f"{eval.perplexity(*eval.sum_nll(model, tokens)):.4f}" == figure
    prompt = bytes(tokens[:32].tolist()).decode()  # of the new text
    assert [row["sample"].startswith(prompt) for row in progress["rows"]] == [True, True]

    # The base was trained on the old text, in a file whose name can be read.
    (path,) = glob.glob("data/base-*.pt")
    assert path == "data/base-2x32x16-pydocs-bytes-1000-seed0.pt"
    base, info = load_checkpoint(path)
    assert info["dataset"] == "pydocs" and same_weights(base.h[0], model.h[0])

    # What is there is not replaced unasked.
    assert call(monkeypatch, *RUN) == 2
    assert "ckpt.pt exists" in capsys.readouterr().err

    # The base is found again. Samples and tables draw no random numbers: else they would change
    # what is trained.
    monkeypatch.setattr(train, "closing_row", lambda *args: {})
    monkeypatch.setattr(train, "tell", lambda *args: None)
    assert call(monkeypatch, *RUN, "--tokens", "2e3", "--out", "b.pt") == 0
    assert "trained already" in capsys.readouterr().out
    assert same_weights(model, load_checkpoint("b.pt")[0])


def test_where_old_and_new_are_the_same_there_is_one_column(here, monkeypatch, capsys):
    assert call(monkeypatch, *RUN, "--tokens", "500", "--dataset", "pydocs") == 0
    out = capsys.readouterr().out
    assert "nothing is new" in out and "orgotten" not in out
    assert len(closing_table(out)["base"]) == 2


def test_an_old_text_that_would_be_downloaded_is_left_out(here, monkeypatch, capsys):
    small_base(here, dataset="wikitext103")
    flags = [*MIDUS, "--base", "base.pt", "--dataset", "pycode", "--tokens", "2048"]
    assert call(monkeypatch, "train.py", *flags) == 0
    out = capsys.readouterr().out
    assert "wikitext103, the old text, is left out" in out
    assert len(closing_table(out)["base"]) == 2


@pytest.mark.parametrize(
    "method, what", [("none", "all"), ("llama-pro", "new"), ("solar", "all"), ("midus", "all")]
)
def test_every_method_trains_what_it_says(here, monkeypatch, capsys, method, what):
    base = small_base(here)
    flags = MIDUS if method == "midus" else ["--upscale", method]
    flags = [*flags, "--train", what, "--base", "base.pt", "--batch_size", "4"]
    assert call(monkeypatch, "train.py", *flags, "--tokens", "640") == 0
    model, progress = progress_of("ckpt.pt")
    old = [block for i, block in enumerate(model.h) if i not in model.config.new]
    if method in ("llama-pro", "midus"):
        assert all(same_weights(a, b) for a, b in zip(old, base.h)) == (what == "new")
    assert torch.equal(model.wte.weight, base.wte.weight) == (what == "new")
    assert all(math.isfinite(loss) for loss in progress["losses"])
    if method != "none":
        table = closing_table(capsys.readouterr().out)
        same = table["base"][1:] == table[f"{method}, start"][1:]
        assert same == (method != "solar")


def test_methods_that_start_as_the_base_see_the_same_batches(here, monkeypatch):
    losses = []
    for flags in (MIDUS, ["--upscale", "llama-pro"]):
        run = ["train.py", *TINY, *flags, "--tokens", "1e3", "--dtype", "float32", "--overwrite"]
        assert call(monkeypatch, *run) == 0
        losses.append(progress_of("ckpt.pt")[1]["losses"])
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    assert all(abs(a - b) < 0.2 for a, b in zip(*losses, strict=True))


def test_a_row_of_methods_can_be_trained_resumed_and_evaluated(here, monkeypatch, capsys):
    def above_the_first(base, n_keys=4):
        sources, new = interleave(base.config.n_layer, [1])
        return assemble(base, sources, new, kind="M", n_keys=n_keys, top_k=2, d_latent=3)

    monkeypatch.setitem(METHODS, "mine", Method(above_the_first, ("n_keys",), "new"))
    flags = ["--upscale", "mine", "--n_keys", "5", "--tokens", "1e3"]
    with monkeypatch.context() as patch:
        interrupt(patch, 15 + 9, send(signal.SIGINT))
        assert call(monkeypatch, "train.py", *TINY, *flags) == 130
    assert call(monkeypatch, "train.py", "--resume") == 0
    assert "mine, end" in closing_table(capsys.readouterr().out)
    assert call(monkeypatch, "eval.py", "ckpt.pt") == 0
    assert "memory in block 2" in capsys.readouterr().out


def test_a_run_without_a_file_writes_and_prints_nothing(here, capsys):
    """As compare.py needs it."""
    model = make()
    settings = Namespace(
        **train.PRESETS["tiny"] | {"block_size": 16, "batch_size": 4, "tokens": 640},
        **dict(weight_decay=0.1, warmup=None, eval_every=None, save_every=None, seed=0),
        **dict(dtype="float32", compile=False),
    )
    data = load_dataset("pycode", "bytes", "data")
    progress = train.new_progress({})
    before = sorted(os.listdir())
    train.train(model, settings, progress, data)
    assert len(progress["losses"]) == progress["step"] == 10 and progress["valid"] == []
    assert sorted(os.listdir()) == before and capsys.readouterr() == ("", "")


# ---- Interrupted and resumed ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_twice_a_run_is_bit_for_bit_the_one_that_was_not(
    here, monkeypatch, capsys, dtype
):
    """While the base is trained, and then in the run itself."""
    run = [*RUN, "--tokens", "2e3", "--dtype", dtype, "--save_every", "7", "--seed", "3"]
    assert call(monkeypatch, *run, "--out", "whole.pt") == 0
    (base,) = glob.glob("data/base-*.pt")
    whole_base, _ = progress_of(base)
    os.remove(base)
    capsys.readouterr()

    # The base. The whole command goes on with it; --resume cannot, and says so.
    with monkeypatch.context() as patch:
        interrupt(patch, 5, send(signal.SIGTERM))
        assert call(monkeypatch, *run, "--out", "cut.pt") == 130
    assert f"{base} is saved at step 5 of 15; go on with: python train.py" in (
        sentence := capsys.readouterr().err
    )
    assert "--seed 3" in sentence and not os.path.exists("cut.pt")
    assert call(monkeypatch, "train.py", "--resume", "--out", "cut.pt") == 2
    sentence = capsys.readouterr().err
    assert os.path.basename(base) in sentence and "step 5 of 15" in sentence
    assert "repeat the command" in sentence

    # The run.
    with monkeypatch.context() as patch:
        interrupt(patch, 10 + 17, send(signal.SIGINT))
        assert call(monkeypatch, *run, "--out", "cut.pt") == 130
    assert "python train.py --resume --out cut.pt" in capsys.readouterr().err
    assert load_checkpoint("cut.pt")[1]["progress"]["step"] == 17
    assert call(monkeypatch, "train.py", "--resume", "--out", "cut.pt") == 0
    table = closing_table(capsys.readouterr().out)
    assert same_weights(progress_of(base)[0], whole_base)
    (whole, a), (cut, b) = progress_of("whole.pt"), progress_of("cut.pt")
    assert same_weights(whole, cut) and len(a["losses"]) == 31
    for name in ("texts", "step", "losses", "valid", "rows"):
        assert a[name] == b[name]
    assert set(a["texts"]) == {"new", "old", "train"}

    # Nothing is left to do, and that is said.
    assert call(monkeypatch, "train.py", "--resume", "--out", "cut.pt") == 0
    out = capsys.readouterr().out
    assert "cut.pt is finished" in out and closing_table(out) == table
    assert same_weights(whole, progress_of("cut.pt")[0])


def test_overwrite_keeps_the_old_file_until_the_new_run_has_one(here, monkeypatch):
    """At its first checkpoint, at step 0; and nothing else appears."""
    assert call(monkeypatch, *PLAIN, "--tokens", "64") == 0
    with open("ckpt.pt", "rb") as file:
        old = file.read()
    run = [*RUN, "--tokens", "1e3", "--overwrite"]
    with monkeypatch.context() as patch:
        interrupt(patch, 5, crash)  # while its base is trained
        assert call(monkeypatch, *run) == 130
    with open("ckpt.pt", "rb") as file:
        assert file.read() == old
    with monkeypatch.context() as patch:
        interrupt(patch, 11 + 1, crash)
        assert call(monkeypatch, *run) == 130
    model, progress = progress_of("ckpt.pt")
    assert progress["step"] == 0 and model.config.blocks == "TMT" and progress["valid"]
    assert sorted(os.listdir()) == ["ckpt.pt", "data"]
    assert call(monkeypatch, "train.py", "--resume") == 0


def test_a_resume_takes_flags_of_the_machine_and_refuses_what_contradicts_it(
    here, monkeypatch, capsys
):
    assert call(monkeypatch, *RUN, "--tokens", "64") == 0
    other = (
        "--lr 1",
        "--upscale solar",
        "--positions 1",
        "--n_keys 7",
        "--seed 7",
        "--query token",
    )
    for flags in (*other, "--dataset pydocs", "--query_norm", "--d_latent 9"):
        assert call(monkeypatch, "train.py", "--resume", *flags.split()) == 2
        assert f"{flags.split()[0]} contradicts ckpt.pt" in capsys.readouterr().err

    # What says the same is no contradiction.
    flags = "--grad_accum 2 --dtype bfloat16 --no-compile --threads 1 --query head".split()
    assert call(monkeypatch, "train.py", "--resume", *flags, *RUN[1:]) == 0
    settings = load_checkpoint("ckpt.pt")[1]["settings"]
    assert settings["grad_accum"] == 2 and settings["dtype"] == "bfloat16"


def test_a_run_goes_on_with_its_own_texts_alone(here, monkeypatch, capsys):
    """The new one, the old one, and the one that its base was trained on."""
    assert call(monkeypatch, *RUN, "--tokens", "64") == 0
    for name in ("pycode", "pydocs"):
        (path,) = here.glob(f"data/{name}-*/wiki.valid.txt")
        before = path.read_text()
        path.write_text("another text\n" * 100)
        assert call(monkeypatch, "train.py", "--resume") == 2
        assert "is not the text ckpt.pt was begun with" in capsys.readouterr().err
        path.write_text(before)
    (path,) = here.glob("data/pydocs-*/wiki.train.txt")
    path.write_text("another text\n" * 100)
    assert call(monkeypatch, *RUN, "--out", "b.pt") == 2
    error = capsys.readouterr().err
    assert "base-2x32x16-pydocs" in error and "made of another text" in error


def test_a_base_made_with_other_settings_is_refused(here, monkeypatch, capsys):
    assert call(monkeypatch, *RUN, "--tokens", "64") == 0
    for flags in ("--base_lr 1e-2", "--batch_size 8", "--weight_decay 0.3", "--n_head 4"):
        assert call(monkeypatch, *RUN, "--out", "b.pt", *flags.split()) == 2
        error = capsys.readouterr().err
        assert "base-2x32x16-pydocs" in error and "delete it, or name another" in error
        assert not os.path.exists("b.pt")


def test_what_train_did_not_write_is_not_resumed(here, monkeypatch, capsys):
    assert call(monkeypatch, *PLAIN, "--tokens", "64") == 0
    model, info = load_checkpoint("ckpt.pt")
    settings, progress = info["settings"], info["progress"]
    for about in (
        {},
        {"settings": settings},
        {"progress": progress},
        {"settings": settings | {"lr": "fast"}, "progress": progress},
        {"settings": settings | {"batch_size": None}, "progress": progress},
        {"settings": settings, "progress": progress | {"step": "nine"}},
        {"settings": settings, "progress": progress | {"losses": None}},
    ):
        save_checkpoint("ckpt.pt", model, **about)
        assert call(monkeypatch, "train.py", "--resume") == 2
        error = capsys.readouterr().err
        assert "was not written by this version of train.py" in error and "--base" in error


# ---- Several processes, GPUs ---------------------------------------------------------------------
def test_two_processes_train_like_one(here, monkeypatch, root):
    """The same global batch on two gloo processes and on one, 20 steps in fp32."""
    run = [*RUN[1:], "--train", "all", "--tokens", "1280", "--dtype", "float32", "--device", "cpu"]
    assert call(monkeypatch, "train.py", *run, "--out", "one.pt") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(root / "train.py"), *run]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("next: python") == 1  # only rank 0 prints
    (one, a), (two, b) = progress_of("one.pt"), progress_of("ckpt.pt")
    assert a["step"] == b["step"] == 20
    assert [row["old"] for row in a["rows"]] == [row["old"] for row in b["rows"]]
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)
    for (name, x), y in zip(one.named_parameters(), two.parameters(), strict=True):
        # A bias on K shifts all scores alike: its gradient is rounding, no more, and Adam makes
        # whole steps of it.
        if name.endswith("c_attn.bias"):
            x, y = (torch.cat((bias[:32], bias[64:])) for bias in (x, y))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_runs_on_a_gpu_agree_within_tolerance(here, monkeypatch):
    run = [*RUN, "--tokens", "1e3", "--device", "cuda", "--no-compile"]
    for out in ("a.pt", "b.pt"):
        assert call(monkeypatch, *run, "--out", out) == 0
    (a, _), (b, _) = load_checkpoint("a.pt"), load_checkpoint("b.pt")
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-2)


# ---- Settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, base, known, wanted",
    [
        ("--upscale midus", "scratch", None, ("pycode", "pydocs")),
        ("--upscale midus --dataset pydocs", "scratch", None, ("pydocs", "pydocs")),
        ("--upscale midus --dataset text", "scratch", None, ("text", "pydocs")),
        ("--upscale midus --dataset wikitext2", "scratch", None, ("wikitext2", "wikitext2")),
        ("--upscale midus --old_dataset text", "scratch", None, ("pycode", "text")),
        ("", "scratch", None, ("pydocs", None)),
        ("--dataset text", "scratch", None, ("text", None)),
        ("", "a.pt", "pydocs", ("pycode", "pydocs")),
        ("", "a.pt", "pycode", ("pycode", "pycode")),
        ("", "a.pt", "text", ("text", "text")),
        ("--dataset pydocs", "a.pt", "pycode", ("pydocs", "pycode")),
        ("", "gpt2", None, ("wikitext103", None)),
        ("--dataset wikitext2", "gpt2", None, ("wikitext2", None)),
        ("--old_dataset pydocs", "gpt2", None, ("wikitext103", "pydocs")),
    ],
)
def test_which_texts_no_flag_names(monkeypatch, flags, base, known, wanted):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    info = {} if known is None else {"dataset": known}
    assert train.choose_texts(train.parse_arguments(), base, info) == wanted


def settings_of(monkeypatch, flags="", base="scratch", config=None, info=None, device=CPU):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    return train.choose_settings(train.parse_arguments(), base, config, info or {}, device)


def test_presets_go_by_the_width_and_flags_come_first(monkeypatch):
    gpt2 = dict(base="gpt2", config=PRETRAINED["gpt2"], info={"tokenizer": "gpt2"})
    for preset, settings in (
        ("tiny", settings_of(monkeypatch)),
        ("small", settings_of(monkeypatch, "--n_embd 256")),
        ("small", settings_of(monkeypatch, "--dataset wikitext2")),
        ("gpt2", settings_of(monkeypatch, "--n_embd 768")),
        ("gpt2", settings_of(monkeypatch, **gpt2)),
    ):
        assert (
            settings.preset == preset and settings.memory_lr == train.PRESETS[preset]["memory_lr"]
        )
    settings = settings_of(monkeypatch, "--upscale midus", **gpt2)
    assert settings.tokens is None and settings.block_size == 1024  # one epoch
    assert settings.tokenizer == "gpt2" and settings.train == "new"
    settings = settings_of(monkeypatch, "--upscale midus --lr 1 --n_keys 9 --train all")
    assert settings.lr == 1 and settings.options == {"n_keys": 9} and settings.train == "all"
    settings = settings_of(monkeypatch)
    assert settings.lr == settings.base_lr and settings.tokens == settings.base_tokens


def test_what_the_machine_decides(monkeypatch):
    """A GPU compiles where Triton is; several processes share the parts of a batch."""
    gpt2 = dict(base="gpt2", config=PRETRAINED["gpt2"], device=torch.device("cuda"))
    monkeypatch.setattr(common, "has_bf16", lambda device: True)
    for triton, processes, parts in ((None, 1, 8), (object(), 4, 2), (object(), 16, 1)):
        monkeypatch.setattr(train, "find_spec", lambda name, triton=triton: triton)
        monkeypatch.setattr(common, "process_count", lambda processes=processes: processes)
        settings = settings_of(monkeypatch, **gpt2)
        assert settings.compile == bool(triton) and settings.grad_accum == parts
        assert settings.dtype == "bfloat16" and not settings_of(monkeypatch).compile


def test_a_folder_that_a_checkpoint_names_is_used_if_it_exists(monkeypatch, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        info = {"dataset": "pydocs", "tokenizer": "bytes", "data_dir": str(folder)}
        settings = settings_of(
            monkeypatch, base="a.pt", config=GPTConfig(1, 1, 8, 8, 257), info=info
        )
        wanted = str(tmp_path) if folder == tmp_path else os.path.abspath("data")
        assert settings.data_dir == settings.old_data_dir == wanted


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--n_head 3", "n_embd must be a multiple of n_head"),
        ("--upscale midus --top_k 99", "top_k must lie between 2 and n_keys, 32"),
        ("--upscale midus --top_k 1", "top_k must lie between 2"),
        ("--upscale midus --positions 9", "between 1 and 4"),
        ("--upscale midus --positions 1,1", "different numbers"),
        ("--upscale solar --every 3", "solar takes no every"),
        ("--upscale llama-pro --n_keys 8", "llama-pro takes no n_keys"),
        ("--every 2", "--every: say how with --upscale"),
        ("--train new", "no inserted blocks"),
        ("--train 2,9", "blocks from 1 to 4"),
        ("--base none.pt", "there is no checkpoint at none.pt"),
        ("--base gpt2 --n_layer 3", "only for --base scratch"),
        ("--base gpt2 --block_size 2000", "more than the base's 1024 positions"),
        ("--base gpt2 --tokenizer bytes", "the base was trained with gpt2"),
        ("--tokenizer gpt5", "tokenizer must be gpt2"),
        ("--grad_accum 3", "a batch of 16 cannot be cut in 3 equal parts"),
        ("--device tpu", "device tpu is not available"),
        ("--out nowhere/ckpt.pt", "no file can be written there"),
        ("--out ckpt.bin", "must end in .pt"),
        ("--resume", "there is no checkpoint at ckpt.pt"),
        ("--tokens 0", "not a whole number of at least 1"),
        ("--lr -1", "not a number of at least 0"),
        ("--seed -1", "not a whole number"),
        ("--upscale magic", "invalid choice"),
        ("--upscale midus --query tokens", "invalid choice"),
        ("--upscale midus --n_keys 1000000000", ""),
        ("--upscale midus --d_latent 1000000000000000000", ""),
        ("--upscale midus --n_embd 10000000000", ""),
        ("--upscale midus --block_size 1000000000000000000", ""),
    ],
)
def test_bad_input_gets_one_line_and_status_2_before_anything_begins(
    tmp_path, monkeypatch, capsys, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_dataset", None)  # nothing may get this far
    assert call(monkeypatch, "train.py", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_text_that_is_too_short_is_refused_before_the_base_is_trained(here, monkeypatch, capsys):
    (path,) = here.glob("data/pycode-*/wiki.train.txt")
    path.write_text("short")
    assert call(monkeypatch, *RUN) == 2
    assert "too few for a batch of 4 sequences of 16, which needs 81" in capsys.readouterr().err
    assert not glob.glob("data/base-*")


# ---- Optimizer, schedule, step -------------------------------------------------------------------
def make():
    torch.manual_seed(0)
    model = upscale(GPT(GPTConfig(2, 2, 32, 16, 257)), "midus", n_keys=6, top_k=3, d_latent=8)
    set_trainable(model, "all")
    return model


@pytest.mark.parametrize("which", ["all", "new"])
def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay(which):
    model = make()
    set_trainable(model, which)
    optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            bank = names[id(p)].endswith("hive.bank")
            assert group["lr"] == (1e-2 if bank else 1e-3)
            assert group["weight_decay"] == (0.1 if p.dim() > 1 and not bank else 0)


def test_the_rate_rises_and_falls_to_a_tenth():
    values = [train.schedule(step, 10, 100) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11) and max(values) == values[10] == 1.0
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert 0.1 <= values[-1] < 0.11
    assert train.schedule(0, 0, 1) == 1.0


def test_a_batch_in_parts_is_the_batch():
    x, y = torch.randint(0, 257, (2, 8, 16))
    after = []
    for parts in (1, 4):
        model = make()
        optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
        loss = train.train_step(model, optimizer, (x, y), torch.float32, parts)
        after.append((loss, model.h[0].mlp.c_fc.bias.detach()))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-6)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-5, rtol=0)


def spoil(model):
    model.ln_f.bias.data[0] = math.nan


def test_nan_stops_before_anything_is_touched():
    model = make()
    optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
    spoil(model)
    before = model.wte.weight.clone()
    batch = (torch.zeros(2, 4, dtype=torch.long),) * 2
    with pytest.raises(FloatingPointError, match="NaN or infinite; try a lower --lr"):
        train.train_step(model, optimizer, batch, torch.float32, 1)
    assert torch.equal(model.wte.weight, before)


def test_nan_ends_a_run_with_status_1_and_keeps_the_last_checkpoint(here, monkeypatch, capsys):
    interrupt(monkeypatch, 9, spoil)
    assert call(monkeypatch, *PLAIN, "--tokens", "1e3", "--save_every", "4") == 1
    assert capsys.readouterr().err.startswith("error: the loss or a gradient became NaN")
    model, progress = progress_of("ckpt.pt")
    assert progress["step"] == 8 and model.ln_f.bias.isfinite().all()


def test_a_bad_update_after_a_good_loss_is_not_saved(here, monkeypatch, capsys):
    original = train.train_step

    def worse(model, *rest):
        loss = original(model, *rest)
        model.wte.weight.data *= 1e30  # finite, but what the model says is not
        return loss

    monkeypatch.setattr(train, "train_step", worse)
    assert call(monkeypatch, *PLAIN, "--tokens", "64", "--eval_every", "9") == 1
    assert capsys.readouterr().err.startswith("error: the loss or a gradient became NaN")
    assert progress_of("ckpt.pt")[1]["step"] == 0
