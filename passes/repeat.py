"""Grouped queries: key and value before their heads are repeated for the query heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..core.spec import known_equal
from .nodes import same_sizes, shape_of, tensor_of
from .normalize import Operation, operation
from .site import Scope


def unrepeated(scope: Scope, node: Node, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Key and value before their heads are repeated, if both are repeated alike and that is proven."""
    keys, values = (_base(scope, node, repeated) for repeated in (key, value))
    if keys is None or values is None or not same_sizes(shape_of(keys)[1:-2], shape_of(values)[1:-2]):
        return key, value
    return (keys, values) if same_sizes(shape_of(key)[1:-2], shape_of(query)[1:-2]) else (key, value)


def _base(scope: Scope, node: Node, repeated: Node) -> Node | None:
    """The ``[B, H_kv, L, D]`` node whose head ``h // n`` is head ``h`` of ``repeated``, or one of more dimensions that
    was expanded; None if not proven."""
    chain = [repeated]
    while (op := operation(chain[-1])) is not None and op.name in ("contiguous", "clone", "detach"):
        chain.append(op.node())
    if op is None or op.name not in _READ:
        return None
    base = _READ[op.name](chain[-1], op)
    if base is None or not _fits(base, repeated):
        return None
    chain.append(op.node())
    # base is read at the site: neither it nor any copy on the way may be written before that
    site = scope.order[node]
    if scope.written(base, after=scope.order[base], before=site):
        return None
    # gradients stop at a repetition that was made without them
    if any(scope.order[base] < i < scope.order[repeated] for i in scope.grad_switches):
        return None
    return None if any(scope.written(step, before=site) for step in chain if step is not base) else base


def _rank(node: Any) -> int:
    example = tensor_of(node)
    return -1 if example is None else example.dim()


def _fits(base: Node, repeated: Node) -> bool:
    """Whether two nodes differ in the number of heads alone; gradients must reach both or neither."""
    x, y = base.meta["example_value"], repeated.meta["example_value"]
    if x.dtype != y.dtype or x.requires_grad != y.requires_grad:
        return False
    return x.dim() == y.dim() >= 4 and same_sizes((x.shape[0], *x.shape[-2:]), (y.shape[0], *y.shape[-2:]))


# ---- how heads are repeated: (the result, its operation) -> what is repeated, None if it is not read so ----


def _broadcast_head(repeated: Node, op: Operation) -> Node | None:
    """One head, repeated to all of them, or to those of a group."""
    base = op.node()
    if _rank(base) != _rank(repeated):
        return None
    heads = zip(shape_of(base)[1:-2], shape_of(repeated)[1:-2], strict=True)
    return base if all(known_equal(one, 1) or known_equal(one, many) for one, many in heads) else None


def _interleaved(repeated: Node, op: Operation) -> Node | None:
    base, count = op.node(), op.get("repeats")
    if _rank(base) != 4 or op.get("dim") not in (1, -3) or not isinstance(count, int):
        return None
    return base if known_equal(shape_of(base)[1] * count, shape_of(repeated)[1]) else None


def _expanded(repeated: Node, op: Operation) -> Node | None:
    """``base[:, :, None].expand(B, H_kv, n, L, D)`` under a reshape to ``[B, H_kv * n, L, D]``."""
    grouped = op.node()
    expand = operation(grouped) if _rank(grouped) == 5 else None
    if expand is None or expand.name not in ("expand", "broadcast_to", "expand_as", "repeat"):
        return None
    inserted = expand.node()
    insert = operation(inserted) if _rank(inserted) == 5 else None
    if insert is None or insert.name not in ("unsqueeze", "getitem", "view", "reshape"):
        return None
    base = insert.node()
    if _rank(base) != 4 or (insert.name == "getitem" and not _inserts_only(insert.get("index"))):
        return None
    b, h, n, length, d = shape_of(grouped)
    # a dimension of size one anywhere: the row-major order, and so head h // n, is the same
    wanted = ((repeated, (b, h * n, length, d)), (inserted, (b, h, 1, length, d)), (base, (b, h, length, d)))
    return base if all(same_sizes(shape_of(node), shape) for node, shape in wanted) else None


_READ: dict[str, Callable[[Node, Operation], Node | None]] = {
    "repeat_interleave": _interleaved,
    **dict.fromkeys(("view", "reshape", "flatten"), _expanded),
    **dict.fromkeys(("expand", "broadcast_to", "repeat"), _broadcast_head),
}


def _inserts_only(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)
