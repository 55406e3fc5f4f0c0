"""Bad options are told when they are given: the option, its value and what is allowed, whatever way they come."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import express_compile as e
from express_compile.core.plain import canonical
from express_compile.core.plan import SavedPlan, SavedSite
from express_compile.core.policy import Policy
from express_compile.core.spec import default_scale
from express_compile.kernels.express import Express
from express_compile.planning.choose import check_policy, unmatched
from express_compile.routes.compile import split_options

HUGE = 2**63
SANTA = {"methods": ["santa"]}


def of(method: str, **options: Any) -> dict[str, Any]:
    return {"methods": [method], "method_options": {method: options}}


BAD: list[tuple[dict[str, Any], str]] = [
    *(({name: HUGE}, rf"{name}={HUGE}: must be below 2\*\*63") for name in ("budget", "sinks", "window", "protected")),
    *(({name: HUGE}, rf"{name}={HUGE}: must be below 2\*\*63") for name in ("inflation", "seed", "min_length")),
    *(({name: 4.0}, rf"{name}=4.0: must be of type int") for name in ("sinks", "window", "protected", "inflation")),
    *(({name: np.float32(4)}, rf"{name}=.*must be of type int") for name in ("seed", "min_length", "sinks")),
    *(({name: True}, rf"{name}=True: must be of type int") for name in ("sinks", "seed", "min_length", "inflation")),
    *(({name: np.True_}, rf"{name}=.*True.*: must be of type") for name in ("sinks", "budget")),
    *(({name: math.nan}, rf"{name}=nan: must be of type int") for name in ("window", "protected", "seed")),
    *(({name: "8"}, rf"{name}='8': must be of type") for name in ("budget", "sinks", "window", "inflation", "seed")),
    *(({name: None}, rf"{name}=None: must be") for name in ("budget", "sinks", "window", "protected", "halving")),
    *(({name: torch.tensor(8)}, rf"{name}=tensor\(8\): must be of type int") for name in ("sinks", "budget")),
    ({"budget": math.inf}, r"budget=inf: .*\(0, 1\]"),
    ({"budget": [16, HUGE]}, r"budget=9223372036854775808: must be below"),
    ({"budget": lambda n: HUGE}, r"budget\(16\) returned 9223372036854775808: must be a number of rows"),
    ({"budget": lambda n: n / 4}, r"budget\(16\) returned 4.0: must be a number of rows"),
    ({"budget": lambda n: True}, r"budget\(16\) returned True"),
    ({"halving": "half"}, r"halving='half': allowed are kernel, balanced, uniform"),
    ({"inflation": 30}, r"inflation=30: must be an integer from 0 to 10 for s=512"),
    ({"methods": 5}, r"methods=5: must be None or a sequence of method names"),
    ({"methods": {"express": 1}}, r"methods=\{'express': 1\}: must be None or a sequence"),
    ({"methods": {"express"}}, r"methods=\{'express'\}: must be None or a sequence"),
    ({"methods": b"express"}, r"methods=b'express': must be None or a non-empty sequence"),
    ({"method_options": {5: {}}}, r"method_options: 5: names of methods and of their options must be strings"),
    ({"method_options": {"express": {5: 6, "a": 7}}}, r"method_options: 5: names of methods"),
    ({"method_options": {"fast": {}}}, r"method_options: unknown method 'fast'"),
    ({"modules": {5: "exact"}}, r"modules: 5: 'exact'; must map a glob"),
    ({"modules": {"a": {"sinks": HUGE}}}, r"modules\['a'\]: sinks=9223372036854775808: must be below"),
    ({"modules": {"a": {"method_options": {"express": {"block": 100}}}}}, r"modules\['a'\]: block=100: must be 16"),
    ({"modules": {"a": {"methods": ["santa"], "method_options": {"santa": {"draws": 0}}}}}, r"modules\['a'\]: draws=0"),
    ({"modules": {"a": {"halving": "half"}}}, r"modules\['a'\]: halving='half'"),
    ({"modules": {"a": {"budget": lambda n: -1}}}, r"modules\['a'\]: budget\(16\) returned -1"),
    *((of("express", block=x), r"block=.*: must be") for x in (64.0, "64", None, True, 100, 0, -16, HUGE, [64])),
    *(
        (of(name, flatten=x), r"flatten=.*: must be")
        for name in ("express", "thinformer")
        for x in (None, "a", math.inf, math.nan, -1.0, True, [1.0], HUGE, 10**400)
    ),
    *((of("thinformer", g=x), r"g=.*: must be") for x in (2000, 31, -2, 1.0, None, "1", True, HUGE)),
    *(
        (of("santa", draws=x), r"draws.*: must be")
        for x in (0, -1, 2**16 + 1, HUGE, 1.0, "8", b"88", True, [], [8, 0], [8, 1.5], {"a": 0}, {"a": None}, {5: 8})
    ),
    *((of("santa", sampler=x), r"sampler=.*: allowed are") for x in ("", "sys-0", "sys-x", None, 5, ["sys"])),
    *((of("santa", shared=x), r"shared=.*: must be True or False") for x in (1, None, "yes")),
    *((of("santa", bernoulli=x), r"bernoulli=.*: must be an integer") for x in (-1, 257, 1.0, None, "2", True, HUGE)),
    (of("santa", sampler="iid"), r"sampler='iid': needs shared=False"),
    ({**SANTA, "budget": 2**17}, r"budget=131072: must be at most 65536 draws"),
    ({"plan": 5}, r"plan=5: must be None, a SavedPlan \(as fit\(...\).plan\) or the path"),
    ({"plan": {"sites": ["a" * 1000]}}, r"^plan=\{'sites': \['a{188}\.\.\.: must be None"),
    (
        {"methods": [Express(16), "exact", Express(32)]},
        r"^methods=\[Express.*, 'exact', Express.*must have options of express once",
    ),
    # what no method would see
    (
        {"methods": ["thinformer"], "sinks": 3},
        r"^sinks=3: does nothing beside methods=\['thinformer'\]; .* budget, halving",
    ),
    (
        {"methods": ["heads", "exact"], "budget": 64},
        r"^budget=64: does nothing .*; allowed are halving, inflation for heads",
    ),
    ({"methods": ["santa", "sparse"], "halving": "kernel"}, r"budget for santa; none for sparse$"),
    ({"methods": [Express(recent=7)], "sinks": 3}, r"^sinks=3: does nothing .*as the own options of express go before"),
    (
        {"method_options": {"santa": {"draws": 8}}},
        r"^method_options\['santa'\]=.*: does nothing .*\['express', 'exact'\]",
    ),
    ({"methods": ["santa"], "modules": {"a": {"sinks": 3}}}, r"^modules\['a'\]: sinks=3: does nothing beside"),
    ({"modules": {"a": {"methods": ["santa"], "sinks": 3}}}, r"^modules\['a'\]: sinks=3: does nothing beside"),
]


class Net(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_options_are_told_on_both_routes_before_anything_runs(options: dict[str, Any], words: str) -> None:
    model = Net()
    for give in (lambda: e.rewrite_attention(model, **options), lambda: split_options(options)):
        with pytest.raises((TypeError, ValueError), match=words):
            give()
    assert not e.is_rewritten(model)


@pytest.mark.parametrize("module", [np, None])
def test_numbers_of_numpy_are_numbers(module: Any) -> None:
    whole, real = (np.int64, np.float32) if module else (int, float)
    policy = Policy(
        methods=["express", "santa"], budget=whole(64), sinks=whole(4), seed=whole(7), inflation=whole(2),
        min_length=whole(3),
        method_options={"express": {"block": whole(32), "flatten": real(0.5)}, "santa": {"draws": [whole(8)]}},
        modules={"a": {"budget": real(0.25)}, "b": {"budget": [whole(8), whole(16)]}},
    )  # fmt: skip
    check_policy(policy)
    assert policy == Policy(
        methods=["express", "santa"], budget=64, sinks=4, seed=7, inflation=2, min_length=3,
        method_options={"express": {"block": 32, "flatten": 0.5}, "santa": {"draws": [8]}},
        modules={"a": {"budget": 0.25}, "b": {"budget": [8, 16]}},
    )  # fmt: skip
    assert type(policy.budget) is int and type(policy.modules["a"]["budget"]) is float
    assert Policy.from_json(policy.to_json()) == policy


def test_good_values_of_method_options_are_taken() -> None:
    for options in (
        of("express", block=16, flatten=1), of("express", flatten=0), of("thinformer", g=-1), of("thinformer", g=30),
        of("santa", draws=(8, 16), sampler="sys-16", bernoulli=256), of("santa", draws={"a": 8, "b": [4, 8]}),
        of("santa", draws=2**16, sampler="iid", shared=False), {"budget": 2**62, "sinks": HUGE - 1},
        # what some module's method sees
        {"methods": ["santa"], "sinks": 3, "modules": {"a": "express"}}, {"sinks": 3, "modules": {"a": "exact"}},
        {"methods": ["santa"], "modules": {"*": "express", "a": {"sinks": 3}}},
        {"methods": [Express(), "thinformer"], "budget": 64, "halving": "kernel"},
        {"methods": ["thinformer"], "modules": {"a": {"methods": ["santa"], "sinks": 3}, "a.b": "express"}},
        # all exact, for comparison
        {"methods": ["exact"], "budget": 64, "sinks": 3}, {"modules": {"a": {"methods": ["exact"], "budget": 9}}},
        {"methods": ["exact"], "method_options": {"santa": {"draws": 8}}},
    ):  # fmt: skip
        check_policy(Policy(**options))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: e.rewrite_attention(None), TypeError, "model=None: must be a torch.nn.Module"),
        (lambda: e.restore_attention("m"), TypeError, "model='m': must be a torch.nn.Module"),
        (lambda: e.is_rewritten(5), TypeError, "model=5: must be a torch.nn.Module"),
        (lambda: e.watch([]), TypeError, r"model=\[\]: must be a torch.nn.Module"),
        (lambda: e.watch(Net(), fraction="1"), TypeError, "fraction='1': must be of type int or float"),
        (lambda: e.watch(Net(), queries=2.0), TypeError, "queries=2.0: must be of type int"),
        (lambda: e.calibrate_error(None, [torch.ones(1, 9)]), TypeError, "model=None: must be a torch.nn.Module"),
        (lambda: e.explain(None), TypeError, "model=None: must be a torch.nn.Module or a function"),
        (lambda: e.explain(Net(), example_kwargs=[1]), TypeError, r"example_kwargs=\[1\]: must be None or a mapping"),
        (lambda: e.explain(Net(), error=1), TypeError, "error=1: must be True or False"),
        (lambda: e.explain(Net(), budgt=1), TypeError, "unknown option 'budgt'"),
        (lambda: e.register(None), TypeError, "method=None: must be"),
        (lambda: e.rewrite_attention(Net(), 5), TypeError, "policy=5: must be a Policy"),
        (lambda: Policy.from_options({1: 2, "a": 3}), TypeError, "unknown option 1, 'a': allowed are budget"),
    ],
)
def test_wrong_arguments_of_public_functions_are_named(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


# ------------------------------------------------------------------------------------------------------ JSON

BOMB = "[" * 100_000


@pytest.mark.parametrize("make", [Policy.from_json, SavedPlan.from_json])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(BOMB, "is nested too deeply", id="bomb"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        (b"\xff\xfe\xfa", "decode"),
        pytest.param("1" * 5000, "digits|must be an object|must be a JSON object", id="digits"),
        (None, "must be the text of a JSON object, not NoneType"),
        (5, "must be the text of a JSON object, not int"),
    ],
)
def test_what_is_no_policy_and_no_plan_is_told(make, text: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^(policy|plan|method_options).*({words})"):
        make(text)


def test_a_deep_policy_is_told(tmp_path) -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="method_options: nested too deeply"):
        Policy(method_options={"express": {"block": deep}})
    with pytest.raises(ValueError, match="nested too deeply"):
        canonical(deep)
    (tmp_path / "bomb").write_text(BOMB)
    with pytest.raises(ValueError, match=r"^plan='.*bomb': is nested too deeply"):
        Policy(plan=tmp_path / "bomb")
    while isinstance(deep, list):  # or its end would be one call inside another
        deep = deep.pop()


def test_json_names_no_file_to_read(tmp_path) -> None:
    SavedPlan().save(tmp_path / "plan.json")
    with pytest.raises(TypeError, match="plan='.*plan.json': must be null or an object"):
        Policy.from_json(json.dumps({"plan": str(tmp_path / "plan.json")}))


NUMBERS = st.integers() | st.floats() | st.integers(-5, 2**70)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(["express", "exact", "santa"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ENTRY = dict(module="a", index=0, method="express", verdict="exact", params={}, facts={}, options={}, rows=[])


@given(st.dictionaries(st.sampled_from(Policy.option_names()), VALUES, max_size=3) | VALUES)
def test_any_json_is_a_policy_or_an_error_that_names_a_field(data: Any) -> None:
    try:
        policy = Policy.from_json(json.dumps(data))
    except (TypeError, ValueError) as error:
        names = (*Policy.option_names(), "unknown option", "policy")
        assert str(error).startswith(names), error
        assert type(error) in (TypeError, ValueError)
        return
    assert Policy.from_json(policy.to_json()) == policy
    try:
        check_policy(policy)
    except (TypeError, ValueError) as error:
        assert str(error)


@given(st.dictionaries(st.sampled_from(list(ENTRY)), VALUES, max_size=2), st.booleans())
def test_any_json_is_a_plan_or_an_error_that_names_the_entry(changes: dict[str, Any], whole: bool) -> None:
    data = {"version": 2, "sites": [{**ENTRY, **changes}]} if whole else changes
    try:
        plan = SavedPlan.from_json(json.dumps(data))
    except (TypeError, ValueError) as error:
        assert str(error).startswith("plan: sites[0] (" if whole else "plan: must be an object with version=2"), error
        return
    assert SavedPlan.from_json(plan.to_json()) == plan


def test_a_plan_is_written_in_one_step(tmp_path, monkeypatch) -> None:
    path = tmp_path / "plan.json"
    first = SavedPlan((SavedSite("a", 0, "express", "exact"),))
    first.save(path)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        SavedPlan().save(path)
    assert SavedPlan.load(path) == first and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------ paths that match nothing


def test_tables_of_draws_whose_paths_name_no_site_are_told(listening_model) -> None:
    path = "model.layers.1.self_attn"
    table = {path: 8, "model.layers.1.self_atn": 8}
    policy = Policy(methods=["express", "santa"], budget=16, method_options={"santa": {"draws": table}})
    words = "method_options['santa']['draws']['model.layers.1.self_atn']"
    assert unmatched([path], policy) == (words,)
    e.rewrite_attention(listening_model, policy)
    try:
        assert e.explain(listening_model, torch.arange(9)[None]).unmatched == (words,)
        with pytest.raises(
            ValueError, match=r"strict=True: method_options\['santa'\]\['draws'\].*self_atn'\] matches no"
        ):
            e.rewrite_attention(
                listening_model, methods=["santa"], strict=True, method_options={"santa": {"draws": table}}
            )
    finally:
        if e.is_rewritten(listening_model):
            e.restore_attention(listening_model)
    local = Policy(modules={"*.1.*": {"methods": ["santa"], "method_options": {"santa": {"draws": {"b.2.c": 8}}}}})
    assert unmatched(["a.1.c", "b.2.c"], local) == ("modules['*.1.*']: method_options['santa']['draws']['b.2.c']",)
    assert unmatched([path], Policy(method_options={"santa": {"draws": {path: 8}}})) == ()


def test_a_table_of_rows_goes_with_the_default_methods() -> None:
    assert e.is_rewritten(e.rewrite_attention(Net(), budget=[8, 16]))


def test_the_scale_of_heads_without_features_is_a_number() -> None:
    assert default_scale(64) == 0.125 and default_scale(0) == 1.0
    assert e.explain(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), torch.zeros(2, 2, 4, 0))
