"""One spelling per operation, nothing else.

Dynamo hands over the program as it was written: ``x & y``, ``torch.bitwise_and(x, y)``, ``x.bitwise_and(other=y)``
and ``torch.ops.aten.bitwise_and.Tensor(x, y)`` are four different nodes. :func:`operation` reads all of them as
``Operation("bitwise_and", {"input": x, "other": y})``. It changes no graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

# Parameters by position; "*name" takes all that are left, given one by one or as one sequence.
# Sizes and dtypes are mostly left out: the node's own example_value says those of its result.
_BINARY = ("input", "other")
_UNARY = ("input",)
SIGNATURES: dict[str, tuple[str, ...]] = {
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    **dict.fromkeys(("mul", "div", "eq", "ne", "lt", "le", "gt", "ge"), _BINARY),
    **dict.fromkeys(("floor_divide", "remainder", "maximum", "minimum"), _BINARY),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), _BINARY),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), _BINARY),
    **dict.fromkeys(("neg", "abs", "bitwise_not", "logical_not", "exp", "log", "zero"), _UNARY),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "fill": ("input", "value"),
    "cat": ("tensors", "dim"),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"),
    "cumsum": ("input", "dim"),
    "diff": ("input", "n", "dim", "prepend", "append"),
    "arange": ("start", "end", "step"),
    "tensor": ("data",),
    "scalar_tensor": ("data",),
    "full": ("size", "fill_value"),
    "new_full": ("input", "size", "fill_value"),
    "full_like": ("input", "fill_value"),
    **dict.fromkeys(("ones", "zeros"), ("*size",)),
    **dict.fromkeys(("new_ones", "new_zeros"), ("input", "*size")),
    **dict.fromkeys(("ones_like", "zeros_like"), _UNARY),
    "getitem": ("input", "index"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "*dim"),
    "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"),
    **dict.fromkeys(("view", "reshape"), ("input", "*shape")),
    **dict.fromkeys(("expand", "broadcast_to"), ("input", "*size")),
    "expand_as": ("input", "other"),
    "repeat": ("input", "*repeats"),
    "tile": ("input", "*dims"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "transpose": ("input", "dim0", "dim1"),
    "permute": ("input", "*dims"),
    "to": ("input", "*how"),
    **dict.fromkeys(("contiguous", "clone", "detach"), _UNARY),
    "scaled_dot_product_attention": (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    ),
    "softmax": ("input", "dim"),  # what comes third differs: dtype, _stacklevel, half_to_float
    **dict.fromkeys(("softmin", "log_softmax"), ("input", "dim")),
    **dict.fromkeys(("amax", "max", "sum", "logsumexp"), ("input", "dim", "keepdim")),
    "dropout": ("input", "p", "training", "inplace"),
    **dict.fromkeys(("matmul", "bmm"), _BINARY),
    "baddbmm": ("input", "batch1", "batch2"),
    "einsum": ("equation", "*operands"),
}

_ALIASES = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_unsafe_view": "view",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",  # rows without a key are 0, as everywhere here
    "special_softmax": "softmax",
    **dict.fromkeys(("_log_softmax", "special_log_softmax"), "log_softmax"),
    "special_logsumexp": "logsumexp",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "clip": "clamp",
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("bool", "int", "long", "float", "double", "half", "bfloat16", "type", "type_as"), "to"),
    **dict.fromkeys(("cpu", "cuda", "_to_copy"), "to"),
}
_KEYWORDS = {
    **{"self": "input", "tensor": "input", "axis": "dim", "tensor1": "input", "mat2": "other"},
    "train": "training",  # of torch.dropout
    **{"axis0": "dim0", "axis1": "dim1", ("view", "size"): "shape", ("scalar_tensor", "s"): "data"},
}
_NAMESPACES = (torch, F, torch.Tensor, torch._C._nn, torch._C._VariableFunctions, torch._C._special, operator)
_REFLECTED = {f"__r{name}__": name for name in ("add", "sub", "mul", "and", "or", "xor", "truediv", "matmul")}


@dataclass(frozen=True)
class Operation:
    """A canonical name (a key of :data:`SIGNATURES`) and its arguments by canonical parameter name."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where it was not given."""
        return self.args.get(name, default)


def operation(node: Node) -> Operation | None:
    """The operation a node performs in its one spelling; None if it is not a pure operation known here."""
    if node.target is getattr and node.args[1:] in (("mT",), ("T",)):
        return _turned(node)
    name, reflected = _name(node)
    return _bound(node, name, reflected)


def _turned(node: Node) -> Operation | None:
    """``x.mT``, and ``x.T`` of a matrix."""
    example = node.meta.get("example_value")
    if node.args[1] == "T" and not (isinstance(example, torch.Tensor) and example.dim() == 2):
        return None
    return Operation("transpose", {"input": node.args[0], "dim0": -1, "dim1": -2})


_WRITES = frozenset(
    ("add", "sub", "mul", "div", "floor_divide", "remainder", "neg", "abs", "exp", "log", "clamp", "clamp_min")
    + ("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and")
    + ("logical_or", "logical_xor", "logical_not", "masked_fill", "tril", "triu", "fill", "zero")
)
"""The operations that have a spelling which writes their result into their first argument."""


def in_place(node: Node) -> Operation | None:
    """``x.masked_fill_(...)`` as the ``masked_fill`` of what ``x`` held before, and so are ``x *= y``, ``x[mask] = y``
    and ``x[:] = y`` read; None for every other node."""
    name, _ = _name(node)
    if name == "setitem":
        return _assigned(*node.args)
    if name is None or not (name.endswith("_") or name in _IN_PLACE):
        return None
    name = name.removesuffix("_") if name.endswith("_") else name[1:]
    name = _ALIASES.get(name, name)
    return _bound(node, name, False) if name in _WRITES else None


def _assigned(x: Any, index: Any, value: Any) -> Operation | None:
    """``x[index] = value`` where ``index`` is a boolean tensor of the same rank, or everything."""
    shown, held = (arg.meta.get("example_value") if isinstance(arg, Node) else None for arg in (index, x))
    if isinstance(shown, torch.Tensor) and shown.dtype == torch.bool and shown.dim() == held.dim():
        return Operation("masked_fill", {"input": x, "mask": index, "value": value})
    whole = index is Ellipsis or (isinstance(index, slice) and index == slice(None))
    return Operation("fill", {"input": x, "value": value}) if whole else None


def number(arg: Any) -> Any:
    """An argument as a number, where it is one for every input: Dynamo may hand over a node or a symbol for it.

    The attribute of a module that has had another value before, in another model of its class say, becomes a symbol.
    Its value now is taken, and Dynamo guards it. What a caller passes may change often, and stays a symbol.
    """
    node, arg = arg, arg.meta.get("example_value") if isinstance(arg, Node) else arg
    if isinstance(arg, torch.SymFloat) and isinstance(node, Node) and _is_attribute(node, arg):
        return float(arg)
    if isinstance(arg, torch.SymInt | torch.SymFloat) and arg.node.expr.is_number:
        return (int if isinstance(arg, torch.SymInt) else float)(arg.node.expr)
    return arg


def _is_attribute(node: Node, value: torch.SymFloat) -> bool:
    """Whether a symbolic number is made of floats that are no arguments of the compiled function, and nothing else."""
    symbols = value.node.expr.free_symbols
    if not symbols or not value.node.has_hint() or not all(symbol_is_type(x, SymT.FLOAT) for x in symbols):
        return False
    open_nodes, seen = [node], {node}
    while open_nodes:
        current = open_nodes.pop()
        if current.op == "placeholder":
            source = getattr(current.meta.get("grapharg"), "source", None)
            if getattr(source, "base", None) is None:
                return False
        new = [x for x in current.all_input_nodes if x not in seen]
        seen.update(new)
        open_nodes.extend(new)
    return True


def _bound(node: Node, name: str | None, reflected: bool) -> Operation | None:
    if name not in (*SIGNATURES, "min") or node.kwargs.get("out") is not None:
        return None
    args = tuple(node.args)
    if reflected:
        args = args[::-1]
    if name == "arange":
        return _arange(args, dict(node.kwargs))
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Node) and "example_value" in args[1].meta:
        name = f"{name}imum"  # of two tensors
    if name not in SIGNATURES:
        return None
    if name == "view" and any(isinstance(value, torch.dtype) for value in (*args, *node.kwargs.values())):
        return None  # reinterprets the bits
    bound: dict[str, Any] = {}
    parameters = SIGNATURES[name]
    if name == "where" and (node.op == "call_method" or node.target is torch.Tensor.where):
        parameters = ("input", "condition", "other")  # x.where(condition, other)
    for i, parameter in enumerate(parameters):
        if parameter.startswith("*"):
            rest = args[i:]
            if rest:
                bound[parameter[1:]] = tuple(rest[0]) if isinstance(rest[0], list | tuple) else rest
            break
        if i < len(args):
            bound[parameter] = args[i]
    for keyword, value in node.kwargs.items():
        bound[_KEYWORDS.get((name, keyword), _KEYWORDS.get(keyword, keyword))] = value
    if name == "where" and "other" not in bound:
        return None  # where(condition) lists indices
    if name == "einsum" and not isinstance(bound.get("equation"), str):
        return None
    return Operation(name, bound)


def called(node: Node) -> str | None:
    """The canonical name of what of torch a node calls, whether it is known here or not; None for other calls."""
    return _name(node)[0]


def _name(node: Node) -> tuple[str | None, bool]:
    """The canonical name of what a node calls, and whether its two operands are the other way round."""
    target = node.target
    if node.op == "call_method":
        if target in _REFLECTED:
            return _ALIASES.get(_REFLECTED[target], _REFLECTED[target]), True
        name = target.removeprefix("__").removesuffix("__") if target.startswith("__") else target
    elif node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten" or target._schema.is_mutable:
            return None, False
        name = target._schema.name.removeprefix("aten::")
    elif node.op == "call_function" and isinstance(target, torch._ops.OpOverloadPacket):
        if not target._qualified_op_name.startswith("aten::"):
            return None, False
        name = target.__name__
    elif node.op == "call_function":
        name = getattr(target, "__name__", None)
        # a user's function may carry any name: it counts only if it *is* torch's
        if name is None or not any(getattr(space, name, None) is target for space in _NAMESPACES):
            return None, False
        if getattr(operator, name, None) is target:
            name = name.removesuffix("_")
    else:
        return None, False
    return _ALIASES.get(name, name), False


def _arange(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    names = ("end",) if len(args) == 1 and "end" not in kwargs else ("start", "end", "step")
    bound = {"start": 0, "step": 1, **dict(zip(names, args, strict=False))}
    return Operation("arange", bound | {k: v for k, v in kwargs.items() if k in ("start", "end", "step")})


def mutated_inputs(node: Node) -> list[Node]:
    """The tensors a node writes into, as far as its target tells; empty for a pure node."""
    target, args, kwargs = node.target, node.args, node.kwargs
    written: list[Any] = [kwargs["out"]] if kwargs.get("out") is not None else []
    if node.op == "call_method":
        if target.startswith("__"):
            if target == "__setitem__" or (target.startswith("__i") and target != "__invert__"):
                written.append(args[0])
        elif target.endswith("_"):
            written.append(args[0])
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        if isinstance(target, torch._ops.OpOverload):
            for i, parameter in enumerate(target._schema.arguments):
                if parameter.alias_info is not None and parameter.alias_info.is_write:
                    written.append(args[i] if i < len(args) else kwargs.get(parameter.name))
        elif isinstance(target, torch._ops.OpOverloadPacket):
            if any(
                getattr(target, overload)._schema.is_mutable for overload in target.overloads() if overload != "out"
            ):
                written.extend(node.all_input_nodes)
        elif isinstance(target, torch._ops.HigherOrderOperator):
            if "mutation" in target.name() or any(map(_writes_outside, bodies(node))):
                written.extend(node.all_input_nodes)
        elif getattr(operator, name, None) is target:
            if name == "setitem" or name in _IN_PLACE:
                written.append(args[0])
        elif name.endswith("_") and not name.endswith("__") or _inplace_flag(target, args, kwargs):
            written.append(args[0] if args else kwargs.get("input"))
    flat: list[Node] = []
    for value in written:
        flat.extend(v for v in (value if isinstance(value, list | tuple) else (value,)) if isinstance(v, Node))
    return flat


def shares_memory(a: Node, b: Node) -> bool:
    """Whether two nodes are tensors, or views of one, in the same memory."""
    return a is b or (_storage(a) is not None and _storage(a) == _storage(b))


def _storage(node: Node) -> int | None:
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return None
    try:
        return example.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and some wrapper tensors have none
        return None


_IN_PLACE = frozenset(
    ("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
    + ("itruediv", "ixor")
)


_FACTORIES = frozenset(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like"))


def is_new(node: Any) -> bool:
    """Whether a node makes a tensor that shares its memory with nothing made before."""
    op = operation(node) if isinstance(node, Node) else None
    return op is not None and op.name in _FACTORIES


def _writes_outside(body: GraphModule) -> bool:
    """Whether a graph may write into what it is given."""
    return not all(is_new(target) for node in body.graph.nodes for target in mutated_inputs(node))


def _inplace_flag(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if kwargs.get("inplace"):
        return True
    if not inspect.isfunction(target) or len(args) < 2:
        return False
    names = list(inspect.signature(target).parameters)
    return "inplace" in names and names.index("inplace") < len(args) and bool(args[names.index("inplace")])


def bodies(node: Node) -> list[GraphModule]:
    """The graph modules that a higher-order operator's node runs (checkpointed regions, branches)."""
    return [body for source in node.all_input_nodes if (body := graph_module(source)) is not None]


def graph_module(node: Node) -> GraphModule | None:
    """The graph module a ``get_attr`` node reads; None for every other node."""
    if node.op != "get_attr":
        return None
    owner: Any = node.graph.owning_module
    for part in node.target.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, GraphModule) else None


def computes_gradients(gm: GraphModule) -> bool:
    """Whether a Dynamo graph computes gradients itself (``torch.autograd.grad`` inside of what is compiled)."""
    return any(
        node.target is torch.autograd.grad
        or getattr(node.target, "__name__", "") == "_autograd_grad"
        or node.meta.get("autograd_backward")
        or (node.meta.get("custom") or {}).get("phase") == "backward"
        for node in gm.graph.nodes
    )
