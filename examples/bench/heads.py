"""One plan per KV head against one for all: KL at equal average rows, on texts that the plan was not fitted to.

    python examples/bench/heads.py --out examples/bench/results/heads.csv       # on a CPU: half an hour and more
    python examples/bench/heads.py --length 1024 --texts 1 --budgets 2          # a taste

SmolLM2 with every head of every layer rewritten. Uniform Express, with sinks, a window, protected and thinned rows that
are the same in all heads, says how many rows there are; StreamingLLM has as long a window as these rows allow, and the
plan per KV head at most as many on average, chosen by a profile of two other texts. Rows and KL are those of positions
from a quarter of the text on.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from measures import chunk_bootstrap, token_statistics
from models import load_smollm2, long_texts
from quality import MODEL
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import Policy, restore_attention, rewrite_attention
from express_compile.core.rows import Rows
from express_compile.kernels.heads import PerHead
from express_compile.quality.profile import EVERYTHING, Profile, choose, late, least, prices, profile, rows_of

SAMPLE = ("genesis", "python-types")
BLOCK = 128
UNIFORM = (Rows(32, 64, 32, 64), Rows(32, 128, 64, 128), Rows(32, 256, 64, 256))
OPTIONS = (
    *(Rows(32, recent) for recent in (64, 256, 512, 1024)),
    *(Rows(32, 128, thinned) for thinned in (16, 64)),
    Rows(32, 128, 32, 128),
    *(Rows(32, 128, protected=protected) for protected in (128, 256, 512)),
    *(Rows(32, 128, selected=blocks) for blocks in (2, 4, 8, 16)),
    EVERYTHING,
)


def streaming(rows: float, n: int) -> Rows:
    """Sinks and the longest window that take at most so many rows."""
    recent = 1
    while rows_of([Rows(32, recent + 1)], n, BLOCK)[0] <= rows:
        recent += 1
    return Rows(32, recent)


def per_head(found: Profile, rows: float) -> tuple[PerHead, float]:
    """The plan of the profile with at most so many rows on average, and how many it has."""

    def average(price: float) -> float:
        chosen = [found.rows[o] for heads in choose(found, price) for o in heads]
        return sum(chosen) / len(chosen)

    price = least(prices(found), lambda price: average(price) <= rows)
    assert price is not None, "the cheapest option has fewer rows"
    choice = zip(found.sites, choose(found, price), strict=True)
    return PerHead({site.module: [found.options[o] for o in heads] for site, heads in choice}), average(price)


def in_words(plan: PerHead) -> str:
    """How many heads have which rows."""
    if not isinstance(plan.rows, dict):
        return str(plan.rows[0])
    counts = Counter(str(x) for heads in plan.rows.values() for x in heads)
    return "; ".join(f"{count} x {rows}" for rows, count in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budgets", type=int, default=len(UNIFORM), help="how many numbers of rows")
    parser.add_argument("--texts", type=int, default=3, help="how many unseen texts")
    add_arguments(parser)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    n, first = args.length, late(args.length)
    ids = {k: tokenizer(text, return_tensors="pt").input_ids[:, :n].to(device) for k, text in long_texts().items()}
    unseen = {name: ids[name] for name in [x for x in ids if x not in SAMPLE][: args.texts]}

    @torch.no_grad()
    def hidden(x: torch.Tensor) -> torch.Tensor:
        return model.model(x, use_cache=False).last_hidden_state

    found = profile(model, [ids[name] for name in SAMPLE], OPTIONS, block=BLOCK, progress=True)
    plans: list[tuple[str, PerHead, float]] = []
    for rows in UNIFORM[: args.budgets]:
        (allowed,) = rows_of([rows], n, BLOCK)
        window = streaming(allowed, n)
        plans.append(("express", PerHead(rows), allowed))
        plans.append(("streaming", PerHead(window), rows_of([window], n, BLOCK)[0]))
        plans.append(("per head", *per_head(found, allowed)))
    exact = {name: hidden(x) for name, x in unseen.items()}
    results: list[dict[str, Any]] = []
    common = {**run_of(args.commit), "model": MODEL, "n": n, "task": f"unseen texts: {', '.join(unseen)}"}
    for method, plan, rows in track(plans, description="plans"):
        rewrite_attention(model, Policy(methods=(plan,), strict=True))
        stats = [token_statistics(exact[k], hidden(x), model.lm_head, x).tail(first) for k, x in unseen.items()]
        restore_attention(model)
        for metric, values in (("kl", [x.kl for x in stats]), ("top1", [x.agree for x in stats])):
            value, low, high = chunk_bootstrap(values)
            row = dict(method=method, params=in_words(plan), rows=round(rows, 1), metric=metric)
            results.append({**common, **row, "value": value, "low": low, "high": high})
    if args.out:
        append(args.out, QUALITY_COLUMNS, results)
    show(results, "method rows metric value low high params".split())


if __name__ == "__main__":
    main()
