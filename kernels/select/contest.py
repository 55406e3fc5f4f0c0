"""Protected rows: the most distinctive rows outside the window compete for places that are held exactly.

Thinning keeps one of every ``w`` rows, so it forgets what a single row says. A row that leaves the window gets a
score once and for all, minus the cosine similarity of its key to the running mean key of its head; rows arrive in
contests of ``CONTEST`` rows, the best ``protected`` of the places and the newcomers stay, and the losers go on to
be thinned, in position order. Query-blind and causal. (Not in the Express paper; KeyDiff, arXiv 2504.15364, scores
keys this way.)

Scores follow from keys and sinks alone, so heads with other numbers of places or of contests share them
(:func:`compete_kinds_into`), among them query heads of one KV head.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..launch import (
    constant,
    constexpr,
    head_of,
    jit,
    launch,
    next_power_of_two,
    require_triton,
    sequence,
    strided,
    tl,
    wait_for,
)
from ..spans import Spans, numbers_of, place_of

CONTEST = 256  # rows that compete for the protected places at a time
_LOG_ROWS = CONTEST.bit_length() - 1


def distinctiveness(key: torch.Tensor, key_sum: torch.Tensor, count: int) -> torch.Tensor:
    """Scores ``[B, H, C]`` of rows that leave the window: minus the cosine similarity to the running mean key.

    ``key`` ``[B, H, C, D]``, ``key_sum`` ``[B, H, D]`` the sum of the ``count`` keys that left so far.
    """
    return -torch.cosine_similarity(key.to(key_sum), (key_sum / count)[:, :, None], dim=-1)


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
    key: torch.Tensor, sinks: int, contests: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All contests of a prefill: ``key`` ``[B, H, L, D]``, the rows from ``sinks`` on in position order.

    Returns the losers in the order in which they leave, int32 ``[B, H, max(0, contests * CONTEST - protected)]``,
    and the places after every contest, int32 ``[B, H, contests, protected]`` (0 where a place is still free).
    """
    B, H = key.shape[:2]
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    key_sum = key[:, :, :sinks].to(dtype).sum(2)
    places = torch.empty(B, H, 0, dtype=torch.int32, device=key.device)
    scores = torch.empty(B, H, 0, dtype=dtype, device=key.device)
    streamed = [places]
    history = torch.zeros(B, H, contests, protected, dtype=torch.int32, device=key.device)
    for i in range(contests):
        first = sinks + i * CONTEST
        rows = torch.arange(first, first + CONTEST, dtype=torch.int32, device=key.device).expand(B, H, CONTEST)
        keys = key[:, :, first : first + CONTEST]
        key_sum = key_sum + keys.to(dtype).sum(2)
        new_scores = distinctiveness(keys, key_sum, first + CONTEST)
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


# The keys of all heads, which of these compete, None for all, and where the tokens are.
_Keys = namedtuple("_Keys", "rows heads spans")


@jit
def _contests_of(span, sinks, contests, ROWS: tl.constexpr):
    """How many of the contests a sequence has."""
    return tl.minimum(contests, tl.maximum(span.length - sinks, 0) // ROWS)


@jit
def _load_keys(p_k, first, end, stride_n, o_d, span, BN: tl.constexpr, D: tl.constexpr):
    o_n = first + tl.arange(0, BN)
    mask = (o_n < end)[:, None] & (o_d < D)[None, :]
    if span is not None:
        o_n = place_of(span, o_n, o_n < end)
    return tl.load(p_k + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=mask, other=0.0)  # [BN, BD]


@jit
def _clear(p, n, i_program, programs, BLOCK: tl.constexpr):
    """The part of one program in ``n`` zeros. Behind a loop of its own a kernel has lost what is 1 in nested tuples."""
    for first in range(i_program * BLOCK, n, programs * BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        tl.store(p + o_n, tl.zeros([BLOCK], tl.int64), mask=o_n < n)


@jit(general="sizes zeros")
def _sum_kernel(p_sums, p_zeros, zeros, k, sizes, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Sum of the keys from the start of a group to the end of each contest: a program per (group, BD channels, head).

    The first group starts with the sinks. And ``zeros`` of them, for what counts behind.
    """
    i_group, i_d, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_program = (tl.program_id(2) * tl.num_programs(1) + i_d) * tl.num_programs(0) + i_group
    _clear(p_zeros, zeros, i_program, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2), ROWS)
    H, sinks, contests, group = sizes
    span, held = k.spans, contests
    if k.spans is not None:
        span = Spans(k.spans.order, k.spans.lead, *numbers_of(k.spans, i_seq // H))
        held = _contests_of(span, sinks, contests, ROWS)
    if i_group * group >= held:
        return
    p_k, stride_n = sequence(k.rows, i_seq // H, head_of(k.heads, i_seq % H))
    o_d = i_d * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    if i_group == 0:
        for first in range(0, sinks, ROWS):
            b_sum += tl.sum(_load_keys(p_k, first, sinks, stride_n, o_d, span, ROWS, D).to(tl.float32), 0)
    begin, end = i_group * group, tl.minimum(i_group * group + group, held)
    end_row = sinks + end * ROWS
    b_next = _load_keys(p_k, sinks + begin * ROWS, end_row, stride_n, o_d, span, ROWS, D)
    for i in range(begin, end):
        b_k = b_next
        b_next = _load_keys(p_k, sinks + (i + 1) * ROWS, end_row, stride_n, o_d, span, ROWS, D)
        b_sum += tl.sum(b_k.to(tl.float32), 0)
        tl.store(p_sums + (i_seq * contests + i) * D + o_d, b_sum, mask=o_d < D)


@jit(general="sizes")
def _score_kernel(
    p_newcomers, p_sums, k, sizes, LOG_ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """The rows of one contest, scored and sorted, ascending: one program per (contest, head)."""
    i_contest, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H, sinks, contests, group = sizes
    ROWS: tl.constexpr = 1 << LOG_ROWS
    BG: tl.constexpr = 16
    span, held = k.spans, contests
    if k.spans is not None:
        span = Spans(k.spans.order, k.spans.lead, *numbers_of(k.spans, i_seq // H))
        held = _contests_of(span, sinks, contests, ROWS)
    if i_contest >= held:
        return
    first = sinks + i_contest * ROWS
    end = first + ROWS
    p_k, stride_n = sequence(k.rows, i_seq // H, head_of(k.heads, i_seq % H))
    p_sums += i_seq * contests * D
    p_newcomers += (i_seq * contests + i_contest) * ROWS
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    b_next = _load_keys(p_k, first, end, stride_n, o_d, span, BN, D)
    b_mean = tl.load(p_sums + i_contest * D + o_d, mask=o_d < D, other=0.0)
    for i_group in range(0, i_contest // group, BG):
        o_g = i_group + tl.arange(0, BG)
        mask = (o_g < i_contest // group)[:, None] & (o_d < D)[None, :]
        b_mean += tl.sum(tl.load(p_sums + ((o_g + 1) * group - 1)[:, None] * D + o_d[None, :], mask=mask, other=0.0), 0)
    b_mean /= end
    for row in range(0, ROWS, BN):
        b_k = b_next.to(tl.float32)
        b_next = _load_keys(p_k, first + row + BN, end, stride_n, o_d, span, BN, D)  # arrives while this tile is scored
        b_dot = tl.sum(b_k * b_mean[None, :], 1).to(tl.int32, bitcast=True)
        b_k2 = tl.sum(b_k * b_k, 1).to(tl.int32, bitcast=True)
        # through memory: sums over channels leave every row in many threads, and all of them would sort
        tl.store(p_newcomers + row + o_n, (b_dot.to(tl.int64) << 32) | b_k2.to(tl.int64))
    tl.debug_barrier()
    o_row = tl.arange(0, ROWS)
    b_x = tl.load(p_newcomers + o_row)
    b_dot = (b_x >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    b_k2 = b_x.to(tl.int32).to(tl.float32, bitcast=True)
    # exact rounding keeps equal scores equal; 0 - x because -x could be -0, whose bits are not those of 0
    b_norm = tl.maximum(tl.sqrt_rn(b_k2), 1e-8) * tl.maximum(tl.sqrt_rn(tl.sum(b_mean * b_mean)), 1e-8)
    b_score = 0.0 - tl.div_rn(b_dot, b_norm)
    b_bits = tl.where(b_score == b_score, b_score, 1.5).to(tl.int32, bitcast=True)
    b_bits = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    b_x = _sort((b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - (first + o_row)).to(tl.int64), LOG_ROWS)
    tl.debug_barrier()
    tl.store(p_newcomers + o_row, b_x)


# The index that is written, the best rows of groups, the rows of contests of H heads, lines of kinds, and tickets and
# arrivals.
_Rows = namedtuple("_Rows", "index best newcomers table sync")
# Of a launch: of how many contests and heads there are rows, and which ticket is drawn.
_Sizes = namedtuple("_Sizes", "contests group H sinks ticket")
# columns of a line, of a kind: programs, in all and of a head; contests of a program, 0: it finds the best rows of a
# group; contests, complete groups that others come after, and protected rows; heads, and where in the table is which of
# those with rows they are; rows of a head in the index, and where its first places are; its best rows, in contests, and
# its arrivals
(
    PROGRAMS, OF_HEAD, EACH, CONTESTS, GROUPS, PROTECTED, HEADS, NUMBERS, LENGTH, PLACES, BEST, ARRIVALS, COLUMNS
) = map(constexpr, range(13))  # fmt: skip


@jit
def _line_of(p_line, ticket):
    """The line that has a ticket, from the first line on, and which of its programs that is."""
    while ticket >= tl.load(p_line + PROGRAMS):
        ticket -= tl.load(p_line + PROGRAMS)
        p_line += COLUMNS
    return p_line, ticket


@jit(general="sizes")
def _contest_kernel(rows, spans, sizes, LOSERS: tl.constexpr, LOG: tl.constexpr, LOG_ROWS: tl.constexpr):
    """First the best ``2**LOG`` rows of every complete group, a program for each; then ``EACH`` contests of one group a
    program, which waits for those of its head; of all kinds. By ticket: no program waits for one that has not begun."""
    p_line, i_program = _line_of(rows.table, tl.atomic_add(rows.sync + sizes.ticket, 1))
    programs = tl.load(p_line + OF_HEAD)
    which = (i_program % programs).to(tl.int32), i_program // programs
    if tl.load(p_line + EACH) == 0:
        _best(rows, which, p_line, sizes, LOG_ROWS, LOG)
    else:
        _contest(rows, which, spans, p_line, sizes, LOSERS, LOG_ROWS, LOG)


@jit
def _newcomers_of(rows, i_seq, p_line, sizes, LOG_ROWS: tl.constexpr):
    """Where those of a head of a kind begin."""
    H = tl.load(p_line + HEADS)
    i_seq = i_seq // H * sizes.H + tl.load(rows.table + tl.load(p_line + NUMBERS) + i_seq % H)
    return rows.newcomers + ((i_seq * sizes.contests) << LOG_ROWS)


@jit
def _best_of(rows, i_seq, p_line, LOG_ROWS: tl.constexpr, LOG: tl.constexpr):
    """Where those of the groups of a head of a kind begin."""
    return rows.best + (tl.load(p_line + BEST) << LOG_ROWS) + ((i_seq * tl.load(p_line + GROUPS)) << LOG)


@jit
def _best(rows, which, p_line, sizes, LOG_ROWS: tl.constexpr, LOG: tl.constexpr):
    """The best ``2**LOG`` rows of a group, ascending."""
    i_group, i_seq = which
    p_newcomers = _newcomers_of(rows, i_seq, p_line, sizes, LOG_ROWS) + ((i_group * sizes.group) << LOG_ROWS)
    b_x = _absorb(tl.full([1 << LOG], _FREE, tl.int64), p_newcomers, sizes.group, LOG, LOG_ROWS)
    o_n = (1 << LOG) - 1 - tl.arange(0, 1 << LOG)
    tl.store(_best_of(rows, i_seq, p_line, LOG_ROWS, LOG) + (i_group << LOG) + o_n, b_x)
    tl.debug_barrier()
    tl.atomic_add(rows.sync + tl.load(p_line + ARRIVALS) + i_seq, 1, sem="release")


@jit
def _contest(rows, which, spans, p_line, sizes, LOSERS: tl.constexpr, LOG_ROWS: tl.constexpr, LOG: tl.constexpr):
    """The contests of a group from one on. The losers come before the places, if they are wanted."""
    ROWS: tl.constexpr = 1 << LOG_ROWS
    N: tl.constexpr = 1 << LOG
    i_program, i_seq = which
    each, group = tl.load(p_line + EACH).to(tl.int32), sizes.group
    contests, protected = tl.load(p_line + CONTESTS).to(tl.int32), tl.load(p_line + PROTECTED).to(tl.int32)
    begin = i_program * each
    span, held = spans, contests
    if spans is not None:
        span = Spans(spans.order, spans.lead, *numbers_of(spans, i_seq // tl.load(p_line + HEADS)))
        held = _contests_of(span, sizes.sinks, contests, ROWS)
    if begin < held:
        wait_for(rows.sync + tl.load(p_line + ARRIVALS) + i_seq, tl.where(begin < group, 0, tl.load(p_line + GROUPS)))
        p_places = rows.index + tl.load(p_line + PLACES) + i_seq * tl.load(p_line + LENGTH)
        i_group = begin // group
        p_newcomers = _newcomers_of(rows, i_seq, p_line, sizes, LOG_ROWS)
        p_best = _best_of(rows, i_seq, p_line, LOG_ROWS, LOG)
        o_n, o_row = tl.arange(0, N), tl.arange(0, ROWS)
        b_x = tl.where(o_n < N - protected, _BLOCKED, _FREE)
        b_x = _absorb(b_x, p_best, i_group, LOG, LOG)
        b_x = _absorb(b_x, p_newcomers + (i_group * group << LOG_ROWS), begin - i_group * group, LOG, LOG_ROWS)
        for i in range(begin, tl.minimum(begin + each, held)):
            b_new = _load_list(p_newcomers, i, i + 1, LOG, LOG_ROWS)
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


class Contestants(NamedTuple):
    """A kind of heads: KV heads with equally many ``contests``, of the rows behind ``sinks`` tokens, for equally many
    ``protected`` places. ``begin``: where in a flat index theirs is, ``[B, heads, index_rows]``."""

    heads: tuple[int, ...]
    sinks: int
    contests: int
    protected: int
    index_rows: int
    begin: int

    @property
    def group(self) -> int:
        """Contests of a group, whose keys are added up by themselves: what the bits of scores follow from."""
        return next_power_of_two(max(1, math.isqrt(self.contests // 2)))

    @property
    def log(self) -> int:
        """Of the entries that a program sorts."""
        return (max(CONTEST, self.protected) - 1).bit_length()

    @property
    def first_places(self) -> int:
        """Where places begin among the ``index_rows`` of a head."""
        return self.index_rows - self.contests * self.protected

    @property
    def constants(self) -> tuple[bool, int]:
        """Whether losers are wanted, and ``log``: kinds for which they are the same compete in one launch."""
        return self.first_places >= max(1, self.contests * CONTEST - self.protected), self.log


class _Scored(NamedTuple):
    """Kinds whose rows have the same scores; int32 ``heads``, of all of them, None for all of the layer."""

    kinds: tuple[Contestants, ...]
    heads: torch.Tensor | None


def _alike(kinds: Iterable[Contestants]) -> list[tuple[Contestants, ...]]:
    """Those with contests, by what their scores follow from."""
    members: dict[tuple[int, int], list[Contestants]] = {}
    for kind in kinds:
        if kind.contests:
            members.setdefault((kind.sinks, kind.group), []).append(kind)
    return [tuple(own) for own in members.values()]


def _heads(kinds: Iterable[Contestants]) -> list[int]:
    """Those of all ``kinds``, each once."""
    return list(dict.fromkeys(head for kind in kinds for head in kind.heads))


@functools.lru_cache(maxsize=1024)
def _scored(kinds: tuple[Contestants, ...], H_kv: int, device: torch.device) -> tuple[_Scored, ...]:
    found = []
    for own in _alike(kinds):
        heads = _heads(own)
        every = heads == list(range(H_kv))
        found.append(_Scored(own, None if every else constant(np.array(heads, np.int32), device)))
    return tuple(found)


def saved_together(kinds: Sequence[Contestants]) -> tuple[int, int]:
    """What :func:`compete_kinds_into` does without that each of ``kinds`` would do alone: launches, and of all heads
    contests whose keys are read."""
    launches, contests = 3 * len(kinds), 0
    for own in _alike(kinds):
        launches -= 2 + len({kind.constants for kind in own})
        contests += sum(len(kind.heads) * kind.contests for kind in own)
        contests -= len(_heads(own)) * max(kind.contests for kind in own)
    return launches, contests


def compete(
    key: torch.Tensor, sinks: int, contests: int, protected: int, heads: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compete_reference` with kernels; the places of one contest come in the order of their scores. ``heads``
    int32: which heads of ``key``, None for all."""
    B, H, streamed = key.shape[0], key.shape[1] if heads is None else len(heads), max(0, contests * CONTEST - protected)
    index = torch.empty(B, H, streamed + contests * protected, dtype=torch.int32, device=key.device)
    compete_into(index, key, sinks, contests, protected, heads)
    return index[:, :, :streamed], index[:, :, streamed:].unflatten(2, (contests, protected))


def compete_into(
    index: torch.Tensor,
    key: torch.Tensor,
    sinks: int,
    contests: int,
    protected: int,
    heads: torch.Tensor | None,
    spans: Spans | None = None,
    zeros: int = 0,
) -> torch.Tensor | None:
    """What :func:`compete` gives into the last rows of ``index`` int32 ``[B, H, ..]``, contiguous: the losers, and
    behind them the places; without room for losers the places alone. With ``spans`` tokens are where these say, the
    index has their places, and what contests a sequence does not have would write stays as it is. Gives that many
    ``zeros``, int64, which cost no launch here; None where there is no contest."""
    kind = Contestants(tuple(range(index.shape[1])), sinks, contests, protected, index.shape[2], 0)
    return _run(index, key, _Scored((kind,), heads), spans, zeros) if contests else None


def compete_kinds_into(
    index: torch.Tensor, key: torch.Tensor, kinds: tuple[Contestants, ...], zeros: int = 0
) -> torch.Tensor | None:
    """:func:`compete_into` of all ``kinds``, into a flat index: what each would get alone, bit for bit. Rows whose
    scores are the same are scored once, and kinds with the same constants compete side by side."""
    found = None
    for scored in _scored(kinds, key.shape[1], key.device):
        made = _run(index, key, scored, None, zeros if found is None else 0)
        found = made if found is None else found
    return found


class _Series(NamedTuple):
    """A launch of contests: its programs, int64 lines and numbers of heads, and constants."""

    programs: int
    table: torch.Tensor
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _series(kinds: tuple[Contestants, ...], B: int, most: int, device: torch.device) -> tuple[list[_Series], int, int]:
    """One for all kinds with the same constants, of up to ``most`` programs unless groups are smaller; how many lists
    of the best rows there are, in contests, and tickets and arrivals."""
    heads, by_constants = _heads(kinds), dict[tuple[bool, int], list[Contestants]]()
    for x in kinds:
        by_constants.setdefault(x.constants, []).append(x)
    found, best, sync = [], 0, len(by_constants)
    for (losers, log), beside in by_constants.items():
        each = next_power_of_two(-(-sum(x.contests * B * len(x.heads) for x in beside) // most))
        each = min(kinds[0].group, each)
        of_groups, of_contests, numbers = [], [], list[int]()
        for x in beside:
            H, groups, programs = len(x.heads), (x.contests - 1) // x.group, -(-x.contests // each)
            own = (
                x.contests, groups, x.protected, H, 2 * len(beside) * int(COLUMNS) + len(numbers),
                x.index_rows, x.begin + x.first_places, best, sync,
            )  # fmt: skip
            of_groups.append((B * H * groups, groups, 0, *own))
            of_contests.append((B * H * programs, programs, each, *own))
            numbers += map(heads.index, x.heads)
            best, sync = best + (B * H * groups << log - _LOG_ROWS), sync + B * H
        lines = np.array(of_groups + of_contests, np.int64)
        table = constant(np.append(lines, np.array(numbers, np.int64)), device)
        constants = dict(LOSERS=losers, LOG=log, LOG_ROWS=_LOG_ROWS, num_warps=1 << max(0, min(4, log - 9)))
        found.append(_Series(int(lines[:, 0].sum()), table, constants))
    return found, best, sync


def _run(
    index: torch.Tensor, key: torch.Tensor, scored: _Scored, spans: Spans | None, zeros: int
) -> torch.Tensor | None:
    require_triton()
    kinds, heads = scored
    B, H, D, empty = len(key), key.shape[1] if heads is None else len(heads), key.shape[3], key.new_empty
    contests, sinks, group = max(x.contests for x in kinds), kinds[0].sinks, kinds[0].group
    series, best, own = _series(kinds, B, _PROGRAMS, key.device)
    sums = empty(B, H, contests, D, dtype=torch.float32)
    newcomers = empty(B, H, contests, CONTEST, dtype=torch.int64)
    sync = empty(own + own % 2 + zeros, dtype=torch.int64)
    best_rows = empty(best, CONTEST, dtype=torch.int64)
    BD = max(16, next_power_of_two(D))
    BD_sum = min(64, BD)
    keys, sizes = _Keys(strided(key), heads, spans), (H, sinks, contests, group)
    launch(_sum_kernel, ((contests - 1) // group + 1, -(-D // BD_sum), B * H),
        sums, sync, len(sync), keys, sizes, ROWS=CONTEST, D=D, BD=BD_sum, num_warps=8
    )  # fmt: skip
    launch(_score_kernel, (contests, B * H),
        newcomers, sums, keys, sizes,
        LOG_ROWS=_LOG_ROWS, D=D, BD=BD, BN=max(16, min(CONTEST, 8192 // BD)), num_warps=4,
    )  # fmt: skip
    for ticket, (programs, table, constants) in enumerate(series):
        launch(_contest_kernel, (programs,),
            _Rows(index, best_rows, newcomers, table, sync), spans, _Sizes(contests, group, H, sinks, ticket),
            **constants,
        )  # fmt: skip
    return sync[own + own % 2 :] if zeros else None
