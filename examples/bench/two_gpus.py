"""Prefill on several GPUs of one host beside one: tensor parallel, all-to-all and coresets, with random weights.

    torchrun --nproc-per-node 2 examples/bench/two_gpus.py --out two_gpus.csv
    torchrun --nproc-per-node 2 examples/bench/two_gpus.py --device cpu --layer tiny --deep tiny --lengths 4096

First what is computed: with weights that only select features, so that products are exact in any order, tensor parallel
and all-to-all have to give the bits of one GPU, and coresets those of a prefill of the first part alone. A way that
fails is not timed, and the exit status is 1. Then rows, the most telling ones first, until ``--seconds`` have passed:
one decoder layer of an 8B shape (``--layer``) at every length, and a whole model (``--deep``) at the first one. One GPU
is rank 0 while the others wait. Milliseconds are the median of ``--runs`` after one that is not counted, of the slowest
process; ``attention`` ones are those of the module of attention, with its projections and what it exchanges, of the
last layer. Bytes are what a process sends in a layer: ``sent`` counted, the others by formula.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformers
from records import add_arguments, append, run_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from express_compile import restore_attention, rewrite_attention
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.engines import distributed as parallel

EIGHT = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
SHAPES = {
    "8b-layer": dict(**EIGHT, num_hidden_layers=1, vocab_size=1024),
    "8b": dict(**EIGHT, num_hidden_layers=32, vocab_size=128256),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=2,
                 num_hidden_layers=2, vocab_size=1024),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"express": {"methods": ["express"]}, "exact": {"methods": ["exact"]}}
HOW = ("tensor", *parallel.HOW)
PIECE = 131072  # tokens that an MLP takes at once: it holds three times 3.5 times their features
COLUMNS = (
    "date,gpu,torch,commit,ranks,model,n,method,how,one_ms,all_ms,speedup,attention_one_ms,attention_all_ms,"
    "attention_speedup,peak_gb,sent_bytes,ring_bytes,all_to_all_bytes,tensor_bytes"
).split(",")


@dataclass
class Place:
    """Where this process is."""

    device: torch.device
    mesh: DeviceMesh
    start: float
    seconds: float

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def largest(self, *numbers: float) -> list[float]:
        """Of all processes."""
        found = torch.tensor(numbers, device=self.device, dtype=torch.float32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def late(self) -> bool:
        return self.largest(time.perf_counter() - self.start)[0] > self.seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Models:
    """The same weights twice: a decoder that is whole on every process (without its last layer, whose logits would not
    fit), and its part by tensor parallel."""

    def __init__(self, shape: str, place: Place, selecting: bool = False) -> None:
        self.place, self.config = place, transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 21)
        self.dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
        self.whole, self.part = self._build(selecting), self._build(selecting)
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan = {f"layers.*.{name}": ColwiseParallel() for name in columns}
        plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(self.part, place.mesh, plan)
        for model in (self.whole, self.part):
            for layer in model.layers:
                layer.mlp.forward = partial(_in_pieces, layer.mlp.forward)

    def _build(self, selecting: bool) -> nn.Module:
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.place.device:
            model = transformers.LlamaModel(self.config).eval()
        torch.set_default_dtype(torch.float32)
        for layer in model.layers if selecting else ():
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                nn.init.eye_(getattr(layer.self_attn, name).weight)
            layer.self_attn.q_proj.weight.data.mul_(0.25)
            layer.mlp.down_proj.weight.data.zero_()
        return model

    def ids(self, n: int) -> torch.Tensor:
        return torch.randint(1024, (1, n), generator=torch.Generator().manual_seed(0)).to(self.place.device)

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of ``[1, n, ..]``."""
        return x.chunk(self.place.mesh.size(), 1)[self.place.rank]

    @contextmanager
    def one(self, method: str, ids: torch.Tensor) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """The whole model, rewritten for as long, and what to call it with."""
        rewrite_attention(self.whole, **OPTIONS[method])
        yield self.whole, {"input_ids": ids, "use_cache": False}
        restore_attention(self.whole)

    @contextmanager
    def all(self, method: str, how: str, ids: torch.Tensor) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """What takes all processes, for as long, and what this one calls it with."""
        model = rewrite_attention(self.part if how == "tensor" else self.whole, **OPTIONS[method])
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if how != "tensor":
            parallel.shard_sequence(model, self.place.mesh, how)
            inputs["input_ids"] = mine = self.mine(ids)
            inputs["position_ids"] = parallel.position_ids(mine.shape[1], self.place.mesh, self.place.device)
        yield model, inputs
        restore_attention(model)

    def spec(self, n: int) -> AttentionSpec:
        config, head = self.config, self.config.hidden_size // self.config.num_attention_heads
        return AttentionSpec(
            1, config.num_attention_heads, config.num_key_value_heads, n, n, head, head, self.dtype,
            self.place.device.type, head**-0.5, Mask(causal=True),
        )  # fmt: skip


def _in_pieces(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    pieces = [forward(piece) for piece in x.split(PIECE, 1)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


# ---- what is computed ------------------------------------------------------------------------------------------------


def check(models: Models, n: int) -> dict[str, bool]:
    """Whether each way computes what it should; printed with its error beside one GPU's."""
    place, ids, found = models.place, models.ids(n), {}

    def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs).last_hidden_state

    with models.one("exact", ids) as call:
        exact = run(*call)
    with models.one("express", ids) as call:
        one = run(*call)
    with models.one("express", ids.chunk(place.mesh.size(), 1)[0]) as call:
        first = run(*call)
    for how in HOW:
        with models.all("express", how, ids) as call:
            out = run(*call)
        like, target = (one, exact) if how == "tensor" else (models.mine(one), models.mine(exact))
        errors = [((x - target).float().norm() / target.float().norm()).item() for x in (out, like)]
        if how == "coresets" and place.rank == 0:
            right = torch.equal(out, first)
        elif how == "coresets":
            right = 0 < errors[0] < 1.3 * errors[1]  # of one draw
        else:
            right = torch.equal(out, like) and errors[0] > 0
        found[how] = place.largest(float(not right))[0] == 0
        print(f"check {how} rank {place.rank} n {n}: error {errors[0]:.5f}, one GPU {errors[1]:.5f}, "
              f"{'as it should be' if right else 'WRONG'}", flush=True)  # fmt: skip
    return found


# ---- how long it takes -----------------------------------------------------------------------------------------------


def clock(call: Callable[[], Any], attention: nn.Module, runs: int, place: Place) -> tuple[float, float]:
    """Median milliseconds of ``call`` and of the module ``attention`` in it, after one run that is not counted."""
    times: list[tuple[float, float]] = []
    within: list[float] = []

    def note(*_: Any) -> None:
        place.wait()
        within.append(time.perf_counter())

    for _ in range(runs + 1):
        place.wait()
        start = time.perf_counter()
        call()
        place.wait()
        whole = time.perf_counter() - start
        hooks = [attention.register_forward_pre_hook(note), attention.register_forward_hook(note)]
        if runs > 1:
            call()
        for hook in hooks:
            hook.remove()
        times.append((1e3 * whole, 1e3 * (within[-1] - within[-2]) if runs > 1 else 0.0))
    whole_ms, attention_ms = (statistics.median(x) for x in zip(*times[1:], strict=True))
    return whole_ms, attention_ms


def measure(models: Models, name: str, method: str, n: int, how: list[str], runs: int) -> Iterator[dict[str, Any]]:
    """Rows of one length and method, one for each way."""
    place, ids, spec, config = models.place, models.ids(n), models.spec(n), models.config
    ranks, alone = place.mesh.size(), (0.0, 0.0)
    if place.rank == 0:
        with models.one(method, ids) as (model, inputs):
            alone = clock(partial(model, **inputs), model.layers[-1].self_attn, runs, place)
    one, one_attention = place.largest(*alone)
    for way in how:
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with models.all(method, way, ids) as (model, inputs):
            sequences = parallel.sequence_of(model)
            timed = clock(partial(model, **inputs), model.layers[-1].self_attn, runs, place)
            calls = (runs + 1) * (1 + (runs > 1)) * config.num_hidden_layers
            sent = sum(x.sent for x in sequences) / calls
        peak = torch.cuda.max_memory_allocated() / 1e9 if place.device.type == "cuda" else 0.0
        every, attention, peak = place.largest(*timed, peak)
        yield {
            "ranks": ranks, "model": name, "n": n, "method": method, "how": way, "one_ms": round(one, 3),
            "all_ms": round(every, 3), "speedup": round(one / every, 3), "peak_gb": round(peak, 2),
            **({"attention_one_ms": round(one_attention, 3), "attention_all_ms": round(attention, 3),
                "attention_speedup": round(one_attention / attention, 3)} if attention else {}),
            "sent_bytes": round(sent) if sequences else "",
            "ring_bytes": round(parallel.bytes_of_ring(spec, ranks)),
            "all_to_all_bytes": round(parallel.bytes_of_all_to_all(spec, ranks)),
            "tensor_bytes": round(parallel.bytes_of_tensor_parallel(spec, ranks, config.hidden_size)),
        }  # fmt: skip


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """``(model, method, tokens, runs)``, the most telling first; all of one model side by side in each half."""
    layer, deep, lengths = arguments.layer, arguments.deep, arguments.lengths
    yield from ((layer, "express", n, arguments.runs) for n in lengths)
    yield layer, "exact", lengths[0], arguments.runs
    yield deep, "express", lengths[0], 1
    yield deep, "exact", lengths[0], 1
    yield from ((layer, "exact", n, 1) for n in lengths[1:] if n <= arguments.exact_up_to)


def run(arguments: argparse.Namespace, place: Place) -> bool:
    """Whether every way computes what it should."""
    checking = Models(arguments.layer, place, selecting=True)
    right = check(checking, arguments.check)
    del checking
    about = run_of(arguments.commit if place.rank == 0 else "") | {"torch": torch.__version__}
    held, models = "", None
    for name, method, n, runs in jobs(arguments):
        if place.late():
            print("no time for", name, method, n, flush=True) if place.rank == 0 else None
            continue
        if held != name:
            models = None
            held, models = name, Models(name, place)
        how = [way for way in arguments.how if right[way] and (way, method) != ("coresets", "exact")]
        for row in measure(models, name, method, n, how, runs):
            if place.rank == 0:
                print(*(f"{key}={row[key]}" for key in COLUMNS if key in row), flush=True)
                if arguments.out is not None:
                    append(arguments.out, COLUMNS, [about | row])
    return all(right.values())


def main() -> None:
    start = time.perf_counter()
    for variable, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(variable, value)  # no NVLink multicast
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288, 1048576])
    parser.add_argument("--layer", choices=SHAPES, default="8b-layer")
    parser.add_argument("--deep", choices=SHAPES, default="8b")
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--exact-up-to", type=int, default=524288, help="longer sequences are not run exactly")
    parser.add_argument("--check", type=int, default=16384, help="tokens of the check")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=115, help="no row begins later than this")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    add_arguments(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device, int(os.environ["LOCAL_RANK"])) if arguments.device == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device is None else "nccl", device_id=device)
    mesh = init_device_mesh(arguments.device, (dist.get_world_size(),))
    with torch.no_grad():
        right = run(arguments, Place(device or torch.device("cpu"), mesh, start, arguments.seconds))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
