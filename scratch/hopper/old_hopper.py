"""The kernel of segment attention for Hopper, in Gluon: the work of :mod:`.segments`' kernel, specialised by warps.

One warp group reads tiles of keys and values into shared memory ahead of the others: by the tensor memory accelerator
what lies side by side, rows by index asynchronously one by one. Two warp groups of 64 queries each multiply: the
product with the keys of a tile runs beside the one with the values of the tile before it, and exponentials of one group
overlap with products of the other.

On an H200 (bfloat16, D = 128, causal, n = 32,768) it reaches 621 TFLOP/s, where the kernel of :mod:`.segments` has 447
and cuDNN 585; over the few rows of Express 471 for 366, as nothing overlaps with what comes before and after a short
list of tiles (``examples/bench/results/gpu-tests.txt``).
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

from ..launch import constexpr
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
GATHERED = constexpr(2048)  # elements of rows by index that are asked for at a time

Shared = namedtuple("Shared", "q k v q_full k_full k_empty v_full v_empty")
# Where kinds of tiles end, one after the other: copied rows, rows by index, chosen blocks, listed tokens, the tail
Work = namedtuple("Work", "first copied indexed chosen listed total tail keys")
# Which program it is: sequence and heads, the row of its first query (below 0: none), the first query that is one and
# where it stands among the tokens, and where the rows that are no tokens begin
Place = namedtuple("Place", "i_b i_h i_kv i_bh q_row skip position Lq c_b c_h c_row p_index p_chosen first_key")
Descriptors = namedtuple("Descriptors", "q k v copied_key copied_value")


@_jit
def _tile(j, work, lists, BN: gl.constexpr):
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
    return gl.where(j < work.listed, row, work.tail + (j - work.listed) * BN), shown, weight


@_jit
def _gather(target, x, place, by_index, row, shown):
    """Rows by index, or those of chosen blocks of 64 keys, into shared memory, some at a time; behind ``shown`` of
    them come copies of the last one."""
    BN: gl.constexpr = target.shape[0]
    D: gl.constexpr = target.shape[1]
    STEP: gl.constexpr = GATHERED // D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    p = x.p + (place.i_b.to(gl.int64) * x.b + place.i_kv.to(gl.int64) * x.h)
    p_from = place.p_index + row
    if not by_index:
        p_from = place.p_chosen + row // 64
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(BN // STEP):
        o_row = gl.minimum(o_n + i * STEP, shown - 1)
        i_row = gl.load(p_from + gl.where(by_index, o_row, o_row // 64))
        i_row = gl.where(by_index, i_row, place.first_key + i_row * 64 + o_row % 64).to(gl.int64)
        pointers = p + i_row[:, None] * x.n + o_d[None, :]
        async_copy.async_copy_global_to_shared(target.slice(i * STEP, STEP, 0), pointers)


@_jit
def _produce(d, x, lists, shared, work, place, SHAPE: gl.constexpr):
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    D: gl.constexpr = SHAPE.D
    DV: gl.constexpr = SHAPE.DV
    i_b, i_kv = place.i_b, place.i_kv
    for half in gl.static_range(2):
        mbarrier.expect(shared.q_full.index(half), d.q.block_type.nbytes)
        tma.async_copy_global_to_shared(
            d.q, [i_b, place.i_h, place.q_row + ROWS * half, 0], shared.q_full.index(half), shared.q.index(half)
        )
    for j in range(work.total):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        row, shown, weight = _tile(j, work, lists, BN)
        k_full = shared.k_full.index(stage)
        v_full = shared.v_full.index(stage)
        mbarrier.wait(shared.k_empty.index(stage), phase ^ 1)
        if (x.index.p is not None) and ((j >= work.copied) & (j < work.chosen)):
            k_tile = shared.k.index(stage).reshape([BN, D])
            _gather(k_tile, x.k, place, j < work.indexed, row, shown)
            async_copy.mbarrier_arrive(k_full)
            mbarrier.arrive(k_full)
            mbarrier.wait(shared.v_empty.index(stage), phase ^ 1)
            v_tile = shared.v.index(stage).reshape([BN, DV])
            _gather(v_tile, x.v, place, j < work.indexed, row, shown)
            async_copy.mbarrier_arrive(v_full)
            mbarrier.arrive(v_full)
        else:
            mbarrier.expect(k_full, d.k.block_type.nbytes)
            if j < work.copied:
                tma.async_copy_global_to_shared(
                    d.copied_key, [place.c_b, place.c_h, place.c_row + row, 0], k_full, shared.k.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(d.k, [i_b, i_kv, row, 0], k_full, shared.k.index(stage))
            mbarrier.wait(shared.v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full, d.v.block_type.nbytes)
            if j < work.copied:
                tma.async_copy_global_to_shared(
                    d.copied_value, [place.c_b, place.c_h, place.c_row + row, 0], v_full, shared.v.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(d.v, [i_b, i_kv, row, 0], v_full, shared.v.index(stage))


@_jit
def _hide(b_s, j, row, shown, work, place, half):
    """Scores of rows that a query does not see become -inf."""
    BN: gl.constexpr = b_s.shape[1]
    LAYOUT: gl.constexpr = b_s.type.layout
    in_tail = j >= work.listed
    shown = gl.where(in_tail, place.position + 1 - row, shown)
    if shown < BN:
        o_m = gl.maximum(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + ROWS * half - place.skip, 0)
        o_m = shown + gl.where(in_tail, o_m, 0)
        o_n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        b_s = gl.where(o_n[None, :] < o_m[:, None], b_s, float("-inf"))
    return b_s


@_jit
def _consume(x, lists, shared, work, place, half, SHAPE: gl.constexpr):
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
    q = shared.q.index(half).reshape([ROWS, D])
    mbarrier.wait(shared.q_full.index(half), 0)

    row, shown, weight = _tile(0, work, lists, BN)
    mbarrier.wait(shared.k_full.index(0), 0)
    if x.index.p is not None:
        fence_async_shared()
    b_s = warpgroup_mma(q, shared.k.index(0).reshape([BN, D]).permute((1, 0)), b_zero, use_acc=False)
    mbarrier.arrive(shared.k_empty.index(0))
    b_s = _hide(b_s, 0, row, shown, work, place, half)
    b_max = gl.maximum(gl.max(b_s, 1) * scale_log2 + weight, -1e30)
    b_w = gl.exp2(b_s * scale_log2 - (b_max - weight)[:, None])
    b_sum = gl.sum(b_w, 1)
    b_p = gl.convert_layout(b_w.to(dtype), P_L)
    row, shown, weight = _tile(1, work, lists, BN)
    for j in range(1, work.total):
        stage = j % STAGES
        before = (j - 1) % STAGES
        mbarrier.wait(shared.k_full.index(stage), (j // STAGES) & 1)
        if x.index.p is not None:
            fence_async_shared()
        s_token = warpgroup_mma(
            q, shared.k.index(stage).reshape([BN, D]).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        mbarrier.wait(shared.v_full.index(before), ((j - 1) // STAGES) & 1)
        if x.index.p is not None:
            fence_async_shared()
        o_token = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc, is_async=True)
        next_row, next_shown, next_weight = _tile(j + 1, work, lists, BN)
        b_s = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(shared.k_empty.index(stage))
        b_s = _hide(b_s, j, row, shown, work, place, half)
        b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2 + weight)
        b_w = gl.exp2(b_s * scale_log2 - (b_new - weight)[:, None])
        b_rescale = gl.exp2(b_max - b_new)
        b_sum = b_sum * b_rescale + gl.sum(b_w, 1)
        b_max = b_new
        b_acc = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(shared.v_empty.index(before))
        b_acc = b_acc * gl.convert_layout(b_rescale, ROW)[:, None]
        b_p = gl.convert_layout(b_w.to(dtype), P_L)
        row, shown, weight = next_row, next_shown, next_weight
    last = work.total - 1
    mbarrier.wait(shared.v_full.index(last % STAGES), (last // STAGES) & 1)
    if x.index.p is not None:
        fence_async_shared()
    b_acc = warpgroup_mma(b_p, shared.v.index(last % STAGES).reshape([BN, DV]), b_acc)

    o_m = place.q_row + ROWS * half + gl.arange(0, ROWS, ROW)
    m_m = (o_m >= 0) & (o_m < place.Lq)
    o_d = gl.arange(0, DV, gl.SliceLayout(0, O_L))
    b_sum = gl.convert_layout(b_sum, ROW)
    b_out = b_acc / b_sum[:, None]
    o_row = place.i_bh.to(gl.int64) * place.Lq + o_m
    gl.store(x.out + o_row[:, None] * DV + o_d[None, :], b_out.to(dtype), mask=m_m[:, None])
    b_lse = (gl.convert_layout(b_max, ROW) + gl.log2(b_sum)) * 0.6931471805599453
    gl.store(x.lse + o_row, b_lse, mask=m_m)


@_jit(do_not_specialize=["sizes"])
def segment_kernel(d_q, d_k, d_v, d_ck, d_cv, x, lists, sizes, SHAPE: gl.constexpr):
    BN: gl.constexpr = SHAPE.BN
    STAGES: gl.constexpr = SHAPE.STAGES
    H, Lq, q_offset, shift = sizes
    blocks, first_key = 0, 0
    if x.jobs is None:
        i_part = gl.program_id(0) + shift // SHAPE.BM  # no program for parts before the first query
        i_b = gl.program_id(1) // H
        i_h = gl.program_id(1) % H
        i_kv = i_h // x.G
        i_block = i_part // SHAPE.PARTS
        c_b, c_h, c_row = i_b, i_kv, 0
        p_index = x.lse  # of no kind that is read
        if x.index.p is not None:
            p_index = x.index.p + (i_b.to(gl.int64) * x.index.b + i_kv.to(gl.int64) * x.index.h)
        p_chosen = p_index
    else:
        p_job = x.jobs + gl.program_id(0) * job.COLUMNS
        i_b = gl.program_id(1)
        i_h = gl.load(p_job + job.HEAD)
        i_part = gl.load(p_job + job.PART)
        i_kv = i_h // x.G
        shift = gl.load(p_job + job.SHIFT)
        i_block = gl.load(p_job + job.TABLE) + i_part // SHAPE.PARTS
        c_b, c_h, c_row = 0, 0, gl.load(p_job + job.COPIES) + i_b * gl.load(p_job + job.COPIES_B)
        p_index = x.index.p + (gl.load(p_job + job.INDEX) + i_b * gl.load(p_job + job.INDEX_B))
        p_chosen = x.chosen + (gl.load(p_job + job.CHOSEN) + i_b * gl.load(p_job + job.CHOSEN_B))
        blocks, first_key = gl.load(p_job + job.BLOCKS), gl.load(p_job + job.FIRST)
    shared = Shared(
        gl.allocate_shared_memory(d_q.dtype, [2, 1, 1, ROWS, SHAPE.D], d_q.layout),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, BN, SHAPE.D], d_k.layout),
        gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, 1, BN, SHAPE.DV], d_v.layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=2)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.v_empty.index(i), count=2)

    p_start = lists.start + i_block * 3
    first = gl.load(p_start)
    copied = gl.load(p_start + 1) - first
    indexed = gl.load(p_start + 2) - first
    chosen = indexed + (blocks * 64 + BN - 1) // BN
    listed = gl.load(p_start + 3) - first + chosen - indexed
    tail = gl.load(lists.tail + i_block)
    q_row = i_part * SHAPE.BM - shift
    skip = gl.maximum(-q_row, 0)
    position = q_offset + q_row + skip
    place = Place(
        i_b, i_h, i_kv, i_b * H + i_h, q_row, skip, position, Lq, c_b, c_h, c_row, p_index, p_chosen, first_key
    )
    stop = q_offset + gl.minimum(q_row + SHAPE.BM, Lq)
    total = listed + (gl.maximum(stop - tail, 0) + BN - 1) // BN
    work = Work(first, copied, indexed, chosen, listed, total, tail, blocks * 64)
    gl.warp_specialize(
        [
            (_consume, (x, lists, shared, work, place, 0, SHAPE)),
            (_consume, (x, lists, shared, work, place, 1, SHAPE)),
            (_produce, (Descriptors(d_q, d_k, d_v, d_ck, d_cv), x, lists, shared, work, place, SHAPE)),
        ],
        [4, 4],
        [224, 64],
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int) -> bool:
    """Whether this kernel runs these tensors, for blocks of ``block`` queries: float16 and bfloat16, head sizes 64 and
    128, not both 64 (where it was no faster on an H200), on Hopper, with strides that let a row by index be copied 16
    bytes at a time."""
    return (
        gluon is not None
        and triton.__version__.startswith(VERSIONS)
        and query.is_cuda
        and query.element_size() == 2
        and block == QUERIES
        and {query.shape[3], value.shape[3]} in ({128}, {64, 128})
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
