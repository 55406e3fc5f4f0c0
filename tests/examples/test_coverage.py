"""The coverage command: every site is counted once, and a rewritten graph gives what the model gives."""

from __future__ import annotations

import csv
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "bench"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def coverage() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.delitem(sys.modules, "coverage", raising=False)  # the tool of that name
        yield importlib.import_module("coverage")
        patch.delitem(sys.modules, "coverage")
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def check(row: dict) -> None:
    assert row["found"] == row["expected"] == row["rewritten"] + row["exact"] + row["refused"], row
    assert row["proven"] <= row["found"] and row["error"] <= TOLERANCE, row
    assert bool(row["reasons"]) == (row["refused"] > 0 or row["proven"] < row["found"]), "a refusal has its reason"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llama(coverage: ModuleType, implementation: str, masked: bool) -> None:
    row = coverage.measure(coverage.Case("llama", implementation, masked, coverage.PREFILL))
    check(row)
    assert row["expected"] == 2 and row["gradient_error"] <= TOLERANCE and row["seconds"] > 0
    if implementation == "sdpa":
        assert (row["proven"], row["exact"]) == (2, 2), "left as they are"
        assert row["masks"] == "2 x " + ("causal, key padding" if masked else "causal")


@pytest.mark.parametrize("phase", ["dynamic cache", "static cache"])
def test_llama_decodes(coverage: ModuleType, phase: str) -> None:
    case = coverage.Case("llama", "sdpa", True, phase)
    row = coverage.measure(case)
    check(row)
    assert case in coverage.cases(["llama"]) and "gradient_error" not in row
    model = coverage.ARCHITECTURES["llama"].build("sdpa")
    out, _ = coverage.run_case(case, model, model)
    assert out.shape == (2, 1, 32), "one token"


def test_mpt_over_a_static_cache_is_cut_and_counted(coverage: ModuleType) -> None:
    """Its code takes the ``max()`` of a tensor between the scores and the softmax, which then is in no graph."""
    row = coverage.measure(coverage.Case("mpt", "eager", True, coverage.STATIC))
    check(row)
    assert (row["found"], row["refused"], row["error"]) == (2, 2, 0.0)
    assert row["reasons"].startswith("2 x a graph break parts its query-key product from its softmax")


def test_nanogpt(coverage: ModuleType) -> None:
    rows = [coverage.measure(case) for case in coverage.cases(["nanogpt"])]
    assert [row["implementation"] for row in rows] == ["eager", "sdpa"]
    for row in rows:
        check(row)
        assert row["expected"] == 2 and row["gradient_error"] <= TOLERANCE


def test_torchs_fusion(coverage: ModuleType) -> None:
    """It knows attention without a mask; what arrives as SDPA counts as well."""
    cases = [coverage.Case("vit", name, False, coverage.PREFILL) for name in ("eager", "sdpa")]
    rows = [coverage.measure(case, fusion=True) for case in cases]
    assert [row["torch_fused"] for row in rows] == ["2", "2 (2 already)"]
    case = coverage.Case("nanogpt", "eager", False, coverage.PREFILL)
    assert coverage.fused_by_torch(case, coverage.ARCHITECTURES["nanogpt"].build("eager")) == 0


def test_a_wrong_rewrite_shows(coverage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_mask(gm: torch.fx.GraphModule, *_: object) -> list:
        for node in gm.graph.nodes:
            if node.target is F.scaled_dot_product_attention or "scaled_dot" in str(node.target):
                node.kwargs = {**node.kwargs, "attn_mask": None}
        gm.recompile()
        return []

    monkeypatch.setattr(coverage, "rewrite_graph", forget_the_mask)
    row = coverage.measure(coverage.Case("llama", "sdpa", False, coverage.PREFILL))
    assert row["found"] == 0 and row["error"] > 0.01 and row["gradient_error"] > 0.01


def test_an_error_is_a_row(coverage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(implementation: str) -> nn.Module:
        raise RuntimeError(f"no {implementation}\nhere")

    monkeypatch.setitem(coverage.ARCHITECTURES, "broken", coverage.Architecture(fail))
    monkeypatch.setitem(coverage.ARCHITECTURES, "absent", coverage.Architecture("NoSuchModel", "NoSuchConfig"))
    row = coverage.measure(coverage.Case("broken", "eager", False, coverage.PREFILL))
    assert row["reasons"] == "the model itself: RuntimeError: no eager" and (row["expected"], row["found"]) == (2, 0)
    row = coverage.measure(coverage.Case("absent", "eager", False, coverage.PREFILL))
    assert "NoSuchConfig" in row["reasons"]
    reasons = "1 x a 'mask_3' | 2 x b", "1 x a 'mask_14'", ""
    assert coverage.histogram([{"reasons": text} for text in reasons]).split() == "2 cases a 'mask' 1 cases b".split()


def test_the_command_appends_rows(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "coverage.csv"
    arguments = ["coverage.py", "--only", "nanogpt", "--out", str(out), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        coverage.main()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and list(rows[0]) == coverage.COLUMNS and {row["commit"] for row in rows} == {"abc"}
    assert all(row["found"] == row["expected"] == "2" for row in rows) and "nanogpt" in capsys.readouterr().out
