"""
What in a memory block matters: variants of it, made of the real parts. Each takes a model that
upscale() made with midus, changes its memory blocks in place, and says in one line what differs.
hml.py stays the method.

A variant starts as exactly the base too, except where it says otherwise. Shape names: see hml.py.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from hml import HIVE, ProductKeys, pool
from model import GPT, MLP, Attention, GPTConfig, MemoryBlock
from upscale import assemble


# ---- Other paths through the block ---------------------------------------------------------------
class OtherPath(MemoryBlock):
    """x + P(HML(a)) with a = heads(LN(x)); by flags: + a beside the memory (residual), LN(x) added
    to a before it (add_input), P a projection (C, C) without bias instead of the identity (proj).
    """

    def __init__(
        self, config: GPTConfig, residual: bool = False, add_input: bool = False, proj: bool = False
    ):
        super().__init__(config)
        self.residual, self.add_input = residual, add_input
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False) if proj else nn.Identity()

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        normed = self.ln_1(x)
        heads = self.attn(normed, cache)  # (B, T, H, d_h)
        if self.add_input:
            heads = heads + normed.view_as(heads)  # (B, T, C) -> (B, T, H, d_h)
        out = self.c_proj(self.memory(heads))  # (B, T, C)
        return x + out + heads.flatten(2) if self.residual else x + out


def other_path(model: GPT, copied: bool = False, **flags) -> None:
    """Puts OtherPath in the place of every memory block; copied.

    P starts as the c_proj of the block below.
    """
    for i in model.config.new:
        block = OtherPath(model.config, **flags)
        block.load_state_dict(model.h[i].state_dict(), strict=False)
        if copied:
            block.c_proj.weight.data.copy_(model.h[i - 1].attn.c_proj.weight)
        model.h[i] = block


def residual(model: GPT) -> None:
    """A residual between attention and memory, which the paper reports to hurt.

    Not the base at start.
    """
    other_path(model, residual=True)


def add_input(model: GPT) -> None:
    """LN(x) is added to the head outputs, so that queries know the current token itself."""
    other_path(model, add_input=True)


def proj_copied(model: GPT) -> None:
    """An output projection after HML, started as that of the block below.

    Heads write where that block's heads do.
    """
    other_path(model, copied=True, proj=True)


def proj_new(model: GPT) -> None:
    """An output projection after HML, started at random."""
    other_path(model, proj=True)


def add_input_proj(model: GPT) -> None:
    """Both cures: LN(x) added to the head outputs, and the copied output projection."""
    other_path(model, copied=True, add_input=True, proj=True)


# ---- No memory: what the same head outputs can bring without retrieval ---------------------------
class HeadsMap(nn.Module):
    """x + f(heads(LN(x))) for a dense f (B, T, C) -> (B, T, C) that starts at zero."""

    def __init__(self, block: MemoryBlock, map: nn.Module):
        super().__init__()
        self.ln_1, self.attn, self.map = block.ln_1, block.attn, map

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.map(
            self.attn(self.ln_1(x), cache).flatten(2)
        )  # (B, T, H, d_h) -> (B, T, C)


def linear(model: GPT) -> None:
    """A linear map of the head outputs instead of the memory: an attention block, in effect."""
    for i in model.config.new:
        map = nn.Linear(model.config.n_embd, model.config.n_embd)
        nn.init.zeros_(map.weight)
        nn.init.zeros_(map.bias)
        model.h[i] = HeadsMap(model.h[i], map)


def mlp(model: GPT) -> None:
    """GPT-2's MLP on the head outputs instead of the memory.

    A dense layer on what the memory has to go by.
    """
    for i in model.config.new:
        map = MLP(model.config)
        nn.init.zeros_(map.c_proj.weight)
        nn.init.zeros_(map.c_proj.bias)
        model.h[i] = HeadsMap(model.h[i], map)


# ---- The generic memory block that HML improves on -----------------------------------------------
class ProductKeyMemory(nn.Module):
    """One memory for the whole hidden state [Lample et al. 2019]: H queries projected from it,
    values of width C shared by all of them, and their sum. x (B, T, C) -> (B, T, C). Unlike there:
    as many heads as the model has, no batch normalisation of queries, and values that start at
    zero, so that the block starts as the identity.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.query = nn.Linear(C, C)
        self.product_keys = ProductKeys(H, C // H, config.n_keys, config.top_k, config.query_norm)
        self.hive = HIVE(
            H, 0, config.n_keys**2, C
        )  # its projections are empty: only the bank is used

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.product_keys.keys.size(1), -1))  # (B, T, H, d_h)
        weights, slots = self.product_keys(query)  # both (B, T, H, k)
        return pool(weights, slots, self.hive.bank).sum(dim=2)  # (B, T, H, C) -> (B, T, C)


class PKMBlock(nn.Module):
    """A transformer block with a product-key memory for its MLP: x = x + Attn(LN1(x)).

    X = x + PKM(LN2(x)).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.memory = nn.LayerNorm(config.n_embd), ProductKeyMemory(config)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.memory(self.ln_2(x))


def pkm(model: GPT) -> None:
    """One product-key memory per block on x + Attn(LN(x)); norms and attention copied from the
    block below, with its output projection zeroed as in llama-pro. It has a whole attention that
    midus lacks: see linear for its share.
    """
    for i in model.config.new:
        block = PKMBlock(model.config)
        block.load_state_dict(model.h[i - 1].state_dict(), strict=False)
        nn.init.zeros_(block.attn.c_proj.weight)
        nn.init.zeros_(block.attn.c_proj.bias)
        model.h[i] = block


# ---- Other values than HIVE's --------------------------------------------------------------------
class HeadTables(HIVE):
    """A value table (N, d_h) for each head, as one bank (H * N, d_h).

    Nothing is shared and nothing projected.
    """

    def __init__(self, n_head: int, head_dim: int, n_slots: int):
        super().__init__(n_head, 0, n_head * n_slots, head_dim)
        self.register_buffer("offsets", torch.arange(n_head)[:, None] * n_slots)  # (H, 1)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        return pool(weights, slots + self.offsets, self.bank)  # (B, T, H, d_h)


class OneProjection(HIVE):
    """HIVE with one W for all heads."""

    def __init__(self, n_slots: int, d_latent: int, head_dim: int):
        super().__init__(1, head_dim, n_slots, d_latent)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        return pool(weights, slots, self.bank) @ self.proj[0]  # (B, T, H, d_v) @ (d_v, d_h)


def head_tables(model: GPT) -> None:
    """Value tables per head instead of one bank seen through projections."""
    c = model.config
    for i in c.new:
        model.h[i].memory.hive = HeadTables(c.n_head, c.n_embd // c.n_head, c.n_keys**2)


def one_w(model: GPT) -> None:
    """One W shared by all heads."""
    c = model.config
    for i in c.new:
        model.h[i].memory.hive = OneProjection(c.n_keys**2, c.d_latent, c.n_embd // c.n_head)


def shared_bank(model: GPT) -> None:
    """One bank for all memory blocks."""
    first, *rest = (model.h[i].memory.hive for i in model.config.new)
    for hive in rest:
        hive.bank = first.bank


# ---- Other queries and scores --------------------------------------------------------------------
class Tempered(ProductKeys):
    """Product keys with a learned temperature per head: scores times exp(10 t), which starts as a
    given factor (10: else Adam could hardly move it in a few hundred steps).
    """

    def __init__(self, config: GPTConfig, factor: float):
        super().__init__(config.n_head, config.n_embd // config.n_head, config.n_keys, config.top_k)
        self.normed = config.query_norm
        self.temperature = nn.Parameter(torch.full((config.n_head,), factor).log() / 10)  # (H,)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        if self.normed:
            query = F.layer_norm(query.float(), query.shape[-1:])
        return super().forward(query * (10 * self.temperature[:, None]).exp())


class Centred(ProductKeys):
    """Product keys for queries (B, T, H, d_h) less their running mean, as batch normalisation keeps
    it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(
            config.n_head,
            config.n_embd // config.n_head,
            config.n_keys,
            config.top_k,
            config.query_norm,
        )
        self.register_buffer("mean", torch.zeros(config.n_head, config.n_embd // config.n_head))
        self.begun = False

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        if (
            self.training and torch.is_grad_enabled()
        ) or not self.begun:  # a step of training, or the very first batch
            now = query.detach().float().mean(dim=(0, 1))  # (H, d_h)
            self.mean.lerp_(now, 0.1 if self.begun else 1.0)
            self.begun = True
        return super().forward(query - self.mean)


def replace_keys(model: GPT, make: Callable[[GPTConfig], ProductKeys]) -> None:
    """Puts make(config), with the keys that were there, in the place of the product keys."""
    for i in model.config.new:
        keys = make(model.config)
        keys.load_state_dict(model.h[i].memory.product_keys.state_dict(), strict=False)
        model.h[i].memory.product_keys = keys


def temperature(model: GPT) -> None:
    """A learned temperature per head, started at 1."""
    replace_keys(model, lambda config: Tempered(config, 1.0))


def sharp(model: GPT) -> None:
    """The same, started at 8: one slot out of the k takes most of the weight."""
    replace_keys(model, lambda config: Tempered(config, 8.0))


def centred(model: GPT) -> None:
    """Queries less their running mean per head.

    A constant offset makes all tokens read the same slots.
    """
    replace_keys(model, Centred)


VARIANTS = {
    function.__name__.replace("_", "-"): function
    for function in (
        residual,
        add_input,
        proj_copied,
        proj_new,
        add_input_proj,
        linear,
        mlp,
        pkm,
        head_tables,
        one_w,
        shared_bank,
        temperature,
        sharp,
        centred,
    )
}


def stacked(base: GPT, n_new: int, **memory) -> GPT:
    """All memory blocks in one place, after the middle block of the base.

    The paper reports to interleave them.
    """
    middle = (base.config.n_layer + 1) // 2
    sources = [*range(middle), *[middle - 1] * n_new, *range(middle, base.config.n_layer)]
    return assemble(base, sources, list(range(middle, middle + n_new)), kind="M", **memory)
