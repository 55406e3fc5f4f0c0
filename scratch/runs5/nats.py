import sys, time, json; sys.path.insert(0,'/work/main/examples/bench')
from dataclasses import replace
import torch, plans
from plans import *
from models import _bible, _code, profiled_texts
from express_compile.core.call import run_by
from express_compile.core.rows import Rows
from express_compile.quality import profile as P
T0=time.perf_counter(); T=lambda: f"{time.perf_counter()-T0:.0f} s"
torch.set_num_threads(2)
n=2048; S=32
model,tok=MODELS['smollm2'][1]('cpu',torch.float32)
def ids_of(t): return tok(t[:10*n],return_tensors='pt').input_ids[:,:n]
R=Rows
opts=(*(R(S,w) for w in (32,64,128,256,512,768)),*(R(S,*x) for x in ((64,16),(64,32),(128,32),(128,64),(256,128))),*(R(S,64,16,16) for _ in (0,)),R(S,64,64,64),
  *(R(S,w,protected=p) for w,p in ((64,32),(64,64),(64,128),(64,256),(128,64),(256,256))),*(R(S,w,selected=x) for w,x in ((32,1),(64,2),(64,4),(128,8))),EVERYTHING)
text=profiled_texts(); sample=ids_of(text['genesis'])
probes=[R(S,128),R(S,128,64),R(S,64,protected=64),R(S,64,selected=2),R(S,256,protected=256),R(S,512)]
probes=[p for p in probes if p in opts]; print(probes,flush=True)
torch.set_grad_enabled(False)
with P.rewritten(model, PerHead(EVERYTHING, block=128)):
    finder,reports=P.found_in(model,sample)
    of={x.layer:x for x in reports if x.saved is not None and x.verdict=='rewritten'}
    meter=P._Meter(opts,finder.projections,False,lambda:None)
    with run_by(meter): exact=P.scores_of(model,sample)
    errors=meter.errors(); print('errors',T(),flush=True)
    L=model.model.layers; hs=[]
    hooks=[l.register_forward_pre_hook(lambda m,args,kw: hs.append(args[0] if args else kw['hidden_states']),with_kwargs=True) for l in L]
    fin=model.model(sample,use_cache=False).last_hidden_state
    for h in hooks: h.remove()
    pe=model.model.rotary_emb(hs[0],torch.arange(n)[None])
    at=torch.arange(P.late(n),n,4)
    lp=model.lm_head(fin[:,at]).log_softmax(-1)[0]
    order=list(errors)  # layer keys, in order of execution
    def run(i):
        h=hs[i]
        for l in L[i:]:
            o=l(h,attention_mask=None,position_ids=torch.arange(n)[None],position_embeddings=pe)
            h=o[0] if isinstance(o,tuple) else o
        x=model.lm_head(model.model.norm(h)[:,at]).log_softmax(-1)[0]
        return float((lp.exp()*(lp-x)).sum(-1).mean())
    with run_by(P.Chosen({})): print('zero',run(0),run(29))
    kls={}
    for p in probes:
        o=opts.index(p)
        for i,layer in enumerate(order):
            with run_by(P.Chosen({layer:[p]})): kls[layer,o]=max(run(i),0.)
        print(p,T(),[round(kls[x,o]/float(errors[x][:,o].sum()),3) for x in order],flush=True)
        torch.save(dict(errors=errors,kls=kls,opts=[x.to_data() for x in opts],modules={k:of[k].saved.module for k in errors},rows=tuple(P.rows_of(opts,n,PerHead(EVERYTHING,block=128)))),'/tmp/nats.pt')
    rows=tuple(P.rows_of(opts,n,PerHead(EVERYTHING,block=128)))
