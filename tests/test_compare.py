"""The comparison: its methods are what they say, and a run is what a plain loop gives."""

import dataclasses
import json
import math

import pytest
import torch

import ablations
import compare
import facts
from conftest import call
from data import get_batch, load_dataset, load_tokenizer
from eval import sum_nll
from model import GPT, GPTConfig, save_checkpoint
from train import make_optimizer, schedule, train_step
from upscale import set_trainable, upscale

SIZES = {"n_new": 2, "n_keys": 8, "top_k": 4, "d_latent": 8}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with a tiny base and a text; runs are made in this process, which is quicker."""
    text = " = Title = \n the cat sat on the mat , and the dog sat on the cat . \n" * 60
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
        (tmp_path / f"{split}.txt").write_text("quite another text, " * 60)
    torch.manual_seed(0)
    base = GPT(GPTConfig(2, 2, 16, 16, 257))
    about = {"tokenizer": "bytes", "dataset": "wikitext2", "data_dir": str(tmp_path)}
    save_checkpoint(str(tmp_path / "base.pt"), base, **about)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "make_apart", compare.make)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return tmp_path


FLAGS = (
    "--base base.pt --tokens 512 --n_keys 8 --top_k 4 --d_latent 8 --eval_tokens 320 "
    "--batch_size 4 --jobs 1 --device cpu --old_dataset text"
).split()


# ---- ablations.py --------------------------------------------------------------------------------
RUNGS = [
    {"query": query, "residual": residual, "write": write}
    for query in ablations.QUERIES
    for residual in (False, True)
    for write in ablations.WRITES
]


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_variants_start_as_the_base_and_learn(base, tokens, name):
    model, _ = compare.build(base, name, SIZES)
    assert torch.equal(model(tokens), base(tokens))
    model(tokens, tokens).backward()
    new = [p for i in model.config.new for p in model.h[i].parameters()]
    assert any(p.grad is not None and p.grad.any() for p in new)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: "-".join(map(str, rung.values())))
def test_every_rung_starts_as_the_base_and_learns(base, tokens, rung):
    model, _ = compare.build(base, "ladder", {**SIZES, **rung})
    assert torch.equal(model(tokens), base(tokens))
    set_trainable(model, "new")
    optimizer = make_optimizer(model, 1e-2, 1e-1, 0.0)
    losses = [train_step(model, optimizer, (tokens, tokens), torch.float32, 1) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_lowest_rungs_are_the_two_readings(base, tokens):
    """Rung heads computes what midus does; rung block what midus with query=block does."""
    for query in ("heads", "block"):
        torch.manual_seed(1)
        midus, _ = compare.build(base, "midus", {**SIZES, "query": query})
        torch.manual_seed(1)
        rung, _ = compare.build(base, "ladder", {**SIZES, "query": query})
        for i in midus.config.new:
            bank = torch.randn_like(midus.h[i].memory.hive.bank)
            for model in (midus, rung):
                model.h[i].memory.hive.bank.data.copy_(bank)
            keys = midus.h[i].memory.product_keys.state_dict()
            rung.h[i].memory.product_keys.load_state_dict(keys)
            rung.h[i].memory.hive.proj.data.copy_(midus.h[i].memory.hive.proj)
        torch.testing.assert_close(rung(tokens), midus(tokens))


def test_keys_and_projections_start_larger_where_asked(base):
    scaled = {"key_scale": 4.0, "value_scale": 10.0}
    models = []
    for options in ({}, scaled):
        torch.manual_seed(1)
        models.append(compare.build(base, "ladder", {**SIZES, **options})[0])
    plain, larger = (model.h[model.config.new[0]].memory for model in models)
    torch.testing.assert_close(larger.product_keys.keys, 4 * plain.product_keys.keys)
    torch.testing.assert_close(larger.hive.proj, 10 * plain.hive.proj)


def test_a_shared_bank_is_one_bank_and_counts_once(base):
    def size(**options):
        model, _ = compare.build(base, "ladder", {**SIZES, **options})
        return sum(parameter.numel() for parameter in model.parameters())

    assert size() - size(shared=True) == 64 * 8  # two memory blocks, a bank of (N, d_v)


def test_a_centred_query_is_less_its_mean(base, tokens):
    torch.manual_seed(0)
    keys = ablations.Centred(GPTConfig(1, 2, 8, 4, 5, n_keys=8, top_k=4))
    query = torch.randn(3, 5, 2, 4) + 10
    plain = ablations.ProductKeys(2, 4, 8, 4)
    plain.keys = keys.keys
    weights, slots = keys(query)
    want_weights, want_slots = plain(query - query.mean(dim=(0, 1)))
    assert torch.equal(slots, want_slots)
    torch.testing.assert_close(weights, want_weights)

    # Outside of training it keeps the mean that it has.
    keys.eval()
    mean = keys.mean.clone()
    keys(query + 5)
    assert torch.equal(keys.mean, mean)


def test_parameters_of_the_variants(base):
    def added(name, **options):
        model, _ = compare.build(base, name, {**SIZES, **options})
        return sum(p.numel() for i in model.config.new for p in model.h[i].parameters())

    C, H, N, d_v, d_h = 32, 2, 64, 8, 16
    midus = added("midus")
    assert added("head-tables") - midus == 2 * (H * N * d_h - N * d_v - H * d_v * d_h)
    assert midus - added("one-w") == 2 * d_v * d_h
    assert midus - added("shared-bank") == 0  # counted in both blocks
    assert added("ladder", query="block") == added("midus", query="block")
    assert added("ladder", write="full") - midus == 2 * (H - 1) * d_v * C
    assert added("ladder", write="plain") - midus == 2 * (N * C - N * d_v - H * d_v * d_h)
    own = added("ladder", query="own")
    assert own - added("ladder", query="block") == 2 * (C * C + C + 2 * C)


def test_the_product_key_memory_by_hand(base):
    """One token's read, slot by slot, of values as wide as the model."""
    model, _ = compare.build(base, "pkm", SIZES)
    block = model.h[model.config.new[0]]
    torch.nn.init.normal_(block.memory.hive.bank)
    x = torch.randn(1, 1, 32)
    query = block.own_query(block.ln_2(x)).view(1, 1, 2, 16)
    weights, slots = block.memory.product_keys(query)
    want = x[0, 0].clone()
    for h in range(2):
        for j in range(4):
            want += weights[0, 0, h, j] * block.memory.hive.bank[slots[0, 0, h, j]]
    torch.testing.assert_close(block(x)[0, 0], want)  # its attention is silent at the start


# ---- facts.py and novels.py ----------------------------------------------------------------------
def test_facts_are_asked_in_other_words(tmp_path):
    folder = str(tmp_path / "facts")
    assert facts.write(folder, people=5, copies=3, seed=1) == 20
    train = (tmp_path / "facts" / "train.txt").read_text()
    for split in ("valid", "test"):
        questions = facts.read_questions(folder, split)
        text = (tmp_path / "facts" / f"{split}.txt").read_text()
        assert len(questions) == 20
        for question in questions:
            assert f"{question['prompt']} {question['answer']}." in text
            assert question["prompt"] not in train and question["answer"] in train


def test_recall_counts_whole_answers():
    """A stand-in that always says the same word knows the facts that have this answer."""
    tokenizer = load_tokenizer("bytes")

    class SaysFox(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(257, 1)

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 257)
            answer = tokenizer.encode_ordinary(" fox")
            for row, line in zip(logits, tokens.tolist()):
                end = bytes(token for token in line if token < 256).rstrip(b"\0").rfind(b" ")
                for i, token in enumerate(answer):
                    row[end - 1 + i, token] = 1.0
            return logits

    questions = [
        {"prompt": "It is a", "answer": "fox"},
        {"prompt": "By the way, it is a", "answer": "fox"},
        {"prompt": "It is a", "answer": "fix"},
        {"prompt": "Of all things, it was a", "answer": "dog"},
    ]
    assert facts.recall(SaysFox(), tokenizer, questions) == 0.5


def test_novels_are_cut_as_told(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    assert call(monkeypatch, "novels.py", corpus, "--out", tmp_path / "out") == 2
    assert "not 100" in capsys.readouterr().err
    for number in range(100):
        (corpus / f"{number:03}.txt").write_bytes(b"\xef\xbb\xbf" + b"novel %d\r\n" % number)
    assert call(monkeypatch, "novels.py", corpus, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "valid.txt").read_bytes() == b"novel 7\n\n\nnovel 23\n"
    assert (tmp_path / "out" / "train.txt").read_text().count("novel") == 96
    assert "another corpus" in capsys.readouterr().out
    assert call(monkeypatch, "novels.py", corpus, "--out", tmp_path / "out") == 2


# ---- compare.py ----------------------------------------------------------------------------------
def test_methods_are_read_from_text():
    method = compare.read_method("midus:n_keys=64:query_norm=1:positions=1,3:memory_lr=3e-2")
    assert method.name == "midus"
    wanted = {"n_keys": 64, "query_norm": True, "positions": [1, 3], "memory_lr": 0.03}
    assert method.options == wanted
    for wrong in (
        "magic",
        "midus:n_keys",
        "midus:depth=3",
        "midus:n_keys=x",
        "midus:n_new=0",
        "midus:memory_lr=nan",
        "midus:query_norm=2",
        "llama-pro:n_keys=3",
        "linear:memory_lr=1",
        "lesa:positions=1",
    ):
        with pytest.raises(ValueError, match="--methods"):
            compare.read_method(wrong)


def test_old_text_at_a_level_of_the_new():
    curve = [{"new": 1000.0, "old": 50.0}, {"new": 100.0, "old": 200.0}, {"new": 90.0, "old": 1.0}]
    assert compare.old_at(curve, 100) == pytest.approx(200)
    assert compare.old_at(curve, round(math.sqrt(1e5))) == pytest.approx(100, rel=1e-3)
    assert compare.old_at(curve, 80) is None


def test_the_front_is_what_nothing_beats():
    points = [{"new": new, "old": old} for new, old in ((9, 1), (5, 4), (6, 5), (3, 8), (4, 8))]
    assert [(p["new"], p["old"]) for p in compare.front(points)] == [(9, 1), (5, 4), (3, 8)]


@pytest.mark.parametrize("best, made", [(2, [1, 2, 3]), (3, [1, 2, 3, 4]), (4, [1, 2, 3, 4])])
def test_a_search_for_a_rate_stops_between_two_worse_ones(monkeypatch, capsys, best, made):
    """Of five rates, 0 to 4, from the middle; the edge is said to be one."""
    monkeypatch.setattr(compare, "find", lambda run, done: done.get(run))
    done = {}

    def make_them(runs: list[int]) -> None:
        for run in runs:
            done[run] = {"diverged": False, "points": [{"new": abs(run - best) + 1.0}]}

    trials = {"a": {rate: rate for rate in range(5)}, "b": {7: 7}}
    assert compare.search(trials, "lr", done, make_them) == {"a": best, "b": 7}
    assert sorted(done) == made  # one rate alone needs no trial
    assert ("edge" in capsys.readouterr().out) == (best == 4)


def test_the_comparison_runs_once(study, monkeypatch, capsys):
    """In this process, which is quicker; .ci/run has the whole command."""
    flags = [*FLAGS, "--methods", "none", "midus", "--lrs", "1e-3,1e-2"]
    assert call(monkeypatch, "compare.py", *flags) == 0
    first = capsys.readouterr().out
    results = (study / "results.jsonl").read_text()
    lines = [json.loads(line) for line in results.splitlines()]

    # Rates are chosen on one seed and split, and told of others. Of midus's banks, three rates are
    # tried, one of them with the lrs.
    assert [line["seed"] for line in lines] == [0] * 6 + [1] * 2
    assert all(line["split"] == ("test" if line["seed"] else "valid") for line in lines)
    assert all(len(line["points"]) == (6 if line["seed"] else 2) for line in lines)
    for name in ("new", "old"):  # both start as the base
        assert len({line["points"][0][name] for line in lines if line["seed"]}) == 1
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    assert rows[0] == "new blocks" and rows[2:] == ["(base)", "none", "midus"]

    # A run that fails does not take the others' results with it.
    def failing(run, places):
        if run.method == "none":
            raise MemoryError("a run was killed")
        return compare.make(run, places)

    monkeypatch.setattr(compare, "make_apart", failing)
    assert call(monkeypatch, "compare.py", *flags, "--results", "other.jsonl") == 1
    assert len((study / "other.jsonl").read_text().splitlines()) == 2

    # A run that was cut off while it wrote is made anew, the others are not; figures are the same.
    made = []
    monkeypatch.setattr(
        compare, "make_apart", lambda run, places: made.append(run) or compare.make(run, places)
    )
    (study / "results.jsonl").write_text(results[:-40])
    assert call(monkeypatch, "compare.py", *flags) == 0
    again = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    assert len(made) == 1
    assert [line["points"] for line in again] == [line["points"] for line in lines]

    # One that lacks no more than its newline is kept.
    (study / "results.jsonl").write_text(results[:-1])
    assert call(monkeypatch, "compare.py", *flags) == 0
    assert len(made) == 1 and (study / "results.jsonl").read_text() == results
    (study / "results.jsonl").write_text(results[:5])  # stopped right after the first letters
    assert compare.read_results("results.jsonl") == []


def run_of(study, **changes):
    fields = dict(
        base="",
        new_text="",
        old_text="",
        questions=None,
        method="midus",
        options={"n_new": 1, "n_keys": 8, "top_k": 4, "d_latent": 8},
        train="new",
        tokens=1600,
        batch_size=4,
        grad_accum=1,
        lr=1e-2,
        memory_lr=1e-2,
        weight_decay=0.1,
        eval_tokens=10**6,
        n_points=5,
        split="test",
        seed=1,
        device="cpu",
        dtype="bfloat16",
    )
    where = (str(study / "base.pt"), "wikitext2", str(study), "text", str(study), None)
    threads = torch.get_num_threads()
    places = compare.Places(*where, threads, show=False)
    return compare.Run(**{**fields, **changes}), places


def test_a_run_is_what_a_plain_loop_gives(study):
    """In bf16 too, where an autocast context around the loop would go on with the first weights."""
    result = compare.make(*run_of(study))
    base, _ = compare.open_model(str(study / "base.pt"))
    torch.manual_seed(1)
    model = upscale(base, "midus", n_new=1, n_keys=8, top_k=4, d_latent=8)
    set_trainable(model, "new")
    text = load_dataset("wikitext2", "bytes", str(study))
    optimizer = make_optimizer(model, 1e-2, 1e-2, 0.1)
    for step in range(25):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, 1, 25)
        batch = get_batch(text["train"].tokens, step, 4, 16, 1)
        train_step(model, optimizer, batch, torch.bfloat16, 1)

    # All windows of a split, but for what does not fill one.
    windows = compare.some_windows("wikitext2", "bytes", str(study), "test", run_of(study)[0], 16)
    nll = sum(sum_nll(model, window.numpy())[0] for window in windows)
    end = result["points"][-1]
    assert end["new"] == pytest.approx(math.exp(nll / (len(windows) * 16)), rel=1e-6)
    assert len(windows) * 16 > 0.95 * len(text["test"].tokens)
    assert [point["step"] for point in result["points"]] == [0, 5, 10, 15, 20, 25]
    assert end["new"] < 0.98 * result["points"][0]["new"] and "old" in end
    assert result["points"][0]["gradients"]["hive.proj"] == 0 < end["gradients"]["hive.proj"]
    assert len(end["used"]) == 1 and 0 < end["entropy"] <= math.log(4) + 1e-6


def test_a_diverged_run_is_told_not_dropped(study, monkeypatch, capsys):
    steps = []

    def diverging(*args):
        steps.append(1)
        if len(steps) == 3:
            raise FloatingPointError
        return train_step(*args)

    monkeypatch.setattr(compare, "train_step", diverging)
    result = compare.make(*run_of(study, method="none", options={"n_new": 1}, memory_lr=None))
    assert result["diverged"] and compare.at_the_end(result) == math.inf
    compare.print_rows({"new": 9.0, "old": 9.0}, {"none": [result]})
    assert "none (1 of 1 diverged)" in capsys.readouterr().out
    assert "diverged" in compare.describe(result)


def test_facts_and_a_picture(study, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    facts.write("facts", people=3, copies=2, seed=1)
    longer = GPT(GPTConfig(2, 2, 16, 64, 257))  # for whole questions
    save_checkpoint("base.pt", longer, tokenizer="bytes", dataset="wikitext2")
    flags = [
        *FLAGS,
        "--data_dir",
        ".",
        "--lrs",
        "1e-2",
        "--memory_lrs",
        "1e-1",
        "--methods",
        "none",
        "linear",
    ]
    flags += ["midus:query=block", "--facts", "facts", "--plot", "curve.svg", "--levels", "240,200"]
    assert call(monkeypatch, "compare.py", *flags, "--seeds", "2", "--inside") == 0
    out = capsys.readouterr().out
    assert "facts known" in out and "What the new text costs" in out
    inside = out[out.index("Inside midus:query=block") :].splitlines()
    steps = [line.split()[1] for line in inside if line.startswith("| ")][2:]
    assert steps == ["0", "1", "2"]  # a run of two steps
    picture = (study / "curve.svg").read_text()
    assert picture.startswith("<?xml")


def test_a_laptop_needs_no_base(pydocs, tmp_path, monkeypatch, capsys):
    """The base that train.py makes of nothing is trained, and found again by train.py."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "make_apart", compare.make)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for text in pydocs.glob("pydocs-*/wiki.*.txt"):  # some of each split
        short = tmp_path / "data" / text.relative_to(pydocs)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_bytes(text.read_bytes()[:20_000])
    presets = {name: list(values) for name, values in compare.train.PRESETS.items()}
    presets["base_tokens"][0] = 2048
    monkeypatch.setattr(compare.train, "PRESETS", presets)
    flags = "--tokens 512 --lrs 1e-3 --memory_lrs 1e-2 --eval_tokens 320 --jobs 1 --device cpu"
    words = [*flags.split(), "--methods", "none", "midus", "--plot", "plot.png"]
    assert call(monkeypatch, "compare.py", *words) == 0
    assert (tmp_path / "plot.png").exists()
    capsys.readouterr()
    words = ["--upscale", "midus", "--tokens", "1024", "--device", "cpu"]
    assert call(monkeypatch, "train.py", *words) == 0
    assert "trained already" in capsys.readouterr().out


def test_the_comparison_refuses_in_a_sentence(study, monkeypatch, capsys):
    base, _ = compare.open_model("base.pt")
    deep = upscale(base, "midus", n_keys=8, top_k=4, d_latent=8)
    save_checkpoint("deep.pt", deep, tokenizer="bytes", dataset="wikitext2")
    (study / "list.jsonl").write_text("[1]\n")
    (study / "theirs.jsonl").write_text('{"a": 1}')
    before = (study / "base.pt").read_bytes()
    for flags, sentence in (
        ("--base base.pt --methods midus --results base.pt", "must end in .jsonl"),
        ("--base base.pt --methods midus --results list.jsonl", "not a results file"),
        ("--base base.pt --methods midus --results theirs.jsonl", "not a results file"),
        ("--base base.pt --methods midus --results no/list.jsonl", "no such folder"),
        ("--base base.pt --methods midus:n_new=1:positions=1", "not several"),
        ("--base base.pt --methods none:n_new=3", "n_new must lie between 1 and 2"),
        ("--base base.pt --methods ladder:query=all", "query one of"),
        ("--base base.pt --methods lesa:n_new=1", "triples"),
        ("--base deep.pt --methods none", "up-scaled already"),
        ("--base none.pt --methods midus", "there is no checkpoint"),
        ("--base base.pt --methods magic", "is none of"),
        ("--base none.pt --methods midus --lrs x", "--lrs"),
        ("--base base.pt --methods none --levels 50", "--old_dataset"),
    ):
        assert call(monkeypatch, "compare.py", *flags.split()) == 2, flags
        assert sentence in capsys.readouterr().err, flags
    assert (study / "base.pt").read_bytes() == before
    assert (study / "theirs.jsonl").read_text() == '{"a": 1}'


def test_the_same_run_is_found_again(study):
    """Every field counts, and nothing else does."""
    run, _ = run_of(study)
    done = [json.loads(json.dumps({**dataclasses.asdict(run), "points": []}))]
    assert compare.find(run, done) is done[0]
    for field in dataclasses.fields(run):
        assert compare.find(dataclasses.replace(run, **{field.name: "other"}), done) is None
