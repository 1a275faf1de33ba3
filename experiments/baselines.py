"""
Depth up-scaling methods beside the three of upscale.py. Each takes a base GPT and the number of new
blocks and returns a deeper GPT whose config.new lists the inserted blocks.

    stack      copies, each right after its original, or all on top    Gong et al. 2019 (ICML)
    average    the mean of the two neighbours                          the field's plain baseline
    opt-deus   neighbours aligned by optimal transport, averaged       arXiv 2508.08011
    lesa       a small network predicts a block from its neighbours    arXiv 2502.13794

Only opt-deus starts as exactly the base; the others start worse and recover. Published with the new
blocks alone trained: average, opt-deus; with everything trained: stack, lesa. Shape names: see
hml.py.
"""

import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GPT, TransformerBlock
from upscale import assemble, interleave, place, silence


def gaps_of_top_half(n_layer: int, n_new: int) -> list[int]:
    """Positions for n_new blocks, each between two of the base, spread over the top half; below it
    only when that is full. (The published scripts cannot place 5 or 8 blocks into 12.) Raises
    ValueError if there are too few gaps.

    >>> gaps_of_top_half(6, 3), gaps_of_top_half(12, 2), gaps_of_top_half(12, 8)
    ([3, 4, 5], [7, 10], [4, 5, 6, 7, 8, 9, 10, 11])
    """
    if not 1 <= n_new < n_layer:
        raise ValueError(
            f"n_new must be at least 1 and less than {n_layer}, the number of blocks; got {n_new}"
        )
    first = min(n_layer // 2, n_layer - n_new)
    return [first + (2 * i + 1) * (n_layer - first) // (2 * n_new) for i in range(n_new)]


def stack(base: GPT, n_new: int, on_top: bool = False) -> GPT:
    """Copies that stay as they are: each right behind its original, evenly spread, or the top n_new
    blocks once more on top of the stack. Not the base at start.
    """
    L = base.config.n_layer
    positions = place(L, False, n_new=n_new)  # refuses what cannot be
    if on_top:
        return assemble(base, [*range(L), *range(L - n_new, L)], list(range(L, L + n_new)))
    return assemble(base, *interleave(L, positions))


def between(
    base: GPT, n_new: int, make: Callable[[TransformerBlock, TransformerBlock], TransformerBlock]
) -> GPT:
    """The base with make(block below, block above), a TransformerBlock, in gaps of the top half."""
    positions = gaps_of_top_half(base.config.n_layer, n_new)
    model = assemble(base, *interleave(base.config.n_layer, positions))
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


def average(base: GPT, n_new: int) -> GPT:
    """Each new block is the mean of its neighbours. Not the base at start."""
    return between(base, n_new, mean)


# ---- OpT-DeUS: neurons that do the same thing sit in different places; find who is whose before av
def transport_plan(first: Tensor, second: Tensor, reg: float = 0.06, rounds: int = 100) -> Tensor:
    """How much of each row of first (m, d) goes into each row of second (m, d): (m, m), plan[j, i]
    for second's row j, each row summing to 1. Sinkhorn's algorithm [Cuturi 2013] in logarithms;
    cost: L2 distance; uniform marginals.
    """
    score = -torch.cdist(second.double().cpu(), first.double().cpu()) / reg  # (m, m)
    for _ in range(rounds):
        score = score - score.logsumexp(dim=0, keepdim=True)
        score = score - score.logsumexp(dim=1, keepdim=True)
    return score.exp().to(first)


@torch.no_grad()
def align(first: TransformerBlock, second: TransformerBlock) -> TransformerBlock:
    """first with its units moved to where second has its most alike ones, matrix after matrix: the
    plan of a matrix's outputs is applied to the inputs of the next.

    On GPT-2 [choice]: Q, K, V are thirds of c_attn and units stay within their head; biases move
    with their rows. Q and K get plans of their own, as published, though their product needs the
    same one. The norm before the MLP and the inputs of c_fc take the plan of the attention's
    outputs. The published recipe is for gated MLPs; c_fc's outputs get a plan of their own here,
    since else c_proj's inputs could not be matched.
    """
    block, H = copy.deepcopy(first), second.attn.n_head

    def rows(linear: nn.Linear) -> Tensor:
        return torch.cat((linear.weight, linear.bias[:, None]), dim=1)  # (out, in + 1)

    def move(linear: nn.Linear, inputs: Tensor | None, target: nn.Linear, groups: int) -> Tensor:
        """Applies the plan of the inputs to linear's columns, then finds and applies that of its
        rows; returns it.
        """
        if inputs is not None:
            linear.weight.copy_(linear.weight @ inputs.T)
        pairs = zip(
            rows(linear).chunk(groups), rows(target).chunk(groups)
        )  # a group keeps its units to itself
        plan = torch.block_diag(*(transport_plan(old, new) for old, new in pairs))  # (out, out)
        linear.weight.copy_(plan @ linear.weight)
        linear.bias.copy_(plan @ linear.bias)
        return plan

    C = second.attn.c_proj.in_features
    values = move(block.attn.c_attn, None, second.attn.c_attn, 3 * H)[
        2 * C :, 2 * C :
    ]  # (C, C), the plan of V
    stream = move(block.attn.c_proj, values, second.attn.c_proj, 1)  # (C, C)
    for parameter in block.ln_2.parameters():
        parameter.copy_(stream @ parameter)
    hidden = move(block.mlp.c_fc, stream, second.mlp.c_fc, 1)  # (4C, 4C)
    move(block.mlp.c_proj, hidden, second.mlp.c_proj, 1)
    return block


def opt_deus(base: GPT, n_new: int) -> GPT:
    """The mean of the block above and of the block below aligned to it, with both output
    projections zeroed: the base at start.

    The published entropic weight, 0.06, is not relative to the cost. Rows of small GPTs lie so
    close together that all plans but those of Q, K and V come out nearly uniform: what is fused
    into the block above is then hardly more than the mean of the rows of the block below.
    """

    def make(below: TransformerBlock, above: TransformerBlock) -> TransformerBlock:
        block = mean(align(below, above), above)
        silence(block)
        return block

    return between(base, n_new, make)


# ---- LESA: blocks share a basis, in which what lies between two can be learned from all triples of
def matrices(block: TransformerBlock) -> list[Tensor]:
    """The block's matrices (out, in), Q, K and V apart, as views that can be written to."""
    wide = (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    return [*block.attn.c_attn.weight.chunk(3), *(linear.weight for linear in wide)]


def predict_between(slices: Tensor, gaps: list[int], share: float = 5e-4) -> Tensor:
    """slices (L, r, in): one kind of matrix of every block, in the basis they share. Learns slice i
    from slices i-1 and i+1, column by column, and returns the slices (gaps, r, in) between blocks
    p-1 and p, from 0, for p in gaps.

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
        out, want = net(x[batch]), y[batch]  # both (64, r)
        loss = (1 - share) * F.mse_loss(out, want) + share * F.mse_loss(
            out.norm(dim=1), want.norm(dim=1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = net(
            torch.stack([torch.cat((columns[p - 1], columns[p]), dim=1) for p in gaps])
        )  # (gaps, in, r)
    return out.transpose(1, 2) * scale  # (gaps, r, in)


def check_triples(base: GPT) -> None:
    """Raises ValueError if the base has no block between two others, for lesa to learn from."""
    if base.config.n_layer < 3:
        raise ValueError(
            f"lesa learns from triples of blocks; the base has only {base.config.n_layer}"
        )


def lesa(base: GPT, n_new: int) -> GPT:
    """Each matrix of a new block is predicted from those of its neighbours. Biases and norms are
    those of the block below [choice: LLaMA, for which it was published, has no biases]. A GPT of 12
    blocks gives only 10 examples of a block between two; a base needs at least 3. Not the base at
    start. Draws from torch's global random numbers.
    """
    check_triples(base)
    L, model = base.config.n_layer, between(base, n_new, lambda below, above: below)
    with torch.no_grad():
        kinds = list(zip(*(matrices(block) for block in base.h)))  # of each kind, the L matrices
    for kind, same in enumerate(kinds):
        U, S, Vh = torch.linalg.svd(
            torch.cat(same, dim=1).detach().float(), full_matrices=False
        )  # (out, r), (r,), ...
        slices = torch.stack(Vh.chunk(L, dim=1))  # (r, L * in) -> (L, r, in)
        predicted = predict_between(slices, gaps_of_top_half(L, n_new))  # (n_new, r, in)
        with torch.no_grad():
            for i, slice in zip(model.config.new, predicted):
                matrices(model.h[i])[kind].copy_((U * S) @ slice)  # (out, in)
    return model
