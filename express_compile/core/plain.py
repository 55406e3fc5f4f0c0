"""Plain data: None, bool, int, float, str, and sequences and mappings of them. A leaf."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

INT_BITS = 63  # what an op takes is below 2**63


def number(name: str, value: Any, *types: type, others: tuple[str, ...] = ()) -> Any:
    """``value`` as a Python number of one of ``types`` (int, float); numpy's scalars are numbers, bools are not.

    Raises ``TypeError``, which also lists ``others``, what else is allowed; ``ValueError`` for an integer that no op
    takes.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, bool) or not isinstance(plain, types):
        allowed = " or ".join([*(t.__name__ for t in types), *others])
        raise TypeError(f"{name}={value!r}: must be of type {allowed}, not {type(value).__name__}")
    if isinstance(plain, int) and plain.bit_length() > INT_BITS:
        raise ValueError(f"{name}={plain}: must be below 2**{INT_BITS}")
    return plain


def shown(value: Any) -> str:
    """``repr``, but no more than the first 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def renamed(where: str, error: Exception) -> TypeError | ValueError:
    """The same error, which also says where; one without the arguments that subclasses need."""
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}")


@contextmanager
def about(where: str) -> Iterator[None]:
    """What is raised inside for a bad value also says where it is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise renamed(where, error) from None


def canonical(value: Any) -> Any:
    """``value`` in the one form in which equal data are equal: tuples for lists, dicts for mappings, one NaN, Python's
    numbers for numpy's. Raises ``ValueError`` for what is nested too deeply."""
    try:
        return _canonical(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(_canonical, value))
    value = value.item() if isinstance(value, np.generic) else value
    # containers compare their items by identity first, so that this NaN, and no other, equals itself
    return math.nan if isinstance(value, float) and math.isnan(value) else value


def from_json(name: str, text: Any, make: Callable[[Any], T]) -> T:
    """``make`` of the data in a JSON text.

    Raises ``TypeError`` or ``ValueError``, which names what the text should be, for what is no JSON or is nested too
    deeply; what ``make`` raises besides is passed on.
    """
    if not isinstance(text, (str, bytes, bytearray)):
        raise TypeError(f"{name}: must be the text of a JSON object, not {type(text).__name__}")
    try:
        try:
            data = json.loads(text)
        except ValueError as error:  # bad JSON, bad bytes, or a number of too many digits
            raise ValueError(f"{name}: must be JSON, but: {error}") from None
        return make(data)
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply") from None


def entries(kind: type, data: Any, where: str = "", some: bool = False, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """``data``, if it is an object of the fields of a dataclass, ``but`` these, or of ``some`` of them.

    Raises ``TypeError``, which begins with ``where``, says what it is, and what is allowed.
    """
    names = sorted({f.name for f in fields(kind)} - set(but))
    if isinstance(data, Mapping) and (set(data) <= set(names) if some else set(data) == set(names)):
        return dict(data)
    found = (", ".join(map(str, data)) or "{}") if isinstance(data, Mapping) else repr(data)
    raise TypeError(f"{where}{found}; must be an object of {', '.join(names)}")


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in one step: who reads it meanwhile finds the old one or the new one. Raises ``OSError``."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a pipe or a terminal; a folder raises
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def try_to_write(path: Path) -> None:
    """Raise ``OSError`` unless a file can be written there, and leave everything as it is."""
    if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe would wait for its reader
        return
    new = not path.exists()
    with path.open("ab"):
        pass
    if new:
        path.unlink()


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
