"""Tensors as functions of their coordinates: what an element of a mask is, at symbolic coordinates.

``arange`` is its coordinate, a comparison a relation, ``where`` a case distinction; every operation without a rule
is an opaque leaf that stands for its own values. Sizes stay symbolic, and no guard is added.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..core.spec import known_equal
from .buffers import Buffers
from .normalize import Operation, in_place, number, operation, shares_memory
from .words import label, spoken

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


class Surroundings(Protocol):
    """What an :class:`Evaluator` knows of the graph around a mask; a ``site.Scope`` is one.

    outer: the nodes that feed the placeholders of a sub-graph. buffers: what is known of the values of placeholders.
    """

    outer: Mapping[Node, Node]
    buffers: Buffers

    def overwritten(self, node: Node) -> bool:
        """Whether the memory of ``node`` is written once it has been computed."""

    def last_write(self, node: Node, reader: Node) -> Node | None:
        """What wrote last into the memory of ``node`` after it was computed and before ``reader`` runs."""


class Evaluator:
    """Evaluates the nodes of one mask, as ``reader`` finds them; remembers what it has seen.

    bounds: for each of :data:`COORDINATES` the number of its values, where that is known.
    """

    def __init__(self, around: Surroundings, reader: Node, bounds: Sequence[Any] = ()) -> None:
        self.around = around
        self.reader = reader
        self.bounds = dict(zip(COORDINATES, bounds, strict=False))
        self.leaves: dict[Any, Node] = {}
        self.symbols: dict[Node, Any] = {}
        self.memo: dict[Any, Any] = {}

    def visible(
        self,
        mask: Node,
        coords: Sequence[Any],
        sizes: Sequence[Any],
        hides: bool = False,
        factor: float | None = None,
    ) -> Boolean:
        """The condition under which the element of ``mask`` that broadcasts to ``coords`` of ``sizes`` shows a key.

        ``hides`` turns a boolean mask round: True hides. Another mask is added to scores, and so is a boolean one with
        a ``factor``, that many times.
        """
        example = example_of(mask)
        if example.dim() > len(coords):
            raise Unproven(f"it has {example.dim()} dimensions")
        value = self.value(mask, self.broadcast(example.shape, coords, sizes))
        if example.dtype == torch.bool and factor is None:
            return sympy.Not(_boolean(value)) if hides else _boolean(value)
        return _additive(_number(value), 1.0 if factor is None else factor, hidden_by(example.dtype), self)

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
        node = self.around.outer.get(node, node)
        writer = self.around.last_write(node, self.reader)
        key = (node, coords, writer)
        if key not in self.memo:
            self.memo[key] = self.evaluate(node, coords, writer)
        return self.memo[key]

    def evaluate(self, node: Node, coords: tuple[Any, ...], writer: Node | None) -> Any:
        """The element of ``node`` at ``coords`` after ``writer`` has written into it, if that is given."""
        op, reader, place = in_place(node) or operation(node), self.reader, node
        if writer is not None:
            written = in_place(writer)
            if written is not None and _same_place(written.get("input"), node):
                op, place = written, writer
            elif op is not None and op.name in _MOVES and shares_memory(op.get("input"), node):
                place = reader  # the memory that it is a view of is read in its place
            else:
                raise _modified(node)
        self.reader = place  # where what it depends on is read
        try:
            if op is not None and op.name in _RULES:
                value = _RULES[op.name](self, node, op, coords)
                return value if op.name in _MOVES else _settle(value, example_of(node).dtype)
        except _NoRule:
            pass
        finally:
            self.reader = reader
        if writer is not None:
            raise _modified(node)
        return self.leaf(node, coords)

    def leaf(self, node: Node, coords: tuple[Any, ...]) -> Any:
        if self.around.overwritten(node):  # its values may be read later than here
            raise _modified(node)
        dtype = example_of(node).dtype
        known = self.around.buffers.value(node, coords)
        if known is not None:
            condition, then, other = known
            if dtype == torch.bool:
                return condition if then else sympy.Not(condition)
            return _select(condition, _real(float(then)), _real(float(other)))
        if dtype.is_complex:
            raise Unproven(f"it is made from {spoken(node)}, which is complex")
        if node not in self.symbols:
            assumption = {"real": True} if dtype.is_floating_point else {"integer": True}
            # the number keeps two nodes of one name apart
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

    def divided(self, x: Any, n: sympy.Expr) -> tuple[Any, Any]:
        """The quotient and the remainder of an integer expression by a size."""
        terms = [(term, sympy.cancel(term / n)) for term in sympy.Add.make_args(sympy.expand(x))]
        whole = sympy.Add(*(ratio for _, ratio in terms if ratio.is_integer))
        rest = sympy.Add(*(term for term, ratio in terms if not ratio.is_integer))
        if rest == 0 or (rest in self.bounds and known_equal(size_expr(self.bounds[rest]), n)):
            return whole, rest
        if not n.is_Integer:
            raise _NoRule
        return whole + sympy.floor(rest / n), sympy.Mod(rest, n)

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
        raise Unproven(f"{spoken(node)}, which it is made from, is not a tensor")
    return example


def _same_place(a: Any, b: Node) -> bool:
    """Whether two nodes are the same elements of the same memory."""
    if a is b:
        return True
    x, y = (node.meta.get("example_value") if isinstance(node, Node) else None for node in (a, b))
    if not isinstance(x, torch.Tensor) or x.dtype != y.dtype or x.dim() != y.dim():
        return False
    places = ((*x.shape, *x.stride(), x.storage_offset()), (*y.shape, *y.stride(), y.storage_offset()))
    return all(map(known_equal, *places))


def _modified(node: Node) -> Unproven:
    return Unproven(f"{spoken(node)}, which it is made from, is modified in place", "a mask that torch.where makes")


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


HIDDEN = -1e9
"""What is added to a score or filled into it at most, to hide it: scores are taken to be larger."""


def hidden_by(dtype: torch.dtype) -> float:
    """What hides a score at most: :data:`HIDDEN`, or the lowest number of a floating dtype that has none so low."""
    return max(HIDDEN, torch.finfo(dtype).min) if dtype.is_floating_point else HIDDEN


def _additive(value: Any, factor: float, hidden: float, evaluator: Evaluator) -> Boolean:
    if isinstance(value, _Select):
        then, other = (_additive(case, factor, hidden, evaluator) for case in (value.then, value.other))
        return _select(value.condition, then, other)
    if value.is_number:
        if value == 0:
            return sympy.true
        if float(value) * factor <= hidden:
            return sympy.false
        raise Unproven(
            f"it adds {float(value) * factor:g} to scores: neither 0 nor {hidden:g} or less, which hides them",
            "float('-inf') for hidden keys",
        )
    names = sorted(leaf_names(value, evaluator))
    raise Unproven(
        f"it adds the values of {', '.join(names) or formula(value, evaluator)}, which are not known when compiling",
        PROVABLE,
    )


def leaf_names(expression: Any, evaluator: Evaluator) -> set[str]:
    """What the nodes are called whose values an expression contains."""
    return {spoken(evaluator.leaves[leaf.func]) for leaf in expression.atoms(AppliedUndef)}


_INFIX = {sympy.Eq: "==", sympy.Ne: "!=", sympy.And: "and", sympy.Or: "or"}


def formula(expression: Any, evaluator: Evaluator) -> str:
    """An expression in the user's words: ``mask[b, k] != 0 or k <= q``."""
    if isinstance(expression, sympy.Not):
        return f"not ({formula(expression.args[0], evaluator)})"
    infix = next((word for kind, word in _INFIX.items() if isinstance(expression, kind)), None)
    if infix is None:
        labels = {
            leaf: sympy.Symbol(f"{label(evaluator.leaves[leaf.func])}[{', '.join(map(str, leaf.args))}]")
            for leaf in expression.atoms(AppliedUndef)
        }
        return str(expression.xreplace(labels))
    args = sorted(expression.args, key=str) if infix in ("and", "or") else expression.args
    parts = [formula(arg, evaluator) for arg in args]
    return f" {infix} ".join(f"({x})" if " and " in x or " or " in x else x for x in parts)


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


def _division(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    """``/`` of numbers; ``//`` and ``%`` of an integer expression by a positive integer."""
    a, b = (_number(evaluator.operand(op.get(name), node, coords)) for name in ("input", "other"))
    rounding = "floor" if op.name == "floor_divide" else op.get("rounding_mode")
    if isinstance(b, _Select) or not b.is_number or not b.is_nonzero or rounding not in (None, "floor"):
        raise _NoRule
    if op.name == "div" and rounding is None:
        return _map(_known(lambda x: x / b), a)
    if isinstance(a, _Select) or not a.is_integer or not b.is_Integer or not b.is_positive:
        raise _NoRule
    return _known(lambda x: sympy.Mod(x, b) if op.name == "remainder" else sympy.floor(x / b))(a)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    """The larger or the smaller of two numbers."""

    def rule(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
        operands = (_number(evaluator.operand(op.get(name), node, coords)) for name in ("input", "other"))
        return _map(_of_numbers(function), *operands)

    return rule


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        if not all(value.is_number for value in values):
            raise _NoRule
        return function(*values)

    return checked


def _clamp(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    low, high = (op.get(name) for name in ("min", "max"))
    values = [_number(evaluator.operand(x, node, coords)) for x in (op.get("input"), low, high) if x is not None]

    def clamp(x: Any, *limits: Any) -> Any:
        limits = list(limits)
        x = x if low is None else sympy.Max(x, limits.pop(0))
        return x if high is None else sympy.Min(x, limits.pop(0))

    return _map(_of_numbers(clamp), *values)


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
    """Dimensions in row-major order, some of them taken apart or put together."""
    source, shape = op.get("input"), example_of(node).shape
    inner = example_of(source).shape
    place = [sympy.S.Zero] * len(inner)
    for parts, wholes in _groups([inner[i] for i in _nonunit(inner)], [shape[j] for j in _nonunit(shape)]):
        flat = sympy.S.Zero
        for j in (_nonunit(shape)[j] for j in wholes):
            flat = flat * size_expr(shape[j]) + coords[j]
        first, *others = (_nonunit(inner)[i] for i in parts)
        for i in reversed(others):
            flat, place[i] = evaluator.divided(flat, size_expr(inner[i]))
        place[first] = flat
    return evaluator.value(source, tuple(place))


def _groups(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[range, range]]:
    """The smallest runs of sizes in ``a`` and ``b``, in order, that have the same products."""
    found, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        ends = sorted(itertools.product(range(i + 1, len(a) + 1), range(j + 1, len(b) + 1)), key=sum)
        same = ((m, n) for m, n in ends if known_equal(math.prod(a[i:m]), math.prod(b[j:n])))
        m, n = next(same, (i, j))
        if (m, n) == (i, j):
            raise _NoRule
        found.append((range(i, m), range(j, n)))
        i, j = m, n
    return found


def _repeat(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source = op.get("input")
    inner = example_of(source).shape
    kept = coords[len(coords) - len(inner) :]
    sizes = zip(kept, map(size_expr, inner), strict=True)
    return evaluator.value(source, tuple(sympy.S.Zero if n == 1 else evaluator.divided(x, n)[1] for x, n in sizes))


def _repeat_interleave(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    source, dim = op.get("input"), op.get("dim")
    inner, repeats = example_of(source).shape, size_expr(op.get("repeats"))
    if not isinstance(dim, int) or not repeats.is_positive:
        raise _NoRule
    dim %= len(inner)
    place = sympy.S.Zero if is_one(inner[dim]) else evaluator.divided(coords[dim], repeats)[0]
    return evaluator.value(source, (*coords[:dim], place, *coords[dim + 1 :]))


def _cat(evaluator: Evaluator, node: Node, op: Operation, coords: tuple[Any, ...]) -> Any:
    """One tensor behind the other."""
    parts, dim, dtype = op.get("tensors"), op.get("dim", 0), example_of(node).dtype
    if not isinstance(parts, list | tuple) or not parts or not isinstance(dim, int):
        raise _NoRule
    if any(not _is_tensor(part) or example_of(part).dim() != len(coords) for part in parts):
        raise _NoRule
    dim %= len(coords)
    starts = [sympy.S.Zero]
    for part in parts[:-1]:
        starts.append(starts[-1] + size_expr(example_of(part).shape[dim]))
    values = []
    for part, start in zip(parts, starts, strict=True):
        place = sympy.S.Zero if is_one(example_of(part).shape[dim]) else coords[dim] - start
        values.append(_settle(evaluator.value(part, (*coords[:dim], place, *coords[dim + 1 :])), dtype))
    value = values[-1]
    for before, end in zip(reversed(values[:-1]), reversed(starts[1:]), strict=True):
        value = _select(sympy.Lt(coords[dim], end), before, value)
    return value


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
    if not _is_tensor(source):
        raise _NoRule  # one of several results
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
            where = evaluator.broadcast(example_of(item).shape, indexed, out)
            try:
                place = _integer(evaluator.value(item, where))
            except Unproven:
                if not example_of(node).dtype.is_floating_point:
                    raise
                raise _NoRule from None  # that values are added says more than how their places are made
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


_MOVES: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    **{name: _reshape for name in ("unsqueeze", "squeeze", "flatten", "unflatten", "view", "reshape")},
    **{name: _same for name in ("expand", "broadcast_to", "expand_as", "contiguous", "clone", "detach")},
    **{name: _repeat for name in ("repeat", "tile")},
    "repeat_interleave": _repeat_interleave,
    **{name: _permuted for name in ("transpose", "permute")},
}
_RULES: dict[str, Callable[..., Any]] = {
    **_MOVES,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    **dict.fromkeys(("div", "floor_divide", "remainder"), _division),
    "maximum": _extreme(sympy.Max),
    "minimum": _extreme(sympy.Min),
    **dict.fromkeys(("clamp", "clamp_min"), _clamp),
    "log": _unary(_of_numbers(lambda x: sympy.S.NegativeInfinity if x == 0 else sympy.Float(math.log(x)))),
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
    **{name: _constant(0) for name in ("zeros", "new_zeros", "zeros_like", "zero")},
    "fill": _fill("value"),
    "to": _cast,
    "cat": _cat,
}
