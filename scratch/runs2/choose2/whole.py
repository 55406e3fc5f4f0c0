"""The op with the layers of a plan: whole.py NAME OUT.json lengths; from the folder of a tree."""
import json, statistics, sys
from pathlib import Path
from unittest import mock
import torch
root = Path.cwd()
sys.path[:0] = [str(root), str(root / "examples/bench")]
import numpy as np
import benchmark as bench
from express_compile.core.method import METHODS
from express_compile.core.plan import SavedPlan
from express_compile.core.rows import to_numbers
from express_compile.kernels import heads as P, prepared
from express_compile.kernels.attend.mixed import Mixture
assert Path(P.__file__).resolve().is_relative_to(root), P.__file__
name, out, lengths = sys.argv[1], Path(sys.argv[2]), [int(x) for x in sys.argv[3:]]
plan, seed = bench.layers_of(SavedPlan.load(root / "examples/plans/qwen2.5-coder-0.5b.json"), 8), torch.zeros((), dtype=torch.int64, device="cuda")
def run(own, q, k, v):
    given = dict(rows=to_numbers(own.rows), halving=own.halving, inflation=-1, flatten=0.0, block=128, last=own.last, min_length=0)
    return METHODS["heads"].op(q, k, v, None, seed, q.shape[3] ** -0.5, 3, **given)
warm = out.name == 'warm'
clock, found = bench.Clock("cuda"), {}
for n in lengths:
    q, k, v = bench.random_tensors(1, 32, 8, n, n, 128, "cuda", torch.bfloat16)
    def call(layers):
        for own in layers: run(own, q, k, v)
    if warm:
        call(plan); rows = round(sum(bench.rows_on_average(own, n) for own in plan) / len(plan)); call([bench.equal_rows(rows, n, True)])
        continue
    if n == lengths[0]:  # any order of jobs gives the same bits
        first, lists = run(plan[1], q, k, v)[0], Mixture.lists
        def mixed_up(self, of): jobs, *others = lists(self, of); return np.random.default_rng(0).permutation(jobs), *others
        P._together.cache_clear()
        with mock.patch.object(Mixture, "lists", mixed_up), mock.patch.object(prepared, "ENABLED", False): again = run(plan[1], q, k, v)[0]
        P._together.cache_clear()
        print(name, "jobs in any order:", "same bits" if torch.equal(first, again) else "OTHER BITS")
        del first, again
    few = 3 if n > 200000 else 7
    def ms(layers, patches=None):
        return round(statistics.median(clock(lambda: call(layers), few)) / len(layers), 4)
    t = found[n] = {"all": ms(plan), "each": [ms([own]) for own in plan]}
    attention = dict.fromkeys(("mixed_attention_triton", "_exact_heads", "attend_last"), bench.nothing)
    with mock.patch.multiple(P, **attention), mock.patch.object(prepared, "ENABLED", False): t["selection"] = ms(plan)
    rows = round(sum(bench.rows_on_average(own, n) for own in plan) / len(plan))
    t["uniform"] = ms([bench.equal_rows(rows, n, True)])
    torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated(); x = run(plan[0], q, k, v); torch.cuda.synchronize()
    t["peak MB of a layer"] = round((torch.cuda.max_memory_allocated() - before - bench.out_and_lse(x[0])) / 2**20); del x
    print(name, n, {**t, "attention": round(t["all"] - t["selection"], 3), "mixture/uniform": round(t["all"] / t["uniform"], 3)}, flush=True)
if not warm: out.write_text(json.dumps(found))
