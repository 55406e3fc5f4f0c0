"""What a cache of few rows loses: KL to exact attention while SmolLM2 goes on with texts, step by step, and its memory.

    python examples/bench/caching.py --out examples/bench/results/caching.csv  # on a CPU ten minutes or more
    python examples/bench/caching.py --prompt 1536 --steps 512 --texts genesis argparse

Every text is forced: the model reads ``--prompt`` tokens at once and the next ``--steps`` by ``--piece``, whatever it
would say. An ExpressCache of each plan, and beside it one with as many rows of sinks and a window alone (StreamingLLM),
the number that the plan held on average over the steps. Prompts attend by the plan of the cache, too. In a row of the
file ``low`` and ``high`` are the means of the first and of the last quarter of the steps, where a drift would show.
"""

from __future__ import annotations

import argparse

import torch
from models import load_smollm2, long_texts
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import ExpressCache, Rows

MODEL = "SmolLM2-135M-Instruct"
TEXTS = ("genesis", "python-data-model", "python-statements", "python-types", "argparse")
SINKS = 16
PLANS = (Rows(SINKS, 160, 64), Rows(SINKS, 64, 64, 32), Rows(SINKS, 96, 32, 96))


@torch.no_grad()
def forced(model, ids: torch.Tensor, prompt: int, piece: int, rows: Rows) -> tuple[torch.Tensor, float, int]:
    """Log-probabilities ``[B, steps, vocabulary]`` after the tokens from ``prompt - 1`` on, the rows that a KV head
    held on average over the steps, and the bytes of the cache after them."""
    cache = ExpressCache(model, rows=rows)
    out = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    held = []
    for step in track(ids[:, prompt:-1].split(piece, 1), description=str(rows), transient=True):
        out.append(model(step, past_key_values=cache).logits)
        held.append(cache.rows_held)
    return torch.cat(out, 1).log_softmax(-1), sum(held) / len(held), cache.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--prompt", type=int, default=1536, help="tokens read at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=512, help="tokens that follow in steps (default: %(default)s)")
    parser.add_argument(
        "--texts", nargs="+", default=TEXTS, metavar="TEXT", help="names of texts (default: all natural)"
    )
    parser.add_argument("--piece", type=int, default=1, help="tokens of a step, at most 32 (default: %(default)s)")
    parser.add_argument("--plans", type=int, default=len(PLANS), help="how many of the plans (default: all)")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_smollm2(device, dtype)
    end = args.prompt + args.steps
    ids = torch.cat([tokenizer(long_texts()[x], return_tensors="pt").input_ids[:, :end] for x in args.texts]).to(device)
    with torch.no_grad():
        kept = args.steps + 1
        exact = torch.cat([model(x, logits_to_keep=kept).logits[:, :-1] for x in ids.split(1)]).log_softmax(-1)
    rows = []
    for plan in PLANS[: args.plans]:
        found = forced(model, ids, args.prompt, args.piece, plan)
        # beside the window there are the tokens of the last step
        window = forced(model, ids, args.prompt, args.piece, Rows(SINKS, round(found[1]) - SINKS - args.piece))
        for name, (got, held, size) in (("ExpressCache", found), ("StreamingLLM", window)):
            kl = torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, got, strict=True)]).mean(0)
            quarter = args.steps // 4
            common = dict(run_of(args.commit), model=MODEL, n=end, method=name, rows=round(held, 1))
            common |= dict(
                task=f"{len(ids)} texts, {args.steps} forced tokens by {args.piece}", params=str(plan).replace(" ", "")
            )
            means = [float(x.mean()) for x in (kl, kl[:quarter], kl[-quarter:])]
            rows.append({**common, "metric": "kl", "value": means[0], "low": means[1], "high": means[2]})
            rows.append({**common, "metric": "bytes per sequence", "value": size / len(ids)})
            show(rows[-2:], ("method", "params", "rows", "metric", "value", "low", "high"))
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
