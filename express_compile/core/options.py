"""What a method can be told: one frozen dataclass of options per method, the only place that knows them.

A field made by :func:`option` has its default, its check, the arguments of the op that it becomes and the sentence of
the docs. Checks, op schema, packing, plain data and the docs' table all follow from the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .plain import number

Check = Callable[[str, Any], Any]
"""Takes the name and the value of an option; returns the value in its one form, or raises ``TypeError`` or
``ValueError`` that names both and what is allowed."""

TABLE_AT = tuple(1 << k for k in range(4, 22))
"""The numbers of keys at which a function of them is read for a table."""


def rows_at(table: Sequence[int], Lk: int) -> int:
    """The entry of a table for ``Lk`` keys: that of the largest number of :data:`TABLE_AT` that is not above."""
    return table[min(max(Lk.bit_length() - 5, 0), len(table) - 1)]


@dataclass(frozen=True)
class Kind:
    """What values an option has. words: its type in the docs; schema: that of the op's argument."""

    words: str
    schema: str
    check: Check


def option(
    default: Any,
    sentence: str,
    kind: Kind,
    *,
    schema: str | None = None,
    pack: Callable[[Any], Mapping[str, Any]] | None = None,
    shared: str = "",
) -> Any:
    """A field of :class:`Options`.

    sentence: what it means, for the docs. schema, pack: the op's arguments that it becomes, and their values; the
    value itself under the option's name unless given. shared: the name under which ``Policy`` takes it for all methods
    at once, if it does.
    """
    return field(default=default, metadata=dict(sentence=sentence, kind=kind, schema=schema, pack=pack, shared=shared))


@dataclass(frozen=True)
class Options:
    """Options of a method; its own are the fields of a subclass. This one is for methods without any.

    Raises ``TypeError`` or ``ValueError`` that name the option, its value and what is allowed.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, f.metadata["kind"].check(f.name, getattr(self, f.name)))
        self.check()

    def check(self) -> None:
        """Raise for values that do not fit together; each alone is good already."""

    @classmethod
    def by_layer(cls, given: Mapping[str, Any]) -> bool:
        """Whether sites that compute the same may get other parameters, by their place in the model."""
        return False

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> Mapping[str, str]:
        """The module paths that the given options speak of, each as it is to be shown."""
        return {}

    @classmethod
    def at_module(cls, given: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """What the given options say to the sites of one module, where :meth:`named` options speak of many."""
        return given

    @classmethod
    def of_rows(cls, rows: Sequence[Any]) -> Mapping[str, Any]:
        """The options that say what ``Rows`` every KV head sees; none where other options say that."""
        return {}

    def pack(self) -> dict[str, Any]:
        """The op's arguments that these options are."""
        packed: dict[str, Any] = {}
        for f in fields(self):
            pack, value = f.metadata["pack"], getattr(self, f.name)
            packed |= {f.name: value} if pack is None else pack(value)
        return packed

    def data(self) -> dict[str, Any]:
        """All options by name; ``type(self)(**data)`` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def schema(cls) -> str:
        """The op's arguments for these options, as torch.library writes them."""
        return ", ".join(f.metadata["schema"] or f"{f.metadata['kind'].schema} {f.name}" for f in fields(cls))

    @classmethod
    def for_all(cls) -> dict[str, str]:
        """The names under which a policy gives some of these options to all methods at once -> their own names."""
        return {f.metadata["shared"]: f.name for f in fields(cls) if f.metadata["shared"]}

    @classmethod
    def check_of(cls, name: str) -> Check:
        """The check of one option."""
        kind: Kind = cls.__dataclass_fields__[name].metadata["kind"]
        return kind.check

    @classmethod
    def table(cls) -> list[tuple[str, str, str, str]]:
        """Name, type, default and sentence of every option."""
        return [(f.name, f.metadata["kind"].words, repr(f.default), f.metadata["sentence"]) for f in fields(cls)]

    @classmethod
    def markdown(cls) -> str:
        """:meth:`table` for the docs."""
        rows = [("option", "values", "default", "meaning"), ("---",) * 4]
        rows += [(f"`{name}`", words, f"`{default}`", text) for name, words, default, text in cls.table()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ------------------------------------------------------------------------------------------------------------- kinds


def _rows(name: str, value: Any) -> int:
    value = number(name, value, int)
    if value < 0:
        raise ValueError(f"{name}={value!r}: must be a number of rows, 0 or more")
    return int(value)


def whole(name: str, value: Any) -> int | None:
    """``None``, or an integer that is not negative."""
    if value is None:
        return None
    value = number(name, value, int, others=("None",))
    if value < 0:
        raise ValueError(f"{name}={value!r}: must be None or an integer, 0 or more")
    return int(value)


def _number(name: str, value: Any) -> float:
    return float(number(name, value, int, float))


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")
    return value


def budget(name: str, value: Any, least: int = 4) -> Any:
    """Rows, a fraction of the keys, a table of rows, or a function of the number of keys; see ``Policy.budget``."""
    if callable(value):
        return value
    if isinstance(value, (list, tuple)):
        return _table(name, value)
    value = number(name, value, int, float, others=("a function of the number of keys", "a sequence of rows"))
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError(
            f"{name}={value!r}: a float is a fraction of the keys and must be in (0, 1]; give an int for a number of "
            "rows"
        )
    if isinstance(value, int) and value < least:
        raise ValueError(f"{name}={value!r}: must be at least {least} rows")
    return value


def _table(name: str, value: Sequence[Any]) -> tuple[int, ...]:
    words = f"{name}={tuple(value)!r}: must be rows for 16, 32, 64, ... keys, integers of at least 4"
    try:
        table = tuple(number(name, rows, int) for rows in value)
    except TypeError:
        raise ValueError(words) from None
    if not table or min(table) < 4:
        raise ValueError(words)
    return table


def table_of(name: str, function: Callable[[int], Any]) -> tuple[int, ...]:
    """A function of the number of keys as a table. Raises ``ValueError`` unless it gives rows."""

    def ask(Lk: int) -> int:
        rows = function(Lk)
        try:
            plain = number("rows", rows, int)
        except (TypeError, ValueError):
            plain = -1
        if plain < 0:
            raise ValueError(f"{name}({Lk}) returned {rows!r}: must be a number of rows, an int below 2**63")
        return max(4, int(plain))

    return tuple(map(ask, TABLE_AT))


def one_of(*allowed: str) -> Kind:
    """One of some words."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        return value

    return Kind(", ".join(f"`{x}`" for x in allowed), "str", check)


ROWS = Kind("rows", "int", _rows)
WHOLE = Kind("an integer, or None", "int", whole)
NUMBER = Kind("a number", "float", _number)
FLAG = Kind("True or False", "bool", flag)
BUDGET = Kind("rows, a fraction, a table or a function of the number of keys", "int", budget)
