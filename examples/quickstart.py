"""The main job: a real language model reads a long text with exact and with Express attention.

    python examples/quickstart.py             # GPU if there is one, else the CPU in about four minutes
    python examples/quickstart.py --layers 2  # a fast taste: only the first layers of the model

Prints what was rewritten, how far the answers are from the exact ones, what it forgot, and how long it took;
draws the error per position and the rows that each query saw.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers' loading; read when torch imports tqdm

sys.path.append(str(Path(__file__).parent / "bench"))  # where what it shares with the measurements lives

import numpy as np
import torch
from matplotlib.figure import Figure
from measures import TokenStats, recalls, token_statistics
from models import load_smollm2, long_texts, needle_prompts
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from express_compile import Policy, explain, record_sites, restore_attention, rewrite_attention
from express_compile.kernels.express import rows_seen

OPTIONS = dict(budget=256, sinks=32, window=256, protected=256, methods=["express"])
# the same number of rows, none of them protected: shows what protection is good for
WITHOUT_PROTECTION = {**OPTIONS, "protected": 0, "window": 512}
NEEDLE_TOKENS = 2304
WIDTH = 120


@dataclass
class Run:
    """One row of the table. ``policy`` is None for exact attention, ``sites`` then too; ``recalled`` is optional."""

    hidden: torch.Tensor
    seconds: float
    policy: Policy | None = None
    sites: str = "-"
    recalled: str = "-"


def timed(call: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float]:
    """The result, and the seconds of the fastest of ``repeats`` calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return result, best


def rewritten(sites: tuple | list) -> str:
    """How many of the sites found were rewritten, as ``"30/30"``."""
    return f"{sum(site.verdict == 'rewritten' for site in sites)}/{len(sites)}"


def number(x: float) -> str:
    """``x`` in a few characters, whatever its size."""
    return f"{x:.4f}" if 1e-3 <= x < 1 else f"{x:.2f}" if 1 <= x < 1000 else f"{x:.1e}"


def draw(runs: dict[str, Run], stats: dict[str, TokenStats], n: int, first: int, path: Path, title: str) -> None:
    """KL per position (median and mean of 64 positions) above, rows seen per query below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    approximate = {name: run for name, run in runs.items() if run.policy is not None and name in stats}
    for color, width, (name, run) in zip(("C0", "C1"), (4, 1.5), approximate.items(), strict=False):
        kl = stats[name].kl
        bins = kl[: len(kl) // 64 * 64].clip(1e-9).reshape(-1, 64)
        middle, rows = np.arange(len(bins)) * 64 + 32, rows_seen(run.policy, n)
        thinned = middle >= np.argmax(rows < np.arange(1, n + 1))  # before it every row is kept: KL is rounding
        own = run.policy.of("express")
        label = f"protected={own.protected}, window={own.recent}"
        above.plot(middle[thinned], bins.mean(1)[thinned], color=color, label=f"{label}: mean of 64 positions")
        above.plot(middle[thinned], np.median(bins, 1)[thinned], ":", color=color, label=f"{label}: median")
        below.plot(np.arange(1, n + 1), rows, color=color, linewidth=width, label=f"Express, {label}")
    above.set(ylabel="KL to exact, nats per token", yscale="log")
    above.set_title(title, fontsize=11)
    below.plot(np.arange(1, n + 1), np.arange(1, n + 1), color="0.4", linestyle="--", label="exact")
    below.set(xlabel="position", ylabel="rows a query attends to", xlim=(0, n), ylim=(0, None))
    for axes in (above, below):
        axes.axvline(first, color="0.7", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    below.annotate("the table counts\nfrom here on", (first, 0), (first + n * 0.01, n * 0.02), color="0.4", fontsize=9)
    figure.savefig(path, dpi=120)


def table_of(runs: dict[str, Run], stats: dict[str, TokenStats], n: int, first: int, title: str) -> Table:
    """One row per run; the measures are means over the positions from ``first`` on."""
    table = Table(title=title)
    for column in ("run", "sites", "rows kept / n", "KL to exact", "top-1", "perplexity (exact)", "seconds", "needles"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, run in runs.items():
        s = next(iter(stats.values())).tail(first) if name == "exact" else stats[name].tail(first)
        rows = n if run.policy is None else rows_seen(run.policy, n)[first:].mean()
        perplexity = number(s.perplexity_exact if name == "exact" else s.perplexity)
        table.add_row(
            name,
            run.sites,
            f"{rows:.0f} / {n}",
            "-" if name == "exact" else number(max(0.0, s.kl.mean())),
            "-" if name == "exact" else f"{s.agree.mean():.3f}",
            f"{perplexity} ({number(s.perplexity_exact)})",
            f"{run.seconds:.2f}",
            run.recalled,
        )
    return table


def arguments(on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 4096, help="length of the text")
    parser.add_argument("--needles", type=int, default=12 if on_gpu else 3, help="needle depths to try; 0 for none")
    parser.add_argument("--layers", type=int, help="run only the first layers of the model: fast, but it babbles")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args()
    if args.tokens < 64:
        parser.error(f"--tokens={args.tokens}: must be at least 64")
    if args.needles < 0:
        parser.error(f"--needles={args.needles}: must be 0 or more")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers={args.layers}: must be 1 or more")
    if not args.picture.resolve().parent.is_dir():
        parser.error(f"--picture={args.picture}: there is no such folder")
    return args


class Reader:
    """The model reads the same text in one run after the other; what each gave is in ``runs``."""

    def __init__(self, args: argparse.Namespace, progress: Progress, on_gpu: bool) -> None:
        self.on_gpu, self.repeats, self.progress = on_gpu, 3 if on_gpu else 1, progress
        device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        with self.step("loading the model"):
            self.model, tokenizer = load_smollm2(device, dtype)
        self.body = self.model.model
        if args.layers is not None:
            self.body.layers = self.body.layers[: args.layers]
            self.model.config.num_hidden_layers = len(self.body.layers)
        self.text_name, text = next(iter(long_texts().items()))
        self.ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens].to(device)
        if self.ids.shape[1] < args.tokens:
            sys.exit(f"--tokens={args.tokens}: the text {self.text_name} has {self.ids.shape[1]} tokens only")
        depths = np.linspace(0.1, 0.9, args.needles).tolist()
        prompts = needle_prompts(tokenizer, NEEDLE_TOKENS, depths, n_distractors=0, seed=0)
        self.needles = [tuple(torch.tensor(part, device=device) for part in prompt) for prompt in prompts]
        self.runs: dict[str, Run] = {}

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Show that something takes its time."""
        task, start = self.progress.add_task(description, total=None), time.perf_counter()
        yield
        self.progress.update(task, total=1, completed=1)
        if self.progress.disable:  # a log file: a line per step
            self.progress.console.print(f"  {description}, {time.perf_counter() - start:.0f} s", highlight=False)

    def read(self, module: Callable) -> torch.Tensor:
        with torch.no_grad():
            return module(input_ids=self.ids, use_cache=False).last_hidden_state

    def run(self, name: str, module: Callable, policy: Policy | None = None) -> Run:
        if self.on_gpu or module is not self.body:
            with self.step(f"{name}: first run, which compiles"):
                self.read(module)  # is not timed
        with self.step(f"{name}: reading"):
            self.runs[name] = Run(*timed(lambda: self.read(module), self.repeats), policy)
        return self.runs[name]

    def recalled(self, name: str, cases: list) -> list:
        """Those of the needles ``cases`` that are found; counted in the run's row."""
        if not cases:
            return []
        with self.step(f"{name}: {len(cases)} needle{'s' * (len(cases) != 1)}"):
            found = [case for case in cases if recalls(self.model, *case)]
        self.runs[name].recalled = f"{len(found)}/{len(cases)}"
        return found

    def eager(self, name: str, options: dict[str, Any], cases: list) -> None:
        policy = Policy(**options)
        rewrite_attention(self.body, policy)
        with record_sites() as sites:
            self.run(name, self.body, policy)
        self.runs[name].sites = rewritten(sites[-len(self.body.layers) :])
        self.recalled(name, cases)
        restore_attention(self.body)

    def compiled(self, name: str) -> None:
        with self.step(f"{name}: explain"):  # methods are named, so the length decides nothing
            report = explain(self.body, self.ids[:, :256], example_kwargs={"use_cache": False}, **OPTIONS)
        module = torch.compile(self.body, backend="express", options=OPTIONS)
        self.run(name, module, Policy(**OPTIONS)).sites = rewritten(report.sites)

    def statistics(self) -> dict[str, TokenStats]:
        """Of every run but the exact one, beside it."""
        stats: dict[str, TokenStats] = {}
        for name, one in self.runs.items():
            if name != "exact":
                with self.step(f"{name}: comparing"):
                    exact = self.runs["exact"].hidden
                    stats[name] = token_statistics(exact, one.hidden, self.model.lm_head, self.ids)
        return stats


def main() -> None:
    on_gpu = torch.cuda.is_available()
    args = arguments(on_gpu)
    if "express" not in torch._dynamo.list_backends():
        sys.exit(
            "torch.compile does not know the backend 'express', because express-compile is not installed here "
            "(PYTHONPATH is not enough): run `pip install -e .` in the root of the checkout"
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        reader = Reader(args, progress, on_gpu)
        body, n = reader.body, reader.ids.shape[1]
        progress.console.print(
            f"SmolLM2-135M-Instruct, {len(body.layers)} layers, reads {n} tokens of {reader.text_name} on {machine}"
        )
        reader.run("exact", body)
        solved = reader.recalled("exact", reader.needles)
        reader.eager("rewrite_attention", OPTIONS, solved)
        reader.eager("… protected=0, window=512", WITHOUT_PROTECTION, solved)
        if on_gpu:
            reader.run("torch.compile, inductor", torch.compile(body))
        reader.compiled("torch.compile, express")
        stats = reader.statistics()

    first = 2048 if n > 2048 else n // 2
    title = f"{n} tokens, {machine}; means over positions from {first} on"
    Console(width=max(WIDTH, console.width)).print(table_of(reader.runs, stats, n, first, title))
    console.print(
        f"Express with {', '.join(f'{k}={v}' for k, v in OPTIONS.items() if k != 'methods')}, if not said otherwise.\n"
        f"needles: a 7-digit number hidden in {NEEDLE_TOKENS} tokens of noise; counted are those that exact attention "
        "finds.\nThinning forgets single facts; protected rows hold some of them: see docs/limits.md.",
        highlight=False,
    )
    if not on_gpu:
        console.print("seconds on a CPU are those of the reference, which is written to be read; kernels need a GPU.")
    title = f"{n} tokens of {reader.text_name}, {len(body.layers)} layers, {machine}"
    draw(reader.runs, stats, n, first, args.picture, title)
    console.print(f"picture: {args.picture.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
