"""Prove what a mask lets a query see, or say why it cannot be proven.

The mask is evaluated at symbolic coordinates ``(b, h, q, k)`` (``symbolic.py``). The boolean result is a
conjunction; each of its literals is causal (``k <= q + c``), a window (``q - k <= d``), a condition on the key
alone (key padding), that query and key are of one segment (``segment[b, q] == segment[b, k]``: packed sequences), true
everywhere, or else the whole mask is unknown. What sympy cannot decide from the sizes' own assumptions is not proven.

Where segments begin wherever positions do not go on (``cumsum(diff(position) != 1)``, as transformers finds them),
positions of one segment differ as their places do, so that ``position[b, k] <= position[b, q]`` is ``k <= q``. This
takes for granted that no segment has positions at the limits of its integers, where they would wrap round.

Rows whose keys are all masked: this package's ops give 0 there, as PyTorch does for boolean masks and for ``-inf``;
for ``finfo.min`` PyTorch gives the mean over all values, so those rows (an unpadded batch has none) differ.
A key padding is taken for what its name says: in self-attention the rows of padded tokens are nobody's, and the
ops give 0 there too, where PyTorch lets them attend to the real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..core.spec import Mask, known_equal
from .nodes import tensor_of
from .normalize import number, operation
from .symbolic import (
    COORDINATES,
    RELATIONS,
    Evaluator,
    Surroundings,
    Unproven,
    example_of,
    formula,
    is_one,
    provable,
    size_expr,
)

_B, _H, _Q, _K = COORDINATES


@dataclass(frozen=True)
class PaddingTerm:
    """``node[index] relation constant``: a condition on a key, ``[B or 1, Lk]`` after restoring a lost dimension.

    index: one entry per dimension of ``node``, an int or ``slice(None)``.
    has_batch: whether the batch dimension is among the kept ones (the key dimension always is).
    relation: one of ``"eq ne lt le gt ge"``.

    The model reads the places ``arange(B)`` and ``arange(Lk)`` of the kept dimensions, which may be longer; where they
    are shorter that read raises ``IndexError``, and so has this one to.
    """

    node: Node
    index: tuple[Any, ...]
    has_batch: bool
    relation: str
    constant: int | float


@dataclass(frozen=True)
class Padding:
    """How to get the key padding ``[B, Lk]`` (bool, True = visible): the conjunction of ``terms`` and ``last_row``.

    Where the terms of a mask cannot be read in the site's own graph, ``last_row`` is the mask itself, whose last
    query row, at ``last_index``, sees exactly the keys that are not padding.
    ``flags``: inputs that have to hold 0 and 1 only.
    """

    terms: tuple[PaddingTerm, ...] = ()
    last_row: Node | None = None
    last_index: tuple[Any, ...] = ()
    flags: frozenset[Node] = frozenset()


def prove(
    mask: Node,
    sizes: tuple[Any, Any, Any, Any],
    around: Surroundings,
    reader: Node,
    *,
    coords: tuple[Any, ...] | None = None,
    hides: bool = False,
) -> tuple[Mask, Padding | None]:
    """What ``mask``, the ``attn_mask`` that ``reader``, a site with ``sizes`` ``(B, H, Lq, Lk)``, is given, allows.

    The mask broadcasts to ``sizes``, or has for every dimension an entry of ``coords``, an expression in
    :data:`COORDINATES`. A boolean mask shows where it is True, or ``hides`` there.
    Returns the proven :class:`Mask` and, if it has a key padding, where to find it; an unproven mask has
    ``Mask.unknown`` set. Never raises for a mask it does not understand.
    """
    shape = sizes if coords is None else example_of(mask).shape
    part = MaskPart(mask, coords or COORDINATES, tuple(shape), hides)
    as_in_sdpa = coords is None and not (hides and example_of(mask).dtype == torch.bool)
    return prove_all([part], sizes, around, reader, as_in_sdpa=as_in_sdpa)


@dataclass(frozen=True)
class MaskPart:
    """One of several masks that together hide scores: ``node`` broadcasts to a tensor of ``sizes``, whose dimensions
    are at ``coords``, expressions in :data:`COORDINATES`. A boolean one shows where it
    is True, or ``hides`` there; any other is added to scores, and so is a boolean one with a ``factor``, that many
    times."""

    node: Node
    coords: tuple[Any, ...]
    sizes: tuple[Any, ...]
    hides: bool = False
    factor: float | None = None


def prove_all(
    parts: Sequence[MaskPart],
    sizes: tuple[Any, Any, Any, Any],
    around: Surroundings,
    reader: Node,
    *,
    as_in_sdpa: bool = False,
) -> tuple[Mask, Padding | None]:
    """What all ``parts`` allow together; the other arguments and the result are those of :func:`prove`.

    ``as_in_sdpa``: there is one part, and it is an ``attn_mask`` as SDPA takes it.
    """
    try:
        return _proven(parts, sizes, around, reader, as_in_sdpa)
    except Unproven as error:
        why = error
    flags: set[Node] = set()
    try:
        proven, padding = _proven(parts, sizes, around, reader, as_in_sdpa, flags)
    except Unproven as error:
        return unknown(str(error if flags else why), (error if flags else why).nearest)
    if padding is None:
        return unknown(str(why), why.nearest)
    return proven, replace(padding, flags=frozenset(flags))


def _proven(
    parts: Sequence[MaskPart],
    sizes: tuple[Any, Any, Any, Any],
    around: Surroundings,
    reader: Node,
    as_in_sdpa: bool,
    flags: set[Node] | None = None,
) -> tuple[Mask, Padding | None]:
    """:func:`prove_all`, which raises :class:`Unproven`; ``flags`` as in :class:`Evaluator`."""
    evaluator = Evaluator(around, reader, sizes, flags)
    shown = [evaluator.visible(part.node, part.coords, part.sizes, part.hides, part.factor) for part in parts]
    last_index = _last_index(parts[0]) if as_in_sdpa else None
    asked = _Asked(evaluator, parts[0].node, sizes[0], size_expr(sizes[2]), size_expr(sizes[3]), last_index)
    proven = _classify(sympy.And(*shown), asked)
    out = tensor_of(reader)  # without gradients nobody asks for one of a parameter
    if (out is None or out.requires_grad) and any(example_of(part.node).requires_grad for part in parts):
        raise Unproven("it needs a gradient, and only exact attention has one for masks", "a mask that is detached")
    return proven


def lengths_in(
    parts: Sequence[MaskPart], sizes: tuple[Any, Any, Any, Any], around: Surroundings, reader: Node
) -> set[Any]:
    """The numbers that the places of queries are divided by in what ``parts`` allow."""
    evaluator = Evaluator(around, reader, sizes)
    try:
        shown = [evaluator.visible(part.node, part.coords, part.sizes, part.hides, part.factor) for part in parts]
    except Unproven:
        return set()
    steps = {x.args for condition in shown for x in condition.atoms(sympy.Mod) if x.has(_Q)}
    steps |= {sympy.fraction(x.args[0]) for condition in shown for x in condition.atoms(sympy.floor) if x.has(_Q)}
    return {step for _, step in steps if not step.has(*COORDINATES)}


_LAST = {_B: slice(None), _H: 0, _Q: -1, _K: slice(None)}


def _last_index(part: MaskPart) -> tuple[Any, ...] | None:
    """Where the last query row of the first head is in a mask; None where sequences are not one dimension of it."""
    coords = part.coords[len(part.coords) - example_of(part.node).dim() :]
    return tuple(_LAST[x] for x in coords) if all(x in _LAST for x in coords) else None


def unknown(why: str, nearest: str | None = None) -> tuple[Mask, None]:
    """What :func:`prove` returns of a mask that is not proven."""
    return Mask(unknown=why, nearest=nearest), None


def prove_key_padding(mask: Node, around: Surroundings, reader: Node) -> tuple[Mask, Padding | None]:
    """The key padding that ``mask`` ``[B, Lk]`` or ``[Lk]`` is, which hides a key by True or by minus infinity.

    A float mask that may hold anything else than that and 0 is unknown. The arguments and the result are those of
    :func:`prove`.
    """
    example = example_of(mask)
    if example.dtype != torch.bool:
        try:
            Evaluator(around, reader).visible(mask, (_B, _K)[-example.dim() :], example.shape)
        except Unproven as error:
            return unknown(f"of its key padding, {error}; a boolean one needs no proof", "a boolean mask")
    index = (slice(None),) * example.dim()
    return Mask(padding=True), Padding((PaddingTerm(mask, index, example.dim() == 2, "eq", 0),))


def same_for_all_queries(part: MaskPart, sizes: tuple[Any, Any, Any, Any]) -> tuple[Mask, Padding] | None:
    """A boolean mask without a query and a head dimension is a key padding, whatever its values are; else None."""
    shape, rank = example_of(part.node).shape, len(part.sizes)
    if example_of(part.node).dtype != torch.bool or len(shape) > rank or part.coords[0] != _B:
        return None
    between = shape[1 - rank : -1]
    if not known_equal(shape[-1], sizes[3]) or not all(known_equal(size, 1) for size in between):
        return None
    first = [] if len(shape) < rank else [0 if is_one(shape[0]) else slice(None)]
    index = (*first, *([0] * len(between)), slice(None))
    term = PaddingTerm(part.node, index, slice(None) in first, "eq", 0 if part.hides else 1)
    return Mask(padding=True), Padding(terms=(term,))


def apart(
    parts: Sequence[MaskPart], sizes: tuple[Any, Any, Any, Any], around: Surroundings, reader: Node
) -> tuple[Mask, Padding | None] | None:
    """What all ``parts`` allow together if one of them is a boolean mask that names no query, or if such ones among
    them compare keys with the length of their sequence, and the others are proven; else None."""
    if len(parts) == 1 and (whole := same_for_all_queries(parts[0], sizes)) is not None:
        return whole
    single = [x for part in parts for x in _conjuncts(part, around)]
    found = [(part, _of_length(part, sizes, around, reader)) for part in single]
    others = [part for part, keys in found if keys is None]
    if not others or len(others) == len(single):
        return None
    proven, padding = prove_all(others, sizes, around, reader)
    if proven.unknown is not None:
        return None
    terms = tuple(term for _, keys in found if keys is not None for term in keys.terms)
    rest = padding or Padding()
    return replace(proven, padding=True), replace(rest, terms=rest.terms + terms)


def _of_length(part: MaskPart, sizes: tuple[Any, Any, Any, Any], around: Surroundings, reader: Node) -> Padding | None:
    """The key padding that a mask is which shows the keys before a place, or from one on, of each sequence."""
    found = same_for_all_queries(part, sizes)
    if found is None or part.node.graph is not reader.graph or around.overwritten(part.node):
        return None
    try:
        shown = Evaluator(around, reader).visible(part.node, part.coords, part.sizes, part.hides)
    except Unproven:
        return None
    excess, leaves = _at_most_zero(shown), shown.atoms(AppliedUndef)
    if excess is None or len(leaves) != 1 or not {*leaves.pop().free_symbols} == {_B}:
        return None
    return found[1] if excess.coeff(_K) in (1, -1) else None


_JOINS = {False: ("bitwise_and", "logical_and"), True: ("bitwise_or", "logical_or")}


def _conjuncts(part: MaskPart, around: Surroundings) -> list[MaskPart]:
    """The masks that a boolean mask is made from, all of which have to show a key for it to do so."""
    op, example = operation(part.node), example_of(part.node)
    if op is None or example.dtype != torch.bool or part.factor is not None or around.overwritten(part.node):
        return [part]
    inner = [op.get(name) for name in ("input", "other") if name in op.args]
    if not all((x := tensor_of(node)) is not None and x.dtype == torch.bool for node in inner):
        return [part]
    if op.name in ("bitwise_not", "logical_not"):
        return _conjuncts(replace(part, node=inner[0], hides=not part.hides), around)
    if op.name not in _JOINS[part.hides]:
        return [part]
    return [x for node in inner for x in _conjuncts(replace(part, node=node), around)]


# ---- from a condition to a mask ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What a mask is asked for: ``B`` sequences of ``q_len`` queries and ``k_len`` keys, as expressions."""

    evaluator: Evaluator
    mask: Node
    B: Any
    q_len: Any
    k_len: Any
    last_index: tuple[Any, ...] | None

    @property
    def is_single(self) -> bool:
        """Whether there is one query."""
        return bool(self.q_len == 1)

    @property
    def bottom_right(self) -> Any:
        """The offset of a causal mask whose last query sees every key."""
        return self.k_len - self.q_len


def _classify(condition: Boolean, asked: _Asked) -> tuple[Mask, Padding | None]:
    condition, segments = _simplified(condition, asked)
    if condition is sympy.false:
        raise Unproven("it hides every key")
    found = _by_kind(condition, asked)
    proven = replace(_bounds(found["causal"], found["window"], asked), segments=segments)
    if not found["padding"]:
        return proven, None
    proven = replace(proven, padding=True)
    terms = [term for literal in found["padding"] if (term := _padding_term(literal, asked)) is not None]
    if len(terms) == len(found["padding"]):
        return proven, Padding(tuple(terms))
    plain = proven.window is None and not segments
    if asked.last_index is not None and plain and (not proven.causal or known_equal(proven.offset, asked.bottom_right)):
        return proven, Padding(last_row=asked.mask, last_index=asked.last_index)
    raise _unproven(sympy.And(*found["padding"]), asked, condition)


def _simplified(condition: Boolean, asked: _Asked) -> tuple[Boolean, bool]:
    """What is asked of a query and a key of one segment, and whether there are segments."""
    if asked.is_single:
        condition = condition.xreplace({_Q: sympy.S.Zero})
    condition = sympy.to_nnf(condition, simplify=False)
    segments = [leaf for literal in sympy.And.make_args(condition) if (leaf := _segment(literal)) is not None]
    for segment in segments:
        condition = _by_places(condition, segment, asked.evaluator)
    condition = _adjoined(condition)
    condition = condition.xreplace({literal: _bounded(literal) for literal in condition.atoms(Relational)})
    everywhere = {literal: _everywhere(literal, asked) for literal in condition.atoms(Relational)}
    decided = {literal: truth for literal, truth in everywhere.items() if truth is not None}
    return _absorbed(condition.xreplace(decided), asked), bool(segments)


_SLOPES = {(1, -1): "causal", (-1, 1): "window"}
"""What a relation ``a k + b q <= c`` bounds, by ``(a, b)``."""
_SLOPES_OF_ONE = {**_SLOPES, (1, 0): "causal", (-1, 0): "window"}
"""The same where there is one query."""


def _by_kind(condition: Boolean, asked: _Asked) -> dict[str, list[Any]]:
    """The bounds of causal masks and windows, and the literals of key paddings, by kind."""
    found: dict[str, list[Any]] = {"causal": [], "window": [], "padding": []}
    of_key = {_B, _K} | asked.k_len.free_symbols
    slopes = _SLOPES_OF_ONE if asked.is_single else _SLOPES
    for literal in sympy.And.make_args(condition):
        if literal is sympy.true or _segment(literal) is not None:
            continue
        slope, bound = _line(literal)
        if slope in slopes:
            found[slopes[slope]].append(bound)
        elif literal.free_symbols <= of_key:
            found["padding"].append(literal)
        else:
            raise _unproven(literal, asked, condition)
    return found


def _bounds(offsets: list[Any], reaches: list[Any], asked: _Asked) -> Mask:
    """The mask of ``k <= q + offset`` and ``q <= k + reach`` for all of them."""
    offset, reach = _aligned(_smallest(offsets, "causal"), asked), _smallest(reaches, "window")
    if offset is None and reach is None:  # a single query may see every key
        return Mask(causal=True, offset=_plain(asked.bottom_right)) if asked.is_single else Mask()
    if reach is None:
        return Mask(causal=True, offset=_plain(offset))
    if offset is None:
        raise Unproven(f"it hides keys more than {reach} tokens back, but none that come after the query")
    width = sympy.expand(reach + offset + 1)
    if not width.is_Integer or width < 1:
        raise Unproven(f"its window of {width} tokens is not a fixed positive number")
    if width > 1 and not asked.is_single and known_equal(offset - reach, 2 * asked.bottom_right):
        # as far before the query as after it
        return Mask(causal=False, offset=_plain(asked.bottom_right), window=(int(width) + 1) // 2)
    return Mask(causal=True, offset=_plain(offset), window=int(width))


def _aligned(offset: Any, asked: _Asked) -> Any:
    """A causal offset that is that of the bottom right in the mask's own sizes, in those that are asked for."""
    if offset is None or known_equal(offset, asked.bottom_right):
        return offset
    # the mask may spell the lengths with other symbols than key does; SDPA forces them to agree
    shape = example_of(asked.mask).shape
    if len(shape) < 2 or not known_equal(offset, size_expr(shape[-1]) - size_expr(shape[-2])):
        return offset
    broadcast = is_one(shape[-1]) or (is_one(shape[-2]) and not asked.is_single)
    return offset if broadcast else asked.bottom_right


def _plain(offset: Any) -> Any:
    return int(offset) if offset.is_Integer else offset


def _unproven(literal: Any, asked: _Asked, condition: Boolean) -> Unproven:
    text = formula(literal, asked.evaluator)
    if literal.atoms(AppliedUndef):
        return Unproven(
            f"it depends on values that are not known when compiling: {text}", provable(condition, asked.evaluator)
        )
    return Unproven(f"a query sees a key only where {text}, which is no causal mask, window, key padding or segment")


def _line(literal: Boolean) -> tuple[tuple[Any, Any] | None, Any]:
    """``((a, b), c)`` of a relation ``a k + b q <= c``; (None, None) for another one."""
    excess = _at_most_zero(literal)
    if excess is None or excess.atoms(AppliedUndef):
        return None, None
    slope = (excess.coeff(_K), excess.coeff(_Q))
    rest = sympy.expand(excess - slope[0] * _K - slope[1] * _Q)
    if rest.has(*COORDINATES):
        return None, None
    factor = sympy.gcd(*slope)
    if factor > 1 and rest.is_Integer:  # 2 k - 2 q + 1 <= 0 is k - q <= floor(-1 / 2)
        slope, rest = (slope[0] / factor, slope[1] / factor), -(-rest // factor)
    return slope, -rest


_EXCESS: dict[type[Relational], Callable[[Any, Any], Any]] = {
    sympy.Le: lambda a, b: a - b,
    sympy.Lt: lambda a, b: a - b + 1,
    sympy.Ge: lambda a, b: b - a,
    sympy.Gt: lambda a, b: b - a + 1,
}


def _at_most_zero(literal: Boolean) -> sympy.Expr | None:
    """``e`` with ``literal`` equivalent to ``e <= 0`` over the integers; None for other conditions."""
    if type(literal) not in _EXCESS or not (literal.lhs.is_integer and literal.rhs.is_integer):
        return None
    return sympy.expand(_EXCESS[type(literal)](literal.lhs, literal.rhs))


def _adjoined(condition: Boolean) -> Boolean:
    """``x <= -1 or x == 0`` as ``x <= 0``, ``x <= 0 and x != 0`` as ``x <= -1``, and neither where one implies the
    other."""
    if not isinstance(condition, sympy.And | sympy.Or):
        return condition
    parts, any_of = [_adjoined(part) for part in condition.args], isinstance(condition, sympy.Or)
    for point in [part for part in parts if isinstance(part, sympy.Eq | sympy.Ne)]:
        for part in parts:
            excess, start = _at_most_zero(part), _at_point(part, point)
            if excess is None or start is None or point not in parts:
                continue
            holds = start <= 0  # at the point
            if isinstance(point, sympy.Eq) != any_of:  # elsewhere the point decides
                both = [sympy.S(any_of)] if holds == any_of else [point]
            elif start == (1 if any_of else 0):  # beside it, or with it as its end
                both = [sympy.Le(excess + (-1 if any_of else 1), 0)]
            else:
                both = [part] if holds == any_of else [part, point]
            parts = [*(x for x in parts if x not in (part, point)), *both]
    return condition.func(*parts)


def _at_point(part: Boolean, point: Relational) -> int | None:
    """``c`` of a relation ``x + c <= 0`` or ``-x + c <= 0`` for the ``x`` that ``point`` compares with 0; None for
    others."""
    excess, x = _at_most_zero(part), point.lhs - point.rhs
    rests = [] if excess is None else [sympy.expand(excess + sign * x) for sign in (1, -1)]
    return next((int(rest) for rest in rests if rest.is_Integer), None)


def _bounded(literal: Relational) -> Boolean:
    """``|x| <= c`` as ``x <= c and -x <= c``, and so is ``x == c`` read where it ties keys to queries; other relations
    as they are."""
    if isinstance(literal, sympy.Eq) and literal.has(_Q) and literal.has(_K) and not literal.has(*_STEPPED):
        return sympy.And(sympy.Le(*literal.args), sympy.Ge(*literal.args))
    if isinstance(literal.rhs, sympy.Abs):
        literal = literal.reversed
    if isinstance(literal.lhs, sympy.Abs) and isinstance(literal, sympy.Le | sympy.Lt):
        (x,) = literal.lhs.args
        return sympy.And(literal.func(x, literal.rhs), literal.func(-x, literal.rhs))
    return literal


_STEPPED = (AppliedUndef, sympy.floor, sympy.Mod)


def _segment(literal: Boolean) -> sympy.Expr | None:
    """``f(b, k)`` of ``f(b, q) == f(b, k)``, for whatever values f has; None for other conditions."""
    if not isinstance(literal, sympy.Eq) or literal.has(_H):
        return None
    of_key, of_query = sorted(literal.args, key=lambda side: side.has(_Q))
    alike = of_key.has(*_STEPPED) and of_key.has(_K) and of_query.xreplace({_Q: _K}) == of_key
    return of_key if alike and not of_query.has(_K) and not of_key.has(_Q) else None


def _by_places(condition: Boolean, segment: sympy.Expr, evaluator: Evaluator) -> Boolean:
    """``condition`` for a query and a key of one segment, with their places for the positions that segments are of."""
    positions = _positions(segment, evaluator) if isinstance(segment, AppliedUndef) else None
    if positions is None:
        return condition
    first = sympy.Dummy("first", integer=True)  # the position before the first place, were the segment that long
    places = {positions.xreplace({_K: place}): first + place for place in (_Q, _K)}
    replaced = {}
    for literal in condition.atoms(Relational):
        opened = literal.xreplace({leaf: _opened(leaf, evaluator) for leaf in literal.atoms(AppliedUndef)})
        excess = _at_most_zero(opened.xreplace(places))
        if excess is not None and not excess.has(first) and not excess.atoms(AppliedUndef):
            replaced[literal] = sympy.Le(excess, 0)
    return condition.xreplace(replaced)


def _positions(segment: AppliedUndef, evaluator: Evaluator) -> AppliedUndef | None:
    """The leaf ``position(b, k)`` of ``segment(b, k) = cumsum(diff(position, prepend=one) != 1)``; None for others."""
    total, args = operation(evaluator.leaves[segment.func]), segment.args
    if total is None or total.name != "cumsum" or _K not in args:
        return None
    along = args.index(_K)
    begins = evaluator.value(total.get("input"), args)
    step = begins.lhs if isinstance(begins, sympy.Ne) and begins.rhs == 1 else None
    node = evaluator.leaves.get(step.func) if isinstance(step, AppliedUndef) and step.args == args else None
    differences = operation(node)
    if differences is None or differences.name != "diff" or differences.get("n", 1) != 1:
        return None
    dims = [total.get("dim"), differences.get("dim", -1)]
    if not all(isinstance(dim, int) and dim % len(args) == along for dim in dims):
        return None
    source, prepend = differences.get("input"), differences.get("prepend")
    if differences.get("append") is not None or not isinstance(prepend, Node):
        return None
    if not is_one(example_of(prepend).shape[along]):
        return None
    positions = evaluator.value(source, args)
    wide = all(example_of(x).dtype in (torch.int32, torch.int64) for x in (source, evaluator.leaves[segment.func]))
    return positions if wide and isinstance(positions, AppliedUndef) and positions.has(_K) else None


def _opened(leaf: AppliedUndef, evaluator: Evaluator) -> sympy.Expr:
    """A leaf that is another one plus or minus a number, as that sum."""
    node = evaluator.leaves[leaf.func]
    op = operation(node)
    if op is None or op.name not in ("add", "sub") or "alpha" in op.args or example_of(node).dim() == 0:
        return leaf
    other = number(op.get("other"))
    if not isinstance(other, int) or example_of(node).dtype not in (torch.int32, torch.int64):
        return leaf
    base = evaluator.operand(op.get("input"), node, leaf.args)
    if not isinstance(base, AppliedUndef):
        return leaf
    return base + other if op.name == "add" else base - other


def _everywhere(literal: Boolean, asked: _Asked) -> Boolean | None:
    """Whether a relation that is linear in q and k holds (or fails) for all queries and keys; None if neither."""
    if literal in (sympy.true, sympy.false):
        return literal
    excess = _at_most_zero(literal)
    if excess is None or excess.atoms(AppliedUndef) or excess.has(_B, _H):
        return None
    slopes = [(excess.coeff(x), x, size - 1) for x, size in ((_Q, asked.q_len), (_K, asked.k_len))]
    constant = sympy.expand(excess - sum(slope * x for slope, x, _ in slopes))
    if constant.has(_Q, _K) or not all(slope.is_Integer for slope, _, _ in slopes):
        return None
    high = constant + sum(max(slope, 0) * last for slope, _, last in slopes)
    low = constant + sum(min(slope, 0) * last for slope, _, last in slopes)
    if sympy.expand(high).is_nonpositive:
        return sympy.true
    return sympy.false if sympy.expand(low).is_positive else None


def _absorbed(condition: Boolean, asked: _Asked) -> Boolean:
    """``condition`` without what implies another alternative: ``k < 2 or k <= q + 2`` is ``k <= q + 2``."""
    if not isinstance(condition, sympy.And | sympy.Or):
        return condition
    parts = [_absorbed(part, asked) for part in condition.args]
    if isinstance(condition, sympy.And):
        return sympy.And(*parts)
    excesses = {part: _at_most_zero(part) for part in parts}
    for part, excess in excesses.items():
        weaker = (other for x, other in excesses.items() if x is not part and x in parts and other is not None)
        if excess is not None and any(_everywhere(sympy.Le(y - excess, 0), asked) is sympy.true for y in weaker):
            parts.remove(part)
    return sympy.Or(*parts)


def _smallest(bounds: list[Any], what: str) -> Any:
    if not bounds:
        return None
    for bound in bounds:
        if all(sympy.expand(other - bound).is_nonnegative for other in bounds):
            return bound
    raise Unproven(f"it is not known which of its {what} limits {', '.join(map(str, bounds))} is the smaller")


_NAMES = {relation: name for name, relation in RELATIONS.items()}


def _padding_term(literal: Boolean, asked: _Asked) -> PaddingTerm | None:
    """How to read a literal in the site's graph, or None."""
    if type(literal) not in _NAMES:
        return None
    if not isinstance(literal.lhs, AppliedUndef):
        literal = literal.reversed
    leaf, constant = literal.lhs, literal.rhs
    if not isinstance(leaf, AppliedUndef) or not constant.is_number:
        return None
    node = asked.evaluator.leaves[leaf.func]
    kept = [coord for coord in leaf.args if coord in (_B, _K)]
    if node.graph is not asked.mask.graph or kept not in ([_K], [_B, _K]):
        return None
    if not all(x in kept or x.is_Integer for x in leaf.args):
        return None
    index = tuple(slice(None) if x in kept else int(x) for x in leaf.args)
    number = int(constant) if constant.is_Integer else float(constant)
    return PaddingTerm(node, index, _B in kept, _NAMES[type(literal)], number)
