"""
GPT-2, with two kinds of blocks: transformer blocks (T) and memory blocks (M).

    block T:  x = x + Attn(LN1(x));  x = x + MLP(LN2(x))    Attn ends in the output projection c_proj
    block M:  x = x + HML(heads(LN1(x)))                    heads: the same attention, without c_proj; see hml.py

A config's `blocks` string says what stands where: "TMTTMT" is T M T T M T from bottom to top. Parameters carry
GPT-2's names (wte, wpe, h.N.attn.c_attn, ...), so that published weights map by name. Shape names: see hml.py.
[report]: known from accounts of the paper, not from its text; [choice]: ours, where nothing is known.

In order: GPTConfig, attention, the two blocks, GPT (forward, generate, published weights), checkpoints, and what all
commands share (device, exit status). Not here: dropout, other positions than learned ones, other norms.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import download, file_sha256, kept, vocab_size, written_whole
from hml import HeadwiseMemory


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the shape of a model. Raises ValueError where it contradicts itself (GPT() for memory).

    n_layer counts all blocks; block_size is the longest sequence, in tokens; blocks has a letter T or M per block, ""
    for all T; n_keys, top_k, d_latent (n, k, d_v in hml.py) and query_norm shape the memory of M blocks; new lists
    the indices, from 0, of the blocks that up-scaling inserted.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    blocks: str = ""
    n_keys: int = 128
    top_k: int = 16
    d_latent: int = 64
    query_norm: bool = False
    new: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_layer > 1000:  # a damaged file may say a billion
            raise ValueError(f"n_layer must be at most 1000, not {self.n_layer}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head; got {self.n_embd} and {self.n_head}")
        object.__setattr__(self, "blocks", self.blocks or "T" * self.n_layer)
        if len(self.blocks) != self.n_layer or set(self.blocks) - set("TM"):
            raise ValueError(f"blocks must be {self.n_layer} letters T or M (one per layer), not {self.blocks!r}")
        if not all(0 <= i < self.n_layer for i in self.new):
            raise ValueError(f"new must list block indices from 0 to {self.n_layer - 1}, not {self.new}")


# ---- Blocks ----------------------------------------------------------------------------------------------------------
class Heads(nn.Module):
    """Multi-head causal attention that stops before the output projection: head outputs stay apart."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # Q, K and V in one

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, H, d_h). cache, if given, holds the keys and values so far and takes up the new."""
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, T, C) -> (B, T, H, d_h) -> (B, H, T, d_h)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if cache:
            k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)  # (B, H, T so far, d_h)
        if cache is not None:
            cache.update(k=k, v=v)
        # On CPUs always at least fp32: there the backward is up to three times slower in bf16.
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        # A single token may look at all before it: no mask. With a cache, one comes at a time after the first call.
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), is_causal=q.size(2) > 1)
        return y.to(q.dtype).transpose(1, 2)  # (B, H, T, d_h) -> (B, T, H, d_h)


class Attention(Heads):
    """GPT-2's attention: the heads, joined and projected. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        return self.c_proj(super().forward(x, cache).flatten(2))  # (B, T, H, d_h) -> (B, T, C)


class MLP(nn.Module):
    """GPT-2's feed-forward layer. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 was trained with the tanh form


class TransformerBlock(nn.Module):
    """GPT-2's block: x + attention, then x + MLP, each on a normalised input. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class MemoryBlock(nn.Module):
    """MIDUS's block, x + HML(heads(LN(x))): no output projection, no MLP, and no residual between attention and
    memory, which would weaken what retrieval has to learn [report]. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Heads(config)
        self.memory = HeadwiseMemory(
            n_head=config.n_head, head_dim=config.n_embd // config.n_head, n_keys=config.n_keys, top_k=config.top_k,
            d_latent=config.d_latent, query_norm=config.query_norm,
        )  # fmt: skip

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.memory(self.attn(self.ln_1(x), cache))


# ---- The model -------------------------------------------------------------------------------------------------------
GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
GPT2_SHA256 = {"gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"}  # None known for the rest
PRETRAINED = {  # OpenAI's four sizes: n_layer, n_head, n_embd, block_size, vocab_size
    "gpt2": GPTConfig(12, 12, 768, 1024, 50257),  # 124M parameters
    "gpt2-medium": GPTConfig(24, 16, 1024, 1024, 50257),  # 355M
    "gpt2-large": GPTConfig(36, 20, 1280, 1024, 50257),  # 774M
    "gpt2-xl": GPTConfig(48, 25, 1600, 1024, 50257),  # 1558M
}


class GPT(nn.Module):
    """A stack of blocks between token embeddings and the head that shares their weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList({"T": TransformerBlock, "M": MemoryBlock}[kind](config) for kind in config.blocks)
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2 starts at std 0.02, for its width of 768; kept in proportion to C^-0.5 [choice], narrow models
        # learn to attend several times sooner. c_proj, which writes to the residual stream, starts smaller.
        std = 0.02 * (768 / config.n_embd) ** 0.5
        for name, module in self.named_modules():  # hml.py has the memory's own
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj") else 1
                nn.init.normal_(module.weight, std=std * scale)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: list[dict] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens (B, T) -> logits (B, T, vocab) and None; with targets (B, T): None and the mean loss in nats.

        cache: a list with one empty dict per block, to be passed again with the one token (B, 1) that follows.
        Raises ValueError if the sequence is longer than block_size, or more than one token follows.
        """
        start = cache[0]["k"].size(2) if cache and cache[0] else 0
        end = start + tokens.size(1)
        if start and end > start + 1:
            raise ValueError("with a cache that is begun, pass one token at a time")
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's {self.config.block_size}")
        x = self.wte(tokens) + self.wpe(torch.arange(start, end, device=tokens.device))  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache is not None else None)  # (B, T, C)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, vocab)
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """Continues tokens (B, T >= 1) by max_new_tokens; returns both. temperature 0 always takes the likeliest.

        Keys and values are cached. When block_size is full the cache is dropped and the last half window read anew.
        """
        cache, used, feed = [{} for _ in self.h], 0, tokens  # used: tokens in the cache; feed: those to come
        for _ in range(max_new_tokens):
            if used + feed.size(1) > self.config.block_size:
                cache, used = [{} for _ in self.h], 0
                feed = tokens[:, -max(1, self.config.block_size // 2) :]
            logits = self(feed, cache=cache)[0][:, -1]  # (B, vocab)
            used += feed.size(1)
            if temperature < 1e-6:  # dividing by less would overflow
                feed = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                if top_k is not None:
                    worst = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                    logits = logits.masked_fill(logits < worst, float("-inf"))
                feed = torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1)  # (B, 1)
            tokens = torch.cat((tokens, feed), dim=1)
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_file: str, data_dir: str = "data") -> "GPT":
        """OpenAI's GPT-2 by name (see PRETRAINED; downloaded once into data_dir), or a file in its layout, heads 64
        wide; the prefix `transformer.`, lm_head and masks do not matter. ValueError for what does not fit, OSError if
        it cannot come."""
        path = name_or_file
        if path in PRETRAINED:
            path = kept(data_dir, f"{name_or_file}.bin")
            hint = f"A file of your own in that layout can be named instead of {name_or_file}, if it ends in .bin."
            download([GPT2_URL.format(name_or_file)], path, sha256=GPT2_SHA256.get(name_or_file), hint=hint)
        elif not os.path.isfile(path):
            raise ValueError(f"{path} is neither a file nor one of {', '.join(PRETRAINED)}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            extra = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # the head is tied; masks
            state = {n.removeprefix("transformer."): t for n, t in state.items() if not n.endswith(extra)}
            for name in state:  # OpenAI stores linear weights as (in, out)
                if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                    state[name] = state[name].T
            (vocab, n_embd), block_size = state["wte.weight"].shape, state["wpe.weight"].size(0)
            n_layer = len({name.split(".")[1] for name in state if name.startswith("h.")})
            if n_embd % 64:
                raise ValueError(f"its width, {n_embd}, is no multiple of GPT-2's head width, 64")
            model = cls(GPTConfig(n_layer, n_embd // 64, n_embd, block_size, vocab))
            model.load_state_dict(state)
        except Exception as error:  # torch.load and load_state_dict raise many kinds
            raise ValueError(f"{path} does not hold GPT-2 weights: {' '.join(str(error).split())[:200]}") from error
        return model


def count_parameters(model: GPT, blocks: tuple[int, ...] | None = None) -> dict[str, int]:
    """Parameters by part, zero parts left out; of the blocks at these indices only, if given."""
    parts = {  # the first fragment found in a parameter's name decides
        "product_keys": "keys", "hive.bank": "bank", "hive.proj": "projections", ".attn.": "attention",
        ".ln_1.": "attention", ".mlp.": "mlp", ".ln_2.": "mlp", "": "embeddings",  # and ln_f
    }  # fmt: skip
    counts = {}
    for name, parameter in model.named_parameters():
        if blocks is None or (name.startswith("h.") and int(name.split(".")[1]) in blocks):
            part = next(part for fragment, part in parts.items() if fragment in name)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# ---- Checkpoints: a torch file, then the sha256 of it: torch.load would not notice a flipped bit, nor the 32 bytes ---
def save_checkpoint(path: str, model: GPT, **info) -> None:
    """Writes the model's config and weights and `info` (plain types and tensors only) to path, whole or not at all."""
    with written_whole(path) as temporary:
        torch.save({"config": asdict(model.config), "model": model.state_dict(), **info}, temporary)
        digest = file_sha256(temporary)
        with open(temporary, "ab", buffering=0) as file:
            file.write(digest)
            os.fsync(file.fileno())


def load_checkpoint(path: str) -> tuple[GPT, dict]:
    """The model on the CPU, and everything else that save_checkpoint was given. Raises ValueError with a sentence."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint at {path}")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 32))
        tail = file.read()
    if size <= 32 or file_sha256(path, size - 32) != tail:
        raise ValueError(f"{path} is damaged or is no nanoMIDUS checkpoint: its sha256 does not match")
    try:
        info = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # shapes without memory, however large they say they are
            model = GPT(GPTConfig(**info.pop("config")))
        model.load_state_dict(info.pop("model"), assign=True)
    except Exception as error:  # whole, but something else: torch.load and GPT raise many kinds
        raise ValueError(f"{path} does not hold a nanoMIDUS model: {' '.join(str(error).split())[:200]}") from error
    return model, info


def open_model(name_or_file: str, data_dir: str = "data") -> tuple[GPT, dict]:
    """A GPT-2 by name or as a .bin file in OpenAI's layout, or one of our checkpoints; with what goes with it."""
    if name_or_file in PRETRAINED or name_or_file.endswith(".bin"):
        model, info = GPT.from_pretrained(name_or_file, data_dir), {"tokenizer": "gpt2"}
    else:
        model, info = load_checkpoint(name_or_file)
    if "tokenizer" not in info:
        raise ValueError(f"{name_or_file} does not say its tokenizer; it was not written by train.py or upscale.py")
    if vocab_size(info["tokenizer"]) > model.config.vocab_size:
        raise ValueError(f"{name_or_file} has fewer tokens than its tokenizer, {info['tokenizer']}")
    return model, info


# ---- What every command shares ---------------------------------------------------------------------------------------
def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is. Raises ValueError if the machine does not have it."""
    have = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        have = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *have]
    if name is not None and name not in have:
        raise ValueError(f"device {name} is not available here; choose from {', '.join(have)}")
    return torch.device(name or have[0])


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 (elsewhere it is emulated, slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def run_command(main: Callable[[], None]) -> None:
    """Runs a script: bad input ends it with one sentence and status 2, a fault with 1, an interrupt with 130."""
    try:
        main()
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        no_memory = any(words in str(error) for words in ("out of memory", "allocate memory", "enough memory"))
        if isinstance(error, RuntimeError) and not no_memory:  # torch's name for many faults
            raise
        print(f"error: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
