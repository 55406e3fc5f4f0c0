"""Attention that is written out: every spelling is found, proven and equal; what is not attention alone says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from express_compile import explain, record_sites, rewrite_attention
from express_compile.core.policy import Policy
from express_compile.passes.buffers import Buffers
from express_compile.passes.match import find_sites
from express_compile.passes.pipeline import plan_sites
from express_compile.passes.rewrite import rewrite

B, H, L, D = 2, 4, 12, 8
EXACT = Policy(methods=("exact",), strict=True)
LOWEST = torch.finfo(torch.float32).min
TEMPERATURE = 0.5


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes or [(B, H, L, D)] * 3]


def compiled(f: Callable, policy: Policy = EXACT, **options: Any) -> tuple[Callable, list]:
    """``f`` as Dynamo captures it, rewritten, and the sites with their plans (filled in by the first call)."""
    found: list = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        planned = plan_sites(find_sites(gm, Buffers(gm, inputs)), policy)
        rewrite(gm, planned, policy)
        found.extend(planned)
        return gm

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, **options), found


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


def check(f: Callable, inputs: list[torch.Tensor], mask: str, scale: float, policy: Policy = EXACT, **options: Any):
    """Rewritten, with this mask and scale, and equal, gradients too."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    g, found = compiled(f, policy, **options)
    out, truth = g(*inputs), f(*inputs)
    ((site, decision),) = found
    assert (site.form, decision.verdict, str(site.spec.mask)) == ("softmax", "rewritten", mask), decision.reason
    assert site.spec.scale == pytest.approx(scale) and relative(out, truth) < 1e-6
    leaves = [x for x in inputs if x.requires_grad]
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    grads = (torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (out, truth))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None) and (theirs is None or relative(ours, theirs) < 1e-5)
    return site


def causal() -> torch.Tensor:
    return torch.ones(L, L, dtype=torch.bool).tril()


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(B * H, L, D)


def in_place(q, k, v):
    s = torch.matmul(q, k.transpose(2, 3))
    s *= 0.5
    s /= 2.0
    s += torch.where(causal(), 0.0, LOWEST)
    return torch.matmul(F.softmax(s, dim=-1), v)


def in_place_by_statements(q, k, v):
    """What a call returns is dropped; a view of the scores and their maximum are written, too."""
    s = torch.matmul(q, k.transpose(2, 3))
    s.mul_(0.5).div_(2.0)
    s -= s.amax(-1, keepdim=True).detach()
    s = s.view(B * H, L, L)
    s.masked_fill_(~causal(), -math.inf)
    return torch.bmm(F.softmax(s, dim=-1), heads(v)).view(B, H, L, D)


def mask_made_late(q, k, v):
    """In place, between the two products; it is read after that."""
    s = q @ k.mT
    m = torch.zeros(L, L)
    m[torch.ones(L, L, dtype=torch.bool).triu(1)] = -math.inf
    return (s + m.mul_(2)).softmax(-1) @ v


def grouped(q, k, v):
    """Queries of a group beside each other, ``[B, H_kv, group, L, D]``."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2], v[:, :2]
    s = torch.einsum("bghqd,bgkd->bghqk", q, k).masked_fill(~causal(), -1e9)
    return torch.einsum("bghqk,bgkd->bghqd", s.softmax(-1), v).flatten(1, 2)


def axial(q, k, v):
    q, k, v = (x[:, None].expand(-1, 3, -1, -1, -1).transpose(2, 3) for x in (q, k, v))
    w = torch.einsum("bxihd,bxjhd->bxhij", q, k).softmax(-1)
    return torch.einsum("bxhij,bxjhd->bxihd", w, v)


def opt(q, k, v):
    """Three dimensions, the mask in four, dropout that does nothing."""
    s = torch.bmm(heads(q) * 0.25, heads(k).transpose(1, 2))
    s = s.view(B, H, L, L) + torch.full((L, L), LOWEST).triu(1)
    w = F.dropout(F.softmax(s.view(B * H, L, L), dim=-1), p=0.1, training=False)
    return torch.bmm(w, heads(v)).view(B, H, L, D).transpose(1, 2).reshape(B, L, H * D)


def gpt_j(q, k, v):
    s = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
    s = torch.where(causal(), s, torch.tensor(LOWEST, dtype=s.dtype)) / torch.full([], 4.0)
    return torch.matmul(nn.functional.softmax(s, dim=-1).to(v.dtype), v)


def shifted(q, k, v):
    s = (q @ k.mT).masked_fill(~causal(), -math.inf)
    return (s - s.max(dim=-1, keepdim=True).values).softmax(-1) @ v


def two_masks(q, k, v):
    s = (q @ k.mT).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    keep = torch.arange(L)[:, None] - torch.arange(L) < 5
    return torch.where(keep, s, -1e9).softmax(-1) @ v


def two_masks_multiplied(q, k, v, keep):
    s = (q @ k.mT * keep).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    return torch.where(torch.arange(L)[:, None] - torch.arange(L) < 5, s, -1e9).softmax(-1) @ v


def exp_over_sum(q, k, v):
    s = q @ k.mT + torch.full((L, L), -math.inf).triu(1)
    w = torch.exp(s - s.amax(-1, True).detach())
    return (w / w.sum(-1, keepdim=True)) @ v


def exp_over_sum_in_place(q, k, v):
    w = torch.exp(0.3 * torch.bmm(heads(q), heads(k).mT))
    w /= w.sum(dim=-1).unsqueeze(-1)
    return torch.bmm(F.dropout(w, 0.1, False), heads(v))


def xglm(q, k, v):
    s = torch.bmm(heads(q) * 0.5, heads(k).mT).view(B, H, L, L) + torch.full((L, L), LOWEST).triu(1)
    s = torch.max(s, torch.tensor(torch.finfo(s.dtype).min))
    return torch.bmm(F.softmax(s.view(B * H, L, L), dim=-1), heads(v))


def swin(q, k, v):
    """Sequences are windows of images: scores are viewed as those of images for a mask per window."""
    mask = torch.zeros(2, L, L).masked_fill_(torch.arange(L)[:, None] // 4 != torch.arange(L) // 4, -1e9)
    s = (q @ k.mT).view(B // 2, 2, H, L, L) + mask.unsqueeze(1).unsqueeze(0)
    return s.view(-1, H, L, L).softmax(-1) @ v


SPELLINGS: dict[str, tuple[Callable, str, float]] = {
    "matmul, no scale": (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, "none", 1.0),
    "method, div": (lambda q, k, v: ((q @ k.transpose(-1, -2)) / math.sqrt(D)).softmax(dim=3) @ v, "none", D**-0.5),
    "scaled twice": (lambda q, k, v: F.softmax(3.0 * torch.matmul(q, k.permute(0, 1, 3, 2)) / 2, -1) @ v, "none", 1.5),
    "einsum": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqhd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.2).softmax(-1), v),
        "none",
        0.2,
    ),
    "einsum of [b, l, h, d]": (
        lambda q, k, v: torch.einsum(
            "bhnm, bmhd -> bnhd",
            torch.einsum("bnhd, bmhd -> bhnm", *(x.transpose(1, 2) for x in (q, k))).softmax(-1),
            v.transpose(1, 2),
        ),
        "none",
        1.0,
    ),
    "in place": (in_place, "causal", 0.25),
    "in place, by statements": (in_place_by_statements, "causal", 0.25),
    "a mask that is written late": (mask_made_late, "causal", 1.0),
    "grouped queries": (grouped, "causal", 1.0),
    "of five dimensions": (lambda q, k, v: (q[None] @ k[None].mT).softmax(-1) @ v[None], "none", 1.0),
    "einsum of five dimensions": (axial, "none", 1.0),
    "einsum with an ellipsis": (
        lambda q, k, v: torch.einsum("...ij, ...jd -> ...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v),
        "none", 1.0,
    ),
    "einsum with one head of keys": (
        lambda q, k, v: torch.einsum(
            "bhij,bjd->bihd", torch.einsum("bhid,bjd->bhij", q * 0.5, k[:, 0]).softmax(-1), v[:, 0]
        ),
        "none", 0.5,
    ),
    "einsum with the weights behind": (
        lambda q, k, v: torch.einsum("bhjd,bhij->bihd", v, (q @ k.mT).softmax(-1)), "none", 1.0,
    ),
    "transposed, of transposed weights": (
        lambda q, k, v: torch.bmm(heads(v).mT, (heads(q) @ heads(k).mT).softmax(2).permute(0, 2, 1)), "none", 1.0,
    ),
    "a learned temperature": (
        lambda q, k, v: (q @ k.mT / v.mean().exp() + torch.where(causal(), 0.0, LOWEST)).softmax(-1) @ v, "causal", 1.0,
    ),
    "a scale per head": (lambda q, k, v: (0.5 * (q @ k.mT) * v[0, :, :1, :1]).softmax(-1) @ v, "none", 0.5),
    "a scale per query": (
        lambda q, k, v: (heads(q) @ heads(k).mT * v[0, 0, :, :1]).softmax(-1) @ heads(v), "none", 1.0,
    ),
    "a scale per matrix": (
        lambda q, k, v: (heads(q) @ heads(k).mT * heads(v)[:, :1, :1]).softmax(-1) @ heads(v), "none", 1.0,
    ),
    "a scale per sequence of windows": (
        lambda q, k, v: (q[None] @ k[None].mT / v[None, :, :1, :1, :1].exp()).softmax(-1) @ v[None], "none", 1.0,
    ),
    "a scale per window": (
        lambda q, k, v: ((q @ k.mT).view(1, B, H, L, L) * v[:, :1, :, :1]).flatten(0, 1).softmax(-1) @ v, "none", 1.0,
    ),
    "masked_fill": (lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -math.inf).softmax(-1) @ v, "causal", 1.0),
    "where, and a constant for all": (lambda q, k, v: (torch.where(causal(), q @ k.mT, LOWEST) + 3).softmax(-1) @ v,
                                      "causal", 1.0),
    "where, turned round": (lambda q, k, v: torch.where(~causal(), -1e9, q @ k.mT).softmax(-1) @ v, "causal", 1.0),
    "added first, scaled later": (
        lambda q, k, v: ((torch.where(causal(), 0.0, LOWEST) + q @ k.mT) * 0.3).softmax(-1) @ v, "causal", 0.3,
    ),
    "taken away": (
        lambda q, k, v: (q @ k.mT - torch.where(causal(), 0.0, -LOWEST)).softmax(-1) @ v,
        "causal",
        1.0,
    ),
    "of three dimensions": (opt, "causal", 0.25),
    "of one head": (lambda q, k, v: torch.bmm((q[:, 0] @ k[:, 0].mT).softmax(-1), v[:, 0]), "none", 1.0),
    "of two dimensions": (lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0], "none", 1.0),
    "a divisor of torch.full": (gpt_j, "causal", 0.25),
    "softmax in float32": (
        lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype).contiguous() @ v, "none", 1.0,
    ),
    "softmax in float32, by position": (lambda q, k, v: F.softmax(q @ k.mT, -1, 3, torch.float32) @ v, "none", 1.0),
    "less its maximum": (shifted, "causal", 1.0),
    "exp of log_softmax": (lambda q, k, v: F.log_softmax(q @ k.mT, -1).exp() @ v, "none", 1.0),
    "exp of what logsumexp leaves": (
        lambda q, k, v: (s := q @ k.mT * 0.5).sub(s.logsumexp(-1, keepdim=True)).exp() @ v, "none", 0.5,
    ),
    "exp over its sum": (exp_over_sum, "causal", 1.0),
    "exp over a sum that is indexed": (
        lambda q, k, v: ((w := torch.exp(q @ k.mT)) / torch.sum(w, -1)[..., None]) @ v, "none", 1.0,
    ),
    "special.softmax": (lambda q, k, v: torch.special.softmax(q @ k.mT, -1) @ v, "none", 1.0),
    "safe softmax": (lambda q, k, v: torch.ops.aten._safe_softmax(q @ k.mT, -1) @ v, "none", 1.0),
    "softmin of the negative": (lambda q, k, v: F.softmin((q @ k.mT).neg(), -1) @ v, "none", 1.0),
    "not below the lowest": (xglm, "causal", 0.5),
    "clamped at the lowest": (
        lambda q, k, v: (torch.where(causal(), q @ k.mT, -math.inf) * 0.5).clamp(min=LOWEST).softmax(-1) @ v,
        "causal", 0.5,
    ),
    "a mask per window": (swin, "packed segments", 1.0),
    "an integer mask": (
        lambda q, k, v: (q @ k.mT + (causal().long() - 1) * 10**9).softmax(-1) @ v, "causal", 1.0,
    ),
    "a boolean that is True": (
        lambda q, k, v: (q @ k.mT + (m := causal()).masked_fill(~m, -math.inf)).softmax(-1) @ v, "none", 1.0,
    ),
    "two masks": (two_masks, "causal, window 5", 1.0),
    "multiplied by its mask, hidden by what is added": (
        lambda q, k, v: (q @ k.mT * 0.5 * (m := causal().float()) - 1e10 * (1 - m)).softmax(-1) @ v, "causal", 0.5,
    ),
    "multiplied by a boolean mask, and filled": (
        lambda q, k, v: ((q @ k.mT) * causal()).masked_fill(~causal(), -math.inf).softmax(-1) @ v, "causal", 1.0,
    ),
    "multiplied by one of two masks": (
        lambda q, k, v: two_masks_multiplied(q, k, v, torch.ones(L, L).tril()), "causal, window 5", 1.0,
    ),
    "multiplied by ones, and filled": (
        lambda q, k, v: ((q @ k.mT) * torch.ones(L, L)).masked_fill(~causal(), -1e9).softmax(-1) @ v, "causal", 1.0,
    ),
    "dropped in place, which does nothing": (
        lambda q, k, v: F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.3, False, True), 0, True, True) @ v, "none", 1.0,
    ),
    "weights that are 0 are set to 0": (
        lambda q, k, v: (q @ k.mT).masked_fill(m := ~causal(), -math.inf).softmax(-1).masked_fill(m, 0.0) @ v,
        "causal", 1.0,
    ),
    "weights set to 0 by tensors of one number": (
        lambda q, k, v: torch.masked_fill(
            torch.masked_fill(q @ k.mT, m := ~causal(), torch.scalar_tensor(-math.inf)).softmax(-1),
            m, torch.scalar_tensor(0, dtype=q.dtype),
        ) @ v, "causal", 1.0,
    ),
    "weights that are 0 are set to 0 by where": (
        lambda q, k, v: torch.where(~causal(), 0, torch.where(causal(), q @ k.mT, -1e9).softmax(-1)) @ v, "causal", 1.0,
    ),
    "weights that are no NaN": (
        lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -math.inf).softmax(-1).nan_to_num(0.0) @ v, "causal", 1.0,
    ),
    "baddbmm without a bias": (
        lambda q, k, v: torch.bmm(
            torch.baddbmm(q.new_empty(1, L, L), heads(q), heads(k).mT, beta=0, alpha=0.7).softmax(-1), heads(v)
        ),
        "none",
        0.7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    f, mask, scale = SPELLINGS[name]
    check(f, tensors(), mask, scale)


def groups_first(q, k, v):
    """Query head ``g * H_kv + h`` has KV head ``h``, and scores are masked as those of so many heads."""
    s = (q.unflatten(1, (2, 2)) @ k[:, None, :2].mT).flatten(1, 2).masked_fill(~causal(), -math.inf)
    return (s.softmax(-1).unflatten(1, (2, 2)) @ v[:, None, :2]).flatten(1, 2)


def groups_masked_apart(q, k, v):
    s = q.unflatten(1, (2, 2)) @ k[:, None, :2].mT
    s = s.masked_fill(torch.stack([~causal(), ~causal().mT])[:, None], -math.inf)
    return s.softmax(-1) @ v[:, None, :2]


def big_code(q, k, v, mask=lambda m: m[:, None]):
    """GPTBigCode: one head of keys, and the heads of a query beside each other, ``[B, Lq * H, D]``."""
    s = torch.baddbmm(q.new_empty(B, L * H, L), q.transpose(1, 2).reshape(B, L * H, D), k[:, 0].mT, beta=0, alpha=0.5)
    s = torch.where(mask(causal()), s.view(B, L, H, L), LOWEST)
    return torch.bmm(s.softmax(-1).view(B, L * H, L), v[:, 0]).view(B, L, H, D).transpose(1, 2)


def stacked(mask):
    """One head of keys, and the queries of all heads one after the other, ``[B, H * Lq, D]``."""

    def f(q, k, v):
        s = (q.flatten(1, 2) @ k[:, 0].mT * 0.5).masked_fill(~mask(causal()), -1e9)
        return (s.softmax(-1) @ v[:, 0]).unflatten(1, (H, L))

    return f


def stacked_groups(q, k, v):
    """The same of two KV heads, taken apart for the mask."""
    s = (q.reshape(B, 2, 2 * L, D) @ k[:, ::2].mT * 0.5).view(B, H, L, L) + torch.full((L, L), LOWEST).triu(1)
    return (s.softmax(-1).view(B, 2, 2 * L, L) @ v[:, ::2]).reshape(B, H, L, D)


def both_sides(q, k, v):
    """Groups before the KV heads and behind them."""
    q = torch.cat([q, -q], 1).view(B, 2, 2, 2, L, D)
    return (q @ k[:, None, :2, None].mT).softmax(-1) @ v[:, None, :2, None]


def shifted_groups(q, k, v):
    """A scale and a shift for each query head."""
    of_head = q[:, :, :1, :1].detach().view(B, 2, 2, 1, 1)
    s = (q.unflatten(1, (2, 2)) @ k[:, None, :2].mT) * of_head[:1] + of_head
    return s.softmax(-1) @ v[:, None, :2]


def expanded_groups(q, k, v):
    k, v = (x[:, None, :2].expand(-1, 2, -1, -1, -1) for x in (k, v))
    return (q.unflatten(1, (2, 2)) @ k.mT).softmax(-1) @ v


ROWS: dict[str, tuple[Callable, tuple[int, int], str, float]] = {
    "groups first": (groups_first, (4, 2), "causal", 1.0),
    "groups first, by einsum": (
        lambda q, k, v: torch.einsum(
            "bghqk,bhkd->bqghd",
            torch.einsum("bqghd,bhkd->bghqk", q.unflatten(1, (2, 2)).permute(0, 3, 1, 2, 4), k[:, :2]).softmax(-1),
            v[:, :2],
        ),
        (4, 2), "none", 1.0,
    ),
    "groups first, scaled and shifted": (shifted_groups, (4, 2), "none", 1.0),
    "groups first, expanded": (expanded_groups, (4, 2), "none", 1.0),
    "groups on both sides": (both_sides, (8, 2), "none", 1.0),
    "heads beside each other": (big_code, (4, 1), "causal", 0.5),
    "heads beside each other, by einsum": (
        lambda q, k, v: torch.einsum(
            "bqhk,bkd->bhqd",
            (torch.einsum("bhqd,bkd->bqhk", q, k[:, 1]) + torch.full((L, L), LOWEST).triu(1)[:, None]).softmax(-1),
            v[:, 1],
        ),
        (4, 1), "causal", 1.0,
    ),
    "queries one after the other": (stacked(lambda m: m.repeat(H, 1)), (4, 1), "causal", 0.5),
    "queries expanded": (stacked(lambda m: m.expand(H, L, L).reshape(H * L, L)), (4, 1), "causal", 0.5),
    "queries of groups one after the other": (stacked_groups, (4, 2), "causal", 0.5),
    # masks that are not the same for all heads, or for others
    "groups first, each with a mask": (groups_masked_apart, (4, 2), "unknown", 1.0),
    "heads masked beside queries": (
        lambda q, k, v: big_code(q, k, v, lambda m: m[:, None] & m[6 : 6 + H]), (1, 1), "unknown", 0.5,
    ),
    "one query later": (stacked(lambda m: m.repeat(H, 1).roll(1, 0)), (1, 1), "unknown", 0.5),
    "one head sees all": (stacked(lambda m: torch.cat([m.repeat(H - 1, 1), m | True])), (1, 1), "unknown", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_scores_are_heads_and_queries_in_any_order(name: str) -> None:
    f, heads, mask, scale = ROWS[name]
    for policy in (EXACT, Policy(methods=("express", "thinformer"), budget=64)):
        if mask != "unknown":
            site = check(f, tensors(), mask, scale, policy)
        else:
            g, found = compiled(f, policy)
            assert relative(g(*tensors()), f(*tensors())) < 1e-6
            ((site, plan),) = found
            assert plan.verdict == ("rewritten" if policy is EXACT else "refused") and site.spec.mask.unknown
        assert (site.spec.H, site.spec.H_kv) == heads


@pytest.mark.parametrize("name", ["groups first", "heads beside each other", "queries one after the other"])
def test_rows_of_dynamic_sizes(name: str) -> None:
    """With a padding for each sequence, and a shift for each query."""

    def f(q, k, v, real):
        n, b = q.shape[2], q.shape[0]
        seen = (torch.arange(n) <= torch.arange(n)[:, None]) & real[:, None]
        if name == "groups first":
            s = q.unflatten(1, (2, 2)) @ k[:, None, :2].mT
            return (s.masked_fill(~seen[:, None, None], -math.inf).softmax(-1) @ v[:, None, :2]).flatten(1, 2)
        if name == "heads beside each other":
            s = (q.transpose(1, 2).flatten(1, 2) @ k[:, 0].mT).view(b, n, H, n).masked_fill(~seen[:, :, None], -1e9)
            return (s.softmax(-1).flatten(1, 2) @ v[:, 0]).view(b, n, H, D).transpose(1, 2)
        s = (q.flatten(1, 2) @ k[:, 0].mT).masked_fill(~seen.repeat(1, H, 1), -1e9)
        return (s.softmax(-1) @ v[:, 0]).view(b, H, n, D)

    g, found = compiled(f, Policy(methods=("express",), budget=64), dynamic=True)
    for b, n in ((3, 12), (2, 17)):
        real = torch.arange(n) < torch.arange(n - b + 1, n + 1)[:, None]
        inputs = [*tensors(*[(b, H, n, D)] * 3), real]
        out, truth = g(*inputs), f(*inputs)
        rows = real[:, None].expand(-1, H, -1)
        assert relative(out[rows], truth[rows]) < 1e-6
    ((site, plan),) = found
    assert (str(site.spec.mask), plan.verdict) == ("causal, key padding", "rewritten"), plan.reason
    assert (site.spec.H, site.spec.H_kv) == ((4, 2) if name == "groups first" else (4, 1))


def test_windows_of_images_take_a_mask_and_a_bias_in_five_dimensions() -> None:
    """``[images, windows, heads, n, n]``: what broadcasts over images, windows or heads stays in its place."""

    def f(x, mask, bias):
        (q, k, v), W = x, mask.shape[0]
        s = (q @ k.mT).view(-1, W, H, L, L) + mask[:, None]
        s = (s + bias).masked_fill(mask[None, :, None] > 1.5, -math.inf)
        return s.view(-1, H, L, L).softmax(-1) @ v

    g, found = compiled(f, EXACT)
    x, mask, bias = tensors((3, 8, H, L, D), (4, L, L), (H, L, 1))
    assert relative(g(x, mask, bias), f(x, mask, bias)) < 1e-6
    assert [plan.verdict for _, plan in found] == ["rewritten"]
    assert "adds the values of 'mask'" in found[0][0].spec.mask.unknown


@torch.no_grad()
def test_exponentials_are_divided_by_their_sum_in_place() -> None:
    """Which no gradient survives."""
    g, found = compiled(exp_over_sum_in_place)
    assert relative(g(*tensors()), exp_over_sum_in_place(*tensors())) < 1e-6
    assert [(site.spec.scale, plan.verdict) for site, plan in found] == [(0.3, "rewritten")]


def test_a_boolean_that_is_added_is_a_one_or_a_zero() -> None:
    """It hides nothing: True adds 1, also twice, and with a factor."""

    def f(q, k, v):
        s = (q @ k.mT + causal()) * 0.5 + causal()
        return s.softmax(-1) @ v

    site = check(f, tensors(), "unknown (it adds 1 to scores: neither 0 nor -1e+09 or less, which hides them)", 0.5)
    assert site.spec.mask.nearest == "float('-inf') for hidden keys"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_hides_a_score_depends_on_what_its_dtype_can_hold(dtype: torch.dtype) -> None:
    """-65504 is the lowest number of half precision; in others it is a number like any, and so is a part of it."""

    def f(q, k, v, low, factor):
        return ((q @ k.mT + torch.full((L, L), low, dtype=q.dtype).triu(1)) * factor).softmax(-1) @ v

    masks = []
    for low, factor in ((torch.finfo(dtype).min, 1.0), (-65504.0, 1.0), (torch.finfo(dtype).min, 0.25)):
        g, found = compiled(f, Policy(methods=("exact",)))
        q, k, v = (x.to(dtype) for x in tensors())
        assert relative(g(q, k, v, low, factor).float(), f(q, k, v, low, factor).float()) < 1e-2
        masks.append(str(found[0][0].spec.mask).partition(" ")[0])
    half = dtype == torch.float16
    assert masks == ["causal", "causal" if half else "unknown", "unknown" if half else "causal"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rank", [4, 3, 2])
def test_masks_of_less_than_two_dimensions(rank: int, dynamic: bool) -> None:
    """Which SDPA does not take: one bias for each key, a number for all of them, and keys that nobody sees."""

    def added(q, k, v, bias):
        return (q @ k.mT + bias).softmax(-1) @ v

    def filled(q, k, v, bias):
        return (q @ k.mT).masked_fill(bias > 1, -math.inf).softmax(-1) @ v

    inputs = [x[(0,) * (4 - rank)] for x in tensors()]
    for f, shape in ((added, (L,)), (added, ()), (filled, (L,))):
        bias = tensors(shape, seed=1)[0]
        g, found = compiled(f, EXACT, dynamic=dynamic)
        assert relative(g(*inputs, bias), f(*inputs, bias)) < 1e-6
        assert [plan.verdict for _, plan in found] == ["rewritten"]


@pytest.mark.parametrize("name", ["in place", "of three dimensions", "less its maximum", "added first, scaled later"])
def test_a_causal_spelling_runs_express(name: str) -> None:
    """Which is exact for so few keys."""
    f, mask, scale = SPELLINGS[name]
    check(f, tensors(), mask, scale, Policy(methods=("express",), budget=64, strict=True))


@pytest.mark.parametrize("name", ["einsum of [b, l, h, d]", "of one head", "scaled twice", "baddbmm without a bias"])
def test_a_spelling_without_a_mask_runs_thinformer(name: str) -> None:
    f, mask, scale = SPELLINGS[name]
    check(f, tensors(), mask, scale, Policy(methods=("thinformer",), budget=64, strict=True))


def test_grouped_queries_are_seen_through() -> None:
    q, k, v = tensors((B, H, L, D), (B, 2, L, D), (B, 2, L, 5))

    def repeat(x):
        return x[:, :, None].expand(B, 2, 2, L, x.shape[-1]).reshape(B, H, L, x.shape[-1])

    def f(q, k, v):
        return (torch.matmul(q, repeat(k).transpose(2, 3)) * 0.3).softmax(-1) @ repeat(v)

    for policy in (EXACT, Policy(methods=("thinformer",), budget=64)):
        site = check(f, [q, k, v], "none", 0.3, policy)
        assert (site.spec.H, site.spec.H_kv, site.spec.Dv) == (4, 2, 5)
    one = check(
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v, tensors((B, H, L, D), (B, 1, L, D), (B, 1, L, D)), "none", 1
    )
    assert one.spec.H_kv == 1


def test_cross_attention_with_a_padding() -> None:
    """Boolean and given by the user, hidden where True: whatever it holds, it is a padding."""
    q, k, v = tensors((B, H, 40, D), (B, H, L, D), (B, H, L, D))
    hidden = torch.arange(L) >= torch.tensor([L, 7])[:, None]

    def f(q, k, v, hidden):
        return (q @ k.mT).masked_fill(hidden[:, None, None], -math.inf).softmax(-1) @ v

    for policy in (EXACT, Policy(methods=("thinformer",), budget=64)):
        check(f, [q, k, v, hidden], "key padding", 1.0, policy)


@pytest.mark.parametrize("shape", [(B, 1, 1, L), (1, 1, 1, L), (1, L), (L,)])
def test_a_mask_of_two_that_names_no_query_is_a_padding(shape: tuple[int, ...]) -> None:
    """Of each sequence, or one for all."""
    q, k, v = tensors()
    real, more = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) > 0.4 for i in (1, 2))

    def f(q, k, v, real, more):
        return (q @ k.mT).masked_fill(~(real | more), -math.inf).softmax(-1) @ v

    for policy in (EXACT, Policy(methods=("thinformer",), budget=64)):
        check(f, [q, k, v, real, more], "key padding", 1.0, policy)


def test_an_added_mask_that_names_no_query_is_a_padding_whatever_it_holds() -> None:
    """As in a decoding step over a static cache: ``where(visible, 0, lowest)`` of a mask made from what is written."""
    q, k, v = tensors((B, H, 1, D), (B, H, L, D), (B, H, L, D))

    def f(q, k, v, visible):
        return (q @ k.mT + torch.where(visible, 0.0, LOWEST)).softmax(-1) @ v

    visible = (torch.arange(L) < torch.tensor([L, 7])[:, None])[:, None, None]
    check(f, [q, k, v, visible], f"causal, offset {L - 1}, key padding", 1.0)


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
@pytest.mark.parametrize("how", ["both", "some", "none", "nan_to_num"])
def test_rows_whose_weights_are_all_set_to_0_give_0(how: str, fill: float) -> None:
    """As ESPnet has it: what is hidden is set to 0 behind the softmax, where all keys of a row may be hidden."""
    hidden = torch.arange(L) < torch.tensor([[0], [5]])  # on the left of the second sequence

    def f(q, k, v, hidden):
        m = hidden[:, None, None] | ~causal()
        w = (q @ k.mT).masked_fill(m, fill).softmax(-1)
        if how != "none":
            w = w.nan_to_num() if how == "nan_to_num" else w.masked_fill(m if how == "both" else ~causal(), 0.0)
        return w @ v

    inputs = tensors()
    g, found = compiled(f, Policy(methods=("exact",)))
    out, truth = g(*inputs, hidden), f(*inputs, hidden)
    ((_, plan),) = found
    rows = torch.ones(B, L, dtype=torch.bool)
    if fill == -math.inf and how in ("some", "none"):
        rows[1, :5] = False  # NaN, and 0 once it is rewritten
    refused = how == "some" and fill != -math.inf
    assert plan.verdict == ("refused" if refused else "rewritten"), plan.reason
    assert relative(out.transpose(1, 2)[rows], truth.transpose(1, 2)[rows]) < 1e-6


def test_a_mask_that_is_repeated_for_the_heads_is_proven_of_every_batch_size() -> None:
    """Heads first, ``[H * B, L, L]``, as in implementations of "Attention is all you need"."""

    def f(q, k, v):
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        m = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)[None]
        m = m.expand(q.shape[0] // H, -1, -1).repeat(H, 1, 1)
        return torch.bmm((q @ k.mT).masked_fill(m, -math.inf).softmax(-1), v)

    check(f, tensors(), "causal", 1.0, Policy(methods=("express",), budget=64), dynamic=True)


def test_what_hides_others_than_the_end_beside_a_causal_mask_is_not_taken_for_a_padding() -> None:
    """Queries whose own keys it hides are not padding: Express would give 0 there."""

    def f(q, k, v, n):
        place = torch.arange(L)
        return (q @ k.mT).masked_fill((place == n[:, None])[:, None, None] | ~causal(), -1e9).softmax(-1) @ v

    g, found = compiled(f, Policy(methods=("express",), budget=64))
    inputs = [*tensors(), torch.tensor([1, 5])]
    assert relative(g(*inputs), f(*inputs)) < 1e-6
    ((site, plan),) = found
    assert plan.verdict == "refused" and site.spec.mask.unknown is not None


LENGTHS: dict[str, Callable] = {
    "filled twice": lambda s, real, seen: s.masked_fill(~real, -math.inf).masked_fill(~seen, -math.inf),
    "both at once": lambda s, real, seen: torch.where(real & seen, s, -math.inf),
    "either hides": lambda s, real, seen: s.masked_fill(torch.logical_or(~real, ~seen), -1e9),
    "not both": lambda s, real, seen: s.masked_fill(~(real & seen), LOWEST),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_lengths_beside_a_causal_mask_are_a_key_padding(name: str, dynamic: bool) -> None:
    """A mask that names no query is one, whatever it is computed from; by itself it has always been one."""

    def f(q, k, v, n):
        place = torch.arange(q.shape[2])
        real = (place < n[:, None])[:, None, None]
        return LENGTHS[name](q @ k.mT, real, place <= place[:, None]).softmax(-1) @ v

    lengths = torch.tensor([L, L - 3])
    g, found = compiled(f, Policy(methods=("express",), budget=64), dynamic=dynamic)
    inputs = tensors()
    out, truth = g(*inputs, lengths), f(*inputs, lengths)
    ((site, plan),) = found
    assert (str(site.spec.mask), plan.verdict) == ("causal, key padding", "rewritten"), plan.reason
    real = torch.arange(L) < lengths[:, None]
    assert relative(out.transpose(1, 2)[real], truth.transpose(1, 2)[real]) < 1e-6


def test_a_bias_stays_exact() -> None:
    """ALiBi by baddbmm, before the scale, or in four dimensions: exact attention takes it as its mask."""
    q, k, v = tensors()
    alibi, bias = tensors((B * H, 1, L), (1, H, L, L), seed=3)

    def bloom(q, k, v, alibi):
        return torch.bmm(torch.baddbmm(alibi, heads(q), heads(k).mT, beta=2.0, alpha=0.5).softmax(-1), heads(v))

    def falcon(q, k, v, bias):
        return ((q @ k.mT + bias) * 0.4).masked_fill(~causal(), -math.inf).softmax(-1) @ v

    for f, extra, scale, leaf in ((bloom, alibi, 0.5, "alibi"), (falcon, bias, 0.4, "bias")):
        words = f"unknown (it adds the values of '{leaf}', which are not known when compiling)"
        check(f, [q, k, v, extra], words, scale)
        g, found = compiled(f, Policy(methods=("express", "thinformer")))
        assert torch.equal(g(q, k, v, extra), f(q, k, v, extra)) and found[0][1].verdict == "refused"


SHIFTS: dict[str, tuple[Callable, str]] = {
    "of each query": (lambda s, x: s + x[..., :1], "none"),
    "of each sequence, twice": (lambda s, x: (s - x[:, :1, :1, :1]) * 0.5 + x.mean(), "none"),
    "before a mask": (lambda s, x: (s + x[..., :1]).masked_fill(~causal(), LOWEST), "causal"),
    "after a mask": (lambda s, x: s.masked_fill(~causal(), -1e9) + x[..., :1], "causal"),
    "with a mask": (lambda s, x: s + (x[..., :1] + torch.full((L, L), -math.inf).triu(1)), "causal"),
    "in a mask": (lambda s, x: s + torch.where(causal(), x[..., :1].expand(-1, -1, -1, L), -math.inf), "causal"),
    "where queries are chosen": (lambda s, x: s + torch.where(causal()[:, 5:6], x[..., :1], 1.0), "none"),
    # and of some keys alone
    "of each key": (lambda s, x: s + x[..., :1].mT, "unknown"),
    "of each query and key": (lambda s, x: s + (x @ x.mT), "unknown"),
    "of the first keys": (lambda s, x: s + torch.where(torch.arange(L) < 3, x[..., :1], 0.0), "unknown"),
    "of hidden keys": (lambda s, x: s + torch.where(causal(), 0.0, x[..., :1]), "unknown"),
    # and what hides all keys of a query
    "queries are hidden": (lambda s, x: s + (x[..., :1] > 0) * -1e9, "unknown"),
    "queries are hidden by a product": (lambda s, x: s + x[..., :1].relu() * -1e12, "unknown"),
    "queries are hidden by a logarithm": (lambda s, x: s + (x[..., :1].relu() + 0.1).log(), "unknown"),
}


@pytest.mark.parametrize("name", SHIFTS)
@torch.no_grad()
def test_what_is_added_to_all_keys_alike_is_not_seen_by_a_softmax(name: str) -> None:
    """Of values that are not known; exact attention adds them all the same."""
    shift, mask = SHIFTS[name]
    inputs = [*tensors(), tensors((B, H, L, D), seed=1)[0]]
    for policy in (EXACT, Policy(methods=("express", "thinformer"), budget=64)):
        g, found = compiled(lambda q, k, v, x: shift(q @ k.mT, x).softmax(-1) @ v, policy)
        out, truth = g(*inputs), shift(inputs[0] @ inputs[1].mT, inputs[3]).softmax(-1) @ inputs[2]
        assert relative(out, truth) < 1e-6
        ((site, plan),) = found
        assert str(site.spec.mask).partition(" ")[0] == mask
        assert (plan.verdict == "rewritten") == (mask != "unknown" or policy is EXACT), plan.reason


def test_a_shift_that_hides_or_needs_a_gradient_stays_exact() -> None:
    """A bias that a user gives may hide queries: its values are looked at. A parameter asks for its gradient."""

    def f(q, k, v, shift):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shift + torch.full((L, L), -math.inf).triu(1))

    for low, needs_gradient, verdict in (
        (-5.0, False, "rewritten"),
        (-math.inf, False, "refused"),
        (-5.0, True, "refused"),
    ):
        shift = torch.zeros(B, 1, L, 1).index_fill(2, torch.tensor([L - 1]), low).requires_grad_(needs_gradient)
        g, found = compiled(f, Policy(methods=("express",), budget=64))
        out, truth = g(*tensors(), shift), f(*tensors(), shift)
        assert torch.allclose(out, truth, atol=1e-6, equal_nan=True) and found[0][1].verdict == verdict
        assert verdict == "rewritten" or ("a gradient" if needs_gradient else "'shift'") in found[0][1].reason


@pytest.mark.parametrize("how", ["written in place", "given"])
def test_a_bias_read_from_a_table_is_called_that_however_its_places_are_made(how) -> None:
    """BEiT makes the places by writing into zeros."""
    q, k, v = tensors()
    table = torch.randn(9)
    places = torch.arange(L * L).reshape(L, L) % 9

    def f(q, k, v, table, places):
        if how != "given":
            made = torch.zeros(L, L, dtype=torch.int64)
            made[1:, 1:] = places[1:, 1:]
            made[0, :] = 7
            places = made
        return (q @ k.mT * 0.5 + table[places.view(-1)].view(1, 1, L, L)).softmax(-1) @ v

    (site,) = explain(f, q, k, v, table, places, methods=["exact"]).sites
    assert "it adds the values of an item of " in site.mask and "'table'" in site.mask
    assert "in place" not in site.mask


def test_dynamic_sizes() -> None:
    def f(q, k, v):
        n = q.shape[2]
        s = q @ k.mT / math.sqrt(D)
        return s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v

    g, found = compiled(f, Policy(methods=("express",), budget=64), dynamic=True)
    for n in (12, 17, 23):
        q, k, v = tensors(*[(3, H, n, D)] * 3)
        assert relative(g(q, k, v), f(q, k, v)) < 1e-6
    assert len(found) == 1 and found[0][1].verdict == "rewritten"


def test_as_many_sequences_as_heads_where_sizes_are_dynamic() -> None:
    """Dynamo takes both for one symbol s, of which a product of queries and keys has s * s // s heads."""

    def f(q, k, v):
        return (q @ k.mT).masked_fill(~torch.ones(q.shape[2], k.shape[2]).tril().bool(), -1e9).softmax(-1) @ v

    g, found = compiled(f, Policy(methods=("express",), budget=64), dynamic=True)
    for size, n in ((2, 12), (3, 17)):
        inputs = tensors(*[(size, size, n, D)] * 3)
        assert relative(g(*inputs), f(*inputs)) < 1e-6
    assert [(str(site.spec.mask), plan.verdict) for site, plan in found] == [("causal", "rewritten")]


class OfItsSize(nn.Module):
    """A mask in a buffer that is cut to the size of the scores, as ports of GPT-2 cut it."""

    def __init__(self, multiplied: bool) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(16, 16).tril()[None, None])
        self.multiplied = multiplied

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        w = q @ k.mT
        b = self.bias[:, :, : w.size(-2), : w.size(-1)]
        return ((w * b if self.multiplied else w) - 1e10 * (1 - b)).softmax(-1) @ v


@pytest.mark.parametrize("multiplied", [False, True])
def test_sizes_that_are_read_off_the_scores_are_no_values_of_them(multiplied: bool) -> None:
    """With the third length, all of the buffer, Dynamo keeps the calls of ``size`` in the graph."""
    model = OfItsSize(multiplied)
    options = {"methods": ["express"], "budget": 64, "min_length": 0, "strict": True}  # which takes causal masks alone
    f = torch.compile(model, backend="express", options=options)
    for n in (12, 9, 16):
        qkv = torch.randn(3, B, H, n, D)
        torch.testing.assert_close(f(qkv), model(qkv), rtol=1e-5, atol=1e-5)


def test_a_global_number_is_known_where_sizes_are_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo makes a symbol of it; another value compiles anew."""

    def f(q, k, v):
        place = torch.arange(q.shape[2])
        s = (q @ k.mT).masked_fill(place > place[:, None], LOWEST)
        return (s * TEMPERATURE).softmax(-1) @ v

    g, found = compiled(f, dynamic=True)
    for scale in (0.5, 0.25):
        monkeypatch.setitem(globals(), "TEMPERATURE", scale)
        assert relative(g(*tensors()), f(*tensors())) < 1e-6
        site, plan = found[-1]
        assert (plan.verdict, str(site.spec.mask), site.spec.scale) == ("rewritten", "causal", scale)


def test_attention_whose_scores_are_a_result_of_attention() -> None:
    """Its queries would be the weights of the first, which are gone once that is written in one piece."""

    def f(q, k, v):
        return ((q @ k.mT).softmax(-1) @ v).softmax(-1) @ (k.mT @ v)

    run, plans = compiled(f, Policy(methods=("exact",)))
    assert relative(run(*tensors()), f(*tensors())) < 1e-6
    assert [plan.verdict for _, plan in plans] == ["rewritten", "refused"]
    assert plans[1][1].reason == "its scores are the result of another attention"


@pytest.mark.parametrize("methods", ["exact", "thinformer"])
def test_a_result_that_is_written_in_place_keeps_its_gradient(methods: str) -> None:
    """Matrix products do not need their result for it, attention in one piece does."""

    def f(q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        out.view(-1).mul_(2.0)
        return out

    def gradients(run: Callable) -> list[torch.Tensor]:
        leaves = [x.requires_grad_() for x in tensors((2, 4, 12, 8), (2, 4, 12, 8), (2, 4, 12, 8))]
        return [*torch.autograd.grad((run(*leaves) * torch.arange(8)).sum(), leaves)]

    # fewer keys than the budget: exact
    run, plans = compiled(f, Policy(methods=(methods,)))
    for got, truth in zip(gradients(run), gradients(f), strict=True):
        assert relative(got, truth) < 1e-6
    assert [plan.verdict for _, plan in plans] == ["rewritten"]


@pytest.mark.parametrize("policy", [EXACT, Policy(methods=("express",), budget=64)], ids=["exact", "express"])
def test_autocast_and_checkpointing(policy: Policy) -> None:
    layer = nn.Linear(D, 3 * D)

    def attend(x):
        q, k, v = layer(x).chunk(3, -1)
        return (q @ k.mT * 0.3).masked_fill(~causal(), -math.inf).softmax(-1) @ v

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(attend, x, use_reentrant=False)

    (x,) = tensors((B, H, L, D))
    g, found = compiled(f, policy)
    out, truth = g(x), attend(x)
    assert out.dtype == torch.bfloat16 and found[0][1].verdict == "rewritten"
    assert relative(out.float(), truth) < 2 * relative(f(x).float(), truth)


def test_scores_of_half_precision_inputs_in_float32() -> None:
    """Query and key are cast up for their product: SDPA takes them as they were, unless they are written later."""

    def f(q, k, v, write):
        s = q.float() @ k.float().mT
        if write:
            q.mul_(2)
        return s.softmax(-1).to(v.dtype) @ v

    q, k, v = (x.bfloat16() for x in tensors())
    truth = (q.float() @ k.float().mT).softmax(-1) @ v.float()
    for write, verdict in ((False, "rewritten"), (True, "refused")):
        g, found = compiled(f, Policy(methods=("exact",)))
        out = g(q.clone(), k, v, write)
        assert found[0][1].verdict == verdict and out.dtype == torch.bfloat16
        assert relative(out.float(), truth) <= 2 * relative(f(q.clone(), k, v, write).float(), truth)
    assert "different dtypes" in found[0][1].reason


def test_dropout_is_refused_by_approximations_and_kept_by_exact_attention() -> None:
    q, k, v = tensors()

    def f(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v

    g, found = compiled(f, Policy(methods=("thinformer",)))
    g(q, k, v)
    assert "dropout_p=0.5" in found[0][1].reason and found[0][1].verdict == "refused"
    g, found = compiled(f)
    torch.manual_seed(0)
    mean = torch.stack([g(q, k, v) for _ in range(400)]).mean(0)
    truth = (q @ k.mT).softmax(-1) @ v
    assert found[0][1].verdict == "rewritten" and 0 < relative(mean, truth) < 0.1


def test_nothing_of_it_is_left() -> None:
    q, k, v = tensors()
    graphs = []

    def backend(gm, _):
        planned = plan_sites(find_sites(gm), EXACT)
        rewrite(gm, planned, EXACT)
        graphs.append(gm)
        return gm

    torch.compile(in_place, backend=backend)(q, k, v)
    names = [getattr(node.target, "__name__", node.target) for node in graphs[0].graph.nodes]
    assert "scaled_dot_product_attention" in names
    assert not {"softmax", "matmul", "imul", "itruediv", "iadd"} & set(names)


# ---- near misses ---------------------------------------------------------------------------------------------------


def written_weights(q, k, v):
    w = (q @ k.mT).softmax(-1)
    w[..., 0] = 0
    return w @ v


def written_scores(q, k, v):
    s = q @ k.mT
    first = s[:, :, 0]
    first.mul_(2)
    return s.softmax(-1) @ v


def written_keys(q, k, v):
    k = k.clone()
    s = q @ k.mT
    k.mul_(2)
    return s.softmax(-1) @ v + k


def written_mask(q, k, v):
    m = torch.full((L, L), -math.inf).triu(1)
    s = q @ k.mT + m
    m.zero_()
    return s.softmax(-1) @ v


def without_gradients(q, k, v):
    with torch.no_grad():
        s = q @ k.mT
    return s.softmax(-1) @ v


def scores_as_bias(q, k, v):
    s = q @ k.mT
    first = s[..., :1]
    s *= 2
    return (s + first).softmax(-1) @ v


def hidden(q):
    """A finite mask that lets queries see what is before them, and nobody the last key."""
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    return torch.where(seen, 0.0, LOWEST)


def without_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        s = q @ k.mT
        with torch.autocast("cpu", enabled=False):
            w = s.float().softmax(-1)
        return w @ v


def sinks(q, k, v):
    s = torch.cat([q @ k.mT, q[..., :1]], -1)
    return s.softmax(-1)[..., :-1] @ v


MIX = torch.randn(H, H, generator=torch.Generator().manual_seed(9))


def mix(x):
    """As talking heads do."""
    return F.linear(x.permute(0, 2, 3, 1), MIX).permute(0, 3, 1, 2)


NEAR_MISSES: dict[str, tuple[Callable, str]] = {
    "over queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "its softmax is over dimension -2 of 4"),
    "soft-cap": (lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v, "it caps its scores (tanh)"),
    "sinks": (sinks, "its attention weights are sliced (sinks)"),
    "weights are used again": (lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.mean(), "used more than once"),
    "weights times weights": (lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ w @ v, "used more than once"),
    "weights on the right": (lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1), "not the first factor"),
    "no product": (lambda q, k, v: torch.softmax(q.sum(-1, keepdim=True) + k.sum(-1)[:, :, None], -1) @ v,
                   "its scores come from"),
    "a gate": (lambda q, k, v: F.relu(q).softmax(-1) @ k.mT, "its scores come from 'relu'"),
    "a scale per key": (lambda q, k, v: (q @ k.mT * v[:, :, :, :1].mT).softmax(-1) @ v, "scaled by a tensor"),
    "a learned scale of a bias": (
        lambda q, k, v: ((q @ k.mT + hidden(q)) * v.mean()).softmax(-1) @ v, "scaled by a tensor",
    ),
    "scaled by its own norm": (
        lambda q, k, v: ((s := q @ k.mT) / s.norm(dim=-1, keepdim=True)).softmax(-1) @ v, "computed from them",
    ),
    "negative scale": (lambda q, k, v: (q @ k.mT * -0.5).softmax(-1) @ v, "its scale -0.5 is not positive"),
    "rounded": (lambda q, k, v: torch.div(q @ k.mT, 2.0, rounding_mode="floor").softmax(-1) @ v, "are rounded"),
    "in half precision": (lambda q, k, v: (q @ k.mT).bfloat16().softmax(-1).float() @ v,
                          "rounded to torch.bfloat16, its values are torch.float32"),
    "filled, and then added to": (
        lambda q, k, v: ((q @ k.mT).masked_fill(~causal(), -1e9) + v @ k.mT).softmax(-1) @ v,
        "and adds to them later, where it adds the values of",
    ),
    "less the largest of each column": (
        lambda q, k, v: ((s := q @ k.mT + hidden(q)) - s.amax(-2, keepdim=True)).softmax(-1) @ v,
        "it adds to its scores what was computed from them",
    ),
    "filled with -100": (lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -100.0).softmax(-1) @ v,
                         "it fills hidden scores with -100"),
    "filled with values": (lambda q, k, v: torch.where(causal(), q @ k.mT, v @ k.mT).softmax(-1) @ v,
                           "it fills hidden scores with a value that is not known"),
    "clamped": (lambda q, k, v: (q @ k.mT).clamp(-3, 3).softmax(-1) @ v, "it clamps its scores"),
    "clamped above": (lambda q, k, v: (q @ k.mT).clamp(max=3.0).softmax(-1) @ v, "it clamps its scores"),
    "not below -100": (lambda q, k, v: torch.maximum(q @ k.mT, torch.tensor(-100.0)).softmax(-1) @ v, "it clamps"),
    "not below others": (lambda q, k, v: torch.max(q @ k.mT, v @ k.mT).softmax(-1) @ v, "it clamps its scores"),
    "not below -1e9, and then added to": (
        lambda q, k, v: ((q @ k.mT + hidden(q)).clamp(min=-1e9) + v @ k.mT).softmax(-1) @ v, "adds to them later",
    ),
    "exp over more than its sum": (
        lambda q, k, v: ((w := (q @ k.mT).exp()) / (w.sum(-1, keepdim=True) + 1)) @ v, "not divided by their sum alone",
    ),
    "exp over the sum of others": (
        lambda q, k, v: ((w := (q @ k.mT).exp()) / w.mT.sum(-1, keepdim=True)) @ v, "not divided by their sum alone",
    ),
    "exp over the sum of queries": (
        lambda q, k, v: ((w := (q @ k.mT).exp()) / w.sum(-2, keepdim=True)) @ v, "not divided by their sum alone",
    ),
    "exp of another log_softmax": (
        lambda q, k, v: F.log_softmax(q @ k.mT, -2).exp() @ v, "its softmax is over dimension -2 of 4",
    ),
    "sigmoid": (lambda q, k, v: (q @ k.mT * 0.5).sigmoid() @ v, "by 'sigmoid' of its scores, not by their softmax"),
    "squares": (lambda q, k, v: F.relu(q @ k.mT).square() @ v, "by 'relu' of its scores, not by their softmax"),
    "heads mixed before": (lambda q, k, v: mix(q @ k.mT).softmax(-1) @ v, "it mixes its heads"),
    "heads mixed after": (lambda q, k, v: mix((q @ k.mT).softmax(-1)) @ v, "it mixes its heads"),
    "heads mixed by einsum": (
        lambda q, k, v: torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), MIX) @ v, "it mixes its heads",
    ),
    "heads mixed by a convolution": (
        lambda q, k, v: F.conv2d((q @ k.mT).softmax(-1), MIX[:, :, None, None]) @ v, "it mixes its heads",
    ),
    "weights cut to a band": (
        lambda q, k, v: F.pad((q @ k.mT).softmax(-1)[..., :-2], (2, 0)) @ v, "its attention weights are sliced",
    ),
    "weights are written": (written_weights, "used more than once"),
    "scores are written": (written_scores, "written by something else"),
    "keys are written": (written_keys, "is written between its two products"),
    "a mask is written": (written_mask, "is written between its two products"),
    "weights that are not 0 are set to 0": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(~causal(), 0.0) @ v, "whose scores are not hidden",
    ),
    "more weights than are 0 are set to 0": (
        lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -1e9).softmax(-1).masked_fill(~causal().tril(-1), 0.0) @ v,
        "whose scores are not hidden",
    ),
    "weights are set to 0 the other way round": (
        lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -1e9).softmax(-1).masked_fill(causal(), 0.0) @ v,
        "whose scores are not hidden",
    ),
    "weights are set to 1": (
        lambda q, k, v: (q @ k.mT).masked_fill(~causal(), -1e9).softmax(-1).masked_fill(~causal(), 1.0) @ v,
        "given to 'masked_fill'",
    ),
    "NaN becomes another number": (
        lambda q, k, v: (q @ k.mT).softmax(-1).nan_to_num(nan=0.5) @ v, "another number than 0",
    ),
    "no gradients": (without_gradients, "gradients are switched on or off inside it"),
    "transposed weights": (lambda q, k, v: (q @ k.mT).softmax(-1).transpose(-1, -2) @ v, "given to 'transpose'"),
    "added to the result": (
        lambda q, k, v: torch.baddbmm(heads(q), (heads(q) @ heads(k).mT).softmax(-1), heads(v)), "baddbmm",
    ),
    "multiplied by a mask of more": (
        lambda q, k, v: two_masks_multiplied(q, k, v, torch.ones(L, L).tril(-1)), "scaled by a tensor",
    ),
    "multiplied by its mask alone": (lambda q, k, v: (q @ k.mT * causal()).softmax(-1) @ v, "scaled by a tensor"),
    "multiplied by its mask behind it": (
        lambda q, k, v: ((q @ k.mT).masked_fill(~causal(), -1e9) * causal()).softmax(-1) @ v, "scaled by a tensor",
    ),
    "multiplied by twice its mask": (
        lambda q, k, v: ((q @ k.mT) * (causal() * 2.0) - 1e10 * (~causal()).float()).softmax(-1) @ v, "scaled by a",
    ),
    "multiplied by its mask, hidden by too little": (
        lambda q, k, v: ((q @ k.mT) * causal() - 1e4 * (~causal()).float()).softmax(-1) @ v, "it adds -10000",
    ),
    "multiplied by an input": (
        lambda q, k, v: ((q @ k.mT) * v[..., :1].mT).masked_fill(~causal(), -1e9).softmax(-1) @ v, "scaled by a tensor",
    ),
    "dropped in place": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3, True, True) @ v, "in place"),
    "dropped twice": (lambda q, k, v: F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.3), 0.2) @ v,
                      "drops attention weights twice"),
    "keys of one sequence of windows": (
        lambda q, k, v: (q[:, None] @ k[:1, None].mT).softmax(-1) @ v[:1, None], "what comes before the heads",
    ),
    "keys of one of many windows, values of all": (
        lambda q, k, v: (q[None] @ k[None, :1].mT).softmax(-1) @ v[None], "what comes before the heads",
    ),
    "one query for many heads of keys": (
        lambda q, k, v: (q[:, :1] @ k.mT).softmax(-1) @ v, "its query is of (2, 1, 12), and its scores have 4 heads",
    ),
    "an einsum of vectors": (
        lambda q, k, v: torch.einsum("j,jd->d", torch.einsum("d,jd->j", q[0, 0, 0], k[0, 0]).softmax(-1), v[0, 0]),
        "is not a batch of products",
    ),
    "an einsum of transposed weights": (
        lambda q, k, v: torch.einsum("bhji,bhjd->bhid", (q @ k.mT).softmax(-1).mT, v), "given to",
    ),
    "one query, many biases": (
        lambda q, k, v: (q[:, :, :1] @ k.mT + v.sum(-1, keepdim=True)).softmax(-1) @ v,
        "its scores are (2, 4, 1, 12) and later",
    ),
    "a bias that scores overwrite": (scores_as_bias, "it adds to its scores what was computed from them"),
    "autocast inside": (without_autocast, "autocast is switched on or off inside it"),
    "one matrix of keys": (
        lambda q, k, v: torch.matmul(torch.matmul(heads(q), heads(k)[:1].mT).softmax(-1), heads(v)),
        "its scores are of (8,) and its keys or values of (1,)",
    ),
    "keys for all": (lambda q, k, v: (q @ k[0, 0].mT).softmax(-1) @ v, "of 4 and 2 dimensions"),
    "keys of one sequence": (lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v[:1], "has batch size 1, its query 2"),
    "an einsum that sums": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqd", (q @ k.mT).softmax(-1), v), "is not a batch of products",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_with_their_reason_and_left_alone(name: str) -> None:
    f, words = NEAR_MISSES[name]
    q, k, v = tensors()
    g, found = compiled(f, Policy(methods=("exact",)))
    torch.manual_seed(0)
    out = g(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(out, f(q, k, v))
    ((site, decision),) = found
    assert site.refusal is not None and words in site.refusal, site.refusal
    assert decision.verdict == "refused" and decision.reason == site.refusal


LISTED: dict[str, tuple[Callable, list[str]]] = {
    "differential": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) - 0.3 * (v @ k.mT).softmax(-1)) @ v,
        ["taken from them (differential attention)", "are multiplied before"],
    ),
    "in chunks": (
        lambda q, k, v: F.pad(
            torch.einsum("bhcxd,bhcyd->bhcxy", q.unflatten(2, (3, 4)), k.unflatten(2, (3, 4))).softmax(-1), (0, 1)
        )[..., :-1] @ v.unflatten(2, (3, 4)),
        ["given to 'pad'"],
    ),
    "flex_attention": (lambda q, k, v: flex_attention(q, k, v), ["it is flex_attention"]),
    "a kernel": (
        lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
        ["it calls the kernel aten._scaled_dot_product_flash_attention_for_cpu"],
    ),
    "two heads' exponentials": (
        lambda q, k, v: ((q @ k.mT).exp() @ v) / (q @ k.mT).exp().sum(-1, keepdim=True), ["exponentials"],
    ),
    # no attention over keys
    "a router": (lambda q, k, v: F.linear(q, v[0, 0, :5]).softmax(-1) @ v[:, :, :5], []),
    "linear attention": (lambda q, k, v: F.linear(q, MIX8).softmax(-1) @ (F.linear(k, MIX8).softmax(-2).mT @ v), []),
    "kernel attention": (lambda q, k, v: F.relu(q) @ (F.relu(k).mT @ v), []),
    "classes": (lambda q, k, v: (q @ k.mT).mean(1).flatten(1).softmax(-1), []),
    "experts": (lambda q, k, v: F.relu(q @ EXPERTS.mT) @ EXPERTS, []),
    "retention": (lambda q, k, v: (q @ k.mT * causal()) @ v, []),
    "a loss of contrasts": (lambda q, k, v: F.log_softmax(q[0, 0] @ k[0, 0].mT, -1).diagonal().exp().sum(), []),
}  # fmt: skip
MIX8, EXPERTS = torch.randn(D, D), nn.Parameter(torch.randn(B, H, 9, D))


@pytest.mark.parametrize("name", LISTED)
def test_attention_that_is_not_read_is_listed_with_its_line_and_nothing_else_is(name: str) -> None:
    f, words = LISTED[name]
    q, k, v = tensors()
    report = explain(f, q, k, v, methods=["exact"])
    assert len(report.sites) == len(words)
    for site, part in zip(report.sites, words, strict=True):
        assert site.verdict == "refused" and part in site.reason, site.reason
        assert site.source.startswith(__file__) and site.form in ("softmax", "not matched")
    g, _ = compiled(f, Policy(methods=("exact",)))
    assert torch.equal(g(q, k, v), f(q, k, v))


def test_a_mask_value_in_a_buffer_is_known() -> None:
    """GPT-Neo, and GPT-2 of old: ``where(bias, scores, masked_bias)``."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.ones(1, 1, 2 * L, 2 * L, dtype=torch.bool).tril())
            self.register_buffer("masked_bias", torch.tensor(-1e9))

        def forward(self, q, k, v):
            return torch.where(self.bias[:, :, :L, :L], q @ k.mT, self.masked_bias).softmax(-1) @ v

    block = Block()
    (site,) = explain(block, *tensors(), methods=["exact"]).sites
    assert (site.mask, site.verdict) == ("causal", "rewritten")
    block.masked_bias.fill_(-100.0)
    (site,) = explain(block, *tensors(), methods=["exact"]).sites
    assert site.verdict == "refused" and "it fills hidden scores with -100" in site.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.roll(1, 1),
        lambda m: m & (torch.arange(L) != 3),
        lambda m: torch.ones(L, L, dtype=torch.bool).tril(1),
        lambda m: m ^ ((torch.arange(L)[:, None] == 3) & (torch.arange(L) == 5)),
    ],
    ids=["rolled", "a hole", "one more", "one element"],
)
def test_almost_causal_masks_stay_what_they_are(change: Callable) -> None:
    """Under Express they are refused or carried out exactly as they are; under exact attention they are kept."""
    q, k, v = tensors()

    def f(q, k, v):
        return (q @ k.mT).masked_fill(~change(causal()), -math.inf).softmax(-1) @ v

    for policy in (Policy(methods=("exact",)), Policy(methods=("express",), budget=64)):
        g, found = compiled(f, policy)
        assert relative(g(q, k, v), f(q, k, v)) < 1e-6
        assert str(found[0][0].spec.mask) != "causal"


def test_nothing_of_scores_that_were_written_in_place_is_left() -> None:
    """Neither their product nor what wrote into it; but all of it where the scores are a result, too."""

    def kept(q, k, v):
        s = q @ k.mT
        s.mul_(0.5)
        s.masked_fill_(~causal(), -math.inf)
        return s.softmax(-1) @ v, s

    q, k, v = tensors()
    for f, products in ((in_place_by_statements, 0), (kept, 1)):
        graphs: list[torch.fx.GraphModule] = []

        def backend(gm: torch.fx.GraphModule, _: list[Any], graphs: list[Any] = graphs) -> Callable:
            rewrite(gm, plan_sites(find_sites(gm), EXACT), EXACT)
            graphs.append(gm)
            return gm

        torch._dynamo.reset()
        out, truth = torch.compile(f, backend=backend)(q, k, v), f(q, k, v)
        for ours, theirs in zip(out if products else (out,), truth if products else (truth,), strict=True):
            hidden = theirs.isinf()
            assert torch.equal(ours.isinf(), hidden) and relative(ours[~hidden], theirs[~hidden]) < 1e-6
        names = [node.name for node in graphs[0].graph.nodes]
        assert sum("matmul" in name or name == "s" for name in names) == products
        assert sum(name.endswith("_") and not name.startswith("l_") for name in names) == 2 * products


def test_a_write_through_a_view_of_an_input_stays() -> None:
    def f(q, k, v):
        k = torch.einsum("bhld->bhdl", k)
        k.mul_(0.5)
        return (q @ k).softmax(-1) @ v

    (q, k, v), (_, ours, _) = tensors(), tensors()
    g, _ = compiled(f)
    assert relative(g(q, ours, v), f(q, k, v)) < 1e-6 and torch.equal(ours, k)


def test_leading_dimensions_come_back_if_at_most_one_is_unknown() -> None:
    def f(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    for shape, unknown, verdict in (
        ((2, 3, H, L, D), (0,), "rewritten"),
        ((2, 3, H, L, D), (0, 1), "refused"),
        ((0, 3, H, L, D), (1,), "refused"),
    ):
        inputs = tensors(*[shape] * 3)
        for x in inputs:
            for dim in unknown:
                torch._dynamo.mark_dynamic(x, dim)
        g, found = compiled(f, Policy(methods=("exact",)))
        out = g(*inputs)
        assert out.shape == shape and torch.allclose(out, f(*inputs), atol=1e-6)
        assert [plan.verdict for _, plan in found] == [verdict]


def test_numbers_in_tensors_are_those_that_the_scores_met() -> None:
    """Which may be others at the softmax: a scale, a value that is filled in and a constant that is added."""

    def f(q, k, v):
        scale, lowest, shift = torch.full((), 0.5), torch.full((), -1e9), torch.full((L,), 2.0)
        scale.mul_(0.5)
        s = torch.where(causal(), q @ k.mT * scale, lowest) + shift
        for x in (scale, lowest, shift):
            x.fill_(3.0)
        return s.softmax(-1) @ v

    g, found = compiled(f)
    assert relative(g(*tensors()), f(*tensors())) < 1e-6
    assert [(site.spec.scale, str(site.spec.mask), plan.verdict) for site, plan in found] == [
        (0.25, "causal", "rewritten")
    ]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_padding_per_matrix_of_three_dimensions_is_one(checkpointed: bool) -> None:
    """As cross attention of latent diffusion has it: repeated for the heads, and filled in in place."""

    def attend(q, k, v, real):
        s = torch.einsum("b i d, b j d -> b i j", heads(q), heads(k))
        s.masked_fill_(~real[:, None].repeat_interleave(H, 0), -torch.finfo(s.dtype).max)
        return torch.einsum("b i j, b j d -> b i d", s.softmax(dim=-1), heads(v))

    def f(q, k, v, real):
        return checkpoint(attend, q, k, v, real, use_reentrant=False) if checkpointed else attend(q, k, v, real)

    real = torch.arange(L) < torch.tensor([[L], [L - 3]])
    for policy in (EXACT, Policy(methods=("thinformer",), budget=64)):
        site = check(f, [*tensors(), real], "key padding", 1.0, policy)
        assert (site.spec.B, site.spec.H) == (B * H, 1)


def test_a_padding_that_needs_a_gradient_stays_exact() -> None:
    """Thinformer has none for it. Learned masks are such ones, ``(1 - m) * -1e9`` with an m of 0 and 1."""

    class Masked(nn.Module):
        def forward(self, q, k, v, m):
            return (q @ k.mT + (1 - m)[:, None, None] * -1e9).softmax(-1) @ v

    m = torch.ones(B, L).index_fill(1, torch.tensor([L - 1]), 0.0)
    model, found = rewrite_attention(Masked(), methods=["thinformer"], budget=64), []
    for leaf in (False, True):
        inputs = [*(x.requires_grad_() for x in tensors()), m.clone().requires_grad_(leaf)]
        with record_sites() as sites:
            out = model(*inputs)
        found += [site.verdict for site in sites]
        leaves = inputs if leaf else inputs[:3]
        weight = torch.arange(float(D))
        gradients = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, Masked()(*inputs)))
        assert all(relative(*pair) < 1e-5 for pair in zip(*gradients, strict=True))
    assert found == ["rewritten", "refused"] and "it needs a gradient" in sites[0].reason


def test_explain_names_form_mask_and_reason(shipped_rates: None) -> None:
    (site,) = explain(in_place, *tensors(), methods=["exact"]).sites
    assert (site.form, site.mask, site.method, site.verdict) == ("softmax", "causal", "exact", "rewritten")
    assert site.reason == "methods names 'exact' first; as scaled_dot_product_attention"
    (site,) = explain(in_place, *tensors()).sites
    assert site.verdict == "exact" and "exact attention" in site.reason
