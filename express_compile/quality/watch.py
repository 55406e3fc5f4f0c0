"""The error of a rewritten model while it is in use: a few calls also compute exact attention for a few queries.

    error = |o_hat - o| / |o|    over the sampled queries of one call, all heads and sequences together

Where it meets the calls of a model is said in ``routes/watched.py``. Whether a call
is sampled is decided on the host, by a generator that nobody else uses; which queries, on the device. The host never
waits: an error is read at a later call of the same site, once it has come. Nothing is sampled or read inside a CUDA
graph capture, and its replays do not come by here at all.
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections import deque
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import torch
from torch import nn

from ..core.call import Call, is_run_otherwise
from ..core.method import METHODS
from ..core.plain import number
from ..core.plan import Plan
from ..core.spec import AttentionSpec
from ..planning.choose import methods_of
from ..routes.capture import captures_of
from ..routes.eager import rewritten_sites

_LAST = 5  # samples whose median decides
_KEPT = 1000  # errors of a site
_ELEMENTS = 1 << 24  # of scores, keys and values together that are held at a time


# --------------------------------------------------------------------------------------------- public functions


def watch(
    model: nn.Module, *, fraction: float = 0.01, queries: int = 16, threshold: float = 0.3, seed: int = 0
) -> Watch:
    """Sample the error of every site of a rewritten model while it is in use; sites that err too much become exact.

    model: one that :func:`rewrite_attention` changed. Its copies are not watched, nor is a module in training mode.
        :func:`restore_attention` and rewriting it anew end the watch. Where its graphs are captured, sites are known
        from their first call on, and are named ``path#1`` and so on behind the first one of a module.
    fraction: of the calls of each site that are sampled, in (0, 1]. Calls that are exact anyway are left out: those
        that were refused, and those with so few keys that the method thins nothing.
    queries: how many of a sampled call, at most; the same ones for all heads, and for each sequence its own.
    threshold: a site runs exact as soon as the median of its last 5 errors is above it (the mean would let a single
        outlier decide): the model's own attention, in a captured graph that of the op. That is said once, by a
        ``UserWarning``.
    seed: of the generators that choose calls and queries; torch's own are not used. Results are bitwise those
        without a watch, but where a site fell back.

    A sampled call takes O(``queries`` * Lk) more time, and at most 64 MiB for scores and copies of keys and values in
    float32 (128 MiB in float64, for float64 inputs), and as much again for temporaries.

    Raises ``ValueError`` for a model without such sites, that is watched already or is a part of one whose graphs are
    captured, and where no site has a method that can be watched: a single call of SANTA says nothing. ``TypeError`` or
    ``ValueError`` for bad arguments.
    """
    _check(fraction, queries, threshold, seed)
    sites, captured = rewritten_sites(model), captures_of(model)
    if not sites and not captured:
        raise ValueError(
            f"model={type(model).__name__}: has no attention that was rewritten; allowed is what "
            "rewrite_attention(model) returned"
        )
    for path, capture in captured.items():
        if not f".{path}".endswith(f".{capture.path}".rstrip(".")):
            raise ValueError(
                f"model={type(model).__name__}: is a part of a rewritten model, whose graphs hold its attention; "
                "watch the whole model"
            )
    if any(x is not None for x in (*(s.shadow for s in sites.values()), *(c.watch for c in captured.values()))):
        raise ValueError(f"model={type(model).__name__}: is watched already; call close() on that watch first")
    named = {path: site.methods for path, site in sites.items()}
    watched = {path for path, names in named.items() if any(METHODS[name].approximates for name in names)}
    names = dict.fromkeys(
        name for names in (*named.values(), *(methods_of(c.policy) for c in captured.values())) for name in names
    )
    if not any(METHODS[name].approximates for name in names):
        reasons = "; ".join(f"{name}: {_unwatchable(name)}" for name in names)
        allowed = ", ".join(name for name, method in METHODS.items() if method.approximates)
        raise ValueError(
            f"model={type(model).__name__}: none of its methods can be watched ({reasons}); allowed are {allowed}"
        )
    started = Watch(model, lambda path: Shadow(path, fraction, queries, threshold, seed))
    for path in sites:
        if path in watched:
            sites[path].shadow = started.shadow(path)
    for path, capture in captured.items():
        capture.watch, capture.prefix = started, path.removesuffix(capture.path).rstrip(".")
    return started


def _check(fraction: float, queries: int, threshold: float, seed: int) -> None:
    number("fraction", fraction, int, float)
    number("queries", queries, int)
    number("threshold", threshold, int, float)
    number("seed", seed, int)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: must be above 0 and at most 1")
    if queries < 1:
        raise ValueError(f"queries={queries!r}: must be at least 1")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold!r}: must be above 0; float('inf') never falls back")


def _unwatchable(name: str) -> str:
    if name == "santa":
        return "random by design, so that a single call is far off although the mean is right"
    return "exact" if name == "exact" else "it does not say which of its calls approximate (Method.approximates)"


class Watch:
    """What :func:`watch` returns; ``with watch(model) as w:`` closes it at the end."""

    def __init__(self, model: nn.Module, make: Callable[[str], Shadow]) -> None:
        self._model, self._make, self._lock = model, make, Lock()
        self._shadows: dict[str, Shadow] = {}

    def shadow(self, path: str) -> Shadow:
        """What samples the site of a module; a new one at the first call."""
        with self._lock:
            return self._shadows.get(path) or self._shadows.setdefault(path, self._make(path))

    @property
    def errors(self) -> dict[str, list[float]]:
        """Module path -> the relative errors that have been read, oldest first, at most the last 1,000."""
        return {path: list(shadow.errors) for path, shadow in self._shadows.items()}

    @property
    def fallen(self) -> tuple[str, ...]:
        """The paths of the modules that run exact attention because of their errors."""
        return tuple(path for path, shadow in self._shadows.items() if shadow.fallen)

    def close(self) -> None:
        """End it: sites run as before, also those that fell back. Errors that were read stay, others are lost."""
        for path, site in rewritten_sites(self._model).items():
            if site.shadow is not None and site.shadow is self._shadows.get(path):
                site.shadow = None
        for capture in captures_of(self._model).values():
            if capture.watch is self:
                capture.watch = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------ one site


class _Sample(NamedTuple):
    """An error, a 0-d tensor of the host; ``copied``: the event after which it is there, None for at once."""

    error: torch.Tensor
    copied: torch.cuda.Event | None
    method: str


class Shadow:
    """What is known of one site. The attention function calls :meth:`follow` before and :meth:`sample` after its op."""

    def __init__(self, path: str, fraction: float, queries: int, threshold: float, seed: int) -> None:
        self.path, self.fraction, self.queries, self.threshold = path, fraction, queries, threshold
        self.errors: deque[float] = deque(maxlen=_KEPT)
        self.fallen: str | None = None
        self._random = random.Random(f"{seed} {path}")
        self._under_way: deque[_Sample] = deque()
        self._lock = Lock()

    def follow(self, plan: Plan) -> Plan:
        """``plan``, or exact attention once the site fell back. Reads the errors that have come."""
        if self._under_way and self.fallen is None and (words := self._read()) is not None:
            warnings.warn(words, UserWarning, stacklevel=2)
        return self.in_force(plan)

    def in_force(self, plan: Plan) -> Plan:
        """``plan``, or exact attention if the site fell back."""
        if self.fallen is None or plan.verdict != "rewritten":
            return plan
        return Plan("exact", "exact", self.fallen, policy=plan.policy)

    def sample(self, plan: Plan, spec: AttentionSpec, call: Call, out: torch.Tensor) -> None:
        """Maybe compare ``out`` ``[B, H, Lq, Dv]``, what ``plan`` made of a call, with exact attention."""
        approximates = METHODS[plan.method].approximates
        if is_run_otherwise():  # what explain measures is no use of the model
            return
        with self._lock:
            if approximates is None or self._random.random() >= self.fraction:
                return
            if not approximates(plan.params, spec.Lk) or _is_capturing(call.query.device):
                return
            seed = self._random.getrandbits(63)
        offset = spec.mask.offset if spec.mask.causal else None
        rows, counts = choose_rows(call.padding, offset, call.query, self.queries, seed)
        error = relative_error(out, call, offset, rows, counts)
        sample = _Sample(*_to_host(error), plan.method)
        with self._lock:
            self._under_way.append(sample)

    def _read(self) -> str | None:
        """Take in the errors that have come; if the site has to fall back now, what to tell."""
        with self._lock:
            while self._under_way and self.fallen is None and _has_come(self._under_way[0]):
                sample = self._under_way.popleft()
                error = float(sample.error)
                if error != error:  # there was nothing to compare
                    continue
                self.errors.append(error)
                last = list(self.errors)[-_LAST:]
                if len(last) == _LAST and (middle := statistics.median(last)) > self.threshold:
                    self.fallen = f"its error was {middle:.3g}, above the threshold of its watch, {self.threshold:g}"
                    return self._words(sample.method, middle)
        return None

    def _words(self, method: str, error: float) -> str:
        module = self.path.partition("#")[0]
        return (
            f"{self.path or '(root)'}: the attention of {method} has a relative error of {error:.3g} (median of the "
            f"last {_LAST} samples), above threshold={self.threshold:g}; it runs exact from now on. Give it more rows "
            f"(rewrite_attention(model, modules={{{module!r}: {{'budget': ...}}}})), leave it exact for good "
            f"(modules={{{module!r}: 'exact'}}), or watch with a higher threshold"
        )


def _to_host(error: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if not error.is_cuda:
        return error, None
    host = torch.empty((), dtype=error.dtype, pin_memory=True)
    host.copy_(error, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(error.device))
    return host, copied


def _has_come(sample: _Sample) -> bool:
    # to ask for an event is forbidden while a graph is captured
    return sample.copied is None or (not torch.cuda.is_current_stream_capturing() and sample.copied.query())


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------- arithmetic


def choose_rows(
    padding: torch.Tensor | None, offset: int | None, query: torch.Tensor, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``count`` queries of each sequence, without replacement: which, and whether they count.

    Both are ``[B, min(count, Lq)]``, int64 and bool. ``query`` ``[B, H, Lq, D]``; ``padding`` bool ``[B, Lk]`` or None.
    Under a causal mask, which the last query ends (``offset = Lk - Lq``), queries that are padding do not count, and
    without one (``offset=None``) those of sequences without any real key. Others are taken only where too few do.
    """
    B, Lq = query.shape[0], query.shape[2]
    generator = torch.Generator(query.device).manual_seed(seed)
    order = torch.rand(B, Lq, generator=generator, device=query.device)
    if padding is not None:
        seeing = padding[:, -Lq:] if offset is not None else padding.any(1, keepdim=True)
        order = order.masked_fill(~seeing, -1)
    best = order.topk(min(count, Lq))
    return best.indices, best.values >= 0


@torch.no_grad()
def relative_error(
    out: torch.Tensor, call: Call, offset: int | None, rows: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """``|out - o| / |o|`` over the rows that count; a 0-d tensor in float32 (float64 for float64 inputs).

    ``o`` is exact attention of the tensors of ``call``; the others are as in :func:`choose_rows`. NaN where it is 0 or
    NaN itself, so that there is nothing to compare; infinity where only ``out`` is not finite.
    """
    exact = exact_rows(call.query, call.key, call.value, call.padding, call.scale, offset, rows)
    difference = _take(out, rows).to(exact.dtype) - exact
    ignored = ~counts[:, None, :, None]
    difference, exact = difference.masked_fill(ignored, 0), exact.masked_fill(ignored, 0)
    return difference.norm().nan_to_num(nan=torch.inf, posinf=torch.inf) / exact.norm()


@torch.no_grad()
def exact_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    offset: int | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Exact attention of some queries: ``[B, H, R, Dv]`` in float32 (float64 for float64 inputs), autocast or not.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``, ``padding`` bool
    ``[B, Lk]`` or None, ``rows`` int64 ``[B, R]``. Query i sees keys up to ``i + offset``, all of them for None; one
    that sees no key gives 0. Keys come in chunks, by the online softmax of Milakov and Gimelshein (arXiv 1805.02867).
    """
    (B, H_kv, Lk, D), Dv = key.shape, value.shape[3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    step = max(1, _ELEMENTS // (B * (query.shape[1] * rows.shape[1] + H_kv * (D + Dv))))
    with torch.autocast(query.device.type, enabled=False):
        chosen = (_take(query, rows).to(dtype) * scale).unflatten(1, (H_kv, -1)).flatten(2, 3)
        top = chosen.new_full((*chosen.shape[:3], 1), torch.finfo(dtype).min)
        mass, total = torch.zeros_like(top), chosen.new_zeros(*chosen.shape[:3], Dv)
        last = rows.new_full(rows.shape, Lk) if offset is None else rows + offset
        last = last.repeat(1, chosen.shape[2] // rows.shape[1])[:, None, :, None]  # for all heads of a group
        for start in range(0, Lk, step):
            part = slice(start, min(start + step, Lk))
            hidden = torch.arange(part.start, part.stop, device=rows.device) > last
            if padding is not None:
                hidden = hidden | ~padding[:, None, None, part]
            scores = (chosen @ key[:, :, part].to(dtype).mT).masked_fill_(hidden, -torch.inf)
            new = top.maximum(scores.amax(-1, keepdim=True))
            weights, decay = scores.sub_(new).exp_(), (top - new).exp_()
            mass = mass * decay + weights.sum(-1, keepdim=True)
            total = total * decay + weights @ value[:, :, part].to(dtype)
            top = new
        return (total / mass.clamp(min=1e-30)).unflatten(2, (-1, rows.shape[1])).flatten(1, 2)


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, L, D]`` at ``rows`` ``[B, R]``: ``[B, H, R, D]``."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
