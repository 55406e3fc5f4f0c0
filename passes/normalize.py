"""One spelling per operation, nothing else.

Dynamo hands over the program as it was written: ``x & y``, ``torch.bitwise_and(x, y)``, ``x.bitwise_and(other=y)``
and ``torch.ops.aten.bitwise_and.Tensor(x, y)`` are four different nodes. :func:`operation` reads all of them as
``Operation("bitwise_and", {"input": x, "other": y})``. It changes no graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.source import GlobalSource
from torch.fx import GraphModule, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .nodes import dynamo_source, may_share_memory, reached, sources, tensor_of

# Parameters by position; "*name" takes all that are left, given one by one or as one sequence.
# Sizes and dtypes are mostly left out: the node's own example_value says those of its result.
_BINARY = ("input", "other")
_UNARY = ("input",)
SIGNATURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub"), ("input", "other", "alpha")),
    **dict.fromkeys(("mul", "div", "eq", "ne", "lt", "le", "gt", "ge"), _BINARY),
    **dict.fromkeys(("floor_divide", "remainder", "maximum", "minimum"), _BINARY),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), _BINARY),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), _BINARY),
    **dict.fromkeys(("neg", "abs", "bitwise_not", "logical_not", "exp", "log", "zero"), _UNARY),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "fill": ("input", "value"),
    "fill_diagonal": ("input", "fill_value", "wrap"),
    "eye": ("n", "m"),
    "diag": ("input", "diagonal"),
    "cat": ("tensors", "dim"),
    "pad": ("input", "pad", "mode", "value"),
    "nan_to_num": ("input", "nan"),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    **dict.fromkeys(("tril", "triu"), ("input", "diagonal")),
    "cumsum": ("input", "dim"),
    "diff": ("input", "n", "dim", "prepend", "append"),
    "arange": ("start", "end", "step"),
    **dict.fromkeys(("tensor", "scalar_tensor"), ("data",)),
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
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
    **dict.fromkeys(("invert", "inv"), "bitwise_not"),
    **dict.fromkeys(("truediv", "true_divide", "divide"), "div"),
    **{"multiply": "mul", "subtract": "sub", "negative": "neg", "absolute": "abs", "clip": "clamp"},
    **{"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"},
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    "_unsafe_view": "view",
    **dict.fromkeys(("_softmax", "special_softmax"), "softmax"),
    "_safe_softmax": "softmax",  # rows without a key are 0, as everywhere here
    **dict.fromkeys(("_log_softmax", "special_log_softmax"), "log_softmax"),
    **{"special_logsumexp": "logsumexp", "floordiv": "floor_divide", "mod": "remainder"},
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("bool", "int", "long", "float", "double", "half", "bfloat16", "type", "type_as"), "to"),
    **dict.fromkeys(("cpu", "cuda", "_to_copy"), "to"),
}
_KEYWORDS: dict[str | tuple[str, str], str] = {
    **{"self": "input", "tensor": "input", "axis": "dim", "tensor1": "input", "mat2": "other"},
    "train": "training",  # of torch.dropout
    **{"axis0": "dim0", "axis1": "dim1", ("view", "size"): "shape", ("scalar_tensor", "s"): "data"},
}
_SPECIAL = torch._C._special  # type: ignore[attr-defined]  # torch's stubs lack it
_NAMESPACES = (torch, F, torch.Tensor, torch._C._nn, torch._C._VariableFunctions, _SPECIAL, operator)
_REFLECTED = {f"__r{name}__": name for name in ("add", "sub", "mul", "and", "or", "xor", "truediv", "matmul")}


@dataclass(frozen=True)
class Operation:
    """A canonical name (a key of :data:`SIGNATURES`) and its arguments by canonical parameter name."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where it was not given."""
        return self.args.get(name, default)

    def node(self, name: str = "input") -> Node:
        """The argument ``name``, which is a node."""
        found: Node = self.args[name]
        return found


def operation(node: Any) -> Operation | None:
    """The operation a node performs in its one spelling; None for what is no node or no pure operation known here."""
    if not isinstance(node, Node):
        return None
    if node.target is getattr and node.args[1:] in (("mT",), ("T",)):
        return _turned(node)
    return _bound(node, called(node))


def known(node: Node) -> Operation:
    """The operation of a node that is known to have one."""
    op = operation(node)
    if op is None:
        raise ValueError(f"node {node.name!r} calls {node.target}, which is no operation known here")
    return op


def performed(node: Any) -> Operation | None:
    """The same, also for an operation that writes its result into its first argument."""
    return operation(node) or (in_place(node) if isinstance(node, Node) else None)


def _turned(node: Node) -> Operation | None:
    """``x.mT``, and ``x.T`` of a matrix."""
    example = tensor_of(node)
    if node.args[1] == "T" and (example is None or example.dim() != 2):
        return None
    return Operation("transpose", {"input": node.args[0], "dim0": -1, "dim1": -2})


def order_of(op: Operation, rank: int) -> list[int]:
    """The dimensions of what is transposed or permuted, as they are after that; none where they are not known."""
    order = list(range(rank))
    dims = [op.get("dim0"), op.get("dim1")] if op.name == "transpose" else list(op.get("dims", ()))
    if rank == 0 or not all(isinstance(d, int) for d in dims) or (op.name == "permute" and len(dims) != rank):
        return []
    if op.name == "permute":
        return [d % rank for d in dims]
    i, j = (d % rank for d in dims)
    order[i], order[j] = j, i
    return order


_WRITES = frozenset(
    ("add", "sub", "mul", "div", "floor_divide", "remainder", "neg", "abs", "exp", "log", "clamp", "clamp_min")
    + ("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and")
    + ("logical_or", "logical_xor", "logical_not", "masked_fill", "tril", "triu", "fill", "fill_diagonal", "zero")
)
"""The operations that have a spelling which writes their result into their first argument."""


def in_place(node: Node) -> Operation | None:
    """``x.masked_fill_(...)`` as the ``masked_fill`` of what ``x`` held before, and so are ``x *= y``, ``x[mask] = y``
    and ``x[:] = y`` read; None for every other node."""
    name = called(node)
    if name == "setitem":
        return _assigned(*node.args)
    if name is None or not (name.endswith("_") or name in _IN_PLACE):
        return None
    name = name.removesuffix("_") if name.endswith("_") else name[1:]
    name = _ALIASES.get(name, name)
    return _bound(node, name) if name in _WRITES else None


def _assigned(x: Any, index: Any, value: Any) -> Operation | None:
    """``x[index] = value`` where ``index`` is a boolean tensor of the same rank, or everything."""
    shown, held = tensor_of(index), tensor_of(x)
    if shown is not None and held is not None and shown.dtype == torch.bool and shown.dim() == held.dim():
        return Operation("masked_fill", {"input": x, "mask": index, "value": value})
    whole = index is Ellipsis or (isinstance(index, slice) and index == slice(None))
    return Operation("fill", {"input": x, "value": value}) if whole else None


def number(arg: Any) -> Any:
    """An argument as a number, where it is one for every input: Dynamo may hand over a node or a symbol for it.

    The attribute of a module that has had another value before, in another model of its class say, becomes a symbol,
    and a global one may where sizes are dynamic. Its value now is taken, and Dynamo guards it. What a caller passes may
    change often, and stays a symbol.
    """
    node, arg = arg, arg.meta.get("example_value") if isinstance(arg, Node) else arg
    if isinstance(arg, torch.SymFloat) and isinstance(node, Node) and _is_attribute(node, arg):
        return float(arg)
    if isinstance(arg, torch.SymInt | torch.SymFloat) and arg.node.expr.is_number:
        return (int if isinstance(arg, torch.SymInt) else float)(arg.node.expr)
    return arg


def is_number(arg: Any, *values: float) -> bool:
    """Whether an argument is one of these numbers for every input. Asks nothing of a symbol: of one that an entry of a
    tensor became, that would be an error."""
    arg = number(arg)
    return isinstance(arg, bool | int | float) and arg in values


def _is_attribute(node: Node, value: torch.SymFloat) -> bool:
    """Whether a symbolic number is made of floats that are no arguments of the compiled function, and nothing else."""
    symbols = value.node.expr.free_symbols
    if not symbols or not value.node.has_hint() or not all(symbol_is_type(x, SymT.FLOAT) for x in symbols):
        return False
    inputs = (x for x in reached(node, sources) if x.op == "placeholder")
    found = (dynamo_source(x) for x in inputs)
    return all(isinstance(x, GlobalSource) or getattr(x, "base", None) is not None for x in found)


def _bound(node: Node, name: str | None) -> Operation | None:
    """The arguments of a call of ``name`` by parameter; None for what is not known here."""
    if name is None or node.kwargs.get("out") is not None:
        return None
    args = tuple(reversed(node.args)) if _is_reflected(node) else tuple(node.args)
    name, parameters = _VARIANTS[name](node, name) if name in _VARIANTS else (name, SIGNATURES.get(name))
    if parameters is None:
        return None
    bound: dict[str, Any] = dict(_DEFAULTS.get(name, {}))
    for i, parameter in enumerate(parameters):
        if parameter.startswith("*"):
            rest = args[i:]
            if rest:
                bound[parameter[1:]] = tuple(rest[0]) if isinstance(rest[0], list | tuple) else rest
        elif i < len(args):
            bound[parameter] = args[i]
    for keyword, value in node.kwargs.items():
        bound[_KEYWORDS.get((name, keyword), _KEYWORDS.get(keyword, keyword))] = value
    return Operation(name, bound) if name not in _WHOLE or _WHOLE[name](bound) else None


# ---- what one name means depends on its arguments: (node, name) -> (the name it has here, its parameters) ----------

_Parameters = tuple[str, tuple[str, ...] | None]


def _range(node: Node, name: str) -> _Parameters:
    """The only argument is where it ends."""
    return name, ("end",) if len(node.args) == 1 and "end" not in node.kwargs else SIGNATURES[name]


def _largest(node: Node, name: str) -> _Parameters:
    """Of one tensor, or the larger of two."""
    other = node.args[1] if len(node.args) > 1 else None
    name = f"{name}imum" if isinstance(other, Node) and "example_value" in other.meta else name
    return name, SIGNATURES.get(name)


def _shaped(node: Node, name: str) -> _Parameters:
    """With a dtype it reinterprets the bits."""
    of_bits = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    return name, None if of_bits else SIGNATURES[name]


def _chosen(node: Node, name: str) -> _Parameters:
    """``x.where(condition, other)`` has the condition second."""
    is_method = node.op == "call_method" or node.target is torch.Tensor.where
    return name, ("input", "condition", "other") if is_method else SIGNATURES[name]


_VARIANTS: dict[str, Callable[[Node, str], _Parameters]] = {
    "arange": _range,
    **dict.fromkeys(("max", "min"), _largest),
    "view": _shaped,
    "where": _chosen,
}
_DEFAULTS: dict[str, dict[str, Any]] = {"arange": {"start": 0, "step": 1}, "pad": {"mode": "constant"}}
_WHOLE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "where": lambda bound: "other" in bound,  # where(condition) lists indices
    "einsum": lambda bound: isinstance(bound.get("equation"), str),
}
"""What the arguments have to be for a call to be read."""


# ---- what is called, and what it writes into: by kind of target --------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A kind of target: the name of what it calls, None if that is nothing of torch, and what a call writes into."""

    of: type
    name: Callable[[Any], str | None]
    writes: Callable[[Node, Any], Iterable[Any]]


def called(node: Node) -> str | None:
    """The canonical name of what of torch a node calls, whether it is known here or not; None for other calls."""
    kind = _kind(node)
    name = None if kind is None else kind.name(node.target)
    return None if name is None else _ALIASES.get(name, name)


def mutated_inputs(node: Node) -> list[Node]:
    """The tensors a node writes into, as far as its target tells; empty for a pure node."""
    kind = _kind(node)
    written = [node.kwargs.get("out"), *(() if kind is None else kind.writes(node, node.target))]
    flat = (value if isinstance(value, list | tuple) else (value,) for value in written)
    return [x for values in flat for x in values if isinstance(x, Node)]


def _kind(node: Node) -> _Kind | None:
    """How to read the target of a call; None for what is none."""
    if node.op not in ("call_method", "call_function"):
        return None
    return next(kind for kind in _KINDS if isinstance(node.target, kind.of))


def _is_reflected(node: Node) -> bool:
    """Whether the two operands are the other way round, as in ``x.__rsub__(y)``."""
    return node.op == "call_method" and node.target in _REFLECTED


def _method_name(target: str) -> str:
    plain = target.removeprefix("__").removesuffix("__") if target.startswith("__") else target
    return _REFLECTED.get(target, plain)


def _method_writes(node: Node, target: str) -> Iterable[Any]:
    special = target == "__setitem__" or (target.startswith("__i") and target != "__invert__")
    return node.args[:1] if special or (target.endswith("_") and not target.startswith("__")) else ()


def _overload_name(target: torch._ops.OpOverload[..., Any]) -> str | None:
    pure = target.namespace == "aten" and not target._schema.is_mutable
    return target._schema.name.removeprefix("aten::") if pure else None


def _overload_writes(node: Node, target: torch._ops.OpOverload[..., Any]) -> Iterable[Any]:
    for i, parameter in enumerate(target._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            yield node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)


def _packet_name(target: torch._ops.OpOverloadPacket[..., Any]) -> str | None:
    return target.__name__ if target._qualified_op_name.startswith("aten::") else None


def _packet_writes(node: Node, target: torch._ops.OpOverloadPacket[..., Any]) -> Iterable[Any]:
    overloads = (getattr(target, overload) for overload in target.overloads() if overload != "out")
    return node.all_input_nodes if any(overload._schema.is_mutable for overload in overloads) else ()


def _operator_writes(node: Node, target: torch._ops.HigherOrderOperator) -> Iterable[Any]:
    writes = "mutation" in target.name() or any(map(_writes_outside, bodies(node)))
    return node.all_input_nodes if writes else ()


def _function_name(target: Any) -> str | None:
    """A user's function may carry any name: it counts only if it *is* torch's."""
    name: str | None = getattr(target, "__name__", None)
    if name is None or not any(getattr(space, name, None) is target for space in _NAMESPACES):
        return None
    return name.removesuffix("_") if getattr(operator, name, None) is target else name


def _function_writes(node: Node, target: Any) -> Iterable[Any]:
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return node.args[:1] if name == "setitem" or name in _IN_PLACE else ()
    writes = name.endswith("_") and not name.endswith("__") or _inplace_flag(target, node.args, node.kwargs)
    writes = writes and not (name == "dropout" and (op := operation(node)) is not None and dropped(op) == 0)
    return (node.args[0] if node.args else node.kwargs.get("input"),) if writes else ()


_KINDS = (
    _Kind(str, _method_name, _method_writes),
    _Kind(torch._ops.OpOverload, _overload_name, _overload_writes),
    _Kind(torch._ops.OpOverloadPacket, _packet_name, _packet_writes),
    _Kind(torch._ops.HigherOrderOperator, lambda target: None, _operator_writes),
    _Kind(object, _function_name, _function_writes),
)
_IN_PLACE = frozenset(
    ("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
    + ("itruediv", "ixor")
)
_FACTORIES = frozenset(("zeros", "ones", "full", "eye", "zeros_like", "ones_like", "full_like"))


def is_new(node: Node) -> bool:
    """Whether a node makes a tensor that shares its memory with nothing made before."""
    op = operation(node)
    return op is not None and op.name in _FACTORIES


def _writes_outside(body: GraphModule) -> bool:
    """Whether a graph may write into what it is given."""
    given = [node for node in body.graph.nodes if node.op in ("placeholder", "get_attr")]
    targets = {target for node in body.graph.nodes for target in mutated_inputs(node) if not is_new(target)}
    return any(may_share_memory(target, node) for target in targets for node in given)


def dropped(op: Operation) -> float | None:
    """The probability of a dropout, 0 where it does nothing, not even in place; None where it is not known."""
    p, training = (number(op.get(name, default)) for name, default in (("p", 0.5), ("training", True)))
    if not isinstance(p, int | float) or not isinstance(training, bool):
        return None
    return float(p) if training else 0.0


def _inplace_flag(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
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
    for part in str(node.target).split("."):
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
