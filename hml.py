r"""
The Head-wise Memory Layer (HML) of MIDUS, Memory-Infused Depth Up-Scaling (Kim et al., arXiv
2512.13751), on product keys (Lample et al. 2019, arXiv 1907.05242).

Depth up-scaling takes a pre-trained model, puts new blocks between its old ones, and goes on
pre-training. The new blocks are usually copies of old ones. MIDUS inserts memory blocks instead,
each right after the transformer block that it copies from:

      a transformer block                     a memory block; its x is what the left one puts out

    x --+--> LayerNorm                      x --+--> LayerNorm             copied from the left
        |    attention (Q, K, V), H heads       |    attention (Q, K, V)   copied from the left
        |    output projection W_O              |    (no W_O: the H head outputs stay apart)
        |        |                              |    HML: each head looks up what it needs
        +<-------+ sum                          |        |
        |                                       +<-------+ sum
        +--> LayerNorm                          |
        |    feed-forward layer (FFN)           |    (no second LayerNorm, no FFN)
        |        |                              v
        +<-------+ sum
        v

This file is the HML line on the right; model.py has both blocks around it. The residual connection,
the long line from x to the sum, is the block's and not the layer's. `python hml.py` walks through
the example below.

A feed-forward layer multiplies every token with all of its weights. A memory layer *looks up*
instead. A slot is a place in a bank. It has one entry (its row of the bank, which all heads share)
and one key per head. For each token, a head reads only the k slots whose keys have the largest dot
product with its query; to find them among N = n * n slots it scores 2n half keys:

    head output a_h = query q_h
        first half  . n row keys --> n row scores --> k best --\
                                                                P pairs (sums) --> k best slots
        second half . n col keys --> n col scores --> k best --/               --> softmax: weights

    bank (N, d_v), one for all heads --> z_h = weighted sum of the k entries, the latent
                                         m_h = z_h W_h     (HIVE: a W_h per head)
    output = [m_1 | m_2 | ... | m_H]

Shape names, the same in every file:
    B    batch                     n    keys per half (n_keys)
    T    tokens in a sequence      N    slots = n * n; slot = row * n + col
    H    heads (n_head)            k    slots read per token and head (top_k)
    C    n_embd = H * d_h          d_v  width of an entry of the bank, and of the latent (d_latent)
    d_h  width of a head           P    pairs (i-th best row, j-th best col) that can win

An example to work through by hand, with n=3, k=2, d_h=4, d_v=2 and one head:
    query (1, 2 | 2, -1)
    row keys (0, 1) (1, 2) (1, -1)    row scores 2  5 -1     best rows 1, 0 with 5, 2
    col keys (2, 0) (0, 1) (1, -1)    col scores 4 -1  3     best cols 0, 2 with 4, 3
    pairs of ranks    (0, 0): 5 + 4 = 9    (0, 1): 5 + 3 = 8    (1, 0): 2 + 4 = 6
                      (1, 1) is beaten by the other three: it cannot be among the best 2
    best slots        row 1, col 0 = 3     row 1, col 2 = 5
    softmax(9, 8)     0.731                0.269
    bank              entry 3 is (4, 0)    entry 5 is (0, 4)    z = (2.924, 1.076)
    W = ((1, 0, 2, 1), (0, 1, 0, -1))                    m = z W = (2.924, 1.076, 5.848, 1.848)

Query, key and value here mean the memory's; attention's own were used before this layer starts.
Deliberately missing: a query projection (the head's output *is* the query), 1/sqrt(d) on scores
(keys start that small), an output projection or gate, any mixing between heads.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import numpy as np  # only the last section uses it
except ImportError:
    np = None

# ---- 1. The k best of N = n * n slots, without scoring all N -------------------------------------
# The query has two halves, q = [q1 | q2]. Slot (row, col) has the key [r_row | c_col], so its score
# is q . key = q1 . r_row + q2 . c_col: n row scores and n column scores hold all n * n as sums.


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of scores (..., n), best first: values and places, both (..., k)."""
    return scores.topk(k, dim=-1)


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks whose sum can be among the k best, as two tensors (P,).

    A rank is a place in a half's list of its k best, 0 for the best. Both lists are sorted, so a
    pair with no larger rank in either place scores at least as much. (i, j) has (i+1)*(j+1) such
    pairs, itself included; if that is over k, it is not needed. That leaves 20 of 64 pairs at k=8,
    50 of 256 at k=16.
    """
    pairs = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    return torch.tensor(pairs, device=device).unbind(1)


def product_key_topk(row_scores: Tensor, col_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots when slot (row, col) scores row_scores[row] + col_scores[col]; exact.

    The k best rows and k best columns suffice [Lample et al., section 3.1]: a slot in another row
    is matched or beaten by the k slots of its own column in the best rows; and columns likewise.

    row_scores, col_scores: (..., n). Returns scores (..., k), best first, and slots (..., k),
    int64, row * n + col; among ties, any. Gradients flow into both score tensors. Raises
    ValueError if k is not in 1..n or the shapes differ.

    >>> product_key_topk(torch.tensor([2., 5., -1.]), torch.tensor([4., -1., 3.]), k=2)
    (tensor([9., 8.]), tensor([3, 5]))
    """
    n = row_scores.size(-1)
    if row_scores.shape != col_scores.shape:
        shapes = f"{tuple(row_scores.shape)} and {tuple(col_scores.shape)}"
        raise ValueError(f"row and column scores differ in shape: {shapes}")
    if not 1 <= k <= n:
        raise ValueError(f"top_k must lie between 1 and the number of keys per half, {n}; got {k}")

    # In brackets: the example above.
    row_best, rows = topk(row_scores, k)  # both (..., k)  [5, 2] and [1, 0]
    col_best, cols = topk(col_scores, k)  # both (..., k)  [4, 3] and [0, 2]
    i, j = candidate_pairs(k, row_scores.device)  # both (P,)  [0, 0, 1] and [0, 1, 0]
    sums = row_best[..., i] + col_best[..., j]  # (..., P)  [9, 8, 6]
    _, winners = topk(sums, k)  # (..., k), numbers of pairs  [0, 1]

    # A winning pair names a rank among the rows and one among the columns. The scores are the same
    # sums, made once more from the winners alone, which makes their gradient cheap.
    row_ranks = i[winners]  # (..., k)  [0, 0]
    col_ranks = j[winners]  # (..., k)  [0, 1]
    scores = row_best.gather(-1, row_ranks) + col_best.gather(-1, col_ranks)  # (..., k)  [9, 8]
    slots = rows.gather(-1, row_ranks) * n + cols.gather(-1, col_ranks)  # (..., k)  [3, 5]
    return scores, slots


# ---- 2. Every head searches keys of its own ------------------------------------------------------
class ProductKeys(nn.Module):
    """The product keys of H heads: which slots a head reads, and with which weights.

    keys (2, H, n, d_h/2): for each head n row keys, then n column keys, for N keys of width d_h
    that are never built. Only keys that win get a gradient. They start as U(+-(d_h/2)^-0.5) [Lample
    et al.]. query_norm, off by default, is a switch of ours; the paper has none.

    Nothing makes a head use all its slots. If its outputs for different tokens are alike, they read
    the same few slots; the other keys get no gradient, so nothing moves them to where they would
    win, and entries that no head reads stay untrained. That is *slot collapse*; eval.py counts the
    slots in use.
    """

    def __init__(
        self, n_head: int, head_dim: int, n_keys: int, top_k: int, query_norm: bool = False
    ):
        super().__init__()
        self.top_k = top_k
        self.query_norm = query_norm
        bound = (head_dim // 2) ** -0.5
        keys = torch.empty(2, n_head, n_keys, head_dim // 2)
        self.keys = nn.Parameter(keys.uniform_(-bound, bound))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, T, H, d_h) -> weights, fp32, each k summing to 1, and slots: (B, T, H, k)."""
        # In fp32 under autocast too: scores in bf16 would change 13% of the sets of k=8 slots. But
        # where torch is set to use TF32, it does so here: 0.6% of the sets of k=16 (simulated).
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            if self.query_norm:
                query = F.layer_norm(query, query.shape[-1:])  # (B, T, H, d_h), no learned weights

            # Each half of the query against the half keys that are for it.
            q1, q2 = query.chunk(2, dim=-1)  # each (B, T, H, d_h/2)
            row_keys, col_keys = self.keys.float()  # each (H, n, d_h/2)
            row_scores = torch.einsum("bthd,hnd->bthn", q1, row_keys)  # (B, T, H, n)
            col_scores = torch.einsum("bthd,hnd->bthn", q2, col_keys)  # (B, T, H, n)

            # The weights of a read are a softmax over the k slots that won, not over all.
            scores, slots = product_key_topk(row_scores, col_scores, self.top_k)  # (B, T, H, k)
            return scores.softmax(dim=-1), slots


# ---- 3. One bank for all heads, one small projection per head ------------------------------------
# What a head gets is the sum of its k entries, by weight, through a small matrix of its own.


def pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    """weights, slots (B, T, H, k), bank (N, d_v) -> z = sum of weight * entry, (B, T, H, d_v)."""
    entries = F.embedding(slots, bank)  # (B, T, H, k, d_v)
    return (weights.unsqueeze(-1) * entries).sum(dim=-2)  # (B, T, H, d_v)


class HIVE(nn.Module):
    """Head-wise implicit value expansion: bank entries that a head found -> that head's values.

    bank (N, d_v) is shared by all heads; proj (H, d_v, d_h) holds one W_h per head. Head h reads as
    if it owned the value table bank @ W_h, (N, d_h) of rank d_v at most. That table is never built:
    summing the k entries first and projecting the sum is the same, since both are linear. For GPT-2
    (H=12, n=128, d_v=64) this stores 1.10M values instead of 12.58M.

    The bank gets no weight decay in training (train.py): decay shrinks all entries at every step,
    but only entries that are read get a gradient to restore them.
    """

    def __init__(self, n_head: int, head_dim: int, n_slots: int, d_latent: int):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(n_slots, d_latent))
        self.proj = nn.Parameter(torch.randn(n_head, d_latent, head_dim) * d_latent**-0.5)

    def forward(self, weights: Tensor, slots: Tensor) -> Tensor:
        """weights, slots (B, T, H, k) -> values m (B, T, H, d_h)."""
        # Summed in fp32, even if the model is kept in bf16.
        z = pool(weights, slots, self.bank.float())  # (B, T, H, d_v)
        return torch.einsum("bthv,hvd->bthd", z.to(self.proj.dtype), self.proj)  # (B, T, H, d_h)


# ---- 4. The layer --------------------------------------------------------------------------------
class HeadwiseMemory(nn.Module):
    """HML: every head looks up its own product keys, HIVE turns what they find into values.

    n_head, head_dim, n_keys, top_k, d_latent: H, d_h, n, k, d_v. Raises ValueError where these
    contradict each other. No head sees another.

        tensor     shape             starts as           gradient at step 0   from step 1
        hive.bank  (N, d_v)          zero                yes, entries read    yes, entries read
        hive.proj  (H, d_v, d_h)     N(0, std d_v^-0.5)  zero                 yes
        keys       (2, H, n, d_h/2)  U(+-(d_h/2)^-0.5)   zero                 yes, keys that win
        this block's LN, attention   copied              zero                 yes

    With the bank at zero the layer returns exact zeros and the block just passes x on: the model
    starts as the base (known from accounts of the paper, not from its text). A head's value is the
    sum of weight * entry @ W_h, and each factor's gradient contains the other two. So at step 0
    only the bank has one: for W_h, and for the weights with the keys and the attention behind them,
    the other factors include entries that are still zero.

    Both at zero: neither would ever get a gradient. W_h alone at zero: once W_h has moved, an entry
    read for the first time adds its random start to the output; a zero entry adds nothing.
    """

    def __init__(
        self,
        n_head: int,
        head_dim: int,
        n_keys: int,
        top_k: int,
        d_latent: int,
        query_norm: bool = False,
    ):
        super().__init__()
        if min(n_head, n_keys, d_latent) < 1:
            raise ValueError("n_head, n_keys and d_latent must be at least 1")

        # Product keys cut the query in two halves.
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"the head width must be even, not {head_dim}")

        # The softmax over one score alone is the constant 1: nothing would teach the keys.
        if not 2 <= top_k <= n_keys:
            raise ValueError(f"top_k must lie between 2 and n_keys, {n_keys}; got {top_k}")

        self.n_head = n_head
        self.head_dim = head_dim
        self.product_keys = ProductKeys(n_head, head_dim, n_keys, top_k, query_norm)
        self.hive = HIVE(n_head, head_dim, n_keys * n_keys, d_latent)

    def read(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What each token and head reads: heads (B, T, H, d_h) -> weights, slots (B, T, H, k)."""
        if heads.dim() != 4 or heads.shape[2:] != (self.n_head, self.head_dim):
            wanted = f"(B, T, {self.n_head}, {self.head_dim})"
            raise ValueError(f"heads must be {wanted}, not {tuple(heads.shape)}")
        return self.product_keys(heads)

    def forward(self, heads: Tensor) -> Tensor:
        """heads (B, T, H, d_h), attention's output split by head -> (B, T, C), their values."""
        weights, slots = self.read(heads)  # both (B, T, H, k)
        return self.hive(weights, slots).flatten(2)  # (B, T, H, d_h) -> (B, T, C), side by side


@torch.no_grad()
def show_example() -> None:
    """Prints the example of the docstring, step by step."""

    def show(name: str, *tensors: Tensor) -> None:
        lists = [[round(x, 3) for x in tensor.flatten().tolist()] for tensor in tensors]
        print(f"{name:24}", *lists)

    # Query, keys, entries and W as in the docstring.
    print("one head, 3 x 3 slots, k = 2; the head of this file explains each line")
    query = torch.tensor([1.0, 2, 2, -1])
    row_keys = torch.tensor([[0.0, 1], [1, 2], [1, -1]])
    col_keys = torch.tensor([[2.0, 0], [0, 1], [1, -1]])
    entries = torch.tensor([[4.0, 0], [0.0, 4]])
    proj = torch.tensor([[1.0, 0, 2, 1], [0, 1, 0, -1]])
    show("query, in two halves", query[:2], query[2:])
    show("row keys", *row_keys)
    show("column keys", *col_keys)
    show("bank, entries 3 and 5", *entries)
    show("projection W", *proj)

    heads = query.view(1, 1, 1, 4)  # (B, T, H, d_h)
    memory = HeadwiseMemory(n_head=1, head_dim=4, n_keys=3, top_k=2, d_latent=2)
    show("with an empty bank", memory(heads))
    memory.product_keys.keys[:] = torch.stack((row_keys, col_keys))[:, None]  # (2, H, n, d_h/2)
    memory.hive.bank[[3, 5]] = entries
    memory.hive.proj[0] = proj

    # The search, and beside it all nine sums that it does not need.
    row_scores = row_keys @ query[:2]  # (n,)
    col_scores = col_keys @ query[2:]  # (n,)
    show("row scores", row_scores)
    show("column scores", col_scores)
    show("best rows and columns", topk(row_scores, 2)[1], topk(col_scores, 2)[1])
    show("pairs that can win", *torch.stack(candidate_pairs(2, query.device), dim=1))
    show("best scores and slots", *product_key_topk(row_scores, col_scores, 2))
    show("of all nine sums", row_scores[:, None] + col_scores)

    # What is read, and what becomes of it.
    weights, slots = memory.read(heads)
    show("weights and entries", weights, *memory.hive.bank[slots.flatten()])
    show("latent z", pool(weights, slots, memory.hive.bank))
    show("the head's value m", memory(heads))


# ---- 5. Speed only: stop here --------------------------------------------------------------------
# The layer is complete; skip this on a first reading. A second `topk` and a second `pool` take the
# place of the first: the code above looks the names up at each call. Results are the same, but for
# ties and rounding. Beside each stands how many times as long a training step of the tiny model
# takes without it, on one CPU core: `python experiments/bench.py --tables tricks --dtype bfloat16`.
plain_topk = topk
plain_pool = pool

# PoolForCPU's backward uses a kind of tensor that PyTorch warns about.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def has_numbers(tensor: Tensor) -> bool:
    """Whether there are numbers behind a tensor: none is fake, traced, or inside torch.func."""
    if torch.jit.is_tracing() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """plain_topk: on a CPU by a sort in numpy, compiled for a GPU by rounds; for short rows."""
    short_rows = scores.size(-1) <= 256
    if torch.compiler.is_compiling():
        by_rounds = scores.is_cuda and short_rows
        return topk_by_rounds(scores, k) if by_rounds else plain_topk(scores, k)
    sortable = scores.device.type == "cpu" and scores.dtype == torch.float32 and np is not None
    if not sortable or not short_rows or not has_numbers(scores):
        return plain_topk(scores, k)

    # Without it: 1.09.
    order = np.argsort(scores.detach().numpy(), axis=-1)  # (..., n), worst first
    places = torch.from_numpy(order[..., -k:]).flip(-1)  # (..., k), best first
    return scores.gather(-1, places), places


def topk_by_rounds(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """plain_topk as k rounds of a search for the largest that is left.

    torch.compile can make one kernel of all rounds, which reads a row once; topk on CUDA takes a
    thread block for a row. [not measured yet: experiments/gpu.py]
    """
    n = scores.size(-1)
    every_place = torch.arange(n, device=scores.device)  # (n,)
    row = scores.detach()
    taken = torch.zeros_like(row, dtype=torch.bool)  # (..., n)
    places = []
    for _ in range(k):
        # The largest that is left, and the first place that has it. NaN is larger than all, as in
        # topk, and equal to nothing; a place that is taken does not come again for its -inf.
        largest = row.masked_fill(taken, -math.inf).amax(dim=-1, keepdim=True)  # (..., 1)
        has_it = (row == largest) | (row.isnan() & largest.isnan())  # (..., n)
        place = every_place.where(has_it & ~taken, n).amin(dim=-1, keepdim=True)  # (..., 1)
        taken = taken | (every_place == place)
        places.append(place)
    places = torch.cat(places, dim=-1)  # (..., k), best first
    return scores.gather(-1, places), places


def pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    """plain_pool without a copy of the k entries of every read. Without it: 1.21."""
    device_type = slots.device.type
    compiling = torch.compiler.is_compiling()
    if device_type == "mps" or not (compiling or has_numbers(weights)):
        return plain_pool(weights, slots, bank)  # embedding_bag is unreliable on mps

    # A bag is a read: the k entries of one token and head, summed as they are fetched.
    flat_weights = weights.flatten(0, 2)  # (R, k) with R = B * T * H reads
    flat_slots = slots.flatten(0, 2)  # (R, k)
    if device_type == "cpu" and not compiling:
        z = PoolForCPU.apply(flat_weights, flat_slots, bank)  # (R, d_v)
    else:
        z = F.embedding_bag(flat_slots, bank, per_sample_weights=flat_weights, mode="sum")
    return z.view(*slots.shape[:3], -1)  # (R, d_v) -> (B, T, H, d_v)


class PoolForCPU(torch.autograd.Function):
    """embedding_bag with weights, and a backward that CPUs do sooner. Without it: 1.05."""

    @staticmethod
    def forward(ctx, weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
        """weights, slots (R, k), bank (N, d_v) -> z (R, d_v)."""
        ctx.save_for_backward(weights, slots, bank)
        return F.embedding_bag(slots, bank, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, slots, bank = ctx.saved_tensors
        R, k = slots.shape
        N = len(bank)
        reads = slots.flatten()  # (R * k,)

        # A weight's gradient is grad[r] . bank[slot]: only these R * k places of the product
        # grad @ bank.T, (R, N), are computed.
        places = torch.sparse_csr_tensor(
            crow_indices=torch.arange(0, R * k + 1, k),
            col_indices=reads,
            values=torch.zeros_like(weights).flatten(),
            size=(R, N),
            check_invariants=False,  # the columns of a row come in any order
        )
        products = torch.sparse.sampled_addmm(places, grad, bank.T, beta=0)
        grad_weights = products.values().view(R, k)

        # An entry's gradient is the sum of weight * grad[r] over all reads of it: a bag per entry,
        # whose members are the reads in the order of their slots.
        order = reads.int().sort(stable=True).indices  # (R * k,)
        counts = torch.bincount(reads, minlength=N)  # (N,)
        grad_bank = F.embedding_bag(
            order // k,  # the number of a read's row in grad
            grad,
            offsets=counts.cumsum(0) - counts,
            per_sample_weights=weights.flatten()[order],
            mode="sum",
        )  # (N, d_v)
        return grad_weights, None, grad_bank


if __name__ == "__main__":
    show_example()
