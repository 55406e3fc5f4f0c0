"""Attention that a graph break cuts in two, before the softmax or after it.

Usually Dynamo captures what follows a graph break as a graph of its own, which has the softmax, and there the site is
listed. Where it cannot resume (an index that depends on data, say) it runs the rest of the function as plain Python.
No graph holds the softmax then, so the site is listed at its product, in the graph that ends there. Where the weights
leave a graph before they meet the values, the site is listed at its softmax.

This is a search, no proof: nothing is rewritten. Listed are scores that leave a graph which ends in such a way, if the
rest of the function calls something whose name has "softmax" in it.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from functools import lru_cache

from torch.fx import GraphModule, Node

from .near import weights_leave
from .site import Refused
from .softmax import leaves_graph

_NOT_RESUMED = "step_unsupported"  # GraphCompileReason.reason where Dynamo skips the rest of a function
PARTED = "a graph break parts its query-key product from its softmax"
PARTED_AFTER = "a graph break parts its softmax from its product with the values"
_NEAREST = (
    "code that reads no tensor's value in between, as .item(), max(0, tensor) and x[tensor:] do "
    "(TORCH_LOGS=graph_breaks names the line), or torch._dynamo.config.capture_scalar_outputs=True where torch can "
    "trace it"
)


def cut_weights(gm: GraphModule) -> Iterator[tuple[Node, Refused]]:
    """The softmaxes of attention that meet no values before ``gm`` ends in a graph break, each with its refusal."""
    if getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
        yield from ((node, Refused(PARTED_AFTER, _NEAREST)) for node in gm.graph.nodes if weights_leave(node))


def cut_products(gm: GraphModule) -> Iterator[tuple[Node, Refused]]:
    """The products of queries and keys whose softmax Dynamo captures in no graph, each with its refusal.

    Of several that are added up the first is given. ``gm`` is a graph as Dynamo hands it over.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or reason.reason != _NOT_RESUMED:
        return
    left = {scores: node for node in reversed(gm.graph.nodes) if (scores := leaves_graph(node)) is not None}
    frame = reason.user_stack[-1]
    if not left or not _calls_softmax("".join(linecache.getlines(frame.filename)), frame.lineno):
        return
    refused = Refused(f"{PARTED}: '{frame.name}' runs uncompiled from line {frame.lineno} on", _NEAREST)
    yield from ((product, refused) for product in reversed(left.values()))


@lru_cache(maxsize=16)
def _calls_softmax(source: str, line: int) -> bool:
    """Whether the function around a line calls a softmax in that line or later."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and node.lineno <= line <= node.end_lineno
    ]
    calls = ast.walk(max(functions, key=lambda node: node.lineno)) if functions else ()
    return any(isinstance(node, ast.Call) and node.lineno >= line and _is_softmax(node.func) for node in calls)


def _is_softmax(function: ast.expr) -> bool:
    name = getattr(function, "attr", None) or getattr(function, "id", "")
    return "softmax" in name.lower() and "log" not in name.lower()
