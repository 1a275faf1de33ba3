# SPDX-License-Identifier: MIT
r"""
The Head-wise Memory Layer (HML) of MIDUS, Memory-Infused Depth Up-Scaling (Kim et al., arXiv
2512.13751), on product keys (Lample et al. 2019, arXiv 1907.05242).

Depth up-scaling takes a pre-trained model, puts new blocks between its old ones, and goes on
pre-training. The new blocks are usually copies of old ones. MIDUS inserts memory blocks instead:

      a transformer block                     a memory block; its x is the left one's output

    x --+--> LayerNorm                      x --+--> LayerNorm             copied from the left
        |    attention (Q, K, V), H heads       |    attention (Q, K, V)   copied from the left
        |    output projection W_O              |    HML: this file
        |        |                              |        |
        +<-------+ sum                          +<-------+ sum
        +--> LayerNorm                          v
        |    feed-forward layer (FFN)
        |        |
        +<-------+ sum
        v

So HML stands in the place of W_O *and* of the second LayerNorm and the FFN. (To copy from the block
on the left, and not from the one on the right, is our choice.) A stack of 12 old blocks is cut into
6 pairs, and one memory block goes into the middle of each, which makes 18. So retrieval is spread
over the whole depth, and no memory block is the last: what it adds is always worked on by an old
block. model.py has both blocks around this layer; the sum at the end is the block's.

Shape names, the same in every file:
    B    batch                     n    rows of the grid of slots, and its columns (n_keys)
    T    tokens in a sequence      N    slots = n * n; slot = row * n + col
    H    heads (n_head)            k    slots read per token and head (top_k)
    C    n_embd = H * d_h          d_v  width of an entry, before W_h (d_latent)
    d_h  width of a head           P    pairs that are summed in the search, see section 1

Attention has queries, keys and values of its own; they did their work before this layer begins.
From here on the three words mean the memory's. The memory has N = n * n slots, to be thought of as
a grid of n rows and n columns. A slot has

    an entry    d_v numbers in a bank that all heads share. It is *latent*: it becomes a value only
                when a head has multiplied it with its own matrix W_h (HIVE, head-wise implicit
                value expansion).
    a key       for each head, d_h numbers: [row half | column half]. All slots in a row of the grid
                have the same row half, all slots in a column the same column half.

A feed-forward layer multiplies every token with all of its weights. A memory layer *looks up*: for
each token, a head takes the k slots whose keys have the largest dot product with its query, and
sums their entries, weighted by a softmax of the k scores. It finds them among n * n slots by
scoring n row halves and n column halves:

    head output a_h = query q_h
        first half  . n row halves --> n row scores --> k best --\
                                                                 P pairs (sums) --> k best slots
        second half . n col halves --> n col scores --> k best --/              --> softmax: weights

    bank (N, d_v), one for all heads --> z_h = sum of weight * entry over the k slots
                                         m_h = z_h W_h, the head's value
    output = [m_1 | m_2 | ... | m_H]

An example to work through by hand, with n=3, k=2, d_h=4, d_v=2 and one head; `python hml.py` prints
it step by step:
    query (1, 2 | 2, -1)
    row halves (0, 1) (1, 2) (1, -1)  row scores 2  5 -1     best rows 1, 0 with 5, 2
    col halves (2, 0) (0, 1) (1, -1)  col scores 4 -1  3     best cols 0, 2 with 4, 3
    the key of slot 5, row 1 and col 2, is (1, 2 | 1, -1); its score is 5 + 3 = 8
    pairs of ranks, not of rows and columns:
                      (0, 0): 5 + 4 = 9    (0, 1): 5 + 3 = 8    (1, 0): 2 + 4 = 6
                      (1, 1) is beaten by the other three: it cannot be among the best 2
    best slots        row 1, col 0 = 3     row 1, col 2 = 5
    softmax(9, 8)     0.731                0.269
    bank              entry 3 is (4, 0)    entry 5 is (0, 4)    z = (2.924, 1.076)
    W = ((1, 0, 2, 1), (0, 1, 0, -1))                    m = z W = (2.924, 1.076, 5.848, 1.848)

What a memory block costs in GPT-2 124M (C=768, H=12) with n=128, k=16, d_v=64:

    parameters      LN 1,536 + QKV 1,771,776 + keys 98,304 + bank 1,048,576 + all W_h 49,152
                    = 2,969,344. A copied block has 7,087,872.
    bank            A token reads at most 12 * 16 * 64 = 12,288 of the bank's 1,048,576 numbers.
    multiplications 1,929,216 per token, 7,077,888 in a copied block; attention's own products left
                    out. Summing k entries and then projecting takes 61,440 of them; projecting the
                    k entries and then summing would give the same and take 798,720.

What an FFN has and HML has not: it mixes features across the whole width C, and puts a
nonlinearity on them. In HML heads never mix, and the only nonlinear step is the choice of slots
with its softmax. We leave out a query projection (what comes in *is* the query), 1/sqrt(d) on
scores (keys start that small), an output projection and a gate.

What comes in is a head's output of attention: the *head query*. model.py can also pass the head's
slice of x + W_O attention(LN(x)): the *token query*. In our study it works better, since it knows
the token at its own place (experiments/README.md).

What is not known, since the paper was not at hand in full: whether queries are normalised; how W_h
starts; whether anything follows the joined values of the heads; which sizes were used at which
width.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- 1. The k best of N = n * n slots, without scoring all N -------------------------------------
# The query has two halves too, q = [q1 | q2], so q . key = q1 . row half + q2 . column half: every
# slot's score is the sum of one row score and one column score.


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of scores (..., n), best first: values and places, both (..., k).

    The same as scores.topk(k), but of equal scores it may take another one.
    """
    # On a CPU numpy's sort takes a third to a half of the time of torch's topk.
    if is_short_list_on_cpu(scores):  # section 5
        order = np.argsort(scores.detach().numpy(), axis=-1)  # (..., n), worst first
        places = torch.from_numpy(order[..., -k:]).flip(-1)  # (..., k), best first
    else:
        places = scores.topk(k, dim=-1).indices  # (..., k), best first

    return scores.gather(-1, places), places


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks whose sum can be among the k best, as two tensors (P,).

    A rank is a place in a half's list of its k best, 0 for the best. Both lists are sorted, so
    every pair (a, b) with a <= i and b <= j scores at least as much as (i, j). There are
    (i+1)*(j+1) of them, itself included; if those are more than k, (i, j) is not needed. That
    leaves 20 of 64 pairs at k=8, 50 of 256 at k=16.
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
    # sums, made once more from the winners alone: so their gradient is k numbers, not P.
    row_ranks = i[winners]  # (..., k)  [0, 0]
    col_ranks = j[winners]  # (..., k)  [0, 1]
    scores = row_best.gather(-1, row_ranks) + col_best.gather(-1, col_ranks)  # (..., k)  [9, 8]
    slots = rows.gather(-1, row_ranks) * n + cols.gather(-1, col_ranks)  # (..., k)  [3, 5]
    return scores, slots


# ---- 2. Every head searches keys of its own ------------------------------------------------------
class ProductKeys(nn.Module):
    """The product keys of H heads: which slots a head reads, and with which weights.

    keys (2, H, n, d_h/2): for each head n row halves, then n column halves. The N keys of width d_h
    that they make are never built. Only halves of a slot that wins get a gradient. They start as
    U(+-(d_h/2)^-0.5) [Lample et al.].

    Nothing makes a head use all its slots. If its queries for different tokens are alike, they read
    the same few slots; halves that take no part get no gradient, so nothing moves them to where
    they would win, and entries that no head reads stay untrained. That is *slot collapse*. eval.py
    counts the slots in use: of 1,024 an average head of ours has about 800 as its first choice
    somewhere in 100,000 tokens if it is healthy, as with the token query, and about 150 if it has
    collapsed, as with the head query.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        bound = (head_dim // 2) ** -0.5
        keys = torch.empty(2, n_head, n_keys, head_dim // 2)
        self.keys = nn.Parameter(keys.uniform_(-bound, bound))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, T, H, d_h) -> weights, fp32, each k summing to 1, and slots: (B, T, H, k)."""
        # In fp32 under autocast too. With scores in bf16, 6.5 to 6.7% of the sets of k=8 slots
        # would differ, on the queries of the README's first run (bench.py --checkpoint).
        with torch.autocast(query.device.type, enabled=False):
            # Each half of the query against the halves of keys that are for it.
            q1, q2 = query.float().chunk(2, dim=-1)  # each (B, T, H, d_h/2)
            row_halves, col_halves = self.keys.float()  # each (H, n, d_h/2)
            row_scores = torch.einsum("bthd,hnd->bthn", q1, row_halves)  # (B, T, H, n)
            col_scores = torch.einsum("bthd,hnd->bthn", q2, col_halves)  # (B, T, H, n)

            scores, slots = product_key_topk(row_scores, col_scores, self.top_k)  # (B, T, H, k)
            return scores.softmax(dim=-1), slots


# ---- 3. One bank for all heads, one small projection per head ------------------------------------
def pool(weights: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    """weights, slots (B, T, H, k), bank (N, d_v) -> z = sum of weight * entry, (B, T, H, d_v).

    The same as (weights.unsqueeze(-1) * F.embedding(slots, bank)).sum(-2), without the copy of k
    entries for every read.
    """
    # embedding_bag sums entries as it fetches them. Its bags are our reads, one of k entries for
    # each token and head.
    flat_weights = weights.flatten(0, 2)  # (R, k) with R = B * T * H reads
    flat_slots = slots.flatten(0, 2)  # (R, k)
    if is_short_list_on_cpu(weights):  # section 5: the same, with a faster backward
        z = PoolForCPU.apply(flat_weights, flat_slots, bank)  # (R, d_v)
    else:
        z = F.embedding_bag(flat_slots, bank, per_sample_weights=flat_weights, mode="sum")
    return z.view(*slots.shape[:3], -1)  # (R, d_v) -> (B, T, H, d_v)


class HIVE(nn.Module):
    """Head-wise implicit value expansion: bank entries that a head found -> that head's values.

    bank (N, d_v) is shared by all heads; proj (H, d_v, d_h) holds one W_h per head. Head h reads as
    if it owned the value table bank @ W_h, (N, d_h). The H tables are never built: summing the k
    entries first and projecting the sum is the same, since both are linear. For GPT-2 (H=12, n=128,
    d_v=64) this stores 1.10M numbers instead of 12.58M.

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
    contradict each other.

        tensor     shape             starts as           gradient at step 0   from step 1
        hive.bank  (N, d_v)          zero                yes, entries read    yes, entries read
        hive.proj  (H, d_v, d_h)     N(0, std d_v^-0.5)  zero                 yes
        keys       (2, H, n, d_h/2)  U(+-(d_h/2)^-0.5)   zero                 yes, keys that win
        this block's LN, attention   copied              zero                 yes

    With the bank at zero the layer returns exact zeros and the block just passes x on: the model
    starts as the base (known from accounts of the paper, not from its text). A head's value is the
    sum of weight * entry @ W_h, and each factor's gradient contains the other two. So at step 0
    only the bank has one: every other gradient has a factor `entry`, which is still zero.

    Why no other start? With bank and W_h both at zero neither would ever get a gradient. With W_h
    at zero and a random bank, once W_h has moved, an entry that is read for the first time adds its
    random start to the output; a zero entry adds nothing.
    """

    def __init__(self, n_head: int, head_dim: int, n_keys: int, top_k: int, d_latent: int):
        super().__init__()
        # Product keys cut the query in two halves.
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"the head width must be even, not {head_dim}")

        # The softmax over one score alone is the constant 1: nothing would teach the keys.
        if not 2 <= top_k <= n_keys:
            raise ValueError(f"top_k must lie between 2 and n_keys, {n_keys}; got {top_k}")

        self.n_head = n_head
        self.head_dim = head_dim
        self.product_keys = ProductKeys(n_head, head_dim, n_keys, top_k)
        self.hive = HIVE(n_head, head_dim, n_keys * n_keys, d_latent)

    def read(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What each token and head reads: heads (B, T, H, d_h) -> weights, slots (B, T, H, k)."""
        if heads.dim() != 4 or heads.shape[2:] != (self.n_head, self.head_dim):
            wanted = f"(B, T, {self.n_head}, {self.head_dim})"
            raise ValueError(f"heads must be {wanted}, not {tuple(heads.shape)}")
        return self.product_keys(heads)

    def forward(self, heads: Tensor) -> Tensor:
        """heads (B, T, H, d_h), the queries split by head -> (B, T, C), their values."""
        weights, slots = self.read(heads)  # both (B, T, H, k)
        return self.hive(weights, slots).flatten(2)  # (B, T, H, d_h) -> (B, T, C), side by side


# ---- Another way to find a slot ------------------------------------------------------------------
# A memory need not be searched. Here the last few tokens name the slot themselves: their ids are
# mixed into one number, a hash, and its remainder by N is the slot. Not the paper's: ours, after
# hashed n-gram embeddings (Engram, arXiv 2601.07372). HIVE turns entries into values as before.


def hashed_slots(tokens: Tensor, order: int, n_slots: int) -> Tensor:
    """The slot that the last `order` tokens name, at every place: (B, T) -> (B, T), int64.

    The same tokens always name the same slot. Two n-grams may share one; what they have learned is
    then mixed. Every number below stays under 2^63, so this is exact, on every device the same.
    """
    # Multiply and add, from the token itself back to the earliest; -1 stands before the text.
    padded = F.pad(tokens, (order - 1, 0), value=-1)  # (B, order - 1 + T)
    mixed = torch.zeros_like(tokens)
    for j in range(order):
        token = padded[:, order - 1 - j :][:, : tokens.size(1)]  # (B, T), the token j places back
        mixed = (mixed * 1_000_003 + token + 7919 * (j + 1)) % (2**31 - 1)

    # Once more, so that neighbouring numbers do not lie in neighbouring slots.
    return mixed * 2_654_435_761 % 2**32 % n_slots


class NgramMemory(nn.Module):
    """HIVE, with slots that the last tokens name: no query, no keys, no search, no attention.

    Head h reads the slot of the last orders[h] tokens, one slot only, with weight 1. So there is
    nothing to learn but the bank and the heads' projections, and slots can be had before the model
    runs. orders may be shorter than the heads: they take turns.
    """

    def __init__(
        self, n_head: int, head_dim: int, n_slots: int, d_latent: int, orders: tuple[int, ...]
    ):
        super().__init__()
        self.orders = [orders[head % len(orders)] for head in range(n_head)]
        self.hive = HIVE(n_head, head_dim, n_slots, d_latent)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, C), the heads' values side by side."""
        n_slots = len(self.hive.bank)
        slots = [hashed_slots(tokens, order, n_slots) for order in self.orders]  # H times (B, T)
        slots = torch.stack(slots, dim=-1).unsqueeze(-1)  # (B, T, H, 1)
        weights = torch.ones(slots.shape, device=tokens.device)  # (B, T, H, 1)
        return self.hive(weights, slots).flatten(2)  # (B, T, H, d_h) -> (B, T, C)


# ---- The example of this file's head -------------------------------------------------------------
@torch.no_grad()
def show_example() -> None:
    """Prints the example of the docstring, step by step."""

    def show(name: str, *tensors: Tensor) -> None:
        lists = [[round(x, 3) for x in tensor.flatten().tolist()] for tensor in tensors]
        print(f"{name:24}", *lists)

    # Query, halves of keys, entries and W as in the docstring.
    print("one head, 3 x 3 slots, k = 2; the head of this file explains each line")
    query = torch.tensor([1.0, 2, 2, -1])
    row_halves = torch.tensor([[0.0, 1], [1, 2], [1, -1]])
    col_halves = torch.tensor([[2.0, 0], [0, 1], [1, -1]])
    entries = torch.tensor([[4.0, 0], [0.0, 4]])
    proj = torch.tensor([[1.0, 0, 2, 1], [0, 1, 0, -1]])
    show("query, in two halves", query[:2], query[2:])
    show("row halves", *row_halves)
    show("column halves", *col_halves)
    show("bank, entries 3 and 5", *entries)
    show("projection W", *proj)

    heads = query.view(1, 1, 1, 4)  # (B, T, H, d_h)
    memory = HeadwiseMemory(n_head=1, head_dim=4, n_keys=3, top_k=2, d_latent=2)
    show("with an empty bank", memory(heads))
    memory.product_keys.keys[:] = torch.stack((row_halves, col_halves))[:, None]  # (2, H, n, d_h/2)
    memory.hive.bank[[3, 5]] = entries
    memory.hive.proj[0] = proj

    # The search, and beside it all nine sums that it does not need.
    row_scores = row_halves @ query[:2]  # (n,)
    col_scores = col_halves @ query[2:]  # (n,)
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


# ---- 5. Speed only: you may stop here ------------------------------------------------------------
# On a CPU topk and pool use faster code where this is true. numpy cannot read bf16 or what is being
# compiled, and for long lists it is no faster.
def is_short_list_on_cpu(numbers: Tensor) -> bool:
    """Whether numbers (..., n) are in fp32 on a CPU, at most 256 in a list, and not compiled."""
    on_cpu = numbers.device.type == "cpu" and numbers.dtype == torch.float32
    return on_cpu and numbers.size(-1) <= 256 and not torch.compiler.is_compiling()


# With torch's own backward of embedding_bag a training step of this layer takes 1.2 to 1.4 times as
# long on a CPU (experiments/speed.md).
class PoolForCPU(torch.autograd.Function):
    """embedding_bag with weights, and a backward that CPUs do sooner."""

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
        # grad @ bank.T, (R, N), are computed. torch warns that such tensors are in beta.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places = torch.sparse_csr_tensor(
                crow_indices=torch.arange(0, R * k + 1, k),
                col_indices=reads,
                values=torch.zeros_like(weights).flatten(),
                size=(R, N),
                check_invariants=False,  # the columns come in any order
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
