"""Training: the whole command, resume to the last bit, groups, schedule, what is refused."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import train
from conftest import call
from data import load_dataset
from eval import sum_nll
from model import GPT, PRETRAINED, GPTConfig, load_checkpoint, save_checkpoint
from upscale import set_trainable, upscale

TINY = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --base_tokens 2e3".split()
MIDUS = ["--upscale", "midus", "--n_keys", "6", "--top_k", "3", "--d_latent", "8"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder whose ./data holds a small data set, taken from Python's own
    documentation.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    (tmp_path / "data").mkdir()
    for split, part in (
        ("train", text[:40_000]),
        ("valid", text[40_000:42_000]),
        ("test", text[42_000:44_000]),
    ):
        (tmp_path / "data" / f"wiki.{split}.tokens").write_text(part, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments):
    return [
        "train.py",
        "--dataset",
        "wikitext2",
        "--base",
        "scratch",
        "--tokenizer",
        "bytes",
        *arguments,
    ]


def same_weights(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_main_command_from_scratch_to_table(here, monkeypatch, capsys):
    assert call(monkeypatch, *command(*TINY, *MIDUS, "--tokens", "1e4")) == 0
    out = capsys.readouterr().out
    table = {
        line[:20].strip(): line.split()
        for line in out.splitlines()
        if line.startswith(("base  ", "midus, "))
    }
    base, start, end = (table[label] for label in ("base", "midus, start", "midus, end"))
    assert base[4] == start[5] and float(end[5]) < float(
        start[5]
    )  # starts exactly where the base stands
    model, info = load_checkpoint("ckpt.pt")
    assert (
        model.config.blocks == "TMT" and info["method"] == "midus" and info["step"] == 10_000 // 64
    )
    log = [json.loads(line) for line in open("ckpt.jsonl")]
    assert log == info["history"] and [entry["step"] for entry in log] == list(
        range(1, info["step"] + 1)
    )
    nll, tokens = sum_nll(
        model, load_dataset("wikitext2", "bytes", "data", ("valid",))["valid"].tokens
    )
    assert f"{math.exp(nll / tokens):.4f}" == end[5]
    # the base is found again, the checkpoint is not overwritten
    assert call(monkeypatch, *command(*TINY, *MIDUS)) == 2
    assert call(monkeypatch, *command(*TINY, *MIDUS, "--tokens", "500", "--out", "b.pt")) == 0
    assert "trained already" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_and_a_resume_give_the_same_losses_bit_for_bit(here, monkeypatch, dtype):
    arguments = command(
        *TINY, *MIDUS, "--tokens", "2e3", "--dtype", dtype, "--save_every", "7", "--seed", "3"
    )
    assert call(monkeypatch, *arguments, "--out", "whole.pt") == 0

    steps, original = [], train.train_step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert call(monkeypatch, *arguments, "--out", "cut.pt") == 130
    assert load_checkpoint("cut.pt")[1]["step"] == 17
    assert call(monkeypatch, "train.py", "--resume", "--out", "cut.pt") == 0
    (whole, a), (cut, b) = load_checkpoint("whole.pt"), load_checkpoint("cut.pt")
    assert a["history"] == b["history"] and len(a["history"]) == 31 and same_weights(whole, cut)
    assert open("whole.jsonl").read() == open("cut.jsonl").read()


def test_an_interrupted_base_goes_on_by_itself(here, monkeypatch, capsys):
    arguments = command(*TINY, *MIDUS, "--tokens", "500")
    original = train.train_step

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert call(monkeypatch, *arguments) == 130
    assert not os.path.exists("ckpt.pt")
    assert call(monkeypatch, *arguments) == 0
    assert "step 1 of 31" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, train_what",
    [("none", "all"), ("llama-pro", "new"), ("solar", "all"), ("midus", "all")],
)
def test_every_method_trains_what_it_says(here, monkeypatch, method, train_what):
    config = GPTConfig(2, 2, 32, 16, 257)
    torch.manual_seed(0)
    base = GPT(config)
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="wikitext2")
    flags = [] if method == "none" else ["--upscale", method, "--train", train_what]
    small = ["--n_keys", "6", "--top_k", "3", "--d_latent", "8"] if method == "midus" else []
    arguments = ["train.py", "--base", "base.pt", "--batch_size", "4", "--tokens", "1e3"]
    assert call(monkeypatch, *arguments, *flags, *small) == 0
    model, info = load_checkpoint("ckpt.pt")
    old = [block for i, block in enumerate(model.h) if i not in model.config.new]
    if method in ("llama-pro", "midus"):
        assert all(same_weights(a, b) for a, b in zip(old, base.h)) == (train_what == "new")
    assert torch.equal(model.wte.weight, base.wte.weight) == (train_what == "new")
    assert all(math.isfinite(entry["loss"]) for entry in info["history"])


def test_methods_that_start_as_the_base_see_the_same_batches(here, monkeypatch):
    losses = {}
    for method, flags in (("midus", MIDUS), ("llama-pro", ["--upscale", "llama-pro"])):
        arguments = command(
            *TINY, *flags, "--tokens", "2e3", "--dtype", "float32", "--out", f"{method}.pt"
        )
        assert call(monkeypatch, *arguments) == 0
        losses[method] = [entry["loss"] for entry in load_checkpoint(f"{method}.pt")[1]["history"]]
    assert (
        losses["midus"][0] == losses["llama-pro"][0]
        and losses["midus"][-1] != losses["llama-pro"][-1]
    )
    assert all(abs(a - b) < 0.1 for a, b in zip(*losses.values(), strict=True))


def test_two_processes_train_like_one(here, monkeypatch, root):
    """The same global batch on two gloo processes and on one, 20 steps in fp32."""
    arguments = command(
        *TINY, *MIDUS, "--train", "all", "--tokens", "1280", "--dtype", "float32", "--device", "cpu"
    )
    assert call(monkeypatch, *arguments, "--out", "one.pt") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, str(root / "train.py"), *arguments[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("next: python") == 1  # only rank 0 prints
    (one, a), (two, b) = load_checkpoint("one.pt"), load_checkpoint("ckpt.pt")
    assert a["step"] == b["step"] == 20
    for x, y in zip(a["history"], b["history"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
    for (name, x), y in zip(one.named_parameters(), two.parameters(), strict=True):
        if name.endswith(
            "c_attn.bias"
        ):  # a bias on K shifts all scores alike: its gradient is rounding, no more,
            x, y = (
                torch.cat((bias[:32], bias[64:])) for bias in (x, y)
            )  # and Adam makes whole steps of it
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_a_base_by_name_is_read_and_up_scaled(here, gpt2_vocabulary, monkeypatch):
    """--base gpt2, with a small file in its layout where the download would be kept."""
    import model
    from test_model import openai_layout

    small = GPT(GPTConfig(2, 1, 64, block_size=1024, vocab_size=257))
    torch.save(openai_layout(small, False), "data/gpt2.bin")
    monkeypatch.setitem(model.GPT2_SHA256, "gpt2", None)
    monkeypatch.setitem(train.PRETRAINED, "gpt2", small.config)
    monkeypatch.setattr(train, "check_vocabulary", lambda *args: None)
    loaded = load_dataset("wikitext2", "bytes", "data", ("train", "valid"))
    monkeypatch.setattr(train, "load_dataset", lambda *args: loaded)
    arguments = "--base gpt2 --dataset wikitext2 --block_size 16 --tokens 600 --batch_size 8"
    assert call(monkeypatch, "train.py", *arguments.split(), *MIDUS) == 0
    deeper = load_checkpoint("ckpt.pt")[0]
    assert deeper.config.blocks == "TMT" and same_weights(deeper.h[0], small.h[0])


def make(method="midus"):
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 32, 16, 257))
    model = upscale(base, method, n_keys=6, top_k=3, d_latent=8) if method == "midus" else base
    set_trainable(model, "all")
    return model


def test_groups_cover_every_trainable_parameter_once():
    for which in ("all", "new"):
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


def test_a_run_ends_with_a_verdict(here, monkeypatch, capsys):
    """In words, with what the base and the deeper model say, and what to do next."""
    assert call(monkeypatch, *command(*TINY, *MIDUS, "--tokens", "1e3")) == 0
    out = capsys.readouterr().out
    assert "parameters more; it started exactly as the base" in out
    assert out.rstrip().endswith("next: python eval.py ckpt.pt")
    base, end = out.split("How each goes on")[1].splitlines()[1:3]
    assert base.split()[0] == "base" and end.split()[:2] == ["midus,", "end"]
    assert max(len(base), len(end)) <= 4 + 18 + 80

    (base,) = (here / "data").glob("base-*.pt")
    flags = f"--upscale solar --base {base} --batch_size 4 --tokens 640 --out solar.pt"
    assert call(monkeypatch, "train.py", *flags.split()) == 0
    assert "it started at" in capsys.readouterr().out


def test_samples_draw_no_random_numbers(here, monkeypatch):
    """Else the closing table would change what is trained."""
    assert call(monkeypatch, *command(*TINY, *MIDUS, "--tokens", "1e3")) == 0
    monkeypatch.setattr(train, "sample", lambda *args: "")
    assert call(monkeypatch, *command(*TINY, *MIDUS, "--tokens", "1e3", "--out", "b.pt")) == 0
    (a, _), (b, _) = load_checkpoint("ckpt.pt"), load_checkpoint("b.pt")
    assert same_weights(a, b)


def test_losses_are_drawn_beside_those_of_other_runs(here, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = [*TINY, "--tokens", "1e3"]
    assert call(monkeypatch, *command(*run, *MIDUS, "--out", "m.pt", "--plot")) == 0
    assert (here / "m.png").read_bytes().startswith(b"\x89PNG")
    flags = ["--upscale", "llama-pro", "--out", "c.pt", "--plot", "m.jsonl"]
    assert call(monkeypatch, *command(*run, *flags)) == 0
    assert (here / "c.png").exists()

    # A file that holds no losses is refused before anything begins.
    (here / "no.jsonl").write_text("[1]\n")
    for path in ("no.jsonl", "none.jsonl", "m.pt"):
        assert call(monkeypatch, *command(*run, "--out", "d.pt", "--plot", path)) == 2
        assert "does not hold the losses of a run" in capsys.readouterr().err


def test_gradient_accumulation_equals_one_batch():
    x, y = torch.randint(0, 257, (2, 8, 16))
    after = []
    for parts in (1, 4):
        model = make()
        optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
        loss = train.train_step(model, optimizer, (x, y), torch.float32, parts)
        after.append((loss, model.h[0].mlp.c_fc.bias.detach()))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-6)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_runs_on_a_gpu_agree_within_tolerance(here, monkeypatch):
    run = command(*TINY, *MIDUS, "--tokens", "1e3", "--device", "cuda", "--no-compile")
    for out in ("a.pt", "b.pt"):
        assert call(monkeypatch, *run, "--out", out) == 0
    (a, _), (b, _) = load_checkpoint("a.pt"), load_checkpoint("b.pt")
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-2)


def test_a_gpu_takes_as_many_sequences_as_fit(monkeypatch):
    """GPT-2's shape, on cards of several sizes; in fp32 half as many; on a Mac at most 8."""
    with torch.device("meta"):
        model = train.upscale(GPT(PRETRAINED["gpt2"]), "midus")
    settings = train.Settings(block_size=1024, batch_size=32, dtype="bfloat16")
    parts = {}
    for size in (6, 8, 16, 24, 80):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d, size=size: (size * 2**30, 0))
        parts[size] = train.parts_that_fit(model, settings, torch.device("cuda"))
    assert parts == {6: 16, 8: 8, 16: 4, 24: 2, 80: 1}
    settings.dtype = "float32"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (24 * 2**30, 0))
    assert train.parts_that_fit(model, settings, torch.device("cuda")) == 4
    assert train.parts_that_fit(model, settings, torch.device("mps")) == 4


def test_a_resume_keeps_what_was_asked_for(here):
    """--compile too, and the parts: only a flag may change what belongs to the machine."""
    begun = train.Settings(compile=True, grad_accum=4, threads=3)
    saved = {"step": 1, "settings": train.dataclasses.asdict(begun)}
    assert train.settings_on_resume(saved, {}, "ckpt.pt") == begun
    saved = {"step": 1, "settings": train.dataclasses.asdict(begun)}
    changed = train.settings_on_resume(saved, {"compile": False}, "ckpt.pt")
    assert changed.compile is False and changed.grad_accum == 4


def test_a_gpu_compiles_where_it_can(monkeypatch):
    for triton, wanted in ((None, False), (object(), True)):
        monkeypatch.setattr(train, "find_spec", lambda name, triton=triton: triton)
        settings = train.Settings(grad_accum=8)
        train.choose_for_machine(settings, torch.device("cuda"))
        assert settings.compile == wanted and settings.grad_accum is None
        train.choose_for_machine(settings, torch.device("cpu"))
        assert settings.compile is False


def test_schedule_rises_and_falls():
    values = [train.schedule(step, 10, 100) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11) and max(values) == values[10] == 1.0
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert 0.1 <= values[-1] < 0.11
    assert train.schedule(0, 0, 1) == 1.0


def test_nan_stops_before_anything_is_touched():
    model = make()
    optimizer = train.make_optimizer(model, 1e-3, 1e-2, 0.1)
    model.ln_f.bias.data[0] = float("nan")
    before = model.wte.weight.clone()
    with pytest.raises(FloatingPointError, match="NaN or infinite; try a lower --lr"):
        batch = (torch.zeros(2, 4, dtype=torch.long),) * 2
        train.train_step(model, optimizer, batch, torch.float32, 1)
    assert torch.equal(model.wte.weight, before)


def test_nan_ends_a_run_with_a_sentence_and_keeps_the_last_checkpoint(here, monkeypatch, capsys):
    steps, original = [], train.train_step

    def poisoned(model, *rest):
        steps.append(1)
        if len(steps) == 9:
            model.ln_f.bias.data[0] = float("nan")
        return original(model, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    arguments = command(*TINY[:-2], "--upscale", "none", "--tokens", "1e3", "--save_every", "4")
    assert call(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err.startswith("error: the loss or a gradient became NaN")
    model, info = load_checkpoint("ckpt.pt")
    assert info["step"] == 8 and model.ln_f.bias.isfinite().all()


def test_a_bad_update_after_a_good_loss_is_not_saved(here, monkeypatch, capsys):
    original = train.train_step

    def worse(model, *rest):
        loss = original(model, *rest)
        model.wte.weight.data *= 1e30  # finite, but what the model says is not
        return loss

    monkeypatch.setattr(train, "train_step", worse)
    assert call(monkeypatch, *command(*TINY[:-2], "--tokens", "64", "--eval_every", "9")) == 1
    assert capsys.readouterr().err.startswith("error: the loss or a gradient became NaN")
    assert not os.path.exists("ckpt.pt")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--n_head", "3"], "n_embd must be a multiple of n_head"),
        (["--upscale", "midus", "--top_k", "99"], "top_k must lie between 2 and n_keys, 32"),
        (["--upscale", "midus", "--top_k", "1"], "top_k must lie between 2"),
        (["--upscale", "midus", "--positions", "9"], "positions must lie between 1 and 4"),
        (["--upscale", "midus", "--positions", "1,1"], "positions repeat"),
        (["--upscale", "solar", "--every", "3"], "solar has one seam"),
        (["--upscale", "llama-pro", "--n_keys", "8"], "--n_keys: only with --upscale midus"),
        (
            ["--upscale", "llama-pro", "--memory_lr", "1e-3"],
            "--memory_lr: there are no memory blocks",
        ),
        (["--every", "2"], "--every: only with --upscale"),
        (["--base_tokens", "5"], "--base_tokens: only with --upscale"),
        (["--train", "new"], "needs inserted blocks"),
        (["--train", "2,9"], "blocks from 1 to 4"),
        (["--base", "none.pt"], "there is no checkpoint at none.pt"),
        (
            ["--base", "gpt2", "--n_layer", "3"],
            "--n_layer: this run has --base gpt2; add --base scratch",
        ),
        (["--base", "gpt2", "--block_size", "2000"], "more than the base's 1024 positions"),
        (["--base", "gpt2", "--tokenizer", "bytes"], "the base was trained with gpt2"),
        (["--tokenizer", "gpt5"], "tokenizer must be gpt2"),
        (["--grad_accum", "3"], "must divide the batch of 16"),
        (["--device", "tpu"], "device tpu is not available"),
        (["--out", "nowhere/ckpt.pt"], "there is no such folder"),
        (["--resume"], "there is no checkpoint at ckpt.pt"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--tokens", "0"], "not a whole number of at least 1"),
        (["--tokens", "1.5"], "not a whole number of at least 1"),
        (["--tokens", "inf"], "not a whole number of at least 1"),
        (["--lr", "-1"], "not a number of at least 0"),
        (["--seed", "-1"], "not a whole number"),
        (["--seed", "1e30"], "not a whole number"),
        (["--lr", "nan"], "not a number of at least 0"),
        (["--upscale", "magic"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_before_anything_begins(
    tmp_path, monkeypatch, capsys, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_dataset", None)  # nothing may get this far
    assert call(monkeypatch, "train.py", *flags) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_resume_refuses_what_contradicts_the_checkpoint(here, monkeypatch, capsys):
    assert call(monkeypatch, *command(*TINY[:-2], "--tokens", "300")) == 0
    for flags in (["--lr", "1"], ["--upscale", "midus"], ["--positions", "1"], ["--seed", "7"]):
        assert call(monkeypatch, "train.py", "--resume", *flags) == 2
        assert f"{flags[0]} contradicts ckpt.pt" in capsys.readouterr().err
    assert call(monkeypatch, "train.py", "--resume", "--n_layer", "2") == 0  # says the same: fine
    save_checkpoint("plain.pt", make())
    assert call(monkeypatch, "train.py", "--resume", "--out", "plain.pt") == 2
    assert "was not written by this version of train.py" in capsys.readouterr().err
    model, saved = load_checkpoint("ckpt.pt")
    del saved["settings"]["lr"]
    save_checkpoint("older.pt", model, **saved)
    assert call(monkeypatch, "train.py", "--resume", "--out", "older.pt") == 2
    assert "was not written by this version of train.py" in capsys.readouterr().err
    flags = "--grad_accum 2 --dtype float32 --no-compile".split()  # another machine may need these
    assert call(monkeypatch, "train.py", "--resume", *flags) == 0
    assert "grad_accum   2" in capsys.readouterr().out
    (here / "data" / "wiki.train.tokens").write_text("another text\n" * 100)
    assert call(monkeypatch, "train.py", "--resume") == 2
    assert "is not the text ckpt.pt was begun with" in capsys.readouterr().err


def test_overwrite_moves_the_old_file_aside(here, monkeypatch):
    """Otherwise a run that is killed before its first checkpoint would be resumed as the one
    before.
    """
    assert call(monkeypatch, *command(*TINY[:-2], "--tokens", "64")) == 0
    old = open("ckpt.pt", "rb").read()
    monkeypatch.setattr(train, "train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(monkeypatch, *command(*TINY[:-2], "--tokens", "640", "--overwrite")) == 130
    assert open("ckpt.pt.old", "rb").read() == old and not os.path.exists("ckpt.pt")


def test_a_text_that_is_too_short_is_refused(here, monkeypatch, capsys):
    (here / "data" / "wiki.train.tokens").write_text("short")
    assert call(monkeypatch, *command(*TINY, "--upscale", "midus")) == 2
    assert "too few for a batch of 4 sequences of 16, which needs 81" in capsys.readouterr().err
