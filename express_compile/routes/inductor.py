"""Hand a rewritten graph to inductor so that it computes what the graph says.

Inductor looks for written-out attention itself (``torch/_inductor/fx_passes/fuse_attention.py``). Its patterns were
traced before and are matched without their numbers: a softmax over another dimension or keys permuted in another way
look the same to them, and come out wrong or not at all. Every softmax that this package understands is a
``scaled_dot_product_attention`` by now; from all others :class:`_KeepOff` keeps the patterns off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from ..kernels.op import contract
from ..passes.normalize import computes_gradients

SKIPPED = "PyTorch does not record it (TORCH_LOGS='cudagraphs,perf_hints' shows why)"

_aten = torch.ops.aten


def compile_with_inductor(gm: GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """``gm`` compiled by inductor under ``patches`` of its configuration; no global state is changed."""
    pre_pass = _KeepOff(patches.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass))
    tag = f"{torch.compiler.config.cache_key_tag}express-compile-{contract()}"
    key: Any = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with key, _without_rematerialization(gm):
        compiled = compile_fx.compile_fx(gm, inputs, config_patches={**patches, "joint_custom_pre_pass": pre_pass})
    assert callable(compiled), "it is asked for no file"
    return compiled


def skipped_graphs() -> int:
    """How often inductor ran something without the CUDA graphs that it was told to make."""
    return int(counters["inductor"]["cudagraph_skips"])


class _KeepOff(CustomGraphPass):
    """Put ``max(x, 0)`` behind every softmax: the same bits at no cost (it is fused), and no pattern of attention.

    It runs on the graph of forward and backward, where a softmax is a quotient of an exponential and its sum, and after
    the passes that the user has put in its place (``others``).
    """

    def __init__(self, others: Any) -> None:
        self.others = tuple(others) if isinstance(others, list | tuple) else () if others is None else (others,)

    def __call__(self, graph: Graph) -> None:
        for other in self.others:
            other(graph)
        for node in list(graph.nodes):
            if _is_softmax(node):
                with graph.inserting_after(node):
                    kept = graph.call_function(_aten.clamp_min.default, (node, 0))
                kept.meta.update(node.meta)
                node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)

    def uuid(self) -> Any:
        """What inductor's cache tells programs apart by; None, which is no caching, if another pass has none."""
        others = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        return None if None in others else ("express-compile-keep-off-1", *others)


def _is_softmax(node: Node) -> bool:
    if node.target in (_aten._softmax.default, _aten._safe_softmax.default):
        return True
    if node.target is not _aten.div.Tensor:
        return False
    exponential, total = node.args
    return isinstance(total, Node) and total.target is _aten.sum.dim_IntList and total.args[0] is exponential


def _without_rematerialization(gm: GraphModule) -> AbstractContextManager[Any]:
    """Without torch's pass for gradients that are computed in the graph itself, where none are.

    It has nothing to do there, but refuses a checkpointed region that draws random numbers, for which it takes every
    ``scaled_dot_product_attention`` (torch 2.13).
    """
    config = torch._functorch.config
    if not hasattr(config, "remat_using_tags_for_fwd_loss_bwd_graph") or computes_gradients(gm):
        return nullcontext()
    return config.patch(remat_using_tags_for_fwd_loss_bwd_graph=False)
