"""The benchmark runs, in its short form, and its counts are right; baselines are what they say."""

import json
import subprocess
import sys

import pytest
import torch

import baselines
import bench
import compare


# ---- bench.py ------------------------------------------------------------------------------------
def test_bench_runs_and_prints_every_table(root, tmp_path):
    tables = ["tricks", "saved", "blocks", "layers", "overhead", "profile"]
    run = subprocess.run(
        [
            sys.executable,
            str(root / "experiments" / "bench.py"),
            "--quick",
            "--json",
            "b.json",
            "--tables",
            ",".join(tables),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["tables"]) == len(tables) and all(t["rows"] for t in written["tables"])
    assert all(f"### {t['title']}" in run.stdout for t in written["tables"])


def test_block_costs_are_those_of_real_blocks():
    with torch.device("meta"):
        for n, k in bench.SIZES:
            counted = bench.block_costs(512, n, k)
            blocks = bench.make_blocks(torch.device("meta"), n, k)
            for name, block in zip(("copied", "memory"), blocks):
                assert counted[name]["parameters"] == sum(p.numel() for p in block.parameters())


def test_the_textbook_form_computes_the_same():
    torch.manual_seed(0)
    ours, textbook = (cls(2, 8, 6, 3, 4) for cls in (bench.HeadwiseMemory, bench.Textbook))
    torch.nn.init.normal_(ours.hive.bank)
    textbook.load_state_dict(ours.state_dict())
    heads = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(textbook(heads), ours(heads))


# ---- baselines.py --------------------------------------------------------------------------------
@pytest.mark.parametrize("L", range(2, 14))
def test_gaps_of_the_top_half(L):
    for n_new in range(1, L):
        gaps = baselines.gaps_of_top_half(L, n_new)
        assert (
            gaps == sorted(set(gaps)) and len(gaps) == n_new and 1 <= gaps[0] and gaps[-1] <= L - 1
        )
        assert gaps[0] >= L // 2 or gaps == list(range(L - n_new, L))
    with pytest.raises(ValueError, match="less than"):
        baselines.gaps_of_top_half(L, L)


@pytest.mark.parametrize(
    "method, new, identity",
    [
        ("stack", (2, 5), False),
        ("stack-top", (4, 5), False),
        ("average", (2, 4), False),
        ("opt-deus", (2, 4), True),
        ("lesa", (2, 4), False),
    ],
)
def test_the_other_methods(base, tokens, monkeypatch, method, new, identity):
    monkeypatch.setattr(
        baselines, "predict_between", lambda slices, gaps: slices[gaps] / 2
    )  # learning takes seconds
    deeper, what = compare.build(base, method, {"n_new": 2})
    assert deeper.config.new == new and deeper.config.blocks == "TTTTTT" and what == "new"
    assert torch.equal(deeper(tokens), base(tokens)) == identity
    kept = [block for i, block in enumerate(deeper.h) if i not in new]
    for mine, theirs in zip(kept, base.h):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters()))
    assert all(torch.isfinite(p).all() for p in deeper.parameters())


def test_stack_and_average_start_from_the_right_blocks(base):
    def weight(model, i):
        return model.h[i].mlp.c_fc.weight

    stacked, on_top = baselines.stack(base, 2), baselines.stack(base, 2, on_top=True)
    assert torch.equal(weight(stacked, 2), weight(base, 1)) and torch.equal(
        weight(stacked, 5), weight(base, 3)
    )
    assert torch.equal(weight(on_top, 4), weight(base, 2)) and torch.equal(
        weight(on_top, 5), weight(base, 3)
    )
    torch.testing.assert_close(
        weight(baselines.average(base, 1), 3), (weight(base, 2) + weight(base, 3)) / 2
    )


def test_transport_brings_permuted_units_back(base):
    block, other = base.h[0], baselines.copy.deepcopy(base.h[0])
    C, H = 32, 2
    within = [
        torch.randperm(C // H) + h * (C // H) for h in range(H)
    ]  # units stay within their head
    units, hidden = torch.cat(within), torch.randperm(4 * C)
    with torch.no_grad():
        rows = torch.cat([third * C + units for third in range(3)])
        other.attn.c_attn.weight.copy_(block.attn.c_attn.weight[rows])
        other.attn.c_attn.bias.copy_(block.attn.c_attn.bias[rows])
        other.attn.c_proj.weight.copy_(block.attn.c_proj.weight[:, units])
        other.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[hidden])
        other.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[hidden])
        other.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[:, hidden])
    x = torch.randn(2, 5, C)
    torch.testing.assert_close(
        other(x), block(x), rtol=1e-4, atol=1e-4
    )  # the permuted block is the same function
    aligned = baselines.align(other, block)
    for (name, mine), original in zip(aligned.named_parameters(), block.parameters()):
        torch.testing.assert_close(mine, original, rtol=0, atol=1e-4, msg=name)


def test_a_transport_plan_is_doubly_stochastic():
    plan = baselines.transport_plan(torch.randn(12, 5) * 0.1, torch.randn(12, 5) * 0.1)
    torch.testing.assert_close(plan.sum(1), torch.ones(12))
    torch.testing.assert_close(plan.sum(0), torch.ones(12), rtol=0.05, atol=0.05)


def test_lesa_learns_what_lies_between():
    """Blocks on a line through the space of matrices, at the scale of singular vectors: the middle
    one is the mean of its neighbours.
    """
    torch.manual_seed(0)
    first, step = 0.03 * torch.randn(8, 400), 0.01 * torch.randn(8, 400)
    slices = torch.stack([first + i * step for i in range(6)])  # (L, r, in)
    out = baselines.predict_between(slices, [3])[0]
    want = (slices[2] + slices[3]) / 2
    assert (out - want).norm() < 0.2 * want.norm()


# ---- gpu.py --------------------------------------------------------------------------------------
def test_the_report_for_gpus_runs_on_a_cpu(root, tmp_path):
    """Every part but the stalls and the compiler's, which need a card."""
    command = [sys.executable, str(root / "experiments" / "gpu.py"), "--device", "cpu", "--quick"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("### ") == 10
    start = run.stdout.split("The start against the base")[1].split("###")[0]
    assert [line.split("|")[2].strip() for line in start.splitlines() if "torch." in line] == [
        "0"
    ] * 2
    assert "True" in run.stdout.split("Two equal runs")[1]
    statuses = [
        line.split("|")[2].strip() for line in run.stdout.split("A run (")[1].splitlines()[4:]
    ]
    assert statuses == ["130", "130", "0", "0", "0"]
