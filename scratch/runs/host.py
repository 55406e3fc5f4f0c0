"""Host time of calls as bodies and as code, and GPU time of the two kernels that copy, beside what they replaced."""
import statistics, sys, time
import torch
from express_compile import METHODS, AttentionSpec, Mask, Policy, Rows, Site
from express_compile.kernels import heads as P, prepared
from express_compile.kernels.attend import patterns as K
from express_compile.kernels.express import of_heads
from express_compile.kernels.sparse import Pattern

H, HK, D = 32, 8, 128
dev = sys.argv[1] if len(sys.argv) > 1 else "cuda"
dt = torch.bfloat16
MIX = (Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 128, 256), Rows(32, 256, 128)) * 2
CASES = {
    "express": ("express", dict(budget=256, sinks=32, recent=256, protected=0)),
    "express, protected": ("express", dict(budget=256, sinks=32, recent=256, protected=256)),
    "heads, four kinds": ("heads", dict(rows=MIX)),
    "heads, last 64": ("heads", dict(rows=MIX, last=64)),
    "windows alone": ("heads", dict(rows=[Rows(32, 256)] * 8)),
    "thinformer": ("thinformer", dict(budget=256)),
    "sparse, fixed": ("sparse", dict(pattern="fixed")),
    "sparse, strided": ("sparse", dict(pattern="strided")),
}


def qkv(n):
    torch.manual_seed(n)
    return [torch.randn(1, n, h, D, device=dev, dtype=dt).transpose(1, 2) for h in (H, HK, HK)]


def op(case, x):
    name, options = CASES[case]
    n = x[0].shape[2]
    spec = AttentionSpec(1, H, HK, n, n, D, D, dt, dev, 0.1, Mask() if name == "thinformer" else Mask(causal=True))
    params = METHODS[name].params(Site(spec, "layers.3"), Policy(methods=(name,), min_length=0, method_options={name: options}))
    seed = torch.tensor(5, device=dev)
    return lambda: METHODS[name].op(*x, None, seed, 0.1, 3, **params)


def sync():
    if dev == "cuda":
        torch.cuda.synchronize()


def host(f):
    for _ in range(5):
        f()
    out = []
    for _ in range(20):
        sync()
        t = time.perf_counter()
        for _ in range(10):
            f()
        out.append((time.perf_counter() - t) / 10 * 1e6)
    sync()
    return statistics.median(out)


def gpu(f, calls=20):
    for _ in range(3):
        f()
    out = []
    for _ in range(calls):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        a.record(), f(), b.record()
        sync()
        out.append(a.elapsed_time(b) * 1e3)
    return statistics.median(out)


def old_compact(self, x):
    period = self.pattern.stride
    blocks = max(1, (self.Lk - 1) // period) if self.pattern.parts == "merged" else -(-self.Lk // period)
    if blocks * period > self.Lk:
        x = torch.nn.functional.pad(x, (0, 0, 0, blocks * period - self.Lk))
    return torch.stack([c.flatten(2, 3) for c in self._columns(x, blocks)], 2).flatten(1, 2)


def old_into(outputs, results, own, n):
    for target, x in zip(outputs, results):
        target.unflatten(1, (HK, -1)).index_copy_(1, own, x.unflatten(1, (n, -1)))


with torch.no_grad():
    lines = []
    for n in (4000, 32768, 131072) if dev == "cuda" else (300,):
        x = qkv(n)
        for groups, c in ((1, 8), (2, 8)):
            p = K._Problem(*x, Pattern("fixed", 128, c, groups), 0.1)
            for new, y in zip(p.copies, x[1:]):
                assert torch.equal(new, old_compact(p, y))
        own = torch.tensor([1, 5], device=dev, dtype=torch.int32)
        few = [y.new_empty(1, y.shape[1] // 4, n, D) for y in x]
        P._copy_heads(x, few, own, into=False)
        assert all(torch.equal(a, of_heads(y, HK, own)) for a, y in zip(few, x))
        results, outs = (few[0], torch.randn(1, 8, n, device=dev)), [[torch.zeros(1, H, n, D, device=dev, dtype=dt), torch.zeros(1, H, n, device=dev)] for _ in range(2)]
        P._copy_heads(results, outs[0], own, into=True), old_into(outs[1], results, own.long(), 2)
        assert all(map(torch.equal, *outs))
        if dev == "cuda":
            long = own.long()
            lines.append(f"{n:7d} GPU us: columns {gpu(p._compact):7.1f}, before {gpu(lambda: [old_compact(p, y) for y in x[1:]]):7.1f};  "
                f"gather {gpu(lambda: P._copy_heads(x, few, own, into=False)):7.1f}, before {gpu(lambda: [of_heads(y, HK, long) for y in x]):7.1f};  "
                f"into {gpu(lambda: P._copy_heads(results, outs[0], own, into=True)):7.1f}, before {gpu(lambda: old_into(outs[1], results, long, 2)):7.1f}")
    print("copies are equal to what they replaced")
    x = qkv(4096 if dev == "cuda" else 300)
    for case in CASES if dev == "cuda" else ("sparse, fixed",):
        f = op(case, x)
        prepared.ENABLED = False
        body, want = host(f), f()
        prepared.ENABLED = True
        code, got = host(f), f()
        same = all(torch.equal(a, b) for a, b in zip(got, want))
        lines.append(f"{case:20s} host us: body {body:7.0f}  code {code:7.0f}  bits {'equal' if same else 'DIFFER'}")
    q, k, v = x
    lines.append(f"SDPA                 host us: {host(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)):7.0f}")
    print("\n".join(lines))
