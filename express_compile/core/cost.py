"""What attention costs, as sympy expressions of its sizes: the currency in which methods are compared.

Every method file says what its own computation costs; this leaf has the symbols they are written in,
:class:`Cost`, which turns into numbers at a site, and :class:`Device`, which turns those into a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import sympy
import torch
from sympy.printing.pycode import PythonCodePrinter

from .plain import entries, number
from .spec import AttentionSpec, known_equal

# the sizes of AttentionSpec, the budget (rows, or draws for SANTA) and the bytes of one element of query, key and value
B, H, H_kv, Lq, Lk, D, Dv, s, itemsize = sympy.symbols("B H H_kv Lq Lk D Dv s itemsize", integer=True, positive=True)
_SIZES = (B, H, H_kv, Lq, Lk, D, Dv)

# launches of one kernel took 0.20 to 0.49 ms within one run (speed.csv, Thinformer up to 16,384 tokens)
SLOW_HOST = 1.5
FEW_QUERIES = 16


class floor_log2(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """The largest k with ``2**k <= x``, and 0 for ``x < 1``. (``floor(log(x, 2))`` is not exact in sympy.)"""

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Integer | None:
        return sympy.Integer(_floor_log2(x)) if x.is_Rational else None


def _floor_log2(x: Any) -> int:
    return int(x).bit_length() - 1 if x >= 1 else 0


@dataclass(frozen=True)
class Cost:
    """What one call costs, in the symbols of this module, or in numbers after :meth:`at`.

    flops: floating-point operations of the matrix products, a multiplication and an addition counting one each;
        those with keys that a query does not see, softmax and random numbers are not counted.
    bytes: to and from memory; a pass over rows reads or writes each of them once, as if caches held all it reads again.
    steps: the longest chain of decisions that wait for each other, each on a pair of rows to halve or a row to draw.
    launches: kernels on a GPU, one behind the other; memory fills are not counted.
    scores: exponentials of a query and a key: work of the vector units.
    entries: of kernel matrices that halving computes, each of two keys that it compares.
    """

    flops: Any
    bytes: Any
    steps: Any = sympy.Integer(0)
    launches: Any = sympy.Integer(1)
    scores: Any = sympy.Integer(0)
    entries: Any = sympy.Integer(0)

    def at(self, spec: AttentionSpec, budget: int) -> Cost:
        """The numbers at a site for ``budget`` rows or draws (the symbol s).

        Raises ``ValueError`` for a size that is not an integer, and for a causal offset that is not known.
        """
        values = {s: budget, itemsize: spec.dtype.itemsize} | {x: getattr(spec, x.name) for x in _SIZES}
        for symbol, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{symbol}={value!r}: must be an integer; a cost in numbers needs every size")
        numbers = _function(self, tuple(values))(*values.values())
        return Cost(*(int(x) if float(x).is_integer() else x for x in numbers))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def unless(self, condition: Any, other: Cost) -> Cost:
        """This cost, or ``other`` where ``condition`` holds."""
        pairs = ((getattr(other, field.name), getattr(self, field.name)) for field in fields(self))
        return Cost(*(sympy.Piecewise((there, condition), (here, True)) for there, here in pairs))


@dataclass(frozen=True)
class Rates:
    """Seconds on one device that a unit of each field of :class:`Cost` takes in the kernels of one method.

    They add up: the phases of a method wait for each other, and what overlaps within a phase is part of its rates.
    call: seconds of the host to launch one call; less than that a call takes only inside a CUDA graph. A host is slower
        at some moments than at others, by half (:data:`SLOW_HOST`): times that it decides are taken to be that long.
    evictions: more seconds for each of the first ``cache`` bytes, those of the L2: what earlier kernels left there is
        written back to make room. (cuDNN's decoding on an H200, 8 KV heads of 128: 2.4 TB/s from 4,096 to 8,192 keys,
        4.6 TB/s from 98,304 to 262,144.)
    """

    flops: float = 0.0
    bytes: float = 0.0
    steps: float = 0.0
    launches: float = 0.0
    scores: float = 0.0
    entries: float = 0.0
    call: float = 0.0
    evictions: float = 0.0
    cache: float = 0.0

    def seconds(self, cost: Cost, graphs: bool = False) -> float:
        """Of one call whose ``cost`` is in numbers; ``graphs``: replayed as part of a CUDA graph."""
        device = sum(getattr(self, field.name) * getattr(cost, field.name) for field in fields(cost))
        device += self.evictions * min(cost.bytes, self.cache)
        return float(device if graphs else max(device, SLOW_HOST * self.call))


@dataclass(frozen=True)
class Device:
    """What is known of the speed of one kind of device.

    name: as ``torch.cuda.get_device_name`` gives it, or "CPU, 2 threads".
    source: how its rates were found: when and with what they were measured, or from which data sheet they follow.
    rates: for ``"half"`` (float16 and bfloat16) and ``"float32"``, the :class:`Rates` by :func:`rates_key`.
    """

    name: str
    source: str
    rates: Mapping[str, Mapping[str, Rates]] = field(default_factory=dict)

    def rates_of(self, method: str, dtype: torch.dtype, Lq: Any = None) -> Rates | None:
        """The rates of a method at ``dtype`` for ``Lq`` queries; None if they are not known."""
        of = self.rates.get(kind_of(dtype), {})
        return of.get(rates_key(method, Lq), of.get(method))

    def scaled(self, name: str, source: str, **factors: float) -> Device:
        """Another device, each of whose rates is this one's times the factor for its field, 1 if not given."""

        def scale(rates: Rates) -> Rates:
            return Rates(**{key: value * factors.get(key, 1.0) for key, value in asdict(rates).items()})

        kinds = {kind: {key: scale(rates) for key, rates in of.items()} for kind, of in self.rates.items()}
        return Device(name, source, kinds)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        """The inverse of ``dataclasses.asdict``.

        Raises ``TypeError`` for data of another form, and ``ValueError`` for rates that no device has.
        """
        data = entries(cls, data)
        for name in ("name", "source"):
            if not isinstance(data[name], str):
                raise TypeError(f"{name}={data[name]!r}: must be a string")
        if not isinstance(data["rates"], Mapping) or not all(isinstance(of, Mapping) for of in data["rates"].values()):
            raise TypeError(f"rates={data['rates']!r}: must map dtypes to methods to rates")
        rates = {
            kind: {method: _rates(f"rates[{kind!r}][{method!r}]", given) for method, given in of.items()}
            for kind, of in data["rates"].items()
        }
        return cls(data["name"], data["source"], rates)


def _rates(name: str, data: Any) -> Rates:
    for key, value in entries(Rates, data, f"{name}: ", some=True).items():
        most, unit = (2**40, "bytes") if key == "cache" else (1.0, "seconds")
        if not 0 <= number(f"{name}[{key!r}]", value, int, float) <= most:
            raise ValueError(f"{name}[{key!r}]={value!r}: must be from 0 to {most:g} {unit}")
    rates = Rates(**data)
    if not any(getattr(rates, f.name) for f in fields(Cost)):
        raise ValueError(f"{name}: nothing takes any time")
    return rates


def rates_key(method: str, Lq: Any) -> str:
    """The key of a method in :attr:`Device.rates`. Exact attention has two: for few queries, as in decoding, other
    kernels run, that split the keys."""
    few = method == "exact" and isinstance(Lq, int) and Lq <= FEW_QUERIES
    return f"{method}, few queries" if few else method


def kind_of(dtype: torch.dtype) -> str:
    """The key of :attr:`Device.rates` for a dtype; float16 and bfloat16 have one."""
    return "half" if dtype in (torch.float16, torch.bfloat16) else str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=256)
def _function(cost: Cost, symbols: tuple[sympy.Symbol, ...]) -> Callable[..., list[float]]:
    """The fields as a Python function: quick, and exact in doubles, as all fractions in it are of powers of two."""
    values = [sympy.sympify(getattr(cost, field.name)) for field in fields(cost)]
    if unknown := sorted(str(x) for x in {x for value in values for x in value.free_symbols}.difference(symbols)):
        raise ValueError(f"mask: depends on {', '.join(unknown)}; a cost in numbers needs a known offset")
    # to put terms in order would take a second
    options = {"order": "none", "fully_qualified_modules": False, "user_functions": {"floor_log2": "floor_log2"}}
    modules = [{"floor_log2": _floor_log2}, "math"]
    made: Callable[..., list[float]] = sympy.lambdify(symbols, values, modules, printer=PythonCodePrinter(options))
    return made


def visible_pairs(spec: AttentionSpec) -> sympy.Expr:
    """Pairs of a query and a key that it sees, per head. What padding and other packed sequences hide is counted, and
    with a mask that is not proven everything is."""
    mask = spec.mask
    if mask.unknown is not None or not (mask.causal or mask.window):
        return Lq * Lk

    def triangle(x: Any) -> sympy.Expr:
        x = sympy.Max(x, 0)
        return x * (x + 1) / 2

    def before(offset: Any) -> sympy.Expr:
        """Pairs ``j <= i + offset``: query i sees ``i + offset + 1`` keys, at least none and at most all."""
        return triangle(Lq + offset) - triangle(offset) - triangle(Lq + offset - Lk) + triangle(offset - Lk)

    offset = mask.offset.node.expr if isinstance(mask.offset, torch.SymInt) else mask.offset
    if known_equal(mask.offset, spec.Lk - spec.Lq):
        offset = Lk - Lq
    hidden = 0 if mask.window is None else before(offset - mask.window)
    return before(offset if mask.causal else offset + mask.window - 1) - hidden


def dense_cost(pairs: Any, rows: Any = Lk) -> Cost:
    """Attention over ``rows`` keys and values, with ``pairs`` products of a query and a key per head."""
    elements = B * (H * Lq + H_kv * rows) * (D + Dv)
    return Cost(2 * B * H * pairs * (D + Dv), itemsize * elements, scores=B * H * pairs)
