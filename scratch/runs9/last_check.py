"""What exact last queries cost, and whether they are right: PYTHONPATH=. python /tmp/last_check.py [lengths]  (H200)

Layers of the shipped plan of Qwen2.5-Coder-0.5B as 32 heads on 8 KV heads, D = 128, bfloat16. ms and host us are per
layer. "beside": jobs of the mixture (this branch); "apart": the kernels of decoding, as before; "turns": jobs beside, but
not dealt out by the host: programs take theirs in turns, as before.
"""
import sys, time
from pathlib import Path
from statistics import median
from unittest import mock

sys.path.insert(0, "examples/bench")
import numpy as np
import torch
import benchmark
from dataclasses import replace
from express_compile import Policy
from express_compile.core.plan import SavedPlan
from express_compile.kernels import heads as P, prepared
from express_compile.kernels.attend import mixed

GPU = torch.cuda.is_available()
LENGTHS = [int(x) for x in sys.argv[1:]] or [32768, 131072]
DEVICE, DTYPE, SIZE = ("cuda", torch.bfloat16, 128) if GPU else ("cpu", torch.float32, 16)
LAYERS = benchmark.layers_of(SavedPlan.load(Path("examples/plans/qwen2.5-coder-0.5b.json")), 32, 8)
sync = torch.cuda.synchronize if GPU else (lambda: None)
began = time.perf_counter()


def turns(load, length, programs):
    """The jobs of each program as they were: the n-th of all 132, in reverse in every other round."""
    jobs = np.arange(len(load))
    own = jobs % programs
    own = np.where(jobs // programs % 2 == 0, own, programs - 1 - own)
    order = np.argsort(own, kind="stable")
    return order, np.searchsorted(own[order], np.arange(programs + 1))


def events(call, repeats):
    """Median ms of calls that are queued one behind the other."""
    call(); sync()
    if not GPU:
        t = time.perf_counter(); call(); return 1e3 * (time.perf_counter() - t)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(20_000_000)  # the host is ahead
    marks[0].record()
    for mark in marks[1:]:
        call(); mark.record()
    sync()
    return median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


def host(call, repeats):
    sync(); found = []
    for _ in range(repeats):
        t = time.perf_counter(); call(); found.append(1e6 * (time.perf_counter() - t)); sync()
    return median(found)


def exact_last(q, k, v, n):
    """float32, head by head."""
    (_, H, Lq, D), Lk = q.shape, k.shape[2]
    outs = []
    for h in range(H):
        kv = h * k.shape[1] // H
        s = q[0, h, Lq - n :].float() @ k[0, kv].float().T * D**-0.5
        seen = torch.arange(Lk, device=q.device) <= torch.arange(Lk - n, Lk, device=q.device)[:, None]
        outs.append(s.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, kv].float())
    return torch.stack(outs)


for n in LENGTHS:
    q, k, v = benchmark.random_tensors(1, 32, 8, n, n, SIZE, DEVICE, DTYPE)
    q *= 2  # sharper
    truth = exact_last(q, k, v, min(256, n))
    repeats = 12 if n < 100_000 else 5
    exact = events(lambda: P.exact_attention(q, k, v, SIZE**-0.5), 3)
    print(f"\n{n} tokens: exact attention {exact:.2f} ms a layer; largest exact value of the last queries {truth.abs().max():.3f}")
    plain, base = {}, {}
    for kind, last in [("beside", 0), ("turns", 0), ("beside", 64), ("apart", 64), ("turns", 64), ("beside", 128), ("apart", 128), ("beside", 256), ("apart", 256), ("beside", 0)]:
        P._together.cache_clear(); prepared.forget()
        with mock.patch.object(mixed, "dealt", turns if kind == "turns" else mixed.dealt), \
             mock.patch.object(P, "_last_beside", (lambda *_: False) if kind == "apart" else P._last_beside):
            ops = [benchmark.op_of(Policy(methods=(replace(own, last=last),)), q.device, method="heads") for own in LAYERS]
            t = time.perf_counter()
            errors, changed = [], 0.0
            for i, op in enumerate(ops):
                out = op(q, k, v)
                if last:
                    errors.append((out[0, :, n - last :].float() - truth[:, -last:]).abs().max().item())
                    changed = max(changed, (out[:, :, : n - last] - plain[i][:, :, : n - last]).abs().max().item()) if i in plain else changed
                elif i < 2:
                    plain[i] = out
            sync(); first = time.perf_counter() - t
            each = [events(lambda: op(q, k, v), repeats) for op in ops]
            us = host(lambda: [op(q, k, v) for op in ops], 5) / len(ops)
        base.setdefault(kind, each)
        own = sum(each) / len(each)
        was = sum(base["beside"]) / len(each)
        right = f"error {max(errors):.4f}, others change by {changed:.1e}" if last else ""
        print(f"  last {last:3} {kind:6} {own:7.3f} ms ({own - was:+.3f}), host {us:5.0f} us, first calls {first:.2f} s; {right}")
        print("      layers", " ".join(f"{x:.2f}" for x in each), flush=True)
    del plain, out
print(f"{time.perf_counter() - began:.0f} s")
