"""SANTA on a GPU: two launches, one that reads the keys and one that draws and reads value rows.

The definition of correct is :func:`.santa.santa_reference` with ``shared=True``: all query heads and queries of a KV
head read the same rows. Here the rows of a comb come in *tiles*:

* :func:`_score_kernel` streams the keys once, from the window on. Of every tile it leaves
  ``u = exp(score - max)`` in float16 (the *stash*, which stays in L2), the maximum and the sum of the rounded u, so
  that probabilities, and that of the sink, add up to 1.
  Maxima and sums of a few tiles at a time, an *entry*, are left together.
* :func:`_draw_kernel` takes a chunk of tiles. From the entries every program finds the factor that makes u a
  probability, and where its chunk starts on the comb. An integer scan says which rows are hit; they are listed side by
  side, and only their values are read. The last program of a sequence adds the partial results in order, which gives
  the same bits every time.

Where a chunk starts on the comb is a float32 prefix of sums, not the sum of the integers before it, which is the same
up to rounding. Its offset is uniform all the same, so every row is drawn as often as it should be; all that can differ
is whether a threshold that falls on the border of two chunks, within rounding, counts for one, both or neither.

Needs a GPU with 64-bit atomics and tensor descriptors (emulated before Hopper), or Triton's interpreter. Supports
float16, bfloat16 and float32, ``H / H_kv * Lq`` up to 256 and any head sizes that fit in shared memory. Reads
``B H_kv n D`` keys, ``2 B H n Lq`` bytes of stash (also written), and about ``S`` value rows per KV head.
"""

from __future__ import annotations

import functools
import math
import re
from collections import namedtuple
from collections.abc import Sequence

import numpy as np
import torch

from express_compile.core.call import Call
from express_compile.core.spec import feature_major, floor_power_of_two

from ..launch import (
    FLOAT32_DOT,
    Random,
    Widths,
    constant,
    draw_uniform,
    jit,
    launch,
    next_power_of_two,
    require_triton,
    sequence,
    strided,
    tl,
)
from .bernoulli import Exact, is_whole, round_query_triton
from .segments import Outputs, describe

MAX_ROWS = 256  # query heads of a KV head times queries
TILE = 128  # keys per tile; half as many where a row takes 1 KB
WIDE_TILE = 256  # where it takes 128 bytes at most
SCORE_PROGRAMS = 528  # as many as run at once on an H200, up to 4 tiles each; then four times as many
CHUNK = 2048  # keys per program of the draws; half as many where these would be fewer than run at once
DRAW_PROGRAMS = 132
SUMMED = 8  # parts of the result that one program adds up, at least
GROUP = 16  # value rows per product
NO_LIMIT = (1 << 31) - 1
WARPS = 4


def strata_per_offset(sampler: str) -> int:
    """How many strata share an offset: 1 for ``"strat"``, r for ``"sys-r"``, 0 (all) for ``"sys"`` and ``"iid"``.

    Raises ``ValueError`` for another name.
    """
    names = {"sys": 0, "strat": 1, "iid": 0}
    if sampler in names:
        return names[sampler]
    if isinstance(sampler, str) and re.fullmatch(r"sys-[1-9]\d{0,4}", sampler):
        return int(sampler[4:])
    raise ValueError(f"sampler={sampler!r}: allowed are 'sys', 'strat', 'iid', and 'sys-<r>' for r strata per offset")


def grid_bits(draws: int) -> int:
    """F, the bits behind the point of an expected count, so that prefixes up to ``draws`` fit an int32."""
    return min(24, 30 - (draws + 1).bit_length())


# What the scores leave: the stash, maxima of tiles, maxima and sums of entries, and zeros to count with.
_Stats = namedtuple("_Stats", "u most entry count")


# Which keys there are, and how many of them a query sees, if not all; the stride of padding.
_Masks = namedtuple("_Masks", "lengths padding stride window")


# KV heads, query heads of one, keys, tiles of all of them, of a program of the scores and of an entry, entries,
# programs of the draws, and counts of them.
_Sizes = namedtuple("_Sizes", "KVH G n T chunk programs span E counts")


# The unit of rounded queries, and what makes scores of their products with keys, in base 2.
_Scores = namedtuple("_Scores", "unit scale cap")


_ScoreShape = namedtuple("_ScoreShape", "LQ R D BD BM BN AT_ONCE")


@jit(general="sizes")
def _score_kernel(d_k, q, strides, scores, stats, masks, sizes, SHAPE: tl.constexpr):
    LQ: tl.constexpr = SHAPE.LQ
    R: tl.constexpr = SHAPE.R
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    BD: tl.constexpr = SHAPE.BD
    KVH, G, n, T, chunk, _, span, E, counts = sizes
    i_chunk, i_seq = tl.program_id(0), tl.program_id(1)
    i_b, i_kv = i_seq // KVH, i_seq % KVH
    o_m, o_d, o_n = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    m_m = o_m < R
    p_q = q.p + i_b.to(tl.int64) * q.b + (i_kv * G + o_m // LQ).to(tl.int64)[:, None] * q.h
    b_q = tl.load(
        p_q + (o_m % LQ)[:, None] * q.n + o_d[None, :], mask=m_m[:, None] & (o_d < SHAPE.D)[None, :], other=0.0
    )  # [BM, BD]
    end = n
    if masks.lengths is not None:
        end = tl.load(masks.lengths + i_b).to(tl.int32)
    b_end = end - LQ + 1 + o_m % LQ
    scale_log2 = scores.scale
    if scores.unit is not None:  # of the rounded query, which is integers
        scale_log2 = scale_log2 * tl.load(scores.unit + i_seq.to(tl.int64) * R + o_m, mask=m_m, other=0.0)[:, None]
    if SHAPE.AT_ONCE > 0:  # d_k is the keys themselves: features that no query needs are not read
        m_d = tl.sum((b_q != 0).to(tl.int32), 0) > 0
        p_k = d_k + i_b.to(tl.int64) * strides[0] + i_kv.to(tl.int64) * strides[1] + o_d.to(tl.int64) * strides[2]
        in_rows = tl.cdiv(n, SHAPE.AT_ONCE) * SHAPE.AT_ONCE  # whole groups of AT_ONCE keys, which are loaded at once
    p_most = stats.most + i_seq.to(tl.int64) * R * T
    p_entry = stats.entry + i_seq.to(tl.int64) * 2 * R * E
    for i in range(i_chunk, counts, tl.num_programs(0)):
        tl.store(stats.count + i_seq * counts + i, 0)
    b_top, b_all = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)  # of the tiles of an entry
    first = i_chunk * chunk
    last = tl.minimum(first + chunk, T)
    if masks.window is not None and masks.lengths is not None:  # tiles that no query sees: no keys, no mass
        seen = tl.maximum(end - LQ + 1 - masks.window, 0) // BN
        for t in range(first, tl.minimum(seen, last)):
            tl.store(p_most + o_m * T + t, b_top, mask=m_m)
            tl.store(p_entry + o_m * E + t // span, b_top, mask=m_m)
            tl.store(p_entry + (R + o_m) * E + t // span, b_all, mask=m_m)
        first = tl.maximum(first, seen)
    for t in range(first, last):
        if SHAPE.AT_ONCE > 0:
            m_k = m_d[:, None] & (t * BN + o_n < in_rows)[None, :]
            b_k = tl.load(p_k[:, None] + (t * BN + o_n)[None, :], mask=m_k, other=0.0)  # [BD, BN]
        else:
            b_k = tl.trans(d_k.load([i_b, i_kv, t * BN, 0]).reshape(BN, BD))
        b_s = tl.dot(b_q, b_k, input_precision=FLOAT32_DOT) * scale_log2  # [BM, BN]
        if scores.cap is not None:  # the scale holds 2 / cap, and this is cap * tanh
            b_s = scores.cap - 2.0 * scores.cap / (tl.exp2(b_s) + 1.0)
        m_s = (t * BN + o_n)[None, :] < b_end[:, None]
        if masks.window is not None:
            m_s = m_s & ((t * BN + o_n)[None, :] >= b_end[:, None] - masks.window)
        if masks.padding is not None:
            b_real = tl.load(
                masks.padding + i_b.to(tl.int64) * masks.stride + t * BN + o_n, mask=t * BN + o_n < n, other=0
            )
            m_s = m_s & (b_real != 0)[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_max = tl.maximum(tl.max(b_s, 1), -1e30)
        b_u = tl.exp2(b_s - b_max[:, None]).to(stats.u.dtype.element_ty)
        o_tile = (i_seq.to(tl.int64) * T + t) * (R * BN)
        b_kept = tl.where(b_u == b_u, b_u, 0.0).to(b_u.dtype)  # NaN counts in the sums only, of its own row
        tl.store(
            stats.u + o_tile + o_m[:, None] * BN + o_n[None, :], b_kept, mask=m_m[:, None], eviction_policy="evict_last"
        )
        tl.store(p_most + o_m * T + t, b_max, mask=m_m)
        fresh = t % span == 0
        b_new = tl.where(fresh, b_max, tl.maximum(b_top, b_max))
        b_all = tl.where(fresh, 0.0, b_all * tl.exp2(b_top - b_new))
        b_all += tl.sum(b_u.to(tl.float32), 1) * tl.exp2(b_max - b_new)
        b_top = b_new
        tl.store(p_entry + o_m * E + t // span, b_top, mask=m_m)
        tl.store(p_entry + (R + o_m) * E + t // span, b_all, mask=m_m)


@jit
def _below(b_x, random, step, head, offset, bits, PER: tl.constexpr):
    """Thresholds below ``b_x``, of which stratum m has one at ``m + U_m``, in units of ``2**-bits``."""
    b_stratum = b_x >> bits
    b_offset = b_x * 0 + offset
    if PER > 0:
        b_u = draw_uniform(tl.load(random.seed), random.layer, b_stratum // PER, 1 << 30, step, head)
        b_offset = (b_u * 16777216.0).to(tl.int32) >> (24 - bits)
    return b_stratum + (b_x - (b_stratum << bits) > b_offset).to(tl.int32)


@jit
def _sum_parts(p_part, o_x, m_x, count, stride, BX: tl.constexpr, BP: tl.constexpr):
    """The sum of ``count`` parts, in order."""
    o_p = tl.arange(0, BP)
    b_sum = tl.zeros([BX], tl.float32)
    for i in range(0, count, BP):
        m_p = (i + o_p < count)[:, None] & m_x[None, :]
        b_sum += tl.sum(tl.load(p_part + (i + o_p)[:, None] * stride + o_x[None, :], mask=m_p, other=0.0), 0)
    return b_sum


# Draws of every head, or of every sequence and head; their bits; keys; where a comb begins. Below ``exact_below``
# keys in reach a sequence is exact.
_Draws = namedtuple("_Draws", "draws bits step offset sinks stride exact_below reach")


# Rows that are hit and their weights, by program; parts of the result; the result.
_Results = namedtuple("_Results", "rows weights part out lse")


# Queries, rows, bits and strata of a comb, widths, and tiles: rows twice, keys, a chunk of them, values at once,
# parts that one program adds, entries and parts at once.
_DrawShape = namedtuple("_DrawShape", "LQ R BITS PER DV BDV BM BR BN BC BG BS BE BP")


@jit(general="draws random sizes")
def _draw_kernel(v, stats, draws, random, masks, results, sizes, SHAPE: tl.constexpr):
    LQ: tl.constexpr = SHAPE.LQ
    R: tl.constexpr = SHAPE.R
    DV: tl.constexpr = SHAPE.DV
    BDV: tl.constexpr = SHAPE.BDV
    BM: tl.constexpr = SHAPE.BM
    BR: tl.constexpr = SHAPE.BR
    BN: tl.constexpr = SHAPE.BN
    BC: tl.constexpr = SHAPE.BC
    BG: tl.constexpr = SHAPE.BG
    BS: tl.constexpr = SHAPE.BS
    TILES: tl.constexpr = SHAPE.BC // SHAPE.BN
    UNROLL: tl.constexpr = min(SHAPE.R, 4)
    KVH, G, _, T, _, programs, span, E, _ = sizes
    i_chunk, i_seq = tl.program_id(0), tl.program_id(1)
    i_b, i_kv = i_seq // KVH, i_seq % KVH
    o_n, o_r, o_key = tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BN)
    first, bits = i_chunk * TILES, SHAPE.BITS
    if draws.bits is not None:
        bits = tl.load(draws.bits + i_b)
    one = 1 << bits
    o_tile = first + tl.arange(0, TILES)
    p_u = stats.u + i_seq.to(tl.int64) * T * (R * BN)
    p_most = stats.most + i_seq.to(tl.int64) * R * T
    p_entry = stats.entry + i_seq.to(tl.int64) * 2 * R * E
    p_draws = draws.draws + i_b * draws.stride + i_kv * G

    # softmax statistics of all keys, and how much of them lies before these
    m_r = o_r < R
    m_t = m_r[:, None] & (o_tile < T)[None, :]
    b_factor = tl.load(p_most + o_r[:, None] * T + o_tile[None, :], mask=m_t, other=-1e30)
    b_top, b_all, b_before = tl.full([BR], -1e30, tl.float32), tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
    if draws.sinks is not None:
        b_sink = tl.load(draws.sinks + i_kv * G + o_r // LQ, mask=m_r, other=0.0).to(tl.float32) * 1.4426950408889634
        b_top = tl.maximum(b_sink, -1e30)
        b_all = tl.exp2(b_sink - b_top)
    for e in range(0, E, SHAPE.BE):
        o_e = e + tl.arange(0, SHAPE.BE)[None, :]
        m_e = m_r[:, None] & (o_e < E)
        b_most = tl.load(p_entry + o_r[:, None] * E + o_e, mask=m_e, other=-1e30)
        b_l = tl.load(p_entry + (R + o_r)[:, None] * E + o_e, mask=m_e, other=0.0)
        b_new = tl.maximum(b_top, tl.max(b_most, 1))
        b_l *= tl.exp2(b_most - b_new[:, None])
        b_scale = tl.exp2(b_top - b_new)
        b_all = b_all * b_scale + tl.sum(b_l, 1)
        b_before = b_before * b_scale + tl.sum(tl.where(o_e * span < first, b_l, 0.0), 1)
        b_top = b_new
    m_all = b_all > 0  # neither 0 nor NaN: a row that is no number draws nothing
    b_inverse = tl.where(m_all, 1.0 / b_all, 0.0)
    if i_chunk == 0:
        b_lse = (b_top + tl.log2(tl.where(m_all, b_all, 1.0))) * 0.6931471805599453
        b_none = tl.where(b_all == b_all, float("-inf"), float("nan"))
        tl.store(results.lse + i_seq.to(tl.int64) * R + o_r, tl.where(m_all, b_lse, b_none), mask=m_r)
    b_rate = tl.abs(tl.load(p_draws + o_r // LQ, mask=m_r, other=0.0)) / R
    start = tl.sum(tl.where(m_all, b_before * b_inverse * b_rate, 0.0))
    # what makes probabilities of the stash takes the place of the maxima of these tiles
    b_factor = tl.where(m_all[:, None], tl.exp2(b_factor - b_top[:, None]) * b_inverse[:, None], 0.0)  # [BR, TILES]
    tl.debug_barrier()
    tl.store(p_most + o_r[:, None] * T + o_tile[None, :], b_factor, mask=m_t)

    # the comb of these keys: their expected draws, the mean over heads and queries
    b_factor *= tl.abs(tl.load(p_draws + o_r // LQ, mask=m_r, other=0.0))[:, None]
    b_x = tl.zeros([TILES, BN], tl.float32)
    m_u = (o_tile < T)[:, None]
    if masks.window is not None:  # nothing was left of the tiles before it
        m_u = m_u & ((o_tile + 1) * BN > tl.load(masks.lengths + i_b).to(tl.int32) - LQ + 1 - masks.window)[:, None]
    for r in tl.range(0, R, loop_unroll_factor=UNROLL):
        o_u = (o_tile * R + r)[:, None] * BN + o_key[None, :]
        b_u = tl.load(p_u + o_u, mask=m_u, other=0.0, eviction_policy="evict_first")
        b_x += b_u.to(tl.float32) * tl.sum(tl.where((o_r == r)[:, None], b_factor, 0.0), 0)[:, None]
    b_x = tl.reshape(b_x, [BC])
    b_x *= one / R
    b_x = tl.maximum(tl.floor(b_x + 0.5), tl.where(b_x > 0, 1.0, 0.0)).to(tl.int32)
    b_high = (start * one).to(tl.int32) + tl.cumsum(b_x, 0)
    step = tl.load(draws.step + i_b).to(tl.int32)
    whole = is_whole(step, p_draws, draws.exact_below, draws.reach)
    if draws.offset is None:
        b_draw = draw_uniform(tl.load(random.seed), random.layer, tl.arange(0, 1), 1 << 30, step, i_kv)
        offset = tl.sum((b_draw * 16777216.0).to(tl.int32) >> (24 - bits))
    else:
        offset = tl.load(draws.offset + i_seq)
    b_hits = _below(b_high, random, step, i_kv, offset, bits, SHAPE.PER)
    b_hits -= _below(b_high - b_x, random, step, i_kv, offset, bits, SHAPE.PER)
    # expected draws of 1 or more: always read, with its own weight
    b_weight = b_hits.to(tl.float32) * one / tl.maximum(b_x, 1).to(tl.float32)
    b_weight = tl.where((b_x >= one) | (whole & (b_x > 0)), 1.0, b_weight)

    # the rows that are hit, side by side, and then their values
    m_hit = b_weight > 0
    b_place = tl.cumsum(m_hit.to(tl.int32), 0) - 1
    hit = tl.sum(m_hit.to(tl.int32), 0)
    o_list = (i_seq.to(tl.int64) * programs + i_chunk) * BC
    tl.store(results.rows + o_list + b_place, o_n, mask=m_hit)
    tl.store(results.weights + o_list + b_place, b_weight, mask=m_hit)
    tl.debug_barrier()
    o_m, o_dv, o_g = tl.arange(0, BM), tl.arange(0, BDV), tl.arange(0, BG)
    m_m = o_m < R
    p_v, stride_v = sequence(v, i_b, i_kv)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for i in range(0, hit, BG):
        m_g = i + o_g < hit
        b_row = tl.load(results.rows + o_list + i + o_g, mask=m_g, other=0)
        b_w = tl.load(results.weights + o_list + i + o_g, mask=m_g, other=0.0)
        o_v = (first * BN + b_row).to(tl.int64)[:, None] * stride_v + o_dv[None, :]
        b_v = tl.load(p_v + o_v, mask=m_g[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BG, BDV]
        m_p = m_m[:, None] & m_g[None, :]
        o_p = ((first + b_row // BN) * (R * BN) + b_row % BN)[None, :] + o_m[:, None] * BN
        b_p = tl.load(p_u + o_p, mask=m_p, other=0.0).to(tl.float32)
        b_p *= tl.load(p_most + o_m[:, None] * T + (first + b_row // BN)[None, :], mask=m_p, other=0.0)
        b_p *= b_w[None, :]  # [BM, BG]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision=FLOAT32_DOT)

    # parts are added in groups of BS programs, and then the groups, each by whoever is the last of them
    p_part = results.part + i_seq.to(tl.int64) * programs * (R * DV)
    p_count = stats.count + i_seq * (tl.cdiv(programs, BS) + 1)
    tl.store(
        p_part + i_chunk * (R * DV) + o_m[:, None] * DV + o_dv[None, :], b_acc,
        mask=m_m[:, None] & (o_dv < DV)[None, :],
    )  # fmt: skip
    tl.debug_barrier()
    group = i_chunk // BS
    members = tl.minimum(BS, programs - group * BS)
    if tl.atomic_add(p_count + 1 + group, 1, sem="acq_rel") == members - 1:
        o_x = tl.arange(0, BR * BDV)
        m_x = (o_x // BDV < R) & (o_x % BDV < DV)
        o_x = o_x // BDV * DV + o_x % BDV
        p_group = p_part + group * BS * (R * DV)
        b_sum = _sum_parts(p_group, o_x, m_x, members, R * DV, BR * BDV, SHAPE.BP)
        tl.debug_barrier()
        tl.store(p_group + o_x, b_sum, mask=m_x)
        tl.debug_barrier()
        groups = tl.cdiv(programs, BS)
        if tl.atomic_add(p_count, 1, sem="acq_rel") == groups - 1:
            b_sum = _sum_parts(p_part, o_x, m_x, groups, BS * (R * DV), BR * BDV, SHAPE.BP)
            b_lse = tl.load(results.lse + i_seq.to(tl.int64) * R + o_x // DV, mask=m_x, other=0.0)
            b_sum = tl.where(b_lse == b_lse, b_sum, float("nan"))
            # rows are (head, query) of this KV head, which lie side by side in the output
            tl.store(
                results.out + i_seq.to(tl.int64) * (R * DV) + o_x, b_sum.to(results.out.dtype.element_ty), mask=m_x
            )


def _keys_at_once(key: torch.Tensor) -> int:
    """How many keys of a feature the scores may load at once: 16 bytes if aligned; 0 if they lie token by token."""
    if not feature_major(key):
        return 0
    width = 16 // key.element_size()
    strides = *key.stride()[:2], key.stride(3)
    return 1 if key.data_ptr() % 16 or any(stride % width for stride in strides) else width


@functools.lru_cache(maxsize=256)
def _draws_on(draws: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return constant(np.array(draws, np.float32), device)


def _varying_draws(
    draws: torch.Tensor, seen: torch.Tensor, fraction: float, table: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """S of every head, float32 ``[B, H]``, and the bits F that a sequence has, int32 ``[B]``, where ``draws`` ``[H]``
    has zeros; negative in all heads of a sequence that sees no more keys than draws. ``seen`` int64 ``[B]``."""
    if table:
        at = (torch.frexp(seen.double()).exponent.long() - 5).clamp(0, len(table) - 1)
        varying = _draws_on(tuple(table), draws.device)[at]
    else:
        varying = (seen.double() * fraction).round().clamp(min=1).float()
    S = torch.where(draws == 0, varying[:, None], draws)
    bits = (30 - torch.frexp(S.amax(1) + 1).exponent).clamp(max=24)
    return torch.where((seen <= S.amin(1))[:, None], -S, S), bits.to(torch.int32)


@functools.lru_cache(maxsize=256)
def _step_on(step: int, B: int, device: torch.device) -> torch.Tensor:
    return constant(np.full(B, step, np.int64), device)


def santa_triton(
    call: Call, draws: list[int] | None, exact_below: int = 0, offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`.santa.santa_reference` with ``shared=True``; ``draws`` lists S of every query head, 0 where it
    varies, an entry of ``table`` or a ``fraction`` of the real keys in reach of a sequence; None reads all. A sequence
    with fewer than ``exact_below`` such keys is exact, and where S varies one with at most as many as draws.

    Keys that lie feature by feature are read as they are, and of them only the features that the query needs; the
    fastest where their strides are multiples of 16 bytes.
    ``offset`` int32 ``[B, H_kv]`` in units of ``2**-F`` takes the place of the random one of ``"sys"``, for tests.
    Raises ``ValueError`` for more than 256 rows per KV head.
    """
    require_triton()
    query, key, value, padding, lengths, options = (
        call.query, call.key, call.value, call.padding, call.lengths, call.options
    )  # fmt: skip
    (B, H, Lq, D), (KVH, n), Dv, device = query.shape, key.shape[1:3], value.shape[-1], query.device
    window, softcap, random = options.get("window", 0), options.get("softcap", 0.0), Random(call.seed, call.layer)
    if lengths is not None:
        lengths = lengths.contiguous()
    if padding is not None:
        step = padding.sum(1) if lengths is None else (
            padding & (torch.arange(n, device=device) < lengths[:, None])
        ).sum(1)  # fmt: skip
        padding = padding.contiguous().view(torch.uint8)
    else:
        step = _step_on(n, B, device) if lengths is None else lengths
    reach, bits, stride_db = window + Lq - 1 if window else NO_LIMIT, None, 0
    counted = _draws_on(tuple(draws or [1] * H), device)
    if draws is not None and not all(draws):
        varying = options.get("fraction", 0.0), options.get("table", ())
        counted, bits = _varying_draws(counted, step.clamp(max=reach), *varying)
        stride_db = H
    unit = None
    if levels := options.get("bernoulli", 0):
        exact = None if draws is None else Exact(counted, exact_below, reach, stride_db)
        query, unit = round_query_triton(query, n, levels, random, step, padding, lengths, exact, H // KVH)
    if draws is None:
        exact_below = NO_LIMIT
    if window >= n:
        window = 0
    if window and lengths is None:
        before = max(0, n - Lq + 1 - window)  # keys that no query sees
        key, value, n = key[:, :, before:], value[:, :, before:], n - before
        padding = None if padding is None else padding[:, before:]
        window = 0 if Lq == 1 else window
    R = H // KVH * Lq
    if R > MAX_ROWS:
        raise ValueError(f"query: {H // KVH} heads per key head times {Lq} queries are {R}; must be at most {MAX_ROWS}")
    BM, BR, BD, BDV = max(16, next_power_of_two(R)), next_power_of_two(R), *Widths.of(key, value)[2:]
    row_bytes = BD * query.element_size()
    tile = WIDE_TILE if row_bytes <= 128 else TILE if row_bytes <= 512 else TILE // 2
    T, sequences = -(-n // tile), B * KVH
    chunk = CHUNK if n * sequences >= CHUNK * DRAW_PROGRAMS else CHUNK // 2
    # eight tiles at least: with four the draws took 26 us instead of 11 (D = 64)
    chunk = max(tile, min(max(chunk, 8 * tile), next_power_of_two(n)))
    programs = -(-n // chunk)
    # tiles per program of the scores, and of these per entry of statistics; what is drawn together begins an entry
    score_chunk = max(min(4, -(-T * sequences // SCORE_PROGRAMS)), -(-T * sequences // (4 * SCORE_PROGRAMS)))
    span = min(chunk // tile, floor_power_of_two(score_chunk))
    score_chunk = -(-score_chunk // span) * span if span == chunk // tile else span
    entries = -(-T // span)
    at_once = _keys_at_once(key)
    keys = key if at_once else describe(key, tile, BD)
    stash = torch.float32 if query.dtype == torch.float32 else torch.float16
    u = torch.empty(sequences, T, R, tile, dtype=stash, device=device)
    # of every tile maxima, later factors; of every entry maxima and sums; and of every program its part of the result
    lengths_of = [sequences * R * T, sequences * 2 * R * entries, sequences * programs * chunk,
             sequences * programs * R * Dv]  # fmt: skip
    most, entry, weights, part = torch.empty(sum(lengths_of), dtype=torch.float32, device=device).split(lengths_of)
    summed = max(SUMMED, next_power_of_two(math.isqrt(programs - 1) + 1))
    counts = -(-programs // summed) + 1
    rows = torch.empty(sequences * (programs * chunk + counts), dtype=torch.int32, device=device)
    count = rows[-sequences * counts :]
    out, lse = Outputs.of(query, Dv)
    log2_scale, skips = call.scale * 1.4426950408889634, bool(window) and lengths is not None
    stages = (2 if score_chunk <= 4 else 3) if row_bytes <= 256 else 2 if query.element_size() == 2 else 1
    stats = _Stats(u, most, entry, count)
    sizes = _Sizes(KVH, H // KVH, n, T, score_chunk, programs, span, entries, counts)
    scores = _Scores(unit, 2 * log2_scale / softcap if softcap else log2_scale,
                     softcap * 1.4426950408889634 if softcap else None)  # fmt: skip
    masks = _Masks(lengths, padding, 0 if padding is None else padding.stride(0), window or None)
    launch(_score_kernel, (-(-T // score_chunk), sequences),
        keys, strided(query), (*key.stride()[:2], key.stride(3)), scores, stats, masks, sizes,
        SHAPE=_ScoreShape(Lq, R, D, BD, BM, tile, at_once),
        num_warps=8 if at_once in (1, 4) else 4, num_stages=stages,  # such loads take more registers
    )  # fmt: skip
    sinks = None if call.sinks is None else call.sinks.contiguous()
    shape = _DrawShape(
        Lq, R, grid_bits(max(draws) if draws else 1), strata_per_offset(options.get("sampler", "sys")),
        Dv, BDV, BM, BR, tile, chunk, GROUP, summed,
        BE=max(16, min(1024 // BR, next_power_of_two(entries))), BP=max(1, min(4, 4096 // (BR * BDV))),
    )  # fmt: skip
    launch(_draw_kernel, (programs, sequences),
        strided(value), stats, _Draws(counted, bits, step, offset, sinks, stride_db, exact_below, reach),
        random, masks if skips else _Masks(None, None, 0, None), _Results(rows, weights, part, out, lse),
        sizes, SHAPE=shape, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out, lse
