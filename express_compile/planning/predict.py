"""How long a method will take at a site, and from which length on it is faster than another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..core.cost import Device
from ..core.method import METHODS, cost_at, costs_at, total
from ..core.policy import Policy
from ..core.spec import AttentionSpec, Site, known_equal

LONGEST = 1 << 21  # keys up to which a crossover is looked for
MARGIN = 1.05  # what another answer than the exact one must gain at least: predictions are off by some percent
_PER_OCTAVE = 8
_COUNTS = ("B", "H", "H_kv", "D", "Dv")


def predict(method: str, spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False) -> float | None:
    """Milliseconds that a call of ``method`` takes at a site, all of whose sizes are numbers.

    Of padding what the method's own cost says of it, see :func:`without_padding`.
    ``graphs``: inside a CUDA graph, which spares the host its work. None where the method says nothing of its cost, or
    the device nothing of the method. Raises ``ValueError`` for a size that is not a number.
    """
    parts = costs_at(method, spec, _params(method, spec, policy))
    if parts is None:
        return None
    if (whole := total(parts)) == cost_at("exact", spec, {}):  # short sequences are left to exact attention
        parts = {"exact": whole}
    rates = {kernels: device.rates_of(kernels, spec.dtype, spec.Lq) for kernels in parts}
    times = [known.seconds(parts[kernels], graphs) * 1e3 for kernels, known in rates.items() if known is not None]
    return sum(times) if len(times) == len(parts) else None


def predicted(
    methods: Iterable[str], spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False
) -> dict[str, float] | None:
    """:func:`predict` of several methods; a size that is not known counts as 1. None if one of them is not known."""
    at = at_length(spec, spec.Lk if isinstance(spec.Lk, int) else 1)
    times = {name: predict(name, at, policy, device, graphs) for name in methods}
    known = {name: time for name, time in times.items() if time is not None}
    return known if len(known) == len(times) else None


def wins(times: Mapping[str, float], method: str) -> bool:
    """Whether ``method`` is predicted to be faster than exact attention by the :data:`MARGIN`."""
    return times[method] * MARGIN <= times["exact"]


def without_padding(methods: Iterable[str], spec: AttentionSpec) -> tuple[str, ...]:
    """Those of the methods whose :func:`predict` is that of a batch without padding, though this site has some."""
    return tuple(name for name in methods if spec.mask.padding and not METHODS[name].padding_cost)


def crossover(
    method: str, other: str, spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False,
    margin: float = 1.0,
) -> int | None:  # fmt: skip
    """The number of keys from which on ``method`` is predicted to be ``margin`` times as fast as ``other``, or more.

    Queries grow with the keys where they are as many, else they stay as they are; a size that is not known counts as 1.
    None if there is no such number up to :data:`LONGEST`, or nothing is known of one of the two. As times have steps,
    it is the number from which on no length loses again, to 1%.
    """

    at = at_length(spec, LONGEST)
    follows, aligned = at.Lq == LONGEST, at.mask.offset == LONGEST - at.Lq
    key = (method, other, at, follows, aligned, repr(policy), graphs, margin)
    if key not in _CROSSOVERS or _CROSSOVERS[key][0] is not device:
        if len(_CROSSOVERS) >= 256:
            _CROSSOVERS.clear()

        def ahead(n: int) -> bool:
            mask = replace(at.mask, offset=n - (n if follows else at.Lq)) if aligned else at.mask
            there = replace(at, Lk=n, Lq=n if follows else at.Lq, mask=mask)
            mine, theirs = (predict(name, there, policy, device, graphs) for name in (method, other))
            return mine is not None and theirs is not None and mine * margin <= theirs

        _CROSSOVERS[key] = device, _from_which(ahead, 1 if follows else at.Lq)
    return _CROSSOVERS[key][1]


_CROSSOVERS: dict[tuple[Any, ...], tuple[Device, int | None]] = {}


def _from_which(ahead: Callable[[int], bool], shortest: int) -> int | None:
    """The least length, to 1%, behind the last of a series of lengths that is not ``ahead``."""
    lengths = [
        shortest,
        *(n for i in range(17 * _PER_OCTAVE + 1) if (n := round(16 * 2 ** (i / _PER_OCTAVE))) > shortest),
    ]
    last = next((i for i in reversed(range(len(lengths))) if not ahead(lengths[i])), None)
    if last is None:
        return shortest
    if last == len(lengths) - 1:
        return None
    low, high = lengths[last], lengths[last + 1]
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return high


def at_length(spec: AttentionSpec, n: int) -> AttentionSpec:
    """The site with ``n`` keys, as many queries if they were as many or not known, and 1 for any other unknown size."""
    Lq = spec.Lq if isinstance(spec.Lq, int) and not known_equal(spec.Lq, spec.Lk) else n
    sizes: dict[str, Any] = {name: x if isinstance(x := getattr(spec, name), int) else 1 for name in _COUNTS}
    aligned = known_equal(spec.mask.offset, spec.Lk - spec.Lq) or not isinstance(spec.mask.offset, int)
    mask = replace(spec.mask, offset=n - Lq) if aligned else spec.mask
    return replace(spec, Lq=Lq, Lk=n, mask=mask, **sizes)


def _params(method: str, spec: AttentionSpec, policy: Policy) -> Mapping[str, Any]:
    return METHODS[method].params(Site(spec), replace(policy, min_length=0))
