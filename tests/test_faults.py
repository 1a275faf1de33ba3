"""Faults are injected, and each must end as promised: nothing lost but the work since the last
checkpoint, nothing half-written, nothing loaded unchecked, one sentence. `pytest --long` tries more
often.
"""

import hashlib
import http.server
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import common
import data
import train
from common import download
from conftest import call
from data import load_dataset
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from test_model import refused_or_the_same
from test_train import MIDUS, TINY, command, here, same_weights  # noqa: F401 (here is a fixture)

SMALL = GPTConfig(3, 2, 8, 8, 20, "TMT", n_keys=4, top_k=2, d_latent=3, new=(1,))


def leftovers(folder):
    """Files that are being written, or were when their process was killed."""
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def train_command(root):
    """On the CPU, where the same bits come out."""
    return [sys.executable, str(root / "train.py"), "--device", "cpu"]


# ---- Killed --------------------------------------------------------------------------------------
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_happened(here, monkeypatch, root, long):  # noqa: F811
    """SIGKILL at random moments of the whole command.

    Imports, tokenizing, the base, checkpoints, training.
    """
    arguments = command(*TINY, *MIDUS, "--tokens", "2e4", "--save_every", "3")
    start = time.time()
    run = subprocess.run([*train_command(root), *arguments[1:], "--out", "whole.pt"])
    seconds = time.time() - start
    assert run.returncode == 0
    for name in os.listdir("data"):  # the cut run starts with nothing but the text
        if not name.startswith("wiki."):
            os.remove(os.path.join("data", name))
    wanted, killed, rng = (
        20 if long else 3,
        [],
        random.Random(0),
    )  # killed: the step that was saved, each time
    while len(killed) < wanted:
        flags = ["--resume"] if os.path.exists("ckpt.pt") else arguments[1:]
        with open("log", "w") as log:
            process = subprocess.Popen([*train_command(root), *flags], stdout=log, stderr=log)
        end = time.time() + rng.uniform(0.3, 1.0) * seconds
        while process.poll() is None and time.time() < end:
            writing = leftovers(".") + leftovers("data")
            if (
                writing and len(killed) % 2 and rng.random() < 0.2
            ):  # every other time: while a file is being written
                break
        process.kill()
        if process.wait() == 0:  # it was faster: begin anew, and wait less long
            seconds *= 0.9
            for path in ("ckpt.pt", "ckpt.jsonl"):
                os.remove(path)
            continue
        assert process.returncode == -signal.SIGKILL, open("log").read()
        killed.append(load_checkpoint("ckpt.pt")[1]["step"] if os.path.exists("ckpt.pt") else 0)
    flags = ["--resume"] if os.path.exists("ckpt.pt") else arguments[1:]
    assert call(monkeypatch, "train.py", *flags) == 0
    (cut, a), (whole, b) = load_checkpoint("ckpt.pt"), load_checkpoint("whole.pt")
    assert a["history"] == b["history"] and len(a["history"]) == 312 and same_weights(cut, whole)
    written = [name for name in os.listdir("data") if name.endswith((".pt", ".bin"))]
    assert (
        len(written) == 3
    )  # the base, and two splits; what a kill left of a file has another name
    print(f"killed {len(killed)} times, with steps {killed} saved: nothing saved was lost")


# ---- Disk ----------------------------------------------------------------------------------------
def test_a_full_disk_keeps_the_old_checkpoint(here, monkeypatch, root):  # noqa: F811
    """A run is stopped, and goes on where there is no room (a limit on file size stands for the
    disk).
    """
    original = train.train_step

    def stopped(*args):
        for _ in range(2):  # twice, as when torchrun and another both stop a job
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        assert (
            call(monkeypatch, *command(*TINY[:-2], "--upscale", "none", "--tokens", "640")) == 130
        )
    room, old = os.path.getsize("ckpt.pt") // 2, open("ckpt.pt", "rb").read()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run = subprocess.run(
        [*train_command(root), "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert (
        run.returncode == 1
        and "could not write ckpt.pt" in run.stderr
        and "Traceback" not in run.stderr
    )
    assert open("ckpt.pt", "rb").read() == old and not leftovers(".")


def test_a_full_disk_while_text_is_tokenized(here):  # noqa: F811
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="could not write .*wikitext2-valid-bytes.*: "):
            load_dataset("wikitext2", "bytes", "data", ("valid",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not [name for name in os.listdir("data") if name.startswith("wikitext2-valid")]
    assert len(load_dataset("wikitext2", "bytes", "data", ("valid",))["valid"].tokens) > 1000


def test_a_folder_that_cannot_be_written_is_named(here, monkeypatch, capsys):  # noqa: F811
    """Root may write to a read-only folder, but not to /proc."""
    if os.geteuid() == 0:
        folder = "/proc"
    else:
        folder = "locked"
        os.mkdir(folder, 0o555)
    status = call(
        monkeypatch,
        *command(*TINY[:-2], "--upscale", "none", "--tokens", "64", "--out", f"{folder}/a.pt"),
    )
    assert status in (1, 2) and f"{folder}/a." in capsys.readouterr().err


# ---- Checkpoints ---------------------------------------------------------------------------------
def test_a_thousand_corruptions(tmp_path, long):
    """Cut anywhere, or one bit flipped anywhere: refused, or without effect."""
    path = tmp_path / "a.pt"
    model = GPT(SMALL)
    save_checkpoint(str(path), model)
    whole, rng = path.read_bytes(), random.Random(0)
    tries = 10_000 if long else 1000
    harmless = 0
    for case in range(tries):
        at = rng.randrange(len(whole))
        cut = case % 2 == 1
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(whole[:at] if cut else whole[:at] + flipped + whole[at + 1 :])
        refused = refused_or_the_same(str(path), model)
        assert refused or not cut
        harmless += not refused
    print(f"{harmless} of {tries} did no harm, all else was refused")
    assert harmless < tries / 10


def saved(path, content: dict | bytes) -> str:
    """A file that is not damaged, whatever is in it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return str(path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_foreign_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Bomb()), {"config": Bomb(), "model": {}}):
        with pytest.raises(ValueError, match="does not hold a nanoMIDUS model|is no nanoMIDUS"):
            load_checkpoint(saved(tmp_path / "bomb.pt", content))
    assert not os.path.exists("exploded")


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_checkpoint(str(tmp_path / "a.pt"), GPT(SMALL))
    good = torch.load(tmp_path / "a.pt", weights_only=True)
    without = {
        name: tensor for name, tensor in good["model"].items() if name != "h.1.memory.hive.bank"
    }
    config = good["config"]
    cases = (
        ("another project's state dict", {"layers.0.weight": torch.zeros(3)}, "config"),
        ("a list", [1, 2], ""),
        ("no weights", {"config": config}, "model"),
        ("a missing key", {"config": config, "model": without}, "h.1.memory.hive.bank"),
        ("an extra key", good | {"model": good["model"] | {"h.9.x": torch.zeros(1)}}, "h.9.x"),
        (
            "a shape that contradicts the config",
            good | {"config": config | {"n_embd": 16}},
            "size mismatch",
        ),
        (
            "a config that contradicts itself",
            good | {"config": config | {"n_head": 3}},
            "n_embd must be a multiple",
        ),
        ("an unknown setting", good | {"config": config | {"depth": 3}}, "depth"),
        ("absurd sizes", good | {"config": config | {"vocab_size": 10**12}}, "size mismatch"),
        ("absurd memory", good | {"config": config | {"n_keys": 10**7}}, "size mismatch"),
        (
            "absurd depth",
            good | {"config": config | {"n_layer": 10**9, "blocks": ""}},
            "at most 1000",
        ),
        ("words for numbers", good | {"config": config | {"n_layer": "three"}}, ""),
    )
    for what, content, reason in cases:
        with pytest.raises(ValueError, match=f"does not hold a nanoMIDUS model.*{reason}"):
            load_checkpoint(saved(tmp_path / "b.pt", content))
            print(what)
    for about, reason in (
        ({}, "does not say its tokenizer"),
        ({"tokenizer": "words"}, "tokenizer must be gpt2"),
        ({"tokenizer": "bytes"}, "fewer tokens than its tokenizer: bytes"),
    ):
        save_checkpoint(str(tmp_path / "d.pt"), GPT(SMALL), **about)
        assert call(monkeypatch, "eval.py", tmp_path / "d.pt") == 2
        assert reason in capsys.readouterr().err
    for content in (b"", b"just some text\n" * 100):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or is no nanoMIDUS checkpoint"):
            load_checkpoint(str(tmp_path / "c.pt"))


# ---- Downloads -----------------------------------------------------------------------------------
CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server():
    """/good; /moved redirects to it; /stall sends half and waits; /reset sends half and hangs up.

    /403, /404, /500.
    """
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            if name.isdigit():
                return self.send_error(int(name))
            self.send_response(302 if name == "moved" else 200)
            if name == "moved":
                self.send_header("Location", "/good")
                return self.end_headers()
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if name == "good" else CONTENT[: len(CONTENT) // 2])
            self.wfile.flush()
            if name == "stall":
                release.wait(20)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        release.set()
        httpd.shutdown()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("stall", "timed out"),
        ("reset", "ended after 512000 of 1024000 bytes|IncompleteRead"),
        ("403", "403"),
        ("404", "404"),
        ("500", "500"),
    ],
)
def test_a_download_that_fails_leaves_no_file(server, tmp_path, monkeypatch, name, sentence):
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 0.5)
    path, sha256 = tmp_path / "file", hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(OSError, match=sentence):
        download([server + name], str(path), len(CONTENT), sha256)
    assert os.listdir(tmp_path) == []
    download(
        [server + name, server + "500", server + "moved"], str(path), len(CONTENT), sha256
    )  # the next address
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]


def test_killed_while_downloading(server, tmp_path, root):
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import common; "
        f"common.download([{server + 'stall'!r}], 'file', {len(CONTENT)})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while not leftovers(tmp_path) and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(os.listdir(tmp_path)) == len(leftovers(tmp_path)) == 1
    download([server + "good"], str(tmp_path / "file"), len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


# ---- Text and tokens -----------------------------------------------------------------------------
def put(folder, content: bytes) -> None:
    for split in data.SPLITS:
        (folder / f"wiki.{split}.tokens").write_bytes(content)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"one line\n", "one line\n"),
        (b"no end of line", "no end of line"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"\xef\xbb\xbfmarked\n", "marked\n"),
        ("naïve – Ω\n".encode(), "naïve – Ω\n"),
    ],
)
def test_text_in_odd_forms(tmp_path, content, text):
    put(tmp_path, content)
    split = load_dataset("wikitext2", "bytes", str(tmp_path), ("test",))["test"]
    assert bytes(split.tokens.astype(np.uint8)).decode() == text
    assert split.bytes == len(text.encode()) and split.words == len(text.split()) + max(
        1, text.count("\n")
    )


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe\x00", "as UTF-8"),
        (b"caf\xe9 con leche", "as UTF-8"),
    ],
)
def test_text_that_is_refused(tmp_path, content, sentence):
    put(tmp_path, content)
    with pytest.raises(ValueError, match=f"wiki.train.tokens.*{sentence}"):
        load_dataset("wikitext2", "bytes", str(tmp_path))
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize(
    "damage", ["longer", "shorter", "odd", "tokens beyond the vocabulary", "empty"]
)
def test_a_damaged_cache_is_refused(tmp_path, damage):
    put(tmp_path, b"some words\n" * 20)
    load_dataset("wikitext2", "bytes", str(tmp_path), ("test",))
    (cache,) = (path for path in tmp_path.iterdir() if path.suffix == ".bin")
    good = cache.read_bytes()
    bad = {
        "longer": good + b"ab",
        "shorter": good[:-4],
        "odd": good[:-1],
        "empty": b"",
        "tokens beyond the vocabulary": good[:-2] + b"\x01\x02",
    }[damage]
    cache.write_bytes(bad)
    with pytest.raises(ValueError, match=f"{cache.name} is damaged; delete it"):
        load_dataset("wikitext2", "bytes", str(tmp_path), ("test",))


# ---- Flags and numbers ---------------------------------------------------------------------------
CHOICES = {  # every flag: values that make sense, then values that don't or only do with others
    "--n_layer": ["2", "1", "3", "0", "-1", "x", "1e9"],
    "--n_head": ["2", "1", "3", "0"],
    "--n_embd": ["8", "16", "6", "0", "7", "nan"],
    "--block_size": ["8", "16", "1", "0", "1e6", "-5"],
    "--batch_size": ["4", "2", "1", "0", "1e9"],
    "--grad_accum": ["1", "2", "3", "0"],
    "--tokens": ["64", "1", "0", "-1", "inf", "1.5"],
    "--base_tokens": ["64", "1", "0", "nan"],
    "--lr": ["1e-3", "0", "-1", "nan", "inf", "100", "1e30"],
    "--memory_lr": ["1e-2", "0", "-1", "nan", "1e30"],
    "--weight_decay": ["0.1", "0", "-1", "1e9"],
    "--warmup": ["0", "2", "1e9", "-1", "nan"],
    "--eval_every": ["1", "1e9", "0"],
    "--save_every": ["1", "1e9", "0"],
    "--seed": ["0", "7", "-1", "x", "1e30"],
    "--upscale": ["midus", "none", "llama-pro", "solar", "magic"],
    "--train": ["new", "all", "1", "2,9", "no"],
    "--every": ["1", "2", "3", "0"],
    "--positions": ["1", "2", "9", "0"],
    "--n_new": ["1", "2", "9", "0"],
    "--n_keys": ["4", "2", "1", "0", "1e7"],
    "--top_k": ["2", "3", "1", "9", "0"],
    "--d_latent": ["4", "1", "0", "1e12"],
    "--tokenizer": ["bytes", "gpt2:300", "gpt2:9", "words"],
    "--dtype": ["float32", "bfloat16", "int8"],
    "--resume": [None],
    "--device": ["cpu", "cuda", "mps", "tpu"],
    "--base": ["scratch", "none.pt", "gpt5", "."],
    "--query_norm": [None],
    "--data_dir": ["data", "nowhere"],
    "--dataset": ["wikitext2", "imagenet"],
    "--out": ["a.pt", "no/a.pt", "."],
}


def test_any_flags_train_a_step_or_are_refused_with_a_sentence(here, monkeypatch, capsys, long):  # noqa: F811
    """Seeded random command lines around one that works.

    None ends in a traceback, none trains when refused.
    """
    if not torch.cuda.is_available():  # no download where a data set or a base is not there
        monkeypatch.setattr(
            data, "download", lambda *args: (_ for _ in ()).throw(OSError("could not get it"))
        )
    rng, trained, refused = random.Random(0), 0, {}
    usual = {
        "--dataset": "wikitext2",
        "--base": "scratch",
        "--tokenizer": "bytes",
        "--n_layer": "2",
        "--n_head": "2",
        "--n_embd": "8",
        "--block_size": "8",
        "--batch_size": "4",
        "--tokens": "64",
        "--base_tokens": "64",
        "--upscale": "midus",
        "--n_keys": "4",
        "--top_k": "2",
        "--d_latent": "4",
        "--device": "cpu",
    }
    steps, original = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or original(*args))
    for _ in range(600 if long else 60):
        flags = dict(usual)
        for name in rng.sample(sorted(CHOICES), rng.randint(0, 3)):
            flags[name] = rng.choice(CHOICES[name])
        if flags["--upscale"] != "midus":
            flags = {
                n: v for n, v in flags.items() if n not in ("--n_keys", "--top_k", "--d_latent")
            }
        line = [part for pair in flags.items() for part in pair if part is not None]
        steps.clear()
        status = call(monkeypatch, "train.py", *line, *["--overwrite"] * ("--resume" not in flags))
        error = capsys.readouterr().err
        assert status in (0, 1, 2) and "Traceback" not in error, (line, error)
        if status == 0:
            assert steps or "--resume" in flags, line  # which may find nothing left to do
            trained += 1
        else:
            sentence = error.strip().splitlines()[-1]
            assert "error:" in sentence and len(sentence) < 400, (line, error)
            assert status == 1 or not steps, (
                line,
                sentence,
            )  # bad input is found before anything is trained
            refused[sentence] = refused.get(sentence, 0) + 1
    print(f"{trained} trained, {sum(refused.values())} refused with {len(refused)} sentences")
    assert trained > 10 and len(refused) > 10


@pytest.mark.parametrize("lr", ["100", "1e10"])
def test_an_absurd_learning_rate_ends_in_a_sentence(here, monkeypatch, capsys, lr):  # noqa: F811
    """It may survive, by luck.

    If not, what was saved before is whole, if anything was good enough to be saved.
    """
    flags = ("--upscale", "none", "--tokens", "2e3", "--lr", lr, "--save_every", "1")
    status = call(monkeypatch, *command(*TINY[:-2], *flags))
    error = capsys.readouterr().err
    assert status in (0, 1) and "Traceback" not in error
    if status == 1:
        assert "became NaN or infinite" in error
        if os.path.exists("ckpt.pt"):
            model = load_checkpoint("ckpt.pt")[0]
            assert model(torch.arange(16)[None]).isfinite().all()


def test_a_soak(here, monkeypatch, long):  # noqa: F811
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
    assert (
        call(monkeypatch, *command(*TINY[:-2], "--base_tokens", "64", *MIDUS, "--tokens", "320000"))
        == 0
    )
    early, late = np.median(times[500:1500]), np.median(times[-1000:])
    print(
        f"{len(times)} steps: {early * 1e3:.2f} ms early, {late * 1e3:.2f} ms late; "
        f"resident MiB {sizes}"
    )
    assert late < 1.25 * early and sizes[-1] < sizes[1] + 20
