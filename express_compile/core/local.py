"""What one module may be told: the options that are not the whole model's, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .method import METHODS
from .options import Options, budget, flag, whole
from .plain import canonical, renamed


def _methods(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be a sequence of names, e.g. ['{value}']")
    if value is None:
        return None
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}={value!r}: must be None or a sequence of method names")
    if not value or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{name}={value!r}: must be None or a non-empty sequence of method names")
    return tuple(value)


def _method_options(name: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(options, Mapping) for options in value.values()):
        raise TypeError(f"{name}={value!r}: must map method names to mappings of options")
    for key in (*value, *(key for options in value.values() for key in options)):
        if not isinstance(key, str):
            raise TypeError(f"{name}: {key!r}: names of methods and of their options must be strings")
    try:
        plain: dict[str, dict[str, Any]] = canonical(value)
    except ValueError as error:
        raise renamed(name, error) from None
    return plain


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "budget": budget,
    "methods": _methods,
    "min_length": whole,
    "method_options": _method_options,
    "causal_only": flag,
    "training": flag,
}
"""Of every option that belongs to no method, and that one module may have for itself, the check."""


def shared_names() -> tuple[str, ...]:
    """The options that belong to methods and can be given for all of them at once, beside the budget."""
    names = (name for method in METHODS.values() for name in method.options.for_all())
    return tuple(name for name in dict.fromkeys(names) if name not in CHECKS)


def names() -> tuple[str, ...]:
    """All options that one module may have, in order."""
    first, *others = CHECKS
    return (first, others[0], *shared_names(), *others[1:])


def check(name: str, value: Any) -> Any:
    """The value of an option that one module may have, in its one form.

    Raises ``TypeError`` or ``ValueError`` that name the option, its value and what is allowed; ``TypeError`` also for
    an unknown one.
    """
    if name in CHECKS:
        return CHECKS[name](name, value)
    for method in METHODS.values():
        if own := method.options.for_all().get(name):
            value = method.options.check_of(own)(name, value)
    return value


def written_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with names for methods that are given as their :class:`Options`, which join ``method_options``."""
    methods = options.get("methods")
    if isinstance(methods, Options):
        methods = [methods]
    if not isinstance(methods, Sequence) or not any(isinstance(x, Options) for x in methods):
        return dict(options)
    given: dict[str, Any] = {}
    for x in methods:
        if isinstance(x, Options):
            name = METHODS.name_of(x)
            if name in given:
                raise ValueError(f"methods={list(methods)!r}: must have options of {name} once")
            given[name] = x.data()
    others = options.get("method_options", {})
    if twice := sorted(set(given) & set(others)):
        raise ValueError(
            f"method_options[{twice[0]!r}]={others[twice[0]]!r}: not allowed beside the {twice[0]} of methods, which "
            "has its options already"
        )
    named = [METHODS.name_of(x) if isinstance(x, Options) else x for x in methods]
    return {**options, "methods": named, "method_options": {**others, **given}}


def check_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`check` makes of all of them; raises ``TypeError`` that lists the known ones for an unknown name, and
    ``ValueError`` for what only a whole model can have."""
    for name in options:
        if name in GLOBAL:
            raise ValueError(f"{name!r} is not allowed for one module: {GLOBAL[name]}")
    options = written_out(options)
    known(options, of_model=False)
    return {name: check(name, value) for name, value in options.items()}


def known(options: Mapping[Any, Any], of_model: bool = True) -> None:
    """Raise ``TypeError`` that lists the known options, those of a whole model or of one module, for an unknown one."""
    others = GLOBAL if of_model else ()
    if set(options) <= {*CHECKS, *others}:
        return  # no need to ask the methods for theirs
    allowed = (*names(), *others)
    if unknown := sorted(set(options) - set(allowed), key=str):
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: allowed are {', '.join(allowed)}")


# The options that mean the whole model, and why one module cannot have its own.
GLOBAL = {
    "seed": "all sites share one seed and draw for themselves by their paths",
    "strict": "it is judged for all sites of a model together",
    "modules": "globs inside of globs would have no order; write one glob for each",
    "plan": "it has an entry for each site already",
    "cuda_graphs": "a graph holds many modules",
}
