"""Sites of which the same was decided are one line of a report, and nothing of them is lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from express_compile.core.sites import SiteReport
from express_compile.report.explain import Report, explain
from express_compile.report.groups import grouped, name_of


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (["a.attn"], "a.attn"),
        ([""], "(root)"),
        (["a.attn", "a.attn"], "a.attn (2 sites)"),
        ([f"layers.{i}.attn" for i in range(32)], "layers.{0..31}.attn (32 sites)"),
        ([f"layers.{i}.attn" for i in (10, 0, 2, 3, 4)], "layers.{0,2..4,10}.attn (5 sites)"),
        ([f"stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1, 2)], "stages.{0..1}.blocks.{0..2} (6 sites)"),
        (["stages.0.blocks.0", "stages.1.blocks.1"], "stages.0.blocks.0 ... stages.1.blocks.1 (2 sites)"),
        (["encoder.0", "decoder.0", "decoder.1"], "encoder.0 ... decoder.1 (3 sites)"),
        (["layers.0", "layers.0.attn"], "layers.0 ... layers.0.attn (2 sites)"),
        (["layers.0", ""], "layers.0 ... (root) (2 sites)"),
    ],
)
def test_a_group_has_one_name_that_names_no_other_module(modules: list[str], name: str) -> None:
    assert name_of(modules) == name


def test_groups_stand_in_the_order_of_their_first_and_keep_theirs() -> None:
    assert grouped([3, 1, 4, 1, 5, 9, 2, 6], lambda x: x % 2) == [[3, 1, 1, 5, 9], [4, 2, 6]]
    assert grouped([], id) == []


class Layer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=self.causal)


@pytest.fixture(scope="module")
def report() -> Report:
    """Six causal layers, the third of which has no mask."""
    model = nn.Sequential(*(Layer(i != 2) for i in range(6)))
    return explain(model, torch.ones(1, 2, 40, 8), methods=["express"], budget=4, sinks=2, window=4, protected=0)


def test_the_text_has_a_line_for_layers_of_which_the_same_was_decided(report: Report) -> None:
    text = str(report)
    (five,) = [line for line in text.splitlines() if "{0..1,3..5} (5 sites)" in line]
    (one,) = [line for line in text.splitlines() if " 2 " in line and "not causal" in line]
    assert "rewritten" in five and "refused" in one and text.count("test_groups.py:") == 2
    assert "Dynamo made 1 graph of the model" in text
    assert text.endswith("6 attention sites: 5 rewritten, 0 exact, 1 refused")
    assert len(json.loads(report.to_json())["sites"]) == 6, "the JSON has every site"


def test_layers_with_other_errors_have_lines_of_their_own() -> None:
    def site(i: int, error: float | None) -> SiteReport:
        return SiteReport(f"layers.{i}", "m.py:1", "sdpa", "causal", "express", "rewritten", "r", error=error)

    text = str(Report((site(0, 0.25), site(1, 0.25), site(2, 0.5))))
    assert "layers.{0..1} (2 sites)" in text and re.search(r"layers\.2 .*0\.5 ", text)
    page = " ".join(Report((site(0, 0.25), site(1, None), site(2, 0.5))).to_html().split())
    assert "error: 0.25 to 0.5" in page, "the row of the page has the range"
    assert "layers.2<br><small>m.py:1</small><br>error: 0.5</li>" in page, "and what unfolds has each"
    assert "<small>m.py:1</small></li>" in page, "the one that was not measured"


def test_the_page_unfolds_a_row_into_its_sites(report: Report) -> None:
    html = report.to_html()
    assert html.count("<tr>") == 1 + 2 and html.count("<details>") == 1
    details = html[html.index("<details>") : html.index("</details>")]
    assert "<summary>{0..1,3..5} (5 sites)</summary>" in details
    assert re.findall(r"<li>(\d)<br><small>(.*)</small></li>", details) == [
        (site.module, site.source) for site in report.sites if site.verdict == "rewritten"
    ]
    assert "Dynamo made 1 graph of the model." in html and "6 in all:" in html
    assert "<details>" not in Report(report.sites[:1]).to_html()
