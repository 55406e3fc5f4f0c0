"""Budgets by error: the fewest rows with which a model stays within a tolerance, site by site, on sample inputs.

Exact and approximate attention run side by side on the activations of the exact model, which gives the error of every
site at every budget; one site at a time then runs approximately, which gives what the model makes of it:

    KL_l(s) = KL_l(r) (e_l(s) / e_l(r))^2,    e_l(s) = |o_l(s) - o_l| / |o_l|

to second order in the error. Budgets are raised where that lowers the sum most per row, up to exact attention; the sum
is then calibrated by measurements of the whole model, and the answer is the cheapest assignment that was *measured* to
be within the tolerance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import nn

from ..core.call import Call, Op, name_of, run_by
from ..core.method import METHODS, cost_at
from ..core.plain import about, number
from ..core.policy import Policy
from ..core.sites import record_sites
from ..core.spec import Mask, Site, layer_key
from ..routes.eager import is_rewritten, restore_attention, rewrite_attention

Choice = TypeVar("Choice")
_CHUNK = 512  # positions whose logits are compared at a time
_MEASUREMENTS = 8  # of the whole model, to calibrate the sum


@dataclass(frozen=True)
class SiteErrors:
    """What was found at one site.

    module: its module path. budget: the rows that were chosen, None for exact attention.
    errors: relative error of its output by budget. kl: what each of these budgets alone is predicted to cost, in nats.
    rows: rows that a query sees, on average over queries and batches, by budget; ``"exact"`` among them.
    """

    module: str
    budget: int | None
    errors: Mapping[int, float]
    kl: Mapping[int, float]
    rows: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """The outcome of :func:`calibrate_error`.

    policy: what to give to ``rewrite_attention`` or the backend; ``policy.modules`` has a budget or ``"exact"`` for
        every site. kl: KL(exact || with that policy) on the sample, mean over positions, nats. rows: those a query
        sees, mean over sites. sites: what was found at each.
    """

    policy: Policy
    kl: float
    rows: float
    sites: tuple[SiteErrors, ...] = field(repr=False)

    def to_json(self) -> str:
        """A JSON object with the keys ``policy``, ``kl``, ``rows`` and ``sites``."""
        policy = json.loads(self.policy.to_json())
        data = {"policy": policy, "kl": self.kl, "rows": self.rows, "sites": [asdict(site) for site in self.sites]}
        return json.dumps(data, indent=2)


class Exactly:
    """Runs the ops of rewritten attention exactly: a runner of :mod:`call`."""

    def __call__(self, op: Op, call: Call) -> Any:
        result = call.exactly().run(op)
        self.see(op, call, result[0])
        return result

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        """Called for every op that ran exactly, with the call as it was to be."""


class Compared(Exactly):
    """Runs everything exactly, and notes what each op would have been off by.

    errors: ``|o_hat - o| / |o|``, 0-d tensors, by layer key, in order of execution.
    """

    def __init__(self) -> None:
        self.errors: dict[int, list[torch.Tensor]] = {}

    def __call__(self, op: Op, call: Call) -> Any:
        # without min_length there is no exact attention to compare with
        return super().__call__(op, call) if call.can_be_exact else call.run(op)

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        self.errors.setdefault(call.layer, []).append(_error(op, call, exact))


def _error(op: Op, call: Call, exact: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of what the op is off by, relative to that of exact attention; NaN where both are 0."""
    return (call.run(op)[0].float() - exact.float()).norm() / exact.float().norm()


class _Budgets(Exactly):
    """Runs the ops of a rewritten model with a budget for each site, exactly where none is given."""

    def __init__(self, options: Mapping[str, Mapping[int, dict[str, Any]]], chosen: Mapping[int, int | None]) -> None:
        self.options, self.chosen = options, chosen

    def __call__(self, op: Op, call: Call) -> Any:
        budget = self.chosen.get(call.layer)
        if budget is None:
            return super().__call__(op, call)
        return replace(call, options=self.options[name_of(op)][budget]).run(op)


class _Errors(_Budgets):
    """Runs everything exactly, and notes error and rows of every budget at every site."""

    def __init__(self, options: Mapping[str, Mapping[int, dict[str, Any]]]) -> None:
        super().__init__(options, {})
        self.errors: dict[int, dict[int, list[torch.Tensor]]] = {}
        self.rows: dict[int, dict[str, list[float]]] = {}

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        name = name_of(op)
        errors, rows = self.errors.setdefault(call.layer, {}), self.rows.setdefault(call.layer, {})
        for budget, options in self.options[name].items():
            tried = replace(call, options=options)
            errors.setdefault(budget, []).append(_error(op, tried, exact))
            rows.setdefault(str(budget), []).append(_rows_seen(name, tried, name == "express"))
        rows.setdefault("exact", []).append(_rows_seen("exact", replace(call, options={}), name == "express"))


def _rows_seen(name: str, call: Call, causal: bool) -> float:
    """Rows that a query sees on average."""
    spec = call.spec(Mask(causal=causal, offset=call.Lk - call.Lq))
    cost = cost_at(name, spec, call.options)
    assert cost is not None, "methods that are calibrated say what they cost"
    return cost.scores / (spec.B * spec.H * spec.Lq)


@torch.no_grad()
def calibrate_error(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping[str, Any]],
    *,
    tolerance: float = 0.05,
    budgets: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    policy: Policy | None = None,
    first: int = 0,
) -> Calibration:
    """The policy with the fewest rows whose KL to the exact model stays within ``tolerance`` on sample inputs.

    model: as for ``rewrite_attention``, not rewritten; it is left as it was. Its output, or the ``logits`` of it, are
        scores ``[batch, positions, classes]``.
    batches: token ids ``[batch, positions]`` or mappings of keyword arguments; best a few that are as long as those
        that the policy is for. All budgets of one batch are tried before the next one is asked for.
    tolerance: mean KL(exact || approximate) in nats per position, from position ``first`` on, without padding.
    budgets: what to choose from, in rows; a site for which none of them is good enough stays exact.
    policy: everything but the budget (default: Express with its defaults); its methods are ``express``,
        ``thinformer`` or both, its ``modules`` must be empty.

    It takes ``1 + sites + 8`` forward passes per batch, the first of them with all budgets. Raises ``ValueError`` or
    ``TypeError`` for arguments that do not fit, and where no site can be rewritten.
    """
    policy = Policy(methods=("express",)) if policy is None else policy
    budgets = _check(model, tolerance, budgets, policy, first)
    # options of a method have a budget, given or not, which would go before those that are tried
    own = {name: {x: value for x, value in of.items() if x != "budget"} for name, of in policy.method_options.items()}
    policy = replace(policy, method_options=own)
    batches = checked_batches(batches, "batches", first)
    methods = [name for name in policy.methods or () if name != "exact"]
    options = {
        name: {s: dict(METHODS[name].params(Site(), replace(policy, budget=s, min_length=0))) for s in budgets}
        for name in methods
    }
    rewrite_attention(model, replace(policy, methods=tuple(methods), budget=budgets[-1], min_length=0))
    try:
        exact: list[torch.Tensor] = []
        paths: dict[int, str] = {}
        seen = _Errors(options)
        for batch in batches:
            with record_sites() as reports, run_by(seen):
                exact.append(logits_of(model, batch))
            _check_first(first, exact[-1].shape[1])
            paths |= {layer_key(x.module, i): x.module for x in reports if x.verdict == "rewritten" for i in range(8)}
        if not seen.errors:
            reasons = "; ".join(sorted({site.reason for site in reports}))
            raise ValueError(f"model: no site can be rewritten by {', '.join(methods)}: {reasons or 'it has none'}")
        if len({paths[layer] for layer in seen.errors}) < len(seen.errors):
            raise ValueError(
                "model: one of its modules has more than one site, and a policy has one budget for a module"
            )

        def kl_of(i: int, batch: Any) -> float:
            with about(f"batches[{i}]"):
                return mean_kl(exact[i], logits_of(model, batch), counted_from(batch, exact[i], first))

        def measure(chosen: Mapping[int, int | None]) -> float:
            with run_by(_Budgets(options, chosen)):
                return fmean(kl_of(i, batch) for i, batch in enumerate(batches))

        found = _sensitivities(seen, budgets, measure)
        chosen, kl = _within(found, tolerance, measure)
    finally:
        restore_attention(model)
    sites = tuple(
        SiteErrors(
            paths[layer],
            chosen[layer],
            site["errors"],
            site["kl"],
            {"exact" if k is None else str(k): x for k, x in site["rows"].items()},
        )
        for layer, site in found.items()
    )
    rows = fmean(site.rows["exact" if site.budget is None else str(site.budget)] for site in sites)
    overrides: dict[str, Any] = {
        site.module: "exact" if site.budget is None else {"budget": site.budget} for site in sites
    }
    return Calibration(replace(policy, modules=overrides), kl, rows, sites)


def _check(model: nn.Module, tolerance: float, budgets: Sequence[int], policy: Policy, first: int) -> list[int]:
    """The budgets in order, once all but the batches is known to fit."""
    if is_rewritten(model):
        raise ValueError("model: is rewritten; call restore_attention(model) first")
    if not 0 < number("tolerance", tolerance, int, float) < math.inf:
        raise ValueError(f"tolerance={tolerance!r}: must be above 0 nats and finite")
    if number("first", first, int) < 0:
        raise ValueError(f"first={first!r}: must be a position, 0 or more")
    if isinstance(budgets, (str, bytes, Mapping)) or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets={budgets!r}: must be a sequence of numbers of rows")
    budgets = [number("budgets", s, int) for s in budgets]
    if not budgets or not all(s >= 4 and s & (s - 1) == 0 for s in budgets):
        raise ValueError(f"budgets={budgets!r}: must be powers of two, 4 or more")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be None or a Policy")
    if not policy.methods or not set(policy.methods) <= {"express", "thinformer", "exact"}:
        raise ValueError(f"policy.methods={policy.methods!r}: allowed are 'express' and 'thinformer'")
    if not set(policy.methods) - {"exact"}:
        raise ValueError(f"policy.methods={policy.methods!r}: must name 'express' or 'thinformer'")
    if policy.modules:
        raise ValueError(f"policy.modules={dict(policy.modules)!r}: must be empty; it is what is looked for")
    return sorted(set(budgets))


def checked_batches(batches: Any, name: str, first: int = 0) -> list[torch.Tensor | Mapping[str, Any]]:
    """Several batches as a list, each a tensor of token ids or keyword arguments, with more than ``first`` positions.

    Raises ``TypeError`` or ``ValueError`` that begins with ``name``.
    """
    if isinstance(batches, (torch.Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: a {type(batches).__name__}; must be several batches, such as a list of one")
    batches = list(batches)
    if not batches:
        raise ValueError(f"{name}: must hold at least one batch")
    for i, batch in enumerate(batches):
        if not isinstance(batch, (torch.Tensor, Mapping)):
            raise TypeError(f"{name}[{i}]={batch!r}: must be a tensor of token ids or a mapping of keyword arguments")
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(ids, torch.Tensor):
            if ids.dim() < 2 or not ids.numel():
                raise ValueError(f"{name}[{i}]: shape {tuple(ids.shape)}; must be [batch, positions], not empty")
            _check_first(first, ids.shape[1])
    return batches


def _check_first(first: int, positions: int) -> None:
    if first >= positions:
        raise ValueError(f"first={first!r}: a batch has only {positions} positions")


def logits_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """What a model makes of a batch: scores ``[batch, positions, classes]``; ``ValueError`` for other outputs."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: its output is {shape}; must be, or have as logits, [batch, positions, classes]")
    return logits


def mean_kl(exact: torch.Tensor, approximate: torch.Tensor, counted: torch.Tensor) -> float:
    """Mean KL(exact || approximate) of scores over the positions that are ``counted``, bool ``[batch, positions]``, in
    nats. Classes that both rule out, by a score of minus infinity, count nothing. ``ValueError`` for scores that are
    no numbers."""
    total = 0.0
    for p, q, its in zip(*(x.split(_CHUNK, 1) for x in (exact, approximate, counted)), strict=True):
        if its.any():
            p, q = p[its].float().log_softmax(-1), q[its].float().log_softmax(-1)
            total += (p.exp() * (p - q)).masked_fill(p == -math.inf, 0).sum().item()
    if math.isnan(total):
        raise ValueError("model: it gives scores that are NaN, or infinite; must be numbers, or minus infinity")
    return max(total, 0.0) / int(counted.sum())  # rounding makes less than nothing of it


def counted_from(batch: Any, scores: torch.Tensor, first: int) -> torch.Tensor:
    """Which positions of ``scores`` from ``first`` on are no padding: bool ``[batch, positions]``. ``ValueError`` where
    none is."""
    counted = real_positions(batch, scores)
    counted[:, :first] = False
    if not counted.any():
        raise ValueError(f"a batch has padding only from position {first} on, where its scores count; give longer ones")
    return counted


def real_positions(batch: Any, scores: torch.Tensor) -> torch.Tensor:
    """Which of the positions of ``scores`` no padding mask of the batch hides: bool ``[batch, positions]``; beside
    inputs of a decoder ``attention_mask`` is that of an encoder."""
    given = batch if isinstance(batch, Mapping) else {}
    names = ["decoder_attention_mask", "attention_mask"]
    masks = [given.get(x) for x in (names[:1] if {"decoder_input_ids", "decoder_inputs_embeds"} & {*given} else names)]
    fit = (x for x in masks if isinstance(x, torch.Tensor) and x.shape == scores.shape[:2])
    return next((x.to(scores.device) != 0 for x in fit), scores.new_ones(scores.shape[:2], dtype=torch.bool))


def _sensitivities(
    seen: _Errors, budgets: list[int], measure: Callable[[Mapping[int, int | None]], float]
) -> dict[int, dict[str, Any]]:
    """Errors, rows and the KL that each budget alone is expected to cost, of every site."""
    found = {}
    for layer, by_budget in seen.errors.items():
        errors = {s: fmean(float(x) for x in by_budget[s]) for s in budgets}
        # where the error is largest its effect is least hidden by rounding, but no longer of second order
        reference = min(budgets, key=lambda s: abs(math.log(max(errors[s], 1e-9) / 0.3)))
        alone = measure({layer: reference}) if errors[reference] else 0.0
        kl = {s: alone * (errors[s] / errors[reference]) ** 2 if alone else 0.0 for s in budgets}
        rows = {int(s) if s != "exact" else None: fmean(x) for s, x in seen.rows[layer].items()}
        found[layer] = {"errors": errors, "kl": kl, "rows": rows}
    return found


def _cheapest(found: Mapping[int, Mapping[str, Any]], total: float) -> dict[int, int | None]:
    """Budgets whose expected costs sum to at most ``total``, with few rows: raised where a row gains most.

    Greedy over the lower convex hull of each site's (rows, KL), which is optimal but for the last step.
    """
    hulls = {layer: _hull(site) for layer, site in found.items()}
    place = dict.fromkeys(hulls, 0)
    cost = sum(hull[0][1] for hull in hulls.values())
    while cost > total:
        gains = {
            layer: slope(hull[i], hull[i + 1]) for layer, hull in hulls.items() if (i := place[layer]) + 1 < len(hull)
        }
        if not gains:
            break
        layer = max(gains, key=lambda layer: gains[layer])
        cost -= hulls[layer][place[layer]][1] - hulls[layer][place[layer] + 1][1]
        place[layer] += 1
    return {layer: hulls[layer][i][2] for layer, i in place.items()}


def _hull(site: Mapping[str, Any]) -> list[tuple[float, float, int | None]]:
    """(rows, KL, budget) from the cheapest on, each gaining less per row than the one before; the last one is exact."""
    points = [(site["rows"][s], kl, s) for s, kl in site["kl"].items() if site["rows"][s] < site["rows"][None]]
    return lower_hull([*points, (site["rows"][None], 0.0, None)])


def lower_hull(points: Iterable[tuple[float, float, Choice]]) -> list[tuple[float, float, Choice]]:
    """The (cost, error, choice) that are best for some price of cost, from the cheapest on."""
    hull: list[tuple[float, float, Choice]] = []
    for point in sorted(points, key=lambda x: x[:2]):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def slope(a: tuple[float, float, Any], b: tuple[float, float, Any]) -> float:
    """How much error a unit of cost saves from one point of a hull to the next."""
    return (a[1] - b[1]) / (b[0] - a[0])


def _within(
    found: Mapping[int, Mapping[str, Any]], tolerance: float, measure: Callable[[Mapping[int, int | None]], float]
) -> tuple[dict[int, int | None], float]:
    """The assignment with the fewest rows that was measured to be within the tolerance, and its KL.

    The sum of single costs is not the cost of all together: the total that is asked for is moved until what is
    measured is the tolerance.
    """
    best: tuple[dict[int, int | None], float] = (dict.fromkeys(found), 0.0)
    low, high, total = 0.0, math.inf, tolerance
    tried: dict[tuple[int | None, ...], float] = {}
    for _ in range(_MEASUREMENTS):
        chosen = _cheapest(found, total)
        key = tuple(chosen.values())
        kl = tried[key] if key in tried else measure(chosen)
        tried[key] = kl
        if kl <= tolerance:
            low = total
            if _rows(found, chosen) < _rows(found, best[0]):
                best = chosen, kl
        else:
            high = total
        total = (
            total * min(4.0, max(0.25, tolerance / max(kl, 1e-12)))
            if not low or high == math.inf
            else math.sqrt(low * high)
        )
    return best


def _rows(found: Mapping[int, Mapping[str, Any]], chosen: Mapping[int, int | None]) -> float:
    return sum(found[layer]["rows"][budget] for layer, budget in chosen.items())
