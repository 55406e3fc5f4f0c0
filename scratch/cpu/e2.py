import sys, time, random, copy, json, argparse
sys.path[:0]=["/work/main","/work/main/examples/bench"]
import torch
from dataclasses import replace
from pathlib import Path
import needles, plans
from models import load_qwen, _bible, _code
from plans import chosen, average_rows, only, base
from express_compile import Policy, rewrite_attention, restore_attention
from express_compile.quality import profile as P
p=argparse.ArgumentParser(); p.add_argument("--n",type=int,default=4096); p.add_argument("--rows",type=float,default=600)
p.add_argument("--texts",type=int,default=1); p.add_argument("--out",default="/tmp/exp/out.jsonl"); p.add_argument("--seed",type=int,default=0)
p.add_argument("--only",default="")
a=p.parse_args(); n=a.n
model,tok=load_qwen("cpu",torch.bfloat16)
A=P.Profile.from_json(Path("/tmp/q16.json").read_text())
def plan(f,block=128,rows=a.rows):
    c=chosen(f,rows,n,0)
    return replace(c,block=block)
V={}
V["A128"]=plan(A)
from express_compile.core.rows import Rows
def isw(x): return not (x.everything or x.thinned or x.protected or x.selected)
def each(c,f): return replace(c,rows={m:[f(x) if isw(x) else x for x in h] for m,h in c.rows.items()})
base_=V["A128"]
V["WS2"]=each(base_,lambda x: replace(x,selected=2))
V["WW2"]=each(base_,lambda x: replace(x,recent=x.recent+128))
V["Amore"]=plan(A,rows=average_rows(V["WS2"],n))
if a.only: V={k:v for k,v in V.items() if k in a.only.split(",")}
print({k:average_rows(v,n) for k,v in V.items()})
print(plans.in_words(next(iter(V.values()))))
W="anchor bramble candle dagger ember feather granite hammock inkwell jasmine kestrel lagoon marble napkin oyster parsley quiver ribbon saddle trellis urchin violin wicker zephyr".split()
NOISE2="The train leaves the valley at dawn. Nobody looks out of the window. A dog barks once, and the gate is shut. Above the town the mill turns slowly.\nSnow lies on the fields. The smith lights his fire.\n"
HAYS={"noise":NOISE2,"prose":_bible("The words of Jeremiah the son",250_000),"code":_code("unittest.mock","ast")}
hays={k:needles.Hay(tok,t,k=="code") for k,t in HAYS.items()}
needles.WORDS=tuple(W)
def make(r,name):
    facts=[];qs=[]
    kind=r.choice(needles.KINDS)
    keys=needles._keys(kind,6,r)
    for k in keys[:4]:
        c=needles._code(r); d=r.uniform(.02,.95)
        facts.append((d,f"The locker number of {k} is {c}.")); qs.append(("four",d,f"Which locker number has {k}? The locker number of {k} is",f" {c}"))
    for k in keys[4:]:
        c=[needles._code(r),needles._code(r)]; d=r.uniform(.02,.8); e=r.uniform(d,.95)
        facts+=[(d,f"A locker number of {k} is {c[0]}."),(e,f"A locker number of {k} is {c[1]}.")]
        qs.append(("two",d,f"Which two locker numbers has {k}, in the order of the text? They are",f" {c[0]} and {c[1]}"))
    hay=hays[name]
    ids=hay.with_facts(n-64,facts,r.randrange(len(hay.lines)))
    return ids,[(t,d,tok(q,add_special_tokens=False).input_ids,tok(x,add_special_tokens=False).input_ids) for t,d,q,x in qs],kind
@torch.no_grad()
def prefill(ids):
    return model.model(torch.tensor([ids]),use_cache=True).past_key_values
@torch.no_grad()
def ask(cache,ids,q,x):
    L=cache.get_seq_length()
    out=model(torch.tensor([q+x]),past_key_values=cache,use_cache=True).logits[0].float()
    cache.crop(L-cache.get_seq_length())
    lp=out[len(q)-1:-1].log_softmax(-1)
    t=torch.tensor(x)
    nll=-lp[torch.arange(len(x)),t]
    return float(nll.sum()), bool((lp.argmax(-1)==t).all())
r=random.Random(a.seed)
out=open(a.out,"a")
for t in range(a.texts):
    name=list(HAYS)[t%3]; ids,qs,kind=make(r,name); rec=dict(n=n,rows=a.rows,hay=name,kind=kind,tasks=[q[0] for q in qs],depth=[round(q[1],2) for q in qs])
    for v in ("exact",*V):
        t0=time.time()
        if v!="exact": rewrite_attention(model,Policy(methods=(V[v],),strict=True))
        c=prefill(ids)
        if v!="exact": restore_attention(model)
        t1=time.time()
        rec[v]=[ask(c,ids,q,x) for _,_,q,x in qs]
        print(t,name,kind,v,f"{t1-t0:.1f}+{time.time()-t1:.1f} s"," ".join(f"{x[0]:.2f}{'' if x[1] else '*'}" for x in rec[v]),flush=True)
    out.write(json.dumps(rec)+"\n"); out.flush()
