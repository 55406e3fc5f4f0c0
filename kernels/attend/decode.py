"""Exact attention of a decoding step: few queries over a long cache, split along its rows.

    out_i = sum_j w_j exp(scale <q_i, k_j>) v_j / sum_j w_j exp(scale <q_i, k_j>)

over the rows j that there are (``lengths``, ``padding``, finite ``log_weight``, listed ``pages``) and that are not
behind the query: the queries are the last tokens, causal among themselves. Two launches:

* :func:`_split_kernel` gives the blocks of rows of a KV head to its programs in turn, one block each, so that all are
  busy however few rows of a long static cache are filled. A program reads the blocks between its first and its last
  that hold a row, for all query heads and queries of the KV head at once, and leaves maximum, sum and weighted values.
  More queries than fit are pieces of equal size: programs side by side read the same blocks, each for its own.
* :func:`_combine_kernel` adds these up in order, which gives the same bits every time.

Rows that there are not are never read, so they may hold anything, NaN too. How many programs share a KV head follows
from sizes alone: nothing is asked of the device, and one CUDA graph serves a static cache at every length.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..launch import (
    FLOAT32_DOT,
    Widths,
    jit,
    launch,
    load_queries,
    load_rows,
    next_power_of_two,
    processors,
    require_triton,
    sequence,
    strided,
    tl,
)
from ..prepared import prepared
from .segments import Outputs

MAX_QUERIES = 16
MAX_ROWS = 64  # query heads of a KV head times queries
MAX_WIDTH = 256  # features of a head
PAGE = 64
_MULTIPROCESSORS = 132  # in the interpreter
_SCANNED = 4096  # bytes of padding that a program looks through at once
_LOG2_E = 1.4426950408889634


class Rows(NamedTuple):
    """Which rows of a cache there are, all that are named at once, and what they weigh.

    lengths: int32 or int64 ``[B]``, the first so many. padding: bool ``[B, L]``, True for a row. log_weight: float32
    ``[B, H_kv, L]``, minus infinity for none. pages: int32 ``[B, H_kv, b]``, the blocks of 64 rows that are read,
    each at most once; -1 for none.
    """

    lengths: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    log_weight: torch.Tensor | None = None
    pages: torch.Tensor | None = None


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    lengths: torch.Tensor | None = None,
    log_weight: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``query`` ``[B, H, n, D]`` over ``key`` ``[B, H_kv, L, D]`` and ``value`` ``[B, H_kv, L, Dv]``.

    The n queries are the last n of the ``lengths`` rows (of all L without), and causal among themselves. The rest as
    in :class:`Rows`. Tensors of one floating dtype, of any strides. Returns ``out`` ``[B, H, n, Dv]`` and ``lse``
    ``[B, H, n]`` in float32 (float64 for float64): 0 and minus infinity where a query sees no row. On CUDA by
    kernels, for up to 16 queries, up to 64 of them times heads per KV head, and 256 features; otherwise, for float64
    and elsewhere by :func:`decode_reference`. Raises ``ValueError`` for arguments that do not fit.
    """
    run = _decode_prepared if query.is_cuda else _decode
    return run(query, key, value, scale, lengths, padding, log_weight, pages)


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Rows(*others)
    _check(query, key, value, rows)
    group = query.shape[1] // key.shape[1]
    is_fast = query.is_cuda and query.shape[2] <= queries_at_once(group) and fits(key, value, group)
    return (decode_triton if is_fast else decode_reference)(query, key, value, scale, rows)


_decode_prepared = prepared(_decode)


def fits(key: torch.Tensor, value: torch.Tensor, group: int) -> bool:
    """Whether the kernels take such rows, for ``group`` query heads of a KV head, however many queries these have."""
    narrow = max(key.shape[3], value.shape[3]) <= MAX_WIDTH
    return key.dtype != torch.float64 and narrow and group <= MAX_ROWS


def queries_at_once(group: int) -> int:
    """How many queries a program takes of ``group`` query heads per KV head; 0 if none."""
    return min(MAX_QUERIES, MAX_ROWS // group)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> None:
    (B, H, _, D), (H_kv, L) = query.shape, key.shape[1:3]
    if key.shape != (B, H_kv, L, D) or value.shape[:3] != key.shape[:3] or H % max(H_kv, 1):
        raise ValueError(
            f"key, value: shapes {tuple(key.shape)} and {tuple(value.shape)}; must be [B, H_kv, L, D] and [B, H_kv, L, "
            f"Dv] for a query of shape {tuple(query.shape)}, H_kv dividing H"
        )
    integers, b = (torch.int32, torch.int64), 0 if rows.pages is None else rows.pages.shape[-1]
    allowed = {
        "lengths": ((B,), integers), "padding": ((B, L), (torch.bool,)),
        "log_weight": ((B, H_kv, L), (torch.float32,)), "pages": ((B, H_kv, b), integers[:1]),
    }  # fmt: skip
    for name, (shape, dtypes) in allowed.items():
        x = getattr(rows, name)
        if x is not None and (x.shape != shape or x.dtype not in dtypes or x.device != query.device):
            names = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{name}: {x.dtype} of shape {tuple(x.shape)} on {x.device}; must be {names} {shape} on {query.device}"
            )


# ---- reference -----------------------------------------------------------------------------------------------------


def visible_rows(query: torch.Tensor, key: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Which rows every query sees: bool ``[B, H_kv, n, L]``."""
    (B, _, n, _), (H_kv, L), device = query.shape, key.shape[1:3], query.device
    place = torch.arange(L, device=device)
    end = torch.full((B,), L, device=device) if rows.lengths is None else rows.lengths
    seen = place < (end[:, None] - n + 1 + torch.arange(n, device=device))[..., None]  # [B, n, L]
    if rows.padding is not None:
        seen = seen & rows.padding[:, None]
    seen = seen[:, None].expand(B, H_kv, n, L)
    if rows.log_weight is not None:
        seen = seen & (rows.log_weight > -math.inf)[:, :, None]
    if rows.pages is not None:
        held = torch.zeros(B, H_kv, -(-L // PAGE) + 1, dtype=torch.bool, device=device)
        held.scatter_(2, torch.where(rows.pages < 0, held.shape[2] - 1, rows.pages).long(), True)
        seen = seen & held[:, :, place // PAGE][:, :, None]
    return seen


def decode_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`decode_attention` in plain PyTorch on any device, computed in float32 (float64 for float64): the
    definition of correct."""
    dtype, H_kv, n = torch.promote_types(query.dtype, torch.float32), key.shape[1], query.shape[2]
    seen = visible_rows(query, key, rows)
    v = value.to(dtype)
    if any(x is not None for x in rows):  # otherwise all rows are read
        v = v.masked_fill(~seen.any(2)[..., None], 0)
    scores = (query.unflatten(1, (H_kv, -1)).flatten(2, 3).to(dtype) * scale) @ key.to(dtype).mT
    scores = scores.unflatten(2, (-1, n))  # [B, H_kv, g, n, L]
    if rows.log_weight is not None:
        scores = scores + rows.log_weight[:, :, None, None].to(dtype)
    scores = scores.masked_fill(~seen[:, :, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -math.inf, 0, lse)[..., None]).exp()
    out = (weights.flatten(2, 3) @ v).unflatten(2, (-1, n))
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


# ---- kernels -------------------------------------------------------------------------------------------------------


# As :class:`Rows`, and the scale for scores in base 2; weights come beside it, for Triton 3.6 loses strides of 1 in a
# tuple of a tuple.
_Masks = namedtuple("_Masks", "lengths padding pages scale")


# Maxima, sums and weighted values of the programs of a KV head, and what becomes of them.
_Parts = namedtuple("_Parts", "most sum value out lse")


# KV heads, query heads of one, rows, the stride of padding, and the number of pages.
_Sizes = namedtuple("_Sizes", "KVH G L stride listed")


# Queries of a piece, rows of the product, widths and their tiles, rows of a block, blocks whose padding is looked
# through at once, rows of a page, whether one program takes all rows of a KV head, and pieces.
_Shape = namedtuple("_Shape", "LQ R D DV BD BDV BM BN BJ PAGE WHOLE PIECES")


@jit
def _bounds(masks, i_b, sizes, end, i_split, splits, SHAPE: tl.constexpr):
    """Of the blocks of a program, counted among its own: the first that holds a row, and the one behind the last."""
    BN: tl.constexpr = SHAPE.BN
    BJ: tl.constexpr = SHAPE.BJ
    PAGE: tl.constexpr = SHAPE.PAGE
    blocks = tl.cdiv(sizes.listed * PAGE if masks.pages is not None else end, BN)
    stop = tl.maximum(tl.cdiv(blocks - i_split, splits), 0)
    start = 0
    if masks.padding is not None and masks.pages is None:
        o_n, o_j = tl.arange(0, BN), tl.arange(0, BJ)
        p_row = masks.padding + i_b.to(tl.int64) * sizes.stride
        start, found = stop, 0
        for j in range(0, stop, BJ):
            o_row = (i_split + (j + o_j) * splits)[:, None] * BN + o_n[None, :]
            b_real = tl.load(p_row + o_row, mask=(j + o_j < stop)[:, None] & (o_row < sizes.L), other=0)
            b_any = tl.max(b_real.to(tl.int32), 1) > 0
            start = tl.minimum(start, tl.min(tl.where(b_any, j + o_j, stop)))
            found = tl.maximum(found, tl.max(tl.where(b_any, j + o_j + 1, 0)))
        stop = found
    return start, stop


@jit(general="sizes")
def _split_kernel(q, k, v, weight, masks, parts, sizes, SHAPE: tl.constexpr):
    LQ: tl.constexpr = SHAPE.LQ
    R: tl.constexpr = SHAPE.R
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    PAGE: tl.constexpr = SHAPE.PAGE
    D: tl.constexpr = SHAPE.D
    DV: tl.constexpr = SHAPE.DV
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    PIECES: tl.constexpr = SHAPE.PIECES
    KVH, G, L, stride_p, listed = sizes
    i_split, i_seq, splits, i_piece = tl.program_id(0), tl.program_id(1), tl.num_programs(0), 0
    if PIECES > 1:
        i_split, splits, i_piece = i_split // PIECES, splits // PIECES, i_split % PIECES
    i_b, i_kv = i_seq // KVH, i_seq % KVH
    o_m, o_n, o_dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BDV)
    m_m, o_out = o_m < R, o_m
    if PIECES > 1:  # all queries of a head lie side by side
        o_out = o_m // LQ * (LQ * PIECES) + i_piece * LQ + o_m % LQ
    b_q = load_queries(q, i_b, i_kv, G, SHAPE, i_piece)  # [BM, BD]
    end = L
    if masks.lengths is not None:
        end = tl.minimum(tl.load(masks.lengths + i_b).to(tl.int32), L)
    end -= (PIECES - 1 - i_piece) * LQ
    b_end = end - LQ + 1 + o_m % LQ  # behind the last row that a query sees
    start, stop = _bounds(masks, i_b, sizes, end, i_split, splits, SHAPE)
    p_k, stride_k = sequence(k, i_b, i_kv)
    p_v, stride_v = sequence(v, i_b, i_kv)
    b_top, b_sum = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for j in range(start, stop):
        o_row = (i_split + j * splits) * BN + o_n
        if masks.pages is not None:
            p_page = masks.pages + i_seq.to(tl.int64) * listed
            b_page = tl.load(p_page + o_row // PAGE, mask=o_row < listed * PAGE, other=-1)
            o_row = tl.where(b_page < 0, end, b_page * PAGE + o_row % PAGE)
        m_n = o_row < end
        if masks.padding is not None:
            p_real = masks.padding + i_b.to(tl.int64) * stride_p
            m_n = m_n & (tl.load(p_real + o_row, mask=m_n, other=0) != 0)
        if weight.p is not None:
            p_weight = weight.p + (i_b.to(tl.int64) * weight.b + i_kv * weight.h)
            b_weight = tl.load(p_weight + o_row, mask=m_n, other=float("-inf"))
            m_n = m_n & (b_weight > float("-inf"))
        b_k = load_rows(p_k, stride_k, o_row, m_n, D, BD)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT) * masks.scale  # [BM, BN]
        if weight.p is not None:
            b_s += tl.where(m_n, b_weight, 0.0)[None, :] * 1.4426950408889634
        b_s = tl.where(m_n[None, :] & (o_row[None, :] < b_end[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_old = tl.exp2(b_top - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_v = load_rows(p_v, stride_v, o_row, m_n, DV, BDV)  # [BN, BDV]
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=FLOAT32_DOT)
        b_top = b_new
    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    if SHAPE.WHOLE:
        # rows are (head, query) of this KV head, which lie side by side in the output
        o_seq = i_seq.to(tl.int64) * (R * PIECES)
        b_acc = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        tl.store(
            parts.out + (o_seq + o_out)[:, None] * DV + o_dv[None, :], b_acc.to(parts.out.dtype.element_ty), mask=m_out
        )
        b_lse = (b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0))) * 0.6931471805599453
        tl.store(parts.lse + o_seq + o_out, tl.where(b_sum > 0, b_lse, float("-inf")), mask=m_m)
    else:
        o_part = (i_seq.to(tl.int64) * splits + i_split) * (R * PIECES)
        tl.store(parts.most + o_part + o_out, b_top, mask=m_m)
        tl.store(parts.sum + o_part + o_out, b_sum, mask=m_m)
        if start < stop:
            tl.store(parts.value + (o_part + o_out)[:, None] * DV + o_dv[None, :], b_acc, mask=m_out)


_CombineShape = namedtuple("_CombineShape", "R DV BDV BS")


@jit(general="splits")
def _combine_kernel(parts, splits, SHAPE: tl.constexpr):
    R: tl.constexpr = SHAPE.R
    DV: tl.constexpr = SHAPE.DV
    BDV: tl.constexpr = SHAPE.BDV
    BS: tl.constexpr = SHAPE.BS
    i_r, i_seq = tl.program_id(0), tl.program_id(1)
    o_s, o_dv = tl.arange(0, BS), tl.arange(0, BDV)
    p_most = parts.most + i_seq.to(tl.int64) * splits * R + i_r
    p_sum = parts.sum + i_seq.to(tl.int64) * splits * R + i_r
    p_value = parts.value + (i_seq.to(tl.int64) * splits * R + i_r) * DV
    top, total = -1e30, 0.0
    b_out = tl.zeros([BDV], tl.float32)
    for s in range(0, splits, BS):
        m_s = s + o_s < splits
        b_sum = tl.load(p_sum + (s + o_s) * R, mask=m_s, other=0.0)
        b_most = tl.load(p_most + (s + o_s) * R, mask=m_s, other=-1e30)
        new = tl.maximum(top, tl.max(b_most))
        b_factor = tl.exp2(b_most - new)
        old = tl.exp2(top - new)
        m_value = (b_sum != 0)[:, None] & (o_dv < DV)[None, :]  # not 0 is NaN too
        b_value = tl.load(p_value + (s + o_s)[:, None] * (R * DV) + o_dv[None, :], mask=m_value, other=0.0)
        b_out = b_out * old + tl.sum(b_value * b_factor[:, None], 0)
        total = total * old + tl.sum(b_sum * b_factor)
        top = new
    o_row = i_seq.to(tl.int64) * R + i_r
    whole = tl.where(total == 0, 1.0, total)
    b_out = b_out / whole
    tl.store(parts.out + o_row * DV + o_dv, b_out.to(parts.out.dtype.element_ty), mask=o_dv < DV)
    tl.store(parts.lse + o_row, tl.where(total == 0, float("-inf"), (top + tl.log2(whole)) * 0.6931471805599453))


class Tiling(NamedTuple):
    """How the kernels run: rows of a block, warps, stages of the pipeline, and programs that share a multiprocessor."""

    rows: int
    warps: int
    stages: int
    programs: int


def tiling(row_bytes: int, shared: int) -> Tiling:
    """The tiling for rows of so many bytes, where a multiprocessor has ``shared`` bytes of memory.

    Of twelve for bfloat16 of width 128 on an H200 the first is the best over five shapes; from 8,192 to 131,072 rows
    it was within 1% of the best one, which was 8% faster than the worst.
    """
    if row_bytes <= 256:
        return Tiling(128, 4, 3, 1) if shared >= 160 << 10 else Tiling(64, 4, 2, 2)
    return Tiling(32, 4, 3 if row_bytes <= 512 else 2, 1 if row_bytes > 512 else 2)


@functools.cache
def device_of(device: torch.device) -> tuple[int, int]:
    """The multiprocessors of a device, and the bytes of shared memory of one."""
    if device.type != "cuda":
        return _MULTIPROCESSORS, 228 << 10
    return processors(device), torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.lru_cache(maxsize=1024)
def splits_of(sequences: int, blocks: int, at_once: int) -> int:
    """How many programs share the ``blocks`` of each of so many KV heads where ``at_once`` programs run at a time: the
    fewest that come within a twentieth of the best use of them."""
    most = min(blocks, -(-4 * at_once // sequences))

    def used(splits: int) -> float:
        return sequences * splits / (-(-sequences * splits // at_once) * at_once)

    best = max(map(used, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if used(splits) >= 0.95 * best)


def decode_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`decode_attention` by the kernels, for any number of queries; needs a GPU, or Triton's interpreter."""
    require_triton()
    (B, H, n), (KVH, L), Dv = query.shape[:3], key.shape[1:3], value.shape[-1]
    if not (at_once := queries_at_once(H // KVH)):
        raise ValueError(f"query: {H // KVH} heads per key head; must be at most {MAX_ROWS}")
    pieces = max(1, -(-n // at_once))
    Lq = -(-n // pieces)
    R = H // KVH * Lq
    if before := pieces * Lq - n:
        query = F.pad(query, (0, 0, before, 0))
    widths, BM = Widths.alike(key, value), max(16, next_power_of_two(R))
    multiprocessors, shared = device_of(query.device)
    tiles, listed = tiling(max(widths.BD, widths.BDV) * query.element_size(), shared), 0
    pages, padding, count = rows.pages, rows.padding, L
    if pages is not None:
        pages, listed = pages.contiguous(), pages.shape[-1]
        count = listed * PAGE
    if padding is not None:
        padding = (padding if padding.stride(-1) == 1 else padding.contiguous()).view(torch.uint8)
    sequences, blocks = B * KVH, -(-count // tiles.rows)
    splits = splits_of(sequences * pieces, max(blocks, 1), tiles.programs * multiprocessors)
    out, lse = Outputs.of(query, Dv)
    partial = sequences * splits * pieces * R
    sizes_of = [] if splits == 1 else [partial, partial, partial * Dv]
    memory = torch.empty(max(sum(sizes_of), 1), dtype=torch.float32, device=query.device)
    most, total, weighted = memory.split(sizes_of) if sizes_of else [memory] * 3
    parts = _Parts(most, total, weighted, out, lse)
    lengths = None if rows.lengths is None else rows.lengths.contiguous()
    masks = _Masks(lengths, padding, pages, scale * _LOG2_E)
    shape = _Shape(Lq, R, *widths, BM, tiles.rows, max(1, _SCANNED // tiles.rows), PAGE, splits == 1, pieces)
    sizes = _Sizes(KVH, H // KVH, L, 0 if padding is None else padding.stride(0), listed)
    launch(_split_kernel, (splits * pieces, sequences),
        strided(query), strided(key), strided(value), strided(rows.log_weight), masks, parts, sizes, SHAPE=shape,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        launch(_combine_kernel, (pieces * R, sequences), parts, splits,
            SHAPE=_CombineShape(pieces * R, Dv, widths.BDV, 16), num_warps=2,
        )  # fmt: skip
    return (out[:, :, before:], lse[:, :, before:]) if before else (out, lse)
