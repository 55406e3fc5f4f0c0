"""What the pass costs when a model is compiled: match, plan and rewrite; and the whole compilation beside inductor's.

    python examples/bench/compiling.py --out examples/bench/results/speed.csv

A Llama of random weights with 32 layers, its attention written out or as SDPA. ``job=plan`` is the time of the pass on
the graph that Dynamo captured; the opponent of ``job=compile`` is ``torch.compile(model)`` as it is, both from cold
caches, on a model of 4 layers (inductor takes minutes for 32 here).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers
from records import SPEED_COLUMNS, add_arguments, append, run_of, show

from express_compile import Policy
from express_compile.passes.pipeline import rewrite_graph
from express_compile.planning.devices import versions

TOKENS = 48


def llama(layers: int, implementation: str) -> torch.nn.Module:
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=256)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()


@torch.no_grad()
def run(model: torch.nn.Module, tokens: int = TOKENS) -> torch.Tensor:
    ids = torch.arange(2 * tokens).view(2, tokens) % 97
    return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state


def pass_times(model: torch.nn.Module, policy: Policy, repeats: int) -> tuple[list[float], int]:
    """Milliseconds of match, plan and rewrite on the captured graph, and how many sites were rewritten."""
    times, rewritten = [], 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        nonlocal rewritten
        start = time.perf_counter()
        planned = rewrite_graph(gm, policy, inputs)
        times.append((time.perf_counter() - start) * 1e3)
        rewritten = sum(decision.verdict == "rewritten" for _, decision in planned)
        return gm.forward

    for _ in range(repeats):
        torch.compiler.reset()
        run(torch.compile(model, backend=backend))
    return times, rewritten


def compile_time(model: torch.nn.Module, **options: Any) -> tuple[float, torch.Tensor]:
    """Milliseconds of the first call of ``torch.compile(model, **options)``, nothing cached, and its result."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=folder):
        start = time.perf_counter()
        out = run(torch.compile(model, **options))
        return (time.perf_counter() - start) * 1e3, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compiled-layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    args = parser.parse_args()
    shape = dict(B=2, H=4, H_kv=2, Lq=TOKENS, Lk=TOKENS, D=16, Dv=16, dtype="float32")
    common = {**run_of(args.commit), **versions(), **shape, "method": "express"}
    policy = Policy(methods=("express",), budget=64)
    rows = []
    for implementation in ("sdpa", "eager"):
        times, rewritten = pass_times(llama(args.layers, implementation), policy, args.repeats)
        params = f"layers={args.layers} attention={implementation} sites={rewritten}"
        p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
        rows.append({**common, "job": "plan", "params": params, "s": 64, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80})
        model = llama(args.compiled_layers, implementation)
        truth, ours, theirs = run(model), [], []
        for _ in range(args.repeats):  # one beside the other, and the first import of everything counts for neither
            theirs.append(compile_time(model)[0])
            ms, out = compile_time(model, backend="express", options={"methods": ["express"], "budget": 64})
            ours.append(ms)
        ms, opponent = statistics.median(ours), statistics.median(theirs)
        params = f"layers={args.compiled_layers} attention={implementation}"
        error = ((out - truth).norm() / truth.norm()).item()
        found = {"ms_p20": min(ours), "ms_p50": ms, "ms_p80": max(ours), "error": error, "speedup": opponent / ms}
        opponents = {"opponent": "inductor", "opponent_ms_p50": opponent}
        rows.append({**common, "job": "compile", "params": params, "s": 64, **found, **opponents})
    show(rows, "job params ms_p20 ms_p50 ms_p80 opponent opponent_ms_p50 speedup error".split())
    if args.out:
        append(args.out, SPEED_COLUMNS, rows)


if __name__ == "__main__":
    main()
