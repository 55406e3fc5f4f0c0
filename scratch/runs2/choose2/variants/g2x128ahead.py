"""The kernel for Hopper that scores blocks of keys, in Gluon: the work of ``_score_kernel`` in :mod:`.blocks`,
specialised by warps.

As many programs as the device has multiprocessors stay and take *job* after job, each some columns of ``ROWS`` rows,
queries that choose. Neighbours have the same columns of other rows, so that keys come from the L2 cache. One warp group
reads ahead: columns by the tensor memory accelerator, and the queries of the next job one by one. The others have 64
queries each in registers: a product with both factors in shared memory would read as fast as that can be read. There
are four of them, as exponentials take as long as products: some do these and some do those.
"""

from __future__ import annotations

from collections import namedtuple

import torch

from express_compile.kernels.attend.hopper import describe, gluon_jit, load_rows, load_tile, next_stage, runs
from express_compile.kernels.launch import constexpr, launch, processors, strided

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # no Triton on this platform, or one without this Gluon: the other kernel runs
    gl = None

BM = constexpr(128)  # rows of one group of warps
KEYS = constexpr(64)  # of a column
GROUPS = constexpr(2)
ROWS = constexpr(256)
STAGES = constexpr(8)
GATHERED = constexpr(2048)  # elements of queries that are asked for at a time

ScoreShape = namedtuple("ScoreShape", "D GROUP SAMPLES STRIDE BLOCK")
ScoreTensors = namedtuple("ScoreTensors", "lse q start heads scale_log2")
# ``sequences``: heads of all sequences; ``tiles`` of ROWS rows; ``chunk``: columns of a job
ScoreSizes = namedtuple("ScoreSizes", "H_kv sequences Lq q_offset begin line rows columns tiles chunk", defaults=(0, 0))
Shared = namedtuple("Shared", "q k q_full q_empty k_full k_empty")


@gluon_jit
def _start(i_seq, x, sizes):
    start = sizes.q_offset
    if x.start is not None:
        start = gl.load(x.start + gl.minimum(i_seq, sizes.sequences - 1) // sizes.H_kv).to(gl.int32)
    return start


@gluon_jit
def _choosers(i_chooser, start, sizes, SHAPE: gl.constexpr):
    """As in :mod:`.blocks`."""
    begin = sizes.begin + i_chooser // SHAPE.SAMPLES * SHAPE.BLOCK
    position = gl.minimum(gl.maximum(gl.maximum(begin, start), 0), begin + SHAPE.BLOCK - 1)
    return position - i_chooser % SHAPE.SAMPLES * SHAPE.STRIDE


@gluon_jit
def _columns(row, count: gl.constexpr, start, sizes, SHAPE: gl.constexpr):
    """How many columns ``count`` rows from ``row`` on see."""
    last = (gl.minimum(row + count, sizes.rows) - 1) // SHAPE.GROUP
    last = last // SHAPE.SAMPLES * SHAPE.SAMPLES  # samples go back
    return gl.minimum((_choosers(last, start, sizes, SHAPE) - sizes.line) // KEYS + 1, sizes.columns)


@gluon_jit
def _find(i_seq, chunk, low, tile, x, sizes, SHAPE: gl.constexpr):
    """The job that is ``tile`` tiles behind the beginning of ``chunk``: head and sequence, chunk of columns, the first
    tile of rows that see any of them, tile, and the columns from and to which it goes. Behind the last job the first
    one is ``sizes.sequences``."""
    start = _start(i_seq, x, sizes)
    while (tile >= sizes.tiles) & (i_seq < sizes.sequences):
        left = tile - sizes.tiles
        chunk += 1
        while (low < sizes.tiles) & (_columns(low * ROWS, ROWS, start, sizes, SHAPE) <= chunk * sizes.chunk):
            low += 1
        done = low == sizes.tiles
        i_seq += done.to(gl.int32)
        chunk = gl.where(done, 0, chunk)
        low = gl.where(done, 0, low)
        start = _start(i_seq, x, sizes)
        tile = low + left
    first = chunk * sizes.chunk
    stop = gl.minimum(first + sizes.chunk, _columns(tile * ROWS, ROWS, start, sizes, SHAPE))
    return i_seq, chunk, low, tile, start, first, stop


@gluon_jit
def _produce(d_k, x, shared, sizes, SHAPE: gl.constexpr):
    D: gl.constexpr = SHAPE.D
    STEP: gl.constexpr = GATHERED // D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
    stage, phase, q_phase = 0, 0, 0
    zero = gl.program_id(0) * 0
    i_seq, chunk, low, tile, start, first, stop = _find(zero, zero, zero, gl.program_id(0), x, sizes, SHAPE)
    while i_seq < sizes.sequences:
        i_b, i_kv = i_seq // sizes.H_kv, i_seq % sizes.H_kv
        if x.heads is not None:
            i_kv = gl.load(x.heads + i_kv)
        p = x.q.p + (i_b.to(gl.int64) * x.q.b + (i_kv * SHAPE.GROUP).to(gl.int64) * x.q.h)
        for half in range(GROUPS):
            full = shared.q_full.index(half)
            mbarrier.wait(shared.q_empty.index(half), q_phase ^ 1)
            for i in gl.static_range(BM // STEP):
                o_m = gl.minimum(tile * ROWS + half * BM + i * STEP + o_n, sizes.rows - 1)
                o_row = _choosers(o_m // SHAPE.GROUP, start, sizes, SHAPE) - sizes.q_offset
                o_row = gl.minimum(gl.maximum(o_row, 0), sizes.Lq - 1).to(gl.int64) * x.q.n
                o_row += (o_m % SHAPE.GROUP).to(gl.int64) * x.q.h
                load_rows(shared.q.index(half).slice(i * STEP, STEP, 0), p + o_row[:, None] + o_d[None, :])
            async_copy.mbarrier_arrive(full)
            mbarrier.arrive(full)
        for c in range(first, stop):
            full = shared.k_full.index(stage)
            mbarrier.wait(shared.k_empty.index(stage), phase ^ 1)
            mbarrier.expect(full, d_k.block_type.nbytes)
            load_tile(d_k, [i_b, i_kv, sizes.line + c * KEYS, 0], full, shared.k.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        q_phase = q_phase ^ 1
        i_seq, chunk, low, tile, start, first, stop = _find(
            i_seq, chunk, low, tile + gl.num_programs(0), x, sizes, SHAPE
        )


@gluon_jit
def _finish(b_s, p_lse, token, b_position, m_m, least, scale_log2):
    """Store the log-sum-exp of a column."""
    LAYOUT: gl.constexpr = b_s.type.layout
    if (token < 0) | (token + KEYS - 1 > least):
        o_n = token + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        b_s = gl.where((o_n >= 0)[None, :] & (o_n[None, :] <= b_position[:, None]), b_s, float("-inf"))
    b_top = gl.maximum(gl.max(b_s, 1), -1e30) * scale_log2  # not -inf: a hidden column would give inf - inf
    b_lse = b_top + gl.log2(gl.sum(gl.exp2(b_s * scale_log2 - b_top[:, None]), 1))
    gl.store(p_lse, b_lse, mask=m_m)


@gluon_jit
def _consume(x, shared, sizes, half: gl.constexpr, SHAPE: gl.constexpr):
    D: gl.constexpr = SHAPE.D
    PER: gl.constexpr = SHAPE.GROUP * SHAPE.SAMPLES
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    Q_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    scale_log2 = x.scale_log2
    b_zero = gl.zeros([BM, KEYS], gl.float32, S_L)
    stage, phase, q_phase = 0, 0, 0
    zero = gl.program_id(0) * 0
    i_seq, chunk, low, tile, start, first, stop = _find(zero, zero, zero, gl.program_id(0), x, sizes, SHAPE)
    while i_seq < sizes.sequences:
        row = tile * ROWS + half * BM
        o_m = row + gl.arange(0, BM, ROW)
        m_m = o_m < sizes.rows
        b_position = _choosers(o_m // SHAPE.GROUP, start, sizes, SHAPE)
        i_block = gl.minimum(row, sizes.rows - 1) // PER
        least = _choosers(i_block * SHAPE.SAMPLES, start, sizes, SHAPE) - (SHAPE.SAMPLES - 1) * SHAPE.STRIDE
        own = gl.minimum(_columns(row, BM, start, sizes, SHAPE), stop)
        own = gl.where(row < sizes.rows, own, 0)
        p_lse = x.lse + i_seq.to(gl.int64) * sizes.rows * sizes.columns
        p_lse += o_m // PER * sizes.columns * PER + o_m % PER
        mbarrier.wait(shared.q_full.index(half), q_phase)
        b_q = shared.q.index(half).load(Q_L)
        mbarrier.arrive(shared.q_empty.index(half))
        if first < own:
            mbarrier.wait(shared.k_full.index(stage), phase)
            k = shared.k.index(stage).reshape([KEYS, D]).permute((1, 0))
            b_s = warpgroup_mma(b_q, k, b_zero, use_acc=False)
            mbarrier.arrive(shared.k_empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            for c in range(first + 1, own):
                mbarrier.wait(shared.k_full.index(stage), phase)
                k = shared.k.index(stage).reshape([KEYS, D]).permute((1, 0))
                token = warpgroup_mma(b_q, k, b_zero, use_acc=False, is_async=True)
                before = c - 1
                _finish(b_s, p_lse + before * PER, sizes.line + before * KEYS, b_position, m_m, least, scale_log2)
                b_s = warpgroup_mma_wait(0, deps=[token])
                mbarrier.arrive(shared.k_empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
            before = own - 1
            _finish(b_s, p_lse + before * PER, sizes.line + before * KEYS, b_position, m_m, least, scale_log2)
        for _ in range(gl.maximum(first, own), stop):  # hidden from these queries
            mbarrier.wait(shared.k_full.index(stage), phase)
            mbarrier.arrive(shared.k_empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        q_phase = q_phase ^ 1
        i_seq, chunk, low, tile, start, first, stop = _find(
            i_seq, chunk, low, tile + gl.num_programs(0), x, sizes, SHAPE
        )


@gluon_jit(do_not_specialize=["sizes"])
def score_kernel(d_k, x, sizes, SHAPE: gl.constexpr):
    Q_S: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shared = Shared(
        gl.allocate_shared_memory(d_k.dtype, [GROUPS, BM, SHAPE.D], Q_S),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, KEYS, SHAPE.D], d_k.layout),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(GROUPS):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=GROUPS)
    gl.warp_specialize(
        [
            (_consume, (x, shared, sizes, 0, SHAPE)),
            (_consume, (x, shared, sizes, 1, SHAPE)),
            (_produce, (d_k, x, shared, sizes, SHAPE)),
        ],
        [4, 4],
        [224, 56],
    )


def takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether this kernel runs these tensors: float16 and bfloat16, head sizes 64 and 128, on Hopper, with a memory and
    strides that let queries be copied 16 bytes at a time."""
    return query.shape[3] in (64, 128) and query.data_ptr() % 16 == 0 and runs(query, query, key)


def score(
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    start: torch.Tensor | None,
    heads: torch.Tensor | None,
    scale_log2: float,
    sizes: ScoreSizes,
    shape: ScoreShape,
) -> None:
    """Log-sum-exps of the columns into ``lse``; in ``sizes`` the last two are found here."""
    tiles, programs = -(-sizes.rows // ROWS.value), processors(lse.device)
    of_program = tiles * sizes.columns * sizes.sequences // programs  # columns, half of which are hidden
    sizes = sizes._replace(tiles=tiles, chunk=min(max(of_program // 32, 4), 64))
    tensors = ScoreTensors(lse, strided(query), start, heads, scale_log2)
    launch(score_kernel, (programs,), describe(key, KEYS.value), tensors, sizes, SHAPE=shape, num_warps=4)
