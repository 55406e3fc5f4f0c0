"""Attention that is written out: a product of queries and keys, a scale, masks, a softmax, a product with values.

:func:`describe` starts at the softmax. Backward it peels off what may happen to scores until it reaches the product of
queries and keys, and remembers what every step means; forward it follows the weights to the one product that uses
them. There are no templates: every step is read in its one spelling (``normalize.py``) and either has a meaning here or
is the reason of a refusal. The :data:`Expand` that it returns writes
``scaled_dot_product_attention`` in the place of all of it.

Scores become ``factor * query @ key^T + sum of (factor_i * term_i)``, hidden where a mask says so. Whatever is added
or filled in is a mask to the prover (``mask.py``), which tells causal masks and paddings from biases; for exact
attention it stays what it is. Filling with or adding -1e9 or less hides a score: scores are taken to be larger. So
does the lowest number of a dtype that has none so low, and so scores may be lifted to a number that hides. What is
filled with the lowest number stays hidden whatever is added later, for that is taken to be far from the largest one.

Reads ``[..., H, L, D]``, ``[B * H, L, D]`` (B and H from a view of the scores, else H = 1), ``[L, D]``, and einsum.
Refuses soft-caps, sinks, scores or weights that are written, and weights that are used again.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import sympy
import torch
import torch.nn.functional as F
from sympy.logic.boolalg import Boolean
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..core.spec import AttentionSpec, Mask, known_equal
from .layout import Layout, layout_of, prove_rows
from .mask import MaskPart, Padding, unknown
from .nodes import is_parted, reached, same_sizes, sources, tensor_of
from .normalize import Operation, dropped, in_place, is_number, known, number, operation, order_of, performed
from .repeat import unrepeated
from .scale import unscaled
from .site import PADDED, Emit, Operand, Refused, Scope, check_heads, entered, make_spec
from .symbolic import COORDINATES, Evaluator, Unproven, hidden_by
from .words import label, spoken

_B, _H, _Q, _K = COORDINATES
PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
_COPIES = ("to", "contiguous", "clone")
_NO_SINKS = "a softmax over the keys alone; it is that of another model"
_HIDES = "float('-inf') for scores that are hidden"
_OUTSIDE = (
    "its scores are an input of the graph",
    "its query-key product in the same graph: TORCH_LOGS=graph_breaks shows what parts them",
)
_OUTPUT_ALONE = "the output alone: output_attentions=False, need_weights=False"
_WEIGHTS = {
    **dict.fromkeys(("add", "sub"), "added to others or taken from them (differential attention)"),
    **dict.fromkeys(("mul", "div"), "multiplied"),
    "getitem": "sliced (sinks)",
}
_CLAMPED = ("it clamps its scores", "scores that are not clamped: no softmax of torch overflows")
_NAMES = {
    "tanh": ("it caps its scores (tanh)", "scores without a cap; they are those of another model"),
    **dict.fromkeys(("cat", "concat", "concatenate"), ("it appends scores of its own (sinks)", _NO_SINKS)),
    **dict.fromkeys(
        ("permute", "transpose"), ("it rearranges its scores before the softmax, as talking heads do", None)
    ),
    "topk": ("it keeps the largest scores only", None),
}


@dataclass
class _Scores:
    """What happens between the product of queries and keys and the softmax, from the softmax back.

    factor: of everything further back, so far. added: tensors added to scores, with their factor and the tensor of
    scores that they broadcast to. filled: the same for boolean masks, and whether True hides.
    fills: the numbers that hide, as the softmax sees them. late: whether something is added to finite ones.
    scaled: tensors that are the same for all keys, and numbers that are not known, by which the product is multiplied
    ("mul") or divided ("div"), and the result. kept: masks of 1 and 0 that multiply scores which something hides later
    where they are 0, the result, and how many of ``added`` and ``filled`` come later.
    """

    factor: float = 1.0
    added: list[tuple[Node, float, Node]] = field(default_factory=list)
    filled: list[tuple[Node, bool, Node]] = field(default_factory=list)
    steps: list[Node] = field(default_factory=list)
    fills: set[float] = field(default_factory=set)
    late: bool = False
    scaled: list[tuple[str, Node, Node]] = field(default_factory=list)
    kept: list[tuple[Node, Node, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Softmax:
    """A softmax in one of its spellings: of ``scores`` over ``dim``, by ``nodes``, of which the last is the result.

    total: the node that has their sum, or its logarithm, if that is another one. sign: -1 for a softmin.
    """

    scores: Any
    dim: Any
    nodes: tuple[Node, ...]
    total: Node | None = None
    sign: float = 1.0


def softmax_of(node: Node) -> Softmax | None:
    """The softmax that ``node`` is the result of: torch's own, ``exp(log_softmax(s))``, ``exp(s - logsumexp(s))`` or
    ``exp(s) / sum(exp(s))``; None for every other node."""
    op = performed(node)
    return _SOFTMAXES[op.name](op, node) if op is not None and op.name in _SOFTMAXES else None


def _own(op: Operation, node: Node) -> Softmax:
    return Softmax(op.get("input"), op.get("dim"), (node,), sign=1.0 if op.name == "softmax" else -1.0)


def _divided(op: Operation, node: Node) -> Softmax | None:
    before, total = op.get("input"), op.get("other")
    inner = performed(before)
    if inner is None or inner.name != "exp" or op.get("rounding_mode") is not None:
        return None
    return Softmax(inner.get("input"), -1, (before, node), total) if _is_total(total, "sum", before) else None


def _exponential(op: Operation, node: Node) -> Softmax | None:
    before = op.get("input")
    inner = operation(before)
    if inner is None or inner.name not in ("log_softmax", "sub") or not is_number(inner.get("alpha", 1), 1):
        return None
    scores, total = inner.get("input"), inner.get("other")
    if inner.name == "log_softmax":
        return Softmax(scores, inner.get("dim"), (before, node))
    return Softmax(scores, -1, (before, node), total) if _is_total(total, "logsumexp", scores) else None


def _is_total(node: Any, name: str, of: Node) -> bool:
    """Whether a node reduces another by ``name`` over its last dimension, which is kept."""
    op, kept = _reduced(node)
    return op is not None and op.name == name and kept and op.get("input") is of and _over_last(op, of)


_SOFTMAXES: dict[str, Callable[[Operation, Node], Softmax | None]] = {
    **dict.fromkeys(("softmax", "softmin"), _own),
    "div": _divided,
    "exp": _exponential,
}


def feeds_product(written: Softmax) -> bool:
    """Whether a softmax's result is a factor of a matrix product, possibly after dropout, a cast or a slice.

    Where its scores are an input of the graph (a graph break parts them from their product), it has to be the first
    factor of a batch of products, as the weights of experts or layers seldom are. Those that are look like one query.
    """
    outside = _from_inputs(written.scores)
    fixed = (*VIEWS, *_COPIES, "dropout", "detach", "getitem", "expand", "transpose", "permute")

    def after(node: Node) -> Iterator[Node]:
        for user in node.users:
            op = operation(user)
            if op is not None and op.name in fixed and op.get("input") is node:
                yield user

    for weights in reached(written.nodes[-1], after):
        for op in filter(None, map(operation, weights.users)):
            if op.name in PRODUCTS and not (op.name == "baddbmm" and op.get("input") is weights):
                if not outside or _weighs_batch(op, weights):
                    return True
    return False


def products(softmax: Node) -> list[Node]:
    """The product that the scores of a softmax begin with, and that of its weights with the values, if they are found.

    It is a search, no proof.
    """
    of_keys = _nearest(softmax, sources, lambda node: _stays_scores(node, softmax))
    return [*of_keys, *_nearest(softmax, lambda node: node.users, lambda node: True)]


def _nearest(start: Node, further: Callable[[Node], Iterable[Node]], fits: Callable[[Node], bool]) -> list[Node]:
    """The nearest product that fits, or none; what lies beyond another softmax belongs to that."""
    inside = reached(start, lambda node: further(node) if node is start or softmax_of(node) is None else ())
    return list(itertools.islice((node for node in inside if _is_product(node) and fits(node)), 1))


def _is_product(node: Any) -> bool:
    op = operation(node)
    return op is not None and op.name in PRODUCTS


def _from_inputs(scores: Any) -> bool:
    """Whether scores, which may have been scaled, masked and added to, are inputs of the graph."""

    def before(node: Node) -> list[Any]:
        op = _step_of(node)
        if op is None or op.name in VIEWS:
            return [] if op is None else [op.get("input")]
        return [x for x in (op.get("input"), op.get("other")) if _is_scores(x, node)]

    nodes = list(reached(scores, before))
    return bool(nodes) and all(_is_input(node) or _step_of(node) is not None for node in nodes)


def _step_of(node: Any) -> Operation | None:
    """One of the operations that may happen to scores; None for others."""
    op = performed(node)
    return op if op is not None and op.name in _STEPS else None


def _is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _multiplied(op: Operation) -> Sequence[Any]:
    """The factors of a product."""
    if op.name == "einsum":
        operands: Sequence[Any] = op.get("operands", ())
        return operands
    return [op.get(name) for name in (("batch1", "batch2") if op.name == "baddbmm" else ("input", "other"))]


def _weighs_batch(op: Operation, weights: Node) -> bool:
    """Whether a product has ``weights`` as its first factor and values of three or four dimensions as its second."""
    factors = _multiplied(op)
    return len(factors) == 2 and factors[0] is weights and rank_of(factors[1]) in (3, 4)


def leaves_graph(product: Node) -> Node | None:
    """What a product of queries and keys has become where the graph returns it as scores, without a softmax.

    None for every other node. The product has three or four dimensions; scores may be scaled, masked and added to.
    """
    op = operation(product)
    if op is None or op.name not in PRODUCTS or rank_of(product) not in (3, 4) or not is_of_keys(op):
        return None
    left = None

    def after(node: Node) -> Iterator[Node]:
        return (user for user in node.users if _step_of(user) is not None and _stays_scores(node, user))

    for node in reached(product, after):
        if any(softmax_of(user) is not None for user in node.users):
            return None
        left = node if any(user.op == "output" for user in node.users) else left
    return left


def letters(op: Operation) -> tuple[str, str, str]:
    """The letters of the first two factors of an einsum and of its result, ``""`` for those that it does not have."""
    inputs, _, result = op.get("equation").replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    return first, second, result


def is_of_keys(op: Operation) -> bool:
    """Whether a product sums over the last dimension of both factors; weights and values have another."""
    if op.name == "einsum":
        first, second, result = letters(op)
        return bool(first and second) and first[-1] == second[-1] and first[-1] not in result
    key = _multiplied(op)[1]
    while (turned := operation(key)) is not None:
        before = turned.get("input")
        if turned.name in ("transpose", "permute"):
            return order_of(turned, rank_of(key))[-2:-1] == [rank_of(key) - 1]
        if turned.name not in (*VIEWS, *_COPIES) or not _stays_scores(before, key):
            return False
        key = before
    return False


def rank_of(node: Any) -> int:
    """The number of dimensions; 0 for what :func:`_example` refuses."""
    example = tensor_of(node)
    return 0 if example is None or is_parted(example) else example.dim()


def _stays_scores(before: Node, after: Node) -> bool:
    """Whether ``after`` has the last two sizes of ``before``."""
    if rank_of(before) < 2 or rank_of(after) < 2:
        return False
    return same_sizes(_shape(before)[-2:], _shape(after)[-2:])


def describe(scope: Scope, written: Softmax) -> dict[str, Any]:
    """What the attention around a softmax computes, as fields of its site, whose node is the product with values.

    Raises :class:`Refused` with the first condition that is not met.
    """
    weights, zeroed, out, dropout_p = _follow(written, scope)
    scores, product = _peel(scope, written)
    query, key = _factors(product)
    chain = [product, *reversed(scores.steps), *written.nodes, *weights]
    used = chain[-1]
    value = _values(used, out)
    whole = chain if written.total is None else [*chain, written.total]
    _check_order(scope, whole, out, (query.node, key.node), scores)
    _check_precision(whole, _example(value.node).dtype)
    shapes = [_shape(node) for node in chain]
    _check_views(chain, shapes)
    query, key, value = _one_dtype(scope, out, query, key, value)
    whole_key = key.node
    key, value = _before_repeat(scope, out, query, key, value)
    layout, mask, padding = _prove(scope, scores, layout_of(shapes, key.shape), shapes, out)
    if scores.kept and mask.unknown is not None:
        raise Refused(f"its mask is not proven: {mask.unknown}")
    _check_kept(scores, scope, layout, padding)
    query, key, value = layout.queries(query), layout.keys(key, shapes[0][:-1]), layout.keys(value, shapes[-1][:-1])
    layout.places(shapes[-1][:-1])  # where the result is put back
    check_heads(query.shape, key.shape, value.shape, repeats=layout.grouped or key.node is not whole_key)
    (query, of_query), (key, of_key) = (unscaled(scope, x) for x in (query, key))
    scores.factor *= of_query * of_key
    query = _times(query, scores, layout)
    if scores.factor <= 0:
        raise Refused(f"its scale {scores.factor:g} is not positive")
    spec = make_spec(out, query, key, value, scale=scores.factor, mask=mask, dropout_p=dropout_p)
    expand = partial(_write, _Attention((query, key, value), scores, spec, layout, out, used, scope.contexts))
    found = {"node": out, "spec": spec, "padding": padding, "expand": expand}
    if _zeroes(zeroed, scores, scope, layout) or not _averages(scores, spec):
        return {**found, "exact": expand}
    # one mask that is added and one that is filled in may hide all keys of a row together, each some of them
    evaluator = Evaluator(scope, written.nodes[-1])
    is_equal = len(scores.fills) == 1 and not scores.late and not any(_hides(*x, evaluator) for x in scores.added)
    return {**found, "exact": partial(expand, averages=True) if is_equal else None, "averages": True}


_BY_TENSOR = (
    "its scores are scaled by a tensor, whose values are not known when compiling",
    "a query or a key that is multiplied by it, or a number",
)


def _times(query: Operand, scores: _Scores, layout: Layout) -> Operand:
    """``query`` ``[B, H, Lq, D]`` times the tensors by which its product with the keys is multiplied."""
    dtype = query.example.dtype
    for how, by, result in scores.scaled:
        term = by if tensor_of(by) is None else layout.term(Operand(by), _shape(result)[:-1])
        query = query.then(getattr(torch, how), term)
        query = query if query.example.dtype == dtype else query.then(torch.Tensor.to, dtype)
    return query


def _hides(term: Node, factor: float, like: Node, evaluator: Evaluator) -> bool:
    """Whether a tensor that is added to scores is known to hide some of them."""
    try:
        return evaluator.visible(term, _anywhere(rank_of(like)), _shape(like), factor=factor) is not sympy.true
    except Unproven:
        return False


def _averages(scores: _Scores, spec: AttentionSpec) -> bool:
    """Whether there may be rows whose keys are all hidden, and by finite numbers: they get the mean of the values."""
    mask = spec.mask
    if all(fill == -math.inf for fill in scores.fills):
        return False
    if mask.unknown is not None or mask.padding or mask.segments:
        return True
    if not mask.causal and mask.window is None:
        return False
    known = isinstance(mask.offset, int) and mask.offset >= 0
    return not known or not (mask.window is None or known_equal(mask.offset, spec.Lk - spec.Lq))


# ---- reading -------------------------------------------------------------------------------------------------------


def _example(node: Any) -> torch.Tensor:
    example = tensor_of(node)
    if example is None:
        raise Refused("its operands are not tensors of the graph")
    if is_parted(example):
        raise Refused(f"{spoken(node)} is a nested or sparse tensor", PADDED)
    return example


def _shape(node: Node) -> torch.Size:
    return _example(node).shape


def _sizes(node: Node) -> Sequence[Any]:
    """The shape of a tensor; none for a number."""
    return () if tensor_of(node) is None else _shape(node)


_Zeroed = tuple[Node, bool, Node]
"""A mask, whether True sets attention weights to 0, and the node that does so."""


def _follow(written: Softmax, scope: Scope) -> tuple[list[Node], list[_Zeroed], Node, float]:
    """The nodes that the weights pass through, what sets some of them to 0, the product that uses them, and the
    probability of dropping one."""
    node = written.nodes[-1]
    dim, rank = written.dim, len(_shape(node))
    if dim not in (-1, rank - 1):
        raise Refused(f"its softmax is over dimension {dim} of {rank}, not over the last")
    path: list[Node] = []
    zeroed: list[_Zeroed] = []
    dropout_p = 0.0
    while True:
        if len(node.users) != 1:
            raise Refused("its attention weights are used more than once", _OUTPUT_ALONE)
        user = next(iter(node.users))
        op = operation(user)
        after = next(iter(user.users), user)
        if _is_product(user) or (len(user.users) == 1 and _is_reversed(after, node)):
            return path, zeroed, user if _is_product(user) else after, dropout_p
        masked = _zeroing(op, node, scope)
        zeroed += [] if masked is None else [(*masked, user)]
        passes = op is not None and op.get("input") is node and op.name in (*VIEWS, *_COPIES, "dropout", "nan_to_num")
        if op is None or not (passes or masked):
            name = (op or in_place(user) or Operation(label(user))).name
            what = _WEIGHTS.get(name, f"given to '{label(user)}'")
            nearest = _NO_SINKS if name == "getitem" else None
            raise Refused(f"its attention weights are {what} before they meet the values", nearest)
        if op.name == "nan_to_num" and op.get("nan") is not None and not is_number(op.get("nan"), 0):
            raise Refused("it puts another number than 0 in the place of attention weights that are NaN")
        dropped = _dropped(op) if op.name == "dropout" else 0.0
        if dropped and dropout_p:
            raise Refused("it drops attention weights twice")
        dropout_p = dropped or dropout_p
        path.append(user)
        node = user


def _zeroing(op: Operation | None, weights: Node, scope: Scope) -> tuple[Node, bool] | None:
    """The mask by which an operation puts 0 in the place of some of ``weights``, and whether True does; else None."""
    if op is None or op.name not in ("masked_fill", "where"):
        return None
    hides = op.name == "masked_fill" or op.get("other") is weights
    names = ("mask", "input", "value") if op.name == "masked_fill" else ("condition", "input", "other")
    mask, kept, zero = (op.get(name) for name in names)
    if op.name == "where" and hides:
        kept, zero = zero, kept
    is_mask = tensor_of(mask) is not None and _example(mask).dtype == torch.bool
    return (mask, hides) if is_mask and kept is weights and _scalar(zero, Evaluator(scope, weights)) == 0 else None


def _zeroes(zeroed: Sequence[_Zeroed], scores: _Scores, scope: Scope, layout: Layout) -> bool:
    """Whether weights are zeroed wherever scores are hidden, so that rows whose keys are all hidden give 0.

    Raises :class:`Refused` where weights are zeroed that would not be 0 otherwise, but for such rows.
    """
    never = all(fill == -math.inf for fill in scores.fills)  # such rows are NaN
    for mask, hides, node in zeroed:
        evaluator = Evaluator(scope, node)
        try:
            shown = _shows(evaluator, layout, scores.filled)
            kept = evaluator.visible(mask, *_coordinates(node, layout), hides)
        except Unproven as error:
            raise Refused(f"it sets attention weights to 0 by a mask, and {error}") from None
        terms = [_terms(x) for x in (kept, shown)]
        if not terms[0] <= terms[1]:
            raise Refused("it sets attention weights to 0 whose scores are not hidden", _HIDES)
        if not never and (terms[0] != terms[1] or any(_hides(*x, evaluator) for x in scores.added)):
            raise Refused("it sets some of the attention weights to 0 whose scores are hidden", _HIDES)
    return bool(zeroed) and not never


def _check_kept(scores: _Scores, scope: Scope, layout: Layout, padding: Padding | None) -> None:
    """That tensors which multiply scores are 1 wherever something does not hide these later, and 0 elsewhere."""
    checked = frozenset[Node]() if padding is None else padding.flags
    for mask, node, added, filled in scores.kept:
        evaluator = Evaluator(scope, node, flags=(flags := set[Node]()))
        try:
            at = evaluator.broadcast(_shape(mask), *_coordinates(node, layout))
            kept = evaluator.is_one(mask, at)
            shown = _shows(evaluator, layout, scores.filled[:filled], scores.added[:added])
        except Unproven:
            raise Refused(*_BY_TENSOR) from None
        if not (flags <= checked and _terms(kept) <= _terms(shown)):
            raise Refused(*_BY_TENSOR)


def _shows(
    evaluator: Evaluator,
    layout: Layout,
    filled: Iterable[tuple[Node, bool, Node]],
    added: Iterable[tuple[Node, float, Node]] = (),
) -> Boolean:
    """Where all of some masks show a score."""
    found = [evaluator.visible(x, *_coordinates(like, layout), hides) for x, hides, like in filled]
    return sympy.And(*found, *(evaluator.visible(x, *_coordinates(like, layout), factor=by) for x, by, like in added))


_INEQUALITIES = sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan


def _terms(condition: Boolean) -> set[Any]:
    """What has to hold so that a condition does; of inequalities of integers ``x`` for ``x <= 0``."""
    found: set[Any] = set()
    for term in sympy.And.make_args(sympy.to_nnf(condition, simplify=False)):
        if isinstance(term, _INEQUALITIES) and term.lts.is_integer and term.gts.is_integer:
            term = sympy.expand(term.lts - term.gts + int(term.rel_op in ("<", ">")))
        found.add(term)
    return found


def _turns(op: Operation | None, before: Node) -> bool:
    """Whether an operation swaps the last two dimensions of ``before``, and does nothing else."""
    if op is None or op.name not in ("transpose", "permute") or op.get("input") is not before:
        return False
    rank = rank_of(before)
    return order_of(op, rank) == [*range(rank - 2), rank - 1, rank - 2]


def _dropped(op: Operation) -> float:
    """The probability of a dropout of attention weights; 0 where it does nothing."""
    p = dropped(op)
    if p is None:
        raise Refused("its dropout is not known when compiling")
    if p and op.get("inplace"):
        raise Refused("it drops attention weights in place", "a dropout with inplace=False")
    return p


def _peel(scope: Scope, written: Softmax) -> tuple[_Scores, Node]:
    """The scores before a softmax, and the product of queries and keys that they begin with."""
    scores, node, reader = _Scores(written.sign), written.scores, written.nodes[0]
    while True:
        _example(node)
        node = scope.latest(node, reader)
        op = performed(node)
        if op is None:
            raise Refused(*_OUTSIDE) if _is_input(node) else _foreign(label(node))
        if op.name in PRODUCTS:
            if node in scope.attended:
                raise Refused("its scores are the result of another attention")
            if op.name == "baddbmm":
                _read_baddbmm(scores, op, node)
            if any(_depends(term, node, scope) for term, *_ in scores.added if not _is_single(term)):
                raise Refused("it adds to its scores what was computed from them")
            if any(_depends(by, node, scope) for _, by, _ in scores.scaled):
                raise Refused("it scales its scores by what was computed from them")
            return scores, node
        if op.name not in _STEPS:
            raise _foreign(op.name)
        if scores.scaled and op.name not in (*_COPIES, *VIEWS, "neg", "mul", "div"):
            raise Refused(*_BY_TENSOR)  # with all that was added or filled in before
        scores.steps.append(node)
        reader, node = node, _STEPS[op.name](_Step(scores, op, node, scope))


def _depends(term: Node, product: Node, scope: Scope) -> bool:
    """Whether a tensor was computed from the scores, not from their sizes alone. It may hold what hides some of them,
    and cancel it."""
    first = scope.order[product]

    def further(node: Node) -> Iterator[Node]:
        is_size = node.op == "call_method" and node.target in ("size", "dim") and tensor_of(node) is None
        return (x for x in node.all_input_nodes if scope.order[x] >= first and not is_size)

    return product in reached(term, further)


def _foreign(name: str) -> Refused:
    return Refused(*_NAMES.get(name, (f"its scores come from '{name}'", None)))


# ---- steps back: what a node means for the scores, and the scores before it -----------------------------------------


@dataclass(frozen=True)
class _Step:
    """``node``, which does ``op`` to the scores that it is given."""

    scores: _Scores
    op: Operation
    node: Node
    scope: Scope

    def scalar(self, arg: Any) -> float | None:
        return _scalar(arg, Evaluator(self.scope, self.node))

    def is_scores(self, arg: Any) -> bool:
        return _is_scores(arg, self.node)

    def leads(self, arg: Any) -> bool:
        """Whether an operand is the scores: it has their shape, and leads to a product if both have."""
        return self.is_scores(arg) and _comes_from_product(arg)

    def fill(self, value: Any, mask: Any, hides: bool) -> None:
        """Scores are hidden by ``value`` where a mask says so."""
        _check_fill(value, self)
        _example(mask)
        self.scores.filled.append((mask, hides, self.node))


def _copied(step: _Step) -> Node:
    return step.op.node()


def _negated(step: _Step) -> Node:
    step.scores.factor = -step.scores.factor
    return step.op.node()


def _scaled(step: _Step) -> Node:
    op, before, other = step.op, step.op.get("input"), step.op.get("other")
    if op.get("rounding_mode") is not None:
        raise Refused("its scores are rounded")
    if op.name == "mul" and not step.is_scores(before):
        before, other = other, before
    factor = step.scalar(other)
    if factor is None and isinstance(other, Node) and step.is_scores(before):
        if all(known_equal(size, 1) for size in _sizes(other)[-1:]):  # then it may as well be the query
            step.scores.scaled.append((op.name, other, step.node))
            return cast(Node, before)
        if op.name == "mul" and (step.scores.added or step.scores.filled):  # 0 where they are hidden in a moment
            step.scores.kept.append((other, step.node, len(step.scores.added), len(step.scores.filled)))
            return cast(Node, before)
    if factor is None or factor == 0:
        raise Refused(*_BY_TENSOR)
    step.scores.factor *= factor if op.name == "mul" else 1 / factor
    return cast(Node, before)


def _added(step: _Step) -> Node:
    op, before, other = step.op, step.op.get("input"), step.op.get("other")
    sign = number(op.get("alpha", 1))
    if not isinstance(sign, int | float):
        raise Refused("its scores are added to with a factor that is not known when compiling")
    if op.name == "add" and sign == 1 and not step.leads(before) and step.leads(other):
        before, other = other, before
    constant, scores = step.scalar(other), cast(Node, before)
    if constant is not None and math.isfinite(constant):
        return scores  # the same for all keys: no softmax sees it
    if op.name == "sub" and sign == 1 and _is_row_maximum(other, scores):
        return scores
    _example(other)
    step.scores.added.append((other, step.scores.factor * (sign if op.name == "add" else -sign), step.node))
    return scores


def _filled(step: _Step) -> Node:
    step.fill(step.op.get("value"), step.op.get("mask"), hides=True)
    return step.op.node()


def _chosen(step: _Step) -> Node:
    then, other = step.op.get("input"), step.op.get("other")
    hides = not step.leads(then) and step.is_scores(other)
    step.fill(then if hides else other, step.op.get("condition"), hides)
    return cast(Node, other if hides else then)


def _floored(step: _Step) -> Node:
    """What only lifts hidden scores up to a number that hides them as well."""
    op, dtype = step.op, _example(step.node).dtype
    before, low, high = op.get("input"), op.get("min"), step.scalar(op.get("max"))
    if op.name == "maximum":
        low = op.get("other")
        before, low = (before, low) if step.is_scores(before) else (low, before)
    if op.get("max") is not None and not (high is not None and high >= torch.finfo(dtype).max):
        raise Refused(*_CLAMPED)
    floor = -math.inf if low is None else step.scalar(low)
    if floor is None or not floor * step.scores.factor <= hidden_by(dtype):
        raise Refused(*_CLAMPED)
    _check_fill(floor, step)
    step.scores.late |= floor != -math.inf  # of what it lifts there is no mask
    return cast(Node, before)


_STEPS: dict[str, Callable[[_Step], Node]] = {
    **dict.fromkeys((*_COPIES, *VIEWS), _copied),
    "neg": _negated,
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("add", "sub"), _added),
    "masked_fill": _filled,
    "where": _chosen,
    **dict.fromkeys(("clamp", "clamp_min", "maximum"), _floored),
}
"""What may happen to scores between the product of queries and keys and the softmax."""


def _is_scores(node: Any, like: Node) -> bool:
    """Whether an operand has the shape of the result, and so may be the scores."""
    example = tensor_of(node)
    return example is not None and same_sizes(example.shape, _shape(like))


def _comes_from_product(node: Any) -> bool:
    """Whether scores can be followed back to a product; what a mask or a bias is made from is not looked at."""
    while (op := _step_of(node)) is not None:
        first, other = op.get("input"), op.get("other")
        node = first if _is_scores(first, node) or op.name in VIEWS else other
    return _is_product(node)


def _scalar(arg: Any, evaluator: Evaluator) -> float | None:
    """A number, or the number that a tensor holds everywhere for every input; None for anything else."""
    if isinstance(number(arg), bool | int | float):
        return float(number(arg))
    example = tensor_of(arg)
    if example is None:
        return None
    try:
        value = evaluator.value(arg, _anywhere(example.dim()))
    except Unproven:
        return None
    if value in (sympy.true, sympy.false):
        return float(value is sympy.true)
    return float(value) if isinstance(value, sympy.Expr) and value.is_number else None


def _anywhere(rank: int) -> tuple[Any, ...]:
    """Coordinates in a tensor that broadcasts to scores."""
    return (*sympy.symbols(f"i:{max(0, rank - 4)}", integer=True, nonnegative=True), *COORDINATES[max(0, 4 - rank) :])


def _is_single(arg: Any) -> bool:
    example = tensor_of(arg)
    return example is None or all(known_equal(size, 1) for size in example.shape)


def _check_fill(value: Any, step: _Step) -> None:
    """That a score filled in a step stays hidden, whatever is done to it on the way to the softmax."""
    scores, fill, hidden = step.scores, step.scalar(value), hidden_by(_example(step.node).dtype)
    if fill is None:
        raise Refused("it fills hidden scores with a value that is not known when compiling", _HIDES)
    if not fill * scores.factor <= hidden:
        raise Refused(
            f"it fills hidden scores with {fill * scores.factor:g}; only {hidden:g} or less hides them", _HIDES
        )
    scores.fills.add(fill * scores.factor)
    if fill == -math.inf:
        return
    scores.late |= bool(scores.added)
    for term, factor, like in scores.added:
        try:
            evaluator = Evaluator(step.scope, like)  # it may be written before it is added, or after that
            evaluator.visible(term, _anywhere(rank_of(like)), _shape(like), factor=factor)
        except Unproven as error:
            if 2 * fill * scores.factor <= torch.finfo(_example(step.node).dtype).min:
                continue
            raise Refused(f"it fills hidden scores with {fill:g} and adds to them later, where {error}") from None


def _is_row_maximum(node: Any, scores: Node) -> bool:
    """``scores.amax(-1, keepdim=True)`` or the values of ``max``: no softmax sees that it is subtracted."""
    op, kept = _reduced(node)
    if op is not None and op.name == "getitem" and op.get("index") == 0:
        op = operation(op.get("input"))
        kept = kept or (op is not None and op.get("keepdim") is True)
    if op is None or op.name not in ("amax", "max") or op.get("input") is not scores:
        return False
    return kept and _over_last(op, scores)


def _reduced(node: Any) -> tuple[Operation | None, bool]:
    """What reduces scores along their keys, and whether the dimension is kept or has come back."""
    kept = False
    while (op := operation(node)) is not None:
        if op.name == "detach":
            node = op.get("input")
        elif (op.name == "unsqueeze" and op.get("dim") in (-1, rank_of(node) - 1)) or (
            op.name == "getitem" and op.get("index") in ((Ellipsis, None), (*[slice(None)] * (rank_of(node) - 1), None))
        ):
            node, kept = op.get("input"), True
        else:
            return op, kept or op.get("keepdim") is True
    return None, False


def _over_last(op: Operation, scores: Node) -> bool:
    return op.get("dim") in (-1, len(_shape(scores)) - 1, (-1,), [-1])


def _read_baddbmm(scores: _Scores, op: Operation, node: Node) -> None:
    alpha, beta = (number(op.get(name, 1)) for name in ("alpha", "beta"))
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        raise Refused("its baddbmm has factors that are not known when compiling")
    if beta != 0:
        scores.added.append((op.get("input"), scores.factor * beta, node))
    scores.factor *= alpha


def _factors(product: Node) -> tuple[Operand, Operand]:
    """Query and key, ``[..., L, D]`` each with the same leading dimensions."""
    op = known(product)
    if op.name == "einsum":
        return _einsum(op)
    query, key = _multiplied(op)
    _same_rank(query, key)
    turned = operation(key)
    if turned is not None and isinstance(turned.get("input"), Node) and _turns(turned, turned.node()):
        return Operand(query), Operand(turned.node())
    return Operand(query), Operand(key).then(torch.transpose, -2, -1)


def _same_rank(a: Node, b: Node) -> None:
    ranks = len(_shape(a)), len(_shape(b))
    if ranks[0] != ranks[1] or ranks[0] < 2:
        raise Refused(f"it multiplies tensors of {ranks[0]} and {ranks[1]} dimensions; needed are 2 or more, the same")


def _values(weights: Node, out: Node) -> Operand:
    """The values ``[..., Lk, Dv]`` that ``weights`` are multiplied with."""
    op = known(out)
    if op.name == "baddbmm":
        raise Refused("it adds to its product with the values (baddbmm)")
    factors = _multiplied(op)
    if len(set(factors)) < len(factors):
        raise Refused("its attention weights are used more than once")
    if op.name == "einsum":
        return _einsum(op, weights)[1]
    first, value = factors
    if first is not weights:
        if not _is_reversed(out, weights):
            raise Refused("its attention weights are not the first factor of their product")
        _same_rank(weights, first)
        return Operand(first).then(torch.transpose, -2, -1)
    _same_rank(weights, value)
    return Operand(value)


def _is_reversed(node: Node, weights: Node) -> bool:
    """Whether a node is the product of the transposed values with the transposed weights, ``v.mT @ weights.mT``."""
    op = operation(node)
    if op is None or op.name not in PRODUCTS or op.name == "einsum":
        return False
    return _turns(operation(_multiplied(op)[1]), weights)


def _spelled_out(op: Operation, weights: Node | None = None) -> tuple[str, str, str]:
    """The :func:`letters` of an einsum of two factors, with letters for what ``...`` stands for; first those of
    ``weights``, if they are given.

    Raises :class:`Refused` for another einsum, and for one that takes a diagonal or has no ``->``.
    """
    equation, operands = op.get("equation"), op.get("operands", ())
    refusal = Refused(f"its einsum '{equation}' is not a batch of products")
    if "->" not in equation or equation.count(",") != 1 or len(operands) != 2:
        raise refusal
    rest = "".join(x for x in string.ascii_letters if x not in equation)
    given, ranks = letters(op), [len(_shape(x)) for x in operands]
    dots = {rank - len(own) + 3 for rank, own in zip(ranks, given, strict=False) if "..." in own}
    if len(dots) > 1:
        raise refusal
    a, b, result = (x.replace("...", rest[: max(0, *dots, 0)]) for x in given)
    if [len(a), len(b)] != ranks or any(len(set(x)) != len(x) or "." in x for x in (a, b, result)):
        raise refusal
    return (b, a, result) if weights is not None and operands[0] is not weights else (a, b, result)


def _einsum(op: Operation, weights: Node | None = None) -> tuple[Operand, Operand]:
    """Both factors, their dimensions in order: ``[batch, q, D]`` and ``[batch, k, D]`` of scores ``[batch, q, k]``; or
    of ``weights`` ``[batch, q, k]`` and values ``[batch, k, Dv]``, whose result may have any order. A dimension of the
    batch that keys or values do not have is 1 there."""
    a, b, result = _spelled_out(op, weights)
    scores = result if weights is None else a
    batch, row, column = scores[:-2], scores[-2:-1], scores[-1:]
    summed = [x for x in a if x in b and x not in result]
    feature = summed if weights is None else [x for x in b if x not in a]
    shapes = ([*batch, row, *feature], [*batch, row, column])
    left, made = shapes if weights is None else reversed(shapes)
    of_rows = len(scores) > 1 and len(summed) == len(feature) == 1 and row not in b and column in b
    if not of_rows or {*b} - {*batch, column, *feature} or {*a} != {*left} or {*result} != {*made}:
        raise Refused(f"its einsum '{op.get('equation')}' is not a batch of products")
    first, second = op.get("operands")[:: 1 if weights is None or op.get("operands")[0] is weights else -1]
    key = _permuted(Operand(second), [b.index(x) for x in (*batch, column, *feature) if x in b])
    for i, letter in enumerate(batch):
        key = key if letter in b else key.then(torch.unsqueeze, i)
    return _permuted(Operand(first), [a.index(x) for x in left]), key


def _permuted(x: Operand, order: list[int]) -> Operand:
    return x if order == sorted(order) else x.then(torch.permute, tuple(order))


def _check_order(scope: Scope, chain: list[Node], out: Node, factors: Sequence[Node], scores: _Scores) -> None:
    """That all is still the same where the attention is written anew, at ``out``."""
    start, end = scope.order[chain[0]], scope.order[out]
    if any(start < i < end for i in scope.grad_switches):
        raise Refused("gradients are switched on or off inside it", "the switch around all of it")
    if any(start < i < end for i in scope.autocast_switches):
        raise Refused("autocast is switched on or off inside it", "the switch around all of it")
    terms = [(node, like) for node, _, like in (*scores.added, *scores.filled)]
    terms += [(by, like) for _, by, like in scores.scaled] + [(node, chain[0]) for node in factors]
    for node, reader in terms:
        if scope.written(node, after=scope.order[reader], before=end):
            raise Refused(f"{spoken(node)} is written between its two products")
    for node in chain:
        if scope.written(node, before=end, but=chain):
            raise Refused("its scores or weights are written by something else")


def _check_precision(chain: list[Node], dtype: torch.dtype) -> None:
    """That scores and weights are nowhere rounded more coarsely than values are."""
    needed = torch.finfo(dtype)
    for node in chain:
        own = _example(node).dtype
        if not own.is_floating_point or torch.finfo(own).eps > needed.eps or torch.finfo(own).max < needed.max:
            raise Refused(f"its scores or weights are rounded to {own}, its values are {dtype}", f"both in {dtype}")


# ---- shapes --------------------------------------------------------------------------------------------------------


def _check_views(chain: Sequence[Node], shapes: Sequence[torch.Size]) -> None:
    """That scores and weights keep their sizes, but for views, and all of these their keys."""
    for node, before, shape in zip(chain[1:], shapes, shapes[1:], strict=False):
        op = operation(node)
        viewed = op is not None and op.name in VIEWS  # as many elements as before
        same = len(before) == len(shape) and all(
            statically_known_true(x == y) for x, y in zip(before, shape, strict=True)
        )
        if not (same or viewed) or not same_sizes(before[-1:], shape[-1:]):
            raise Refused(f"its scores are {tuple(before)} and later {tuple(shape)}")


def _one_dtype(scope: Scope, out: Node, *operands: Operand) -> Iterator[Operand]:
    """``operands`` of the dtype that values have, those before a cast where that makes them so."""
    dtype = _example(operands[-1].node).dtype
    for x in operands:
        op = operation(x.node)
        if _example(x.node).dtype != dtype and op is not None and op.name == "to":
            before = op.get("input")
            same = _example(before).device == _example(x.node).device
            if same and not scope.written(before, after=scope.order[x.node], before=scope.order[out]):
                x = Operand(before, x.steps)
        if _example(x.node).dtype != dtype and not scope.autocast:
            raise Refused("its query, key and value have different dtypes")
        yield x


def _before_repeat(scope: Scope, out: Node, query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand]:
    """Key and value before their heads are repeated, where nothing else is done to them."""
    if key.steps or value.steps or query.steps:
        return key, value
    base = unrepeated(scope, out, query.node, key.node, value.node)
    return Operand(base[0]), Operand(base[1])


def _coordinates(like: Node, layout: Layout) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where the dimensions of a tensor of scores are, and their sizes."""
    shape = _shape(like)
    return (*layout.places(shape[:-1]), _K), tuple(shape)


def _prove(
    scope: Scope, scores: _Scores, layout: Layout, shapes: Sequence[torch.Size], out: Node
) -> tuple[Layout, Mask, Padding | None]:
    """What the masks allow, and where heads and queries are that it is proven for."""
    if not all(_example(node).dtype == torch.bool for node, _, _ in scores.filled):
        return layout, *unknown("it fills scores where something is that is not a boolean tensor", "a boolean mask")
    if not scores.added and not scores.filled:
        return layout.known, Mask(), None

    def parts(layout: Layout) -> list[MaskPart]:
        added = [
            _shown(scope, node, factor, like, layout) or MaskPart(node, *_coordinates(like, layout), factor=factor)
            for node, factor, like in scores.added
        ]
        return added + [MaskPart(node, *_coordinates(like, layout), hides) for node, hides, like in scores.filled]

    lengths = [shape[-2] for shape in shapes[1:]]
    return prove_rows(parts, layout, number(shapes[0][-1]), scope, out, lengths)


def _shown(scope: Scope, node: Node, factor: float, like: Node, layout: Layout) -> MaskPart | None:
    """The boolean mask that a mask which is added is made from: ``where(shown, 0, lowest)``; None for another."""
    op = operation(node)
    if op is None or op.name != "where" or _example(op.get("condition")).dtype != torch.bool:
        return None
    then, other = (_scalar(op.get(name), Evaluator(scope, node)) for name in ("input", "other"))
    hides = other is not None and other * factor <= hidden_by(_example(node).dtype)
    if then != 0 or not hides or scope.overwritten(node):
        return None
    return MaskPart(op.get("condition"), *_coordinates(like, layout))


# ---- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """What is written anew: query, key and value ``[B, H or H_kv, L, D]``, and all that happens to their scores.

    layout: where they are in the scores. out: the product of ``weights`` with the values. autocast: the arguments of
    every ``torch.autocast`` around it.
    """

    inputs: tuple[Operand, Operand, Operand]
    scores: _Scores
    spec: AttentionSpec
    layout: Layout
    out: Node
    weights: Node
    autocast: Sequence[tuple[Any, ...]]


def _write(attention: _Attention, emit: Emit, averages: bool = False) -> tuple[Node, Node]:
    """``averages``: rows without a visible key get the mean of the values, as those of a query 0 that sees them all."""
    spec = attention.spec
    with entered(attention.autocast):
        q, k, v = (x.emit(emit) for x in attention.inputs)
        visible, mask = _emit_mask(attention, q, emit)
        if averages:
            hidden = emit(torch.logical_not, emit(torch.any, visible, -1, True))
            q = emit(torch.masked_fill, q, hidden, 0.0)
            show = (torch.logical_or, mask, hidden) if mask is visible else (torch.masked_fill, mask, hidden, 0.0)
            mask = emit(*show)
        result = emit(
            F.scaled_dot_product_attention, q, k, v,
            attn_mask=mask, dropout_p=spec.dropout_p, scale=spec.scale, enable_gqa=not known_equal(spec.H, spec.H_kv),
        )  # fmt: skip
        return result, _like_product(result, attention, emit)


def _common(query: Node, spec: AttentionSpec) -> torch.dtype:
    """What SDPA computes in, and wants its mask in."""
    return spec.dtype if torch.is_autocast_enabled(spec.device) else _example(query).dtype


def _emit_mask(attention: _Attention, query: Node, emit: Emit) -> tuple[Node | None, Node | None]:
    """Which scores no filling hides, and the mask for SDPA."""
    scores, layout, dtype = attention.scores, attention.layout, _common(query, attention.spec)
    bias: Node | None = None
    visible: Node | None = None
    for node, factor, like in scores.added:
        term = layout.mask(node, _shape(like)[:-1], query, emit)
        if not term.meta["example_value"].dtype.is_floating_point:
            term = emit(torch.Tensor.to, term, dtype)  # the sum of two booleans is another one
        if factor != 1:
            term = emit(torch.mul, term, factor)
        bias = term if bias is None else emit(torch.add, bias, term)
    for node, hides, like in scores.filled:
        shown = layout.mask(node, _shape(like)[:-1], query, emit)
        shown = emit(torch.logical_not, shown) if hides else shown
        visible = shown if visible is None else emit(torch.logical_and, visible, shown)
    if bias is None:
        return visible, visible
    if bias.meta["example_value"].dtype != dtype:
        bias = emit(torch.Tensor.to, bias, dtype)
    return visible, bias if visible is None else emit(torch.where, visible, bias, float("-inf"))


def _like_product(result: Node, attention: _Attention, emit: Emit) -> Node:
    """``[B, H, Lq, Dv]`` as the product of the weights with the values has it."""
    out, weights = attention.out, attention.weights
    op, rank = known(out), rank_of(out)
    result = attention.layout.back(Operand(result), _shape(weights)[:-1]).emit(emit)
    if op.name == "einsum":
        first, second, made = _spelled_out(op, weights)
        have = [x for x in first if x in made] + [x for x in second if x in made and x not in first]
        order = tuple(have.index(x) for x in made)
        if order != tuple(range(rank)):
            result = emit(torch.permute, result, order)
    elif _is_reversed(out, weights):
        result = emit(torch.transpose, result, -2, -1)
    if result.meta["example_value"].dtype != _example(out).dtype:
        result = emit(torch.Tensor.to, result, _example(out).dtype)
    return result
