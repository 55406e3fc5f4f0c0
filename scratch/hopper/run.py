"""python .gpu/hopper/run.py [--dry]: which persistent kernels for Hopper run and are right, then how fast they are.

Every variant is a process of its own with a limit: it checks itself against the plain Triton kernel at 2,048 to 131,072
tokens, says so, and waits until it is its turn to be timed, alone on the GPU. died, uni: the trees that lie in the
history, with waits by lane and with uniform waits, both with results stored by TMA; checked, not timed."""
import csv, fcntl, functools, json, os, shutil, subprocess, sys, tarfile, time
from pathlib import Path

HERE, DRY = Path(__file__).resolve().parent, "--dry" in sys.argv
OUT, WORK = Path(os.environ.get("OUT", "/tmp/hx_out")), Path("/tmp/hx")
LIMIT_CHECK, LIMIT_TIME, LIMIT_ALL = 75, 9, 118
NEW = dict  # environment of the experiment's tree
VARIANTS = {
    "cudnn": ("main", {}), "plain": ("main", {}), "today": ("main", {}),
    "died": ("died", {}), "uni": ("uni", {}),
    "today3": ("main", {"X_MAIN_STAGES": "3"}),   # three stages
    "gather": ("main_g", {}),                      # today's, indices of a tile asked for at once
    "one": ("new", NEW(X_JOBS="1")),               # one job a program, most rows first, heads of a group in turn
    "one+slot": ("new", NEW(X_JOBS="1", X_SLOTS="1")),
    "one+slot3": ("new", NEW(X_JOBS="1", X_SLOTS="1", X_STAGES="3")),
    "pair+slot": ("new", NEW(X_JOBS="2", X_SLOTS="1")),
    "stay": ("new", NEW()), "stay3": ("new", NEW(X_STAGES="3")),
    "stay+slot": ("new", NEW(X_SLOTS="1")), "stay+slot3": ("new", NEW(X_SLOTS="1", X_STAGES="3")),
    "stay+slot3+turns": ("new", NEW(X_SLOTS="1", X_STAGES="3", X_TURNS="1")),
    "stay+slot, 2 q": ("new", NEW(X_SLOTS="1", X_SIDES="2")),
    "carry": ("new", NEW(X_CARRY="1")), "carry+slot": ("new", NEW(X_CARRY="1", X_SLOTS="1")),
}
KINDS = {"causal": (None, 0, 0), "512/32": (512, 32, 0), "256+256/256": (256, 256, 256)}
TIMED = [("causal", 8192), ("causal", 32768), ("causal", 131072), ("512/32", 8192), ("512/32", 32768), ("512/32", 131072),
         ("256+256/256", 32768), ("256+256/256", 131072)]
TIMES = {2048: 20, 8192: 60, 32768: 8, 131072: 2}
H, H_KV, D = 32, 8, 128


@functools.cache
def layout_of(E, kind, n):
    s, window, protected = KINDS[kind]
    return E.make_layout(E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, block=128, protected=protected), n, n)


def problem(torch, S, E, kind, n):
    dev = "cpu" if DRY else "cuda"
    s, window, protected = KINDS[kind]
    g = torch.Generator(dev).manual_seed(n)
    q, k, v = (torch.randn(1, h, n, D, generator=g, device=dev, dtype=torch.bfloat16) for h in (H, H_KV, H_KV))
    if s is None:
        return q, S.Sources.tokens(k, v), S.causal_table(n, n)
    layout = layout_of(E, kind, n)
    source, first, length = (layout.table.segments[..., i] for i in range(3))
    A = int((source * (first + length)).max())
    index = torch.randint(n, (1, H_KV, A), generator=g, device=dev, dtype=torch.int32)
    at = index.long()[..., None].expand(-1, -1, -1, D)
    ck, cv = k.gather(2, at), v.gather(2, at)
    if protected:  # read by index, as the op does
        A = layout.copied
        return q, S.Sources(k, v, ck[:, :, :A].contiguous(), cv[:, :, :A].contiguous(), index), layout.table
    return q, S.Sources(k, v, ck, cv), layout.table


def child(name):
    import torch
    from express_compile.kernels import express as E
    from express_compile.kernels.attend import hopper, segments as S
    if os.environ.get("X_MAIN_STAGES"):
        of = S.SegmentTiles.of.__func__
        S.SegmentTiles.of = classmethod(lambda cls, *a, **b: (lambda t: t._replace(stages=3) if t.hopper else t)(of(cls, *a, **b)))
    if name == "plain":
        hopper.takes = lambda *_: False
    old = name in ("died", "uni")
    log = open(WORK / f"{name}.log", "w", buffering=1)
    say = lambda *x: log.write(json.dumps(x) + "\n")
    def sample(out): return out[0, :, ::13].clone()
    def call(q, src, table):
        if name == "cudnn":
            from torch.nn.attention import SDPBackend, sdpa_kernel
            k, v = (x.repeat_interleave(H // H_KV, 1) for x in (src.key, src.value))
            def run():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), None
            return run
        return lambda: S.segment_attention_triton(q, src, table, D**-0.5)
    big = open(WORK / f"big{sum(map(ord, name)) % 4}", "w")
    kinds = ["causal"] if name == "cudnn" else list(KINDS)
    sound = True
    for n in (2048, 8192, 32768, 131072) if not DRY else (2048, 4096):
        for kind in kinds:
            if n == 131072 and (old or kind == "causal" and name not in ("cudnn", "stay", "carry")): continue
            if n == 131072:  # not all of them at once in memory
                fcntl.flock(big, fcntl.LOCK_EX)
            q, src, table = problem(torch, S, E, kind, n)
            if DRY:
                table.tiles_on(q.device, 128, n, n, src.compacted_key.shape[2], src.indexed); say("ok", kind, n, 0.0, True); continue
            if name not in ("cudnn", "plain"): assert hopper.takes(q, src.key, src.value, 128)
            run = call(q, src, table)
            out, lse = run()
            first = sample(out)
            if name not in ("cudnn", "plain"):
                for _ in range(1 if kind == "causal" and n == 131072 else TIMES[n]): out, lse = run()
            torch.cuda.synchronize()
            path = WORK / f"ref_{kind.replace('/', '_')}_{n}.pt"
            if name == "plain":
                torch.save((sample(out).cpu(), lse.cpu()), str(path) + ".part"); os.rename(str(path) + ".part", path)
                say("ok", kind, n, 0.0, True)
            elif n == 131072 and kind == "causal": say("ran", kind, n, 0.0, bool(torch.equal(first, sample(out))))
            else:
                while not path.exists(): time.sleep(0.05)
                ref, ref_lse = torch.load(path)
                ref = ref.cuda()
                off = ((sample(out) - ref).float().norm() / ref.float().norm()).item()
                off_lse = 0.0 if lse is None else (lse - ref_lse.cuda()).abs().max().item()
                right = name == "cudnn" or off < 4e-3 and off_lse < 1e-3 and bool(out.isfinite().all())
                sound &= right
                say("ok" if right else "WRONG", kind, n, off, bool(torch.equal(first, sample(out))), off_lse)
            del q, src, out, lse, first, run
            torch.cuda.empty_cache()
            if n == 131072: fcntl.flock(big, fcntl.LOCK_UN)
    (WORK / f"{name}.ready").write_text(str(sound))
    if old or not sound: return
    while not (WORK / f"{name}.go").exists(): time.sleep(0.02)
    result = {}
    for kind, n in TIMED:
        if DRY or kind not in kinds or (kind, n) == ("causal", 131072) and name not in ("cudnn", "today", "stay", "carry"): continue
        from triton.testing import do_bench
        q, src, table = problem(torch, S, E, kind, n)
        run = call(q, src, table)
        run(); torch.cuda.synchronize()
        if n == 131072 and kind == "causal":
            ms = min(do_bench_once(torch, run) for _ in range(3))
        else:
            ms = min(do_bench(run, warmup=10, rep=45, return_mode="median") for _ in range(2))
        result[f"{kind} {n}"] = (ms, 4.0 * D * H * float(table.rows_seen(n).sum()) / ms / 1e9)
        (WORK / f"{name}.json").write_text(json.dumps(result))
        del q, src, run
    (WORK / f"{name}.done").write_text("")


def do_bench_once(torch, run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(); run(); end.record(); torch.cuda.synchronize()
    return start.elapsed_time(end)


def main():
    start = time.time()
    clock = lambda: time.time() - start
    shutil.rmtree(WORK, ignore_errors=True); WORK.mkdir(); OUT.mkdir(exist_ok=True, parents=True)
    for tree in {t for t, _ in VARIANTS.values()}:
        tarfile.open(HERE / f"{tree}.tar.gz").extractall(WORK / tree)
    procs = {}
    for name, (tree, env) in VARIANTS.items():
        env = {**os.environ, **env, "PYTHONPATH": str(WORK / tree), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
               "TRITON_CACHE_DIR": f"{WORK}/cache_{tree}_{name}".replace(" ", "").replace(",", "")}
        procs[name] = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--child", name, *(["--dry"] if DRY else [])],
                                       env=env, cwd=WORK, stderr=open(WORK / f"{name}.err", "w"), stdout=subprocess.DEVNULL)
    limit = LIMIT_CHECK * (6 if DRY else 1)
    ready = lambda v: (WORK / f"{v}.ready").exists()
    seen = {v: (0, 0.0) for v in procs}
    while clock() < limit and any(p.poll() is None and not ready(v) for v, p in procs.items()):
        for v, p in procs.items():  # one that hangs takes its share of the GPU from the others
            size = (WORK / f"{v}.log").stat().st_size if (WORK / f"{v}.log").exists() else 0
            if size != seen[v][0]: seen[v] = size, clock()
            elif size and clock() - seen[v][1] > 22 and p.poll() is None and not ready(v) and not DRY and (WORK / "plain.ready").exists():
                p.kill()
        time.sleep(0.1)
    for v, p in procs.items():
        if p.poll() is None and not ready(v): p.kill()  # this one alone
    print(f"[{clock():.0f} s] checks are over; errors against the plain kernel, worst of each kind", flush=True)
    for v, p in procs.items():
        rows = [json.loads(x) for x in (WORK / f"{v}.log").read_text().splitlines()] if (WORK / f"{v}.log").exists() else []
        wrong = [x for x in rows if x[0] == "WRONG"]; unsteady = [x[1:3] for x in rows if not x[4]]
        err = (WORK / f"{v}.err").read_text().strip().splitlines()
        said = next((x for x in reversed(err) if "rror" in x), err[-1] if err else "")[:110]
        worst = max((x[3] for x in rows), default=0)
        where = f"after {rows[-1][1:3]}" if rows else "at once"
        state = "sound" if ready(v) and not wrong else f"WRONG {[x[1:4] for x in wrong]}" if wrong else f"DIED {where}: {said}" if p.poll() not in (None, -9) else f"NOT READY {where}"
        print(f"{v:18s} {len(rows):2d} calls, worst {worst:.1e}, {'same bits each time' if not unsteady else f'BITS CHANGE {unsteady}'}: {state}", flush=True)
    for v, p in procs.items():
        if p.poll() is not None or not ready(v) or v in ("died", "uni") or (WORK / f"{v}.ready").read_text() != "True": continue
        if clock() > LIMIT_ALL * (6 if DRY else 1): print("no time for", v); p.kill(); continue
        (WORK / f"{v}.go").write_text("")
        end = time.time() + LIMIT_TIME
        while p.poll() is None and time.time() < end: time.sleep(0.02)
        if p.poll() is None: print("too slow, or hangs:", v, flush=True); p.kill()
    print(f"[{clock():.0f} s] TFLOP/s, bfloat16, D=128, 32 heads over 8")
    names = [f"{k} {n}" for k, n in TIMED]
    print(f"{'':18s}", *(f"{x:>12s}" for x in (f"{k[:7]} {n // 1024}k" for k, n in TIMED)))
    with open(OUT / "hopper.csv", "w", newline="") as file:
        table = csv.writer(file); table.writerow(["variant", "call", "ms", "tflops"])
        for v in VARIANTS:
            path = WORK / f"{v}.json"
            if not path.exists(): continue
            rows = json.loads(path.read_text())
            for x, (ms, tf) in rows.items(): table.writerow([v, x, f"{ms:.4f}", f"{tf:.1f}"])
            print(f"{v:18s}", *(f"{rows[x][1]:12.0f}" if x in rows else f"{'':12s}" for x in names), flush=True)
    (OUT / "errors.txt").write_text("\n".join(f"== {v}\n{(WORK / f'{v}.err').read_text()[-1500:]}" for v in VARIANTS))
    for p in procs.values():
        if p.poll() is None: p.kill()
    print(f"[{clock():.0f} s]")


if __name__ == "__main__":
    child(sys.argv[sys.argv.index("--child") + 1]) if "--child" in sys.argv else main()
