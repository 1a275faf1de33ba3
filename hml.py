r"""
The Head-wise Memory Layer (HML) of MIDUS, Memory-Infused Depth Up-Scaling.

Paper: Kim, Byun, Choi, Park, Song, "MIDUS", arXiv 2512.13751. Product keys are from Lample et al. 2019,
"Large Memory Layers with Product Keys", arXiv 1907.05242.

A feed-forward layer multiplies every token with all of its weights. A memory layer *looks up* instead. It has N slots;
a slot is a key and an entry of a bank of values. A token reads only the k slots whose keys fit it best, so N can grow
while the cost per token grows with the square root of N. HML gives every attention head a look-up of its own:

    head output a_h = query q_h
        first half   . n row keys --> n row scores --> k best --\
                                                                 P pairs (sums) --> k best slots --> softmax --> weights
        second half  . n col keys --> n col scores --> k best --/

    bank (N, d_v), one for all heads --> z_h = weighted sum of the k entries
                                         m_h = z_h W_h            (HIVE: one small W_h per head)
    output = [m_1 | m_2 | ... | m_H]

Shape names, the same in every file:
    B    batch                     n    keys per half (n_keys)
    T    tokens in a sequence      N    slots = n * n; slot = row * n + col
    H    heads (n_head)            k    slots read per token and head (top_k)
    C    n_embd = H * d_h          d_v  width of an entry of the bank (d_latent)
    d_h  width of a head           P    pairs of ranks that can be among the k best

Query, key and value are the memory's here; attention has come before and left the heads' outputs. From the small to
the whole: product_key_topk, ProductKeys, HIVE, HeadwiseMemory. Nothing else of this repository is imported.

What it deliberately does not do: no query projection (the head's output *is* the query), no 1/sqrt(d) on the scores
(the keys start that small instead), no output projection or gate, no residual (model.py's MemoryBlock adds one), no
mixing between heads, no sparse gradients (Adam refuses them), no counting of what was read (eval.py does that).
Marks: [paper] from the paper, [report] from reports about it, [choice] ours.
"""

import warnings
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")  # FastPool's


# ---------------------------------------------------------------------------------------------------------------
# 1. The k best of N = n * n slots, without scoring all N
#
# The query has two halves, q = [q1 | q2]. Slot (row, col) has the key [r_row | c_col], so its score is
# q . key = q1 . r_row + q2 . c_col: n row scores and n column scores hold all n * n scores as sums.


@lru_cache
def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks whose sum can be among the k best, as two tensors (P,).

    A rank is a place in a half's list of its k best scores, 0 for the best. The pair (i, j) is matched or beaten by
    every pair (i' <= i, j' <= j): (i+1)*(j+1) pairs, itself included. If those are more than k, it is not needed.

    >>> [tuple(pair) for pair in torch.stack(candidate_pairs(3, torch.device("cpu")), 1).tolist()]
    [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    """
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]  # 20 of 64 at k=8, 50 of 256 at k=16
    return torch.tensor(pairs, device=device).unbind(1)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """scores (..., n) -> the places (..., k) of the k largest, best first: scores.topk(k).indices, but on CPUs, where
    that would be half of the layer's time, by numpy's sort: a third of it. Ties may be broken differently."""
    numpy_sorts = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.size(-1) <= 256
    if not numpy_sorts or torch.compiler.is_compiling():
        return scores.topk(k, dim=-1).indices
    order = np.argsort(scores.detach().numpy(), axis=-1)  # (..., n), worst first
    return torch.from_numpy(order[..., -k:]).flip(-1)


def product_key_topk(row_scores: Tensor, col_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots when slot (row, col) scores row_scores[row] + col_scores[col]; exact, any of those that tie.

    The k best rows and the k best columns suffice: any other slot is matched or beaten by k slots made of those. Two
    searches over n and one over P pairs replace one over n * n (Lample et al., section 3.1).

    row_scores, col_scores: (..., n). Returns scores (..., k), best first, and slots (..., k), int64, row * n + col.
    Gradients flow into both score tensors. Raises ValueError if k is not in 1..n or the shapes differ.

    >>> product_key_topk(torch.tensor([0., 5., 1.]), torch.tensor([2., 0., 3.]), k=2)
    (tensor([8., 7.]), tensor([5, 3]))
    """
    n = row_scores.size(-1)
    if row_scores.shape != col_scores.shape:
        raise ValueError(f"row and column scores differ in shape: {[*row_scores.shape]}, {[*col_scores.shape]}")
    if not 1 <= k <= n:
        raise ValueError(f"top_k must lie between 1 and the number of keys per half, {n}; got {k}")

    with torch.no_grad():  # the search itself has no gradient; the winners' scores are gathered anew below
        best_rows, best_cols = topk_indices(row_scores, k), topk_indices(col_scores, k)  # both (..., k), best first
        i, j = candidate_pairs(k, row_scores.device)  # both (P,)
        i, j = (rank.expand(*best_rows.shape[:-1], -1) for rank in (i, j))  # both (..., P)
        sums = row_scores.gather(-1, best_rows).gather(-1, i) + col_scores.gather(-1, best_cols).gather(-1, j)
        winners = topk_indices(sums, k)  # sums (..., P) -> (..., k), each in 0..P-1
        rows = best_rows.gather(-1, i.gather(-1, winners))  # (..., k): winner -> its rank in the row list -> its row
        cols = best_cols.gather(-1, j.gather(-1, winners))  # (..., k)
    return row_scores.gather(-1, rows) + col_scores.gather(-1, cols), rows * n + cols


# ---------------------------------------------------------------------------------------------------------------
# 2. Every head searches keys of its own


class ProductKeys(nn.Module):
    """The product keys of H heads: which slots a head reads, and with which weights.

    keys (2, H, n, d_h/2): for each head n row keys, then n column keys. They stand for N = n * n keys of width d_h
    that are never built. query_norm, off by default, is a switch of ours; the paper mentions no normalisation.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int, query_norm: bool = False):
        super().__init__()
        self.top_k, self.query_norm = top_k, query_norm
        bound = (head_dim // 2) ** -0.5
        self.keys = nn.Parameter(torch.empty(2, n_head, n_keys, head_dim // 2).uniform_(-bound, bound))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, T, H, d_h) -> weights (B, T, H, k), fp32, each k summing to 1; slots (B, T, H, k), int64."""
        # Scores are fp32 under autocast too: in bf16 many of the k best would be others (13% of the sets at k=8).
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            if self.query_norm:
                query = F.layer_norm(query, query.shape[-1:])  # (B, T, H, d_h), without weights of its own
            first, second = query.chunk(2, dim=-1)  # each (B, T, H, d_h/2)
            row_keys, col_keys = self.keys.float()  # each (H, n, d_h/2)
            row_scores = torch.einsum("bthd,hnd->bthn", first, row_keys)  # (B, T, H, n)
            col_scores = torch.einsum("bthd,hnd->bthn", second, col_keys)  # (B, T, H, n)
            scores, slots = product_key_topk(row_scores, col_scores, self.top_k)  # both (B, T, H, k)
            return scores.softmax(dim=-1), slots


# ---------------------------------------------------------------------------------------------------------------
# 3. One bank for all heads, one small projection per head


class FastPool(torch.autograd.Function):
    """HIVE.pool for CPUs, faster. With R = B*T*H look-ups: weights, slots (R, k), bank (N, d_v) -> z (R, d_v)."""

    @staticmethod
    def forward(ctx, weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
        ctx.save_for_backward(weights, slots, bank)
        return F.embedding_bag(slots, bank, per_sample_weights=weights, mode="sum")  # (R, d_v)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, slots, bank = ctx.saved_tensors
        (R, k), reads, N = slots.shape, slots.flatten(), len(bank)  # reads (R * k,)
        # A weight's gradient is grad[r] . bank[slot]: of the product grad @ bank.T, (R, N), only R * k places.
        places = torch.arange(0, R * k + 1, k), reads, torch.zeros_like(weights).flatten()
        places = torch.sparse_csr_tensor(*places, size=(R, N), check_invariants=False)
        grad_weights = torch.sparse.sampled_addmm(places, grad, bank.T, beta=0).values().view(R, k)
        # An entry's gradient is the sum of weight * grad[r] over all that read it: a bag again, one per entry.
        order = reads.int().sort(stable=True).indices  # (R * k,): the reads, sorted by slot
        counts = torch.bincount(reads, minlength=N)  # (N,): how many read each entry
        bags = {"offsets": counts.cumsum(0) - counts, "per_sample_weights": weights.flatten()[order]}
        grad_bank = F.embedding_bag(order // k, grad, mode="sum", **bags)  # (N, d_v)
        return grad_weights, None, grad_bank


class HIVE(nn.Module):
    """Head-wise implicit value expansion: turns the bank entries that a head found into that head's values.

    bank (N, d_v) is shared by all heads; proj (H, d_v, d_h) holds one W_h per head. Head h behaves as if it owned
    the value table bank @ W_h, (N, d_h), which is never built: summing the k entries first and projecting the sum
    gives the same, since both are linear. For GPT-2 (C=768, H=12) with n=128, d_v=64 the bank and the projections
    take 1.10M parameters; value tables per head would take 12.58M.
    """

    def __init__(self, n_head: int, head_dim: int, n_slots: int, d_latent: int):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(n_slots, d_latent))
        self.proj = nn.Parameter(torch.randn(n_head, d_latent, head_dim) * d_latent**-0.5)

    def pool(self, weights: Tensor, slots: Tensor) -> Tensor:
        """The definition: z = sum over k of weight * entry. weights, slots (B, T, H, k) -> z (B, T, H, d_v), fp32."""
        entries = F.embedding(slots, self.bank.float())  # (B, T, H, k, d_v): k times as large as the result
        return torch.einsum("bthk,bthkv->bthv", weights, entries)  # (B, T, H, d_v)

    def pool_fast(self, weights: Tensor, slots: Tensor) -> Tensor:
        """The same without holding the k entries. Always in fp32: the kernels refuse mixed dtypes and bf16 on CUDA."""
        weights, rows, bank = weights.flatten(0, 2), slots.flatten(0, 2), self.bank.float()  # (B*T*H, k), twice
        if slots.device.type == "cpu" and not torch.compiler.is_compiling():
            z = FastPool.apply(weights, rows, bank)
        else:
            z = F.embedding_bag(rows, bank, per_sample_weights=weights, mode="sum")
        return z.view(*slots.shape[:3], -1)  # (B*T*H, d_v) -> (B, T, H, d_v)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        """weights, slots (B, T, H, k) -> values m (B, T, H, d_h)."""
        pool = self.pool if slots.device.type == "mps" else self.pool_fast  # embedding_bag is unreliable on MPS
        z = pool(weights, slots).to(self.proj.dtype)  # (B, T, H, d_v)
        return torch.einsum("bthv,hvd->bthd", z, self.proj)  # (B, T, H, d_h)


# ---------------------------------------------------------------------------------------------------------------
# 4. The layer


class HeadwiseMemory(nn.Module):
    """HML: every head looks up its own product keys, HIVE turns what they find into values. No head sees another.

    n_head, head_dim: H and d_h of the attention that feeds the layer; n_keys: n, so n * n slots; top_k: k;
    d_latent: d_v; query_norm: normalise queries. Raises ValueError where these contradict each other.

    How it starts, and what learns when:

        tensor     shape             starts as              gradient at step 0      from step 1
        hive.bank  (N, d_v)          zero                   yes, the entries read   yes, the entries read
        hive.proj  (H, d_v, d_h)     N(0, std d_v^-0.5)     zero                    yes
        keys       (2, H, n, d_h/2)  U(+-(d_h/2)^-0.5)      zero                    yes
        attention  (in model.py)     copied from the base   zero                    yes

    With the bank at zero the layer returns exact zeros, so a model it is inserted into starts as the very same
    function [report]. Everything that reaches the output through the bank alone then has gradient zero; only the bank
    itself gets one. proj cannot start at zero as well: each would hold the other's gradient at zero for ever. Zeroing
    proj instead would also start as the identity, but then an entry that was never read would be noise when it is
    first read; a zero entry says nothing until it has learned something.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int, d_latent: int, query_norm: bool = False):
        super().__init__()
        if min(n_head, head_dim, n_keys, d_latent) < 1:
            raise ValueError("n_head, head_dim, n_keys and d_latent must be at least 1")
        if head_dim % 2:
            raise ValueError(f"product keys cut the query in two halves: the head width must be even, not {head_dim}")
        if top_k < 2:  # the softmax over one score is the constant 1: keys and queries would get no gradient
            raise ValueError(f"top_k must be at least 2, or keys and queries cannot learn; got {top_k}")
        if top_k > n_keys:  # product_key_topk would say so too, but only when the model first runs
            raise ValueError(f"top_k must be at most n_keys, {n_keys}; got {top_k}")
        self.n_head, self.head_dim = n_head, head_dim
        self.product_keys = ProductKeys(n_head, head_dim, n_keys, top_k, query_norm)
        self.hive = HIVE(n_head, head_dim, n_keys * n_keys, d_latent)

    def read(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What each token and head reads: heads (B, T, H, d_h) -> weights, slots, both (B, T, H, k)."""
        if heads.dim() != 4 or heads.shape[2:] != (self.n_head, self.head_dim):
            want = f"(B, T, {self.n_head}, {self.head_dim})"
            raise ValueError(f"the memory layer takes head outputs of shape {want}, not {tuple(heads.shape)}")
        return self.product_keys(heads)

    def forward(self, heads: Tensor) -> Tensor:
        """heads (B, T, H, d_h), attention output split by head -> (B, T, C), the heads' values side by side."""
        return self.hive(*self.read(heads)).flatten(2)  # (B, T, H, d_h) -> (B, T, C)
