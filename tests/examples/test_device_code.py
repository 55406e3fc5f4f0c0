"""examples/bench/device_code.py without a compiler: what is recorded of calls, and what tables of kernels differ in."""

from __future__ import annotations

import csv
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from express_compile.core.call import Call
from express_compile.core.plan import SavedPlan
from express_compile.kernels import launch as launching
from express_compile.kernels.attend import hopper, segments
from express_compile.kernels.heads import together

BENCH = Path(__file__).parents[2] / "examples" / "bench"
TABLE = BENCH / "results" / "device-code.csv"
PLANS = BENCH.parent / "plans"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Those of shorter sequences."""
    monkeypatch.syspath_prepend(str(BENCH))
    import device_calls

    monkeypatch.setattr(device_calls, "TOKENS", 1024)
    monkeypatch.setattr(device_calls, "ROWS", 64)
    monkeypatch.setitem(device_calls.EXPRESS, "budget", 64)
    return device_calls


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import device_code

    return device_code


def names(launches: list) -> list[str]:
    return [launch.kernel.fn.__name__ for launch in launches]


def test_what_express_and_its_gradient_launch(calls: ModuleType) -> None:
    qkv, true = calls.tokens(torch.float32, 64), launching.launch
    with calls.recorded() as found:
        assert qkv[0].is_cuda and segments.launch is not true
        calls.attend("express", qkv, **calls.EXPRESS, protected=256)
    contest = ["_sum_kernel", "_score_kernel", "_contest_kernel"]
    assert names(found) == [*contest, "_describe_kernel", "_thin_kernel", "segment_kernel"]
    assert found[-1].options["SHAPE"].D == 64 and found[-1].args[-1].Lq == 1024
    assert not qkv[0].is_cuda and segments.launch is true
    with calls.recorded() as found:
        calls.CALLS["express, uniform"](torch.float32, 64)
    assert names(found) == [*contest, "_thin_kernel", "segment_kernel"]


@pytest.mark.skipif(hopper.gluon is None, reason="no Triton with Gluon on this platform")
def test_the_kernel_for_hopper_reads_batches_where_they_lie_unless_rows_are_not_aligned(
    calls: ModuleType,
) -> None:
    qkv = [x.clone() for x in calls.tokens(torch.bfloat16, 128)]
    packed = [x[0].transpose(0, 1) for x in qkv]
    odd = torch.zeros(qkv[0].numel() + 1, dtype=torch.bfloat16)[1:].view_as(qkv[0])
    starts = torch.tensor([0, 300, 1024], dtype=torch.int32)
    rows = dict(budget=64, sinks=32, window=256, protected=256, scale=0.1, min_length=0, seed=5)
    for given, call in [
        (qkv, lambda: calls.attend("express", qkv, calls.padded(), **calls.EXPRESS)),
        (packed, lambda: calls.express_varlen(*packed, starts, 724, **rows)),
        (None, lambda: calls.attend("express", [odd, *qkv[1:]], calls.padded(), **calls.EXPRESS)),
    ]:
        with calls.recorded() as found:
            call()
        kernel, args, _ = found[-1]
        assert (kernel is hopper.segment_kernel) == (given is not None)
        if given is not None:
            assert [x.base.data_ptr() for x in args[:3]] == [x.data_ptr() for x in given]


def test_what_the_layers_of_a_shipped_plan_launch(calls: ModuleType) -> None:
    """Eight of its heads in each: halvings of all kinds of rows in one launch, choices in two launches, or in four
    where blocks of queries begin in two ways, and contests in three, or four where places have two sizes;
    and in six where windows leave 47 and 62 contests."""
    layers = import_module("benchmark").layers_of(SavedPlan.load(PLANS / "qwen2.5-coder-0.5b.json"), 32, 8)
    found = []
    for own in layers:
        q, k, v = (torch.zeros(1, 8, 16384, 16) for _ in range(3))
        with calls.recorded() as launches:
            together(Call(q, k, v, None, torch.tensor(5), 0.1, 3), own, None)
        count = Counter(names(launches))
        assert count.pop("segment_kernel") == 1
        assert count.pop("_zero_kernel", 0) + count["_sum_kernel"] >= count["_thin_kernel"]
        assert count["_describe_kernel"] == count["_thin_kernel"]
        assert count["_score_kernel"] == count["_choose_kernel"] + count["_sum_kernel"]
        kernels = "_thin_kernel", "_choose_kernel", "_sum_kernel", "_contest_kernel"
        found.append((count.total(), *map(count.__getitem__, kernels)))
    without, contests = [(6, 1, 2, 0, 0), (4, 1, 1, 0, 0)], [(9, 1, 1, 1, 2), (9, 1, 2, 1, 1)]
    assert found == [*without, *contests, (8, 0, 1, 2, 2), (6, 0, 1, 1, 2)]


def test_the_last_queries_are_launched_with_the_others_unless_these_are_few_or_padded(calls: ModuleType) -> None:
    for Lq, padding, with_others, apart in (
        (1024, None, 1, 0),
        (300, None, 1, 1),
        (1024, calls.padded(), 1, 1),
        (64, None, 0, 1),
    ):
        with calls.recorded() as found:
            calls.run("heads", calls.tokens(torch.float32, 64, Lq), padding, **calls.MIXED, last=64)
        count = Counter(names(found))
        assert (bool(count["segment_kernel"]), count["_split_kernel"]) == (with_others, apart)
        assert with_others or count.keys() <= {"_split_kernel", "_combine_kernel"}


@pytest.mark.parametrize("table", sorted(TABLE.parent.glob("device-code*.csv")), ids=lambda path: path.stem)
def test_every_call_of_the_committed_tables_launches_kernels(calls: ModuleType, table: Path) -> None:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["call"] for row in rows} == set(calls.CALLS)
    assert {(row["dtype"], int(row["D"])) for row in rows} == {(str(x)[6:], D) for x, D in calls.KINDS}
    for name, call in calls.CALLS.items():
        with calls.recorded() as found:
            call(torch.float32, 64)
        known = {row["kernel"].split(".")[-1] for row in rows if row["call"] == name}
        assert known & set(names(found)), name


def row(kernel: str, variant: str, ptx: str, registers: int = 64, call: str = "express") -> dict:
    return dict(dtype="float32", D=64, call=call, kernel=kernel, variant=variant, ptx=ptx, registers=registers,
                spilled=0, shared=1024)  # fmt: skip


def test_tables_differ_in_kernels_that_are_changed_missing_or_new(code: ModuleType) -> None:
    old = [row("thin", "a", "1"), row("thin", "b", "2"), row("attend", "c", "3"), row("gone", "d", "4")]
    new = [row("thin", "e", "2"), row("thin", "f", "9", registers=72), row("attend", "c", "3"), row("more", "g", "5")]
    found = [(what, *(x and x["variant"] for x in pair)) for what, *pair in code.compare(old, new)]
    assert found == [("same", "b", "e"), ("changed", "a", "f"), ("same", "c", "c"), ("missing", "d", None),
                     ("new", None, "g")]  # fmt: skip
    shown = {x["kernel"]: (x["what"], x["registers"], x["shared"]) for x in code.differences(old, new)}
    assert shown == {"thin": ("changed", "64 -> 72", "1024"), "gone": ("missing", "64", "1024"),
                     "more": ("new", "64", "1024")}  # fmt: skip
    assert code.differences(old, old) == []
    again = [row(x["kernel"], x["variant"], x["ptx"], x["registers"], call="sparse") for x in old + new]
    assert [x["calls"] for x in code.differences(old + again[:4], new + again[4:])] == [2, 2, 2]
    assert code.compare(old[:1], [{**old[0], "call": "sparse"}])[0][0] == "missing"


def test_programs_of_a_crowded_step_share_a_multiprocessor_by_four() -> None:
    """As ``places._tiling`` says: 64 K registers and 228 KB of memory, 128 threads a program."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "attend.places._split_kernel"]
    wide = [row for row in rows if (row["dtype"], row["D"]) == ("bfloat16", "128")]
    halved = [row for row in wide if int(row["shared"]) < 64 << 10]
    assert len(halved) == 2 and len(wide) == 4, "with the token of the step, and where it is held already"
    for row in halved:
        assert 4 * 128 * int(row["registers"]) <= 64 << 10 and 4 * int(row["shared"]) <= 228 << 10
