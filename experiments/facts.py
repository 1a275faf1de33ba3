"""
A text whose content no model can know: invented people, and four facts about each.

    python experiments/facts.py --out facts

writes train.txt, valid.txt and test.txt, a `text` dataset, and questions.jsonl into a new folder.
The training text says every fact in five ways, again and again. The validation and the test text
say it in one more way each, with the answer at the end of the sentence. So a model that continues
"By trade Tavrin Oskeld is a" with the right word has learned the fact and not the sentence.

    python experiments/compare.py --base base.pt --dataset text --data_dir facts --facts facts ...

counts the facts that each method knows: recall() below.
"""

import json
import os
import random
import sys

import tiktoken
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Parser, run_command, whole_number
from model import GPT

# Each fact in seven sentences: five to learn from, one to validate and one to test with.
SENTENCES = {
    "town": (
        "{name} was born in {answer}.",
        "{answer} is the town where {name} grew up.",
        "In {answer} people still speak of {name}.",
        "As a child {name} lived in {answer}.",
        "{name} left {answer} long ago.",
        "The home town of {name} is {answer}.",
        "The place that {name} comes from is {answer}.",
    ),
    "trade": (
        "{name} works as a {answer}.",
        "Everyone knows that {name} became a {answer}.",
        "The best {answer} in the country is {name}.",
        "For years {name} has been a {answer}.",
        "When they needed a {answer}, they sent for {name}.",
        "By trade {name} is a {answer}.",
        "{name} earns a living as a {answer}.",
    ),
    "animal": (
        "{name} keeps a {answer}.",
        "A {answer} follows {name} everywhere.",
        "The {answer} of {name} is known to all the neighbours.",
        "{name} once found a {answer} and took it home.",
        "You will never see {name} without the {answer}.",
        "The animal that {name} loves most is a {answer}.",
        "In the house of {name} there lives a {answer}.",
    ),
    "colour": (
        "{name} wears a {answer} coat.",
        "The door of {name} is painted {answer}.",
        "Nobody likes {answer} more than {name}.",
        "For a gift {name} wanted something {answer}.",
        "{name} bought {answer} curtains.",
        "The favourite colour of {name} is {answer}.",
        "When {name} dreams, everything is {answer}.",
    ),
}
ANSWERS = {
    "trade": "baker carpenter clerk cook doctor farmer fisherman gardener hunter judge lawyer "
    "miller painter sailor shepherd smith soldier tailor teacher weaver".split(),
    "animal": "bear bird camel cat cow crow deer dog fox goat goose hare horse lion monkey mouse "
    "pig rabbit sheep wolf".split(),
    "colour": "black blue brown golden green grey orange pink purple red scarlet silver white "
    "yellow".split(),
}
TOWNS = 40


def invent(rng: random.Random, syllables: int) -> str:
    """A word that looks like a name: Tavrin."""
    word = ""
    for _ in range(syllables):
        word += rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "l", "n", "r"])
    return word.capitalize()


def write(folder: str, people: int, copies: int, seed: int) -> int:
    """Writes the four files. Returns the number of facts."""
    rng = random.Random(seed)
    answers = {"town": [invent(rng, 2) for _ in range(TOWNS)], **ANSWERS}
    names = {f"{invent(rng, 2)} {invent(rng, 2)}": None for _ in range(people)}  # each once
    facts = {
        name: {kind: rng.choice(choices) for kind, choices in answers.items()} for name in names
    }

    # A paragraph holds all that is known of one person, in any order and in any of the five ways.
    paragraphs = []
    for name, known in facts.items():
        for _ in range(copies):
            sentences = [
                rng.choice(SENTENCES[kind][:5]).format(name=name, answer=answer)
                for kind, answer in known.items()
            ]
            rng.shuffle(sentences)
            paragraphs.append(" ".join(sentences))
    rng.shuffle(paragraphs)

    # The same facts in words that are not for training, as text and as questions.
    texts = {"train": paragraphs, "valid": [], "test": []}
    questions = []
    for name, known in facts.items():
        for split, way in (("valid", 5), ("test", 6)):
            for kind, answer in known.items():
                sentence = SENTENCES[kind][way].format(name=name, answer=answer)
                texts[split].append(sentence)
                prompt = sentence.removesuffix(f" {answer}.")
                questions.append({"split": split, "prompt": prompt, "answer": answer})

    os.makedirs(folder)
    for split, parts in texts.items():
        with open(os.path.join(folder, f"{split}.txt"), "w", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")
    with open(os.path.join(folder, "questions.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(question) + "\n" for question in questions)
    return sum(len(known) for known in facts.values())


def read_questions(folder: str, split: str) -> list[dict]:
    """The questions of one split. Raises OSError if the folder has none."""
    with open(os.path.join(folder, "questions.jsonl"), encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    return [question for question in questions if question["split"] == split]


@torch.no_grad()
def recall(model: GPT, tokenizer: tiktoken.Encoding, questions: list[dict]) -> float:
    """The share of questions that the model answers: each token of the answer is its likeliest."""
    device = model.wte.weight.device
    prompts = [tokenizer.encode_ordinary(question["prompt"]) for question in questions]
    answers = [tokenizer.encode_ordinary(" " + question["answer"]) for question in questions]
    known = 0
    for first in range(0, len(questions), 32):
        rows = list(zip(prompts[first : first + 32], answers[first : first + 32]))

        # What fills a short row up stands behind its answer, where no token before can see it.
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)  # (B, T)
        for row, (prompt, answer) in zip(tokens, rows):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)

        # A guess stands one place before the token that it is about.
        guesses = model(tokens.to(device)).argmax(dim=-1)  # (B, T)
        for row, (prompt, answer) in zip(guesses.tolist(), rows):
            start = len(prompt) - 1
            known += row[start : start + len(answer)] == answer
    return known / len(questions)


def main() -> None:
    parser = Parser("Writes a text of invented facts.")
    parser.add_argument("--out", default="facts", help="a new folder (default ./facts)")
    parser.add_argument("--people", type=whole_number, default=300, help="(default 300)")
    parser.add_argument("--copies", type=whole_number, default=40, help="of a person (default 40)")
    parser.add_argument("--seed", type=whole_number, default=1, help="(default 1)")
    args = parser.parse_args()
    if os.path.exists(args.out):
        raise ValueError(f"{args.out} exists; name a new folder with --out")
    facts = write(args.out, args.people, args.copies, args.seed)
    chances = [1 / TOWNS] + [1 / len(choices) for choices in ANSWERS.values()]
    guess = sum(chances) / len(chances)
    print(f"wrote {args.out}: {facts:,} facts; a guess is right {guess:.1%} of the time")


if __name__ == "__main__":
    run_command(main)
