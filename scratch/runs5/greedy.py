import sys, numpy as np; sys.path.insert(0,'examples/bench')
from pathlib import Path
from plans import *
f=Profile.from_json(Path(sys.argv[1]).read_text()); n=f.tokens
E=np.concatenate([np.array(s.errors)*s.nats for s in f.sites]); r=np.array(rows_of(f.options,n,base(64)))
B=[float(x) for x in sys.argv[2].split(',')]
def solve(idx,b):
    e,x=E[:,idx],r[idx]; lo,hi=1e-12,1.0
    h=np.arange(len(e))
    for _ in range(32):
        m=(lo*hi)**.5; c=(e+m*x).argmin(1)
        if x[c].mean()<=b: hi=m
        else: lo=m
    # interpolate between the two hulls
    c1=(e+hi*x).argmin(1); c0=(e+lo*x).argmin(1); r1,r0=x[c1].mean(),x[c0].mean(); e1,e0=e[h,c1].sum(),e[h,c0].sum()
    t=0 if r0==r1 else (b-r1)/(r0-r1)
    return e1+(e0-e1)*min(max(t,0),1)
full=[solve(np.arange(len(r)),b) for b in B]; print('full',len(r),np.round(full,4))
opts=list(f.options); every=next(i for i,o in enumerate(opts) if o.everything)
score=lambda idx: float(np.mean([np.log(solve(np.array(idx),b)/g) for b,g in zip(B,full)]))
cur=[every, opts.index(Rows(32,64))]
while len(cur)<int(sys.argv[3]):
    best=min((i for i in range(len(opts)) if i not in cur), key=lambda i: score(cur+[i])); cur.append(best)
    if len(cur)%4==0 or len(cur)<8: print(len(cur), f"{score(cur):.4f}", str(opts[best]), flush=True)
    else: print('  +',str(opts[best]))
b29=[i for i,o in enumerate(opts) if o in OPTIONS+MORE]; print('29',f"{score(b29):.4f}")
print([ (opts[i].recent,opts[i].thinned,opts[i].protected,opts[i].selected,opts[i].everything) for i in cur])
