"""prof.py NAME OUT.json, in the folder of a tree: steps of layers in one CUDA graph, checked, then us per layer and per kernel."""
import json, math, statistics, sys, time
from pathlib import Path
import torch
root = Path.cwd(); sys.path.insert(0, str(root))
from express_compile.core.rows import Rows
from express_compile.kernels import held as K
from express_compile.kernels.attend.decode import Rows as Read, decode_reference
from express_compile.kernels.heads import PerHead
from express_compile.kernels.launch import Random
from express_compile.kernels.select import pages as S
assert Path(K.__file__).resolve().is_relative_to(root), K.__file__
name, out, start = sys.argv[1], Path(sys.argv[2]), time.perf_counter()
DRY = not torch.cuda.is_available()
device, dtype, LAYERS, D, SCALE = ("cpu", torch.float32, 1, 16, 0.25) if DRY else ("cuda", torch.bfloat16, 8, 128, 128**-0.5)
SELECTED, UNIFORM = Rows(64, 256, selected=16), Rows(32, 256, 1024, 256)
cases = [("selected", SELECTED, 1, 131072), ("selected", SELECTED, 1, 32768), ("selected", SELECTED, 8, 32768),
         ("uniform", UNIFORM, 1, 8192), ("uniform", UNIFORM, 8, 8192)]
if DRY: cases = [("selected", SELECTED, 1, 3001), ("uniform", Rows(4, 20, 16, 16), 1, 300)]
found = {}
for kind, rows, B, n in cases:
    if time.perf_counter() - start > 40: print(name, kind, B, n, "skipped, no time left"); continue
    g = torch.Generator(device).manual_seed(n)
    def randn(h, m): return torch.randn(B, h, m, D, generator=g, device=device, dtype=dtype)
    q, k, v = 2 * randn(32, 1), randn(8, 1), randn(8, 1)
    end, layers = torch.empty(B, dtype=torch.int32, device=device), []
    for i in range(LAYERS):
        layers.append(K.Held(PerHead((rows,)), k, v, Random(torch.tensor(0, device=device), i), SCALE, i))
        layers[-1].fill(randn(8, n - 1), randn(8, n - 1)); layers[-1].settle(single=True); layers[-1].prepare_step(end)
    layers[0].count_into(end)
    def step(): return [(x.step_triton if DRY else x.launch_step)(q, k, v) for x in layers]
    outs, wrong, most = step(), [], 0.0
    for x, o in list(zip(layers, outs))[:: 7 if LAYERS > 1 else 1]:
        p = x.parts[0]
        if kind == "selected":
            own = S.means_reference(p.key[:, :, :n], torch.ones(B, n, dtype=torch.bool, device=device))
            means = p.means[:, :, : own.shape[2]]
            if not torch.allclose(means.float(), own.float(), rtol=1e-2, atol=1e-2): wrong.append("means")
            span = torch.zeros_like(end), end
            wanted = S.choose_reference(q, means, SCALE, span, 16, 64, 256); mass = S.page_mass(q, means, SCALE, *span)
            for b in range(B):
                for h in range(8):
                    a, c = p.pages[b, h].tolist(), wanted[b, h].tolist()
                    lack = set(c) - set(a); most = max(most, len(lack))
                    if a != sorted(set(a)) or len(a) != len(c) or any(mass[b, h, y] < 0.97 * min(mass[b, h, z] for z in lack) for y in set(a) - set(c)): wrong.append(("pages", b, h))
            read = Read(lengths=end, pages=p.pages); held = p.key[:, :, :n], p.value[:, :, :n]
        else:
            read, held = Read(log_weight=p.log_weight), (p.key, p.value)
        truth = decode_reference(q.float(), *(y.float() for y in held), SCALE, read)[0]
        error = ((o.float() - truth).norm() / truth.norm()).item()
        if not error < 4e-3: wrong.append(("output", error))
    line = dict(error=error, unlike=most)
    if not DRY:
        side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side): step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): held_outs = step()
        first = None
        for i in range(300):  # the same bits every time
            graph.replay()
            if i % 3 == 0: torch.empty(1 << (10 + i % 17), device=device).fill_(math.nan)
            now = [y.clone() for x, o in zip(layers, held_outs) for y in (o, x.parts[0].pages)]
            first = first or now
            if not all(map(torch.equal, first, now)): wrong.append(f"bits at replay {i}"); break
        if not all(map(torch.equal, outs, first[::2])): wrong.append("replay unlike eager")
        times = []
        for _ in range(20):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(10): graph.replay()
            b.record(); b.synchronize(); times.append(a.elapsed_time(b) * 100 / LAYERS)
        line["step"] = round(statistics.median(times), 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(5): graph.replay()
            torch.cuda.synchronize()
        for e in prof.key_averages():
            t = getattr(e, "self_device_time_total", 0)
            if t: line[e.key[:24]] = round(t / 5 / LAYERS, 2)
        del graph, held_outs
    found[f"{kind} B{B} {n}"] = line
    print(name, kind, B, n, "WRONG " + str(wrong[:4]) if wrong else "right", {k: round(x, 5) for k, x in line.items()}, f"{time.perf_counter() - start:.0f} s", flush=True)
    del layers, outs
    if not DRY: torch.cuda.empty_cache()
out.write_text(json.dumps(found))
