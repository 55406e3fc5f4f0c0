"""Sites of which the same was decided, to be shown as one: a model of 32 layers is one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def grouped(things: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """``things`` with equal keys together, in the order of the first of each group."""
    groups: dict[Hashable, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return list(groups.values())


def name_of(modules: Sequence[str]) -> str:
    """One name for the modules of a group of sites, and how many sites there are if more than one.

    ``model.layers.{0..31}.self_attn (32 sites)`` where nothing but numbers differs and none is missing; else
    ``first ... last``.
    """
    paths = list(dict.fromkeys(modules))
    parts = [path.split(".") for path in paths]
    name = paths[0] or "(root)"
    if len(paths) > 1:
        name = (_pattern(parts) if len({*map(len, parts)}) == 1 else "") or f"{name} ... {paths[-1] or '(root)'}"
    return name if len(modules) == 1 else f"{name} ({len(modules)} sites)"


def _pattern(paths: list[list[str]]) -> str:
    """What paths of one length have in common, ``""`` where it would also name others or words differ."""
    columns = [list(dict.fromkeys(column)) for column in zip(*paths, strict=True)]
    words_differ = any(len(x) > 1 and not all(map(str.isdecimal, x)) for x in columns)
    if words_differ or math.prod(map(len, columns)) != len(paths):
        return ""
    return ".".join(x[0] if len(x) == 1 else "{" + _ranges(sorted(map(int, x))) + "}" for x in columns)


def _ranges(numbers: list[int]) -> str:
    """``0..3,5`` for 0, 1, 2, 3 and 5."""
    runs = [numbers[:1]]
    for number in numbers[1:]:
        if number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
