"""explain: what it says about a model, and that it leaves no trace."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from express_compile import SavedPlan, restore_attention, rewrite_attention
from express_compile.core.cost import Device, Rates
from express_compile.core.method import METHODS, Refusal
from express_compile.core.rows import Rows
from express_compile.core.sites import SiteReport
from express_compile.core.spec import layer_key
from express_compile.kernels.heads import PerHead
from express_compile.planning import devices, measure
from express_compile.planning.predict import MARGIN, crossover
from express_compile.report import explain as report_module
from express_compile.report.explain import Report, explain

ROOT = Path(__file__).resolve().parents[2]
Q = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(0))
NAMED: dict[str, Any] = {"methods": ("express",), "budget": 16}


class Mixed(nn.Module):
    """A causal site, a full one, and one written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = Site(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        self.full = Site(lambda q: F.scaled_dot_product_attention(q, q, q))
        self.hand = Site(lambda q: torch.softmax(torch.tanh(q @ q.mT), -1) @ q)

    def forward(self, q: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        return self.hand(self.full(self.causal(q * times)))


class Site(nn.Module):
    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.f(q)


def test_every_site_is_reported_with_its_verdict() -> None:
    report = explain(Mixed(), Q, **NAMED)
    assert [(s.module, s.form, s.mask, s.method, s.verdict) for s in report.sites] == [
        ("causal", "sdpa", "causal", "express", "rewritten"),
        ("full", "sdpa", "none", "exact", "refused"),
        ("hand", "softmax", "", "exact", "refused"),
    ]
    assert report.graphs == 1
    causal, full, hand = report.sites
    assert causal.rejected == () and full.rejected == (f"express: {full.reason}",)
    assert "not causal" in full.reason and hand.reason == "it caps its scores (tanh)"
    assert all(s.source.startswith(__file__ + ":") for s in report.sites)

    without_names = explain(Mixed(), Q)
    assert [s.verdict for s in without_names.sites] == ["exact", "exact", "refused"]
    asked = explain(Mixed(), Q, methods=("exact",))
    assert [s.verdict for s in asked.sites] == ["exact", "exact", "refused"]


def test_text_and_json_agree() -> None:
    report = explain(Mixed(), Q, example_kwargs={"times": 2.0}, **NAMED)
    text = str(report)
    for site in report.sites:
        line = next(line for line in text.splitlines() if f" {site.module} " in line)
        assert site.reason in line and site.verdict in line  # nothing is cut off
        assert "report/test_explain.py:" + site.source.rsplit(":", 1)[1] in line
    assert text.endswith("3 attention sites: 1 rewritten, 0 exact, 2 refused")
    data = json.loads(report.to_json())
    assert data["totals"] == {"rewritten": 1, "exact": 0, "refused": 2}
    assert [SiteReport(**site) for site in data["sites"]] == list(report.sites)


def test_shapes_and_parameters_are_in_the_json() -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        k = q[:, :2, :, :6]
        return F.scaled_dot_product_attention(q[..., :6], k, q[:, :2], is_causal=True, enable_gqa=True)

    q = Q.to(torch.bfloat16)
    torch._dynamo.mark_dynamic(q, 2)
    (site,) = json.loads(explain(f, q, **NAMED, window=9).to_json())["sites"]
    size = site["shape"].split("Lk=")[1].split()[0]
    assert size.startswith("s") and site["shape"] == f"B=2 H=4/2 Lq={size} Lk={size} D=6 Dv=8 bfloat16"
    assert (site["params"]["s"], site["params"]["recent"], site["params"]["halving"]) == (16, 9, "balanced")
    causal, full, hand = explain(Mixed(), Q, **NAMED).sites
    assert causal.shape == full.shape == "B=2 H=4 Lq=24 Lk=24 D=8 float32"
    assert hand.shape == "" and full.params == hand.params == {}


class Page(HTMLParser):
    """The cells of all rows as text, every tag with its attributes, and all the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, Any]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, attributes))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # everything is closed where it was opened

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_shows_every_site_and_needs_nothing_else() -> None:
    report = explain(Mixed(), Q, **NAMED, modules={"gone": "exact"})
    page = Page(report.to_html())
    assert page.open == [] and len(page.rows) == 1 + len(report.sites)
    for cells, site in zip(page.rows[1:], report.sites, strict=True):
        module, form, shape, mask, method, verdict, reason, others = (" ".join(cell.split()) for cell in cells)
        assert module == site.module + site.source and form == site.form
        assert (shape, mask) == (site.shape or "–", site.mask or "–")
        params = ", ".join(f"{name}={value}" for name, value in site.params.items())
        assert method == f"{site.method} {params}".strip() and verdict == site.verdict
        assert reason == site.reason and others == "".join(site.rejected)
    words = " ".join(page.rows[1][4].split())
    assert "express s=16, sinks=32" in words and "inflation=-1" in words
    text = " ".join(page.text.split())
    assert "3 in all: 1 rewritten, 0 exact, 2 refused. Dynamo made 1 graph of the model." in text
    assert "No site matches modules['gone']." in text
    names = {name for tag, attributes in page.tags for name, _ in attributes} | {tag for tag, _ in page.tags}
    assert not names & {"src", "href", "script", "link", "img", "iframe"} and "url(" not in report.to_html()
    assert "No attention site was found." in Report(()).to_html()


def test_the_page_escapes_what_it_is_given_and_takes_figures() -> None:
    evil = "<script>alert(1)</script>&"
    report = Report((SiteReport(evil, evil, evil, evil, evil, "exact", evil, (evil,), evil, {evil: evil}),), 0, (evil,))
    prolog = '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x" "http://example.org/svg.dtd">\n'
    svg = '<svg viewBox="0 0 1 1">\n<path d="M0 0"></path></svg>'
    html = report.to_html({evil: prolog + svg})
    page = Page(html)
    assert not any(tag == "script" for tag, _ in page.tags) and page.text.count(evil) == 12
    assert svg in html and "DTD" not in html.upper() and page.open == []
    assert "figure>" not in report.to_html()
    for wrong in ("plot.svg", "<svg>", "<svgs></svg>"):
        with pytest.raises(ValueError, match=r"figures\['speed'\]: '.*'; must be an SVG document"):
            report.to_html({"speed": wrong})
    for wrong in ("<svg></svg>", None, {"speed": 5}):
        with pytest.raises(TypeError, match=r"^figures=.*: must map titles to SVG documents$"):
            report.to_html(wrong)


def test_crossovers_are_drawn_where_something_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_of", lambda kind: None)
    report = explain(Mixed(), Q, **NAMED)
    assert report.crossovers() == {}
    rates = {"express": Rates(launches=1e-3), "exact": Rates(scores=1e-7)}
    monkeypatch.setattr(devices, "device_of", lambda kind: Device("a machine", "made up", {"float32": rates}))
    ((title, svg),) = report.crossovers().items()  # the sites that are refused have no plot
    assert all(part in title for part in (report.sites[0].shape, "causal", "s=16", "a machine (made up)"))
    (words,) = re.findall(r"express from ([0-9,]+) keys on", svg)
    site = report.sites[0]
    device = devices.device_of("cpu")
    assert int(words.replace(",", "")) == crossover("express", "exact", site.spec, site.policy, device, margin=MARGIN)
    assert report.crossovers() == {title: svg}
    assert words in report.to_html({title: svg})


def test_times_are_measured_where_sizes_and_masks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.01)
    report = explain(Mixed(), Q, methods=("express",), budget=4, sinks=0, window=0, protected=0).timed()
    express, full, hand = report.sites
    assert set(express.measured_ms) == {"exact", "express"} and min(express.measured_ms.values()) > 0
    assert express.measured_ms["express"] > express.measured_ms["exact"], "on a CPU, 24 tokens"
    assert set(full.measured_ms) == {"exact"} and not hand.measured_ms, "nothing is known of the last"
    assert "measured" in str(report) and f"express {express.measured_ms['express']:.3g} ms" in str(report)
    assert json.loads(report.to_json())["sites"][0]["measured_ms"] == express.measured_ms
    assert f"measured: exact {full.measured_ms['exact']:.3g} ms" in " ".join(Page(report.to_html()).text.split())
    assert "measured" not in str(explain(Mixed(), Q, **NAMED))


# ---------------------------------------------------------------------------------------------------- the errors

THIN: dict[str, Any] = {"sinks": 2, "window": 4, "protected": 0, "method_options": {"express": {"block": 16}}}
LONG = torch.randn(2, 4, 160, 8, generator=torch.Generator().manual_seed(1)) * 2


class Layers(nn.Module):
    """Two causal sites, one without a mask, and one that no method takes; the second depends on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Site(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        self.second = Site(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0))
        self.full = Site(lambda q: F.scaled_dot_product_attention(q, q, q))
        self.hand = Site(lambda q: torch.softmax(torch.tanh(q @ q.mT), -1) @ q)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.hand(self.full(self.second(self.first(q))))


def off_by(method: str, q: torch.Tensor, scale: float, site: SiteReport) -> float:
    """What one call of a method is off by, in float64, of a site that runs in :class:`Layers`."""
    key = layer_key(site.saved.module, site.saved.index)
    found = METHODS[method].op(q, q, q, None, torch.tensor(0), scale, key, **site.params)[0].double()
    exact = F.scaled_dot_product_attention(*3 * [q.double()], is_causal=method == "express", scale=scale)
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("route", ["backend", "capture"])
def test_errors_are_those_by_hand_on_the_activations_of_the_exact_model(route: str) -> None:
    policy = {"methods": ("express", "thinformer"), "budget": 8, **THIN}
    model, before = Layers(), torch.get_rng_state()
    exact = model(LONG)
    report = explain(model, LONG, error=True, **policy)
    if route == "capture":
        report = explain(rewrite_attention(model, **policy), LONG, error=True)
        assert not torch.equal(model(LONG), exact), "later runs are approximate"
    first, second, full, hand = report.sites
    q, errors = LONG, []
    for site, scale in ((first, 8**-0.5), (second, 1.0), (full, 8**-0.5)):
        errors.append(off_by(site.method, q, scale, site))
        assert site.error == pytest.approx(errors[-1], rel=1e-4) and site.error > 0.05 and not site.unmeasured
        q = F.scaled_dot_product_attention(q, q, q, is_causal=site.mask == "causal", scale=scale)
    assert (hand.error, hand.unmeasured) == (None, "") and torch.equal(torch.get_rng_state(), before)
    more = explain(Layers(), LONG, error=True, **{**policy, "budget": 32})
    assert all(a.error < b for a, b in zip(more.sites, errors, strict=False)), "more rows, less error"
    assert max(s.error for s in explain(Layers(), LONG, error=True, **{**policy, "budget": 256}).sites[:3]) < 1e-6


def test_the_error_of_santa_is_that_of_one_draw() -> None:
    def decode(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, -1:], q, q)

    (site,) = explain(decode, LONG, error=True, methods=("santa",), budget=16).sites
    args = LONG[:, :, -1:], LONG, LONG, None, torch.tensor(0), 8**-0.5, site.layer
    exact = decode(LONG)
    drawn = [METHODS["santa"].op(*args[:4], torch.tensor(seed), *args[5:], **site.params)[0] for seed in range(64)]
    assert site.error == pytest.approx(((drawn[0] - exact).norm() / exact.norm()).item(), rel=1e-4)
    mean = torch.stack(drawn).mean(0)
    assert (mean - exact).norm() / exact.norm() < site.error / 3, "the mean of many is not off by that"


def test_errors_are_shown() -> None:
    report = explain(Layers(), LONG, error=True, methods=("express",), budget=8, **THIN)
    first = report.sites[0]
    rows = {line.split()[1]: line.split("│")[8].strip() for line in str(report).splitlines() if "│" in line}
    assert rows["first"] == f"{first.error:.3g}" and rows["full"] == rows["hand"] == "-"
    assert json.loads(report.to_json())["sites"][0]["error"] == first.error
    assert f"error: {first.error:.3g}" in " ".join(Page(report.to_html()).text.split())
    without = explain(Layers(), LONG, methods=("express",), budget=8, **THIN)
    assert "error" not in str(without) and "error" not in Page(without.to_html()).text
    assert {site.error for site in without.sites} == {None}


def test_what_cannot_be_measured_says_why() -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    (site,) = explain(f, LONG * 0, error=True, methods=("express",), budget=8, **THIN).sites
    assert (site.error, site.unmeasured) == (None, "exact attention is 0 here")
    assert "not measured: exact attention is 0 here" in str(Report((site,)))
    assert "error not measured: exact attention is 0 here" in Page(Report((site,)).to_html()).text
    params = {name: value for name, value in site.params.items() if name != "min_length"}
    for changes, words in (({}, "it did not run"), ({"params": params}, "its op has no min_length to make it exact")):
        (told,) = report_module._with_errors([replace(site, unmeasured="", **changes)], {})
        assert (told.error, told.unmeasured) == (None, words)


def test_calls_have_their_own_errors_and_a_graph_that_runs_more_often_its_largest() -> None:
    scales = (0.1, 1.0, 2.0)

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layers().first

        @torch._dynamo.disable(recursive=False)
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            for scale in scales:
                q = self.inner(q * scale)
            return q

    policy = {"methods": ("express",), "budget": 8, **THIN}
    inputs = [LONG * scales[0]]
    for scale in scales[1:]:
        inputs.append(scale * F.scaled_dot_product_attention(*3 * inputs[-1:], is_causal=True))
    sites = explain(rewrite_attention(Repeated(), **policy), LONG, error=True).sites
    errors = [off_by("express", q, 8**-0.5, site) for q, site in zip(inputs, sites, strict=True)]
    assert [site.error for site in sites] == pytest.approx(errors, rel=1e-4) and len(set(errors)) == 3
    again = explain(Repeated(), LONG, error=True, **policy).sites
    assert [site.error for site in again] == [site.error for site in sites]
    for found, error in (([0.1, 0.3, 0.2], 0.3), ([0.2], 0.2)):
        (told,) = report_module._with_errors(
            [replace(sites[0], error=None)], {sites[0].layer: map(torch.tensor, found)}
        )
        assert told.error == pytest.approx(error)


@pytest.mark.parametrize("padded", [False, True])
def test_errors_of_transformers_models(padded: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.LlamaConfig(**dict(zip(names, (64, 32, 64, 2, 4), strict=True)), initializer_range=0.3)
    model = transformers.LlamaForCausalLM(config).eval()
    ids, keep = torch.randint(0, 64, (2, 160)), torch.ones(2, 160, dtype=torch.int64)
    keep[1, :50] = 0
    kwargs = {"use_cache": False, **({"attention_mask": keep} if padded else {})}
    policy = {"methods": ("express",), "budget": 8, **THIN}
    with torch.no_grad():
        exact = model(ids, **kwargs).logits
    before = explain(model, ids, example_kwargs=kwargs, error=True, **policy)
    rewrite_attention(model, **policy)
    during = explain(model, ids, example_kwargs=kwargs, error=True)
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda m, a, out: seen.append(out.logits))
    explain(model, ids, example_kwargs=kwargs, error=True)
    explain(model, ids, example_kwargs=kwargs)
    hook.remove()
    real = keep.bool() if padded else slice(None)
    assert (seen[0] - exact)[real].abs().max() < 1e-4 < (seen[1] - exact)[real].abs().max(), "exact while it compares"
    errors = [site.error for site in before.sites]
    assert errors == pytest.approx([site.error for site in during.sites], rel=1e-3) and min(errors) > 0.02


def test_long_reasons_and_brackets_survive() -> None:
    reason = "because [bold]of[/bold] " + "x" * 300
    site = SiteReport("m", "", "sdpa", "causal", "exact", "refused", reason, (Refusal("express", reason),))
    assert site.rejected == (f"express: {reason}",)
    text = str(Report((site, SiteReport("", "a.py:1", "sdpa", "", "exact", "exact", "r"))))
    assert reason in text and "(root)" in text
    assert str(Report(())) == "no attention site was found"


def test_the_model_runs_once_unrewritten_and_untouched() -> None:
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            out = F.scaled_dot_product_attention(q * self.weight, q, q, is_causal=True)
            calls.append(out)
            return out

    model = Counted()
    state = torch.get_rng_state()
    report = explain(model, Q, **NAMED)
    assert [s.verdict for s in report.sites] == ["rewritten"]
    assert model.steps.item() == 0 and model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 1 and not calls[0].requires_grad
    exact = F.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    assert (calls[0] - exact).abs().max() < 1e-6


def test_a_model_can_be_explained_as_often_as_one_likes_also_after_compiling() -> None:
    model = Mixed()
    compiled = torch.compile(model, backend="eager")
    compiled(Q)
    limit = torch._dynamo.config.recompile_limit
    reports = [explain(compiled, Q, **NAMED)] + [explain(model, Q, budget=2 ** (4 + i % 4)) for i in range(10)]
    assert [len(r.sites) for r in reports] == [3] * 11
    assert torch._dynamo.config.recompile_limit == limit
    # the user's own compiled model still runs what it had compiled
    assert torch.equal(compiled(Q), model(Q))


def test_graph_breaks_are_counted_and_every_graph_is_searched() -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    report = explain(f, Q, **NAMED)
    assert report.graphs == 2 and [s.verdict for s in report.sites] == ["rewritten"] * 2


def test_globs_are_followed_and_those_without_a_site_are_shown() -> None:
    modules = {"ca*": "exact", "*.cross_attn": {"budget": 16}, "full": "thinformer", "nowhere": "exact"}
    report = explain(Mixed(), Q, **NAMED, modules=modules)
    assert [(s.method, s.verdict) for s in report.sites] == [
        ("exact", "exact"),
        ("thinformer", "rewritten"),
        ("exact", "refused"),
    ]
    assert report.sites[0].reason == "modules['ca*'] names 'exact' first"
    assert report.unmatched == ("modules['*.cross_attn']", "modules['nowhere']")
    assert str(report).endswith("no site matches modules['*.cross_attn'], modules['nowhere']")
    assert json.loads(report.to_json())["unmatched"] == list(report.unmatched)
    assert "no site matches" not in str(explain(Mixed(), Q, **NAMED))


def test_bad_input_is_told() -> None:
    with pytest.raises(TypeError, match="unknown option 'budgets': allowed are budget"):
        explain(Mixed(), Q, budgets=3)
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        explain(Mixed(), Q, methods=("fast",))
    with pytest.raises(TypeError, match="model=5: must be a torch.nn.Module or a function"):
        explain(5, Q)
    assert explain(lambda x: x + 1, Q).sites == ()


def test_rewritten_models_report_what_was_done() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 24))
    before = explain(model, ids, example_kwargs={"use_cache": False}, **NAMED)
    rewrite_attention(model, methods=["express"], budget=16, modules={"*.cross": "exact"})
    during = explain(model, ids, example_kwargs={"use_cache": False})
    with pytest.raises(ValueError, match="budget: the model was changed by rewrite_attention"):
        explain(model, ids, budget=32)
    restore_attention(model)
    assert [(s.module, s.method, s.verdict) for s in before.sites] == [
        (s.module, s.method, s.verdict) for s in during.sites
    ]
    assert [s.verdict for s in before.sites] == ["rewritten"] * 2
    assert (before.graphs, during.graphs) == (1, 0)
    assert (before.unmatched, during.unmatched) == ((), ("modules['*.cross']",))


# ---------------------------------------------------------------------------------------------- plans per KV head


def test_what_every_head_sees_is_told_in_words_and_in_a_picture():
    q, k, v = (torch.randn(1, heads, 64, 8) for heads in (4, 2, 2))
    mixed = PerHead([Rows(recent=9), Rows(2, 9, selected=1)])
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    report = explain(attend, q, k, v, methods=[mixed])
    text = str(report)
    assert "┃ rows" in text and "│ by KV head, 2 below │" in text
    assert (
        "rows of every KV head:\n  (root)  1 2\n  1: 9 recent (1 head)\n  2: 2 sinks + 9 recent + 1 selected b" in text
    )
    page = report.to_html()
    assert "<code>rows=by KV head, 2 below</code>" in page and page.count("<rect ") == 2 + 2
    assert "<title>(root) head 1: 2 sinks + 9 recent + 1 selected blocks</title>" in page
    finer = explain(attend, q, k, v, methods=[PerHead([Rows(recent=9)] * 3 + [Rows(2)])])
    assert "│ by query head, 4 below │" in str(finer) and "rows of every query head:\n  (root)  2 2 2 1\n" in str(finer)
    assert finer.to_html().count("<rect ") == 4 + 2
    uniform = explain(attend, q, k, v, methods=[PerHead([Rows(recent=9)])])
    assert "<rect " not in uniform.to_html() and "│ 9 recent │" in str(uniform)
    assert "rows of every KV head" not in str(uniform)


def test_a_shipped_plan_is_a_line_of_the_table_and_a_line_per_layer_below():
    plan = SavedPlan.load(ROOT / "examples/plans/smollm2-135m.json")
    sites = [
        SiteReport(x.module, "", "sdpa", "causal", "heads", x.verdict, "as saved", params=x.params, saved=x)
        for x in plan.sites
    ]
    report = Report(tuple(sites))
    text, page = str(report), report.to_html()
    name = "model.layers.{0,2..29}.self_attn (29 sites)"  # one has the same rows in all heads
    assert name in text and "by KV head, 3 below" in text and f"<summary>{name}</summary>" in page
    assert f"│ {plan.sites[1].rows[0]} │" in text and len(set(plan.sites[1].rows)) == 1
    numbers = dict(re.findall(r"^  +(\d+): (.*) \(\d+ heads?\)$", text, re.MULTILINE))
    lines = dict(re.findall(r"^  (model\S+) +([\d ]+)$", text, re.MULTILINE))
    found = {name: [numbers[x] for x in of_heads.split()] for name, of_heads in lines.items()}
    assert found == {x.module: list(map(str, x.rows)) for x in plan.sites}
    assert page.count("<rect ") == 90 + len(numbers), "a cell per head, and one per plan"
    for i, rows in enumerate(plan.sites[8].rows):
        assert f"<title>model.layers.8.self_attn head {i}: {rows}</title>" in page
