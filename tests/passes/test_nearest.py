"""The nearest supported form of a refused site: what the hint says is rewritten, and gives the same where it may."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from express_compile import explain
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.sites import SiteReport
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.passes.site import PADDED
from express_compile.passes.symbolic import PROVABLE
from express_compile.planning.choose import plan
from express_compile.report.explain import Report

L = 24
Q = torch.randn(2, 4, L, 8, generator=torch.Generator().manual_seed(0))
SEEN = torch.ones(L, L, dtype=torch.bool).tril()
GAIN = torch.linspace(0.5, 1.5, L)[:, None]
BY_METHOD = {
    "express": {"methods": ("express",), "budget": 16},
    "thinformer": {"methods": ("thinformer",), "budget": 32},
}


def hand(
    q: torch.Tensor,
    of_scores: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
    of_weights: Callable[[torch.Tensor], torch.Tensor] = lambda p: p,
) -> torch.Tensor:
    return of_weights(of_scores(q @ q.mT).masked_fill(torch.ones(L, L).triu(1) == 1, -math.inf).softmax(-1)) @ q


def weights_too(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = (q @ q.mT).masked_fill(torch.ones(L, L).triu(1) == 1, -math.inf).softmax(-1)
    return p @ q, p


def sinks(q: torch.Tensor) -> torch.Tensor:
    return torch.cat([q @ q.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ q


def written_mask(q: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(L, L)
    mask[:, 1:].masked_fill_(torch.ones(L, L).triu(1)[:, 1:] == 1, -math.inf)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def made_mask(q: torch.Tensor) -> torch.Tensor:
    mask = torch.where(torch.ones(L, L).triu(1) == 1, -math.inf, 0.0)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Kept(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("SEEN", SEEN.clone())

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.SEEN.float().log())


def packed(q: torch.Tensor) -> torch.Tensor:
    segments = (q[0, 0, :, 0] > 99).cumsum(0)
    mask = (segments[:, None] == segments) & (torch.arange(L) <= torch.arange(L)[:, None])
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


# a refused program, its hint, the program that the hint means, its method, and whether both compute the same
HINTS: dict[str, tuple[Callable, str, Callable, str, bool]] = {
    "weights are returned": (weights_too, "the output alone", lambda q: weights_too(q)[0], "express", True),
    "soft-cap": (lambda q: hand(q, lambda s: 5 * torch.tanh(s / 5)), "scores without a cap", hand, "express", False),
    "clamp": (lambda q: hand(q, lambda s: s.clamp(-1e4, 1e4)), "scores that are not clamped", hand, "express", True),
    "sinks": (sinks, "a softmax over the keys alone", lambda q: (q @ q.mT).softmax(-1) @ q, "thinformer", False),
    "scaled by a tensor": (
        lambda q: hand(q, lambda s: s * GAIN.mT),
        "a query or a key that is multiplied by it",
        lambda q: (q @ (q * GAIN).mT).masked_fill(torch.ones(L, L).triu(1) == 1, -math.inf).softmax(-1) @ q,
        "express",
        True,
    ),
    "filled with too little": (
        lambda q: (q @ q.mT).masked_fill(torch.ones(L, L).triu(1) == 1, -1e4).softmax(-1) @ q,
        "float('-inf')",
        hand,
        "express",
        True,
    ),
    "a mask that is written": (written_mask, "a mask that torch.where makes", made_mask, "express", True),
    "a mask that a user made": (
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=SEEN.clone().logical_and(Q[0, 0, :1, :1] < 9)),
        PROVABLE,
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "express",
        True,
    ),
    "a mask that is kept": (
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=SEEN.float().log()),
        "'SEEN' as a buffer, whose values are read when compiling: self.register_buffer('SEEN', ...)",
        Kept(),
        "express",
        True,
    ),
    "a bias that is kept": (
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=SEEN.float().log() + GAIN.mT),
        PROVABLE,
        Kept(),
        "express",
        False,
    ),
    "another method": (
        lambda q: F.scaled_dot_product_attention(q, q, q),
        "methods=['thinformer'], which takes it as it is",
        lambda q: F.scaled_dot_product_attention(q, q, q),
        "thinformer",
        True,
    ),
    "packed": (
        packed,
        "a padded batch with a sequence per row",
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "express",
        True,
    ),
    "dropout": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.5),
        "the same without dropout",
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "express",
        False,
    ),
    "rounded weights": (
        lambda q: (q @ q.mT).softmax(-1).bfloat16().to(q.dtype) @ q,
        "both in torch.float32",
        lambda q: (q @ q.mT).softmax(-1) @ q,
        "thinformer",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_what_the_hint_says_is_rewritten(name: str) -> None:
    refused, hint, hinted, method, same = HINTS[name]
    asked = {"methods": ("express",), "budget": 16} if name == "another method" else BY_METHOD[method]
    (site,) = explain(refused, Q, **asked).sites
    assert site.verdict == "refused" and site.nearest.startswith(hint), site
    (site,) = explain(hinted, Q, **BY_METHOD[method]).sites
    assert (site.verdict, site.method, site.nearest) == ("rewritten", method, ""), site
    outputs = [out[0] if isinstance(out, tuple) else out for out in (refused(Q), hinted(Q))]
    assert torch.allclose(*outputs, atol=1e-5) == same


def spec(mask: Mask, **others: float) -> AttentionSpec:
    sizes = dict(B=1, H=2, H_kv=2, Lq=512, Lk=512, D=8, Dv=8)
    return AttentionSpec(**sizes, dtype=torch.float32, device="cpu", scale=1.0, mask=mask, **others)


def test_where_there_is_no_hint_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    METHODS.load()  # those of other tests left out: they would take what ours do not
    monkeypatch.setattr(METHODS, "_methods", {name: METHODS[name] for name in METHODS.shipped})
    express = Policy(methods=("express", "thinformer"), budget=16)
    for mask in (Mask(causal=True, window=8), Mask(window=8), Mask(unknown="why"), Mask(causal=True, offset=3)):
        decision = plan(spec(mask), express)
        assert (decision.verdict, decision.nearest) == ("refused", None)
    # nor where two things stand in the way, of which the hint would take away one
    assert plan(spec(Mask(causal=True, window=8), dropout_p=0.1), express).nearest is None
    assert plan(spec(Mask(window=8, segments=True)), express).nearest is None
    # and none where nothing was refused
    assert plan(spec(Mask(causal=True)), express).nearest is None
    assert plan(spec(Mask(unknown="why", nearest="that")), Policy()).nearest == "that"
    # a policy that another method cannot read: SANTA takes no such budget
    assert plan(spec(Mask(causal=True, window=8)), Policy(methods=("express",), budget=1 << 30)).nearest is None


def test_the_table_has_a_column_for_it_where_there_is_one() -> None:
    plain = SiteReport("m", "", "sdpa", "none", "exact", "refused", "why")
    assert "nearest" not in str(Report((plain,)))
    hinted = SiteReport("m", "", "sdpa", "none", "exact", "refused", "why", nearest=PADDED)
    assert "nearest supported form" in str(Report((plain, hinted))) and PADDED in str(Report((hinted,)))
    assert f'"nearest": "{PADDED}"' in Report((hinted,)).to_json()
