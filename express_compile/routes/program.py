"""The program that torch.export is tracing, read and rewritten while it is written.

torch.export calls a model with tensors that have no values (``strict=False``, its default) and writes down what is done
to them in operations of ATen. A mask that the model makes is proven by how the program computes it; the call of a
module that writes attention itself is traced into a graph of its own, which is matched, planned and rewritten as one of
Dynamo's and then becomes a part of the program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..core.policy import Policy
from ..core.sites import SiteReport
from ..core.spec import Mask
from ..passes.buffers import Buffers, is_readable
from ..passes.mask import prove
from ..passes.match import find_sites
from ..passes.pipeline import PlannedGraph, plan_sites
from ..passes.place import Place, module_paths
from ..passes.rewrite import rewrite
from ..passes.site import Scope

_PROVEN = "_express_compile_proven"  # an attribute of a mask: its node, and what is proven of it
_is_inside: ContextVar[bool] = ContextVar("express_compile_inside_program", default=False)


# ---- what a mask shows ---------------------------------------------------------------------------------------------


def proven_in_program(mask: torch.Tensor, sizes: tuple[Any, Any, Any, Any]) -> Mask | None:
    """What a mask that the program computes lets the queries of a site of ``sizes`` ``(B, H, Lq, Lk)`` see, proven by
    how it is computed; None where that cannot be found, or is a key padding."""
    tracer = getattr(proxy_tensor._CURRENT_MAKE_FX_TRACER, "fx_tracer", None)
    slot = None if tracer is None else proxy_tensor.get_proxy_slot(mask, tracer, None)
    if slot is None:
        return None
    node = slot.proxy.node
    known = getattr(mask, _PROVEN, None)
    if known is None or known[0] is not node:
        copied = _copied(node)
        reader = copied.graph.output(copied)
        shown, padding = prove(copied, sizes, Scope(GraphModule(nn.Module(), copied.graph)), reader)
        known = node, None if padding is not None else without_wide_window(shown, sizes[3])
        setattr(mask, _PROVEN, known)
    return known[1]


def without_wide_window(mask: Mask, Lk: Any) -> Mask:
    """``mask`` without a window that is known to be as wide as the sequence may become."""
    wide = mask.window is not None and statically_known_true(mask.window >= Lk)
    return replace(mask, window=None) if wide else mask


# ---- the call of a module ------------------------------------------------------------------------------------------


def is_inside() -> bool:
    """Whether a call is traced that will be rewritten as a whole."""
    return _is_inside.get()


def trace_rewritten(
    module: nn.Module, path: str, policy: Policy, run: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, list[SiteReport]]:
    """``run(module, *args, **kwargs)``, the call of a module that is at ``path`` in its model, as a part of the program
    with its attention rewritten; and what became of its sites.

    Raises ``ValueError`` if ``policy.strict`` and a site was refused.
    """
    tracer = proxy_tensor._CURRENT_MAKE_FX_TRACER
    assert tracer is not None, "torch.export traces by make_fx"
    outer: Any = tracer.fx_tracer
    _require_plain(module, "is given", leaves := pytree.tree_leaves((args, kwargs)))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    inputs = list({id(x): x for x in (*module.parameters(), *module.buffers(), *given)}.values())
    spec: Any = None

    def call(*_: Any) -> tuple[Any, ...]:
        nonlocal spec
        results, spec = pytree.tree_flatten(run(module, *args, **kwargs))
        _require_plain(module, "returns", results)
        return tuple(results)

    written = len(outer.graph.nodes)
    token = _is_inside.set(True)
    try:
        gm = tracer.trace_subgraph(call, *inputs)
    finally:
        _is_inside.reset(token)
    for node in reversed(list(outer.graph.nodes)[written:]):  # what the tracer looked up on the way
        outer.graph.erase_node(node)
    with _disable_current_modes():
        place = Place(module_paths(module, path), ((str(id(module)), path),), holder=module)
        reports = _rewrite(gm, place, policy, inputs, outer.scope_root)
    return pytree.tree_unflatten(Interpreter(gm).run(*inputs), spec), reports


_PLAIN = (
    torch.Tensor,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    int,
    float,
    str,
    type(None),
    torch.dtype,
    torch.device,
)


def _require_plain(module: nn.Module, what: str, leaves: list[Any]) -> None:
    """Raise ``RuntimeError`` for objects that may hold tensors without a program knowing of it."""
    if others := [type(x).__name__ for x in leaves if not isinstance(x, _PLAIN)]:
        raise RuntimeError(
            f"{type(module).__name__}: {what} a {others[0]}, which torch.export cannot follow where attention "
            "is rewritten; of models with a cache, export them with use_cache=False"
        )


def _rewrite(
    gm: GraphModule, place: Place, policy: Policy, inputs: list[torch.Tensor], root: nn.Module
) -> list[SiteReport]:
    """Rewrite the graph of a call that has these inputs, whose nodes name modules of ``root``; what became of its
    sites."""
    for node in gm.graph.nodes:
        stack = (node.meta.get("nn_module_stack") or {}).values()
        parts = [(root.get_submodule(name.partition("@")[0]), name, kind) for name, kind in stack]
        node.meta["nn_module_stack"] = {f"{id(part)}@{name}": (name, kind) for part, name, kind in parts}
        node.meta["example_value"] = node.meta.get("val")
        _spell(node)
    buffers, held = Buffers(), _held(inputs)
    placeholders = dict(enumerate(gm.graph.find_nodes(op="placeholder")))
    buffers.places = {placeholders[i]: i for i in held}
    buffers.tensors = {placeholders[i]: tensor for i, tensor in held.items()}
    planned = PlannedGraph(gm, policy, place, buffers, plan_sites(find_sites(gm, buffers, place), policy))
    rewrite(gm, planned.sites, policy)
    return planned.reports()


def _held(inputs: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The tensors with values that those among the inputs stand for that are buffers."""
    found: dict[int, torch.Tensor] = {}
    modes = {x.fake_mode for x in inputs if isinstance(x, FakeTensor)}
    for known in (mode.fake_tensor_converter.meta_converter for mode in modes):
        of = {id(known.tensor_memo.get(i)): real for real, i in known.describer.lookup_tensor.items()}
        found |= {i: of[id(x)] for i, x in enumerate(inputs) if id(x) in of and is_readable(of[id(x)])}
    return found


# ---- a graph of ATen as one of Dynamo ---------------------------------------------------------------------------


def _copied(node: Node) -> Node:
    """A copy of ``node`` and of all that it is computed from, in a graph of its own that reads as one of Dynamo's."""
    needed, pending = {node}, [node]
    while pending:
        for other in pending.pop().all_input_nodes:
            if other not in needed:
                needed.add(other)
                pending.append(other)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for own in node.graph.nodes:
        if own in needed:
            is_input = own.op not in ("call_function", "call_method")
            copies[own] = graph.placeholder(own.name) if is_input else graph.node_copy(own, copies.__getitem__)
            copies[own].meta = {"example_value": own.meta.get("val")}
            _spell(copies[own])
    return copies[node]


_END = torch.iinfo(torch.int64).max
_OPERATORS = {f"__{name}__": getattr(operator, f"{name}_") for name in ("and", "or")} | {"__xor__": operator.xor}


def _spell(node: Node) -> None:
    """Let a node of ATen that has no name of its own in Python be what Python calls there."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return
    name, args = node.target._schema.name.removeprefix("aten::"), cast(tuple[Any, ...], node.args)
    index: Any = None
    if name in _OPERATORS:
        node.target = _OPERATORS[name]
    elif name == "lift_fresh_copy" and (constant := _constant(args[0])) is not None:
        node.target, node.args = torch.tensor, (constant.item(),)
        node.kwargs = {"dtype": constant.dtype, "device": constant.device}
    elif name == "detach_":  # of a number that was just made
        node.target = torch.ops.aten.detach.default
    elif node.target._schema.is_mutable and name.endswith("_") and hasattr(torch.Tensor, name):
        node.op, node.target = "call_method", name
    elif node.target is torch.ops.aten.index.Tensor:
        index = tuple(slice(None) if i is None else i for i in args[1])
    elif node.target is torch.ops.aten.select.int:
        index = (*_whole(args), args[2])
    elif node.target is torch.ops.aten.slice.Tensor:
        bounds = [*args[2:], *(None, None, 1)[max(0, len(args) - 2) :]]
        index = (*_whole(args), slice(bounds[0], None if bounds[1] == _END else bounds[1], bounds[2]))
    if index is not None:
        node.target, node.args, node.kwargs = operator.getitem, (args[0], index), {}


def _constant(node: Node) -> torch.Tensor | None:
    """The single number that a node looks up in what its graph holds."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    held = getattr(node.graph.owning_module, str(node.target), None)
    return held if isinstance(held, torch.Tensor) and held.dim() == 0 and not isinstance(held, FakeTensor) else None


def _whole(args: Any) -> tuple[slice, ...]:
    """What an index says of the dimensions before that in ``args``, of a tensor of ATen."""
    dim = args[1] if len(args) > 1 else 0
    return (slice(None),) * (dim % args[0].meta["example_value"].dim())
