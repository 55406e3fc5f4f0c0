"""Constants on queries and keys: the ``D**-0.5`` of ``(q * D**-0.5) @ k^T`` belongs to the scale of the scores.

A method that thins keys compares them by ``exp(scale <k, k'>)``, so it must know the whole scale. Queries and keys are
taken before they are multiplied by positive numbers, and the views that follow are written anew on them: in half
precision with one rounding less, so this is done in every floating dtype. What is scaled in place (``q *= c``) stays
as it is, and the scale without it: the query before is gone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .nodes import tensor_of
from .normalize import Operation, number, operation
from .site import Operand, Scope, Step

_MOVES = ("flatten", "unflatten", "unsqueeze", "squeeze", "expand", "transpose", "permute", "contiguous")


def unscaled(scope: Scope, x: Operand) -> tuple[Operand, float]:
    """``x`` before it is multiplied or divided by positive numbers, and the factor that this makes; ``x`` and 1.0 where
    it is not, or where what was multiplied is written in place later."""
    node, factor = x.node, 1.0
    steps: tuple[Step, ...] = ()
    found = x, 1.0
    while (op := operation(node)) is not None and not scope.overwritten(node):
        before, constant = _scaling(op) if op.name in ("mul", "div") else (op.get("input"), None)
        if not _alike(before, x.node):
            break
        if constant is not None and 0 < factor * constant < math.inf:
            factor *= constant
            if not scope.overwritten(before):
                found = Operand(before, (*steps, *x.steps)), factor
        elif (step := _view(op, node)) is not None:
            steps = (step, *steps)
        else:
            break
        node = before
    return found


def _scaling(op: Operation) -> tuple[Any, float | None]:
    """What a product or quotient scales, and by what number; None if that is not a positive one."""
    before, other = op.get("input"), number(op.get("other"))
    if op.name == "mul" and isinstance(number(before), int | float):
        before, other = op.get("other"), number(before)
    if op.get("rounding_mode") is not None or not isinstance(other, int | float) or not 0 < other < math.inf:
        return before, None
    return before, float(other) if op.name == "mul" else 1 / other


def _alike(before: Any, after: Node) -> bool:
    """Whether a tensor has the floating dtype of another one, and gradients reach both or neither."""
    x, y = tensor_of(before), tensor_of(after)
    if x is None or y is None or not x.dtype.is_floating_point:
        return False
    return x.dtype == y.dtype and x.requires_grad == y.requires_grad


def _view(op: Operation, node: Node) -> Step | None:
    """How to write a view anew on another tensor of the same shape, whose strides may differ; None for other calls."""
    if op.name in ("view", "reshape"):
        shape = op.get("shape")
        whole = isinstance(shape, tuple | list) and len(shape) == 1 and _is_size(shape[0])
        return torch.reshape, (shape[0] if whole else shape,), {}
    if op.name not in _MOVES or node.args[:1] != (op.get("input"),):
        return None
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return function, tuple(node.args[1:]), dict(node.kwargs)


def _is_size(argument: Any) -> bool:
    """Whether an argument is a whole shape, as in ``x.view(y.shape)``."""
    return isinstance(argument, Node) and isinstance(argument.meta.get("example_value"), torch.Size)
