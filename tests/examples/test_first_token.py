"""Benches of saved plans: layers that have their heads, and the time to the first token of a whole model."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from express_compile import SavedPlan
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


def test_layers_of_a_plan_have_its_heads_in_order_each_once_and_then_the_first_ones(bench) -> None:
    plan = SavedPlan.load(PLAN)
    every = [rows for site in plan.sites for rows in site.rows]
    layers = bench["benchmark"].layers_of(plan, 8)
    found = [rows for own in layers for rows in own.rows]
    assert len(every) == 90 and found == every + every[:6] and {len(own.rows) for own in layers} == {8}
    assert {own.block for own in layers} == {128}
    few = Counter(rows for own in bench["benchmark"].without_everything(layers) for rows in own.rows)
    assert few[Rows(everything=True)] == 0 < Counter(found)[Rows(everything=True)]
    assert few[Rows(32, 256, selected=64)] == sum(x.everything or x == Rows(32, 256, selected=64) for x in found)


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
