"""Decide what happens at a site: which method runs there, and every other method's reason not to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..devices import device_of
from ..method import METHODS, Method
from ..predict import LONGEST, MARGIN, crossover, predicted, wins
from ..spec import AttentionSpec, Plan, Policy, Refusal, known_equal
from .site import AttentionSite

DEFAULT_METHODS = ("express", "exact")


def check_policy(policy: Policy) -> None:
    """Raise ``ValueError`` or ``TypeError`` for method names or method options that do not exist."""
    known = tuple(METHODS)
    for name in policy.methods or ():
        if name not in known:
            raise ValueError(
                f"methods={list(policy.methods)!r}: unknown method {name!r}; allowed are {', '.join(known)}"
            )
    for name in policy.method_options:
        if name not in known:
            raise ValueError(f"method_options: unknown method {name!r}; allowed are {', '.join(known)}")
        METHODS[name].own_options(policy)


def plan(spec: AttentionSpec, policy: Policy) -> Plan:
    """The decision for one site; sizes in ``spec`` may be symbolic.

    Verdicts: ``rewritten``; ``exact`` where exact attention is the choice (it was asked for, the sequence is too
    short, or nothing was asked for and nothing else is known to be better); ``refused`` where a named method
    cannot be used or the mask is not proven. With ``policy.strict`` a refused site raises ``ValueError``. Raises
    ``ValueError`` or ``TypeError`` for a policy that names what does not exist.
    """
    check_policy(policy)
    decision = _decide(spec, policy)
    require([("this attention site", decision)], policy)
    return decision


def plan_sites(sites: Iterable[AttentionSite], policy: Policy) -> list[tuple[AttentionSite, Plan]]:
    """A plan for every site; with ``policy.strict`` one ``ValueError`` lists all that were refused."""
    check_policy(policy)
    lenient = replace(policy, strict=False)
    planned = [(site, _plan_site(site, lenient)) for site in sites]
    require([(site.module or "(root)", decision) for site, decision in planned], policy)
    return planned


def require(planned: Iterable[tuple[str, Plan]], policy: Policy) -> None:
    """Raise ``ValueError`` with a line per refused site if ``policy.strict``; each site comes with its name."""
    refused = [(name, decision) for name, decision in planned if decision.verdict == "refused"]
    if not policy.strict or not refused:
        return
    width = max(len(name) for name, _ in refused)
    lines = [f"  {name:<{width}}  {decision.reason}" for name, decision in refused]
    raise ValueError(
        f"strict=True: {len(refused)} attention site{'s were' if len(refused) > 1 else ' was'} refused "
        "(allowed is strict=False, which leaves them exact)\n" + "\n".join(lines)
    )


def _plan_site(site: AttentionSite, policy: Policy) -> Plan:
    if site.refusal is None:
        decision = _decide(site.spec, policy)
        if site.form == "softmax" and decision.method == "exact" and "exact" in (policy.methods or ()):
            return replace(decision, verdict="rewritten", reason=f"{decision.reason}; as scaled_dot_product_attention")
        return decision
    if policy.methods is not None and policy.methods[0] == "exact" and site.form != "softmax":
        return Plan("exact", "exact", "methods names 'exact' first")
    rejected = tuple(Refusal(name, site.refusal) for name in policy.methods or DEFAULT_METHODS if name != "exact")
    return Plan("exact", "refused", site.refusal, rejected=rejected)


def _decide(spec: AttentionSpec, policy: Policy, graphs: bool = False) -> Plan:
    names = policy.methods or DEFAULT_METHODS
    if names[0] == "exact":
        return Plan("exact", "exact", "methods names 'exact' first")
    lonely = _without_keys(spec)
    possible: list[Plan] = []
    rejected: list[Refusal] = []
    slower = False
    for name in dict.fromkeys(names):
        if name == "exact":
            continue
        refusal = METHODS[name].refuse(spec, policy) if lonely is None else Refusal(name, lonely)
        if refusal is not None:
            rejected.append(refusal)
            continue
        # beside exact attention the faster of the two is wanted, unless the policy says from which length on
        beside = "exact" in names and policy.min_length is None
        found = _faster(name, spec, policy, graphs) if beside else _as_asked(name, spec, policy)
        if isinstance(found, Refusal):
            rejected.append(found)
        elif found.method == "exact":
            rejected.append(Refusal(name, found.reason))
            slower = True
        else:
            possible.append(found)
    if possible:
        first, *others = sorted(possible, key=lambda plan: plan.predicted_ms.get(plan.method, 0.0))
        rejected += (Refusal(other.method, f"{first.method} is preferred; {other.reason}") for other in others)
        return replace(first, rejected=tuple(rejected))
    allowed = "exact" in names and (spec.mask.unknown is None or policy.methods is not None)
    verdict = "exact" if slower or allowed else "refused"
    return Plan("exact", verdict, _reasons(rejected), rejected=tuple(rejected))


def _as_asked(name: str, spec: AttentionSpec, policy: Policy) -> Plan | Refusal:
    """The plan for a method that was asked for; exact where it is asked for or was measured to be faster."""
    method, shortest = METHODS[name], policy.min_length
    loss = method.loses(spec, policy) if shortest is None else None
    if loss is not None:
        return Plan("exact", "exact", loss)
    params, reason = dict(method.params(spec, policy)), _kind(spec)
    if shortest and isinstance(spec.Lk, int):
        if spec.Lk < shortest:
            return Plan("exact", "exact", f"{spec.Lk} keys are fewer than min_length {shortest}")
    elif shortest:
        return _from_length(method, spec, shortest, params, reason)
    return Plan(name, "rewritten", reason, params)


def _faster(name: str, spec: AttentionSpec, policy: Policy, graphs: bool) -> Plan | Refusal:
    """The plan for a method where it is predicted to be faster than exact attention, else exact."""
    method, device = METHODS[name], device_of(spec.device)
    times = None if device is None else predicted((name, "exact"), spec, policy, device, graphs)
    if times is None:
        where = spec.device if device is None else f"{device.name} at {spec.dtype}"
        return Refusal(
            name,
            f"how fast it is on {where} is not known: python -m express_compile calibrate measures it; "
            "methods without 'exact' use it all the same",
        )
    params = dict(method.params(spec, replace(policy, min_length=0)))
    if isinstance(spec.Lk, int):
        words = f"predicted {times[name]:.3g} ms, exact attention {times['exact']:.3g} ms"
        if not wins(times, name):
            return Plan("exact", "exact", words)
        return Plan(name, "rewritten", f"{_kind(spec)}; {words}", params, predicted_ms=times)
    shortest = crossover(name, "exact", spec, policy, device, graphs, MARGIN)
    if shortest is None:
        return Plan("exact", "exact", f"predicted to be no faster than exact attention up to {LONGEST:,} keys")
    return _from_length(method, spec, shortest, params, f"{_kind(spec)}, predicted to be faster than exact")


def _from_length(
    method: Method, spec: AttentionSpec, shortest: int, params: dict[str, Any], reason: str
) -> Plan | Refusal:
    """The plan for a site with an unknown number of keys, exact for fewer than ``shortest``."""
    if not _decides_at_run_time(method.op):
        return Refusal(method.name, f"min_length={shortest} needs a known number of keys, here it is {spec.Lk}")
    reason = f"{reason}; exact below {shortest} keys, decided at run time"
    return Plan(method.name, "rewritten", reason, {**params, "min_length": shortest})


def _kind(spec: AttentionSpec) -> str:
    return f"{spec.mask} attention" if str(spec.mask) != "none" else "attention without a mask"


def _without_keys(spec: AttentionSpec) -> str | None:
    """Why a query sees no key at all, or there is no query; None where that is not so or not known."""
    for size, what in ((spec.Lq, "queries"), (spec.Lk, "keys")):
        if known_equal(size, 0):
            return f"it has no {what}"
    mask = spec.mask
    if mask.unknown is None and mask.causal and isinstance(mask.offset, int) and mask.offset < 0:
        return f"its causal mask has offset {mask.offset}: the first queries see no key"
    return None


def _reasons(rejected: list[Refusal]) -> str:
    return rejected[0].reason if len(rejected) == 1 else "; ".join(map(str, rejected))


def _decides_at_run_time(op: torch._ops.OpOverload) -> bool:
    arguments: list[Any] = op._schema.arguments
    return any(argument.name == "min_length" for argument in arguments)
