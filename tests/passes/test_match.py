"""Finding sites: where they are, what they compute, and which are listed but refused."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile.core.policy import Policy
from express_compile.core.spec import Mask
from express_compile.passes.match import find_sites
from express_compile.passes.normalize import SIGNATURES, mutated_inputs, operation
from express_compile.passes.pipeline import rewrite_graph
from express_compile.passes.site import AttentionSite

SHAPE = (2, 4, 6, 8)


def capture(f: Callable, *inputs: Any, **options: Any) -> list[torch.fx.GraphModule]:
    """The graphs Dynamo hands to a backend, which also runs them."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(f, backend=backend, **options)(*inputs)
    return graphs


def sites_of(f: Callable, *inputs: Any, **options: Any) -> list[AttentionSite]:
    return [site for gm in capture(f, *inputs, **options) for site in find_sites(gm)]


def only(f: Callable, *inputs: Any, **options: Any) -> AttentionSite:
    (site,) = sites_of(f, *inputs, **options)
    return site


Q = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


# ---- one spelling per operation, with make_fx as the oracle ------------------------------------------------

A, T = torch.tensor([[True, False], [True, True]]), torch.arange(4.0).view(2, 2)
SPELLINGS: dict[str, list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "bitwise_and": [
        lambda a, t: a & ~a,
        lambda a, t: torch.bitwise_and(a, ~a),
        lambda a, t: a.bitwise_and(other=~a),
        lambda a, t: operator.and_(a, ~a),
        lambda a, t: a.__and__(~a),
        lambda a, t: torch.ops.aten.bitwise_and.Tensor(a, ~a),
    ],
    "logical_not": [lambda a, t: a.logical_not(), lambda a, t: torch.logical_not(input=a)],
    "le": [lambda a, t: t <= 2, lambda a, t: torch.le(t, 2), lambda a, t: t.less_equal(2), lambda a, t: 2 >= t],
    "eq": [lambda a, t: t == 2, lambda a, t: t.eq(2), lambda a, t: torch.eq(input=t, other=2)],
    "sub": [lambda a, t: t - 1, lambda a, t: t.subtract(1), lambda a, t: torch.sub(t, other=1)],
    "mul": [lambda a, t: t * 3, lambda a, t: 3 * t, lambda a, t: torch.multiply(t, 3)],
    "where": [lambda a, t: torch.where(a, t, 0.0), lambda a, t: t.where(a, 0.0)],
    "masked_fill": [lambda a, t: t.masked_fill(a, 0.0), lambda a, t: torch.masked_fill(t, mask=a, value=0.0)],
    "tril": [lambda a, t: t.tril(1), lambda a, t: torch.tril(t, diagonal=1), lambda a, t: torch.tril(input=t)],
    "transpose": [lambda a, t: t.transpose(0, 1), lambda a, t: torch.swapaxes(t, 0, 1)],
    "unsqueeze": [lambda a, t: t.unsqueeze(0), lambda a, t: torch.unsqueeze(t, dim=0)],
    "cumsum": [lambda a, t: t.cumsum(-1), lambda a, t: torch.cumsum(t, dim=-1)],
    "softmax": [lambda a, t: t.softmax(-1), lambda a, t: F.softmax(t, dim=-1), lambda a, t: torch.softmax(t, -1)],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling_per_operation(name: str) -> None:
    for f in SPELLINGS[name]:
        (gm,) = capture(f, A, T)
        (output,) = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        op = operation(output)
        assert op is not None and op.name in (name, {"le": "ge"}.get(name)), op
        expected = make_fx(gm)(*placeholders(gm))
        # the oracle: the canonical call computes the same numbers by the same aten operations
        values = tuple(op.args[p] for p in SIGNATURES[op.name] if p in op.args)
        with gm.graph.inserting_before(output):
            values = tuple(
                gm.graph.call_function(torch.tensor, (v,)) if v == 2 and not i else v for i, v in enumerate(values)
            )
            output.replace_all_uses_with(gm.graph.call_function(getattr(torch, op.name), values))
        gm.graph.erase_node(output)
        gm.recompile()
        canonical = make_fx(gm)(*placeholders(gm))
        assert torch.equal(canonical(*placeholders(gm))[0], f(A, T))
        assert last_operation(canonical) == last_operation(expected)


def placeholders(gm: torch.fx.GraphModule) -> list[torch.Tensor]:
    return [{"l_a_": A, "l_t_": T}[n.name] for n in gm.graph.nodes if n.op == "placeholder"]


TURNED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "eq": "eq", "ne": "ne"}


def last_operation(gm: torch.fx.GraphModule) -> str:
    """The last aten operation; a comparison as if its constant came second, ``ge(2, t)`` being ``le(t, 2)``."""
    last = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)][-1]
    name = last.target._schema.name.removeprefix("aten::")
    constant_first = not (isinstance(last.args[0], torch.fx.Node) and last.args[0].op == "placeholder")
    return TURNED[name] if name in TURNED and constant_first else name


@pytest.mark.parametrize("name", TURNED)
def test_comparisons_keep_their_sides(name: str) -> None:
    """Dynamo of torch 2.11 leaves ``2 >= t`` as it is, that of 2.13 writes ``t <= 2``: both must be read alike."""
    numbers = torch.arange(5)
    for turned in (False, True):
        graph = torch.fx.Graph()
        t = graph.placeholder("t")
        operands = (2, t) if turned else (t, 2)
        calls = [graph.call_function(getattr(operator, name), operands)]
        if not turned:
            calls += [graph.call_method(f"__{name}__", operands), graph.call_method(name, operands)]
            calls += [graph.call_function(getattr(torch, name), operands)]
            calls += [graph.call_function(getattr(torch.ops.aten, name).Scalar, operands)]
        for call in calls:
            op = operation(call)
            values = [numbers if op.args[side] is t else torch.tensor(op.args[side]) for side in ("input", "other")]
            read = getattr(torch, op.name)(*values)
            meant = getattr(operator, name)(*((2, numbers) if turned else (numbers, 2)))
            assert torch.equal(read, meant), (call.target, op)
            if name not in ("eq", "ne"):
                assert not torch.equal(read, getattr(torch, TURNED[op.name])(*values))


def test_reflected_operands_are_turned_round() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    op = operation(graph.call_method("__rsub__", (x, 3)))
    assert op.name == "sub" and op.args == {"input": 3, "other": x}


def test_a_function_that_only_shares_a_name_is_unknown() -> None:
    def where(condition: Any, a: Any, b: Any) -> Any:
        return b

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert operation(graph.call_function(where, (x, x, x))) is None
    assert operation(graph.call_function(torch.where, (x, x, x))).name == "where"
    assert operation(graph.call_function(torch.where, (x,))) is None
    assert operation(graph.call_function(torch.add, (x, x), {"out": x})) is None
    assert operation(graph.call_method("view", (x, torch.int32))) is None
    assert operation(graph.call_function(torch.ops.aten.add_.Tensor, (x, x))) is None


def test_writes_are_found() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    writes = [
        graph.call_method("add_", (x, y)),
        graph.call_method("__iadd__", (x, y)),
        graph.call_method("__setitem__", (x, 0, y)),
        graph.call_function(operator.setitem, (x, 0, y)),
        graph.call_function(operator.iand, (x, y)),
        graph.call_function(torch.add, (y, y), {"out": x}),
        graph.call_function(torch.relu_, (x,)),
        graph.call_function(F.relu, (x,), {"inplace": True}),
        graph.call_function(F.dropout, (x, 0.5, True, True)),
        graph.call_function(torch.ops.aten.copy_.default, (x, y)),
    ]
    assert set(mutated_inputs(graph.call_function(torch.ops.aten.copy_, (x, y)))) == {x, y}
    assert all(mutated_inputs(node) == [x] for node in writes)
    reads = [
        graph.call_method("__and__", (x, y)),
        graph.call_method("__invert__", (x,)),
        graph.call_function(operator.and_, (x, y)),
        graph.call_function(operator.invert, (x,)),
        graph.call_function(F.relu, (x,)),
        graph.call_function(F.dropout, (x, 0.5, True, False)),
        graph.call_function(F.dropout, (x, 0.5, False, True)),
        graph.call_function(F.dropout, (x, 0.0), {"inplace": True}),
        graph.call_function(torch.ops.aten.add.Tensor, (x, y)),
        graph.call_function(torch.ops.aten.copy, (x, y)),
    ]
    assert all(mutated_inputs(node) == [] for node in reads)


# ---- where a site is ---------------------------------------------------------------------------------------


class Leaf(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Leaf(), Leaf()])
        self.named = nn.ModuleDict({"a": Leaf()})
        self.seq = nn.Sequential(Leaf())

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            q = block(q)
        q = self.seq(self.named["a"](q))
        q = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(q, q, q)


PATHS = [("blocks.0", 0), ("blocks.1", 0), ("named.a", 0), ("seq.0", 0), ("", 0), ("", 1)]


def test_module_paths_are_relative_to_what_was_compiled() -> None:
    tree = Tree()
    expected = PATHS
    assert [(s.module, s.index) for s in sites_of(tree, Q)] == expected
    assert len({s.layer for s in sites_of(tree, Q)}) == 6

    torch._dynamo.reset()
    seen: list[tuple[str, int]] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        seen.extend((s.module, s.index) for s in find_sites(gm))
        return gm

    in_place = Tree()
    in_place.compile(backend=backend)
    in_place(Q)
    assert seen == expected

    # Dynamo runs a compiled module of torch.nn inside a wrapper of its own
    assert [(s.module, s.index) for s in sites_of(nn.Sequential(Leaf(), tree), Q)] == [("0", 0)] + [
        (f"1.{module}".removesuffix("."), index) for module, index in expected
    ]

    seen.clear()
    torch._dynamo.reset()
    part = Tree()
    part.blocks[1] = torch.compile(part.blocks[1], backend=backend)
    part(Q)
    assert seen == [("", 0)]
    assert [(s.module, s.index) for s in sites_of(lambda q: tree.blocks[0](q), Q)] == [("tree.blocks.0", 0)]


def test_source_is_the_users_line() -> None:
    site = only(Leaf(), Q)
    path, line = site.source.rsplit(":", 1)
    text = open(path).read().splitlines()[int(line) - 1]
    assert path == __file__ and "scaled_dot_product_attention(q, q, q)" in text


# ---- what a site computes ----------------------------------------------------------------------------------


def test_the_spec_of_plain_calls() -> None:
    k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 5)
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q, k, v)
    s = site.spec
    assert (s.B, s.H, s.H_kv, s.Lq, s.Lk, s.D, s.Dv) == (2, 4, 4, 6, 9, 8, 5)
    assert (s.dtype, s.device, s.mask, s.dropout_p) == (torch.float32, "cpu", Mask(), 0.0)
    assert s.scale == pytest.approx(8**-0.5, rel=1e-15)
    assert [n.name for n in (site.query, site.key, site.value)] == ["l_q_", "l_k_", "l_v_"]

    s = only(lambda q: F.scaled_dot_product_attention(q, q, q, None, 0.25, True, scale=0.7), Q).spec
    assert (s.scale, s.dropout_p, s.mask) == (0.7, 0.25, Mask(causal=True, offset=0))
    # PyTorch's is_causal is aligned top-left
    s = only(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), Q, k).spec
    assert s.mask == Mask(causal=True, offset=0) and s.Lk - s.Lq == 3


@pytest.mark.parametrize(
    "target",
    [
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.scaled_dot_product_attention,
    ],
)
def test_other_names_of_the_same_function(target: Callable) -> None:
    site = only(lambda q: target(q, q, q, is_causal=True), Q)
    assert site.form == "sdpa" and site.spec.mask == Mask(causal=True)


def test_sizes_stay_symbolic() -> None:
    q = Q.clone()
    torch._dynamo.mark_dynamic(q, 2)
    s = only(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q).spec
    assert isinstance(s.Lq, torch.SymInt) and (s.B, s.H, s.D) == (2, 4, 8)
    site = only(lambda q: F.scaled_dot_product_attention(q, q, q), Q, dynamic=True)
    assert site.refusal is not None and "head size" in site.refusal  # the default scale is not a number then
    assert only(lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.5), Q, dynamic=True).spec.scale == 0.5


def test_a_scale_that_dynamo_turned_into_a_symbol_is_read() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaling = 0.3

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, q, scale=self.scaling)

    assert only(Scaled(), Q, dynamic=True).spec.scale == pytest.approx(0.3, rel=1e-12)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_contexts_that_change_the_meaning_are_respected() -> None:
    def chosen(q: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            q = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(q, q, q)

    first, second = sites_of(chosen, Q)
    assert "sdpa_kernel" in first.refusal and second.refusal is None

    def mapped(q: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]))(q)

    assert "torch.func.vmap" in only(mapped, Q).refusal

    def differentiated(q: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum())(q)

    assert "torch.func.vmap, grad or jvp" in only(differentiated, Q).refusal


def test_only_what_is_inside_of_a_transform_is_refused() -> None:
    def doubled(w: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda x: x * 2)(w)

    def f(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q) + doubled(q[0]).sum()
        q = q + torch.func.vmap(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0])(q)
        q = q + torch.func.grad(lambda x: torch.func.vmap(lambda y: y.sum())(x).sum())(q)
        return F.scaled_dot_product_attention(q, q, q)

    assert [site.refusal and "torch.func.vmap" in site.refusal for site in sites_of(f, Q)] == [None, True, None]


def test_only_what_is_inside_of_a_choice_of_kernels_is_refused() -> None:
    def f(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q)
        with sdpa_kernel(SDPBackend.MATH):
            q = F.scaled_dot_product_attention(q, q, q)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                q = F.scaled_dot_product_attention(q, q, q)
            q = F.scaled_dot_product_attention(q, q, q)
        q = F.scaled_dot_product_attention(q, q, q)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q = q + 1
        return F.scaled_dot_product_attention(q, q, q)

    assert [site.refusal is None for site in sites_of(f, Q)] == [True, False, False, False, True, True]


# ---- sdpa of other numbers of dimensions -------------------------------------------------------------------


def _below(L: int) -> torch.Tensor:
    return torch.ones(L, L, dtype=torch.bool).tril()


RANKS: dict[str, tuple[tuple[int, ...], Callable[..., Any], str]] = {
    "one sequence of one head": ((12, 8), lambda q: {"is_causal": True}, "causal"),
    "three dimensions": ((3, 12, 8), lambda q: {"attn_mask": _below(12)}, "causal"),
    "a mask of three dimensions": ((3, 12, 8), lambda q: {"attn_mask": _below(12).expand(3, 12, 12)}, "causal"),
    "no mask": ((3, 12, 8), lambda q: {"scale": 0.3}, "none"),
    "five": ((2, 3, 4, 12, 8), lambda q: {"attn_mask": _below(12)[None]}, "causal"),
    "five, its mask too": ((2, 3, 4, 12, 8), lambda q: {"attn_mask": _below(12).expand(2, 1, 1, 12, 12)}, "causal"),
    "six": ((2, 1, 3, 4, 12, 8), lambda q: {}, "none"),
    "by the outer batch": (
        (2, 3, 4, 12, 8), lambda q: {"attn_mask": _below(12) | (torch.arange(2) == 1).view(2, 1, 1, 1, 1)}, "unknown",
    ),
    "by the inner batch": (
        (2, 3, 4, 12, 8), lambda q: {"attn_mask": _below(12) | (torch.arange(3) == 1).view(3, 1, 1, 1)}, "unknown",
    ),
    "by the batch of three": (
        (3, 12, 8), lambda q: {"attn_mask": _below(12) | (torch.arange(3) == 1).view(3, 1, 1)}, "unknown",
    ),
    "from the given": ((3, 12, 8), lambda q: {"attn_mask": q[:, :, :1] > 0}, "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_sdpa_of_any_number_of_dimensions_is_the_same_in_four(name: str) -> None:
    shape, options, mask = RANKS[name]
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q * 0.5, k, v, **options(q))

    (gm,) = capture(f, q, k, v)
    # few keys: Express and Thinformer are exact
    ((site, decision),) = rewrite_graph(gm, Policy(methods=("express", "thinformer"), budget=64))
    assert site.refusal is None and str(site.spec.mask).split(" ")[0] == mask
    assert (decision.verdict == "rewritten") == (mask != "unknown")
    assert ("scaled_dot_product_attention" in gm.code) == (mask == "unknown")
    (out,), truth = gm(q, k, v), f(q, k, v)
    assert out.shape == truth.shape and (out - truth).abs().max() < 2e-6


def test_grouped_queries_of_five_dimensions() -> None:
    q, k = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 3, 2, 6, 8)
    site = only(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), q, k)
    assert (site.spec.B, site.spec.H, site.spec.H_kv) == (6, 4, 2)


GROUPS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Any], tuple[int, ...], str]] = {
    "groups first": ((2, 3, 2, 12, 8), (2, 1, 2, 12, 8), lambda q: {"is_causal": True}, (2, 6, 2), "causal"),
    "groups first, masked": (
        (2, 3, 2, 12, 8), (2, 1, 2, 12, 8), lambda q: {"attn_mask": _below(12).expand(2, 1, 2, 12, 12)},
        (2, 6, 2), "causal",
    ),
    "groups of groups": ((2, 3, 2, 2, 12, 8), (2, 1, 2, 1, 12, 8), lambda q: {}, (2, 12, 2), "none"),
    "queries one after the other": (
        (2, 36, 8), (2, 12, 8), lambda q: {"attn_mask": _below(12).repeat(3, 1)}, (2, 3, 1), "causal",
    ),
    "those of a KV head one after the other": (
        (2, 2, 36, 8), (2, 2, 12, 8), lambda q: {"attn_mask": _below(12).repeat(3, 1)}, (2, 6, 2), "causal",
    ),
    "heads beside each other": (
        (2, 1, 36, 8), (2, 1, 12, 8), lambda q: {"attn_mask": _below(12).repeat_interleave(3, 0)}, (2, 3, 1), "causal",
    ),
    "heads behind their queries": (
        (2, 12, 3, 8), (2, 1, 12, 8), lambda q: {"attn_mask": _below(12)[:, None]}, (2, 3, 1), "causal",
    ),
    # whose masks are those of their places, or of none
    "places that go on": ((2, 36, 8), (2, 12, 8), lambda q: {"is_causal": True}, (2, 1, 1), "causal"),
    "a mask by the group": (
        (2, 3, 2, 12, 8), (2, 1, 2, 12, 8), lambda q: {"attn_mask": q[:, :, :, :, :1].sum(2, True) > 0},
        (2, 6, 2), "unknown",
    ),
    "one place later": (
        (2, 36, 8), (2, 12, 8), lambda q: {"attn_mask": (torch.arange(36)[:, None] + 1) % 12 >= torch.arange(12)},
        (2, 1, 1), "unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_sdpa_whose_keys_are_those_of_many_heads(name: str) -> None:
    """Whatever is proven is computed as ``[B, H, L, D]``; few keys, of which Express and Thinformer are exact."""
    of_query, of_key, options, sizes, mask = GROUPS[name]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (of_query, of_key, of_key))

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options(q))

    (gm,) = capture(f, q, k, v)
    ((site, decision),) = rewrite_graph(gm, Policy(methods=("express", "thinformer"), budget=64))
    assert (site.spec.B, site.spec.H, site.spec.H_kv) == sizes and str(site.spec.mask).split(" ")[0] == mask
    assert (decision.verdict == "rewritten") == (mask != "unknown" and site.spec.Lq <= site.spec.Lk), decision.reason
    (out,), truth = gm(q, k, v), f(q, k, v)
    assert out.shape == truth.shape and (out - truth).abs().max() < 2e-6


def test_a_causal_call_says_which_dimension_its_queries_are() -> None:
    """Also where the number of its heads is not known, and with one head of keys they might be queries as well."""

    def f(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=causal)

    q, k = torch.randn(2, 5, 6, 8), torch.randn(2, 1, 6, 8)
    torch._dynamo.mark_dynamic(q, 1)
    for causal, verdict, heads in ((True, "refused", None), (False, "rewritten", 6)):
        torch._dynamo.reset()
        (gm,) = capture(lambda q, k, causal=causal: f(q, k, causal), q, k)
        ((site, decision),) = rewrite_graph(gm, Policy(methods=("express", "thinformer"), budget=64))
        assert decision.verdict == verdict and (site.spec and site.spec.H) == heads, decision.reason


# ---- floats that differ between two models of a class ------------------------------------------------------


def _second(scores: Callable[[nn.Module, torch.Tensor], torch.Tensor], first: float, second: float) -> list[Any]:
    """The sites of two models of one class, of which Dynamo has seen the first when it compiles the second."""

    class Model(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.number = number

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return scores(self, q @ q.mT).softmax(-1) @ q

    torch._dynamo.reset()
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        found.extend(rewrite_graph(gm, Policy(methods=("exact",))))
        return gm

    for number in (first, second, first):
        model = Model(number)
        assert (torch.compile(model, backend=backend)(Q) - model(Q)).abs().max() < 1e-6
    return found


NUMBERS: dict[str, tuple[Callable[..., Any], float, float]] = {
    "scale": (lambda m, s: s * m.number, 0.25, 0.5),
    "divisor": (lambda m, s: s / m.number, 2.0, 3.0),
    "what is made of it": (lambda m, s: s * (m.number / 2) * m.number, 0.25, 0.5),
    "fill": (lambda m, s: s.masked_fill(~_below(6), m.number), -math.inf, -1e9),
    "where": (lambda m, s: torch.where(_below(6), s, m.number), -1e10, -1e9),
    "added": (lambda m, s: s + torch.where(_below(6), 0.0, m.number), -math.inf, torch.finfo(torch.float32).min),
    "alpha": (lambda m, s: torch.add(s, torch.ones(6, 6).triu(1) * torch.finfo(s.dtype).min, alpha=m.number), 1.0, 0.5),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_second_model_of_a_class_is_rewritten_with_its_own_number(name: str) -> None:
    found = _second(*NUMBERS[name])
    assert [decision.verdict for _, decision in found] == ["rewritten"] * len(found) and len(found) >= 2
    assert len({str(site.spec.mask) for site, _ in found}) == 1 and found[0][0].spec.mask.unknown is None


def test_a_number_that_the_caller_passes_does_not_compile_anew_for_each() -> None:
    def f(q: torch.Tensor, scale: float) -> torch.Tensor:
        return (q @ q.mT * scale).softmax(-1) @ q

    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        graphs.append(rewrite_graph(gm, Policy(methods=("exact",))))
        return gm

    torch._dynamo.reset()
    g = torch.compile(f, backend=backend)
    for scale in (0.5, 0.25, 0.125, 0.3):
        assert (g(Q, scale) - f(Q, scale)).abs().max() < 1e-6
    assert [[plan.verdict for _, plan in graph] for graph in graphs] == [["rewritten"], ["rewritten"]]
    assert [graph[0][0].spec.scale for graph in graphs] == [0.5, 1.0]  # in the second the query is scaled


def test_branches_of_control_flow_are_refused() -> None:
    def f(q: torch.Tensor, yes: torch.Tensor) -> torch.Tensor:
        return torch.cond(yes, lambda q: F.scaled_dot_product_attention(q, q, q), lambda q: q.sin(), (q,))

    assert "higher-order operator cond" in only(f, Q, torch.tensor(True)).refusal


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ([(3, 2, 4, 6, 8), *[(1, 2, 4, 6, 8)] * 2], {}, "of (3, 2, 4) and its keys or values of (1, 2, 4)"),
        ([SHAPE, (4, 6, 8), (4, 6, 8)], {}, "4, 3 and 3 dimensions"),
        ([(2, 4, 6, 0)] * 3, {}, "its head size is 0"),
        ([SHAPE, (1, 4, 6, 8), (1, 4, 6, 8)], {}, "batch size 1"),
        ([SHAPE, (2, 1, 6, 8), (2, 4, 6, 8)], {}, "1 heads, its value 4"),
    ],
)
def test_shapes_that_no_op_takes(shapes: list[tuple[int, ...]], options: dict[str, Any], words: str) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    assert words in only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), *inputs).refusal


def test_a_softmax_that_is_no_attention_is_not_listed() -> None:
    assert sites_of(lambda q: torch.softmax(q, -1).topk(2).values @ q[..., :2].mT, Q) == []
    assert sites_of(lambda q: torch.log(torch.softmax(q, -1)), Q) == []
    assert sites_of(lambda q: torch.baddbmm(torch.softmax(q[0], -1), q[0] @ q[0].mT, q[0]), Q) == []


def test_torchs_opaque_layers_are_described() -> None:
    x = torch.randn(3, 6, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    site = only(lambda x: attention(x, x, x, need_weights=False)[0], x)
    assert (site.form, site.refusal) == ("multi_head_attention_forward", None) and site.expand is not None
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        fused = only(lambda x: layer(x), x)
    assert (fused.form, fused.refusal) == ("_transformer_encoder_layer_fwd", None) and fused.expand is not None
    for s in (site.spec, fused.spec):
        assert (s.B, s.H, s.H_kv, s.Lq, s.Lk, s.D, s.Dv, s.mask) == (3, 2, 2, 6, 6, 4, 4, Mask())

    def chosen(x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(x, x, x)[0]

    assert "sdpa_kernel" in only(chosen, x).refusal


def test_matching_changes_nothing() -> None:
    (gm,) = capture(Tree(), Q)
    before = (gm.code, len(gm.graph.nodes))
    find_sites(gm)
    assert (gm.code, len(gm.graph.nodes)) == before
