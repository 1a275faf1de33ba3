"""
Text -> tokens -> batches.

Datasets: wikitext103 and wikitext2-raw (raw text), wikitext2 (word-level form, rare words as <unk>), all of them
downloaded and checked or taken from your own files; and pydocs, the English that ships with every Python: no
download. Tokenizers, all through tiktoken: gpt2, gpt2:N (the first N of its merges), bytes.

What is made under `data_dir` can be deleted at any time. A split has to fit in memory as text, once.
In order: files and downloads, tokenizers, where the text is, tokens, batches. Shape names: see hml.py.
"""

import ast
import hashlib
import http.client
import io
import os
import platform
import re
import sysconfig
import urllib.request
import warnings
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pydoc_data.topics import topics

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
TIMEOUT = 30  # seconds without a byte, after which a download gives up
CONVENTIONS = ("tokens", "hf", "lm-eval")

# ---- Files and downloads ---------------------------------------------------------------------------------------------
@contextmanager
def written_whole(path: str) -> Iterator[str]:
    """Yields a temporary name, which becomes path at the end. A fault leaves path as it was; an OSError names it."""
    temporary = f"{path}.tmp"  # what a killed try left there is simply overwritten
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error


def file_sha256(path: str, size: int | None = None) -> bytes:
    """The sha256 digest (32 bytes) of the file's first `size` bytes, of all of it by default."""
    digest, left = hashlib.sha256(), os.path.getsize(path) if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def download(urls: list[str], path: str, size: int | None = None, sha256: str | None = None, hint: str = "") -> None:
    """Puts the file at the first address that delivers it into path, complete and checked, or raises OSError.

    A file that is there already and passes the checks (size in bytes, sha256 in hex; None: not known) is kept.
    `hint`: a sentence for the error, what the user can do instead.
    """

    def check(file: str) -> None:
        if size is not None and os.path.getsize(file) != size:
            raise OSError(f"it has {os.path.getsize(file)} bytes instead of {size}")
        if sha256 is not None and (got := file_sha256(file).hex()) != sha256:
            raise OSError(f"its sha256 is {got}, expected {sha256}")

    reasons = []
    if os.path.exists(path):
        try:
            return check(path)
        except OSError as error:
            reasons.append(f"the file that is there: {error}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp"
    for url in urls:
        try:
            # One of the hosts answers 403 to Python's default user agent.
            request = urllib.request.Request(url, headers={"User-Agent": "nanoMIDUS/1.0"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, open(temporary, "wb") as file:
                total = int(reply.headers.get("Content-Length") or 0)
                print(f"downloading {url} to {path}")
                with tqdm(total=total or None, unit="B", unit_scale=True, disable=None) as bar:
                    while piece := reply.read(1 << 20):
                        file.write(piece)
                        bar.update(len(piece))
            if total and os.path.getsize(temporary) != total:
                raise OSError(f"the connection ended after {os.path.getsize(temporary)} of {total} bytes")
            check(temporary)
            return os.replace(temporary, path)
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{url}: {error}")
    if os.path.exists(temporary):
        os.remove(temporary)
    raise OSError(f"could not get {path}. {hint} What was tried: {'; '.join(reasons)}")


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
def vocab_size(tokenizer: str) -> int:
    """The number of token ids: gpt2 50257, gpt2:N N + 1, bytes 257; the last is <|endoftext|>. Else ValueError."""
    if tokenizer in ("bytes", "gpt2"):
        return {"bytes": 257, "gpt2": 50257}[tokenizer]
    size = re.fullmatch(r"gpt2:(\d+)", tokenizer)
    if not size or not 256 <= int(size[1]) <= 50256:
        raise ValueError(f"tokenizer must be gpt2, gpt2:N with N from 256 to 50256, or bytes; not {tokenizer!r}")
    return int(size[1]) + 1


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name. Raises ValueError for an unknown name, OSError if GPT-2's vocabulary is missing.

    gpt2:N keeps the merges of rank below N. A merge only builds on earlier ones, so any N from 256 (the single
    bytes) up is a valid vocabulary; a small one keeps a small model from being nearly all output layer.
    """
    n = vocab_size(name) - 1
    if name == "bytes":
        ranks, pattern = {bytes([i]): i for i in range(256)}, r"[\s\S]"
    else:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:
            hint = "set TIKTOKEN_CACHE_DIR to a folder where it is cached from elsewhere, or use --tokenizer bytes"
            raise OSError(f"tiktoken could not download GPT-2's vocabulary; {hint} ({error})") from error
        ranks, pattern = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < n}, gpt2._pat_str
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": n})


# ---- Where the text is -----------------------------------------------------------------------------------------------
SMERITY, PINNED = "https://wikitext.smerity.com/", "3555105b17ae31cc619a136fac72dbe2865c3738"
WIKITEXT = {  # name: folder inside the zip, ending of its files, addresses, bytes, sha256
    "wikitext103": (
        "wikitext-103-raw", "raw",
        [f"https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/{PINNED}/wikitext-103-raw-v1.zip",
         SMERITY + "wikitext-103-raw-v1.zip"],
        191984949, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
    "wikitext2": (
        "wikitext-2", "tokens", [SMERITY + "wikitext-2-v1.zip"],
        4475746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    ),
    "wikitext2-raw": (
        "wikitext-2-raw", "raw", [SMERITY + "wikitext-2-raw-v1.zip"],
        4721645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
}  # fmt: skip
DATASETS = (*WIKITEXT, "pydocs")


def kept(data_dir: str, name: str) -> str:
    """Where a file made or downloaded once is, or goes: in data_dir, or in ./data if that is read-only without it."""
    # The mode is asked too: root may write anywhere, but should not where nobody is meant to.
    if os.path.isdir(data_dir) and not (os.access(data_dir, os.W_OK) and os.stat(data_dir).st_mode & 0o222):
        data_dir = data_dir if os.path.exists(os.path.join(data_dir, name)) else "data"
    os.makedirs(data_dir, exist_ok=True)
    return os.path.join(data_dir, name)


def build_pydocs(folder: str) -> None:
    """Writes pydocs' three splits into folder: Python's language reference and the standard library's docstrings.

    Sources are parsed, never imported. A document is a topic or a module; a checksum of its name picks the split
    (one in 20 each for valid and test), so that nothing depends on hash or directory order.
    """
    documents = {f"topic {name}": text for name, text in topics.items()}
    root, skip = sysconfig.get_paths()["stdlib"], {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    sources = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip]
        sources += [os.path.join(directory, file) for file in files if file.endswith(".py")]
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in tqdm(sources, desc="reading docstrings", disable=None):
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            try:
                nodes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, kinds)]
            except (SyntaxError, ValueError):  # some files of the library are templates, or broken on purpose
                continue
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        name = os.path.relpath(path, root).replace(os.sep, "/")
        documents[name] = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)))
    texts = {split: [] for split in SPLITS}
    for name in sorted(name for name, text in documents.items() if text):
        split = {0: "valid", 1: "test"}.get(zlib.crc32(name.encode()) % 20, "train")
        texts[split].append(documents[name])
    for split, parts in texts.items():
        with written_whole(os.path.join(folder, f"wiki.{split}.txt")) as temporary, open(temporary, "wb") as file:
            file.write(("\n\n".join(parts) + "\n").encode())


def find_source(name: str, split: str, data_dir: str) -> tuple[str, str | None]:
    """(file, member): where a split's text is; member is its name inside a zip, None for a plain file.

    Looks for wiki.{train,valid,test}.{raw,tokens} in data_dir, then downloads. Raises ValueError for an unknown
    dataset, OSError if there is neither file nor network.
    """
    if name == "pydocs":
        folder = kept(data_dir, f"pydocs-{platform.python_version()}")
        if not all(os.path.exists(os.path.join(folder, f"wiki.{s}.txt")) for s in SPLITS):
            os.makedirs(folder, exist_ok=True)
            build_pydocs(folder)
        return os.path.join(folder, f"wiki.{split}.txt"), None
    if name not in WIKITEXT:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; not {name!r}")
    folder, ending, urls, size, sha256 = WIKITEXT[name]
    if os.path.exists(own := os.path.join(data_dir, f"wiki.{split}.{ending}")):
        return own, None
    hint = f"Without network, put wiki.train.{ending}, wiki.valid.{ending} and wiki.test.{ending} into {data_dir} "
    hint += "(--data_dir), or use --dataset pydocs, which needs no download."
    path = kept(data_dir, os.path.basename(urls[0]))
    download(urls, path, size, sha256, hint)
    return path, f"{folder}/wiki.{split}.{ending}"


# ---- Tokens ----------------------------------------------------------------------------------------------------------
# One split, tokenized. tokens: uint16 memory map; words: one end-of-line each included; bytes: of the text.
Split = namedtuple("Split", ("tokens", "words", "bytes"))


def encode(text: str, tokenizer: tiktoken.Encoding, desc: str) -> np.ndarray:
    """Token ids (uint16) of the text, as if encoded in one piece; in parallel, with a bar. It is cut at single spaces
    between two other characters, where GPT-2's pattern always starts a new piece."""
    cuts, size, gap = [0], 1 << 18, re.compile(r"(?<=\S) (?=\S)")
    while cut := gap.search(text, cuts[-1] + size):
        cuts.append(cut.start())
    pieces, ids, threads = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])], [], os.cpu_count() or 1
    for first in tqdm(range(0, len(pieces), 4 * threads), desc=desc, disable=None):
        for piece in tokenizer.encode_ordinary_batch(pieces[first : first + 4 * threads], num_threads=threads):
            ids.append(np.array(piece, dtype=np.uint16))
    return np.concatenate(ids)


def count_words(text: str) -> int:
    """Words, with one end-of-line for each line, as WikiText counts them."""
    return len(text.split()) + text.count("\n") + (not text.endswith("\n"))


def read_text(path: str, member: str | None) -> str:
    """The text at a place that find_source() names, its lines ending in \\n. Raises ValueError if there is none."""
    try:
        with open(path, "rb") if member is None else zipfile.ZipFile(path).open(member) as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n")  # no byte-order mark, no \r
    except (UnicodeDecodeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold {member or 'a split'} as UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty{f' in {member}' if member else ''}; a split needs some text")
    return text


def load_split(name: str, split: str, tokenizer: str, data_dir: str) -> Split:
    """One split as tokens, from a cache keyed by the source file's sha256 and everything else that shapes it."""
    path, member = find_source(name, split, data_dir)
    key = hashlib.sha256(repr((file_sha256(path), member, tokenizer, "layout 2")).encode()).hexdigest()[:16]
    cache = kept(data_dir, f"{name}-{split}-{tokenizer.replace(':', '-')}-{key}.bin")
    if not os.path.exists(cache):
        encoding, text = load_tokenizer(tokenizer), read_text(path, member)
        tokens = encode(text, encoding, f"tokenizing {name} {split}")
        with written_whole(cache) as temporary, open(temporary, "wb") as file:  # 24 bytes, then the tokens
            file.write(np.array([count_words(text), len(text.encode()), len(tokens)], dtype=np.uint64))
            file.write(tokens)
    room = os.path.getsize(cache) - 24
    words, size, length = np.fromfile(cache, dtype=np.uint64, count=3).tolist() if room > 0 else (0, 0, 0)
    tokens = np.memmap(cache, np.uint16, "r", 24) if room == 2 * length > 0 else None
    if tokens is None or tokens.max() >= vocab_size(tokenizer):
        raise ValueError(f"{cache} is damaged; delete it, and it is made again")
    return Split(tokens, words, size)


def load_dataset(name: str, tokenizer: str, data_dir: str = "data", splits: tuple = SPLITS) -> dict[str, Split]:
    """The splits asked for, by name ("train", "valid", "test"). Raises ValueError or OSError, one sentence each."""
    vocab_size(tokenizer)  # refuses a bad name before any download
    return {split: load_split(name, split, tokenizer, data_dir) for split in splits}


def detokenize(page: str) -> str:
    """WikiText's spaced-out text set together again by the rules of lm-eval's `wikitext` task, in their order."""
    marks = [(f" {c} ", f"{c} ") for c in ":;.!?,"]
    for old, new in [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *marks]:
        page = page.replace(old, new)
    for left, right in ("()", "[]", "{}", '""', "''"):  # no spaces just inside a pair
        page = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", page)
    headings = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
    for old, new in [*headings, (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]:
        page = page.replace(old, new)
    return page


def load_pieces(name: str, split: str, tokenizer: str, data_dir: str, convention: str) -> tuple[list, int, int]:
    """A split as one of the field's conventions reads it: pieces of tokens, each of which starts with one token that
    is context and never scored; words; bytes.

    tokens: the whole file as it is. hf: its lines as Hugging Face's perplexity guide joins them, which adds newlines.
    lm-eval: a piece per article, de-tokenized, after one end-of-text token; words and bytes are those of the original.
    """
    if convention == "tokens":
        whole = load_dataset(name, tokenizer, data_dir, (split,))[split]
        return [whole.tokens], whole.words, whole.bytes
    text, encoding = read_text(*find_source(name, split, data_dir)), load_tokenizer(tokenizer)
    if convention == "hf":
        joined = "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))
        return [encode(joined, encoding, "tokenizing")], count_words(text), len(text.encode())
    starts = [heading.start() for heading in re.finditer("^ = [^=].* = $", text, re.MULTILINE)]
    if not starts:
        raise ValueError(f"lm-eval's convention cuts WikiText at its headings, and {name} has none")
    pages = [text[a : b - 1] for a, b in zip(starts, [*starts[1:], len(text) + 1])]  # without the last newline
    ids = [[encoding.eot_token, *encoding.encode_ordinary(detokenize(page))] for page in pages]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return [np.uint16(piece) for piece in ids], words, sum(len(page.encode()) for page in pages)


# ---- Batches ---------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:  # two are kept: a batch may straddle epochs
    return np.random.default_rng([seed, epoch]).permutation(windows)


def get_batch(tokens: np.ndarray, index: int, batch_size: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training batch number `index`: inputs and targets, both (B, T), int64, on the CPU.

    A function of its arguments alone, so batch i is the same in every method and after a resume. An epoch reads
    every window once, in random order, each epoch at another offset. ValueError if a batch does not fit.
    """
    windows = (len(tokens) - 1) // block_size - 1  # one less than fit: room for the offset
    if windows < batch_size:
        raise ValueError(f"{len(tokens)} tokens are too few for {batch_size} + 1 sequences of {block_size} and one")
    rows = []
    for sequence in range(index * batch_size, (index + 1) * batch_size):
        epoch, window = divmod(sequence, windows)
        offset = (epoch * 7919 + seed) % block_size  # 7919 is prime: offsets spread over the window
        start = offset + int(epoch_order(windows, seed, epoch)[window]) * block_size
        rows.append(tokens[start : start + block_size + 1].astype(np.int64))
    batch = torch.from_numpy(np.stack(rows))  # (B, T + 1)
    return batch[:, :-1], batch[:, 1:]
