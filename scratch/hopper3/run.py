"""python .gpu/hopper/run.py [--dry]: variants of the persistent kernel for Hopper: right, same bits as main, how fast.

Every variant is a process of its own with a limit: it checks itself against the plain Triton kernel (files of the
process "plain") at 2,048 to 131,072 tokens and for heads of many kinds, says so, and waits for its two turns of timing,
alone on the GPU. Switches and predictions: NOTES.md."""
import csv, fcntl, functools, hashlib, json, os, shutil, subprocess, sys, tarfile, time
from pathlib import Path

HERE, DRY = Path(__file__).resolve().parent, "--dry" in sys.argv
OUT, WORK = Path(os.environ.get("OUT", "/tmp/hx_out")), Path("/tmp/hx")
LIMIT_CHECK, LIMIT_TURN, LIMIT_ALL = 68, 6, 98
def new(names, **more): return "new", {f"X_{n}": "1" for n in names.split()} | more
VARIANTS = {
    "cudnn": ("main", {}), "plain": ("main", {}), "main": ("main", {}),
    "fence": new("FENCE"), "rows": new("ROWS"), "ahead": new("AHEAD"), "rotate": new("ROTATE"),
    "f+ro+rot": new("FENCE ROWS ROTATE"), "all": new("FENCE ROWS ROTATE AHEAD"),
    "all3": new("FENCE ROWS ROTATE AHEAD", X_STAGES="3"),
}
if os.environ.get("HX_ONLY"): VARIANTS = {v: VARIANTS[v] for v in os.environ["HX_ONLY"].split(",")}
# thinned rows, window, protected rows, whether these are copied before too
KINDS = {"causal": (None, 0, 0, 0), "512/32": (512, 32, 0, 0), "256+256/256": (256, 256, 256, 0), "copied": (256, 256, 256, 1)}
TIMED = [("causal", 32768), ("512/32", 32768), ("512/32", 131072), ("256+256/256", 32768), ("256+256/256", 131072), ("copied", 32768)]
TIMES = {2048: 20, 8192: 40, 32768: 6, 131072: 2}
CASES = [("causal", 2048), ("512/32", 2048), ("256+256/256", 2048), ("mixed", 0), ("mixed", 1), ("causal", 8192), ("512/32", 8192),
         ("256+256/256", 8192), ("copied", 8192), ("causal", 32768), ("512/32", 32768), ("256+256/256", 32768), ("512/32", 131072), ("256+256/256", 131072)]
H, H_KV, D = 32, 8, 128


@functools.cache
def layout_of(E, kind, n):
    s, window, protected, _ = KINDS[kind]
    return E.make_layout(E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, block=128, protected=protected), n, n)


def problem(torch, S, E, kind, n, B=1):
    dev = "cpu" if DRY else "cuda"
    s, window, protected, copied = KINDS[kind]
    g = torch.Generator(dev).manual_seed(n)
    q, k, v = (torch.randn(B, n, h, D, generator=g, device=dev, dtype=torch.bfloat16).transpose(1, 2) for h in (H, H_KV, H_KV))
    if B == 1: q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if s is None:
        return q, S.Sources.tokens(k, v), S.causal_table(n, n)
    layout = layout_of(E, kind, n)
    source, first, length = (layout.table.segments[..., i] for i in range(3))
    A = int((source * (first + length)).max())
    index = torch.randint(n, (B, H_KV, A), generator=g, device=dev, dtype=torch.int32)
    at = index.long()[..., None].expand(-1, -1, -1, D)
    ck, cv = k.gather(2, at), v.gather(2, at)
    if protected and not copied:  # read by index, as the op does
        A = layout.copied
        return q, S.Sources(k, v, ck[:, :, :A].contiguous(), cv[:, :, :A].contiguous(), index), layout.table
    return q, S.Sources(k, v, ck, cv), layout.table


def mixed(torch, np, which):
    """A launch for heads of many kinds: windows, copies, rows by index, chosen blocks, all rows."""
    from express_compile.core.rows import Rows
    from express_compile.kernels import heads as P
    from express_compile.kernels.attend.mixed import Buffers, Outputs, mixed_attention_triton
    dev = "cpu" if DRY else "cuda"
    W, C, K = Rows(32, 256), Rows(32, 256, 64), Rows(32, 256, 128, 256)
    PL, BL, WH = Rows(32, 256, protected=256), Rows(32, 256, selected=16), Rows(everything=True)
    rows, B, G, Lq, Lk = (([BL, W, WH, K, BL, PL, WH, C], 2, 2, 8192, 8192),
                          ([W, BL, Rows(70, 33, selected=3), PL, Rows(32, 256, selected=7), K, Rows(32, 512), BL], 2, 4, 700, 2200))[which]
    h_kv, rng = 8, np.random.default_rng(which)
    g = torch.Generator(dev).manual_seed(which)
    what = P._together(P.PerHead(tuple(rows)), B, G, h_kv, Lq, Lk)
    make = lambda *shape: torch.randn(*shape, generator=g, device=dev, dtype=torch.bfloat16)
    q = make(B, Lk, h_kv * G, D).transpose(1, 2)[:, :, Lk - Lq:]
    k, v = make(B, Lk, h_kv, D).transpose(1, 2), make(B, Lk, h_kv, D).transpose(1, 2)
    copies = (make(what.copied, D), make(what.copied, D)) if what.copied else None
    index = torch.randint(Lk, (what.indexed,), generator=g, device=dev, dtype=torch.int32) if what.indexed else None
    chosen = np.full(max([0] + [c.place.first + (len(s.heads) - 1) * c.place.head + (B - 1) * c.place.sequence + len(c.count) * c.width
                               for s in what.mixture.shares if (c := s.chosen) is not None]), -1, np.int32)
    for share in what.mixture.shares:
        if (c := share.chosen) is None: continue
        for i in range(len(share.heads)):
            for b in range(B):
                base = c.place.first + i * c.place.head + b * c.place.sequence
                for block, count in enumerate(c.count):
                    there = max(0, (int(share.table.tail[block]) - c.first) // 64)
                    if count: chosen[base + block * c.width:][:count] = np.sort(rng.choice(there, count, replace=False))
    out = Outputs(torch.zeros(B, h_kv * G, Lq, D, device=dev, dtype=torch.bfloat16), torch.zeros(B, h_kv * G, Lq, device=dev))
    buffers = Buffers(copies, index, torch.from_numpy(chosen).to(dev) if len(chosen) else None)
    def run():
        mixed_attention_triton(q, k, v, buffers, what.mixture, D**-0.5, out)
        return out.out.clone(), out.lse.clone()
    return run


def child(name):
    import numpy as np
    import torch
    from express_compile.kernels import express as E
    from express_compile.kernels.attend import hopper, segments as S
    if name == "plain": hopper.takes = lambda *_: False
    log = open(WORK / f"{name}.log", "w", buffering=1)
    def say(*x): log.write(json.dumps(x) + "\n")
    def sample(out): return out[:, :, ::13].contiguous()
    def call(q, src, table):
        if name == "cudnn":
            from torch.nn.attention import SDPBackend, sdpa_kernel
            k, v = (x.repeat_interleave(H // H_KV, 1) for x in (src.key, src.value))
            def run():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), None
            return run
        return lambda: S.segment_attention_triton(q, src, table, D**-0.5)
    big = open(WORK / f"big{sum(map(ord, name)) % 5}", "w")
    sound = True
    for kind, n in CASES:
        if name == "cudnn": break
        if DRY and n > 8192: continue
        if n == 131072: fcntl.flock(big, fcntl.LOCK_EX)  # not all of them at once in memory
        if kind == "mixed": run = mixed(torch, np, n)
        else:
            q, src, table = problem(torch, S, E, kind, n, {2048: 3, 8192: 2}.get(n, 1))
            run = call(q, src, table)
            if name != "plain" and not DRY: assert hopper.takes(q, src.key, src.value, 128)
        if DRY:
            if kind != "mixed": S.merged_lists(table, 128, src.compacted_key.shape[2])
            say("ok", kind, n, 0.0, True, 0.0, ""); continue
        out, lse = run()
        first, bits = sample(out), ""
        for _ in range(0 if name == "plain" else TIMES.get(n, 20)): out, lse = run()
        torch.cuda.synchronize()
        last = sample(out)
        same = bool(torch.equal(first, last))
        path = WORK / f"ref_{kind.replace('/', '_')}_{n}.pt"
        if name == "plain":
            torch.save((last.cpu(), lse.cpu()), str(path) + ".part"); os.rename(str(path) + ".part", path)
            say("ok", kind, n, 0.0, same, 0.0, "")
        else:
            bits = hashlib.sha256(last.view(torch.int16).cpu().numpy().tobytes() + lse.cpu().numpy().tobytes()).hexdigest()[:12]
            while not path.exists(): time.sleep(0.05)
            ref, ref_lse = torch.load(path)
            ref = ref.cuda()
            off = ((last - ref).float().norm() / ref.float().norm()).item()
            off_lse = (lse - ref_lse.cuda()).abs().max().item()
            right = off < 4e-3 and off_lse < 1e-3 and bool(out.isfinite().all()) and same
            sound &= right
            say("ok" if right else "WRONG", kind, n, off, same, off_lse, bits)
        q = src = out = lse = first = last = run = None
        torch.cuda.empty_cache()
        if n == 131072: fcntl.flock(big, fcntl.LOCK_UN)
    (WORK / f"{name}.ready").write_text(str(sound))
    if not sound: return
    for turn in range(2):
        while not (WORK / f"{name}.go{turn}").exists(): time.sleep(0.01)
        result = {}
        for kind, n in TIMED:
            if DRY or name == "cudnn" and kind != "causal" or name == "plain" and (n > 32768 or turn): continue
            from triton.testing import do_bench
            q, src, table = problem(torch, S, E, kind, n)
            run = call(q, src, table)
            run(); torch.cuda.synchronize()
            ms = do_bench(run, warmup=10, rep=60, return_mode="median")
            result[f"{kind} {n}"] = (ms, 4.0 * D * H * float(table.rows_seen(n).sum()) / ms / 1e9)
            (WORK / f"{name}.{turn}.json").write_text(json.dumps(result))
            q = src = run = None
        torch.cuda.empty_cache()
        (WORK / f"{name}.done{turn}").write_text("")


def main():
    start = time.time()
    clock = lambda: time.time() - start
    shutil.rmtree(WORK, ignore_errors=True); WORK.mkdir(); OUT.mkdir(exist_ok=True, parents=True)
    for tree in {t for t, _ in VARIANTS.values()}:
        tarfile.open(HERE / f"{tree}.tar.gz").extractall(WORK / tree)
    procs, scale = {}, 8 if DRY else 1
    for name, (tree, env) in VARIANTS.items():
        env = {**os.environ, **env, "PYTHONPATH": str(WORK / tree), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
               "TRITON_CACHE_DIR": f"{WORK}/cache_{name}"}
        procs[name] = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--child", name, *(["--dry"] if DRY else [])],
                                       env=env, cwd=WORK, stderr=open(WORK / f"{name}.err", "w"), stdout=subprocess.DEVNULL)
    def there(v, what): return (WORK / f"{v}.{what}").exists()
    seen = {v: (0, 0.0) for v in procs}
    while clock() < LIMIT_CHECK * scale and any(p.poll() is None and not there(v, "ready") for v, p in procs.items()):
        for v, p in procs.items():  # one that hangs takes its share of the GPU from the others
            size = (WORK / f"{v}.log").stat().st_size if there(v, "log") else 0
            if size != seen[v][0]: seen[v] = size, clock()
            elif size and clock() - seen[v][1] > 22 and p.poll() is None and not there(v, "ready") and not DRY and there("plain", "ready"):
                p.kill()
        time.sleep(0.1)
    for v, p in procs.items():
        if p.poll() is None and not there(v, "ready"): p.kill()  # this one alone
    print(f"[{clock():.0f} s] checks are over; errors against the plain kernel, worst of each variant", flush=True)
    logs = {v: [json.loads(x) for x in (WORK / f"{v}.log").read_text().splitlines()] if there(v, "log") else [] for v in procs}
    bits_of_main = {(x[1], x[2]): x[6] for x in logs["main"]}
    for v, p in procs.items():
        rows = logs[v]
        wrong = [x for x in rows if x[0] == "WRONG"]
        other = [x[1:3] for x in rows if x[6] and x[6] != bits_of_main.get((x[1], x[2]))]
        err = (WORK / f"{v}.err").read_text().strip().splitlines()
        said = next((x for x in reversed(err) if "rror" in x), err[-1] if err else "")[:110]
        worst, worst_lse = max((x[3] for x in rows), default=0), max((x[5] for x in rows), default=0)
        where = f"after {rows[-1][1:3]}" if rows else "at once"
        state = f"WRONG {[x[1:6] for x in wrong]}" if wrong else "sound" if there(v, "ready") else f"DIED {where}: {said}" if p.poll() not in (None, -9) else f"NOT READY {where}"
        same = "" if v in ("cudnn", "plain", "main") else " bits of main" if not other else f" OTHER BITS than main {other}"
        print(f"{v:9s} {len(rows):2d} of {len(CASES)} cases, worst {worst:.1e}, lse {worst_lse:.0e},{same}: {state}", flush=True)
    for turn in range(2):
        for v, p in procs.items():
            if p.poll() is not None or not there(v, "ready") or v == "plain" and turn: continue
            if clock() > LIMIT_ALL * scale: print("no time for", v, turn); continue
            (WORK / f"{v}.go{turn}").write_text("")
            end = time.time() + LIMIT_TURN
            while p.poll() is None and not there(v, f"done{turn}") and time.time() < end: time.sleep(0.01)
            if p.poll() is None and not there(v, f"done{turn}"): print("too slow, or hangs:", v, flush=True); p.kill()
    print(f"[{clock():.0f} s] TFLOP/s of each turn, bfloat16, D=128, 32 heads over 8 (copied: 256+256/256, all rows side by side)")
    names = [f"{k} {n}" for k, n in TIMED]
    print(f"{'':9s}", *(f"{x:>13s}" for x in (f"{k[:8]} {n // 1024}k" for k, n in TIMED)))
    with open(OUT / "hopper.csv", "w", newline="") as file:
        table = csv.writer(file); table.writerow(["variant", "turn", "call", "ms", "tflops"])
        for v in VARIANTS:
            turns = [json.loads((WORK / f"{v}.{t}.json").read_text()) if there(v, f"{t}.json") else {} for t in range(2)]
            for t, rows in enumerate(turns):
                for x, (ms, tf) in rows.items(): table.writerow([v, t, x, f"{ms:.4f}", f"{tf:.1f}"])
            print(f"{v:9s}", *(f"{' '.join(f'{r[x][1]:.0f}' for r in turns if x in r):>13s}" for x in names), flush=True)
    (OUT / "errors.txt").write_text("\n".join(f"== {v}\n{(WORK / f'{v}.err').read_text()[-1500:]}\n{(WORK / f'{v}.log').read_text() if there(v, 'log') else ''}" for v in VARIANTS))
    for p in procs.values():
        if p.poll() is None: p.kill()
    print(f"[{clock():.0f} s]")


if __name__ == "__main__":
    child(sys.argv[sys.argv.index("--child") + 1]) if "--child" in sys.argv else main()
