"""What a mask function of transformers lets a query see, proven as the mask of a graph is (``passes/mask.py``).

transformers describes a mask by a function of four places, batch, head, query and key, which it runs on broadcast
tensors of them. Here it runs on tensors without values; the graph of what it does to them goes to the prover. So a
function is known by what it computes, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode

from ...core.spec import Mask
from ...passes.mask import prove
from ...passes.site import Scope

_PLACES = (2, 2, 1 << 29, 1 << 29)  # more queries and keys than any window
_KNOWN: dict[Hashable, Mask] = {}
_MOST = 64


def proven(mask_function: Callable[..., Any]) -> Mask:
    """What ``mask_function`` lets a query see of keys that are numbered as queries are; ``Mask.unknown`` says why not.

    One that reads anything else than the places, numbers and functions of its own kind is not run, and is unknown.
    """
    try:
        key = _identity(mask_function)
    except (TypeError, RecursionError) as error:
        return Mask(unknown=str(error))
    known = _KNOWN.get(key)
    if known is None:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        known = _KNOWN[key] = _proven(mask_function)
    return known


def _proven(mask_function: Callable[..., Any]) -> Mask:
    try:
        with _Recorder() as recorder:
            places = []
            for i, n in enumerate(_PLACES):
                places.append(torch.arange(n, device="meta").view(*(n if i == j else 1 for j in range(4))))
            out = mask_function(*places)
    except Exception as error:  # whatever it asks of values, which are none
        return Mask(unknown=f"its mask function raises {type(error).__name__} without values")
    mask = recorder.nodes.get(id(out))
    if mask is None or out.dtype != torch.bool:
        return Mask(unknown="its mask function makes no boolean tensor of the places")
    reader = recorder.graph.output(mask)
    return prove(mask, _PLACES, Scope(GraphModule(torch.nn.Module(), recorder.graph)), reader)[0]


class _Recorder(TorchFunctionMode):
    """Writes down what is done to tensors, as Dynamo would. nodes: by the id of the tensor, all of which are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, self._node, (args, kwargs or {}))
            is_method = getattr(torch.Tensor, function.__name__, None) is function
            write = self.graph.call_method if is_method else self.graph.call_function
            node = write(function.__name__ if is_method else function, args, kwargs)
            node.meta["example_value"] = out
            self.nodes[id(out)] = node
        return out

    def _node(self, tensor: torch.Tensor) -> Node:
        return self.nodes[id(tensor)]


def _identity(x: Any) -> Hashable:
    """What tells mask functions apart that compute different things; ``TypeError`` for what may change unseen."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x), x
    if isinstance(x, (tuple, list)):
        return tuple(map(_identity, x))
    if isinstance(x, ModuleType) and x.__name__.partition(".")[0] in ("torch", "math", "operator"):
        return x.__name__
    if isinstance(x, BuiltinFunctionType):
        return x
    if not isinstance(x, FunctionType):
        raise TypeError(f"its mask function reads a {type(x).__name__}")
    named = [x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__]
    held = [cell.cell_contents for cell in x.__closure__ or ()]
    defaults = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    return x.__code__, _identity([*named, *held, *defaults, *vars(x).values()])


def _names(code: CodeType) -> list[str]:
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return [*code.co_names, *inner]
