"""Attention that a graph break cuts is listed once, whatever Dynamo captures of it; what is no attention is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from express_compile import explain
from express_compile.core.sites import SiteReport, record_sites
from express_compile.passes.cut import _calls_softmax
from express_compile.routes.eager import rewrite_attention

B, H, L, D = 2, 4, 12, 8
COUNT = torch.tensor(5)
UNCOMPILED, INPUT = "a graph break parts its query-key product from its softmax", "its scores are an input of the graph"

AFTER = "a graph break parts its softmax from its product with the values"


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, L, D, generator=generator) for _ in range(3)]


def sites(f: Callable[..., Any], *inputs: torch.Tensor, **policy: Any) -> tuple[SiteReport, ...]:
    torch.compiler.reset()
    return explain(f, *inputs, **policy).sites


# -- programs: (q, k, v, count) -> output ------------------------------------------------------------------------


def sliced_bias(q, k, v, count):
    s = torch.matmul(q, k.transpose(-1, -2)) * 0.5
    bias = torch.arange(3.0 * L)[max(0, count) :][:L]
    return torch.matmul(F.softmax(s + bias, dim=-1), v)


def einsum_of_three(q, k, v, count):
    s = torch.einsum("bqd,bkd->bqk", q[0], k[0])
    bias = torch.arange(3.0 * L)[count + 1 :][:L]
    return (s + bias).softmax(-1) @ v[0]


def two_terms(q, k, v, count):
    s = q @ k.mT + (q * 2) @ k.permute(0, 1, 3, 2)
    bias = torch.arange(3.0 * L)[max(0, count) :][:L]
    return (s + bias).softmax(-1) @ v


def in_try(q, k, v, count):
    s = (q @ k.mT).reshape(B * H, L, L)
    try:
        n = count.item()
    finally:
        s = s.view(B, H, L, L)
    return torch.softmax(s * n, -1) @ v


def item(q, k, v, count):
    s = q @ k.mT
    return (s * count.item()).softmax(-1) @ v


def branch(q, k, v, count):
    s = (q @ k.mT).masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    if count > 3:
        s = s / 2
    return F.dropout(s.softmax(-1), 0.0) @ v


def plain_break(q, k, v, count):
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    torch._dynamo.graph_break()
    return torch.einsum("bqk,bkd->bqd", s.softmax(-1), v.flatten(0, 1))


def break_after(q, k, v, count):
    w = (q @ k.mT / 3).masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf).softmax(-1)
    torch._dynamo.graph_break()
    return w @ v


def sampled(q, k, v, count):
    """Queries are chosen by their weights: ATS."""
    w = F.dropout(torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), 0.0)
    kept = torch.unique(w[:, :, 0].sum(1).argsort(-1)[:, :3])
    return w[:, :, kept] @ v


def branch_after(q, k, v, count):
    w = F.softmax(q @ k.mT, -1).clone()
    if count > 3:
        w = w / 2
    return torch.matmul(w, v)


CUT = {
    "sliced bias": (sliced_bias, UNCOMPILED),
    "einsum": (einsum_of_three, UNCOMPILED),
    "two terms": (two_terms, UNCOMPILED),
    "in a try": (in_try, UNCOMPILED),
    "item": (item, INPUT),
    "branch": (branch, INPUT),
    "a break alone": (plain_break, INPUT),
    "a break after": (break_after, AFTER),
    "sampled by weights": (sampled, AFTER),
    "a branch after": (branch_after, AFTER),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_attention_is_listed_once(name: str) -> None:
    f, words = CUT[name]
    (site,) = sites(f, *tensors(), COUNT, methods=["exact"])
    assert (site.form, site.verdict, site.method) == ("softmax", "refused", "exact")
    assert site.reason.startswith(words) and "TORCH_LOGS=graph_breaks" in site.nearest
    start = f.__code__.co_firstlineno
    assert start < int(site.source.rpartition(":")[2]) <= start + 6


def test_the_reason_names_the_line_from_which_it_runs_uncompiled() -> None:
    (site,) = sites(sliced_bias, *tensors(), COUNT)
    assert site.reason == f"{UNCOMPILED}: 'sliced_bias' runs uncompiled from line {bias_line()} on"


def bias_line() -> int:
    return sliced_bias.__code__.co_firstlineno + 2


@pytest.mark.parametrize("f", [sliced_bias, einsum_of_three])
def test_what_the_refusal_proposes_helps(f: Callable[..., Any]) -> None:
    """The bias is sliced at a number that is not known when compiling, and all of it is rewritten."""
    inputs = (*tensors(), COUNT)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert [site.verdict for site in sites(f, *inputs, methods=["exact"])] == ["rewritten"]
        torch.compiler.reset()
        g = torch.compile(f, backend="express", options={"methods": ["exact"], "strict": True})
        assert (g(*inputs) - f(*inputs)).norm() < 1e-6 * f(*inputs).norm()


def test_keys_of_a_number_that_is_not_known() -> None:
    def f(q, k, v, count):
        n = (count + 2).item()
        return (q @ k[:, :, :n].mT).softmax(-1) @ v[:, :, :n]

    inputs = (*tensors(), COUNT)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for options in (
            {"methods": ["exact"]},
            *({"methods": [x, "exact"], "budget": 64} for x in ("thinformer", "santa")),
        ):
            (site,) = sites(f, *inputs, **options)
            assert site.verdict == "rewritten" and "Lk=u" in site.shape, site


# -- what is no attention ----------------------------------------------------------------------------------------


def similarity(q, k, v, count):
    s = q @ k.mT
    return s[..., max(0, count) :].amax(-1).sum()


def contrast(q, k, v, count):
    s = q @ k.mT
    return F.log_softmax(s[..., max(0, count) :], -1).sum()


def classifier(q, k, v, count):
    out = q @ k.mT @ v
    return out[..., max(0, count) :].softmax(-1)


def whole_and_scores(q, k, v, count):
    """Scores that leave the graph beside the attention they belong to."""
    s = q @ k.mT
    out = s.softmax(-1) @ v
    return out[..., max(0, count) :], s.softmax(-1)


def retrieval(q, k, v, count):
    """Weights that are looked at, and of which the graph breaks when they are used up."""
    best = (q @ k.mT).softmax(-1).amax(-1)
    torch._dynamo.graph_break()
    return best + 1


def gate(q, k, v, count):
    shares = F.linear(q, k[0, 0]).softmax(-1)
    torch._dynamo.graph_break()
    return shares[..., :D] * v


def one_matrix(q, k, v, count):
    s = q[0, 0] @ k[0, 0].mT
    return s[:, max(0, count) :].softmax(-1)


def router(q, k, v, count):
    logits = F.linear(q.flatten(0, 2), k[0, 0])
    torch._dynamo.graph_break()
    return logits.softmax(-1) @ v[0, 0]


def routers_of_a_batch(q, k, v, count):
    logits = F.linear(q, k[0, 0]) * 2
    torch._dynamo.graph_break()
    return logits.softmax(-1) @ v[0, 0]


def weights_last(q, k, v, count):
    s = q @ k.mT
    torch._dynamo.graph_break()
    return v.mT @ s.softmax(-1)


OTHERS = {f.__name__: f for f in (similarity, contrast, classifier, one_matrix, router, routers_of_a_batch)}
OTHERS |= {f.__name__: f for f in (retrieval, gate)}
OTHERS |= {weights_last.__name__: weights_last}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_is_not_listed(name: str) -> None:
    assert sites(OTHERS[name], *tensors(), COUNT) == ()


def whole_and_weights(q, k, v, count):
    """Weights that leave the graph beside the values that they weigh."""
    w = (q @ k.mT).softmax(-1)
    out = w @ v
    torch._dynamo.graph_break()
    return out, w + 1


@pytest.mark.parametrize("f", [whole_and_scores, whole_and_weights])
def test_attention_beside_its_scores_or_weights_is_one_site(f: Callable[..., Any]) -> None:
    (site,) = sites(f, *tensors(), COUNT, methods=["exact"])
    assert "parts" not in site.reason


class Mix(nn.Module):
    """Learned weights of layers, which are an input of the graph, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(H))

    def forward(self, layers: torch.Tensor) -> torch.Tensor:
        return self.weights.softmax(-1) @ layers


def test_learned_weights_are_no_attention() -> None:
    layers = torch.randn(H, L, generator=torch.Generator().manual_seed(0))
    assert sites(Mix(), layers) == ()


def test_the_softmax_is_looked_for_in_the_rest_of_the_function() -> None:
    source = (
        "def f(s):\n    w = s.softmax(-1)\n    s = s[n:]\n    return F.relu(s)\n\ndef g(s):\n    return F.softmax(s)\n"
    )
    assert [_calls_softmax(source, line) for line in range(1, 8)] == [True, True, False, False, False, True, True]
    assert not _calls_softmax("def f(", 1) and not _calls_softmax("", 3)
    assert not _calls_softmax("def f(s):\n    return softmax, s.log_softmax(-1)\n", 2)
    assert _calls_softmax("def f(s):\n    return self.attn_softmax(s)\n", 2)


# -- the ways in -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return sliced_bias(q, k, v, count)


def test_strict_compiling_fails_with_the_reason() -> None:
    g = torch.compile(sliced_bias, backend="express", options={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=UNCOMPILED):
        g(*tensors(), COUNT)


def test_a_rewritten_model_says_so_and_computes_the_same() -> None:
    inputs = (*tensors(), COUNT)
    model = rewrite_attention(Attention(), methods=["exact"])
    with torch.no_grad(), record_sites() as found:
        assert torch.equal(model(*inputs), sliced_bias(*inputs))
    assert [(site.verdict, site.reason.startswith(UNCOMPILED)) for site in found] == [("refused", True)]
