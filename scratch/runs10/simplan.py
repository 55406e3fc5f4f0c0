import sys, time, collections
sys.path.insert(0, "examples/bench"); sys.path.insert(0, ".")
import torch, numpy as np
from pathlib import Path
from benchmark import layers_of
from express_compile.core.plan import SavedPlan
from express_compile.kernels import held as K, due as D
from express_compile.kernels.held import Held
from express_compile.kernels.heads import PerHead
from express_compile.kernels.launch import Random
torch.set_grad_enabled(False); torch.set_num_threads(1)
K._by_kernels = lambda x: True
K.do_what_is_due = lambda *a: None
n = int(sys.argv[1]); N = 300
plan = SavedPlan.load(Path("examples/plans/smollm2-135m.json"))
layers = layers_of(plan, 32, 8, 32) if layers_of.__code__.co_argcount > 3 else layers_of(plan, 32, 8)
k = torch.randn(1, 8, n, 4); 
original = K.HeldRows.count_done
def count_done(self, lengths):
    for (first, stop), queue in list(self.ahead.items()):
        if queue[0].end == lengths[first] + 1 and self._has_lines: self.catch_up(slice(first, stop), queue[0])
    return original(self, lengths)
K.HeldRows.count_done = count_done
new = [torch.randn(1, h, 1, 4) for h in (32, 8, 8)]
K.HeldRows.warm_up = lambda self: None
for lines in (1, 16):
    K.LINES = D.LINES = lines
    per = collections.Counter(); dec = K.HeldRows._decided; now = [0]; settles = collections.Counter()
    def counted(self, *a):
        per[now[0]] += 1; return dec(self, *a)
    K.HeldRows._decided = counted
    for layer in range(32):
        own = layers[layer % len(layers)]
        held = Held(PerHead(tuple(x if not x.everything else type(x)(32, 512) for x in own.rows)), k[:, :, :1], k[:, :, :1], Random(torch.tensor(5), layer), .1, layer)
        held.fill(k, k); held.settle(single=True); held.prepare_step()
        due = behind = 0
        for i in range(N):
            now[0] = i
            length = held.length[0]
            if length >= due:
                held.settle(single=True); held.prepare_step(); settles[i] += 1
            b = length >= behind
            if b or length >= due: held.launch_due()
            held._step_reference(*new)
            if b or length >= due: held.look_ahead(1)
            held.end_step()
            due, behind = held.length[0] + held.rest(), held.length[0] + held.idle()
    K.HeldRows._decided = dec
    x = np.array([per[i] for i in range(3, N)]); s = np.array([settles[i] for i in range(3, N)])
    print(lines, "decided a step: mean %.2f p80 %d p99 %d max %d; settles mean %.2f max %d" % (x.mean(), np.quantile(x,.8), np.quantile(x,.99), x.max(), s.mean(), s.max()), flush=True)
