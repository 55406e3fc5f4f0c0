"""Plans per query head: each head against the call in which all have its rows, then the time at equal mean rows."""
import os, sys, time
sys.path.insert(0, ".")
import torch
from express_compile.core.method import METHODS
from express_compile.core.rows import Rows, to_numbers

ON = torch.cuda.is_available()
DEV, DT = ("cuda", torch.bfloat16) if ON else ("cpu", torch.float32)
sel = lambda b: Rows(32, 256, selected=b)
W, K, PL, X = Rows(32, 256), Rows(32, 256, 128, 256), Rows(32, 256, protected=256), Rows(everything=True)


def tokens(n, H, H_kv, D, B=1):
    g = torch.Generator(DEV).manual_seed(n)
    q, k, v = (torch.randn(B, h, n, D, generator=g, device=DEV) for h in (H, H_kv, H_kv))
    return (2 * q).to(DT), k.to(DT), v.to(DT)


def op(q, k, v, rows, last=0):
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return METHODS["heads"].op(q, k, v, None, seed, q.shape[3] ** -0.5, 3, rows=to_numbers(rows), halving="balanced",
                               inflation=-1, flatten=0.0, block=128, min_length=0, last=last)


def clock(run, seconds=1.0):
    if not ON:
        t = time.perf_counter(); run(); return 1e3 * (time.perf_counter() - t)
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 10 or (time.perf_counter() < end and len(found) < 200):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); run(); b.record(); b.synchronize()
        found.append(a.elapsed_time(b))
    return sorted(found)[len(found) // 2]


def check():
    n = 6000 if ON else 1500
    for H, H_kv, D in ((32, 8, 128), (9, 3, 64), (14, 2, 64)):
        q, k, v = tokens(n, H, H_kv, D, B=2)
        kinds = [sel(4), W, K, X, sel(8), PL, sel(16), sel(4), X, K, K]
        rows = [kinds[i * 7 % len(kinds)] for i in range(H)]
        rows[1] = rows[0]
        worst = 0.0
        out, lse = op(q, k, v, rows, last=16)
        for own in set(rows):
            every, every_lse = op(q, k, v, [own], last=16)
            for h in (h for h, x in enumerate(rows) if x == own):
                worst = max(worst, float((out[:, h] - every[:, h]).float().norm() / every[:, h].float().norm()))
                assert torch.allclose(lse[:, h], every_lse[:, h], rtol=1e-4, atol=1e-4), (H, h, own)
        print(f"check {H}/{H_kv} D={D}: largest relative difference {worst:.1e}", flush=True)
        assert worst < 2e-3


check()
lines = []
for H, H_kv, D, lengths in ((32, 8, 128, (16384, 32768, 131072)), (9, 3, 64, (8192,)), (14, 2, 64, (16384, 32768))):
    G = H // H_kv
    counts = ([2, 4, 8, 16, 28, 38, 16] if G == 7 else [4, 8, 36] if G == 3 else [4, 8, 16, 36])[:G]
    mean = sum(counts) // G
    plans = {
        f"blocks {mean}, KV heads": [sel(mean)],
        f"blocks {counts}, query heads": [sel(x) for x in counts] * H_kv,
        f"blocks {counts[:H_kv]}.. , KV heads": [sel(counts[i % G]) for i in range(H_kv)],
        "window, blocks, KV heads": [W if i % 2 else sel(2 * mean) for i in range(H_kv)],
        "window, blocks, query heads": [(W if i % 2 else sel(2 * mean)) for i in range(H)],
        "coreset in one of each group": [*([sel(mean)] * (G - 1)), K] * H_kv,
    }
    for n in lengths if ON else (1024,):
        q, k, v = tokens(n, H, H_kv, D)
        times = {}
        for _ in range(2 if ON else 1):  # in turn; the second one counts
            for name, rows in plans.items():
                times[name] = clock(lambda: op(q, k, v, rows), 0.7)
        first = next(iter(times.values()))
        lines += [f"{H}/{H_kv} {n:>7} {name:<46} {ms:9.3f} ms {ms / first:6.2f}" for name, ms in times.items()]
if ON:
    print(torch.cuda.get_device_name(), torch.__version__)
print(*lines, sep="\n")
if "OUT" in os.environ:
    open(os.path.join(os.environ["OUT"], "queryheads.txt"), "w").write("\n".join(lines))
