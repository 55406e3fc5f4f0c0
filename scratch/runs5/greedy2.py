"""Joint: query heads and KV heads (sums), start from the bench's 29."""
import sys, numpy as np; sys.path.insert(0,'examples/bench')
from pathlib import Path
from plans import *
f=Profile.from_json(Path('/tmp/big.json').read_text()); n=f.tokens
Eq=np.concatenate([np.array(s.errors)*s.nats for s in f.sites]); Ek=Eq.reshape(-1,7,Eq.shape[1]).sum(1)
opts=list(f.options); r=np.array(rows_of(f.options,n,base(64)))
def solve(E,idx,b):
    e,x=E[:,idx],r[idx]; lo,hi=1e-12,10.0; h=np.arange(len(e))
    for _ in range(32):
        m=(lo*hi)**.5; c=(e+m*x).argmin(1)
        if x[c].mean()<=b: hi=m
        else: lo=m
    c1=(e+hi*x).argmin(1); c0=(e+lo*x).argmin(1); r1,r0=x[c1].mean(),x[c0].mean(); e1,e0=e[h,c1].sum(),e[h,c0].sum()
    t=0 if r0==r1 else (b-r1)/(r0-r1)
    return e1+(e0-e1)*min(max(t,0),1)
J=[(E,b) for E in (Eq,Ek) for b in (1024,1600,4032)]
full=[solve(E,np.arange(len(r)),b) for E,b in J]; print(np.round(full,4))
score=lambda idx: float(np.mean([np.log(solve(E,np.array(idx),b)/g) for (E,b),g in zip(J,full)]))
start=[i for i,o in enumerate(opts) if o in OPTIONS+MORE]
cur=list(start) if sys.argv[1]=='29' else [opts.index(EVERYTHING), opts.index(Rows(32,64))]
print(len(cur), f"{score(cur):.4f}")
while len(cur)<int(sys.argv[2]):
    best=min((i for i in range(len(opts)) if i not in cur), key=lambda i: score(cur+[i])); cur.append(best)
    print(len(cur), f"{score(cur):.4f}", str(opts[best]), flush=True)
