"""What a cache of few rows loses: KL to exact attention while SmolLM2 goes on, step by step, and its memory.

    python examples/bench/caching.py --out examples/bench/results/caching.csv  # on a CPU ten minutes or more
    python examples/bench/caching.py --new 4096 --own --piece 16 --texts genesis --plans 0  # drift

What follows is forced: the model reads ``--prompt`` tokens at once and the next ``--new`` by ``--piece``, whatever it
would say: the text as it goes on, or with ``--own`` the model's own continuation, sampled with exact attention. An
ExpressCache of each plan, and beside it one with as many rows of sinks and a window alone (StreamingLLM), the number
that a KV head read on average over the steps: all that the plan held, or with selected blocks the pages of a step.
Prompts attend by the plan of the cache, too. In a row ``kl`` of the file ``low`` and ``high`` are the means of the
first and of the last quarter of the steps, where a drift would show; the rows ``kl A-B`` are means over the new tokens
from A to B, with the least and the largest mean over 16 of them beside it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from models import load_smollm2, long_texts
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import ExpressCache, Rows
from express_compile.kernels.select.pages import PAGE, listed

MODEL = "SmolLM2-135M-Instruct"
TEXTS = ("genesis", "python-data-model", "python-statements", "python-types", "argparse")
SINKS = 16
BANDS = 8
PLANS = (Rows(SINKS, 160, 64), Rows(SINKS, 64, 64, 32), Rows(SINKS, 96, 32, 96), Rows(SINKS, 112, selected=4))


@torch.no_grad()
def kl_of_steps(
    model, ids: torch.Tensor, exact: torch.Tensor, prompt: int, piece: int, rows: Rows
) -> tuple[torch.Tensor, float, int]:
    """KL to exact attention, ``[B, new]``, after the tokens from ``prompt - 1`` to the last but one; ``exact``
    ``[B, new, .]`` are its hidden states there. And the rows that a KV head read on average: those that it held, or
    pages of them where blocks are selected. And bytes at the end."""
    cache = ExpressCache(model, rows=rows)
    kl, read = [], []
    most = PAGE * listed(rows.selected, rows.sinks, rows.recent + piece - 1) if rows.selected else float("inf")
    steps = [ids[:, :prompt], *ids[:, prompt:-1].split(piece, 1)]
    for step, hidden in track(
        zip(steps, exact.split([1, *(x.shape[1] for x in steps[1:])], 1), strict=True), str(rows), len(steps),
        transient=True,
    ):  # fmt: skip
        logits = model(step, past_key_values=cache, logits_to_keep=hidden.shape[1]).logits
        p, q = (x.float().log_softmax(-1) for x in (model.lm_head(hidden), logits))
        kl.append((p.exp() * (p - q)).sum(-1))
        read.append(min(cache.rows_held, most))
    return torch.cat(kl, 1).cpu(), sum(read[1:]) / len(read[1:]), cache.nbytes


@torch.no_grad()
def continued(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """``ids`` and so many tokens more of each sequence, as the model samples them with exact attention."""
    torch.manual_seed(0)
    given = {"do_sample": True, "temperature": 1.0, "top_k": 0, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, min_new_tokens=new, max_new_tokens=new, **given)


def kl_rows(kl: torch.Tensor) -> list[dict[str, Any]]:
    """The rows of the file that say what KL ``[B, new]`` is: over all steps, and by eighths of them."""
    mean, new = kl.mean(0), kl.shape[1]
    quarters = mean[: new // 4], mean[-(new // 4) :]
    rows: list[dict[str, Any]] = [{"metric": "kl", "value": mean, "low": quarters[0], "high": quarters[1]}]
    for i in range(0, new, max(1, new // BANDS)):
        band = mean[i : i + max(1, new // BANDS)]
        parts = torch.stack([x.mean() for x in band.split(16)])
        rows.append({"metric": f"kl {i + 1}-{i + len(band)}", "value": band, "low": parts.min(), "high": parts.max()})
    return [{name: x if name == "metric" else float(x.mean()) for name, x in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--prompt", type=int, default=1536, help="tokens read at once (default: %(default)s)")
    parser.add_argument("--new", type=int, default=512, help="tokens that follow in steps (default: %(default)s)")
    parser.add_argument("--own", action="store_true", help="what follows is the model's own exact continuation")
    parser.add_argument(
        "--texts", nargs="+", default=TEXTS, metavar="TEXT", help="names of texts (default: all natural)"
    )
    parser.add_argument("--piece", type=int, default=1, help="tokens of a step, at most 32 (default: %(default)s)")
    numbers = range(len(PLANS))
    parser.add_argument(
        "--plans", nargs="+", type=int, choices=numbers, default=[*numbers], help="numbers of plans (default: all)"
    )
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_smollm2(device, dtype)
    end = args.prompt + args.new
    ids = torch.cat([tokenizer(long_texts()[x], return_tensors="pt").input_ids[:, :end] for x in args.texts]).to(device)
    if args.own:
        ids = continued(model, ids[:, : args.prompt], args.new)
    with torch.no_grad():
        exact = torch.cat([model.model(x).last_hidden_state[:, args.prompt - 1 : -1] for x in ids.split(1)])
    forced = "the model's own" if args.own else "forced"
    rows = []
    for plan in (PLANS[i] for i in args.plans):
        found = kl_of_steps(model, ids, exact, args.prompt, args.piece, plan)
        # beside the window there are the tokens of the last step
        few = Rows(SINKS, round(found[1]) - SINKS - args.piece)
        window = kl_of_steps(model, ids, exact, args.prompt, args.piece, few)
        for name, (kl, read, size) in (("ExpressCache", found), ("StreamingLLM", window)):
            common = dict(run_of(args.commit), model=MODEL, n=end, method=name, rows=round(read, 1))
            common |= dict(
                task=f"{len(ids)} texts, {args.new} {forced} tokens by {args.piece}", params=str(plan).replace(" ", "")
            )
            own = [{**common, **row} for row in kl_rows(kl)]
            own.append({**common, "metric": "bytes per sequence", "value": size / len(ids)})
            show(own, ("method", "params", "rows", "metric", "value", "low", "high"))
            rows += own
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
