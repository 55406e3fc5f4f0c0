"""Tensors as functions of their coordinates: what an element of a mask is, at symbolic coordinates.

``arange`` is its coordinate, a comparison a relation, ``where`` a case distinction; every operation without a rule
is an opaque leaf that stands for its own values. Sizes stay symbolic, and no guard is added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..spec import known_equal
from .buffers import Buffers
from .normalize import Operation, in_place, number, operation

COORDINATES = sympy.symbols("b h q k", integer=True, nonnegative=True)


class Unproven(Exception):
    """The mask cannot be proven; the message says why, and ``nearest`` what could be, if there is such a thing."""

    def __init__(self, why: str, nearest: str | None = None) -> None:
        super().__init__(why)
        self.nearest = nearest


PROVABLE = "is_causal=True, a mask that the model makes of torch.arange or tril, or a boolean key padding [B, 1, 1, Lk]"


class _NoRule(Exception):
    """An operation that no rule covers at these arguments: its result becomes an opaque leaf."""


@dataclass(frozen=True)
class _Select:
    """A number that is ``then`` where ``condition`` holds and ``other`` elsewhere."""

    condition: Boolean
    then: Any
    other: Any


def size_expr(size: Any) -> sympy.Expr:
    """A size (int, ``SymInt``, or a node that carries one) as a sympy expression; ``_NoRule`` for anything else."""
    if isinstance(size, Node):
        size = size.meta.get("example_value")
    if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
        raise _NoRule
    return sympy.Integer(size) if isinstance(size, int) else size.node.shape_env.simplify(size.node.expr)


def is_one(size: Any) -> bool:
    """Whether a size is 1 for every input."""
    return size == 1 if isinstance(size, int) else known_equal(size, 1)


def _nonunit(shape: Sequence[Any]) -> list[int]:
    return [i for i, size in enumerate(shape) if not is_one(size)]


class Evaluator:
    """Evaluates the nodes of one mask; remembers what it has seen.

    ``outer`` maps placeholders of a sub-graph to the nodes that feed them; ``overwritten(node, but=nodes)`` tells
    whether the memory of a node is written once it has been computed, by others than ``nodes``. ``buffers`` knows the
    values of some placeholders.
    """

    def __init__(
        self, outer: Mapping[Node, Node], overwritten: Callable[..., bool], buffers: Buffers | None = None
    ) -> None:
        self.outer = outer
        self.overwritten = overwritten
        self.buffers = buffers or Buffers()
        self.leaves: dict[Any, Node] = {}
        self.symbols: dict[Node, Any] = {}
        self.memo: dict[Any, Any] = {}
        self.later: tuple[Node, ...] = ()  # writes that come after everything that is being evaluated

    def visible(self, mask: Node, coords: Sequence[Any], sizes: Sequence[Any], hides: bool = False) -> Boolean:
        """The condition under which the element of ``mask`` that broadcasts to ``coords`` of ``sizes`` shows a key.

        ``hides`` turns a boolean mask round: True hides.
        """
        example = example_of(mask)
        if example.dim() > len(coords):
            raise Unproven(f"it has {example.dim()} dimensions")
        value = self.value(mask, self.broadcast(example.shape, coords, sizes))
        if example.dtype == torch.bool:
            return sympy.Not(_boolean(value)) if hides else _boolean(value)
        return _additive(value, torch.finfo(example.dtype).min, self)

    def broadcast(self, shape: Sequence[Any], coords: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
        """Coordinates in a tensor of ``shape`` of the element that broadcasts to ``coords`` of ``sizes``."""
        kept = len(coords) - len(shape)
        result = []
        for size, coord, target in zip(shape, coords[kept:], sizes[kept:], strict=True):
            if free_unbacked_symbols(size) and not known_equal(size, target):
                raise Unproven(f"it depends on a size that is unknown until run time ({size})")
            result.append(sympy.S.Zero if is_one(size) else coord)
        return tuple(result)

    def value(self, node: Node, coords: tuple[Any, ...]) -> Any:
        """The element of ``node`` at ``coords``: a sympy number, a sympy boolean or a :class:`_Select`."""
        node = self.outer.get(node, node)
        key = (node, coords)
        if key not in self.memo:
            self.memo[key] = self.evaluate(node, coords)
        return self.memo[key]

    def evaluate(self, node: Node, coords: tuple[Any, ...]) -> Any:
        write, op = in_place(node), operation(node)
        if write is None and self.overwritten(node, but=self.later):
            raise _modified(node)
        try:
            if write is not None:
                return self.after_write(node, write, coords)
            if op is not None and op.name in _RULES:
                return _settle(_RULES[op.name](self, node, op, coords), example_of(node).dtype)
        except _NoRule:
            pass
        return self.leaf(node, coords)

    def after_write(self, node: Node, write: Operation, coords: tuple[Any, ...]) -> Any:
        """The element after an in-place operation: everything it depends on is read before the write."""
        memo, later = self.memo, self.later
        self.memo, self.later = {}, (*later, node)
        try:
            return _settle(_RULES[write.name](self, node, write, coords), example_of(node).dtype)
        finally:
            self.memo, self.later = memo, later

    def leaf(self, node: Node, coords: tuple[Any, ...]) -> Any:
        if self.overwritten(node):  # its values may be read later than here
            raise _modified(node)
        dtype = example_of(node).dtype
        known = self.buffers.value(node, coords)
        if known is not None:
            condition, then, other = known
            if dtype == torch.bool:
                return condition if then else sympy.Not(condition)
            return _select(condition, _real(float(then)), _real(float(other)))
        if dtype.is_complex:
            raise Unproven(f"it is made from the complex tensor '{node.name}'")
        if node not in self.symbols:
            assumption = {"real": True} if dtype.is_floating_point else {"integer": True}
            # the number keeps two nodes of one name in different graphs apart
            self.symbols[node] = sympy.Function(f"{node.name}__{len(self.symbols)}", **assumption)
            self.leaves[self.symbols[node]] = node
        value = self.symbols[node](*coords) if coords else self.symbols[node](sympy.S.Zero)
        return sympy.Ne(value, 0) if dtype == torch.bool else value

    def operand(self, arg: Any, out: Node, coords: tuple[Any, ...]) -> Any:
        """An argument of an elementwise operation: a tensor broadcast to ``out``, or a number."""
        if isinstance(arg, Node):
            example = arg.meta.get("example_value")
            if isinstance(example, torch.Tensor):
                return self.value(arg, self.broadcast(example.shape, coords, example_of(out).shape))
            arg = number(arg)
        if isinstance(arg, bool):
            return sympy.true if arg else sympy.false
        if isinstance(arg, int | torch.SymInt):
            return size_expr(arg)
        if isinstance(arg, torch.SymFloat):
            if not arg.node.expr.is_number:
                raise _NoRule
            arg = float(arg.node.expr)
        if isinstance(arg, float):
            return _real(arg)
        raise _NoRule

    def index(self, arg: Any) -> sympy.Expr:
        """A size, offset or index that is a number or a zero-dimensional tensor, as an integer expression."""
        if isinstance(arg, Node) and isinstance(arg.meta.get("example_value"), torch.Tensor):
            if example_of(arg).dim() != 0:
                raise _NoRule
            return _integer(self.value(arg, ()))
        return size_expr(arg)


def example_of(node: Node) -> torch.Tensor:
    """The fake tensor a node stands for; raises :class:`Unproven` if it is no tensor."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        raise Unproven(f"'{node.name}', which it is made from, is not a tensor")
    return example


def _modified(node: Node) -> Unproven:
    return Unproven(f"'{node.name}', which it is made from, is modified in place", "a mask that torch.where makes")


def _is_condition(value: Any) -> bool:
    # sympy's symbols are booleans as well as numbers
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)


def _real(x: float) -> Any:
    if math.isnan(x):
        raise Unproven("it holds NaN")
    if math.isinf(x):
        return sympy.S.Infinity if x > 0 else sympy.S.NegativeInfinity
    return sympy.Rational(x)


def _map(function: Callable[..., Any], *values: Any) -> Any:
    """``function`` of numbers, taken into the cases of every :class:`_Select` among ``values``."""
    for i, value in enumerate(values):
        if isinstance(value, _Select):
            then = _map(function, *values[:i], value.then, *values[i + 1 :])
            other = _map(function, *values[:i], value.other, *values[i + 1 :])
            return _select(value.condition, then, other)
    return function(*values)


def _select(condition: Boolean, then: Any, other: Any) -> Any:
    if condition is sympy.true or then == other:
        return then
    if condition is sympy.false:
        return other
    if _is_condition(then) and _is_condition(other):
        if then is sympy.true or other is sympy.true:
            return sympy.Or(condition, other) if then is sympy.true else sympy.Or(sympy.Not(condition), then)
        return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), other))
    return _Select(condition, _number(then), _number(other))


def _boolean(value: Any) -> Boolean:
    return _map(lambda x: x if _is_condition(x) else sympy.Ne(x, 0), value)


def _number(value: Any) -> Any:
    if _is_condition(value):
        if value is sympy.true or value is sympy.false:
            return sympy.Integer(value is sympy.true)
        return _Select(value, sympy.S.One, sympy.S.Zero)
    return value


def _integer(value: Any) -> sympy.Expr:
    if not isinstance(value, sympy.Expr) or not value.is_integer:
        raise _NoRule
    return value


def _settle(value: Any, dtype: torch.dtype) -> Any:
    """``value`` as a tensor of ``dtype`` holds it; ``_NoRule`` where rounding or wrapping is not decidable."""
    if dtype == torch.bool:
        return _boolean(value)
    if _is_condition(value):
        value = _number(value)
    return _map(lambda x: _settle_number(x, dtype), value)


def _settle_number(x: Any, dtype: torch.dtype) -> Any:
    if x is sympy.nan:
        raise Unproven("it holds NaN")
    if dtype.is_floating_point:
        if x.is_number:
            try:
                return _real(torch.tensor(float(x), dtype=dtype).item())
            except OverflowError:
                return sympy.S.Infinity if x > 0 else sympy.S.NegativeInfinity
        if dtype == torch.float64 and (not x.is_integer or _largest(x) <= 2**53):
            return x
    elif x.is_number:
        info = torch.iinfo(dtype)
        if x.is_Integer and info.min <= x <= info.max:
            return x
    elif dtype in (torch.int64, torch.int32) and x.is_integer and _largest(x) <= torch.iinfo(dtype).max:
        return x
    raise _NoRule


_SIZE_BITS = 24  # sizes are taken to be below 2**24: no mask of more tokens fits into memory


def _largest(x: sympy.Expr) -> int:
    """A bound on the absolute value of an integer expression in coordinates and sizes; 0 for a leaf."""
    if isinstance(x, AppliedUndef):
        return 0
    total = 0
    for term in sympy.Add.make_args(sympy.expand(x)):
        factor, rest = term.as_coeff_Mul()
        powers = (part.as_base_exp() for part in sympy.Mul.make_args(rest))
        degree = sum(int(exponent) * len(base.free_symbols) for base, exponent in powers if exponent.is_Integer)
        total += math.ceil(abs(factor)) << (_SIZE_BITS * max(0, degree))
    return total


def _known(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but no rule for the values of a leaf, which may overflow, be rounded or be NaN."""

    def checked(*values: Any) -> Any:
        if any(value.atoms(AppliedUndef) for value in values):
            raise _NoRule
        return function(*values)

    return checked


def _additive(value: Any, lowest: float, evaluator: Evaluator) -> Boolean:
    if isinstance(value, _Select):
        then = _additive(value.then, lowest, evaluator)
        return _select(value.condition, then, _additive(value.other, lowest, evaluator))
    if value.is_number:
        if value == 0:
            return sympy.true
        if value <= sympy.Rational(lowest):
            return sympy.false
        raise Unproven(
            f"it adds {float(value):g} to scores: neither 0 nor the lowest number of its dtype",
            "float('-inf') for hidden keys",
        )
    names = sorted(leaf_names(value, evaluator))
    raise Unproven(
        f"it adds the values of {', '.join(names) or str(value)}, which are not known when compiling", PROVABLE
    )


def leaf_names(expression: Any, evaluator: Evaluator) -> set[str]:
    """The quoted names of the nodes whose values an expression contains."""
    return {f"'{evaluator.leaves[leaf.func].name}'" for leaf in expression.atoms(AppliedUndef)}


# ---- rules: (evaluator, node, operation, coordinates) -> value ------------------------------------------------


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        a = evaluator.operand(op.get("input"), node, coords)
        b = evaluator.operand(op.get("other"), node, coords)
        if isinstance(op.get("alpha", 1), Node):
            raise _NoRule
        alpha = _real(float(op.get("alpha", 1)))
        return _map(_known(lambda x, y: function(x, y * alpha)), _number(a), _number(b))

    return rule


def _comparison(relation: type[Relational]) -> Callable[..., Any]:
    def compare(a: Any, b: Any) -> Boolean:
        # a fraction is compared in floating point, where a large integer is rounded
        if not (a.is_number and b.is_number) and not (a.is_integer and b.is_integer):
            if not any(isinstance(x, AppliedUndef) and y.is_number for x, y in ((a, b), (b, a))):
                raise _NoRule
        ordered = relation not in (sympy.Eq, sympy.Ne)
        if ordered and any(isinstance(x, AppliedUndef) and not x.is_integer for x in (a, b)):
            raise _NoRule  # NaN: "not >" is not "<="
        return relation(a, b)

    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        a = evaluator.operand(op.get("input"), node, coords)
        return _map(compare, _number(a), _number(evaluator.operand(op.get("other"), node, coords)))

    return rule


def _logic(function: Callable[..., Boolean], bitwise: bool) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        names = [name for name in ("input", "other") if name in op.args]
        if bitwise and example_of(node).dtype != torch.bool:
            raise _NoRule
        return function(*(_boolean(evaluator.operand(op.get(name), node, coords)) for name in names))

    return rule


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        return _map(_known(function), _number(evaluator.operand(op.get("input"), node, coords)))

    return rule


def _where(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    condition = _boolean(evaluator.operand(op.get("condition"), node, coords))
    then, other = (evaluator.operand(op.get(name), node, coords) for name in ("input", "other"))
    return _select(condition, _settle(then, example_of(node).dtype), _settle(other, example_of(node).dtype))


def _masked_fill(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    condition = _boolean(evaluator.operand(op.get("mask"), node, coords))
    then, other = (evaluator.operand(op.get(name), node, coords) for name in ("value", "input"))
    return _select(condition, _settle(then, example_of(node).dtype), _settle(other, example_of(node).dtype))


def _triangle(relation: type[Relational]) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        kept = relation(coords[-1] - coords[-2], evaluator.index(op.get("diagonal", 0)))
        value = evaluator.operand(op.get("input"), node, coords)
        return _select(kept, value, sympy.false if _is_condition(value) else sympy.S.Zero)

    return rule


def _constant(number: int) -> Callable[..., Any]:
    return lambda evaluator, node, op, coords: sympy.Integer(number)


def _fill(name: str) -> Callable[..., Any]:
    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        value = op.get(name)
        if isinstance(value, Node) and isinstance(value.meta.get("example_value"), torch.Tensor):
            raise _NoRule
        return evaluator.operand(value, node, coords)

    return rule


def _arange(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    return evaluator.index(op.get("start")) + coords[0] * evaluator.index(op.get("step"))


def _same(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    return evaluator.operand(op.get("input"), node, coords)


def _cast(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    value = evaluator.operand(op.get("input"), node, coords)
    old, new = example_of(op.get("input")).dtype, example_of(node).dtype
    if isinstance(value, AppliedUndef) and new != torch.bool and torch.promote_types(old, new) != new:
        raise _NoRule  # unknown values that may not fit
    return value


def _reshape(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    """Any reshape that only adds or removes dimensions of size one."""
    source, shape = op.get("input"), example_of(node).shape
    inner = example_of(source).shape
    kept, given = _nonunit(inner), _nonunit(shape)
    if len(kept) != len(given) or not all(known_equal(inner[i], shape[j]) for i, j in zip(kept, given, strict=True)):
        raise _NoRule
    place = {i: coords[j] for i, j in zip(kept, given, strict=True)}
    return evaluator.value(source, tuple(place.get(i, sympy.S.Zero) for i in range(len(inner))))


def _repeat(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source, shape = op.get("input"), example_of(node).shape
    inner = example_of(source).shape
    for i, j in zip(reversed(range(len(inner))), reversed(range(len(shape))), strict=False):
        if not is_one(inner[i]) and not known_equal(inner[i], shape[j]):
            raise _NoRule
    return evaluator.operand(source, node, coords)


def _permuted(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source, rank = op.get("input"), len(coords)
    if op.name == "permute":
        order = [d % rank for d in op.get("dims")]
    else:
        order = list(range(rank))
        i, j = op.get("dim0") % rank, op.get("dim1") % rank
        order[i], order[j] = j, i
    return evaluator.value(source, tuple(coords[order.index(d)] for d in range(rank)))


def _cumsum(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    """A running sum of a constant."""
    dim = op.get("dim")
    if not isinstance(dim, int) or not coords:
        raise _NoRule
    dim %= len(coords)
    step = sympy.Dummy("t", integer=True, nonnegative=True)
    each = _number(evaluator.value(op.get("input"), (*coords[:dim], step, *coords[dim + 1 :])))
    if isinstance(each, _Select) or not each.is_number or not each.is_Integer:
        raise _NoRule
    return each * (coords[dim] + 1)


def _diff(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source, prepend, dim = op.get("input"), op.get("prepend"), op.get("dim", -1)
    if op.get("n", 1) != 1 or op.get("append") is not None or not isinstance(dim, int):
        raise _NoRule
    if example_of(source).dtype == torch.bool:
        raise _NoRule
    dim %= len(coords)

    def at(tensor: Node, place: Any) -> Any:
        return evaluator.value(tensor, (*coords[:dim], place, *coords[dim + 1 :]))

    i = coords[dim]
    if prepend is None:
        return _map(_known(operator.sub), at(source, i + 1), at(source, i))
    if not isinstance(prepend, Node) or not is_one(example_of(prepend).shape[dim]):
        raise _NoRule
    first = _map(_known(operator.sub), at(source, sympy.S.Zero), at(prepend, sympy.S.Zero))
    return _select(sympy.Eq(i, 0), first, _map(_known(operator.sub), at(source, i), at(source, i - 1)))


def _getitem(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source, index = op.get("input"), op.get("index")
    shape = example_of(source).shape
    items = list(index) if isinstance(index, tuple | list) else [index]
    if isinstance(index, list):
        raise _NoRule
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) - used)
    else:
        items += [slice(None)] * (len(shape) - used)
    tensors = [i for i, item in enumerate(items) if _is_tensor(item)]
    if any(example_of(items[i]).dtype in (torch.bool, torch.uint8) for i in tensors):
        raise _NoRule
    if tensors and any(isinstance(item, int) or _is_size(item) for item in items):
        raise _NoRule
    ranks = [example_of(items[i]).dim() for i in tensors]
    block = max(ranks, default=0)
    if block > 0 and 0 in ranks:
        raise _NoRule  # a scalar tensor selects like an int, which decides where the other indices' dimensions go
    together = not tensors or tensors == list(range(tensors[0], tensors[-1] + 1))
    start = 0 if not together or not tensors else sum(not _is_tensor(item) for item in items[: tensors[0]])
    indexed, rest = coords[start : start + block], list(coords[:start] + coords[start + block :])
    out = example_of(node).shape[start : start + block]
    result: list[Any] = []
    for item in items:
        if item is None:
            rest.pop(0)
        elif isinstance(item, slice):
            result.append(_sliced(evaluator, item, shape[len(result)], rest.pop(0)))
        elif _is_tensor(item):
            place = _integer(evaluator.value(item, evaluator.broadcast(example_of(item).shape, indexed, out)))
            if not place.is_nonnegative:
                raise _NoRule
            result.append(place)
        else:
            place = evaluator.index(item)
            if place.is_negative:
                place = place + size_expr(shape[len(result)])
            if not place.is_nonnegative:
                raise _NoRule
            result.append(place)
    return evaluator.value(source, tuple(result))


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Node) and isinstance(item.meta.get("example_value"), torch.Tensor)


def _is_size(item: Any) -> bool:
    return isinstance(item, Node) and not _is_tensor(item)


def _sliced(evaluator: Evaluator, item: slice, size: Any, coord: Any) -> Any:
    if item.step not in (None, 1):
        raise _NoRule
    if item.start is None:
        return coord
    start = evaluator.index(item.start)
    if start.is_negative:
        start = start + size_expr(size)
    if not start.is_nonnegative:
        raise _NoRule
    return coord + start


_RULES: dict[str, Callable[..., Any]] = {
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "neg": _unary(operator.neg),
    "abs": _unary(sympy.Abs),
    "eq": _comparison(sympy.Eq),
    "ne": _comparison(sympy.Ne),
    "lt": _comparison(sympy.Lt),
    "le": _comparison(sympy.Le),
    "gt": _comparison(sympy.Gt),
    "ge": _comparison(sympy.Ge),
    "bitwise_and": _logic(sympy.And, True),
    "bitwise_or": _logic(sympy.Or, True),
    "bitwise_xor": _logic(sympy.Xor, True),
    "bitwise_not": _logic(sympy.Not, True),
    "logical_and": _logic(sympy.And, False),
    "logical_or": _logic(sympy.Or, False),
    "logical_xor": _logic(sympy.Xor, False),
    "logical_not": _logic(sympy.Not, False),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(sympy.Le),
    "triu": _triangle(sympy.Ge),
    "cumsum": _cumsum,
    "diff": _diff,
    "arange": _arange,
    "tensor": _fill("data"),
    "scalar_tensor": _fill("data"),
    **{name: _fill("fill_value") for name in ("full", "new_full", "full_like")},
    **{name: _constant(1) for name in ("ones", "new_ones", "ones_like")},
    **{name: _constant(0) for name in ("zeros", "new_zeros", "zeros_like")},
    "getitem": _getitem,
    **{name: _reshape for name in ("unsqueeze", "squeeze", "flatten", "view", "reshape")},
    **{name: _same for name in ("expand", "broadcast_to", "expand_as", "contiguous", "clone", "detach")},
    "to": _cast,
    "repeat": _repeat,
    **{name: _permuted for name in ("transpose", "permute")},
}
