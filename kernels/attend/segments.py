"""Weighted attention over a list of key segments: what Express, Thinformer and fixed patterns have in common.

A block of queries sees a few contiguous *segments* of rows, each row standing for ``weight`` tokens, followed
by the *tail*: every token from ``tail`` up to the query itself. With ``w_j`` the weight of row j

    out_i = sum_j w_j exp(scale <q_i, k_j>) v_j / sum_j w_j exp(scale <q_i, k_j>),    lse_i = log of that sum.

Rows come from two buffers: 0, the tokens themselves, and 1, compacted copies. Which segments a block sees is a
:class:`SegmentTable`, plain integers that depend on shapes only. Exact causal attention is the table without
segments. Memory O(n D) beyond the inputs; supports grouped queries, Dv != D, float16, bfloat16 and float32.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from ..launch import (
    TensorDescriptor,
    Widths,
    constant,
    jit,
    launch,
    load_rows,
    require_triton,
    sequence,
    strided,
    tl,
)
from ..spans import Spans, numbers_of, place_of
from . import hopper, job
from .arguments import KernelShape, KernelSizes, KernelTensors, Lists, describable

TOKENS, COMPACTED = 0, 1  # the two sources of rows
NO_TAIL = 1 << 30


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of every block of queries.

    block: queries per block. q_offset: position of query 0 among the tokens.
    segments: int32 ``[blocks, n, 3]``: source, first row, number of rows, all visible to the whole block.
    log_weight: float64 ``[blocks, n]``. tail: int32 ``[blocks]``: first token of the exact tail, at most the
    position of the first query of the block, or ``NO_TAIL``: that block sees its segments alone. shift: query i
    belongs to block ``(i + shift) // block``, so that block 0 is shorter by ``shift`` queries and blocks can start
    at the same positions whatever ``q_offset`` is.
    """

    block: int
    q_offset: int
    segments: np.ndarray
    log_weight: np.ndarray
    tail: np.ndarray
    shift: int = 0
    _on_device: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.shift < self.block:
            raise ValueError(f"shift={self.shift}: must be from 0 to block - 1 = {self.block - 1}")

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three arrays as tensors on ``device``, copied there once."""
        if device not in self._on_device:
            arrays = (self.segments.astype(np.int32), self.log_weight.astype(np.float32), self.tail.astype(np.int32))
            self._on_device[device] = tuple(constant(a, device) for a in arrays)
        return self._on_device[device]

    def tiles_on(
        self, device: torch.device, tiles: SegmentTiles, Lq: int, Lk: int, compacted: int, indexed: int
    ) -> tuple[torch.Tensor, ...]:
        """What ``tiles.lists`` gives, checked and copied to ``device`` once."""
        key = (device, tiles, Lq, Lk, compacted, indexed)
        if key not in self._on_device:
            check_table(self, Lq, Lk, compacted, indexed)
            self._on_device[key] = tuple(constant(x, device) for x in tiles.lists(self, compacted))
        return self._on_device[key]

    @property
    def queries(self) -> int:
        """The most queries that fit into its blocks."""
        return len(self.tail) * self.block - self.shift

    def first(self, queries: int) -> SegmentTable:
        """The table of the first ``queries`` queries."""
        blocks = -(-(queries + self.shift) // self.block)
        segments, log_weight, tail = (x[:blocks] for x in (self.segments, self.log_weight, self.tail))
        return SegmentTable(self.block, self.q_offset, segments, log_weight, tail, self.shift)

    def rows_seen(self, queries: int) -> np.ndarray:
        """Rows that each of the first ``queries`` queries attends to, itself included: int64 ``[queries]``."""
        position = np.arange(queries)
        block = (position + self.shift) // self.block
        tail = np.maximum(position + self.q_offset - self.tail[block] + 1, 0)
        return self.segments[block, :, 2].sum(-1) + tail

    def of_block(self, block: int, queries: int) -> tuple[slice, SegmentTable]:
        """Which of the ``queries`` belong to ``block``, and the table of that block alone."""
        first = max(0, block * self.block - self.shift)
        segments, log_weight, tail = (x[block : block + 1] for x in (self.segments, self.log_weight, self.tail))
        own = slice(first, min((block + 1) * self.block - self.shift, queries))
        shift = 0 if block else self.shift
        return own, SegmentTable(self.block, self.q_offset + first, segments, log_weight, tail, shift)


class Sources(NamedTuple):
    """The rows that a table speaks of: tokens, ``key`` ``[B, H_kv, Lk, D]`` and ``value`` ``[B, H_kv, Lk, Dv]``, and
    compacted ones, ``[B, H_kv, A, D]`` and ``[B, H_kv, A, Dv]``.

    ``index`` int32 ``[B, H_kv, A + I]`` gives I compacted rows more, which are not copies but read where they are:
    row ``A + i`` is token ``index[:, :, A + i]``. A segment lies on one side of A. With ``lengths`` int ``[B]``
    sequence b sees of the compacted rows that are not read by index the first ``lengths[b]`` only.

    With ``spans`` tokens are counted within each sequence, and lie where these say; the table, with ``q_offset`` 0, is
    that of all tokens of the longest one. ``index`` then has places. Batches of packed sequences are one tensor of
    tokens, expanded.
    """

    key: torch.Tensor
    value: torch.Tensor
    compacted_key: torch.Tensor
    compacted_value: torch.Tensor
    index: torch.Tensor | None = None  # type: ignore[assignment]  # instead of tuple's method
    lengths: torch.Tensor | None = None
    spans: Spans | None = None

    @classmethod
    def tokens(cls, key: torch.Tensor, value: torch.Tensor, spans: Spans | None = None) -> Sources:
        """No compacted rows."""
        return cls(key, value, key[:, :, :0], value[:, :, :0], spans=spans)

    @classmethod
    def compacted(cls, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None) -> Sources:
        """No tokens."""
        return cls(key[:, :, :0], value[:, :, :0], key, value, None, lengths)

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self[:4]

    @property
    def indexed(self) -> int:
        """Rows that are read by index, behind the compacted ones. Raises ``ValueError`` if it does not fit them."""
        if self.index is None:
            return 0
        B, H_kv, A = self.compacted_key.shape[:3]
        if self.index.shape[:2] != (B, H_kv) or self.index.shape[2] < A:
            shape = tuple(self.index.shape)
            raise ValueError(f"index: shape {shape}; must be ({B}, {H_kv}, {A} compacted rows or more)")
        return self.index.shape[2] - A

    def gathered(self) -> Sources:
        """The same with copies of the rows that are read by index."""
        if self.index is None:
            return self
        at = self.index[:, :, self.compacted_key.shape[2] :, None].long()
        k, v = (torch.cat([copies, x.gather(2, at.expand(-1, -1, -1, x.shape[-1]))], 2)
                for copies, x in ((self.compacted_key, self.key), (self.compacted_value, self.value)))  # fmt: skip
        return self._replace(compacted_key=k, compacted_value=v, index=None)


@functools.lru_cache(maxsize=64)
def causal_table(Lq: int, Lk: int, block: int = 128) -> SegmentTable:
    """The table of exact causal attention of the last ``Lq`` of ``Lk`` tokens."""
    blocks = -(-Lq // block)
    return SegmentTable(
        block, Lk - Lq, np.zeros((blocks, 1, 3), np.int32), np.zeros((blocks, 1)), np.zeros(blocks, np.int32)
    )


@functools.lru_cache(maxsize=64)
def dense_table(Lq: int, rows: int, block: int = 128) -> SegmentTable:
    """The table of ``Lq`` queries that all see the same ``rows`` compacted rows, and nothing else."""
    blocks = -(-Lq // block)
    segments = np.tile(np.array([COMPACTED, 0, rows], np.int32), (blocks, 1, 1))
    return SegmentTable(block, 0, segments, np.zeros((blocks, 1)), np.full(blocks, NO_TAIL, np.int32))


def check_table(table: SegmentTable, Lq: int, Lk: int, compacted: int, indexed: int) -> None:
    """Raise ``ValueError`` unless ``table`` fits that many queries, tokens, compacted and indexed rows."""
    blocks = -(-(Lq + table.shift) // table.block)
    if len(table.tail) != blocks:
        raise ValueError(f"table: {len(table.tail)} blocks; {Lq} queries with shift {table.shift} are {blocks}")
    source, first, length = (table.segments[..., i].astype(np.int64) for i in range(3))
    stop = (first + length) * (length > 0)
    if stop[source == TOKENS].max(initial=0) > Lk:
        raise ValueError(f"table: a segment reads tokens up to {stop[source == TOKENS].max()}; there are {Lk}")
    if stop[source == COMPACTED].max(initial=0) > compacted + indexed:
        raise ValueError(
            f"table: a segment reads compacted rows up to {stop[source == COMPACTED].max()}; there are {compacted} "
            f"and {indexed} more by index"
        )
    if (source[table.tail == NO_TAIL] == TOKENS).any():
        raise ValueError("table: a block without a tail reads tokens; it must read compacted rows")
    if ((source == COMPACTED) & (first < compacted) & (stop > compacted)).any():
        raise ValueError(f"table: a segment crosses compacted row {compacted}, behind which rows are read by index")


def _block_rows(table: SegmentTable, block: int, queries: int) -> tuple[list, torch.Tensor]:
    """What a block sees of the two buffers, ``[(source, start, stop)]``, and the log-weight per row.

    ``queries`` is the number of queries in all: the last block may be shorter than the others.
    """
    begin = block * table.block + table.q_offset - table.shift
    slices, weights = [], []
    for (source, first, length), weight in zip(table.segments[block].tolist(), table.log_weight[block], strict=True):
        if length:
            slices.append((source, first, first + length))
            weights.append(np.full(length, weight))
    if table.tail[block] != NO_TAIL:
        stop = min(begin + table.block, table.q_offset + queries)
        slices.append((TOKENS, int(table.tail[block]), stop))
        weights.append(np.zeros(stop - int(table.tail[block])))
    return slices, torch.tensor(np.concatenate(weights))


def _block_scores(
    query: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, scale: float, tail: bool
) -> torch.Tensor:
    """Masked scores ``[B, H_kv, g * b, R]`` of the queries ``[B, H_kv, g, b, D]`` of one block.

    With a ``tail`` the last b of the R rows are the queries' own tokens; every other row is visible to the whole
    block.
    """
    B, H_kv, g, b, _ = query.shape
    scores = (query.reshape(B, H_kv, g * b, -1) * scale) @ keys.mT
    scores += weight.to(scores)
    if not tail:
        return scores
    hidden = torch.ones(b, b, dtype=torch.bool, device=query.device).triu(1)
    scores[..., scores.shape[-1] - b :].masked_fill_(hidden.repeat(g, 1), -math.inf)
    return scores


def _behind(lengths: torch.Tensor, slices: list, copied: int) -> torch.Tensor:
    """Which of the rows in ``slices`` lie behind the end of their sequence's compacted rows: bool ``[B, R]``."""
    rows = [torch.arange(a, b) if s == COMPACTED and b <= copied else torch.full((b - a,), -1) for s, a, b in slices]
    return torch.cat(rows).to(lengths.device) >= lengths[:, None]


# The queries of one block, where its rows are, and all of them with their masked scores.
_Block = namedtuple("_Block", "queries slices rows keys values scores")


def _blocks(
    query: torch.Tensor, sources: Sources, table: SegmentTable, scale: float, dtype: torch.dtype, filled: bool = False
) -> Iterator[_Block]:
    """Block by block.

    ``filled``: a last block that is shorter gets rows of zeros. What its products are rounded to may depend on their
    size, and must not depend on how many tokens follow.
    """
    Lq, q = query.shape[2], _grouped(query, sources.key.shape[1])
    buffers = ((sources.key, sources.compacted_key), (sources.value, sources.compacted_value))
    for block in range(len(table.tail)):
        begin = block * table.block - table.shift
        first, last = max(begin, 0), min(begin + table.block, Lq)
        slices, weight = _block_rows(table, block, Lq)
        tail, missing = bool(table.tail[block] != NO_TAIL), (begin + table.block - last) * filled
        keys, values = (torch.cat([x[s][:, :, a:b] for s, a, b in slices], 2).to(dtype) for x in buffers)
        rows = pad(q[:, :, :, first:last].to(dtype), (0, 0, 0, missing))
        if tail:
            keys, values = (pad(x, (0, 0, 0, missing)) for x in (keys, values))
            weight = pad(weight, (0, missing))
        scores = _block_scores(rows, keys, weight, scale, tail)
        yield _Block(slice(first, last), slices, rows, keys, values, scores)


def _grouped(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    return x.unflatten(1, (H_kv, x.shape[1] // H_kv))


class Outputs(NamedTuple):
    """Of attention: ``[B, H, Lq, Dv]``, and float32 ``[B, H, Lq]``."""

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, query: torch.Tensor, Dv: int) -> Outputs:
        return cls(query.new_empty(*query.shape[:3], Dv), query.new_empty(query.shape[:3], dtype=torch.float32))


def spanned_outputs(query: torch.Tensor, value: torch.Tensor) -> Outputs:
    """What attention over spans is written into: 0, and minus infinity, where no token is."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return Outputs(
        query.new_zeros(*query.shape[:3], value.shape[3]), query.new_full(query.shape[:3], -math.inf, dtype=dtype)
    )


def _each_alone(query: torch.Tensor, sources: Sources, table: SegmentTable) -> Iterator[tuple]:
    """Of every sequence of ``sources.spans``: its number, the places of its tokens, those of its queries, and query,
    sources and table of it alone. Tokens before its queries have a query of zeros."""
    spans, sources = sources.spans, sources.gathered()
    assert spans is not None
    for b in range(len(spans.length)):
        places, begin = spans.places(b), int(spans.begin[b])
        if not len(places):
            continue
        key, value = (x[b : b + 1, :, places] for x in sources[:2])
        own = Sources(key, value, sources.compacted_key[b : b + 1], sources.compacted_value[b : b + 1])
        asking = places[begin:] - spans.lead
        rows = pad(query[b : b + 1, :, asking], (0, 0, begin, 0))
        yield b, places, asking, rows, own, table.first(len(places))


def segment_attention_reference(
    query: torch.Tensor, sources: Sources, table: SegmentTable, scale: float, into: Outputs | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of correct: ``out`` ``[B, H, Lq, Dv]`` in the dtype of ``query`` ``[B, H, Lq, D]``, and ``lse``
    ``[B, H, Lq]`` in float32 (float64 for float64 inputs); computed in that same precision from the inputs as they are.

    Where a query sees no row at all ``out`` is 0 and ``lse`` minus infinity. With ``sources.spans`` every sequence is
    computed alone, ``into`` tensors of any strides if there are some, of which the rest stays as it is. Raises
    ``ValueError`` for a table that does not fit.
    """
    if sources.spans is not None:
        into = spanned_outputs(query, sources.value) if into is None else into
        for b, _, asking, rows, own, first in _each_alone(query, sources, table):
            for target, x in zip(into, segment_attention_reference(rows, own, first, scale), strict=True):
                target[b][:, asking] = x[0, :, x.shape[2] - len(asking) :]
        return into
    H_kv, A = sources.key.shape[1], sources.compacted_key.shape[2]
    check_table(table, query.shape[2], sources.key.shape[2], A, sources.indexed)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(*query.shape[:3], sources.value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    for block in _blocks(query, sources.gathered(), table, scale, dtype, filled=True):
        scores = block.scores
        if sources.lengths is not None:
            behind = _behind(sources.lengths, block.slices, A)
            behind = pad(behind, (0, scores.shape[-1] - behind.shape[1]))
            scores = scores.masked_fill(behind[:, None, None], -math.inf)
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
        mass = weights.sum(-1, keepdim=True)
        result, total = weights @ block.values / mass.clamp(min=1e-30), (top + mass.log())[..., 0]
        g, b = block.rows.shape[2], block.queries.stop - block.queries.start
        _grouped(out, H_kv)[:, :, :, block.queries] = result.unflatten(2, (g, -1))[:, :, :, :b].to(out.dtype)
        _grouped(lse, H_kv)[:, :, :, block.queries] = total.unflatten(2, (g, -1))[:, :, :, :b]
    return out, lse


def segment_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    sources: Sources,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of :func:`segment_attention_reference` for ``query``, ``key``, ``value`` and the compacted rows.

    Probabilities are recomputed from ``lse`` block by block, so that memory stays O(n D). Plain PyTorch on any
    device. Gradients are float32 (float64 for float64 inputs).
    """
    H_kv, dtype = sources.key.shape[1], lse.dtype
    if sources.spans is not None:
        return _backward_each_alone(grad, query, sources, out, lse, table, scale)
    d_query, *targets = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, *sources.buffers))
    o, do, total = (_grouped(x, H_kv) for x in (out, grad, lse))
    for queries, slices, rows, keys, values, scores in _blocks(query, sources, table, scale, dtype):
        probability = torch.exp(scores - total[:, :, :, queries].flatten(2, 3)[..., None])
        d_out = do[:, :, :, queries].to(dtype).flatten(2, 3)
        delta = (d_out * o[:, :, :, queries].to(dtype).flatten(2, 3)).sum(-1, keepdim=True)
        d_scores = probability * (d_out @ values.mT - delta) * scale
        _grouped(d_query, H_kv)[:, :, :, queries] = (d_scores @ keys).unflatten(2, (rows.shape[2], -1))
        parts = d_scores.mT @ rows.flatten(2, 3), probability.mT @ d_out
        at = 0
        for source, a, b in slices:
            for target, part in zip(targets[2 * source : 2 * source + 2], parts, strict=True):
                target[:, :, a:b] += part[:, :, at : at + b - a]
            at += b - a
    return (d_query, *targets)


def _backward_each_alone(
    grad: torch.Tensor, query: torch.Tensor, sources: Sources, out: torch.Tensor, lse: torch.Tensor,
    table: SegmentTable, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    tensors = (query, *sources.gathered().buffers)
    targets = [x.new_zeros(x.shape, dtype=lse.dtype) for x in tensors]
    for b, places, asking, rows, own, first in _each_alone(query, sources, table):
        begin = len(places) - len(asking)
        results = [pad(x[b : b + 1, :, asking], (0, 0, begin, 0)) for x in (grad, out)]
        total = pad(lse[b : b + 1, :, asking], (begin, 0), value=math.inf)
        parts = segment_attention_backward(results[0], rows, own, results[1], total, first, scale)
        targets[0][b][:, asking] = parts[0][0, :, begin:]
        for target, part, at in zip(targets[1:], parts[1:], (places, places, slice(None), slice(None)), strict=True):
            target[b][:, at] = part[0]
    return tuple(targets)


# ---------------------------------------------------------------------------------------------------------------
# Kernel: one program per (part of a block of queries, query head), which walks lists of tiles of rows


def _pieces(table: SegmentTable, compacted: int) -> tuple[np.ndarray, ...]:
    """The segments, block by block, of each block compacted ones (kind 0), by index (1) and of tokens (2): 3 times the
    block plus the kind, first row, number of rows, log2-weight; and the tail, with segments that it continues."""
    source, first, length = (table.segments[..., i].astype(np.int64) for i in range(3))
    tail = table.tail.astype(np.int64)
    continued = (source == TOKENS) & (length > 0) & (table.log_weight == 0) & (first + length == tail[:, None])
    joined, column = continued.any(1).nonzero()[0], continued.argmax(1)
    tail[joined] = first[joined, column[joined]]
    length[joined, column[joined]] = 0

    kind = np.where(source == TOKENS, 2, first >= compacted)
    block, column = length.nonzero()
    place = 3 * block + kind[block, column]
    order = np.argsort(place, kind="stable")
    at = block[order], column[order]
    return place[order], first[at], length[at], table.log_weight[at] / math.log(2.0), tail


def _cut(first: np.ndarray, length: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
    """Segments cut into pieces of ``rows`` rows: which segment each is of, its first row, and its number of rows."""
    count = -(-length // rows)
    which = np.repeat(np.arange(len(count)), count)
    done = (np.arange(len(which)) - (count.cumsum() - count)[which]) * rows
    return which, first[which] + done, np.minimum(length[which] - done, rows)


def tile_lists(table: SegmentTable, rows: int, compacted: int) -> tuple[np.ndarray, ...]:
    """What a program reads of the table: the segments cut into tiles of ``rows`` rows.

    start: int32 ``[3 * blocks + 1]``: block b sees the compacted tiles ``start[3 b] .. start[3 b + 1]``, then
    tiles read by index, then tiles of tokens, up to ``start[3 b + 3]``. tiles: int32 ``[tiles, 2]``: first row,
    number of rows. log2_weight: float32 ``[tiles]``. tail: int32 ``[blocks]``, which includes a segment that it
    continues. The tail itself is not listed: it may be as long as the sequence.
    """
    place, first, length, weight, tail = _pieces(table, compacted)
    which, row, shown = _cut(first, length, rows)
    start = np.bincount(place[which] + 1, minlength=3 * len(tail) + 1).cumsum()
    tiles = np.stack([row, shown], 1)
    return start.astype(np.int32), tiles.astype(np.int32), weight[which].astype(np.float32), tail.astype(np.int32)


def merged_lists(table: SegmentTable, rows: int, compacted: int) -> tuple[np.ndarray, ...]:
    """:func:`tile_lists` for the kernel of :mod:`.hopper`, without a part empty tile at the end of each segment.

    What whole tiles leave of segments that are not read by index is cut into slots of ``rows / 4``. Four, each of a
    segment and weight of its own, are a *merged* tile; it counts as compacted, with first row -1. Only the last slot
    of a tile may have fewer rows. Slots that would be empty are filled with tokens of the tail that the whole block
    sees. log2_weight: float32 ``[tiles, 4]``: the weight of a tile or of its first slot, and how much more the other
    slots have. slots: int32 ``[tiles, 4]``, behind tail: where they begin, the compacted row or -1 minus the token.
    """
    size = rows // 4
    place, first, length, weight, tail = _pieces(table, compacted)
    left = np.where(place % 3 == 1, 0, length % rows)
    which, row, shown = _cut(first, length - left, rows)
    owner, at, count = _cut(first + length - left, left, size)
    block, at, log2_weight = place[owner] // 3, np.where(place[owner] % 3 == 2, -1 - at, at), weight[owner]

    blocks = np.arange(len(tail))
    full, part = (np.bincount(block[x], minlength=len(tail)) for x in (count == size, count < size))
    tiles = np.maximum(part, -(-(full + part) // 4))
    begin = blocks * table.block - table.shift + table.q_offset  # whether its first queries are in this call or not
    filled = np.clip((begin - tail) // size, 0, 4 * tiles - full - part)
    filler, token, _ = _cut(tail, filled * size, size)
    block, at = np.append(block, filler), np.append(at, -1 - token)
    count, log2_weight = np.append(count, np.full(len(filler), size)), np.append(log2_weight, np.zeros(len(filler)))
    full, tail = full + filled, tail + filled * size

    order = np.lexsort((count < size, block))  # of a block those with fewer rows last
    block, at, count, log2_weight = (x[order] for x in (block, at, count, log2_weight))
    nth = np.arange(len(block)) - np.searchsorted(block, block)
    shorter, before = nth - full[block], np.minimum(nth // 3, part[block])  # one of them a tile, behind three others
    nth = np.where(shorter < 0, nth + before, 4 * shorter + np.clip(full[block] - 3 * shorter, 0, 3))
    slot = 4 * (tiles.cumsum() - tiles)[block] + nth
    merged = np.zeros((3, 4 * tiles.sum()))
    merged[:, slot] = at, count, log2_weight
    shown_of = merged[1].reshape(-1, 4).sum(1)
    # an empty slot is the one before it once more, as what is read has to be finite
    last = np.maximum.accumulate(np.where(merged[1] > 0, np.arange(merged.shape[1]), 0))
    slots, weights = merged[::2, last].reshape(2, -1, 4)
    weights[:, 1:] -= weights[:, :1]

    place = np.append(place[which], np.repeat(3 * blocks, tiles))
    order = np.argsort(place, kind="stable")
    start = np.bincount(place + 1, minlength=3 * len(tail) + 1).cumsum()
    ends = np.stack([np.append(row, np.full(len(slots), -1)), np.append(shown, shown_of)], 1)
    weights = np.concatenate([weight[which, None] * [1, 0, 0, 0], weights])
    slots = np.concatenate([np.zeros((len(row), 4)), slots])
    lists = start, ends[order], weights[order], tail, slots[order]
    return tuple(x.astype(dtype) for x, dtype in zip(lists, "iifii", strict=True))


@jit
def _powers(largest):
    """The power of two that takes ``largest`` into [2**14, 2**15), and its inverse."""
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 30), 230)
    down, up = (268 - exponent) << 23, (exponent - 14) << 23
    return down.to(tl.float32, bitcast=True), up.to(tl.float32, bitcast=True)


@jit
def _halves(b_x):
    """Two float16 whose sum has 22 bits of each float32 of ``b_x``, all below ``2**15``: for tensor cores."""
    b_high = b_x.to(tl.float16)
    return b_high, (b_x - b_high.to(tl.float32)).to(tl.float16)


# An online softmax: sums of weighted values, the largest exponents in base 2, and sums of weights.
Softmax = namedtuple("Softmax", "b_acc b_max b_sum")


@jit
def softmax_start(BM: tl.constexpr, BDV: tl.constexpr):
    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_max = tl.full([BM], -1e30, tl.float32)  # not -inf: a tile of hidden rows would give inf - inf
    return Softmax(b_acc, b_max, tl.zeros([BM], tl.float32))


@jit
def softmax_step(state, b_s, scale_log2, log2_weight):
    """The weights of one more tile of scores ``[BM, BN]``, and the state to which its values are yet to be added."""
    b_new = tl.maximum(state.b_max, tl.max(b_s, 1) * scale_log2 + log2_weight)
    b_p = tl.exp2(b_s * scale_log2 - (b_new - log2_weight)[:, None])
    b_rescale = tl.exp2(state.b_max - b_new)
    b_sum = state.b_sum * b_rescale + tl.sum(b_p, 1)
    return b_p, Softmax(state.b_acc * b_rescale[:, None], b_new, b_sum)


# Which rows of a tile query i sees: the first ``shown + slope * max(0, i - skip)``.
Seen = namedtuple("Seen", "shown slope skip")


# What scores are multiplied by, in base 2, and float32 rows before they are split in halves.
Scales = namedtuple("Scales", "log2 k_power v_power")


@jit
def _attend_tile(state, b_q, b_k, b_v, scales, log2_weight, seen):
    """Online softmax over one tile. float32 rows are multiplied by their powers; queries come multiplied."""
    BM: tl.constexpr = b_q.shape[0]
    BN: tl.constexpr = b_k.shape[0]
    if b_k.dtype == tl.float32:
        b_qh, b_ql = _halves(b_q)
        b_kh, b_kl = _halves(b_k * scales.k_power)
        b_s = tl.dot(b_ql, tl.trans(b_kh))
        b_s = tl.dot(b_qh, tl.trans(b_kl), b_s)
        b_s = tl.dot(b_qh, tl.trans(b_kh), b_s)  # [BM, BN]
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
    if seen.shown < BN:
        o_m = tl.maximum(tl.arange(0, BM) - seen.skip, 0)[:, None]
        b_s = tl.where(tl.arange(0, BN)[None, :] < seen.shown + seen.slope * o_m, b_s, float("-inf"))
    b_p, state = softmax_step(state, b_s, scales.log2, log2_weight)
    if b_v.dtype == tl.float32:
        b_ph, b_pl = _halves(b_p * 32768.0)
        b_vh, b_vl = _halves(b_v * scales.v_power)
        b_part = tl.dot(b_pl, b_vh)
        b_part = tl.dot(b_ph, b_vl, b_part)
        # tensor cores truncate what they add to: no long sums in them
        b_acc = state.b_acc + tl.dot(b_ph, b_vh, b_part)
    else:
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, state.b_acc)
    return Softmax(b_acc, state.b_max, state.b_sum)


@jit
def _place_queries(span, o_m, m_m):
    """Where the queries ``o_m`` are, and which of them there are."""
    if span is not None:
        m_m = m_m & (o_m >= span.begin)
        o_m = place_of(span, o_m, m_m) - span.lead
    return o_m, m_m


@jit
def _scale(x, b_q, i_head):
    """Queries, what their scores are multiplied by, and sums of values in the end."""
    scales, v_inverse = Scales(x.scale_log2, 1.0, 1.0), 1.0
    if x.largest is not None:  # float32
        p_largest = x.largest + i_head * 2
        q_power, q_inverse = _powers(tl.max(tl.max(tl.abs(b_q), 1)))
        k_power, k_inverse = _powers(tl.load(p_largest))
        v_power, v_inverse = _powers(tl.load(p_largest + 1))
        b_q *= q_power
        scales = Scales(x.scale_log2 * (q_inverse * k_inverse), k_power, v_power)
        v_inverse *= 1.0 / 32768
    return b_q, scales, v_inverse


@jit
def _load_tokens(d_k, d_v, x, span, i_b, i_kv, row, SHAPE: tl.constexpr):
    """Keys and values of the tokens from ``row`` on; 0 behind the end of a sequence."""
    BN: tl.constexpr = SHAPE.BN
    if span is None:
        b_k = d_k.load([i_b, i_kv, row, 0]).reshape(BN, SHAPE.BD)
        b_v = d_v.load([i_b, i_kv, row, 0]).reshape(BN, SHAPE.BDV)
    else:
        o_row = row + tl.arange(0, BN)
        m_row = o_row < span.length
        o_place = place_of(span, o_row, m_row)
        b_k = load_rows(*sequence(x.k, i_b, i_kv), o_place, m_row, SHAPE.D, SHAPE.BD)
        b_v = load_rows(*sequence(x.v, i_b, i_kv), o_place, m_row, SHAPE.DV, SHAPE.BDV)
    return b_k, b_v  # [BN, BD], [BN, BDV]


@jit
def _store(state, x, span, head, o_query, m_m, v_inverse, SHAPE: tl.constexpr):
    i_b, i_h, i_bh, Lq, end = head
    o_dv = tl.arange(0, SHAPE.BDV)
    if span is None:
        m_m = m_m & (o_query < end)
        o_row = i_bh.to(tl.int64) * Lq + o_query
        p_out, p_lse = x.out + (o_row[:, None] * SHAPE.DV + o_dv[None, :]), x.lse + o_row
    else:
        p_out, stride_o = sequence(x.out, i_b, i_h)
        p_lse, stride_l = sequence(x.lse, i_b, i_h)
        o_row = o_query.to(tl.int64)
        p_out += o_row[:, None] * stride_o + o_dv[None, :]
        p_lse += o_row * stride_l
    b_out = state.b_acc / state.b_sum[:, None] * v_inverse
    b_lse = (state.b_max + tl.log2(state.b_sum)) * 0.6931471805599453
    if x.lengths is not None:  # a query that saw nothing but hidden rows
        b_out = tl.where((state.b_sum > 0)[:, None], b_out, 0.0)
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_dv < SHAPE.DV)[None, :])
    tl.store(p_lse, b_lse, mask=m_m)


@jit(general="sizes")
def segment_kernel(d_k, d_v, d_ck, d_cv, x, lists, sizes, SHAPE: tl.constexpr):
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    BD: tl.constexpr = SHAPE.BD
    BDV: tl.constexpr = SHAPE.BDV
    H, Lq, q_offset, shift = sizes
    span, end = x.spans, Lq
    if x.jobs is None:
        i_part, i_bh = tl.program_id(0) + shift // BM, tl.program_id(1)  # no program for parts before the first query
        i_b, i_h = i_bh // H, i_bh % H
        if x.spans is not None:
            span = Spans(x.spans.order, x.spans.lead, *numbers_of(x.spans, i_b))
            i_part = tl.program_id(0) + (span.begin + shift) // BM
            if tl.maximum(i_part * BM - shift, 0) >= span.length:
                return
            Lq, end = span.length, span.length
        i_kv, i_block = i_h // x.G, i_part // SHAPE.PARTS
        c_b, c_h, c_row = i_b, i_kv, 0  # where the compacted rows begin
    else:
        p_job = x.jobs + tl.program_id(0) * job.COLUMNS
        i_b, i_h = tl.load(p_job + job.SEQUENCE), tl.load(p_job + job.HEAD)
        i_part, end = tl.load(p_job + job.PART), tl.load(p_job + job.STOP)
        i_bh, i_kv, shift = i_b * H + i_h, i_h // x.G, tl.load(p_job + job.SHIFT)
        i_block = tl.load(p_job + job.TABLE) + i_part // SHAPE.PARTS
        c_b, c_h, c_row = 0, 0, tl.load(p_job + job.COPIES) + i_b * tl.load(p_job + job.COPIES_B)
    o_m = i_part * BM - shift + tl.arange(0, BM)
    m_m = (o_m >= 0) & (o_m < Lq)
    skip = tl.maximum(shift - i_part * BM, 0)
    o_query, m_m = _place_queries(span, o_m, m_m)
    p_q, stride_q = sequence(x.q, i_b, i_h)
    b_q = load_rows(p_q, stride_q, o_query, m_m, SHAPE.D, BD)  # [BM, BD]
    b_q, scales, v_inverse = _scale(x, b_q, i_b * (H // x.G) + i_kv)
    state = softmax_start(BM, BDV)

    # rows behind the end of a segment are read and hidden
    p_start = lists.start + i_block * 3
    for t in range(tl.load(p_start), tl.load(p_start + 1)):
        row, shown = tl.load(lists.tiles + 2 * t), tl.load(lists.tiles + 2 * t + 1)
        if x.lengths is not None:
            shown = tl.minimum(shown, tl.load(x.lengths + i_b) - row)
        b_k = d_ck.load([c_b, c_h, c_row + row, 0]).reshape(BN, BD)
        b_v = d_cv.load([c_b, c_h, c_row + row, 0]).reshape(BN, BDV)
        state = _attend_tile(state, b_q, b_k, b_v, scales, tl.load(lists.log2_weight + t), Seen(shown, 0, 0))

    if x.index.p is not None:
        if x.jobs is None:
            p_index, _ = sequence(x.index, i_b, i_kv)
        else:
            p_index = x.index.p + (tl.load(p_job + job.INDEX) + i_b * tl.load(p_job + job.INDEX_B))
        p_k, stride_k = sequence(x.k, i_b, i_kv)
        p_v, stride_v = sequence(x.v, i_b, i_kv)
        o_n = tl.arange(0, BN)
        for t in range(tl.load(p_start + 1), tl.load(p_start + 2)):
            row, shown = tl.load(lists.tiles + 2 * t), tl.load(lists.tiles + 2 * t + 1)
            i_row = tl.load(p_index + row + o_n, mask=o_n < shown, other=0)
            b_k = load_rows(p_k, stride_k, i_row, o_n < shown, SHAPE.D, BD)  # [BN, BD]
            b_v = load_rows(p_v, stride_v, i_row, o_n < shown, SHAPE.DV, BDV)  # [BN, BDV]
            state = _attend_tile(state, b_q, b_k, b_v, scales, tl.load(lists.log2_weight + t), Seen(shown, 0, 0))

    if x.chosen is not None:
        p_chosen = x.chosen + (tl.load(p_job + job.CHOSEN) + i_b * tl.load(p_job + job.CHOSEN_B))
        first = tl.load(p_job + job.FIRST)
        for n in range(0, tl.load(p_job + job.BLOCKS) * 64, BN):
            row = first + tl.load(p_chosen + n // 64) * 64 + n % 64
            b_k = d_k.load([i_b, i_kv, row, 0]).reshape(BN, BD)
            b_v = d_v.load([i_b, i_kv, row, 0]).reshape(BN, BDV)
            state = _attend_tile(state, b_q, b_k, b_v, scales, 0.0, Seen(BN, 0, 0))

    # segments of tokens and the tail in one loop: a loop of its own for a tile or two costs its start-up
    tile, tail = tl.load(p_start + 2), tl.load(lists.tail + i_block)
    last = tl.load(p_start + 3)
    tail -= last * BN
    position = q_offset + i_part * BM - shift + skip  # of the first query
    stop = q_offset + tl.minimum((i_part + 1) * BM - shift, end)  # no token lies behind the last query
    for t in range(tile, tl.cdiv(stop - tail, BN)):
        in_list = t < last
        tail_row = tail + t * BN
        row = tl.load(lists.tiles + 2 * t, mask=in_list, other=0)
        shown = tl.load(lists.tiles + 2 * t + 1, mask=in_list, other=0)
        log2_weight = tl.load(lists.log2_weight + t, mask=in_list, other=0.0)
        row = tl.where(in_list, row, tail_row)
        shown = tl.where(in_list, shown, position + 1 - tail_row)
        b_k, b_v = _load_tokens(d_k, d_v, x, span, i_b, i_kv, row, SHAPE)
        state = _attend_tile(
            state, b_q, b_k, b_v, scales, log2_weight, Seen(shown, tl.where(in_list, 0, 1), skip)
        )  # fmt: skip

    _store(state, x, span, (i_b, i_h, i_bh, Lq, end), o_query, m_m, v_inverse, SHAPE)


# ---------------------------------------------------------------------------------------------------------------
# Launchers


class SegmentTiles(NamedTuple):
    """Widths, queries and rows of a tile, warps and pipeline stages; ``hopper``: of the kernel of :mod:`.hopper`."""

    widths: Widths
    queries: int
    rows: int
    warps: int
    stages: int
    hopper: bool = False

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: int,
        lengths: torch.Tensor | None = None,
        spans: Spans | None = None,
    ) -> SegmentTiles:
        """What suits the tensors, blocks of ``block`` queries, and ``lengths`` and ``spans`` of :class:`Sources`. The
        best of four or more for D = 64, 128 and 256 on an H200, in bf16 at n = 32,768."""
        widths = Widths.alike(query, value)
        if lengths is None and hopper.takes(query, key, value, block, spans):
            return cls(widths, hopper.QUERIES, 128, 4, 2, True)
        width = widths.BD + widths.BDV
        if query.element_size() == 4:
            found = (128, 64, 4, 2) if width <= 128 else (128, 64, 8, 2) if width <= 256 else (128, 32, 8, 1)
        elif width <= 128:
            found = 64, 64, 4, 3
        else:
            # with 4 warps the places of tokens take more registers than there are
            found = (128, 64, 4 if spans is None else 8, 3) if width <= 256 else (128, 64, 8, 2)
        return cls(widths, math.gcd(found[0], block), *found[1:])

    def lists(self, table: SegmentTable, compacted: int) -> tuple[np.ndarray, ...]:
        """What the kernel reads of ``table``."""
        return (merged_lists if self.hopper else tile_lists)(table, self.rows, compacted)

    def launch(
        self, grid: tuple[int, ...], query: torch.Tensor, descriptors: tuple[Any, ...], tensors: KernelTensors,
        lists: Lists, sizes: KernelSizes, block: int,
    ) -> None:  # fmt: skip
        """Run the kernel; ``descriptors`` are those of keys, values and copies."""
        widths, parts = self.widths, block // self.queries
        if self.hopper:
            queries = hopper.describe(query if tensors.spans is None else of_all(query), hopper.QUERIES // 2)
            own = hopper.KernelShape(widths.D, widths.DV, self.queries, self.rows, parts, self.stages)
            hopper.launch_jobs(grid, (queries, *descriptors), tensors, lists, sizes, own)
        else:
            shape = KernelShape(*widths, self.queries, self.rows, parts)
            launch(segment_kernel, grid, *descriptors, tensors, lists, sizes,
                   SHAPE=shape, num_warps=self.warps, num_stages=self.stages)  # fmt: skip

    def describe(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """Descriptors of tiles of keys and values ``[B, H, L, .]``."""
        if self.hopper:
            return hopper.describe(key, self.rows), hopper.describe(value, self.rows)
        return describe(key, self.rows, self.widths.BD), describe(value, self.rows, self.widths.BDV)


def describe(x: torch.Tensor, rows: int, width: int) -> Any:
    """Descriptor of tiles of ``rows`` rows of ``x`` ``[B, H, L, D]``; rows and columns outside of ``x`` are 0.

    It takes rows without gaps, and a base and strides that are multiples of 16 bytes; anything else is copied.
    """
    x, shape, strides = describable(x)
    return TensorDescriptor(x, shape, strides, [1, 1, rows, width])


def of_all(x: torch.Tensor) -> torch.Tensor:
    """``x``, or one sequence of it where all are the same memory."""
    return x if x.stride(0) else x[:1]


def check_dtype(query: torch.Tensor) -> None:
    """Raise ``TypeError`` unless kernels take the dtype of ``query``, and ``RuntimeError`` where Triton is missing."""
    require_triton()
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"query: dtype {query.dtype}; the kernel takes float16, bfloat16 or float32")


def with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0: kernels take the maximum before they scale."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (torch.zeros_like(query), 1.0)


def largest_of(*pairs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The largest of keys and of values of every head ``[B, H_kv, 2]``, each from one or more tensors, by which the
    kernel scales float32."""
    norms = [[torch.linalg.vector_norm(x, math.inf, (2, 3)) for x in pair if x.shape[2]] for pair in pairs]
    return torch.stack([functools.reduce(torch.maximum, x) for x in norms], -1)


def segment_attention_triton(
    query: torch.Tensor, sources: Sources, table: SegmentTable, scale: float, into: Outputs | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`segment_attention_reference` as a Triton kernel; same arguments and results.

    All values must be finite, those that nobody attends to as well: whole tiles are read, and 0 times infinity is
    not 0. What lies outside of ``sources.spans`` is not read. Raises ``TypeError`` for dtypes other than float16,
    bfloat16 and float32.
    """
    check_dtype(query)
    query, scale = with_positive_scale(query, scale)
    key, value, compacted_key, compacted_value, index, lengths, spans = sources
    (B, H, Lq, _), (H_kv, Lk), A = query.shape, key.shape[1:3], compacted_key.shape[2]
    tiles = SegmentTiles.of(query, key, value, table.block, lengths, spans)
    BM, places = tiles.queries, [(key, value)]
    if spans is not None:  # a descriptor would copy what is expanded; the plain kernel reads by place alone
        Lq, Lk = table.queries, table.queries
        places = [(of_all(key), of_all(value)) if tiles.hopper else (key[:1], value[:1])]
    lists = Lists(*table.tiles_on(query.device, tiles, Lq, Lk, A, sources.indexed))
    described = [tiles.describe(*pair) for pair in (*places, (compacted_key, compacted_value)) if pair[0].shape[2]]
    # of a source without rows nothing is read, but a descriptor has to describe something
    (d_k, d_v), copies = described[0], described[-1]
    lengths = None if lengths is None else lengths.to(torch.int32).contiguous()
    parts = -(-(Lq + table.shift) // BM) - table.shift // BM
    outputs: tuple[Any, ...]
    if spans is None:
        tokens = strided(d_k.base), strided(d_v.base)
        outputs = into = Outputs.of(query, tiles.widths.DV)
        largest = largest_of((key, compacted_key), (value, compacted_value)) if query.dtype == torch.float32 else None
    else:
        tokens = strided(key), strided(value)
        into = spanned_outputs(query, value) if into is None else into
        outputs = tuple(strided(x) for x in into)
        parts = min(parts, query.shape[2] // BM + 2)
        largest = None
        if query.dtype == torch.float32:  # copies are none but tokens
            largest = torch.stack([spans.largest(x) for x in (key, value)], -1)
    tensors = KernelTensors(strided(query), *tokens, strided(index), lengths, largest,
                       scale * 1.4426950408889634, H // H_kv, *outputs)._replace(spans=spans)  # fmt: skip
    sizes = KernelSizes(H, Lq, table.q_offset, table.shift)
    tiles.launch((parts, B * H), query, (d_k, d_v, *copies), tensors, lists, sizes, table.block)
    return into


def segment_attention(
    query: torch.Tensor, sources: Sources, table: SegmentTable, scale: float, into: Outputs | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment attention with the kernel on CUDA and the reference elsewhere; see the reference for shapes."""
    run = segment_attention_triton if query.is_cuda else segment_attention_reference
    return run(query, sources, table, scale, into)
