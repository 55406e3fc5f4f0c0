import sys; sys.path.insert(0,"/tmp/hostrig")
from bench import *
# cost of recordings: kinds forgotten before each
def t(f,n=60):
    out=[]
    for _ in range(n):
        s=time.perf_counter(); f(); out.append((time.perf_counter()-s)*1e6)
    return min(out), statistics.median(out)
with torch.no_grad():
    for name in ("express 256","express 256 protected","santa","heads window"):
        f=cases[name]
        for _ in range(5): f()
        third=t(f)
        a=[];b=[];c=[]
        for _ in range(40):
            P.forget()
            for l in (a,b,c):
                s=time.perf_counter(); f(); l.append((time.perf_counter()-s)*1e6)
        n=name.split()[0]
        xs=y if n=="santa" else x
        P.forget()
        r=P.RECORDINGS; P.RECORDINGS=0
        plain=t(f); P.RECORDINGS=r
        print(name,"plain",plain[0],"first",min(a),"second",min(b),"third",min(c),"steady",third[0],flush=True)
