"""
Text -> tokens -> batches.

Data sets:
    pydocs          the English that ships with every Python; no download
    pycode          the code of its standard library, without the docstrings; no download
    wikitext103     raw text, 192 MB zipped; downloaded and checked
    wikitext2-raw   the same form, 5 MB
    wikitext2       word-level form, rare words as <unk>, 4 MB
    a folder        your own train.txt, valid.txt and test.txt

Tokenizers, all through tiktoken: gpt2, gpt2:N (the first N of its merges), bytes.

Downloads and caches lie in `data_dir`, and can be deleted at any time. A split has to fit in memory
as text, once. In order: tokenizers, where the text is, tokens, batches. Shape names: see hml.py.
"""

import ast
import hashlib
import os
import platform
import re
import sysconfig
import warnings
import zipfile
import zlib
from collections import namedtuple
from functools import lru_cache
from pydoc_data.topics import topics

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from common import download, file_sha256, written_whole

SPLITS = ("train", "valid", "test")


# ---- Tokenizers ----------------------------------------------------------------------------------
def vocab_size(tokenizer: str) -> int:
    """The number of token ids: gpt2 50257, gpt2:N N + 1, bytes 257; the last is <|endoftext|>.

    Raises ValueError for any other name.
    """
    if tokenizer == "bytes":
        return 257
    if tokenizer == "gpt2":
        return 50257

    # gpt2:4096 has 4096 tokens and the end of text.
    size = re.fullmatch(r"gpt2:(\d+)", tokenizer)
    if not size or not 256 <= int(size[1]) <= 50256:
        names = "gpt2, gpt2:N with N from 256 to 50256, or bytes"
        raise ValueError(f"tokenizer must be {names}; not {tokenizer!r}")
    return int(size[1]) + 1


@lru_cache
def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name.

    Raises ValueError for an unknown name, OSError if GPT-2's vocabulary cannot be had.
    """
    # Only GPT-2's need a vocabulary, which tiktoken downloads once.
    n = vocab_size(name) - 1
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        pattern = r"[\s\S]"  # every character a piece of its own
    else:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network raises
            hint = "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes"
            raise OSError(f"tiktoken could not get GPT-2's vocabulary; {hint} ({error})") from error

        # gpt2:N keeps the merges of rank below N. A merge only builds on earlier ones, so any N
        # from 256 (the single bytes) up is a valid vocabulary. A small one keeps a small model from
        # being nearly all output layer.
        ranks = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < n}
        pattern = gpt2._pat_str
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": n}
    )


# ---- Where the text is ---------------------------------------------------------------------------
# Every data set has a function here that returns its files, {split: (file, member)}, and makes or
# downloads them if they are not there. member is a name inside a zip, or None for a plain file.
Files = dict[str, tuple[str, str | None]]


def split_prose_from_code(path: str) -> tuple[str, str]:
    """The docstrings of a Python file, and its lines without them. It is parsed, never imported."""
    with open(path, "rb") as file:
        source = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # some files are templates, or broken on purpose
        return "", ""

    # Modules, classes and functions, nested ones too, in the order of their lines.
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = []
    cut = set()  # numbers of lines, from 1
    for node in nodes:
        text = ast.get_docstring(node)
        if text:
            docstrings.append(text)
            cut.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    # splitlines() would end lines at form feeds too, which ast does not count.
    lines = re.split(r"\r\n|\r|\n", source.decode("utf-8", errors="replace"))
    code = [line for number, line in enumerate(lines, start=1) if number not in cut]
    return "\n\n".join(docstrings), "\n".join(code).strip()


def write_splits(documents: dict[str, str], folder: str) -> None:
    """Writes train.txt, valid.txt and test.txt into folder. documents: texts by name."""
    # A checksum of its name picks a document's split, one in 20 each for valid and test, so that
    # nothing depends on the order of directories, and a module's prose and code go the same way.
    texts = {split: [] for split in SPLITS}
    for name, text in sorted(documents.items()):
        split = {0: "valid", 1: "test"}.get(zlib.crc32(name.encode()) % 20, "train")
        if text:
            texts[split].append(text)

    # Each file is written whole: another run may be looking for it.
    os.makedirs(folder, exist_ok=True)
    for split, parts in texts.items():
        with written_whole(os.path.join(folder, f"{split}.txt")) as temporary:
            with open(temporary, "wb") as file:
                file.write(("\n\n".join(parts) + "\n").encode())


def build_library(prose_folder: str, code_folder: str) -> None:
    """Writes both data sets that this Python brings along: its prose and its code."""
    # A document is a topic of the language reference, or a module of the standard library.
    prose = {f"topic {name}": text for name, text in topics.items()}
    code = {}
    library = sysconfig.get_paths()["stdlib"]
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = []
    for directory, names, files in os.walk(library):
        names[:] = [name for name in names if name not in skipped]
        paths += [os.path.join(directory, file) for file in files if file.endswith(".py")]
    for path in tqdm(paths, desc="reading Python's own library", disable=None):
        name = os.path.relpath(path, library).replace(os.sep, "/")
        prose[name], lines = split_prose_from_code(path)

        # pydoc_data holds the reference itself; encodings are tables, much alike in all splits.
        if not name.startswith(("pydoc_data/", "encodings/")):
            code[name] = lines
    write_splits(prose, prose_folder)
    write_splits(code, code_folder)


def python_files(name: str, data_dir: str) -> Files:
    """pydocs or pycode of the Python that runs; another version has other texts."""
    version = platform.python_version()
    folders = {kind: os.path.join(data_dir, f"{kind}-{version}") for kind in ("pydocs", "pycode")}
    files = {split: (os.path.join(folders[name], f"{split}.txt"), None) for split in SPLITS}
    if not all(os.path.exists(path) for path, _ in files.values()):
        build_library(folders["pydocs"], folders["pycode"])
    return files


# What a data set is called inside its zip, and where the zip is to be had.
Archive = namedtuple("Archive", ("folder", "ending", "urls", "sha256"))

WIKITEXT = {
    "wikitext103": Archive(
        folder="wikitext-103-raw",
        ending="raw",
        urls=[
            "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/"
            "3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        ],
        sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
    "wikitext2": Archive(
        folder="wikitext-2",
        ending="tokens",
        urls=["https://wikitext.smerity.com/wikitext-2-v1.zip"],
        sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    ),
    "wikitext2-raw": Archive(
        folder="wikitext-2-raw",
        ending="raw",
        urls=["https://wikitext.smerity.com/wikitext-2-raw-v1.zip"],
        sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
}


def wikitext_files(name: str, data_dir: str) -> Files:
    """WikiText from wiki.{train,valid,test}.{raw,tokens} in data_dir, or else from its zip."""
    archive = WIKITEXT[name]
    members = {split: f"wiki.{split}.{archive.ending}" for split in SPLITS}
    own = {split: os.path.join(data_dir, member) for split, member in members.items()}
    if all(os.path.exists(path) for path in own.values()):
        return {split: (path, None) for split, path in own.items()}

    # Else the archive is downloaded, once.
    hint = (
        f"Without network, put {', '.join(members.values())} into {data_dir} (--data_dir), or use "
        "--dataset pycode, which needs no download."
    )
    path = os.path.join(data_dir, os.path.basename(archive.urls[0]))
    download(archive.urls, path, archive.sha256, hint)
    return {split: (path, f"{archive.folder}/{member}") for split, member in members.items()}


DATASETS = {
    "pydocs": python_files,
    "pycode": python_files,
    "wikitext103": wikitext_files,
    "wikitext2": wikitext_files,
    "wikitext2-raw": wikitext_files,
}


def find_files(name: str, data_dir: str) -> Files:
    """The three files of a data set in the table, or of a folder (one called like a data set is
    ./pycode). Raises ValueError if it is neither, OSError if a download fails.
    """
    if name in DATASETS:
        return DATASETS[name](name, data_dir)
    files = {split: (os.path.join(name, f"{split}.txt"), None) for split in SPLITS}
    for path, _ in files.values():
        if not os.path.isfile(path):
            known = ", ".join(DATASETS)
            raise ValueError(f"there is no {path}; a data set is one of {known}, or a folder")
    return files


def read_text(path: str, member: str | None) -> str:
    """The text of a file, or of a member of a zip. Raises ValueError if there is none."""
    # A byte-order mark is dropped, and Windows' line ends become ours.
    with open(path, "rb") if member is None else zipfile.ZipFile(path).open(member) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; a split needs text")
    return text


# ---- Tokens --------------------------------------------------------------------------------------
# One split, tokenized. tokens: a memory map; fingerprint: a hash of the text and the tokenizer.
Split = namedtuple("Split", ("tokens", "fingerprint"))


def encode(text: str, tokenizer: tiktoken.Encoding, desc: str) -> np.ndarray:
    """Token ids (uint16) of the text, as if encoded in one piece; in parallel, with a bar."""
    # The text is cut at single spaces between two other characters: there every pattern that is
    # used here starts a new piece.
    gap = re.compile(r"(?<=\S) (?=\S)")
    cuts = [0]
    while cut := gap.search(text, cuts[-1] + 2**18):
        cuts.append(cut.start())
    cuts.append(len(text))
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]

    # Several pieces at a time, one per thread.
    ids = []
    threads = os.cpu_count() or 1
    at_once = 4 * threads
    for first in tqdm(range(0, len(pieces), at_once), desc=desc, disable=None):
        batch = pieces[first : first + at_once]
        for piece in tokenizer.encode_ordinary_batch(batch, num_threads=threads):
            ids.append(np.array(piece, dtype=np.uint16))
    return np.concatenate(ids)


def load_dataset(name: str, tokenizer: str, data_dir: str = "data") -> dict[str, Split]:
    """The three splits of a data set as tokens, which are made once and kept in data_dir.

    name: a name in DATASETS, or a folder. Raises ValueError or OSError, one sentence each.
    """
    vocab_size(tokenizer)  # refuses an unknown one before any download
    splits = {}
    for split, (path, member) in find_files(name, data_dir).items():
        # An archive was checked when it was found; hashing it for each split would take seconds.
        sha256 = WIKITEXT[name].sha256 if member else file_sha256(path)
        everything = repr((sha256, member, tokenizer))
        fingerprint = hashlib.sha256(everything.encode()).hexdigest()[:16]

        # The name of the cache holds a hash of all that shapes the tokens, so it is never stale.
        label = name if name in DATASETS else "text"
        stem = tokenizer.replace(":", "-")
        cache = os.path.join(data_dir, f"{label}-{split}-{stem}-{fingerprint}.npy")
        if not os.path.exists(cache):
            text = read_text(path, member)
            tokens = encode(text, load_tokenizer(tokenizer), f"tokenizing {name} {split}")
            os.makedirs(data_dir, exist_ok=True)
            with written_whole(cache) as temporary, open(temporary, "wb") as file:
                np.save(file, tokens)
        splits[split] = Split(np.load(cache, mmap_mode="r"), fingerprint)
    return splits


# ---- Batches -------------------------------------------------------------------------------------
@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def get_batch(
    tokens: np.ndarray, index: int, batch_size: int, block_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Training batch number `index`: inputs and targets, both (B, T), int64, on the CPU.

    A function of its arguments alone, so batch i is the same in every method and after a resume. An
    epoch reads every window once, in random order, each epoch at another offset. Raises ValueError
    if a batch does not fit.
    """
    # The text is cut into windows, which overlap in one token: a target is the next input.
    windows = (len(tokens) - 1) // block_size - 1  # one less than fit: room for the offset
    if windows < batch_size:
        needed = (batch_size + 1) * block_size + 1
        raise ValueError(
            f"{len(tokens)} tokens are too few for a batch of {batch_size} sequences of "
            f"{block_size}, which needs {needed}"
        )

    # Sequences are numbered through all batches and epochs. Every epoch cuts the text at other
    # places, so its windows are new ones.
    rows = []
    for sequence in range(index * batch_size, (index + 1) * batch_size):
        epoch, place = divmod(sequence, windows)
        window = int(epoch_order(windows, seed, epoch)[place])
        offset = (epoch * 7919 + seed) % block_size  # 7919 is prime: offsets spread over the window
        start = offset + window * block_size
        rows.append(tokens[start : start + block_size + 1].astype(np.int64))
    batch = torch.from_numpy(np.stack(rows))  # (B, T + 1)
    return batch[:, :-1], batch[:, 1:]
