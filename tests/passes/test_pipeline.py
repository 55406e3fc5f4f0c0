"""One pipeline: the backend, captured modules and explain() find and decide the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from express_compile.core.plan import Plan
from express_compile.core.policy import Policy
from express_compile.core.sites import SiteReport, record_sites
from express_compile.passes import pipeline
from express_compile.report.explain import explain
from express_compile.routes import capture, compile
from express_compile.routes.eager import rewrite_attention

OPTIONS: dict[str, Any] = {
    "methods": ["express"], "budget": 16, "sinks": 2, "window": 4, "protected": 0,
    "modules": {"1": {"budget": 8}, "2": "exact"},
}  # fmt: skip
X = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q, q, is_causal=self.causal).transpose(1, 2).flatten(2)


def model() -> nn.Sequential:
    return nn.Sequential(Attention(), Attention(), Attention(), Attention(causal=False))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[pipeline.PlannedGraph]:
    """All graphs that were planned, by whichever way."""
    graphs: list[pipeline.PlannedGraph] = []

    def plan_graph(*args: Any, **options: Any) -> pipeline.PlannedGraph:
        graphs.append(pipeline.plan_graph(*args, **options))
        return graphs[-1]

    for way in (compile, capture, "express_compile.report.explain"):
        target = f"{way if isinstance(way, str) else way.__name__}.plan_graph"
        monkeypatch.setattr(target, plan_graph)
    return graphs


def sites(graphs: list[pipeline.PlannedGraph]) -> list[SiteReport]:
    return [report for graph in graphs for report in graph.reports()]


@torch.no_grad()
def test_three_ways_find_and_decide_the_same(planned: list[pipeline.PlannedGraph]) -> None:
    torch._dynamo.reset()
    report = explain(model(), X, **OPTIONS)
    explained = sites(planned)
    assert tuple(explained) == report.sites and len(explained) == 4
    assert [(x.module, x.method, x.params.get("s")) for x in explained[:2]] == [
        ("0", "express", 16),
        ("1", "express", 8),
    ]
    assert [(x.verdict, x.method) for x in explained[2:]] == [("exact", "exact"), ("refused", "exact")]
    planned.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend="express", options=OPTIONS)(X)
    assert sites(planned) == explained
    planned.clear()
    with record_sites() as recorded:
        captured = rewrite_attention(model(), **OPTIONS)(X)
    assert sites(planned) == explained and recorded == explained
    assert torch.allclose(compiled, captured, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_planned_graph_is_as_it_was_until_it_is_rewritten() -> None:
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        before = gm.code
        graph = pipeline.plan_graph(gm, inputs, Policy(**OPTIONS))
        assert gm.code == before
        otherwise = graph.reports(otherwise=Plan("exact", "refused", "the test says so"))
        assert [x.reason for x in otherwise].count("the test says so") == 2
        assert [x.verdict for x in otherwise] == ["refused", "refused", "exact", "refused"]
        run = graph.rewritten(lambda gm: gm)
        seen.extend((before, gm.code))
        return run

    torch._dynamo.reset()
    out = torch.compile(model(), backend=backend)(X)
    assert "express_compile" not in seen[0] and seen[1].count("express_compile.express") == 2
    torch.testing.assert_close(out, rewrite_attention(model(), **OPTIONS)(X), rtol=0, atol=0)
