"""
The basement: devices, processes, files, downloads, the command line. Nothing here is about MIDUS.

A first reader can skip this file.
"""

import argparse
import hashlib
import http.client
import math
import os
import shutil
import signal
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

DOWNLOAD_TIMEOUT = 30  # seconds without a byte, after which a download gives up


# ---- Devices -------------------------------------------------------------------------------------
def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; without a name a GPU if there is one, else the CPU.

    Raises ValueError if the machine lacks it, or has an NVIDIA card that torch cannot use.
    """
    # What there is, the CPU always.
    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
        available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():  # has to be asked for: nobody has tried it there
        available.append("mps")

    # Without a name the best that was tried. A card that cannot be used is an error: else GPT-2
    # would be trained on the CPU without a word, which takes weeks.
    if name is None and "cuda" in available:
        name = "cuda"
    if name is None:
        if torch.version.cuda is not None and shutil.which("nvidia-smi"):
            raise ValueError(
                f"this torch, built for CUDA {torch.version.cuda}, cannot use the NVIDIA card: its "
                "driver may be too old; install a torch for older drivers (pip install torch "
                "--index-url https://download.pytorch.org/whl/cu126), or say --device cpu"
            )
        name = "cpu"
    if name not in available:
        choices = ", ".join(available)
        raise ValueError(f"device {name} is not available here; choose from {choices}")
    if name == "mps":
        print("mps: nobody has tried it; compare a short run with --device cpu")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 (elsewhere it is emulated, slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and newer
    if device.type == "cpu":
        # torch asks the processor, but in a private function that a release may move.
        ask_processor = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return ask_processor()
    return False


def threads_for(n_embd: int) -> int:
    """How many CPU threads a model of this width is worth; no more than torch would take.

    Two threads that wait for each other at every small product are slower than one, and sixty far
    slower. By the width alone, never by what else the machine does: the number changes rounding.
    """
    at_hand = torch.get_num_threads()
    if n_embd <= 128:
        return 1
    return min(4, at_hand) if n_embd <= 512 else at_hand


# ---- Processes -----------------------------------------------------------------------------------
# torchrun starts several processes of a script. Each trains on its part of every batch; the first,
# rank 0, does whatever is done once: it evaluates, prints and writes files.
def join_processes(device: torch.device) -> torch.device:
    """Meets the other processes that torchrun has started, if any; returns this one's device.

    Raises ValueError if there is no device for it.
    """
    # torchrun tells each process the number of all, and its own.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        cards = torch.cuda.device_count()
        if number >= cards:
            raise ValueError(f"there are {cards} GPUs; start no more processes: --nproc_per_node")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)

    # The others wait while rank 0 tokenizes or evaluates, which may take hours.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=3))

    # What is printed is printed once.
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    return device


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return process_rank() == 0


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
    return total.item() / process_count()


def true_in_any_process(flag: bool, device: torch.device) -> bool:
    return mean_over_processes(float(flag), device) > 0


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Files ---------------------------------------------------------------------------------------
# Whatever is written appears under its name only when it is complete: a reader, a second run, or a
# resume after a crash finds the old file or the new one, never half of one.
@contextmanager
def written_whole(path: str) -> Iterator[str]:
    """Yields a temporary name, which becomes path at the end, whole or not at all.

    A fault leaves path as it was; a killed process may leave the temporary file. Raises OSError,
    with path in it, if it cannot be written.
    """
    target = os.path.realpath(path)  # so that a symbolic link stays one
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"  # which no other process uses
    try:
        yield temporary
        # It is on the disk before it takes the old file's place.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
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
def check_file(path: str, sha256: str | None) -> None:
    """Raises OSError if path has another sha256; None: it is not known."""
    if sha256 is not None:
        found = file_sha256(path)
        if found != sha256:
            raise OSError(f"its sha256 is {found}, expected {sha256}")


def fetch(url: str, path: str) -> None:
    """Copies what the address delivers into path, with a bar. Raises OSError or HTTPException."""
    # One of the hosts answers 403 to Python's default user agent.
    request = urllib.request.Request(url, headers={"User-Agent": "nanoMIDUS/1.0"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as reply:
        total = int(reply.headers.get("Content-Length") or 0)
        bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=None)
        with open(path, "wb") as file, bar:
            while piece := reply.read(1 << 20):
                file.write(piece)
                bar.update(len(piece))

    # A connection that breaks looks like the end of the file.
    size = os.path.getsize(path)
    if total and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def download(urls: list[str], path: str, sha256: str | None = None, hint: str = "") -> None:
    """Puts the file at the first address that delivers it into path, complete and checked.

    A file that is there already and has the right sha256 is kept. Raises OSError with all that was
    tried and `hint`, a sentence that says what the user can do instead.
    """
    # What is there already is not fetched again, unless it is damaged.
    reasons = []
    if os.path.exists(path):
        try:
            check_file(path, sha256)
            return
        except OSError as error:
            reasons.append(f"the file that is there: {error}")

    # One address after the other, until one delivers.
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for url in urls:
        print(f"downloading {url} to {path}")
        try:
            with written_whole(path) as temporary:
                fetch(url, temporary)
                check_file(temporary, sha256)
            return
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{url}: {error}")
    raise OSError(f"could not get {path}. {hint} What was tried: {'; '.join(reasons)}")


# ---- The command line ----------------------------------------------------------------------------
def whole_number(text: str, least: int = 1) -> int:
    """A whole number from least to 2^63 - 1, which may be written as 2e6."""
    # float() reads 2e6 and inf; int() reads large numbers exactly.
    refusal = argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    try:
        value = int(text) if text.isdecimal() else float(text)
        whole = int(value)
    except (ValueError, OverflowError):
        raise refusal from None
    if value != whole or not least <= whole < 2**63:
        raise refusal
    return whole


def seed_number(text: str) -> int:
    return whole_number(text, least=0)


def whole_numbers(text: str) -> list[int]:
    """A list of whole numbers from 1, written 1,3,5."""
    return [whole_number(part) for part in text.split(",")]


def real_number(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def new_file(*endings: str) -> Callable[[str], str]:
    """Reads a path where a file of this kind can be written; figures never replace a checkpoint."""

    def read(text: str) -> str:
        # Refused now, not after hours of work.
        folder = os.path.dirname(text) or "."
        if not os.access(folder, os.W_OK) or os.path.isdir(text):
            raise argparse.ArgumentTypeError(f"{text}: no file can be written there")
        if not text.endswith(endings):
            raise argparse.ArgumentTypeError(f"{text}: the name must end in {' or '.join(endings)}")
        return text

    return read


def data_folder(text: str) -> str:
    """The absolute path of a folder that is there, or can be made, and written to."""
    # Up to a folder that exists: what is missing below it can be made later.
    path = os.path.abspath(text)
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        sentence = "is no folder that can be written to; name another with --data_dir"
        raise argparse.ArgumentTypeError(f"{text} {sentence}")
    return path


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, and takes no flag by half its name."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        parsed = super().parse_args(*args, **kwargs)
        # What argparse makes of --lr=--.
        for name, value in vars(parsed).items():
            if value == []:
                self.error(f"--{name} needs a value")
        return parsed

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
        if not stop.is_set():
            tqdm.write("stopping after this step; Ctrl-C now stops at once, without saving")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    # What was in place before comes back at the end.
    old_int = signal.signal(signal.SIGINT, handler)
    old_term = signal.signal(signal.SIGTERM, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, old_int)
        signal.signal(signal.SIGTERM, old_term)


def one_line(error: BaseException, length: int = 500) -> str:
    return " ".join(str(error).split())[:length]


# What torch calls RuntimeError though the code is right: no memory, numbers gone wrong.
NO_MEMORY = ("out of memory", "allocate memory", "enough memory")
FAULTS = (*NO_MEMORY, "probability tensor contains")


def exit_status(error: BaseException) -> int | None:
    """2 for bad input, which the user can mend; 1 for faults of disk, network, numbers or memory.

    None for a bug, which deserves its traceback.
    """
    if isinstance(error, ValueError | argparse.ArgumentTypeError):
        return 2
    if isinstance(error, RuntimeError) and "size calculation overflowed" in str(error):
        return 2  # sizes that no machine has
    if isinstance(error, OSError | ArithmeticError | MemoryError):
        return 1
    if isinstance(error, RuntimeError) and any(words in str(error) for words in FAULTS):
        return 1
    return None


def run_command(main: Callable[[], None]) -> None:
    """Runs a script: bad input ends it with one sentence and status 2, a fault 1, Ctrl-C 130."""
    # A closed stream is None. One that cannot show a letter shows a question mark.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")

    try:
        main()
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        status = exit_status(error)
        if status is None:
            raise
        no_memory = any(words in str(error) for words in NO_MEMORY)
        hint = "; a larger --grad_accum needs less memory" if no_memory else ""
        print(f"error: {one_line(error)}{hint}", file=sys.stderr)
        sys.exit(status)
