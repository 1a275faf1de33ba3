"""The exercises: the same checks for the reader's attempt (skipped until it is begun) and for one
solution.
"""

import copy
import functools

import pytest
import torch

import exercises
import solutions
from conftest import same_weights
from hml import HeadwiseMemory
from train import make_optimizer, train_step
from upscale import set_trainable, upscale

SIZES = {"n_keys": 6, "top_k": 3, "d_latent": 4}


def exercise(test):
    @pytest.mark.parametrize("work", [exercises, solutions], ids=["yours", "solution"])
    @functools.wraps(test)
    def attempt(work, **fixtures):
        torch.manual_seed(0)
        try:
            test(work, **fixtures)
        except NotImplementedError:
            pytest.skip("not begun: experiments/exercises.py")

    return attempt


@exercise
def test_1_gate(work):
    plain = HeadwiseMemory(2, 8, **SIZES)
    gated = work.GatedMemory(2, 8, **SIZES)
    heads = torch.randn(2, 5, 2, 8)
    assert not gated(heads).any()  # the bank is at zero

    # It has a gate and nothing else more. Every head is half open.
    torch.nn.init.normal_(plain.hive.bank)
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["gate"] and not missing.unexpected_keys
    assert gated.gate.shape == (2, 8) and gated.gate.requires_grad
    torch.testing.assert_close(gated(heads), plain(heads) / 2)

    # The second head decides by its own query.
    gated.gate.data[1] = torch.randn(8)
    expected = plain(heads).view(2, 5, 2, 8).clone()
    expected[:, :, 0] /= 2
    expected[:, :, 1] *= (heads[:, :, 1] @ gated.gate[1]).sigmoid()[..., None]
    torch.testing.assert_close(gated(heads), expected.flatten(2))


@exercise
def test_1_gate_is_trained(work, base, tokens, monkeypatch):
    monkeypatch.setattr(exercises, "GatedMemory", work.GatedMemory)
    model = exercises.gated(base, query="token", **SIZES)
    assert torch.equal(model(tokens), base(tokens))
    set_trainable(model, "new")
    optimizer = make_optimizer(model, 1e-2, 1e-1, 0.1)
    gate = model.h[model.config.new[0]].memory.gate
    train_step(model, optimizer, (tokens, tokens), torch.float32, 1)
    assert not gate.any()
    train_step(model, optimizer, (tokens, tokens), torch.float32, 1)
    assert gate.any(dim=1).all()


@exercise
def test_2_three_way_keys(work):
    for n, k in ((3, 1), (4, 4), (9, 8)):
        parts = [torch.randn(2, 5, n, requires_grad=True) for _ in range(3)]
        scores, slots = work.three_way_topk(*parts, k)
        a, b, c = parts
        whole = a[..., :, None, None] + b[..., None, :, None] + c[..., None, None, :]
        whole = whole.flatten(2)  # (2, 5, n^3)
        best = whole.topk(k)
        assert slots.dtype == torch.int64 and slots.shape == (2, 5, k)
        torch.testing.assert_close(scores, best.values)
        torch.testing.assert_close(whole.gather(-1, slots), best.values)
        assert all(len(set(row)) == k for row in slots.flatten(0, 1).tolist())
        probe = torch.randn(2, 5, k)
        mine = torch.autograd.grad((scores * probe).sum(), parts, retain_graph=True)
        theirs = torch.autograd.grad((best.values * probe).sum(), parts)
        torch.testing.assert_close(mine, theirs)
    _, slots = work.three_way_topk(*torch.randn(3, 1, 2000), 4)  # all sums would take 32 GB
    assert slots.max() < 2000**3


@exercise
def test_3_one_bank(work, base, tokens):
    model = upscale(base, "midus", **SIZES)
    before = sum(p.numel() for p in model.parameters())
    for i in model.config.new:
        torch.nn.init.normal_(model.h[i].memory.hive.bank)
    work.share_bank(model)
    first, second = (model.h[i].memory for i in model.config.new)
    assert before - sum(p.numel() for p in model.parameters()) == 36 * 4
    assert first.hive.bank is second.hive.bank and first.hive.proj is not second.hive.proj
    assert first.product_keys.keys is not second.product_keys.keys

    # The same gradient, taken with two banks and added.
    alone = copy.deepcopy(model)
    banks = [alone.h[i].memory.hive for i in model.config.new]
    banks[1].bank = torch.nn.Parameter(banks[0].bank.detach().clone())
    model(tokens, tokens).backward()
    alone(tokens, tokens).backward()
    torch.testing.assert_close(first.hive.bank.grad, banks[0].bank.grad + banks[1].bank.grad)


@exercise
def test_4_a_method(work, base, tokens):
    kept = copy.deepcopy(base)
    for n_new in (1, 2, 4):
        model = work.my_method(base, n_new)
        new = model.config.new
        assert model.config.n_layer == len(model.h) == 4 + n_new and len(new) == n_new
        old = [block for i, block in enumerate(model.h) if i not in new]
        for ours, theirs in zip(old, base.h, strict=True):
            assert same_weights(ours, theirs)
        for i in new:
            pairs = [zip(model.h[i].parameters(), block.parameters()) for block in base.h]
            copies = [all(torch.equal(p, q) for p, q in pair) for pair in pairs]
            assert not any(copies), "a new block is a plain copy"

        # Everything in the new blocks learns, and the base is left alone.
        loss = model(tokens, tokens)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None for i in new for p in model.h[i].parameters())
        assert not {id(p) for p in model.parameters()} & {id(p) for p in base.parameters()}
    assert same_weights(kept, base)
