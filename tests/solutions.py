"""One solution of each exercise in experiments/exercises.py."""

import torch
from torch import Tensor, nn

from hml import HeadwiseMemory
from model import GPT
from upscale import assemble, interleave, place


class GatedMemory(HeadwiseMemory):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.zeros(self.n_head, self.head_dim))

    def forward(self, heads: Tensor) -> Tensor:
        share = (heads * self.gate).sum(dim=-1, keepdim=True).sigmoid()  # (B, T, H, 1)
        return (share * self.hive(*self.read(heads))).flatten(2)  # (B, T, H, d_h) -> (B, T, C)


def three_way_topk(first: Tensor, second: Tensor, third: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A triple of ranks is matched or beaten by (a+1)(b+1)(c+1) triples, itself among them."""
    n, scores = first.size(-1), (first, second, third)
    best = [s.topk(k).indices for s in scores]  # each (..., k)
    ranks = [
        (a, b, c)
        for a in range(k)
        for b in range(k)
        for c in range(k)
        if (a + 1) * (b + 1) * (c + 1) <= k
    ]
    ranks = torch.tensor(ranks, device=first.device).unbind(1)  # three of (P,)
    ids = [b[..., r] for b, r in zip(best, ranks)]  # each (..., P)
    sums = sum(s.gather(-1, i) for s, i in zip(scores, ids))  # (..., P)
    winners = sums.topk(k).indices  # (..., k)
    a, b, c = (i.gather(-1, winners) for i in ids)  # each (..., k)
    return sums.gather(-1, winners), (a * n + b) * n + c


def share_bank(model: GPT) -> None:
    first, *others = [model.h[i].memory.hive for i in model.config.new]
    for hive in others:
        hive.bank = first.bank  # one Parameter, under several names


@torch.no_grad()
def my_method(base: GPT, n_new: int) -> GPT:
    """Copies of the blocks below that speak softly: both output projections at a tenth."""
    model = assemble(
        base, *interleave(base.config.n_layer, place(base.config.n_layer, False, n_new=n_new))
    )
    for i in model.config.new:
        for proj in (model.h[i].attn.c_proj, model.h[i].mlp.c_proj):
            proj.weight *= 0.1
            proj.bias *= 0.1
    return model
