"""What became of every attention site of a model, and why."""

from __future__ import annotations

import io
import json
from collections import Counter
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .spec import Mask, Plan, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch.fx import GraphModule


@dataclass(frozen=True)
class SiteReport:
    """One attention site, in words.

    module: path from the root of the model, ``""`` for the root itself.
    source: ``file:line`` of the call, ``""`` if unknown.
    form: how attention is written there (``"sdpa"``, ``"softmax"``, ...); ``"not captured"`` for a call of a rewritten
        module of which Dynamo made no graph.
    mask: what is proven about its mask, ``""`` where that was not looked at.
    method: what runs there; ``"exact"`` is the model's own attention.
    verdict: ``"rewritten"``, ``"exact"`` (we chose exact) or ``"refused"`` (exact for want of a proof).
    reason: why, in one sentence.
    rejected: ``"method: reason"`` for every method that was considered and not used; given as strings or as
        :class:`~express_compile.spec.Refusal`.
    """

    module: str
    source: str
    form: str
    mask: str
    method: str
    verdict: str
    reason: str
    rejected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rejected", tuple(map(str, self.rejected)))

    @classmethod
    def from_plan(cls, module: str, source: str, form: str, mask: Mask | None, plan: Plan) -> SiteReport:
        """The report of a site for which ``plan`` was made; ``mask`` is None where the site was refused unseen."""
        return cls(
            module=module,
            source=source,
            form=form,
            mask="" if mask is None else str(mask),
            method=plan.method,
            verdict=plan.verdict,
            reason=plan.reason,
            rejected=plan.rejected,
        )


recorder: ContextVar[list[SiteReport] | None] = ContextVar("express_compile_sites", default=None)
"""Where rewritten models put their reports while ``record_sites`` is active."""


@dataclass(frozen=True)
class Report:
    """Every attention site found in one run of a model. ``print(report)`` shows a table.

    sites: in order of execution.
    graphs: number of graphs Dynamo cut the model into; 0 for a model that ``rewrite_attention`` changed.
    """

    sites: tuple[SiteReport, ...]
    graphs: int = 0

    def to_json(self) -> str:
        """The report as a JSON object with the keys ``graphs``, ``totals`` and ``sites``."""
        return json.dumps(
            {"graphs": self.graphs, "totals": self._totals(), "sites": [asdict(site) for site in self.sites]}, indent=2
        )

    def _totals(self) -> dict[str, int]:
        counts = Counter(site.verdict for site in self.sites)
        return {verdict: counts[verdict] for verdict in ("rewritten", "exact", "refused")}

    def __str__(self) -> str:
        if not self.sites:
            return "no attention site was found"
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        columns = ("module", "source", "form", "mask", "method", "verdict", "reason")
        rows = [
            [site.module or "(root)", _short(site.source) or "-", site.form, site.mask or "-"]
            + [site.method, site.verdict, site.reason]
            for site in self.sites
        ]
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        lengths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        # as wide as its longest row: a terminal wraps lines, but a cut reason is lost
        console = Console(file=io.StringIO(), width=sum(lengths) + 4 * len(columns), color_system=None)
        console.print(table)
        totals = ", ".join(f"{count} {verdict}" for verdict, count in self._totals().items())
        plural = "site" if len(self.sites) == 1 else "sites"
        return f"{console.file.getvalue()}{len(self.sites)} attention {plural}: {totals}"


def _short(source: str) -> str:
    """The last two parts of a path; the JSON has all of it."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


def explain(
    model: Any, *example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None, **policy_fields: Any
) -> Report:
    """Run ``model`` once and report what ``backend="express"`` would do at every attention site, and why.

    ``model`` is a module or a function; it is called with ``example_inputs`` and ``example_kwargs`` without
    gradients, and nothing of it is changed. ``policy_fields`` are the fields of
    :class:`~express_compile.spec.Policy`. For a model that ``rewrite_attention`` changed, the report tells
    what was done in this run, and ``policy_fields`` must be empty. Raises ``TypeError`` or ``ValueError`` for a
    bad field, and ``RuntimeError`` if Dynamo captured no graph at all.
    """
    import torch

    from .eager import is_rewritten, record_sites

    kwargs = dict(example_kwargs or {})
    if not callable(model):
        raise TypeError(f"model={model!r}: must be a torch.nn.Module or a function")
    if isinstance(model, torch.nn.Module) and is_rewritten(model):
        if policy_fields:
            raise ValueError(
                f"{', '.join(policy_fields)}: the model was changed by rewrite_attention, whose options are reported; "
                "allowed are no options, or restore_attention(model) before explain"
            )
        with torch.no_grad(), record_sites() as sites:
            model(*example_inputs, **kwargs)
        return Report(tuple(sites))
    return _dry_run(model, example_inputs, kwargs, Policy.from_options(policy_fields))


def _dry_run(model: Any, example_inputs: tuple[Any, ...], kwargs: dict[str, Any], policy: Policy) -> Report:
    import torch

    from .method import METHODS
    from .passes.buffers import Buffers
    from .passes.match import find_sites
    from .passes.plan import check_policy, plan_sites

    METHODS.load()
    check_policy(policy)
    found: list[SiteReport] = []
    graphs: list[GraphModule] = []

    def record(gm: GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        for site, plan in plan_sites(find_sites(gm, Buffers(gm, inputs)), policy):
            mask = None if site.spec is None else site.spec.mask
            found.append(SiteReport.from_plan(site.module, site.source, site.form, mask, plan))
        return gm.forward

    # a model that was compiled often has used up Dynamo's limit for its code, which would then run uncaptured
    unlimited = torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16)
    with torch.no_grad(), unlimited:
        torch.compile(_uncompiled(model), backend=record)(*example_inputs, **kwargs)
    if not graphs:
        raise RuntimeError(
            "Dynamo captured no graph of the model, so there is nothing to explain: "
            "is compilation disabled (TORCHDYNAMO_DISABLE, torch.compiler.set_stance, torch.compiler.disable), or did "
            "earlier compilations use up torch's limit for this code (torch.compiler.reset() clears it)?"
        )
    return Report(tuple(found), len(graphs))


def _uncompiled(model: Any) -> Any:
    from torch._dynamo import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else model
