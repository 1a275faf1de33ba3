"""The benchmark runs, in its short form, and its counts are right."""

import json
import subprocess
import sys


def test_bench_runs_and_prints_every_table(root, tmp_path):
    tables = ["saved", "blocks", "layers", "overhead", "profile"]
    run = subprocess.run(
        [sys.executable, str(root / "experiments" / "bench.py"), "--quick", "--json", "b.json", "--tables", *tables],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["tables"]) == len(tables) and all(t["rows"] for t in written["tables"])
    assert all(f"### {t['title']}" in run.stdout for t in written["tables"])


def test_block_costs_are_those_of_real_blocks(root):
    sys.path.insert(0, str(root / "experiments"))
    import bench
    import torch

    with torch.device("meta"):
        b = bench.Bench(torch.device("meta"), torch.float32, torch.get_num_threads(), 1)
        for n, k in bench.SIZES:
            counted = bench.block_costs(512, n, k)
            for name, block in zip(("copied", "memory"), bench.make_blocks(b, n, k)):
                assert counted[name]["parameters"] == sum(p.numel() for p in block.parameters())


def test_the_textbook_form_computes_the_same(root):
    sys.path.insert(0, str(root / "experiments"))
    import bench
    import torch

    torch.manual_seed(0)
    ours, textbook = (cls(2, 8, 6, 3, 4) for cls in (bench.HeadwiseMemory, bench.Textbook))
    torch.nn.init.normal_(ours.hive.bank)
    textbook.load_state_dict(ours.state_dict())
    heads = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(textbook(heads), ours(heads))
