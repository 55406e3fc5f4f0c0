import sys
p = sys.argv[1]; s = open(p).read(); what = sys.argv[2:]
def r(a, b, c=1):
    global s
    assert s.count(a) == c, (a, s.count(a)); s = s.replace(a, b)
if "uniform" in what:
    r('''@_jit
def _fill(stream, count, j, row, shown, work, place):
    """Tile j of a job, the one after ``count`` others, as soon as there is room for it."""
    STAGES: gl.constexpr = stream.tiles.shape[0]
''', '''@_jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@_jit
def _fill(stream, stage, phase, j, row, shown, work, place):
    """Tile j of a job, as soon as there is room for it."""
''')
    r('''    stage = count % STAGES
    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), (count // STAGES) & 1 ^ 1)
''', '''    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
''')
    r('''    count = 0
    for n in range(_rounds(sizes)):
''', '''    stage, phase, side, side_phase = 0, 0, 0, 0
    for n in range(_rounds(sizes)):
''')
    r('''            at = n % 2 * 2 + half
            full = shared.q_full.index(at)
            mbarrier.wait(shared.q_empty.index(at), (n // 2) & 1 ^ 1)
''', '''            at = side * 2 + half
            full = shared.q_full.index(at)
            mbarrier.wait(shared.q_empty.index(at), side_phase ^ 1)
''')
    r('''            _fill(keys, count, j, row, shown, work, place)
            _fill(values, count, j, row, shown, work, place)
            count += 1
''', '''            _fill(keys, stage, phase, j, row, shown, work, place)
            _fill(values, stage, phase, j, row, shown, work, place)
            stage, phase = _next(stage, phase, SHAPE.STAGES)
        side, side_phase = _next(side, side_phase, 2)
''')
    r('''    # the tile to come is number ``j`` of job ``n``, after ``count`` others; the last of them was number ``added``
    n, j, count, added = 0, 1, 1, 0
    if work.total == 1:
        n, j = 1, 0
''', '''    # the tile to come is number ``j`` of job ``n``, and the last one was number ``added`` of its own
    n, j, added = 0, 1, 0
    before, before_phase, side, side_phase = 0, 0, 0, 0
    stage, phase = _next(before, before_phase, STAGES)
    if work.total == 1:
        n, j, side = 1, 0, 1
''')
    r('''        stage = count % STAGES
        before = (count - 1) % STAGES
        mbarrier.wait(shared.q_full.index(n % 2 * 2 + half), (n // 2) & 1, pred=j == 0)
        mbarrier.wait(shared.k_full.index(stage), (count // STAGES) & 1)
''', '''        mbarrier.wait(shared.q_full.index(side * 2 + half), side_phase, pred=j == 0)
        mbarrier.wait(shared.k_full.index(stage), phase)
''')
    r('shared.q.index(n % 2 * 2 + half)', 'shared.q.index(side * 2 + half)')
    r('shared.q_empty.index(n % 2 * 2 + half)', 'shared.q_empty.index(side * 2 + half)')
    r('mbarrier.wait(shared.v_full.index(before), ((count - 1) // STAGES) & 1)', 'mbarrier.wait(shared.v_full.index(before), before_phase)')
    r('''        added = j
        count += 1
        j += 1
''', '''        added = j
        before, before_phase = stage, phase
        stage, phase = _next(stage, phase, STAGES)
        j += 1
''')
    r('''            n += 1
            j = 0
''', '''            n += 1
            j = 0
            side, side_phase = _next(side, side_phase, 2)
''')
    r('''    last = count - 1
    mbarrier.wait(shared.v_full.index(last % STAGES), (last // STAGES) & 1)
''', '''    mbarrier.wait(shared.v_full.index(before), before_phase)
''')
    r('shared.v.index(last % STAGES)', 'shared.v.index(before)')
if "plain" in what:
    r('Shared = namedtuple("Shared", "q k v out q_full', 'Shared = namedtuple("Shared", "q k v q_full')
    r('''def _finish(b_acc, b_max, b_sum, done, out, x, sizes, half: gl.constexpr):
    """Store the results of a job; ``out``: their descriptor and where they wait in shared memory."""
''', '''def _finish(b_acc, b_max, b_sum, done, x, sizes, half: gl.constexpr):
    """Store the results of a job."""
''')
    r('''    descriptor, waiting = out
    q_row += ROWS * half
''', '')
    r('''    tma.store_wait(0)  # of the job before
    waiting.reshape([ROWS, DV]).store(b_out.to(waiting.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(descriptor, [i_bh // sizes.H, i_bh % sizes.H, q_row, 0], waiting)
''', '')
    r('''    o_m = q_row + gl.arange(0, ROWS, ROW)
    gl.store(x.lse + (i_bh.to(gl.int64) * sizes.Lq + o_m), b_lse, mask=(o_m >= 0) & (o_m < sizes.Lq))
''', '''    o_m = q_row + ROWS * half + gl.arange(0, ROWS, ROW)
    m_m = (o_m >= 0) & (o_m < sizes.Lq)
    o_row = i_bh.to(gl.int64) * sizes.Lq + o_m
    o_d = gl.arange(0, DV, gl.SliceLayout(0, b_acc.type.layout))
    gl.store(x.out + o_row[:, None] * DV + o_d[None, :], b_out.to(x.out.dtype.element_ty), mask=m_m[:, None])
    gl.store(x.lse + o_row, b_lse, mask=m_m)
''')
    r('def _consume(d_out, x, lists,', 'def _consume(x, lists,')
    r('    out = (d_out, shared.out.index(half))\n', '')
    r('done, out, x, sizes, half)', 'done, x, sizes, half)', 2)
    r('    tma.store_wait(0)\n', '')
    r('d_ck, d_cv, d_out, x, lists, sizes, SHAPE', 'd_ck, d_cv, x, lists, sizes, SHAPE')
    r('        gl.allocate_shared_memory(d_out.dtype, [2, 1, 1, ROWS, SHAPE.DV], d_out.layout),\n', '')
    r('(_consume, (d_out, x,', '(_consume, (x,', 2)
    r('*described, describe(tensors.out, QUERIES // 2), tensors,', '*described, tensors,')
if "regs" in what: r('[224, 56]', '[224, 64]')
open(p, "w").write(s)
