"""Nodes of a graph as places: what tensor stands there, what can be reached from it, whose memory it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from ..core.shards import is_dtensor
from ..core.spec import known_equal


def tensor_of(arg: Any) -> torch.Tensor | None:
    """The fake tensor that an argument stands for; None for what is no node, or no tensor."""
    example = arg.meta.get("example_value") if isinstance(arg, Node) else None
    return example if isinstance(example, torch.Tensor) else None


def shape_of(node: Node) -> torch.Size:
    """The shape of the tensor a node stands for."""
    shape: torch.Size = node.meta["example_value"].shape
    return shape


def local_of(example: Any) -> torch.Tensor:
    """The part that this process has of a DTensor; any other tensor as it is."""
    local: torch.Tensor = example._local_tensor if is_dtensor(example) else example
    return local


def fake_mode_of(example: torch.Tensor) -> Any:
    """The mode that the tensor a node stands for was made in. Raises ``ValueError`` for a tensor with values."""
    fake = local_of(example)
    if not isinstance(fake, FakeTensor):
        raise ValueError(f"example_value: a {type(fake).__name__}; must be a FakeTensor")
    return fake.fake_mode


def is_parted(example: torch.Tensor) -> bool:
    """Whether a tensor is nested or sparse: its elements are not where its sizes say."""
    return example.layout != torch.strided or example.is_nested


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of sizes are equal for every input."""
    return len(a) == len(b) and all(map(known_equal, a, b))


def reached(start: Any, further: Callable[[Node], Iterable[Any]]) -> Iterator[Node]:
    """``start`` and the nodes that ``further`` leads to from it, each once, the nearest first."""
    nodes = [start] if isinstance(start, Node) else []
    seen = set(nodes)
    for node in nodes:  # which grow
        yield node
        fresh = [x for x in dict.fromkeys(further(node)) if isinstance(x, Node) and x not in seen]
        seen.update(fresh)
        nodes.extend(fresh)


def sources(node: Node) -> list[Node]:
    """The nodes that a node reads."""
    return node.all_input_nodes


def dynamo_source(node: Node) -> Any:
    """Where Dynamo has an input of the graph from; None if that is not known."""
    return getattr(node.meta.get("grapharg"), "source", None)


def shares_memory(a: Node, b: Node) -> bool:
    """Whether two nodes are tensors, or views of one, in the same memory."""
    return a is b or (_storage(a) is not None and _storage(a) == _storage(b))


def may_share_memory(a: Node, b: Node) -> bool:
    """Whether it is not known that two nodes have nothing in the same memory; numbers have none."""
    if any(node.meta.get("example_value") is not None and tensor_of(node) is None for node in (a, b)):
        return False
    return shares_memory(a, b) or _storage(a) is None or _storage(b) is None


def _storage(node: Node) -> int | None:
    example = tensor_of(node)
    if example is None:
        return None
    try:
        return int(example.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and some wrapper tensors have none
        return None
