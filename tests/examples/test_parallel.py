"""examples/bench/parallel.py: its formulas beside those that runs count, and beside numbers worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from express_compile.kernels.express_chunks import Chunk

BENCH = Path(__file__).parents[2] / "examples" / "bench"


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import parallel

    return parallel


def test_bytes_of_two_gpus_are_those_worked_out_by_hand(parallel) -> None:
    n, rates = 131072, parallel.Rates()
    sent = {how: parallel.costs(n, 2, how, rates)["bytes"] for how in parallel.HOW}
    assert sent["tensor"] == 2 * n * 4096 * 2  # two sums, of which a GPU of two sends half, twice
    assert sent["ring"] == n // 2 * 8 * 256 * 2
    assert sent["all_to_all"] == n // 4 * (32 + 8) * 256 * 2
    rows = Chunk(parallel.CONFIG, n // 2, 1, 2).rows
    assert sent["coresets"] == (rows + 256) * 8 * 256 * 2


def test_times_follow_the_model(parallel) -> None:
    rates = parallel.Rates()
    assert [rates.thin_ms(n) for n in (131072, 524288)] == pytest.approx([2.522, 6.479])
    assert rates.exchange_ms(120e9, 8) == pytest.approx(1e3) and rates.exchange_ms(45e9, 16) == pytest.approx(1e3)
    one, ring = (parallel.costs(131072, ranks, "ring", rates) for ranks in (1, 2))
    assert one["attention_ms"] == pytest.approx(4 * 131072**2 / 2 * 128 * 32 / 574e12 * 1e3)
    assert ring["attention_ms"] == pytest.approx(one["attention_ms"] / 2) and ring["exchange_ms"] == 0
    slow = parallel.costs(131072, 2, "ring", parallel.Rates(fast=1e9))
    assert slow["exchange_ms"] == pytest.approx(1e3 * slow["bytes"] / 1e9 - slow["attention_ms"])
    tensor = parallel.costs(1 << 20, 8, "tensor", rates)
    parts = (tensor[f"{part}_ms"] for part in ("linear", "rest", "attention", "exchange"))
    assert tensor["layer_ms"] == pytest.approx(sum(parts))
    assert parallel.costs(1 << 22, 64, "all_to_all", rates) is None


def test_committed_rows_are_those_of_the_model_and_below_the_bar(parallel) -> None:
    with (BENCH / "results" / "parallel.csv").open() as file:
        rows = list(csv.DictReader(file))
    for part, how, ranks in (("weak", "coresets", 8), ("strong", "all_to_all", 2), ("weak", "tensor", 32)):
        (row,) = (x for x in rows if (x["part"], x["how"], int(x["ranks"])) == (part, how, ranks))
        now = parallel.costs(int(row["n"]), ranks, how, parallel.Rates())
        assert int(row["bytes"]) == now["bytes"]
        assert float(row["layer_ms"]) == pytest.approx(now["layer_ms"])
    measured = {int(x["ranks"]): float(x["ratio"]) for x in rows if x["part"].startswith("SmolLM2")}
    assert set(measured) == {1, 2, 4, 8, 16} and math.isclose(measured[1], 1.0, rel_tol=1e-6)
    assert max(measured.values()) < 1.2
