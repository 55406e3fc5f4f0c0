"""Bernoulli score sampling: the query rounded at random, so that keys need not be read in full (SANTA, Section 4).

    q^_d = sign(q_d) (nu / L) (floor(r_d) + [U_d < frac(r_d)]),    r_d = L |q_d| / nu,    nu = max_d |q_d|

Unbiased, ``E[q^] = q``, so scores are too; their variance is ``sum_d (nu / L)^2 f_d (1 - f_d) k_d^2`` times the scale
squared, with ``f_d = frac(r_d)``: it falls like ``1 / L^2``. The softmax of unbiased scores is *biased*, also in
``1 / L^2`` and also over any number of seeds.

What it saves: a feature d whose rounded entry is 0 for all queries of a KV head is not read; ``min(1, r_d)`` is the
probability that one query needs it. It pays only where the keys lie feature by feature, ``[B, H_kv, D, n]`` in memory
(:func:`feature_major`): elsewhere a skipped feature shares its 32 bytes with others that are
read. It hardly pays for grouped queries, each of which needs other features. The share of the features that is read
(:func:`feature_probability`), D = 128, by one query and by 4 independent ones of a KV head: L = 4 73% and 99% for
Gaussian queries, 55% and 96% for Laplacian ones; L = 8 86% and 100%, 73% and 99%.

Paper: *SANTA*, arXiv 2605.01910, where L is B, the number of ternary vectors whose mean ``q^`` is.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch

from ..launch import (
    Random,
    constexpr,
    draw_uniform,
    jit,
    launch,
    next_power_of_two,
    philox_uniform,
    sequence,
    strided,
    tl,
)

MAX_LEVELS = 256  # bfloat16 holds the integers up to here
BUCKET = constexpr((1 << 30) + 2)  # word of the random counter; those before it belong to the draws of value rows


def check_levels(levels: Any) -> None:
    """Raise ``ValueError`` unless ``levels`` is an integer from 0 (off) to 256."""
    if not isinstance(levels, int) or isinstance(levels, bool) or not 0 <= levels <= MAX_LEVELS:
        raise ValueError(f"bernoulli={levels!r}: must be an integer from 0 (off) to {MAX_LEVELS}, the levels")


def _unit(q: torch.Tensor, levels: int) -> torch.Tensor:
    top = q.abs().amax(-1, keepdim=True)
    return torch.where(top == 0, 1.0, top) / levels


def own_numbers(head: torch.Tensor, group: int, seed: torch.Tensor) -> torch.Tensor:
    """The counters of query heads, ``group`` of which share a KV head: the upper half of ``seed``, which is added to
    them, counts KV heads."""
    return head + (group - 1) * (seed.to(head.device) >> 32)


def round_query(
    query: torch.Tensor, levels: int, seed: torch.Tensor, layer: int, step: torch.Tensor, group: int = 1
) -> torch.Tensor:
    """``query`` ``[B, H, Lq, D]`` rounded at random to ``levels`` steps of its largest entry: float64 for float64,
    float32 for other dtypes, whose own rounding would be a bias.

    ``seed`` 0-dim int64; ``step`` int64 ``[B, Lq]``, the number of keys that every query sees; ``group`` query heads
    share a KV head.
    """
    q = query.double()
    unit = _unit(q, levels)
    head = own_numbers(torch.arange(query.shape[1], device=query.device), group, seed)[:, None, None]
    place = torch.arange(query.shape[-1], device=query.device)
    u = philox_uniform(seed, layer, place, int(BUCKET), step[:, None, :, None], head).double() + 2.0**-25
    ratio = (q / unit).abs()
    rounded = q.sign() * unit * (ratio.floor() + (u < ratio.frac()))
    return rounded if query.dtype == torch.float64 else rounded.float()


def feature_probability(query: torch.Tensor, H_kv: int, levels: int) -> torch.Tensor:
    """The probability that a KV head reads a feature, float64 ``[B, H_kv, D]``; its mean is the share of keys read.

    ``query`` ``[B, H, Lq, D]``.
    """
    q = query.double()
    needed = (q / _unit(q, levels)).abs().clamp(max=1)
    return 1 - (1 - needed.unflatten(1, (H_kv, -1))).prod(3).prod(2)


@jit
def is_whole(step, p_draws, exact_below, reach):
    """Whether a sequence is to be exact: it has few keys in reach, or a negative number of draws."""
    return (tl.minimum(step, reach) < exact_below) | (tl.load(p_draws) < 0)


# Keys of a sequence, real ones among them, and which those are; the stride of padding.
_Masks = namedtuple("_Masks", "step lengths padding stride")


# What :func:`is_whole` asks, and the stride of draws.
Exact = namedtuple("Exact", "draws below reach stride")


@jit(general="random exact sizes")
def _round_kernel(q, random, masks, exact, outputs, sizes, SHAPE: tl.constexpr):
    LQ: tl.constexpr = SHAPE.LQ
    D: tl.constexpr = SHAPE.D
    p_counts, p_unit = outputs
    H, n, levels, group = sizes
    i_row = tl.program_id(0)
    i_b, i_h, i_q = i_row // (H * LQ), i_row // LQ % H, i_row % LQ
    o_d = tl.arange(0, SHAPE.BD)
    p_q, stride_q = sequence(q, i_b, i_h)
    p_q += i_q * stride_q
    # the interpreter knows no way from bfloat16 to float64 but this one
    b_q = tl.load(p_q + o_d, mask=o_d < D, other=0.0).to(tl.float32).to(tl.float64)
    # the last query sees `step` keys, and this one those of them that are not behind its own
    end = n
    if masks.lengths is not None:
        end = tl.load(masks.lengths + i_b).to(tl.int32)
    o_behind = end - LQ + 1 + i_q + tl.arange(0, 16)
    m_behind = (o_behind >= 0) & (o_behind < end)
    if masks.padding is not None:
        m_behind &= tl.load(masks.padding + i_b.to(tl.int64) * masks.stride + o_behind, mask=m_behind, other=0) != 0
    step = tl.load(masks.step + i_b).to(tl.int32)
    whole = False
    if exact.draws is not None:
        whole = is_whole(step, exact.draws + i_b * exact.stride, exact.below, exact.reach)
    step -= tl.sum(m_behind.to(tl.int32), 0)
    b_seed = tl.load(random.seed)
    head = i_h + (group - 1) * (b_seed >> 32).to(tl.int32)  # as own_numbers()
    b_u = draw_uniform(b_seed, random.layer, o_d, BUCKET, step, head).to(tl.float64)
    b_abs = tl.abs(b_q)
    top = tl.max(b_abs, 0)
    unit = tl.where(top == 0, 1.0, top) / levels
    b_ratio = b_abs / unit
    b_floor = tl.floor(b_ratio)
    b_count = b_floor + (b_u + 2.9802322387695312e-08 < b_ratio - b_floor).to(tl.float64)
    b_count = tl.where(b_q < 0, -b_count, b_count)
    b_count, unit = tl.where(whole, b_q, b_count).to(tl.float32), tl.where(whole, 1.0, unit)
    tl.store(p_counts + i_row.to(tl.int64) * D + o_d, b_count.to(p_counts.dtype.element_ty), mask=o_d < D)
    tl.store(p_unit + i_row, unit.to(tl.float32))


_Shape = namedtuple("_Shape", "LQ D BD")


def round_query_triton(
    query: torch.Tensor,
    keys: int,
    levels: int,
    random: Random,
    step: torch.Tensor,
    padding: torch.Tensor | None,
    lengths: torch.Tensor | None,
    exact: Exact | None = None,
    group: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`round_query` as integers, ``[B, H, Lq, D]`` in the query's dtype, and their unit, float32 ``[B, H, Lq]``.

    ``keys`` is ``Lk``; ``step`` int64 ``[B]``, those that the last query sees; ``padding`` uint8 ``[B, Lk]``; both, and
    ``lengths``, of unit stride; ``Lq`` at most 16. The query of a sequence that is ``exact`` is left as it is. The
    product of the two results is the reference's, up to the rounding of the unit.
    """
    (B, H, Lq, D), device = query.shape, query.device
    counts = torch.empty(B, H, Lq, D, dtype=query.dtype, device=device)
    unit = torch.empty(B, H, Lq, dtype=torch.float32, device=device)
    launch(_round_kernel, (B * H * Lq,),
        strided(query), random, _Masks(step, lengths, padding, 0 if padding is None else padding.stride(0)),
        exact or Exact(None, 0, 0, 0), (counts, unit), (H, keys, levels, group),
        SHAPE=_Shape(Lq, D, max(16, next_power_of_two(D))), num_warps=1, num_stages=1,
    )  # fmt: skip
    return counts, unit
