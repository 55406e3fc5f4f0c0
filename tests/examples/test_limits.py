"""examples/bench/limits.py without a GPU: what is read of ncu's table, and what follows from its counters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "examples" / "bench"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import limits

    return limits


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import tables

    return tables


COUNTERS = {
    "gpu__time_duration.sum": ("ns", "2,412,000"),
    "launch__grid_size": ("", "132"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "18.6"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "55.1"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "64.9"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "3.2"),
    STALLED.format("long_scoreboard"): ("inst", "1.5"),
    STALLED.format("gmma"): ("inst", "2"),
    STALLED.format("selected"): ("inst", "1"),
    STALLED.format("drain"): ("inst", "0.5"),
    "sm__cycles_elapsed.avg.per_second": ("", "No-CC"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", ""),
}


def printed(*kernels: str) -> str:
    """What ncu prints of such launches, with a line of its own before."""
    lines = [["ID", "Kernel Name", *COUNTERS], ["", "", *(unit for unit, _ in COUNTERS.values())]]
    lines += [[str(i), kernel, *(x for _, x in COUNTERS.values())] for i, kernel in enumerate(kernels)]
    table = "\n".join(",".join(f'"{x}"' for x in line) for line in lines)
    return f"==PROF== Connected to process 1\n{table}\n"


def test_a_line_of_counters_is_a_row(limits: ModuleType) -> None:
    (counted,) = limits.parsed(printed("segment_kernel"))
    row = limits.row_of(counted, 132)
    assert row == {
        "us": 2412.0, "programs": 132, "occupancy": 19, "tensor cores": 65, "memory": 3,
        "waits": "the tensor cores 40%; global memory or L2 30%", "limit": "tensor cores",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="ncu wrote no table"):
        limits.parsed("==ERROR== no permission")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "tensor cores"),
        ({"memory": 71}, "memory"),
        ({"tensor cores": 59}, "waiting for other warps"),
        ({"tensor cores": 59, "programs": 131}, "131 programs"),
        ({"programs": 131}, "tensor cores"),
        ({"tensor cores": "", "memory": "12"}, "waiting for other warps"),  # as in a file
    ],
)
def test_the_busiest_unit_then_programs_then_waits(limits: ModuleType, changes: dict[str, Any], expected: str) -> None:
    row = {"tensor cores": 60, "memory": 12, "programs": 132, "waits": "other warps 50%; a fence 9%", **changes}
    assert limits.limited_by(row, 132) == expected


def test_launches_are_those_that_ncu_saw(limits: ModuleType) -> None:
    launched = [
        ["thinning", "express_compile.kernels.select.thinning", name] for name in ("_zero_kernel", "_thin_kernel")
    ]
    rows = limits.joined(launched, limits.parsed(printed("_zero_kernel", "_thin_kernel")), 132)
    assert [(row["call"], row["kernel"]) for row in rows] == [
        ("thinning", "select.thinning._zero_kernel"), ("thinning", "select.thinning._thin_kernel"),
    ]  # fmt: skip
    assert {*rows[0]} <= {*limits.COLUMNS}
    assert len(limits.joined([launched[0]] * 2, limits.parsed(printed(*["_zero_kernel"] * 2)), 132)) == 1
    with pytest.raises(SystemExit, match="must be the same"):
        limits.joined(launched, limits.parsed(printed("_thin_kernel", "_zero_kernel")), 132)


def test_only_counters_that_a_device_has_are_asked_for(limits: ModuleType) -> None:
    stalled = STALLED.format("gmma")
    available = {"dram__throughput", "gpu__time_duration", stalled.removesuffix(".ratio"), "sm__cycles_active"}
    found = limits.wanted(available)
    assert found == [
        "dram__throughput.avg.pct_of_peak_sustained_elapsed", "gpu__time_duration.sum", "launch__grid_size", stalled,
    ]  # fmt: skip


def test_the_table_is_empty_until_there_are_rows(
    limits: ModuleType, tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.limits_table() == ""
    run = {"date": "2026-12-01", "gpu": "a GPU", "triton": "3.6.0"}
    rows = limits.joined([["thinning", "kernels.a", "b_kernel"]], limits.parsed(printed("b_kernel")), 132)
    short = {**rows[0], "kernel": "a.short_kernel", "us": 200.0}
    limits.append(tmp_path / "limits.csv", limits.COLUMNS, [{**run, **row} for row in (*rows, short)])
    said, _, table = tables.limits_table().partition("\n\n")
    assert said.endswith("a GPU, triton 3.6.0, 2026-12-01.") and "60%" in said
    assert table.splitlines()[2:] == [
        "| thinning | `a.b_kernel` | 2,412 | tensor cores 65%, memory 3% | 19 "
        "| the tensor cores 40%; global memory or L2 30% | tensor cores |"
    ]


def test_every_call_is_made_from_its_name(limits: ModuleType) -> None:
    assert len(limits.CALLS) >= 16 and all(isinstance(make, Callable) for make in limits.CALLS.values())
    assert all(name.removesuffix(limits.PLAIN) in limits.CALLS for name in limits.CALLS)
