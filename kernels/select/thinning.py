"""All halvings of a schedule in one launch: which rows are kept, and copies of them side by side.

The definition of correct is ``halving.halve_reference`` applied job by job (``express.thin_reference``). Here
every job of a :class:`Schedule` is cut into *tiles* of ``2 * PAIRS`` rows; programs stay on the device and draw
tiles by ticket until none is left, so that the serial chain never waits for a launch:

* Tickets are handed out in the order of a simulated list schedule, longest remaining chain first. A program only
  waits for tiles with earlier tickets (those that wrote its rows, earlier tiles of its bucket), so that every
  wait ends whatever else runs on the device.
* Buckets of fewer rows than a tile share one: their kernel matrices are the blocks on its diagonal.
* A tile first computes its own block of D and the block that couples it to the tile before, then what the tiles
  before those decided enters through g(x) = sum_r sigma_r kappa(x_r, x). Nothing of size m**2 is stored.
* The walk itself holds one pair per lane and repeats the state in every warp, so that a step costs one shuffle.
  A tile hands on its signs and the largest b so far as one 64-bit word: the flag is the message.
* Kept rows are copied to where their neighbours are (read by many blocks of queries, and by the next halving).
  With them go their mean, their largest distance from it and their largest |v|. From these the program that
  completes a bucket of several tiles computes its centre and v_max exactly, and for the shift inside ``exp`` the
  bound max_t (|mean_t - centre| + radius_t)**2 in place of the largest |k - centre|**2: the rules are scale-free,
  so that only underflow could tell.

Needs a GPU with 64-bit atomics, or Triton's interpreter. Supports float16, bfloat16 and float32 and any head
sizes that fit in shared memory (256 on an H200). Work O(d s log s) per kept row, memory O(rows kept).
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch

from ..launch import (
    Random,
    Widths,
    constant,
    constexpr,
    draw_uniform,
    head_of,
    jit,
    launch,
    load_rows,
    processors,
    require_triton,
    sequence,
    strided,
    tl,
    wait_for,
)
from ..spans import Spans, numbers_of, place_of
from .halving import Decider, HalvingRule
from .schedule import Halving, Schedule

PAIRS = 32  # pairs walked per tile
WARPS = 4
PROGRAMS = 2  # per multiprocessor

# columns of the table of tiles
(
    SOURCE, TARGET, ROWS, BLOCK, VALID, STAGE, BUCKET, GROUP,  # what to halve; ROWS = 0: pick one row per GROUP
    UNIT, NEED, WORD,  # what has to arrive before it can start; where its signs go
    FEEDS, FEEDERS, SLOT, FIRST_SLOT, SLOTS, FED_ROWS,  # which unit its rows go to, and the statistics of that
    REACH,  # rows of the stream that its first bucket or group comes from, counted from the first one
    COLUMNS,
) = (constexpr(i) for i in range(19))  # fmt: skip


class Tiles:
    """The tiles of a schedule, ``pairs`` pairs each.

    A *unit* is what can start at once: a bucket of several tiles, or a tile of whole buckets. ``table`` int32
    ``[tiles, COLUMNS]`` in the order of tickets for ``lanes`` programs per sequence, ``gains`` float32 ``[tiles]``
    beside it. ``described`` is the same kind of table for the stream rows that buckets of several tiles read as
    they are. ``buckets`` counts those buckets, ``slots`` the places for statistics of ``pairs`` rows each.
    """

    def __init__(self, schedule: Schedule, rule: HalvingRule, pairs: int, lanes: int) -> None:
        self.pairs, tokens = pairs, schedule.tokens
        halvings = [job for launch in schedule.launches for job in launch]
        self._number_units(halvings, tokens)
        none = np.zeros((0, int(COLUMNS)), dtype=np.int64)
        described = [self._picks(j.source, -1, j.rows * j.buckets, 1, 0) for j in halvings
                     if j.source < tokens and j.rows > 2 * pairs]  # fmt: skip
        picked = [self._picks(j.source, j.target, j.rows, j.group, j.stage) for j in schedule.subsamples]
        halved = [self._halves(job) for job in halvings]
        gains = [np.full(len(x), rule.gain(j.rows, j.delta)) for j, x in zip(halvings, halved, strict=True)]
        table, raw = np.concatenate([none, *picked, *halved]), np.concatenate([none, *described])
        gain = np.concatenate([np.zeros(sum(map(len, picked))), *gains])
        table[:, WORD] = np.arange(len(table))
        feeds = np.concatenate([table[:, FEEDS], raw[:, FEEDS]])
        arrivals = np.bincount(feeds[feeds >= 0], minlength=self.units)
        for x in (table, raw):
            x[:, FEEDERS] = np.where(x[:, FEEDS] >= 0, arrivals[x[:, FEEDS]], 0)
        # the statistics of a bucket of several tiles are one more arrival; those of stream rows came with a launch
        need = arrivals + (np.arange(self.units) < self.buckets)
        ready = (table[:, ROWS] == 0) | (table[:, SOURCE] < tokens)
        table[:, NEED] = np.where(ready, 0, need[table[:, UNIT]])
        table[:, REACH] = _reach(schedule)[table[:, TARGET]]
        order = _ticket_order(table, self.units, lanes)
        self.table, self.gains = table[order].astype(np.int32), gain[order].astype(np.float32)
        self.described = raw.astype(np.int32)

    def _number_units(self, halvings: list[Halving], tokens: int) -> None:
        """What every halving reads: (first row, rows, rows per unit, first unit, first slot or -1)."""
        self.ranges: list[tuple[int, int, int, int, int]] = []
        self.buckets = self.slots = 0
        span = 2 * self.pairs
        for job in halvings:
            if job.rows > span:
                alone = job.buckets == 1 and job.source < tokens
                assert alone or job.rows % span == 0, "a place for statistics is that of a whole tile"
                self.ranges.append((job.source, job.rows * job.buckets, job.rows, self.buckets, self.slots))
                self.buckets += job.buckets
                self.slots += -(-job.rows // self.pairs) * job.buckets
        self.units = self.buckets
        for job in halvings:
            if job.rows <= span:
                rows = span // job.rows * job.rows
                self.ranges.append((job.source, job.rows * job.buckets, rows, self.units, -1))
                self.units += -(-job.rows * job.buckets // rows)
        # no row is read by two; in front of all stands one of no rows
        ordered = [(-1, 0, 1, 0, -1), *sorted(self.ranges)]
        self._sorted_ranges = np.array(ordered, dtype=np.int64).T

    def _units_of(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Unit that reads each arena row (-1: none), its slot, and the first slot and rows of its bucket."""
        which = np.searchsorted(self._sorted_ranges[0], at, "right") - 1
        source, total, size, base, slots = self._sorted_ranges[:, which]
        inside = (at >= source) & (at < source + total)
        which, within = np.divmod(at - source, size)
        first = np.where(inside & (slots >= 0), slots + which * -(-size // self.pairs), 0)
        slot = np.where(inside & (slots >= 0), first + within // self.pairs, -1)
        return np.where(inside, base + which, -1), slot, first, np.where(inside & (slots >= 0), size, 0)

    def _part(self, columns: dict[Any, np.ndarray | int], count: int, fed_from: np.ndarray) -> np.ndarray:
        table = np.zeros((count, int(COLUMNS)), dtype=np.int64)
        for column, values in columns.items():
            table[:, column] = values
        table[:, FEEDS], table[:, SLOT], table[:, FIRST_SLOT], table[:, FED_ROWS] = self._units_of(fed_from)
        table[:, SLOTS] = -(-table[:, FED_ROWS] // self.pairs)
        return table

    def _picks(self, source: int, target: int, rows: int, group: int, stage: int) -> np.ndarray:
        """One row of every group."""
        first = np.arange(0, rows, self.pairs)
        columns = {
            SOURCE: source + first * group, TARGET: -1 if target < 0 else target + first, BUCKET: first,
            GROUP: group, STAGE: stage, VALID: np.minimum(self.pairs, rows - first), UNIT: -1,
        }  # fmt: skip
        return self._part(columns, len(first), first + (source if target < 0 else target))

    def _halves(self, job: Halving) -> np.ndarray:
        pairs, span, half = self.pairs, 2 * self.pairs, job.rows // 2
        if job.rows > span:
            bucket, block = np.divmod(np.arange(job.buckets * -(-job.rows // span)), -(-job.rows // span))
            valid = np.minimum(pairs, half - block * pairs)
        else:
            bucket = np.arange(0, job.buckets, span // job.rows)
            block, valid = 0 * bucket, np.minimum(span // job.rows, job.buckets - bucket) * half
        source = job.source + bucket * job.rows + block * span
        target = job.target + bucket * half + block * pairs
        columns = {
            SOURCE: source, TARGET: target, ROWS: job.rows, BLOCK: block, VALID: valid, STAGE: job.stage,
            BUCKET: job.first + bucket, UNIT: self._units_of(source)[0],
        }  # fmt: skip
        table, last = self._part(columns, len(bucket), target), self._units_of(target + valid - 1)[0]
        assert np.all((last == table[:, FEEDS]) | (last < 0)), "what a tile keeps goes to one unit"
        return table


def _reach(schedule: Schedule) -> np.ndarray:
    """How many rows of the stream, from the first one on, every arena row is chosen from: int64 ``[size]``."""
    reach = np.zeros(schedule.size, np.int64)
    reach[: schedule.tokens] = np.arange(1, schedule.tokens + 1)
    for pick in schedule.subsamples:
        reach[pick.target : pick.target + pick.rows] = pick.source + pick.group * np.arange(1, pick.rows + 1)
    for job in itertools.chain(*schedule.launches):
        rows = reach[job.source : job.source + job.rows * job.buckets].reshape(job.buckets, job.rows)
        reach[job.target : job.target + job.rows * job.buckets // 2] = rows.max(1).repeat(job.rows // 2)
    return reach


# roughly what a tile costs on an H200, in microseconds: before its walk, per earlier tile, walk, and after it; a
# replay with the costs of a profile (6.5, 3.3, 2.8, 4.2, 6) gives the same total within 1%
_BEFORE, _EARLIER, _WALK, _AFTER, _STATISTICS = 6.0, 2.2, 2.5, 3.0, 6.0


def _ticket_order(table: np.ndarray, units: int, lanes: int) -> np.ndarray:
    """Tiles in the order in which a list schedule on ``lanes`` programs starts them: int64 ``[tiles]``.

    Of the tiles that could start now, the one with the longest chain behind it goes first. Any order in which a
    tile comes after those that it waits for is correct; this one is quick.
    """
    block, unit, feeds, many = (table[:, c].tolist() for c in (BLOCK, UNIT, FEEDS, SLOTS))
    tiles = len(table)
    following = [i + 1 if i + 1 < tiles and block[i + 1] == block[i] + 1 else -1 for i in range(tiles)]
    chain, unit_chain, first_tile, missing = [0.0] * tiles, [0.0] * units, [-1] * units, [0] * units
    for i in range(tiles - 1, -1, -1):
        after = _AFTER
        if feeds[i] >= 0:
            missing[feeds[i]] += 1
            after += unit_chain[feeds[i]] + (_STATISTICS if many[i] else 0.0)
        chain[i] = _WALK + max(after, chain[following[i]] if following[i] >= 0 else 0.0)
        if unit[i] >= 0 and block[i] == 0:
            unit_chain[unit[i]], first_tile[unit[i]] = _BEFORE + chain[i], i
    waiting = [(0.0, i) for i in range(tiles) if block[i] == 0 and (unit[i] < 0 or missing[unit[i]] == 0)]
    heapq.heapify(waiting)
    ready: list[tuple[float, int]] = []
    free, order = [0.0] * lanes, []
    arrived, word = [0.0] * units, [0.0] * tiles
    while waiting or ready:
        now = heapq.heappop(free)
        if not ready:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            i = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-chain[i], i))
        i = heapq.heappop(ready)[1]
        order.append(i)
        before = now + _BEFORE + _EARLIER * block[i]
        word[i] = max(before, word[i - 1] if block[i] else 0.0) + _WALK
        heapq.heappush(free, word[i] + _AFTER)
        if following[i] >= 0:
            heapq.heappush(waiting, (max(now, word[i] - _BEFORE - _EARLIER * block[i + 1]), i + 1))
        if feeds[i] >= 0:
            u = feeds[i]
            missing[u] -= 1
            arrived[u] = max(arrived[u], word[i] + _AFTER + (_STATISTICS if many[i] else 0.0))
            if not missing[u]:
                heapq.heappush(waiting, (arrived[u], first_tile[u]))
    return np.array(order, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------
# Kernels


# The tokens, which heads of them and where they are, and what :func:`thin` writes: the token of every copy, and the
# copies, ``[B * H, A, D]``.
_Inputs = namedtuple("_Inputs", "k v heads spans index copied_key copied_value")


# Scratch memory and the table; :class:`_Places` says what lies where. Of several streams: ``parts`` int64
# ``[parts, FIELDS]``, what differs between them, and ``tickets`` int32 ``[tickets, 3]``, the part, the row of the table
# and the sequence of it. ``walks``: of a part, where the scratch memory of the launch begins, which programs have in
# common for all parts.
_Work = namedtuple("_Work", "scratch sync table gains parts tickets walks", defaults=(None, None, None))


# Of a sequence of n tokens with spans the stream has ``(n - sinks) // step * step - held`` rows. Stages and numbers of
# buckets are counted from ``stage`` and ``first``.
_Sizes = namedtuple(
    "_Sizes", "programs tiles units buckets slots sequences H tokens sinks A index_rows step held stage first"
)


# Of a part ten of the sizes, from ``tiles`` to ``index_rows``, and where it begins in the heads, the index, the copies,
# scratch, in 16 floats, and sync.
FIELDS = constexpr(15)


# Widths, pairs of a tile, and what the rule and the stream are like; W times BP lanes walk.
_Shape = namedtuple("_Shape", "D DV BD BDV BP W CENTRE STREAMED COIN")


@jit
def _await_word(p_word):
    """The word that a tile hands on: never 0."""
    word = tl.load(p_word, volatile=True)
    while word == 0:
        word = tl.load(p_word, volatile=True)
    return word


@jit
def _shortened(b_x):
    """What :func:`.halving.shortened` gives: what tensor cores read of float32, so that products are exact."""
    if b_x.dtype == tl.float32:
        b_x = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_x


# Where the parts of the scratch memory of one sequence begin: statistics of slots and of buckets, arrivals at units
# and words of tiles. In front of them are what the walks keep, and the ticket.
_Places = namedtuple("_Places", "mean spread centre bound count word")


@jit
def _places(work, i_seq, sizes, SHAPE: tl.constexpr):
    sequences, D = sizes.sequences.to(tl.int64), SHAPE.D
    p_mean = work.scratch + sizes.programs.to(tl.int64) * (2 * SHAPE.BP * SHAPE.BP + 4 * SHAPE.BP)
    p_centre = p_mean + sequences * sizes.slots * D
    p_spread = p_centre + sequences * sizes.buckets * D
    p_bound = p_spread + sequences * sizes.slots * 2
    p_count = work.sync + 1
    return _Places(
        p_mean + i_seq * sizes.slots * D, p_spread + i_seq * sizes.slots * 2,
        p_centre + i_seq * sizes.buckets * D, p_bound + i_seq * sizes.buckets * 2,
        p_count + i_seq * sizes.units, p_count + sequences * sizes.units + i_seq * sizes.tiles,
    )  # fmt: skip


# Where a part begins in the memory of a launch.
_Begin = namedtuple("_Begin", "heads index copied_key copied_value scratch sync")


@jit
def _of_part(i_part, x, work, sizes, SHAPE: tl.constexpr):
    """Where a part begins, and its sizes."""
    p, own = work.parts + i_part * FIELDS, ()
    for i in tl.static_range(10):
        own += (tl.load(p + i).to(tl.int32),)  # type: ignore[assignment]
    row, place = tl.load(p + 12), tl.load(p + 13) * 16  # a multiple, so that loads of tiles are wide
    begin = _Begin(
        x.heads + tl.load(p + 10), x.index + tl.load(p + 11), x.copied_key + row * SHAPE.D,
        x.copied_value + row * SHAPE.DV, work.scratch + place, work.sync + tl.load(p + 14),
    )  # fmt: skip
    behind = sizes.step, sizes.held, sizes.stage, sizes.first
    return begin, _Sizes(sizes.programs, *own, *behind)  # type: ignore[call-arg]


@jit
def _ticket(work, ticket):
    """The part, the row of the table, and the sequence."""
    p = work.tickets + ticket * 3
    return tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int64)


@jit
def _describe_bucket(p_row, feeds, at, SHAPE: tl.constexpr):
    """Centre, bound on the norms and largest value of a bucket from the statistics of its slots."""
    BD: tl.constexpr = SHAPE.BD
    BR: tl.constexpr = 2 * SHAPE.BP
    first, slots, rows = tl.load(p_row + FIRST_SLOT), tl.load(p_row + SLOTS), tl.load(p_row + FED_ROWS)
    o_d, o_s = tl.arange(0, BD), tl.arange(0, BR)
    b_centre = tl.zeros([BD], tl.float32)
    radius, v_max = 0.0, 0.0
    if SHAPE.CENTRE:
        for i in range(0, slots, BR):
            b_m = load_rows(at.mean, SHAPE.D, first + i + o_s, i + o_s < slots, SHAPE.D, BD)  # [BR, BD]
            b_weight = tl.minimum(rows - (i + o_s) * SHAPE.BP, SHAPE.BP).to(tl.float32)
            b_centre += tl.sum(b_m * b_weight[:, None], 0)
        b_centre = b_centre / rows
        tl.store(at.centre + feeds * SHAPE.D + o_d, b_centre, mask=o_d < SHAPE.D)
    for i in range(0, slots, BR):
        m_s = i + o_s < slots
        b_m = load_rows(at.mean, SHAPE.D, first + i + o_s, m_s, SHAPE.D, BD) - b_centre[None, :]  # [BR, BD]
        b_reach = tl.sqrt(tl.sum(b_m * b_m, 1)) + tl.load(at.spread + (first + i + o_s) * 2, mask=m_s, other=0.0)
        radius = tl.maximum(radius, tl.max(tl.where(m_s, b_reach, 0.0)))
        b_v_max = tl.load(at.spread + (first + i + o_s) * 2 + 1, mask=m_s, other=0.0)
        v_max = tl.maximum(v_max, tl.max(b_v_max))
    tl.store(at.bound + feeds * 2, radius * radius)
    tl.store(at.bound + feeds * 2 + 1, v_max)


@jit
def _hand_over(p_row, at, b_k, b_v, m_p, valid, SHAPE: tl.constexpr):
    """Describe the rows of a tile, announce them to the unit that reads them, and complete it if they are the last."""
    BD: tl.constexpr = SHAPE.BD
    b_k, b_v = _shortened(b_k), _shortened(b_v)
    feeds, slot = tl.load(p_row + FEEDS), tl.load(p_row + SLOT)
    if slot >= 0:
        o_d = tl.arange(0, BD)
        b_mean = tl.zeros([BD], tl.float32)
        if SHAPE.CENTRE:
            b_mean = tl.sum(b_k.to(tl.float32), 0) / valid
        b_far = tl.where(m_p[:, None], b_k.to(tl.float32) - b_mean[None, :], 0.0)
        tl.store(at.mean + slot * SHAPE.D + o_d, b_mean, mask=o_d < SHAPE.D)
        tl.store(at.spread + slot * 2, tl.sqrt(tl.max(tl.sum(b_far * b_far, 1))))
        tl.store(at.spread + slot * 2 + 1, tl.max(tl.max(tl.abs(b_v.to(tl.float32)), 1)))
    if feeds >= 0:
        tl.debug_barrier()
        arrived = tl.atomic_add(at.count + feeds, 1, sem="acq_rel").to(tl.int32) + 1
        if (slot >= 0) & (arrived == tl.load(p_row + FEEDERS)):
            _describe_bucket(p_row, feeds, at, SHAPE)
            tl.debug_barrier()
            tl.atomic_add(at.count + feeds, 1, sem="release")


# The memory that a tile reads: stream rows among the tokens if ``raw``, by index if ``listed``, all others among the
# copies.
_From = namedtuple("_From", "p_k stride_k p_v stride_v p_index first raw listed span")


@jit
def _rows_at(source, b_at, m_r, SHAPE: tl.constexpr):
    """Where in that memory the arena rows ``b_at`` are."""
    b_row = source.first + b_at
    if SHAPE.STREAMED:
        if source.listed:
            b_row = tl.load(source.p_index + b_at, mask=m_r, other=0)
    elif source.span is not None:
        if source.raw:
            # what is behind the end is the last token again, and nobody's
            b_row = place_of(source.span, tl.minimum(b_row, source.span.length - 1), m_r)
    return b_row


@jit
def _pair(source, b_row, m_r, SHAPE: tl.constexpr):
    """Keys and values of rows of it."""
    b_k = load_rows(source.p_k, source.stride_k, b_row, m_r, SHAPE.D, SHAPE.BD)
    return b_k, load_rows(source.p_v, source.stride_v, b_row, m_r, SHAPE.DV, SHAPE.BDV)


@jit(general="n")
def _zero_kernel(p, n, BLOCK: tl.constexpr):
    """For memory that is zeros an operator of PyTorch takes the host longer than a launch."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p + o_n, tl.zeros([BLOCK], p.dtype.element_ty), mask=o_n < n)


@jit(general="sizes")
def _describe_kernel(x, work, sizes, SHAPE: tl.constexpr):
    if work.parts is None:
        _describe_tile(tl.program_id(0), tl.program_id(1).to(tl.int64), x, work, sizes, SHAPE)
    else:
        i_part, i_row, i_seq = _ticket(work, tl.program_id(0))
        at, own = _of_part(i_part, x, work, sizes, SHAPE)
        part = _Inputs(x.k, x.v, at.heads, None, at.index, at.copied_key, at.copied_value)
        places = _Work(at.scratch, at.sync, work.table, None, work.parts, None)
        _describe_tile(i_row, i_seq, part, places, own, SHAPE)


@jit
def _describe_tile(i_row, i_seq, x, work, sizes, SHAPE: tl.constexpr):
    """Statistics of stream rows that buckets of several tiles read as they are."""
    p_row = work.table + i_row * COLUMNS
    head = head_of(x.heads, i_seq % sizes.H)
    p_k, stride_k = sequence(x.k, i_seq // sizes.H, head)
    p_v, stride_v = sequence(x.v, i_seq // sizes.H, head)
    p_index = x.index + i_seq * sizes.index_rows + sizes.A
    span = x.spans
    if x.spans is not None:
        span = Spans(x.spans.order, x.spans.lead, *numbers_of(x.spans, i_seq // sizes.H))
        if span.length == 0:
            return
    listed = True if work.parts is None else sizes.index_rows > sizes.A
    source = _From(p_k, stride_k, p_v, stride_v, p_index, sizes.sinks, True, listed, span)
    valid, o_p = tl.load(p_row + VALID), tl.arange(0, SHAPE.BP)
    m_p = o_p < valid
    b_k, b_v = _pair(source, _rows_at(source, tl.load(p_row + SOURCE) + o_p, m_p, SHAPE), m_p, SHAPE)
    _hand_over(p_row, _places(work, i_seq, sizes, SHAPE), b_k, b_v, m_p, valid, SHAPE)


# A tile of a halving: its columns of the table; ``i_bucket`` is -1 for whole buckets.
_Tile = namedtuple("_Tile", "source rows block valid bucket stage i_bucket gain scale")


# The rows of a tile ``[BR, BD]``, ``[BR, BDV]``, the bias and the shift of their scores, and where they are.
_Own = namedtuple("_Own", "b_k b_v b_bias b_centre half_norm shift v_max m_r top")


@jit
def _signed_sums(b_kappa, BP: tl.constexpr):
    """D of the pairs ``[BP, BP]`` from the kernel of their rows ``[2 BP, 2 BP]``, with signs."""
    return tl.sum(tl.sum(tl.reshape(b_kappa, [BP, 2, BP, 2]), 3), 1)


@jit
def _own_block(source, at, p_slot, tile, SHAPE: tl.constexpr):
    """D of the pairs of a tile, to ``p_slot``, then the roots b of its diagonal and the largest of them so far."""
    BP: tl.constexpr = SHAPE.BP
    BR: tl.constexpr = 2 * SHAPE.BP
    BD: tl.constexpr = SHAPE.BD
    rows, scale = tile.rows, tile.scale
    o_p, o_r, half = tl.arange(0, BP), tl.arange(0, BR), tile.rows // 2
    m_r = o_r < 2 * tile.valid
    b_k, b_v = _pair(source, _rows_at(source, tile.source + o_r, m_r, SHAPE), m_r, SHAPE)
    b_k, b_v = _shortened(b_k), _shortened(b_v)
    b_centre, half_norm, shift, v_max = tl.zeros([BD], tl.float32), 0.0, 0.0, 0.0
    o_bucket = o_r // rows
    m_same = (o_bucket[:, None] == o_bucket[None, :]) & m_r[:, None] & m_r[None, :]
    b_gram = tl.dot(b_k, tl.trans(b_k), input_precision="tf32")  # [BR, BR]
    if tile.i_bucket < 0:  # whole buckets: all statistics are here
        b_bias = tl.zeros([BR], tl.float32)
        if SHAPE.CENTRE:
            b_mean = tl.sum(tl.where(m_same, b_gram, 0.0), 1) / rows
            b_bias = b_mean - 0.5 * tl.sum(tl.where(m_same, b_mean[None, :], 0.0), 1) / rows
        b_norm = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_gram, 0.0), 1) - 2.0 * b_bias
        b_shift = tl.where(m_r, tl.max(tl.where(m_same, b_norm[None, :], float("-inf")), 1) * scale, 0.0)
        b_v_max = tl.max(tl.abs(b_v.to(tl.float32)), 1)
        b_v_max = tl.max(tl.where(m_same, b_v_max[None, :], 0.0), 1)
    else:
        o_d = tl.arange(0, BD)
        if SHAPE.CENTRE:
            b_centre = tl.load(at.centre + tile.i_bucket * SHAPE.D + o_d, mask=o_d < SHAPE.D, other=0.0)
            half_norm = 0.5 * tl.sum(b_centre * b_centre)
        b_bias = tl.sum(b_k.to(tl.float32) * b_centre[None, :], 1) - half_norm
        p_bound = at.bound + tile.i_bucket * 2
        shift, v_max = tl.load(p_bound) * scale, tl.load(p_bound + 1)
        b_shift, b_v_max = tl.zeros([BR], tl.float32) + shift, tl.zeros([BR], tl.float32) + v_max
    b_alternating = (1 - 2 * (o_r % 2)).to(tl.float32)  # + for the first row of a pair, - for the second
    # at most 0 but for rounding, which an outlier key could blow up
    b_s = tl.minimum((b_gram - b_bias[:, None] - b_bias[None, :]) * scale - b_shift[:, None], 0.0)
    b_kappa = tl.exp(b_s)
    b_kappa *= tl.dot(b_v, tl.trans(b_v), input_precision="tf32") + (b_v_max * b_v_max)[:, None]
    b_kappa = tl.where(m_same, b_kappa * b_alternating[:, None] * b_alternating[None, :], 0.0)
    b_d = _signed_sums(b_kappa, BP)
    tl.store(p_slot + o_p[:, None] * BP + o_p[None, :], tl.where(o_p[:, None] < o_p[None, :], b_d, 0.0))
    b_b = tl.sqrt(tl.maximum(tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_d, 0.0), 1), 0.0))
    m_before = ((o_p // half)[:, None] == (o_p // half)[None, :]) & (o_p[None, :] <= o_p[:, None])
    b_top = tl.max(tl.where(m_before, b_b[None, :], 0.0), 1)
    own_top = tl.max(b_b)
    tl.store(p_slot + 2 * BP * BP + o_p, b_b)
    tl.store(p_slot + 2 * BP * BP + BP + o_p, b_top)
    return _Own(b_k, b_v, b_bias, b_centre, half_norm, shift, v_max, m_r, own_top)


@jit
def _earlier_tiles(source, p_slot, p_word, tile, own, SHAPE: tl.constexpr):
    """What the earlier tiles of the bucket have decided, as alphas, behind b; of the last one the block of D as well,
    as its signs come last."""
    BP: tl.constexpr = SHAPE.BP
    BR: tl.constexpr = 2 * SHAPE.BP
    o_p, o_r, block = tl.arange(0, BP), tl.arange(0, BR), tile.block
    b_alternating = (1 - 2 * (o_r % 2)).to(tl.float32)
    b_g = tl.zeros([BR], tl.float32)
    for i in range(0, block):
        # the tile before this one first: its block is stored
        j = tl.where(i == 0, block - 1, i - 1)
        word = tl.load(p_word - block + j, volatile=True)  # asked for early: the answer takes as long as the rows
        b_row = _rows_at(source, tile.source - (block - j) * BR + o_r, o_r < BR, SHAPE)
        b_k, b_v = _pair(source, b_row, o_r < BR, SHAPE)
        b_k, b_v = _shortened(b_k), _shortened(b_v)
        # centring is a rank-one correction of the scores, so that the product runs on the rows as they are
        b_bias = tl.sum(b_k.to(tl.float32) * own.b_centre[None, :], 1) - own.half_norm
        b_s = tl.dot(b_k, tl.trans(own.b_k), input_precision="tf32") - b_bias[:, None] - own.b_bias[None, :]
        b_w = tl.dot(b_v, tl.trans(own.b_v), input_precision="tf32") + own.v_max * own.v_max
        b_kappa = tl.exp(tl.minimum(b_s * tile.scale - own.shift, 0.0)) * b_w  # [BR, BR]
        if i == 0:
            b_kappa = tl.where(own.m_r[None, :], b_kappa * b_alternating[:, None] * b_alternating[None, :], 0.0)
            b_d = _signed_sums(b_kappa, BP)
            tl.store(p_slot + BP * BP + o_p[:, None] * BP + o_p[None, :], b_d)
        else:
            while word == 0:
                word = tl.load(p_word - block + j, volatile=True)
            b_sign = 1 - 2 * (((word & 0xFFFFFFFF) >> (o_r // 2)) & 1).to(tl.int32)
            b_g += tl.sum(b_kappa * (b_sign.to(tl.float32) * b_alternating)[:, None], 0)
    b_alpha = -tl.sum(tl.reshape(tl.where(own.m_r, b_g, 0.0) * b_alternating, [BP, 2]), 1)
    tl.store(p_slot + 2 * BP * BP + 2 * BP + o_p, b_alpha)


@jit
def _decide(p_slot, p_word, tile, own_top, random, head, SHAPE: tl.constexpr):
    """The walk: which row of each pair of a tile is kept, as arena rows ``[BP]``; hands on the word of the tile."""
    BP: tl.constexpr = SHAPE.BP
    W: tl.constexpr = SHAPE.W
    o_p, half, p_vectors = tl.arange(0, BP), tile.rows // 2, p_slot + 2 * BP * BP
    # [W, BP] puts one pair on each lane, the same in every warp
    o_w = tl.zeros([W, 1], tl.int32) + o_p[None, :]
    b_alpha = tl.load(p_vectors + 2 * BP + o_w)
    b_b = tl.load(p_vectors + o_w)
    b_top = tl.load(p_vectors + BP + o_w)
    o_pair = tile.block * BP + o_w
    b_u = draw_uniform(random.seed, random.layer, o_pair % half, tile.bucket + o_pair // half, tile.stage, head)
    b_rows = ()
    for i in tl.static_range(BP):
        b_rows += (tl.load(p_slot + i * BP + o_w),)  # type: ignore[assignment]  # row i of D, zero up to i
    top = 0.0
    if tile.block > 0:
        b_couple = ()
        for i in tl.static_range(BP):
            b_couple += (tl.load(p_slot + BP * BP + i * BP + o_w),)  # type: ignore[assignment]
        word = _await_word(p_word - 1)
        top = ((word >> 32) - 1).to(tl.int32).to(tl.float32, bitcast=True)
        signs = (word & 0xFFFFFFFF).to(tl.uint32)
        for i in tl.static_range(BP):
            b_alpha += tl.where((signs >> i) & 1 != 0, b_couple[i], -b_couple[i])
    b_product = b_b * tl.maximum(b_top, top)
    # u < 1/2 (1 - alpha / a) as a threshold on alpha; a tie (alpha = 0) and a_i = 0 become fair coins
    b_threshold = (1.0 - 2.0 * b_u) * tl.maximum(tile.gain * b_product, 1e-37)
    b_threshold = tl.where(b_product > 0, b_threshold, tl.where(b_u < 0.5, float("inf"), float("-inf")))
    b_bits = tl.zeros([W, BP], tl.int32)
    for i in tl.static_range(BP):
        b_now = tl.where(b_alpha < b_threshold, -1.0, 1.0)
        b_now = tl.gather(b_now, tl.full([W, BP], i, tl.int32), 1)
        b_alpha -= b_now * b_rows[i]
        b_bits |= tl.where(b_now < 0, 1 << i, 0)
    top_bits = tl.maximum(own_top, top).to(tl.int32, bitcast=True).to(tl.int64) + 1
    b_word = (top_bits << 32) | (b_bits.to(tl.int64) & 0xFFFFFFFF)
    m_first = (tl.arange(0, W)[:, None] == 0) & (o_p[None, :] == 0)
    tl.atomic_xchg(p_word + 0 * o_w, b_word, mask=m_first, sem="relaxed")
    signs = tl.min(tl.min(b_bits.to(tl.int64) & 0xFFFFFFFF, 1), 0)
    return tile.source + 2 * o_p + ((signs >> o_p) & 1).to(tl.int32)


@jit
def _run_tile(i_row, i_seq, x, work, random, scale, sizes, SHAPE: tl.constexpr):
    BP: tl.constexpr = SHAPE.BP
    p_row = work.table + i_row * COLUMNS
    rows, block, unit, bucket = (
        tl.load(p_row + ROWS), tl.load(p_row + BLOCK), tl.load(p_row + UNIT), tl.load(p_row + BUCKET)
    )  # fmt: skip
    target, valid = tl.load(p_row + TARGET), tl.load(p_row + VALID)
    stage, bucket = tl.load(p_row + STAGE) + sizes.stage, bucket + sizes.first
    tile = _Tile(
        tl.load(p_row + SOURCE), rows, block, valid, bucket, stage, tl.where(unit < sizes.buckets, unit, -1),
        tl.load(work.gains + i_row), scale,
    )  # fmt: skip
    head = head_of(x.heads, (i_seq % sizes.H).to(tl.int32))
    number = head_of(random.heads, head).to(tl.int32)
    at = _places(work, i_seq, sizes, SHAPE)
    p_ck, p_cv = x.copied_key + i_seq * sizes.A * SHAPE.D, x.copied_value + i_seq * sizes.A * SHAPE.DV
    p_index = x.index + i_seq * sizes.index_rows
    raw = tile.source < sizes.tokens
    p_k, stride_k, p_v, stride_v, first = p_ck, SHAPE.D, p_cv, SHAPE.DV, -sizes.tokens
    if raw:
        p_k, stride_k = sequence(x.k, i_seq // sizes.H, head)
        p_v, stride_v = sequence(x.v, i_seq // sizes.H, head)
        first = sizes.sinks
    random = Random(tl.load(random.seed), random.layer, number)
    span = x.spans
    if x.spans is not None:
        span = Spans(x.spans.order, x.spans.lead, *numbers_of(x.spans, i_seq // sizes.H))
    listed = raw if work.parts is None else raw & (sizes.index_rows > sizes.A)
    source = _From(p_k, stride_k, p_v, stride_v, p_index + sizes.A, first, raw, listed, span)

    o_p = tl.arange(0, BP)
    m_p = o_p < valid
    wait_for(at.count + unit, tl.load(p_row + NEED))
    if rows == 0:  # one row of every group
        group = tl.load(p_row + GROUP)
        b_u = draw_uniform(random.seed, random.layer, bucket + o_p, 0, stage, number)
        b_at = tile.source + o_p * group + (b_u * group).to(tl.int32)
    elif SHAPE.COIN:
        o_pair, half = block * BP + o_p, rows // 2
        b_u = draw_uniform(random.seed, random.layer, o_pair % half, bucket + o_pair // half, stage, number)
        b_at = tile.source + 2 * o_p + (b_u < 0.5).to(tl.int32)
    else:
        walks = work.scratch if work.walks is None else work.walks
        p_slot = walks + tl.program_id(0) * (2 * BP * BP + 4 * BP)
        p_word = at.word + tl.load(p_row + WORD)
        own = _own_block(source, at, p_slot, tile, SHAPE)
        _earlier_tiles(source, p_slot, p_word, tile, own, SHAPE)
        tl.debug_barrier()
        b_at = _decide(p_slot, p_word, tile, own.top, random, number, SHAPE)

    b_row = _rows_at(source, b_at, m_p, SHAPE)
    b_k, b_v = _pair(source, b_row, m_p, SHAPE)  # [BP, BD], [BP, BDV]
    b_token = b_row
    if not raw:
        b_token = tl.load(p_index + b_token, mask=m_p, other=0)
    o_out = target - sizes.tokens + o_p
    o_d, o_dv = tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
    tl.store(p_index + o_out, b_token, mask=m_p)
    p_k_out = p_ck + o_out.to(tl.int64)[:, None] * SHAPE.D + o_d[None, :]
    p_v_out = p_cv + o_out.to(tl.int64)[:, None] * SHAPE.DV + o_dv[None, :]
    tl.store(p_k_out, b_k, mask=m_p[:, None] & (o_d < SHAPE.D)[None, :])
    tl.store(p_v_out, b_v, mask=m_p[:, None] & (o_dv < SHAPE.DV)[None, :])
    _hand_over(p_row, at, b_k, b_v, m_p, valid, SHAPE)


@jit
def _run_ticket(ticket, x, work, random, scale, sizes, SHAPE: tl.constexpr):
    if work.parts is None:
        i_seq, i_row = ticket % sizes.sequences, ticket // sizes.sequences
        _run_tile(i_row, i_seq, x, work, random, scale, sizes, SHAPE)
    else:
        i_part, i_row, i_seq = _ticket(work, ticket)
        at, own = _of_part(i_part, x, work, sizes, SHAPE)
        part = _Inputs(x.k, x.v, at.heads, None, at.index, at.copied_key, at.copied_value)
        places = _Work(at.scratch, at.sync, work.table, work.gains, work.parts, None, work.scratch)
        _run_tile(i_row, i_seq, part, places, random, scale, own, SHAPE)


@jit
def _is_behind(ticket, x, work, sizes):
    """Whether a tile reads rows that the stream of its sequence does not reach."""
    length = tl.load(x.spans.length + ticket % sizes.sequences // sizes.H)
    reach = tl.load(work.table + ticket // sizes.sequences * COLUMNS + REACH)
    return reach > tl.maximum(length - sizes.sinks, 0) // sizes.step * sizes.step - sizes.held


@jit
def _skip_tile(ticket, x, work, sizes, SHAPE: tl.constexpr):
    """Rows of zeros, which whole tiles of others read; who waits for it is behind the end as well."""
    BP: tl.constexpr = SHAPE.BP
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    i_seq, p_row = ticket % sizes.sequences, work.table + ticket // sizes.sequences * COLUMNS
    valid, o_p = tl.load(p_row + VALID), tl.arange(0, BP)
    o_row = i_seq * sizes.A + tl.load(p_row + TARGET) - sizes.tokens + o_p
    b_k, b_v = tl.zeros([BP, BD], tl.float32), tl.zeros([BP, BDV], tl.float32)
    m_p, o_d, o_dv = o_p < valid, tl.arange(0, BD), tl.arange(0, BDV)
    p_k, p_v = x.copied_key + o_row[:, None] * SHAPE.D, x.copied_value + o_row[:, None] * SHAPE.DV
    tl.store(p_k + o_d[None, :], b_k.to(p_k.dtype.element_ty), mask=m_p[:, None] & (o_d < SHAPE.D)[None, :])
    tl.store(p_v + o_dv[None, :], b_v.to(p_v.dtype.element_ty), mask=m_p[:, None] & (o_dv < SHAPE.DV)[None, :])
    feeds = tl.load(p_row + FEEDS)
    if feeds >= 0:
        tl.atomic_add(_places(work, i_seq, sizes, SHAPE).count + feeds, 1)


@jit(general="random sizes")
def _thin_kernel(x, work, random, scale, sizes, SHAPE: tl.constexpr):
    total = sizes.tiles.to(tl.int64) * sizes.sequences
    ticket = tl.atomic_add(work.sync, 1)
    while ticket < total:
        if x.spans is None:
            _run_ticket(ticket, x, work, random, scale, sizes, SHAPE)
        elif _is_behind(ticket, x, work, sizes):
            _skip_tile(ticket, x, work, sizes, SHAPE)
        else:
            _run_ticket(ticket, x, work, random, scale, sizes, SHAPE)
        ticket = tl.atomic_add(work.sync, 1)


# ---------------------------------------------------------------------------------------------------------------
# Launcher


class _Shift(NamedTuple):
    """What the stages and the numbers of buckets of a schedule are counted from, and the numbers of the heads."""

    stage: int
    first: int
    numbers: torch.Tensor | None


_tiles = functools.lru_cache(maxsize=256)(Tiles)  # layers in which other heads have such a schedule share them


@functools.lru_cache(maxsize=256)
def _tiles_on(schedule: Schedule, rule: HalvingRule, pairs: int, lanes: int, device: torch.device) -> tuple:
    tiles = _tiles(schedule, rule, pairs, lanes)
    tensors = (constant(x, device) for x in (tiles.table, tiles.gains, tiles.described))
    return tiles, *tensors, bool(np.isinf(tiles.gains[tiles.table[:, ROWS] > 0]).all())


def thin(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, schedule: Schedule, sinks: int, decider: Decider
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry out ``schedule``: copies of the kept rows, keys ``[B, H, A, D]`` and values ``[B, H, A, Dv]``.

    ``key`` ``[B, H_kv, L, D]`` and ``value`` ``[B, H_kv, L, Dv]`` are the tokens, of which the H heads
    ``decider.random.heads`` are thinned, or all; ``A = schedule.size - schedule.tokens``. ``index`` int32
    ``[B, H, A + ..]`` receives the token of every copied row in its first A entries. If it is longer, the entries that
    follow are the tokens of the stream; otherwise stream row i is token ``sinks + i``. Draws the same numbers as the
    reference.
    """
    A = schedule.size - schedule.tokens
    kept_key, kept_value = (x.new_empty(*index.shape[:2], A, x.shape[3]) for x in (key, value))
    thin_into((index, kept_key, kept_value), key, value, schedule, sinks, decider)
    return kept_key, kept_value


def thin_into(
    kept: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor, schedule: Schedule, sinks: int,
    decider: Decider, spans: Spans | None = None, contest: tuple[int, int] = (1, 0), shift: _Shift | None = None,
    zeros: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`thin` into ``kept``: its index, keys and values, contiguous.

    With ``spans`` tokens are where these say, and the index has their places, or in its entries behind A what was
    written there. ``contest``: stream rows come so many at a time, and that many of them less. What a sequence does not
    have is left out: its copies are zeros, its entries of the index stay. ``zeros``: as many as
    :func:`zeros_for` says, where somebody has written them; they change.
    """
    require_triton()
    (index, kept_key, kept_value), (rule, scale, random) = kept, decider
    (B, H), D = index.shape[:2], key.shape[3]
    A, sequences = schedule.size - schedule.tokens, B * H
    if not schedule.launches and not schedule.subsamples:
        return
    pairs, most = _pairs_and_programs(key, value)
    tiles, table, gains, described, coin = _tiles_of(schedule, rule, key, value, sequences, shift is not None)
    count = len(table)
    if spans is not None:  # Triton makes a constant of a lead of 1, which a kernel cannot put into a tuple in a loop
        spans = spans._replace(lead=0)
    inputs = _Inputs(strided(key), strided(value), random.heads, spans, index, kept_key, kept_value)
    stage, first, numbers = shift or _Shift(0, 0, None)
    programs = min(count * sequences, most)
    sizes = _Sizes(programs, count, tiles.units, tiles.buckets, tiles.slots, sequences, H, schedule.tokens, sinks, A,
                   index.shape[2], *contest, stage, first)  # fmt: skip
    shape = _Shape(*Widths.of(key, value), pairs, 32 * WARPS // pairs, rule.centre, index.shape[2] > A, coin)
    needed = sequences * (tiles.slots + tiles.buckets) * (D + 2), _zeros_of(tiles, sequences)
    tables = _Tables(table, gains, described, (len(described), sequences))
    random = random._replace(heads=numbers)
    memory = needed[0], needed[1] if zeros is None else zeros
    _run(inputs, tables, memory, random, scale * rule.flatten, sizes, shape)


def _tiles_of(
    schedule: Schedule, rule: HalvingRule, key: torch.Tensor, value: torch.Tensor, sequences: int, shifted: bool
) -> tuple:
    pairs, most = _pairs_and_programs(key, value)
    lanes = 1 if shifted else max(1, most // sequences)  # one table for any number of sequences
    return _tiles_on(schedule, rule, pairs, lanes, key.device)


def zeros_for(schedule: Schedule, rule: HalvingRule, key: torch.Tensor, value: torch.Tensor, sequences: int) -> int:
    """How many zeros, int64, :func:`thin_into` begins with for so many sequences."""
    if not schedule.launches and not schedule.subsamples:
        return 0
    return _zeros_of(_tiles_of(schedule, rule, key, value, sequences, False)[0], sequences)


def _zeros_of(tiles: Tiles, sequences: int) -> int:
    return 1 + sequences * (tiles.units + len(tiles.table))


def _pairs_and_programs(key: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Pairs of a tile, two of which of keys and of values are in shared memory at once; and the most programs."""
    widths = Widths.of(key, value)
    pairs = PAIRS if (widths.BD + widths.BDV) * key.element_size() <= 1024 else PAIRS // 2
    return pairs, PROGRAMS * (processors(key.device) if key.is_cuda else 1)


class _Tables(NamedTuple):
    """What :func:`_run` reads from the device; ``grid``: programs that describe. Of parts what :class:`_Work` says."""

    table: torch.Tensor
    gains: torch.Tensor
    described: torch.Tensor
    grid: tuple[int, ...]
    parts: torch.Tensor | None = None
    tickets: torch.Tensor | None = None
    describing: torch.Tensor | None = None


def _run(
    inputs: _Inputs, tables: _Tables, memory: tuple[int, int | torch.Tensor], random: Random, scale: float,
    sizes: _Sizes, shape: _Shape,
) -> None:  # fmt: skip
    """The launches. ``memory``: float32 of scratch that all sequences take, and zeros, int64, or how many."""
    # parts of it are views only inside the kernels (_places): every tensor that is passed costs the host a microsecond
    pairs, (floats, sync) = shape.BP, memory
    scratch = tables.gains.new_empty(sizes.programs * (2 * pairs + 4) * pairs + floats)
    if isinstance(sync, int):
        sync = tables.gains.new_empty(sync, dtype=torch.int64)
        launch(_zero_kernel, (-(-len(sync) // 1024),), sync, len(sync), BLOCK=1024, num_warps=4)
    if tables.grid[0] and not shape.COIN:
        launch(_describe_kernel, tables.grid,
            inputs, _Work(scratch, sync, tables.described, None, tables.parts, tables.describing), sizes,
            SHAPE=shape, num_warps=4,
        )  # fmt: skip
    launch(_thin_kernel, (sizes.programs,),
        inputs, _Work(scratch, sync, tables.table, tables.gains, tables.parts, tables.tickets), random, scale, sizes,
        SHAPE=shape, num_warps=WARPS, num_stages=1,
    )  # fmt: skip


class Part(NamedTuple):
    """Heads that are thinned beside others: their numbers, their schedule, and which token its stream begins with. Or
    with an ``index`` of more than A rows a head, behind these, the tokens of the stream. ``begin``: where their index
    and their copies begin."""

    heads: tuple[int, ...]
    schedule: Schedule
    sinks: int
    index_rows: int
    begin: tuple[int, int]


def thin_parts_into(
    kept: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor, parts: tuple[Part, ...], decider: Decider,
    zeros: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`thin_into` of some ``parts`` of the heads, each with a schedule of its own, in the same launches.

    ``kept``: an index int32 ``[.]`` and copies ``[., D]`` and ``[., Dv]``, in which those of the parts lie,
    ``[B, heads, index_rows]`` and ``[B, heads, A]`` each. Heads keep what they would alone. ``zeros``: as many as
    :func:`zeros_for_parts` says.
    """
    require_triton()
    (index, kept_key, kept_value), (rule, scale, random) = kept, decider
    pairs, most = _pairs_and_programs(key, value)
    tables, heads, total, needed, coin = _parts_of(parts, rule, key, value)
    memory = needed[0], needed[1] if zeros is None else zeros
    inputs = _Inputs(strided(key), strided(value), heads, None, index, kept_key, kept_value)
    sizes = _Sizes(min(total, most), total, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0)
    streamed = any(x.index_rows > x.schedule.size - x.schedule.tokens for x in parts)
    shape = _Shape(*Widths.of(key, value), pairs, 32 * WARPS // pairs, rule.centre, streamed, coin)
    _run(inputs, tables, memory, random._replace(heads=None), scale * rule.flatten, sizes, shape)


def zeros_for_parts(parts: tuple[Part, ...], rule: HalvingRule, key: torch.Tensor, value: torch.Tensor) -> int:
    """How many zeros, int64, :func:`thin_parts_into` begins with."""
    return _parts_of(parts, rule, key, value)[3][1]


def _parts_of(
    parts: tuple[Part, ...], rule: HalvingRule, key: torch.Tensor, value: torch.Tensor
) -> tuple[_Tables, torch.Tensor, int, tuple[int, int], bool]:
    return _parts_on(parts, len(key), (rule, *_pairs_and_programs(key, value)), key.shape[3], key.device)


@functools.lru_cache(maxsize=256)
def _parts_on(
    parts: tuple[Part, ...], B: int, how: tuple[HalvingRule, int, int], D: int, device: torch.device
) -> tuple[_Tables, torch.Tensor, int, tuple[int, int], bool]:
    """Tables of all parts, which have something to halve, the heads of all, tickets, memory, and whether coins
    decide."""
    rule, pairs, most = how
    lanes = max(1, most // (B * sum(len(x.heads) for x in parts)))
    tickets: list[np.ndarray] = []
    describing: list[np.ndarray] = []
    numbers, due = [], []
    heads = rows = lines = scratch = sync = 0
    tiles = [_tiles(x.schedule, rule, pairs, lanes) for x in parts]
    for i, (x, own) in enumerate(zip(parts, tiles, strict=True)):
        sequences, count, A = B * len(x.heads), len(own.table), x.schedule.size - x.schedule.tokens
        sizes = count, own.units, own.buckets, own.slots, sequences, len(x.heads), x.schedule.tokens, x.sinks, A
        numbers.append([*sizes, x.index_rows, heads, *x.begin, scratch, sync])
        for found, first, n in ((tickets, rows, count), (describing, lines, len(own.described))):
            row, sequence = (y.ravel() for y in np.indices((n, sequences)))
            found.append(np.stack([np.full_like(row, i), first + row, sequence], 1))
        due.append((tickets[-1][:, 1] - rows + 0.5) / count)  # all parts go on side by side
        heads, rows, lines = heads + len(x.heads), rows + count, lines + len(own.described)
        scratch += -(-sequences * (own.slots + own.buckets) * (D + 2) // 16)
        sync += sequences * (own.units + count)
    order = np.argsort(np.concatenate(due), kind="stable")
    gains = np.concatenate([x.gains for x in tiles])
    table, described = np.concatenate([x.table for x in tiles]), np.concatenate([x.described for x in tiles])
    lists = np.concatenate(tickets)[order].astype(np.int32), np.concatenate(describing).astype(np.int32)
    on_device = [constant(x, device) for x in (table, gains, described)]
    others = [constant(x, device) for x in (np.array(numbers, np.int64), *lists)]
    tables = _Tables(on_device[0], on_device[1], on_device[2], (len(lists[1]), 1), *others)
    coin = bool(np.isinf(gains[table[:, ROWS] > 0]).all())
    every = constant(np.concatenate([x.heads for x in parts]).astype(np.int32), device)
    return tables, every, len(order), (16 * scratch, 1 + sync), coin


@functools.lru_cache(maxsize=64)
def _one_halving(rows: int, buckets: int, delta: float) -> Schedule:
    tokens = rows * buckets
    job = Halving(0, tokens, rows, buckets, 0, 0, delta)
    return Schedule(tokens, 0, 0, tokens + tokens // 2, (), ((job,),), (), ())


def halve(key: torch.Tensor, value: torch.Tensor, job: Halving, decider: Decider) -> torch.Tensor:
    """Which rows of the buckets ``key`` ``[B, H, buckets * rows, D]``, ``value`` ``[B, H, buckets * rows, Dv]`` stay:
    int32 ``[B, H, buckets * rows / 2]``. ``job`` says how many rows and buckets, the stage, the number of the first
    bucket and delta; ``decider.random.heads`` the numbers that the H heads have in the stream. What
    :func:`.halving.halve_reference` decides."""
    rule, rows = decider.rule, job.rows
    depends = rule.gain(rows, 0.5) != rule.gain(rows, 0.25)  # otherwise one table serves all halvings of so many rows
    schedule = _one_halving(rows, job.buckets, job.delta if depends else 0.5)
    kept = job.buckets * rows // 2
    index = torch.empty(*key.shape[:2], kept, dtype=torch.int32, device=key.device)
    copies = tuple(x.new_empty(*x.shape[:2], kept, x.shape[3]) for x in (key, value))
    shift = _Shift(job.stage, job.first, decider.random.heads)
    decider = decider._replace(random=decider.random._replace(heads=None))
    thin_into((index, *copies), key, value, schedule, 0, decider, shift=shift)
    return index


@jit(general="first count stage")
def _draw_kernel(out, heads, random, first, count, stage, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.load(heads + tl.program_id(1)).to(tl.int32)
    b_u = draw_uniform(tl.load(random.seed), random.layer, first + o_n, 0, stage, head)
    tl.store(out + tl.program_id(1) * count + o_n, b_u, mask=o_n < count)


def draws_triton(random: Random, first: int, count: int, stage: int) -> torch.Tensor:
    """``philox_uniform`` of the draws from ``first`` on for bucket 0: float32 ``[heads, count]``, in one launch."""
    out = torch.empty(len(random.heads), count, dtype=torch.float32, device=random.heads.device)
    launch(_draw_kernel, (-(-count // 64), len(random.heads)),
        out, random.heads, random._replace(heads=None), first, count, stage, BN=64, num_warps=1,
    )  # fmt: skip
    return out


def describe_launches(rows: sympy.Expr) -> sympy.Expr:
    """Launches of :func:`thin` beside its own, if buckets of stream rows hold ``rows`` rows (D + Dv up to 512)."""
    return sympy.Piecewise((1, rows > 2 * PAIRS), (0, True))
