"""The schedule of Express: which rows exist after how many tokens, as plain integers.

What Express keeps after ``T`` tokens of the stream (the tokens that left the window and are neither sinks nor
protected) depends on ``T``, the budget ``s`` and the inflation ``M`` alone, never on the data. So the whole
prefill can be laid out before it runs: one *arena* of row indices per sequence and KV head, a list of halvings
that fill it level by level, and for each block of queries a handful of contiguous slices of it.

Round ``r >= 1`` covers the tokens ``4**r * s <= t < 4**(r+1) * s`` in three blocks of ``4**r * s``; with
``m = 2r`` and ``q = min(m, M)`` a block is subsampled by ``2**(m-q)`` and goes through the buckets
``S_0 .. S_{q-1}`` of COMPRESS2(q), where ``S_i`` is halved whenever it holds ``s * 2**(2+i-q)`` rows. A block
ends as ``s`` rows of weight ``2**m`` behind the ``s`` rows that closed the round before; when four times ``s``
are there, two more halvings close the round. (*Express Language Modeling*, arXiv 2606.10944, Alg. 1-3.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from express_compile.core.options import rows_at
from express_compile.core.spec import floor_power_of_two

STRETCH, SUBSAMPLE, CLOSE_FIRST, CLOSE_SECOND = 60, 61, 62, 63  # level codes in the random counter beside 0 .. q-1


def stage(round_: int, level: int) -> int:
    """Counter word of the random numbers of one level of one round."""
    return round_ * 64 + level


@dataclass(frozen=True)
class Round:
    """The constants of round ``r``: ``q``, the subsampling factor ``group`` and the tokens of a ``block``."""

    r: int
    s: int
    M: int

    @property
    def q(self) -> int:
        return min(2 * self.r, self.M)

    @property
    def group(self) -> int:
        return 2 ** (2 * self.r - self.q)

    @property
    def block(self) -> int:
        return 4**self.r * self.s

    def capacity(self, level: int) -> int:
        """Rows of bucket ``S_level`` when it is halved (``level < q``)."""
        return self.s * 4 * 2**level // 2**self.q

    def level_rows(self, level: int) -> int:
        """Rows that enter ``S_level`` in one block."""
        return self.s * 2 ** (self.q - level)

    def delta(self) -> float:
        """``delta_m`` of the paper's failure budget, which sums to at most 1/2 over all rounds."""
        return 0.25 * (1 / math.log2(self.r + 2) - 1 / math.log2(self.r + 3))

    def level_delta(self, level: int) -> float:
        """Failure probability of one halving of COMPRESS2 at ``level``."""
        return 4.0 ** (level + 1 - self.q) * self.delta() / (3 * self.q)


def round_of(tokens: int, s: int) -> int:
    """The round that ``tokens`` stream tokens are in: the largest r with ``4**r * s <= tokens``, at least 0."""
    return max(0, (tokens // s).bit_length() - 1) // 2


def admitted(tokens: int, s: int, M: int) -> int:
    """Stream tokens whose subsampling group is complete; the rest waits and is held exactly."""
    return tokens - tokens % Round(round_of(tokens, s), s, M).group


@dataclass(frozen=True)
class Halving:
    """A launch of equal halvings: ``buckets`` of ``rows`` rows each, contiguous from ``source`` on.

    Bucket ``i`` reads arena rows ``source + i * rows ..`` and writes ``rows / 2`` rows from
    ``target + i * rows / 2`` on. ``first`` is the number of bucket 0 within its round and level.
    """

    source: int
    target: int
    rows: int
    buckets: int
    stage: int
    first: int
    delta: float


@dataclass(frozen=True)
class Subsample:
    """Arena rows ``target + i`` become a uniform pick of the group ``source + i * group ..``."""

    source: int
    target: int
    rows: int
    group: int
    stage: int


@dataclass(frozen=True, eq=False)  # a cache finds it by identity: to hash all of it takes as long as a launch
class Schedule:
    """Everything Express does to the first ``tokens`` tokens of a stream, for budget ``s`` and inflation ``M``.

    The arena starts with the ``tokens`` stream rows themselves; the regions of the rounds follow.
    ``launches`` are to be carried out in order; the halvings inside one launch are independent.
    """

    tokens: int
    s: int
    M: int
    size: int
    subsamples: tuple[Subsample, ...]
    launches: tuple[tuple[Halving, ...], ...]
    ends: tuple[int, ...]  # per round: offset of E, the rows of weight 2**m
    levels: tuple[tuple[int, ...], ...]  # per round: offset of level i, counted over the three blocks

    def segments(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coreset after ``tokens[b]`` admitted stream tokens as slices of the arena.

        Returns ``(offset, length, log2_weight)``, int64 ``[len(tokens), n]``; unused slices have length 0.
        Column 0 is E; columns 1 .. are ``S_0 ..``. Raises ``ValueError`` for counts that are not admitted
        or beyond the schedule.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        columns = 1 + max((len(levels) for levels in self.levels), default=0)
        out = np.zeros((3, len(tokens), columns), dtype=np.int64)
        if len(tokens) and (tokens.min() < 0 or tokens.max() > self.tokens):
            raise ValueError(f"tokens={tokens.min()}..{tokens.max()}: must be within 0..{self.tokens}")
        rounds = np.array([round_of(int(t), self.s) for t in tokens], dtype=np.int64)
        for r in np.unique(rounds):
            here = np.flatnonzero(rounds == r)
            t = tokens[here]
            if r == 0:
                out[1, here, 0] = t
                continue
            round_ = Round(int(r), self.s, self.M)
            block, used = t // round_.block, t % round_.block
            if np.any(used % round_.group):
                raise ValueError(f"tokens={t[used % round_.group > 0][0]}: not a multiple of {round_.group}")
            rows = used // round_.group
            out[0, here, 0] = self.ends[r]
            out[1, here, 0] = block * self.s + (rows if round_.q == 0 else 0)
            out[2, here, 0] = 2 * r
            for level in range(round_.q):
                capacity = round_.capacity(level)
                absorbed = rows // capacity * capacity
                out[0, here, 1 + level] = self.levels[r][level] + (block - 1) * round_.level_rows(level) + absorbed
                out[1, here, 1 + level] = rows - absorbed
                out[2, here, 1 + level] = 2 * r - round_.q + level
                rows = absorbed // 2
        return out[0], out[1], out[2]


def make_schedule(tokens: int, s: int, M: int) -> Schedule:
    """The schedule for ``tokens`` stream tokens; those of an unfinished subsampling group are laid out but unused.

    Raises ``ValueError`` unless ``s`` is a power of two, at least 2, and ``2**(M-1)`` divides ``s``.
    """
    check_budget(s, M)
    last = round_of(tokens, s)
    size = tokens
    ends, subsamples, closings = [0], [], []
    levels: list[tuple[int, ...]] = [()]
    launches: dict[int, list[Halving]] = {}
    for r in range(last + 1):
        round_ = Round(r, s, M)
        if r > 0:
            # of the last round only what `tokens` reaches is laid out
            blocks = min(tokens // round_.block, 3)
            used = tokens - blocks * round_.block if r == last else round_.block
            tail = used // round_.group if round_.q == 0 else s * (r < last)
            end, size = size, size + s * blocks + tail
            ends.append(end)
            rows = (blocks - 1) * round_.level_rows(0) + used // round_.group
            if round_.group == 1:
                offset = round_.block
            else:
                offset = end + s if round_.q == 0 else size
                size += 0 if round_.q == 0 else rows
                subsamples.append(Subsample(round_.block, offset, rows, round_.group, stage(r, SUBSAMPLE)))
            offsets = []
            for level in range(round_.q):
                capacity = round_.capacity(level)
                buckets = rows // capacity
                offsets.append(offset)
                rows = buckets * capacity // 2
                target = end + s if level == round_.q - 1 else size
                if buckets:
                    job = Halving(offset, target, capacity, buckets, stage(r, level), 0, round_.level_delta(level))
                    launches.setdefault(level, []).append(job)
                if level < round_.q - 1:
                    offset, size = size, size + rows
            levels.append(tuple(offsets))
        if r < last:
            middle, size = size, size + 2 * s
            delta = round_.delta() / 2
            closings.append(Halving(ends[r], middle, 4 * s, 1, stage(r, CLOSE_FIRST), 0, delta))
            # the next round's E begins exactly where the next iteration puts it
            closings.append(Halving(middle, size, 2 * s, 1, stage(r, CLOSE_SECOND), 0, delta))
    ordered = [tuple(launches[level]) for level in sorted(launches)] + [(job,) for job in closings]
    return Schedule(tokens, s, M, size, tuple(subsamples), tuple(ordered), tuple(ends), tuple(levels))


@functools.lru_cache(maxsize=64)
def compress_schedule(tokens: int, s: int) -> Schedule:
    """KH-Compress (*Low-Rank Thinning*, arXiv 2502.12063): ``tokens`` rows become ``s`` by halving them all again
    and again, in buckets that double, the last of them ``2 s`` rows.

    ``tokens`` must be ``s`` times a power of two. The last ``s`` rows of the arena are the result.
    """
    rounds = (tokens // s).bit_length() - 1
    if s < 1 or tokens != s << rounds:
        raise ValueError(f"tokens={tokens}: must be s={s} times a power of two")
    launches, source, size = [], 0, tokens
    for i in range(rounds):
        rows = max(2, 2 * s >> (rounds - 1 - i))
        number = (tokens >> i) // rows
        # counted from the last one: a round does not depend on how many come before it. Failures add up to 1/2
        left = rounds - i
        delta = 0.5 / (left * (left + 1) * number)
        launches.append((Halving(source, size, rows, number, stage(0, left - 1), 0, delta),))
        source, size = size, size + (tokens >> (i + 1))
    return Schedule(tokens, s, 0, size, (), tuple(launches), (), ())


def budget_options(budget: Any) -> dict[str, int | float | list[int]]:
    """The options ``s`` and ``fraction`` of an op, rows or a fraction of the keys, the other one 0; or, with both 0,
    ``table``: rows by the number of keys, as in ``Policy.budget``."""
    if isinstance(budget, tuple):
        return {"s": 0, "fraction": 0.0, "table": [floor_power_of_two(rows) for rows in budget]}
    if isinstance(budget, float):
        return {"s": 0, "fraction": budget}
    return {"s": floor_power_of_two(budget), "fraction": 0.0}


def rows_of(s: int, fraction: float, Lk: int, table: Sequence[int] = ()) -> int:
    """The budget in rows that those options mean for ``Lk`` keys."""
    if table:
        return rows_at(table, Lk)
    return max(4, floor_power_of_two(int(fraction * Lk))) if fraction else s


def check_budget(s: int, M: int) -> None:
    """Raise ``ValueError`` unless ``s = 2**h`` with ``h >= 1`` and ``0 <= M <= h + 1``."""
    if isinstance(s, bool) or not isinstance(s, int) or s < 2 or floor_power_of_two(s) != s:
        raise ValueError(f"s={s!r}: must be a power of two, at least 2")
    if isinstance(M, bool) or not isinstance(M, int) or not 0 <= M <= s.bit_length():
        raise ValueError(f"inflation={M!r}: must be an integer from 0 to {s.bit_length()} for s={s}")
