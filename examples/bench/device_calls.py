"""Calls of every op, and a recorder of what they would launch on a GPU, for ``device_code.py``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from express_compile import METHODS, AttentionSpec, Mask, Policy, Rows, Site
from express_compile.core.call import Call
from express_compile.core.rows import to_numbers
from express_compile.engines.varlen import express_varlen
from express_compile.kernels import launch as launching
from express_compile.kernels import prepared
from express_compile.kernels.attend import hopper, places
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.attend.last import attend_last
from express_compile.kernels.heads import PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random
from express_compile.kernels.select import hopper as scoring

B, H, H_KV, TOKENS, ROWS = 2, 8, 4, 8192, 512
SCALE, LAYER = 0.1, 3
H200 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)

BLOCKS, WHOLE, CORE = Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 128)
PLACES, KEPT, WINDOW = Rows(32, 256, protected=256), Rows(32, 256, 128, 256), Rows(32, 256)
MORE, MOST = Rows(32, 512, protected=512), Rows(32, 512, protected=1024)


class Launch(NamedTuple):
    """A call of :func:`~express_compile.kernels.launch.launch` without its grid."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched inside, in order and not run: CPU tensors pass for those of an H200, and new memory is zeros,
    as nothing writes to it."""
    list(METHODS.values())  # their modules take what they import now, not the recorder
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append(Launch(kernel, args, options))

    changes: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", True),
        (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        (torch, "empty", torch.zeros),
        (torch, "empty_like", torch.zeros_like),
        (torch.cuda, "get_device_properties", lambda device: H200),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        (prepared, "ENABLED", False),  # code launches past the recorder
        (hopper, "VERSIONS", ("",)),  # what compiles, and not what was run
        (scoring, "LONG", 0),
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("express_compile.") and getattr(module, "launch", None) is launching.launch:
            changes.append((module, "launch", record))
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield found


def tokens(dtype: torch.dtype, D: int, Lq: int | None = None) -> list[torch.Tensor]:
    """Query, key and value, of all tokens or with the last ``Lq`` of them as queries."""
    sizes = (H, Lq or TOKENS), (H_KV, TOKENS), (H_KV, TOKENS)
    return [torch.zeros(B, heads, n, D, dtype=dtype) for heads, n in sizes]


def padded() -> torch.Tensor:
    return torch.arange(TOKENS) >= torch.tensor([[100], [0]])


def attend(name: str, qkv: list[torch.Tensor], padding: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The op of a method with these options of its own; queries and keys that can have gradients have them."""
    query, key, value = qkv
    (_, _, Lq, D), Lk = query.shape, key.shape[2]
    mask = Mask() if name == "thinformer" else Mask(causal=True, offset=Lk - Lq)
    spec = AttentionSpec(B, H, H_KV, Lq, Lk, D, value.shape[3], query.dtype, "cuda", SCALE, mask)
    policy = Policy(methods=(name,), min_length=0, method_options={name: options})
    return run(name, qkv, padding, **METHODS[name].params(Site(spec, "layers.3"), policy))


def run(name: str, qkv: list[torch.Tensor], padding: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    return METHODS[name].op(*qkv, padding, torch.tensor(5), SCALE, LAYER, **options)[0]


def trained(name: str, qkv: list[torch.Tensor], *given: Any, call: Callable = attend, **options: Any) -> None:
    """The op and its gradient."""
    leaves = [x.requires_grad_() for x in qkv]
    out = call(name, leaves, *given, **options)
    torch.autograd.grad(out, leaves, torch.zeros_like(out))


def packed(dtype: torch.dtype, D: int) -> None:
    """Sequences one behind the other."""
    qkv = [x.transpose(1, 2).flatten(0, 1) for x in tokens(dtype, D)]
    starts = torch.tensor([0, TOKENS // 2, B * TOKENS], dtype=torch.int32)
    rows = dict(budget=ROWS, sinks=32, window=256, protected=256)
    express_varlen(*qkv, starts, B * TOKENS - TOKENS // 2, scale=SCALE, min_length=0, seed=5, **rows)


def mixed(*rows: Rows) -> dict[str, Any]:
    """Options of heads with such rows."""
    return dict(halving="balanced", inflation=-1, flatten=0.0, block=128, min_length=0, rows=to_numbers(rows))


def decode(dtype: torch.dtype, D: int) -> None:
    """Exact steps: of all rows, and of those that lengths, padding, weights and pages leave."""
    lengths, pages = torch.full((B,), TOKENS, dtype=torch.int32), torch.zeros(B, H_KV, 9, dtype=torch.int32)
    weights = torch.zeros(B, H_KV, TOKENS)
    kinds = ({}, dict(lengths=lengths), dict(padding=padded()), dict(log_weight=weights), dict(pages=pages))
    for Lq in (1, 4):
        for kind in kinds if Lq == 1 else ({}, dict(padding=padded())):
            decode_attention(*tokens(dtype, D, Lq), SCALE, **kind)


def last(dtype: torch.dtype, D: int) -> None:
    """Exact attention of the last 64 queries of four heads per KV head."""
    q, k, v = tokens(dtype, D)
    q = q.repeat(1, 2, 1, 1)
    for padding in (None, padded()):
        call = Call(q, k, v, padding, torch.tensor(5), SCALE, LAYER)
        attend_last(call, 64, (q.clone(), torch.zeros(q.shape[:3])))


def santa(dtype: torch.dtype, D: int) -> None:
    options = dict(draws=[64], fraction=0.0, sampler="sys", shared=True, min_length=0)
    q, k, v = tokens(dtype, D, 1)
    run("santa", [q, k, v], **options)
    run("santa", [q, k, v], padded(), **options)
    run("santa", [q, k, v], **options, window=1500, softcap=5.0, sinks=torch.zeros(H))
    run("santa", [q, k, v], **options, lengths=torch.full((B,), TOKENS))
    run("santa", [q, k.mT.contiguous().mT, v], **options, bernoulli=4)


def cache(dtype: torch.dtype, D: int) -> None:
    """ExpressCache's rows: a prompt, then a step of one token, and one of several."""
    q, k, v = tokens(dtype, D)
    own = PerHead((Rows(4, 60, 64), Rows(0, 60, 64, 128), WHOLE, Rows(4, 60, selected=2)))
    held = Held(own, k, v, Random(torch.tensor(5), LAYER), SCALE)
    n = TOKENS // 2
    held.fill(k[:, :, :n], v[:, :, :n])
    for step in (slice(n, n + 1), slice(n + 1, n + 5), slice(n + 5, n + 205)):
        held.settle()
        held.extend(q[:, :, step], k[:, :, step], v[:, :, step])


def steps(dtype: torch.dtype, D: int) -> None:
    """A step of one token from an ExpressCache, also one that selects in all heads, what is launched until rows of
    every kind had to move, and steps of so many sequences that programs wait for one another."""
    q, k, v = tokens(dtype, D)
    own = PerHead((Rows(4, 60, 64), Rows(0, 60, 64, 128), WHOLE, Rows(4, 60, selected=2)))
    n, selecting = 4000, PerHead(own.rows[3:])
    for rows in (own, selecting):
        held = Held(rows, k, v, Random(torch.tensor(5), LAYER), SCALE)
        held.fill(k[:, :, :n], v[:, :, :n])
        held.settle(single=True)
        held.prepare_step()
        new = [x[:, :, n : n + 1] for x in (q, k, v)]
        held.launch_step(*new)
        with mock.patch.object(places, "device_of", lambda device: (1, H200.shared_memory_per_multiprocessor)):
            held.launch_step(*new)
        held.fill(*(x[:, :, n : n + 140] for x in (k, v)))


MIXED = mixed(BLOCKS, WHOLE, KEPT, CORE)
EXPRESS = dict(budget=ROWS, sinks=32, recent=256, block=128)
CALLS: dict[str, Callable[[torch.dtype, int], Any]] = {
    "express": lambda *kind: trained("express", tokens(*kind), **EXPRESS, protected=0),
    "express, protected": lambda *kind: trained("express", tokens(*kind), **EXPRESS, protected=256),
    "express, padded": lambda *kind: trained("express", tokens(*kind), padded(), **EXPRESS, protected=0),
    "express, protected, padded": lambda *kind: trained("express", tokens(*kind), padded(), **EXPRESS, protected=256),
    "express, padded, a token before": lambda *kind: trained(
        "express", tokens(*kind, TOKENS - 1), padded(), **EXPRESS, protected=256
    ),
    "express, packed": packed,
    "express, uniform": lambda *kind: attend("express", tokens(*kind), **EXPRESS, halving="uniform"),
    "heads": lambda *kind: trained("heads", tokens(*kind), call=run, **MIXED),
    "heads, no coreset": lambda *kind: run(
        "heads", tokens(*kind), **mixed(BLOCKS, BLOCKS, PLACES, MORE, MORE, MOST, WINDOW, WINDOW)
    ),
    "heads, selected": lambda *kind: trained("heads", tokens(*kind), call=run, **mixed(BLOCKS)),
    "heads, padded": lambda *kind: trained("heads", tokens(*kind), padded(), call=run, **MIXED),
    "thinformer": lambda *kind: trained("thinformer", tokens(*kind), budget=ROWS),
    "thinformer, padded": lambda *kind: trained("thinformer", tokens(*kind), padded(), budget=ROWS),
    "sparse, fixed": lambda *kind: trained("sparse", tokens(*kind), pattern="fixed"),
    "sparse, strided": lambda *kind: trained("sparse", tokens(*kind), pattern="strided"),
    "decode": decode,
    "last": last,
    "santa": santa,
    "cache": cache,
    "cache, steps": steps,
}
"""What is called for a dtype and a head size."""
KINDS = ((torch.bfloat16, 128), (torch.float32, 64), (torch.bfloat16, 80))
