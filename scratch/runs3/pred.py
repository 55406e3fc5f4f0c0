import sys, time; sys.path.insert(0,"examples/bench"); sys.path.insert(0,".")
from pathlib import Path
from statistics import fmean
import torch
from plans import *
from benchmark import layers_of
from express_compile.core.plan import SavedPlan
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.planning.devices import shipped
from express_compile.planning.predict import predict
from express_compile.core.rows import to_numbers
P=Profile.from_json(Path(".gpu/got/q16.json").read_text()); n=16384
dev=shipped()["NVIDIA H200"]
def weighted(f, plan):
    opts={o:i for i,o in enumerate(P.options)}
    return sum(float(s.weighted[h, opts[r]]) for s in P.sites for h,r in enumerate(plan.rows[s.module]))
def layers(plan, k=6):
    # as layers_of, with rows of a PerHead: make a fake saved plan
    import types
    sites=[types.SimpleNamespace(rows=tuple(plan.rows[s.module]), facts={"H":14,"H_kv":2}, module=s.module, params={"last":64,"block":128}) for s in P.sites]
    return sites
base_saved=SavedPlan.load("examples/plans/qwen2.5-coder-0.5b-query-heads.json")
def saved(plan):
    return replace(base_saved, sites=tuple(replace(s, rows=tuple(plan.rows[s.module]), params={**s.params,"rows":to_numbers(plan.rows[s.module])}, options={**s.options,"method_options":{"heads":{**s.options["method_options"]["heads"],**PerHead.of_rows(plan.rows[s.module])}}}) for s in base_saved.sites))
def ms(plan, N):
    spec=AttentionSpec(1,32,8,N,N,128,128,torch.bfloat16,"cuda",0.1,Mask(causal=True,offset=0))
    ls=layers_of(saved(plan),32,8)
    return fmean(predict("heads",spec,Policy(methods=(o,)),dev) for o in ls)
kinds={"all":lambda x:True,"no thinned":lambda x:not x.thinned,"no protected":lambda x:not x.protected,
"windows+selected+everything":lambda x:not x.thinned and not x.protected,"windows+everything":lambda x:not x.thinned and not x.protected and not x.selected,
"no selected":lambda x:not x.selected, "windows+thinned+everything": lambda x: not x.selected and not x.protected,
"no everything, no thin, no prot": lambda x: not x.everything and not x.thinned and not x.protected}
for rows in ():
    for k,f in kinds.items():
        plan=chosen(only(P,f),rows,n)
        print(f"{rows} {k:34s} weighted {weighted(P,plan):.4f}  kinds {len(set(rows_by_head(plan))):3d}  32k {ms(plan,32768):.2f} ms", flush=True)
print("KV")
G=replace(P,sites=tuple(replace(s,errors=tuple(tuple(sum(s.errors[g*7+i][o] for i in range(7)) for o in range(len(P.options))) for g in range(2))) for s in P.sites))
def widen(plan): return replace(plan, rows={m:[x for x in r for _ in range(7)] for m,r in plan.rows.items()})
kv_saved=SavedPlan.load("examples/plans/qwen2.5-coder-0.5b.json")
def ms_kv(plan,N):
    global base_saved
    keep, base_saved = base_saved, kv_saved
    try: return ms(plan,N)
    finally: base_saved=keep
for rows in (1600,2000,2400,2800,3200):
    plan=chosen(G,rows,n)
    print(f"{rows} KV {weighted(P,widen(plan)):.4f} 32k {ms_kv(plan,32768):.2f} 131k {ms_kv(plan,131072):.2f}", flush=True)
for rows in (1600,2000):
    for k in ("all","windows+selected+everything","windows+everything"):
        plan=chosen(only(P,kinds[k]),rows,n); print(rows,k, f"{weighted(P,plan):.4f} 32k {ms(plan,32768):.2f} 131k {ms(plan,131072):.2f}", flush=True)
