"""What the user asks for: the options of the backend and of ``rewrite_attention``, parsed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from os import PathLike
from typing import Any

from . import local
from .method import METHODS
from .options import Options, flag, table_of, whole
from .plain import about, check_plain, from_json, shown
from .plan import SavedPlan, SavedSite

BESIDE_A_PLAN = ("seed", "strict", "cuda_graphs")
"""The options that a saved plan leaves open."""


class Unmet(ValueError):
    """What ``strict=True`` asks for is not so."""


@dataclass(frozen=True, init=False)
class Policy:
    """What the user asks for. The fields are options of the backend and of ``rewrite_attention``; further ones are
    those of methods that can be given for all methods at once (:meth:`Options.for_all`): ``sinks``, ``window`` (the
    exact tail, ``recent`` of Express), ``protected``, ``halving`` and ``inflation``.

    budget: rows ``s`` a method may keep; an int is rounded down to a power of two, a float in (0, 1] is
        a fraction of the number of keys, resolved at run time. A function from the number of keys to rows is read at
        16, 32, 64, ..., 2,097,152 keys and held between them and beyond, by a table that the op looks up at run time. A
        sequence of rows is such a table. Fewer than 4 rows by a fraction or a function are 4. Keys are real ones, of
        each sequence by itself. Express takes a number of rows only: what a query sees must not depend on the length
        of what follows.
    methods: the methods to try, in order of preference: names, or options of methods such as ``Express(budget=256)``.
        With ``"exact"`` among them, but not first, a method runs only where it is predicted to be faster than exact
        attention. ``None`` is ``("express", "exact")``. Kept as names; the options become ``method_options``.
    min_length: sequences with fewer keys use exact attention; ``None`` means 0 for methods that are named without
        ``"exact"``, and otherwise what is predicted (``predict.py``). SANTA goes by what was measured wherever this
        is ``None``.
    method_options: a mapping from method name to a mapping of that method's own options, which go before those that
        are given for all methods.
    causal_only: rewrite only sites whose mask is proven to be causal; all others stay as they are.
    training: False leaves sites as they are whose result needs a gradient, and with ``rewrite_attention`` also
        modules in training mode (reentrant checkpointing runs them without gradients first).
    seed: an int gives the same result at every call; ``None`` draws a fresh seed from torch's default
        generator at every call (so ``torch.manual_seed`` decides).
    strict: raise instead of falling back when a named method is refused, or when a graph has no attention, or none
        for a glob of ``modules`` or an entry of ``plan``.
    modules: other policies for some modules: a mapping from a glob on the module path (as in :mod:`fnmatch`, where
        ``*`` also matches dots) to one method (a name, or options of it) or to a mapping of options. Of several globs
        that match, later ones go over earlier ones, option by option. ``"exact"`` means there what
        ``methods=["exact"]`` means for all. See :meth:`at`.
    plan: a :class:`SavedPlan`, or the path of a file with one, which is read at once. Each site
        gets what it says there, if that can be proven again; what cannot, and a site that is not in it, is refused.
        Beside it only ``seed``, ``strict`` and ``cuda_graphs`` may be given.
    cuda_graphs: True replays what does not change from call to call as CUDA graphs: of captured modules
        (``rewrite_attention``) calls without gradients, and with ``torch.compile`` what inductor does under
        ``triton.cudagraphs``. What no graph can stand for runs without one, and a ``RuntimeWarning`` says why.
    shared: the further options that were given.

    Numbers may be Python's or numpy's, and become Python's; integers are below 2**63. Raises ``ValueError`` or
    ``TypeError`` that name the field, its value and what is allowed; ``OSError`` for a plan that cannot be read.
    """

    budget: int | float | Callable[[int], int] | Sequence[int] = 512
    methods: tuple[str, ...] | None = None
    min_length: int | None = None
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    causal_only: bool = False
    training: bool = True
    seed: int | None = 0
    strict: bool = False
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plan: SavedPlan | None = None
    cuda_graphs: bool = False
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, **options: Any) -> None:
        options = {**options.pop("shared", {}), **options}
        local.known(options)
        options, shared = local.written_out(options), {}
        for f in fields(self):
            default = f.default if f.name not in _MAPPINGS else {}
            object.__setattr__(self, f.name, options.pop(f.name, default))
        for name in local.CHECKS:
            object.__setattr__(self, name, local.check(name, getattr(self, name)))
        for name, value in options.items():
            shared[name] = local.check(name, value)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "seed", _seed(self.seed))
        flag("strict", self.strict)
        flag("cuda_graphs", self.cuda_graphs)
        object.__setattr__(self, "modules", dict(_overrides(self.modules)))
        if self.plan is not None:
            self._check_plan(self.plan)

    def _check_plan(self, plan: Any) -> None:
        plan = SavedPlan.load(plan) if isinstance(plan, (str, PathLike)) else plan
        if not isinstance(plan, SavedPlan):
            raise TypeError(
                f"plan={shown(plan)}: must be None, a SavedPlan (as fit(...).plan) or the path of a file with one"
            )
        object.__setattr__(self, "plan", plan)
        given = {**self.local(), "modules": self.modules}
        others = [name for name, value in given.items() if value != (getattr(Policy, name, {}))]
        if others:
            raise ValueError(
                f"{', '.join(f'{name}={given[name]!r}' for name in others)}: not allowed beside a saved plan, "
                f"which says it for each site; allowed are {', '.join(BESIDE_A_PLAN[:-1])} and {BESIDE_A_PLAN[-1]}"
            )

    # -- what it says of a method -------------------------------------------------------------------------------

    def given(self, method: str) -> dict[str, Any]:
        """The options of a method that are given, for all methods or for itself; none of them is checked for it.

        Raises ``TypeError`` for an option that the method does not have.
        """
        cls = METHODS[method].options
        every, own = {"budget": self.budget, **self.shared}, self.method_options.get(method, {})
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(own) - known):
            raise TypeError(
                f"method_options[{method!r}]: unknown option {', '.join(map(repr, unknown))}; "
                f"allowed are {', '.join(sorted(known)) or 'none'}"
            )
        return {**{name: every[flat] for flat, name in cls.for_all().items() if flat in every}, **own}

    def of(self, method: str) -> Any:
        """The options of a method, an instance of its dataclass. Raises as :meth:`given`, and for bad values."""
        if method not in self._options:
            self._options[method] = METHODS[method].options(**self.given(method))
        return self._options[method]

    @cached_property
    def _options(self) -> dict[str, Options]:
        return {}

    def tabled(self) -> Policy:
        """The policy for any number of keys: no budget is a function, but the table of one.

        Raises ``ValueError`` unless that gives rows.
        """
        changes: dict[str, Any] = {}
        if callable(self.budget):
            changes["budget"] = table_of("budget", self.budget)
        own = {
            name: {**options, "budget": table_of("budget", options["budget"])}
            for name, options in self.method_options.items()
            if callable(options.get("budget"))
        }
        changes |= {"method_options": {**self.method_options, **own}} if own else {}
        return replace(self, **changes) if changes else self

    # -- what it says of a module -------------------------------------------------------------------------------

    @cached_property
    def _globs(self) -> dict[str, tuple[str, ...]]:
        return {}

    @cached_property
    def _local(self) -> dict[tuple[str, ...], Policy]:
        return {}

    @cached_property
    def _of_paths(self) -> dict[str, Policy]:
        return {}

    @cached_property
    def _of_entries(self) -> dict[int, Policy]:
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
        local = self._local[globs]
        own = {name: METHODS[name].options.at_module(given, path) for name, given in local.method_options.items()}
        if own == local.method_options:
            return local
        if path not in self._of_paths:
            self._of_paths[path] = replace(local, method_options=own)
        return self._of_paths[path]

    def of_entry(self, entry: SavedSite) -> Policy:
        """The policy of a site of :attr:`plan` alone: its options, and its method if they name none."""
        if id(entry) not in self._of_entries:
            given = {"methods": (entry.method,), **entry.options}
            if entry.method in METHODS and (rows := METHODS[entry.method].options.of_rows(entry.rows)):
                every = given.get("method_options", {})
                given["method_options"] = {**every, entry.method: {**rows, **every.get(entry.method, {})}}
            self._of_entries[id(entry)] = Policy.for_module(given)
        return self._of_entries[id(entry)]

    def local(self) -> dict[str, Any]:
        """The options that one module may have for itself: those of no method, and what is shared."""
        return {**{name: getattr(self, name) for name in local.CHECKS}, **self.shared}

    # -- ways in and out ----------------------------------------------------------------------------------------

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """A policy from keyword options; raises ``TypeError`` that lists the known ones for an unknown name."""
        local.known(options)
        return cls(**options)

    @classmethod
    def for_module(cls, options: Mapping[str, Any]) -> Policy:
        """As :meth:`from_options`, for one module: raises ``ValueError`` for what only a whole model can have."""
        return cls.from_options(local.check_all(options))

    def to_json(self) -> str:
        """All that is given, as a JSON object; ``TypeError`` names a field that is no plain data, such as a function.

        NaN and infinities are written as Python's ``json`` does.
        """
        values = {**self.local(), **{name: getattr(self, name) for name in local.GLOBAL if name != "plan"}}
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
        if not isinstance(options, dict):
            raise TypeError(f"policy={options!r}: must be a JSON object of the fields {', '.join(cls.option_names())}")
        plan = options.get("plan")
        if plan is not None and not isinstance(plan, dict):
            raise TypeError(f"plan={shown(plan)}: must be null or an object, as SavedPlan.to_json writes it")
        return cls.from_options(options if plan is None else {**options, "plan": SavedPlan.from_data(plan, "plan")})

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return (*local.names(), *local.GLOBAL)


_MAPPINGS = ("method_options", "modules", "shared")


def _seed(value: Any) -> int | None:
    seed = whole("seed", value)
    if seed is not None and seed >= 2**32:
        raise ValueError(f"seed={seed!r}: must be below 2**32")
    return seed


def _overrides(modules: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The globs, each with the checked options of what is given for it."""
    if not isinstance(modules, Mapping):
        raise TypeError(f"modules={modules!r}: must map globs on module paths to a method or to fields")
    for glob, given in modules.items():
        if not isinstance(glob, str) or not isinstance(given, (str, Options, Mapping)):
            raise TypeError(
                f"modules: {glob!r}: {given!r}; must map a glob on module paths to the name of one method or to a "
                "mapping of fields"
            )
        with about(f"modules[{glob!r}]"):
            fields = local.check_all(dict(given) if isinstance(given, Mapping) else {"methods": (given,)})
        yield glob, fields
