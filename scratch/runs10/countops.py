import sys, time, collections
sys.path.insert(0, "examples/bench"); sys.path.insert(0, ".")
import torch, device_calls as calls
from torch.utils._python_dispatch import TorchDispatchMode
from express_compile.kernels import held as K
from express_compile.kernels.held import Held
from express_compile.kernels.heads import PerHead
from express_compile.kernels.launch import Random
from express_compile.core.rows import Rows
torch.set_grad_enabled(False); torch.manual_seed(0)
class Count(TorchDispatchMode):
    def __init__(self): super().__init__(); self.c = collections.Counter()
    def __torch_dispatch__(self, f, t, a=(), k=None):
        self.c[str(f)] += 1; return f(*a, **(k or {}))
FREE = ("view","slice","select","unsqueeze","expand","as_strided","permute","transpose","alias","unfold","_unsafe_view","split","squeeze","t.default","detach","movedim","unbind","_reshape_alias","lift")
def tok(n): return [torch.randn(1, h, n, 128).to(torch.bfloat16) for h in (4, 1, 1)]
n = 20000
q,k,v = tok(n)
for rows in (Rows(32,256,256), Rows(32,256,64), Rows(32,256,protected=256), Rows(32, 256, 64, 64)):
    held = Held(PerHead((rows,)), k, v, Random(torch.tensor(5), 3), .1, 3)
    held.fill(k, v); held.settle(single=True)
    look = K.HeldRows._decided; 
    with calls.recorded() as launches:
        new = tok(1)
        for i in range(40 if not rows.protected else 300):
            held.settle(single=True); held.prepare_step(); held.launch_step(*new)
            del launches[:]
            with Count() as c:
                t=time.perf_counter(); held.look_ahead(1); dt=time.perf_counter()-t
            held.end_step()
            if sum(c.c.values()) > 30:
                real = {x: m for x, m in c.c.items() if not any(f"aten.{f}" in x for f in FREE)}
                q_ = held.parts[0].ahead.get((0,1),[])
                print(rows, "step", i, f"{dt*1e3:.1f} ms", "aten", sum(c.c.values()), "device ops", sum(real.values()), "launches", [l.kernel.fn.__name__ for l in launches], "events", len(q_))
                print("   ", sorted(real.items(), key=lambda x: -x[1])[:24])
                break
