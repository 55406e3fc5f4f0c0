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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..launch import FLOAT32_DOT, jit, launch, next_power_of_two, require_triton, tl
from .segments import _describe
from .segments_backward import _delta_kernel

if TYPE_CHECKING:
    from ..sparse import Pattern

NOTHING, BLOCK, WINDOW, CAUSAL, BEFORE = 0, 1, 2, 3, 4
EARLIER, UP_TO = 1, 2


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


@jit
def _lower(o_x, period, NEAR: tl.constexpr):
    """The first key that query ``o_x`` may see of its line."""
    if NEAR == 1:
        return o_x // period * period
    elif NEAR == 2:
        return tl.maximum(o_x - period + 1, 0)
    else:
        return o_x * 0


@jit
def _upper(o_y, period, length, NEAR: tl.constexpr):
    """The first query behind key ``o_y`` that does not see it."""
    if NEAR == 1:
        return tl.minimum((o_y // period + 1) * period, length)
    elif NEAR == 2:
        return tl.minimum(o_y + period, length)
    else:
        return o_y * 0 + length


@jit
def _columns(o_x, period, c, first, FAR: tl.constexpr):
    """How many summary columns the query at ``o_x`` sees; ``first``: where those of a block begin in it."""
    if FAR == 1:
        return o_x // period * c
    else:
        return o_x // period * c + tl.minimum(tl.maximum(o_x % period - first + 1, 0), c)


@jit
def _load(p_rows, o_row, stride, m_row, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``[N, BD]``, 0 where ``m_row`` is false and behind the D columns."""
    o_d = tl.arange(0, BD)
    if D == BD:
        return tl.load(p_rows + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_row[:, None], other=0.0)
    else:
        m = m_row[:, None] & (o_d < D)[None, :]
        return tl.load(p_rows + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@jit
def _tile(source, i_b, i_h, row, stride, o_row, m_row, LINES: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """``N`` rows: ``o_row`` of a line by pointer, else by descriptor those from ``row`` on, 0 behind the end."""
    if LINES:
        return _load(source, o_row, stride, m_row, D, BD)
    else:
        return source.load([i_b, i_h, row, 0]).reshape(N, BD)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: forward, one program per (tile of queries, query head)


@jit
def _softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2):
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_rescale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision=FLOAT32_DOT)
    return b_acc, b_new, b_sum


@jit(general="H heads G Lq Lk first every period c groups")
def _forward_kernel(
    p_q, k, v, d_ck, d_cv, p_out, p_lse, H, heads, G, Lq, Lk, first, every, period, c, groups, step, lines,
    scale_log2, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    NEAR: tl.constexpr, FAR: tl.constexpr, GOES_ON: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_b, i_head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i_part = tl.num_programs(1) - 1 - tl.program_id(1)  # those that see most begin
    i_line, i_tile = i_part % lines, i_part // lines
    i_h = first + i_head * every
    i_kv = i_h // G
    offset = Lk - Lq
    length = (Lk - 1 - i_line) // step + 1
    x = (offset - i_line + step - 1) // step + i_tile * BM  # the first query of the tile
    if x < length:
        o_x = x + tl.arange(0, BM)
        m_x = o_x < length
        last = tl.minimum(x + BM, length) - 1
        o_row = o_x * step + i_line - offset
        p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
        LINES: tl.constexpr = NEAR >= 3
        if LINES:
            k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + i_line.to(tl.int64) * stride_kn
            v += i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + i_line.to(tl.int64) * stride_vn
        b_q = _load(p_q, o_row, stride_qn, m_x, D, BD)  # [BM, BD]
        o_dv = tl.arange(0, BDV)
        i_bh = i_b.to(tl.int64) * H + i_h
        p_out_tile = p_out + (i_bh * Lq + o_row.to(tl.int64))[:, None] * DV + o_dv[None, :]
        m_out = m_x[:, None] & (o_dv < DV)[None, :]
        p_lse += i_bh * Lq
        if GOES_ON:
            b_before = tl.load(p_lse + o_row, mask=m_x, other=float("-inf")) * 1.4426950408889634
            b_acc = tl.load(p_out_tile, mask=m_out, other=0.0).to(tl.float32)
            b_sum = tl.where(b_before > float("-inf"), 1.0, 0.0)
            b_max = tl.maximum(b_before, -1e30)
        else:
            b_acc = tl.zeros([BM, BDV], tl.float32)
            b_max = tl.full([BM], -1e30, tl.float32)  # not -inf: a tile of hidden keys would give inf - inf
            b_sum = tl.zeros([BM], tl.float32)

        if FAR != 0:
            i_group = i_head % groups
            begin = period - c * (i_group + 1)
            i_c = i_kv * groups + i_group
            stop, whole = _columns(last, period, c, begin, FAR), _columns(x, period, c, begin, FAR)
            b_columns = _columns(o_x, period, c, begin, FAR)
            for t in range(0, whole // BN * BN, BN):
                b_k = d_ck.load([i_b, i_c, t, 0]).reshape(BN, BD)
                b_v = d_cv.load([i_b, i_c, t, 0]).reshape(BN, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)  # [BM, BN]
                b_acc, b_max, b_sum = _softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2)
            for t in range(whole // BN * BN, stop, BN):
                b_k = d_ck.load([i_b, i_c, t, 0]).reshape(BN, BD)
                b_v = d_cv.load([i_b, i_c, t, 0]).reshape(BN, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
                b_s = tl.where(t + tl.arange(0, BN)[None, :] < b_columns[:, None], b_s, float("-inf"))
                b_acc, b_max, b_sum = _softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2)

        if NEAR != 0:
            b_lower, lower = _lower(o_x, period, NEAR), _lower(last, period, NEAR)
            b_stop = o_x + (NEAR != 4)  # the first key behind those that a query sees
            whole = x + (NEAR != 4)
            for y in range(_lower(x, period, NEAR), last + (NEAR != 4), BN):
                o_y = y + tl.arange(0, BN)
                b_k = _tile(k, i_b, i_kv, y, stride_kn, o_y * step, o_y <= last, LINES, BN, D, BD)
                b_v = _tile(v, i_b, i_kv, y, stride_vn, o_y * step, o_y <= last, LINES, BN, DV, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
                if (y < lower) | (y + BN > whole):
                    m_s = (o_y[None, :] >= b_lower[:, None]) & (o_y[None, :] < b_stop[:, None])
                    b_s = tl.where(m_s, b_s, float("-inf"))
                b_acc, b_max, b_sum = _softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2)

        b_out = b_acc / tl.maximum(b_sum, 1e-30)[:, None]  # 0 where a query sees no key
        b_lse = tl.where(b_sum > 0, (b_max + tl.log2(tl.maximum(b_sum, 1e-30))) * 0.6931471805599453, float("-inf"))
        tl.store(p_out_tile, b_out.to(p_out.dtype.element_ty), mask=m_out)
        tl.store(p_lse + o_row, b_lse, mask=m_x)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: gradient of the queries, one program per (tile of queries, query head)


@jit
def _query_step(b_dq, b_s, b_do, b_k, b_v, b_lse2, b_delta, scale_log2):
    b_p = tl.exp2(b_s * scale_log2 - b_lse2[:, None])
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=FLOAT32_DOT)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=FLOAT32_DOT)


@jit(general="H heads G Lq L_pad Lk first every period c groups")
def _query_gradient_kernel(
    p_q, k, v, d_ck, d_cv, p_do, p_lse2, p_delta, p_before, p_dq, H, heads, G, Lq, L_pad, Lk, first, every, period,
    c, groups, step, lines, scale, hidden, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn, NEAR: tl.constexpr, FAR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_b, i_head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i_part = tl.num_programs(1) - 1 - tl.program_id(1)
    i_line, i_tile = i_part % lines, i_part // lines
    i_h = first + i_head * every
    i_kv = i_h // G
    offset = Lk - Lq
    length = (Lk - 1 - i_line) // step + 1
    x = (offset - i_line + step - 1) // step + i_tile * BM
    if x < length:
        o_x = x + tl.arange(0, BM)
        m_x = o_x < length
        last = tl.minimum(x + BM, length) - 1
        o_row = o_x * step + i_line - offset
        p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
        p_do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
        LINES: tl.constexpr = NEAR >= 3
        if LINES:
            k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + i_line.to(tl.int64) * stride_kn
            v += i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + i_line.to(tl.int64) * stride_vn
        i_bh = i_b.to(tl.int64) * H + i_h
        b_q = _load(p_q, o_row, stride_qn, m_x, D, BD)  # [BM, BD]
        b_do = _load(p_do, o_row, stride_gn, m_x, DV, BDV)  # [BM, BDV]
        b_lse2 = tl.load(p_lse2 + i_bh * L_pad + o_row, mask=m_x, other=float("inf"))
        b_delta = tl.load(p_delta + i_bh * L_pad + o_row, mask=m_x, other=0.0)
        scale_log2 = scale * 1.4426950408889634
        b_dq = tl.zeros([BM, BD], tl.float32)

        if FAR != 0:
            i_group = i_head % groups
            begin = period - c * (i_group + 1)
            i_c = i_kv * groups + i_group
            stop, whole = _columns(last, period, c, begin, FAR), _columns(x, period, c, begin, FAR)
            b_columns = _columns(o_x, period, c, begin, FAR)
            for t in range(0, whole // BN * BN, BN):
                b_k = d_ck.load([i_b, i_c, t, 0]).reshape(BN, BD)
                b_v = d_cv.load([i_b, i_c, t, 0]).reshape(BN, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
                b_dq = _query_step(b_dq, b_s, b_do, b_k, b_v, b_lse2, b_delta, scale_log2)
            for t in range(whole // BN * BN, stop, BN):
                b_k = d_ck.load([i_b, i_c, t, 0]).reshape(BN, BD)
                b_v = d_cv.load([i_b, i_c, t, 0]).reshape(BN, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
                b_s = tl.where(t + tl.arange(0, BN)[None, :] < b_columns[:, None], b_s, hidden)
                b_dq = _query_step(b_dq, b_s, b_do, b_k, b_v, b_lse2, b_delta, scale_log2)

        if NEAR != 0:
            b_lower, lower = _lower(o_x, period, NEAR), _lower(last, period, NEAR)
            b_stop = o_x + (NEAR != 4)
            whole = x + (NEAR != 4)
            for y in range(_lower(x, period, NEAR), last + (NEAR != 4), BN):
                o_y = y + tl.arange(0, BN)
                b_k = _tile(k, i_b, i_kv, y, stride_kn, o_y * step, o_y <= last, LINES, BN, D, BD)
                b_v = _tile(v, i_b, i_kv, y, stride_vn, o_y * step, o_y <= last, LINES, BN, DV, BDV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)
                if (y < lower) | (y + BN > whole):
                    m_s = (o_y[None, :] >= b_lower[:, None]) & (o_y[None, :] < b_stop[:, None])
                    b_s = tl.where(m_s, b_s, hidden)
                b_dq = _query_step(b_dq, b_s, b_do, b_k, b_v, b_lse2, b_delta, scale_log2)

        o_d = tl.arange(0, BD)
        o_out = (i_bh * Lq + o_row.to(tl.int64))[:, None] * D + o_d[None, :]
        m_out = m_x[:, None] & (o_d < D)[None, :]
        b_dq *= scale
        if p_before is not None:
            b_dq += tl.load(p_before + o_out, mask=m_out, other=0.0)
        tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_out)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: gradients of the keys and values, one program per (tile of them, KV head), over all their query heads


@jit
def _key_step(b_dk, b_dv, b_s, b_q, b_do, b_v, b_lse2, b_delta, scale_log2):
    b_p = tl.exp2(b_s * scale_log2 - b_lse2[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=FLOAT32_DOT)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=FLOAT32_DOT)
    b_ds = b_p * (b_dp - b_delta[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=FLOAT32_DOT), b_dv


@jit(general="H H_kv G Lq L_pad Lk first every period c groups M splits")
def _key_gradient_kernel(
    q, p_k, p_v, do, p_lse2, p_delta, p_dk, p_dv, H, H_kv, G, Lq, L_pad, Lk, first, every, period, c, groups, M, splits,
    step, lines, scale, hidden, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gn, NEAR: tl.constexpr, FAR: tl.constexpr, ADD: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """With FAR the keys are summary columns ``[B, H_kv, groups, M, D]``; ``splits`` programs share their queries."""
    i_seq = tl.program_id(0)  # batch, KV head and group
    i_group = i_seq % groups
    i_bkv = i_seq // groups
    i_b, i_kv = i_bkv // H_kv, i_bkv % H_kv
    i_part = tl.program_id(1)
    i_split, i_line = 0, 0
    offset = Lk - Lq
    if FAR != 0:
        i_split = i_part % splits
        y = i_part // splits * BN
        size = M
        length = Lk
        row, k_base, v_base = i_seq.to(tl.int64) * M, i_seq.to(tl.int64) * M * D, i_seq.to(tl.int64) * M * DV
        stride_k, stride_v = D, DV
    else:
        i_line = i_part % lines
        y = i_part // lines * BN
        length = (Lk - 1 - i_line) // step + 1
        size = length
        row = i_bkv.to(tl.int64) * Lk + i_line
        k_base = i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + i_line.to(tl.int64) * stride_kn
        v_base = i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + i_line.to(tl.int64) * stride_vn
        stride_k, stride_v = stride_kn, stride_vn
    if y < size:
        o_y = y + tl.arange(0, BN)
        m_y = o_y < size
        bottom = tl.minimum(y + BN, size) - 1  # the last key of the tile
        b_k = _load(p_k + k_base, o_y * step, stride_k, m_y, D, BD)  # [BN, BD]
        b_v = _load(p_v + v_base, o_y * step, stride_v, m_y, DV, BDV)  # [BN, BDV]

        # the query heads of this KV head that the pass is over
        first += every * i_group
        every *= groups
        i_h = i_kv * G + ((first - i_kv * G) % every + every) % every
        count = tl.maximum((i_kv + 1) * G - i_h + every - 1, 0) // every
        begin = period - c * (i_group + 1)
        if FAR == 1:
            x_first = (y // c + 1) * period
            x_stop = length
        elif FAR == 2:
            x_first = y // c * period + begin + y % c
            x_stop = length
        else:
            x_first = y + (NEAR == 4)
            x_stop = _upper(bottom, period, length, NEAR)
        x_first = tl.maximum(x_first, (offset - i_line + step - 1) // step)
        tiles = tl.cdiv(tl.maximum(x_stop - x_first, 0), BM)
        if FAR != 0:  # this program's share of the tiles
            share = tl.cdiv(tiles, splits)
            x_first += i_split * share * BM
            tiles = tl.maximum(tl.minimum(share, tiles - i_split * share), 0)
        b_upper = _upper(o_y, period, length, NEAR)
        upper = _upper(y, period, length, NEAR)

        LINES: tl.constexpr = NEAR >= 3
        if LINES:
            q += i_b.to(tl.int64) * stride_qb + i_line.to(tl.int64) * stride_qn
            do += i_b.to(tl.int64) * stride_gb + i_line.to(tl.int64) * stride_gn
        scale_log2 = scale * 1.4426950408889634
        b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
        i_seq_q = i_b * H
        if FAR != 0:
            # from x_whole on queries see all columns of the tile
            x_whole = tl.cdiv(y + BN, c) * period
            some = tl.minimum(tl.cdiv(tl.maximum(x_whole - x_first, 0), BM), tiles)
            for i in range(some * count):
                x = x_first + i % some * BM
                i_head = i_h + i // some * every
                b_q = q.load([i_b, i_head, x - offset, 0]).reshape(BM, BD)
                b_do = do.load([i_b, i_head, x - offset, 0]).reshape(BM, BDV)
                o_row = (i_seq_q + i_head).to(tl.int64) * L_pad + x - offset + tl.arange(0, BM)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=FLOAT32_DOT)  # [BN, BM]
                b_columns = _columns(x + tl.arange(0, BM), period, c, begin, FAR)
                b_s = tl.where(o_y[:, None] < b_columns[None, :], b_s, hidden)
                b_dk, b_dv = _key_step(
                    b_dk, b_dv, b_s, b_q, b_do, b_v, tl.load(p_lse2 + o_row), tl.load(p_delta + o_row), scale_log2
                )
            rest = tiles - some
            x_first += some * BM
            for i in range(rest * count):
                x = x_first + i % rest * BM
                i_head = i_h + i // rest * every
                b_q = q.load([i_b, i_head, x - offset, 0]).reshape(BM, BD)
                b_do = do.load([i_b, i_head, x - offset, 0]).reshape(BM, BDV)
                o_row = (i_seq_q + i_head).to(tl.int64) * L_pad + x - offset + tl.arange(0, BM)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=FLOAT32_DOT)
                b_dk, b_dv = _key_step(
                    b_dk, b_dv, b_s, b_q, b_do, b_v, tl.load(p_lse2 + o_row), tl.load(p_delta + o_row), scale_log2
                )
        else:
            for i in range(tiles * count):
                x = x_first + i % tiles * BM
                i_head = i_h + i // tiles * every
                o_x = x + tl.arange(0, BM)
                o_row = o_x * step - offset
                if LINES:
                    m_x = o_x < x_stop
                    b_q = _load(q + i_head.to(tl.int64) * stride_qh, o_row, stride_qn, m_x, D, BD)  # [BM, BD]
                    b_do = _load(do + i_head.to(tl.int64) * stride_gh, o_row, stride_gn, m_x, DV, BDV)  # [BM, BDV]
                else:
                    b_q = q.load([i_b, i_head, x - offset, 0]).reshape(BM, BD)
                    b_do = do.load([i_b, i_head, x - offset, 0]).reshape(BM, BDV)
                o_row = (i_seq_q + i_head).to(tl.int64) * L_pad + o_row + i_line
                b_lse2 = tl.load(p_lse2 + o_row, mask=o_x < x_stop, other=float("inf"))
                b_delta = tl.load(p_delta + o_row, mask=o_x < x_stop, other=0.0)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=FLOAT32_DOT)
                if (x < y + BN - (NEAR != 4)) | (x + BM > upper):
                    m_s = (o_x[None, :] >= o_y[:, None] + (NEAR == 4)) & (o_x[None, :] < b_upper[:, None])
                    b_s = tl.where(m_s, b_s, hidden)
                b_dk, b_dv = _key_step(b_dk, b_dv, b_s, b_q, b_do, b_v, b_lse2, b_delta, scale_log2)

        b_dk *= scale
        o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
        o_out = (row + o_y.to(tl.int64) * step)[:, None]
        if FAR != 0:
            o_out += (i_split * tl.num_programs(0)).to(tl.int64) * M
        m_k, m_v = m_y[:, None] & (o_d < D)[None, :], m_y[:, None] & (o_dv < DV)[None, :]
        if ADD:
            b_dk += tl.load(p_dk + o_out * D + o_d[None, :], mask=m_k, other=0.0)
            b_dv += tl.load(p_dv + o_out * DV + o_dv[None, :], mask=m_v, other=0.0)
        tl.store(p_dk + o_out * D + o_d[None, :], b_dk, mask=m_k)
        tl.store(p_dv + o_out * DV + o_dv[None, :], b_dv, mask=m_v)


# ---------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, warps and pipeline stages of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int

    def for_lines(self, queries: int, keys: int) -> Tiles:
        """No larger than lines of that many queries and keys need."""
        return Tiles(*(min(a, max(16, next_power_of_two(b))) for a, b in ((self.queries, queries), (self.keys, keys))),
                     self.warps, self.stages)  # fmt: skip


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

    def __init__(self, query, key, value, pattern: Pattern, scale: float) -> None:
        require_triton()
        if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"query: dtype {query.dtype}; the kernel takes float16, bfloat16 or float32")
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        self.pattern, self.scale = pattern, scale
        (self.B, self.H, self.Lq, self.D), (self.H_kv, self.Lk), self.Dv = query.shape, key.shape[1:3], value.shape[-1]
        self.G = self.H // self.H_kv
        BD, BDV = (max(16, next_power_of_two(x)) for x in (self.D, self.Dv))
        self.sizes = dict(D=self.D, DV=self.Dv, BD=BD, BDV=BDV)
        self.shape = BD + BDV, query.element_size()
        self.groups = pattern.groups if pattern.kind == "fixed" else 1
        self.compacted = self.copies = self.k, self.v
        self.M = 1
        if any(p.far for p in passes(pattern)):
            self.compacted = tuple(self._compact(x) for x in (self.k, self.v))
            self.copies = tuple(x.flatten(1, 2) for x in self.compacted)
            self.M = self.compacted[0].shape[3]

    def _columns(self, x: torch.Tensor, blocks: int) -> list[torch.Tensor]:
        """The summary columns of whole blocks as views ``[B, H_kv, blocks, c, D]``, one per group."""
        period, c = self.pattern.stride, self.pattern.summary
        rows = x[:, :, : blocks * period].unflatten(2, (blocks, period))
        return [rows[:, :, :, period - c * (g + 1) : period - c * g] for g in range(self.groups)]

    def _compact(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of the summary columns: ``[B, H_kv, groups, M, D]``, in the order of positions.

        Those of a last block that is not whole are there only if queries of that block may see them.
        """
        period = self.pattern.stride
        if self.pattern.parts == "merged":
            blocks = max(1, (self.Lk - 1) // period)  # whole blocks before the last query
        else:
            blocks = -(-self.Lk // period)
        if blocks * period > self.Lk:
            x = torch.nn.functional.pad(x, (0, 0, 0, blocks * period - self.Lk))
        return torch.stack([columns.flatten(2, 3) for columns in self._columns(x, blocks)], 2)

    def lines(self, p: Pass) -> tuple[int, int]:
        """Positions from one to the next on a line, and the number of lines."""
        return (self.pattern.stride, min(self.pattern.stride, self.Lk)) if p.on_lines else (1, 1)

    def heads(self, p: Pass) -> int:
        return -(-(self.H - p.first) // p.every)

    def arguments(self, p: Pass) -> tuple[int, ...]:
        return p.first, p.every, self.pattern.stride, self.pattern.summary, self.groups if p.far else 1

    def described(self, pair: tuple[torch.Tensor, ...], rows: int) -> list:
        """Descriptors of tiles of ``rows`` rows of ``[B, H, L, D]`` and ``[B, H, L, Dv]``."""
        return [_describe(x, rows, width) for x, width in zip(pair, (self.sizes["BD"], self.sizes["BDV"]), strict=True)]

    def sources(self, p: Pass, pair: tuple[torch.Tensor, ...], rows: int) -> list:
        """What a kernel reads tiles of such tensors from: on lines by pointer, else by descriptor."""
        return list(pair) if p.on_lines else self.described(pair, rows)

    @property
    def strides(self) -> list[int]:
        return [s for x in (self.q, self.k, self.v) for s in x.stride()[:3]]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale
        if scale <= 0:  # the kernel takes the maximum before it scales
            self.q, scale = (-self.q, -scale) if scale else (torch.zeros_like(self.q), 1.0)
        out = self.q.new_empty(self.B, self.H, self.Lq, self.Dv)
        lse = self.q.new_empty(self.B, self.H, self.Lq, dtype=torch.float32)
        todo = passes(self.pattern)
        for i, p in enumerate(todo):
            (step, lines), heads = self.lines(p), self.heads(p)
            length = -(-self.Lk // step)
            queries = min(length, -(-self.Lq // step))
            tiles = forward_tiles(*self.shape, p.far > 0).for_lines(queries, length)
            launch(_forward_kernel, (self.B * heads, lines * -(-queries // tiles.queries)),
                self.q, *self.sources(p, (self.k, self.v), tiles.keys), *self.described(self.copies, tiles.keys),
                out, lse, self.H, heads, self.G, self.Lq, self.Lk, *self.arguments(p), step, lines,
                scale * 1.4426950408889634, *self.strides,
                NEAR=p.near, FAR=p.far, GOES_ON=i > 0 and p.every == 1, **self.sizes,
                BM=tiles.queries, BN=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return out, lse

    def backward(self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        # a score that is none, whatever the sign of the scale
        self.hidden = min(max(-1e30 / (self.scale or 1e-30), -3e38), 3e38)
        out, lse = out.contiguous(), lse.contiguous()
        if self.pattern.parts in ("far", "per_head"):  # queries without any key have probabilities of 0
            lse = lse.masked_fill(lse.isneginf(), math.inf)
        # behind the last query so that tiles need no end: probabilities of 0
        self.L_pad = -(-self.Lq // 128) * 128 + 128
        self.lse2, self.delta = (lse.new_empty(self.B, self.H, self.L_pad) for _ in range(2))
        launch(_delta_kernel, (self.L_pad // 32, self.B * self.H),
            self.grad, out, lse, self.lse2, self.delta, self.H, self.Lq, 0, self.L_pad,
            *self.grad.stride()[:3], *out.stride()[:3], DV=self.Dv, BDV=self.sizes["BDV"], BM=32, num_warps=4,
        )  # fmt: skip
        todo = passes(self.pattern)
        d_q = self._query_gradient(todo)
        d_k, d_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (self.k, self.v))
        written = False
        for p in todo:
            if p.near:
                self._near_gradient(p, d_k, d_v, written)
                written = True
        for p in todo:
            if p.far:
                self._far_gradient(p, d_k, d_v, written)
        if not self.scale:
            d_q.zero_(), d_k.zero_()
        return d_q, d_k, d_v

    def _query_gradient(self, todo: list[Pass]) -> torch.Tensor:
        d_q = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        for i, p in enumerate(todo):
            (step, lines), heads = self.lines(p), self.heads(p)
            length = -(-self.Lk // step)
            queries = min(length, -(-self.Lq // step))
            tiles = query_tiles(*self.shape).for_lines(queries, length)
            shared = p.every == 1 and len(todo) == 2
            if shared and i == 0:
                before = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
            launch(_query_gradient_kernel, (self.B * heads, lines * -(-queries // tiles.queries)),
                self.q, *self.sources(p, (self.k, self.v), tiles.keys), *self.described(self.copies, tiles.keys),
                self.grad, self.lse2, self.delta,
                before if shared and i else None, before if shared and i == 0 else d_q,
                self.H, heads, self.G, self.Lq, self.L_pad, self.Lk, *self.arguments(p), step, lines,
                self.scale or 1e-30, self.hidden, *self.strides, *self.grad.stride()[:3],
                NEAR=p.near, FAR=p.far, **self.sizes,
                BM=tiles.queries, BN=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        return d_q

    def _near_gradient(self, p: Pass, d_k: torch.Tensor, d_v: torch.Tensor, add: bool) -> None:
        step, lines = self.lines(p)
        length = -(-self.Lk // step)
        tiles = key_tiles(*self.shape).for_lines(length, length)
        self._launch_keys(Pass(p.near, 0, p.first, p.every), tiles, self.k, self.v, d_k, d_v,
                          (self.B * self.H_kv, lines * -(-length // tiles.keys)), add, 1, step, lines)  # fmt: skip

    def _far_gradient(self, p: Pass, d_k: torch.Tensor, d_v: torch.Tensor, add: bool) -> None:
        """Gradients of the compacted columns, in slots that are added in order, and to the rows they are copies of."""
        tiles, sequences = key_tiles(*self.shape), self.B * self.H_kv * self.groups
        programs = -(-self.M // tiles.keys)
        splits = max(1, min(8, MIN_PROGRAMS // (programs * sequences)))
        slots = [torch.empty(splits, *x.shape, dtype=torch.float32, device=x.device) for x in self.compacted]
        self._launch_keys(Pass(0, p.far, p.first, p.every), tiles, *self.compacted, *slots,
                          (sequences, programs * splits), False, splits, 1, 1)  # fmt: skip
        for target, slot in zip((d_k, d_v), slots, strict=True):
            total = slot[0] if splits == 1 else slot.sum(0)
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

    def _launch_keys(self, p, tiles, k, v, d_k, d_v, grid, add, splits, step, lines) -> None:
        q, grad = self.sources(p, (self.q, self.grad), tiles.queries)
        launch(_key_gradient_kernel, grid,
            q, k, v, grad, self.lse2, self.delta, d_k, d_v, self.H, self.H_kv, self.G, self.Lq, self.L_pad, self.Lk,
            *self.arguments(p), self.M, splits, step, lines, self.scale or 1e-30, self.hidden, *self.strides,
            *self.grad.stride()[:3],
            NEAR=p.near, FAR=p.far, ADD=add, **self.sizes, BM=tiles.queries, BN=tiles.keys,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query (in its dtype), key and value (float32) from ``out`` and ``lse`` of the forward pass."""
    return _Problem(query, key, value, pattern, scale).backward(grad, out, lse)
