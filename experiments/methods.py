"""
More ways to extend a model, for compare.py: rows for upscale.py's METHODS.

Copies of blocks. Of these only opt-deus starts as exactly the base; the others start worse and
recover. Published with the new blocks alone trained: opt-deus; with everything trained: stack,
lesa.

    stack          copies that stay as they are                        Gong et al. 2019 (ICML)
    opt-deus       neighbours aligned by optimal transport, averaged   arXiv 2508.08011
    lesa           a small network predicts a block from neighbours    arXiv 2502.13794

Variants of the memory block, and parts of a block alone. All start as exactly the base.

    variant          midus with other queries, values, banks
    hybrid-one-bank  upscale.py's hybrid, whose blocks share one bank
    pkm              the block with a product-key memory for its FFN     Lample et al. 2019
    memory-alone     no attention: the memory is asked with the token itself
    attention        no memory and no FFN: what attention alone brings
    feed-forward     no attention: what the other half of a copied block brings

No new block. It starts as exactly the base.

    lora             two thin matrices beside every matrix of a block    arXiv 2106.09685

Whoever imports this file can name them: upscale(base, "pkm"). Shape names: see hml.py.
"""

import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from hml import HIVE, ProductKeys, pool
from model import GPT, GPTConfig, MemoryBlock, TransformerBlock
from upscale import (
    MEMORY,
    METHODS,
    N_NEW,
    PLACEMENT,
    SIZES,
    Method,
    Option,
    assemble,
    interleave,
    llama_pro,
    midus,
    place,
    silence,
    yes_or_no,
)


# ---- Copies --------------------------------------------------------------------------------------
def gaps_of_top_half(n_layer: int, n_new: int | None = None) -> list[int]:
    """Positions for n_new blocks, each between two of the base, spread over the top half.

    By default half as many as the base has. Below the top half only when that is full. (The
    published scripts cannot place 5 or 8 blocks into 12.) Raises ValueError if there are too few
    gaps.

    >>> gaps_of_top_half(6, 3), gaps_of_top_half(12, 2), gaps_of_top_half(12, 8)
    ([3, 4, 5], [7, 10], [4, 5, 6, 7, 8, 9, 10, 11])
    """
    n_new = max(1, n_layer // 2) if n_new is None else n_new
    if not 1 <= n_new < n_layer:
        wanted = f"at least 1 and less than {n_layer}, the number of blocks"
        raise ValueError(f"n_new must be {wanted}; got {n_new}")
    first = min(n_layer // 2, n_layer - n_new)  # blocks below all new ones, at least
    return [first + (2 * i + 1) * (n_layer - first) // (2 * n_new) for i in range(n_new)]


def stack(base: GPT, n_new: int | None = None) -> GPT:
    """Copies that stay as they are, each right behind its original. Not the base at start."""
    positions = place(base.config.n_layer, False, n_new=n_new)
    sources, new = interleave(base.config.n_layer, positions)
    return assemble(base, sources, new)


def between(
    base: GPT,
    n_new: int | None,
    make: Callable[[TransformerBlock, TransformerBlock], TransformerBlock],
) -> GPT:
    """The base with make(block below, block above), a TransformerBlock, in gaps of the top half."""
    positions = gaps_of_top_half(base.config.n_layer, n_new)
    sources, new = interleave(base.config.n_layer, positions)
    model = assemble(base, sources, new)
    for position, i in zip(positions, model.config.new):
        model.h[i].load_state_dict(make(base.h[position - 1], base.h[position]).state_dict())
    return model


@torch.no_grad()
def mean(first: TransformerBlock, second: TransformerBlock) -> TransformerBlock:
    """The block whose every parameter is the mean of the two."""
    block = copy.deepcopy(second)
    for new, old in zip(block.parameters(), first.parameters()):
        new.lerp_(old, 0.5)
    return block


# ---- OpT-DeUS ------------------------------------------------------------------------------------
# Units that do the same thing sit in different places of two blocks: first find who is whose, then
# average.
def transport_plan(first: Tensor, second: Tensor, reg: float = 0.06, rounds: int = 100) -> Tensor:
    """How much of each row of first (m, d) goes into each row of second (m, d).

    Returns (m, m), plan[j, i] for second's row j, each row summing to 1. Sinkhorn's algorithm
    [Cuturi 2013] in logarithms; cost: L2 distance; uniform marginals.
    """
    score = -torch.cdist(second.double().cpu(), first.double().cpu()) / reg  # (m, m)
    for _ in range(rounds):
        score = score - score.logsumexp(dim=0, keepdim=True)
        score = score - score.logsumexp(dim=1, keepdim=True)
    return score.exp().to(first)


@torch.no_grad()
def align(first: TransformerBlock, second: TransformerBlock) -> TransformerBlock:
    """first with its units moved to where second has its most alike ones.

    Matrix after matrix: the plan of a matrix's outputs is applied to the inputs of the next.

    On GPT-2 [choice]: Q, K, V are thirds of c_attn and units stay within their head; biases move
    with their rows. Q and K get plans of their own, as published, though their product needs the
    same one. The norm before the MLP and the inputs of c_fc take the plan of the attention's
    outputs. The published recipe is for gated MLPs; c_fc's outputs get a plan of their own here,
    since else c_proj's inputs could not be matched.
    """
    block = copy.deepcopy(first)
    H = second.attn.n_head

    def rows(linear: nn.Linear) -> Tensor:
        return torch.cat((linear.weight, linear.bias[:, None]), dim=1)  # (out, in + 1)

    def move(linear: nn.Linear, inputs: Tensor | None, target: nn.Linear, groups: int) -> Tensor:
        """Applies the plan of the inputs to linear's columns, then finds that of its rows."""
        if inputs is not None:
            linear.weight.copy_(linear.weight @ inputs.T)
        # A group keeps its units to itself.
        pairs = zip(rows(linear).chunk(groups), rows(target).chunk(groups))
        plan = torch.block_diag(*(transport_plan(old, new) for old, new in pairs))  # (out, out)
        linear.weight.copy_(plan @ linear.weight)
        linear.bias.copy_(plan @ linear.bias)
        return plan

    C = second.attn.c_proj.in_features
    qkv = move(block.attn.c_attn, None, second.attn.c_attn, 3 * H)  # (3C, 3C)
    values = qkv[2 * C :, 2 * C :]  # (C, C), the plan of V
    stream = move(block.attn.c_proj, values, second.attn.c_proj, 1)  # (C, C)
    for parameter in block.ln_2.parameters():
        parameter.copy_(stream @ parameter)
    hidden = move(block.mlp.c_fc, stream, second.mlp.c_fc, 1)  # (4C, 4C)
    move(block.mlp.c_proj, hidden, second.mlp.c_proj, 1)
    return block


def opt_deus(base: GPT, n_new: int | None = None) -> GPT:
    """The mean of a block and of the one below aligned to it, silent at first: the base at start.

    The published entropic weight, 0.06, is not relative to the cost. Rows of small GPTs lie so
    close together that all plans but those of Q, K and V come out nearly uniform: what is fused
    into the block above is then hardly more than the mean of the rows of the block below.
    """

    def make(below: TransformerBlock, above: TransformerBlock) -> TransformerBlock:
        block = mean(align(below, above), above)
        silence(block)
        return block

    return between(base, n_new, make)


# ---- LESA ----------------------------------------------------------------------------------------
# Blocks share a basis, in which what lies between two can be learned from all triples of blocks.
def matrices(block: TransformerBlock) -> list[Tensor]:
    """The block's matrices (out, in), Q, K and V apart, as views that can be written to."""
    wide = (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    return [*block.attn.c_attn.weight.chunk(3), *(linear.weight for linear in wide)]


def predict_between(slices: Tensor, gaps: list[int], share: float = 5e-4) -> Tensor:
    """Learns slice i from slices i-1 and i+1, and predicts those in between.

    slices (L, r, in): one kind of matrix of every block, in the basis they share. Column by column.
    Returns the slices (gaps, r, in) between blocks p-1 and p, from 0, for p in gaps.

    Three linear layers, hidden 256, ReLU; loss MSE + a share of MSE of the norms; AdamW 1e-3;
    batches of 64. Published with 10 epochs; on a small GPT those are some hundred steps, too few:
    here at least 2,000 are made and slices are brought to scale 1 [choice].
    """
    scale = slices.square().mean().sqrt()
    columns = slices.transpose(1, 2) / scale  # (L, in, r)
    r = columns.size(2)
    x = torch.cat((columns[:-2], columns[2:]), dim=2).flatten(0, 1)  # ((L-2) * in, 2r)
    y = columns[1:-1].flatten(0, 1)  # ((L-2) * in, r)
    net = nn.Sequential(
        nn.Linear(2 * r, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, r)
    )
    optimizer = torch.optim.AdamW(net.to(x.device).parameters(), lr=1e-3)
    for _ in range(max(2000, 10 * len(x) // 64)):
        batch = torch.randint(len(x), (64,))
        out = net(x[batch])  # (64, r)
        wanted = y[batch]  # (64, r)
        of_values = F.mse_loss(out, wanted)
        of_norms = F.mse_loss(out.norm(dim=1), wanted.norm(dim=1))
        loss = (1 - share) * of_values + share * of_norms
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        neighbours = [torch.cat((columns[p - 1], columns[p]), dim=1) for p in gaps]
        out = net(torch.stack(neighbours))  # (gaps, in, r)
    return out.transpose(1, 2) * scale  # (gaps, r, in)


def lesa(base: GPT, n_new: int | None = None) -> GPT:
    """Each matrix of a new block is predicted from those of its neighbours. Not the base at start.

    Biases and norms are those of the block below [choice: LLaMA, for which it was published, has no
    biases]. A GPT of 12 blocks gives only 10 examples of a block between two; a base needs at least
    3. Draws from torch's global random numbers.
    """
    L = base.config.n_layer
    if L < 3:
        raise ValueError(f"lesa learns from triples of blocks; the base has only {L}")
    model = between(base, n_new, lambda below, above: below)

    # For each kind of matrix, those of all blocks side by side, and their common basis.
    with torch.no_grad():
        kinds = list(zip(*(matrices(block) for block in base.h)))
    for kind, same in enumerate(kinds):
        together = torch.cat(same, dim=1).detach().float()  # (out, L * in)
        U, S, Vh = torch.linalg.svd(together, full_matrices=False)  # (out, r), (r,), (r, L * in)
        slices = torch.stack(Vh.chunk(L, dim=1))  # (r, L * in) -> (L, r, in)
        predicted = predict_between(slices, gaps_of_top_half(L, n_new))  # (n_new, r, in)
        with torch.no_grad():
            for i, slice_ in zip(model.config.new, predicted):
                matrices(model.h[i])[kind].copy_((U * S) @ slice_)  # (out, in)
    return model


# ---- Parts of a block ----------------------------------------------------------------------------
# They stand where midus puts its blocks.
class Half(nn.Module):
    """x + f(LN(x)): half of a transformer block. (B, T, C)."""

    def __init__(self, norm: nn.Module, f: nn.Module):
        super().__init__()
        self.norm = norm
        self.f = f

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


def attention(base: GPT, **placement) -> GPT:
    """A copied block without its FFN, silent at first."""
    model = llama_pro(base, place(base.config.n_layer, True, **placement))
    for i in model.config.new:
        model.h[i] = Half(model.h[i].ln_1, model.h[i].attn)
    return model


def feed_forward(base: GPT, **placement) -> GPT:
    """A copied block without its attention, silent at first."""
    model = llama_pro(base, place(base.config.n_layer, True, **placement))
    for i in model.config.new:
        model.h[i] = Half(model.h[i].ln_2, model.h[i].mlp)
    return model


class MemoryAlone(nn.Module):
    """x + HML(Q LN2(x)), with a new matrix Q. (B, T, C)."""

    def __init__(self, block: MemoryBlock, below: TransformerBlock, config: GPTConfig):
        """block: midus's, which this one replaces; below: the block before it."""
        super().__init__()
        self.ln_2 = copy.deepcopy(below.ln_2)
        self.own_query = nn.Linear(config.n_embd, config.n_embd)
        self.memory = block.memory

    def ask(self, x: Tensor) -> Tensor:
        query = self.own_query(self.ln_2(x))  # (B, T, C)
        return self.memory(query.unflatten(-1, (self.memory.n_head, -1)))  # (B, T, C)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + self.ask(x)


def memory_alone(base: GPT, **options) -> GPT:
    """A memory of the token, without attention; options as midus's."""
    model = midus(base, **options)
    for i in model.config.new:
        model.h[i] = MemoryAlone(model.h[i], model.h[i - 1], model.config)
    return model.to(base.wte.weight)


# ---- Variants of the memory block ----------------------------------------------------------------
class OwnQuery(MemoryAlone):
    """The same after attention: x + HML(Q LN2(x + Attn(LN1(x)))). (B, T, C)."""

    def __init__(self, block: MemoryBlock, below: TransformerBlock, config: GPTConfig):
        super().__init__(block, below, config)
        self.residual = config.residual
        self.ln_1 = block.ln_1
        self.attn = block.attn

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        after = x + self.attn(self.ln_1(x))
        return (after if self.residual else x) + self.ask(after)


class HeadQueryAndBranch(MemoryBlock):
    """midus's block with the head query, and attention's own branch beside it. (B, T, C)."""

    def __init__(self, block: MemoryBlock, config: GPTConfig):
        super().__init__(config)
        self.load_state_dict(block.state_dict())
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        silence(self)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        heads = self.attn(self.ln_1(x))  # (B, T, H, d_h)
        return x + self.c_proj(heads.flatten(2)) + self.memory(heads)


class NormalisedKeys(ProductKeys):
    """Product keys that bring queries to mean 0 and variance 1 first, without learned weights."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(F.layer_norm(query.float(), query.shape[-1:]))


class PlainValues(HIVE):
    """Entries of width C, added to the stream as they are; there is nothing to project."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_head, 0, config.n_keys**2, config.n_embd)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        z = pool(weights, slots, self.bank)  # (B, T, H, C)
        return z.sum(dim=2, keepdim=True)  # (B, T, 1, C): the layer joins what it takes for heads


class HeadTables(HIVE):
    """A value table (N, d_h) for each head, all in one bank (H * N, d_h); nothing is shared."""

    def __init__(self, config: GPTConfig):
        n_slots = config.n_keys**2
        width = config.n_embd // config.n_head
        super().__init__(config.n_head, 0, config.n_head * n_slots, width)
        offsets = torch.arange(config.n_head)[:, None] * n_slots  # (H, 1)
        self.register_buffer("offsets", offsets)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        return pool(weights, slots + self.offsets, self.bank)  # (B, T, H, d_h)


class OneProjection(HIVE):
    """HIVE with one W for all heads."""

    def __init__(self, config: GPTConfig):
        width = config.n_embd // config.n_head
        super().__init__(1, width, config.n_keys**2, config.d_latent)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        return pool(weights, slots, self.bank) @ self.proj[0]  # (B, T, H, d_v) @ (d_v, d_h)


VALUES = {"plain": PlainValues, "head-tables": HeadTables, "one-w": OneProjection}


def variant(
    base: GPT,
    query: str = "head",
    residual: bool = False,
    values: str = "hive",
    shared: bool = False,
    query_norm: bool = False,
    **options,
) -> GPT:
    """midus with more to choose from; the other options are midus's.

    query: head, token, or own, see OwnQuery. residual: with any query. values: hive, or one of
    VALUES. shared: one bank for all memory blocks. query_norm: see NormalisedKeys. Raises
    ValueError for unknown values.
    """
    if values not in ("hive", *VALUES):
        raise ValueError(f"values must be hive, {', '.join(VALUES)}; not {values}")

    # midus has the token query with and without attention's branch, the head query without it.
    of_midus = {"query": "token" if query == "own" else query}
    of_midus["residual"] = residual and query != "head"
    model = midus(base, **of_midus, **options)
    for i in model.config.new:
        if query == "own":
            model.h[i] = OwnQuery(model.h[i], model.h[i - 1], model.config)
        if query == "head" and residual:
            model.h[i] = HeadQueryAndBranch(model.h[i], model.config)

    # What is inside the memories.
    memories = [model.h[i].memory for i in model.config.new]
    for memory in memories:
        if query_norm:
            keys = memory.product_keys
            sizes = (memory.n_head, memory.head_dim, model.config.n_keys, model.config.top_k)
            memory.product_keys = NormalisedKeys(*sizes)
            memory.product_keys.load_state_dict(keys.state_dict())
        if values != "hive":
            memory.hive = VALUES[values](model.config)
        if shared:
            memory.hive.bank = memories[0].hive.bank
    return model.to(base.wte.weight)


def hybrid_one_bank(base: GPT, **options) -> GPT:
    """upscale.py's hybrid, with one bank for all its blocks."""
    return variant(base, query="token", residual=True, key_scale=3.0, shared=True, **options)


def pkm(base: GPT, **options) -> GPT:
    """A transformer block with a product-key memory [Lample et al. 2019] for its FFN.

    Unlike there: as many heads as the model has, no batch normalisation of queries, and values that
    start at zero.
    """
    return variant(base, query="own", residual=True, values="plain", **options)


# ---- LoRA ----------------------------------------------------------------------------------------
class LowRank(nn.Module):
    """W x + B A x: a linear layer, and beside it two thin matrices. It starts with B at zero."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.A = nn.Linear(linear.in_features, rank, bias=False)
        self.B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.B(self.A(x))


def lora(base: GPT, rank: int = 48) -> GPT:
    """A and B beside every matrix of every block; all else is frozen.

    Published with a factor before B A, alpha / rank, which is 1 here [choice].
    """
    model = assemble(base, sources=list(range(base.config.n_layer)), new=[])
    model.requires_grad_(False)
    for block in model.h:
        block.attn.c_attn = LowRank(block.attn.c_attn, rank)
        block.attn.c_proj = LowRank(block.attn.c_proj, rank)
        block.mlp.c_fc = LowRank(block.mlp.c_fc, rank)
        block.mlp.c_proj = LowRank(block.mlp.c_proj, rank)
    return model.to(base.wte.weight)


# ---- The rows ------------------------------------------------------------------------------------
CHOICES = (
    Option("values", str, "hive (default), plain, head-tables or one-w"),
    Option("shared", yes_or_no, "yes: one bank for all memory blocks (default no)"),
    Option("query_norm", yes_or_no, "yes: queries are normalised (default no)"),
)
RANK = Option("rank", common.whole_number, "of LoRA's matrices (default 48)")

METHODS.update(
    {
        "stack": Method(stack, (N_NEW,), "all"),
        "opt-deus": Method(opt_deus, (N_NEW,), "new"),
        "lesa": Method(lesa, (N_NEW,), "all"),
        "variant": Method(variant, PLACEMENT + MEMORY + CHOICES, "new"),
        "hybrid-one-bank": Method(hybrid_one_bank, PLACEMENT + SIZES, "new"),
        "pkm": Method(pkm, PLACEMENT + SIZES, "new"),
        "memory-alone": Method(memory_alone, PLACEMENT + SIZES, "new"),
        "attention": Method(attention, PLACEMENT, "new"),
        "feed-forward": Method(feed_forward, PLACEMENT, "new"),
        "lora": Method(lora, (RANK,), "new"),
    }
)
