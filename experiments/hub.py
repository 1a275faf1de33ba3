# SPDX-License-Identifier: MIT
"""
MIDUS in models of the Hub: a Llama, Qwen2, Mistral, OLMo or GPT-2 of transformers, made deeper and
trained on. What comes out is a folder that transformers loads, and all that builds on it.

    pip install "transformers==5.24.0" accelerate
    python experiments/hub.py upscale HuggingFaceTB/SmolLM2-135M --n_new 5 --out deeper
    python experiments/hub.py train deeper --dataset wikitext103 --out trained
    lm_eval --model hf --model_args pretrained=trained,trust_remote_code=True --tasks wikitext

On two GPUs, and on two that share one large model:

    torchrun --nproc_per_node 2 experiments/hub.py train deeper ...
    accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --use_fsdp \\
        --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        experiments/hub.py train deeper ...

Both commands have a --help. The memory layer is in modeling_midus.py; methods and placements are
explained in upscale.py. In order: folders, a deeper stack, text, training, the commands. Shape
names: see hml.py.
"""

import argparse
import copy
import glob
import json
import os
import shutil
import sys

import numpy as np
import torch
from torch import Tensor, nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
from data import DATASETS, find_files, read_text
from eval import perplexity, sum_nll
from model import GPT, GPTConfig
from train import make_optimizer, schedule
from upscale import add_flags, given_options, overlap, upscale

# Without these there is --help, and no more.
try:
    import accelerate  # noqa: F401 (Trainer needs it)
    import transformers
    from huggingface_hub import ModelCard
    from safetensors import SafetensorError
    from safetensors.torch import load_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from modeling_midus import FAMILIES, MemoryLayer, decoder_layers, parts

    lacking = None
except ImportError as error:
    lacking = f'{error}; pip install "transformers==5.24.0" accelerate'


# ---- Folders of transformers ---------------------------------------------------------------------
def is_ours(folder: str) -> bool:
    """Whether this program has written a folder: the config says which layers are new."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return "new_layers" in json.load(file)


def check_out(out: str, overwrite: bool) -> None:
    """Raises ValueError if a model cannot be written to the folder out, or must not be."""
    parent = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(parent):
        raise ValueError(f"--out {out}: there is no folder {parent}")
    if os.path.exists(out) and not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or add --overwrite")
    if os.path.exists(out) and not is_ours(out):
        raise ValueError(f"{out} was not written by hub.py, so it stays; choose another --out")


def write_folder(out: str, model: nn.Module, weights: dict, tokenizer, card: str) -> None:
    """Writes all that from_pretrained(out) needs, and a model card.

    It is written under another name, and takes its own at the end: a folder called out is whole.
    """
    temporary = f"{out}.{os.getpid()}.tmp"
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as file:
        file.write(card)

    # The code of a memory layer travels with its weights.
    if hasattr(model.config, "midus"):
        shutil.copy(os.path.join(ROOT, "hml.py"), temporary)
        shutil.copy(os.path.join(ROOT, "experiments", "modeling_midus.py"), temporary)
    if os.path.exists(out):
        shutil.rmtree(out)
    os.rename(temporary, out)


def open_base(kind: type, base: str, **options) -> object:
    """kind.from_pretrained for a folder, a .gguf file or a name on the Hub.

    Raises ValueError if there is no such model.
    """
    name = base
    if base.endswith(".gguf"):
        name, options["gguf_file"] = os.path.split(os.path.abspath(base))
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        kinds = "a folder of transformers, a .gguf file or a name on the Hub"
        raise ValueError(f"{base} cannot be opened as {kinds}: {common.one_line(error)}") from error


def model_card(base: str, method: str, config) -> str:
    """README.md of a deeper model."""
    # The licence is that of the base. What lies on this machine has its card beside it, or none:
    # the Hub is not asked.
    name, card = base, base
    if os.path.exists(base):
        name = os.path.basename(os.path.normpath(base))
        folder = base if os.path.isdir(base) else os.path.dirname(base)
        card = os.path.join(folder, "README.md")
    licence = "unknown"
    if card == base or os.path.exists(card):
        licence = ModelCard.load(card).data.license or licence

    text = f"""---
library_name: transformers
license: {licence}
---
# {name}, deeper by {method}

- new layers, by their number in the stack, from 0: {config.new_layers}
"""
    if hasattr(config, "midus"):
        text += f"""- memory: {config.midus}
- The new layers are Head-wise Memory Layers (MIDUS, arXiv 2512.13751). Their code lies beside the
  weights, so loading takes `trust_remote_code=True`.
"""
    return text


# ---- A deeper stack ------------------------------------------------------------------------------
METHODS = ("midus", "hybrid", "llama-pro", "solar")  # what deepen() can do of upscale.py's


def plan_stack(config, method: str, options: dict) -> tuple[GPTConfig, list[int]]:
    """What upscale.py makes of a GPT of the same shape; and the layer that each is made from.

    It knows all defaults. Raises ValueError for what cannot be.
    """
    # On the meta device tensors have no numbers, so this costs nothing.
    if hasattr(config, "new_layers"):
        raise ValueError("this model was made deeper already; start from its base")
    n_layer, n_head = config.num_hidden_layers, config.num_attention_heads
    width = config.hidden_size
    with torch.device("meta"):
        gpt = GPT(GPTConfig(n_layer, n_head, width, block_size=1, vocab_size=1))
        plan = upscale(gpt, method, **options).config

    # What the heads find is added to x, side by side.
    if "M" in plan.blocks:
        head_dim = getattr(config, "head_dim", None) or width // n_head
        if n_head * head_dim != width:
            heads = f"{n_head} heads of {head_dim}"
            raise ValueError(f"{heads} are not as wide as the model, {width}")
        if config.model_type not in FAMILIES:
            known = f"no {config.model_type} yet, but {', '.join(FAMILIES)}"
            raise ValueError(f"modeling_midus.py has {known}; its first lines say how to add one")

    # Solar's stack is the base twice. Else a new layer is made from the one below it, so that every
    # layer's number in the base is its own less the new ones so far; from 0.
    if method == "solar":
        return plan, overlap(n_layer, len(plan.new))[0]
    return plan, [i - sum(j <= i for j in plan.new) for i in range(plan.n_layer)]


def silence(layer: nn.Module) -> None:
    """Zeroes the output projections of a layer: what it has copied adds nothing to the stream."""
    for name, parameter in layer.named_parameters():
        if any(output in name for output in ("o_proj", "down_proj", "c_proj")):
            nn.init.zeros_(parameter)  # GPT-2 has biases too


def deepen(model: nn.Module, method: str, plan: GPTConfig, sources: list[int]) -> None:
    """Makes a model deeper, in place; plan, sources: see plan_stack()."""
    config = model.config
    config.new_layers = list(plan.new)
    config.num_hidden_layers = plan.n_layer
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[source] for source in sources]

    # The name of the class goes into config.json; the class adds nothing but its __init__.
    has_memory = "M" in plan.blocks
    if has_memory:
        model.__class__ = FAMILIES[config.model_type]
        config.auto_map = {"AutoModelForCausalLM": f"modeling_midus.{type(model).__name__}"}
        kept = ("n_keys", "top_k", "d_latent", "query", "residual")
        config.midus = {name: getattr(plan, name) for name in kept}

    # New layers start as copies, and all but solar's add nothing.
    stack = decoder_layers(model)
    layers = []
    for i, source in enumerate(sources):
        layer = copy.deepcopy(stack[source]) if i in plan.new else stack[source]
        _, attention, _ = parts(layer)
        attention.layer_idx = i  # its place in the cache
        if i in plan.new and has_memory:
            layer = MemoryLayer(layer, config)
            layer.memory.product_keys.keys.mul_(plan.key_scale)
        if i in plan.new and (method == "llama-pro" or plan.residual):
            silence(layer)
        layers.append(layer)
    del stack[:]
    stack.extend(layers)


@torch.no_grad()
def make_deeper(args: argparse.Namespace) -> None:
    # What can be refused is refused before anything long begins.
    check_out(args.out, args.overwrite)
    config = open_base(AutoConfig, args.base)
    plan, sources = plan_stack(config, args.method, given_options(args))
    tokenizer = open_base(AutoTokenizer, args.base)
    if len(tokenizer) < 2:  # without files some families make an empty one
        raise ValueError(f"{args.base} has no tokenizer; copy the files of one into it")

    # The base, and what it says to a few tokens. A GGUF file's weights are plain numbers then.
    print(f"opening {args.base}", flush=True)
    model = open_base(AutoModelForCausalLM, args.base, dtype=torch.float32).eval()
    if args.base.endswith(".gguf"):
        model.hf_quantizer.remove_quantization_config(model)
    torch.manual_seed(args.seed)
    length = min(64, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (2, length))  # (B, T)
    said = model(input_ids=tokens, use_cache=False).logits  # (B, T, vocab)
    before = model.num_parameters()

    # The deeper model, and what it says.
    stored = config.dtype or torch.float32
    config = model.config
    deepen(model, args.method, plan, sources)
    gap = (model(input_ids=tokens, use_cache=False).logits - said).abs().max()
    print(f"stack  {' '.join(plan.blocks)}; new from 0: {config.new_layers}")
    print(f"base   {before:,} parameters")
    print(f"added  {model.num_parameters() - before:,} {getattr(config, 'midus', '')}")
    print(f"largest difference of its logits to the base's: {gap:g}")

    # In the dtype of the base.
    model.to(stored)
    card = model_card(args.base, args.method, config)
    write_folder(args.out, model, model.state_dict(), tokenizer, card)
    print(f"wrote {args.out}; train its new layers: python experiments/hub.py train {args.out}")


# ---- Text ----------------------------------------------------------------------------------------
def load_tokens(dataset: str, split: str, count: int, args: argparse.Namespace) -> np.ndarray:
    """The first `count` token ids (int64) of a split, or all if there are fewer."""
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    path, member = find_files(dataset, args.data_dir)[split]
    lines = read_text(path, member).splitlines(keepends=True)

    # A thousand lines at a time: for a whole text a tokenizer takes many times its size.
    pieces = []
    found = 0
    while lines and found < count:
        ids = tokenizer("".join(lines[:1000]), add_special_tokens=False, verbose=False)["input_ids"]
        del lines[:1000]
        pieces.append(np.array(ids, dtype=np.int64))
        found += len(ids)
    return np.concatenate(pieces)[:count]


def load_texts(args: argparse.Namespace) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sequences to train on (rows, T); and validation tokens of the new text, and of an old one."""
    tokens = load_tokens(args.dataset, "train", args.tokens, args)
    rows = len(tokens) // args.block_size
    if rows < args.batch_size:
        needed = args.batch_size * args.block_size
        raise ValueError(
            f"a step takes {needed} tokens; {args.dataset} and --tokens give {len(tokens)}"
        )
    texts = {}
    for name in filter(None, (args.dataset, args.old_dataset)):
        texts[name] = load_tokens(name, "valid", args.eval_tokens + 1, args)  # one is only read
    return tokens[: rows * args.block_size].reshape(rows, args.block_size), texts


# ---- Training ------------------------------------------------------------------------------------
class AsGPT(nn.Module):
    """A model of transformers, with what train.py and eval.py ask a GPT for."""

    def __init__(self, model: nn.Module, block_size: int):
        super().__init__()
        self.model = model
        self.wte = model.get_input_embeddings()
        self.config = argparse.Namespace(block_size=block_size, vocab_size=model.config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab)."""
        return self.model(input_ids=tokens, use_cache=False).logits


def open_folder(folder: str, block_size: int) -> nn.Module:
    """A model that `upscale` wrote, in fp32, with only its new layers trainable.

    For memory layers the code here is used, not the folder's. Raises ValueError for other folders.
    """
    if not is_ours(folder):
        raise ValueError(f"{folder} has no new layers; make some: hub.py upscale BASE --out DIR")
    config = AutoConfig.from_pretrained(folder)
    if block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size may be at most {config.max_position_embeddings} here")
    kind = FAMILIES[config.model_type] if hasattr(config, "midus") else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)

    # The base stays frozen, and out of the checkpoints: it lies in the folder.
    model.requires_grad_(False)
    layers = decoder_layers(model)
    for i in config.new_layers:
        layers[i].requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model._keys_to_ignore_on_save = set(model.state_dict()) - trained
    return model


def trainer_settings(args: argparse.Namespace, work: str):
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


def make_trainer(model: nn.Module, settings, rows: np.ndarray, args: argparse.Namespace):
    """Trainer with the optimizer and the schedule of train.py: banks have a rate of their own."""
    # Labels are the sequence itself: transformers shifts them.
    sequences = [{"input_ids": row, "labels": row} for row in rows]
    collate = transformers.default_data_collator
    trainer = transformers.Trainer(model, settings, train_dataset=sequences, data_collator=collate)

    # FSDP's first form makes new parameters of the old ones, in which a bank is no bank any more.
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError("FSDP works in its second form only: add --fsdp_version 2")

    # Set here, since Trainer takes no optimizer as an argument where there is FSDP.
    steps = settings.max_steps
    as_gpt = AsGPT(model, args.block_size)
    trainer.optimizer = make_optimizer(as_gpt, args.lr, args.memory_lr, weight_decay=0.1)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: schedule(step, steps // 20, steps)
    )
    return trainer


def measure(model: nn.Module, texts: dict[str, np.ndarray], args: argparse.Namespace) -> dict:
    """Token perplexity of each text. All processes compute the same, and the first one says it."""
    found = {}
    model.eval()
    for name, tokens in texts.items():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            nll, count = sum_nll(AsGPT(model, args.block_size), tokens)
        found[name] = perplexity(nll, count)
        print(f"perplexity of {count:,} tokens of {name}: {found[name]:.2f}", flush=True)
    return found


def train(args: argparse.Namespace) -> None:
    # What can be refused is refused before anything long begins.
    work = f"{args.out}.checkpoints"
    check_out(args.out, args.overwrite or args.resume)
    if args.resume and not os.path.exists(work):
        raise ValueError(f"there is no {work} to go on with; leave out --resume")
    if os.path.exists(work) and not args.resume and not args.overwrite:
        raise ValueError(f"{work} is a run that was cut off; add --resume, or --overwrite")
    settings = trainer_settings(args, work)
    model = open_folder(args.folder, args.block_size)
    torch.set_num_threads(args.threads or common.threads_for(model.config.hidden_size))

    # Of several processes the first downloads, speaks, and writes.
    is_first = settings.process_index == 0
    if not is_first:
        sys.stdout = open(os.devnull, "w")
    with settings.main_process_first():
        rows, texts = load_texts(args)
        if is_first and not args.resume:
            shutil.rmtree(work, ignore_errors=True)

    # Say what is going to happen.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = f"{args.batch_size} x {args.block_size} tokens"
    print(f"training {trained:,} of {model.num_parameters():,} parameters on {settings.device}")
    print(f"{settings.max_steps} steps of {batch}; --resume goes on from {work}", flush=True)

    # Train, or go on from the newest checkpoint that is whole: Trainer writes its state last.
    model.to(settings.device)
    before = measure(model, texts, args)
    trainer = make_trainer(model, settings, rows, args)
    states = glob.glob(os.path.join(work, "checkpoint-*", "trainer_state.json"))
    whole = {int(path.split("-")[-1]): path for path in map(os.path.dirname, states)}
    last = max(whole, default=0)
    if last == settings.max_steps:  # Trainer would make one more
        load_model(model, os.path.join(whole[last], "model.safetensors"), strict=False)
    else:
        print(f"going on from step {last}", flush=True)
        trainer.train(resume_from_checkpoint=whole.get(last))
    after = measure(model, texts, args)

    # The whole model is written, base included.
    story = [f"- trained for {settings.max_steps} steps of {batch} of {args.dataset}\n"]
    for name in texts:
        change = f"{before[name]:.2f} before, {after[name]:.2f} after"
        story.append(f"- perplexity of {name}: {change}\n")
    model._keys_to_ignore_on_save = set()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first:
        with open(os.path.join(args.folder, "README.md"), encoding="utf-8") as file:
            card = file.read() + "".join(story)
        tokenizer = AutoTokenizer.from_pretrained(args.folder)
        write_folder(args.out, model, weights, tokenizer, card)
        shutil.rmtree(work)
    print(*story, f"wrote {args.out}", sep="")


# ---- The commands --------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = common.Parser(__doc__.strip(), formatter_class=shape)
    commands = parser.add_subparsers(required=True, metavar="upscale or train")

    make = commands.add_parser("upscale", description="Makes a model deeper, untrained.")
    make.set_defaults(command=make_deeper)
    add = make.add_argument
    add("base", help="a name on the Hub, a folder of transformers, or a .gguf file")
    add("--method", choices=METHODS, default="midus", help="(default midus)")
    add("--seed", type=int, default=0, help="of keys and projections (default 0)")
    add("--out", type=os.path.normpath, default="deeper", help="a new folder (default ./deeper)")
    add("--overwrite", action="store_true", help="replace --out, if hub.py has written it")
    add_flags(make)

    teach = commands.add_parser("train", description="Trains the new layers of such a model.")
    teach.set_defaults(command=train)
    add = teach.add_argument
    whole = common.whole_number
    real = common.real_number
    add("folder", help="what `upscale` has written")
    texts = f"{', '.join(DATASETS)}, or a folder with train.txt, valid.txt and test.txt"
    add("--dataset", default="wikitext2", help=f"new text (default wikitext2): {texts}")
    add("--old_dataset", help="text of the base's: how much is forgotten?")
    add("--data_dir", default="data", help="of downloads (default ./data)")
    add("--tokens", type=whole, default=10**6, help="of the new text (default 1e6)")
    add("--block_size", type=whole, default=512, help="of a sequence (default 512)")
    add("--batch_size", type=whole, default=16, help="sequences a step (default 16)")
    add("--grad_accum", type=whole, default=1, help="parts of a step (default 1)")
    add("--lr", type=real, default=3e-3, help="peak rate (default 3e-3)")
    add("--memory_lr", type=real, default=1e-1, help="of banks (default 1e-1)")
    add("--eval_tokens", type=whole, default=20000, help="measured (default 20000)")
    add("--save_every", type=whole, default=100, help="steps (default 100)")
    add("--bf16", action="store_true", help="compute in bf16: faster on newer GPUs and CPUs")
    add("--threads", type=whole, help="of the CPU (default: 1 up to a width of 128)")
    add("--seed", type=int, default=0, help="of the data's order (default 0)")
    add("--out", type=os.path.normpath, default="trained", help="a new folder (default ./trained)")
    add("--resume", action="store_true", help="go on with the same command that was cut off")
    add("--overwrite", action="store_true", help="replace --out, if hub.py has written it")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if lacking:
        raise ValueError(lacking)
    args.command(args)


if __name__ == "__main__":
    common.run_command(main)
