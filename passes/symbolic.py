"""Tensors as functions of their coordinates: what an element of a mask is, at symbolic coordinates.

``arange`` is its coordinate, a comparison a relation, ``where`` a case distinction; every operation without a rule
is an opaque leaf that stands for its own values. Sizes stay symbolic, and no guard is added.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from .nodes import reached, same_sizes, shares_memory, sources, tensor_of
from .normalize import Operation, in_place, is_number, number, operation, order_of
from .words import is_parameter, label, spoken

COORDINATES = sympy.symbols("b h q k", integer=True, nonnegative=True)
_K = COORDINATES[-1]


class Unproven(Exception):
    """The mask cannot be proven; the message says why, and ``nearest`` what could be, if there is such a thing."""

    def __init__(self, why: str, nearest: str | None = None) -> None:
        super().__init__(why)
        self.nearest = nearest


PROVABLE = (
    "is_causal=True, a mask that the model makes of torch.arange or tril, a triangle or band that it keeps by "
    "register_buffer, or a boolean key padding [B, 1, 1, Lk]"
)


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


def digits(place: Any, sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Where an entry of a dimension is once that is taken apart into ``sizes``."""
    found: list[Any] = []
    below: Any = 1
    for size in map(size_expr, reversed(sizes[1:])):
        found.insert(0, sympy.Mod(sympy.floor(place / below), size))
        below *= size
    return (sympy.floor(place / below), *found) if len(sizes) else ()


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
    flags: the inputs that were taken for 0 and 1, as their values are; None to take none.
    """

    def __init__(
        self, around: Surroundings, reader: Node, bounds: Sequence[Any] = (), flags: set[Node] | None = None
    ) -> None:
        self.around = around
        self.flags = flags
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
        if example.dtype == torch.bool and factor is None:
            value = self.value(mask, self.broadcast(example.shape, coords, sizes))
            return sympy.Not(_boolean(value)) if hides else _boolean(value)
        return self.shown(mask, coords, sizes, 1.0 if factor is None else factor, hidden_by(example.dtype))

    def shown(self, mask: Node, coords: Sequence[Any], sizes: Sequence[Any], factor: float, hidden: float) -> Boolean:
        """The same of a tensor that is added to scores, and hides them by ``hidden`` or less; a sum that is not known
        as a whole is taken term by term."""
        value = self.value(mask, self.broadcast(example_of(mask).shape, coords, sizes))
        try:
            return _additive(_number(value), factor, hidden, self)[0]
        except Unproven:
            mask, reader = self.around.outer.get(mask, mask), self.reader
            terms = [] if self.around.last_write(mask, reader) is not None else _terms(mask)
            if not terms:
                raise
        self.reader = mask  # where its terms are read
        try:
            return sympy.And(*(self.shown(term, coords, sizes, factor * sign, hidden) for term, sign in terms))
        finally:
            self.reader = reader

    def is_one(self, node: Node, coords: tuple[Any, ...]) -> Boolean:
        """Where the element of ``node`` at ``coords`` is 1; ``Unproven`` if it may be anything but 0 elsewhere."""
        value = _number(self.value(node, coords))
        if isinstance(value, _Select) and (value.then, value.other) in ((1, 0), (0, 1)):
            return value.condition if value.then == 1 else sympy.Not(value.condition)
        if value == 1:
            return sympy.true
        raise Unproven("it holds other numbers than 0 and 1")

    def may_hide(self, leaf: Any) -> bool:
        """Whether the values of a leaf may be what hides a score: they are made by a large number or a logarithm, or
        are those of an input that holds such ones now."""
        return any(map(self._hides, reached(self.leaves[leaf.func], _elements)))

    def _hides(self, node: Node) -> bool:
        op = operation(node)
        if op is None or op.name not in _RULES:
            return node.op == "placeholder" and not is_parameter(node) and self.around.buffers.hides(node, HIDDEN)
        numbers = [abs(x) for x in map(number, (*node.args, *node.kwargs.values())) if isinstance(x, int | float)]
        return op.name == "log" or any(x >= -HIDDEN or 0 < x <= -1 / HIDDEN for x in numbers)

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
                value = _RULES[op.name](_Element(self, node, op, coords))
                return value if op.name in _SETTLED else _settle(value, example_of(node).dtype)
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
        if dtype == torch.bool:
            return sympy.Ne(value, 0)
        if self.flags is not None and self.around.buffers.is_flag(node):
            self.flags.add(node)
            return _Select(sympy.Ne(value, 0), sympy.S.One, sympy.S.Zero)
        return value

    def operand(self, arg: Any, out: Node, coords: tuple[Any, ...]) -> Any:
        """An argument of an elementwise operation: a tensor broadcast to ``out``, or a number."""
        if (example := tensor_of(arg)) is not None:
            return self.value(arg, self.broadcast(example.shape, coords, example_of(out).shape))
        arg = number(arg)
        if isinstance(arg, bool):
            return sympy.sympify(arg)
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
        return whole + sympy.floor(rest / n), sympy.Mod(rest, n)

    def index(self, arg: Any) -> sympy.Expr:
        """A size, offset or index that is a number or a zero-dimensional tensor, as an integer expression."""
        example = tensor_of(arg)
        if example is None:
            return size_expr(arg)
        if example.dim() != 0:
            raise _NoRule
        return _integer(self.value(arg, ()))


def _terms(node: Node) -> list[tuple[Node, float]]:
    """The tensors that a floating one is the sum of, each with its sign; none where that is not known."""
    op = operation(node)
    if op is None or not example_of(node).dtype.is_floating_point:
        return []
    if op.name in (*_SAME, "to"):
        return [(op.node(), 1.0)]
    parts = [op.get("input"), op.get("other")]
    plain = op.name in ("add", "sub") and is_number(op.get("alpha", 1), 1)
    if not plain or any(tensor_of(part) is None for part in parts):
        return []
    return [(parts[0], 1.0), (parts[1], 1.0 if op.name == "add" else -1.0)]


def _elements(node: Node) -> Sequence[Node]:
    """What the elements of a tensor are made from, one from one."""
    op = operation(node)
    return node.all_input_nodes if op is not None and op.name in _RULES else ()


def example_of(node: Node) -> torch.Tensor:
    """The fake tensor a node stands for; raises :class:`Unproven` if it is no tensor."""
    example = tensor_of(node)
    if example is None:
        raise Unproven(f"{spoken(node)}, which it is made from, is not a tensor")
    return example


def _same_place(a: Any, b: Node) -> bool:
    """Whether two nodes are the same elements of the same memory."""
    if a is b:
        return True
    x, y = tensor_of(a), tensor_of(b)
    if x is None or y is None or x.dtype != y.dtype:
        return False
    return same_sizes(*((*tensor.shape, *tensor.stride(), tensor.storage_offset()) for tensor in (x, y)))


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
    then, other = _where(condition, then), _where(sympy.Not(condition), other)
    if then == other:
        return then
    if _is_condition(then) and _is_condition(other):
        if then is sympy.true or other is sympy.true:
            return sympy.Or(condition, other) if then is sympy.true else sympy.Or(sympy.Not(condition), then)
        return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), other))
    return _Select(condition, _number(then), _number(other))


def _where(condition: Boolean, value: Any) -> Any:
    """``value`` where a condition holds that its own cases ask for again."""
    while isinstance(value, _Select) and condition in (value.condition, sympy.Not(value.condition)):
        value = value.then if condition == value.condition else value.other
    return value


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


def _additive(value: Any, factor: float, hidden: float, evaluator: Evaluator) -> tuple[Boolean, Any]:
    """Where a score is shown to which ``value`` is added ``factor`` times, and what is added there, None if nothing is
    shown. That has to be the same for all keys of a query: then no softmax sees it."""
    if isinstance(value, _Select):
        cases = [_additive(case, factor, hidden, evaluator) for case in (value.then, value.other)]
        (then, added), (other, rest) = cases
        if added is None or rest is None or added == rest:
            return _select(value.condition, then, other), rest if added is None else added
        if value.condition.has(_K):
            raise _adds(rest if added == 0 else added, factor, hidden, evaluator)
        return _select(value.condition, then, other), _Select(value.condition, added, rest)
    if value.is_number and float(value) * factor <= hidden:
        return sympy.false, None
    lifts = value.is_number and float(value) * factor >= -hidden  # no score is left of that
    if lifts or value.has(_K) or any(map(evaluator.may_hide, value.atoms(AppliedUndef))):
        raise _adds(value, factor, hidden, evaluator)
    return sympy.true, value


def _adds(value: Any, factor: float, hidden: float, evaluator: Evaluator) -> Unproven:
    """The refusal of what is added to the scores of some keys alone."""
    while isinstance(value, _Select):
        value = value.then
    if value.is_number:
        return Unproven(
            f"it adds {float(value) * factor:g} to scores: neither 0 nor {hidden:g} or less, which hides them",
            "float('-inf') for hidden keys",
        )
    names = sorted(leaf_names(value, evaluator))
    return Unproven(
        f"it adds the values of {', '.join(names) or formula(value, evaluator)}, which are not known when compiling",
        provable(value, evaluator),
    )


def provable(expression: Any, evaluator: Evaluator) -> str:
    """What would be proven in the place of ``expression``, whose values are not known: the same in a buffer, if it is
    made of what holds a triangle or a band now."""
    around = evaluator.around
    leaves = (evaluator.leaves[leaf.func] for leaf in expression.atoms(AppliedUndef))
    made_of = {around.outer.get(x, x) for leaf in leaves for x in reached(leaf, sources) if x.op == "placeholder"}
    given = sorted(map(spoken, filter(around.buffers.is_given_band, made_of)))
    if len(given) != 1 or any(tensor_of(x) is not None and around.buffers.band(x) is None for x in made_of):
        return PROVABLE
    (name,) = re.findall(r"\w+", given[0])[-1:]
    return f"{given[0]} as a buffer, whose values are read when compiling: self.register_buffer('{name}', ...)"


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


# ---- rules: an element of a result from those of its operands --------------------------------------------------------


@dataclass(frozen=True)
class _Element:
    """The element at ``coords`` of what ``node`` computes, by ``op``."""

    evaluator: Evaluator
    node: Node
    op: Operation
    coords: tuple[Any, ...]

    @property
    def dtype(self) -> torch.dtype:
        return example_of(self.node).dtype

    @property
    def source(self) -> torch.Tensor:
        """The first operand."""
        return example_of(self.op.get("input"))

    def operand(self, name: str) -> Any:
        return self.evaluator.operand(self.op.get(name), self.node, self.coords)

    def number(self, name: str) -> Any:
        return _number(self.operand(name))

    def boolean(self, name: str) -> Boolean:
        return _boolean(self.operand(name))

    def settled(self, name: str) -> Any:
        """An operand as the result holds it."""
        example, value = tensor_of(self.op.get(name)), self.operand(name)
        return value if example is not None and example.dtype == self.dtype else _settle(value, self.dtype)

    def moved(self, coords: Sequence[Any]) -> Any:
        """The element of the first operand at other coordinates."""
        return self.evaluator.value(self.op.get("input"), tuple(coords))

    def dim(self, default: Any = None) -> int:
        """The dimension that the operation goes along."""
        dim = self.op.get("dim", default)
        if not isinstance(dim, int) or not self.coords:
            raise _NoRule
        return dim % len(self.coords)

    def along(self, dim: int, place: Any) -> tuple[Any, ...]:
        """Its coordinates, with another one in ``dim``."""
        return (*self.coords[:dim], place, *self.coords[dim + 1 :])


_Rule = Callable[[_Element], Any]


def _arithmetic(function: Callable[[Any, Any], Any]) -> _Rule:
    def rule(at: _Element) -> Any:
        if isinstance(at.op.get("alpha", 1), Node):
            raise _NoRule
        alpha = _real(float(at.op.get("alpha", 1)))
        return _map(_known(lambda x, y: function(x, y * alpha)), at.number("input"), at.number("other"))

    return rule


def _division(at: _Element) -> Any:
    """``/`` of numbers; ``//`` and ``%`` of an integer expression by a positive integer."""
    a, b = at.number("input"), at.number("other")
    rounding = "floor" if at.op.name == "floor_divide" else at.op.get("rounding_mode")
    if isinstance(b, _Select) or not b.is_number or not b.is_nonzero or rounding not in (None, "floor"):
        raise _NoRule
    if at.op.name == "div" and rounding is None:
        return _map(_known(lambda x: x / b), a)
    if isinstance(a, _Select) or not a.is_integer or not b.is_Integer or not b.is_positive:
        raise _NoRule
    return _known(lambda x: at.evaluator.divided(x, b)[at.op.name == "remainder"])(a)


def _numbers(function: Callable[..., Any], *names: str) -> _Rule:
    return lambda at: _map(function, *(at.number(name) for name in names))


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        if not all(value.is_number for value in values):
            raise _NoRule
        return function(*values)

    return checked


def _clamp(at: _Element) -> Any:
    limits = {"min": sympy.Max, "max": sympy.Min}
    value = at.number("input")
    for name, function in limits.items():
        if at.op.get(name) is not None:
            value = _map(_of_numbers(function), value, at.number(name))
    return value


def _compare(relation: type[Relational], a: Any, b: Any) -> Boolean:
    # a fraction is compared in floating point, where a large integer is rounded
    if not (a.is_number and b.is_number) and not (a.is_integer and b.is_integer):
        if not any(isinstance(x, AppliedUndef) and y.is_number for x, y in ((a, b), (b, a))):
            raise _NoRule
    ordered = relation not in (sympy.Eq, sympy.Ne)
    if ordered and any(isinstance(x, AppliedUndef) and not x.is_integer for x in (a, b)):
        raise _NoRule  # NaN: "not >" is not "<="
    return relation(a, b)


def _logic(function: Callable[..., Boolean], bitwise: bool) -> _Rule:
    def rule(at: _Element) -> Any:
        if bitwise and at.dtype != torch.bool:
            raise _NoRule
        return function(*(at.boolean(name) for name in ("input", "other") if name in at.op.args))

    return rule


def _either(condition: str, then: str, other: str) -> _Rule:
    return lambda at: _select(at.boolean(condition), at.settled(then), at.settled(other))


def _triangle(relation: type[Relational]) -> _Rule:
    def rule(at: _Element) -> Any:
        kept = relation(at.coords[-1] - at.coords[-2], at.evaluator.index(at.op.get("diagonal", 0)))
        value = at.operand("input")
        return _select(kept, value, sympy.false if _is_condition(value) else sympy.S.Zero)

    return rule


def _on_diagonal(at: _Element, value: Any, other: Any) -> Any:
    """``value`` where a row and a column of a matrix have the same number, and ``other`` elsewhere."""
    if len(at.coords) != 2 or at.op.get("wrap"):
        raise _NoRule
    return _select(sympy.Eq(*at.coords), value, other)


def _diagonal(at: _Element) -> Any:
    """A vector as the diagonal of a matrix."""
    if at.source.dim() != 1 or at.op.get("diagonal", 0) != 0:
        raise _NoRule
    return _on_diagonal(at, at.moved([at.coords[0]]), sympy.S.Zero)


def _fill(name: str) -> _Rule:
    def rule(at: _Element) -> Any:
        if tensor_of(at.op.get(name)) is not None:
            raise _NoRule
        return at.operand(name)

    return rule


def _arange(at: _Element) -> Any:
    return at.evaluator.index(at.op.get("start")) + at.coords[0] * at.evaluator.index(at.op.get("step"))


def _cast(at: _Element) -> Any:
    value, old = at.operand("input"), at.source.dtype
    if isinstance(value, AppliedUndef) and at.dtype != torch.bool and torch.promote_types(old, at.dtype) != at.dtype:
        raise _NoRule  # unknown values that may not fit
    return value


def _reshape(at: _Element) -> Any:
    """Dimensions in row-major order, some of them taken apart or put together."""
    inner, shape = at.source.shape, example_of(at.node).shape
    place = [sympy.S.Zero] * len(inner)
    own, others = _nonunit(inner), _nonunit(shape)
    for parts, wholes in _groups([inner[i] for i in own], [shape[j] for j in others]):
        flat = sympy.S.Zero
        for j in (others[j] for j in wholes):
            flat = flat * size_expr(shape[j]) + at.coords[j]
        first, *rest = (own[i] for i in parts)
        for i in reversed(rest):
            flat, place[i] = at.evaluator.divided(flat, size_expr(inner[i]))
        place[first] = flat
    return at.moved(place)


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


def _repeat(at: _Element) -> Any:
    inner, shape = at.source.shape, example_of(at.node).shape
    own = len(at.coords) - len(inner)
    places = [
        sympy.S.Zero if n == 1 else at.evaluator.divided(x, n)[1]
        for x, n in zip(at.coords[own:], map(size_expr, inner), strict=True)
    ]
    once = map(known_equal, inner, shape[own:])
    return at.moved([x if whole else place for x, place, whole in zip(at.coords[own:], places, once, strict=True)])


def _repeat_interleave(at: _Element) -> Any:
    repeats = size_expr(at.op.get("repeats"))
    if not repeats.is_positive:
        raise _NoRule
    dim = at.dim()
    first = is_one(at.source.shape[dim])
    return at.moved(at.along(dim, sympy.S.Zero if first else at.evaluator.divided(at.coords[dim], repeats)[0]))


def _cat(at: _Element) -> Any:
    """One tensor behind the other."""
    parts, dim = at.op.get("tensors"), at.dim(0)
    if not isinstance(parts, list | tuple) or not parts:
        raise _NoRule
    examples = [tensor_of(part) for part in parts]
    if any(example is None or example.dim() != len(at.coords) for example in examples):
        raise _NoRule
    sizes = [example_of(part).shape[dim] for part in parts]
    starts = list(itertools.accumulate(map(size_expr, sizes[:-1]), initial=sympy.S.Zero))
    values = []
    for part, size, start in zip(parts, sizes, starts, strict=True):
        place = sympy.S.Zero if is_one(size) else at.coords[dim] - start
        values.append(_settle(at.evaluator.value(part, at.along(dim, place)), at.dtype))
    value = values[-1]
    for before, end in zip(reversed(values[:-1]), reversed(starts[1:]), strict=True):
        value = _select(sympy.Lt(at.coords[dim], end), before, value)
    return value


def _padded(at: _Element) -> Any:
    """A tensor between constants; a negative number takes away from it."""
    pads, filler = at.op.get("pad"), at.op.get("value")
    if at.op.get("mode") != "constant" or not isinstance(pads, list | tuple) or len(pads) % 2:
        raise _NoRule
    shape, places, outside = at.source.shape, list(at.coords), []
    for dim, before, after in zip(range(len(places) - 1, -1, -1), pads[::2], pads[1::2], strict=False):
        first, last = size_expr(before), size_expr(after)
        places[dim] = at.coords[dim] - first
        outside += [] if first.is_nonpositive else [sympy.Lt(at.coords[dim], first)]
        outside += [] if last.is_nonpositive else [sympy.Ge(places[dim], size_expr(shape[dim]))]
        places[dim] = sympy.S.Zero if is_one(shape[dim]) else places[dim]
    filled = _settle(at.evaluator.operand(0 if filler is None else filler, at.node, at.coords), at.dtype)
    return _select(sympy.Or(*outside), filled, at.moved(places))


def _permuted(at: _Element) -> Any:
    order = order_of(at.op, len(at.coords))
    if not order:
        raise _NoRule
    return at.moved([at.coords[order.index(d)] for d in range(len(order))])


def _cumsum(at: _Element) -> Any:
    """A running sum of a constant."""
    dim, step = at.dim(), sympy.Dummy("t", integer=True, nonnegative=True)
    each = _number(at.moved(at.along(dim, step)))
    if isinstance(each, _Select) or not each.is_number or not each.is_Integer:
        raise _NoRule
    return each * (at.coords[dim] + 1)


def _diff(at: _Element) -> Any:
    source, prepend, dim = at.op.get("input"), at.op.get("prepend"), at.dim(-1)
    if at.op.get("n", 1) != 1 or at.op.get("append") is not None or at.source.dtype == torch.bool:
        raise _NoRule

    def difference(i: Any, before: Node, j: Any) -> Any:
        values = at.evaluator.value(source, at.along(dim, i)), at.evaluator.value(before, at.along(dim, j))
        return _map(_known(operator.sub), *values)

    i = at.coords[dim]
    if prepend is None:
        return difference(i + 1, source, i)
    if not isinstance(prepend, Node) or not is_one(example_of(prepend).shape[dim]):
        raise _NoRule
    first = difference(sympy.S.Zero, prepend, sympy.S.Zero)
    return _select(sympy.Eq(i, 0), first, difference(i, source, i - 1))


# ---- indexing: what each item of an index does to the dimensions -------------------------------------------------


def _getitem(at: _Element) -> Any:
    if tensor_of(at.op.get("input")) is None:
        raise _NoRule  # one of several results
    shape = at.source.shape
    items = _spelled_out(at.op.get("index"), len(shape))
    block = _gathered(items)
    gathered = at.coords[block], example_of(at.node).shape[block]
    rest = [*at.coords[: block.start], *at.coords[block.stop :]]
    places: list[Any] = []
    for item in items:
        if item is None:
            rest.pop(0)
        elif isinstance(item, slice):
            places.append(_sliced(at.evaluator, item, shape[len(places)], rest.pop(0)))
        elif tensor_of(item) is not None:
            places.append(_looked_up(at, item, *gathered))
        else:
            places.append(_from_start(at.evaluator.index(item), shape[len(places)]))
    return at.moved(places)


def _spelled_out(index: Any, rank: int) -> list[Any]:
    """An index with an item for each of ``rank`` dimensions, and None for those that are inserted."""
    if isinstance(index, list):
        raise _NoRule
    items = list(index) if isinstance(index, tuple) else [index]
    missing = [slice(None)] * (rank - sum(item is not None and item is not Ellipsis for item in items))
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    return [*items[:at], *missing, *items[at + 1 :]]


def _gathered(items: Sequence[Any]) -> slice:
    """The dimensions of the result that its index tensors make; ``_NoRule`` for those whose place is not plain."""
    indexing = [i for i, item in enumerate(items) if tensor_of(item) is not None]
    tensors = [example_of(items[i]) for i in indexing]
    if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors):
        raise _NoRule
    if tensors and any(isinstance(item, int) or (isinstance(item, Node) and tensor_of(item) is None) for item in items):
        raise _NoRule
    ranks = [tensor.dim() for tensor in tensors]
    rank = max(ranks, default=0)
    if rank > 0 and 0 in ranks:
        raise _NoRule  # a scalar tensor selects like an int, which decides where the other indices' dimensions go
    together = bool(indexing) and indexing == list(range(indexing[0], indexing[-1] + 1))
    start = indexing[0] if together else 0
    return slice(start, start + rank)


def _looked_up(at: _Element, item: Node, coords: Sequence[Any], sizes: Sequence[Any]) -> sympy.Expr:
    try:
        place = at.evaluator.value(item, at.evaluator.broadcast(example_of(item).shape, coords, sizes))
    except Unproven:
        if not at.dtype.is_floating_point:
            raise
        raise _NoRule from None  # that values are added says more than how their places are made
    return _not_negative(_integer(place))


def _sliced(evaluator: Evaluator, item: slice, size: Any, coord: Any) -> Any:
    if item.step not in (None, 1):
        raise _NoRule
    return coord if item.start is None else coord + _from_start(evaluator.index(item.start), size)


def _from_start(place: sympy.Expr, size: Any) -> sympy.Expr:
    """A place that may be counted from the end."""
    return _not_negative(place + size_expr(size) if place.is_negative else place)


def _not_negative(place: sympy.Expr) -> sympy.Expr:
    if not place.is_nonnegative:
        raise _NoRule
    return place


RELATIONS = {"eq": sympy.Eq, "ne": sympy.Ne, "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge}
_LOGIC: dict[str, Callable[..., Boolean]] = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor, "not": sympy.Not}
_SAME = ("expand", "broadcast_to", "expand_as", "contiguous", "clone", "detach")
"""The operations whose result broadcasts as their operand does, and holds the same."""
_MOVES: dict[str, _Rule] = {
    "getitem": _getitem,
    **dict.fromkeys(("unsqueeze", "squeeze", "flatten", "unflatten", "view", "reshape"), _reshape),
    **dict.fromkeys(_SAME, lambda at: at.operand("input")),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("transpose", "permute"), _permuted),
}
_SETTLED = frozenset((*_MOVES, "where", "masked_fill", "tril", "triu", "fill_diagonal"))
"""The operations whose rules give values as tensors of the result's dtype hold them."""
_RULES: dict[str, _Rule] = {
    **_MOVES,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    **dict.fromkeys(("div", "floor_divide", "remainder"), _division),
    "maximum": _numbers(_of_numbers(sympy.Max), "input", "other"),
    "minimum": _numbers(_of_numbers(sympy.Min), "input", "other"),
    **dict.fromkeys(("clamp", "clamp_min"), _clamp),
    "log": _numbers(_of_numbers(lambda x: sympy.S.NegativeInfinity if x == 0 else sympy.Float(math.log(x))), "input"),
    "neg": _numbers(_known(operator.neg), "input"),
    "abs": _numbers(_known(sympy.Abs), "input"),
    **{name: _numbers(partial(_compare, relation), "input", "other") for name, relation in RELATIONS.items()},
    **{f"bitwise_{name}": _logic(function, True) for name, function in _LOGIC.items()},
    **{f"logical_{name}": _logic(function, False) for name, function in _LOGIC.items()},
    "where": _either("condition", "input", "other"),
    "masked_fill": _either("mask", "value", "input"),
    "tril": _triangle(sympy.Le),
    "triu": _triangle(sympy.Ge),
    "cumsum": _cumsum,
    "diff": _diff,
    "arange": _arange,
    **dict.fromkeys(("tensor", "scalar_tensor"), _fill("data")),
    **dict.fromkeys(("full", "new_full", "full_like"), _fill("fill_value")),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), lambda at: sympy.S.One),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), lambda at: sympy.S.Zero),
    "fill": _fill("value"),
    "eye": lambda at: _on_diagonal(at, sympy.S.One, sympy.S.Zero),
    "fill_diagonal": lambda at: _on_diagonal(at, at.settled("fill_value"), at.operand("input")),
    "diag": _diagonal,
    "to": _cast,
    "cat": _cat,
    "pad": _padded,
}
