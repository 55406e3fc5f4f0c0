"""The ``torch.compile`` backend: match, plan, rewrite, then hand the graph to inductor.

``torch.compile(model, backend="express", options={...})`` finds :func:`express` through the entry point group
``torch_dynamo_backends``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from ..core.method import METHODS
from ..core.plan import Plan
from ..core.policy import Policy
from ..passes.buffers import Buffers
from ..passes.match import find_sites
from ..passes.place import Place
from ..passes.rewrite import changes, rewrite
from ..passes.site import AttentionSite
from ..planning.choose import check_policy, plan_sites, require_modules, require_sites

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
    buffers = Buffers(gm, example_inputs)
    planned = plan_graph(gm, policy, buffers, graphs=bool(patches.get("triton.cudagraphs")))
    unchanged = rewrite_planned(gm, planned, policy, buffers, written_out=True)
    from .inductor import compile_with_inductor

    compiled = compile_with_inductor(gm, example_inputs, patches)
    return compiled if unchanged is None else buffers.guard(compiled, unchanged)


def rewrite_planned(
    gm: GraphModule,
    planned: list[tuple[AttentionSite, Plan]],
    policy: Policy,
    buffers: Buffers,
    written_out: bool = False,
) -> GraphModule | None:
    """Rewrite a Dynamo graph in place; returns it as it was, for ``buffers.guard``, if the result relies on buffers.

    ``written_out``: as in :func:`rewrite`.
    """
    unchanged = None
    if buffers.used and any(changes(site, decision, written_out) for site, decision in planned):
        unchanged = copy.deepcopy(gm, {id(x): x for x in (*gm.parameters(), *gm.buffers())})
    rewrite(gm, planned, policy, written_out)
    return unchanged


def rewrite_graph(gm: GraphModule, policy: Policy, buffers: Buffers | None = None) -> list[tuple[AttentionSite, Plan]]:
    """Match, plan and rewrite a Dynamo graph in place; returns every site with its plan.

    Who gives ``buffers`` guards those in ``buffers.used``, on whose values the result relies. Raises ``ValueError`` if
    ``policy.strict`` and a site was refused or the graph has none.
    """
    planned = plan_graph(gm, policy, buffers)
    rewrite(gm, planned, policy)
    return planned


def plan_graph(
    gm: GraphModule, policy: Policy, buffers: Buffers | None = None, graphs: bool = False
) -> list[tuple[AttentionSite, Plan]]:
    """Every site of a Dynamo graph with its plan, of one that runs inside a CUDA graph if ``graphs``.

    Raises as :func:`rewrite_graph` does.
    """
    place = Place.of_graph()
    planned = plan_sites(find_sites(gm, buffers, place), policy, graphs)
    if any(site.refusal == place.lost for site, _ in planned) and (policy.modules or policy.plan is not None):
        warnings.warn(f"modules and plan cannot say what runs there: {place.lost}", RuntimeWarning, stacklevel=2)
    if place.ends(gm):
        require_sites(place.numbers.paths, policy)
    elif place.is_model:
        require_modules({*place.paths.values(), *place.numbers.paths}, policy)
    if by_place(planned, policy):
        place.pin()
    return planned


def by_place(planned: list[tuple[AttentionSite, Plan]], policy: Policy) -> bool:
    """Whether what runs at these sites depends on the modules that they are in, by the policy or by random numbers."""
    chosen = bool(policy.modules) or policy.plan is not None
    return bool(planned) and (chosen or any(decision.method != "exact" for _, decision in planned))


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
    return policy, patches
