"""The registry of methods: one :class:`Method` per file in ``kernels/``. A leaf beside ``spec`` and ``cost``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .cost import Cost
from .spec import AttentionSpec, Policy, Refusal, Site


@dataclass(frozen=True)
class Method:
    """One way to compute attention at a site.

    name: the name used in ``Policy.methods``; ``torch.ops.express_compile.<name>`` is its op.
    summary, supports, refuses: one line each, shown by tables and the README.
    refuse(spec, policy): ``None``, or why the method must not be used at this site.
    params(site, policy): the keyword arguments of the op beyond
        ``(query, key, value, padding, seed, scale, layer)``; plain data. Raises ``ValueError`` for a bad policy.
        A site without a spec, ``Site()``, stands for any.
    loses(spec, policy): why exact attention was measured to be faster at a site of these sizes, or ``None``; asked
        unless the policy gives ``min_length``. Sizes may be symbolic: what is decided at run time is no loss.
    options: the names and defaults of the method's own options (``Policy.method_options[name]``).
    named(options): the module paths that its own options speak of, each as it is to be shown by its path.
    cost(spec, params): what a call costs in the symbols of ``cost.py``, for the parameters that ``params`` gave.
        Of ``spec`` it reads the mask; sizes and the budget stay symbols. ``None``: not known.
    padding_cost: whether ``cost`` also says what padding costs; else it is that of a batch without.
    rows(params, Lk): what the symbol s of its cost stands for at ``Lk`` keys.
    forms: which fields of ``AttentionSpec.forms`` the op computes. A site that has another one is refused without
        asking ``refuse``. Of ``"sinks"`` the op takes the logits ``[H]`` as the argument ``sinks``.
    approximates(params, Lk): whether the op, given these parameters, only approximates the exact attention over ``Lk``
        keys, so that :func:`express_compile.watch` may compare the two call by call. ``None``: they must not be.
    decodes: whether it takes the single queries of decoding.
    by_layer: whether ``params`` reads more of the site than its spec: layers of the same sizes may differ.
    changes: what it computes instead of attention over all keys, where that is no approximation but another function,
        in words that follow a semicolon. Such a method runs only where a policy names it, whatever the speed, its
        plans say so, and it is never suggested for a site that another one refused.
    """

    name: str
    summary: str
    supports: str
    refuses: str
    refuse: Callable[[AttentionSpec, Policy], Refusal | None]
    params: Callable[[Site, Policy], Mapping[str, Any]]
    loses: Callable[[AttentionSpec, Policy], str | None] = lambda spec, policy: None
    options: Mapping[str, Any] = field(default_factory=dict)
    named: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda options: {}
    cost: Callable[[AttentionSpec, Mapping[str, Any]], Cost] | None = None
    padding_cost: bool = False
    rows: Callable[[Mapping[str, Any], int], int] = lambda params, Lk: Lk
    forms: tuple[str, ...] = ()
    approximates: Callable[[Mapping[str, Any], int], bool] | None = None
    decodes: bool = False
    by_layer: bool = False
    changes: str = ""

    @property
    def op(self) -> torch._ops.OpOverload:
        """The custom op with signature ``(query, key, value, padding, seed, scale, layer, **params)``."""
        return getattr(torch.ops.express_compile, self.name).default

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
        if refusal is None and isinstance(policy.budget, tuple) and self.name != "exact" and not self.takes("table"):
            reason = "its budget is a table of rows or a function of the number of keys, which it does not take"
            return Refusal(self.name, f"{reason}; give a number of rows, or a fraction of the keys")
        return refusal

    def own_options(self, policy: Policy) -> dict[str, Any]:
        """Defaults updated by ``policy.method_options``; raises ``TypeError`` for an unknown option."""
        given = policy.method_options.get(self.name, {})
        unknown = sorted(set(given) - set(self.options), key=str)
        if unknown:
            raise TypeError(
                f"method_options[{self.name!r}]: unknown option {', '.join(map(repr, unknown))}; "
                f"allowed are {', '.join(sorted(self.options)) or 'none'}"
            )
        return {**self.options, **given}


class _Methods(Mapping[str, Method]):
    """Name -> :class:`Method`. The shipped methods are imported on first use, never at package import."""

    shipped = ("express", "thinformer", "santa", "sparse", "exact")

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def load(self) -> None:
        """Import the shipped methods, which registers their ops; call before tracing starts."""
        if not self._loaded:
            for name in self.shipped:
                importlib.import_module(f"express_compile.kernels.{name}")
            self._loaded = True

    def add(self, method: Method) -> Method:
        if self._methods.get(method.name, method) is not method:
            raise ValueError(f"method {method.name!r} is registered already; choose another name")
        self._methods[method.name] = method
        return method

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


def register(method: Method) -> Method:
    """Add a method to :data:`METHODS` and return it. Raises ``ValueError`` if its name is taken."""
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be an express_compile.core.method.Method")
    return METHODS.add(method)
