"""Decide what happens at a site: which method runs there, and every other method's reason not to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..method import METHODS, Method
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
    return Plan("exact", "refused", site.refusal, rejected=rejected, nearest=site.nearest)


def _decide(spec: AttentionSpec, policy: Policy) -> Plan:
    rejected: list[Refusal] = []
    too_short = False
    lonely = _without_keys(spec)
    for name in policy.methods or DEFAULT_METHODS:
        if name == "exact":
            return _exact(spec, policy, rejected)
        method = METHODS[name]
        refusal = method.refuse(spec, policy) if lonely is None else Refusal(name, lonely)
        if refusal is not None:
            rejected.append(refusal)
            continue
        loss = method.loses(spec, policy) if policy.min_length is None else None
        if loss is not None:
            rejected.append(Refusal(name, loss))
            too_short = True
            continue
        shortest = _min_length(method, spec, policy)
        if isinstance(shortest, Refusal):
            rejected.append(shortest)
            continue
        params = dict(method.params(spec, policy))
        reason = f"{spec.mask} attention" if str(spec.mask) != "none" else "attention without a mask"
        if shortest > 0 and isinstance(spec.Lk, int):
            if spec.Lk < shortest:
                rejected.append(Refusal(name, f"{spec.Lk} keys are fewer than min_length {shortest}"))
                too_short = True
                continue
        elif shortest > 0:
            params["min_length"] = shortest
            reason += f"; exact below {shortest} keys, decided at run time"
        return Plan(name, "rewritten", reason, params, tuple(rejected))
    if too_short:
        return Plan("exact", "exact", rejected[-1].reason, rejected=tuple(rejected))
    return _refused(spec, policy, rejected)


def _without_keys(spec: AttentionSpec) -> str | None:
    """Why a query sees no key at all, or there is no query; None where that is not so or not known."""
    for size, what in ((spec.Lq, "queries"), (spec.Lk, "keys")):
        if known_equal(size, 0):
            return f"it has no {what}"
    mask = spec.mask
    if mask.unknown is None and mask.causal and isinstance(mask.offset, int) and mask.offset < 0:
        return f"its causal mask has offset {mask.offset}: the first queries see no key"
    return None


def _exact(spec: AttentionSpec, policy: Policy, rejected: list[Refusal]) -> Plan:
    if not rejected:
        return Plan("exact", "exact", "methods names 'exact' first")
    if spec.mask.unknown is not None and policy.methods is None:
        return _refused(spec, policy, rejected)
    return Plan("exact", "exact", _reasons(rejected), rejected=tuple(rejected))


def _refused(spec: AttentionSpec, policy: Policy, rejected: list[Refusal]) -> Plan:
    return Plan(
        "exact", "refused", _reasons(rejected), rejected=tuple(rejected), nearest=_nearest(spec, policy, rejected)
    )


def _nearest(spec: AttentionSpec, policy: Policy, rejected: list[Refusal]) -> str | None:
    """What would be rewritten in place of a site that is refused: the nearest that some method is known to take."""
    if spec.mask.unknown is not None:
        return spec.mask.nearest
    tried = [refusal.method for refusal in rejected]
    for name in METHODS:
        if name not in (*tried, "exact") and _takes(name, spec, policy):
            return f"methods=['{name}'], which takes it as it is"
    if spec.dropout_p > 0 and any(_takes(name, replace(spec, dropout_p=0.0), policy) for name in tried):
        return "the same without dropout: model.eval(), or a probability of 0"
    apart = replace(spec, mask=replace(spec.mask, segments=False))
    if spec.mask.segments and any(_takes(name, apart, policy) for name in tried):
        return "a padded batch with a sequence per row"
    return None


def _takes(name: str, spec: AttentionSpec, policy: Policy) -> bool:
    try:
        return METHODS[name].refuse(spec, policy) is None
    except ValueError:  # the policy is not meant for this method
        return False


def _reasons(rejected: list[Refusal]) -> str:
    return rejected[0].reason if len(rejected) == 1 else "; ".join(map(str, rejected))


def _min_length(method: Method, spec: AttentionSpec, policy: Policy) -> int | Refusal:
    """The number of keys from which a method runs, or why it does not run at all."""
    if policy.min_length is not None:
        shortest = policy.min_length
    elif policy.methods is not None:
        return 0
    elif spec.device in method.min_length:
        shortest = method.min_length[spec.device]
    else:
        return Refusal(
            method.name,
            f"it was not measured to be faster than exact attention on {spec.device}; "
            f"name it in methods to use it all the same",
        )
    if isinstance(spec.Lk, int) or shortest <= 0 or _decides_at_run_time(method.op):
        return shortest
    return Refusal(method.name, f"min_length={shortest} needs a known number of keys, here it is {spec.Lk}")


def _decides_at_run_time(op: torch._ops.OpOverload) -> bool:
    arguments: list[Any] = op._schema.arguments
    return any(argument.name == "min_length" for argument in arguments)
