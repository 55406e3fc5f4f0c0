"""Who should choose 16 blocks of 64 keys for 128 queries: how much attention mass each rule catches; and the time.

    python examples/bench/blocks.py --out examples/bench/results/blocks.csv             # minutes on one CPU core
    python examples/bench/blocks.py --time --out examples/bench/results/blocks.csv      # a minute on a GPU

A row's ``value`` is the share of the mass between sinks and tail that the chosen blocks get from all queries of the
block, as a mean over blocks of queries (``share``) or of the whole mass (``total``). Rules of queries: ``oracle`` asks
all of the block against all keys; ``N inside`` ask N evenly spaced ones of the block, so that the choice tells early
queries what late ones want; ``N xS before`` (causal) ask the block's first query and those S apart before it. Rules of
keys, with the first query alone: means of 64 or 8 keys, bounds (each feature's least and largest, as Quest, arXiv
2406.10774), and bounds to shortlist twice as many blocks; ``last`` are the newest blocks, and ``a block more`` is the
first query's choice of 17.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

import numpy as np
import torch
from models import load_smollm2, long_texts
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show

from express_compile.kernels.select.blocks import KEYS, BlockConfig, block_mass, choose, query_blocks, select_blocks

MODEL = "SmolLM2-135M-Instruct"
CONFIG = BlockConfig(blocks=16)
CAUSAL = {f"{n} x{stride} before": (n, stride) for n, stride in ((1, 4), (2, 4), (4, 4), (4, 32), (16, 1), (16, 8))}
DEFAULT = f"{CONFIG.samples} x{CONFIG.stride} before"
INSIDE = (4, 16)
MORE = "a block more"

# -- mass --------------------------------------------------------------------------------------------------------


def attention_inputs(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Query, key and scale of every layer for one text ``ids`` ``[1, n]``."""
    import transformers

    seen = []

    def attention(module, query, key, value, mask, scaling=None, **more):
        seen.append((query, key, scaling))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("recorded", attention)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return seen


def own_mass(query: torch.Tensor, key: torch.Tensor, scale: float, begin: int, candidates: int) -> torch.Tensor:
    """Mass that each query of the block at ``begin`` gives to each candidate: ``[H_kv, g, block, candidates]``."""
    own = query[0].unflatten(0, (key.shape[1], -1))[:, :, begin : begin + CONFIG.block] * scale
    scores = own @ key[0, :, None, : begin + CONFIG.block].mT
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(begin + 1)
    p = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return p[..., CONFIG.sinks : CONFIG.sinks + KEYS * candidates].unflatten(-1, (candidates, KEYS)).sum(-1)


def of_keys(first: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of candidates ``[H_kv, candidates]`` by rules that do not read all keys.

    ``first`` ``[H_kv, g, D]``: the block's first query times the scale; ``keys`` ``[H_kv, candidates, 64, D]``.
    """
    scores = {}
    for size in (KEYS, 8):
        means = keys.unflatten(2, (KEYS // size, size)).mean(3)
        p = (first @ means.flatten(1, 2).mT).softmax(-1)
        scores[f"means of {size} keys"] = p.unflatten(-1, means.shape[1:3]).sum((1, 3))
    low, high = keys.amin(2)[:, None], keys.amax(2)[:, None]
    bound = torch.maximum(first[:, :, None] * low, first[:, :, None] * high).sum(-1)
    scores["bounds"] = bound.softmax(-1).sum(1)
    return scores


def shortlisted(scores: torch.Tensor, mass: torch.Tensor, blocks: int) -> torch.Tensor:
    """``mass`` where ``scores`` are among the ``blocks`` best, else -1."""
    best = scores.topk(min(blocks, scores.shape[-1]), -1).indices
    return torch.full_like(mass, -1).scatter(-1, best, mass.gather(-1, best))


def of_block(query, key, scale, begin: int, candidates: int, causal: dict[str, torch.Tensor]) -> dict:
    """Scores ``[H_kv, candidates]`` by every rule for the block of queries at ``begin``; the oracle's are true."""
    mass = own_mass(query, key, scale, begin, candidates)
    rules = {"oracle": mass.sum((1, 2))}
    for n in INSIDE:
        rules[f"{n} inside"] = mass[:, :, CONFIG.block // n - 1 :: CONFIG.block // n].sum((1, 2))
    rules |= causal
    first = query[0, :, begin].unflatten(0, (key.shape[1], -1)) * scale
    keys = key[0, :, CONFIG.sinks : CONFIG.sinks + KEYS * candidates].unflatten(1, (candidates, KEYS))
    rules |= of_keys(first, keys)
    rules["bounds and then 1 before"] = shortlisted(rules["bounds"], causal[DEFAULT], 2 * CONFIG.blocks)
    rules["last"] = torch.arange(candidates).expand(key.shape[1], -1) + 1.0
    return rules


def mass_rows(model, tokenizer, length: int, names: list[str], layers: int, every: int) -> list[dict]:
    """Share of the mass caught by each rule: texts ``names``, ``layers`` layers, one of ``every`` blocks of queries."""
    layout = query_blocks(CONFIG, length, length)
    full = layout.begin + CONFIG.block <= length
    at = np.flatnonzero(full & (layout.begin >= length // 3) & (layout.candidates > CONFIG.blocks + 1))[::every]
    shares, caught = defaultdict(list), defaultdict(float)
    for name in names:
        inputs = attention_inputs(model, tokenizer(long_texts()[name], return_tensors="pt").input_ids[:, :length])
        for query, key, scale in inputs[1 :: max(1, len(inputs) // layers)][:layers]:
            causal = {
                rule: block_mass(query, key, BlockConfig(CONFIG.blocks, samples=n, stride=stride), scale)
                for rule, (n, stride) in CAUSAL.items()
            }
            for i in at:
                candidates = int(layout.candidates[i])
                own = {rule: x[0, :, i, :candidates] for rule, x in causal.items()}
                rules = of_block(query, key, scale, int(layout.begin[i]), candidates, own)
                true = rules["oracle"]
                rules[MORE] = own[DEFAULT]
                for rule, scores in rules.items():
                    blocks = CONFIG.blocks + (rule == MORE)
                    chosen = choose(scores, torch.tensor(candidates), blocks).long()
                    mass = true.gather(-1, chosen).sum(-1)
                    shares[rule] += (mass / true.sum(-1)).tolist()
                    caught[rule] += float(mass.sum())
                caught["everything"] += float(true.sum())
    common = dict(model=MODEL, task=f"mass caught by {CONFIG.blocks} blocks", n=length)
    common["params"] = f"sinks={CONFIG.sinks} recent={CONFIG.recent} block={CONFIG.block} texts={len(names)}"
    rows = []
    for rule, values in shares.items():
        own = {**common, "method": rule, "rows": KEYS * (CONFIG.blocks + (rule == MORE))}
        rows.append({**own, "metric": "share", "value": float(np.mean(values))})
        rows.append({**own, "metric": "total", "value": caught[rule] / caught["everything"]})
    return rows


# -- time --------------------------------------------------------------------------------------------------------

SHAPE = dict(H=32, H_kv=8, D=128)
ROWS = 1600


def time_rows(lengths: list[int]) -> list[dict]:
    """Milliseconds of the choice, of exact attention and of attention over as many rows, in bf16 on this GPU."""
    from quality import streaming_table
    from triton.testing import do_bench

    from express_compile.kernels.attend.segments import Sources, segment_attention_triton

    H, H_kv, D = SHAPE.values()
    rows = []
    for n in lengths:
        q, k, v = (torch.randn(1, heads, n, D, device="cuda", dtype=torch.bfloat16) for heads in (H, H_kv, H_kv))
        window = streaming_table(n, CONFIG.sinks, ROWS - CONFIG.sinks - CONFIG.block // 2)

        def exact(q=q, k=k, v=v):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        runs = {
            "exact": (exact, n),
            "segments": (lambda: segment_attention_triton(q, Sources.tokens(k, v), window, D**-0.5), ROWS),  # noqa: B023
        }
        for samples in (1, 4):
            config = BlockConfig((ROWS - CONFIG.sinks - CONFIG.recent - CONFIG.block // 2) // KEYS, samples=samples)
            runs[f"{samples} x{config.stride} before"] = (lambda c=config: select_blocks(q, k, c, D**-0.5), ROWS)  # noqa: B023
        for name, (run, seen) in runs.items():
            low, middle, high = do_bench(run, warmup=20, rep=200, quantiles=[0.2, 0.5, 0.8])
            rows.append(dict(model=" ".join(f"{k}={v}" for k, v in SHAPE.items()), task="time", n=n, method=name,
                             rows=seen, metric="ms", value=middle, low=low, high=high))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--texts", nargs="+", default=["python-types", "argparse"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--every", type=int, default=4, help="one of so many blocks of queries")
    parser.add_argument("--time", action="store_true", help="time the kernels on this GPU instead")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="for --time")
    add_arguments(parser)
    args = parser.parse_args()

    if args.time:
        rows = time_rows(args.lengths)
    else:
        model, tokenizer = load_smollm2("cpu", torch.float32)
        rows = mass_rows(model, tokenizer, args.length, args.texts, args.layers, args.every)
    rows = [{**run_of(args.commit), **row} for row in rows]
    show(rows, "task n method rows metric value low high".split(), digits=".4f")
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
