"""Thinformer on encoders: sentence embeddings, attention error on real and made-up keys, time of whole models.

    python examples/bench/encoders.py minilm error plot --out examples/bench/results # ten minutes on two CPU cores
    python examples/bench/encoders.py speed --out examples/bench/results  # on a GPU
    python examples/bench/encoders.py speed --tiny --lengths 256                  # a taste on a CPU

* ``minilm``: all-MiniLM-L6-v2 (a PyPI wheel, see ``make models``) embeds sentences and 512-token passages with s keys
  per head: cosine similarity to the exact embeddings, and how well passages are found.
* ``error``: relative error of attention without a causal mask over s of n keys, for every halving rule.
* ``speed``: ViT-B/16 and BERT-base with random weights, every site rewritten, against the best exact backend.
* ``plot``: draws thinformer-error.png from the rows of ``error`` in quality.csv.

``halving=uniform`` keeps one random key of every run of neighbours; ``truncated`` reads the first s tokens only.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import csv
import math
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers' loading; read when torch imports tqdm

import numpy as np
import torch
import torch.nn.functional as F
from benchmark import Clock, peak_of, quantile
from matplotlib.figure import Figure
from measures import Captured, chunk_bootstrap, retrieval
from models import REPETITIVE, load_minilm, load_smollm2, long_texts
from records import QUALITY_COLUMNS, SPEED_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track
from tables import newest
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile import METHODS, Policy, Site, record_sites, restore_attention, rewrite_attention
from express_compile.planning.devices import versions

MINILM = "all-MiniLM-L6-v2"
TOKENS = 512  # what MiniLM can read, [CLS] and [SEP] included
QUERY = range(24, 49)  # tokens of a sentence that serves as a query
RULES = ("balanced", "kernel", "uniform")
ERROR = "thinformer error: "
Tokens = list[int]
Keys = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# -- sentence embeddings -----------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[Tokens], limit: int = TOKENS, batch: int = 20) -> torch.Tensor:
    """Unit vectors ``[len(texts), 384]``: the mean of the last hidden states over the real tokens, normalised.

    Batches are padded on the right; texts longer than ``limit`` tokens, [CLS] and [SEP] included, are cut.
    """
    vectors = []
    for start in range(0, len(texts), batch):
        part = [[tokenizer.cls_token_id, *x[: limit - 2], tokenizer.sep_token_id] for x in texts[start : start + batch]]
        inputs = tokenizer.pad({"input_ids": part}, return_tensors="pt").to(model.device)
        hidden = model(**inputs).last_hidden_state
        vectors.append(F.normalize((hidden * inputs["attention_mask"][..., None]).sum(1), dim=-1))
    return torch.cat(vectors)


def passages(tokenizer: Any, count: int) -> tuple[list[Tokens], list[Tokens]]:
    """``count`` sentences of 24 to 48 tokens and the passages of 510 tokens that they are missing from.

    The five natural texts take turns. Whole sentences are gathered up to 560 tokens or more, one at a random place is
    taken out, and the first 510 tokens of the rest are its passage. Raises ``ValueError`` if there are not so many.
    """
    random_, sources = random.Random(0), []
    for text in (text for name, text in long_texts().items() if name not in REPETITIVE):
        pairs, part = [], []
        for sentence in re.split(r"(?<=[.:;?!])\s+", text):
            part.append(tokenizer(sentence, add_special_tokens=False).input_ids)
            if sum(map(len, part)) >= TOKENS + QUERY[-1]:
                if candidates := [i for i, x in enumerate(part[:-1]) if len(x) in QUERY]:
                    pairs.append((part.pop(random_.choice(candidates)), sum(part, [])[: TOKENS - 2]))
                part = []
        sources.append(pairs)
    found = [pair for turn in zip(*sources, strict=False) for pair in turn]
    if len(found) < count:
        raise ValueError(f"count={count!r}: the texts on this machine hold {len(found)} passages")
    return tuple(map(list, zip(*found[:count], strict=True)))


def minilm_rows(device: str, count: int, budgets: list[int]) -> list[dict]:
    """Exactness on short padded sentences, cosine on long passages, and the search for each sentence's passage.

    Queries and passages are embedded by the same model. Intervals resample passages and queries.
    """
    model, tokenizer = load_minilm(device)
    texts = passages(tokenizer, count)
    exact = [embed(model, tokenizer, x) for x in texts]
    rows: list[dict] = []

    def rewritten(s: int, halving: str) -> list[torch.Tensor]:
        rewrite_attention(model, methods=["thinformer"], budget=s, halving=halving, strict=True)
        embedded = [embed(model, tokenizer, x) for x in texts]
        restore_attention(model)
        return embedded

    def compare(embedded: list[torch.Tensor], method: str, s: int, params: str = "") -> None:
        own = dict(model=MINILM, n=TOKENS, method=method, params=params, rows=s)
        measures = {("passages", "cosine"): (embedded[1] * exact[1]).sum(1).double().cpu().numpy()}
        for metric, values in retrieval(*embedded, exact[0] @ exact[1].T).items():
            measures[f"retrieval of {count} passages", metric] = values
        for (task, metric), values in measures.items():
            value, low, high = chunk_bootstrap([values], chunk=1)
            rows.append({**own, "task": task, "metric": metric, "value": value, "low": low, "high": high})

    compare(exact, "exact", TOKENS)
    for s in track(budgets, description="MiniLM"):
        for halving in ("balanced", "uniform"):
            embedded = rewritten(s, halving)
            compare(embedded, "thinformer", s, f"s={s} halving={halving}")
            if s >= QUERY[-1] + 2:
                worst = (embedded[0] * exact[0]).sum(1).min().item()
                rows.append({**rows[-1], "task": "sentences of at most s tokens", "n": QUERY[-1] + 2,
                             "metric": "cosine_min", "value": worst, "low": "", "high": ""})  # fmt: skip
        compare([embed(model, tokenizer, x, limit=s) for x in texts], "truncated", s, f"s={s}")
    return rows


# -- attention error ---------------------------------------------------------------------------------------------


def low_rank_keys(
    n: int, rank: int, sharpness: float = 1.0, normal: bool = False, heads: int = 4, D: int = 64, seed: int = 0
) -> Keys:
    """Query, key and value ``[1, heads, n, D]`` (float32, CPU) near a subspace of dimension ``rank``.

    A latent ``z`` per token, uniform in ``[-1, 1]**rank`` (``normal``: standard normal), gives ``k = D**(1/4) z A``
    and ``v = z B`` with orthonormal rows A and B, both with noise of standard deviation 0.01 added. Queries are
    ``sharpness * D**(1/4) y A`` with latents ``y`` of their own, so scaled scores are ``sharpness * <y, z>``.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    A, B = (torch.linalg.qr(randn(heads, D, rank))[0].mT for _ in range(2))
    shape = 2, heads, n, rank
    y, z = randn(*shape) if normal else 2 * torch.rand(*shape, generator=generator) - 1
    key, value = (x + 0.01 * randn(heads, n, D) for x in (D**0.25 * z @ A, z @ B))
    return (sharpness * D**0.25 * y @ A)[None], key[None], value[None]


@torch.no_grad()
def kinds_of_keys(device: str, n: int) -> Iterator[tuple[str, str, list[Keys]]]:
    """``(model, name, a triple per layer)``: low-rank keys, all layers of MiniLM on five passages, and three layers of
    SmolLM2 on a text (rotated by position). ``n`` tokens (MiniLM: 512) and, except for MiniLM, n / 16 queries."""
    for name, how in (
        ("keys of rank 2", dict(rank=2)),
        ("keys of rank 4", dict(rank=4)),
        ("keys of rank 4, sharper queries", dict(rank=4, sharpness=3.0)),
        ("keys of rank 4, normal", dict(rank=4, normal=True)),
    ):
        q, k, v = (x.to(device) for x in low_rank_keys(n, **how))
        yield "", name, [(q[:, :, ::16], k, v)]
    model, tokenizer = load_minilm(device)
    with Captured() as captured:
        embed(model, tokenizer, passages(tokenizer, 5)[1])
    yield MINILM, "keys of MiniLM", captured.calls
    model, tokenizer = load_smollm2(device, torch.float32)
    ids = tokenizer(long_texts()["python-types"], return_tensors="pt").input_ids[:, :n].to(device)
    with Captured() as captured:
        model.model(ids, use_cache=False)
    yield "SmolLM2-135M-Instruct", "keys of SmolLM2", [(q[:, :, ::16], k, v) for q, k, v in captured.calls[5::10]]


def squared_errors(keys: Keys, s: int, halving: str, seeds: int = 8) -> np.ndarray:
    """``||out - exact||**2 / ||exact||**2`` over a head's queries, mean of ``seeds`` draws: float64 ``[B * H]``."""
    q, k, v = keys
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    params = METHODS["thinformer"].params(Site(), Policy(budget=s, halving=halving, methods=("thinformer",)))
    repeated = (x.repeat(1, seeds, 1, 1) for x in keys)  # every head draws for itself
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    out, _ = METHODS["thinformer"].op(*repeated, None, seed, q.shape[-1] ** -0.5, 0, **params)
    difference = (out.unflatten(1, (seeds, -1)) - exact[:, None]).square().sum((-1, -2)).mean(1)
    return (difference / exact.square().sum((-1, -2))).flatten().double().cpu().numpy()


def error_rows(kinds: Iterator[tuple[str, str, list[Keys]]]) -> list[dict]:
    """Root mean square relative error for s = 16, 32, ..., n / 4; the interval resamples heads of all layers."""
    rows = []
    for model, name, layers in kinds:
        n = layers[0][1].shape[2]
        for s in track([2**i for i in range(4, (n // 4).bit_length())], description=name):
            for halving in RULES:
                errors = np.concatenate([squared_errors(keys, s, halving) for keys in layers])
                value, low, high = map(math.sqrt, chunk_bootstrap([errors], chunk=1))
                rows.append(dict(model=model, task=ERROR + name, n=n, method="thinformer", rows=s,
                                 params=f"s={s} halving={halving}", metric="relative_error", value=value, low=low,
                                 high=high))  # fmt: skip
    return rows


def plot(results: Path, picture: Path) -> None:
    """Error against s from the newest rows in the file ``results``: a panel per kind of keys, slopes −1/2 and −1.

    Raises ``ValueError`` when the job ``error`` left no rows there.
    """
    with results.open(newline="") as file:
        rows = newest([row for row in csv.DictReader(file) if row["task"].startswith(ERROR)], "task", "n", "params")
    panels = list(dict.fromkeys((row["task"], row["n"]) for row in rows))
    if not panels:
        raise ValueError(f"results={str(results)!r}: it has no rows of the job error; run that first")
    figure = Figure(figsize=(12, 3.6 * -(-len(panels) // 3)), layout="constrained")
    for place, (task, n) in enumerate(panels, 1):
        axes = figure.add_subplot(-(-len(panels) // 3), 3, place, sharey=figure.axes[0] if figure.axes else None)
        for halving, marker in zip(RULES, "osx", strict=True):
            own = [r for r in rows if (r["task"], r["n"]) == (task, n) and r["params"].endswith(f"halving={halving}")]
            x, y, low, high = (np.array([float(r[c]) for r in own]) for c in ("rows", "value", "low", "high"))
            (line,) = axes.plot(x, y, marker=marker, markersize=5, label=f"halving {halving}")
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for power, style in ((0.5, ":"), (1.0, "--")):
            axes.plot(x, y[0] * (x / x[0]) ** -power, style, color="0.4", linewidth=1, label=f"slope −{power:g}")
        axes.set(xscale="log", yscale="log", xlabel="keys kept, s", ylabel="relative error of attention")
        axes.set_title(f"{task.removeprefix(ERROR)}, n = {int(n):,}", fontsize=10)
        axes.set_xticks(x, x.astype(int))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=120)


# -- time of whole models ----------------------------------------------------------------------------------------


def random_encoder(name: str, n: int, tiny: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with random weights and its input: ``bert-base`` reads n tokens, ``vit-b-16`` n patches and one token.

    Patches form a square or two; ``n`` must be a power of two, else ``ValueError``. ``tiny``: two layers, two heads.
    """
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    if n < 4 or n & (n - 1):
        raise ValueError(f"n={n!r}: must be a power of two, 4 or more")
    size = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256) if tiny else {}
    torch.manual_seed(n)
    if name == "bert-base":
        config = BertConfig(max_position_embeddings=n, **size)
        return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(config.vocab_size, (1, n))}
    height = 2 ** ((n.bit_length() - 1) // 2)
    config = ViTConfig(image_size=(16 * height, 16 * n // height), **size)
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(1, 3, *config.image_size)}


@torch.no_grad()
def speed_rows(name: str, n: int, s: int, device: str, tiny: bool, clock: Clock, repeats: int) -> Iterator[dict]:
    """A forward pass, exact (by the faster backend) and rewritten: every site, else there is no speed-up, and those
    that the planner rewrites (``planner=1``), which leaves others as they are.

    ``error`` compares the last hidden state with that of the exact model in the same dtype.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, inputs = random_encoder(name, n, tiny)
    model = model.to(device, dtype).eval()
    inputs = {key: x.to(device, dtype if x.is_floating_point() else None) for key, x in inputs.items()}

    def call() -> torch.Tensor:
        return model(**inputs).last_hidden_state

    backends = {"flash": SDPBackend.FLASH_ATTENTION} | (
        {"cudnn": SDPBackend.CUDNN_ATTENTION} if device == "cuda" else {}
    )
    exact, config = call(), model.config
    H, D = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for methods in (["thinformer"], ["thinformer", "exact"]):
        opponents = {}  # anew: where the host is what takes time, it may take twice as much a second later
        for backend, value in backends.items():
            with sdpa_kernel(value):
                opponents[backend] = quantile(clock(call, repeats), 0.5)
        best = min(opponents, key=opponents.get)
        rewrite_attention(model, methods=methods, budget=s)
        with record_sites() as sites:
            out = call()
        rewritten = sum(site.verdict == "rewritten" for site in sites)
        times, tokens = clock(call, repeats), out.shape[1]
        p50, free = quantile(times, 0.5), "exact" in methods
        yield dict(
            job="encode_model", method="thinformer",
            params=f"model={name}{'-tiny' * tiny} rewritten={rewritten}{' planner=1' * free}",
            B=1, H=H, H_kv=H, Lq=tokens, Lk=tokens, D=D, Dv=D, dtype=str(dtype).removeprefix("torch."), s=s,
            ms_p20=quantile(times, 0.2), ms_p50=p50, ms_p80=quantile(times, 0.8), opponent=best,
            opponent_ms_p50=opponents[best], error=((out - exact).norm() / exact.norm()).item(),
            speedup=opponents[best] / p50 if free or rewritten == config.num_hidden_layers else "failed its check",
            peak_mb=peak_of(call, lambda x: x.numel() * x.element_size())[1],
        )  # fmt: skip
        restore_attention(model)


# -- running -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", choices=["minilm", "error", "speed", "plot"])
    parser.add_argument("--passages", type=int, default=100, help="passages of minilm")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="keys kept by minilm")
    parser.add_argument("--keys", type=int, default=4096, help="keys of error, except MiniLM's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of speed")
    parser.add_argument("--budget", type=int, default=256, help="keys kept by speed")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of speed")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers in speed")
    add_arguments(parser, "folder of quality.csv, speed.csv and the plot")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "plot" in args.jobs and args.out is None:
        parser.error("plot needs --out, the folder of quality.csv")

    quality = minilm_rows(device, args.passages, args.budgets) if "minilm" in args.jobs else []
    quality += error_rows(kinds_of_keys(device, args.keys)) if "error" in args.jobs else []
    speed: list[dict] = []
    if "speed" in args.jobs:
        clock, models = Clock(device), [(name, n) for n in args.lengths for name in ("vit-b-16", "bert-base")]
        given = (args.budget, device, args.tiny, clock, args.repeats)
        speed = [row for x in track(models, "speed") for row in speed_rows(*x, *given)]

    for file, rows, columns, shown, more in (
        ("quality.csv", quality, QUALITY_COLUMNS, "task n method params metric value low high", {}),
        ("speed.csv", speed, SPEED_COLUMNS, "params Lq s ms_p50 opponent opponent_ms_p50 speedup error peak_mb",
         versions()),
    ):  # fmt: skip
        if rows:
            show(rows, shown.split())
        if rows and args.out:
            append(args.out / file, columns, [{**run_of(args.commit), **more, **row} for row in rows])
    if "plot" in args.jobs:
        plot(args.out / "quality.csv", args.out / "thinformer-error.png")


if __name__ == "__main__":
    main()
