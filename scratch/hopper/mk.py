"""main's hopper.py and segments.py -> those of the experiment."""
import sys
root = sys.argv[1]
p = root + "/kernels/attend/hopper.py"; s = open(p).read()
def r(a, b, c=1):
    global s
    assert s.count(a) == c, (a, s.count(a)); s = s.replace(a, b)
r("import functools\nfrom collections", "import functools\nimport os\nfrom collections")
r("from ..launch import constexpr\n", "from ..launch import constexpr, launch\n")
r('KernelShape = namedtuple("KernelShape", "D DV BM BN PARTS STAGES")', '''KernelShape = namedtuple("KernelShape", "D DV BM BN PARTS STAGES SIDES CARRY TURNS")
CACHED = 32 << 20  # bytes of keys and values that heads which take turns have, of 50 or 60 MB of L2
STAGES, SIDES, CARRY, TURNS, SLOTS = (int(os.environ.get("X_" + n, d)) for n, d in
    (("STAGES", 2), ("SIDES", 1), ("CARRY", 0), ("TURNS", 0), ("SLOTS", 0)))
JOBS = os.environ.get("X_JOBS", "all")  # of a program: 1, 2, ..; all: as many programs as multiprocessors
GUARD = constexpr(int(os.environ.get("X_GUARD", "0")))
SLOT = constexpr(32)  # rows of a slot of a merged tile''')
r('"q k v q_full k_full k_empty v_full v_empty"', '"q k v q_full q_empty k_full k_empty v_full v_empty turn"')
a = s.index('Descriptors = namedtuple'); b = s.index("@_jit\ndef _gather(")
s = s[:a] + '''Descriptors = namedtuple("Descriptors", "q k v copied_key copied_value slots")
# Tiles of keys or of values: the tensor, descriptors of tokens and of copies, of slots of both, and where tiles go
Stream = namedtuple("Stream", "x tokens copied slots_tokens slots_copied tiles full empty")
# Of all jobs: ``parts`` of the queries of ``groups`` heads in all sequences (or jobs of a table, and sequences), of
# which ``heads`` take turns
Sizes = namedtuple("Sizes", "H Lq q_offset shift parts groups heads")


@_jit
def _number(n):
    """The n-th job of this program. Jobs with most rows come first, so that in every other round the programs take
    theirs in reverse."""
    i, programs = gl.program_id(0), gl.num_programs(0)
    return n * programs + gl.where(n % 2 == 0, i, programs - 1 - i)


@_jit
def _rounds(sizes):
    """How many jobs this program has."""
    jobs = sizes.parts * sizes.groups
    full = jobs // gl.num_programs(0)
    return full + (_number(full) < jobs).to(gl.int32)


@_jit
def _job(n, x, lists, sizes, SHAPE: gl.constexpr):
    """The n-th job of this program."""
    BN: gl.constexpr = SHAPE.BN
    BM: gl.constexpr = SHAPE.BM
    shift = sizes.shift
    number = _number(n)
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
    skip = gl.maximum(-q_row, 0)
    position = sizes.q_offset + q_row + skip
    stop = sizes.q_offset + gl.minimum(q_row + BM, sizes.Lq)
    total = gl.maximum(listed + (gl.maximum(stop - tail, 0) + BN - 1) // BN, 1)
    work = Work(first, copied, indexed, chosen, listed, total, tail, blocks * 64)
    return work, Place(
        i_b, i_h, i_kv, i_bh, q_row, skip, position, sizes.Lq, c_b, c_h, c_row, p_index, p_chosen, first_key
    )


@_jit
def _tile(j, work, lists, BN: gl.constexpr):
    """First row, rows that are shown, and log2-weight of tile j, and how much the second to fourth of its slots have
    more than that; of rows by index the place in the index, and of chosen blocks the row among all of them. The row of
    a merged tile is -1 minus its number."""
    in_list = (j < work.indexed) | ((j >= work.chosen) & (j < work.listed))
    at = work.first + j - gl.where(j < work.indexed, 0, work.chosen - work.indexed)
    row = gl.load(lists.tiles + 2 * at, mask=in_list, other=0)
    shown = gl.load(lists.tiles + 2 * at + 1, mask=in_list, other=BN)
    of_chosen = (j >= work.indexed) & (j < work.chosen)
    if lists.slots is None:
        weight = gl.load(lists.log2_weight + at, mask=in_list, other=0.0)
        more = (0.0, 0.0, 0.0)
    else:
        weight = gl.load(lists.log2_weight + 4 * at, mask=in_list, other=0.0)
        w_1 = gl.load(lists.log2_weight + 4 * at + 1, mask=in_list, other=0.0)
        w_2 = gl.load(lists.log2_weight + 4 * at + 2, mask=in_list, other=0.0)
        w_3 = gl.load(lists.log2_weight + 4 * at + 3, mask=in_list, other=0.0)
        more = (w_1, w_2, w_3)
    row = gl.where(of_chosen, (j - work.indexed) * BN, row)
    shown = gl.where(of_chosen, gl.minimum(work.keys - row, BN), shown)
    return gl.where(j < work.listed, row, work.tail + (j - work.listed) * BN), shown, weight, more


''' + s[b:]
a = s.index("@_jit\ndef _produce("); b = s.index("@_jit\ndef _hide(")
s = s[:a] + '''@_jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers.

    Carried from tile to tile they stay in uniform registers. From a count of tiles ptxas computes the address of a
    barrier for every lane, so that lanes of a warp wait for themselves, while Triton says that they go on together.
    """
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@_jit
def _before(stage, phase, STAGES: gl.constexpr):
    """The stage before this one, and the phase of its barriers."""
    first = stage == 0
    return gl.where(first, STAGES - 1, stage - 1), gl.where(first, phase ^ 1, phase)


@_jit
def _wait(barrier, phase, pred=True):
    mbarrier.wait(barrier, phase, pred=pred)
    if GUARD:  # lanes of a warp go on together
        gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [phase], dtype=gl.int32,
                                  is_pure=False, pack=1)


@_jit
def _fill(stream, stage, phase, j, row, shown, work, place, lists):
    """Tile j of a job, as soon as there is room for it."""
    BN: gl.constexpr = stream.tiles.shape[3]
    D: gl.constexpr = stream.tiles.shape[4]
    STAGES: gl.constexpr = stream.tiles.shape[0]
    COLUMNS: gl.constexpr = D // 64
    PIECES: gl.constexpr = BN // SLOT
    full = stream.full.index(stage)
    _wait(stream.empty.index(stage), phase ^ 1)
    if (stream.x is not None) and ((j >= work.copied) & (j < work.chosen)):
        _gather(stream.tiles.index(stage).reshape([BN, D]), stream.x, place, j < work.indexed, row, shown)
        async_copy.mbarrier_arrive(full)
        mbarrier.arrive(full)
    else:
        mbarrier.expect(full, stream.tokens.block_type.nbytes)
        tile = stream.tiles.index(stage)
        if j < work.copied:
            if (lists.slots is not None) and row < 0:
                pieces = stream.tiles._reinterpret(
                    stream.tiles.dtype, [STAGES * COLUMNS * PIECES, 1, 1, SLOT, 64], stream.slots_tokens.layout
                )
                p_slots = lists.slots + PIECES * (-1 - row)
                slots = (gl.load(p_slots), gl.load(p_slots + 1), gl.load(p_slots + 2), gl.load(p_slots + 3))
                for i in gl.static_range(PIECES):
                    slot = slots[i]
                    for c in gl.static_range(COLUMNS):
                        piece = pieces.index((stage * COLUMNS + c) * PIECES + i)
                        if slot >= 0:
                            at = [place.c_b, place.c_h, place.c_row + slot, 64 * c]
                            tma.async_copy_global_to_shared(stream.slots_copied, at, full, piece)
                        else:
                            at = [place.i_b, place.i_kv, -1 - slot, 64 * c]
                            tma.async_copy_global_to_shared(stream.slots_tokens, at, full, piece)
            else:
                at = [place.c_b, place.c_h, place.c_row + row, 0]
                tma.async_copy_global_to_shared(stream.copied, at, full, tile)
        else:
            tma.async_copy_global_to_shared(stream.tokens, [place.i_b, place.i_kv, row, 0], full, tile)


@_jit
def _produce(d, x, lists, shared, sizes, SHAPE: gl.constexpr):
    BN: gl.constexpr = SHAPE.BN
    x_k, x_v = None, None
    if x.index.p is not None:
        x_k, x_v = x.k, x.v
    k_slots, v_slots, ck_slots, cv_slots = d.slots
    keys = Stream(x_k, d.k, d.copied_key, k_slots, ck_slots, shared.k, shared.k_full, shared.k_empty)
    values = Stream(x_v, d.v, d.copied_value, v_slots, cv_slots, shared.v, shared.v_full, shared.v_empty)
    stage, phase, side, side_phase = 0, 0, 0, 0
    for n in range(_rounds(sizes)):
        work, place = _job(n, x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        for j in range(work.total):
            next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
            _fill(keys, stage, phase, j, row, shown, work, place, lists)
            if j == 0:  # behind its first keys: with one side there is room for queries a tile later than for these
                for half in gl.static_range(2):
                    at = side * 2 + half
                    full = shared.q_full.index(at)
                    _wait(shared.q_empty.index(at), side_phase ^ 1)
                    mbarrier.expect(full, d.q.block_type.nbytes)
                    q_row = place.q_row + ROWS * half
                    tma.async_copy_global_to_shared(d.q, [place.i_b, place.i_h, q_row, 0], full, shared.q.index(at))
            _fill(values, stage, phase, j, row, shown, work, place, lists)
            stage, phase = _next(stage, phase, SHAPE.STAGES)
            row, shown, weight, more = next_row, next_shown, next_weight, next_more
        side, side_phase = _next(side, side_phase, SHAPE.SIDES)


''' + s[b:]
a = s.index("@_jit\ndef _hide("); b = s.index("@functools.cache\ndef _is_hopper")
s = s[:a] + '''@_jit
def _hide(b_s, j, row, shown, more, work, place, lists, scale_log2, half):
    """Scores of rows that a query does not see become -inf; those of other slots than the first get what these weigh
    more."""
    BN: gl.constexpr = b_s.shape[1]
    LAYOUT: gl.constexpr = b_s.type.layout
    in_tail = j >= work.listed
    if (lists.slots is not None) and ((j < work.copied) & (row < 0)):
        w_1, w_2, w_3 = more
        o_n = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        late = gl.where(o_n < 3 * SLOT, w_2, w_3)
        b_more = gl.where(o_n < SLOT, 0.0, gl.where(o_n < 2 * SLOT, w_1, late)) / scale_log2
        b_s = b_s + b_more[None, :]
    shown = gl.where(in_tail, place.position + 1 - row, shown)
    if shown < BN:
        o_m = gl.maximum(gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + ROWS * half - place.skip, 0)
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
    b_out = b_acc / b_sum[:, None]
    b_lse = (gl.convert_layout(b_max, ROW) + gl.log2(b_sum)) * 0.6931471805599453
    o_m = q_row + ROWS * half + gl.arange(0, ROWS, ROW)
    m_m = (o_m >= 0) & (o_m < sizes.Lq)
    o_row = i_bh.to(gl.int64) * sizes.Lq + o_m
    o_d = gl.arange(0, DV, gl.SliceLayout(0, b_acc.type.layout))
    gl.store(x.out + o_row[:, None] * DV + o_d[None, :], b_out.to(x.out.dtype.element_ty), mask=m_m[:, None])
    gl.store(x.lse + o_row, b_lse, mask=m_m)


@_jit
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
    dtype: gl.constexpr = shared.q.dtype
    scale_log2 = x.scale_log2
    b_zero = gl.zeros([ROWS, BN], gl.float32, S_L)
    stage, phase, side, side_phase, turn = 0, 0, 0, 0, 1 - half
    rounds = _rounds(sizes)
    work, place = _job(0, x, lists, sizes, SHAPE)
    row, shown, weight, more = _tile(0, work, lists, BN)
    for n in range(rounds):
        b_acc = gl.zeros([ROWS, DV], gl.float32, O_L)
        q = shared.q.index(side * 2 + half).reshape([ROWS, D])
        _wait(shared.q_full.index(side * 2 + half), side_phase)
        _wait(shared.k_full.index(stage), phase)
        if x.index.p is not None:
            fence_async_shared()
        if SHAPE.TURNS:
            _wait(shared.turn.index(half), turn)
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        b_s = warpgroup_mma(q, k, b_zero, use_acc=False)
        if SHAPE.TURNS:
            mbarrier.arrive(shared.turn.index(1 - half))
            turn = turn ^ 1
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(side * 2 + half), pred=work.total == 1)
        b_s = _hide(b_s, 0, row, shown, more, work, place, lists, scale_log2, half)
        b_max = gl.maximum(gl.max(b_s, 1) * scale_log2 + weight, -1e30)
        b_w = gl.exp2(b_s * scale_log2 - (b_max - weight)[:, None])
        b_sum = gl.sum(b_w, 1)
        b_p = gl.convert_layout(b_w.to(dtype), P_L)
        row, shown, weight, more = _tile(1, work, lists, BN)
        stage, phase = _next(stage, phase, STAGES)
        for j in range(1, work.total):
            before, before_phase = _before(stage, phase, STAGES)
            _wait(shared.k_full.index(stage), phase)
            if x.index.p is not None:
                fence_async_shared()
            if SHAPE.TURNS:
                _wait(shared.turn.index(half), turn)
            k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
            s_token = warpgroup_mma(q, k, b_zero, use_acc=False, is_async=True)
            _wait(shared.v_full.index(before), before_phase)
            if x.index.p is not None:
                fence_async_shared()
            v = shared.v.index(before).reshape([BN, DV])
            o_token = warpgroup_mma(b_p, v, b_acc, is_async=True)
            if SHAPE.TURNS:
                mbarrier.arrive(shared.turn.index(1 - half))
                turn = turn ^ 1
            next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
            b_s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(shared.k_empty.index(stage))
            mbarrier.arrive(shared.q_empty.index(side * 2 + half), pred=j + 1 == work.total)
            b_s = _hide(b_s, j, row, shown, more, work, place, lists, scale_log2, half)
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
            stage, phase = _next(stage, phase, STAGES)
        done = (place.i_bh, place.q_row)
        work, place = _job(gl.minimum(n + 1, rounds - 1), x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        before, before_phase = _before(stage, phase, STAGES)
        _wait(shared.v_full.index(before), before_phase)
        if x.index.p is not None:
            fence_async_shared()
        b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc)
        mbarrier.arrive(shared.v_empty.index(before))
        _finish(b_acc, b_max, b_sum, done, x, sizes, half)
        side, side_phase = _next(side, side_phase, SHAPE.SIDES)


@_jit
def _consume_carried(x, lists, shared, sizes, half: gl.constexpr, SHAPE: gl.constexpr):
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

    row, shown, weight, more = _tile(0, work, lists, BN)
    _wait(shared.q_full.index(half), 0)
    _wait(shared.k_full.index(0), 0)
    if x.index.p is not None:
        fence_async_shared()
    q = shared.q.index(half).reshape([ROWS, D])
    b_s = warpgroup_mma(q, shared.k.index(0).reshape([BN, D]).permute((1, 0)), b_zero, use_acc=False)
    mbarrier.arrive(shared.k_empty.index(0))
    mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
    b_s = _hide(b_s, 0, row, shown, more, work, place, lists, scale_log2, half)
    b_max = gl.maximum(gl.max(b_s, 1) * scale_log2 + weight, -1e30)
    b_w = gl.exp2(b_s * scale_log2 - (b_max - weight)[:, None])
    b_sum = gl.sum(b_w, 1)
    b_p = gl.convert_layout(b_w.to(dtype), P_L)

    done = (place.i_bh, place.q_row)
    # the tile to come is number ``j`` of job ``n``, and the last one was number ``added`` of its own
    n, j, added = 0, 1, 0
    side, side_phase = 0, 0
    stage, phase = _next(0, 0, STAGES)
    if work.total == 1:
        n, j, side = 1, 0, 1
        work, place = _job(gl.minimum(n, rounds - 1), x, lists, sizes, SHAPE)
    row, shown, weight, more = _tile(j, work, lists, BN)
    while n < rounds:
        before, before_phase = _before(stage, phase, STAGES)
        _wait(shared.q_full.index(side * 2 + half), side_phase, pred=j == 0)
        _wait(shared.k_full.index(stage), phase)
        if x.index.p is not None:
            fence_async_shared()
        q = shared.q.index(side * 2 + half).reshape([ROWS, D])
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        s_token = warpgroup_mma(q, k, b_zero, use_acc=False, is_async=True)
        _wait(shared.v_full.index(before), before_phase)
        if x.index.p is not None:
            fence_async_shared()
        v = shared.v.index(before).reshape([BN, DV])
        o_token = warpgroup_mma(b_p, v, b_acc, use_acc=added > 0, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(side * 2 + half), pred=j + 1 == work.total)
        b_s = _hide(b_s, j, row, shown, more, work, place, lists, scale_log2, half)
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
        done = (place.i_bh, place.q_row)
        added = j
        stage, phase = _next(stage, phase, STAGES)
        j += 1
        if j == work.total:
            n += 1
            j = 0
            side, side_phase = _next(side, side_phase, 2)
            work, place = _job(gl.minimum(n, rounds - 1), x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(j, work, lists, BN)
    before, before_phase = _before(stage, phase, STAGES)
    _wait(shared.v_full.index(before), before_phase)
    if x.index.p is not None:
        fence_async_shared()
    b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc, use_acc=added > 0)
    _finish(b_acc, b_max, b_sum, done, x, sizes, half)


@_jit
def _consumer(x, lists, shared, sizes, half: gl.constexpr, SHAPE: gl.constexpr):
    if SHAPE.CARRY:
        _consume_carried(x, lists, shared, sizes, half, SHAPE)
    else:
        _consume(x, lists, shared, sizes, half, SHAPE)


@_jit(do_not_specialize=["sizes"])
def segment_kernel(d_q, d_k, d_v, d_ck, d_cv, d_sk, d_sv, d_sck, d_scv, x, lists, sizes, SHAPE: gl.constexpr):
    STAGES: gl.constexpr = SHAPE.STAGES
    BN: gl.constexpr = SHAPE.BN
    QS: gl.constexpr = 2 * SHAPE.SIDES
    shared = Shared(
        gl.allocate_shared_memory(d_q.dtype, [QS, 1, 1, ROWS, SHAPE.D], d_q.layout),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, 1, BN, SHAPE.D], d_k.layout),
        gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, 1, BN, SHAPE.DV], d_v.layout),
        gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(QS):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.k_empty.index(i), count=2)
        mbarrier.init(shared.v_full.index(i), count=1)
        mbarrier.init(shared.v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(shared.turn.index(i), count=1)
    gl.warp_specialize(
        [
            (_consumer, (x, lists, shared, sizes, 0, SHAPE)),
            (_consumer, (x, lists, shared, sizes, 1, SHAPE)),
            (_produce, (Descriptors(d_q, d_k, d_v, d_ck, d_cv, (d_sk, d_sv, d_sck, d_scv)), x, lists, shared, sizes,
                        SHAPE)),
        ],
        [4, 4],
        [224, 56],
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_jobs(grid: tuple[int, ...], tensors: Any, described: tuple[Any, ...], lists: Any, sizes: Any,
                shape: Any) -> None:
    """Run the kernel for the programs that the one of :mod:`.segments` would have in ``grid``; ``described``: queries,
    keys, values, and copies of these. Heads whose keys and values the L2 cache holds together take turns."""
    group = 2 * sum(x.shape[2] * x.shape[3] for x in described[1:3])  # bytes of a KV head
    parts, groups = grid
    every = Sizes(*sizes, parts, groups, min(max(CACHED // group, 1) * tensors.G, groups))
    jobs = parts * groups
    programs = min(_processors(tensors.out.device), jobs) if JOBS == "all" else -(-jobs // int(JOBS))
    slots = described[1:] if lists.slots is None else [
        TensorDescriptor(x.base, x.shape, x.strides, [1, 1, 32, 64], _layout()) for x in described[1:]]
    launch(segment_kernel, (programs,), *described, *slots, tensors, lists, every, SHAPE=shape, num_warps=4)


''' + s[b:]
open(p, "w").write(s)

p = root + "/kernels/attend/segments.py"; s = open(p).read()
r('''            own = hopper.KernelShape(widths.D, widths.DV, self.queries, self.rows, parts, self.stages)
            launch(hopper.segment_kernel, grid, queries, *descriptors, tensors, lists, sizes,
                   SHAPE=own, num_warps=self.warps)  # fmt: skip
''', '''            own = hopper.KernelShape(widths.D, widths.DV, self.queries, self.rows, parts, hopper.STAGES,
                                     2 if hopper.CARRY else hopper.SIDES, hopper.CARRY, hopper.TURNS)  # fmt: skip
            hopper.launch_jobs(grid, tensors, (queries, *descriptors), lists, sizes, own)
''')
r('''            lists = tile_lists(self, rows, compacted)
''', '''            lists = tile_lists(self, rows, compacted)
            if hopper.SLOTS and rows == 128:
                lists = slot_lists(self, compacted)
''')
r('''@jit
def _powers(largest):
''', '''def slot_lists(table: SegmentTable, compacted: int) -> tuple[np.ndarray, ...]:
    """:func:`tile_lists` for tiles of 128 rows, where what is left of compacted segments behind whole tiles, segments of
    tokens, and as much of the tail as fills up a tile come in slots of 32 rows, four in a *merged* tile, whose row is
    -1 minus its number. log2_weight: float32 ``[tiles, 4]``, of a merged tile what the later slots have more than the
    first. slots: int32 ``[tiles, 4]``: compacted row, or -1 minus the token."""
    start, tiles, weights, slots, tails = [], [], [], [], []
    for b in range(len(table.tail)):
        tail, whole, full, part, indexed = int(table.tail[b]), [], [], [], []
        joined = False
        begin = max(b * table.block - table.shift, 0) + table.q_offset
        for (source, first, length), w in zip(table.segments[b].tolist(), table.log_weight[b].tolist(), strict=True):
            w = w / math.log(2.0)
            if length and source == TOKENS and w == 0 and not joined and first + length == int(table.tail[b]):
                tail, joined = first, True
                continue
            if source == COMPACTED and first >= compacted:
                indexed += [(first + i, min(128, length - i), w) for i in range(0, length, 128)]
                continue
            at = length // 128 * 128 if source == COMPACTED else 0
            whole += [(first + i, 128, w) for i in range(0, at, 128)]
            for i in range(at, length, 32):
                row = first + i if source == COMPACTED else -1 - (first + i)
                (full if length - i >= 32 else part).append((row, min(32, length - i), w))
        while (len(full) + len(part)) % 4 and not part and tail + 32 <= begin:
            full.append((-1 - tail, 32, 0.0))
            tail += 32
        start.append(len(tiles))
        for row, shown, w in whole:
            tiles.append((row, shown)); weights.append((w, 0.0, 0.0, 0.0)); slots.append((0, 0, 0, 0))
        while full or part:
            own, full = full[:4], full[4:]
            if len(own) < 4 and part:
                own.append(part.pop())
            rows = [x[0] for x in own] + [own[-1][0]] * (4 - len(own))
            ws = [x[2] for x in own] + [own[-1][2]] * (4 - len(own))
            slots.append(rows); weights.append((ws[0], *(w - ws[0] for w in ws[1:])))
            tiles.append((-1 - len(tiles), sum(x[1] for x in own)))
        start.append(len(tiles))
        for row, shown, w in indexed:
            tiles.append((row, shown)); weights.append((w, 0.0, 0.0, 0.0)); slots.append((0, 0, 0, 0))
        start += [len(tiles)]
        tails.append(tail)
    start.append(len(tiles))
    return (np.array(start, np.int32), np.array(tiles, np.int32).reshape(-1, 2),
            np.array(weights, np.float32).reshape(-1, 4), np.array(tails, np.int32),
            np.array(slots, np.int32).reshape(-1, 4))


@jit
def _powers(largest):
''')
open(p, "w").write(s)
p = root + "/kernels/attend/arguments.py"; s = open(p).read()
r('Lists = namedtuple("Lists", "start tiles log2_weight tail")', 'Lists = namedtuple("Lists", "start tiles log2_weight tail slots", defaults=(None,))')
open(p, "w").write(s)
