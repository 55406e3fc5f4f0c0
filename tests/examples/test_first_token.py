"""Benches of saved plans: layers that have their heads, and the time to the first token of a whole model."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from express_compile import SavedPlan
from express_compile.core.plan import SavedSite
from express_compile.core.rows import Rows

BENCH = Path(__file__).resolve().parents[2] / "examples" / "bench"
PLAN = BENCH.parent / "plans" / "smollm2-135m.json"


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, by name."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in ("benchmark", "first_token", "tables", "records")}
    finally:
        sys.path.remove(str(BENCH))


def test_layers_of_a_plan_have_its_kv_heads_in_order_each_once_and_then_some_from_all_over_it(bench) -> None:
    plan = SavedPlan.load(PLAN)
    every = [rows for site in plan.sites for rows in site.rows]
    layers = bench["benchmark"].layers_of(plan, 32, 8)
    found = [rows for own in layers for rows in own.rows]
    assert len(every) == 90 and found == every + every[::15] and {len(own.rows) for own in layers} == {8}
    assert {own.block for own in layers} == {128}
    more = [rows for own in bench["benchmark"].layers_of(plan, 32, 8, 32) for rows in own.rows]
    assert more == every * 2 + [every[i * 90 // 76] for i in range(76)]
    few = Counter(rows for own in bench["benchmark"].without_everything(layers) for rows in own.rows)
    assert few[Rows(everything=True)] == 0 < Counter(found)[Rows(everything=True)]
    assert few[Rows(32, 256, selected=64)] == sum(x.everything or x == Rows(32, 256, selected=64) for x in found)


KINDS = [Rows(32, 64), Rows(32, 512), Rows(32, 256, 256), Rows(32, 128, selected=16), Rows(32, 256, 64, 64),
         Rows(32, 4096), Rows(everything=True)]  # fmt: skip


def plan_per_query_head(H: int, H_kv: int, layers: int) -> SavedPlan:
    """Of every third KV head all query heads are alike, of the others all are drawn, the shortest first."""
    draw, sites = random.Random(0), []
    for i in range(layers):
        rows: list[Rows] = []
        for _ in range(H_kv):
            drawn = draw.choices(KINDS, [24, 8, 8, 6, 3, 2, 1], k=H // H_kv)
            rows += [drawn[0]] * (H // H_kv) if draw.random() < 1 / 3 else sorted(drawn, key=KINDS.index)
        facts = dict(H=H, H_kv=H_kv, D=64, Dv=64, mask="causal")
        own = dict(facts=facts, options={"method_options": {"heads": {"last": 64}}}, rows=tuple(rows))
        sites.append(SavedSite(f"model.layers.{i}.self_attn", 0, "heads", "rewritten", **own))
    return SavedPlan(tuple(sites))


@pytest.mark.parametrize(("H", "H_kv", "layers"), [(14, 2, 24), (9, 3, 30), (32, 8, 32), (4, 2, 12)])
@pytest.mark.parametrize("wanted", [None, 32])
def test_layers_of_a_plan_per_query_head_have_its_rows_as_often_and_its_groups_stay_together(
    bench, H: int, H_kv: int, layers: int, wanted: int | None
) -> None:
    benchmark, plan = bench["benchmark"], plan_per_query_head(H, H_kv, layers)
    found = benchmark.layers_of(plan, 32, 8, wanted)
    assert len(found) == (wanted or -(-H_kv * layers // 8)) and {len(own.rows) for own in found} == {32}
    G = H // H_kv
    before = [site.rows[i : i + G] for site in plan.sites for i in range(0, H, G)]
    after = [own.rows[i : i + 4] for own in found for i in range(0, 32, 4)]
    assert all(set(x) <= set(y) for x, y in zip(after, before, strict=False)), "heads of a group come from one group"
    if G <= 4:
        assert all(set(x) == set(y) for x, y in zip(after, before, strict=False)), "each of them"
    one = [sum(len(set(x)) == 1 for x in groups) / len(groups) for groups in (before, after)]
    assert one[1] == pytest.approx(one[0], abs=0.06), "groups that are alike stay as frequent"
    count, total = (Counter(x for group in groups for x in group) for groups in (after, before))
    for kind in KINDS:
        assert count[kind] / count.total() == pytest.approx(total[kind] / total.total(), abs=0.02)
    rows = [benchmark.mean_rows(own, 16384) for own in (found, benchmark.of_sites(plan))]
    assert rows[0] == pytest.approx(rows[1], rel=0.05)
    if G > 4:  # what would be there without the last ones
        short = replace(benchmark.of_sites(plan)[0], rows=[x for group in before for x in group[:4]])
        assert benchmark.mean_rows([short], 16384) < 0.8 * rows[1]
    if (H, H_kv) == (32, 8):
        assert [own.rows for own in found] == [site.rows for site in plan.sites]


def test_a_mixture_says_how_many_rows_its_plan_has(bench, tmp_path, monkeypatch) -> None:
    path = tmp_path / "few.json"
    plan_per_query_head(6, 2, 2).save(path)
    benchmark, argv = bench["benchmark"], ["benchmark.py", "--mixed", "--plan", str(path), "--lengths", "700"]
    found = []
    monkeypatch.setattr(benchmark, "show", lambda rows, columns: found.extend(rows))
    monkeypatch.setattr(
        sys, "argv", [*argv, "--heads", "4", "2", "--head-size", "16", "--repeats", "1", "--commit", "x"]
    )
    benchmark.main()
    told = {bench["records"].params_of(row).get("plan"): bench["records"].params_of(row) for row in found}
    assert {"few", "window_as_few", "Express_as_few", None} <= set(told) and all(row["speedup"] > 0 for row in found)
    assert float(told["few"]["rows"]) == pytest.approx(float(told["few"]["of_plan"]), rel=0.3), "of two layers"
    assert [name for name, said in told.items() if "of_plan" in said] == ["few"]


@pytest.fixture
def first_token(bench):
    args = argparse.Namespace(plan=[PLAN], repeats=1, tiny=True)
    return bench["first_token"].FirstToken(args)


def test_every_attention_of_a_whole_model_is_timed_and_the_model_is_exact_again(bench, first_token) -> None:
    ids = torch.arange(700)[None] % 97
    before, found = first_token.run(ids), list(first_token.rows_of(700))
    assert [row["method"] for row in found] == ["exact", "heads", "express", "window"]
    assert {row["opponent_ms_p50"] for row in found} == {found[0]["ms_p50"]}
    assert len({row["s"] for row in found[1:]}) == 1 and found[1]["s"] < 700, "at as many rows"
    assert found[0]["error"] == 0 < found[1]["error"] < 1 and all(row["speedup"] > 0 for row in found)
    error, allowed = first_token.checked["plan=smollm2-135m"]
    assert 0 < error <= allowed
    assert torch.equal(first_token.run(ids), before)


def test_heads_that_give_something_else_have_no_speed(bench, first_token, monkeypatch) -> None:
    check = bench["benchmark"].check_call
    monkeypatch.setattr(bench["first_token"], "check_call", lambda call, out, own: check(call, out + 1e-3, own))
    heads = next(row for row in first_token.rows_of(700) if row["method"] == "heads")
    assert heads["speedup"] == "failed its check"


def test_tables_say_how_a_mixture_compares_in_its_own_run(bench, tmp_path, monkeypatch) -> None:
    tables, records = bench["tables"], bench["records"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shape = dict(B=1, H=32, H_kv=8, Lq=8192, Lk=8192, D=128, Dv=128, dtype="bfloat16", s=1000)
    common = dict(date="d", gpu="G", commit="c", opponent="cudnn", opponent_ms_p50=8.0, speedup=4.0, **shape)
    times = {"plan=a_plan rows=1000 selection=0.25": 2.0, "plan=window_as_a_plan rows=1000": 1.6}
    rows = [{**common, "job": "mixed", "method": "heads", "params": x, "ms_p50": ms} for x, ms in times.items()]
    rows.append({**common, "job": "mixed", "method": "window", "params": "sinks=32 rows=1000", "ms_p50": 2.5})
    model = {**common, "job": "first_token", "method": "heads", "params": "plan=b none_ms=900", "ms_p50": 1500}
    records.append(tmp_path / "speed.csv", records.SPEED_COLUMNS, [*rows, model])
    line = tables.mixed_table().splitlines()[2]
    assert line == "| a plan | 8,192 | 1,000 | 8.00 ms | **2.00 ms, 4.00×** | 1.25 | – | 0.80 | 25% |"
    assert "| 8,192 | plan of b | 1,000 | 1.50 s | 4.00× | 0.90 s |" in tables.first_token_table()
