"""Express over a sequence that lies in chunks, of which each knows of those before it only what their coresets hold.

A query attends to its own chunk by Express, to the last ``recent`` tokens of the chunk before (its halo, which the
chunk takes for its own first tokens), and to a coreset of everything before those. Each token is either in the halo or
in one coreset, so the weights that a query sees sum to the tokens up to itself.

A coreset is made twice. Thinning reads raw tokens only: chunks are thinned at the same time, by other processes
(:mod:`express_compile.engines.distributed`), each to what Express keeps of it with ``s`` rows. Whoever attends to i
of them thins them again, together, to a ``2**k``-th, ``k = log2(i + 1)`` rounded, and its own chunk with ``s / 2**k``
rows: so all queries see about as many rows as those of one piece, and rows of about equal weight. Coresets that were
each thinned as far by itself would err more, for the halvings of one know nothing of those of another. Each of N chunks
has an N-th of the protected places; only the first chunk holds sinks.

Each chunk draws its own random numbers; the first one's are those of a sequence that ends with it. Sequences no longer
than :attr:`Express.exact_up_to` are exact. No gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from math import log, log2
from typing import Any

import numpy as np
import torch

from .attend.segments import COMPACTED, TOKENS, SegmentTable, Sources, segment_attention
from .express import Express, gather_rows, halve_all_reference, make_layout, select_rows
from .launch import Random, constant, next_power_of_two
from .select.halving import Decider
from .select.schedule import Halving, Round, Schedule, round_of, stage
from .select.thinning import PAIRS, thin

_Tensors = tuple[torch.Tensor, torch.Tensor]
_Part = tuple[int, int, int, float]
_Rows = defaultdict[float, list[np.ndarray]]
_OTHER, _AGAIN = 0x9E3779B1, 0x2545F491  # odd, so that no two chunks have the same key, nor a chunk its second thinning
LEAST = 16
"""Rows that a chunk is thinned to at least for its own queries, however many are before it."""


@dataclass(frozen=True)
class Chunk:
    """Chunk ``number`` of ``chunks``, each of ``tokens`` tokens, of what ``config`` does to all."""

    config: Express
    tokens: int
    number: int
    chunks: int

    @property
    def halo(self) -> int:
        """Tokens of the chunk before that it has too."""
        return min(self.config.recent, self.tokens) if self.number else 0

    @property
    def told(self) -> int:
        """Of its halo and its tokens those at the front that its coreset stands for."""
        return self.halo + self.tokens - min(self.config.recent, self.tokens)

    @property
    def rounds(self) -> int:
        """How often it halves the coresets before it."""
        seen = self.number + 1
        return 0 if seen * self.tokens <= self.config.exact_up_to else round(log2(seen))

    @functools.cached_property
    def own(self) -> Express:
        """What its own queries see of it."""
        config, places = self.config, self.config.protected
        s = min(config.s, max(LEAST, config.s >> self.rounds))
        held = places - self.number * (places // self.chunks)
        return self._with(budget=s, inflation=min(config.M, s.bit_length()), protected=held)

    @functools.cached_property
    def sent(self) -> Express:
        """What later chunks are told of it: all, of sequences that are exact in one piece; otherwise of ``s`` rows, or
        ``2 s`` where a round has just closed with few."""
        if self.chunks * self.tokens <= self.config.exact_up_to:
            return self._with(recent=0, protected=0, budget=next_power_of_two(max(2, self.tokens)))
        sent = self._with(recent=0, protected=self.config.protected // self.chunks)
        thinned = sent.streamed(self.told)
        round_ = Round(round_of(thinned, sent.s), sent.s, sent.M)
        return replace(sent, budget=2 * sent.s) if round_.r and 4 * thinned < 5 * round_.block else sent

    def _with(self, **changes: Any) -> Express:
        if self.chunks == 1:
            return self.config
        return replace(self.config, sinks=0 if self.number else self.config.sinks, **changes)

    @functools.cached_property
    def parts(self) -> tuple[tuple[_Part, ...], tuple[_Part, ...]]:
        """``(source, first row, rows, log-weight)`` of the rows of its coreset, by shapes alone: those that are held as
        they are, and those that may be thinned again."""
        if not self.told:
            return (), ()
        table = make_layout(self.sent, 1, self.told + 1).table  # of a query right behind
        tail, held = int(table.tail[0]), 1 + bool(self.sent.protected)  # sinks and places come first
        rows = zip(table.segments[0].tolist(), table.log_weight[0].tolist(), strict=True)
        parts = [(*segment, weight) for segment, weight in rows]
        if not tail:  # a short one is a tail alone
            tail = min(self.sent.sinks, self.told)
            parts[0] = TOKENS, 0, tail, 0.0
        parts.append((TOKENS, tail, self.told - tail, 0.0))
        first, second = (tuple(part for part in some if part[2]) for some in (parts[:held], parts[held:]))
        return first, second

    @functools.cached_property
    def rows(self) -> int:
        """Rows that every chunk sends; the first one may have fewer to tell."""
        every = (replace(self, number=i).parts for i in range(min(2, self.chunks)))
        return max(sum(part[2] for some in parts for part in some) for parts in every)

    def rows_seen(self) -> np.ndarray:
        """Rows that each of its queries attends to, itself included: int64 ``[tokens]``."""
        return _plan(self).table.rows_seen(self.tokens)


@dataclass(frozen=True, eq=False)
class _Plan:
    """table: of the queries. stays, pools: int64, which of the rows of all earlier coresets in turn come in front as
    they are, and which ones are thinned by ``again`` and come behind those."""

    table: SegmentTable
    stays: np.ndarray
    pools: np.ndarray
    again: Schedule


@functools.lru_cache(maxsize=64)
def _plan(chunk: Chunk) -> _Plan:
    own = make_layout(chunk.own, chunk.tokens, chunk.halo + chunk.tokens).table
    # equal weights side by side, however many chunks
    held, free = _Rows(list), _Rows(list)
    for number in range(chunk.number):
        at = number * chunk.rows
        for group, parts in zip((held, free), replace(chunk, number=number).parts, strict=True):
            for *_, rows, weight in parts:
                group[weight].append(np.arange(at, at + rows))
                at += rows
    none = np.zeros(0, np.int64)
    stays = {weight: np.concatenate(rows) for weight, rows in held.items()}
    pools: dict[float, np.ndarray] = {}
    for weight, of_chunks in free.items():
        pool = np.concatenate(of_chunks)
        count = len(pool) >> chunk.rounds << chunk.rounds if chunk.rounds else 0
        stays[weight] = np.concatenate([stays.get(weight, none), pool[count:]])
        pools[weight] = pool[:count]
    again, ends = _thinned_again([len(rows) for rows in pools.values()], chunk.rounds)
    stay = sum(map(len, stays.values()))
    counts = [len(rows) for rows in stays.values()]
    first = [*(np.cumsum([0, *counts])[:-1]), *(stay + end - again.tokens for end in ends)]
    counts += [len(rows) >> chunk.rounds for rows in pools.values()]
    weights = [*stays, *(weight + chunk.rounds * log(2) for weight in pools)]
    columns = np.array([(COMPACTED, a, n) for a, n in zip(first, counts, strict=True)], np.int64).reshape(-1, 3)
    segments, blocks = own.segments.astype(np.int64), len(own.tail)
    front = stay + again.size - again.tokens
    segments[..., 1] += front * ((segments[..., 0] == COMPACTED) & (segments[..., 2] > 0))
    segments = np.concatenate([np.tile(columns, (blocks, 1, 1)), segments], 1)
    log_weight = np.concatenate([np.tile(np.array(weights), (blocks, 1)), own.log_weight], 1)
    table = SegmentTable(own.block, own.q_offset, segments, log_weight, own.tail, own.shift)
    return _Plan(table, np.concatenate([none, *stays.values()]), np.concatenate([none, *pools.values()]), again)


def _thinned_again(pools: list[int], rounds: int) -> tuple[Schedule, list[int]]:
    """The schedule that halves pools of so many rows, side by side, ``rounds`` times, each time in buckets of twice
    what is left in the end; and where what is left of each pool begins. ``2**rounds`` divides the rows."""
    launches, size = [], sum(pools)
    # buckets of more than a tile of the kernel have to be whole tiles, so the rest of a pool is halved by itself
    whole = [rows // (PAIRS << rounds) * (PAIRS << rounds) for rows in pools]
    parts = [part for rows, main in zip(pools, whole, strict=True) for part in (main, rows - main)]
    sources = (np.cumsum(parts) - parts).tolist() if parts else []
    for step in range(rounds):
        jobs, left = [], rounds - step
        for i, rows in enumerate(parts):
            if rows:
                buckets, half = 1 << (left - 1), rows >> (step + 1)
                delta = 0.5 / (left * (left + 1) * buckets * len(parts))
                jobs.append(Halving(sources[i], size, 2 * half // buckets, buckets, stage(i, step), 0, delta))
                sources[i], size = size, size + half
        if jobs:
            launches.append(tuple(jobs))
    starts = [sources[2 * i + (not main)] for i, main in enumerate(whole)]
    return Schedule(sum(pools), 0, 0, size, (), tuple(launches), (), ()), starts


@functools.lru_cache(maxsize=64)
def _rows_on(chunk: Chunk, device: torch.device) -> _Tensors:
    plan = _plan(chunk)
    return constant(plan.stays, device), constant(plan.pools, device)


def _own(random: Random, chunk: Chunk) -> Random:
    return random._replace(layer=(random.layer + chunk.number * _OTHER) & 0x7FFFFFFF)


def make_coreset(own: _Tensors, chunk: Chunk, scale: float, random: Random) -> _Tensors:
    """What later chunks are told: keys ``[B, H_kv, chunk.rows, D]`` and values ``[B, H_kv, chunk.rows, Dv]``, zeros
    behind what there is. ``own``: as in :func:`attend_chunk`."""
    told = [x[:, :, : chunk.told] for x in own]
    out = tuple(x.new_zeros(*x.shape[:2], chunk.rows, x.shape[3]) for x in told)
    if chunk.told and chunk.number + 1 < chunk.chunks:  # what the last one had to tell, nobody would read
        layout, at = make_layout(chunk.sent, 1, chunk.told + 1), 0
        sources, _ = select_rows(told[0], told[1], layout, scale, _own(random, chunk))
        for source, first, rows, _ in itertools.chain(*chunk.parts):
            for kept, x in zip(out, _rows(sources, source, first, first + rows), strict=True):
                kept[:, :, at : at + rows] = x
            at += rows
    return out[0], out[1]


def _rows(sources: Sources, source: int, first: int, stop: int) -> _Tensors:
    if source == TOKENS:
        return sources.key[:, :, first:stop], sources.value[:, :, first:stop]
    if sources.index is None or first < sources.compacted_key.shape[2]:
        return sources.compacted_key[:, :, first:stop], sources.compacted_value[:, :, first:stop]
    index = sources.index[:, :, first:stop]
    return gather_rows(sources.key, index), gather_rows(sources.value, index)


def attend_chunk(
    query: torch.Tensor, own: _Tensors, before: _Tensors, chunk: Chunk, scale: float, random: Random
) -> _Tensors:
    """``(out, lse)`` of the queries ``[B, H, tokens, D]`` of a chunk, as :func:`~.attend.segments.segment_attention`
    gives them.

    own: keys ``[B, H_kv, halo + tokens, D]`` and values ``[B, H_kv, halo + tokens, Dv]``. before: the coresets of as
    many chunks as there are before it, or more: ``[chunks, B, H_kv, chunk.rows, D]`` and ``[.., Dv]``.
    """
    layout = make_layout(chunk.own, chunk.tokens, chunk.halo + chunk.tokens)
    sources, _ = select_rows(*own, layout, scale, _own(random, chunk))
    if chunk.number:
        front = _rows_before(before, chunk, scale, random)
        compacted = [torch.cat([*some, x], 2) for some, x in zip(front, sources[2:4], strict=True)]
        index = sources.index
        if index is not None:  # of copies it says nothing
            index = torch.nn.functional.pad(index, (compacted[0].shape[2] - sources.compacted_key.shape[2], 0))
        sources = Sources(sources.key, sources.value, compacted[0], compacted[1], index)
    return segment_attention(query, sources, _plan(chunk).table, scale)


def _rows_before(before: _Tensors, chunk: Chunk, scale: float, random: Random) -> tuple[_Tensors, _Tensors]:
    """Keys and values of the rows of earlier coresets: each those that stay as they are, and those thinned again."""
    stays, pools = _rows_on(chunk, before[0].device)
    (key, stay_key), (value, stay_value) = (
        (rows.index_select(2, pools), rows.index_select(2, stays))
        for rows in (x[: chunk.number].movedim(0, 2).flatten(2, 3) for x in before)
    )
    random = random._replace(layer=(random.layer + (chunk.number * _OTHER ^ _AGAIN)) & 0x7FFFFFFF)
    schedule, decider = _plan(chunk).again, Decider(chunk.config.rule, scale, random)
    B, H, n = key.shape[:3]
    if key.is_cuda:
        index = torch.empty(B, H, schedule.size - n, dtype=torch.int32, device=key.device)
        keys, values = thin(key, value, index, schedule, 0, decider)
    else:
        arena = torch.arange(schedule.size, dtype=torch.int32, device=key.device).repeat(B, H, 1)
        halve_all_reference(arena, key, value, schedule, decider)
        keys, values = (gather_rows(x, arena[:, :, n:]) for x in (key, value))
    return (stay_key, keys), (stay_value, values)


def express_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Express,
    scale: float,
    random: Random,
    chunks: int,
) -> _Tensors:
    """What ``chunks`` processes compute together, in one: ``(out, lse)`` of all n tokens. ``chunks`` divides n."""
    n = key.shape[2]
    if n % chunks or query.shape[2] != n:
        raise ValueError(f"chunks={chunks}: must divide {n} keys, of as many queries as {query.shape[2]}")
    every = [Chunk(config, n // chunks, i, chunks) for i in range(chunks)]
    own = [(key[:, :, first:stop], value[:, :, first:stop]) for first, stop in
           ((c.number * c.tokens - c.halo, (c.number + 1) * c.tokens) for c in every)]  # fmt: skip
    coresets = [make_coreset(kv, c, scale, random) for kv, c in zip(own, every, strict=True)]
    before = torch.stack([k for k, _ in coresets]), torch.stack([v for _, v in coresets])
    queries = query.chunk(chunks, 2)
    results = [attend_chunk(q, kv, before, c, scale, random) for q, kv, c in zip(queries, own, every, strict=True)]
    out, lse = (torch.cat([x[i] for x in results], 2) for i in range(2))
    return out, lse
