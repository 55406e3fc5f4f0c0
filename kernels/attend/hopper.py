"""The kernel of segment attention for Hopper, in Gluon: the work of :mod:`.segments`' kernel, specialised by warps.

One warp group reads tiles of keys and values into shared memory ahead of the others: by the tensor memory accelerator
what lies side by side, rows by index asynchronously one by one. Two warp groups of 64 queries each multiply: the
product with the keys of a tile runs beside the one with the values of the tile before it, and exponentials of one group
overlap with products of the other.

Programs stay, one on each multiprocessor, and take job after job, where a job is 128 queries of one head: the rows of
the next one are read, and its first scores computed, while the results of the last one are on their way. Which program
has which jobs changes no bit of any result.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

from ..launch import constexpr, launch
from . import job
from .arguments import KernelSizes, KernelTensors, Lists, describable

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
except ImportError:  # no Triton on this platform, or one without Gluon: the other kernel runs
    gluon = None


def _jit(fn: Callable | None = None, **options: Any) -> Any:
    """``gluon.jit``, or the plain function where there is no Gluon."""
    if fn is None:
        return functools.partial(_jit, **options)
    return fn if gluon is None else gluon.jit(fn, **options)


ROWS = constexpr(64)  # queries of one group of warps
QUERIES = 128
KernelShape = namedtuple("KernelShape", "D DV BM BN PARTS STAGES")
VERSIONS = ("3.6.",)  # of Triton that this was tried with; Gluon changes from one to the next
CACHED = 32 << 20  # bytes of keys and values that heads which take turns have, of 50 or 60 MB of L2
GATHERED = constexpr(2048)  # elements of rows by index that are asked for at a time

Shared = namedtuple("Shared", "q k v q_full q_empty k_full k_empty v_full v_empty")
# A job: a part of the queries of one head, the row of its first query (below 0: none), and where kinds of tiles end,
# one after another: copied rows, rows by index, chosen blocks, listed tokens, the tail
Work = namedtuple("Work", "i_bh q_row first copied indexed chosen listed total tail sinks stop keys length")
# Where its rows are that are no tokens
Place = namedtuple("Place", "i_b i_h i_kv c_b c_h c_row p_index p_chosen first_key")
Descriptors = namedtuple("Descriptors", "q k v copied_key copied_value")
# Tiles of keys or of values: the tensor, the index of its rows and counts of sinks if there are any, descriptors of it
# and of copies, and where tiles go
Stream = namedtuple("Stream", "x index sinks tokens copied tiles full empty")
# Of all jobs: ``parts`` of the queries of ``groups`` heads in all sequences (or jobs of a table, and sequences), of
# which ``heads`` take turns
Sizes = namedtuple("Sizes", "H Lq q_offset shift parts groups heads")


@_jit
def _number(n, sizes):
    """The n-th job of this program. Jobs with most rows come first, so that in every other round the programs take
    theirs in reverse."""
    i, programs = gl.program_id(0), gl.num_programs(0)
    return n * programs + gl.where(n % 2 == 0, i, programs - 1 - i)


@_jit
def _rounds(sizes):
    """How many jobs this program has."""
    jobs = sizes.parts * sizes.groups
    full = jobs // gl.num_programs(0)
    return full + (_number(full, sizes) < jobs).to(gl.int32)


@_jit
def _job(n, x, lists, sizes, SHAPE: gl.constexpr):
    """The n-th job of this program."""
    BN: gl.constexpr = SHAPE.BN
    BM: gl.constexpr = SHAPE.BM
    shift = sizes.shift
    number = _number(n, sizes)
    blocks, first_key = 0, 0
    if x.jobs is None:
        section = number // (sizes.parts * sizes.heads)
        number -= section * (sizes.parts * sizes.heads)
        heads = gl.minimum(sizes.heads, sizes.groups - section * sizes.heads)
        i_bh = section * sizes.heads + number % heads
        i_part = sizes.parts - 1 - number // heads + shift // BM  # no job for parts before the first query
        i_b = i_bh // sizes.H
        i_h = i_bh % sizes.H
        i_kv = i_h // x.G
        i_block = i_part // SHAPE.PARTS
        c_b, c_h, c_row = i_b, i_kv, 0
        p_index = x.lse  # of no kind that is read
        if x.index.p is not None:
            p_index = x.index.p + (i_b.to(gl.int64) * x.index.b + i_kv.to(gl.int64) * x.index.h)
        p_chosen = p_index
    else:
        p_job = x.jobs + number // sizes.groups * job.COLUMNS
        i_b = number % sizes.groups
        i_h = gl.load(p_job + job.HEAD)
        i_part = gl.load(p_job + job.PART)
        i_bh = i_b * sizes.H + i_h
        i_kv = i_h // x.G
        shift = gl.load(p_job + job.SHIFT)
        i_block = gl.load(p_job + job.TABLE) + i_part // SHAPE.PARTS
        c_b, c_h, c_row = 0, 0, gl.load(p_job + job.COPIES) + i_b * gl.load(p_job + job.COPIES_B)
        p_index = x.index.p + (gl.load(p_job + job.INDEX) + i_b * gl.load(p_job + job.INDEX_B))
        p_chosen = x.chosen + (gl.load(p_job + job.CHOSEN) + i_b * gl.load(p_job + job.CHOSEN_B))
        blocks, first_key = gl.load(p_job + job.BLOCKS), gl.load(p_job + job.FIRST)
    p_start = lists.start + i_block * 3
    first = gl.load(p_start)
    copied = gl.load(p_start + 1) - first
    indexed = gl.load(p_start + 2) - first
    chosen = indexed + (blocks * 64 + BN - 1) // BN
    listed = gl.load(p_start + 3) - first + chosen - indexed
    tail = gl.load(lists.tail + i_block)
    q_row = i_part * BM - shift
    stop = sizes.q_offset + gl.minimum(q_row + BM, sizes.Lq)
    # queries without rows see one hidden tile
    total = gl.maximum(listed + (gl.maximum(stop - tail, 0) + BN - 1) // BN, 1)
    sinks = 0
    if lists.sinks is not None:
        sinks = gl.load(lists.sinks + i_block)
    length = 0
    if x.lengths is not None:
        length = gl.load(x.lengths + i_b)
    work = Work(i_bh, q_row, first, copied, indexed, chosen, listed, total, tail, sinks, stop, blocks * 64, length)
    return work, Place(i_b, i_h, i_kv, c_b, c_h, c_row, p_index, p_chosen, first_key)


@_jit
def _tile(j, work, x, lists, BN: gl.constexpr):
    """First row, rows that are shown, and log2-weight of tile j; of rows by index the place in the index, and of chosen
    blocks the row among all of them."""
    in_list = (j < work.indexed) | ((j >= work.chosen) & (j < work.listed))
    at = work.first + j - gl.where(j < work.indexed, 0, work.chosen - work.indexed)
    row = gl.load(lists.tiles + 2 * at, mask=in_list, other=0)
    shown = gl.load(lists.tiles + 2 * at + 1, mask=in_list, other=BN)
    weight = gl.load(lists.log2_weight + at, mask=in_list, other=0.0)
    of_chosen = (j >= work.indexed) & (j < work.chosen)
    row = gl.where(of_chosen, (j - work.indexed) * BN, row)
    shown = gl.where(of_chosen, gl.minimum(work.keys - row, BN), shown)
    if x.lengths is not None:
        shown = gl.where(j < work.copied, gl.minimum(shown, work.length - row), shown)
    return gl.where(j < work.listed, row, work.tail + (j - work.listed) * BN), shown, weight


@_jit
def _gather(target, stream, place, by_index, sinks, row, shown):
    """Rows by index, or those of chosen blocks of 64 keys, or with ``sinks`` so many first tokens and the tail from
    there on, into shared memory, some at a time; behind ``shown`` of them come copies of the last one."""
    BN: gl.constexpr = target.shape[0]
    D: gl.constexpr = target.shape[1]
    STEP: gl.constexpr = GATHERED // D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    x = stream.x
    p = x.p + (place.i_b.to(gl.int64) * x.b + place.i_kv.to(gl.int64) * x.h)
    p_from = place.p_index + row
    if not by_index:
        p_from = place.p_chosen + row // 64
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(BN // STEP):
        o_row = gl.minimum(o_n + i * STEP, shown - 1)
        i_row = o_row + gl.where(o_row < sinks, 0, row)
        if stream.index is not None:
            listed = gl.load(p_from + gl.where(by_index, o_row, o_row // 64), mask=o_row >= sinks * BN, other=0)
            listed = gl.where(by_index, listed, place.first_key + listed * 64 + o_row % 64)
            i_row = gl.where(sinks > 0, i_row, listed)
        pointers = p + i_row.to(gl.int64)[:, None] * x.n + o_d[None, :]
        async_copy.async_copy_global_to_shared(target.slice(i * STEP, STEP, 0), pointers)


@_jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers.

    Carried from tile to tile they stay in uniform registers. From a count of tiles ptxas computes the address of a
    barrier for every lane, so that lanes of a warp wait for themselves, while Triton says that they go on together.
    """
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@_jit
def _fill(stream, stage, phase, j, row, shown, work, place):
    """Tile j of a job, as soon as there is room for it."""
    BN: gl.constexpr = stream.tiles.shape[3]
    D: gl.constexpr = stream.tiles.shape[4]
    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
    sinks = gl.where(j == work.listed, work.sinks, 0)
    gathered = ((j >= work.copied) & (j < work.chosen)) | (sinks > 0)
    if ((stream.index is not None) or (stream.sinks is not None)) and gathered:
        shown = gl.where(sinks > 0, work.stop - row, shown)
        _gather(stream.tiles.index(stage).reshape([BN, D]), stream, place, j < work.indexed, sinks, row, shown)
        async_copy.mbarrier_arrive(full)
        mbarrier.arrive(full)
    else:
        mbarrier.expect(full, stream.tokens.block_type.nbytes)
        tile = stream.tiles.index(stage)
        if j < work.copied:
            at = [place.c_b, place.c_h, place.c_row + row, 0]
            tma.async_copy_global_to_shared(stream.copied, at, full, tile)
        else:
            tma.async_copy_global_to_shared(stream.tokens, [place.i_b, place.i_kv, row, 0], full, tile)


@_jit
def _produce(d, x, lists, shared, sizes, SHAPE: gl.constexpr):
    keys = Stream(x.k, x.index.p, lists.sinks, d.k, d.copied_key, shared.k, shared.k_full, shared.k_empty)
    values = Stream(x.v, x.index.p, lists.sinks, d.v, d.copied_value, shared.v, shared.v_full, shared.v_empty)
    stage, phase, side, side_phase = 0, 0, 0, 0
    for n in range(_rounds(sizes)):
        work, place = _job(n, x, lists, sizes, SHAPE)
        for half in gl.static_range(2):
            at = side * 2 + half
            full = shared.q_full.index(at)
            mbarrier.wait(shared.q_empty.index(at), side_phase ^ 1)
            mbarrier.expect(full, d.q.block_type.nbytes)
            q_row = work.q_row + ROWS * half
            tma.async_copy_global_to_shared(d.q, [place.i_b, place.i_h, q_row, 0], full, shared.q.index(at))
        for j in range(work.total):
            row, shown, weight = _tile(j, work, x, lists, SHAPE.BN)
            _fill(keys, stage, phase, j, row, shown, work, place)
            _fill(values, stage, phase, j, row, shown, work, place)
            stage, phase = _next(stage, phase, SHAPE.STAGES)
        side, side_phase = _next(side, side_phase, 2)


@_jit
def _hide(b_s, j, row, shown, work, sizes, half):
    """Scores of rows that a query does not see become -inf."""
    BN: gl.constexpr = b_s.shape[1]
    LAYOUT: gl.constexpr = b_s.type.layout
    in_tail = j >= work.listed
    shown = gl.where(in_tail, sizes.q_offset + gl.maximum(work.q_row, 0) + 1 - row, shown)
    if shown < BN:
        o_m = gl.maximum(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + ROWS * half + gl.minimum(work.q_row, 0), 0)
        o_m = shown + gl.where(in_tail, o_m, 0)
        o_n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        b_s = gl.where(o_n[None, :] < o_m[:, None], b_s, float("-inf"))
    return b_s


@_jit
def _finish(b_acc, b_max, b_sum, done, x, sizes, half: gl.constexpr):
    """Store the results of a job."""
    DV: gl.constexpr = b_acc.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, b_acc.type.layout)
    i_bh, q_row = done
    b_sum = gl.convert_layout(b_sum, ROW)
    b_out = gl.where((b_sum > 0)[:, None], b_acc / b_sum[:, None], 0.0)
    b_lse = (gl.convert_layout(b_max, ROW) + gl.log2(b_sum)) * 0.6931471805599453
    o_m = q_row + ROWS * half + gl.arange(0, ROWS, ROW)
    m_m = (o_m >= 0) & (o_m < sizes.Lq)
    o_row = i_bh.to(gl.int64) * sizes.Lq + o_m
    o_d = gl.arange(0, DV, gl.SliceLayout(0, b_acc.type.layout))
    gl.store(x.out + o_row[:, None] * DV + o_d[None, :], b_out.to(x.out.dtype.element_ty), mask=m_m[:, None])
    gl.store(x.lse + o_row, b_lse, mask=m_m)


@_jit
def _consume(x, lists, shared, sizes, half: gl.constexpr, SHAPE: gl.constexpr):
    """All tiles of all jobs in one loop: the first scores of a job run beside the last values of the one before."""
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    D: gl.constexpr = SHAPE.D
    DV: gl.constexpr = SHAPE.DV
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, O_L)
    dtype: gl.constexpr = shared.q.dtype
    scale_log2 = x.scale_log2
    b_acc = gl.zeros([ROWS, DV], gl.float32, O_L)
    b_zero = gl.zeros([ROWS, BN], gl.float32, S_L)
    rounds = _rounds(sizes)
    work, place = _job(0, x, lists, sizes, SHAPE)

    row, shown, weight = _tile(0, work, x, lists, BN)
    mbarrier.wait(shared.q_full.index(half), 0)
    mbarrier.wait(shared.k_full.index(0), 0)
    if (x.index.p is not None) or (lists.sinks is not None):
        fence_async_shared()
    q = shared.q.index(half).reshape([ROWS, D])
    b_s = warpgroup_mma(q, shared.k.index(0).reshape([BN, D]).permute((1, 0)), b_zero, use_acc=False)
    mbarrier.arrive(shared.k_empty.index(0))
    mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
    b_s = _hide(b_s, 0, row, shown, work, sizes, half)
    b_max = gl.maximum(gl.max(b_s, 1) * scale_log2 + weight, -1e30)
    b_w = gl.exp2(b_s * scale_log2 - (b_max - weight)[:, None])
    b_sum = gl.sum(b_w, 1)
    b_p = gl.convert_layout(b_w.to(dtype), P_L)

    done = (work.i_bh, work.q_row)
    # the tile to come is number ``j`` of job ``n``, and the last one was number ``added`` of its own
    n, j, added = 0, 1, 0
    before, before_phase, side, side_phase = 0, 0, 0, 0
    stage, phase = _next(before, before_phase, STAGES)
    if work.total == 1:
        n, j, side = 1, 0, 1
        work, place = _job(gl.minimum(n, rounds - 1), x, lists, sizes, SHAPE)
    row, shown, weight = _tile(j, work, x, lists, BN)
    while n < rounds:
        mbarrier.wait(shared.q_full.index(side * 2 + half), side_phase, pred=j == 0)
        mbarrier.wait(shared.k_full.index(stage), phase)
        if (x.index.p is not None) or (lists.sinks is not None):
            fence_async_shared()
        q = shared.q.index(side * 2 + half).reshape([ROWS, D])
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        s_token = warpgroup_mma(q, k, b_zero, use_acc=False, is_async=True)
        mbarrier.wait(shared.v_full.index(before), before_phase)
        if (x.index.p is not None) or (lists.sinks is not None):
            fence_async_shared()
        v = shared.v.index(before).reshape([BN, DV])
        o_token = warpgroup_mma(b_p, v, b_acc, use_acc=added > 0, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(side * 2 + half), pred=j + 1 == work.total)
        b_s = _hide(b_s, j, row, shown, work, sizes, half)
        b_old = gl.where(j == 0, -1e30, b_max)
        b_new = gl.maximum(b_old, gl.max(b_s, 1) * scale_log2 + weight)
        b_w = gl.exp2(b_s * scale_log2 - (b_new - weight)[:, None])
        b_rescale = gl.exp2(b_old - b_new)
        b_sum_new = gl.where(j == 0, 0.0, b_sum) * b_rescale + gl.sum(b_w, 1)
        b_acc = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(shared.v_empty.index(before))
        if j == 0:
            _finish(b_acc, b_max, b_sum, done, x, sizes, half)
        b_max = b_new
        b_sum = b_sum_new
        b_acc = b_acc * gl.convert_layout(b_rescale, ROW)[:, None]
        b_p = gl.convert_layout(b_w.to(dtype), P_L)
        done = (work.i_bh, work.q_row)
        added = j
        before, before_phase = stage, phase
        stage, phase = _next(stage, phase, STAGES)
        j += 1
        if j == work.total:
            n += 1
            j = 0
            side, side_phase = _next(side, side_phase, 2)
            work, place = _job(gl.minimum(n, rounds - 1), x, lists, sizes, SHAPE)
        row, shown, weight = _tile(j, work, x, lists, BN)
    mbarrier.wait(shared.v_full.index(before), before_phase)
    if (x.index.p is not None) or (lists.sinks is not None):
        fence_async_shared()
    b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc, use_acc=added > 0)
    _finish(b_acc, b_max, b_sum, done, x, sizes, half)


@_jit(do_not_specialize=["sizes"])
def segment_kernel(d_q, d_k, d_v, d_ck, d_cv, x, lists, sizes, SHAPE: gl.constexpr):
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    shared = Shared(
        gl.allocate_shared_memory(d_q.dtype, [4, 1, 1, ROWS, SHAPE.D], d_q.layout),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, BN, SHAPE.D], d_k.layout),
        gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, 1, BN, SHAPE.DV], d_v.layout),
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(4):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=2)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (x, lists, shared, sizes, 0, SHAPE)),
            (_consume, (x, lists, shared, sizes, 1, SHAPE)),
            (_produce, (Descriptors(d_q, d_k, d_v, d_ck, d_cv), x, lists, shared, sizes, SHAPE)),
        ],
        [4, 4],
        [224, 56],
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_jobs(
    grid: tuple[int, ...], tensors: KernelTensors, described: tuple[Any, ...], lists: Lists, sizes: KernelSizes,
    shape: Any,
) -> None:  # fmt: skip
    """Run the kernel for the programs that the one of :mod:`.segments` would have in ``grid``; ``described``: queries,
    keys, values, and copies of these. Heads whose keys and values the L2 cache holds together take turns."""
    group = 2 * sum(x.shape[2] * x.shape[3] for x in described[1:3])  # bytes of a KV head
    parts, groups = grid
    every = Sizes(*sizes, parts, groups, min(max(CACHED // group, 1) * tensors.G, groups))
    programs = min(_processors(tensors.out.device), parts * groups)
    launch(segment_kernel, (programs,), *described, tensors, lists, every,
           SHAPE=shape, num_warps=4)  # fmt: skip


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int) -> bool:
    """Whether this kernel runs these tensors, for blocks of ``block`` queries: float16 and bfloat16, head sizes 64 and
    128, on Hopper, with strides that let a row by index be copied 16 bytes at a time."""
    return (
        gluon is not None
        and triton.__version__.startswith(VERSIONS)
        and query.is_cuda
        and query.element_size() == 2
        and block == QUERIES
        and {query.shape[3], value.shape[3]} <= {64, 128}
        and all(x.stride(3) == 1 and not any(stride % 16 for stride in x.stride()[:3]) for x in (key, value))
        and _is_hopper(query.device)
    )


@functools.cache
def _layout() -> Any:
    return gl.NVMMASharedLayout(128, 16, 4)


def describe(x: torch.Tensor, rows: int) -> Any:
    """Descriptor of tiles of ``rows`` rows of ``x`` ``[B, H, L, D]``, half floats, D 64 or 128."""
    x, shape, strides = describable(x)
    return TensorDescriptor(x, shape, strides, [1, 1, rows, shape[3]], _layout())
