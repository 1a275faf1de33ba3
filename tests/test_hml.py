"""The method: exact search, HIVE against its definition, how the layer starts, what it refuses."""

import ast
import doctest
import itertools
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import hml
from hml import HIVE, HeadwiseMemory, ProductKeys, product_key_topk

SIZES = dict(n_head=2, head_dim=8, n_keys=6, top_k=3, d_latent=4)


@pytest.fixture
def memory():
    """A layer that has something to say."""
    torch.manual_seed(0)
    memory = HeadwiseMemory(**SIZES)
    torch.nn.init.normal_(memory.hive.bank)
    return memory


# ---- The search ----------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_k_best_of_all_slots(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (), generator=generator))
    k = int(torch.randint(1, n + 1, (), generator=generator))
    row, col = torch.randn(2, 3, 5, n, generator=generator)
    if ties:  # few distinct values: most pairs tie with others
        row, col = (row * 2).round(), (col * 2).round()
    scores, slots = product_key_topk(row, col, k)
    every = (row[..., :, None] + col[..., None, :]).flatten(-2)  # of all n * n slots
    best = every.topk(k, dim=-1)
    assert slots.dtype == torch.int64 and slots.shape == (3, 5, k)
    assert torch.equal(scores, best.values)
    assert torch.equal(every.gather(-1, slots), scores)
    assert all(len(set(s.tolist())) == k for s in slots.flatten(0, 1))  # no slot twice
    if not ties:
        assert torch.equal(slots, best.indices)


def test_candidate_pairs_are_the_published_counts():
    for k, pairs in ((8, 20), (16, 50), (32, 119)):
        assert len(hml.candidate_pairs(k, torch.device("cpu"))[0]) == pairs


@pytest.mark.parametrize("n", [3, 64, 256, 257])
def test_topk_is_torchs_forward_and_backward(n):
    """On both sides of the length up to which numpy sorts; places may differ among ties."""
    distinct = torch.randn(4, 7, n, generator=torch.Generator().manual_seed(n))
    for scores in (distinct, (distinct * 2).round(), distinct.transpose(0, 1)):
        best, places = hml.topk(scores, 3)
        assert torch.equal(best, scores.topk(3).values)
        assert torch.equal(scores.gather(-1, places), best)
    assert torch.equal(hml.topk(distinct, 3)[1], distinct.topk(3).indices)

    distinct.requires_grad_()
    push = torch.randn(4, 7, 3)
    (ours,) = torch.autograd.grad(hml.topk(distinct, 3)[0], distinct, push)
    (theirs,) = torch.autograd.grad(distinct.topk(3).values, distinct, push)
    assert torch.equal(ours, theirs)


def test_gradients_of_the_search_reach_both_halves():
    row, col = torch.randn(2, 4, 9, dtype=torch.double).requires_grad_().unbind(0)
    assert torch.autograd.gradcheck(lambda r, c: product_key_topk(r, c, 3)[0], (row, col))


def test_the_search_refuses():
    with pytest.raises(ValueError, match="differ in shape"):
        product_key_topk(torch.randn(2, 4), torch.randn(2, 5), 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the number of keys"):
            product_key_topk(torch.randn(2, 4), torch.randn(2, 4), k)


def test_the_search_works_inside_and_after_inference_mode():
    with torch.inference_mode():
        product_key_topk(torch.randn(2, 30), torch.randn(2, 30), 21)
    row = torch.randn(2, 30, requires_grad=True)
    product_key_topk(row, row, 21)[0].sum().backward()


def test_keys_score_like_the_full_product_of_keys():
    """Slot (i, j) of head h scores <query, [row half i | column half j]>."""
    keys = ProductKeys(n_head=3, head_dim=8, n_keys=5, top_k=4)
    query = torch.randn(2, 6, 3, 8)
    weights, slots = keys(query)
    rows, cols = keys.keys.detach()  # each (H, n, d_h/2)
    pairs = itertools.product(range(5), range(5))
    full = torch.stack([torch.cat((rows[:, i], cols[:, j]), -1) for i, j in pairs], 1)
    best = torch.einsum("bthd,hnd->bthn", query, full).topk(4, dim=-1)
    assert torch.equal(slots, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))


def test_query_norm_makes_scale_and_offset_irrelevant():
    keys = ProductKeys(2, 8, 6, 3, query_norm=True)
    query = torch.randn(1, 4, 2, 8)
    weights, slots = keys(query)
    scaled, same = keys(query * 7 + 3)
    assert torch.equal(slots, same)
    torch.testing.assert_close(weights, scaled, atol=1e-4, rtol=1e-4)


# ---- The values ----------------------------------------------------------------------------------
DEFINITION = "(weights.unsqueeze(-1) * F.embedding(slots, bank)).sum(-2)"


@pytest.mark.parametrize("heads_alike", [False, True])  # all read the same slots, or others
def test_the_pool_is_the_definition_in_its_docstring_forward_and_backward(heads_alike):
    assert DEFINITION in " ".join(hml.pool.__doc__.split())
    torch.manual_seed(0)
    weights = torch.rand(2, 6, 3, 7).requires_grad_()
    bank = torch.randn(49, 5).requires_grad_()
    slots = torch.randint(0, 3 if heads_alike else 49, (2, 6, 3, 7))  # repeated ones too
    push = torch.randn(2, 6, 3, 5)
    plain = eval(DEFINITION, {"F": F}, {"weights": weights, "slots": slots, "bank": bank})
    fast = hml.pool(weights, slots, bank)
    torch.testing.assert_close(fast, plain)
    wanted = torch.autograd.grad(plain, (weights, bank), push)
    torch.testing.assert_close(torch.autograd.grad(fast, (weights, bank), push), wanted)


def test_the_faster_backward_passes_gradcheck():
    torch.manual_seed(0)
    weights = torch.rand(6, 3, dtype=torch.double).requires_grad_()
    bank = torch.randn(9, 4, dtype=torch.double).requires_grad_()
    slots = torch.randint(0, 9, (6, 3))
    pool = hml.PoolForCPU.apply
    assert torch.autograd.gradcheck(lambda w, b: pool(w, slots, b), (weights, bank))


def test_hive_equals_a_value_table_per_head():
    torch.manual_seed(0)
    hive = HIVE(n_head=3, head_dim=4, n_slots=16, d_latent=5)
    torch.nn.init.normal_(hive.bank)
    slots, weights = torch.randint(0, 16, (2, 6, 3, 7)), torch.rand(2, 6, 3, 7)
    tables = torch.einsum("nv,hvd->hnd", hive.bank, hive.proj)  # what HIVE never builds
    values = tables[torch.arange(3)[:, None], slots]  # (B, T, H, k, d_h)
    torch.testing.assert_close(hive(weights, slots), (weights[..., None] * values).sum(-2))


# ---- The layer -----------------------------------------------------------------------------------
def test_the_layer_starts_at_zero_and_gradients_come_in_the_documented_order():
    torch.manual_seed(0)
    memory = HeadwiseMemory(**SIZES)
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    target = torch.randn(2, 5, 16)
    tensors = {"query": heads, **dict(memory.named_parameters())}

    def moved():
        loss = ((memory(heads) - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, tensors.values())
        return {name: g for name, g in zip(tensors, gradients) if g.abs().sum() > 0}

    assert torch.equal(memory(heads), torch.zeros(2, 5, 16))
    first = moved()
    assert set(first) == {"hive.bank"}
    read = set(memory.read(heads)[1].flatten().tolist())
    assert set(first["hive.bank"].abs().sum(1).nonzero().flatten().tolist()) <= read
    memory.hive.bank.data -= 0.1 * first["hive.bank"]
    assert set(moved()) == {"query", "hive.bank", "hive.proj", "product_keys.keys"}


def test_heads_do_not_see_each_other(memory):
    heads = torch.randn(1, 1, 2, 8)
    changed = heads.clone()
    changed[:, :, 1] += 1
    before, after = memory(heads), memory(changed)
    assert torch.equal(before[..., :8], after[..., :8])
    assert not torch.equal(before[..., 8:], after[..., 8:])


def test_under_autocast_and_in_bf16_the_search_is_in_fp32(memory):
    heads = torch.randn(2, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        weights, slots = memory.read(heads)
        assert weights.dtype == torch.float32 and memory(heads).dtype == torch.bfloat16
    assert torch.equal(slots, memory.read(heads)[1])
    assert memory.bfloat16()(heads.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"top_k": 7}, "top_k must lie between 2 and n_keys, 6"),
        ({"top_k": 1}, "top_k must lie between 2 and n_keys"),
        ({"head_dim": 7}, "the head width must be even, not 7"),
        ({"n_keys": 0}, "n_keys and d_latent must be at least 1"),
    ],
)
def test_the_layer_refuses_sizes_that_cannot_be(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        HeadwiseMemory(**{**SIZES, **change})


@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 5, 8, 2), (5, 2, 8)])
def test_the_layer_refuses_a_shape_that_does_not_fit(memory, shape):
    with pytest.raises(ValueError, match=r"heads must be \(B, T, 2, 8\)"):
        memory(torch.randn(shape))


# ---- Tensors without numbers take the plain way --------------------------------------------------
@pytest.fixture
def plain(monkeypatch):
    """The fast ways fail when they are taken."""
    monkeypatch.setattr(hml, "PoolForCPU", None)
    monkeypatch.setattr(hml, "np", None)


def test_the_fast_ways_are_taken_where_they_can_be(memory, plain):
    """Else the tests below would show nothing."""
    with pytest.raises(AttributeError, match="argsort"):
        memory(torch.randn(2, 5, 2, 8))


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)])
def test_an_empty_batch_gives_nothing(memory, plain, shape):
    heads = torch.randn(shape, requires_grad=True)
    out = memory(heads)
    out.sum().backward()
    assert out.shape == (*shape[:2], 16) and heads.grad.shape == shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_looks_up_anew(memory):
    """It must not go on with the slots of the example that it was traced with."""
    traced = torch.jit.trace(memory, (torch.randn(2, 5, 2, 8),), check_trace=False)
    other = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(traced(other), memory(other))


def test_the_layer_inside_torch_func(memory):
    heads = torch.randn(3, 2, 5, 2, 8)  # three batches
    torch.testing.assert_close(torch.func.vmap(memory)(heads)[1], memory(heads[1]))

    def loss(weights):
        return torch.func.functional_call(memory, weights, (heads[0],)).square().sum()

    weights = {name: p.detach() for name, p in memory.named_parameters()}
    gradients = torch.func.grad(loss)(weights)
    memory(heads[0]).square().sum().backward()
    for name, parameter in memory.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_the_layer_on_fake_tensors(plain):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        memory = HeadwiseMemory(**SIZES)
        out = memory(torch.randn(2, 5, 2, 8))
        out.sum().backward()
        assert out.shape == (2, 5, 16) and memory.hive.bank.grad.shape == (36, 4)


def test_meta_tensors_end_in_torchs_own_words():
    """autocast knows no such device; the sentence is torch's."""
    with torch.device("meta"), pytest.raises(RuntimeError, match="unsupported"):
        HeadwiseMemory(**SIZES)(torch.empty(2, 5, 2, 8))


def test_the_layer_compiles_without_graph_breaks(memory):
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    wanted, got = memory(heads), compiled(heads)
    torch.testing.assert_close(got, wanted)
    tensors = (heads, *memory.parameters())
    wanted = torch.autograd.grad(wanted.square().sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), tensors), wanted)


# ---- The file ------------------------------------------------------------------------------------
def test_every_name_is_defined_once(root):
    """Whoever edits the first definition they meet sees a change."""
    tree = ast.parse((root / "hml.py").read_text(encoding="utf-8"))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        for target in getattr(node, "targets", []):
            defined += [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert len(defined) == len(set(defined)) and "topk" in defined and "pool" in defined


def test_docstring_examples():
    assert doctest.testmod(hml).failed == 0


def test_one_file_is_enough_and_prints_the_worked_example(root, tmp_path):
    """hml.py alone in an empty folder: the numbers that its head states, and those by hand."""
    shutil.copyfile(root / "hml.py", tmp_path / "hml.py")
    command = [sys.executable, "hml.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    numbers = {}
    for line in run.stdout.splitlines():
        name, what = line[:24].strip(), line[24:]
        numbers[name] = [float(x) for x in re.findall(r"-?\d+\.?\d*", what)]
    assert numbers["query, in two halves"] == [1, 2, 2, -1]
    assert numbers["with an empty bank"] == [0, 0, 0, 0]
    assert numbers["row scores"] == [2, 5, -1] and numbers["column scores"] == [4, -1, 3]
    assert numbers["best rows and columns"] == [1, 0, 0, 2]
    assert numbers["pairs that can win"] == [0, 0, 0, 1, 1, 0]
    assert numbers["best scores and slots"] == [9, 8, 3, 5]
    sums = torch.tensor(numbers["of all nine sums"]).topk(2)
    assert sums.indices.tolist() == [3, 5] and sums.values.tolist() == [9, 8]
    first = 1 / (1 + math.exp(-1))
    assert numbers["weights and entries"] == [round(first, 3), round(1 - first, 3), 4, 0, 0, 4]
    z = torch.tensor([4 * first, 4 * (1 - first)])
    m = z @ torch.tensor([[1.0, 0, 2, 1], [0, 1, 0, -1]])
    assert numbers["latent z"] == [round(x, 3) for x in z.tolist()]
    assert numbers["the head's value m"] == [round(x, 3) for x in m.tolist()]
    for name in ("latent z", "the head's value m"):
        assert ", ".join(f"{x:.3f}" for x in numbers[name]) in hml.__doc__
