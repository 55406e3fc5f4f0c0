"""Graphs of captured modules as CUDA graphs, where ``cuda_graphs=True`` asks for it: :class:`Replayed`.

PyTorch records and replays them, by the trees of inductor. Its mode "lite" fuses, decomposes and reorders nothing, so
what is recorded are the launches of the graph as it runs eagerly. Weights are read where they lie, inputs are copied in
and results are copied out, so that no later call writes over them. Random numbers go on from replay to replay:
PyTorch's generator counts on, and a ``seed`` of None is drawn from it inside of the graph.

What no graph can stand for runs as it is, and one warning says why. What looks at values on the host (buffers,
paddings: :mod:`..passes.buffers`) is outside of what is recorded, and looks at every call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .inductor import SKIPPED, compile_with_inductor, skipped_graphs

SIZES = 8  # that differ by symbolic lengths, of one graph
_RECORDS_ON = "cuda"  # a type of device
_SEEN = 1024

Run = Callable[..., Any]


def why_not(gm: GraphModule, inputs: Sequence[Any], training: bool) -> str | None:
    """Why no CUDA graph can stand for a graph of Dynamo that was called with ``inputs``; None where one may.

    training: whether its module is in training mode, where a call may be repeated with its random numbers (reentrant
    checkpoints), and buffers change.
    """
    if training:
        return "the module is in training mode"
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if others := {x.device.type for x in tensors if x.dim()} - {_RECORDS_ON}:
        return f"it has tensors on {', '.join(sorted(others))}"
    if not tensors:
        return "it is given no tensors"
    if others := {type(x).__name__ for x in tensors if type(x) not in (torch.Tensor, nn.Parameter)}:
        return f"it is given a {', '.join(sorted(others))}"
    if any(x.requires_grad for node in gm.graph.nodes if node.op.startswith("call_") for x in _tensors(node)):
        return "gradients flow through it"
    if any(x.is_complex() for x in _tensors(_output(gm))):
        return "a result is complex"
    return None


class Replayed:
    """The calls of a graph of Dynamo, as CUDA graphs from the second one with the same sizes on.

    why: what :func:`why_not` says. run: the graph as it is. is_watched: whether somebody samples its ops
    now, which replays do not come by.
    say: is told why calls run as they are that were to be replayed.
    """

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        why: str | None,
        run: Run,
        is_watched: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._run, self._is_watched, self._say = run, is_watched, say
        self._thread = threading.get_ident()
        self._seen: set[tuple[int, ...]] = set()
        self._kept: set[tuple[int, ...]] = set()
        self._given = _is_given(gm)
        self._on_cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)
        self._why = why
        self._call: Run | None = None
        if self._why is None:
            try:
                self._call = _compiled(gm, inputs)
            except Exception as error:  # the graph still runs as it is
                self._why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def __call__(self, *args: Any) -> Any:
        if (call := self._call_of(args)) is None:
            return self._run(*args)
        skips = skipped_graphs()
        try:
            out = call(*args)
        except Exception as error:
            error.add_note("while a CUDA graph was recorded or replayed, as cuda_graphs=True asks for")
            raise
        if skipped_graphs() > skips:  # PyTorch has run it all the same
            self._call, self._why = None, SKIPPED
        return _copied(out, self._given)

    def _call_of(self, args: Sequence[Any]) -> Run | None:
        """What replays a call with these arguments; None where it has to run as it is."""
        if self._is_watched() or (self._on_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        sizes = tuple(x for x in args if type(x) is int)
        why = self._why
        if why is None and threading.get_ident() != self._thread:
            why = "another thread recorded it"
        if why is None and forward_ad._current_level >= 0:
            why = "it is called inside of torch.autograd.forward_ad"
        if why is None and sizes not in self._kept:
            if sizes not in self._seen:  # tables are made, and sizes that come once cost no recording
                self._seen = {sizes} if len(self._seen) == _SEEN else {*self._seen, sizes}
                return None
            if len(self._kept) == SIZES:
                why = f"there are graphs of {SIZES} other sizes"
            else:
                self._kept.add(sizes)
        if why is not None:
            self._say(why)
            return None
        return self._call


def _compiled(gm: GraphModule, inputs: Sequence[Any]) -> Run:
    """``gm``, which stays as it is, with all that it launches as CUDA graphs. Raises what inductor raises."""
    lite = torch._inductor.list_mode_options()["lite"]
    graphs = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
    own = GraphModule(gm, copy.deepcopy(gm.graph))
    return compile_with_inductor(own, inputs, {**lite, **graphs})


def _output(gm: GraphModule) -> Node:
    return next(node for node in reversed(gm.graph.nodes) if node.op == "output")


def _tensors(node: Node) -> list[torch.Tensor]:
    """The example values of a node, or of what the output of a graph names."""
    named = pytree.tree_leaves(node.args) if node.op == "output" else [node]
    values = [pytree.tree_leaves(x.meta.get("example_value")) for x in named if isinstance(x, Node)]
    return [x for leaves in values for x in leaves if isinstance(x, torch.Tensor)]


def _is_given(gm: GraphModule) -> list[bool]:
    """Of every result, whether it lies in the memory of an argument."""
    given = {x.untyped_storage()._cdata for n in gm.graph.find_nodes(op="placeholder") for x in _tensors(n)}
    results = [_tensors(x) if isinstance(x, Node) else [] for x in pytree.tree_leaves(_output(gm).args)]
    return [any(x.untyped_storage()._cdata in given for x in tensors) for tensors in results]


def _copied(out: Sequence[Any], given: Sequence[bool]) -> tuple[Any, ...]:
    """The results in memory of their own, unless it is that of an argument; what shared some shares the copy."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(x: Any, is_given: bool) -> Any:
        if is_given or not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        if (at := storage.data_ptr()) not in copies:
            copies[at] = storage.clone()
        return x.new_empty(0).set_(copies[at], x.storage_offset(), x.size(), x.stride())

    return tuple(map(copied, out, given))
