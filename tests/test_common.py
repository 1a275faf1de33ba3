"""What is not about MIDUS: downloads from a local server, files, flags, how a command ends."""

import argparse
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from common import (
    download,
    has_bf16,
    join_processes,
    new_file,
    pick_device,
    run_command,
    whole_number,
    whole_numbers,
    written_whole,
)
from conftest import call
from model import GPT, GPTConfig, save_checkpoint

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server on this machine.

    /good, /short (connection ends early), /wrong, /picky (403 to Python's agent), 404.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").split("?")[0]
            if name == "picky" and "Python" in self.headers["User-Agent"]:
                return self.send_error(403)
            body = {
                "good": CONTENT,
                "short": CONTENT[:1000],
                "wrong": b"x" * len(CONTENT),
                "picky": CONTENT,
            }.get(name)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_download(server, tmp_path):
    for name in ("good", "picky"):
        path = tmp_path / "new" / name
        download([server + name], str(path), len(CONTENT), SHA256)
        assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [name]
        path.unlink()


@pytest.mark.parametrize(
    "name, size, sentence",
    [
        ("short", len(CONTENT), "ended after 1000 of 768000 bytes"),
        ("wrong", None, f"its sha256 is [0-9a-f]{{64}}, expected {SHA256}"),
        ("good", 5, "768000 bytes instead of 5"),
        ("missing", None, "404"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(server, tmp_path, name, size, sentence):
    with pytest.raises(OSError, match="Do this instead.*" + sentence):
        download([server + name], str(tmp_path / "file"), size, SHA256, "Do this instead.")
    assert os.listdir(tmp_path) == []


def test_the_next_address_is_tried(server, tmp_path):
    (tmp_path / "file").write_bytes(b"damaged")
    download(
        [server + "missing", server + "short", server + "good"],
        str(tmp_path / "file"),
        len(CONTENT),
        SHA256,
    )
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]


def test_a_good_file_is_not_fetched_again(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    download(["http://127.0.0.1:9/closed"], str(tmp_path / "file"), len(CONTENT), SHA256)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a temporary name of its own, and the last to end wins."""
    path = str(tmp_path / "file")
    with written_whole(path) as first, written_whole(path) as second:
        assert first != second
        for temporary, text in ((first, "one"), (second, "two")):
            with open(temporary, "w") as file:
                file.write(text)
    assert open(path).read() == "one" and os.listdir(tmp_path) == ["file"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    with written_whole(str(tmp_path / "link")) as temporary, open(temporary, "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_flags_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert whole_number("2e6") == 2_000_000 and whole_numbers("1,3,5") == [1, 3, 5]
    for read, text in (
        (whole_number, "1.5"),
        (whole_numbers, "1 3"),
        (whole_numbers, ""),
        (new_file(".pt"), "x.bin"),
        (new_file(".pt"), "none/x.pt"),
        (new_file(".json"), "ckpt.pt"),
        (new_file(".json"), "/dev/null"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_unavailable_device_is_refused():
    with pytest.raises(ValueError, match="device tpu is not available here; choose from .*cpu"):
        pick_device("tpu")


def test_an_nvidia_card_that_torch_cannot_use_is_told(monkeypatch):
    """Else GPT-2 would be trained on the CPU without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ValueError, match="cu126.*--device cpu"):
        pick_device()
    assert pick_device("cpu").type == "cpu"

    # Without a card, or with a torch for CPUs, there is nothing to tell.
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert pick_device().type == "cpu"


def test_on_a_mac_the_cpu_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_device().type == "cpu"
    assert pick_device("mps").type == "mps"
    assert "not tried yet" in capsys.readouterr().out


def test_processes_without_a_device_of_their_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--device cpu"):
        join_processes(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs"):
        join_processes(torch.device("cuda"))


def test_bf16_is_asked_of_the_device_that_is_used(monkeypatch):
    """Of two cards, an old and a new one."""
    capability = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    assert not has_bf16(torch.device("cuda", 0))
    assert has_bf16(torch.device("cuda", 1))


def test_faults_end_in_a_sentence_and_bugs_in_a_traceback(capsys):
    def raises(error):
        def main():
            raise error

        return main

    for error, status in (
        (ValueError("x"), 2),
        (OSError("x"), 1),
        (KeyboardInterrupt(), 130),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1),
    ):
        with pytest.raises(SystemExit) as end:
            run_command(raises(error))
        assert end.value.code == status and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(RuntimeError):
        run_command(raises(RuntimeError("size mismatch for h.1.memory.hive.bank")))


# ---- The command line ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["train.py", "eval.py", "upscale.py", "compare.py", "bench.py"])
def test_a_misspelt_flag_gets_one_line(script, monkeypatch, capsys):
    near = {"train.py": "--upscale", "eval.py": "--stride", "upscale.py": "--method"}
    flag = near.get(script, "--device")
    assert call(monkeypatch, script, "x", f"{flag}s", "1", "--base", "x", "--methods", "x") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"did you mean {flag}?" in error


def test_no_flag_goes_by_half_its_name(monkeypatch, capsys):
    assert call(monkeypatch, "train.py", "--upsc", "midus") == 2
    assert "did you mean --upscale?" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="too long"):
        new_file(".pt")(str(tmp_path / ("a" * 247 + ".pt")))


def test_a_rank_without_a_world(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        join_processes(torch.device("cpu"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--n_keys", "1000000000"),
        ("--d_latent", "1000000000000000000"),
        ("--n_embd", "10000000000"),
        ("--block_size", "1000000000000000000"),
    ],
)
def test_absurd_sizes_are_refused_in_a_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "train.py", "--upscale", "midus", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of Unix")
def test_closed_streams_and_small_alphabets(root, tmp_path):
    """Whatever the streams are, a run goes through."""
    model = GPT(GPTConfig(1, 1, 8, 32, 257))
    save_checkpoint(str(tmp_path / "ckpt.pt"), model, tokenizer="bytes", dataset="text")
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("some text " * 20)
    command = f"{sys.executable} {root / 'eval.py'} ckpt.pt --data_dir . --device cpu"
    for end in ("2>&-", ">&-", "--prompt=é"):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        run = subprocess.run(
            f"{command} {end}", shell=True, cwd=tmp_path, env=environment, capture_output=True
        )
        assert run.returncode == 0, (end, run.stderr)
