import sys; sys.path.insert(0,'examples/bench')
from pathlib import Path
import torch
from express_compile.core.plan import SavedPlan
from express_compile.kernels import heads as P
from express_compile.kernels.select import contest as K
from express_compile.core.policy import Policy
for name,n,H,Hkv in (("qwen2.5-coder-0.5b",16384,14,2),("qwen2.5-coder-0.5b-query-heads",16384,14,2),("qwen2.5-coder-0.5b-32k-query-heads",32768,14,2),("smollm2-135m",8192,9,3),("smollm2-135m-query-heads",8192,9,3)):
    plan=SavedPlan.from_json(Path(f"examples/plans/{name}.json").read_text())
    old,new,thin=set(),set(),set(); launches=[0,0]
    for site in plan.sites:
        own=Policy().of_entry(site).of("heads")
        t=P._together(own,1,H//Hkv,Hkv,n,n,True)
        kinds=tuple(x.kind for x in t.thinned)
        for k in kinds:
            if k.contests:
                old.add((k.log,k.warps,k.index_rows-k.contests*k.protected>=max(1,k.contests*256-k.protected))); launches[0]+=3
        for own_ in K._alike(kinds):
            s,_,_=K._series(own_,1,2048); launches[1]+=2+len(s)
            for x in s: new.add((x.constants['LOSERS'],x.constants['LOGS'],x.constants['num_warps'],len(own_)>1))
    print(name,len(plan.sites),'old kernels',len(old),'new',len(new),'launches',launches)
print()
for name,n,H,Hkv in (("qwen2.5-coder-0.5b",16384,14,2),("qwen2.5-coder-0.5b-query-heads",16384,14,2),("qwen2.5-coder-0.5b-32k-query-heads",32768,14,2),("smollm2-135m",8192,9,3),("smollm2-135m-query-heads",8192,9,3)):
    plan=SavedPlan.from_json(Path(f"examples/plans/{name}.json").read_text())
    a=b=c=0
    for site in plan.sites:
        own=Policy().of_entry(site).of("heads")
        t=P._together(own,1,H//Hkv,Hkv,n,n,True)
        for own_ in K._alike(tuple(x.kind for x in t.thinned)):
            L=lambda k: k.index_rows-k.contests*k.protected>=max(1,k.contests*256-k.protected)
            a+=2+len({k.warps for k in own_}); b+=2+len({(k.log,L(k)) for k in own_}); c+=2+len({k.log for k in own_})
    print(name,'by warps',a,'by log and losers',b,'by log',c)
