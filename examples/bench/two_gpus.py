"""Prefill on two GPUs against one: tensor parallel, all-to-all and coresets, of a model with random weights.

    torchrun --nproc-per-node 2 examples/bench/two_gpus.py --lengths 131072 524288 1048576
    torchrun --nproc-per-node 2 examples/bench/two_gpus.py --lengths 131072 --model 8b --how tensor

Every process first runs what one GPU does (rank 0; the other waits), then both together. Rows are milliseconds, the
median of ``--runs`` after one that is not counted, and the slower process counts; with bytes that a process sends in a
layer. ``--device cpu`` is a dry run over gloo. Writes rows to ``--output`` (CSV).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from express_compile import restore_attention, rewrite_attention
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.engines import distributed as parallel

SHAPES = {
    "layer": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
                  num_key_value_heads=8, vocab_size=1024),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
                 num_key_value_heads=2, vocab_size=1024),
}  # fmt: skip
EXPRESS = {"methods": ["express"]}
EXACT = {"methods": ["exact"]}


def build(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The decoder without its last layer, whose logits would not fit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 21)
    with device:
        torch.set_default_dtype(dtype)
        model = transformers.LlamaModel(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


@contextmanager
def on_two(model: nn.Module, how: str, mesh: DeviceMesh, options: dict[str, Any]) -> Iterator[nn.Module]:
    """``model``, rewritten and sharded for as long."""
    rewrite_attention(model, **options)
    yield model if how == "tensor" else parallel.shard_sequence(model, mesh, how)
    restore_attention(model)


def clock(call: Callable[[], Any], runs: int, device: torch.device) -> float:
    """Median milliseconds; of the slowest process where several are in it."""
    times = []
    for _ in range(runs + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def slowest(milliseconds: float, device: torch.device) -> float:
    found = torch.tensor([milliseconds], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def measure(arguments: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    model = build(arguments.model, device, dtype)
    config = model.config
    if "tensor" in arguments.how:
        shared = build(arguments.model, device, dtype)
        plan = {path: style for path, style in config.base_model_tp_plan.items()}
        names = [path for path, _ in shared.named_modules()]
        layers = {
            full: style for key, style in plan.items() for full in names
            if full.split(".")[-2:] == key.split(".")[-2:]
        }  # fmt: skip
        transformers.integrations.tensor_parallel.apply_tensor_parallelism(shared, mesh, layers)
    for n in arguments.lengths:
        ids = torch.randint(1024, (1, n), generator=torch.Generator().manual_seed(0)).to(device)
        mine, positions = ids.chunk(ranks, 1)[rank], parallel.position_ids(n // ranks, mesh, device)
        head = config.hidden_size // config.num_attention_heads
        spec = AttentionSpec(
            1, config.num_attention_heads, config.num_key_value_heads, n, n, head, head, dtype, device.type,
            head**-0.5, Mask(causal=True),
        )  # fmt: skip
        for method, options in (("express", EXPRESS), ("exact", EXACT)):
            if method not in arguments.methods or (method == "exact" and n > arguments.exact_up_to):
                continue
            rewrite_attention(model, **options)
            dist.barrier()
            alone = 0.0
            if rank == 0:
                alone = clock(partial(model, ids, use_cache=False), arguments.runs, device)
            dist.barrier()
            alone = slowest(alone, device)
            restore_attention(model)
            for how in arguments.how:
                if how == "coresets" and method == "exact":
                    continue
                part = shared if how == "tensor" else model
                inputs = {"input_ids": ids} if how == "tensor" else {"input_ids": mine, "position_ids": positions}
                with on_two(part, how, mesh, options) as sharded:
                    both = slowest(clock(partial(sharded, **inputs, use_cache=False), arguments.runs, device), device)
                    sequences = parallel.sequence_of(sharded)
                    layer_bytes = sum(x.sent for x in sequences) / config.num_hidden_layers / (arguments.runs + 1)
                yield {
                    "device": name, "ranks": ranks, "model": arguments.model, "n": n, "method": method, "how": how,
                    "one_ms": round(alone, 3), "all_ms": round(both, 3), "speedup": round(alone / both, 3),
                    "layer_bytes": round(layer_bytes) if sequences else "",
                    "ring_bytes": round(parallel.bytes_of_ring(spec, ranks)),
                    "all_to_all_bytes": round(parallel.bytes_of_all_to_all(spec, ranks)),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288, 1048576])
    parser.add_argument("--model", choices=SHAPES, default="layer")
    parser.add_argument("--how", nargs="+", choices=["tensor", *parallel.HOW], default=["tensor", *parallel.HOW])
    parser.add_argument("--methods", nargs="+", choices=["express", "exact"], default=["express", "exact"])
    parser.add_argument("--exact-up-to", type=int, default=524288, help="longer sequences are not run exactly")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(arguments.device, local) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows = []
    with torch.no_grad():
        for row in measure(arguments, device, mesh):
            rows.append(row)
            if dist.get_rank() == 0:
                print(*row.values(), flush=True)
    if dist.get_rank() == 0 and arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
