"""Policies and plans as plain data: they come back as they were, and a plan is proven again where it is followed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import express_compile
from express_compile import SavedPlan, SavedSite, explain
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.passes.pipeline import rewrite_graph
from express_compile.planning.choose import Question, answer, check_policy
from express_compile.routes.compile import split_options

# ---------------------------------------------------------------------------------------------- round trips

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.text(max_size=8)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.integers(0, 4096)
METHODS = st.lists(st.sampled_from(["express", "thinformer", "santa", "exact"]), min_size=1, max_size=3)
LOCAL: dict[str, st.SearchStrategy] = {
    "budget": st.integers(4, 4096) | st.floats(0.0, 1.0, exclude_min=True),
    "methods": st.none() | METHODS | METHODS.map(tuple),
    "sinks": ROWS,
    "window": ROWS,
    "protected": ROWS,
    "halving": st.text(max_size=8),
    "inflation": st.none() | ROWS,
    "min_length": st.none() | ROWS,
    "method_options": st.dictionaries(KEYS, st.dictionaries(KEYS, PLAIN, max_size=2), max_size=2),
    "causal_only": st.booleans(),
    "training": st.booleans(),
}
FIELDS = st.fixed_dictionaries({}, optional=LOCAL)
HEADS = st.just(Rows(everything=True)) | st.builds(
    Rows, sinks=ROWS, recent=ROWS, thinned=st.sampled_from([0, 2, 64]), protected=ROWS, selected=ROWS
)
SITES = st.builds(
    SavedSite,
    module=st.text(max_size=8),
    index=st.integers(0, 5),
    method=st.sampled_from(["express", "exact", "one of the future"]),
    verdict=st.sampled_from(["rewritten", "exact", "refused"]),
    params=st.dictionaries(KEYS, PLAIN, max_size=3),
    facts=st.dictionaries(KEYS, SCALARS, max_size=3),
    options=FIELDS,
    rows=st.lists(HEADS, max_size=3).map(tuple),
)
PLANS = st.lists(SITES, max_size=4).map(tuple).map(SavedPlan)
GLOBAL: dict[str, st.SearchStrategy] = {"seed": st.none() | st.integers(0, 2**32 - 1), "strict": st.booleans()}
MODULES = st.dictionaries(KEYS, st.sampled_from(["express", "exact"]) | FIELDS, max_size=3)
POLICIES = st.fixed_dictionaries({}, optional={**LOCAL, **GLOBAL, "modules": MODULES}).map(
    Policy.from_options
) | st.fixed_dictionaries({"plan": PLANS}, optional=GLOBAL).map(Policy.from_options)


@given(POLICIES)
def test_policies_come_back_as_they_were(policy: Policy) -> None:
    text = policy.to_json()
    again = Policy.from_json(text)
    assert again == policy and again.to_json() == text
    assert list(again.modules) == list(policy.modules)  # their order counts


@given(PLANS)
def test_plans_come_back_as_they_were(plan: SavedPlan) -> None:
    text = plan.to_json()
    again = SavedPlan.from_json(text)
    assert again == plan and again.to_json() == text
    assert [site.rows for site in again.sites] == [site.rows for site in plan.sites]
    assert [Policy.for_module(site.options) for site in again.sites] == [
        Policy.for_module(site.options) for site in plan.sites
    ]


def test_nan_infinities_and_tuples_survive() -> None:
    options = {"nan": float("nan"), "inf": -math.inf, "pair": (1, 2.0, None), "list": [True, {"a": ()}]}
    policy = Policy(method_options={"express": options}, modules={"a": {"method_options": {"express": options}}})
    again = Policy.from_json(policy.to_json())
    assert again == policy
    found = again.method_options["express"]
    assert math.isnan(found["nan"]) and found["inf"] == -math.inf
    assert found["pair"] == (1, 2.0, None) and found["list"] == (True, {"a": ()})
    assert again != replace(policy, method_options={"express": {**options, "nan": 0.0}})


def test_what_is_no_plain_data_is_named() -> None:
    with pytest.raises(TypeError, match="^budget=<function .*: a function cannot be written as JSON; allowed are None"):
        Policy(budget=lambda n: n // 8).to_json()
    with pytest.raises(TypeError, match=r"^modules\['a'\]\['budget'\]=<function"):
        Policy(modules={"a": {"budget": lambda n: n // 8}}).to_json()
    with pytest.raises(TypeError, match=r"^method_options\['santa'\]\['draws'\]: key 3 cannot .* must be strings"):
        Policy(method_options={"santa": {"draws": {3: 5}}}).to_json()
    with pytest.raises(TypeError, match=r"^method_options\['x'\]\['y'\]\[1\]=torch.float16: a dtype cannot"):
        Policy(method_options={"x": {"y": [1, torch.float16]}}).to_json()


ENTRY = dict(module="a", index=0, method="express", verdict="exact", params={}, facts={}, options={}, rows=[])


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (
            [{**ENTRY, "verdict": "fine"}],
            r"sites\[0\] \('a'\): verdict='fine': must be one of rewritten, exact, refused",
        ),
        ([ENTRY, {**ENTRY, "index": "0"}], r"sites\[1\] \('a'\): index='0': must be of type int"),
        ([{"module": "a"}], r"sites\[0\]: module; must be an object of facts, index, method"),
        ([5], r"sites\[0\]: 5; must be an object"),
        ([{**ENTRY, "options": {"budget": 1}}], r"sites\[0\] \('a'\): budget=1: must be at least 4 rows"),
        ([{**ENTRY, "options": {"seed": 1}}], r"\('a'\): 'seed' is not allowed for one module"),
        ([{**ENTRY, "params": 3}], r"\('a'\): params=3: must be a mapping"),
        (3, "must be an object with version=2 and a list of sites"),
    ],
)
def test_bad_plans_name_the_file_and_the_entry(sites: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 2, "sites": sites}))
    with pytest.raises((TypeError, ValueError), match=words) as error:
        Policy(plan=path)
    assert str(error.value).startswith(f"plan={str(path)!r}: ")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fited": {}}, "fited: not allowed; allowed are version, sites and fitted"),
        ({"verdict": "exact", "fitted": {}, "budget": 64}, "budget, verdict: not allowed; allowed are version"),
        ({"fitted": []}, r"fitted=\[\]: must be a mapping"),
    ],
)
def test_keys_that_no_plan_has_are_named(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for version in (1, 2):
        path.write_text(json.dumps({"version": version, "sites": [], **keys}))
        with pytest.raises((TypeError, ValueError), match=words) as error:
            SavedPlan.load(path)
        assert str(error.value).startswith(f"plan={str(path)!r}: ")


def test_bad_files_and_policies_are_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no JSON")
    with pytest.raises(ValueError, match="text': must be JSON, but: Expecting value"):
        Policy(plan=str(tmp_path / "text"))
    words = "must be the path of a file that save\\(\\) wrote$"
    for path, kind in ((tmp_path / "nowhere", FileNotFoundError), (tmp_path, IsADirectoryError), ("", OSError)):
        for give in (partial(express_compile.rewrite_attention, Net()), lambda **options: split_options(options)):
            with pytest.raises(kind, match=f"plan={str(path)!r}: .*; {words}"):
                give(plan=path)
    with pytest.raises(TypeError, match="plan=5: must be None, a SavedPlan .* or the path"):
        Policy(plan=5)
    with pytest.raises(ValueError, match=r"budget=8, modules=\{.*\}: not allowed beside a saved plan.*cuda_graphs"):
        Policy(plan=SavedPlan(), budget=8, modules={"a": "exact"})
    with pytest.raises(TypeError, match=r"policy=\[1\]: must be a JSON object of the fields budget, methods"):
        Policy.from_json("[1]")
    with pytest.raises(ValueError, match=r"plan\['a'\]: unknown method 'one of the future'"):
        check_policy(Policy(plan=SavedPlan((SavedSite("a", 0, "one of the future", "rewritten"),))))
    with pytest.raises(ValueError, match=r"plan\['a'\]: unknown method 'other'; allowed are express,"):
        check_policy(
            Policy(plan=SavedPlan((SavedSite("a", 0, "other", "rewritten", options={"methods": ["express"]}),)))
        )


# ------------------------------------------------------------------------------------------- following a plan


class Site(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=self.causal, enable_gqa=True)


class Net(nn.Module):
    """Two causal sites, one of all keys, and one by hand."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.full = Site(causal), Site(True), Site(False)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        q = self.full(self.b(self.a(q)))
        return torch.softmax(q @ q.mT, -1) @ q


Q = torch.randn(1, 4, 160, 8, generator=torch.Generator().manual_seed(0))
FOUND = {
    "budget": 8,
    "methods": ["express"],
    "sinks": 4,
    "window": 8,
    "protected": 0,
    "modules": {"a": {"budget": 16}, "full": {"methods": ["thinformer"], "budget": lambda n: n // 20}, "": "exact"},
}


def run(model: nn.Module, q: torch.Tensor = Q, **options: Any) -> tuple[torch.Tensor, list[Any]]:
    planned: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        planned.extend(rewrite_graph(gm, Policy.from_options(options)))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, fullgraph=True)(q), planned


def test_a_saved_plan_gives_a_fresh_model_the_same_rewrites(tmp_path: Path) -> None:
    expected, decided = run(Net(), **FOUND)
    plan = explain(Net(), Q, **FOUND).plan
    plan.save(tmp_path / "plan.json")
    assert SavedPlan.load(tmp_path / "plan.json") == plan
    got, followed = run(Net(), plan=str(tmp_path / "plan.json"), strict=True)
    assert [(site.module, d.method, d.verdict, d.params) for site, d in followed] == [
        (site.module, d.method, d.verdict, d.params) for site, d in decided
    ]
    assert [(d.method, d.verdict, d.params.get("s")) for _, d in followed] == [
        ("express", "rewritten", 16),
        ("express", "rewritten", 8),
        ("thinformer", "rewritten", 0),  # a table
        ("exact", "rewritten", None),
    ]
    assert torch.equal(got, expected) and (got - run(Net())[0]).abs().max() > 1e-3
    assert plan.sites[0].facts == {"mask": "causal", "H": 4, "H_kv": 2, "D": 8, "Dv": 8}
    report = explain(Net(), Q, plan=plan)
    assert report.plan == plan and report.unmatched == ()  # a plan that was followed says the same again
    assert report.sites[0].reason == "causal attention; as saved"


def test_what_no_longer_fits_stays_exact_and_says_why() -> None:
    plan = explain(Net(), Q, **FOUND).plan
    assert run(Net(), Q[:, :, :100], plan=plan)[1][1][1].verdict == "rewritten"  # lengths may change
    for model, q, words in (
        (Net(causal=False), Q, "the saved plan has express here, but mask was causal and is none"),
        (Net(), torch.cat([Q, Q], 1), "the saved plan has express here, but H was 4 and is 8"),
        (Net(), torch.cat([Q, Q], 3), "the saved plan has express here, but D was 8 and is 16; Dv was 8 and is 16"),
    ):
        planned = run(model, q, plan=plan)[1]
        assert (planned[0][1].method, planned[0][1].verdict, planned[0][1].reason) == ("exact", "refused", words)
        with pytest.raises(Exception, match=words):
            run(model, q, plan=plan, strict=True)
    fewer = SavedPlan(plan.sites[1:])
    assert run(Net(), plan=fewer)[1][0][1].reason == "it is not in the saved plan"


def test_nothing_in_a_plan_is_trusted() -> None:
    good, _, full, _ = explain(Net(), Q, **FOUND).plan.sites
    spec = AttentionSpec(1, 4, 2, 160, 160, 8, 8, torch.float32, "cpu", 0.5, Mask(causal=True))

    def follow(*sites: SavedSite, spec: AttentionSpec = spec) -> Any:
        return answer(Question(good.module, 0, spec=spec), Policy(plan=SavedPlan(sites)))

    assert follow(good).verdict == "rewritten"
    assert "but s was 64 and is 16" in follow(replace(good, params={**good.params, "s": 64})).reason
    assert follow(replace(good, params={"s": 16})).reason.endswith(
        "; recent was nothing and is 8; sinks was nothing and is 4"
    )
    assert "but s was 16 and is 32" in follow(replace(good, options={**good.options, "budget": 32})).reason
    # another method put there by hand, with all it needs, is asked whether it may
    other_name = replace(good, method="santa")
    assert "santa here, but method was santa and is express" in follow(other_name).reason
    swapped = follow(replace(full, module="a", facts=good.facts))
    assert swapped.verdict == "refused" and "it is causal; Thinformer would let" in swapped.reason
    unproven = replace(spec, mask=Mask(unknown="it is made up"))
    forged = replace(good, facts={**good.facts, "mask": str(unproven.mask)})
    assert follow(forged, spec=unproven).reason.endswith("but its mask is not proven: it is made up")
    dropped = follow(good, spec=replace(spec, dropout_p=0.1))
    assert dropped.verdict == "refused" and "has express here, but it drops attention weights" in dropped.reason
    # of several entries the first that can be followed; exact only where none can
    exact = SavedSite("a", 0, "exact", "exact")
    other = replace(full, module="a")
    assert follow(exact, other, good).method == "express"
    assert follow(exact, other).reason == "the saved plan leaves it exact"
    assert follow(replace(exact, verdict="refused")).verdict == "exact"


def test_whether_exact_attention_may_be_chosen_is_kept() -> None:
    spec = AttentionSpec(1, 4, 2, 4000, 4000, 64, 64, torch.float32, "cpu", 0.5, Mask(causal=True))
    decision = answer(Question("a", spec=spec), Policy(methods=("thinformer", "express", "exact"), min_length=2000))
    assert decision.method == "express"
    site = SavedSite.from_plan("a", 0, spec, decision)
    assert site.options["methods"] == ("express", "exact") and site.options["min_length"] == 2000
    plan = Policy(plan=SavedPlan((site,)))
    assert answer(Question("a", spec=spec), plan).method == "express"
    followed = answer(Question("a", spec=replace(spec, Lq=1000, Lk=1000)), plan)
    assert followed.verdict == "exact" and followed.reason == "1000 keys are fewer than min_length 2000"
    unnamed = SavedSite.from_plan("a", 0, spec, replace(decision, policy=Policy()))
    assert unnamed.options["methods"] is None and Policy.for_module(unnamed.options) == Policy()


def test_modules_that_a_plan_does_not_find_are_told() -> None:
    plan = SavedPlan((*explain(Net(), Q, **FOUND).plan.sites, SavedSite("gone", 0, "exact", "exact")))
    report = explain(Net(), Q, plan=plan)
    assert report.unmatched == ("plan['gone']",) and str(report).endswith("no site matches plan['gone']")
    with pytest.raises(
        Exception, match=r"plan\['gone'\] matches no attention site; allowed are those for \(root\), a, b"
    ):
        run(Net(), plan=plan, strict=True)


def test_both_routes_follow_one_plan() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids, kwargs = torch.randint(0, 64, (1, 160)), {"use_cache": False}
    options = {"methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0}
    compiled = explain(model, ids, example_kwargs=kwargs, **options, modules={"*.1.*": "exact"}).plan
    with torch.no_grad():
        exact = model(ids, **kwargs).logits
        express_compile.rewrite_attention(model, **options, modules={"*.1.*": "exact"})
        expected = model(ids, **kwargs).logits
        eager = explain(model, ids, example_kwargs=kwargs).plan
        express_compile.rewrite_attention(model, plan=compiled, strict=True)
        assert torch.equal(model(ids, **kwargs).logits, expected) and not torch.equal(expected, exact)
        assert [(s.method, s.verdict) for s in eager.sites] == [("express", "rewritten"), ("exact", "exact")]
        assert explain(model, ids, example_kwargs=kwargs).plan == eager == compiled
        with pytest.raises(ValueError, match=r"plan\['gone'\] matches no attention site"):
            gone = SavedPlan((*compiled.sites, SavedSite("gone", 0, "exact", "exact")))
            express_compile.rewrite_attention(model, plan=gone, strict=True)


@torch.no_grad()
def test_what_torch_compile_returned_is_rewritten_by_the_paths_of_the_module_it_was_given() -> None:
    model, query = Site(True), Q
    options = {"methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0}
    exact, plan = model(query), explain(model, query, **options).plan
    expected = express_compile.rewrite_attention(model, plan=plan)(query)
    express_compile.restore_attention(model)
    assert (expected - exact).abs().max() > 1e-3
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(model), backend="eager")
    sites = tuple(replace(site, module="0") for site in plan.sites)
    assert [site.verdict for site in explain(compiled, query, plan=SavedPlan(sites)).sites] == ["rewritten"]
    assert express_compile.rewrite_attention(compiled, plan=SavedPlan(sites), strict=True) is compiled
    assert [(x.module, x.verdict) for x in explain(compiled, query).sites] == [("0", "rewritten")]
    assert not torch.equal(compiled(query), exact)
    assert torch.equal(express_compile.restore_attention(compiled)(query), exact)


def test_a_plan_of_prefill_and_decoding_has_a_decision_for_each() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()

    def generate(model: nn.Module) -> torch.Tensor:
        return model.generate(torch.arange(1, 21)[None], max_new_tokens=4, do_sample=False, min_new_tokens=4)

    options = {"methods": ["express", "santa"], "budget": 8, "sinks": 0, "window": 4, "min_length": 0}
    express_compile.rewrite_attention(model, **options)

    class Generate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return generate(self.model)

    report = explain(Generate())
    assert [s.method for s in report.sites] == ["express", "santa", "santa", "santa"]
    assert [s.method for s in report.plan.sites] == ["express", "santa"]
    expected = generate(model)
    express_compile.rewrite_attention(model, plan=report.plan, strict=True)
    with express_compile.record_sites() as sites:
        assert torch.equal(generate(model), expected)
    assert [s.method for s in sites] == ["express", "santa", "santa", "santa"]


# ------------------------------------------------------------------------------------------------ version 1


class Last(Site):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, -1:], q[:, :2], q[:, :2], enable_gqa=True)


class Old(nn.Module):
    """The model for which ``plan_v1.json`` was written, by the code of 3dc008d."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.full, self.layer, self.step = Site(True), Site(False), Site(True), Last(False)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.step(self.layer(self.full(self.dense(q))))


OLD = {
    "budget": 8,
    "sinks": 4,
    "window": 8,
    "protected": 0,
    "modules": {
        "dense": {"methods": ["express"], "method_options": {"express": {"block": 32}}},
        "full": {"methods": ["thinformer"], "budget": 0.1, "halving": "kernel"},
        "layer": {
            "methods": ["sparse"],
            "method_options": {"sparse": {"stride": 16, "summary": 4, "combine": "interleaved"}},
        },
        "step": {"methods": ["santa"], "min_length": 0, "method_options": {"santa": {"draws": {"step": 5, "gone": 9}}}},
    },
}


def test_a_plan_of_version_1_does_what_it_did() -> None:
    path = Path(__file__).with_name("plan_v1.json")
    plan = SavedPlan.load(path)
    assert json.loads(path.read_text())["version"] == 1 and json.loads(plan.to_json())["version"] == 2
    assert all(site.rows == () and not site.params for site in plan.sites)
    expected, decided = run(Old(), **OLD)
    got, followed = run(Old(), plan=plan, strict=True)
    assert [d.method for _, d in followed] == ["express", "thinformer", "sparse", "santa"]
    assert [d.params for _, d in followed] == [d.params for _, d in decided]
    assert torch.equal(got, expected)
    today = explain(Old(), Q, plan=plan).plan  # and is one of version 2 from then on
    assert all(site.params for site in today.sites) and len(today.sites[0].rows) == 2
    assert SavedPlan.from_json(today.to_json()) == today == explain(Old(), Q, plan=today).plan
    with pytest.raises(TypeError, match=r"plan: sites\[0\]: module, .*; must be an object of facts, .*params, rows"):
        SavedPlan.from_json(json.dumps({**json.loads(path.read_text()), "version": 2}))
