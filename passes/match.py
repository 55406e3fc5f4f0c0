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

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..spec import AttentionSpec, Mask, default_scale, feature_major, known_equal
from . import softmax
from .buffers import Buffers
from .cut import cut_products
from .mask import MaskPart, Padding, prove, same_for_all_queries
from .multihead import OPAQUE, describe
from .normalize import bodies, graph_module, number, operation
from .repeat import unrepeated
from .scale import unscaled
from .site import PADDED, AttentionSite, Emit, Operand, Refused, Scope, check_heads, entered, make_spec, shape_of
from .symbolic import COORDINATES


def find_sites(gm: GraphModule, buffers: Buffers | None = None) -> list[AttentionSite]:
    """All attention sites of ``gm`` and of the graph modules inside it, in order of execution. Changes nothing.

    With ``buffers`` a mask may be proven by what a module's buffer holds: ``buffers.used`` are those then.
    """
    found: list[AttentionSite] = []
    count: Counter[str] = Counter()

    def common(gm: GraphModule, node: Node, form: str) -> dict[str, Any]:
        module = module_path(node)
        count[module] += 1
        place = {"module": module, "index": count[module] - 1, "source": source_line(node)}
        return {"node": node, "graph_module": gm, "form": form, **place}

    for scope, node in _walk(Scope(gm, buffers=buffers or Buffers()), set()):
        form = _form(node)
        if form is None:
            continue
        known = common(scope.gm, node, form)
        try:
            site = AttentionSite(**{**known, **_describe(scope, node, form)})
            found.append(replace(site, written=scope.overwritten(site.node)))
            scope.attended.add(site.node)
        except Refused as error:
            found.append(AttentionSite(**known, refusal=str(error), nearest=error.nearest))
    for product, error in cut_products(gm):
        found.append(AttentionSite(**common(gm, product, "softmax"), refusal=str(error), nearest=error.nearest))
    return found


def _form(node: Node) -> str | None:
    op = operation(node)
    if op is not None and op.name == "scaled_dot_product_attention":
        return "sdpa"
    if op is not None and op.name == "softmax" and softmax.feeds_product(node):
        return "softmax"
    return OPAQUE.get(node.target) if node.op == "call_function" else None


_FUNCTORCH = re.compile(r"_(vmap|grad|jvp)_increment_nesting|_func_increment_nesting|_add_batch_dim|_make_dual")


# the bodies of other higher-order operators come with a gradient or a contract of their own
_OPEN_OPERATORS = ("tag_activation_checkpoint", "wrap")


def _walk(scope: Scope, visited: set[GraphModule]) -> Iterator[tuple[Scope, Node]]:
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
            inner = Scope(body, _feeds(scope, node, body), scope, refusal, list(scope.autocast), scope.buffers)
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


def _describe(scope: Scope, node: Node, form: str) -> dict[str, Any]:
    """What ``node`` computes, as fields of its site."""
    if scope.refusal is not None:
        raise Refused(scope.refusal)
    if form == "softmax":
        return softmax.describe(scope, node)
    if form != "sdpa":
        facts = {"outer": scope.outer, "overwritten": scope.overwritten, "autocast": scope.contexts}
        spec, padding, expand = describe(node, **facts)
        return {"spec": spec, "padding": padding, "expand": expand}
    args = operation(node).args
    query, key, value = (_tensor(args, name) for name in ("query", "key", "value"))
    key, value = unrepeated(scope, node, query, key, value)
    inputs = {"query": query, "key": key, "value": value}
    (query, of_query), (key, of_key) = (unscaled(scope, Operand(x)) for x in (query, key))
    spec, padding = _specify(scope, node, args, *inputs.values(), factor=of_query * of_key)
    expand = None
    if query.steps or key.steps or query.node is not inputs["query"] or key.node is not inputs["key"]:
        expand = partial(_write, query, key, value, args, spec, scope.contexts)
    return {**inputs, "padding": padding, "spec": spec, "expand": expand}


def _write(
    query: Operand,
    key: Operand,
    value: Node,
    args: Mapping[str, Any],
    spec: AttentionSpec,
    autocast: Sequence[tuple[Any, ...]],
    emit: Emit,
) -> tuple[Node, Node]:
    """The same call of a query and a key that are not scaled before."""
    kept = {name: args[name] for name in ("attn_mask", "dropout_p", "is_causal") if name in args}
    gqa = not known_equal(spec.H, spec.H_kv)
    with entered(autocast):
        inputs = (query.emit(emit), key.emit(emit), value)
        out = emit(F.scaled_dot_product_attention, *inputs, **kept, scale=spec.scale, enable_gqa=gqa)
    return out, out


FOUR = "query, key and value of four dimensions: unsqueeze those of one sequence or of one head"


def _tensor(args: Mapping[str, Any], name: str) -> Node:
    node = args.get(name)
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(example, torch.Tensor):
        raise Refused(f"its {name} is not a tensor of the graph")
    if example.dim() != 4:
        raise Refused(f"its {name} has {example.dim()} dimensions, not 4: [batch, heads, length, head size]", FOUR)
    if example.layout != torch.strided or example.is_nested:
        raise Refused(f"its {name} is a nested or sparse tensor", PADDED)
    return node


def _specify(
    scope: Scope, node: Node, args: Mapping[str, Any], query: Node, key: Node, value: Node, factor: float
) -> tuple[AttentionSpec, Padding | None]:
    shapes = [shape_of(x) for x in (query, key, value)]
    H, D = (number(shape_of(query)[i]) for i in (1, 3))
    repeats = args.get("enable_gqa", False) or known_equal(shape_of(args["key"])[1], H)
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
    facts = dict(mask=mask, dropout_p=dropout_p, feature_major=feature_major(key.meta["example_value"]))
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
    proven, padding = prove(mask, sizes, outer=scope.outer, overwritten=scope.overwritten, buffers=scope.buffers)
    if proven.unknown is None:
        return proven, padding
    return same_for_all_queries(MaskPart(mask, COORDINATES, sizes), sizes) or (proven, padding)
