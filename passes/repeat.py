"""Grouped queries: key and value before their heads are repeated for the query heads."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..core.spec import known_equal
from .normalize import operation
from .site import Scope, shape_of


def unrepeated(scope: Scope, node: Node, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Key and value before their heads are repeated, if both are repeated alike and that is proven."""
    before = tuple(_base(scope, node, repeated) for repeated in (key, value))
    if None in before or not known_equal(shape_of(before[0])[1], shape_of(before[1])[1]):
        return key, value
    if not known_equal(shape_of(key)[1], shape_of(query)[1]):
        return key, value
    return before


def _base(scope: Scope, node: Node, repeated: Node) -> Node | None:
    """The ``[B, H_kv, L, D]`` node whose head ``h // n`` is head ``h`` of ``repeated``; None if not proven."""
    chain = [repeated]
    while (op := operation(chain[-1])) is not None and op.name in ("contiguous", "clone", "detach"):
        chain.append(op.get("input"))
    base, last = None, chain[-1]
    if op is None:
        return None
    if op.name == "repeat_interleave":
        base = _interleaved(last, op)
    elif op.name in ("view", "reshape", "flatten"):
        base = _expanded(last, op.get("input"))
        chain.append(op.get("input"))
    elif op.name in ("expand", "broadcast_to", "repeat"):
        base = _broadcast_head(last, op.get("input"))
    if base is None or not _fits(base, repeated):
        return None
    # base is read at the site: neither it nor any copy on the way may be written before that
    site = scope.order[node]
    if scope.written(base, after=scope.order[base], before=site):
        return None
    # gradients stop at a repetition that was made without them
    if any(scope.order[base] < i < scope.order[repeated] for i in scope.grad_switches):
        return None
    return None if any(scope.written(step, before=site) for step in chain) else base


def _broadcast_head(repeated: Node, base: Any) -> Node | None:
    """``base`` of one head, repeated to all of them."""
    return base if _rank(base) == 4 and known_equal(shape_of(base)[1], 1) and _fits(base, repeated) else None


def _rank(node: Any) -> int:
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    return example.dim() if isinstance(example, torch.Tensor) else -1


def _fits(base: Node, repeated: Node) -> bool:
    """Whether two nodes differ in the number of heads alone; gradients must reach both or neither."""
    x, y = base.meta["example_value"], repeated.meta["example_value"]
    if x.dtype != y.dtype or x.requires_grad != y.requires_grad:
        return False
    return x.dim() == y.dim() == 4 and all(known_equal(x.shape[i], y.shape[i]) for i in (0, 2, 3))


def _interleaved(repeated: Node, op: Any) -> Node | None:
    base, count = op.get("input"), op.get("repeats")
    if _rank(base) != 4 or op.get("dim") not in (1, -3) or not isinstance(count, int):
        return None
    return base if known_equal(shape_of(base)[1] * count, shape_of(repeated)[1]) else None


def _expanded(repeated: Node, grouped: Any) -> Node | None:
    """``base[:, :, None].expand(B, H_kv, n, L, D)`` under a reshape to ``[B, H_kv * n, L, D]``."""
    op = operation(grouped) if isinstance(grouped, Node) else None
    if _rank(grouped) != 5 or op is None or op.name not in ("expand", "broadcast_to", "expand_as", "repeat"):
        return None
    inserted = op.get("input")
    if _rank(inserted) != 5:
        return None
    b, h, n, length, d = shape_of(grouped)
    ones = shape_of(inserted)
    if not all(known_equal(x, y) for x, y in zip(ones, (b, h, 1, length, d), strict=True)):
        return None
    if not all(known_equal(x, y) for x, y in zip(shape_of(repeated), (b, h * n, length, d), strict=True)):
        return None
    insert = operation(inserted)
    if insert is None or insert.name not in ("unsqueeze", "getitem", "view", "reshape"):
        return None
    base = insert.get("input")
    if _rank(base) != 4:
        return None
    # a dimension of size one anywhere: the row-major order, and so head h // n, is the same
    if not all(known_equal(x, y) for x, y in zip(shape_of(base), (b, h, length, d), strict=True)):
        return None
    return base if insert.name != "getitem" or _inserts_only(insert.get("index")) else None


def _inserts_only(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)
