"""The profile of a model: what each of its heads would lose with each option of rows, and the choice by it.

One exact pass over sample tokens. At every site that can have rows per head, each option is attended to by all heads
side by side, on the activations of the exact model:

    error[site, head, option] = sum_i |W (o_hat_i - o_i)_head|^2 / sum_i |W o_i|^2

over the *late* queries i, from a quarter of the sample on; ``(..)_head`` are the outputs of the query heads of one KV
head, or of one query head alone, and W is the linear layer that takes the output of the site, the identity where none
was found to. What an error does to the model differs between sites: ``nats[site]`` is the KL of the output where this
site alone has one of the options, over the error of that; several samples count alike (:func:`joined`). With ``last``
queries at the end of a sample that see everything, their KL counts like that of the late ones before them: they lose
what the keys and values of later layers have lost, which depends on other sites, and on the last one not at all. Of the
options of a head that one is chosen that minimises ``nats * error + price * cost`` (:func:`choose`), so one number, the
price of a row, moves the choice of all heads from the best options to the cheapest.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from ..core.call import Call, Op, run_by
from ..core.options import flag
from ..core.plain import about, entries, from_json, number
from ..core.policy import Policy
from ..core.rows import Rows, heads, to_numbers
from ..core.sites import SiteReport, record_sites
from ..kernels.heads import EVERYTHING, MOST_LAST, PerHead, rows_seen
from ..passes.place import named_modules
from ..routes.capture import captures_of
from ..routes.eager import is_rewritten, restore_attention, rewrite_attention
from .budgets import (
    Exactly,
    checked_batches,
    counted_from,
    logits_of,
    lower_hull,
    mean_kl,
    real_positions,
    slope,
)

DEFAULT_OPTIONS = (
    *(Rows(sinks=32, recent=recent) for recent in (64, 256, 512, 1024, 1536)),
    *(Rows(sinks=32, recent=recent, thinned=thinned) for recent, thinned in ((256, 128), (512, 256))),
    *(Rows(32, *rows) for rows in ((256, 64, 64), (256, 256, 256), (1024, 512, 256), (1024, 1024, 1024))),
    *(Rows(32, x, protected=n) for x, n in ((128, 128), (512, 256), (1024, 1024), (2048, 1024), (4096, 2048))),
    *(Rows(sinks=32, recent=recent, selected=n) for recent, n in ((128, 4), (256, 32), (256, 64), (512, 128))),
    EVERYTHING,
)
"""What a head may have unless other options are given: windows, thinned, protected and selected rows, and all. Those of
46 (``examples/bench/plans.py``) without which plans lose least: the error that is chosen by is 5% more than with all,
mean over SmolLM2 at 8,192 tokens and Qwen2.5-Coder-0.5B at 16,384 and 32,768, from 700 to 4,032 rows, by KV head and by
query head."""

_CHUNK = 512  # queries whose outputs are compared at a time

Choice = tuple[tuple[int, ...], ...]
"""For every site, the place among the options of what each head has."""


@dataclass(frozen=True)
class SiteProfile:
    """What was measured at one site.

    module, index: which one it is: its module path, and its place among the sites of that module.
    through: path of the linear layer through which errors were measured; None: of the output of the site itself.
    errors: relative squared error of its output by KV head, or by query head, and option, ``[heads][options]``.
    nats: KL(exact || with an option at this site alone), nats per token, over the error of all its heads; 0 where no
        option had an error. Both of several samples, and of late queries and the last ones: as :func:`joined` says.

    Raises ``TypeError`` or ``ValueError`` that name the field, its value and what is allowed.
    """

    module: str
    index: int
    through: str | None
    errors: tuple[tuple[float, ...], ...]
    nats: float = 1.0

    def __post_init__(self) -> None:
        for name, kinds in (("module", (str,)), ("through", (str, NoneType))):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be the path of a module")
        _check_from("index", self.index, 0, int)
        _check_from("nats", self.nats, 0, int, float)
        if not self.errors or len({len(own) for own in self.errors}) != 1:
            raise ValueError(f"errors={self.errors!r}: must list an error of every option for every head")
        for error in itertools.chain(*self.errors):
            _check_from("errors", error, 0, int, float)

    @property
    def weighted(self) -> torch.Tensor:
        """``nats * errors``, float64 ``[heads, options]``."""
        return torch.tensor(self.errors, dtype=torch.float64) * self.nats


@dataclass(frozen=True)
class Profile:
    """The outcome of :func:`profile`.

    options: what each head may have. tokens: how long the longest sample was; samples: how many there were.
    rows: rows that a late query sees on average, by option, for that many tokens. sites: in order of execution.
    block: queries that saw the same rows of the past.

    Raises ``TypeError`` or ``ValueError`` that name the field, its value and what is allowed.
    """

    options: tuple[Rows, ...]
    tokens: int
    samples: int
    rows: tuple[float, ...]
    sites: tuple[SiteProfile, ...] = field(repr=False)
    block: int

    def __post_init__(self) -> None:
        n = len(self.options)
        if not n or len(set(self.options)) < n:
            raise ValueError(f"options={self.options!r}: must hold at least one Rows, and each once")
        _check_from("tokens", self.tokens, 2, int)
        _check_from("samples", self.samples, 1, int)
        PerHead(EVERYTHING, block=self.block)
        for rows in self.rows:
            _check_from("rows", rows, 0, int, float)
        if len(self.rows) != n:
            raise ValueError(f"rows={self.rows!r}: must be a number for each of the {n} options")
        if not self.sites or len({(site.module, site.index) for site in self.sites}) < len(self.sites):
            raise ValueError(f"sites: {len(self.sites)}; must be one or more, and each once")
        for i, site in enumerate(self.sites):
            if len(site.errors[0]) != n:
                raise ValueError(f"sites[{i}]: errors={site.errors!r}: must be of {n} options for every head")

    def to_json(self) -> str:
        """The profile as a JSON object."""
        return json.dumps({**asdict(self), "options": [x.to_data() for x in self.options]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of :meth:`to_json`. Raises ``TypeError`` or ``ValueError`` for other text."""
        return from_json("profile", text, cls._from_data)

    @classmethod
    def _from_data(cls, data: Any) -> Profile:
        with about("profile"):
            if isinstance(data, Mapping) and "sites" in data and "block" not in data:
                raise ValueError(
                    "block: missing, as in files of versions that did not write it; must be the block that was given "
                    'when it was measured: "block": 128 if none was'
                )
            sites = _listed("sites", entries(cls, data)["sites"])
            given = {**data, "options": heads(data["options"]), "rows": tuple(_listed("rows", data["rows"]))}
            return cls(**{**given, "sites": tuple(_site(f"sites[{i}]", x) for i, x in enumerate(sites))})


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name}={value!r}: must be a list")
    return value


def _site(where: str, data: Any) -> SiteProfile:
    with about(where):
        errors = tuple(tuple(_listed("errors", own)) for own in _listed("errors", entries(SiteProfile, data)["errors"]))
        return SiteProfile(**{**data, "errors": errors})


def _check_from(name: str, value: Any, least: int, *types: type) -> None:
    if not least <= number(name, value, *types) < math.inf:
        raise ValueError(f"{name}={value!r}: must be {least} or more, and finite")


# --------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def profile(
    model: nn.Module,
    sample: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]],
    options: Iterable[Rows] = DEFAULT_OPTIONS,
    *,
    block: int = 128,
    query_heads: bool = False,
    last: int = 0,
    only_last: bool = False,
    progress: bool = False,
) -> Profile:
    """What every KV head of a model, or every query head, loses with every option of rows, on sample inputs.

    model: as for ``rewrite_attention``, not rewritten; it is left as it was. Its output, or the ``logits`` of it, are
        scores ``[batch, positions, classes]``. Sites that the method ``heads`` refuses are left out.
    sample: token ids ``[batch, tokens]``, or several such tensors or mappings of keyword arguments, of which the errors
        are averaged; as long as what the rows are for, if that can be.
    options: what a head may have. block: queries that see the same rows of the past, 16, 32, 64 or 128. query_heads:
        each query head has rows of its own, not each KV head with all of its query heads. last: queries at the end of a
        sample that see everything, 0 to 256, and an eighth of the sample at most: what they lose by the keys and values
        of others counts as much as what those lose. only_last: what those lose does not count, as where the samples end
        with questions that are all they are there for; with ``last=0`` these are the last 256 queries, an eighth of the
        sample at most, and see what others see, as steps of decoding do behind an ``ExpressCache``; they are no
        padding. progress: show a bar.

    Takes one exact pass per sample, with ``options`` calls more at each site, a pass for each site, and a short one
    that finds the linear layers. Memory: that of the pass, two outputs of one site, 512 positions of one linear layer's
    output for each head, and the scores of one sample twice. Raises ``ValueError`` or ``TypeError`` for arguments
    that do not fit, and where no site can be rewritten.
    """
    options = checked_options(options, block)
    samples = named("sample", samples_of("sample", sample))
    flag("only_last", only_last)
    with rewritten(model, PerHead(EVERYTHING, block=block, last=last)):
        return measured(model, samples, options, block, progress, query_heads, last, only_last)[0]


def measured(
    model: nn.Module, samples: Mapping[str, Any], options: tuple[Rows, ...], block: int, progress: bool = False,
    query_heads: bool = False, last: int = 0, only_last: bool = False,
) -> tuple[Profile, list[SiteReport]]:  # fmt: skip
    """:func:`profile` of a model that is :func:`rewritten`, on samples by their names; the reports of its sites, in
    order, and then of others."""
    finder, _ = found_in(model, samples.values())
    ran: list[SiteReport] = []
    tokens = max(map(tokens_of, samples.values()))
    rows = tuple(rows_of(options, tokens, PerHead(EVERYTHING, block=block)))
    few = [(x, o) for o, x in enumerate(options) if not x.everything]
    fewest = min(few, key=lambda option: rows[option[1]], default=None)
    first, each = _first_of_last if only_last and not last else late, []
    if first is _first_of_last:
        for name, batch in samples.items():
            if not real_positions(batch, _tokens(batch))[:, -1].all():
                words = "the last tokens are padding, and only they count; must be tokens, with padding before them"
                raise ValueError(f"{name}: {words}")
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("profile", total=len(samples) * len(finder.sites) * (len(options) + 1))
        for name, batch in samples.items():
            meter = _Meter(options, finder.projections, query_heads, first, lambda: bar.advance(task))
            with about(name), record_sites() as reports, run_by(meter):
                exact = scores_of(model, batch)
            ran += reports
            of = {x.layer: x for x in _by_place(reports, True).values()}
            errors = meter.errors()
            with about(name):
                ratios = _ratios(model, batch, exact, errors, fewest, last, only_last, lambda: bar.advance(task))
                sites = {
                    layer: SiteProfile(
                        saved.module, saved.index, finder.paths.get(layer), tuple(map(tuple, own.tolist()))
                    )
                    for layer, own in errors.items()
                    if (saved := of[layer].saved) is not None
                }
                for nats in ratios if sites else ():
                    own_nats = tuple(replace(site, nats=nats[layer]) for layer, site in sites.items())
                    each.append(Profile(options, tokens, 1, rows, own_nats, block))
    if not each:
        reasons = "; ".join(sorted({x.reason for x in ran})) or "it has none"
        raise ValueError(f"model: no site can have rows for each head: {reasons}")
    found = replace(joined(each), samples=len(samples))
    return found, _in_order(found, ran)


def joined(profiles: Sequence[Profile], counts: Sequence[float] | None = None) -> Profile:
    """The profile of several samples of which each was profiled alone, with the same options. counts: for how much each
    of them counts, above 0; as much as another unless given.

    ``nats * errors`` is the mean of theirs, each in units of what its sites lose with all options on average, and the
    result in the mean of these units over samples that lose something: samples count as they are told to, however sure
    the model is of what they say. ``errors`` of a site are their mean, in proportion to its weights ``nats`` in these
    units. Where a sample does not run a site it loses nothing there. Sites are in the order in which they are met.
    """
    by_place = [{(site.module, site.index): site for site in x.sites} for x in profiles]
    first = {place: site for own in reversed(by_place) for place, site in own.items()}
    order = dict.fromkeys(place for own in by_place for place in own)
    silent = {
        place: replace(x, errors=((0.0,) * len(x.errors[0]),) * len(x.errors), nats=0.0) for place, x in first.items()
    }
    all_of = [[own.get(place, silent[place]) for place in order] for own in by_place]  # [samples][sites]
    each = np.array([[site.nats for site in own] for own in all_of])
    errors = [np.array([own[i].errors for own in all_of]) for i in range(len(order))]
    lost = sum(each[:, i] * own.sum(1).mean(1) for i, own in enumerate(errors))  # by sample
    times, sites = np.array([1.0] * len(profiles) if counts is None else counts), []
    unit = np.average(lost, weights=times * (lost > 0)) if lost.any() else 0.0
    weights = each * np.divide(unit, lost, out=np.zeros_like(lost), where=lost > 0)[:, None]
    for place, own, of_site in zip(order, errors, weights.T, strict=True):
        mean = np.average(own, 0, weights=of_site * times if of_site.any() else times)
        nats = float(np.average(of_site, weights=times))
        sites.append(replace(first[place], errors=tuple(map(tuple, mean.tolist())), nats=nats))
    longest = max(profiles, key=lambda x: x.tokens)
    return replace(longest, samples=sum(x.samples for x in profiles), sites=tuple(sites))


def _ratios(
    model: nn.Module,
    batch: Any,
    exact: torch.Tensor,
    errors: Mapping[int, torch.Tensor],
    fewest: tuple[Rows, int] | None,
    last: int,
    only_last: bool,
    advance: Callable[[], None],
) -> list[dict[int, float]]:
    """For every site: the KL of the model where this site alone has the option with the fewest rows, over the error of
    that; 0 where all are exact. It is much the same with any option, and of this one KL is the largest: with a mild
    one it may be what other sums of a half precision make of a model, at sites that hardly matter many times as much.
    That of late positions, and apart from it, or only, of the ``last`` ones, whose queries see everything.
    """
    n = exact.shape[1]
    at_end = n - _first_of_last(n)
    last = min(last, at_end if only_last else n // 8)
    counted = _late_and_last(batch, exact, last or at_end)[-1:] if only_last else _late_and_last(batch, exact, last)
    found = [dict.fromkeys(errors, 0.0) for _ in counted]
    if fewest is None:
        return found
    option, place = fewest
    for layer, of_heads in errors.items():
        if error := float(of_heads[:, place].sum()):
            with run_by(Chosen({layer: [option]}, last)):
                scores = scores_of(model, batch)
            for nats, positions in zip(found, counted, strict=True):
                nats[layer] = mean_kl(exact, scores, positions) / error
        advance()
    return found


def _late_and_last(batch: Any, scores: torch.Tensor, last: int) -> list[torch.Tensor]:
    """Of the positions of ``scores`` that are no padding the late ones, and with ``last`` those less that many of every
    sequence at its end, and these: bool ``[batch, positions]``."""
    counted = counted_from(batch, scores, late(scores.shape[1]))
    at_end = counted & (counted.flip(1).cumsum(1).flip(1) <= last)
    return [x for x in (counted & ~at_end, at_end) if x.any()]


def profiled_before(model: nn.Module, samples: Iterable[Any], found: Profile) -> list[SiteReport]:
    """The reports of a model that is :func:`rewritten` and has a profile, as :func:`measured` gives them. Raises
    ``ValueError`` for a profile of another model."""
    return _in_order(found, found_in(model, samples)[1])


def found_in(model: nn.Module, samples: Iterable[Any]) -> tuple[_Finder, list[SiteReport]]:
    """The sites of a model, each once, and the linear layers that take their outputs, by a short pass for each sample,
    as what runs may depend on the input."""
    finder = _Finder(model)
    with record_sites() as reports, run_by(finder), finder.hooked():
        for sample in samples:
            model(sample[:, :_CHUNK]) if isinstance(sample, torch.Tensor) else model(**sample)
    return finder, [*_by_place(reports, True).values(), *_by_place(reports, False).values()]


def _by_place(reports: Iterable[SiteReport], rewritten: bool) -> dict[tuple[str, int], SiteReport]:
    """The reports of the sites that are rewritten, or of those that are not, each once."""
    return {
        (x.saved.module, x.saved.index): x
        for x in reports
        if x.saved is not None and (x.verdict == "rewritten") == rewritten
    }


def _in_order(found: Profile, reports: Sequence[SiteReport]) -> list[SiteReport]:
    """The reports of the sites of a profile, in its order, and then those of sites that are left exact."""
    of = _by_place(reports, True)
    for site in found.sites:
        report = of.get((site.module, site.index))
        spec = None if report is None else report.spec
        if spec is None or len(site.errors) not in (spec.H_kv, spec.H):
            what = "no such site" if spec is None else f"{spec.H_kv} KV heads and {spec.H} query heads there"
            raise ValueError(
                f"profile: it has {len(site.errors)} heads at {site.module}, and the model has {what}; must be a "
                "profile of this model"
            )
    return [
        *(of[site.module, site.index] for site in found.sites),
        *_by_place(reports, False).values(),
    ]


@contextmanager
def rewritten(model: nn.Module, own: PerHead) -> Iterator[None]:
    """While active, the sites of a model that can have rows for each head are rewritten, to what ``own`` says."""
    if isinstance(model, nn.Module) and is_rewritten(model):
        raise ValueError("model: is rewritten; call restore_attention(model) first")
    rewrite_attention(model, Policy(methods=(own,)))
    try:
        yield
    finally:
        restore_attention(model)


def with_rows(call: Call, rows: Sequence[Rows], **others: Any) -> Call:
    """The call of an op of :data:`METHOD` with other rows, one for each KV head, for each query head or for all, and
    other options."""
    return replace(call, options={**call.options, "rows": to_numbers(rows), **others})


class Chosen(Exactly):
    """A runner that gives every head what was chosen for it, by layer key; everything where there is no choice.
    ``last``: queries at the end that see everything, where that is not what the call says."""

    def __init__(self, rows: Mapping[int, Sequence[Rows]], last: int | None = None) -> None:
        self.rows, self.others = rows, {} if last is None else {"last": last}

    def __call__(self, op: Op, call: Call) -> Any:
        chosen = self.rows.get(call.layer)
        return super().__call__(op, call) if chosen is None else with_rows(call, chosen, **self.others).run(op)


class _Finder(Exactly):
    """Finds the linear layer that takes the output of each site, by what it is given: the same numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.linear = {path: x for path, x in named_modules(model) if isinstance(x, nn.Linear)}
        captured = {x for capture in captures_of(model).values() for x in capture.module.modules()}
        # graphs tell of theirs by themselves; what a subclass does, as one with quantized weights, is not known
        self.hookable = [x for x in self.linear.values() if x not in captured and type(x).forward is nn.Linear.forward]
        self.sites: set[int] = set()
        self.projections: dict[int, torch.Tensor] = {}
        self.paths: dict[int, str] = {}
        self._last: tuple[int, torch.Tensor] | None = None

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        self.sites.add(call.layer)
        self._last = call.layer, exact.transpose(1, 2).flatten(2)

    def see_linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Called for every linear layer that may take the output of a site, with its input and its weight."""
        if self._last is None:
            return
        layer, output = self._last
        path = next((path for path, module in self.linear.items() if module.weight is weight), None)
        if path is not None and x.numel() == output.numel() and torch.equal(x.reshape(output.shape), output):
            self.projections[layer], self.paths[layer] = weight, path
            self._last = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While active, the linear layers of the model tell what they are given."""

        def hook(module: nn.Linear, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and _is_plain(module.weight, args[0]):
                self.see_linear(args[0], module.weight)

        hooks = [x.register_forward_pre_hook(hook) for x in self.hookable]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def _is_plain(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a weight holds numbers where ``x`` is: neither quantized, nor shared out, nor loaded for each call."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.device == x.device


class _Meter(Exactly):
    """Runs everything exactly, and adds up what each option would be off by, on the device; ``first`` gives the first
    query that counts, of so many tokens."""

    def __init__(
        self, options: tuple[Rows, ...], projections: Mapping[int, torch.Tensor], query_heads: bool,
        first: Callable[[int], int], advance: Callable[[], None],
    ) -> None:  # fmt: skip
        self.options, self.projections, self.query_heads, self.advance = options, projections, query_heads, advance
        self.first = first
        self.off: dict[int, torch.Tensor] = {}
        self.whole: dict[int, torch.Tensor] = {}

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        heads = (call.query if self.query_heads else call.key).shape[1]
        weight = self.projections.get(call.layer)
        first = max(0, self.first(call.Lk) - (call.Lk - call.Lq))
        tokens = call.Lk if call.padding is None else max(int(call.padding.sum(1).max()), 1)
        off = []
        for option, is_exact in zip(self.options, _see_all(self.options, tokens, call.options["block"]), strict=True):
            # what it is off by is rounding, which would weigh as much as what a longer sample loses
            tried = exact if is_exact else with_rows(call, [option], last=0).run(op)[0]
            off.append(_squares(tried, exact, first, heads, weight))
            self.advance()
        self.off[call.layer] = self.off.get(call.layer, 0) + torch.stack(off, 1)
        self.whole[call.layer] = self.whole.get(call.layer, 0) + _squares(exact, None, first, 1, weight)

    def errors(self) -> dict[int, torch.Tensor]:
        """float64 ``[heads, options]`` on the CPU, by layer key; 0 where the output of the whole site is 0."""
        return {
            layer: (off / self.whole[layer]).where(self.whole[layer] != 0, 0).cpu() for layer, off in self.off.items()
        }


def _squares(
    x: torch.Tensor, y: torch.Tensor | None, first: int, groups: int, weight: torch.Tensor | None
) -> torch.Tensor:
    """The sum of squares of ``W (x - y)`` over queries from ``first`` on, by group of heads: float64 ``[groups]``."""
    total = torch.zeros(groups, dtype=torch.float64, device=x.device)
    by_group = None if weight is None else weight.detach().unflatten(1, (groups, -1)).transpose(0, 1)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    for i in range(first, x.shape[2], _CHUNK):
        part = x[:, :, i : i + _CHUNK].to(kind)
        part = part if y is None else part - y[:, :, i : i + _CHUNK].to(kind)
        part = part.unflatten(1, (groups, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)  # [groups, B n, G Dv]
        part = part if by_group is None else part @ by_group.to(kind).mT
        total += part.square().sum((1, 2), dtype=torch.float64)
    return total


def late(tokens: int) -> int:
    """The first of the queries that count: a quarter of the tokens, at least 1."""
    return min(max(1, tokens // 4), tokens - 1)


def _first_of_last(tokens: int) -> int:
    """The first of the queries at the end that alone count where none of them sees everything."""
    return tokens - max(1, min(MOST_LAST, tokens // 8))


def rows_of(options: Sequence[Rows], tokens: int, base: PerHead) -> list[float]:
    """Rows that a late query of a prefill of ``tokens`` tokens sees on average, by option, beside what ``base`` says of
    all of them."""
    seen = (rows_seen(replace(base, rows=(option,)), tokens)[0, late(tokens) :] for option in options)  # one at a time
    return [float(x.mean()) for x in seen]


@functools.lru_cache
def _see_all(options: tuple[Rows, ...], tokens: int, block: int) -> list[bool]:
    """Whether all late queries of so many tokens see all of them, by option."""
    base = PerHead(EVERYTHING, block=block)
    (every,) = rows_of([EVERYTHING], tokens, base)
    return [rows == every for rows in rows_of(options, tokens, base)]


# -------------------------------------------------------------------------------------------------------- choice


def choose(profile: Profile, price: float, cost: Any = None) -> Choice:
    """For every head the option that minimises ``nats * error + price * cost``; of equal ones the cheapest.

    price: of a unit of cost, 0 or more. cost: of every option, ``[options]`` or ``[sites, 1, options]``; the profile's
    rows unless given.
    """
    if not 0 <= number("price", price, int, float) < float("inf"):
        raise ValueError(f"price={price!r}: must be 0 or more and finite")
    found = []
    for site, its in zip(profile.sites, _costs(profile, cost), strict=True):
        cheapest = its[0].argsort(stable=True)
        paid = (site.weighted + price * its)[:, cheapest]
        found.append(tuple(cheapest[paid.argmin(1)].tolist()))
    return tuple(found)


def filled(profile: Profile, choice: Choice, budget: float, cost: Any = None) -> Choice:
    """``choice`` with what it leaves of ``budget``, a sum over all heads, spent where that takes off most error for its
    cost, until nothing fits: a price alone makes steps as long as the dearest option.

    cost: as for :func:`choose`.
    """
    heads = [len(of_heads) for of_heads in choice]
    costs = _costs(profile, cost).expand(-1, max(heads), -1)
    its = torch.cat([costs[i, :n] for i, n in enumerate(heads)])  # [heads of all sites, options]
    error = torch.cat([site.weighted for site in profile.sites])
    at = torch.tensor([o for of_heads in choice for o in of_heads])[:, None]
    left = budget - float(its.gather(1, at).sum())
    while True:
        more, less = its - its.gather(1, at), error.gather(1, at) - error
        gain = torch.where((less > 0) & (more <= left), less / more.clamp(min=1e-12), 0.0)
        head, option = divmod(int(gain.argmax()), gain.shape[1])
        if gain[head, option] <= 0:
            return tuple(tuple(x.tolist()) for x in at[:, 0].split(heads))
        left -= float(more[head, option])
        at[head] = option


def _costs(profile: Profile, cost: Any) -> torch.Tensor:
    cost = torch.as_tensor(profile.rows if cost is None else cost, dtype=torch.float64)
    return cost.expand(len(profile.sites), 1, -1)


def prices(profile: Profile, cost: Any = None) -> list[float]:
    """All prices at which the choice of some head changes, ascending, 0 first: :func:`choose` at each of them has the
    cheaper option of the two. Those of the lower convex hulls of (cost, error) of every head."""
    found = {0.0}
    for site, its in zip(profile.sites, _costs(profile, cost).tolist(), strict=True):
        for errors in site.weighted.tolist():
            hull = lower_hull((x, error, None) for x, error in zip(its[0], errors, strict=True))
            found.update(map(slope, hull, hull[1:]))
    # what rounding makes of a price must not fall below the slope that it is
    return sorted(x * (1 + 1e-9) for x in found)


def least(prices: Sequence[float], fits: Callable[[float], bool]) -> float | None:
    """The least of the ascending prices that ``fits``, if all behind one that does fit; None if not even the last one
    does. Asks ``log2(prices) + 1`` times."""
    low, high = 0, len(prices) - 1
    if not fits(prices[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(prices[middle]) else (middle + 1, high)
    return prices[high]


# --------------------------------------------------------------------------------------------------------- inputs


def samples_of(name: str, sample: Any) -> list[torch.Tensor | Mapping[str, Any]]:
    """The samples that are given: one tensor of token ids, or several of them or of mappings. Raises as it says."""
    samples = checked_batches([sample] if isinstance(sample, torch.Tensor) else sample, name)
    for i, batch in enumerate(samples):
        if tokens_of(batch) < 2:
            raise ValueError(f"{name}[{i}]: {tokens_of(batch)} token; must be 2 or more")
        first = late(tokens_of(batch))
        if not real_positions(batch, _tokens(batch))[:, first:].any():
            words = f"has padding only from position {first} on, where its scores count"
            raise ValueError(f"{name}[{i}]: {words}; must have tokens there")
    return samples


def named(name: str, samples: Sequence[Any]) -> dict[str, Any]:
    """Samples by the names that errors have for them."""
    return {f"{name}[{i}]": sample for i, sample in enumerate(samples)}


def tokens_of(batch: torch.Tensor | Mapping[str, Any]) -> int:
    """How many tokens the sequences of a sample have, of an encoder and a decoder those of the decoder."""
    return int(_tokens(batch).shape[1])


def _tokens(batch: torch.Tensor | Mapping[str, Any]) -> torch.Tensor:
    """What the tokens of a sample are given as, ``[batch, tokens, ...]``."""
    found = [batch] if isinstance(batch, torch.Tensor) else [batch.get(name) for name in INPUTS]
    tokens = next((x for x in found if isinstance(x, torch.Tensor) and x.dim() > 1), None)
    if tokens is None:
        raise ValueError(f"sample: a mapping must hold a tensor {', '.join(INPUTS[:-1])} or {INPUTS[-1]}")
    return tokens


INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds")
"""What the tokens of a sample may be called; ``labels`` before the inputs of an encoder that they may be for."""


def scores_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """What a model makes of a sample: scores ``[batch, positions, classes]``; ``ValueError`` for other outputs, and
    for those of fewer positions than there are tokens."""
    scores, tokens = logits_of(model, batch), tokens_of(batch)
    if scores.shape[1] < tokens:
        raise ValueError(
            f"model: it gives scores of {scores.shape[1]} positions for {tokens} tokens; must be those of all, as the "
            "late ones among them are what is judged"
        )
    return scores


def kl_of(exact: torch.Tensor, model: nn.Module, batch: Any) -> float:
    """KL(exact || the model as it runs now) on a sample, mean over its late positions, of which padding is none."""
    return mean_kl(exact, scores_of(model, batch), counted_from(batch, exact, late(exact.shape[1])))


def checked_options(options: Any, block: int) -> tuple[Rows, ...]:
    """The options, each once, in order, all of which a head may have in blocks of so many queries."""
    if isinstance(options, (str, bytes, Rows)) or not isinstance(options, Iterable):
        raise TypeError(f"options={options!r}: must be a sequence of Rows")
    listed = tuple(options)
    for option in listed:
        if not isinstance(option, Rows):
            raise TypeError(f"options: {option!r} must be a Rows")
    found = tuple(dict.fromkeys(listed))
    if not found:
        raise ValueError("options=(): must hold at least one Rows")
    PerHead(EVERYTHING, block=block)
    with about("options"):
        PerHead(found, block=block)
    return found
