"""main's kernels/attend/hopper.py -> the experiment's: switches X_ROWS, X_AHEAD, X_ROTATE, X_FENCE, X_STAGES."""
import sys
root = sys.argv[1]
p = root + "/kernels/attend/hopper.py"; s = open(p).read()
def r(a, b, c=1):
    global s
    assert s.count(a) == c, (a, s.count(a)); s = s.replace(a, b)
r("import functools\nfrom coll", "import functools\nimport os\nfrom coll")
r('GATHERED = constexpr(2048)', '''X_ROWS, X_AHEAD, X_ROTATE, X_FENCE = (constexpr(int(os.environ.get("X_" + n, "0"))) for n in ("ROWS", "AHEAD", "ROTATE", "FENCE"))
GATHERED = constexpr(2048)''')
# ---- gather
r('''@_jit
def _next(stage, phase''', '''def _layout_of(D):
    """Which rows and columns threads of the producer copy, 16 bytes at a time: eight rows each, the same for any D."""
    columns = [[0, 64]] if D == 128 else []
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *columns, [16, 0], [32, 0], [64, 0]],
        [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [128, D])


LAYOUT_64 = constexpr(_layout_of(64)) if gluon is not None else None
LAYOUT_128 = constexpr(_layout_of(128)) if gluon is not None else None


@_jit
def _rows(j, row, shown, work, place, BN: gl.constexpr):
    """What the index says of the rows of tile j, if that is one of those."""
    gathered = (j >= work.copied) & (j < work.chosen)
    by_index = j < work.indexed
    p_from = place.p_index + row
    if not by_index:
        p_from = place.p_chosen + row // 64
    o_row = gl.minimum(gl.arange(0, BN, gl.SliceLayout(1, LAYOUT_128)), shown - 1)
    return gl.load(p_from + gl.where(by_index, o_row, o_row // 64), mask=gathered, other=0)


@_jit
def _gather_rows(target, x, place, by_index, shown, rows):
    BN: gl.constexpr = target.shape[0]
    D: gl.constexpr = target.shape[1]
    LAYOUT: gl.constexpr = LAYOUT_64 if D == 64 else LAYOUT_128
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    p = x.p + (place.i_b.to(gl.int64) * x.b + place.i_kv.to(gl.int64) * x.h)
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    o_row = gl.minimum(gl.arange(0, BN, ROW), shown - 1)
    i_row = gl.convert_layout(rows, ROW)
    i_row = gl.where(by_index, i_row, place.first_key + i_row * 64 + o_row % 64).to(gl.int64)
    async_copy.async_copy_global_to_shared(target, p + i_row[:, None] * x.n + o_d[None, :])


@_jit
def _next(stage, phase''')
r("def _fill(stream, stage, phase, j, row, shown, work, place, lists):", "def _fill(stream, stage, phase, j, row, shown, rows, work, place, lists):")
r('''        _gather(stream.tiles.index(stage).reshape([BN, D]), stream.x, place, j < work.indexed, row, shown)
''', '''        target = stream.tiles.index(stage).reshape([BN, D])
        if X_ROWS:
            _gather_rows(target, stream.x, place, j < work.indexed, shown, rows)
        else:
            _gather(target, stream.x, place, j < work.indexed, row, shown)
''')
a = s.index("    stage, phase, q_phase = 0, 0, 0\n    for n in range(_rounds(sizes)):\n        work, place = _job(n, x"); b = s.index("@_jit\ndef _hide(")
s = s[:a] + '''    stage, phase, q_phase = 0, 0, 0
    rounds = _rounds(sizes)
    if X_AHEAD:  # keys a tile before values, over the ends of jobs too
        work, place = _job(0, x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        rows = 0
        if X_ROWS and x.index.p is not None:
            rows = _rows(0, row, shown, work, place, BN)
        v_j, v_row, v_shown, v_rows, v_work, v_place = 0, row, shown, rows, work, place
        for n in range(rounds):
            for j in range(work.total + (n + 1 == rounds).to(gl.int32)):  # the last values of all without keys
                next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
                if j < work.total:
                    _fill(keys, stage, phase, j, row, shown, rows, work, place, lists)
                next_rows = 0
                if X_ROWS and x.index.p is not None:
                    next_rows = _rows(j + 1, next_row, next_shown, work, place, BN)
                if n + j > 0:
                    before, before_phase = _before(stage, phase, SHAPE.STAGES)
                    _fill(values, before, before_phase, v_j, v_row, v_shown, v_rows, v_work, v_place, lists)
                if j == 0:
                    for half in gl.static_range(2):
                        full = shared.q_full.index(half)
                        mbarrier.wait(shared.q_empty.index(half), q_phase ^ 1)
                        mbarrier.expect(full, d.q.block_type.nbytes)
                        at = [place.i_b, place.i_h, place.q_row + ROWS * half, 0]
                        tma.async_copy_global_to_shared(d.q, at, full, shared.q.index(half))
                v_j, v_row, v_shown, v_rows, v_work, v_place = j, row, shown, rows, work, place
                stage, phase = _next(stage, phase, SHAPE.STAGES)
                row, shown, rows = next_row, next_shown, next_rows
            q_phase = q_phase ^ 1
            work, place = _job(gl.minimum(n + 1, rounds - 1), x, lists, sizes, SHAPE)
            row, shown, weight, more = _tile(0, work, lists, BN)
            if X_ROWS and x.index.p is not None:
                rows = _rows(0, row, shown, work, place, BN)
    else:
        for n in range(rounds):
            work, place = _job(n, x, lists, sizes, SHAPE)
            row, shown, weight, more = _tile(0, work, lists, BN)
            rows = 0
            if X_ROWS and x.index.p is not None:
                rows = _rows(0, row, shown, work, place, BN)
            for j in range(work.total):
                next_row, next_shown, next_weight, next_more = _tile(j + 1, work, lists, BN)
                _fill(keys, stage, phase, j, row, shown, rows, work, place, lists)
                next_rows = 0
                if X_ROWS and x.index.p is not None:  # behind the keys: by then it is known which these are
                    next_rows = _rows(j + 1, next_row, next_shown, work, place, BN)
                if j == 0:  # behind its first keys: there is room for queries a tile later than for these
                    for half in gl.static_range(2):
                        full = shared.q_full.index(half)
                        mbarrier.wait(shared.q_empty.index(half), q_phase ^ 1)
                        mbarrier.expect(full, d.q.block_type.nbytes)
                        at = [place.i_b, place.i_h, place.q_row + ROWS * half, 0]
                        tma.async_copy_global_to_shared(d.q, at, full, shared.q.index(half))
                _fill(values, stage, phase, j, row, shown, rows, work, place, lists)
                stage, phase = _next(stage, phase, SHAPE.STAGES)
                row, shown, rows = next_row, next_shown, next_rows
            q_phase = q_phase ^ 1


@_jit
def _fence(x, j, work):
    """What was copied by threads is there for products too."""
    if x.index.p is not None:
        if X_FENCE:
            if (j >= work.copied) & (j < work.chosen):
                fence_async_shared()
        else:
            fence_async_shared()


''' + s[b:]
# ---- consumer
F = '''if x.index.p is not None:
                fence_async_shared()
'''
r('''            mbarrier.wait(shared.k_full.index(stage), phase)
            if x.index.p is not None:
                fence_async_shared()
''', '''            mbarrier.wait(shared.k_full.index(stage), phase)
            _fence(x, j, work)
''')
r('''            mbarrier.wait(shared.v_full.index(before), before_phase)
            if x.index.p is not None:
                fence_async_shared()
''', '''            mbarrier.wait(shared.v_full.index(before), before_phase)
            _fence(x, j - 1, work)
''')
r('''    for n in range(rounds):
        b_acc = gl.zeros([ROWS, DV], gl.float32, O_L)
        q = shared.q.index(half).reshape([ROWS, D])
        mbarrier.wait(shared.q_full.index(half), q_phase)
        mbarrier.wait(shared.k_full.index(stage), phase)
        if x.index.p is not None:
            fence_async_shared()
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        b_s = warpgroup_mma(q, k, b_zero, use_acc=False)
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
''', '''    q = shared.q.index(half).reshape([ROWS, D])
    b_s = b_zero
    if X_ROTATE:
        mbarrier.wait(shared.q_full.index(half), q_phase)
        mbarrier.wait(shared.k_full.index(stage), phase)
        _fence(x, 0, work)
        k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
        b_s = warpgroup_mma(q, k, b_zero, use_acc=False)
        mbarrier.arrive(shared.k_empty.index(stage))
        mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
    for n in range(rounds):
        b_acc = gl.zeros([ROWS, DV], gl.float32, O_L)
        if not X_ROTATE:
            mbarrier.wait(shared.q_full.index(half), q_phase)
            mbarrier.wait(shared.k_full.index(stage), phase)
            _fence(x, 0, work)
            k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
            b_s = warpgroup_mma(q, k, b_zero, use_acc=False)
            mbarrier.arrive(shared.k_empty.index(stage))
            mbarrier.arrive(shared.q_empty.index(half), pred=work.total == 1)
''')
r('''        done = (place.i_bh, place.q_row)
        work, place = _job(gl.minimum(n + 1, rounds - 1), x, lists, sizes, SHAPE)
        row, shown, weight, more = _tile(0, work, lists, BN)
        before, before_phase = _before(stage, phase, STAGES)
        mbarrier.wait(shared.v_full.index(before), before_phase)
        if x.index.p is not None:
            fence_async_shared()
        b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc)
        mbarrier.arrive(shared.v_empty.index(before))
        _finish(b_acc, b_max, b_sum, done, x, sizes, half)
        q_phase = q_phase ^ 1
''', '''        done = (place.i_bh, place.q_row)
        last = work
        before, before_phase = _before(stage, phase, STAGES)
        if X_ROTATE:
            mbarrier.wait(shared.v_full.index(before), before_phase)
            _fence(x, last.total - 1, last)
            o_token = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc, is_async=True)
            work, place = _job(gl.minimum(n + 1, rounds - 1), x, lists, sizes, SHAPE)
            row, shown, weight, more = _tile(0, work, lists, BN)
            q_phase = q_phase ^ 1
            other = n + 1 < rounds  # of no other job the product is of what lies there, and not used
            mbarrier.wait(shared.q_full.index(half), q_phase, pred=other)
            mbarrier.wait(shared.k_full.index(stage), phase, pred=other)
            _fence(x, 0, work)
            k = shared.k.index(stage).reshape([BN, D]).permute((1, 0))
            s_token = warpgroup_mma(q, k, b_zero, use_acc=False, is_async=True)
            b_acc = warpgroup_mma_wait(1, deps=[o_token])
            mbarrier.arrive(shared.v_empty.index(before))
            _finish(b_acc, b_max, b_sum, done, x, sizes, half)
            b_s = warpgroup_mma_wait(0, deps=[s_token])
            mbarrier.arrive(shared.k_empty.index(stage), pred=other)
            mbarrier.arrive(shared.q_empty.index(half), pred=other & (work.total == 1))
        else:
            work, place = _job(gl.minimum(n + 1, rounds - 1), x, lists, sizes, SHAPE)
            row, shown, weight, more = _tile(0, work, lists, BN)
            mbarrier.wait(shared.v_full.index(before), before_phase)
            _fence(x, last.total - 1, last)
            b_acc = warpgroup_mma(b_p, shared.v.index(before).reshape([BN, DV]), b_acc)
            mbarrier.arrive(shared.v_empty.index(before))
            _finish(b_acc, b_max, b_sum, done, x, sizes, half)
            q_phase = q_phase ^ 1
''')
open(p, "w").write(s)
p = root + "/kernels/attend/segments.py"; s = open(p).read()
r("return cls(widths, hopper.QUERIES, 128, 4, 2, True)", 'return cls(widths, hopper.QUERIES, 128, 4, int(hopper.os.environ.get("X_STAGES", "2")), True)')
open(p, "w").write(s)
