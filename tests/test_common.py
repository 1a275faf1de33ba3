"""What is not about MIDUS: downloads from a local server, files, flags, how a command ends."""

import argparse
import hashlib
import os
import signal
import socket

import pytest

import common
from common import download, new_file, real_number, run_command, whole_number, written_whole
from conftest import call

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# ---- Downloads -----------------------------------------------------------------------------------
def test_the_next_address_is_tried_and_a_file_at_hand_is_kept(server, tmp_path):
    server.pages["file"] = CONTENT
    path = tmp_path / "new" / "file"
    download([server.url + "missing", server.url + "file"], str(path), SHA256)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file"]

    # A damaged file is fetched again, a good one is not.
    path.write_bytes(b"damaged")
    download([server.url + "file"], str(path), SHA256)
    assert path.read_bytes() == CONTENT
    download([], str(path), SHA256)


@pytest.mark.parametrize(
    "name, sha256, reason",
    [
        ("missing", None, "404"),
        ("other", SHA256, "invalid hash|hash value"),
        ("file.cut", SHA256, "invalid hash|hash value|IncompleteRead"),
        ("file.cut", None, "before all 1024000 bytes had come|IncompleteRead"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(server, tmp_path, name, sha256, reason):
    server.pages.update(file=CONTENT, other=b"x" * len(CONTENT))
    with pytest.raises(OSError, match=f"({reason}).*Do this instead"):
        download([server.url + name], str(tmp_path / "file"), sha256, "Do this instead.")
    assert os.listdir(tmp_path) == []


def test_a_download_gives_up_on_silence_and_puts_the_timeout_back(tmp_path, monkeypatch):
    def silence(*args):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    seen = []
    monkeypatch.setattr(common, "fetch", silence)
    with pytest.raises(OSError, match="timed out"):
        download(["http://127.0.0.1/"], str(tmp_path / "file"))
    assert seen == [30] and socket.getdefaulttimeout() is None


# ---- Files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_fault_while_writing_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="could not write .*file: no room"):
        with written_whole(str(path)) as temporary, open(temporary, "w") as file:
            file.write("half of")
            raise error("no room")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ---- The command line ----------------------------------------------------------------------------
def test_flags_are_read_as_people_write_them_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert whole_number("2e6") == 2_000_000 and common.whole_numbers("1,3,5") == [1, 3, 5]
    assert real_number("1e-3") == 1e-3 and new_file(".pt")("x.pt") == "x.pt"
    for read, text in (
        (whole_number, "0"),
        (whole_number, "1.5"),
        (whole_number, "inf"),
        (real_number, "-1"),
        (real_number, "nan"),
        (new_file(".json"), "ckpt.pt"),
        (new_file(".pt"), "nowhere/ckpt.pt"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


@pytest.mark.parametrize("words", [["--dev", "cpu"], ["--seed", "x"], ["--device", "tpu"]])
def test_a_wrong_flag_gets_one_line(monkeypatch, capsys, words):
    """Half of one, and values that it cannot have."""
    assert call(monkeypatch, "train.py", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words[0] in error and len(error.splitlines()) == 1


# ---- How a command ends --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("a sentence"), 2),
        (OSError("a sentence"), 1),
        (FloatingPointError("a sentence"), 1),
        (KeyboardInterrupt("a sentence"), 130),
    ],
)
def test_what_ends_a_command_is_a_sentence_and_a_status(capsys, error, status):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == status
    assert capsys.readouterr().err.removeprefix("error: ") == "a sentence\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


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
