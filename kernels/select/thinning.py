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

import numpy as np
import sympy
import torch

from ..launch import constant, draw_uniform, jit, launch, next_power_of_two, require_triton, tl
from .halving import HalvingRule
from .schedule import Schedule

PAIRS = 32  # pairs walked per tile
WARPS = 4
PROGRAMS = 2  # per multiprocessor

# columns of the table of tiles; the kernels have their numbers
(
    SOURCE, TARGET, ROWS, BLOCK, VALID, STAGE, BUCKET, GROUP,  # what to halve; ROWS = 0: pick one row per GROUP
    UNIT, NEED, WORD,  # what has to arrive before it can start; where its signs go
    FEEDS, FEEDERS, SLOT, FIRST_SLOT, SLOTS, FED_ROWS,  # which unit its rows go to, and the statistics of that
) = range(17)  # fmt: skip
COLUMNS = 17


class Tiles:
    """The tiles of a schedule, ``pairs`` pairs each.

    A *unit* is what can start at once: a bucket of several tiles, or a tile of whole buckets. ``table`` int32
    ``[tiles, COLUMNS]`` in the order of tickets for ``lanes`` programs per sequence, ``gains`` float32 ``[tiles]``
    beside it. ``described`` is the same kind of table for the stream rows that buckets of several tiles read as
    they are. ``buckets`` counts those buckets, ``slots`` the places for statistics of ``pairs`` rows each.
    """

    def __init__(self, schedule: Schedule, rule: HalvingRule, pairs: int, lanes: int) -> None:
        span, tokens = 2 * pairs, schedule.tokens
        halvings = [job for launch in schedule.launches for job in launch]
        # what every halving reads: (first row, rows, rows per unit, first unit, first slot or -1)
        ranges, self.buckets, self.slots = [], 0, 0
        for job in halvings:
            if job.rows > span:
                ranges.append((job.source, job.rows * job.buckets, job.rows, self.buckets, self.slots))
                self.buckets += job.buckets
                self.slots += -(-job.rows // pairs) * job.buckets
        self.units = self.buckets
        for job in halvings:
            if job.rows <= span:
                rows = span // job.rows * job.rows
                ranges.append((job.source, job.rows * job.buckets, rows, self.units, -1))
                self.units += -(-job.rows * job.buckets // rows)

        def units_of(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            """Unit that reads each arena row (-1: none), its slot, and the first slot and rows of its bucket."""
            unit, slot, first, rows = (np.full(len(at), value) for value in (-1, -1, 0, 0))
            for source, total, size, base, slots in ranges:
                inside = (at >= source) & (at < source + total)
                which, within = np.divmod(at - source, size)
                unit = np.where(inside, base + which, unit)
                if slots >= 0:
                    per_bucket = -(-size // pairs)
                    first = np.where(inside, slots + which * per_bucket, first)
                    slot = np.where(inside, first + within // pairs, slot)
                    rows = np.where(inside, size, rows)
            return unit, slot, first, rows

        def part(columns: dict[int, np.ndarray | int], count: int, fed_from: np.ndarray) -> np.ndarray:
            table = np.zeros((count, COLUMNS), dtype=np.int64)
            for column, values in columns.items():
                table[:, column] = values
            table[:, FEEDS], table[:, SLOT], table[:, FIRST_SLOT], table[:, FED_ROWS] = units_of(fed_from)
            table[:, SLOTS] = -(-table[:, FED_ROWS] // pairs)
            return table

        def picks(source: int, target: int, rows: int, group: int, stage: int) -> np.ndarray:
            first = np.arange(0, rows, pairs)
            columns = {
                SOURCE: source + first * group, TARGET: -1 if target < 0 else target + first, BUCKET: first,
                GROUP: group, STAGE: stage, VALID: np.minimum(pairs, rows - first), UNIT: -1,
            }  # fmt: skip
            return part(columns, len(first), first + (source if target < 0 else target))

        tiles, gains = [np.zeros((0, COLUMNS), dtype=np.int64)], [np.zeros(0)]
        described = [picks(j.source, -1, j.rows * j.buckets, 1, 0) for j in halvings
                     if j.source < tokens and j.rows > span]  # fmt: skip
        for job in schedule.subsamples:
            tiles.append(picks(job.source, job.target, job.rows, job.group, job.stage))
            gains.append(np.zeros(len(tiles[-1])))
        for job in halvings:
            half = job.rows // 2
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
                BUCKET: job.first + bucket, UNIT: units_of(source)[0],
            }  # fmt: skip
            tiles.append(part(columns, len(bucket), target))
            last = units_of(target + valid - 1)[0]
            assert np.all((last == tiles[-1][:, FEEDS]) | (last < 0)), "what a tile keeps goes to one unit"
            gains.append(np.full(len(bucket), rule.gain(job.rows, job.delta)))
        table, gain, raw = np.concatenate(tiles), np.concatenate(gains), np.concatenate(described or tiles[:1])
        table[:, WORD] = np.arange(len(table))
        feeds = np.concatenate([table[:, FEEDS], raw[:, FEEDS]])
        arrivals = np.bincount(feeds[feeds >= 0], minlength=self.units)
        for x in (table, raw):
            x[:, FEEDERS] = np.where(x[:, FEEDS] >= 0, arrivals[x[:, FEEDS]], 0)
        # the statistics of a bucket of several tiles are one more arrival; those of stream rows came with a launch
        need = arrivals + (np.arange(self.units) < self.buckets)
        ready = (table[:, ROWS] == 0) | (table[:, SOURCE] < tokens)
        table[:, NEED] = np.where(ready, 0, need[table[:, UNIT]])
        order = _ticket_order(table, self.units, lanes)
        self.table, self.gains = table[order].astype(np.int32), gain[order].astype(np.float32)
        self.described = raw.astype(np.int32)


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
    ready, free, order = [], [0.0] * lanes, []
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


@jit
def _await(p_count, needed):
    """Until ``needed`` arrivals at a unit; what they wrote is visible then."""
    done = 0
    while done < needed:
        done = tl.atomic_add(p_count, 0, sem="acquire").to(tl.int32)


@jit
def _await_word(p_word):
    """The word that a tile hands on: never 0."""
    word = tl.load(p_word, volatile=True)
    while word == 0:
        word = tl.load(p_word, volatile=True)
    return word


@jit
def _load_rows(p_x, i_row, m_r, stride, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    pointers = p_x + i_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(pointers, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def _shortened(b_x):
    """What :func:`.halving.shortened` gives: what tensor cores read of float32, so that products are exact."""
    if b_x.dtype == tl.float32:
        b_x = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_x


@jit
def _hand_over(
    p_row, p_count, p_mean, p_spread, p_centre, p_bound, b_k, b_v, m_p, valid,
    CENTRE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Describe the rows of a tile, announce them to the unit that reads them, and complete it if they are the last."""
    b_k, b_v = _shortened(b_k), _shortened(b_v)
    feeds, slot = tl.load(p_row + 11), tl.load(p_row + 13)
    o_d = tl.arange(0, BD)
    if slot >= 0:
        b_mean = tl.zeros([BD], tl.float32)
        if CENTRE:
            b_mean = tl.sum(b_k.to(tl.float32), 0) / valid
        b_far = tl.where(m_p[:, None], b_k.to(tl.float32) - b_mean[None, :], 0.0)
        tl.store(p_mean + slot * D + o_d, b_mean, mask=o_d < D)
        tl.store(p_spread + slot * 2, tl.sqrt(tl.max(tl.sum(b_far * b_far, 1))))
        tl.store(p_spread + slot * 2 + 1, tl.max(tl.max(tl.abs(b_v.to(tl.float32)), 1)))
    if feeds >= 0:
        tl.debug_barrier()
        arrived = tl.atomic_add(p_count + feeds, 1, sem="acq_rel").to(tl.int32) + 1
        if (slot >= 0) & (arrived == tl.load(p_row + 12)):
            first, slots, rows = tl.load(p_row + 14), tl.load(p_row + 15), tl.load(p_row + 16)
            o_s = tl.arange(0, 2 * BP)
            b_centre = tl.zeros([BD], tl.float32)
            radius, v_max = 0.0, 0.0
            if CENTRE:
                for i in range(0, slots, 2 * BP):
                    b_m = _load_rows(p_mean, first + i + o_s, i + o_s < slots, D, D, BD)
                    b_weight = tl.minimum(rows - (i + o_s) * BP, BP).to(tl.float32)
                    b_centre += tl.sum(b_m * b_weight[:, None], 0)
                b_centre = b_centre / rows
                tl.store(p_centre + feeds * D + o_d, b_centre, mask=o_d < D)
            for i in range(0, slots, 2 * BP):
                m_s = i + o_s < slots
                b_m = _load_rows(p_mean, first + i + o_s, m_s, D, D, BD) - b_centre[None, :]
                b_reach = tl.sqrt(tl.sum(b_m * b_m, 1)) + tl.load(p_spread + (first + i + o_s) * 2, mask=m_s, other=0.0)
                radius = tl.maximum(radius, tl.max(tl.where(m_s, b_reach, 0.0)))
                b_v_max = tl.load(p_spread + (first + i + o_s) * 2 + 1, mask=m_s, other=0.0)
                v_max = tl.maximum(v_max, tl.max(b_v_max))
            tl.store(p_bound + feeds * 2, radius * radius)
            tl.store(p_bound + feeds * 2 + 1, v_max)
            tl.debug_barrier()
            tl.atomic_add(p_count + feeds, 1, sem="release")


@jit
def _places(p_scratch, p_sync, programs, sequences, units, buckets, slots, D: tl.constexpr, BP: tl.constexpr):
    """Where the parts of the scratch memory of :func:`thin` begin: statistics of slots and of buckets, then the
    arrivals at units and the words of tiles. In front of them are what the walks keep, and the ticket."""
    sequences = sequences.to(tl.int64)
    p_mean = p_scratch + programs.to(tl.int64) * (2 * BP * BP + 4 * BP)
    p_centre = p_mean + sequences * slots * D
    p_spread = p_centre + sequences * buckets * D
    p_bound = p_spread + sequences * slots * 2
    p_count = p_sync + 1
    return p_mean, p_spread, p_centre, p_bound, p_count, p_count + sequences * units


@jit(general="programs sequences units buckets slots H sinks A index_rows")
def _describe_kernel(
    p_index, p_scratch, p_sync, p_k, p_v, p_table, programs, sequences, units, buckets, slots, H, sinks, A,
    index_rows, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    CENTRE: tl.constexpr, STREAMED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Statistics of stream rows that buckets of several tiles read as they are."""
    p_mean, p_spread, p_centre, p_bound, p_count, _ = _places(
        p_scratch, p_sync, programs, sequences, units, buckets, slots, D, BP
    )
    p_row, i_seq = p_table + tl.program_id(0) * 17, tl.program_id(1).to(tl.int64)
    p_k += (i_seq // H) * stride_kb + (i_seq % H) * stride_kh
    p_v += (i_seq // H) * stride_vb + (i_seq % H) * stride_vh
    valid = tl.load(p_row + 4)
    m_p = tl.arange(0, BP) < valid
    b_row = tl.load(p_row) + tl.arange(0, BP)
    if STREAMED:
        b_row = tl.load(p_index + i_seq * index_rows + A + b_row, mask=m_p, other=0) - sinks
    b_k = _load_rows(p_k, sinks + b_row, m_p, stride_kn, D, BD)
    b_v = _load_rows(p_v, sinks + b_row, m_p, stride_vn, DV, BDV)
    _hand_over(
        p_row, p_count + i_seq * units, p_mean + i_seq * slots * D, p_spread + i_seq * slots * 2,
        p_centre + i_seq * buckets * D, p_bound + i_seq * buckets * 2, b_k, b_v, m_p, valid, CENTRE, D, BD, BP,
    )  # fmt: skip


@jit
def _decide(
    p_index, p_k, p_v, p_centre, p_bound, p_slot, p_word, seed, layer, stage, head,
    source, rows, block, valid, bucket, i_bucket, gain, scale, raw, first, A, sinks, stride_k, stride_v,
    CENTRE: tl.constexpr, STREAMED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Which row of each pair of a tile is kept, as arena rows [BP]; hands on the word of the tile."""
    BR: tl.constexpr = 2 * BP
    o_p, o_r = tl.arange(0, BP), tl.arange(0, BR)
    half = rows // 2
    m_r = o_r < 2 * valid
    b_row = source + o_r
    if STREAMED and raw:
        b_row = tl.load(p_index + A + b_row, mask=m_r, other=0) - sinks
    b_k = _shortened(_load_rows(p_k, first + b_row, m_r, stride_k, D, BD))  # [BR, BD]
    b_v = _shortened(_load_rows(p_v, first + b_row, m_r, stride_v, DV, BDV))
    b_centre, half_norm, shift, v_max = tl.zeros([BD], tl.float32), 0.0, 0.0, 0.0
    o_bucket = o_r // rows
    m_same = (o_bucket[:, None] == o_bucket[None, :]) & m_r[:, None] & m_r[None, :]
    b_gram = tl.dot(b_k, tl.trans(b_k), input_precision="tf32")  # [BR, BR]
    if i_bucket < 0:  # whole buckets: all statistics are here
        b_bias = tl.zeros([BR], tl.float32)
        if CENTRE:
            b_mean = tl.sum(tl.where(m_same, b_gram, 0.0), 1) / rows
            b_bias = b_mean - 0.5 * tl.sum(tl.where(m_same, b_mean[None, :], 0.0), 1) / rows
        b_norm = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_gram, 0.0), 1) - 2.0 * b_bias
        b_shift = tl.where(m_r, tl.max(tl.where(m_same, b_norm[None, :], float("-inf")), 1) * scale, 0.0)
        b_v_max = tl.max(tl.abs(b_v.to(tl.float32)), 1)
        b_v_max = tl.max(tl.where(m_same, b_v_max[None, :], 0.0), 1)
    else:
        o_d = tl.arange(0, BD)
        if CENTRE:
            b_centre = tl.load(p_centre + i_bucket * D + o_d, mask=o_d < D, other=0.0)
            half_norm = 0.5 * tl.sum(b_centre * b_centre)
        b_bias = tl.sum(b_k.to(tl.float32) * b_centre[None, :], 1) - half_norm
        shift, v_max = tl.load(p_bound + i_bucket * 2) * scale, tl.load(p_bound + i_bucket * 2 + 1)
        b_shift, b_v_max = tl.zeros([BR], tl.float32) + shift, tl.zeros([BR], tl.float32) + v_max
    b_alternating = (1 - 2 * (o_r % 2)).to(tl.float32)  # + for the first row of a pair, - for the second
    # at most 0 but for rounding, which an outlier key could blow up
    b_s = tl.minimum((b_gram - b_bias[:, None] - b_bias[None, :]) * scale - b_shift[:, None], 0.0)
    b_kappa = tl.exp(b_s)
    b_kappa *= tl.dot(b_v, tl.trans(b_v), input_precision="tf32") + (b_v_max * b_v_max)[:, None]
    b_kappa = tl.where(m_same, b_kappa * b_alternating[:, None] * b_alternating[None, :], 0.0)
    b_d = tl.sum(tl.sum(tl.reshape(b_kappa, [BP, 2, BP, 2]), 3), 1)  # [BP, BP]
    p_own = p_slot + o_p[:, None] * BP + o_p[None, :]
    tl.store(p_own, tl.where(o_p[:, None] < o_p[None, :], b_d, 0.0))
    b_b = tl.sqrt(tl.maximum(tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_d, 0.0), 1), 0.0))
    m_before = ((o_p // half)[:, None] == (o_p // half)[None, :]) & (o_p[None, :] <= o_p[:, None])
    b_top = tl.max(tl.where(m_before, b_b[None, :], 0.0), 1)
    own_top = tl.max(b_b)
    tl.store(p_slot + 2 * BP * BP + o_p, b_b)
    tl.store(p_slot + 2 * BP * BP + BP + o_p, b_top)

    b_g = tl.zeros([BR], tl.float32)
    for i in range(0, block):
        # the tile before this one first: its block is stored, as its signs come last
        j = tl.where(i == 0, block - 1, i - 1)
        word = tl.load(p_word - block + j, volatile=True)  # asked for early: the answer takes as long as the rows
        b_row2 = source - (block - j) * BR + o_r
        if STREAMED and raw:
            b_row2 = tl.load(p_index + A + b_row2) - sinks
        b_k2 = _shortened(_load_rows(p_k, first + b_row2, o_r < BR, stride_k, D, BD))
        b_v2 = _shortened(_load_rows(p_v, first + b_row2, o_r < BR, stride_v, DV, BDV))
        # centring is a rank-one correction of the scores, so that the product runs on the rows as they are
        b_bias2 = tl.sum(b_k2.to(tl.float32) * b_centre[None, :], 1) - half_norm
        b_s = tl.dot(b_k2, tl.trans(b_k), input_precision="tf32") - b_bias2[:, None] - b_bias[None, :]
        b_w = tl.dot(b_v2, tl.trans(b_v), input_precision="tf32") + v_max * v_max
        b_kappa = tl.exp(tl.minimum(b_s * scale - shift, 0.0)) * b_w  # [BR, BR]
        if i == 0:
            b_kappa = tl.where(m_r[None, :], b_kappa * b_alternating[:, None] * b_alternating[None, :], 0.0)
            b_d = tl.sum(tl.sum(tl.reshape(b_kappa, [BP, 2, BP, 2]), 3), 1)
            tl.store(p_own + BP * BP, b_d)
        else:
            while word == 0:
                word = tl.load(p_word - block + j, volatile=True)
            b_sign = 1 - 2 * (((word & 0xFFFFFFFF) >> (o_r // 2)) & 1).to(tl.int32)
            b_g += tl.sum(b_kappa * (b_sign.to(tl.float32) * b_alternating)[:, None], 0)
    b_alpha = -tl.sum(tl.reshape(tl.where(m_r, b_g, 0.0) * b_alternating, [BP, 2]), 1)
    tl.store(p_slot + 2 * BP * BP + 2 * BP + o_p, b_alpha)
    tl.debug_barrier()

    # the walk: [W, BP] puts one pair on each lane, the same in every warp
    o_w = tl.zeros([W, 1], tl.int32) + o_p[None, :]
    b_alpha = tl.load(p_slot + 2 * BP * BP + 2 * BP + o_w)
    b_b = tl.load(p_slot + 2 * BP * BP + o_w)
    b_top = tl.load(p_slot + 2 * BP * BP + BP + o_w)
    o_pair = block * BP + o_w
    b_u = draw_uniform(seed, layer, o_pair % half, bucket + o_pair // half, stage, head)
    b_rows = ()
    for i in tl.static_range(BP):
        b_rows = b_rows + (tl.load(p_slot + i * BP + o_w),)  # row i of D, zero up to column i
    top = 0.0
    if block > 0:
        b_couple = ()
        for i in tl.static_range(BP):
            b_couple = b_couple + (tl.load(p_slot + BP * BP + i * BP + o_w),)
        word = _await_word(p_word - 1)
        top = ((word >> 32) - 1).to(tl.int32).to(tl.float32, bitcast=True)
        signs = (word & 0xFFFFFFFF).to(tl.uint32)
        for i in tl.static_range(BP):
            b_alpha += tl.where((signs >> i) & 1 != 0, b_couple[i], -b_couple[i])
    b_product = b_b * tl.maximum(b_top, top)
    # u < 1/2 (1 - alpha / a) as a threshold on alpha; a tie (alpha = 0) and a_i = 0 become fair coins
    b_threshold = (1.0 - 2.0 * b_u) * tl.maximum(gain * b_product, 1e-37)
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
    return source + 2 * o_p + ((signs >> o_p) & 1).to(tl.int32)


@jit
def _tile(
    ticket, p_index, p_ck, p_cv, p_mean, p_spread, p_centre, p_bound, p_slot, p_count, p_word, p_k, p_v, p_table,
    p_gain, p_seed, layer, scale, tiles, units, buckets, slots, sequences, H, tokens, sinks, A, index_rows,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    COIN: tl.constexpr, CENTRE: tl.constexpr, STREAMED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i_seq, p_row = ticket % sequences, p_table + ticket // sequences * 17
    source, target, rows, block = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 3)
    valid, stage, bucket, unit = tl.load(p_row + 4), tl.load(p_row + 5), tl.load(p_row + 6), tl.load(p_row + 8)
    need, word = tl.load(p_row + 9), tl.load(p_row + 10)
    seed, head = tl.load(p_seed), (i_seq % H).to(tl.int32)
    p_k += (i_seq // H) * stride_kb + (i_seq % H) * stride_kh
    p_v += (i_seq // H) * stride_vb + (i_seq % H) * stride_vh
    p_ck += i_seq * A * D
    p_cv += i_seq * A * DV
    p_index += i_seq * index_rows
    p_mean += i_seq * slots * D
    p_spread += i_seq * slots * 2
    p_centre += i_seq * buckets * D
    p_bound += i_seq * buckets * 2
    p_count += i_seq * units
    # where the rows are: stream rows among the tokens, all others among the copies
    raw = source < tokens
    p_k_from, p_v_from, stride_k, stride_v, first = p_ck, p_cv, D, DV, -tokens
    if raw:
        p_k_from, p_v_from, stride_k, stride_v, first = p_k, p_v, stride_kn, stride_vn, sinks

    o_p = tl.arange(0, BP)
    m_p = o_p < valid
    _await(p_count + unit, need)
    if rows == 0:  # one row of every group
        group = tl.load(p_row + 7)
        b_u = draw_uniform(seed, layer, bucket + o_p, 0, stage, head)
        b_at = source + o_p * group + (b_u * group).to(tl.int32)
    elif COIN:
        o_pair = block * BP + o_p
        half = rows // 2
        b_u = draw_uniform(seed, layer, o_pair % half, bucket + o_pair // half, stage, head)
        b_at = source + 2 * o_p + (b_u < 0.5).to(tl.int32)
    else:
        i_bucket = tl.where(unit < buckets, unit, -1)
        b_at = _decide(
            p_index, p_k_from, p_v_from, p_centre, p_bound, p_slot, p_word + i_seq * tiles + word, seed, layer, stage,
            head, source, rows, block, valid, bucket, i_bucket, tl.load(p_gain + ticket // sequences), scale, raw,
            first, A, sinks, stride_k, stride_v, CENTRE, STREAMED, D, DV, BD, BDV, BP, W,
        )  # fmt: skip

    b_row = b_at
    if STREAMED and raw:
        b_row = tl.load(p_index + A + b_at, mask=m_p, other=0) - sinks
    b_k = _load_rows(p_k_from, first + b_row, m_p, stride_k, D, BD)  # [BP, BD]
    b_v = _load_rows(p_v_from, first + b_row, m_p, stride_v, DV, BDV)
    b_token = first + b_row
    if not raw:
        b_token = tl.load(p_index + b_token, mask=m_p, other=0)
    o_out = target - tokens + o_p
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    tl.store(p_index + o_out, b_token, mask=m_p)
    p_k_out = p_ck + o_out.to(tl.int64)[:, None] * D + o_d[None, :]
    p_v_out = p_cv + o_out.to(tl.int64)[:, None] * DV + o_dv[None, :]
    tl.store(p_k_out, b_k, mask=m_p[:, None] & (o_d < D)[None, :])
    tl.store(p_v_out, b_v, mask=m_p[:, None] & (o_dv < DV)[None, :])
    _hand_over(p_row, p_count, p_mean, p_spread, p_centre, p_bound, b_k, b_v, m_p, valid, CENTRE, D, BD, BP)


@jit(general="layer tiles units buckets slots sequences H tokens sinks A index_rows")
def _thin_kernel(
    p_index, p_ck, p_cv, p_scratch, p_sync, p_k, p_v, p_table, p_gain, p_seed, layer, scale, tiles, units, buckets,
    slots, sequences, H, tokens, sinks, A, index_rows,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    COIN: tl.constexpr, CENTRE: tl.constexpr, STREAMED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    p_slot = p_scratch + tl.program_id(0) * (2 * BP * BP + 4 * BP)
    p_mean, p_spread, p_centre, p_bound, p_count, p_word = _places(
        p_scratch, p_sync, tl.num_programs(0), sequences, units, buckets, slots, D, BP
    )
    total = tiles.to(tl.int64) * sequences
    ticket = tl.atomic_add(p_sync, 1)
    while ticket < total:
        _tile(
            ticket, p_index, p_ck, p_cv, p_mean, p_spread, p_centre, p_bound, p_slot, p_count, p_word, p_k, p_v,
            p_table, p_gain, p_seed, layer, scale, tiles, units, buckets, slots, sequences, H, tokens, sinks, A,
            index_rows, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            COIN, CENTRE, STREAMED, D, DV, BD, BDV, BP, W,
        )  # fmt: skip
        ticket = tl.atomic_add(p_sync, 1)


# ---------------------------------------------------------------------------------------------------------------
# Launcher


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _tiles_on(schedule: Schedule, rule: HalvingRule, pairs: int, lanes: int, device: torch.device) -> tuple:
    tiles = Tiles(schedule, rule, pairs, lanes)
    tensors = (constant(x, device) for x in (tiles.table, tiles.gains, tiles.described))
    return tiles, *tensors, bool(np.isinf(tiles.gains[tiles.table[:, ROWS] > 0]).all())


def thin(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    schedule: Schedule,
    sinks: int,
    rule: HalvingRule,
    scale: float,
    seed: torch.Tensor,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry out ``schedule``: copies of the kept rows, keys ``[B, H_kv, A, D]`` and values ``[B, H_kv, A, Dv]``.

    ``key`` ``[B, H_kv, L, D]`` and ``value`` ``[B, H_kv, L, Dv]`` are the tokens, ``A = schedule.size -
    schedule.tokens``. ``index`` int32 ``[B, H_kv, A + ..]`` receives the token of every copied row in its first A
    entries. If it is longer, the entries that follow are the tokens of the stream; otherwise stream row i is
    token ``sinks + i``. ``seed`` is a 0-dim int64 tensor on the device. Draws the same numbers as the reference.
    """
    require_triton()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    (B, H, _, D), Dv, device = key.shape, value.shape[-1], key.device
    A, sequences = schedule.size - schedule.tokens, B * H
    kept_key, kept_value = key.new_empty(B, H, A, D), value.new_empty(B, H, A, Dv)
    if not schedule.launches and not schedule.subsamples:
        return kept_key, kept_value
    BD, BDV = (max(16, next_power_of_two(x)) for x in (D, Dv))
    # two tiles of keys and two of values are in shared memory at once
    pairs = PAIRS if (BD + BDV) * key.element_size() <= 1024 else PAIRS // 2
    processors = _processors(device) if key.is_cuda else 1
    lanes = max(1, PROGRAMS * processors // sequences)
    tiles, table, gains, described, coin = _tiles_on(schedule, rule, pairs, lanes, device)
    count = len(table)
    programs = min(count * sequences, PROGRAMS * processors)
    # parts of it are views only inside the kernels (_places): every tensor that is passed costs the host a microsecond
    per_sequence = (tiles.slots + tiles.buckets) * (D + 2)
    scratch = key.new_empty(programs * (2 * pairs + 4) * pairs + sequences * per_sequence, dtype=torch.float32)
    sync = key.new_zeros(1 + sequences * (tiles.units + count), dtype=torch.int64)
    strides = (*key.stride()[:3], *value.stride()[:3])
    options = dict(CENTRE=rule.centre, STREAMED=index.shape[2] > A, D=D, DV=Dv, BD=BD, BDV=BDV, BP=pairs)
    if len(described) and not coin:
        launch(_describe_kernel, (len(described), sequences),
            index, scratch, sync, key, value, described, programs, sequences, tiles.units, tiles.buckets, tiles.slots,
            H, sinks, A, index.shape[2], *strides, **options, num_warps=4,
        )  # fmt: skip
    launch(_thin_kernel, (programs,),
        index, kept_key, kept_value, scratch, sync, key, value, table, gains, seed, layer, scale * rule.flatten,
        count, tiles.units, tiles.buckets, tiles.slots, sequences, H, schedule.tokens, sinks, A, index.shape[2],
        *strides, COIN=coin, **options,
        W=32 * WARPS // pairs, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return kept_key, kept_value


def describe_launches(rows: sympy.Expr) -> sympy.Expr:
    """Launches of :func:`thin` beside its own, if buckets of stream rows hold ``rows`` rows (D + Dv up to 512)."""
    return sympy.Piecewise((1, rows > 2 * PAIRS), (0, True))
