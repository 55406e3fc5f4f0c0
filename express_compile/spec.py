"""The shared nouns: what a site computes, what the user wants, what was decided.

A leaf: imports torch and the standard library only, so that every room may import it.
All classes are frozen dataclasses of plain data.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

Verdict = Literal["rewritten", "exact", "refused"]


def floor_power_of_two(x: int) -> int:
    """Largest power of two that is not above ``x``; 0 for ``x < 1``."""
    return 1 << (x.bit_length() - 1) if x >= 1 else 0


@dataclass(frozen=True)
class Mask:
    """What is *proven* about the keys a query may see: the conjunction of the fields that are set.

    Query ``i`` may see key ``j`` iff every condition holds:

    * ``causal``: ``j <= i + offset`` (``offset`` is an int or a symbolic expression; ``Lk - Lq`` is the
      bottom-right alignment of a prefill that continues a cache, 0 the top-left one of ``is_causal=True``),
    * ``window``: ``i + offset - j < window``, and without ``causal`` also ``j - i - offset < window``: on either side,
    * ``segments``: ``segment[b, i] == segment[b, j]`` for some integers ``[B, L]``: packed sequences that do not see
      each other (which integers is not said: no method reads them),
    * ``padding``: ``padding[b, j]`` for a boolean tensor ``[B, Lk]`` that travels beside the spec.

    ``unknown`` is the reason why nothing could be proven; then no other field means anything and the
    site must stay exact. ``nearest`` is the mask nearest to it that would be proven, in words, if there is one.
    """

    causal: bool = False
    offset: Any = 0
    window: int | None = None
    padding: bool = False
    unknown: str | None = None
    segments: bool = False
    nearest: str | None = None

    @property
    def reach(self) -> str:
        """How far the window goes, in words."""
        return f"{self.window} tokens" if self.causal else f"{self.window - 1} tokens on either side"

    def __str__(self) -> str:
        if self.unknown is not None:
            return f"unknown ({self.unknown})"
        parts = []
        if self.causal:
            parts.append("causal" if self.offset == 0 else f"causal, offset {self.offset}")
        if self.window is not None:
            parts.append(f"window {self.window}" if self.causal else f"window of {self.reach}")
        if self.segments:
            parts.append("packed segments")
        if self.padding:
            parts.append("key padding")
        return ", ".join(parts) or "none"


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention site computes: ``softmax(scale * q k^T + mask) v``.

    Sizes are ints or ``torch.SymInt`` (dynamic shapes); layout is ``[B, H, L, D]`` as in
    ``scaled_dot_product_attention``. ``H_kv`` divides ``H`` (grouped-query attention).
    ``device`` is a device type (``"cpu"``, ``"cuda"``).
    """

    B: Any
    H: Any
    H_kv: Any
    Lq: Any
    Lk: Any
    D: Any
    Dv: Any
    dtype: torch.dtype
    device: str
    scale: float
    mask: Mask = Mask()
    dropout_p: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """Why ``method`` was not used at a site, in words a user can act on."""

    method: str
    reason: str

    def __str__(self) -> str:
        return f"{self.method}: {self.reason}"


@dataclass(frozen=True)
class Policy:
    """What the user asks for. The fields are the options of the backend and of ``rewrite_attention``.

    budget: rows ``s`` a method may keep; an int is rounded down to a power of two, a float in (0, 1] is
        a fraction of the number of keys, resolved at run time.
    methods: names of the methods to try, in order of preference; ``None`` leaves the choice to us.
    sinks, window: the first and the last tokens, which are always held exactly.
    protected: places for the most distinctive rows, which are held exactly wherever they are; without them
        thinning forgets single facts (README, "What it forgets").
    halving: name of a registered halving rule.
    inflation: M of the Express paper; ``None`` means ``h - 2`` for ``s = 2**h``.
    seed: an int gives the same result at every call; ``None`` draws a fresh seed from torch's default
        generator at every call (so ``torch.manual_seed`` decides).
    min_length: sequences with fewer keys use exact attention; ``None`` means 0 when ``methods`` are named
        and otherwise the length from which the method was measured to win. SANTA goes by what was measured
        wherever this is ``None``.
    strict: raise instead of falling back when a named method is refused or nothing is matched.
    method_options: a mapping from method name to a mapping of that method's own options.

    Raises ``ValueError`` or ``TypeError`` that name the field, its value and what is allowed.
    """

    budget: int | float = 512
    methods: tuple[str, ...] | None = None
    sinks: int = 32
    window: int = 256
    protected: int = 256
    halving: str = "balanced"
    inflation: int | None = None
    seed: int | None = 0
    min_length: int | None = None
    strict: bool = False
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_number("budget", self.budget, (int, float))
        if isinstance(self.budget, float):
            if not 0.0 < self.budget <= 1.0:
                raise ValueError(
                    f"budget={self.budget!r}: a float is a fraction of the keys and must be in (0, 1]; "
                    "give an int for a number of rows"
                )
        elif self.budget < 4:
            raise ValueError(f"budget={self.budget!r}: must be at least 4 rows")
        if isinstance(self.methods, str):
            raise TypeError(f"methods={self.methods!r}: must be a sequence of names, e.g. ['{self.methods}']")
        if self.methods is not None:
            names = tuple(self.methods)
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"methods={self.methods!r}: must be None or a non-empty sequence of method names")
            object.__setattr__(self, "methods", names)
        for name in ("sinks", "window", "protected"):
            value = getattr(self, name)
            _check_number(name, value, (int,))
            if value < 0:
                raise ValueError(f"{name}={value!r}: must be a number of rows, 0 or more")
        if not isinstance(self.halving, str):
            raise TypeError(f"halving={self.halving!r}: must be the name of a halving rule")
        for name in ("inflation", "seed", "min_length"):
            value = getattr(self, name)
            if value is None:
                continue
            _check_number(name, value, (int,))
            if value < 0:
                raise ValueError(f"{name}={value!r}: must be None or an integer, 0 or more")
        if self.seed is not None and self.seed >= 2**32:
            raise ValueError(f"seed={self.seed!r}: must be below 2**32")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict={self.strict!r}: must be True or False")
        if not isinstance(self.method_options, Mapping) or not all(
            isinstance(options, Mapping) for options in self.method_options.values()
        ):
            raise TypeError(f"method_options={self.method_options!r}: must map method names to mappings of options")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """A policy from keyword options; raises ``TypeError`` that lists the known ones for an unknown name."""
        known = cls.option_names()
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: allowed are {', '.join(known)}")
        return cls(**options)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return tuple(f.name for f in fields(cls))


def _check_number(name: str, value: Any, types: tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        allowed = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name}={value!r}: must be of type {allowed}, not {type(value).__name__}")


@dataclass(frozen=True)
class Plan:
    """The decision for one site.

    ``method`` is what will run there (``"exact"`` when nothing else may); ``params`` are the keyword
    arguments of its op, plain data; ``rejected`` holds one :class:`Refusal` for every other method that was
    considered; ``reason`` is one sentence for the report; ``nearest`` is what would be rewritten in place of a
    refused site, in words, if that is known.
    """

    method: str
    verdict: Verdict
    reason: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rejected: tuple[Refusal, ...] = ()
    nearest: str | None = None


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes (ints, ``SymInt`` or sympy expressions) are equal for every input; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = _expression(a) - _expression(b)
    return bool(difference == 0 or getattr(difference, "expand", lambda: 1)() == 0)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def layer_key(path: str, index: int = 0) -> int:
    """Philox key of a site: 31 bits from its module path and its place among the sites of that module.

    The path is relative to the compiled or rewritten root, so that eager and compiled models draw the same
    random numbers.
    """
    return zlib.crc32(f"{path}#{index}".encode()) & 0x7FFFFFFF
