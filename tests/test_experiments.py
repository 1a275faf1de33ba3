"""The benchmark runs, in its short form, and its counts are right.

The comparison's methods are what they say.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import ablations
import baselines
import bench
import compare
from conftest import call
from model import GPT, GPTConfig, save_checkpoint

MEMORY = {"n_keys": 8, "top_k": 4, "d_latent": 8}


@pytest.fixture
def base():
    torch.manual_seed(0)
    model = GPT(GPTConfig(4, 2, 32, 16, 50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))


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
        b = bench.Bench(torch.device("meta"), torch.float32, torch.get_num_threads(), 1)
        for n, k in bench.SIZES:
            counted = bench.block_costs(512, n, k)
            for name, block in zip(("copied", "memory"), bench.make_blocks(b, n, k)):
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
    deeper, what = compare.build(base, method, {}, 2, MEMORY)
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


# ---- ablations.py --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["stacked", *ablations.VARIANTS])
def test_variants_start_as_the_base_and_learn(base, tokens, name):
    model, _ = compare.build(base, name, {}, 2, MEMORY)
    assert torch.equal(model(tokens), base(tokens)) == (name != "residual")
    model(tokens, tokens).backward()
    assert any(
        p.grad is not None and p.grad.any()
        for i in model.config.new
        for p in model.h[i].parameters()
    )


def test_parameters_of_the_variants(base):
    def added(name):
        model, _ = compare.build(base, name, {}, 2, MEMORY)
        return sum(
            p.numel()
            for i, block in enumerate(model.h)
            if i in model.config.new
            for p in block.parameters()
        )

    C, H, N, d_v, d_h = 32, 2, 64, 8, 16
    midus = added("midus")
    assert added("head-tables") - midus == 2 * (H * N * d_h - N * d_v - H * d_v * d_h)
    assert midus - added("one-w") == 2 * d_v * d_h
    assert (
        midus - added("shared-bank") == 0 and added("temperature") - midus == 2 * H
    )  # a shared one is counted twice
    assert added("proj-copied") - midus == 2 * C * C


def test_the_product_key_memory_by_hand(base):
    """One head's read, slot by slot, of values as wide as the model."""
    model, _ = compare.build(base, "pkm", {}, 1, MEMORY)
    memory = model.h[model.config.new[0]].memory
    torch.nn.init.normal_(memory.hive.bank)
    x = torch.randn(1, 1, 32)
    weights, slots = memory.product_keys(memory.query(x).view(1, 1, 2, 16))
    want = sum(
        weights[0, 0, h, j] * memory.hive.bank[slots[0, 0, h, j]]
        for h in range(2)
        for j in range(4)
    )
    torch.testing.assert_close(memory(x)[0, 0], want)


# ---- compare.py ----------------------------------------------------------------------------------
def test_methods_are_read_from_text():
    text = "midus:n_keys=64,memory_lr=3e-2,llama-pro:positions=1,3,none"
    assert compare.parse(text) == [
        ("midus", {"n_keys": 64, "memory_lr": 0.03}),
        ("llama-pro", {"positions": [1, 3]}),
        ("none", {}),
    ]
    for wrong in (
        "magic",
        "midus:n_keys",
        "midus:depth=3",
        "midus:n_keys=x",
        "n_keys=3",
        "midus:n_new=0",
        "stacked:n_new=-1",
        "midus:tokens=-5",
        "midus:memory_lr=nan",
        "midus:memory_lr=-1",
        "midus:n_keys=3,4",
        "lesa:positions=1",
    ):
        with pytest.raises(ValueError, match="--methods"):
            compare.parse(wrong)


def test_the_trigram_model_is_a_distribution():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 12, 300).astype(np.uint16)
    train[train == 7] = 0  # 7 is never seen
    train[-1] = 11
    for context in ((3, 4), (7, 7), (int(train[10]), int(train[11]))):
        p = [
            1 / compare.trigram_perplexity(train, np.array([*context, w], np.uint16))
            for w in range(12)
        ]
        assert sum(p) == pytest.approx(1, abs=1e-9) and min(p) > 0


def test_the_comparison_runs_once(tmp_path, monkeypatch, capsys):
    """In this process, which is quicker; .ci/run has the whole command."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(
            " = Title = \n the cat sat on the mat , and so on . \n" * 60
        )
    torch.manual_seed(0)
    save_checkpoint(
        str(tmp_path / "base.pt"),
        GPT(GPTConfig(2, 2, 16, 16, 257)),
        tokenizer="bytes",
        dataset="wikitext2",
        data_dir=str(tmp_path),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run_apart", compare.run)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    flags = (
        "--base",
        "base.pt",
        "--methods",
        "none,midus",
        "--tokens",
        "512",
        "--lrs",
        "1e-3,1e-2",
        "--n_keys",
        "8",
        "--top_k",
        "4",
        "--d_latent",
        "8",
        "--valid_tokens",
        "500",
        "--batch_size",
        "4",
        "--jobs",
        "1",
        "--device",
        "cpu",
    )
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    compare.main()
    first, results = capsys.readouterr().out, (tmp_path / "results.jsonl").read_text()
    lines = [json.loads(line) for line in results.splitlines()]
    assert len(lines) == 6 and sum(line["test"] for line in lines) == 2
    assert len({line["start"] for line in lines}) == 1  # both start as the base
    assert all(
        line["seed"] == (1 if line["test"] else 0) for line in lines
    )  # chosen on one seed, told of another
    table = [line for line in first.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in table] == ["method", "---", "none", "midus"]

    # A run that fails does not take the others' results with it.
    def failing(job):
        if job["config"]["method"] == "none":
            raise MemoryError("a run was killed")
        return compare.run(job)

    monkeypatch.setattr(compare, "run_apart", failing)
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--results", "other.jsonl"])
    with pytest.raises(MemoryError):
        compare.main()
    assert len((tmp_path / "other.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    # A run that was cut off while it wrote is done anew, the others are not; the figures are the
    # same.
    (tmp_path / "results.jsonl").write_text(results[:-40])
    runs = []
    monkeypatch.setattr(compare, "run_apart", lambda job: runs.append(job) or compare.run(job))
    compare.main()
    redone = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(runs) == 1 and len(redone) == 6
    assert [line["valid"] for line in redone] == [line["valid"] for line in lines]
    (tmp_path / "results.jsonl").write_text(
        results[:5]
    )  # the same to the first line, and stopped right after
    assert [compare.read_results("results.jsonl") for _ in range(2)] == [[], []]


def test_a_run_is_what_a_plain_loop_gives(tmp_path):
    """In bf16 too, where an autocast context around the loop would go on with the weights of the
    first step.
    """
    text = " = Title = \n the cat sat on the mat , and the dog sat on the cat . \n" * 60
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    save_checkpoint(str(tmp_path / "base.pt"), base, tokenizer="bytes", dataset="wikitext2")
    config = dict(
        dataset="wikitext2",
        memory=MEMORY,
        tokens=1600,
        memory_lr=1e-2,
        weight_decay=0.1,
        train="new",
        n_new=1,
        batch_size=4,
        grad_accum=1,
        valid_tokens=500,
        name="midus",
        method="midus",
        options={},
        lr=1e-2,
        seed=1,
        test=True,
        dtype="bfloat16",
    )
    job = dict(
        config=config, threads=torch.get_num_threads(), show=False, base=str(tmp_path / "base.pt")
    )
    result = compare.run(job | {"data_dir": str(tmp_path), "device": "cpu"})
    torch.manual_seed(1)
    model, _ = compare.build(base, "midus", {}, 1, MEMORY)
    compare.set_trainable(model, "new")
    data = compare.load_dataset("wikitext2", "bytes", str(tmp_path))
    optimizer = compare.make_optimizer(model, 1e-2, 1e-2, 0.1)
    for step in range(25):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * compare.schedule(step, 1, 25)
        compare.train_step(
            model,
            optimizer,
            compare.get_batch(data["train"].tokens, step, 4, 16, 1),
            torch.bfloat16,
            1,
        )
    for name, tokens in (
        ("valid", data["valid"].tokens[:501]),
        ("test_perplexity", data["test"].tokens),
    ):
        nll, count = compare.sum_nll(model, tokens)
        assert result[name] == pytest.approx(np.exp(nll / count), rel=1e-6)
    assert result["valid"] < 0.98 * result["start"]
    assert set(result["looks"]) == {0, 2, 12, 24} and result["looks"][0]["gradients"]["W"] == 0


def test_a_diverged_run_is_told_not_dropped(tmp_path, monkeypatch, capsys):
    steps, original = [], compare.train_step

    def diverging(*args):
        steps.append(1)
        if len(steps) == 3:
            raise FloatingPointError
        return original(*args)

    text = " the cat sat on the mat , and so on .\n" * 60
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    save_checkpoint(str(tmp_path / "base.pt"), GPT(GPTConfig(2, 2, 16, 16, 257)), tokenizer="bytes")
    monkeypatch.setattr(compare, "train_step", diverging)
    config = dict(
        dataset="wikitext2",
        memory={},
        tokens=1600,
        memory_lr=1e-2,
        weight_decay=0.1,
        train="new",
        n_new=1,
        batch_size=4,
        grad_accum=1,
        valid_tokens=500,
        name="none",
        method="none",
        options={},
        lr=1e-3,
        seed=1,
        test=True,
        dtype="float32",
    )
    job = dict(
        config=config, threads=torch.get_num_threads(), show=False, base=str(tmp_path / "base.pt")
    )
    result = compare.run(job | {"data_dir": str(tmp_path), "device": "cpu"})
    assert (
        result["valid"] is None and result["test_perplexity"] is None and len(result["losses"]) < 3
    )
    compare.print_rows([compare.summarise([result])], {"valid": 9.0, "test_perplexity": 9.0})
    assert "none (1 of 1 diverged)" in capsys.readouterr().out


def test_the_comparison_refuses_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    save_checkpoint("base.pt", base, tokenizer="bytes", dataset="wikitext2")
    save_checkpoint(
        "deep.pt", compare.upscale(base, "midus", **MEMORY), tokenizer="bytes", dataset="wikitext2"
    )
    (tmp_path / "list.jsonl").write_text("[1]\n")
    before = (tmp_path / "base.pt").read_bytes()
    for flags, sentence in (
        (["--base", "base.pt", "--methods", "midus", "--results", "base.pt"], "must end in .jsonl"),
        (
            ["--base", "base.pt", "--methods", "midus", "--results", "list.jsonl"],
            "not a results file",
        ),
        (
            ["--base", "base.pt", "--methods", "midus", "--results", "no/list.jsonl"],
            "no such folder",
        ),
        (["--base", "base.pt", "--methods", "midus:n_new=1,positions=1"], "not several"),
        (["--base", "base.pt", "--methods", "none:n_new=3"], "n_new must lie between 1 and 2"),
        (["--base", "base.pt", "--methods", "lesa:n_new=1"], "triples"),
        (["--base", "deep.pt", "--methods", "none"], "up-scaled already"),
        (["--base", "none.pt", "--methods", "midus"], "there is no checkpoint"),
        (["--base", "base.pt", "--methods", "magic"], "is none of"),
        (["--base", "none.pt", "--methods", "midus", "--lrs", "x"], "--lrs"),
    ):
        assert (
            call(monkeypatch, "compare.py", *flags) == 2 and sentence in capsys.readouterr().err
        ), flags
    assert (tmp_path / "base.pt").read_bytes() == before
