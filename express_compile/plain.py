"""Plain data: None, bool, int, float, str, and sequences and mappings of them. A leaf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> Any:
    """``value`` in the one form in which equal data are equal: tuples for lists, dicts for mappings, one NaN."""
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(canonical, value))
    # containers compare their items by identity first, so that this NaN, and no other, equals itself
    return math.nan if isinstance(value, float) and math.isnan(value) else value


def check_plain(name: str, value: Any) -> None:
    """Raise ``TypeError``, which names the field and the value, unless JSON gives back what it is given."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: key {key!r} cannot be written as JSON; keys must be strings")
            check_plain(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_plain(f"{name}[{i}]", item)
    elif type(value) not in (bool, int, float, str, type(None)):
        kind = "a function" if callable(value) else f"a {type(value).__name__}"
        raise TypeError(
            f"{name}={value!r}: {kind} cannot be written as JSON; allowed are None, bool, int, float, str, and "
            "sequences and mappings of them"
        )
