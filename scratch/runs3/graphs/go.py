"""Checks, then milliseconds of a 12-layer model (4,096 tokens, B=1, bf16, 12 heads of 64): PYTHONPATH=. python .gpu/graphs/go.py"""

import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from express_compile import rewrite_attention
from express_compile.routes.compile import express

T0 = time.perf_counter()
N, C, H, DEPTH = 4096, 768, 12, 12
REPLAYS = []
replay = torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda self: (REPLAYS.append(1), replay(self))[1]


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.n1, self.n2, self.qkv, self.out = nn.LayerNorm(C), nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down, self.causal = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), causal

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Model(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal) for _ in range(DEPTH))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def build(causal, **options):
    torch.manual_seed(0)
    model = Model(causal).cuda().bfloat16().eval().requires_grad_(False)
    return rewrite_attention(model, **options) if options else model


def states(i):
    return torch.randn(1, N, C, device="cuda", generator=torch.Generator("cuda").manual_seed(i)).bfloat16()


def ms(call, x, times=20):
    for _ in range(5):
        call(x)
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(times):
            call(x)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / times * 1e3)
    return min(found)


def apart(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


torch.set_grad_enabled(False)
warnings.simplefilter("error", RuntimeWarning)
few = dict(budget=64, min_length=0, seed=1, halving="uniform")
ways = {True: dict(methods=["express"], sinks=32, window=128, protected=0, **few), False: dict(methods=["thinformer"], **few)}
rows, compiles = [], []
for causal, options in ways.items():
    name, x = "decoder (express)" if causal else "encoder (thinformer)", states(0)
    exact, eager = build(causal), build(causal, **options)
    option, plain = build(causal, **options, cuda_graphs=True), build(causal, **options)
    first = time.perf_counter()
    option(x)
    first = time.perf_counter() - first
    graphed = torch.cuda.make_graphed_callables(plain, (states(9),))
    exact_graphed = torch.cuda.make_graphed_callables(build(causal), (states(9),))
    errors, before = [], len(REPLAYS)
    for i in range(6):
        y = eager(states(i))
        errors += [apart(option(states(i)), y), apart(graphed(states(i)), y)]
    assert max(errors) < 1e-2, errors
    assert len(REPLAYS) - before >= 6 + 3, len(REPLAYS) - before
    print(f"{name}: checked, worst {max(errors):.2g}, approximation {apart(eager(x), exact(x)):.2g}, "
          f"first call with the option {first:.1f} s, {time.perf_counter() - T0:.0f} s so far", flush=True)
    calls = {"exact, eager": exact, "rewritten, eager": eager, "rewritten, cuda_graphs=True": option,
             "rewritten, make_graphed_callables": graphed, "exact, make_graphed_callables": exact_graphed}
    rows += [(name, label, ms(call, x)) for label, call in calls.items()]
    compiles += [(name, causal, options)]
for name, causal, options in reversed(compiles):
    for label, make in {
        "rewritten, backend with cuda_graphs=True": lambda m: torch.compile(
            m, backend=express, dynamic=False, options={**options, "cuda_graphs": True}),
        "exact, torch.compile reduce-overhead": lambda m: torch.compile(m, mode="reduce-overhead", dynamic=False),
    }.items():
        if time.perf_counter() - T0 > 38:
            print("left out for time:", name, label)
            continue
        call, x, before = make(build(causal)), states(0), len(REPLAYS)
        took = ms(call, x)
        assert len(REPLAYS) - before > 40, "replayed"
        if "rewritten" in label:
            assert apart(call(x), build(causal, **options)(x)) < 5e-2
        rows.append((name, label, took))
print(f"{torch.__version__}, {torch.cuda.get_device_name()}, {time.perf_counter() - T0:.0f} s")
for name, label, took in rows:
    base = next(t for n, l, t in rows if n == name and l == "exact, eager")
    print(f"{name:22} {label:42} {took:7.2f} ms {base / took:5.2f}x")
