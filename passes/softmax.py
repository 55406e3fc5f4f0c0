"""Attention that is written out: a product of queries and keys, a scale, masks, a softmax, a product with values.

:func:`describe` starts at the softmax. Backward it peels off what may happen to scores until it reaches the product of
queries and keys, and remembers what every step means; forward it follows the weights to the one product that uses
them. There are no templates: every step is read in its one spelling (``normalize.py``) and either has a meaning here or
is the reason of a refusal. The :data:`Expand` that it returns writes
``scaled_dot_product_attention`` in the place of all of it.

Scores become ``factor * query @ key^T + sum of (factor_i * term_i)``, hidden where a mask says so. Whatever is added
or filled in is a mask to the prover (``mask.py``), which tells causal masks and paddings from biases; for exact
attention it stays what it is. Filling with or adding -1e9 or less hides a score: scores are taken to be larger. So
does the lowest number of a dtype that has none so low, and so scores may be lifted to a number that hides.

Reads ``[B, H, L, D]``, ``[B * H, L, D]`` (B and H from a view of the scores, else H = 1), ``[L, D]``, and einsum with
one or two batch letters. Refuses soft-caps, sinks, scores or weights that are written, and weights that are used again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..core.spec import AttentionSpec, Mask, feature_major, known_equal
from .mask import MaskPart, Padding, prove_all, same_for_all_queries
from .normalize import Operation, in_place, number, operation
from .repeat import unrepeated
from .scale import unscaled
from .site import PADDED, Emit, Operand, Refused, Scope, check_heads, entered, make_spec
from .symbolic import COORDINATES, Evaluator, Unproven, hidden_by, size_expr
from .words import label, spoken

_B, _H, _Q, _K = COORDINATES
PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
_COPIES = ("to", "contiguous", "clone")
_FLOORS = ("clamp", "clamp_min", "maximum")
_STEPS = (*_VIEWS, *_COPIES, "mul", "div", "neg", "add", "sub", "masked_fill", "where", *_FLOORS)
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
    """

    factor: float = 1.0
    added: list[tuple[Node, float, Node]] = field(default_factory=list)
    filled: list[tuple[Node, bool, Node]] = field(default_factory=list)
    steps: list[Node] = field(default_factory=list)
    fills: set[float] = field(default_factory=set)
    late: bool = False


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
    op = operation(node) or in_place(node)
    if op is None or op.name not in ("softmax", "softmin", "exp", "div"):
        return None
    if op.name in ("softmax", "softmin"):
        return Softmax(op.get("input"), op.get("dim"), (node,), sign=1.0 if op.name == "softmax" else -1.0)
    before = op.get("input")
    inner = operation(before) if isinstance(before, Node) else None
    if inner is None:
        return None
    if op.name == "div":
        of_sum = inner.name == "exp" and op.get("rounding_mode") is None and _is_sum(op.get("other"), before)
        return Softmax(inner.get("input"), -1, (before, node), op.get("other")) if of_sum else None
    if inner.name == "log_softmax":
        return Softmax(inner.get("input"), inner.get("dim"), (before, node))
    if inner.name == "sub" and number(inner.get("alpha", 1)) == 1:
        of_log, scores = inner.get("other"), inner.get("input")
        total, kept = _reduced(of_log)
        if total is not None and total.name == "logsumexp" and kept and total.get("input") is scores:
            return Softmax(scores, -1, (before, node), of_log) if _over_last(total, scores) else None
    return None


def _is_sum(node: Any, of: Node) -> bool:
    """Whether a node is the sum of another over its last dimension, which is kept."""
    op, kept = _reduced(node)
    return op is not None and op.name == "sum" and kept and op.get("input") is of and _over_last(op, of)


def feeds_product(node: Node) -> bool:
    """Whether a softmax's result is a factor of a matrix product, possibly after dropout, a cast or a slice.

    Where its scores are an input of the graph (a graph break parts them from their product), it has to be the first
    factor of a batch of products, as the weights of experts or layers seldom are. Those that are look like one query.
    """
    outside = _from_inputs(softmax_of(node).scores)
    open_nodes, seen = [node], {node}
    while open_nodes:
        source = open_nodes.pop()
        for user in source.users:
            op = operation(user)
            if op is None or user in seen:
                continue
            if op.name in ("matmul", "bmm", "einsum") or (op.name == "baddbmm" and op.get("input") is not source):
                if not outside or _weighs_batch(op, source):
                    return True
            elif op.name in (*_VIEWS, *_COPIES, "dropout", "detach", "getitem", "expand", "transpose"):
                if op.get("input") is source:
                    seen.add(user)
                    open_nodes.append(user)
    return False


def products(softmax: Node) -> list[Node]:
    """The product that the scores of a softmax begin with, and that of its weights with the values, if they are found.

    It is a search, no proof.
    """
    of_keys = _nearest(softmax, lambda node: node.all_input_nodes, lambda node: _stays_scores(node, softmax))
    return [*of_keys, *_nearest(softmax, lambda node: list(node.users), lambda node: True)]


def _nearest(start: Node, further: Callable[[Node], list[Node]], fits: Callable[[Node], bool]) -> list[Node]:
    """The nearest product that fits, or none; what lies beyond another softmax belongs to that."""
    nodes, seen = [start], {start}
    for node in nodes:  # which grow
        op = operation(node)
        if op is not None and op.name in PRODUCTS and fits(node):
            return [node]
        if softmax_of(node) is not None and node is not start:
            continue
        fresh = [x for x in further(node) if x not in seen]
        seen.update(fresh)
        nodes.extend(fresh)
    return []


def _from_inputs(scores: Any) -> bool:
    """Whether scores, which may have been scaled, masked and added to, are inputs of the graph."""
    open_nodes, seen = [scores], {scores}
    while open_nodes:
        node = open_nodes.pop()
        if _is_input(node):
            continue
        op = (operation(node) or in_place(node)) if isinstance(node, Node) else None
        if op is None or op.name not in _STEPS:
            return False
        factors = [op.get("input")] if op.name in _VIEWS else [op.get("input"), op.get("other")]
        before = [x for x in factors if x not in seen and (op.name in _VIEWS or _is_scores(x, node))]
        seen.update(before)
        open_nodes.extend(before)
    return True


def _is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _weighs_batch(op: Any, weights: Node) -> bool:
    """Whether a product has ``weights`` as its first factor and values of three or four dimensions as its second."""
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("input", "other")
    factors = op.get("operands", ()) if op.name == "einsum" else tuple(op.get(name) for name in names)
    return len(factors) == 2 and factors[0] is weights and rank_of(factors[1]) in (3, 4)


def leaves_graph(product: Node) -> Node | None:
    """What a product of queries and keys has become where the graph returns it as scores, without a softmax.

    None for every other node. The product has three or four dimensions; scores may be scaled, masked and added to.
    """
    op = operation(product)
    if op is None or op.name not in PRODUCTS or rank_of(product) not in (3, 4) or not is_of_keys(op):
        return None
    open_nodes, seen, left = [product], {product}, None
    while open_nodes:
        node = open_nodes.pop()
        for user in node.users:
            op = operation(user) or in_place(user)
            if softmax_of(user) is not None:
                return None
            if user.op == "output":
                left = node
            elif op is not None and op.name in _STEPS and user not in seen and _stays_scores(node, user):
                seen.add(user)
                open_nodes.append(user)
    return left


def is_of_keys(op: Any) -> bool:
    """Whether a product sums over the last dimension of both factors; weights and values have another."""
    if op.name == "einsum":
        inputs, _, result = op.get("equation").replace(" ", "").partition("->")
        first, _, second = inputs.partition(",")
        return bool(first and second) and first[-1] == second[-1] and first[-1] not in result
    key = op.get("batch2" if op.name == "baddbmm" else "other")
    while (turned := operation(key) if isinstance(key, Node) else None) is not None:
        before = turned.get("input")
        if turned.name in ("transpose", "permute"):
            return _last_to_rows(turned, rank_of(key))
        if turned.name not in (*_VIEWS, *_COPIES) or not _stays_scores(before, key):
            return False
        key = before
    return False


def _last_to_rows(op: Any, rank: int) -> bool:
    """Whether a transposition makes rows of what was the last dimension."""
    dims = (op.get("dim0"), op.get("dim1")) if op.name == "transpose" else op.get("dims", ())
    dims = [d % rank for d in dims if isinstance(d, int)]
    if op.name == "transpose":
        return sorted(dims) == [rank - 2, rank - 1]
    return len(dims) == rank and dims[-2] == rank - 1


def rank_of(node: Any) -> int:
    """The number of dimensions; 0 for what :func:`_example` refuses."""
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    known = isinstance(example, torch.Tensor) and example.layout == torch.strided and not example.is_nested
    return example.dim() if known else 0


def _stays_scores(before: Node, after: Node) -> bool:
    """Whether ``after`` has the last two sizes of ``before``."""
    if rank_of(before) < 2 or rank_of(after) < 2:
        return False
    return all(map(known_equal, _shape(before)[-2:], _shape(after)[-2:]))


def describe(scope: Scope, softmax: Node) -> dict[str, Any]:
    """What the attention around ``softmax`` computes, as fields of its site, whose node is the product with values.

    Raises :class:`Refused` with the first condition that is not met.
    """
    weights, out, dropout_p = _follow(softmax)
    scores, product = _peel(scope, softmax)
    query, key = _factors(product)
    value = _values(weights[-1] if weights else softmax, out)
    written = softmax_of(softmax)
    chain = [product, *reversed(scores.steps), *written.nodes, *weights]
    whole = chain if written.total is None else [*chain, written.total]
    _check_order(scope, whole, out, (query.node, key.node), scores)
    _check_precision(whole, _example(value.node).dtype)
    heads = _heads(chain)
    query, key, value = (_with_heads(x, heads) for x in (query, key, value))
    query, key, value = _one_dtype(scope, out, query, key, value)
    repeats = known_equal(key.shape[1], query.shape[1])
    key, value = _before_repeat(scope, out, query, key, value)
    shapes = [x.shape for x in (query, key, value)]
    check_heads(*shapes, repeats=repeats)
    (query, of_query), (key, of_key) = (unscaled(scope, x) for x in (query, key))
    scores.factor *= of_query * of_key
    if scores.factor <= 0:
        raise Refused(f"its scale {scores.factor:g} is not positive")
    sizes = (*map(number, shapes[0][:3]), number(shapes[1][2]))
    mask, padding = _prove(scope, scores, sizes, heads, out)
    facts = dict(mask=mask, dropout_p=dropout_p, feature_major=feature_major(key.example))
    spec = make_spec(_example(out), *shapes, scale=scores.factor, **facts)
    expand = partial(_write, query, key, value, scores, spec, heads, out, scope.contexts)
    found = {"node": out, "spec": spec, "padding": padding, "expand": expand}
    if not _averages(scores, spec):
        return {**found, "exact": expand}
    averaging = partial(expand, averages=True) if len(scores.fills) == 1 and not scores.late else None
    return {**found, "exact": averaging, "averages": True}


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
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(example, torch.Tensor):
        raise Refused("its operands are not tensors of the graph")
    if example.layout != torch.strided or example.is_nested:
        raise Refused(f"{spoken(node)} is a nested or sparse tensor", PADDED)
    return example


def _shape(node: Node) -> torch.Size:
    return _example(node).shape


def _follow(softmax: Node) -> tuple[list[Node], Node, float]:
    """The nodes that the weights pass through, the product that uses them, and the probability of dropping one."""
    dim, rank = softmax_of(softmax).dim, len(_shape(softmax))
    if dim not in (-1, rank - 1):
        raise Refused(f"its softmax is over dimension {dim} of {rank}, not over the last")
    path, dropout_p, node = [], 0.0, softmax
    while True:
        if len(node.users) != 1:
            raise Refused("its attention weights are used more than once", _OUTPUT_ALONE)
        user = next(iter(node.users))
        op = operation(user)
        if op is not None and op.name in PRODUCTS:
            return path, user, dropout_p
        if op is None or op.get("input") is not node or op.name not in (*_VIEWS, *_COPIES, "dropout"):
            name = (op or in_place(user) or Operation(label(user))).name
            what = _WEIGHTS.get(name, f"given to '{label(user)}'")
            nearest = _NO_SINKS if name == "getitem" else None
            raise Refused(f"its attention weights are {what} before they meet the values", nearest)
        if op.name == "dropout":
            p, training = (number(op.get(name, default)) for name, default in (("p", 0.5), ("training", True)))
            if not isinstance(p, int | float) or not isinstance(training, bool) or op.get("inplace"):
                raise Refused("its dropout is not known when compiling")
            if training and p > 0:
                if dropout_p:
                    raise Refused("it drops attention weights twice")
                dropout_p = float(p)
        elif op.name in _VIEWS:
            _same_scores(node, user)
        path.append(user)
        node = user


def _same_scores(before: Node, after: Node) -> None:
    """A view that leaves queries and keys alone."""
    if not _stays_scores(before, after):
        raise Refused(f"its scores are reshaped from {tuple(_shape(before))} to {tuple(_shape(after))}")


def _peel(scope: Scope, softmax: Node) -> tuple[_Scores, Node]:
    """The scores before ``softmax``, and the product of queries and keys that they begin with."""
    written = softmax_of(softmax)
    scores, node = _Scores(written.sign), written.scores
    evaluator = Evaluator(scope, softmax)
    while True:
        _example(node)
        op = operation(node) or in_place(node)
        if op is None:
            raise Refused(*_OUTSIDE) if _is_input(node) else _foreign(label(node))
        if op.name in PRODUCTS:
            if node in scope.attended:
                raise Refused("its scores are the result of another attention")
            if op.name == "baddbmm":
                _read_baddbmm(scores, op, node)
            if any(_depends(term, node, scope) for term, *_ in scores.added if not _is_single(term)):
                raise Refused("it adds to its scores what was computed from them")
            return scores, node
        scores.steps.append(node)
        node = _step(scores, op, node, evaluator)


def _depends(term: Node, product: Node, scope: Scope) -> bool:
    """Whether a tensor was computed from the scores. It may hold what hides some of them, and cancel it."""
    open_nodes, seen = [term], {term}
    while open_nodes:
        node = open_nodes.pop()
        if node is product:
            return True
        earlier = [x for x in node.all_input_nodes if x not in seen and scope.order[x] >= scope.order[product]]
        seen.update(earlier)
        open_nodes.extend(earlier)
    return False


def _step(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    """One step back from ``node``: the scores before it."""
    if op.name not in _READ:
        raise _foreign(op.name)
    return _READ[op.name](scores, op, node, evaluator)


def _foreign(name: str) -> Refused:
    return Refused(*_NAMES.get(name, (f"its scores come from '{name}'", None)))


# ---- steps: (scores, operation, node, evaluator) -> the scores before it


def _copied(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    return op.get("input")


def _viewed(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    _same_scores(op.get("input"), node)
    return op.get("input")


def _negated(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    scores.factor = -scores.factor
    return op.get("input")


def _scaled(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    before, other = op.get("input"), op.get("other")
    if op.get("rounding_mode") is not None:
        raise Refused("its scores are rounded")
    if op.name == "mul" and not _is_scores(before, node):
        before, other = other, before
    factor = _scalar(other, evaluator)
    if factor is None or factor == 0:
        raise Refused(
            "its scores are scaled by a tensor, whose values are not known when compiling",
            "a query that is multiplied by it, or a number",
        )
    scores.factor *= factor if op.name == "mul" else 1 / factor
    return before


def _added(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    before, other, sign = op.get("input"), op.get("other"), number(op.get("alpha", 1))
    if not isinstance(sign, int | float):
        raise Refused("its scores are added to with a factor that is not known when compiling")
    if op.name == "add" and sign == 1 and not _leads(before, node) and _leads(other, node):
        before, other = other, before
    constant = _scalar(other, evaluator)
    if constant is not None and math.isfinite(constant):
        return before  # the same for all keys: no softmax sees it
    if op.name == "sub" and sign == 1 and _is_row_maximum(other, before):
        return before
    _example(other)
    scores.added.append((other, scores.factor * (sign if op.name == "add" else -sign), node))
    return before


def _filled(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    _check_fill(op.get("value"), scores, node, evaluator)
    return _fill(scores, op.get("mask"), True, node, op.get("input"))


def _chosen(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    then, other = op.get("input"), op.get("other")
    hides = not _leads(then, node) and _is_scores(other, node)
    _check_fill(then if hides else other, scores, node, evaluator)
    return _fill(scores, op.get("condition"), hides, node, other if hides else then)


def _fill(scores: _Scores, mask: Any, hides: bool, node: Node, before: Node) -> Node:
    _example(mask)
    scores.filled.append((mask, hides, node))
    return before


def _floored(scores: _Scores, op: Operation, node: Node, evaluator: Evaluator) -> Node:
    """What only lifts hidden scores up to a number that hides them as well."""
    before, low, high = op.get("input"), op.get("min"), _scalar(op.get("max"), evaluator)
    if op.name == "maximum":
        before, low = op.get("input"), op.get("other")
        before, low = (before, low) if _is_scores(before, node) else (low, before)
    if op.get("max") is not None and not (high is not None and high >= torch.finfo(_example(node).dtype).max):
        raise Refused(*_CLAMPED)
    floor = -math.inf if low is None else _scalar(low, evaluator)
    if floor is None or not floor * scores.factor <= hidden_by(_example(node).dtype):
        raise Refused(*_CLAMPED)
    _check_fill(floor, scores, node, evaluator)
    scores.late |= floor != -math.inf  # of what it lifts there is no mask
    return before


_READ: dict[str, Callable[[_Scores, Operation, Node, Evaluator], Node]] = {
    **dict.fromkeys(_COPIES, _copied),
    **dict.fromkeys(_VIEWS, _viewed),
    "neg": _negated,
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("add", "sub"), _added),
    "masked_fill": _filled,
    "where": _chosen,
    **dict.fromkeys(_FLOORS, _floored),
}


def _is_scores(node: Any, like: Node) -> bool:
    """Whether an operand has the shape of the result, and so may be the scores."""
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(example, torch.Tensor) or example.dim() != len(_shape(like)):
        return False
    return all(known_equal(x, y) for x, y in zip(example.shape, _shape(like), strict=True))


def _leads(node: Any, like: Node) -> bool:
    """Whether the first operand of a sum is the scores: it has their shape, and leads to a product if both have."""
    return _is_scores(node, like) and _comes_from_product(node)


def _comes_from_product(node: Any) -> bool:
    """Whether scores can be followed back to a product; what a mask or a bias is made from is not looked at."""
    while isinstance(node, Node):
        op = operation(node) or in_place(node)
        if op is None:
            return False
        if op.name in PRODUCTS:
            return True
        if op.name not in _STEPS:
            return False
        first, other = op.get("input"), op.get("other")
        node = first if _is_scores(first, node) or op.name in _VIEWS else other
    return False


def _scalar(arg: Any, evaluator: Evaluator) -> float | None:
    """A number, or the number that a tensor holds everywhere for every input; None for anything else."""
    if isinstance(number(arg), bool | int | float):
        return float(number(arg))
    example = arg.meta.get("example_value") if isinstance(arg, Node) else None
    if not isinstance(example, torch.Tensor):
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
    example = arg.meta.get("example_value") if isinstance(arg, Node) else None
    return not isinstance(example, torch.Tensor) or all(known_equal(size, 1) for size in example.shape)


def _check_fill(value: Any, scores: _Scores, node: Node, evaluator: Evaluator) -> None:
    """That a score filled in ``node`` stays hidden, whatever is done to it on the way to the softmax."""
    fill, hidden = _scalar(value, evaluator), hidden_by(_example(node).dtype)
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
            shape = _shape(like)
            evaluator.visible(term, _anywhere(len(shape)), shape, factor=factor)
        except Unproven as error:
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
    while isinstance(node, Node) and (op := operation(node)) is not None:
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


def _read_baddbmm(scores: _Scores, op: Any, node: Node) -> None:
    alpha, beta = (number(op.get(name, 1)) for name in ("alpha", "beta"))
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        raise Refused("its baddbmm has factors that are not known when compiling")
    if beta != 0:
        scores.added.append((op.get("input"), scores.factor * beta, node))
    scores.factor *= alpha


def _factors(product: Node) -> tuple[Operand, Operand]:
    """Query and key, ``[..., L, D]`` each with the same leading dimensions."""
    op = operation(product)
    if op.name == "einsum":
        return _einsum(op, of_values=False)
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("input", "other")
    query, key = (op.get(name) for name in names)
    _same_rank(query, key)
    turned = operation(key)
    last = turned is not None and _swaps_last(turned, len(_shape(key)))
    rows = Operand(turned.get("input")) if last else Operand(key).then(torch.transpose, -2, -1)
    return Operand(query), rows


def _same_rank(a: Node, b: Node) -> None:
    ranks = len(_shape(a)), len(_shape(b))
    if ranks[0] != ranks[1] or ranks[0] not in (2, 3, 4):
        raise Refused(f"it multiplies tensors of {ranks[0]} and {ranks[1]} dimensions; needed are 2, 3 or 4, the same")


def _swaps_last(op: Any, rank: int) -> bool:
    if op.name == "transpose":
        return sorted(d % rank for d in (op.get("dim0"), op.get("dim1")) if isinstance(d, int)) == [rank - 2, rank - 1]
    if op.name == "permute":
        dims = [d % rank for d in op.get("dims") if isinstance(d, int)]
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _values(weights: Node, out: Node) -> Operand:
    """The values ``[..., Lk, Dv]`` that ``weights`` are multiplied with."""
    op = operation(out)
    if op.name == "einsum":
        if op.get("operands", ())[:1] != (weights,):
            raise Refused("its einsum does not begin with the attention weights")
        return _einsum(op, of_values=True)[1]
    if op.name == "baddbmm":
        raise Refused("it adds to its product with the values (baddbmm)")
    first, value = op.get("input"), op.get("other")
    if first is value:
        raise Refused("its attention weights are used more than once")
    if first is not weights:
        raise Refused("its attention weights are not the first factor of their product")
    _same_rank(weights, value)
    return Operand(value)


def _einsum(op: Any, of_values: bool) -> tuple[Operand, Operand]:
    """Both factors, their dimensions in order: ``[batch, q, D]`` and ``[batch, k, D]`` of scores ``[batch, q, k]``; or
    of values ``[batch, q, k]`` and ``[batch, k, Dv]``, whose result may have any order."""
    equation, operands = op.get("equation").replace(" ", ""), op.get("operands", ())
    refusal = Refused(f"its einsum '{equation}' is not a batch of products")
    if "->" not in equation or "." in equation or len(operands) != 2:
        raise refusal
    inputs, result = equation.split("->")
    a, b = inputs.split(",")
    if any(len(set(x)) != len(x) for x in (a, b, result)) or len(a) != len(_shape(operands[0])):
        raise refusal
    batch = [x for x in result if x in a and x in b]
    rows, columns = ([x for x in result if x in own and x not in other] for own, other in ((a, b), (b, a)))
    inner = [x for x in a if x in b and x not in result]
    if (len(rows), len(columns), len(inner)) != (1, 1, 1) or len(batch) > 2:
        raise refusal
    if {*a, *b} != {*batch, *rows, *columns, *inner}:
        raise refusal
    if not of_values:
        if list(result) != [*batch, *rows, *columns]:
            raise refusal
        orders = ([*batch, *rows, *inner], [*batch, *columns, *inner])
    else:
        if list(a) != [*batch, *rows, *inner] and sorted(a[: len(batch)]) == sorted(batch):
            batch = list(a[: len(batch)])
        if list(a) != [*batch, *rows, *inner]:
            raise refusal
        orders = (list(a), [*batch, *inner, *columns])
    pairs = zip((a, b), orders, operands, strict=True)
    return tuple(_permuted(Operand(node), [have.index(x) for x in want]) for have, want, node in pairs)


def _permuted(x: Operand, order: list[int]) -> Operand:
    return x if order == sorted(order) else x.then(torch.permute, tuple(order))


def _check_order(scope: Scope, chain: list[Node], out: Node, factors: Sequence[Node], scores: _Scores) -> None:
    """That all is still the same where the attention is written anew, at ``out``."""
    start, end = scope.order[chain[0]], scope.order[out]
    if any(start < i < end for i in scope.grad_switches):
        raise Refused("gradients are switched on or off inside it", "the switch around all of it")
    if any(start < i < end for i in scope.autocast_switches):
        raise Refused("autocast is switched on or off inside it", "the switch around all of it")
    read = {*factors, *(node for node, *_ in (*scores.added, *scores.filled))}
    for node in read:
        if scope.written(node, after=start, before=end):
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


def _heads(chain: Sequence[Node]) -> tuple[Any, Any]:
    """(B, H) of scores that are ``[B, H, q, k]`` somewhere on their way; else every leading entry is a sequence."""
    shapes = [_shape(node) for node in chain]
    first, four = shapes[0], [shape for shape in shapes if len(shape) == 4]
    B, H = map(number, four[0][:2] if four else (first[0] if len(first) == 3 else 1, 1))
    if not isinstance(H, int) and any(len(shape) == 3 for shape in shapes):
        raise Refused(f"its number of heads {H} is not known when compiling")
    for before, node, shape in zip(shapes, chain[1:], shapes[1:], strict=False):
        viewed = (operation(node) or in_place(node)).name in _VIEWS  # as many elements as before
        same = len(before) == len(shape) and all(
            statically_known_true(x == y) for x, y in zip(before, shape, strict=True)
        )
        if not (same or viewed) or not all(map(known_equal, before[-2:], shape[-2:])):
            raise Refused(f"its scores are {tuple(before)} and later {tuple(shape)}")
    for shape in shapes:
        if _leading(shape[:-2], (B, H)) is None:
            raise Refused(f"its scores are {tuple(first)} and {tuple(shape)}, not both {B} sequences of {H} heads")
    return B, H


def _with_heads(x: Operand, heads: tuple[Any, Any]) -> Operand:
    """``x`` as ``[B, H, L, D]``."""
    rank, (B, H) = len(x.shape), heads
    if rank == 3 and not known_equal(x.shape[0], B * H):
        raise Refused(f"it multiplies {x.shape[0]} matrices for {B} sequences of {H} heads")
    if rank == 2:
        x, rank = x.then(torch.unsqueeze, 0), 3
    if rank == 3:
        x = x.then(torch.unsqueeze, 1) if H == 1 else x.then(torch.unflatten, 0, (-1, H))
    return x


def _one_dtype(scope: Scope, out: Node, *operands: Operand) -> list[Operand]:
    """``operands`` of the dtype that values have, those before a cast where that makes them so."""
    dtype = _example(operands[-1].node).dtype
    found = []
    for x in operands:
        op = operation(x.node)
        if _example(x.node).dtype != dtype and op is not None and op.name == "to":
            before = op.get("input")
            same = _example(before).device == _example(x.node).device
            if same and not scope.written(before, after=scope.order[x.node], before=scope.order[out]):
                x = Operand(before, x.steps)
        if _example(x.node).dtype != dtype and not scope.autocast:
            raise Refused("its query, key and value have different dtypes")
        found.append(x)
    return found


def _before_repeat(scope: Scope, out: Node, query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand]:
    """Key and value before their heads are repeated, where nothing else is done to them."""
    if key.steps or value.steps or query.steps:
        return key, value
    base = unrepeated(scope, out, query.node, key.node, value.node)
    return Operand(base[0]), Operand(base[1])


def _leading(sizes: Sequence[Any], heads: tuple[Any, Any]) -> tuple[int, tuple[Any, ...]] | None:
    """How many of the leading ``sizes`` of B * H matrices of scores are those of sequences, and where each of them is
    at ``(b, h)``; None if heads are not apart in them, nor together with sequences in one."""
    B, H = heads
    if not sizes:
        return (0, ()) if known_equal(B * H, 1) else None
    if len(sizes) == 1:
        return 1, (_B if H == 1 else _B * H + _H,)
    split = next((i for i in range(len(sizes), 0, -1) if known_equal(math.prod(sizes[i:]), H)), None)
    return None if split is None else (split, (*_digits(_B, sizes[:split]), *_digits(_H, sizes[split:])))


def _digits(place: Any, sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Where an entry of a dimension is once that is taken apart into ``sizes``."""
    digits: list[Any] = []
    for size in map(size_expr, reversed(sizes[1:])):
        digits.insert(0, sympy.Mod(place, size))
        place = sympy.floor(place / size)
    return (place, *digits) if len(sizes) else ()


def _coordinates(like: Node, heads: tuple[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where the dimensions of a tensor of scores are, and their sizes."""
    shape = _shape(like)
    split, places = _leading(shape[:-2], heads)
    if not all(isinstance(number(size), int) for size in (*shape[1:split], *shape[split + 1 : -2])):
        raise Refused("its scores are taken apart into a number of parts that is not known when compiling")
    return (*places, _Q, _K), tuple(shape)


def _prove(
    scope: Scope, scores: _Scores, sizes: tuple[Any, Any, Any, Any], heads: tuple[Any, Any], out: Node
) -> tuple[Mask, Padding | None]:
    parts = [
        _shown(scope, node, factor, like, heads) or MaskPart(node, *_coordinates(like, heads), factor=factor)
        for node, factor, like in scores.added
    ]
    for node, hides, like in scores.filled:
        if _example(node).dtype != torch.bool:
            return Mask(
                unknown="it fills scores where something is that is not a boolean tensor", nearest="a boolean mask"
            ), None
        parts.append(MaskPart(node, *_coordinates(like, heads), hides))
    if not parts:
        return Mask(), None
    proven, padding = prove_all(parts, sizes, scope, out)
    if proven.unknown is None or len(parts) > 1:
        return proven, padding
    return same_for_all_queries(parts[0], sizes) or (proven, padding)


def _shown(scope: Scope, node: Node, factor: float, like: Node, heads: tuple[Any, Any]) -> MaskPart | None:
    """The boolean mask that a mask which is added is made from: ``where(shown, 0, lowest)``; None for another."""
    op = operation(node)
    if op is None or op.name != "where" or _example(op.get("condition")).dtype != torch.bool:
        return None
    then, other = (_scalar(op.get(name), Evaluator(scope, node)) for name in ("input", "other"))
    hides = other is not None and other * factor <= hidden_by(_example(node).dtype)
    if then != 0 or not hides or scope.overwritten(node):
        return None
    return MaskPart(op.get("condition"), *_coordinates(like, heads))


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(
    query: Operand,
    key: Operand,
    value: Operand,
    scores: _Scores,
    spec: AttentionSpec,
    heads: tuple[Any, Any],
    out: Node,
    autocast: Sequence[tuple[Any, ...]],
    emit: Emit,
    averages: bool = False,
) -> tuple[Node, Node]:
    """``averages``: rows without a visible key get the mean of the values, as those of a query 0 that sees them all."""
    with entered(autocast):
        q, k, v = (x.emit(emit) for x in (query, key, value))
        visible, mask = _emit_mask(scores, heads, q, _common(q, spec), emit)
        if averages:
            hidden = emit(torch.logical_not, emit(torch.any, visible, -1, True))
            q = emit(torch.masked_fill, q, hidden, 0.0)
            show = (torch.logical_or, mask, hidden) if mask is visible else (torch.masked_fill, mask, hidden, 0.0)
            mask = emit(*show)
        attention = emit(
            F.scaled_dot_product_attention, q, k, v,
            attn_mask=mask, dropout_p=spec.dropout_p, scale=spec.scale, enable_gqa=not known_equal(spec.H, spec.H_kv),
        )  # fmt: skip
        result = _like_product(attention, out, emit)
    return attention, result


def _common(query: Node, spec: AttentionSpec) -> torch.dtype:
    """What SDPA computes in, and wants its mask in."""
    return spec.dtype if torch.is_autocast_enabled(spec.device) else query.meta["example_value"].dtype


def _emit_mask(
    scores: _Scores, heads: tuple[Any, Any], query: Node, dtype: torch.dtype, emit: Emit
) -> tuple[Node | None, Node | None]:
    """Which scores no filling hides, and the mask for SDPA."""
    bias = visible = None
    for node, factor, like in scores.added:
        term = _broadcast(node, like, heads, query, emit)
        if not term.meta["example_value"].dtype.is_floating_point:
            term = emit(torch.Tensor.to, term, dtype)  # the sum of two booleans is another one
        if factor != 1:
            term = emit(torch.mul, term, factor)
        bias = term if bias is None else emit(torch.add, bias, term)
    for node, hides, like in scores.filled:
        shown = _broadcast(node, like, heads, query, emit)
        shown = emit(torch.logical_not, shown) if hides else shown
        visible = shown if visible is None else emit(torch.logical_and, visible, shown)
    if bias is None:
        return visible, visible
    if bias.meta["example_value"].dtype != dtype:
        bias = emit(torch.Tensor.to, bias, dtype)
    return visible, bias if visible is None else emit(torch.where, visible, bias, float("-inf"))


def _broadcast(node: Node, like: Node, heads: tuple[Any, Any], query: Node, emit: Emit) -> Node:
    """A tensor that broadcasts to scores like ``like``, so that it broadcasts to those of 4 dimensions, and has 2 at
    least. ``query`` is ``[B, H, Lq, D]``."""
    shape, sizes = _shape(node), _shape(like)[:-2]
    if len(shape) < 2:
        return emit(torch.reshape, node, (1, -1))  # no SDPA takes it as it is
    if len(sizes) == 2 or len(shape) == 2:
        return node
    if len(sizes) == 1:
        one = known_equal(shape[0], 1) or heads[1] == 1
        return emit(torch.unsqueeze, node, 1) if one else emit(torch.unflatten, node, 0, (-1, heads[1]))
    for _ in range(len(sizes) + 2 - len(shape)):
        node = emit(torch.unsqueeze, node, 0)
    split, _ = _leading(sizes, heads)
    for dim, (start, stop) in ((1, (split, len(sizes))), (0, (0, split))):  # heads first: the other places stay
        own = [known_equal(size, 1) for size in _shape(node)[start:stop]]
        if any(own) and not all(own):
            wanted: list[Any] = [-1] * len(_shape(node))
            missing = [start + i for i, one in enumerate(own) if one and not known_equal(sizes[start + i], 1)]
            for i in missing:
                wanted[i] = number(sizes[i])
                if not isinstance(wanted[i], int):  # the first
                    rest = math.prod(number(sizes[j]) for j in range(start, stop) if j != i)
                    whole = emit(torch.Tensor.size, query, dim)
                    wanted[i] = emit(operator.floordiv, whole, rest) if rest != 1 else whole
            node = emit(torch.Tensor.expand, node, *wanted)
        if stop - start > 1:
            node = emit(torch.flatten, node, start, stop - 1)
        elif stop == start:
            node = emit(torch.unsqueeze, node, start)
    return node


def _like_product(attention: Node, out: Node, emit: Emit) -> Node:
    """``[B, H, Lq, Dv]`` as the product with the values has it."""
    op, rank = operation(out), len(_shape(out))
    if rank == 3:
        attention = emit(torch.flatten, attention, 0, 1)
    elif rank == 2:
        attention = emit(torch.flatten, attention, 0, 2)
    if op.name == "einsum":
        inputs, result = op.get("equation").replace(" ", "").split("->")
        first, second = inputs.split(",")
        have = [x for x in first if x in result] + [x for x in second if x in result and x not in first]
        order = tuple(have.index(x) for x in result)
        if order != tuple(range(rank)):
            attention = emit(torch.permute, attention, order)
    if attention.meta["example_value"].dtype != _example(out).dtype:
        attention = emit(torch.Tensor.to, attention, _example(out).dtype)
    return attention
