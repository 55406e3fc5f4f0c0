"""Plans per KV head that keep what is asked for: a tolerance of KL, a number of rows, or a speedup.

The samples are halved. On one half every option of every head is profiled (``profile.py``); the other half is *held
out*: the KL of the rewritten model against the exact one is measured there, and the price of a row is moved until that
is within the tolerance. What is promised is what was measured, on tokens that the plan was not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import nn

from ..core.call import run_by
from ..core.method import METHODS
from ..core.plain import number
from ..core.plan import SavedPlan
from ..core.policy import Policy
from ..core.rows import Rows
from ..core.sites import record_sites
from ..core.spec import layer_key
from ..routes.eager import restore_attention
from ..routes.eager import rewrite_attention as routed
from .budgets import logits_of, mean_kl
from .profile import (
    DEFAULT_OPTIONS,
    METHOD,
    Choice,
    Chosen,
    Exact,
    Profile,
    checked_options,
    choose,
    late,
    least,
    measured,
    prices,
    rewritten,
    rows_of,
    samples_of,
    tokens_of,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Fit:
    """The outcome of :func:`fit`.

    plan: the plan of every site; ``plan.fitted`` says what it was fitted on. kl: KL(exact || with this plan), mean over
        the late positions of the held-out samples, in nats. rows: those that a late query sees at the length of use,
        mean over KV heads. exact_rows: those of exact attention. price: of a row, in error, by which heads have chosen.
    profile: what was measured. chosen: the rows of every KV head, by site.
    """

    plan: SavedPlan
    kl: float
    rows: float
    exact_rows: float
    price: float
    profile: Profile = field(repr=False)
    chosen: tuple[tuple[Rows, ...], ...] = field(repr=False)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a file, which the option ``plan`` takes. Raises ``OSError`` if that cannot be."""
        self.plan.save(path)

    def policy(self, **options: Any) -> Policy:
        """The policy that follows the plan; ``options`` are those that may be given beside one: seed and strict."""
        return Policy(plan=self.plan, **options)


@torch.no_grad()
def fit(
    model: nn.Module,
    sample: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]],
    *,
    tolerance: float | None = None,
    rows: float | None = None,
    options: Iterable[Rows] = DEFAULT_OPTIONS,
    held_out: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    length: int | None = None,
    progress: bool = False,
) -> Fit:
    """A plan for every KV head of a causal model: the best rows for what they may cost.

    model: as for ``rewrite_attention``, not rewritten; it is left as it was. Its output, or the ``logits`` of it, are
        scores ``[batch, positions, classes]``.
    sample: token ids ``[batch, tokens]``, or several such tensors or mappings of keyword arguments; best as long as
        what the plan is for. Half of them are profiled, the others held out: every other sample, of one tensor with
        several sequences every other sequence, and of a single sequence its second half.
    tolerance: at most so much KL(exact || rewritten), nats per token, mean over the late positions (from a quarter of a
        sample on) of what is held out, with as few rows as were found. rows: at most so many rows that a late query
        sees, mean over KV heads. Exactly one of the two.
    options: what a head may have (:data:`.profile.DEFAULT_OPTIONS`). held_out: samples to measure the KL on; then all
        of ``sample`` is profiled. length: tokens that the rows are counted for; those of the longest sample unless
        given. progress: show a bar.

    Takes the passes of :func:`.profile.profile`, and for a tolerance about ten more over what is held out, whose exact
    logits are kept. Raises ``ValueError`` or ``TypeError`` for arguments that do not fit, for what no choice of options
    reaches, and where no site can be rewritten.
    """
    _check_target(tolerance, rows)
    options = checked_options(options)
    profiled, judged = _halves(samples_of("sample", sample), held_out)
    length = max(map(tokens_of, profiled)) if length is None else number("length", length, int)
    if length < 2:
        raise ValueError(f"length={length!r}: must be 2 tokens or more")
    with rewritten(model):
        search = _Search(model, judged, measured(model, profiled, options, progress), [rows_of(x, length) for x in options])
        price = search.by_tolerance(tolerance) if tolerance is not None else search.by_rows(rows, length)
    choice = search.choice(price)
    plan, kl = search.planned(choice)
    average = search.rows(choice)
    fitted = {
        **({"rows_allowed": rows} if tolerance is None else {"tolerance": tolerance}),
        "kl": kl,
        "rows": average,
        "length": length,
        "price": price,
        "tokens": [tokens_of(x) for x in profiled],
        "held_out": [tokens_of(x) for x in judged],
        "options": [x.to_data() for x in options],
    }
    everything = rows_of(Rows(everything=True), length)
    return Fit(SavedPlan(plan.sites, fitted), kl, average, everything, price, search.profile, search.chosen(choice))


class _Search:
    """Choices by the price of a row. cost: rows of every option at the length of use."""

    def __init__(self, model: nn.Module, judged: Sequence[Any], profile: Profile, cost: list[float]) -> None:
        self.model, self.judged, self.profile, self.cost = model, judged, profile, cost
        self.prices = prices(profile, cost)
        with run_by(Exact()):
            self.exact = [logits_of(model, batch) for batch in judged]
        self._seen: dict[Choice, float] = {}

    def choice(self, price: float) -> Choice:
        return choose(self.profile, price, self.cost)

    def chosen(self, choice: Choice) -> tuple[tuple[Rows, ...], ...]:
        """The rows of every KV head, by site."""
        return tuple(tuple(self.profile.options[o] for o in of_heads) for of_heads in choice)

    def rows(self, choice: Choice) -> float:
        """Rows that a late query sees, mean over KV heads."""
        return fmean(self.cost[o] for of_heads in choice for o in of_heads)

    def kl(self) -> float:
        """KL of the model as it runs now, on what is held out."""
        found = []
        for exact, batch in zip(self.exact, self.judged, strict=True):
            found.append(mean_kl(exact, logits_of(self.model, batch), late(exact.shape[1])))
        return fmean(found)

    def kl_of(self, choice: Choice) -> float:
        """KL of a choice, measured once."""
        if choice not in self._seen:
            layers = (layer_key(site.module, site.index) for site in self.profile.sites)
            with run_by(Chosen(dict(zip(layers, self.chosen(choice), strict=True)))):
                self._seen[choice] = self.kl()
        return self._seen[choice]

    def by_rows(self, rows: float, length: int) -> float:
        """The least price at which there are at most so many rows."""
        price = least(self.prices, lambda price: self.rows(self.choice(price)) <= rows)
        if price is None:
            cheapest = self.rows(self.choice(self.prices[-1]))
            raise ValueError(
                f"rows={rows!r}: the cheapest options take {cheapest:.1f} rows at {length} tokens; allowed are that "
                "many and more, or cheaper options"
            )
        return price

    def by_tolerance(self, tolerance: float) -> float:
        """The greatest price found at which the KL is measured to be within the tolerance."""
        price = least(self.prices[::-1], lambda price: self.kl_of(self.choice(price)) <= tolerance)
        if price is None:
            raise ValueError(
                f"tolerance={tolerance!r}: the best options of every head have a KL of "
                f"{self.kl_of(self.choice(0.0)):.3g} nats; allowed is more than that, or Rows(everything=True) among "
                "the options"
            )
        return price

    def planned(self, choice: Choice) -> tuple[SavedPlan, float]:
        """The plan of a choice, as the planner makes it, and its KL."""
        routed(self.model, policy_of(self.profile, self.chosen(choice)))
        try:
            with record_sites() as reports:
                kl = self.kl()
        finally:
            restore_attention(self.model)
        return SavedPlan.of(report.saved for report in reports if report.saved is not None), kl


def policy_of(profile: Profile, chosen: Sequence[Sequence[Rows]]) -> Policy:
    """The policy in which every KV head has what was chosen for it."""
    chosen_at: dict[str, list[Sequence[Rows]]] = {}
    for site, rows in zip(profile.sites, chosen, strict=True):
        if site.index != len(chosen_at.setdefault(site.module, [])):
            raise ValueError
        chosen_at[site.module].append(rows)
    options = METHODS[METHOD].options
    modules = {path: {"methods": [options(rows=rows[0])]} for path, rows in chosen_at.items()}
    return Policy(methods=(METHOD,), modules=modules)


def rewrite_attention(
    model: Model,
    policy: Policy | None = None,
    *,
    sample: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    tolerance: float | None = None,
    rows: float | None = None,
    **options: Any,
) -> Model:
    if sample is None:
        for name, value in {"tolerance": tolerance, "rows": rows}.items():
            if value is not None:
                raise TypeError(f"{name}={value!r}: needs sample=input_ids, tokens to fit a plan on")
        return routed(model, policy, **options)
    if policy is not None:
        raise TypeError("policy and sample were both given: a plan that is fitted to a sample decides for every site")
    others = {name: value for name, value in options.items() if name in ("seed", "strict")}
    if unknown := sorted(set(options) - set(others)):
        raise TypeError(f"{', '.join(unknown)}: not allowed beside sample; allowed are tolerance, rows, seed and strict")
    return routed(model, fit(model, sample, tolerance=tolerance, rows=rows).policy(**others))


rewrite_attention.__doc__ = f"""{routed.__doc__}
    sample: token ids ``[batch, tokens]``, or several such tensors or mappings of keyword arguments: a plan for every KV
        head is fitted to them by :func:`fit`, and followed. tolerance, rows: what the plan is to keep, exactly one of
        them. Beside a sample only ``seed`` and ``strict`` may be given.
    """


# --------------------------------------------------------------------------------------------------------- inputs


def _check_target(tolerance: float | None, rows: float | None) -> None:
    given = {name: x for name, x in {"tolerance": tolerance, "rows": rows}.items() if x is not None}
    if len(given) != 1:
        words = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ValueError(f"{words}: exactly one of tolerance and rows must be given")
    for name, value in given.items():
        if not 0 < number(name, value, int, float) < math.inf:
            raise ValueError(f"{name}={value!r}: must be above 0 and finite")


def _halves(samples: list[Any], held_out: Any) -> tuple[list[Any], list[Any]]:
    """What is profiled and what is held out."""
    if held_out is not None:
        return samples, samples_of("held_out", held_out)
    if len(samples) > 1:
        return samples[::2], samples[1::2]
    (sample,) = samples
    if not isinstance(sample, torch.Tensor):
        raise ValueError("held_out=None: of one mapping nothing can be held out; give several samples, or held_out")
    if sample.shape[0] > 1:
        return [sample[::2]], [sample[1::2]]
    half = sample.shape[1] // 2
    if half < 2:
        raise ValueError(f"sample: {sample.shape[1]} tokens; must be 4 or more, of which the second half is held out")
    return [sample[:, :half]], [sample[:, half:]]
