"""python .gpu/hopper/check.py [--dry]: the persistent kernel for Hopper beside the one before it, bit for bit, and timed.

Every part runs in a process of its own with a limit, so that a deadlock costs a minute at most. ``new``: my branch;
``old``: main at 8493d72, whose Gluon kernel is made to take D = 64 as well; ``other``: the plain Triton kernel.
"""
import hashlib, json, math, os, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DRY = "--dry" in sys.argv
SIZES = [(128, 128), (64, 128), (128, 64), (64, 64)]


def setup(tree):
    import torch
    from express_compile.kernels.attend import hopper, segments
    own = segments.SegmentTiles.of.__func__
    if tree == "old":
        before = hopper.takes
        def takes(q, k, v, block):
            return before(q, k, v, block) or (q.is_cuda and q.element_size() == 2 and block == 128
                and {q.shape[3], v.shape[3]} == {64} and all(not any(s % 16 for s in x.stride()[:3]) for x in (k, v)))
        hopper.takes = takes
    return torch, hopper, segments


def problem(torch, S, n, past, s, window, D, Dv, indexed, B=2, H=8, H_kv=2, dtype=None, protected=0):
    import numpy as np
    from dataclasses import replace
    from express_compile.kernels import express as E
    dev = "cpu" if DRY else "cuda"
    g = torch.Generator(dev).manual_seed(0)
    dtype = dtype or torch.bfloat16
    q, k, v = (torch.randn(B, n, h, d, generator=g, device=dev).to(dtype).transpose(1, 2)
               for h, d in ((H, D), (H_kv, D), (H_kv, Dv)))
    q = q[:, :, past:]
    if s is None:
        return q, S.Sources.tokens(k, v), S.causal_table(n - past, n)
    config = E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, block=128, protected=protected)
    layout = E.make_layout(config, n - past, n)
    table = layout.table
    source, first, length = (table.segments[..., i] for i in range(3))
    A = int((source * (first + length)).max())
    index = torch.randint(n, (B, H_kv, A), generator=g, device=dev, dtype=torch.int32)
    ck, cv = E.gather_rows(k, index), E.gather_rows(v, index)
    if protected:  # read by index, as the op does
        A = layout.copied
        return q, S.Sources(k, v, ck[:, :, :A], cv[:, :, :A], index), table
    if not indexed:
        return q, S.Sources(k, v, ck, cv), table
    A -= A // 5
    crossing = (source == S.COMPACTED) & (first < A) & (first + length > A)
    segments = table.segments.copy()
    segments[..., 2] = np.where(crossing, A - first, length)
    return q, S.Sources(k, v, ck[:, :, :A], cv[:, :, :A], index), replace(table, segments=segments)


GROUPS = {"a": [(128, 128)], "b": [(64, 64)], "c": [(64, 128), (128, 64)], "f": [(128, 128)]}


def cases(torch, S, group):
    for dtype in [torch.float16 if group == "f" else torch.bfloat16]:
        for D, Dv in GROUPS.get(group, ()):
            for name, n, past, s, window, ix in (("causal", 400 if DRY else 4000, 0, None, 0, False), ("causal late", 3000, 2983, None, 0, False),
                    ("copied", 4000, 232, 64, 200, False), ("indexed", 4000, 200, 64, 200, True), ("long", 2000 if DRY else 20000, 64, 128, 32, True)):
                yield f"{name} {D} {Dv} {str(dtype)[6:]}", problem(torch, S, n, past, s, window, D, Dv, ix, dtype=dtype)


def mixtures(torch, group):
    if group not in "mn": return
    from express_compile.core.method import METHODS
    from express_compile.core.rows import Rows, to_numbers
    import express_compile.kernels.heads  # noqa: F401
    W, C, K = Rows(32, 256), Rows(32, 256, 64), Rows(32, 256, 128, 256)
    P, Bl, E = Rows(32, 256, protected=256), Rows(32, 256, selected=16), Rows(everything=True)
    for name, rows in (("mixed", [Bl, W, E, K, Bl, P, E, C]), ("few", [W, Bl, Rows(70, 33, selected=3), P, Bl, K, Rows(32, 512), Bl])):
        for D in (128 if group == "m" else 64,):
            for B, Lq in ((1, 6000), (2, 700)):
                g = torch.Generator("cuda").manual_seed(1)
                q, k, v = (torch.randn(B, h, 6000, D, generator=g, device="cuda").bfloat16() for h in (16, 8, 8))
                options = dict(halving="balanced", inflation=-1, flatten=0.0, block=128, min_length=0, rows=to_numbers(rows))
                seed = torch.zeros((), dtype=torch.int64, device="cuda")
                yield f"heads {name} {D} B={B} Lq={Lq}", lambda: METHODS["heads"].op(q[:, :, 6000 - Lq:], k, v, None, seed, D**-0.5, 3, **options)


def digest(x):
    import torch
    return hashlib.sha256(x.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:12]


def part_smoke(tree):
    torch, hopper, S = setup(tree)
    for n, H in ((100, 1), (300, 2), (1000, 16), (9000, 8)):
        q, src, table = problem(torch, S, n, 0, None, 0, 128, 128, False, B=1, H=H, H_kv=1)
        if DRY: continue
        assert hopper.takes(q, src.key, src.value, 128)
        out, lse = S.segment_attention_triton(q, src, table, 128**-0.5); torch.cuda.synchronize()
        truth, tl = S.segment_attention_reference(q.double(), S.Sources.tokens(src.key.double(), src.value.double()), table, 128**-0.5)
        print("smoke", n, H, "error", f"{((out - truth).norm() / truth.norm()).item():.1e} lse {(lse - tl).abs().max().item():.1e}", flush=True)


def part_digest(which):
    tree, group = which.split("-")
    torch, hopper, S = setup(tree)
    found = {}
    for name, (q, src, table) in cases(torch, S, group):
        if DRY: continue
        run = lambda: S.segment_attention_triton(q, src, table, q.shape[3] ** -0.5)
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))
        out, lse = run(); again = run()
        found[name] = [digest(out), digest(lse)]
        if digest(again[0]) != found[name][0] or digest(again[1]) != found[name][1]: print("NOT THE SAME TWICE", tree, name, flush=True)
        if tree == "merged":
            takes, hopper.takes = hopper.takes, lambda *_: False
            other = run(); hopper.takes = takes
            off = ((out - other[0]).norm() / other[0].norm()).item(), (lse - other[1]).abs().max().item()
            print(f"{name}: {off[0]:.1e}, lse {off[1]:.1e} from the other kernel", "OFF" if off[0] > 3e-3 or off[1] > 1e-4 else "", flush=True)
        if not (out.isfinite().all() and lse.isfinite().all()): print("NOT FINITE", tree, name, flush=True)
    if not DRY:
        for name, run in mixtures(torch, group): found[name] = [digest(x) for x in run()]
    if tree in ("new", "merged") and not DRY and group in "mn":  # lengths, and queries without rows
        for D in (128 if group == "m" else 64,):
            g = torch.Generator("cuda").manual_seed(0)
            q, k, v = (torch.randn(3, h, n, D, generator=g, device="cuda").bfloat16() for h, n in ((8, 700), (2, 1000), (2, 1000)))
            lengths = torch.tensor([0, 130, 1000], device="cuda")
            out, lse = S.segment_attention_triton(q, S.Sources.compacted(k, v, lengths), S.dense_table(700, 1000), D**-0.5)
            truth, tl = S.segment_attention_reference(q.double(), S.Sources.compacted(k.double(), v.double(), lengths), S.dense_table(700, 1000), D**-0.5)
            ok = (out[0] == 0).all().item() and (lse[0] == -math.inf).all().item()
            print(f"lengths D={D} error {((out - truth).norm() / truth.norm()).item():.1e} lse {(lse - tl)[1:].abs().max().item():.1e}, nothing seen is 0 and -inf: {ok}", flush=True)
    Path(f"/tmp/hopper_{which}.json").write_text(json.dumps(found))


def part_time(tree):
    torch, hopper, S = setup(tree)
    if DRY: return
    from triton.testing import do_bench
    H, H_kv = 32, 8
    rows = []
    def clock(run): return do_bench(run, warmup=15, rep=70, return_mode="median")
    own_of = S.SegmentTiles.of.__func__
    def stages(k): S.SegmentTiles.of = classmethod(lambda cls, *a: (lambda t: t._replace(stages=k) if t.hopper else t)(own_of(cls, *a)))
    for D in (128, 64):
        for n in (8192, 32768, 131072):
            for name, s, window, protected in (("causal", None, 0, 0), ("512/32", 512, 32, 0), ("256+256/256", 256, 256, 256)):
                if s is None and n > 32768: continue
                q, src, table = problem(torch, S, n, 0, s, window, D, D, False, 1, H, H_kv, protected=protected)
                q = q.contiguous(); src = src._replace(key=src.key.contiguous(), value=src.value.contiguous())
                flops = 4.0 * D * H * float(table.rows_seen(n).sum())
                run = lambda: S.segment_attention_triton(q, src, table, D**-0.5)
                ms = {}
                if tree == "old":
                    ms["old"] = clock(run)
                    takes, hopper.takes = hopper.takes, lambda *_: False
                    ms["other"] = clock(run); hopper.takes = takes
                    if s is None:
                        import torch.nn.functional as F
                        from torch.nn.attention import SDPBackend, sdpa_kernel
                        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                            kk, vv = (x.repeat_interleave(H // H_kv, 1) for x in (src.key, src.value))
                            ms["cudnn"] = clock(lambda: F.scaled_dot_product_attention(q, kk, vv, is_causal=True))
                elif tree != "new":
                    ms[tree] = clock(run)
                else:
                    ms["new"] = clock(run)
                    kept = hopper.CACHED
                    hopper.CACHED = 1; ms["one KV head at a time"] = clock(run)
                    hopper.CACHED = 1 << 50; ms["all heads in turn"] = clock(run); hopper.CACHED = kept
                    if D == 64:
                        stages(2); ms["2 stages"] = clock(run)
                        S.SegmentTiles.of = classmethod(own_of)
                    ms["new again"] = clock(run)
                rows.append((D, n, name, {k: (round(t, 3), round(flops / t / 1e9)) for k, t in ms.items()}))
                del q, src
    Path(f"/tmp/hopper_time_{tree}.json").write_text(json.dumps(rows))


def child(part, tree, limit):
    env = {**os.environ, "PYTHONPATH": str(HERE / tree.split("-")[0]), "PYTHONUNBUFFERED": "1"}
    args = [sys.executable, str(Path(__file__).resolve()), "--part", part, tree, *(["--dry"] if DRY else [])]
    return subprocess.Popen(["timeout", "-s", "KILL", str(limit), *args], env=env, cwd="/tmp"), part, tree, time.time()


def wait(*children):
    ok = True
    for p, part, tree, start in children:
        code = p.wait()
        print(f"[{part} {tree}: exit {code}, {time.time() - start:.0f}s]", flush=True)
        ok &= code == 0
    return ok


def read(name):
    try: return json.loads(Path(f"/tmp/hopper_{name}.json").read_text())
    except OSError: return None


def main():
    trees = ("new", "merged", "pp")
    smoke = {t: child("smoke", t, 60) for t in trees}
    sound = [t for t in trees if wait(smoke[t])]
    if not sound: sys.exit("the smallest calls fail or hang: nothing else is run")
    wait(*(child("digest", f"{t}-{g}", 100) for t in ("old", *sound) for g in "abcfmn" if (t in ("old", "new") or g in ("ab" if t == "pp" else "abcmn"))))
    for t, like in (("new", "old"), ("pp", "merged")):
        for g in "abcfmn":
            a, b = read(f"{t}-{g}"), read(f"{like}-{g}")
            if a is None or b is None:
                if t == "new" or g in "ab": print("MISSING", t, g)
                continue
            other = [k for k in b if a[k] != b[k]]
            print(f"{g}: {len(b) - len(other)} of {len(b)} of {t} bit for bit as {like}; others: {other}", flush=True)
    if DRY: return
    for t in ("old", *sound): wait(child("time", t, 70))
    table = {}
    for t in ("old", *sound):
        for D, n, name, x in read(f"time_{t}") or []: table.setdefault((D, n, name), {}).update(x)
    print("TFLOP/s (ms)")
    for (D, n, name), x in table.items():
        print(f"D={D} {n:6d} {name:12s}", ", ".join(f"{k} {t[1]} ({t[0]})" for k, t in x.items()), flush=True)


if __name__ == "__main__":
    if "--part" in sys.argv:
        i = sys.argv.index("--part")
        globals()["part_" + sys.argv[i + 1]](sys.argv[i + 2])
    else:
        main()
