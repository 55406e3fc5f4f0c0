"""The Gluon kernel as plain Python with threads, against the log-sum-exps of the definition."""
import sys, threading, time, random, types, contextlib
import torch
sys.path.insert(0, "/work/wt/choose"); 
from types import SimpleNamespace
import re
FILE = sys.argv[1] if len(sys.argv) > 1 else "/work/wt/choose/kernels/select/hopper.py"
src = open(FILE).read()
src = src[src.index("BM = constexpr"):src.index("def takes(")]
src = src.replace("b_s.type.layout", "None").replace(".to(gl.int32)", "").replace(".to(gl.int64)", "").replace("STAGES = constexpr(8)", "STAGES = constexpr(3)")
src = re.sub(r"^(\s*)(\w+) \+= (.*)$", r"\1\2 = \2 + (\3)", src, flags=re.M)
loc = threading.local()
class P:
    def __init__(s, base, off=0): s.base, s.off = base, off
    def __add__(s, o): return P(s.base, s.off + o)
def load(p, mask=None, other=0):
    return p.base[torch.as_tensor(p.off).long()].clone()
def store(p, v, mask=None):
    off = torch.as_tensor(p.off).long()
    m = torch.ones_like(off, dtype=torch.bool) if mask is None else mask
    assert (off[m] < p.base.numel()).all() and (off[m] >= 0).all()
    p.base[off[m]] = v[m]
class Bar:
    def __init__(s): s.cv = threading.Condition(); s.phase = 0; s.tx = 0
    def init(s, count): s.count = s.pending = count
    def _done(s):
        if s.pending == 0 and s.tx == 0:
            s.phase += 1; s.pending = s.count; s.cv.notify_all()
    def wait(s, p):
        p = int(p)
        with s.cv:
            if not s.cv.wait_for(lambda: (s.phase & 1) != p, timeout=20): raise RuntimeError("deadlock")
    def arrive(s):
        with s.cv:
            assert s.pending > 0; s.pending -= 1; s._done()
    def expect(s, n):
        with s.cv: s.pending -= 1; s.tx += n; s._done()
    def complete(s, n):
        with s.cv: s.tx -= n; s._done()
class Sm:
    def __init__(s, t): s.t = t
    def index(s, i): return s.t[int(i)] if isinstance(s.t, list) else Sm(s.t[int(i)])
    def slice(s, a, n, dim): return Sm(s.t.narrow(dim, int(a), n))
    def reshape(s, shape): return Sm(s.t.reshape(shape))
    def permute(s, d): return Sm(s.t.permute(d))
    def load(s, l): return s.t.clone()
    @property
    def shape(s): return s.t.shape
def jitter():
    if random.random() < .3: time.sleep(random.random() * 2e-4)
class Desc:
    def __init__(s, x, rows): s.x, s.rows = x, rows; s.block_type = SimpleNamespace(nbytes=rows * x.shape[3] * 2); s.dtype = None; s.layout = None
def load_tile(d, at, bar, target):
    target.t.fill_(float("nan"))
    b, h, row, c = (int(i) for i in at); n = d.block_type.nbytes
    def later():
        time.sleep(random.random() * 3e-4)
        rows = torch.arange(row, row + d.rows); ok = (rows >= 0) & (rows < d.x.shape[2])
        tile = torch.zeros(d.rows, d.x.shape[3]); tile[ok] = d.x[b, h, rows[ok]]
        target.t.copy_(tile.reshape(target.t.shape)); bar.complete(n)
    threading.Thread(target=later).start()
def load_rows(target, p): target.t.copy_(p.base[torch.as_tensor(p.off).long()])
def allocate(dtype, shape, layout):
    if dtype == "int64": return Sm([Bar() for _ in range(shape[0])])
    return Sm(torch.full([int(i) for i in shape], float("nan")))
def tt(x): return torch.as_tensor(x)
errors = []
def specialize(parts, warps, regs):
    pid = loc.pid
    def go(f, a):
        loc.pid = pid
        try: f(*a)
        except BaseException as e: errors.append(e); raise
    ts = [threading.Thread(target=go, args=p) for p in parts]
    [t.start() for t in ts]; [t.join() for t in ts]
PROGRAMS = 3
def mma(a, b, c, use_acc=False, is_async=False):
    jitter(); return a @ b.t
gl = SimpleNamespace(program_id=lambda i: tt(loc.pid), num_programs=lambda i: PROGRAMS, minimum=lambda a, b: torch.minimum(tt(a), tt(b)),
    maximum=lambda a, b: torch.maximum(tt(a), tt(b).to(tt(a).dtype)), where=lambda c, a, b: torch.where(tt(c), tt(a), tt(b)), load=load, store=store,
    arange=lambda a, b, l: torch.arange(a, b), SliceLayout=lambda *a: None, BlockedLayout=lambda *a: None, NVMMADistributedLayout=lambda *a: None,
    DotOperandLayout=lambda *a: None, NVMMASharedLayout=lambda *a: None, zeros=lambda s, d, l: torch.zeros(s), static_range=range, float32=torch.float32,
    max=lambda x, d: x.amax(d), sum=lambda x, d: x.sum(d), exp2=torch.exp2, log2=torch.log2, allocate_shared_memory=allocate, int64="int64", warp_specialize=specialize, constexpr=None,
    barrier=lambda: None)
mbarrier = SimpleNamespace(init=lambda b, count: b.init(count), wait=lambda b, p, pred=True: b.wait(p), arrive=lambda b, pred=True: b.arrive() if bool(tt(pred)) else None, expect=lambda b, n: b.expect(n), MBarrierLayout=lambda: None)
from collections import namedtuple
def _jit(fn=None, **o): return (lambda f: f) if fn is None else fn
def _next(stage, phase, STAGES):
    last = stage == STAGES - 1
    return (0 if last else stage + 1), (phase ^ 1 if last else phase)
ns = dict(gl=gl, mbarrier=mbarrier, gluon_jit=_jit, next_stage=_next, load_rows=load_rows, load_tile=load_tile, warpgroup_mma=mma, namedtuple=namedtuple, constexpr=lambda x: x,
    warpgroup_mma_wait=lambda n, deps: deps[0],
    async_copy=SimpleNamespace(mbarrier_arrive=lambda b: None), Any=object, __name__="sim")
exec(compile("from __future__ import annotations\n" + src, "sim_src", "exec"), ns)
Strided = namedtuple("Strided", "p b h n")
def case(B, H, H_kv, Lq, Lk, D, sinks, samples, stride, block, first, blocks, chunk, heads=None, start=None, seed=0, stages=3):
    torch.manual_seed(seed)
    q, k = torch.randn(B, H, Lq, D), torch.randn(B, H_kv, Lk, D)
    G = H // H_kv; per = G * samples
    from express_compile.kernels.select.blocks import BlockConfig, query_blocks
    layout = query_blocks(BlockConfig(1, sinks, 64, samples, stride, block), Lq, Lk)
    line = sinks - 64 * -(-sinks // 64)
    begin = layout.q_offset - layout.shift + first * block
    last = max(begin + (blocks - 1) * block, layout.q_offset) if start is None else min(Lk, begin + blocks * block) - 1
    columns = (last - line) // 64 + 1
    own = list(range(H_kv)) if heads is None else heads
    rows, n = blocks * per, len(own)
    lse = torch.full((B * n * columns * rows,), 12345.0)
    x = ns["ScoreTensors"](P(lse), Strided(P(q.flatten()), H * Lq * D, Lq * D, D), None if start is None else P(torch.tensor(start)), None if heads is None else P(torch.tensor(heads)), 0.7)
    ROWS = ns["ROWS"]
    sizes = ns["ScoreSizes"](n, B * n, Lq, layout.q_offset, begin, line, rows, columns, -(-rows // ROWS), chunk)
    shape = ns["ScoreShape"](D, G, samples, stride, block)
    for pid in range(PROGRAMS):
        loc.pid = pid; ns["score_kernel"](Desc(k, 64), x, sizes, shape)
    assert not errors, errors
    got = lse.view(B, n, blocks, columns, per)
    seen = 0
    for b in range(B):
        st = layout.q_offset if start is None else start[b]
        for j, h in enumerate(own):
            for i in range(blocks):
                for r in range(per):
                    s, g = r // G, r % G
                    pos = min(max(begin + i * block, st, 0), begin + (i + 1) * block - 1) - s * stride
                    if pos < st: continue
                    sc = 0.7 * (k[b, h] @ q[b, h * G + g, pos - layout.q_offset]); sc[pos + 1:] = -torch.inf
                    cols = (pos - line) // 64 + 1
                    padded = torch.cat([torch.full((-line,), -torch.inf), sc, torch.full((64 * (columns + 1),), -torch.inf)])[: cols * 64].view(cols, 64)
                    want = torch.logsumexp(padded * 0.6931471805599453, 1) / 0.6931471805599453
                    torch.testing.assert_close(got[b, j, i, :cols, r], want, rtol=1e-4, atol=1e-4); seen += cols
    print("ok", dict(B=B, H=H, H_kv=H_kv, Lq=Lq, Lk=Lk, blocks=blocks, columns=columns, rows=rows, chunk=chunk), "values", seen, flush=True)
if __name__ == "__main__":
    case(1, 2, 1, 1100, 1100, 64, 32, 1, 4, 16, 0, 69, 3)
    case(2, 4, 2, 1500, 1500, 64, 32, 1, 4, 16, 0, 94, 4)
    case(1, 4, 2, 700, 1000, 64, 0, 2, 5, 16, 3, 40, 2, heads=[1])
    case(1, 3, 1, 1500, 1500, 64, 70, 2, 4, 16, 10, 80, 5)
    case(2, 2, 2, 900, 1000, 64, 64, 3, 7, 16, 0, 57, 1, start=[100, 333], heads=[1, 0])
    case(1, 2, 1, 1, 300, 64, 32, 1, 4, 128, 0, 1, 4)
    for s in range(6):
        r = random.Random(s); Hk = r.choice([1, 2]); G = r.choice([1, 2, 3, 4]); Lk = r.randint(300, 1400); Lq = r.randint(1, Lk); b = r.choice([16, 32])
        sinks, samples = r.choice([0, 1, 32, 100]), r.choice([1, 1, 3])
        from express_compile.kernels.select.blocks import BlockConfig, query_blocks
        tot = len(query_blocks(BlockConfig(1, sinks, 64, samples, 4, b), Lq, Lk).begin); f = r.randint(0, tot - 1)
        case(1, Hk * G, Hk, Lq, Lk, 64, sinks, samples, 4, b, f, tot - f, r.choice([1, 2, 4, 7]), seed=s)
