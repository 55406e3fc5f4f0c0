"""The shared nouns: what a site computes, what the user wants, what was decided.

A leaf: imports torch, the standard library and ``plain`` only, so that every room may import it.
All classes are frozen dataclasses of plain data.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch

from .plain import canonical, check_plain, from_json, number, renamed

if TYPE_CHECKING:
    from .saved import SavedPlan

Verdict = Literal["rewritten", "exact", "refused"]


def floor_power_of_two(x: int) -> int:
    """Largest power of two that is not above ``x``; 0 for ``x < 1``."""
    return 1 << (x.bit_length() - 1) if x >= 1 else 0


def default_scale(D: int) -> float:
    """``1 / sqrt(D)``, the scale of attention that names none; heads without features have no scores to scale."""
    return 1.0 / math.sqrt(D) if D else 1.0


TABLE_AT = tuple(1 << k for k in range(4, 22))
"""The numbers of keys at which a function of them is read for a table."""


def rows_at(table: Sequence[int], Lk: int) -> int:
    """The entry of a table for ``Lk`` keys: that of the largest number of :data:`TABLE_AT` that is not above."""
    return table[min(max(Lk.bit_length() - 5, 0), len(table) - 1)]


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
    """What one attention site computes: ``softmax(cap(scale * q k^T) + mask) v``.

    Sizes are ints or ``torch.SymInt`` (dynamic shapes); layout is ``[B, H, L, D]`` as in
    ``scaled_dot_product_attention``. ``H_kv`` divides ``H`` (grouped-query attention).
    ``device`` is a device type (``"cpu"``, ``"cuda"``). ``softcap`` is c of ``cap(s) = c * tanh(s / c)``, or None where
    scores are not capped. ``sinks``: a logit per query head joins the softmax, with a value of zero. ``feature_major``:
    the keys are known to lie feature by feature (:func:`feature_major`).
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
    softcap: float | None = None
    sinks: bool = False
    feature_major: bool = False

    @property
    def forms(self) -> dict[str, str]:
        """What is done to the scores besides the mask, in words: of ``"softcap"`` and ``"sinks"`` what the site has."""
        capped = {} if self.softcap is None else {"softcap": f"a logit soft-cap of {self.softcap:g}"}
        return {**capped, **({"sinks": "attention sinks"} if self.sinks else {})}


@dataclass(frozen=True)
class Site:
    """Where a method is asked to run: what the site computes, and which one of the model it is.

    path, index: its module path relative to the root, and its place among the sites of that module.
    """

    spec: AttentionSpec | None = None
    path: str = ""
    index: int = 0

    @property
    def depth(self) -> int:
        """Its place among the layers, by its name alone, so that it is the same however a model is traced.

        The sum of the numbers in its path (7 for ``model.layers.7.self_attn``) and its place in its module: along any
        list of layers, also of stages of blocks, and over the calls of one module, it counts up by one.
        """
        parts = self.path.split(".")
        numbers = [part for part in parts if part.isdigit()] or re.findall(r"\d+", self.path)
        return sum(map(int, numbers)) + self.index


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
        a fraction of the number of keys, resolved at run time. A function from the number of keys to rows is read at
        16, 32, 64, ..., 2,097,152 keys and held between them and beyond, by a table that the op looks up at run time. A
        sequence of rows is such a table. Fewer than 4 rows by a fraction or a function are 4. Keys are real ones, of
        each sequence by itself. Express takes a number of rows only: what a query sees must not depend on the length
        of what follows.
    methods: names of the methods to try, in order of preference. With ``"exact"`` among them, but not first, a method
        runs only where it is predicted to be faster than exact attention. ``None`` is ``("express", "exact")``.
    sinks, window: the first and the last tokens, which are always held exactly.
    protected: places for the most distinctive rows, which are held exactly wherever they are; without them
        thinning forgets single facts (README, "What it forgets").
    halving: name of a registered halving rule.
    inflation: M of the Express paper; ``None`` means ``h - 2`` for ``s = 2**h``.
    seed: an int gives the same result at every call; ``None`` draws a fresh seed from torch's default
        generator at every call (so ``torch.manual_seed`` decides).
    min_length: sequences with fewer keys use exact attention; ``None`` means 0 for methods that are named without
        ``"exact"``, and otherwise what is predicted (``predict.py``). SANTA goes by what was measured wherever this
        is ``None``.
    strict: raise instead of falling back when a named method is refused, or when a graph has no attention, or none
        for a glob of ``modules`` or an entry of ``plan``.
    method_options: a mapping from method name to a mapping of that method's own options.
    modules: other policies for some modules: a mapping from a glob on the module path (as in :mod:`fnmatch`, where
        ``*`` also matches dots) to the name of one method or to a mapping of fields. Of several globs that match,
        later ones go over earlier ones, field by field. ``"exact"`` means there what ``methods=["exact"]`` means for
        all. See :meth:`at`.
    causal_only: rewrite only sites whose mask is proven to be causal; all others stay as they are.
    training: False leaves sites as they are whose result needs a gradient, and with ``rewrite_attention`` also
        modules in training mode (reentrant checkpointing runs them without gradients first).
    plan: a :class:`SavedPlan`, or the path of a file with one, which is read at once. Each site
        gets what it says there, if that can be proven again; what cannot, and a site that is not in it, is refused.
        Beside it only ``seed`` and ``strict`` may be given.

    Numbers may be Python's or numpy's, and become Python's; integers are below 2**63. Raises ``ValueError`` or
    ``TypeError`` that name the field, its value and what is allowed.
    """

    budget: int | float | Callable[[int], int] | Sequence[int] = 512
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
    modules: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    causal_only: bool = False
    training: bool = True
    plan: SavedPlan | str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        self._check_budget()
        self._check_methods()
        self._check_integers()
        if not isinstance(self.halving, str):
            raise TypeError(f"halving={self.halving!r}: must be the name of a halving rule")
        for name in ("strict", "causal_only", "training"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        self._check_method_options()
        self._check_modules()
        if self.plan is not None:
            self._check_plan()

    def _check_budget(self) -> None:
        if callable(self.budget):
            return
        if isinstance(self.budget, (list, tuple)):
            return self._check_table()
        others = ("a function of the number of keys", "a sequence of rows")
        budget = number("budget", self.budget, int, float, others=others)
        object.__setattr__(self, "budget", budget)
        if isinstance(budget, float):
            if not 0.0 < budget <= 1.0:
                raise ValueError(
                    f"budget={budget!r}: a float is a fraction of the keys and must be in (0, 1]; "
                    "give an int for a number of rows"
                )
        elif budget < 4:
            raise ValueError(f"budget={budget!r}: must be at least 4 rows")

    def _check_table(self) -> None:
        words = f"budget={tuple(self.budget)!r}: must be rows for 16, 32, 64, ... keys, integers of at least 4"
        try:
            table = tuple(number("budget", rows, int) for rows in self.budget)
        except TypeError:
            raise ValueError(words) from None
        if not table or min(table) < 4:
            raise ValueError(words)
        object.__setattr__(self, "budget", table)

    def _check_methods(self) -> None:
        if isinstance(self.methods, str):
            raise TypeError(f"methods={self.methods!r}: must be a sequence of names, e.g. ['{self.methods}']")
        if self.methods is None:
            return
        if not isinstance(self.methods, Sequence):
            raise TypeError(f"methods={self.methods!r}: must be None or a sequence of method names")
        names = tuple(self.methods)
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"methods={self.methods!r}: must be None or a non-empty sequence of method names")
        object.__setattr__(self, "methods", names)

    def _check_integers(self) -> None:
        for name in ("sinks", "window", "protected", "inflation", "seed", "min_length"):
            optional, value = name in ("inflation", "seed", "min_length"), getattr(self, name)
            if value is None and optional:
                continue
            value = number(name, value, int, others=("None",) if optional else ())
            if value < 0:
                allowed = "None or an integer" if optional else "a number of rows"
                raise ValueError(f"{name}={value!r}: must be {allowed}, 0 or more")
            object.__setattr__(self, name, value)
        if self.seed is not None and self.seed >= 2**32:
            raise ValueError(f"seed={self.seed!r}: must be below 2**32")

    def _check_method_options(self) -> None:
        given = self.method_options
        if not isinstance(given, Mapping) or not all(isinstance(options, Mapping) for options in given.values()):
            raise TypeError(f"method_options={given!r}: must map method names to mappings of options")
        for name in (*given, *(name for options in given.values() for name in options)):
            if not isinstance(name, str):
                raise TypeError(f"method_options: {name!r}: names of methods and of their options must be strings")
        try:
            object.__setattr__(self, "method_options", canonical(given))
        except ValueError as error:
            raise renamed("method_options", error) from None

    def _check_modules(self) -> None:
        if not isinstance(self.modules, Mapping):
            raise TypeError(f"modules={self.modules!r}: must map globs on module paths to a method or to fields")
        overrides = {}
        for glob, given in self.modules.items():
            if not isinstance(glob, str) or not isinstance(given, (str, Mapping)):
                raise TypeError(
                    f"modules: {glob!r}: {given!r}; must map a glob on module paths to the name of one method or to a "
                    "mapping of fields"
                )
            override = {"methods": (given,)} if isinstance(given, str) else dict(given)
            try:
                checked = Policy.for_module(override)
            except (TypeError, ValueError) as error:
                raise renamed(f"modules[{glob!r}]", error) from None
            overrides[glob] = {name: getattr(checked, name) for name in override}
        object.__setattr__(self, "modules", overrides)

    def _check_plan(self) -> None:
        from .saved import SavedPlan

        if isinstance(self.plan, (str, PathLike)):
            object.__setattr__(self, "plan", SavedPlan.load(self.plan))
        if not isinstance(self.plan, SavedPlan):
            raise TypeError(f"plan={self.plan!r}: must be None, a SavedPlan or the path of a file with one")
        others = [name for name in (*self.local_names(), "modules") if getattr(self, name) != getattr(Policy, name, {})]
        if others:
            raise ValueError(
                f"{', '.join(f'{name}={getattr(self, name)!r}' for name in others)}: not allowed beside a saved plan, "
                "which says it for each site; allowed are seed and strict"
            )

    @cached_property
    def _globs(self) -> dict[str, tuple[str, ...]]:
        return {}

    @cached_property
    def _local(self) -> dict[tuple[str, ...], Policy]:
        return {}

    def globs(self, path: str) -> tuple[str, ...]:
        """The globs of ``modules`` that match a module path, in the order given."""
        if path not in self._globs:
            self._globs[path] = tuple(glob for glob in self.modules if fnmatchcase(path, glob))
        return self._globs[path]

    def at(self, path: str) -> Policy:
        """The policy of one module: the fields of every glob that matches its path over those given for all."""
        globs = self.globs(path)
        if globs not in self._local:
            changes = {name: value for glob in globs for name, value in self.modules[glob].items()}
            self._local[globs] = replace(self, modules={}, **changes)
        return self._local[globs]

    def tabled(self) -> Policy:
        """The policy for any number of keys: its budget is no function, but the table of one.

        Raises ``ValueError`` unless that gives rows.
        """
        return replace(self, budget=tuple(map(self._ask, TABLE_AT))) if callable(self.budget) else self

    def _ask(self, Lk: int) -> int:
        rows = self.budget(Lk)
        try:
            plain = number("rows", rows, int)
        except (TypeError, ValueError):
            plain = -1
        if plain < 0:
            raise ValueError(f"budget({Lk}) returned {rows!r}: must be a number of rows, an int below 2**63")
        return max(4, plain)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """A policy from keyword options; raises ``TypeError`` that lists the known ones for an unknown name."""
        known = cls.option_names()
        unknown = sorted(set(options) - set(known), key=str)
        if unknown:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: allowed are {', '.join(known)}")
        return cls(**options)

    @classmethod
    def for_module(cls, options: Mapping[str, Any]) -> Policy:
        """As :meth:`from_options`, for one module: raises ``ValueError`` for what only a whole model can have."""
        for name in options:
            if name in _GLOBAL:
                raise ValueError(f"{name!r} is not allowed for one module: {_GLOBAL[name]}")
        return cls.from_options(options)

    def to_json(self) -> str:
        """All fields as a JSON object; ``TypeError`` names a field that is no plain data, such as a function.

        NaN and infinities are written as Python's ``json`` does.
        """
        values = {name: getattr(self, name) for name in self.option_names() if name != "plan"}
        for name, value in values.items():
            check_plain(name, value)
        plan = None if self.plan is None else json.loads(self.plan.to_json())
        return json.dumps({**values, "plan": plan}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy that :meth:`to_json` wrote; fields that are left out have their defaults.

        Raises ``ValueError`` or ``TypeError`` that name the field; reads no file.
        """
        return from_json("policy", text, cls._from_data)

    @classmethod
    def _from_data(cls, options: Any) -> Policy:
        from .saved import SavedPlan

        if not isinstance(options, dict):
            raise TypeError(f"policy={options!r}: must be a JSON object of the fields {', '.join(cls.option_names())}")
        plan = options.get("plan")
        if plan is not None and not isinstance(plan, dict):
            raise TypeError(f"plan={plan!r}: must be null or an object, as SavedPlan.to_json writes it")
        return cls.from_options(options if plan is None else {**options, "plan": SavedPlan.from_data(plan, "plan")})

    @classmethod
    def local_names(cls) -> tuple[str, ...]:
        """The names of the options that one module may have for itself, in order."""
        return tuple(name for name in cls.option_names() if name not in _GLOBAL)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return tuple(f.name for f in fields(cls))


# The fields that mean the whole model, and why one module cannot have its own.
_GLOBAL = {
    "modules": "globs inside of globs would have no order; write one glob for each",
    "strict": "it is judged for all sites of a model together",
    "seed": "all sites share one seed and draw for themselves by their paths",
    "plan": "it has an entry for each site already",
}


@dataclass(frozen=True)
class Plan:
    """The decision for one site.

    ``method`` is what will run there (``"exact"`` when nothing else may); ``params`` are the keyword
    arguments of its op, plain data; ``rejected`` holds one :class:`Refusal` for every other method that was
    considered; ``reason`` is one sentence for the report; ``predicted_ms`` are the times by which it was chosen, of
    each method, where lengths are known; ``policy`` is the one that decided: that of the site's module, its budget a
    number where the number of keys is known; ``nearest`` is what would be rewritten in place of a refused site, in
    words, if that is known.
    """

    method: str
    verdict: Verdict
    reason: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rejected: tuple[Refusal, ...] = ()
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    nearest: str | None = None
    policy: Policy | None = field(default=None, repr=False, compare=False)


class Unmet(ValueError):
    """What ``strict=True`` asks for is not so."""


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes (ints, ``SymInt`` or sympy expressions) are equal for every input; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = _expression(a) - _expression(b)
    return bool(difference == 0 or getattr(difference, "expand", lambda: 1)() == 0)


def feature_major(key: torch.Tensor) -> bool:
    """Whether ``key`` ``[B, H_kv, Lk, D]`` lies feature by feature, as a view of ``[B, H_kv, D, Lk]``; no guard."""
    return known_equal(key.stride(2), 1) and not known_equal(key.stride(3), 1)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def layer_key(path: str, index: int = 0) -> int:
    """Philox key of a site: 31 bits from its module path and its place among the sites of that module.

    The path is relative to the compiled or rewritten root, so that eager and compiled models draw the same
    random numbers.
    """
    return zlib.crc32(f"{path}#{index}".encode()) & 0x7FFFFFFF
