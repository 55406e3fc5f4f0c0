"""What became of every attention site of a model, and why."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from ..core.call import plainly, run_by, wrap_ops
from ..core.method import METHODS
from ..core.plain import shown
from ..core.plan import SavedPlan
from ..core.policy import Policy
from ..core.sites import NOT_CAPTURED, NOT_MATCHED, SiteReport, record_sites
from ..core.spec import AttentionSpec
from ..passes.pipeline import plan_graph
from ..passes.place import calls, module_paths, paths_of
from ..planning import devices
from ..planning.choose import check_policy, require, require_sites
from ..planning.choose import unmatched as unmatched_in
from ..planning.measure import Clock, time_site
from ..quality.budgets import Compared
from ..routes.dynamo import Compiled
from ..routes.eager import is_rewritten, uncompiled, unmatched
from ..routes.outside import Outside
from .groups import grouped, name_of
from .page import render
from .picture import in_text, rows_in_table


@dataclass(frozen=True)
class Report:
    """Every attention site found in one run of a model. ``print(report)`` shows a table, one line for sites
    of which it says the same, and below it the rows of every head where heads of a site differ.

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

        Raises ``TypeError`` for figures that are no mapping of strings, ``ValueError`` for one that is no SVG.
        """

        return render(self, figures)

    def timed(self) -> Report:
        """The same report with the times of what runs at each site, and of exact attention, on this machine.

        Of sites with known sizes and a proven mask: on random tensors of these sizes, without padding, each call
        launched by itself.
        """
        clocks: dict[str, Clock] = {}
        known: dict[tuple[Any, ...], float] = {}

        def measure(spec: AttentionSpec, method: str, params: Mapping[str, Any]) -> float:
            key = (*_sizes(spec), spec.dtype, spec.device, str(spec.mask), spec.scale, method, repr(dict(params)))
            if key not in known:
                clock = clocks.setdefault(spec.device, Clock(spec.device))
                known[key] = time_site(spec, method, params, clock)
            return known[key]

        def complete(site: SiteReport) -> SiteReport:
            spec = site.spec
            if spec is None or spec.mask.unknown is not None or not all(isinstance(x, int) for x in _sizes(spec)):
                return site
            times = {"exact": measure(spec, "exact", {})}
            if site.method != "exact":
                times[site.method] = measure(spec, site.method, METHODS[site.method].part(site.params, spec.shard))
            return replace(site, measured_ms=times)

        return replace(self, sites=tuple(map(complete, self.sites)))

    def crossovers(self) -> dict[str, str]:
        """For :meth:`to_html`: a plot of predicted times over the number of keys for each kind of site, by title.

        Of sites whose mask is proven and which some method takes, on a device whose speed is known. Raises
        ``ImportError`` without matplotlib.
        """
        # matplotlib is an optional package
        from .plots import crossover_plot

        plots: dict[str, str] = {}
        for site in self.sites:
            spec, policy = site.spec, site.policy
            device = None if spec is None else devices.device_of(spec.device)
            if spec is None or device is None or policy is None:
                continue
            names = [name for name in METHODS if name != "exact"]
            able = [name for name in names if METHODS[name].why_not(spec, policy) is None]
            able = [name for name in able if device.rates_of(name, spec.dtype) is not None]
            title = f"{site.shape}, mask: {site.mask}, s={policy.budget}, {device.name} ({device.source})"
            if able and title not in plots:
                plots[title] = crossover_plot(tuple(able), spec, policy, device, site.shape)
        return plots

    def totals(self) -> dict[str, int]:
        """The number of sites of each verdict."""
        counts = Counter(site.verdict for site in self.sites)
        return {verdict: counts[verdict] for verdict in ("rewritten", "exact", "refused")}

    def __str__(self) -> str:
        breaks = [f"  graph break at {words}" for words in self.breaks or ()]
        lines = [self._table(), in_text(self.sites), self.made, *breaks, self._summary()]
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
        lines = [[cell(site) for cell in _COLUMNS.values()] for site in self.sites]
        groups = grouped(lines, lambda line: tuple(line[1:]))
        lines = [[name_of([line[0] for line in group]), *group[0][1:]] for group in groups]
        filled = [i for i, name in enumerate(_COLUMNS) if name not in _OPTIONAL or any(x[i] != "-" for x in lines)]
        rows = [[line[i] for i in filled] for line in (list(_COLUMNS), *lines)]
        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        # as wide as its longest row: a terminal wraps lines, but a cut reason is lost
        width = sum(max(map(len, cells)) for cells in zip(*rows, strict=True)) + 4 * len(filled)
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(table)
        return out.getvalue().rstrip("\n")


def _sizes(spec: AttentionSpec) -> tuple[Any, ...]:
    return spec.B, spec.H, spec.H_kv, spec.Lq, spec.Lk, spec.D, spec.Dv


def _times(times: Mapping[str, float]) -> str:
    return ", ".join(f"{method} {ms:.3g} ms" for method, ms in times.items()) or "-"


def _error(site: SiteReport) -> str:
    return (site.unmeasured and f"not measured: {site.unmeasured}") or (
        "-" if site.error is None else f"{site.error:.3g}"
    )


def _short(source: str) -> str:
    """The last two parts of a path; the JSON has all of it."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


_COLUMNS: dict[str, Callable[[SiteReport], str]] = {
    "module": lambda site: site.module,
    "source": lambda site: _short(site.source) or "-",
    "form": lambda site: site.form,
    "mask": lambda site: site.mask or "-",
    "method": lambda site: site.method,
    "rows": lambda site: rows_in_table(site) if "rows" in site.params else "-",
    "verdict": lambda site: site.verdict,
    "reason": lambda site: site.reason,
    "measured": lambda site: _times(site.measured_ms),
    "error": _error,
    "nearest supported form": lambda site: site.nearest or "-",
}
"""The table of a report; those of :data:`_OPTIONAL` are shown only where some site has something to say."""
_OPTIONAL = ("rows", "measured", "error", "nearest supported form")


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
    if not callable(model):
        raise TypeError(f"model={shown(model)}: must be a torch.nn.Module or a function")
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
    with record_sites() as sites, _compared(error) as errors, Outside(lambda: module_paths(model), sites):
        model(*args, **kwargs)
    whole = [site.module for site in sites if site.form == NOT_CAPTURED]  # these say it of all that is inside
    found = [site for site in sites if site.form != NOT_MATCHED or not any(map(site.is_inside, whole))]
    return Report(_with_errors(found, errors), unmatched=unmatched(model, [site.module for site in found]))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy for the model to change, such as a cache, if there can be one; modules are themselves."""
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
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    attributes = [(module, dict(vars(module))) for module in modules]
    held = [x for _, kept in attributes for x in kept.values() if isinstance(x, (dict, list, set))]
    holders: list[tuple[Any, Any]] = [(x, x.copy()) for x in held]
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
        for holder, inside in holders:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(inside)
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@contextmanager
def _compared(error: bool) -> Iterator[Mapping[int, list[torch.Tensor]] | None]:
    """While active, rewritten attention runs exactly; gives what it would have been off by, by layer key.

    None, and nothing is changed, unless ``error``.
    """
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
        planned = plan_graph(gm, inputs, lenient)
        planned.pin(told=True)
        found.extend(planned.reports())
        return planned.rewritten(measured, lambda gm: gm.forward) if error else gm.forward

    def measured(gm: GraphModule) -> Any:
        wrap_ops(gm, plainly)
        return gm.forward

    # a model that was compiled often has used up Dynamo's limit for its code, which would then run uncaptured
    limits = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16, "fail_on_recompile_limit_hit": False}
    patient = torch._dynamo.config.patch(limits)
    compiled = Compiled(uncompiled(model), record)
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
    return Report(_with_errors(found, errors), len(graphs), unmatched_in(paths, policy), outside.breaks)
