"""Selected pages: the blocks of 64 keys that the queries of a decoding step attend to most, as far as means tell.

Keys are averaged in eights (*means*, an eighth of the keys, kept as tokens arrive: :func:`update_means`). A page of 64
keys is worth the mass that its eight means get, softmax over all means of the sequence, summed over the queries and the
query heads of the KV head: one choice for all of them. The first ``sinks`` and the last ``recent`` tokens are in any
case on the list, and then the best ``pages`` (masses rounded down to 8 bits; of equal ones the earlier page).

In general two launches choose: :func:`_score_kernel` reads the means, :func:`_list_kernel` compares the pages of a KV
head. For a step of one token over held rows :func:`_step_kernel` does both and holds the token, in one launch.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..launch import (
    FLOAT32_DOT,
    Widths,
    head_of,
    is_last,
    jit,
    launch,
    load_queries,
    load_rows,
    next_power_of_two,
    require_triton,
    sequence,
    strided,
    tl,
)
from .blocks import NONE

PAGE, SUB = 64, 8
_TILE = 64  # means of a product
_WARPS = 2112  # of all programs, sixteen per multiprocessor of an H200
_LISTED = 64  # log-sum-exps that a thread has at once
_LOG2_E = 1.4426950408889634


def listed(pages: int, sinks: int, recent: int) -> int:
    """How long the list is: ``recent`` tokens may begin within a page."""
    return pages + -(-sinks // PAGE) + -(-recent // PAGE) + 1


# ---- reference -----------------------------------------------------------------------------------------------------


def means_reference(key: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Means ``[B, H_kv, ceil(L / 8), D]`` of the keys that there are, ``there`` bool ``[B, L]``; 0 where there are
    none."""
    short = -key.shape[2] % SUB
    there = pad(there, (0, short)).unflatten(1, (-1, SUB))[:, None, ..., None]
    keys = pad(key, (0, 0, 0, short)).unflatten(2, (-1, SUB)).to(torch.promote_types(key.dtype, torch.float32))
    return (keys.masked_fill(~there, 0).sum(3) / there.sum(3).clamp(min=1)).to(key.dtype)


def page_mass(
    query: torch.Tensor, means: torch.Tensor, scale: float, first: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """Mass of every page, float32 ``[B, H_kv, P]`` (float64 for float64); 0 where it is NaN. ``first``, ``end``:
    integers ``[B]``, the first token and the one behind the last."""
    H_kv, S = means.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.unflatten(1, (H_kv, -1)).flatten(2, 3).to(dtype) * scale @ means.to(dtype).mT
    token = SUB * torch.arange(S, device=query.device)
    there = (token < end[:, None]) & (token + SUB > first[:, None])
    weights = scores.masked_fill(~there[:, None, None], -math.inf).softmax(-1)
    return pad(weights, (0, -S % (PAGE // SUB))).unflatten(-1, (-1, PAGE // SUB)).sum((-1, 2)).nan_to_num(0)


def choose_reference(
    query: torch.Tensor, means: torch.Tensor, scale: float, span: tuple[torch.Tensor, torch.Tensor],
    pages: int, sinks: int, recent: int,
) -> torch.Tensor:  # fmt: skip
    """The pages to read, the definition of correct: int32 ``[B, H_kv, listed]``, ascending, ``NONE`` behind.

    ``query`` ``[B, H, n, D]``, ``means`` ``[B, H_kv, S, D]``; ``span``: ``first`` and ``end`` of :func:`page_mass`.
    """
    mass = page_mass(query, means, scale, *span)
    page = torch.arange(mass.shape[-1], device=mass.device)
    rank = mass.float().view(torch.int32) >> 16
    first, end = (x[:, None] for x in span)
    kept = (PAGE * page < first + sinks) | (PAGE * (page + 1) > end - recent)
    there = (PAGE * page < end) & (PAGE * (page + 1) > first)
    rank = torch.where(kept[:, None], 1 << 15, rank).masked_fill(~there[:, None], NONE)
    count = listed(pages, sinks, recent)
    best = rank.sort(dim=-1, descending=True, stable=True)
    held = best.indices[..., :count].masked_fill(best.values[..., :count] < 0, 1 << 30)
    held = pad(held, (0, max(0, count - held.shape[-1])), value=1 << 30).sort(-1).values
    return held.masked_fill(held == 1 << 30, NONE).to(torch.int32)


# ---- kernels -------------------------------------------------------------------------------------------------------


# KV heads, those of the layer, query heads of one, rows of keys, means, pages on the list, and tokens that are on it.
_Sizes = namedtuple("_Sizes", "KVH H G L S listed sinks recent", defaults=(0, 0, 0))


# The first token of every sequence, and the one behind the last.
_Spans = namedtuple("_Spans", "first end")


# Rows of a KV head (LQ queries of each of its query heads), columns, their tiles, means of a tile; of the list the
# tiles of pages, of rows that are added up at once, and of places; log-sum-exps of a KV head.
_Shape = namedtuple("_Shape", "LQ R D BD BM BS SUB PAGE DV BDV BC BR BB LSE", defaults=(0, 0, 0, 0, 0, 0))


@jit(general="sizes new")
def _means_kernel(means, k, spans, sizes, new, SHAPE: tl.constexpr):
    """Means of the eights that hold the last ``new`` tokens."""
    BD: tl.constexpr = SHAPE.BD
    BS: tl.constexpr = SHAPE.BS
    SUB: tl.constexpr = SHAPE.SUB
    D: tl.constexpr = SHAPE.D
    i_seq = tl.program_id(1)
    i_b, i_kv = i_seq // sizes.KVH, i_seq % sizes.KVH
    first, end = tl.load(spans.first + i_b).to(tl.int32), tl.load(spans.end + i_b).to(tl.int32)
    sub = tl.maximum(end - new, 0) // SUB + tl.program_id(0) * BS
    o_n, o_s, o_d = sub * SUB + tl.arange(0, BS * SUB), sub + tl.arange(0, BS), tl.arange(0, BD)
    p_k, stride_k = sequence(k, i_b, i_kv)
    m_n = (o_n >= first) & (o_n < end)
    b_k = load_rows(p_k, stride_k, o_n, m_n, D, BD).to(tl.float32)  # [BS * SUB, BD]
    b_sum = tl.sum(tl.reshape(b_k, [BS, SUB, BD]), 1)
    b_count = tl.minimum(end, (o_s + 1) * SUB) - tl.maximum(first, o_s * SUB)
    b_mean = b_sum / tl.maximum(b_count, 1).to(tl.float32)[:, None]
    p_out, stride = sequence(means, i_b, i_kv)
    m_out = (o_s * SUB < end)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + o_s.to(tl.int64)[:, None] * stride + o_d[None, :], b_mean.to(means.p.dtype.element_ty), mask=m_out)


@jit
def _score(p_lse, b_q, p_mean, stride, span, share, scale_log2, SHAPE: tl.constexpr):
    """Log-sum-exp of pages for every row, ``[R, BC]`` of a KV head, base 2. ``share`` (i, n): of every n-th tile."""
    first, end = span
    i_split, splits = share
    BM: tl.constexpr = SHAPE.BM
    BS: tl.constexpr = SHAPE.BS
    IN_PAGE: tl.constexpr = SHAPE.PAGE // SHAPE.SUB
    PAGES: tl.constexpr = SHAPE.BS // (SHAPE.PAGE // SHAPE.SUB)
    o_m, o_s, o_p = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, PAGES)
    for t in range(i_split, tl.cdiv(tl.cdiv(end, SHAPE.SUB), BS), splits):
        o_mean = t * BS + o_s
        m_s = (o_mean * SHAPE.SUB < end) & ((o_mean + 1) * SHAPE.SUB > first)
        b_mean = load_rows(p_mean, stride, o_mean, m_s, SHAPE.D, SHAPE.BD)  # [BS, BD]
        b_s = tl.dot(b_q, tl.trans(b_mean), input_precision=FLOAT32_DOT) * scale_log2
        b_s = tl.reshape(tl.where(m_s[None, :], b_s, float("-inf")), [BM, PAGES, IN_PAGE])
        b_top = tl.maximum(tl.max(b_s, 2), -1e30)
        b_sum = tl.sum(tl.exp2(b_s - b_top[:, :, None]), 2)
        b_lse = tl.where(b_sum > 0, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
        b_lse = tl.where(b_sum != b_sum, b_sum, b_lse)
        tl.store(p_lse + o_m[:, None] * SHAPE.BC + t * PAGES + o_p[None, :], b_lse, mask=(o_m < SHAPE.R)[:, None])


@jit
def _list(p_chosen, p_lse, p_newest, first, scored, end, sizes, SHAPE: tl.constexpr):
    """List the pages by the log-sum-exp of the means of the tokens from ``first`` to ``scored``, and of the one mean
    behind them if there is a ``p_newest``."""
    R: tl.constexpr = SHAPE.R
    BC: tl.constexpr = SHAPE.BC
    BR: tl.constexpr = SHAPE.BR
    BB: tl.constexpr = SHAPE.BB
    PAGE: tl.constexpr = SHAPE.PAGE
    wanted, sinks, recent = sizes.listed, sizes.sinks, sizes.recent
    o_c, o_r, o_b = tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BB)
    m_x = (o_c * PAGE < scored) & ((o_c + 1) * PAGE > first)
    b_mass = tl.zeros([BC], tl.float32)
    for r in range(0, R, BR):
        # no mask, which would keep loads from being wide: there is memory for all rows of a tile, whatever it holds
        b_x = tl.load(p_lse + (r + o_r)[:, None] * BC + o_c[None, :], cache_modifier=".cg")
        b_x = tl.where((r + o_r < R)[:, None] & m_x[None, :], b_x, float("-inf"))
        b_top = tl.maximum(tl.max(b_x, 1), -1e30)
        if p_newest is not None:
            b_newest = tl.load(p_newest + r + o_r, mask=r + o_r < R, other=float("-inf"), cache_modifier=".cg")
            b_top = tl.maximum(b_top, b_newest)
        b_p = tl.exp2(b_x - b_top[:, None])
        b_sum = tl.sum(b_p, 1)
        if p_newest is not None:
            b_sum += tl.exp2(b_newest - b_top)
        b_mass += tl.sum(b_p * (1 / tl.maximum(b_sum, 1e-30))[:, None], 0)
    b_rank = tl.where(b_mass == b_mass, b_mass, 0.0).to(tl.int32, bitcast=True) >> 16
    # 3**9 - 1 is more than the rank of any mass: of 2**26 it is 19,584
    b_rank = tl.where((o_c * PAGE < first + sinks) | ((o_c + 1) * PAGE > end - recent), 19682, b_rank)
    b_rank = tl.where((o_c * PAGE < end) & ((o_c + 1) * PAGE > first), b_rank, -1)
    # two counts in a word, which saves sums over all threads, and they take longest
    WORD: tl.constexpr = tl.int32 if BC < 1 << 15 else tl.int64
    HALF: tl.constexpr = 16 if BC < 1 << 15 else 32
    LOW: tl.constexpr = (1 << HALF) - 1
    least, step = 0, 6561  # the largest rank that as many as are wanted reach, its nine digits of base 3 one by one
    for _ in range(9):
        reached = tl.sum((b_rank >= least + step).to(WORD) + ((b_rank >= least + 2 * step).to(WORD) << HALF))
        digit = ((reached & LOW) >= wanted).to(tl.int32) + ((reached >> HALF) >= wanted).to(tl.int32)
        least, step = least + digit * step, step // 3
    # pages that are better, and those that are as good, of which the first fill the list
    b_count = ((b_rank > least).to(WORD) << HALF) + (b_rank == least).to(WORD)
    total, b_before = tl.sum(b_count), tl.cumsum(b_count, 0) - b_count
    left = wanted - (total >> HALF)
    b_equal = b_before & LOW
    b_place = (b_before >> HALF) + tl.minimum(b_equal, left)
    tl.store(p_chosen + b_place, o_c, mask=(b_rank > least) | (b_rank == least) & (b_equal < left))
    count = (total >> HALF) + tl.minimum(total & LOW, left)
    tl.store(p_chosen + o_b, tl.full([BB], -1, tl.int32), mask=(o_b >= count) & (o_b < wanted))


@jit(general="sizes")
def _score_kernel(lse, q, means, spans, sizes, scale_log2, SHAPE: tl.constexpr):
    i_seq = tl.program_id(1)
    i_b, i_kv = i_seq // sizes.KVH, i_seq % sizes.KVH
    first, end = tl.load(spans.first + i_b).to(tl.int32), tl.load(spans.end + i_b).to(tl.int32)
    b_q = load_queries(q, i_b, i_kv, sizes.G, SHAPE)
    p_mean, stride = sequence(means, i_b, i_kv)
    p_lse = lse + i_seq.to(tl.int64) * SHAPE.LSE
    _score(p_lse, b_q, p_mean, stride, (first, end), (tl.program_id(0), tl.num_programs(0)), scale_log2, SHAPE)


@jit(general="sizes")
def _list_kernel(chosen, lse, spans, sizes, SHAPE: tl.constexpr):
    """One program per KV head."""
    i_seq = tl.program_id(0)
    first = tl.load(spans.first + i_seq // sizes.KVH).to(tl.int32)
    end = tl.load(spans.end + i_seq // sizes.KVH).to(tl.int32)
    p_lse = lse + i_seq.to(tl.int64) * SHAPE.LSE
    p_chosen = chosen + i_seq.to(tl.int64) * sizes.listed
    _list(p_chosen, p_lse, None, first, end, end, sizes, SHAPE)


Tokens = namedtuple("Tokens", "key value token log_weight means")
"""What KV heads hold, token i at place i, contiguous: ``[B, G, L, D]``, ``[B, G, L, Dv]``, int32 and float32
``[B, G, L]``, and means ``[B, G, ceil(L / 8), D]``."""


# The numbers of the KV heads, the tokens of every sequence, log-sum-exps of pages and of the newest means, the list,
# and how many programs of every KV head are done.
_Choice = namedtuple("_Choice", "heads end lse newest chosen done")


@jit(general="sizes")
def _step_kernel(held, q, k, v, choice, sizes, scale_log2, SHAPE: tl.constexpr):
    """The first program of a KV head adds the new token; its mean is scored apart, so that the others, which score the
    means before, need not wait for it. Whichever is done last lists the pages."""
    SUB: tl.constexpr = SHAPE.SUB
    D: tl.constexpr = SHAPE.D
    i_split, i_seq, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    i_b, i_head = i_seq // sizes.KVH, head_of(choice.heads, i_seq % sizes.KVH)
    o_seq, o_m = i_seq.to(tl.int64), tl.arange(0, SHAPE.BM)
    end = tl.load(choice.end + i_b)
    sub = (end - 1) // SUB
    b_q = load_queries(q, i_b, i_head, sizes.G, SHAPE)
    p_lse = choice.lse + o_seq * SHAPE.LSE
    p_newest = choice.newest + o_seq * SHAPE.R
    p_mean = held.means + o_seq * sizes.S * D
    if i_split == 0:
        o_n, o_d, o_dv = sub * SUB + tl.arange(0, SUB), tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
        m_d, m_dv = o_d < D, o_dv < SHAPE.DV
        b_new = tl.load(k.p + i_b.to(tl.int64) * k.b + i_head.to(tl.int64) * k.h + o_d, mask=m_d, other=0.0)
        b_v = tl.load(v.p + i_b.to(tl.int64) * v.b + i_head.to(tl.int64) * v.h + o_dv, mask=m_dv)
        b_k = load_rows(held.key + o_seq * sizes.L * D, D, o_n, o_n < end - 1, D, SHAPE.BD)
        b_k = tl.where((o_n == end - 1)[:, None], b_new[None, :], b_k).to(tl.float32)
        b_mean = (tl.sum(b_k, 0) / (end - sub * SUB).to(tl.float32)).to(b_new.dtype)
        o_place = o_seq * sizes.L + end - 1
        tl.store(held.key + o_place * D + o_d, b_new, mask=m_d)
        tl.store(held.value + o_place * SHAPE.DV + o_dv, b_v, mask=m_dv)
        tl.store(held.token + o_place, end - 1)
        tl.store(held.log_weight + o_place, 0.0)
        tl.store(p_mean + sub.to(tl.int64) * D + o_d, b_mean, mask=m_d)
        b_s = tl.sum(b_q.to(tl.float32) * b_mean.to(tl.float32)[None, :], 1) * scale_log2
        tl.store(p_newest + o_m, b_s, mask=o_m < SHAPE.R)
    else:
        _score(p_lse, b_q, p_mean, D, (0, sub * SUB), (i_split - 1, splits - 1), scale_log2, SHAPE)
    if is_last(choice.done + 2 * (i_b * sizes.H + i_head), splits):
        p_chosen = choice.chosen + o_seq * sizes.listed
        _list(p_chosen, p_lse, p_newest, 0, sub * SUB, end, sizes, SHAPE)


def update_means(
    means: torch.Tensor, key: torch.Tensor, first: torch.Tensor, end: torch.Tensor, new: int | None = None
) -> None:
    """Write the means of the eights that hold the last ``new`` tokens (all of them for None) into ``means``
    ``[B, H_kv, ceil(L / 8), D]``; ``first``, ``end`` as in :func:`page_mass`. Asks the device nothing."""
    if not key.is_cuda:
        place = torch.arange(key.shape[2], device=key.device)
        own = means_reference(key, (place >= first[:, None]) & (place < end[:, None]))
        since = torch.zeros_like(end) if new is None else (end - new).clamp(min=0) // SUB
        written = torch.arange(own.shape[2], device=key.device) >= since[:, None]
        means.copy_(torch.where(written[:, None, :, None], own, means))
        return
    means_triton(means, key, first, end, new)


def means_triton(
    means: torch.Tensor, key: torch.Tensor, first: torch.Tensor, end: torch.Tensor, new: int | None = None
) -> None:
    """:func:`update_means` by the kernel."""
    require_triton()
    (B, H_kv, L, D), new = key.shape, key.shape[2] if new is None else new
    BS = 16 if new > SUB * 4 else 2
    shape = _Shape(1, 1, D, max(16, next_power_of_two(D)), 16, BS, SUB, PAGE)
    launch(_means_kernel, (-(-(new // SUB + 2) // BS), B * H_kv),
        strided(means), strided(key), _Spans(first, end), _Sizes(H_kv, H_kv, 1, L, means.shape[2]), new,
        SHAPE=shape, num_warps=4,
    )  # fmt: skip


def _shape(Lq: int, R: int, means: torch.Tensor, value: torch.Tensor, count: int) -> tuple[_Shape, int, int]:
    """Tiles for R rows of a KV head and lists of so many pages; warps of a program, and stages of its pipeline."""
    S, (D, DV, BD, BDV), BM = means.shape[2], Widths.of(means, value), max(16, next_power_of_two(R))
    BC = max(32, next_power_of_two(-(-S * SUB // PAGE)))
    warps = 4 if BC <= 2048 else 8 if BC <= 8192 else 16
    BR = max(1, min(next_power_of_two(R), 32 * warps * _LISTED // BC))
    shape = _Shape(Lq, R, D, BD, BM, _TILE, SUB, PAGE, DV, BDV, BC, BR, next_power_of_two(count), -(-R // BR) * BR * BC)
    return shape, warps, 4 if BD * means.element_size() <= 256 else 2


def choose_triton(
    query: torch.Tensor, means: torch.Tensor, scale: float, span: tuple[torch.Tensor, torch.Tensor],
    pages: int, sinks: int, recent: int,
) -> torch.Tensor:  # fmt: skip
    """:func:`choose_reference` by the kernels, up to masses that rounding makes change places."""
    require_triton()
    (B, H, Lq), (H_kv, S), device = query.shape[:3], means.shape[1:3], query.device
    sequences, count = B * H_kv, listed(pages, sinks, recent)
    sizes, spans = (
        _Sizes(H_kv, H_kv, H // H_kv, S * SUB, S, count, sinks, recent),
        _Spans(*(x.contiguous() for x in span)),
    )
    chosen = torch.empty(B, H_kv, count, dtype=torch.int32, device=device)
    shape, warps, stages = _shape(Lq, H // H_kv * Lq, means, means, count)
    lse = torch.empty(sequences * shape.LSE, dtype=torch.float32, device=device)
    launch(_score_kernel, (min(-(-S // shape.BS), max(1, _WARPS // 4 // sequences)), sequences),
        lse, strided(query), strided(means), spans, sizes, scale * _LOG2_E, SHAPE=shape, num_warps=4, num_stages=stages,
    )  # fmt: skip
    launch(_list_kernel, (sequences,),
        chosen, lse, spans, sizes, SHAPE=shape, num_warps=min(16, 2 * warps),
    )  # fmt: skip
    return chosen


class Listing(NamedTuple):
    """What to list, as in :func:`choose_reference`, and where: int32 ``[B, G, listed]``. done: int32 ``[B, H_kv, 2]``,
    0 before and after; in the first column programs of a KV head are counted."""

    pages: int
    sinks: int
    recent: int
    chosen: torch.Tensor
    done: torch.Tensor


def step_pages(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, held: Tokens, end: torch.Tensor, scale: float,
    listing: Listing, heads: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Hold the last token of every sequence, ``key`` ``[B, H_kv, 1, D]`` and ``value`` ``[B, H_kv, 1, Dv]``, update its
    mean, and list the pages that ``query`` ``[B, H, 1, D]`` chooses then, with ``recent`` at least 1: one launch.
    ``end`` int32 ``[B]`` counts the tokens, this one included. ``heads`` int32 ``[G]`` says of which KV heads ``held``
    is, None for all."""
    require_triton()
    (B, G, L), S = held.key.shape[:3], held.means.shape[2]
    group, sequences, (pages, sinks, recent, *out) = query.shape[1] // key.shape[1], B * G, listing
    count = listed(pages, sinks, recent)
    shape, warps, stages = _shape(1, group, held.means, held.value, count)
    sizes_of = sequences * shape.LSE, sequences * group
    lse, newest = torch.empty(sum(sizes_of), dtype=torch.float32, device=query.device).split(sizes_of)
    launch(_step_kernel, (1 + min(-(-S // shape.BS), max(1, _WARPS // warps // sequences - 1)), sequences),
        held, strided(query), strided(key), strided(value), _Choice(heads, end, lse, newest, *out),
        _Sizes(G, key.shape[1], group, L, S, count, sinks, recent), scale * _LOG2_E, SHAPE=shape,
        num_warps=warps, num_stages=stages, maxnreg=128 if stages == 4 else None,  # for _WARPS
    )  # fmt: skip


def choose_pages(
    query: torch.Tensor, means: torch.Tensor, scale: float, span: tuple[torch.Tensor, torch.Tensor],
    pages: int, sinks: int, recent: int,
) -> torch.Tensor:  # fmt: skip
    """The choice with the kernels on CUDA and the reference elsewhere; see :func:`choose_reference`."""
    run = choose_triton if query.is_cuda else choose_reference
    return run(query, means, scale, span, pages, sinks, recent)
