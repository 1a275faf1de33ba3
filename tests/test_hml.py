"""The method: exact search, HIVE against its definition, how the layer starts, what it refuses."""

import doctest
import itertools
import math
import re
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

import hml
from hml import (
    HIVE,
    HeadwiseMemory,
    NgramMemory,
    PoolForCPU,
    ProductKeys,
    hashed_slots,
    product_key_topk,
)

SIZES = dict(n_head=2, head_dim=8, n_keys=6, top_k=3, d_latent=4)


@pytest.fixture
def memory():
    """A layer that has something to say."""
    torch.manual_seed(0)
    memory = HeadwiseMemory(**SIZES)
    torch.nn.init.normal_(memory.hive.bank)
    return memory


# ---- The search ----------------------------------------------------------------------------------
def brute_force(row_scores, col_scores):
    """The scores of all n * n slots."""
    return (row_scores[..., :, None] + col_scores[..., None, :]).flatten(-2)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 2), (7, 7), (40, 16), (300, 5)])
def test_the_search_finds_the_k_best_of_all_slots(n, k, ties):
    """Also in lists that are too long for numpy's way."""
    row, col = torch.randn(2, 3, 5, n, generator=torch.Generator().manual_seed(n))
    if ties:  # few distinct values: most pairs tie with others
        row, col = (row * 2).round(), (col * 2).round()
    scores, slots = product_key_topk(row, col, k)
    every = brute_force(row, col)
    best = every.topk(k, dim=-1)
    assert slots.dtype == torch.int64 and slots.shape == (3, 5, k)
    assert torch.equal(scores, best.values)
    assert torch.equal(every.gather(-1, slots), scores)
    assert all(len(set(read.tolist())) == k for read in slots.flatten(0, 1))  # no slot twice
    if not ties:
        assert torch.equal(slots, best.indices)


def test_its_gradient_reaches_both_halves_and_is_that_of_brute_force():
    """In fp32, which takes numpy's way, and by gradcheck in float64, which takes torch's."""
    row, col = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    halves = (row.requires_grad_(), col.requires_grad_())
    push = torch.randn(4, 3)
    ours = torch.autograd.grad(product_key_topk(row, col, 3)[0], halves, push)
    best = brute_force(row, col).topk(3).values
    torch.testing.assert_close(ours, torch.autograd.grad(best, halves, push))

    halves = [half.detach().double().requires_grad_() for half in halves]
    assert torch.autograd.gradcheck(lambda r, c: product_key_topk(r, c, 3)[0], halves)


def test_as_many_pairs_are_candidates_as_the_docstring_says():
    for k, pairs in ((8, 20), (16, 50)):
        assert len(hml.candidate_pairs(k, torch.device("cpu"))[0]) == pairs
        assert f"{pairs} of {k * k}" in hml.candidate_pairs.__doc__


def test_keys_score_like_the_full_product_of_keys():
    """Slot (i, j) of head h scores <query, [row half i | column half j]>."""
    torch.manual_seed(0)
    keys = ProductKeys(n_head=3, head_dim=8, n_keys=5, top_k=4)
    query = torch.randn(2, 6, 3, 8)
    weights, slots = keys(query)
    rows, cols = keys.keys.detach()  # each (H, n, d_h/2)
    pairs = itertools.product(range(5), range(5))
    full = torch.stack([torch.cat((rows[:, i], cols[:, j]), -1) for i, j in pairs], 1)
    best = torch.einsum("bthd,hnd->bthn", query, full).topk(4, dim=-1)
    assert torch.equal(slots, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))


# ---- The values ----------------------------------------------------------------------------------
@pytest.mark.parametrize("slots_in_use", [3, 49])  # all reads alike, or nearly none
def test_the_pool_is_the_definition_in_its_docstring_forward_and_backward(slots_in_use):
    definition = "(weights.unsqueeze(-1) * F.embedding(slots, bank)).sum(-2)"
    assert definition in " ".join(hml.pool.__doc__.split())
    torch.manual_seed(0)
    weights = torch.rand(2, 6, 3, 7).requires_grad_()
    bank = torch.randn(49, 5).requires_grad_()
    slots = torch.randint(0, slots_in_use, (2, 6, 3, 7))  # repeated ones too
    push = torch.randn(2, 6, 3, 5)
    plain = eval(definition, {"F": F}, {"weights": weights, "slots": slots, "bank": bank})
    fast = hml.pool(weights, slots, bank)
    torch.testing.assert_close(fast, plain)
    wanted = torch.autograd.grad(plain, (weights, bank), push)
    torch.testing.assert_close(torch.autograd.grad(fast, (weights, bank), push), wanted)


def test_the_faster_backward_is_torchs_own():
    torch.manual_seed(0)
    weights = torch.rand(6, 3, dtype=torch.double).requires_grad_()
    bank = torch.randn(9, 4, dtype=torch.double).requires_grad_()
    slots = torch.randint(0, 9, (6, 3))
    push = torch.randn(6, 4, dtype=torch.double)
    ours = PoolForCPU.apply(weights, slots, bank)
    theirs = F.embedding_bag(slots, bank, per_sample_weights=weights, mode="sum")
    assert torch.equal(ours, theirs)
    wanted = torch.autograd.grad(theirs, (weights, bank), push)
    torch.testing.assert_close(torch.autograd.grad(ours, (weights, bank), push), wanted)
    assert torch.autograd.gradcheck(lambda w, b: PoolForCPU.apply(w, slots, b), (weights, bank))


def test_hive_equals_a_value_table_per_head():
    torch.manual_seed(0)
    hive = HIVE(n_head=3, head_dim=4, n_slots=16, d_latent=5)
    torch.nn.init.normal_(hive.bank)
    slots = torch.randint(0, 16, (2, 6, 3, 7))
    weights = torch.rand(2, 6, 3, 7)
    tables = torch.einsum("nv,hvd->hnd", hive.bank, hive.proj)  # what HIVE never builds
    values = tables[torch.arange(3)[:, None], slots]  # (B, T, H, k, d_h)
    torch.testing.assert_close(hive(weights, slots), (weights[..., None] * values).sum(-2))


def test_a_model_in_bf16_sums_its_entries_in_fp32():
    """In bf16 0.501 is 0.5 and 0.499 nearly the same: what is left of a difference halves."""
    hive = HIVE(n_head=1, head_dim=2, n_slots=2, d_latent=2).bfloat16()
    hive.proj.data[0] = torch.eye(2)
    hive.bank.data[:] = torch.tensor([[1.0], [-1.0]])
    weights = torch.tensor([0.501, 0.499]).view(1, 1, 1, 2)
    values = hive(weights, torch.tensor([0, 1]).view(1, 1, 1, 2))
    assert values.dtype == torch.bfloat16
    assert values.flatten().tolist() == pytest.approx([0.002, 0.002], rel=0.01)


# ---- The layer -----------------------------------------------------------------------------------
def test_it_starts_as_the_table_in_its_docstring_says():
    torch.manual_seed(0)
    memory = HeadwiseMemory(n_head=4, head_dim=32, n_keys=64, top_k=8, d_latent=100)
    assert not memory.hive.bank.any()
    assert memory.hive.proj.std().item() == pytest.approx(100**-0.5, rel=0.03)
    assert memory.hive.proj.mean().item() == pytest.approx(0, abs=0.003)

    # Uniform up to the bound, so its std is the bound / sqrt(3).
    bound = 16**-0.5
    keys = memory.product_keys.keys
    assert keys.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert keys.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_it_starts_at_zero_and_gradients_come_in_the_documented_order():
    torch.manual_seed(0)
    memory = HeadwiseMemory(**SIZES)
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    target = torch.randn(2, 5, 16)
    tensors = {"query": heads, **dict(memory.named_parameters())}

    def moved():
        loss = ((memory(heads) - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, tensors.values())
        return {name: g for name, g in zip(tensors, gradients) if g.any()}

    assert torch.equal(memory(heads), torch.zeros(2, 5, 16))
    first = moved()
    assert set(first) == {"hive.bank"}
    read = memory.read(heads)[1].unique()
    assert torch.equal(first["hive.bank"].any(1).nonzero().flatten(), read)

    memory.hive.bank.data -= 0.1 * first["hive.bank"]
    assert set(moved()) == {"query", "hive.bank", "hive.proj", "product_keys.keys"}


def test_heads_do_not_see_each_other(memory):
    heads = torch.randn(1, 1, 2, 8)
    changed = heads.clone()
    changed[:, :, 1] += 1
    before = memory(heads)
    after = memory(changed)
    assert torch.equal(before[..., :8], after[..., :8])
    assert not torch.equal(before[..., 8:], after[..., 8:])


def test_under_autocast_the_search_is_in_fp32(memory):
    heads = torch.randn(2, 5, 2, 8)
    wanted = memory.read(heads)
    with torch.autocast("cpu", torch.bfloat16):
        weights, slots = memory.read(heads)
        assert memory(heads).dtype == torch.bfloat16
    assert torch.equal(weights, wanted[0]) and torch.equal(slots, wanted[1])


def test_it_compiles_without_graph_breaks(memory):
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(memory, fullgraph=True, backend="eager")
    tensors = (heads, *memory.parameters())
    wanted = torch.autograd.grad(memory(heads).square().sum(), tensors)
    torch.testing.assert_close(compiled(heads), memory(heads))
    got = torch.autograd.grad(compiled(heads).square().sum(), tensors)
    torch.testing.assert_close(got, wanted)


def test_what_does_not_fit_is_refused(memory):
    scores = torch.randn(2, 5)
    for refused, sentence in (
        (lambda: product_key_topk(scores, torch.randn(2, 4), 2), "differ in shape"),
        (lambda: product_key_topk(scores, scores, 6), "between 1 and the number of keys per half"),
        (lambda: HeadwiseMemory(**SIZES | {"top_k": 1}), "between 2 and n_keys, 6; got 1"),
        (lambda: HeadwiseMemory(**SIZES | {"head_dim": 7}), "the head width must be even, not 7"),
        (lambda: memory(torch.randn(2, 5, 16)), r"heads must be \(B, T, 2, 8\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refused()


# ---- The file ------------------------------------------------------------------------------------


# ---- Slots that the last tokens name -------------------------------------------------------------
def test_hashed_slots_are_the_documented_sum_and_depend_on_the_last_tokens_alone():
    """Against plain Python, whose numbers have no end."""
    tokens = torch.randint(50257, (2, 9), generator=torch.Generator().manual_seed(0))
    for order in (1, 3, 12):
        slots = hashed_slots(tokens, order, 6000)
        for row, found in zip(tokens.tolist(), slots.tolist()):
            for t in range(9):
                mixed = 0
                for j in range(order):
                    token = row[t - j] if t >= j else -1
                    mixed = (mixed * 1_000_003 + token + 7919 * (j + 1)) % (2**31 - 1)
                assert found[t] == mixed * 2_654_435_761 % 2**32 % 6000

    # The same three tokens name the same slot wherever they stand.
    again = torch.cat((tokens[:, 4:7], tokens[:, 4:7]), dim=1)
    slots = hashed_slots(again, 3, 6000)
    assert torch.equal(slots[:, 2], slots[:, 5])
    assert slots.dtype == torch.int64 and len(set(hashed_slots(tokens, 3, 6000)[0].tolist())) > 5


def test_an_ngram_memory_reads_one_entry_for_each_head():
    memory = NgramMemory(n_head=3, head_dim=8, n_slots=50, d_latent=4, orders=(2, 3))
    tokens = torch.randint(99, (2, 7))
    assert memory.orders == [2, 3, 2] and not memory(tokens).any()
    torch.nn.init.normal_(memory.hive.bank)
    out = memory(tokens).view(2, 7, 3, 8)
    for head, order in enumerate(memory.orders):
        entries = memory.hive.bank[hashed_slots(tokens, order, 50)]  # (B, T, d_v)
        torch.testing.assert_close(out[:, :, head], entries @ memory.hive.proj[head])


def test_docstring_examples():
    assert doctest.testmod(hml).failed == 0


def test_one_file_is_enough_and_prints_the_worked_example(root, monkeypatch, capsys):
    """hml.py without the other files: the numbers that its head states, and those by hand."""
    for name in ("common", "data", "model", "upscale", "eval", "train"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    runpy.run_path(str(root / "hml.py"), run_name="__main__")
    numbers = {}
    for line in capsys.readouterr().out.splitlines():
        name, what = line[:24].strip(), line[24:]
        numbers[name] = [float(x) for x in re.findall(r"-?\d+\.?\d*", what)]
    assert numbers["query, in two halves"] == [1, 2, 2, -1]
    assert numbers["with an empty bank"] == [0, 0, 0, 0]
    assert numbers["row scores"] == [2, 5, -1] and numbers["column scores"] == [4, -1, 3]
    assert numbers["best rows and columns"] == [1, 0, 0, 2]
    assert numbers["pairs that can win"] == [0, 0, 0, 1, 1, 0]
    assert numbers["best scores and slots"] == [9, 8, 3, 5]

    # All nine sums, and from there on by hand.
    sums = torch.tensor(numbers["of all nine sums"]).topk(2)
    assert sums.indices.tolist() == [3, 5] and sums.values.tolist() == [9, 8]
    first = 1 / (1 + math.exp(-1))
    assert numbers["weights and entries"] == [round(first, 3), round(1 - first, 3), 4, 0, 0, 4]
    z = torch.tensor([4 * first, 4 * (1 - first)])
    m = z @ torch.tensor([[1.0, 0, 2, 1], [0, 1, 0, -1]])
    for name, tensor in (("latent z", z), ("the head's value m", m)):
        assert numbers[name] == [round(x, 3) for x in tensor.tolist()]
        assert ", ".join(f"{x:.3f}" for x in numbers[name]) in hml.__doc__
