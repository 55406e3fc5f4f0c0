"""Decide what happens at a site: which method runs there, and every other method's reason not to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.local import shared_names
from ..core.method import METHODS, Refusal
from ..core.plain import about, canonical
from ..core.plan import Plan, SavedSite, Verdict, facts_of
from ..core.policy import Policy, Unmet
from ..core.rows import describe
from ..core.sites import NOT_MATCHED, SiteReport
from ..core.spec import AttentionSpec, Mask, Site, known_equal
from .devices import device_of
from .predict import LONGEST, MARGIN, crossover, predicted, wins, without_padding

DEFAULT_METHODS = ("express", "exact")


@dataclass(frozen=True)
class Question:
    """What the planner wants to know of a site.

    module, index: its module path, and its place among the sites of that module.
    form, spec, refusal, nearest: as in :class:`~express_compile.passes.site.AttentionSite`.
    gradient: why it counts as part of a training run, for ``Policy.training``; None where it does not.
    graphs: whether it runs inside a CUDA graph, which spares the host its work.
    """

    module: str = ""
    index: int = 0
    form: str = ""
    spec: AttentionSpec | None = None
    refusal: str | None = None
    gradient: str | None = None
    graphs: bool = False
    nearest: str | None = None

    @property
    def known(self) -> AttentionSpec:
        """Its spec; of a site that was not refused."""
        assert self.spec is not None, self.refusal
        return self.spec

    @property
    def site(self) -> Site:
        """What methods are told of it."""
        return Site(self.known, self.module, self.index)


# Sites to try a policy on before any real one is known.
_PROBES = tuple(
    AttentionSpec(
        B=1, H=1, H_kv=1, Lq=1 << 20, Lk=1 << 20, D=64, Dv=64, dtype=torch.float32, device="cpu", scale=0.125,
        mask=Mask(causal=causal),
    )
    for causal in (True, False)
)  # fmt: skip


def check_policy(policy: Policy) -> None:
    """Raise ``ValueError`` or ``TypeError`` for methods that do not exist, for values that one of those named does not
    take, and for options that none of them would see."""
    _check_values(policy)
    layers: list[tuple[str, Mapping[str, Any]]] = [("", policy.local())]
    layers += [(f"modules[{glob!r}]: ", given) for glob, given in policy.modules.items()]
    for i, (where, given) in enumerate(layers):
        named = [x or DEFAULT_METHODS for x in _in_force("methods", i, layers)]
        _check_effects(where, given, named, _in_force("method_options", i, layers))


def _in_force(name: str, i: int, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
    """What option ``name`` may be where layer ``i`` is in force: later layers go over earlier ones."""
    return [given[name] for _, given in layers[i if name in layers[i][1] else 0 :] if name in given]


def _check_effects(
    where: str, given: Mapping[str, Any], named: list[tuple[str, ...]], own: list[Mapping[str, Mapping[str, Any]]]
) -> None:
    """Raise ``ValueError`` for an option of methods that no method sees: ``named`` are the methods that may run, and
    ``own`` the options of their own that they may have, which go before."""
    names = dict.fromkeys(name for methods in named if methods[0] != "exact" for name in methods if name != "exact")
    if not names:  # all exact, for which what others take may stand by
        return
    shown = " or ".join(dict.fromkeys(f"methods={list(methods)!r}" for methods in named))
    for name, options in given.get("method_options", {}).items():
        if options and name not in names:
            raise ValueError(f"{where}method_options[{name!r}]={options!r}: does nothing beside {shown}")
    shared = {name: value for name, value in given.items() if name in shared_names()}
    if given.get("budget", Policy.budget) != Policy.budget:
        shared["budget"] = given["budget"]
    flat = {name: METHODS[name].options.for_all() for name in names}
    left = {name: [x for x in flat[name] if any(flat[name][x] not in o.get(name, ()) for o in own)] for name in names}
    for option, value in shared.items():
        if not any(option in of_method for of_method in left.values()):
            before = [name for name in names if option in flat[name]]
            why = f", as the own options of {' and '.join(before)} go before" if before else ""
            allowed = "; ".join(f"{', '.join(x) or 'none'} for {name}" for name, x in left.items())
            raise ValueError(f"{where}{option}={value!r}: does nothing beside {shown}{why}; allowed are {allowed}")


def _check_values(policy: Policy) -> None:
    known = tuple(METHODS)
    for name in policy.methods or ():
        if name not in known:
            raise ValueError(
                f"methods={list(policy.methods or ())!r}: unknown method {name!r}; allowed are {', '.join(known)}"
            )
    for name in policy.method_options:
        if name not in known:
            raise ValueError(f"method_options: unknown method {name!r}; allowed are {', '.join(known)}")
        policy.given(name)
    policy.tabled()  # whether a function gives rows
    local = replace(policy, budget=Policy.budget) if callable(policy.budget) else policy
    for name in dict.fromkeys((*(policy.methods or DEFAULT_METHODS), *policy.method_options)):
        if name == "exact":  # it has no op, and takes everything
            continue
        probe = next((probe for probe in _PROBES if METHODS[name].why_not(probe, local) is None), None)
        if probe is not None:
            METHODS[name].params(Site(probe), local)
    parts = {f"modules[{g!r}]": replace(policy, modules={}, **given) for g, given in policy.modules.items()}
    for site in () if policy.plan is None else policy.plan.sites:
        if site.method not in known:
            raise ValueError(f"plan[{site.module!r}]: unknown method {site.method!r}; allowed are {', '.join(known)}")
        parts[f"plan[{site.module!r}]"] = policy.of_entry(site)
    for name, part in parts.items():
        with about(name):
            _check_values(part)


def methods_of(policy: Policy, path: str | None = None) -> tuple[str, ...]:
    """The methods that calls of the sites of the module at ``path`` may have, or of any module."""
    if policy.plan is not None:
        entries = policy.plan.sites if path is None else policy.plan.at(path)
        return tuple(dict.fromkeys(entry.method for entry in entries)) or ("exact",)
    if path is not None:
        return policy.at(path).methods or DEFAULT_METHODS
    given = [given["methods"] for given in policy.modules.values() if given.get("methods")]
    return tuple(dict.fromkeys(name for names in (policy.methods or DEFAULT_METHODS, *given) for name in names))


def plan(spec: AttentionSpec, policy: Policy) -> Plan:
    """The decision for one site of the root module; sizes in ``spec`` may be symbolic.

    Verdicts: ``rewritten``; ``exact`` where exact attention is the choice (it was asked for, the sequence is too
    short, or nothing was asked for and nothing else is known to be better); ``refused`` where a named method
    cannot be used or the mask is not proven. With ``policy.strict`` a refused site raises ``ValueError``. Raises
    ``ValueError`` or ``TypeError`` for a policy that names what does not exist.
    """
    check_policy(policy)
    decision = answer(Question(spec=spec), policy)
    require([("this attention site", decision)], policy)
    return decision


def unmatched(paths: Iterable[str], policy: Policy) -> tuple[str, ...]:
    """What ``policy`` says about modules of which none is among ``paths``, the modules that have sites."""
    paths = set(paths)
    found = {glob for path in paths for glob in policy.globs(path)}
    planned = () if policy.plan is None else dict.fromkeys(site.module for site in policy.plan.sites)
    return (
        *(f"modules[{glob!r}]" for glob in policy.modules if glob not in found),
        *(words for path, words in _named(policy.method_options).items() if path not in paths),
        *(
            f"modules[{glob!r}]: {words}"
            for glob, given in policy.modules.items()
            for path, words in _named(given.get("method_options", {})).items()
            if path not in paths or glob not in policy.globs(path)
        ),
        *(f"plan[{path!r}]" for path in planned if path not in paths),
    )


def require_sites(paths: Iterable[str], policy: Policy) -> None:
    """Raise ``ValueError`` if ``policy.strict`` and a whole model, whose sites are in the modules at ``paths``, has
    none, or something in the policy matches none of them."""
    paths = set(paths)
    if policy.strict and not paths:
        raise Unmet(
            "strict=True: no attention was found in this graph; allowed are graphs that call "
            "torch.nn.functional.scaled_dot_product_attention, nn.MultiheadAttention or nn.TransformerEncoderLayer, or "
            "write attention out around a softmax (set strict=False to compile it as it is)"
        )
    require_matches(paths, policy)


def _named(method_options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The module paths that options of methods speak of, and how they are shown."""
    return {
        path: f"method_options[{name!r}]{words}"
        for name, options in method_options.items()
        for path, words in METHODS[name].options.named(options).items()
    }


def require_matches(paths: Iterable[str], policy: Policy) -> None:
    """Raise ``ValueError`` if ``policy.strict`` and something in it matches none of the modules that have sites."""
    paths = sorted(set(paths))
    missing = unmatched(paths, policy) if policy.strict else ()
    if missing:
        raise Unmet(
            f"strict=True: {', '.join(missing)} match{'' if len(missing) > 1 else 'es'} no attention site; allowed are "
            f"those for {', '.join(path or '(root)' for path in paths) or 'no module at all: there is no site here'}"
        )


def require_modules(paths: Iterable[str], policy: Policy) -> None:
    """Raise ``ValueError`` if ``policy.strict`` and something in it matches none of the modules that a model has."""
    missing = unmatched(paths, policy) if policy.strict else ()
    if missing:
        raise Unmet(
            f"strict=True: {', '.join(missing)} match{'' if len(missing) > 1 else 'es'} no module of the model; "
            "allowed are globs for the paths of model.named_modules()"
        )


def require(planned: Iterable[tuple[str, Plan | SiteReport]], policy: Policy) -> None:
    """Raise ``ValueError`` with a line per refused site if ``policy.strict``; each site comes with its name."""
    refused = [(name, decision) for name, decision in planned if decision.verdict == "refused"]
    if not policy.strict or not refused:
        return
    width = max(len(name) for name, _ in refused)
    hints = [f"; nearest supported form: {decision.nearest}" if decision.nearest else "" for _, decision in refused]
    lines = [f"  {name:<{width}}  {x.reason}{hint}" for (name, x), hint in zip(refused, hints, strict=True)]
    raise Unmet(
        f"strict=True: {len(refused)} attention site{'s were' if len(refused) > 1 else ' was'} refused "
        "(allowed is strict=False, which leaves them exact)\n" + "\n".join(lines)
    )


def answer(question: Question, policy: Policy) -> Plan:
    """The decision for one site; as :func:`plan`, for a policy that :func:`check_policy` has seen, and never strict.

    It is for all heads of the layer, so that processes that share them decide alike; each one runs :meth:`Method.part`.
    """
    spec = question.spec
    if spec is None or spec.shard is None:
        return _answer(question, policy)
    decision = _answer(replace(question, spec=spec.whole), policy)
    if decision.verdict == "rewritten":
        heads, cycle = spec.H // spec.H_kv * spec.shard.heads, METHODS[decision.method].cycle(decision.params)
        if heads % cycle:
            reason = f"{decision.method} gives every {cycle} heads their parts in turn; a process has {heads} of them"
            return Plan(
                "exact", "refused", reason, rejected=(Refusal(decision.method, reason),), policy=decision.policy
            )
    return decision


def _answer(question: Question, policy: Policy) -> Plan:
    if policy.plan is not None:
        return _follow(question, policy)
    local = policy.at(question.module)
    decision = _left_alone(question, policy, local)
    if decision is None:
        if question.refusal is not None:
            return replace(_refused(question.refusal, local, question.nearest), policy=local)
        local = local.tabled()
        decision = _decide(question, local)
        if question.form == "softmax" and decision.method == "exact" and "exact" in (local.methods or ()):
            reason = f"{decision.reason}; as scaled_dot_product_attention"
            decision = replace(decision, verdict="rewritten", reason=reason)
    return replace(decision, policy=local)


def _left_alone(question: Question, policy: Policy, local: Policy) -> Plan | None:
    """The plan of a site that the policy of its module leaves as it is, whatever it computes; None for another."""
    if not local.training and question.gradient is not None:
        return Plan("exact", "exact", f"training=False, and {question.gradient}")
    givers = [f"modules[{glob!r}]" for glob in policy.globs(question.module) if "methods" in policy.modules[glob]]
    if local.methods is not None and local.methods[0] == "exact":
        if question.form not in ("softmax", NOT_MATCHED) or (givers and question.refusal is not None):
            return Plan("exact", "exact", f"{(givers or ['methods'])[-1]} names 'exact' first")
    if not local.causal_only or question.refusal is not None or question.known.mask.causal:
        return None
    mask = question.known.mask
    if mask.unknown is not None:
        return _refused(f"causal_only=True, and its mask is not proven: {mask.unknown}", local, mask.nearest)
    return Plan("exact", "exact", f"causal_only=True, and it is not causal (its mask: {mask})")


def _follow(question: Question, policy: Policy) -> Plan:
    """The decision that a saved plan has for a site, proven again; of several the first that can be followed."""
    assert policy.plan is not None
    entries = sorted(policy.plan.at(question.module, question.index), key=lambda entry: entry.verdict != "rewritten")
    if not entries:
        return Plan("exact", "refused", "it is not in the saved plan")
    decisions = [_follow_entry(question, entry, policy.of_entry(entry)) for entry in entries]
    verdicts = ("rewritten", "exact", "refused")
    return min(decisions, key=lambda decision: verdicts.index(decision.verdict))


def _follow_entry(question: Question, entry: SavedSite, own: Policy) -> Plan:
    if entry.verdict != "rewritten":
        return Plan("exact", "exact", "the saved plan leaves it exact", policy=own)
    decision, changes, refusal = answer(question, own), [], None
    if question.refusal is None:
        changes += _changes(entry.facts, facts_of(question.known))
        refusal = METHODS[entry.method].why_not(question.known, decision.policy or own)
    if decision.verdict == "rewritten":
        changes += _changes({"method": entry.method}, {"method": decision.method})
        if entry.params:  # version 1 did not keep what it would take today
            changes += _changes(entry.params, canonical(decision.params))
        if entry.rows and entry.rows != decision.rows:
            changes.append(f"it saw {describe(entry.rows)} and would see {describe(decision.rows)}")
        if not changes:
            return replace(decision, reason=f"{decision.reason}; as saved")
    elif decision.verdict == "exact" and not changes and refusal is None:
        return decision  # by choice, such as for want of keys
    reason = f"the saved plan has {entry.method} here, but {'; '.join(changes) or decision.reason}"
    rejected = (Refusal(entry.method, reason),)
    return Plan("exact", "refused", reason, rejected=rejected, policy=own)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; from which length a method runs is a matter of speed and may."""
    names = sorted({*saved, *now} - {"min_length"})
    words = [(name, saved.get(name, "nothing"), now.get(name, "nothing")) for name in names]
    return [f"{name} was {before} and is {after}" for name, before, after in words if [before] != [after]]


def _refused(reason: str, policy: Policy, nearest: str | None = None) -> Plan:
    rejected = tuple(Refusal(name, reason) for name in policy.methods or DEFAULT_METHODS if name != "exact")
    return Plan("exact", "refused", reason, rejected=rejected, nearest=nearest)


def _decide(question: Question, policy: Policy) -> Plan:
    spec, names = question.known, policy.methods or DEFAULT_METHODS
    if names[0] == "exact":
        return Plan("exact", "exact", "methods names 'exact' first")
    lonely = _without_keys(spec)
    possible: list[Plan] = []
    rejected: list[Refusal] = []
    slower = False
    times: dict[str, float] = {}
    for name in dict.fromkeys(names):
        if name == "exact":
            continue
        refusal = METHODS[name].why_not(spec, policy) if lonely is None else Refusal(name, lonely)
        if refusal is not None:
            rejected.append(refusal)
            continue
        # beside exact attention the faster of the two is wanted, unless the policy says from which length on
        beside = "exact" in names and policy.min_length is None and not METHODS[name].changes
        found = _faster(name, question, policy) if beside else _as_asked(name, question, policy)
        if isinstance(found, Refusal):
            rejected.append(found)
            continue
        times |= found.predicted_ms
        if found.method == "exact":
            rejected.append(Refusal(name, found.reason))
            slower = True
        else:
            possible.append(found)
    if possible:
        first, *others = sorted(possible, key=lambda plan: plan.predicted_ms.get(plan.method, 0.0))
        rejected += (Refusal(other.method, f"{first.method} is preferred; {other.reason}") for other in others)
        return replace(first, rejected=tuple(rejected), predicted_ms=times)
    allowed = "exact" in names and (spec.mask.unknown is None or policy.methods is not None)
    verdict: Verdict = "exact" if slower or allowed else "refused"
    nearest = _nearest(spec, policy, rejected) if verdict == "refused" else None
    return Plan("exact", verdict, _reasons(rejected), rejected=tuple(rejected), predicted_ms=times, nearest=nearest)


def _as_asked(name: str, question: Question, policy: Policy) -> Plan | Refusal:
    """The plan for a method that was asked for; exact where it is asked for or was measured to be faster."""
    spec, site, method, shortest = question.known, question.site, METHODS[name], policy.min_length
    loss = method.loses(spec, policy) if shortest is None else None
    if loss is not None:
        return Plan("exact", "exact", loss)
    reason = "; ".join(filter(None, (_kind(spec), method.changes)))
    made = Plan(name, "rewritten", reason, dict(method.params(site, policy)), rows=method.heads(site, policy))
    if shortest and isinstance(spec.Lk, int):
        if spec.Lk < shortest:
            return Plan("exact", "exact", f"{spec.Lk} keys are fewer than min_length {shortest}")
    elif shortest:
        return _from_length(made, spec, shortest)
    return made


def _faster(name: str, question: Question, policy: Policy) -> Plan | Refusal:
    """The plan for a method where it is predicted to be faster than exact attention, else exact."""
    spec, site, method, graphs = question.known, question.site, METHODS[name], question.graphs
    device = device_of(spec.device)
    times = None if device is None else predicted((name, "exact"), spec, policy, device, graphs)
    if device is None or times is None:
        where = spec.device if device is None else f"{device.name} at {spec.dtype}"
        return Refusal(
            name,
            f"how fast it is on {where} is not known: python -m express_compile calibrate measures it; "
            "methods without 'exact' use it all the same",
        )
    bare = without_padding((name, "exact"), spec)
    padding = f", {'both' if name in bare else 'the latter'} without padding" if bare else ""
    always = replace(policy, min_length=0)
    made = Plan(name, "rewritten", _kind(spec), dict(method.params(site, always)), rows=method.heads(site, always))
    if isinstance(spec.Lk, int):
        words = f"predicted {times[name]:.3g} ms, exact attention {times['exact']:.3g} ms{padding}"
        if not wins(times, name):
            return Plan("exact", "exact", words, predicted_ms=times)
        return replace(made, reason=f"{made.reason}; {words}", predicted_ms=times)
    shortest = crossover(name, "exact", spec, policy, device, graphs, MARGIN)
    if shortest is None:
        words = f"predicted to be no faster than exact attention up to {LONGEST:,} keys{padding}"
        return Plan("exact", "exact", words)
    made = replace(made, reason=f"{made.reason}, predicted to be faster than exact{padding}")
    return _from_length(made, spec, shortest)


def _from_length(made: Plan, spec: AttentionSpec, shortest: int) -> Plan | Refusal:
    """The plan for a site with an unknown number of keys, exact for fewer than ``shortest``."""
    if not METHODS[made.method].takes("min_length"):
        return Refusal(made.method, f"min_length={shortest} needs a known number of keys, here it is {spec.Lk}")
    reason = f"{made.reason}; exact below {shortest} keys, decided at run time"
    return replace(made, reason=reason, params={**made.params, "min_length": shortest})


def _kind(spec: AttentionSpec) -> str:
    kind = f"{spec.mask} attention" if str(spec.mask) != "none" else "attention without a mask"
    return f"{kind}, with {' and '.join(spec.forms.values())}" if spec.forms else kind


def _without_keys(spec: AttentionSpec) -> str | None:
    """Why a query sees no key at all, or there is no query; None where that is not so or not known."""
    for size, what in ((spec.Lq, "queries"), (spec.Lk, "keys")):
        if known_equal(size, 0):
            return f"it has no {what}"
    mask = spec.mask
    if mask.unknown is None and mask.causal and isinstance(mask.offset, int) and mask.offset < 0:
        return f"its causal mask has offset {mask.offset}: the first queries see no key"
    return None


def _nearest(spec: AttentionSpec, policy: Policy, rejected: list[Refusal]) -> str | None:
    """What would be rewritten in place of a site that is refused: the nearest that some method is known to take."""
    if spec.mask.unknown is not None:
        return spec.mask.nearest
    tried = [refusal.method for refusal in rejected]
    for name in METHODS:
        if name not in (*tried, "exact") and not METHODS[name].changes and _accepts(name, spec, policy):
            return f"methods=['{name}'], which takes it as it is"
    if spec.dropout_p > 0 and any(_accepts(name, replace(spec, dropout_p=0.0), policy) for name in tried):
        return "the same without dropout: model.eval(), or a probability of 0"
    apart = replace(spec, mask=replace(spec.mask, segments=False))
    if spec.mask.segments and any(_accepts(name, apart, policy) for name in tried):
        return "a padded batch with a sequence per row"
    return None


def _accepts(name: str, spec: AttentionSpec, policy: Policy) -> bool:
    try:
        return METHODS[name].why_not(spec, policy) is None
    except ValueError:  # the policy is not meant for this method
        return False


def _reasons(rejected: list[Refusal]) -> str:
    return rejected[0].reason if len(rejected) == 1 else "; ".join(map(str, rejected))
