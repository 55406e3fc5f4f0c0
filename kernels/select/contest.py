"""Protected rows: the most distinctive rows outside the window compete for places that are held exactly.

Thinning keeps one of every ``w`` rows, so it forgets what a single row says. Rows leave the window in contests of
``CONTEST`` rows, and each gets a score once and for all: minus the cosine similarity of its key to the mean key of its
head, averaged with that of its value to the mean value, and then over ``NEIGHBOURS`` rows of the contest around it. The
means are those of all rows up to the end of the contest. The best ``protected`` of the places and the newcomers stay,
and the losers go on to be thinned, in position order. Query-blind, and causal: no query sees what a contest decides
before its last row has left the window. (Not in the Express paper; KeyDiff, arXiv 2504.15364, scores single keys.)
"""

from __future__ import annotations

import math
from collections import namedtuple

import torch
from torch.nn.functional import avg_pool1d

from ..launch import constexpr, head_of, jit, launch, next_power_of_two, require_triton, sequence, strided, tl
from ..spans import Spans, numbers_of, place_of

CONTEST = 256  # rows that compete for the protected places at a time
NEIGHBOURS = 5  # rows whose mean is a score: a fact is a run of tokens


def distinctiveness(
    key: torch.Tensor, value: torch.Tensor, key_sum: torch.Tensor, value_sum: torch.Tensor, count: int
) -> torch.Tensor:
    """Scores ``[B, H, C]`` in [-1, 1] of the rows of a contest: ``key`` ``[B, H, C, D]``, ``value`` ``[B, H, C, Dv]``.

    ``key_sum`` ``[B, H, D]`` and ``value_sum`` ``[B, H, Dv]``, of the dtype that the scores have, are those of the
    ``count`` rows that left so far, these among them.
    """
    alike = [
        torch.cosine_similarity(x.to(total), (total / count)[:, :, None], dim=-1)
        for x, total in ((key, key_sum), (value, value_sum))
    ]
    single = -(alike[0] + alike[1]) / 2  # at the ends of a contest there are fewer neighbours
    flat = single.flatten(0, -2)[:, None]
    return avg_pool1d(flat, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False).view_as(single)


def contest(
    places: torch.Tensor, place_scores: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, protected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One contest for the protected places: the best ``protected`` of places and rows stay, by score.

    ``places`` and ``rows`` hold token indices ``[B, H, .]`` in position order, with their scores; of equal scores
    the earlier row is the better one. Returns the new places, their scores, and the losers in position order.
    """
    index, score = torch.cat([places, rows], 2), torch.cat([place_scores, scores], 2)
    if index.shape[2] <= protected:
        return index, score, index[:, :, :0]
    best = torch.sort(score, dim=2, descending=True, stable=True).indices[:, :, :protected]
    wins = torch.zeros_like(score, dtype=torch.bool).scatter_(2, best, True)
    order = wins.to(torch.int8).argsort(dim=2, stable=True)  # losers, then winners, both in position order
    index, score = index.gather(2, order), score.gather(2, order)
    split = index.shape[2] - protected
    return index[:, :, split:], score[:, :, split:], index[:, :, :split]


def compete_reference(
    key: torch.Tensor, value: torch.Tensor, sinks: int, contests: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All contests of a prefill, the rows from ``sinks`` on in position order: ``key`` ``[B, H, L, D]`` and ``value``
    ``[B, H, L, Dv]``.

    Returns the losers in the order in which they leave, int32 ``[B, H, max(0, contests * CONTEST - protected)]``,
    and the places after every contest, int32 ``[B, H, contests, protected]`` (0 where a place is still free).
    """
    B, H = key.shape[:2]
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    key_sum, value_sum = (x[:, :, :sinks].to(dtype).sum(2) for x in (key, value))
    places = torch.empty(B, H, 0, dtype=torch.int32, device=key.device)
    scores = torch.empty(B, H, 0, dtype=dtype, device=key.device)
    streamed = [places]
    history = torch.zeros(B, H, contests, protected, dtype=torch.int32, device=key.device)
    for i in range(contests):
        first = sinks + i * CONTEST
        rows = torch.arange(first, first + CONTEST, dtype=torch.int32, device=key.device).expand(B, H, CONTEST)
        keys, values = (x[:, :, first : first + CONTEST] for x in (key, value))
        key_sum, value_sum = key_sum + keys.to(dtype).sum(2), value_sum + values.to(dtype).sum(2)
        new_scores = distinctiveness(keys, values, key_sum, value_sum, first + CONTEST)
        places, scores, losers = contest(places, scores, rows, new_scores, protected)
        streamed.append(losers)
        history[:, :, i, : places.shape[2]] = places
    return torch.cat(streamed, 2), history


# ---------------------------------------------------------------------------------------------------------------
# Kernels. Scores are frozen and winners stay, so the places after a contest are the best of all rows so far: a
# prefix scan. Rows are int64 (score, row), and lists of rows are sorted. The entries of a descending and of an
# ascending list, compared one by one, fall into the better half of both and the worse half; the better one is
# bitonic, so that few steps sort it. Contests are scanned in groups: the best rows of every group first, then every
# program starts from the groups before its own.
#
# An entry is ``score << 32 | (2**31 - 1 - row)``: of equal scores the earlier row is the better one. The score is
# in [-1, 1], or 1.5 for NaN; a free place is below every row and says row 0, a blocked one is above every row.


_FREE, _BLOCKED = constexpr(0x7FFFFFFF - (1 << 62)), constexpr((1 << 62) - 1)


@jit
def _rows_of(b_x):
    return 0x7FFFFFFF - (b_x & 0xFFFFFFFF).to(tl.int32)


@jit
def _exchange(b_x, RUNS: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, DESCENDING: tl.constexpr):
    """Sorts the pairs of entries that are ``STEP`` apart, with the direction of the run that they are in."""
    b_h = tl.reshape(b_x, [RUNS * PARTS, 2, STEP])
    b_other = tl.sum(b_h, 1, keep_dims=True) - b_h  # a reduction moves entries without shared memory
    b_descending = (tl.arange(0, RUNS * PARTS) // PARTS + DESCENDING) % 2
    b_larger = (tl.arange(0, 2)[None, :] != b_descending[:, None])[:, :, None]
    return tl.reshape(tl.where((b_h < b_other) == b_larger, b_other, b_h), [RUNS * PARTS * 2 * STEP])


@jit
def _merge(b_x, LEVEL: tl.constexpr, LOG: tl.constexpr, DESCENDING: tl.constexpr):
    """Sorts every run of ``2**LEVEL`` entries of ``b_x`` ``[2**LOG]``, each bitonic.

    Directions alternate; the first run ascends, or descends with ``DESCENDING = 1``.
    """
    for i in tl.static_range(LEVEL):
        b_x = _exchange(b_x, 1 << (LOG - LEVEL), 1 << i, 1 << (LEVEL - 1 - i), DESCENDING)
    return b_x


@jit
def _sort(b_x, LOG: tl.constexpr):
    """``b_x`` ``[2**LOG]``, ascending. (``tl.sort`` is no faster, and very slow when interpreted.)"""
    for i in tl.static_range(LOG):
        b_x = _merge(b_x, i + 1, LOG, 0)
    return b_x


@jit
def _load_list(p_lists, i, count, LOG: tl.constexpr, LOG_LIST: tl.constexpr):
    """Ascending list ``i`` of ``count`` as ``[2**LOG]``: short lists have free places in front, none is all free."""
    o_n = tl.arange(0, 1 << LOG) - ((1 << LOG) - (1 << LOG_LIST))
    first = tl.where(count > i, 0, 1 << LOG)
    return tl.load(p_lists + (i << LOG_LIST) + o_n, mask=o_n >= first, other=_FREE)


@jit
def _absorb(b_x, p_lists, count, LOG: tl.constexpr, LOG_LIST: tl.constexpr):
    """The best of the descending ``b_x`` ``[2**LOG]`` and of ``count`` ascending lists, descending."""
    b_next = _load_list(p_lists, 0, count, LOG, LOG_LIST)
    for i in range(count):
        b_new = b_next
        b_next = _load_list(p_lists, i + 1, count, LOG, LOG_LIST)  # arrives while this one is merged
        b_x = _merge(tl.maximum(b_x, b_new), LOG, LOG, 1)
    return b_x


# Keys and values of all heads, which of these compete, None for all, and where the tokens are.
_Rows = namedtuple("_Rows", "key value heads spans")


@jit
def _contests_of(span, sinks, contests, ROWS: tl.constexpr):
    """How many of the contests a sequence has."""
    return tl.minimum(contests, tl.maximum(span.length - sinks, 0) // ROWS)


@jit
def _load_rows(p_x, first, end, stride_n, o_d, span, BN: tl.constexpr, D: tl.constexpr):
    o_n = first + tl.arange(0, BN)
    mask = (o_n < end)[:, None] & (o_d < D)[None, :]
    if span is not None:
        o_n = place_of(span, o_n, o_n < end)
    return tl.load(p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0)  # [BN, BD]


@jit
def _add_up(
    p_sums, p_x, stride_n, sizes, span, held, i_d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of BD channels from the start of a group to the end of each of its contests; the first starts with sinks."""
    H, sinks, contests, group = sizes
    i_group = tl.program_id(0)
    o_d = i_d * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    if i_group == 0:
        for first in range(0, sinks, ROWS):
            b_sum += tl.sum(_load_rows(p_x, first, sinks, stride_n, o_d, span, ROWS, D).to(tl.float32), 0)
    begin, end = i_group * group, tl.minimum(i_group * group + group, held)
    end_row = sinks + end * ROWS
    b_next = _load_rows(p_x, sinks + begin * ROWS, end_row, stride_n, o_d, span, ROWS, D)
    for i in range(begin, end):
        b_x = b_next
        b_next = _load_rows(p_x, sinks + (i + 1) * ROWS, end_row, stride_n, o_d, span, ROWS, D)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
        tl.store(p_sums + i * WIDTH + o_d, b_sum, mask=o_d < D)


@jit(general="sizes")
def _sum_kernel(p_sums, rows, sizes, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr):
    """Running sums of keys and, behind them, of values: one program per (group, BD channels of either, head)."""
    i_d, i_seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    OF_KEY: tl.constexpr = (D + BD - 1) // BD
    H, sinks, contests, group = sizes
    span, held = rows.spans, contests
    if rows.spans is not None:
        span = Spans(rows.spans.order, rows.spans.lead, *numbers_of(rows.spans, i_seq // H))
        held = _contests_of(span, sinks, contests, ROWS)
    if tl.program_id(0) * group >= held:
        return
    head = head_of(rows.heads, i_seq % H)
    p_sums += i_seq * contests * (D + DV)
    if i_d < OF_KEY:
        p_k, stride_n = sequence(rows.key, i_seq // H, head)
        _add_up(p_sums, p_k, stride_n, sizes, span, held, i_d, D + DV, ROWS, D, BD)
    else:
        p_v, stride_n = sequence(rows.value, i_seq // H, head)
        _add_up(p_sums + D, p_v, stride_n, sizes, span, held, i_d - OF_KEY, D + DV, ROWS, DV, BD)


@jit
def _alike(
    p_row, p_sums, p_x, stride_n, sizes, span,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Cosine similarities [ROWS] of the rows of a contest to the running mean; ``p_row`` is room for as many int64."""
    i_contest = tl.program_id(0)
    H, sinks, contests, group = sizes
    BG: tl.constexpr = 8
    first = sinks + i_contest * ROWS
    end = first + ROWS
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    b_next = _load_rows(p_x, first, end, stride_n, o_d, span, BN, D)
    b_mean = tl.load(p_sums + i_contest * WIDTH + o_d, mask=o_d < D, other=0.0)
    for i_group in range(0, i_contest // group, BG):
        o_g = i_group + tl.arange(0, BG)
        mask = (o_g < i_contest // group)[:, None] & (o_d < D)[None, :]
        p_last = p_sums + ((o_g + 1) * group - 1)[:, None] * WIDTH + o_d[None, :]
        b_mean += tl.sum(tl.load(p_last, mask=mask, other=0.0), 0)
    b_mean /= end
    for row in range(0, ROWS, BN):
        b_x = b_next.to(tl.float32)
        b_next = _load_rows(p_x, first + row + BN, end, stride_n, o_d, span, BN, D)  # arrives while this tile is scored
        b_dot = tl.sum(b_x * b_mean[None, :], 1).to(tl.int32, bitcast=True)
        b_x2 = tl.sum(b_x * b_x, 1).to(tl.int32, bitcast=True)
        # through memory: sums over channels leave every row in many threads, and all of them would sort
        tl.store(p_row + row + o_n, (b_dot.to(tl.int64) << 32) | b_x2.to(tl.int64))
    tl.debug_barrier()
    b_both = tl.load(p_row + tl.arange(0, ROWS))
    tl.debug_barrier()
    b_dot = (b_both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    b_x2 = b_both.to(tl.int32).to(tl.float32, bitcast=True)
    # exact rounding keeps equal scores equal
    b_norm = tl.maximum(tl.sqrt_rn(b_x2), 1e-8) * tl.maximum(tl.sqrt_rn(tl.sum(b_mean * b_mean)), 1e-8)
    return tl.div_rn(b_dot, b_norm)


@jit(general="sizes")
def _score_kernel(
    p_newcomers, p_sums, rows, sizes, LOG_ROWS: tl.constexpr, NEAR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The rows of one contest, scored and sorted, ascending: one program per (contest, head)."""
    i_contest, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H, sinks, contests, group = sizes
    ROWS: tl.constexpr = 1 << LOG_ROWS
    span, held = rows.spans, contests
    if rows.spans is not None:
        span = Spans(rows.spans.order, rows.spans.lead, *numbers_of(rows.spans, i_seq // H))
        held = _contests_of(span, sinks, contests, ROWS)
    if i_contest >= held:
        return
    head = head_of(rows.heads, i_seq % H)
    p_sums += i_seq * contests * (D + DV)
    p_newcomers += (i_seq * contests + i_contest) * ROWS
    p_k, stride_n = sequence(rows.key, i_seq // H, head)
    b_alike = _alike(p_newcomers, p_sums, p_k, stride_n, sizes, span, D + DV, ROWS, D, BD, BN)
    p_v, stride_n = sequence(rows.value, i_seq // H, head)
    b_alike += _alike(p_newcomers, p_sums + D, p_v, stride_n, sizes, span, D + DV, ROWS, DV, BDV, BN)
    o_row = tl.arange(0, ROWS)
    tl.store(p_newcomers + o_row, b_alike.to(tl.int32, bitcast=True).to(tl.int64))
    tl.debug_barrier()
    b_score = tl.zeros([ROWS], tl.float32)  # what is taken from 0 is never -0, whose bits are not those of 0
    for i in tl.static_range(NEAR):
        o_near = o_row + i - NEAR // 2
        b_near = tl.load(p_newcomers + o_near, mask=(o_near >= 0) & (o_near < ROWS), other=0)
        b_score -= b_near.to(tl.int32).to(tl.float32, bitcast=True)
    b_count = tl.minimum(o_row + NEAR // 2, ROWS - 1) - tl.maximum(o_row - NEAR // 2, 0) + 1
    b_score = tl.div_rn(b_score, 2.0 * b_count.to(tl.float32))
    b_bits = tl.where(b_score == b_score, b_score, 1.5).to(tl.int32, bitcast=True)
    b_bits = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    first = sinks + i_contest * ROWS
    b_x = _sort((b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - (first + o_row)).to(tl.int64), LOG_ROWS)
    tl.debug_barrier()
    tl.store(p_newcomers + o_row, b_x)


@jit(general="contests group")
def _best_kernel(
    p_best, p_newcomers, contests, group, LOG_ROWS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """The best ``2**LOG`` rows of a complete group of contests, ascending: one program per (group, head)."""
    i_group, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_newcomers += (i_seq * contests + i_group * group) << LOG_ROWS
    b_x = _absorb(tl.full([1 << LOG], _FREE, tl.int64), p_newcomers, group, LOG, LOG_ROWS)
    o_n = (1 << LOG) - 1 - tl.arange(0, 1 << LOG)
    tl.store(p_best + ((i_seq * tl.num_programs(0) + i_group) << LOG) + o_n, b_x)


@jit(general="sizes")
def _contest_kernel(
    p_index, p_best, p_newcomers, spans, sizes, LOSERS: tl.constexpr, LOG_ROWS: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """``each`` contests of one group: one program per (``each``, head). Places come from ``first`` on among the
    ``length`` rows of a head, the losers before them, if they are wanted."""
    ROWS: tl.constexpr = 1 << LOG_ROWS
    N: tl.constexpr = 1 << LOG
    contests, protected, first, length, group, each, H, sinks = sizes
    i_seq = tl.program_id(1).to(tl.int64)
    p_places = p_index + i_seq * length + first
    begin = tl.program_id(0) * each
    span, held = spans, contests
    if spans is not None:
        span = Spans(spans.order, spans.lead, *numbers_of(spans, i_seq // H))
        held = _contests_of(span, sinks, contests, ROWS)
    if begin >= held:
        return
    i_group = begin // group
    p_newcomers += (i_seq * contests) << LOG_ROWS
    p_best += (i_seq * ((contests - 1) // group)) << LOG
    o_n, o_row = tl.arange(0, N), tl.arange(0, ROWS)
    b_x = tl.where(o_n < N - protected, _BLOCKED, _FREE)
    b_x = _absorb(b_x, p_best, i_group, LOG, LOG)
    b_x = _absorb(b_x, p_newcomers + (i_group * group << LOG_ROWS), begin - i_group * group, LOG, LOG_ROWS)
    for i in range(begin, tl.minimum(begin + each, held)):
        b_new = _load_list(p_newcomers, i, contests, LOG, LOG_ROWS)
        b_worse = tl.max(tl.reshape(tl.minimum(b_x, b_new), [N // ROWS, ROWS]), 0)  # only the last ROWS can lose
        b_x = _merge(tl.maximum(b_x, b_new), LOG, LOG, 1)
        b_row = _rows_of(b_x)
        if span is not None:
            b_row = place_of(span, b_row, o_n >= N - protected)
        tl.store(p_places + i * protected + o_n - (N - protected), b_row, mask=o_n >= N - protected)
        if LOSERS:
            # the losers in position order; places that were never filled sort behind them
            b_loser = _sort(tl.where(b_worse == _FREE, 0x7FFFFFFF, _rows_of(b_worse)), LOG_ROWS)
            before = tl.maximum(i * ROWS - protected, 0)
            leaving = tl.maximum((i + 1) * ROWS - protected, 0) - before
            p_losers = p_places - tl.maximum(contests * ROWS - protected, 0) + before
            if span is not None:
                b_loser = place_of(span, b_loser, o_row < leaving)
            tl.store(p_losers + o_row, b_loser, mask=o_row < leaving)


_PROGRAMS = 2048  # of one warp: more of them than this only repeat each other's work


def compete(
    key: torch.Tensor, value: torch.Tensor, sinks: int, contests: int, protected: int, heads: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compete_reference` with kernels; the places of one contest come in the order of their scores. ``heads``
    int32: which heads of ``key`` and ``value``, None for all."""
    B, H, streamed = key.shape[0], key.shape[1] if heads is None else len(heads), max(0, contests * CONTEST - protected)
    index = torch.empty(B, H, streamed + contests * protected, dtype=torch.int32, device=key.device)
    compete_into(index, key, value, sinks, contests, protected, heads)
    return index[:, :, :streamed], index[:, :, streamed:].unflatten(2, (contests, protected))


def compete_into(
    index: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: int,
    contests: int,
    protected: int,
    heads: torch.Tensor | None,
    spans: Spans | None = None,
) -> None:
    """What :func:`compete` gives into the last rows of ``index`` int32 ``[B, H, ..]``, contiguous: the losers, and
    behind them the places; without room for losers the places alone. With ``spans`` tokens are where these say, the
    index has their places, and what contests a sequence does not have would write stays as it is."""
    require_triton()
    (B, H), D, DV = index.shape[:2], key.shape[3], value.shape[3]
    if not contests:
        return
    first = index.shape[2] - contests * protected
    empty = key.new_empty
    group = next_power_of_two(max(1, math.isqrt(contests // 2)))
    groups = (contests - 1) // group  # that others come after
    span = min(group, next_power_of_two(-(-contests * B * H // _PROGRAMS)))
    logs = dict(LOG_ROWS=CONTEST.bit_length() - 1, LOG=(max(CONTEST, protected) - 1).bit_length())
    warps = 1 << max(0, min(4, logs["LOG"] - 9))
    sums = empty(B, H, contests, D + DV, dtype=torch.float32)
    newcomers = empty(B, H, contests, CONTEST, dtype=torch.int64)
    best = empty(B, H, groups, 1 << logs["LOG"], dtype=torch.int64)
    BD, BDV = (max(16, next_power_of_two(x)) for x in (D, DV))
    BD_sum = min(64, BD, BDV)
    rows, sizes = _Rows(strided(key), strided(value), heads, spans), (H, sinks, contests, group)
    launch(_sum_kernel, (groups + 1, -(-D // BD_sum) + -(-DV // BD_sum), B * H),
        sums, rows, sizes, ROWS=CONTEST, D=D, DV=DV, BD=BD_sum, num_warps=8
    )  # fmt: skip
    launch(_score_kernel, (contests, B * H),
        newcomers, sums, rows, sizes, LOG_ROWS=logs["LOG_ROWS"], NEAR=NEIGHBOURS,
        D=D, DV=DV, BD=BD, BDV=BDV, BN=max(16, min(CONTEST, 4096 // max(BD, BDV))), num_warps=4,
    )  # fmt: skip
    if groups:
        launch(_best_kernel, (groups, B * H), best, newcomers, contests, group, **logs, num_warps=warps)
    launch(_contest_kernel, (-(-contests // span), B * H),
        index, best, newcomers, spans, (contests, protected, first, index.shape[2], group, span, H, sinks),
        LOSERS=first >= max(1, contests * CONTEST - protected), **logs, num_warps=warps,
    )  # fmt: skip
