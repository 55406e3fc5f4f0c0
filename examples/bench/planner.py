"""Does the planner choose well: every method at many shapes, timed, beside what was predicted.

    python examples/bench/planner.py measure --out examples/bench/results/speed.csv     # on a GPU, about five minutes
    python examples/bench/planner.py judge                                        # anywhere, from the committed rows

At each shape exact attention competes with the one approximate method that fits the site. A choice is judged by what
the chosen one took over what the faster one took, measured in one run. Shapes that exact attention computes in less
than 0.1 ms are compared as CUDA graphs.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import (
    MIXED,
    decode,
    encode,
    exact_times,
    layers_of,
    mean_rows,
    prefill,
    quantile,
    random_tensors,
)
from records import SPEED_COLUMNS, add_arguments, append, params_of, run_of, show
from rich.progress import track

from express_compile import AttentionSpec, Mask, Policy
from express_compile.core.cost import Device
from express_compile.core.plan import SavedPlan
from express_compile.kernels.heads import PerHead
from express_compile.planning.devices import shipped, versions
from express_compile.planning.measure import Clock, replayed
from express_compile.planning.predict import crossover, predict, predicted, wins

RESULTS = Path(__file__).parent / "results"
PLANS = Path(__file__).parents[1] / "plans"
KINDS = ("prefill", "encode", "decode")
LENGTHS = [512 << i for i in range(11)]
# where SANTA's gain is small its ratio to exact attention is flat: a crossover needs lengths near to it
DECODED = [4096, 6144, 8192, 12288, 16384, 24576, 49152, 98304, 262144]
TOKENS = 1 << 19  # of a batch
GRAPHS_BELOW = 0.1  # milliseconds of exact attention


def grid(longest: int) -> Iterator[tuple[str, int, int, list[Policy]]]:
    """Kind of site, batch, keys and the policies to try."""
    for B in (1, 8, 32):
        for n in LENGTHS:
            if B * n > TOKENS or n > longest:
                continue
            policies = [Policy(), Policy(budget=128, protected=0), Policy(budget=4096 if n > 65536 else 2048)]
            yield "prefill", B, n, policies
            if B * n < TOKENS:
                yield "encode", B, n, [Policy(budget=s) for s in (128, 1024)]
        for n in DECODED:
            if B * n <= 32 * 98304 and n <= longest:
                yield "decode", B, n, [Policy(budget=S) for S in (128, 512)]


def repeats_of(ms: float) -> int:
    """How often to time what takes so long."""
    return int(min(9, max(1, 400 / ms)))


def at_shape(kind: str, tensors: list[torch.Tensor], policies: list[Policy], clock: Clock) -> Iterator[dict]:
    """A row per policy, and one of torch's default exact attention, whose opponent is the fastest exact backend."""
    q, k, v = tensors
    causal = kind == "prefill"

    def default() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    (once,) = clock(default, 1)
    repeats = repeats_of(once)
    graph = q.is_cuda and (kind == "decode" or quantile(clock(replayed(default), 5), 0.5) < GRAPHS_BELOW)
    params = {"grid": kind, **({"graph": 1} if graph else {})}
    opponents = exact_times(q, k, v, clock, repeats, graph=graph, causal=causal)
    times = clock(replayed(default) if graph else default, repeats) if repeats > 1 else [once]
    best = min(opponents, key=opponents.get)
    yield dict(
        method="exact", params=" ".join(f"{a}={b}" for a, b in params.items()), s="", ms_p20=quantile(times, 0.2),
        ms_p50=quantile(times, 0.5), ms_p80=quantile(times, 0.8), opponent=best, opponent_ms_p50=opponents[best],
        speedup=opponents[best] / quantile(times, 0.5), error=0.0, peak_mb="",
    )  # fmt: skip
    if kind == "decode":
        truth = F.scaled_dot_product_attention(*(x[:2].double() for x in tensors), enable_gqa=True)
    for policy in policies:
        if kind == "decode":
            yield decode(tensors, policy.budget, truth, opponents, clock, 9, grid=kind)
        else:
            measured: Callable = prefill if kind == "prefill" else encode
            yield measured(policy, opponents, tensors, clock, max(3, repeats), **params)


def measure(args: argparse.Namespace) -> list[dict]:
    """Time the grid; rows are written as they come."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    H, H_kv, D = (32, 8, 128) if on_gpu else (4, 2, 64)
    common, clock, rows = {**run_of(args.commit), **versions()}, Clock(device), []
    shapes = [shape for shape in grid(args.longest) if shape[0] in args.kinds]
    for kind, B, n, policies in track(shapes, description="grid"):
        Lq = 1 if kind == "decode" else n
        tensors = random_tensors(B, H, H_kv, Lq, n, D, device, dtype)
        shape = dict(B=B, H=H, H_kv=H_kv, Lq=Lq, Lk=n, D=D, Dv=D, dtype=str(dtype).removeprefix("torch."))
        for row in at_shape(kind, tensors, policies, clock):
            rows.append({**common, **shape, **row, "job": "plan"})
            if args.out:
                append(args.out, SPEED_COLUMNS, rows[-1:])
        del tensors
    return rows


@dataclass(frozen=True)
class Judged:
    """One shape: what was measured and predicted, in milliseconds, and which method was chosen."""

    row: dict
    kind: str
    spec: AttentionSpec
    policy: Policy
    device: Device
    graphs: bool
    exact: float
    method: float
    predicted_exact: float
    predicted: float
    chosen: str

    @property
    def ratio(self) -> float:
        """The time of the choice over the best time."""
        return (self.method if self.chosen == self.row["method"] else self.exact) / min(self.method, self.exact)


@dataclass(frozen=True)
class Crossing:
    """From how many keys on the approximate method is faster: measured (between two lengths of the grid), predicted."""

    kind: str
    B: int
    method: str
    policy: Policy
    measured: float
    predicted: int | None


def crossings(judged: list[Judged]) -> list[Crossing]:
    """Wherever the grid has a length at which exact attention is faster, and a longer one from which on it is not."""
    groups: dict[tuple, list[Judged]] = {}
    for x in judged:
        key = x.kind, x.spec.B, x.row["method"], x.policy.budget, x.policy.of("express").protected
        groups.setdefault(key, []).append(x)
    found = []
    for (kind, B, method, *_), group in groups.items():
        group.sort(key=lambda x: x.spec.Lk)
        # where a short sequence is left to exact attention neither is faster
        gains = [(x.spec.Lk, math.log(x.exact / x.method), x) for x in group if x.predicted != x.predicted_exact]
        last = max((i for i, (_, gain, _) in enumerate(gains) if gain < 0), default=None)
        if last is None or last + 1 == len(gains):
            continue
        (n, before, x), (m, after, _) = gains[last : last + 2]
        measured = math.exp(math.log(n) + math.log(m / n) * -before / (after - before))
        predicted = crossover(method, "exact", x.spec, x.policy, x.device, graphs=x.graphs)
        found.append(Crossing(kind, B, method, x.policy, measured, predicted))
    return found


def spec_of(row: dict, causal: bool) -> AttentionSpec:
    """The site that a row was measured at."""
    sizes = [int(row[name]) for name in ("B", "H", "H_kv", "Lq", "Lk", "D", "Dv")]
    return AttentionSpec(*sizes, getattr(torch, row["dtype"]), "cuda", sizes[5] ** -0.5, Mask(causal=causal))


def judge(rows: list[dict]) -> list[Judged]:
    """Every approximate row of the newest run of each kind of site, as the planner sees its shape."""
    rows = [row for row in rows if row["job"] == "plan" and "grid=" in row["params"]]
    newest = {params_of(row)["grid"]: row["commit"] for row in rows}
    judged = []
    for row in rows:
        params = params_of(row)
        if row["commit"] != newest[params["grid"]] or row["method"] == "exact":
            continue
        spec = spec_of(row, params["grid"] == "prefill")
        own = {name: int(params[name]) for name in ("sinks", "window", "protected") if name in params}
        policy = Policy(budget=int(row["s"]), methods=(row["method"], "exact"), **own)
        device, graphs = shipped()[row["gpu"]], "graph" in params
        times = predicted((row["method"], "exact"), spec, policy, device, graphs)
        chosen = row["method"] if wins(times, row["method"]) else "exact"
        exact, method = float(row["opponent_ms_p50"]), float(row["ms_p50"])
        site = dict(row=row, kind=params["grid"], spec=spec, policy=policy, device=device, graphs=graphs)
        told = dict(predicted_exact=times["exact"], predicted=times[row["method"]], chosen=chosen)
        judged.append(Judged(**site, exact=exact, method=method, **told))
    return judged


def newest_prefills(rows: list[dict]) -> Iterator[tuple[str, dict, float]]:
    """The newest rows of plans per KV head (``benchmark.py --mixed``) and of Express with protected rows and a window
    (``--window``): what they are, the row, and the milliseconds that are predicted."""
    sizes = dict(sinks=32, window=256, protected=256)
    windows = {(row["commit"], row["Lk"]) for row in rows if row["job"] == "window"}
    newest = {}
    for row in rows:
        params, name = params_of(row), ""
        if row["job"] == "mixed" and row["method"] == "heads" and "graph" not in params:
            name = params["plan"]
        elif row["job"] == "prefill" and (row["commit"], row["Lk"]) in windows and row["s"]:
            name = f"Express, s={row['s']}" * (params == {key: str(x) for key, x in sizes.items()})
        if name:
            newest[name, int(row["Lk"])] = row
    for (name, _), row in sorted(newest.items()):
        saved = PLANS / f"{name}.json"
        if row["job"] == "prefill":
            policies = [Policy(budget=int(row["s"]), methods=("express",), **sizes)]
        elif name.replace("_", " ") in MIXED:
            policies = [Policy(methods=(PerHead(MIXED[name.replace("_", " ")]),))]
        elif saved.exists():
            layers = layers_of(SavedPlan.load(saved), int(row["H"]), int(row["H_kv"]))
            if round(mean_rows(layers, int(row["Lk"]))) != int(row["s"]):  # of a plan that is no longer shipped
                continue
            policies = [Policy(methods=(own,)) for own in layers]
        else:
            continue
        method = "express" if row["job"] == "prefill" else "heads"
        times = [predict(method, spec_of(row, True), policy, shipped()[row["gpu"]]) for policy in policies]
        yield name.replace("_", " "), row, statistics.fmean(x for x in times if x is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["measure", "judge"])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="number of keys to measure up to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of sites to measure")
    add_arguments(parser)
    args = parser.parse_args()
    if args.job == "measure":
        show(measure(args), "params method B Lq Lk s ms_p50 opponent opponent_ms_p50 speedup error".split())
        return
    with (RESULTS / "speed.csv").open(newline="") as file:
        measured = list(csv.DictReader(file))
    judged = judge(measured)
    rows = [
        {**x.row, "exact": x.exact, "predicted exact": x.predicted_exact, "predicted": x.predicted, "chosen": x.chosen,
         "ratio": x.ratio}
        for x in judged
    ]  # fmt: skip
    show(rows, "params method B Lk s ms_p50 predicted exact chosen ratio".split(" "))
    for name, values in (
        ("time of the choice / best", [x.ratio for x in judged]),
        ("time of the choice / exact", [x.ratio * min(x.method, x.exact) / x.exact for x in judged]),
        ("predicted / measured, approximate", [x.predicted / x.method for x in judged]),
        ("predicted / measured, exact", [x.predicted_exact / x.exact for x in judged]),
    ):
        print(f"{name}: median {statistics.median(values):.3f}, from {min(values):.3f} to {max(values):.3f}")
    for x in crossings(judged):
        words = f"{x.kind} B={x.B} {x.method} s={x.policy.budget} protected={x.policy.of('express').protected}"
        print(f"{words}: faster from {x.measured:,.0f} keys on as measured, {x.predicted:,} as predicted")
    for name, row, ms in newest_prefills(measured):
        print(f"{name}, {row['Lk']} tokens: {float(row['ms_p50']):.2f} ms, {ms:.2f} as predicted")


if __name__ == "__main__":
    main()
