"""The main job: a real language model reads a long text with exact and with Express attention.

    python examples/quickstart.py             # GPU if there is one, else the CPU in a few minutes

Prints what was rewritten, how far the answers are from the exact ones, what it forgot, and how long it took;
draws the error per position and the rows that each query saw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from measures import TokenStats, recalls, token_statistics
from models import load_smollm2, long_texts, needle_prompts
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from express_compile import Policy, explain, restore_attention, rewrite_attention
from express_compile.kernels.express import ExpressConfig, default_inflation, make_layout

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OPTIONS = dict(budget=256, sinks=32, window=512, methods=["express"])


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


def rows_seen(n: int, policy: Policy) -> np.ndarray:
    """Rows that each query attends to, itself included."""
    config = ExpressConfig(policy.budget, default_inflation(policy.budget), policy.sinks, policy.window)
    return make_layout(config, n, n).table.rows_seen(n)


def draw(stats: dict[str, TokenStats], rows: np.ndarray, path: Path, title: str) -> None:
    """KL per position (mean over 64 positions) above, rows seen per query below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for name, s in stats.items():
        kl = s.kl[: len(s.kl) // 64 * 64].reshape(-1, 64).mean(1)
        above.plot(np.arange(len(kl)) * 64 + 32, kl, label=name)
    above.set(ylabel="KL to exact, nats per token", title=title)
    above.legend()
    below.plot(np.arange(len(rows)) + 1, label="exact")
    below.plot(rows, label="Express")
    below.set(xlabel="position", ylabel="rows a query attends to")
    below.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 4608, help="length of the text")
    parser.add_argument("--needles", type=int, default=12 if on_gpu else 3, help="needle depths to try")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args()

    console = Console()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    model, tokenizer = load_smollm2(device, dtype)
    name, text = next(iter(long_texts().items()))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens].to(device)
    n = ids.shape[1]
    policy = Policy(**OPTIONS)
    rows = rows_seen(n, policy)
    console.print(f"SmolLM2-135M-Instruct reads {n} tokens of {name} on {machine}")

    repeats = 3 if on_gpu else 1
    hidden, seconds, recalled, sites = {}, {}, {}, {}
    lengths = max(3000, n // 2)
    depths = np.linspace(0.1, 0.9, args.needles).tolist()
    cases = [
        (torch.tensor(prompt, device=device), torch.tensor(answer, device=device))
        for prompt, answer in needle_prompts(tokenizer, lengths, depths, n_distractors=0, seed=0)
    ]

    def read(body: Callable) -> torch.Tensor:
        with torch.no_grad():
            return body(input_ids=ids, use_cache=False).last_hidden_state

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:

        def step(description: str) -> None:
            for task in progress.task_ids:
                progress.update(task, total=1, completed=1)
            progress.add_task(description, total=None)

        def run(name: str, body: Callable, how: str) -> None:
            step(f"{name}: {how}")
            if on_gpu or "compile" in name:
                read(body)  # compilation and autotuning are not what is timed
            hidden[name], seconds[name] = timed(lambda: read(body), repeats)

        run("exact", model.model, "forward")
        step("exact: needles")
        solved = [case for case in cases if recalls(model, *case)]
        recalled["exact"] = f"{len(solved)}/{len(cases)}"

        rewrite_attention(model, policy=policy)
        run("rewrite_attention", model.model, "forward")
        step("rewrite_attention: needles")
        recalled["rewrite_attention"] = f"{sum(recalls(model, *case) for case in solved)}/{len(solved)}"
        step("rewrite_attention: explain")
        sites["rewrite_attention"] = explain(model, ids[:, :2048], example_kwargs={"use_cache": False}).sites
        restore_attention(model)

        step("torch.compile: explain")
        report = explain(model, ids, example_kwargs={"use_cache": False}, **OPTIONS)
        sites['torch.compile(backend="express")'] = report.sites
        run('torch.compile(backend="inductor")', torch.compile(model.model), "compile and forward")
        compiled = torch.compile(model.model, backend="express", options=OPTIONS)
        run('torch.compile(backend="express")', compiled, "compile and forward")
        step("comparing")
        stats = {
            name: token_statistics(hidden["exact"], x, model.lm_head, ids)
            for name, x in hidden.items()
            if name != "exact"
        }

    first = 2048
    table = Table(title=f"SmolLM2-135M-Instruct, {n} tokens, {machine}; positions from {first} on")
    for column in ("run", "sites", "rows kept / n", "KL to exact", "top-1", "perplexity (exact)", "seconds", "needles"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name in hidden:
        approximate = name in sites
        s = stats[name].tail(first) if name in stats else None
        table.add_row(
            name,
            f"{sum(site.verdict == 'rewritten' for site in sites[name])}/{len(sites[name])}" if approximate else "-",
            f"{rows[first:].mean():.0f} / {n}" if approximate else f"{n} / {n}",
            f"{s.kl.mean():.4f}" if s else "0",
            f"{s.agree.mean():.3f}" if s else "1",
            f"{s.perplexity:.2f} ({s.perplexity_exact:.2f})" if s else "-",
            f"{seconds[name]:.2f}",
            recalled.get(name, "-"),
        )
    console.print(table)
    methods = sorted({site.method for found in sites.values() for site in found})
    console.print(
        f"methods: {', '.join(methods)}; needles: a 7-digit number hidden in {lengths} tokens of noise, counted where "
        "exact attention finds it.\nThinning keeps a fraction of the rows and forgets single facts; `protected` holds "
        "some of them, see the README."
    )
    draw({name: s for name, s in stats.items() if name in sites}, rows, args.picture, f"{n} tokens, {machine}")
    console.print(f"picture: {args.picture.resolve()}")


if __name__ == "__main__":
    main()
