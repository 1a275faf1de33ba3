"""The adapter for the lm-evaluation-harness, on local tasks.

Skips without lm-eval and transformers.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import call
from data import load_tokenizer
from eval import sum_nll
from model import GPT, GPTConfig, save_checkpoint
from test_model import wake

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
import harness

QUESTIONS = [
    {
        "question": "The sky is",
        "choices": [" blue", " a very long and winding answer", " so"],
        "answer": 0,
    },
    {"question": "Two and two make", "choices": [" four", " five"], "answer": 1},
    {"question": "", "choices": ["nothing", "something"], "answer": 0},
]
TEXTS = [
    "A first text, which is longer than the window of the model, so that it is read in several.",
    "short",
]


@pytest.fixture(scope="module")
def both():
    """The same random weights as GPT-2 of transformers and as a GPT of ours."""
    torch.manual_seed(0)
    shape = dict(
        n_layer=2,
        n_head=1,
        n_embd=64,
        n_positions=32,
        vocab_size=257,
        bos_token_id=256,
        eos_token_id=256,
    )
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = GPT(GPTConfig(2, 1, 64, 32, 257))
    state = {
        name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()
    }
    del state["lm_head.weight"]
    for name in state:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = state[name].T
    ours.load_state_dict(state)
    return ours.eval(), theirs


def their_tokenizer():
    """Bytes as a tokenizer of transformers: GPT-2 spells every byte as a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    vocab = (
        {chr(b): b for b in plain}
        | {chr(256 + i): b for i, b in enumerate(rest)}
        | {"<|endoftext|>": 256}
    )
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def tasks(tmp_path):
    """A folder with a multiple-choice and a rolling task that need no network."""
    for name, rows in (("choice", QUESTIONS), ("rolling", [{"text": text} for text in TEXTS])):
        (tmp_path / f"{name}.json").write_text("\n".join(json.dumps(row) for row in rows))
    head = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {}\n"
    (tmp_path / "choice.yaml").write_text(
        "task: mine_choice\noutput_type: multiple_choice\n"
        + head.format(tmp_path / "choice.json")
        + "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        + "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        "task: mine_rolling\noutput_type: loglikelihood_rolling\n"
        + head.format(tmp_path / "rolling.json")
        + "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )
    return tmp_path


def by_hand(model, context: str, continuation: str) -> tuple[float, bool]:
    tokens = load_tokenizer("bytes").encode_ordinary(context) or [256]
    new = load_tokenizer("bytes").encode_ordinary(continuation)
    logp = model(torch.tensor([(tokens + new)[-33:-1]]))[0].log_softmax(-1)[-len(new) :]
    return logp.gather(1, torch.tensor(new)[:, None]).sum().item(), logp.argmax(-1).tolist() == new


def pairs():
    texts = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]] + [
        ("x" * 100, "yz")
    ]
    tokens = [[load_tokenizer("bytes").encode_ordinary(part) for part in pair] for pair in texts]
    return [(text, context or [256], new) for text, (context, new) in zip(texts, tokens)]


@torch.no_grad()
def test_log_likelihoods_are_those_of_the_forward_pass_and_of_transformers(both):
    from lm_eval.models.huggingface import HFLM

    ours, theirs = both
    want = [by_hand(ours, *text) for text, _, _ in pairs()]
    for batch_size in (1, 3, 16):
        got = harness.Adapter(ours, "bytes", batch_size)._loglikelihood_tokens(
            pairs(), disable_tqdm=True
        )
        for (ll, greedy), (ll_want, greedy_want) in zip(got, want):
            assert ll == pytest.approx(ll_want, abs=1e-4) and greedy == greedy_want
    reference = HFLM(
        pretrained=theirs, tokenizer=their_tokenizer(), batch_size=2, device="cpu", max_length=32
    )
    for (ll, _), (ll_theirs, _) in zip(
        got, reference._loglikelihood_tokens(pairs(), disable_tqdm=True)
    ):
        assert ll == pytest.approx(ll_theirs, abs=1e-4)
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    texts = [("A question ", "with an answer"), ("", "nothing before"), ("one", " more")]
    asked = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    mine = harness.Adapter(ours, "bytes").loglikelihood(asked, disable_tqdm=True)
    for (ll, greedy), (ll_theirs, greedy_theirs) in zip(
        mine, reference.loglikelihood(asked, disable_tqdm=True)
    ):
        assert ll == pytest.approx(ll_theirs, abs=1e-4) and greedy == greedy_theirs
    mine = harness.Adapter(ours, "bytes").loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(
        reference.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3
    )


def test_greedy_text_up_to_a_stop(both):
    from lm_eval.api.instance import Instance

    ours, _ = both
    tokenizer = load_tokenizer("bytes")
    whole = ours.generate(torch.tensor([tokenizer.encode_ordinary("Once")]), 20, temperature=0)[
        0, 4:
    ].tolist()
    text = tokenizer.decode(whole)
    stop = text[3]
    requests = [Instance("generate_until", {}, ("Once", {"until": stop, "max_gen_toks": 20}), 0)]
    want = text.split("<|endoftext|>")[0].split(stop)[0]
    assert harness.Adapter(ours, "bytes").generate_until(requests, True) == [want]
    # More new tokens than positions: the context is still read, and the window moves on.
    whole = ours.generate(torch.tensor([tokenizer.encode_ordinary("Once")]), 50, temperature=0)[
        0, 4:
    ].tolist()
    requests = [Instance("generate_until", {}, ("Once", {"until": None, "max_new_tokens": 50}), 0)]
    want = tokenizer.decode(whole).split("<|endoftext|>")[0]
    assert harness.Adapter(ours, "bytes").generate_until(requests, True) == [want]


def test_the_harness_runs_local_tasks_offline(tmp_path, tasks, root, monkeypatch, capsys):
    torch.manual_seed(0)
    model = wake(
        GPT(GPTConfig(3, 2, 16, 32, 257, "TMT", n_keys=6, top_k=3, d_latent=4, new=(1,)))
    ).eval()
    save_checkpoint(str(tmp_path / "a.pt"), model, tokenizer="bytes")
    flags = [
        "--tasks",
        "mine_choice,mine_rolling",
        "--include_path",
        str(tasks),
        "--json",
        "out.json",
    ]
    offline = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, str(root / "experiments" / "harness.py"), "a.pt"]
    run = subprocess.run(
        [*command, *flags], cwd=tmp_path, capture_output=True, text=True, env=offline
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())
    with torch.no_grad():
        scores = [
            [by_hand(model, q["question"], choice)[0] for choice in q["choices"]] for q in QUESTIONS
        ]
        right = [s.index(max(s)) == q["answer"] for s, q in zip(scores, QUESTIONS)]
    assert results["mine_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    tokens = [[256, *load_tokenizer("bytes").encode_ordinary(text)] for text in TEXTS]
    nll = sum(sum_nll(model, np.array(t))[0] for t in tokens)
    words = sum(len(text.split()) for text in TEXTS)
    assert results["mine_rolling"]["word_perplexity,none"] == pytest.approx(
        math.exp(nll / words), rel=1e-4
    )
    assert call(monkeypatch, "harness.py", tmp_path / "a.pt", "--tasks", "no_such_task") == 2
    assert "the harness has no no_such_task" in capsys.readouterr().err
