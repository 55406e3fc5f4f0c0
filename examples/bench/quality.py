"""How good are the answers: KL to exact attention and needle recall of SmolLM2 under many policies.

    python examples/bench/quality.py --out examples/bench/results/quality.csv         # on a GPU: about five minutes
    python examples/bench/quality.py --length 2048 --texts 1 --needles 0        # a taste on a CPU

Every policy runs on the same texts, so that rows of one table are paired. StreamingLLM (sinks and a window,
nothing else; arXiv 2309.17453) is the baseline at the same number of rows, plugged in with ``register``.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import numpy as np
import torch
from measures import chunk_bootstrap, recalls, token_statistics
from models import REPETITIVE, load_smollm2, long_texts, needle_prompts
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track

from express_compile import Method, Policy, Refusal, register, restore_attention, rewrite_attention
from express_compile.core.call import Call
from express_compile.core.options import ROWS, Options, option
from express_compile.kernels.attend.segments import TOKENS, SegmentTable, Sources, segment_attention
from express_compile.kernels.express import rows_seen as express_rows_seen
from express_compile.kernels.op import define_attention

MODEL = "SmolLM2-135M-Instruct"
FROM = 2048  # positions before this one see most of their past exactly whatever the method

# -- StreamingLLM as a method of its own -------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def streaming_table(n: int, sinks: int, recent: int, block: int = 128) -> SegmentTable:
    begin = np.arange(0, n, block)
    tail = np.where(begin - recent > sinks, begin - recent, 0)
    segments = np.zeros((len(begin), 1, 3), dtype=np.int64)
    segments[:, 0, 0], segments[:, 0, 2] = TOKENS, np.where(tail > 0, sinks, 0)
    return SegmentTable(block, 0, segments, np.zeros((len(begin), 1)), tail)


@dataclass(frozen=True)
class Streaming(Options):
    """Which rows StreamingLLM keeps."""

    sinks: int = option(32, "the first tokens", ROWS, shared="sinks")
    recent: int = option(256, "the last tokens", ROWS, shared="window")


def _streaming_body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    table = streaming_table(call.Lq, **call.options)
    return segment_attention(call.query, Sources.tokens(call.key, call.value), table, call.scale)


define_attention("streaming_llm", Streaming, _streaming_body, min_length=False)
register(
    Method(
        name="streaming_llm",
        summary="the first and the last tokens only (baseline)",
        supports="unpadded causal self-attention",
        refuses="everything else",
        options=Streaming,
        refuse=lambda spec, policy: (
            None
            if spec.mask.causal and not spec.mask.padding and spec.Lq == spec.Lk
            else Refusal("streaming_llm", "it takes unpadded causal self-attention only")
        ),
    )
)

# -- the policies ------------------------------------------------------------------------------------------------


def express(
    budget: int, sinks: int, window: int, halving: str = "balanced", flatten: float = 0.0, protected: int = 0, **more
) -> Policy:
    options = {"express": {"flatten": flatten}} if flatten else {}
    return Policy(
        budget=budget,
        sinks=sinks,
        window=window,
        protected=protected,
        halving=halving,
        methods=("express",),
        method_options=options,
        **more,
    )


def streaming(sinks: int, window: int) -> Policy:
    return Policy(sinks=sinks, window=window, methods=("streaming_llm",), min_length=0)


def rows_seen(policy: Policy, n: int, first: int = FROM) -> float:
    """Rows that a query sees on average over the positions from ``first`` on, itself included."""
    if policy.methods == ("streaming_llm",):
        own = policy.of("streaming_llm")
        return float(streaming_table(n, own.sinks, own.recent).rows_seen(n)[first:].mean())
    return float(express_rows_seen(policy, n)[first:].mean())


def describe(policy: Policy) -> str:
    own = policy.of(policy.methods[0])
    parts = {"sinks": own.sinks, "window": own.recent}
    if policy.methods == ("express",):
        parts = {"s": own.budget, **parts, "protected": own.protected, "halving": own.halving}
        parts |= {"flatten": own.flatten} if own.flatten else {}
        parts |= {"seed": policy.seed} if policy.seed else {}
    return " ".join(f"{name}={value}" for name, value in parts.items())


KL_GRID = [
    *[express(256, 0, 0, rule) for rule in ("balanced", "kernel", "uniform")],
    *[express(256, 32, window, rule) for window in (32, 512) for rule in ("balanced", "kernel", "uniform")],
    *[express(256, 32, window, "balanced", x) for window in (32, 512) for x in (1.0, 0.0625)],
    *[express(256, 32, window, rule, seed=1) for window in (32, 512) for rule in ("balanced", "uniform")],
    express(512, 32, 256),
    express(512, 32, 32),
    express(128, 32, 1024),
    express(256, 32, 512, protected=256),
    express(256, 32, 256, protected=256),
    express(512, 32, 256, protected=256),
    express(128, 32, 512, protected=256),
    express(128, 32, 512, protected=512),
    express(128, 32, 256, protected=512),
    express(64, 32, 256, protected=768),
    streaming(32, 1250),
    streaming(32, 1904),
]
NEEDLE_GRID = [
    express(256, 32, 512),
    express(256, 32, 512, "uniform"),
    express(512, 32, 256),
    express(256, 32, 512, protected=256),
    express(256, 32, 256, protected=256),
    express(512, 32, 256, protected=256),
    express(128, 32, 512, protected=512),
    express(128, 32, 256, protected=512),
    express(64, 32, 256, protected=768),
    streaming(32, 1250),
]

# -- running -----------------------------------------------------------------------------------------------------


def kl_rows(model, tokenizer, device: str, length: int, names: list[str], policies: list[Policy]) -> list[dict]:
    """KL, top-1 agreement and loss of every policy over the texts ``names``, natural and repetitive ones apart."""
    ids = {name: tokenizer(long_texts()[name], return_tensors="pt").input_ids[:, :length].to(device) for name in names}
    first = min(FROM, length // 4)

    def hidden(x):
        return model.model(x, use_cache=False).last_hidden_state

    with torch.no_grad():
        exact = {name: hidden(x).cpu() for name, x in ids.items()}
    rows = []
    for policy in track(policies, description=f"KL over {len(ids)} texts of {length} tokens"):
        rewrite_attention(model, policy=policy)
        stats = {}
        for name, x in ids.items():
            with torch.no_grad():
                stats[name] = token_statistics(exact[name].to(device), hidden(x), model.lm_head, x).tail(first)
        restore_attention(model)
        common = dict(n=length, method=policy.methods[0], params=describe(policy))
        common["rows"] = round(rows_seen(policy, length, first), 1)
        groups = {"natural texts": [n for n in names if n not in REPETITIVE]}
        groups["repetitive texts"] = [n for n in names if n in REPETITIVE]
        for task, members in groups.items():
            if not members:
                continue
            chosen = [stats[name] for name in members]
            for metric, values in (
                ("kl", [s.kl for s in chosen]),
                ("top1", [s.agree for s in chosen]),
                ("nll_increase", [s.nll - s.nll_exact for s in chosen]),
            ):
                mean, low, high = chunk_bootstrap(values)
                rows.append({**common, "task": task, "metric": metric, "value": mean, "low": low, "high": high})
            p99 = float(np.quantile(np.concatenate([s.kl for s in chosen]), 0.99))
            rows.append({**common, "task": task, "metric": "kl_p99", "value": p99})
        for name, s in stats.items():
            rows.append({**common, "task": f"text:{name}", "metric": "kl", "value": float(s.kl.mean())})
    return rows


def needle_rows(model, tokenizer, device: str, length: int, depths: int, policies: list[Policy]) -> list[dict]:
    """Recall of a 7-digit needle over the depths that exact attention solves."""
    rows = []
    for task, distractors in (("needle", 0), ("needle among 4", 3)):
        at = np.linspace(0.02, 0.98, depths).tolist()
        cases = needle_prompts(tokenizer, length, at, distractors, seed=0)
        cases = [(torch.tensor(p, device=device), torch.tensor(a, device=device)) for p, a in cases]
        solved = [case for case in cases if recalls(model, *case)]
        common = dict(task=task, n=length, metric="recalled")
        rows.append({**common, "method": "exact", "rows": length, "value": len(solved), "high": len(cases)})
        for policy in track(policies, description=f"{task}, {length} tokens, {len(solved)} cases"):
            rewrite_attention(model, policy=policy)
            value = sum(recalls(model, *case) for case in solved)
            restore_attention(model)
            rows.append({**common, "method": policy.methods[0], "params": describe(policy), "value": value,
                         "rows": round(rows_seen(policy, length), 1), "high": len(solved)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=99)
    parser.add_argument("--needles", type=int, default=24, help="depths per needle task; 0 for none")
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[4096, 8064])
    parser.add_argument("--policies", type=int, default=99, help="only the first policies of each grid")
    add_arguments(parser)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows = kl_rows(model, tokenizer, device, args.length, list(long_texts())[: args.texts], KL_GRID[: args.policies])
    for length in args.needle_lengths if args.needles else []:
        rows += needle_rows(model, tokenizer, device, length, args.needles, NEEDLE_GRID[: args.policies])

    rows = [{**run_of(args.commit), "model": MODEL, **row} for row in rows]
    shown = "task n method params rows metric value low high"
    show([row for row in rows if not row["task"].startswith("text:")], shown.split(), width=160, digits=".4f")
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
