"""The torch.compile backend end to end, with Express and with inductor."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from express_compile.core.cost import Device, Rates
from express_compile.core.method import METHODS, Method, Refusal, register
from express_compile.core.policy import Policy
from express_compile.core.spec import Site, layer_key
from express_compile.kernels import op as _op
from express_compile.passes.pipeline import rewrite_graph
from express_compile.report.explain import explain
from express_compile.routes.compile import express, split_options

NAMED = {"methods": ["express"]}


class Attention(nn.Module):
    """Grouped-query self-attention with projections, causal unless told."""

    def __init__(self, dim: int = 32, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(dim, dim + dim)
        self.out = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(x).split([C, C // 2, C // 2], -1)
        q = q.view(B, L, self.heads, -1).transpose(1, 2)
        k, v = (y.view(B, L, self.heads // 2, -1).transpose(1, 2) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, L, C))


class Net(nn.Module):
    def __init__(self, depth: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(causal=causal) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


class Counting:
    """A backend that rewrites, counts its graphs and runs them without inductor."""

    def __init__(self, **options: Any) -> None:
        self.policy = Policy(**options)
        self.plans: list[list[Any]] = []

    def __call__(self, gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        self.plans.append(rewrite_graph(gm, self.policy))
        return gm


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_short_sequences_come_out_exact_through_inductor_with_gradients(net: Net) -> None:
    # Express is exact for n <= 4 s, so the whole chain must reproduce the untouched model
    x = torch.randn(2, 24, 32)
    expected = net(x)
    grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    compiled = torch.compile(net, backend=express, fullgraph=True, options={**NAMED, "budget": 16, "window": 8})
    got = compiled(x)
    assert relative(got, expected) < 1e-6
    for a, b in zip(torch.autograd.grad(got.square().sum(), list(net.parameters())), grads, strict=True):
        assert relative(a, b) < 1e-5


def test_thinned_sequences_are_the_ops_own_result() -> None:
    torch.manual_seed(0)
    net, x = Net(depth=1), torch.randn(1, 160, 32)
    backend = Counting(budget=8, methods=("express",), sinks=4, window=8, protected=0, seed=5)
    with torch.no_grad():
        got = torch.compile(net, backend=backend, fullgraph=True)(x)
        again = torch.compile(net, backend=backend, fullgraph=True)(x)
    assert torch.equal(got, again)
    ((site, plan),) = backend.plans[0]
    assert plan.verdict == "rewritten" and site.module == "layers.0"

    # the op by hand, with the seed and the layer key that the pass promises
    layer = net.layers[0]

    def by_hand(seed: int) -> torch.Tensor:
        q, k, v = layer.qkv(x).split([32, 16, 16], -1)
        q, k, v = (y.view(1, 160, -1, 8).transpose(1, 2) for y in (q, k, v))
        key = layer_key("layers.0", 0)
        out, _ = METHODS["express"].op(q, k, v, None, torch.tensor(seed), 8**-0.5, key, **plan.params)
        return x + layer.out(out.transpose(1, 2).reshape(1, 160, 32))

    with torch.no_grad():
        assert relative(got, by_hand(5)) < 1e-6
        assert relative(got, by_hand(6)) > 1e-4  # another seed keeps other rows
        assert 1e-4 < relative(got, net(x)) < 0.5


def test_modules_run_what_their_globs_say(net: Net) -> None:
    # the first layer exact, the second thinned to another budget than that given for all
    x = torch.randn(1, 160, 32)
    fields = {"methods": ("express",), "sinks": 4, "window": 8, "protected": 0}
    modules = {"layers.0": "exact", "*.1": {"budget": 8}}
    backend = Counting(budget=32, modules=modules, **fields)
    with torch.no_grad():
        got = torch.compile(net, backend=backend, fullgraph=True)(x)
        middle = x + net.layers[0](x)
        q, k, v = net.layers[1].qkv(middle).split([32, 16, 16], -1)
        q, k, v = (y.view(1, 160, -1, 8).transpose(1, 2) for y in (q, k, v))
        params = METHODS["express"].params(Site(), Policy(budget=8, **fields))
        out, _ = METHODS["express"].op(q, k, v, None, torch.tensor(0), 8**-0.5, layer_key("layers.1"), **params)
        expected = middle + net.layers[1].out(out.transpose(1, 2).reshape(1, 160, 32))
        assert relative(got, expected) < 1e-6 < 1e-4 < relative(got, net(x))
    assert [plan.reason for _, plan in backend.plans[0]][0] == "modules['layers.0'] names 'exact' first"
    with pytest.raises(BackendCompilerFailed, match=r"modules\['\*.cross'\] matches no attention site"):
        torch.compile(net, backend=Counting(**fields, modules={"*.cross": "exact"}, strict=True))(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_without_training_only_graphs_without_gradients_are_rewritten(net: Net, checkpointed: bool) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)

    x = torch.randn(1, 160, 32)
    backend = Counting(budget=8, methods=("express",), window=8, sinks=4, protected=0, training=False)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), net(x)) > 1e-4
    assert relative(compiled(x), net(x)) < 1e-6
    net.requires_grad_(False)
    assert relative(compiled(x), net(x)) > 1e-4
    assert relative(compiled(x.clone().requires_grad_()), net(x)) < 1e-6
    verdicts = [[plan.verdict for _, plan in plans] for plans in backend.plans]
    assert verdicts == [["rewritten"] * 2, ["exact"] * 2, ["rewritten"] * 2, ["exact"] * 2]


def test_the_backend_takes_modules_and_plans_through_inductor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(1, 160, 32)
    options = {"methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0}
    options["modules"] = {"*.0": "exact"}
    explain(net, x, **options).plan.save(tmp_path / "plan.json")
    saved = {"plan": str(tmp_path / "plan.json"), "strict": True}
    with torch.no_grad():
        first = torch.compile(net, backend="express", options=options)(x)
        torch._dynamo.reset()
        second = torch.compile(net, backend="express", options=saved)(x)
        by_hand = torch.compile(net, backend=Counting(**options))(x)
        assert torch.equal(first, second)
        assert relative(first, by_hand) < 1e-6 < 1e-4 < relative(first, net(x))


def test_forty_lengths_are_planned_by_two_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length from which Express is predicted to win is compared at run time, to that token."""
    rates = {"express": Rates(launches=1.5e-3), "exact": Rates(scores=1e-6)}
    device = Device("a CPU", "made up", {"float32": rates})
    monkeypatch.setattr("express_compile.planning.choose.device_of", lambda kind: device)
    options = {"express": {"block": 16}}
    none = {"sinks": 0, "window": 0, "protected": 0}
    backend = Counting(methods=("express", "exact"), budget=8, method_options=options, **none)
    f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=backend)
    lengths = range(64, 104)
    rewritten = []
    for n in lengths:
        q = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(n))
        rewritten.append(not torch.allclose(f(q), F.scaled_dot_product_attention(q, q, q, is_causal=True), atol=1e-5))
    (static, dynamic) = backend.plans
    assert [plan.verdict for _, plan in (*static, *dynamic)] == ["exact", "rewritten"]
    # two launches and the margin are 3.15 ms; 79 * 80 / 2 scores are 3.16
    assert dynamic[0][1].params["min_length"] == 79 and rewritten == [n >= 79 for n in lengths]


def test_a_function_as_budget() -> None:
    """Read at powers of two and held between them, whether the length is known or not."""
    torch.manual_seed(0)
    net, options = Net(causal=False), {"methods": ("thinformer",)}
    function = {"budget": lambda n: n // 32, **options}
    fixed, symbolic = Counting(**function), Counting(**function)
    inputs = {n: torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)) for n in (320, 511, 512, 600)}
    with torch.no_grad():
        torch.compile(net, backend=fixed, dynamic=False)(inputs[320])
        compiled = torch.compile(net, backend=symbolic, dynamic=True)
        found = {n: compiled(x) for n, x in inputs.items()}
        assert len(symbolic.plans) == 1, "no compilation per length"
        for rows in (8, 16):
            given = torch.compile(net, backend=Counting(budget=rows, **options), dynamic=True)
            same = [n for n, x in inputs.items() if torch.equal(given(x), found[n])]
            assert same == [n for n in inputs if (n >= 512) == (rows == 16)]
    for backend in (fixed, symbolic):
        assert [plan.verdict for _, plan in backend.plans[0]] == ["rewritten"] * 2
        assert [plan.params["table"][4:7] for _, plan in backend.plans[0]] == [[8, 16, 32]] * 2


@pytest.mark.parametrize("marked", [False, True])
def test_one_compilation_serves_all_lengths(net: Net, marked: bool) -> None:
    backend = Counting(budget=16, methods=("express",), window=8, sinks=4)
    compiled = torch.compile(net, backend=backend, dynamic=None if marked else True, fullgraph=True)
    lengths = (20, 33, 47, 64)
    with torch.no_grad():
        for n in lengths:
            x = torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n))
            if marked:
                torch._dynamo.mark_dynamic(x, 1)
            got = compiled(x)
            assert relative(got, net(x)) < 1e-6
    assert len(backend.plans) == 1
    assert [plan.verdict for _, plan in backend.plans[0]] == ["rewritten"] * 2


def test_without_hints_only_torchs_own_second_compilation_happens(net: Net) -> None:
    backend = Counting(budget=16, methods=("express",), window=8, sinks=4)
    compiled = torch.compile(net, backend=backend)
    with torch.no_grad():
        for n in (20, 33, 47, 64):
            compiled(torch.randn(2, n, 32))
    assert len(backend.plans) == 2  # static first, then dynamic: what torch does for any model


def test_dynamic_shapes_through_inductor(net: Net) -> None:
    compiled = torch.compile(
        net, backend=express, dynamic=True, options={**NAMED, "budget": 16, "window": 8, "sinks": 4}
    )
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (20, 33, 64):
            x = torch.randn(2, n, 32)
            assert relative(compiled(x), net(x)) < 1e-6


def test_a_graph_without_attention_is_just_compiled() -> None:
    f = torch.compile(lambda x: torch.sin(x) * 2, backend=express)
    x = torch.randn(5)
    torch.testing.assert_close(f(x), torch.sin(x) * 2)
    with pytest.raises(BackendCompilerFailed, match="strict=True: no attention was found in this graph"):
        torch.compile(lambda x: torch.cos(x) * 2, backend=express, options={"strict": True})(x)


def test_strict_lists_every_refused_site() -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)

    compiled = torch.compile(f, backend=express, options={**NAMED, "strict": True})
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(torch.randn(2, 4, 6, 8))
    message = str(error.value)
    assert "strict=True: 2 attention sites were refused" in message
    assert "not causal" in message and "dropout" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": 5}, ["unknown option 'budgets'", "budget, methods, sinks", "options of inductor"]),
        ({"budget": 2}, ["budget=2", "at least 4"]),
        ({"window": -1}, ["window=-1", "0 or more"]),
        ({"methods": ["expres"]}, ["unknown method 'expres'", "express"]),
        ({"methods": "express"}, ["methods='express'", "['express']"]),
        ({"method_options": {"flash": {}}}, ["method_options", "unknown method 'flash'"]),
        ({"method_options": {"express": {"nope": 1}}}, ["method_options['express']", "'nope'"]),
        ({"methods": ["express"], "halving": "coin"}, ["coin"]),
    ],
)
def test_bad_options_name_themselves(options: dict[str, Any], words: list[str]) -> None:
    f = torch.compile(
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=express, options=options
    )
    with pytest.raises(BackendCompilerFailed) as error:
        f(torch.randn(1, 2, 8, 4))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_inductor_options_and_modes_are_passed_on_and_nothing_global_changes() -> None:
    before = torch._inductor.config.get_config_copy()
    policy, patches = split_options({"budget": 64, "max-autotune": False, "epilogue_fusion": True}, None)
    assert policy.budget == 64 and patches == {"max_autotune": False, "epilogue_fusion": True}
    _, patches = split_options({}, "max-autotune")
    assert patches["max_autotune"] is True
    with pytest.raises(ValueError, match="mode='fast': allowed are 'default'"):
        split_options({}, "fast")
    with pytest.raises(TypeError, match="unknown argument 'colour'"):
        express(torch.fx.symbolic_trace(nn.Identity()), [], colour=1)
    assert torch._inductor.config.get_config_copy() == before


def test_defaults_do_not_choose_a_method_that_is_slower() -> None:
    backend = Counting()
    q = torch.randn(1, 2, 64, 8)
    f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=backend)
    out = f(q)
    ((_, plan),) = backend.plans[0]
    assert plan.verdict == "exact" and ("not known" in plan.reason or "predicted" in plan.reason)
    assert torch.equal(out, F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_a_registered_method_is_used_and_an_exact_one_named_first_wins() -> None:
    if "picky" not in set(METHODS):
        register(
            Method(
                name="picky",
                summary="refuses",
                supports="nothing",
                refuses="everything",
                refuse=lambda spec, policy: Refusal("picky", "it never runs"),
                params=lambda site, policy: {},
            )
        )
    q = torch.randn(1, 2, 64, 8)
    expected = {("picky", "express"): "rewritten", ("picky", "exact"): "exact", ("picky",): "refused"}
    for methods, verdict in {**expected, ("exact", "express"): "exact"}.items():
        torch._dynamo.reset()
        backend = Counting(methods=methods)
        torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=backend)(q)
        ((_, plan),) = backend.plans[0]
        assert plan.verdict == verdict
        assert [str(r) for r in plan.rejected] == (["picky: it never runs"] if methods[0] == "picky" else [])


def test_the_entry_point_needs_no_import() -> None:
    if not any(importlib.metadata.distributions(name="express-compile")):
        pytest.skip("express-compile is not installed (PYTHONPATH only), and entry points belong to installations")
    code = (
        "import sys, torch, torch.nn.functional as F\n"
        "f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend='express',\n"
        "                  options={'methods': ['express'], 'budget': 16})\n"
        "q = torch.randn(1, 2, 24, 8)\n"
        "error = (f(q) - F.scaled_dot_product_attention(q, q, q, is_causal=True)).abs().max().item()\n"
        "print('error', error < 1e-5, hasattr(torch.ops.express_compile, 'express'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["error", "True", "True"]


def test_graphs_cached_on_disk_are_those_of_these_ops(monkeypatch):
    """A graph compiled for a gradient op with other arguments is not found again."""
    tags = []

    def compile_fx(gm, inputs, config_patches):
        tags.append(torch.compiler.config.cache_key_tag)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    x = torch.randn(1, 2, 30, 8)
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend="express")(x)
        monkeypatch.setitem(_op._SCHEMAS, "express_backward", "(Tensor grad) -> Tensor")
    assert tags[0].startswith("express-compile-") and tags[0] != tags[1]
    assert torch.compiler.config.cache_key_tag == "", "nobody else's graphs are touched"
