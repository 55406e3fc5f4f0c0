"""Many GPUs on paper: bytes, milliseconds and rows of one decoder layer, by the ways of splitting a prefill; and what
coresets lose, measured with the reference on keys of SmolLM2.

    cd examples/bench && python parallel.py --out results/parallel.csv --plot results/parallel.png

The model, for a layer of an 8B shape (32 heads, 8 KV heads, D = 128, 4096 features, bf16), has no overlap but in ring
attention, whose exchange hides behind its products:

    linear    2 * 218e6 FLOP per token of a GPU, at 700 TFLOP/s
    rest      255 ns per token of a GPU: norms, positions, sums and what else goes feature by feature
    exact     half of 4 n^2 D H FLOP, shared evenly, at 574 TFLOP/s (cuDNN at 131,072 tokens)
    Express   4 D H FLOP per row that a query of the busiest GPU sees, at 366 TFLOP/s, and thinning: 2.52 ms at 131,072
              tokens and 6.48 ms at 524,288 with 8 KV heads, by a power law between and beyond; by coresets the
              tokens of a GPU are thinned twice, and what it is told once more
    exchange  bytes that a GPU sends, at 120 GB/s among 8 GPUs and at 45 GB/s among more (``--fast``, ``--slow``)

The rates of products and of thinning are those of the committed rows of an H200 (breakdown.csv and speed.csv); rest and
the faster link, with what packing and unpacking takes, of two of one host (two-gpus.csv). The slower link is assumed,
90 % of a 400 Gb/s port. Rows are counted by the tables that run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import add_arguments, append, run_of, show

from express_compile.core.spec import AttentionSpec, Mask
from express_compile.engines import distributed as parallel
from express_compile.kernels.exact import exact_attention
from express_compile.kernels.express import Express, express_reference, make_layout
from express_compile.kernels.express_chunks import Chunk, express_in_chunks
from express_compile.kernels.launch import Random

COLUMNS = (
    "date,gpu,commit,part,n,ranks,how,bytes,linear_ms,rest_ms,attention_ms,exchange_ms,layer_ms,speedup,rows,rows_most,error,"
    "ratio"
).split(",")
CONFIG = Express()
PER_GPU, TOTAL = 131072, 1 << 20
RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
HOW = ("tensor", "ring", "all_to_all", "coresets")


@dataclass(frozen=True)
class Rates:
    """FLOP/s, milliseconds of thinning, seconds per token of the rest, and bytes/s of links."""

    linear: float = 700e12
    exact: float = 574e12
    rows: float = 366e12
    thinning: tuple[tuple[int, float], ...] = ((131072, 2.522), (524288, 6.479))
    rest: float = 255e-9
    fast: float = 120e9
    slow: float = 45e9

    def thin_ms(self, tokens: float, heads: float = 8) -> float:
        """Of so many tokens and KV heads."""
        (n, a), (m, b) = self.thinning
        return a * (tokens / n) ** (math.log(b / a) / math.log(m / n)) * heads / 8

    def exchange_ms(self, sent: float, ranks: int) -> float:
        return 1e3 * sent / (self.fast if ranks <= 8 else self.slow)


def layer(n: int) -> AttentionSpec:
    return AttentionSpec(1, 32, 8, n, n, 128, 128, torch.bfloat16, "cuda", 128**-0.5, Mask(causal=True))


def one_piece(n: int) -> float:
    """Mean rows that a query sees."""
    return float(make_layout(CONFIG, n, n).table.rows_seen(n).mean())


def costs(n: int, ranks: int, how: str, rates: Rates) -> dict[str, Any] | None:
    """One way of splitting n tokens; None where heads do not suffice."""
    spec, own = layer(n), n // ranks
    products = 4 * spec.D * spec.H / 1e-3
    if how in ("tensor", "all_to_all") and spec.H % ranks:
        return None
    if how == "coresets" and ranks > 1:
        chunks = [Chunk(CONFIG, own, i, ranks) for i in sorted({0, 1, ranks // 2, ranks - 1})]
        rows, most = rows_of_chunks(own, ranks)
        sent = parallel.bytes_of_coresets(spec, ranks, chunks[-1].rows, CONFIG.recent)
        told = max((chunk.number * chunk.rows for chunk in chunks), default=0)
        attention = most * own * products / rates.rows + 2 * rates.thin_ms(own) + rates.thin_ms(told)
        exchange = rates.exchange_ms(sent, ranks)
    elif how == "ring":
        rows = most = n / 2
        sent = parallel.bytes_of_ring(spec, ranks)
        attention = n / 2 * own * products / rates.exact
        exchange = max(0.0, rates.exchange_ms(sent, ranks) - attention)
    else:
        rows = most = one_piece(n)
        tensor = parallel.bytes_of_tensor_parallel(spec, ranks, 4096)
        sent = tensor if how == "tensor" else parallel.bytes_of_all_to_all(spec, ranks)
        attention = rows * own * products / rates.rows + rates.thin_ms(n, max(1.0, 8 / ranks))
        exchange = rates.exchange_ms(sent, ranks)
    linear, rest = 1e3 * 2 * 218.1e6 * own / rates.linear, 1e3 * rates.rest * own
    return dict(
        n=n, ranks=ranks, how=how, bytes=round(sent), linear_ms=linear, rest_ms=rest, attention_ms=attention,
        exchange_ms=exchange, layer_ms=linear + rest + attention + exchange, rows=rows, rows_most=most,
    )  # fmt: skip


def rows_of_chunks(tokens: int, ranks: int) -> tuple[float, float]:
    """Mean rows that a query sees: of all, and of the busiest process; of up to 32 processes, evenly spaced."""
    numbers = sorted({*np.linspace(0, ranks - 1, min(ranks, 32)).astype(int).tolist()})
    found = [float(Chunk(CONFIG, tokens, i, ranks).rows_seen().mean()) for i in numbers]
    return float(np.mean(found)), max(found)


def on_paper(rates: Rates) -> Iterator[dict[str, Any]]:
    """Rows of strong scaling (all GPUs share ``TOTAL`` tokens, while each has as many as Express thins) and of weak
    scaling (``PER_GPU`` tokens each)."""
    for part, tokens in (("strong", lambda ranks: TOTAL), ("weak", lambda ranks: PER_GPU * ranks)):
        for how in HOW:
            for ranks in RANKS:
                n = tokens(ranks)
                if n // ranks <= CONFIG.exact_up_to or n > 1 << 27:
                    continue
                if (found := costs(n, ranks, how, rates)) is not None:
                    alone = costs(n, 1, "ring" if how == "ring" else "tensor", rates) if n <= 1 << 23 else None
                    speedup = alone["layer_ms"] / found["layer_ms"] if alone else ""
                    yield {"part": part, **found, "speedup": speedup}


# ---- what coresets lose --------------------------------------------------------------------------------------------


def keys_of_smollm2(tokens: int, layers: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Query of one head per KV head, key and value of some layers, for the beginning of a text."""
    import transformers
    from models import load_smollm2, long_texts

    model, tokenizer = load_smollm2("cpu", torch.float32)
    ids = tokenizer(long_texts()["python-data-model"], return_tensors="pt").input_ids[:, :tokens]
    seen = []

    def attention(module, query, key, value, mask, scaling=None, **more):
        if module.layer_idx in layers:
            seen.append((query[:, :: module.num_key_value_groups], key, value))
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=scaling, **more)

    transformers.AttentionInterface.register("recorded", attention)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return seen


def measured(tokens: int, budget: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Error over all queries by the number of chunks, and over that of one piece at as many rows in the mean (by a
    power law between neighbouring budgets)."""
    given = keys_of_smollm2(tokens, (12, 20))
    exact = [exact_attention(*x, x[0].shape[3] ** -0.5)[0] for x in given]

    def error(run: Any) -> float:
        squares = [
            ((run(x, seed) - out).norm() / out.norm()).square().item()
            for x, out in zip(given, exact, strict=True) for seed in range(seeds)
        ]  # fmt: skip
        return math.sqrt(float(np.mean(squares)))

    def piece(config: Express) -> tuple[float, float]:
        rows = make_layout(config, tokens, tokens).table.rows_seen(tokens).mean()
        return float(rows), error(lambda x, i: express_reference(*x, config, x[0].shape[3] ** -0.5, torch.tensor(i))[0])

    own = Express(budget, sinks=4, recent=64, protected=0)
    ones = [piece(replace(own, budget=rows)) for rows in (budget // 4, budget // 2, budget, 2 * budget, 4 * budget)]
    for chunks in (1, 2, 4, 8, 16):
        size = tokens // chunks
        rows = np.concatenate([Chunk(own, size, i, chunks).rows_seen() for i in range(chunks)]).mean()
        found = error(lambda x, i, chunks=chunks: express_in_chunks(
            *x, own, x[0].shape[3] ** -0.5, Random(torch.tensor(i), 0), chunks)[0])  # fmt: skip
        equal = math.exp(np.interp(math.log(rows), *(np.log(x) for x in zip(*ones, strict=True))))
        yield {"part": f"SmolLM2 s={budget}", "n": tokens, "ranks": chunks, "how": "coresets", "rows": float(rows),
               "error": found, "ratio": found / equal}  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    labels = {"tensor": "tensor parallel", "ring": "ring attention, exact", "all_to_all": "all-to-all"}
    for how in HOW:
        own = [row for row in rows if row["part"] == "weak" and row["how"] == how and row["ranks"] > 1]
        for axis, column in zip(axes, ("bytes", "layer_ms"), strict=False):
            axis.loglog([x["ranks"] for x in own], [x[column] for x in own], marker=".", label=labels.get(how, how))
    axes[0].set(title="bytes that a GPU sends in a layer", xlabel="GPUs, 131,072 tokens each")
    axes[1].set(title="milliseconds of a layer (model)", xlabel="GPUs, 131,072 tokens each")
    axes[1].legend()
    own = [row for row in rows if row["part"].startswith("SmolLM2")]
    chunks, ratios = ([x[column] for x in own] for column in ("ranks", "ratio"))
    axes[2].semilogx(chunks, ratios, marker=".", base=2, label="measured, SmolLM2")
    axes[2].axhline(1.2, color="grey", linestyle=":", label="bar")
    axes[2].set(title="error over one piece's at equal rows", xlabel="coresets", ylim=(0, 1.5))
    axes[2].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", type=float, default=Rates.fast, help="bytes/s of a GPU's link among 8")
    parser.add_argument("--slow", type=float, default=Rates.slow, help="bytes/s of a GPU's link among more")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text whose keys are thinned; 0 for none")
    parser.add_argument("--plot", type=Path)
    add_arguments(parser)
    arguments = parser.parse_args()
    about = run_of(arguments.commit)
    rows = list(on_paper(Rates(fast=arguments.fast, slow=arguments.slow)))
    rows += list(measured(arguments.tokens, 64, 2)) if arguments.tokens else []
    rows = [dict.fromkeys(COLUMNS, "") | about | row for row in rows]
    show(rows, COLUMNS[3:])
    if arguments.out is not None:
        append(arguments.out, COLUMNS, rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
