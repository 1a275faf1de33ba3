r"""
Zero-shot tasks through EleutherAI's lm-evaluation-harness, the field's standard.

    pip install "lm-eval[hf]"

    python experiments/harness.py ckpt.pt \
        --tasks arc_easy,arc_challenge,piqa,winogrande,boolq,commonsense_qa,logiqa,mmlu
    python experiments/harness.py gpt2 --tasks wikitext
    python experiments/harness.py ckpt.pt --tasks mine --include_path folder     tasks of your own

The adapter gives the harness what it asks a language model for: log-likelihoods of continuations,
rolling ones of whole texts (as conventions.py reads them), and greedy text. Shape names: see
hml.py.
"""

import json
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError:  # --help is for those who have yet to install it
    lm_eval = None
    TemplateLM = object

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Parser, new_file, pick_device, run_command, whole_number, written_whole
from data import check_vocabulary, load_tokenizer
from eval import sum_nll
from model import GPT, open_model


class Adapter(TemplateLM):
    """A GPT of ours and its tokenizer as the harness's language model.

    TemplateLM turns text pairs into token pairs.
    """

    def __init__(self, model: GPT, tokenizer: str, batch_size: int = 16):
        super().__init__()
        self.model, self.encoding, self.batch_size = (
            model.eval(),
            load_tokenizer(tokenizer),
            batch_size,
        )

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot_token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.encoding.encode_ordinary(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the continuation's log-likelihood, and whether
        it is the greedy one.

        Longest first, so that a batch holds like lengths (and memory runs out at once, or never);
        padding comes after the text, where a causal model does not see it. Contexts lose their
        beginning where they are too long.
        """
        size, device = self.model.config.block_size, self.model.wte.weight.device
        results, order = (
            {},
            sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:]))),
        )
        for first in tqdm(
            range(0, len(order), self.batch_size), disable=True if disable_tqdm else None
        ):
            batch = order[first : first + self.batch_size]
            rows = [
                (requests[i][1] + requests[i][2])[-size - 1 :] for i in batch
            ]  # one more than is read: the target
            inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)  # (B, T)
            for b, row in enumerate(rows):
                inputs[b, : len(row) - 1] = torch.tensor(row[:-1])
            for i, row, logits in zip(
                batch, rows, self.model(inputs.to(device))
            ):  # logits (T, vocab)
                n = len(requests[i][2])
                if n > size:
                    raise ValueError(
                        f"a continuation of {n} tokens does not fit the model's {size} positions"
                    )
                logp = (
                    logits[len(row) - 1 - n : len(row) - 1].float().log_softmax(dim=-1)
                )  # (n, vocab)
                target = torch.tensor(row[len(row) - n :], dtype=torch.int64, device=device)  # (n,)
                total = logp.gather(1, target[:, None]).cpu().double().sum().item()
                results[i] = total, torch.equal(logp.argmax(dim=1), target)
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text after one end-of-text token, in windows without
        overlap.
        """
        texts = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
        texts = tqdm(texts, disable=True if disable_tqdm else None)
        return [-sum_nll(self.model, np.array(text))[0] if len(text) > 1 else 0.0 for text in texts]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first of the request's stop strings."""
        out, size = [], self.model.config.block_size
        for request in tqdm(requests, disable=True if disable_tqdm else None):
            context, options = request.args
            new = normalize_gen_kwargs(options)["max_gen_toks"]
            tokens = (self.tok_encode(context) or [self.eot_token_id])[-size:]
            tokens = torch.tensor([tokens], device=self.model.wte.weight.device)  # (1, T)
            text = self.encoding.decode(
                self.model.generate(tokens, new, temperature=0)[0, tokens.size(1) :].tolist()
            )
            for stop in handle_stop_sequences(options.get("until"), "<|endoftext|>"):
                text = text.split(stop)[0] if stop else text
            out.append(text)
        return out


def main() -> None:
    parser = Parser("Zero-shot tasks through the lm-evaluation-harness.")
    parser.add_argument(
        "checkpoint", help="checkpoint, GPT-2 .bin file, or gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )
    parser.add_argument(
        "--tasks", required=True, help="the harness's names of tasks, joined by commas"
    )
    parser.add_argument("--include_path", help="folder with tasks of your own")
    parser.add_argument(
        "--limit", type=whole_number, help="only so many questions of each task, to try things"
    )
    parser.add_argument(
        "--num_fewshot", type=int, help="examples in the prompt (default: the task's own)"
    )
    parser.add_argument("--batch_size", type=whole_number, default=16, help="(default 16)")
    parser.add_argument(
        "--data_dir", default="data", help="where GPT-2's weights are kept (default ./data)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument(
        "--json", type=new_file(".json"), help="also write the figures to this file"
    )
    args = parser.parse_args()
    if lm_eval is None:
        raise ValueError("this needs the lm-evaluation-harness: pip install 'lm-eval[hf]'")
    device = pick_device(args.device)
    if args.include_path and not os.path.isdir(args.include_path):
        raise ValueError(f"there is no folder {args.include_path}")
    manager = TaskManager(include_path=args.include_path)
    names = manager.match_tasks(args.tasks.split(","))
    unknown = [task for task in args.tasks.split(",") if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"--tasks: the harness has no {', '.join(unknown)}; its list: lm_eval ls tasks"
        )
    model, info = open_model(args.checkpoint, args.data_dir)
    check_vocabulary(info["tokenizer"], model.config.vocab_size)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{args.checkpoint}: {size:,} parameters, {info['tokenizer']}, on {device}, float32: "
        f"{', '.join(names)}"
    )
    results = lm_eval.simple_evaluate(
        Adapter(model.to(device), info["tokenizer"], args.batch_size),
        tasks=names,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
    )
    print(make_table(results))
    if args.json:
        with written_whole(args.json) as temporary, open(temporary, "w") as file:
            json.dump(results["results"], file, indent=2, default=str)


if __name__ == "__main__":
    run_command(main)
