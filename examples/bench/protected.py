"""Which score should choose protected rows: what it catches of a needle that nobody asked for yet, recall, and KL.

    python examples/bench/protected.py --out results.csv                                 # about an hour of a CPU core
    python examples/bench/protected.py --part mass --length 2048 --scores key random     # a taste

Rows that leave the window compete for places before anybody asks for them, so a score may read keys, values and past
queries, and no query to come. As in ``kernels/select/contest.py`` it is given once, in contests of 256 rows, by the
rows of the contest and sums over all rows until then, so that a stream keeps what a prefill keeps. Scores:

* ``key``: minus the cosine similarity to the running mean key (KeyDiff, arXiv 2504.15364; what ``protected`` means
  today); ``value``: of values; ``key + value``: the sum of both; ``mean of w``: over w neighbours in the contest;
* ``clusters``: minus the largest cosine similarity to the mean key of any contest until then; ``leverage``: squared
  Mahalanobis distance of the value from the running mean; ``output``: the norm of the value after the output
  projection; ``expected``: logarithm of the attention that queries like those of the past would give (Expected
  Attention, arXiv 2510.00636); ``random``.

``mass`` asks exact attention, of needles that it finds: which share of the mass that the queries of the answer give to
the needle lies on the places (``needle``), and of the mass that 32 queries before the question give to all rows that
competed (``queries``), as means over cases. ``judge`` runs the model with a uniform policy whose places are given by a
score, and with no query exact.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from measures import Captured
from models import haystacks, judged_texts
from needles import NOISE, Case, cases
from plans import MODELS, SINKS, Bench, Judge, base, in_words, recalled, summary
from records import add_arguments, show

from express_compile.core.call import Call
from express_compile.core.rows import Rows
from express_compile.kernels import express, heads
from express_compile.kernels.launch import Random
from express_compile.kernels.select.contest import CONTEST, contest

RECENT = 256
TASKS = ("single", "among four")
LATE = slice(-400, -144, 8)
"""Queries before the question, which is no longer than 144 tokens with its answer."""


# -------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class Left:
    """What left the window, in contests of C rows.

    key, value: ``[B, H_kv, m, C, .]``, with the mean of all rows to the end of each contest, sinks included,
    ``[B, H_kv, m, 1, .]``; query: like them; projection: that of the output, ``[d, H, Dv]``. The last two are for the
    scores that read them. sinks: key, value and query before the first contest.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    sinks: tuple[torch.Tensor, ...]
    query: torch.Tensor | None = None
    query_mean: torch.Tensor | None = None
    projection: torch.Tensor | None = None

    @classmethod
    def of(
        cls, key: torch.Tensor, value: torch.Tensor, sinks: int, contests: int,
        query: torch.Tensor | None = None, projection: torch.Tensor | None = None,
    ) -> Left:  # fmt: skip
        """Of all rows ``[B, H_kv, n, .]`` of a layer, of which ``sinks`` and so many contests count."""
        tokens = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (key, value, query) if x is not None]
        rows = [x[:, :, sinks : sinks + CONTEST * contests].unflatten(2, (contests, CONTEST)) for x in tokens]
        firsts = tuple(x[:, :, :sinks] for x in tokens)
        means = [
            _running(first.sum(2), own.sum(3), sinks)[:, :, :, None] for first, own in zip(firsts, rows, strict=True)
        ]
        return cls(*rows[:2], *means[:2], firsts, *rows[2:], *means[2:], projection=projection)

    def moments(self, which: int) -> torch.Tensor:
        """The running covariance of key, value or query: ``[B, heads, m, D, D]``."""
        rows, mean = ((self.key, self.key_mean), (self.value, self.value_mean), (self.query, self.query_mean))[which]
        assert rows is not None and mean is not None
        first = self.sinks[which]
        return _running(first.mT @ first, rows.mT @ rows, first.shape[2]) - mean.mT @ mean


def _running(first: torch.Tensor, each: torch.Tensor, sinks: int) -> torch.Tensor:
    """Means over all rows until the end of each contest, by sums over the sinks and over each contest."""
    counts = sinks + CONTEST * torch.arange(1, each.shape[2] + 1, device=each.device)
    return (first[:, :, None] + each.cumsum(2)) / counts.view(-1, *[1] * (each.ndim - 3))


def _cosine(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(x, mean, dim=-1)


def of_key(left: Left) -> torch.Tensor:
    return -_cosine(left.key, left.key_mean)


def of_value(left: Left) -> torch.Tensor:
    return -_cosine(left.value, left.value_mean)


def of_both(left: Left) -> torch.Tensor:
    return of_key(left) + of_value(left)


def mean_of(score: Callable[[Left], torch.Tensor], width: int) -> Callable[[Left], torch.Tensor]:
    """The mean over ``width`` neighbours, of those that are in the same contest."""

    def of(left: Left) -> torch.Tensor:
        scores = score(left)
        flat = scores.flatten(0, -2)[:, None]
        pooled = torch.nn.functional.avg_pool1d(flat, width, 1, width // 2, count_include_pad=False)
        return pooled.view_as(scores)

    return of


def clusters(left: Left) -> torch.Tensor:
    means = torch.nn.functional.normalize(left.key.mean(3), dim=-1)
    near = torch.nn.functional.normalize(left.key, dim=-1) @ means[:, :, None].mT  # [B, H_kv, m, C, m]
    later = torch.ones(near.shape[2], near.shape[4], dtype=torch.bool, device=near.device).triu(1)
    return -near.masked_fill(later[:, None], -1).amax(-1)


def leverage(left: Left) -> torch.Tensor:
    spread = left.moments(1)
    ridge = 1e-3 * spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    factor = torch.linalg.cholesky(spread + ridge * torch.eye(spread.shape[-1]).to(spread))
    return torch.linalg.solve_triangular(factor, (left.value - left.value_mean).mT, upper=False).square().sum(-2)


def output(left: Left) -> torch.Tensor:
    assert left.projection is not None
    by_group = left.projection.to(left.value).unflatten(1, (left.value.shape[1], -1)).flatten(2).permute(1, 2, 0)
    by_group = by_group.unflatten(1, (-1, left.value.shape[-1]))  # [H_kv, g, Dv, d]
    gram = (by_group @ by_group.mT).sum(1)[:, None]  # |W v|^2 = v' W'W v, over all query heads
    return ((left.value @ gram) * left.value).sum(-1)


def expected(left: Left) -> torch.Tensor:
    assert left.query_mean is not None
    groups, scale = left.query_mean.shape[1] // left.key.shape[1], left.key.shape[-1] ** -0.5
    key = left.key.repeat_interleave(groups, 1)
    mean = (key @ left.query_mean.mT)[..., 0] * scale
    spread = ((key @ left.moments(2)) * key).sum(-1) * scale**2
    return (mean + spread / 2).unflatten(1, (-1, groups)).logsumexp(2)


def random(left: Left) -> torch.Tensor:
    return torch.rand(left.key.shape[:-1], device=left.key.device)


SCORES: dict[str, Callable[[Left], torch.Tensor]] = {
    "key": of_key,
    "value": of_value,
    "key + value": of_both,
    **{f"key + value, mean of {w}": mean_of(of_both, w) for w in (3, 5, 9)},
    "key, mean of 5": mean_of(of_key, 5),
    "clusters": clusters,
    "leverage": leverage,
    "output": output,
    "expected": expected,
    "random": random,
}
"""Each gives ``[B, H_kv, m, C]``; the larger, the more worth a place."""
JUDGED = ("key", "key + value", "key + value, mean of 5")


# -------------------------------------------------------------------------------------------------------------- mass


def run_of_answer(case: Case) -> range:
    """Where the answer stands in the prompt. Raises ``ValueError`` unless it does once."""
    found = [i for i in range(len(case.prompt)) if case.prompt[i : i + len(case.answer)] == case.answer]
    if len(found) != 1:
        raise ValueError(f"{case.task}, {case.haystack}: the answer stands in the prompt {len(found)} times")
    return range(found[0], found[0] + len(case.answer))


def given(query: torch.Tensor, key: torch.Tensor, at: Sequence[int]) -> torch.Tensor:
    """The mass that the queries ``at`` of a KV head give to each row, summed: ``[H_kv, n]`` of ``[1, H, n, D]``."""
    at_rows = torch.tensor(at, device=key.device)
    own = query[0, :, at_rows].float().unflatten(0, (key.shape[1], -1))
    scores = own @ key[0, :, None].float().mT * query.shape[-1] ** -0.5
    hidden = torch.arange(key.shape[2], device=key.device) > at_rows[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))


def on_places(scores: torch.Tensor, mass: torch.Tensor, places: int) -> float:
    """The mass ``[H_kv, L]`` of the rows that ``scores`` ``[H_kv, L]`` give so many places of each head."""
    return float(mass.gather(1, scores.topk(min(places, scores.shape[1]), 1).indices).sum())


Shares = dict[tuple[str, int, str], float]  # by score, places, and whose mass


def shares_of(case: Case, layers: Sequence[Left], masses: Sequence[tuple[torch.Tensor, torch.Tensor]],
              names: Sequence[str], places: Sequence[int]) -> Shares:  # fmt: skip
    """Of one case, over all its layers. masses: of the queries of the answer, and of those before the question."""
    needle, sinks = run_of_answer(case), layers[0].sinks[0].shape[2]
    competing = slice(sinks, sinks + CONTEST * layers[0].key.shape[2])
    held: defaultdict[tuple[str, int, str], float] = defaultdict(float)
    whole: defaultdict[str, float] = defaultdict(float)
    for left, (answer, late) in zip(layers, masses, strict=True):
        on_needle = torch.zeros_like(answer)
        on_needle[:, needle] = answer[:, needle]
        mass = {"needle": on_needle[:, competing], "queries": late[:, competing]}
        for whose, x in mass.items():
            whole[whose] += float(x.sum())
        for name in names:
            scores = SCORES[name](left)[0].flatten(1)
            for count in places:
                for whose, x in mass.items():
                    held[name, count, whose] += on_places(scores, x, count)
    return {key: x / whole[key[2]] for key, x in held.items()}


# ----------------------------------------------------------------------------------------------------------- judging


def compete_by(scores: torch.Tensor, sinks: int, protected: int) -> torch.Tensor:
    """The places after every contest, int32 ``[B, H, m, protected]``, as ``compete_reference`` gives them, by scores
    ``[B, H, m, C]``."""
    B, H, contests = scores.shape[:3]
    places = torch.zeros(B, H, 0, dtype=torch.int32, device=scores.device)
    held, history = scores.new_zeros(B, H, 0), places.new_zeros(B, H, contests, protected)
    for i in range(contests):
        first = sinks + i * CONTEST
        rows = torch.arange(first, first + CONTEST, dtype=torch.int32, device=scores.device).expand(B, H, CONTEST)
        places, held, _ = contest(places, held, rows, scores[:, :, i], protected)
        history[:, :, i, : places.shape[2]] = places
    return history


@contextmanager
def protecting(name: str) -> Iterator[None]:
    """While entered: the same rows in all heads, and no thinned ones, have their places by that score."""

    def select(key: torch.Tensor, value: torch.Tensor, layout: express.Layout, *others: Any) -> torch.Tensor:
        config = layout.config
        assert config.forgets and config.protected
        left = Left.of(key, value, config.sinks, layout.contests)
        return compete_by(SCORES[name](left), config.sinks, config.protected).flatten(2)

    def select_into(
        kept: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor, layout: express.Layout, scale: float,
        random: Random, spans: Any = None,
    ) -> None:  # fmt: skip
        assert spans is None
        own = slice(None) if random.heads is None else random.heads.long()
        kept[0].copy_(select(key[:, own], value[:, own], layout))

    def thin(call: Call, all_of_them: tuple[heads.Thinned, ...], index: torch.Tensor, copies: Any) -> None:
        for own in all_of_them:
            of_heads = list(own.heads)
            places = select(call.key[:, of_heads], call.value[:, of_heads], own.layout).flatten()
            index[own.index : own.index + len(places)] = places

    of_express = mock.patch.multiple(express, thin_reference=select, select_into=select_into)
    with of_express, mock.patch.object(heads, "_thin", thin):
        yield


# ----------------------------------------------------------------------------------------------------------- running


def contests_of(n: int) -> int:
    return (n - SINKS - RECENT) // CONTEST


class Protected(Bench):
    """One run; see :class:`plans.Bench`."""

    def cases(self) -> list[Case]:
        """Those of the tasks whose needle competes for a place."""
        n, hay = self.args.length, {"noise": NOISE, **haystacks()}
        asked = [x for x in cases(self.tokenizer, n + 1, hay, self.args.each) if x.task in self.args.tasks]
        return [x for x in asked if run_of_answer(x).stop <= SINKS + CONTEST * contests_of(n)]

    def mass(self) -> None:
        for haystack, asked in groupby(self.cases(), lambda case: case.haystack):
            found = [shares for case in asked if (shares := self.shares(case)) is not None]
            common = dict(task=f"mass: {haystack}", params=f"sinks={SINKS} recent={RECENT} cases={len(found)}")
            rows = []
            for name, places, whose in found[0] if found else []:
                value = fmean(x[name, places, whose] for x in found)
                rows.append({**common, "method": name, "rows": places, "metric": whose, "value": value})
            self.write(rows, self.args.length, "")

    @torch.no_grad()
    def shares(self, case: Case) -> Shares | None:
        """What each score catches; None where exact attention does not find the needle."""
        with Captured() as seen:
            (right,) = recalled(self.model, [case], 1, self.device)
        print(f"{case.task}, {case.haystack}, {case.kind}: {'found' if right else 'not found'}", flush=True)
        if not right:
            return None
        n, layers, masses = self.args.length, [], []
        answer, late = range(n - len(case.answer), n), range(n)[LATE]
        for (query, key, value), layer in zip(seen.calls, self.model.model.layers, strict=True):
            weight = layer.self_attn.o_proj.weight.unflatten(1, (query.shape[1], -1))
            layers.append(Left.of(key, value, SINKS, contests_of(n), query, weight))
            masses.append((given(query, key, answer), given(query, key, late)))
        return shares_of(case, layers, masses, self.args.scores, self.args.places)

    def judge_scores(self) -> None:
        n = self.args.length
        ids = {name: self.tokens(text, n) for name, text in list(judged_texts().items())[: self.args.texts]}
        judge = Judge(self.model, ids, self.cases(), self.args.batch, self.device)
        self.write(judge.of_exact(), n, "exact")
        print(f"{len(judge.cases)} needles are found by exact attention", flush=True)
        plan = replace(base(), rows=Rows(SINKS, RECENT, protected=self.args.protected))
        for name in self.args.judged:
            with protecting(name):
                rows = judge.rows(plan)
            self.write([{**row, "params": f"{in_words(plan)}; {self.args.dtype}"} for row in rows], n, name, plan=plan)

    def run(self) -> None:
        for part in self.args.part:
            {"mass": self.mass, "judge": self.judge_scores}[part]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=["mass", "judge"], default=["mass", "judge"])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--each", type=int, default=1, help="needles of each kind of key")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=[*SCORES], help="whose mass is measured")
    parser.add_argument("--places", type=int, nargs="+", default=[128, 512], help="of each KV head, for the mass")
    parser.add_argument("--judged", nargs="+", choices=SCORES, default=JUDGED, help="scores whose places are judged")
    parser.add_argument("--protected", type=int, default=512, help="places of each KV head, where they are judged")
    parser.add_argument("--texts", type=int, default=2, help="how many texts are judged")
    parser.add_argument("--batch", type=int, default=1, help="needles that are asked at a time")
    add_arguments(parser)
    torch.manual_seed(0)  # of the score by chance
    args = parser.parse_args()
    bench = Protected(args)
    bench.model.to(getattr(torch, args.dtype))
    bench.run()
    mass = [row for row in bench.results if row["task"].startswith("mass")]
    show(mass, ["task", "method", "rows", "metric", "value"])
    judged = [row for row in bench.results if row not in mass]
    show(summary(judged), ["n", "rows", "method", "kl", "kl_median", "kl_p99", "top1", "all"])


if __name__ == "__main__":
    main()
