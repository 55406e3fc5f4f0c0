"""The planner: every verdict and its reason, with methods whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from express_compile.core.cost import Cost, Device, Rates
from express_compile.core.method import METHODS, Method, Refusal
from express_compile.core.options import BUDGET, TABLE_AT, WHOLE, Options, option
from express_compile.core.plan import SavedPlan, SavedSite
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, floor_power_of_two
from express_compile.passes.pipeline import plan_sites
from express_compile.passes.site import AttentionSite
from express_compile.planning.choose import check_policy, plan, require, require_matches, unmatched
from express_compile.planning.predict import MARGIN, crossover

SPEC = AttentionSpec(1, 4, 2, 100, 100, 8, 8, torch.float32, "cpu", 0.5, Mask(causal=True))
UNKNOWN = replace(SPEC, mask=Mask(unknown="it is made up"))


def refuse(name: str, *, dropout: bool = True) -> Any:
    def answer(spec: AttentionSpec, policy: Policy) -> Refusal | None:
        if spec.mask.unknown is not None:
            return Refusal(name, f"its mask is not proven: {spec.mask.unknown}")
        if dropout and spec.dropout_p > 0:
            return Refusal(name, f"dropout_p={spec.dropout_p}")
        return None

    return answer


@dataclass(frozen=True)
class Depth(Options):
    budget: Any = option(512, "rows", BUDGET, shared="budget")
    depth: int | None = option(1, "how deep", WHOLE)


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two methods that exist in this test alone: ``first`` (faster than exact from 64 keys on) and ``second`` (takes
    dropout, of unknown cost); and a CPU on which an exact score takes a microsecond."""
    METHODS.load()
    known = dict(METHODS._methods)
    base = {"summary": "", "supports": "", "refuses": ""}
    known["first"] = Method(
        name="first",
        refuse=refuse("first"),
        params=lambda site, policy: {"s": policy.budget},
        options=Depth,
        cost=lambda spec, params: Cost(0, 0),
        **base,
    )
    known["second"] = Method(
        name="second", refuse=refuse("second", dropout=False), params=lambda site, policy: {}, **base
    )
    monkeypatch.setattr(METHODS, "_methods", known)
    monkeypatch.setattr("express_compile.planning.choose.DEFAULT_METHODS", ("first", "exact"))
    monkeypatch.setattr("express_compile.planning.choose.device_of", {"cpu": CPU}.get)
    yield


# 4 heads, causal: 64 keys are 8,320 scores, 8.32 ms
CPU = Device("a CPU", "made up", {"float32": {"first": Rates(launches=8.32e-3 / MARGIN), "exact": Rates(scores=1e-6)}})


def test_a_method_that_is_predicted_to_win_is_chosen_by_default() -> None:
    decision = plan(SPEC, Policy(budget=32))
    assert (decision.method, decision.verdict, decision.params) == ("first", "rewritten", {"s": 32})
    assert decision.rejected == ()
    assert decision.reason == "causal attention; predicted 7.92 ms, exact attention 20.2 ms"
    assert decision.predicted_ms == pytest.approx({"first": 8.32 / MARGIN, "exact": 20.2})


def test_times_that_leave_padding_out_say_so() -> None:
    padded = replace(SPEC, mask=replace(SPEC.mask, padding=True))
    decision = plan(padded, Policy(budget=32))
    assert decision.reason == (
        "causal, key padding attention; predicted 7.92 ms, exact attention 20.2 ms, both without padding"
    )
    METHODS._methods["first"] = replace(METHODS["first"], padding_cost=True)
    assert plan(padded, Policy(budget=32)).reason.endswith("20.2 ms, the latter without padding")
    assert plan(SPEC, Policy(budget=32)).reason.endswith("20.2 ms")


def test_where_exact_attention_is_faster_it_stays() -> None:
    short = replace(SPEC, Lk=63, Lq=63)
    decision = plan(short, Policy())
    assert (decision.method, decision.verdict) == ("exact", "exact")
    assert decision.reason == "predicted 7.92 ms, exact attention 8.06 ms"
    assert decision.predicted_ms == pytest.approx({"first": 8.32 / MARGIN, "exact": 8.064})
    assert plan(replace(SPEC, Lk=64, Lq=64), Policy()).verdict == "rewritten"
    assert plan(short, Policy(methods=("first",))).verdict == "rewritten"  # named alone: always
    assert plan(short, Policy(methods=("first", "exact"))).verdict == "exact"
    assert plan(short, Policy(min_length=63)).verdict == "rewritten"
    assert plan(SPEC, Policy(methods=("first",), min_length=101)).verdict == "exact"
    assert plan(SPEC, Policy(methods=("first",), min_length=100)).verdict == "rewritten"


def test_of_several_methods_the_fastest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {**CPU.rates["float32"], "second": Rates(launches=2e-3)}
    device = Device("a CPU", "made up", {"float32": rates})
    monkeypatch.setattr("express_compile.planning.choose.device_of", {"cpu": device}.get)
    monkeypatch.setitem(METHODS._methods, "second", replace(METHODS["second"], cost=lambda spec, params: Cost(0, 0)))
    decision = plan(SPEC, Policy(methods=("first", "second", "exact")))
    assert decision.method == "second"
    assert decision.predicted_ms == pytest.approx({"first": 8.32 / MARGIN, "second": 2.0, "exact": 20.2})
    assert [refusal.method for refusal in decision.rejected] == ["first"]
    assert "second is preferred" in decision.rejected[0].reason and "7.92 ms" in decision.rejected[0].reason
    assert plan(SPEC, Policy(methods=("first", "second"))).method == "first", "without exact the order decides"


def test_a_device_without_measurements_is_exact_unless_the_method_is_named() -> None:
    spec = replace(SPEC, device="cuda")
    decision = plan(spec, Policy())
    assert decision.verdict == "exact" and "how fast it is on cuda is not known" in decision.reason
    assert "calibrate" in decision.reason
    assert plan(spec, Policy(methods=("first",))).method == "first"
    assert plan(spec, Policy(min_length=50)).method == "first"
    half = plan(replace(SPEC, dtype=torch.float16), Policy())
    assert half.verdict == "exact" and "a CPU at torch.float16 is not known" in half.reason


def test_the_order_of_methods_is_kept_and_every_rejection_is_told() -> None:
    spec = replace(SPEC, dropout_p=0.1)
    decision = plan(spec, Policy(methods=("first", "second")))
    assert (decision.method, decision.verdict) == ("second", "rewritten")
    assert decision.rejected == (Refusal("first", "dropout_p=0.1"),)
    assert plan(SPEC, Policy(methods=("second", "first"))).method == "second"


@pytest.mark.parametrize(
    ("spec", "methods", "verdict"),
    [
        (replace(SPEC, dropout_p=0.1), None, "exact"),  # nothing was named, only exact remains
        (replace(SPEC, dropout_p=0.1), ("first",), "refused"),
        (replace(SPEC, dropout_p=0.1), ("first", "exact"), "exact"),  # the policy allows exact
        (UNKNOWN, None, "refused"),
        (UNKNOWN, ("first", "second"), "refused"),
        (UNKNOWN, ("exact",), "exact"),
        (SPEC, ("exact", "first"), "exact"),
    ],
)
def test_verdicts(spec: AttentionSpec, methods: tuple[str, ...] | None, verdict: str) -> None:
    decision = plan(spec, Policy(methods=methods))
    assert (decision.method, decision.verdict) == ("exact", verdict)
    assert decision.reason
    if spec is UNKNOWN and verdict == "refused":
        assert "it is made up" in decision.reason


def site(module: str, spec: AttentionSpec | None = SPEC, gradient: bool = False, **fields: Any) -> AttentionSite:
    graph = torch.fx.Graph()
    gm = torch.fx.GraphModule({}, graph)
    node = graph.placeholder("x")
    node.meta["example_value"] = torch.zeros(1, requires_grad=gradient)
    return AttentionSite(node, gm, module, 0, "", fields.pop("form", "sdpa"), spec=spec, **fields)


def decisions(sites: list[AttentionSite], **fields: Any) -> list[tuple[str, str]]:
    return [(plan.method, plan.verdict) for _, plan in plan_sites(sites, Policy(**fields))]


def test_modules_have_policies_of_their_own() -> None:
    sites = [site("a.self"), site("a.cross"), site("b.self")]
    modules = {"*.self": {"budget": 16}, "a.*": "exact", "a.cross": {"methods": ["second", "first"]}}
    planned = plan_sites(sites, Policy(methods=("first",), budget=64, modules=modules, strict=True))
    assert [(plan.method, plan.verdict) for _, plan in planned] == [
        ("exact", "exact"),
        ("second", "rewritten"),
        ("first", "rewritten"),
    ]
    assert planned[0][1].reason == "modules['a.*'] names 'exact' first"
    assert planned[2][1].params == {"s": 16} and planned[2][1].policy == Policy(
        methods=("first",), budget=16, strict=True
    )


def test_exact_for_a_module_means_what_it_means_for_all_and_refuses_nothing() -> None:
    by_hand = site("a", form="softmax")
    unproven = replace(by_hand, spec=None, refusal="it caps its scores")
    assert decisions([by_hand], modules={"a": "exact"}) == decisions([by_hand], methods=("exact",))
    assert decisions([by_hand], modules={"a": "exact"}) == [("exact", "rewritten")]  # as SDPA
    assert decisions([unproven], modules={"a": "exact"}, strict=True) == [("exact", "exact")]
    assert decisions([unproven], modules={"a": {"budget": 8}}) == [("exact", "refused")]


def test_a_glob_without_a_site_is_told() -> None:
    policy = Policy(methods=("first",), modules={"a.*": "exact", "b": "second", "c*": {"budget": 8}})
    assert unmatched(["a.b", "d"], policy) == ("modules['b']", "modules['c*']")
    assert unmatched(["a.x", "b", "c"], policy) == ()
    require_matches(["a.b"], policy)
    plan_sites([site("a.b")], replace(policy, strict=True))  # other graphs may have what this one has not
    with pytest.raises(ValueError, match=r"modules\['b'\], modules\['c\*'\] match no attention site; .* a\.b, d"):
        require_matches(["a.b", "d"], replace(policy, strict=True))


def test_names_of_methods_are_checked_for_modules_too() -> None:
    with pytest.raises(ValueError, match=r"modules\['a'\]: methods=\['frist'\]: unknown method 'frist'"):
        check_policy(Policy(modules={"a": "frist"}))
    with pytest.raises(TypeError, match=r"modules\['a'\]: method_options\['first'\]: unknown option 'width'"):
        check_policy(Policy(modules={"a": {"method_options": {"first": {"width": 2}}}}))


def test_causal_only_leaves_other_sites_alone() -> None:
    full, named = replace(SPEC, mask=Mask()), ("second",)
    sites = [site("causal"), site("full", full), site("unknown", UNKNOWN), site("hand", full, form="softmax")]
    verdicts = [verdict for _, verdict in decisions(sites, methods=named)]
    assert verdicts == ["rewritten", "rewritten", "refused", "rewritten"]
    planned = plan_sites(sites, Policy(methods=named, causal_only=True))
    assert [plan.verdict for _, plan in planned] == ["rewritten", "exact", "refused", "exact"]
    assert planned[1][1].reason == "causal_only=True, and it is not causal (its mask: none)"
    assert planned[2][1].reason == "causal_only=True, and its mask is not proven: it is made up"
    assert decisions(sites[:2], methods=named, modules={"full": {"causal_only": True}})[1] == ("exact", "exact")
    by_hand = [site("hand", spec, form="softmax") for spec in (SPEC, full, UNKNOWN)]
    assert decisions(by_hand, methods=("exact",)) == [("exact", "rewritten")] * 3  # as SDPA
    found = decisions(by_hand, methods=("exact",), causal_only=True)
    assert [verdict for _, verdict in found] == ["rewritten", "exact", "refused"]


def test_without_training_sites_that_need_gradients_are_left_alone() -> None:
    sites = [site("a", gradient=True), site("b"), site("c", gradient=True, form="softmax")]
    assert decisions(sites, methods=("first",)) == [("first", "rewritten")] * 3
    planned = plan_sites(sites, Policy(methods=("first",), training=False, strict=True))
    assert [plan.verdict for _, plan in planned] == ["exact", "rewritten", "exact"]
    assert planned[0][1].reason == "training=False, and its result needs a gradient"


def test_a_function_as_budget() -> None:
    asked = []
    policy = Policy(methods=("thinformer",), budget=lambda n: asked.append(n) or n // 5)
    spec = replace(SPEC, mask=Mask())
    decision = plan(spec, policy)
    assert asked == 2 * list(TABLE_AT) and decision.policy.budget == tuple(max(4, n // 5) for n in TABLE_AT)
    assert decision.params["table"] == [floor_power_of_two(rows) for rows in decision.policy.budget]
    assert plan(replace(spec, Lk=10), policy).params == decision.params, "padded or not, the same table"
    with pytest.raises(ValueError, match=r"budget\(16\) returned 3.2: must be a number of rows, an int"):
        plan(spec, Policy(methods=("thinformer",), budget=lambda n: n / 5))


def test_a_symbolic_length_is_decided_by_the_op_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv()
    source = ConstantSource("n")
    symbol = shapes.create_symbol(100, source, DimDynamic.DYNAMIC)
    n = shapes.create_symintnode(symbol, hint=100, source=source)
    source = ConstantSource("m")
    m = shapes.create_symintnode(shapes.create_symbol(3, source, DimDynamic.DYNAMIC), hint=3, source=source)
    spec = replace(SPEC, Lq=n, Lk=n)
    guards = len(shapes.guards)
    decision = plan(spec, Policy(methods=("express",), min_length=512))
    assert decision.verdict == "rewritten" and decision.params["min_length"] == 512
    for name in ("first", "second"):
        torch.library.define(f"express_compile::{name}", "(Tensor query) -> Tensor")
    decision = plan(spec, Policy(methods=("second",), min_length=512))
    assert decision.verdict == "refused" and "needs a known number of keys" in decision.reason
    assert plan(spec, Policy(methods=("second",))).verdict == "rewritten"
    function = Policy(methods=("first", "exact"), budget=lambda n: n // 5)
    decision = plan(spec, function)
    assert decision.verdict == "exact" and "give a number of rows, or a fraction of the keys" in decision.reason
    with pytest.raises(ValueError, match="its budget is a table of rows or a function .*, which it does not take"):
        plan(spec, replace(function, methods=("first",), strict=True))
    asked: list[int] = []
    tabled = Policy(methods=("thinformer", "santa"), budget=lambda n: asked.append(n) or n // 8, min_length=512)
    both = replace(spec, mask=Mask())
    decision = plan(both, tabled)
    assert asked == 2 * list(TABLE_AT) and decision.verdict == "rewritten"
    assert decision.params["table"] == [max(4, 1 << k - 3) for k in range(4, 22)] and decision.params["s"] == 0
    assert decision.policy.budget == tuple(decision.params["table"]) and "queries" in str(decision.rejected[0])
    kept = SavedPlan((SavedSite.from_plan("", 0, both, decision),))
    kept = Policy(plan=SavedPlan.from_json(kept.to_json()))
    for n in (spec.Lk, 4096):  # what was decided for all lengths is followed at each
        again = plan(replace(both, Lq=n, Lk=n), kept)
        assert again.verdict == "rewritten" and again.params["table"] == decision.params["table"]
    decision = plan(spec, Policy(methods=("first", "exact")))
    assert "needs a known number of keys" in decision.reason and "min_length=64 " in decision.reason
    rates = {"express": Rates(launches=2e-3), "thinformer": Rates(launches=2e-3), "exact": Rates(scores=1e-6)}
    device = Device("a CPU", "made up too", {"float32": rates})
    monkeypatch.setattr("express_compile.planning.choose.device_of", {"cpu": device}.get)
    decision = plan(replace(spec, B=m), Policy(methods=("express", "exact"), sinks=0, window=0, protected=0, budget=8))
    assert decision.reason == (
        f"causal attention, predicted to be faster than exact; exact below {decision.params['min_length']} keys, "
        "decided at run time"
    )
    # two launches are 4.2 ms with the margin: 4 heads of 45 (45 + 1) / 2 scores are 4.14 ms, those of 46 are 4.32
    assert decision.params["min_length"] == 46
    budgets = [("express", spec, 64), ("thinformer", both, 64), ("thinformer", both, lambda n: 64)]
    for name, site, budget in budgets:  # a table is predicted as its rows are
        decision = plan(replace(site, B=m), Policy(methods=(name, "exact"), budget=budget))
        shortest = decision.params["min_length"]
        assert shortest == crossover(name, "exact", replace(site, B=m), Policy(budget=64), device, margin=MARGIN)
    assert len(shapes.guards) == guards  # a decision adds no guard


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"methods=\['frist'\]: unknown method 'frist'; allowed are .*first"):
        plan(SPEC, Policy(methods=("frist",)))
    with pytest.raises(ValueError, match="method_options: unknown method 'frist'; allowed are"):
        check_policy(Policy(method_options={"frist": {}}))
    with pytest.raises(
        TypeError, match=r"method_options\['first'\]: unknown option 'width'; allowed are budget, depth"
    ):
        check_policy(Policy(method_options={"first": {"width": 2}}))
    check_policy(Policy(methods=("first",), method_options={"first": {"depth": 2}}))


def test_strict() -> None:
    strict = Policy(methods=("first",), strict=True)
    assert plan(SPEC, strict).verdict == "rewritten"
    with pytest.raises(ValueError, match="1 attention site was refused.*\n.*it is made up"):
        plan(UNKNOWN, strict)
    assert plan(SPEC, replace(strict, min_length=1000)).verdict == "exact"  # too short is a choice, no refusal
    refused = plan(UNKNOWN, replace(strict, strict=False))
    require([("a", refused)], replace(strict, strict=False))
    with pytest.raises(ValueError) as error:
        require([("a", refused), ("fine", plan(SPEC, strict)), ("b", refused)], strict)
    assert str(error.value).count("it is made up") == 2 and "fine" not in str(error.value)


def test_sites_that_only_are_listed_keep_their_reason() -> None:
    graph = torch.fx.Graph()
    gm = torch.fx.GraphModule({}, graph)
    site = AttentionSite(graph.placeholder("x"), gm, "m", 0, "", "sdpa", refusal="not supported yet")
    by_hand = replace(site, form="softmax")  # which methods=["exact"] would have rewritten
    ((_, decision),) = plan_sites([by_hand], Policy(methods=("exact",)))
    assert (decision.method, decision.verdict, decision.reason) == ("exact", "refused", "not supported yet")
    for methods, verdict in ((None, "refused"), (("first",), "refused"), (("exact",), "exact")):
        ((_, decision),) = plan_sites([site], Policy(methods=methods))
        assert (decision.method, decision.verdict) == ("exact", verdict)
        assert (decision.reason == "not supported yet") == (verdict == "refused")
    with pytest.raises(ValueError, match="m  not supported yet"):
        plan_sites([site], Policy(strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Lq": 0, "Lk": 0}, "it has no queries"),
        ({"Lk": 0, "mask": Mask()}, "it has no keys"),
        ({"Lq": 120, "mask": Mask(causal=True, offset=-20)}, "offset -20: the first queries see no key"),
    ],
)
def test_queries_without_keys_are_refused_for_every_method(change: dict[str, Any], words: str) -> None:
    decision = plan(replace(SPEC, **change), Policy(methods=("first", "second")))
    assert decision.verdict == "refused" and words in decision.reason
    assert [(refusal.method, words in refusal.reason) for refusal in decision.rejected] == [
        ("first", True),
        ("second", True),
    ]
    assert plan(SPEC, Policy(methods=("first",))).verdict == "rewritten"
