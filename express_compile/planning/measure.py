"""Measure a device: every method at some shapes, and from that the rates by which its costs become times.

``python -m express_compile calibrate`` writes them to a file of this machine
(:func:`~express_compile.planning.devices.path_of`).
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.call import Call
from ..core.cost import Cost, Device, Rates, kind_of, rates_key
from ..core.method import METHODS, cost_at
from ..core.policy import Policy
from ..core.spec import AttentionSpec, Mask, Site
from .devices import name_of, versions

SETTLE = 0.1  # seconds before a measurement: for some ms after large allocations are freed, kernels take 6% longer
_SECONDS = 0.15  # a shape is measured for about so long


class Clock:
    """Milliseconds of a call; on a GPU with a cold L2 and one call queued behind the other, as in a model.

    So the time that the host takes to launch a call shows where it exceeds that of the call before.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if self.on_gpu else None

    def __call__(self, call: Callable[[], object], repeats: int) -> list[float]:
        call()  # compilation and caches are not what is timed
        if not self.on_gpu:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            return times
        time.sleep(SETTLE)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for begin, end in events:
            if self.flush is not None:
                self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def within(self, call: Callable[[], object], seconds: float) -> float:
        """The median of as many calls as fit in about ``seconds``, 3 to 15."""
        (once,) = self(call, 1)
        return statistics.median(self(call, int(min(15, max(3, seconds * 1e3 / once)))))


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True)
class Shape:
    """One measurement of a method: sizes as in :class:`AttentionSpec`, and the policy."""

    method: str
    B: int
    Lq: int
    Lk: int
    causal: bool = False
    H: int = 32
    H_kv: int = 8
    D: int = 128
    dtype: torch.dtype = torch.bfloat16
    policy: Policy = field(default_factory=Policy)

    def spec(self, device: str) -> AttentionSpec:
        mask = Mask(causal=self.causal, offset=self.Lk - self.Lq)
        sizes = self.B, self.H, self.H_kv, self.Lq, self.Lk, self.D, self.D
        return AttentionSpec(*sizes, self.dtype, device, self.D**-0.5, mask)

    def calls(self, device: str) -> list[Callable[[], object]]:
        """As :func:`calls_of`."""
        spec = self.spec(device)
        return calls_of(spec, self.method, METHODS[self.method].params(Site(spec), self.policy))

    @property
    def key(self) -> tuple[str, str]:
        """Where its rates are in :attr:`Device.rates`."""
        return kind_of(self.dtype), rates_key(self.method, self.Lq)

    def cost(self, device: str) -> Cost:
        """What the call costs, in numbers."""
        spec = self.spec(device)
        cost = cost_at(self.method, spec, METHODS[self.method].params(Site(spec), self.policy))
        assert cost is not None, "what is measured says what it costs"
        return cost


def calls_of(spec: AttentionSpec, method: str, params: Mapping[str, Any]) -> list[Callable[[], object]]:
    """The op of a method on random tensors of a site with known sizes, without padding.

    For ``exact`` torch's attention as it chooses its backend, and also by cuDNN where that may apply.
    """
    sizes = (spec.H, spec.Lq, spec.D), (spec.H_kv, spec.Lk, spec.D), (spec.H_kv, spec.Lk, spec.Dv)
    query, key, value = (torch.randn(spec.B, *size, device=spec.device, dtype=spec.dtype) for size in sizes)
    if method != "exact":
        seed = torch.zeros((), dtype=torch.int64, device=spec.device)
        given = Call(query, key, value, None, seed, spec.scale, 0, options=params)
        return [lambda: given.run(METHODS[method].op)]
    window = spec.mask.window if spec.mask.causal else None
    whole = not spec.mask.causal or (spec.Lq == spec.Lk and window is None)
    options: dict[str, Any] = {"is_causal": spec.mask.causal, "scale": spec.scale, "enable_gqa": spec.H != spec.H_kv}
    if not whole:
        seen = torch.ones(spec.Lq, spec.Lk, dtype=torch.bool, device=spec.device).tril(spec.Lk - spec.Lq)
        seen = seen if window is None else seen.triu(spec.Lk - spec.Lq - window + 1)
        options |= {"is_causal": False, "attn_mask": seen}

    def default() -> object:
        return F.scaled_dot_product_attention(query, key, value, **options)

    def cudnn() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return default()

    return [default, cudnn] if spec.device == "cuda" and spec.dtype.itemsize == 2 and whole else [default]


def time_site(spec: AttentionSpec, method: str, params: Mapping[str, Any], clock: Clock) -> float:
    """Milliseconds of a method at a site with known sizes, on random tensors, without padding, launched one by one."""
    return min(clock.within(call, _SECONDS) for call in _able(calls_of(spec, method, params)))


def _prefill(method: str, n: int, s: int = 512, B: int = 1, protected: int = 256, **more: Any) -> Shape:
    causal = more.pop("causal", method in ("exact", "express"))
    return Shape(method, B, n, n, causal, policy=Policy(budget=s, protected=protected, min_length=0), **more)


def _decode(method: str, B: int, n: int, s: int = 128, **more: Any) -> Shape:
    return Shape(method, B, 1, n, policy=Policy(budget=s, min_length=0), **more)


def shapes(device: str, dtype: torch.dtype) -> list[Shape]:
    """What is measured: for every method and dtype enough to tell the fields of its cost apart."""
    if device == "cpu":
        more: dict[str, Any] = dict(H=4, H_kv=2, D=64, dtype=torch.float32)
        few = [(1024, 64, 1, 0), (2048, 64, 1, 64), (4096, 256, 1, 0), (4096, 512, 1, 256), (8192, 512, 1, 256)]
        few += [(16384, 512, 1, 256), (16384, 128, 1, 0), (2048, 128, 4, 0), (4096, 64, 2, 256)]
        found = [_prefill(method, *row, **more) for method in ("express", "thinformer") for row in few]
        found += [_prefill("exact", n, causal=c, **more) for n in (512, 1024, 4096, 16384) for c in (True, False)]
        return found + [_decode(m, B, n, **more) for m in ("exact", "santa") for B, n in ((1, 4096), (4, 16384))]
    if dtype == torch.float32:
        more, methods = {"H": 8, "H_kv": 8, "dtype": dtype}, ("exact", "express", "thinformer")
        rows = [(2048, 128, 128), (8192, 256, 64), (16384, 512, 64), (16384, 256, 128), (4096, 256, 64)]
        found = [_prefill(m, n, s, protected=0, D=D, **more) for m in methods for n, s, D in rows]
        found += [_prefill("exact", n, causal=False, **more) for n in (4096, 8192)]
        decodes = [(1, 8192), (1, 65536), (8, 16384), (8, 4096)]
        return found + [_decode(m, B, n, **more) for m in ("exact", "santa") for B, n in decodes]
    found = [_prefill("exact", n, B=B, D=D, causal=c) for n, B, D in _EXACT for c in (True, False)]
    found += [_prefill("express", n, s, B, p, D=D) for n, s, B, p, D in _EXPRESS]
    found += [_prefill("thinformer", n, s, B, D=D) for n, s, B, D in _THINFORMER]
    found += [_decode(m, B, n, H_kv=H_kv, D=D) for m in ("exact", "santa") for n, B, H_kv, D in _DECODE]
    return found + [_decode("santa", B, n, 512) for B, n in ((1, 4096), (8, 4096), (8, 8192), (1, 32768))]


# tokens; budget; batch; protected, key heads; head size
_EXACT = [(512, 1, 128), (2048, 1, 128), (16384, 1, 128), (49152, 1, 128), (8192, 1, 64), (1024, 8, 128), (4096, 8, 64)]
_EXPRESS = [
    (4096, 128, 1, 256, 128), (4096, 256, 1, 0, 128), (6144, 512, 1, 256, 128), (16384, 512, 1, 0, 128),
    (24576, 1024, 1, 256, 128), (65536, 512, 1, 256, 128), (65536, 2048, 1, 256, 128), (131072, 256, 1, 0, 128),
    (32768, 128, 4, 0, 128), (4096, 256, 8, 256, 128), (16384, 512, 8, 0, 128), (4096, 128, 32, 256, 128),
    (16384, 512, 1, 0, 64), (65536, 1024, 1, 0, 64), (8192, 256, 8, 256, 64),
]  # fmt: skip
_THINFORMER = [
    (2048, 128, 1, 128), (4096, 256, 1, 128), (16384, 512, 1, 128), (32768, 1024, 1, 128), (65536, 256, 1, 128),
    (131072, 2048, 1, 128), (4096, 256, 8, 128), (16384, 128, 8, 128), (4096, 512, 32, 128), (16384, 512, 1, 64),
    (8192, 256, 8, 64),
]  # fmt: skip
_MANY = 10  # shapes of a method at least to tell what evictions cost from the rest
_DECODE = [
    (8192, 1, 8, 128), (32768, 1, 8, 128), (131072, 1, 8, 128), (8192, 8, 8, 128), (32768, 8, 8, 128),
    (16384, 32, 8, 128), (16384, 1, 32, 128), (65536, 1, 2, 128), (16384, 8, 2, 128), (32768, 1, 8, 64),
    (32768, 8, 8, 64),
]  # fmt: skip


def calibrate(progress: Callable[[Iterable[Shape]], Iterable[Shape]] = iter) -> tuple[Device, list[dict[str, Any]]]:
    """Measure this machine's GPU, or its CPU if it has none: the device, and what it was fitted to.

    ``progress`` wraps the list of shapes, to show how far it has come. On an H200 it takes about two minutes.
    """
    METHODS.load()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    clock = Clock(device)
    found: list[dict[str, Any]] = []
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    for shape in progress([shape for dtype in dtypes for shape in shapes(device, dtype)]):
        seconds = min(_seconds(clock, call) for call in _able(shape.calls(device)))
        found.append(dict(shape=shape, cost=shape.cost(device), seconds=seconds))
    rates: dict[str, dict[str, Rates]] = {}
    key = lambda row: row["shape"].key  # noqa: E731
    for (kind, method), group in itertools.groupby(sorted(found, key=key), key):
        rows = list(group)
        rates.setdefault(kind, {})[method] = fit(rows, _launched(clock, rows), cache if len(rows) >= _MANY else 0)
    source = f"measured {datetime.date.today().isoformat()}, {', '.join(f'{k} {v}' for k, v in versions().items())}"
    return Device(name_of(device), source, rates), found


def _able(calls: Iterable[Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """Those calls whose backend of torch takes the shape."""
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
        else:
            yield call


def _seconds(clock: Clock, call: Callable[[], object]) -> float:
    """Of one call, as a CUDA graph on a GPU."""
    return clock.within(replayed(call) if clock.on_gpu else call, _SECONDS) / 1e3


def _launched(clock: Clock, rows: list[dict[str, Any]]) -> float:
    """Seconds of the host to launch a call, of the shortest one, while the device is behind; 0 on a CPU."""
    if not clock.on_gpu:
        return 0.0
    call, times = min(rows, key=lambda row: row["seconds"])["shape"].calls("cuda")[0], []
    for _ in range(20):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times[5:])  # the first ones are recorded, to become code


def fit(rows: list[dict[str, Any]], call: float = 0.0, cache: float = 0.0) -> Rates:
    """The rates, none negative, whose times are nearest to the measured ones in relative terms.

    ``rows`` have a ``cost`` in numbers and the measured ``seconds``; ``cache`` is the size of the L2 in bytes. The sum
    of absolute logarithms of ratios is approached by weights, so that one shape off the line does not tilt it.
    """
    names = [field.name for field in fields(Cost)]
    seconds = np.array([row["seconds"] for row in rows])
    costs = [[float(getattr(row["cost"], name)) for name in names] for row in rows]
    # no more bytes are written back than are read: bytes that evict are a column of their own, with those they evict
    evicting = [[row["cost"].bytes + min(row["cost"].bytes, cache)] if cache else [] for row in rows]
    relative = np.hstack([costs, evicting]) / seconds[:, None]
    weights, best = np.ones(len(rows)), np.zeros(relative.shape[1])
    for _ in range(20):
        best = _least_squares(relative * weights[:, None], weights)
        off = np.abs(np.log(np.maximum(relative @ best, 1e-3)))
        weights = 1 / np.sqrt(np.maximum(off, 0.02))
    rates = Rates(**{name: float(x) for name, x in zip(names, best, strict=False)}, call=call, cache=cache)
    evictions = float(best[-1]) if cache else 0.0
    return replace(rates, bytes=rates.bytes + evictions, evictions=evictions)


def _least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The best solution without negative entries: of all subsets of columns, as there are few."""
    count, best, least = matrix.shape[1], np.zeros(matrix.shape[1]), np.inf
    for columns in _subsets(count):
        if not matrix[:, columns].any(0).all():
            continue
        scale = np.linalg.norm(matrix[:, columns], axis=0)
        part = np.linalg.lstsq(matrix[:, columns] / scale, target, rcond=None)[0] / scale
        rest = float(((matrix[:, columns] @ part - target) ** 2).sum())
        if (part >= 0).all() and rest < least:
            best, least = np.zeros(count), rest
            best[list(columns)] = part
    return best


def _subsets(count: int) -> Iterator[list[int]]:
    return (list(x) for size in range(1, count + 1) for x in itertools.combinations(range(count), size))
