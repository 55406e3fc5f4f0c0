"""Who should choose 16 blocks of 64 keys for 128 queries: how much attention mass each rule catches; and the time.

    python examples/bench/blocks.py --out examples/bench/results/blocks.csv             # minutes on one CPU core
    python examples/bench/blocks.py --model qwen --texts python-types argparse records
    python examples/bench/blocks.py --time --out examples/bench/results/blocks.csv      # a minute on a GPU

A row's ``value`` is the share of the mass between sinks and tail that the chosen blocks get from all queries of the
block, as a mean over blocks of queries (``share``) or of the whole mass (``total``); or what the output of the layer is
off by where one KV head attends to these blocks alone, by which plans are chosen (``quality.profile``): its relative
squared error as a mean over layers and KV heads (``error``), and the geometric mean of it over that of the default rule
(``error ratio``), which no single head decides. All query heads of a KV head have the same blocks but where a rule says
``per query head``: as many blocks of its own for each; or ``pooled``: half of them its own, the rest the best that any
query head of the group has, so that heads of one group have other numbers of rows. Rules of queries: ``oracle`` asks
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
from typing import NamedTuple

import numpy as np
import torch
from models import load_qwen, load_smollm2, long_texts, profiled_texts
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show

from express_compile.kernels.select.blocks import KEYS, BlockConfig, block_mass, choose, query_blocks, select_blocks

MODELS = {"smollm2": ("SmolLM2-135M-Instruct", load_smollm2), "qwen": ("Qwen2.5-Coder-0.5B-Instruct", load_qwen)}
CONFIG = BlockConfig(blocks=16)
CAUSAL = {f"{n} x{stride} before": (n, stride) for n, stride in ((1, 4), (2, 4), (4, 4), (4, 32), (16, 1), (16, 8))}
DEFAULT = f"{CONFIG.samples} x{CONFIG.stride} before"
INSIDE = (4, 16)
MORE = "a block more"
OWN, POOLED = "per query head", "pooled"

# -- mass --------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What attention of a layer is given, ``[1, H or H_kv, n, D]``, and the weight that its output goes through."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    weight: torch.Tensor

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """``[H, ..]`` by KV head: ``[H_kv, g, ..]``."""
        return x.unflatten(0, (self.key.shape[1], -1))


def attention_inputs(model, ids: torch.Tensor, layers: int) -> list[Inputs]:
    """Those of ``layers`` layers, from the second one on, for one text ``ids`` ``[1, n]``."""
    import transformers

    taken, seen = range(1, len(model.model.layers), max(1, len(model.model.layers) // layers))[:layers], []

    def attention(module, query, key, value, mask, scaling=None, **more):
        if module.layer_idx in taken:
            seen.append(Inputs(query, key, value, scaling, module.o_proj.weight))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("recorded", attention)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return seen


def own_weights(x: Inputs, begin: int) -> torch.Tensor:
    """Exact attention weights of the queries of the block at ``begin``: ``[H_kv, g, block, begin + block]``."""
    scores = x.grouped(x.query[0])[:, :, begin : begin + CONFIG.block] * x.scale
    scores = scores @ x.key[0, :, None, : begin + CONFIG.block].mT
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(begin + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def middle(weights: torch.Tensor, candidates: int) -> torch.Tensor:
    """What the candidates have of the last dimension of ``weights``: ``[.., candidates, 64]``."""
    return weights[..., CONFIG.sinks : CONFIG.sinks + KEYS * candidates].unflatten(-1, (candidates, KEYS))


def output(x: Inputs, weights: torch.Tensor) -> torch.Tensor:
    """What each KV head adds to the output of the layer with such attention weights: ``[H_kv, block, model]``."""
    heads = (weights @ x.value[0, :, None, : weights.shape[-1]]) / weights.sum(-1, keepdim=True)
    by_head = x.weight.unflatten(1, (x.key.shape[1], -1)).transpose(0, 1)
    return heads.transpose(1, 2).flatten(2) @ by_head.mT


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


def of_block(x: Inputs, mass: torch.Tensor, begin: int, causal: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scores ``[H_kv, 1 or g, candidates]`` by every rule for the block of queries at ``begin``, whose queries give
    ``mass`` ``[H_kv, g, block, candidates]``; ``causal``: that of the ``samples`` of each rule, by query head."""
    candidates = mass.shape[-1]
    asked = {"oracle": mass.sum(2)}
    for n in INSIDE:
        asked[f"{n} inside"] = mass[:, :, CONFIG.block // n - 1 :: CONFIG.block // n].sum(2)
    asked |= causal
    first = x.grouped(x.query[0])[:, :, begin] * x.scale
    keys = middle(x.key[0].mT, candidates).permute(0, 2, 3, 1)
    rules = {rule: scores.sum(1) for rule, scores in asked.items()} | of_keys(first, keys)
    rules["bounds and then 1 before"] = shortlisted(rules["bounds"], rules[DEFAULT], 2 * CONFIG.blocks)
    rules["last"] = torch.arange(candidates).expand(len(keys), -1) + 1.0
    rules[MORE] = rules[DEFAULT]
    rules = {rule: scores[:, None] for rule, scores in rules.items()}
    apart = ("oracle", DEFAULT, "4 x4 before")
    return rules | {f"{rule} {how}": asked[rule] for how in (OWN, POOLED) for rule in apart}


def held_by(rule: str, scores: torch.Tensor) -> torch.Tensor:
    """1 for blocks of keys that ``rule`` chooses by ``scores`` ``[H_kv, 1 or g, candidates]``, 0 for others."""
    blocks = CONFIG.blocks // 2 if rule.endswith(POOLED) else CONFIG.blocks + (rule == MORE)
    chosen = choose(scores, torch.tensor(scores.shape[-1]), blocks).long()
    held = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    if rule.endswith(POOLED):
        more = scores.masked_fill(held > 0, -1).flatten(1).topk(scores.shape[1] * (CONFIG.blocks - blocks), -1).indices
        held = held.flatten(1).scatter(-1, more, 1.0).view(scores.shape)
    return held


@torch.no_grad()
def mass_rows(name: str, model, tokenizer, length: int, texts: list[str], layers: int, every: int) -> list[dict]:
    """What each rule catches and is off by: ``texts``, ``layers`` layers, one of ``every`` blocks of queries."""
    layout = query_blocks(CONFIG, length, length)
    full = layout.begin + CONFIG.block <= length
    at = np.flatnonzero(full & (layout.begin >= length // 3) & (layout.candidates > CONFIG.blocks + 1))[::every]
    shares, caught, off, whole = defaultdict(list), defaultdict(float), defaultdict(dict), defaultdict(float)
    for text in texts:
        ids = tokenizer((long_texts() | profiled_texts())[text], return_tensors="pt").input_ids[:, :length]
        for layer, x in enumerate(attention_inputs(model, ids, layers)):
            H_kv, H = x.key.shape[1], x.query.shape[1]
            alone = x.key.repeat_interleave(H // H_kv, 1)  # a query head is asked as the group of a KV head is
            causal = {
                rule: block_mass(x.query, alone, BlockConfig(CONFIG.blocks, samples=n, stride=stride), x.scale)
                for rule, (n, stride) in CAUSAL.items()
            }
            for i in at:
                candidates, begin = int(layout.candidates[i]), int(layout.begin[i])
                weights = own_weights(x, begin)
                mass, exact = middle(weights, candidates).sum(-1), output(x, weights)
                own = {rule: x.grouped(scores[0, :, i, :candidates]) for rule, scores in causal.items()}
                true = mass.sum(2)
                whole[layer] += float(exact.sum(0).square().sum())
                for rule, scores in of_block(x, mass, begin, own).items():
                    held = held_by(rule, scores).expand_as(true)
                    found = (true * held).sum((1, 2))
                    shares[rule] += (found / true.sum((1, 2))).tolist()
                    caught[rule] += float(found.sum())
                    left = weights.clone()
                    middle(left, candidates).mul_(held[:, :, None, :, None])
                    error = (output(x, left) - exact).square().sum((1, 2))
                    off[rule][layer] = off[rule].get(layer, 0) + error
                caught["everything"] += float(true.sum())
    common = dict(model=name, task=f"mass caught by {CONFIG.blocks} blocks", n=length)
    common["params"] = f"sinks={CONFIG.sinks} recent={CONFIG.recent} block={CONFIG.block} texts={'+'.join(texts)}"
    rows = []
    errors = {rule: torch.cat([of[layer] / whole[layer] for layer in whole]) for rule, of in off.items()}
    for rule, values in shares.items():
        own = {**common, "method": rule, "rows": KEYS * (CONFIG.blocks + (rule == MORE))}
        measured = {
            "share": np.mean(values), "total": caught[rule] / caught["everything"], "error": errors[rule].mean(),
            "error ratio": (errors[rule] / errors[DEFAULT]).log().mean().exp(),
        }  # fmt: skip
        rows += [{**own, "metric": metric, "value": float(value)} for metric, value in measured.items()]
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
    parser.add_argument("--model", choices=MODELS, default="smollm2")
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
        name, load = MODELS[args.model]
        rows = mass_rows(name, *load("cpu", torch.float32), args.length, args.texts, args.layers, args.every)
    rows = [{**run_of(args.commit), **row} for row in rows]
    show(rows, "task n method rows metric value low high".split())
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
