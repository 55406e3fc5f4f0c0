import sys; sys.path.insert(0,'/work/main/examples/bench')
import numpy as np
from plans import *
for name,n,budgets in (("sk",8192,(700,1350)),("sq",8192,(700,1350)),("k16",16384,(1600,)),("q16",16384,(1600,)),("k32",32768,(1600,)),("q32",32768,(1600,))):
    ps=[Profile.from_json(Path(f"/tmp/p7/{name}.{t}.json").read_text()) for t in ("genesis","pydecimal","records")]
    def joined(T):
        sites=[]
        for i,s in enumerate(ps[0].sites):
            e=sum(x.sites[i].nats/t*np.array(x.sites[i].errors) for x,t in zip(ps,T))
            sites.append(replace(s,errors=tuple(map(tuple,e.tolist())),nats=1.0))
        return replace(ps[0],sites=tuple(sites))
    few=min((r,o) for o,r in enumerate(ps[0].rows))[1]
    Tm=[sum(s.nats*np.mean(s.errors) for s in x.sites) for x in ps]
    Tf=[sum(s.nats*np.array(s.errors)[:,few].sum() for s in x.sites) for x in ps]
    Tw=[sum(s.nats*np.array(s.errors).sum() for s in x.sites) for x in ps]
    print(name,'T mean',np.round(Tm,4),'T few',np.round(Tf,3), 'ratio',np.round(np.array(Tf)/np.array(Tm),1), 'sum nats', [round(sum(s.nats for s in x.sites),2) for x in ps])
    rules={'a':mean_of(ps),'b':joined([1,1,1]),'c':joined(Tm),"c'":joined(Tf)}
    for b in budgets:
        pl={k:chosen(f,b,n) for k,f in rules.items()}
        print(b,{k:{k2:round(predicted(f,p)/predicted(f,pl[k2b:=k2 if 0 else k]) if k2==k else predicted(f,p)/predicted(f,pl[k]),3) for k2,p in pl.items()} for k,f in rules.items()})
        kinds=lambda p: Counter('every' if x.everything else 'sel' if x.selected else 'thin' if x.thinned and not x.protected else 'both' if x.thinned else 'prot' if x.protected else 'win' for x in rows_by_head(p))
        print({k:dict(kinds(p)) for k,p in pl.items()})
