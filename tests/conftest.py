"""What several test files share: calls of our scripts, small texts, a server on this machine.

Tests run from anywhere. ../shared holds real text and GPT-2's vocabulary where it is present.
"""

import argparse
import http.server
import importlib
import os
import platform
import resource
import shutil
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))

# Small models gain nothing from threads, and lose much where others compute beside them. torch
# reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from common import run_command
from data import SPLITS
from model import GPT, GPTConfig


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also what takes minutes")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture(scope="session")
def root():
    return ROOT


def call(monkeypatch, script, *arguments):
    """Runs a script's main in this process (a new one takes seconds to import torch).

    On the CPU where nothing else is said: tests compare bits. Returns its exit status.
    """
    words = [str(argument) for argument in arguments]
    name = Path(script).stem
    if name in ("train", "eval", "upscale", "compare", "look") and "--device" not in words:
        words += ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        run_command(importlib.import_module(name).main)
    except SystemExit as end:
        return end.code
    return 0


def same_weights(a, b):
    """Whether two models hold the same bits."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---- Faults --------------------------------------------------------------------------------------
@contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
def server():
    """Serves server.pages, bytes by name, at server.url. A name that ends in .cut is served without
    its second half, as if the connection had broken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            body = self.server.pages.get(name.removesuffix(".cut"))
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if name.endswith(".cut") else body)

        def log_message(self, *args):
            pass

    # Port 0 is any that is free.
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.pages = {}
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


# ---- Texts and models ----------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder. In ./data: pydocs and pycode, but little of them.

    What train.py finds there it does not build. Samples are short, too.
    """
    generate = GPT.generate

    def generate_some(self, tokens, max_new_tokens, *rest):
        return generate(self, tokens, min(max_new_tokens, 8), *rest)

    monkeypatch.setattr(GPT, "generate", generate_some)
    prose = "\n".join(topics[name] for name in sorted(topics))
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    parts = (slice(30_000), slice(30_000, 31_500), slice(31_500, 33_000))
    for name, text in (("pydocs", prose), ("pycode", code)):
        folder = tmp_path / "data" / f"{name}-{platform.python_version()}"
        folder.mkdir(parents=True)
        for split, part in zip(SPLITS, parts):
            (folder / f"{split}.txt").write_text(text[part], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    """A base of four blocks that all have something to say."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(4, 2, 32, 16, 50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens():
    """Something for that base to read, (2, 16)."""
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
