"""Calls of the ops of rewritten attention that Python makes: the one place where such a call can be run otherwise.

What ``rewrite_attention`` changed and what :func:`explain` runs come by here. What a compiler
made of a graph calls the ops itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule

from .method import METHODS

Op = torch._ops.OpOverload
Runner = Callable[[Op, tuple[Any, ...], Mapping[str, Any]], Any]
"""Takes an op, its arguments and its options (``Method.params``); returns what the op would."""

_runner: ContextVar[Runner | None] = ContextVar("express_compile_runner", default=None)


def call(op: Op, *args: Any, **options: Any) -> Any:
    """``op(*args, **options)``, or what the runner in force makes of it."""
    runner = _runner.get()
    return op(*args, **options) if runner is None else runner(op, args, options)


def exact_options(args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which an op that has ``min_length`` is exact attention of the same arguments."""
    return {**options, "min_length": args[1].shape[2] + 1}


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
    """Let ``wrap(op, layer)`` be called in place of every op of a method in a graph that runs as it is."""
    for part in [part for part in gm.modules() if isinstance(part, GraphModule)]:
        found = [node for node in part.graph.nodes if isinstance(node.target, Op) and name_of(node.target) in METHODS]
        for node in found:
            node.target = wrap(node.target, node.args[6])
        if found:
            part.recompile()


def plainly(op: Op, layer: int) -> Callable[..., Any]:
    """For :func:`wrap_ops`: :func:`call`."""

    def run(*args: Any, **options: Any) -> Any:
        return call(op, *args, **options)

    return run
