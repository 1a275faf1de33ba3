"""The method: exact search, HIVE against its definition, how the layer starts, what it refuses."""

import doctest
import itertools
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

import hml
from hml import HIVE, HeadwiseMemory, ProductKeys, product_key_topk


def brute_force(row, col, k):
    """Scores all n * n slots.

    row, col (..., n) -> the k best scores, and all scores (..., n * n).
    """
    every = (row[..., :, None] + col[..., None, :]).flatten(-2)
    return every.topk(k, dim=-1).values, every


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_topk_equals_brute_force(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (), generator=generator))
    k = int(torch.randint(1, n + 1, (), generator=generator))
    row, col = torch.randn(2, 3, 5, n, generator=generator)
    if ties:  # few distinct values: most pairs tie with others
        row, col = (row * 2).round(), (col * 2).round()
    scores, slots = product_key_topk(row, col, k)
    best, every = brute_force(row, col, k)
    assert slots.dtype == torch.int64 and slots.shape == (3, 5, k)
    assert torch.equal(scores, best)
    assert torch.equal(every.gather(-1, slots), scores)
    assert all(len(set(s.tolist())) == k for s in slots.flatten(0, 1))  # no slot twice
    if not ties:
        assert torch.equal(slots, every.topk(k, dim=-1).indices)


def test_candidate_pairs_are_the_published_counts():
    for k, pairs in ((8, 20), (16, 50), (32, 119)):
        assert len(hml.candidate_pairs(k, torch.device("cpu"))[0]) == pairs


@pytest.mark.parametrize("n", [3, 64, 256, 257])
def test_the_search_for_cpus_equals_torch_topk(n):
    """On both sides of the length up to which numpy sorts.

    Equal places where scores are distinct, else equal scores.
    """
    distinct = torch.randn(4, 7, n, generator=torch.Generator().manual_seed(n))
    for scores in (distinct, (distinct * 2).round(), distinct.transpose(0, 1)):
        best, places = hml.topk(scores, 3)
        assert torch.equal(best, scores.topk(3).values)
        assert torch.equal(scores.gather(-1, places), best)
    assert torch.equal(hml.topk(distinct, 3)[1], distinct.topk(3).indices)


@pytest.mark.parametrize("n, k", [(2, 2), (20, 8), (64, 8), (128, 16)])
def test_the_search_for_compiled_gpus_equals_torch_topk(n, k):
    """Infinities, NaN and ties included; no place comes twice."""
    generator = torch.Generator().manual_seed(n)
    distinct = torch.randn(3, 5, n, generator=generator)
    holes = torch.rand(3, 5, n, generator=generator)
    some = distinct.masked_fill(holes < 0.3, -math.inf).masked_fill(holes > 0.95, math.inf)
    for scores in (
        distinct,
        (distinct * 2).round(),
        distinct.bfloat16(),
        some,
        some.masked_fill((holes > 0.5) & (holes < 0.6), math.nan),
        torch.full((2, n), -math.inf),
        torch.full((2, n), math.nan),
    ):
        best, places = hml.topk_by_rounds(scores, k)
        wanted = scores.topk(k).values
        torch.testing.assert_close(best, wanted, rtol=0, atol=0, equal_nan=True)
        assert all(len(set(row)) == k for row in places.flatten(0, -2).tolist())
    assert torch.equal(hml.topk_by_rounds(distinct, k)[1], distinct.topk(k).indices)
    scores = torch.randn(4, n, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: hml.topk_by_rounds(s, k)[0], scores)


def test_topk_gradients_reach_both_halves():
    row, col = torch.randn(2, 4, 9, dtype=torch.double).requires_grad_().unbind(0)
    assert torch.autograd.gradcheck(lambda r, c: product_key_topk(r, c, 3)[0], (row, col))


def test_topk_refuses():
    with pytest.raises(ValueError, match="differ in shape"):
        product_key_topk(torch.randn(2, 4), torch.randn(2, 5), 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the number of keys"):
            product_key_topk(torch.randn(2, 4), torch.randn(2, 4), k)


def test_search_works_inside_and_after_inference_mode():
    with torch.inference_mode():
        product_key_topk(torch.randn(2, 30), torch.randn(2, 30), 21)
    row = torch.randn(2, 30, requires_grad=True)
    product_key_topk(row, row, 21)[0].sum().backward()


def test_keys_score_like_the_full_product_of_keys():
    """Slot (i, j) of head h scores <query, [row key i | col key j]>."""
    keys = ProductKeys(n_head=3, head_dim=8, n_keys=5, top_k=4)
    query = torch.randn(2, 6, 3, 8)
    weights, slots = keys(query)
    rows, cols = keys.keys.detach()  # each (H, n, d_h/2)
    full = torch.stack(
        [torch.cat((rows[:, i], cols[:, j]), -1) for i, j in itertools.product(range(5), range(5))],
        1,
    )
    scores = torch.einsum("bthd,hnd->bthn", query, full)
    best = scores.topk(4, dim=-1)
    assert torch.equal(slots, best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))


def test_query_norm_makes_scale_and_offset_irrelevant():
    keys = ProductKeys(2, 8, 6, 3, query_norm=True)
    query = torch.randn(1, 4, 2, 8)
    weights, slots = keys(query)
    scaled, same = keys(query * 7 + 3)
    assert torch.equal(slots, same)
    torch.testing.assert_close(weights, scaled, atol=1e-4, rtol=1e-4)


def test_the_pool_equals_the_definition_forward_and_backward():
    torch.manual_seed(0)
    hive = HIVE(n_head=3, head_dim=4, n_slots=49, d_latent=5)
    torch.nn.init.normal_(hive.bank)
    slots = torch.randint(0, 49, (2, 6, 3, 7))  # repeated slots too
    results = []
    for pool in (hml.plain_pool, hml.pool):
        weights = torch.rand(
            2, 6, 3, 7, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        hive.bank.grad = None
        z = pool(weights, slots, hive.bank)
        (z * torch.arange(5.0)).sum().backward()
        results.append((z.detach(), weights.grad, hive.bank.grad))
    for slow, fast in zip(*results):
        torch.testing.assert_close(fast, slow)


def test_the_pool_passes_gradcheck():
    torch.manual_seed(0)
    weights, bank = (
        torch.rand(6, 3, dtype=torch.double).requires_grad_(),
        torch.randn(9, 4, dtype=torch.double),
    )
    slots = torch.randint(0, 9, (6, 3))
    assert torch.autograd.gradcheck(
        lambda w, b: hml.PoolForCPU.apply(w, slots, b), (weights, bank.requires_grad_())
    )


def test_layer_compiles_without_graph_breaks():
    torch.manual_seed(0)
    memory = HeadwiseMemory(2, 8, 6, 3, 4)
    torch.nn.init.normal_(memory.hive.bank)
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (memory, compiled):
        memory.zero_grad()
        out = layer(heads)
        (heads_grad,) = torch.autograd.grad(out.square().sum(), heads, retain_graph=True)
        out.square().sum().backward()
        results.append(
            (out.detach(), heads_grad, memory.hive.bank.grad.clone(), memory.hive.proj.grad.clone())
        )
    for plain, fast in zip(*results):
        torch.testing.assert_close(plain, fast)


def test_hive_equals_a_value_table_per_head():
    torch.manual_seed(0)
    hive = HIVE(n_head=3, head_dim=4, n_slots=16, d_latent=5)
    torch.nn.init.normal_(hive.bank)
    slots, weights = torch.randint(0, 16, (2, 6, 3, 7)), torch.rand(2, 6, 3, 7)
    tables = torch.einsum("nv,hvd->hnd", hive.bank, hive.proj)  # what HIVE never builds
    values = tables[torch.arange(3)[:, None], slots]  # (B, T, H, k, d_h)
    torch.testing.assert_close(hive(weights, slots), (weights[..., None] * values).sum(-2))


def test_layer_starts_at_zero_and_gradients_come_in_the_documented_order():
    torch.manual_seed(0)
    memory = HeadwiseMemory(n_head=2, head_dim=8, n_keys=6, top_k=3, d_latent=4)
    heads = torch.randn(2, 5, 2, 8, requires_grad=True)
    target = torch.randn(2, 5, 16)

    def gradients():
        for tensor in (heads, *memory.parameters()):
            tensor.grad = None
        ((memory(heads) - target) ** 2).sum().backward()
        tensors = {"query": heads, **dict(memory.named_parameters())}
        return {
            name
            for name, tensor in tensors.items()
            if tensor.grad is not None and tensor.grad.abs().sum() > 0
        }

    assert torch.equal(memory(heads), torch.zeros(2, 5, 16))
    assert gradients() == {"hive.bank"}
    read = set(memory.read(heads)[1].flatten().tolist())
    assert {i for i, g in enumerate(memory.hive.bank.grad) if g.abs().sum() > 0} <= read
    torch.optim.SGD(memory.parameters(), 0.1).step()
    assert gradients() == {"query", "hive.bank", "hive.proj", "product_keys.keys"}


def test_heads_do_not_see_each_other():
    memory = HeadwiseMemory(2, 8, 6, 3, 4)
    torch.nn.init.normal_(memory.hive.bank)
    heads = torch.randn(1, 1, 2, 8)
    changed = heads.clone()
    changed[:, :, 1] += 1
    before, after = memory(heads), memory(changed)
    assert torch.equal(before[..., :8], after[..., :8]) and not torch.equal(
        before[..., 8:], after[..., 8:]
    )


def test_bf16_model_and_autocast_search_in_fp32():
    memory = HeadwiseMemory(2, 8, 6, 3, 4)
    torch.nn.init.normal_(memory.hive.bank)
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
def test_layer_refuses(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        HeadwiseMemory(
            **{"n_head": 2, "head_dim": 8, "n_keys": 6, "top_k": 3, "d_latent": 4, **change}
        )


@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 5, 8, 2), (5, 2, 8)])
def test_layer_refuses_a_shape_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"heads must be \(B, T, 2, 8\)"):
        HeadwiseMemory(2, 8, 6, 3, 4)(torch.randn(shape))


def test_without_its_last_section_the_layer_gives_the_same(root):
    """The head of that section says so."""
    source = (root / "hml.py").read_text(encoding="utf-8")
    complete = {"__name__": "without"}
    exec(source.split("# ---- 5. Speed only")[0], complete)
    results = []
    for layer in (HeadwiseMemory, complete["HeadwiseMemory"]):
        torch.manual_seed(0)
        memory = layer(2, 8, 6, 3, 4)
        torch.nn.init.normal_(memory.hive.bank)
        out = memory(torch.randn(2, 5, 2, 8))
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad for p in memory.parameters())))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain)


def test_docstring_examples():
    assert doctest.testmod(hml).failed == 0


def test_the_worked_example(root):
    """`python hml.py` prints the numbers that the head of the file states, and those of a search by
    hand.
    """
    run = subprocess.run([sys.executable, str(root / "hml.py")], capture_output=True, text=True)
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
    sums = torch.tensor(numbers["of all nine sums"])
    assert sums.topk(2).indices.tolist() == [3, 5] and sums.topk(2).values.tolist() == [9, 8]
    first = 1 / (1 + math.exp(-1))
    assert numbers["weights and entries"] == [round(first, 3), round(1 - first, 3), 4, 0, 0, 4]
    z = torch.tensor([4 * first, 4 * (1 - first)])
    m = z @ torch.tensor([[1.0, 0, 2, 1], [0, 1, 0, -1]])
    assert numbers["latent z"] == [round(x, 3) for x in z.tolist()]
    assert numbers["the head's value m"] == [round(x, 3) for x in m.tolist()]
    for name in ("latent z", "the head's value m"):
        assert ", ".join(f"{x:.3f}" for x in numbers[name]) in hml.__doc__


# ---- Unusual tensors -----------------------------------------------------------------------------
@pytest.fixture
def trained():
    torch.manual_seed(0)
    memory = HeadwiseMemory(2, 8, 6, 3, 4)
    torch.nn.init.normal_(memory.hive.bank)
    return memory


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)])
def test_nothing_in_gives_nothing_out(trained, shape):
    heads = torch.randn(shape, requires_grad=True)
    out = trained(heads)
    assert out.shape == (*shape[:2], 16)
    out.sum().backward()
    assert heads.grad.shape == shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_looks_up_anew(trained):
    """It must not go on with the slots of the example it was traced with."""
    traced = torch.jit.trace(trained, (torch.randn(2, 5, 2, 8),), check_trace=False)
    other = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(traced(other), trained(other))


def test_the_layer_inside_torch_func(trained):
    heads = torch.randn(3, 2, 5, 2, 8)  # three batches
    torch.testing.assert_close(torch.func.vmap(trained)(heads)[1], trained(heads[1]))

    def loss(weights):
        return torch.func.functional_call(trained, weights, (heads[0],)).square().sum()

    weights = {name: p.detach() for name, p in trained.named_parameters()}
    gradients = torch.func.grad(loss)(weights)
    trained(heads[0]).square().sum().backward()
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_the_layer_on_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        memory = HeadwiseMemory(2, 8, 6, 3, 4)
        out = memory(torch.randn(2, 5, 2, 8))
        out.sum().backward()
        assert out.shape == (2, 5, 16) and memory.hive.bank.grad.shape == (36, 4)


def test_meta_tensors_end_in_torchs_own_words():
    """autocast knows no such device; the sentence is torch's."""
    with torch.device("meta"), pytest.raises(RuntimeError, match="unsupported"):
        HeadwiseMemory(2, 8, 6, 3, 4)(torch.empty(2, 5, 2, 8))


def test_one_file_is_enough(tmp_path, root):
    """hml.py alone in an empty folder, with torch and no numpy."""
    shutil.copyfile(root / "hml.py", tmp_path / "hml.py")
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch, hml\n"
        "memory = hml.HeadwiseMemory(12, 64, 32, 8, 16)\n"
        "assert hml.np is None and memory(torch.randn(2, 10, 12, 64)).shape == (2, 10, 768)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
