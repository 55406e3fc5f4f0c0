import sys, time
sys.path.insert(0, "examples/bench"); sys.path.insert(0, ".")
import torch, device_calls as calls
from express_compile.kernels import held as K, due as D
from express_compile.kernels.held import Held
from express_compile.kernels.heads import PerHead
from express_compile.kernels.launch import Random
from express_compile.core.rows import Rows
torch.set_grad_enabled(False)
torch.manual_seed(0)
def tok(n): return [torch.randn(1, h, n, 16).to(torch.bfloat16) for h in (4, 1, 1)]
q,k,v = tok(131072)
for lines in (1, 16):
    K.LINES = D.LINES = lines
    res = []
    for turn in range(4):
        held = Held(PerHead((Rows(32, 256, 256),)), k, v, Random(torch.tensor(5), 3), .1, turn)
        held.fill(k, v); held.settle(single=True)
        with calls.recorded() as launches:
            new = tok(1); spent=0; n=0; most=0; due = behind = 0
            for i in range(300):
                t=time.perf_counter()
                length = held.length[0]
                if length >= due: held.settle(single=True); held.prepare_step()
                if length >= behind or length >= due: held.launch_due()
                spent+=time.perf_counter()-t
                held.step_triton(*new)
                t=time.perf_counter()
                if length >= behind or length >= due: held.look_ahead(1)
                spent+=time.perf_counter()-t; most=max(most,time.perf_counter()-t)
                held.end_step()
                due, behind = held.length[0] + held.rest(), held.length[0] + held.idle()
        res.append((spent*1e3, most*1e3))
    print(lines, [f"{a:.1f} ms in 300 steps, most {b:.2f}" for a,b in res])
