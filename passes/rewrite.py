"""Put the planned ops into the graph, and take out what only the replaced attention needed."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from ..core.call import Call
from ..core.method import METHODS
from ..core.plan import Plan
from ..core.policy import Policy
from ..core.shards import is_dtensor, seed_of, shard_of_dtensor
from ..core.spec import AttentionSpec, HeadShard, known_equal
from .mask import Padding, PaddingTerm
from .nodes import fake_mode_of, local_of, reached, same_sizes, shape_of, shares_memory
from .normalize import Operation, in_place, is_new, operation, performed
from .site import AttentionSite, Emit
from .softmax import VIEWS

_FRESH = frozenset(
    ("matmul", "bmm", "baddbmm", "einsum", "mul", "div", "add", "sub", "exp", "softmax", "masked_fill", "where")
)
_OF_ANY_LAYOUT = frozenset(("transpose", "permute", "getitem", "unsqueeze", "squeeze", "detach"))
"""Views that exist whatever the strides are; of ``view`` that is not so, and others copy where there is none."""


def rewrite(
    gm: GraphModule, planned: Iterable[tuple[AttentionSite, Plan]], policy: Policy, written_out: bool = False
) -> int:
    """Replace every site whose plan says so, in place; returns how many were.

    With ``written_out`` attention that is written out and understood becomes ``scaled_dot_product_attention`` also
    where it stays exact: as fast as a compiler's own fusion would make it, and right.

    Each op gets one seed per graph and device: ``policy.seed``, or a number drawn in the graph from torch's
    default generator if that is None. Mask and repeat code that no one else uses is removed. Raises ``ValueError``
    if a site does not belong to ``gm``.
    """
    modules = set(gm.modules())
    changed: dict[GraphModule, dict[str, Node]] = {}
    replaced: dict[Node, Node] = {}  # attention of attention: a later site still names the node that is gone
    count = 0
    for site, decision in planned:
        if not changes(site, decision, written_out):
            continue
        if site.graph_module not in modules or site.node.graph is not site.graph_module.graph:
            raise ValueError(f"site {site.module!r}: its node {site.node.name!r} is not in the graph module given")
        seeds = changed.setdefault(site.graph_module, {})
        site = _renamed(site, replaced)
        if decision.method == "exact" and site.exact is not None:
            site = replace(site, expand=site.exact)
        site, outputs = _expand(site, replaced)
        replaced.update(outputs)
        if decision.method != "exact" or step_of(site, decision) is not None:
            replaced[site.node] = _replace(site, decision, policy, seeds)
        count += decision.verdict == "rewritten"
    for module in changed:
        module.graph.lint()
        module.recompile()
    return count


def changes(site: AttentionSite, decision: Plan, written_out: bool) -> bool:
    """Whether :func:`rewrite` changes the graph at ``site``."""
    if decision.method == "exact" and is_dtensor(_tensor_of(site.node)):  # of which not every SDPA kernel knows
        return False
    written_out = written_out and site.exact is not None
    return decision.verdict == "rewritten" or written_out or step_of(site, decision) is not None


def step_of(site: AttentionSite, decision: Plan) -> Any:
    """The op of a site that stays exact and is a step of decoding; None where what the model has is as good.

    That op has no gradient, reads the rows that are filled, and repeats no heads. On the CPU nothing is repeated.
    """
    spec = site.spec
    if decision.method != "exact" or site.refusal is not None or spec is None or site.form != "sdpa":
        return None
    if site.expand is not None or _tensor_of(site.node).requires_grad or not (spec.device == "cuda" or site.padding):
        return None
    return METHODS["exact"].step(spec)


def _renamed(site: AttentionSite, replaced: dict[Node, Node]) -> AttentionSite:
    """``site`` with the nodes that took the place of those it names."""
    padding = site.padding
    if padding is not None:
        terms = tuple(replace(term, node=_now(term.node, replaced)) for term in padding.terms)
        padding = replace(padding, terms=terms, last_row=padding.last_row and _now(padding.last_row, replaced))
    query, key, value = (x and _now(x, replaced) for x in (site.query, site.key, site.value))
    return replace(site, padding=padding, query=query, key=key, value=value)


def _now(node: Node, replaced: dict[Node, Node]) -> Node:
    """The node that has taken the place of ``node``; what was opened up may have been replaced once more."""
    while node in replaced:
        node = replaced[node]
    return node


def _expand(site: AttentionSite, replaced: dict[Node, Node] | None = None) -> tuple[AttentionSite, dict[Node, Node]]:
    """Write SDPA in the place of what is no call of it, or not a plain one: its site, and what outputs became.

    ``replaced``: the nodes that have taken the place of others since the site was found.
    """
    if site.expand is None:
        return site, {}
    node, graph = site.node, site.graph_module.graph
    is_tuple = isinstance(node.meta["example_value"], tuple)
    outputs = list(node.users) if is_tuple else [node]
    with graph.inserting_before(node):

        def emit(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
            args, kwargs = torch.fx.node.map_arg((args, kwargs), lambda x: _now(x, replaced or {}))
            return _emit(graph, target, args, kwargs, like=node)

        attention, out = site.expand(emit)
        if not is_tuple and _layout_matters(node):
            out = _with_layout_of(graph, out, node)
        out = _to_be_written(graph, out, site)
    dead = list(node.all_input_nodes)
    for output in outputs:
        output.replace_all_uses_with(out)
        graph.erase_node(output)
    if is_tuple:
        graph.erase_node(node)
    _sweep(graph, dead)
    query, key, value = cast(tuple[Node, Node, Node], attention.args)
    inner = replace(site, node=attention, query=query, key=key, value=value, written=False)
    return inner, dict.fromkeys(outputs, out)


def _to_be_written(graph: Graph, out: Node, site: AttentionSite) -> Node:
    """``out``, or a copy of it if it is written later and its gradient needs it as it is."""
    if site.written and _tensor_of(site.node).requires_grad:
        return _emit(graph, torch.clone, (out,), like=site.node)
    return out


def _tensor_of(node: Node) -> torch.Tensor:
    """The example value of a node, or its first one."""
    example = node.meta["example_value"]
    first: torch.Tensor = example[0] if isinstance(example, tuple) else example
    return first


def _replace(site: AttentionSite, decision: Plan, policy: Policy, seeds: dict[str, Node]) -> Node:
    """Put the op in the place of ``site``; returns the node of its result."""
    node, spec, graph = site.node, site.spec, site.graph_module.graph
    inputs = [x for x in (site.query, site.key, site.value) if x is not None]
    if spec is None or len(inputs) < 3:
        raise ValueError(f"site {site.module!r}: it is not known what its node {node.name!r} computes")
    device, step = node.meta["example_value"].device, step_of(site, decision)
    shard = spec.shard or _shard_of_dtensor(inputs[1], spec, decision)
    if step is None and str(device) not in seeds:
        seeds[str(device)] = _seed(graph, device, policy, node)
    with graph.inserting_before(node):
        # under autocast SDPA casts its inputs; an op of ours is not known to autocast
        query, key, value = (_cast(graph, x, spec.dtype, node) for x in inputs)
        padding = None if site.padding is None else _padding(graph, site, site.padding, spec)
        if step is not None:
            out = _emit(graph, step, (query, key, value, padding, spec.scale), like=node)
        else:
            method, seed = METHODS[decision.method], seeds[str(device)]
            if shard is not None and shard.first:
                seed = _emit(graph, torch.add, (seed, seed_of(0, shard)), like=node)
            options = method.part(decision.params, shard)
            given = Call(query, key, value, padding, seed, spec.scale, site.layer, options=options)
            results = _emit(graph, method.op, given.args, given.keywords, like=node)
            out = _emit(graph, operator.getitem, (results, 0), like=node)
        if _layout_matters(node):
            out = _with_layout_of(graph, out, node)
        out = _to_be_written(graph, out, site)
    for name, fact in node.meta.items():
        if name != "example_value":
            out.meta.setdefault(name, fact)
    node.replace_all_uses_with(out)
    dead = list(node.all_input_nodes)
    graph.erase_node(node)
    _sweep(graph, dead)
    return out


def _shard_of_dtensor(key: Node, spec: AttentionSpec, decision: Plan) -> HeadShard | None:
    """The heads that this process has of a DTensor; of attention that is written out the key is known only now."""
    if not is_dtensor(example := _tensor_of(key)):
        return None
    shard, cycle = shard_of_dtensor(example), METHODS[decision.method].cycle(decision.params)
    if shard is not None and spec.H // spec.H_kv * shard.heads % cycle:
        raise ValueError(
            f"{decision.method} gives every {cycle} heads their parts in turn; a process has {shard.heads} of "
            f"{shard.of} KV heads, with {spec.H // spec.H_kv} heads each"
        )
    return shard


def _seed(graph: Graph, device: torch.device, policy: Policy, like: Node) -> Node:
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        kwargs = {"dtype": torch.int64, "device": device}
        if policy.seed is None:
            return _emit(graph, torch.randint, (0, 2**32, ()), kwargs, like=like, inherit=False)
        return _emit(graph, torch.full, ((), policy.seed), kwargs, like=like, inherit=False)


def _emit(
    graph: Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
    inherit: bool = True,
) -> Node:
    """A new call with its example value, and with the module and source of ``like`` if it is to ``inherit``."""
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
    # without Python's decompositions some C++ ones turn symbolic sizes into numbers
    with fake_mode_of(_tensor_of(like)), enable_python_dispatcher():
        run = _sdpa if target is torch.nn.functional.scaled_dot_product_attention else target
        node.meta["example_value"] = run(*values[0], **values[1])
    if inherit:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    return node


def _sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """SDPA without values; of DTensors by that of their parts, for not every kernel of it knows DTensors."""
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    out: Any = attention(*map(local_of, (query, key, value)), *args, **kwargs)
    if is_dtensor(query):
        out = query.from_local(out, query.device_mesh, query.placements, run_check=False)
    whole: torch.Tensor = out
    return whole


def _cast(graph: Graph, x: Node, dtype: torch.dtype, like: Node) -> Node:
    return x if x.meta["example_value"].dtype == dtype else _emit(graph, torch.Tensor.to, (x, dtype), like=like)


def _padding(graph: Graph, site: AttentionSite, padding: Padding, spec: AttentionSpec) -> Node:
    """Nodes that compute the bool ``[B, Lk]`` key padding."""

    def emit(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return _emit(graph, target, args, kwargs, like=site.node)

    lengths = [(spec.B, site.query, 0), (spec.Lk, site.key, 2)]
    conditions = [_condition(emit, term, lengths[not term.has_batch :]) for term in padding.terms]
    if padding.last_row is not None:
        conditions.append(_last_row(emit, padding.last_row, padding.last_index))
    result = functools.reduce(lambda a, b: emit(torch.logical_and, a, b), conditions)
    if known_equal(shape_of(result)[0], spec.B):
        return result
    return emit(torch.Tensor.expand, result, emit(torch.Tensor.size, site.query, 0), -1)


def _last_row(emit: Emit, mask: Node, index: tuple[Any, ...]) -> Node:
    row = emit(operator.getitem, mask, index)
    if mask.meta["example_value"].dtype != torch.bool:
        row = emit(torch.eq, row, 0)
    return row if index.count(slice(None)) == 2 else emit(torch.unsqueeze, row, 0)


def _condition(emit: Emit, term: PaddingTerm, lengths: Sequence[tuple[Any, Node | None, int]]) -> Node:
    """``lengths``: of each dimension that is kept, and the node and dimension that have it when running."""
    result = term.node
    if any(item != slice(None) for item in term.index):
        result = emit(operator.getitem, result, term.index)
    for dim, (length, x, along) in enumerate(lengths):
        if not known_equal(shape_of(result)[dim], length):
            # gathered, not sliced: where the model's own read raises, a slice would take what there is
            device = term.node.meta["example_value"].device
            places = emit(torch.arange, emit(torch.Tensor.size, x, along), device=device)
            result = emit(operator.getitem, result, (*[slice(None)] * dim, places))
    if term.node.meta["example_value"].dtype != torch.bool:
        result = emit(getattr(torch, term.relation), result, term.constant)
    elif (term.relation == "eq") != bool(term.constant):
        result = emit(torch.logical_not, result)
    return result if term.has_batch else emit(torch.unsqueeze, result, 0)


def _layout_matters(node: Node) -> bool:
    """Whether strides decide what becomes of the result of ``node``: a ``view`` is taken of it, or they are read."""

    def named(node: Node, names: Container[str]) -> Iterator[Node]:
        return (user for user in node.users if (op := operation(user)) is not None and op.name in names)

    for x in reached(node, lambda x: named(x, _OF_ANY_LAYOUT)):
        if any(named(x, ("view",))) or any(y.target in ("as_strided", "stride", "is_contiguous") for y in x.users):
            return True
    return False


def _with_layout_of(graph: Graph, out: Node, like: Node) -> Node:
    """``out`` with its dimensions in the memory order of ``like``'s, copied if that is another one."""
    example, target = out.meta["example_value"], like.meta["example_value"]
    if same_sizes(example.stride(), target.stride()):
        return out
    for order in itertools.permutations(range(example.dim())):
        inverse = tuple(order.index(d) for d in range(example.dim()))
        with fake_mode_of(target):
            candidate = example.permute(order).contiguous().permute(inverse)
        if same_sizes(candidate.stride(), target.stride()):
            moved = _emit(graph, torch.permute, (out, order), like=like)
            moved = _emit(graph, torch.Tensor.contiguous, (moved,), like=like)
            return _emit(graph, torch.permute, (moved, inverse), like=like)
    return out


def _sweep(graph: Graph, candidates: list[Node]) -> None:
    """Erase pure nodes without users, and what only they used; also what is only written, into memory of its own."""
    erased: set[Node] = set()
    while candidates:
        node = candidates.pop()
        for dead in _unread(node) if node not in erased else ():
            candidates.extend(dead.all_input_nodes)
            graph.erase_node(dead)
            erased.add(dead)


def _unread(node: Node) -> list[Node]:
    """What nobody needs if nobody reads ``node``, the last first: itself, or the tensor whose memory it is in with all
    that comes of that, which is at most written back there."""
    base = node
    while _is_alias(base):
        base = cast(Operation, performed(base)).node()
    aliases = reached(base, lambda x: (user for user in x.users if _is_alias(user) and user.args[0] is x))
    if _is_fresh(base) and any(in_place(x) for x in aliases):
        *after, _ = sorted(reached(base, lambda x: x.users), reverse=True)
        writes = (in_place(x) for x in after if operation(x) is None)
        if all(write is not None and shares_memory(write.node(), base) for write in writes):
            return [*after, base]
    return [] if node.users or operation(node) is None else [node]


def _is_alias(node: Node) -> bool:
    """Whether a node's result is its input: a view of it, or written into it."""
    op = operation(node)
    return in_place(node) is not None if op is None else op.name in VIEWS


def _is_fresh(node: Node) -> bool:
    """Whether the memory of a node's result is that of nothing before it."""
    op = operation(node)
    is_view = op is not None and op.name == "einsum" and len(op.get("operands", ())) < 2
    return op is not None and not is_view and (is_new(node) or op.name in _FRESH)
