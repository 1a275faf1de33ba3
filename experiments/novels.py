"""
The study's old domain: 100 English novels of 1811-1930, in the public domain, as a `text` dataset.

    git clone https://github.com/computationalstylistics/100_english_novels
    git -C 100_english_novels checkout 143e6018
    python experiments/novels.py 100_english_novels/corpus --out novels

writes train.txt (96 novels, 74 MB), valid.txt and test.txt (two each) into a new folder.
"""

import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Parser, file_sha256, run_command, written_whole

# Which novels, counted from 0 in the order of their files' names; all others are for training.
VALID = (7, 23)
TEST = (57, 83)

# Of the commit above.
SHA256 = {
    "train": "d409d66233fa31eb666d3a8c7bafc86213c9d2e6a994e254af7dd43889f73fdd",
    "valid": "fcdc0619daf39490579f3e3711a4e14e214541d991af3823aa8e4c3df66d4134",
    "test": "5cd77ac973f90995e48be7944f0c4a807a916a716108db5902c83a780ed046f8",
}


def main() -> None:
    parser = Parser("Makes the study's old domain.")
    parser.add_argument("corpus", help="the folder with a .txt file per novel")
    parser.add_argument("--out", default="novels", help="a new folder (default ./novels)")
    args = parser.parse_args()
    paths = sorted(glob.glob(os.path.join(args.corpus, "*.txt")))
    if len(paths) != 100:
        raise ValueError(f"{args.corpus} holds {len(paths)} .txt files, not 100; name its corpus")

    if os.path.exists(args.out):
        raise ValueError(f"{args.out} exists; name a new folder with --out")

    # Byte-order marks go, and every line ends in one way.
    novels = {"train": [], "valid": [], "test": []}
    for number, path in enumerate(paths):
        split = "valid" if number in VALID else "test" if number in TEST else "train"
        with open(path, encoding="utf-8-sig") as file:
            novels[split].append(file.read())

    os.makedirs(args.out)
    for split, texts in novels.items():
        path = os.path.join(args.out, f"{split}.txt")
        with written_whole(path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write("\n\n".join(texts))
        known = "as expected" if file_sha256(path) == SHA256[split] else "another corpus than ours"
        print(f"wrote {path}: {os.path.getsize(path):,} bytes, {known}")


if __name__ == "__main__":
    run_command(main)
