"""Sparse Transformer attention as Triton kernels, forward and backward, without atomics: the same bits every time.

Positions lie on *lines*, ``p = r + step * x`` for line r: all of them on one (step 1), or the positions of one residue
on each of as many lines as its stride, the *period*, where the far part of ``strided`` is plain causal attention. On
a line, query x sees the keys y of one of the ranges

    BLOCK    floor(y / period) = floor(x / period), y <= x    the local part of ``fixed``
    WINDOW   x - period < y <= x                              the local part of ``strided``
    CAUSAL   y <= x                                              the far part of ``strided`` alone
    BEFORE   y < x                                               that part beside the local one: position i counts once

and with FAR a number of summary columns, the first ones of a compacted copy: those of earlier blocks (EARLIER), or all
up to the query (UP_TO). Two passes over the same queries are combined exactly: the second goes on from ``out`` and
``lse`` of the first. The backward pass computes probabilities again from ``lse``.
"""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..launch import (
    FLOAT32_DOT,
    Widths,
    constexpr,
    jit,
    launch,
    load_rows,
    sequence,
    strided,
    tl,
)
from .segments import Outputs, Softmax, check_dtype, describe, softmax_start, softmax_step, with_positive_scale
from .segments_backward import Queries, Saved, Tiles, score_gradient

if TYPE_CHECKING:
    from ..sparse import Pattern

NOTHING, BLOCK, WINDOW, CAUSAL, BEFORE = 0, 1, 2, 3, 4
EARLIER, UP_TO = 1, 2
_BLOCK, _WINDOW, _BEFORE, _EARLIER = (constexpr(x) for x in (BLOCK, WINDOW, BEFORE, EARLIER))


@dataclass(frozen=True)
class Pass:
    """One launch over some heads: ``first, first + every, ..``. near, far: as above; every: from one to the next."""

    near: int
    far: int
    first: int
    every: int

    @property
    def on_lines(self) -> bool:
        return self.near in (CAUSAL, BEFORE)


def passes(pattern: Pattern) -> list[Pass]:
    """The launches of a pattern, in order; of two over the same heads the second goes on from the first."""
    near = WINDOW if pattern.kind == "strided" else BLOCK
    if pattern.parts == "local":
        return [Pass(near, NOTHING, 0, 1)]
    if pattern.parts == "per_head":
        far = Pass(CAUSAL, NOTHING, 1, 2) if pattern.kind == "strided" else Pass(NOTHING, UP_TO, 1, 2)
        return [Pass(near, NOTHING, 0, 2), far]
    if pattern.parts == "far":
        return [Pass(CAUSAL, NOTHING, 0, 1) if pattern.kind == "strided" else Pass(NOTHING, UP_TO, 0, 1)]
    # far before local: it has the smaller share, and the first pass is rounded to the dtype of the output
    return [Pass(BEFORE, NOTHING, 0, 1), Pass(WINDOW, NOTHING, 0, 1)] if pattern.kind == "strided" else [
        Pass(BLOCK, EARLIER, 0, 1)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Device functions: what a query sees


# What the kernels read but by descriptor; ``hidden`` is a score that makes a probability of 0.
_Inputs = namedtuple("_Inputs", "q k v scale do saved hidden", defaults=(None, None, 0.0))


# ``heads`` of the H query heads: ``first, first + every, ..``; M summary columns, whose queries are split.
_Sizes = namedtuple("_Sizes", "H H_kv Lq Lk heads first every period c groups M splits")


# Widths, queries and keys of a tile, what is seen, and whether to go on from what the outputs hold.
_Shape = namedtuple("_Shape", "D DV BD BDV BM BN NEAR FAR AGAIN LINES")


@jit
def _lower(o_x, period, NEAR: tl.constexpr):
    """The first key that query ``o_x`` may see of its line."""
    if NEAR == _BLOCK:
        return o_x // period * period
    elif NEAR == _WINDOW:
        return tl.maximum(o_x - period + 1, 0)
    else:
        return o_x * 0


@jit
def _upper(o_y, period, length, NEAR: tl.constexpr):
    """The first query behind key ``o_y`` that does not see it."""
    if NEAR == _BLOCK:
        return tl.minimum((o_y // period + 1) * period, length)
    elif NEAR == _WINDOW:
        return tl.minimum(o_y + period, length)
    else:
        return o_y * 0 + length


@jit
def _columns(o_x, period, c, first, FAR: tl.constexpr):
    """How many summary columns the query at ``o_x`` sees; ``first``: where those of a block begin in it."""
    if FAR == _EARLIER:
        return o_x // period * c
    else:
        return o_x // period * c + tl.minimum(tl.maximum(o_x % period - first + 1, 0), c)


@jit
def _lines(sizes, LINES: tl.constexpr):
    """Positions from one to the next on a line, and the number of lines."""
    if LINES:
        return sizes.period, tl.minimum(sizes.period, sizes.Lk)
    else:
        return 1, 1


@jit
def _line_rows(x, i_b, i_kv, i_line):
    """Where the keys and values of a line begin, each with the stride from one position to the next."""
    p_k, stride_k = sequence(x.k, i_b, i_kv)
    p_v, stride_v = sequence(x.v, i_b, i_kv)
    i_line = i_line.to(tl.int64)
    return p_k + i_line * stride_k, stride_k, p_v + i_line * stride_v, stride_v


# A tile of the queries of a head that are on one line: from ``x`` to ``last``, and the first keys they see.
_Part = namedtuple("_Part", "i_b i_h i_kv i_line x last step o_x o_row lower b_lower")


@jit
def _part(sizes, SHAPE: tl.constexpr):
    i_b, i_head = tl.program_id(0) // sizes.heads, tl.program_id(0) % sizes.heads
    i_part = tl.num_programs(1) - 1 - tl.program_id(1)  # those that see most begin
    step, lines = _lines(sizes, SHAPE.LINES)
    i_line, i_tile = i_part % lines, i_part // lines
    i_h = sizes.first + i_head * sizes.every
    offset = sizes.Lk - sizes.Lq
    length = (sizes.Lk - 1 - i_line) // step + 1
    x = (offset - i_line + step - 1) // step + i_tile * SHAPE.BM  # the first query of the tile
    last = tl.minimum(x + SHAPE.BM, length) - 1
    o_x = x + tl.arange(0, SHAPE.BM)
    o_row = o_x * step + i_line - offset
    i_kv = i_h // (sizes.H // sizes.H_kv)
    b_lower, lower = _lower(o_x, sizes.period, SHAPE.NEAR), _lower(last, sizes.period, SHAPE.NEAR)
    return _Part(i_b, i_h, i_kv, i_line, x, last, step, o_x, o_row, lower, b_lower)


# The summary columns that a tile of queries sees: all queries those up to ``whole``, some those up to ``stop``.
_Far = namedtuple("_Far", "i_c whole stop b_columns")


@jit
def _far(at, sizes, SHAPE: tl.constexpr):
    i_group = tl.program_id(0) % sizes.heads % sizes.groups
    begin = sizes.period - sizes.c * (i_group + 1)
    stop = _columns(at.last, sizes.period, sizes.c, begin, SHAPE.FAR)
    whole = _columns(at.x, sizes.period, sizes.c, begin, SHAPE.FAR)
    b_columns = _columns(at.o_x, sizes.period, sizes.c, begin, SHAPE.FAR)
    return _Far(at.i_kv * sizes.groups + i_group, whole // SHAPE.BN * SHAPE.BN, stop, b_columns)


@jit
def _near_tile(d_k, d_v, rows, at, y, SHAPE: tl.constexpr):
    """Keys and values from ``y`` of a line on: by pointer on lines, else by descriptor, 0 behind the end."""
    if SHAPE.LINES:
        o_y = y + tl.arange(0, SHAPE.BN)
        b_k = load_rows(rows[0], rows[1], o_y * at.step, o_y <= at.last, SHAPE.D, SHAPE.BD)  # [BN, BD]
        b_v = load_rows(rows[2], rows[3], o_y * at.step, o_y <= at.last, SHAPE.DV, SHAPE.BDV)  # [BN, BDV]
    else:
        b_k = d_k.load([at.i_b, at.i_kv, y, 0]).reshape(SHAPE.BN, SHAPE.BD)
        b_v = d_v.load([at.i_b, at.i_kv, y, 0]).reshape(SHAPE.BN, SHAPE.BDV)
    return b_k, b_v


@jit
def _hide(b_s, at, y, hidden, SHAPE: tl.constexpr):
    """Scores ``[BM, BN]`` of the keys from ``y`` on, ``hidden`` where a query does not see them."""
    OWN: tl.constexpr = 0 if SHAPE.NEAR == _BEFORE else 1  # whether a query sees the key at its own place
    if (y < at.lower) | (y + SHAPE.BN > at.x + OWN):
        o_y = y + tl.arange(0, SHAPE.BN)
        m_s = (o_y[None, :] >= at.b_lower[:, None]) & (o_y[None, :] < (at.o_x + OWN)[:, None])
        b_s = tl.where(m_s, b_s, hidden)
    return b_s


@jit
def _step(state, x, b_s, b_k, b_v, scale_log2):
    """One tile of scores more: of a softmax, or where queries bring what was saved of it, of their gradient."""
    if x.b_do is None:
        b_p, state = softmax_step(state, b_s, scale_log2, 0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, state.b_acc, input_precision=FLOAT32_DOT)
        state = Softmax(b_acc, state.b_max, state.b_sum)
    else:
        b_p = tl.exp2(b_s * scale_log2 - x.b_lse2[:, None])
        b_ds = score_gradient(b_p, x.b_do, b_v, x.b_delta[:, None])
        state = tl.dot(b_ds.to(b_k.dtype), b_k, state, input_precision=FLOAT32_DOT)
    return state


@jit
def _over_keys(state, x, sources, at, scale_log2, hidden, sizes, SHAPE: tl.constexpr):
    """All keys that the queries ``x`` see, summary columns first; ``hidden`` takes the place of other scores."""
    BN: tl.constexpr = SHAPE.BN
    d_k, d_v, d_ck, d_cv, rows = sources
    if SHAPE.FAR != 0:
        far = _far(at, sizes, SHAPE)
        for masked in tl.static_range(2):
            for t in range(far.whole if masked else 0, far.stop if masked else far.whole, BN):
                b_k = d_ck.load([at.i_b, far.i_c, t, 0]).reshape(BN, SHAPE.BD)
                b_v = d_cv.load([at.i_b, far.i_c, t, 0]).reshape(BN, SHAPE.BDV)
                b_s = tl.dot(x.b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)  # [BM, BN]
                if masked:
                    b_s = tl.where(t + tl.arange(0, BN)[None, :] < far.b_columns[:, None], b_s, hidden)
                state = _step(state, x, b_s, b_k, b_v, scale_log2)
    if SHAPE.NEAR != 0:
        for y in range(_lower(at.x, sizes.period, SHAPE.NEAR), at.last + (SHAPE.NEAR != _BEFORE), BN):
            b_k, b_v = _near_tile(d_k, d_v, rows, at, y, SHAPE)
            b_s = tl.dot(x.b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
            state = _step(state, x, _hide(b_s, at, y, hidden, SHAPE), b_k, b_v, scale_log2)
    return state


# ---------------------------------------------------------------------------------------------------------------
# Kernel: forward, one program per (tile of queries, query head)


@jit(general="sizes")
def _forward_kernel(d_k, d_v, d_ck, d_cv, inputs, outputs, sizes, SHAPE: tl.constexpr):
    BM: tl.constexpr = SHAPE.BM
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    at = _part(sizes, SHAPE)
    if at.x <= at.last:
        m_x = at.o_x <= at.last
        p_q, stride_q = sequence(inputs.q, at.i_b, at.i_h)
        rows = _line_rows(inputs, at.i_b, at.i_kv, at.i_line)
        b_q = load_rows(p_q, stride_q, at.o_row, m_x, SHAPE.D, BD)  # [BM, BD]
        o_dv = tl.arange(0, BDV)
        i_bh = at.i_b.to(tl.int64) * sizes.H + at.i_h
        p_out = outputs.out + (i_bh * sizes.Lq + at.o_row.to(tl.int64))[:, None] * SHAPE.DV + o_dv[None, :]
        m_out = m_x[:, None] & (o_dv < SHAPE.DV)[None, :]
        p_lse = outputs.lse + i_bh * sizes.Lq
        if SHAPE.AGAIN:
            b_before = tl.load(p_lse + at.o_row, mask=m_x, other=float("-inf")) * 1.4426950408889634
            b_acc = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
            state = Softmax(b_acc, tl.maximum(b_before, -1e30), tl.where(b_before > float("-inf"), 1.0, 0.0))
        else:
            state = softmax_start(BM, BDV)

        sources = d_k, d_v, d_ck, d_cv, rows
        x = Queries(b_q, None, None, None, at.o_x)
        state = _over_keys(state, x, sources, at, inputs.scale, float("-inf"), sizes, SHAPE)

        b_sum = tl.maximum(state.b_sum, 1e-30)
        b_out = state.b_acc / b_sum[:, None]  # 0 where a query sees no key
        b_lse = tl.where(state.b_sum > 0, (state.b_max + tl.log2(b_sum)) * 0.6931471805599453, float("-inf"))
        tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
        tl.store(p_lse + at.o_row, b_lse, mask=m_x)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: gradient of the queries, one program per (tile of queries, query head)


@jit(general="sizes")
def _query_gradient_kernel(d_k, d_v, d_ck, d_cv, inputs, outputs, sizes, SHAPE: tl.constexpr):
    BM: tl.constexpr = SHAPE.BM
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    p_before, p_dq = outputs
    at = _part(sizes, SHAPE)
    if at.x <= at.last:
        m_x = at.o_x <= at.last
        p_q, stride_q = sequence(inputs.q, at.i_b, at.i_h)
        p_do, stride_do = sequence(inputs.do, at.i_b, at.i_h)
        rows = _line_rows(inputs, at.i_b, at.i_kv, at.i_line)
        i_bh = at.i_b.to(tl.int64) * sizes.H + at.i_h
        b_q = load_rows(p_q, stride_q, at.o_row, m_x, SHAPE.D, BD)  # [BM, BD]
        b_do = load_rows(p_do, stride_do, at.o_row, m_x, SHAPE.DV, BDV)  # [BM, BDV]
        o_saved = i_bh * inputs.saved.L_pad + at.o_row
        b_lse2 = tl.load(inputs.saved.lse2 + o_saved, mask=m_x, other=float("inf"))
        b_delta = tl.load(inputs.saved.delta + o_saved, mask=m_x, other=0.0)
        x = Queries(b_q, b_do, b_lse2, b_delta, at.o_x)
        scale_log2 = inputs.scale * 1.4426950408889634
        b_dq = tl.zeros([BM, BD], tl.float32)

        sources = d_k, d_v, d_ck, d_cv, rows
        b_dq = _over_keys(b_dq, x, sources, at, scale_log2, inputs.hidden, sizes, SHAPE)

        o_d = tl.arange(0, BD)
        o_out = (i_bh * sizes.Lq + at.o_row.to(tl.int64))[:, None] * SHAPE.D + o_d[None, :]
        m_out = m_x[:, None] & (o_d < SHAPE.D)[None, :]
        b_dq *= inputs.scale
        if p_before is not None:
            b_dq += tl.load(p_before + o_out, mask=m_out, other=0.0)
        tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_out)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: gradients of the keys and values, one program per (tile of them, KV head), over all their query heads


@jit
def _key_step(b_dk, b_dv, b_s, x, b_v, scale_log2):
    b_p = tl.exp2(b_s * scale_log2 - x.b_lse2[None, :])
    b_dv = tl.dot(b_p.to(x.b_do.dtype), x.b_do, b_dv, input_precision=FLOAT32_DOT)
    b_ds = score_gradient(b_p, b_v, x.b_do, x.b_delta[None, :])
    return tl.dot(b_ds.to(x.b_q.dtype), x.b_q, b_dk, input_precision=FLOAT32_DOT), b_dv


# The queries that see some key of a tile, on its line: from ``x`` to ``stop`` in ``tiles``, of these the first
# ``some`` not all of it. ``count`` heads, ``i_h, i_h + every, ..``; ``begin``: of the summary columns of the group;
# ``upper``: the first behind a key that does not see it.
_Seers = namedtuple("_Seers", "i_b i_h every count i_line x stop tiles some begin upper b_upper")


@jit
def _seers(at, y, size, i_split, sizes, SHAPE: tl.constexpr):
    i_b, i_kv, i_group, i_line = at
    period, c, G = sizes.period, sizes.c, sizes.H // sizes.H_kv
    step, _ = _lines(sizes, SHAPE.LINES)
    # the query heads of this KV head that the pass is over
    first, every = sizes.first + sizes.every * i_group, sizes.every * sizes.groups
    i_h = i_kv * G + ((first - i_kv * G) % every + every) % every
    count = tl.maximum((i_kv + 1) * G - i_h + every - 1, 0) // every
    begin = period - c * (i_group + 1)
    if SHAPE.FAR == 0:
        x = y + (SHAPE.NEAR == _BEFORE)
        stop = _upper(tl.minimum(y + SHAPE.BN, size) - 1, period, size, SHAPE.NEAR)
    elif SHAPE.FAR == _EARLIER:
        x, stop = (y // c + 1) * period, sizes.Lk
    else:
        x, stop = y // c * period + begin + y % c, sizes.Lk
    x = tl.maximum(x, (sizes.Lk - sizes.Lq - i_line + step - 1) // step)
    tiles = tl.cdiv(tl.maximum(stop - x, 0), SHAPE.BM)
    some = tiles
    if SHAPE.FAR != 0:  # this program's share of the tiles
        share = tl.cdiv(tiles, sizes.splits)
        x += i_split * share * SHAPE.BM
        tiles = tl.maximum(tl.minimum(share, tiles - i_split * share), 0)
        # from x_whole on queries see all columns of the tile
        x_whole = tl.cdiv(y + SHAPE.BN, c) * period
        some = tl.minimum(tl.cdiv(tl.maximum(x_whole - x, 0), SHAPE.BM), tiles)
    upper = _upper(y, period, size, SHAPE.NEAR)
    b_upper = _upper(y + tl.arange(0, SHAPE.BN), period, size, SHAPE.NEAR)
    return _Seers(i_b, i_h, every, count, i_line, x, stop, tiles, some, begin, upper, b_upper)


@jit
def _queries(d_q, d_do, inputs, to, x, i_h, sizes, SHAPE: tl.constexpr):
    """The queries from ``x`` of a line on: by pointer on lines, else by descriptor."""
    BM: tl.constexpr = SHAPE.BM
    step, _ = _lines(sizes, SHAPE.LINES)
    offset = sizes.Lk - sizes.Lq
    o_x = x + tl.arange(0, BM)
    o_row = o_x * step - offset
    if SHAPE.LINES:
        m_x, i_line = o_x < to.stop, to.i_line.to(tl.int64)
        p_q, stride_q = sequence(inputs.q, to.i_b, i_h)
        p_do, stride_do = sequence(inputs.do, to.i_b, i_h)
        b_q = load_rows(p_q + i_line * stride_q, stride_q, o_row, m_x, SHAPE.D, SHAPE.BD)  # [BM, BD]
        b_do = load_rows(p_do + i_line * stride_do, stride_do, o_row, m_x, SHAPE.DV, SHAPE.BDV)  # [BM, BDV]
    else:
        b_q = d_q.load([to.i_b, i_h, x - offset, 0]).reshape(BM, SHAPE.BD)
        b_do = d_do.load([to.i_b, i_h, x - offset, 0]).reshape(BM, SHAPE.BDV)
    o_saved = (to.i_b * sizes.H + i_h).to(tl.int64) * inputs.saved.L_pad + o_row + to.i_line
    if SHAPE.FAR != 0:
        b_lse2, b_delta = tl.load(inputs.saved.lse2 + o_saved), tl.load(inputs.saved.delta + o_saved)
    else:
        b_lse2 = tl.load(inputs.saved.lse2 + o_saved, mask=o_x < to.stop, other=float("inf"))
        b_delta = tl.load(inputs.saved.delta + o_saved, mask=o_x < to.stop, other=0.0)
    return Queries(b_q, b_do, b_lse2, b_delta, o_x)


@jit
def _hide_keys(b_s, x, y, to, hidden, sizes, SHAPE: tl.constexpr):
    """Scores ``[BN, BM]`` of the keys from ``y`` on and the queries from ``x`` on, ``hidden`` where unseen."""
    o_x, o_y = x + tl.arange(0, SHAPE.BM), y + tl.arange(0, SHAPE.BN)
    if SHAPE.FAR != 0:
        b_columns = _columns(o_x, sizes.period, sizes.c, to.begin, SHAPE.FAR)
        b_s = tl.where(o_y[:, None] < b_columns[None, :], b_s, hidden)
    else:
        NEXT: tl.constexpr = 1 if SHAPE.NEAR == _BEFORE else 0  # a key is seen from there on
        if (x < y + SHAPE.BN - 1 + NEXT) | (x + SHAPE.BM > to.upper):
            m_s = (o_x[None, :] >= o_y[:, None] + NEXT) & (o_x[None, :] < to.b_upper[:, None])
            b_s = tl.where(m_s, b_s, hidden)
    return b_s


@jit(general="sizes")
def _key_gradient_kernel(d_q, d_do, inputs, outputs, sizes, SHAPE: tl.constexpr):
    """With FAR the keys are summary columns ``[B * H_kv * groups, 1, M, D]``; programs share their queries."""
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    PHASES: tl.constexpr = 1 if SHAPE.FAR == 0 else 2
    p_dk, p_dv = outputs
    i_seq, i_part = tl.program_id(0), tl.program_id(1)  # batch, KV head and group
    i_group, i_bkv = i_seq % sizes.groups, i_seq // sizes.groups
    i_b, i_kv = i_bkv // sizes.H_kv, i_bkv % sizes.H_kv
    step, lines = _lines(sizes, SHAPE.LINES)
    if SHAPE.FAR != 0:
        i_split, y, i_line = i_part % sizes.splits, i_part // sizes.splits * BN, i_part * 0
        size, row = sizes.M, i_seq.to(tl.int64) * sizes.M
        p_k, stride_k, p_v, stride_v = _line_rows(inputs, i_seq, i_line, i_line)
    else:
        i_split, y, i_line = i_part * 0, i_part // lines * BN, i_part % lines
        size, row = (sizes.Lk - 1 - i_line) // step + 1, i_bkv.to(tl.int64) * sizes.Lk + i_line
        p_k, stride_k, p_v, stride_v = _line_rows(inputs, i_b, i_kv, i_line)
    if y < size:
        o_y = y + tl.arange(0, BN)
        m_y = o_y < size
        b_k = load_rows(p_k, stride_k, o_y * step, m_y, SHAPE.D, BD)  # [BN, BD]
        b_v = load_rows(p_v, stride_v, o_y * step, m_y, SHAPE.DV, BDV)  # [BN, BDV]
        to = _seers((i_b, i_kv, i_group, i_line), y, size, i_split, sizes, SHAPE)
        scale_log2 = inputs.scale * 1.4426950408889634
        b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
        for whole in tl.static_range(PHASES):
            x_first = to.x + to.some * BM if whole else to.x
            tiles = to.tiles - to.some if whole else to.some
            for i in range(tiles * to.count):
                x, i_h = x_first + i % tiles * BM, to.i_h + i // tiles * to.every
                part = _queries(d_q, d_do, inputs, to, x, i_h, sizes, SHAPE)
                b_s = tl.dot(b_k, tl.trans(part.b_q), input_precision=FLOAT32_DOT)  # [BN, BM]
                if not whole:
                    b_s = _hide_keys(b_s, x, y, to, inputs.hidden, sizes, SHAPE)
                b_dk, b_dv = _key_step(b_dk, b_dv, b_s, part, b_v, scale_log2)

        b_dk *= inputs.scale
        o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
        o_out = (row + o_y.to(tl.int64) * step)[:, None]
        if SHAPE.FAR != 0:
            o_out += (i_split * tl.num_programs(0)).to(tl.int64) * sizes.M
        m_k, m_v = m_y[:, None] & (o_d < SHAPE.D)[None, :], m_y[:, None] & (o_dv < SHAPE.DV)[None, :]
        if SHAPE.AGAIN:
            b_dk += tl.load(p_dk + o_out * SHAPE.D + o_d[None, :], mask=m_k, other=0.0)
            b_dv += tl.load(p_dv + o_out * SHAPE.DV + o_dv[None, :], mask=m_v, other=0.0)
        tl.store(p_dk + o_out * SHAPE.D + o_d[None, :], b_dk, mask=m_k)
        tl.store(p_dv + o_out * SHAPE.DV + o_dv[None, :], b_dv, mask=m_v)


@jit(general="sizes")
def _compact_kernel(sources, targets, sizes, WIDTHS: tl.constexpr, BM: tl.constexpr):
    """Summary columns one behind the other, 0 for those behind the last position; keys, then values."""
    H_kv, Lk, period, c, groups, M = sizes
    i_seq = tl.program_id(0)  # batch, KV head and group
    i_group, i_bkv = i_seq % groups, i_seq // groups
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_row = o_m // c * period + period - c * (i_group + 1) + o_m % c
    for i in tl.static_range(2):
        p_x, stride = sequence(sources[i], i_bkv // H_kv, i_bkv % H_kv)
        b_x = load_rows(p_x, stride, o_row, (o_m < M) & (o_row < Lk), WIDTHS[i], WIDTHS[2 + i])
        o_d = tl.arange(0, WIDTHS[2 + i])
        p_to = targets[i] + (i_seq.to(tl.int64) * M + o_m)[:, None] * WIDTHS[i] + o_d[None, :]
        tl.store(p_to, b_x, mask=(o_m < M)[:, None] & (o_d < WIDTHS[i])[None, :])


# ---------------------------------------------------------------------------------------------------------------
# Launchers


# Measured on an H100 at n = 32,768 with 32 and 8 heads, D = 64 and 128, bf16.


def forward_tiles(width: int, itemsize: int, far: bool) -> Tiles:
    """Tiles of the forward kernel; ``width`` is D + Dv, each rounded up to a power of two.

    Where there are only a few keys to see, small tiles waste less on those that are hidden.
    """
    if itemsize == 4:
        return Tiles(64, 32, 4, 2) if width <= 256 else Tiles(32, 32, 8, 1)
    return Tiles(64, 64 if far else 32, 4, 3) if width <= 256 else Tiles(128, 64, 8, 2)


def query_tiles(width: int, itemsize: int) -> Tiles:
    """Tiles of the kernel for the gradient of the queries."""
    if itemsize == 4:
        return Tiles(64, 32, 8, 1) if width <= 256 else Tiles(16, 32, 8, 1)
    return Tiles(64, 64, 4, 2) if width <= 256 else Tiles(64, 32, 4, 3)


def key_tiles(width: int, itemsize: int) -> Tiles:
    """Tiles of the kernel for the gradients of keys and values."""
    if itemsize == 4:
        return Tiles(32, 32, 4, 2) if width <= 256 else Tiles(16, 16, 4, 1)
    if width <= 128:
        return Tiles(128, 64, 4, 2)
    return Tiles(64, 64, 4, 2) if width <= 256 else Tiles(32, 64, 8, 3)


class _Problem:
    """The tensors of one call, what the kernels want to know of its pattern, and its launches."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, scale: float
    ) -> None:
        check_dtype(query)
        self.q, self.k, self.v = query, key, value
        self.pattern, self.scale = pattern, scale
        (self.B, self.H, self.Lq, _), (self.H_kv, self.Lk) = query.shape, key.shape[1:3]
        self.widths = Widths.alike(key, value)
        self.shape = self.widths.BD + self.widths.BDV, query.element_size()
        self.groups = pattern.groups if pattern.kind == "fixed" else 1
        self.copies, self.M = (key, value), 1
        if any(p.far for p in passes(pattern)):
            self.copies = self._compact()
            self.M = self.copies[0].shape[2]

    def _columns(self, x: torch.Tensor, blocks: int) -> list[torch.Tensor]:
        """The summary columns of whole blocks as views ``[B, H_kv, blocks, c, D]``, one per group."""
        period, c = self.pattern.stride, self.pattern.summary
        rows = x[:, :, : blocks * period].unflatten(2, (blocks, period))
        return [rows[:, :, :, period - c * (g + 1) : period - c * g] for g in range(self.groups)]

    def _compact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the summary columns ``[B, H_kv * groups, M, D]``, in the order of positions, and of their values.

        Those of a last block that is not whole are there only if queries of that block may see them.
        """
        period, c = self.pattern.stride, self.pattern.summary
        if self.pattern.parts == "merged":
            blocks = max(1, (self.Lk - 1) // period)  # whole blocks before the last query
        else:
            blocks = -(-self.Lk // period)
        k, v = (x.new_empty(self.B, self.H_kv * self.groups, blocks * c, x.shape[3]) for x in (self.k, self.v))
        launch(_compact_kernel, (self.B * self.H_kv * self.groups, -(-blocks * c // COMPACTED)),
            (strided(self.k), strided(self.v)), (k, v), (self.H_kv, self.Lk, period, c, self.groups, blocks * c),
            WIDTHS=self.widths, BM=COMPACTED, num_warps=4,
        )  # fmt: skip
        return k, v

    def _step(self, p: Pass) -> int:
        """Positions from one to the next on a line, of which there are as many."""
        return self.pattern.stride if p.on_lines else 1

    def _described(self, pair: tuple[torch.Tensor, torch.Tensor], rows: int) -> list:
        """Descriptors of tiles of ``rows`` rows of ``[B, H, L, D]`` and ``[B, H, L, Dv]``."""
        return [describe(x, rows, width) for x, width in zip(pair, self.widths[2:], strict=True)]

    def _sources(self, p: Pass, pair: tuple[torch.Tensor, torch.Tensor], rows: int) -> list:
        """The same, or none on lines, where tiles are read by pointer."""
        return [None, None] if p.on_lines else self._described(pair, rows)

    def _sizes(self, p: Pass, splits: int = 1) -> _Sizes:
        heads, pattern = -(-(self.H - p.first) // p.every), self.pattern
        return _Sizes(self.H, self.H_kv, self.Lq, self.Lk, heads, p.first, p.every, pattern.stride, pattern.summary,
                      self.groups if p.far else 1, self.M, splits)  # fmt: skip

    def _options(self, p: Pass, tiles: Tiles, again: bool) -> dict[str, Any]:
        shape = _Shape(*self.widths, tiles.queries, tiles.rows, p.near, p.far, again, p.on_lines)
        return dict(SHAPE=shape, num_warps=tiles.warps, num_stages=tiles.stages)

    def _launch_queries(
        self, kernel: Any, p: Pass, tiles: Tiles, inputs: _Inputs, outputs: tuple, again: bool = False
    ) -> None:
        step, sizes = self._step(p), self._sizes(p)
        length = -(-self.Lk // step)
        queries = min(length, -(-self.Lq // step))
        tiles = tiles.at_most(queries, length)
        launch(kernel, (self.B * sizes.heads, min(step, self.Lk) * -(-queries // tiles.queries)),
            *self._sources(p, (self.k, self.v), tiles.rows), *self._described(self.copies, tiles.rows),
            inputs, outputs, sizes, **self._options(p, tiles, again),
        )  # fmt: skip

    def _launch_keys(
        self, p: Pass, tiles: Tiles, inputs: _Inputs, outputs: tuple, splits: int = 1, again: bool = False
    ) -> None:
        programs = min(self._step(p), self.Lk) * -(-(self.M if p.far else -(-self.Lk // self._step(p))) // tiles.rows)
        launch(_key_gradient_kernel, (self.B * self.H_kv * (self.groups if p.far else 1), programs * splits),
            *self._sources(p, (self.q, self.grad), tiles.queries), inputs, outputs, self._sizes(p, splits),
            **self._options(p, tiles, again),
        )  # fmt: skip

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = with_positive_scale(self.q, self.scale)
        inputs = _Inputs(strided(q), strided(self.k), strided(self.v), scale * 1.4426950408889634)
        outputs = Outputs.of(q, self.widths.DV)
        for i, p in enumerate(passes(self.pattern)):
            tiles = forward_tiles(*self.shape, p.far > 0)
            self._launch_queries(_forward_kernel, p, tiles, inputs, outputs, again=i > 0 and p.every == 1)
        return outputs

    def backward(self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.grad = grad
        # a score that is none, whatever the sign of the scale
        hidden = min(max(-1e30 / (self.scale or 1e-30), -3e38), 3e38)
        if self.pattern.parts in ("far", "per_head"):  # queries without any key have probabilities of 0
            lse = lse.masked_fill(lse.isneginf(), math.inf)
        # behind the last query so that tiles need no end: probabilities of 0
        saved = Saved.of(grad, out, lse, -(-self.Lq // 128) * 128 + 128)
        q, k, v, do = map(strided, (self.q, self.k, self.v, grad))
        inputs = _Inputs(q, k, v, self.scale or 1e-30, do, saved, hidden)
        todo = passes(self.pattern)
        d_q = self._query_gradient(todo, inputs)
        d_k, d_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (self.k, self.v))
        written = False
        for p in todo:
            if p.near:
                length = -(-self.Lk // self._step(p))
                tiles = key_tiles(*self.shape).at_most(length, length)
                self._launch_keys(replace(p, far=NOTHING), tiles, inputs, (d_k, d_v), again=written)
                written = True
        for p in todo:
            if p.far:
                self._far_gradient(replace(p, near=NOTHING), inputs, (d_k, d_v), written)
        if not self.scale:
            d_q.zero_(), d_k.zero_()
        return d_q, d_k, d_v

    def _query_gradient(self, todo: list[Pass], inputs: _Inputs) -> torch.Tensor:
        d_q = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        before = None
        for p in todo:
            target = d_q
            if p.every == 1 and p is not todo[-1]:  # the next one goes on from this
                target = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
            self._launch_queries(_query_gradient_kernel, p, query_tiles(*self.shape), inputs, (before, target))
            before = None if target is d_q else target
        return d_q

    def _far_gradient(self, p: Pass, inputs: _Inputs, targets: tuple[torch.Tensor, ...], add: bool) -> None:
        """Gradients of the compacted columns, in slots that are added in order, and to the rows they are copies of."""
        tiles = key_tiles(*self.shape)
        programs = -(-self.M // tiles.rows) * self.B * self.H_kv * self.groups
        splits = max(1, min(8, MIN_PROGRAMS // programs))
        slots = tuple(torch.empty(splits, *x.shape, dtype=torch.float32, device=x.device) for x in self.copies)
        k, v = (strided(x.flatten(0, 1)[:, None]) for x in self.copies)
        self._launch_keys(p, tiles, inputs._replace(k=k, v=v), slots, splits)
        for target, slot in zip(targets, slots, strict=True):
            total = (slot[0] if splits == 1 else slot.sum(0)).unflatten(1, (self.H_kv, self.groups))
            if not add:
                target.zero_()
            period, c = self.pattern.stride, self.pattern.summary
            blocks = self.M // c
            whole = min(blocks, self.Lk // period)
            for g, columns in enumerate(self._columns(target, whole) if whole else ()):
                columns += total[:, :, g, : whole * c].unflatten(2, (whole, c))
            for g in range(self.groups if whole < blocks else 0):  # of a block that the end of the sequence cuts
                begin = whole * period + period - c * (g + 1)
                count = min(max(self.Lk - begin, 0), c)
                target[:, :, begin : begin + count] += total[:, :, g, whole * c : whole * c + count]


COMPACTED = 32  # summary columns that a program copies
MIN_PROGRAMS = 2048  # with fewer, the queries of a tile of summary columns are split among several


def sparse_forward_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` ``[B, H, Lq, Dv]`` and ``lse`` float32 ``[B, H, Lq]`` of the last ``Lq`` of ``Lk`` positions.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``. All values must be
    finite: whole tiles are read. Raises ``TypeError`` for dtypes other than float16, bfloat16 and float32.
    """
    return _Problem(query, key, value, pattern, scale).forward()


def sparse_backward_triton(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, pattern: Pattern, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of query (in its dtype), key and value (float32) from ``out`` and ``lse`` of the forward pass."""
    return _Problem(query, key, value, pattern, scale).backward(grad, out, lse)
