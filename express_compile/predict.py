"""How long a method will take at a site, and from which length on it is faster than another one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .cost import Cost, Device
from .method import METHODS
from .spec import AttentionSpec, Mask, Policy, known_equal

LONGEST = 1 << 21  # keys up to which a crossover is looked for
MARGIN = 1.05  # what another answer than the exact one must gain at least: predictions are off by some percent
_PER_OCTAVE = 8


def predict(method: str, spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False) -> float | None:
    """Milliseconds that a call of ``method`` takes at a site, all of whose sizes are numbers.

    ``graphs``: inside a CUDA graph, which spares the host its work. None where the method says nothing of its cost, or
    the device nothing of the method. Raises ``ValueError`` for a size that is not a number.
    """
    rates = device.rates_of(method, spec.dtype)
    params = METHODS[method].params(spec, replace(policy, min_length=0))
    cost = _cost(method, _mask_of(spec), tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items()))
    if rates is None or cost is None:
        return None
    return rates.seconds(cost.at(spec, METHODS[method].rows(params, spec.Lk)), graphs) * 1e3


def choose(
    methods: Iterable[str], spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False
) -> tuple[str, dict[str, float]]:
    """The method to run at a site with known sizes, and the milliseconds predicted for each whose costs are known.

    It is the fastest one; exact attention unless that takes :data:`MARGIN` times as long.
    """
    times = {name: predict(name, spec, policy, device, graphs) for name in dict.fromkeys((*methods, "exact"))}
    times = {name: ms for name, ms in times.items() if ms is not None}
    fastest = min(times, key=times.get, default="exact")
    wins = "exact" in times and times[fastest] * MARGIN <= times["exact"]
    return fastest if wins else "exact", times


def crossover(
    method: str, other: str, spec: AttentionSpec, policy: Policy, device: Device, graphs: bool = False,
    margin: float = 1.0,
) -> int | None:  # fmt: skip
    """The number of keys from which on ``method`` is predicted to be ``margin`` times as fast as ``other``, or more.

    Queries grow with the keys where they are as many, else they stay as they are; a size that is not known counts as 1.
    None if there is no such number up to :data:`LONGEST`, or nothing is known of one of the two. As times have steps,
    it is the number from which on no length loses again, to 1%.
    """

    def wins(n: int) -> bool:
        at = at_length(spec, n)
        mine, theirs = (predict(name, at, policy, device, graphs) for name in (method, other))
        return mine is not None and theirs is not None and mine * margin <= theirs

    lengths = [round(16 * 2 ** (i / _PER_OCTAVE)) for i in range(17 * _PER_OCTAVE + 1)]
    shortest = 1 if known_equal(spec.Lq, spec.Lk) or not isinstance(spec.Lq, int) else spec.Lq
    lengths = [n for n in lengths if n >= shortest]
    last = next((i for i in reversed(range(len(lengths))) if not wins(lengths[i])), None)
    if last is None:
        return shortest
    if last == len(lengths) - 1:
        return None
    low, high = lengths[last], lengths[last + 1]
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def at_length(spec: AttentionSpec, n: int) -> AttentionSpec:
    """The site with ``n`` keys, as many queries if they were as many or not known, and 1 for any other unknown size."""
    Lq = spec.Lq if isinstance(spec.Lq, int) and not known_equal(spec.Lq, spec.Lk) else n
    sizes = {name: x if isinstance(x := getattr(spec, name), int) else 1 for name in ("B", "H", "H_kv", "D", "Dv")}
    aligned = known_equal(spec.mask.offset, spec.Lk - spec.Lq) or not isinstance(spec.mask.offset, int)
    mask = replace(spec.mask, offset=n - Lq) if aligned else spec.mask
    return replace(spec, Lq=Lq, Lk=n, mask=mask, **sizes)


def _mask_of(spec: AttentionSpec) -> tuple[Mask, bool]:
    """The mask without what varies with the lengths, and whether it was aligned to their ends."""
    aligned = known_equal(spec.mask.offset, spec.Lk - spec.Lq)
    return replace(spec.mask, offset=0 if aligned else spec.mask.offset, padding=False), aligned


@functools.lru_cache(maxsize=64)
def _cost(method: str, mask: tuple[Mask, bool], params: tuple[tuple[str, Any], ...]) -> Cost | None:
    """One expression for all sites with this mask and these parameters: to make one takes up to half a second."""
    mask, aligned = mask
    function = METHODS[method].cost
    Lk = 1 if aligned else mask.offset + 2
    spec = AttentionSpec(1, 1, 1, 1, Lk, 1, 1, torch.float32, "cpu", 1.0, mask)
    options: Mapping[str, Any] = dict(params)
    return None if function is None else function(spec, options)
