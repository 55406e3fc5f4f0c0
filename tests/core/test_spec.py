"""The shared nouns: what a policy accepts, how masks read, when sizes are equal, and the registry of methods."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from express_compile.core.method import METHODS, Method, Refusal, register
from express_compile.core.options import FLAG, NUMBER, TABLE_AT, Options, option, rows_at
from express_compile.core.plan import Plan
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, floor_power_of_two, known_equal, layer_key

FIELDS = (
    "budget methods sinks window protected halving inflation seed min_length strict method_options "  # promised names
    "modules causal_only training plan cuda_graphs"
).split()


# -------------------------------------------------------------------------------------------------- policy


def test_defaults_are_those_promised() -> None:
    assert sorted(FIELDS) == sorted(Policy.option_names())
    values = {f.name: getattr(Policy(), f.name) for f in dataclasses.fields(Policy)}
    assert values == {
        "budget": 512,
        "methods": None,
        "seed": 0,
        "min_length": None,
        "strict": False,
        "method_options": {},
        "modules": {},
        "causal_only": False,
        "training": True,
        "plan": None,
        "cuda_graphs": False,
        "shared": {},
    }
    assert Policy().of("express").data() == {
        "budget": 512,
        "sinks": 32,
        "recent": 256,
        "protected": 256,
        "halving": "balanced",
        "inflation": None,
        "flatten": 0.0,
        "block": 128,
    }


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, r"unknown option 'budgt', 'sink': allowed are budget, methods, sinks", {"budgt": 1, "sink": 2}),
        (ValueError, r"budget=3: must be at least 4", {"budget": 3}),
        (ValueError, r"budget=-0.5: a float is a fraction .* in \(0, 1\]", {"budget": -0.5}),
        (ValueError, r"budget=1.5", {"budget": 1.5}),
        (ValueError, r"budget=nan", {"budget": float("nan")}),
        (
            TypeError,
            r"budget=True: must be of type int or float or a function of the number of keys or a seq",
            {"budget": True},
        ),
        (TypeError, r"budget='512'", {"budget": "512"}),
        (TypeError, r"methods='express': must be a sequence of names, e.g. \['express'\]", {"methods": "express"}),
        (ValueError, r"methods=\[\]: must be None or a non-empty", {"methods": []}),
        (ValueError, r"methods=\[1\]", {"methods": [1]}),
        (ValueError, r"sinks=-1: must be a number of rows, 0 or more", {"sinks": -1}),
        (ValueError, r"window=-256", {"window": -256}),
        (TypeError, r"window=2.5: must be of type int, not float", {"window": 2.5}),
        (ValueError, r"protected=-1", {"protected": -1}),
        (TypeError, r"halving=None: must be the name", {"halving": None}),
        (ValueError, r"inflation=-1", {"inflation": -1}),
        (ValueError, r"seed=-1: must be None or an integer, 0 or more", {"seed": -1}),
        (ValueError, r"seed=4294967296: must be below 2\*\*32", {"seed": 2**32}),
        (ValueError, r"min_length=-5", {"min_length": -5}),
        (TypeError, r"strict=1: must be True or False", {"strict": 1}),
        (TypeError, r"method_options=\{'express': 3\}: must map", {"method_options": {"express": 3}}),
        (TypeError, r"method_options=\['express'\]", {"method_options": ["express"]}),
        (TypeError, r"causal_only=1: must be True or False", {"causal_only": 1}),
        (TypeError, r"cuda_graphs=1: must be True or False", {"cuda_graphs": 1}),
        (TypeError, r"training=None: must be True or False", {"training": None}),
        (TypeError, r"modules=\['a'\]: must map globs", {"modules": ["a"]}),
        (TypeError, r"modules: 'a': 5; must map a glob", {"modules": {"a": 5}}),
        (TypeError, r"modules\['a'\]: unknown option 'b': allowed are .* training$", {"modules": {"a": {"b": 5}}}),
        (ValueError, r"modules\['a'\]: budget=2: must be at least 4", {"modules": {"a": {"budget": 2}}}),
        (ValueError, r"modules\['a'\]: 'seed' is not allowed .*share one seed", {"modules": {"a": {"seed": 5}}}),
        (ValueError, r"modules\['a'\]: 'strict' is not allowed .*together", {"modules": {"a": {"strict": True}}}),
        (ValueError, r"modules\['a'\]: 'modules' is not allowed .*order", {"modules": {"a": {"modules": {}}}}),
    ],
)
def test_bad_options_name_the_field_its_value_and_what_is_allowed(error, words, options) -> None:
    with pytest.raises(error, match=words):
        Policy.from_options(options)


def test_good_options_are_kept() -> None:
    policy = Policy.from_options({"budget": 0.25, "methods": ["express", "exact"], "seed": None, "window": 0})
    assert policy == Policy(budget=0.25, methods=("express", "exact"), seed=None, window=0)
    assert policy.methods == ("express", "exact") and pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.budget = 3


def test_globs_override_the_policy_of_modules_in_their_order() -> None:
    policy = Policy(
        budget=64,
        modules={"layers.*": {"budget": 128, "window": 8}, "layers.1": {"budget": 256}, "*.cross": "exact"},
        seed=3,
    )
    assert policy.modules["*.cross"] == {"methods": ("exact",)}  # a string is the name of one method
    assert policy.at("embed") == Policy(budget=64, seed=3) and policy.at("embed").modules == {}
    assert policy.at("layers.0") == Policy(budget=128, window=8, seed=3)
    assert policy.at("layers.1") == Policy(budget=256, window=8, seed=3)
    assert policy.at("layers.1.cross") == Policy(budget=128, window=8, seed=3, methods=("exact",))
    turned = Policy(budget=64, modules={"layers.1": {"budget": 256}, "layers.*": {"budget": 128}})
    assert turned.at("layers.1").budget == 128
    assert policy.globs("layers.1") == ("layers.*", "layers.1") and policy.globs("Layers.1") == ()
    assert policy.at("layers.0") is policy.at("layers.7")  # one policy for all that match the same globs
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy and again.at("layers.1").budget == 256
    assert Policy().at("anything") == Policy()


def test_a_budget_may_be_a_function_of_the_number_of_keys() -> None:
    policy = Policy(budget=lambda n: n // 8, window=7).tabled()
    assert policy == Policy(budget=[max(4, n // 8) for n in TABLE_AT], window=7)  # 4 as for a fraction of few keys
    assert Policy(budget=64).tabled() == Policy(budget=64)
    for budget, words in (
        (lambda n: n / 8, r"budget\(16\) returned 2.0: must be a number of rows, an int"),
        (lambda n: -3, "returned -3"),
        (lambda n: True, "returned True"),
    ):
        with pytest.raises(ValueError, match=words):
            Policy(budget=budget).tabled()


@given(st.integers(0, 1 << 24), st.lists(st.integers(4, 1 << 16), min_size=1, max_size=20))
def test_a_table_holds_what_a_function_is_at_powers_of_two(Lk: int, table: list[int]) -> None:
    below = [rows for n, rows in zip((1 << k for k in range(4, 30)), table, strict=False) if n <= Lk]
    assert rows_at(table, Lk) == (below or table)[-1 if below else 0]
    policy = Policy(budget=table)
    assert policy.budget == tuple(table) and Policy.from_json(policy.to_json()) == policy
    assert policy.tabled() is policy
    function = Policy(budget=lambda n: 5 * n).tabled()
    assert rows_at(function.budget, Lk) == 5 * max(16, min(floor_power_of_two(Lk), 1 << 21))


def test_a_bad_table_is_told() -> None:
    for table in ([], [3], [8, 4.0], [True]):
        with pytest.raises(
            ValueError, match=r"budget=\(.*must be rows for 16, 32, 64, ... keys, integers of at least 4"
        ):
            Policy(budget=table)
    with pytest.raises(ValueError, match=r"budget\(16\) returned 1.0: must be a number of rows"):
        Policy(budget=lambda n: n / 16).tabled()


# ------------------------------------------------------------------------------------------- masks and sizes


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Mask(), "none"),
        (Mask(causal=True), "causal"),
        (Mask(causal=True, offset=7, window=4, padding=True), "causal, offset 7, window 4, key padding"),
        (Mask(causal=True, window=4, segments=True), "causal, window 4, packed segments"),
        (Mask(offset=2, window=4), "window of 3 tokens on either side"),
        (Mask(unknown="a dense tensor"), "unknown (a dense tensor)"),
    ],
)
def test_masks_read_as_what_is_proven(mask, text) -> None:
    assert str(mask) == text


@given(st.integers(-5, 2**40))
def test_floor_power_of_two(x: int) -> None:
    power = floor_power_of_two(x)
    if x < 1:
        assert power == 0
    else:
        assert power <= x < 2 * power and power & (power - 1) == 0


def symbols(*hints: int) -> list[torch.SymInt]:
    env = ShapeEnv()
    return [
        env.create_symintnode(sympy.Symbol(f"s{i}", positive=True, integer=True), hint=hint)
        for i, hint in enumerate(hints)
    ]


def test_known_equal_proves_and_never_guards() -> None:
    a, b = symbols(8, 8)
    guards = len(a.node.shape_env.guards)
    assert known_equal(3, 3) and not known_equal(3, 4)
    assert known_equal(a, a) and known_equal(a + 1 - 1, a) and known_equal(2 * (a + 3), 2 * a + 6)
    assert not known_equal(a, b)  # equal today, by chance
    assert not known_equal(a, 8) and not known_equal(8, a)
    assert known_equal(a * a // a, a) and known_equal(a * b * 3 // b, 3 * a), "as torch has sizes of a product"
    assert not known_equal((a * a + 1) // a, a) and not known_equal(a * a // 2, a) and not known_equal(a * b // a, a)
    assert len(a.node.shape_env.guards) == guards


def test_layer_keys_are_31_bits_stable_and_differ() -> None:
    paths = [f"model.layers.{i}.self_attn" for i in range(200)]
    keys = {layer_key(path, index) for path in paths for index in range(2)}
    assert len(keys) == 400 and all(0 <= key < 2**31 for key in keys)
    assert layer_key("model.layers.0.self_attn") == 1256234047  # eager, compiled and tomorrow's version agree


def test_refusals_and_plans_read_well() -> None:
    plan = Plan("exact", "refused", "too short", rejected=(Refusal("express", "fewer keys than rows"),))
    assert str(plan.rejected[0]) == "express: fewer keys than rows" and plan.params == {}
    spec = AttentionSpec(1, 8, 2, 16, 16, 64, 64, torch.float16, "cpu", 0.125)
    assert hash(spec) == hash(dataclasses.replace(spec)) and spec.mask == Mask() and spec.dropout_p == 0.0


# ------------------------------------------------------------------------------------------------- methods


@pytest.fixture(autouse=True)
def same_methods_afterwards() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS._methods.clear()
    METHODS._methods.update(before)


def method(name: str, **extra) -> Method:
    return Method(name, "", "", "", refuse=lambda spec, policy: None, params=lambda site, policy: {}, **extra)


def test_registry_holds_the_shipped_methods_and_names_them_in_its_errors() -> None:
    assert {"express", "exact"} <= set(METHODS) and len(METHODS) == len(list(METHODS))
    assert METHODS["exact"].name == "exact"
    with pytest.raises(ValueError, match="unknown method 'fancy': allowed are .*express"):
        METHODS["fancy"]


def test_register_refuses_a_taken_name_and_other_objects() -> None:
    mine = register(method("test_spec_method"))
    assert METHODS["test_spec_method"] is mine and register(mine) is mine
    with pytest.raises(ValueError, match="'test_spec_method' is registered already"):
        register(method("test_spec_method"))
    with pytest.raises(TypeError, match="method='express': must be an express_compile.core.method.Method"):
        register("express")


@dataclasses.dataclass(frozen=True)
class Rates(Options):
    rate: float = option(1.0, "how much", NUMBER)
    deep: bool = option(False, "whether", FLAG)


def test_own_options_are_checked() -> None:
    register(method("test_spec_options", options=Rates))
    assert Policy().of("test_spec_options").data() == {"rate": 1.0, "deep": False}
    given_rate = Policy(method_options={"test_spec_options": {"rate": 2.0}})
    assert given_rate.of("test_spec_options").data() == {"rate": 2.0, "deep": False}
    with pytest.raises(
        TypeError, match=r"method_options\['test_spec_options'\]: unknown option 'rat'; allowed are deep"
    ):
        Policy(method_options={"test_spec_options": {"rat": 2.0}}).of("test_spec_options")
