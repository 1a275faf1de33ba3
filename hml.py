r"""
The Head-wise Memory Layer (HML) of MIDUS, Memory-Infused Depth Up-Scaling (Kim et al., arXiv 2512.13751), on product
keys (Lample et al. 2019, arXiv 1907.05242). `python hml.py` walks through the example below.

A feed-forward layer multiplies every token with all of its weights. A memory layer *looks up* instead. A slot holds one
entry of a bank of values, the same for all heads, and has one key per head. A token's head reads only the k slots whose
keys fit its query best, and to find them among N = n * n slots it looks at 2n half keys:

    head output a_h = query q_h
        first half   . n row keys --> n row scores --> k best --\
                                                                 P pairs (sums) --> k best slots --> softmax --> weights
        second half  . n col keys --> n col scores --> k best --/

    bank (N, d_v), one for all heads --> z_h = weighted sum of the k entries, the latent
                                         m_h = z_h W_h     (HIVE, head-wise implicit value expansion: a W_h per head)
    output = [m_1 | m_2 | ... | m_H]

Shape names, the same in every file:
    B    batch                     n    keys per half (n_keys)
    T    tokens in a sequence      N    slots = n * n; slot = row * n + col
    H    heads (n_head)            k    slots read per token and head (top_k)
    C    n_embd = H * d_h          d_v  width of an entry of the bank, and of the latent (d_latent)
    d_h  width of a head           P    pairs of ranks that can be among the k best

An example for paper, with n=3, k=2, d_h=4, d_v=2 and one head:
    query (1, 2 | 2, -1)
    row keys (0, 1) (1, 2) (1, -1)    row scores 2  5 -1     best rows 1, 0 with 5, 2
    col keys (2, 0) (0, 1) (1, -1)    col scores 4 -1  3     best cols 0, 2 with 4, 3
    pairs of ranks    (0, 0): 5 + 4 = 9    (0, 1): 5 + 3 = 8    (1, 0): 2 + 4 = 6    (1, 1) cannot be among the best 2
    best slots        row 1, col 0 = 3     row 1, col 2 = 5
    softmax(9, 8)     0.731                0.269
    bank              entry 3 is (4, 0)    entry 5 is (0, 4)    z = (2.924, 1.076)
    W = ((1, 0, 2, 1), (0, 1, 0, -1))                           m = z W = (2.924, 1.076, 5.848, 1.848)

Query, key and value are the memory's; attention came before and left the heads' outputs. Deliberately missing: a query
projection (the head's output *is* the query), 1/sqrt(d) on scores (keys start that small), an output projection or
gate, the residual around the block (model.py's MemoryBlock adds it), any mixing between heads.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")  # FastPool uses it

# ---- 1. The k best of N = n * n slots, without scoring all N --------------------------------------------------------
# The query has two halves, q = [q1 | q2]. Slot (row, col) has the key [r_row | c_col], so its score is
# q . key = q1 . r_row + q2 . c_col: n row scores and n column scores hold all n * n scores as sums.


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks whose sum can be among the k best, as two tensors (P,).

    A rank is a place in a half's list of its k best, 0 for the best. A sum (i, j) is matched or beaten by every
    (i' <= i, j' <= j): (i+1)*(j+1) sums with itself. Where that is more than k, at least k others score as much.
    """
    pairs = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]  # 20 of 64 at k=8, 50 of 256 at 16
    return torch.tensor(pairs, device=device).unbind(1)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """scores (..., n) -> indices (..., k) of the k largest, best first: scores.topk(k).indices, but for ties."""
    # On CPUs topk would be half of the layer's time; numpy's sort takes a third of that, up to n = 256 or so.
    numpy_is_faster = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.size(-1) <= 256
    if torch.compiler.is_compiling() or not numpy_is_faster:
        return scores.topk(k, dim=-1).indices
    order = np.argsort(scores.detach().numpy(), axis=-1)  # (..., n), worst first
    return torch.from_numpy(order[..., -k:]).flip(-1)


def product_key_topk(row_scores: Tensor, col_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots when slot (row, col) scores row_scores[row] + col_scores[col]; exact, any of those that tie.

    The k best rows and k best columns suffice [Lample et al., section 3.1]: a slot in another row is matched or beaten
    by the k slots of its own column in the best rows; and columns likewise.

    row_scores, col_scores: (..., n). Returns scores (..., k), best first, and slots (..., k), int64, row * n + col.
    Gradients flow into both score tensors. Raises ValueError if k is not in 1..n or the shapes differ.

    >>> product_key_topk(torch.tensor([2., 5., -1.]), torch.tensor([4., -1., 3.]), k=2)
    (tensor([9., 8.]), tensor([3, 5]))
    """
    n = row_scores.size(-1)
    if row_scores.shape != col_scores.shape:
        raise ValueError(f"row and column scores differ in shape: {[*row_scores.shape]}, {[*col_scores.shape]}")
    if not 1 <= k <= n:
        raise ValueError(f"top_k must lie between 1 and the number of keys per half, {n}; got {k}")

    # In brackets at the ends of lines: the example above.
    with torch.no_grad():  # which slots are best has no gradient, only their scores have: gathered below
        best_rows, best_cols = topk_indices(row_scores, k), topk_indices(col_scores, k)  # both (..., k): [1, 0], [0, 2]
        i, j = (rank.expand(*best_rows.shape[:-1], -1) for rank in candidate_pairs(k, row_scores.device))  # (..., P)
        sums = row_scores.gather(-1, best_rows).gather(-1, i) + col_scores.gather(-1, best_cols).gather(-1, j)
        winners = topk_indices(sums, k)  # sums (..., P): [9, 8, 6] -> (..., k), numbers of pairs: [0, 1]
        rows = best_rows.gather(-1, i.gather(-1, winners))  # (..., k): pair -> its rank among the rows -> row: [1, 1]
        cols = best_cols.gather(-1, j.gather(-1, winners))  # (..., k): [0, 2]
    return row_scores.gather(-1, rows) + col_scores.gather(-1, cols), rows * n + cols


# ---- 2. Every head searches keys of its own --------------------------------------------------------------------------
class ProductKeys(nn.Module):
    """The product keys of H heads: which slots a head reads, and with which weights.

    keys (2, H, n, d_h/2): for each head n row keys, then n column keys, for N keys of width d_h that are never built.
    Only keys that win get a gradient. query_norm, off by default, is a switch of ours; the paper has none.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int, query_norm: bool = False):
        super().__init__()
        self.top_k, self.query_norm = top_k, query_norm
        bound = (head_dim // 2) ** -0.5
        self.keys = nn.Parameter(torch.empty(2, n_head, n_keys, head_dim // 2).uniform_(-bound, bound))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, T, H, d_h) -> weights (B, T, H, k), fp32, each k summing to 1; slots (B, T, H, k), int64."""
        # fp32 under autocast too: with bf16 scores, 13% of the sets of k=8 slots would be others.
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


# ---- 3. One bank for all heads, one small projection per head --------------------------------------------------------
class HIVE(nn.Module):
    """Head-wise implicit value expansion: turns the bank entries that a head found into that head's values.

    bank (N, d_v) is shared by all heads; proj (H, d_v, d_h) holds one W_h per head. Head h reads as if it owned the
    value table bank @ W_h, (N, d_h) of rank d_v at most, which is never built: summing the k entries first and
    projecting the sum is the same, since both are linear. GPT-2 (H=12, n=128, d_v=64): 1.10M values instead of 12.58M.
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
        """The same without holding the k entries. In fp32: the kernels take no mixed dtypes, and on CUDA no bf16."""
        flat_weights, flat_slots, bank = weights.flatten(0, 2), slots.flatten(0, 2), self.bank.float()  # (B*T*H, k)
        if slots.device.type == "cpu" and not torch.compiler.is_compiling():
            z = FastPool.apply(flat_weights, flat_slots, bank)
        else:
            z = F.embedding_bag(flat_slots, bank, per_sample_weights=flat_weights, mode="sum")
        return z.view(*slots.shape[:3], -1)  # (B*T*H, d_v) -> (B, T, H, d_v)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        """weights, slots (B, T, H, k) -> values m (B, T, H, d_h)."""
        pool = self.pool if slots.device.type == "mps" else self.pool_fast  # embedding_bag is unreliable on MPS
        z = pool(weights, slots).to(self.proj.dtype)  # (B, T, H, d_v)
        return torch.einsum("bthv,hvd->bthd", z, self.proj)  # (B, T, H, d_h)


class FastPool(torch.autograd.Function):
    """The pool of R = B*T*H look-ups, weights and slots (R, k), bank (N, d_v) -> z (R, d_v), with a backward of our own
    for CPUs. Nothing but a part of the layer's speed in training would be lost without it."""

    @staticmethod
    def forward(ctx, weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
        ctx.save_for_backward(weights, slots, bank)
        return F.embedding_bag(slots, bank, per_sample_weights=weights, mode="sum")  # (R, d_v)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, slots, bank = ctx.saved_tensors
        (R, k), reads, N = slots.shape, slots.flatten(), len(bank)  # reads (R * k,)
        # A weight's gradient is grad[r] . bank[slot]: of the product grad @ bank.T, (R, N), only these R * k places.
        csr = torch.arange(0, R * k + 1, k), reads, torch.zeros_like(weights).flatten()  # row starts, columns, values
        places = torch.sparse_csr_tensor(*csr, size=(R, N), check_invariants=False)  # columns come in any order
        grad_weights = torch.sparse.sampled_addmm(places, grad, bank.T, beta=0).values().view(R, k)
        # An entry's gradient is the sum of weight * grad[r] over all that read it: a bag again, one per entry.
        order = reads.int().sort(stable=True).indices  # (R * k,): the reads, sorted by slot
        counts = torch.bincount(reads, minlength=N)  # (N,): how many read each entry
        bags = {"offsets": counts.cumsum(0) - counts, "per_sample_weights": weights.flatten()[order]}
        grad_bank = F.embedding_bag(order // k, grad, mode="sum", **bags)  # (N, d_v); read // k is its look-up
        return grad_weights, None, grad_bank


# ---- 4. The layer ----------------------------------------------------------------------------------------------------
class HeadwiseMemory(nn.Module):
    """HML: every head looks up its own product keys, HIVE turns what they find into values. No head sees another.

    n_head, head_dim, n_keys, top_k, d_latent: H, d_h, n, k, d_v. Raises ValueError where these contradict each other.

        tensor     shape             starts as              gradient at step 0      from step 1
        hive.bank  (N, d_v)          zero                   yes, the entries read   yes, the entries read
        hive.proj  (H, d_v, d_h)     N(0, std d_v^-0.5)     zero                    yes
        keys       (2, H, n, d_h/2)  U(+-(d_h/2)^-0.5)      zero                    yes, the keys that win
        attention  (in model.py)     copied from the base   zero                    yes

    With the bank at zero the layer returns exact zeros, so a model it is inserted into starts as the very same function
    (reports of the paper say so). All that reaches the output through the bank alone, attention too, has gradient zero
    until the bank has moved. With proj at zero as well, neither would ever move. With proj at zero instead, entries
    nobody has read yet would say something random as soon as proj has moved; a zero entry says nothing till trained.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int, d_latent: int, query_norm: bool = False):
        super().__init__()
        if min(n_head, head_dim, n_keys, d_latent) < 1 or head_dim % 2:  # product keys cut the query in two halves
            raise ValueError(f"the head width must be even, not {head_dim}; n_head, n_keys, d_latent at least 1")
        if not 2 <= top_k <= n_keys:  # the softmax over one score is the constant 1: nothing would teach the keys
            raise ValueError(f"top_k must lie between 2 and n_keys, {n_keys}; got {top_k}")
        self.n_head, self.head_dim = n_head, head_dim
        self.product_keys = ProductKeys(n_head, head_dim, n_keys, top_k, query_norm)
        self.hive = HIVE(n_head, head_dim, n_keys * n_keys, d_latent)

    def read(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What each token and head reads: heads (B, T, H, d_h) -> weights, slots, both (B, T, H, k)."""
        if heads.dim() != 4 or heads.shape[2:] != (self.n_head, self.head_dim):
            raise ValueError(f"heads must be (B, T, {self.n_head}, {self.head_dim}), not {tuple(heads.shape)}")
        return self.product_keys(heads)

    def forward(self, heads: Tensor) -> Tensor:
        """heads (B, T, H, d_h), attention output split by head -> (B, T, C), the heads' values side by side."""
        return self.hive(*self.read(heads)).flatten(2)  # (B, T, H, d_h) -> (B, T, C)


# ---- The example, printed --------------------------------------------------------------------------------------------
if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_printoptions(precision=3)
    query, memory = torch.tensor([1.0, 2, 2, -1]), HeadwiseMemory(n_head=1, head_dim=4, n_keys=3, top_k=2, d_latent=2)
    heads = query.view(1, 1, 1, 4)  # (B, T, H, d_h)
    print("with an empty bank    ", memory(heads).flatten())
    memory.product_keys.keys[:] = torch.tensor([[[[0, 1], [1, 2], [1, -1]]], [[[2, 0], [0, 1], [1, -1]]]])
    memory.hive.bank[[3, 5]] = torch.tensor([[4.0, 0], [0, 4]])
    memory.hive.proj[0] = torch.tensor([[1, 0, 2, 1], [0, 1, 0, -1]])
    halves = [keys[0] @ half for keys, half in zip(memory.product_keys.keys, query.chunk(2))]  # each (n,)
    for name, scores in zip(("row", "col"), halves):
        print(f"{name} scores            ", scores, "best", topk_indices(scores, 2), "with", scores.topk(2).values)
    print("pairs that can win    ", *zip(*(ranks.tolist() for ranks in candidate_pairs(2, query.device))))
    print("best scores and slots ", *product_key_topk(*halves, 2))
    print("of all nine sums      ", (halves[0][:, None] + halves[1]).flatten())
    weights, slots = memory.read(heads)
    print("weights and entries   ", weights.flatten(), *memory.hive.bank[slots.flatten()])
    print("latent z              ", memory.hive.pool(weights, slots).flatten())
    print("the head's value m    ", memory(heads).flatten())
