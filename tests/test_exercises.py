"""The exercises.

The same checks for the reader's attempt (skipped until it is begun) and for one solution.
"""

import copy
import functools

import pytest
import torch

import exercises
import solutions
from hml import HeadwiseMemory
from model import GPT, GPTConfig
from upscale import upscale


def exercise(test):
    @pytest.mark.parametrize("work", [exercises, solutions], ids=["yours", "solution"])
    @functools.wraps(test)
    def attempt(work):
        torch.manual_seed(0)
        try:
            test(work)
        except NotImplementedError:
            pytest.skip("not begun: experiments/exercises.py")

    return attempt


def make_base():
    base = GPT(GPTConfig(4, 2, 16, 12, 50))
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return base


@exercise
def test_1_gate(work):
    plain, gated = HeadwiseMemory(2, 8, 6, 3, 4), work.GatedMemory(2, 8, 6, 3, 4)
    heads = torch.randn(2, 5, 2, 8)
    assert not gated(heads).any()  # the bank is at zero
    torch.nn.init.normal_(plain.hive.bank)
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["gate"] and not missing.unexpected_keys
    assert gated.gate.shape == (2, 8) and gated.gate.requires_grad
    torch.testing.assert_close(gated(heads), plain(heads) / 2)
    gated(heads).square().sum().backward()
    assert gated.gate.grad.abs().sum(dim=1).all()
    gated.gate.data[1] = torch.randn(8)
    share = torch.stack(
        [torch.full((2, 5), 0.5), (heads[:, :, 1] @ gated.gate[1]).sigmoid()], dim=-1
    )  # (B, T, H)
    expected = plain(heads).view(2, 5, 2, 8) * share[..., None]
    torch.testing.assert_close(gated(heads), expected.flatten(2))


@exercise
def test_2_three_way_keys(work):
    for n, k in ((3, 1), (4, 4), (7, 3), (9, 8)):
        parts = [torch.randn(2, 5, n, requires_grad=True) for _ in range(3)]
        scores, slots = work.three_way_topk(*parts, k)
        a, b, c = parts
        whole = (a[..., :, None, None] + b[..., None, :, None] + c[..., None, None, :]).flatten(
            2
        )  # (2, 5, n^3)
        best = whole.topk(k)
        assert slots.dtype == torch.int64 and slots.shape == (2, 5, k)
        torch.testing.assert_close(scores, best.values)
        torch.testing.assert_close(whole.gather(-1, slots), best.values)
        assert all(len(set(row)) == k for row in slots.flatten(0, 1).tolist())
        probe = torch.randn(2, 5, k)
        for mine, theirs in zip(
            torch.autograd.grad((scores * probe).sum(), parts, retain_graph=True),
            torch.autograd.grad((best.values * probe).sum(), parts),
        ):
            torch.testing.assert_close(mine, theirs)
    scores, slots = work.three_way_topk(*torch.randn(3, 1, 2000), 4)  # all sums would take 32 GB
    assert slots.max() < 2000**3


@exercise
def test_3_one_bank(work):
    model = upscale(make_base(), "midus", n_keys=6, top_k=3, d_latent=4)
    before = sum(p.numel() for p in model.parameters())
    for i in model.config.new:
        torch.nn.init.normal_(model.h[i].memory.hive.bank)
    work.share_bank(model)
    first, second = (model.h[i].memory for i in model.config.new)
    assert before - sum(p.numel() for p in model.parameters()) == 36 * 4
    assert first.hive.bank is second.hive.bank and first.hive.proj is not second.hive.proj
    assert first.product_keys.keys is not second.product_keys.keys
    tokens = torch.randint(50, (2, 12))
    model(tokens, tokens).backward()
    alone = copy.deepcopy(model)  # the same gradient, taken with two banks and added
    alone.zero_grad()
    banks = [alone.h[i].memory.hive for i in model.config.new]
    banks[1].bank = torch.nn.Parameter(banks[0].bank.detach().clone())
    alone(tokens, tokens).backward()
    torch.testing.assert_close(first.hive.bank.grad, banks[0].bank.grad + banks[1].bank.grad)


@exercise
def test_4_a_method(work):
    base = make_base()
    kept = copy.deepcopy(base.state_dict())
    for n_new in (1, 2, 4):
        model = work.my_method(base, n_new)
        config = model.config
        assert config.n_layer == len(model.h) == 4 + n_new and len(config.new) == n_new
        old = [block for i, block in enumerate(model.h) if i not in config.new]
        for ours, theirs in zip(old, base.h, strict=True):
            assert all(
                torch.equal(a, b)
                for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
            )
        same = [
            all(torch.equal(a, b) for a, b in zip(model.h[i].parameters(), block.parameters()))
            for i in config.new
            for block in base.h
        ]
        assert not any(same), "a new block is a plain copy"
        tokens = torch.randint(50, (2, 12))
        loss = model(tokens, tokens)
        loss.backward()
        assert loss.isfinite() and all(
            p.grad is not None for i in config.new for p in model.h[i].parameters()
        )
        assert not {id(p) for p in model.parameters()} & {id(p) for p in base.parameters()}
    assert all(torch.equal(kept[name], value) for name, value in base.state_dict().items())
