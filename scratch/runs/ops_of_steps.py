import torch, sys, numpy as np
from express_compile.core.rows import Rows
from express_compile.kernels import held as H
from express_compile.kernels.heads import PerHead
from express_compile.kernels.launch import Random
from express_compile.kernels.select.schedule import Round, round_of
from torch.utils._python_dispatch import TorchDispatchMode
class Count(TorchDispatchMode):
    n=0
    def __torch_dispatch__(self,f,t,a=(),k=None):
        Count.n+=1; return f(*a,**(k or {}))
if len(sys.argv)>1: H.HeldRows._is_worth_it=lambda self, until: True
rows=(Rows(4,64,64,64),Rows(4,64,64))
n=20000; L=8
r=Round(round_of(n,64),64,6); print('round',r.r,'group',r.group,'q',r.q)
torch.manual_seed(0)
k=torch.randn(1,2,n,16); v=torch.randn(1,2,n,16)
layers=[]
for i in range(L):
    h=H.Held(PerHead(rows),k,v,Random(torch.tensor(0),i),.25,i*4); h.fill(k,v); layers.append(h)
visible,hidden=[],[]
due=[0]*L
for t in range(600):
    x=[torch.randn(1,2,1,16) for _ in range(3)]
    with Count():
        a=Count.n
        for i,h in enumerate(layers):
            if h.length[0]>=due[i]:
                h.settle(single=True); h.prepare_step(); due[i]=h.length[0]+h.rest()
        b=Count.n
    for h in layers: h.prepare_step(); h._step_reference(*x) if False else h._attend(*x,None)
    with Count():
        c=Count.n
        for i,h in enumerate(layers):
            if h.length[0]+1>=due[i]: h.look_ahead(1)
        d=Count.n
    for h in layers: h.end_step()
    visible.append(b-a); hidden.append(d-c)
v_,h_=np.array(visible)[8:]/L,np.array(hidden)[8:]/L
print('visible ops a layer: mean %.1f p50 %.0f p80 %.0f p99 %.0f max %.0f'%(v_.mean(),*np.quantile(v_,[.5,.8,.99]),v_.max()), 'hidden mean %.1f p80 %.0f p99 %.0f max %.0f'%(h_.mean(),*np.quantile(h_,[.8,.99]),h_.max()))
for i,h in enumerate(layers): print(h.rows().tolist()) if i==0 else None
