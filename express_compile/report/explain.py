"""What became of every attention site of a model, and why."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.plain import canonical
from ..core.plan import Plan, SavedPlan, SavedSite
from ..core.policy import Policy
from ..core.spec import AttentionSpec, layer_key

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

    from ..passes.site import AttentionSite


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
        :class:`Refusal`.
    nearest: what would be rewritten in place of a refused site; ``""`` where that is not known.
    shape: its sizes and dtype, e.g. ``"B=1 H=32/8 Lq=s0 Lk=s0 D=128 bfloat16"`` (heads of the query and of the keys),
        ``""`` where that was not looked at.
    params: the keyword arguments of the op that runs there, plain data.
    predicted_ms: milliseconds by method, where the choice went by them and lengths are known.
    measured_ms: milliseconds on this machine by method, where :meth:`Report.timed` measured them.
    error: what its output is off by, ``|o_hat - o| / |o|`` in the Frobenius norm, measured by ``explain(error=True)``;
        the largest one where it ran another number of times than it is listed.
    unmeasured: why that could not be measured.
    saved, spec, policy: its entry in a saved plan, what it computes, and what decided; neither printed nor in the JSON.
    """

    module: str
    source: str
    form: str
    mask: str
    method: str
    verdict: str
    reason: str
    rejected: tuple[str, ...] = ()
    shape: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    nearest: str = ""
    measured_ms: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    unmeasured: str = ""
    saved: SavedSite | None = field(default=None, repr=False, compare=False)
    spec: AttentionSpec | None = field(default=None, repr=False, compare=False)
    policy: Policy | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rejected", tuple(map(str, self.rejected)))
        object.__setattr__(self, "params", canonical(self.params))

    def is_inside(self, path: str) -> bool:
        """Whether it is in the module at ``path``, or in one inside of that."""
        return not path or f"{self.module}.".startswith(f"{path}.")

    @property
    def layer(self) -> int:
        """The key of the site for random numbers; of one that has an entry in a saved plan."""
        return layer_key(self.saved.module, self.saved.index)

    @classmethod
    def of(cls, site: AttentionSite, plan: Plan) -> SiteReport:
        """The report of a site of a graph for which ``plan`` was made."""
        return cls.from_plan(site.module, site.source, site.form, plan, spec=site.spec, index=site.index)

    @classmethod
    def from_plan(
        cls,
        module: str,
        source: str,
        form: str,
        plan: Plan,
        *,
        spec: AttentionSpec | None = None,
        index: int = 0,
    ) -> SiteReport:
        """The report of a site for which ``plan`` was made; ``spec`` is None where it was refused unseen.

        ``index`` is its place among the sites of its module.
        """
        return cls(
            module=module,
            source=source,
            form=form,
            mask="" if spec is None else str(spec.mask),
            method=plan.method,
            verdict=plan.verdict,
            reason=plan.reason,
            rejected=plan.rejected,
            nearest=plan.nearest or "",
            shape="" if spec is None else _shape(spec),
            params=plan.params,
            predicted_ms=plan.predicted_ms,
            spec=spec,
            policy=plan.policy,
            saved=SavedSite.from_plan(module, index, spec, plan),
        )


recorder: ContextVar[list[SiteReport] | None] = ContextVar("express_compile_sites", default=None)
"""Where rewritten models put their reports while ``record_sites`` is active."""


@dataclass(frozen=True)
class Report:
    """Every attention site found in one run of a model. ``print(report)`` shows a table.

    sites: in order of execution.
    graphs: number of graphs Dynamo cut the model into; 0 for a model that ``rewrite_attention`` changed.
    unmatched: what the policy says about modules of which none has a site, e.g. ``"modules['*.cross_attn']"``.
    breaks: what parts these graphs, ``"file:line: why"``; None where that was not looked at.
    """

    sites: tuple[SiteReport, ...]
    graphs: int = 0
    unmatched: tuple[str, ...] = ()
    breaks: tuple[str, ...] | None = None

    def to_json(self) -> str:
        """The report as a JSON object with the keys ``graphs``, ``breaks``, ``totals``, ``unmatched`` and ``sites``."""
        names = [f.name for f in fields(SiteReport) if f.compare]
        sites = [{name: getattr(site, name) for name in names} for site in self.sites]
        head = {"graphs": self.graphs, "breaks": self.breaks, "totals": self.totals(), "unmatched": self.unmatched}
        return json.dumps({**head, "sites": sites}, indent=2)

    @property
    def plan(self) -> SavedPlan:
        """What was decided, to be saved and to be followed by another copy of the model."""
        return SavedPlan.of(site.saved for site in self.sites if site.saved is not None)

    def to_html(self, figures: Mapping[str, str] = MappingProxyType({})) -> str:
        """The report as one self-contained HTML page; ``figures`` maps titles to SVG documents to show below it.

        Raises ``ValueError`` for a figure that is no SVG.
        """
        from .page import render

        return render(self, figures)

    def timed(self) -> Report:
        """The same report with the times of what runs at each site, and of exact attention, on this machine.

        Of sites with known sizes and a proven mask: on random tensors of these sizes, without padding, each call
        launched by itself.
        """
        from ..planning.measure import Clock, time_site

        clocks: dict[str, Clock] = {}
        known: dict[tuple[Any, ...], float] = {}

        def measure(site: SiteReport, method: str, params: Mapping[str, Any]) -> float:
            key = (site.shape, site.mask, site.spec.scale, method, repr(dict(params)))
            if key not in known:
                clock = clocks.setdefault(site.spec.device, Clock(site.spec.device))
                known[key] = time_site(site.spec, method, params, clock)
            return known[key]

        def complete(site: SiteReport) -> SiteReport:
            spec = site.spec
            if spec is None or spec.mask.unknown is not None or not all(isinstance(x, int) for x in _sizes(spec)):
                return site
            times = {"exact": measure(site, "exact", {})}
            if site.method != "exact":
                times[site.method] = measure(site, site.method, site.params)
            return replace(site, measured_ms=times)

        return replace(self, sites=tuple(map(complete, self.sites)))

    def crossovers(self) -> dict[str, str]:
        """For :meth:`to_html`: a plot of predicted times over the number of keys for each kind of site, by title.

        Of sites whose mask is proven and which some method takes, on a device whose speed is known. Raises
        ``ImportError`` without matplotlib.
        """
        from ..core.method import METHODS
        from ..planning.devices import device_of
        from .plots import crossover_plot

        plots: dict[str, str] = {}
        for site in self.sites:
            device = None if site.spec is None else device_of(site.spec.device)
            if device is None or site.policy is None:
                continue
            names = [name for name in METHODS if name != "exact"]
            able = [name for name in names if METHODS[name].why_not(site.spec, site.policy) is None]
            able = [name for name in able if device.rates_of(name, site.spec.dtype) is not None]
            title = f"{site.shape}, mask: {site.mask}, s={site.policy.budget}, {device.name} ({device.source})"
            if able and title not in plots:
                plots[title] = crossover_plot(tuple(able), site.spec, site.policy, device, site.shape)
        return plots

    def totals(self) -> dict[str, int]:
        """The number of sites of each verdict."""
        counts = Counter(site.verdict for site in self.sites)
        return {verdict: counts[verdict] for verdict in ("rewritten", "exact", "refused")}

    def __str__(self) -> str:
        breaks = [f"  graph break at {words}" for words in self.breaks or ()]
        lines = [self._table(), self.made, *breaks, self._summary()]
        lines += [f"no site matches {', '.join(self.unmatched)}"] if self.unmatched else []
        return "\n".join(filter(None, lines))

    @property
    def made(self) -> str:
        """How many graphs Dynamo made of the model, in words; ``""`` for a model that ``rewrite_attention`` changed."""
        if self.graphs:
            return f"Dynamo made {self.graphs} graph{'s' if self.graphs > 1 else ''} of the model"
        why = "TORCHDYNAMO_DISABLE, torch.compiler.set_stance or disable, or code that it skips"
        return "" if self.breaks is None else f"Dynamo made no graph of the model ({why})"

    def _summary(self) -> str:
        if not self.sites:
            return "no attention site was found"
        totals = ", ".join(f"{count} {verdict}" for verdict, count in self.totals().items())
        return f"{len(self.sites)} attention site{'s' if len(self.sites) > 1 else ''}: {totals}"

    def _table(self) -> str:
        if not self.sites:
            return ""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        columns = ("module", "source", "form", "mask", "method", "verdict", "reason")
        rows = [
            [site.module or "(root)", _short(site.source) or "-", site.form, site.mask or "-"]
            + [site.method, site.verdict, site.reason]
            for site in self.sites
        ]
        if any(site.measured_ms for site in self.sites):
            columns = (*columns, "measured")
            rows = [[*row, _times(site.measured_ms)] for row, site in zip(rows, self.sites, strict=True)]
        if any(site.error is not None or site.unmeasured for site in self.sites):
            columns = (*columns, "error")
            rows = [[*row, _error(site)] for row, site in zip(rows, self.sites, strict=True)]
        if any(site.nearest for site in self.sites):
            columns = (*columns, "nearest supported form")
            rows = [[*row, site.nearest or "-"] for row, site in zip(rows, self.sites, strict=True)]
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        lengths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        # as wide as its longest row: a terminal wraps lines, but a cut reason is lost
        console = Console(file=io.StringIO(), width=sum(lengths) + 4 * len(columns), color_system=None)
        console.print(table)
        return console.file.getvalue().rstrip("\n")


def _sizes(spec: AttentionSpec) -> tuple[Any, ...]:
    return spec.B, spec.H, spec.H_kv, spec.Lq, spec.Lk, spec.D, spec.Dv


def _shape(spec: AttentionSpec) -> str:
    heads = f"{spec.H}" if str(spec.H) == str(spec.H_kv) else f"{spec.H}/{spec.H_kv}"
    D = f"{spec.D}" if str(spec.D) == str(spec.Dv) else f"{spec.D} Dv={spec.Dv}"
    return f"B={spec.B} H={heads} Lq={spec.Lq} Lk={spec.Lk} D={D} {str(spec.dtype).removeprefix('torch.')}"


def _times(times: Mapping[str, float]) -> str:
    return ", ".join(f"{method} {ms:.3g} ms" for method, ms in times.items()) or "-"


def _error(site: SiteReport) -> str:
    return (site.unmeasured and f"not measured: {site.unmeasured}") or (
        "-" if site.error is None else f"{site.error:.3g}"
    )


def _short(source: str) -> str:
    """The last two parts of a path; the JSON has all of it."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


def explain(
    model: Any,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    error: bool = False,
    **policy_fields: Any,
) -> Report:
    """Run ``model`` once and report what ``backend="express"`` would do at every attention site, and why.

    ``model`` is a module or a function; it is called once with copies of ``example_inputs`` and ``example_kwargs``,
    without gradients. Buffers, attributes of modules and the generators of random numbers are put back as they were
    (not parameters that a forward pass writes). ``policy_fields`` are the fields of
    :class:`Policy`; with ``training=False`` the report is that of a run without gradients. For a
    model that ``rewrite_attention`` changed, the report tells what was done in this run, and ``policy_fields`` must be
    empty. Raises ``TypeError`` or ``ValueError`` for a bad field, and with ``strict=True`` ``ValueError`` for what the
    whole model does not fulfil.

    Attention that runs in no graph (behind ``torch.compiler.disable``, in code that Dynamo skips) and flex_attention
    are listed as refused, with the form ``"not matched"``.

    ``error``: also measure, on these inputs, what the output of each rewritten site is off by relative to exact
    attention, ``|o_hat - o| / |o|`` in the Frobenius norm over batch, heads, queries and features. Every site gets the
    activations of the exact model, and runs twice: exactly, which is what goes on, and as planned. Of SANTA, which is
    random by design, it is the error of one draw, far above that of the mean.
    """
    import torch

    from ..routes.transformers.eager import is_rewritten

    if not callable(model):
        raise TypeError(f"model={model!r}: must be a torch.nn.Module or a function")
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise TypeError(f"example_kwargs={example_kwargs!r}: must be None or a mapping of named inputs")
    if not isinstance(error, bool):
        raise TypeError(f"error={error!r}: must be True or False")
    kwargs = dict(example_kwargs or {})
    if isinstance(model, torch.nn.Module) and is_rewritten(model):
        if policy_fields:
            raise ValueError(
                f"{', '.join(policy_fields)}: the model was changed by rewrite_attention, whose options are reported; "
                "allowed are no options, or restore_attention(model) before explain"
            )
        run = partial(_recorded, model, error)
    else:
        run = partial(_dry_run, model, Policy.from_options(policy_fields), error)
    memo: dict[int, Any] = {}
    inputs = [_copied(x, memo) for x in example_inputs], {name: _copied(x, memo) for name, x in kwargs.items()}
    with torch.no_grad(), _unchanged(model):
        return run(*inputs)


def _recorded(model: torch.nn.Module, error: bool, args: list[Any], kwargs: dict[str, Any]) -> Report:
    """What a rewritten model does."""
    from ..passes.place import module_paths
    from ..passes.site import NOT_MATCHED
    from ..routes.outside import Outside
    from ..routes.transformers.eager import record_sites, unmatched

    with record_sites() as sites, _compared(error) as errors, Outside(lambda: module_paths(model), sites):
        model(*args, **kwargs)
    whole = [site.module for site in sites if site.form == "not captured"]  # these say it of all that is inside
    sites = [site for site in sites if site.form != NOT_MATCHED or not any(map(site.is_inside, whole))]
    sites = _with_errors(sites, errors)
    return Report(sites, unmatched=unmatched(model, [site.module for site in sites]))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy for the model to change, such as a cache, if there can be one; modules are themselves."""
    import torch

    if isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, torch.Tensor) and not value.is_leaf:  # which cannot be copied deeply
        return value.detach().clone().requires_grad_()
    try:
        return deepcopy(value, memo)
    except Exception:  # whatever an object of the user raises: it has to do without
        return value


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Leave a model as it is: its buffers, the attributes of its modules and what lists, dicts and sets among these
    hold; and the generators of random numbers. Parameters that a forward pass writes are not kept."""
    import torch

    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    attributes = [(module, dict(vars(module))) for module in modules]
    holders = [(x, x.copy()) for _, kept in attributes for x in kept.values() if isinstance(x, (dict, list, set))]
    buffers = [(x, x.detach().clone()) for module in modules for x in module.buffers(recurse=False)]
    state, devices = random.getstate(), range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update(kept)
        for holder, kept in holders:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(kept)
        for buffer, kept in buffers:
            if not torch.equal(buffer, kept):
                buffer.copy_(kept)


@contextmanager
def _compared(error: bool) -> Iterator[Mapping[int, list[torch.Tensor]] | None]:
    """While active, rewritten attention runs exactly; gives what it would have been off by, by layer key.

    None, and nothing is changed, unless ``error``.
    """
    from ..core.call import run_by
    from ..quality.budgets import Compared

    if not error:
        yield None
        return
    compared = Compared()
    with run_by(compared):
        yield compared.errors


def _with_errors(
    sites: Iterable[SiteReport], errors: Mapping[int, list[torch.Tensor]] | None
) -> tuple[SiteReport, ...]:
    """The reports with their errors, if some were measured. A site that did not run once for each time it is listed has
    the largest of its errors in all of them."""
    sites = tuple(sites)
    if errors is None:
        return sites
    listed = Counter(site.layer for site in sites if _is_approximate(site))
    found = {layer: [float(x) for x in errors.get(layer, ())] for layer in listed}
    turns = {
        layer: iter(x if len(x) == listed[layer] else [max(x, default=None)] * listed[layer])
        for layer, x in found.items()
    }

    def complete(site: SiteReport) -> SiteReport:
        if not _is_approximate(site):
            return site
        error = next(turns[site.layer])
        if error is None:
            has_exact = "min_length" in site.params
            return replace(
                site, unmeasured="it did not run" if has_exact else "its op has no min_length to make it exact"
            )
        return replace(site, error=error) if error == error else replace(site, unmeasured="exact attention is 0 here")

    return tuple(map(complete, sites))


def _is_approximate(site: SiteReport) -> bool:
    return site.verdict == "rewritten" and site.method != "exact"


def _dry_run(model: Any, policy: Policy, error: bool, args: list[Any], kwargs: dict[str, Any]) -> Report:
    import torch

    from ..core.call import plainly, wrap_ops
    from ..core.method import METHODS
    from ..passes.buffers import Buffers
    from ..passes.match import find_sites
    from ..passes.place import Place, calls, paths_of
    from ..planning.choose import check_policy, plan_sites, require, require_sites, unmatched
    from ..routes.compile import rewrite_planned
    from ..routes.dynamo import Compiled
    from ..routes.outside import Outside

    METHODS.load()
    check_policy(policy)
    lenient = replace(policy, strict=False)  # it is judged for the whole model, once that is known
    found: list[SiteReport] = []
    graphs: list[GraphModule] = []
    failed: list[Exception] = []
    outside = Outside(lambda: paths_of(calls()), found)

    def record(gm: GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        try:
            return outside.in_graph(search(gm, inputs))
        except Exception as error:  # Dynamo would take it for its own
            failed.append(error)
            return gm.forward

    def search(gm: GraphModule, inputs: list[torch.Tensor]) -> Any:
        buffers, place = Buffers(gm, inputs), Place.of_graph()
        planned = plan_sites(find_sites(gm, buffers, place), lenient)
        if planned:
            place.pin()
        found.extend(SiteReport.of(site, plan) for site, plan in planned)
        if not error:
            return gm.forward
        unchanged = rewrite_planned(gm, planned, lenient, buffers)
        wrap_ops(gm, plainly)
        return gm.forward if unchanged is None else buffers.guard(gm.forward, unchanged.forward)

    # a model that was compiled often has used up Dynamo's limit for its code, which would then run uncaptured
    limits = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}
    patient = torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=False)
    compiled = Compiled(_uncompiled(model), record)
    try:
        with patient, _compared(error) as errors, outside:
            compiled(*args, **kwargs)
    finally:
        compiled.close()
    if failed:
        raise failed[0]
    paths = [site.module for site in found]
    require([(site.module or "(root)", site) for site in found], policy)
    require_sites(paths, policy)
    return Report(_with_errors(found, errors), len(graphs), unmatched(paths, policy), outside.breaks)


def _uncompiled(model: Any) -> Any:
    from torch._dynamo import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else model
