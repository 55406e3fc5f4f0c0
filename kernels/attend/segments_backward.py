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
from dataclasses import dataclass

import numpy as np
import torch

from ..launch import FLOAT32_DOT, constant, jit, launch, next_power_of_two, require_triton, tl
from .segments import NO_TAIL, TOKENS, SegmentTable, segment_attention_backward

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


def _piece(source, tile, row, stop, first, last, causal, weight) -> np.ndarray:
    """Rows ``row .. stop`` of a tile, seen by the queries ``first .. last``."""
    pieces = np.empty(len(tile), _PIECE)
    for name, x in zip(_PIECE.names, (source, tile, row, stop, first, last, causal, weight), strict=True):
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


@jit(general="H Lq shift")
def _delta_kernel(
    p_grad, p_out, p_lse, p_lse2, p_delta, H, Lq, shift, L_pad, stride_gb, stride_gh, stride_gn, stride_ob, stride_oh,
    stride_on, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m, o_dv = i_tile * BM + tl.arange(0, BM), tl.arange(0, BDV)
    o_row = (o_m - shift).to(tl.int64)[:, None]
    m_m = (o_m >= shift) & (o_m < Lq + shift)
    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    p_grad += i_b * stride_gb + i_h * stride_gh
    p_out += i_b * stride_ob + i_h * stride_oh
    b_grad = tl.load(p_grad + o_row * stride_gn + o_dv[None, :], mask=m_out, other=0.0).to(tl.float32)
    b_out = tl.load(p_out + o_row * stride_on + o_dv[None, :], mask=m_out, other=0.0).to(tl.float32)
    # where no query is, probabilities are 0
    b_lse = tl.load(p_lse + i_bh * Lq + o_m - shift, mask=m_m, other=float("inf"))
    tl.store(p_lse2 + i_bh * L_pad + o_m, b_lse * 1.4426950408889634, mask=o_m < L_pad)
    tl.store(p_delta + i_bh * L_pad + o_m, tl.sum(b_grad * b_out, 1), mask=o_m < L_pad)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: dQ, one program per (part of a block of queries, query head)


@jit
def _query_gradient_rows(
    b_dq, b_q, b_do, b_lse2, b_delta, o_q, p_k, p_v, stride_k, stride_v, first, stop, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ / scale from the rows ``first .. stop``, whole tiles unless MASKED; CAUSAL hides row j where j > o_q."""
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        o_n = start + tl.arange(0, BN)
        o_row = o_n.to(tl.int64)[:, None]
        m_n = o_n < stop
        p_k_tile, p_v_tile = p_k + o_row * stride_k + o_d[None, :], p_v + o_row * stride_v + o_dv[None, :]
        if MASKED or D != BD:
            b_k = tl.load(p_k_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)  # [BN, BD]
        else:
            b_k = tl.load(p_k_tile)
        if MASKED or DV != BDV:
            b_v = tl.load(p_v_tile, mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BN, BDV]
        else:
            b_v = tl.load(p_v_tile)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)  # [BM, BN]
        b_p = tl.exp2(b_s * scale_log2 - b_lse2[:, None])
        if MASKED:
            m_s = m_n[None, :]
            if CAUSAL:
                m_s = m_s & (o_n[None, :] <= o_q[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=FLOAT32_DOT)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=FLOAT32_DOT)
    return b_dq


@jit(general="n_segments H Lq shift q_offset")
def _query_gradient_kernel(
    p_q, p_k, p_v, p_ck, p_cv, p_do, p_lse2, p_delta, p_dq, p_segments, p_log_weight, p_tail, n_segments, H, G, Lq,
    shift, L_pad, q_offset, scale, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb,
    stride_vh, stride_vn, stride_ckb, stride_ckh, stride_ckn, stride_cvb, stride_cvh, stride_cvn, stride_gb, stride_gh,
    stride_gn, PARTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_part, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_block = i_part // PARTS
    i_b, i_h = i_bh // H, i_bh % H
    i_kv = i_h // G
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    p_ck += i_b * stride_ckb + i_kv * stride_ckh
    p_cv += i_b * stride_cvb + i_kv * stride_cvh

    o_m = i_part * BM + tl.arange(0, BM)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    o_row = (o_m - shift).to(tl.int64)[:, None]
    m_m = ((o_m >= shift) & (o_m < Lq + shift))[:, None]
    m_q, m_do = m_m & (o_d < D)[None, :], m_m & (o_dv < DV)[None, :]
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_gb + i_h * stride_gh
    b_q = tl.load(p_q + o_row * stride_qn + o_d[None, :], mask=m_q, other=0.0)  # [BM, BD]
    b_do = tl.load(p_do + o_row * stride_gn + o_dv[None, :], mask=m_do, other=0.0)  # [BM, BDV]
    b_lse2 = tl.load(p_lse2 + i_bh * L_pad + o_m)
    b_delta = tl.load(p_delta + i_bh * L_pad + o_m)
    o_q = o_m + q_offset - shift
    scale_log2 = scale * 1.4426950408889634
    b_dq = tl.zeros([BM, BD], tl.float32)

    for i in range(n_segments):
        o_segment = i_block * n_segments + i
        compacted = tl.load(p_segments + o_segment * 3) == 1
        first = tl.load(p_segments + o_segment * 3 + 1)
        rows = tl.load(p_segments + o_segment * 3 + 2)
        b_shift = b_lse2 - tl.load(p_log_weight + o_segment) * 1.4426950408889634
        p_k_from, p_v_from, stride_k, stride_v = p_k, p_v, stride_kn, stride_vn
        if compacted:
            p_k_from, p_v_from, stride_k, stride_v = p_ck, p_cv, stride_ckn, stride_cvn
        whole = first + rows // BN * BN
        b_dq = _query_gradient_rows(
            b_dq, b_q, b_do, b_shift, b_delta, o_q, p_k_from, p_v_from, stride_k, stride_v, first, whole,
            scale_log2, False, False, D, DV, BD, BDV, BN,
        )  # fmt: skip
        b_dq = _query_gradient_rows(
            b_dq, b_q, b_do, b_shift, b_delta, o_q, p_k_from, p_v_from, stride_k, stride_v, whole, first + rows,
            scale_log2, True, False, D, DV, BD, BDV, BN,
        )  # fmt: skip
    stop = q_offset - shift + tl.minimum((i_part + 1) * BM, Lq + shift)
    tail = tl.load(p_tail + i_block)
    # up to here every query sees every row
    middle = tail + tl.maximum(q_offset - shift + i_part * BM - tail, 0) // BN * BN
    b_dq = _query_gradient_rows(
        b_dq, b_q, b_do, b_lse2, b_delta, o_q, p_k, p_v, stride_kn, stride_vn, tail, middle,
        scale_log2, False, False, D, DV, BD, BDV, BN,
    )  # fmt: skip
    b_dq = _query_gradient_rows(
        b_dq, b_q, b_do, b_lse2, b_delta, o_q, p_k, p_v, stride_kn, stride_vn, middle, stop,
        scale_log2, True, True, D, DV, BD, BDV, BN,
    )  # fmt: skip
    tl.store(p_dq + (i_bh * Lq + o_row) * D + o_d[None, :], b_dq * scale, mask=m_q)


# ---------------------------------------------------------------------------------------------------------------
# Kernels: dK and dV, one program per (chunk, KV head), then the sums over slots


@jit
def _row_gradient_queries(
    b_dk, b_dv, b_k, b_v, b_bias, o_n, p_q, p_do, p_lse2, p_delta, first, last, Lq, shift, L_pad, q_offset, scale_log2,
    stride_qh, stride_qn, stride_gh, stride_gn,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV from the queries ``first .. last`` of G heads; CAUSAL hides row j where j > the query.

    ``b_bias`` is the log-weight of each row in base 2, -inf for rows that are not seen. EVEN: all parts are full.
    """
    o_part, o_d, o_dv = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    for i in range((last - first) // BM * G):
        i_h, i_m = tl.cast(i % G, tl.int64), first + i // G * BM
        o_row = (i_m - shift).to(tl.int64)
        p_q_tile = p_q + (i_h * stride_qh + o_row * stride_qn) + (o_part[:, None] * stride_qn + o_d[None, :])
        p_do_tile = p_do + (i_h * stride_gh + o_row * stride_gn) + (o_part[:, None] * stride_gn + o_dv[None, :])
        m_m = ((i_m + o_part >= shift) & (i_m + o_part < Lq + shift))[:, None]
        if EVEN and D == BD:
            b_q = tl.load(p_q_tile)  # [BM, BD]
        else:
            b_q = tl.load(p_q_tile, mask=m_m & (o_d < D)[None, :], other=0.0)
        b_lse2 = tl.load(p_lse2 + i_h * L_pad + i_m + o_part)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=FLOAT32_DOT)  # [BN, BM]
        b_p = tl.exp2(b_s * scale_log2 + (b_bias[:, None] - b_lse2[None, :]))
        if CAUSAL:
            b_p = tl.where(o_n[:, None] <= (i_m + o_part + q_offset - shift)[None, :], b_p, 0.0)
        if EVEN and DV == BDV:
            b_do = tl.load(p_do_tile)  # [BM, BDV]
        else:
            b_do = tl.load(p_do_tile, mask=m_m & (o_dv < DV)[None, :], other=0.0)
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=FLOAT32_DOT)
        b_delta = tl.load(p_delta + i_h * L_pad + i_m + o_part)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=FLOAT32_DOT)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=FLOAT32_DOT)
    return b_dk, b_dv


@jit(general="H_kv Lq shift Lk A q_offset")
def _row_gradient_kernel(
    p_q, p_k, p_v, p_ck, p_cv, p_do, p_lse2, p_delta, p_dk, p_dv, p_dck, p_dcv, p_dk_slots, p_dv_slots, p_chunks,
    p_runs, p_log_weight, H_kv, Lq, shift, L_pad, Lk, A, q_offset, scale, stride_qb, stride_qh, stride_qn, stride_kb,
    stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ckb, stride_ckh, stride_ckn, stride_cvb, stride_cvh,
    stride_cvn, stride_gb, stride_gh, stride_gn,
    EVEN: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_kv = i_bh // H_kv, i_bh % H_kv
    p_chunks += tl.program_id(0) * 6
    compacted, row = tl.load(p_chunks) == 1, tl.load(p_chunks + 1)
    first_run, causal_run, stop_run = tl.load(p_chunks + 2), tl.load(p_chunks + 3), tl.load(p_chunks + 4)
    slot = tl.load(p_chunks + 5).to(tl.int64)

    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    stride_k, stride_v, L = stride_kn, stride_vn, Lk
    if compacted:
        p_k = p_ck + i_b * stride_ckb + i_kv * stride_ckh
        p_v = p_cv + i_b * stride_cvb + i_kv * stride_cvh
        stride_k, stride_v, L, p_dk, p_dv = stride_ckn, stride_cvn, A, p_dck, p_dcv
    o_n, o_d, o_dv = row + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    o_row = o_n.to(tl.int64)[:, None]
    m_k, m_v = (o_n < L)[:, None] & (o_d < D)[None, :], (o_n < L)[:, None] & (o_dv < DV)[None, :]
    b_k = tl.load(p_k + o_row * stride_k + o_d[None, :], mask=m_k, other=0.0)  # [BN, BD]
    b_v = tl.load(p_v + o_row * stride_v + o_dv[None, :], mask=m_v, other=0.0)  # [BN, BDV]

    p_q += i_b * stride_qb + i_kv * G * stride_qh
    p_do += i_b * stride_gb + i_kv * G * stride_gh
    p_lse2 += i_bh * G * L_pad
    p_delta += i_bh * G * L_pad
    scale_log2 = scale * 1.4426950408889634
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for run in range(first_run, causal_run):
        m_n = (o_n >= tl.load(p_runs + run * 4)) & (o_n < tl.load(p_runs + run * 4 + 1))
        b_bias = tl.where(m_n, tl.load(p_log_weight + run) * 1.4426950408889634, float("-inf"))
        b_dk, b_dv = _row_gradient_queries(
            b_dk, b_dv, b_k, b_v, b_bias, o_n, p_q, p_do, p_lse2, p_delta, tl.load(p_runs + run * 4 + 2),
            tl.load(p_runs + run * 4 + 3), Lq, shift, L_pad, q_offset, scale_log2, stride_qh, stride_qn,
            stride_gh, stride_gn, False, EVEN, G, D, DV, BD, BDV, BM,
        )  # fmt: skip
    for run in range(causal_run, stop_run):
        m_n = (o_n >= tl.load(p_runs + run * 4)) & (o_n < tl.load(p_runs + run * 4 + 1))
        b_bias = tl.where(m_n, 0.0, float("-inf"))
        b_dk, b_dv = _row_gradient_queries(
            b_dk, b_dv, b_k, b_v, b_bias, o_n, p_q, p_do, p_lse2, p_delta, tl.load(p_runs + run * 4 + 2),
            tl.load(p_runs + run * 4 + 3), Lq, shift, L_pad, q_offset, scale_log2, stride_qh, stride_qn,
            stride_gh, stride_gn, True, EVEN, G, D, DV, BD, BDV, BM,
        )  # fmt: skip

    o_out = i_bh * L + o_row
    if slot >= 0:
        o_out = (slot * tl.num_programs(1) + i_bh) * BN + (o_row - row)
        p_dk, p_dv = p_dk_slots, p_dv_slots
    tl.store(p_dk + o_out * D + o_d[None, :], b_dk * scale, mask=m_k)
    tl.store(p_dv + o_out * DV + o_dv[None, :], b_dv, mask=m_v)


@jit(general="Lk A D")
def _sum_slots_kernel(
    p_slots, p_tokens, p_compacted, p_sums, Lk, A, D, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_bh = tl.program_id(2).to(tl.int64)
    p_sums += tl.program_id(0) * 4
    compacted, row = tl.load(p_sums) == 1, tl.load(p_sums + 1)
    p_out, L = p_tokens, Lk
    if compacted:
        p_out, L = p_compacted, A
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # within the tile, whose rows are contiguous
    m = o < tl.minimum(SIZE, (L - row) * D)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for slot in range(tl.load(p_sums + 2), tl.load(p_sums + 3)):
        b_sum += tl.load(p_slots + (tl.cast(slot, tl.int64) * tl.num_programs(2) + i_bh) * SIZE + o, mask=m, other=0.0)
    tl.store(p_out + (i_bh * L + row) * D + o, b_sum, mask=m)


# ---------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Tiles:
    """Queries and rows per tile, warps and pipeline stages of a kernel."""

    queries: int
    rows: int
    warps: int
    stages: int


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


class _Problem:
    """The tensors of one backward pass and the launches over them, in order: see ``run``."""

    def __init__(self, grad, query, key, value, compacted_key, compacted_value, out, lse, table, scale) -> None:
        tensors = (query, key, value, compacted_key, compacted_value, grad, out)
        q, k, v, ck, cv, grad, out = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        self.inputs, self.grad, self.out, self.lse = (q, k, v, ck, cv), grad, out, lse.contiguous()
        self.table, self.scale = table, scale
        (B, H, Lq, D), H_kv, Dv = q.shape, k.shape[1], v.shape[-1]
        self.B, self.H, self.Lq, self.H_kv, self.G = B, H, Lq, H_kv, H // H_kv
        self.Lk, self.A = k.shape[2], ck.shape[2]
        BD, BDV = (max(16, next_power_of_two(x)) for x in (D, Dv))
        self.sizes = dict(D=D, DV=Dv, BD=BD, BDV=BDV)
        shape = (BD + BDV, q.element_size(), table.block)
        self.query_tiles, self.row_tiles = query_tiles(*shape), row_tiles(*shape)
        self.L_pad = len(table.tail) * table.block
        self.strides = [x for t in (*self.inputs, grad) for x in t.stride()[:3]]
        self.lse2, self.delta = (q.new_empty(B, H, self.L_pad, dtype=torch.float32) for _ in range(2))
        self.gradients = tuple(x.new_empty(x.shape, dtype=torch.float32) for x in self.inputs)

    def run(self) -> tuple[torch.Tensor, ...]:
        self.launch_delta()
        self.launch_queries()
        self.launch_rows()
        self.launch_sums()
        return self.gradients

    def launch_delta(self) -> None:
        DV, BDV = self.sizes["DV"], self.sizes["BDV"]
        launch(_delta_kernel, (-(-self.L_pad // 32), self.B * self.H),
            self.grad, self.out, self.lse, self.lse2, self.delta, self.H, self.Lq, self.table.shift, self.L_pad,
            *self.grad.stride()[:3], *self.out.stride()[:3],
            DV=DV, BDV=BDV, BM=32, num_warps=4,
        )  # fmt: skip

    def launch_queries(self) -> None:
        tiles, table = self.query_tiles, self.table
        segments, log_weight, tail = table.on(self.lse.device)
        parts = table.block // tiles.queries
        launch(_query_gradient_kernel, (len(table.tail) * parts, self.B * self.H),
            *self.inputs, self.grad, self.lse2, self.delta, self.gradients[0], segments, log_weight, tail,
            segments.shape[1], self.H, self.G, self.Lq, table.shift, self.L_pad, table.q_offset, self.scale,
            *self.strides,
            PARTS=parts, **self.sizes, BM=tiles.queries, BN=tiles.rows,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def launch_rows(self) -> None:
        tiles, D, Dv = self.row_tiles, self.sizes["D"], self.sizes["DV"]
        sizes = (self.Lq, self.Lk, self.A, tiles.rows, tiles.queries, self.G)
        self.plan, (chunks, runs, log_weight, self.sums) = plan_on(self.lse.device, self.table, *sizes)
        slots = self.plan.slots * self.B * self.H_kv
        self.slots = tuple(self.delta.new_empty(slots, tiles.rows, d) for d in (D, Dv))
        launch(_row_gradient_kernel, (len(chunks), self.B * self.H_kv),
            *self.inputs, self.grad, self.lse2, self.delta, *self.gradients[1:], *self.slots, chunks, runs, log_weight,
            self.H_kv, self.Lq, self.table.shift, self.L_pad, self.Lk, self.A, self.table.q_offset, self.scale,
            *self.strides, EVEN=self.Lq % tiles.queries == self.table.shift % tiles.queries == 0, G=self.G,
            **self.sizes, BM=tiles.queries, BN=tiles.rows,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def launch_sums(self) -> None:
        if not len(self.sums):
            return
        _, *targets = self.gradients
        for slots, tokens, compacted in zip(self.slots, targets[:2], targets[2:], strict=True):
            d = slots.shape[-1]
            size = self.row_tiles.rows * d
            launch(_sum_slots_kernel, (len(self.sums), -(-size // 1024), self.B * self.H_kv),
                slots, tokens, compacted, self.sums, self.Lk, self.A, d, SIZE=size, BLOCK=1024, num_warps=4
            )  # fmt: skip


def segment_attention_backward_triton(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    compacted_key: torch.Tensor,
    compacted_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`.segments.segment_attention_backward` as Triton kernels; same arguments and float32 results.

    Raises ``TypeError`` for dtypes other than float16, bfloat16 and float32.
    """
    require_triton()
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"query: dtype {query.dtype}; the kernel takes float16, bfloat16 or float32")
    return _Problem(grad, query, key, value, compacted_key, compacted_value, out, lse, table, scale).run()


def segment_gradients(
    grad: torch.Tensor, *others: torch.Tensor | SegmentTable | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`.segments.segment_attention_backward`, with the kernels on CUDA; same arguments and results."""
    return (segment_attention_backward_triton if grad.is_cuda else segment_attention_backward)(grad, *others)


# ---------------------------------------------------------------------------------------------------------------
# Gradients of copies go back to the rows that they were copied from


@jit(general="H L A")
def _accumulate_kernel(
    p_target, p_rows, p_order, p_first, H, L, A, stride_tb, stride_th, stride_tn, stride_td, stride_rb, stride_rh,
    stride_rn, stride_rd, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_seq = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_seq // H, i_seq % H
    o_n, o_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n, m_d = o_n < L, (o_d < D)[None, :]
    first = tl.load(p_first + i_seq * (L + 1) + o_n, mask=m_n, other=0)
    count = tl.load(p_first + i_seq * (L + 1) + o_n + 1, mask=m_n, other=0) - first
    p_rows += i_b * stride_rb + i_h * stride_rh
    p_target += i_b * stride_tb + i_h * stride_th
    b_sum = tl.zeros([BN, BD], tl.float32)
    for i in range(tl.max(count, 0)):
        m_i = i < count
        i_row = tl.load(p_order + i_seq * A + first + i, mask=m_i, other=0).to(tl.int64)
        p_row = p_rows + i_row[:, None] * stride_rn + o_d[None, :] * stride_rd
        b_sum += tl.load(p_row, mask=m_i[:, None] & m_d, other=0.0)
    p_out = p_target + o_n.to(tl.int64)[:, None] * stride_tn + o_d[None, :] * stride_td
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
        target, rows, order.to(torch.int32), first, H, L, A, *target.stride(), *rows.stride(),
        D=D, BD=max(16, next_power_of_two(D)), BN=16, num_warps=4,
    )  # fmt: skip


def accumulate_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """:func:`accumulate_rows_reference`, with the kernel on CUDA; deterministic on both."""
    (accumulate_rows_triton if target.is_cuda else accumulate_rows_reference)(target, index, rows)
