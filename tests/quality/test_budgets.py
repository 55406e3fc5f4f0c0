"""Budgets by error: what is measured, what is chosen, and that the policy does what was promised."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from express_compile.core.policy import Policy
from express_compile.core.sites import record_sites
from express_compile.kernels.express import rows_seen
from express_compile.quality.budgets import _cheapest, _hull, calibrate_error, mean_kl
from express_compile.routes.eager import is_rewritten, restore_attention, rewrite_attention

PATHS = [f"model.layers.{i}.self_attn" for i in range(3)]
BASE = Policy(methods=("express",), sinks=2, window=4, protected=0, method_options={"express": {"block": 16}})
BUDGETS = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def model(listening_model):
    return listening_model


@pytest.fixture(scope="module")
def batches():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(97, (1, n), generator=random) for n in (200, 240)]


@torch.no_grad()
def measured(model, batches, policy: Policy, first: int = 0) -> float:
    """Mean KL(exact || with this policy) over batches and positions, computed apart from the code under test."""
    total = []
    for ids in batches:
        exact = model(ids).logits[:, first:].double().log_softmax(-1)
        rewrite_attention(model, policy)
        try:
            found = model(ids).logits[:, first:].double().log_softmax(-1)
        finally:
            restore_attention(model)
        total.append((exact.exp() * (exact - found)).sum(-1).mean().item())
    return sum(total) / len(total)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_policy_keeps_the_tolerance_with_fewer_rows_than_any_uniform_one(model, batches, share: float) -> None:
    uniform = {s: measured(model, batches, replace(BASE, budget=s)) for s in BUDGETS}
    tolerance = share * uniform[4]
    found = calibrate_error(model, batches, tolerance=tolerance, budgets=BUDGETS, policy=BASE)
    assert not is_rewritten(model) and [site.module for site in found.sites] == PATHS
    assert measured(model, batches, found.policy) == pytest.approx(found.kl, rel=1e-3) and found.kl <= tolerance

    def rows(s: int) -> float:
        return sum(rows_seen(replace(BASE, budget=s), ids.shape[1]).mean() for ids in batches) / len(batches)

    enough = [s for s in BUDGETS if uniform[s] <= tolerance]
    assert found.rows < min([rows(s) for s in enough] or [sum(x.shape[1] + 1 for x in batches) / 2 / len(batches)])
    by_path = {site.module: site for site in found.sites}
    assert by_path[PATHS[2]].budget == 4, "nobody listens to the last layer"
    assert by_path[PATHS[1]].kl[4] > 5 * by_path[PATHS[0]].kl[4]


def test_what_is_measured(model, batches) -> None:
    found = calibrate_error(model, batches, tolerance=1e-9, budgets=BUDGETS, policy=BASE)
    assert found.kl <= 1e-9 and found.policy.at(PATHS[1]).methods == ("exact",), "nothing else is good enough"
    site = found.sites[0]
    for s in BUDGETS:
        assert site.rows[str(s)] == pytest.approx(
            sum(rows_seen(replace(BASE, budget=s), ids.shape[1]).mean() for ids in batches) / 2, rel=0.15
        )
    assert site.rows["exact"] == pytest.approx((201 + 241) / 4)
    errors = []
    with torch.no_grad():
        seen = []
        rewrite_attention(model, replace(BASE, budget=8))
        from express_compile.kernels import express as E

        original = E.attend
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(E, "attend", lambda *a: seen.append(a) or original(*a))
            for ids in batches:
                model(ids)
        restore_attention(model)
        assert len(seen) == 6
        for call, config, *_ in seen[::3]:  # the first layer, whose inputs no approximation has touched
            q, k, v = call.query, call.key, call.value
            exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            found_here = E.express_reference(q, k, v, config, call.scale, call.seed, call.layer)[0]
            errors.append(((found_here - exact).norm() / exact.norm()).item())
    assert site.errors[8] == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_a_budget_among_the_options_of_the_method_is_looked_for_as_well(model, batches) -> None:
    asked = dict(batches=batches[:1], tolerance=0.02, budgets=BUDGETS)
    expected = calibrate_error(model, **asked, policy=BASE)
    found = calibrate_error(model, **asked, policy=Policy(methods=[BASE.of("express")]))
    assert [x.errors for x in found.sites] == [x.errors for x in expected.sites]
    assert len(set(found.sites[1].errors.values())) == len(BUDGETS)
    assert measured(model, batches[:1], found.policy) == pytest.approx(expected.kl, rel=1e-3)


def test_positions_before_the_first_do_not_count(model, batches) -> None:
    found = calibrate_error(model, batches, tolerance=0.02, budgets=BUDGETS, policy=BASE, first=150)
    assert measured(model, batches, found.policy, 150) == pytest.approx(found.kl, rel=1e-3)
    with pytest.raises(ValueError, match="first=200: a batch has only 200 positions"):
        calibrate_error(model, batches, tolerance=0.02, budgets=BUDGETS, policy=BASE, first=200)
    assert not is_rewritten(model)


class Head(nn.Module):
    """A model that writes its attention itself, once or twice in one module."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.embed, self.out = times, nn.Embedding(97, 32), nn.Linear(32, 97)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).unflatten(-1, (4, -1)).transpose(1, 2)
        for _ in range(self.times):
            x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


def test_models_whose_graphs_are_captured(batches) -> None:
    torch.manual_seed(0)
    model = Head(1).eval()
    found = calibrate_error(model, batches[:1], tolerance=1e-3, budgets=BUDGETS, policy=BASE)
    (site,) = found.sites
    errors = [site.errors[s] for s in BUDGETS]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 and not is_rewritten(model)
    with torch.no_grad():
        exact = model(batches[0]).double().log_softmax(-1)
        now = rewrite_attention(model, found.policy)(batches[0]).double().log_softmax(-1)
    assert 0 < found.kl <= 1e-3 and (exact.exp() * (exact - now)).sum(-1).mean() == pytest.approx(found.kl, rel=1e-3)
    with pytest.raises(ValueError, match="more than one site, and a policy has one budget for a module"):
        calibrate_error(Head(2), batches[:1], budgets=BUDGETS, policy=BASE)


def test_plain_data(model, batches) -> None:
    found = calibrate_error(model, batches[:1], tolerance=0.05, budgets=BUDGETS, policy=BASE)
    data = json.loads(found.to_json())
    assert Policy.from_json(json.dumps(data["policy"])) == found.policy
    assert [site["budget"] for site in data["sites"]] == [site.budget for site in found.sites]
    rewrite_attention(model, found.policy)
    with torch.no_grad(), record_sites() as sites:
        model(batches[0])
    restore_attention(model)
    assert [x.params.get("s") for x in sites] == [site.budget for site in found.sites]


def test_wrong_arguments(model, batches) -> None:
    for words, changes in (
        (r"batches: must hold at least one", {"batches": []}),
        (r"tolerance=0: must be above 0", {"tolerance": 0}),
        (r"budgets=\[4, 6\]: must be powers of two", {"budgets": (4, 6)}),
        (r"tolerance=nan: must be above 0 nats and finite", {"tolerance": math.nan}),
        (r"tolerance=inf: must be above 0 nats and finite", {"tolerance": math.inf}),
        (r"first=-1: must be a position, 0 or more", {"first": -1}),
        (r"first=-10: must be a position, 0 or more", {"first": -10}),
        (r"first=100000: a batch has only \d+ positions", {"first": 100000}),
        (r"first=9223372036854775808: must be below", {"first": 2**63}),
        (r"budgets=\[\]: must be powers of two", {"budgets": []}),
        (r"budgets=\[2\]: must be powers of two", {"budgets": [2]}),
        (r"batches\[0\]: shape \(9,\); must be \[batch, positions\]", {"batches": [batches[0][0, :9]]}),
        (r"batches\[0\]: shape \(0, 9\); must be .* not empty", {"batches": [batches[0][:0, :9]]}),
        (r"batches: must hold at least one", {"batches": iter(())}),
        (r"policy.methods=\('exact',\): must name 'express'", {"policy": Policy(methods=("exact",))}),
        (r"policy.methods=\('santa',\): allowed are", {"policy": Policy(methods=("santa",))}),
        (r"policy.modules=.*: must be empty", {"policy": replace(BASE, modules={"a": "exact"})}),
        (r"no site can be rewritten by thinformer: .*causal", {"policy": Policy(methods=("thinformer",))}),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate_error(model, **{"batches": batches, "budgets": BUDGETS, "policy": BASE, **changes})
        assert not is_rewritten(model)
    for words, changes in (
        (r"first=1.0: must be of type int", {"first": 1.0}),
        (r"first=None: must be of type int", {"first": None}),
        (r"tolerance='0.1': must be of type int or float", {"tolerance": "0.1"}),
        (r"budgets=64: must be a sequence", {"budgets": 64}),
        (r"budgets='64': must be a sequence", {"budgets": "64"}),
        (r"budgets=64.0: must be of type int", {"budgets": [64.0]}),
        (r"budgets=True: must be of type int", {"budgets": [True]}),
        (r"batches: a Tensor; must be several batches, such as a list of one", {"batches": batches[0]}),
        (r"batches: a dict; must be several batches", {"batches": {"input_ids": batches[0]}}),
        (r"batches: a int; must be several batches", {"batches": 5}),
        (r"batches\[1\]='x': must be a tensor", {"batches": [batches[0], "x"]}),
        (r"policy=5: must be None or a Policy", {"policy": 5}),
    ):
        with pytest.raises(TypeError, match=words):
            calibrate_error(model, **{"batches": batches, "budgets": BUDGETS, "policy": BASE, **changes})
        assert not is_rewritten(model)
    rewrite_attention(model, BASE)
    with pytest.raises(ValueError, match=r"restore_attention\(model\) first"):
        calibrate_error(model, batches)
    restore_attention(model)


# ------------------------------------------------------------------------------------------------------ allocation


@st.composite
def sites(draw):
    def site() -> dict:
        rows = sorted(draw(st.lists(st.integers(1, 99), min_size=3, max_size=3, unique=True)))
        kl = sorted(draw(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=3, max_size=3)), reverse=True)
        return {
            "rows": {8: rows[0], 16: rows[1], 32: rows[2], None: 100},
            "kl": dict(zip((8, 16, 32), kl, strict=True)),
        }

    return {i: site() for i in range(draw(st.integers(1, 3)))}


@given(sites(), st.floats(0, 3))
def test_no_cheaper_assignment_costs_less(found, total: float) -> None:
    """Within the tolerance, and as cheap as any assignment of the hulls that costs no more than what was found."""
    chosen = _cheapest(found, total)

    def cost(assignment) -> float:
        return sum(found[i]["kl"].get(s, 0.0) for i, s in assignment.items())

    def rows(assignment) -> float:
        return sum(found[i]["rows"][s] for i, s in assignment.items())

    assert cost(chosen) <= total + 1e-9
    assignments = [{}]
    for i in found:
        assignments = [{**a, i: s} for a in assignments for s in (8, 16, 32, None)]
    for other in assignments:
        if cost(other) <= cost(chosen) - 1e-9:
            assert rows(other) >= rows(chosen) - 1e-9


@given(sites())
def test_hulls_are_convex(found) -> None:
    for site in found.values():
        hull = _hull(site)
        slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in zip(hull, hull[1:], strict=False)]
        assert slopes == sorted(slopes, reverse=True) and all(x > 0 for x in slopes)
        assert hull[-1][1] == 0.0


def test_rounding_makes_no_kl_negative() -> None:
    random = torch.Generator().manual_seed(0)
    exact = torch.randn(16, 64, 97, generator=random)
    close = exact + 1e-6 * torch.randn(exact.shape, generator=random)
    found = [
        mean_kl(p[None], q[None], torch.ones(1, len(p), dtype=torch.bool)) for p, q in zip(exact, close, strict=True)
    ]
    assert all(0 <= x < 1e-7 for x in found) and any(found)
