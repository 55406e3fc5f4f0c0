"""On an H200, from the repository root: PYTHONPATH=. python /tmp/spans_check.py [plain]

Express of padded and packed batches by the kernel for Hopper: errors beside every sequence alone, then times of a batch
beside its sequences one after the other, and of its parts (as CUDA graphs). ``plain``: also those of the plain kernel.
"""
import faulthandler
import statistics
import sys
import time
from unittest import mock

import torch

from express_compile import METHODS, Policy, Site
from express_compile.kernels import express as E
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.segments import Sources, segment_attention, spanned_outputs
from express_compile.kernels.launch import Random
from express_compile.kernels.spans import Spans

faulthandler.dump_traceback_later(110, exit=True)  # a kernel that waits for ever
begun, SCALE, LAYER, N = time.time(), 128**-0.5, 3, 32768
LENGTHS = (32768, 21846, 32751)
POLICIES = {"s=512 sinks 32 window 32": Policy(budget=512, sinks=32, window=32, protected=0), "defaults": Policy()}
HOWS = ("left", "right", "both", "holes", "packed")
op, seed = METHODS["express"].op, torch.zeros((), dtype=torch.int64, device="cuda")


def say(*words):
    print(f"[{time.time() - begun:5.1f} s]", *words, flush=True)


def places_of(n, how):
    if how == "holes":
        return torch.randperm(N, generator=torch.Generator().manual_seed(n))[:n].sort().values.cuda()
    first = {"right": 0, "both": (N - n) // 2}.get(how, N - n)
    return torch.arange(first, first + n, device="cuda")


def event_ms(call, repeats=20):
    for _ in range(4):  # the last of them is prepared code
        call()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def graph_ms(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return event_ms(graph.replay)


generator = torch.Generator("cuda").manual_seed(0)
tensors = [torch.randn(3, h, N, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8)]
assert hopper.takes(*tensors, 128, Spans.of_padding(torch.ones(3, N, dtype=torch.bool, device="cuda"), N)), "no Hopper"


def batch(how, params):
    """A call, tensors, spans, and where each sequence is: its number in the batch's output and its places there."""
    at = [places_of(n, how) for n in LENGTHS]
    if how == "packed":
        given = [torch.cat([x[b][:, p] for b, p in enumerate(at)], 1).transpose(0, 1).contiguous() for x in tensors]
        starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
        spans = Spans.of_packed(starts, sum(LENGTHS))
        shared = [x.transpose(0, 1)[None].expand(3, -1, -1, -1) for x in given]
        call = lambda: E.VARLEN(*given, starts, N, seed, SCALE, LAYER, **params)[0]  # noqa: E731
        own = [slice(a, a + n) for a, n in zip(starts.tolist(), LENGTHS)]
        return call, lambda out: [out[x].transpose(0, 1) for x in own], shared, spans, at
    padding = torch.zeros(3, N, dtype=torch.bool, device="cuda")
    for b, p in enumerate(at):
        padding[b, p] = True
    given = [x.masked_fill(~padding[:, None, :, None], float("nan")) for x in tensors]
    call = lambda: op(*given, padding, seed, SCALE, LAYER, **params)[0]  # noqa: E731
    return call, lambda out: [out[b][:, p] for b, p in enumerate(at)], given, Spans.of_padding(padding, N), at


def parts(given, config, spans, n):
    layout = E.make_layout(config, n, n)
    q, k, v = given
    random = Random(seed, LAYER)
    sources, _ = E.select_rows(k, v, layout, SCALE, random, spans)
    into = spanned_outputs(q, v) if spans is not None and spans.order.dim() > 1 else None
    thin = lambda: E.thin_triton(k, v, layout, SCALE, *random, spans)  # noqa: E731
    return thin, lambda: segment_attention(q, sources, layout.table, SCALE, into)


for name, policy in POLICIES.items():
    params, config = METHODS["express"].params(Site(), policy), E.config_of(policy, N)
    say(f"=== {name}")
    alone_ms = alone_parts = None
    for how in HOWS:
        call, split, given, spans, at = batch(how, params)
        own = [[x[b : b + 1][:, :, p].contiguous() for x in tensors] for b, p in enumerate(at)]
        alone = lambda own=own: [op(*x, None, seed, SCALE, LAYER, **params)[0] for x in own]  # noqa: E731
        found, expected = split(call()), alone()
        torch.cuda.synchronize()
        worst = max((x.float() - e[0].float()).abs().max().item() for x, e in zip(found, expected))
        error = max(((x.float() - e[0].float()).norm() / e.float().norm()).item() for x, e in zip(found, expected))
        fine = all(x.isfinite().all() for x in found) and error < 5e-3
        if alone_ms is None:
            alone_ms = event_ms(alone)
            each = [parts(x, config, None, n) for x, n in zip(own, LENGTHS)]
            alone_parts = [sum(graph_ms(x[i]) for x in each) for i in range(2)]
            say(f"one after the other: {alone_ms:.2f} ms; thinning {alone_parts[0]:.2f}, attention {alone_parts[1]:.2f}")
        del found, expected, own, alone
        ms = event_ms(call)
        said = f"{how:7s} max error {worst:.1e}, relative {error:.1e} {'ok' if fine else 'WRONG'}; {ms:.2f} ms"
        said += f", {ms / alone_ms:.2f} times one after the other"
        if how in ("left", "holes"):  # a packed batch and other sides have the same parts
            thin, attend = parts(given, config, spans, N)
            said += f"; thinning {graph_ms(thin):.2f}, attention {graph_ms(attend):.2f}"
            if "plain" in sys.argv:
                with mock.patch.object(hopper, "takes", lambda *_: False):
                    thin, attend = parts(given, config, spans, N)
                    said += f" (plain kernel {graph_ms(attend):.2f})"
        say(said)
        torch.cuda.empty_cache()
    q, k, v = tensors
    padding = torch.ones(3, N, dtype=torch.bool, device="cuda")
    say(f"beside these: zeros for the output {graph_ms(lambda: spanned_outputs(q, v)):.2f} ms,",
        f"places {graph_ms(lambda: Spans.of_padding(padding, N)):.3f} ms")  # fmt: skip
