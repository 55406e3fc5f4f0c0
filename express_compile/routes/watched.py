"""Where a watch meets the calls of a rewritten model: what :func:`~express_compile.watch` must be, and its two hooks.

An op does not know the model that it belongs to (two models of one architecture share their layer keys), so the hooks
are around the ops: in the attention function of a transformers model and in the graphs of captured modules. What a
watch hangs on is an attribute of the model's own objects (``Site.shadow``, ``Capture.watch``), which copies do not take
along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from ..core.call import Call, Op, call
from ..core.method import METHODS
from ..core.plan import Plan
from ..core.sites import SiteReport
from ..core.spec import AttentionSpec, known_equal
from ..passes.site import AttentionSite


class Shadow(Protocol):
    """What samples the error of one site."""

    def follow(self, plan: Plan) -> Plan:
        """Called before a call: ``plan``, or exact attention once the site fell back."""

    def in_force(self, plan: Plan) -> Plan:
        """The same, and nothing is read or said."""

    def sample(self, plan: Plan, spec: AttentionSpec, call: Call, out: torch.Tensor) -> None:
        """Called after it, with ``out`` ``[B, H, Lq, Dv]``, what ``plan`` made of it."""


class Watch(Protocol):
    """What samples the sites of one model."""

    def shadow(self, path: str) -> Shadow:
        """What samples the site of that name."""


class Watchable(Protocol):
    """What a watch hangs on where graphs are captured; ``prefix`` is put before the paths of its sites."""

    watch: Watch | None
    prefix: str


def sampled(shadow: Shadow | None, plan: Plan, spec: AttentionSpec, op: Op, given: Call) -> Any:
    """The call of an op that ``plan`` asks for, which ``shadow`` may compare with exact attention."""
    result = call(op, given)
    if shadow is not None:
        shadow.sample(plan, spec, given, result[0])
    return result


class GraphSite:
    """A rewritten site of a graph. It may be watched unless its method, its offset or its op forbid it."""

    def __init__(
        self,
        owner: Callable[[], Watchable | None],
        module: Callable[[], nn.Module | None],
        site: AttentionSite,
        plan: Plan,
    ) -> None:
        # Dynamo keeps graphs where garbage collection does not look: none may hold its module
        self.owner, self.module, self.plan = owner, module, plan
        self.path, self.number = site.module, f"#{site.index}" if site.index else ""
        assert site.spec is not None, "a site that was rewritten"
        self.spec, mask = site.spec, site.spec.mask
        self.aligned = mask.causal and known_equal(mask.offset, site.spec.Lk - site.spec.Lq)
        is_known = not mask.causal or self.aligned or isinstance(mask.offset, int)
        can_be_exact = "min_length" in plan.params
        self.is_watchable = is_known and can_be_exact and METHODS[plan.method].approximates is not None

    def shadow(self) -> Shadow | None:
        """What samples this site now; None where nothing does, also in training mode."""
        owner, module = self.owner(), self.module()
        if not self.is_watchable or owner is None or owner.watch is None or (module is not None and module.training):
            return None
        return owner.watch.shadow(".".join(filter(None, (owner.prefix, self.path))) + self.number)

    def of_op(self, op: Op) -> Callable[..., Any]:
        """What is called in the graph in place of ``op``."""

        def run(*args: Any, **options: Any) -> Any:
            shadow, given = self.shadow(), Call.of(op, args, options)
            if shadow is None:
                return call(op, given)
            if shadow.follow(self.plan).verdict != "rewritten":
                return call(op, given.exactly())
            mask = self.spec.mask
            mask = replace(mask, offset=given.Lk - given.Lq) if self.aligned else mask
            return sampled(shadow, self.plan, replace(self.spec, Lk=given.Lk, mask=mask), op, given)

        return run

    def now(self, report: SiteReport) -> SiteReport:
        """The report of the site as it is now."""
        shadow = self.shadow()
        plan = self.plan if shadow is None else shadow.in_force(self.plan)
        if plan is self.plan or report.saved is None:
            return report
        saved = replace(report.saved, method="exact", verdict="exact", params={}, facts={}, options={})
        exact = replace(report, method="exact", verdict="exact", reason=plan.reason, params={}, predicted_ms={})
        return replace(exact, rejected=(), saved=saved)
