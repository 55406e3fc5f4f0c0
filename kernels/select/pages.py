"""Selected pages: the blocks of 64 keys that the queries of a decoding step attend to most, as far as means tell.

Keys are averaged in eights (*means*, an eighth of the keys, kept as tokens arrive: :func:`update_means`). A page of 64
keys is worth the mass that its eight means get, softmax over all means of the sequence, summed over the queries and the
query heads of the KV head: one choice for all of them. The first ``sinks`` and the last ``recent`` tokens are in any
case on the list, and then the best ``pages`` (masses rounded down to 8 bits; of equal ones the earlier page).
"""

from __future__ import annotations

import math
from collections import namedtuple

import torch
from torch.nn.functional import pad

from ..launch import (
    FLOAT32_DOT,
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
from .blocks import NONE, best_of

PAGE, SUB = 64, 8
_TILE = 128  # means of a product
_PROGRAMS = 1056  # eight per multiprocessor of an H200


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


# KV heads, query heads of one, rows of keys, means, pages, and pages on the list.
_Sizes = namedtuple("_Sizes", "KVH G L S P listed")


# The first token of every sequence, and the one behind the last.
_Spans = namedtuple("_Spans", "first end")


_Shape = namedtuple("_Shape", "LQ R D BD BM BS SUB PAGE")


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


@jit(general="sizes")
def _score_kernel(lse, q, means, spans, sizes, scale_log2, SHAPE: tl.constexpr):
    """Log-sum-exp of every page for every row, ``[R, P]`` of a KV head, base 2."""
    R: tl.constexpr = SHAPE.R
    BM: tl.constexpr = SHAPE.BM
    BD: tl.constexpr = SHAPE.BD
    BS: tl.constexpr = SHAPE.BS
    D: tl.constexpr = SHAPE.D
    IN_PAGE: tl.constexpr = SHAPE.PAGE // SHAPE.SUB
    PAGES: tl.constexpr = SHAPE.BS // (SHAPE.PAGE // SHAPE.SUB)
    i_seq = tl.program_id(1)
    i_b, i_kv = i_seq // sizes.KVH, i_seq % sizes.KVH
    o_m, o_s, o_p = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, PAGES)
    first, end = tl.load(spans.first + i_b).to(tl.int32), tl.load(spans.end + i_b).to(tl.int32)
    m_m = o_m < R
    b_q = load_queries(q, i_b, i_kv, sizes.G, SHAPE)
    p_mean, stride = sequence(means, i_b, i_kv)
    p_lse = lse + (i_seq.to(tl.int64) * R + o_m)[:, None] * sizes.P
    tiles = tl.cdiv(tl.cdiv(end, SHAPE.SUB), BS)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        o_mean = t * BS + o_s
        m_s = (o_mean * SHAPE.SUB < end) & ((o_mean + 1) * SHAPE.SUB > first)
        b_mean = load_rows(p_mean, stride, o_mean, m_s, D, BD)  # [BS, BD]
        b_s = tl.dot(b_q, tl.trans(b_mean), input_precision=FLOAT32_DOT) * scale_log2
        b_s = tl.reshape(tl.where(m_s[None, :], b_s, float("-inf")), [BM, PAGES, IN_PAGE])
        b_top = tl.maximum(tl.max(b_s, 2), -1e30)
        b_sum = tl.sum(tl.exp2(b_s - b_top[:, :, None]), 2)
        b_lse = tl.where(b_sum > 0, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
        b_lse = tl.where(b_sum != b_sum, b_sum, b_lse)
        m_out = m_m[:, None] & (t * PAGES + o_p < sizes.P)[None, :]
        tl.store(p_lse + t * PAGES + o_p[None, :], b_lse, mask=m_out)


_ChooseShape = namedtuple("_ChooseShape", "R BC BB PAGE")


@jit(general="sizes sinks recent")
def _choose_kernel(chosen, lse, spans, sizes, sinks, recent, SHAPE: tl.constexpr):
    """One program per KV head; the mass of the last page on the list is found bit by bit."""
    R: tl.constexpr = SHAPE.R
    BC: tl.constexpr = SHAPE.BC
    BB: tl.constexpr = SHAPE.BB
    PAGE: tl.constexpr = SHAPE.PAGE
    UNROLL: tl.constexpr = min(SHAPE.R, 4)
    i_seq = tl.program_id(0)
    i_b = i_seq // sizes.KVH
    o_c, o_b = tl.arange(0, BC), tl.arange(0, BB)
    first, end = tl.load(spans.first + i_b).to(tl.int32), tl.load(spans.end + i_b).to(tl.int32)
    m_c = (o_c * PAGE < end) & ((o_c + 1) * PAGE > first)
    b_mass = tl.zeros([BC], tl.float32)
    for r in tl.range(0, R, loop_unroll_factor=UNROLL):
        b_x = tl.load(lse + (i_seq.to(tl.int64) * R + r) * sizes.P + o_c, mask=m_c, other=float("-inf"))
        b_p = tl.exp2(b_x - tl.maximum(tl.max(b_x), -1e30))
        b_mass += b_p / tl.maximum(tl.sum(b_p), 1e-30)
    b_rank = tl.where(b_mass == b_mass, b_mass, 0.0).to(tl.int32, bitcast=True) >> 16
    b_rank = tl.where((o_c * PAGE < first + sinks) | ((o_c + 1) * PAGE > end - recent), 1 << 15, b_rank)
    b_rank = tl.where(m_c, b_rank, -1)
    b_taken = best_of(b_rank, sizes.listed, 16)
    p_chosen = chosen + i_seq.to(tl.int64) * sizes.listed
    tl.store(p_chosen + tl.cumsum(b_taken, 0) - 1, o_c, mask=b_taken > 0)
    tl.store(p_chosen + o_b, tl.full([BB], -1, tl.int32), mask=(o_b >= tl.sum(b_taken)) & (o_b < sizes.listed))


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
        strided(means), strided(key), _Spans(first, end), _Sizes(H_kv, 1, L, means.shape[2], 0, 0), new,
        SHAPE=shape, num_warps=4,
    )  # fmt: skip


def choose_triton(
    query: torch.Tensor, means: torch.Tensor, scale: float, span: tuple[torch.Tensor, torch.Tensor],
    pages: int, sinks: int, recent: int, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """:func:`choose_reference` by the kernels, up to masses that rounding makes change places; into ``out`` if that is
    given."""
    require_triton()
    (B, H, Lq, D), (H_kv, S), device = query.shape, means.shape[1:3], query.device
    R, sequences, P, count = H // H_kv * Lq, B * H_kv, -(-S * SUB // PAGE), listed(pages, sinks, recent)
    sizes, spans = _Sizes(H_kv, H // H_kv, S * SUB, S, P, count), _Spans(*(x.contiguous() for x in span))
    lse = torch.empty(sequences, R, P, dtype=torch.float32, device=device)
    chosen = torch.empty(B, H_kv, count, dtype=torch.int32, device=device) if out is None else out
    BD, BM = max(16, next_power_of_two(D)), max(16, next_power_of_two(R))
    programs = min(-(-S // _TILE), max(1, -(-_PROGRAMS // sequences)))
    launch(_score_kernel, (programs, sequences),
        lse, strided(query), strided(means), spans, sizes, scale * 1.4426950408889634,
        SHAPE=_Shape(Lq, R, D, BD, BM, _TILE, SUB, PAGE), num_warps=4, num_stages=2,
    )  # fmt: skip
    BC = max(32, next_power_of_two(P))
    launch(_choose_kernel, (sequences,),
        chosen, lse, spans, sizes, sinks, recent,
        SHAPE=_ChooseShape(R, BC, next_power_of_two(count), PAGE), num_warps=max(1, min(8, BC // 512)),
    )  # fmt: skip
    return chosen


def choose_pages(
    query: torch.Tensor, means: torch.Tensor, scale: float, span: tuple[torch.Tensor, torch.Tensor],
    pages: int, sinks: int, recent: int,
) -> torch.Tensor:  # fmt: skip
    """The choice with the kernels on CUDA and the reference elsewhere; see :func:`choose_reference`."""
    run = choose_triton if query.is_cuda else choose_reference
    return run(query, means, scale, span, pages, sinks, recent)
