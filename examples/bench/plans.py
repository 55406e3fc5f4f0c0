"""Plans per KV head against every other way to choose rows, at equal rows: KL on texts and needles in haystacks.

    python examples/bench/plans.py --model smollm2 --length 8192 --rows 700 1350 --out results.csv   # a GPU, minutes
    python examples/bench/plans.py --length 1024 --rows 300 --texts 1 --each 1 --batch 1  # on a CPU, 15 minutes

One profile of three texts (``models.profiled_texts``) and of three haystacks that end with questions
(``needles.profiled_questions``): of these counts what the last 256 queries lose, which see everything, as much as what
the texts lose (``--questions``). By it every policy that differs between heads is chosen:

* ``per head``: every source of rows, and the last 64 queries exact; ``without ...``: all but one of them; ``last 16``:
  fewer such queries; ``per layer``: the errors of a layer's heads summed, so that all of them have the same;
  ``without records``: the profile of the two natural texts alone;
* ``query heads`` (``--query-heads``): the same policies with rows for each query head, by a profile of query heads;
* ``heads repeated`` (``--repeat-heads``): those of a model whose query heads share no keys and values;
* ``layers alike``: without what errors of a layer do to the output, as if that were the same in all of them;
* ``window or everything``: heads stream or see everything, as in DuoAttention (arXiv 2410.10819).

Uniform policies have the same rows in all heads, and as many as the budget allows: ``streaming`` (StreamingLLM: sinks
and a window), ``express`` (sinks, window, protected and thinned rows), ``protected`` (KeyDiff: sinks, a window and
distinctive keys), ``selected`` (sinks, a window and blocks that the queries choose: Quest, FlashPrefill), each as it is
and with the last 64 queries exact (``--last``). Rows and KL are those of positions from a quarter of the text on.
Needles are those of ``needles.py``; those that exact attention does not find are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from measures import TokenStats, chunk_bootstrap, token_statistics
from models import (
    haystacks,
    judged_texts,
    load_qwen,
    load_smollm2,
    profiled_haystacks,
    profiled_texts,
    repeat_heads,
)
from needles import NOISE, PROFILED_NOISE, TASKS, Case, cases, profiled_questions
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import Policy, fit, restore_attention, rewrite_attention
from express_compile.core.plan import SavedPlan
from express_compile.core.rows import Rows
from express_compile.kernels.heads import EVERYTHING, MOST_LAST, PerHead
from express_compile.quality.profile import (
    Profile,
    choose,
    filled,
    joined,
    late,
    least,
    prices,
    profile,
    rows_of,
)

MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct", load_smollm2),
    "qwen": ("Qwen2.5-Coder-0.5B-Instruct", load_qwen),
}
BLOCK = 128
SINKS = 32
LAST = 64
OPTIONS = (
    *(Rows(SINKS, recent) for recent in (64, 128, 256, 512, 1024, 1536, 2048)),
    *(Rows(SINKS, *x) for x in ((128, 32), (256, 64), (256, 128), (256, 256), (512, 256), (1024, 512))),
    *(Rows(SINKS, *x) for x in ((256, 64, 64), (256, 256, 256), (1024, 512, 256))),
    *(Rows(SINKS, recent, protected=n) for recent, n in ((128, 128), (256, 256), (256, 512), (256, 1024))),
    *(Rows(SINKS, recent, protected=n) for recent, n in ((512, 256), (1024, 1024), (2048, 1024))),
    *(Rows(SINKS, recent, selected=n) for recent, n in ((64, 2), (128, 4), (128, 8), (128, 16), (256, 32), (256, 64))),
    EVERYTHING,
)
"""What a head may have. A list of its own, so that what was measured stays what it was when the defaults change."""
LONG = 8192  # tokens up to which that is enough: in longer texts there is much between most of it and everything
MORE = (
    *(Rows(SINKS, recent) for recent in (4096, 8192)),
    *(Rows(SINKS, *x) for x in ((256, 512), (512, 1024, 256), (1024, 1024, 1024))),
    *(Rows(SINKS, *x) for x in ((2048, 512, 256), (2048, 1024, 1024), (4096, 1024, 1024))),
    *(Rows(SINKS, recent, protected=n) for recent, n in ((512, 2048), (4096, 1024), (4096, 2048), (4096, 4096))),
    *(Rows(SINKS, recent, selected=n) for recent, n in ((512, 16), (1024, 16), (1024, 64), (512, 128))),
)
"""What a head may have beside it in longer texts. On Qwen at 16,384 tokens predicted errors of plans with these, of
1,024 to 4,032 rows, are 5% above those of all 175 that were tried; with the 29 of before they were 31% above."""

NATURAL = ("genesis", "pydecimal")
QUESTIONS = "questions,"

Plan = PerHead | SavedPlan
Count = Callable[[Sequence[Rows], int, PerHead], list[float]]
"""How many rows each of some options has, of so many tokens, beside what a plan says of all of them."""


# --------------------------------------------------------------------------------------------------- the policies


def only(found: Profile, allowed: Callable[[Rows], bool]) -> Profile:
    """The profile with those of its options that are allowed."""
    kept = [o for o, rows in enumerate(found.options) if allowed(rows)]

    def of(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[o] for o in kept)

    sites = tuple(replace(site, errors=tuple(map(of, site.errors))) for site in found.sites)
    return replace(found, options=of(found.options), rows=of(found.rows), sites=sites)


def by_layer(found: Profile) -> Profile:
    """The profile of layers as a whole: heads of one layer all get the same."""
    sites = tuple(replace(site, errors=(tuple(np.sum(site.errors, 0).tolist()),)) for site in found.sites)
    return replace(found, sites=sites)


def base(last: int = 0) -> PerHead:
    """All options of a plan but the rows."""
    return PerHead(EVERYTHING, block=BLOCK, last=last)


def chosen(found: Profile, budget: float, n: int, last: int = LAST, count: Count = rows_of) -> PerHead:
    """The plan of the profile with at most ``budget`` rows of ``n`` tokens on average over heads, as ``count`` counts
    them (without: those that late queries see), and ``last`` exact queries at the end."""
    rows = count(found.options, n, base(last))

    def average(price: float) -> float:
        return fmean(rows[o] for heads in choose(found, price, rows) for o in heads)

    price = least(prices(found, rows), lambda price: average(price) <= budget)
    if price is None:
        raise ValueError(f"budget={budget!r}: the cheapest options have {min(rows):.0f} rows at {n} tokens")
    choice = choose(found, price, rows)
    choice = filled(found, choice, budget * sum(map(len, choice)), rows)
    of_sites = zip(found.sites, choice, strict=True)
    return replace(base(last), rows={site.module: [found.options[o] for o in heads] for site, heads in of_sites})


def predicted(found: Profile, plan: PerHead) -> float:
    """The error that the profile chooses by, of a plan whose rows are options of it."""
    places = {rows: o for o, rows in enumerate(found.options)}
    return sum(float(x.weighted[h, places[rows]]) for x in found.sites for h, rows in enumerate(plan.rows[x.module]))


def most(make: Callable[[int], Rows], budget: float, n: int, own: PerHead, count: Count = rows_of) -> Rows:
    """``make(x)`` for the largest x from 1 on with which there are at most ``budget`` rows at ``n`` tokens."""
    low, high = 1, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count([make(middle)], n, own)[0] <= budget else (low, middle - 1)
    if count([make(low)], n, own)[0] > budget:
        raise ValueError(f"budget={budget!r}: {make(low)} has more rows at {n} tokens")
    return make(low)


def uniform(budget: float, n: int, last: int = 0) -> dict[str, PerHead]:
    """The policies with the same rows in all heads, each with as long a window, or as many places, as there can be."""
    own = base(last)
    sizes = [x for x in (2**i for i in range(3, 11)) if rows_of([Rows(SINKS, 128, x, x)], n, own)[0] <= budget]
    if not sizes:
        raise ValueError(f"budget={budget!r}: must be {rows_of([Rows(SINKS, 128, 8, 8)], n, own)[0]:.0f} or more")
    places = most(lambda x: Rows(SINKS, 128, selected=x), budget, n, own).selected
    found = {
        "streaming": most(lambda x: Rows(SINKS, x), budget, n, own),
        "express": most(lambda x: Rows(SINKS, x, sizes[-1], sizes[-1]), budget, n, own),
        "protected": most(lambda x: Rows(SINKS, 128, protected=x), budget, n, own),
        "selected": most(lambda x: Rows(SINKS, x, selected=places), budget, n, own),
    }
    return {name + ", last exact" * bool(last): replace(own, rows=rows) for name, rows in found.items()}


def policies(found: Profile, natural: Profile, budget: float, n: int, last: int = LAST) -> dict[str, PerHead]:
    """All policies of one budget for ``n`` tokens; ``natural``: the profile without generated text."""
    heads = {
        "per layer": by_layer(found),
        "window or everything": only(found, lambda x: x.everything or x == Rows(x.sinks, x.recent)),
        "without thinned": only(found, lambda x: not x.thinned),
        "without protected": only(found, lambda x: not x.protected),
        "without selected": only(found, lambda x: not x.selected),
        "without everything": only(found, lambda x: not x.everything),
        "without records": natural,
    }
    heads["layers alike"] = replace(found, sites=tuple(replace(site, nats=1.0) for site in found.sites))
    others = {name: chosen(its, budget, n, last) for name, its in heads.items()}
    numbers = {"without last": 0, "last 16": 16}
    others |= {name: chosen(found, budget, n, fewer) for name, fewer in numbers.items() if fewer < last}
    return {"per head": chosen(found, budget, n, last), **uniform(budget, n), **uniform(budget, n, last), **others}


def rows_by_head(plan: Plan) -> list[Rows]:
    """The rows of every head of a plan, or the one that all have."""
    if isinstance(plan, SavedPlan):
        return [x for site in plan.sites for x in site.rows]
    return [x for its in (plan.rows.values() if isinstance(plan.rows, dict) else [plan.rows]) for x in its]


def average_rows(plan: Plan, n: int) -> float:
    """Rows that a late query of ``n`` tokens sees, mean over heads."""
    counts = Counter(rows_by_head(plan))
    own = plan if isinstance(plan, PerHead) else base(plan.sites[0].params["last"])
    rows = rows_of(list(counts), n, own)
    return sum(x * count for x, count in zip(rows, counts.values(), strict=True)) / counts.total()


def in_words(plan: Plan) -> str:
    """How many heads (of a plan per layer: layers) have which rows."""
    counts = Counter(map(str, rows_by_head(plan)))
    return "; ".join(f"{count} x {rows}" if counts.total() > 1 else rows for rows, count in counts.most_common())


# --------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def recalled(model: Any, asked: Sequence[Case], batch: int, device: str) -> list[bool]:
    """Of every case whether each token of its answer is ranked first; all have the same number of tokens."""
    found: list[bool] = []
    for i in range(0, len(asked), batch):
        part = asked[i : i + batch]
        ids = torch.tensor([(*case.prompt, *case.answer) for case in part], device=device)
        longest = max(len(case.answer) for case in part)
        best = model(ids[:, :-1], use_cache=False, logits_to_keep=longest).logits.argmax(-1)
        found += answered(best, part)
    return found


def answered(best: torch.Tensor, asked: Sequence[Case]) -> list[bool]:
    """Of every case whether its answer is what ``best`` ``[cases, tokens]`` ends with."""
    ends = zip(best.tolist(), asked, strict=True)
    return [tuple(top[-len(case.answer) :]) == case.answer for top, case in ends]


@dataclass
class Judge:
    """Texts and cases of one length, what exact attention makes of them, and the rows of a result file."""

    model: Any
    ids: dict[str, torch.Tensor]
    cases: list[Case]
    batch: int
    device: str
    exact: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact = {name: self.hidden(x) for name, x in self.ids.items()}
        asked = self.cases
        self.cases = [case for case, right in zip(asked, self.found(asked), strict=True) if right]
        self.asked, self.solved = (Counter(map(place, x)) for x in (asked, self.cases))

    @contextmanager
    def following(self, plan: Plan) -> Iterator[None]:
        policy = Policy(plan=plan) if isinstance(plan, SavedPlan) else Policy(methods=(plan,))
        rewrite_attention(self.model, replace(policy, strict=True))
        try:
            yield
        finally:
            restore_attention(self.model)

    @torch.no_grad()
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model.model(x, use_cache=False).last_hidden_state
        return out

    def found(self, asked: Sequence[Case]) -> list[bool]:
        return recalled(self.model, asked, self.batch, self.device)

    def statistics(self, name: str) -> TokenStats:
        x = self.ids[name]
        return token_statistics(self.exact[name], self.hidden(x), self.model.lm_head, x).tail(late(x.shape[1]))

    def of_exact(self) -> list[dict[str, Any]]:
        """How many cases it solves of those asked."""
        return recall_rows(self.solved, self.asked)

    def rows(self, plan: Plan) -> list[dict[str, Any]]:
        """What is measured of one plan."""
        with self.following(plan):
            stats = {name: self.statistics(name) for name in self.ids}
            right = self.found(self.cases)
        rows = text_rows(list(stats.values()), f"texts: {', '.join(stats)}")
        rows += [dict(task=f"text: {name}", metric="kl", value=float(x.kl.mean())) for name, x in stats.items()]
        hits = Counter(place(case) for case, hit in zip(self.cases, right, strict=True) if hit)
        return rows + recall_rows(hits, self.solved)


def text_rows(stats: Sequence[TokenStats], task: str) -> list[dict[str, Any]]:
    """Mean KL and agreement with their intervals over texts, and the median and the 99th percentile of KL."""
    kl, rows = [x.kl for x in stats], []
    for metric, values in (("kl", kl), ("top1", [x.agree for x in stats])):
        value, low, high = chunk_bootstrap(values)
        rows.append(dict(task=task, metric=metric, value=value, low=low, high=high))
    for metric, part in (("kl_median", 0.5), ("kl_p99", 0.99)):
        rows.append(dict(task=task, metric=metric, value=float(np.quantile(np.concatenate(kl), part))))
    return rows


def recall_rows(hits: Counter[str], asked: Counter[str]) -> list[dict[str, Any]]:
    """By task and haystack, how many needles were found of how many."""
    return [dict(task=x, metric="recalled", value=hits[x], high=count) for x, count in asked.items()]


def place(case: Case) -> str:
    return f"{case.task}, {case.haystack}"


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per policy: KL and recall over all cases, and by task."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = found.setdefault((row["n"], row["budget"], row["method"]), {k: row[k] for k in ("n", "method", "rows")})
        if row["metric"] == "recalled":
            for name in (row["task"].split(",")[0], "all"):
                hits, of = line.get(name, "0/0").split("/")
                line[name] = f"{int(hits) + row['value']}/{int(of) + row['high']}"
        elif row["task"].startswith("texts"):
            line[row["metric"]] = row["value"]
    return list(found.values())


# --------------------------------------------------------------------------------------------------------- running


class Bench:
    """One run: a model, the arguments, and the rows that were measured. options: what is profiled; more: beside it in
    long texts; block: by so many queries that choose together; last: queries at the end of a profiled text that see
    everything."""

    options: tuple[Rows, ...] = OPTIONS
    block = BLOCK
    last = MOST_LAST
    more: tuple[Rows, ...] = MORE
    few = ("per head", "streaming", "streaming, last exact", "express", "selected, last exact", "window or everything")

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.name, load = MODELS[args.model]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model, self.tokenizer = load(self.device, dtype)
        self.query_heads, self.repeated = (getattr(args, name, False) for name in ("query_heads", "repeat_heads"))
        self.weighed = "" if args.questions in (0, 1) else f", questions {args.questions:g}"
        self.suffix = self.weighed + ", query heads" * self.query_heads + ", heads repeated" * self.repeated
        if self.repeated:
            repeat_heads(self.model)
        self.results: list[dict[str, Any]] = []
        self.options += self.more * (args.length > LONG)
        self.common = {**run_of(args.commit), "model": self.name}

    def write(
        self, rows: Sequence[dict[str, Any]], n: int, method: str, budget: float = 0, plan: Plan | None = None
    ) -> None:
        """Add rows to the results and to the file, so that a run that is cut short leaves what it had."""
        own = dict(n=n, method=method, budget=budget, params="", rows=n)
        if plan is not None:
            own |= dict(params=f"budget={budget:g}; {in_words(plan)}", rows=round(average_rows(plan, n), 1))
            uniform_rows = isinstance(plan, PerHead) and not isinstance(plan.rows, dict)
            own["method"] += self.suffix if not uniform_rows else ", heads repeated" * self.repeated
        new = [{**self.common, **own, **row} for row in rows]
        self.results += new
        if self.args.out:
            append(self.args.out, QUALITY_COLUMNS, [{k: row[k] for k in QUALITY_COLUMNS if k in row} for row in new])

    def tokens(self, text: str, n: int) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text[: 8 * n], return_tensors="pt").input_ids[:, :n].to(self.device)
        if ids.shape[1] < n:
            raise ValueError(f"--length={n}: a text has {ids.shape[1]} tokens only")
        return ids

    def profiles(self) -> tuple[Profile, Profile]:
        """The profile of all samples, and that of natural texts; from the file if there is one."""
        path, n = self.args.profile, self.args.length
        if path and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            each = {name: Profile.from_json(text) for name, text in held.items()}
            if (blocks := {found.block for found in each.values()}) != {self.block}:
                raise ValueError(f"--profile={path}: measured with block={sorted(blocks)}; must be {self.block}")
        else:
            each = self.measured(n)
            if path:
                path.write_text(json.dumps({name: found.to_json() for name, found in each.items()}), encoding="utf-8")
        counts = {name: self.args.questions if name.startswith(QUESTIONS) else 1.0 for name in each}
        kept = [name for name, count in counts.items() if count]
        natural = [found for name, found in each.items() if name in NATURAL]
        return joined([each[name] for name in kept], [counts[name] for name in kept]), joined(natural)

    def measured(self, n: int) -> dict[str, Profile]:
        """The profile of every sample of ``n`` tokens, by its name."""
        start, each = time.perf_counter(), {}
        for text, sample in self.samples(n).items():
            asked = text.startswith(QUESTIONS)
            each[text] = profile(
                self.model, sample, self.options, block=self.block, query_heads=self.query_heads,
                last=self.last * asked, only_last=asked, progress=True,
            )  # fmt: skip
            print(f"profile of {text}: {time.perf_counter() - start:.1f} s in all", flush=True)
        seconds = time.perf_counter() - start
        self.write([dict(task=f"profile: {', '.join(each)}", metric="seconds", value=seconds)], n,
                   "profile" + self.suffix)  # fmt: skip
        return each

    def samples(self, n: int) -> dict[str, torch.Tensor]:
        """What is profiled, ``[1, n]`` each: texts, and haystacks that end with questions, of which only these count,
        unless they count for nothing."""
        found = {name: self.tokens(text, n) for name, text in profiled_texts().items()}
        if not self.args.questions:
            return found
        hay = {"noise": PROFILED_NOISE, **profiled_haystacks()}
        asked = profiled_questions(self.tokenizer, n, hay, min(MOST_LAST, n // 8))
        return found | {f"{QUESTIONS} {name}": torch.tensor([ids], device=self.device) for name, ids in asked.items()}

    def judge(self, n: int) -> Judge:
        """Texts and cases of ``n`` tokens, with as many at a time as there is memory for."""
        ids = {name: self.tokens(text, n) for name, text in list(judged_texts().items())[: self.args.texts]}
        each, batch = self.args.each, max(1, self.args.batch * self.args.length // n)
        asked = cases(self.tokenizer, n + 1, {"noise": NOISE, **haystacks()}, each) if each else []
        judge = Judge(self.model, ids, asked, batch, self.device)
        self.write(judge.of_exact(), n, "exact")
        print(f"{n} tokens: {len(judge.cases)} needles of {len(asked)} are found by exact attention", flush=True)
        return judge

    def run(self) -> None:
        n, budgets = self.args.length, sorted(self.args.rows, reverse=True)
        found, natural = self.profiles()
        judge = self.judge(n)
        held_out = next(iter(judge.ids.values()))
        fitted = fit(self.model, held_out, rows=budgets[0], profile=found, length=n, block=BLOCK, last=self.args.last)
        print(fitted, flush=True)
        if self.args.plan:
            fitted.save(self.args.plan)
        left_out = {}
        for budget in budgets:
            plans: dict[str, Plan] = {**policies(found, natural, budget, n, self.args.last)}
            if budget == budgets[0]:
                plans["per head"] = SavedPlan.from_json(fitted.plan.to_json())
                left_out = {name: plan for name, plan in plans.items() if name.startswith("without")}
            if self.args.few:
                plans, left_out = {name: plans[name] for name in self.few}, {}
            self.judged(judge, n, budget, {k: plan for k, plan in plans.items() if not k.startswith("without")})
        for other in self.args.others:
            its = policies(found, natural, budgets[0], other, self.args.last)
            self.judged(self.judge(other), other, budgets[0], {method: its[method] for method in self.few})
        self.judged(judge, n, budgets[0], left_out)

    def judged(self, judge: Judge, n: int, budget: float, plans: Mapping[str, Plan]) -> None:
        """Write what is measured of these plans."""
        start = time.perf_counter()
        for method, plan in track(plans.items(), f"{n} tokens, {budget:g} rows", total=len(plans)):
            self.write(judge.rows(plan), n, method, budget, plan)
        print(f"{len(plans)} plans: {time.perf_counter() - start:.1f} s", flush=True)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What every :class:`Bench` takes."""
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--length", type=int, default=8192, help="of what is profiled and judged")
    parser.add_argument("--rows", type=float, nargs="+", default=[700, 1350], help="budgets")
    parser.add_argument("--texts", type=int, default=9, help="how many texts are judged")
    parser.add_argument("--each", type=int, default=3, help="needles of each kind; 0 for none")
    parser.add_argument("--batch", type=int, default=8, help="needles that are asked at a time, at that length")
    parser.add_argument("--profile", type=Path, help="file for the profile; one that is there is taken instead")
    parser.add_argument("--questions", type=float, default=1.0, metavar="FACTOR", help="how much more than texts the "
                        "profiled haystacks with questions count; 0: they are not profiled")  # fmt: skip
    add_arguments(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_bench_arguments(parser)
    parser.add_argument("--others", type=int, nargs="*", default=[], help="lengths to judge the largest budget at, too")
    parser.add_argument("--last", type=int, default=LAST, help="queries at the end that see everything")
    parser.add_argument("--few", action="store_true", help="only the policies that --others are judged with")
    parser.add_argument("--query-heads", action="store_true", help="rows for each query head")
    parser.add_argument("--repeat-heads", action="store_true", help="keys and values repeated for every query head, so "
                        "that each has rows of its own, blocks that it chose alone among them")  # fmt: skip
    parser.add_argument("--plan", type=Path, help="file for the plan per head of the largest budget")
    args = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(args)
    print(f"loading: {time.perf_counter() - start:.1f} s", flush=True)
    bench.run()
    print(f"{bench.name}: {time.perf_counter() - start:.0f} s in all")
    measures = ["kl", "kl_median", "kl_p99", "top1"]
    show(summary(bench.results), ["n", "rows", "method", *measures, "all", *TASKS], width=160)


if __name__ == "__main__":
    main()
