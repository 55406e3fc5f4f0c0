"""The committed results: README and docs say what they say, and the bars that they had to reach hold in them."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

from express_compile.kernels.santa import loses

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["genesis", "python-data-model", "python-statements", "python-types", "argparse"]


def kl(params: str, task: str = "natural texts") -> float:
    with (ROOT / "examples/bench/results/quality.csv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["metric"] == "kl" and row["task"] == task and row["params"] == params and row["n"] == "8192"
        ]
    return float(rows[-1]["value"])


def policy(sinks: int, window: int, halving: str = "balanced", seed: str = "") -> str:
    return f"s=256 sinks={sinks} window={window} protected=0 halving={halving}{seed}"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/bench"))
    return importlib.import_module("tables")


def test_readme_and_docs_are_what_the_result_files_say(tables, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out
    shown = [name for path in tables.documents() for name in tables.parts_of(path.read_text(encoding="utf-8"))]
    assert set(shown) == set(tables.PARTS) and "README.md" in {path.name for path in tables.documents()}


def test_a_window_of_as_many_rows_stands_beside_express_as_soon_as_it_is_measured(tables, monkeypatch):
    read, run = tables.read, {"commit": "abc", "date": "2026-12-01"}
    protected = "sinks=32 window=256 protected=256"
    of_express = [x for x in tables.prefill_rows() if x["Lq"] == "32768" and x["params"] == protected]
    (small,) = ({**x, **run, "ms_p50": "3.0", "speedup": "5.0"} for x in of_express if x["s"] == "256")
    (default,) = ({**x, **run, "ms_p50": "4.0", "speedup": "3.75"} for x in of_express if x["s"] == "512")
    window = {**small, "job": "window", "method": "window", "params": "sinks=32 rows=1290", "s": "1290"}
    more = [small, default, {**window, "ms_p50": "2.0", "speedup": "7.5"}]
    more.append({**window, "s": "2139", "params": "sinks=32 rows=2139", "ms_p50": "30.0", "speedup": "0.5"})
    monkeypatch.setattr(tables, "read", lambda name: read(name) + (more if name == "speed.csv" else []))
    lines = tables.window_table().splitlines()
    assert lines[0].endswith("| Express | sinks + window by FlexAttention |")
    (more_rows,) = [line for line in lines if line.startswith("| 32,768 | 2,139 |")]
    (fewer,) = [line for line in lines if line.startswith("| 32,768 | 1,290 |")]
    assert more_rows.endswith("| **4.00 ms, 3.75×** | 30.00 ms, 0.50× |")
    assert fewer.endswith("| **3.00 ms, 5.00×** | **2.00 ms, 7.50×** |")
    summary = tables.speed_summary_table("express").splitlines()
    windows = [line.split("|")[4] for line in summary if "as many first and last tokens" in line]
    assert windows == [" 30.00 ms, 0.50× ", " **2.00 ms, 7.50×** "], "each behind the setting that has as many rows"


def test_what_is_out_of_date_is_named(tables, monkeypatch, capsys, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("no part")
    page = tmp_path / "docs" / "page.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PARTS", {"some": lambda: "new"})
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    page.write_text("a\n<!-- some -->\nold\n<!-- /some -->\nb\n")
    assert tables.main() == 1 and "docs/page.md is not what" in capsys.readouterr().out
    assert tables.filled(page.read_text()) == "a\n<!-- some -->\nnew\n<!-- /some -->\nb\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="no page shows some"):
        tables.main()
    for wrong in ("<!-- other -->\n<!-- /other -->", "<!-- some -->\n", "<!-- /some -->\n<!-- some -->"):
        with pytest.raises(ValueError, match="must be pairs"):
            tables.parts_of(wrong)


def test_a_plan_per_head_answers_as_well_as_the_readme_says(tables):
    """What README.md and docs/guide/which-method.md say in words."""
    runs = tables.plan_rows()
    own: dict[tuple[str, int, str, str], list[str]] = {}
    for (model, n, _), rows in runs.items():
        plans = tables.of_plans(rows)
        for its in plans:
            line = tables.plan_line(its, tables.stream_of(plans, its[0]["budget"]))
            own[model.split("-")[0], n, its[0]["method"], its[0]["budget"]] = line
    assert len(runs) == 3, "pages say that two models were measured, one at two lengths"
    small, large = ("SmolLM2", 8192), ("Qwen2.5", 16384)
    assert own[*small, "per head", "1350"][1::2] == ["1,350", "0.14", "0.08", "37 of 38"]
    assert own[*small, "without last", "1350"][-1] == "22 of 38"
    assert own[*small, "streaming, last exact", "1350"][-1] == "28 of 38"
    assert own[*small, "per head", "700"][1::2] == ["699", "0.18", "0.44", "36 of 38"]
    assert own[*large, "per head", "1600"][1::2] == ["1,599", "0.24", "0.64", "61 of 67"]
    assert own["Qwen2.5", 32768, "per head", "1600"][1::2] == ["1,600", "0.37", "1.36", "41 of 49"]
    assert {own[*small, "streaming", b][-1] for b in ("700", "1350")} == {"0 of 38"}
    finer = "per head, query heads"
    assert own[*small, finer, "1350"][1::2] == ["1,350", "0.09", "0.04", "37 of 38"]
    assert own[*small, finer, "700"][1::2] == ["700", "0.13", "0.30", "38 of 38"]
    assert own[*large, finer, "1600"][1::2] == ["1,600", "0.10", "0.27", "63 of 67"]
    assert own["Qwen2.5", 32768, finer, "1600"][1::2] == ["1,600", "0.23", "0.74", "45 of 49"]
    asked = "per head, questions 3, query heads"
    assert own[*large, asked, "1600"][1::2] == ["1,600", "0.13", "0.36", "66 of 67"]
    assert own["Qwen2.5", 32768, asked, "1600"][1::2] == ["1,600", "0.27", "0.88", "45 of 49"]
    windows = own["Qwen2.5", 32768, f"window or everything{asked[8:]}", "1600"]
    assert (windows[3], windows[-1]) == ("0.33", "47 of 49")
    assert own[*large, "per head, heads repeated", "1600"][1::2] == ["1,600", "0.11", "0.28", "39 of 43"]
    assert own[*large, "window or everything, heads repeated", "1600"][-1] == "41 of 43"
    for model, n, method, budget in own:  # no other choice of rows is better, but for parts of the plan's own
        if not method.startswith(("without", "layers", "last")) and not method.endswith(("query heads", "repeated")):
            assert float(own[model, n, method, budget][3]) >= float(own[model, n, "per head", budget][3])


def test_caches_find_what_the_pages_say(tables):
    own: dict[tuple[str, str, str], list[str]] = {}
    for (model, n, _), rows in tables.plan_rows("caching.csv").items():
        for part in ("cache", "selected"):
            names = tables.caches_of(part)
            stream = next(name for name in names if name.startswith("streaming"))
            plans = tables.of_plans([row for row in rows if row["budget"]], names)
            for its in plans if n > 7000 else ():
                line = tables.plan_line(its, tables.stream_of(plans, its[0]["budget"], stream), names)
                own[model.split("-")[0], its[0]["method"], its[0]["budget"]] = line
    for place, kl, found in (
        (("SmolLM2", "per head", "1024"), "0.20", "26 of 50"),
        (("SmolLM2", "per head, questions 27", "1024"), "0.27", "45 of 50"),
        (("SmolLM2", "one window or everything", "1024"), "1.49", "29 of 50"),
        (("SmolLM2", "snapkv", "1024"), "2.27", "6 of 50"),
        (("SmolLM2", "per head", "1984"), "0.05", "44 of 50"),
        (("SmolLM2", "per head, questions 27", "1984"), "0.07", "47 of 50"),
        (("SmolLM2", "everything", "1984"), "0.02", "49 of 50"),
        (("SmolLM2", "per head, questions 27, selected", "1024"), "0.20", "28 of 29"),
        (("Qwen2.5", "per head, questions 9", "1024"), "0.72", "43 of 65"),
        (("Qwen2.5", "per head", "1024"), "0.44", "26 of 65"),
        (("Qwen2.5", "protected", "1024"), "1.29", "24 of 65"),
        (("Qwen2.5", "per head", "4032"), "0.11", "63 of 65"),
        (("Qwen2.5", "per head, questions 9", "4032"), "0.16", "61 of 65"),
        (("Qwen2.5", "per head, questions 27, selected", "1024"), "0.26", "60 of 65"),
    ):
        assert (own[place][3], own[place][-1]) == (kl, found), place
    for model, best in (("SmolLM2", "per head, questions 27"), ("Qwen2.5", "per head, questions 9")):
        peers = [own[model, name, "1024"] for name in ("streaming", "protected", "express", "thinned", "random")]
        peers.append(own[model, "one window or everything", "1024"])
        mine = own[model, best, "1024"]
        assert all(float(mine[3]) < float(x[3]) and int(mine[-1][:2]) > int(x[-1][:2]) for x in peers)


def test_kl_on_natural_texts():
    assert kl(policy(32, 512)) <= 0.16
    for name in TEXTS:
        assert kl(policy(32, 512), f"text:{name}") <= 0.16, name


@pytest.mark.parametrize("task", ["natural texts", "repetitive texts", *(f"text:{name}" for name in TEXTS)])
@pytest.mark.parametrize("halving", ["balanced", "kernel", "uniform"])
def test_a_longer_window_is_better(task, halving):
    none, short, long = (kl(policy(*sizes, halving), task) for sizes in ((0, 0), (32, 32), (32, 512)))
    assert none > short > long


@pytest.mark.parametrize("seed", ["", " seed=1"])
@pytest.mark.parametrize("window", [32, 512])
@pytest.mark.parametrize("task", ["natural texts", "repetitive texts"])
def test_balanced_is_not_worse_than_uniform(window, task, seed):
    assert kl(policy(32, window, seed=seed), task) <= kl(policy(32, window, "uniform", seed), task)


def speed(**wanted: str) -> dict[str, str]:
    """The newest row of speed.csv with these values."""
    with (ROOT / "examples/bench/results/speed.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == v for k, v in wanted.items())]
    return rows[-1]


@pytest.mark.parametrize(
    "s, window, n, bar",
    [
        (512, 32, 32768, 4.5),
        (512, 32, 131072, 24.0),
        (512, 32, 524288, 75.0),
        (1024, 32, 32768, 2.9),
        (1024, 32, 131072, 15.0),
        (1024, 32, 524288, 40.0),
        (256, 512, 8192, 1.3),
        (256, 512, 16384, 2.2),
        (256, 512, 32768, 5.8),
        (256, 512, 131072, 34.0),
    ],
)
def test_express_is_as_fast_as_it_had_to_be(s, window, n, bar):
    """Against the best exact backend; up to 16k, where launching takes the host longer, both as CUDA graphs."""
    params = f"sinks=32 window={window} protected=0" + (" graph=1" if n <= 16384 else "")
    row = speed(job="prefill", s=str(s), Lq=str(n), Lk=str(n), H="32", D="128", B="1", params=params)
    assert float(row["speedup"]) >= bar
    keys_and_values = 2 * n * int(row["H_kv"]) * int(row["D"]) * 2 / 2**20
    assert float(row["peak_mb"]) <= 1.5 * keys_and_values
    assert 0 < float(row["error"]) < 3e-3, "what rounding to bfloat16 costs"


@pytest.mark.parametrize("s", ["256", "512"])
@pytest.mark.parametrize("n", ["32768", "131072"])
def test_express_is_faster_than_a_window_of_as_many_rows(s, n):
    seen = {"256": ("1374", "1408"), "512": ("2329", "2400")}[s][n == "131072"]  # on average from a quarter on
    window, of_express = speed(job="window", Lk=n, s=seen), dict(s=s, Lq=n, Lk=n, H="32", D="128")
    express = speed(job="prefill", params="sinks=32 window=256 protected=256", commit=window["commit"], **of_express)
    assert float(express["ms_p50"]) < float(window["ms_p50"])


@pytest.mark.parametrize("n, bar, over", [("32768", 5.0, 1.03), ("131072", 10.0, 1.15)])
def test_plans_as_found_on_qwen_are_as_fast_and_as_near_to_express_as_they_had_to_be(n, bar, over):
    with (ROOT / "examples/bench/results/speed.csv").open(newline="") as file:
        rows = {
            row["params"].split()[0]: row for row in csv.DictReader(file) if (row["job"], row["Lk"]) == ("mixed", n)
        }
    plan, same = (rows[f"plan={x}qwen2.5-coder-0.5b"] for x in ("", "Express_as_"))
    assert float(plan["speedup"]) >= bar and 0 < float(plan["error"]) < 3e-3
    assert float(plan["ms_p50"]) <= over * float(same["ms_p50"])


@pytest.mark.parametrize("n, params, bar", [(8192, "", 4.0), (8192, "graph=1", 4.0), (32768, "", 20.0)])
def test_thinformer_is_as_fast_as_it_had_to_be(n, params, bar):
    row = speed(job="encode", s="256", Lq=str(n), Lk=str(n), H="32", D="128", B="1", params=params)
    assert float(row["speedup"]) >= bar and 0 < float(row["error"]) < 3e-3


@pytest.mark.parametrize(
    "job, n, bar",
    [
        ("sparse_fixed", 32768, 5.8),  # all that a query sees is 1 / 7.5 of the causal keys
        ("sparse_fixed_train", 32768, 5.0),
        ("sparse_strided", 32768, 14.0),
        ("sparse_strided_train", 32768, 12.0),
        ("sparse_strided", 131072, 50.0),
    ],
)
def test_sparse_is_as_fast_as_it_was_and_needs_memory_for_its_rows_only(job, n, bar):
    with (ROOT / "examples/bench/results/speed.csv").open(newline="") as file:
        rows = {int(row["Lq"]): row for row in csv.DictReader(file) if row["job"] == job}
    assert float(rows[n]["speedup"]) >= bar and 0 < float(rows[n]["error"]) < 3e-3
    inputs = (int(rows[n]["H"]) + 2 * int(rows[n]["H_kv"])) * n * int(rows[n]["D"]) * 2 / 2**20
    assert float(rows[n]["peak_mb"]) <= 1.1 * inputs


def test_training_is_faster_by_sparse_attention_and_learns_no_worse():
    with (ROOT / "examples/bench/results/train_sparse.csv").open(newline="") as file:
        last = {row["run"]: row for row in csv.DictReader(file)}
    speed = {run: float(row["tokens_per_s"]) for run, row in last.items()}
    assert speed["compiled"] >= 1.5 * speed["speed"] and speed["sparse"] >= 1.45 * speed["exact"]
    for run in ("sparse", "compiled"):
        assert last[run]["tokens"] == last["exact"]["tokens"]
        assert float(last[run]["held_out_bpb"]) <= float(last["exact"]["held_out_bpb"]) + 0.02


@pytest.mark.parametrize("B, n, bar", [(8, 32768, 1.45), (1, 131072, 1.35), (1, 32768, 1.1)])
def test_santa_is_as_fast_as_it_had_to_be(B, n, bar):
    assert float(decoding()[B, 8, n, 128, 128]["speedup"]) >= bar


def decoding() -> dict[tuple[int, ...], dict[str, str]]:
    """The newest row of every (B, H_kv, keys, D, S)."""
    with (ROOT / "examples/bench/results/speed.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["job"] == "decode"]
    return {tuple(int(row[x]) for x in ("B", "H_kv", "Lk", "D", "s")): row for row in rows}


def test_santa_is_not_slower_where_it_does_not_leave_the_cache_to_exact_attention():
    sampled = 0
    for (B, H_kv, n, D, S), row in decoding().items():
        if loses(B, int(row["H"]), H_kv, 1, n, B * H_kv * n * D * 2, S) is None:
            sampled += 1
            assert float(row["speedup"]) >= 0.97, row
    assert sampled >= 100 and len(decoding()) - sampled >= 40


def test_santa_reads_the_rows_that_its_formula_expects():
    for (*_, S), row in decoding().items():
        values = dict(part.split("=") for part in row["params"].split())
        rows, expected = float(values["rows"]), float(values["expected"])
        assert abs(rows - expected) <= 2.5 and expected <= 1.01 * S, row


def test_thinformer_is_five_times_as_fast_as_the_published_code():
    """Which takes 3.16 ms at its own setting on an H200 (compiled; measured for the project)."""
    row = speed(job="encode", dtype="float32", H="8", D="64", Lk="16384", params="g=2")
    assert 3.16 / float(row["ms_p50"]) >= 5 and float(row["error"]) < 1e-6


@pytest.mark.parametrize(("stack", "rewritten"), [("2.13.0+cpu", 350), ("2.11.0+cu130", 348)])
def test_every_site_is_found_and_nothing_is_rewritten_wrongly(stack, rewritten):
    """Of 36 architectures."""
    with (ROOT / "examples/bench/results/coverage.csv").open(newline="") as file:
        key = ("architecture", "implementation", "mask", "phase")
        rows = [row for row in csv.DictReader(file) if row["torch"] == stack]
        rows = {tuple(row[k] for k in key): row for row in rows}.values()
    rows = [row for row in rows if not row["reasons"].startswith("the model itself")]
    assert len({row["architecture"] for row in rows}) >= 36
    for row in rows:
        assert row["found"] == row["expected"], row
        for column in ("error", "gradient_error"):
            assert not row[column] or float(row[column]) <= 1e-5, row
    assert sum(int(row["rewritten"]) for row in rows) >= rewritten


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_pass_is_as_quick_as_it_had_to_be(attention):
    row = speed(job="plan", params=f"layers=32 attention={attention} sites=32")
    assert float(row["ms_p50"]) <= 2000
    row = speed(job="compile", params=f"layers=4 attention={attention}")
    assert float(row["speedup"]) >= 1 / 1.25 and float(row["error"]) < 1e-6


def test_training_is_as_fast_as_it_had_to_be():
    row = speed(job="train", s="512", Lq="32768", params="sinks=32 window=32 protected=0")
    assert float(row["speedup"]) >= 2.0


def test_thinning_takes_a_fifth_at_most_of_long_sequences():
    with (ROOT / "examples/bench/results/breakdown.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "thin" and int(row["n"]) >= 131072]
    assert len(rows) >= 6 and all(float(row["share"]) <= 0.2 for row in rows)


def test_budgets_per_layer_beat_uniform_ones_on_unseen_texts():
    """KL of at most 0.05 with fewer rows than the smallest uniform budget that reaches it, on natural texts."""
    with (ROOT / "examples/bench/results/quality.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "unseen natural texts" and row["metric"] == "kl"]
    good = [row for row in rows if float(row["value"]) <= 0.05]
    uniform = min(float(row["rows"]) for row in good if row["params"].startswith("s="))
    assert min(float(row["rows"]) for row in good if row["params"].startswith("tolerance=")) < 0.6 * uniform
