"""Where the host's time goes in steps of an ExpressCache of a plan, and what its first token waits for. Run from the
repository root: PYTHONPATH=. python .gpu/planned/host.py [--shapes 1x32768] [--steps 300] [--methods planned cache]"""
import argparse, collections, statistics, sys, time
sys.path.insert(0, "examples/bench")
import torch, triton
import decoding as D
from express_compile import ExpressCache, restore_attention, rewrite_attention
from express_compile.kernels import held as H, launch as L
from express_compile.routes.transformers import layers as Y

parser = argparse.ArgumentParser()
parser.add_argument("--shapes", nargs="+", default=["1x32768"])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--methods", nargs="+", default=["planned", "cache"])
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
GPU = torch.cuda.is_available()
wait = torch.cuda.synchronize if GPU else lambda: None
now = time.perf_counter
PHASE, COMPILED, TABLES = ["start"], [], collections.Counter()
SPENT, CALLS = collections.Counter(), collections.Counter()


def timed(owner, name, label):
    f = getattr(owner, name)

    def run(*x, **y):
        t = now()
        try:
            return f(*x, **y)
        finally:
            SPENT[label] += 1e3 * (now() - t)
            CALLS[label] += 1
    setattr(owner, name, run)


warm_up = triton.JITFunction.warmup


def counted(self, *x, **y):
    t = now()
    out = warm_up(self, *x, **y)
    COMPILED.append((PHASE[0], self.fn.__name__, now() - t))
    return out


triton.JITFunction.warmup = counted
copied = L._copied


def table(*x):
    TABLES[PHASE[0]] += 1
    t = now()
    out = copied(*x)
    SPENT["tables"] += 1e3 * (now() - t)
    return out


L._copied = table
for name, label in dict(settle_recorded="settle", look_ahead_recorded="behind", end_recorded="end").items():
    timed(Y.ExpressLayer, name, label)
for name in ("warm_up", "thin_prompt"):
    timed(H.HeldRows, name, name)
timed(H.Held, "fill", "fill")
for name in ("catch_up", "_leave"):
    timed(H.HeldRows, name, name)
device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
with torch.no_grad():
    model = D.random_llama(device, dtype, D.TINY if args.tiny else D.LLAMA)
plans = {"planned": D.planned_rows(model), "cache": {p: [D.UNIFORM] for p in D.planned_rows(model)}}


def said(phase):
    mine = [(name, s) for p, name, s in COMPILED if p == phase]
    by = collections.Counter(name for name, _ in mine)
    return f"{len(mine)} compiled in {sum(s for _, s in mine):.2f} s {dict(by)}; {TABLES[phase]} tables"


out = []
for shape in args.shapes:
    B, n = map(int, shape.split("x"))
    for method in args.methods:
        rewrite_attention(model, methods=["exact"])
        cache = None
        for length, again in ((min(n, D.WARM), 0), (n, 0), (n - min(640, n // 4), 0), (n, 1)):
            cache = None
            SPENT.clear(), CALLS.clear()
            PHASE[0] = f"{method} {shape} prompt {length}" + " again" * again
            cache = ExpressCache(model, rows=plans[method], graphs=True)
            t = D.prompted(model, B, length, cache)
            wait()
            out.append(f"{PHASE[0]}: ttft {t:.3f} s; fill {SPENT['fill']:.0f} ms of which thin_prompt {SPENT['thin_prompt']:.0f}, "
                       f"warm_up {SPENT['warm_up']:.0f}; tables {SPENT['tables']:.0f} ms; {said(PHASE[0])}")
            print(out[-1], flush=True)
        ids, position = torch.full((B, 1), 5, device=device), torch.full((B, 1), n, device=device)
        rows = []
        for i in range(args.steps + 3):
            PHASE[0] = f"{method} {shape} " + ("first steps" if i < 3 else "steps")
            SPENT.clear(), CALLS.clear()
            wait()
            t = now()
            with torch.no_grad():
                cache.steps(model, dict(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True))
            host = now() - t
            wait()
            position.add_(1)
            rows.append((1e3 * (now() - t), 1e3 * host, dict(SPENT), dict(CALLS), i))
        out.append(f"{method} {shape} first steps {[round(r[0]) for r in rows[:3]]} ms; {said(f'{method} {shape} first steps')}")
        replay = []
        for _ in range(30 if cache.steps.replay else 0):
            wait()
            t = now()
            cache.steps.replay()
            wait()
            replay.append(1e3 * (now() - t))
        rows = rows[3:]
        q = lambda x: "mean %.2f p20 %.2f p50 %.2f p80 %.2f p99 %.2f max %.2f" % (
            statistics.mean(x), *(sorted(x)[min(len(x) - 1, int(f * len(x)))] for f in (0.2, 0.5, 0.8, 0.99)), max(x))
        if replay:
            out.append(f"  replay alone p50 {statistics.median(replay):.2f} ms")
        out.append(f"  step ms      {q([r[0] for r in rows])}")
        out.append(f"  host ms      {q([r[1] for r in rows])}")
        for label in ("settle", "behind", "end", "_leave", "catch_up"):
            out.append(f"  {label:9s} ms {q([r[2].get(label, 0) for r in rows])}; calls a step {q([r[3].get(label, 0) for r in rows])}")
        out.append(f"  in steps: {said(f'{method} {shape} steps')}")
        for r in sorted(rows, reverse=True, key=lambda r: r[0])[:5]:
            out.append(f"  slow: step {r[4]} {r[0]:.2f} ms, host {r[1]:.2f}, " + ", ".join(f"{k} {v:.2f} ({r[3].get(k, 0)})" for k, v in r[2].items()))
        restore_attention(model)
        cache = None
        if GPU:
            torch.cuda.empty_cache()
print("\n".join(out))
