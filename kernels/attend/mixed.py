"""Segment attention in one launch for heads that see rows of different tables, those with most rows first.

Every program is a *job*: a part of a block of queries of one head, with the place of its table and of its rows. Keys
and values are read and results written where the head has them in the layer, so that nothing is gathered by heads. Rows
beside those of a table: blocks of 64 tokens, a list of them for every block of queries, which the device chose. A head
may have several tables, each for some of its queries. The kernel for Hopper has fewer programs than jobs, whose jobs
the host deals out here: some take 200 times as long as others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..launch import Strided, constant, processors, strided
from . import job
from .arguments import KernelSizes, KernelTensors, Lists
from .segments import (
    Outputs,
    SegmentTable,
    SegmentTiles,
    check_dtype,
    check_table,
    largest_of,
    with_positive_scale,
)


class Place(NamedTuple):
    """Where some heads have something in a flat buffer: the first one, and how far on the next head and sequence."""

    first: int = 0
    head: int = 0
    sequence: int = 0


@dataclass(frozen=True, eq=False)
class Chosen:
    """Blocks of 64 tokens beside a table: block j is the tokens from ``first + 64 j`` on. int64 ``count``: how many
    each block of queries chose; ``place``: where they are listed, ``width`` places for every block of queries."""

    first: int
    count: np.ndarray
    place: Place
    width: int


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Query heads ``queries`` that see the rows of ``table``: the tokens, ``copied`` compacted rows of each KV head at
    ``copies``, and behind them ``indexed`` rows by index, which is ``listed`` with that of the copies before. As many
    of each of ``heads`` KV heads, one KV head behind the other. Query ``first`` is the first one of ``table``, which
    has all behind it; the last ``left`` of these are left to another table."""

    heads: int
    queries: tuple[int, ...]
    table: SegmentTable
    copied: int = 0
    indexed: int = 0
    copies: Place = Place()
    listed: Place = Place()
    chosen: Chosen | None = None
    first: int = 0
    left: int = 0


class Buffers(NamedTuple):
    """The rows of all heads that are no tokens: copies ``[R, D]`` and ``[R, Dv]`` of keys and values, all finite, and
    int32 ``tokens`` and ``chosen``, flat: which tokens are read by index, and which blocks were chosen. None where no
    head has such rows."""

    copies: tuple[torch.Tensor, ...] | None
    tokens: torch.Tensor | None
    chosen: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Mixture:
    """What heads see, every query of each of them in one share: ``Lq`` queries, the last of ``Lk`` tokens."""

    shares: tuple[HeadRows, ...]
    Lq: int
    Lk: int
    _on_device: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def block(self) -> int:
        return self.shares[0].table.block

    def lists(self, of_tiles: SegmentTiles, B: int, programs: int = 0) -> tuple[np.ndarray, ...]:
        """Jobs of ``of_tiles.queries`` queries of ``B`` sequences int32 ``[jobs, COLUMNS]``, the longest first, and
        what ``of_tiles.lists`` gives for all tables, one behind the other. Dealt out to ``programs``, unless 0, those
        of the first one come first, and behind everything is where those of each begin. Raises ``ValueError`` for
        tables that do not fit."""
        jobs, work, parts = [], [], []
        blocks = tiles = 0
        for share in self.shares:
            check_table(share.table, self.Lq - share.first, self.Lk, share.copied, share.indexed)
            start, *others = of_tiles.lists(share.table, share.copied)
            own, of = self._jobs(share, start, others[2], of_tiles)
            own[..., job.TABLE] = blocks
            jobs.append(own.reshape(-1, own.shape[-1]))
            work.append(np.broadcast_to(of[:, None], own.shape[:3]).flatten())
            parts.append((start[:-1] + tiles, *others))
            blocks, tiles = blocks + len(share.table.tail), tiles + len(others[0])
        start, *others = (np.concatenate(x) for x in zip(*parts, strict=True))
        others.insert(0, np.append(start, tiles).astype(np.int32))
        table, load = np.tile(np.concatenate(jobs), (B, 1)), np.tile(np.concatenate(work), B) + STARTING
        table[:, job.SEQUENCE] = np.arange(len(table)) // (len(table) // B)
        # among those of about one length the order of heads and queries is kept: neighbours read the same rows
        length = np.ceil(2 * np.log2(load))
        order = np.argsort(-length, kind="stable")
        if programs:
            own, begin = dealt(load[order], length[order], min(programs, len(load)))
            order = order[own]
            others.append(begin.astype(np.int32))
        return table[order].astype(np.int32), *others

    def _jobs(
        self, share: HeadRows, start: np.ndarray, tail: np.ndarray, of_tiles: SegmentTiles
    ) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[KV heads, parts, query heads of one, COLUMNS]``, and the tiles of rows of every part. Query heads
        that read the same rows are neighbours: what one has fetched is in the L2 cache for the others."""
        table, queries, rows = share.table, of_tiles.queries, of_tiles.rows
        end = self.Lq - share.first - share.left  # of its queries
        part = np.arange(table.shift // queries, -(-(end + table.shift) // queries))
        block = part // (table.block // queries)
        stop = table.q_offset + np.minimum((part + 1) * queries - table.shift, end)
        count = np.diff(start[::3])[block] + np.maximum(0, -(-(stop - tail[block].astype(np.int64)) // rows))
        head = np.repeat(np.arange(share.heads), len(share.queries) // share.heads)[:, None]
        columns: dict[Any, np.ndarray | int] = {
            job.HEAD: np.array(share.queries)[:, None],
            job.PART: part, job.SHIFT: table.shift - share.first, job.STOP: share.first + end,
            job.COPIES: share.copies.first + head * share.copies.head, job.COPIES_B: share.copies.sequence,
            job.INDEX: share.listed.first + head * share.listed.head, job.INDEX_B: share.listed.sequence,
        }  # fmt: skip
        if share.chosen is not None:
            own, place = share.chosen, share.chosen.place
            count = count - (-own.count[block] * job.KEYS // rows)
            columns |= {
                job.CHOSEN: place.first + head * place.head + block * own.width, job.CHOSEN_B: place.sequence,
                job.FIRST: own.first, job.BLOCKS: own.count[block],
            }  # fmt: skip
        jobs = np.zeros((len(head), len(part), int(job.COLUMNS)), np.int64)
        for column, x in columns.items():
            jobs[..., column] = x
        return jobs.reshape(share.heads, -1, *jobs.shape[1:]).swapaxes(1, 2), count

    def on(self, device: torch.device, of_tiles: SegmentTiles, B: int) -> tuple[torch.Tensor, ...]:
        """:meth:`lists` on ``device``, copied there once."""
        key = (device, of_tiles, B)
        if key not in self._on_device:
            programs = processors(device) if of_tiles.hopper else 0
            self._on_device[key] = tuple(constant(x, device) for x in self.lists(of_tiles, B, programs))
        return self._on_device[key]


STARTING = 1  # tiles in whose time a job starts and ends


def dealt(load: np.ndarray, length: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which jobs each program takes: int64 ``[jobs]``, those of the first one first, and where those of each begin
    ``[programs + 1]``. The next job goes to the program that is done first with what it has; ``load`` is how long jobs
    take, and those of one ``length``, of which some are dealt out at a time, take about as long as each other."""
    busy, of = np.zeros(programs), np.empty(len(load), np.int64)
    starts = np.arange(len(load)) % (8 * programs) == 0
    starts[1:] |= np.diff(length) != 0
    for a, b in pairwise([*starts.nonzero()[0], len(load)]):
        size, free = load[a:b].mean(), np.sort(busy)
        until = ((free.cumsum() + size * (b - a)) / np.arange(1, programs + 1)).min()  # when all can be done
        most = int((until - free[0]) / size) + 1
        begins = busy[:, None] + size * np.arange(most)
        of[a:b] = np.argsort(begins, axis=None, kind="stable")[: b - a] // most
        busy += np.bincount(of[a:b], load[a:b], programs)
    order = np.argsort(of, kind="stable")
    return order, np.searchsorted(of[order], np.arange(programs + 1))


def mixed_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    buffers: Buffers,
    mixture: Mixture,
    scale: float,
    outputs: Outputs,
) -> None:
    """Attention of the heads of ``mixture`` into ``outputs``, in which other heads are left as they are; tensors as in
    :func:`.segments.segment_attention_triton`. Raises ``TypeError`` for dtypes that it does not take."""
    check_dtype(query)
    query, scale = with_positive_scale(query, scale)
    (B, H, Lq, _), H_kv = query.shape, key.shape[1]
    tiles = SegmentTiles.of(query, key, value, mixture.block)
    jobs, *lists = mixture.on(query.device, tiles, B)
    d_k, d_v = copies = tiles.describe(key, value)  # a descriptor has to describe something
    if buffers.copies is not None:
        copies = tiles.describe(*(x[None, None] for x in buffers.copies))
    # where no head has them, loops without rows: one kernel for all mixtures, of which fewer registers are spilled, but
    # for rows by index of the kernel for Hopper, which cost the other tiles a fence
    chosen = jobs if buffers.chosen is None else buffers.chosen
    index = jobs if buffers.tokens is None and not tiles.hopper else buffers.tokens
    largest = largest_of((key,), (value,)) if query.dtype == torch.float32 else None  # copies are none but tokens
    inputs = strided(query), strided(d_k.base), strided(d_v.base), Strided(index, 0, 0, 0)
    tensors = KernelTensors(
        *inputs, None, largest, scale * 1.4426950408889634, H // H_kv, *outputs, jobs, chosen
    )  # fmt: skip
    sizes = KernelSizes(H, Lq, key.shape[2] - Lq, 0)
    tiles.launch((len(jobs), 1), query, (d_k, d_v, *copies), tensors, Lists(*lists), sizes, mixture.block)
