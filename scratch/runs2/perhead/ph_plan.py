import sys, math, torch, numpy as np
sys.path.insert(0,'examples/bench')
from blocks import *
torch.set_num_threads(1); torch.set_grad_enabled(False)
model,calib,names,every=sys.argv[1],sys.argv[2].split(','),sys.argv[3].split(','),int(sys.argv[4])
n=4096; c=CONFIG; lay=query_blocks(c,n,n)
OPT=[('sel',k) for k in (0,2,4,8,12,16,24)]+[('last',k) for k in (4,12,24)]
COST=torch.tensor([float(k) for _,k in OPT])
at=np.flatnonzero((lay.begin+c.block<=n)&(lay.begin>=n//3)&(lay.candidates>25))[::every]
def held_n(s,count):
    rank=s.argsort(-1,descending=True).argsort(-1); return (rank<count).float()
def walk(name):
  for l,t in enumerate(torch.load(f'/tmp/ph_{model}_{name}.pt')):
    x=Inputs(*t); G=x.query.shape[1]//x.key.shape[1]
    f=block_mass(x.query,x.key.repeat_interleave(G,1),BlockConfig(24),x.scale)[0]
    for i in at:
        C,b=int(lay.candidates[i]),int(lay.begin[i]); yield l,x,x.grouped(f)[:,:,i,:C],C,b
def parts(x,w):  # per query head adds to the output [Hkv,G,block,model]
    o=(w@x.value[0,:,None,:w.shape[-1]])/w.sum(-1,keepdim=True)
    W=x.weight.unflatten(1,(x.query.shape[1],-1)).transpose(0,1).unflatten(0,(x.key.shape[1],-1))
    return o@W.mT
def outs(x,w,C,f,shared):
    Hkv,G=f.shape[:2]; g=f.sum(1,keepdim=True).expand_as(f) if shared else f
    last=torch.arange(C).expand_as(f).float(); ex=parts(x,w); res=[]
    for kind,k in OPT:
        h=held_n(g if kind=='sel' else last,k)
        left=w.clone(); middle(left,C).mul_(h[:,:,None,:,None]); res.append(parts(x,left)-ex)
    return ex,torch.stack(res,2)  # [Hkv,G,O,block,model]
def run(names):
    D=[]
    for name in names:
        E={}
        for l,x,f,C,b in walk(name):
            w=own_weights(x,b)
            for sh in (True,False):
                ex,r=outs(x,w,C,f,sh)
                d=E.setdefault((l,sh),dict(gram=0,w=0))
                # gram over heads and options: <r_g,o , r_g',o'>
                m=r.flatten(1,2).flatten(2); d['gram']=d['gram']+(m@m.mT).double(); d['w']+=float(ex.sum((0,1)).square().sum())
        for k,d in E.items(): D.append((name,)+k+(d['gram']/d['w'],))
    return D
cal,test=run(calib),run(names)
Ls=sorted({d[1] for d in cal}); O=len(OPT)
def mean_gram(l,sh): return sum(d[3] for d in cal if d[1]==l and d[2]==sh)/len(calib)
Hkv=cal[0][3].shape[0]; G=cal[0][3].shape[1]//O
def head_err(gram): return torch.stack([gram[:,g*O:(g+1)*O,g*O:(g+1)*O].diagonal(dim1=1,dim2=2) for g in range(G)],1) # Hkv,G,O
def group_err(gram): # same option in all heads
    idx=torch.stack([torch.arange(G)*O+o for o in range(O)])
    return torch.stack([gram[:,i][:,:,i].sum((1,2)) for i in idx],1) # Hkv,O
def plan(err,target):
    lo,hi=1e-9,1e2
    for _ in range(60):
        p=math.sqrt(lo*hi); ch=(err+p*COST).argmin(-1)
        if COST[ch].mean()>target: lo=p
        else: hi=p
    ch=(err+hi*COST).argmin(-1); 
    # fill greedily
    e=err.flatten(0,-2); a=ch.flatten(); left=target*a.numel()-COST[a].sum()
    while True:
        more=COST[None]-COST[a][:,None]; gain=e.gather(1,a[:,None])-e
        s=torch.where((more>0)&(more<=left)&(gain>0),gain/more.clamp(min=1e-9),0.)
        k=int(s.argmax()); 
        if s.flatten()[k]<=0: break
        h,o=divmod(k,O); left-=more[h,o]; a[h]=o
    return a.view(ch.shape)
for target in (4.,8.,12.):
    res={}
    gk=torch.stack([group_err(mean_gram(l,True)) for l in Ls]); pk=plan(gk,target)[...,None].expand(-1,-1,G)
    hs=torch.stack([head_err(mean_gram(l,True)) for l in Ls]); ho=torch.stack([head_err(mean_gram(l,False)) for l in Ls])
    plans={'per KV head':(pk,True),'per query head, shared rank':(plan(hs,target),True),'per query head, own rank':(plan(ho,target),False),'uniform sel':(torch.full_like(pk,[i for i,o in enumerate(OPT) if o==('sel',int(target))][0]),True)}
    for r,(a,sh) in plans.items():
        errs=[]
        for name,l,s,gram in test:
            if s!=sh: continue
            idx=torch.arange(G)*O+a[Ls.index(l)]  # Hkv,G
            errs.append(torch.stack([gram[h][idx[h]][:,idx[h]].sum() for h in range(Hkv)]))
        res[r]=torch.stack(errs)
    b=res['per KV head']
    for r,e in res.items():
        lay_=e.sum(1)/b.sum(1); print(f"{model} target {target:.0f} {r:28s} blocks {COST[plans[r][0]].mean():.2f} sum {e.sum():.4f} ({e.sum()/b.sum()-1:+.3f}) geo of layers {lay_.log().mean().exp()-1:+.3f}")
