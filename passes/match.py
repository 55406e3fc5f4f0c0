"""Find the attention sites of a graph and say what each one computes.

A site is anchored at one node: at ``scaled_dot_product_attention``, or at one of the opaque calls of torch's own
layers (``multihead.py``). What looks like attention but cannot be rewritten (a softmax between two products) is
listed too, with the reason in ``AttentionSite.refusal``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..spec import AttentionSpec, Mask, known_equal, layer_key
from .mask import Padding, prove
from .multihead import OPAQUE, Expand, Refused, describe
from .normalize import bodies, graph_module, mutated_inputs, number, operation


@dataclass(frozen=True)
class AttentionSite:
    """One attention site.

    node, graph_module: the node that computes it and the (sub-)graph module it lives in.
    module: path of the module it belongs to, relative to the compiled root; ``""`` is the root itself.
    index: its place among the sites of that module; (module, index) is its ``layer`` key.
    source: ``file:line`` of the user's call, ``""`` if unknown.
    form: ``"sdpa"``, the name of an opaque function, or of a form that is only listed.
    query, key, value: nodes ``[B, H, Lq, D]``, ``[B, H_kv, Lk, D]``, ``[B, H_kv, Lk, Dv]``; key and value are
        taken before they are repeated for grouped queries. None for an opaque function.
    padding: where to find the key padding, if ``spec.mask.padding``.
    spec: what it computes; None if that is not known.
    refusal: why it cannot be rewritten whatever the policy; None otherwise.
    expand: opens up an opaque function; None for other forms.
    """

    node: Node
    graph_module: GraphModule
    module: str
    index: int
    source: str
    form: str
    query: Node | None = None
    key: Node | None = None
    value: Node | None = None
    padding: Padding | None = None
    spec: AttentionSpec | None = None
    refusal: str | None = None
    expand: Expand | None = None

    @property
    def layer(self) -> int:
        """The site's key for random numbers."""
        return layer_key(self.module, self.index)


@dataclass
class _Scope:
    """One graph with what surrounds it: where its inputs come from, what is written, why nothing may change.

    autocast: the calls that have entered ``torch.autocast`` and not left it at the node the walk has come to.
    """

    gm: GraphModule
    outer: Mapping[Node, Node] = field(default_factory=dict)
    parent: _Scope | None = None
    refusal: str | None = None
    autocast: list[Node] = field(default_factory=list)

    @cached_property
    def order(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.gm.graph.nodes)}

    @cached_property
    def writes(self) -> list[tuple[int, Node]]:
        return [(i, target) for node, i in self.order.items() for target in mutated_inputs(node)]

    @cached_property
    def grad_switches(self) -> list[int]:
        names = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
        return [i for node, i in self.order.items() if getattr(node.target, "__name__", "") in names]

    def written(self, node: Node, after: int = -1, before: int | None = None, but: Iterable[Node] = ()) -> bool:
        """Whether the memory of ``node`` is written between the two positions by another node than those of ``but``."""
        storage = _storage(node)
        stop = len(self.order) if before is None else before
        allowed = {self.order[writer] for writer in but if writer in self.order}
        return any(
            after < i < stop
            and i not in allowed
            and (target is node or (storage is not None and storage == _storage(target)))
            for i, target in self.writes
        )

    def overwritten(self, node: Node, but: Iterable[Node] = ()) -> bool:
        """Whether the memory of ``node`` is written once it has been computed, by another node than those of ``but``.

        ``node`` may also be one of a graph around this one.
        """
        if node not in self.order:
            return self.parent is not None and self.parent.overwritten(node, but)
        return self.written(node, after=self.order[node], but=but)


def _storage(node: Node) -> int | None:
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return None
    try:
        return example.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and some wrapper tensors have none
        return None


def find_sites(gm: GraphModule) -> list[AttentionSite]:
    """All attention sites of ``gm`` and of the graph modules inside it, in order of execution. Changes nothing."""
    found: list[AttentionSite] = []
    count: Counter[str] = Counter()
    for scope, node in _walk(_Scope(gm), set()):
        form = _form(node)
        if form is None:
            continue
        module = module_path(node)
        common = {
            "node": node,
            "graph_module": scope.gm,
            "module": module,
            "index": count[module],
            "source": source_line(node),
            "form": form,
        }
        count[module] += 1
        try:
            found.append(AttentionSite(**common, **_describe(scope, node, form)))
        except Refused as error:
            found.append(AttentionSite(**common, refusal=str(error)))
    return found


_SOFTMAX = (
    "softmax attention: form not supported yet in the compiled pass; "
    "write it with torch.nn.functional.scaled_dot_product_attention"
)


def _form(node: Node) -> str | None:
    op = operation(node)
    if op is not None and op.name == "scaled_dot_product_attention":
        return "sdpa"
    if op is not None and op.name == "softmax" and _feeds_product(node):
        return "softmax"
    return OPAQUE.get(node.target) if node.op == "call_function" else None


_PASSES_WEIGHTS = frozenset(
    ("dropout", "to", "contiguous", "clone", "detach", "getitem", "view", "reshape", "expand", "transpose")
)


def _feeds_product(node: Node) -> bool:
    """Whether a softmax's result is a factor of a matrix product, possibly after dropout, a cast or a slice."""
    open_nodes, seen = [node], {node}
    while open_nodes:
        source = open_nodes.pop()
        for user in source.users:
            op = operation(user)
            if op is None or user in seen:
                continue
            if op.name in ("matmul", "bmm", "einsum") or (op.name == "baddbmm" and op.get("input") is not source):
                return True
            if op.name in _PASSES_WEIGHTS and op.get("input") is source:
                seen.add(user)
                open_nodes.append(user)
    return False


_FUNCTORCH = re.compile(r"_(vmap|grad|jvp)_increment_nesting|_func_increment_nesting|_add_batch_dim|_make_dual")


# the bodies of other higher-order operators come with a gradient or a contract of their own
_OPEN_OPERATORS = ("tag_activation_checkpoint", "wrap")


def _walk(scope: _Scope, visited: set[GraphModule]) -> Iterator[tuple[_Scope, Node]]:
    nodes = list(scope.gm.graph.nodes)
    names = [getattr(n.target, "__name__", "") if n.op == "call_function" else "" for n in nodes]
    whole = scope.refusal
    if whole is None and any(_FUNCTORCH.fullmatch(name) for name in names):
        whole = "it is inside torch.func.vmap, grad or jvp"
    switches = [i for i, name in enumerate(names) if name == "_sdpa_kernel"]
    for i, node in enumerate(nodes):
        scope.refusal = whole
        if whole is None and switches and switches[0] < i < switches[-1]:
            scope.refusal = "it is inside torch.nn.attention.sdpa_kernel, which chooses the kernel"
        if names[i] == "_enter_autocast":
            scope.autocast.append(node)
        elif names[i] == "_exit_autocast":
            scope.autocast.remove(node.args[0])
        yield scope, node
        for body in bodies(node):
            if body in visited:
                continue
            visited.add(body)
            refusal = scope.refusal
            if refusal is None and _operator_name(node) not in _OPEN_OPERATORS:
                refusal = f"it is inside the higher-order operator {_operator_name(node)}"
            inner = _Scope(body, _feeds(scope, node, body), scope, refusal, list(scope.autocast))
            yield from _walk(inner, visited)


def _operator_name(node: Node) -> str:
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else str(node.target)


def _feeds(scope: _Scope, node: Node, body: GraphModule) -> dict[Node, Node]:
    """The outer node of every placeholder of ``body``; empty unless ``node`` alone calls it, argument by argument."""
    placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    readers = [source for source in scope.gm.graph.nodes if graph_module(source) is body]
    if _operator_name(node) not in _OPEN_OPERATORS or [list(r.users) for r in readers] != [[node]]:
        return {}
    arguments = node.args[1:]
    if node.args[0] is not readers[0] or len(arguments) != len(placeholders):
        return {}
    pairs = zip(placeholders, arguments, strict=True)
    return {inner: scope.outer.get(arg, arg) for inner, arg in pairs if isinstance(arg, Node)}


def module_path(node: Node) -> str:
    """Path of the innermost module a node was traced in, relative to the compiled root; ``""`` for the root.

    For a compiled plain function, the name it uses for the module is the first part of the path.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\._modules\[(?:'(\w+)'|\"(\w+)\")\]", lambda m: f".{m[1] or m[2]}", path)
    root = re.match(r"[LG]\['(\w+)'\]", path)
    if root is not None:
        # a compiled module of torch.nn itself is the variable fn of a wrapper
        is_root = root[1] == "self" or root[0] == "L['fn']"
        path = path[root.end() :] if is_root else root[1] + path[root.end() :]
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return path.removeprefix(".").removeprefix("_orig_mod").removeprefix(".")


_FRAME = re.compile(r'File "(.+)", line (\d+)')


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame outside torch that made a node; ``""`` if it was not recorded."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return ":".join(outside[-1]) if outside else ""


def _describe(scope: _Scope, node: Node, form: str) -> dict[str, Any]:
    """What ``node`` computes, as fields of its site."""
    if form == "softmax":
        raise Refused(_SOFTMAX)
    if scope.refusal is not None:
        raise Refused(scope.refusal)
    if form != "sdpa":
        autocast = [entered.args for entered in scope.autocast]
        spec, padding, expand = describe(node, outer=scope.outer, overwritten=scope.overwritten, autocast=autocast)
        return {"spec": spec, "padding": padding, "expand": expand}
    args = operation(node).args
    query, key, value = (_tensor(args, name) for name in ("query", "key", "value"))
    key, value = _unrepeated(scope, node, query, key, value)
    spec, padding = _specify(scope, node, args, query, key, value)
    return {"query": query, "key": key, "value": value, "padding": padding, "spec": spec}


def _tensor(args: Mapping[str, Any], name: str) -> Node:
    node = args.get(name)
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(example, torch.Tensor):
        raise Refused(f"its {name} is not a tensor of the graph")
    if example.dim() != 4:
        raise Refused(f"its {name} has {example.dim()} dimensions, not 4: [batch, heads, length, head size]")
    if example.layout != torch.strided or example.is_nested:
        raise Refused(f"its {name} is a nested or sparse tensor")
    return node


def _shape(node: Node) -> torch.Size:
    return node.meta["example_value"].shape


def _specify(
    scope: _Scope, node: Node, args: Mapping[str, Any], query: Node, key: Node, value: Node
) -> tuple[AttentionSpec, Padding | None]:
    out = node.meta["example_value"]
    B, H, Lq, D = map(number, _shape(query))
    _, H_kv, Lk, _ = map(number, _shape(key))
    for name, other in (("key", key), ("value", value)):
        if not known_equal(_shape(other)[0], B):
            raise Refused(f"its {name} has batch size {_shape(other)[0]}, its query {B}")
    if not known_equal(_shape(value)[1], H_kv):
        raise Refused(f"its key has {H_kv} heads, its value {_shape(value)[1]}")
    if not known_equal(H, H_kv):
        if not isinstance(H, int) or not isinstance(H_kv, int):
            raise Refused(f"its numbers of heads {H} and {H_kv} are not known when compiling")
        fits = H_kv == 1 or args.get("enable_gqa", False) or known_equal(_shape(args["key"])[1], H)
        if H_kv < 1 or H % H_kv or not fits:
            raise Refused(f"its {H_kv} key heads do not fit its {H} query heads")
    scale = _constant(args.get("scale"), "scale")
    if scale is None:
        if not isinstance(D, int):
            raise Refused(f"its head size {D} is not known when compiling, and so its scale 1 / sqrt({D})")
        scale = 1.0 / math.sqrt(D)
    dropout_p = _constant(args.get("dropout_p", 0.0), "dropout_p")
    mask, padding = _mask(scope, node, args, (B, H, Lq, Lk))
    spec = AttentionSpec(
        B=B,
        H=H,
        H_kv=H_kv,
        Lq=Lq,
        Lk=Lk,
        D=D,
        Dv=number(_shape(value)[3]),
        dtype=out.dtype,
        device=out.device.type,
        scale=scale,
        mask=mask,
        dropout_p=dropout_p,
    )
    return spec, padding


def _constant(arg: Any, name: str) -> float | None:
    """A float argument that is a number or a node with a constant value; None stays None."""
    arg = number(arg)
    if arg is None or isinstance(arg, int | float):
        return None if arg is None else float(arg)
    raise Refused(f"its {name} is not known when compiling")


def _mask(
    scope: _Scope, node: Node, args: Mapping[str, Any], sizes: tuple[Any, Any, Any, Any]
) -> tuple[Mask, Padding | None]:
    mask, is_causal = args.get("attn_mask"), args.get("is_causal", False)
    if not isinstance(is_causal, bool):
        return Mask(unknown="its is_causal is not known when compiling"), None
    if is_causal:
        return (Mask(causal=True) if mask is None else Mask(unknown="it has a mask and is_causal=True")), None
    if mask is None:
        return Mask(), None
    if not isinstance(mask, Node) or not isinstance(mask.meta.get("example_value"), torch.Tensor):
        return Mask(unknown="it is not a tensor of the graph"), None
    proven, padding = prove(mask, sizes, outer=scope.outer, overwritten=scope.overwritten)
    if proven.unknown is None or mask.meta["example_value"].dtype != torch.bool:
        return proven, padding
    return _same_for_all_queries(mask, sizes) or (proven, padding)


def _same_for_all_queries(mask: Node, sizes: tuple[Any, Any, Any, Any]) -> tuple[Mask, Padding | None] | None:
    """A boolean mask without a query and a head dimension is a key padding, whatever its values are."""
    shape = _shape(mask)
    if len(shape) > 4 or not known_equal(shape[-1], sizes[3]):
        return None
    if all(known_equal(size, 1) for size in shape[-3:-1]):
        return Mask(padding=True), Padding(last_row=mask)
    return None


def _unrepeated(scope: _Scope, node: Node, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Key and value before their heads are repeated, if both are repeated alike and that is proven."""
    before = tuple(_base(scope, node, repeated) for repeated in (key, value))
    if None in before or not known_equal(_shape(before[0])[1], _shape(before[1])[1]):
        return key, value
    if not known_equal(_shape(key)[1], _shape(query)[1]):
        return key, value
    return before


def _base(scope: _Scope, node: Node, repeated: Node) -> Node | None:
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
    return base if _rank(base) == 4 and known_equal(_shape(base)[1], 1) and _fits(base, repeated) else None


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
    return base if known_equal(_shape(base)[1] * count, _shape(repeated)[1]) else None


def _expanded(repeated: Node, grouped: Any) -> Node | None:
    """``base[:, :, None].expand(B, H_kv, n, L, D)`` under a reshape to ``[B, H_kv * n, L, D]``."""
    op = operation(grouped) if isinstance(grouped, Node) else None
    if _rank(grouped) != 5 or op is None or op.name not in ("expand", "broadcast_to", "expand_as", "repeat"):
        return None
    inserted = op.get("input")
    if _rank(inserted) != 5:
        return None
    b, h, n, length, d = _shape(grouped)
    ones = _shape(inserted)
    if not all(known_equal(x, y) for x, y in zip(ones, (b, h, 1, length, d), strict=True)):
        return None
    if not all(known_equal(x, y) for x, y in zip(_shape(repeated), (b, h * n, length, d), strict=True)):
        return None
    insert = operation(inserted)
    if insert is None or insert.name not in ("unsqueeze", "getitem", "view", "reshape"):
        return None
    base = insert.get("input")
    if _rank(base) != 4:
        return None
    # a dimension of size one anywhere: the row-major order, and so head h // n, is the same
    if not all(known_equal(x, y) for x, y in zip(_shape(base), (b, h, length, d), strict=True)):
        return None
    return base if insert.name != "getitem" or _inserts_only(insert.get("index")) else None


def _inserts_only(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)
