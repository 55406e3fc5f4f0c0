"""What generation from a cache of few rows loses: KL to exact attention at every step that follows, and needles.

    python examples/bench/caching.py --rows 1984 1024 --each 5 --profile profile.json --out caching.csv  # a GPU
    python examples/bench/caching.py --model qwen --length 16384 --rows 4032 1024 --piece 8 --out caching.csv  # more
    python examples/bench/caching.py --part selected --rows 1024 --piece 4 --new 128 --profile profile.json
    python examples/bench/caching.py --part long --length 6144 --new 4096 --rows 1024 --piece 32    # 4,096 new tokens
    python examples/bench/caching.py --length 1024 --rows 300 --new 64 --texts 1 --each 1           # a taste on a CPU

Prompts are read exactly, once, and every policy makes its cache of the same keys and values (``ExpressCache.take``); in
the methods ``..., prompt`` the prompt attends by the plan, too. Then ``--new`` tokens follow as the text goes on, or
(``--part long``) as the model itself goes on, sampled with exact attention: by ``--piece`` at once, whatever the
approximate model would say. Needles are those of ``needles.py``: what is compressed is the text before the question.

Budgets are rows *held* by a KV head, mean over heads and over the tokens that follow; a head that sees everything holds
all tokens. With ``--part selected`` they are rows *read*: heads that select pages hold all tokens, too. Policies are
those of ``plans.py``, by one profile of texts that are not judged, and of haystacks whose questions see the rows that
others see (``--questions``; by blocks of 16 queries), and four more that only live here:

* ``one window or everything``: as in DuoAttention (arXiv 2410.10819) all heads that stream have the same window, here
  the best one by that profile; in ``window or everything`` each has its own;
* ``snapkv`` (arXiv 2404.14469): of every KV head the tokens that the last 32 queries attend to most (pooled over five
  neighbours, mean over query heads), and the last 32. It is *query-aware*: of needles these queries are the question's;
* ``keydiff`` (arXiv 2504.15364): sinks, a window of 128 and the tokens whose keys are least like the mean direction;
* ``random``: sinks, a window of 128 and other tokens by chance.

``thinned`` is uniform, too: what leaves the window is thinned by fair coins instead of Express's balanced ones;
``everything`` is exact, through the same cache: what the arithmetic alone makes of it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from measures import TokenStats, chunk_bootstrap, token_statistics
from models import haystacks, judged_texts
from needles import NOISE, Case, cases
from plans import (
    BLOCK,
    MODELS,
    MORE,
    OPTIONS,
    SINKS,
    Bench,
    add_bench_arguments,
    answered,
    base,
    chosen,
    in_words,
    most,
    only,
    place,
    predicted,
    recall_rows,
    rows_by_head,
    summary,
    text_rows,
)
from records import show
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from express_compile import ExpressCache, restore_attention, rewrite_attention
from express_compile.core.call import Call, Op, run_by
from express_compile.core.rows import Rows
from express_compile.kernels.heads import EVERYTHING, PerHead, rows_seen
from express_compile.kernels.select.pages import PAGE, listed
from express_compile.quality.budgets import Exactly
from express_compile.quality.profile import Profile, rewritten

OBSERVED, POOL, WINDOW = 32, 5, 128
TAIL = 128  # tokens behind the prompt of a needle, question and answer among them
BANDS = 8
AT_ONCE = 64  # prompts that are followed together


# ------------------------------------------------------------------------------------------- what was read exactly


@dataclass
class Read:
    """Prompts of ``n`` tokens that exact attention has read, and the tokens behind them.

    ids: ``[N, n + m]``. layers: keys and values of the prompts, ``[N, H_kv, n, .]``. exact: last hidden states at the
    m tokens behind them, ``[N, m, d]``. observed: the 32 tokens that end so many before the last one are SnapKV's.
    """

    ids: torch.Tensor
    n: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    exact: torch.Tensor
    observed: int

    def pick(self, at: Sequence[int]) -> Read:
        """The prompts at these places."""
        index = torch.tensor(at, dtype=torch.long, device=self.ids.device)
        layers = [(k[index], v[index]) for k, v in self.layers]
        return replace(self, ids=self.ids[index], layers=layers, exact=self.exact[index])

    def full(self, model: Any, stop: int | None = None) -> DynamicCache:
        """A full cache of the prompts, or of their first tokens."""
        cache = DynamicCache(config=model.config)
        for i, (k, v) in enumerate(self.layers):
            cache.update(k[:, :, :stop], v[:, :, :stop], i)
        return cache


def joined(parts: Sequence[Read]) -> Read:
    by_layer = zip(*(x.layers for x in parts), strict=True)
    layers = [(torch.cat([k for k, _ in its]), torch.cat([v for _, v in its])) for its in by_layer]
    ids, exact = (torch.cat([getattr(x, name) for x in parts]) for name in ("ids", "exact"))
    return replace(parts[0], ids=ids, layers=layers, exact=exact)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, n: int, observed: int) -> Read:
    """Read the first ``n`` tokens of ``ids`` ``[N, n + m]`` exactly, and then the others."""
    cache = DynamicCache(config=model.config)
    model.model(ids[:, :n], past_key_values=cache)
    layers = [(x.keys, x.values) for x in cache.layers]
    exact = model.model(ids[:, n:], past_key_values=cache).last_hidden_state
    return Read(ids, n, layers, exact, observed)


@torch.no_grad()
def follow(model: Any, ids: torch.Tensor, n: int, cache: Cache, piece: int) -> tuple[torch.Tensor, float]:
    """Last hidden states at the tokens from ``n`` on, given to the model by ``piece``, and the rows that a KV head of
    the ``cache`` holds after a step, on average."""
    out, held, places = [], [], torch.arange(n, ids.shape[1], device=ids.device)
    for step, at in zip(ids[:, n:].split(piece, 1), places.split(piece), strict=True):
        out.append(model.model(step, past_key_values=cache, position_ids=at[None]).last_hidden_state)
        held.append(rows_held(cache))
    return torch.cat(out, 1), fmean(held)


def rows_held(cache: Cache) -> float:
    return cache.rows_held if isinstance(cache, ExpressCache) else float(cache.layers[0].keys.shape[2])


@torch.no_grad()
def continued(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    """``ids`` and so many tokens more of each sequence, as the model samples them with exact attention; on a GPU by a
    CUDA graph of a step."""
    torch.manual_seed(0)
    (B, n), cache = ids.shape, StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    out = torch.cat([ids, ids.new_zeros(B, new)], 1)
    columns, position = torch.arange(n + new, device=ids.device), torch.full((B, 1), n - 1, device=ids.device)

    def draw(logits: torch.Tensor) -> None:
        logits = logits[:, -1].float()
        logits[:, model.config.eos_token_id] = -torch.inf
        noise = torch.rand_like(logits).clamp(min=1e-20).log().neg().log()
        position.add_(1)
        out.scatter_(1, position, (logits - noise).argmax(-1, keepdim=True))

    def step() -> None:
        mask = (columns <= position)[:, None, None]
        given = dict(attention_mask=mask, position_ids=position, past_key_values=cache)
        draw(model(out.gather(1, position), **given).logits)

    draw(model(ids, past_key_values=cache, logits_to_keep=1).logits)
    done, run = 1, step
    if ids.is_cuda and new > 8:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph, done = torch.cuda.CUDAGraph(), 4
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for _ in range(new - done):
        run()
    return out


# ------------------------------------------------------------------------------------------------------- the policies

Make = Callable[[Read], Cache]


def by_plan(model: Any, plan: PerHead) -> Make:
    def make(given: Read) -> Cache:
        cache = ExpressCache(model, rows=plan.rows, halving=plan.halving)
        cache.take(given.full(model))
        return cache

    return make


def read_by_plan(model: Any, plan: PerHead) -> Make:
    """The prompt attends by the plan, too."""

    def make(given: Read) -> Cache:
        cache = ExpressCache(model, rows=plan.rows, halving=plan.halving)
        with torch.no_grad():
            model.model(given.ids[:, : given.n], past_key_values=cache)
        return cache

    return make


class Observed(Exactly):
    """The mass that the first ``n`` tokens get of the last 32 queries, by layer: float32 ``[N, H_kv, n]``."""

    def __init__(self, n: int) -> None:
        self.n, self.mass = n, list[torch.Tensor]()

    def see(self, op: Op, call: Call, exact: torch.Tensor) -> None:
        H_kv, q = call.key.shape[1], call.query[:, :, -OBSERVED:]
        at = torch.arange(call.Lk - OBSERVED, call.Lk, device=q.device)
        hidden = torch.arange(call.Lk, device=q.device) > at[:, None]
        heads = []
        for i in range(H_kv):
            group = q.unflatten(1, (H_kv, -1))[:, i].float() * call.scale
            scores = (group @ call.key[:, i, None].float().mT).masked_fill(hidden, -torch.inf)
            heads.append(scores.softmax(-1)[..., : self.n].mean((1, 2)))
        self.mass.append(torch.stack(heads, 1))


def pruned(model: Any, given: Read, index: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache of the tokens at ``index`` ``[N, H_kv, k]`` of every layer."""
    cache = DynamicCache(config=model.config)
    for i, ((k, v), at) in enumerate(zip(given.layers, index, strict=True)):
        at = at.sort(-1).values[..., None]
        cache.update(*(x.gather(2, at.expand(*at.shape[:3], x.shape[3])) for x in (k, v)), i)
    return cache


def best(score: torch.Tensor, sinks: int, recent: int, count: int) -> torch.Tensor:
    """Where the largest of ``score`` ``[.., n]`` are, sinks and recent ones in any case."""
    score[..., :sinks] = score[..., score.shape[-1] - recent :] = torch.inf
    return score.topk(min(count, score.shape[-1]), -1).indices


@dataclass
class Kept:
    """``budget`` rows on average while tokens follow by ``piece``, all of which are held, too."""

    model: Any
    budget: float
    piece: int

    def count(self, given: Read) -> int:
        """How many tokens of a prompt are kept."""
        return round(self.budget - (given.ids.shape[1] - given.n + self.piece) / 2)

    def snapkv(self, given: Read) -> DynamicCache:
        past = given.n if given.observed else given.n - OBSERVED
        ids = given.ids[:, past : given.ids.shape[1] - given.observed if given.observed else given.n]
        seen, cache = Observed(given.n), given.full(self.model, past)
        restore_attention(self.model)
        with torch.no_grad(), rewritten(self.model, base()), run_by(seen):
            self.model.model(ids, past_key_values=cache)
        rewrite_attention(self.model, methods=["exact"])
        pooled = (torch.nn.functional.avg_pool1d(x, POOL, 1, POOL // 2) for x in seen.mass)
        return pruned(self.model, given, [best(x, 0, OBSERVED, self.count(given)) for x in pooled])

    def keydiff(self, given: Read) -> DynamicCache:
        scores = []
        for k, _ in given.layers:
            directions = torch.nn.functional.normalize(k.float(), dim=-1)
            scores.append(-torch.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1))
        return pruned(self.model, given, [best(x, SINKS, WINDOW, self.count(given)) for x in scores])

    def random(self, given: Read) -> DynamicCache:
        drawn = torch.Generator(given.ids.device).manual_seed(0)
        scores = (torch.rand(k.shape[:3], generator=drawn, device=k.device) for k, _ in given.layers)
        return pruned(self.model, given, [best(x, SINKS, WINDOW, self.count(given)) for x in scores])


class Counted:
    """Rows of options while ``new`` tokens follow a prompt by ``piece``: those *held*, as :func:`follow` counts them,
    or, with ``is_read``, read."""

    def __init__(self, new: int, piece: int, is_read: bool = False) -> None:
        self.new, self.piece, self.is_read = new, piece, is_read

    def __call__(self, options: Sequence[Rows], n: int, own: PerHead | None = None) -> list[float]:
        return [self._count(rows, n) for rows in options]

    def _count(self, rows: Rows, n: int) -> float:
        if rows.selected and self.is_read:
            return min(n, PAGE * listed(rows.selected, rows.sinks, rows.recent + self.piece - 1))
        if rows.selected or rows.everything:
            return n + (self.new + self.piece) / 2
        block = 16  # a cache has none: instead of those of a block, on average, there are those of a step
        seen = rows_seen(PerHead(rows, block=block), n + self.new)[:, n:].mean()
        return float(seen) - (block + 1) / 2 + self.piece


def policies(found: Profile, budget: float, n: int, count: Counted) -> dict[str, PerHead]:
    """The policies of one budget that an ExpressCache follows."""

    def largest(make: Callable[[int], Rows]) -> Rows:
        return most(make, budget, n, base(), count)

    def by_profile(allowed: Callable[[Rows], bool]) -> PerHead:
        return chosen(only(allowed_here, allowed), budget, n, last=0, count=count)

    def one_window() -> PerHead:
        """The window that is best where all heads that do not see everything have the same one."""
        fit = [x for x in windows if count([x], n)[0] <= budget]
        plans = [by_profile(lambda rows, own=own: rows.everything or rows == own) for own in fit]  # type: ignore[misc]
        return min(plans, key=lambda plan: predicted(found, plan))

    allowed_here = found if count.is_read else only(found, lambda rows: not rows.selected)
    windows = [x for x in found.options if x == Rows(x.sinks, x.recent)]

    sizes = [2**i for i in range(10, 3, -1)]  # of the coreset, as large as the budget allows
    s = next((x for x in sizes if count([Rows(SINKS, WINDOW, x, x)], n)[0] <= budget), 8)
    uniform = {
        "streaming": largest(lambda x: Rows(SINKS, x)),
        "protected": largest(lambda x: Rows(SINKS, WINDOW, protected=x)),
        "express": largest(lambda x: Rows(SINKS, x, s, s)),
        "thinned": largest(lambda x: Rows(SINKS, x, s)),
    }
    plans = {
        "per head": by_profile(lambda rows: True),
        "window or everything": by_profile(lambda rows: rows.everything or rows in windows),
        "one window or everything": one_window(),
    }
    if count.is_read:
        uniform = {"streaming": uniform["streaming"], "selected": largest(lambda x: Rows(SINKS, WINDOW, selected=x))}
    else:
        plans["without everything"] = by_profile(lambda rows: not rows.everything)
    halving = {"thinned": "uniform"}
    return plans | {name: PerHead(x, halving.get(name, "balanced"), block=BLOCK) for name, x in uniform.items()}


# ----------------------------------------------------------------------------------------------------------- the run


class Caching(Bench):
    """One run; see :class:`plans.Bench`."""

    options = (
        *OPTIONS[:-1], *MORE,
        Rows(SINKS, 256, 512, 512), Rows(SINKS, 512, 512), Rows(SINKS, 1024, 1024), EVERYTHING,
    )  # fmt: skip
    more = ()
    block = 16  # the fewest: a step of decoding chooses for itself, and its window ends at itself
    last = 0  # steps see what the cache holds

    def texts(self, n: int) -> torch.Tensor:
        """Token ids ``[N, n]`` of ``--windows`` parts of each judged text, at even distances."""
        found = []
        for name, text in list(judged_texts().items())[: self.args.texts]:
            ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
            if len(ids) < n:
                raise ValueError(f"--length={n}: {name} has {len(ids)} tokens only")
            found += [ids[round(x) :][:n] for x in np.linspace(0, len(ids) - n, self.args.windows)]
        return torch.stack(found).to(self.device)

    def read(self, ids: torch.Tensor, n: int, observed: int = 0) -> Iterator[Read]:
        for part in ids.split(self.args.batch):
            yield read(self.model, part, n, observed)

    def needles(self, n: int) -> tuple[Read | None, list[Case]]:
        """Prompts of needles that exact attention finds, and those needles."""
        if not self.args.each:
            return None, []
        asked = cases(self.tokenizer, n + TAIL, {"noise": NOISE, **haystacks()}, self.args.each)
        longest = max(len(case.answer) for case in asked)
        ids = torch.tensor([(*case.prompt, *case.answer) for case in asked], device=self.device)
        found, parts = [], []
        for given, i in zip(self.read(ids[:, :-1], n, longest - 1), range(0, len(asked), self.args.batch), strict=True):
            part = asked[i : i + self.args.batch]
            hits = [i for i, hit in enumerate(self.answered(given.exact, part)) if hit]
            found += [part[i] for i in hits]
            parts += [given.pick(hits)] if hits else []
        self.asked = Counter(map(place, asked))
        self.solved = Counter(map(place, found))
        return joined(parts) if parts else None, found

    def answered(self, hidden: torch.Tensor, asked: Sequence[Case]) -> list[bool]:
        longest = max(len(case.answer) for case in asked)
        return answered(self.model.lm_head(hidden[:, -longest:]).argmax(-1), asked)

    def statistics(self, given: Read, hidden: torch.Tensor) -> list[TokenStats]:
        """Of every text."""
        parts = zip(*(x.split(1) for x in (given.exact, hidden, given.ids[:, given.n :])), strict=True)
        return [token_statistics(exact, own, self.model.lm_head, ids) for exact, own, ids in parts]

    def run(self) -> None:
        args = self.args
        new, is_long = args.new, args.part == "long"
        n = args.length - (new if is_long else max(new, TAIL))
        ids = self.texts(n + new)
        found, _ = self.profiles()  # all policies by the one with generated records
        with self.timed(f"continuing {len(ids)} texts" if is_long else "texts"):
            ids = continued(self.model, ids[:, :n], new) if is_long else ids
        rewrite_attention(self.model, methods=["exact"])
        with self.timed("reading"):
            texts = joined(list(self.read(ids, n)))
            asked, self.cases = (None, []) if is_long else self.needles(n)
        if self.cases:
            self.write(recall_rows(self.solved, self.asked), n, "exact")
        print(f"{len(ids)} texts; {len(self.cases)} needles are found by exact attention", flush=True)
        count = Counted(new, args.piece, args.part == "selected")
        for budget in args.rows:
            for method, (make, plan) in self.methods(found, budget, n, count).items():
                if not args.methods or method.replace(self.weighed, "") in args.methods:
                    with self.timed(f"{budget:g} rows, {method}"):
                        self.judged(method, budget, make, plan, texts, asked, count)

    def methods(self, found: Profile, budget: float, n: int, count: Counted) -> dict[str, tuple[Make, PerHead | None]]:
        """What is judged at a budget, and how a cache of it is made; some of it at the first budget alone."""
        plans, model = policies(found, budget, n, count), self.model
        plans = {name + self.weighed * isinstance(x.rows, dict): x for name, x in plans.items()}
        made: dict[str, tuple[Make, PerHead | None]] = {name: (by_plan(model, x), x) for name, x in plans.items()}
        if self.args.part == "cache":
            others = Kept(model, budget, self.args.piece)
            made |= {name: (getattr(others, name), None) for name in ("random", "keydiff", "snapkv")}
        if self.args.part == "cache" and budget == self.args.rows[0]:
            made["everything"] = by_plan(model, PerHead(EVERYTHING)), PerHead(EVERYTHING)
            read_too = {name: plans[name] for name in ("per head" + self.weighed, "streaming")}
            made |= {f"{name}, prompt": (read_by_plan(model, x), x) for name, x in read_too.items()}
        return made

    def judged(
        self, method: str, budget: float, make: Make, plan: PerHead | None, texts: Read, asked: Read | None,
        count: Counted,
    ) -> None:  # fmt: skip
        """Write what is measured of one policy."""
        hidden, held = self.followed(make, texts)
        if count.is_read and plan is not None:
            held = fmean(count(rows_by_head(plan), texts.n))
        stats = self.statistics(texts, hidden)
        words = "" if plan is None else f"; {in_words(plan)}"
        common = dict(rows=round(held, 1), params=f"budget={budget:g}{words}")
        rows = text_rows(stats, f"texts: {len(stats)}, {self.args.new} tokens by {self.args.piece}")
        if self.args.part == "long":
            rows += band_rows([x.kl for x in stats], rows[0]["task"])
        if asked is not None:
            hidden, _ = self.followed(make, asked)
            right = self.answered(hidden, self.cases)
            hits = Counter(place(case) for case, hit in zip(self.cases, right, strict=True) if hit)
            rows += recall_rows(hits, self.solved)
        name = method if self.args.part == "cache" else f"{method}, {self.args.part}"
        self.write([{**common, **row} for row in rows], texts.n, name, budget)

    def followed(self, make: Make, given: Read) -> tuple[torch.Tensor, float]:
        """:func:`follow` for as many prompts at a time as there is memory for, and the mean of the rows held."""
        places = torch.arange(len(given.ids)).split(AT_ONCE)
        parts = [given.pick(x.tolist()) if len(places) > 1 else given for x in places]
        found = [follow(self.model, part.ids, part.n, make(part), self.args.piece) for part in parts]
        return torch.cat([x for x, _ in found]), fmean(held for _, held in found)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def band_rows(kl: Sequence[np.ndarray], task: str) -> list[dict[str, Any]]:
    """Mean KL of each eighth of the tokens, with its interval over pieces of 64 of them: where a drift would show."""
    rows, new = [], len(kl[0])
    for part in np.array_split(np.arange(new), min(BANDS, new)):
        value, low, high = chunk_bootstrap([x[part] for x in kl], 64)
        rows.append(dict(task=task, metric=f"kl {part[0] + 1}-{part[-1] + 1}", value=value, low=low, high=high))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_bench_arguments(parser)
    parser.add_argument(
        "--part", choices=("cache", "selected", "long"), default="cache",
        help="rows held of a prompt, pages read of a full cache, or rows held over a long continuation",
    )  # fmt: skip
    parser.add_argument("--new", type=int, default=256, help="tokens that follow a text, part of --length")
    parser.add_argument("--piece", type=int, default=16, help="tokens of a step, at most 32 (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="parts of every text (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", help="those alone")
    args = parser.parse_args()
    start = time.perf_counter()
    bench = Caching(args)
    print(f"loading: {time.perf_counter() - start:.1f} s", flush=True)
    bench.run()
    print(f"{MODELS[args.model][0]}: {time.perf_counter() - start:.0f} s in all")
    bands = [row["metric"] for row in bench.results if row["metric"].startswith("kl ")]
    columns = ["n", "rows", "method", "kl", "kl_median", "kl_p99", "top1", "all", *dict.fromkeys(bands)]
    show(summary(bench.results), columns, width=160)


if __name__ == "__main__":
    main()
