"""Where sites are, whatever Dynamo does: paths through graph breaks, on both routes; and what runs in no graph."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import flex_attention

from express_compile import explain, record_sites, restore_attention, rewrite_attention
from express_compile.core.policy import Policy
from express_compile.passes.pipeline import rewrite_graph
from express_compile.report.explain import Report

THIN: dict[str, Any] = {"methods": ("express",), "budget": 8, "sinks": 2, "window": 4, "protected": 0}
X = torch.randn(1, 192, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def causal(q: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(-1, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def broken(q: torch.Tensor) -> torch.Tensor:
    q = q * 2
    torch._dynamo.graph_break()
    return causal(q)


class Whole(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + causal(x)


class Before(nn.Module):
    def forward(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        torch._dynamo.graph_break()
        return x + this.attend(x)

    def attend(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        return causal(x)


class After(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + causal(x)
        torch._dynamo.graph_break()
        return x


class Helper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + broken(x)


class Method(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attend(x)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        print(end="")
        return causal(x)


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + causal(x) * (2.0 if x.sum().item() > 1e9 else 0.5)


class Net(nn.Module):
    def __init__(self, leaf: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(leaf() for _ in range(depth))

    def forward(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        for layer in this.layers:
            x = layer(x) * 0.5
        return x


class Backend:
    """What torch.compile(backend="express") does, without inductor."""

    def __init__(self, **options: Any) -> None:
        self.policy = Policy(**options)
        self.sites: list[tuple[str, int, str]] = []
        self.layers: list[int] = []
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        planned = rewrite_graph(gm, self.policy)
        self.sites += [(site.module, site.index, plan.method) for site, plan in planned]
        self.layers += [site.layer for site, _ in planned]
        return gm.forward


def routes(model: nn.Module, **options: Any) -> tuple[list[Any], list[Any], list[Any], torch.Tensor, torch.Tensor]:
    """The sites by explain, by the backend and by rewrite_attention, and the outputs of the last two."""
    report = explain(model, X, **options)
    backend = Backend(**options)
    compiled = torch.compile(model, backend=backend)(X)
    rewrite_attention(model, **options)
    with record_sites() as sites:
        rewritten = model(X)
    of = [[(x.module, x.saved.index, x.method) for x in found] for found in (report.sites, sites)]
    return of[0], backend.sites, of[1], compiled, rewritten


# ------------------------------------------------------------------------------------------------- many graphs


@torch.no_grad()
@pytest.mark.parametrize(("leaf", "depth"), [(Before, 12), (After, 2), (Helper, 9), (Method, 2), (Item, 2), (Whole, 2)])
def test_every_layer_has_its_own_path_on_both_routes(leaf: type[nn.Module], depth: int) -> None:
    model = Net(leaf, depth)
    exact = model(X)
    explained, compiled, rewritten, a, b = routes(model, **THIN)
    assert explained == compiled == rewritten == [(f"layers.{i}", 0, "express") for i in range(depth)]
    assert torch.equal(a, b) and (a - exact).norm() > 1e-4 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("leaf", [Before, Helper])
def test_globs_reach_through_graph_breaks(leaf: type[nn.Module]) -> None:
    modules = {"layers.[02]": "exact", "layers.3": {"budget": 16}}
    explained, compiled, rewritten, a, b = routes(Net(leaf, 4), modules=modules, strict=True, **THIN)
    methods = ["exact", "express", "exact", "express"]
    assert explained == compiled == rewritten == [(f"layers.{i}", 0, method) for i, method in enumerate(methods)]
    assert torch.equal(a, b)
    everything = Backend(modules={"layers.*": "exact"}, **THIN)
    model = Net(leaf, 4)
    assert torch.equal(torch.compile(model, backend=everything)(X), model(X))


@torch.no_grad()
def test_pieces_of_one_module_go_on_counting() -> None:
    class Pieces(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = causal(causal(x))
            torch._dynamo.graph_break()
            x = causal(x)
            torch._dynamo.graph_break()
            return causal(x)

    explained, compiled, rewritten, a, b = routes(Net(Pieces, 2), **THIN)
    assert explained == compiled == rewritten == [(f"layers.{i}", j, "express") for i in range(2) for j in range(4)]
    assert torch.equal(a, b)
    backend = Backend(**THIN)
    again = torch.compile(Net(Pieces, 2), backend=backend, dynamic=True)
    again(X), again(X[:, :180]), again(torch.cat([X, X]))
    assert len(set(backend.layers)) == 8, "what is compiled anew has the numbers that it had"


@torch.no_grad()
def test_models_of_one_class_and_a_part_that_is_compiled_alone_do_not_mix() -> None:
    backend = Backend(**THIN)
    first, second = Net(Before, 2), Net(Before, 2)
    for model in (first, second, first):
        torch.compile(model, backend=backend)(X)
    paths = [path for path, *_ in backend.sites]
    assert paths == ["layers.0", "layers.1"] * 2
    torch.compile(first.layers[1], backend=backend)(X)
    torch.compile(nn.Sequential(nn.Identity(), first.layers[1]), backend=backend)(X)
    assert [path for path, *_ in backend.sites[4:]] == ["", "1"]


@torch.no_grad()
@pytest.mark.parametrize("leaf", [Whole, Before])
def test_a_branch_by_data_and_a_generator_have_the_paths_of_the_modules(leaf: type[nn.Module]) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.last = nn.ModuleList([leaf(), leaf()]), leaf()
            self.alias = self.last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.experts[1](x) if x.sum() == x.sum() else self.experts[0](x)
            for y in (module(x) for module in self.experts[:1]):
                x = x + y
            return self.alias(x)

    explained, compiled, rewritten, a, b = routes(Experts(), **THIN)
    assert explained == compiled == [(path, 0, "express") for path in ("experts.1", "experts.0", "last")]
    assert rewritten == explained and torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("leaf", [Whole, Before])
def test_a_function_gives_its_own_names_first_with_and_without_breaks(leaf: type[nn.Module]) -> None:
    model = Net(leaf, 2)

    class Trainer:
        def __init__(self) -> None:
            self.net = model

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    calls = {
        "model": lambda x: model(x),
        "self.net": Trainer().step,
        "": model.forward,
        "model ": torch.no_grad()(lambda x: model(x)),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        backend = Backend(**THIN)
        torch.compile(call, backend=backend)(X)
        prefix = name.strip().removeprefix("self.")
        assert [path for path, *_ in backend.sites] == [f"{prefix}.layers.{i}".strip(".") for i in range(2)], name
    torch._dynamo.reset()
    model.compile(backend=(backend := Backend(**THIN)))
    model(X)
    assert [path for path, *_ in backend.sites] == ["layers.0", "layers.1"]


@torch.no_grad()
@pytest.mark.parametrize("leaf", [Whole, Before])
def test_modules_that_are_not_registered_have_the_path_of_the_attribute(leaf: type[nn.Module]) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.by_name = [leaf(), leaf()], {"a": leaf()}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.by_name["a"](self.layers[1](self.layers[0](x)))

    backend = Backend(**THIN)
    torch.compile(nn.Sequential(Holder()), backend=backend)(X)
    assert [path for path, *_ in backend.sites] == ["0.layers.0", "0.layers.1", "0.by_name.a"]


@torch.no_grad()
def test_a_place_that_cannot_be_known_is_refused_and_globs_are_not_dropped_in_silence() -> None:
    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Before()(x)

    model = Made()
    (site,) = explain(model, X, **THIN).sites
    assert (site.module, site.method, site.verdict) == ("", "exact", "refused")
    assert "no path to the Before" in site.reason
    assert torch.equal(torch.compile(model, backend=Backend(**THIN))(X), model(X))
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="modules and plan cannot say what runs there"):
        torch.compile(model, backend=Backend(modules={"*": "express"}, **THIN))(X)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="no path to the Before"):
        torch.compile(model, backend=Backend(strict=True, **THIN))(X)


@torch.no_grad()
def test_the_module_around_both_products_and_the_softmax_holds_the_attention() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.softmax, self.mix = Product(), nn.Softmax(-1), Product()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x[:, None]
            return self.mix(self.softmax(self.scores(q, q.mT) * 0.25), q)[:, 0]

    options = {"methods": ("thinformer",), "budget": 8}
    explained, compiled, rewritten, a, b = routes(Net(Parts, 2), **options)
    assert explained == compiled == rewritten == [(f"layers.{i}", 0, "thinformer") for i in range(2)]
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ strict


class Apart(nn.Module):
    """Graphs with and without attention."""

    def __init__(self, attends: bool = True) -> None:
        super().__init__()
        self.a, self.b = (Whole(), Whole()) if attends else (nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x * 1.5)
        torch._dynamo.graph_break()
        x = self.b(x)
        torch._dynamo.graph_break()
        return x * 2


@torch.no_grad()
def test_strict_judges_the_whole_model() -> None:
    def run(model: nn.Module, **options: Any) -> None:
        torch._dynamo.reset()
        torch.compile(model, backend=Backend(strict=True, **THIN, **options))(X)

    run(Apart())
    run(Apart(), modules={"b": {"budget": 16}})
    with pytest.raises(BackendCompilerFailed, match=r"modules\['c'\] matches no module of the model"):
        run(Apart(), modules={"c": "exact"})
    with pytest.raises(BackendCompilerFailed, match="no attention was found"):
        run(Apart(attends=False))
    with pytest.raises(BackendCompilerFailed, match=r"modules\['extra'\] matches no attention site; .* a, b"):
        half = Apart()
        half.extra = nn.Identity()
        run(half, modules={"extra": "exact"})
    for call in (lambda **o: explain(Apart(), X, **o), lambda **o: rewrite_attention(Apart(), **o)(X)):
        call(strict=True, modules={"b": {"budget": 16}}, **THIN)
        with pytest.raises(ValueError, match=r"modules\['c'\] matches no attention site"):
            call(strict=True, modules={"c": "exact"}, **THIN)
    with pytest.raises(ValueError, match="no attention was found"):
        explain(Apart(attends=False), X, strict=True)


# ------------------------------------------------------------------------------------------- what is in no graph


class Hidden(nn.Module):
    """Attention behind torch.compiler.disable, beside a router, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.by_hand, self.softmax = nn.Linear(16, 4), True, nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x * 2) * self.route(x).amax(-1, keepdim=True)

    @torch.compiler.disable
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.softmax(x @ x.mT) @ x if self.by_hand else causal(x)

    @torch.compiler.disable
    def route(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.router(x).softmax(-1), self.router.weight.mT)


def of(report: Report) -> list[tuple[str, str, str]]:
    return [(site.module, site.form, site.verdict) for site in report.sites]


@pytest.mark.parametrize("by_hand", [True, False])
def test_code_behind_disable_is_listed_with_its_line_and_routers_are_not(by_hand: bool) -> None:
    model = nn.Sequential(Hidden(), Whole(), Hidden())
    model[0].by_hand = model[2].by_hand = by_hand
    report = explain(model, X, **THIN)
    assert of(report) == [("0", "not matched", "refused"), ("1", "sdpa", "rewritten"), ("2", "not matched", "refused")]
    site = report.sites[0]
    path, line = site.source.rsplit(":", 1)
    words = "self.softmax(x @ x.mT)" if by_hand else "F.scaled_dot_product_attention(q, q, q"
    assert path == __file__ and words in open(path).read().splitlines()[int(line) - 1]
    assert site.reason == "it runs in no graph, behind torch.compiler.disable"
    assert report.graphs > 1 and f"Dynamo made {report.graphs} graphs of the model" in str(report)
    assert any("disable" in words for words in report.breaks) and report.breaks[0] in str(report)
    data = json.loads(report.to_json())
    assert data["graphs"] == report.graphs and tuple(data["breaks"]) == report.breaks
    page = report.to_html()
    assert f"Dynamo made {report.graphs} graphs of the model." in page and "graph break at" in page
    assert len(report.plan.sites) == 1, "what runs in no graph has no entry in a plan"
    with pytest.raises(ValueError, match="2 attention sites were refused"):
        explain(model, X, strict=True, **THIN)


def test_a_break_in_torchs_own_layers_is_listed_and_the_rewritten_model_agrees() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    model = nn.Sequential(encoder).eval()
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, -3:] = True
    inputs = torch.randn(2, 9, 16), torch.ones(9, 9, dtype=torch.bool).triu(1), padding
    model.forward = lambda x, mask, padding: encoder(x, mask=mask, src_key_padding_mask=padding)
    report = explain(model, *inputs)
    assert of(report) == [(f"0.layers.{i}", "not matched", "refused") for i in range(2)]
    assert "transformer.py" in report.sites[0].reason and "item()" in report.sites[0].reason
    rewrite_attention(model, methods=["express"])
    with record_sites() as sites, torch.no_grad():
        model(*inputs)
    assert [(site.module, site.method) for site in sites] == [(site.module, "exact") for site in report.sites]


def test_flex_attention_is_listed_and_a_model_that_is_not_compiled_is_explained() -> None:
    def flex(x: torch.Tensor) -> torch.Tensor:
        return flex_attention(x, x, x)

    (site,) = explain(flex, torch.randn(1, 2, 128, 16), methods=["exact"]).sites
    assert (site.form, site.verdict) == ("not matched", "refused") and "flex_attention" in site.reason
    assert site.source.startswith(__file__)
    with torch.compiler.set_stance("force_eager"):
        report = explain(Net(Whole, 2), X, **THIN)
    assert of(report) == [(f"layers.{i}", "not matched", "refused") for i in range(2)]
    assert report.graphs == 0 and "Dynamo made no graph of the model" in str(report)


# ----------------------------------------------------------------------------------------- nothing is changed


def test_explain_leaves_everything_as_it_was() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.calls, self.last, self.log = nn.BatchNorm1d(16), nn.Dropout(0.5), 0, None, []

        def forward(self, x: torch.Tensor, cache: dict[str, Any], written: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.log.append(self.calls)
            cache["k"].append(x)
            written.add_(1)
            random.random()
            self.last = causal(self.drop(self.norm(x.mT).mT))
            return self.last

    model, cache, written = State().train(), {"k": [X]}, torch.zeros(3)
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    before, python = torch.get_rng_state(), random.getstate()
    report = explain(model, X + 3, cache, example_kwargs={"written": written}, **THIN)
    assert [site.method for site in report.sites] == ["express"]
    assert all(torch.equal(x, buffers[name]) for name, x in model.named_buffers())
    assert model.norm.num_batches_tracked.item() == 0 and all(module.training for module in model.modules())
    assert (model.calls, model.last, model.log) == (0, None, []) and len(cache["k"]) == 1 and written.sum() == 0
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    model(X + 3, cache, written)
    assert model.norm.num_batches_tracked.item() == 1 and len(cache["k"]) == 2
    rewrite_attention(model, **THIN)
    explain(model, X, cache, written)
    assert model.norm.num_batches_tracked.item() == 1 and len(cache["k"]) == 2 and model.calls == 1


def test_explaining_says_nothing_of_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(Net(Whole, 1), X, **THIN).graphs == 1


# --------------------------------------------------------------------------------------- parts that are compiled alone


def compile_parts(parts: nn.ModuleList) -> None:
    for i, part in enumerate(parts):
        parts[i] = torch.compile(part, backend="eager")


def test_layers_that_are_compiled_one_by_one_keep_their_paths_and_random_numbers() -> None:
    model = Net(Whole, 2)
    plan = explain(model, X, **THIN).plan
    expected = rewrite_attention(model, **THIN)(X)
    restore_attention(model)
    compile_parts(model.layers)
    explained, compiled, rewritten, a, b = routes(model, **THIN)
    assert explained == compiled == rewritten == [(f"layers.{i}", 0, "express") for i in range(2)]
    torch.testing.assert_close(a, expected)
    torch.testing.assert_close(b, expected)
    restore_attention(model)
    for following in (Backend(plan=plan, strict=True), "eager"):
        if following == "eager":
            rewrite_attention(model, plan=plan, strict=True)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend=following)(X), expected)


def test_layers_of_transformers_that_are_compiled_one_by_one_keep_their_paths(listening_model) -> None:
    ids = torch.arange(60)[None]
    plan = explain(listening_model, ids, **THIN).plan
    expected = rewrite_attention(listening_model, **THIN)(ids).logits
    restore_attention(listening_model)
    layers = list(listening_model.model.layers)
    compile_parts(listening_model.model.layers)
    try:
        assert explain(listening_model, ids, **THIN).plan == plan
        rewrite_attention(listening_model, plan=plan, strict=True)
        torch.testing.assert_close(listening_model(ids).logits, expected)
    finally:
        restore_attention(listening_model)
        listening_model.model.layers = nn.ModuleList(layers)
