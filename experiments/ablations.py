"""
What in a memory block matters: variants of it, made of the real parts.

Each takes a model that upscale() made with midus, a GPT or a Llama, and puts its own blocks in the
place of the memory blocks. hml.py stays the method. All start as exactly the base.

    ladder         from midus's block to a product-key memory, one rung at a time
    pkm            the top of the ladder: one memory for the whole hidden state, without HIVE
    memory-alone   no attention: the memory is asked with the token itself
    linear         no memory: what attention alone brings
    feed-forward   no memory and no attention: what the other half of a copied block brings
    head-tables    a value table per head instead of one bank seen through projections
    one-w          one W for all heads
    shared-bank    one bank for all memory blocks

compare.py trains them: `--methods midus ladder:query=own:residual=1 pkm`. Shape names: see hml.py.
"""

import copy
import os
import sys

import torch
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from hml import HIVE, ProductKeys, pool
from model import GPT, GPTConfig, MemoryBlock, TransformerBlock

WITHOUT_MEMORY = ("linear", "feed-forward")
QUERIES = ("heads", "token", "block", "own")
WRITES = ("slice", "full", "plain")


# ---- The ladder ----------------------------------------------------------------------------------
class LadderBlock(nn.Module):
    """A memory block with every choice open: x + [P a] + memory(query). (B, T, C).

    a are the head outputs of attention on LN1(x), P is an output projection.

    query: what the memory is asked with, one slice per head
        heads   a itself, without P                   MIDUS as we read it (A)
        token   a + LN1(x), so that it knows the token
        block   x + P a, with P copied                the other reading (B)
        own     Q LN2(x + P a), with a new matrix Q   as product-key memories do
    residual: whether P a is added to x beside the memory; P then starts at zero, so that the block
        starts as the base.
    write: where a head's latent goes
        slice   through W_h (d_v, d_h) to the head's own slice of the stream          HIVE
        full    through W_h (d_v, C) to all of it; heads are summed
        plain   entries have the width C, and are added as they are, without a W_h
    """

    def __init__(
        self,
        midus: MemoryBlock,
        below: TransformerBlock,
        config: GPTConfig,
        query: str,
        residual: bool,
        write: str,
        centred: bool,
    ):
        """midus: the block that this one replaces; below: the block before it."""
        super().__init__()
        self.query = query
        self.residual = residual

        # Attention, with an output projection where something needs one.
        self.ln_1 = midus.ln_1
        self.attn = midus.attn
        if residual or query in ("block", "own"):
            self.c_proj = copy.deepcopy(below.attn.c_proj)
        if residual:
            for parameter in self.c_proj.parameters():
                nn.init.zeros_(parameter)
        if query == "own":
            self.ln_2 = copy.deepcopy(below.ln_2)
            self.own_query = nn.Linear(config.n_embd, config.n_embd)

        # The memory, with other parts in it.
        self.memory = midus.memory
        if write == "full":
            self.memory.hive = FullWidth(config)
        if write == "plain":
            self.memory.hive = PlainBank(config)
        if centred:
            self.memory.product_keys = Centred(config)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        normed = self.ln_1(x)
        heads = self.attn(normed, cache)  # (B, T, H, d_h)
        attended = x
        if hasattr(self, "c_proj"):
            attended = x + self.c_proj(heads.flatten(2))  # (B, T, H, d_h) -> (B, T, C)

        # What the memory is asked with.
        if self.query == "heads":
            query = heads
        elif self.query == "token":
            query = heads + normed.view_as(heads)  # (B, T, C) -> (B, T, H, d_h)
        elif self.query == "block":
            query = attended.view_as(heads)
        else:
            query = self.own_query(self.ln_2(attended)).view_as(heads)

        values = self.memory(query)  # (B, T, C)
        return (attended if self.residual else x) + values


class FullWidth(HIVE):
    """HIVE whose W_h lead to the full width, where the heads' values are summed."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_head, config.n_embd, config.n_keys**2, config.d_latent)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        z = pool(weights, slots, self.bank.float())  # (B, T, H, d_v)
        values = torch.einsum("bthv,hvc->btc", z.to(self.proj.dtype), self.proj)  # (B, T, C)
        return values.unsqueeze(2)  # (B, T, 1, C): the layer joins what it takes for heads


class PlainBank(HIVE):
    """Entries of width C, added as they are; there is nothing to project."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_head, 0, config.n_keys**2, config.n_embd)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        z = pool(weights, slots, self.bank)  # (B, T, H, C)
        return z.sum(dim=2, keepdim=True)  # (B, T, 1, C), as above


class Centred(ProductKeys):
    """Product keys for queries less their running mean, as batch normalisation would keep it.

    A constant offset makes all tokens read the same slots [Lample et al. 2019 normalise queries].
    """

    def __init__(self, config: GPTConfig):
        head_dim = config.n_embd // config.n_head
        sizes = (config.n_head, head_dim, config.n_keys, config.top_k)
        super().__init__(*sizes, config.query_norm)
        self.register_buffer("mean", torch.zeros(config.n_head, head_dim))
        self.register_buffer("begun", torch.tensor(False))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        # It follows the queries in steps of training, and is set by the very first batch.
        learning = self.training and torch.is_grad_enabled()
        if learning or not self.begun:
            now = query.detach().float().mean(dim=(0, 1))  # (H, d_h)
            self.mean.lerp_(now, 0.1 if self.begun else 1.0)
            self.begun.fill_(True)
        return super().forward(query - self.mean)


def ladder(
    model: GPT,
    query: str = "heads",
    residual: bool = False,
    write: str = "slice",
    centred: bool = False,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    shared: bool = False,
) -> None:
    """LadderBlock in the place of every memory block. Raises ValueError for an unknown choice.

    key_scale: the keys start so many times larger, which makes a read's weights less alike.
    value_scale: so does every W_h; a step of the bank then moves the stream that much farther.
    shared: one bank for all memory blocks.
    """
    if query not in QUERIES or write not in WRITES:
        choices = f"query one of {', '.join(QUERIES)}, write one of {', '.join(WRITES)}"
        raise ValueError(f"ladder takes {choices}; not {query}, {write}")
    for i in model.config.new:
        midus = model.h[i]
        below = model.h[i - 1]
        block = LadderBlock(midus, below, model.config, query, residual, write, centred)
        with torch.no_grad():
            block.memory.product_keys.keys.mul_(key_scale)
            block.memory.hive.proj.mul_(value_scale)
        model.h[i] = block
    if shared:
        shared_bank(model)


def pkm(model: GPT) -> None:
    """A transformer block with a product-key memory [Lample et al. 2019] for its MLP.

    Unlike there: as many heads as the model has, no batch normalisation of queries, and values that
    start at zero.
    """
    ladder(model, query="own", residual=True, write="plain")


# ---- One part alone ------------------------------------------------------------------------------
class MemoryAlone(nn.Module):
    """x + HML(Q LN2(x)), with a new matrix Q. (B, T, C)."""

    def __init__(self, midus: MemoryBlock, below: TransformerBlock, config: GPTConfig):
        super().__init__()
        self.ln_1 = copy.deepcopy(below.ln_2)  # a model knows its blocks' first norm by this name
        self.own_query = nn.Linear(config.n_embd, config.n_embd)
        self.memory = midus.memory

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        query = self.own_query(self.ln_1(x))  # (B, T, C)
        return x + self.memory(query.unflatten(-1, (self.memory.n_head, -1)))


def memory_alone(model: GPT) -> None:
    """A memory of the token, without attention."""
    for i in model.config.new:
        model.h[i] = MemoryAlone(model.h[i], model.h[i - 1], model.config)


class AttentionOnly(nn.Module):
    """x + P heads(LN(x)), with P at zero at the start. (B, T, C)."""

    def __init__(self, midus: MemoryBlock, config: GPTConfig):
        super().__init__()
        self.ln_1 = midus.ln_1
        self.attn = midus.attn
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        heads = self.attn(self.ln_1(x), cache)  # (B, T, H, d_h)
        return x + self.c_proj(heads.flatten(2))  # (B, T, H, d_h) -> (B, T, C)


def linear(model: GPT) -> None:
    """A linear map of the head outputs in the place of the memory: attention alone."""
    for i in model.config.new:
        model.h[i] = AttentionOnly(model.h[i], model.config)


class FeedForwardOnly(nn.Module):
    """x + MLP(LN2(x)), copied from the block below, with its last projection at zero. (B, T, C)."""

    def __init__(self, below: TransformerBlock):
        super().__init__()
        self.ln_1 = copy.deepcopy(below.ln_2)  # by this name, as above
        self.mlp = copy.deepcopy(below.mlp)
        for parameter in self.mlp.c_proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.mlp(self.ln_1(x))


def feed_forward(model: GPT) -> None:
    """A copied block without its attention."""
    for i in model.config.new:
        model.h[i] = FeedForwardOnly(model.h[i - 1])


# ---- Other values than HIVE's --------------------------------------------------------------------
class HeadTables(HIVE):
    """A value table (N, d_h) for each head, all in one bank (H * N, d_h); nothing is shared."""

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


VARIANTS = {
    "ladder": ladder,
    "pkm": pkm,
    "memory-alone": memory_alone,
    "linear": linear,
    "feed-forward": feed_forward,
    "head-tables": head_tables,
    "one-w": one_w,
    "shared-bank": shared_bank,
}
