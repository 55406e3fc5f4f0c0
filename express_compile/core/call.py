"""A call of an op of ours: its arguments by name, and the one place where what Python calls can be run otherwise.

What ``rewrite_attention`` changed and what :func:`explain` runs come by :func:`call`. What a compiler made of a graph
calls the ops itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .method import METHODS
from .spec import AttentionSpec, Mask

Op = torch._ops.OpOverload


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of the op of a method: values, or the nodes that stand for them in a graph.

    query, key, value: ``[B, H, Lq, D]``, ``[B, H_kv, Lk, D]``, ``[B, H_kv, Lk, Dv]`` of one floating dtype.
    padding: bool ``[B, Lk]``, True for a real key, or None. seed: 0-dim int64. layer: :func:`spec.layer_key`.
    lengths, sinks: int64 ``[B]`` keys of every sequence of a static cache, and ``[H]`` a logit per query head, where
        an op takes them; else None.
    options: the keyword arguments of the op, ``Method.params``.
    """

    query: Any
    key: Any
    value: Any
    padding: Any
    seed: Any
    scale: Any
    layer: Any
    lengths: Any = None
    sinks: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call ``op(*args, **kwargs)``."""
        given = {**dict(zip(_names(op), args, strict=False)), **kwargs}
        own = {f.name: given.pop(f.name) for f in fields(cls) if f.name in given}
        return cls(**own, options=given)

    @classmethod
    def of_arguments(cls, args: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
        """The call whose positional arguments are all given in order, as the body of an op gets them."""
        names = (f.name for f in fields(cls))
        return cls(**dict(zip(names, args, strict=False)), options=options)

    @classmethod
    def of_node(cls, node: Node) -> Call:
        """The call that a node of a graph makes."""
        assert isinstance(node.target, Op)
        return cls.of(node.target, node.args, node.kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        """What every op takes by position."""
        return self.query, self.key, self.value, self.padding, self.seed, self.scale, self.layer

    @property
    def keywords(self) -> dict[str, Any]:
        """What the op takes by name."""
        given = {name: x for name in ("lengths", "sinks") if (x := getattr(self, name)) is not None}
        return {**given, **self.options}

    @property
    def Lq(self) -> Any:
        """The number of queries."""
        return self.query.shape[2]

    @property
    def Lk(self) -> Any:
        """The number of keys."""
        return self.key.shape[2]

    def spec(self, mask: Mask) -> AttentionSpec:
        """What a site with this mask computes in a call of tensors."""
        (B, H, Lq, D), (H_kv, Lk), Dv = self.query.shape, self.key.shape[1:3], self.value.shape[3]
        return AttentionSpec(B, H, H_kv, Lq, Lk, D, Dv, self.query.dtype, self.query.device.type, self.scale, mask)

    @property
    def can_be_exact(self) -> bool:
        """Whether the op has a ``min_length`` that makes it exact."""
        return "min_length" in self.options

    def exactly(self) -> Call:
        """The same call of exact attention, for an op that :attr:`can_be_exact`."""
        return replace(self, options={**self.options, "min_length": self.Lk + 1})

    def run(self, op: Op) -> Any:
        """What the op returns."""
        return op(*self.args, **self.keywords)


@functools.cache
def _names(op: Op) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


Runner = Callable[[Op, Call], Any]
"""Takes an op and its arguments; returns what the op would."""

_runner: ContextVar[Runner | None] = ContextVar("express_compile_runner", default=None)


def call(op: Op, given: Call) -> Any:
    """What the op returns, or what the runner in force makes of it."""
    runner = _runner.get()
    return given.run(op) if runner is None else runner(op, given)


def is_run_otherwise() -> bool:
    """Whether a runner is in force."""
    return _runner.get() is not None


@contextmanager
def run_by(runner: Runner) -> Iterator[None]:
    """While active, ``runner`` answers every :func:`call` of this thread."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def name_of(op: Op) -> str:
    """The method of an op of ours."""
    return op._schema.name.removeprefix("express_compile::")


def wrap_ops(gm: GraphModule, wrap: Callable[[Op, int], Callable[..., Any]]) -> None:
    """Let ``wrap(op, layer)`` be called in place of every op of a method in a graph that runs as it is.

    The linear layer that takes what such an op gives tells the runner in force, if that has a method ``see_linear``,
    which takes its input and its weight.
    """
    for part in [part for part in gm.modules() if isinstance(part, GraphModule)]:
        found = [node for node in part.graph.nodes if isinstance(node.target, Op) and name_of(node.target) in METHODS]
        for node in found:
            node.target = wrap(node.target, Call.of_node(node).layer)
            if (linear := _linear_behind(node)) is not None:
                linear.target = _telling(linear.target)
        if found:
            part.recompile()


_MOVES = {"getitem", "transpose", "permute", "contiguous", "reshape", "view", "flatten", "to"}


def _linear_behind(node: Node) -> Node | None:
    """The linear layer that alone takes the first result of an op, however it is laid out in between."""
    while len(users := [x for x in node.users if x.args[1:2] != (1,) or _word(x) != "getitem"]) == 1:
        (node,) = users
        if node.target is torch.nn.functional.linear:
            return node
        if _word(node) not in _MOVES:
            return None
    return None


def _word(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _telling(linear: Any) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if (see := getattr(_runner.get(), "see_linear", None)) is not None:
            see(x, weight)
        out: torch.Tensor = linear(x, weight, bias)
        return out

    return run


def plainly(op: Op, layer: int) -> Callable[..., Any]:
    """For :func:`wrap_ops`: :func:`call`."""

    def run(*args: Any, **options: Any) -> Any:
        return call(op, Call.of(op, args, options))

    return run
