"""The kernel of segment attention for Hopper, in Gluon: the work of :mod:`.segments`' kernel, specialised by warps.

As many programs as the device has multiprocessors stay and take *job* after job, each 128 queries of one head, those
with most rows first. One warp group reads tiles of keys and values into shared memory ahead of the others, those of the
next job as well: by the tensor memory accelerator what lies side by side, other rows asynchronously one by one. Two
warp groups of 64 queries each multiply: the product with the keys of a tile runs beside the one with the values of the
tile before it, and exponentials of one group overlap with products of the other.

Of :class:`..spans.Spans` the device sees which sequences lie side by side. Their tiles are read as all others are, but
at the end: padding may be NaN, of which a hidden product is NaN, too. Sequences with holes are read row by row.

On an H200 (Triton 3.6, bfloat16, D = 128, n = 32,768) it reaches 607 TFLOP/s of causal attention, where the kernel of
:mod:`.segments` has 427 and cuDNN 587, and over the 512 rows of Express 513, where that one has 371: queries see 89% of
the scores in their tiles, and jobs of 15 tiles start and end more often (``examples/bench/results/gpu-tests.txt``).
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

from ..launch import constexpr, launch, processors
from ..spans import Spans
from . import job
from .arguments import describable

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # renamed in Triton 3.8 and 3.9, which keeps old names of functions to raise an error
    load_rows, load_tile = (
        x.async_load if hasattr(x, "async_load") else x.async_copy_global_to_shared for x in (async_copy, tma)
    )
    _shared = gl.shared_memory_descriptor
    reinterpret = _shared.reinterpret if hasattr(_shared, "reinterpret") else _shared._reinterpret
except (ImportError, AttributeError):  # no Triton on this platform, or one without this Gluon: the other kernel runs
    gluon = None


def gluon_jit(fn: Callable | None = None, **options: Any) -> Any:
    """``gluon.jit``, or the plain function where there is no Gluon."""
    if fn is None:
        return functools.partial(gluon_jit, **options)
    return fn if gluon is None else gluon.jit(fn, **options)


ROWS = constexpr(64)  # queries of one group of warps
QUERIES = 128
KernelShape = namedtuple("KernelShape", "D DV BM BN PARTS STAGES")
SLOTS = constexpr(4)  # of a merged tile
CACHED = 32 << 20  # bytes of keys and values that heads which take turns have, of 50 or 60 MB of L2
VERSIONS = ("3.6.", "3.9.")  # of Triton that this was run with on a GPU; with 3.7 and 3.8 it compiles
GATHERED = constexpr(2048)  # elements of rows by index that are asked for at a time

Shared = namedtuple("Shared", "q k v q_full q_empty k_full k_empty v_full v_empty")
# Where kinds of tiles end, one after the other: copied rows, rows by index, chosen blocks, listed tokens, the tail
Work = namedtuple("Work", "first copied indexed chosen listed total tail keys")
# Which program it is: sequence and heads, the row of its first query (below 0: none), the first query that is one and
# where it stands among the tokens, the end of those that it stores results of, where rows that are no tokens begin, and
# of spans where the tokens are
Place = namedtuple("Place", "i_b i_h i_kv i_bh q_row skip position end c_b c_h c_row p_index p_chosen first_key span")
# The places of the tokens of a sequence, from which one on they are queries; the first place, and how many tokens lie
# side by side from there on, all or none
Span = namedtuple("Span", "order begin first whole")
Descriptors = namedtuple("Descriptors", "q k v copied_key copied_value slots")
# Tiles of keys or of values: the tensor, descriptors of tokens and of copies, of slots of both, and where tiles go
Stream = namedtuple("Stream", "x spans tokens copied slots_tokens slots_copied tiles full empty")
# Of all jobs that are in no table: ``parts`` of the queries of ``groups`` heads in all sequences, ``heads`` take turns.
# ``Lq`` of spans is their lead, as Triton makes constants of 1 in other tuples
Sizes = namedtuple("Sizes", "H Lq q_offset shift parts groups heads")


@gluon_jit
def _number(n):
    """The number of the n-th job of this program. Those with most rows come first, so that in every other round the
    programs take theirs in reverse."""
    i, programs = gl.program_id(0), gl.num_programs(0)
    return n * programs + gl.where(n % 2 == 0, i, programs - 1 - i)


@gluon_jit
def _parts_of(i_b, x, sizes, BM: gl.constexpr):
    """How many parts with queries a sequence of spans has, and its first query."""
    begin, length = gl.load(x.spans.begin + i_b), gl.load(x.spans.length + i_b)
    parts = gl.minimum((length + sizes.shift + BM - 1) // BM - (begin + sizes.shift) // BM, sizes.parts)
    return gl.where(begin < length, parts, 0), gl.where(begin < length, begin, 0)


@gluon_jit
def _rounds(x, lists, sizes, BM: gl.constexpr):
    """How many jobs this program has."""
    if lists.begin is not None:
        p_begin = lists.begin + gl.program_id(0)
        rounds = gl.load(p_begin + 1) - gl.load(p_begin)
    else:
        jobs = sizes.parts * sizes.groups
        if x.spans is not None:
            jobs = 0
            for i_b in range(sizes.groups // sizes.H):
                parts, begin = _parts_of(i_b, x, sizes, BM)
                jobs += parts * sizes.H
        full = jobs // gl.num_programs(0)
        rounds = full + (_number(full) < jobs).to(gl.int32)
    return rounds


@gluon_jit
def _span_of(i_b, x):
    """Where the tokens of a sequence are, and how many."""
    order, length = x.spans.order + gl.load(x.spans.start + i_b), gl.load(x.spans.length + i_b)
    first = gl.load(order)
    last = gl.load(order + gl.maximum(length - 1, 0))
    whole = gl.where(last - first == length - 1, length, 0)
    return Span(order, gl.load(x.spans.begin + i_b), first, whole), length


@gluon_jit
def _job(n, at, x, lists, sizes, SHAPE: gl.constexpr):
    """The n-th job of this program; ``at``: the sequence of an earlier one, and how many jobs come before that, of
    spans."""
    BN: gl.constexpr = SHAPE.BN
    BM: gl.constexpr = SHAPE.BM
    shift, end = sizes.shift, sizes.Lq
    blocks, first_key, span = 0, 0, ()
    if x.jobs is None:
        number = _number(n)
        parts, groups, begin = sizes.parts, sizes.groups, 0
        if x.spans is not None:
            i_b, before = at
            parts, begin = _parts_of(i_b, x, sizes, BM)
            while (number >= before + parts * sizes.H) & (i_b < groups // sizes.H - 1):
                before += parts * sizes.H
                i_b += 1
                parts, begin = _parts_of(i_b, x, sizes, BM)
            at = i_b, before
            parts, groups = gl.maximum(parts, 1), sizes.H  # a program without jobs asks as well
            number = gl.minimum(number - before, parts * groups - 1)
        section = number // (parts * sizes.heads)
        number -= section * (parts * sizes.heads)
        heads = gl.minimum(sizes.heads, groups - section * sizes.heads)
        i_bh = section * sizes.heads + number % heads
        i_part = parts - 1 - number // heads + (begin + shift) // BM  # no job for parts before the first query
        if x.spans is None:
            i_b = i_bh // sizes.H
        else:
            span, end = _span_of(i_b, x)
        i_h = i_bh % sizes.H
        i_kv = i_h // x.G
        i_block = i_part // SHAPE.PARTS
        c_b, c_h, c_row = i_b, i_kv, 0
        p_index = x.lse if x.spans is None else x.spans.order  # of no kind that is read
        if x.index.p is not None:
            p_index = x.index.p + (i_b.to(gl.int64) * x.index.b + i_kv.to(gl.int64) * x.index.h)
        p_chosen = p_index
    else:
        p_job = x.jobs + (gl.load(lists.begin + gl.program_id(0)) + n) * job.COLUMNS
        i_b = gl.load(p_job + job.SEQUENCE)
        i_h = gl.load(p_job + job.HEAD)
        i_part = gl.load(p_job + job.PART)
        i_bh = i_b * sizes.H + i_h
        i_kv = i_h // x.G
        shift, end = gl.load(p_job + job.SHIFT), gl.load(p_job + job.STOP)
        i_block = gl.load(p_job + job.TABLE) + i_part // SHAPE.PARTS
        c_b, c_h, c_row = 0, 0, gl.load(p_job + job.COPIES) + i_b * gl.load(p_job + job.COPIES_B)
        p_chosen = x.chosen + (gl.load(p_job + job.CHOSEN) + i_b * gl.load(p_job + job.CHOSEN_B))
        p_index = p_chosen
        if x.index.p is not None:
            p_index = x.index.p + (gl.load(p_job + job.INDEX) + i_b * gl.load(p_job + job.INDEX_B))
        blocks, first_key = gl.load(p_job + job.BLOCKS), gl.load(p_job + job.FIRST)
    p_start = lists.start + i_block * 3
    first = gl.load(p_start)
    copied = gl.load(p_start + 1) - first
    indexed = gl.load(p_start + 2) - first
    chosen = indexed + (blocks * 64 + BN - 1) // BN
    listed = gl.load(p_start + 3) - first + chosen - indexed
    tail = gl.load(lists.tail + i_block)
    q_row = i_part * BM - shift
    skip = gl.maximum(-q_row, 0)
    position = sizes.q_offset + q_row + skip
    stop = sizes.q_offset + gl.minimum(q_row + BM, end)
    total = gl.maximum(listed + (gl.maximum(stop - tail, 0) + BN - 1) // BN, 1)
    work = Work(first, copied, indexed, chosen, listed, total, tail, blocks * 64)
    own = i_b, i_h, i_kv, i_bh, q_row, skip, position, end, c_b, c_h, c_row, p_index, p_chosen, first_key, span
    return work, Place(*own), at


@gluon_jit
def _tile(j, work, lists, BN: gl.constexpr):
    """First row, rows that are shown, and log2-weight of tile j, and how much the second to fourth of its slots have
    more than that; of rows by index the place in the index, and of chosen blocks the row among all of them. A merged
    tile has row -1."""
    in_list = (j < work.indexed) | ((j >= work.chosen) & (j < work.listed))
    at = work.first + j - gl.where(j < work.indexed, 0, work.chosen - work.indexed)
    row = gl.load(lists.tiles + 2 * at, mask=in_list, other=0)
    shown = gl.load(lists.tiles + 2 * at + 1, mask=in_list, other=BN)
    of_chosen = (j >= work.indexed) & (j < work.chosen)
    weight = gl.load(lists.log2_weight + 4 * at, mask=in_list, other=0.0)
    w_1 = gl.load(lists.log2_weight + 4 * at + 1, mask=in_list, other=0.0)
    w_2 = gl.load(lists.log2_weight + 4 * at + 2, mask=in_list, other=0.0)
    w_3 = gl.load(lists.log2_weight + 4 * at + 3, mask=in_list, other=0.0)
    row = gl.where(of_chosen, (j - work.indexed) * BN, row)
    shown = gl.where(of_chosen, gl.minimum(work.keys - row, BN), shown)
    return gl.where(j < work.listed, row, work.tail + (j - work.listed) * BN), shown, weight, (w_1, w_2, w_3)


@gluon_jit
def _gather(target, p, n, p_from, ends):
    """Rows into shared memory, some at a time: those that ``p_from`` lists from the first of ``ends`` on, of the memory
    at ``p``, ``n`` elements each. In place of what is listed before the second or from the third on come copies of the
    nearest row that is not."""
    BN: gl.constexpr = target.shape[0]
    D: gl.constexpr = target.shape[1]
    STEP: gl.constexpr = GATHERED // D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    begin, least, stop = ends
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
    rows = ()  # all at once: loads between copies would wait for one another
    for i in gl.static_range(BN // STEP):
        o_row = gl.minimum(o_n + (begin + i * STEP), stop - 1)
        if least is not None:
            o_row = gl.maximum(o_row, least)
        rows = rows + (gl.load(p_from + o_row),)  # type: ignore[assignment]
    for i in gl.static_range(BN // STEP):
        pointers = p + rows[i].to(gl.int64)[:, None] * n + o_d[None, :]
        load_rows(target.slice(i * STEP, STEP, 0), pointers)


@gluon_jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers. Carried on, not computed from a count of tiles: ptxas
    keeps these in uniform registers, and with them addresses of barriers, which else every lane has of its own."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon_jit
def _before(stage, phase, STAGES: gl.constexpr):
    """The stage before this one, and the phase of its barriers."""
    first = stage == 0
    return gl.where(first, STAGES - 1, stage - 1), gl.where(first, phase ^ 1, phase)


@gluon_jit
def _pieces(stream):
    """The slots of all tiles, of which 64 columns lie together."""
    STAGES: gl.constexpr = stream.tiles.shape[0]
    SIZE: gl.constexpr = stream.tiles.shape[3] // SLOTS
    COUNT: gl.constexpr = STAGES * (stream.tiles.shape[4] // 64) * SLOTS
    return reinterpret(stream.tiles, stream.tiles.dtype, [COUNT, 1, 1, SIZE, 64], stream.slots_tokens.layout)


@gluon_jit
def _head(x, i_b, i_h):
    """The first row of a head."""
    return x.p + (i_b.to(gl.int64) * x.b + i_h.to(gl.int64) * x.h)


@gluon_jit
def _gather_tile(stream, stage, j, row, shown, work, place):
    """A tile of rows by index, or of spans one of tokens."""
    target = stream.tiles.index(stage).reshape([stream.tiles.shape[3], stream.tiles.shape[4]])
    p, p_from, ends = _head(stream.x, place.i_b, place.i_kv), place.p_index + row, (0, None, shown)
    if stream.spans is not None:
        of_index = j < work.indexed
        p_from = gl.where(of_index, place.p_index, place.span.order)
        ends = row, None, gl.where(of_index, row + shown, place.end)
    _gather(target, p, stream.x.n, p_from, ends)


@gluon_jit
def _gather_slots(stream, stage, place, p_slots):
    """The slots of a merged tile that are tokens of spans and not to be read side by side; how many others it has."""
    SIZE: gl.constexpr = stream.tiles.shape[3] // SLOTS
    COLUMNS: gl.constexpr = stream.tiles.shape[4] // 64
    p, pieces = _head(stream.x, place.i_b, place.i_kv), _pieces(stream)
    others = SLOTS
    for i in range(SLOTS):
        token = -1 - gl.load(p_slots + i)
        if (token >= 0) & (token + SIZE > place.span.whole):
            for c in gl.static_range(COLUMNS):
                target = pieces.index((stage * COLUMNS + c) * SLOTS + i).reshape([SIZE, 64])
                _gather(target, p + 64 * c, stream.x.n, place.span.order, (token, None, place.end))
            others -= 1
    return others


@gluon_jit
def _load_blocks(stream, stage, row, shown, place):
    """A tile of chosen blocks."""
    COLUMNS: gl.constexpr = stream.tiles.shape[4] // 64
    SIZE: gl.constexpr = stream.tiles.shape[3] // SLOTS
    pieces, full = _pieces(stream), stream.full.index(stage)
    p_block = place.p_chosen + row // 64
    first = gl.load(p_block), gl.load(p_block + gl.where(shown > 64, 1, 0))  # or the last one twice
    for i in gl.static_range(SLOTS):
        own = place.first_key + first[i * SIZE // 64] * 64 + i * SIZE % 64
        for c in gl.static_range(COLUMNS):
            piece = pieces.index((stage * COLUMNS + c) * SLOTS + i)
            load_tile(stream.slots_tokens, [place.i_b, place.i_kv, own, 64 * c], full, piece)


@gluon_jit
def _load_slots(stream, stage, p_slots, place, i_b, i_first):
    """The slots of a merged tile that lie side by side; tokens from place ``i_first`` on."""
    COLUMNS: gl.constexpr = stream.tiles.shape[4] // 64
    SIZE: gl.constexpr = stream.tiles.shape[3] // SLOTS
    pieces, full = _pieces(stream), stream.full.index(stage)
    slots = (gl.load(p_slots), gl.load(p_slots + 1), gl.load(p_slots + 2), gl.load(p_slots + 3))
    for i in gl.static_range(SLOTS):
        slot = slots[i]
        for c in gl.static_range(COLUMNS):
            piece = pieces.index((stage * COLUMNS + c) * SLOTS + i)
            if slot >= 0:
                at = [place.c_b, place.c_h, place.c_row + slot, 64 * c]
                load_tile(stream.slots_copied, at, full, piece)
            elif (stream.spans is None) or (SIZE - 1 - slot <= place.span.whole):
                load_tile(stream.slots_tokens, [i_b, place.i_kv, i_first + (-1 - slot), 64 * c], full, piece)


@gluon_jit
def _fill(stream, stage, phase, j, row, shown, work, place, lists, CHOSEN: gl.constexpr):
    """Tile j of a job, as soon as there is room for it; ``CHOSEN``: it may be one of chosen blocks."""
    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
    i_b, i_first, by_row = place.i_b, 0, (j >= work.copied) & (j < work.indexed)
    if stream.spans is not None:
        i_b, i_first = gl.where(stream.x.b == 0, 0, i_b), place.span.first  # the batch may be one tensor, expanded
        by_row = by_row | ((j >= work.indexed) & (row + stream.tiles.shape[3] > place.span.whole))
    if (stream.x is not None) and by_row:
        _gather_tile(stream, stage, j, row, shown, work, place)
        async_copy.mbarrier_arrive(full)
        mbarrier.arrive(full)
    else:
        nbytes: gl.constexpr = stream.tokens.block_type.nbytes
        if (stream.spans is not None) and ((j < work.copied) & (row < 0)):
            others = _gather_slots(stream, stage, place, lists.slots + SLOTS * (work.first + j))
            async_copy.mbarrier_arrive(full)
            for i in gl.static_range(SLOTS + 1):  # a number of bytes is a constant
                mbarrier.expect(full, i * (nbytes // SLOTS), pred=others == i)
        else:
            mbarrier.expect(full, nbytes)
        tile = stream.tiles.index(stage)
        if CHOSEN and ((j >= work.indexed) & (j < work.chosen)):
            _load_blocks(stream, stage, row, shown, place)
        elif j >= work.copied:
            load_tile(stream.tokens, [i_b, place.i_kv, i_first + row, 0], full, tile)
        elif row >= 0:
            load_tile(stream.copied, [place.c_b, place.c_h, place.c_row + row, 0], full, tile)
        else:
            _load_slots(stream, stage, lists.slots + SLOTS * (work.first + j), place, i_b, i_first)


@gluon_jit
def _gather_queries(x, place, shared, sizes, q_phase):
    """Of a sequence of spans whose tokens do not lie side by side."""
    D: gl.constexpr = shared.q.shape[4]
    p = _head(x.q, place.i_b, place.i_h) - sizes.Lq.to(gl.int64) * x.q.n
    for half in range(2):
        full = shared.q_full.index(half)
        mbarrier.wait(shared.q_empty.index(half), q_phase ^ 1)
        ends = place.q_row + ROWS * half, place.span.begin, place.end
        _gather(shared.q.index(half).reshape([ROWS, D]), p, x.q.n, place.span.order, ends)
        async_copy.mbarrier_arrive(full)
        mbarrier.arrive(full)


@gluon_jit
def _produce(d, x, lists, shared, sizes, SHAPE: gl.constexpr):
    BN: gl.constexpr = SHAPE.BN
    CHOSEN: gl.constexpr = x.jobs is not None
    x_k, x_v = None, None
    if (x.index.p is not None) or (x.spans is not None):
        x_k, x_v = x.k, x.v
    k_slots, v_slots, ck_slots, cv_slots = d.slots
    keys = Stream(x_k, x.spans, d.k, d.copied_key, k_slots, ck_slots, shared.k, shared.k_full, shared.k_empty)
    values = Stream(x_v, x.spans, d.v, d.copied_value, v_slots, cv_slots, shared.v, shared.v_full, shared.v_empty)
    stage, phase, q_phase, at = 0, 0, 0, (0, 0)
    for n in range(_rounds(x, lists, sizes, SHAPE.BM)):
        work, place, at = _job(n, at, x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        q_b, q_row, side_by_side = place.i_b, place.q_row, True
        if x.spans is not None:
            q_b, q_row = gl.where(x.q.b == 0, 0, q_b), q_row + (place.span.first - sizes.Lq)
            side_by_side = place.span.whole > 0
            if place.span.whole == 0:
                _gather_queries(x, place, shared, sizes, q_phase)
        for j in range(work.total):
            next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
            _fill(keys, stage, phase, j, row, shown, work, place, lists, CHOSEN)
            if (j == 0) & side_by_side:  # behind its first keys: there is room for queries a tile later than for these
                for half in gl.static_range(2):
                    full = shared.q_full.index(half)
                    mbarrier.wait(shared.q_empty.index(half), q_phase ^ 1)
                    mbarrier.expect(full, d.q.block_type.nbytes)
                    load_tile(d.q, [q_b, place.i_h, q_row + ROWS * half, 0], full, shared.q.index(half))
            _fill(values, stage, phase, j, row, shown, work, place, lists, CHOSEN)
            stage, phase = next_stage(stage, phase, SHAPE.STAGES)
            row, shown = next_row, next_shown
        q_phase = q_phase ^ 1


@gluon_jit
def _hide(b_s, j, row, shown, more, work, place, scale_log2, half):
    """Scores of rows that a query does not see become -inf; those of other slots than the first get what these weigh
    more."""
    BN: gl.constexpr = b_s.shape[1]
    SIZE: gl.constexpr = BN // SLOTS
    LAYOUT: gl.constexpr = b_s.type.layout
    in_tail = j >= work.listed
    if (j < work.copied) & (row < 0):
        w_1, w_2, w_3 = more
        o_n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        late = gl.where(o_n < 3 * SIZE, w_2, w_3)
        b_more = gl.where(o_n < SIZE, 0.0, gl.where(o_n < 2 * SIZE, w_1, late)) / scale_log2
        b_s = b_s + b_more[None, :]
    shown = gl.where(in_tail, place.position + 1 - row, shown)
    if shown < BN:
        o_m = gl.maximum(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + ROWS * half - place.skip, 0)
        o_m = shown + gl.where(in_tail, o_m, 0)
        o_n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        b_s = gl.where(o_n[None, :] < o_m[:, None], b_s, float("-inf"))
    return b_s


@gluon_jit
def _finish(b_acc, b_max, b_sum, done, x, sizes, half: gl.constexpr):
    """Store the results of a job: not by TMA, as kernels that did ended with an illegal instruction on an H200, with
    waits for barriers by lane and with uniform ones."""
    DV: gl.constexpr = b_acc.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, b_acc.type.layout)
    b_sum = gl.convert_layout(b_sum, ROW)
    b_out = b_acc / b_sum[:, None]
    b_lse = (gl.convert_layout(b_max, ROW) + gl.log2(b_sum)) * 0.6931471805599453
    o_m = done.q_row + ROWS * half + gl.arange(0, ROWS, ROW)
    if x.spans is None:
        m_m = (o_m >= 0) & (o_m < done.end)
        o_row = done.i_bh.to(gl.int64) * sizes.Lq + o_m
        p_out, stride_o, p_lse, o_lse = x.out, DV, x.lse, o_row
    else:
        m_m = (o_m >= done.span.begin) & (o_m < done.end)
        o_row = (gl.load(done.span.order + o_m, mask=m_m, other=0) - sizes.Lq).to(gl.int64)
        p_out, stride_o = _head(x.out, done.i_b, done.i_h), x.out.n
        p_lse, o_lse = _head(x.lse, done.i_b, done.i_h), o_row * x.lse.n
    o_d = gl.arange(0, DV, gl.SliceLayout(0, b_acc.type.layout))
    dtype: gl.constexpr = p_out.dtype.element_ty
    gl.store(p_out + o_row[:, None] * stride_o + o_d[None, :], b_out.to(dtype), mask=m_m[:, None])
    gl.store(p_lse + o_lse, b_lse, mask=m_m)


@gluon_jit
def _consume(x, lists, shared, sizes, half: gl.constexpr, SHAPE: gl.constexpr):
    """Job after job."""
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    D: gl.constexpr = SHAPE.D
    DV: gl.constexpr = SHAPE.DV
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, O_L)
    BY_ROW: gl.constexpr = (x.index.p is not None) or (x.spans is not None)
    dtype: gl.constexpr = shared.q.dtype
    scale_log2 = x.scale_log2
    b_zero = gl.zeros([ROWS, BN], gl.float32, S_L)
    stage, phase, q_phase = 0, 0, 0
    rounds = _rounds(x, lists, sizes, SHAPE.BM)
    work, place, at = _job(0, (0, 0), x, lists, sizes, SHAPE)
    row, shown, weight, more = _tile(0, work, lists, BN)
    for n in range(rounds):
        b_acc = gl.zeros([ROWS, DV], gl.float32, O_L)
        q = shared.q.index(half).reshape([ROWS, D])
        mbarrier.wait(shared.q_full.index(half), q_phase)
        mbarrier.wait(shared.k_full.index(stage), phase)
        if BY_ROW:  # products see such tiles behind a fence
            fence_async_shared()
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        b_s = warpgroup_mma(q, k, b_zero, use_acc=False)
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
        b_s = _hide(b_s, 0, row, shown, more, work, place, scale_log2, half)
        b_max = gl.maximum(gl.max(b_s, 1) * scale_log2 + weight, -1e30)
        b_w = gl.exp2(b_s * scale_log2 - (b_max - weight)[:, None])
        b_sum = gl.sum(b_w, 1)
        b_p = gl.convert_layout(b_w.to(dtype), P_L)
        row, shown, weight, more = _tile(1, work, lists, BN)
        stage, phase = next_stage(stage, phase, STAGES)
        for j in range(1, work.total):
            before, before_phase = _before(stage, phase, STAGES)
            mbarrier.wait(shared.k_full.index(stage), phase)
            if BY_ROW:
                fence_async_shared()
            k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
            s_token = warpgroup_mma(q, k, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(shared.v_full.index(before), before_phase)
            if BY_ROW:
                fence_async_shared()
            v = shared.v.index(before).reshape([BN, DV])
            o_token = warpgroup_mma(b_p, v, b_acc, is_async=True)
            next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
            b_s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(shared.k_empty.index(stage))
            mbarrier.arrive(shared.q_empty.index(half), pred=j + 1 == work.total)
            b_s = _hide(b_s, j, row, shown, more, work, place, scale_log2, half)
            b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2 + weight)
            b_w = gl.exp2(b_s * scale_log2 - (b_new - weight)[:, None])
            b_rescale = gl.exp2(b_max - b_new)
            b_sum = b_sum * b_rescale + gl.sum(b_w, 1)
            b_max = b_new
            b_acc = warpgroup_mma_wait(0, deps=[o_token])
            mbarrier.arrive(shared.v_empty.index(before))
            b_acc = b_acc * gl.convert_layout(b_rescale, ROW)[:, None]
            b_p = gl.convert_layout(b_w.to(dtype), P_L)
            row, shown, weight, more = next_row, next_shown, next_weight, next_more
            stage, phase = next_stage(stage, phase, STAGES)
        done = place
        work, place, at = _job(gl.minimum(n + 1, rounds - 1), at, x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        before, before_phase = _before(stage, phase, STAGES)
        mbarrier.wait(shared.v_full.index(before), before_phase)
        if BY_ROW:
            fence_async_shared()
        b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc)
        mbarrier.arrive(shared.v_empty.index(before))
        _finish(b_acc, b_max, b_sum, done, x, sizes, half)
        q_phase = q_phase ^ 1


@gluon_jit(do_not_specialize=["sizes"])
def segment_kernel(d_q, d_k, d_v, d_ck, d_cv, d_sk, d_sv, d_sck, d_scv, x, lists, sizes, SHAPE: gl.constexpr):
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    shared = Shared(
        gl.allocate_shared_memory(d_q.dtype, [2, 1, 1, ROWS, SHAPE.D], d_q.layout),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, BN, SHAPE.D], d_k.layout),
        gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, 1, BN, SHAPE.DV], d_v.layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=2)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.v_empty.index(i), count=2)
    d = Descriptors(d_q, d_k, d_v, d_ck, d_cv, (d_sk, d_sv, d_sck, d_scv))
    gl.warp_specialize(
        [
            (_consume, (x, lists, shared, sizes, 0, SHAPE)),
            (_consume, (x, lists, shared, sizes, 1, SHAPE)),
            (_produce, (d, x, lists, shared, sizes, SHAPE)),
        ],
        [4, 4],
        [224, 56] if x.spans is None else [216, 72],
    )


def launch_jobs(
    grid: tuple[int, ...], described: tuple[Any, ...], tensors: Any, lists: Any, sizes: Any, shape: KernelShape
) -> None:
    """Run the kernel for the programs that the one of :mod:`.segments` would have in ``grid``; ``described``: queries,
    keys, values, and copies of these. Heads whose keys and values the L2 cache holds together take turns, unless there
    is a table of jobs, in which each program has its own."""
    group = 2 * sum(x.shape[2] * x.shape[3] for x in described[1:3])  # bytes of a KV head
    parts, groups = grid
    turns = groups
    if tensors.spans is not None:
        turns, sizes = sizes.H, sizes._replace(Lq=tensors.spans.lead)
        tensors = tensors._replace(spans=tensors.spans._replace(lead=0))
    every = Sizes(*sizes, *grid, min(max(CACHED // group, 1) * tensors.G, turns))  # type: ignore[call-arg]
    most = min(processors(described[0].base.device), parts * groups)
    programs = most if lists.begin is None else len(lists.begin) - 1
    block = [1, 1, shape.BN // SLOTS.value, 64]
    slots = [TensorDescriptor(x.base, x.shape, x.strides, block, _layout()) for x in described[1:]]
    launch(segment_kernel, (programs,), *described, *slots, tensors, lists, every, SHAPE=shape, num_warps=4)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, spans: Spans | None = None) -> bool:
    """Whether this kernel runs these tensors, for blocks of ``block`` queries: float16 and bfloat16, head sizes 64 and
    128, not both 64 (where it was no faster on an H200), on Hopper, with strides that let a row by index be copied 16
    bytes at a time; with ``spans`` also rows of queries, and a memory that descriptors take as it is."""
    own = (key, value) if spans is None else (query, key, value)
    sizes = {query.shape[3], value.shape[3]} in ({128}, {64, 128})
    placed = spans is None or not any(x.data_ptr() % 16 for x in own)
    return block == QUERIES and sizes and placed and runs(query, *own)


def runs(query: torch.Tensor, *copied: torch.Tensor) -> bool:
    """Whether kernels like this one run ``query``, of which rows of ``copied`` can be copied 16 bytes at a time."""
    return (
        gluon is not None
        and query.is_cuda
        and query.element_size() == 2
        and all(x.stride(3) == 1 and not any(stride % 16 for stride in x.stride()[:3]) for x in copied)
        and triton.__version__.startswith(VERSIONS)
        and _is_hopper(query.device)
    )


@functools.cache
def _layout() -> Any:
    return gl.NVMMASharedLayout(128, 16, 4)


def describe(x: torch.Tensor, rows: int) -> Any:
    """Descriptor of tiles of ``rows`` rows of ``x`` ``[B, H, L, D]``, half floats, D 64 or 128."""
    x, shape, strides = describable(x)
    return TensorDescriptor(x, shape, strides, [1, 1, rows, shape[3]], _layout())
