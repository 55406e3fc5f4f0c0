import sys; sys.path[:0]=["/work/main","/work/main/examples/bench"]
from pathlib import Path
from plans import *
from express_compile.quality.profile import DEFAULT_OPTIONS
A=Profile.from_json(Path("/work/main/.gpu/run/q16.json").read_text()); B=Profile.from_json(Path("/work/main/.gpu/run/q32.json").read_text()); S=Profile.from_json(Path("/work/.device/13/smol.json").read_text())
def err(f,rows,n):
    p=chosen(f,rows,n); o={x:i for i,x in enumerate(f.options)}
    return sum(float(s.weighted[h,o[x]]) for s in f.sites for h,x in enumerate(p.rows[s.module]))
cases=[(A,800,16384),(A,1600,16384),(A,3200,16384),(B,1600,32768),(S,700,8192),(S,1350,8192)]
full=[err(*c) for c in cases]
print("full",len(A.options),len(B.options),[round(x,4) for x in full])
common=[x for x in A.options if x in S.options and x in B.options]
pool=[x for x in A.options if x in B.options]
def score(opts):
    r=[]
    for (f,rows,n),e in zip(cases,full):
        g=only(f,lambda x:x in opts)
        try: r.append(err(g,rows,n)/e)
        except ValueError: r.append(9)
    return r
import math
g=lambda r: math.exp(sum(map(math.log,r))/len(r))
D=[x for x in DEFAULT_OPTIONS]
r=score(D); print("default", [round(x,2) for x in r], g(r))
opts=list(pool)
while len(opts)>10:
    best=min(((g(score([y for y in opts if y!=x])),x) for x in opts if not x.everything),key=lambda t:t[0])
    opts.remove(best[1]); print(len(opts), round(best[0],3), "removed", best[1], flush=True)
print([str(x) for x in opts])
