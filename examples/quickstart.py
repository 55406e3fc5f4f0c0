"""The main job: a real language model reads a long text with exact attention, and with few rows for every KV head.

    python examples/quickstart.py             # GPU if there is one, else the CPU in about two minutes
    python examples/quickstart.py --layers 2  # a fast taste: only the first layers of the model

By the plan for every KV head in examples/plans, by a window of as many rows (StreamingLLM), and by Express with as many
rows in all heads. Prints what was rewritten, how far the answers are from the exact ones, which of the facts hidden
in the text were found, and how long it took; draws the error per position and the rows per query.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
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
from measures import TokenStats, token_statistics
from models import judged_texts, load_smollm2
from needles import WORDS, asked_at_once
from plans import BLOCK, Plan, average_rows, rows_by_head, uniform
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from express_compile import SavedPlan, explain, record_sites, restore_attention, rewrite_attention
from express_compile.kernels.heads import PerHead, rows_seen
from express_compile.quality.profile import late

PLAN = Path(__file__).parent / "plans" / "smollm2-135m.json"
TEXT = "acts"  # nothing was profiled on it
COMPILED = 4  # layers whose two routes are compared
WIDTH = 120


@dataclass
class Run:
    """One row of the table. ``plan`` is None for exact attention, ``sites`` then too; ``recalled`` is optional."""

    hidden: torch.Tensor
    seconds: float
    plan: Plan | None = None
    sites: str = "-"
    recalled: str = "-"


class Body(torch.nn.Module):
    """The model without its head, under the paths of modules that it has in the whole."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return out


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


def rows_per_query(plan: Plan, n: int) -> np.ndarray:
    """Rows that each query of ``n`` tokens sees, mean over KV heads ``[n]``."""
    counts = Counter(rows_by_head(plan))
    return np.average(rows_seen(PerHead(tuple(counts), block=BLOCK), n), axis=0, weights=list(counts.values()))


def draw(runs: dict[str, Run], stats: dict[str, TokenStats], n: int, first: int, path: Path, title: str) -> None:
    """KL per position (median and mean of 64 positions) above, rows seen per query below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    shown = [(name, run.plan) for name, run in runs.items() if run.plan is not None and "compile" not in name]
    for color, (name, plan) in zip(("C0", "C1", "C2"), shown, strict=True):
        kl, rows = stats[name].kl, rows_per_query(plan, n)
        bins = kl[: len(kl) // 64 * 64].clip(1e-9).reshape(-1, 64)
        middle = np.arange(len(bins)) * 64 + 32
        thinned = middle >= np.argmax(rows < np.arange(1, n + 1))  # before it every row is kept: KL is rounding
        above.plot(middle[thinned], bins.mean(1)[thinned], color=color, label=f"{name}: mean of 64 positions")
        above.plot(middle[thinned], np.median(bins, 1)[thinned], ":", color=color, label=f"{name}: median")
        below.plot(np.arange(1, n + 1), rows, color=color, label=name)
    above.set(ylabel="KL to exact, nats per token", yscale="log")
    above.set_title(title, fontsize=11)
    below.plot(np.arange(1, n + 1), np.arange(1, n + 1), color="0.4", linestyle="--", label="exact")
    below.set(xlabel="position", ylabel="rows a query attends to, mean over KV heads", xlim=(0, n), ylim=(0, None))
    for axes in (above, below):
        axes.axvline(first, color="0.7", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    below.annotate("the table counts\nfrom here on", (first, 0), (first + n * 0.01, n * 0.02), color="0.4", fontsize=9)
    figure.savefig(path, dpi=120)


def table_of(runs: dict[str, Run], stats: dict[str, TokenStats], n: int, first: int, title: str) -> Table:
    """One row per run; the measures are means over the positions of the text from ``first`` on."""
    table = Table(title=title)
    for column in ("run", "sites", "rows kept / n", "KL to exact", "top-1", "perplexity (exact)", "seconds", "needles"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, run in runs.items():
        s = next(iter(stats.values())).tail(first) if name == "exact" else stats[name].tail(first)
        rows = n if run.plan is None else average_rows(run.plan, n)
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
    parser.add_argument("--needles", type=int, default=8, help="facts to hide in it; 0 for none")
    parser.add_argument("--layers", type=int, help="run only the first layers of the model: fast, but it babbles")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu,
        help="let the whole model read through torch.compile, too: two minutes more on a CPU",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args()
    if args.tokens < 1024:
        parser.error(f"--tokens={args.tokens}: must be at least 1024")
    if not 0 <= args.needles <= len(WORDS):
        parser.error(f"--needles={args.needles}: must be in 0..{len(WORDS)}")
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
        self.cut(args.layers)
        ids, self.answers, self.text_tokens = asked_at_once(tokenizer, args.tokens, judged_texts()[TEXT], args.needles)
        self.ids = torch.tensor([ids], device=device)
        self.plan = SavedPlan(SavedPlan.load(PLAN).sites[: self.layers])
        self.runs: dict[str, Run] = {}

    @property
    def layers(self) -> int:
        return len(self.model.model.layers)

    def cut(self, layers: int | None) -> None:
        """Keep the first layers only; None keeps all."""
        self.model.model.layers = self.model.model.layers[:layers]
        self.model.config.num_hidden_layers = self.layers
        self.body = Body(self.model)

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Show that something takes its time."""
        task, start = self.progress.add_task(description, total=None), time.perf_counter()
        yield
        self.progress.update(task, total=1, completed=1)
        if self.progress.disable:  # a log file: a line per step
            self.progress.console.print(f"  {description}, {time.perf_counter() - start:.0f} s", highlight=False)

    @torch.no_grad()
    def run(self, name: str, module: Callable, plan: Plan | None = None) -> Run:
        if self.on_gpu or module is not self.body:
            with self.step(f"{name}: first run, which compiles"):
                module(self.ids)  # is not timed
        with self.step(f"{name}: reading"):
            run = self.runs[name] = Run(*timed(lambda: module(self.ids), self.repeats), plan)
        found = [self.found(run.hidden, answer) for answer in self.answers]
        if plan is None:
            self.solved = found
        if any(self.solved):
            run.recalled = f"{sum(a and b for a, b in zip(found, self.solved, strict=True))} of {sum(self.solved)}"
        return run

    def found(self, hidden: torch.Tensor, answer: slice) -> bool:
        """Whether each of its tokens is ranked first."""
        best = self.model.lm_head(hidden[0, answer.start - 1 : answer.stop - 1]).argmax(-1)
        return torch.equal(best, self.ids[0, answer])

    def eager(self, name: str, plan: Plan) -> None:
        options: dict[str, Any] = {"plan": plan} if isinstance(plan, SavedPlan) else {"methods": [plan]}
        rewrite_attention(self.body, **options)
        with record_sites() as sites:
            self.run(name, self.body, plan)
        self.runs[name].sites = rewritten(sites[-self.layers :])
        restore_attention(self.body)

    def compiled(self, name: str) -> None:
        """The plan again, by the other route."""
        with self.step(f"{name}: explain"):
            report = explain(self.body, self.ids[:, :256], plan=self.plan)
        module = torch.compile(self.body, backend="express", options={"plan": self.plan})
        self.run(name, module, self.plan).sites = rewritten(report.sites)

    @torch.no_grad()
    def first_layers_compiled(self) -> float:
        """How far the first layers that follow the plan through ``torch.compile`` are from the same through
        ``rewrite_attention``, on the first tokens; relative. Leaves a model of these layers only."""
        self.cut(COMPILED)
        plan, ids = SavedPlan(self.plan.sites[: self.layers]), self.ids[:, :1024]
        with self.step(f"torch.compile of {self.layers} layers"):
            compiled = torch.compile(self.body, backend="express", options={"plan": plan})(ids)
            own = rewrite_attention(self.body, plan=plan)(ids)
            restore_attention(self.body)
        return float((compiled - own).norm() / own.norm())

    def statistics(self) -> dict[str, TokenStats]:
        """Of every run but the exact one, beside it, in the text; the questions at its end have their own column."""
        stats: dict[str, TokenStats] = {}
        exact, ids = (x[:, : self.text_tokens] for x in (self.runs["exact"].hidden, self.ids))
        for name, one in self.runs.items():
            if name != "exact":
                with self.step(f"{name}: comparing"):
                    hidden = one.hidden[:, : self.text_tokens]
                    stats[name] = token_statistics(exact, hidden, self.model.lm_head, ids)
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
        n, layers = args.tokens, reader.layers
        text = f"{n} tokens of {TEXT}, {layers} layers, {machine}"
        progress.console.print(f"SmolLM2-135M-Instruct reads {text}")
        reader.run("exact", reader.body)
        reader.eager("plan per KV head", reader.plan)
        equal = uniform(average_rows(reader.plan, n), n)
        reader.eager("StreamingLLM", equal["streaming"])
        reader.eager("uniform Express", equal["express"])
        if args.compile:
            if on_gpu:
                reader.run("torch.compile, inductor", torch.compile(reader.body))
            reader.compiled("torch.compile, plan")
        stats = reader.statistics()
        off = reader.first_layers_compiled()

    first = late(n)
    title = f"{n} tokens, {machine}; means over positions from {first} on"
    Console(width=max(WIDTH, console.width)).print(table_of(reader.runs, stats, n, first, title))
    console.print(
        f"plan per KV head: {PLAN.name}, fitted to other texts. StreamingLLM: {equal['streaming'].rows[0]}. uniform "
        f"Express: {equal['express'].rows[0]}.\nneedles: {len(reader.answers)} access codes are hidden in the text and "
        f"asked for at its end; counted are those that exact attention finds.\nThe first {reader.layers} layers of the "
        f"plan through torch.compile(backend='express') differ from rewrite_attention by {off:.0e}.",
        highlight=False,
    )
    if not on_gpu:
        console.print("seconds on a CPU are those of the reference, which is written to be read; kernels need a GPU.")
    draw(reader.runs, stats, n, first, args.picture, text)
    console.print(f"picture: {args.picture.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
