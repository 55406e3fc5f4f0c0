import sys, numpy as np; sys.path.insert(0,'examples/bench')
from pathlib import Path
from plans import *
from express_compile.quality.profile import DEFAULT_OPTIONS
J=[];allopts=[]
for x,b in (('sk',(700,1350,2048)),('sq',(700,1350,2048)),('k16',(1024,1600,4032)),('q16',(1024,1600,4032)),('k32',(1600,3200)),('q32',(1600,3200))):
    f=Profile.from_json(Path(f'/tmp/r3/{x}.profile.json').read_text()); E=np.concatenate([np.array(s.errors)*s.nats for s in f.sites]); r=np.array(rows_of(f.options,f.tokens,base(64)))
    for o in f.options:
        if o not in allopts: allopts.append(o)
    J+=[(x,E,r,list(f.options),y) for y in b]
def solve(E,r,b):
    lo,hi=1e-12,10.0; h=np.arange(len(E))
    if r.min()>b: return np.inf
    for _ in range(26):
        m=(lo*hi)**.5; c=(E+m*r).argmin(1)
        if r[c].mean()<=b: hi=m
        else: lo=m
    c1=(E+hi*r).argmin(1); c0=(E+lo*r).argmin(1); r1,r0=r[c1].mean(),r[c0].mean(); e1,e0=E[h,c1].sum(),E[h,c0].sum()
    t=0 if r0==r1 else (b-r1)/(r0-r1)
    return e1+(e0-e1)*min(max(t,0),1)
full=[solve(E,r,b) for _,E,r,o,b in J]
def score(S,parts=False):
    v=[]
    for (x,E,r,o,b),g in zip(J,full):
        i=[k for k,y in enumerate(o) if y in S]; v.append(np.log(solve(E[:,i],r[i],b)/g))
    return v if parts else float(np.mean(v))
print('default16',f"{score(DEFAULT_OPTIONS):.4f}", len(allopts)); old29=[*allopts]
cur=[EVERYTHING,Rows(32,64)]
while len(cur)<int(sys.argv[1]):
    best=min((x for x in allopts if x not in cur),key=lambda x: score(cur+[x])); cur.append(best); print(len(cur),f"{score(cur):.4f}",str(best),flush=True)
print(np.round(np.exp(score(cur,True)),2))
