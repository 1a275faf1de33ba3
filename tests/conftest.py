"""What several test files share: small texts, small runs, a server on this machine.

Tests run from anywhere. ../shared holds real text and GPT-2's vocabulary where it is present.
"""

import argparse
import http.server
import importlib
import os
import platform
import resource
import shutil
import signal
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

# Small models gain nothing from threads, and lose much where others compute beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run of a second: a base of two blocks, and a memory block between them. Every step reads 64
# tokens; the base takes 15 steps.
SIZES = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4".split()
TINY = [*SIZES, "--base_tokens", "1e3"]
MIDUS = "--upscale midus --n_keys 6 --top_k 3 --d_latent 8".split()

WITH_A_DEVICE = ("train.py", "eval.py", "upscale.py", "compare.py", "analyze.py")


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="more tries of every fault, and a soak (some minutes)"
    )


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


def same_weights(a, b):
    """Whether two models hold the same bits."""
    import torch

    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def leftovers(folder):
    """Files that are being written, or were when their process was killed."""
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


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


# ---- Texts ---------------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder. In ./data: pydocs and pycode, but little of them.

    What train.py finds there it does not build. Samples are short, too.
    """
    from model import GPT

    generate = GPT.generate

    def generate_some(self, tokens, max_new_tokens, *rest):
        return generate(self, tokens, min(max_new_tokens, 8), *rest)

    monkeypatch.setattr(GPT, "generate", generate_some)
    prose = "\n".join(topics[name] for name in sorted(topics))
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    parts = {
        "train": slice(0, 30_000),
        "valid": slice(30_000, 31_500),
        "test": slice(31_500, 33_000),
    }
    for name, text in (("pydocs", prose), ("pycode", code)):
        folder = tmp_path / "data" / f"{name}-{platform.python_version()}"
        folder.mkdir(parents=True)
        for split, part in parts.items():
            (folder / f"wiki.{split}.txt").write_text(text[part], encoding="utf-8")
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


# ---- A server ------------------------------------------------------------------------------------
CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server():
    """Serves server.pages at server.url; /file is CONTENT.

    Others: /moved redirects to /file; /picky refuses Python's own agent; /wrong is as long; /short
    hangs up half-way; /stall waits there; a number is the status of an error.
    """
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            if name.isdigit() or name == "picky" and "Python" in self.headers["User-Agent"]:
                return self.send_error(int(name) if name.isdigit() else 403)
            if name == "moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                return self.end_headers()
            half = CONTENT[: len(CONTENT) // 2]
            body = {"picky": CONTENT, "wrong": b"x" * len(CONTENT), "short": half, "stall": half}
            body = body.get(name) or self.server.pages.get(name)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT if body is half else body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            if name == "stall":
                release.wait(20)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        httpd.pages = {"file": CONTENT}
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        release.set()
        httpd.shutdown()


# ---- For the experiments -------------------------------------------------------------------------
@pytest.fixture
def base():
    """A base of four blocks that all have something to say."""
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
