"""What masks are made from and holds still: its values are looked at when compiling, and guarded when running.

nanoGPT, GPT-Neo and many others register ``tril(ones(n, n))`` once and slice it. To the prover such a buffer is a
tensor of unknown values. Dynamo hands its memory to the backend, so that it can be compared with a triangle, a band or
one number (the ``masked_bias`` of GPT-Neo): :meth:`Buffers.value`. What was relied on must stay as it is: at every call
:meth:`Buffers.guard` looks whether it did, and otherwise runs the graph as it was.

On the CPU the values are compared, however they may have been written; another tensor in the buffer's place may hold
the same ones. That takes 0.1 ms for 1,024 x 1,024 booleans, where attention itself takes some 70 ms. Of a buffer of
more than 4 million elements every n-th row is compared, and it has to be the same tensor at the same address, not
written by torch since: single elements written through ``.data``, numpy or the storage escape there. On an accelerator
reading values would make the host wait; there whatever leaves tensor, address and version as they are escapes.

An input that is subtracted from 1 and multiplied by a large number hides keys if it holds 0 and 1, as what tokenizers
call attention_mask does, and does something else for a 2. Where it holds nothing else when compiling
(:meth:`Buffers.is_flag`), a method that is not exact may rely on it; then every call looks whether it still does, which
on an accelerator makes the host wait, unless it is the tensor of the last call.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from .nodes import dynamo_source

_MAX_ELEMENTS = 1 << 26  # 8,192 x 8,192; larger ones are not looked at
_COMPARED = 1 << 22  # elements of a buffer or of flags that are compared at every call


class Buffers:
    """The buffers among the placeholders of ``gm``, which Dynamo called with ``inputs``, and what else holds 0 and 1
    only; none without ``inputs``.

    used: those whose values a proof has relied on.
    """

    def __init__(self, gm: GraphModule | None = None, inputs: Sequence[Any] = ()) -> None:
        placeholders = [] if gm is None else [node for node in gm.graph.nodes if node.op == "placeholder"]
        pairs = enumerate(zip(placeholders, inputs, strict=True)) if inputs else ()
        self.places = {node: i for i, (node, value) in pairs if is_readable(value)}
        self.tensors, self.others = (
            {node: inputs[i] for node, i in self.places.items() if _is_buffer(node) == buffers}
            for buffers in (True, False)
        )
        self.bands: dict[Node, tuple[Any, ...] | None] = {}
        self.seen: dict[Node, _Seen] = {}
        self.copies: dict[Any, torch.Tensor] = {}  # of a pattern, whichever layers have it
        self.used: set[Node] = set()
        self.flags: dict[Node, bool] = {}

    def value(self, node: Node, coords: Sequence[Any]) -> tuple[Any, Any, Any] | None:
        """The element at ``coords`` as ``(condition, then, other)``; None for another placeholder or pattern.

        ``condition`` is a sympy boolean of the last two coordinates; ``then`` and ``other`` are Python numbers.
        """
        if node not in self.tensors or self.tensors[node].is_inference():  # which do not count what is written
            return None
        band = self.band(node)
        if band is not None and node not in self.seen:
            tensor = self.tensors[node]
            pattern = (band, tensor.dtype, tensor.shape, tensor.device)
            if tensor.device.type == "cpu" and pattern not in self.copies:
                self.copies[pattern] = _sample(tensor).clone()
            self.seen[node] = _Seen(tensor, tensor._version, tensor.data_ptr(), self.copies.get(pattern))
        if band is None:
            return None
        self.used.add(node)
        low, high, inside, outside = band
        row, column = coords[-2:] if len(coords) > 1 else (None, None)
        conditions = [] if high is None else [sympy.Le(column, row + high)]
        conditions += [] if low is None else [sympy.Ge(column, row + low)]
        return sympy.And(*conditions), inside, outside

    def band(self, node: Node) -> tuple[Any, ...] | None:
        """What :func:`_band` says of a placeholder, a buffer or not; None where its values cannot be looked at."""
        if node not in self.bands:
            tensor = self.tensors.get(node, self.others.get(node))
            self.bands[node] = None if tensor is None else _band(tensor)
        return self.bands[node]

    def is_given_band(self, node: Node) -> bool:
        """Whether a placeholder that is no buffer holds a triangle or a band now."""
        return node in self.others and (self.band(node) or (None, None))[:2] != (None, None)

    def is_flag(self, node: Node) -> bool:
        """Whether a placeholder that is no buffer holds 0 and 1 only."""
        if node not in self.flags:
            self.flags[node] = node in self.others and _are_flags(self.others[node])
        return self.flags[node]

    def hides(self, node: Node, lowest: float) -> bool:
        """Whether a placeholder holds ``lowest``, less or NaN now; True also where its values cannot be looked at."""
        tensor = self.tensors.get(node, self.others.get(node))
        return tensor is None or tensor.numel() > _COMPARED or not bool((tensor > lowest).all())

    def guard(
        self, compiled: Callable[..., Any], unchanged: Callable[..., Any], flags: Iterable[Node] = ()
    ) -> Callable[..., Any]:
        """``compiled`` for calls where the buffers in :attr:`used` are what they were and ``flags`` hold 0 and 1 only;
        ``unchanged`` for others.

        Says so once, by a ``RuntimeWarning``.
        """
        flags = list(flags)
        watched: list[tuple[int, Any]] = [(self.places[node], self.seen[node]) for node in self.used]
        watched += [(self.places[node], _Flags()) for node in flags]
        names = ", ".join(sorted(node.name for node in (*self.used, *flags)))
        said = False

        def run(*args: Any) -> Any:
            nonlocal said
            if all(seen.is_still(args[i]) for i, seen in watched):
                return compiled(*args)
            if not said:
                said = True
                why = "a mask kept in a buffer changed after it was compiled" if self.used else (
                    "a padding that held 0 and 1 when it was compiled holds other values, or a CUDA graph records it"
                )  # fmt: skip
                warnings.warn(
                    f"{why} ({names}): its attention runs exactly and "
                    "uncompiled; torch.compiler.reset() has it compiled anew",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return unchanged(*args)

        return run


@dataclass(frozen=True)
class _Seen:
    """A buffer as it was when its values were looked at; ``values`` are those, None where they are not compared."""

    tensor: torch.Tensor
    version: int
    address: int
    values: torch.Tensor | None

    def is_still(self, now: Any) -> bool:
        """Whether ``now``, which a call brings in its place, holds what was looked at."""
        same = now is self.tensor and now._version == self.version and now.data_ptr() == self.address
        if self.values is None:
            return same
        if not same and (now.numel() > _COMPARED or (now.shape, now.dtype) != (self.tensor.shape, self.tensor.dtype)):
            return False
        return now.device.type == "cpu" and _identical(_sample(now), self.values)


class _Flags:
    """Whether an input holds 0 and 1 only; remembers the last tensor that did."""

    def __init__(self) -> None:
        self.last: Callable[[], torch.Tensor | None] = lambda: None
        self.version = 0

    def is_still(self, now: Any) -> bool:
        """Whether that is so of ``now``, which a call brings."""
        if not is_readable(now):
            return False
        if now.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be read back, and replays bring other values
        if now.device.type != "cpu" and not now.is_inference():
            last = self.last()
            if last is not None and last is now and last._version == self.version:
                return True
        if not _are_flags(now):
            return False
        if not now.is_inference():
            self.last, self.version = weakref.ref(now), now._version
        return True


def _are_flags(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= _COMPARED and bool(((tensor == 0) | (tensor == 1)).all())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """As many rows of a matrix as may be compared."""
    matrix = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    return matrix[:: -(-matrix.numel() // _COMPARED)]


def _identical(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two matrices hold the same; by words of 8 bytes where they lie so, which is up to ten times as fast."""
    if x.is_contiguous() and y.is_contiguous():
        bytes_ = x.numel() * x.element_size()
        if bytes_ % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0:
            x, y = (z.reshape(-1).view(torch.int64) for z in (x, y))
    return torch.equal(x, y)


def _is_buffer(node: Node) -> bool:
    source = dynamo_source(node)
    while source is not None:
        if getattr(source, "member", None) == "_buffers":
            return True
        source = getattr(source, "base", None)
    return False


def is_readable(value: Any) -> bool:
    """Whether the values of a buffer may be looked at."""
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_meta:
        return False
    return 0 < value.numel() <= _MAX_ELEMENTS and not value.is_complex()


def _band(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """``(low, high, inside, outside)`` of a matrix that is ``inside`` where ``low <= column - row <= high`` and
    ``outside`` elsewhere; a bound that no element tests is None, as both are where all elements are the same. None for
    any other tensor."""
    first = tensor.detach().reshape(-1)[0]
    if bool((tensor == first).all()):
        return None, None, first.item(), first.item()
    if tensor.dim() < 2 or any(size != 1 for size in tensor.shape[:-2]):
        return None
    matrix = tensor.detach().reshape(tensor.shape[-2:])
    values = (first := matrix[0, 0]), matrix.reshape(-1)[(matrix != first).reshape(-1).byte().argmax()]
    if values[0] == values[1] or not torch.all((matrix == values[0]) | (matrix == values[1])):
        return None  # NaN is no value either: it equals nothing
    rows, columns = (torch.arange(size, dtype=torch.int32, device=matrix.device) for size in matrix.shape)
    distance = columns - rows[:, None]
    for inside, outside in (values, values[::-1]):
        chosen = matrix == inside
        low, high = map(int, distance[chosen].aminmax())
        if torch.equal(chosen, (distance >= low) & (distance <= high)):
            ends = map(int, distance.aminmax())
            bounds = (None if bound == end else bound for bound, end in zip((low, high), ends, strict=True))
            return *bounds, inside.item(), outside.item()
    return None
