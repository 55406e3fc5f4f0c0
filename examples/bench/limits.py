"""What limits each kernel: ncu's counters of the main ones at real sizes.

    python examples/bench/limits.py --out examples/bench/results/limits.csv           # on a GPU with ncu, a minute
    python examples/bench/limits.py --launch "thinning, Express 512"     # one call, to profile it in another way

One sequence, 32 query and 8 KV heads of size 128, bfloat16. Every call runs once before it is profiled. Clocks are left
as they are (``--clock-control none``), and a kernel runs as often as its counters need, each time with cold caches.

What a kernel is limited by follows from its counters alone (:func:`limited_by`): the busiest unit if that is busy for
60% of its peak or more; otherwise too few programs, if there are fewer than multiprocessors; otherwise what its warps
wait for most.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from records import add_arguments, append, run_of, show

from express_compile import METHODS, Rows
from express_compile.core.rows import to_numbers
from express_compile.kernels import express as E
from express_compile.kernels import prepared
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.attend.patterns import sparse_forward_triton
from express_compile.kernels.attend.segments import Sources, causal_table, segment_attention
from express_compile.kernels.attend.segments_backward import segment_gradients
from express_compile.kernels.heads import PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random, watched_by
from express_compile.kernels.select import pages
from express_compile.kernels.select.blocks import BlockConfig, select_blocks
from express_compile.kernels.select.contest import CONTEST, compete
from express_compile.kernels.sparse import Pattern, default_stride
from express_compile.planning.devices import versions

H, H_KV, D, N, LONG = 32, 8, 128, 32768, 131072
SCALE, LAYER = D**-0.5, 3
BUSY = 60
"""Percent of its peak from which on a unit is what limits a kernel."""

UNITS = {
    "tensor cores": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
                     "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed"),
    "exponentials": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",),
    "arithmetic": ("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
                   "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed"),
    "issue slots": ("smsp__issue_active.avg.pct_of_peak_sustained_elapsed",),
    "shared memory, L1": ("l1tex__throughput.avg.pct_of_peak_sustained_elapsed",),
    "L2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "memory": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
}  # fmt: skip
"""What can be busy, and the counters that say so; the largest of those that there are."""
TIME, PROGRAMS = "gpu__time_duration.sum", "launch__grid_size"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active")
WAITS = {
    "long_scoreboard": "global memory or L2", "short_scoreboard": "shared memory or exponentials",
    "barrier": "other warps", "gmma": "the tensor cores", "wait": "the instruction before",
    "math_pipe_throttle": "a busy pipe", "mio_throttle": "the queue of shared memory", "lg_throttle": "the queue of L1",
    "no_instruction": "instructions", "sleeping": "a sleep", "membar": "a fence", "branch_resolving": "a branch",
    "dispatch_stall": "dispatch", "drain": "its last stores", "imc_miss": "constants",
}  # fmt: skip
"""What ncu calls a reason for which a warp does not issue -> what it waits for."""
WORKING = ("selected", "not_selected")
COLUMNS = [
    "date",
    "gpu",
    "torch",
    "triton",
    "commit",
    "call",
    "kernel",
    "us",
    "programs",
    "occupancy",
    *UNITS,
    "waits",
    "limit",
]
Row = dict[str, Any]


# ---- calls ----------------------------------------------------------------------------------------------------------


def tokens(n: int = N, Lq: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(n)
    sizes = (H, Lq or n), (H_KV, n), (H_KV, n)
    return [torch.randn(1, h, L, D, generator=generator, device="cuda", dtype=torch.bfloat16) for h, L in sizes]


def seed() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device="cuda")


def layout_of(protected: int = 0, recent: int = 32) -> E.Layout:
    config = E.Express(512, inflation=E.default_inflation(512), sinks=32, recent=recent, protected=protected)
    return E.make_layout(config, N, N)


Call = Callable[[], Any]


def attention(protected: int = 0, trained: bool = False) -> Call:
    q, k, v = tokens()
    layout = layout_of(protected, 256 if protected else 32)
    index, *copies = E.thin_triton(k, v, layout, SCALE, seed(), LAYER)
    sources = Sources(k, v, *copies, index if protected else None)
    if not trained:
        return lambda: segment_attention(q, sources, layout.table, SCALE)
    out, lse = segment_attention(q, sources, layout.table, SCALE)
    return lambda: segment_gradients(q, q, sources, out, lse, layout.table, SCALE)


def exact() -> Call:
    q, k, v = tokens()
    return lambda: segment_attention(q, Sources.tokens(k, v), causal_table(N, N), SCALE)


def thinning() -> Call:
    _, k, v = tokens()
    layout = layout_of()
    return lambda: E.thin_triton(k, v, layout, SCALE, seed(), LAYER)


def contest() -> Call:
    _, k, _ = tokens()
    return lambda: compete(k, 32, (N - 32) // CONTEST, 256)


def blocks(n: int) -> Call:
    q, k, _ = tokens(n)
    return lambda: select_blocks(q, k, BlockConfig(16), SCALE)


def op(name: str, qkv: list[torch.Tensor], **options: Any) -> Call:
    return lambda: METHODS[name].op(*qkv, None, seed(), SCALE, LAYER, **options)


def heads() -> Call:
    """Blocks, everything, a coreset with protected places, and a coreset, in turn."""
    kinds = Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 512, 256), Rows(32, 256, 512)
    options = dict(halving="balanced", inflation=-1, flatten=0.0, block=128, min_length=0)
    return op("heads", tokens(), **options, rows=to_numbers(kinds * (H_KV // 4)))


def page_step() -> Call:
    q, k, v = tokens(LONG, 1)
    token = torch.zeros(1, H_KV, LONG, dtype=torch.int32, device="cuda")
    means = torch.zeros(1, H_KV, LONG // pages.SUB, D, dtype=k.dtype, device="cuda")
    end = torch.tensor([LONG], dtype=torch.int32, device="cuda")
    pages.update_means(means, k, torch.zeros_like(end), end)
    held = pages.Tokens(k, v, token, token.float(), means)
    chosen = torch.zeros(1, H_KV, pages.listed(16, 32, 256), dtype=torch.int32, device="cuda")
    listing = pages.Listing(16, 32, 256, chosen, torch.zeros(1, H_KV, 2, dtype=torch.int32, device="cuda"))
    new = [x[:, :, :1].contiguous() for x in (k, v)]
    return lambda: pages.step_pages(q, *new, held, end, SCALE, listing)


def cache_step() -> Call:
    """A token from a cache that holds a coreset of 1,024 rows, of as many tokens as the other calls have."""
    q, k, v = tokens(N)
    held = Held(PerHead((Rows(32, 256, 1024),)), k, v, Random(seed(), LAYER), SCALE)
    held.fill(k[:, :, :-8], v[:, :, :-8])
    held.settle(single=True)
    held.prepare_step()
    return lambda: held.launch_step(*(x[:, :, -8:-7] for x in (q, k, v)))


def decode() -> Call:
    q, k, v = tokens(LONG, 1)
    return lambda: decode_attention(q, k, v, SCALE)


def santa() -> Call:
    options = dict(draws=[128], fraction=0.0, sampler="sys", shared=True, min_length=0)
    return op("santa", tokens(LONG, 1), **options)


def thinformer() -> Call:
    options = dict(s=256, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0)
    return op("thinformer", tokens(), **options)


def sparse(kind: str) -> Call:
    q, k, v = tokens()
    pattern = Pattern(kind, default_stride(N), 8)
    return lambda: sparse_forward_triton(q, k, v, pattern, SCALE)


PLAIN = ", plain kernel"
CALLS: dict[str, Callable[[], Call]] = {
    "attention, Express 512": attention,
    "attention, Express 512" + PLAIN: attention,
    "attention, Express 512 with 256 protected": functools.partial(attention, 256),
    "attention, causal": exact,
    "attention, causal" + PLAIN: exact,
    "attention, four kinds of heads": heads,
    "gradients, Express 512": functools.partial(attention, trained=True),
    "thinning, Express 512": thinning,
    "contests, 256 protected": contest,
    "blocks, 32,768 tokens": functools.partial(blocks, N),
    "blocks, 131,072 tokens": functools.partial(blocks, LONG),
    "pages, a step at 131,072 tokens": page_step,
    "cache, a step over 1,024 rows": cache_step,
    "exact step at 131,072 tokens": decode,
    "SANTA, S = 128, 131,072 tokens": santa,
    "Thinformer, s = 256": thinformer,
    "Sparse, fixed": functools.partial(sparse, "fixed"),
    "Sparse, strided": functools.partial(sparse, "strided"),
}
"""What is profiled: a function that makes the call. With 32,768 tokens unless it says otherwise."""


@contextlib.contextmanager
def profiled() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def launch(names: list[str], out: Path | None = None) -> None:
    """Make the calls of these ``names``, each once without the profiler and once with it, and write to ``out`` which
    kernels of which call it saw, in order."""
    seen: list[list[str]] = []
    for name in names:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(prepared, "ENABLED", False))
            if name.endswith(PLAIN):
                stack.enter_context(mock.patch.object(hopper, "takes", lambda *_: False))
            call = CALLS[name]()
            call()

            def watch(compiled: Any, *_: Any, name: str = name) -> None:
                seen.append([name, compiled.src.fn.fn.__module__, compiled.metadata.name])

            with profiled(), watched_by(watch):
                call()
        del call
        torch.cuda.empty_cache()
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows(seen)


# ---- counters -------------------------------------------------------------------------------------------------------


def wanted(available: set[str]) -> list[str]:
    """The counters to ask for, of those whose names (without what is made of them) are ``available``."""
    units = [metric for metrics in UNITS.values() for metric in metrics]
    found = [metric for metric in (*units, OCCUPANCY, TIME) if metric.partition(".")[0] in available]
    return [*found, PROGRAMS, *sorted(f"{name}.ratio" for name in available if STALL.fullmatch(name))]


def parsed(text: str) -> list[dict[str, str]]:
    """The rows of ``ncu --csv --page raw``: behind the names comes a line of units."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit(f"ncu wrote no table:\n{text[-3000:]}")
    return list(csv.DictReader(lines[first:]))[1:]


def numbers(counted: dict[str, str]) -> dict[str, float]:
    """The counters that have a number; others are empty, or say why there is none."""
    found: dict[str, float] = {}
    for name, text in counted.items():
        if "__" in name:
            with contextlib.suppress(ValueError):
                found[name] = float(text.replace(",", ""))
    return found


def row_of(counted: dict[str, str], processors: int) -> Row:
    """What a line of ncu says of one launch."""
    values = numbers(counted)
    units = {unit: max(values[m] for m in metrics if m in values) for unit, metrics in UNITS.items()
             if any(m in values for m in metrics)}  # fmt: skip
    stalls = {name[1]: x for key, x in values.items() if (name := STALL.match(key)) and name[1] not in WORKING}
    total = sum(stalls.values()) + sum(
        x for key, x in values.items() if (name := STALL.match(key)) and name[1] in WORKING
    )
    most = sorted(stalls, key=lambda name: -stalls[name])[:2]
    row: Row = {
        "us": round(values[TIME] / 1e3, 2), "programs": int(values[PROGRAMS]), "occupancy": round(values[OCCUPANCY]),
        **{unit: round(x) for unit, x in units.items()},
        "waits": "; ".join(f"{WAITS.get(name, name)} {stalls[name] / total:.0%}" for name in most),
    }  # fmt: skip
    return {**row, "limit": limited_by(row, processors)}


def limited_by(row: Row, processors: int) -> str:
    """What limits a kernel, from the columns of its row."""
    units = {unit: int(row[unit]) for unit in UNITS if row.get(unit, "") != ""}
    busiest = max(units, key=lambda unit: units[unit])
    if units[busiest] >= BUSY:
        return busiest
    if int(row["programs"]) < processors:
        return f"{row['programs']} programs"
    return "waiting for " + row["waits"].partition(";")[0].rpartition(" ")[0]


def ncu(*args: str) -> str:
    """What ncu says, which is an error if it fails."""
    program = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    done = subprocess.run([program, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"ncu {' '.join(args[:4])} ..: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def measure(names: list[str]) -> list[Row]:
    """A row for every kernel of each of these calls."""
    own = [sys.executable, __file__]
    # compiled side by side, once for all, and so that a call that fails does so without ncu
    compiling = [subprocess.Popen([*own, "--launch", *names[i::8]]) for i in range(min(8, len(names)))]
    available = {line.split()[0] for line in ncu("--query-metrics", "--chip", "gh100").splitlines() if "__" in line}
    if any([process.wait() for process in compiling]):
        raise SystemExit("a call fails by itself")
    with tempfile.TemporaryDirectory() as folder:
        log, seen = Path(folder, "ncu.csv"), Path(folder, "seen.csv")
        ours = "--kernel-name-base mangled --kernel-name regex:^[a-z_]+kernel$"  # names of C++ begin with _Z
        how = "--clock-control none --replay-mode kernel --profile-from-start off --target-processes application-only"
        table = f"--csv --page raw --print-units base --log-file {log} --metrics {','.join(wanted(available))}"
        ncu(*f"{ours} {how} {table}".split(), *own, "--seen", str(seen), "--launch", *names)
        counted = parsed(log.read_text())
        with seen.open(newline="") as file:
            launched = list(csv.reader(file))
    return joined(launched, counted, torch.cuda.get_device_properties(0).multi_processor_count)


def joined(launched: list[list[str]], counted: list[dict[str, str]], processors: int) -> list[Row]:
    """Rows of ``launched`` ``[call, module, name]``, which ncu ``counted`` in the same order; of a kernel that a call
    launches several times its longest."""
    names = [name for _, _, name in launched], [row["Kernel Name"] for row in counted]
    if names[0] != names[1]:
        raise SystemExit(f"launched were {names[0]}, ncu saw {names[1]}; must be the same")
    rows: dict[tuple[str, str], Row] = {}
    for (call, module, name), row in zip(launched, counted, strict=True):
        kernel = f"{module.rpartition('kernels.')[2]}.{name}"
        found = {"call": call, "kernel": kernel, **row_of(row, processors)}
        rows[call, kernel] = max(found, rows.get((call, kernel), found), key=lambda x: float(x["us"]))
    return [*rows.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=[*CALLS], metavar="CALL")
    parser.add_argument("--launch", nargs="+", choices=CALLS, metavar="CALL", help="make these calls, measure nothing")
    parser.add_argument("--seen", type=Path, help="with --launch: CSV file to write, the kernels of every call")
    add_arguments(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU, whose counters it reads")
    if args.launch:
        launch(args.launch, args.seen)
        return
    rows = [{**run_of(args.commit), **versions(), **row} for row in measure(args.calls)]
    if args.out:
        append(args.out, COLUMNS, rows)
    show(rows, COLUMNS[5:], width=220)


if __name__ == "__main__":
    main()
