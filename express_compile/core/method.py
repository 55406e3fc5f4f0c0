"""The registry of methods: one :class:`Method` per file in ``kernels/``."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .cost import Cost
from .options import Options
from .rows import Rows
from .spec import AttentionSpec, HeadShard, Mask, Site, known_equal

if TYPE_CHECKING:
    from .policy import Policy


@dataclass(frozen=True)
class Refusal:
    """Why ``method`` was not used at a site, in words a user can act on."""

    method: str
    reason: str

    def __str__(self) -> str:
        return f"{self.method}: {self.reason}"


@dataclass(frozen=True)
class Method:
    """One way to compute attention at a site.

    name: the name used in ``Policy.methods``; ``torch.ops.express_compile.<name>`` is its op.
    summary, supports, refuses: one line each, shown by tables and the README.
    refuse(spec, policy): ``None``, or why the method must not be used at this site.
    options: the dataclass of the method's own options. What a policy says of them is ``policy.of(name)``.
    params(site, policy): the keyword arguments of the op beyond those that every op has (:class:`Call`); plain data.
        Raises ``ValueError`` for a bad policy. A site without a spec, ``Site()``, stands for any. Unless given, what
        the options are packed into, and ``min_length`` where the op takes it.
    sees(options, site): the rows that each KV head or query head of the site sees, one for all or a tuple; ``None``
        where they are no selection of :class:`Rows`.
    loses(spec, policy): why exact attention was measured to be faster at a site of these sizes, or ``None``; asked
        unless the policy gives ``min_length``. Sizes may be symbolic: what is decided at run time is no loss.
    cost(spec, params): what a call costs in the symbols of ``cost.py``, for the parameters that ``params`` gave.
        Of ``spec`` it reads the mask; sizes and the budget stay symbols. ``None``: not known.
    padding_cost: whether ``cost`` also says what padding costs; else it is that of a batch without.
    shares(spec, params): instead, where a call runs the kernels of other methods, what it costs of each, by whose rates
        it is predicted; in numbers, as all sizes are.
    rows(params, Lk): what the symbol s of its cost stands for at ``Lk`` keys.
    forms: which fields of ``AttentionSpec.forms`` the op computes. A site that has another one is refused without
        asking ``refuse``. Of ``"sinks"`` the op takes the logits ``[H]`` as the argument ``sinks``.
    approximates(params, Lk): whether the op, given these parameters, only approximates the exact attention over ``Lk``
        keys, so that :func:`express_compile.watch` may compare the two call by call. ``None``: they must not be.
    step: the op ``(query, key, value, padding, scale)`` that computes exactly what a site does where that is a step of
        decoding, or ``None``; only exact attention has one.
    changes: what it computes instead of attention over all keys, where that is no approximation but another function,
        in words that follow a semicolon. Such a method runs only where a policy names it, whatever the speed, its
        plans say so, and it is never suggested for a site that another one refused.
    per_head: of its parameters those that list something for every head of a layer, or once for all heads, and how
        many numbers each entry has. A process with a part of the heads takes theirs (:meth:`part`).
    cycle(params): after how many query heads of a layer what they do repeats, where it goes by their number besides.
    """

    name: str
    summary: str
    supports: str
    refuses: str
    refuse: Callable[[AttentionSpec, Policy], Refusal | None]
    options: type[Options] = Options
    params: Callable[[Site, Policy], Mapping[str, Any]] = None  # type: ignore[assignment]  # __post_init__ fills it
    sees: Callable[[Any, Site], Rows | tuple[Rows, ...] | None] = lambda options, site: None
    loses: Callable[[AttentionSpec, Policy], str | None] = lambda spec, policy: None
    cost: Callable[[AttentionSpec, Mapping[str, Any]], Cost] | None = None
    padding_cost: bool = False
    shares: Callable[[AttentionSpec, Mapping[str, Any]], Mapping[str, Cost]] | None = None
    rows: Callable[[Mapping[str, Any], int], int] = lambda params, Lk: Lk
    forms: tuple[str, ...] = ()
    approximates: Callable[[Mapping[str, Any], int], bool] | None = None
    step: Callable[[AttentionSpec], torch._ops.OpOverload | None] = lambda spec: None
    changes: str = ""
    per_head: Mapping[str, int] = field(default_factory=dict)
    cycle: Callable[[Mapping[str, Any]], int] = lambda params: 1

    def __post_init__(self) -> None:
        if not isinstance(self.options, type) or not issubclass(self.options, Options):
            raise TypeError(f"options={self.options!r}: must be a dataclass that inherits from Options")
        if self.params is None:
            object.__setattr__(self, "params", self._packed)

    def _packed(self, site: Site, policy: Policy) -> dict[str, Any]:
        least = {"min_length": policy.min_length or 0} if self.takes("min_length") else {}
        return {**policy.of(self.name).pack(), **least}

    @property
    def op(self) -> torch._ops.OpOverload:
        """The custom op with signature ``(query, key, value, padding, seed, scale, layer, **params)``."""
        op: torch._ops.OpOverload = getattr(torch.ops.express_compile, self.name).default
        return op

    def part(self, params: Mapping[str, Any], shard: HeadShard | None) -> Mapping[str, Any]:
        """The parameters for a part of the heads, of those for all."""
        if shard is None:
            return params
        own = {}
        for name, numbers in self.per_head.items():
            entries = len(params[name]) // numbers
            if entries > 1:
                first, last = (x * entries // shard.of * numbers for x in (shard.first, shard.first + shard.heads))
                own[name] = params[name][first:last]
        return {**params, **own}

    def takes(self, option: str) -> bool:
        """Whether the op has an argument of this name."""
        return any(argument.name == option for argument in self.op._schema.arguments)

    def why_not(self, spec: AttentionSpec, policy: Policy) -> Refusal | None:
        """Why the method must not be used at a site; ``policy`` is that of the site, its budget no function.

        What :attr:`refuse` says; before that, whether the op knows all that is done to the scores of the site, and
        after it, whether it takes such a budget.
        """
        unknown = [words for name, words in spec.forms.items() if name not in self.forms]
        if unknown:
            return Refusal(self.name, f"it has {' and '.join(unknown)}, which {self.name} does not compute")
        refusal = self.refuse(spec, policy)
        budget = policy.given(self.name).get("budget", policy.budget)
        if refusal is None and isinstance(budget, tuple) and self.name != "exact" and not self.takes("table"):
            reason = "its budget is a table of rows or a function of the number of keys, which it does not take"
            return Refusal(self.name, f"{reason}; give a number of rows, or a fraction of the keys")
        return refusal

    def heads(self, site: Site, policy: Policy) -> tuple[Rows, ...]:
        """The rows that every KV head or query head of a site sees; none where they are no selection, one where the
        number of heads is not known."""
        rows = self.sees(policy.of(self.name), site)
        H_kv = None if site.spec is None else site.spec.H_kv
        each = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
        return each * H_kv if len(each) == 1 and isinstance(H_kv, int) else each


class _Methods(Mapping[str, Method]):
    """Name -> :class:`Method`. The shipped methods are imported on first use, never at package import."""

    shipped = ("express", "thinformer", "santa", "sparse", "heads", "exact")

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def load(self) -> None:
        """Import the shipped methods, which registers their ops; call before tracing starts."""
        if not self._loaded:
            for name in self.shipped:
                importlib.import_module(f"express_compile.kernels.{name}")
            in_order = (*self.shipped, *self._methods)  # whichever was imported first
            self._methods = {name: self._methods[name] for name in in_order}
            self._loaded = True

    def add(self, method: Method) -> Method:
        if self._methods.get(method.name, method) is not method:
            raise ValueError(f"method {method.name!r} is registered already; choose another name")
        self._methods[method.name] = method
        return method

    def name_of(self, options: Options) -> str:
        """The method whose options these are. Raises ``TypeError`` if there is none."""
        for name, method in self.items():
            if type(options) is method.options is not Options:
                return name
        raise TypeError(f"{options!r}: must be the options of a registered method")

    def __getitem__(self, name: str) -> Method:
        self.load()
        if name not in self._methods:
            raise ValueError(f"unknown method {name!r}: allowed are {', '.join(self._methods)}")
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(self._methods)

    def __len__(self) -> int:
        self.load()
        return len(self._methods)


METHODS = _Methods()


def cost_at(method: str, spec: AttentionSpec, params: Mapping[str, Any]) -> Cost | None:
    """What a call costs in numbers, for the op's ``params``; None where the method does not say.

    Raises ``ValueError`` for a size that is not a number.
    """
    parts = costs_at(method, spec, params)
    return None if parts is None else total(parts)


def costs_at(method: str, spec: AttentionSpec, params: Mapping[str, Any]) -> Mapping[str, Cost] | None:
    """:func:`cost_at` by the method whose kernels run, and by whose rates it is predicted."""
    own = METHODS[method]
    if own.shares is not None:
        return own.shares(spec, params)
    hashable = tuple((name, tuple(x) if isinstance(x, list) else x) for name, x in params.items())
    cost = _cost(method, _mask_of(spec, own.padding_cost), hashable)
    return None if cost is None else {method: cost.at(spec, own.rows(params, spec.Lk))}


def total(parts: Mapping[str, Cost]) -> Cost:
    """The sum of what :func:`costs_at` gives."""
    return functools.reduce(operator.add, parts.values())


def _mask_of(spec: AttentionSpec, padding: bool) -> tuple[Mask, bool]:
    """The mask without what varies with the lengths, and whether it was aligned to their ends."""
    aligned = known_equal(spec.mask.offset, spec.Lk - spec.Lq)
    offset = 0 if aligned else spec.mask.offset
    return replace(spec.mask, offset=offset, padding=padding and spec.mask.padding), aligned


@functools.lru_cache(maxsize=64)
def _cost(method: str, kind: tuple[Mask, bool], params: tuple[tuple[str, Any], ...]) -> Cost | None:
    """One expression for all sites with this mask and these parameters: to make one takes up to half a second."""
    mask, aligned = kind
    function = METHODS[method].cost
    Lk = 1 if aligned else mask.offset + 2
    spec = AttentionSpec(1, 1, 1, 1, Lk, 1, 1, torch.float32, "cpu", 1.0, mask)
    options: Mapping[str, Any] = dict(params)
    return None if function is None else function(spec, options)


def register(method: Method) -> Method:
    """Add a method to :data:`METHODS` and return it. Raises ``ValueError`` if its name is taken."""
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be an express_compile.core.method.Method")
    return METHODS.add(method)
