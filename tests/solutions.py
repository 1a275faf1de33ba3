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
    # A triple of ranks is matched or beaten by (a+1)(b+1)(c+1) triples, itself among them.
    n = first.size(-1)
    triples = []
    for a in range(k):
        for b in range(k):
            for c in range(k):
                if (a + 1) * (b + 1) * (c + 1) <= k:
                    triples.append((a, b, c))
    ranks = torch.tensor(triples, device=first.device).unbind(1)  # three of (P,)

    # The places that the triples name, and their sums.
    scores = (first, second, third)
    places = [s.topk(k).indices[..., r] for s, r in zip(scores, ranks)]  # each (..., P)
    sums = sum(s.gather(-1, place) for s, place in zip(scores, places))  # (..., P)
    best = sums.topk(k)  # of (..., k)
    a, b, c = (place.gather(-1, best.indices) for place in places)
    return best.values, (a * n + b) * n + c


def share_bank(model: GPT) -> None:
    first, *others = [model.h[i].memory.hive for i in model.config.new]
    for hive in others:
        hive.bank = first.bank  # one Parameter, under several names


@torch.no_grad()
def my_method(base: GPT, n_new: int = 2) -> GPT:
    # Copies of the blocks below that speak softly: both output projections at a tenth.
    positions = place(base.config.n_layer, False, n_new=n_new)
    model = assemble(base, *interleave(base.config.n_layer, positions))
    for i in model.config.new:
        for name, parameter in model.h[i].named_parameters():
            if "c_proj" in name:
                parameter *= 0.1
    return model
