# SPDX-License-Identifier: MIT
"""
MIDUS in models of the Hub: a Llama, Qwen2, Mistral, OLMo or GPT-2 of transformers, made deeper and
trained on. What comes out is a folder that transformers loads, and all that builds on it.

    pip install "transformers==5.24.0" accelerate
    python experiments/hub.py upscale HuggingFaceTB/SmolLM2-135M --n_new 5 --out deeper
    python experiments/hub.py train deeper --dataset wikitext103 --out trained
    lm_eval --model hf --model_args pretrained=trained,trust_remote_code=True --tasks wikitext

On several GPUs: torchrun --nproc_per_node 2 experiments/hub.py train ...; where the model does not
fit one of them: accelerate launch --use_fsdp ... (not tried). Each command has a --help. The memory
layer is in modeling_midus.py; methods and placements are explained in upscale.py.
"""

import argparse
import copy
import glob
import hashlib
import json
import os
import shutil
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
from data import DATASETS, find_source, read_text
from train import schedule
from upscale import (
    METHODS,
    PLACEMENT,
    add_flags,
    given_options,
    interleave,
    memory_sizes,
    overlap,
    place,
)

try:
    import accelerate  # noqa: F401 (Trainer needs it)
    import transformers
    from huggingface_hub import ModelCard
    from safetensors import SafetensorError
    from safetensors.torch import load_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
except ImportError as error:
    sys.exit(f'error: {error}; pip install "transformers==5.24.0" accelerate')

from modeling_midus import FAMILIES, MemoryLayer, decoder_layers, parts


# ---- Folders of transformers ---------------------------------------------------------------------
def check_out(out: str, overwrite: bool) -> None:
    """Raises ValueError if a model cannot be written to the folder out, or must not be."""
    parent = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out}: there is no folder {parent} that can be written to")
    if os.path.exists(out) and not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or add --overwrite")
    if os.path.exists(out) and not os.path.isfile(os.path.join(out, "config.json")):
        raise ValueError(f"{out} is no model's folder, so it stays; choose another --out")


def write_folder(out: str, model: PreTrainedModel, weights: dict, tokenizer, card: str) -> None:
    """Writes all that from_pretrained(out) needs, and a model card.

    It is written under another name, and takes its own at the end: a folder called out is whole.
    """
    temporary = f"{out}.{os.getpid()}.tmp"
    model.save_pretrained(temporary, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as file:
        file.write(card)

    # The code of a memory layer travels with its weights.
    if hasattr(model.config, "midus"):
        shutil.copy(os.path.join(ROOT, "hml.py"), temporary)
        shutil.copy(os.path.join(ROOT, "experiments", "modeling_midus.py"), temporary)

    # What had the name before goes last.
    old = f"{out}.{os.getpid()}.old"
    if os.path.exists(out):
        os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def open_base(base: str) -> tuple[PreTrainedModel, object]:
    """The model called base, in fp32, and its tokenizer, or None: a folder, a .gguf, or on the Hub.

    config.dtype is what its weights were stored in. Raises ValueError if there is no such model.
    """
    name, where = base, {}
    if base.endswith(".gguf"):
        name, file = os.path.split(os.path.abspath(base))
        where = {"gguf_file": file}
    refusals = (OSError, ValueError, ImportError, SafetensorError)
    try:
        stored = AutoConfig.from_pretrained(name, **where).dtype
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **where)
    except refusals as error:
        kinds = "a folder of transformers, a .gguf file or a name on the Hub"
        raise ValueError(f"{base} cannot be opened as {kinds}: {common.one_line(error)}") from error
    model.config.dtype = stored or torch.float32

    # A GGUF file's weights are plain numbers now, and may be written as such.
    if where:
        model.hf_quantizer.remove_quantization_config(model)
    # Without files some families make an empty one.
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except refusals:
        tokenizer = None
    if tokenizer is None or len(tokenizer) < 2:
        print(f"{base} has no tokenizer; training will want one")
        return model, None
    return model, tokenizer


def licence_of(base: str) -> str:
    """The licence that the model card of a base names, or "unknown"."""
    folder = os.path.dirname(base) if base.endswith(".gguf") else base
    card = base if not os.path.exists(base) else os.path.join(folder, "README.md")
    try:
        return ModelCard.load(card).data.license or "unknown"
    except (OSError, ValueError):
        return "unknown"


def model_card(base: str, method: str, model: PreTrainedModel, added: int) -> str:
    """README.md of a deeper model; added: its new parameters."""
    licence = licence_of(base)
    name = os.path.basename(os.path.normpath(base)) if os.path.exists(base) else base
    new = model.config.new_layers
    card = f"""---
library_name: transformers
license: {licence}
---
# {name}, deeper by {method}

- base: {name}; its licence: {licence}
- {len(new)} new layers with {added:,} parameters; in the stack, counted from 0: {new}
"""
    if method == "midus":
        card += f"""- memory: {model.config.midus}
- The new layers are Head-wise Memory Layers (MIDUS, arXiv 2512.13751). Their code lies beside the
  weights, so loading takes `trust_remote_code=True`.
"""
    return card


# ---- A deeper stack ------------------------------------------------------------------------------
def new_stack(method: str, n_layer: int, **placement) -> tuple[list[int], list[int]]:
    """Which layer of the base each layer of the new stack is made from, and which are new; from 0.

    placement: every, positions, n_new. Raises ValueError for what cannot be.
    """
    if method == "solar":
        return overlap(n_layer, **placement)
    return interleave(n_layer, place(n_layer, method == "midus", **placement))


def output_projections(layer: nn.Module) -> list[nn.Module]:
    """Attention's and the feed-forward part's; silence both, and a layer passes its input on.

    Raises ValueError if there are not just these two.
    """
    _, attention, output = parts(layer)
    mlp = getattr(layer, "mlp", None)
    for name in ("down_proj", "c_proj"):
        if hasattr(mlp, name):
            return [getattr(attention, output), getattr(mlp, name)]
    raise ValueError(f"{type(layer).__name__} has no single mlp whose output one could silence")


def refuse_misfit(model: PreTrainedModel, method: str) -> None:
    """Raises ValueError if the layers of a base cannot be what the method needs."""
    config = model.config
    if hasattr(config, "new_layers"):
        raise ValueError("this model was made deeper already; start from its base")
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1:
        raise ValueError(f"its layers keep caches of several kinds, {' and '.join(kinds)}")

    layer = decoder_layers(model)[0]
    parts(layer)
    if method == "llama-pro":
        output_projections(layer)
    if method != "midus":
        return

    # What the heads find is added to x, side by side.
    n_head = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n_head
    if n_head * width != config.hidden_size:
        heads = f"{n_head} heads of {width}"
        raise ValueError(f"{heads} are not as wide as the model, {config.hidden_size}")
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"modeling_midus.py has no class for {config.model_type} yet, but for {known}; its "
            "first lines say how to add one"
        )


def deepen(model: PreTrainedModel, method: str, sources: list, new: list, memory: dict) -> None:
    """Makes a model deeper, in place. sources, new: see new_stack(). memory: see MemoryLayer."""
    config = model.config
    config.new_layers = new
    config.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[source] for source in sources]

    # The name of the class goes into config.json; the class adds nothing but its __init__.
    if method == "midus":
        model.__class__ = FAMILIES[config.model_type]
        config.auto_map = {"AutoModelForCausalLM": f"modeling_midus.{type(model).__name__}"}
        config.midus = memory

    # New layers start as copies, and all but solar's are silent.
    stack = decoder_layers(model)
    layers = []
    for i, source in enumerate(sources):
        layer = copy.deepcopy(stack[source]) if i in new else stack[source]
        _, attention, _ = parts(layer)
        attention.layer_idx = i  # its place in the cache
        if i in new and method == "midus":
            layer = MemoryLayer(layer, config)
        if i in new and method == "llama-pro":
            for projection in output_projections(layer):
                for parameter in projection.parameters():  # GPT-2 has biases too
                    nn.init.zeros_(parameter)
        layers.append(layer)
    del stack[:]
    stack.extend(layers)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits (B, T, vocab) on tokens (B, T), by autocast to a dtype."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return model(input_ids=tokens, use_cache=False).logits


def upscale_flags() -> argparse.ArgumentParser:
    parser = common.Parser("Makes a model of transformers deeper, without training it.")
    add = parser.add_argument
    add("base", help="a name on the Hub, a folder of transformers, or a .gguf file")
    add("--method", choices=METHODS, default="midus", help="(default midus)")
    add("--seed", type=common.seed_number, default=0, help="of keys and projections (default 0)")
    add("--out", type=os.path.normpath, default="deeper", help="a new folder (default ./deeper)")
    add("--overwrite", action="store_true", help="replace the model in --out")
    add_flags(parser)
    return parser


def upscale(args: argparse.Namespace) -> None:
    check_out(args.out, args.overwrite)
    options = given_options(args)
    useless = [f"--{name}" for name in options if name not in METHODS[args.method].options]
    if useless:
        raise ValueError(f"{args.method} takes no {', '.join(useless)}")
    placement = {name: options.pop(name) for name in PLACEMENT if name in options}

    # The base, and what it says to a few tokens.
    print(f"opening {args.base}", flush=True)
    model, tokenizer = open_base(args.base)
    config = model.eval().config
    refuse_misfit(model, args.method)
    sources, new = new_stack(args.method, config.num_hidden_layers, **placement)
    torch.manual_seed(args.seed)
    length = min(64, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (2, length))  # (B, T)
    dtypes = (torch.float32, torch.bfloat16)
    said = [logits_of(model, tokens, dtype) for dtype in dtypes]
    before = model.num_parameters()

    # The deeper model, and what it says. Midus and llama-pro print 0, solar does not.
    memory = {"query": "head", **memory_sizes(config.hidden_size), **options}
    deepen(model, args.method, sources, new, memory)
    added = model.num_parameters() - before
    mark = "M" if args.method == "midus" else "C"
    print("stack ", *[mark if i in new else "T" for i in range(len(sources))])
    print(f"base   {before:,} parameters")
    print(f"added  {added:,} in {len(new)} new layers, {memory if mark == 'M' else 'copies'}")
    for dtype, logits in zip(dtypes, said):
        gap = (logits_of(model, tokens, dtype) - logits).abs().max().item()
        print(f"largest difference of logits to the base, {dtype}: {gap:g}")

    # In the dtype of the base.
    model.to(config.dtype)
    card = model_card(args.base, args.method, model, added)
    write_folder(args.out, model, model.state_dict(), tokenizer, card)
    print(f"wrote {args.out}; train its new layers: python experiments/hub.py train {args.out}")


# ---- Text ----------------------------------------------------------------------------------------
def load_tokens(dataset: str, split: str, data_dir: str, tokenizer) -> np.ndarray:
    """A split as token ids (int64); they are made once, and kept in data_dir."""
    # The name of the cache holds a hash of all that shapes the tokens, so it is never stale.
    path, member = find_source(dataset, split, data_dir)
    everything = repr((common.file_sha256(path), member, tokenizer.backend_tokenizer.to_str()))
    identity = hashlib.sha256(everything.encode()).hexdigest()[:16]
    cache = os.path.join(data_dir, f"{dataset}-{split}-{identity}.npy")

    # A thousand lines at a time: for a whole text the tokenizer takes many times its size.
    if not os.path.exists(cache):
        lines = read_text(path, member).splitlines(keepends=True)
        pieces = []
        for first in tqdm(range(0, len(lines), 1000), desc=f"tokenizing {dataset} {split}"):
            piece = "".join(lines[first : first + 1000])
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(np.array(ids, dtype=np.int64))
        with common.written_whole(cache) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(pieces))
    return np.asarray(np.load(cache, mmap_mode="r"))


@torch.no_grad()
def sum_nll(model: nn.Module, tokens: np.ndarray, block_size: int) -> tuple[float, int]:
    """Summed negative log-likelihood, in nats, of every token after the first; and their number.

    Windows of block_size tokens without overlap; the last is moved back to end with the text, and
    scores what no earlier one has. lm-eval reads a document so, after one token in front.
    """
    device = next(model.parameters()).device
    count = len(tokens) - 1
    total = 0.0
    for start in tqdm(range(0, count, block_size), desc="evaluating", leave=False, disable=None):
        end = min(start + block_size, count)
        first = max(0, end - block_size)
        window = torch.tensor(tokens[first : end + 1], device=device)[None]  # (1, T + 1)
        logits = model(input_ids=window[:, :-1], use_cache=False).logits[0].float()  # (T, vocab)
        nll = F.cross_entropy(logits, window[0, 1:], reduction="none")  # (T,)
        total += nll[start - first :].double().sum().item()
    return total, count


# ---- Training ------------------------------------------------------------------------------------
class BankTrainer(transformers.Trainer):
    """Trainer with the optimizer and the schedule of train.py: banks have their own memory_lr.

    Both are made in a method, since FSDP takes none that are made before.
    """

    memory_lr: float

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # An entry of a bank is read seldom: it has few steps to learn in, and decay would shrink it
        # in all others. Vectors do not decay either.
        named = dict((model or self.model).named_parameters())
        named = {name: p for name, p in named.items() if p.requires_grad}
        banks = [named.pop(name) for name in list(named) if name.endswith("hive.bank")]
        vectors = [p for p in named.values() if p.dim() < 2]
        matrices = [p for p in named.values() if p.dim() >= 2]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
            {"params": banks, "weight_decay": 0.0, "lr": self.memory_lr},
        ]
        lr = self.args.learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

        # A rise over a twentieth of the steps, then half a cosine.
        steps = self.args.max_steps
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, steps // 20, steps)
        )
        return self.optimizer


def open_folder(folder: str, block_size: int) -> tuple[PreTrainedModel, object]:
    """A model that `upscale` wrote, in fp32, with only its new layers trainable; its tokenizer.

    For memory layers the code here is used, not the folder's. Raises ValueError for other folders.
    """
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder} is no model's folder; make one: hub.py upscale BASE --out DIR")
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "new_layers"):
        raise ValueError(f"{folder} has no new layers; hub.py upscale makes a model that has")
    if block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size may be at most {config.max_position_embeddings} here")
    if not glob.glob(os.path.join(folder, "tokenizer*")):
        raise ValueError(f"{folder} has no tokenizer; copy the base's tokenizer files into it")
    kind = FAMILIES[config.model_type] if hasattr(config, "midus") else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)

    # The base stays frozen, and out of the checkpoints: it lies in the folder.
    model.requires_grad_(False)
    layers = decoder_layers(model)
    for i in config.new_layers:
        layers[i].requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model._keys_to_ignore_on_save = set(model.state_dict()) - trained
    return model, AutoTokenizer.from_pretrained(folder)


def last_checkpoint(work: str) -> str | None:
    """The newest whole checkpoint in a folder; Trainer writes trainer_state.json last."""
    steps = {}
    for path in glob.glob(os.path.join(work, "checkpoint-*", "trainer_state.json")):
        try:
            with open(path) as file:
                steps[json.load(file)["global_step"]] = os.path.dirname(path)
        except ValueError:  # the writer was killed
            continue
    return steps[max(steps)] if steps else None


def train_flags() -> argparse.ArgumentParser:
    parser = common.Parser("Trains the new layers of a model that `upscale` has written.")
    add = parser.add_argument
    add("folder", help="what `upscale` has written")
    add("--dataset", choices=DATASETS, default="wikitext2", help="new text (default wikitext2)")
    add("--data_dir", type=common.data_folder, default="data", help="its folder (default ./data)")
    add("--old_dataset", choices=DATASETS, help="text of the base's: how much is forgotten?")
    add("--old_data_dir", type=common.data_folder, help="its folder (default: --data_dir)")
    add("--tokens", type=common.whole_number, default=10**6, help="to train on (default 1e6)")
    add("--block_size", type=common.whole_number, default=512, help="of a sequence (default 512)")
    add("--batch_size", type=common.whole_number, default=16, help="sequences a step (default 16)")
    add("--grad_accum", type=common.whole_number, default=1, help="parts of a step (default 1)")
    add("--lr", type=common.real_number, default=3e-3, help="peak rate (default 3e-3)")
    add("--memory_lr", type=common.real_number, default=1e-1, help="of banks (default 1e-1)")
    add("--eval_tokens", type=common.whole_number, default=20000, help="(default 20000)")
    add("--save_every", type=common.whole_number, default=100, help="steps (default 100)")
    add("--bf16", action="store_true", help="compute in bf16: faster on newer GPUs and CPUs")
    add("--seed", type=common.seed_number, default=0, help="of the data's order (default 0)")
    add("--out", type=os.path.normpath, default="trained", help="a new folder (default ./trained)")
    add("--resume", action="store_true", help="go on with the same command that was cut off")
    add("--overwrite", action="store_true", help="replace the model in --out, and begin anew")
    return parser


def check_run(args: argparse.Namespace, work: str) -> None:
    """Raises ValueError where --resume, --overwrite and the disk do not fit together."""
    check_out(args.out, args.overwrite or args.resume)
    if args.resume and not os.path.exists(work):
        raise ValueError(f"there is no {work} to go on with; leave out --resume")
    if os.path.exists(work) and not args.resume and not args.overwrite:
        raise ValueError(f"{work} is a run that was cut off; add --resume, or --overwrite")


def trainer_settings(args: argparse.Namespace, work: str) -> transformers.TrainingArguments:
    """The flags in Trainer's words. Here the processes of torchrun meet."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (processes * args.grad_accum):
        parts = f"{processes} processes x {args.grad_accum} parts"
        raise ValueError(f"--batch_size {args.batch_size} cannot be cut in {parts}")
    steps = max(1, args.tokens // (args.batch_size * args.block_size))
    return transformers.TrainingArguments(
        output_dir=work,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size // (processes * args.grad_accum),
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.lr,
        logging_steps=max(1, steps // 10),
        save_steps=args.save_every,
        save_total_limit=1,
        seed=args.seed,
        data_seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
    )


def load_texts(args: argparse.Namespace, tokenizer) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sequences to train on (rows, T), and validation tokens by name: new text, and old if any."""
    tokens = load_tokens(args.dataset, "train", args.data_dir, tokenizer)
    rows = len(tokens) // args.block_size
    if rows < args.batch_size:
        needed = args.batch_size * args.block_size
        raise ValueError(f"{args.dataset} has {len(tokens)} tokens; one step takes {needed}")
    held_out = {args.dataset: load_tokens(args.dataset, "valid", args.data_dir, tokenizer)}
    if args.old_dataset:
        old_dir = args.old_data_dir or args.data_dir
        old = load_tokens(args.old_dataset, "valid", old_dir, tokenizer)
        held_out[f"{args.old_dataset} (old)"] = old
    most = args.eval_tokens + 1  # the first is only read
    held_out = {name: tokens[:most] for name, tokens in held_out.items()}
    return tokens[: rows * args.block_size].reshape(rows, args.block_size), held_out


def train(args: argparse.Namespace) -> None:
    # What can be refused is refused before anything long begins.
    work = f"{args.out}.checkpoints"
    check_run(args, work)
    settings = trainer_settings(args, work)
    model, tokenizer = open_folder(args.folder, args.block_size)
    with open(os.path.join(args.folder, "README.md"), encoding="utf-8") as file:
        card = file.read()

    # Of several processes the first makes the tokens, speaks, and writes.
    is_first = settings.process_index == 0
    if not is_first:
        sys.stdout = open(os.devnull, "w")
    with settings.main_process_first():
        rows, held_out = load_texts(args, tokenizer)
        if is_first and not args.resume:
            shutil.rmtree(work, ignore_errors=True)
            os.mkdir(work)

    # Say what is going to happen.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"training {trained:,} of {model.num_parameters():,} parameters on {settings.device}: "
        f"{settings.max_steps} steps of {args.batch_size} x {args.block_size} tokens of "
        f"{args.dataset}; checkpoints in {work}",
        flush=True,
    )

    def measure() -> dict[str, float]:
        """Perplexity by held-out text. All processes measure the same; the first one says it."""
        found = {}
        model.eval()
        for name, tokens in held_out.items():
            with torch.autocast(settings.device.type, torch.bfloat16, enabled=args.bf16):
                nll, count = sum_nll(model, tokens, args.block_size)
            found[name] = float(np.exp(nll / count))
            print(f"perplexity of {count:,} tokens of {name}: {found[name]:.2f}", flush=True)
        return found

    # Train. Labels are the sequence itself: transformers shifts them.
    model.to(settings.device)
    before = measure()
    sequences = [{"input_ids": row, "labels": row} for row in rows]
    collate = transformers.default_data_collator
    trainer = BankTrainer(model, settings, train_dataset=sequences, data_collator=collate)
    trainer.memory_lr = args.memory_lr
    checkpoint = last_checkpoint(work) if args.resume else None
    if args.resume:
        print(f"going on from {checkpoint or 'the start: no checkpoint was whole'}", flush=True)
    try:
        if checkpoint and checkpoint.endswith(f"-{settings.max_steps}"):
            # All steps are done; Trainer would make one more.
            load_model(model, os.path.join(checkpoint, "model.safetensors"), strict=False)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command with --resume goes on") from None
    after = measure()
    if not np.isfinite(after[args.dataset]):
        raise FloatingPointError("the model has diverged; try a lower --lr or --memory_lr")

    # The whole model is written, base included.
    batch = f"{args.batch_size} x {args.block_size} tokens"
    story = [f"trained for {settings.max_steps} steps of {batch} of {args.dataset}"]
    for name in held_out:
        story.append(f"perplexity of {name}: {before[name]:.2f} before, {after[name]:.2f} after")
    model._keys_to_ignore_on_save = set()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first:
        card += "".join(f"- {line}\n" for line in story)
        write_folder(args.out, model, weights, tokenizer, card)
        shutil.rmtree(work)
    print(*story, sep="\n")
    print(
        f"wrote {args.out}; try it on a task: lm_eval --model hf --model_args "
        f"pretrained={args.out},trust_remote_code=True --tasks arc_easy"
    )


# ---- The command ---------------------------------------------------------------------------------
def main() -> None:
    commands = {"upscale": (upscale_flags, upscale), "train": (train_flags, train)}
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if words[0] not in commands:
        raise ValueError(f"the first word is upscale or train, not {words[0]}")
    flags, command = commands[words[0]]
    parser = flags()
    parser.prog = f"hub.py {words[0]}"
    command(parser.parse_args(words[1:]))


if __name__ == "__main__":
    common.run_command(main)
