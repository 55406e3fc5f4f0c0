"""Is it really faster: Express prefill against the best exact attention, checked first and then timed.

    python examples/benchmark.py --out examples/results/speed.csv       # on a GPU: about two minutes
    python examples/benchmark.py --lengths 4096 8192 --settings 1       # a taste, also on a CPU

One row per (length, setting). The opponent is the faster of torch's flash and cuDNN backends (on a CPU: torch's
own flash kernel) in the same run on the same inputs. A kernel whose output fails its check gets no speed-up.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile import METHODS, Policy
from express_compile.kernels import express as E
from express_compile.kernels.segments import segment_attention_reference

COLUMNS = (
    "date,gpu,torch,triton,commit,job,method,params,B,H,H_kv,Lq,Lk,D,Dv,dtype,s,ms_p20,ms_p50,ms_p80,opponent,"
    "opponent_ms_p50,speedup,error,peak_mb"
).split(",")
SETTINGS = [
    Policy(budget=512, sinks=32, window=32, protected=0),
    Policy(budget=256, sinks=32, window=512, protected=0),
    Policy(budget=1024, sinks=32, window=32, protected=0),
    Policy(budget=256, sinks=32, window=256, protected=256),
    Policy(),
]
LAYER = 0


class Clock:
    """Milliseconds of a call, with a cold L2 on a GPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if self.on_gpu else None

    def __call__(self, call: Callable[[], object], repeats: int) -> list[float]:
        call()  # compilation and caches are not what is timed
        times = []
        for _ in range(repeats):
            if self.on_gpu:
                self.flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
        return times


def quantile(times: list[float], q: float) -> float:
    return torch.tensor(times, dtype=torch.float64).quantile(q).item()


def exact_times(q, k, v, clock: Clock, repeats: int) -> dict[str, float]:
    """Median milliseconds of every exact backend that takes the shape."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if q.is_cuda:
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
    times = {}
    for name, backend in backends.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            times[name] = quantile(clock(call, repeats), 0.5)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    return times


def check(q, k, v, out, policy: Policy) -> tuple[float, float]:
    """Relative error of ``out`` in three blocks of queries against float64, and that of the reference.

    The rows are those that the op itself selected.
    """
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    layout = E.make_layout(E.config_of(policy, n), n, n)
    _, *compacted = E.select_rows(k, v, layout, scale, seed, LAYER)
    table, worst, allowed = layout.table, 0.0, 0.0
    for block in {0, len(table.tail) // 2, len(table.tail) - 1}:
        own, one = table.of_block(block, n)
        part = (q[:, :, own], k, v, *compacted)
        truth, _ = segment_attention_reference(*(x.double() for x in part), one, scale)
        reference, _ = segment_attention_reference(*part, one, scale)
        worst = max(worst, ((out[:, :, own] - truth).norm() / truth.norm()).item())
        allowed = max(allowed, 2 * ((reference - truth).norm() / truth.norm()).item())
    return worst, allowed


def measure(n: int, policy: Policy, opponents: dict[str, float], tensors, clock: Clock, repeats: int) -> dict:
    q, k, v = tensors
    spec = dict(budget=policy.budget, sinks=policy.sinks, window=policy.window, protected=policy.protected)
    params = METHODS["express"].params(None, policy)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    run = METHODS["express"].op

    def call():
        return run(q, k, v, None, seed, q.shape[-1] ** -0.5, LAYER, **params)[0]

    times = clock(call, repeats)
    peak = 0.0
    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        # beyond the inputs, the output and its log-sum-exp
        kept = out.numel() * out.element_size() + out.numel() // out.shape[-1] * 4
        peak = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    else:
        out = call()
    error, allowed = check(q, k, v, out, policy)
    best = min(opponents, key=opponents.get)
    p50 = quantile(times, 0.5)
    passed = error <= allowed
    return dict(
        job="prefill", method="express", params=" ".join(f"{a}={b}" for a, b in spec.items() if a != "budget"),
        s=policy.budget, ms_p20=quantile(times, 0.2), ms_p50=p50, ms_p80=quantile(times, 0.8), opponent=best,
        opponent_ms_p50=opponents[best], speedup=opponents[best] / p50 if passed else "failed its check",
        error=error, peak_mb=peak,
    )  # fmt: skip


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 24576, 32768, 131072, 524288])
    parser.add_argument("--settings", type=int, default=99, help="only the first settings")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("H", "H_kv"))
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    parser.add_argument("--commit", default=None, help="commit to record; asked from git if not given")
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    (H, H_kv), D = args.heads, args.head_size
    commit = (
        args.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    common = dict(
        date=datetime.date.today().isoformat(), gpu=torch.cuda.get_device_name() if on_gpu else "CPU",
        torch=torch.__version__, triton=triton_version, commit=commit, B=1, H=H, H_kv=H_kv, D=D, Dv=D,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    clock, rows = Clock(device), []
    for n in track(args.lengths, description="lengths"):
        torch.manual_seed(n)
        shapes = ((1, H, n, D), (1, H_kv, n, D), (1, H_kv, n, D))
        tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        # seconds per exact call at half a million tokens: fewer repeats there
        repeats = args.repeats if n < 200_000 else 2
        opponents = exact_times(*tensors, clock, repeats)
        for policy in SETTINGS[: args.settings]:
            row = measure(n, policy, opponents, tensors, clock, repeats)
            rows.append({**common, "Lq": n, "Lk": n, **row})
    shown = ("Lq", "s", "params", "ms_p50", "opponent", "opponent_ms_p50", "speedup", "error", "peak_mb")
    table = Table(*shown)
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in shown))
    Console(width=130).print(table)
    if args.out:
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
