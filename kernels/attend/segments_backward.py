"""Gradients of segment attention as Triton kernels, without atomics: the same inputs give the same bits.

With ``P`` the probabilities, recomputed from ``lse``, and ``delta_i = <d_out_i, out_i>``

    dV = P^T dO,    dS = P * (dO V^T - delta),    dQ = scale dS K,    dK = scale dS^T Q.

dQ walks the segments of a block of queries as the forward pass does. dK and dV need the inverse of the table, who
sees a row: :func:`make_plan` turns it into lists per *tile* of rows. Some rows are seen by every query and others
by one block, so the list of a tile is cut into *chunks* of bounded work. A program sums up one chunk; where a
tile has several, each writes its sum to a *slot* of its own, and the slots are added in order. There are at most
as many slots as tiles (or 256), so that memory stays O(n D): at most once more what float32 dK and dV take.
"""

from __future__ import annotations

import weakref
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..launch import (
    FLOAT32_DOT,
    Strided,
    Widths,
    constant,
    jit,
    launch,
    load_rows,
    next_power_of_two,
    require_triton,
    sequence,
    strided,
    tl,
)
from ..spans import Spans, numbers_of, place_of
from .segments import NO_TAIL, TOKENS, SegmentTable, Sources, check_dtype, segment_attention_backward

# ---------------------------------------------------------------------------------------------------------------
# The plan: which queries see the rows of a tile, as integers


@dataclass(frozen=True, eq=False)
class Plan:
    """Work for the gradients of all rows, in tiles of ``rows`` rows of one source and parts of ``queries`` queries.

    chunks: int32 ``[chunks, 6]``: source, first row of the tile, first run, first causal run, end of the runs, slot
    (-1: the only chunk of its tile). Heavy chunks come first; every tile of either source has one.
    runs: int32 ``[runs, 4]``: first and stop row, first and stop query: all of them see each other, except that a
    causal run hides rows behind the query. log_weight: float32 ``[runs]``.
    sums: int32 ``[n, 4]``: source, first row, first and stop slot of every tile with several chunks.
    """

    rows: int
    queries: int
    chunks: np.ndarray
    runs: np.ndarray
    log_weight: np.ndarray
    sums: np.ndarray

    @property
    def slots(self) -> int:
        return int(self.chunks[:, 5].max(initial=-1)) + 1


MIN_TILES = 256  # fewer tiles than this are cut up as if they were that many: a few rows that many queries see
MIN_CHUNK = 32  # products of (part of the queries of one head, tile) below which cutting does not pay


def make_plan(table: SegmentTable, Lq: int, Lk: int, A: int, rows: int, queries: int, group: int) -> Plan:
    """The plan for ``Lq`` queries, ``Lk`` tokens and ``A`` compacted rows; ``group`` query heads share a row.

    ``queries`` must divide the block of the table.
    """
    tiles = np.array([-(-Lk // rows), -(-A // rows)])
    pieces = np.concatenate([_plain_pieces(table, rows), _causal_pieces(table, Lq, rows, queries)])
    pieces["first"] = np.maximum(pieces["first"], table.shift // queries * queries)
    pieces["last"] = np.minimum(pieces["last"], -(-(Lq + table.shift) // queries) * queries)
    pieces = _merge(pieces, ("source", "tile", "causal", "weight", "first", "last"), "row", "stop")
    pieces = _merge(pieces, ("source", "tile", "causal", "weight", "row", "stop"), "first", "last")
    pieces = pieces[np.lexsort([pieces[x] for x in ("row", "first", "causal", "tile", "source")])]

    # cut the work of every tile, laid end to end, into equal chunks; less than 2 w / limit of them if w > limit
    tile = pieces["source"] * tiles[0] + pieces["tile"]
    work = (pieces["last"] - pieces["first"]) // queries
    total = np.bincount(tile, work, tiles.sum()).astype(np.int64)
    limit = max(-(-2 * total.sum() // max(MIN_TILES, tiles.sum())), -(-MIN_CHUNK // group))
    size = np.maximum(1, -(-total // np.maximum(1, -(-total // limit))))
    chunks_of = np.maximum(1, -(-total // size))
    end = work.cumsum() - (total.cumsum() - total)[tile]
    begin, size = end - work, size[tile]
    which, nth = _expand((end - 1) // size - begin // size + 1)
    begin, end, size, pieces = begin[which], end[which], size[which], pieces[which]
    nth += begin // size
    runs = np.stack(
        [
            pieces["row"],
            pieces["stop"],
            pieces["first"] + (np.maximum(begin, nth * size) - begin) * queries,
            pieces["first"] + (np.minimum(end, (nth + 1) * size) - begin) * queries,
        ],
        1,
    )

    tile_of, nth_of = _expand(chunks_of)
    chunk = (chunks_of.cumsum() - chunks_of)[tile[which]] + nth
    first = np.searchsorted(chunk, np.arange(len(tile_of) + 1))
    causal = first[1:] - np.bincount(chunk, pieces["causal"], len(tile_of)).astype(np.int64)
    source = (tile_of >= tiles[0]).astype(np.int64)
    row = (tile_of - source * tiles[0]) * rows
    shared = chunks_of[tile_of] > 1
    slot = np.where(shared, shared.cumsum() - 1, -1)
    chunks = np.stack([source, row, first[:-1], causal, first[1:], slot], 1)
    heads = shared & (nth_of == 0)
    sums = np.stack([source, row, slot, slot + chunks_of[tile_of]], 1)[heads]
    heavy = np.argsort(-np.bincount(chunk, runs[:, 3] - runs[:, 2], len(tile_of)), kind="stable")
    arrays = (chunks[heavy], runs, sums)
    chunks, runs, sums = (np.ascontiguousarray(x, np.int32) for x in arrays)
    return Plan(rows, queries, chunks, runs, pieces["weight"].astype(np.float32), sums)


_PIECE = np.dtype([(x, np.int64) for x in ("source", "tile", "row", "stop", "first", "last", "causal")]
                  + [("weight", np.float64)])  # fmt: skip


def _expand(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``count[i]`` times i for every i, and the number of each repetition: 0, 1, .. ``count[i] - 1``."""
    which = np.repeat(np.arange(len(count)), count)
    return which, np.arange(len(which)) - (count.cumsum() - count)[which]


def _piece(
    source: Any, tile: np.ndarray, row: Any, stop: Any, first: Any, last: Any, causal: int, weight: Any
) -> np.ndarray:
    """Rows ``row .. stop`` of a tile, seen by the queries ``first .. last``."""
    pieces = np.empty(len(tile), _PIECE)
    for name, x in zip(_PIECE.names or (), (source, tile, row, stop, first, last, causal, weight), strict=True):
        pieces[name] = x
    return pieces


def _plain_pieces(table: SegmentTable, rows: int) -> np.ndarray:
    """What whole blocks see: their segments, and their tail before their own tokens.

    A segment that grows from block to block (a chain) gives one piece per tile, for all blocks that see the tile to
    its end, and one for every end inside a tile. So there are about as many pieces as blocks and tiles.
    """
    blocks, columns = table.log_weight.shape
    own = np.arange(blocks) * table.block + table.q_offset - table.shift
    source = np.concatenate([table.segments[:, :, 0].T, np.full((1, blocks), TOKENS)]).astype(np.int64)
    first = np.concatenate([table.segments[:, :, 1].T, table.tail[None]]).astype(np.int64)
    stop = np.concatenate([first[:-1] + table.segments[:, :, 2].T, own[None]])
    weight = np.concatenate([table.log_weight.T, np.zeros((1, blocks))])
    column, block = (x[stop > first] for x in np.indices((columns + 1, blocks)))
    source, first, stop, weight = (x[column, block] for x in (source, first, stop, weight))
    if not len(block):
        return np.empty(0, _PIECE)

    broken = np.ones(len(block), dtype=bool)
    broken[1:] = (np.diff(column) != 0) | (np.diff(block) != 1) | (np.diff(stop) < 0)
    for x in (source, first, weight):
        broken[1:] |= np.diff(x) != 0
    chain, head = broken.cumsum() - 1, np.flatnonzero(broken)
    final = np.append(head[1:], len(block)) - 1
    which, tile = _expand(np.maximum(0, stop[final] // rows - first[head] // rows))
    tile += first[head[which]] // rows
    span = stop.max() + 1
    seen = np.searchsorted(chain * span + stop, which * span + (tile + 1) * rows)
    at = head[which]
    whole = _piece(
        source[at], tile, np.maximum(first[at], tile * rows), (tile + 1) * rows,
        block[seen] * table.block, (block[final[which]] + 1) * table.block, 0, weight[at],
    )  # fmt: skip

    broken[1:] |= np.diff(stop) != 0
    at = np.flatnonzero(broken)
    final = np.append(at[1:], len(block)) - 1
    inside = stop[at] % rows > 0
    at, final = at[inside], final[inside]
    tile = stop[at] // rows
    ends = _piece(
        source[at], tile, np.maximum(first[at], tile * rows), stop[at],
        block[at] * table.block, (block[final] + 1) * table.block, 0, weight[at],
    )  # fmt: skip
    return np.concatenate([whole, ends])


def _causal_pieces(table: SegmentTable, Lq: int, rows: int, queries: int) -> np.ndarray:
    """What blocks see of their own tokens; parts of the queries that come before the piece are left out."""
    first = np.arange(len(table.tail)) * table.block
    own, stop = (x + table.q_offset - table.shift for x in (first, np.minimum(first + table.block, Lq + table.shift)))
    begin = np.maximum(own, 0)  # block 0 may begin before the first token
    block, tile = _expand(np.where(table.tail == NO_TAIL, 0, (stop - 1) // rows - begin // rows + 1))
    tile += begin[block] // rows
    row = np.maximum(begin[block], tile * rows)
    hidden = (row - own[block]) // queries * queries
    return _piece(
        TOKENS, tile, row, np.minimum(stop[block], (tile + 1) * rows), first[block] + hidden,
        first[block] + table.block, 1, 0.0,
    )  # fmt: skip


def _merge(pieces: np.ndarray, same: tuple[str, ...], low: str, high: str) -> np.ndarray:
    """Pieces that agree in ``same`` become one where one's ``high`` is the other's ``low``."""
    pieces = pieces[np.lexsort([pieces[x] for x in (low, *same)])]
    apart = np.ones(len(pieces), dtype=bool)
    apart[1:] = pieces[high][:-1] != pieces[low][1:]
    for name in same:
        apart[1:] |= pieces[name][1:] != pieces[name][:-1]
    at = np.flatnonzero(apart)
    merged = pieces[at]
    merged[high] = pieces[high][np.append(at[1:], len(pieces)) - 1]
    return merged


_plans: weakref.WeakKeyDictionary[SegmentTable, dict] = weakref.WeakKeyDictionary()


def plan_on(device: torch.device, table: SegmentTable, *sizes: int) -> tuple[Plan, tuple[torch.Tensor, ...]]:
    """:func:`make_plan` and its chunks, runs, log-weights and sums on ``device``; made once per table and sizes."""
    plans = _plans.setdefault(table, {})
    if (device, sizes) not in plans:
        plan = make_plan(table, *sizes)
        arrays = (plan.chunks, plan.runs, plan.log_weight, plan.sums)
        plans[device, sizes] = plan, tuple(constant(x, device) for x in arrays)
    return plans[device, sizes]


# ---------------------------------------------------------------------------------------------------------------
# Kernel: delta, and lse in base 2, one program per (tile of queries, query head)


class Saved(NamedTuple):
    """lse in base 2 and delta of every query, float32 ``[B, H, L_pad]``."""

    lse2: torch.Tensor
    delta: torch.Tensor
    L_pad: int

    @classmethod
    def of(
        cls, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, L_pad: int, shift: int = 0,
        spans: Spans | None = None,
    ) -> Saved:  # fmt: skip
        """Query i, with ``spans`` of its sequence, is at ``i + shift``; where there is none, probabilities are 0."""
        B, H, Lq, Dv = out.shape
        lse2, delta = (lse.new_empty(B, H, L_pad, dtype=torch.float32) for _ in range(2))
        saved = cls(lse2, delta, L_pad)
        launch(_delta_kernel, (-(-L_pad // 32), B * H),
            strided(grad), strided(out), lse.contiguous(), saved, spans, (H, Lq, shift),
            DV=Dv, BDV=max(16, next_power_of_two(Dv)), BM=32, num_warps=4,
        )  # fmt: skip
        return saved


@jit(general="sizes")
def _delta_kernel(grad, out, p_lse, saved, spans, sizes, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr):
    H, Lq, shift = sizes
    i_tile, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = i_tile * BM + tl.arange(0, BM)
    o_row = o_m - shift
    m_m = (o_m >= shift) & (o_row < Lq)
    if spans is not None:
        span = Spans(spans.order, spans.lead, *numbers_of(spans, i_b))
        m_m = (o_row >= span.begin) & (o_row < span.length)
        o_row = place_of(span, o_row, m_m) - span.lead
    p_grad, stride_g = sequence(grad, i_b, i_h)
    p_out, stride_o = sequence(out, i_b, i_h)
    b_grad = load_rows(p_grad, stride_g, o_row, m_m, DV, BDV).to(tl.float32)  # [BM, BDV]
    b_out = load_rows(p_out, stride_o, o_row, m_m, DV, BDV).to(tl.float32)  # [BM, BDV]
    # where no query is, probabilities are 0
    b_lse = tl.load(p_lse + i_bh * Lq + o_row, mask=m_m, other=float("inf"))
    o_out = i_bh * saved.L_pad + o_m
    tl.store(saved.lse2 + o_out, b_lse * 1.4426950408889634, mask=o_m < saved.L_pad)
    tl.store(saved.delta + o_out, tl.sum(b_grad * b_out, 1), mask=o_m < saved.L_pad)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: dQ, one program per (part of a block of queries, query head)


_Inputs = namedtuple("_Inputs", "q k v ck cv do scale saved spans")


_Sizes = namedtuple("_Sizes", "H Lq Lk A shift q_offset segments")


# Widths, queries and rows of a tile, query heads of a KV head, parts of a block, and whether all are full.
_Shape = namedtuple("_Shape", "D DV BD BDV BM BN G PARTS EVEN", defaults=(0, 0, False))


# A tile of queries, their gradients, and where among the tokens they are.
Queries = namedtuple("Queries", "b_q b_do b_lse2 b_delta o_q")


# Where the rows of one head begin, the strides from one to the next, and where tokens are, if not side by side.
KeyRows = namedtuple("KeyRows", "span p_k stride_k p_v stride_v")


@jit
def score_gradient(b_p, b_x, b_y, b_delta):
    """dS of the scores whose probabilities are ``b_p``: x is dO and y is V, or the other way for columns of queries."""
    return b_p * (tl.dot(b_x, tl.trans(b_y), input_precision=FLOAT32_DOT) - b_delta)


@jit
def _query_gradient_rows(
    b_dq, x, rows, first, stop, scale_log2, MASK: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """dQ / scale from the rows ``first .. stop``, whole tiles if MASK is 0; with 2 row j is hidden where j > o_q."""
    o_d, o_dv = tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
    for start in range(first, stop, SHAPE.BN):
        o_n = start + tl.arange(0, SHAPE.BN)
        m_n = o_n < stop
        o_row = o_n
        if rows.span is not None:
            o_row = place_of(rows.span, o_n, m_n)
        o_row = o_row.to(tl.int64)[:, None]
        p_k, p_v = rows.p_k + o_row * rows.stride_k + o_d[None, :], rows.p_v + o_row * rows.stride_v + o_dv[None, :]
        if MASK > 0 or SHAPE.D != SHAPE.BD:
            b_k = tl.load(p_k, mask=m_n[:, None] & (o_d < SHAPE.D)[None, :], other=0.0)  # [BN, BD]
        else:
            b_k = tl.load(p_k)
        if MASK > 0 or SHAPE.DV != SHAPE.BDV:
            b_v = tl.load(p_v, mask=m_n[:, None] & (o_dv < SHAPE.DV)[None, :], other=0.0)  # [BN, BDV]
        else:
            b_v = tl.load(p_v)
        b_s = tl.dot(x.b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)  # [BM, BN]
        b_p = tl.exp2(b_s * scale_log2 - x.b_lse2[:, None])
        if MASK > 0:
            m_s = m_n[None, :]
            if MASK > 1:
                m_s = m_s & (o_n[None, :] <= x.o_q[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_ds = score_gradient(b_p, x.b_do, b_v, x.b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=FLOAT32_DOT)
    return b_dq


@jit
def _segment_gradient(b_dq, part, rows, first, count, scale_log2, SHAPE: tl.constexpr):
    """dQ / scale from the rows of a segment."""
    whole = first + count // SHAPE.BN * SHAPE.BN
    b_dq = _query_gradient_rows(b_dq, part, rows, first, whole, scale_log2, 0, SHAPE)
    return _query_gradient_rows(b_dq, part, rows, whole, first + count, scale_log2, 1, SHAPE)


@jit(general="sizes")
def _query_gradient_kernel(x, p_dq, lists, sizes, G, SHAPE: tl.constexpr):
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    BD: tl.constexpr = SHAPE.BD
    p_segments, p_log_weight, p_tail = lists
    Lq, shift, q_offset = sizes.Lq, sizes.shift, sizes.q_offset
    i_part, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_block = i_part // SHAPE.PARTS
    i_b, i_h = i_bh // sizes.H, i_bh % sizes.H
    i_kv = i_h // G
    span, begin = x.spans, 0
    if x.spans is not None:
        span = Spans(x.spans.order, x.spans.lead, *numbers_of(x.spans, i_b))
        Lq, begin = span.length, span.begin
    if (i_part * BM >= Lq + shift) | ((i_part + 1) * BM <= begin + shift):  # no query; its rows need not be there
        return
    tokens = KeyRows(span, *sequence(x.k, i_b, i_kv), *sequence(x.v, i_b, i_kv))
    copies = KeyRows(None, *sequence(x.ck, i_b, i_kv), *sequence(x.cv, i_b, i_kv))

    o_m = i_part * BM + tl.arange(0, BM)
    m_m = (o_m >= shift + begin) & (o_m < Lq + shift)
    o_row = o_m - shift
    if x.spans is not None:
        o_row = place_of(span, o_row, m_m) - span.lead
    p_q, stride_q = sequence(x.q, i_b, i_h)
    p_do, stride_do = sequence(x.do, i_b, i_h)
    b_q = load_rows(p_q, stride_q, o_row, m_m, SHAPE.D, BD)  # [BM, BD]
    b_do = load_rows(p_do, stride_do, o_row, m_m, SHAPE.DV, SHAPE.BDV)  # [BM, BDV]
    b_lse2 = tl.load(x.saved.lse2 + i_bh * x.saved.L_pad + o_m)
    b_delta = tl.load(x.saved.delta + i_bh * x.saved.L_pad + o_m)
    o_q = o_m + q_offset - shift
    scale_log2 = x.scale * 1.4426950408889634
    b_dq = tl.zeros([BM, BD], tl.float32)

    for i in range(sizes.segments):
        o_segment = i_block * sizes.segments + i
        compacted = tl.load(p_segments + o_segment * 3) == 1
        first = tl.load(p_segments + o_segment * 3 + 1)
        count = tl.load(p_segments + o_segment * 3 + 2)
        b_shift = b_lse2 - tl.load(p_log_weight + o_segment) * 1.4426950408889634
        part = Queries(b_q, b_do, b_shift, b_delta, o_q)
        if x.spans is None:
            rows = tokens
            if compacted:
                rows = copies
            b_dq = _segment_gradient(b_dq, part, rows, first, count, scale_log2, SHAPE)
        elif compacted:
            b_dq = _segment_gradient(b_dq, part, copies, first, count, scale_log2, SHAPE)
        else:
            b_dq = _segment_gradient(b_dq, part, tokens, first, count, scale_log2, SHAPE)
    stop = q_offset - shift + tl.minimum((i_part + 1) * BM, Lq + shift)
    tail = tl.load(p_tail + i_block)
    # up to here every query sees every row
    middle = tail + tl.maximum(q_offset - shift + i_part * BM - tail, 0) // BN * BN
    part = Queries(b_q, b_do, b_lse2, b_delta, o_q)
    b_dq = _query_gradient_rows(b_dq, part, tokens, tail, middle, scale_log2, 0, SHAPE)
    b_dq = _query_gradient_rows(b_dq, part, tokens, middle, stop, scale_log2, 2, SHAPE)
    o_d = tl.arange(0, BD)
    p_dq += (i_bh * sizes.Lq + o_row.to(tl.int64)[:, None]) * SHAPE.D + o_d[None, :]
    tl.store(p_dq, b_dq * x.scale, mask=m_m[:, None] & (o_d < SHAPE.D)[None, :])


# ---------------------------------------------------------------------------------------------------------------
# Kernels: dK and dV, one program per (chunk, KV head), then the sums over slots


# A tile of rows: where they are, and the log-weight of each in base 2, -inf for rows that are not seen.
Keys = namedtuple("Keys", "b_k b_v b_bias o_n")


@jit
def _row_gradient_queries(b_dk, b_dv, x, inputs, run, sizes, CAUSAL: tl.constexpr, SHAPE: tl.constexpr):
    """dK / scale and dV from the queries of a run of all heads; CAUSAL hides row j where j > the query."""
    BM: tl.constexpr = SHAPE.BM
    q, do, saved, Lq, shift = inputs.q, inputs.do, inputs.saved, sizes.Lq, sizes.shift
    first, last, begin = tl.load(run + 2), tl.load(run + 3), 0
    if inputs.spans is not None:  # parts without a query of the sequence are left out
        Lq, begin = inputs.spans.length, inputs.spans.begin
        first, last = tl.maximum(first, (begin + shift) // BM * BM), tl.minimum(last, tl.cdiv(Lq + shift, BM) * BM)
        last = tl.maximum(first, last)
    o_part, o_d, o_dv = tl.arange(0, BM), tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
    for i in range((last - first) // BM * SHAPE.G):
        i_h, i_m = tl.cast(i % SHAPE.G, tl.int64), first + i // SHAPE.G * BM
        if inputs.spans is None:
            o_row = (i_m - shift).to(tl.int64)
            p_q = q.p + (i_h * q.h + o_row * q.n) + (o_part[:, None] * q.n + o_d[None, :])
            p_do = do.p + (i_h * do.h + o_row * do.n) + (o_part[:, None] * do.n + o_dv[None, :])
        else:
            o_pos = i_m + o_part - shift
            o_place = place_of(inputs.spans, o_pos, (o_pos >= begin) & (o_pos < Lq)) - inputs.spans.lead
            o_place = o_place.to(tl.int64)[:, None]
            p_q = q.p + i_h * q.h + o_place * q.n + o_d[None, :]
            p_do = do.p + i_h * do.h + o_place * do.n + o_dv[None, :]
        m_m = ((i_m + o_part >= shift + begin) & (i_m + o_part < Lq + shift))[:, None]
        if SHAPE.EVEN and SHAPE.D == SHAPE.BD:
            b_q = tl.load(p_q)  # [BM, BD]
        else:
            b_q = tl.load(p_q, mask=m_m & (o_d < SHAPE.D)[None, :], other=0.0)
        b_lse2 = tl.load(saved.lse2 + i_h * saved.L_pad + i_m + o_part)
        b_s = tl.dot(x.b_k, tl.trans(b_q), input_precision=FLOAT32_DOT)  # [BN, BM]
        b_p = tl.exp2(b_s * (inputs.scale * 1.4426950408889634) + (x.b_bias[:, None] - b_lse2[None, :]))
        if CAUSAL:
            b_p = tl.where(x.o_n[:, None] <= (i_m + o_part + sizes.q_offset - shift)[None, :], b_p, 0.0)
        if SHAPE.EVEN and SHAPE.DV == SHAPE.BDV:
            b_do = tl.load(p_do)  # [BM, BDV]
        else:
            b_do = tl.load(p_do, mask=m_m & (o_dv < SHAPE.DV)[None, :], other=0.0)
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=FLOAT32_DOT)
        b_delta = tl.load(saved.delta + i_h * saved.L_pad + i_m + o_part)
        b_ds = score_gradient(b_p, x.b_v, b_do, b_delta[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=FLOAT32_DOT)
    return b_dk, b_dv


@jit(general="sizes")
def _row_gradient_kernel(x, targets, lists, sizes, SHAPE: tl.constexpr):
    BN: tl.constexpr = SHAPE.BN
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    p_dk, p_dv, p_dck, p_dcv, p_dk_slots, p_dv_slots = targets
    p_chunks, p_runs, p_log_weight = lists
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_kv = i_bh // sizes.H, i_bh % sizes.H
    p_chunks += tl.program_id(0) * 6
    compacted, row = tl.load(p_chunks) == 1, tl.load(p_chunks + 1)
    first_run, causal_run, stop_run = tl.load(p_chunks + 2), tl.load(p_chunks + 3), tl.load(p_chunks + 4)
    slot = tl.load(p_chunks + 5).to(tl.int64)

    rows, L = KeyRows(None, *sequence(x.k, i_b, i_kv), *sequence(x.v, i_b, i_kv)), sizes.Lk
    if compacted:
        rows, L, p_dk, p_dv = (
            KeyRows(None, *sequence(x.ck, i_b, i_kv), *sequence(x.cv, i_b, i_kv)),
            sizes.A,
            p_dck,
            p_dcv,
        )
    o_n, o_d, o_dv = row + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    o_row, span, count = o_n.to(tl.int64)[:, None], x.spans, L
    if x.spans is not None:
        span = Spans(x.spans.order, x.spans.lead, *numbers_of(x.spans, i_b))
        count = tl.where(compacted, L, span.length)
        if row >= count:
            return
        o_place = place_of(span, o_n, o_n < tl.where(compacted, 0, count))
        o_row = tl.where(compacted, o_n, o_place).to(tl.int64)[:, None]
    m_k = (o_n < count)[:, None] & (o_d < SHAPE.D)[None, :]
    m_v = (o_n < count)[:, None] & (o_dv < SHAPE.DV)[None, :]
    b_k = tl.load(rows.p_k + o_row * rows.stride_k + o_d[None, :], mask=m_k, other=0.0)  # [BN, BD]
    b_v = tl.load(rows.p_v + o_row * rows.stride_v + o_dv[None, :], mask=m_v, other=0.0)  # [BN, BDV]

    p_q, stride_q = sequence(x.q, i_b, i_kv * SHAPE.G)
    p_do, stride_do = sequence(x.do, i_b, i_kv * SHAPE.G)
    at = i_bh * SHAPE.G * x.saved.L_pad
    saved = Saved(x.saved.lse2 + at, x.saved.delta + at, x.saved.L_pad)
    q, do = Strided(p_q, 0, x.q.h, stride_q), Strided(p_do, 0, x.do.h, stride_do)
    x = _Inputs(q, x.k, x.v, x.ck, x.cv, do, x.scale, saved, span)
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for i in range(first_run, causal_run):
        run = p_runs + i * 4
        m_n = (o_n >= tl.load(run)) & (o_n < tl.load(run + 1))
        b_bias = tl.where(m_n, tl.load(p_log_weight + i) * 1.4426950408889634, float("-inf"))
        b_dk, b_dv = _row_gradient_queries(b_dk, b_dv, Keys(b_k, b_v, b_bias, o_n), x, run, sizes, False, SHAPE)
    for i in range(causal_run, stop_run):
        run = p_runs + i * 4
        m_n = (o_n >= tl.load(run)) & (o_n < tl.load(run + 1))
        b_bias = tl.where(m_n, 0.0, float("-inf"))
        b_dk, b_dv = _row_gradient_queries(b_dk, b_dv, Keys(b_k, b_v, b_bias, o_n), x, run, sizes, True, SHAPE)

    o_out = i_bh * L + o_row
    if slot >= 0:
        o_out = (slot * tl.num_programs(1) + i_bh) * BN + (o_row - row)
        if x.spans is not None:  # not for all: from o_n in int32 it spills more registers
            o_out = (slot * tl.num_programs(1) + i_bh) * BN + (o_n - row)[:, None]
        p_dk, p_dv = p_dk_slots, p_dv_slots
    tl.store(p_dk + o_out * SHAPE.D + o_d[None, :], b_dk * x.scale, mask=m_k)
    tl.store(p_dv + o_out * SHAPE.DV + o_dv[None, :], b_dv, mask=m_v)


@jit(general="lengths D H")
def _sum_slots_kernel(p_slots, targets, p_sums, spans, lengths, D, H, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i_bh = tl.program_id(2).to(tl.int64)
    p_sums += tl.program_id(0) * 4
    compacted, row = tl.load(p_sums) == 1, tl.load(p_sums + 1)
    p_out, L = targets[0], lengths[0]
    if compacted:
        p_out, L = targets[1], lengths[1]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # within the tile, whose rows are contiguous
    m = o < tl.minimum(SIZE, (L - row) * D)
    o_out = row * D + o
    if spans is not None:
        if not compacted:
            span, o_n = Spans(spans.order, spans.lead, *numbers_of(spans, i_bh // H)), row + o // D
            m = (o < SIZE) & (o_n < span.length)
            o_out = place_of(span, o_n, m) * D + o % D
    b_sum = tl.zeros([BLOCK], tl.float32)
    for slot in range(tl.load(p_sums + 2), tl.load(p_sums + 3)):
        b_sum += tl.load(p_slots + (tl.cast(slot, tl.int64) * tl.num_programs(2) + i_bh) * SIZE + o, mask=m, other=0.0)
    tl.store(p_out + i_bh * L * D + o_out, b_sum, mask=m)


# ---------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Tiles:
    """Queries and rows per tile, warps and pipeline stages of a kernel."""

    queries: int
    rows: int
    warps: int
    stages: int

    def at_most(self, queries: int, rows: int) -> Tiles:
        """No larger than that many queries and rows need."""
        small = (min(a, max(16, next_power_of_two(b))) for a, b in ((self.queries, queries), (self.rows, rows)))
        return Tiles(next(small), next(small), self.warps, self.stages)


def query_tiles(width: int, itemsize: int, block: int) -> Tiles:
    """Tiles of the dQ kernel; ``width`` is D + Dv, each rounded up to a power of two.

    Measured on an H200 at n = 32,768, D = 128, bf16, as those below: 430 TFLOP/s, 377 with 128 queries and 8 warps.
    """
    if itemsize == 4:
        queries, *rest = (128, 64, 8, 1) if width <= 128 else (128, 32, 8, 1) if width <= 256 else (16, 32, 8, 1)
        return Tiles(min(queries, block), *rest)
    return Tiles(min(64, block), 64, 4, 2) if width <= 256 else Tiles(min(64, block), 32, 4, 3)


def row_tiles(width: int, itemsize: int, block: int) -> Tiles:
    """Tiles of the dK and dV kernel: 466 TFLOP/s, 436 with 64 queries, 128 rows and 8 warps."""
    if itemsize == 4:
        queries, *rest = (64, 64, 4, 2) if width <= 128 else (32, 32, 4, 2) if width <= 256 else (16, 16, 4, 1)
        return Tiles(min(queries, block), *rest)
    return Tiles(min(32, block), 64, 4, 3) if width <= 256 else Tiles(min(32, block), 64, 8, 3)


def segment_attention_backward_triton(
    grad: torch.Tensor,
    query: torch.Tensor,
    sources: Sources,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """:func:`.segments.segment_attention_backward` as Triton kernels; same arguments and float32 results.

    Raises ``TypeError`` for dtypes other than float16, bfloat16 and float32.
    """
    check_dtype(query)
    key, value, compacted_key, _ = sources.buffers
    (B, H, Lq, _), (_, H_kv, Lk, _), A = query.shape, key.shape, compacted_key.shape[2]
    widths, spans = Widths.alike(key, value), sources.spans
    make = torch.empty if spans is None else torch.zeros
    gradients = tuple(make(x.shape, dtype=torch.float32, device=x.device) for x in (query, *sources.buffers))
    saved = Saved.of(grad, out, lse, len(table.tail) * table.block, table.shift, spans)
    q, k, v, ck, cv, do = (strided(x) for x in (query, *sources.buffers, grad))
    inputs = _Inputs(q, k, v, ck, cv, do, scale, saved, spans)
    shape = (widths.BD + widths.BDV, query.element_size(), table.block)

    segments, *rest = table.on(query.device)
    tiles, sizes = query_tiles(*shape), _Sizes(H, Lq, Lk, A, table.shift, table.q_offset, segments.shape[1])
    parts = table.block // tiles.queries
    launch(_query_gradient_kernel, (len(table.tail) * parts, B * H),
        inputs, gradients[0], (segments, *rest), sizes, H // H_kv,
        SHAPE=_Shape(*widths, tiles.queries, tiles.rows, PARTS=parts), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip

    tiles, G = row_tiles(*shape), H // H_kv
    seen = (Lq, Lk) if spans is None else (table.queries, table.queries)
    plan, (*lists, sums) = plan_on(query.device, table, *seen, A, tiles.rows, tiles.queries, G)
    slots = tuple(lse.new_empty(plan.slots * B * H_kv, tiles.rows, d, dtype=torch.float32) for d in widths[:2])
    even = spans is None and Lq % tiles.queries == table.shift % tiles.queries == 0
    launch(_row_gradient_kernel, (len(plan.chunks), B * H_kv),
        inputs, (*gradients[1:], *slots), tuple(lists), sizes._replace(H=H_kv),
        SHAPE=_Shape(*widths, tiles.queries, tiles.rows, G=G, EVEN=even),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    for i, (parts_of, d) in enumerate(zip(slots, widths[:2], strict=True) if len(sums) else ()):
        size = tiles.rows * d
        launch(_sum_slots_kernel, (len(sums), -(-size // 1024), B * H_kv),
            parts_of, gradients[1 + i :: 2], sums, spans, (Lk, A), d, H_kv, SIZE=size, BLOCK=1024, num_warps=4
        )  # fmt: skip
    return gradients


def segment_gradients(grad: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    """:func:`.segments.segment_attention_backward`, with the kernels on CUDA; same arguments and results."""
    return (segment_attention_backward_triton if grad.is_cuda else segment_attention_backward)(grad, *others)


# ---------------------------------------------------------------------------------------------------------------
# Gradients of copies go back to the rows that they were copied from


@jit(general="sizes")
def _accumulate_kernel(
    p_target, strides, rows, lists, sizes, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    p_order, p_first = lists
    H, L, A = sizes
    stride_b, stride_h, stride_n, stride_d = strides
    i_seq = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_seq // H, i_seq % H
    o_n, o_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n, m_d = o_n < L, (o_d < D)[None, :]
    first = tl.load(p_first + i_seq * (L + 1) + o_n, mask=m_n, other=0)
    count = tl.load(p_first + i_seq * (L + 1) + o_n + 1, mask=m_n, other=0) - first
    p_rows, stride_r = sequence(rows, i_b, i_h)
    b_sum = tl.zeros([BN, BD], tl.float32)
    for i in range(tl.max(count, 0)):
        i_row = tl.load(p_order + i_seq * A + first + i, mask=i < count, other=0)
        b_sum += load_rows(p_rows, stride_r, i_row, i < count, D, BD)  # [BN, BD]
    p_target += i_b * stride_b + i_h * stride_h
    p_out = p_target + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    m_out = (count > 0)[:, None] & m_d
    tl.store(p_out, tl.load(p_out, mask=m_out, other=0.0) + b_sum, mask=m_out)


def accumulate_rows_reference(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """``target[b, h, index[b, h, i]] += rows[b, h, i]`` for every i, in place.

    ``target`` float32 ``[B, H, L, D]``, ``index`` int32 ``[B, H, A]`` with repetitions, ``rows`` float32
    ``[B, H, A, D]``.
    """
    target.scatter_add_(2, index.long()[..., None].expand_as(rows), rows)


def accumulate_rows_triton(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """:func:`accumulate_rows_reference` in an order that is always the same."""
    require_triton()
    (B, H, L, D), A = target.shape, index.shape[2]
    if not A:
        return
    ordered, order = index.sort(dim=-1, stable=True)
    borders = torch.arange(L + 1, device=index.device, dtype=index.dtype).expand(B, H, L + 1).contiguous()
    first = torch.searchsorted(ordered, borders, out_int32=True)
    launch(_accumulate_kernel, (-(-L // 16), B * H),
        target, target.stride(), strided(rows), (order.to(torch.int32), first), (H, L, A),
        D=D, BD=max(16, next_power_of_two(D)), BN=16, num_warps=4,
    )  # fmt: skip


def accumulate_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """:func:`accumulate_rows_reference`, with the kernel on CUDA; deterministic on both."""
    (accumulate_rows_triton if target.is_cuda else accumulate_rows_reference)(target, index, rows)
