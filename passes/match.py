"""Find the attention sites of a graph and say what each one computes.

A site is anchored at one node: at ``scaled_dot_product_attention``, at one of the opaque calls of torch's own layers
(``multihead.py``), or at a softmax between two products (``softmax.py``). What looks like attention but cannot be
rewritten is listed too, with the reason in ``AttentionSite.refusal``: also a product whose softmax is in no graph
(``cut.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..core.spec import AttentionSpec, Mask, default_scale, feature_major, known_equal
from . import near, softmax
from .buffers import Buffers
from .cut import cut_products, cut_weights
from .mask import MaskPart, Padding, prove, prove_all, same_for_all_queries
from .multihead import OPAQUE, describe
from .normalize import bodies, computes_gradients, graph_module, number, operation
from .place import Place, module_path
from .repeat import unrepeated
from .scale import unscaled
from .site import (
    NOT_MATCHED,
    PADDED,
    AttentionSite,
    Emit,
    Operand,
    Refused,
    Scope,
    check_heads,
    entered,
    make_spec,
    shape_of,
)
from .symbolic import COORDINATES
from .words import source_line


def find_sites(gm: GraphModule, buffers: Buffers | None = None, place: Place | None = None) -> list[AttentionSite]:
    """All attention sites of ``gm`` and of the graph modules inside it, in order of execution. Changes no code.

    With ``buffers`` a mask may be proven by what a module's buffer holds: ``buffers.used`` are those then. ``place`` is
    that of ``gm`` in its model; without it module paths are what Dynamo's words for modules say. Attention that is
    written out belongs to the innermost module that holds both its products and its softmax.
    """
    found: list[AttentionSite] = []
    count: Counter[str] = Counter()
    place = place or Place()
    place.name(gm)

    def common(gm: GraphModule, node: Node, form: str) -> dict[str, Any]:
        path = module_path([node, *softmax.products(node)] if form == "softmax" else [node])
        module = place.nearest if path is None else path
        count[module] += 1
        where = {"module": module, "index": place.number(module, count[module] - 1), "source": source_line(node)}
        lost = place.lost if path is None else None
        return {"node": node, "graph_module": gm, "form": form, "refusal": lost, **where}

    for scope, node in _walk(Scope(gm, buffers=buffers or Buffers()), set()):
        form, listed = _form(node), None
        if form is None:
            listed = near.unread(node)
            if listed is None:
                continue
        known = common(scope.gm, node, form or NOT_MATCHED)
        try:
            if listed is not None:
                raise listed
            facts = _describe(scope, node, form) if known["refusal"] is None else {}
            site = AttentionSite(**{**known, **facts})
            found.append(replace(site, written=scope.overwritten(site.node)))
            scope.attended.add(site.node)
        except Refused as error:
            found.append(AttentionSite(**{**known, "refusal": str(error), "nearest": error.nearest}))
    for node, error in (*cut_products(gm), *cut_weights(gm)):
        known = common(gm, node, "softmax")
        found.append(AttentionSite(**{**known, "refusal": str(error), "nearest": error.nearest}))
    return found


def _form(node: Node) -> str | None:
    op = operation(node)
    if op is not None and op.name == "scaled_dot_product_attention":
        return "sdpa"
    if softmax.softmax_of(node) is not None and not near.weighs_features(node):
        return "softmax" if softmax.feeds_product(node) or near.is_cut_off(node) else None
    if node.target is torch.ops.higher_order.flex_attention:
        return NOT_MATCHED
    return OPAQUE.get(node.target) if node.op == "call_function" else None


_NESTING = re.compile(r"_(?:vmap|grad|jvp|func)_(in|de)crement_nesting")
_IN_TRANSFORM = "it is inside torch.func.vmap, grad or jvp"
_IN_KERNEL_CHOICE = "it is inside torch.nn.attention.sdpa_kernel, which chooses the kernel"


def _surroundings(nodes: Sequence[Node]) -> Iterator[str | None]:
    """Why what stands at each place of a graph cannot be rewritten, whatever it is; None where it may be."""
    names = [getattr(n.target, "__name__", "") if n.op == "call_function" else "" for n in nodes]
    switches = [node for node, name in zip(nodes, names, strict=True) if name == "_sdpa_kernel"]
    # who leaves the outermost context calls for the kernels there were before it
    outside = _kernels(switches[-1]) if switches else None
    chosen, depth, is_dual = False, 0, False
    for node, name in zip(nodes, names, strict=True):
        if nesting := _NESTING.fullmatch(name):
            depth += 1 if nesting[1] == "in" else -1
        is_dual |= name == "_make_dual" and not depth
        if name == "_sdpa_kernel":
            chosen = _kernels(node) != outside
        yield _IN_TRANSFORM if depth or is_dual else _IN_KERNEL_CHOICE if chosen else None


def _kernels(switch: Node) -> tuple[Any, ...]:
    """The kernels that a call of ``_sdpa_kernel`` allows, and their order where it counts."""
    backends, ordered = switch.args[0], switch.args[1:]
    names = tuple(x.args if isinstance(x, Node) else x for x in backends)
    return frozenset(names), names if any(ordered) else None


# the bodies of other higher-order operators come with a gradient or a contract of their own
_OPEN_OPERATORS = ("tag_activation_checkpoint", "wrap")


def _walk(scope: Scope, visited: set[GraphModule]) -> Iterator[tuple[Scope, Node]]:
    nodes = list(scope.gm.graph.nodes)
    whole = scope.refusal
    for node, here in zip(nodes, _surroundings(nodes), strict=True):
        scope.refusal = whole or here
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_enter_autocast":
            scope.autocast.append(node)
        elif name == "_exit_autocast":
            scope.autocast.remove(node.args[0])
        yield scope, node
        for body in bodies(node):
            if body in visited:
                continue
            visited.add(body)
            refusal, operator = scope.refusal, _operator_name(node)
            if refusal is None and operator not in _OPEN_OPERATORS:
                refusal = f"it is inside the higher-order operator {operator}"
            if refusal is None and operator == "tag_activation_checkpoint" and computes_gradients(scope.gm):
                refusal = "it is inside of torch.utils.checkpoint, and the graph computes gradients itself"
            feeds = _feeds(scope, node, body)
            inner = Scope(body, feeds, scope, refusal, list(scope.autocast), scope.buffers, caller=node)
            yield from _walk(inner, visited)


def _operator_name(node: Node) -> str:
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else str(node.target)


def _feeds(scope: Scope, node: Node, body: GraphModule) -> dict[Node, Node]:
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


def _describe(scope: Scope, node: Node, form: str) -> dict[str, Any]:
    """What ``node`` computes, as fields of its site."""
    if form == NOT_MATCHED:
        raise Refused("it is flex_attention, whose score_mod and block_mask are code that is not read", _PLAIN)
    if scope.refusal is not None:
        raise Refused(scope.refusal)
    if form == "softmax":
        try:
            return softmax.describe(scope, node)
        except Refused:
            mixed = near.mixes_heads(node)
            if mixed is None:
                raise
            raise mixed from None
    if form != "sdpa":
        spec, padding, expand = describe(scope, node)
        return {"spec": spec, "padding": padding, "expand": expand}
    args = operation(node).args
    nodes = [_tensor(args, name) for name in ("query", "key", "value")]
    rank = _same_leading(node, nodes)
    if rank == 4:
        nodes[1:] = unrepeated(scope, node, *nodes)
    query, key, value = inputs = [_of_four(Operand(x)) for x in nodes]
    (query, of_query), (key, of_key) = (unscaled(scope, x) for x in (query, key))
    spec, padding = _specify(scope, node, args, inputs, factor=of_query * of_key)
    expand = None
    if rank != 4 or [query, key] != inputs[:2]:
        expand = partial(_write, query, key, value, node, spec, scope.contexts)
    found = dict(zip(("query", "key", "value"), nodes, strict=True)) if rank == 4 else {}
    return {**found, "padding": padding, "spec": spec, "expand": expand}


def _write(
    query: Operand,
    key: Operand,
    value: Operand,
    node: Node,
    spec: AttentionSpec,
    autocast: Sequence[tuple[Any, ...]],
    emit: Emit,
) -> tuple[Node, Node]:
    """The same call of a query and a key that are not scaled before, and of four dimensions."""
    args, shape = operation(node).args, shape_of(node)
    kept = {name: args[name] for name in ("attn_mask", "dropout_p", "is_causal") if name in args}
    gqa = not known_equal(spec.H, spec.H_kv)
    with entered(autocast):
        inputs = (x.emit(emit) for x in (query, key, value))
        if isinstance(kept.get("attn_mask"), Node):
            kept["attn_mask"] = _mask_of_four(kept["attn_mask"], shape, emit)
        attention = emit(F.scaled_dot_product_attention, *inputs, **kept, scale=spec.scale, enable_gqa=gqa)
        out = attention
        if len(shape) > 4:
            out = emit(torch.unflatten, out, 0, tuple(shape[: len(shape) - 3]))
        for _ in range(4 - len(shape)):
            out = emit(torch.squeeze, out, len(shape) - 2)
    return attention, out


_PLAIN = "torch.nn.functional.scaled_dot_product_attention"
FOUR = "query, key and value of four dimensions"


def _of_four(x: Operand) -> Operand:
    """``[..., L, D]`` as ``[B, H, L, D]``: what is before the heads is one batch; three dimensions have one head."""
    rank = len(x.shape)
    if rank > 4:
        return x.then(torch.flatten, 0, rank - 4)
    for _ in range(4 - rank):
        x = x.then(torch.unsqueeze, rank - 2)
    return x


def _mask_of_four(mask: Node, shape: torch.Size, emit: Emit) -> Node:
    """A mask that broadcasts to the scores of ``shape``, as it broadcasts to those of four dimensions."""
    rank, own = len(shape), len(shape_of(mask))
    if rank == 3 and own == 3:
        return emit(torch.unsqueeze, mask, 1)
    if rank > 4 and own > 3:
        for _ in range(rank - own):
            mask = emit(torch.unsqueeze, mask, 0)
        mask = emit(torch.Tensor.expand, mask, (*shape[: rank - 3], -1, -1, -1))
        return emit(torch.flatten, mask, 0, rank - 4)
    return mask


def _tensor(args: Mapping[str, Any], name: str) -> Node:
    node = args.get(name)
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(example, torch.Tensor):
        raise Refused(f"its {name} is not a tensor of the graph")
    if example.layout != torch.strided or example.is_nested:
        raise Refused(f"its {name} is a nested or sparse tensor", PADDED)
    return node


def _same_leading(node: Node, inputs: Sequence[Node]) -> int:
    """The number of dimensions of query, key, value and result; what comes before the heads is the same in all."""
    shapes = [shape_of(x) for x in (node, *inputs)]
    ranks = [len(shape) for shape in shapes]
    if len(set(ranks)) > 1:
        given = f"{ranks[1]}, {ranks[2]} and {ranks[3]}"
        raise Refused(f"its query, key and value have {given} dimensions, not the same", FOUR)
    before = ranks[0] - 3
    if before > 1:
        leading = [shape[:before] for shape in shapes]
        if not all(isinstance(size, int) for shape in leading for size in shape):
            raise Refused(f"its {before} dimensions before the heads are not known when compiling", FOUR)
        if len(set(leading)) > 1:
            raise Refused(f"its query, key and value have {', '.join(map(str, map(tuple, leading[1:])))} first", FOUR)
    return ranks[0]


def _specify(
    scope: Scope, node: Node, args: Mapping[str, Any], inputs: Sequence[Operand], factor: float
) -> tuple[AttentionSpec, Padding | None]:
    shapes = [x.shape for x in inputs]
    H, D = (number(shapes[0][i]) for i in (1, 3))
    repeats = args.get("enable_gqa", False) or known_equal(_of_four(Operand(args["key"])).shape[1], H)
    check_heads(*shapes, repeats=repeats)
    scale = _constant(args.get("scale"), "scale")
    if scale is None:
        if not isinstance(D, int):
            raise Refused(
                f"its head size {D} is not known when compiling, and so its scale 1 / sqrt({D})", "scale= as a number"
            )
        scale = default_scale(D)
    dropout_p = _constant(args.get("dropout_p", 0.0), "dropout_p")
    sizes = (*map(number, shapes[0][:3]), number(shapes[1][2]))
    mask, padding = _mask(scope, node, args, sizes)
    facts = dict(mask=mask, dropout_p=dropout_p, feature_major=feature_major(inputs[1].example))
    return make_spec(node.meta["example_value"], *shapes, scale=scale * factor, **facts), padding


def _constant(arg: Any, name: str) -> float | None:
    """A float argument that is a number or a node with a constant value; None stays None."""
    arg = number(arg)
    if arg is None or isinstance(arg, int | float):
        return None if arg is None else float(arg)
    raise Refused(f"its {name} is not known when compiling")


def _mask(
    scope: Scope, node: Node, args: Mapping[str, Any], sizes: tuple[Any, Any, Any, Any]
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
    shape = shape_of(node)
    if len(shape) != 4:
        return _of_other_rank(mask, shape, sizes, scope, node)
    proven, padding = prove(mask, sizes, scope, node)
    if proven.unknown is None:
        return proven, padding
    return same_for_all_queries(MaskPart(mask, COORDINATES, sizes), sizes) or (proven, padding)


def _of_other_rank(
    mask: Node, shape: torch.Size, sizes: tuple[Any, Any, Any, Any], scope: Scope, node: Node
) -> tuple[Mask, Padding | None]:
    """As :func:`_mask` where the result has another number of dimensions than four."""
    b, h, q, k = COORDINATES
    leading, below = [], 1
    for size in reversed(shape[1:-3]):
        leading.insert(0, sympy.floor(b / below) % size)
        below *= size
    leading.insert(0, sympy.floor(b / below))
    coords = {2: (q, k), 3: (b, q, k)}.get(len(shape), (*leading, h, q, k))
    if len(shape_of(mask)) > len(coords):
        raise Refused(f"its mask has {len(shape_of(mask))} dimensions, its query {len(shape)}", FOUR)
    part = MaskPart(mask, coords, (*shape[:-2], *sizes[2:]))
    return prove_all([part], sizes, scope, node, as_in_sdpa=True)
