"""Where the time of an Express prefill goes: thinning, attention, the serial chain of the halvings.

    python examples/bench/breakdown.py --out examples/bench/results/breakdown.csv       # on a GPU, half a minute

Default shape of the benchmark. `thin` and `attend` are the two halves of the op. `floor` is the attention of the
op at the rate (FLOP per second) that the best exact backend reaches at that length. The chain: one bucket per KV
head is halved, replayed as a CUDA graph.
"""

from __future__ import annotations

import argparse

import torch
from benchmark import LAYER, Clock, exact_times, quantile, random_tensors, replayed
from records import add_arguments, append, run_of, show

from express_compile import Policy
from express_compile.kernels import express as E
from express_compile.kernels.attend.segments import Sources, segment_attention
from express_compile.kernels.launch import Random
from express_compile.kernels.select.halving import Decider
from express_compile.kernels.select.schedule import Halving, Schedule
from express_compile.kernels.select.thinning import thin
from express_compile.planning.devices import versions

H, H_KV, D = 32, 8, 128
POLICIES = [
    Policy(budget=512, sinks=32, window=32, protected=0),
    Policy(budget=256, sinks=32, window=512, protected=0),
    Policy(),
]
COLUMNS = "date,gpu,torch,triton,commit,part,n,params,ms,share,tflops,floor_ms,ns_per_pair".split(",")


def lengths(ns: list[int], clock: Clock) -> list[dict]:
    rows, scale = [], D**-0.5
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    for n in ns:
        q, k, v = random_tensors(1, H, H_KV, n, n, D, "cuda", torch.bfloat16)
        exact = min(exact_times(q, k, v, clock, 3 if n < 200_000 else 1).values())
        for policy in POLICIES:
            config = E.config_of(policy, n)
            layout = E.make_layout(config, n, n)
            index, *copies = E.thin_triton(k, v, layout, scale, seed, LAYER)
            index = index if config.protected else None
            sources = Sources(k, v, *copies, index)
            calls = {
                "thin": lambda c=layout, k=k, v=v: E.thin_triton(k, v, c, scale, seed, LAYER),
                "attend": lambda c=layout, q=q, x=sources: segment_attention(q, x, c.table, scale),
            }
            ms = {part: quantile(clock(replayed(call), 5), 0.5) for part, call in calls.items()}
            seen = float(layout.table.rows_seen(n).mean())
            flop = 4 * H * D * n * seen
            params = f"s={config.s} sinks={config.sinks} window={config.recent} protected={config.protected}"
            for part in ms:
                row = dict(part=part, n=n, params=params, ms=ms[part], share=ms[part] / sum(ms.values()))
                if part == "attend":
                    row |= dict(tflops=flop / ms[part] / 1e9, floor_ms=exact * seen / (n / 2))
                rows.append(row)
    return rows


def chains(sizes: list[int], clock: Clock) -> list[dict]:
    """One bucket of each size per KV head, as the closing of a round has it."""
    rows = []
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    for size in sizes:
        _, k, v = random_tensors(1, H, H_KV, 1, size, D, "cuda", torch.bfloat16)
        schedule = Schedule(size, 0, 0, size + size // 2, (), ((Halving(0, size, size, 1, 0, 0, 0.25),),), (), ())
        index = torch.empty(1, H_KV, size // 2, dtype=torch.int32, device="cuda")
        rule = E.Express(4, inflation=0, protected=0).rule
        call = replayed(
            lambda k=k, v=v, s=schedule, i=index, r=rule: thin(k, v, i, s, 0, Decider(r, D**-0.5, Random(seed, LAYER)))
        )
        ms = quantile(clock(call, 9), 0.5)
        rows.append(dict(part="chain", n=size, params="rows per bucket", ms=ms, ns_per_pair=ms * 1e6 / (size // 2)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    add_arguments(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU: the CPU runs the references, which have no such parts")
    common = {**run_of(args.commit), **versions()}
    clock = Clock("cuda")
    rows = [
        {**common, **row} for row in chains([128, 256, 512, 1024, 2048, 4096], clock) + lengths(args.lengths, clock)
    ]
    show(rows, COLUMNS[5:], width=140)
    if args.out:
        append(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
