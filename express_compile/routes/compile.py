"""The ``torch.compile`` backend: match, plan, rewrite, then hand the graph to inductor.

``torch.compile(model, backend="express", options={...})`` finds :func:`express` through the entry point group
``torch_dynamo_backends``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from ..core.method import METHODS
from ..core.policy import Policy
from ..passes.pipeline import plan_graph
from ..planning.choose import check_policy
from .inductor import SKIPPED, compile_with_inductor, skipped_graphs

# importing this module is the last step before tracing, and ops cannot be registered during it
METHODS.load()


def express(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Rewrite the attention sites of ``gm`` and compile it with inductor.

    ``options`` holds the fields of :class:`Policy`; every other key must be one of inductor's
    options and is passed on. ``mode`` is inductor's. Raises ``ValueError`` or ``TypeError`` that names the option,
    its value and what is allowed. Dynamo shows such an error wrapped in ``BackendCompilerFailed``.

    Graph breaks part a model into many graphs, of which some have no attention, so ``strict=True`` judges each thing as
    early as it can be known: a site that is refused at once; a name in ``modules`` or ``plan`` that no module of the
    model has with its first graph; that a model has no attention, or such a name no site, when the last graph of the
    compiled module or function is made (one that does not end in a graph is not judged so).
    """
    if kwargs:
        raise TypeError(
            f"unknown argument {', '.join(map(repr, sorted(kwargs)))} of the backend 'express': "
            "allowed are options and mode"
        )
    policy, patches = split_options(options or {}, mode)
    planned = plan_graph(gm, example_inputs, policy, graphs=bool(patches.get("triton.cudagraphs")))
    planned.judge()
    planned.pin()
    before = skipped_graphs()
    run = planned.rewritten(partial(compile_with_inductor, inputs=example_inputs, patches=patches), written_out=True)
    if policy.cuda_graphs:
        on_cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)
        if not on_cuda or skipped_graphs() > before:
            why = SKIPPED if on_cuda else "it has no tensors on cuda"
            warnings.warn(f"cuda_graphs=True, but a graph is compiled without: {why}", RuntimeWarning, stacklevel=2)
    return run


def split_options(options: Mapping[str, Any], mode: str | None = None) -> tuple[Policy, dict[str, Any]]:
    """Our options as a checked :class:`Policy`, and inductor's as config patches (those of ``mode`` included)."""
    ours = Policy.option_names()
    inductor = set(torch._inductor.list_options())
    own: dict[str, Any] = {}
    patches: dict[str, Any] = {}
    if mode is not None:
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, modes))}")
        patches.update(modes[mode])
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name in ours:
            own[name] = value
        elif name in inductor:
            patches[name] = value
        else:
            raise TypeError(
                f"options: unknown option {key!r}; allowed are {', '.join(ours)}, "
                "and the options of inductor (torch._inductor.list_options() shows them)"
            )
    policy = Policy.from_options(own)
    check_policy(policy)
    if policy.cuda_graphs:
        if patches.setdefault("triton.cudagraphs", True) is not True:
            raise ValueError(
                f"triton.cudagraphs={patches['triton.cudagraphs']!r}: must be True beside cuda_graphs=True"
            )
    return policy, patches
