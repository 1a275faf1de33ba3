"""Paths: tests run from anywhere.

../shared holds real text and GPT-2's vocabulary where it is present.
"""

import importlib
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="more tries of every fault, and a soak (some minutes)"
    )


def pytest_configure(config):
    # As in hml.py: pytest drops that.
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support")


WITH_A_DEVICE = ("train.py", "eval.py", "upscale.py", "compare.py", "analyze.py", "conventions.py")


def call(monkeypatch, script, *arguments):
    """Runs a script's main in this process (a new one takes seconds to import torch).

    On the CPU where nothing else is said: tests compare bits. Returns its exit status.
    """
    from common import run_command

    words = [str(argument) for argument in arguments]
    if script.split("/")[-1] in WITH_A_DEVICE and "--device" not in words:
        words += ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        run_command(importlib.import_module(Path(script).stem).main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere but this machine fails, as it would without network."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test must not connect to {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture
def long(request):
    """Whether the long forms of the tests are asked for."""
    return request.config.getoption("--long")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def pydocs(tmp_path_factory):
    """A data folder in which pydocs is built and tokenized, since that takes seconds."""
    from data import load_dataset

    folder = tmp_path_factory.mktemp("pydocs")
    load_dataset("pydocs", "bytes", str(folder))
    return folder


@pytest.fixture(scope="session")
def wikitext2(tmp_path_factory):
    """A folder with the real WikiText-2, where caches may go; the test skips where it is absent."""
    folder = SHARED / "data" / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/wikitext-2")
    copy = tmp_path_factory.mktemp("wikitext-2")
    for path in folder.glob("wiki.*.tokens"):
        shutil.copyfile(path, copy / path.name)
    return copy


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """The test skips where GPT-2's vocabulary is not cached."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's vocabulary; set TIKTOKEN_CACHE_DIR")


@pytest.fixture
def base():
    """A base for the experiments, of four blocks that all have something to say."""
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(4, 2, 32, 16, 50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens():
    """Something for that base to read, (2, 16)."""
    import torch

    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
