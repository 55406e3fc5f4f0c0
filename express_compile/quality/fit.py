"""Plans per head that keep what is asked for: a tolerance of KL, a number of rows, or a speedup.

The samples are halved. On one half every option of every head is profiled (``profile.py``); the other half is *held
out*: the KL of the rewritten model against the exact one is measured there, and the price of a row is moved until that
is within the tolerance. What is promised is what was measured, on tokens that the plan was not fitted to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from statistics import fmean
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import nn

from ..core.call import run_by
from ..core.options import flag
from ..core.plain import about, number, renamed, shown
from ..core.plan import SavedPlan, SavedSite
from ..core.policy import BESIDE_A_PLAN, Policy
from ..core.rows import Rows, to_numbers
from ..core.sites import SiteReport
from ..core.spec import AttentionSpec
from ..kernels.heads import EVERYTHING, METHOD, MOST_LAST, PerHead
from ..planning.devices import device_of
from ..planning.predict import at_length, predict
from ..routes.eager import restore_attention
from ..routes.eager import rewrite_attention as routed
from .budgets import Exactly
from .profile import (
    DEFAULT_OPTIONS,
    Choice,
    Chosen,
    Profile,
    checked_options,
    choose,
    filled,
    found_in,
    joined,
    kl_of,
    least,
    measured,
    named,
    prices,
    profiled_before,
    rewritten,
    rows_of,
    samples_of,
    scores_of,
    tokens_of,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Fit:
    """The outcome of :func:`fit`.

    plan: the plan of every site; ``plan.fitted`` says what it was fitted on. kl: KL(exact || with this plan), mean over
        the late positions of the held-out samples, in nats. rows: those that a late query sees at the length of use,
        mean over heads. exact_rows: those of exact attention. price: of a row (for a speedup: of a millisecond),
        in nats per token, by which heads have chosen, before what was left of the rows or of the time was spent.
    profile: what was measured. chosen: the rows of every head, by site.
    """

    plan: SavedPlan
    kl: float
    rows: float
    exact_rows: float
    price: float
    profile: Profile = field(repr=False)
    chosen: tuple[tuple[Rows, ...], ...] = field(repr=False)

    def __str__(self) -> str:
        counts = Counter(rows for of_heads in self.chosen for rows in of_heads)
        heads = "\n".join(f"  {count:>4} x {rows}" for rows, count in counts.most_common())
        fitted, per = self.plan.fitted, next(site.per for site in self.plan.sites if site.rows)
        return (
            f"KL {self.kl:.4g} nats per token on {sum(fitted['held_out'])} tokens held out; {self.rows:.0f} rows per "
            f"query of {self.exact_rows:.0f} at {fitted['length']} tokens; {per}s:\n{heads}"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a file, which the option ``plan`` takes. Raises ``OSError`` if that cannot be."""
        self.plan.save(path)

    def policy(self, **options: Any) -> Policy:
        """The policy that follows the plan; ``options`` are those that may be given beside one: ``seed``,
        ``strict``, ``cuda_graphs``."""
        return Policy(plan=self.plan, **options)


@torch.no_grad()
def fit(
    model: nn.Module,
    sample: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]],
    *,
    tolerance: float | None = None,
    rows: float | None = None,
    speedup: float | None = None,
    options: Iterable[Rows] = DEFAULT_OPTIONS,
    questions: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    questions_weight: float = 1.0,
    held_out: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    length: int | None = None,
    block: int | None = None,
    last: int = 64,
    query_heads: bool = False,
    progress: bool = False,
    profile: Profile | None = None,
) -> Fit:
    """A plan for every KV head of a causal model, or every query head: the best rows for what they may cost.

    model: as for ``rewrite_attention``, not rewritten; it is left as it was. Its output, or the ``logits`` of it, are
        scores ``[batch, positions, classes]``.
    sample: token ids ``[batch, tokens]``, or several such tensors or mappings of keyword arguments; best as long as
        what the plan is for. What an ``attention_mask`` hides is not judged. Half of them are profiled, the others held
        out: every other sample, of one tensor with several sequences every other sequence, and of a single sequence
        its second half.
    tolerance: at most so much KL(exact || rewritten), nats per token, mean over the late positions (from a quarter of a
        sample on) of what is held out, with as few rows as were found. rows: at most so many rows that a late query
        sees, mean over heads. speedup: attention at least so many times as fast as exact attention, as predicted at
        ``length``. Exactly one of the three; where it is not the tolerance, the KL is only measured.
    options: what a head may have (:data:`.profile.DEFAULT_OPTIONS`). block: queries that see the same rows of the past,
        16, 32, 64 or 128; 128, or that of ``profile``, unless given. last: queries at the end of a call that see
        everything, 0 to 256; counted among the rows.
    query_heads: each query head has rows of its own, for prefill alone: an ``ExpressCache`` holds rows by KV head.
    questions: samples that end with questions and answers about them, in 256 tokens and an eighth of each at most. What
        these last queries lose counts as much as what late queries of ``sample`` lose. They see everything, and without
        questions the last ones of ``sample`` take their place; with ``last=0`` they see what others see, as steps of
        decoding do behind an ``ExpressCache``. questions_weight: they count so many times as much as that.
    held_out: samples to measure the KL on; then all of ``sample`` is profiled. length: tokens that rows and times are
        for; those of the longest sample unless given. progress: show a bar.
    profile: what :func:`.profile.profile` or an earlier fit (``found.profile``) measured on this model; then nothing is
        profiled, all of ``sample`` is held out, and ``options``, ``block`` and heads are the profile's: others, and
        ``query_heads`` beside one by KV head, raise.

    Takes the passes of :func:`.profile.profile`, and for a tolerance about ten more over what is held out, whose exact
    logits are kept. Raises ``ValueError`` or ``TypeError`` for arguments that do not fit, for what no choice of options
    reaches, and where no site can be rewritten.
    """
    asked = _asked(tolerance=tolerance, rows=rows, speedup=speedup)
    if not isinstance(profile, (Profile, NoneType)):
        raise TypeError(f"profile={profile!r}: must be None or a Profile")
    flag("query_heads", query_heads)
    flag("progress", progress)
    block = _block_of(profile, block)
    options = _options_of(profile, options, block)
    base = PerHead(EVERYTHING, block=block, last=last)
    samples = samples_of("sample", sample)
    if profile is not None and held_out is not None:
        raise TypeError("profile and held_out were both given: beside a profile all of sample is held out")
    asking = _questions_of(questions, questions_weight, profile)
    profiled, judged = _halves(samples, held_out) if profile is None else ({}, named("sample", samples))
    if length is None:
        length = profile.tokens if profile is not None else max(map(tokens_of, profiled.values()))
    elif number("length", length, int) < 2:
        raise ValueError(f"length={length!r}: must be 2 tokens or more")
    if rows is not None:
        _check_rows(rows, options, length, base)
    budget = None
    with rewritten(model, base):
        if speedup is not None:
            reports = found_in(model, judged.values())[1]
            _times(speedup, reports, options, length, base)  # known early whether it is reached
        if profile is None:
            how = (options, block, progress, query_heads)
            profile, reports = measured(model, profiled, *how, 0 if asking or not last else MOST_LAST)
            if asking:
                found = measured(model, asking, *how, MOST_LAST if last else 0, True)[0]
                profile = joined([profile, found], (1.0, questions_weight))
                reports = profiled_before(model, judged.values(), profile)
        else:
            reports = profiled_before(model, judged.values(), profile)
            _check_query_heads(query_heads, profile, reports)
        search = _Search(model, judged, profile, reports, length, base)
        if tolerance is not None:
            price = search.by_tolerance(tolerance)
        elif rows is not None:
            price, budget = search.by_rows(rows)
        else:
            assert speedup is not None, "one of them is given"
            price, budget = search.by_speedup(speedup)
        choice = search.choice(price)
        if budget is not None:
            choice = filled(profile, choice, budget, search.cost)
    average = search.rows_of(choice)
    about_questions = {"questions": [tokens_of(x) for x in asking.values()], "questions_weight": questions_weight}
    fitted = {
        "asked": asked,
        "rows": average,
        "length": length,
        "price": price,
        "tokens": [tokens_of(x) for x in profiled.values()] or [profile.tokens] * profile.samples,
        "held_out": [tokens_of(x) for x in judged.values()],
        "options": [x.to_data() for x in options],
        **(about_questions if asking else {}),
    }
    plan = SavedPlan(search.entries(choice), fitted)
    routed(model, plan=plan)
    try:
        kl = search.kl()
    finally:
        restore_attention(model)
    plan = replace(plan, fitted={**fitted, "kl": kl})
    return Fit(plan, kl, average, search.exact_rows, price, search.profile, search.chosen(choice))


class _Search:
    """Choices by the price of a row, or of a millisecond.

    judged: what is held out, by name. reports: of the sites of the profile, and of others. length: tokens that costs
    are for. base: all options but the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        judged: Mapping[str, Any],
        profile: Profile,
        reports: Sequence[SiteReport],
        length: int,
        base: PerHead,
    ) -> None:
        self.model, self.judged, self.profile, self.length, self.base = model, judged, profile, length, base
        self.reports, self.others = reports[: len(profile.sites)], reports[len(profile.sites) :]
        self.rows = rows_of(profile.options, length, base)
        (self.exact_rows,) = rows_of([EVERYTHING], length, base)
        self.cost: Any = self.rows
        with run_by(Exactly()):
            self.exact = {name: self._of(name, scores_of, model) for name in judged}
        self._seen: dict[Choice, float] = {}

    def choice(self, price: float) -> Choice:
        return choose(self.profile, price, self.cost)

    def chosen(self, choice: Choice) -> tuple[tuple[Rows, ...], ...]:
        """The rows of every head, by site."""
        return tuple(tuple(self.profile.options[o] for o in of_heads) for of_heads in choice)

    def rows_of(self, choice: Choice) -> float:
        """Rows that a late query sees, mean over heads."""
        return fmean(self.rows[o] for of_heads in choice for o in of_heads)

    def kl(self) -> float:
        """KL of the model as it runs now, on what is held out."""
        return fmean(self._of(name, kl_of, exact, self.model) for name, exact in self.exact.items())

    def _of(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function of a sample, whose errors name that."""
        with about(name):
            return function(*args, self.judged[name])

    def kl_of(self, choice: Choice) -> float:
        """KL of a choice, measured once."""
        if choice not in self._seen:
            layers = (report.layer for report in self.reports)
            with run_by(Chosen(dict(zip(layers, self.chosen(choice), strict=True)))):
                self._seen[choice] = self.kl()
        return self._seen[choice]

    def by_tolerance(self, tolerance: float) -> float:
        """The greatest price found at which the KL is measured to be within the tolerance."""
        ladder = prices(self.profile, self.cost)[::-1]
        price = least(ladder, lambda price: self.kl_of(self.choice(price)) <= tolerance)
        if price is None:
            raise ValueError(
                f"tolerance={tolerance!r}: the best options of every head have a KL of "
                f"{self.kl_of(self.choice(0.0)):.3g} nats; allowed is more than that, or Rows(everything=True) among "
                "the options"
            )
        return price

    def by_rows(self, rows: float) -> tuple[float, float]:
        """The least price at which there are at most so many rows, and how many all heads may have together."""
        ladder = prices(self.profile, self.cost)
        price = least(ladder, lambda price: self.rows_of(self.choice(price)) <= rows)
        price = ladder[-1] if price is None else price  # a mean of equal numbers may be rounded to more
        return price, rows * sum(len(site.errors) for site in self.profile.sites)

    def by_speedup(self, speedup: float) -> tuple[float, float]:
        """The least price, of a millisecond, at which attention is predicted to be so much faster than exact one, and
        the milliseconds that all heads may take together."""
        times = _times(speedup, self.reports, self.profile.options, self.length, self.base)
        heads = [len(site.errors) for site in self.profile.sites]
        self.cost = [[[x / n for x in its[:-1]]] for its, n in zip(times, heads, strict=True)]
        exact = sum(its[-1] for its in times)

        def reached(price: float) -> float:
            choice = self.choice(price)
            return exact / sum(its[o] for (its,), of_heads in zip(self.cost, choice, strict=True) for o in of_heads)

        ladder = prices(self.profile, self.cost)
        price = least(ladder, lambda price: reached(price) >= speedup)
        return ladder[-1] if price is None else price, exact / speedup

    def entries(self, choice: Choice) -> tuple[SavedSite, ...]:
        """The entries of a plan: those that the planner made, with the rows that were chosen."""
        found = []
        for report, rows in zip(self.reports, self.chosen(choice), strict=True):
            saved = report.saved
            assert saved is not None, "a site that was rewritten"
            own = {METHOD.name: {**saved.options["method_options"][METHOD.name], **PerHead.of_rows(rows)}}
            found.append(
                replace(
                    saved,
                    params={**saved.params, "rows": to_numbers(rows)},
                    options={**saved.options, "method_options": own},
                    rows=rows,
                )
            )
        return (*found, *(report.saved for report in self.others if report.saved is not None))


def _check_query_heads(query_heads: bool, profile: Profile, reports: Sequence[SiteReport]) -> None:
    """Raise ``ValueError`` where plans by query head are asked of a profile by KV head."""
    for site, report in zip(profile.sites, reports, strict=False):
        if query_heads and report.spec is not None and len(site.errors) != report.spec.H:
            words = f"query_heads=True: the profile is by KV head, {len(site.errors)} of them at {site.module}"
            raise ValueError(f"{words}; must be False, or the profile made with query_heads=True")


def _questions_of(questions: Any, weight: float, profile: Profile | None) -> dict[str, Any]:
    """The samples that end with questions, by name."""
    if not 0 < number("questions_weight", weight, int, float) < math.inf:
        raise ValueError(f"questions_weight={weight!r}: must be above 0 and finite")
    if questions is None:
        if weight != 1:
            raise TypeError(f"questions_weight={weight!r}: needs questions, samples that end with them")
        return {}
    if profile is not None:
        raise TypeError("questions and profile were both given: questions are profiled beside the sample")
    return named("questions", samples_of("questions", questions))


def _block_of(profile: Profile | None, block: int | None) -> int:
    """Queries that see the same rows: those of a profile, beside which no others may be given."""
    if profile is None:
        return 128 if block is None else block
    if block not in (None, profile.block):
        raise ValueError(f"block={block!r}: the profile was measured with {profile.block}; must be that, or left out")
    return profile.block


def _options_of(profile: Profile | None, options: Any, block: int) -> tuple[Rows, ...]:
    """What a head may have: that of a profile, beside which no other may be given."""
    listed = checked_options(options, block)
    if profile is None:
        return listed
    if listed not in (DEFAULT_OPTIONS, profile.options):
        raise ValueError(f"options={listed!r}: beside profile, which has those that it measured; must be left out")
    return checked_options(profile.options, block)


def _check_rows(rows: float, options: Sequence[Rows], length: int, base: PerHead) -> None:
    """Raise ``ValueError`` for fewer rows than any option has, before anything is measured."""
    if (cheapest := min(rows_of(options, length, base))) > rows:
        raise ValueError(
            f"rows={rows!r}: the cheapest options take {math.ceil(10 * cheapest) / 10:.1f} rows at {length} tokens; "
            "allowed are that many and more, or cheaper options"
        )


def _times(
    speedup: float, reports: Sequence[SiteReport], options: tuple[Rows, ...], length: int, base: PerHead
) -> list[list[float]]:
    """What every option, and behind them exact attention, is predicted to take at every site, in milliseconds.
    ``ValueError`` where that is not known, or where the cheapest options are not as fast as ``speedup``."""
    try:
        specs = [at_length(x.spec, length) for x in reports if x.verdict == "rewritten" and x.spec is not None]
        of_spec = {spec: _milliseconds(spec, (*options, EVERYTHING), base) for spec in dict.fromkeys(specs)}
    except ValueError as error:
        raise renamed(f"speedup={speedup!r}", error) from None
    times = [of_spec[spec] for spec in specs]
    exact, cheapest = sum(its[-1] for its in times), sum(min(its[:-1]) for its in times)
    if exact < speedup * cheapest:
        raise ValueError(
            f"speedup={speedup!r}: the cheapest options are predicted to be {exact / cheapest:.2f} times as fast as "
            f"exact attention at {length} tokens; allowed is at most that, or cheaper options"
        )
    return times


def _milliseconds(spec: AttentionSpec, options: Sequence[Rows], base: PerHead) -> list[float]:
    """What every option is predicted to take with all heads; ``ValueError`` where that is not known."""
    device = device_of(spec.device)
    times = [
        None if device is None else predict(METHOD.name, spec, Policy(methods=(replace(base, rows=x),)), device)
        for x in options
    ]
    known = [x for x in times if x is not None]
    if len(known) < len(options):
        raise ValueError(
            f"how fast {METHOD.name} is on this {spec.device} for {spec.dtype} is not known; python -m express_compile "
            "calibrate measures it, and tolerance and rows do without"
        )
    return known


def rewrite_attention(
    model: Model,
    policy: Policy | None = None,
    *,
    sample: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    tolerance: float | None = None,
    rows: float | None = None,
    speedup: float | None = None,
    query_heads: bool = False,
    questions: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    **options: Any,
) -> Model:
    how: dict[str, Any] = dict(tolerance=tolerance, rows=rows, speedup=speedup, query_heads=query_heads)
    how |= {"questions": questions}
    if sample is None:
        for name, value in how.items():
            if value is not None and value is not False:
                raise TypeError(f"{name}={shown(value)}: needs sample=input_ids, tokens to fit a plan on")
        return routed(model, policy, **options)
    if policy is not None:
        raise TypeError("policy and sample were both given: a plan that is fitted to a sample decides for every site")
    others = {name: value for name, value in options.items() if name in BESIDE_A_PLAN}
    if unknown := sorted(set(options) - set(others)):
        *names, last = *how, *BESIDE_A_PLAN
        raise TypeError(f"{', '.join(unknown)}: not allowed beside sample; allowed are {', '.join(names)} and {last}")
    return routed(model, fit(model, sample, **how).policy(**others))


rewrite_attention.__doc__ = f"""{routed.__doc__}
    sample: token ids ``[batch, tokens]``, or several such tensors or mappings of keyword arguments: a plan for every KV
        head is fitted to them by :func:`fit`, and followed. tolerance, rows, speedup: what the plan is to keep,
        exactly one of them. query_heads: the plan has rows for every query head, as that of :func:`fit`, for prefill
        alone. questions: samples that end with questions, to which it is fitted, too. Beside a sample only ``seed``,
        ``strict`` and ``cuda_graphs`` may be given.
    """


# --------------------------------------------------------------------------------------------------------- inputs


def _asked(**targets: float | None) -> dict[str, float]:
    """What is asked for, by name."""
    given = {name: x for name, x in targets.items() if x is not None}
    if len(given) != 1:
        words = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "nothing asked for"
        raise ValueError(f"{words}: exactly one of {', '.join(targets)} must be given")
    for name, value in given.items():
        if not 0 < number(name, value, int, float) < math.inf:
            raise ValueError(f"{name}={value!r}: must be above 0 and finite")
    return given


def _halves(samples: list[Any], held_out: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is profiled and what is held out, by name."""
    whole = named("sample", samples)
    if held_out is not None:
        return whole, named("held_out", samples_of("held_out", held_out))
    if len(samples) > 1:
        names = list(whole)
        return {name: whole[name] for name in names[::2]}, {name: whole[name] for name in names[1::2]}
    (sample,) = samples
    if not isinstance(sample, torch.Tensor):
        raise ValueError("held_out=None: of one mapping nothing can be held out; give several samples, or held_out")
    if sample.shape[0] > 1:
        return {"sample, sequences [::2]": sample[::2]}, {"sample, sequences [1::2]": sample[1::2]}
    half = sample.shape[1] // 2
    if half < 2:
        raise ValueError(f"sample: {sample.shape[1]} tokens; must be 4 or more, of which the second half is held out")
    return {f"sample, tokens [:{half}]": sample[:, :half]}, {f"sample, tokens [{half}:]": sample[:, half:]}
