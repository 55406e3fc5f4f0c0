"""Torch's own attention layers: equal to the module where the op is exact, else equal to a forward by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from express_compile import Policy, explain
from express_compile.core.method import METHODS
from express_compile.core.plan import Plan
from express_compile.core.spec import Mask, layer_key
from express_compile.passes.match import find_sites
from express_compile.passes.pipeline import rewrite_graph
from express_compile.passes.rewrite import _expand
from express_compile.passes.site import AttentionSite

WHOLE = Policy(methods=("thinformer",), budget=1024)  # more rows than any sequence here has keys
FEW = Policy(methods=("thinformer",), budget=8, seed=5)
CAUSAL = Policy(methods=("express",), budget=64)
OPAQUE = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")
causal_mask = nn.Transformer.generate_square_subsequent_mask


def compiled(
    f: Callable, policy: Policy = WHOLE, finish: Callable = lambda gm, inputs: gm, **options: Any
) -> tuple[Callable, list[tuple[AttentionSite, Plan]]]:
    """``f`` with its sites rewritten, and the plans of all graphs that were compiled since."""
    planned: list[tuple[AttentionSite, Plan]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        plans = rewrite_graph(gm, policy)
        graphs = [module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
        left = [n for graph in graphs for n in graph.nodes if getattr(n.target, "__name__", "") in OPAQUE]
        assert len(left) == sum(plan.verdict != "rewritten" for _, plan in plans)
        planned.extend(plans)
        return finish(gm, inputs)

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, **options), planned


def capture(f: Callable, *inputs: Any) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(f, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)(*inputs)
    return graphs[0]


def only(f: Callable, *inputs: Any) -> AttentionSite:
    (site,) = find_sites(capture(f, *inputs))
    return site


def verdicts(planned: list[tuple[AttentionSite, Plan]]) -> list[str]:
    return [plan.verdict for _, plan in planned]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padded(lengths: list[int], n: int, side: str) -> torch.Tensor:
    """True where a token is padding, as torch has it."""
    hidden = torch.arange(n) >= torch.tensor(lengths)[:, None]
    return hidden if side == "right" else hidden.flip(1)


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, least: float = 1e-3) -> None:
    """Errors count relative to the largest expected number, or to ``least`` if all are smaller."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=least)).item()
    assert error <= tolerance, f"relative error {error}"


def outcome(f: Callable, model: nn.Module, inputs: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """The output of ``f``; with ``grad`` also the gradients of floating inputs and of all parameters."""
    leaves = [x.clone().requires_grad_(grad) if x.is_floating_point() else x for x in inputs]
    model.zero_grad()
    with torch.set_grad_enabled(grad):
        out = f(*leaves)
    if not grad:
        return [out]
    out.backward(random(*out.shape, seed=9).to(out))
    return [out.detach(), *(x.grad for x in leaves if x.is_floating_point()), *(p.grad for p in model.parameters())]


def assert_equal_to_module(
    f: Callable, model: nn.Module, inputs: list[torch.Tensor], grad: bool, sites: int = 1, **options: Any
) -> list[tuple[AttentionSite, Plan]]:
    run, planned = compiled(f, **options)
    expected, got = (outcome(call, model, inputs, grad) for call in (f, run))
    assert verdicts(planned) == ["rewritten"] * sites
    # with a lone key the gradient of the query is 0: what rounding leaves of it is judged beside the others
    least = max(1e-3, *(0.1 * b.abs().max().item() for b in expected))
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b, least=least)
    return planned


def filled(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``model`` with random biases and norms too, which torch makes zeros and ones."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data.add_(random(*parameter.shape, seed=100 + i), alpha=0.3)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- nn.MultiheadAttention ---------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    inputs=st.sampled_from(["self", "memory", "three", "other sizes"]),
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    heads=st.sampled_from([1, 2, 4]),
    side=st.sampled_from([None, "left", "right"]),
    batched=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    need_weights=st.booleans(),
    training=st.booleans(),
    grad=st.booleans(),
)
@example("other sizes", (17, 7), 2, "left", True, True, True, True, True, True)
@example("self", (6, 6), 2, "right", False, False, True, False, True, True)
def test_multi_head_attention(
    inputs, lengths, heads, side, batched, batch_first, bias, need_weights, training, grad
) -> None:
    # fewer queries than keys, and fewer than 16: Thinformer leaves these to exact attention
    Lq, Lk = (max(16, lengths[0]), lengths[1]) if inputs != "self" else (lengths[0],) * 2
    sizes = {"kdim": 6, "vdim": 10} if inputs == "other sizes" else {}
    model = filled(nn.MultiheadAttention(8, heads, bias=bias, batch_first=batch_first, **sizes)).train(training)
    shape = lambda n, size: (2, n, size) if batched else (n, size)  # noqa: E731
    given = [random(*shape(Lq, 8)), random(*shape(Lk, sizes.get("kdim", 8)), seed=1)]
    given.append(random(*shape(Lk, sizes.get("vdim", 8)), seed=2))
    given = given[: {"self": 1, "memory": 2}.get(inputs, 3)]
    if batched and not batch_first:
        given = [x.transpose(0, 1).contiguous() for x in given]
    if side is not None:
        mask = padded([Lk, max(1, Lk - 3)], Lk, side)
        given.append(mask if batched else mask[1])

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        hidden = tensors[-1] if side is not None else None
        x = tensors[: len(tensors) - (side is not None)]
        qkv = {1: (x[0],) * 3, 2: (*x, x[-1]), 3: x}[len(x)]
        return model(*qkv, key_padding_mask=hidden, need_weights=need_weights)[0]

    ((site, _),) = assert_equal_to_module(attend, model, given, grad)
    spec = site.spec
    assert (spec.H, spec.H_kv, spec.Lq, spec.Lk, spec.D, spec.Dv) == (heads, heads, Lq, Lk, 8 // heads, 8 // heads)
    assert spec.B == (2 if batched else 1) and spec.scale == pytest.approx((8 / heads) ** -0.5, rel=1e-15)
    assert (spec.mask, spec.dropout_p) == (Mask(padding=side is not None), 0.0)
    assert site.form == "multi_head_attention_forward" and site.query is None and site.refusal is None


class Pool(nn.Module):
    """Cross attention in a module of its own, which has a path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=12, vdim=20)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v, key_padding_mask=hidden)[0]


def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, heads: int, path: str):
    """Thinformer of projected ``[B, L, E]`` inputs, as the policy FEW asks for it at the first site of ``path``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    params = {"s": 8, "fraction": 0.0, "g": -1, "halving": "balanced", "flatten": 0.0, "min_length": 0}
    padding = None if hidden is None else ~hidden
    seed, scale = torch.tensor(5), q.shape[-1] ** -0.5
    out, _ = torch.ops.express_compile.thinformer(q, k, v, padding, seed, scale, layer_key(path, 0), **params)
    return out.transpose(1, 2).flatten(-2)


def test_a_small_budget_gives_the_op_with_the_seed_and_the_key_of_the_site() -> None:
    METHODS.load()
    model = filled(Pool(), torch.float64)
    q, k, v = random(2, 17, 16).double(), random(2, 70, 12, seed=1).double(), random(2, 70, 20, seed=2).double()
    hidden = padded([70, 41], 70, "left")
    m = model.attention
    biases = m.in_proj_bias.chunk(3)
    weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)

    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return m.out_proj(op(q, k, v, hidden, 2, "attention"))

    run, planned = compiled(model, FEW)
    got, hand = (outcome(f, model, [q, k, v], True) for f in (lambda *x: run(*x, hidden), by_hand))
    exact = model(q, k, v, hidden)
    assert verdicts(planned) == ["rewritten"] and planned[0][0].module == "attention"
    for a, b in zip(got, hand, strict=True):
        assert_same(a, b, 1e-10)
    assert (got[0] - exact).abs().max() > 0.01 * exact.abs().max()
    other, _ = compiled(model, Policy(methods=("thinformer",), budget=8, seed=6))
    assert (other(q, k, v, hidden) - got[0]).abs().max() > 1e-3 * exact.abs().max()


def test_one_graph_for_all_lengths() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)  # training, weights asked for, dropout 0

    def attend(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return model(x, x, x, key_padding_mask=hidden)[0]

    run, planned = compiled(attend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, B in ((6, 2), (11, 3), (17, 4)):
            x, hidden = random(B, n, 8, seed=n), padded([n - 2] * B, n, "right")
            assert_same(run(x, hidden), attend(x, hidden))
    assert verdicts(planned) == ["rewritten"]
    assert isinstance(planned[0][0].spec.Lk, torch.SymInt) and planned[0][0].spec.D == 4


def test_entirely_padded_sequences_give_the_bias_where_torch_gives_nan() -> None:
    model = filled(nn.MultiheadAttention(8, 2, batch_first=True))
    x, hidden = random(2, 6, 8), padded([6, 0], 6, "right")
    attend = lambda x, hidden: model(x, x, x, key_padding_mask=hidden)[0]  # noqa: E731
    run, planned = compiled(attend)
    got, expected = run(x, hidden), attend(x, hidden)
    assert verdicts(planned) == ["rewritten"]
    assert expected[1].isnan().all()
    assert_same(got[0], expected[0])
    assert_same(got[1], model.out_proj.bias.expand(6, 8))


@pytest.mark.parametrize("where", ["inside", "around", "switched off inside"])
def test_autocast(where: str) -> None:
    model = filled(nn.MultiheadAttention(8, 2, batch_first=True))

    def attend(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "inside"):
            return model(model(x, x, x)[0], x, x)[0]  # the second time the query is bfloat16 and the key is not

    def bare(x: torch.Tensor) -> torch.Tensor:
        return model(model(x, x, x)[0], x, x)[0]

    f = bare if where == "around" else attend
    x = random(2, 6, 8)
    # AOTAutograd traces the backward pass under the autocast around it, whatever the forward pass switched off
    options = {} if where == "switched off inside" else {"finish": aot_eager}
    run, planned = compiled(f, **options)

    def around(f: Callable) -> Callable:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=where != "inside")(f)

    expected, got = (outcome(around(call), model, [x], True) for call in (f, run))
    assert verdicts(planned) == ["rewritten"] * 2
    dtype, tolerance = (torch.float32, 1e-5) if where == "switched off inside" else (torch.bfloat16, 2**-5)
    assert got[0].dtype == planned[1][0].spec.dtype == dtype
    graph = planned[0][0].graph_module.graph
    assert torch.Tensor.to not in [node.target for node in graph.nodes]  # the dtypes in the graph are known to be right
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b, tolerance)


# ---- masks -------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Self attention of 8 tokens under a mask that is made inside."""

    def __init__(self, make: Callable[[torch.Tensor], Any], **options: Any) -> None:
        super().__init__()
        self.make, self.options = make, options
        self.attention = filled(nn.MultiheadAttention(8, 2, batch_first=True))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        mask = self.make(x)
        return self.attention(x, x, x, attn_mask=mask, key_padding_mask=hidden, **self.options)[0]


UPPER = lambda x: torch.ones(8, 8, dtype=torch.bool).triu(1)  # noqa: E731
CAUSAL_MASKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "bool": (UPPER, {}),
    "float": (lambda x: causal_mask(8), {"need_weights": False}),
    "hint": (lambda x: causal_mask(x.shape[1]), {"need_weights": False, "is_causal": True}),
    "hint and weights": (lambda x: causal_mask(8), {"is_causal": True}),
    "by index": (lambda x: torch.arange(8) > torch.arange(8)[:, None], {}),
    "per head": (lambda x: UPPER(x).expand(4, 8, 8), {}),
    "in place": (lambda x: torch.full((8, 8), -math.inf).triu_(1), {}),
    "in place twice": (lambda x: torch.full((8, 8), -math.inf).triu_(1).masked_fill_(UPPER(x), -math.inf), {}),
}


@pytest.mark.parametrize("name", CAUSAL_MASKS)
def test_causal_masks_are_proven(name: str) -> None:
    make, options = CAUSAL_MASKS[name]
    model, x = Masked(make, **options), random(2, 8, 8)
    run, planned = compiled(model, CAUSAL, fullgraph=True)
    for a, b in zip(outcome(run, model, [x], True), outcome(model, model, [x], True), strict=True):
        assert_same(a, b)
    assert verdicts(planned) == ["rewritten"] and planned[0][0].spec.mask == Mask(causal=True)
    run, planned = compiled(model)
    assert_same(run(x), model(x))
    assert verdicts(planned) == ["refused"] and "it is causal" in planned[0][1].reason


def test_causal_masks_and_padding() -> None:
    """Rows of padded tokens are zero before the output projection, as everywhere in this package."""
    model, x, hidden = Masked(UPPER, need_weights=False), random(2, 8, 8), padded([8, 5], 8, "right")
    run, planned = compiled(model, CAUSAL)
    got, expected = run(x, hidden), model(x, hidden)
    assert verdicts(planned) == ["rewritten"] and planned[0][0].spec.mask == Mask(causal=True, padding=True)
    assert_same(got[~hidden], expected[~hidden])
    targets = [node.target for node in planned[0][0].graph_module.graph.nodes]
    assert torch.triu not in targets and targets.count("masked_fill_") == 1  # the mask is gone, the padding is read


def written_later(x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(8, 8)
    filled = mask.masked_fill_(UPPER(x), -math.inf)
    mask[0, 5] = 0.0
    return filled


def seen_before_it_is_filled(x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(8, 8)
    seen = mask[:]
    mask.masked_fill_(UPPER(x), -math.inf)
    return seen


def of_unknown_numbers(x: torch.Tensor) -> torch.Tensor:
    return (x[0] * 0.0).masked_fill_(UPPER(x), -math.inf)


REFUSED_MASKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any], str]] = {
    "wrong hint": (lambda x: torch.zeros(8, 8), {"need_weights": False, "is_causal": True}, "proven to be: none"),
    "hint of a window": (
        lambda x: UPPER(x) | torch.ones(8, 8, dtype=torch.bool).tril(-3),
        {"need_weights": False, "is_causal": True},
        "is_causal=True says that it is causal, but it is proven to be: causal, window 3",
    ),
    "values": (lambda x: x[0], {}, "it adds the values of"),
    "small": (lambda x: torch.zeros(8, 8).masked_fill_(UPPER(x), -1.0), {}, "it adds -1 to scores"),
    "written later": (written_later, {}, "modified in place"),
    "not zero": (of_unknown_numbers, {}, "modified in place"),
    "first head": (lambda x: UPPER(x) & (torch.arange(4) < 1)[:, None, None], {}, "which is no causal mask"),
    "per sequence": (lambda x: (x[..., None, 0] > 0).expand(-1, -1, 8).repeat_interleave(2, 0), {}, "not known"),
}


def test_a_view_of_a_mask_is_what_the_mask_has_become() -> None:
    model, x = Masked(seen_before_it_is_filled), random(2, 8, 8)
    run, planned = compiled(model, CAUSAL)
    assert_same(run(x), model(x))
    assert verdicts(planned) == ["rewritten"] and planned[0][0].spec.mask == Mask(causal=True)


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_masks_that_are_not_proven(name: str) -> None:
    make, options, reason = REFUSED_MASKS[name]
    model, x = Masked(make, **options), random(2, 8, 8)
    for policy in (CAUSAL, WHOLE):
        run, planned = compiled(model, policy)
        assert torch.equal(run(x).isnan(), model(x).isnan())
        assert_same(run(x).nan_to_num(), model(x).nan_to_num())
        assert verdicts(planned) == ["refused"] and reason in planned[0][1].reason, planned[0][1].reason


PADDINGS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str | None]] = {
    "bool": (lambda p: p, None),
    "filled": (lambda p: torch.zeros(2, 8).masked_fill(p, -math.inf), None),
    "where": (lambda p: torch.where(p, torch.finfo(torch.float32).min, 0.0), None),
    "in place": (lambda p: torch.zeros_like(p, dtype=torch.float32).masked_fill_(p, -math.inf), None),
    "number": (lambda p: p.float(), "a boolean one needs no proof"),
    "bias": (lambda p: torch.zeros(2, 8).masked_fill_(p, -2.0), "it adds -2 to scores"),
    "written": (lambda p: torch.zeros(2, 8).masked_fill_(p, -math.inf).mul_(0.5), None),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_paddings(name: str) -> None:
    make, reason = PADDINGS[name]
    model, x, hidden = nn.MultiheadAttention(8, 2, batch_first=True), random(2, 8, 8), padded([8, 5], 8, "left")

    def attend(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return model(x, x, x, key_padding_mask=make(hidden), need_weights=False)[0]

    run, planned = compiled(attend)
    assert_same(run(x, hidden), attend(x, hidden))
    assert verdicts(planned) == ["rewritten" if reason is None else "refused"]
    assert reason is None or reason in planned[0][1].reason


def test_a_mask_that_is_filled_into_the_users_tensor_is_refused() -> None:
    """What the tensor held before is not to be had where the site is."""

    def f(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return direct(x, attn_mask=hidden[0].masked_fill_(hidden[1], True).expand(8, 8))

    def of_a_copy(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        mask = hidden[0].clone().masked_fill(hidden[1], True).expand(8, 8)
        return direct(x, attn_mask=mask, key_padding_mask=torch.stack([hidden[1], hidden[0]]))

    x, hidden = random(8, 2, 8), padded([7, 5], 8, "right")
    for g, verdict in ((f, "refused"), (of_a_copy, "rewritten")):
        run, planned = compiled(g)
        assert_same(run(x, hidden.clone()), g(x, hidden.clone()))
        assert verdicts(planned) == [verdict]
        assert (verdict == "refused") == ("modified in place" in planned[0][1].reason)


def test_with_one_head_a_mask_per_sequence_may_be_a_padding() -> None:
    model, x, hidden = nn.MultiheadAttention(8, 1, batch_first=True), random(2, 8, 8), padded([8, 5], 8, "left")

    def attend(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return model(x, x, x, attn_mask=hidden[:, None].expand(-1, 8, -1))[0]

    run, planned = compiled(attend)
    assert_same(run(x, hidden), attend(x, hidden))
    assert verdicts(planned) == ["rewritten"] and planned[0][0].spec.mask == Mask(padding=True)


def test_what_a_mask_is_filled_into_stays_if_it_is_used() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)

    def attend(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(8, 8)
        return model(x, x, x, attn_mask=mask.masked_fill_(UPPER(x), -math.inf))[0], mask

    run, planned = compiled(attend, CAUSAL)
    got, mask = run(random(2, 8, 8))
    assert verdicts(planned) == ["rewritten"] and torch.equal(mask, causal_mask(8))
    assert_same(got, attend(random(2, 8, 8))[0])


def test_a_mask_that_is_read_off_a_rewritten_layer() -> None:
    model = filled(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), torch.float64).eval()
    x = random(2, 8, 8, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        x = model(x.relu())
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=(x[:, :, 0] != 0)[:, None, None])

    with torch.no_grad():
        run, planned = compiled(f, fullgraph=True)
        assert_same(run(x), f(x))
    assert verdicts(planned) == ["rewritten"] * 2
    assert planned[1][0].padding.terms[0].node is planned[0][0].node  # which is gone by then


# ---- what is refused ---------------------------------------------------------------------------------------------


def direct(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """The function without a module, on ``[L, B, 8]``."""
    weights = (IN_WEIGHT, None, None, None, False, 0.0, OUT_WEIGHT, None)
    return F.multi_head_attention_forward(x, x, x, 8, 2, *weights, **options)[0]


def with_weights(x: torch.Tensor) -> torch.Tensor:
    out, weights = nn.MultiheadAttention.forward(ATTENTION, x, x, x)
    return out + weights.sum()


IN_WEIGHT, OUT_WEIGHT, STATIC = random(24, 8, seed=3), random(8, 8, seed=4), random(4, 6, 4, seed=5)
ATTENTION = nn.MultiheadAttention(8, 2)
REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "weights": (with_weights, "its attention weights are used; need_weights=False gives its output alone"),
    "static_k": (lambda x: direct(x, static_k=STATIC), "given after projection (static_k)"),
    "static_v": (lambda x: direct(x, static_v=STATIC), "given after projection (static_v)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_attention_is_refused(name: str) -> None:
    f, reason = REFUSED[name]
    site = only(f, random(6, 2, 8))
    assert site.form == "multi_head_attention_forward" and reason in site.refusal and site.spec is None
    before = site.graph_module.code
    ((_, plan),) = rewrite_graph(site.graph_module, WHOLE)
    assert (plan.verdict, plan.method) == ("refused", "exact") and reason in plan.reason
    assert site.graph_module.code == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
        ({"dropout": 0.25}, "it drops attention weights (dropout_p=0.25); call model.eval()"),
    ],
)
def test_options_of_the_module_that_are_refused(options: dict[str, Any], reason: str) -> None:
    model, x = nn.MultiheadAttention(8, 2, **options), random(6, 2, 8)
    (site,) = explain(lambda x: model(x, x, x)[0], x, methods=["thinformer"]).sites
    assert site.verdict == "refused" and reason in site.reason
    model.eval()
    (site,) = explain(lambda x: model(x, x, x)[0], x, methods=["thinformer"]).sites
    assert site.verdict == ("rewritten" if "dropout" in options else "refused")


def test_graphs_that_dynamo_does_not_make_are_refused() -> None:
    gm = capture(lambda x: direct(x), random(6, 2, 8))
    node = next(node for node in gm.graph.nodes if node.target is F.multi_head_attention_forward)
    (site,) = find_sites(gm)
    assert site.refusal is None
    x, example_value = node.args[0], node.args[0].meta["example_value"]
    x.meta["example_value"] = torch.zeros(6, 2, 8).to_sparse()
    assert "nested or sparse tensor; enable_nested_tensor=False" in find_sites(gm)[0].refusal
    x.meta["example_value"] = example_value
    for position, reason in ((0, "its query is not a tensor"), (4, "its num_heads is not known")):
        kept, node.args = node.args, (*node.args[:position], None, *node.args[position + 1 :])
        assert reason in find_sites(gm)[0].refusal
        node.args = kept
    node.kwargs = {"training": None}
    assert "its training is not known when compiling" in find_sites(gm)[0].refusal
    node.kwargs = {}
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = ((node,),)
    assert "passed on as one tuple" in find_sites(gm)[0].refusal


# ---- opened up, before anything is replaced -----------------------------------------------------------------------

OPENED: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "plain": lambda p: {},
    "bool padding": lambda p: {"key_padding_mask": p},
    "float padding": lambda p: {"key_padding_mask": torch.zeros(2, 8).masked_fill(p, -math.inf)},
    "bool mask": lambda p: {"attn_mask": UPPER(p)},
    "per head": lambda p: {"attn_mask": UPPER(p).expand(4, 8, 8)},
    "both": lambda p: {"attn_mask": causal_mask(8), "key_padding_mask": torch.where(p, -math.inf, 0.0)},
    "hint": lambda p: {"attn_mask": causal_mask(8), "is_causal": True},
}


def opened(f: Callable, *inputs: Any) -> tuple[list[torch.fx.GraphModule], torch.Tensor]:
    """The graph of ``f`` with its site opened up and SDPA still in it, and the result of that."""
    results: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        (site,) = find_sites(gm)
        assert site.refusal is None and site.spec.mask.unknown is None
        inner, _ = _expand(site)
        assert inner.node.target is F.scaled_dot_product_attention and inner.query is inner.node.args[0]
        assert inner.query.meta["stack_trace"] == site.node.meta["stack_trace"]
        gm.graph.lint()
        gm.recompile()
        results.append(gm)
        return gm

    torch._dynamo.reset()
    return results, torch.compile(f, backend=backend, fullgraph=True)(*inputs)


@pytest.mark.parametrize("name", OPENED)
def test_opened_up_means_the_same(name: str) -> None:
    hidden, x = padded([8, 5], 8, "right"), random(8, 2, 8)
    f = lambda x, p: direct(x, need_weights=False, **OPENED[name](p))  # noqa: E731
    (gm,), got = opened(f, x, hidden)
    assert_same(got, f(x, hidden))
    assert F.multi_head_attention_forward not in [node.target for node in gm.graph.nodes]
    if name != "plain":
        assert (direct(x, need_weights=False) - got).abs().max() > 1e-3


# ---- nn.TransformerEncoderLayer ----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    norm_first=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    batch_first=st.booleans(),
    bias=st.booleans(),
    heads=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 9),
    side=st.sampled_from([None, "left", "right"]),
    mode=st.sampled_from(["no_grad", "eval", "train"]),
)
@example(True, "gelu", True, True, 2, 7, "left", "no_grad")
@example(False, "relu", True, True, 2, 7, "right", "no_grad")
def test_encoder_layer(norm_first, activation, batch_first, bias, heads, length, side, mode) -> None:
    model = nn.TransformerEncoderLayer(
        8, heads, 12, 0.0, activation, 0.01, batch_first=batch_first, norm_first=norm_first, bias=bias
    )
    filled(model).train(mode == "train")
    x = random(*((2, length, 8) if batch_first else (length, 2, 8)))
    hidden = [] if side is None else [padded([length, max(1, length - 3)], length, side)]
    f = lambda x, hidden=None: model(x, src_key_padding_mask=hidden)  # noqa: E731
    ((site, _),) = assert_equal_to_module(f, model, [x, *hidden], mode != "no_grad")
    fused = mode == "no_grad" and batch_first and bias and heads != 1
    assert site.form == OPAQUE[fused] and site.spec.mask == Mask(padding=side is not None)
    assert (site.module == "model") == fused and (site.module == "model.self_attn") != fused


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_fused_layer_with_a_small_budget(norm_first: bool) -> None:
    METHODS.load()
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True, norm_first=norm_first))
    model = filled(model, torch.float64).eval()
    x, layer = random(2, 70, 16).double(), model[0]

    def attend(x: torch.Tensor) -> torch.Tensor:
        m = layer.self_attn
        return m.out_proj(op(*F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1), None, 2, "0"))

    with torch.no_grad():
        run, planned = compiled(model, FEW)
        got, exact = run(x), model(x)
        if norm_first:
            hand = x + attend(layer.norm1(x))
            hand = hand + layer.linear2(F.gelu(layer.linear1(layer.norm2(hand))))
        else:
            hand = layer.norm1(x + attend(x))
            hand = layer.norm2(hand + layer.linear2(F.gelu(layer.linear1(hand))))
    assert verdicts(planned) == ["rewritten"] and planned[0][0].form == "_transformer_encoder_layer_fwd"
    assert_same(got, hand, 1e-10)
    assert (got - exact).abs().max() > 0.003 * exact.abs().max()


@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_layers_keep_their_layout(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first).eval()
    f = lambda x: model(x.transpose(0, 1))  # noqa: E731
    with torch.no_grad():
        run, planned = compiled(f)
        assert run(random(7, 2, 8)).stride() == f(random(7, 2, 8)).stride() == (56, 8, 1)
    assert verdicts(planned) == ["rewritten"]


class Kept(nn.Module):
    """A layer with its mask in a buffer, as CLIP's text towers have it."""

    def __init__(self, layer: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False, attn_mask=self.mask[: x.shape[1], : x.shape[1]])[0]
        return self.layer(x, self.mask)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True),
}
KEPT: dict[str, tuple[torch.Tensor, str]] = {
    "of minus infinity": (torch.full((8, 8), -math.inf).triu(1), "causal"),
    "of booleans": (torch.ones(8, 8, dtype=torch.bool).triu(1), "causal"),
    "of -1e9": (torch.full((8, 8), -1e9).triu(1), "causal"),
    "of other numbers": (torch.full((8, 8), -5.0).triu(1), "unknown"),
    "with a hole": (torch.full((8, 8), -math.inf).triu(1).index_fill(1, torch.tensor([3]), 0.0), "unknown"),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mask", KEPT)
def test_masks_that_are_kept_in_buffers(layer: str, mask: str, gradients: bool) -> None:
    kept, words = KEPT[mask]
    model, x = Kept(filled(LAYERS[layer]()).eval(), kept), random(2, 8, 8)
    with torch.set_grad_enabled(gradients):
        (site,) = explain(model, x, methods=["express"], budget=64).sites
        assert site.mask.split(" ")[0] == words and site.verdict == ("rewritten" if words == "causal" else "refused")
        assert " 'mask'," in site.mask or words == "causal" or "it adds -5 to scores" in site.mask
        torch._dynamo.reset()
        run = torch.compile(model, backend="express", options={"methods": ["express"], "budget": 64})
        if mask == "of minus infinity" and layer == "attention":
            assert_same(run(x), model(x))


def test_masks_of_fused_layers() -> None:
    model = filled(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)).eval()
    x, hidden = random(2, 8, 8), padded([8, 5], 8, "right")
    with torch.no_grad():
        for p in (None, hidden):
            f = lambda x, p: model(x, src_mask=UPPER(x), src_key_padding_mask=p)  # noqa: E731
            run, planned = compiled(f, CAUSAL)
            got, expected = run(x, p), f(x, p)
            assert verdicts(planned) == ["rewritten"] and planned[0][0].form == OPAQUE[1]
            assert planned[0][0].spec.mask == Mask(causal=True, padding=p is not None)
            real = torch.ones(2, 8, dtype=torch.bool) if p is None else ~p
            assert_same(got[real], expected[real])
            _, got = opened(f, x, p)
            assert_same(got, expected)
        f = lambda x: model(x, src_mask=x[0] > 0)  # noqa: E731
        assert "not known when compiling" in only(f, x).spec.mask.unknown
        gm = capture(model, x)
        (node,) = (node for node in gm.graph.nodes if node.target is torch._transformer_encoder_layer_fwd)
        node.args = (*node.args[:18], node.args[0], 7)
        assert find_sites(gm)[0].refusal == "its mask is of the unknown type 7"


def test_a_fused_layer_under_autocast_keeps_the_dtype_that_dynamo_expects() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).eval()

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(model(x))

    x = random(2, 8, 8)
    run, planned = compiled(f, finish=aot_eager)
    torch._dynamo.reset()
    with torch.no_grad():
        got = run(x)
        plain = torch.compile(f, backend=aot_eager)(x)
    assert verdicts(planned) == ["rewritten"] * 2 and planned[0][0].form == OPAQUE[1]
    assert_same(got, plain, 2**-5)


# ---- models, through the front door ------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    return filled(nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), **options))


PADDED = padded([20, 13, 1], 20, "left")  # on the right, torch itself would make nested tensors of it


@pytest.mark.parametrize("mode", ["no_grad", "train"])
def test_transformer_encoder(mode: str) -> None:
    model, x = encoder().train(mode == "train"), random(3, 20, 16)
    f = lambda x: model(x, src_key_padding_mask=PADDED)  # noqa: E731
    planned = assert_equal_to_module(f, model, [x], mode == "train", sites=2, finish=aot_eager)
    paths = [f"layers.{i}" + ".self_attn" * (mode == "train") for i in (0, 1)]
    assert [site.module for site, _ in planned] == [f"model.{path}" for path in paths]
    with torch.no_grad():
        few, _ = compiled(f, FEW)
        assert (few(x) - f(x)).abs().max() > 0.01
    report = explain(model, x, example_kwargs={"src_key_padding_mask": PADDED}, methods=["thinformer"])
    assert [site.module for site in report.sites] == paths
    assert {(site.verdict, site.mask) for site in report.sites} == {("rewritten", "key padding")}


@pytest.mark.parametrize("canonical", ["in every layer", "once", "and a mask"])
def test_checkpointed_layers(canonical: str) -> None:
    """The float mask is made inside the checkpointed body, or outside and handed in, as are keys that no one sees."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = encoder().layers

        def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            mask = None
            if canonical == "and a mask":
                mask = torch.zeros(20, 20).masked_fill_(hidden[1].expand(20, 20), -math.inf)
            if canonical != "in every layer":
                hidden = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -math.inf)
            for layer in self.layers:
                x = checkpoint(layer, x, mask, hidden, use_reentrant=False)
            return x

    model = Net()
    planned = assert_equal_to_module(lambda x: model(x, PADDED), model, [random(3, 20, 16)], True, sites=2)
    assert len({site.graph_module for site, _ in planned}) == 2
    padding = planned[0][0].padding
    assert (padding.last_row is not None) == (canonical == "and a mask") and len(padding.terms) == 1


def test_the_backend() -> None:
    """The whole chain, inductor included; ``strict`` raises unless every site is rewritten or exact by choice."""
    model, x = encoder().layers[0].eval(), random(3, 20, 16)
    f = lambda x: model(x, src_key_padding_mask=PADDED)  # noqa: E731
    options = {"methods": ["thinformer"], "budget": 1024, "strict": True}
    with torch.no_grad():
        assert_same(torch.compile(f, backend="express", options=options, fullgraph=True)(x), f(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer_decoder(dtype: torch.dtype) -> None:
    """Causal self attention goes to one method, cross attention to the other; no less exact than torch's bfloat16."""
    layer = nn.TransformerDecoderLayer(16, 2, 24, 0.0, batch_first=True)
    model = filled(nn.TransformerDecoder(layer, 1), dtype)
    inputs = [random(2, 18, 16, dtype=dtype), random(2, 14, 16, seed=1, dtype=dtype)]

    def f(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return model(x, memory, tgt_mask=causal_mask(18, dtype=x.dtype), tgt_is_causal=True)

    run, planned = compiled(f, Policy(methods=("express", "thinformer"), budget=64), aot_eager, fullgraph=True)
    got, expected = (outcome(call, model, inputs, True) for call in (run, f))
    model.double()
    exact = outcome(f, model, [x.double() for x in inputs], True)
    for a, b, truth in zip(got, expected, exact, strict=True):
        assert a.dtype == dtype
        tolerance = 2 * (b - truth).abs().max() / truth.abs().max()
        assert_same(a.double(), truth, max(tolerance.item(), 1e-5))
    assert [(site.module, plan.method) for site, plan in planned] == [
        ("model.layers.0.self_attn", "express"),
        ("model.layers.0.multihead_attn", "thinformer"),
    ]


def test_nested_tensors_stay_with_torch_and_there_is_a_way_out() -> None:
    x, hidden = random(2, 8, 16), padded([8, 5], 8, "right")
    with torch.no_grad():
        nested = encoder(mask_check=False).eval()
        run, planned = compiled(nested)
        assert_same(run(x, None, hidden), nested(x, None, hidden))
        assert planned == []
        plain = encoder(enable_nested_tensor=False).eval()
        run, planned = compiled(plain, fullgraph=True)
        assert_same(run(x, None, hidden), plain(x, None, hidden))
        assert verdicts(planned) == ["rewritten"] * 2


def test_describing_changes_nothing() -> None:
    model = encoder().eval()
    x, hidden = random(2, 8, 16), padded([8, 5], 8, "right")
    with torch.no_grad():
        gm = capture(model, x, None, hidden)
    before = (gm.code, len(gm.graph.nodes))
    sites = find_sites(gm)
    assert (gm.code, len(gm.graph.nodes)) == before
    assert [(site.module, site.index, site.layer) for site in sites] == [
        (f"layers.{i}", 0, layer_key(f"layers.{i}", 0)) for i in (0, 1)
    ]
    long = Policy(methods=("thinformer",), min_length=100)
    assert verdicts(rewrite_graph(gm, long)) == ["exact"] * 2 and gm.code == before[0]
