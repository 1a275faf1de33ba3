"""What is not about MIDUS: downloads from a local server, files, flags, how a command ends."""

import argparse
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import common
from common import download, has_bf16, new_file, pick_device, run_command, written_whole
from conftest import CONTENT, call, leftovers
from model import GPT, GPTConfig, save_checkpoint

SHA256 = hashlib.sha256(CONTENT).hexdigest()


# ---- Downloads -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["file", "picky", "moved"])
def test_a_download_arrives_whole_in_a_folder_of_its_own(server, tmp_path, name):
    path = tmp_path / "new" / "file"
    download([server.url + name], str(path), SHA256)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("stall", "timed out"),
        ("short", "ended after 512000 of 1024000 bytes|IncompleteRead"),
        ("wrong", f"its sha256 is [0-9a-f]{{64}}, expected {SHA256}"),
        ("missing", "404"),
        ("403", "403"),
        ("500", "500"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(server, tmp_path, monkeypatch, name, reason):
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 0.3)
    path = tmp_path / "file"
    with pytest.raises(OSError, match=f"Do this instead.*{reason}"):
        download([server.url + name], str(path), SHA256, "Do this instead.")
    assert os.listdir(tmp_path) == []

    # The next address is tried.
    download([server.url + name, server.url + "file"], str(path), SHA256)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]


def test_a_good_file_is_not_fetched_again_and_a_damaged_one_is(server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    download([server.url + "500"], str(path), SHA256)
    path.write_bytes(b"damaged")
    with pytest.raises(OSError, match="the file that is there: its sha256"):
        download([server.url + "500"], str(path), SHA256)
    download([server.url + "file"], str(path), SHA256)
    assert path.read_bytes() == CONTENT


def test_killed_while_downloading_only_a_temporary_file_is_there(server, tmp_path, monkeypatch):
    """It is looked at while the server stalls: whoever is killed then leaves just that."""
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 0.5)
    path = str(tmp_path / "file")
    fetching = threading.Thread(
        target=download, args=([server.url + "stall", server.url + "file"], path)
    )
    fetching.start()
    deadline = time.time() + 10
    while not leftovers(tmp_path) and time.time() < deadline:
        time.sleep(0.01)
    assert len(os.listdir(tmp_path)) == len(leftovers(tmp_path)) == 1
    fetching.join()
    assert os.listdir(tmp_path) == ["file"]


# ---- Files ---------------------------------------------------------------------------------------
def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a temporary name of its own, and the last to end wins."""
    path = tmp_path / "file"
    with written_whole(str(path)) as first, written_whole(str(path)) as second:
        assert first != second
        for temporary, text in ((first, "one"), (second, "two")):
            with open(temporary, "w") as file:
                file.write(text)
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_fault_while_writing_leaves_the_old_file(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="could not write .*file: no room"):
        with written_whole(str(tmp_path / "file")) as temporary, open(temporary, "w") as file:
            file.write("half of")
            raise error("no room")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    with written_whole(str(tmp_path / "link")) as temporary, open(temporary, "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


# ---- Flags ---------------------------------------------------------------------------------------
def test_numbers_are_read_as_people_write_them():
    assert common.whole_number("2e6") == 2_000_000
    assert common.whole_number(str(2**63 - 1)) == 2**63 - 1
    assert common.whole_numbers("1,3,5") == [1, 3, 5]
    assert common.seed_number("0") == 0 and common.real_number("1e-3") == 1e-3


@pytest.mark.parametrize(
    "read, text",
    [
        *[
            (common.whole_number, text)
            for text in ("1.5", "0", "-1", "inf", "nan", "x", "", "1e30")
        ],
        *[(common.whole_numbers, text) for text in ("1 3", "", "1,,2", "0")],
        *[(common.real_number, text) for text in ("-1", "nan", "inf", "x", "")],
        (common.seed_number, "-1"),
        (new_file(".pt"), "x.bin"),
        (new_file(".pt"), "none/x.pt"),
        (new_file(".pt"), "."),
        (new_file(".json"), "ckpt.pt"),
        (new_file(".json"), "/dev/null"),
        (common.data_folder, __file__),
    ],
)
def test_what_a_flag_cannot_be_is_refused(tmp_path, monkeypatch, read, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "upscale.py"])
@pytest.mark.parametrize("flag", ["--devices", "--dev", "--data_dir=--"])
def test_a_wrong_flag_gets_one_line(script, flag, monkeypatch, capsys):
    """A misspelt one, half of one, and one whose value argparse reads as no value."""
    assert call(monkeypatch, script, "x.pt", flag) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and "--help" in error


def test_a_value_that_is_no_value_is_named(monkeypatch, capsys):
    assert call(monkeypatch, "train.py", "--lr=--") == 2
    assert "--lr needs a value" in capsys.readouterr().err


# ---- Devices and processes -----------------------------------------------------------------------
def test_an_unavailable_device_is_refused():
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
    assert pick_device().type == "cpu"


def test_on_a_mac_the_cpu_is_the_default_and_mps_warns(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_device().type == "cpu" and capsys.readouterr().out == ""
    assert pick_device("mps").type == "mps" and "nobody has tried" in capsys.readouterr().out


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs"):
        common.join_processes(torch.device("cuda"))


def test_bf16_is_asked_of_the_device_that_is_used(monkeypatch):
    """Of two cards, an old and a new one."""
    capability = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    assert not has_bf16(torch.device("cuda", 0)) and has_bf16(torch.device("cuda", 1))


def test_threads_depend_on_the_width_alone(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 60)
    assert [common.threads_for(width) for width in (128, 256, 512, 768)] == [1, 4, 4, 60]


# ---- How a command ends --------------------------------------------------------------------------
def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("x"), 2),
        (argparse.ArgumentTypeError("x"), 2),
        (OSError("x"), 1),
        (FloatingPointError("x"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1),
    ],
)
def test_faults_end_in_one_line_and_a_status(capsys, error, status):
    with pytest.raises(SystemExit) as end:
        run_command(raises(error))
    message = capsys.readouterr().err
    assert end.value.code == status and len(message.splitlines()) == 1
    assert ("--grad_accum" in message) == ("memory" in str(error))


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        run_command(raises(RuntimeError("size mismatch for h.1.memory.hive.bank")))


def test_a_stream_that_cannot_show_a_letter_shows_a_question_mark(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run_command(lambda: print("é", flush=True))
    assert stream.buffer.getvalue() == b"?\n"


def test_a_command_goes_through_with_closed_streams(here, monkeypatch, root, long):
    """In a process of its own with --long: there files get the numbers of the streams."""
    save_checkpoint("a.pt", GPT(GPTConfig(1, 1, 8, 32, 257)), tokenizer="bytes", dataset="pycode")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        status = call(patch, "eval.py", "a.pt", "--json", "a.json")
    assert status == 0 and os.path.exists("a.json")
    if long:
        command = f"{sys.executable} {root / 'eval.py'} a.pt --device cpu --json b.json >&- 2>&-"
        assert subprocess.run(command, shell=True).returncode == 0 and os.path.exists("b.json")


def test_one_signal_stops_after_the_step_and_a_second_ctrl_c_at_once():
    """A second SIGTERM does not: torchrun adds its own to one that every process has got."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), common.stop_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
