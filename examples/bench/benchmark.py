"""Is it really faster: Express and Thinformer against the best exact attention, checked first and then timed.

    python examples/bench/benchmark.py --out examples/bench/results/speed.csv       # on a GPU: about two minutes
    python examples/bench/benchmark.py --lengths 4096 8192 --settings 1       # a taste, also on a CPU

One row per (length, setting) of a prefill, then the other jobs: the last eighth of a prefill as a chunk, a batch of
sequences of other lengths, forward and backward; `encode`, attention without a causal mask; and `decode`, one token
over a long cache. The opponent is the faster of
torch's flash and cuDNN backends (for float32 its efficient one, on a CPU its flash kernel) in the same run on the
same inputs. A kernel whose output fails its check gets no speed-up. Rows with graph=1 replay both sides as CUDA
graphs: what they cost inside a model that keeps the GPU busy.

    python examples/bench/benchmark.py --bernoulli --out examples/bench/results/speed.csv      # on a GPU: only this
    python examples/bench/benchmark.py --bernoulli --lengths 256 --heads 4 2 --head-size 32   # a taste, also on a CPU

``--bernoulli`` measures SANTA with a rounded query (job ``bernoulli``): keys token by token and feature by feature,
and of the latter only those features that the query needs, whose share is in the column ``params``.

    python examples/bench/benchmark.py --sparse --flex --out examples/bench/results/speed.csv  # GPU: only this
    python examples/bench/benchmark.py --sparse --lengths 1024 --heads 4 2 --head-size 32     # a taste, also on a CPU

``--sparse`` measures Sparse Transformer attention, forward and with its gradients (jobs ``sparse_fixed``,
``sparse_strided`` and these with ``_train``) at its default stride. With ``--flex`` the number ``flex`` in
``params`` is FlexAttention with the same pattern, in ms, at 32,768 tokens, and ``flex_fa4`` its FlashAttention-4
backend, where ``flash-attn-4`` is installed and takes the pattern.

    python examples/bench/benchmark.py --window --out examples/bench/results/speed.csv      # GPU: only this, a minute
    python examples/bench/benchmark.py --window --lengths 1024 --heads 4 2 --head-size 32     # a taste, also on a CPU

``--window`` measures what anybody could do without this package, at as many rows as Express sees: FlexAttention over
the first tokens and the last ones (job and method ``window``), beside the two settings of Express.

    python examples/bench/benchmark.py --mixed --out examples/bench/results/speed.csv       # GPU: only this, a minute
    python examples/bench/benchmark.py --mixed --lengths 1024 --heads 16 8 --head-size 32     # a taste, also on a CPU

``--mixed`` measures plans per head (job ``mixed``, method ``heads``): mixtures like the plans that were found for a
model, beside plans with as many rows in all, equal ones for all heads: a window, Express, and FlexAttention over such a
window. With ``--plan FILE ..`` the mixtures are those of saved plans, per KV head or per query head, each as it is and
with selected rows where it has everything; :func:`layers_of` says which of their heads a layer has, and ``of_plan`` in
``params`` how many rows the plan itself has on average; times are per layer. ``launches`` counts what a layer launches
on the GPU, ``selection`` is the share of its time without attention: thinning, contests and choices.

    python examples/bench/benchmark.py --padded --out examples/bench/results/speed.csv      # GPU: only this, a minute
    python examples/bench/benchmark.py --padded --others 1024 --heads 4 2 --head-size 32      # a taste, also on a CPU

``--padded`` measures three sequences of other lengths as a batch that is padded on the left, on the right or on both
sides, as packed sequences, and one after the other (``padding`` in ``params``).

    PYTHONPATH=.:FOLDER python examples/bench/benchmark.py --versions --out examples/bench/results/triton.csv   # a GPU
    python examples/bench/benchmark.py --versions --others 512 --heads 16 8 --head-size 32    # a taste, also on a CPU

``--versions`` measures a call of every kind with one Triton, that of FOLDER if it has one, to be compared with the rows
of another: an upgrade may make other machine code of the same kernels. With ``kernel=plain`` in ``params`` segment
attention runs without the kernel for Hopper.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
import torch.nn.functional as F
from records import SPEED_COLUMNS, add_arguments, append, run_of, show
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from express_compile import METHODS, Policy, Site
from express_compile.core.call import Call
from express_compile.core.plan import SavedPlan
from express_compile.core.rows import Rows
from express_compile.kernels import express as E
from express_compile.kernels import heads as P
from express_compile.kernels import prepared
from express_compile.kernels import thinformer as T
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.bernoulli import feature_probability, round_query
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.attend.sampled import santa_triton
from express_compile.kernels.attend.segments import (
    SegmentTable,
    Sources,
    causal_table,
    dense_table,
    segment_attention,
    segment_attention_backward,
    segment_attention_reference,
)
from express_compile.kernels.attend.segments_backward import accumulate_rows_reference
from express_compile.kernels.exact import exact_attention
from express_compile.kernels.launch import Random
from express_compile.kernels.santa import probabilities, read_probability, santa_reference, visible_keys
from express_compile.kernels.sparse import Pattern, default_stride, dense_backward, dense_forward
from express_compile.planning.devices import versions
from express_compile.planning.measure import Clock, replayed

SETTINGS = [
    Policy(budget=512, sinks=32, window=32, protected=0),
    Policy(budget=256, sinks=32, window=512, protected=0),
    Policy(budget=1024, sinks=32, window=32, protected=0),
    Policy(budget=256, sinks=32, window=256, protected=256),
    Policy(),
]
ENCODERS = [Policy(budget=256), Policy(budget=512)]
ENCODE_LENGTHS = [4096, 8192, 32768, 131072]
DECODE = [(B, n, S) for B in (1, 8, 32) for n in (4096, 8192, 16384, 32768, 65536, 131072) for S in (64, 128, 512)]
BERNOULLI = [(1, 131072, H_kv) for H_kv in (8, 32)] + [(8, 32768, H_kv) for H_kv in (8, 32)]  # B, keys
EVERY = Rows(32, 1024), Rows(32, 256, selected=8), Rows(32, 256, 256, 256), Rows(32, 256, selected=16), Rows(32, 512), \
    Rows(32, 256, selected=16), Rows(32, 256), Rows(32, 256, selected=32)  # fmt: skip
MIXED = {"few": EVERY, "one exact": (*EVERY[:4], Rows(everything=True), *EVERY[5:])}  # as found for Qwen2.5-Coder-0.5B
MOST = Rows(32, 256, selected=64)  # what stands for everything where that is too slow
CHECKED = 4  # layers of a plan
LAYER = 0
GRAPH_UP_TO = 16384  # tokens up to which launching takes as long as computing: measured with a CUDA graph as well


def quantile(times: list[float], q: float) -> float:
    return torch.tensor(times, dtype=torch.float64).quantile(q).item()


def exact_times(
    q, k, v, clock: Clock, repeats: int, grad: torch.Tensor | None = None, graph: bool = False, causal: bool = True
) -> dict[str, float]:
    """Median milliseconds of every exact backend that takes the shape; with ``grad``, forward and backward.

    If ``causal``, queries are the last tokens of the keys; fewer queries than keys need a mask that says so.
    """
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if q.is_cuda:
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
        if q.dtype == torch.float32:  # for which the others have no kernel
            backends = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    whole = not causal or q.shape[2] == k.shape[2]
    options = dict(is_causal=causal) if whole else dict(attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    if not whole and not q.is_cuda:  # no CPU backend takes this mask unless it is spelled out
        options, backends = dict(attn_mask=options["attn_mask"]._materialize("cpu")), {"math": SDPBackend.MATH}
    times = {}
    for name, backend in backends.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=q.shape[1] != k.shape[1])
            return out if grad is None else torch.autograd.grad(out, (q, k, v), grad)

        try:
            times[name] = quantile(clock(replayed(call) if graph else call, repeats), 0.5)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    if not whole and q.is_cuda:  # our own exact kernel knows bottom-right masks
        times["segments"] = quantile(clock(lambda: exact_attention(q, k, v, q.shape[-1] ** -0.5), repeats), 0.5)
    return times


def check(q, k, v, out, config: E.Express) -> tuple[float, float]:
    """Relative error of ``out`` in three blocks of queries against float64, and that of the reference.

    The rows are those that the op itself selected.
    """
    Lq, scale = q.shape[2], q.shape[-1] ** -0.5
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    layout = E.make_layout(config, Lq, k.shape[2])
    part = E.select_rows(k, v, layout, scale, Random(seed, LAYER))[0].gathered()
    table, worst, allowed = layout.table, 0.0, 0.0
    for block in {0, len(table.tail) // 2, len(table.tail) - 1}:
        own, one = table.of_block(block, Lq)
        exact = Sources(*(x.double() for x in part.buffers))
        truth, _ = segment_attention_reference(q[:, :, own].double(), exact, one, scale)
        reference, _ = segment_attention_reference(q[:, :, own], part, one, scale)
        worst = max(worst, ((out[:, :, own] - truth).norm() / truth.norm()).item())
        allowed = max(allowed, 2 * ((reference - truth).norm() / truth.norm()).item())
    return worst, allowed


def check_gradients(q, k, v, policy: Policy) -> tuple[float, float]:
    """Relative error of the gradients of the first 6,000 tokens against float64, and that of the reference."""
    q, k, v = (x[:, :, :6000].detach().requires_grad_() for x in (q, k, v))
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    params = METHODS["express"].params(Site(), policy)
    out, _ = METHODS["express"].op(q, k, v, None, seed, scale, LAYER, **params)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    layout = E.make_layout(E.config_of(policy, n), n, n)
    _, index = E.select_rows(k, v, layout, scale, Random(seed, LAYER))
    gradients = []
    for dtype in (torch.float64, q.dtype):
        leaves = [x.detach().to(dtype) for x in (q, k, v)]
        rows = leaves[0], Sources(*leaves[1:], *(E.gather_rows(x, index) for x in leaves[1:]))
        result = segment_attention_reference(*rows, layout.table, scale)
        d_query, *parts = segment_attention_backward(grad.to(dtype), *rows, *result, layout.table, scale)
        for target, part in zip(parts[:2], parts[2:], strict=True):
            accumulate_rows_reference(target, index, part)
        gradients.append((d_query, *parts[:2]))
    truth, reference = gradients

    def worst(xs):
        return max(((x.to(q.dtype) - t).norm() / t.norm()).item() for x, t in zip(xs, truth, strict=True))

    return worst(actual), 2 * worst(reference)


def row_of(
    policy: Policy, times: list[float], opponents: dict[str, float], errors: tuple[float, float], **more
) -> dict:
    """A row of results; no speed-up for what failed its check."""
    params, method = more.pop("params", {}), more.pop("method", "express")
    if method == "express":
        own = policy.of("express")
        params = dict(sinks=own.sinks, window=own.recent, protected=own.protected, **params)
    best, p50 = min(opponents, key=opponents.get), quantile(times, 0.5)
    error, allowed = errors
    return dict(
        method=method, params=" ".join(f"{a}={b}" for a, b in params.items()),
        s=policy.budget, ms_p20=quantile(times, 0.2), ms_p50=p50, ms_p80=quantile(times, 0.8), opponent=best,
        opponent_ms_p50=opponents[best], speedup=opponents[best] / p50 if error <= allowed else "failed its check",
        error=error, **more,
    )  # fmt: skip


def op_of(
    policy: Policy, device: torch.device, padding: torch.Tensor | None = None, method: str = "express"
) -> Callable:
    """The op that ``policy`` means, as a function of query, key and value."""
    params, op = METHODS[method].params(Site(), policy), METHODS[method].op
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return lambda q, k, v: op(q, k, v, padding, seed, q.shape[-1] ** -0.5, LAYER, **params)[0]


def peak_of(call: Callable, kept: Callable) -> tuple[torch.Tensor, float]:
    """What ``call`` returns, and the megabytes it needed at most beyond the inputs and ``kept(result)`` bytes."""
    if not torch.cuda.is_available():
        return call(), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before - kept(result)) / 2**20


def out_and_lse(out: torch.Tensor) -> int:
    return out.numel() * out.element_size() + out.numel() // out.shape[-1] * 4


def prefill(policy: Policy, opponents: dict[str, float], tensors, clock: Clock, repeats: int, **params) -> dict:
    """The last ``Lq`` of ``Lk`` tokens as queries; ``graph=1`` replays a CUDA graph."""
    op = op_of(policy, tensors[0].device)
    call = replayed(lambda: op(*tensors)) if params.get("graph") else lambda: op(*tensors)
    times = clock(call, repeats)
    out, peak = peak_of(lambda: op(*tensors), out_and_lse)
    errors = check(*tensors, out, E.config_of(policy, tensors[1].shape[2]))
    return row_of(policy, times, opponents, errors, job="prefill", params=params, peak_mb=peak)


def without_padding(tensors, lengths: Sequence[int], clock: Clock, repeats: int, **options) -> dict:
    """:func:`exact_times`, with its ``options``, summed up over the sequences of a batch, each of its own length."""
    opponents: dict[str, float] = {}
    for b, length in enumerate(lengths):
        query = slice(-min(length, tensors[0].shape[2]), None)
        parts = (tensors[0][b : b + 1, :, query], *(x[b : b + 1, :, -length:] for x in tensors[1:]))
        for name, ms in exact_times(*parts, clock, repeats, **options).items():
            opponents[name] = opponents.get(name, 0.0) + ms
    return opponents


BATCHES = ("alone", "packed", "left", "right", "both")


def batched(how: str, policy: Policy, tensors, lengths: list[int]) -> tuple[Callable, list, list[int]]:
    """Express of the sequences of a batch as a function of what it is given: padded on a side, packed, or each one
    alone; and where the first token of each one is in the batch."""
    q, n = tensors[0], tensors[0].shape[2]
    firsts = [{"right": 0, "both": (n - length) // 2}.get(how, n - length) for length in lengths]
    if how in ("left", "right", "both"):
        place, first, length = (torch.tensor(x, device=q.device) for x in (range(n), firsts, lengths))
        padding = (place >= first[:, None]) & (place < (first + length)[:, None])
        return op_of(policy, q.device, padding), tensors, firsts
    own = [[x[b : b + 1, :, at : at + length] for x in tensors]
           for b, (at, length) in enumerate(zip(firsts, lengths, strict=True))]  # fmt: skip
    if how == "alone":
        op = op_of(policy, q.device)
        return lambda *each: [op(*x) for x in each], own, firsts
    params, scale = METHODS["express"].params(Site(), policy), q.shape[-1] ** -0.5
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    starts = torch.tensor([0, *lengths], device=q.device).cumsum(0).to(torch.int32)
    given = [torch.cat([x[i][0].transpose(0, 1) for x in own]) for i in range(3)]
    return lambda q, k, v: E.VARLEN(q, k, v, starts, max(lengths), seed, scale, LAYER, **params)[0], given, firsts


def batch(
    how: str, policy: Policy, tensors, lengths: list[int], opponents: dict[str, float], clock: Clock, repeats: int
) -> dict:
    """Express of a batch; the opponent runs every sequence for itself, without its padding."""
    op, given, firsts = batched(how, policy, tensors, lengths)
    times = clock(lambda: op(*given), repeats)

    def kept(out: torch.Tensor | list[torch.Tensor]) -> int:
        return sum(map(out_and_lse, out)) if isinstance(out, list) else out_and_lse(out)

    out, peak = peak_of(lambda: op(*given), kept)
    if how == "packed":
        out = [x.transpose(0, 1)[None] for x in out.split(lengths)]
    elif how != "alone":
        out = [out[b : b + 1, :, first:] for b, first in enumerate(firsts)]
    shortest = min(lengths)  # check what all sequences have
    own = [torch.cat([x[b : b + 1, :, first : first + shortest] for b, first in enumerate(firsts)]) for x in tensors]
    errors = check(*own, torch.cat([x[:, :, :shortest] for x in out]), E.config_of(policy, tensors[0].shape[2]))
    params = dict(padding=how, lengths="/".join(map(str, lengths)))
    return row_of(policy, times, opponents, errors, job="prefill", params=params, peak_mb=peak)


def train(policy: Policy, tensors, clock: Clock, repeats: int) -> dict:
    """Forward and backward."""
    q, k, v = (x.requires_grad_() for x in tensors)
    grad, op = torch.randn_like(q), op_of(policy, q.device)

    def call():
        return torch.autograd.grad(op(q, k, v), (q, k, v), grad)

    times = clock(call, repeats)
    kept = sum(x.numel() * x.element_size() for x in (q, k, v)) + out_and_lse(q)
    _, peak = peak_of(call, lambda _: kept)
    opponents = exact_times(q, k, v, clock, repeats, grad)
    return row_of(policy, times, opponents, check_gradients(q, k, v, policy), job="train", peak_mb=peak)


def check_rows(q, k, v, out, policy: Policy, padding: torch.Tensor | None) -> tuple[float, float]:
    """As :func:`check`, for 512 queries of Thinformer over the rows that the op itself selected."""
    scale, seed = q.shape[-1] ** -0.5, torch.zeros((), dtype=torch.int64, device=q.device)
    options = METHODS["thinformer"].params(Site(), policy)
    s, rule = T.rows_kept(k.shape[2], **options), T.get_rule(options["halving"], options["flatten"])
    _, keys, values, lengths = T.select(k, v, padding, s, T.Decider(rule, scale, T.Random(seed, LAYER)))
    q, out = (x[:, :, x.shape[2] // 2 :][:, :, :512] for x in (q, out))
    table = dense_table(q.shape[2], keys.shape[2])

    def attend(q, keys, values):
        return segment_attention_reference(q, Sources.compacted(keys, values, lengths), table, scale)[0]

    truth = attend(*(x.double() for x in (q, keys, values)))
    reference = attend(q, keys, values)
    return ((out - truth).norm() / truth.norm()).item(), 2 * ((reference - truth).norm() / truth.norm()).item()


def encode(
    policy: Policy,
    opponents: dict[str, float],
    tensors,
    clock: Clock,
    repeats: int,
    lengths: Sequence[int] = (),
    **params,
) -> dict:
    """Attention without a causal mask; ``lengths`` of the sequences of a batch that is padded on the right."""
    q, k, v = tensors
    padding = torch.arange(k.shape[2], device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    padding = padding if lengths else None
    op = op_of(policy, q.device, padding, "thinformer")
    call = replayed(lambda: op(*tensors)) if params.get("graph") else lambda: op(*tensors)
    times = clock(call, repeats)
    out, peak = peak_of(lambda: op(*tensors), out_and_lse)
    errors = check_rows(*tensors, out, policy, padding)
    own = policy.method_options.get("thinformer", {})
    if lengths:
        params["lengths"] = "/".join(map(str, lengths))
    return row_of(policy, times, opponents, errors, method="thinformer", job="encode", params={**own, **params},
                  peak_mb=peak)  # fmt: skip


def rows_read(q, k, attend: Callable[[torch.Tensor], torch.Tensor], draws: int) -> tuple[float, float]:
    """Value rows per KV head that ``attend(value)`` reads of one sequence, and how many are expected.

    Which rows are drawn does not depend on the values: one row at a time is 1 in a column of its own, and shows.
    """
    (_, H_kv, n, D), value = k.shape, torch.zeros_like(k)
    seen = 0
    for start in range(0, n, D):
        width = min(D, n - start)
        value[:, :, start : start + width].diagonal(dim1=2, dim2=3).fill_(1)
        seen += (attend(value).unflatten(1, (H_kv, -1)) != 0).any(2).sum().item()
        value[:, :, start : start + width] = 0
    p, _ = probabilities(q, k, visible_keys(1, 1, n, None, None, q.device), D**-0.5)
    read = read_probability(p, torch.full(q.shape[1:2], draws, device=q.device), "sys", True)
    return seen / H_kv, read.sum().item() / H_kv


def decode(
    tensors, draws: int, truth: torch.Tensor, opponents: dict[str, float], clock: Clock, repeats: int, **params
) -> dict:
    """One token by SANTA, both sides as CUDA graphs. The check is on all rows; ``error`` is that of the sample.

    ``truth`` is exact attention of the first sequences in float64. ``rows`` counts the distinct value rows that a KV
    head read, ``expected`` is what the reference's formula says. SANTA runs at every length, also where it would leave
    exact attention to itself.
    """
    q, k, v = tensors
    scale, seed = q.shape[-1] ** -0.5, torch.zeros((), dtype=torch.int64, device=q.device)
    options = METHODS["santa"].params(Site(), Policy(budget=draws, min_length=0))
    op = METHODS["santa"].op
    out, peak = peak_of(lambda: op(q, k, v, None, seed, scale, LAYER, **options)[0], out_and_lse)
    part = [x[: len(truth)] for x in tensors]
    whole = santa_triton(Call(*part, None, seed, scale, LAYER), None)[0]
    reference = F.scaled_dot_product_attention(*part, enable_gqa=True)
    sampled, all_rows, allowed = (
        ((x - truth).norm() / truth.norm()).item() for x in (out[: len(truth)], whole, reference)
    )
    first = part[0][:1], part[1][:1]
    rows, expected = rows_read(*first, lambda v: op(*first, v, None, seed, scale, LAYER, **options)[0], draws)
    times = clock(replayed(lambda: op(q, k, v, None, seed, scale, LAYER, **options)), repeats)
    params |= dict(graph=1, rows=round(rows, 1), expected=round(expected, 1))
    errors = all_rows, 2 * allowed
    row = row_of(Policy(budget=draws), times, opponents, errors, method="santa", job="decode", params=params,
                 peak_mb=peak)  # fmt: skip
    return {**row, "error": sampled}


def segments(tensors, opponents: dict[str, float], clock: Clock, repeats: int, **params) -> dict:
    """Segment attention over all tokens, causal: exact attention by our own kernel."""
    q, k, v = tensors
    n, scale, rows = q.shape[2], q.shape[-1] ** -0.5, Sources.tokens(k, v)
    table = causal_table(n, n)

    def call() -> torch.Tensor:
        return segment_attention(q, rows, table, scale)[0]

    out, peak = peak_of(call, out_and_lse)
    blocks = {0, len(table.tail) // 2, len(table.tail) - 1}
    errors = max(errors_of(out, q, rows, table.of_block(block, n), scale, n) for block in blocks)
    row = row_of(Policy(), clock(call, repeats), opponents, errors, method="exact", job="segments", params=params,
                 peak_mb=peak)  # fmt: skip
    return {**row, "s": ""}


def decode_exact(tensors, truth: torch.Tensor, opponents: dict[str, float], clock: Clock, repeats: int) -> dict:
    """One token over all rows by our own kernel, both sides as CUDA graphs; ``truth`` as in :func:`decode`."""

    def call() -> torch.Tensor:
        return decode_attention(*tensors, tensors[0].shape[-1] ** -0.5)[0]

    out, peak = peak_of(call, out_and_lse)
    reference = F.scaled_dot_product_attention(*(x[: len(truth)] for x in tensors), enable_gqa=True)
    errors = relative(out[: len(truth)], truth), 2 * relative(reference, truth)
    row = row_of(Policy(), clock(replayed(call), repeats), opponents, errors, method="exact", job="decode_exact",
                 params=dict(graph=1), peak_mb=peak)  # fmt: skip
    return {**row, "s": ""}


def bernoulli_rows(q, k, v, draws: int, clock: Clock, repeats: int, **params) -> list[dict]:
    """SANTA over keys token by token, feature by feature, and there with the query rounded to 4 and to 8 levels.

    The check is on all rows, against exact attention of the query as it is rounded; ``rounded`` is the error that the
    rounding itself makes, ``error`` that of the sample, ``features`` the share of the features that a KV head reads.
    """
    scale, seed = q.shape[-1] ** -0.5, torch.zeros((), dtype=torch.int64, device=q.device)
    step = torch.full((q.shape[0], 1), k.shape[2], device=q.device)
    graph = {"graph": 1} if q.is_cuda else {}
    opponents = exact_times(q, k, v, clock, repeats, graph=q.is_cuda, causal=False)
    first = q[:1], k[:1], v[:1]
    exact = F.scaled_dot_product_attention(*(x.double() for x in first), enable_gqa=True)
    allowed = 2 * relative(F.scaled_dot_product_attention(*first, enable_gqa=True), exact)
    by_feature = k.mT.contiguous().mT
    rows, op = [], METHODS["santa"].op
    for layout, key, levels in (("tokens", k, 0), ("features", by_feature, 0), ("features", by_feature, 4),
                                ("features", by_feature, 8)):  # fmt: skip
        policy = Policy(budget=draws, min_length=0, method_options={"santa": {"bernoulli": levels}})
        options = METHODS["santa"].params(Site(), policy)
        call = lambda key=key, options=options: op(q, key, v, None, seed, scale, LAYER, **options)  # noqa: E731
        out, peak = peak_of(lambda call=call: call()[0], out_and_lse)
        entered = round_query(q, levels, seed, LAYER, step)[:1] if levels else q[:1]
        truth = F.scaled_dot_product_attention(entered.double(), *(x.double() for x in first[1:]), enable_gqa=True)
        attend = santa_triton if q.is_cuda else santa_reference
        whole = attend(Call(q[:1], key[:1], v[:1], None, seed, scale, LAYER, options=dict(bernoulli=levels)), None)[0]
        share = feature_probability(q, k.shape[1], levels).mean().item() if levels else 1.0
        told = dict(**params, keys=layout, levels=levels, features=round(share, 4),
                    rounded=round(relative(truth, exact), 4), **graph)  # fmt: skip
        times = clock(replayed(call) if q.is_cuda else call, repeats)
        row = row_of(policy, times, opponents, (relative(whole, truth), allowed), method="santa", job="bernoulli",
                     params=told, peak_mb=peak)  # fmt: skip
        rows.append({**row, "error": relative(out[:1], exact)})
    return rows


def flex_of(pattern: Pattern, n: int, device: torch.device, backend: str = "TRITON") -> Callable:
    """FlexAttention over the same pattern, compiled, as a function of query, key and value."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return pattern.local(i, j) | pattern.far(i, j)

    mask = torch.compile(create_block_mask)(seen, None, None, n, n, device=str(device))
    compiled, options = torch.compile(flex_attention, dynamic=False), {"BACKEND": backend}
    return lambda q, k, v: compiled(
        q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options
    )


def runs(call: Callable) -> bool:
    """Whether a peer takes the call; says why not."""
    try:
        call()
    except Exception as error:  # a peer may fail in any way
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
        return False
    return True


def sparse_rows(tensors, pattern: Pattern, grad, opponents, clock: Clock, repeats: int, flex: bool) -> list[dict]:
    """Sparse attention, merged, forward and with its gradients; checked on three blocks of queries, of the gradients
    on those of the first 4,096 tokens. ``opponents``: exact times of both jobs."""
    q, k, v = tensors
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    options = dict(pattern=pattern.kind, stride=pattern.stride, summary=pattern.summary)
    policy = Policy(method_options={"sparse": options})
    op = op_of(policy, q.device, method="sparse")
    peers = {"flex": flex_of(pattern, n, q.device)} if flex else {}
    if flex and importlib.util.find_spec("flash_attn"):
        attend = flex_of(pattern, n, q.device, "FLASH")
        peers |= {"flex_fa4": attend} if runs(lambda: attend(q.detach(), k.detach(), v.detach())) else {}

    worst, allowed = 0.0, 0.0
    with torch.no_grad():
        out, peak = peak_of(lambda: op(q, k, v), out_and_lse)
        for stop in {min(n, 700), n // 2 + 3, n}:
            own = slice(max(0, stop - 256), stop)
            part = (q[:, :, own], k[:, :, :stop], v[:, :, :stop])
            truth, _ = dense_forward(*(x.double() for x in part), pattern, scale)
            reference, _ = dense_forward(*part, pattern, scale)
            worst = max(worst, relative(out[:, :, own], truth))
            allowed = max(allowed, 2 * relative(reference, truth))
        for peer in peers.values():
            assert relative(peer(q, k, v), out) < 0.01, "FlexAttention computes something else"
    first = [x[:, :, :4096].detach().requires_grad_() for x in (q, k, v)]
    actual = torch.autograd.grad(op(*first), first, grad[:, :, :4096])
    results = []
    for dtype in (torch.float64, q.dtype):
        leaves = [x.detach().to(dtype) for x in first]
        kept = dense_forward(*leaves, pattern, scale)
        results.append(dense_backward(grad[:, :, :4096].to(dtype), *kept, *leaves, pattern, scale))
    errors = [[relative(x.to(q.dtype), t) for x, t in zip(xs, results[0], strict=True)] for xs in (actual, results[1])]

    rows, kept = [], sum(x.numel() * x.element_size() for x in (q, k, v)) + out_and_lse(q)
    for job, checked in {"": (worst, allowed), "_train": (max(errors[0]), 2 * max(errors[1]))}.items():

        def call(attend=op, trains=bool(job)):
            with torch.set_grad_enabled(trains):
                out = attend(q, k, v)
            return torch.autograd.grad(out, (q, k, v), grad) if trains else out

        if job:
            _, peak = peak_of(call, lambda _: kept)
        times = clock(call, repeats)
        told = {name: round(quantile(clock(lambda peer=peer: call(peer), repeats), 0.5), 4)  # noqa: B023
                for name, peer in peers.items() if runs(lambda peer=peer: call(peer))}  # fmt: skip  # noqa: B023
        rows.append(row_of(policy, times, opponents[job], checked, method="sparse", job=f"sparse_{pattern.kind}{job}",
                           params={**options, **told}, peak_mb=peak))  # fmt: skip
    return rows


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


def bernoulli_queries(q: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries like ``q`` of standard deviation 2, whose entries are normal, and such with heavy tails."""
    laplace = torch.distributions.Laplace(0.0, 2**0.5).sample(q.shape)
    return {"gaussian": 2 * q, "laplace": laplace.to(q)}


def random_tensors(B: int, H: int, H_kv: int, Lq: int, Lk: int, D: int, device: str, dtype: torch.dtype) -> list:
    torch.manual_seed(Lk)
    return [torch.randn(B, h, n, D, device=device, dtype=dtype) for h, n in ((H, Lq), (H_kv, Lk), (H_kv, Lk))]


def window_of(rows: int, sinks: int, n: int, device: torch.device) -> Callable:
    """FlexAttention over the first ``sinks`` tokens and the last ones, ``rows`` in all, compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return (i >= j) & ((i - j < rows - sinks) | (j < sinks))

    torch.compiler.reset()  # one length after the other: Dynamo gives up at its limit of recompilations
    on_gpu = torch.device(device).type == "cuda"
    make, attend = (
        (torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=False))
        if on_gpu
        else (create_block_mask, flex_attention)
    )
    mask = make(seen, None, None, n, n, device=str(device))
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def window(tensors, rows: int, sinks: int, opponents: dict[str, float], clock: Clock, repeats: int) -> dict:
    """What a user could do without us, at as many rows as Express sees; checked on three blocks of queries."""
    q, k, v = tensors
    n = q.shape[2]
    attend = window_of(rows, sinks, n, q.device)
    out, peak = peak_of(lambda: attend(q, k, v), out_and_lse)
    worst, allowed = 0.0, 0.0
    for stop in {min(n, 700), n // 2 + 3, n}:
        own = slice(max(0, stop - 64), stop)
        i, j = torch.arange(stop, device=q.device)[own, None], torch.arange(stop, device=q.device)
        mask = (i >= j) & ((i - j < rows - sinks) | (j < sinks))
        part = (q[:, :, own], k[:, :, :stop], v[:, :, :stop])
        truth, reference = (
            F.scaled_dot_product_attention(*(x.to(dtype) for x in part), attn_mask=mask, enable_gqa=True)
            for dtype in (torch.float64, q.dtype)
        )
        worst = max(worst, relative(out[:, :, own], truth))
        allowed = max(allowed, 2 * relative(reference, truth))
    times = clock(lambda: attend(q, k, v), repeats)
    return row_of(Policy(budget=rows), times, opponents, (worst, allowed), method="window", job="window",
                  params=dict(sinks=sinks, rows=rows), peak_mb=peak)  # fmt: skip


def seen_by(call: Call, own: P.PerHead) -> Iterator[tuple[P.Group, torch.Tensor, Sources, SegmentTable]]:
    """The heads with equal rows of a plan per head, their queries, and the rows that the op itself selects for them."""
    choices = P._choices(call, own, None)
    for group in P.groups(own.rows, call.key.shape[1], call.query.shape[1]):
        config, alone = own.config(group.rows), group.of(call)
        if config is None:
            yield group, alone.query, Sources.tokens(alone.key, alone.value), causal_table(call.Lq, call.Lk)
        elif isinstance(config, E.Express):
            layout, heads = E.make_layout(config, call.Lq, call.Lk), group.on(call.key.device)
            sources = E.select_rows(call.key, call.value, layout, call.scale, Random(call.seed, call.layer, heads))[0]
            yield group, alone.query, sources, layout.table
        else:
            sources, _, table = P._selected(alone, config, choices[group])
            yield group, alone.query, sources, table


def check_heads(q, k, v, out, own: P.PerHead) -> tuple[float, float]:
    """:func:`check_call` of a call as :func:`op_of` makes it."""
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return check_call(Call(q, k, v, None, seed, q.shape[-1] ** -0.5, LAYER), out, own)


def check_call(call: Call, out: torch.Tensor, own: P.PerHead) -> tuple[float, float]:
    """As :func:`check`, for the heads with equal rows whose error is the largest share of what is allowed; the exact
    queries at the end are checked beside them."""
    found, few_rows = [], call.Lq - own.last
    for group, query, sources, table in seen_by(call, own):
        own_out = group.take_queries(out)
        for block in {0, len(table.tail) // 2, len(table.tail) - 1}:
            queries, one = table.of_block(block, call.Lq)
            if queries.start >= few_rows:  # all of them are exact
                continue
            few = sources
            if group.rows.selected:  # copies of this block's rows alone; the table is that of the op
                segments = one.segments.copy()
                (_, first, rows), segments[0, 1, 1] = segments[0, 1].tolist(), 0
                one = replace(one, segments=segments)
                few = sources._replace(index=sources.index[:, :, first : first + rows])
            found.append(errors_of(own_out, query, few.gathered(), (queries, one), call.scale, few_rows))
    if own.last:
        one = causal_table(own.last, call.Lk)
        sources, queries = Sources.tokens(call.key, call.value), slice(few_rows, call.Lq)
        found.append(errors_of(out, call.query, sources, (queries, one), call.scale, call.Lq))
    return max(found, key=lambda x: x[0] / x[1])


def errors_of(
    out: torch.Tensor, query: torch.Tensor, rows: Sources, block: tuple[slice, SegmentTable], scale: float, end: int
) -> tuple[float, float]:
    """Relative error of ``out`` at a block of queries before the query ``end``, and twice that of the reference."""
    queries, table = block
    exact = Sources(*(x.double() for x in rows.buffers))
    truth, _ = segment_attention_reference(query[:, :, queries].double(), exact, table, scale)
    reference, _ = segment_attention_reference(query[:, :, queries], rows, table, scale)
    here = slice(queries.start, min(queries.stop, end))
    truth, reference = (x[:, :, : here.stop - here.start] for x in (truth, reference))
    return relative(out[:, :, here], truth), 2 * relative(reference, truth)


def launches(call: Callable) -> int:
    """Kernels, copies and fills of a call on the GPU; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(1 for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)


def of_sites(plan: SavedPlan) -> list[P.PerHead]:
    """What a plan says of every site."""
    return [Policy().of_entry(site).of("heads") for site in plan.sites]


def layers_of(plan: SavedPlan, H: int, H_kv: int, layers: int | None = None) -> list[P.PerHead]:
    """A plan for ``layers`` with ``H`` heads on ``H_kv`` KV heads, or for as few as have all KV heads of ``plan``.

    Layers have the KV heads of the plan in its order, ``H_kv`` each, over and over; of the last round those that lie
    evenly spread over the plan. Where rows are per query head, a KV head gives ``H / H_kv`` of its own: each of them as
    often as all can have a place, and for the places that are left those whose rows are furthest behind, each once. So
    every kind of rows is as frequent as in the plan, up to a head or two, and heads of one group stay together: KV
    heads of which all query heads are alike do not become others, nor do those of which all differ.
    """
    owns, behind = of_sites(plan), defaultdict[Rows, Fraction](Fraction)
    every = [x for own, site in zip(owns, plan.sites, strict=True) for x in by_kv_head(own.rows, site.facts["H_kv"])]
    count = (layers or -(-len(every) // H_kv)) * H_kv
    rounds, rest = divmod(count, len(every))
    order = [*range(len(every))] * rounds + [i * len(every) // rest for i in range(rest)]
    size = 1 if all(len(x) == 1 for x in every) else H // H_kv
    heads = [drawn(every[i], size, behind) for i in order]
    return [replace(owns[0], rows=[*chain(*heads[i : i + H_kv])]) for i in range(0, count, H_kv)]


def by_kv_head(rows: Sequence[Rows], H_kv: int) -> list[Sequence[Rows]]:
    """The rows of every KV head, or of its query heads."""
    each = max(1, len(rows) // H_kv)
    return [rows[i * each : (i + 1) * each] if len(rows) > 1 else rows for i in range(H_kv)]


def drawn(rows: Sequence[Rows], size: int, behind: dict[Rows, Fraction]) -> list[Rows]:
    """``size`` of the query heads of one KV head; ``behind``: how many of each there should have been so far, less
    those that there were."""
    for x in rows:
        behind[x] += Fraction(size, len(rows))
    found, left = [*rows] * (size // len(rows)), [*rows]
    for x in found:
        behind[x] -= 1
    while len(found) < size:
        found.append(left.pop(left.index(max(left, key=behind.__getitem__))))
        behind[found[-1]] -= 1
    return found


def without_everything(layers: Sequence[P.PerHead]) -> list[P.PerHead]:
    """Heads that see everything choose :data:`MOST` instead."""
    return [replace(own, rows=[MOST if x.everything else x for x in own.rows]) for own in layers]


def nothing(*_: object) -> None:
    """In place of attention."""


def per_head(
    name: str, layers: Sequence[P.PerHead], opponents: dict[str, float], tensors, clock: Clock, repeats: int, **params
) -> dict:
    """Plans per head, a mean over layers one after the other, of which some are checked; ``graph=1`` replays a CUDA
    graph."""
    n, count = tensors[1].shape[2], len(layers)
    ops = [op_of(Policy(methods=(own,)), tensors[0].device, method="heads") for own in layers]

    def call() -> torch.Tensor:
        for op in ops:
            out = None  # of the layer before: not held beside what this one needs
            out = op(*tensors)
        return out

    def each(run: Callable) -> list[float]:
        return [ms / count for ms in clock(replayed(run) if params.get("graph") else run, repeats)]

    checked = range(0, count, max(1, count // CHECKED))
    errors = max((check_heads(*tensors, ops[i](*tensors), layers[i]) for i in checked), key=lambda x: x[0] / x[1])
    _, peak = peak_of(call, out_and_lse)
    rows, plan = round(mean_rows(layers, n)), name.replace(" ", "_")
    told = dict(plan=plan, rows=rows, launches=round(launches(call) / count, 1))
    times = each(call)
    if tensors[0].is_cuda and any(len(set(own.rows)) > 1 for own in layers):
        attention = dict.fromkeys(("mixed_attention_triton", "_exact_heads", "attend_last"), nothing)
        with mock.patch.multiple(P, **attention), mock.patch.object(prepared, "ENABLED", False):
            without = clock(replayed(call), repeats)  # a host that runs the bodies takes longer than what is left
            told["selection"] = round(quantile(without, 0.5) / count / quantile(times, 0.5), 3)
    told |= {"layers": count} if count > 1 else {}
    return row_of(Policy(budget=rows), times, opponents, errors, job="mixed", method="heads", params={**told, **params},
                  peak_mb=peak)  # fmt: skip


def mean_rows(layers: Sequence[P.PerHead], n: int) -> float:
    """Rows that a query from a quarter of ``n`` tokens on sees, mean over layers and heads."""
    return fmean(float(P.rows_seen(own, n)[:, n // 4 :].mean()) for own in layers)


def equal_rows(rows: int, n: int, thinned: bool) -> P.PerHead:
    """One entry for all heads: a window, or Express with a window that makes up for the rest."""
    least = Rows(32, 32, 256, 256) if thinned else Rows(32, 32)
    return P.PerHead(replace(least, recent=32 + max(0, rows - round(mean_rows([P.PerHead(least)], n)))))


class Bench:
    """One run of the command: its arguments, the machine, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.on_gpu = args, torch.cuda.is_available()
        self.device, self.dtype = ("cuda", torch.bfloat16) if self.on_gpu else ("cpu", torch.float32)
        self.common = {**run_of(args.commit), **versions()}
        self.clock, self.rows = Clock(self.device), []

    def tensors(self, B: int, Lq: int, Lk: int, H_kv: int | None = None) -> list[torch.Tensor]:
        H, own = self.args.heads
        return random_tensors(B, H, H_kv or own, Lq, Lk, self.args.head_size, self.device, self.dtype)

    def repeats(self, n: int, few_from: int = 200_000, few: int = 2) -> int:
        """Seconds per exact call at half a million tokens: fewer repeats there."""
        return self.args.repeats if n < few_from else few

    def add(self, q: torch.Tensor, k: torch.Tensor, row: dict) -> None:
        shape = dict(B=q.shape[0], H=q.shape[1], H_kv=k.shape[1], Lq=q.shape[2], Lk=k.shape[2], D=q.shape[3])
        dtype = str(q.dtype).removeprefix("torch.")
        self.rows.append({**self.common, **shape, "Dv": q.shape[3], "dtype": dtype, **row})
        if self.args.out:
            append(self.args.out, SPEED_COLUMNS, self.rows[-1:])

    def bernoulli(self) -> None:
        shapes = BERNOULLI if self.on_gpu else [(1, n, self.args.heads[1]) for n in self.args.lengths]
        for B, n, heads in track(shapes, description="bernoulli"):
            q, k, v = self.tensors(B, 1, n, heads)
            for name, query in bernoulli_queries(q).items():
                for row in bernoulli_rows(query, k, v, 128, self.clock, 15, query=name):
                    self.add(query, k, row)

    def sparse(self) -> None:
        for n in track(self.args.lengths, description="sparse"):
            tensors = [x.requires_grad_() for x in self.tensors(1, n, n)]
            grad, repeats = torch.randn_like(tensors[0]), self.repeats(n, 100_000, 3)
            with torch.no_grad():
                opponents = {"": exact_times(*tensors, self.clock, repeats)}
            opponents["_train"] = exact_times(*tensors, self.clock, repeats, grad)
            flex = self.args.flex and n == 32768
            for kind in ("fixed", "strided"):
                pattern = Pattern(kind, default_stride(n), min(32, default_stride(n)))
                for row in sparse_rows(tensors, pattern, grad, opponents, self.clock, repeats, flex):
                    self.add(*tensors[:2], row)

    def window(self) -> None:
        """The two settings of Express with protected rows, and FlexAttention over as many rows, in one run."""
        for n in track(self.args.lengths, description="window"):
            tensors, repeats = self.tensors(1, n, n), self.repeats(n)
            opponents = exact_times(*tensors, self.clock, repeats)
            for policy in SETTINGS[-2:]:
                rows = round(float(E.rows_seen(policy, n)[n // 4 :].mean()))
                self.add(*tensors[:2], prefill(policy, opponents, tensors, self.clock, repeats))
                self.add(
                    *tensors[:2], window(tensors, rows, policy.of("express").sinks, opponents, self.clock, repeats)
                )

    def mixed(self) -> None:
        """Mixtures, and plans of as many rows in all that are equal for all heads, in one run."""
        mixtures = {name: [P.PerHead(every)] for name, every in ({} if self.args.plan else MIXED).items()}
        saved = {path.stem: SavedPlan.load(path) for path in self.args.plan}
        for name, plan in saved.items():
            mixtures[name] = layers_of(plan, *self.args.heads)
            if (fewer := without_everything(mixtures[name])) != mixtures[name]:
                mixtures[f"{name} without everything"] = fewer
        for n in track(self.args.lengths, description="mixed"):
            tensors, repeats = self.tensors(1, n, n), self.repeats(n)
            for graph in self.graphs(n):
                opponents = exact_times(*tensors, self.clock, repeats, graph=bool(graph))
                for name, layers in mixtures.items():
                    rows = round(mean_rows(layers, n))
                    plans = {name: layers}
                    plans |= {f"{x} as {name}": [equal_rows(rows, n, x == "Express")] for x in ("window", "Express")}
                    for plan, given in plans.items():
                        said = {"of_plan": round(mean_rows(of_sites(saved[plan]), n))} if plan in saved else {}
                        row = per_head(plan, given, opponents, tensors, self.clock, repeats, **graph, **said)
                        self.add(*tensors[:2], row)
                    if not graph and (self.args.plan or name == "few"):
                        flex = window(tensors, rows, 32, opponents, self.clock, repeats)
                        self.add(*tensors[:2], {**flex, "job": "mixed"})

    def versions(self) -> None:
        """A call of every kind."""
        n, clock, repeats = self.args.others, self.clock, self.args.repeats
        whole, policy, few = self.tensors(1, n, n), SETTINGS[0], P.PerHead(MIXED["few"])
        causal, every = (exact_times(*whole, clock, repeats, causal=causal) for causal in (True, False))
        plain = mock.patch.object(hopper, "takes", lambda *_: False)
        for kernel, patch in (({}, contextlib.nullcontext()), ({"kernel": "plain"}, plain)):
            with patch:
                prepared.forget()  # code has the kernel that it was made with
                self.add(*whole[:2], prefill(policy, causal, whole, clock, repeats, **kernel))
                self.add(*whole[:2], segments(whole, causal, clock, repeats, **kernel))
                self.add(*whole[:2], per_head("few", [few], causal, whole, clock, repeats, **kernel))
        prepared.forget()
        self.add(*whole[:2], encode(ENCODERS[0], every, whole, clock, repeats))
        floats = [
            x[:, : whole[1].shape[1], :, :64].float().contiguous() for x in whole
        ]  # torch's kernel takes no groups
        self.add(*floats[:2], prefill(policy, exact_times(*floats, clock, repeats), floats, clock, repeats))
        one = self.tensors(8, 1, n)
        one[0] *= 2
        truth = F.scaled_dot_product_attention(*(x[:2].double() for x in one), enable_gqa=True)
        opponents = exact_times(*one, clock, repeats, graph=self.on_gpu, causal=False)
        if self.on_gpu:  # kernels of one token have no twin that could be timed on a CPU
            self.add(*one[:2], decode(one, 128, truth, opponents, clock, repeats))
            self.add(*one[:2], decode_exact(one, truth, opponents, clock, repeats))
        self.add(*whole[:2], train(policy, whole, clock, repeats))
        opponents = {"": causal, "_train": exact_times(*whole, clock, repeats, torch.randn_like(whole[0]))}
        pattern = Pattern("fixed", default_stride(n), min(32, default_stride(n)))
        for row in sparse_rows(whole, pattern, torch.randn_like(whole[0]), opponents, clock, repeats, flex=False):
            self.add(*whole[:2], row)

    def everything(self) -> None:
        settings = SETTINGS[: self.args.settings]
        if self.args.others:
            self.others(self.args.others, [settings[0], settings[-1]])
        self.prefills(settings)
        self.encodes()
        self.decodes()

    def others(self, n: int, policies: list[Policy]) -> None:
        """A chunk of a prefill, a batch, forward and backward."""
        clock, repeats = self.clock, self.args.repeats
        chunk, whole = self.tensors(1, n // 8, n), self.tensors(1, n, n)
        opponents = exact_times(*chunk, clock, repeats)
        for policy in policies:
            self.add(*chunk[:2], prefill(policy, opponents, chunk, clock, repeats, chunk="last"))
            self.add(*whole[:2], train(policy, whole, clock, repeats))
        self.padded()

    def padded(self) -> None:
        """A batch of sequences of other lengths: padded in three ways, packed, and one sequence after the other."""
        n, clock, repeats = self.args.others, self.clock, self.args.repeats
        tensors, lengths = self.tensors(3, n, n), [n, n - n // 3, n - 17]
        opponents = without_padding(tensors, lengths, clock, repeats)
        for policy, how in product((SETTINGS[0], SETTINGS[-1]), BATCHES):
            self.add(*tensors[:2], batch(how, policy, tensors, lengths, opponents, clock, repeats))

    def graphs(self, n: int) -> list[dict[str, int]]:
        """Launched one by one, and where that takes as long as computing also as a CUDA graph."""
        return [{}, {"graph": 1}] if self.on_gpu and n <= GRAPH_UP_TO else [{}]

    def prefills(self, settings: list[Policy]) -> None:
        for n in track(self.args.lengths, description="lengths"):
            tensors, repeats = self.tensors(1, n, n), self.repeats(n)
            for graph in self.graphs(n):
                opponents = exact_times(*tensors, self.clock, repeats, graph=bool(graph))
                for policy in settings:
                    self.add(*tensors[:2], prefill(policy, opponents, tensors, self.clock, repeats, **graph))

    def encodes(self) -> None:
        clock, repeats = self.clock, self.args.repeats
        for n in track(self.args.encode, description="encode"):
            tensors = self.tensors(1, n, n)
            for graph in self.graphs(n):
                opponents = exact_times(*tensors, clock, repeats, graph=bool(graph), causal=False)
                for policy in ENCODERS:
                    self.add(*tensors[:2], encode(policy, opponents, tensors, clock, repeats, **graph))
        if not self.args.encode or not self.on_gpu:
            return
        n = self.args.encode[-1] // 4  # any length, padding, fewer queries than keys, and the published code's setting
        stretched, batch = self.tensors(1, n - n // 5, n - n // 5), self.tensors(2, n, n)
        cross = self.tensors(1, n // 4, n)
        published = random_tensors(1, 8, 8, 16384, 16384, 64, self.device, torch.float32)
        g = Policy(method_options={"thinformer": {"g": 2}})
        for policy, tensors, lengths in [
            (ENCODERS[0], stretched, ()),
            (ENCODERS[0], batch, (n, n - n // 3)),
            (ENCODERS[0], cross, ()),
            (g, published, ()),
        ]:
            keys = tensors[1].shape[2]
            s = T.rows_kept(keys, **METHODS["thinformer"].params(Site(), policy))
            for graph in ({}, {"graph": 1})[: 1 + (policy is g)]:
                each = lengths or [keys] * len(tensors[0])
                opponents = without_padding(tensors, each, clock, repeats, causal=False, graph=bool(graph))
                row = encode(policy, opponents, tensors, clock, repeats, lengths, **graph)
                self.add(*tensors[:2], {**row, "s": s})

    def decodes(self) -> None:
        opponents: dict[tuple[int, int], dict[str, float]] = {}
        for B, n, S in track(DECODE[: self.args.decode if self.on_gpu else 0], description="decode"):
            if (B, n) not in opponents:
                tensors = self.tensors(B, 1, n)
                tensors[0] *= 2  # scores of standard deviation 2: neither flat nor a single key
                opponents[B, n] = exact_times(*tensors, self.clock, 15, graph=True, causal=False)
                # two sequences in float64 are enough, and all that fits
                truth = F.scaled_dot_product_attention(*(x[:2].double() for x in tensors), enable_gqa=True)
            self.add(*tensors[:2], decode(tensors, S, truth, opponents[B, n], self.clock, 15))


PARTS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "bernoulli": (Bench.bernoulli, "B H_kv Lk params ms_p50 opponent opponent_ms_p50 speedup error"),
    "sparse": (Bench.sparse, "job Lk params ms_p50 opponent opponent_ms_p50 speedup error peak_mb"),
    "mixed": (Bench.mixed, "method Lk params ms_p50 opponent opponent_ms_p50 speedup error peak_mb"),
    "padded": (Bench.padded, "B Lk params ms_p50 opponent opponent_ms_p50 speedup error peak_mb"),
    "window": (Bench.window, "method Lk params ms_p50 opponent opponent_ms_p50 speedup error peak_mb"),
    "versions": (Bench.versions, "triton job method dtype params ms_p50 opponent opponent_ms_p50 speedup error"),
    "everything": (
        Bench.everything,
        "job dtype B Lq Lk s params ms_p50 opponent opponent_ms_p50 speedup error peak_mb",
    ),
}
"""What the command measures, and the columns that it shows of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 24576, 32768, 131072, 524288])
    parser.add_argument("--settings", type=int, default=99, help="only the first settings")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("H", "H_kv"))
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--others", type=int, default=32768, help="length of the other jobs, 0 for none: a chunk of "
                        "a prefill, a padded batch, forward and backward")  # fmt: skip
    parser.add_argument("--encode", type=int, nargs="*", default=ENCODE_LENGTHS, help="lengths without a causal mask")
    parser.add_argument("--decode", type=int, default=len(DECODE), help="how many of the shapes of decoding; 0: none")
    parser.add_argument("--bernoulli", action="store_true", help="measure only SANTA with a rounded query; --lengths "
                        "and --heads count on a CPU")  # fmt: skip
    parser.add_argument("--sparse", action="store_true", help="measure only Sparse Transformer attention; --lengths "
                        "count")  # fmt: skip
    parser.add_argument("--flex", action="store_true", help="with --sparse: FlexAttention too, at 32,768 tokens")
    parser.add_argument("--window", action="store_true", help="measure only Express beside FlexAttention over sinks "
                        "and a window of as many rows; --lengths count")  # fmt: skip
    parser.add_argument("--mixed", action="store_true", help="measure only plans per head beside plans of as many "
                        "rows for all; --lengths count, --heads has 8 KV heads "
                        "unless there is a --plan")  # fmt: skip
    parser.add_argument("--plan", type=Path, nargs="+", default=[], help="with --mixed: saved plans whose heads the "
                        "mixtures have")  # fmt: skip
    parser.add_argument("--padded", action="store_true", help="measure only batches of sequences of other lengths; "
                        "--others is the longest one")  # fmt: skip
    parser.add_argument("--versions", action="store_true", help="measure only a call of every kind, to be compared "
                        "with another Triton; --others is the length, --heads has 8 KV heads")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    add_arguments(parser)
    args = parser.parse_args()
    bench = Bench(args)
    measure, shown = PARTS[next((name for name in PARTS if getattr(args, name, False)), "everything")]
    measure(bench)
    show(bench.rows, shown.split())


if __name__ == "__main__":
    main()
