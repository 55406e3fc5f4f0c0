"""Device functions shared by the Triton kernels, and the counter-based random numbers with their torch twin.

Kernels and references draw from the same Philox4x32-10 streams, so that they can be compared decision by
decision. A stream is named by the key ``(seed, layer)`` and by the counter
``(draw, bucket, stage, head)``, see :func:`philox_uniform`. Heads are counted from the number in the upper half of a
seed (:func:`~express_compile.core.shards.seed_of`), so that a part of them draws what it would among all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    import triton
    from triton import language
    from triton.tools import tensor_descriptor
except ImportError:  # no Triton on this platform: the references still work, a launch raises require_triton's error
    triton = language = tensor_descriptor = None

try:
    from triton.experimental.gluon.nvidia import hopper as gluon_hopper
except ImportError:  # no Triton, or one without Gluon
    gluon_hopper = None

tl: Any = language
TensorDescriptor: Any = getattr(tensor_descriptor, "TensorDescriptor", None)
DESCRIPTORS = (TensorDescriptor, getattr(gluon_hopper, "TensorDescriptor", None))


def constexpr(x: Any) -> Any:
    """``tl.constexpr``, which a global constant has to be for kernels, or ``x`` where Triton is not installed."""
    return x if tl is None else tl.constexpr(x)


# Products of float32 tiles on tensor cores: each factor is split into three bfloat16. On an H200 attention (D = 64)
# erred by 2.0e-7 and took 0.32 ms; by 5.1e-7 and 1.60 ms with "ieee", which the interpreter takes instead. With
# "tf32x3" Triton 3.6 reads illegal memory at D = 128. Other dtypes do not look at it.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32_DOT = constexpr("ieee" if _INTERPRETED else "bf16x6")


def jit(fn: Callable | None = None, *, general: str = "") -> Any:
    """``triton.jit``, or the plain function where Triton is not installed.

    ``general`` names arguments, separated by spaces, for whose values no kernel of their own is compiled: counts
    that follow the length of the sequence. In a tuple it means every integer; only :func:`launch` sees to that.
    """
    if fn is None:
        return functools.partial(jit, general=general)
    return fn if triton is None else triton.jit(fn, do_not_specialize=general.split())


class Strided(NamedTuple):
    """A tensor ``[B, H, n, D]`` as an argument of a kernel: its memory and strides; that of D is 1."""

    p: Any
    b: Any
    h: Any
    n: Any


def strided(x: torch.Tensor | None) -> Strided:
    """``x`` ``[B, H, n, D]`` or ``[B, H, n]``, copied unless its last stride is 1, as an argument of a kernel."""
    if x is None:
        return Strided(None, 0, 0, 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Strided(x, *x.stride()[:3])


class Random(NamedTuple):
    """The key of a stream of random numbers: ``seed``, 0-dim int64 on the device, and the layer. ``heads`` int32: which
    KV heads draw, by their numbers in the layer, where it is not all of them in order."""

    seed: Any
    layer: Any
    heads: Any = None


class Widths(NamedTuple):
    """Columns of keys and of values, and of the tiles that hold them: constants of a kernel."""

    D: int
    DV: int
    BD: int
    BDV: int

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> Widths:
        D, Dv = key.shape[-1], value.shape[-1]
        return cls(D, Dv, *(max(16, next_power_of_two(x)) for x in (D, Dv)))

    @classmethod
    def alike(cls, key: torch.Tensor, value: torch.Tensor) -> Widths:
        """The same for kernels with products over both widths: of float32 the narrower tile gets as many columns as the
        other, up to 64.

        Narrower tiles of unequal width are swizzled in two ways in shared memory, and the parts of float32 factors
        take turns in the same place of it. ptxas 12.8 (Triton 3.6, sm_90; 12.9 does not) then computes the address of
        some of them from a register that nothing wrote: sums that change from run to run, or reads of illegal memory.
        tests/gpu/test_registers.py looks for such reads in what was compiled.
        """
        widths = cls.of(key, value)
        least = min(64, max(widths[2:])) if key.dtype == torch.float32 else 0
        return widths._replace(BD=max(widths.BD, least), BDV=max(widths.BDV, least))


_compiled: dict[tuple, tuple[Any, list]] = {}
_recent: dict[tuple, tuple[Any, list]] = {}  # the same by values, which is found faster; forgotten when it is full
_RECENT = 4096


def _values(args: Iterable, found: list) -> list:
    """What tells apart the arguments of two launches: numbers, and what memory is like. This is called often."""
    for x in args:
        kind = type(x)
        if kind is torch.Tensor:
            found += (x.dtype, x.data_ptr() % 16)
        elif kind is Strided and x.p is not None:
            found += (x.p.dtype, x.p.data_ptr() % 16, x[1:])
        elif kind is int or isinstance(x, tuple) and type(x[0]) is int:
            found.append(x)
        elif x is None or kind is float:
            found.append(kind)
        elif kind in DESCRIPTORS:
            found += (x.base.dtype, *x.block_shape)
        elif isinstance(x, tuple):
            _values(x, found)
        else:
            found.append(_kind(x))
    return found


def _kind(x: Any, general: bool = False) -> Any:
    """What a kernel may be compiled for: the dtype and alignment of a tensor, the divisibility of an integer."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, tuple):
        return tuple(_kind(y, general) for y in x)
    if isinstance(x, int):
        return x >= 1 << 31 if general else (x == 1) + 2 * (x % 16 == 0) + 4 * (x >= 1 << 31)
    return (x.base.dtype, *x.block_shape) if type(x) in DESCRIPTORS else type(x)


def stand_in(x: Any, general: bool) -> Any:
    """``x`` for the compiler, which would make much of 1 and of multiples of 16 in a tuple, ``general`` or not."""
    if isinstance(x, tuple):
        parts = (stand_in(y, general) for y in x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return (3 if x < 1 << 31 else (1 << 31) + 3) if general and type(x) is int else x


def _device(args: Iterable) -> torch.device:
    """That of the first tensor; the first tuple has one in it if none comes before."""
    for x in args:
        if isinstance(x, torch.Tensor):
            return x.device
        if isinstance(x, tuple):
            return _device(x)
    raise TypeError("a kernel needs a tensor")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first tensor, constant arguments as options.

    Finds the compiled kernel again in a fraction of the time that Triton takes, which exceeds that of many kernels.
    """
    device = _device(args)
    if device.type != "cuda" or not isinstance(kernel, triton.JITFunction):
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext():
        recent = tuple(_values(args, [kernel.fn, device.index, *options.values()]))
        found = _recent.get(recent)
        if found is None:
            free = [parameter.do_not_specialize for parameter in kernel.params]
            kinds = [_kind(x, general) for x, general in zip(args, free, strict=False)]
            key = (kernel.fn, device.index, *options.values(), *kinds)
            if key not in _compiled:
                compiled = kernel.warmup(*map(stand_in, args, free), grid=grid, **options)
                _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(args) :]]
            if len(_recent) == _RECENT:
                _recent.clear()
            found = _recent[recent] = _compiled[key]
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
    if (watch := getattr(_watch, "by", None)) is not None:
        watch(compiled, grid, (*args, *constants), [parameter.do_not_specialize for parameter in kernel.params])


# ---------------------------------------------------------------------------------------------------------------
# Launches without Triton's own Python, for :mod:`.prepared`


def current_device() -> int:
    """The current device of CUDA; -1 where CUDA has not begun, as asking fails there without a driver."""
    return torch._C._cuda_getDevice() if torch.cuda.is_initialized() else -1


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

_watch = threading.local()


@contextlib.contextmanager
def watched_by(watch: Callable[..., None]) -> Iterator[None]:
    """While active, ``watch`` is told of every launch of this thread: the compiled kernel, its grid, its arguments,
    and in which of them it is general."""
    before, _watch.by = getattr(_watch, "by", None), watch
    try:
        yield
    finally:
        _watch.by = before


def is_hooked() -> bool:
    """Whether somebody, such as a profiler, asked Triton to be told of launches."""
    if triton is None:
        return False
    runtime = triton.knobs.runtime
    first, last = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(first, "calls", first) or getattr(last, "calls", last))


_TRITON = "" if triton is None else ".".join(triton.__version__.split(".")[:2])
LAUNCHERS = ("3.6", "3.7", "3.8", "3.9")
"""The versions of Triton whose launchers are known here."""


class Launcher(NamedTuple):
    """How Triton launches a compiled kernel on an NVIDIA GPU: ``call(*grid, stream, *fixed, *args)``, a function in C,
    or with ``args`` as one tuple if they are ``nested``. It takes addresses for tensors. ``metadata``: of descriptors,
    by argument; ``make`` gives what is passed for one."""

    call: Callable[..., None]
    fixed: tuple[Any, ...]
    nested: bool
    metadata: dict[int, Any]
    make: Callable[..., list[Any]]

    @classmethod
    def of(cls, compiled: Any) -> Launcher | None:
        """None for a Triton whose launchers are not known here, and for kernels that need more than the call."""
        run = compiled.run
        driver, instrumented = sys.modules[type(run).__module__], getattr(run, "gsan_enabled", False)
        if _TRITON not in LAUNCHERS or driver.__name__ != "triton.backends.nvidia.driver":
            return None
        if run.global_scratch_size or run.profile_scratch_size or instrumented:
            return None
        # with descriptors among its arguments it is inside of a function that encodes them
        inner = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
        places = [i for i, x in enumerate(compiled.src.signature.values()) if str(x).startswith("tensordesc")]
        metadata = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * len(places)
        flags, packed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl), compiled.packed_metadata
        fixed: tuple[Any, ...] = (*flags, None, None, packed, None, None, None)
        if nested := hasattr(run, "kernel_signature"):  # one function for all kernels, from 3.7 on
            fixed = (*flags, packed, *[None] * 5, run.arg_annotations, run.kernel_signature)
        # since 3.8 it is given those before it as well, which it does not look at
        more = [None] * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)

        def make(like: Any, given: Any) -> list[Any]:
            return driver.make_tensordesc_arg(like, given, *more)

        call = inner.get("launcher", run.launch)
        return cls(call, fixed, nested, dict(zip(places, metadata, strict=True)), make)

    def encoder(self, i: int, like: Any) -> tuple[Callable[[int], Any] | None, tuple[Any, ...]]:
        """What an address becomes that argument i, a descriptor ``like`` that, has; None if it is passed as it is. And
        what is passed behind it."""
        given = self.metadata[i]
        if given is None:
            return None, tuple(self.make(like, None)[1:])

        @functools.lru_cache(maxsize=256)
        def encoded(address: int) -> Any:
            descriptor = copy.copy(like)
            descriptor.base = SimpleNamespace(data_ptr=lambda: address)
            return self.make(descriptor, given)[0]

        return encoded, (*like.shape, *like.strides)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def constant(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on ``device`` that may be kept for later calls, whatever mode the caller runs in.

    The memory of CUDA graphs that a thread makes is overwritten by other graphs (inductor refuses that with an error).
    """
    return on_another_thread(_copied, array, device)


def on_another_thread(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` on plain tensors: modes (fake tensors, tracing, inference, functorch's levels, a default
    device) belong to a thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return torch.tensor(array, device=device)
    with torch.cuda.stream(_copying(device)):  # is waited for, and has nothing to do but this: that of a caller is busy
        copied = torch.tensor(array, device=device)
        torch.cuda.current_stream(device).synchronize()
    copied.record_stream(torch.cuda.default_stream(device))
    return copied


@functools.cache
def _copying(device: torch.device) -> Any:
    """The stream on which constants are copied to a GPU."""
    return torch.cuda.Stream(device)


def require_triton() -> None:
    """Raise ``RuntimeError`` where Triton is missing."""
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton, which is not installed: pip install 'triton>=3.6'")


def next_power_of_two(x: int) -> int:
    """Smallest power of two that is at least ``x``."""
    return 1 << (x - 1).bit_length()


_MASK32 = 0xFFFFFFFF
_ROUNDS = 10


def philox_uniform(
    seed: torch.Tensor,
    layer: int,
    draw: torch.Tensor,
    bucket: torch.Tensor | int,
    stage: torch.Tensor | int,
    head: torch.Tensor | int,
) -> torch.Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, in float32: Philox4x32-10 (Salmon et al., 2011).

    ``seed`` is a 0-dim int64 tensor: its low 32 bits count, and the others are added to ``head``; ``layer`` is the
    upper key word. The counters broadcast against each other: ``draw`` (the pair), ``bucket``, ``stage`` (round and
    level) and ``head``; that none of them says which sequence of a batch it is makes batches invariant: a sequence
    draws the same numbers wherever it stands. Equal to :func:`draw_uniform` in a kernel, bit for bit.
    """
    device = draw.device
    seed = seed.to(device=device, dtype=torch.int64)
    head = head + (seed >> 32)
    words = [torch.as_tensor(c, dtype=torch.int64, device=device) for c in (draw, bucket, stage, head)]
    c0, c1, c2, c3 = (w & _MASK32 for w in torch.broadcast_tensors(*words))
    k0 = seed & _MASK32
    k1 = torch.full_like(k0, layer & _MASK32)
    for _ in range(_ROUNDS):
        # int64 products wrap around modulo 2**64, which keeps all 64 bits of the unsigned product
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((b >> 32) & _MASK32) ^ c1 ^ k0,
            b & _MASK32,
            ((a >> 32) & _MASK32) ^ c3 ^ k1,
            a & _MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return (c0 >> 8).to(torch.float32) * 2.0**-24


@jit
def draw_uniform(seed, layer, draw, bucket, stage, head):
    """The same numbers inside a kernel; ``draw`` is a block of counters, the rest are scalars."""
    key = (tl.cast(layer, tl.uint64) << 32) | (seed.to(tl.uint64) & 0xFFFFFFFF)
    zero, first = draw * 0, (seed >> 32).to(tl.int32)
    bits, _, _, _ = tl.philox(key, draw, zero + bucket, zero + stage, zero + head + first)
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08


@jit
def sequence(x, i_b, i_h):
    """Where the rows of one head begin, and the stride from one to the next."""
    return x.p + (i_b.to(tl.int64) * x.b + i_h.to(tl.int64) * x.h), x.n


@jit
def head_of(p_heads, i_h):
    """The number of head ``i_h`` of those that ``p_heads`` lists; without a list, of all heads."""
    if p_heads is not None:
        i_h = tl.load(p_heads + i_h)
    return i_h


@jit
def load_rows(p_x, stride, o_row, m_row, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``[N, BD]``, 0 where ``m_row`` is false and behind the D columns."""
    o_d = tl.arange(0, BD)
    m = m_row[:, None]
    if D != BD:
        m = m & (o_d < D)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@jit
def load_queries(q, i_b, i_kv, G, SHAPE: tl.constexpr, i_piece=0):
    """Rows ``[BM, BD]`` of one KV head: ``LQ`` queries of its first query head, of ``G``, then those of the next, ``R``
    in all, and zeros behind. ``i_piece``: so many times ``LQ`` queries come before them."""
    o_m, o_d = tl.arange(0, SHAPE.BM), tl.arange(0, SHAPE.BD)
    p_q = q.p + i_b.to(tl.int64) * q.b + (i_kv * G + o_m // SHAPE.LQ).to(tl.int64)[:, None] * q.h
    p_q += (i_piece * SHAPE.LQ + o_m % SHAPE.LQ).to(tl.int64)[:, None] * q.n + o_d[None, :]
    return tl.load(p_q, mask=(o_m < SHAPE.R)[:, None] & (o_d < SHAPE.D)[None, :], other=0.0)


@jit
def wait_for(p_count, needed):
    """Until so many programs have come here; what they wrote is visible then."""
    done = 0
    while done < needed:
        done = tl.atomic_add(p_count, 0, sem="acquire").to(tl.int32)


@jit
def is_last(p_done, programs):
    """Whether this is the last of so many programs to come here: what the others stored before is there to be read, by
    loads that do not ask the cache of a multiprocessor (``.cg``). The count begins and ends with 0."""
    tl.debug_barrier()  # a program counts as done when all of its threads are
    done = tl.atomic_add(p_done, 1, sem="acq_rel") + 1
    tl.store(p_done, 0, mask=done == programs)
    return done == programs
