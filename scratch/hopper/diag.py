"""python .gpu/hopper/diag.py [--dry]: which part of the persistent kernel dies, and how fast the ones are that do not.

Every variant in a process of its own, all at once, with a limit. head: h/hopper as it was; uniform: stage and phase are
carried, not computed from a count, so that every wait has its address in uniform registers; plain: results stored by
threads instead of by TMA; both: plain and uniform; regs: 64 registers for the warps that read; single: head, one job for
each program. Then bits as old's, and TFLOP/s, of old and of those that lived (one at a time on the GPU, by a lock).
"""
import fcntl, hashlib, json, os, struct, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DRY = "--dry" in sys.argv
OUT = Path(os.environ.get("OUT", "/tmp"))
VARIANTS = ("head", "uniform", "plain", "both", "regs", "single", "old")


def load(variant):
    sys.path.insert(0, str(HERE)); argv, sys.argv = sys.argv, ["check.py"] + (["--dry"] if DRY else [])
    import check
    sys.argv = argv
    return (check, *check.setup("old" if variant == "old" else "new"))


def part_lives(variant):
    check, torch, hopper, S = load(variant)
    if variant == "single": hopper._processors = lambda _: 1 << 20
    done = []
    def step(name, n, H, H_kv, D=128, times=1, past=0, s=None, window=0, indexed=False):
        try:
            q, src, table = check.problem(torch, S, n, past, s, window, D, D, indexed, 1, H, H_kv)
            if DRY: return done.append(name)
            run = lambda: S.segment_attention_triton(q, src, table, D**-0.5)[0]
            assert hopper.takes(q, src.key, src.value, 128)
            for _ in range(times): out = run()
            torch.cuda.synchronize()
            if s is None: other = torch.nn.functional.scaled_dot_product_attention(q, src.key, src.value, is_causal=True, enable_gqa=True)
            else:
                takes, hopper.takes = hopper.takes, lambda *_: False
                other = run(); hopper.takes = takes
            off = ((out - other).norm() / other.norm()).item()
            done.append(f"{name} {off:.0e}" + ("" if off < 4e-3 else " WRONG"))
        except Exception as e:
            done.append(f"{name} DIES: {type(e).__name__} {str(e).strip().splitlines()[0][:90] if str(e) else ''}"); report(); os._exit(1)
    def report(): sys.stdout.write(f"{variant:8s} " + "; ".join(done) + "\n"); sys.stdout.flush()
    step("4 jobs", 100, 4, 1); step("128", 2048, 8, 2); step("256", 2048, 16, 4); step("576", 9100, 8, 2)
    step("2048", 8192, 32, 8); step("x60", 8192, 32, 8, times=60)
    step("D=64", 8192, 32, 8, D=64, times=30)
    step("rows", 4000, 8, 2, past=232, s=64, window=200, times=20); step("index", 4000, 8, 2, past=200, s=64, window=200, indexed=True, times=20)
    report(); os._exit(0 if not any("WRONG" in x for x in done) else 2)


def part_core(variant):
    check, torch, hopper, S = load(variant)
    if DRY: return
    q, src, table = check.problem(torch, S, 8192, 0, None, 0, 128, 128, False, 1, 32, 8)
    for _ in range(200): S.segment_attention_triton(q, src, table, 128**-0.5)
    torch.cuda.synchronize(); print("core: it did not die")


def part_speed(variant):
    check, torch, hopper, S = load(variant)
    lock = open("/tmp/hopper_gpu.lock", "w")
    bits, problems, rows = {}, [], {}
    for name, args in (("causal", (4000, 0, None, 0, 128, 128, False)), ("copied", (4000, 232, 64, 200, 128, 128, False)),
                       ("indexed", (4000, 200, 64, 200, 128, 128, True))):
        q, src, table = check.problem(torch, S, *args)
        if not DRY: bits[name] = [hashlib.sha256(x.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:8]
                                  for x in S.segment_attention_triton(q, src, table, 128**-0.5)]
    for name, n, s, window, protected in (("causal 32k", 32768, None, 0, 0), ("512/32 32k", 32768, 512, 32, 0),
                                          ("512/32 128k", 131072, 512, 32, 0), ("256+256/256 32k", 32768, 256, 256, 256)):
        if DRY: n //= 32
        q, src, table = check.problem(torch, S, n, 0, s, window, 128, 128, False, 1, 32, 8, protected=protected)
        q = q.contiguous(); src = src._replace(key=src.key.contiguous(), value=src.value.contiguous())
        problems.append((name, lambda q=q, src=src, table=table: S.segment_attention_triton(q, src, table, 128**-0.5), 512.0 * 32 * float(table.rows_seen(n).sum())))
        if not DRY: problems[-1][1](); torch.cuda.synchronize()
    if not DRY:
        from triton.testing import do_bench
        for name, run, flops in problems:
            ms = []
            for _ in range(2):
                fcntl.flock(lock, fcntl.LOCK_EX); ms.append(do_bench(run, warmup=15, rep=60, return_mode="median")); fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.05)
            rows[name] = round(flops / min(ms) / 1e9)
    Path(f"/tmp/diag_{variant}.json").write_text(json.dumps([bits, rows]))


def child(part, variant, limit):
    tree = "head" if variant == "single" else variant
    env = {**os.environ, "PYTHONPATH": str(HERE / tree), "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": f"/tmp/cache_{tree}"}
    if part == "lives": env["CUDA_LAUNCH_BLOCKING"] = "1"
    if part == "core":
        env.update(CUDA_LAUNCH_BLOCKING="1", CUDA_ENABLE_COREDUMP_ON_EXCEPTION="1", CUDA_COREDUMP_FILE=str(OUT / "core"), CUDA_COREDUMP_GENERATION_FLAGS=
            "skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory,skip_constbank_memory,skip_abort")
    args = ["timeout", "-s", "KILL", str(400 if DRY else limit), sys.executable, str(Path(__file__).resolve()), "--part", part, variant, *(["--dry"] if DRY else [])]
    return variant, subprocess.Popen(args, env=env, cwd="/tmp", stderr=open(f"/tmp/diag_{part}_{variant}.err", "w"))


def wait(part, children):
    codes = {v: p.wait() for v, p in children}
    for v, code in codes.items():
        err = Path(f"/tmp/diag_{part}_{v}.err").read_text().strip().splitlines()
        if code not in (0, 1, 2) or code == 1 and part == "speed" or code == 1 and err and "Error" in err[-1]:
            print(f"{part} {v}: exit {code} {err[-1][:160] if err else ''}", flush=True)
    return [v for v, code in codes.items() if code == 0]


def core(path):
    """The warps of a core dump that have an error: place, lanes that are there, lanes that were active."""
    x = path.read_bytes()
    shoff, = struct.unpack_from("<Q", x, 40); size, count, names = struct.unpack_from("<HHH", x, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", x, shoff + i * size) for i in range(count)]
    base = heads[names][4]
    name = lambda h: x[base + h[0] : x.index(b"\0", base + h[0])].decode()
    seen = set()
    print("core:", len(x) >> 10, "KiB;", "kinds:", sorted({name(h).split(".dev")[0] for h in heads})[:14], flush=True)
    for h in heads:
        if "wptbl" in name(h) and h[9]:
            for at in range(h[4], h[4] + h[5], h[9]):
                pc, warp, valid, active, broken, known = struct.unpack_from("<QIIIII", x, at)
                if known and (pc, active) not in seen and len(seen) < 6:
                    seen.add((pc, active)); print(f"  error at {pc:#x} warp {warp} valid {valid:08x} active {active:08x} broken {broken} {name(h)}", flush=True)


def main():
    start = time.time()
    alive = wait("lives", [child("lives", v, 45) for v in VARIANTS])
    dead = [v for v in VARIANTS if v not in alive]
    alive = [v for v in alive if v in ("old", "uniform", "both", "plain", "head")]
    print(f"[{time.time() - start:.0f} s] live: {alive}", flush=True)
    wait("speed", [child("speed", v, 40) for v in alive])
    if DRY: return
    found = {v: json.loads(Path(f"/tmp/diag_{v}.json").read_text()) for v in alive if Path(f"/tmp/diag_{v}.json").exists()}
    for v, (bits, _) in found.items():
        if "old" in found: print(v, "bits as old:", {k: bits[k] == b for k, b in found["old"][0].items()}, flush=True)
    print("TFLOP/s", "D=128, H=32, H_kv=8")
    for v, (_, rows) in found.items(): print(f"{v:8s}", rows, flush=True)
    print(f"[{time.time() - start:.0f} s]", flush=True)
    if not dead: return
    victim = "head" if "head" in dead else dead[0]
    p = child("core", victim, 20)[1]; p.wait()
    for path in OUT.glob("core*"):
        try: core(path)
        except Exception as e: print("core:", repr(e)[:100])
        if path.stat().st_size > 15 << 20: path.unlink()


if __name__ == "__main__":
    if "--part" in sys.argv:
        i = sys.argv.index("--part")
        globals()["part_" + sys.argv[i + 1]](sys.argv[i + 2])
    else:
        main()
