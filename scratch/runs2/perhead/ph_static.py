import sys, math, torch, numpy as np
sys.path.insert(0,'examples/bench')
from blocks import *
torch.set_num_threads(1); torch.set_grad_enabled(False)
model,calib,names,every,bl=sys.argv[1],sys.argv[2].split(','),sys.argv[3].split(','),int(sys.argv[4]),int(sys.argv[5])
n=4096; c=CONFIG; lay=query_blocks(c,n,n)
at=np.flatnonzero((lay.begin+c.block<=n)&(lay.begin>=n//3)&(lay.candidates>17))[::every]
def pooled(s,b,floor=0):
    Hkv,G,C=s.shape
    base=torch.zeros_like(s)
    if floor: base.scatter_(-1,s.topk(floor,-1).indices,1.)
    rest=(s+1e-9).masked_fill(base>0,-1).flatten(1).topk(G*(b-floor),-1).indices
    return base.flatten(1).scatter(-1,rest,1.).unflatten(-1,(G,C))
def walk(name):
  for l,t in enumerate(torch.load(f'/tmp/ph_{model}_{name}.pt')):
    x=Inputs(*t); G=x.query.shape[1]//x.key.shape[1]
    f=block_mass(x.query,x.key.repeat_interleave(G,1),BlockConfig(16),x.scale)[0]
    for i in at:
        C,b=int(lay.candidates[i]),int(lay.begin[i]); yield l,x,x.grouped(f)[:,:,i,:C],C,b
cnt={};num={}
cap=defaultdict(float)
for name in calib:
  for l,x,f,C,b in walk(name):
    w=own_weights(x,b); true=middle(w,C).sum(-1).sum(2)
    for r,s in (('mass',f),('true',true)):
      cnt[r,l]=cnt.get((r,l),0)+pooled(s,bl).sum(2); num[r,l]=num.get((r,l),0)+1
def rounded(m,total,C):
    m=m.clamp(max=16); out=m.floor()
    for h in range(len(m)):
        left=int(total-out[h].sum()); 
        if left>0:
            order=(m[h]-out[h]).argsort(descending=True)
            k=0
            while left>0:
                g=order[k%len(order)]
                if out[h,g]<16: out[h,g]+=1; left-=1
                k+=1
    return out.long()
counts={k:rounded(cnt[k]/num[k],cnt[k].shape[1]*bl,17) for k in cnt}
def held_n(s,count):
    rank=s.argsort(-1,descending=True).argsort(-1)
    return (rank<count[...,None]).float()
off=defaultdict(dict);whole=defaultdict(float);share=defaultdict(list)
for name in names:
  for l,x,f,C,b in walk(name):
    w=own_weights(x,b); true=middle(w,C).sum(-1).sum(2); exact=output(x,w)
    whole[name,l]+=float(exact.sum(0).square().sum())
    Hkv,G=f.shape[:2]
    g=f.sum(1,keepdim=True).expand_as(f)
    one=torch.full((Hkv,G),bl)
    H={'first':held_n(g,one),'own':held_n(f,one),'+1':held_n(g,one+1),'+2':held_n(g,one+2),'+3':held_n(g,one+3),
       'pool':pooled(f,bl),'pool half':pooled(f,bl,bl//2),
       'static own':held_n(f,counts['mass',l]),'static shared rank':held_n(g,counts['mass',l]),'static true own':held_n(f,counts['true',l]),'static own+.1g':held_n(f+.1*g,counts['true',l])}
    half=(counts['true',l]+bl)//2; 
    for r,h in H.items():
        share[r]+=((true*h).sum((1,2))/true.sum((1,2))).tolist()
        left=w.clone(); middle(left,C).mul_(h[:,:,None,:,None])
        e=(output(x,left)-exact).square().sum((1,2)); off[r][name,l]=off[r].get((name,l),0)+e
E={r:torch.stack([d[k]/whole[k] for k in whole]) for r,d in off.items()}
print(model,calib,names,{l:counts['true',l].tolist() for l in range(3)})
for r,e in E.items():
    rat=e/E['first']; print(f"{model} {bl} {r:20s} share {np.mean(share[r]):.4f} sum {e.sum()/E['first'].sum()-1:+.3f} geo {rat.log().mean().exp()-1:+.3f} median {rat.median()-1:+.3f} worse {(rat>1).float().mean():.2f}")
