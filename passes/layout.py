"""Where sequences, heads and queries are in scores, and how to put them into ``[B, H, Lq, Lk]``.

Scores are ``[*rows, Lk]``, and what their rows are depends on how attention was written: ``[B, H, Lq]``,
``[B * H, Lq]``, ``[images, windows, H, Lq]``. Rows that share their keys may be heads of a group or queries alike:
``[B, G, H_kv, Lq]``, ``[B, H * Lq]``, ``[B, Lq, H]``. A :class:`Layout` says it, and moves tensors by it. Nothing is
guessed: whatever it says of rows that share their keys computes the same, and a mask is proven for one or for none.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..core.spec import Mask, known_equal
from .mask import MaskPart, Padding, apart, lengths_in, prove_all
from .nodes import same_sizes
from .normalize import number
from .site import Emit, Operand, Refused, Scope
from .symbolic import COORDINATES, digits, is_one, size_expr

_B, _H, _Q, _K = COORDINATES
_FEWER = "sequences in one dimension"
_Size = Callable[[int, Any], Any]
"""The size of the part of this number, divided by what is given, when running."""


@dataclass(frozen=True)
class Layout:
    """What rows of scores are, outermost first: ``("b", sequences)``, then in some order ``("h", KV heads)``,
    ``("g", heads that share one)``, of which there may be several or none, and ``("q", queries)``."""

    parts: tuple[tuple[str, Any], ...]

    @cached_property
    def sizes(self) -> list[Any]:
        return [size for _, size in self.parts]

    @cached_property
    def four(self) -> tuple[Any, Any, Any]:
        """``(B, H, Lq)``."""
        return self._product("b"), self._product("hg"), self._product("q")

    @property
    def grouped(self) -> bool:
        """Whether heads are known to share keys."""
        return any(what == "g" for what, _ in self.parts)

    @property
    def known(self) -> Layout:
        """This layout, or one that says the same without masks and whose number of heads is known when compiling."""
        return self if isinstance(self.four[1], int) else next(self.others(()), self)

    def places(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        """Where the dimensions ``rows`` of scores are, as expressions in b, h and q."""
        B, H, Lq = self.four
        plain = {3: ((B, H, Lq), (_B, _H, _Q)), 2: ((B, Lq), (_B, _Q)), 1: ((Lq,), (_Q,))}.get(len(rows), ((), ()))
        if self._in_order and same_sizes(rows, plain[0]):
            return plain[1]
        heads = [i for i in self._order if self.parts[i][0] in "hg" and not is_one(self.sizes[i])]
        at: dict[int, Any] = dict(zip(heads, digits(_H, [self.sizes[i] for i in heads]), strict=True))
        at |= {i: {"b": _B, "q": _Q}[what] for i, (what, _) in enumerate(self.parts) if what in "bq"}
        found: list[Any] = [sympy.S.Zero] * len(rows)
        found[0] = _B if is_one(B) and is_one(rows[0]) else found[0]
        for parts, dims in _runs(self.sizes, rows):
            flat, sizes = sympy.S.Zero, [rows[j] for j in dims]
            for i in parts:
                flat = flat * size_expr(self.sizes[i]) + at[i]
            if len(parts) > 1:
                _inferable([self.sizes[i] for i in parts])
            if len(dims) > 1:
                _inferable(sizes, len(parts) == 1)
                _inferable(sizes[1:], 0)
            for j, place in zip(dims, (flat,) if len(dims) == 1 else digits(flat, sizes), strict=True):
                found[j] = place
        return tuple(found)

    def queries(self, x: Operand) -> Operand:
        """``[*rows, D]`` as ``[B, H, Lq, D]``."""
        if not known_equal(math.prod(x.shape[:-1]), math.prod(self.sizes)):
            raise Refused(f"its query is of {tuple(x.shape[:-1])}, and its scores have {self.four[1]} heads")
        return self._moved(x, x.shape[:-1])

    def keys(self, x: Operand, rows: Sequence[Any]) -> Operand:
        """Keys or values ``[..., Lk, D]`` of scores with these ``rows`` as ``[B, H_kv, Lk, D]``."""
        shared, lead = self._shared(rows), list(rows[:-1])
        if len(lead) == 2 and shared in ([], [1]):
            return x
        for j in reversed(shared):
            if not is_one(x.shape[j]):
                raise self._other(x, rows)
            x = x.then(torch.squeeze, j)
            del lead[j]
        heads = self._product("h")
        if lead and known_equal(lead[-1], heads) and len(lead) > 1:
            lead[-1] = heads = x.shape[len(lead) - 1]  # or fewer, of which each serves several
        if not known_equal(math.prod(x.shape[: len(lead)]), self.four[0] * heads):
            raise self._other(x, rows)
        return _regrouped(x, lead, (self.four[0], heads))

    def term(self, x: Operand, rows: Sequence[Any], size: _Size | None = None) -> Operand:
        """``x``, which broadcasts to ``[*rows, n]``, so that it broadcasts to ``[B, H, Lq, n]``; ``size`` for what has
        to be repeated and is not known when compiling."""
        rank = len(x.shape)
        last = rank == 2 and same_sizes(rows[-1:], self.four[2:])
        if rank < 2 or (self._in_order and (last or same_sizes(rows, self.four))):  # it broadcasts as it is
            return x
        for _ in range(len(rows) + 1 - rank):
            x = x.then(torch.unsqueeze, 0)
        return self._moved(x, rows, size)

    def mask(self, node: Node, rows: Sequence[Any], query: Node, emit: Emit) -> Node:
        """What broadcasts to ``[*rows, Lk]``, so that it broadcasts to ``[B, H, Lq, Lk]``, and has two dimensions at
        least. ``query`` is ``[B, H, Lq, D]``."""

        def size(part: int, rest: Any) -> Any:
            whole = emit(torch.Tensor.size, query, {"b": 0, "q": 2}.get(self.parts[part][0], 1))
            return emit(operator.floordiv, whole, rest) if rest != 1 else whole

        x = Operand(node)
        if len(x.shape) < 2:
            return emit(torch.reshape, node, (1, -1))  # no SDPA takes it as it is
        return self.term(x, rows, size).emit(emit)

    def back(self, x: Operand, rows: Sequence[Any]) -> Operand:
        """``[B, H, Lq, D]`` as ``[*rows, D]``."""
        x = _regrouped(x, self.four, [self.sizes[i] for i in self._order])
        if not self._in_order:
            inverse = [self._order.index(i) for i in range(len(self.parts))]
            x = x.then(torch.permute, (*inverse, len(self.parts)))
        return _regrouped(x, self.sizes, rows)

    def others(self, lengths: Iterable[Any]) -> Iterator[Layout]:
        """What rows that share their keys may be as well: of the dimensions that are there, or of ``lengths``, which
        are numbers of queries or of heads beside each other."""
        at = next(i for i, (what, _) in enumerate(self.parts) if what == "q")
        rows = self.sizes[at]
        found = []
        for i, (what, size) in enumerate(self.parts):
            if what == "g":
                changed = {i: [("q", size)], at: [("g", rows)]}
                found.append([x for j, part in enumerate(self.parts) for x in changed.get(j, [part])])
        for length in dict.fromkeys(x if isinstance(x, sympy.Expr) else size_expr(x) for x in lengths):
            heads = sympy.cancel(size_expr(rows) / length)
            if heads.is_Integer and heads > 1:
                found.append([*self.parts[:at], ("g", int(heads)), ("q", rows // int(heads)), *self.parts[at + 1 :]])
            if length.is_Integer and length > 1 and heads.is_integer and heads != 1:
                found.append([*self.parts[:at], ("q", rows // int(length)), ("g", int(length)), *self.parts[at + 1 :]])
        layouts = (Layout(tuple((what, number(size)) for what, size in parts)) for parts in found)
        yield from (x for x in layouts if isinstance(x.four[1], int))

    def _moved(self, x: Operand, rows: Sequence[Any], size: _Size | None = None) -> Operand:
        x = _regrouped(x, rows, self.sizes, size)
        if not self._in_order:
            x = x.then(torch.permute, (*self._order, len(self.parts)))
        return _regrouped(x, [self.sizes[i] for i in self._order], self.four)

    @cached_property
    def _order(self) -> list[int]:
        """The parts as they come in ``[B, H, Lq]``; heads that share a KV head stand beside each other."""
        return sorted(range(len(self.parts)), key=lambda i: "bhgq".index(self.parts[i][0]))

    @property
    def _in_order(self) -> bool:
        return self._order == list(range(len(self.parts)))

    def _product(self, whats: str) -> Any:
        return number(math.prod(size for what, size in self.parts if what in whats))

    def _shared(self, rows: Sequence[Any]) -> list[int]:
        """The dimensions before the last of ``rows`` for which keys have one entry."""
        found = []
        for parts, dims in _runs(self.sizes, rows):
            shares = {self.parts[i][0] in "gq" for i in parts}
            if len(shares) > 1 and dims[-1] < len(rows) - 1:
                raise Refused(f"its scores are {tuple(rows)}, whose heads and queries share a dimension")
            found += [j for j in dims if shares == {True} and j < len(rows) - 1]
        return found

    def _other(self, x: Operand, rows: Sequence[Any]) -> Refused:
        return Refused(
            f"its scores are of {tuple(rows[:-1])} and its keys or values of {tuple(x.shape[:-2])}: what comes before "
            "the heads is not the same",
            _FEWER,
        )


def layout_of(shapes: Sequence[torch.Size], key: torch.Size) -> Layout:
    """What the rows of scores are that have these ``shapes`` on their way, of queries and a ``key`` ``[.., Lk, D]``."""
    *lead, length = (number(size) for size in shapes[0][:-1])
    if len(lead) < 2:
        whole = (x[:2] for x in shapes if len(x) == 4 and known_equal(x[2], length))
        B, H = map(number, next(whole, (*lead, 1, 1)[:2]))
        return Layout((("b", B), ("h", H), ("q", length)))
    shared = [i for i, (ours, its) in enumerate(zip(lead, key[:-2], strict=True)) if is_one(its) and not is_one(ours)]
    what = ["g" if i in shared else "h" for i in range(len(lead))]
    first = shared[0] if shared and shared[0] > 0 else len(lead) - 1
    heads = zip(what[first:], lead[first:], strict=True)
    return Layout((("b", math.prod(lead[:first])), *heads, ("q", length)))


def prove_rows(
    parts: Callable[[Layout], Sequence[MaskPart]],
    layout: Layout,
    Lk: Any,
    scope: Scope,
    reader: Node,
    lengths: Iterable[Any] = (),
    as_in_sdpa: bool = False,
) -> tuple[Layout, Mask, Padding | None]:
    """What masks allow that ``reader`` is given, and the layout that it is proven for: ``layout``, or else another one
    of its :meth:`Layout.others`.

    parts: the masks, where rows are as a layout says. lengths: of queries or of heads beside each other that scores
    are taken apart into on their way.
    """

    def proven(layout: Layout) -> tuple[Mask, Padding | None]:
        made, sizes = parts(layout), (*layout.four, Lk)
        mask, padding = prove_all(made, sizes, scope, reader, as_in_sdpa=as_in_sdpa)
        return (mask, padding) if mask.unknown is None else apart(made, sizes, scope, reader) or (mask, padding)

    layout = layout.known
    first = proven(layout)
    if first[0].unknown is None:
        return layout, *first
    for other in layout.others([*lengths, Lk, *lengths_in(parts(layout), (*layout.four, Lk), scope, reader)]):
        try:
            mask, padding = proven(other)
        except Refused:  # it has no expression for where something is
            continue
        if mask.unknown is None:
            return other, mask, padding
    return layout, *first


def _runs(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of ``a`` and of ``b`` that hold the same in row-major order, in the smallest runs; those of size
    one in none."""
    left, right = ([i for i, size in enumerate(sizes) if not is_one(size)] for sizes in (a, b))
    found: list[tuple[list[int], list[int]]] = []
    while left and right:
        counts = sorted(itertools.product(range(1, len(left) + 1), range(1, len(right) + 1)), key=sum)
        same = (
            (m, n) for m, n in counts
            if known_equal(math.prod(a[i] for i in left[-m:]), math.prod(b[j] for j in right[-n:]))
        )  # fmt: skip
        m, n = next(same, (len(left), len(right)))
        found.insert(0, (left[-m:], right[-n:]))
        del left[-m:], right[-n:]
    if left or right:
        raise Refused(f"its scores are {tuple(a)} and {tuple(b)}")
    return found


def _inferable(sizes: Sequence[Any], unknown: int = 1) -> list[int]:
    """``sizes`` with -1 for one that is not known when compiling."""
    found = [size if isinstance(size, int) else -1 for size in map(number, sizes)]
    if found.count(-1) > unknown or (-1 in found and 0 in found):
        raise Refused(f"its dimensions {tuple(sizes)} before the keys are not known when compiling", _FEWER)
    return found


def _regrouped(x: Operand, a: Sequence[Any], b: Sequence[Any], size: _Size | None = None) -> Operand:
    """``x`` ``[*a, ...]``, or what broadcasts to that, as ``[*b, ...]``."""
    if same_sizes(a, b):
        return x
    runs = _runs(a, b)
    for i in reversed([i for i, n in enumerate(a) if is_one(n)]):
        x = x.then(torch.squeeze, i)
    stop = sum(len(dims) for dims, _ in runs)
    for dims, parts in reversed(runs):
        stop, start = stop - len(dims), stop - len(dims)
        alone = [is_one(x.shape[start + i]) for i in range(len(dims))]
        if all(alone):
            x = _of_ones(x, start, len(dims), len(parts))
            continue
        if any(alone):
            x = x.then(torch.Tensor.expand, *_wanted(x, start, alone, [a[i] for i in dims], parts, size))
        if len(dims) > 1:
            x = x.then(torch.flatten, start, start + len(dims) - 1)
        if len(parts) > 1:
            x = x.then(torch.unflatten, start, tuple(_inferable([b[j] for j in parts])))
    for j in (j for j, n in enumerate(b) if is_one(n)):
        x = x.then(torch.unsqueeze, j)
    return x


def _of_ones(x: Operand, start: int, have: int, want: int) -> Operand:
    """``want`` dimensions of size one in the place of as many as there are."""
    if have > want:
        return x.then(torch.flatten, start, start + have - want)
    for _ in range(want - have):
        x = x.then(torch.unsqueeze, start)
    return x


def _wanted(
    x: Operand, start: int, alone: Sequence[bool], sizes: Sequence[Any], parts: Sequence[int], size: _Size | None
) -> list[Any]:
    """What :meth:`torch.Tensor.expand` is told to repeat the dimensions that are ``alone`` to ``sizes``."""
    wanted: list[Any] = [-1] * len(x.shape)
    for i, one in enumerate(alone):
        if not one:
            continue
        n = number(sizes[i])
        if not isinstance(n, int):
            rest = math.prod(number(other) for j, other in enumerate(sizes) if j != i)
            if size is None or len(parts) > 1 or not isinstance(rest, int):
                raise Refused(f"its dimensions {tuple(sizes)} before the keys are not known when compiling", _FEWER)
            n = size(parts[0], rest)
        wanted[start + i] = n
    return wanted
