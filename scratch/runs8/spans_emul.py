"""Runs the Gluon kernel of kernels/attend/hopper.py on a CPU: gl, mbarrier, TMA and cp.async written in numpy, a thread
per partition; data of TMA and cp.async arrives late and in random order."""
from __future__ import annotations
import importlib.util, itertools, random, sys, threading, time
from types import SimpleNamespace
import numpy as np
import torch

counter = itertools.count(1)
local = threading.local()


def un(x):
    return x.a if isinstance(x, T) else x


class T:
    def __init__(self, a): self.a = np.asarray(a)
    shape = property(lambda s: s.a.shape)
    type = SimpleNamespace(layout=None)
    dtype = None
    def to(self, dtype):
        return T(self.a.astype(np.int64)) if dtype == "int" else self
    def __bool__(self): return bool(self.a)
    def __index__(self): return int(self.a)
    def __int__(self): return int(self.a)
    def __getitem__(self, i): return T(self.a[i])
    def __neg__(self): return T(-self.a)


def div(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind == "f" or b.dtype.kind == "f": raise TypeError
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


OPS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "floordiv": div,
    "mod": lambda a, b: a - div(a, b) * b, "truediv": lambda a, b: np.true_divide(a, b), "and": lambda a, b: np.bitwise_and(a, b),
    "or": lambda a, b: np.bitwise_or(a, b), "xor": lambda a, b: np.bitwise_xor(a, b), "lt": lambda a, b: np.less(a, b),
    "le": lambda a, b: np.less_equal(a, b), "gt": lambda a, b: np.greater(a, b), "ge": lambda a, b: np.greater_equal(a, b),
    "eq": lambda a, b: np.equal(a, b), "ne": lambda a, b: np.not_equal(a, b),
}
for name, op in OPS.items():
    def fwd(self, other, op=op):
        if isinstance(other, P): return NotImplemented
        return T(op(self.a, un(other)))
    def rev(self, other, op=op): return T(op(un(other), self.a))
    setattr(T, f"__{name}__", fwd)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"): setattr(T, f"__r{name}__", rev)
T.__hash__ = None


class P:
    """A pointer: memory and where in it."""
    def __init__(self, mem, off=0): self.mem, self.off = mem, np.asarray(off)
    dtype = SimpleNamespace(element_ty=None)
    def __add__(self, x): return P(self.mem, self.off + un(x))
    __radd__ = __add__
    def __sub__(self, x): return P(self.mem, self.off - un(x))


def flat(x: torch.Tensor):
    """The memory from ``x`` on, in its storage."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return P(whole.numpy(), x.storage_offset())


def load(p, mask=None, other=None):
    off = p.off
    if mask is None:
        assert (off >= 0).all() and (off < len(p.mem)).all(), "load out of bounds"
        return T(p.mem[off])
    m = np.broadcast_to(un(mask), off.shape)
    assert (off[m] >= 0).all() and (off[m] < len(p.mem)).all(), "load out of bounds"
    if not m.any(): return T(np.broadcast_to(un(other), off.shape))
    return T(np.where(m, p.mem[np.where(m, off, 0)], un(other)))


def store(p, x, mask=None):
    off, m = p.off, np.broadcast_to(un(mask), p.off.shape)
    x = np.broadcast_to(un(x), off.shape)
    assert (off[m] >= 0).all() and (off[m] < len(p.mem)).all(), "store out of bounds"
    p.mem[off[m]] = x[m]


def where(c, a, b):
    if isinstance(a, P):
        assert not np.shape(un(c))
        return a if bool(un(c)) else b
    return T(np.where(un(c), un(a), un(b)))


class View:
    """Part of shared memory, [C, R, 64]."""
    def __init__(self, data, stamp): self.data, self.stamp = data, stamp
    shape = property(lambda s: (s.data.shape[1], s.data.shape[0] * 64))
    def reshape(self, shape):
        assert tuple(shape) == self.shape, (shape, self.shape)
        return self
    def slice(self, at, n, dim):
        assert dim == 0
        return View(self.data[:, at : at + n], self.stamp[:, at : at + n])
    def permute(self, order): return SimpleNamespace(view=self)
    def read(self):
        assert self.stamp.max() < getattr(local, "fence", 0) or self.stamp.max() == 0, "no fence behind cp.async"
        return self.data.transpose(1, 0, 2).reshape(self.shape)


class Tiles:
    layout = None
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype
        N, _, _, R, D = shape
        self.data = np.full((N, D // 64, R, 64), np.nan, np.float32)
        self.stamp = np.zeros((N, D // 64, R), np.int64)
    def index(self, i): return View(self.data[int(un(i))], self.stamp[int(un(i))])


def reinterpret(tiles, dtype, shape, layout):
    N, _, _, R, C = shape
    assert C == 64
    return SimpleNamespace(index=lambda i: View(tiles.data.reshape(N, 1, R, 64)[int(un(i))], tiles.stamp.reshape(N, 1, R)[int(un(i))]))


class Barrier:
    def __init__(self): self.cv, self.phase, self.tx, self.count = threading.Condition(), 0, 0, None
    def step(self):
        assert self.pending >= 0 and self.tx >= 0, (self.pending, self.tx)
        if self.pending == 0 and self.tx == 0:
            self.phase ^= 1
            self.pending = self.count
            self.cv.notify_all()
    def change(self, arrivals, tx):
        with self.cv:
            self.tx += tx
            self.pending -= arrivals
            self.step()


class Barriers:
    def __init__(self, n): self.each = [Barrier() for _ in range(n)]
    def index(self, i): return self.each[int(un(i))]


def init(bar, count): bar.count = bar.pending = count


class Stuck(Exception): pass


def wait(bar, phase):
    phase, end = int(un(phase)), time.time() + 20
    with bar.cv:
        while bar.phase == phase:
            if run.failed or time.time() > end: raise Stuck("barrier")
            bar.cv.wait(0.05)


def expect(bar, nbytes, pred=True):
    if bool(un(pred)): bar.change(1, nbytes)


def arrive(bar, pred=True):
    if bool(un(pred)): bar.change(1, 0)


class Engine(threading.Thread):
    """Does what was asked for, late and in any order."""
    def __init__(self):
        super().__init__(daemon=True)
        self.cv, self.jobs, self.done = threading.Condition(), [], False
        self.start()
    def ask(self, f):
        with self.cv:
            self.jobs.append(f)
            self.cv.notify()
    def run(self):
        while True:
            with self.cv:
                while not self.jobs:
                    if self.done: return
                    self.cv.wait(0.5)
                f = self.jobs.pop(random.randrange(len(self.jobs)))
            try: f()
            except BaseException as e: run.failed.append(e); return


def load_tile(desc, at, bar, view):
    at = [int(un(x)) for x in at]
    box = desc.block_shape
    def f():
        x = desc.base.numpy()
        assert 0 <= at[0] < x.shape[0] and 0 <= at[1] < x.shape[1]
        rows, cols = np.arange(at[2], at[2] + box[2]), slice(at[3], at[3] + box[3])
        ok = (rows >= 0) & (rows < x.shape[2])
        part = np.where(ok[:, None], x[at[0], at[1]][np.where(ok, rows, 0)][:, cols], 0)
        assert part.shape == view.shape, (part.shape, view.shape)
        view.data[:] = part.reshape(box[2], -1, 64).transpose(1, 0, 2)
        view.stamp[:] = 0
        stats["tma"] += 1
        bar.change(0, -desc.block_type.nbytes)
    local.engine.ask(f)


stats = {"tma": 0, "rows": 0, "jobs": 0}


def load_rows(target, p):
    off = p.off
    assert off.shape == target.shape, (off.shape, target.shape)
    assert (off >= 0).all() and (off < len(p.mem)).all(), "cp.async out of bounds"
    if not hasattr(local, "copies"): local.copies = []
    local.copies.append((target, p))


def copy_arrive(bar):
    copies, local.copies = getattr(local, "copies", []), []
    with bar.cv: bar.pending += 1
    def f():
        for target, p in copies:
            target.data[:] = p.mem[p.off].reshape(p.off.shape[0], -1, 64).transpose(1, 0, 2)
            target.stamp[:] = next(counter)
            stats["rows"] += p.off.shape[0]
        bar.change(1, 0)
    local.engine.ask(f)


def fence(): local.fence = next(counter)


def mma(a, b, acc, use_acc=True, is_async=False):
    a = a.read() if isinstance(a, View) else a.a
    b = b.view.read().T if not isinstance(b, View) else b.read()
    return T(a.astype(np.float32) @ b.astype(np.float32) + (acc.a if use_acc else 0))


def allocate(dtype, shape, layout): return Barriers(shape[0]) if len(shape) == 2 else Tiles(shape, dtype)


def run(parts):
    def go(fn, args, engine):
        local.engine = engine
        try: fn(*args)
        except BaseException as e:
            run.failed.append(e)
            if not isinstance(e, Stuck): import traceback; traceback.print_exc()
    engine = Engine()
    me = local.program
    def start(fn, args):
        local.program = me
        go(fn, args, engine)
    threads = [threading.Thread(target=start, args=x, daemon=True) for x in parts]
    for t in threads: t.start()
    for t in threads: t.join()
    with engine.cv:
        engine.done = True
        engine.cv.notify()
    engine.join()
    assert not engine.jobs
    if run.failed: raise RuntimeError(run.failed)


run.failed = []
one = lambda f: lambda x, *axis: T(f(un(x), *axis))
gl = SimpleNamespace(
    constexpr=int, int64="int", int32="int", float32="float", static_range=range, load=load, store=store, where=where,
    minimum=lambda a, b: T(np.minimum(un(a), un(b))), maximum=lambda a, b: T(np.maximum(un(a), un(b))),
    arange=lambda a, b, layout: T(np.arange(a, b)), zeros=lambda shape, dtype, layout: T(np.zeros(shape, np.float32)),
    program_id=lambda i: T(local.program[0]), num_programs=lambda i: T(local.program[1]),
    exp2=one(np.exp2), log2=one(np.log2), max=one(np.max), sum=one(np.sum), convert_layout=lambda x, layout: x,
    BlockedLayout=lambda *x: None, SliceLayout=lambda *x: None, NVMMADistributedLayout=lambda *x: None,
    DotOperandLayout=lambda *x: None, NVMMASharedLayout=lambda *x: None, allocate_shared_memory=allocate,
    warp_specialize=lambda parts, warps, registers: run(parts),
)


class Descriptor:
    layout, dtype = None, None
    def __init__(self, base, shape, strides, block, layout):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)) * 2, shape=block)


def argument(x):
    if isinstance(x, torch.Tensor): return flat(x)
    if isinstance(x, Descriptor) or x is None or isinstance(x, (str, float)): return x
    if isinstance(x, tuple): return type(x)(*map(argument, x)) if hasattr(x, "_fields") else tuple(map(argument, x))
    return T(x)


def launch(kernel, grid, *args, SHAPE, num_warps):
    args = [argument(x) for x in args]
    programs = module.PROGRAMS(grid[0])
    for i in range(programs):
        local.program = (i, programs)
        with np.errstate(all="ignore"):
            kernel(*args, SHAPE)


def emulated(path):
    global module
    import triton  # noqa
    saved = {k: v for k, v in sys.modules.items() if k.startswith("triton.experimental")}
    for k in saved: del sys.modules[k]
    sys.modules["triton.experimental"] = None
    spec = importlib.util.spec_from_file_location("express_compile.kernels.attend.hopper_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["triton.experimental"]
    sys.modules.update(saved)
    assert module.gluon is None
    tma = SimpleNamespace()
    vars(module).update(
        gl=gl, mbarrier=SimpleNamespace(init=init, wait=wait, expect=expect, arrive=arrive, MBarrierLayout=lambda: None),
        async_copy=SimpleNamespace(mbarrier_arrive=copy_arrive), fence_async_shared=fence, warpgroup_mma=mma,
        warpgroup_mma_wait=lambda n, deps: deps[0], load_rows=load_rows, load_tile=load_tile, reinterpret=reinterpret,
        TensorDescriptor=Descriptor, ROWS=64, SLOTS=4, GATHERED=2048, launch=launch, processors=lambda device: 3,
        takes=lambda *x: True, _layout=lambda: None, PROGRAMS=lambda n: n,
    )
    module.SLOTS = Int(4)
    return module


class Int(int):
    value = property(int)


_emulated = emulated
def emulated(path):
    m = _emulated(path)
    job = m._job
    m._job = lambda n, at, *rest: job(n if isinstance(n, T) else T(n), tuple(T(un(x)) for x in at), *rest)
    return m
