"""Host and device time of ops whose launches were merged. python go.py FOLDER-OF-A-TREE; run it on main and on
h/host3: the digests of both must be equal, as no arithmetic changed."""
import hashlib, statistics, sys, time
tree = sys.argv[1]; sys.path.insert(0, tree)
import torch
import express_compile
from express_compile import METHODS, AttentionSpec, Mask, Policy, Rows, Site
from express_compile.core.call import Call
from express_compile.kernels import heads as HP, op as O, prepared as P
from express_compile.kernels.attend.segments import Sources, dense_table, segment_attention
from express_compile.kernels.exact import exact_attention
from express_compile.kernels.select import contest as C

assert express_compile.__file__.startswith(__import__("os").path.abspath(tree)), express_compile.__file__
H, HK, D, dt = 32, 8, 128, torch.bfloat16
CHOSEN, EVERY, KEPT, CORE = Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 128, 256), Rows(32, 256, 128)
MIX = (CHOSEN, EVERY, KEPT, CORE) * 2
CASES = {
    "express": ("express", dict(budget=256, sinks=32, recent=256, protected=0)),
    "express, protected": ("express", dict(budget=256, sinks=32, recent=256, protected=256)),
    "windows alone": ("heads", dict(rows=[Rows(32, 256)] * 8)),
    "thinformer": ("thinformer", dict(budget=256)),
    "heads, four kinds": ("heads", dict(rows=MIX)),
    "heads, last 64": ("heads", dict(rows=MIX, last=64)),
    "heads, two coresets": ("heads", dict(rows=(KEPT, CORE, CORE, KEPT) * 2)),
    "heads, three coresets": ("heads", dict(rows=(KEPT, CORE, Rows(32, 256, 512), Rows(32, 256)) * 2)),
}


def call_of(case, N, seed=5, options=None):
    name, given = CASES[case]
    torch.manual_seed(0)
    x = [torch.randn(1, N, h, D, device="cuda", dtype=dt).transpose(1, 2) for h in (H, HK, HK)]
    mask = Mask() if name == "thinformer" else Mask(causal=True, offset=0)
    spec = AttentionSpec(1, H, HK, N, N, D, D, dt, "cuda", 0.1, mask)
    params = METHODS[name].params(Site(spec, "layers.3"), Policy(methods=(name,), min_length=0, method_options={name: options or given}))
    return METHODS[name].op, (*x, None, torch.tensor(seed, device="cuda"), 0.1, 3), params


def host(f, calls, rounds=40):
    out = []
    for _ in range(5):
        f()
    for _ in range(rounds):
        torch.cuda.synchronize()
        a = time.perf_counter()
        for _ in range(calls):
            f()
        out.append((time.perf_counter() - a) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(out), min(out)


def device(f, replays=20, rounds=9):
    """Microseconds of a call, by replays of a CUDA graph of one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        f()
    for _ in range(3):
        graph.replay()
    out = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(replays):
            graph.replay()
        b.record(); b.synchronize()
        out.append(a.elapsed_time(b) / replays * 1e3)
    return statistics.median(out)


def digest(out):
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).cpu().numpy().tobytes() for x in out)).hexdigest()[:10]


lines = []
with torch.no_grad():
    # 1. contests against their reference, 40 times; mixtures against heads that are all alike; code against bodies
    k = torch.randn(2, 4, 9000, D, device="cuda", dtype=torch.float32).round()
    for contests, protected in ((1, 256), (2, 100), (14, 256), (33, 300)):
        want = C.compete_reference(k, 32, contests, protected)
        for _ in range(10):
            got = C.compete(k, 32, contests, protected)
            both = (got[0], want[0]), (got[1].sort().values, want[1].sort().values)
            same = [float((a == b).float().mean()) for a, b in both if len(a.flatten())]
            assert min(same) > 0.98, (contests, protected, same)  # scores round otherwise where rows are near equal
    for N in (4096, 6000):
        op, args, params = call_of("heads, three coresets", N)
        got = op(*args, **params)[0]
        for i, rows in enumerate((KEPT, CORE, Rows(32, 256, 512), Rows(32, 256))):
            own = call_of("heads, three coresets", N, options=dict(rows=[rows] * 8))
            alike = own[0](*own[1], **own[2])[0]
            off = max(float((got[:, j : j + 4] - alike[:, j : j + 4]).abs().max()) for j in (4 * i, 16 + 4 * i))
            assert off < 0.02, (N, rows, off)
            if rows.thinned:
                other = own[0](*call_of("heads, three coresets", N, seed=6)[1], **own[2])[0]
                assert float((other - alike).abs().max()) > 0.02, "another seed keeps other rows"
    # what is kept beside others and alone, and again and again (on a tree that thins parts in one set of launches)
    alone = getattr(HP.Thinned, "halves", None)
    for halving in ("balanced", "kernel", "uniform") if alone is not None else ():
        own = HP.PerHead((Rows(32, 256, protected=256), KEPT, CORE, Rows(32, 256, 512)) * 2, block=128, halving=halving)
        for N in (4096, 6000, 32768):
            q, k, v = (torch.randn(1, h, N, D, device="cuda", dtype=dt) for h in (H, HK, HK))
            what, call = HP._together(own, 1, H // HK, HK, N, N, False), Call(q, k, v, None, torch.tensor(5, device="cuda"), 0.1, 3)

            def kept():
                index = torch.zeros(what.indexed, dtype=torch.int32, device="cuda")
                copies = tuple(torch.zeros(what.copied, D, device="cuda", dtype=dt) for _ in range(2))
                HP._thin(call, what.thinned, index, copies)
                return index, *copies

            beside = kept()
            for _ in range(20):
                assert all(map(torch.equal, beside, kept())), (halving, N, "changes from call to call")
            HP.Thinned.halves = False
            share = float((beside[0] == kept()[0]).float().mean())
            HP.Thinned.halves = alone
            lines.append(f"parts beside each other and alone, {halving}, {N}: {share:.6f} of the index the same")
            print(lines[-1], flush=True)
            assert share > 0.98, (halving, N, share)
    for case in CASES:
        P.forget()
        op, args, params = call_of(case, 4096)
        P.ENABLED = False
        want = op(*args, **params)
        P.ENABLED = True
        for _ in range(60):
            got = op(*args, **params)
            assert all(map(torch.equal, got, want)), case
    print("checked", flush=True)
    # 2. host
    for case in CASES:
        op, args, params = call_of(case, 4096)
        f = lambda: op(*args, **params)
        ten, one = host(f, 10), host(f, 1, 150)
        lines.append(f"host us  {case:22s} ten in a row {ten[0]:6.1f}/{ten[1]:6.1f}  one {one[0]:6.1f}/{one[1]:6.1f}  digest {digest(f())}")
        print(lines[-1], flush=True)
    # 3. device
    for case in CASES:
        times = []
        for N in (4096, 32768, 131072):
            op, args, params = call_of(case, N)
            times.append(f"{device(lambda: op(*args, **params), *(20, 9) if N < 99999 else (5, 5)):9.1f}")
            del args; torch.cuda.empty_cache()
        lines.append(f"device us {case:22s} 4k, 32k, 128k {' '.join(times)}")
        print(lines[-1], flush=True)
    # 4. Thinformer's attention: cuDNN and a copy against our kernel over s keys that lie side by side
    for N in (4096, 32768):
        for s in (256, 1024):
            for turned in (True, False):
                q = torch.randn(1, N, H, D, device="cuda", dtype=dt).transpose(1, 2)
                q = q if turned else q.contiguous()
                k, v = (torch.randn(1, HK, s, D, device="cuda", dtype=dt) for _ in range(2))
                table = dense_table(N, s)
                ways = lambda: exact_attention(q, k, v, 0.1, causal=False), lambda: segment_attention(q, Sources.compacted(k, v), table, 0.1)
                off = float((ways[0]()[0] - ways[1]()[0]).abs().max())
                assert off < 0.02, off
                lines.append(f"dense {N} queries {'[B,L,H,D]' if turned else '[B,H,L,D]'} {s} keys: cuDNN {device(ways[0]):7.1f}, ours {device(ways[1]):7.1f} us on the device; {off:.1e} apart")
print("\n".join([f"== {tree}", *lines]))
