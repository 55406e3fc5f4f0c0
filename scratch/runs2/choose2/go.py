"""go.py warm VARIANT | check | time: choosing blocks, main's kernels against variants. From the folder of the new tree."""
import importlib.util, json, math, os, sys, time
from pathlib import Path
import torch
root = Path.cwd(); here = root.parent
sys.path.insert(0, str(root))
from express_compile.kernels.select import blocks as S
assert Path(S.__file__).resolve().is_relative_to(root), S.__file__
hopper = S.hopper
def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path); m = importlib.util.module_from_spec(spec)
    sys.modules[name] = m; spec.loader.exec_module(m); return m
M = module("express_compile.kernels.select.main_blocks", here / "main_blocks.py")
class no: takes, ROWS = staticmethod(lambda q, k: False), hopper.ROWS
VARIANTS = {"main": None, "triton": no, "g4": hopper}
for p in sorted((here / "variants").glob("*.py")):
    if p.stem != "g4": VARIANTS[p.stem] = module(f"express_compile.kernels.select.v_{p.stem}", p)
if len(sys.argv) > 2: VARIANTS = {x: VARIANTS[x] for x in sys.argv[2:]}
def use(v):
    S.hopper = VARIANTS[v] or hopper
    return M if v == "main" else S
def tensors(n, Lq, H, H_kv, D, B, dtype, seed=0, by_token=False):
    g = torch.Generator("cuda").manual_seed(seed)
    q, k = (torch.randn(B, m, h, D, generator=g, device="cuda", dtype=dtype) if by_token else
            torch.randn(B, h, m, D, generator=g, device="cuda", dtype=dtype) for h, m in ((H, Lq), (H_kv, n)))
    return (q.transpose(1, 2), k.transpose(1, 2)) if by_token else (q, k)
def choosers(heads, blocks, held): return S.Choosers(*(torch.tensor(x, dtype=torch.int32, device="cuda") for x in (heads, blocks, held)))
def worst(chosen, q, k, config, start):
    """How much mass a block has that was left behind, beyond one that was taken; in float64."""
    layout = S.query_blocks(config, q.shape[2], k.shape[2])
    mass = S.block_mass(q.double(), k.double(), config, q.shape[3] ** -0.5, start)
    count = torch.from_numpy(layout.candidates).cuda(); C = mass.shape[3]
    taken = torch.arange(config.blocks, device="cuda") < count.clamp(max=config.blocks)[:, None]
    assert (chosen == S.NONE).eq(~taken).all() and ((chosen < count[:, None]) & (chosen >= 0) | ~taken).all()
    assert ((chosen.diff() > 0) | ~taken[:, 1:]).all()
    held = torch.zeros(*mass.shape[:3], C + 1, dtype=torch.bool, device="cuda")
    held = held.scatter_(3, chosen.long().where(taken, C), True)[..., :-1]
    other = torch.arange(C, device="cuda") < count[:, None]
    return float((mass.masked_fill(held | ~other, -math.inf).amax(-1) - mass.masked_fill(~held, math.inf).amin(-1)).max())
def check():
    bf, C = torch.bfloat16, S.BlockConfig
    cases = [(4000, 4000, 8, 2, 128, 2, bf, C(16), 0), (4000, 2666, 8, 2, 128, 2, bf, C(5, sinks=70, recent=33, samples=3, stride=40, block=32), 1),
             (4000, 1, 8, 2, 128, 2, bf, C(3, samples=4), 0), (5000, 5000, 14, 2, 64, 1, torch.float16, C(8), 1), (6000, 6000, 6, 6, 128, 1, bf, C(8, sinks=64), 0),
             (9000, 9000, 12, 4, 64, 1, bf, C(128, recent=512), 0), (4000, 4000, 6, 2, 80, 1, bf, C(4), 0)]
    for v in VARIANTS:
        T, said = use(v), []
        for n, Lq, H, Hk, D, B, dtype, config, by_token in cases if v in ("g4", "triton") else cases[:2]:
            q, k = tensors(n, Lq, H, Hk, D, B, dtype, by_token=by_token); q = 2 * q
            if n == 6000: k[0, 1] = 1.0  # all equal: the first ones
            for start in (None, torch.tensor([n - Lq, n - Lq + min(150, Lq - 1)], device="cuda")) if B == 2 else (None,):
                first = T.select_blocks_triton(q, k, config, D**-0.5, start)
                for _ in range(3): assert torch.equal(first, T.select_blocks_triton(q, k, config, D**-0.5, start)), "bits change"
                said.append(worst(first, q, k, config, start))
                if n == 6000: assert torch.equal(first[0, 1, -1], torch.arange(8, device="cuda", dtype=torch.int32)), first[0, 1, -1]
                if B == 2: assert torch.equal(first[1:], T.select_blocks_triton(q[1:], k[1:], config, D**-0.5, None if start is None else start[1:])), "batch"
                if B == 2:  # few heads, other counts and windows
                    few = T.select_blocks_triton(q, k, config, D**-0.5, start, choosers([1], [2], [config.sinks + config.recent]))
                    assert torch.equal(few[:, 0, :, :1].lt(0), first[:, 1, :, :1].lt(0)) and (few[..., 2:] == -1).all()
                    one = S.BlockConfig(2, config.sinks, config.recent, config.samples, config.stride, config.block)
                    assert torch.equal(few[..., :2], T.select_blocks_triton(q[:, 4:], k[:, 1:], one, D**-0.5, start)), "few heads"
        q, k = tensors(8000, 8000, 8, 2, 128, 1, bf)
        expected = T.select_blocks_triton(q, k, C(16), 0.1); torch.cuda.synchronize(); torch.cuda.set_sync_debug_mode("error")
        T.select_blocks_triton(q, k, C(16), 0.1)
        torch.cuda.set_sync_debug_mode("default"); torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): again = T.select_blocks_triton(q, k, C(16), 0.1)
        again.zero_(); graph.replay(); torch.cuda.synchronize()
        assert torch.equal(again, expected), "graph"
        print(f"{v:12} ok, mass left behind at most {max(said):.1e} (up to 1e-4 is rounding)", flush=True)
def calls(n, count):
    q, k = tensors(n, n, 32, 8, 128, 1, torch.bfloat16)
    who = choosers(list(range(count)), [16] * count, [288] * count)
    return lambda T: T.select_blocks_triton(q, k, S.BlockConfig(16), 128**-0.5, None, who)
LENGTHS = [int(x) for x in os.environ.get("LENGTHS", "32768 131072 524288").split()]
def warm():
    for v in VARIANTS:
        for n in LENGTHS:
            for warps in (256, 512) if v == "g4" else (256,):
                S._PER_WARP = warps
                for count in (2, 4, 8): calls(n, count)(use(v))
    torch.cuda.synchronize()
def median(f, k=7):
    f(); f(); times = []
    for _ in range(k):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); f(); b.record(); torch.cuda.synchronize(); times.append(a.elapsed_time(b))
    return sorted(times)[k // 2]
def timing():
    from torch.profiler import ProfilerActivity, profile
    rows = []
    for n in LENGTHS:
        for count in (2, 4, 8):
            run = calls(n, count); flop = 2 * 128 * (n // 128) * 4 * count * n / 2
            like = {v: run(use(v)) for v in VARIANTS if v[:2] != 'x_'} if n == 131072 and count == 4 else {}
            if like: print("at 131,072 tokens blocks unlike main's:", {v: f"{float((x != like['main']).float().mean()):.1e}" for v, x in like.items()})
            for v in VARIANTS:
                T = use(v)
                if v.startswith("x_") and (n, count) != (131072, 4): continue  # without the maximum, without exponentials
                for warps in ((256, 512) if v == "g4" else (256,)):
                    S._PER_WARP = warps
                    ms = median(lambda: run(T), 7 if n < 200000 else 3)
                    with profile(activities=[ProfilerActivity.CUDA]) as p:
                        run(T); torch.cuda.synchronize()
                    us, number = {"score": 0.0, "choose": 0.0}, 0
                    for e in p.events():
                        kind = "score" if "score_kernel" in e.name else "choose" if "_choose_kernel" in e.name else None
                        if kind: us[kind] += e.device_time; number += 1
                    rows.append(dict(n=n, heads=count, variant=v + ("" if warps == 256 else f" {warps}"), ms=ms, launches=number, **us, tflops=flop / max(us["score"], 1e-9) / 1e6))
                S._PER_WARP = 256
    (Path(os.environ["OUT"]) / "choose.json").write_text(json.dumps(rows))
    print(f"{'n':>7} heads {'variant':14} {'ms':>8} {'score us':>9} {'choose us':>9} {'TFLOP/s':>8} launches")
    for r in rows: print(f"{r['n']:7} {r['heads']:5} {r['variant']:14} {r['ms']:8.3f} {r['score']:9.1f} {r['choose']:9.1f} {r['tflops']:8.0f} {r['launches']:4}")
for what in sys.argv[1].split("+"): {"warm": warm, "check": check, "time": timing}[what]()
