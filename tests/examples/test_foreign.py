"""The table of foreign architectures: sites are counted without us, and what is wrong is called wrong."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "bench"


@pytest.fixture(scope="module")
def foreign() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("foreign")
        for name in ("foreign", "foreign_models"):
            patch.delitem(sys.modules, name, raising=False)
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def count(foreign: ModuleType, run) -> int:
    with torch.no_grad(), foreign.Attention() as attention:
        run()
    return attention.count


def test_the_catalogue_holds_more_than_a_hundred_architectures_that_the_other_table_lacks(foreign: ModuleType) -> None:
    known = importlib.import_module("architectures").ARCHITECTURES
    others = [name for name in foreign.FOREIGN if name.replace("-", "_") not in known]
    assert len(others) >= 200 and len(foreign.INDUCTOR) == 20 and set(foreign.INDUCTOR) <= set(foreign.FOREIGN)
    packages = {architecture.package for architecture in foreign.FOREIGN.values()}
    assert len(packages) == 7, packages


def test_attention_is_counted_whatever_its_spelling(foreign: ModuleType) -> None:
    x, w = torch.randn(2, 4, 9, 8), torch.randn(8, 5)
    cases = {
        "written out": (1, lambda: (x @ x.mT).softmax(-1) @ x),
        "with dropout, a cast and a view": (
            1, lambda: F.dropout((x @ x.mT).softmax(-1)).double().view(8, 9, 9) @ x.double().view(8, 9, 8)
        ),
        "einsum": (1, lambda: torch.einsum("bhij,bhjd->bhid", (x @ x.mT).softmax(-1), x)),
        "fused": (1, lambda: F.scaled_dot_product_attention(x, x, x)),
        "two": (2, lambda: ((x @ x.mT).softmax(-1) @ x, (x @ x.mT).softmax(-1) @ x)),
        "one that is used twice": (1, lambda: [w @ y for w in [(x @ x.mT).softmax(-1)] for y in (x, x + 1)]),
        "a router of experts": (0, lambda: (x[0, 0] @ w).softmax(-1) @ torch.randn(5, 8)),
        "a classifier": (0, lambda: (x @ w).softmax(-1)),
        "a product alone": (0, lambda: (x @ x.mT) @ x),
    }  # fmt: skip
    assert {name: count(foreign, run) for name, (_, run) in cases.items()} == {n: k for n, (k, _) in cases.items()}


@pytest.mark.parametrize("route", ["backend", "rewrite_attention"])
def test_a_row_of_both_routes(foreign: ModuleType, route: str) -> None:
    row = foreign.measure(foreign.Case("nanochat", "decode", route))
    assert row["outcome"] == "right" and 0 <= row["error"] <= foreign.TOLERANCE, row
    assert row["expected"] == row["found"] == row["proven"] == row["rewritten"] == 2, row


def test_what_is_wrong_is_called_wrong(foreign: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = foreign.by_backend
    monkeypatch.setitem(foreign.RUN, "backend", lambda *given: [x * 1.001 for x in run(*given)])
    row = foreign.measure(foreign.Case("fnet", "prefill", "backend"))
    assert row["outcome"] == "wrong" and row["error"] == pytest.approx(1e-3, rel=0.01)
    assert (row["expected"], row["found"]) == (0, 0), "no attention, and none is claimed"


def test_what_is_gone_in_float64_was_rounding(foreign: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = foreign.by_backend

    def rounded(*given):
        return [x * 1.001 if x.dtype == torch.float32 else x for x in run(*given)]

    monkeypatch.setitem(foreign.RUN, "backend", rounded)
    row = foreign.measure(foreign.Case("fnet", "prefill", "backend"))
    assert row["outcome"] == "right" and row["error"] == pytest.approx(1e-3, rel=0.01)
    assert row["reasons"].startswith(" | in float64 the error is")


def test_an_architecture_is_built_twice_the_same(foreign: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = SimpleNamespace(CLIP=dict, CustomTextCLIP=dict, CoCa=dict)  # open_clip is not installed here
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(model=towers, coca_model=towers))
    for name in ("open_clip:clip-gelu-cls", "open_clip:custom-text-embed-cls", "open_clip:coca"):
        (one, _), (other, _) = (foreign.FOREIGN[name].build() for _ in range(2))
        assert one == other and any("pool" in key or "cls" in key for part in one.values() for key in _keys(part)), name


def _keys(part: object) -> list[str]:
    return list(part) if isinstance(part, dict) else []


def test_an_error_is_a_row(foreign: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(foreign.RUN, "backend", lambda *_: torch.randn(2) @ torch.randn(3))
    assert foreign.measure(foreign.Case("fnet", "prefill", "backend"))["outcome"].startswith("backend: RuntimeError: ")


def test_outputs_that_differ_in_where_they_are_finite_are_infinitely_wrong(foreign: ModuleType) -> None:
    x = torch.tensor([1.0, float("nan")])
    assert foreign.error_of([x], [x]) == 0 and foreign.error_of([x[:1]], [x]) == float("inf")
    assert foreign.error_of([x.nan_to_num()], [x]) == float("inf")
    assert foreign.error_of([torch.tensor([1.0])], [torch.tensor([2.0])]) == pytest.approx(0.5)
