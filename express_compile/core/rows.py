"""Which rows a head sees: the sources that every causal method of this project selects from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

from .plain import about, entries, number


@dataclass(frozen=True)
class Rows:
    """What the queries of one head attend to, all of a KV head or of one of its query heads. A row that two sources
    hold counts once, exact beats thinned.

    sinks: the first tokens. recent: the last tokens. thinned: s of a coreset of fewer than 6 s rows, each standing for
    2**m tokens; 0, or a power of two. protected: places for the most distinctive rows, held wherever they are.
    selected: blocks of 64 keys that are chosen by the query. everything: all tokens, beside which there is no other
    source.

    Raises ``TypeError`` or ``ValueError`` that name the source, its value and what is allowed.
    """

    sinks: int = 0
    recent: int = 0
    thinned: int = 0
    protected: int = 0
    selected: int = 0
    everything: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.everything, bool):
            raise TypeError(f"everything={self.everything!r}: must be True or False")
        for f in fields(self)[:-1]:
            value = number(f.name, getattr(self, f.name), int)
            object.__setattr__(self, f.name, value)
            if value < 0:
                raise ValueError(f"{f.name}={value!r}: must be a number of rows, 0 or more")
            if value and self.everything:
                raise ValueError(f"{f.name}={value!r}: must be 0 beside everything=True")
        if self.thinned & (self.thinned - 1):
            raise ValueError(f"thinned={self.thinned!r}: must be 0 or a power of two")

    def __str__(self) -> str:
        if self.everything:
            return "everything"
        parts = [f"{value} {name}" for name, value in asdict(self).items() if value]
        return " + ".join(part + " blocks" * part.endswith("selected") for part in parts) or "nothing"

    def to_data(self) -> dict[str, Any]:
        """The sources that there are, for JSON."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_data(cls, data: Any) -> Rows:
        """The inverse of :meth:`to_data`."""
        return cls(**entries(cls, data, "rows: ", some=True))


def to_numbers(rows: Iterable[Rows]) -> list[int]:
    """The fields of :class:`Rows` in order, those of every head behind each other: what an op takes."""
    return [int(getattr(x, f.name)) for x in rows for f in fields(Rows)]


def from_numbers(numbers: Sequence[int]) -> tuple[Rows, ...]:
    """The inverse of :func:`to_numbers`. Raises ``ValueError`` for numbers that are none of whole heads."""
    names = [f.name for f in fields(Rows)]
    if not numbers or len(numbers) % len(names):
        raise ValueError(f"rows: {len(numbers)} numbers; must be {len(names)} for every head: {', '.join(names)}")
    parts = (numbers[i : i + len(names)] for i in range(0, len(numbers), len(names)))
    return tuple(Rows.from_data(dict(zip(names, (*part[:-1], bool(part[-1])), strict=True))) for part in parts)


def heads(given: Any) -> tuple[Rows, ...]:
    """Rows of every head from a sequence of them or of their data; errors name the head."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"rows={given!r}: must be a list with an entry for every KV head or query head")
    found = []
    for i, x in enumerate(given):
        with about(f"rows[{i}]"):
            found.append(x if isinstance(x, Rows) else Rows.from_data(x))
    return tuple(found)


def describe(rows: Iterable[Rows]) -> str:
    """What the heads see, in words: equal neighbours once."""
    groups = [(str(x), len(list(same))) for x, same in groupby(rows)]
    if len(groups) == 1:
        return groups[0][0]
    return ", ".join(f"{n} head{'s' * (n > 1)}: {words}" for words, n in groups)
