"""Weighted attention over a list of key segments: what Express, Thinformer and fixed patterns have in common.

A block of queries sees a few contiguous *segments* of rows, each row standing for ``weight`` tokens, followed
by the *tail*: every token from ``tail`` up to the query itself. With ``w_j`` the weight of row j

    out_i = sum_j w_j exp(scale <q_i, k_j>) v_j / sum_j w_j exp(scale <q_i, k_j>),    lse_i = log of that sum.

Rows come from two buffers: 0, the tokens themselves, and 1, compacted copies. Which segments a block sees is a
:class:`SegmentTable`, plain integers that depend on shapes only. Exact causal attention is the table without
segments. Memory O(n D) beyond the inputs; supports grouped queries, Dv != D, float16, bfloat16 and float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from ._triton import jit, next_power_of_two, require_triton, tl

TOKENS, COMPACTED = 0, 1  # the two sources of rows


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of every block of queries.

    block: queries per block. q_offset: position of query 0 among the tokens.
    segments: int32 ``[blocks, n, 3]``: source, first row, number of rows.
    log_weight: float64 ``[blocks, n]``. tail: int32 ``[blocks]``: first token of the exact tail.
    """

    block: int
    q_offset: int
    segments: np.ndarray
    log_weight: np.ndarray
    tail: np.ndarray
    _on_device: dict = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three arrays as tensors on ``device``, copied there once."""
        if device not in self._on_device:
            arrays = (self.segments.astype(np.int32), self.log_weight.astype(np.float32), self.tail.astype(np.int32))
            self._on_device[device] = tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
        return self._on_device[device]

    def rows_seen(self, queries: int) -> np.ndarray:
        """Rows that each of the first ``queries`` queries attends to, itself included: int64 ``[queries]``."""
        position = np.arange(queries)
        block = position // self.block
        return self.segments[block, :, 2].sum(-1) + position + self.q_offset - self.tail[block] + 1


def causal_table(Lq: int, Lk: int, block: int = 128) -> SegmentTable:
    """The table of exact causal attention of the last ``Lq`` of ``Lk`` tokens."""
    blocks = -(-Lq // block)
    return SegmentTable(
        block, Lk - Lq, np.zeros((blocks, 1, 3), np.int32), np.zeros((blocks, 1)), np.zeros(blocks, np.int32)
    )


def _block_rows(table: SegmentTable, block: int, queries: int) -> tuple[list, torch.Tensor]:
    """What a block sees of the two buffers, ``[(source, start, stop)]``, and the log-weight per row.

    ``queries`` is the number of queries in all: the last block may be shorter than the others.
    """
    begin = block * table.block + table.q_offset
    slices, weights = [], []
    for (source, first, length), weight in zip(table.segments[block].tolist(), table.log_weight[block], strict=True):
        if length:
            slices.append((source, first, first + length))
            weights.append(np.full(length, weight))
    stop = min(begin + table.block, table.q_offset + queries)
    slices.append((TOKENS, int(table.tail[block]), stop))
    weights.append(np.zeros(stop - int(table.tail[block])))
    return slices, torch.from_numpy(np.concatenate(weights))


def _block_scores(query: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """Masked scores ``[B, H_kv, g * b, R]`` of the queries ``[B, H_kv, g, b, D]`` of one block.

    The last b of the R rows are the queries' own tokens; every other row is visible to the whole block.
    """
    B, H_kv, g, b, _ = query.shape
    scores = (query.reshape(B, H_kv, g * b, -1) * scale) @ keys.mT
    scores += weight.to(scores)
    hidden = torch.ones(b, b, dtype=torch.bool, device=query.device).triu(1)
    scores[..., scores.shape[-1] - b :].masked_fill_(hidden.repeat(g, 1), -math.inf)
    return scores


def _blocks(query, key, value, compacted_key, compacted_value, table: SegmentTable, scale: float, dtype):
    """Block by block: the queries' range, the slices of its rows, queries, keys, values and masked scores."""
    Lq, q = query.shape[2], _grouped(query, key.shape[1])
    for block in range(len(table.tail)):
        first, last = block * table.block, min((block + 1) * table.block, Lq)
        slices, weight = _block_rows(table, block, Lq)
        keys = torch.cat([(key, compacted_key)[s][:, :, a:b] for s, a, b in slices], 2).to(dtype)
        values = torch.cat([(value, compacted_value)[s][:, :, a:b] for s, a, b in slices], 2).to(dtype)
        rows = q[:, :, :, first:last].to(dtype)
        yield slice(first, last), slices, rows, keys, values, _block_scores(rows, keys, weight, scale)


def _grouped(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    return x.unflatten(1, (H_kv, x.shape[1] // H_kv))


def segment_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    compacted_key: torch.Tensor,
    compacted_value: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of correct. ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value``
    ``[B, H_kv, Lk, Dv]``, compacted rows ``[B, H_kv, A, D]`` and ``[B, H_kv, A, Dv]``.

    Returns ``out`` ``[B, H, Lq, Dv]`` in the dtype of ``query`` and ``lse`` ``[B, H, Lq]`` in float32
    (float64 for float64 inputs); computed in that same precision from the inputs as they are.
    """
    H_kv = key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    blocks = _blocks(query, key, value, compacted_key, compacted_value, table, scale, dtype)
    for queries, _, rows, _, values, scores in blocks:
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        mass = weights.sum(-1, keepdim=True)
        result, total = weights @ values / mass, (top + mass.log())[..., 0]
        _grouped(out, H_kv)[:, :, :, queries] = result.unflatten(2, (rows.shape[2], -1)).to(out.dtype)
        _grouped(lse, H_kv)[:, :, :, queries] = total.unflatten(2, (rows.shape[2], -1))
    return out, lse


def segment_attention_backward(
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
    """Gradients of :func:`segment_attention_reference` for ``query``, ``key``, ``value`` and the compacted rows.

    Probabilities are recomputed from ``lse`` block by block, so that memory stays O(n D). Plain PyTorch on any
    device. Gradients are float32 (float64 for float64 inputs).
    """
    H_kv, dtype = key.shape[1], lse.dtype
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    compacted = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (compacted_key, compacted_value)]
    o, do, total = (_grouped(x, H_kv) for x in (out, grad, lse))
    blocks = _blocks(query, key, value, compacted_key, compacted_value, table, scale, dtype)
    for queries, slices, rows, keys, values, scores in blocks:
        probability = torch.exp(scores - total[:, :, :, queries].flatten(2, 3)[..., None])
        d_out = do[:, :, :, queries].to(dtype).flatten(2, 3)
        delta = (d_out * o[:, :, :, queries].to(dtype).flatten(2, 3)).sum(-1, keepdim=True)
        d_scores = probability * (d_out @ values.mT - delta) * scale
        _grouped(grads[0], H_kv)[:, :, :, queries] = (d_scores @ keys).unflatten(2, (rows.shape[2], -1))
        d_keys, d_values = d_scores.mT @ rows.flatten(2, 3), probability.mT @ d_out
        at = 0
        for source, a, b in slices:
            for target, part in zip((grads[1:], compacted)[source], (d_keys, d_values), strict=True):
                target[:, :, a:b] += part[:, :, at : at + b - a]
            at += b - a
    return (*grads, *compacted)


# ---------------------------------------------------------------------------------------------------------------
# Compaction: a kept row is read by many blocks of queries, so it is copied once to where its neighbours are


@jit
def _compact_kernel(
    p_ck, p_cv, p_k, p_v, p_index, rows, H, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ib, stride_ih, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_tile, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_seq // H, i_seq % H
    o_n, o_d, o_dv = i_tile * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    m_n = o_n < rows
    i_row = tl.load(p_index + i_b * stride_ib + i_h * stride_ih + o_n, mask=m_n, other=0).to(tl.int64)[:, None]
    o_out = (i_seq * rows + o_n)[:, None]
    m_k, m_v = m_n[:, None] & (o_d < D)[None, :], m_n[:, None] & (o_dv < DV)[None, :]
    b_k = tl.load(p_k + i_b * stride_kb + i_h * stride_kh + i_row * stride_kn + o_d[None, :], mask=m_k)  # [BN, BD]
    b_v = tl.load(p_v + i_b * stride_vb + i_h * stride_vh + i_row * stride_vn + o_dv[None, :], mask=m_v)
    tl.store(p_ck + o_out * D + o_d[None, :], b_k, mask=m_k)
    tl.store(p_cv + o_out * DV + o_dv[None, :], b_v, mask=m_v)


def compact_triton(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the rows ``index`` int32 ``[B, H_kv, A]`` of ``key`` and ``value``: ``[B, H_kv, A, .]`` each."""
    require_triton()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    (B, H, _, D), Dv, rows = key.shape, value.shape[-1], index.shape[2]
    compacted_key, compacted_value = key.new_empty(B, H, rows, D), value.new_empty(B, H, rows, Dv)
    if rows:
        _compact_kernel[(-(-rows // 32), B * H)](
            compacted_key, compacted_value, key, value, index, rows, H, *key.stride()[:3], *value.stride()[:3],
            *index.stride()[:2],
            D=D, DV=Dv, BD=max(16, next_power_of_two(D)), BDV=max(16, next_power_of_two(Dv)), BN=32, num_warps=4,
        )  # fmt: skip
    return compacted_key, compacted_value


# ---------------------------------------------------------------------------------------------------------------
# Kernel: one program per (block of queries, query head)


@jit
def _attend_rows(
    b_acc,
    b_max,
    b_sum,
    b_q,
    o_q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    first,
    stop,
    scale_log2,
    log2_weight,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
):
    """Online softmax over the rows ``first .. stop``, whole tiles unless MASKED; CAUSAL hides row j where j > o_q."""
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    for start in range(first, stop, BN):
        o_n = start + tl.arange(0, BN)
        o_row = o_n.to(tl.int64)
        m_n = o_n < stop
        p_k_tile = p_k + o_d[:, None] + o_row[None, :] * stride_k
        p_v_tile = p_v + o_row[:, None] * stride_v + o_dv[None, :]
        if MASKED or D != BD:
            b_k = tl.load(p_k_tile, mask=(o_d < D)[:, None] & m_n[None, :], other=0.0)  # [BD, BN]
        else:
            b_k = tl.load(p_k_tile)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2 + log2_weight  # [BM, BN]
        if MASKED:
            m_s = m_n[None, :]
            if CAUSAL:
                m_s = m_s & (o_n[None, :] <= o_q[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_rescale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        if MASKED or DV != BDV:
            b_v = tl.load(p_v_tile, mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BN, BDV]
        else:
            b_v = tl.load(p_v_tile)
        b_acc = b_acc * b_rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@jit
def _segment_kernel(
    p_q,
    p_k,
    p_v,
    p_ck,
    p_cv,
    p_out,
    p_lse,
    p_segments,
    p_log_weight,
    p_tail,
    H,
    G,
    Lq,
    q_offset,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ckb,
    stride_ckh,
    stride_ckn,
    stride_cvb,
    stride_cvh,
    stride_cvn,
    N_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_block, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_kv = i_h // G
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    p_ck += i_b * stride_ckb + i_kv * stride_ckh
    p_cv += i_b * stride_cvb + i_kv * stride_cvh

    o_m = i_block * BM + tl.arange(0, BM)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_q = (o_m < Lq)[:, None] & (o_d < D)[None, :]
    p_q += i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qn
    b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)  # [BM, BD]
    o_q = o_m + q_offset
    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)

    for i in range(N_SEGMENTS):
        o_segment = i_block * N_SEGMENTS + i
        compacted = tl.load(p_segments + o_segment * 3) == 1
        first = tl.load(p_segments + o_segment * 3 + 1)
        rows = tl.load(p_segments + o_segment * 3 + 2)
        log2_weight = tl.load(p_log_weight + o_segment) * 1.4426950408889634
        p_k_from, p_v_from, stride_k, stride_v = p_k, p_v, stride_kn, stride_vn
        if compacted:
            p_k_from, p_v_from, stride_k, stride_v = p_ck, p_cv, stride_ckn, stride_cvn
        whole = first + rows // BN * BN
        b_acc, b_max, b_sum = _attend_rows(
            b_acc, b_max, b_sum, b_q, o_q, p_k_from, p_v_from, stride_k, stride_v, first, whole,
            scale_log2, log2_weight, False, False, PRECISION, D, DV, BD, BDV, BN,
        )  # fmt: skip
        b_acc, b_max, b_sum = _attend_rows(
            b_acc, b_max, b_sum, b_q, o_q, p_k_from, p_v_from, stride_k, stride_v, whole, first + rows,
            scale_log2, log2_weight, True, False, PRECISION, D, DV, BD, BDV, BN,
        )  # fmt: skip
    # the last block may be shorter: no token lies behind the last query
    stop = q_offset + tl.minimum((i_block + 1) * BM, Lq)
    tail = tl.load(p_tail + i_block)
    middle = tail + (q_offset + i_block * BM - tail) // BN * BN  # up to here every query sees every row
    b_acc, b_max, b_sum = _attend_rows(
        b_acc, b_max, b_sum, b_q, o_q, p_k, p_v, stride_kn, stride_vn, tail, middle,
        scale_log2, 0.0, False, False, PRECISION, D, DV, BD, BDV, BN,
    )  # fmt: skip
    b_acc, b_max, b_sum = _attend_rows(
        b_acc, b_max, b_sum, b_q, o_q, p_k, p_v, stride_kn, stride_vn, middle, stop,
        scale_log2, 0.0, True, True, PRECISION, D, DV, BD, BDV, BN,
    )  # fmt: skip

    b_out = b_acc / b_sum[:, None]
    o_row = i_bh * Lq + o_m
    m_out = (o_m < Lq)[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out + o_row[:, None] * DV + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=o_m < Lq)


def segment_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    compacted_key: torch.Tensor,
    compacted_value: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`segment_attention_reference` as a Triton kernel; same arguments and results.

    Raises ``TypeError`` for dtypes other than float16, bfloat16 and float32.
    """
    require_triton()
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"query: dtype {query.dtype}; the kernel takes float16, bfloat16 or float32")
    tensors = (query, key, value, compacted_key, compacted_value)
    q, k, v, ck, cv = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    (B, H, Lq, D), Dv = q.shape, v.shape[-1]
    segments, log_weight, tail = table.on(q.device)
    out = torch.empty(B, H, Lq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    BD, BDV = (max(16, next_power_of_two(x)) for x in (D, Dv))
    # measured on an H200 at n = 32,768, bf16: 128 x 64 tiles, 8 warps, 3 stages for D = 128 (328 TFLOP/s), 128 x 32
    # tiles, 4 warps for D = 64 (270 TFLOP/s, 192 with the former); wider rows leave shared memory for 2 stages
    narrow, wide = BD + BDV <= 128, q.dtype == torch.float32 or BD + BDV > 256
    _segment_kernel[(len(table.tail), B * H)](
        q, k, v, ck, cv, out, lse, segments, log_weight, tail,
        H, H // k.shape[1], Lq, table.q_offset, scale * 1.4426950408889634,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *ck.stride()[:3], *cv.stride()[:3],
        N_SEGMENTS=segments.shape[1],
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        D=D, DV=Dv, BD=BD, BDV=BDV, BM=table.block, BN=32 if narrow or wide else 64,
        num_warps=8 if table.block == 128 and not narrow else 4,
        num_stages=2 if wide else 3,
    )  # fmt: skip
    return out, lse


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    compacted_key: torch.Tensor,
    compacted_value: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment attention with the kernel on CUDA and the reference elsewhere; see the reference for shapes."""
    run = segment_attention_triton if query.is_cuda else segment_attention_reference
    return run(query, key, value, compacted_key, compacted_value, table, scale)
