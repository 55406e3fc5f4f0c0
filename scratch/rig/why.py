import sys; sys.path.insert(0,"/tmp/hostrig")
from rig import *
import traceback
def show(self):
    import contextlib
    @contextlib.contextmanager
    def cm():
        try: yield
        except P._NotPreparable:
            if not self.failed: traceback.print_exc(limit=-1); f=sys._getframe(2); f=sys.exc_info()[2].tb_next.tb_frame; print(f.f_locals.get("func"), [type(q) for q in f.f_locals.get("read") or []], f.f_locals.get("args")); traceback.print_stack(limit=8)
            self.failed=True
    return cm()
P.Recording._or_failed=show
oa=P.agreement
def agreement(a,b,l):
    r=oa(a,b,l)
    if r is None:
        print("differ", a.failed,b.failed,a.tensors==b.tensors,[i for i,x in a.constants.items() if b.constants.get(i) is not x], len(a.steps),len(b.steps))
        for p,q in zip(a.tensors,b.tensors):
            if p!=q: print(p,q); break
        for p,q in zip(a.steps,b.steps):
            try: P.agreed(p,q,l)
            except P._NotPreparable: print(p,"\n",q); break
    return r
P.agreement=agreement
torch._C._len_torch_dispatch_stack=lambda: 0
dc.TOKENS=4096
for name in sys.argv[1:]:
    print("====",name)
    if 1:
      for _ in range(3):
        for q in [0]:
            dc.CALLS[name].__call__(torch.bfloat16,128) if not "grad" in name else 0
