import sys, time; sys.path.insert(0,'/work/main/examples/bench')
import torch, numpy as np, math
from plans import *
from models import _bible, _code, judged_texts
from measures import token_statistics
from express_compile.quality import profile as P
torch.set_num_threads(2); torch.set_grad_enabled(False)
d=torch.load('/tmp/nats.pt',weights_only=False); n=2048
opts=tuple(Rows(**x) for x in d['opts']); layers=list(d['errors']); rows=d['rows']
E={l:d['errors'][l].numpy() for l in layers}
kind=lambda o: 'every' if o.everything else 'protected' if o.protected else 'thinned' if o.thinned else 'selected' if o.selected else 'window'
probes=sorted({o for _,o in d['kls']}); print([str(opts[o]) for o in probes])
ratio={(l,o): d['kls'][l,o]/max(E[l][:,o].sum(),1e-12) for l in layers for o in probes}
L=np.array([[math.log(max(ratio[l,o],1e-9)) for o in probes] for l in layers])
print('std of log ratio between probes within a site', L.std(1).mean().round(2), 'between sites', L.mean(1).std().round(2)); print(np.exp(L).round(3))
model,tok=MODELS['smollm2'][1]('cpu',torch.float32)
ids_of=lambda t: tok(t[:10*n],return_tensors='pt').input_ids[:,:n]
T={"john":_bible("In the beginning was the Word",130_000),"optparse":_code("optparse","pdb")}
ids={k:ids_of(t) for k,t in T.items()}
exact={k:model.model(x,use_cache=False).last_hidden_state for k,x in ids.items()}
few=sorted((r,o) for o,r in enumerate(rows) if not opts[o].everything); mid=few[len(few)//2][1]
midp=min(probes,key=lambda o: abs(rows[o]-rows[mid]))
geo=lambda l,os: math.exp(np.mean([math.log(max(ratio[l,o],1e-9)) for o in os]))
V={'alike':lambda l,o:1.0}
for p in probes: V[f'one: {opts[p]}']=lambda l,o,p=p: ratio[l,p]
V['geo of all']=lambda l,o: geo(l,probes)
V['sum/sum']=lambda l,o: sum(d['kls'][l,p] for p in probes)/sum(E[l][:,p].sum() for p in probes)
def bykind(l,o):
    own=[p for p in probes if kind(opts[p])==kind(opts[o])]; return geo(l,own or probes)
V['by kind']=bykind
V['by kind, half']=lambda l,o: (bykind(l,o)*geo(l,probes))**.5
mods=d['modules']
for budget in (338,200):
  for name,w in V.items():
    sites=tuple(P.SiteProfile(mods[l],0,None,tuple(tuple(float(E[l][h,o]*w(l,o)) for o in range(len(opts))) for h in range(E[l].shape[0])),1.0) for l in layers)
    f=P.Profile(opts,n,1,rows,sites); plan=chosen(f,budget,n,last=0)
    rewrite_attention(model,Policy(methods=(plan,),strict=True))
    kl=[float(token_statistics(exact[k],model.model(x,use_cache=False).last_hidden_state,model.lm_head,x).tail(P.late(n)).kl.mean()) for k,x in ids.items()]
    restore_attention(model)
    print(f"{budget} {name:45s} predicted {predicted(f,plan):.4f} KL {kl[0]:.4f} {kl[1]:.4f} mean {sum(kl)/2:.4f}",flush=True)
