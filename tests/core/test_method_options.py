"""The dataclass of a method is the one source of its options: checks, op, plain data, table; flat options mean it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import express_compile as e
from express_compile import METHODS, Policy, Site
from express_compile.core.call import Call
from express_compile.kernels.exact import Exact
from express_compile.kernels.express import Express
from express_compile.kernels.santa import Santa
from express_compile.kernels.sparse import Sparse
from express_compile.kernels.thinformer import Thinformer
from express_compile.planning.choose import check_policy
from express_compile.routes.compile import split_options

CLASSES = {"express": Express, "thinformer": Thinformer, "santa": Santa, "sparse": Sparse, "exact": Exact}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Express(budget=1), ValueError, "budget=1: must be at least 2 rows"),
        (lambda: Express(budget=0.5), ValueError, "budget=0.5: its budget is the fraction 0.5 of the keys, so that"),
        (lambda: Express(recent=-3), ValueError, "recent=-3: must be a number of rows, 0 or more"),
        (lambda: Express(sinks=2.0), TypeError, "sinks=2.0: must be of type int"),
        (lambda: Express(halving="half"), ValueError, "halving='half': allowed are kernel, balanced, uniform"),
        (lambda: Express(halving=None), TypeError, "halving=None: must be the name of a halving rule"),
        (lambda: Express(inflation=30), ValueError, "inflation=30: must be an integer from 0 to 10 for s=512"),
        (lambda: Express(flatten=-1), ValueError, "flatten=-1.0: must be above 0 and finite"),
        (lambda: Express(block=100), ValueError, "block=100: must be 16, 32, 64 or 128 queries"),
        (lambda: Thinformer(budget=2), ValueError, "budget=2: must be at least 4 rows"),
        (lambda: Thinformer(g=31), ValueError, "g=31: must be an integer, 0 or more"),
        (lambda: Thinformer(flatten=math.nan), ValueError, "flatten=nan: must be above 0 and finite"),
        (lambda: Santa(draws=0), ValueError, "draws=0: must be an integer from 1 to 65536"),
        (lambda: Santa(sampler="iid"), ValueError, "sampler='iid': needs shared=False"),
        (lambda: Santa(bernoulli=300), ValueError, "bernoulli=300: must be an integer from 0"),
        (lambda: Santa(budget=1 << 17), ValueError, "budget=131072: must be at most 65536 draws"),
        (lambda: Sparse(pattern="holes"), ValueError, "pattern='holes': must be one of strided, fixed"),
        (lambda: Sparse(stride=0), ValueError, "stride=0: must be 1 or more, or None"),
        (lambda: Sparse(combine="both"), ValueError, "combine='both': must be one of merged"),
        (lambda: Sparse(stride=8, summary=5, groups=2), ValueError, "summary=5, groups=2: 10 columns in all; must be"),
    ],
)
def test_bad_values_are_told_when_options_are_made(make: Any, error: type, words: str) -> None:
    with pytest.raises(error) as found:
        make()
    assert str(found.value).startswith(words)


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_has_its_dataclass_whose_fields_are_documented(name: str) -> None:
    cls = METHODS[name].options
    assert cls is CLASSES[name] and METHODS.name_of(cls()) == name
    assert [row[0] for row in cls.table()] == [f.name for f in dataclasses.fields(cls)] == list(cls().data())
    assert all(sentence and kind for _, kind, _, sentence in cls.table())
    lines = cls.markdown().splitlines()
    assert len(lines) == 2 + len(cls.table()) and {line.count(" | ") for line in lines} == {3}
    assert cls(**cls().data()) == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().budget = 3


@pytest.mark.parametrize("name", ["express", "thinformer", "santa", "sparse"])
def test_the_op_takes_what_the_options_are_packed_into(name: str) -> None:
    arguments = {x.name for x in METHODS[name].op._schema.arguments}
    packed = METHODS[name].params(Site(), Policy(budget=64))
    others = {"window", "softcap", "table", "layers"}  # of a site; and what SANTA's op of 0.1.0 took, always empty now
    assert set(packed) | {f.name for f in dataclasses.fields(Call)} >= arguments - others
    assert set(packed) <= arguments


FLAT = {"budget": 8, "sinks": 3, "window": 5, "protected": 0, "halving": "kernel", "inflation": 2}
OWN = Express(budget=8, sinks=3, recent=5, protected=0, halving="kernel", inflation=2)


def test_flat_options_mean_those_of_every_method_that_has_them() -> None:
    policy = Policy(**FLAT)
    assert policy.of("express") == OWN
    assert policy.of("thinformer") == Thinformer(budget=8, halving="kernel") and policy.of("santa") == Santa(budget=8)
    nearer = Policy(**FLAT, method_options={"express": {"recent": 7, "block": 32}})
    assert nearer.of("express") == dataclasses.replace(OWN, recent=7, block=32)
    assert dataclasses.replace(policy, window=9).of("express").recent == 9
    assert policy.shared == {name: value for name, value in FLAT.items() if name != "budget"}
    with pytest.raises(TypeError, match="unknown option 'recent': allowed are budget, methods, sinks, window"):
        Policy(recent=5)


def test_options_of_methods_may_stand_among_their_names() -> None:
    policy = Policy(methods=[OWN, "thinformer", "exact"], budget=64)
    assert policy.methods == ("express", "thinformer", "exact") and policy.of("express") == OWN
    assert policy.of("thinformer").budget == 64  # which was given for all others
    assert Policy.from_json(policy.to_json()) == policy
    assert json.loads(policy.to_json())["method_options"]["express"]["recent"] == 5
    check_policy(policy)
    assert split_options({"methods": [OWN, "thinformer", "exact"], "budget": 64})[0] == policy
    local = Policy(modules={"a.*": OWN, "a.b": {"methods": [Thinformer(g=1)]}, "c": "exact"})
    assert local.at("a.x").methods == ("express",) and local.at("a.x").of("express") == OWN
    assert local.at("a.b").methods == ("thinformer",) and local.at("a.b").of("thinformer").g == 1
    assert Policy.from_json(local.to_json()) == local
    with pytest.raises(ValueError, match=r"method_options\['express'\]=.*: not allowed beside the express of methods"):
        Policy(methods=[OWN], method_options={"express": {"block": 32}})
    with pytest.raises(TypeError, match=r"Options\(\): must be the options of a registered method"):
        Policy(methods=[e.core.options.Options()])


def test_a_budget_of_a_method_may_be_a_function_of_the_number_of_keys() -> None:
    policy = Policy(methods=[Thinformer(budget=lambda n: n // 8)])
    table = policy.tabled().of("thinformer").budget
    assert table[:4] == (4, 4, 8, 16) and policy.tabled().tabled() == policy.tabled()
    with pytest.raises(ValueError, match=r"budget\(16\) returned 2.0"):
        check_policy(Policy(methods=[Thinformer(budget=lambda n: n / 8)]))
    with pytest.raises(TypeError, match=r"^method_options\['thinformer'\]\['budget'\]=<function"):
        policy.to_json()


class Net(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_both_ways_to_give_options_compute_the_same() -> None:
    q = torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for options in ({"methods": ["express"], **FLAT}, {"methods": [OWN]}):
        torch._dynamo.reset()
        found.append(torch.compile(Net(), backend="express", options={**options, "strict": True})(q))
        plan = e.explain(Net(), q, **options).plan
        assert plan.sites[0].params["recent"] == 5 and str(plan.sites[0].rows[0]) == "3 sinks + 5 recent + 8 thinned"
    assert torch.equal(*found) and (found[0] - Net()(q)).abs().max() > 1e-3


EXPRESS = st.builds(
    Express,
    budget=st.integers(4, 4096),
    sinks=st.integers(0, 99),
    recent=st.integers(0, 9999),
    protected=st.integers(0, 999),
    halving=st.sampled_from(["kernel", "balanced", "uniform"]),
    inflation=st.none() | st.integers(0, 2),
    flatten=st.floats(0, 4),
    block=st.sampled_from([16, 32, 64, 128]),
)
SANTA = st.builds(
    Santa,
    budget=st.integers(4, 4096) | st.floats(0.01, 1.0) | st.lists(st.integers(4, 64), min_size=1, max_size=4),
    draws=st.none() | st.integers(1, 99) | st.dictionaries(st.text(max_size=5), st.integers(1, 99), max_size=3),
    sampler=st.sampled_from(["sys", "strat", "sys-3"]),
    bernoulli=st.integers(0, 256),
)


@given(st.lists(EXPRESS | SANTA | st.just("exact"), min_size=1, max_size=3, unique_by=type))
def test_policies_with_options_of_methods_come_back_from_json(methods: list[Any]) -> None:
    policy = Policy(methods=methods)
    again = Policy.from_json(policy.to_json())
    assert again == policy
    for given_options in methods:
        if given_options != "exact":
            assert again.of(METHODS.name_of(given_options)) == given_options


def test_a_call_knows_its_arguments_by_name() -> None:
    op = METHODS["santa"].op
    q, k, v = (torch.randn(1, 2, n, 4) for n in (1, 9, 9))
    options = METHODS["santa"].params(Site(), Policy(budget=4, min_length=0))
    sinks = torch.zeros(2)
    for args, kwargs in (((None, sinks), options), ((), {**options, "sinks": sinks})):
        call = Call.of(op, (q, k, v, None, torch.tensor(3), 0.5, 7, *args), kwargs)
        assert call.query is q and call.layer == 7 and call.sinks is sinks and call.options == options
        assert (call.Lq, call.Lk, call.can_be_exact) == (1, 9, True)
        assert torch.equal(call.run(op)[0], op(*call.args, sinks=sinks, **options)[0])
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    plain = dataclasses.replace(call, sinks=None).exactly()
    torch.testing.assert_close(plain.run(op)[0], exact)
    assert plain.options["min_length"] == 10
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    node = graph.call_function(op, (*nodes, None, 0, 0.5, 7), {**options, "sinks": nodes[0]})
    found = Call.of_node(node)
    assert (found.value, found.layer, found.sinks) == (nodes[2], 7, nodes[0]) and found.options == options
