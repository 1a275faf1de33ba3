"""
The basement: devices, processes, files, downloads, the command line. Nothing here is about MIDUS.

A first reader can skip this file.
"""

import argparse
import hashlib
import math
import os
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPException

import torch
import torch.distributed as dist
from tqdm import tqdm


# ---- Devices -------------------------------------------------------------------------------------
def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; without a name a GPU if there is one, else the CPU.

    Raises ValueError if it cannot be used here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from None
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 (elsewhere it is emulated, slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and newer
    # torch asks the processor, but in a private function that a release may move.
    ask_processor = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and ask_processor()


def threads_for(n_embd: int) -> int:
    """How many CPU threads a model of this width is worth.

    Two threads that wait for each other at every small product are slower than one. The width alone
    decides, not what else the machine does: the number of threads changes rounding.
    """
    return 1 if n_embd <= 128 else torch.get_num_threads()


# ---- Processes -----------------------------------------------------------------------------------
# torchrun starts several processes of a script. Each trains on its part of every batch; the first,
# rank 0, does whatever is done once: it evaluates, prints and writes files.
def join_processes(device: torch.device) -> torch.device:
    """Meets the other processes that torchrun has started, if any; returns this one's device."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    # The others wait while rank 0 tokenizes or evaluates, which may take hours.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=3))

    # What is printed is printed once.
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def main_process_first(function: Callable[[], object]) -> object:
    """What function returns. Rank 0 calls it first; the others then find what it has written."""
    # A download or a cache of tokens is made once, and not by several processes in one file.
    if is_main():
        result = function()
    if dist.is_initialized():
        dist.barrier()
    if not is_main():
        result = function()
    return result


def mean_over_processes(value: float, device: torch.device) -> float:
    # Every process must come by here, or the others wait forever.
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return total.item() / world_size()


# ---- Files ---------------------------------------------------------------------------------------
@contextmanager
def written_whole(path: str) -> Iterator[str]:
    """Yields a temporary name, which becomes path at the end, whole or not at all.

    So a reader finds the old file or the new one, never half of one. Raises OSError, with path in
    it, if it cannot be written.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"could not write {path}: {one_line(error)}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def file_sha256(path: str) -> str:
    # In pieces of a MiB, since a file of weights may be larger than the memory.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- Downloads -----------------------------------------------------------------------------------
def fetch(url: str, path: str, sha256: str | None) -> None:
    """Copies what the address delivers into path, with a bar. Raises OSError if it is not whole."""
    try:
        torch.hub.download_url_to_file(url, path, sha256, progress=sys.stderr.isatty())
        if sha256 is not None:
            return
        # A connection that breaks looks like the end of the file: at least the size must be right.
        with urllib.request.urlopen(url) as reply:
            size = int(reply.headers["Content-Length"])
    except (RuntimeError, HTTPException) as error:  # a wrong checksum, a broken reply
        raise OSError(one_line(error)) from error
    if os.path.getsize(path) != size:
        os.remove(path)
        raise OSError(f"the connection ended before all {size} bytes had come")


def download(urls: list[str], path: str, sha256: str | None = None, hint: str = "") -> None:
    """Puts the file at the first address that delivers it into path, complete and checked.

    A file that is there already and has the right sha256 is kept. Raises OSError with what was
    tried last and `hint`, a sentence that says what the user can do instead.
    """
    if os.path.exists(path) and sha256 in (None, file_sha256(path)):
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte, after which a download gives up
    try:
        for url in urls:
            print(f"downloading {url} to {path}")
            try:
                fetch(url, path, sha256)
                return
            except OSError as error:
                failure = f"{url}: {one_line(error)}"
    finally:
        socket.setdefaulttimeout(timeout)
    raise OSError(f"could not get {path} ({failure}). {hint}")


# ---- The command line ----------------------------------------------------------------------------
def whole_number(text: str) -> int:
    """A whole number from 1, which may be written as 2e6."""
    value = float(text)
    if not 1 <= value < 2**63 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(value)


def whole_numbers(text: str) -> list[int]:
    """A list of whole numbers from 1, written 1,3,5."""
    return [whole_number(part) for part in text.split(",")]


def real_number(text: str) -> float:
    """A finite number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def new_file(*endings: str) -> Callable[[str], str]:
    """Reads a path where a file of this kind can be written; figures never replace a checkpoint."""

    def read(path: str) -> str:
        # Refused now, not after hours of work.
        if not path.endswith(endings):
            raise argparse.ArgumentTypeError(f"{path}: the name must end in {' or '.join(endings)}")
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise argparse.ArgumentTypeError(f"{path}: there is no folder {folder}")
        return path

    return read


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, and takes no flag by half its name."""

    def __init__(self, description: str = "", **options):
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


# ---- How a command ends --------------------------------------------------------------------------
@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C or SIGTERM sets, so that the step at hand can end.

    Ctrl-C once more stops at once. A second SIGTERM does not: torchrun adds its own to one that
    every process has got.
    """
    stop = threading.Event()

    def handler(signum, frame):
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.is_set():
            tqdm.write("stopping after this step; Ctrl-C now stops at once, without saving")
        stop.set()

    # What was in place before comes back at the end.
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield stop
    finally:
        for number, old in zip(signals, before):
            signal.signal(number, old)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def run_command(main: Callable[[], None]) -> None:
    """Runs a script. A user's mistake ends it with one sentence and status 2; a fault of disk,
    network or numbers with 1; Ctrl-C with 130. All else is a bug, and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
