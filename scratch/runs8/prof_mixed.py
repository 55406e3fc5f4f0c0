"""Kernels of plans of layers: microseconds of each per layer."""
import sys
sys.path.insert(0, "examples/bench")
from collections import defaultdict
import torch
import benchmark as b
from benchmark import *
n, (H, H_kv) = int(sys.argv[1]), (32, 8)
tensors = random_tensors(1, H, H_kv, n, n, 128, "cuda", torch.bfloat16)
def kernels(call, count):
    for _ in range(3): call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(3): call()
        torch.cuda.synchronize()
    t, c = defaultdict(float), defaultdict(int)
    for e in p.events():
        if e.device_type == torch.autograd.DeviceType.CUDA: t[e.name] += e.time_range.elapsed_us() / 3 / count; c[e.name] += 1
    print(f"   all {sum(t.values()):.0f} us, {sum(c.values())/3/count:.1f} launches a layer")
    for k in sorted(t, key=t.get, reverse=True)[:14]: print(f"   {t[k]:8.1f} us {c[k]/3/count:5.1f}x {k[:70]}")
for path in sys.argv[2:]:
    layers = layers_of(SavedPlan.load(path), H, H_kv)
    rows = round(mean_rows(layers, n))
    for name, its in {"plan": layers, "last=0": [replace(x, last=0) for x in layers], "Express": [equal_rows(rows, n, True)], "window": [equal_rows(rows, n, False)]}.items():
        ops = [op_of(Policy(methods=(own,)), "cuda", method="heads") for own in its]
        def call():
            for op in ops: op(*tensors)
        print(path.split("/")[-1], n, name, rows, flush=True)
        kernels(call, len(ops))
    for i, own in enumerate(layers):
        op = op_of(Policy(methods=(own,)), "cuda", method="heads")
        from collections import Counter
        print("layer", i, "; ".join(f"{c} x {r}" for r, c in Counter(map(str, own.rows)).items()), "rows", round(mean_rows([own], n)))
        kernels(lambda: op(*tensors), 1)
