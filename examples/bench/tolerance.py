"""Budgets per layer that keep a tolerance: found on some texts, judged on others, beside uniform budgets.

    python examples/bench/tolerance.py --out examples/bench/results/quality.csv         # on a GPU: about two minutes
    python examples/bench/tolerance.py --length 768 --budgets 16 64 --texts 1     # a taste on a CPU

SmolLM2 with Express in all layers. `calibrate_error` chooses a budget per layer on two texts; every row is of other
texts, which it has not seen. Uniform budgets with the same sinks, window and protected rows run on the same texts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from measures import chunk_bootstrap, token_statistics
from models import REPETITIVE, load_smollm2, long_texts
from quality import FROM, MODEL, rows_seen
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import Policy, restore_attention, rewrite_attention
from express_compile.quality.budgets import calibrate_error

SAMPLE = ("genesis", "python-types")
BASE = Policy(methods=("express",))
TOLERANCES = (0.05, 0.03)


def chosen(policy: Policy) -> str:
    """How many layers have which budget."""
    budgets = (x.get("budget", "exact") for x in policy.modules.values())
    counts = sorted(Counter(map(str, budgets)).items(), key=lambda x: (not x[0].isdigit(), x[0].zfill(6)))
    return "/".join(f"{count}x{budget}" for budget, count in counts)


def rows_of(policy: Policy, n: int, first: int) -> float:
    """Rows that a query sees on average over layers and positions from ``first`` on."""
    if not policy.modules:
        return rows_seen(policy, n, first)
    exact = (first + n + 1) / 2
    budgets = (x.get("budget") for x in policy.modules.values())
    return fmean(exact if s is None else rows_seen(replace(policy, budget=s, modules={}), n, first) for s in budgets)


def judge(model: Any, texts: Mapping[str, torch.Tensor], policies: Mapping[str, Policy], first: int) -> list[dict]:
    """KL and top-1 agreement of every policy over the texts, natural and repetitive ones apart."""

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        return model.model(ids, use_cache=False).last_hidden_state

    with torch.no_grad():
        exact = {name: hidden(ids) for name, ids in texts.items()}
    rows = []
    for params, policy in track(policies.items(), description="policies"):
        rewrite_attention(model, policy)
        with torch.no_grad():
            stats = {
                name: token_statistics(exact[name], hidden(ids), model.lm_head, ids).tail(first)
                for name, ids in texts.items()
            }
        restore_attention(model)
        n = next(iter(texts.values())).shape[1]
        common = dict(n=n, method="express", params=params, rows=round(rows_of(policy, n, first), 1))
        for kind in ("natural", "repetitive"):
            found = [x for name, x in stats.items() if (name in REPETITIVE) == (kind == "repetitive")]
            for metric, values in (("kl", [x.kl for x in found]), ("top1", [x.agree for x in found])):
                if found:
                    mean, low, high = chunk_bootstrap(values)
                    row = {**common, "task": f"unseen {kind} texts", "metric": metric}
                    rows.append({**row, "value": mean, "low": low, "high": high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--texts", type=int, default=5, help="how many unseen texts")
    add_arguments(parser)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    ids = {
        name: tokenizer(text, return_tensors="pt").input_ids[:, : args.length].to(device)
        for name, text in long_texts().items()
    }
    first = min(FROM, args.length // 4)
    policies = {f"s={s}": replace(BASE, budget=s) for s in args.budgets}
    for tolerance in TOLERANCES:
        found = calibrate_error(
            model, [ids[name] for name in SAMPLE], tolerance=tolerance, budgets=args.budgets, policy=BASE, first=first
        )
        print(
            f"tolerance {tolerance}: {found.kl:.4f} nats on the sample, {found.rows:.0f} rows, {chosen(found.policy)}"
        )
        policies[f"tolerance={tolerance} sample={found.kl:.4f} layers={chosen(found.policy)}"] = found.policy
    unseen = {name: ids[name] for name in [x for x in ids if x not in SAMPLE][: args.texts]}
    common = {**run_of(args.commit), "model": MODEL}
    rows = [{**common, **row} for row in judge(model, unseen, policies, first)]
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)
    show(rows, "task params rows metric value low high".split())


if __name__ == "__main__":
    main()
