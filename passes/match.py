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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..core.sites import NOT_MATCHED
from ..core.spec import AttentionSpec, Mask, default_scale, known_equal
from . import near, softmax
from .buffers import Buffers
from .cut import cut_products, cut_weights
from .layout import Layout, layout_of, prove_rows
from .mask import MaskPart, Padding, unknown
from .multihead import OPAQUE, describe
from .nodes import same_sizes, shape_of, tensor_of
from .normalize import bodies, computes_gradients, graph_module, known, number, operation
from .place import Place, module_path
from .repeat import unrepeated
from .scale import unscaled
from .site import (
    AttentionSite,
    Emit,
    Operand,
    Refused,
    Scope,
    check_heads,
    entered,
    make_spec,
    tensor_argument,
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

    def listed(gm: GraphModule, node: Node, form: str) -> AttentionSite:
        path = module_path([node, *softmax.products(node)] if form == "softmax" else [node])
        module, lost = (place.nearest, place.lost) if path is None else (path, None)
        count[module] += 1
        index = place.number(module, count[module] - 1)
        return AttentionSite(node, gm, module, index, source_line(node), form, refusal=lost)

    def refused(site: AttentionSite, error: Refused) -> AttentionSite:
        return replace(site, refusal=str(error), nearest=error.nearest)

    for scope, node in _walk(Scope(gm, buffers=buffers or Buffers()), set()):
        form = _form(node)
        unread = near.unread(node) if form is None else None
        if form is None and unread is None:
            continue
        site = listed(scope.gm, node, form or NOT_MATCHED)
        try:
            if unread is not None:
                raise unread
            site = replace(site, **(_describe(scope, node, site.form) if site.refusal is None else {}))
            found.append(replace(site, written=scope.overwritten(site.node)))
            scope.attended.add(site.node)
        except Refused as error:
            found.append(refused(site, error))
    cut = (*cut_products(gm), *cut_weights(gm))
    return found + [refused(listed(gm, node, "softmax"), error) for node, error in cut]


def _form(node: Node) -> str | None:
    op = operation(node)
    if op is not None and op.name == "scaled_dot_product_attention":
        return "sdpa"
    written = softmax.softmax_of(node)
    if written is not None and not near.weighs_features(written):
        return "softmax" if softmax.feeds_product(written) or near.is_cut_off(written) else None
    return OPAQUE.get(node.target) if callable(node.target) else None


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
    backends, ordered = cast(Sequence[Any], switch.args[0]), switch.args[1:]
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
    if scope.refusal is not None:
        raise Refused(scope.refusal)
    if form == "sdpa":
        return _describe_sdpa(scope, node, known(node).args)
    written = softmax.softmax_of(node) if form == "softmax" else None
    if written is None:
        spec, padding, expand = describe(scope, node)
        return {"spec": spec, "padding": padding, "expand": expand}
    try:
        return softmax.describe(scope, written)
    except Refused:
        mixed = near.mixes_heads(written)
        if mixed is None:
            raise
        raise mixed from None


def _describe_sdpa(scope: Scope, node: Node, args: Mapping[str, Any]) -> dict[str, Any]:
    query, key, value = (tensor_argument(args, name) for name in ("query", "key", "value"))
    rows = _rows(node, (query, key, value))
    key, value = unrepeated(scope, node, query, key, value)
    layout = layout_of([torch.Size((*rows, shape_of(key)[-2]))], shape_of(key))
    layout, mask, padding = _mask(scope, node, args, layout, rows)
    q, k, v = layout.queries(Operand(query)), *(layout.keys(Operand(x), rows) for x in (key, value))
    (plain_q, of_query), (plain_k, of_key) = (unscaled(scope, x) for x in (q, k))
    repeats = args.get("enable_gqa", False) or layout.grouped or key is not args["key"]
    check_heads(q.shape, k.shape, v.shape, repeats)
    scale = _scale(args, number(q.shape[3])) * of_query * of_key
    dropout_p = _constant(args.get("dropout_p", 0.0), "dropout_p") or 0.0
    spec = make_spec(node, q, k, v, scale=scale, mask=mask, dropout_p=dropout_p)
    facts: dict[str, Any] = {"padding": padding, "spec": spec}
    moved = bool(q.steps or k.steps or v.steps)
    if not moved:
        facts |= {"query": query, "key": key, "value": value}
    if moved or (plain_q, plain_k) != (q, k):
        facts["expand"] = partial(_write, (plain_q, plain_k, v), node, rows, layout, spec, scope.contexts)
    return facts


def _write(
    inputs: Sequence[Operand],
    node: Node,
    rows: Sequence[Any],
    layout: Layout,
    spec: AttentionSpec,
    autocast: Sequence[tuple[Any, ...]],
    emit: Emit,
) -> tuple[Node, Node]:
    """The same call of a query and a key that are not scaled before, and of four dimensions."""
    args = known(node).args
    kept = {name: args[name] for name in ("attn_mask", "dropout_p", "is_causal") if name in args}
    gqa = not known_equal(spec.H, spec.H_kv)
    with entered(autocast):
        tensors = [x.emit(emit) for x in inputs]
        if isinstance(kept.get("attn_mask"), Node):
            kept["attn_mask"] = layout.mask(kept["attn_mask"], rows, tensors[0], emit)
        attention = emit(F.scaled_dot_product_attention, *tensors, **kept, scale=spec.scale, enable_gqa=gqa)
        return attention, layout.back(Operand(attention), rows).emit(emit)


FOUR = "query, key and value of four dimensions"


def _rows(node: Node, inputs: Sequence[Node]) -> Sequence[Any]:
    """What scores have before their keys. Query, key, value and result have the same number of dimensions."""
    shapes = [shape_of(x) for x in (node, *inputs)]
    ranks = [len(shape) for shape in shapes]
    if len(set(ranks)) > 1:
        given = f"{ranks[1]}, {ranks[2]} and {ranks[3]}"
        raise Refused(f"its query, key and value have {given} dimensions, not the same", FOUR)
    rows = shapes[1][:-1]
    if ranks[0] != 4 and not same_sizes(rows, shapes[0][:-1]):
        raise Refused(f"its query is of {tuple(rows)}, its result of {tuple(shapes[0][:-1])}", FOUR)
    return rows


def _scale(args: Mapping[str, Any], D: Any) -> float:
    scale = _constant(args.get("scale"), "scale")
    if scale is None and not isinstance(D, int):
        raise Refused(
            f"its head size {D} is not known when compiling, and so its scale 1 / sqrt({D})", "scale= as a number"
        )
    return default_scale(D) if scale is None else scale


def _constant(arg: Any, name: str) -> float | None:
    """A float argument that is a number or a node with a constant value; None stays None."""
    arg = number(arg)
    if arg is None or isinstance(arg, int | float):
        return None if arg is None else float(arg)
    raise Refused(f"its {name} is not known when compiling")


def _mask(
    scope: Scope, node: Node, args: Mapping[str, Any], layout: Layout, rows: Sequence[Any]
) -> tuple[Layout, Mask, Padding | None]:
    """What a call of SDPA lets its queries see, and where they are in ``rows``."""
    mask, is_causal = args.get("attn_mask"), args.get("is_causal", False)
    if not isinstance(is_causal, bool):
        return layout, *unknown("its is_causal is not known when compiling")
    if is_causal and mask is not None:
        return layout, *unknown("it has a mask and is_causal=True")
    if mask is None:
        return layout if is_causal else layout.known, Mask(causal=is_causal), None
    if tensor_of(mask) is None:
        return layout, *unknown("it is not a tensor of the graph")
    if len(shape_of(mask)) > len(rows) + 1:
        raise Refused(f"its mask has {len(shape_of(mask))} dimensions, its query {len(rows) + 1}", FOUR)
    Lk = number(shape_of(args["key"])[-2])

    def parts(layout: Layout) -> list[MaskPart]:
        return [MaskPart(mask, (*layout.places(rows), COORDINATES[-1]), (*rows, Lk))]

    return prove_rows(parts, layout, Lk, scope, node, as_in_sdpa=True)
