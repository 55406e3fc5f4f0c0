"""What sampled decoding does to SmolLM2: KL per step against draws, beside top-k and exact, and what it writes.

    python examples/bench/santa.py --out examples/bench/results/santa.csv  # on a GPU
    python examples/bench/santa.py --length 1024 --texts 1 --steps 8 --seeds 2 --draws 16 128 --tokens 16  # a taste

Every step starts from the cache that exact attention left, decodes the text's own next token and is compared with the
exact next-token distribution. All policies see the same steps and seeds, so rows are paired. Top-k reads the k = S
rows of largest weight of every head, exactly: the best that a fixed choice of rows can do, and biased. The column
``rows`` says how many distinct value rows a KV head is expected to read, which is what costs time.

``--levels 2 4 8 16`` compares something else: SANTA with shared rows beside itself with the query rounded to so many
levels (Bernoulli score sampling), and what share of the keys' features a KV head would then read.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measures import chunk_bootstrap
from models import load_smollm2, long_texts
from quality import MODEL
from records import QUALITY_COLUMNS, add_arguments, append, run_of, show
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

from express_compile import (
    METHODS,
    Method,
    Policy,
    Refusal,
    record_sites,
    register,
    restore_attention,
    rewrite_attention,
)
from express_compile.core.call import Call
from express_compile.core.options import BUDGET, Options, option
from express_compile.kernels.attend.bernoulli import feature_probability, round_query
from express_compile.kernels.op import define_attention
from express_compile.kernels.santa import probabilities, read_probability, visible_keys
from express_compile.quality.draws import allocate, measure_layers

# -- top-k as a method of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopK(Options):
    """How many rows are kept."""

    budget: int = option(512, "rows of every head", BUDGET, schema="int k", pack=lambda k: {"k": k}, shared="budget")


def _top_k_body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    query = call.query
    visible = visible_keys(query.shape[0], call.Lq, call.Lk, call.padding, None, query.device)
    p, lse = probabilities(query, call.key, visible, call.scale)
    largest, index = p.topk(min(call.options["k"], p.shape[-1]), -1)
    weights = torch.zeros_like(p).scatter_(-1, index, largest / largest.sum(-1, keepdim=True))
    out = weights.to(lse.dtype) @ call.value.to(lse.dtype)[:, :, None]
    return out.flatten(1, 2).to(query.dtype).contiguous(), lse.contiguous()


define_attention("top_k", TopK, _top_k_body, min_length=False)
register(
    Method(
        name="top_k",
        summary="the k rows of largest weight of every head, exactly (baseline)",
        supports="one query over a cache",
        refuses="everything else",
        refuse=lambda spec, policy: (
            None if spec.Lq == 1 and spec.mask.unknown is None else Refusal("top_k", "it takes one query over a cache")
        ),
        options=TopK,
    )
)

# -- the policies ------------------------------------------------------------------------------------------------


def santa(budget: int, seed: int = 0, **options) -> Policy:
    """At every length, also where exact attention would be as fast."""
    return Policy(budget=budget, seed=seed, methods=("santa",), min_length=0, method_options={"santa": options})


def policies(levels: list[int], per_layer: dict[int, dict[str, int]]) -> dict[str, tuple[str, dict]]:
    """Name -> (method, options of SANTA), for every number of draws."""
    if levels:
        rounded = {f"shared, bernoulli {level}": ("santa", {"bernoulli": level}) for level in levels}
        return {"shared": ("santa", {}), **rounded}
    found = {
        "shared": ("santa", {}),
        "per head": ("santa", {"shared": False}),
        "per head, strat": ("santa", {"shared": False, "sampler": "strat"}),
        "per head, iid": ("santa", {"shared": False, "sampler": "iid"}),
        "top-k": ("top_k", {}),
    }
    return found | ({"shared, draws per layer": ("santa", {"per_layer": per_layer})} if per_layer else {})


class RowsRead(TorchDispatchMode):
    """Notes for every attention call how many distinct value rows a KV head is expected to read, and what share of the
    keys' features."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []
        self.features: list[float] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (METHODS["santa"].op, METHODS["top_k"].op):
            call = Call.of(function, args, kwargs)
            query = call.query
            visible = visible_keys(query.shape[0], call.Lq, call.Lk, call.padding, None, query.device)
            if levels := kwargs.get("bernoulli", 0):
                self.features.append(feature_probability(query, call.key.shape[1], levels).mean().item())
                query = round_query(query, levels, call.seed, call.layer, visible.sum(-1))
            p, _ = probabilities(query, call.key, visible, call.scale)
            if function is METHODS["top_k"].op:
                read = torch.zeros_like(p).scatter_(-1, p.topk(min(kwargs["k"], p.shape[-1])).indices, 1)
            else:
                draws = torch.tensor(kwargs["draws"], device=query.device).expand(query.shape[1])
                read = read_probability(p, draws, kwargs["sampler"], kwargs["shared"])
            self.rows.append((1 - (1 - read).prod(2)).sum(-1).mean().item())
        return function(*args, **kwargs)


# -- running -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_logits(model, cache, token: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after one decoding step; the cache is left as it was."""
    logits = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
    cache.crop(-1)
    return logits.float().log_softmax(-1)


@torch.no_grad()
def kl_rows(model, tokenizer, device: str, args, per_layer: dict[int, dict[str, int]]) -> list[dict]:
    """KL(exact || policy) of single steps, ``[policy, draws, text, step, seed]``, as rows of the result file."""
    chosen = policies(args.levels, per_layer)
    names = list(long_texts())[: args.texts]
    kl = {(name, S): [] for name in chosen for S in args.draws}
    agree, read, features = ({key: [] for key in kl} for _ in range(3))
    for text in track(names, description=f"KL over {len(names)} texts of {args.length} tokens"):
        ids = tokenizer(long_texts()[text], return_tensors="pt").input_ids[:, : args.length].to(device)
        first = ids.shape[1] - args.steps * args.stride
        cache = model(ids[:, :first], use_cache=True, logits_to_keep=1).past_key_values
        for at in range(first, ids.shape[1], args.stride):
            token = ids[:, at : at + 1]
            exact = step_logits(model, cache, token)
            for (name, S), values in kl.items():
                method, options = chosen[name]
                options = {"draws": options["per_layer"][S]} if "per_layer" in options else options
                for seed in range(args.seeds if method == "santa" else 1):
                    policy = santa(S, seed, **options) if method == "santa" else Policy(budget=S, methods=("top_k",))
                    rewrite_attention(model, policy=policy)
                    with record_sites() as sites:
                        found = step_logits(model, cache, token)
                    if seed == 0 and at == first:
                        with RowsRead() as counted:
                            step_logits(model, cache, token)
                        read[name, S] += counted.rows
                        features[name, S] += counted.features
                    if {site.method for site in sites} != {method}:
                        raise RuntimeError(f"{name}: {sites[0].reason}")
                    values.append((exact.exp() * (exact - found)).sum().item())
                    agree[name, S].append(float(exact.argmax() == found.argmax()))
            restore_attention(model)
            model(ids[:, at : at + args.stride], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for (name, S), values in kl.items():
        per_step = np.array(values).reshape(len(names) * args.steps, -1).mean(1)
        mean, low, high = chunk_bootstrap([per_step], chunk=1)
        common = dict(
            task="bernoulli" if args.levels else "decode", n=args.length, method=chosen[name][0], params=f"{name} S={S}"
        )
        common["rows"] = round(float(np.mean(read[name, S])), 1)
        rows.append({**common, "metric": "kl", "value": mean, "low": low, "high": high})
        rows.append({**common, "metric": "top1", "value": float(np.mean(agree[name, S]))})
        if features[name, S]:
            rows.append({**common, "metric": "features", "value": float(np.mean(features[name, S]))})
    return rows


@torch.no_grad()
def generate_rows(model, tokenizer, device: str, args, console: Console) -> list[dict]:
    """Greedy generation after a long prompt: tokens that agree with exact greedy before the first other one (many,
    once a model repeats itself), and how probable the exact model finds what was written, in nats per token."""
    text = long_texts()["genesis"]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.length - args.tokens].to(device)
    mask = torch.ones_like(ids)
    # each model continues from the exact prefill: prefill is never sampled
    options = dict(attention_mask=mask, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
    runs = {
        "exact": None,
        f"S={args.generate}": santa(args.generate),
        f"per head S={args.generate}": santa(args.generate, shared=False),
    }
    rows, truth = [], None
    for name, policy in runs.items():
        if policy is not None:
            rewrite_attention(model, policy=policy)
        start = time.perf_counter()
        with record_sites() as sites:
            out = model.generate(ids, **options)[0, ids.shape[1] :]
        seconds = time.perf_counter() - start
        if policy is not None:
            restore_attention(model)
            sampled = sum(site.method == "santa" for site in sites)
            expected = (args.tokens - 1) * model.config.num_hidden_layers
            if sampled != expected:
                raise RuntimeError(f"{name}: {sampled} sites were sampled, not {expected}: {sites[-1].reason}")
        truth = out if truth is None else truth
        same = int((out == truth).long().cumprod(0).sum())
        console.print(f"[b]{name}[/b], {seconds:.1f} s, the first {same} of {len(out)} tokens as exact")
        console.print(tokenizer.decode(out), style="dim", highlight=False, markup=False)
        common = dict(task="generate", n=ids.shape[1], method="exact" if policy is None else "santa", params=name)
        logits = model(torch.cat([ids[0], out])[None, :-1], use_cache=False, logits_to_keep=len(out)).logits[0]
        nll = torch.nn.functional.cross_entropy(logits.float(), out).item()
        rows.append({**common, "metric": "tokens as exact", "value": same, "high": len(out)})
        rows.append({**common, "metric": "nll under exact", "value": nll})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=99)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps per text")
    parser.add_argument("--stride", type=int, default=16, help="tokens from one step to the next")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--draws", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument(
        "--levels", type=int, nargs="*", default=[], help="levels of the query; only these are compared"
    )
    parser.add_argument(
        "--layers", type=Path, help="JSON file for what measure_layers finds; measured if it is missing"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate; 0 for none")
    parser.add_argument("--generate", type=int, default=128, help="draws of the generation")
    add_arguments(parser)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device, torch.bfloat16 if device == "cuda" else torch.float32)
    console = Console(width=160)
    per_layer = {}
    if args.layers is not None:
        if not args.layers.exists():
            ids = tokenizer(long_texts()["argparse"], return_tensors="pt").input_ids[:, : args.length].to(device)
            args.layers.write_text(json.dumps(measure_layers(model, [ids], seeds=args.seeds), indent=1))
        measured = json.loads(args.layers.read_text())
        per_layer = {S: allocate(measured, S * len(measured["layers"])) for S in args.draws}
    rows = kl_rows(model, tokenizer, device, args, per_layer) if args.draws else []
    rows += generate_rows(model, tokenizer, device, args, console) if args.tokens else []

    rows = [{**run_of(args.commit), "model": MODEL, **row} for row in rows]
    show(rows, "task n params rows metric value low high".split(), width=160, digits=".4f")
    if args.out:
        append(args.out, QUALITY_COLUMNS, rows)


if __name__ == "__main__":
    main()
