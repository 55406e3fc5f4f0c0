"""Express over a sequence that lies in chunks, of which each knows of those before it only what their coresets hold.

    out_i = (e^a out_own + e^b out_before) / (e^a + e^b)

A query attends to its own chunk by Express (a its log-sum-exp), and to the coreset of every earlier chunk (b that of
all of them): the rows that a query right behind that chunk would see, fewer than ``6 s`` of them thinned, and its
sinks, protected and last tokens, exactly. Their weights sum to the tokens of the chunk, so those that a query
sees sum to the tokens up to itself. Thinning reads raw tokens only, so chunks are thinned at the same time, by other
processes (:mod:`express_compile.engines.distributed`), and what they send hardly grows
with the sequence: by the tokens of a group, of ``n / (s 2^M)``, that is not complete.

Each chunk draws its own random numbers; the first one's are those of a sequence that ends with it. Sequences no longer
than :attr:`Express.exact_up_to` per chunk are exact. No gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .attend.segments import COMPACTED, NO_TAIL, TOKENS, SegmentTable, Sources, segment_attention
from .express import Express, make_layout, select_rows
from .launch import Random

_Tensors = tuple[torch.Tensor, torch.Tensor]
_OTHER = 0x9E3779B1  # odd, so that no two chunks have the same key


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a chunk of so many tokens does: ``table`` of its queries, and what stands for it later, by shapes alone.

    parts: ``(source, first row, rows)`` of the rows of its coreset; log_weights: of each part.
    """

    table: SegmentTable
    parts: tuple[tuple[int, int, int], ...]
    log_weights: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Rows of its coreset."""
        return sum(rows for *_, rows in self.parts)


@functools.lru_cache(maxsize=64)
def make_chunk(config: Express, tokens: int) -> Chunk:
    """The plan of a chunk of ``tokens`` tokens."""
    whole = make_layout(config, tokens + 1, tokens + 1).table  # the last query is the first one behind the chunk
    last, blocks = (tokens + whole.shift) // whole.block, (tokens - 1 + whole.shift) // whole.block + 1
    segments, log_weight, tails = (x[:blocks] for x in (whole.segments, whole.log_weight, whole.tail))
    tail = int(whole.tail[last])
    segments_of, weights_of = whole.segments[last].tolist(), whole.log_weight[last].tolist()
    rows = [(*segment, weight) for segment, weight in zip(segments_of, weights_of, strict=True)]
    parts = [part for part in (*rows, (TOKENS, tail, tokens - tail, 0.0)) if part[2]]
    return Chunk(
        SegmentTable(whole.block, 0, segments, log_weight, tails, whole.shift),
        tuple((source, first, count) for source, first, count, _ in parts),
        tuple(weight for *_, weight in parts),
    )


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Express,
    scale: float,
    random: Random,
    chunk: int,
) -> tuple[_Tensors, _Tensors]:
    """``(out, lse)`` of a chunk by itself, and keys ``[B, H_kv, R, D]`` and values ``[B, H_kv, R, Dv]`` of its coreset.

    ``query`` ``[B, H, m, D]``, ``key`` ``[B, H_kv, m, D]``, ``value`` ``[B, H_kv, m, Dv]``: its m tokens; ``chunk``:
    its number. ``out`` ``[B, H, m, Dv]``; ``lse`` ``[B, H, m]``, as in :func:`~.attend.segments.segment_attention`.
    """
    tokens = key.shape[2]
    plan = make_chunk(config, tokens)
    random = random._replace(layer=(random.layer + chunk * _OTHER) & 0x7FFFFFFF)
    sources, _ = select_rows(key, value, make_layout(config, tokens + 1, tokens + 1), scale, random)
    result = segment_attention(query, sources, plan.table, scale)
    keys, values = zip(*(_rows(sources, *part) for part in plan.parts), strict=True)
    return result, (torch.cat(keys, 2), torch.cat(values, 2))


def _rows(sources: Sources, source: int, first: int, rows: int) -> _Tensors:
    stop, copied = first + rows, sources.compacted_key.shape[2]
    if source == TOKENS:
        return sources.key[:, :, first:stop], sources.value[:, :, first:stop]
    if first < copied or sources.index is None:
        return sources.compacted_key[:, :, first:stop], sources.compacted_value[:, :, first:stop]
    at = sources.index[:, :, first:stop, None].long()
    key, value = (x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (sources.key, sources.value))
    return key, value


def attend_before(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, config: Express, scale: float
) -> _Tensors:
    """``(out, lse)`` of queries ``[B, H, m, D]`` to the coresets of the chunks before theirs, of m tokens each:
    ``keys`` ``[chunks, B, H_kv, R, D]``, ``values`` ``[chunks, B, H_kv, R, Dv]``, one chunk at least."""
    plan, chunks = make_chunk(config, query.shape[2]), keys.shape[0]
    sizes = [rows for *_, rows in plan.parts]

    def sorted_rows(x: torch.Tensor) -> torch.Tensor:  # equal weights side by side, whatever the number of chunks
        return torch.cat([part.movedim(0, 2).flatten(2, 3) for part in x.split(sizes, 3)], 2)

    table = _table_before(config, query.shape[2], chunks)
    return segment_attention(query, Sources.compacted(sorted_rows(keys), sorted_rows(values)), table, scale)


@functools.lru_cache(maxsize=64)
def _table_before(config: Express, tokens: int, chunks: int) -> SegmentTable:
    plan, blocks = make_chunk(config, tokens), -(-tokens // config.block)
    rows = np.array([rows * chunks for *_, rows in plan.parts])
    segments = np.stack([np.full_like(rows, COMPACTED), rows.cumsum() - rows, rows], -1)
    weights = np.tile(np.array(plan.log_weights), (blocks, 1))
    return SegmentTable(config.block, 0, np.tile(segments, (blocks, 1, 1)), weights, np.full(blocks, NO_TAIL))


def merge(own: _Tensors, before: _Tensors) -> _Tensors:
    """``(out, lse)`` of attention to both, exactly."""
    lse = torch.logaddexp(own[1], before[1])
    parts = (out.to(lse.dtype) * (part - lse).exp()[..., None] for out, part in (own, before))
    return sum(parts, start=torch.zeros((), dtype=lse.dtype, device=lse.device)).to(own[0].dtype), lse


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
    if key.shape[2] % chunks or query.shape[2] != key.shape[2]:
        raise ValueError(f"chunks={chunks}: must divide {key.shape[2]} keys, of as many queries as {query.shape[2]}")
    parts = list(zip(query.chunk(chunks, 2), key.chunk(chunks, 2), value.chunk(chunks, 2), strict=True))
    found = [attend_chunk(q, k, v, config, scale, random, i) for i, (q, k, v) in enumerate(parts)]
    results = [found[0][0]]
    for i in range(1, chunks):
        keys, values = (torch.stack([x[1][j] for x in found[:i]]) for j in range(2))
        results.append(merge(found[i][0], attend_before(parts[i][0], keys, values, config, scale)))
    out, lse = (torch.cat([x[i] for x in results], 2) for i in range(2))
    return out, lse
