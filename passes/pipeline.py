"""Match, plan, rewrite: what becomes of a graph of Dynamo, spelled once for every way into a model.

:func:`plan_graph` finds the attention sites of a graph and decides what happens at each; what it returns says so
(:meth:`PlannedGraph.reports`) and does it (:meth:`PlannedGraph.rewritten`). The backend compiles what comes out, a
captured module runs it as it is, and ``explain`` reads it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..core.plan import Plan
from ..core.policy import Policy
from ..core.shards import is_dtensor, shard_of
from ..core.sites import SiteReport
from ..planning.choose import Question, answer, check_policy, require, require_modules, require_sites
from .buffers import Buffers
from .match import find_sites
from .nodes import tensor_of
from .place import Place
from .rewrite import changes, rewrite
from .site import AttentionSite

Run = Callable[..., Any]
Finish = Callable[[GraphModule], Run]


@dataclass(frozen=True)
class PlannedGraph:
    """A graph of Dynamo that is still as it was, and what was decided for each of its attention sites.

    place: where it lies in the model. buffers: those on whose values a proof has relied are in ``buffers.used``.
    """

    gm: GraphModule
    policy: Policy
    place: Place
    buffers: Buffers
    sites: list[tuple[AttentionSite, Plan]]

    def reports(self, otherwise: Plan | None = None) -> list[SiteReport]:
        """What becomes of every site; with ``otherwise`` that instead of being rewritten."""
        return [
            SiteReport.from_plan(
                *(site.module, site.source, site.form),
                plan if otherwise is None or plan.verdict != "rewritten" else otherwise,
                spec=site.spec,
                index=site.index,
            )
            for site, plan in self.sites
        ]

    def judge(self) -> None:
        """Raise ``ValueError`` for what ``policy.strict`` asks of a whole model, as far as this graph shows it.

        Graph breaks part a model into many graphs, of which some have no attention: whether there is any is known with
        the last one, and whether names in the policy are those of modules with each.
        """
        place, policy = self.place, self.policy
        if any(site.refusal == place.lost for site, _ in self.sites) and (policy.modules or policy.plan is not None):
            warnings.warn(f"modules and plan cannot say what runs there: {place.lost}", RuntimeWarning, stacklevel=3)
        if place.ends(self.gm):
            require_sites(place.numbers.paths, policy)
        elif place.is_model:
            require_modules({*place.paths.values(), *place.numbers.paths}, policy)

    def pin(self, told: bool = False) -> None:
        """Let the graph serve only the module it was captured in, if what it does depends on that, by the policy or
        by random numbers, or what is ``told`` of it."""
        chosen = bool(self.policy.modules) or self.policy.plan is not None
        if self.sites and (told or chosen or any(plan.method != "exact" for _, plan in self.sites)):
            self.place.pin()

    def rewritten(self, finish: Finish, before: Finish = lambda gm: gm, written_out: bool = False) -> Run:
        """Rewrite the graph in place; what ``finish`` makes of it.

        Where that relies on the values of buffers or paddings, a call looks at them, and runs what ``before`` made of
        the graph as it was where they have changed. ``written_out``: as in
        :func:`~express_compile.passes.rewrite.rewrite`.
        """
        unchanged = None
        flags = {
            node for site, plan in self.sites if site.padding and plan.method != "exact" for node in site.padding.flags
        }
        if flags or (self.buffers.used and any(changes(site, plan, written_out) for site, plan in self.sites)):
            unchanged = copy.deepcopy(self.gm, {id(x): x for x in (*self.gm.parameters(), *self.gm.buffers())})
        rewrite(self.gm, self.sites, self.policy, written_out)
        run = finish(self.gm)
        return run if unchanged is None else self.buffers.guard(run, before(unchanged), flags)


def plan_graph(
    gm: GraphModule, inputs: Sequence[Any], policy: Policy, place: Place | None = None, graphs: bool | None = None
) -> PlannedGraph:
    """Every attention site of a graph with its plan.

    inputs: what Dynamo called the backend with; without them no mask is proven by the values of a buffer.
    place: by default that of the graph that Dynamo compiles just now. graphs: whether it runs inside a CUDA graph, by
        default as the policy asks.

    Raises ``ValueError`` if ``policy.strict`` and a site was refused.
    """
    buffers, place = Buffers(gm, inputs), Place.of_graph() if place is None else place
    sites = [_with_shard(site, place) for site in find_sites(gm, buffers, place)]
    graphs = policy.cuda_graphs if graphs is None else graphs
    return PlannedGraph(gm, policy, place, buffers, plan_sites(sites, policy, graphs))


def _with_shard(site: AttentionSite, place: Place) -> AttentionSite:
    """The site, whose spec says which heads of the layer it has."""
    if site.spec is None or is_dtensor(tensor_of(site.node)):  # DTensors say it themselves: rewrite()
        return site
    shard = shard_of(place.module(site.module), site.spec.H, site.spec.H_kv, site.spec.D)
    return site if shard is None else replace(site, spec=replace(site.spec, shard=shard))


def rewrite_graph(gm: GraphModule, policy: Policy, inputs: Sequence[Any] = ()) -> list[tuple[AttentionSite, Plan]]:
    """Match, plan and rewrite a graph in place; returns every site with its plan.

    Nothing looks at the buffers whose values were relied on, of which there are none without ``inputs``. Raises
    ``ValueError`` if ``policy.strict`` and a site was refused or the graph has none.
    """
    planned = plan_graph(gm, inputs, policy)
    planned.judge()
    planned.pin()
    rewrite(gm, planned.sites, policy)
    return planned.sites


def plan_sites(
    sites: Iterable[AttentionSite], policy: Policy, graphs: bool = False
) -> list[tuple[AttentionSite, Plan]]:
    """A plan for every site; with ``policy.strict`` one ``ValueError`` lists all that were refused.

    ``graphs``: they run inside a CUDA graph.
    """
    check_policy(policy)
    planned = [(site, _with_averages(site, answer(_question(site, graphs), policy))) for site in sites]
    require([(site.module or "(root)", decision) for site, decision in planned], policy)
    return planned


def _with_averages(site: AttentionSite, decision: Plan) -> Plan:
    """The decision, which says what it changes beyond an approximation."""
    kept = not site.averages or (decision.method == "exact" and site.exact is not None)
    if decision.verdict != "rewritten" or kept:
        return decision
    reason = f"{decision.reason}; rows whose keys are all hidden give 0, where the model has the mean of the values"
    return replace(decision, reason=reason)


def _question(site: AttentionSite, graphs: bool) -> Question:
    gradient = "its result needs a gradient" if _needs_gradient(site.node) else None
    return Question(site.module, site.index, site.form, site.spec, site.refusal, gradient, graphs, site.nearest)


def _needs_gradient(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("example_value"))
    return any(x.requires_grad for x in values if isinstance(x, torch.Tensor))
