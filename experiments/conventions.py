"""
Perplexity as others count it: the same model and text, read in two other ways.

    python experiments/conventions.py gpt2 --dataset wikitext2-raw --convention hf --stride 1024
    python experiments/conventions.py gpt2 --dataset wikitext2-raw --convention lm-eval

    hf        the text's lines as Hugging Face's perplexity guide joins them, which adds newlines
    lm-eval   a piece per article, de-tokenized, after one end-of-text token; words and bytes are
              those of the original. As in the `wikitext` task of EleutherAI's harness.

eval.py reads a file as it is. All three score every token once; a figure is worth nothing without
the name of its convention. Shape names: see hml.py.
"""

import io
import json
import math
import os
import re
import sys

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from data import (
    DATASETS,
    SPLITS,
    check_vocabulary,
    count_words,
    encode,
    find_source,
    load_tokenizer,
    read_text,
)
from eval import perplexity, sum_nll
from model import GPT, open_model


def detokenize(page: str) -> str:
    """WikiText's spaced-out text set together again, by lm-eval's rules in their order."""
    marks = [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
    for old, new in [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *marks]:
        page = page.replace(old, new)

    # No spaces just inside a pair.
    for left, right in ("()", "[]", "{}", '""', "''"):
        pattern = rf"\{left}\s*([^\{right}]*?)\s*\{right}"
        page = re.sub(pattern, rf"{left}\1{right}", page)

    headings = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
    rest = [(" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
    for old, new in headings + rest:
        page = page.replace(old, new)
    return page


def load_pieces(
    dataset: str, split: str, tokenizer: str, data_dir: str, convention: str
) -> tuple[list[np.ndarray], int, int]:
    """A split in pieces of tokens, its words, and its bytes.

    Each piece starts with one token that is context and never scored. Raises ValueError where the
    text has no articles to cut at.
    """
    path, member = find_source(dataset, split, data_dir)
    text = read_text(path, member)
    encoding = load_tokenizer(tokenizer)

    if convention == "hf":
        lines = [line if line.strip() else "" for line in io.StringIO(text)]
        tokens = encode("\n\n".join(lines), encoding, "tokenizing")
        return [tokens], count_words(text), len(text.encode())

    starts = [heading.start() for heading in re.finditer("^ = [^=].* = $", text, re.MULTILINE)]
    if not starts:
        raise ValueError(f"lm-eval's convention cuts WikiText at its headings; {dataset} has none")
    ends = [*starts[1:], len(text) + 1]
    pages = [text[start : end - 1] for start, end in zip(starts, ends)]  # without the last newline
    pieces = []
    for page in pages:
        tokens = [encoding.eot_token, *encoding.encode_ordinary(detokenize(page))]
        pieces.append(np.array(tokens, dtype=np.uint16))
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return pieces, words, sum(len(page.encode()) for page in pages)


def evaluate(
    model: GPT, pieces: list[np.ndarray], words: int, size: int, stride: int | None
) -> dict:
    """The figures of a text of so many words and bytes."""
    nll = 0.0
    tokens = 0
    for piece in tqdm(pieces, unit="piece", disable=None):
        nll_of_piece, tokens_of_piece = sum_nll(model, piece, stride)
        nll += nll_of_piece
        tokens += tokens_of_piece
    return {
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "nll": nll,
        "token_perplexity": perplexity(nll, tokens),
        "word_perplexity": perplexity(nll, words),
        "bits_per_byte": nll / math.log(2) / size,
    }


def main() -> None:
    parser = common.Parser("Perplexity by other people's conventions.")
    parser.add_argument("checkpoint", help="checkpoint, GPT-2 .bin file, or gpt2, gpt2-medium, ...")
    parser.add_argument("--convention", choices=("hf", "lm-eval"), required=True)
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default test)")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: the checkpoint's own)")
    parser.add_argument("--data_dir", help="(default: the checkpoint's own, or ./data)")
    parser.add_argument(
        "--stride", type=common.whole_number, help="of hf: tokens between windows (default 512)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--json", type=common.new_file(".json"), help="also write the figures to this file"
    )
    args = parser.parse_args()
    if args.stride is not None and args.convention == "lm-eval":
        raise ValueError("--convention lm-eval reads windows without overlap; drop --stride")

    device = common.pick_device(args.device)
    model, info = open_model(args.checkpoint, args.data_dir or "data")
    check_vocabulary(info["tokenizer"], model.config.vocab_size)
    model = model.to(device).eval()
    dataset = args.dataset or info.get("dataset", "wikitext2-raw")
    data_dir = args.data_dir or info.get("data_dir", "data")
    window = model.config.block_size
    stride = window if args.convention == "lm-eval" else args.stride or min(512, window)
    if stride > window:
        raise ValueError(f"--stride {stride} is more than the window, {window}")
    print(
        f"{args.checkpoint} on {device}, float32: {dataset} {args.split} as convention "
        f"{args.convention}, tokenizer {info['tokenizer']}, window {window}, stride {stride}"
    )

    pieces, words, size = load_pieces(
        dataset, args.split, info["tokenizer"], data_dir, args.convention
    )
    with torch.no_grad():
        report = evaluate(model, pieces, words, size, stride)
    for name in ("token_perplexity", "word_perplexity", "bits_per_byte"):
        print(f"{name.replace('_', ' '):18}{report[name]:.4f}")
    if args.json:
        about = {**vars(args), "dataset": dataset, "stride": stride, "window": window}
        with common.written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump({**about, **report}, file, indent=2)


if __name__ == "__main__":
    common.run_command(main)
