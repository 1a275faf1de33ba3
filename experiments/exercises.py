"""
Four exercises. Each stub says what to build; replace its `raise` and see whether it is done:

    python -m pytest -q tests/test_exercises.py -k yours

An exercise that is not begun is skipped; tests/solutions.py has one solution of each. Shape names:
see hml.py.
"""

import os
import sys

import torch  # noqa: F401 (yours to use, as are nn and F)
import torch.nn.functional as F  # noqa: F401
from torch import Tensor, nn  # noqa: F401

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from hml import HeadwiseMemory
from model import GPT
from upscale import midus


class GatedMemory(HeadwiseMemory):
    """1. A gate. Each head decides from its query how much of what it found it lets through.

    A parameter `gate` (H, d_h), zero at the start; head h's values m_h become sigmoid(q_h . gate_h)
    * m_h, so each head starts half open. Everything else is HeadwiseMemory's. Start from its
    __init__ and forward; five lines are enough.

    How it is trained: with everything else in its block. train.py's optimizer takes a parameter of
    two dimensions for a matrix, so the gate has the rate of matrices, and their weight decay. At
    step 0 its gradient is zero, since the bank is empty; from step 1 on it is not. To see what it
    brings, make `gated` below a method: these lines at the end of methods.py, then the command.

        from exercises import gated
        METHODS["gated"] = Method(gated, PLACEMENT + MEMORY, "new")

        python experiments/compare.py --methods midus:query=token gated:query=token
    """

    def __init__(self, *args, **kwargs):
        raise NotImplementedError


def gated(base: GPT, **options) -> GPT:
    """midus with your memory in its blocks: the same keys, bank and projections, and a gate."""
    model = midus(base, **options)
    config = model.config
    sizes = (config.n_head, config.n_embd // config.n_head)
    sizes += (config.n_keys, config.top_k, config.d_latent)
    for i in config.new:
        memory = GatedMemory(*sizes)
        memory.load_state_dict(model.h[i].memory.state_dict(), strict=False)
        model.h[i].memory = memory
    return model.to(base.wte.weight)


def three_way_topk(first: Tensor, second: Tensor, third: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """2. Three-way product keys: n^3 slots from 3n keys.

    Slot (a, b, c) = (a * n + b) * n + c scores first[a] + second[b] + third[c]. first, second,
    third: (..., n). Returns the k best scores (..., k), best first, and their slots (..., k),
    int64; 1 <= k <= n. Exact, with gradients into all three, and without ever building the n^3
    scores: at n=256 those would be 64 MiB for a single query in fp32. Which triples of ranks can be
    among the k best? product_key_topk and candidate_pairs have the two-way answer.
    """
    raise NotImplementedError


def share_bank(model: GPT) -> None:
    """3. One bank for all memory blocks of model, in place.

    Every block keeps keys and projections of its own, and reads and trains the bank of the first.
    Afterwards the model has fewer parameters, and one step of an optimizer moves the bank by the
    gradients of all blocks together.
    """
    raise NotImplementedError


def my_method(base: GPT, n_new: int = 2) -> GPT:
    """4. An up-scaling method of your own, in ten lines.

    Returns a model n_new blocks deeper, with its new blocks listed in config.new and the base's
    blocks around them, unchanged and in order; base is left as it was. What the new blocks start as
    is up to you, but not plain copies, and no output may be NaN. upscale.py's assemble, interleave
    and place do most of it. At the end of methods.py a row makes it a method of compare.py, as in
    exercise 1: METHODS["mine"] = Method(my_method, (N_NEW,), "new").
    """
    raise NotImplementedError
