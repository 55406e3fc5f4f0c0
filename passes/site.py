"""What an attention site is, and the graph around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..core.spec import AttentionSpec, Mask, feature_major, known_equal, layer_key
from .buffers import Buffers
from .mask import Padding
from .nodes import fake_mode_of, is_parted, reached, shares_memory, tensor_of
from .normalize import bodies, in_place, mutated_inputs, number

Emit = Callable[..., Node]
"""``emit(function, *args, **kwargs)``: a new call in the graph, its meta filled in."""
Expand = Callable[[Emit], tuple[Node, Node]]
"""Emits what a site computes; returns its SDPA node and the node of its output."""

Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A call ``(function, args, kwargs)`` of a tensor, which comes before ``args``; those may be operands themselves."""

PADDED = "a padded batch with a key padding"


class Refused(Exception):
    """The site cannot be described by an :class:`AttentionSpec`; the message says why.

    ``nearest`` is what could be described in its place, in words, if there is such a thing.
    """

    def __init__(self, why: str, nearest: str | None = None) -> None:
        super().__init__(why)
        self.nearest = nearest


@dataclass(frozen=True)
class AttentionSite:
    """One attention site.

    node, graph_module: the node that computes it (its query-key product, if its softmax is in no graph) and the
        (sub-)graph module it lives in.
    module: path of the module it belongs to, relative to the compiled root; ``""`` is the root itself.
    index: its place among the sites of that module; (module, index) is its ``layer`` key.
    source: ``file:line`` of the user's call, ``""`` if unknown.
    form: ``"sdpa"``, the name of an opaque function, or of a form that is only listed.
    query, key, value: nodes ``[B, H, Lq, D]``, ``[B, H_kv, Lk, D]``, ``[B, H_kv, Lk, Dv]``; key and value are
        taken before they are repeated for grouped queries. None for an opaque function; ``expand`` may take others.
    padding: where to find the key padding, if ``spec.mask.padding``.
    spec: what it computes; None if that is not known.
    refusal: why it cannot be rewritten whatever the policy; None otherwise.
    nearest: what could be rewritten in its place then, in words, if there is such a thing.
    expand: writes ``scaled_dot_product_attention`` for what is no call of it, or for a call whose query or key was
        scaled before; None where the call can stay as it is.
    exact: the same for attention that is written out and stays exact; None where SDPA would not give all that it gives.
    averages: whether a row whose keys are all hidden gets the mean of the values.
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
    written: bool = False
    nearest: str | None = None
    exact: Expand | None = None
    averages: bool = False

    @property
    def layer(self) -> int:
        """The site's key for random numbers."""
        return layer_key(self.module, self.index)


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph and the calls that turn it into an input of attention; their arguments may be sizes."""

    node: Node
    steps: tuple[Step, ...] = ()

    def then(self, function: Callable[..., Any], *args: Any) -> Operand:
        """The result of one more call."""
        return Operand(self.node, (*self.steps, (function, args, {})))

    def emit(self, emit: Emit) -> Node:
        """The node of the result, which ``emit`` writes."""
        x = self.node
        for function, args, kwargs in self.steps:
            x = emit(function, x, *(arg.emit(emit) if isinstance(arg, Operand) else arg for arg in args), **kwargs)
        return x

    @property
    def shape(self) -> torch.Size:
        """The shape of the result."""
        return self.example.shape

    @property
    def example(self) -> torch.Tensor:
        """The result without values."""
        x: torch.Tensor = self.node.meta["example_value"]
        with fake_mode_of(x):
            for function, args, kwargs in self.steps:
                args, kwargs = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
                x = function(x, *(arg.example if isinstance(arg, Operand) else arg for arg in args), **kwargs)
        return x


@dataclass
class Scope:
    """One graph with what surrounds it: where its inputs come from, what is written, why nothing may change.

    autocast: the calls that have entered ``torch.autocast`` and not left it at the node the walk has come to.
    buffers: what is known of the values of placeholders.
    attended: the results of attention that the walk has found in this graph so far.
    caller: the node of ``parent``'s graph that runs this one.
    """

    gm: GraphModule
    outer: Mapping[Node, Node] = field(default_factory=dict)
    parent: Scope | None = None
    refusal: str | None = None
    autocast: list[Node] = field(default_factory=list)
    buffers: Buffers = field(default_factory=Buffers)
    attended: set[Node] = field(default_factory=set)
    caller: Node | None = None

    @property
    def contexts(self) -> list[tuple[Any, ...]]:
        """The arguments of the ``torch.autocast`` that is entered, outermost first."""
        return [context.args for context in self.autocast]

    @cached_property
    def order(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.gm.graph.nodes)}

    @cached_property
    def writes(self) -> list[tuple[int, Node]]:
        return [(i, target) for node, i in self.order.items() for target in mutated_inputs(node)]

    @cached_property
    def nodes(self) -> list[Node]:
        return list(self.order)

    def last_write(self, node: Node, reader: Node) -> Node | None:
        """What wrote last into the memory of ``node`` after it was computed and before ``reader`` runs.

        ``node`` may be one of a graph around this one, and ``reader`` then one of this graph.
        """
        if node not in self.order:
            outer = self.caller if reader in self.order else reader
            return None if self.parent is None or outer is None else self.parent.last_write(node, outer)
        stop = self.order[reader] + bool(bodies(reader))  # what a graph inside writes, its caller writes
        places = [i for i, target in self.writes if self.order[node] < i < stop and shares_memory(target, node)]
        return self.nodes[max(places)] if places else None

    def latest(self, node: Node, reader: Node) -> Node:
        """What computed the values that ``reader`` finds in ``node``: it, or the last that wrote its result into it.

        The same tensor may be known by the results of what wrote into it; writes through views are not looked at.
        """
        first: Node = node
        while (op := in_place(first)) is not None and tensor_of(first) is not None:
            first = op.node()
        results = reached(first, lambda x: (w for w in x.users if (op := in_place(w)) and op.get("input") is x))
        before = (x for x in results if tensor_of(x) is not None and self.order[x] < self.order[reader])
        return max(before, key=self.order.__getitem__)

    @cached_property
    def grad_switches(self) -> list[int]:
        return self._calls("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")

    @cached_property
    def autocast_switches(self) -> list[int]:
        return self._calls("_enter_autocast", "_exit_autocast")

    def _calls(self, *names: str) -> list[int]:
        return [i for node, i in self.order.items() if getattr(node.target, "__name__", "") in names]

    def written(self, node: Node, after: int = -1, before: int | None = None, but: Iterable[Node] = ()) -> bool:
        """Whether the memory of ``node`` is written between the two positions by another node than those of ``but``."""
        stop = len(self.order) if before is None else before
        allowed = {self.order[writer] for writer in but if writer in self.order}
        return any(after < i < stop and i not in allowed and shares_memory(target, node) for i, target in self.writes)

    def overwritten(self, node: Node, but: Iterable[Node] = ()) -> bool:
        """Whether the memory of ``node`` is written once it has been computed, by another node than those of ``but``.

        ``node`` may also be one of a graph around this one.
        """
        if node not in self.order:
            return self.parent is not None and self.parent.overwritten(node, but)
        return self.written(node, after=self.order[node], but=but)


def tensor_argument(args: Mapping[str, Any], name: str, how: str = "") -> Node:
    """The node of an argument that is a tensor; ``how`` says what would make it one that can be read."""
    node, example = args.get(name), tensor_of(args.get(name))
    if node is None or example is None:
        raise Refused(f"its {name} is not a tensor of the graph")
    if is_parted(example):
        raise Refused(f"its {name} is a nested or sparse tensor{how}", PADDED)
    found: Node = node
    return found


def check_heads(query: torch.Size, key: torch.Size, value: torch.Size, repeats: bool) -> None:
    """Raise :class:`Refused` unless shapes ``[B, H, Lq, D]``, ``[B, H_kv, Lk, D]`` and ``[B, H_kv, Lk, Dv]`` fit.

    ``repeats``: keys and values of fewer heads, also of more than one, are meant to be repeated for the query heads.
    """
    B, H, H_kv = query[0], number(query[1]), number(key[1])
    if known_equal(query[3], 0) or known_equal(value[3], 0):
        raise Refused("its head size is 0")
    for name, shape in (("key", key), ("value", value)):
        if not known_equal(shape[0], B):
            raise Refused(f"its {name} has batch size {shape[0]}, its query {B}")
    if not known_equal(value[1], H_kv):
        raise Refused(f"its key has {H_kv} heads, its value {value[1]}")
    if known_equal(H, H_kv):
        return
    if not isinstance(H, int) or not isinstance(H_kv, int):
        raise Refused(f"its numbers of heads {H} and {H_kv} are not known when compiling")
    if H_kv < 1 or H % H_kv or not (H_kv == 1 or repeats):
        raise Refused(f"its {H_kv} key heads do not fit its {H} query heads")


def make_spec(
    out: Node, query: Operand, key: Operand, value: Operand, *, scale: float, mask: Mask, dropout_p: float
) -> AttentionSpec:
    """The spec of a site with these inputs, whose result is ``out``."""
    example, keys = out.meta["example_value"], key.example
    B, H, Lq, D = map(number, query.shape)
    _, H_kv, Lk, _ = map(number, keys.shape)
    return AttentionSpec(
        B=B, H=H, H_kv=H_kv, Lq=Lq, Lk=Lk, D=D, Dv=number(value.shape[3]), dtype=example.dtype,
        device=example.device.type, scale=scale, mask=mask, dropout_p=dropout_p, feature_major=feature_major(keys),
    )  # fmt: skip


@contextmanager
def entered(autocast: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """Inside of every ``torch.autocast`` with these arguments, the outermost first."""
    with ExitStack() as stack:
        for arguments in autocast:
            stack.enter_context(torch.amp.autocast(*arguments))
        yield
