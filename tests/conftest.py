"""Paths: tests run from anywhere; ../shared holds real text and GPT-2's vocabulary where it is present."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="more tries of every fault, and a soak (about an hour)")


@pytest.fixture
def long(request):
    """Whether the long forms of the tests are asked for."""
    return request.config.getoption("--long")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def wikitext2():
    """Folder with the real WikiText-2; the test skips where it is absent."""
    folder = SHARED / "data" / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/wikitext-2")
    return folder


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """The test skips where GPT-2's vocabulary is not cached."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's vocabulary; set TIKTOKEN_CACHE_DIR")
